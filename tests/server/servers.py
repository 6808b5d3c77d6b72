"""A running `sana serve`, and what its tests ask of it."""

import signal
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

import httpx2

PROMPT = "a red circle on a blue background"
TINY = {"prompt": PROMPT, "size": "256x256", "steps": 1, "seed": 7}


@dataclass
class Served:
    """A running server; `client` asks it."""

    process: subprocess.Popen[str]
    url: str
    log: Path
    client: httpx2.Client

    @property
    def address(self) -> tuple[str, int]:
        host, _, port = self.url.removeprefix("http://").rpartition(":")
        return host, int(port)

    def draw(self, **fields) -> httpx2.Response:
        return self.client.post("/v1/images/generations", json=TINY | fields)

    def jobs(self) -> list[dict]:
        return self.client.get("/v1/jobs").json()["data"]

    def until(self, condition) -> None:
        """Wait for something that is bound to come; the test's own time limit ends it."""
        end = time.monotonic() + 120
        while not condition():
            assert time.monotonic() < end, self.log.read_text()
            time.sleep(0.05)

    def metric(self, name: str) -> float:
        """The sum of a metric over its labels."""
        lines = self.client.get("/metrics").text.splitlines()
        found = [line for line in lines if line.startswith((f"{name} ", f"{name}{{"))]
        return sum(float(line.rpartition(" ")[2]) for line in found)

    def stop(self, number: int = signal.SIGTERM) -> int:
        self.process.send_signal(number)
        return self.process.wait(120)
