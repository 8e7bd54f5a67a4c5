"""What the user can put right, as one line of text."""

from pathlib import Path


class UserError(Exception):
    """Bad input or a missing piece: `main` prints it on one line and exits with status 2."""

    def __init__(self, message: object):
        super().__init__(" ".join(str(message).split()))


def check_writable(path: Path, suffix: str | None = None) -> None:
    """Before any work: raises UserError if no file can be written to `path`, or its name does not end in `suffix`."""
    if path.is_dir() or not path.parent.is_dir():
        raise UserError(f"cannot write {path}: " + ("it is a folder" if path.is_dir() else "no such folder"))
    if suffix and path.suffix.lower() != suffix:
        raise UserError(f"cannot write {path}: give a name that ends in {suffix}")
