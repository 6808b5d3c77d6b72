"""`sana bench` as a user runs it: what it measures, and whether that can be so."""

import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from tokenizers import Tokenizer

from sana_cli.bench.random_weights import RandomTensors, random_model
from sana_cli.bench.roofline import Work, decoding, denoising, operations
from sana_cli.instruction import INSTRUCTION
from sana_cli.models.dc_ae import DCAE
from sana_cli.recipe import Recipe
from sana_cli.resolve import Inputs, resolve
from sana_cli.settings import Settings
from sana_cli.system.inventory import power, saving_power
from sana_cli.weights.catalogue import known_models
from sana_cli.weights.model_files import ModelFiles, released_model

DEMO = ("bench", "-m", "demo", "--device", "cpu", "--steps", "2")
PHASES = ["load", "encode", "denoise", "decode", "save", "total"]


@pytest.fixture(scope="module")
def command(program):
    """Run `sana` in a process of its own; gives what it wrote to stdout and to stderr."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "80"}

    def run(*words: str) -> tuple[str, str]:
        done = subprocess.run(
            [program, *words], capture_output=True, text=True, timeout=300, env=environment
        )
        assert done.returncode == 0, done.stderr
        return done.stdout, done.stderr

    return run


@pytest.fixture(scope="module")
def kept(command, tmp_path_factory):
    """A result of two sizes: what --json printed, and the file of --save."""
    path = tmp_path_factory.mktemp("bench") / "before.json"
    out, _ = command(*DEMO, "--runs", "2", "-r", "128,160x96", "--json", "--save", str(path))
    return json.loads(out), path


@pytest.fixture
def one_thread():
    """As the processes of `command` have."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# --- what is measured --------------------------------------------------------------------------


def test_every_phase_has_its_seconds_and_its_memory(kept):
    document, _ = kept
    assert (document["schema"], document["runs"], document["count"]) == (1, 2, 1)
    assert [(s["width"], s["height"]) for s in document["sizes"]] == [(128, 128), (160, 96)]
    for size in document["sizes"]:
        assert list(size["phases"]) == PHASES
        for phase in size["phases"].values():
            seconds = phase["seconds"]
            assert 0 < seconds["least"] <= seconds["median"] <= seconds["most"]
            assert len(seconds["each"]) == 2
            assert 50e6 < phase["peak_bytes"] < 2e9, "of a Python process with torch"
        medians = {name: phase["seconds"]["median"] for name, phase in size["phases"].items()}
        assert size["step_seconds"] == pytest.approx(medians["denoise"] / 2)
        assert size["images_per_minute"] == pytest.approx(60 / medians["total"])
        assert medians["total"] < 1.5 * sum(medians[name] for name in PHASES[1:5])
        assert {"encode", "denoise", "decode"} == set(size["predicted_peak_bytes"])
        for name in size["predicted_peak_bytes"]:
            assert size["phases"][name]["predicted_seconds"] > 0
        assert (size["random_weights"], size["against"]) == (False, None)
        assert size["recipe"]["steps"] == 2


def test_no_phase_is_faster_than_its_floor_allows(kept):
    document, _ = kept
    rates = document["rates"]
    assert 1e8 < rates["bytes_per_second"] < 1e13
    assert 1e8 < rates["flops_per_second"]["float32"] < 1e16
    for size in document["sizes"]:
        for name in ("denoise", "decode"):
            phase = size["phases"][name]
            floor = max(
                phase["flops"] / rates["flops_per_second"]["float32"],
                phase["bytes"] / rates["bytes_per_second"],
            )
            assert phase["floor_seconds"] == pytest.approx(floor)
            assert phase["share"] == pytest.approx(floor / phase["seconds"]["median"])
            assert 0 < phase["share"] <= 1.5  # clocks and neighbours of a machine change
        assert "share" not in size["phases"]["encode"]


def test_products_in_8_bits_have_a_prediction_and_no_floor(sana, one_thread, machine):
    run = sana(*DEMO, "--quant", "w8a8", "--runs", "1", "--warmup", "0", "-r", "128", "--json")
    assert run.code == 0, run.err
    (size,) = json.loads(run.out)["sizes"]
    denoise = size["phases"]["denoise"]
    assert denoise["predicted_seconds"] > 0 and "floor_seconds" not in denoise


