"""The Triton kernels against the torch lines that define them, for shapes that fit no tile.

With a GPU the compiled kernels run, without one Triton's interpreter on the CPU (see conftest).
"""

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.tables import measured
from examples import exhaustive
from kernel_checks import DEVICE, MIN_TRITON, compiled_cases
from networks import DIT_KINDS, random_dit, velocity_error

pytest.importorskip("triton", minversion=MIN_TRITON)

from sana_cli.kernels import (
    depthwise_glu_triton,
    dispatch,
    launch,
    linear_attention_triton,
    modulation_triton,
    projection_triton,
    text_attention_triton,
)
from sana_cli.kernels.convolution import by_taps, lay_out_by_taps
from sana_cli.kernels.depthwise_glu import depthwise_glu
from sana_cli.kernels.dispatch import chosen_path
from sana_cli.kernels.linear_attention import attend_tokens, project_qkv
from sana_cli.kernels.modulation import modulate
from sana_cli.kernels.projection import gated_residual_linear_, linear_silu
from sana_cli.kernels.selfcheck import HALF_SUMS, decibels, least
from sana_cli.kernels.text_attention import attend_text

KERNELS = Path(__file__).resolve().parents[2] / "kernels"
MODULES = (
    *(depthwise_glu_triton, linear_attention_triton, modulation_triton, projection_triton),
    text_attention_triton,
)


@pytest.fixture
def check(dtype) -> Callable[..., None]:
    """Check that a kernel is close to its definition in float64, and deterministic."""

    def check(fused: Callable[..., Any], definition: Callable[..., Any], *inputs: Any) -> None:
        def copies(dtype: torch.dtype | None = None) -> list:
            return [x.to(dtype, copy=True) if isinstance(x, Tensor) else x for x in inputs]

        found, again = (as_tuple(fused(*copies())) for _ in range(2))
        true = as_tuple(definition(*copies(torch.float64)))
        matrices = [x for x in inputs if isinstance(x, Tensor) and x.ndim == 2]
        terms = matrices[0].shape[1] if matrices else 1
        for one, same, exact in zip(found, again, true, strict=True):
            assert torch.equal(one, same)
            assert decibels(one, exact) > least(dtype, terms)

    return check


def as_tuple(result: Any) -> tuple[Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)


@pytest.mark.parametrize(
    ("batch", "tokens", "width"), [(1, 1, 32), (2, 7, 96), (1, 3, 1152), (2, 2, 2240)]
)
def test_modulate(draw, check, batch, tokens, width):
    x = draw(batch, tokens, width) + 3  # LayerNorm removes the mean
    check(modulation_triton.modulate, modulate, x, draw(width), draw(width), 1e-6)


# The interpreter is slow, so only one of D, 2E and E at a time has the width of a model.
@pytest.mark.parametrize(
    ("batch", "tokens", "width", "wide"),
    [(1, 1, 16, 32), (2, 35, 96, 240), (1, 2, 2240, 48)]
    + exhaustive((1, 130, 40, 136), (1, 3, 1152, 64), (1, 2, 16, 11200)),
)  # fmt: skip
def test_linear_silu(draw, check, batch, tokens, width, wide):
    weight = draw(wide, width, size=width**-0.5)
    check(
        projection_triton.linear_silu, linear_silu, draw(batch, tokens, width), weight, draw(wide)
    )


@pytest.mark.parametrize(("with_bias", "with_gate"), [(1, 1), (1, 0), (0, 1), (0, 0)])
@pytest.mark.parametrize(
    ("batch", "tokens", "width", "wide"),
    [(1, 1, 32, 16), (2, 63, 96, 80), (2, 2, 2240, 32)]
    + exhaustive((1, 2, 48, 2880), (1, 2, 32, 5600), (1, 3, 1152, 16)),
)  # fmt: skip
def test_gated_residual_linear(draw, check, batch, tokens, width, wide, with_bias, with_gate):
    inputs = (
        draw(batch, tokens, width),
        draw(batch, tokens, wide),
        draw(width, wide, size=wide**-0.5),
        draw(width) if with_bias else None,
        draw(width) if with_gate else None,
    )
    check(projection_triton.gated_residual_linear_, gated_residual_linear_, *inputs)


def test_the_residual_is_updated_in_place(draw):
    x, y, weight = draw(1, 5, 32), draw(1, 5, 16), draw(32, 16)
    assert projection_triton.gated_residual_linear_(x, y, weight, None, None) is x


