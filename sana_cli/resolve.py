"""Settings to a recipe: every choice that is left open is made here, and only here."""

import contextlib
import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from sana_cli.errors import SanaError, UsageError
from sana_cli.images.files import read
from sana_cli.instruction import INSTRUCTION
from sana_cli.recipe import Recipe
from sana_cli.settings import Settings
from sana_cli.shapes import Canvas, SizeRequest, choose_canvas, parse_aspect, parse_resolution
from sana_cli.weights.catalogue import Model, choose_model, known_models
from sana_cli.weights.hub_cache import commit_of

if TYPE_CHECKING:
    import numpy as np

    from sana_cli.weights.model_files import ModelFiles

MOST_SPRINT_STEPS = 4  # that Sana-Sprint was distilled to
DEFAULT_STRENGTH = 0.6


@dataclass(frozen=True)
class Sampler:
    """How an image is sampled."""

    solver: str
    steps: int
    guidance: float
    strength: float | None  # of the noise put on an input image; None without one
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class InputImage:
    """An image given with the settings, by the SHA-256 of its RGB bytes."""

    path: str
    sha256: str
    width: int
    height: int


class InputImages(Mapping[str, "np.ndarray"]):
    """Input images by SHA-256: uint8 RGB (height, width, 3).

    The image used last stays in memory; any other is read again when it is used, so that a batch
    with thousands of them holds one.
    """

    def __init__(self) -> None:
        self._inputs: dict[str, InputImage] = {}
        self._by_file: dict[tuple[str, int, int], InputImage] = {}  # path, size, time of change
        self._last: tuple[str, np.ndarray] | None = None

    def add(self, path: str) -> InputImage:
        """Read an image, if its file has changed since it was added. UsageError if it cannot be."""
        with contextlib.suppress(OSError):  # `read` tells what is wrong
            state = os.stat(os.path.expanduser(path))
            file = path, state.st_size, state.st_mtime_ns
            if file in self._by_file:
                return self._by_file[file]
        pixels = read(path)
        sha256 = hashlib.sha256(pixels.tobytes()).hexdigest()
        self._last = sha256, pixels
        image = InputImage(path, sha256, pixels.shape[1], pixels.shape[0])
        self._inputs[sha256] = self._by_file[file] = image
        return image

    def inputs(self) -> list[InputImage]:
        """All images that were added, each once."""
        return list(self._inputs.values())

    def __getitem__(self, sha256: str) -> "np.ndarray":
        """SanaError if the file has other pixels now than when it was added."""
        if self._last is None or self._last[0] != sha256:
            path = self._inputs[sha256].path
            pixels = read(path)
            if hashlib.sha256(pixels.tobytes()).hexdigest() != sha256:
                raise SanaError(f"--image {path} has changed since this run began")
            self._last = sha256, pixels
        return self._last[1]

    def __iter__(self) -> Iterator[str]:
        return iter(self._inputs)

    def __len__(self) -> int:
        return len(self._inputs)


