"""What runs on a GPU, run where there is none: on a card that knows shapes, dtypes and devices.

The kernels themselves are tested in Triton's interpreter; this is about all that stands around
them. Whatever would stop at once on a real card, as operands on two devices, stops here.
"""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from examples import exhaustive
from networks import DC_AE, DC_AE_LITE, FEW
from sana_cli.weights.catalogue import known_models

HERE = Path(__file__).parent
CXX = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
TRANSFORMER = {
    *("modulate_kernel", "project_qkv_kernel", "attend_tokens_kernel"),
    *("gated_residual_linear_kernel", "linear_silu_kernel", "depthwise_glu_kernel"),
}
AUTOENCODERS = {
    "released": DC_AE | FEW,
    "lite": DC_AE_LITE | FEW | {"decoder_layers_per_block": (0, 1, 1, 1, 1, 1)},
}
DECODER = {"rms_norm_kernel", "kv_state_kernel", "aggregate_kernel", "conv_to_rgb_kernel"}

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or CXX is None or torch.backends.cuda.is_built(),
    reason="needs a C++ compiler, and PyTorch without a CUDA of its own",
)


@pytest.fixture(scope="module")
def imagined(tmp_path_factory) -> Callable[..., dict]:
    """Run a script with the card in place; the JSON that it prints."""
    library = tmp_path_factory.mktemp("card") / "card.so"
    root = Path(torch.__file__).parent
    where = (f"-I{root}/include", f"-L{root}/lib", f"-Wl,-rpath,{root}/lib")
    command = [CXX, "-std=c++20", "-shared", "-fPIC", HERE / "library.cpp", *where]
    subprocess.run([*command, "-lc10", "-ltorch_cpu", "-o", library], check=True)
    environment = os.environ | {"LD_PRELOAD": str(library)}
    environment.pop("TRITON_INTERPRET", None)

    def run(script: str | Path, *words: str) -> dict:
        command = [sys.executable, HERE / script, *words]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)
        assert done.returncode == 0, done.stderr[-3000:]
        return json.loads(done.stdout)

    return run


@pytest.mark.parametrize(
    ("model", "res", "words"),
    [
        ("demo", "256x256", ["batched_cfg=false", "row_chunk=4"]),
        *exhaustive(
            ("demo", "512x512", ['negative="dull"']),
            ("demo", "256x256", ['quant="w8a8"', 'negative="dull"']),
            ("sana-0.6b-1024", "512x384", ["guidance=1.0"]),
            ("sana-sprint-0.6b", "512x512", []),
        ),
    ],
)
def test_a_picture_is_drawn_by_the_kernels_from_networks_on_the_card(imagined, model, res, words):
    told = imagined("draws.py", model, res, *words)
    assert told["kernels"].keys() >= TRANSFORMER | DECODER
    # The decoder is in bfloat16, and the transformer in what it was trained in.
    half = known_models()[model].dtype == "float16"
    kinds = ["float16", "bfloat16"] if half else ["bfloat16"]
    assert told["checked"] == kinds + ["bfloat16 int8"] * ('quant="w8a8"' in words)
    assert told["networks"] == ["cuda"]
    assert told["extremes"] == ["cuda", "cuda"]  # looked at once, at the end
    width, height = map(int, res.split("x"))
    assert told["pixels"] == ["cpu", height, width, 3]


@pytest.fixture(scope="module")
def steps(imagined) -> dict:
    return imagined("steps.py")


def test_two_steps_are_too_few_for_a_graph_and_twice_two_are_enough(steps):
    assert steps["captures_of_short_runs"] == [0, 0, 1, 1]


def test_one_graph_covers_transformer_controlnet_and_perturbed_stream(steps):
    assert (steps["error"], steps["captures"], steps["graph_bytes"]) == (None, 1, 1000)
    assert steps["shapes"] == 4 * [[3, 32, 32, 32]]
    # Four passes: one to warm up, one to capture; replays launch nothing anew.
    assert steps["kernels"]["project_qkv_kernel"] == 2 * (28 + 7)


def test_without_memory_for_a_graph_steps_run_one_by_one_and_it_is_tried_again(steps):
    assert (steps["without_graph"], steps["left"]) == ("CUDA out of memory. Tried", 0)
    assert steps["again"] == [None, 1000]


@pytest.fixture(params=AUTOENCODERS)
def kind(request) -> str:
    """Of an autoencoder."""
    return request.param


@pytest.fixture(scope="module")
def decodes(imagined) -> dict[str, dict]:
    return imagined("decodes.py", json.dumps(AUTOENCODERS))


def test_a_decode_bound_by_its_launches_is_captured_and_then_replayed(decodes, kind):
    told = decodes[kind]["bound by launches"]
    assert (told["error"], told["bytes"], told["captures"]) == (None, 1000, [0, 0, 1, 0])
    launches = told["launches"][0]
    assert launches > 0
    assert told["launches"] == [launches, launches, launches, 0]
    assert told["made"] == [["cpu", 128, 128, 3], "cuda"]


