"""What `tokred bench` shows: a progress bar on stderr while it works, a table on stdout when it is done."""

import contextlib
import sys
from collections.abc import Iterator

LABELS = {
    "dense": "dense",
    "oracle": "oracle (tokens sliced, free)",
    "oracle_masked": "oracle with key mask",
    "plain_sdpa": "{method}, plain PyTorch, SDPA",
    "plain_explicit": "{method}, plain PyTorch",
}


def label(name: str, method: str) -> str:
    """The name of a variant for people."""
    return LABELS.get(name, "{method}, tokred").format(method=method)


class Stages:
    """The bar of a run: what it is doing now, and how far it is."""

    def __init__(self, bar):
        self._bar = bar
        self._task = bar.add_task("starting", total=None)

    def stage(self, text: str, total: int | None = None) -> None:
        self._bar.reset(self._task, total=total, description=text)

    def advance(self) -> None:
        self._bar.advance(self._task)


@contextlib.contextmanager
def progress() -> Iterator[Stages]:
    """A progress bar on stderr; nothing where stderr is no terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    console = Console(file=sys.stderr)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        yield Stages(bar)


def show(record: dict) -> None:
    """Prints the record of a run."""
    from rich.console import Console

    console = Console(highlight=False, soft_wrap=True)
    method, size = record["method"], "x".join(map(str, record["image_size"]))
    where = record["machine"]["gpus"][0]["name"] if record["device"].startswith("cuda") else _cpu(record)
    console.print(f"[bold]{record['model']}[/], {method} r={record['r']}, {record['weights']} weights, {record['dtype']}")
    console.print(f"{len(record['images'])} images of {size}, {record['batch_size']} a call, on {where}")
    tokens, macs = record["tokens"], record["macs"]
    console.print(
        f"tokens {tokens[0]} -> {tokens[-1]}, GMACs an image {macs['dense'] / 1e9:.2f} -> {macs['reduced'] / 1e9:.2f}"
    )
    console.print(_checks(record["agreement"]))
    if "timing" not in record:
        console.print("[bold red]the results disagree: nothing was timed[/]")
        return
    console.print(_table(record))
    rounds = record["timing"]["dense"]["rounds"]
    statistic = "median" if record["device"].startswith("cuda") else "fastest"
    console.print(
        f"{statistic} of {rounds} interleaved rounds; RE = time of the oracle / time of the variant, "
        "sdpa: oracle without mask, self: with the attention call of the method"
    )


def _cpu(record: dict) -> str:
    cpu = record["machine"]["cpu"]
    return f"{cpu['name']} ({cpu['isa']}), {cpu['threads']} thread{'s' * (cpu['threads'] != 1)}"


def _checks(check: dict) -> str:
    parts = [
        f"checked: {check['steps']} steps against the reference, {check['wrong']} of {check['tokens']} tokens wrong, "
        f"{check['near_ties']} near-ties, error {check['step_error']:.1e}",
        *(f"cosine of logits with the {name} form {value:.6f}" for name, value in check["cosine_with"].items()),
    ]
    return "; ".join(parts)


def _table(record: dict):
    from rich.table import Table

    method, dense = record["method"], record["agreement"]["dense"]
    found = Table("variant", *(f"{title}" for title in ("images/s", "ms", "speed-up", "ideal", "RE sdpa", "RE self")))
    found.add_column("top-1 = dense")
    found.add_column("cosine")
    for column in found.columns[1:]:
        column.justify = "right"
    for column in found.columns:
        column.no_wrap = True
    for name, row in record["timing"].items():
        own = name == method
        ratio = lambda value: "" if value is None else f"{value:.3f}"  # noqa: E731
        found.add_row(
            label(name, method),
            f"{row['images_per_second']:.1f}",
            f"{1e3 * record['batch_size'] / row['images_per_second']:.2f}",
            f"{row['speedup']:.3f}",
            "" if name == "dense" else f"{record['ideal_speedup']:.3f}",
            ratio(row["re_sdpa"]),
            ratio(row["re_self"]),
            f"{dense['same_top1']}/{dense['images']}" if own else "",
            f"{dense['cosine']:.4f}" if own else "",
            style="bold" if own else None,
        )
    return found
