"""Ctrl-C and termination: leave at once while nothing is at stake, in order once drawing begins,
and in a batch after the picture that is being drawn.
"""

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from types import FrameType

CODES = {signal.SIGINT: 130, signal.SIGTERM: 143}


@contextmanager
def exit_at_once() -> Iterator[None]:
    """Exit without unwinding: an exception inside a library's start-up can abort the process."""
    with _handling(_leave):
        yield


@contextmanager
def exit_by_exception() -> Iterator[None]:
    """Exit through exceptions, so that half-written files are removed on the way.

    Only in the command: a program that uses the package has its own ways, which stay.
    """
    ours = getattr(signal.getsignal(signal.SIGINT), "__module__", None) == __name__
    with _handling(_unwind) if ours else nullcontext():
        yield


class StopRequest:
    """The exit code of the first signal, once it has come."""

    code: int | None = None

    def __bool__(self) -> bool:
        return self.code is not None


@contextmanager
def exit_on_second_signal() -> Iterator[StopRequest]:
    """Note the first signal, for a loop that looks at it; leave in order at the second."""
    asked = StopRequest()

    def note(number: int, frame: FrameType | None) -> None:
        if asked:
            _unwind(number, frame)
        asked.code = CODES[signal.Signals(number)]

    with _handling(note):
        yield asked


@contextmanager
def stopping_in_order(stop: Callable[[], None]) -> Iterator[Asked]:
    """Call `stop` at the first signal, for a server; leave at once at the second.

    Termination is how a server ends, so the exit code is 0; that of Ctrl-C is 130.
    """
    asked = Asked()

    def note(number: int, frame: FrameType | None) -> None:
        if asked:
            _leave(number, frame)
        asked.code = 0 if number == signal.SIGTERM else CODES[signal.Signals(number)]
        stop()

    with _handling(note):
        yield asked


@contextmanager
def _handling(handler) -> Iterator[None]:  # type: ignore[no-untyped-def]
    if threading.current_thread() is not threading.main_thread():  # signals go to the main one
        yield
        return
    before = {number: signal.signal(number, handler) for number in CODES}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)


def _leave(number: int, frame: FrameType | None) -> None:
    os._exit(CODES[signal.Signals(number)])


def _unwind(number: int, frame: FrameType | None) -> None:
    raise SystemExit(CODES[signal.Signals(number)])
