"""The engine of a Ray cluster: a pool of actors of Ray Data, each with a session of its own.

This process resolves the jobs and keeps the manifest. An actor finds or fetches the model on its
node, completes the recipe for its device, draws, encodes and writes the file; only the record comes
back. The folder of the batch, and input images, LoRA files and models named by their paths, have to
be on a file system that all nodes share.

Before it writes a file, an actor lists it in a manifest of its own, which is removed when the batch
ends. So an image whose actor, node or driver is lost after writing it is not drawn again. Ray
restarts a lost actor and repeats its job, up to MAX_ATTEMPTS.
"""

import io
import json
import logging
import os
import queue
import re
import secrets
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, redirect_stdout, suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TextIO, cast

from sana_cli.batch.engine import Failed, RunEvent, Saved, Work
from sana_cli.batch.jobs import Job
from sana_cli.batch.lines import Line
from sana_cli.batch.manifest import Ledger, Manifest
from sana_cli.batch.recorder import Recorder
from sana_cli.batch.shards import Shard
from sana_cli.batch.worker import Encoded, Worker, need_the_same, plain_error
from sana_cli.errors import DiskFull, MissingModel, NotEnoughMemory, SanaError, UsageError
from sana_cli.pipeline.events import Progress
from sana_cli.recipe import PRECISION, Recipe
from sana_cli.resolve import Inputs
from sana_cli.session import Session
from sana_cli.settings import FileOptions
from sana_cli.system.signals import CODES
from sana_cli.units import counted

if TYPE_CHECKING:
    from sana_cli.weights.catalogue import Component, Model
    from sana_cli.weights.model_files import ModelFiles

POLL_SECONDS = 0.2  # between looks at whether to stop, and at what the actors tell
CONNECT_SECONDS = 5
MAX_ATTEMPTS = 2  # at a job whose actor is lost
MAX_BLOCKS = 5000  # of jobs; Ray Data keeps track of each


@dataclass(frozen=True)
class RayOptions:
    """What each actor gets, as asked for. None leaves the choice to the cluster."""

    address: str | None
    workers: int | None
    device: str  # "auto", "cuda" or "cpu"


class DriverSession(Session):
    """The session of a driver, which resolves and never draws.

    It fetches a model only if its configs are not known without its files.
    """

    def open(self, model: "Model", *, dry_run: bool = False) -> "ModelFiles":
        try:
            return super().open(model, dry_run=True)
        except MissingModel:
            return super().open(model, dry_run=dry_run)


def import_ray() -> Any:
    """Import Ray. UsageError if it is not installed."""
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")  # stderr is the command's
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise UsageError(
            f"--engine ray needs Ray, which cannot be imported ({error})",
            'install it: pip install "sana-cli[ray]"',
        ) from None
    return ray


class _OwnStdout:
    """The stdout of the command, without what Ray's threads print there of lost actors."""

    def __init__(self, stdout: Any) -> None:
        self.stdout = stdout

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stdout, name)

    def write(self, text: str) -> int:
        if threading.current_thread().name.startswith("ray_"):
            return len(text)
        return self.stdout.write(text)