@pytest.mark.parametrize(
    ("batch", "height", "width", "channels", "halo"),
    [(1, 1, 1, 8, False), (1, 1, 1, 8, True), (2, 3, 5, 40, False), (1, 3, 5, 40, True)]
    + exhaustive(
        (1, 7, 9, 32, False), (1, 7, 9, 16, True), (1, 17, 8, 24, False), (1, 9, 3, 24, True),
        (1, 1, 2, 576, False), (1, 1, 3, 1120, True)
    ),
)  # fmt: skip
def test_depthwise_glu(draw, check, batch, height, width, channels, halo):
    x = draw(batch, height + 2 * halo, width, 2 * channels)
    inputs = x, draw(2 * channels, 1, 3, 3, size=1 / 3), draw(2 * channels), halo
    check(depthwise_glu_triton.depthwise_glu, depthwise_glu, *inputs)


def test_depthwise_weights_laid_out_by_taps_are_read_where_they_are_wherever_they_are_moved(draw):
    x, weight, bias = draw(1, 3, 5, 80), draw(80, 1, 3, 3), draw(80)
    laid_out = lay_out_by_taps(weight)
    for moved in (laid_out, laid_out.double().to(weight.dtype), laid_out.to("cpu", copy=True)):
        assert by_taps(moved).data_ptr() == moved.data_ptr()
    results = [depthwise_glu_triton.depthwise_glu(x, w, bias, False) for w in (weight, laid_out)]
    assert torch.equal(*results)


@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize(
    ("batch", "tokens", "width", "heads", "head"),
    [(1, 1, 32, 1, 32), (2, 135, 96, 3, 32), (2, 9, 80, 5, 16), (1, 2, 2240, 2, 32)]
    + exhaustive(
        (1, 33, 128, 2, 64), (1, 3, 1152, 1, 32), (1, 4, 32, 36, 32), (1, 3, 32, 70, 32)
    ),
)  # fmt: skip
def test_project_qkv(draw, check, batch, tokens, width, heads, head, normed):
    x = draw(batch, tokens, width)
    weight = draw(3 * heads * head, width, size=width**-0.5)
    norm = draw(heads * head) if normed else None
    inputs = x, weight, heads, norm, 1e-5
    check(linear_attention_triton.project_qkv, project_qkv, *inputs)


@pytest.mark.parametrize(
    ("batch", "tokens", "heads", "head"),
    [(1, 1, 1, 32), (2, 135, 3, 32), (2, 9, 5, 16), (1, 33, 2, 64), (1, 4, 36, 32), (1, 3, 70, 32)],
)
def test_attend_tokens(draw, check, batch, tokens, heads, head):
    state = draw(batch, heads, head + 1, head).float()
    state[:, :, -1] = state[:, :, -1].abs() * 10
    check(
        linear_attention_triton.attend_tokens,
        attend_tokens,
        *(draw(batch, tokens, heads * head), state),
    )


@pytest.mark.parametrize("padded", [0, 3])
@pytest.mark.parametrize(
    ("batch", "tokens", "heads", "head", "length"),
    [(1, 1, 1, 72, 1), (2, 35, 3, 24, 33), (1, 5, 20, 112, 40)]
    + exhaustive((1, 70, 2, 112, 304), (1, 3, 16, 72, 5)),
)  # fmt: skip
def test_attend_text(draw, check, batch, tokens, heads, head, length, padded):
    width = heads * head
    x, weight = draw(batch, tokens, width), draw(width, width, size=width**-0.5)
    keys, values = (draw(length + padded, heads, head).transpose(0, 1) for _ in range(2))
    mask = draw(1, length + padded)
    mask[:, length:] = -torch.inf
    rest = draw(width), draw(width), 1e-5, keys, values, mask if padded else None
    check(text_attention_triton.attend_text, attend_text, x, weight, *rest)


def test_scores_of_any_size_attend(draw):
    keys, values = (draw(40, 2, 16).transpose(0, 1) for _ in range(2))
    inputs = draw(1, 5, 32), draw(32, 32), draw(32), draw(32), 1e-5, 100 * keys, values, None
    found, true = (way(*inputs) for way in (text_attention_triton.attend_text, attend_text))
    assert decibels(found, true.double()) > 40  # one key gets nearly all the weight


def test_a_token_without_features_attends_to_nothing(draw):
    state = draw(1, 1, 33, 32).float()
    q = -draw(1, 5, 32).abs()
    assert not linear_attention_triton.attend_tokens(q, state).any()


@pytest.fixture
def half_sums(monkeypatch) -> None:
    """Sum as GeForce cards do, whatever the device."""
    for module in (linear_attention_triton, projection_triton, text_attention_triton):
        monkeypatch.setattr(module, "sums_in_half", lambda x: x.dtype == torch.float16)


@pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning")
@pytest.mark.parametrize("dtype", [torch.float16])
@pytest.mark.parametrize("beyond", [False, True])
def test_sums_in_float16_are_promoted_and_what_leaves_its_range_is_summed_again(
    draw, half_sums, beyond
):
    if beyond:
        x, weight = projection_triton.beyond_half(draw, 96)
    else:  # most of the error is that of sums over all 2240 channels, if they were in float16
        x, weight = draw(1, 5, 2240), draw(96, 2240, size=2240**-0.5)
    tokens, norm, text = draw(*x.shape[:2], 96), draw(96), draw(3, 3, 32)
    for fused, definition, inputs in (
        (projection_triton.linear_silu, linear_silu, (x, weight, norm)),
        (
            projection_triton.gated_residual_linear_,
            gated_residual_linear_,
            (tokens, x, weight, None, None),
        ),
        (linear_attention_triton.project_qkv, project_qkv, (x, weight, 1)),
        (
            text_attention_triton.attend_text,
            attend_text,
            (x, weight, norm, norm, 1e-5, text, text, None),
        ),
    ):
        rest = (None, 0.0) if definition is project_qkv else ()
        wide = [x.double() if isinstance(x, Tensor) else x for x in inputs]
        true = as_tuple(definition(*wide))
        for one, exact in zip(as_tuple(fused(*inputs, *rest)), true, strict=True):
            assert decibels(one, exact) > HALF_SUMS


@pytest.mark.parametrize(
    ("name", "capability", "halved"),
    [
        ("NVIDIA GeForce RTX 4090 Laptop GPU", (8, 9), True),
        ("NVIDIA GeForce RTX 5070 Ti", (12, 0), True),
        ("NVIDIA L40S", (8, 9), False),  # of the same generation, and at full rate
        ("NVIDIA H200", (9, 0), False),
    ],
)
def test_only_float16_on_geforce_cards_is_summed_in_float16(name, capability, halved, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    monkeypatch.setattr(dispatch, "fallback_reason", lambda device: None)
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.int8):
        x = SimpleNamespace(dtype=dtype, device=torch.device("cuda", 0))
        assert launch.sums_in_half(x) == (halved and dtype == torch.float16)
    path, reason = chosen_path("cuda")
    assert path == "triton"
    assert ("sums in float16 over 64 channels" in reason) == halved


def test_their_kernels_have_the_instructions_of_float16_sums():
    """`python -m sana_cli.kernels.aot --json > benchmarks/kernels.json` reads the machine code."""
    products = "linear_silu_kernel", "gated_residual_linear_kernel", "project_queries_kernel"
    found: dict[tuple[int, bool], set[bool]] = {}
    for cost in measured("kernels.json"):
        kernel, dtype = cost["case"].split()[:2]
        if kernel in products:
            of = cost["arch"], dtype == "float16"
            found.setdefault(of, set()).add((cost["tensor_cores"] or "").endswith(".F16"))
    halved = {(10 * major + minor, True) for major, minor in launch.HALVED}
    assert found == {of: {of in halved} for of in found}
    assert halved <= found.keys()


@pytest.mark.parametrize("kind", ["0.6B", "qk-norm"])
def test_the_fused_dit_in_triton_matches_the_transformer(kind, monkeypatch):
    names = set()

    def launch(kernel: Any, *rest: Any, **options: Any) -> None:
        names.add(kernel.__name__)
        start(kernel, *rest, **options)

    start = modulation_triton.launch
    for module in MODULES:
        monkeypatch.setattr(module, "launch", launch)
    monkeypatch.setattr(dispatch, "uses_triton", lambda operation, x, dtype=None: True)
    with torch.device(DEVICE):
        assert velocity_error(random_dit(num_layers=1, **DIT_KINDS[kind]), 5, 3) < 3e-6
    # More sum k after its norm, project the queries of cross-attention and attend with them.
    assert len(names) == (9 if kind == "qk-norm" else 6)


# --- dispatch and resources ----------------------------------------------------------------------


def python(*words: str) -> subprocess.CompletedProcess:
    """Run Python in a process where Triton compiles instead of interpreting."""
    kept = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    words = (sys.executable, "-P", *words)
    return subprocess.run(words, capture_output=True, text=True, env=kept, timeout=600)


def test_a_network_on_the_cpu_never_imports_triton():
    done = python(
        "-c",
        """
import sys, torch
from sana_cli.kernels.depthwise_glu import depthwise_glu
from sana_cli.kernels.linear_attention import attend_tokens, project_qkv
from sana_cli.kernels.modulation import modulate
from sana_cli.kernels.projection import gated_residual_linear_, linear_silu
from sana_cli.kernels.selfcheck import decibels, least
x = modulate(torch.randn(1, 12, 32), torch.randn(32), torch.randn(32), 1e-6)
y = attend_tokens(*project_qkv(x, torch.randn(96, 32), 1))
gated_residual_linear_(x, y, torch.eye(32), None, None)
wide = linear_silu(x, torch.randn(128, 32), torch.randn(128)).unflatten(1, (3, 4))
assert depthwise_glu(wide, torch.randn(128, 1, 3, 3), torch.randn(128)).shape == (1, 3, 4, 64)
assert "triton" not in sys.modules
""",
    )
    assert done.returncode == 0, done.stderr


