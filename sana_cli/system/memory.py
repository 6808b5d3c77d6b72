"""The peak memory of tensors on any device, including `meta`, where they take none."""

import weakref
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


class PeakMemory(TorchDispatchMode):
    """Count the bytes of live tensors that are made inside the `with` block.

    `peak` is the largest sum at any time. Each storage that an operation returns is counted once,
    however many views it has. Memory that an operation allocates and frees internally is not
    counted: workspaces of convolutions, copies in mixed precision.
    """

    def __init__(self) -> None:
        super().__init__()
        self.held = self.peak = 0
        self._known: weakref.WeakSet[Any] = weakref.WeakSet()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        for given in tree_iter((args, kwargs)):
            if isinstance(given, Tensor):
                self._known.add(given.untyped_storage())
        result = func(*args, **(kwargs or {}))
        for made in tree_iter(result):
            if isinstance(made, Tensor):
                self._count(made.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        if storage not in self._known:
            self._known.add(storage)
            self._held(storage.nbytes())
            weakref.finalize(storage, self._held, -storage.nbytes())

    def _held(self, nbytes: int) -> None:
        self.held += nbytes
        self.peak = max(self.peak, self.held)
