"""Ctrl-C and termination: exit at once before any work begins, by an exception while drawing, and
in a batch after the current image.
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
    """Exit without unwinding: an exception while a library is imported can abort the process."""
    with _handler_installed(_exit_now):
        yield


@contextmanager
def exit_by_exception() -> Iterator[None]:
    """Exit by raising SystemExit, so that partial files are removed.

    Only the command does so: the handlers of a program that uses the package stay in place.
    """
    ours = getattr(signal.getsignal(signal.SIGINT), "__module__", None) == __name__
    with _handler_installed(_unwind) if ours else nullcontext():
        yield


class StopRequest:
    """A request to stop: true after the first signal, whose exit code is `code`."""

    code: int | None = None

    def __bool__(self) -> bool:
        return self.code is not None


@contextmanager
def exit_on_second_signal() -> Iterator[StopRequest]:
    """Record the first signal in a StopRequest for the loop to check; exit at the second."""
    stop_request = StopRequest()

    def note(number: int, frame: FrameType | None) -> None:
        if stop_request:
            _unwind(number, frame)
        stop_request.code = CODES[signal.Signals(number)]

    with _handler_installed(note):
        yield stop_request


@contextmanager
def stop_on_signal(stop: Callable[[], None]) -> Iterator[StopRequest]:
    """Call `stop` at the first signal, for a server; exit at once at the second.

    Termination is how a server ends, so the exit code is 0; that of Ctrl-C is 130.
    """
    stop_request = StopRequest()

    def note(number: int, frame: FrameType | None) -> None:
        if stop_request:
            _exit_now(number, frame)
        stop_request.code = 0 if number == signal.SIGTERM else CODES[signal.Signals(number)]
        stop()

    with _handler_installed(note):
        yield stop_request


@contextmanager
def held_back() -> Iterator[None]:
    """Hold back Ctrl-C and termination, and in processes that start meanwhile for good.

    Windows cannot.
    """
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, CODES)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def _handler_installed(handler) -> Iterator[None]:  # type: ignore[no-untyped-def]
    if (
        threading.current_thread() is not threading.main_thread()
    ):  # only the main thread may set handlers
        yield
        return
    before = {number: signal.signal(number, handler) for number in CODES}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)


def _exit_now(number: int, frame: FrameType | None) -> None:
    os._exit(CODES[signal.Signals(number)])


def _unwind(number: int, frame: FrameType | None) -> None:
    raise SystemExit(CODES[signal.Signals(number)])
