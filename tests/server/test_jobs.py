"""The queue: bounded, cancelled by who leaves, emptied by a signal; networks go when idle."""

import asyncio
import os
import signal
import sys
import threading

import httpx2
import pytest

from recipes import RECIPE
from sana_cli.server.jobs import Job, JobQueue
from sana_cli.session import DrawRequest, Session
from servers import TINY

LONG = {"steps": 1000}  # far more than will be drawn


class Asking(threading.Thread):
    """A request in a thread of its own; `answer` is set at its end."""

    def __init__(self, served, **fields):
        super().__init__(daemon=True)
        self.served, self.fields = served, TINY | fields
        self.answer: httpx2.Response | None = None
        self.start()

    def run(self):
        url = f"{self.served.url}/v1/images/generations"
        self.answer = httpx2.post(url, json=self.fields, timeout=300)

    def result(self) -> httpx2.Response:
        self.join(300)
        assert self.answer is not None
        return self.answer


@pytest.fixture
def small(serving):
    """A server with room for one request beside the one that is drawn."""
    with serving("-m", "demo", "--queue", "1") as served:
        yield served


def test_a_full_queue_says_when_to_come_back_and_a_job_can_be_cancelled(small):
    drawn = Asking(small, **LONG)
    small.until(lambda: [job["state"] for job in small.jobs()] == ["drawing"])
    waiting = Asking(small)
    small.until(lambda: len(small.jobs()) == 2)
    refused = small.draw()
    assert refused.status_code == 429
    assert int(refused.headers["Retry-After"]) >= 1
    assert refused.json()["error"]["type"] == "rate_limit_error"
    assert small.draw(dry_run=True).status_code == 200
    edit = {"data": {"prompt": "a"}, "files": {"image": b"no image"}}
    assert small.client.post("/v1/images/edits", **edit).status_code == 429  # and it is not read
    assert small.metric("sana_queue_waiting") == 1
    first, second = small.jobs()
    assert small.client.delete(f"/v1/jobs/{second['id']}").json()["cancelled"]
    assert waiting.result().status_code == 409
    assert small.client.delete(f"/v1/jobs/{first['id']}").json()["cancelled"]
    assert drawn.result().json()["error"]["code"] == "cancelled"
    assert small.client.delete(f"/v1/jobs/{first['id']}").status_code == 404
    assert small.draw().status_code == 200
    assert small.metric("sana_jobs_total") == 3


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_cancels_its_job(served, stream):
    before = served.metric("sana_jobs_total")
    with pytest.raises(httpx2.ReadTimeout):
        httpx2.post(
            f"{served.url}/v1/images/generations",
            json=TINY | LONG | {"stream": stream},
            timeout=httpx2.Timeout(30, read=2),
        )
    served.until(lambda: not served.jobs())
    assert served.metric("sana_jobs_total") == before + 1
    assert served.draw().status_code == 200


def test_idle_networks_are_released_and_come_back(serving):
    with serving("-m", "demo", "--keep-alive", "1s") as served:
        first = served.draw().json()["data"][0]["b64_json"]
        served.until(lambda: served.metric("sana_loaded_networks") == 0)
        assert served.metric("sana_loaded_bytes") == 0
        assert served.draw().json()["data"][0]["b64_json"] == first


def test_networks_stay_loaded_between_requests(served):
    served.draw()
    loads = served.metric('sana_stage_seconds_total{stage="load"}')
    for seed in (1, 2):
        assert served.draw(seed=seed).status_code == 200
    assert served.metric('sana_stage_seconds_total{stage="load"}') == loads
    assert served.metric("sana_loaded_networks") >= 2


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_a_signal_finishes_the_image_and_refuses_the_rest(serving, number, code):
    with serving("-m", "demo") as served:
        drawn = Asking(served, steps=400)  # far more than are drawn before the signal arrives
        served.until(lambda: [job["state"] for job in served.jobs()] == ["drawing"])
        waiting = Asking(served)
        served.until(lambda: len(served.jobs()) == 2)
        served.process.send_signal(number)
        assert waiting.result().status_code == 503
        assert waiting.result().json()["error"]["code"] == "stopping"
        assert drawn.result().status_code == 200
        assert served.process.wait(120) == code


def test_a_second_signal_stops_at_once(serving):
    with serving("-m", "demo") as served:
        threading.Thread(target=lambda: _lost(served), daemon=True).start()
        served.until(lambda: served.jobs())
        served.process.send_signal(signal.SIGTERM)
        served.until(lambda: "stopping after this image" in served.log.read_text())
        served.process.send_signal(signal.SIGTERM)
        assert served.process.wait(30) == 143


def _lost(served) -> None:
    with pytest.raises(httpx2.TransportError):
        httpx2.post(f"{served.url}/v1/images/generations", json=TINY | LONG, timeout=300)


def without_reader() -> int:
    reader, writer = os.pipe()
    os.close(reader)
    return writer


def on_a_full_disk() -> int:
    if not os.path.exists("/dev/full"):
        pytest.skip("needs /dev/full")
    return os.open("/dev/full", os.O_WRONLY)


@pytest.mark.parametrize("stderr", [without_reader, on_a_full_disk])
def test_a_line_that_cannot_be_written_costs_nothing_else(serving, stderr):
    lost = stderr()
    with serving("-m", "demo", stderr=lost) as served:
        os.close(lost)
        for _ in range(2):  # each warns of a word that the model does not know
            assert served.draw(prompt="a wombat").status_code == 200
        assert served.stop() == 0


class Ending(Session):
    def draw(self, *_, **__):
        raise SystemExit(1)


def test_the_thread_outlives_whatever_a_job_and_its_report_raise():
    async def statuses() -> list[int]:
        queue = JobQueue(Ending(), most_waiting=2, keep_alive=0, report=sys.exit)
        jobs = [Job(DrawRequest(None, None, [RECIPE])) for _ in range(2)]
        for job in jobs:
            queue.submit(job)
        ends = [[await job.events.get() for _ in range(2)][-1] for job in jobs]
        queue.stop()
        queue.join()
        return [end.error.status for end in ends]

    assert asyncio.run(asyncio.wait_for(statuses(), 60)) == [500, 500]


def test_a_port_that_is_taken_is_one_line(served, process):
    port = served.url.rpartition(":")[2]
    run = process("serve", "-m", "demo", "--port", port)
    assert run.returncode == 2
    assert b"Address already in use" in run.stderr


@pytest.mark.parametrize("words", [("--keep-alive", "5x"), ("-m", "nope"), ("--queue", "0")])
def test_a_wrong_call_is_refused_at_once(process, words):
    run = process("serve", *words)
    assert (run.returncode, run.stdout) == (2, b"")
