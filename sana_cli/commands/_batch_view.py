"""What `sana batch` shows of its events: text and bars for a terminal, JSON Lines for a program."""

import sys
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sana_cli.errors import SanaError
from sana_cli.units import counted

if TYPE_CHECKING:
    from sana_cli.batch.engine import Saved
    from sana_cli.batch.events import EventWriter
    from sana_cli.batch.run import Batch, BatchEvent, Planned, Summary
    from sana_cli.ui import BatchBar, Console


def show_events(
    events: "Iterable[BatchEvent]",
    batch: "Batch",
    check: bool,
    sheet: Path | None,
    json_output: bool,
    console: "Console",
    stack: ExitStack,
) -> int:
    """Show the events of a batch, as text and bars or as JSON Lines; return the exit code."""
    from sana_cli.batch.events import EventWriter
    from sana_cli.ui import BatchBar

    bar = stack.enter_context(BatchBar(console))
    writer = stack.enter_context(EventWriter()) if json_output else None
    view = BatchView(batch, check, sheet, console, bar, writer)
    for event in events:
        view.show(event)
    return view.exit_code


class BatchView:
    """The output of a batch, for a terminal or a program."""

    def __init__(
        self,
        batch: "Batch",
        check: bool,
        sheet: Path | None,
        console: "Console",
        bar: "BatchBar",
        writer: "EventWriter | None",
    ) -> None:
        self.batch, self.check, self.sheet, self.console = batch, check, sheet, console
        self.bar, self.writer = bar, writer
        self.exit_code = 0
        self.told: set[str] = set()

    def show(self, event: "BatchEvent") -> None:
        from sana_cli.batch.engine import Saved
        from sana_cli.batch.run import JobError, Planned, RowError, Summary, Waiting
        from sana_cli.pipeline.events import Notice, Progress

        match event:
            case Planned():
                self._planned(event)
            case Saved():
                self._saved(event)
            case JobError(job, error):
                self.bar.advance()
                self._error(error, id=job.id, row=job.row)
            case RowError(row, column, error, fate):
                if fate == "listed":
                    self.console.line(error.message + (f"; {error.hint}" if error.hint else ""))
                self._error(error, shown=fate == "skipped", row=row, column=column)
            case Progress(stage, done, total):
                self._stage(stage, done, total)
            case Waiting():
                self._stage("wait")  # for more rows
            case Notice(text, warning):
                if not warning:
                    self.console.detail(text)
                elif text not in self.told:
                    self.told.add(text)
                    self.console.warn(text)
            case Summary():
                self.exit_code = event.exit_code
                if self.sheet is not None:
                    self._write_sheet(self.sheet)
                self._summary(event)

    def _planned(self, plan: "Planned") -> None:
        batch, jobs = self.batch, counted(len(plan.jobs), "job")
        if self.check and not self.writer:
            sys.stdout.write(f"{jobs}, {plan.todo} to draw into {batch.folder}\n")
        if not self.check:
            self.bar.expect(plan.todo)
            self.console.info(
                f"{jobs}, {plan.todo} to draw into {batch.folder}, on {batch.place}"
                + (f"; {plan.done} are there" if plan.done else "")
                + (f"; {plan.failed} failed before" if plan.failed else "")
                + (f"; shard {batch.shard}" if batch.shard else "")
            )
        if plan.expected is not None:
            self.console.info(str(plan.expected))
        if self.writer:
            self.writer.emit(
                "plan",
                jobs=len(plan.jobs),
                done=plan.done,
                failed=plan.failed,
                todo=plan.todo,
                folder=str(batch.folder),
                shard=str(batch.shard) if batch.shard else None,
                device=batch.place,
                expected_time=plan.expected and plan.expected.as_dict(),
                models=list(dict.fromkeys(job.recipe.model for job in plan.jobs)),
            )

    def _saved(self, saved: "Saved") -> None:
        self.bar.advance()
        if not self.writer:
            self.bar.result(str(saved.path))
            return
        job, recipe = saved.job, saved.job.recipe
        facts = {name: saved.line[name] for name in ("sha256", "bytes", "seconds", "peak_bytes")}
        self.writer.emit(
            "image",
            id=job.id,
            row=job.row,
            path=str(saved.path),
            seed=recipe.seed,
            width=recipe.width,
            height=recipe.height,
            model=recipe.model,
            **facts,
            recipe=recipe.as_dict(),
        )

    def _error(self, error: SanaError, shown: bool = True, **facts: Any) -> None:
        if shown:
            self.console.error(error)
        if self.writer:
            known = {"id": None, "row": None, "column": None} | facts
            known |= {"message": error.message, "hint": error.hint, "exit_code": error.exit_code}
            self.writer.emit("error", **known)

    def _stage(self, name: str, done: int = 0, total: int = 0) -> None:
        self.bar.stage(name, done, total)
        if self.writer:
            self.writer.stage(name, done, total)

    def _write_sheet(self, sheet: Path) -> None:
        """Write the sheet of all images of the folder. An error is the command's if all else went
        well."""
        from sana_cli.sheet import write_sheet

        images = [Path(image) for image in self.batch.images()]
        try:
            written = write_sheet(sheet, images, self.batch.options.force, self.console)
        except SanaError as error:
            self._error(error)
            self.exit_code = self.exit_code or error.exit_code
            return
        self.console.info(f"{counted(len(images), 'image')} on {written}")
        if self.writer:
            self.writer.emit("sheet", path=str(written), images=len(images))

    def _summary(self, summary: "Summary") -> None:
        self.console.info(
            f"{summary.drawn} drawn"
            + (f", {summary.done} were there" if summary.done else "")
            + (f", {summary.failed} failed" if summary.failed else "")
            + (f", {summary.left} left" if summary.left else "")
            + f", in {summary.seconds:.1f} s"
        )
        if summary.failed_before:
            self.console.info(f"{summary.failed_before} failed in an earlier run: --retry-failed")
        if self.writer:
            self.writer.emit(
                "summary",
                drawn=summary.drawn,
                done=summary.done,
                failed=summary.failed,
                left=summary.left,
                seconds=round(summary.seconds, 3),
                exit_code=self.exit_code,
            )
