"""What is said of the time that images will take, before it is known and after."""

import json
from dataclasses import replace

import pytest
from PIL import Image

from sana_cli.bench import forecast, roofline
from sana_cli.bench.counted import Count, count_decode, count_image, count_step
from sana_cli.bench.forecast import EFFICIENCY, Forecaster
from sana_cli.bench.roofline import decoding, denoising
from sana_cli.models.configs import ControlNetConfig
from sana_cli.pipeline import timings
from sana_cli.pipeline.timings import Timings
from sana_cli.recipe import Recipe
from sana_cli.resolve import Inputs, resolve
from sana_cli.settings import Settings
from sana_cli.weights.hub_cache import find_parts
from sana_cli.weights.model_files import ModelFiles, open_model, released_model

CONTROLNET = ControlNetConfig(  # as the 0.6B's
    num_attention_heads=36,
    num_cross_attention_heads=16,
    cross_attention_head_dim=72,
    cross_attention_dim=1152,
)
DEMO = ("generate", "a red circle", "--model", "demo", "--res", "256", "--steps", "2")


def image(model: str = "sana-0.6b-512", **settings) -> tuple[Recipe, ModelFiles]:
    resolution = resolve(Settings("a fox", model=model, **settings), Inputs())
    found = find_parts(resolution.model)
    files = open_model(found) if found else released_model(resolution.model)
    return resolution.recipe(files, "cpu", 1), files


def forecaster(cache, told=None) -> Forecaster:
    return Forecaster("cpu", None, cache, [].append if told is None else told.append)


# --- predicted ---------------------------------------------------------------------------------


def test_a_prediction_is_the_stated_formula(cache, machine):
    recipe, files = image()
    products, _, texts, moved, each = EFFICIENCY["cpu"]
    step = 2e11 / (1e11 * products) + 1e9 * moved / 1e10 + 100 * each
    ratio = 16 * 16 / 64  # of the cells, at 512x512, to those that were counted
    whole = 5e8 + ratio * 15e8  # bytes; the weights are read once
    decode = ratio * 1e12 / (1e11 * products) + whole * moved / 1e10 + 50 * each
    tokens, weights = 30 + len(recipe.instruction) / 4, files.text.linear_weights
    encode = 2 * weights * tokens / (1e11 * texts) + 4 * weights * moved / 1e10
    found = forecaster(cache).expected([recipe], files)
    assert found.seconds == pytest.approx(encode + 20 * step + decode)
    assert (found.load_seconds, found.images, found.measured) == (None, 1, False)
    assert str(found).endswith("without loading, predicted for this machine")
    three = forecaster(cache).expected([recipe] * 3, files)
    assert three.seconds == pytest.approx(encode + 3 * (20 * step + decode)), "the text once"
    assert "for 3 images" in str(three)


def test_rates_are_measured_once_for_a_machine_and_a_precision(cache, machine, monkeypatch):
    recipe, files = image()
    told: list[str] = []
    first = forecaster(cache, told).expected([recipe], files)
    assert sorted(machine) == ["bandwidth", "count_decode", "count_step", "matrix_rate"]
    assert len(told) == 2
    assert forecaster(cache, told).expected([recipe], files) == first
    assert len(machine) == 4 and len(told) == 2
    monkeypatch.setenv("OMP_NUM_THREADS", "77")
    forecaster(cache).expected([recipe], files)
    assert sorted(machine[4:]) == ["bandwidth", "matrix_rate"], "other threads, other rates"
    forecaster(cache).expected([image(dtype="bfloat16")[0]], files)
    assert sorted(machine[6:]) == ["count_decode", "count_step", "matrix_rate"]


def test_nothing_is_measured_for_an_image_that_takes_no_longer_itself(cache, machine):
    recipe, files = image("demo")
    assert forecaster(cache).expected([recipe], files) is None
    assert machine == []
    assert forecaster(cache).expected([recipe], files, measure=True) is not None


