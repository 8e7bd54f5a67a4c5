"""Pictures of assignments made by hand, checked pixel by pixel."""

import numpy as np
import pytest
from PIL import Image

from tokred_kernels import draw

GRIDS = {
    "14x14": ((224, 224), (14, 14)),
    "24x24": ((384, 384), (24, 24)),
    "wide": ((48, 112), (3, 7)),
    "tall": ((90, 30), (9, 3)),
}


def photograph(height: int, width: int, seed: int = 0) -> Image.Image:
    """Noise, so that no two pixels agree by chance of the place; from 40 up, so that darkening shows."""
    pixels = np.random.default_rng(seed).integers(40, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def cell(pixels, grid, patch: int) -> np.ndarray:
    """The pixels [h, w, 3] of a patch."""
    pixels = np.asarray(pixels)
    h, w = pixels.shape[0] // grid[0], pixels.shape[1] // grid[1]
    y, x = divmod(patch, grid[1])
    return pixels[y * h : (y + 1) * h, x * w : (x + 1) * w]


def holds(picture: Image.Image, panel: Image.Image) -> int:
    """How often the picture has the panel, pixel for pixel."""
    whole, part = np.asarray(picture), np.asarray(panel)
    starts = np.argwhere((whole[: -len(part) + 1, : -len(part[0]) + 1] == part[0, 0]).all(-1))
    return sum((whole[y : y + len(part), x : x + len(part[0])] == part).all() for y, x in starts)


@pytest.fixture(params=GRIDS.values(), ids=GRIDS.keys())
def case(request):
    size, grid = request.param
    return photograph(*size), grid, np.arange(grid[0] * grid[1]) + 1  # row 0 is the class token's


class TestPanel:
    def test_patches_alone_are_the_photograph(self, case):
        image, grid, source = case
        for rows in (source, source[::-1].copy()):
            np.testing.assert_array_equal(draw.panel(image, rows, grid), image)

    def test_dropped_patches_keep_their_share_of_brightness(self, case):
        image, grid, source = case
        dropped = [0, 4, len(source) - 1]
        source[dropped] = -1
        drawn = draw.panel(image, source, grid)
        for patch in range(len(source)):
            factor = draw.DROPPED if patch in dropped else 1
            np.testing.assert_array_equal(cell(drawn, grid, patch), (cell(image, grid, patch) * factor).round())

    def test_merged_patches_have_their_mean_colour_and_nothing_else_changes(self, case):
        image, grid, source = case
        far = grid[1] + 1  # diagonal neighbours and the last patch: a row need not be connected
        source[[0, far, -1]] = source[0]
        drawn = draw.panel(image, source, grid)
        members = [cell(image, grid, patch) for patch in (0, far, len(source) - 1)]
        mean = np.mean([member.mean((0, 1)) for member in members], 0).round()
        for patch in (0, far, len(source) - 1):
            inside = cell(drawn, grid, patch)[1:-1, 1:-1]  # patches here are below 32 pixels: lines of one
            assert (inside == mean).all()
        alone = [patch for patch in range(len(source) - 1) if patch not in (0, far)]
        for patch in alone:
            np.testing.assert_array_equal(cell(drawn, grid, patch), cell(image, grid, patch))

    def test_outline_is_exactly_where_groups_meet(self, case):
        image, grid, source = case
        source[[0, 1]] = 1  # at a corner of the picture
        source[[grid[1], grid[1] + 1]] = 2  # just below
        drawn = np.asarray(draw.panel(image, source, grid)).astype(int)
        h, w = image.height // grid[0], image.width // grid[1]
        for top, patches in ((0, (0, 1)), (h, (grid[1], grid[1] + 1))):
            mean = np.concatenate([cell(image, grid, patch) for patch in patches]).mean((0, 1)).round()
            lined = (drawn[top : top + h, : 2 * w] != mean).any(-1)
            want = np.zeros((h, 2 * w), bool)
            want[:, -1] = True  # the neighbours at the right are other rows, and so is the group above or below
            want[-1] = True
            want[0] |= top > 0
            np.testing.assert_array_equal(lined, want)
            line = drawn[top : top + h, : 2 * w][want]
            assert (line == line[0]).all()
            assert np.abs(line[0] - mean).max() >= 50

    def test_dark_and_bright_groups_have_visible_outlines(self):
        for level in (0, 60, 127, 128, 200, 255):
            image = Image.new("RGB", (48, 16), (level,) * 3)
            drawn = np.asarray(draw.panel(image, np.array([1, 1, 2]), (1, 3))).astype(int)
            assert (np.abs(drawn[:, 31] - level) >= 64).all()
            assert (drawn[:, :31] == level).all()

    def test_members_of_a_fused_token_are_darkened_tinted_and_hatched(self, case):
        image, grid, source = case
        fused = [0, 1, grid[1] + 1]
        source[fused] = 99_999
        drawn = draw.panel(image, source, grid, fused={99_999})
        tint = np.array(draw.FUSED)
        for patch in fused:
            pixels = cell(drawn, grid, patch)
            hatched = (pixels == tint).all(-1)
            assert 0.05 < hatched[1:-1, 1:-1].mean() < 0.3
            tinted = (draw.FUSED_DARK * cell(image, grid, patch) + draw.FUSED_TINT * tint).round()
            np.testing.assert_array_equal(pixels[~hatched], tinted[~hatched])
        assert (cell(drawn, grid, 1)[:, -1] == tint).all()  # a line towards another row
        assert not (cell(drawn, grid, 0)[:, -1] == tint).all()  # and none between members
        for patch in set(range(len(source))) - set(fused):
            np.testing.assert_array_equal(cell(drawn, grid, patch), cell(image, grid, patch))

    def test_a_fused_token_of_one_patch_is_marked(self, case):
        image, grid, source = case
        drawn = draw.panel(image, source, grid, fused={int(source[3])})
        assert (cell(drawn, grid, 3) == draw.FUSED).all(-1).any()
        assert (cell(drawn, grid, 3) != cell(image, grid, 3)).any(-1).all()

    def test_two_fused_tokens_have_a_line_between_them(self):
        image = photograph(32, 32)
        drawn = np.asarray(draw.panel(image, np.array([5, 6, 5, 6]), (2, 2), fused={5, 6}))
        assert (drawn[:, 15:17] == draw.FUSED).all()

    def test_everything_dropped_or_merged(self, case):
        image, grid, source = case
        np.testing.assert_array_equal(
            draw.panel(image, source * 0 - 1, grid), (np.asarray(image) * draw.DROPPED).round()
        )
        one = np.asarray(draw.panel(image, source * 0, grid))
        assert (one == np.asarray(image).mean((0, 1)).round()).all()

    def test_patches_of_unequal_pixels_are_all_drawn(self):
        source = np.arange(9)
        source[4] = -1
        drawn = np.asarray(draw.panel(photograph(50, 50), source, (3, 3)))
        dark = (drawn < 65).all(-1)  # a quarter of at most 255; the photograph starts at 40
        assert dark[17:33, 17:33].all()
        assert 16**2 <= dark.sum() < 18**2

    def test_refuses_a_source_of_another_grid(self):
        with pytest.raises(ValueError, match=r"source must be \[P\] = \[4\], got \[5\]"):
            draw.panel(photograph(8, 8), np.arange(5), (2, 2))

    def test_greyscale_and_palette_images_become_rgb(self):
        for mode in ("L", "P", "RGBA"):
            assert draw.panel(photograph(32, 32).convert(mode), np.arange(4), (2, 2)).mode == "RGB"


def test_what_is_left_is_the_mean_colour_of_every_token(case):
    image, grid, source = case
    source[3] = -1
    source[[5, 6]] = 99_999
    drawn = draw.tokens(image, source, grid, fused={99_999})
    for patch in (0, 1, 2, 4, len(source) - 1):
        assert (cell(drawn, grid, patch) == cell(image, grid, patch).mean((0, 1)).round()).all()
    assert not cell(drawn, grid, 3).any()
    both = np.concatenate([cell(drawn, grid, 5), cell(drawn, grid, 6)])
    mean = np.concatenate([cell(image, grid, 5), cell(image, grid, 6)]).mean((0, 1)).round()
    hatched = (both == draw.FUSED).all(-1)
    assert hatched.any()
    assert (both[~hatched] == mean).all()


def test_panels_are_the_photograph_one_a_source_and_what_is_left(case):
    image, grid, source = case
    second = np.where(source % 2, source, 0)
    drawn = draw.panels(image, [source, second], grid, [(), {0}])
    want = [
        image,
        draw.panel(image, source, grid),
        draw.panel(image, second, grid, {0}),
        draw.tokens(image, second, grid, {0}),
    ]
    assert len(drawn) == 4
    for got, expected in zip(drawn, want, strict=True):
        np.testing.assert_array_equal(got, expected)
    np.testing.assert_array_equal(draw.panels(image, [second], grid)[1], draw.panel(image, second, grid))


def test_marks_name_what_a_panel_shows():
    assert draw.marks(np.array([1, 2, 3])) == {"alone"}
    assert draw.marks(np.array([1, 1, -1])) == {"merged", "dropped"}
    assert draw.marks(np.array([1, 4, 4]), {4}) == {"alone", "fused"}
    assert draw.marks(np.array([4, -1, 4]), {4, 7}) == {"fused", "dropped"}


class TestSheet:
    def panel(self, side: int = 200, note: str = "7 tokens"):
        return draw.Titled(photograph(side, side), "block 3", note)

    @pytest.mark.parametrize(
        ("count", "columns", "lines"), [(1, 1, 1), (5, 5, 1), (8, 8, 1), (9, 5, 2), (14, 7, 2), (26, 7, 4)]
    )
    def test_long_rows_are_broken_evenly_and_every_panel_is_there(self, count, columns, lines):
        panel = self.panel()
        picture = draw.sheet([[panel] * count], "heading", {"alone"})
        assert picture.width // 212 == columns
        assert picture.height // 230 == lines
        assert holds(picture, panel.image) == count

    def test_photographs_are_stacked(self):
        one, two = draw.sheet([[self.panel()]], "a", {"alone"}), draw.sheet([[self.panel()]] * 2, "a", {"alone"})
        assert one.width == two.width
        assert two.height - one.height > 200

    def test_small_panels_are_enlarged_in_whole_pixels(self):
        panel = self.panel(side=60)
        picture = draw.sheet([[panel]], "a", {"alone"})
        assert holds(picture, panel.image.resize((240, 240), Image.Resampling.NEAREST)) == 1

    def test_heading_titles_and_legend_are_written(self):
        def drawn(heading="heading", title="block 3", note="7 tokens", marks=("alone",)):
            return draw.sheet([[draw.Titled(Image.new("RGB", (300, 300), "white"), title, note)]], heading, marks)

        plain = drawn()
        for changed in (drawn("other"), drawn(title="block 4"), drawn(note="8 tokens")):
            assert changed.size == plain.size
            assert changed.tobytes() != plain.tobytes()
        for mark in ("merged", "fused", "dropped"):
            assert drawn(marks=("alone", mark)).tobytes() != plain.tobytes()

    def test_long_words_are_cut_inside_the_picture(self):
        picture = draw.sheet([[draw.Titled(Image.new("RGB", (200, 200)), "a" * 500, "7 tokens")]], "b" * 500, {"alone"})
        assert picture.width == 200 + 2 * draw.GAP
        pixels = np.asarray(picture)
        assert (pixels[:, : draw.GAP - 1] == 255).all()
        assert (pixels[:, -draw.GAP + 1 :] == 255).all()
