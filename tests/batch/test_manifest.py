"""What the folder of a batch remembers, whatever happened to the process or to the file."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from sana_cli.batch.disk_store import DiskStore, repair
from sana_cli.batch.lines import read_lines
from sana_cli.batch.manifest import Ledger, Manifest
from sana_cli.batch.shards import Shard
from sana_cli.errors import SanaError

LINES = st.lists(
    st.fixed_dictionaries(
        {
            "status": st.just("failed"),
            "id": st.text("0123456789abcdef", min_size=16, max_size=16),
            "error": st.text(max_size=20),
        }
    ),
    max_size=5,
)


def as_bytes(lines: list[dict]) -> bytes:
    return b"".join(json.dumps(line).encode() + b"\n" for line in lines)


@pytest.fixture
def picture(tmp_path):
    """Write a file into the folder as a batch does."""

    def write(manifest: Manifest, id: str, name: str, data: bytes = b"x" * 99) -> Path:
        import hashlib

        facts = {"id": id, "sha256": hashlib.sha256(data).hexdigest()}
        manifest.append(status="writing", path=name, **facts)
        (manifest.folder / name).write_bytes(data)
        manifest.done(name, **facts)
        return manifest.folder / name

    return write


@given(LINES, LINES, st.data())
def test_a_manifest_cut_anywhere_is_repaired_and_goes_on(tmp_path_factory, before, after, data):
    """Lines that were whole are kept, the torn one is gone, new ones are not glued to it."""
    whole = as_bytes(before)
    cut = data.draw(st.integers(0, len(whole)))
    path = tmp_path_factory.mktemp("cut") / "manifest.jsonl"
    path.write_bytes(whole[:cut])
    repair(path)
    kept = [line for i, line in enumerate(before) if len(as_bytes(before[: i + 1])) - 1 <= cut]
    assert read_lines(path.read_bytes()) == (kept, 0)
    with path.open("ab") as file:
        file.write(as_bytes(after))
    assert read_lines(path.read_bytes()) == (kept + after, 0)


@given(LINES, st.binary(max_size=60))
def test_what_a_power_cut_may_leave_at_the_end_is_taken_off(tmp_path_factory, lines, rest):
    path = tmp_path_factory.mktemp("rest") / "manifest.jsonl"
    path.write_bytes(as_bytes(lines) + rest.replace(b"\n", b"") + b"\0")
    repair(path)
    assert path.read_bytes() == as_bytes(lines)


@given(st.binary(max_size=300))
def test_no_bytes_are_too_strange_for_a_manifest(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("strange")
    (folder / "manifest.jsonl").write_bytes(data)
    Ledger(folder)
    with Manifest(folder) as manifest:
        manifest.begin(jobs=1)
        assert len(manifest.runs) <= 1
    assert list(Ledger(folder).runs.values())[0][0]["jobs"] == 1


VALUES = st.none() | st.booleans() | st.integers() | st.text(max_size=5) | st.lists(st.integers())
FACTS = ("id", "path", "sha256", "bytes", "mtime_ns", "time", "todo", "shard", "pid")
STRANGE = st.fixed_dictionaries(
    {"status": st.sampled_from(["run", "writing", "done", "failed", "again"])},
    optional=dict.fromkeys(FACTS, VALUES),
)


@example([{"status": "writing", "id": "", "shard": [0], "path": "", "sha256": ""}])
@example([{"status": "done", "id": "a", "path": "\0", "sha256": ""}])
@example([{"status": "run", "todo": True, "shard": "0/9"}])
@example([{"status": "run", "shard": []}])
@given(st.lists(STRANGE, max_size=4))
def test_no_line_is_too_strange_for_a_manifest(sana, tmp_path_factory, lines):
    folder = tmp_path_factory.mktemp("strange")
    (folder / "manifest.jsonl").write_bytes(as_bytes(lines))
    with Manifest(folder) as manifest:
        for line in lines:
            if isinstance(line.get("id"), str):
                assert manifest.status(line["id"]) in ("done", "open", "failed")
                manifest.place(line["id"], Path("fox.png"), False)
    run = sana("batch", "status", str(folder))
    assert run.code in (0, 2, 3) and "Traceback" not in run.err, run.err


def test_a_damaged_line_in_the_middle_costs_that_line_only(tmp_path):
    good = [{"status": "failed", "id": "a" * 16}, {"status": "failed", "id": "b" * 16}]
    lines = [
        as_bytes(good[:1]),
        b'{"status": "do\n',
        b"\0\0\0\n",
        b'{"id": 3}\n',
        as_bytes(good[1:]),
    ]
    (tmp_path / "manifest.jsonl").write_bytes(b"".join(lines))
    ledger = Ledger(tmp_path)
    assert (set(ledger.last), ledger.damaged) == ({"a" * 16, "b" * 16}, 3)


def test_a_picture_is_done_while_it_is_what_was_written(tmp_path, picture):
    with Manifest(tmp_path) as manifest:
        path = picture(manifest, "a1", "fox.png")
        assert manifest.status("a1") == "done"
        assert manifest.status("b2") == "open"
        os.utime(path, (1, 1))  # as a copy without times: settled by the hash
        assert manifest.status("a1") == "done"
        path.write_bytes(b"y" * 99)
        assert manifest.status("a1") == "open"
        path.write_bytes(b"x" * 98)
        assert manifest.status("a1") == "open"
        path.unlink()
        assert manifest.status("a1") == "open"


def test_a_picture_that_appeared_before_its_line_is_adopted(tmp_path, picture):
    with Manifest(tmp_path) as manifest:
        picture(manifest, "a1", "fox.png")
    lines = (tmp_path / "manifest.jsonl").read_bytes().splitlines(keepends=True)
    (tmp_path / "manifest.jsonl").write_bytes(b"".join(lines[:-1]))
    with Manifest(tmp_path) as manifest:
        assert manifest.status("a1") == "done"
        manifest.adopt("a1")
    assert Ledger(tmp_path).last["a1"]["status"] == "done"
    assert Ledger(tmp_path).last["a1"]["bytes"] == 99


def test_only_the_same_job_replaces_a_file(tmp_path, picture):
    with Manifest(tmp_path) as manifest:
        path = picture(manifest, "a1", "fox.png")
        assert manifest.place("a1", Path("fox.png"), False) == (Path("fox.png"), True)
        assert manifest.place("b2", Path("fox.png"), False) == (Path("fox-2.png"), False)
        assert manifest.place("b2", Path("fox.png"), True) == (Path("fox.png"), True)
        path.write_bytes(b"edited by hand")
        assert manifest.place("a1", Path("fox.png"), False) == (Path("fox-2.png"), False)


def test_manifests_of_shards_are_read_as_one(tmp_path, picture):
    for number in (1, 2):
        with Manifest(tmp_path, Shard(number, 2)) as manifest:
            picture(manifest, f"a{number}", f"{number}.png")
    with Manifest(tmp_path) as manifest:
        assert [manifest.status(id) for id in ("a1", "a2", "a3")] == ["done", "done", "open"]


@pytest.mark.parametrize(
    ("mine", "others", "refused"),
    [
        (None, None, True),
        (Shard(1, 3), Shard(1, 3), True),
        (Shard(1, 3), Shard(2, 3), False),
        (Shard(1, 3), Shard(1, 2), True),
        (None, Shard(1, 2), True),
        (Shard(1, 2), None, True),
    ],
    ids=str,
)
def test_processes_share_a_folder_only_as_shards_of_one_division(tmp_path, mine, others, refused):
    code = f"""
