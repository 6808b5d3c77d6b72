"""What is checked of released weights. Every failure says what was found and what to do about it.

The checks read files and draw; they do not know where the files come from, so that stand-ins can
show that right files pass and wrong ones fail.
"""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import chain
from math import inf
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import (
    AutoencoderDC,
    DPMSolverMultistepScheduler,
    SanaPipeline,
    SanaSprintPipeline,
    SanaTransformer2DModel,
    SCMScheduler,
)
from PIL import Image
from transformers import AutoTokenizer, Gemma2Model

from networks import relative_error
from sana_cli.bench.competitor import psnr
from sana_cli.errors import SanaError
from sana_cli.instruction import INSTRUCTION
from sana_cli.models.architectures import Architecture
from sana_cli.models.controlnet import ControlNet
from sana_cli.models.dc_ae import DCAE
from sana_cli.models.dit import DiT
from sana_cli.models.gemma import Gemma
from sana_cli.pipeline.text_encoder import TextEncoder
from sana_cli.recipe import Recipe
from sana_cli.weights.catalogue import Source
from sana_cli.weights.checkpoint import on_meta, read_tensors
from sana_cli.weights.headers import open_safetensors
from sana_cli.weights.hub_cache import damaged_files
from sana_cli.weights.layout import Part, Parts
from sana_cli.weights.lora import MergedTensors, fit, read_lora
from sana_cli.weights.model_files import ModelFiles

NETWORKS = {"transformer": DiT, "text_encoder": Gemma, "vae": DCAE, "controlnet": ControlNet}
BYTES = {"F32": 4, "F16": 2, "BF16": 2}
PROMPT = "A painting of a squirrel eating a burger."
# How like diffusers' image ours must be, in dB. On a CPU in float32, one level of 255 everywhere.
LIKENESS = {("cpu", "float32"): 48, ("cuda", "float32"): 35, "bfloat16": 25}
EIGHT_BITS = 0.10  # relative error of the text states
SLICE_MEAN, SLICE_MOST = 0.02, 0.06  # of values from 0 to 1: another precision on another GPU
LORA_ERROR, ROUNDING = 1e-4, 1e-6  # relative to what a LoRA changes, and to the whole tensor


def expect(holds: bool, found: str, remedy: str) -> None:
    assert holds, f"{found}\nWhat to do: {remedy}"


# --- files -------------------------------------------------------------------------------------


def check_files(sources: Iterable[Source]) -> None:
    """Every file has the size and hash that the hub promised."""
    bad = [f"{source.repo}/{name}" for source in sources for name in damaged_files(source)]
    expect(
        not bad,
        f"not what the hub promised: {', '.join(bad)}",
        "`sana models rm` the model and pull it again; the other checks say nothing until then",
    )


def check_configs(files: ModelFiles, expected: Architecture) -> None:
    """The published configs are those that the catalogue's architecture has."""
    pairs = {
        "transformer/config.json": (files.dit, expected.dit),
        "text_encoder/config.json": (files.text, expected.text),
        "vae/config.json": (files.vae, expected.vae),
    }
    for name, (published, ours) in pairs.items():
        other = {
            field.name: (getattr(published, field.name), getattr(ours, field.name))
            for field in fields(published)
            if not field.name.startswith("rope_")
            and getattr(published, field.name) != getattr(ours, field.name)
        }
        expect(
            not other,
            f"{name} differs from the catalogue in "
            + ", ".join(f"{key} ({theirs!r}, not {own!r})" for key, (theirs, own) in other.items()),
            "correct `sana_cli/models/architectures.py` and PUBLISHED in"
            " `tests/models/test_architectures.py`, or the row in `weights.toml`",
        )
    expect(
        files.text.theta == expected.text.theta,
        f"text_encoder/config.json has rope theta {files.text.theta}, not {expected.text.theta}",
        "correct `GemmaConfig` in `sana_cli/models/configs.py`",
    )
    expect(
        files.flow_shift == expected.flow_shift,
        f"the scheduler's flow shift is {files.flow_shift}, the catalogue's {expected.flow_shift}",
        "correct `architecture()` in `sana_cli/models/architectures.py`, which plans and dry runs"
        " take it from",
    )
    expect(
        not files.unknown_keys,
        f"the configs set {', '.join(files.unknown_keys)}, which nothing reads",
        "find out from diffusers what they change, then support or ignore them in the config class",
    )


def check_tensors(part: Part, kind: str, config: Any) -> int:
    """The files have the tensors of the network that their config describes; their bytes."""
    found, size = {}, 0
    for path in part.files:
        with open_safetensors(path) as file:
            for name in file.keys():  # noqa: SIM118 - not a dict
                tensor = file.get_slice(name)
                shape = tuple(tensor.get_shape())
                found[name.removeprefix("model.")] = shape
                size += int(np.prod(shape)) * BYTES.get(tensor.get_dtype(), 0)
    network = on_meta(NETWORKS[kind], config, part.config)
    wanted = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    other = sorted(name for name in found | wanted if found.get(name) != wanted.get(name))
    expect(
        not other,
        f"{part.folder}: {len(other)} tensors are not those of its config: "
        + ", ".join(f"{n} ({found.get(n)}, not {wanted.get(n)})" for n in other[:4]),
        f"compare with the class of diffusers or transformers, then correct {NETWORKS[kind]}",
    )
    return size


