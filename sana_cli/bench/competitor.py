"""The same images by diffusers, on the same weights, in the same process, turn and turn about.

diffusers' modules are built without weights and given tensors: those of the transformer and of the
text encoder serve both programs. There twice are only what ours merges, the maps to queries, keys
and values, and the decoder, whose kernels are merged in float32 before they are narrowed. All of
diffusers' networks stay loaded, as in its pipeline; ours come and go as they always do, and their
loading is not counted. Neither is saving.

The part `against` of the document of `sana bench`:

with       diffusers or diffusers-compiled; versions of diffusers and transformers; how it compiled
pairs      of runs, one of each; the first, which warms up, is left out
seconds    by stage (encode, denoise, decode, total): sana and diffusers, each a spread
ratio      by stage: the median over pairs of diffusers' time to ours; above 1 where we are faster
peak_bytes    of diffusers' runs; ours are in `phases`, measured before diffusers was there
psnr       the likeness in dB of the images of the last pair, the worst; null if they are equal
shared     names of the parts whose tensors serve both
remarks    what our pipeline said in these runs
failed     instead of all but `with`: why it does not work
"""

import copy
import importlib.metadata
import importlib.util
import inspect
import logging
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from statistics import median
from time import perf_counter
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sana_cli.bench.phases import BenchRun, Facts, Meter, spread
from sana_cli.errors import UsageError
from sana_cli.recipe import Recipe
from sana_cli.weights.checkpoint import load_weights
from sana_cli.weights.layout import Tensors
from sana_cli.weights.model_files import ModelFiles

STAGES = ("encode", "denoise", "decode")
NEEDED = ("diffusers", "transformers")


def check_installed() -> None:
    """Raise UsageError if diffusers is not installed, without importing it."""
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise UsageError(
            f"--against needs {' and '.join(missing)}, which this Python lacks",
            f"python -m pip install {' '.join(NEEDED)}",
        )


@dataclass(frozen=True)
class Held:
    """The tensors of a module, in the form of the weights of a `Part`."""

    module: nn.Module

    def tensors(self, only: str) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in self.module.state_dict().items():
            if name.startswith(only):
                yield name.removeprefix(only), tensor


class Diffusers:
    """The pipeline of diffusers for a model, prepared to draw a recipe."""

    def __init__(self, recipe: Recipe, files: ModelFiles, device: str, compiled: bool) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            # Of the library for 8 bits, which the import below tries.
            logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
            import diffusers
            import transformers

            diffusers.utils.logging.set_verbosity_error()
            transformers.utils.logging.set_verbosity_error()
            self.pipe = self._build(recipe, files, device)
        self.pipe.set_progress_bar_config(disable=True)
        self.recipe, self.files, self.device = recipe, files, device
        self.how = None
        if compiled:
            # Of the modes that need no minutes of search the fastest.
            mode = "reduce-overhead" if device.startswith("cuda") else "default"
            self.pipe.transformer = torch.compile(self.pipe.transformer, mode=mode)
            self.pipe.vae.decode = torch.compile(self.pipe.vae.decode, mode=mode)
            self.how = f"torch.compile of transformer and vae.decode, mode {mode}"

    def _build(self, recipe: Recipe, files: ModelFiles, device: str) -> Any:
        import diffusers
        from transformers import AutoConfig, AutoTokenizer, Gemma2Model

        parts = files.parts
        text_config = AutoConfig.from_pretrained(parts["text_encoder"].folder)
        small = copy.deepcopy(text_config)
        small.num_hidden_layers, small.vocab_size = 1, (text_config.pad_token_id or 0) + 1
        small.layer_types = text_config.layer_types[:1]
        text = _module(Gemma2Model, text_config, small)
        _fill(text, files, "text_encoder", recipe.text_dtype, device, prefix="model.")

        model = diffusers.SanaTransformer2DModel
        known = inspect.signature(model.__init__).parameters
        config = {key: value for key, value in asdict(files.dit).items() if key in known}
        dit = _module(lambda layers: model(**config | layers), {}, {"num_layers": 1})
        _fill(dit, files, "transformer", recipe.dit_dtype, device)

        with torch.device("meta"):
            vae: Any = diffusers.AutoencoderDC(**asdict(files.vae))
        vae.encoder = None  # it would be loaded for nothing
        _fill(vae, files, "vae", recipe.vae_dtype, device, only="decoder.")

        tokenizer = AutoTokenizer.from_pretrained(parts["tokenizer"].folder)
        kind = diffusers.SanaSprintPipeline if files.is_sprint else diffusers.SanaPipeline
        return kind(tokenizer, text, vae, dit, _scheduler(recipe))

    def files_that_share(self) -> ModelFiles:
        """Return the model with the tensors of diffusers' modules as its weights."""
        shared = {"transformer": self.pipe.transformer, "text_encoder": self.pipe.text_encoder}
        parts = dict(self.files.parts)
        for name, module in shared.items():
            held: Tensors = Held(getattr(module, "_orig_mod", module))
            parts[name] = replace(parts[name], weights=(held,))
        return replace(self.files, parts=parts)

    @torch.inference_mode()
    def run(self, recipes: list[Recipe]) -> BenchRun:
        """Encode the texts once, then draw image after image with the pipeline's own methods."""
        run, meter = BenchRun(dict.fromkeys(STAGES, 0.0)), Meter(self.device)
        pipe, recipe, sprint = self.pipe, self.recipe, self.files.is_sprint

        def took(stage: str, began: float) -> float:
            if self.device.startswith("cuda"):
                torch.cuda.synchronize(self.device)
            now = perf_counter()
            run.seconds[stage] += now - began
            return now

        began = perf_counter()
        lines = recipe.instruction.split("\n") if recipe.instruction else None
        guided = {
            "do_classifier_free_guidance": recipe.guidance > 1,
            "negative_prompt": recipe.negative,
        }
        encoded = pipe.encode_prompt(
            recipe.prompt,
            device=torch.device(self.device),
            complex_human_instruction=lines,
            **({} if sprint else guided),
        )
        names = ("prompt_embeds", "prompt_attention_mask")
        more = ("negative_prompt_embeds", "negative_prompt_attention_mask")
        texts = dict(zip(names if sprint else names + more, encoded, strict=True))
        if not sprint:
            texts["negative_prompt"] = None
        elif recipe.steps != 2:
            texts["intermediate_timesteps"] = None  # its own default is for two steps
        began = took("encode", began)
        for one in recipes:
            latents = pipe(
                **texts,
                height=one.native_height,
                width=one.native_width,
                num_inference_steps=one.steps,
                guidance_scale=one.guidance,
                generator=torch.Generator("cpu").manual_seed(one.seed),
                use_resolution_binning=False,
                output_type="latent",
            ).images
            began = took("denoise", began)
            latents = latents.to(pipe.vae.dtype) / pipe.vae.config.scaling_factor
            image = pipe.vae.decode(latents, return_dict=False)[0]
            drawn = pipe.image_processor.postprocess(image, output_type="pil")[0]
            run.images.append(np.asarray(drawn))
            began = took("decode", began)
        run.peaks["total"] = meter.look()
        return run


