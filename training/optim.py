"""The optimiser, the weight average, the learning rate schedule, and checkpoints."""

import json
import math
import os
from collections.abc import Iterable
from pathlib import Path
from typing import TextIO

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from training.arithmetic import fast_dtype


def orthogonalise(updates: Tensor, steps: int = 5) -> Tensor:
    """Return the nearest semi-orthogonal matrix of each matrix in (n, rows, columns), float32.

    Runs the quintic Newton-Schulz iteration of Muon on many matrices of one shape at a time, as in
    Jordan 2024 in bfloat16 where that is fast.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    x = updates / (updates.norm(dim=(1, 2), keepdim=True) + 1e-7)
    tall = x.shape[1] > x.shape[2]
    x = (x.mT if tall else x).to(fast_dtype(x.device.type))
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.mT if tall else x).to(updates.dtype)


class Muon(torch.optim.Optimizer):
    """Orthogonalised momentum for matrices (Jordan 2024), AdamW for all other parameters.

    The orthogonalised step is scaled by 0.2·√max(rows, columns), so that one learning rate suits
    both (Liu et al. 2025, arXiv 2502.16982). Parameters are updated as lists and matrices of one
    shape together: on a GPU the cost of a small model's step is the number of its launches.
    """

    def __init__(self, model: nn.Module, lr: float, weight_decay: float = 0.0) -> None:
        shapes: dict[tuple[int, int], list[nn.Parameter]] = {}
        others = []
        for module in model.modules():
            dense = isinstance(module, nn.Linear) or (
                isinstance(module, nn.Conv2d) and module.groups == 1
            )
            for name, parameter in module.named_parameters(recurse=False):
                if not parameter.requires_grad:
                    continue
                shape = tuple(parameter.flatten(1).shape) if parameter.ndim > 1 else (0, 0)
                if dense and name == "weight" and min(shape) >= 16:
                    shapes.setdefault(shape, []).append(parameter)
                else:
                    others.append(parameter)
        groups = [{"params": found, "matrix": True} for found in shapes.values()]
        super().__init__([*groups, {"params": others, "matrix": False}], {"lr": lr})
        self.weight_decay = weight_decay
        for group in self.param_groups:
            for parameter in group["params"]:
                names = ("momentum",) if group["matrix"] else ("first", "second")
                self.state[parameter] = {name: torch.zeros_like(parameter) for name in names}
        self.steps = 0

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        self.steps += 1
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            if not parameters:
                continue
            torch._foreach_mul_(parameters, 1 - group["lr"] * self.weight_decay)
            updates = (self._matrices if group["matrix"] else self._adam)(parameters)
            torch._foreach_sub_(parameters, updates, alpha=group["lr"])

    def _matrices(self, parameters: list[Tensor]) -> list[Tensor]:
        gradients = [parameter.grad for parameter in parameters]
        momenta = [self.state[parameter]["momentum"] for parameter in parameters]
        torch._foreach_lerp_(momenta, gradients, 0.05)
        ahead = torch._foreach_lerp(gradients, momenta, 0.95)
        orthogonal = orthogonalise(torch.stack([update.flatten(1) for update in ahead]))
        orthogonal = orthogonal * (0.2 * math.sqrt(max(orthogonal.shape[1:])))
        return [update.view_as(p) for update, p in zip(orthogonal, parameters, strict=True)]

    def _adam(self, parameters: list[Tensor]) -> list[Tensor]:
        gradients = [parameter.grad for parameter in parameters]
        first = [self.state[parameter]["first"] for parameter in parameters]
        second = [self.state[parameter]["second"] for parameter in parameters]
        torch._foreach_lerp_(first, gradients, 0.1)
        torch._foreach_lerp_(second, torch._foreach_mul(gradients, gradients), 0.02)
        root = torch._foreach_sqrt(torch._foreach_div(second, 1 - 0.98**self.steps))
        torch._foreach_add_(root, 1e-8)
        return torch._foreach_div(torch._foreach_div(first, 1 - 0.9**self.steps), root)


class Average:
    """Exponential moving average of the weights, with a warm-up in which early steps fade fast."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.values = list(model.state_dict().values())  # the model's own tensors, updated in place
        self.shadow = {k: v.detach().clone() for k, v in model.state_dict().items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        decay = min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(list(self.shadow.values()), self.values, 1 - decay)

    def copy_to(self, model: nn.Module) -> None:
        model.load_state_dict(self.shadow)


def schedule(step: int, steps: int, decay: float, warmup: int = 100) -> float:
    """Learning rate multiplier: linear warm-up, constant, linear to zero over the share `decay`."""
    down = (steps - step) / (decay * steps) if decay else 1.0
    return min(1.0, (step + 1) / warmup, down)


def descend(
    loss: Tensor, model: nn.Module, optimiser: Muon, average: Average, lr: float, step: int
) -> None:
    """Take one optimiser step on `loss`, with gradients clipped to norm 1; update the average."""
    optimiser.zero_grad(set_to_none=True)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0, foreach=True)
    for group in optimiser.param_groups:
        group["lr"] = lr
    optimiser.step()
    average.update(step)


# --- checkpoints: safetensors with a JSON header, written atomically -------------------------


def save_state(path: Path, model: nn.Module, average: Average, optimiser: Muon, note: dict) -> None:
    tensors = {f"model.{k}": v.contiguous() for k, v in model.state_dict().items()}
    tensors |= {f"average.{k}": v.contiguous() for k, v in average.shadow.items()}
    for i, parameter in enumerate(_parameters(optimiser)):
        for name, value in optimiser.state[parameter].items():
            tensors[f"optimiser.{i}.{name}"] = value.contiguous()
    partial = path.with_suffix(".partial")
    save_file(tensors, partial, metadata={"note": json.dumps(note | {"updates": optimiser.steps})})
    os.replace(partial, path)


def load_state(path: Path, model: nn.Module, average: Average, optimiser: Muon) -> dict | None:
    """Restore all three in place; return the note saved with them, or None if there is no file."""
    if not path.is_file():
        return None
    with safe_open(path, "pt") as file:
        note = json.loads(file.metadata()["note"])
        for name, value in model.state_dict().items():
            value.copy_(file.get_tensor(f"model.{name}"))
        for name, value in average.shadow.items():
            value.copy_(file.get_tensor(f"average.{name}"))
        for i, parameter in enumerate(_parameters(optimiser)):
            for name, value in optimiser.state[parameter].items():
                value.copy_(file.get_tensor(f"optimiser.{i}.{name}"))
    optimiser.steps = note["updates"]
    return note


def open_log(path: Path, step: int) -> TextIO:
    """Open the log of a stage for appending and drop rows later than the step it resumes at."""
    rows = path.read_text().splitlines(keepends=True) if path.is_file() else []
    path.write_text("".join(row for row in rows if json.loads(row)["step"] <= step))
    return path.open("a")


def _parameters(optimiser: Muon) -> Iterable[nn.Parameter]:
    return (p for group in optimiser.param_groups for p in group["params"])
