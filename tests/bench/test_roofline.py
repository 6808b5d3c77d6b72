"""What a step and a decode give a GPU to do: launches, bytes and FLOPs, counted without one."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import benchmarks.work
from benchmarks.tables import measured
from examples import exhaustive

pytest.importorskip("triton")

from sana_cli.bench.roofline import Launches, launches
from sana_cli.kernels.rms_norm import rms_norm
from sana_cli.models.architectures import DC_AE_F32C32, TRANSFORMERS
from sana_cli.models.dc_ae import DCAE
from sana_cli.models.dit import DiT
from sana_cli.models.fused_dit import FusedDiT, TimeModulation
from sana_cli.models.streaming.autoencoder import decode, prepare
from sana_cli.pipeline.plan import GPU_STRIP_BYTES


def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def step(name: str, *lengths: int) -> Launches:
    """One step at 1024x1024 with texts of so many tokens."""
    config = TRANSFORMERS[name]
    with torch.device("meta"):
        fused = FusedDiT(DiT(config).requires_grad_(False).bfloat16())
    texts = [fused.encode_text(empty(1, length, config.caption_channels)) for length in lengths]
    modulation = empty(6, config.width)
    time = TimeModulation(modulation, modulation[0], modulation[:0])
    return launches(lambda: fused(empty(1, 32, 32, 32), time, texts))


def decoding(side: int) -> Launches:
    with torch.device("meta"):
        decoder = DCAE(DC_AE_F32C32).decoder.requires_grad_(False)
    prepare(decoder, torch.bfloat16)
    latent = empty(1, 32, side // 32, side // 32)
    return launches(lambda: decode(decoder, latent, strip_bytes=GPU_STRIP_BYTES))


@pytest.mark.parametrize(
    ("name", "lengths", "most", "gigabytes", "teraflops"),
    [
        ("sana-0.6b", (1, 30), 372, 5.36, 1.83),
        ("sana-sprint-0.6b", (30,), 371, 3.76, 1.04),  # softmax attention included
        *exhaustive(
            ("sana-0.6b", (1, 60), 344, 5.47, 1.92),
            ("sana-1.6b", (1, 30), 268, 8.53, 4.83),
            ("sana1.5-1.6b", (1, 30), 288, 9.83, 5.13),  # softmax attention included
        ),
    ],
)
def test_a_step_stays_within_its_launches_bytes_and_flops(
    name, lengths, most, gigabytes, teraflops
):
    counted = step(name, *lengths)
    assert counted.count <= most
    assert counted.bytes <= gigabytes * 1e9
    assert 0.98 * teraflops * 1e12 < counted.flops <= teraflops * 1e12


@pytest.mark.parametrize(
    ("side", "most", "gigabytes", "teraflops"),
    [(1024, 180, 14.6, 7.4), *exhaustive((4096, 2579, 429.9, 118.2))],
)
def test_a_decode_stays_within_its_launches_bytes_and_flops(side, most, gigabytes, teraflops):
    counted = decoding(side)
    assert counted.count <= most
    assert counted.bytes <= gigabytes * 1e9
    assert 0.98 * teraflops * 1e12 < counted.flops <= teraflops * 1e12


@pytest.mark.parametrize("size", ["0.6B", *exhaustive("1.6B")])
def test_predictions_for_gpus_stand_on_what_is_launched_today(size):
    found = benchmarks.work.counted(benchmarks.work.MODELS[size])
    assert found == measured("work.json")["models"][size]


@pytest.mark.parametrize("side", [512, *exhaustive(1024, 2048, 4096)])
def test_the_launches_of_decodes_are_those_of_today(side):
    (found,) = benchmarks.work.decodes([side]).values()
    assert found == measured("work.json")["decodes"][str(side)]


def test_every_operand_is_read_once_and_every_result_written_once():
    x, y, row = empty(10, 20), empty(10, 20), empty(20)
    for work, operands in {
        (lambda: x + y): 3,
        (lambda: x.add_(y)): 3,
        (lambda: torch.add(x, y, out=y)): 3,
        (lambda: x + row.expand(10, 20)): 2.1,
        (lambda: x.copy_(y)): 2,
        (lambda: x.zero_()): 1,
        (lambda: x.t()[:5].flatten()): 0.5,
        (lambda: F.linear(x, y)): 2.5,
        (lambda: rms_norm(x, row, row, 1e-5)): 2.2,  # in place
    }.items():
        counted = launches(work)
        assert (counted.count, counted.bytes) == (1, round(operands * x.nbytes))


def test_views_and_fresh_memory_cost_nothing():
    x = empty(10, 20)
    assert launches(lambda: torch.empty_like(x.t()[3:].unflatten(0, (-1, 1)))).count == 0
    assert launches(lambda: torch.ones(3)).count == 0  # on the CPU
