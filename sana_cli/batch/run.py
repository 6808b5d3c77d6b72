"""One run of a batch: rows to jobs to images, round by round, as a stream of events.

Nothing is printed here: `commands/batch.py` shows the events, or writes them as JSON Lines.
"""

import operator
import time
from collections.abc import Generator, Iterable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from sana_cli.batch.jobs import Job, JobBuilder, JobSpec, RowReader
from sana_cli.batch.manifest import Ledger, Manifest
from sana_cli.batch.rows import Fault, RowOrFault
from sana_cli.batch.shards import Shard
from sana_cli.errors import FAILURES, MissingModel, SanaError, UsageError
from sana_cli.images.names import check_quality
from sana_cli.resolve import Resolution
from sana_cli.session import Session
from sana_cli.settings import FileOptions
from sana_cli.system.signals import StopRequest
from sana_cli.units import counted
from sana_cli.weights.catalogue import Component, Model
from sana_cli.weights.vocabulary import unknown_words, unknown_words_warning

if TYPE_CHECKING:
    from sana_cli.batch.engine import Engine, OpenEngine, RunEvent, Work
    from sana_cli.bench.forecast import Expected
    from sana_cli.recipe import Recipe
    from sana_cli.weights.model_files import ModelFiles

    BatchEvent: TypeAlias = "Planned | RowError | JobError | Waiting | Summary | RunEvent"
    Jobs: TypeAlias = Generator[BatchEvent, None, list[Job]]

MAX_SHOWN = 10  # faults


@dataclass(frozen=True)
class RunPolicy:
    """Which jobs are drawn again, and after how many failures a run stops."""

    retry_failed: bool = False
    restart: bool = False
    max_failures: int | None = None

    def is_todo(self, state: str) -> bool:
        """Whether a job in that state ("done", "failed" or "open") is drawn."""
        return self.restart or state == "open" or (state == "failed" and self.retry_failed)


@dataclass(frozen=True)
class Planned:
    """The jobs of this shard in a round of rows, and their states before the run."""

    jobs: list[Job]
    todo: int
    done: int
    failed: int
    expected: "Expected | None" = None  # time of the jobs to draw, where it can be told


@dataclass(frozen=True)
class RowError:
    """A row that is at fault.

    `fate` is "skipped" if the run continues without it, "raised" if its error ends the run, and
    "listed" if it is one of several that together end it.
    """

    row: int
    column: str | None
    error: UsageError
    fate: Literal["skipped", "listed", "raised"]


@dataclass(frozen=True)
class JobError:
    """A job that failed; the message names its row."""

    job: Job
    error: SanaError


@dataclass(frozen=True)
class Waiting:
    """The rows so far are done; more may come through the pipe."""


@dataclass(frozen=True)
class Summary:
    """The counts of a run, and its exit code."""

    drawn: int
    done: int  # in an earlier run
    failed: int
    failed_before: int  # of those, in an earlier run
    left: int
    seconds: float
    exit_code: int


