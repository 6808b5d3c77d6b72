"""Jobs to encoded images, with one session; a job that fails does not stop the others."""

from collections.abc import Callable, Generator, Hashable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

from sana_cli.batch.engine import Failed
from sana_cli.batch.jobs import Job
from sana_cli.errors import BrokenModel, NotEnoughMemory, SanaError, ServerGone
from sana_cli.pipeline.events import Failure, ImageDone, Notice, Progress
from sana_cli.pipeline.plan import demands
from sana_cli.resolve import Inputs
from sana_cli.session import DrawRequest, Session
from sana_cli.settings import FileOptions

if TYPE_CHECKING:
    from sana_cli.weights.model_files import ModelFiles

GROUP_SIZE = 256  # images whose text states are in memory together: 0.4 GB with Gemma-2-2B


@dataclass(frozen=True)
class Encoded:
    """The file of a job's image; `peak_bytes` is the most memory that its process has held."""

    job: Job
    data: bytes
    peak_bytes: int


WorkerEvent: TypeAlias = Encoded | Failed | Progress | Notice


def group_by_networks(jobs: Iterable[Job]) -> list[list[Job]]:
    """Group the jobs that are drawn with the same networks, in the order of the first of each."""
    groups: dict[Hashable, list[Job]] = {}
    for job in jobs:
        recipe = job.recipe
        dtypes = recipe.text_dtype, recipe.dit_dtype, recipe.vae_dtype
        networks = (*dtypes, recipe.lora, recipe.quant)
        groups.setdefault((job.components, networks), []).append(job)
    return list(groups.values())


def need_the_same(jobs: Iterable[Job]) -> bool:
    """Whether all jobs need the same memory, so that a machine too small for one draws none."""
    groups = group_by_networks(jobs)
    return len(groups) == 1 and len({demands(job.recipe) for job in groups[0]}) == 1


class Worker:
    def __init__(
        self, session: Session, options: FileOptions, stopping: Callable[[], bool]
    ) -> None:
        """`stopping` returns whether to stop after the current image."""
        self.session, self.options, self.stopping = session, options, stopping

    def run(
        self,
        jobs: Iterable[Job],
        files_of: "Callable[[Job], ModelFiles]",
        inputs: Inputs,
        alike: bool,
    ) -> Iterator[WorkerEvent]:
        """Draw jobs, all with the same networks together; each ends as Encoded or Failed.

        NotEnoughMemory if there is too little for a job and all jobs of the batch are `alike`:
        then the machine is too small, and no job is at fault. ServerGone if they are drawn
        elsewhere, and nobody draws there any more.
        """
        for group in group_by_networks(jobs):
            waiting = [group[at : at + GROUP_SIZE] for at in range(0, len(group), GROUP_SIZE)]
            while waiting and not self.stopping():
                some = waiting.pop(0)
                left, error = yield from self._draw(some, files_of(some[0]), inputs)
                if error is None or not left:
                    continue
                if isinstance(error, NotEnoughMemory) and alike:
                    raise error
                if parts := _divide(left, error):
                    waiting[:0] = parts
                    continue
                for job in left:
                    yield Failed(job, error)

    def _draw(
        self, jobs: list[Job], files: "ModelFiles", inputs: Inputs
    ) -> Generator[WorkerEvent, None, tuple[list[Job], SanaError | None]]:
        """Draw jobs; return those that are left, and the error that ended the drawing, if any."""
        left = dict(enumerate(jobs))
        under_way = False
        try:
            recipes = [job.recipe for job in jobs]
            request = DrawRequest(jobs[0].resolution.model, files, recipes, inputs)
            for event in self.session.draw(request):
                if isinstance(event, ImageDone | Failure):
                    job = left.pop(event.index)
                    if isinstance(event, ImageDone):
                        yield self._encode(job, event)
                    else:
                        yield Failed(job, event.error)
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
        except ServerGone:
            raise
        except Exception as error:
            return list(left.values()), plain_error(error)
        return list(left.values()), None

    def _encode(self, job: Job, image: ImageDone) -> Encoded | Failed:
        try:
            data = self.session.encode(image, job.recipe, job.format, self.options)
        except Exception as error:
            return Failed(job, plain_error(error))
        return Encoded(job, data, self.session.peak_bytes())


def _divide(jobs: list[Job], error: SanaError) -> list[list[Job]]:
    """Return two parts of the jobs, if the error may be of some only; else none."""
    parts: list[list[Job]] = []
    if isinstance(error, NotEnoughMemory):
        kinds = sorted({demands(job.recipe) for job in jobs})
        middle = kinds[len(kinds) // 2]
        parts.append([job for job in jobs if demands(job.recipe) < middle])
        parts.append([job for job in jobs if demands(job.recipe) >= middle])
    elif not isinstance(error, BrokenModel):
        parts += jobs[: len(jobs) // 2], jobs[len(jobs) // 2 :]
    return parts if all(parts) else []


def plain_error(error: Exception) -> SanaError:
    """Return the error without its traceback, which would keep the failed tensors alive."""
    if isinstance(error, SanaError):
        return error.with_traceback(None)
    return SanaError(f"{type(error).__name__}: {error}", "this is a bug, please report it")