def test_the_machine_and_the_versions_are_told(kept):
    document, _ = kept
    machine = document["machine"]
    assert document["torch"] == torch.__version__
    assert (machine["device"], machine["threads"]) == ("cpu", 1)
    assert machine["kernels"] == "torch: there is no Triton for cpu"
    assert set(machine["power"]) == {"on_battery", "governor", "frequency_driver", "profile"}


def test_people_get_a_table_that_fits_eighty_columns_beside_an_earlier_run(
    sana, kept, monkeypatch, one_thread, machine
):
    monkeypatch.setenv("COLUMNS", "80")
    run = sana(*DEMO, "--runs", "1", "--warmup", "0", "-r", "128", "--compare", str(kept[1]))
    assert run.code == 0, run.err
    lines = run.out.splitlines()
    assert lines[0] == "demo at 128x128"
    assert all(len(line) <= 80 for line in lines if not line.startswith("warning")), run.out
    header = next(line for line in lines if line.startswith("phase"))
    assert header.split()[-5:] == ["predicted", "floor", "reached", "to", "before"]
    rows = {line.split()[0]: line.split() for line in lines[3:11] if line.strip()}
    assert set(PHASES) < set(rows)
    assert "%" in rows["denoise"][-2], "the share of the floor"
    assert 0.05 < float(rows["total"][-1]) < 20
    assert "measured otherwise" not in run.err


def test_another_machine_or_other_steps_are_told(sana, kept, machine, tmp_path):
    document, _ = kept
    other = json.loads(json.dumps(document))
    other["machine"]["device_name"] = "another processor"
    other["sizes"][0]["recipe"]["steps"] = 20
    path = tmp_path / "other.json"
    path.write_text(json.dumps(other))
    quick = "--runs", "1", "--warmup", "0", "-r", "128", "--json", "--save", str(path), "--force"
    run = sana(*DEMO, *quick, "--compare", str(path))
    assert run.code == 0, run.err
    assert json.loads(path.read_text()) == json.loads(run.out)
    assert "device_name was another processor" in run.err
    assert "steps of demo was 20, and is 2" in run.err
    compared = json.loads(run.out)["compared"]
    assert [(row["width"], row["height"]) for row in compared["sizes"]] == [(128, 128)]
    assert compared["sizes"][0]["ratios"]["denoise"] > 0


def test_random_weights_cost_what_real_ones_do_and_are_told(sana, kept, machine):
    words = ("--random-weights", "--count", "2", "--runs", "1", "--warmup", "0")
    run = sana(*DEMO, *words, "-r", "128", "--json")
    assert run.code == 0, run.err
    document = json.loads(run.out)
    (size,), real = document["sizes"], kept[0]["sizes"][0]
    assert (size["random_weights"], size["tokenizer"], document["count"]) == (True, "its own", 2)
    for name in ("denoise", "decode"):
        assert size["phases"][name]["flops"] == 2 * real["phases"][name]["flops"]
    assert size["images_per_minute"] == pytest.approx(
        120 / size["phases"]["total"]["seconds"]["median"]
    )


def test_diffusers_draws_the_same_in_the_same_process(sana):
    pytest.importorskip("diffusers")
    words = ("--runs", "2", "--warmup", "0", "--against", "diffusers", "-r", "128x160", "--json")
    run = sana(*DEMO, *words)
    assert run.code == 0, run.err
    facts = json.loads(run.out)["sizes"][0]["against"]
    assert (facts["with"], facts["pairs"]) == ("diffusers", 2)
    assert set(facts["ratio"]) == set(facts["seconds"]) == {"encode", "denoise", "decode", "total"}
    for stage, both in facts["seconds"].items():
        pairs = zip(both["sana"]["each"], both["diffusers"]["each"], strict=True)
        ratios = [theirs / ours for ours, theirs in pairs]
        assert facts["ratio"][stage] == pytest.approx(sum(ratios) / 2)
    assert facts["psnr"] is None or facts["psnr"] > 50, "speed never comes from another picture"


@pytest.mark.exhaustive
def test_diffusers_compiled_draws_the_same(command):
    out, _ = command(
        *(*DEMO, "--runs", "1", "--against", "diffusers-compiled", "-r", "128", "--json"),
    )
    facts = json.loads(out)["sizes"][0]["against"]
    assert "torch.compile" in facts["how"]
    assert facts["psnr"] is None or facts["psnr"] > 50


