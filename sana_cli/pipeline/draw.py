"""Text states -> latents -> pixels, one stage at a time, with networks that may be loaded already.

An input image becomes latents in a stage of its own, before the denoising.

`draw` is a generator: it yields what has been done as it goes, and each image as soon as it is
decoded. It never prints.
"""

import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from sana_cli.errors import BadImage, NotEnoughMemory, UsageError
from sana_cli.instruction import normalise_prompt
from sana_cli.kernels import selfcheck
from sana_cli.kernels.dispatch import fallback_reason
from sana_cli.models.controlnet import ControlNet
from sana_cli.models.cuda_graph import RepeatedCall
from sana_cli.models.dc_ae import DCAE, Encoder
from sana_cli.models.dit import DiT
from sana_cli.models.fused_dit import FusedDiT, nbytes
from sana_cli.models.streaming.autoencoder import encode, prepare
from sana_cli.models.streaming.graphed_decoder import GraphedDecoder
from sana_cli.models.streaming.strip_pipeline import Decoded
from sana_cli.pipeline import packing, weight_cache
from sana_cli.pipeline.canvases import Canvases, Images
from sana_cli.pipeline.events import Event, Failure, ImageDone, Latents, Notice, Preview, Progress
from sana_cli.pipeline.guidance import GuidedVelocity
from sana_cli.pipeline.networks import NetworkKey, Networks, identity_of
from sana_cli.pipeline.oom_retry import OOMRetry
from sana_cli.pipeline.plan import Plan, decode_strip_bytes, is_guided
from sana_cli.pipeline.solver import SOLVERS, Repaint, advance, first_step
from sana_cli.pipeline.text_cache import TextCache
from sana_cli.recipe import Recipe, adapters_of
from sana_cli.system.devices import (
    cap_memory,
    is_out_of_memory,
    peak_bytes,
    reuse_freed_blocks,
)
from sana_cli.weights.checkpoint import load_weights, on_meta
from sana_cli.weights.layout import Tensors
from sana_cli.weights.lora import MergedTensors, unchanged_lora
from sana_cli.weights.model_files import ModelFiles

if TYPE_CHECKING:
    from sana_cli.pipeline.text_encoder import TextEncoder

TURN = 4  # images denoised, then decoded, where only one network fits at a time


def draw(
    recipes: list[Recipe],
    files: ModelFiles,
    plan: Plan,
    *,
    networks: Networks | None = None,
    images: Images | None = None,
    loras: Mapping[str, Path] | None = None,
    cache: Path | None = None,
    previews: int = 0,
    latents: bool = False,
    decoded: bool = True,
) -> Iterator[Event]:
    """Draw every recipe, all with one model and one precision.

    All texts are encoded first. Then transformer and decoder make one image after the other if
    both fit in memory, else they take turns. `networks` holds what is loaded already and keeps
    what is loaded here; `images` holds the pixels of every input image, and `loras` the file of
    every LoRA by its SHA-256; `cache` is a folder to keep text states in and find them again, and
    None reads and writes nothing. `previews` are decoded of each image while it is denoised, if
    transformer and decoder fit in memory together. With `latents` they are yielded after every
    step; what is not to be `decoded` ends with them. UsageError if a recipe names a solver that
    the model cannot use.
    """
    for recipe in recipes:
        if (recipe.solver == "scm") != files.is_sprint:
            raise UsageError(f"{recipe.model} cannot be sampled by {recipe.solver}")
    networks = networks or Networks(keep=False)
    return Drawing(
        *(recipes, files, plan, networks, images, cache, loras, previews, latents, decoded)
    ).events()


