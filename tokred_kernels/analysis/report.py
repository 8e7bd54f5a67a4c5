"""The report of records: one page that needs nothing else, its figures as PNG and SVG, its tables as CSV."""

import csv
import itertools
import math
import re
from collections.abc import Callable, Iterator, Sequence
from importlib import resources
from pathlib import Path
from typing import NamedTuple

import numpy as np

from . import figures, summary
from .summary import DENSE, Group

# What a table says over a column, how many decimals, and what it means.
COLUMNS: dict[str, tuple[str, int, str]] = {
    "dataset": ("data set", 0, ""),
    "model": ("model", 0, ""),
    "method": ("method", 0, ""),
    "keep_rate": ("keep rate", 2, "share of the patches kept in each of three stages"),
    "keep_rate_a": ("keep rate A", 2, ""),
    "keep_rate_b": ("keep rate B", 2, ""),
    "block": ("after block", 0, "from 0"),
    "a": ("A", 0, ""),
    "b": ("B", 0, ""),
    "reference": ("reference", 0, "the method that the others are compared with"),
    "measure": ("measure", 0, ""),
    "n": ("methods", 0, "how many methods were compared with the reference"),
    "left": ("patches left", 1, "tokens besides the class token after the last block, mean over images"),
    "depth": ("depth", 2, "blocks that a patch passes as a token of its own, mean"),
    "agreement": ("same answer", 3, "share of images with the answer of the dense model"),
    "accuracy": ("accuracy", 3, "share of right answers"),
    "iou": ("IoU", 3, "intersection over union of the kept patches"),
    "ioa": ("IoA", 3, "share of the smaller kept set that is in the larger"),
    "homogeneity": ("homogeneity", 3, "1: each cluster of B lies within one of A"),
    "completeness": ("completeness", 3, "1: each cluster of A lies within one of B"),
    "v_measure": ("V-measure", 3, "harmonic mean of homogeneity and completeness; 1: equal clusters"),
    "cka": ("CKA", 3, "linear centred kernel alignment of class tokens; 1: equal up to rotation and scale"),
    "procrustes": ("Procrustes", 3, "distance of class tokens after the best rotation; 0: equal"),
    "mean_cca": ("mean CCA", 3, "mean canonical correlation of class tokens; 1: equal up to a linear map"),
    "pwcca": ("PWCCA", 3, "the same, weighted by what A's class tokens are made of"),
    "kl": ("KL(A, B)", 4, "divergence of the depth maps, nats; 0: equal"),
    "kl_back": ("KL(B, A)", 4, ""),
    "js": ("JS", 4, "Jensen-Shannon divergence of the depth maps, nats; 0: equal"),
    "pearson": ("Pearson", 3, "linear correlation of the depth maps"),
    "spearman": ("Spearman", 3, "rank correlation"),
    "emd": ("EMD", 3, "earth mover's distance of the depth maps, patches; 0: equal"),
    "sim": ("SIM", 3, "overlap of the depth maps, each from 0 to its most; 1: equal"),
    "spearman_p": ("p", 3, "p-value of Spearman"),
    "kendall": ("Kendall", 3, "rank correlation, tau-b"),
    "kendall_p": ("p", 3, "p-value of Kendall"),
}


# Matrices of methods: the measure, the lower end of its colours, title and text.
MATRICES = (
    ("iou", 0, "Do methods keep the same patches?", "IoU of the patches kept at the end; 1: the same."),
    ("v_measure", 0, "Do clusters agree?", "V-measure of the clusters at the end; 1: the same clusters."),
    ("cka", 0, "Do class tokens agree?", "Linear CKA of the last class tokens; 1: equal up to rotation and scale."),
    ("pearson", -1, "Are the same places kept on average?", "Pearson correlation of the maps above."),
)
# Methods down, pairs of keep rates across.
OVER_RATES = (
    ("ioa", "Is what a low keep rate keeps kept at a high one?", "IoA of one method at two keep rates; 1: all of it."),
    ("v_measure", "Do clusters stay across keep rates?", "V-measure of one method at two keep rates."),
)


class Cell(NamedTuple):
    text: str
    sort: str  # what a click on the column's title sorts by; nothing: last


class Column(NamedTuple):
    title: str
    hint: str
    text: bool


class Table(NamedTuple):
    name: str
    title: str
    text: str
    columns: list[Column]
    cells: list[list[Cell]]


