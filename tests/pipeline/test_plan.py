"""The plan: predicted memory is the memory measured, limits hold, and running out is survived."""

import json
from collections.abc import Generator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks.memory import peaks
from examples import exhaustive
from reference import LIKE_1_6B, SPRINT, random_pipeline
from sana_cli.errors import NotEnoughMemory
from sana_cli.models.streaming.graphed_decoder import GraphedDecoder
from sana_cli.pipeline.draw import Drawing, draw
from sana_cli.pipeline.events import Event, Failure, ImageDone, Notice, Progress
from sana_cli.pipeline.networks import Networks
from sana_cli.pipeline.peaks import PeakCache
from sana_cli.pipeline.plan import (
    CONTEXT_BYTES,
    Plan,
    _decode_peak,
    _denoise_peak,
    _image_peak,
    _upper_bounds,
    fits,
    make_plan,
)
from sana_cli.recipe import Recipe
from sana_cli.system.devices import resident_bytes
from sana_cli.system.memory import PeakMemory
from sana_cli.weights.catalogue import known_models
from sana_cli.weights.layout import folder_parts
from sana_cli.weights.model_files import ModelFiles, open_model, released_model

KINDS = {
    "1.6B": {**LIKE_1_6B, "sample_size": 32},
    "4K": {**LIKE_1_6B, "sample_size": 128, "interpolation_scale": 2.0, "shift": 6.0},
}
LONG = "a red circle " * 200  # no prompt takes more memory: 300 tokens are read


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    made = {}

    def get(kind):
        if kind not in made:
            folder = tmp_path_factory.mktemp("plan") / kind
            made[kind] = folder
            random_pipeline(**KINDS[kind]).save_pretrained(folder)
        return made[kind]

    return get


def recipe(files: ModelFiles, width: int, height: int, **changes) -> Recipe:
    plain = Recipe(
        **{"prompt": LONG, "negative": "", "instruction": "", "seed": 7, "steps": 2},
        **{"guidance": 4.5, "solver": "flow-dpm", "flow_shift": files.flow_shift},
        **{"width": width, "height": height, "native_width": width, "native_height": height},
        **{"fit": "exact", "model": "x", "revision": None},
        **dict.fromkeys(("text_dtype", "dit_dtype", "vae_dtype"), "float32"),
    )
    return replace(plain, **changes)


def pictures(events) -> list[np.ndarray]:
    return [event.pixels for event in events if isinstance(event, ImageDone)]


def drawing(recipes: list[Recipe], files: ModelFiles, plan: Plan, pixels=None) -> Drawing:
    return Drawing(recipes, files, plan, Networks(), pixels, None)


def result(events: Generator[Event, None, Any]) -> Any:
    """What a generator of events returns."""
    try:
        while True:
            next(events)
    except StopIteration as stop:
        return stop.value


def weights(network: torch.nn.Module) -> int:
    return sum(parameter.nbytes for parameter in network.parameters())


def measured(one: Recipe, files: ModelFiles, plan: Plan) -> dict[str, int]:
    """Peak bytes of the tensors of two stages, weights included."""
    run = drawing([one], files, plan)
    list(run.encode_texts())
    transformer = result(run.load_transformer())
    with PeakMemory() as denoise:
        list(run.denoise(0, transformer))
    sizes = {"denoise": weights(transformer) + denoise.peak}
    decoder = result(run.load_decoder())
    with PeakMemory() as decode:
        list(run.decode(0, decoder))
    return sizes | {"decode": weights(decoder) + decode.peak}