class Drawing:
    """The state of one call of `draw`."""

    def __init__(
        self,
        recipes: list[Recipe],
        files: ModelFiles,
        plan: Plan,
        networks: Networks,
        images: Images | None,
        cache: Path | None,
        loras: Mapping[str, Path] | None = None,
        previews: int = 0,
        yields_latents: bool = False,
        decoded: bool = True,
    ) -> None:
        self.recipes, self.files, self.plan = recipes, files, plan
        self.previews = previews
        self.yields_latents, self.decoded = yields_latents, decoded
        self.networks, self.cache = networks, cache
        self.canvases, self.loras = Canvases(images or {}, files.vae.compression), loras or {}
        self.text_states: dict[tuple[str, str], Tensor] = {}  # of (instruction, text)
        self.image_latents: dict[tuple[str, Recipe], Tensor] = {}  # by role and `start_of` a recipe
        self.latents: dict[int, Tensor] = {}  # of a recipe's index, waiting to be decoded
        self.weight_fault: str | None = None  # why quantised weights could not be kept
        self.steps_done = self.images_done = 0
        self.steps = sum(r.steps - first_step(r.steps, r.strength) for r in recipes)

    def events(self) -> Iterator[Event]:
        reuse_freed_blocks()
        if self.plan.budget:
            cap_memory(self.plan.device, self.plan.budget, self.networks.held_on(self.plan.device))
        yield from self.start_selfcheck(self.kernel_kinds)
        yield from self.encode_texts()
        self.done_with("text_encoder")
        if any(recipe.image or recipe.control for recipe in self.recipes):
            yield from self.encode_images()
            self.done_with("encoder")
        if self.previews and not self.plan.keep_loaded:
            self.previews = 0
            text = "no previews: transformer and decoder do not fit in memory together"
            yield Notice(text, warning=True)
        turn = 1 if self.plan.keep_loaded else TURN
        for first in range(0, len(self.recipes), turn):
            indices = range(first, min(first + turn, len(self.recipes)))
            transformer = yield from self.load_transformer()
            yield from self.remarks_of_selfcheck(self.kernel_kinds)
            for i in indices:
                yield from self.finish(i, self.denoise(i, transformer))
            del transformer
            if indices.stop == len(self.recipes):
                self.done_with("transformer")
            if not self.decoded:
                self.latents.clear()
                continue
            decoder = yield from self.load_decoder()
            for i in indices:
                if i in self.latents:
                    yield from self.finish(i, self.decode(i, decoder))
            del decoder
        self.done_with("decoder")

    def finish(self, i: int, stage: Iterator[Event]) -> Iterator[Event]:
        """Yield the events of a stage of one image, or its failure."""
        try:
            yield from stage
        except (BadImage, NotEnoughMemory) as error:
            self.latents.pop(i, None)
            yield Failure(i, error)

    # --- kernels -------------------------------------------------------------------------------

    @property
    def kernel_kinds(self) -> list[selfcheck.Kind]:
        """The precisions of the kernels of these recipes."""
        recipe = self.recipes[0]
        kinds = [(dtype_of(recipe.dit_dtype), False), (dtype_of(recipe.vae_dtype), False)]
        if recipe.quant == "w8a8":
            kinds.append((dtype_of(recipe.dit_dtype), True))
        return list(dict.fromkeys(kinds))

    def start_selfcheck(self, kinds: list[selfcheck.Kind]) -> Iterator[Event]:
        """Begin to check the kernels, if they are new to this GPU, while networks are loaded."""
        if self.runs_kernels and selfcheck.start(self.plan.device, kinds):
            yield Notice("compiling and checking the kernels, once for this GPU")

    def remarks_of_selfcheck(self, kinds: list[selfcheck.Kind]) -> Iterator[Event]:
        for text in selfcheck.remarks(self.plan.device, kinds) if self.runs_kernels else ():
            yield Notice(text, warning=True)

    @property
    def runs_kernels(self) -> bool:
        return fallback_reason(torch.device(self.plan.device)) is None

    # --- networks ------------------------------------------------------------------------------

    def key(self, part: str) -> NetworkKey:
        """What decides the tensors of a part: its files and its precision."""
        recipe, parts = self.recipes[0], self.files.parts
        if part == "text_encoder":
            return self.text_encoder_key(self.plan.device)
        if part == "transformer":
            weights = identity_of(parts[part])
            if self.files.controlnet is not None:
                weights += identity_of(parts["controlnet"])
            return NetworkKey(
                *(part, weights, recipe.dit_dtype),
                adapters=adapters_of(recipe),
                quant=recipe.quant,
            )
        return NetworkKey(part, identity_of(parts["vae"]), recipe.vae_dtype)

    def load(
        self, part: str, stage: str, build: Callable[[], tuple[nn.Module, int]]
    ) -> Generator[Event, None, Any]:
        """Find a network among the loaded ones or build it, after making room for its stage."""
        began = time.perf_counter()
        key = self.key(part)
        self.make_room(stage, key)
        network = self.networks.find(key)
        if network is None:
            network, size = build()
            self.networks.add(key, network, size)
            yield Progress("load", 1, 1, time.perf_counter() - began, network=part)
        return network

    def make_room(self, stage: str, key: NetworkKey) -> None:
        needed, budget = self.plan.bounds.get(stage, self.plan.budget), self.plan.budget
        self.networks.make_room(needed, budget, key, self.plan.device)

    def load_transformer(self) -> Generator[Event, None, FusedDiT]:
        transformer = yield from self.load("transformer", "denoise", self.transformer)
        if self.weight_fault is not None:
            text = f"the 8-bit weights cannot be kept in {self.cache}: {self.weight_fault}"
            yield Notice(text, warning=True)
            self.weight_fault = None
        return transformer

    def load_decoder(self) -> Generator[Event, None, GraphedDecoder]:
        build = partial(self.autoencoder, "decoder")
        return (yield from self.load("decoder", "decode", build))

    def done_with(self, part: str) -> None:
        """Release a network that nothing in this call needs any more, unless networks are kept."""
        if not self.networks.keep:
            self.networks.release(part, device=self.plan.device)

    def retry(self, stage: str, what: str, part: str) -> OOMRetry:
        """The plans of a stage, which first give up every network but the one in use."""
        release = partial(self.networks.release_idle, self.key(part), self.plan.device)
        return OOMRetry(self.plan.fallback_plans(stage), what, release)

    def moved(self, network: nn.Module) -> nn.Module:
        """Move a network to the plan's device if there is room; another plan may move it later."""
        try:
            return network.to(self.plan.device)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
        return network

    # --- text ----------------------------------------------------------------------------------

    def encode_texts(self) -> Iterator[Event]:
        """Fill `text_states`: each distinct (instruction, text) once, as states (1, L, width)."""
        wanted = {(r.instruction, r.prompt): None for r in self.recipes}
        wanted |= {("", r.negative): None for r in self.recipes if is_guided(r, self.files)}
        parts, precision, device = self.files.parts, self.recipes[0].text_dtype, self.plan.device
        cache = TextCache(self.cache, parts, precision, device) if self.cache else None
        retry = self.retry("encode", "the text encoder", "text_encoder")
        found = 0
        for i, (instruction, text) in enumerate(wanted):
            began = time.perf_counter()
            prompt, ran = (normalise_prompt(text), instruction), ""
            states = cache.states(*prompt) if cache else None
            if states is not None:
                found += 1
            else:  # the text encoder is not loaded if every text is found
                loaded = yield from retry.attempt(partial(self.load_text_encoder, cache))
                if loaded:
                    seconds = time.perf_counter() - began
                    yield Progress("load", 1, 1, seconds, network="text_encoder")
                    began = time.perf_counter()
                states = yield from retry.attempt(partial(self.states_of, prompt, cache))
                ran = "text_encoder"
                if cache:
                    cache.keep_states(states, *prompt)
            self.text_states[instruction, text] = states
            yield self.done("encode", i + 1, len(wanted), began, ran)
        if cache:
            yield Notice(f"text cache: {found} of {len(wanted)} texts found")
            for fault in cache.faults():
                yield Notice(f"the cache in {self.cache} cannot be written: {fault}", warning=True)

    def states_of(self, prompt: tuple[str, str], cache: TextCache | None, plan: Plan) -> Tensor:
        self.load_text_encoder(cache, plan)  # on another device if the plan has changed
        encoder = self.networks.find(self.text_encoder_key(plan.device))
        return cast("TextEncoder", encoder).encode(*prompt)

    def load_text_encoder(self, cache: TextCache | None, plan: Plan) -> bool:
        """Load the text encoder on a plan's device unless it is there; whether it was loaded."""
        from sana_cli.pipeline.text_encoder import TextEncoder  # imports the tokenizers' library

        key = self.text_encoder_key(plan.device)
        # The cache holds what one device has computed.
        own_cache = cache if plan.device == self.plan.device else None
        encoder: TextEncoder | None = self.networks.find(key)
        if encoder is not None:
            encoder.cache = own_cache
            return False
        if plan.device != self.plan.device:
            self.networks.release("text_encoder", device=self.plan.device)
        self.make_room("encode", key)
        parts, text = self.files.parts, self.files.text
        encoder = TextEncoder(parts, key.dtype, plan.device, own_cache)
        size = 1 if key.dtype == "int8" else dtype_of(key.dtype).itemsize
        self.networks.add(key, encoder, text.linear_weights * size)
        return True

    def text_encoder_key(self, device: str) -> NetworkKey:
        weights = identity_of(self.files.parts["text_encoder"])
        return NetworkKey("text_encoder", weights, self.recipes[0].text_dtype, device)

    # --- latents -------------------------------------------------------------------------------

    def encode_images(self) -> Iterator[Event]:
        """Fill `image_latents`: each distinct start, float32 (1, 32, h, w) on the CPU."""
        encoder = yield from self.load("encoder", "image", partial(self.autoencoder, "encoder"))
        wanted = {("init", start_of(r)): None for r in self.recipes if r.image}
        wanted |= {("control", start_of(r)): None for r in self.recipes if r.control}
        for i, (role, start) in enumerate(wanted):
            began = time.perf_counter()
            if role == "init":
                image, _ = self.canvases.canvas(start)
            else:
                image = self.canvases.control(start)
            attempt = partial(self.latents_of, encoder, torch.from_numpy(np.array(image)))
            size = f"{start.native_width}x{start.native_height}"
            retry = self.retry("image", f"the image at {size}", "encoder")
            self.image_latents[role, start] = yield from retry.attempt(attempt)
            yield self.done("image", i + 1, len(wanted), began)

    def latents_of(self, encoder: Encoder, pixels: Tensor, plan: Plan) -> Tensor:
        latents = encode(encoder.to(plan.device), pixels, strip_bytes=plan.strip_bytes)
        return (latents * self.files.vae.scaling_factor).float().cpu()

    def transformer(self) -> tuple[FusedDiT, int]:
        """Build the transformer; its bytes."""
        part, dtype = self.files.parts["transformer"], dtype_of(self.recipes[0].dit_dtype)
        dit = on_meta(DiT, self.files.dit, part.config)
        weights: Sequence[Path | Tensors] = part.weights
        adapters = adapters_of(self.recipes[0])
        if adapters:
            loras = [(unchanged_lora(self.loras[a.sha256], a.sha256), a.scale) for a in adapters]
            weights = [MergedTensors(part.weights, loras, self.files.dit, dtype)]
        load_weights(dit, weights, dtype)
        fused = FusedDiT(dit, self.controlnet(dtype))
        if self.recipes[0].quant is not None:
            own = [part, *([self.files.parts["controlnet"]] if self.files.controlnet else [])]
            of = own, self.recipes[0].dit_dtype, adapters
            self.weight_fault = weight_cache.quantise(fused, *of, self.cache)
        elif (
            self.plan.device == "cpu"
            and dtype == torch.float32
            and packing.pays(self.steps, self.cache)
        ):
            fused.pack(mapped=all(isinstance(source, Path) for source in weights))
        return cast(FusedDiT, self.moved(fused)), nbytes(fused)

    def controlnet(self, dtype: torch.dtype) -> ControlNet | None:
        """Build the ControlNet, if there is one."""
        if self.files.controlnet is None:
            return None
        part = self.files.parts["controlnet"]
        network = on_meta(ControlNet, self.files.controlnet, part.config)
        load_weights(network, part.weights, dtype)
        return network

    def denoise(self, i: int, transformer: FusedDiT) -> Iterator[Event]:
        """Put a float32 (1, 32, h, w) into `latents`, on the CPU."""
        recipe, files = self.recipes[i], self.files
        states = [self.text_states[recipe.instruction, recipe.prompt]]
        if is_guided(recipe, files):
            states.insert(0, self.text_states["", recipe.negative])
        solver = SOLVERS[recipe.solver]
        schedule = solver.schedule(recipe.steps, recipe.flow_shift)
        first = first_step(recipe.steps, recipe.strength)
        draws = noise(recipe, files)
        sample, previous, repaint = next(draws), None, None
        if recipe.image:
            start = self.image_latents["init", start_of(recipe)]
            sample = torch.lerp(start, sample, schedule.sigmas[first])
            painted = self.canvases.cells_of(recipe)
            if painted is not None:
                mask = torch.from_numpy(painted).float()[None, None]
                repaint = Repaint(start.to(self.plan.device), mask.to(self.plan.device))
                share = f"{painted.sum()} of {painted.size} cells"
                yield Notice(f"repainting {share} of {self.files.vae.compression} pixels a side")
        retry = self.retry("denoise", f"seed {recipe.seed}", "transformer")
        control = self.image_latents["control", start_of(recipe)] if recipe.control else None
        guided = GuidedVelocity(transformer, states, schedule.timesteps, recipe, files, control)
        sample = sample.to(self.plan.device)
        began = time.perf_counter()
        launched: list[Callable[[], None]] = []
        shown = preview_steps(first, recipe.steps, self.previews)
        for step in range(first, recipe.steps):
            attempt = partial(guided, sample, step)
            velocity = yield from retry.attempt(attempt)
            fresh = next(draws).to(sample.device) if solver.stochastic else None
            update = solver.update(schedule, step)
            sample, previous = advance(update, sample, velocity, previous, fresh, repaint)
            launched.append(self.mark())
            # A GPU is never left without work: a step is waited for when the next is launched.
            while len(launched) > (1 if sample.is_cuda and step < recipe.steps - 1 else 0):
                launched.pop(0)()
                self.steps_done += 1
                yield self.progress("denoise", self.steps_done, self.steps, began)
                began = time.perf_counter()
            if step in shown:
                yield from self.preview(i, step + 1, previous)
                began = time.perf_counter()
            if self.yields_latents:
                yield Latents(i, step - first, schedule.timesteps[step], sample)
                began = time.perf_counter()
        self.latents[i] = sample.cpu()
        if not self.decoded and not self.latents[i].isfinite().all():
            raise bad_image(recipe, "NaN")
        yield from remarks_of_graph(transformer.graph, "a step")

    # --- pixels --------------------------------------------------------------------------------

    def preview(self, i: int, step: int, estimate: Tensor) -> Iterator[Event]:
        """Decode the estimate of the finished image, the solver's x₀, float32 (1, 32, h, w)."""
        if not self.previews:
            return
        recipe = self.recipes[i]
        decoder = yield from self.load_decoder()
        try:
            decoded = self.pixels_of(decoder, estimate, recipe, self.plan)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            self.previews = 0
            yield Notice("no more previews: out of memory", warning=True)
        else:
            pixels = self.canvases.with_kept_pixels(decoded.pixels.numpy(), recipe)
            yield Preview(i, step, recipe.steps, pixels)

    def decode(self, i: int, decoder: GraphedDecoder) -> Iterator[Event]:
        began = time.perf_counter()
        recipe = self.recipes[i]
        attempt = partial(self.pixels_of, decoder, self.latents.pop(i), recipe)
        retry = self.retry("decode", f"seed {recipe.seed}", "decoder")
        decoded = yield from retry.attempt(attempt)
        yield from remarks_of_graph(decoder.graph, "a decode")
        if fault_of(decoded) and recipe.vae_dtype != "float32":
            kinds = [(torch.float32, False)]
            yield from self.start_selfcheck(kinds)
            decoded = yield from retry.attempt(partial(attempt, dtype="float32"))
            yield from self.remarks_of_selfcheck(kinds)
            decoder.place(retry.plan.device, dtype_of(recipe.vae_dtype))
            yield Notice(
                f"seed {recipe.seed} was decoded again in float32, as {recipe.vae_dtype} gave"
                " NaN or a flat image",
                warning=True,
            )
        self.images_done += 1
        if fault := fault_of(decoded):
            raise bad_image(recipe, fault)
        yield self.done("decode", self.images_done, len(self.recipes), began)
        yield ImageDone(i, self.canvases.with_kept_pixels(decoded.pixels.numpy(), recipe))

    def pixels_of(
        self,
        decoder: GraphedDecoder,
        latent: Tensor,
        recipe: Recipe,
        plan: Plan,
        dtype: str | None = None,
    ) -> Decoded:
        """Decode latents, resized or cropped to the size of the recipe, in its precision or one."""
        chosen, vae = dtype_of(dtype or recipe.vae_dtype), self.files.vae
        decoder.place(plan.device, chosen)
        latent = latent.to(plan.device, chosen) / vae.scaling_factor
        size = recipe.height, recipe.width
        resized = None
        if recipe.fit == "trained":
            height, width = (side * vae.compression for side in latent.shape[-2:])
            resized = covering((height, width), size)
        return decoder.decode(
            latent,
            resized=resized,
            size=size,
            strip_bytes=decode_strip_bytes(plan, recipe, self.files),
            graphed=plan.keep_loaded,  # then the peaks of both stages fit together, so it does
        )

    def autoencoder(self, half: str) -> tuple[nn.Module, int]:
        """Build the "encoder" or the "decoder"; its bytes. The other half stays on disk."""
        part = self.files.parts["vae"]
        network = getattr(on_meta(DCAE, self.files.vae, part.config), half)
        load_weights(network, part.weights, None, only=f"{half}.")
        prepare(network, dtype_of(self.recipes[0].vae_dtype))
        if half == "decoder":
            network = GraphedDecoder(network)
        return self.moved(network), nbytes(network)

    # --- progress ------------------------------------------------------------------------------

    def mark(self) -> Callable[[], None]:
        """Return a function that waits for what has been launched until now."""
        if not self.plan.device.startswith("cuda"):
            return lambda: None
        return torch.cuda.current_stream(self.plan.device).record_event().synchronize

    def done(self, stage: str, done: int, total: int, began: float, network: str = "") -> Progress:
        """Report work as done, after waiting for the device to have done it."""
        device = self.plan.device
        if device.startswith("cuda"):
            torch.cuda.synchronize(device)
        return self.progress(stage, done, total, began, network)

    def progress(
        self, stage: str, done: int, total: int, began: float, network: str = ""
    ) -> Progress:
        peak = peak_bytes(self.plan.device) if done == total else 0
        return Progress(stage, done, total, time.perf_counter() - began, peak, network)


