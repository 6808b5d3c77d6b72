"""Lines and progress bars on stderr; stdout carries results only."""

import sys
import threading
import time
import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import TYPE_CHECKING, Self

import typer
from rich.console import Console as RichConsole
from rich.live import Live
from rich.markup import escape
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.table import Table
from rich.text import Text
from rich.theme import Theme

from sana_cli.errors import SanaError

if TYPE_CHECKING:
    from sana_cli.pipeline.events import Event

STAGES = ("encode", "image", "denoise", "decode")  # that have a bar
NAME_COLUMNS = 12  # of facts, two of them blank
# Colours of the terminal's own palette, readable on light and on dark; the default colours of
# Rich's bars are for dark backgrounds.
THEME = Theme(
    {
        "bar.back": "bright_black",
        "bar.complete": "magenta",
        "bar.finished": "green",
        "progress.elapsed": "dim",
        "progress.remaining": "default",
        "progress.data.speed": "dim",
    }
)


class Console:
    """The reporter of the command line; `quiet` leaves only errors."""

    def __init__(
        self, quiet: bool = False, verbose: bool = False, color: bool = True, asks: bool = False
    ) -> None:
        """`asks` is whether a person at a terminal is asked before something large happens."""
        self.quiet, self.verbose = quiet, verbose
        self.asks = asks and not quiet and sys.stdin.isatty() and sys.stderr.isatty()
        self.rich = RichConsole(
            stderr=True, no_color=None if color else True, highlight=False, theme=THEME
        )

    @property
    def live(self) -> bool:
        """Whether bars can be redrawn: not quiet, and on a terminal with cursor control."""
        return not self.quiet and self.rich.is_terminal and not self.rich.is_dumb_terminal

    def info(self, text: str) -> None:
        if not self.quiet:
            # Wrapped between words on a terminal; never for programs, which read lines.
            broken = self.rich.is_terminal
            self.rich.print(f"[dim]{_safe(text)}[/dim]", soft_wrap=not broken)

    def detail(self, text: str) -> None:
        if self.verbose:
            self.info(text)

    def warn(self, text: str) -> None:
        if not self.quiet:
            self.rich.print(f"[yellow]warning:[/yellow] {_safe(text)}", soft_wrap=True)

    def confirm(self, question: str) -> bool:
        """Ask a yes-no question on a terminal; elsewhere the answer is yes."""
        if not self.asks:
            return True
        try:
            return typer.confirm(question, default=True, err=True)
        except typer.Abort:  # the input has ended
            return False

    def line(self, text: str) -> None:
        """Print a line even when quiet, as the context of an error."""
        self.rich.print(_safe(" ".join(text.split())), soft_wrap=True)

    def transfer(self) -> "Downloads":
        """Return a context manager that shows bars for a download."""
        return Downloads(self)

    def error(self, error: SanaError) -> None:
        one_line = " ".join(error.message.split())
        self.rich.print(f"[bold red]error:[/bold red] {_safe(one_line)}", soft_wrap=True)
        if error.hint:
            self.rich.print(f"[bold]hint:[/bold] {_safe(error.hint)}", soft_wrap=True)


class _LiveBars:
    """Bars shown on the terminal during a `with` block."""

    progress: Progress

    def __enter__(self) -> Self:
        self.progress.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.progress.__exit__(kind, value, trace)


