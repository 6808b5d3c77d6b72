"""Random inputs of every dtype, and memory in which unwritten elements show."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from examples import exhaustive
from kernel_checks import DEVICE, DTYPES, poison_allocations

torch.backends.cudnn.allow_tf32 = False  # float32 is what others are compared with


# On a GPU, where they take no time, run them all: `pytest tests/kernels -m ""`.
FIRST, *OTHERS = reversed(DTYPES)


@pytest.fixture(
    params=[FIRST, *exhaustive(*OTHERS)], ids=lambda dtype: str(dtype).removeprefix("torch.")
)
def dtype(request) -> torch.dtype:
    return request.param


@pytest.fixture
def draw(dtype) -> Callable[..., Tensor]:
    """Draw a normally distributed tensor of a shape: `draw(2, 3, size=0.1)`."""
    generator = torch.Generator().manual_seed(5)

    def normal(*shape: int, size: float = 1.0) -> Tensor:
        return (torch.randn(shape, generator=generator) * size).to(DEVICE, dtype)

    return normal


@pytest.fixture(autouse=True)
def poisoned_allocations(monkeypatch):
    poison_allocations(monkeypatch)