class Batch:
    def __init__(
        self,
        session: Session,
        reader: RowReader,
        folder: Path | str,
        shard: Shard | None,
        source: str,
        options: FileOptions,
        policy: RunPolicy,
        open_engine: "OpenEngine",
        place: str,
    ) -> None:
        """`folder` is a path or a URL; `source` names the file of jobs in messages; `open_engine`
        is called before the first image is drawn, and `place` tells where that engine draws."""
        self.session, self.reader, self.folder, self.shard = session, reader, folder, shard
        self.source, self.options, self.policy = source, options, policy
        self.open_engine, self.place = open_engine, place
        self.engine: Engine | None = None  # opened for the first job that is to be drawn
        self.builder = JobBuilder(self.session.memory)
        self.files: dict[tuple[Model, Component | None, Component | None], ModelFiles] = {}
        self.manifest: Manifest | None = None  # set at the first round without a fault
        self.warned: set[str] = set()
        self.unknown: set[str] = set()  # words that the user was warned of
        self.todo = self.drawn = self.there = self.failed_before = self.failed = 0
        self.bad_rows = 0
        self.started = time.perf_counter()

    def check(self, rounds: Iterable[list[RowOrFault]]) -> "Generator[BatchEvent, None, None]":
        """Count the jobs and those that a run would draw; nothing is fetched or drawn."""
        jobs: list[Job] = []
        for rows in rounds:
            jobs += yield from self._jobs(rows, fetch=False)
        self._refuse_empty()
        ledger = Ledger(self.folder)
        states = [ledger.status(job.id) for job in jobs]
        pairs = zip(jobs, states, strict=True)
        todo = [job for job, state in pairs if self.policy.is_todo(state)]
        counts = len(todo), states.count("done"), states.count("failed")
        yield Planned(jobs, *counts, self._expected_time(todo))

    def run(
        self, rounds: Iterable[list[RowOrFault]], stop: StopRequest
    ) -> "Generator[BatchEvent, None, None]":
        """Draw all open jobs; the last event is the summary.

        Once `stop` is true, the run ends after the current image.
        """
        with ExitStack() as stack:
            try:
                for rows in rounds:
                    jobs = yield from self._jobs(rows, fetch=True)
                    if not stop:
                        todo = yield from self._take(jobs, stack)
                        yield from self._draw(todo, stop, stack)
                    if stop or self._failed_enough():
                        break
                    yield Waiting()
                if not stop:
                    self._refuse_empty()
            except SanaError as error:
                if self.manifest is not None:
                    yield self._summary(error.exit_code)
                raise
            failed = self.failed + self.failed_before + self.bad_rows
            yield self._summary(stop.code or (FAILURES if failed else 0))

    def images(self) -> list[Path | str]:
        """The files of all jobs of the folder that are done, in the order of their rows."""
        return self.manifest.images() if self.manifest is not None else []

    # --- from rows to jobs ---------------------------------------------------------------------

    def _jobs(self, rows: list[RowOrFault], fetch: bool) -> "Jobs":
        """Return the jobs of some rows that are in this shard, with their models on this machine.

        A fault in the first round ends the run before it begins; later ones are failures.
        """
        specs, faults = self.reader.read(rows)
        yield from self._report_faults(faults, len(rows))
        device = self.session.device
        if self.manifest is None and fetch:
            yield from self._rehearse(specs, len(rows))

        def prepare(resolution: Resolution) -> "tuple[Resolution, ModelFiles]":
            model = resolution.model
            key = model, resolution.vae, resolution.controlnet
            if key not in self.files:
                text = f"model {model.name} ({model.source}), licence {model.licence}"
                self.session.reporter.info(text)
                files = self.session.open(model, dry_run=not fetch)
                self.files[key] = self.session.with_components(resolution, files, dry_run=not fetch)
            files, inputs = self.files[key], self.reader.inputs
            resolution = self.session.with_loras(resolution, inputs, files, dry_run=not fetch)
            return resolution, files

        survived = UsageError if self.manifest is None else SanaError
        jobs, faults = self.builder.build(specs, prepare, device, survived)
        faults += self._too_long_for_jpeg(jobs)
        yield from self._report_faults(faults, len(rows))
        if self.manifest is None and jobs:
            check_quality(self.options.quality, {job.format for job in jobs})
        texts: dict[Model, list[str]] = {}
        for spec in specs:
            resolution = spec.resolution
            key = resolution.model, resolution.vae, resolution.controlnet
            if key in self.files:
                chosen = self.files[key], device, self.session.memory
                for text in resolution.all_warnings(*chosen):
                    self._warn_once(text)
                settings = resolution.settings
                texts.setdefault(resolution.model, []).extend((settings.prompt, settings.negative))
        for (model, *_), files in self.files.items():
            self._warn_of_unknown_words(model, texts.pop(model, []), files)
        wrong = {fault.row for fault in faults}
        good = [job for job in jobs if job.row not in wrong]
        return [job for job in good if self.shard is None or self.shard.holds(job.id)]

    def _rehearse(self, specs: list[JobSpec], rows: int) -> "Iterator[BatchEvent]":
        """Find faults of rows before a download, where the model's configs are known."""
        models = dict.fromkeys(spec.resolution.model for spec in specs)
        if not all(map(self.session.is_here, models)):
            known = {}
            with suppress(MissingModel):  # a model whose configs are only known after its download
                for model in models:
                    known[model] = self.session.open(model, dry_run=True)
                device = self.session.device
                _, faults = self.builder.draft().build(
                    specs, lambda resolution: (resolution, known[resolution.model]), device
                )
                yield from self._report_faults(faults, rows)

    def _too_long_for_jpeg(self, jobs: list[Job]) -> list[Fault]:
        """Return faults of recipes too long for a JPEG's metadata, before anything is drawn."""
        faults = []
        for job in jobs:
            if job.format == "jpeg" and self.options.metadata == "full":
                try:
                    self.session.metadata(job.recipe).as_exif("jpeg")
                except UsageError as error:
                    faults.append(Fault(job.row, None, error.message, error.hint))
        return faults

    def _report_faults(self, faults: list[Fault], rows: int) -> "Iterator[BatchEvent]":
        """Report faults of rows; UsageError if nothing has been drawn yet."""
        if not faults:
            return
        places = {fault.row for fault in faults}
        if self.manifest is not None:
            self.bad_rows += len(places)
            for fault in faults:
                yield self._row_error(fault, "skipped")
            return
        first = faults[0]
        alike = {(fault.column, fault.message) for fault in faults} == {(None, first.message)}
        if len(faults) == rows > 1 and alike:  # the fault is in an option, not in every row
            raise UsageError(first.message, first.hint)
        if len(faults) == 1:
            yield (found := self._row_error(first, "raised"))
            raise found.error
        for fault in sorted(faults, key=lambda fault: fault.row)[:MAX_SHOWN]:
            yield self._row_error(fault, "listed")
        more = f", the first {MAX_SHOWN} of them above" if len(faults) > MAX_SHOWN else ""
        spread = f" in {len(faults)} places" if len(faults) > len(places) else ""
        raise UsageError(f"{self.source} has {counted(len(places), 'row')} at fault{spread}{more}")

    def _row_error(self, fault: Fault, fate: Literal["skipped", "listed", "raised"]) -> RowError:
        column = f", column {fault.column}" if fault.column else ""
        message = f"{self.source}, row {fault.row}{column}: {fault.message}"
        return RowError(fault.row, fault.column, UsageError(message, fault.hint), fate)

    def _refuse_empty(self) -> None:
        if not self.builder.count and not self.bad_rows:
            raise UsageError(f"{self.source} holds no job", "write at least one prompt, one a line")

    # --- from jobs to images -------------------------------------------------------------------

    def _take(self, jobs: list[Job], stack: ExitStack) -> "Jobs":
        """Lock the folder, read its earlier runs, and return the jobs to draw."""
        if self.manifest is None:
            self.manifest = stack.enter_context(Manifest(self.folder, self.shard))
            if self.manifest.damaged:
                text = f"{self.manifest.damaged} lines of the manifest are damaged"
                self.session.reporter.warn(text)
            if self.manifest.log.unlocked:
                self.session.reporter.warn(
                    f"{self.folder} cannot be locked ({self.manifest.log.unlocked}), so do not"
                    " start a second batch in it"
                )
        manifest = self.manifest
        places = {Path(line["path"]).parent for line in manifest.last.values() if "path" in line}
        manifest.sweep(places | {job.name.parent for job in jobs} | {Path()})
        states = [manifest.status(job.id) for job in jobs]
        todo = [job for job, state in zip(jobs, states, strict=True) if self.policy.is_todo(state)]
        there, failed = states.count("done"), states.count("failed")
        if not self.policy.restart:
            # Before the run begins: each line of it is about one of the jobs that it has to draw.
            for job, state in zip(jobs, states, strict=True):
                if state == "done":
                    manifest.adopt(job.id)
            self.there += there
        shard = str(self.shard) if self.shard else None
        manifest.begin(jobs=len(jobs), todo=len(todo), file=self.source, shard=shard)
        if self.policy.restart:
            manifest.append_all(
                {"status": "again", "id": job.id}
                for job, state in zip(jobs, states, strict=True)
                if state != "open"
            )
        if not self.policy.restart and not self.policy.retry_failed:
            self.failed_before += failed
        self.todo += len(todo)
        yield Planned(jobs, len(todo), there, failed, self._expected_time(todo))
        return todo

    def _expected_time(self, jobs: list[Job]) -> "Expected | None":
        """Return about how long jobs take in this process; elsewhere nothing is known of it."""
        from sana_cli.batch.this_process import ThisProcess
        from sana_cli.bench.forecast import Forecaster

        alike: dict[Any, list[Recipe]] = {}
        for job in jobs:
            alike.setdefault(job.components, []).append(job.recipe)
        if self.open_engine is not ThisProcess or None in map(self.files.get, alike):
            return None  # a server has its own files
        forecaster = Forecaster.of(self.session)
        found = [forecaster.expected(recipes, self.files[key]) for key, recipes in alike.items()]
        known = [expected for expected in found if expected is not None]
        return reduce(operator.add, known) if known and len(known) == len(found) else None

    def _draw(self, jobs: list[Job], stop: StopRequest, stack: ExitStack) -> "Iterator[BatchEvent]":
        if not jobs:
            return
        from sana_cli.batch.engine import Failed, Saved

        announced = False
        if self.engine is None:
            self.engine = self.open_engine(self._work(stop))
            stack.callback(self.engine.close)
        for event in self.engine.run(jobs):
            if isinstance(event, Failed):
                self.failed += 1
                message = f"{self.source}, row {event.job.row}: {event.error.message}"
                error = SanaError(message, event.error.hint)
                error.exit_code = event.error.exit_code
                yield JobError(event.job, error)
                if self._failed_enough():
                    self.session.reporter.warn(f"stopped after {self.failed} failures")
                    break
            else:
                self.drawn += isinstance(event, Saved)
                yield event
            if stop and not announced:
                announced = True
                text = "stopping after the image under way; press Ctrl-C again to stop at once"
                self.session.reporter.info(text)

    def _work(self, stop: StopRequest) -> "Work":
        from sana_cli.batch.engine import Work

        assert self.manifest is not None
        return Work(
            self.session,
            self.manifest,
            lambda job: self.files[job.components],
            self.reader.inputs,
            self.options,
            lambda: bool(stop),
        )

    def _failed_enough(self) -> bool:
        failed, most = self.failed + self.bad_rows, self.policy.max_failures
        return most is not None and failed >= most

    def _warn_of_unknown_words(self, model: Model, texts: list[str], files: "ModelFiles") -> None:
        """Warn of the words of some texts that a model was not trained on, of each once."""
        known = self.session.vocabulary(model, files)
        fresh = [word for word in unknown_words(texts, known) if word not in self.unknown]
        if fresh:
            self.unknown.update(fresh)
            self.session.reporter.warn(unknown_words_warning(model.name, fresh))

    def _warn_once(self, text: str) -> None:
        if text not in self.warned:
            self.warned.add(text)
            self.session.reporter.warn(text)

    def _summary(self, code: int) -> Summary:
        return Summary(
            drawn=self.drawn,
            done=self.there,
            failed=self.failed + self.failed_before + self.bad_rows,
            failed_before=self.failed_before,
            left=self.todo - self.drawn - self.failed,
            seconds=time.perf_counter() - self.started,
            exit_code=code,
        )
