"""The samplers against diffusers' schedulers, and against what an integrator must do."""

from types import SimpleNamespace

import pytest
import torch
from diffusers import (
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    SanaSprintImg2ImgPipeline,
    SCMScheduler,
)

from sana_cli.pipeline.solver import SOLVERS, advance, first_step, flow_dpm_schedule, scm_schedule

FLOWS = ["flow-dpm", "flow-euler"]
STEPS = [1, 2, 3, 4, 14, 15, 20, 50]


def reference(solver: str, shift: float):
    if solver == "flow-euler":
        return FlowMatchEulerDiscreteScheduler(shift=shift)
    return DPMSolverMultistepScheduler(
        flow_shift=shift, use_flow_sigmas=True, prediction_type="flow_prediction"
    )


@pytest.mark.parametrize("solver", FLOWS)
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
        velocity = torch.tanh(1.3 * b + 0.1)
        b, previous = advance(ours.update(schedule, i), b, velocity, previous, None)
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
            update = SOLVERS[solver].update(schedule, i)
            fresh = noise if SOLVERS[solver].stochastic else None
            sample, previous = advance(update, sample, noise - clean, previous, fresh)
        torch.testing.assert_close(sample, clean, rtol=0, atol=2e-5)


def test_more_steps_come_closer_and_the_second_order_solver_faster():
    """Error against 500 steps on a smooth nonlinear flow: the claim of Flow-DPM-Solver."""

    def solve(solver: str, steps: int) -> torch.Tensor:
        schedule = SOLVERS[solver].schedule(steps, 3.0)
        sample, previous = torch.linspace(-2, 2, 64, dtype=torch.float64), None
        for i, sigma in enumerate(schedule.sigmas[:-1]):
            # The exact velocity where the data are normal with standard deviation 1/2.
            clean = sample * 0.25 * (1 - sigma) / (0.25 * (1 - sigma) ** 2 + sigma**2)
            update = SOLVERS[solver].update(schedule, i)
            sample, previous = advance(update, sample, (sample - clean) / sigma, previous, None)
        return sample

    truth = solve("flow-dpm", 500)
    error = {n: (solve("flow-dpm", n) - truth).abs().mean().item() for n in (10, 20, 40)}
    assert error[40] < error[20] < error[10]
    assert error[20] < (solve("flow-euler", 20) - truth).abs().mean().item()


# --- SCM ---------------------------------------------------------------------------------------


def network(sample: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
    """A velocity that depends on both."""
    return torch.tanh(1.3 * sample + 0.1) * (1 + timestep)


def trigflow(steps: int, noise: list[torch.Tensor], image=None, first: int = 0) -> torch.Tensor:
    """What diffusers' Sprint pipelines do around their scheduler, on the circle of TrigFlow."""
    scheduler = SCMScheduler()
    scheduler.set_timesteps(steps, intermediate_timesteps=1.3 if steps == 2 else None)
    scheduler.set_begin_index(first)
    data = scheduler.config.sigma_data
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(noise[0].shape, generator=generator) * data
    if image is not None:
        t = scheduler.timesteps[first]
        x = torch.cos(t) * image * data + torch.sin(t) * x
    for t in scheduler.timesteps[first:-1]:
        u = torch.sin(t) / (torch.cos(t) + torch.sin(t))
        norm = torch.sqrt(u**2 + (1 - u) ** 2)
        scaled = x / data * norm
        v = network(scaled, u)
        out = ((1 - 2 * u) * scaled + (1 - 2 * u + 2 * u**2) * v) / norm * data
        x, clean = scheduler.step(out, t, x, generator=generator, return_dict=False)
    return clean / data


@pytest.mark.parametrize("strength", [None, 1.0, 0.75, 0.6, 0.5, 0.2])
@pytest.mark.parametrize("steps", [1, 2, 3, 4, 8])
def test_a_scm_run_is_that_of_diffusers_though_it_stays_with_the_flow(steps, strength):
    generator = torch.Generator().manual_seed(0)
    noise = [torch.randn(1, 4, 3, 3, generator=generator) for _ in range(steps + 1)]
    image = None if strength is None else torch.linspace(-2, 2, 36).view(1, 4, 3, 3)
    first = first_step(steps, strength)
    schedule = scm_schedule(steps, None)
    sample, previous = noise[0], None
    if image is not None:
        sample = torch.lerp(image, sample, schedule.sigmas[first])
    for i in range(first, steps):
        velocity = network(sample, torch.tensor(schedule.timesteps[i]))
        update, fresh = SOLVERS["scm"].update(schedule, i), noise[i - first + 1]
        sample, previous = advance(update, sample, velocity, previous, fresh)
    torch.testing.assert_close(sample, trigflow(steps, noise, image, first), rtol=0, atol=1e-5)


def test_the_published_noise_levels_of_scm():
    for steps, expected in {
        1: [1.0000037],
        2: [1.0000037, 0.7827080],
        3: [1.0000037, 0.6339759, 0.3660260],
        4: [1.0000037, 0.7071084, 0.5000009, 0.2928937],
    }.items():
        schedule = scm_schedule(steps, None)
        assert schedule.timesteps == pytest.approx(expected, abs=2e-7)
        assert schedule.sigmas == (*schedule.timesteps, 0.0)


@pytest.mark.parametrize("steps", range(1, 9))
@pytest.mark.parametrize("strength", [0.01, 0.1, 0.25, 1 / 3, 0.5, 0.6, 2 / 3, 0.75, 0.9, 1.0])
def test_image_to_image_begins_where_diffusers_does(steps, strength):
    pipe = SimpleNamespace(scheduler=SCMScheduler())
    pipe.scheduler.set_timesteps(steps, intermediate_timesteps=None)
    times, left = SanaSprintImg2ImgPipeline.get_timesteps(pipe, steps, strength, "cpu")
    assert first_step(steps, strength) == steps - left == steps + 1 - len(times)
