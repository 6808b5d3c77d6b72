"""Memory plans: what runs at once and in what pieces. A plan does not affect the image.

The peaks of the stages come from `peaks.py`. Nothing here imports torch unless a GPU is asked.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from operator import ge
from typing import Any, Literal

from sana_cli.errors import NotEnoughMemory
from sana_cli.models.architectures import GEMMA_2_2B
from sana_cli.models.streaming import STRIP_BYTES
from sana_cli.pipeline.peaks import PeakCache
from sana_cli.recipe import Recipe
from sana_cli.system.devices import int8_fault, resident_bytes
from sana_cli.system.inventory import memory
from sana_cli.units import gigabytes
from sana_cli.weights.catalogue import Model, known_models
from sana_cli.weights.model_files import ModelFiles, released_model

LONGEST_PROMPT = 300  # tokens
LONGEST_TEXT = 507  # with the instruction
# The widest map of 1024x1024 in 16 bits. A map that is one strip takes the fewest launches, and no
# rows have to be copied between strips.
GPU_STRIP_BYTES = 16 * STRIP_BYTES
CPU_STRIP_BYTES = STRIP_BYTES // 4  # of a small image; with less, convolutions become slower
MIN_STRIP = STRIP_BYTES >> 10
TALLEST_CHUNK = 32  # rows of the latent grid
KEPT_FREE = 0.1  # of a device's memory, reserved for its libraries
CONTEXT_BYTES = 500 << 20  # of a GPU, for CUDA's context and the code of its libraries
ROOMY = 0.5  # of the memory: peaks of stages bounded below this are not asked for
ITEMSIZE = {"float32": 4, "float16": 2, "bfloat16": 2, "int8": 1}  # bytes


@dataclass(frozen=True)
class Plan:
    device: str
    batched_cfg: bool = True  # both halves of guidance in one batch
    row_chunk: int | None = None  # rows of the latent grid denoised at once; None: all
    strip_bytes: int = STRIP_BYTES  # of the widest tensor in a strip of the autoencoder
    keep_loaded: bool = False  # transformer and decoder fit in memory together
    budget: int = 0  # bytes that tensors on the device may take
    peaks: dict[str, int] = field(default_factory=dict)  # predicted bytes by stage, if predicted
    bounds: dict[str, int] = field(default_factory=dict)  # bytes by stage, never exceeded

    @property
    def folds_text(self) -> bool:
        """Whether the text may be folded into the projections, which trades memory for time."""
        return self.batched_cfg and self.row_chunk is None

    def choices(self) -> dict[str, Any]:
        """Return the choices, for JSON documents."""
        names = ("batched_cfg", "row_chunk", "strip_bytes", "keep_loaded")
        return {name: getattr(self, name) for name in names}

    def describe(self) -> list[str]:
        """Describe what was chosen to save memory and the predicted peaks, if either applies."""
        default = _default_plan(self.device)
        changes = (
            replace(default, batched_cfg=self.batched_cfg),
            replace(default, row_chunk=self.row_chunk),
            replace(default, strip_bytes=self.strip_bytes),
        )
        saved = [plan.difference(default) for plan in changes if plan != default]
        lines = [f"to save memory, {' and '.join(saved)}"] if saved else []
        if self.peaks:
            peaks = ", ".join(f"{stage} {gigabytes(size)}" for stage, size in self.peaks.items())
            lines.append(f"expected memory: {peaks}, of {gigabytes(self.budget)}")
        return lines

    def fallback_plans(self, stage: str) -> Iterator["Plan"]:
        """Yield this plan, then plans by which a stage needs ever less memory.

        `stage` is "encode", "image", "denoise" or "decode". The last resort is the CPU.
        """
        yield (plan := self)
        if stage == "denoise":
            plan = replace(plan, keep_loaded=False)
            if plan.batched_cfg:
                yield (plan := replace(plan, batched_cfg=False))
            rows = min(2 * TALLEST_CHUNK, plan.row_chunk or 2 * TALLEST_CHUNK)
            while rows > 1:
                rows //= 2
                yield (plan := replace(plan, row_chunk=rows))
        if stage in ("image", "decode"):
            while plan.strip_bytes // 4 >= MIN_STRIP:
                plan = replace(plan, strip_bytes=plan.strip_bytes // 4, keep_loaded=False)
                yield plan
        if plan.device != "cpu":
            yield replace(plan, device="cpu")

    def difference(self, before: "Plan") -> str:
        """Describe what this plan does differently to need less memory."""
        if self.device != before.device:
            return "on the CPU"
        if self.row_chunk != before.row_chunk:
            return f"with {self.row_chunk} rows of the latent at a time"
        if self.strip_bytes != before.strip_bytes:
            return f"with {gigabytes(self.strip_bytes)} strips"
        return "with the halves of guidance one after the other"


def make_plan(
    recipes: list[Recipe],
    files: ModelFiles,
    device: str,
    limit: int | None = None,
    *,
    predict: bool = False,
    held: int = 0,
    overhead: int | None = None,
    cache: PeakCache | None = None,
) -> Plan:
    """Make the fastest plan whose peaks stay under `limit` bytes, or what is free on the device.

    The recipes are of one model and one precision; each of them fits. With `predict` the peaks are
    predicted even if the upper bounds fit. `held` is the bytes of loaded networks, which count as
    free, as they may be released. `overhead` is what the process held before any network, if that
    was measured. `cache` holds peaks that are known already. NotEnoughMemory, with the smallest
    change that would fit, if no plan fits.
    """
    cache = cache or PeakCache()
    recipes = _most_demanding(recipes)
    # What is not tensors counts against the user's limit too: the context on a GPU, elsewhere the
    # interpreter and its libraries.
    used = 0
    if limit is not None and device.startswith("cuda"):
        used = CONTEXT_BYTES
    elif limit is not None:
        used = resident_bytes() if overhead is None else overhead
    free = int(free_memory(device, held) * (1 - KEPT_FREE)) if limit is None else limit
    budget = free - used
    plan = _default_plan(device, budget)
    bounds = _upper_bounds(max(recipes, key=demands), files, plan.strip_bytes)
    if limit is None and not predict and max(bounds.values()) < ROOMY * budget:
        together = bounds["denoise"] + bounds["decode"] < budget
        return replace(plan, bounds=bounds, keep_loaded=together)
    denoising, plan, peaks = _fit_all(plan, cache, recipes, files)
    worst = max(peaks, key=lambda stage: peaks[stage])
    if peaks[worst] > budget:
        least = peaks[worst] + used
        chosen = denoising if worst == "denoise" else plan
        recipe = max(recipes, key=lambda r: PEAKS[worst](cache, chosen, r, files))
        raise NotEnoughMemory(
            f"to {worst} {recipe.native_width}x{recipe.native_height} takes {gigabytes(least)},"
            f" more than the {gigabytes(budget + used)} there are",
            _what_fits(cache, recipes, files, _default_plan(device, budget))
            or f"it fits in --memory {least / 1e9 + 0.05:.1f}GB",
        )
    # More than either takes beside the other's weights.
    together = denoising.batched_cfg and peaks["denoise"] + peaks["decode"] < budget
    if denoising.batched_cfg and not together and plan.strip_bytes > STRIP_BYTES:
        # Smaller strips take less time than loading the networks in turns.
        smaller = replace(plan, strip_bytes=plan.strip_bytes // 4)
        needed = _peak("decode", smaller, cache, recipes, files)
        together = peaks["denoise"] + needed < budget
        if together:
            plan, peaks["decode"] = smaller, needed
    return replace(
        denoising,
        strip_bytes=plan.strip_bytes,
        peaks=peaks,
        bounds=dict(peaks),
        keep_loaded=together,
    )


def fits(model: Model, device: str, free: int) -> str:
    """Return whether a model at its native size fits in `free` bytes: "yes", "tight" or "no".

    "tight" means that every stage runs in small pieces. The figures in `weights.toml` are for a
    GPU; on other devices everything is float32.
    """
    if model.memory is None or model.least_memory is None:
        return "yes"  # a bundled one
    fast, lean = model.memory, model.least_memory
    if not device.startswith("cuda"):
        text = 4 * GEMMA_2_2B.linear_weights
        fast, lean = max(2 * fast, text), max(2 * lean, text)
    room = free * (1 - KEPT_FREE)
    return "yes" if fast <= room else "tight" if lean <= room else "no"


def free_memory(device: str, held: int = 0) -> int:
    """Return the free bytes on a device; a very large number where the system does not report.

    `held` is the bytes of loaded networks, which count as free. On a GPU what torch holds for reuse
    does too; a CUDA graph's memory is part of that.
    """
    if device.startswith("cuda"):
        import torch

        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused + held
    facts = memory()
    free = [facts["available_bytes"], facts["limit_free_bytes"]]
    bounds = [n + held for n in free if n is not None]
    if facts["limit_bytes"] is not None:
        # Of what networks hold, the part that is swapped out is not in use.
        bounds.append(facts["limit_bytes"])
    return min(bounds, default=2**62)


def is_guided(recipe: Recipe, files: ModelFiles) -> bool:
    """Whether every step also runs with the negative text, for classifier-free guidance."""
    return recipe.guidance > 1 and not files.is_sprint


# --- peaks of the stages -----------------------------------------------------------------------


def demands(recipe: Recipe) -> tuple[int, ...]:
    """Return what the peaks depend on, among recipes of one model and one precision.

    A recipe of which no number is larger than another's needs no more memory in any stage, within a
    few percent. The width is one of them, as rows and strips are whole.
    """
    negative = 1 if recipe.negative == "" else LONGEST_PROMPT  # tokens
    return (
        recipe.native_width * recipe.native_height,
        recipe.native_width,
        recipe.steps,
        negative if recipe.guidance > 1 else 0,
        int(recipe.pag is not None),
        int(recipe.control is not None),
        int(recipe.image is not None),
    )


def _most_demanding(recipes: list[Recipe]) -> list[Recipe]:
    """Return one recipe of each kind that may need the most memory in some stage."""
    kinds = {demands(recipe): recipe for recipe in recipes}
    return [
        recipe
        for kind, recipe in kinds.items()
        if not any(other != kind and all(map(ge, other, kind)) for other in kinds)
    ]


def _default_plan(device: str, budget: int = 0) -> Plan:
    """Return the plan that does nothing to save memory."""
    strip_bytes = GPU_STRIP_BYTES if device.startswith("cuda") else STRIP_BYTES
    return Plan(device, strip_bytes=strip_bytes, budget=budget)


def _fit_all(
    plan: Plan, cache: PeakCache, recipes: list[Recipe], files: ModelFiles
) -> tuple[Plan, Plan, dict[str, int]]:
    """Fit every stage: the plan to denoise by, that of the other stages, and the peaks."""
    peaks = {"encode": _peak("encode", plan, cache, recipes, files)}
    with_image = [r for r in recipes if r.image is not None or r.control is not None]
    if with_image:
        plan, peaks["image"] = _fit(plan, "image", cache, with_image, files)
    denoising, peaks["denoise"] = _fit(plan, "denoise", cache, recipes, files)
    plan, peaks["decode"] = _fit(plan, "decode", cache, recipes, files)
    return denoising, plan, peaks


def _fit(
    first: Plan, stage: str, cache: PeakCache, recipes: list[Recipe], files: ModelFiles
) -> tuple[Plan, int]:
    """Return the first plan whose peak is within the budget, else the smallest; and its peak."""
    budget = first.budget
    # The last fallback, another device, is not planned for.
    others = [plan for plan in first.fallback_plans(stage) if plan.device == first.device][1:]
    needed = _peak(stage, first, cache, recipes, files)
    if needed <= budget or not others:
        return first, needed
    least = _peak(stage, others[-1], cache, recipes, files)
    if least > budget:
        return others[-1], least
    for plan in others:
        needed = _peak(stage, plan, cache, recipes, files)
        if needed <= budget:
            break
    return plan, needed


def _peak(
    stage: str, plan: Plan, cache: PeakCache, recipes: list[Recipe], files: ModelFiles
) -> int:
    """Return the largest peak of a stage among the recipes."""
    return max(PEAKS[stage](cache, plan, recipe, files) for recipe in recipes)


def _text_peak(cache: PeakCache, plan: Plan, recipe: Recipe, files: ModelFiles) -> int:
    return cache.text_encoder(files.text, recipe.text_dtype, LONGEST_TEXT)


def _denoise_peak(cache: PeakCache, plan: Plan, recipe: Recipe, files: ModelFiles) -> int:
    # An empty text is one token.
    lengths = [1 if recipe.negative == "" else LONGEST_PROMPT] if is_guided(recipe, files) else []
    controlnet = files.controlnet if recipe.control else None
    peak = cache.transformer(
        files.dit,
        recipe.dit_dtype,
        _grid(recipe, files),
        [*lengths, LONGEST_PROMPT],
        recipe.steps,
        row_chunk=plan.row_chunk,
        batched_cfg=plan.batched_cfg,
        fold=plan.folds_text,
        perturbed=recipe.pag is not None,
        controlnet=controlnet,
        quantised=recipe.quant is not None,
    )
    if recipe.quant is not None and not plan.device.startswith("cuda"):  # whose memory holds both
        peak = max(peak, cache.quantising(files.dit, recipe.dit_dtype, controlnet))
    return peak


def _decode_peak(cache: PeakCache, plan: Plan, recipe: Recipe, files: ModelFiles) -> int:
    strip_bytes = decode_strip_bytes(plan, recipe, files)
    return _autoencoder_peak(cache, "decoder", strip_bytes, recipe, files)


def _image_peak(cache: PeakCache, plan: Plan, recipe: Recipe, files: ModelFiles) -> int:
    return _autoencoder_peak(cache, "encoder", plan.strip_bytes, recipe, files)


def _autoencoder_peak(
    cache: PeakCache,
    half: Literal["encoder", "decoder"],
    strip_bytes: int,
    recipe: Recipe,
    files: ModelFiles,
) -> int:
    grid = _grid(recipe, files)
    return cache.autoencoder(files.vae, half, recipe.vae_dtype, grid, strip_bytes)


PEAKS: dict[str, Callable[[PeakCache, Plan, Recipe, ModelFiles], int]] = {
    "encode": _text_peak,
    "image": _image_peak,
    "denoise": _denoise_peak,
    "decode": _decode_peak,
}


def decode_strip_bytes(plan: Plan, recipe: Recipe, files: ModelFiles) -> int:
    """Return the plan's `strip_bytes`, on a CPU at most a quarter of the decoder's last map.

    A small map in one strip would be held several times over, which saves a CPU no time.
    """
    if plan.device != "cpu":
        return plan.strip_bytes
    width, size = files.vae.decoder_block_out_channels[0], ITEMSIZE[recipe.vae_dtype]
    last = recipe.native_height * recipe.native_width * width * size
    return min(plan.strip_bytes, max(CPU_STRIP_BYTES, last // 4))


def _grid(recipe: Recipe, files: ModelFiles) -> tuple[int, int]:
    """Return (h, w) of the latents."""
    return (
        recipe.native_height // files.vae.compression,
        recipe.native_width // files.vae.compression,
    )


def _upper_bounds(recipe: Recipe, files: ModelFiles, strip_bytes: int) -> dict[str, int]:
    """Return bytes by stage that no plan with such strips exceeds.

    They are computed from sizes alone, to be fast.
    """
    cells = recipe.native_height * recipe.native_width // files.vae.compression**2
    text = files.text.linear_weights * ITEMSIZE[recipe.text_dtype]
    text += LONGEST_TEXT * files.text.intermediate_size * 8 * 4
    width, size = files.dit.width, ITEMSIZE[recipe.dit_dtype]
    layers = files.dit.num_layers + (files.controlnet.num_layers if files.controlnet else 0)
    each = size + (recipe.quant is not None)  # bytes a weight, also while it is quantised
    denoise = layers * 18 * width**2 * each + cells * width * 2 * 40 * size
    widest, size = max(files.vae.decoder_block_out_channels), ITEMSIZE[recipe.vae_dtype]
    strips = max(40 * STRIP_BYTES, 8 * strip_bytes)
    decode = 160 * widest**2 * size + cells * 24 * widest * size + strips
    return {"encode": text, "image": decode, "denoise": denoise, "decode": decode}


# --- when nothing fits -------------------------------------------------------------------------


def _what_fits(
    cache: PeakCache, recipes: list[Recipe], files: ModelFiles, plan: Plan
) -> str | None:
    """Return the smallest change that fits, as options: a smaller text encoder, then image.

    The text encoder is tried first, as its peak is computed fast. A smaller image takes another
    model, for which a LoRA or a ControlNet may not be made.
    """
    defaults = {model.side: model for model in reversed(known_models().values()) if model.sources}
    area = max(recipe.native_width * recipe.native_height for recipe in recipes)
    sides = sorted((side for side in defaults if side and side**2 < area), reverse=True)
    if any(recipe.lora or recipe.control for recipe in recipes):
        sides = []
    for side in (None, *sides):
        words = ["use"]
        if side is not None:
            files = released_model(defaults[side])
            recipes = [replace(r, native_width=side, native_height=side) for r in recipes]
            # Both, as the call may name a model, or another size.
            words.append(f"--model {defaults[side].name} --res {side}")
        if _peak("encode", plan, cache, recipes, files) > plan.budget:
            if int8_fault(plan.device) is not None:
                continue
            eight = [replace(recipe, text_dtype="int8") for recipe in recipes]
            if _peak("encode", plan, cache, eight, files) > plan.budget:
                continue
            words.append("--text-precision int8")
        *_, peaks = _fit_all(plan, cache, recipes, files)
        if max(peak for stage, peak in peaks.items() if stage != "encode") <= plan.budget:
            return f"{' '.join(words)}, which fits"
    return None
