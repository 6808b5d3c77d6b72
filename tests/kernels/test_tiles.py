"""The choice of block shapes: waves that are full, and what is measured and kept.

Nothing is timed here: the measurement is replaced, and so is the question whether there is a GPU.
"""

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from benchmarks.tables import measured

pytest.importorskip("triton")

from sana_cli.kernels import selfcheck, tiles
from sana_cli.kernels.aot import SHARED
from sana_cli.kernels.cases import like, like_rows8
from sana_cli.kernels.linear_attention_triton import qkv_shapes
from sana_cli.kernels.projection_triton import RESIDUAL_WIDEST, SILU_WIDEST, Blocks, block_shapes
from sana_cli.kernels.rows8_triton import block_shapes8
from sana_cli.kernels.tiles import CANDIDATES, Product

HALF = torch.float16
SHAPES = [
    Blocks(128, 128, 64, 8, 4),
    *(Blocks(m, n, 64, 4, 4, 2) for m, n in ((128, 64), (64, 64), (32, 32))),
]
CPU = torch.device("cpu")
# At 1024² with guidance: attention's projection and the halves of the feed-forward.
OUT, DOWN, UP = (Product(1, 2048, n, k, 2) for n, k in ((1152, 1152), (1152, 2880), (5760, 1152)))
SMALL_UP = Product(1, 512, 5760, 1152, 2)


def filled(product: Product, shape: Blocks, multiprocessors: int) -> float:
    """The share of the multiprocessors' time that goes into results, if products were all."""
    m, n = shape.tile
    count = math.ceil(product.m / m) * math.ceil(product.n / n)
    return product.m * product.n / (math.ceil(count / multiprocessors) * multiprocessors * m * n)


@pytest.mark.parametrize(
    ("capability", "multiprocessors", "product", "widest", "least"),
    [
        ((8, 6), 30, OUT, RESIDUAL_WIDEST, 0.96),  # RTX 3060 Laptop
        ((8, 9), 24, UP, SILU_WIDEST, 0.99),  # RTX 4060 Laptop
        ((8, 9), 76, SMALL_UP, SILU_WIDEST, 0.94),  # RTX 4090 Laptop
        ((12, 0), 46, DOWN, RESIDUAL_WIDEST, 0.96),  # RTX 5070 Ti Laptop
        ((12, 0), 82, SMALL_UP, SILU_WIDEST, 0.97),  # RTX 5090 Laptop
        ((8, 9), 128, OUT, RESIDUAL_WIDEST, 0.90),  # RTX 4090, of which a constant left 56 %
        ((8, 0), 108, OUT, RESIDUAL_WIDEST, 0.88),  # A100
    ],
)
def test_few_multiprocessors_wait_for_the_last_wave(
    capability, multiprocessors, product, widest, least
):
    shapes = block_shapes(HALF, capability, widest)
    best = min(shapes, key=lambda shape: product.cycles(shape, capability, multiprocessors))
    assert filled(product, best, multiprocessors) >= least


def test_large_tiles_are_taken_where_all_multiprocessors_are_busy_either_way():
    product = Product(1, 1 << 14, 1 << 14, 2240, 2)
    for target in SHARED:
        shapes = block_shapes(HALF, target, SILU_WIDEST)
        assert min(shapes, key=lambda shape: product.cycles(shape, target, 16)).tile != (64, 64)


def test_no_more_programs_are_expected_on_a_multiprocessor_than_fit():
    """`python -m sana_cli.kernels.aot --json > benchmarks/kernels.json` counts them."""
    known: dict[tuple, float] = {}
    for cost in measured("kernels.json"):
        kernel, *words = cost["case"].split()
        for word in words if "float32" not in words else ():
            place = kernel, word, cost["arch"]
            known[place] = min(known.get(place, math.inf), cost["programs"])
    for target in SHARED:
        arch = 10 * target[0] + target[1]
        x, x8 = like(1, 64, 128, dtype=HALF), like_rows8(like(1, 64, 128, dtype=HALF))
        for kernel, shapes in {
            "linear_silu_kernel": block_shapes(HALF, target, SILU_WIDEST),
            "gated_residual_linear_kernel": block_shapes(HALF, target, RESIDUAL_WIDEST),
            "project_queries_kernel": block_shapes(HALF, target, RESIDUAL_WIDEST),
            "linear_silu8_kernel": block_shapes8(x8, target),
        }.items():
            for shape in shapes:
                word = "x".join(map(str, shape.tile))
                assert shape.resident <= known[kernel, word, arch]
        for tokens in (x, x8):
            for shape in qkv_shapes(tokens, target):
                assert shape.resident <= known["project_qkv_kernel", str(shape.m), arch]


# --- what is measured and kept -----------------------------------------------------------------


