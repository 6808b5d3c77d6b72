"""The engine of several devices: a process on each, all taking jobs from one queue.

A process draws and encodes; this one writes the files and the manifest, as a single process would.
It hands out chunks of jobs that share their networks, the smaller the fewer are left, so that all
processes end at about the same time.

A process that dies is replaced. The job that it was drawing, the first of its chunk that has not
come back, is tried once more, alone; if that process dies too, the job has failed.
"""

import multiprocessing
import os
import signal
import threading
from collections import Counter, deque
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import TYPE_CHECKING, Any

from sana_cli.batch.engine import Failed, RunEvent, Work
from sana_cli.batch.jobs import Job
from sana_cli.batch.placement import Placement
from sana_cli.batch.recorder import Recorder
from sana_cli.batch.worker import Encoded, Worker, group_by_networks, need_the_same
from sana_cli.errors import SanaError
from sana_cli.reporter import TransferReporter
from sana_cli.resolve import Inputs
from sana_cli.session import Session
from sana_cli.settings import FileOptions
from sana_cli.system.signals import CODES, held_back

if TYPE_CHECKING:
    from sana_cli.weights.model_files import ModelFiles

POLL_SECONDS = 0.1  # between looks at whether to stop
END_SECONDS = 10  # for an idle process to end by itself
LARGEST_CHUNK = 16  # jobs that a process takes at once
MAX_DEATHS = 2  # that a job may cause; and before a process is ready


@dataclass(frozen=True)
class _Chunk:
    """Jobs with the same networks, for one process; `alike` as in `Worker.run`."""

    jobs: list[Job]
    files: "ModelFiles"
    inputs: Inputs
    alike: bool


@dataclass(frozen=True)
class _Report:
    kind: str  # a method of Reporter
    text: str


@dataclass(frozen=True)
class _Ready:
    """The process takes a chunk."""


class Processes:
    def __init__(self, work: Work, placements: list[Placement]) -> None:
        self.work, self.placements = work, placements
        self.context = multiprocessing.get_context("spawn")
        self.stop = self.context.Event()
        self.running: dict[Connection, _Process] = {}
        self.queue: deque[list[Job]] = deque()  # groups with the same networks
        self.deaths: Counter[str] = Counter()  # by the id of the job under way
        self.early_deaths = 0
        self.told: set[tuple[str, str]] = set()

    def run(self, jobs: list[Job]) -> Iterator[RunEvent]:
        recorder = Recorder(self.work.manifest, self.work.options.force)
        self.alike = need_the_same(jobs)
        self.queue.extend(group_by_networks(jobs))
        while self.queue or any(process.jobs for process in self.running.values()):
            if self.work.stopping():
                self.stop.set()
                self.queue.clear()
            self._start_missing()
            for ready in wait(list(self.running), timeout=POLL_SECONDS):
                assert isinstance(ready, Connection)
                process = self.running[ready]
                try:
                    message = process.connection.recv()
                except (EOFError, OSError):  # also in the middle of a message
                    yield from self._bury(process, recorder)
                else:
                    yield from self._handle(message, process, recorder)
            self._hand_out()

    def _handle(self, message: Any, process: "_Process", recorder: Recorder) -> Iterator[RunEvent]:
        match message:
            case Encoded():
                process.finish(message.job)
                yield recorder.save(message)
            case Failed():
                process.finish(message.job)
                yield recorder.fail(message.job, message.error)
            case _Ready():
                self.early_deaths = 0
                process.is_ready, process.is_idle, process.jobs = True, True, []
            case _Report(kind, text):
                if (kind, text) not in self.told:  # the processes say the same
                    self.told.add((kind, text))
                    getattr(self.work.session.reporter, kind)(text)
            case SanaError():
                raise message
            case event:
                yield event

    def _start_missing(self) -> None:
        """Start a process for every placement without one, as long as there are jobs for it."""
        used = Counter(process.placement for process in self.running.values())
        idle = sum(process.jobs == [] for process in self.running.values())
        for placement in self.placements:
            if used[placement]:
                used[placement] -= 1
            elif idle < sum(map(len, self.queue)):
                idle += 1
                process = _Process(self.context, placement, self.work, self.stop)
                self.running[process.connection] = process

    def _hand_out(self) -> None:
        for process in self.running.values():
            if process.is_idle and self.queue:
                group = self.queue.popleft()
                left = len(group) + sum(map(len, self.queue))
                fair = left // (2 * len(self.placements))
                size = min(len(group), LARGEST_CHUNK, max(1, fair))
                if self.deaths[group[0].id]:
                    size = 1
                if group[size:]:
                    self.queue.appendleft(group[size:])
                files = self.work.files_of(group[0])
                process.take(_Chunk(group[:size], files, self.work.inputs, self.alike))

    def _bury(self, process: "_Process", recorder: Recorder) -> Iterator[RunEvent]:
        """Remove a process that died, and give its jobs back to the queue or up."""
        how = process.end()
        del self.running[process.connection]
        if not process.jobs:
            self.early_deaths += 1
            if self.early_deaths >= MAX_DEATHS:
                text = f"the worker process on {process.placement} {how} before it drew anything"
                raise SanaError(text, f"see whether one does: --device {process.placement.device}")
            return
        suspect, *others = process.jobs
        self.deaths[suspect.id] += 1
        # Alone each: whatever killed the process now shows which job it is.
        self.queue.extendleft([job] for job in reversed(others))
        if self.deaths[suspect.id] < MAX_DEATHS:
            self.queue.appendleft([suspect])
            self.work.session.reporter.warn(
                f"the worker process on {process.placement} {how} while it was drawing"
                f" row {suspect.row}, seed {suspect.recipe.seed}, which is tried once more"
            )
        else:
            text = f"two worker processes died while they were drawing it; the last {how}"
            hint = "use fewer --workers" if process.placement.device == "cpu" else None
            yield recorder.fail(suspect, SanaError(text, hint))

    def close(self) -> None:
        for process in self.running.values():
            process.dismiss()
        for process in self.running.values():
            process.end(END_SECONDS)
        self.running.clear()


