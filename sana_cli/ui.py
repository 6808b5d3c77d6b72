"""Lines and progress bars on stderr; stdout carries results only."""

import os
import sys
import threading
import time
import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Self

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

NAME_COLUMNS = 12  # of facts, two of them blank
# Colours of the terminal's own palette, which its owner can read on light and on dark; Rich's bars
# have fixed ones that are made for dark.
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

    def __init__(self, quiet: bool = False, verbose: bool = False, color: bool = True) -> None:
        self.quiet, self.verbose = quiet, verbose
        self.rich = RichConsole(
            stderr=True, no_color=None if color else True, highlight=False, theme=THEME
        )

    @property
    def live(self) -> bool:
        """Whether bars can move: a person is looking, at a terminal that can."""
        return not self.quiet and self.rich.is_terminal and not self.rich.is_dumb_terminal

    def info(self, text: str) -> None:
        if not self.quiet:
            # Broken between words for people; never for whoever reads lines.
            broken = self.rich.is_terminal
            self.rich.print(f"[dim]{escape(text)}[/dim]", soft_wrap=not broken)

    def detail(self, text: str) -> None:
        if self.verbose:
            self.info(text)

    def warn(self, text: str) -> None:
        if not self.quiet:
            self.rich.print(f"[yellow]warning:[/yellow] {escape(text)}", soft_wrap=True)

    def line(self, text: str) -> None:
        """Print a line even when quiet: what an error is about."""
        self.rich.print(escape(" ".join(text.split())), soft_wrap=True)

    def transfer(self) -> "Downloads":
        """Bars for a download, to be used as a context manager."""
        return Downloads(self)

    def error(self, error: SanaError) -> None:
        one_line = " ".join(error.message.split())
        self.rich.print(f"[bold red]error:[/bold red] {escape(one_line)}", soft_wrap=True)
        if error.hint:
            self.rich.print(f"[bold]hint:[/bold] {escape(error.hint)}", soft_wrap=True)


class _LiveBars:
    """Bars that are on the terminal during a `with` block."""

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
    """One bar a stage, with the time left; a line a stage where the terminal cannot draw."""

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
        """With the bars out of the way."""
        with pause_bars(self.progress):
            yield

    def result(self, line: str) -> None:
        """Write a line to stdout."""
        with self.paused():
            sys.stdout.write(f"{line}\n")
            sys.stdout.flush()

    def update(self, stage: str, done: int, total: int) -> None:
        task = self.tasks[stage]
        self.progress.start_task(task)  # its clock; nothing if it runs already
        self.progress.update(task, completed=done, total=total, visible=True)
        if done == total and not self.live:
            self.console.info(f"{stage}: {total} done")


class BatchBar(_LiveBars):
    """One bar for all images, with the current stage; lines where there is no terminal."""

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
        """One more is drawn, or has failed."""
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
    """Take bars off the terminal, and show them again below what was written meanwhile."""
    if progress.disable:
        yield
        return
    progress.stop()
    yield
    # The old one would begin by erasing as many lines as it had drawn: now those just written.
    progress.live = Live(
        console=progress.console,
        transient=True,
        redirect_stdout=False,  # results go to stdout itself, wherever that leads
        get_renderable=progress.get_renderable,
    )
    progress.start()


class Downloads(_LiveBars):
    """A bar a file and one for all, with speed and time left; lines where there is no terminal."""

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
            # The configs would be a screen full of bars that are full at once.
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
    """A name and its value in two columns. Long values wrap on a terminal, and there only.

    `one_line` is for what is copied from there: the terminal itself breaks it, and joins it again.
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
    """Text from a stranger, for a terminal: what would move, colour or reorder it is spelled out.

    Line breaks, tabs and the joiners inside emoji stay.
    """
    kept, hidden = "\n\t\u200c\u200d", ("Cc", "Cf", "Cs", "Zl", "Zp")
    return "".join(
        c if c in kept or unicodedata.category(c) not in hidden else ascii(c)[1:-1] for c in text
    )


def write_stdout(data: bytes) -> None:
    sys.stdout.buffer.write(data)
    sys.stdout.buffer.flush()


def close_stdout_quietly() -> None:
    """After the reader of a pipe has gone: nothing more can be said there, so nothing is."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
