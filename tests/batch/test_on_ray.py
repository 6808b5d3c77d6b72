"""A Ray cluster draws what one process would, whatever becomes of its actors and of the driver."""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import pytest

from batches import DEMO, PROMPTS, SANA, events, lines, pictures
from hub import Hub
from sana_cli.batch import on_ray
from sana_cli.batch.on_ray import DriverSession
from sana_cli.errors import SanaError
from sana_cli.weights.catalogue import known_models

ON_RAY = ("--engine", "ray", "--workers", "2")


def test_without_ray_one_line_tells_how_to_install_it(sana, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    run = sana("batch", "jobs.txt", *DEMO, *ON_RAY)
    assert (run.code, run.out) == (2, "")
    error, hint = run.err.splitlines()
    assert "--engine ray needs Ray" in error
    assert hint == 'hint: install it: pip install "sana-cli[ray]"'


def test_ray_is_not_imported_for_anything_else(sana, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    assert sana("batch", "jobs.txt", *DEMO, "--check").code == 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--address", "auto"), "no effect without --engine ray"),
        ((*ON_RAY, "--gpus", "2"), "--gpus is for this machine"),
        ((*ON_RAY, "--device", "mps"), "cannot be used on Ray"),
        (("--engine", "ray", "--workers", "0"), "is not at least 1"),
        ((*ON_RAY, "--server", "http://127.0.0.1:1"), "no effect with --server"),
    ],
)
def test_a_wrong_choice_is_refused(sana, words, message):
    run = sana("batch", "jobs.txt", *DEMO, *words)
    assert (run.code, run.out) == (2, "") and message in run.err


def test_a_driver_fetches_no_weights_of_a_released_model():
    with DriverSession(device="cpu", offline=True) as session:
        files = session.open(known_models()["sana-0.6b-512"])
    assert (files.parts, files.side) == ({}, 512)


class NoCluster:
    """What `OnRay` asks of Ray to divide a cluster of these nodes, which is not there."""

    def __init__(self, *resources: dict[str, float]) -> None:
        self.resources = resources
        affinity = SimpleNamespace(NodeAffinitySchedulingStrategy=lambda *_, **__: None)
        self.util = SimpleNamespace(scheduling_strategies=affinity)

    def nodes(self) -> list[dict]:
        return [{"Alive": True, "Resources": one} for one in self.resources]

    def get_runtime_context(self) -> SimpleNamespace:
        return SimpleNamespace(get_node_id=lambda: "head")

    def remote(self, **_):
        return lambda kind: SimpleNamespace(remote=lambda: None)


@pytest.fixture
def divided(monkeypatch):
    """Divide a cluster among actors on CPUs: how many there are, the cores of each as asked of Ray
    and as told to torch, and how many share a node."""

    def divide(workers: int | None, *resources: dict[str, float]) -> tuple[int, int, int, int]:
        monkeypatch.setattr(sys, "stdout", sys.stdout)  # restored afterwards
        monkeypatch.setattr(on_ray, "import_ray", lambda: NoCluster(*resources))
        monkeypatch.setattr(on_ray, "_connect", lambda *_: None)
        settings = {"memory": None, "cache": True, "offline": False, "reporter": Mock()}
        manifest = SimpleNamespace(store=SimpleNamespace(address="out"), shard=None)
        session = SimpleNamespace(**settings)
        work = SimpleNamespace(session=session, manifest=manifest, options=None)
        engine = on_ray.OnRay(work, on_ray.RayOptions(None, workers, "cpu"))
        setup = engine.setup
        return engine.workers, engine.needs["num_cpus"], setup.threads, setup.together

    return divide


def test_a_head_without_cpus_takes_no_part(divided):
    nodes = ({"memory": 1.0}, {"CPU": 0.0}, *[{"CPU": 32.0}] * 4)
    assert divided(None, *nodes) == (4, 32, 32, 1)
    assert divided(16, *nodes) == (16, 8, 8, 4)
    with pytest.raises(SanaError, match="no node has a CPU core"):
        divided(None, *nodes[:2])


# --- on a cluster ------------------------------------------------------------------------------

cluster = pytest.mark.exhaustive


@pytest.fixture
def many(sana, here) -> dict[str, bytes]:
    """A file of eight jobs, many.txt, and the images of one process."""
    pytest.importorskip("ray")
    prompts = [*PROMPTS, "a pink heart", "a grey cross", "a red star", "a blue heart", "a ring"]
    Path("many.txt").write_text("\n".join(prompts))
    assert sana("batch", "many.txt", *DEMO, "-o", "one", "-q").code == 0
    return pictures("one")


