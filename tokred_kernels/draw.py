"""Pictures of a token reduction, with Pillow and numpy: what was dropped, merged and fused, on the photograph itself.

panels   the photograph, its patches after each reducing block, and the tokens that are left
sheet    rows of titled panels with a heading and a legend, as one picture
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFont

# A dropped patch keeps this share of its brightness: dark on any photograph, and its content still shows.
DROPPED = 0.25
# Members of a fused token keep FUSED_DARK of their brightness, get FUSED_TINT of the colour, and lines in it.
FUSED, FUSED_DARK, FUSED_TINT = (235, 80, 205), 0.4, 0.2
# The line around a group is its colour, moved this far towards black or white, whichever is farther.
OUTLINE = 0.55

PAPER, INK, GREY = (255, 255, 255), (25, 25, 25), (115, 115, 115)
# What a panel may show: its words in the legend, and four patches that show it, as source and fused rows.
MARKS = {
    "alone": ("kept", (0, 1, 2, 3), ()),
    "merged": ("merged: the mean colour", (0, 0, 0, 1), ()),
    "fused": ("members of a fused token", (0, 0, 0, 0), (0,)),
    "dropped": ("dropped", (-1, -1, -1, -1), ()),
}

GAP, COLUMNS, SMALLEST = 12, 8, 200  # pixels between panels; most panels in a line; least width of a panel


def panels(
    image: Image.Image,
    sources: Sequence[np.ndarray],
    grid: tuple[int, int],
    fused: Sequence[Collection[int]] | None = None,
) -> list[Image.Image]:
    """The photograph, a `panel` for each of `sources`, and the `tokens` that the last one leaves.

    Args:
        image: what the model saw; its patches are the cells of `grid`, in reading order.
        sources: for each panel, one at least, the row [P] in which every patch is, -1 if dropped.
        grid: rows and columns of patches, P in all.
        fused: for each panel, the rows that are fused tokens; None: there are none.

    Raises:
        ValueError: a source is not [P], or there are not as many `fused` as `sources`.
    """
    rows = [()] * len(sources) if fused is None else fused
    drawn = [panel(image, source, grid, joined) for source, joined in zip(sources, rows, strict=True)]
    return [image.convert("RGB"), *drawn, tokens(image, sources[-1], grid, rows[-1])]


def panel(image: Image.Image, source: np.ndarray, grid: tuple[int, int], fused: Collection[int] = ()) -> Image.Image:
    """The photograph with its patches as `source` [P] says.

    A patch alone in its row is left as it is; a dropped one keeps DROPPED of its brightness. The members of a row get
    their mean colour (the mean of their sRGB values) and a line wherever they meet another row. The members of a fused
    row are darkened, tinted and hatched instead, with the same line.
    """
    groups = _Groups(image, source, grid, fused)
    out = groups.photograph.copy()
    out[groups.at == 0] *= DROPPED
    merged = (groups.members > 1) & ~groups.fused
    groups.fill(out, merged)
    marked = groups.fused[groups.at]
    out[marked] = FUSED_DARK * out[marked] + FUSED_TINT * np.array(FUSED)
    groups.hatch(out)
    groups.outline(out, merged | groups.fused)
    return Image.fromarray(out.round().astype(np.uint8))


def tokens(image: Image.Image, source: np.ndarray, grid: tuple[int, int], fused: Collection[int] = ()) -> Image.Image:
    """What is left: every row of `source` [P] in its mean colour, a patch alone too; dropped patches are black."""
    groups = _Groups(image, source, grid, fused)
    out = np.zeros_like(groups.photograph)
    groups.fill(out, groups.members > 0)
    groups.hatch(out)
    groups.outline(out, (groups.members > 1) | groups.fused)
    return Image.fromarray(out.round().astype(np.uint8))


class _Groups:
    """The pixels [H, W] of a photograph by the row of their patch; group 0 is what was dropped."""

    def __init__(self, image: Image.Image, source: np.ndarray, grid: tuple[int, int], fused: Collection[int]):
        P = grid[0] * grid[1]
        source = np.asarray(source)
        if source.shape != (P,):
            raise ValueError(f"draw: source must be [P] = [{P}], got {list(source.shape)}")
        self.photograph = np.asarray(image.convert("RGB"), dtype=np.float64)
        H, W = self.photograph.shape[:2]
        rows, group = np.unique(np.append(source, -1), return_inverse=True)
        patch = (np.arange(H) * grid[0] // H)[:, None] * grid[1] + np.arange(W) * grid[1] // W
        self.at = group[patch]
        self.members = np.bincount(group[:P], minlength=len(rows))
        self.members[0] = 0
        self.fused = np.isin(rows, list(fused))
        pixels = np.bincount(self.at.ravel(), minlength=len(rows)).clip(1)
        channels = np.moveaxis(self.photograph, 2, 0)
        self.mean = np.stack([np.bincount(self.at.ravel(), c.ravel(), len(rows)) / pixels for c in channels], 1)
        self.line = max(1, H // grid[0] // 16)  # pixels: 1 up to patches of 31

    def fill(self, out: np.ndarray, chosen: np.ndarray) -> None:
        """Mean colours for the groups that are `chosen`."""
        where = chosen[self.at]
        out[where] = self.mean[self.at[where]]

    def hatch(self, out: np.ndarray) -> None:
        """Diagonal lines over fused groups, continuous from patch to patch."""
        H, W = self.at.shape
        diagonal = (np.arange(H)[:, None] + np.arange(W)) % (8 * self.line) < self.line
        out[diagonal & self.fused[self.at]] = FUSED

    def outline(self, out: np.ndarray, chosen: np.ndarray) -> None:
        """A line in the pixels of chosen groups that have another group within `line` pixels, diagonally too."""
        H, W = self.at.shape
        around = np.pad(self.at, self.line, mode="edge")
        shifts = range(2 * self.line + 1)
        border = np.any([around[y : y + H, x : x + W] != self.at for y in shifts for x in shifts], axis=0)
        where = border & chosen[self.at]
        dark = self.mean @ (0.299, 0.587, 0.114) < 128
        colour = (1 - OUTLINE) * self.mean + OUTLINE * np.where(dark, 255, 0)[:, None]
        colour[self.fused] = FUSED
        out[where] = colour[self.at[where]]


@dataclass(frozen=True)
class Titled:
    """A panel, its title at the left above it and a note at the right."""

    image: Image.Image
    title: str
    note: str


def marks(source: np.ndarray, fused: Collection[int] = ()) -> set[str]:
    """Which of MARKS the panel of a source shows."""
    rows, members = np.unique(source, return_counts=True)
    joined = np.isin(rows, list(fused))
    alone = ~joined & (rows >= 0) & (members == 1)
    shown = zip(MARKS, (alone, ~joined & (rows >= 0) & (members > 1), joined, rows < 0), strict=True)
    return {mark for mark, groups in shown if groups.any()}


def sheet(rows: Sequence[Sequence[Titled]], heading: str, marks: Collection[str]) -> Image.Image:
    """Rows of panels of one size under a heading, above a legend.

    Args:
        rows: the panels of one photograph each; a row of more than COLUMNS is broken into equal lines.
        heading: one line.
        marks: which of MARKS the legend explains.
    """
    lines = []
    for row in rows:
        columns = -(-len(row) // -(-len(row) // COLUMNS))
        lines += [row[start : start + columns] for start in range(0, len(row), columns)]
    scale = max(1, -(-SMALLEST // min(rows[0][0].image.size)))
    W, H = (side * scale for side in rows[0][0].image.size)
    text = max(13, W // 16)
    small, large = ImageFont.load_default(text), ImageFont.load_default(round(1.25 * text))
    title = text + GAP // 2 + 2
    top = round(1.25 * text) + 2 * GAP

    columns = max(map(len, lines))
    size = (GAP + columns * (W + GAP), top + len(lines) * (title + H + GAP) + 2 * text + GAP)
    picture = Image.new("RGB", size, PAPER)
    draw = ImageDraw.Draw(picture)
    draw.text((GAP, GAP), _shortened(heading, large, size[0] - 2 * GAP), INK, large)
    for i, line in enumerate(lines):
        for j, one in enumerate(line):
            x, y = GAP + j * (W + GAP), top + i * (title + H + GAP)
            room = W - small.getlength(one.note) - GAP
            draw.text((x, y), _shortened(one.title, small, room), INK, small)
            draw.text((x + W, y), one.note, GREY, small, anchor="ra")
            picture.paste(one.image.resize((W, H), Image.Resampling.NEAREST), (x, y + title))
    _legend(picture, (GAP, size[1] - 2 * text - GAP // 2), small, text, marks)
    return picture


def _legend(picture: Image.Image, at: tuple[int, int], font, text: int, marks: Collection[str]) -> None:
    """Four patches for each mark, drawn by `panel`."""
    side = 2 * text
    slope = np.linspace(0.55, 1, side)
    sample = Image.fromarray((np.array([130, 185, 235]) * (slope[:, None] * slope)[..., None]).astype(np.uint8))
    draw = ImageDraw.Draw(picture)
    x, y = at
    for mark, (words, source, fused) in MARKS.items():
        if mark not in marks:
            continue
        picture.paste(panel(sample, np.array(source), (2, 2), fused), (x, y))
        draw.text((x + side + GAP // 2, y + side // 2), words, INK, font, anchor="lm")
        x += side + round(font.getlength(words)) + 3 * GAP


def _shortened(text: str, font, width: float) -> str:
    """The text, its end replaced by … if it is wider than `width` pixels."""
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "…") > width:
        text = text[:-1]
    return text + "…"
