"""What a person sees: lines and bars on stderr. stdout carries results only."""

import os
import sys
from types import TracebackType

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from sana_cli.errors import SanaError


class Talk:
    """The voice of one run; `quiet` leaves only errors."""

    def __init__(self, quiet: bool = False, verbose: bool = False, color: bool = True) -> None:
        self.quiet, self.verbose = quiet, verbose
        self.console = Console(stderr=True, no_color=None if color else True, highlight=False)

    def say(self, text: str) -> None:
        if not self.quiet:
            self.console.print(f"[dim]{escape(text)}[/dim]", soft_wrap=True)

    def detail(self, text: str) -> None:
        if self.verbose:
            self.say(text)

    def warn(self, text: str) -> None:
        if not self.quiet:
            self.console.print(f"[yellow]warning:[/yellow] {escape(text)}", soft_wrap=True)

    def error(self, error: SanaError) -> None:
        one_line = " ".join(error.message.split())
        self.console.print(f"[bold red]error:[/bold red] {escape(one_line)}", soft_wrap=True)
        if error.hint:
            self.console.print(f"[bold]hint:[/bold] {escape(error.hint)}", soft_wrap=True)


class Bars:
    """One bar a stage, with the time left; a line a stage where the terminal cannot draw."""

    def __init__(self, talk: Talk, stages: tuple[str, ...]) -> None:
        self.talk = talk
        self.live = (
            not talk.quiet and talk.console.is_terminal and not talk.console.is_dumb_terminal
        )
        self.progress = Progress(
            TextColumn("{task.description:>8}"),
            BarColumn(bar_width=28),
            TextColumn("{task.completed:.0f}/{task.total:.0f}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(compact=True),
            console=talk.console,
            transient=True,
            redirect_stdout=False,  # results go to stdout itself, wherever that leads
            disable=not self.live,
        )
        self.tasks = {
            stage: self.progress.add_task(stage, total=1, start=False, visible=False)
            for stage in stages
        }

    def __enter__(self) -> "Bars":
        self.progress.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.progress.__exit__(kind, value, trace)

    def result(self, line: str) -> None:
        """Write a line to stdout, with the bars out of its way."""
        if self.live:
            self.progress.stop()
        sys.stdout.write(f"{line}\n")
        sys.stdout.flush()
        if self.live:
            self.progress.start()

    def update(self, stage: str, done: int, total: int) -> None:
        task = self.tasks[stage]
        self.progress.start_task(task)  # its clock; nothing if it runs already
        self.progress.update(task, completed=done, total=total, visible=True)
        if done == total and not self.live:
            self.talk.say(f"{stage}: {total} done")


def write_stdout(data: bytes) -> None:
    sys.stdout.buffer.write(data)
    sys.stdout.buffer.flush()


def close_stdout_quietly() -> None:
    """After the reader of a pipe has gone: nothing more can be said there, so nothing is."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
