"""A batch in an object store: every image once and whole, whatever is killed in between."""

import json
import os
import signal
import subprocess
import sys
import time
import uuid
from datetime import UTC, datetime, timedelta
from pathlib import Path

import fsspec
import pytest

from batches import DEMO, PROMPTS, events, pictures
from sana_cli.batch import manifest, object_store
from sana_cli.batch.manifest import Ledger, Manifest
from sana_cli.batch.shards import Shard

# --- fsspec's store in this process ------------------------------------------------------------


@pytest.fixture
def url() -> str:
    return f"memory://{uuid.uuid4().hex}/out"


def objects(url: str) -> dict[str, bytes]:
    """All objects but the manifests, by name."""
    options = {"skip_instance_cache": True, "use_listings_cache": False}
    files, root = fsspec.core.url_to_fs(url, **options)
    names = {path: path.removeprefix(f"{root}/") for path in files.find(root)}
    return {n: files.cat_file(p) for p, n in names.items() if not n.startswith("manifest")}


def test_a_batch_in_a_store_has_the_files_of_one_on_a_disk(sana, url):
    assert sana("batch", "jobs.txt", *DEMO).code == 0
    run = sana("batch", "jobs.txt", *DEMO, "-o", f"{url}/{{seed}}/{{slug}}-{{seed}}.png", "--json")
    assert run.code == 0, run.err
    assert "has no locks" in run.err
    found = [event for event in events(run.out) if event["event"] == "image"]
    assert {Path(event["path"]).name for event in found} == set(pictures("jobs-images"))
    assert all(event["path"].startswith(f"{url}/") for event in found)
    stored = {name.split("/")[1]: data for name, data in objects(url).items()}
    assert stored == pictures("jobs-images")


def test_run_again_it_draws_what_is_missing_or_changed(sana, url):
    first = sana("batch", "jobs.txt", *DEMO, "-o", url).out.split()
    assert sana("batch", "jobs.txt", *DEMO, "-o", url).out == ""
    files, _ = fsspec.core.url_to_fs(url)
    kept = objects(url)
    files.rm(first[0])
    files.pipe_file(first[1], b"edited")
    again = sana("batch", "jobs.txt", *DEMO, "-o", url)
    assert again.out.split() == [first[0], f"{first[1].removesuffix('.png')}-2.png"]
    assert files.cat_file(first[1]) == b"edited"
    assert objects(url)[first[0].rpartition("/")[2]] == kept[first[0].rpartition("/")[2]]
    status = json.loads(sana("batch", "status", url, "--json").out)
    assert (status["done"], status["left"], len(status["runs"])) == (3, 0, 1)


def test_a_long_manifest_is_several_objects(url, monkeypatch):
    monkeypatch.setattr(object_store, "SEGMENT", 3)
    for run in range(2):
        with Manifest(url) as manifest:
            manifest.begin(jobs=5, todo=5)
            for number in range(5):
                manifest.append(status="failed", id=f"{run}{number}", error="x")
    ledger = Ledger(url)
    assert len(ledger.store._listed()) == 4  # two runs of six lines
    assert [ledger.status(f"{run}{i}") for run in range(2) for i in range(5)] == ["failed"] * 10
    assert [len(lines) for lines in ledger.runs.values()] == [6]  # of the last run


def test_shards_share_a_store(url):
    for number in (1, 2):
        with Manifest(url, Shard(number, 2)) as manifest:
            manifest.begin(jobs=1, todo=0, shard=f"{number}/2")
    assert set(Ledger(url).runs) == {"manifest.1-of-2.jsonl", "manifest.2-of-2.jsonl"}


@pytest.mark.parametrize("hours", [0, -1, 1])
@pytest.mark.parametrize("is_url", [True, False], ids=["store", "disk"])
def test_a_later_run_counts_for_more_than_a_lost_actor_whatever_their_clocks_say(
    url, here, monkeypatch, is_url, hours
):
    """`hours` is by how much the clock of the actor, whose manifest was left, was ahead."""
    place, clock = (url if is_url else here), datetime.now(UTC)
    monkeypatch.setattr(manifest, "clock", lambda: clock)
    clock += timedelta(hours=hours)
    with Manifest(place, writer="f0f0f0f0-f0f0f0f0") as actor:
        actor.append(status="failed", id="a", error="lost")
        actor.append(status="failed", id="b", error="lost")
    clock -= timedelta(hours=hours)
    with Manifest(place) as later:
        later.append(status="again", id="a")
        later.append(status="failed", id="b", error="later")
    found = Ledger(place)
    assert (found.status("a"), found.last["b"]["error"]) == ("open", "later")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("-o", "nonsense://bucket/out"), "Protocol not known"),
        (("-o", "memory://x", "--sheet", "sheet.png"), "--sheet needs the images on a disk"),
    ],
)
def test_a_url_that_cannot_be_used_is_refused_before_a_model_is_opened(sana, words, message):
    run = sana("batch", "jobs.txt", *DEMO, *words)
    assert (run.code, run.out) == (2, "") and message in run.err
    assert "model" not in run.err


