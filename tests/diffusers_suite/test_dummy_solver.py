"""The cases of diffusers' tests of its DPM solver, in the flow form that Sana's models use.

Its tests have no case with flow sigmas: these are its loops, samples and model with the scheduler
config that Sana's repositories have.
"""

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler

from sana_cli.pipeline.solver import SOLVERS, advance, first_step

SHIFT = 3.0
OURS = SOLVERS["flow-dpm"]
COUNT = 4 * 3 * 8 * 8


def sample_of(numbers: torch.Tensor) -> torch.Tensor:
    """(4, 3, 8, 8), from 0 to 1 in the order of their `dummy_sample_deter`."""
    return numbers.reshape(3, 8, 8, 4).permute(3, 0, 1, 2) / COUNT


SAMPLE = sample_of(torch.arange(COUNT))
NOISE = sample_of(torch.arange(COUNT).flip(-1))


def model(sample: torch.Tensor, timestep: float) -> torch.Tensor:
    return sample * timestep / (timestep + 1)


def scheduler(steps: int) -> DPMSolverMultistepScheduler:
    made = DPMSolverMultistepScheduler(
        flow_shift=SHIFT, use_flow_sigmas=True, prediction_type="flow_prediction"
    )
    made.set_timesteps(steps)
    return made


def loops(steps: int, first: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Their result and ours, from the sample alone or, from a later step, under noise."""
    theirs, schedule = scheduler(steps), OURS.schedule(steps, SHIFT)
    a, b, previous = SAMPLE, SAMPLE, None
    if first:
        a = theirs.add_noise(SAMPLE, NOISE, theirs.timesteps[first : first + 1])
        b = torch.lerp(SAMPLE, NOISE, schedule.sigmas[first])
    for i, timestep in enumerate(theirs.timesteps[first:], first):
        a = theirs.step(model(a, timestep), timestep, a).prev_sample
        # The history of a multistep solver begins with the run.
        update = OURS.update(schedule, i)
        velocity = model(b, schedule.timesteps[i])
        b, previous = advance(update, b, velocity, previous, None)
    return a, b


def test_a_full_loop():
    theirs, ours = loops(10)
    assert ours.shape == SAMPLE.shape
    torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-6)


def test_a_full_loop_from_a_noised_sample():
    assert first_step(10, 0.5) == 5
    theirs, ours = loops(10, first=5)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-6)


@pytest.mark.parametrize("steps", [1, 2, 3, 5, 10, 50, 100, 999, 1000])
def test_the_first_step_of_any_number(steps):
    """And as many timesteps as steps, also where several are equal."""
    theirs, schedule = scheduler(steps), OURS.schedule(steps, SHIFT)
    assert schedule.timesteps == tuple(theirs.timesteps.tolist())
    assert len(schedule.timesteps) == steps
    residual = 0.1 * SAMPLE
    want = theirs.step(residual, theirs.timesteps[0], SAMPLE).prev_sample
    got, _ = advance(OURS.update(schedule, 0), SAMPLE, residual, None, None)
    torch.testing.assert_close(got, want, rtol=0, atol=2e-6)