@pytest.fixture
def timed(monkeypatch) -> Callable[..., list[Blocks]]:
    """Let shapes take the given seconds on a GPU; gives the list of those that are measured."""
    monkeypatch.setattr(tiles, "_fastest", {})
    monkeypatch.setattr(selfcheck, "_unkept", [])
    monkeypatch.setattr(selfcheck, "_said", set())
    monkeypatch.setattr(tiles, "_runs", lambda device: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)

    def prepare(seconds: Callable[[Blocks], float]) -> list[Blocks]:
        found: list[Blocks] = []

        def measure(run, device):
            found.append(run())
            return seconds(found[-1])

        monkeypatch.setattr(tiles, "_seconds", measure)
        return found

    return prepare


def choose(product: Product = OUT, kernel: str = "linear_silu") -> Blocks:
    return tiles.choose(kernel, product, SHAPES, torch.empty(1), lambda shape: shape)


def kept(cache: Path) -> list[Path]:
    return list((cache / "kernels").glob("*.json"))


def first(product: Product) -> Blocks:
    """The shape with the best prediction, without a GPU."""
    return min(SHAPES, key=lambda shape: product.cycles(shape, (8, 0), 76))


def test_the_fastest_of_three_candidates_is_kept_for_a_size(timed, cache):
    found = timed(lambda shape: shape.m)
    fastest = choose()
    assert len(found) == CANDIDATES
    assert fastest.m == min(shape.m for shape in found)
    assert choose() == fastest and len(found) == CANDIDATES, "it is known"
    tiles._fastest.clear()
    assert choose() == fastest and len(found) == CANDIDATES, "another process reads it"
    choose(UP)
    choose(OUT, "attend_text")
    assert len(found) == 3 * CANDIDATES, "another size, another kernel"
    (path,) = kept(cache)
    assert len(json.loads(path.read_text())) == 3


def test_a_graph_contains_what_the_call_before_its_capture_chose(timed, monkeypatch):
    found = timed(lambda shape: shape.m)
    before = choose()
    assert before != first(OUT)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert choose() == before
    assert choose(UP) == first(UP) and len(found) == CANDIDATES, "nothing is measured in a capture"


def test_the_prediction_has_to_be_beaten_clearly(timed):
    predicted = first(OUT)
    timed(lambda shape: 1.0 if shape == predicted else 0.99)
    assert choose() == predicted


@pytest.mark.parametrize("text", ["", "[1", "[]", "3"])
def test_a_broken_file_is_measured_again(timed, cache, text):
    found = timed(lambda shape: 1.0)
    choose()
    (path,) = kept(cache)
    path.write_text(text)
    tiles._fastest.clear()
    choose()
    assert len(found) == 2 * CANDIDATES
    assert json.loads(path.read_text())


def test_a_tile_that_is_no_longer_a_candidate_is_measured_again(timed, cache):
    found = timed(lambda shape: 1.0)
    choose()
    (path,) = kept(cache)
    path.write_text(json.dumps(dict.fromkeys(json.loads(path.read_text()), [512, 512])))
    tiles._fastest.clear()
    assert choose() in SHAPES
    assert len(found) == 2 * CANDIDATES


def test_without_memory_to_measure_the_prediction_is_used_this_time(timed, cache):
    def full(shape: Blocks) -> float:
        raise torch.OutOfMemoryError("CUDA out of memory")

    timed(full)
    assert choose() == first(OUT)
    assert kept(cache) == []


def test_a_kernel_that_fails_is_not_hidden(timed):
    def failing(shape: Blocks) -> float:
        raise RuntimeError("no kernel image is available")

    timed(failing)
    with pytest.raises(RuntimeError, match="no kernel image"):
        choose()


def test_a_cache_that_cannot_be_written_is_said(timed, tmp_path, monkeypatch):
    found = timed(lambda shape: 1.0)
    (tmp_path / "file").touch()
    monkeypatch.setenv("SANA_CACHE_DIR", str(tmp_path / "file"))
    choose()
    choose()
    assert len(found) == CANDIDATES
    (text,) = selfcheck.remarks("cpu", [])
    assert text.startswith("the fastest block shapes cannot be kept in")


def test_what_changes_the_result_is_not_left_to_a_measurement(timed, cache):
    found = timed(lambda shape: 1.0)
    assert tiles.choose("project_qkv", OUT, SHAPES, torch.empty(1)) == first(OUT)
    assert found == kept(cache) == []


def test_nothing_is_measured_without_a_gpu(monkeypatch):
    monkeypatch.setattr(tiles, "_seconds", lambda run, device: pytest.fail("it was measured"))
    assert choose() == first(OUT)


def test_an_operation_in_place_is_measured_on_memory_of_its_own(timed):
    from sana_cli.kernels import projection_triton

    shapes = (1, 5, 32), (1, 5, 16), (32, 16)
    x, y, weight = (torch.randint(-4, 5, shape).float() for shape in shapes)  # sums are exact
    once = projection_triton.gated_residual_linear_(x.clone(), y, weight, None, None)
    found = timed(lambda result: 1.0)
    shapes = [Blocks(64, 64, 32, 4, 3), Blocks(32, 32, 32, 4, 3)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(projection_triton, "block_shapes", lambda *given: shapes)
        result = projection_triton.gated_residual_linear_(x, y, weight, None, None)
    assert len(found) == len(shapes)
    assert torch.equal(result, once)