def check_bytes(found: int, source: Source) -> None:
    expect(
        found == source.bytes,
        f"{source.repo} has {found:_} bytes of tensors, `weights.toml` says {source.bytes:_}",
        f"write `bytes = {found:_}` in `weights.toml`, unless check_tensors fails too; then run"
        " `python -m benchmarks.tables`",
    )


# --- text --------------------------------------------------------------------------------------


def check_tokens(parts: Parts, recorded: Iterable[Mapping[str, Any]]) -> None:
    """The tokenizer makes the recorded ids, and transformers makes the same ones of it."""
    encoder = TextEncoder(parts, "bfloat16", "cpu")  # the type of the files: nothing is converted
    theirs = AutoTokenizer.from_pretrained(parts["tokenizer"].folder)
    for row in recorded:
        text, ids = row["text"], row["ids"]
        got = encoder.tokens(text)
        expect(
            got == ids,
            f"{text[:60]!r} becomes {got[:12]}…, recorded are {ids[:12]}…",
            "if transformers agrees with the file, the release has another tokenizer: record its"
            " ids in `tests/released/tokens.json`; if not, correct `TextEncoder.tokens`",
        )
        for prompt in (text, INSTRUCTION + text):
            expect(
                encoder.tokens(prompt) == theirs(prompt).input_ids,
                f"transformers makes other tokens of {prompt[-60:]!r}",
                "correct `TextEncoder.tokens`: images of such prompts differ from diffusers'",
            )


def check_eight_bits(
    parts: Parts, reference: "Reference", prompts: Sequence[str], device: str
) -> float:
    """States of the 8-bit encoder against those of transformers in float32; the relative error."""
    states = [reference.text_states(prompt) for prompt in prompts]
    encoder = TextEncoder(parts, "int8", device)
    with torch.inference_mode():
        ours = [encoder.encode(prompt, INSTRUCTION)[0].cpu() for prompt in prompts]
    error = max(relative_error(a, b.cpu()) for a, b in zip(ours, states, strict=True))
    expect(
        error < EIGHT_BITS,
        f"the 8-bit text encoder is {error:.1%} off float32, more than {EIGHT_BITS:.0%}",
        "make `--text-precision auto` take bfloat16 in `choose_text_precision` until it is"
        " understood, and correct the paragraph on eight bits in `benchmarks/README.md`",
    )
    return error


# --- images ------------------------------------------------------------------------------------


@dataclass
class Reference:
    """diffusers on the very files of a model, one network in memory at a time."""

    parts: Parts
    variants: Mapping[str, str]  # of the weight files, by part
    device: str
    is_sprint: bool

    def _load(self, build: Any, part: str, dtype: str) -> Any:
        module = build.from_pretrained(
            self.parts[part].folder,
            variant=self.variants[part] or None,
            torch_dtype=getattr(torch, dtype),
            **({"attn_implementation": "eager"} if build is Gemma2Model else {}),
        )
        return module.eval().requires_grad_(False).to(self.device)

    def _pipe(self, text_dtype: str) -> Any:
        tokenizer = AutoTokenizer.from_pretrained(self.parts["tokenizer"].folder)
        text = self._load(Gemma2Model, "text_encoder", text_dtype)
        solver = SCMScheduler if self.is_sprint else DPMSolverMultistepScheduler
        scheduler = solver.from_pretrained(self.parts["scheduler"].folder)
        kind = SanaSprintPipeline if self.is_sprint else SanaPipeline
        pipe = kind(tokenizer, text, None, None, scheduler)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def _texts(self, pipe: Any, recipe: Recipe) -> dict[str, Any]:
        lines = recipe.instruction.split("\n") if recipe.instruction else None
        guided = {"negative_prompt": recipe.negative}
        encoded = pipe.encode_prompt(
            recipe.prompt,
            device=torch.device(self.device),
            complex_human_instruction=lines,
            **({} if self.is_sprint else guided),
        )
        names = ("prompt_embeds", "prompt_attention_mask")
        names += tuple(f"negative_{name}" for name in names)
        return dict(zip(names, encoded, strict=False))

    @torch.inference_mode()
    def text_states(self, prompt: str) -> torch.Tensor:
        """float32 (L, width), of the tokens that count."""
        pipe = self._pipe("float32")
        states, mask, *_ = pipe.encode_prompt(
            prompt,
            device=torch.device(self.device),
            complex_human_instruction=INSTRUCTION.split("\n"),
        )
        return states[0][mask[0].bool()]

    @torch.inference_mode()
    def draw(self, recipe: Recipe) -> np.ndarray:
        """uint8 (height, width, 3) of a recipe with an exact size."""
        pipe = self._pipe(recipe.text_dtype)
        texts = self._texts(pipe, recipe)
        pipe.text_encoder = None
        pipe.transformer = self._load(SanaTransformer2DModel, "transformer", recipe.dit_dtype)
        pipe.vae = self._load(AutoencoderDC, "vae", recipe.vae_dtype)
        more: dict[str, Any] = {"intermediate_timesteps": 1.3 if recipe.steps == 2 else None}
        image = pipe(
            **texts,
            **(more if self.is_sprint else {"negative_prompt": None}),
            width=recipe.width,
            height=recipe.height,
            num_inference_steps=recipe.steps,
            guidance_scale=recipe.guidance,
            generator=torch.Generator("cpu").manual_seed(recipe.seed),
            use_resolution_binning=False,
        ).images[0]
        return np.asarray(image)


