"""The progress of a training or an evaluation on a terminal."""

import sys

from ..training.watch import Watch


class Show(Watch):
    """A bar with the time that is left on stderr, where it is a terminal, and a line on stdout for each epoch.

    Args:
        speaks: False for every process but the first, which shows nothing.
    """

    def __init__(self, speaks: bool = True):
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        super().__init__()
        self._speaks = speaks
        console = Console(file=sys.stderr)
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        self._bar = Progress(*columns, console=console, transient=True, disable=not (speaks and console.is_terminal))
        self._task = self._bar.add_task("starting", total=None)
        self._what = ""

    def __enter__(self) -> "Show":
        self._bar.start()
        return self

    def __exit__(self, *_) -> None:
        self._bar.stop()

    def begin(self, what: str, total: int) -> None:
        self._what = what
        self._bar.reset(self._task, total=total, description=what)

    def advance(self, **figures: float) -> None:
        loss = f", loss {figures['loss']:.4g}" if "loss" in figures else ""
        self._bar.update(self._task, advance=1, description=self._what + loss if loss else None)

    def epoch(self, row: dict) -> None:
        if self._speaks:
            figures = (f"{name} {value:.4g}" for name, value in row.items() if name != "epoch")
            self._bar.console.file.flush()
            print(f"epoch {row['epoch'] + 1}: {', '.join(figures)}", flush=True)

    def skipped(self, why: str) -> None:
        print(f"tokred: {why}; skipped", file=sys.stderr, flush=True)
