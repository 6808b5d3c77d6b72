"""What someone sees of `sana batch`: at a shell, in scripts, and after a power cut."""

import errno
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from terminal import at_terminal

SANA = str(Path(sys.executable).with_name("sana"))
KILLED = 256 - signal.SIGKILL  # as forks.py tells it
ANY_SIZE = ("-m", "demo", "--steps", "1")
DEMO = (*ANY_SIZE, "-r", "256")
PROMPTS = ("a red circle on white", "a green star on black", "a blue ring on grey")


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch) -> Path:
    """A working folder with a file of three prompts."""
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    (folder / "jobs.txt").write_text("\n".join(PROMPTS))
    return folder


def pictures(folder: str | Path) -> dict[str, bytes]:
    """All files but the manifest and its lock, by name."""
    found = (path for path in Path(folder).rglob("*") if path.is_file())
    names = {path.relative_to(folder).as_posix(): path for path in found}
    return {
        name: path.read_bytes()
        for name, path in names.items()
        if not re.fullmatch(r"manifest.*\.jsonl|\.sana-manifest.*\.lock", name)
    }


def lines(folder: str | Path, status: str | None = None) -> list[dict]:
    found = []
    for path in sorted(Path(folder).glob("manifest*.jsonl")):
        found += [json.loads(line) for line in path.read_text().splitlines()]
    return [line for line in found if status in (None, line["status"])]


def events(out: str, heartbeats: bool = False) -> list[dict]:
    found = [json.loads(line) for line in out.splitlines()]
    return [event for event in found if heartbeats or event["event"] != "heartbeat"]


# --- rows to pictures --------------------------------------------------------------------------


def test_prompts_become_pictures_and_their_paths_are_printed(sana):
    run = sana("batch", "jobs.txt", *DEMO)
    assert run.code == 0, run.err
    paths = run.out.splitlines()
    assert [re.sub(r"\d+", "N", path) for path in paths] == [
        "jobs-images/a-red-circle-on-white-N.png",
        "jobs-images/a-green-star-on-black-N.png",
        "jobs-images/a-blue-ring-on-grey-N.png",
    ]
    for path, line in zip(paths, lines("jobs-images", "done"), strict=True):
        with Image.open(path) as picture:
            assert picture.size == (256, 256)
            assert json.loads(picture.text["sana"])["recipe"]["seed"] == line["seed"]
    assert "3 drawn" in run.err
    assert "\x1b" not in run.out + run.err


def test_rows_win_over_options_and_options_fill_the_gaps(sana):
    Path("jobs.jsonl").write_text(
        '{"prompt": "a red circle on white", "steps": 2, "seed": 5, "output": "one.webp"}\n'
        '{"prompt": "a red circle on white", "count": 2}\n'
    )
    run = sana("batch", "jobs.jsonl", *DEMO, "--seed", "8", "--json")
    found = [event for event in events(run.out) if event["event"] == "image"]
    assert [(Path(e["path"]).name, e["seed"], e["recipe"]["steps"]) for e in found] == [
        ("one.webp", 5, 2),
        ("a-red-circle-on-white-8.png", 8, 1),
        ("a-red-circle-on-white-9.png", 9, 1),
    ]


def test_standing_choices_fill_the_gaps_too_and_are_said_aloud(sana):
    Path("sana.toml").write_text('model = "demo"\nsteps = 1\nformat = "webp"\nquality = 50\n')
    Path("jobs.csv").write_text("prompt,steps\na red circle on white,2\na blue ring on white,\n")
    run = sana("batch", "jobs.csv", "--json")
    found = [event for event in events(run.out) if event["event"] == "image"]
    assert [event["recipe"]["steps"] for event in found] == [2, 1], run.err
    assert {Path(event["path"]).suffix for event in found} == {".webp"}
    assert "from ./sana.toml: format, model, quality, steps" in run.err
    run = sana("batch", "jobs.csv", "--check", "-o", "x/{slug}.png")
    assert run.code == 0 and "set aside" in run.err


def test_a_table_fills_a_template_and_names(sana):
    Path("jobs.csv").write_text(
        "colour,shape,client\nred,circle,A/B Ltd.\nblue,{big|small} star,../CON\n"
    )
    words = ("--template", "a {colour} {shape} on white", "--expand", "-s", "1")
    run = sana("batch", "jobs.csv", *DEMO, *words, "-o", "out/{client}/{slug}")
    assert run.code == 0, run.err
    assert run.out.splitlines() == [
        "out/A-B Ltd/a-red-circle-on-white.png",
        "out/-CON/a-blue-big-star-on-white.png",
        "out/-CON/a-blue-small-star-on-white.png",
    ]


