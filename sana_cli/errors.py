"""Errors that the user can fix: a one-line message, a hint, and a documented exit code."""

FAILURES = 3  # exit code of a batch that ended with failed jobs


class SanaError(Exception):
    """A failure with a one-line message and, where there is one, a hint of what to type next."""

    exit_code = 1

    def __init__(self, message: str, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class UsageError(SanaError):
    """An invalid call: a wrong option, value or input file."""

    exit_code = 2


class BrokenModel(SanaError):
    """Weights or configs that exist but cannot be used."""

    exit_code = 1


class NotEnoughMemory(SanaError):
    exit_code = 4


class MissingModel(SanaError):
    """Weights that are not on this machine."""

    exit_code = 5


class DiskFull(SanaError):
    exit_code = 6


class BadImage(SanaError):
    """The network produced NaN or a single flat colour."""

    exit_code = 7


class ServerGone(SanaError):
    """A server that cannot be asked any more, which is no fault of what it was to draw."""