@pytest.mark.parametrize("guidance", [4.5, *exhaustive(1.0)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("kind", "width", "height"), [("1.6B", 512, 1024), *exhaustive(("4K", 1024, 1024))]
)
def test_the_prediction_is_what_is_then_measured(folders, kind, width, height, dtype, guidance):
    files = open_model(folder_parts(folders(kind)))
    one = recipe(files, width, height, guidance=guidance, dit_dtype=dtype, vae_dtype=dtype)
    plan = make_plan([one], files, "cpu", predict=True)
    for stage, peak in measured(one, files, plan).items():
        assert plan.peaks[stage] == pytest.approx(peak, rel=0.1), stage


@pytest.mark.parametrize(
    "lean",
    [
        {"batched_cfg": False, "row_chunk": 8},
        *exhaustive({"batched_cfg": False}, {"batched_cfg": False, "row_chunk": 1}),
    ],
    ids=["8-rows", "halves-apart", "1-row"],
)
def test_the_prediction_of_a_lean_plan_too(folders, lean):
    files = open_model(folder_parts(folders("1.6B")))
    one = recipe(files, 1024, 1024)
    plan = Plan("cpu", strip_bytes=1 << 18, **lean)
    plain = make_plan([one], files, "cpu", predict=True).peaks
    found = measured(one, files, plan)
    assert _denoise_peak(PeakCache(), plan, one, files) == pytest.approx(found["denoise"], rel=0.1)
    assert _decode_peak(PeakCache(), plan, one, files) == pytest.approx(found["decode"], rel=0.1)
    assert found["denoise"] < plain["denoise"]
    assert found["decode"] < plain["decode"]


@pytest.mark.parametrize(
    ("name", "dtype", "device"),
    [
        ("sana-0.6b-512", "float32", "cpu"),
        *exhaustive(
            ("sana-1.6b-4k", "bfloat16", "cpu"),
            ("sana1.5-4.8b-1024", "bfloat16", "cpu"),
            ("sana-0.6b-1024", "bfloat16", "cuda"),
            ("sana-1.6b-4k", "bfloat16", "cuda"),
        ),
    ],
)
def test_what_is_not_rehearsed_would_need_less_than_was_taken_for_granted(name, dtype, device):
    model = known_models()[name]
    files = released_model(model)
    for text_dtype in ("int8", dtype):
        one = recipe(files, model.side, model.side, dit_dtype=dtype, vae_dtype=dtype)
        one = replace(one, text_dtype=text_dtype)
        plan = make_plan([one], files, device, 2**62, predict=True)
        bounds = _upper_bounds(one, files, plan.strip_bytes)
        assert plan.peaks["decode"] < bounds["decode"]
        assert max(plan.peaks.values()) < max(bounds.values()) < 2.5 * max(plan.peaks.values())


def test_on_a_laptop_gpu_of_16_gb_a_usual_picture_waits_for_no_rehearsal(monkeypatch):
    monkeypatch.setattr("sana_cli.pipeline.plan.free_memory", lambda *_: int(15.5e9))
    files = released_model(known_models()["sana-1.6b-1024"])
    halves = dict.fromkeys(("dit_dtype", "vae_dtype"), "bfloat16")
    one = recipe(files, 1024, 1024, text_dtype="int8", **halves)
    assert make_plan([one], files, "cuda").peaks == {}
    large = replace(one, native_width=4096, native_height=4096)
    assert make_plan([large], files, "cuda").peaks["denoise"] < 6e9


def test_a_limit_for_a_gpu_has_room_for_its_context():
    files = released_model(known_models()["sana-0.6b-512"])
    one = recipe(files, 512, 512, text_dtype="int8")
    assert make_plan([one], files, "cuda", limit=10**10).budget == 10**10 - CONTEXT_BYTES


class Capped(PeakMemory):
    """A device that holds no more than `cap` bytes of what is made in its `with` block."""

    def __init__(self, cap: int, failures: int | None = None) -> None:
        super().__init__()
        self.cap, self.failures = cap, failures  # None: every time

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = super().__torch_dispatch__(func, types, args, kwargs)
        if self.held > self.cap and self.failures != 0:
            if self.failures:
                self.failures -= 1
            del result
            raise torch.OutOfMemoryError("the cap of the test")
        return result


def test_a_limit_is_kept_and_the_picture_is_the_same(folders):
    files = open_model(folder_parts(folders("1.6B")))
    one = recipe(files, 1536, 1536)
    plain = make_plan([one], files, "cpu", predict=True)
    (roomy,) = pictures(draw([one], files, plain))
    budget = max(plain.peaks["encode"], int(0.5 * plain.peaks["denoise"]))
    plan = make_plan([one], files, "cpu", limit=budget + resident_bytes())
    assert not plan.batched_cfg
    assert max(plan.peaks.values()) <= budget < 0.7 * plain.peaks["denoise"]
    run = drawing([one], files, plan)
    list(run.encode_texts())
    transformer = result(run.load_transformer())
    with Capped(budget - weights(transformer)):
        assert not [event for event in run.denoise(0, transformer) if isinstance(event, Notice)]
    decoder = result(run.load_decoder())
    with Capped(budget - weights(decoder)):
        events = list(run.decode(0, decoder))
    assert not [event for event in events if isinstance(event, Notice)]
    (picture,) = pictures(events)
    assert np.abs(picture.astype(int) - roomy).max() <= 1


def test_a_plan_is_for_every_recipe_whatever_their_order(folders):
    files = open_model(folder_parts(folders("1.6B")))
    plain = recipe(files, 1024, 1024, guidance=1.0)
    guided = replace(plain, guidance=4.5, pag=3.0)
    small = recipe(files, 512, 512, image="x", guidance=1.0)
    one, both = (make_plan(some, files, "cpu", predict=True) for some in ([plain], [plain, guided]))
    assert one.peaks["denoise"] < both.peaks["denoise"]
    limit = (one.peaks["denoise"] + both.peaks["denoise"]) // 2
    plan = make_plan([plain, guided, small], files, "cpu", limit, overhead=0)
    assert plan == make_plan([small, guided, plain], files, "cpu", limit, overhead=0)
    assert set(plan.peaks) == {"encode", "image", "denoise", "decode"}
    for each in (plain, guided, small):
        assert _denoise_peak(PeakCache(), plan, each, files) <= plan.peaks["denoise"] <= limit


@pytest.mark.parametrize(
    "lean", [{}, *exhaustive({"batched_cfg": False, "row_chunk": 32, "strip_bytes": 1 << 18})]
)
def test_of_two_recipes_of_one_area_the_wider_needs_as_much_or_more(folders, lean):
    """Plans are made for it alone. The strips of a small decode differ by a few percent."""
    files = open_model(folder_parts(folders("1.6B")))
    plan = Plan("cpu", **lean)
    for peak in (_denoise_peak, _decode_peak, _image_peak):
        sizes = [(512, 2048), (1024, 1024), (2048, 512)]
        high, square, wide = (
            peak(PeakCache(), plan, recipe(files, *size), files) for size in sizes
        )
        assert high < 1.03 * square < 1.03**2 * wide, peak.__name__


@pytest.mark.exhaustive
def test_a_limit_below_every_plan_is_refused_with_what_fits(new_interpreter):
    """In a process of its own: what the interpreter holds counts against the limit."""
    words = ("--dtype", "bfloat16", "--dry-run", "--memory", "3GB")
    run = new_interpreter("generate", "a fox", "-r", "4096", *words)
    assert (run.returncode, run.stdout) == (4, b"")
    error, hint = run.stderr.decode().splitlines()[-2:]
    assert error.startswith("error: to encode 4096x4096 takes 4.")
    assert hint == "hint: use --model sana-0.6b-1024 --res 1024 --text-precision int8, which fits"


@pytest.mark.parametrize("given", ["", *exhaustive("-r 1024")])
def test_what_a_refusal_suggests_fits(process, given):
    words = ("--text-precision", "int8", "--dtype", "bfloat16", "--memory", "3GB", "--dry-run")
    call = ("generate", "a fox", "-m", "sana-1.6b-1024", *given.split(), *words)
    run = process(*call)
    assert run.returncode == 4
    hint = run.stderr.decode().splitlines()[-1]
    assert hint == "hint: use --model sana-0.6b-512 --res 512, which fits"
    assert process(*call, *hint.removeprefix("hint: use ").split(",")[0].split()).returncode == 0


def test_a_refusal_suggests_int8_only_where_it_runs(monkeypatch):
    files = released_model(known_models()["sana-0.6b-512"])
    hints = []
    for fault in (None, "bitsandbytes is not installed"):
        monkeypatch.setattr("sana_cli.pipeline.plan.int8_fault", lambda device, fault=fault: fault)
        with pytest.raises(NotEnoughMemory) as error:
            make_plan([recipe(files, 512, 512)], files, "cpu", 5 * 10**9, overhead=0)
        hints.append(error.value.hint)
    assert hints[0] == "use --text-precision int8, which fits"
    assert hints[1].startswith("it fits in --memory ")


def test_the_budgets_of_the_design_hold():
    """1.6B at 4096x4096 within 6 GB, its decode alone within 1.3 GB, weights included."""
    for name, side, budget in (
        ("sana-0.6b-1024", 1024, 2.6e9),
        ("sana-1.6b-2k", 2048, 4.5e9),
        ("sana-1.6b-4k", 4096, 6e9),
    ):
        files = released_model(known_models()[name])
        halves = dict.fromkeys(("dit_dtype", "vae_dtype"), "bfloat16")
        one = recipe(files, side, side, text_dtype="int8", **halves)
        plan = make_plan([one], files, "cpu", limit=int(budget) + resident_bytes())
        assert max(plan.peaks.values()) <= budget, name
        if side == 4096:
            assert plan.peaks["decode"] <= 1.3e9


RELEASED = [model for model in known_models().values() if model.sources]
NAMES = [model.name for model in RELEASED]


@pytest.mark.parametrize("model", [*RELEASED[:1], *exhaustive(*RELEASED[1:])], ids=NAMES)
def test_the_memory_that_the_list_of_models_states_is_what_the_plan_predicts(model):
    """`python -m benchmarks.memory` writes the figures."""
    assert (model.memory, model.least_memory) == pytest.approx(peaks(model), rel=0.01)


def test_what_fits_is_told_by_those_figures():
    model = next(model for model in RELEASED if model.side == 4096)
    told = [fits(model, "cuda", free * 10**9) for free in (16, 6, 5, 3)]
    assert told == ["yes", "yes", "tight", "no"]
    assert fits(model, "cpu", 16 * 10**9) == "yes"
    assert fits(model, "cpu", 8 * 10**9) == "no"
    assert fits(known_models()["demo"], "cpu", 10**9) == "yes"


# --- running out all the same ------------------------------------------------------------------


def needed(one, files, stage) -> int:
    """What the plain plan holds in a stage beside the weights."""
    run = drawing([one], files, Plan("cpu"))
    list(run.encode_texts())
    transformer = result(run.load_transformer())
    with PeakMemory() as denoise:
        list(run.denoise(0, transformer))
    decoder = result(run.load_decoder())
    with PeakMemory() as decode:
        list(run.decode(0, decoder))
    return {"denoise": denoise.peak, "decode": decode.peak}[stage]


@pytest.mark.parametrize(
    ("stage", "share", "said"),
    [
        ("denoise", 0.3, "rows of the latent at a time"),
        ("decode", 0.5, " strips"),
        *exhaustive(("denoise", 0.8, "the halves of guidance one after the other")),
    ],
)
def test_running_out_is_survived_and_said(folders, stage, share, said):
    files = open_model(folder_parts(folders("1.6B")))
    one = recipe(files, 1024, 1024)
    run = drawing([one], files, Plan("cpu"))
    list(run.encode_texts())
    transformer = result(run.load_transformer())
    cap = int(needed(one, files, stage) * share)
    with Capped(cap if stage == "denoise" else 2**62):
        events = list(run.denoise(0, transformer))
    decoder = result(run.load_decoder())
    with Capped(cap if stage == "decode" else 2**62):
        events += list(run.decode(0, decoder))
    remarks = [event.text for event in events if isinstance(event, Notice) and event.warning]
    assert remarks
    assert said in remarks[-1]
    (picture,) = pictures(events)
    (plain,) = pictures(draw([one], files, Plan("cpu")))
    assert np.abs(picture.astype(int) - plain).max() <= 1


def test_the_next_picture_of_the_run_is_not_affected(folders):
    files = open_model(folder_parts(folders("1.6B")))
    both = [recipe(files, 512, 512, seed=seed) for seed in (1, 2)]
    plain = pictures(draw(both, files, Plan("cpu")))
    run = drawing(both, files, Plan("cpu"))
    list(run.encode_texts())
    transformer = result(run.load_transformer())
    with Capped(int(needed(both[0], files, "denoise") * 0.7), failures=1):
        first = list(run.denoise(0, transformer))
        second = list(run.denoise(1, transformer))
    assert [e for e in first if isinstance(e, Notice)]
    assert not [e for e in second if isinstance(e, Notice)]
    decoder = result(run.load_decoder())
    (picture,) = pictures(run.decode(1, decoder))
    assert np.array_equal(picture, plain[1])


def test_decodes_have_a_cuda_graph_only_where_both_networks_fit(folders, monkeypatch):
    """Its memory is that of the decode, which then fits beside the transformer."""
    files = open_model(folder_parts(folders("1.6B")))
    one, seen = recipe(files, 256, 256), []
    decode = GraphedDecoder.decode

    def watched(*given, **words):
        seen.append(words["graphed"])
        return decode(*given, **words)

    monkeypatch.setattr(GraphedDecoder, "decode", watched)
    for keep in (True, False):
        assert len(pictures(draw([one], files, Plan("cpu", keep_loaded=keep)))) == 1
    assert seen == [True, False]


def test_a_graph_that_cannot_be_captured_is_told(folders):
    files = open_model(folder_parts(folders("1.6B")))
    run = drawing([recipe(files, 256, 256)], files, Plan("cpu"))
    list(run.encode_texts())
    transformer, decoder = result(run.load_transformer()), result(run.load_decoder())
    transformer.graph.error, decoder.graph.error = "no stream", "no memory"
    events = [*run.denoise(0, transformer), *run.decode(0, decoder)]
    remarks = [event.text for event in events if isinstance(event, Notice) and event.warning]
    assert remarks == ["no CUDA graph of a step: no stream", "no CUDA graph of a decode: no memory"]
    assert len(pictures(events)) == 1


def test_where_nothing_helps_the_others_are_drawn(folders):
    """One picture of a batch is far too large for the memory there is."""
    files = open_model(folder_parts(folders("1.6B")))
    small, large = recipe(files, 512, 512), recipe(files, 2048, 2048)
    least = needed(small, files, "denoise")
    run = drawing([large, small], files, Plan("cpu"))
    list(run.encode_texts())
    transformer = result(run.load_transformer())
    with Capped(int(least * 1.1)):
        run_events = [
            *run.finish(0, run.denoise(0, transformer)),
            *run.finish(1, run.denoise(1, transformer)),
        ]
    (failure,) = (event for event in run_events if isinstance(event, Failure))
    assert failure.index == 0
    assert isinstance(failure.error, NotEnoughMemory)
    assert 1 in run.latents
    assert 0 not in run.latents


def test_running_out_while_encoding_text_is_exit_code_4(tiny_model):
    """There is no smaller way to read a text: the error says so, with the documented code."""
    files = open_model(folder_parts(tiny_model))
    run = drawing([recipe(files, 512, 512)], files, Plan("cpu"))
    run.load_text_encoder(None, run.plan)
    with Capped(1000), pytest.raises(NotEnoughMemory) as error:
        list(run.encode_texts())
    assert error.value.exit_code == 4
    assert "text encoder" in error.value.message


def test_running_out_while_encoding_an_image_is_survived(tmp_path):
    folder = tmp_path / "sprint"
    random_pipeline(sample_size=32, **SPRINT).save_pretrained(folder)
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (256, 256, 3), np.uint8)).save(
        tmp_path / "in.png"
    )
    files = open_model(folder_parts(folder))
    digest = "x"
    pixels = {digest: np.asarray(Image.open(tmp_path / "in.png"))}
    one = recipe(files, 1024, 1024, solver="scm", image=digest, strength=0.5, flow_shift=None)
    run = drawing([one], files, Plan("cpu"), pixels)
    with PeakMemory() as plain:
        list(run.encode_images())
    expected = run.image_latents.popitem()[1]
    run = drawing([one], files, Plan("cpu"), pixels)
    with Capped(int(plain.peak * 0.7)):
        events = list(run.encode_images())
    assert " strips" in next(e.text for e in events if isinstance(e, Notice))
    assert any(isinstance(event, Progress) for event in events)
    torch.testing.assert_close(run.image_latents.popitem()[1], expected, rtol=1e-4, atol=1e-5)