def test_a_check_counts_the_jobs_and_does_nothing(sana, here):
    run = sana("batch", "jobs.txt", *DEMO, "--check", "-n", "4")
    assert (run.code, run.out) == (0, "12 jobs, 12 to draw into jobs-images\n")
    assert [path.name for path in here.iterdir()] == ["jobs.txt"]
    run = sana("batch", "jobs.txt", *DEMO, "--check", "--json")
    assert [event["event"] for event in events(run.out)] == ["plan"]


def test_rows_at_fault_are_all_told_before_anything_is_drawn(sana, here):
    Path("jobs.csv").write_text("prompt,steps,model\na fox,0,\nan owl,x,\nan elk,2,dmeo\na,1,\n")
    run = sana("batch", "jobs.csv", "-m", "demo")
    assert (run.code, run.out) == (2, "")
    assert run.err.splitlines() == [
        "jobs.csv, row 2, column steps: --steps 0 is not between 1 and 1000",
        "jobs.csv, row 3, column steps: 'x' is not a whole number",
        "jobs.csv, row 4, column model: no model or folder is called 'dmeo'; did you mean demo?",
        "error: jobs.csv has 3 rows at fault",
    ]
    assert len(list(here.iterdir())) == 2
    run = sana("batch", "jobs.csv", "-m", "demo", "--json")
    assert [(e["event"], e["row"], e["column"]) for e in events(run.out)] == [
        *(("error", 2, "steps"), ("error", 3, "steps"), ("error", 4, "model"))
    ]


@pytest.mark.parametrize(
    ("words", "text", "says"),
    [
        (("--steps", "0"), "a\nb\n", "error: --steps 0 is not between"),
        (
            ("-s", "7"),
            "a fox\nan owl\na Fox!\n",
            "row 3: --output a-fox-7.png is the name",
        ),
        (("-s", "7"), "a fox\na fox\n", "{id}"),
        (("-o", "x/{sulg}"), "a fox\n", "row 1, column sulg: is empty, but the name"),
        (("-o", "fox.png"), "a fox\n", "names one file"),
        (("-o", "-"), "a fox\n", "single picture"),
        (("--expand",), "a {red} fox\n", "row 1, column prompt: {red} has nothing"),
        (("--template", "a {x}"), "a fox\n", "row 1, column prompt: is not used"),
        (("--shard", "4/3"), "a fox\n", "--shard '4/3'"),
        (("--quality", "90"), "a fox\n", "--quality has no effect on PNG"),
        (("--max-failures", "0"), "a fox\n", "--max-failures"),
        ((), "# nothing\n\n", "holds no job"),
        ((), "x" * 20_001, "row 1: a prompt is longer"),
        (("-n", "100001"), "a fox\n", "--count 100001"),
        (("-m", "sana-0.6b-1024", "--offline"), "a fox\n", "sana models pull sana-0.6b-1024"),
    ],
    ids=lambda value: ascii(value)[:40],
)
def test_a_wrong_call_is_one_error_and_touches_nothing(sana, here, monkeypatch, words, text, says):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(here / "none"))
    Path("wrong.txt").write_text(text)
    run = sana("batch", "wrong.txt", "-m", "demo", *words)
    assert (run.code, run.out) == (5 if "--offline" in words else 2, "")
    assert says in run.err
    assert len([line for line in run.err.splitlines() if line.startswith("error:")]) == 1
    assert "Traceback" not in run.err
    assert len(list(here.iterdir())) == 2


@pytest.mark.parametrize("output", ["/tmp/x.png", "../x.png", "a/../../x.png", "x.gif", "a\0.png"])
def test_a_row_cannot_write_outside_the_folder(sana, output):
    Path("jobs.jsonl").write_text(json.dumps({"prompt": "a fox", "output": output}))
    run = sana("batch", "jobs.jsonl", *DEMO)
    assert run.code == 2
    assert "jobs.jsonl, row 1, column output: --output" in run.err