import sys, pathlib
from sana_cli.batch.manifest import Manifest
from sana_cli.batch.shards import Shard
with Manifest(pathlib.Path(sys.argv[1]), {others!r}) as manifest:
    manifest.begin(jobs=1)
    print("held", flush=True)
    sys.stdin.read()
"""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], **pipes) as other:
        assert other.stdout.readline() == "held\n"
        if refused:
            with pytest.raises(SanaError, match=f"in use by process {other.pid} on"):
                Manifest(tmp_path, mine)
        else:
            with Manifest(tmp_path, mine):
                pass
        other.kill()
    with Manifest(tmp_path, mine):  # a lock does not outlive its process
        pass


@pytest.mark.skipif(sys.platform == "win32", reason="needs shared locks")
def test_two_that_look_at_once_whether_a_batch_runs_do_not_see_each_other(tmp_path):
    """`status` looks, and so do shards that start together where another division has ended."""
    import fcntl

    with Manifest(tmp_path):
        pass
    with (tmp_path / ".sana-manifest.lock").open("rb+") as look:
        fcntl.flock(look, fcntl.LOCK_SH)
        assert not DiskStore(tmp_path).is_held("manifest")
        with Manifest(tmp_path, Shard(1, 2)):
            pass


def test_temporary_files_of_the_dead_are_swept_and_those_of_others_are_not(tmp_path):
    names = [".sana-manifest-a.partial", ".sana-manifest.1-of-2-b.partial", ".sana-c.partial"]
    for name in names:
        (tmp_path / name).write_bytes(b"")
    with Manifest(tmp_path, Shard(2, 2)) as manifest:
        manifest.sweep([Path()])
    assert sorted(path.name for path in tmp_path.glob("*.partial")) == sorted(names)
    with Manifest(tmp_path) as manifest:
        manifest.sweep([Path()])
    assert [path.name for path in tmp_path.glob("*.partial")] == [".sana-c.partial"]


def test_a_thousand_jobs_are_looked_up_with_one_file_opened(tmp_path, picture, monkeypatch):
    """No picture is read again: its size and time of change settle that it is whole."""
    with Manifest(tmp_path) as manifest:
        picture(manifest, "a1", "fox.png")
        line = manifest.last["a1"]
        manifest.append_all({**line, "id": f"{i:016x}"} for i in range(1000))
    opened = []
    real = io.open
    monkeypatch.setattr(
        io, "open", lambda file, *a, **b: opened.append(file) or real(file, *a, **b)
    )
    ledger = Ledger(tmp_path)
    assert all(ledger.status(f"{i:016x}") == "done" for i in range(1000))
    assert opened == [tmp_path / "manifest.jsonl"]