class _Process:
    """A worker process, seen from this one."""

    def __init__(self, context: Any, placement: Placement, work: Work, stop: Any) -> None:
        self.placement = placement
        self.jobs: list[Job] = []  # handed to it, and not back yet
        self.is_ready = False  # once its imports are done
        self.is_idle = False
        self.connection, other = context.Pipe()
        session = {"cache": work.session.cache, "keep_loaded": work.session.keep_loaded}
        self.process = context.Process(
            target=_serve, args=(other, placement, session, work.options, stop), daemon=True
        )
        with held_back():  # or Ctrl-C would interrupt the imports, which come before `_serve`
            self.process.start()
        other.close()  # so that the end of the process ends the connection

    def take(self, chunk: _Chunk) -> None:
        self.jobs, self.is_idle = list(chunk.jobs), False
        try:
            self.connection.send(chunk)
        except OSError:  # it has died, which the next look at the connection tells
            return

    def finish(self, job: Job) -> None:
        self.jobs = [one for one in self.jobs if one.id != job.id]

    def dismiss(self) -> None:
        """Ask an idle process to end; kill one that is starting or drawing."""
        if self.jobs or not self.is_ready:
            self.process.kill()
            return
        try:
            self.connection.send(None)
        except OSError:
            return

    def end(self, seconds: float = 1) -> str:
        """Wait for the end of the process, killing it after some seconds; tell how it ended."""
        self.process.join(seconds)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()
        self.connection.close()
        code = self.process.exitcode or 0
        if code < 0:
            name = signal.Signals(-code).name
            return f"was killed by {name}" + (", as when memory is full" if code == -9 else "")
        return f"ended with exit code {code}"


# --- in the process ----------------------------------------------------------------------------


class _Forward:
    """Report to the process that started this one."""

    def __init__(self, connection: Connection) -> None:
        self.connection = connection

    def info(self, text: str) -> None:
        self.connection.send(_Report("info", text))

    def detail(self, text: str) -> None:
        self.connection.send(_Report("detail", text))

    def warn(self, text: str) -> None:
        self.connection.send(_Report("warn", text))

    def confirm(self, question: str) -> bool:
        raise AssertionError(f"a process asks nothing: {question}")

    def transfer(self) -> AbstractContextManager[TransferReporter]:
        raise AssertionError("weights are fetched before a process starts")


def _serve(
    connection: Connection,
    placement: Placement,
    options: dict[str, bool],
    files: FileOptions,
    stop: Any,
) -> None:
    """Draw the chunks that come through a connection, until None or its end."""
    for number in CODES:  # which a terminal or a scheduler sends to all processes
        signal.signal(number, signal.SIG_IGN)
    if placement.visible is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = placement.visible
    threading.Thread(target=_die_with_parent, daemon=True).start()
    import torch

    if placement.threads is not None:
        torch.set_num_threads(placement.threads)
    session = Session(
        device=placement.device,
        memory=placement.memory,
        offline=True,
        reporter=_Forward(connection),
        **options,
    )
    worker = Worker(session, files, stop.is_set)
    try:
        connection.send(_Ready())
        while (chunk := connection.recv()) is not None:
            try:
                _draw(chunk, worker, connection)
            except SanaError as error:
                connection.send(error.with_traceback(None))
            connection.send(_Ready())
    except (EOFError, OSError):  # the parent has gone
        pass


def _draw(chunk: _Chunk, worker: Worker, connection: Connection) -> None:
    for event in worker.run(chunk.jobs, lambda job: chunk.files, chunk.inputs, chunk.alike):
        connection.send(event)


def _die_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)