class OnRay:
    def __init__(self, work: Work, options: RayOptions) -> None:
        """Connect to the cluster, or start one on this machine. SanaError if that fails."""
        self.work, self.ray = work, import_ray()
        reporter = work.session.reporter
        self.stdout = sys.stdout
        sys.stdout = cast(TextIO, _OwnStdout(sys.stdout))
        _connect(self.ray, options.address)
        nodes = [node["Resources"] for node in self.ray.nodes() if node["Alive"]]
        gpus = sum(int(node.get("GPU", 0)) for node in nodes)
        on_gpus = options.device == "cuda" or (options.device == "auto" and gpus > 0)
        if not on_gpus:  # the head often has no CPUs, to be left alone
            nodes = [node for node in nodes if node.get("CPU", 0) >= 1]
            if not nodes:
                raise SanaError("Ray: no node has a CPU core for actors", "see `ray status`")
        self.workers = options.workers or (max(1, gpus) if on_gpus else len(nodes))
        # On CPUs the actors of a node, as many on each, divide its cores and its memory.
        together = -(-self.workers // len(nodes))
        cores = max(1, min(int(node.get("CPU", 0)) for node in nodes) // together)
        self.needs = {"num_gpus": 1} if on_gpus else {"num_cpus": cores}
        self.is_idle = True
        self.run_name = secrets.token_hex(4)
        self.setup = _Setup(
            cwd=os.getcwd(),
            folder=work.manifest.store.address,
            shard=work.manifest.shard,
            run_name=self.run_name,
            device="cuda" if on_gpus else "cpu",
            memory=work.session.memory,
            cache=work.session.cache,
            offline=work.session.offline,
            threads=None if on_gpus else cores,
            together=1 if on_gpus else together,
            options=work.options,
        )
        # On the node of the driver, so that it is lost only with it.
        node = self.ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(
            self.ray.get_runtime_context().get_node_id(), soft=False
        )
        here = self.ray.remote(num_cpus=0, scheduling_strategy=node)
        self.coordinator = here(_Coordinator).remote()
        each = "a GPU" if on_gpus else counted(cores, "CPU core")
        actors, places = counted(self.workers, "actor"), counted(len(nodes), "node")
        reporter.info(f"Ray: {actors} on {places}, each with {each}")

    def run(self, jobs: list[Job]) -> Iterator[RunEvent]:
        recorder = Recorder(self.work.manifest, self.work.options.force)
        by_id = {job.id: job for job in jobs}
        records: queue.SimpleQueue[Any] = queue.SimpleQueue()
        thread = threading.Thread(target=self._execute, args=(jobs, records), daemon=True)
        thread.start()
        self.is_idle = stopping = False
        done = told = 0
        while True:
            if self.work.stopping() and not stopping:
                stopping = True
                self.ray.get(self.coordinator.stop.remote())
            try:
                record = records.get(timeout=POLL_SECONDS)
            except queue.Empty:
                continue
            finally:
                told = self._pass_on(told)
            if record is None:
                self.is_idle = True
                return
            if isinstance(record, Exception):
                raise _of_ray(record)
            event = self._event(json.loads(record), by_id, recorder)
            if event is not None:
                yield event
                done += 1
                yield Progress("image", done, len(jobs), 0.0)

    def _execute(self, jobs: list[Job], records: "queue.SimpleQueue[Any]") -> None:
        """Put the records of jobs as they come, then None or the error that ended the run."""
        try:
            data, dumps = self.ray.data, self.ray.cloudpickle.dumps
            rows = [{"job": dumps(job)} for job in jobs]
            blocks = min(len(rows), MAX_BLOCKS)
            drawn = data.from_items(rows, override_num_blocks=blocks).map_batches(
                _Actor,
                fn_constructor_args=(self.setup, self.coordinator, need_the_same(jobs)),
                batch_size=1,
                compute=data.ActorPoolStrategy(
                    min_size=1, max_size=self.workers, initial_size=self.workers
                ),
                **self.needs,
            )
            # By default a record is held back until the next is there.
            for batch in drawn.iter_batches(batch_size=None, prefetch_batches=0):
                for record in batch["record"]:
                    records.put(str(record))
            records.put(None)
        except Exception as error:
            records.put(error)

    def _event(self, record: Line, jobs: dict[str, Job], recorder: Recorder) -> RunEvent | None:
        """Record what became of a job. SanaError if nothing more can be drawn."""
        job, status = jobs[record.pop("id")], record.pop("status")
        if status == "open":  # the run is stopping
            return None
        if status == "done":
            job = replace(job, recipe=Recipe(**record.pop("recipe")))
            return recorder.adopt(job, record)
        error = SanaError(record["error"], record["hint"])
        error.exit_code = record["exit_code"]
        if status == "fatal":
            raise error
        return recorder.fail(job, error)

    def _pass_on(self, told: int) -> int:
        """Report what the actors have told, each text once; return how many there are."""
        texts = self.ray.get(self.coordinator.told_since.remote(told))
        for kind, text in texts:
            getattr(self.work.session.reporter, kind)(text)
        return told + len(texts)

    def close(self) -> None:
        """Disconnect, which ends the actors. Their manifests are removed if none was drawing, as
        this process has all of their lines then."""
        with redirect_stdout(io.StringIO()):  # where Ray repeats what its threads have printed
            self.ray.shutdown()
        sys.stdout = self.stdout
        if not self.is_idle:
            return
        manifest = self.work.manifest
        manifest.store.remove_manifests(f"{manifest.stem}-{self.run_name}-")


def check_address(address: str | None) -> None:
    """UsageError unless an address of a cluster is HOST:PORT or auto; SanaError if no one answers.

    Ray itself would try for two minutes.
    """
    if address is None or address == "auto":
        return
    match = re.fullmatch(r"(?P<host>[^/:]+|\[[^/]+\]):(?P<port>\d{1,5})", address)
    if match is None:
        hint = "give HOST:PORT; from outside the cluster use: ray job submit -- sana batch …"
        raise UsageError(f"{address[:200]} is no address of a Ray cluster", hint)
    try:
        place = match["host"].strip("[]"), int(match["port"])
        socket.create_connection(place, CONNECT_SECONDS).close()
    except (OSError, OverflowError) as error:
        raise _unreachable(address, error) from None


def _unreachable(address: str | None, error: Exception) -> SanaError:
    where = f"the Ray cluster {address or 'of this machine'}"
    if "AuthToken" in str(error.__cause__):
        hint = "set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN to that of the cluster"
        return SanaError(f"{where} wants a token", hint)
    reason = " ".join(str(error).split())[:200]
    hint = "see `ray status`, or give another --address"
    return SanaError(f"{where} cannot be reached: {reason}", hint)


def _connect(ray: Any, address: str | None) -> None:
    for name in ("ray", "ray.data"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    handlers = {number: signal.getsignal(number) for number in CODES}
    try:
        with _without_stderr():
            # Left to itself, Ray would first look for a cluster that may have crashed long ago.
            ray.init(address=address or "local", log_to_driver=False, configure_logging=False)
    except Exception as error:
        raise _unreachable(address, error) from None
    finally:
        if threading.current_thread() is threading.main_thread():  # Ray installs its own
            for number, handler in handlers.items():
                signal.signal(number, handler)
    ray.data.DataContext.get_current().enable_progress_bars = False


@contextmanager
def _without_stderr() -> Iterator[None]:
    """Discard what Ray's own code writes to stderr; its errors are exceptions as well."""
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def _of_ray(error: Exception) -> SanaError:
    if isinstance(error, SanaError):
        return error
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return SanaError(f"Ray: {lines[-1] if lines else type(error).__name__}", "see `ray status`")


# --- in the cluster ----------------------------------------------------------------------------


class _Coordinator:
    """What the actors share: attempts at jobs, what they tell, and whether to stop."""

    def __init__(self) -> None:
        self.stopping = False
        self.attempts: dict[str, int] = {}
        self.texts: dict[tuple[str, str], None] = {}

    def begin(self, id: str) -> int | None:
        """Count an attempt at a job; None if the run is stopping."""
        if self.stopping:
            return None
        self.attempts[id] = self.attempts.get(id, 0) + 1
        return self.attempts[id]

    def stop(self) -> None:
        self.stopping = True

    def tell(self, kind: str, text: str) -> None:
        self.texts.setdefault((kind, text))

    def told_since(self, count: int) -> list[tuple[str, str]]:
        return list(self.texts)[count:]


@dataclass(frozen=True)
class _Setup:
    """What all actors of a run have in common."""

    cwd: str  # of the driver, from which relative paths lead
    folder: str
    shard: Shard | None
    run_name: str
    device: str
    memory: int | None
    cache: bool
    offline: bool
    threads: int | None
    together: int  # actors that share the memory of a node
    options: FileOptions


class _Reporter:
    """Report to the driver."""

    def __init__(self, coordinator: Any) -> None:
        self.coordinator = coordinator

    def info(self, text: str) -> None:
        self.coordinator.tell.remote("info", text)

    def detail(self, text: str) -> None:
        self.coordinator.tell.remote("detail", text)

    def warn(self, text: str) -> None:
        self.coordinator.tell.remote("warn", text)

    def confirm(self, question: str) -> bool:
        return True  # the driver's caller has asked for the batch

    def transfer(self) -> Any:
        return nullcontext(self)

    def begin(self, sizes: dict[str, int], done: dict[str, int]) -> None:
        self.info(f"a node fetches {len(sizes)} files, {sum(sizes.values()) / 1e6:.0f} MB")

    def advance(self, file: str, done: int) -> None:
        """Nothing: the driver shows images, not bytes."""

    def note(self, text: str) -> None:
        self.warn(text)


class _Actor:
    """Draws one job a call, and writes its file."""

    def __init__(self, setup: _Setup, coordinator: Any, alike: bool) -> None:
        import ray
        import torch

        from sana_cli.pipeline.plan import free_memory

        self.ray, self.setup, self.coordinator, self.alike = ray, setup, coordinator, alike
        with suppress(OSError):  # a node without it can still draw from text alone
            os.chdir(setup.cwd)
        if setup.threads is not None:
            torch.set_num_threads(setup.threads)
        memory = setup.memory
        if memory is None and setup.together > 1:
            memory = free_memory(setup.device) // setup.together
        self.session = Session(
            device=setup.device,
            memory=memory,
            cache=setup.cache,
            offline=setup.offline,
            reporter=_Reporter(coordinator),
        )
        self.worker = Worker(self.session, setup.options, lambda: False)
        self.files: dict[tuple[Model, Component | None, Component | None], ModelFiles] = {}
        self.inputs = Inputs()
        writer = f"{setup.run_name}-{secrets.token_hex(4)}"
        self.manifest = Manifest(setup.folder, setup.shard, writer)

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[str]]:
        jobs = [self.ray.cloudpickle.loads(job) for job in batch["job"]]
        return {"record": [json.dumps({"id": job.id} | self._record(job)) for job in jobs]}

    def _record(self, job: Job) -> Line:
        attempt = self.ray.get(self.coordinator.begin.remote(job.id))
        if attempt is None:
            return {"status": "open"}
        if attempt > MAX_ATTEMPTS:
            return _failure(SanaError("two Ray actors were lost while they were drawing it"))
        if attempt > 1:
            self.session.reporter.warn(
                f"a Ray actor was lost while it was drawing row {job.row}, seed {job.recipe.seed},"
                " which is tried once more"
            )
        try:
            files, job = self._prepare(job)
            written = self._written_before(job) if attempt > 1 else None
            return written or self._draw(job, files)
        except (DiskFull, MissingModel, NotEnoughMemory) as error:
            return _failure(error, "fatal")
        except Exception as error:  # raised, it would end the run of all actors
            return _failure(plain_error(error))

    def _prepare(self, job: Job) -> "tuple[ModelFiles, Job]":
        """Find or fetch the files of a job, and complete its recipe for this device."""
        resolution = job.resolution
        if job.components not in self.files:
            files = self.session.open(resolution.model)
            self.files[job.components] = self.session.with_components(resolution, files)
        files = self.files[job.components]
        for image in (resolution.image, resolution.mask, resolution.control):
            if image is not None and self.inputs.add(image.path, image.role) != image:
                raise SanaError(f"{image.path} is another image on this node")
        resolution = self.session.with_loras(resolution, self.inputs, files)
        recipe = resolution.recipe(
            *(files, self.session.device, job.recipe.seed, self.setup.memory)
        )
        precision = {part: getattr(recipe, part) for part in PRECISION}
        if replace(job.recipe, **precision) != recipe:
            raise SanaError(f"{recipe.model} is another model on this node")
        return files, replace(job, recipe=recipe, resolution=resolution)

    def _written_before(self, job: Job) -> Line | None:
        """The record of an image that a lost actor has written."""
        ledger = Ledger(self.setup.folder)
        line = ledger.last.get(job.id)
        if line is None or ledger.status(job.id) != "done":
            return None
        return _success(job, line | self.manifest.store.state(line["path"]))

    def _draw(self, job: Job, files: "ModelFiles") -> Line:
        recorder = Recorder(self.manifest, self.setup.options.force)
        for event in self.worker.run([job], lambda job: files, self.inputs, self.alike):
            if isinstance(event, Encoded):
                ended = recorder.save(event)
                if isinstance(ended, Saved):
                    return _success(job, ended.line)
                return _failure(ended.error)
            if isinstance(event, Failed):
                return _failure(event.error)
        raise AssertionError("a job ends as an image or a failure")


def _success(job: Job, line: Line) -> Line:
    own = ("id", "row", "seed", "seconds", "status", "time")  # which the driver writes
    facts = {name: value for name, value in line.items() if name not in own}
    return {"status": "done", "recipe": job.recipe.as_dict(), **facts}


def _failure(error: SanaError, status: str = "failed") -> Line:
    facts = {"error": error.message, "hint": error.hint, "exit_code": error.exit_code}
    return {"status": status, **facts}