# --- what cannot be measured -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["-m", "sana-0.6b-1024"], 5, "--random-weights"),
        (["-m", "demo", "--runs", "0"], 2, "--runs 0 is not between 1"),
        (["-m", "demo", "--count", "0"], 2, "--count 0 is not between 1"),
        (["-m", "demo", "--warmup", "-1"], 2, "--warmup -1 is not between 0"),
        (["-m", "demo", "-r", "128,,256"], 2, "empty size"),
        (["-m", "demo", "-r", "77q"], 2, "77q"),
        (["-m", "demo", "--force"], 2, "--force has no effect without --save"),
        (["-m", "demo", "--save", "/dev/null/a.json"], 2, "--save: /dev/null is not a folder"),
        (["-m", "demo", "--against", "diffusers", "--text-precision", "int8"], 2, "int8"),
        (["-m", "someone/else", "--random-weights"], 5, "its configuration is unknown"),
        (["-m", "demo", "--compare", "nothere.json"], 2, "cannot be read"),
        (["-m", "demo", "--memory", "60MB", "--device", "cpu"], 4, "takes"),
    ],
)
def test_a_call_that_cannot_be_measured_is_one_line_and_a_hint(sana, words, code, said):
    run = sana("bench", *words)
    assert (run.code, run.out) == (code, ""), run.err
    errors = [line for line in run.err.splitlines() if line.startswith(("error: ", "hint: "))]
    assert said in " ".join(errors)
    assert errors[0].startswith("error: ")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("not json", "is not JSON"),
        ("[]", "is not a result of sana bench"),
        ('{"schema": 1, "sizes": [{"model": "demo"}]}', "is not a result of sana bench"),
        ('{"schema": 99}', "has schema 99"),
    ],
)
def test_only_a_result_can_be_compared_with(sana, tmp_path, content, said):
    path = tmp_path / "before.json"
    path.write_text(content)
    run = sana(*DEMO, "--compare", str(path))
    assert (run.code, run.out) == (2, "")
    assert said in run.err


def test_a_result_of_other_sizes_is_refused_before_anything_is_measured(sana, kept):
    run = sana(*DEMO, "-r", "192", "--compare", str(kept[1]))
    assert (run.code, run.out) == (2, "")
    assert "demo at 128x128" in run.err
    assert "runs" not in run.err


def test_without_diffusers_there_is_nothing_to_measure_against():
    code = """
import sys
sys.modules["diffusers"] = None
import importlib.util
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == "diffusers" else find(name, *rest)
sys.argv = ["sana", "bench", "-m", "demo", "--against", "diffusers"]
from sana_cli.app import main
main()
"""
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert "--against needs diffusers" in done.stderr
    assert "pip install" in done.stderr


# --- random weights ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["sana-0.6b-512", "sana-1.6b-4k", "sana-sprint-1.6b"])
def test_of_a_released_model_only_the_configs_are_made_up(tmp_path, name):
    model = known_models()[name]
    made, released = random_model(model, None, tmp_path, "cpu"), released_model(model)
    assert (made.dit, made.vae, made.text) == (released.dit, released.vae, released.text)
    assert (made.flow_shift, made.unknown_keys) == (released.flow_shift, ())
    assert sum(path.stat().st_size for path in tmp_path.rglob("*.json")) < 50_000
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer" / "tokenizer.json"))
    assert 180 < len(tokenizer.encode(INSTRUCTION).ids) < 210, "of Gemma-2's it takes about 190"


def test_weights_that_are_drawn_keep_the_size_of_what_goes_through():
    shapes = {
        "a.weight": torch.Size([256, 512]),
        "b.weight": torch.Size([64, 32, 3, 3]),
        "norm.weight": torch.Size([512]),
        "a.bias": torch.Size([256]),
        "embed_tokens.weight": torch.Size([5000, 512]),
    }
    drawn = dict(RandomTensors(shapes, torch.float32, "cpu").tensors(""))
    assert {name: tensor.shape for name, tensor in drawn.items()} == shapes
    out = torch.randn(100, 512) @ drawn["a.weight"].T
    assert out.std() == pytest.approx(1, rel=0.05)
    image = torch.nn.functional.conv2d(torch.randn(1, 32, 32, 32), drawn["b.weight"])
    assert image.std() == pytest.approx(1, rel=0.05)
    assert (drawn["norm.weight"] == 1).all() and (drawn["a.bias"] == 0).all()
    table = drawn["embed_tokens.weight"]
    assert len(table[:100].unique(dim=0)) == 100, "each token has its own row"
    again = dict(RandomTensors(shapes, torch.float32, "cpu").tensors("a."))
    assert again["weight"].equal(drawn["a.weight"])


# --- floors ------------------------------------------------------------------------------------