def test_a_file_must_say_what_it_holds(sana):
    Path("jobs").write_text("a red circle on white\n")
    run = sana("batch", "jobs", *DEMO, "--check")
    assert run.code == 2 and "--input-format" in run.err
    run = sana("batch", "jobs", *DEMO, "--check", "--input-format", "txt")
    assert (run.code, run.out) == (0, "1 job, 1 to draw into jobs-images\n")


def test_pictures_to_start_from_are_read_for_each_row(sana, tiny_sprint, here):
    for name in ("red", "blue"):
        Image.new("RGB", (64, 64), name).save(f"{name}.png")
    Path("jobs.csv").write_text("prompt,image,seed\na fox,red.png,1\na fox,blue.png,2\n")
    words = ("-m", str(tiny_sprint), "--steps", "2", "--strength", "0.5")
    run = sana("batch", "jobs.csv", *words, "--json")
    found = [event["recipe"] for event in events(run.out) if event["event"] == "image"]
    assert len({recipe["image"] for recipe in found}) == 2, run.err
    assert {recipe["strength"] for recipe in found} == {0.5}
    alone = sana("generate", "a fox", "--image", "blue.png", "-s", "2", *words, "-o", "alone.png")
    assert alone.code == 0, alone.err
    assert Path("alone.png").read_bytes() == Path("jobs-images/a-fox-2.png").read_bytes()


