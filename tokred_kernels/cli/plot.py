"""The pictures of `tokred bench --plot`.

One method: throughput of the variants, and tokens left after each block. All of them: speed over MACs.
"""

from pathlib import Path

from . import method_options
from .table import label

MARKERS = "osD^v<>Pphd8X"


def save(record: dict, path: Path) -> None:
    """Writes a PNG of a record of `tokred bench`."""
    from matplotlib.figure import Figure

    method, timing = record["method"], record["timing"]
    figure = Figure(figsize=(11, 4), layout="constrained")
    throughput, tokens = figure.subplots(1, 2, width_ratios=(3, 2))

    names = list(timing)[::-1]
    bars = throughput.barh(
        [label(name, method) for name in names],
        [timing[name]["images_per_second"] for name in names],
        color=["tab:blue" if name == method else "lightgray" for name in names],
    )
    throughput.bar_label(bars, [f"{timing[name]['speedup']:.2f}x" for name in names], label_type="center")
    ideal = timing["dense"]["images_per_second"] * record["ideal_speedup"]
    throughput.axvline(ideal, color="black", linestyle=":")
    throughput.set_xlabel(f"images/s; dotted: {record['ideal_speedup']:.2f}x, the speed-up by MACs")

    tokens.step(range(len(record["tokens"])), record["tokens"], where="post")
    tokens.set(xlabel="blocks done", ylabel="tokens", ylim=(0, None))

    figure.suptitle(
        f"{record['model']}, {method} {method_options.text(record['options'])}, {record['dtype']}, {record['device']}, "
        f"{record['batch_size']} images a call, {record['weights']} weights"
    )
    figure.savefig(path, dpi=120)


def save_all(record: dict, path: Path) -> None:
    """Writes a PNG of a record of `tokred bench --method all`."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    rows = [row for row in record["rows"] if "speedup" in row]
    figure = Figure(figsize=(10, 6), layout="constrained")
    axes = figure.subplots()
    axes.set_prop_cycle(color=colormaps["tab20"].colors)
    oracle = sorted({(row["macs"], row["oracle_images_per_second"]) for row in rows})
    axes.plot(*_line(oracle), color="black", linestyle=":", label="oracle: tokens sliced, for free")
    for index, method in enumerate(dict.fromkeys(row["method"] for row in rows)):
        points = [(row["macs"], row["images_per_second"]) for row in rows if row["method"] == method]
        untrained = any(row["untrained"] for row in rows if row["method"] == method)
        axes.plot(*_line(points), marker=MARKERS[index % len(MARKERS)], label=method + " *" * untrained)
    dense = [(record["macs"]["dense"], row["dense_images_per_second"]) for row in rows[:1]]
    axes.plot(*_line(dense), color="black", marker="*", linestyle="", label="dense")
    axes.set(xlabel="GMACs an image", ylabel="images/s")
    axes.legend(ncols=2)
    figure.suptitle(
        f"{record['model']}, {record['dtype']}, {record['device']}, {record['batch_size']} images a call, "
        f"{record['weights']} weights"
    )
    figure.savefig(path, dpi=120)


def _line(points: list[tuple[float, float]]) -> tuple[list[float], list[float]]:
    """The two axes of points (MACs, images/s), from few MACs to many."""
    points = sorted(points)
    return [macs / 1e9 for macs, _ in points], [speed for _, speed in points]
