"""The loop that every stage runs: batches from workers, steps, logs, states it resumes from.

What a step does depends on the seed and the number of the step and on nothing else, so a run that
was killed and started again ends in the same weights, to the bit, as one that was not.
"""

import json
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from training.optim import Average, Muon, descend, load_state, open_log, save_state, schedule

LOG_EVERY = 25
Batch = Any
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


@dataclass(frozen=True)
class Machine:
    """Where it runs, and what of that may not change the result but for rounding."""

    device: str
    workers: int
    save_seconds: float

    def precision(self) -> AbstractContextManager:
        """bfloat16 products on a GPU, float32 on a CPU."""
        return torch.autocast("cuda", torch.bfloat16, enabled=self.device == "cuda")


def train(stage: Stage, folder: Path, machine: Machine, seed: int) -> nn.Module:
    """Run a stage, or what is left of it; its averaged weights, frozen."""
    model = stage.model.to(machine.device)
    optimiser = Muon(model, stage.rate, stage.weight_decay)
    average = Average(model, stage.average_decay)
    state = folder / f"{stage.name}.safetensors"
    note = load_state(state, model, average, optimiser) or {"step": 0, "seconds": 0.0}
    log = open_log(folder / f"{stage.name}.jsonl", note["step"])
    began = saved = time.monotonic()
    shown: list[Losses] = []
    first = note["step"]
    for step, batch in zip(range(first, stage.steps), stream(stage, first, machine), strict=True):
        torch.manual_seed(seed * 1_000_003 + step)
        with machine.precision():
            losses = stage.losses(batch)
        rate = stage.rate * schedule(step, stage.steps)
        descend(next(iter(losses.values())), model, optimiser, average, rate, step)
        shown.append({name: loss.detach() for name, loss in losses.items()})
        last = step + 1 == stage.steps
        if (step + 1) % LOG_EVERY == 0 or last:
            means = {k: torch.stack([one[k].float() for one in shown]).mean() for k in shown[0]}
            now = time.monotonic()
            seconds = note["seconds"] + now - began
            row = {"step": step + 1} | {k: round(v.item(), 5) for k, v in means.items()}
            print(json.dumps(row | {"seconds": round(seconds, 1)}), file=log, flush=True)
            shown = []
            if last or now - saved >= machine.save_seconds:
                told = {"step": step + 1, "seconds": seconds}
                save_state(state, model, average, optimiser, told)
                saved = now
    average.copy_to(model)
    return model.eval().requires_grad_(False)


def stream(stage: Stage, first: int, machine: Machine) -> Iterator[Batch]:
    """The batches of all steps from `first` on, in order, made ahead by worker processes."""
    return ahead(stage.batch, range(first, stage.steps), machine.workers)


def ahead(make: Callable[[int], Batch], numbers: range, workers: int) -> Iterator[Batch]:
    if not workers or not numbers:
        return map(make, numbers)
    return iter(
        DataLoader(
            _Made(make),
            batch_size=None,
            sampler=numbers,
            num_workers=min(workers, len(numbers)),
            prefetch_factor=8,
        )
    )


class _Made(Dataset):
    def __init__(self, make: Callable[[int], Batch]) -> None:
        self.make = make

    def __getitem__(self, number: int) -> Batch:
        return self.make(number)
