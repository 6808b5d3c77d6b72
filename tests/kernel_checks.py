"""Where the Triton kernels run in tests, and how near they must be to the torch lines in float64.

With a GPU the compiled kernels run, without one Triton's interpreter on the CPU (see conftest).
"""

import json
import math
import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
# Interpreters before 3.9 are incompatible with numpy 2.4; the compiler is not.
MIN_TRITON = None if ON_GPU else "3.9"
# The interpreter treats the bits of bfloat16 as integers.
DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if ON_GPU else [])]
# Minimum signal to noise in dB, against the torch lines in float64. A result rounded once to p bits
# has about 6·p + 6 dB: 150 in float32 (p = 24), 72 in float16 (11), 54 in bfloat16 (8). Like torch,
# kernels round k up to three times and v once before their product, which costs 6 dB. A state in
# tf32 has 80 dB, a float32 sum of thousands of terms 130. One wrong element in 10,000 leaves 40 dB.
LEAST = {torch.float32: 125.0, torch.float16: 62.0, torch.bfloat16: 44.0}


def decibels(found: Tensor, true: Tensor) -> float:
    """Signal to noise of `found`."""
    assert found.shape == true.shape
    noise = (found.double() - true).square().sum()
    return (10 * torch.log10(true.square().sum() / noise)).item() if noise else math.inf


def poison_allocations(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fill fresh memory with NaN or 77, so that elements that a kernel fails to write show."""

    def poison(x: Tensor) -> Tensor:
        return x.fill_(math.nan if x.is_floating_point() else 77)

    with torch.device(DEVICE):
        torch.empty(0)  # torch caches the functions it finds in the first such block
    for place, name in ((torch, "empty"), (torch, "empty_like"), (Tensor, "new_empty")):
        empty = getattr(place, name)
        monkeypatch.setattr(place, name, lambda *a, empty=empty, **b: poison(empty(*a, **b)))


def compiled_cases(*words: str) -> set[str]:
    """Return the cases that a command compiles for sm_89, all without a fault."""
    # Triton compiles where it is not told to interpret.
    kept = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-P", *words, "--arch", "89", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, env=kept, timeout=600)
    assert done.returncode == 0, done.stderr
    costs = json.loads(done.stdout)
    for cost in costs:
        assert 0 < cost["registers"] <= 255
        assert cost["stack"] == 0
        assert cost["fault"] is None
        assert not cost["matrices"] or "MMA" in cost["tensor_cores"]
    return {cost["case"] for cost in costs}
