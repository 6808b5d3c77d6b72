"""The velocity that a sampler follows: classifier-free guidance (arXiv 2207.12598), or built in."""

import torch
from torch import Tensor

from sana_cli.models.fused_dit import FusedDiT
from sana_cli.pipeline.plan import Plan
from sana_cli.recipe import Recipe
from sana_cli.weights.model_files import ModelFiles

BUCKET = 32  # tokens


def is_guided(recipe: Recipe, files: ModelFiles) -> bool:
    """Whether every step runs with the negative text too, for classifier-free guidance."""
    return recipe.guidance > 1 and not files.is_sprint


class GuidedVelocity:
    """The velocity of one recipe's sample, at any of the timesteps of its schedule."""

    def __init__(
        self,
        engine: FusedDiT,
        texts: list[Tensor],
        timesteps: tuple[float, ...],
        recipe: Recipe,
        files: ModelFiles,
    ) -> None:
        """`texts`: states of the prompt, after those of the negative one if it is guided."""
        self.engine, self.texts, self.recipe, self.files = engine, texts, recipe, files
        # Sana-Sprint is told the noise level itself, whatever its config says, as the reference.
        unit = 1.0 if files.is_sprint else files.dit.timestep_scale
        self.timesteps = [timestep * unit for timestep in timesteps]
        self.plan: Plan | None = None

    def __call__(self, sample: Tensor, step: int, plan: Plan) -> Tensor:
        """float32, like `sample` (1, 32, h, w)."""
        if plan != self.plan:
            self.prepare(plan)
        time = self.times[step]
        latents = sample.to(plan.device, self.engine.proj_out.weight.dtype)
        turns = [self.contexts] if plan.batched_cfg else [[context] for context in self.contexts]
        halves = [self.engine.velocity(latents, time, turn).float() for turn in turns]
        velocity = torch.cat(halves)
        if len(velocity) == 2:
            without, given = velocity.chunk(2)
            velocity = torch.lerp(without, given, self.recipe.guidance)
        return velocity.to(sample.device)

    def prepare(self, plan: Plan) -> None:
        self.plan = None  # until all of it has succeeded
        engine = self.engine
        engine.to_device(plan.device, plan.row_chunk)
        dtype = engine.proj_out.weight.dtype
        texts = [text.to(plan.device) for text in self.texts]
        told = self.told(texts[0]) if self.files.is_sprint else None
        # A CUDA graph is of one length of text: few lengths make for few graphs.
        unit = BUCKET if plan.device.startswith("cuda") and not plan.row_chunk else 1
        self.contexts = [
            engine.encode_text(text.to(dtype), bucket(text.shape[1], unit), plan.folds_text)
            for text in texts
        ]
        self.times = engine.time_modulations(self.timesteps, told)
        self.plan = plan

    def told(self, text: Tensor) -> Tensor:
        """What Sana-Sprint is told (1,): in the precision of its text, as the reference does."""
        told = torch.full((1,), self.recipe.guidance, dtype=text.dtype, device=text.device)
        return told * self.files.dit.guidance_embeds_scale


def bucket(length: int, unit: int) -> int:
    """The multiple of `unit` that a text of so many tokens is padded to; one token stays one."""
    return length if length == 1 else -(-length // unit) * unit
