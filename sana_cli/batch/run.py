"""One call of `sana batch`: from rows to jobs to pictures, round by round, and what is said."""

import sys
import time
from collections.abc import Iterable
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sana_cli.batch.events import Events
from sana_cli.batch.jobs import Ask, Job, Planner, Reader
from sana_cli.batch.manifest import Ledger, Manifest
from sana_cli.batch.rows import Fault, Found
from sana_cli.batch.shards import Shard
from sana_cli.errors import FAILURES, MissingModel, SanaError, UsageError
from sana_cli.images.names import check_quality
from sana_cli.recipe import Recipe
from sana_cli.system.signals import Asked
from sana_cli.ui import BatchBar, Talk
from sana_cli.units import counted
from sana_cli.weights.catalogue import Model
from sana_cli.weights.fetch import open_chosen

if TYPE_CHECKING:
    from sana_cli.batch.runner import Event, Runner, Saved
    from sana_cli.pipeline.draw import Picture
    from sana_cli.pipeline.plan import Plan
    from sana_cli.weights.model_files import ModelFiles

MOST_SHOWN = 10  # faults


class Batch:
    def __init__(
        self,
        talk: Talk,
        reader: Reader,
        folder: Path,
        share: Shard | None,
        where: str,
        *,
        device: str,
        memory: int | None,
        offline: bool,
        cache: bool,
        retry_failed: bool,
        restart: bool,
        max_failures: int | None,
        with_recipe: bool,
        quality: int | None,
        force: bool,
        json_output: bool,
    ) -> None:
        """`where` names the file of jobs, for people; the rest are options."""
        self.talk, self.reader, self.folder, self.share = talk, reader, folder, share
        self.where, self.device, self.memory = where, device, memory
        self.offline, self.cache = offline, cache
        self.retry_failed, self.restart, self.max_failures = retry_failed, restart, max_failures
        self.with_recipe, self.quality, self.force = with_recipe, quality, force
        self.bar = BatchBar(talk)
        self.events = Events() if json_output else None
        self.planner = Planner()
        self.files: dict[Model, ModelFiles] = {}
        self.manifest: Manifest | None = None  # from the first round on that was in order
        self.warned: set[str] = set()
        self.todo = self.drawn = self.there = self.failed_before = self.failed = 0
        self.bad_rows = 0
        self.started = time.perf_counter()

    def show(self, stack: ExitStack) -> None:
        stack.enter_context(self.bar)
        if self.events:
            stack.enter_context(self.events)

    def check(self, rounds: Iterable[list[Found]]) -> int:
        """Say how many jobs there are and how many of them are to be drawn; the exit code."""
        jobs = [job for found in rounds for job in self._jobs(found, fetch=False)]
        self._refuse_nothing()
        ledger = Ledger(self.folder)
        states = [ledger.status(job.id) for job in jobs]
        todo = sum(map(self._is_todo, states))
        if self.events:
            self._say_plan(jobs, todo, states.count("done"), states.count("failed"))
        else:
            sys.stdout.write(f"{counted(len(jobs), 'job')}, {todo} to draw into {self.folder}\n")
        return 0

    def draw(self, rounds: Iterable[list[Found]], asked: Asked, stack: ExitStack) -> int:
        """Draw all there is to draw, and sum up; the exit code."""
        try:
            for found in rounds:
                jobs = self._jobs(found, fetch=True)
                if not asked:
                    self._draw(self._open_jobs(jobs, stack), asked)
                if asked or self._failed_enough():
                    break
                self._say_stage("wait")  # for more rows
            if not asked:
                self._refuse_nothing()
        except SanaError as error:
            self._sum_up(error.exit_code)
            raise
        failed = self.failed + self.failed_before + self.bad_rows
        code = asked.code or (FAILURES if failed else 0)
        self._sum_up(code)
        return code

    # --- from rows to jobs ---------------------------------------------------------------------

    def _jobs(self, found: list[Found], fetch: bool) -> list[Job]:
        """The jobs of some rows that fall to this shard, with their models on this machine.

        A fault in the first rows ends all before it has begun; later ones are failures.
        """
        from sana_cli.kernels.dispatch import chosen_path
        from sana_cli.system.devices import choose_device

        asks, faults = self.reader.read(found)
        self._settle(faults, len(found))
        if self.manifest is None:
            self.device = choose_device(self.device)
            self.talk.detail("kernels: {} path, as {}".format(*chosen_path(self.device)))
            if fetch:
                self._rehearse(asks, len(found))

        def files_of(model: Model) -> "ModelFiles":
            if model not in self.files:
                self.talk.say(f"model {model.name} ({model.source}), licence {model.licence}")
                files = open_chosen(model, self.talk, self.offline, dry_run=not fetch)
                self.files[model] = files
            return self.files[model]

        survived = UsageError if self.manifest is None else SanaError
        jobs, faults = self.planner.plan(asks, files_of, self.device, survived)
        faults += self._too_long_for_jpeg(jobs)
        self._settle(faults, len(found))
        if self.manifest is None and jobs:
            check_quality(self.quality, {job.format for job in jobs})
        for ask in asks:
            if ask.choice.model in self.files:
                for text in ask.choice.sampling(self.files[ask.choice.model]).warnings:
                    self._warn_once(text)
        return [job for job in jobs if self.share is None or self.share.holds(job.id)]

    def _rehearse(self, asks: list[Ask], rows: int) -> None:
        """Find the faults of rows before a download, not after it, where that can be."""
        from sana_cli.weights.hub_cache import find_parts

        models = dict.fromkeys(ask.choice.model for ask in asks)
        if any(find_parts(model) is None for model in models):
            known = {}
            with suppress(MissingModel):  # of one of which nothing is known before
                for model in models:
                    known[model] = open_chosen(model, self.talk, self.offline, dry_run=True)
                _, faults = self.planner.copy().plan(asks, known.__getitem__, self.device)
                self._settle(faults, rows)

    def _too_long_for_jpeg(self, jobs: list[Job]) -> list[Fault]:
        """Faults of prompts that leave no room for the recipe, better known now than when drawn."""
        if not self.with_recipe or all(job.format != "jpeg" for job in jobs):
            return []
        import torch

        from sana_cli.images.metadata import Record

        faults = []
        for job in jobs:
            if job.format == "jpeg":
                try:
                    Record(job.recipe, self.device, torch.__version__).as_exif("jpeg")
                except UsageError as error:
                    faults.append(Fault(job.row, None, error.message, error.hint))
        return faults

    def _settle(self, faults: list[Fault], rows: int) -> None:
        if not faults:
            return
        if self.manifest is not None:
            self.bad_rows += len(faults)
            for fault in faults:
                self._say_error(self._error(fault), row=fault.row, column=fault.column)
            return
        first = faults[0]
        alike = {(fault.column, fault.message) for fault in faults} == {(None, first.message)}
        if len(faults) == rows > 1 and alike:  # the fault is in an option, not in every row
            raise UsageError(first.message, first.hint)
        if len(faults) == 1:
            if self.events:
                self._emit_error(self._error(first), row=first.row, column=first.column)
            raise self._error(first)
        faults = sorted(faults, key=lambda fault: fault.row)
        for fault in faults[:MOST_SHOWN]:
            error = self._error(fault)
            self.talk.tell(error.message + (f"; {error.hint}" if error.hint else ""))
            if self.events:
                self._emit_error(error, row=fault.row, column=fault.column)
        raise UsageError(
            f"{self.where} has {len(faults)} rows at fault"
            + (f", the first {MOST_SHOWN} of them above" if len(faults) > MOST_SHOWN else "")
        )

    def _error(self, fault: Fault) -> UsageError:
        column = f", column {fault.column}" if fault.column else ""
        message = f"{self.where}, row {fault.row}{column}: {fault.message}"
        return UsageError(message, fault.hint)

    def _refuse_nothing(self) -> None:
        if not self.planner.count and not self.bad_rows:
            raise UsageError(f"{self.where} holds no job", "give a prompt a line, at the least")

    # --- from jobs to pictures -----------------------------------------------------------------

    def _open_jobs(self, jobs: list[Job], stack: ExitStack) -> list[Job]:
        """Those to draw, after the folder is taken and the earlier runs in it are looked at."""
        if self.manifest is None:
            self.manifest = stack.enter_context(Manifest(self.folder, self.share))
            if self.manifest.damaged:
                self.talk.warn(f"{self.manifest.damaged} lines of the manifest are damaged")
        manifest = self.manifest
        places = {Path(line["path"]).parent for line in manifest.last.values() if "path" in line}
        manifest.sweep(places | {job.name.parent for job in jobs} | {Path()})
        states = [manifest.status(job.id) for job in jobs]
        todo = [job for job, state in zip(jobs, states, strict=True) if self._is_todo(state)]
        there, failed = states.count("done"), states.count("failed")
        manifest.begin(
            jobs=len(jobs),
            todo=len(todo),
            file=self.where,
            shard=str(self.share) if self.share else None,
        )
        if self.restart:
            manifest.append_all(
                {"status": "again", "id": job.id}
                for job, state in zip(jobs, states, strict=True)
                if state != "open"
            )
        else:
            for job, state in zip(jobs, states, strict=True):
                if state == "done":
                    manifest.adopt(job.id)
            self.there += there
        if not self.restart and not self.retry_failed:
            self.failed_before += failed
        self.todo += len(todo)
        self.bar.expect(len(todo))
        self._say_plan(jobs, len(todo), there, failed)
        return todo

    def _is_todo(self, state: str) -> bool:
        return self.restart or state == "open" or (state == "failed" and self.retry_failed)

    def _draw(self, jobs: list[Job], asked: Asked) -> None:
        from sana_cli.batch.runner import Failed, Saved

        said = False
        for event in self._runner(asked).run(jobs) if jobs else ():
            if isinstance(event, Saved):
                self.drawn += 1
                self._say_saved(event)
            elif isinstance(event, Failed):
                self.failed += 1
                self.bar.advance()
                facts = {"id": event.job.id, "row": event.job.row, "column": None}
                message = f"{self.where}, row {event.job.row}: {event.error.message}"
                error = SanaError(message, event.error.hint)
                error.exit_code = event.error.exit_code
                self._say_error(error, **facts)
                if self._failed_enough():
                    self.talk.warn(f"stopped after {self.failed} failures")
                    break
            else:
                self._say_progress(event)
            if asked and not said:
                said = True
                self.talk.say("stopping after this picture; once more stops at once")

    def _runner(self, asked: Asked) -> "Runner":
        import torch

        from sana_cli.batch.runner import Runner
        from sana_cli.images import files as images
        from sana_cli.images.metadata import Record
        from sana_cli.pipeline.plan import make_plan
        from sana_cli.system.folders import cache_folder

        def encode(picture: "Picture", job: Job) -> bytes:
            record = None
            if self.with_recipe:
                record = Record(job.recipe, self.device, torch.__version__)
            return images.encode(picture.pixels, job.format, self.quality, record)

        def plan_of(recipes: list[Recipe], files: "ModelFiles") -> "Plan":
            plan = make_plan(recipes, files, self.device, self.memory)
            for text in plan.words():
                self.talk.say(text)
            return plan

        assert self.manifest is not None
        return Runner(
            self.manifest,
            self.files.__getitem__,
            plan_of,
            self.reader.sources,
            cache_folder() if self.cache else None,
            encode,
            self.force,
            lambda: bool(asked),
        )

    def _failed_enough(self) -> bool:
        failed = self.failed + self.bad_rows
        return self.max_failures is not None and failed >= self.max_failures

    # --- what is said --------------------------------------------------------------------------

    def _say_plan(self, jobs: list[Job], todo: int, there: int, failed: int) -> None:
        self.talk.say(
            f"{counted(len(jobs), 'job')}, {todo} to draw into {self.folder}, on {self.device}"
            + (f"; {there} are there" if there else "")
            + (f"; {failed} failed before" if failed else "")
            + (f"; shard {self.share}" if self.share else "")
        )
        if self.events:
            self.events.emit(
                "plan",
                jobs=len(jobs),
                done=there,
                failed=failed,
                todo=todo,
                folder=str(self.folder),
                shard=str(self.share) if self.share else None,
                device=self.device,
                models=list(dict.fromkeys(job.recipe.model for job in jobs)),
            )

    def _say_saved(self, saved: "Saved") -> None:
        job, line = saved.job, saved.line
        self.bar.advance()
        if not self.events:
            self.bar.result(str(saved.path))
            return
        recipe = job.recipe
        facts = {name: line[name] for name in ("sha256", "bytes", "seconds", "peak_bytes")}
        self.events.emit(
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

    def _say_error(self, error: SanaError, **facts: Any) -> None:
        self.talk.error(error)
        if self.events:
            self._emit_error(error, **facts)

    def _emit_error(self, error: SanaError, **facts: Any) -> None:
        assert self.events is not None
        known = {"id": None, "row": None, "column": None} | facts
        known |= {"message": error.message, "hint": error.hint, "exit_code": error.exit_code}
        self.events.emit("error", **known)

    def _say_progress(self, event: "Event") -> None:
        from sana_cli.pipeline.draw import Progress, Remark

        if isinstance(event, Remark):
            (self._warn_once if event.warning else self.talk.detail)(event.text)
        elif isinstance(event, Progress):
            self._say_stage(event.stage, event.done, event.total)

    def _say_stage(self, name: str, done: int = 0, total: int = 0) -> None:
        self.bar.stage(name, done, total)
        if self.events:
            self.events.stage(name, done, total)

    def _warn_once(self, text: str) -> None:
        if text not in self.warned:
            self.warned.add(text)
            self.talk.warn(text)

    def _sum_up(self, code: int) -> None:
        if self.manifest is None:
            return
        failed = self.failed + self.failed_before + self.bad_rows
        left = self.todo - self.drawn - self.failed
        seconds = time.perf_counter() - self.started
        self.talk.say(
            f"{self.drawn} drawn"
            + (f", {self.there} were there" if self.there else "")
            + (f", {failed} failed" if failed else "")
            + (f", {left} left" if left else "")
            + f", in {seconds:.1f} s"
        )
        if self.failed_before:
            self.talk.say(f"{self.failed_before} failed in an earlier run: --retry-failed")
        if self.events:
            self.events.emit(
                "summary",
                drawn=self.drawn,
                done=self.there,
                failed=failed,
                left=left,
                seconds=round(seconds, 3),
                exit_code=code,
            )
