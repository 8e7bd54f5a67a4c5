"""The picture of `tokred bench --plot`: throughput of the variants, and tokens left after each block."""

from pathlib import Path

from . import method_options
from .table import label


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
