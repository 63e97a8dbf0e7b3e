"""The errors a user can meet. Each says what, where, and what to do, in one line."""


class InputError(Exception):
    """What was given cannot be used; the message is one line for the user, whatever names it quotes. Exit code 2."""

    def __init__(self, message: str) -> None:
        super().__init__(message.replace("\n", " "))


class GateError(Exception):
    """A result does not keep to a limit that was asked for; the message is one line. Exit code 3."""


class OutputError(InputError):
    """The result cannot be written (exists, no permission, no space). Exit code 2."""