def test_a_client_that_is_not_installed_is_named_with_its_install(sana, monkeypatch):
    monkeypatch.setitem(sys.modules, "s3fs", None)
    run = sana("batch", "jobs.txt", *DEMO, "-o", "s3://bucket/out")
    assert run.code == 2
    assert run.err.splitlines()[-1] == 'hint: install it: pip install "sana-cli[s3]"'


# --- a server that speaks S3 -------------------------------------------------------------------

DYING = """
import os, signal, sys
from sana_cli.app import main
from sana_cli.batch.object_store import ObjectStore

left = [int(sys.argv.pop(1))]

def dying(real):
    def call(*args, **kwargs):
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*args, **kwargs)
    return call

ObjectStore.put, ObjectStore.write = dying(ObjectStore.put), dying(ObjectStore.write)
main()
"""


@pytest.fixture(scope="module")
def bucket(tmp_path_factory):
    """The URL of a bucket of moto's server, a process of its own on loopback."""
    pytest.importorskip("s3fs")
    pytest.importorskip("moto")
    from test_on_ray import free_port

    port = free_port()
    place = f"http://127.0.0.1:{port}"
    environment = {
        "AWS_ENDPOINT_URL": place,
        "AWS_ACCESS_KEY_ID": "x",
        "AWS_SECRET_ACCESS_KEY": "x",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    server = str(Path(sys.executable).with_name("moto_server"))
    log = (tmp_path_factory.mktemp("moto") / "log").open("wb")
    with pytest.MonkeyPatch.context() as patch, log:
        for name, value in environment.items():
            patch.setenv(name, value)
        words = [server, "-H", "127.0.0.1", "-p", str(port)]
        with subprocess.Popen(words, stdout=log, stderr=subprocess.STDOUT) as process:
            files = fsspec.filesystem("s3", skip_instance_cache=True)
            deadline = time.monotonic() + 60
            while True:
                try:
                    files.mkdir("bucket")
                    break
                except Exception:
                    assert time.monotonic() < deadline and process.poll() is None
                    time.sleep(0.2)
            yield "s3://bucket"
            process.terminate()


@pytest.mark.exhaustive
def test_killed_at_any_change_it_makes_it_finishes_when_run_again(sana, bucket):
    Path("two.txt").write_text("\n".join(PROMPTS[:2]))
    assert sana("batch", "two.txt", *DEMO, "-q").code == 0
    expected = pictures("two-images")
    for place in range(1, 20):
        url = f"{bucket}/killed-{place}"
        words = ("batch", "two.txt", *DEMO, "-q", "-o", url)
        dying = [sys.executable, "-c", DYING, str(place), *words]
        code = subprocess.run(dying, capture_output=True, timeout=120).returncode
        before = objects(url)
        assert before.items() <= expected.items()
        assert sana(*words).code == 0
        assert objects(url) == expected
        ledger = Ledger(url)
        assert sorted(line["path"] for line in ledger.last.values()) == sorted(expected)
        if code == 0:
            break
        assert code == -signal.SIGKILL
    assert place == 8  # one after the run's line, and three of each job


@pytest.mark.exhaustive
def test_no_object_of_someone_else_is_replaced(sana, bucket):
    url = f"{bucket}/theirs"
    Path("one.txt").write_text(PROMPTS[0])
    with Manifest(url) as manifest:  # which has listed the objects before there was one
        files = manifest.store.files
        files.pipe_file("bucket/theirs/a.png", b"mine")
        assert manifest.store.write("a.png", b"other", False, "") == "a-2.png"
        assert manifest.store.write("a.png", b"other", True, "") == "a.png"
        assert files.cat_file("bucket/theirs/a.png") == b"other"


@pytest.mark.exhaustive
def test_a_bucket_that_is_not_there_is_one_line(sana, bucket):
    run = sana("batch", "jobs.txt", *DEMO, "-o", "s3://nowhere/out")
    assert (run.code, run.out) == (1, "") and "Traceback" not in run.err
    assert "error: s3://nowhere/out/" in run.err and "bucket does not exist" in run.err


@pytest.mark.exhaustive
def test_a_ray_cluster_writes_into_a_store(sana, bucket):
    pytest.importorskip("ray")
    from test_on_ray import ON_RAY

    assert sana("batch", "jobs.txt", *DEMO, "-q").code == 0
    command = ["batch", "jobs.txt", *DEMO, *ON_RAY, "-o", f"{bucket}/ray"]
    run = subprocess.run(
        [sys.executable, "-m", "sana_cli", *command],
        **{"capture_output": True, "text": True, "timeout": 300},
        env=dict(os.environ),
    )
    assert run.returncode == 0, run.stderr
    assert objects(f"{bucket}/ray") == pictures("jobs-images")
    manifests = [path for path in Ledger(f"{bucket}/ray").store._listed() if "jsonl" in path]
    assert len(manifests) == 1