def test_the_reason_for_the_torch_path_is_given():
    for kind in ("cpu", "mps"):
        assert chosen_path(kind) == ("torch", f"there is no Triton for {kind}")


def test_verbose_says_how_the_kernels_run(sana):
    words = "generate", "a fox", "--model", "demo", "--dry-run", "--device", "cpu"
    line = "kernels: torch path, as there is no Triton for cpu"
    assert line in sana(*words, "-v").err.splitlines()
    assert line not in sana(*words).err


def test_the_page_states_what_every_kernel_costs():
    """`python -m sana_cli.kernels.aot --json > benchmarks/kernels.json` measures it."""
    sources = [path.read_text(encoding="utf-8") for path in KERNELS.glob("*_triton.py")]
    kernels = {
        name for source in sources for name in re.findall(r"^def (\w+_kernel)\(", source, re.M)
    }
    assert {cost["case"].split()[0] for cost in measured("kernels.json")} == kernels


@pytest.mark.exhaustive
def test_kernels_compile_for_a_gpu_that_is_not_here():
    kept = {cost["case"] for cost in measured("kernels.json") if cost["arch"] == 89}
    assert compiled_cases("-m", "sana_cli.kernels.aot") == kept


def test_what_a_kernel_must_not_do_is_a_fault():
    done = python(
        "-c",
        """
import sys, torch
from sana_cli.kernels import aot, projection_triton, rows8_triton
from sana_cli.kernels.cases import like, like_rows8, like_weight8
from sana_cli.kernels.launch import trace_launches
from sana_cli.kernels.projection_triton import Blocks, linear_silu

def cost(dtype, *blocks):
    shapes = (1, 4096, 128), (1024, 128), (1024,)
    x, weight, bias = (like(*shape, dtype=dtype) for shape in shapes)
    if blocks:
        projection_triton.CONSUMER = (Blocks(*blocks),)
    else:  # the tiles of later GPUs, whose operands Ada would put together byte by byte
        rows8_triton.AMPERE = 3 * rows8_triton.LATER[:1]
        x, weight = like_rows8(x), like_weight8(weight)
    aot.all_cases = lambda _, target: trace_launches("", target, linear_silu, x, weight, bias)
    return aot.measure("", (8, 9), 0)

costs = [
    cost(torch.bfloat16, 128, 256, 64, 4, 3),
    cost(torch.bfloat16, 128, 128, 128, 8, 4),
    cost(torch.bfloat16),
]
aot.measure_all = lambda package, archs, jobs: costs
sys.argv = ["aot", "--json"]
sys.exit(aot.main())
""",
    )
    assert done.returncode == 1
    lines = done.stderr.splitlines()
    for line, words in zip(
        lines,
        (
            "spills",
            "bytes of shared memory, and a program has 101376",
            "other instructions for each IMMA of its inner loop",
        ),
        strict=True,
    ):
        assert line.startswith("error: linear_silu")
        assert words in line


def dot(kind: str, precision: str) -> str:
    """A product of matrices in Triton's intermediate code."""
    types = f"tensor<64x32x{kind}> * tensor<32x64x{kind}> -> tensor<64x64xf32>"
    return f"%c = tt.dot %a, %b, %d, inputPrecision = {precision} : {types}"


@pytest.mark.parametrize(
    ("dots", "instruction", "missing"),
    [
        ([dot("bf16", "tf32")], "HMMA.16816.F32.BF16 R4, R8", None),
        ([dot("bf16", "tf32")], "FFMA R4, R8", "floats"),
        ([dot("f32", "tf32")], "FFMA R4, R8", "floats"),
        ([dot("f32", "ieee")], "FFMA R4, R8", None),  # exact products have none
        ([dot("i8", "tf32")], "IMMA.16832.S8.S8 R4, R8", None),
        ([dot("i8", "tf32")], "UTCIMMA gdesc[UR4]", None),
        ([dot("i8", "tf32")], "IMAD R4, R8", "int8"),
        ([dot("i8", "tf32"), dot("f16", "tf32")], "IMMA.16832.S8.S8 R4, R8", "floats"),
    ],
)
def test_every_precision_needs_tensor_cores_of_its_own(dots, instruction, missing):
    from sana_cli.kernels.aot import _missing

    assert _missing("\n".join(dots), f"        /*0010*/ {instruction} ;") == missing
