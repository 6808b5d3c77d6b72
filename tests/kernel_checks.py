"""Where the Triton kernels run in tests, and memory in which unwritten elements show.

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
        # Products of float32 use no tensor cores; `fault` names others beside them that lack them.
        exact = "float32" in cost["case"]
        assert not cost["matrices"] or exact or "MMA" in cost["tensor_cores"]
    return {cost["case"] for cost in costs}
