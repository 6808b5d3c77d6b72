"""A bounded queue of jobs before one thread that draws them."""

import asyncio
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable
from contextlib import closing, suppress
from dataclasses import dataclass

from sana_cli.errors import SanaError
from sana_cli.pipeline.events import Event, Failure, ImageDone
from sana_cli.server.errors import ApiError, of
from sana_cli.session import DrawRequest, Session

LONGEST_WAIT = 600  # seconds, the largest Retry-After


@dataclass(frozen=True)
class Started:
    """The job is the one that is being drawn."""


@dataclass(frozen=True)
class Ended:
    """Nothing more comes of a job: it is done, or has failed as a whole."""

    error: ApiError | None = None


JobEvent = Event | Started | Ended


class Job:
    """The images of one request, and a way to await them in the thread of an event loop."""

    def __init__(self, request: DrawRequest, previews: int = 0) -> None:
        """Made in the loop that reads `events`."""
        self.id = uuid.uuid4().hex
        self.request, self.previews = request, previews
        self.state = "queued"  # then "drawing", and "done", "failed" or "cancelled"
        self.created = time.time()
        self.events: asyncio.Queue[JobEvent] = asyncio.Queue()
        self.cancelled = threading.Event()
        self._loop = asyncio.get_running_loop()

    def emit(self, event: JobEvent) -> None:
        """Hand an event to the loop, from any thread."""
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self.events.put_nowait, event)

    def end(self, state: str, error: ApiError | None = None) -> None:
        self.state = state
        self.emit(Ended(error))

    def describe(self) -> dict[str, object]:
        recipe = self.request.recipes[0]
        return {
            "id": self.id,
            "object": "job",
            "state": self.state,
            "created": int(self.created),
            "model": recipe.model,
            "images": len(self.request.recipes),
        }


class JobQueue:
    """Draw jobs one after the other; release the networks when none came for a while."""

    def __init__(
        self,
        session: Session,
        *,
        most_waiting: int,
        keep_alive: float,
        watch: Callable[[Event], None] = lambda event: None,
        ended: Callable[[str], None] = lambda state: None,
        report: Callable[[BaseException], None] = lambda error: None,
    ) -> None:
        """`keep_alive` is in seconds. `watch` sees every event of every job, `ended` the state of
        each that is over, and `report` what was not foreseen."""
        self.session, self.most_waiting, self.keep_alive = session, most_waiting, keep_alive
        self.watch, self.ended, self.report = watch, ended, report
        self.waiting: deque[Job] = deque()
        self.current: Job | None = None
        self.stopping = False
        self.seconds = 5.0  # that a job takes, as far as is known
        self._change = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="draw", daemon=True)
        self._thread.start()

    # --- from the loop -------------------------------------------------------------------------

    def check_room(self) -> None:
        """ApiError 429 if the queue is full, 503 if the server is stopping."""
        with self._change:
            if self.stopping:
                raise stopping()
            if len(self.waiting) >= self.most_waiting:
                wait = self.seconds * (len(self.waiting) + 1)
                raise ApiError(
                    429,
                    f"{len(self.waiting)} requests are waiting, which is all there is room for",
                    code="queue_full",
                    retry_after=min(max(1, round(wait)), LONGEST_WAIT),
                )

    def submit(self, job: Job) -> None:
        """ApiError as of `check_room`."""
        with self._change:
            self.check_room()
            self.waiting.append(job)
            self._change.notify()

    def position(self, job: Job) -> int:
        """How many jobs come before this one."""
        with self._change:
            ahead = int(self.current is not None)
            return ahead + self.waiting.index(job) if job in self.waiting else 0

    def jobs(self) -> list[Job]:
        with self._change:
            return [*([self.current] if self.current else []), *self.waiting]

    def cancel(self, job: Job) -> None:
        """Take a job out of the queue, or stop it after the step under way."""
        job.cancelled.set()
        with self._change:
            if job not in self.waiting:
                return
            self.waiting.remove(job)
        job.end("cancelled", cancelled())
        self.ended("cancelled")

    def stop(self) -> None:
        """Finish the image under way, refuse the rest, and end the thread."""
        with self._change:
            self.stopping = True
            refused = list(self.waiting)
            self.waiting.clear()
            self._change.notify()
        for job in refused:
            job.end("cancelled", stopping())

    def join(self) -> None:
        self._thread.join()

    # --- the thread ----------------------------------------------------------------------------

    def _run(self) -> None:
        while (job := self._next()) is not None:
            began = time.monotonic()
            job.state = "drawing"
            job.emit(Started())
            try:
                state, error = self._draw(job)
            except SanaError as failure:
                state, error = "failed", of(failure)
            except BaseException as failure:  # whatever it is, the next job is drawn
                state = "failed"
                error = ApiError(500, "this is a bug of the server; its log has more")
                with suppress(BaseException):
                    self.report(failure)
            seconds = (time.monotonic() - began + self.seconds) / 2
            with self._change:
                self.current, self.seconds = None, seconds
            self.ended(state)
            job.end(state, error)  # last: whoever reads it no longer finds the job

    def _next(self) -> Job | None:
        """Wait for a job; None once the queue is stopping."""
        idle = time.monotonic()
        with self._change:
            while not self.waiting and not self.stopping:
                left = None
                if self.session.networks.loaded:
                    left = idle + self.keep_alive - time.monotonic()
                    if left <= 0:
                        self.session.close()
                        continue
                self._change.wait(None if left == float("inf") else left)
            if self.stopping:
                return None
            self.current = self.waiting.popleft()
            return self.current

    def _draw(self, job: Job) -> tuple[str, ApiError | None]:
        """Return the state that the job ends in, and why if not "done"."""
        left = len(job.request.recipes)
        with closing(self.session.draw(job.request, previews=job.previews)) as events:
            for event in events:
                self.watch(event)
                job.emit(event)
                if job.cancelled.is_set():
                    return "cancelled", cancelled()
                if isinstance(event, ImageDone | Failure):
                    left -= 1
                    if left and self.stopping:
                        return "failed", stopping()
        return "done", None


def cancelled() -> ApiError:
    return ApiError(409, "the request was cancelled", code="cancelled")


def stopping() -> ApiError:
    return ApiError(503, "the server is stopping", code="stopping", retry_after=10)
