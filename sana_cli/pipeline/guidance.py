"""The velocity that a sampler follows: classifier-free guidance (arXiv 2207.12598), or built in."""

import torch
from torch import Tensor

from sana_cli.models.fused_dit import FusedDiT
from sana_cli.pipeline.plan import Plan
from sana_cli.pipeline.solver import TRAIN_STEPS
from sana_cli.recipe import Recipe
from sana_cli.weights.model_files import ModelFiles

BUCKET = 32  # tokens


class GuidedVelocity:
    """The velocity of one recipe's sample, at any of the timesteps of its schedule."""

    def __init__(
        self,
        transformer: FusedDiT,
        texts: list[Tensor],
        timesteps: tuple[float, ...],
        recipe: Recipe,
        files: ModelFiles,
        control: Tensor | None = None,
    ) -> None:
        """`texts`: states of the prompt, after those of the negative one if it is guided.
        `control`: latents of the control image, float32 (1, 32, h, w), scaled.
        """
        self.transformer, self.texts = transformer, texts
        self.recipe, self.files, self.control = recipe, files, control
        # Sana-Sprint takes the noise level itself, whatever its config says, as in the reference.
        unit = 1.0 if files.is_sprint else files.dit.timestep_scale
        self.raw_timesteps = timesteps
        self.timesteps = [timestep * unit for timestep in timesteps]
        self.perturbed_layers = () if recipe.pag is None else (recipe.pag_layer or 0,)
        self.plan: Plan | None = None

    def __call__(self, sample: Tensor, step: int, plan: Plan) -> Tensor:
        """float32, like `sample` (1, 32, h, w)."""
        if plan != self.plan:
            self.prepare(plan)
        time, perturbed = self.times[step], self.perturbed_layers
        latents = sample.to(plan.device, self.transformer.proj_out.weight.dtype)
        turns = [self.contexts] if plan.batched_cfg else [[context] for context in self.contexts]
        left = len(self.timesteps) - 1 - step
        streams = [
            # The perturbed stream follows that of the prompt, which is in the last turn.
            self.transformer.velocity(
                latents, time, turn, self.context, perturbed if turn is turns[-1] else (), left
            ).float()
            for turn in turns
        ]
        return self.guided(torch.cat(streams), self.raw_timesteps[step]).to(sample.device)

    def guided(self, streams: Tensor, timestep: float) -> Tensor:
        """Combine the velocities of the streams: of the negative text if it is guided, of the
        prompt, and of the perturbed prompt if there is one.

        v = v₋ + g·(v₊ - v₋) + p·(v₊ - v_perturbed) (arXiv 2403.17377), where p falls with the
        timestep if it is adaptive, as in diffusers.
        """
        streams, perturbed = (
            (streams[:-1], streams[-1:]) if self.perturbed_layers else (streams, None)
        )
        given = streams[-1:]
        velocity = (
            given if len(streams) == 1 else torch.lerp(streams[:1], given, self.recipe.guidance)
        )
        if perturbed is not None:
            assert self.recipe.pag is not None
            scale = self.recipe.pag - (self.recipe.pag_adaptive or 0) * (TRAIN_STEPS - timestep)
            velocity = velocity + max(0.0, scale) * (given - perturbed)
        return velocity

    def prepare(self, plan: Plan) -> None:
        self.plan = None  # until all of it has succeeded
        transformer = self.transformer
        transformer.to_device(plan.device, plan.row_chunk)
        dtype = transformer.proj_out.weight.dtype
        texts = [text.to(plan.device) for text in self.texts]
        guidance = self.embedded_guidance(texts[0]) if self.files.is_sprint else None
        # A CUDA graph is of one length of text: few lengths make for few graphs.
        unit = BUCKET if plan.device.startswith("cuda") and not plan.row_chunk else 1
        self.contexts = [
            transformer.encode_text(text.to(dtype), bucket(text.shape[1], unit), plan.folds_text)
            for text in texts
        ]
        self.context = None
        if self.control is not None:
            latents = self.control.to(plan.device, dtype)
            self.context = transformer.encode_control(latents, self.recipe.control_scale or 0.0)
        self.times = transformer.time_modulations(self.timesteps, guidance)
        self.plan = plan

    def embedded_guidance(self, text: Tensor) -> Tensor:
        """The guidance that Sana-Sprint embeds, (1,), in the dtype of its text as in diffusers."""
        scale = torch.full((1,), self.recipe.guidance, dtype=text.dtype, device=text.device)
        return scale * self.files.dit.guidance_embeds_scale


def bucket(length: int, unit: int) -> int:
    """The multiple of `unit` that a text of so many tokens is padded to; one token stays one."""
    return length if length == 1 else -(-length // unit) * unit