def start_of(recipe: Recipe) -> Recipe:
    """What of a recipe decides the latents of its input image; the rest is blank."""
    blank = dict.fromkeys(("prompt", "negative", "instruction", "solver", "model"), "")
    numbers = dict.fromkeys(("seed", "steps", "guidance"), 0)
    return replace(recipe, **blank, **numbers, strength=None)  # type: ignore[arg-type]


def preview_steps(first: int, steps: int, count: int) -> set[int]:
    """The steps, of those from `first` on, after which one of `count` previews is decoded.

    They are evenly spaced; the last step has none, as the image itself follows.
    """
    todo = steps - first
    done = {(k + 1) * todo // (count + 1) for k in range(count)}  # of the steps that are run
    return {first + n - 1 for n in done if 0 < n < todo}


def noise(
    recipe: Recipe, files: ModelFiles, generator: torch.Generator | None = None
) -> Iterator[Tensor]:
    """Yield the recipe's noise, float32 (1, 32, h, w), without end: of its seed, or a generator.

    Drawn on the CPU, so that it is the same whatever the device.
    """
    cell = files.vae.compression
    shape = (1, files.dit.in_channels, recipe.native_height // cell, recipe.native_width // cell)
    generator = generator or torch.Generator("cpu").manual_seed(recipe.seed)
    while True:
        yield torch.randn(shape, generator=generator)


def draw_all_noise(recipe: Recipe, files: ModelFiles, generator: torch.Generator) -> None:
    """Advance a generator by the noise that an image takes, as if it had drawn it."""
    draws = noise(recipe, files, generator)
    steps = recipe.steps - first_step(recipe.steps, recipe.strength)
    for _ in range(1 + steps * SOLVERS[recipe.solver].stochastic):
        next(draws)


def covering(whole: tuple[int, int], size: tuple[int, int]) -> tuple[int, int]:
    """Return the smallest (height, width) in the shape of `whole` that covers `size`."""
    ratio = max(wanted / side for wanted, side in zip(size, whole, strict=True))
    # Truncated as the reference does, but never below the target by a rounding error, as can
    # happen there.
    height, width = (
        max(wanted, int(side * ratio)) for wanted, side in zip(size, whole, strict=True)
    )
    return height, width


def remarks_of_graph(graph: RepeatedCall, what: str) -> Iterator[Event]:
    if graph.error is not None:
        yield Notice(f"no CUDA graph of {what}: {graph.error}", warning=True)


def fault_of(decoded: Decoded) -> str | None:
    if decoded.low.isnan():
        return "NaN"
    return "one flat colour" if decoded.high - decoded.low < 1 / 255 else None


def bad_image(recipe: Recipe, fault: str) -> BadImage:
    return BadImage(
        f"seed {recipe.seed} came out as {fault}",
        "try --dtype float32, another seed, or other weights",
    )


def dtype_of(name: str) -> torch.dtype:
    return getattr(torch, name)
