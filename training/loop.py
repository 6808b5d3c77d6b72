"""The loop that every stage runs: batches from workers, steps, logs, states it resumes from.

What a step does depends on the seed and the number of the step and on nothing else, so a run that
was killed and started again ends in the same weights, to the bit, as one that was not.
"""

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from training.arithmetic import autocast, fast_products
from training.optim import Average, Muon, descend, load_state, open_log, save_state, schedule

Batch = Any  # of numpy arrays, which go through a pipe: shared memory may be scarce
Losses = dict[str, Tensor]  # by name, the first is descended


@dataclass
class Stage:
    name: str
    model: nn.Module
    steps: int
    rate: float
    average_decay: float
    batch: Callable[[int], Batch]  # of a step's number; runs in a worker, on the CPU
    losses: Callable[[Batch], Losses]
    weight_decay: float = 0.0
    rate_decay: float = 0.4  # the share of the steps, the last, over which the rate falls to zero


@dataclass(frozen=True)
class Machine:
    """Where it runs, and what of that may not change the result but for rounding."""

    device: str
    workers: int
    save_seconds: float
    log_every: int = 25


def train(stage: Stage, folder: Path, machine: Machine, seed: int) -> nn.Module:
    """Run a stage, or what is left of it; its averaged weights, frozen."""
    model = stage.model.to(machine.device)
    optimiser = Muon(model, stage.rate, stage.weight_decay)
    average = Average(model, stage.average_decay)
    state = folder / f"{stage.name}.safetensors"
    note = load_state(state, model, average, optimiser) or {"step": 0, "seconds": 0.0}
    began = saved = time.monotonic()
    shown: list[Losses] = []
    first = note["step"]
    batches = ahead(stage.batch, range(first, stage.steps), machine.workers)
    with fast_products(machine.device), open_log(folder / f"{stage.name}.jsonl", first) as log:
        for step, batch in zip(range(first, stage.steps), batches, strict=True):
            torch.manual_seed(seed * 1_000_003 + step)
            with autocast(machine.device):
                losses = stage.losses(batch)
            rate = stage.rate * schedule(step, stage.steps, stage.rate_decay)
            descend(next(iter(losses.values())), model, optimiser, average, rate, step)
            shown.append({name: loss.detach() for name, loss in losses.items()})
            last = step + 1 == stage.steps
            if (step + 1) % machine.log_every and not last:
                continue
            now = time.monotonic()
            told = {"step": step + 1, "seconds": note["seconds"] + now - began}
            print(json.dumps(_row(told, shown)), file=log, flush=True)
            shown = []
            if last or now - saved >= machine.save_seconds:
                save_state(state, model, average, optimiser, told)
                saved = now
    average.copy_to(model)
    model.zero_grad()  # a later stage of a part of it clips by the gradients that there are
    return model.eval().requires_grad_(False)


def _row(told: dict, shown: list[Losses]) -> dict:
    """The means of all losses since the last row; only here does a GPU have to be waited for."""
    means = {k: torch.stack([one[k].float() for one in shown]).mean().item() for k in shown[0]}
    return (
        {"step": told["step"]}
        | {name: round(mean, 5) for name, mean in means.items()}
        | {"seconds": round(told["seconds"], 1)}
    )


def ahead(make: Callable[[int], Batch], numbers: range, workers: int) -> Iterator[Batch]:
    """`make` of each number, in order, made ahead by worker processes if there are any."""
    if not workers or not numbers:
        return map(make, numbers)
    return iter(
        DataLoader(
            _Made(make),
            batch_size=None,
            sampler=numbers,
            num_workers=min(workers, len(numbers)),
            prefetch_factor=4,
            collate_fn=_as_it_is,
        )
    )


def _as_it_is(batch: Batch) -> Batch:
    return batch


class _Made(Dataset):
    def __init__(self, make: Callable[[int], Batch]) -> None:
        self.make = make

    def __getitem__(self, number: int) -> Batch:
        return self.make(number)