def drawing_actors_of(pid: int) -> list[int]:
    """The processes of actors with a job, below a driver that started its own cluster."""
    parents, actors = {}, []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parents[int(folder.name)] = int(
                (folder / "stat").read_text().rpartition(")")[2].split()[1]
            )
            title = (folder / "cmdline").read_bytes()  # which names the method that runs
            if title.startswith(b"ray::MapWorker") and b".submit" in title:
                actors.append(int(folder.name))
        except OSError:  # it has ended
            continue

    def is_below(child: int) -> bool:
        while child > 1 and child != pid:
            child = parents.get(child, 0)
        return child == pid

    return [actor for actor in actors if is_below(actor)]


def cpu_seconds(pid: int) -> float:
    """What a process has used; 0 once it has ended."""
    try:
        user, system = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:13]
    except OSError:
        return 0.0
    return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")


def kill_a_drawing_actor(process: subprocess.Popen, after: float = 0.5) -> None:
    """Kill the first actor that has drawn for so many seconds of its CPU."""
    began: dict[int, float] = {}
    while process.poll() is None:
        for actor in drawing_actors_of(process.pid):
            if cpu_seconds(actor) > began.setdefault(actor, cpu_seconds(actor)) + after:
                os.kill(actor, 9)
                return
        time.sleep(0.01)
    raise AssertionError(process.stderr.read())


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def until_an_image(process: subprocess.Popen) -> list[bytes]:
    head = [process.stdout.readline()]
    while b'"event": "image"' not in head[-1]:
        assert head[-1], process.stderr.read()
        head.append(process.stdout.readline())
    return head


@cluster
def test_the_files_events_and_status_are_those_of_one_process(sana, many):
    run = subprocess.run(
        [SANA, "batch", "many.txt", *DEMO, *ON_RAY, "-o", "ray", "--json"],
        **{"capture_output": True, "text": True, "timeout": 300},
    )
    assert run.returncode == 0, run.stderr
    assert "Traceback" not in run.stderr
    found = events(run.stdout)
    assert [event["event"] for event in found] == ["plan", *["image"] * 8, "summary"]
    assert (found[-1]["drawn"], found[-1]["left"]) == (8, 0)
    assert pictures("ray") == many
    facts = ("id", "row", "seed", "sha256", "path", "bytes")
    one, ray = ({tuple(d[k] for k in facts) for d in lines(at, "done")} for at in ("one", "ray"))
    assert one == ray
    assert [path.name for path in Path("ray").glob("*.jsonl")] == ["manifest.jsonl"]
    assert sana("batch", "status", "ray").out == "8 done\n"
    assert sana("batch", "many.txt", *DEMO, "-o", "ray").out == ""  # nothing is left for anyone


@cluster
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs Linux's /proc")
def test_an_actor_that_is_killed_costs_the_image_under_way(sana, many):
    command = ["batch", "many.txt", *DEMO, "--steps", "100"]  # seconds for each image
    assert sana(*command, "-o", "slow", "-q").code == 0
    command = [SANA, *command, *ON_RAY, "-o", "ray", "--json"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, **pipes) as process:
        kill_a_drawing_actor(process)
        out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err.decode()
    assert err.count(b"is tried once more") == 1
    found = events(out.decode())
    assert sorted(event["row"] for event in found if event["event"] == "image") == [*range(1, 9)]
    assert pictures("ray") == pictures("slow")


