"""The training recipe: it runs end to end, resumes to the bit, and captions state true facts."""

import json
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open

from examples import exhaustive
from training.captions import TEMPERATURE, all_facts, candidate, caption, score
from training.checker import check
from training.painter import paint
from training.prompts import PROMPTS, prompts
from training.scenes import training_scene
from training.settings import THINGS
from training.world import QUESTIONS, World, draw

ROOT = Path(__file__).resolve().parents[2]
WORLDS = {"before": World(), "with things": THINGS.world}


@pytest.fixture(scope="module")
def asked():
    return prompts()


@pytest.fixture
def one_thread(monkeypatch):
    """Here and in the processes started: sums in another order are other bits."""
    before = torch.get_num_threads()
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def folder_bytes(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize("preset", ["toy", *exhaustive("toy-things")])
def test_a_run_makes_a_model_that_draws(preset, tmp_path, one_thread):
    from training.__main__ import main
    from training.noto import NOTO
    from training.npm import PackageUnavailable

    if preset == "toy-things":
        pytest.importorskip("resvg_py", reason='what draws them: pip install -e ".[train]"')
        try:
            NOTO.archive()
        except PackageUnavailable as error:
            pytest.skip(str(error))
    main(["--preset", preset, "--run", f"{tmp_path}/run", "--out", f"{tmp_path}/model"])
    _draws(tmp_path / "model")


@pytest.mark.exhaustive
def test_a_killed_run_ends_in_the_same_bits_as_one_that_was_not(tmp_path, one_thread):
    from training.__main__ import main

    whole, cut = tmp_path / "whole", tmp_path / "cut"
    call = ["--preset", "toy", "--set", "low_steps=60"]
    main([*call, "--run", f"{whole}/run", "--out", f"{whole}/model"])

    call += ["--run", f"{cut}/run", "--out", f"{cut}/model"]
    # `training` is found behind everything installed: the package is tested as it was installed.
    program = f"import sys; sys.path.append({str(ROOT)!r})\n"
    program += f"from training.__main__ import main; main({call!r})"
    process = subprocess.Popen([sys.executable, "-P", "-c", program])
    state = cut / "run" / "low.safetensors"
    while process.poll() is None and not state.is_file():
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    with safe_open(state, "pt") as file:
        assert 0 < json.loads(file.metadata()["note"])["step"] < 60
    assert not (cut / "model").exists()

    main(call)
    assert folder_bytes(cut / "model") == folder_bytes(whole / "model")
    rows = [(d / "run" / "low.jsonl").read_text().splitlines() for d in (whole, cut)]
    losses = [[(row["step"], row["loss"]) for row in map(json.loads, log)] for log in rows]
    assert losses[0] == losses[1]


def _draws(folder: Path) -> None:
    """What was exported is a model like any other."""
    from sana_cli.weights.layout import folder_parts
    from sana_cli.weights.model_files import open_model
    from training.evaluate import draw_images, recipe

    files = open_model(folder_parts(folder))
    one = recipe("a red house", 1, files.flow_shift, 2, 4.5, side=64)
    (pixels,) = draw_images([one], files, "cpu")
    assert pixels.shape == (64, 64, 3)


def test_worker_processes_make_the_same_batches_in_the_same_order():
    from training.autoencoder import Crops
    from training.loop import prefetch

    crops = Crops(World(), seed=1, stream=1, sides=(64, 96), batch=2, crop=32)
    alone, helped = (list(prefetch(crops, range(3, 9), workers)) for workers in (0, 2))
    assert len(alone) == 6
    assert all(np.array_equal(a, b) for a, b in zip(alone, helped, strict=True))


def test_many_matrices_at_once_become_orthogonal(one_thread):
    from training.optim import orthogonalise

    torch.manual_seed(0)
    for shape in ((3, 24, 64), (3, 64, 24)):
        made = orthogonalise(torch.randn(shape))
        values = torch.linalg.svdvals(made)
        assert values.min() > 0.6 and values.max() < 1.3
        alone = torch.cat([orthogonalise(one[None]) for one in torch.unbind(made)])
        assert torch.allclose(alone, orthogonalise(made), atol=1e-5)


def test_gradients_through_fast_products_are_those_of_float64(one_thread):
    """Those left in float32 as good as plain torch's, all in bfloat16 as good as its 8 bits."""
    from training.arithmetic import autocast, fast_dtype, fast_products
    from training.diffusion import build
    from training.settings import TOY

    torch.manual_seed(0)
    model = build(TOY.transformer, text_scale=1.0)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
    latents, text = torch.randn(4, 32, 4, 4), torch.randn(4, 9, TOY.text_width)
    mask = torch.arange(9) < torch.tensor([9, 5, 2, 7])[:, None]

    def gradient(dtype: torch.dtype) -> torch.Tensor:
        model.to(dtype).zero_grad()
        told = torch.linspace(0, 1000, 4, dtype=dtype), model.project_text(text.to(dtype)), mask
        loss = model(latents.to(dtype), *told).float().square().mean()
        loss.backward()
        return torch.cat([p.grad.flatten() for p in model.parameters()]).double()

    def error(found: torch.Tensor) -> float:
        return ((found - exact).norm() / exact.norm()).item()

    exact = gradient(torch.float64)
    plain = error(gradient(torch.float32))
    with fast_products("cpu"):
        wide = error(gradient(torch.float32))
        with autocast("cpu"):
            narrow = error(gradient(torch.float32))
    assert torch.get_float32_matmul_precision() == "highest"
    assert plain < 5e-5
    assert wide < (3e-2 if torch.cpu.get_capabilities().get("amx_bf16") else 1.5 * plain)
    assert (1e-3 < narrow < 3e-2) if fast_dtype("cpu") == torch.bfloat16 else narrow < 1.5 * plain


def test_captions_state_what_is_so():
    rng = np.random.default_rng(1)
    for _ in range(300):
        scene = training_scene(rng)
        told, truth = candidate(scene, rng), all_facts(scene)
        assert 0 < score(told, scene) <= 1
        for fact in ("sky", "land"):
            if fact in told.facts:
                assert told.facts[fact] in (truth[fact], "night")
        named = {told.facts[k] for k in told.facts if k.startswith("colour")}
        assert named <= {group.colour for group in scene.groups}


def test_captions_tell_where_everything_is():
    """Colours, sky and land apart, pictures of one caption have the same things at the same places.

    A sea may be told or not, and things on water stand a little higher: only across is compared.
    """
    world = replace(THINGS.world, things=0.0)
    rng = np.random.default_rng(9)
    across = {}
    for _ in range(2000):
        scene = world.sample(rng)
        told = world.describe(scene, rng).facts
        telling = ("kind", "count", "place", "relation", "size")
        key = tuple((k, v) for k, v in told.items() if k.startswith(telling))
        found = sorted((round(left, 4), round(right, 4)) for left, right, _, _ in scene.boxes)
        assert across.setdefault((type(scene), key), found) == found, key
    assert len(across) < 1000  # so that most were compared


def test_a_fuller_caption_is_chosen_more_often():
    """softmax(score / temperature) of five beats one of five by a margin that can be stated."""
    rng = np.random.default_rng(2)
    chosen, plain = [], []
    for _ in range(300):
        scene = training_scene(rng)
        chosen.append(score(caption(scene, rng), scene))
        plain.append(score(candidate(scene, rng), scene))
    assert 0 < TEMPERATURE < 1
    assert np.mean(chosen) > np.mean(plain) + 0.05


@pytest.mark.parametrize("world", WORLDS.values(), ids=WORLDS)
def test_every_fact_of_a_caption_is_an_answer_that_the_encoder_learns(world):
    rng = np.random.default_rng(3)
    for _ in range(300):
        for question, answer in world.describe(world.sample(rng), rng).facts.items():
            assert answer in QUESTIONS[question]


def test_prompts_are_500_in_six_categories_and_not_in_the_words_of_training(asked):
    assert len(asked) == 500 == len({(p.category, p.text) for p in asked})
    assert {c: sum(p.category == c for p in asked) for c in PROMPTS} == PROMPTS
    assert all(p.scene.held_out for p in asked)
    rng = np.random.default_rng(4)
    world = World()
    trained = {world.describe(world.sample(rng), rng).text for _ in range(2000)}
    assert not trained & {p.text for p in asked}


@pytest.mark.parametrize("category", PROMPTS)
def test_each_prompt_can_be_obeyed(category, asked):
    these = [p for p in asked if p.category == category][::8]
    right = [all(check(p.facts, paint(p.scene, 256)).values()) for p in these]
    assert all(right)


def test_both_worlds_are_in_the_training():
    rng = np.random.default_rng(5)
    samples = [World().sample(rng) for _ in range(60)]
    modules = {type(sample).__module__ for sample in samples}
    assert modules == {"training.scenes", "training.shapes"}
    assert all(draw(sample, 64).shape == (64, 64, 3) for sample in samples)
    assert not any(sample.held_out for sample in samples)


def test_a_run_can_start_from_the_bundled_weights():
    """Their sizes are those of the settings; only what reads the new text encoder is new."""
    from training import autoencoder, bundled, diffusion

    bundled.start_from(autoencoder.build(THINGS.autoencoder), "vae")
    model = diffusion.build(THINGS.transformer, THINGS.text_scale)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    bundled.start_from(model, "transformer", without=("caption_projection", "caption_norm"))
    same = {n.split(".")[0] for n, v in model.state_dict().items() if torch.equal(v, before[n])}
    assert {"caption_projection", "caption_norm"} <= same
    assert not same & {"patch_embed", "proj_out", "time_embed"}


def test_a_run_goes_on_with_the_numbers_it_was_begun_with(tmp_path, capsys):
    from training.__main__ import changed_settings, main
    from training.settings import TOY, with_changes

    assert changed_settings(tmp_path / "settings.json", TOY, 1) == []
    assert changed_settings(tmp_path / "settings.json", with_changes(TOY, ["workers=3"]), 1) == []
    with pytest.raises(SystemExit):
        main(["--preset", "toy", "--set", "low_steps=7", "--run", f"{tmp_path}"])
    assert "started with other low_steps" in capsys.readouterr().err
    assert not list(tmp_path.glob("*.safetensors"))


def test_one_number_of_the_table_can_be_changed_and_no_other_name():
    from training.settings import CPU, with_changes

    assert with_changes(CPU, ["low_steps=5"]).low_steps == 5
    with pytest.raises(ValueError, match="low_stepz"):
        with_changes(CPU, ["low_stepz=5"])
