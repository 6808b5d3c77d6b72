"""Gemma's layers in 8 bits: accuracy, the cache of quantised weights, devices, and imports."""

import ctypes
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from examples import exhaustive
from networks import relative_error
from reference import text_encoder
from sana_cli.bench.competitor import psnr
from sana_cli.errors import UsageError
from sana_cli.instruction import INSTRUCTION
from sana_cli.models.int8 import OUTLIER, Int8Linear, install, quantise
from sana_cli.pipeline.text_cache import TextCache
from sana_cli.system.devices import choose_text_precision
from sana_cli.weights.layout import folder_parts

DEMO = Path(__file__).resolve().parents[2] / "sana_cli" / "demo"
PROMPTS = ["a red circle on a blue background", "a large white star in the centre on purple"]


def eight_bit(weight: torch.Tensor) -> Int8Linear:
    holder = torch.nn.Sequential(torch.nn.Linear(*weight.T.shape, bias=False))
    holder[0].weight.data = weight
    install(holder, quantise(holder))
    return holder[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [1, 7])
@pytest.mark.parametrize("outlier", [0.0, 60.0, 1e5, 1e30])
def test_a_linear_map_is_within_a_hundredth_whatever_its_input_holds(dtype, tokens, outlier):
    """1e5 is beyond float16, which the operators read, and 1e30 far beyond its square."""
    torch.manual_seed(0)
    weight = 0.02 * torch.randn(96, 256)
    x = torch.randn(1, tokens, 256)
    x[..., [3, 77]] += outlier
    x = x.to(dtype)
    y = eight_bit(weight)(x)
    assert y.dtype == dtype
    assert relative_error(y, x.double() @ weight.double().T) < 0.015
    outliers = x[..., [3, 77]].float() @ eight_bit(weight).weight[:, [3, 77]].T.float()
    assert y.isfinite().all() and outliers.isfinite().all()


def test_rows_of_zeros_give_zeros():
    x = torch.randn(1, 3, 64)
    x[0, 1] = 0
    weight = torch.randn(8, 64)
    weight[5] = 0
    y = eight_bit(weight)(x)
    assert not y[0, 1].any() and not y[..., 5].any() and y[0, 0, 0] != 0


def test_products_without_outliers_stay_within_float16():
    """On CUDA the operator rounds its products to float16; this bounds the sum of a row."""
    for name, tensor in load_file(DEMO / "text_encoder" / "model.safetensors").items():
        if "proj" in name:
            assert OUTLIER * tensor.float().abs().sum(1).max() < 65504 / 10


def test_the_states_of_the_bundled_model_are_within_two_hundredths(cache):
    """Measured: 0.011 at most; see benchmarks/text-precision.json."""
    exact = text_encoder(DEMO)
    ours = text_encoder(DEMO, "int8")
    cached = text_encoder(DEMO, "int8", TextCache(cache, folder_parts(DEMO), "int8", "cpu"))
    for prompt in PROMPTS:
        assert 1e-4 < relative_error(ours.encode(prompt), exact.encode(prompt)) < 0.02
        instructed = ours.encode(prompt, INSTRUCTION)
        assert relative_error(instructed, exact.encode(prompt, INSTRUCTION)) < 0.02
        # Which columns hold outliers depends on the tokens in a batch, so the batches are equal.
        assert torch.equal(cached.encode(prompt, INSTRUCTION), instructed)


@pytest.mark.parametrize(
    ("prompt", "shape", "colour", "ground"),
    [(PROMPTS[0], "circle", "red", "blue"), *exhaustive((PROMPTS[1], "star", "white", "purple"))],
)
def test_images_hardly_change_and_still_match_the_prompt(
    sana, tmp_path, prompt, shape, colour, ground
):
    from training.shape_checker import check
    from training.shapes import Object, Scene

    images = []
    for words in ((), ("--text-precision", "int8")):
        call = ("generate", prompt, "-m", "demo", "-r", "256", "-s", "1", "--device", "cpu")
        run = sana(*call, *words, "-o", f"{tmp_path}/{len(words)}/")
        assert run.code == 0, run.err
        images.append(np.asarray(Image.open(run.out.strip())))
    assert "text int8" in run.err
    assert (likeness := psnr(*images)) is None or likeness > 40
    scene = Scene((Object(shape, colour, 0.5, 0.5, 0.2),), (ground,))
    assert all(check(scene, images[1]).values())


# --- the cache of quantised weights ------------------------------------------------------------


@pytest.fixture
def int8(cache):
    """Return a function that encodes a prompt with a new 8-bit encoder that uses the cache."""

    def states() -> torch.Tensor:
        kept = TextCache(cache, folder_parts(DEMO), "int8", "cpu")
        return text_encoder(DEMO, "int8", kept).encode("a fox")

    return states


def test_weights_are_quantised_once(cache, int8):
    first = int8()
    (path,) = (cache / "int8").iterdir()
    assert path.stat().st_size < 0.6 * (DEMO / "text_encoder/model.safetensors").stat().st_size
    before = path.stat().st_ino
    assert torch.equal(int8(), first)
    assert path.stat().st_ino == before
    tensors = load_file(path)  # a change in the cache shows in the states
    save_file(tensors | {n: 2 * t for n, t in tensors.items() if n.endswith("v_proj.SCB")}, path)
    assert not torch.equal(int8(), first)


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def _garble(path: Path) -> None:
    path.write_bytes(b"\xff" * 1000)


def _edit(change):
    def damage(path: Path) -> None:
        tensors = load_file(path)
        save_file(change(tensors), path)

    return damage