def test_products_are_predicted_at_the_rate_of_their_precision(cache, machine, monkeypatch):
    recipe, files = image()
    rates = {"int8": 8e11, "float16": 1e11, "float16 with sums in float16": 2e11, "float32": 1e11}
    monkeypatch.setattr(roofline, "matrix_rate", lambda device, precision: rates[precision])
    monkeypatch.setattr(forecast, "count_step", lambda *what: Count(2e11, 0, 0, 0, 4e11))
    half = replace(recipe, dit_dtype="float16", quant="w8a8")
    share, share8 = EFFICIENCY["cpu"].products, EFFICIENCY["cpu"].products8
    for one, rate in ((half, 1e11), (replace(half, sums="float16"), 2e11)):
        found = forecaster(cache).stages(one, files, measure=True)
        assert found["step"] == pytest.approx(2e11 / (rate * share) + 4e11 / (8e11 * share8))


def test_input_images_are_encoded_once_each(cache, machine):
    recipe, files = image()
    products, _, _, moved, each = EFFICIENCY["cpu"]
    once = 4 * 5e11 / (1e11 * products) + (3e8 + 4 * 7e8) * moved / 1e10 + 40 * each
    plain, start, both = (
        replace(recipe, **fields)
        for fields in ({}, {"image": "a", "mask": "b", "strength": 1.0}, {"image": "a"})
    )
    both = replace(both, control="c", strength=1.0)
    stages = [forecaster(cache).stages(one, files, measure=True) for one in (plain, start, both)]
    assert [found.get("image", 0.0) for found in stages] == pytest.approx([0, once, 2 * once])
    expected = [forecaster(cache).expected([one], files).seconds for one in (plain, start)]
    assert expected[1] - expected[0] == pytest.approx(once)


@pytest.mark.parametrize(
    "words", [("--quant", "w8a8"), ("--pag", "2"), ("--image", "a.png", "--mask", "b.png"), ()]
)
def test_a_dry_run_predicts_whatever_is_asked_for(
    sana, cache, machine, monkeypatch, tmp_path, words
):
    monkeypatch.chdir(tmp_path)
    for name in ("a.png", "b.png"):
        Image.new("RGB", (512, 512), "white").save(name)
    run = sana("generate", "a fox", "--model", "sana-0.6b-512", *words, "--dry-run", "--json")
    assert run.code == 0, run.err
    found = json.loads(run.out)["expected_time"]
    assert found["seconds"] > 0 and not found["measured"]
    assert "predicted for this machine" in run.err


def test_the_best_rates_of_a_bench_are_kept(cache, machine):
    recipe, files = image()
    ours = forecaster(cache)
    for rate in (3e11, 2e11):
        ours.keep_rates({"bytes_per_second": 5e9, "flops_per_second": {"float32": rate}})
    assert (ours.rate("float32"), ours.rate("copy")) == (3e11, 5e9)
    assert machine == []


def test_a_step_and_a_decode_are_counted_as_they_run():
    recipe, files = image()
    step, decode = (count(recipe, files, None) for count in (count_step, count_decode))
    # Cross-attention comes on top of what has to be done at least, and every tensor is read anew.
    least = denoising(recipe, files)
    assert least.flops < 20 * step.flops < 1.1 * least.flops
    assert 2 * least.bytes < 20 * step.bytes < 10 * least.bytes
    assert step.operations > 10 * files.dit.num_layers
    least = decoding(recipe, files)
    whole = decode.enlarged(4)
    assert least.flops == pytest.approx(whole.flops, rel=0.01)
    assert 2 * least.bytes < whole.bytes < 20 * least.bytes
    assert count_image(recipe, files, None).flops == pytest.approx(0.7 * decode.flops, rel=0.01)
    pytest.importorskip("triton")
    assert count_step(recipe, files, (8, 9)).operations < step.operations / 2


def test_the_step_of_every_kind_of_image_is_counted():
    recipe, files = image()
    plain = count_step(recipe, files, None)
    eight = count_step(replace(recipe, quant="w8a8"), files, None)
    # The four projections: 23 of 24 products a token, of which 5600 channels are padded to 5632.
    assert 0.94 < eight.flops8 / plain.flops < 0.98
    assert eight.flops + eight.flops8 == pytest.approx(plain.flops, rel=0.01)
    assert eight.fixed_bytes < 0.5 * plain.fixed_bytes
    # A third stream from the ninth of 28 blocks on.
    perturbed = count_step(replace(recipe, pag=2.0, pag_layer=8), files, None)
    assert perturbed.flops / plain.flops == pytest.approx(1 + 20 / 28 / 2, rel=0.02)
    # Seven more blocks, each with a product of width² more a token.
    files = replace(files, controlnet=CONTROLNET)
    controlled = count_step(replace(recipe, control="hash"), files, None)
    assert controlled.flops / plain.flops == pytest.approx(1 + 7 / 28 * 25 / 24, rel=0.03)