@pytest.mark.exhaustive
def test_the_benchmark_of_graphs_tells_what_pays(imagined):
    (row,) = imagined("benches.py")
    assert row["launch_share"] > 1 and row["pays"]
    assert (row["graph_bytes"], row["error"], row["ok"]) == (1000, None, True)


@pytest.mark.parametrize("how", ["bound by the card", "in strips", "without room"])
def test_any_other_decode_has_no_graph(decodes, kind, how):
    told = decodes[kind][how]
    assert (told["error"], told["bytes"], told["captures"]) == (None, 0, [0, 0, 0])


def test_a_graph_lives_for_as_long_as_shapes_and_weights_stay(decodes, kind):
    told = decodes[kind]
    assert told["of another shape"]["bytes"] == 0
    assert told["cropped"]["bytes"] == 1000
    assert (told["already in place"]["bytes"], told["already in place"]["launches"]) == (1000, [0])
    assert told["moved"] == 0


def test_a_decode_that_cannot_be_captured_runs_and_says_why(decodes, kind):
    told = decodes[kind]["out of memory"]
    assert (told["error"], told["bytes"]) == ("CUDA out of memory. Tried", 0)
    assert told["captures"] == [0, 0, 1, 0]
    assert told["made"][0] == ["cpu", 100, 90, 3]


def test_a_decode_that_failed_does_not_stand_for_the_first(decodes, kind):
    assert decodes[kind]["interrupted"] == [0, 0, 1]


def test_a_decode_waits_for_the_card_once(decodes, kind):
    waits = [told["waits"] for told in decodes[kind].values() if isinstance(told, dict)]
    assert waits == [[1] * len(each) for each in waits]


@pytest.fixture(scope="module")
def trained(imagined) -> dict[str, dict]:
    """Two steps of each stage of training."""
    return imagined("trains.py")


@pytest.mark.exhaustive
def test_the_gpus_recipe_is_planned_for_less_than_25_minutes_of_an_h200(trained):
    """By count: at a third of its 989 TFLOP/s in bfloat16, and at 10 µs for PyTorch to launch an
    operation. Whichever takes longer, and pictures are drawn meanwhile."""
    arithmetic = sum(stage["steps"] * stage["flops"] for stage in trained.values()) / (989e12 / 3)
    launches = sum(stage["steps"] * stage["operations"] for stage in trained.values()) * 10e-6
    assert max(arithmetic, launches) < 20 * 60


@pytest.mark.exhaustive
def test_every_stage_of_training_takes_its_steps_on_the_card(trained):
    assert list(trained) == ["autoencoder", "decoder", "text", "low", "high"]
    for stage in trained.values():
        assert stage["losses"] == stage["weights"] == ["cuda torch.float32"]
    blocks, steps = 9, 2
    for name in ("low", "high"):
        assert trained[name]["kernels"] == {
            "depthwise_glu_kernel": blocks * steps,
            "gate_gradient_kernel": blocks * steps,
            "depthwise_gradient_kernel": blocks * steps,
            "kv_state_kernel": blocks * steps,
            "attend_tokens_kernel": blocks * steps,
            "query_gradient_kernel": blocks * steps,
            "key_value_gradient_kernel": blocks * steps,
        }


FAULTS = {
    "x.cpu() + x": "two devices",
    "x @ x.bfloat16()": "one dtype",
    "torch.nn.functional.linear(x, x, torch.ones(4))": "two devices",
    "torch.nn.functional.conv2d(x[None], x[..., None, None].half())": "one dtype",
    "x.sum().item()": "_local_scalar_dense",  # there is no number
}

CAPTURED = {
    "x.cpu()": "cpu is not captured",
    "x.copy_(y)": "cpu is not captured",
    "torch.ones(4)": "cpu is not captured",
    "torch.ones(4, device='cuda:1')": "cuda:1 is not captured",
    "torch.cuda.synchronize()": "a wait",
}


def test_what_a_card_refuses_is_refused(imagined, tmp_path):
    script = tmp_path / "faulty.py"
    script.write_text(f"""
import json, sys
sys.path.insert(0, {str(HERE)!r})
import torch
from card import card
said = {{}}
with card():
    x = torch.ones(4, 4, device="cuda")
    assert (x @ x).is_cuda
    for faulty in {list(FAULTS)!r}:
        try:
            eval(faulty)
        except Exception as error:
            said[faulty] = str(error)
    y = torch.ones(4, 4)
    for faulty in {list(CAPTURED)!r}:
        try:
            with torch.cuda.graph(torch.cuda.CUDAGraph()):
                x + x
                eval(faulty)
        except Exception as error:
            said[faulty] = str(error.__cause__)
print(json.dumps(said))
""")
    said = imagined(script)
    for faulty, says in (FAULTS | CAPTURED).items():
        assert says in said[faulty]