def test_models_and_precisions_are_mixed_in_one_batch(sana, tiny_model):
    rows = [
        {"prompt": PROMPTS[0], "seed": 1},
        {"prompt": "a fox", "model": str(tiny_model), "seed": 2, "instruction": False},
        {"prompt": PROMPTS[0], "dtype": "bfloat16", "seed": 3},
        {"prompt": PROMPTS[1], "seed": 4},
    ]
    Path("jobs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    run = sana("batch", "jobs.jsonl", *ANY_SIZE, "--json")
    found = [event for event in events(run.out) if event["event"] == "image"]
    assert [event["seed"] for event in found] == [1, 4, 2, 3], run.err
    recipes = {event["seed"]: event["recipe"] for event in found}
    assert recipes[3]["dit_dtype"] == "bfloat16"
    assert recipes[2]["width"] == 512


# --- the picture of a job, wherever it stands --------------------------------------------------


def test_a_picture_is_the_same_alone_reversed_in_a_shard_and_by_generate(sana):
    everything = {}
    for name, prompts in (
        ("all", PROMPTS),
        ("back", PROMPTS[::-1]),
        ("more", (*PROMPTS, "a pink cross on white")),
    ):
        Path(f"{name}.txt").write_text("\n".join(prompts))
        assert sana("batch", f"{name}.txt", *DEMO, "-n", "2").code == 0
        everything[name] = pictures(f"{name}-images")
    assert len(everything["all"]) == 6
    assert everything["back"] == everything["all"]
    assert everything["more"].items() >= everything["all"].items()
    for prompt in PROMPTS:
        Path("alone.txt").write_text(prompt)
        assert sana("batch", "alone.txt", *DEMO, "-n", "2").code == 0
    assert pictures("alone-images") == everything["all"]
    for shard in ("1/3", "2/3", "3/3"):
        assert (
            sana("batch", "all.txt", *DEMO, "-n", "2", "--shard", shard, "-o", "shards").code == 0
        )
    assert pictures("shards") == everything["all"]
    assert len(list(Path("shards").glob("manifest.*-of-3.jsonl"))) == 3
    for line in lines("all-images", "done")[:2]:
        words = (PROMPTS[line["row"] - 1], "-s", str(line["seed"]), *DEMO, "-o", "alone/")
        assert sana("generate", *words).code == 0
    assert everything["all"].items() >= pictures("alone").items()


def test_equal_rows_are_several_pictures_and_ids_do_not_depend_on_the_machine(sana):
    Path("twice.txt").write_text(f"{PROMPTS[0]}\n{PROMPTS[1]}\n{PROMPTS[0]}\n")
    assert sana("batch", "twice.txt", *DEMO).code == 0
    first, other, second = (line["seed"] for line in lines("twice-images", "done"))
    assert second == first + 1
    assert sana("batch", "twice.txt", *DEMO, "--dtype", "bfloat16", "-o", "half").code == 0
    assert [line["seed"] for line in lines("half", "done")] == [first, other, second]
    ids = [{line["id"] for line in lines(name, "done")} for name in ("twice-images", "half")]
    assert len(ids[0]) == 3 and not ids[0] & ids[1]


# --- going on ----------------------------------------------------------------------------------


def test_run_again_it_draws_what_is_missing_and_nothing_else(sana):
    first = sana("batch", "jobs.txt", *DEMO)
    before = pictures("jobs-images")
    again = sana("batch", "jobs.txt", *DEMO)
    assert (again.code, again.out) == (0, "")
    assert "3 were there" in again.err
    lost, changed, kept = first.out.split()
    Path(lost).unlink()
    Path(changed).write_bytes(b"edited")
    Path("jobs.txt").write_text("\n".join((*PROMPTS, "a pink cross on white")))
    again = sana("batch", "jobs.txt", *DEMO)
    assert [Path(path).name for path in again.out.split()[:2]] == [
        Path(lost).name,
        f"{Path(changed).stem}-2.png",
    ]
    assert len(again.out.split()) == 3
    assert Path(changed).read_bytes() == b"edited"
    assert Path(lost).read_bytes() == before[Path(lost).name]
    assert sana("batch", "jobs.txt", *DEMO).out == ""


def test_a_restart_draws_all_again_in_place(sana):
    sana("batch", "jobs.txt", *DEMO)
    before = pictures("jobs-images")
    run = sana("batch", "jobs.txt", *DEMO, "--restart")
    assert len(run.out.split()) == 3
    assert pictures("jobs-images") == before
    assert len(lines("jobs-images", "done")) == 6


def test_the_file_of_someone_else_is_never_replaced_without_force(sana):
    Path("out").mkdir()
    Path("out/a-red-circle-on-white-1.png").write_text("mine")
    Path("one.txt").write_text(PROMPTS[0])
    run = sana("batch", "one.txt", *DEMO, "-s", "1", "-o", "out")
    assert run.out == "out/a-red-circle-on-white-1-2.png\n"
    assert sana("batch", "one.txt", *DEMO, "-s", "1", "-o", "out").out == ""
    run = sana("batch", "one.txt", *DEMO, "-s", "1", "-o", "out", "--restart", "--force")
    assert run.out == "out/a-red-circle-on-white-1.png\n"
    assert Path("out/a-red-circle-on-white-1.png").read_bytes()[:4] == b"\x89PNG"


def test_a_second_process_is_told_who_has_the_folder(sana, here):
    code = """
import sys, pathlib
from sana_cli.jobs.manifest import Manifest
with Manifest(pathlib.Path("jobs-images")) as manifest:
    manifest.begin(jobs=3, todo=3)
    print("held", flush=True)
    sys.stdin.read()
"""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", code], **pipes) as other:
        other.stdout.readline()
        run = sana("batch", "jobs.txt", *DEMO)
        assert (run.code, run.out) == (1, "")
        assert f"jobs-images is in use by process {other.pid} on" in run.err
        status = sana("batch", "status", "jobs-images")
        assert f"running: process {other.pid}" in status.out
        other.kill()
    assert sana("batch", "jobs.txt", *DEMO).code == 0


# --- kills -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def quick(tmp_path_factory) -> Iterator[Path]:
    """A folder with a `sana` that starts at once."""
    folder = tmp_path_factory.mktemp("quick")
    forks, socket = Path(__file__).with_name("forks.py"), folder / "socket"
    command = folder / "sana"
    command.write_text(f'#!/bin/sh\nexec {sys.executable} -SE {forks} {socket} "$@"\n')
    command.chmod(0o755)
    words = [sys.executable, str(forks), str(socket)]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stdin=subprocess.DEVNULL) as server:
        assert server.stdout.readline() == b"ready\n"
        yield folder
        server.kill()


@pytest.fixture
def killed(quick):
    """Run the command in a process that is killed at a place or after a time; its exit code."""

    def run(*words: str, place: int = 0, seconds: float = 0) -> int:
        environment = dict(os.environ)
        if place:
            environment["SANA_TEST_KILL"] = str(place)
        if seconds:
            environment["SANA_TEST_KILL_AFTER"] = str(seconds)
        run = subprocess.run(
            [quick / "sana", *words], env=environment, stdout=subprocess.DEVNULL, timeout=60
        )
        return run.returncode

    return run


def inodes(folder: str) -> dict[str, int]:
    done = {line["path"] for line in lines_that_parse(folder) if line["status"] == "done"}
    return {name: (Path(folder) / name).stat().st_ino for name in done}