# --- what the command says ---------------------------------------------------------------------


def test_a_dry_run_prints_the_plan_and_loads_nothing(sana):
    run = sana("generate", "a fox", "-r", "2048", "--dtype", "bfloat16", "--dry-run")
    plan = json.loads(run.out)
    assert set(plan["peak_bytes"]) == {"encode", "denoise", "decode"}
    assert plan["plan"].keys() == {
        "batched_cfg",
        "row_chunk",
        "strip_bytes",
        "keep_loaded",
    }
    assert max(plan["peak_bytes"].values()) <= plan["memory_bytes"]
    assert "expected memory: encode" in run.err


@pytest.mark.parametrize("word", ["6", "GB", "-1GB", "0", "6 parsecs", "1e9GB", "nan", "10MB", ""])
def test_what_is_no_amount_of_memory_is_refused(sana, word):
    run = sana("generate", "a fox", "-m", "demo", "--memory", word, "--dry-run")
    assert run.code == 2
    assert "hint: write it as 6GB" in run.err


@pytest.mark.parametrize("word", ["6GB", "6gb", "6G", "5.5GiB", "6000MB", "6 GB"])
def test_amounts_of_memory_as_people_write_them(sana, word):
    assert sana("generate", "a fox", "-m", "demo", "--memory", word, "--dry-run").code == 0