# --- measured ----------------------------------------------------------------------------------


def test_after_a_run_its_time_is_told_as_measured(sana, cache, tmp_path):
    run = sana(*DEMO, "-o", str(tmp_path / "a.png"), "--json")
    assert run.code == 0 and json.loads(run.out)["expected_time"] is None
    assert "this machine" not in run.err
    run = sana(*DEMO[:-1], "5", "-n", "2", "--dry-run")
    assert run.code == 0, run.err
    assert "for 2 images" in run.err and "measured on this machine" in run.err
    found = json.loads(run.out)["expected_time"]
    ((load, took),) = json.loads((cache / timings.FILE).read_text()).values()
    assert set(load) == {"text_encoder", "transformer", "decoder"}
    assert found["measured"] and found["images"] == 2
    assert found["load_seconds"] == pytest.approx(sum(load.values()), abs=1e-3)
    expected = took["encode"] + 2 * (5 * took["step"] + took["decode"])
    assert found["seconds"] == pytest.approx(expected, abs=1e-3)
    # Another size is another time.
    run = sana(*DEMO[:-3], "512", "--dry-run")
    assert json.loads(run.out)["expected_time"] is None

    rows = tmp_path / "rows.txt"
    rows.write_text("a red circle\na blue star\n")
    folder = str(tmp_path / "images")
    batch = "batch", str(rows), *DEMO[2:], "-o", folder, "--json"
    run = sana(*batch)
    assert run.code == 0, run.err
    plan = json.loads(run.out.splitlines()[0])
    expected = 2 * (took["encode"] + 2 * took["step"] + took["decode"])
    assert plan["expected_time"]["seconds"] == pytest.approx(expected, abs=1e-3)
    run = sana(*batch)
    assert json.loads(run.out.splitlines()[0])["expected_time"] is None, "nothing is left to draw"


def test_a_broken_cache_is_as_good_as_none(sana, cache, tmp_path, machine):
    recipe, files = image()
    for name in (timings.FILE, forecast.RATES, forecast.COUNTS):
        for text in ("{", "[1]", json.dumps({"a": 1})):
            (cache / name).write_text(text)
            assert not forecaster(cache).expected([recipe], files).measured
    run = sana(*DEMO, "-o", str(tmp_path / "a.png"))
    assert run.code == 0, run.err
    kept = json.loads((cache / timings.FILE).read_text())
    for value in (1, [1, 2], [{"load": "x"}, {}], [{}, {"step": 1.0}]):
        (cache / timings.FILE).write_text(json.dumps(dict.fromkeys(kept, value)))
        assert sana(*DEMO, "--dry-run").code == 0


def test_without_a_cache_nothing_is_kept(sana, cache, tmp_path):
    run = sana(*DEMO, "-o", str(tmp_path / "a.png"), "--no-cache")
    assert run.code == 0, run.err
    assert not (cache / timings.FILE).exists()


def test_a_stage_that_did_not_run_keeps_its_time_and_the_oldest_kinds_go(cache, monkeypatch):
    recipe, _ = image("demo")
    kept = {"encode": 1.0, "step": 2.0, "decode": 3.0}
    timings.keep(Timings({"decoder": 1.0}, kept), recipe, "cpu", None, cache)
    timings.keep(Timings({}, {"step": 4.0}), recipe, "cpu", None, cache)
    found = timings.read(recipe, "cpu", None, cache)
    assert (found.load, found.stages) == ({"decoder": 1.0}, kept | {"step": 4.0})
    assert timings.read(recipe, "cpu", 10**9, cache).stages == {}, "another limit, another plan"
    monkeypatch.setattr(timings, "LIMIT", 2)
    for limit in (1, 2):
        timings.keep(Timings({}, {"step": 1.0}), recipe, "cpu", limit, cache)
    left = [bool(timings.read(recipe, "cpu", limit, cache).stages) for limit in (None, 1, 2)]
    assert left == [False, True, True]