def lines_that_parse(folder: str) -> list[dict]:
    from sana_cli.jobs.manifest import read_lines

    path = Path(folder) / "manifest.jsonl"
    return read_lines(path.read_bytes())[0] if path.exists() else []


def assert_finished(folder: str, expected: dict[str, bytes], before: dict[str, int]) -> None:
    """Every picture once and whole, no other file; those that were there are the same files."""
    assert pictures(folder) == expected
    assert inodes(folder).items() >= before.items()
    assert sorted(line["path"] for line in lines(folder, "done")) == sorted(expected)


def test_killed_at_any_change_it_makes_it_finishes_when_run_again(killed, here):
    Path("two.txt").write_text("\n".join(PROMPTS[:2]))
    call = ("batch", "two.txt", *DEMO, "-q")
    assert killed(*call) == 0
    expected = pictures("two-images")
    for place in range(1, 100):
        shutil.rmtree("two-images")
        code = killed(*call, place=place)
        if code == 0:
            break
        assert code == KILLED
        before = inodes("two-images") if Path("two-images").exists() else {}
        assert killed(*call) == 0
        assert_finished("two-images", expected, before)
    assert 10 < place < 40  # a line, a file and another line are several changes each


def test_killed_at_any_moment_again_and_again_it_finishes(killed, here):
    Path("many.txt").write_text("\n".join(f"{text} {i}" for text in PROMPTS for i in range(5)))
    call = ("batch", "many.txt", *DEMO, "-q")
    assert killed(*call, "-o", "whole") == 0
    expected = pictures("whole")
    chance = random.Random(0)
    kills = 0
    for _ in range(15):
        before = inodes("many-images") if Path("many-images").exists() else {}
        if killed(*call, seconds=chance.uniform(0.05, 0.5)) == 0:
            break
        kills += 1
        assert inodes("many-images").items() >= before.items()
    assert kills > 2
    assert killed(*call) == 0
    assert_finished("many-images", expected, before)


# --- failures ----------------------------------------------------------------------------------


def break_decoder(folder: Path, target: Path) -> Path:
    """A copy of a model whose pictures are all NaN."""
    import torch
    from safetensors.torch import load_file, save_file

    shutil.copytree(folder, target)
    path = target / "vae/diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    name = next(name for name in tensors if name.startswith("decoder.conv_out"))
    tensors[name] = torch.full_like(tensors[name], float("nan"))
    save_file(tensors, path)
    return target


@pytest.fixture
def broken(tiny_model, tmp_path) -> Path:
    return break_decoder(tiny_model, tmp_path / "broken")