class StageBars(_LiveBars):
    """One bar per stage, with the time left; one line per stage without a live terminal."""

    def __init__(self, console: Console, stages: tuple[str, ...]) -> None:
        self.console, self.live = console, console.live
        self.progress = Progress(
            TextColumn("{task.description:>8}"),
            BarColumn(bar_width=28),
            TextColumn("{task.completed:.0f}/{task.total:.0f}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(compact=True),
            console=console.rich,
            transient=True,
            redirect_stdout=False,  # results go to stdout itself, wherever that leads
            speed_estimate_period=3600,  # seconds; a step of a large image may take minutes
            disable=not self.live,
        )
        self.tasks = {
            stage: self.progress.add_task(stage, total=1, start=False, visible=False)
            for stage in stages
        }

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Hide the bars during a `with` block."""
        with pause_bars(self.progress):
            yield

    def result(self, line: str) -> None:
        """Write a line to stdout."""
        with self.paused():
            sys.stdout.write(f"{line}\n")
            sys.stdout.flush()

    def show(self, event: "Event") -> None:
        """Show the progress that an event reports, if its stage has a bar."""
        from sana_cli.pipeline import events

        if isinstance(event, events.Progress) and event.stage in self.tasks:
            self.update(event.stage, event.done, event.total)

    def update(self, stage: str, done: int, total: int) -> None:
        task = self.tasks[stage]
        self.progress.start_task(task)  # starts its clock, if it is not running
        self.progress.update(task, completed=done, total=total, visible=True)
        if done == total and not self.live:
            self.console.info(f"{stage}: {total} done")


class BatchBar(_LiveBars):
    """One bar for all images, with the current stage; lines without a live terminal."""

    LINE_EVERY = 10.0  # seconds between lines

    def __init__(self, console: Console) -> None:
        self.console = console
        self.progress = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=28),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(compact=True),
            TextColumn("{task.fields[stage]}", style="dim", markup=False),
            console=console.rich,
            transient=True,
            redirect_stdout=False,
            speed_estimate_period=3600,  # images may take minutes each
            disable=not console.live,
        )
        self.task = self.progress.add_task("images", total=0, stage="")
        self.done = self.total = 0
        self.began = self.last_output = time.monotonic()

    def expect(self, more: int) -> None:
        self.total += more
        self.progress.update(self.task, total=self.total)

    def stage(self, name: str, done: int = 0, total: int = 0) -> None:
        text = f"{name} {done}/{total}" if total > 1 else name
        self.progress.update(self.task, stage=text)

    def advance(self) -> None:
        """Count one more image as drawn or failed."""
        self.done += 1
        self.progress.update(self.task, completed=self.done)
        now = time.monotonic()
        if (
            not self.console.live
            and now - self.last_output > self.LINE_EVERY
            and self.done < self.total
        ):
            self.last_output = now
            left = (now - self.began) / self.done * (self.total - self.done)
            self.console.info(f"{self.done} of {self.total} images, {left:.0f} s left")

    def result(self, line: str) -> None:
        """Write a line to stdout."""
        with pause_bars(self.progress):
            sys.stdout.write(f"{line}\n")
            sys.stdout.flush()


@contextmanager
def pause_bars(progress: Progress) -> Iterator[None]:
    """Remove bars from the terminal during a block, and show them again below its output."""
    if progress.disable:
        yield
        return
    progress.stop()
    yield
    # The old display would begin by erasing as many lines as it drew, which are now output.
    progress.live = Live(
        console=progress.console,
        transient=True,
        redirect_stdout=False,  # results go to stdout itself, wherever that leads
        get_renderable=progress.get_renderable,
    )
    progress.start()


class Downloads(_LiveBars):
    """One bar per file and one for all, with speed and time left; lines without a terminal."""

    LINE_EVERY = 10.0  # seconds between lines
    DRAW_EVERY = 0.1  # and between updates of a bar

    def __init__(self, console: Console) -> None:
        self.console = console
        self.progress = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=20),
            DownloadColumn(),
            TransferSpeedColumn(),
            TimeRemainingColumn(compact=True),
            console=console.rich,
            transient=True,
            disable=not console.live,
        )
        self.tasks: dict[str, TaskID] = {}
        self.sizes: dict[str, int] = {}
        self.done: dict[str, int] = {}
        self.had = self.size = 0  # bytes of all files: before this run, and in all
        self.began = self.last_output = time.monotonic()
        self.drew = 0.0
        self.lock = threading.Lock()

    def begin(self, sizes: dict[str, int], done: dict[str, int]) -> None:
        self.sizes, self.done = sizes, dict(done)
        self.size, self.had = sum(sizes.values()), sum(done.values())
        self.all = self.progress.add_task(f"{len(sizes)} files", total=self.size)
        for file, size in sizes.items():
            # Bars for the small configs would fill the screen.
            if size > 10_000_000:
                name = file.split("/", 2)[-1]  # without the repository
                self.tasks[file] = self.progress.add_task(name, total=size, completed=done[file])

    def advance(self, file: str, done: int) -> None:
        with self.lock:
            self.done[file] = done
            now = time.monotonic()
            if done < self.sizes[file] and now - self.drew < self.DRAW_EVERY:
                return
            self.drew = now
            total = sum(self.done.values())
            self.progress.update(self.all, completed=total)
            if file in self.tasks:
                self.progress.update(self.tasks[file], completed=done)
            if not self.console.live and (
                total == self.size or now - self.last_output > self.LINE_EVERY
            ):
                self.last_output = now
                speed = (total - self.had) / max(now - self.began, 1e-3)
                left = (self.size - total) / speed if speed else 0
                self.console.info(
                    f"fetched {total / 1e6:.0f} of {self.size / 1e6:.0f} MB,"
                    f" {speed / 1e6:.1f} MB/s, {left:.0f} s left"
                )

    def note(self, text: str) -> None:
        self.console.warn(text)


def print_fact(
    console: RichConsole, name: str, value: str, style: str = "", one_line: bool = False
) -> None:
    """Print a name and its value in two columns. Long values wrap only on a terminal.

    `one_line` is for values to be copied: the terminal wraps them, and a copy is one line.
    """
    value = visible(value)
    if console.is_terminal and not one_line:
        grid = Table.grid()
        grid.add_column(width=NAME_COLUMNS, no_wrap=True, style="dim")
        grid.add_column(overflow="fold")
        grid.add_row(name, Text(value, style))
        console.print(grid)
        return
    indented = value if one_line else value.replace("\n", "\n" + " " * NAME_COLUMNS)
    text = Text.assemble((f"{name:<{NAME_COLUMNS}}", "dim"), (indented, style))
    console.print(text, soft_wrap=True)


def visible(text: str) -> str:
    """Escape untrusted text for a terminal: characters that would move, colour or reorder it.

    Line breaks, tabs and the joiners inside emoji stay.
    """
    kept, hidden = "\n\t\u200c\u200d", ("Cc", "Cf", "Cs", "Zl", "Zp")
    return "".join(
        c if c in kept or unicodedata.category(c) not in hidden else ascii(c)[1:-1] for c in text
    )


def _safe(text: str) -> str:
    """Escape text for Rich, and what of it a stranger's file may have brought for the terminal."""
    return escape(visible(text))


def write_stdout(data: bytes) -> None:
    sys.stdout.buffer.write(data)
    sys.stdout.buffer.flush()
