"""The Reporter protocol for everything below the command line, and its implementation for programs.

Nothing below `commands/` prints. A library call reports through `LogReporter`; the command line
through `ui.Console`.
"""

import sys
import warnings
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Protocol

PACKAGE = str(Path(__file__).parent)


class TransferReporter(Protocol):
    """Progress of a download, called from several threads. Sizes are in bytes."""

    def begin(self, sizes: dict[str, int], done: dict[str, int]) -> None:
        """Start: the size of each file, by OWNER/REPO/FILE, and how much of it is here already."""

    def advance(self, file: str, done: int) -> None:
        """Report that the first `done` bytes of a file are here."""

    def note(self, text: str) -> None:
        """Report a retry or another event worth a line."""


class Reporter(Protocol):
    """A receiver for the choices, details, warnings and downloads of a call, and its questions."""

    def info(self, text: str) -> None: ...
    def detail(self, text: str) -> None: ...
    def warn(self, text: str) -> None: ...
    def confirm(self, question: str) -> bool: ...
    def transfer(self) -> AbstractContextManager[TransferReporter]: ...


class LogReporter:
    """Report to programs: by Python warnings, and by the logger "sana_cli" for the rest."""

    def __init__(self) -> None:
        import logging

        self.logger = logging.getLogger("sana_cli")

    def info(self, text: str) -> None:
        self.logger.info(text)

    def detail(self, text: str) -> None:
        self.logger.debug(text)

    def warn(self, text: str) -> None:
        level, frame = 2, sys._getframe(1)
        while frame.f_back and frame.f_code.co_filename.startswith(PACKAGE):
            level, frame = level + 1, frame.f_back
        warnings.warn(text, stacklevel=level)  # attributed to the line that called the package

    def confirm(self, question: str) -> bool:
        return True  # a program has asked for it already

    def transfer(self) -> AbstractContextManager[TransferReporter]:
        return nullcontext(self)

    def begin(self, sizes: dict[str, int], done: dict[str, int]) -> None:
        self.logger.info("fetching %d files, %d bytes", len(sizes), sum(sizes.values()))

    def advance(self, file: str, done: int) -> None:
        self.logger.debug("%s: %d bytes", file, done)

    def note(self, text: str) -> None:
        self.warn(text)
