"""The JSON Lines that `sana batch --json` writes to stdout, each an object with an `event`.

plan       jobs, done (in an earlier run), failed (in an earlier run), todo, folder, shard, device,
           expected_time (of what is to do, see `Expected` in `bench.forecast`; null if unknown),
           models; for a pipe, one per round of rows
image      id, row, path, seed, width, height, model, sha256, bytes, seconds (since the previous
           image), peak_bytes (so far), recipe
error      id, row, column (or null), message, hint (or null), exit_code
sheet      path, images: the contact sheet of --sheet
heartbeat  stage, done, total: after ten seconds without another event
summary    drawn, done, failed, left, seconds, exit_code: the last line, unless the run
           was killed or a usage error ended it before it began
"""

import json
import sys
import threading
import time
from types import TracebackType
from typing import Any

HEARTBEAT = 10.0  # seconds


class EventWriter:
    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.last_output = time.monotonic()
        self.state: dict[str, Any] = {"stage": "read", "done": 0, "total": 0}
        self.ended = threading.Event()

    def __enter__(self) -> "EventWriter":
        threading.Thread(target=self._beat, daemon=True).start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.ended.set()

    def emit(self, event: str, **facts: Any) -> None:
        with self.lock:
            self._write({"event": event, **facts})

    def stage(self, name: str, done: int = 0, total: int = 0) -> None:
        self.state = {"stage": name, "done": done, "total": total}

    def _write(self, line: dict[str, Any]) -> None:
        sys.stdout.write(json.dumps(line) + "\n")
        sys.stdout.flush()
        self.last_output = time.monotonic()

    def _beat(self) -> None:
        while not self.ended.wait(max(0.01, self.last_output + HEARTBEAT - time.monotonic())):
            with self.lock:
                if not self.ended.is_set() and time.monotonic() - self.last_output >= HEARTBEAT:
                    try:
                        self._write({"event": "heartbeat", **self.state})
                    except OSError:  # the reader has closed the pipe; the next event raises
                        return
