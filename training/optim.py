"""What the training stages share: the optimiser, the weight average, resumable states."""

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


def orthogonalised(update: Tensor, steps: int = 5) -> Tensor:
    """The nearest semi-orthogonal matrix, by the quintic Newton-Schulz iteration of Muon."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = update / (update.norm() + 1e-7)
    tall = x.shape[0] > x.shape[1]
    x = x.T if tall else x
    for _ in range(steps):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.T if tall else x


class Muon(torch.optim.Optimizer):
    """Momentum made orthogonal for matrices (Jordan 2024), AdamW for everything else.

    The orthogonal step is scaled by 0.2·√max(rows, columns), so that one learning rate serves
    both kinds (Liu et al. 2025, arXiv 2502.16982).
    """

    def __init__(self, model: nn.Module, lr: float, weight_decay: float = 0.0) -> None:
        matrices, others = [], []
        for module in model.modules():
            dense = isinstance(module, nn.Linear) or (
                isinstance(module, nn.Conv2d) and module.groups == 1
            )
            for name, parameter in module.named_parameters(recurse=False):
                small = parameter.ndim < 2 or min(parameter.flatten(1).shape) < 16
                wanted = dense and name == "weight" and not small
                (matrices if wanted else others).append(parameter)
        groups = [{"params": matrices, "matrix": True}, {"params": others, "matrix": False}]
        super().__init__(groups, {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                state["step"] = state.get("step", 0) + 1
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                update = (
                    self._matrix(parameter, state)
                    if group["matrix"]
                    else self._adam(parameter, state)
                )
                parameter.sub_(update, alpha=group["lr"])

    @staticmethod
    def _matrix(parameter: Tensor, state: dict) -> Tensor:
        momentum = state.setdefault("momentum", torch.zeros_like(parameter))
        momentum.lerp_(parameter.grad, 0.05)
        update = orthogonalised(parameter.grad.lerp(momentum, 0.95).flatten(1))
        return update.view_as(parameter) * (0.2 * math.sqrt(max(update.shape)))

    @staticmethod
    def _adam(parameter: Tensor, state: dict) -> Tensor:
        first = state.setdefault("first", torch.zeros_like(parameter))
        second = state.setdefault("second", torch.zeros_like(parameter))
        first.lerp_(parameter.grad, 0.1)
        second.lerp_(parameter.grad.square(), 0.02)
        corrected = second / (1 - 0.98 ** state["step"])
        return first / (1 - 0.9 ** state["step"]) / (corrected.sqrt() + 1e-8)


class Average:
    """Exponential moving average of the parameters, warmed up so that early steps fade fast."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.shadow = {k: v.detach().clone() for k, v in model.state_dict().items()}

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        decay = min(self.decay, (1 + step) / (10 + step))
        for name, value in model.state_dict().items():
            self.shadow[name].lerp_(value, 1 - decay)


def schedule(step: int, steps: int, warmup: int = 100, decay: float = 0.4) -> float:
    """Multiplier of the learning rate: linear up, flat, linear to zero over the last part."""
    return min(1.0, (step + 1) / warmup, (steps - step) / (decay * steps))


def descend(
    loss: Tensor, model: nn.Module, optimiser: Muon, average: Average, lr: float, step: int
) -> None:
    """One step down the gradient of `loss`, clipped to norm 1, and into the average."""
    optimiser.zero_grad(set_to_none=True)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for group in optimiser.param_groups:
        group["lr"] = lr
    optimiser.step()
    average.update(model, step)


# --- states: safetensors with a JSON header, written whole or not at all ---------------------


def save_state(path: Path, model: nn.Module, average: Average, optimiser: Muon, note: dict) -> None:
    tensors = {f"model.{k}": v.contiguous() for k, v in model.state_dict().items()}
    tensors |= {f"average.{k}": v.contiguous() for k, v in average.shadow.items()}
    for i, parameter in enumerate(_parameters(optimiser)):
        for name, value in optimiser.state[parameter].items():
            tensors[f"optimiser.{i}.{name}"] = torch.as_tensor(value).clone().contiguous()
    partial = path.with_suffix(".partial")
    save_file(tensors, partial, metadata={"note": json.dumps(note)})
    os.replace(partial, path)


def load_state(path: Path, model: nn.Module, average: Average, optimiser: Muon) -> dict | None:
    """Restore all three in place; the note that was saved with them, None if there is no file."""
    if not path.is_file():
        return None
    parameters = list(_parameters(optimiser))
    with safe_open(path, "pt") as file:
        names = list(file.keys())
        model.load_state_dict(
            {n.removeprefix("model."): file.get_tensor(n) for n in names if n.startswith("model.")}
        )
        for name in average.shadow:
            average.shadow[name].copy_(file.get_tensor(f"average.{name}"))
        for full in names:
            if full.startswith("optimiser."):
                _, index, name = full.split(".")
                value = file.get_tensor(full)
                optimiser.state[parameters[int(index)]][name] = (
                    int(value) if name == "step" else value
                )
        return json.loads(file.metadata()["note"])


def averaged(path: Path, model: nn.Module) -> nn.Module:
    """Load the averaged weights that a finished stage left."""
    with safe_open(path, "pt") as file:
        names = [n for n in file.keys() if n.startswith("average.")]  # noqa: SIM118
        model.load_state_dict({n.removeprefix("average."): file.get_tensor(n) for n in names})
    return model.eval().requires_grad_(False)


def open_log(path: Path, step: int) -> TextIO:
    """The log of a stage, for appending, without rows later than the step it resumes at."""
    rows = path.read_text().splitlines(keepends=True) if path.is_file() else []
    path.write_text("".join(row for row in rows if json.loads(row)["step"] <= step))
    return path.open("a")


def _parameters(optimiser: Muon) -> Iterable[nn.Parameter]:
    return (p for group in optimiser.param_groups for p in group["params"])
