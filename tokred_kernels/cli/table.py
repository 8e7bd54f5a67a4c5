"""What `tokred bench` shows: a progress bar on stderr while it works, a table on stdout when it is done."""

import contextlib
import itertools
import sys
from collections.abc import Iterator

from . import method_options

LABELS = {
    "dense": "dense",
    "oracle": "oracle",
    "oracle_self": "oracle, tokred",
    "plain_sdpa": "{method}, PyTorch + SDPA",
    "plain_explicit": "{method}, PyTorch",
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

    def advance(self, steps: int = 1) -> None:
        self._bar.advance(self._task, steps)


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
    for line in _heading(record):
        console.print(line)
    if "timing" not in record:
        console.print("[bold red]the results disagree: nothing was timed[/]")
        return
    console.print(_table(record))
    console.print(
        f"Medians over {record['timing']['dense']['rounds']} interleaved rounds, of ratios within a round. Oracle: the "
        "same model, its\ntokens sliced, reduction for free. RE: time of the oracle, without mask (sdpa) or with a key "
        "mask\n(self), over time of the variant. Top-1, cosine: against dense."
    )


def show_all(record: dict) -> None:
    """Prints the record of a run over all methods."""
    from rich.console import Console

    console = Console(highlight=False, soft_wrap=True)
    console.print(f"[bold]{record['model']}[/], every method, {record['weights']} weights")
    console.print(_setting(record))
    blocks = ", ".join(map(str, record["stages"]))
    console.print(f"stages: blocks {blocks}; dense: {record['macs']['dense'] / 1e9:.2f} GMACs an image")
    console.print(_table_of_all(record))
    console.print(
        "Medians over interleaved rounds. Left: patches after each stage, the mean over the images.\n"
        "Oracle: the same model, its tokens sliced. RE: its time over that of the method; cost: their difference."
    )
    if any(row.get("untrained") for row in record["rows"]):
        console.print("* has learned parts, random here: what it keeps is not what training would choose.")
    for method, why in {row["method"]: row["refused"] for row in record["rows"] if "refused" in row}.items():
        console.print(f"{method} was left out: {why}", markup=False)


def left(tokens: list[float]) -> list[float]:
    """What each reducing block leaves, of the tokens that enter the first block and leave each."""
    return [after for before, after in itertools.pairwise(tokens) if after != before]


def _heading(record: dict) -> Iterator[str]:
    check, tokens, macs = record["agreement"], record["tokens"], record["macs"]
    options = method_options.text(record["options"])
    yield f"[bold]{record['model']}[/], {record['method']} {options}, {record['weights']} weights"
    yield _setting(record)
    gmacs = f"{macs['dense'] / 1e9:.2f} -> {macs['reduced'] / 1e9:.2f}"
    yield f"tokens {tokens[0]:g} -> {tokens[-1]:g}, GMACs an image {gmacs}"
    yield (
        f"{check['steps']} reduction steps against the reference: {check['wrong']} of {check['tokens']} tokens wrong, "
        f"{check['near_ties']} near-ties, error {check['step_error']:.1e}"
    )
    if check["attention_error"]:
        yield f"attention: {check['attention_error']:.2f} of the error allowed, 2x torch's own and one rounding"
    yield "cosine of the logits: " + ", ".join(
        f"{value:.6f} with the {name} form" for name, value in check["cosine_with"].items()
    )


def _setting(record: dict) -> str:
    cpu, size = record["machine"]["cpu"], "x".join(map(str, record["image_size"]))
    where = f"{cpu['name']} ({cpu['isa']}), {cpu['threads']} thread{'s' * (cpu['threads'] != 1)}"
    if record["device"].startswith("cuda"):
        where = record["machine"]["gpus"][int(record["device"].removeprefix("cuda:"))]["name"]
    return f"{len(record['images'])} images of {size}, {record['batch_size']} a call, {record['dtype']}, on {where}"


def _table(record: dict):
    from rich.box import SIMPLE
    from rich.table import Table

    method, dense = record["method"], record["agreement"]["dense"]
    found = Table(box=SIMPLE, pad_edge=False, padding=(0, 1, 0, 0))
    found.add_column("variant", no_wrap=True)
    titles = ("images\n/s", "\nms", "speed\n-up", "MAC\nideal", "RE\nsdpa", "RE\nself", "same\ntop-1", "\ncosine")
    for title in titles:
        found.add_column(title, justify="right", no_wrap=True)
    for name, row in record["timing"].items():
        own = name == method
        found.add_row(
            label(name, method),
            f"{row['images_per_second']:.4g}",
            f"{1e3 * record['batch_size'] / row['images_per_second']:.4g}",
            f"{row['speedup']:.2f}",
            "" if name == "dense" else f"{record['ideal_speedup']:.2f}",
            *("" if row[key] is None else f"{row[key]:.3f}" for key in ("re_sdpa", "re_self")),
            f"{dense['same_top1']}/{dense['images']}" if own else "",
            f"{dense['cosine']:.4f}" if own else "",
            style="bold" if own else None,
        )
    return found


def _table_of_all(record: dict):
    from rich.box import SIMPLE
    from rich.table import Table

    found = Table(box=SIMPLE, pad_edge=False, padding=(0, 1, 0, 0))
    found.add_column("method", no_wrap=True)
    for title in ("\nkeep", "\nleft", "\nGMACs", "images\n/s", "speed\n-up", "MAC\nideal", "RE\nsdpa", "cost\nms"):
        found.add_column(title, justify="right", no_wrap=True)
    for before, row in itertools.pairwise([None, *(row for row in record["rows"] if "refused" not in row)]):
        if before is not None and before["keep_rate"] != row["keep_rate"]:
            found.add_section()
        cells = ["[bold red]wrong[/]"]
        if "speedup" in row:
            cells = [f"{row['images_per_second']:.4g}", f"{row['speedup']:.2f}", f"{row['ideal_speedup']:.2f}"]
            cells += [f"{row['re_sdpa']:.3f}", f"{1e3 * row['reduction_seconds']:.3g}"]
        patches = (f"{tokens - record['prefix']:.4g}" for tokens in left(row["tokens"]))
        name = row["method"] + " *" * row["untrained"]
        found.add_row(name, f"{row['keep_rate']:g}", " ".join(patches), f"{row['macs'] / 1e9:.2f}", *cells)
    return found
