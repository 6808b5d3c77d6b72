"""Flow-DPM-Solver++ (2M), Flow-Euler and SCM as pure functions of floats.

The flow runs from noise at σ = 1 to the image at σ = 0 with x_σ = (1-σ)·x₀ + σ·noise, and the
network predicts the velocity v = noise - x₀ (arXiv 2410.10629, section 2.3 and appendix on
Flow-DPM-Solver). The arithmetic is that of diffusers' `DPMSolverMultistepScheduler` with flow
sigmas, `FlowMatchEulerDiscreteScheduler` and `SCMScheduler`.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

TRAIN_STEPS = 1000
SCM_FIRST_ANGLE = 1.5708  # just beyond π/2, as in the reference
SCM_TWO_STEPS = (SCM_FIRST_ANGLE, 1.3, 0.0)  # the middle one was tuned for these models


class Schedule(NamedTuple):
    """Decreasing noise levels and timesteps; `sigmas` has one more entry, 0, at the end."""

    sigmas: tuple[float, ...]
    timesteps: tuple[float, ...]


class Update(NamedTuple):
    """The factors of one step of a solver, which is linear in the tensors.

    The estimate of x₀ is x - sigma·v, and the next sample is sample·x + clean·(that estimate)
    + history·(that estimate - the one of the step before) + noise·(fresh noise).
    """

    sigma: float
    sample: float
    clean: float
    history: float = 0.0
    noise: float = 0.0


@dataclass(frozen=True)
class Solver:
    """`schedule(steps, shift)`, and `update(schedule, i)`: the step from sigmas[i] to sigmas[i+1].

    A `stochastic` solver needs fresh noise at every step.
    """

    schedule: Callable[[int, float | None], Schedule]
    update: Callable[[Schedule, int], Update]
    stochastic: bool = False


class Repaint(NamedTuple):
    """The latents to keep: float32 z (1, 32, h, w), and mask m (1, 1, h, w), 1 to repaint.

    The estimate of x₀ becomes z + m·(x₀ - z). Where m is 0 every estimate is z, so the history of
    a multistep solver vanishes there, and from x_σ = (1-σ)·z + σ·noise each step leads to
    (1-σ')·z + σ'·noise exactly: the kept part follows its own noised image to the end.
    """

    latents: Tensor
    mask: Tensor


def advance(
    update: Update,
    x: Tensor,
    velocity: Tensor,
    previous: Tensor | None,
    noise: Tensor | None,
    repaint: Repaint | None = None,
) -> tuple[Tensor, Tensor]:
    """Return (the next sample, this step's estimate of x₀). All float32, of one shape.

    `previous` is the estimate of the previous step, None at the first.
    """
    clean = x - update.sigma * velocity
    if repaint is not None:
        clean = torch.lerp(repaint.latents, clean, repaint.mask)
    moved = update.sample * x + update.clean * clean
    if previous is not None:
        moved += update.history * (clean - previous)
    if noise is not None:
        moved += update.noise * noise
    return moved, clean


def shifted(sigma: float, shift: float | None) -> float:
    """Move noise levels towards 1, as larger images need (SD3, arXiv 2403.03206, eq. 23)."""
    return sigma if shift is None else shift * sigma / (1 + (shift - 1) * sigma)


def flow_dpm_schedule(steps: int, shift: float | None) -> Schedule:
    last = 1 / TRAIN_STEPS
    alphas = [1 + i * (last - 1) / steps for i in range(steps)] + [last]
    sigmas = [shifted(1 - alpha, shift) for alpha in alphas[:0:-1]]
    # The network was trained on integer timesteps, so it is given the truncated one.
    return Schedule(_float32([*sigmas, 0.0]), tuple(float(int(s * TRAIN_STEPS)) for s in sigmas))


def flow_dpm_update(schedule: Schedule, i: int) -> Update:
    """Return one multistep update.

    DPM-Solver++ (arXiv 2211.01095, algorithm 2) with α = 1-σ and λ = ln(α/σ). The first and the
    last step are of first order; the last lands on x₀ itself.
    """
    sigma, target = schedule.sigmas[i], schedule.sigmas[i + 1]
    if target == 0:
        return Update(sigma, 0.0, 1.0)
    h = _log_snr(target) - _log_snr(sigma)
    gain = -(1 - target) * math.expm1(-h)
    history = 0.0
    if i > 0:
        r = (_log_snr(sigma) - _log_snr(schedule.sigmas[i - 1])) / h
        history = 0.5 * gain / r
    return Update(sigma, target / sigma, gain, history)


def flow_euler_schedule(steps: int, shift: float | None) -> Schedule:
    # The reference shifts its training grid once and the grid of the run a second time.
    low = shifted(1 / TRAIN_STEPS, shift)
    grid = [1 + i * (low - 1) / max(steps - 1, 1) for i in range(steps)]
    sigmas = _float32([shifted(value, shift) for value in grid])
    return Schedule((*sigmas, 0.0), _float32([s * TRAIN_STEPS for s in sigmas]))


def flow_euler_update(schedule: Schedule, i: int) -> Update:
    sigma, target = schedule.sigmas[i], schedule.sigmas[i + 1]
    return Update(sigma, target / sigma, 1 - target / sigma)


def scm_schedule(steps: int, shift: float | None) -> Schedule:
    """Return the noise levels of Sana-Sprint, whose network is given σ itself.

    Its paper (arXiv 2503.09641, section 3.1) moves the flow to the circle of TrigFlow,
    x_t = cos t·x₀ + sin t·noise, only to train it. The two are one path in two scales, with
    σ = sin t / (sin t + cos t) and x_σ = x_t / (sin t + cos t), so sampling stays with the flow.
    """
    evenly = [SCM_FIRST_ANGLE * (1 - i / steps) for i in range(steps + 1)]
    angles = _float32(SCM_TWO_STEPS if steps == 2 else evenly)
    sigmas = _float32([math.sin(t) / (math.sin(t) + math.cos(t)) for t in angles])
    return Schedule(sigmas, sigmas[:-1])


def scm_update(schedule: Schedule, i: int) -> Update:
    """Jump to x₀, then noise it afresh to the next level (arXiv 2303.01469, algorithm 1)."""
    sigma, target = schedule.sigmas[i], schedule.sigmas[i + 1]
    return Update(sigma, 0.0, 1 - target, noise=target)


def first_step(steps: int, strength: float | None) -> int:
    """Return the step that a run starts at: 0 from noise, later from a partly noised image.

    `strength` in (0, 1] is the share of the steps that are run, rounded up.
    """
    return 0 if strength is None else int(steps - steps * strength)


def _log_snr(sigma: float) -> float:
    return math.log(1 - sigma) - math.log(sigma)


def _float32(values: Sequence[float]) -> tuple[float, ...]:
    """Round values to float32, as the reference stores them."""
    return tuple(torch.tensor(values, dtype=torch.float32).tolist())


SOLVERS = {
    "flow-dpm": Solver(flow_dpm_schedule, flow_dpm_update),
    "flow-euler": Solver(flow_euler_schedule, flow_euler_update),
    "scm": Solver(scm_schedule, scm_update, stochastic=True),
}
