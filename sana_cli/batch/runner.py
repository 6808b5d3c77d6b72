"""Draw the jobs of a batch and save each image; a job that fails does not stop the others."""

import hashlib
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from sana_cli.batch.jobs import Job
from sana_cli.batch.manifest import Line, Manifest
from sana_cli.errors import BrokenModel, DiskFull, NotEnoughMemory, SanaError
from sana_cli.images.files import encode, write
from sana_cli.pipeline.events import Failure, ImageDone, Notice, Progress
from sana_cli.resolve import Inputs
from sana_cli.session import DrawRequest, Session
from sana_cli.settings import FileOptions

if TYPE_CHECKING:
    from sana_cli.weights.model_files import ModelFiles

GROUP_SIZE = 256  # images whose text states are in memory together: 0.4 GB with Gemma-2-2B


@dataclass(frozen=True)
class Saved:
    """The image of a job is at `path`, and `line` is its line in the manifest."""

    job: Job
    path: Path
    line: Line


@dataclass(frozen=True)
class Failed:
    job: Job
    error: SanaError


RunEvent = Saved | Failed | Progress | Notice


class Runner:
    def __init__(
        self,
        session: Session,
        manifest: Manifest,
        files_of: "Callable[[Job], ModelFiles]",
        inputs: Inputs,
        options: FileOptions,
        stopping: Callable[[], bool],
    ) -> None:
        """`stopping` returns whether to stop after the current image."""
        self.session, self.manifest, self.files_of = session, manifest, files_of
        self.inputs, self.options, self.stopping = inputs, options, stopping
        self.before = 0.0  # when the last image was saved

    def run(self, jobs: Iterable[Job]) -> Iterator[RunEvent]:
        """Run jobs, all with the same networks together, in the order of the first of each.

        SanaError if no job can be drawn or saved any more; images reported as saved are on disk.
        """
        try:
            yield from self._run(jobs)
        except _Fatal as error:
            raise error.error from None

    def _run(self, jobs: Iterable[Job]) -> Iterator[RunEvent]:
        groups: dict[tuple, list[Job]] = {}
        for job in jobs:
            recipe = job.recipe
            dtypes = recipe.text_dtype, recipe.dit_dtype, recipe.vae_dtype
            networks = (*dtypes, recipe.lora, recipe.quant)
            groups.setdefault((job.model, job.vae, job.controlnet, networks), []).append(job)
        count = sum(map(len, groups.values()))
        self.before = time.perf_counter()
        for group in groups.values():
            waiting = [group[at : at + GROUP_SIZE] for at in range(0, len(group), GROUP_SIZE)]
            while waiting and not self.stopping():
                some = waiting.pop(0)
                left, error = (yield from self._draw(some)) if some else ([], None)
                if error is None or not left:
                    continue
                if isinstance(error, NotEnoughMemory):
                    size = max(map(_pixels, left))
                    bad = [job for job in left if _pixels(job) == size]
                    if (
                        len(bad) == count
                    ):  # every job fails: the machine is too small, not the jobs at fault
                        raise _Fatal(error)
                    waiting.insert(0, [job for job in left if _pixels(job) < size])
                elif len(left) == 1 or isinstance(error, BrokenModel):
                    bad = left
                else:  # of an unknown job: bisect
                    half, bad = len(left) // 2, []
                    waiting[:0] = [left[:half], left[half:]]
                for job in bad:
                    yield self._failed(job, error)

    def _draw(
        self, jobs: list[Job]
    ) -> Generator[RunEvent, None, tuple[list[Job], SanaError | None]]:
        """Draw jobs; return those that are left, and the error that ended the drawing, if any."""
        left = dict(enumerate(jobs))
        under_way = False
        try:
            model, recipes = jobs[0].model, [job.recipe for job in jobs]
            request = DrawRequest(model, self.files_of(jobs[0]), recipes, self.inputs)
            for event in self.session.draw(request):
                if isinstance(event, ImageDone | Failure):
                    job = left.pop(event.index)
                    if isinstance(event, ImageDone):
                        yield self._save(job, event)
                    else:
                        yield self._failed(job, event.error)
                    under_way = False
                    if self.stopping():
                        break
                    continue
                if isinstance(event, Progress | Notice):
                    yield event
                if isinstance(event, Progress):
                    # An image is under way from its first step; once denoised it is decoded.
                    if self.stopping() and not under_way and event.stage != "decode":
                        break
                    under_way = under_way or event.stage in ("denoise", "decode")
        except _Fatal:
            raise
        except Exception as error:
            return list(left.values()), _plain(error)
        return list(left.values()), None

    def _save(self, job: Job, image: ImageDone) -> Saved | Failed:
        try:
            kept = self.options.metadata == "full"
            metadata = self.session.metadata(job.recipe) if kept else None
            data = encode(image.pixels, job.format, self.options.quality, metadata)
        except Exception as error:
            return self._failed(job, _plain(error))
        path, replaces = self.manifest.place(job.id, job.name, self.options.force)
        now = time.perf_counter()
        facts = {
            "id": job.id,
            "row": job.row,
            "seed": job.recipe.seed,
            "sha256": hashlib.sha256(data).hexdigest(),
            "seconds": round(now - self.before, 3),
            "peak_bytes": self.session.peak_bytes(),
        }
        self.before = now
        with _fatal():
            self.manifest.append(status="writing", path=path.as_posix(), **facts)
        try:
            target = self.manifest.folder / path
            written = write(target, data, replaces, f"-{self.manifest.stem}")
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
    """An error that ends the run: the disk is full, or no job fits in memory."""

    def __init__(self, error: SanaError) -> None:
        self.error = error


@contextmanager
def _fatal() -> Iterator[None]:
    try:
        yield
    except SanaError as error:
        raise _Fatal(error) from None


def _plain(error: Exception) -> SanaError:
    """Return the error without its traceback, which would keep the failed tensors alive."""
    if isinstance(error, SanaError):
        return error.with_traceback(None)
    return SanaError(f"{type(error).__name__}: {error}", "this is a bug, please report it")