def test_bad_jobs_do_not_stop_the_others(sana, broken, tiny_model, here):
    rows = [
        {"prompt": "a fox", "model": str(broken), "instruction": False},
        {"prompt": PROMPTS[0], "model": "demo"},
        {"prompt": "an owl", "model": str(broken), "instruction": False},
    ]
    Path("jobs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    run = sana("batch", "jobs.jsonl", "--steps", "1", "--json")
    assert run.code == 3
    found = events(run.out)
    assert [e["event"] for e in found] == ["plan", "error", "error", "image", "summary"]
    assert [(e["row"], e["exit_code"]) for e in found if e["event"] == "error"] == [(1, 7), (3, 7)]
    assert "jobs.jsonl, row 1: seed" in run.err and "NaN" in run.err
    last = found[-1]
    assert (last["drawn"], last["failed"], last["left"], last["exit_code"]) == (1, 2, 0, 3)
    # They are not tried again unless asked, and are not forgotten.
    run = sana("batch", "jobs.jsonl", "--steps", "1")
    assert (run.code, run.out) == (3, "")
    assert "--retry-failed" in run.err
    status = sana("batch", "status", "jobs-images")
    assert status.code == 3
    assert status.out.splitlines()[0] == "1 done, 2 failed"
    assert "row 3: seed" in status.out
    # Mended under the same name, they are the same jobs.
    shutil.rmtree(broken)
    shutil.copytree(tiny_model, broken)
    run = sana("batch", "jobs.jsonl", "--steps", "1", "--retry-failed")
    assert (run.code, len(run.out.split())) == (0, 2), run.err
    assert sana("batch", "status", "jobs-images").code == 0


def test_a_batch_stops_after_the_failures_that_are_allowed(sana, broken):
    Path("jobs.txt").write_text("\n".join(f"fox {i}" for i in range(5)))
    words = ("-m", str(broken), "--steps", "1", "--no-instruction", "--max-failures", "2")
    run = sana("batch", "jobs.txt", *words)
    assert run.code == 3
    assert len(lines("jobs-images", "failed")) == 2
    assert "stopped after 2 failures" in run.err and "3 left" in run.err


def test_weights_that_cannot_be_used_fail_their_jobs_only(sana, tiny_model, tmp_path):
    model = Path(shutil.copytree(tiny_model, tmp_path / "cut"))
    weights = model / "transformer/diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    rows = [{"prompt": f"fox {i}", "model": str(model)} for i in range(4)]
    rows.append({"prompt": PROMPTS[0], "model": "demo"})
    Path("jobs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    run = sana("batch", "jobs.jsonl", "--steps", "1")
    assert (run.code, len(run.out.split())) == (3, 1)
    assert len(lines("jobs-images", "failed")) == 4


def test_too_little_memory_for_any_job_is_no_fault_of_the_jobs(sana):
    run = sana("batch", "jobs.txt", *DEMO, "--memory", "60MB", "--json")
    assert run.code == 4
    assert [event["event"] for event in events(run.out)] == ["plan", "summary"]
    assert "more than the 60.0 MB" in run.err
    assert not lines("jobs-images", "failed")
    assert sana("batch", "jobs.txt", *DEMO).code == 0


@pytest.mark.parametrize("after", range(0, 10, 2))
def test_a_full_disk_ends_it_with_nothing_lost(sana, monkeypatch, after):
    expected = sana("batch", "jobs.txt", *DEMO, "-o", "whole").out
    real, calls = os.fsync, []

    def full(descriptor):
        calls.append(descriptor)
        if len(calls) > after:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        run = sana("batch", "jobs.txt", *DEMO)
    assert run.code == 6, run.err
    assert len([line for line in run.err.splitlines() if line.startswith("error:")]) == 1
    assert not list(Path("jobs-images").glob("*.partial"))
    for path in run.out.split():
        with Image.open(path) as picture:
            picture.load()
    again = sana("batch", "jobs.txt", *DEMO)
    assert again.code == 0
    assert len(run.out.split()) + len(again.out.split()) <= 3
    assert pictures("jobs-images") == pictures("whole")
    assert len(expected.split()) == 3


# --- leaving -----------------------------------------------------------------------------------


def started(*words: str, **options) -> subprocess.Popen:
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen([SANA, "batch", *words], **pipes, **options)


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)], ids=["ctrl-c", "sigterm"]
)
def test_asked_to_stop_it_sums_up_and_goes_on_next_time(sana, number, code):
    Path("jobs.txt").write_text("\n".join(f"{text} {i}" for text in PROMPTS for i in range(4)))
    with started("jobs.txt", "-m", "demo", "--steps", "4", "--json") as process:
        head: list[bytes] = []
        while len(events(b"".join(head).decode())) < 2:
            head.append(process.stdout.readline())
            assert head[-1], process.stderr.read()
        process.send_signal(number)
        out, err = process.communicate(timeout=60)
    assert process.returncode == code
    found = events((b"".join(head) + out).decode())
    drawn = [event for event in found if event["event"] == "image"]
    assert found[-1]["event"] == "summary" and found[-1]["exit_code"] == code
    assert found[-1]["drawn"] == len(drawn) < 12 and found[-1]["left"] == 12 - len(drawn)
    assert len(lines("jobs-images", "done")) == len(pictures("jobs-images")) == len(drawn)
    assert b"Traceback" not in err and b"error:" not in err
    run = sana("batch", "jobs.txt", "-m", "demo", "--steps", "4")
    assert (run.code, len(run.out.split())) == (0, 12 - len(drawn))


def test_asked_twice_it_stops_at_once(here):
    Path("one.txt").write_text(PROMPTS[0])
    with started("one.txt", "-m", "demo", "--steps", "1000") as process:
        for line in process.stderr:
            if b"to draw" in line:
                break
        time.sleep(0.7)
        process.send_signal(signal.SIGINT)
        time.sleep(0.2)
        process.send_signal(signal.SIGINT)
        began = time.monotonic()
        out, err = process.communicate(timeout=60)
    assert time.monotonic() - began < 3
    assert (process.returncode, out) == (130, b"")
    assert b"Traceback" not in err
    assert pictures("one-images") == {}


