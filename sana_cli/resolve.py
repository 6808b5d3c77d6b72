"""From settings to a recipe: every choice that is left open is made here, and only here."""

import hashlib
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

from sana_cli.images.files import read
from sana_cli.instruction import INSTRUCTION
from sana_cli.recipe import Recipe
from sana_cli.sampling import Sampling, of_kind, settle
from sana_cli.settings import Settings
from sana_cli.shapes import Canvas, Request, parse_aspect, parse_resolution, place
from sana_cli.weights.catalogue import Model, choose_model
from sana_cli.weights.hub_cache import commit_of

if TYPE_CHECKING:
    import numpy as np

    from sana_cli.weights.model_files import ModelFiles


@dataclass(frozen=True)
class Source:
    """A picture to start from: uint8 RGB (height, width, 3) and the SHA-256 of its bytes."""

    digest: str
    pixels: "np.ndarray"


@dataclass(frozen=True)
class Choice:
    """What settings come to before any file of the model is read."""

    settings: Settings
    model: Model
    request: Request | None
    aspect: float | None
    source: Source | None

    def sampling(self, files: "ModelFiles | None" = None) -> Sampling:
        """Without `files` only for a model whose kind is known."""
        model = self.model
        if model.solver is None and files is not None:
            model = of_kind(model, files.is_sprint)
        return settle(model, self.settings)

    def canvas(self, side: int) -> Canvas:
        """The size for a model of that native side."""
        request = self.request or Request(side=side)
        return place(request, self.aspect, self.settings.fit, side, self.model.squares)

    def recipe(self, files: "ModelFiles", device: str, seed: int) -> Recipe:
        from sana_cli.system.devices import choose_dtypes, choose_text_precision

        asked, model, sampling = self.settings, self.model, self.sampling(files)
        text_dtype, dit_dtype, vae_dtype = choose_dtypes(asked.dtype, device, model.dtype)
        instructed = model.instruction if asked.instruction is None else asked.instruction
        canvas = self.canvas(model.side or files.side)
        return Recipe(
            prompt=asked.prompt,
            negative=asked.negative,
            instruction=INSTRUCTION if instructed else "",
            seed=seed,
            steps=sampling.steps,
            guidance=sampling.guidance,
            solver=sampling.solver,
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
            image=self.source.digest if self.source else None,
            strength=sampling.strength,
        )


def choose(settings: Settings) -> Choice:
    """Everything that can be wrong with settings is found here, if the model's kind is known."""
    request = parse_resolution(settings.res) if settings.res is not None else None
    aspect = parse_aspect(settings.ar) if settings.ar is not None else None
    model = choose_model(settings.model, request)
    choice = Choice(settings, model, request, aspect, None)
    if model.solver is not None:
        choice.sampling()
    if settings.image is not None:
        source = _source(settings.image)
        if aspect is None and (request is None or request.side is not None):
            aspect = source.pixels.shape[1] / source.pixels.shape[0]
        choice = Choice(settings, model, request, aspect, source)
    if model.side is not None:
        choice.canvas(model.side)
    return choice


@lru_cache(maxsize=1)  # one picture serves all the prompts of a call
def _source(path: str) -> Source:
    pixels = read(path)
    return Source(hashlib.sha256(pixels.tobytes()).hexdigest(), pixels)
