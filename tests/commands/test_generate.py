"""What someone at a shell sees of `sana generate`."""

import io
import json
import os
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from examples import exhaustive
from sana_cli.commands.generate import is_unquoted
from terminal import at_terminal

FAST = ("--steps", "1", "--no-instruction")


def test_prints_the_path_and_writes_the_picture(sana, tiny_model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = sana("generate", "A red Fox!", "-m", str(tiny_model), "-s", "7", *FAST)
    assert (run.code, run.out) == (0, "a-red-fox-7.png\n")
    with Image.open("a-red-fox-7.png") as picture:
        assert picture.size == (512, 512)
    assert "seed 7" in run.err
    assert list(tmp_path.iterdir()) == [tmp_path / "a-red-fox-7.png"]


def test_results_reach_stdout_while_bars_move_on_the_terminal(program, tiny_model, tmp_path):
    """stderr is a terminal, stdout a file: the paths must be in the file, the bars must not."""
    command = [program, "generate", "a fox", "-n", "2"]
    command += ["-s", "1", "-m", str(tiny_model), *FAST]
    environment = {k: v for k, v in os.environ.items() if k != "NO_COLOR"} | {"TERM": "xterm"}
    code, shown, results = at_terminal(command, results=False, cwd=tmp_path, env=environment)
    assert (code, results) == (0, b"a-fox-1.png\na-fox-2.png\n")
    assert b"denoise" in shown


@pytest.mark.parametrize("words", [(), ("--color",), ("--no-color",)])
def test_no_escape_codes_when_not_a_terminal(sana, tiny_model, tmp_path, words):
    run = sana("generate", "a fox", "-m", str(tiny_model), "-o", f"{tmp_path}/", *FAST, *words)
    assert run.code == 0
    assert "\x1b" not in run.out + run.err


def test_json_is_one_document_with_everything_a_script_needs(sana, tiny_model, tmp_path):
    call = ("generate", "a fox", "an owl", "-m", str(tiny_model), "-s", "3,5", "--json", *FAST)
    run = sana(*call, "-o", f"{tmp_path}/")
    document = json.loads(run.out)
    assert list(document) == ["images", "seconds", "peak_bytes", "expected_time"]
    assert [(i["seed"], Path(i["path"]).name) for i in document["images"]] == [
        (3, "a-fox-3.png"),
        (5, "a-fox-5.png"),
        (3, "an-owl-3.png"),
        (5, "an-owl-5.png"),
    ]
    for image in document["images"]:
        with Image.open(image["path"]) as picture:
            assert picture.size == (image["width"], image["height"]) == (512, 512)
            assert json.loads(picture.text["sana"])["recipe"] == image["recipe"]
    seconds = document["seconds"]
    phases = {"start", "load", "encode", "denoise", "decode", "save"}
    assert set(seconds) == phases | {"other", "total"}
    assert all(seconds[phase] > 0 for phase in phases)
    assert seconds.pop("total") == pytest.approx(sum(seconds.values()), abs=0.001)
    assert set(document["peak_bytes"]) == {"encode", "denoise", "decode"}


@pytest.mark.parametrize(
    ("prompts", "unquoted"),
    [
        (["a red fox"], False),
        (["fox"], False),
        (["fox", "owl"], False),
        (["a fox", "an owl", "a cat"], False),
        (["a fox", "owl", "cat"], False),
        (["a", "red", "fox"], True),
        (["a", "red fox"], True),
        (["red fox", "in", "snow"], True),
        (["ein", "roter", "Fuchs"], True),
        (["-", "a"], False),
    ],
)
def test_prompts_that_look_like_one_sentence(prompts, unquoted):
    assert is_unquoted(prompts) == unquoted


def test_several_prompts_are_counted_and_forgotten_quotes_warned_of(sana, tiny_model):
    call = ("-m", str(tiny_model), "-n", "2", *FAST, "--dry-run")
    run = sana("generate", "a", "red", "fox", *call)
    assert "3 prompts, 6 images" in run.err
    warning = 'warning: 3 prompts are drawn; quotes would make them one: sana generate "a red fox"'
    assert warning in run.err
    assert "prompts" not in sana("generate", "a red fox", *call).err


@pytest.mark.skipif(sys.platform != "linux", reason="other systems open files by other programs")
@pytest.mark.parametrize(("count", "opened"), [(1, "a-fox-1.png"), *exhaustive((2, ""))])
def test_open_shows_the_image_or_the_folder_of_several(
    process, tiny_model, tmp_path, monkeypatch, count, opened
):
    opener, told = tmp_path / "bin" / "xdg-open", tmp_path / "told"
    opener.parent.mkdir()
    opener.write_text(f'#!/bin/sh\nprintf %s "$1" > {told}.part && mv {told}.part {told}\n')
    opener.chmod(0o755)
    monkeypatch.setenv("PATH", f"{opener.parent}:{os.environ['PATH']}")
    call = ("generate", "a fox", "-m", str(tiny_model), "-s", "1", "-n", str(count), *FAST)
    assert process(*call, "-o", f"{tmp_path}/", "--open").returncode == 0
    deadline = time.monotonic() + 30
    while not told.exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert Path(told.read_text()) == tmp_path / opened
    monkeypatch.setenv("PATH", str(tmp_path))
    assert b"cannot be opened" in process(*call, "-o", f"{tmp_path}/", "--open").stderr


@pytest.mark.parametrize("words", [("--dry-run",), ("-o", "-")])
def test_open_without_a_file_is_refused(sana, words):
    run = sana("generate", "a fox", "-m", "demo", "--open", *words)
    assert (run.code, "--open has no effect" in run.err) == (2, True)


def test_quiet_says_nothing_but_the_path(sana, tiny_model, tmp_path):
    run = sana("generate", "a fox", "-m", str(tiny_model), "-o", f"{tmp_path}/", "-q", *FAST)
    assert run.err == ""
    assert len(run.out.splitlines()) == 1


def test_prompts_from_stdin_and_bytes_to_stdout(process, tiny_model, tmp_path):
    options = ("-m", str(tiny_model), "-s", "1", *FAST)
    listed = process("generate", "-", *options, input=b"a fox\n\n  an owl  \n", cwd=tmp_path)
    assert listed.stdout.decode() == "a-fox-1.png\nan-owl-1.png\n"
    piped = process("generate", "a fox", *options, "-o", "-", cwd=tmp_path)
    assert piped.returncode == 0
    with Image.open(io.BytesIO(piped.stdout)) as one, Image.open(tmp_path / "a-fox-1.png") as other:
        assert one.tobytes() == other.tobytes()
    assert len(list(tmp_path.iterdir())) == 2


def test_names_are_never_reused_silently(sana, tiny_model, tmp_path):
    call = ("generate", "a fox", "-m", str(tiny_model), "-n", "2", "-s", "1", *FAST)
    target = tmp_path / "fox.png"
    for options, expected in [
        ((), ["fox.png", "fox-2.png"]),
        ((), ["fox-3.png", "fox-4.png"]),
        (("--force",), ["fox.png", "fox-5.png"]),
    ]:
        run = sana(*call, "-o", str(target), *options)
        assert [Path(line).name for line in run.out.split()] == expected


def test_a_dry_run_says_what_would_be_done_and_does_nothing(sana, tiny_model, tmp_path):
    run = sana("generate", "a fox", "-m", str(tiny_model), "-o", f"{tmp_path}/", "--dry-run")
    plan = json.loads(run.out)
    assert plan["paths"] == [f"{tmp_path}/a-fox-{plan['recipes'][0]['seed']}.png"]
    assert plan["recipes"][0]["steps"] == 20
    assert plan["weight_bytes"] > 0
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_draws_nearly_the_same(sana, tiny_model, tmp_path, dtype):
    pictures = []
    for name in ("float32", dtype):
        path = tmp_path / f"{name}.png"
        call = ("generate", "a fox", "-m", str(tiny_model), "-s", "1", "--dtype", name, *FAST)
        run = sana(*call, "--device", "cpu", "-o", str(path))
        assert run.code == 0, run.err
        with Image.open(path) as image:
            pictures.append(np.asarray(image).astype(float))
            recipe = json.loads(image.text["sana"])["recipe"]
        assert recipe["dit_dtype"] == name
        assert recipe["vae_dtype"] != "float16"
    assert 0 < np.abs(pictures[0] - pictures[1]).mean() < 6


@pytest.mark.parametrize(
    ("res", "name"),
    [((), "sana-0.6b-1024"), (("-r", "512"), "sana-0.6b-512"), (("-r", "4k"), "sana-1.6b-4k")],
)
def test_the_resolution_chooses_the_model(sana, monkeypatch, tmp_path, machine, res, name):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    run = sana("generate", "a fox", *res, "--offline")
    assert run.code == 5
    assert f"sana models pull {name}" in run.err
    run = sana("generate", "a fox", *res, "--dry-run")
    assert json.loads(run.out)["recipes"][0]["model"] == name
    assert f"model {name} (Efficient-Large-Model/" in run.err