@dataclass(frozen=True)
class Resolution:
    """What settings amount to before any file of the model is read."""

    settings: Settings
    model: Model
    request: SizeRequest | None
    aspect: float | None
    image: InputImage | None

    def sampler(self, files: "ModelFiles | None" = None) -> Sampler:
        """Resolve the sampler. `files` are needed where only they tell what kind the model is."""
        model = self.model
        if model.solver is None and files is not None:
            model = with_defaults_of_kind(model, files.is_sprint)
        return resolve_sampler(model, self.settings)

    def canvas(self, side: int) -> Canvas:
        """Return the size for a model of that native side."""
        request = self.request or SizeRequest(side=side)
        return choose_canvas(request, self.aspect, self.settings.fit, side, self.model.squares)

    def recipe(self, files: "ModelFiles", device: str, seed: int) -> Recipe:
        from sana_cli.system.devices import choose_dtypes, choose_text_precision

        asked, model, sampler = self.settings, self.model, self.sampler(files)
        text_dtype, dit_dtype, vae_dtype = choose_dtypes(asked.dtype, device, model.dtype)
        instructed = model.instruction if asked.instruction is None else asked.instruction
        canvas = self.canvas(model.side or files.side)
        return Recipe(
            prompt=asked.prompt,
            negative=asked.negative,
            instruction=INSTRUCTION if instructed else "",
            seed=seed,
            steps=sampler.steps,
            guidance=sampler.guidance,
            solver=sampler.solver,
            flow_shift=files.flow_shift,
            width=canvas.width,
            height=canvas.height,
            native_width=canvas.native_width,
            native_height=canvas.native_height,
            fit=asked.fit,
            model=model.name,
            revision=commit_of(model),
            text_dtype=choose_text_precision(
                *(asked.text_precision, asked.dtype, text_dtype, device),
                files.text.linear_weights,
            ),
            dit_dtype=dit_dtype,
            vae_dtype=vae_dtype,
            image=self.image.sha256 if self.image else None,
            strength=sampler.strength,
        )

    def recipes(self, files: "ModelFiles", device: str, seeds: Sequence[int]) -> list[Recipe]:
        """One recipe for every seed; everything else is resolved once."""
        first = self.recipe(files, device, seeds[0])
        return [first, *(replace(first, seed=seed) for seed in seeds[1:])]


def resolve(settings: Settings, images: InputImages) -> Resolution:
    """Resolve settings as far as the catalogue allows; the input image is added to `images`.

    UsageError for everything that can be wrong with settings, if the model's kind is known.
    """
    request = parse_resolution(settings.res) if settings.res is not None else None
    aspect = parse_aspect(settings.ar) if settings.ar is not None else None
    model = choose_model(settings.model, request)
    resolution = Resolution(settings, model, request, aspect, None)
    if model.solver is not None:
        resolution.sampler()
    if settings.image is not None:
        image = images.add(settings.image)
        if aspect is None and (request is None or request.side is not None):
            aspect = image.width / image.height
        resolution = Resolution(settings, model, request, aspect, image)
    if model.side is not None:
        resolution.canvas(model.side)
    return resolution


# --- the sampler -------------------------------------------------------------------------------


def with_defaults_of_kind(model: Model, is_sprint: bool) -> Model:
    """Give a model that `weights.toml` does not list the sampler settings of its kind."""
    if is_sprint:
        return replace(model, solver="scm", steps=2, guidance=4.5)
    return replace(model, solver="flow-dpm", steps=20, guidance=4.5)


def resolve_sampler(model: Model, asked: Settings) -> Sampler:
    """Complete the sampler settings with the model's own; UsageError for what it cannot use."""
    steps = asked.steps if asked.steps is not None else model.steps
    guidance = asked.guidance if asked.guidance is not None else model.guidance
    assert model.solver is not None and steps is not None and guidance is not None
    solver = asked.solver or model.solver
    if solver != model.solver and "scm" in (solver, model.solver):
        raise UsageError(
            f"{model.name} cannot be sampled by --solver {solver}", f"use --solver {model.solver}"
        )
    if model.solver == "scm":
        return _resolve_sprint(model, asked, steps, guidance)
    if asked.image is not None:
        able = [known.name for known in known_models().values() if known.solver == "scm"]
        raise UsageError(f"{model.name} cannot start from an --image", f"use --model {able[0]}")
    if guidance < 1:
        raise UsageError(f"--guidance {guidance} is below 1", "1 switches it off")
    if asked.negative.strip() and guidance == 1:
        raise UsageError(
            "--negative has no effect at --guidance 1", "raise --guidance, or leave it out"
        )
    return Sampler(solver, steps, guidance, None)


def _resolve_sprint(model: Model, asked: Settings, steps: int, guidance: float) -> Sampler:
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
        if steps - steps * strength < 1:  # every step runs, and the first starts from noise alone
            most = 100 * (steps - 1) // steps / 100
            use = f"--strength {most:g} or less" if steps > 1 else "more --steps"
            warnings.append(
                f"the image has no effect at --strength {strength:g} in {steps} steps; use {use}"
            )
    return Sampler("scm", steps, guidance, strength, tuple(warnings))
