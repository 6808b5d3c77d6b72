"""What can go wrong in a way the user can mend: one line, a hint, and a documented exit code."""

FAILURES = 3  # exit code of a batch that is through, but not with every job


class SanaError(Exception):
    """A failure with a message in one line and, where there is one, what to type next."""

    exit_code = 1

    def __init__(self, message: str, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class UsageError(SanaError):
    """Something is wrong with the call itself."""

    exit_code = 2


class BrokenModel(SanaError):
    """Weights or configs that are there but cannot be used."""

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