_lacking = _edit(lambda tensors: dict(list(tensors.items())[1:]))
_wide = _edit(lambda tensors: {n: t.float() for n, t in tensors.items()})
_narrow = _edit(lambda tensors: {n: t[:-1].contiguous() for n, t in tensors.items()})


@pytest.mark.parametrize("damage", [_cut, _garble, _lacking, _wide, _narrow])
def test_a_broken_cache_file_is_rewritten(cache, int8, damage):
    first = int8()
    (path,) = (cache / "int8").iterdir()
    right = path.read_bytes()
    damage(path)
    assert torch.equal(int8(), first)
    assert path.read_bytes() == right


# --- devices -----------------------------------------------------------------------------------


LARGE, SMALL = 2_000_000_000, 1_000_000


def chosen(*given) -> str:
    precision, warning = choose_text_precision(*given)
    assert warning is None
    return precision


def test_on_a_cpu_int8_is_opt_in():
    for dtype in ("auto", "float32"):
        assert chosen("auto", dtype, "float32", "cpu", LARGE) == "float32"
        assert chosen("int8", dtype, "float32", "cpu", SMALL) == "int8"
    assert chosen("bf16", "auto", "float32", "cpu", SMALL) == "bfloat16"
    assert chosen("fp32", "bfloat16", "bfloat16", "cpu", SMALL) == "float32"


@pytest.mark.parametrize("device", ["mps", "mps:0", "xpu"])
def test_other_devices_refuse_int8_with_a_hint(device):
    with pytest.raises(UsageError, match="cuda and cpu") as refusal:
        choose_text_precision("int8", "auto", "float32", device, LARGE)
    assert "--text-precision" in refusal.value.hint
    assert chosen("auto", "auto", "float32", device, LARGE) == "float32"


@pytest.fixture
def nvidia(monkeypatch) -> Callable[..., None]:
    """A GPU, as the choice of a precision sees it: `nvidia(6e9, (8, 6))`."""

    def gpu(memory: float, generation: tuple[int, int] = (8, 6), cuda: str = "12.8") -> None:
        facts = SimpleNamespace(total_memory=int(memory))
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: facts)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: generation)
        monkeypatch.setattr(torch.version, "cuda", cuda)

    return gpu


def test_on_nvidia_int8_is_chosen_only_where_memory_needs_it(nvidia, monkeypatch):
    nvidia(6e9)
    monkeypatch.setattr(ctypes, "CDLL", lambda path: None)  # it loads
    assert chosen("auto", "auto", "bfloat16", "cuda", LARGE) == "int8"
    assert chosen("auto", "auto", "bfloat16", "cuda", SMALL) == "bfloat16"
    assert chosen("auto", "float32", "float32", "cuda", LARGE) == "float32", "--dtype was given"
    assert chosen("int8", "float32", "float32", "cuda:1", SMALL) == "int8"
    nvidia(12e9)
    assert chosen("auto", "auto", "bfloat16", "cuda", LARGE) == "bfloat16"
    assert chosen("auto", "auto", "bfloat16", "cuda", LARGE, int(6e9)) == "int8", "--memory"


@pytest.mark.parametrize(
    ("generation", "cuda", "reason"),
    [
        ((7, 0), "12.8", "Turing"),
        ((8, 6), "99.1", "no library for CUDA 99.1"),
        ((8, 6), "12.8", "cannot be loaded"),
    ],
)
def test_where_int8_cannot_run_it_is_a_warning_unless_it_was_asked_for(
    nvidia, monkeypatch, generation, cuda, reason
):
    def refuse(path: str) -> None:
        raise OSError("libcudart.so: cannot open shared object file")

    nvidia(6e9, generation, cuda)
    monkeypatch.setattr(ctypes, "CDLL", refuse)
    precision, warning = choose_text_precision("auto", "auto", "bfloat16", "cuda", LARGE)
    assert precision == "bfloat16"
    assert warning.startswith("the text encoder takes 4.0 GB")
    assert reason in warning
    with pytest.raises(UsageError, match=reason):
        choose_text_precision("int8", "auto", "float32", "cuda", LARGE)


def test_an_unknown_precision_is_refused(sana):
    run = sana("generate", "a fox", "-m", "demo", "--text-precision", "int4")
    assert (run.code, run.out) == (2, "")
    assert "--text-precision" in run.err


@pytest.mark.exhaustive
def test_bitsandbytes_is_imported_for_int8_only_quietly_and_without_a_download(tmp_path):
    """With the package `kernels` installed, importing bitsandbytes would fetch code with it."""
    (tmp_path / "kernels.py").write_text("raise SystemExit('kernels was imported')")
    words = ["generate", "a fox", "-m", "demo", "--device", "cpu", "--steps", "1", "-q"]
    words += ["-o", f"{tmp_path}/x.png", "-f", "--no-cache"]
    code = f"""
import sys
from sana_cli.app import main
for options in [], ["--text-precision", "int8"]:
    sys.argv = ["sana", *{words!r}, *options]
    try:
        main()
    except SystemExit as stop:
        assert not stop.code, stop.code
    assert ("bitsandbytes" in sys.modules) == bool(options)
    assert "kernels" not in sys.modules
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_a_library_that_fails_to_load_is_an_error_with_a_hint(new_interpreter, tmp_path):
    (tmp_path / "bitsandbytes.py").write_text("raise RuntimeError('no such CUDA\\nand more')")
    words = ["a fox", "-m", "demo", "--device", "cpu", "--text-precision", "int8"]
    run = new_interpreter(
        "generate", *words, cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(tmp_path)}
    )
    assert (run.returncode, run.stdout) == (1, b"")
    *_, error, hint = run.stderr.decode().splitlines()
    assert error.startswith("error: bitsandbytes") and error.endswith("no such CUDA")
    assert hint == "hint: use --text-precision bf16"
