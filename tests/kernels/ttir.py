"""Executes the checks of the kernels on the intermediate code (TTIR) that Triton compiles them to.

    python tests/kernels/ttir.py {DTYPE,faulty,shapes}

ttsem executes each launch on the CPU, adding in the order of the code, in any dtype. It raises an
error where a program reads or writes outside the tensors it was given, where two programs touch
the same element and one of them writes it, and where an operation has no defined result. Memory
that nothing has written holds NaN. A process of its own runs it, as Triton compiles there: the
interpreter is chosen once, at the first import. One line of JSON is printed for each check.
"""

import json
import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl
from ttsem import memory, sanitize

from sana_cli.kernels import selfcheck
from sana_cli.kernels.aot import SHARED
from sana_cli.kernels.launch import launch
from sana_cli.kernels.projection_triton import (
    block_shapes,
    gated_residual_linear_,
    linear_silu,
)
from sana_cli.kernels.rows8 import Rows8, Weight8, quantise, quantise_weight
from sana_cli.kernels.rows8_triton import Blocks8, block_shapes8
from sana_cli.kernels.selfcheck import least


def checked(dtype: torch.dtype) -> Iterator[dict]:
    for check in selfcheck.all_checks(torch.device("cpu"), dtype):
        needed = least(dtype) if check.least is None else check.least
        yield {"operation": check.operation, "decibels": check.error(), "least": needed}


def shapes() -> Iterator[dict]:
    """Compute products in every block shape of every GPU."""
    generator = torch.Generator().manual_seed(5)
    draw = partial(torch.randn, generator=generator, dtype=torch.float16)
    x, weight, bias = draw(1, 70, 150), draw(140, 150), draw(140)
    floats = {blocks for target in SHARED for blocks in block_shapes(x.dtype, target, 256)}
    of_floats = partial(linear_silu, x, weight, bias)
    yield {"of": "floats", "equal": _same(of_floats, floats)}
    for grouped in (False, True):
        rows, weight8 = quantise(x, grouped), quantise_weight(weight)
        integers = {blocks for target in SHARED for blocks in block_shapes8(rows, target)}
        of_rows = partial(_add if grouped else linear_silu, rows, weight8, bias)
        yield {"of": f"int8, {grouped}", "equal": _same(of_rows, integers)}


def _add(rows: Rows8, weight: Weight8, bias: torch.Tensor, blocks: Blocks8) -> torch.Tensor:
    x = torch.ones(1, 70, 140, dtype=torch.float16)
    return gated_residual_linear_(x, rows, weight, bias, None, blocks)


def _same(compute: Callable[[Any], torch.Tensor], blocks: set) -> bool:
    first, *others = map(compute, blocks)
    return bool(others) and all(torch.equal(first, other) for other in others)


def faulty() -> Iterator[dict]:
    """Launch a kernel that is right, one without its mask, and one of which two programs meet."""
    for size, step in ((64, 32), (50, 32), (64, 16)):
        x = torch.empty(size)
        try:
            launch(fill_kernel, (2,), x, STEP=step, BLOCK=32, num_warps=4)
            yield {"fault": None}
        except sanitize.KernelFault as found:
            yield {"fault": found.fault.kind}


@triton.jit
def fill_kernel(x, STEP: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0) * STEP + tl.arange(0, BLOCK)
    tl.store(x + at, at * 0.0 + tl.program_id(0))


def main(what: str) -> None:
    memory.ACCESS_BUDGET *= 5  # for the products of float32, whose tiles are small
    # The block shapes are those of the least capability, and the code that of sm_80.
    with sanitize.session(cc=80) as session:
        lines = {"faulty": faulty, "shapes": shapes}.get(what)
        for line in lines() if lines else checked(getattr(torch, what)):
            print(json.dumps(line))  # noqa: T201
    print(json.dumps({"launches": session.launches, "unchecked": session.races_unchecked}))  # noqa: T201


if __name__ == "__main__":
    main(*sys.argv[1:])