class Shown(NamedTuple):
    """A figure on the page."""

    name: str
    title: str
    text: str
    svg: str


class Example(NamedTuple):
    """A photograph at a keep rate: the name of each picture, and the picture as a data URI."""

    image: str
    rate: float
    pictures: list[tuple[str, str]]


class Section(NamedTuple):
    name: str
    title: str
    facts: list[str]
    blocks: list[Table | Shown]
    examples: list[Example]


def write(
    folder: Path,
    found: Sequence[Group],
    examples: Callable[[Group], list[Example]],
    on_pair: Callable[[str], object] = lambda text: None,
) -> Path:
    """Writes report.html, figures/ and tables/ into `folder`; the path of the page.

    Args:
        found: from `summary.groups`.
        examples: the pictures of a group; none, and its section has none.
        on_pair: is told what comes next.
    """
    for a, b in itertools.combinations(found, 2):
        if name(a) == name(b):
            raise ValueError(f"data sets {a.dataset} and {b.dataset} are one as names of files: rename a folder")
    for inside in ("figures", "tables"):
        (folder / inside).mkdir(exist_ok=True)
    sections = []
    for group in found:
        on_pair(f"comparing: {group.model} on {group.dataset}")
        blocks = [save(folder) for save in _group(group)]
        title = f"{group.model} on {group.dataset}"
        sections.append(Section(name(group), title, _facts(group), blocks, examples(group)))
    on_pair("comparing models and data sets")
    across = [save(folder) for save in _across(found)]
    page = folder / "report.html"
    page.write_text(_page(found, sections, across))
    return page


def _group(group: Group) -> Iterator[Callable[[Path], Table | Shown]]:
    prefix = name(group)
    depth = group.dense.header.depth
    maps = {rate: {s.method: s.depth_map for s in group.at(rate)} for rate in group.rates}
    yield _figure(
        f"{prefix}.depth",
        "Where patches stay",
        "How many blocks the patch at each place passes as a token of its own, until it is dropped, fused or merged: "
        "the mean over the images. Bright places are kept.",
        figures.depth_maps(maps, group.methods, depth),
    )
    yield _table(
        f"{prefix}.settings",
        "Settings",
        "What each method leaves, and how often the model still says what it says without reduction.",
        summary.settings(group),
    )
    compared = summary.pairs(group)
    for measure, low, title, text in MATRICES:
        found = _matrices(group, compared, measure)
        if found:
            yield _figure(f"{prefix}.{measure}", title, text, figures.matrices(found, low, 1))
    yield _table(
        f"{prefix}.pairs",
        "Every pair of methods",
        "All measures at equal keep rate, after the last block. Empty: the measure does not suit both. A column is "
        "missing if it suits no pair, such as CCA, which needs more images than class tokens have dimensions.",
        compared,
    )
    yield _table(
        f"{prefix}.blocks",
        "Block by block",
        f"{' and '.join(summary.REFERENCES)} against the others, after each block whose class token was recorded.",
        summary.across_blocks(group),
    )
    rates = summary.across_rates(group)
    for measure, title, text in OVER_RATES if rates else ():
        values, methods, columns = _across_rates(group, rates, measure)
        if np.isfinite(values).any():
            yield _figure(f"{prefix}.rates.{measure}", title, text, figures.table(values, methods, columns, 0, 1))
    yield _table(f"{prefix}.rates", "One method at two keep rates", "A keeps more than B.", rates)
    if len(group.rates) > 1:
        lines = {method: [] for method in group.methods}
        for setting in group.reduced:
            lines[setting.method].append((setting.header.keep_rate, summary.score(setting, group.dense)))
        known = not math.isnan(group.dense.accuracy)
        yield _figure(
            f"{prefix}.accuracy" if known else f"{prefix}.agreement",
            "How often is the answer right?" if known else "How often is the answer that of the dense model?",
            f"Share of the images; {group.dense.accuracy:.3f} without reduction." if known else "Share of the images.",
            figures.lines(lines, "accuracy" if known else "same answer as dense"),
        )
    yield _table(
        f"{prefix}.proxies",
        "Do patterns predict accuracy?",
        "Rank correlations, over the other methods, of each measure against a reference with the accuracy of the "
        "reference less that of the method; without labels, accuracy is how often the answer is the dense model's.",
        summary.proxy_rows(group, compared),
    )


