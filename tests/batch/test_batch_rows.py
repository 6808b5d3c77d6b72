"""From rows to pictures."""

import json
import re
from pathlib import Path

import pytest
from PIL import Image

from batches import ANY_SIZE, DEMO, PROMPTS, events, lines


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
    assert run.code == 0 and "ignored for this call" in run.err


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


def test_words_that_the_model_does_not_know_are_named_once(sana, here):
    (here / "jobs.txt").write_text("a red dragon\na dragon and a wombat\n")
    run = sana("batch", "jobs.txt", *DEMO, "--check")
    assert run.code == 0
    (line,) = (line for line in run.err.splitlines() if "not trained on" in line)
    assert 'demo was not trained on "dragon", "wombat"' in line


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


def test_a_wrong_column_and_wrong_values_are_told_at_once(sana, here):
    Path("bad.csv").write_text("prompt,sedd,steps,guidance\na fox,1,x,high\nan owl,2,2,101\n")
    run = sana("batch", "bad.csv", "-m", "demo")
    assert (run.code, run.out) == (2, "")
    assert run.err.splitlines() == [
        "bad.csv, row 1, column sedd: is not a field; did you mean seed?",
        "bad.csv, row 2, column steps: 'x' is not a whole number",
        "bad.csv, row 2, column guidance: 'high' is not a number",
        "bad.csv, row 3, column guidance: --guidance 101.0 is not between 0 and 100",
        "error: bad.csv has 3 rows at fault in 4 places",
    ]


def test_a_table_of_a_european_excel_is_read_and_how_is_said(sana, here):
    text = "prompt;negative;steps\na fox, red;;2\nun café;blurry;1\n"
    Path("jobs.csv").write_bytes(text.encode("utf-16"))
    run = sana("batch", "jobs.csv", *DEMO, "--check", "-g", "4")
    assert (run.code, run.out) == (0, "2 jobs, 2 to draw into jobs-images\n"), run.err
    assert "jobs.csv: its columns are separated by semicolons" in run.err


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
        (("-o", "-"), "a fox\n", "single image"),
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