def recipe(name: str, side: int, **changes) -> tuple[Recipe, ModelFiles]:
    resolution = resolve(Settings("a fox", model=name, **changes), Inputs())
    files = released_model(resolution.model)
    drawn = resolution.recipe(files, "cpu", 0)
    return replace(drawn, native_width=side, native_height=side), files


@pytest.mark.parametrize(
    ("name", "width", "layers"), [("sana-0.6b-1024", 1152, 28), ("sana-1.6b-1024", 2240, 20)]
)
def test_the_work_of_a_step_is_that_of_its_matrices(name, width, layers):
    """By hand, for each token in units of width²: 8 of self-attention and 15 of the feed-forward;
    the first self-attention once for both halves of guidance. The rest (depthwise convolutions,
    sums of attention) is below 2 %."""
    tokens = 32 * 32
    by_hand = tokens * width**2 * (layers * 2 * 23 - 8)
    step = denoising(*recipe(name, 1024)).flops / 20
    assert by_hand < step < 1.02 * by_hand
    unguided = denoising(*recipe(name, 1024, guidance=1.0)).flops / 20
    assert unguided == pytest.approx(layers * 23 * tokens * width**2, rel=0.02)


def test_work_grows_with_the_pixels_and_weights_are_read_once_a_step():
    small, large = (denoising(*recipe("sana-0.6b-1024", side)) for side in (1024, 2048))
    assert large.flops == pytest.approx(4 * small.flops)
    assert large.bytes < 4 * small.bytes
    half = denoising(*recipe("sana-0.6b-1024", 1024, dtype="bfloat16"))
    assert half.bytes == small.bytes / 2
    blocks = 28 * 11.5 * 1152**2 * 4  # bytes of the weights in float32
    assert 20 * blocks < small.bytes < 20 * (blocks + 4 * 28 * 2 * 10 * 1024 * 1152)


def test_the_work_of_a_decode_is_that_of_the_plain_network_with_its_doublings_folded():
    picture, files = recipe("sana-0.6b-1024", 512)
    with torch.device("meta"):
        decoder = DCAE(files.vae).decoder
        plain = operations(lambda: decoder(torch.empty(1, 32, 16, 16)))
    # Each of the five doublings convolves with 16 products for a pixel of the small map, not 36.
    widths = files.vae.decoder_block_out_channels
    doublings = [
        (wide, narrow, 16 << i)
        for i, (wide, narrow) in enumerate(zip(widths[:0:-1], widths[-2::-1], strict=True))
    ]
    saved = sum(2 * 20 * wide * narrow * side**2 for wide, narrow, side in doublings)
    assert decoding(picture, files).flops == pytest.approx(plain - saved, rel=0.01)


def test_a_floor_is_what_is_slower_of_the_two():
    work = Work(flops=100.0, bytes=10.0)
    assert work.floor(flops_per_second=10.0, bytes_per_second=10.0) == 10.0
    assert work.floor(flops_per_second=1000.0, bytes_per_second=10.0) == 1.0


# --- power -------------------------------------------------------------------------------------


def system(folder, **files: str):
    for name, text in files.items():
        folder_of = "class/power_supply/" if name.startswith(("BAT0", "hid")) else ""
        path = folder / folder_of / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{text}\n")
    return folder


@pytest.mark.parametrize(
    ("files", "warned"),
    [
        ({}, []),
        (
            {"BAT0__type": "Battery", "BAT0__status": "Discharging"},
            ["it runs on battery"],
        ),
        (
            {"BAT0__type": "Battery", "BAT0__status": "Charging"},
            [],
        ),
        (  # a mouse
            {
                "hid__type": "Battery",
                "hid__scope": "Device",
                "hid__status": "Discharging",
            },
            [],
        ),
        (
            {
                "devices__system__cpu__cpu0__cpufreq__scaling_governor": "powersave",
                "devices__system__cpu__cpu0__cpufreq__scaling_driver": "acpi-cpufreq",
            },
            ["the CPU's governor is powersave"],
        ),
        (
            {
                "devices__system__cpu__cpu0__cpufreq__scaling_governor": "powersave",
                "devices__system__cpu__cpu0__cpufreq__scaling_driver": "intel_pstate",
            },
            [],
        ),
        ({"firmware__acpi__platform_profile": "low-power"}, ["the power profile is low-power"]),
    ],
)  # fmt: skip
def test_what_saves_power_is_told_from_linux(tmp_path, files, warned):
    assert saving_power(power(system(tmp_path, **files))) == warned
