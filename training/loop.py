"""The training loop of every stage: batches from workers, steps, logs, and checkpoints.

A step depends only on the seed and on its number, so a run that was killed and resumed ends with
the same weights, to the bit, as an uninterrupted one.
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

Batch = Any  # numpy arrays, which are sent through a pipe: shared memory may be scarce
Losses = dict[str, Tensor]  # by name; the first one is minimised


@dataclass
class Stage:
    name: str
    model: nn.Module
    steps: int
    rate: float
    average_decay: float
    batch: Callable[[int], Batch]  # from the number of a step; runs in a worker, on the CPU
    losses: Callable[[Batch], Losses]
    weight_decay: float = 0.0
    rate_decay: float = 0.4  # last share of the steps, over which the rate falls to zero


@dataclass(frozen=True)
class Machine:
    """The settings of a run that change its result by rounding at most."""

    device: str
    workers: int
    save_seconds: float
    log_every: int = 25


def train(stage: Stage, folder: Path, machine: Machine, seed: int) -> nn.Module:
    """Run the steps of a stage that are not done yet; return its averaged weights, frozen."""
    model = stage.model.to(machine.device)
    optimiser = Muon(model, stage.rate, stage.weight_decay)
    average = Average(model, stage.average_decay)
    state = folder / f"{stage.name}.safetensors"
    note = load_state(state, model, average, optimiser) or {"step": 0, "seconds": 0.0}
    began = saved = time.monotonic()
    recent: list[Losses] = []  # since the last row of the log
    first = note["step"]
    batches = prefetch(stage.batch, range(first, stage.steps), machine.workers)
    with fast_products(machine.device), open_log(folder / f"{stage.name}.jsonl", first) as log:
        for step, batch in zip(range(first, stage.steps), batches, strict=True):
            torch.manual_seed(seed * 1_000_003 + step)
            with autocast(machine.device):
                losses = stage.losses(batch)
            rate = stage.rate * schedule(step, stage.steps, stage.rate_decay)
            descend(next(iter(losses.values())), model, optimiser, average, rate, step)
            recent.append({name: loss.detach() for name, loss in losses.items()})
            last = step + 1 == stage.steps
            if (step + 1) % machine.log_every and not last:
                continue
            now = time.monotonic()
            progress = {"step": step + 1, "seconds": note["seconds"] + now - began}
            print(json.dumps(_row(progress, recent)), file=log, flush=True)
            recent = []
            if last or now - saved >= machine.save_seconds:
                save_state(state, model, average, optimiser, progress)
                saved = now
    average.copy_to(model)
    model.zero_grad()  # a later stage of the same model clips by the norm of all gradients
    return model.eval().requires_grad_(False)


def _row(progress: dict, recent: list[Losses]) -> dict:
    """Return the mean of every loss since the last row. Only here the CPU waits for the GPU."""
    means = {k: torch.stack([one[k].float() for one in recent]).mean().item() for k in recent[0]}
    return (
        {"step": progress["step"]}
        | {name: round(mean, 5) for name, mean in means.items()}
        | {"seconds": round(progress["seconds"], 1)}
    )


def prefetch(make: Callable[[int], Batch], numbers: range, workers: int) -> Iterator[Batch]:
    """Yield `make(number)` in order, computed ahead by worker processes if there are any."""
    if not workers or not numbers:
        return map(make, numbers)
    return iter(
        DataLoader(
            _Batches(make),
            batch_size=None,
            sampler=numbers,
            num_workers=min(workers, len(numbers)),
            prefetch_factor=4,
            collate_fn=_unchanged,
        )
    )


def _unchanged(batch: Batch) -> Batch:
    return batch


class _Batches(Dataset):
    def __init__(self, make: Callable[[int], Batch]) -> None:
        self.make = make

    def __getitem__(self, number: int) -> Batch:
        return self.make(number)
