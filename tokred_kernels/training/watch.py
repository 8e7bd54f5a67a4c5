"""What a training tells while it runs; the command line shows it, a test counts it."""

from .settings import BadInput


class Watch:
    """Says nothing; subclasses override what they show."""

    def __init__(self) -> None:
        self.named: set[str] = set()

    def begin(self, what: str, total: int) -> None:
        """So many steps of something follow."""

    def advance(self, **figures: float) -> None:
        """One of them is done; `loss` and `lr` of an update."""

    def epoch(self, row: dict) -> None:
        """An epoch is done and saved."""

    def skipped(self, why: str) -> None:
        """A file that is no image, once each."""

    def unreadable(self, found: list[str], strict: bool, rank: int) -> int:
        """How many files could not be read. Raises BadInput for the first if strict."""
        for why in found:
            if strict:
                raise BadInput(why, rank)
            if why not in self.named:
                self.named.add(why)
                self.skipped(why)
        return len(found)
