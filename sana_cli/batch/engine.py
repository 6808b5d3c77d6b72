"""What draws the jobs of a batch: the interface of the engines, and what each of them is given.

An engine only decides where the jobs are drawn. The jobs, their ids, names and bytes, the manifest
and the events are the same with each:

    this_process.py   the session of the command, in its own process
    processes.py      several processes of this machine, one a device
    on_ray.py         the actors of a Ray cluster
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, TypeAlias

from sana_cli.batch.jobs import Job
from sana_cli.batch.lines import Line
from sana_cli.batch.manifest import Manifest
from sana_cli.errors import SanaError
from sana_cli.pipeline.events import Notice, Progress
from sana_cli.resolve import Inputs
from sana_cli.session import Session
from sana_cli.settings import FileOptions

if TYPE_CHECKING:
    from sana_cli.weights.model_files import ModelFiles


@dataclass(frozen=True)
class Saved:
    """The image of a job is at `path`, and `line` is its line in the manifest."""

    job: Job
    path: Path | str  # in an object store, its URL
    line: Line


@dataclass(frozen=True)
class Failed:
    job: Job
    error: SanaError


RunEvent: TypeAlias = Saved | Failed | Progress | Notice


@dataclass(frozen=True)
class Work:
    """What all jobs of a run have in common."""

    session: Session
    manifest: Manifest
    files_of: "Callable[[Job], ModelFiles]"
    inputs: Inputs
    options: FileOptions
    stopping: Callable[[], bool]  # whether to stop after the images under way


class Engine(Protocol):
    def run(self, jobs: list[Job]) -> Iterator[RunEvent]:
        """Draw and save jobs, each of which ends as Saved or Failed unless `stopping`.

        SanaError if no job can be drawn or saved any more; images reported as saved are on disk.
        """

    def close(self) -> None:
        """Release all that the engine holds; images under way are lost."""


OpenEngine: TypeAlias = Callable[[Work], Engine]