def drawn(sana: Callable[..., Any], out: Path, *words: str) -> tuple[np.ndarray, Recipe]:
    """One image by the command line, and its recipe."""
    run = sana("generate", *words, "--json", "--no-cache", "-f", "-o", str(out))
    expect(run.code == 0, f"`sana generate {' '.join(words)}` failed:\n{run.err}", "read its hint")
    (row,) = json.loads(run.out)["images"]
    with Image.open(row["path"]) as image:
        return np.asarray(image), Recipe(**row["recipe"])


def check_same_image(ours: np.ndarray, recipe: Recipe, reference: Reference, dtype: str) -> float:
    """The image of the command line against diffusers' on this machine; the likeness in dB."""
    theirs = reference.draw(recipe)
    likeness = psnr(ours, theirs) or inf
    least = LIKENESS.get((reference.device.partition(":")[0], dtype)) or LIKENESS["bfloat16"]
    expect(
        likeness >= least,
        f"in {dtype} the image is {likeness:.1f} dB like diffusers', less than {least} dB",
        "look at both. In float32 the same image must come out: compare text states, the first"
        " velocity and the decoded latents, in this order. If only bfloat16 differs, compare each"
        " program with its own float32 before the bound is lowered",
    )
    expect(theirs.std() > 2, "diffusers draws a flat image", "check the files first")
    return likeness


def ends(image: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The first and last 16 values of an 8-bit image, from 0 to 1."""
    flat = image.reshape(-1) / 255
    return flat[:16], flat[-16:]


def check_slice(image: np.ndarray, published: Mapping[str, Sequence[float]]) -> None:
    """The corners of an image against published ones, which were drawn on other hardware."""
    for name, values in zip(("first", "last"), ends(image), strict=True):
        off = np.abs(values - np.array(published[name]))
        expect(
            off.mean() <= SLICE_MEAN and off.max() <= SLICE_MOST,
            f"the {name} 16 values are {off.mean():.3f} off the published ones, {off.max():.3f} at"
            " most",
            "run the comparison with diffusers for this model. If that passes here, diffusers on"
            " this machine is as far from its own published values: note the hardware in"
            " `tests/released/slices.json` and widen the bound; if not, that failure comes first",
        )


# --- LoRA --------------------------------------------------------------------------------------


def check_lora(path: Path, base: ModelFiles, container: str, variant: str) -> None:
    """A LoRA that people published is read, fits its base, and changes what diffusers changes."""
    part = base.parts["transformer"]
    try:
        lora = read_lora(path)
        fit(lora, base.dit)
    except SanaError as error:
        expect(
            False,
            f"{path.name}: {error}",
            "if it was trained on another model, name that in `tests/released/loras.json`; if not,"
            " add its form to `sana_cli/weights/lora.py`",
        )
    fused = None
    if container == "diffusers":  # the others it cannot read
        transformer = SanaTransformer2DModel.from_pretrained(
            part.folder, variant=variant or None, torch_dtype=torch.float32
        )
        pipe = SanaPipeline(None, None, None, transformer, None)
        pipe.load_lora_weights(path.parent, weight_name=path.name)
        pipe.fuse_lora()
        pipe.unload_lora_weights()
        fused = transformer.state_dict()
    merged = MergedTensors(part.weights, [(lora, 1.0)], base.dit, torch.float32).tensors("")
    plain = chain.from_iterable(read_tensors(weights, "") for weights in part.weights)
    changed = 0
    for (name, ours), (same, before) in zip(merged, plain, strict=True):
        assert name == same
        change = (ours - before.float()).norm().item()
        changed += change > 0
        if fused is not None:
            off, size = (ours - fused[name]).norm().item(), fused[name].norm().item()
            expect(
                off <= LORA_ERROR * change + ROUNDING * size,
                f"{path.name}: {name} is {off:.1e} off what diffusers makes of it, where the LoRA"
                f" changes it by {change:.1e}",
                "compare rank, alpha and scale in the file's header with `_factor` in"
                " `sana_cli/weights/lora.py`",
            )
    expect(
        changed > 0 and lora.container == container,
        f"{path.name}, read as {lora.container}, changes {changed} tensors",
        f"it was published as {container}: see whether its updates are zero, or misread",
    )