def test_a_reader_that_leaves_ends_it_quietly(here):
    command = f"{SANA} batch jobs.txt {' '.join(DEMO)} -n 20 -q | head -n 1"
    run = subprocess.run(["bash", "-c", command], capture_output=True, timeout=60)
    assert (run.stderr, len(run.stdout.splitlines())) == (b"", 1)
    assert 1 <= len(lines("jobs-images", "done")) < 60


# --- pipes -------------------------------------------------------------------------------------


def test_a_pipe_is_drawn_as_it_comes(sana):
    with started("-", *DEMO, "-o", "out", "-q") as process:
        process.stdin.write(f"{PROMPTS[0]}\n".encode())
        process.stdin.flush()
        first = process.stdout.readline()  # while the pipe is still open
        process.stdin.write(f"{PROMPTS[1]}\n{'x' * 20_001}\n{PROMPTS[2]}\n".encode())
        out, err = process.communicate(timeout=60)
    assert first.startswith(b"out/a-red-circle")
    assert len(out.splitlines()) == 2
    # What was drawn is not undone by a later row that is wrong.
    assert process.returncode == 3
    assert b"stdin, row 3: a prompt is longer" in err


def test_a_pipe_whose_first_rows_are_wrong_is_refused(process):
    run = process("batch", "-", *DEMO, "--input-format", "jsonl", input=b'{"promt": "x"}\n')
    assert (run.returncode, run.stdout) == (2, b"")
    assert b"stdin, row 1, column promt: is no field; did you mean prompt?" in run.stderr


def test_asked_to_stop_while_it_waits_for_a_pipe_it_goes(here):
    with started("-", *DEMO, "-o", "out") as process:
        process.stdin.write(f"{PROMPTS[0]}\n".encode())
        process.stdin.flush()
        process.stdout.readline()
        time.sleep(0.3)
        process.send_signal(signal.SIGTERM)
        process.wait(timeout=5)
    assert process.returncode == 143


# --- json --------------------------------------------------------------------------------------

SCHEMAS = {
    "plan": "jobs done failed todo folder shard device models",
    "image": "id row path seed width height model sha256 bytes seconds peak_bytes recipe",
    "error": "id row column message hint exit_code",
    "heartbeat": "stage done total",
    "summary": "drawn done failed left seconds exit_code",
}


def assert_schemas(found: list[dict]) -> None:
    import sana_cli.jobs.events

    for event in found:
        assert set(event) == {"event", *SCHEMAS[event["event"]].split()}
    for name, facts in SCHEMAS.items():
        section = re.search(rf"\n{name} .*?(?=\n\w|$)", sana_cli.jobs.events.__doc__, re.DOTALL)[0]
        assert all(fact in section for fact in facts.split()), name


