"""The samplers against diffusers' schedulers, and against what an integrator must do."""

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler

from sana_cli.solver import SOLVERS, flow_dpm_schedule

STEPS = [1, 2, 3, 4, 14, 15, 20, 50]


def reference(solver: str, shift: float):
    if solver == "flow-euler":
        return FlowMatchEulerDiscreteScheduler(shift=shift)
    return DPMSolverMultistepScheduler(
        flow_shift=shift, use_flow_sigmas=True, prediction_type="flow_prediction"
    )


@pytest.mark.parametrize("solver", list(SOLVERS))
@pytest.mark.parametrize("shift", [3.0, 6.0])
@pytest.mark.parametrize("steps", STEPS)
def test_a_trajectory_is_that_of_diffusers(solver, shift, steps):
    theirs = reference(solver, shift)
    theirs.set_timesteps(steps)
    ours = SOLVERS[solver]
    schedule = ours.schedule(steps, shift)
    torch.testing.assert_close(torch.tensor(schedule.timesteps), theirs.timesteps.float())
    torch.testing.assert_close(
        torch.tensor(schedule.sigmas), theirs.sigmas.float(), rtol=0, atol=1e-7
    )
    a = b = torch.randn(1, 4, 3, 3, generator=torch.Generator().manual_seed(0))
    previous = None
    for i, timestep in enumerate(theirs.timesteps):
        a = theirs.step(torch.tanh(1.3 * a + 0.1), timestep, a, return_dict=False)[0]
        b, previous = ours.step(schedule, i, b, torch.tanh(1.3 * b + 0.1), previous)
    torch.testing.assert_close(a, b, rtol=0, atol=2e-6)


def test_the_published_schedule_of_twenty_steps():
    assert flow_dpm_schedule(20, 3.0).timesteps == (
        *(999, 982, 963, 944, 922, 899, 874, 847, 817, 785),
        *(749, 710, 666, 617, 562, 499, 428, 345, 249, 136),
    )


@pytest.mark.parametrize("solver", list(SOLVERS))
def test_a_straight_flow_is_followed_exactly(solver):
    """With the true velocity of one picture, every number of steps lands on that picture."""
    clean = torch.randn(1, 4, 3, 3, generator=torch.Generator().manual_seed(1))
    for steps in (1, 2, 5, 20):
        schedule = SOLVERS[solver].schedule(steps, 3.0)
        noise = torch.randn(1, 4, 3, 3, generator=torch.Generator().manual_seed(2))
        first = schedule.sigmas[0]
        sample, previous = (1 - first) * clean + first * noise, None
        for i in range(steps):
            sample, previous = SOLVERS[solver].step(schedule, i, sample, noise - clean, previous)
        torch.testing.assert_close(sample, clean, rtol=0, atol=2e-5)


def test_more_steps_come_closer_and_the_second_order_solver_faster():
    """Error against 500 steps on a smooth nonlinear flow: the claim of Flow-DPM-Solver."""

    def solve(solver: str, steps: int) -> torch.Tensor:
        schedule = SOLVERS[solver].schedule(steps, 3.0)
        sample, previous = torch.linspace(-2, 2, 64, dtype=torch.float64), None
        for i, sigma in enumerate(schedule.sigmas[:-1]):
            # The exact velocity where the data are normal with standard deviation 1/2.
            clean = sample * 0.25 * (1 - sigma) / (0.25 * (1 - sigma) ** 2 + sigma**2)
            sample, previous = SOLVERS[solver].step(
                schedule, i, sample, (sample - clean) / sigma, previous
            )
        return sample

    truth = solve("flow-dpm", 500)
    error = {n: (solve("flow-dpm", n) - truth).abs().mean().item() for n in (10, 20, 40)}
    assert error[40] < error[20] < error[10]
    assert error[20] < (solve("flow-euler", 20) - truth).abs().mean().item()