def result(theirs: Diffusers, pairs: list[tuple[BenchRun, BenchRun]]) -> Facts:
    """Summarise pairs of runs, ours first."""
    versions = {name: importlib.metadata.version(name) for name in NEEDED}
    seconds: Facts = {}
    ratio: Facts = {}
    for stage in (*STAGES, "total"):
        ours, other = ([_seconds(run, stage) for run in some] for some in zip(*pairs, strict=True))
        seconds[stage] = {"sana": spread(ours), "diffusers": spread(other)}
        ratio[stage] = median(b / a for a, b in zip(ours, other, strict=True))
    peaks = [peak for _, run in pairs if (peak := run.peaks["total"]) is not None]
    mine, others = (run.images for run in pairs[-1])
    likeness = [psnr(a, b) for a, b in zip(mine, others, strict=True)]
    return {
        **versions,
        "how": theirs.how,
        "pairs": len(pairs),
        "seconds": seconds,
        "ratio": ratio,
        "peak_bytes": max(peaks, default=None),
        "psnr": min((value for value in likeness if value is not None), default=None),
        "shared": ["transformer", "text_encoder"],
        "remarks": list(dict.fromkeys(text for run, _ in pairs for text in run.notices)),
    }


def psnr(one: np.ndarray, other: np.ndarray) -> float | None:
    """Return the PSNR of two uint8 images in dB; None if they are equal."""
    error = np.mean((one.astype(np.float64) - other.astype(np.float64)) ** 2)
    return float(10 * np.log10(255**2 / error)) if error else None


def _seconds(run: BenchRun, stage: str) -> float:
    return sum(run.seconds[s] for s in STAGES) if stage == "total" else run.seconds[stage]


def _module(build: Any, config: Any, small: Any) -> nn.Module:
    """A module with its parameters on the meta device and with its buffers, which are no weights:
    those of a small one, in which they are the same."""
    with torch.device("meta"):
        module = build(config)
    buffers = dict(build(small).named_buffers())
    for name, buffer in list(module.named_buffers()):
        if buffer.is_meta:
            owner, _, own = name.rpartition(".")
            module.get_submodule(owner).register_buffer(own, buffers[name], persistent=False)
    return module


def _fill(
    module: nn.Module,
    files: ModelFiles,
    part: str,
    dtype: str,
    device: str,
    only: str = "",
    prefix: str = "",
) -> None:
    """Load a part's weights and move it."""
    target = module.get_submodule(only.rstrip("."))
    weights = files.parts[part].weights
    load_weights(target, weights, getattr(torch, dtype), only=only, prefix=prefix)
    module.to(device)
    module.eval().requires_grad_(False)


def _scheduler(recipe: Recipe) -> Any:
    import diffusers

    match recipe.solver:
        case "scm":
            return diffusers.SCMScheduler()
        case "flow-euler":
            return diffusers.FlowMatchEulerDiscreteScheduler(shift=recipe.flow_shift)
        case _:
            return diffusers.DPMSolverMultistepScheduler(
                flow_shift=recipe.flow_shift,
                use_flow_sigmas=True,
                prediction_type="flow_prediction",
            )