@pytest.mark.parametrize("closed", ["", " 2>&-"], ids=["stderr", "no stderr"])
def test_events_are_json_lines_with_warnings_going_on(here, monkeypatch, broken, closed):
    # A cache that cannot be written is a warning.
    monkeypatch.setenv("SANA_CACHE_DIR", str(here / "jobs.txt"))
    rows = [{"prompt": PROMPTS[0]}, {"prompt": "x", "model": str(broken), "instruction": False}]
    Path("jobs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    command = f"{SANA} batch jobs.jsonl {' '.join(ANY_SIZE)} --json{closed}"
    run = subprocess.run(["bash", "-c", command], capture_output=True, timeout=60)
    assert run.returncode == 3
    found = events(run.stdout.decode())
    assert [event["event"] for event in found] == ["plan", "image", "error", "summary"]
    assert_schemas(found)
    assert (b"warning" in run.stderr) == (not closed)
    digest = found[1]["sha256"]
    assert shutil.which("sha256sum") is None or digest.encode() in subprocess.check_output(
        ["sha256sum", found[1]["path"]]
    )


def test_long_work_is_heard_of(sana, monkeypatch):
    monkeypatch.setattr("sana_cli.jobs.events.HEARTBEAT", 0.05)
    run = sana("batch", "jobs.txt", "-m", "demo", "--steps", "20", "--json")
    found = events(run.out, heartbeats=True)
    assert_schemas(found)
    beats = [event for event in found if event["event"] == "heartbeat"]
    assert {beat["stage"] for beat in beats} >= {"denoise"}
    assert found[-1]["event"] == "summary"


def test_quiet_says_nothing_but_paths(sana):
    run = sana("batch", "jobs.txt", *DEMO, "-q")
    assert (run.err, len(run.out.splitlines())) == ("", 3)


def test_a_bar_moves_on_a_terminal_and_stdout_holds_the_paths(here):
    environment = {k: v for k, v in os.environ.items() if k != "NO_COLOR"} | {"TERM": "xterm"}
    command = [SANA, "batch", "jobs.txt", *DEMO]
    code, shown, results = at_terminal(command, results=False, env=environment)
    assert code == 0
    assert [line.split(b"-")[0] for line in results.splitlines()] == [b"jobs"] * 3
    assert b"3/3" in shown or b"2/3" in shown


# --- status ------------------------------------------------------------------------------------


def test_status_tells_which_shards_to_run_again(sana):
    assert sana("batch", "jobs.txt", *DEMO, "-n", "4", "--shard", "2/3", "-o", "out").code == 0
    run = sana("batch", "status", "out", "--json")
    document = json.loads(run.out)
    assert run.code == 3
    assert document["resubmit"] == ["1/3", "3/3"]
    assert document["done"] == len(pictures("out")) > 0
    for shard in document["resubmit"]:
        assert sana("batch", "jobs.txt", *DEMO, "-n", "4", "--shard", shard, "-o", "out").code == 0
    run = sana("batch", "status", "out")
    assert (run.code, run.out) == (0, "12 done\n")


def test_status_of_no_batch_is_refused(sana):
    run = sana("batch", "status", "nowhere")
    assert run.code == 2 and "no manifest" in run.err
    assert not Path("nowhere").exists()


# --- the README --------------------------------------------------------------------------------

README = (Path(__file__).resolve().parents[1] / "README.md").read_text(encoding="utf-8")
SCRIPTING = README.split("<!-- scripting -->")[1].split("<!-- /scripting -->")[0]
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", SCRIPTING, re.DOTALL)


@pytest.fixture
def shell(quick):
    def run(text: str, **environment: str) -> subprocess.CompletedProcess:
        path = f"{quick}{os.pathsep}{os.environ['PATH']}"
        return subprocess.run(
            ["bash", "-euo", "pipefail", "-c", text],
            capture_output=True,
            text=True,
            timeout=100,
            env={**os.environ, "PATH": path, **environment},
        )

    return run


@pytest.mark.skipif(not all(map(shutil.which, ("bash", "jq", "make"))), reason="needs jq and make")
def test_every_command_on_the_scripting_page_runs(shell, here):
    """In order, in one folder, as someone would who reads from top to bottom."""
    assert [kind for kind, _ in BLOCKS] == ["sh"] * 6 + ["cron", "slurm", "make"]
    outputs = []
    for kind, text in BLOCKS:
        # Fewer steps than the page, for time.
        text = text.replace("-m demo", "-m demo --steps 1")
        if kind == "cron":
            (here / "pictures").mkdir()
            (here / "pictures/jobs.txt").write_text(PROMPTS[0])
            minute, hour, *days, command = text.split(None, 5)
            assert (minute, hour, days) == ("0", "2", ["*", "*", "*"])
            run = shell(command, HOME=str(here))
        elif kind == "slurm":
            tasks = re.search(r"--array=1-(\d+)", text)[1]
            for task in range(1, int(tasks) + 1):
                ids = {"SLURM_ARRAY_TASK_ID": str(task), "SLURM_ARRAY_TASK_MIN": "1"}
                run = shell(text, **ids, SLURM_ARRAY_TASK_COUNT=tasks)
        elif kind == "make":
            Path("Makefile").write_text(text)
            run = shell("make && make -q")
        else:
            run = shell(text)
        assert run.returncode == 0, run.stderr
        outputs.append(run.stdout)
    assert len(outputs[0].splitlines()) == 2
    assert outputs[1].splitlines()[0] == "4 jobs, 4 to draw into shapes"
    assert outputs[1].splitlines()[-1] == "4 done"
    assert outputs[2].splitlines()[0].startswith("table/Sun & Co/a-red-circle-on-white")
    assert outputs[3].count("rings-images/") == 2
    sums = subprocess.run(["sha256sum", "-c", "SHA256"], cwd="rings-images", capture_output=True)
    assert sums.returncode == 0
    assert outputs[4].count("drawn: hearts/") == 2
    assert (here / "pictures/batch.log").read_text().startswith("jobs-images/")
    assert pictures("shared").keys() == pictures("shapes").keys() - {".done"}