@cluster
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs Linux's /proc")
def test_a_job_that_costs_two_actors_is_a_failure_and_not_the_end(many):
    rows = [{"prompt": prompt} for prompt in PROMPTS]
    rows[1]["steps"] = 1000
    Path("jobs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    one_actor = (*ON_RAY, "--workers", "1")
    command = [SANA, "batch", "jobs.jsonl", *DEMO, *one_actor, "-o", "ray", "--json"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, **pipes) as process:
        kill_a_drawing_actor(process, after=4)  # of which the short jobs take one or two
        while b"is tried once more" not in process.stderr.readline():
            assert process.poll() is None
        kill_a_drawing_actor(process, after=4)
        out, err = process.communicate(timeout=300)
    assert process.returncode == 3, err.decode()
    assert b"is tried once more" not in err
    ends = {event["row"]: event for event in events(out.decode()) if "row" in event}
    found = {row: event["event"] for row, event in ends.items()}
    assert found == {1: "image", 2: "error", 3: "image"}
    assert "two Ray actors were lost while they were drawing it" in ends[2]["message"]
    assert [line["row"] for line in lines("ray", "failed")] == [2]


@cluster
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs Linux's /proc")
def test_a_driver_that_is_killed_and_run_again_draws_nothing_twice(many):
    command = [SANA, "batch", "many.txt", *DEMO, *ON_RAY, "-o", "ray", "--json"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, **pipes) as process:
        until_an_image(process)
        process.kill()
    before = {path.name: path.stat().st_mtime_ns for path in Path("ray").glob("*.png")}
    assert before
    deadline = time.monotonic() + 120
    while True:  # until the actors have noticed, the folder is in use
        run = subprocess.run(command, capture_output=True, text=True, timeout=300)
        if run.returncode != 1 or "is in use" not in run.stderr:
            break
        assert time.monotonic() < deadline
        time.sleep(1)
    assert run.returncode == 0, run.stderr
    assert pictures("ray") == many
    after = {path.name: path.stat().st_mtime_ns for path in Path("ray").glob("*.png")}
    assert after.items() >= before.items()


@cluster
def test_asked_to_stop_it_ends_after_the_images_under_way(sana, many):
    command = [SANA, "batch", "many.txt", *DEMO, *ON_RAY, "-o", "ray", "--json"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, **pipes) as process:
        head = until_an_image(process)
        process.send_signal(2)
        out, err = process.communicate(timeout=300)
    assert process.returncode == 130, err.decode()
    last = events((b"".join(head) + out).decode())[-1]
    assert (last["event"], last["drawn"] + last["left"]) == ("summary", 8)
    assert last["drawn"] == len(pictures("ray")) == len(lines("ray", "done"))
    run = sana("batch", "many.txt", *DEMO, "-o", "ray")
    assert len(run.out.split()) == last["left"] and pictures("ray") == many


@cluster
def test_failed_jobs_are_records_and_not_the_end(many, broken):
    rows = [{"prompt": "a fox", "model": str(broken), "instruction": False}]
    rows.append({"prompt": PROMPTS[0], "model": "demo"})
    Path("jobs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    command = [SANA, "batch", "jobs.jsonl", "--steps", "1", *ON_RAY, "--json"]
    run = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert run.returncode == 3, run.stderr
    (error,) = (event for event in events(run.stdout) if event["event"] == "error")
    assert (error["row"], error["exit_code"]) == (1, 7) and "NaN" in error["message"]


@cluster
def test_a_node_without_the_model_fetches_it_once(tiny_model, many, tmp_path):
    """Two actors on a node of a cluster that was started before, with a cache of its own."""
    hub = Hub()
    hub.push("someone/finetune", tiny_model)
    shared = {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "NO_PROXY": "127.0.0.1"}
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "7" * 64}
    places = {
        at: {"HF_HOME": str(tmp_path / at), "SANA_DATA_DIR": str(tmp_path / at / "data")}
        for at in ("node", "driver")
    }
    homes = {at: os.environ | shared | token | place for at, place in places.items()}
    ray = shutil.which("ray", path=str(Path(SANA).parent))
    start = [ray, "start", "--head", "--num-cpus=2", f"--port={free_port()}", "--block"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    started = subprocess.Popen(start, env=homes["node"], start_new_session=True, **pipes)
    try:
        address = next(line for line in started.stdout if "--address='" in line)
        words = ("-m", "someone/finetune", "--steps", "1", "--no-instruction")
        address = address.split("--address='")[1].split("'")[0]
        command = [SANA, "batch", "many.txt", *words, *ON_RAY, "--address", address, "-o", "ray"]
        stranger = homes["driver"] | {"RAY_AUTH_MODE": "disabled"}
        options = {"capture_output": True, "text": True, "timeout": 300}
        run = subprocess.run(command, env=stranger, **options)
        assert run.returncode == 1 and "wants a token" in run.stderr
        run = subprocess.run(command, env=homes["driver"], **options)
        assert run.returncode == 0, run.stderr
        assert len(run.stdout.split()) == 8
        weights = "transformer/diffusion_pytorch_model.safetensors"
        fetched = [name for method, name, _ in hub.requests if (method, name) == ("GET", weights)]
        assert len(fetched) == 2  # by the driver, as nothing else tells what the model is, and once
        assert list((tmp_path / "node").rglob("diffusion_pytorch_model.safetensors"))
    finally:
        started.terminate()  # and with it all that it started, and nothing else
        started.communicate(timeout=60)
        hub.close()
