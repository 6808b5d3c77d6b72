"""Draws the jobs of a batch and saves each picture; one bad job never stops the others."""

import hashlib
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from sana_cli.batch.jobs import Job, Sources
from sana_cli.batch.manifest import Line, Manifest
from sana_cli.errors import BrokenModel, DiskFull, NotEnoughMemory, SanaError
from sana_cli.images import files as images
from sana_cli.pipeline.draw import Failure, Picture, Progress, Remark, draw
from sana_cli.pipeline.plan import Plan
from sana_cli.recipe import Recipe
from sana_cli.system.devices import peak_bytes
from sana_cli.weights.catalogue import Model
from sana_cli.weights.model_files import ModelFiles

AT_ONCE = 256  # pictures whose texts are held in memory together: 0.4 GB of Gemma-2-2B's


@dataclass(frozen=True)
class Saved:
    """The picture of a job is at `path`, and its line in the manifest."""

    job: Job
    path: Path
    line: Line


@dataclass(frozen=True)
class Failed:
    job: Job
    error: SanaError


Event = Saved | Failed | Progress | Remark


class Runner:
    def __init__(
        self,
        manifest: Manifest,
        files_of: Callable[[Model], ModelFiles],
        plan_of: Callable[[list[Recipe], ModelFiles], Plan],
        sources: Sources,
        cache: Path | None,
        encode: Callable[[Picture, Job], bytes],
        force: bool,
        stopping: Callable[[], bool],
    ) -> None:
        """`encode` makes the bytes of a file; `stopping` asks for an end after this picture."""
        self.manifest, self.files_of, self.plan_of = manifest, files_of, plan_of
        self.sources, self.cache = sources, cache
        self.encode, self.force, self.stopping = encode, force, stopping
        self.before = 0.0  # when the last picture was there

    def run(self, jobs: Iterable[Job]) -> Iterator[Event]:
        """All with one model and one precision together, in the order of the first of each.

        SanaError if no more can be drawn or kept; what was said to be saved, is.
        """
        try:
            yield from self._run(jobs)
        except _Fatal as error:
            raise error.error from None

    def _run(self, jobs: Iterable[Job]) -> Iterator[Event]:
        groups: dict[tuple, list[Job]] = {}
        for job in jobs:
            recipe = job.recipe
            precision = (recipe.text_dtype, recipe.dit_dtype, recipe.vae_dtype)
            groups.setdefault((job.model, precision), []).append(job)
        count = sum(map(len, groups.values()))
        self.before = time.perf_counter()
        for group in groups.values():
            waiting = [group[at : at + AT_ONCE] for at in range(0, len(group), AT_ONCE)]
            while waiting and not self.stopping():
                some = waiting.pop(0)
                left, error = (yield from self._draw(some)) if some else ([], None)
                if error is None or not left:
                    continue
                if isinstance(error, NotEnoughMemory):
                    size = max(map(_pixels, left))
                    bad = [job for job in left if _pixels(job) == size]
                    if len(bad) == count:  # of all there is: no fault of the jobs
                        raise _Fatal(error)
                    waiting.insert(0, [job for job in left if _pixels(job) < size])
                elif len(left) == 1 or isinstance(error, BrokenModel):
                    bad = left
                else:  # it was not said of one picture, so halves will tell
                    half, bad = len(left) // 2, []
                    waiting[:0] = [left[:half], left[half:]]
                for job in bad:
                    yield self._failed(job, error)

    def _draw(self, jobs: list[Job]) -> Generator[Event, None, tuple[list[Job], SanaError | None]]:
        """What is left of the jobs, and the error that ended it if one did."""
        left = dict(enumerate(jobs))
        recipes = [job.recipe for job in jobs]
        sources = self.sources if any(recipe.image for recipe in recipes) else None
        under_way = False
        try:
            files = self.files_of(jobs[0].model)
            plan = self.plan_of(recipes, files)
            for event in draw(recipes, files, plan, images=sources, cache=self.cache):
                if isinstance(event, Picture | Failure):
                    job = left[event.index]
                    ended = (
                        self._save(job, event, plan)
                        if isinstance(event, Picture)
                        else self._failed(job, event.error)
                    )
                    del left[event.index]
                    yield ended
                else:
                    yield event
                    if isinstance(event, Remark):
                        continue
                    # A picture is under way from its first step; what was decoded comes at once.
                    if self.stopping() and not under_way and event.stage != "decode":
                        break
                    under_way = under_way or event.stage in ("denoise", "decode")
                    continue
                under_way = False
                if self.stopping():
                    break
        except _Fatal:
            raise
        except Exception as error:
            return list(left.values()), _plain(error)
        return list(left.values()), None

    def _save(self, job: Job, picture: Picture, plan: Plan) -> Saved | Failed:
        try:
            data = self.encode(picture, job)
        except Exception as error:
            return self._failed(job, _plain(error))
        path, replaces = self.manifest.place(job.id, job.name, self.force)
        now = time.perf_counter()
        facts = {
            "id": job.id,
            "row": job.row,
            "seed": job.recipe.seed,
            "sha256": hashlib.sha256(data).hexdigest(),
            "seconds": round(now - self.before, 3),
            "peak_bytes": peak_bytes(plan.device),
        }
        self.before = now
        with _fatal():
            self.manifest.append(status="writing", path=path.as_posix(), **facts)
        try:
            target = self.manifest.folder / path
            written = images.write(target, data, replaces, f"-{self.manifest.stem}")
        except DiskFull as error:
            raise _Fatal(error) from None
        except SanaError as error:
            return self._failed(job, error)
        with _fatal():
            line = self.manifest.done(written.relative_to(self.manifest.folder), **facts)
        return Saved(job, written, line)

    def _failed(self, job: Job, error: SanaError) -> Failed:
        facts = {"id": job.id, "row": job.row, "seed": job.recipe.seed}
        with _fatal():
            self.manifest.append(
                status="failed", **facts, error=error.message, exit_code=error.exit_code
            )
        return Failed(job, error)


def _pixels(job: Job) -> int:
    return job.recipe.native_width * job.recipe.native_height


class _Fatal(Exception):
    """No other job would fare better: the disk is full, or there is too little memory for any."""

    def __init__(self, error: SanaError) -> None:
        self.error = error


@contextmanager
def _fatal() -> Iterator[None]:
    try:
        yield
    except SanaError as error:
        raise _Fatal(error) from None


def _plain(error: Exception) -> SanaError:
    """The error without its traceback, which would keep the memory of what failed."""
    if isinstance(error, SanaError):
        return error.with_traceback(None)
    return SanaError(f"{type(error).__name__}: {error}", "this is a bug, please report it")