def _across(found: Sequence[Group]) -> Iterator[Callable[[Path], Table]]:
    yield _table("models", "One method in two models", "On the same images.", summary.across_models(found))
    yield _table("datasets", "One method on two data sets", "The maps of depth.", summary.across_datasets(found))


def _figure(name: str, title: str, text: str, figure) -> Callable[[Path], Shown]:
    def save(folder: Path) -> Shown:
        (folder / "figures" / f"{name}.svg").write_text(figures.svg(figure))
        (folder / "figures" / f"{name}.png").write_bytes(figures.png(figure))
        return Shown(name, title, text, figures.svg(figure, page=True))

    return save


def _table(name: str, title: str, text: str, rows: Sequence[dict]) -> Callable[[Path], Table]:
    def save(folder: Path) -> Table:
        if rows:
            with open(folder / "tables" / f"{name}.csv", "w", newline="") as file:
                writer = csv.DictWriter(file, list(rows[0]))
                writer.writeheader()
                writer.writerows({key: "" if _empty(value) else value for key, value in row.items()} for row in rows)
        keys = [key for key in rows[0] if not all(_empty(row[key]) for row in rows)] if rows else []
        columns = [Column(COLUMNS[key][0], COLUMNS[key][2], isinstance(rows[0][key], str)) for key in keys]
        return Table(name, title, text, columns, [[_cell(key, row[key]) for key in keys] for row in rows])

    return save


def _cell(key: str, value: object) -> Cell:
    if _empty(value):
        return Cell("", "")
    if isinstance(value, str):
        return Cell(COLUMNS[value][0] if key == "measure" else value, value)
    if value == math.inf:
        return Cell("∞", "Infinity")
    return Cell(figures.number(value, COLUMNS[key][1]), repr(value))


def _empty(value: object) -> bool:
    return isinstance(value, float) and math.isnan(value)


def _matrices(group: Group, compared: Sequence[dict], measure: str) -> dict[float, tuple[list[str], np.ndarray]]:
    """By keep rate, the methods that have the measure with some other, and the symmetric matrix of them."""
    found = {}
    for rate in group.rates:
        values = {(row["a"], row["b"]): row[measure] for row in compared if row["keep_rate"] == rate}
        values = {pair: value for pair, value in values.items() if not _empty(value)}
        methods = [DENSE, *(s.method for s in group.at(rate))]
        names = [name for name in methods if any(name in pair for pair in values)]
        if names:
            matrix = np.eye(len(names))
            for i, j in itertools.combinations(range(len(names)), 2):
                matrix[i, j] = matrix[j, i] = values.get((names[i], names[j]), math.nan)
            found[rate] = names, matrix
    return found


def _across_rates(group: Group, rows: Sequence[dict], measure: str) -> tuple[np.ndarray, list[str], list[str]]:
    """Methods down that have the measure, pairs of keep rates across."""
    columns = [f"{a:g} | {b:g}" for a, b in itertools.combinations(group.rates, 2)]
    values = {(row["method"], f"{row['keep_rate_a']:g} | {row['keep_rate_b']:g}"): row[measure] for row in rows}
    full = np.array([[values.get((m, c), math.nan) for c in columns] for m in group.methods]).reshape(-1, len(columns))
    some = np.isfinite(full).any(1)
    return full[some], [m for m, has in zip(group.methods, some, strict=True) if has], columns


def _facts(group: Group) -> list[str]:
    header = group.dense.header
    rows, columns = header.grid
    facts = [f"{len(group.dense.record)} images", f"{rows} x {columns} patches", f"{header.depth} blocks"]
    facts.append(f"{header.weights} weights")
    if untrained := list(dict.fromkeys(s.method for s in group.reduced if s.header.untrained)):
        facts.append("learned parts random: " + ", ".join(untrained))
    return facts


def name(group: Group) -> str:
    """The group in names of files and links."""
    return re.sub(r"[^\w.-]+", "-", f"{group.dataset}.{group.model}")


def _page(found: Sequence[Group], sections: Sequence[Section], across: Sequence[Table]) -> str:
    import jinja2

    source = resources.files(__package__).joinpath("page.html").read_text()
    template = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(source)
    random = sorted({group.model for group in found if group.dense.header.weights.startswith("random")})
    return template.render(sections=sections, across=[table for table in across if table.cells], random=random)
