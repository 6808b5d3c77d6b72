"""How a picture is sampled: the model's own settings where none are given, and no others."""

from dataclasses import dataclass, replace

from sana_cli.errors import UsageError
from sana_cli.settings import Settings
from sana_cli.weights.catalogue import Model, known_models

MOST_SPRINT_STEPS = 4  # that Sana-Sprint was distilled to
DEFAULT_STRENGTH = 0.6


@dataclass(frozen=True)
class Sampling:
    solver: str
    steps: int
    guidance: float
    strength: float | None  # of the noise put on a picture to start from; None without one
    warnings: tuple[str, ...] = ()


def of_kind(model: Model, is_sprint: bool) -> Model:
    """A model that `weights.toml` does not list, with the settings of its kind."""
    if is_sprint:
        return replace(model, solver="scm", steps=2, guidance=4.5)
    return replace(model, solver="flow-dpm", steps=20, guidance=4.5)


def settle(model: Model, asked: Settings) -> Sampling:
    """The call's settings, filled up with the model's own; UsageError for what it cannot use."""
    steps = asked.steps if asked.steps is not None else model.steps
    guidance = asked.guidance if asked.guidance is not None else model.guidance
    assert model.solver is not None and steps is not None and guidance is not None
    solver = asked.solver or model.solver
    if solver != model.solver and "scm" in (solver, model.solver):
        raise UsageError(
            f"{model.name} cannot be sampled by --solver {solver}", f"use --solver {model.solver}"
        )
    if model.solver == "scm":
        return _settle_sprint(model, asked, steps, guidance)
    if asked.image is not None:
        able = [known.name for known in known_models().values() if known.solver == "scm"]
        raise UsageError(f"{model.name} cannot start from an --image", f"use --model {able[0]}")
    if guidance < 1:
        raise UsageError(f"--guidance {guidance} is below 1", "1 switches it off")
    if asked.negative.strip() and guidance == 1:
        raise UsageError(
            "--negative has no effect at --guidance 1", "raise --guidance, or leave it out"
        )
    return Sampling(solver, steps, guidance, None)


def _settle_sprint(model: Model, asked: Settings, steps: int, guidance: float) -> Sampling:
    if asked.negative.strip():
        raise UsageError(
            f"{model.name} cannot use --negative: its guidance is built in",
            "leave it out, or use another model",
        )
    warnings = []
    if steps > MOST_SPRINT_STEPS:
        warnings.append(f"{model.name} was made for 1 to {MOST_SPRINT_STEPS} steps, not {steps}")
    strength = None
    if asked.image is not None:
        strength = DEFAULT_STRENGTH if asked.strength is None else asked.strength
        if steps - steps * strength < 1:  # none is left out, and the first starts from noise alone
            most = 100 * (steps - 1) // steps / 100
            use = f"--strength {most:g} or less" if steps > 1 else "more --steps"
            warnings.append(
                f"the image has no effect at --strength {strength:g} in {steps} steps; use {use}"
            )
    return Sampling("scm", steps, guidance, strength, tuple(warnings))
