"""What the user can put right, as one line of text."""


class UserError(Exception):
    """Bad input or a missing piece: `main` prints it on one line and exits with status 2."""

    def __init__(self, message: object):
        super().__init__(" ".join(str(message).split()))
