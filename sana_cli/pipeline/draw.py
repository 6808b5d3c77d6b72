"""Text states -> latents -> pixels, one stage at a time: load a network, use it, give it back.

Where a picture is the start, it becomes latents in a stage of its own, before the denoising.

`draw` is a generator: it says what it has done as it goes, and hands out each picture as soon as
it is decoded. It never prints.
"""

import time
from collections.abc import Callable, Generator, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar, cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from sana_cli.errors import BadImage, NotEnoughMemory, SanaError, UsageError
from sana_cli.instruction import as_read
from sana_cli.models.dc_ae import DCAE, Decoder, Encoder
from sana_cli.models.dit import DiT
from sana_cli.models.fused_dit import FusedDiT
from sana_cli.models.streaming.autoencoder import decode, encode
from sana_cli.models.streaming.strip_pipeline import Decoded
from sana_cli.models.streaming.subpixel import fold_upsamples
from sana_cli.pipeline.guidance import GuidedVelocity, is_guided
from sana_cli.pipeline.plan import Plan
from sana_cli.pipeline.solver import SOLVERS, advance, first_step
from sana_cli.pipeline.text_cache import TextCache
from sana_cli.recipe import Recipe
from sana_cli.system.devices import give_back, is_out_of_memory, keep_no_heap, peak_bytes
from sana_cli.weights.checkpoint import load_weights, on_meta
from sana_cli.weights.model_files import ModelFiles

if TYPE_CHECKING:
    from sana_cli.pipeline.text_encoder import TextEncoder

Result = TypeVar("Result")
Network = TypeVar("Network", bound=nn.Module)
Images = Mapping[str, np.ndarray]  # SHA-256 of a picture to start from -> uint8 RGB (h, w, 3)

TURN = 4  # pictures denoised, then decoded, where only one network is held at a time


@dataclass(frozen=True)
class Progress:
    """`done` of `total` units of a stage took `seconds`."""

    stage: str  # "load", "encode", "image", "denoise" or "decode"
    done: int
    total: int
    seconds: float
    peak_bytes: int = 0  # when the stage's last unit is done: the most memory held so far


@dataclass(frozen=True)
class Picture:
    """uint8 RGB (height, width, 3) of the recipe at `index`."""

    index: int
    pixels: np.ndarray


@dataclass(frozen=True)
class Failure:
    """Why there is no picture of the recipe at `index`. The others are drawn all the same."""

    index: int
    error: SanaError


@dataclass(frozen=True)
class Remark:
    """Something that happened on the way, for those who want to know; or should, as a warning."""

    text: str
    warning: bool = False


Event = Progress | Picture | Failure | Remark


def draw(
    recipes: list[Recipe],
    files: ModelFiles,
    plan: Plan,
    *,
    images: Images | None = None,
    cache: Path | None = None,
) -> Iterator[Event]:
    """Draw every recipe, all with one model and one precision.

    All texts are encoded first. Then transformer and decoder take turns, or stay loaded together
    and make one picture after the other, as the plan says. `images` holds the pixels of every
    picture that a recipe starts from; `cache` is a folder to keep and find texts in, and None
    reads and writes nothing.
    """
    for recipe in recipes:
        if (recipe.solver == "scm") != files.is_sprint:
            raise UsageError(f"{recipe.model} cannot be sampled by {recipe.solver}")
    return Run(recipes, files, plan, images or {}, cache).events()


class Run:
    """What `draw` holds while it draws."""

    def __init__(
        self,
        recipes: list[Recipe],
        files: ModelFiles,
        plan: Plan,
        images: Images,
        cache: Path | None,
    ) -> None:
        self.recipes, self.files, self.plan = recipes, files, plan
        self.images, self.cache = images, cache
        self.texts: dict[tuple[str, str], Tensor] = {}  # (instruction, text) -> states
        self.starts: dict[tuple[str, int, int], Tensor] = {}  # picture at a size -> latents
        self.latents: dict[int, Tensor] = {}  # of a recipe's index, waiting to be decoded
        self.text_encoder: TextEncoder | None = None
        self.transformer: FusedDiT | None = None
        self.decoder: Decoder | None = None
        self.steps_done = self.pictures_done = 0
        self.steps = sum(r.steps - first_step(r.steps, r.strength) for r in recipes)

    def events(self) -> Iterator[Event]:
        keep_no_heap()
        yield from self.encode_texts()
        give_back(self.plan.device)
        if self.images:
            yield from self.encode_images()
            give_back(self.plan.device)
        turn = 1 if self.plan.resident else TURN
        for first in range(0, len(self.recipes), turn):
            some = range(first, min(first + turn, len(self.recipes)))
            yield from self.load_transformer()
            for i in some:
                yield from self.finish(i, self.denoise(i))
            yield from self.load_decoder()
            for i in some:
                if i in self.latents:
                    yield from self.finish(i, self.decode(i))

    def finish(self, i: int, stage: Iterator[Event]) -> Iterator[Event]:
        """The events of a stage of one picture, or that it failed."""
        try:
            yield from stage
        except (BadImage, NotEnoughMemory) as error:
            self.latents.pop(i, None)
            yield Failure(i, error)

    # --- text ----------------------------------------------------------------------------------

    def encode_texts(self) -> Iterator[Event]:
        """Fill `texts`: each distinct (instruction, text) once, as states (1, L, width)."""
        wanted = {(r.instruction, r.prompt): None for r in self.recipes}
        wanted |= {("", r.negative): None for r in self.recipes if is_guided(r, self.files)}
        parts, precision, device = self.files.parts, self.recipes[0].text_dtype, self.plan.device
        cache = TextCache(self.cache, parts, precision, device) if self.cache else None
        ladder = OOMRetry(self.plan.leaner_encoding(), "the text encoder")
        found = 0
        for i, (instruction, text) in enumerate(wanted):
            began = time.perf_counter()
            what = as_read(text), instruction
            states = cache.states(*what) if cache else None
            if states is not None:
                found += 1
            else:
                if self.text_encoder is None:  # it is not loaded if every text is found
                    yield from ladder.attempt(partial(self.load_text_encoder, cache))
                    yield loaded(began)
                    began = time.perf_counter()
                states = yield from ladder.attempt(partial(self.states_of, what, cache))
                if cache:
                    cache.keep_states(states, *what)
            self.texts[instruction, text] = states
            yield self.done("encode", i + 1, len(wanted), began)
        self.text_encoder = None
        if cache:
            yield Remark(f"text cache: {found} of {len(wanted)} texts found")
            for fault in cache.faults():
                yield Remark(f"the cache in {self.cache} cannot be written: {fault}", warning=True)

    def states_of(self, what: tuple[str, str], cache: TextCache | None, plan: Plan) -> Tensor:
        return self.load_text_encoder(cache, plan).encode(*what)

    def load_text_encoder(self, cache: TextCache | None, plan: Plan) -> "TextEncoder":
        if self.text_encoder is None or self.text_encoder.device != plan.device:
            from sana_cli.pipeline.text_encoder import TextEncoder  # and the tokenizers' library

            self.text_encoder = None
            parts, precision = self.files.parts, self.recipes[0].text_dtype
            own = cache if plan.device == self.plan.device else None  # it is of one device
            self.text_encoder = TextEncoder(parts, precision, plan.device, own)
        return self.text_encoder

    # --- latents -------------------------------------------------------------------------------

    def encode_images(self) -> Iterator[Event]:
        """Fill `starts`: each picture at each size, as float32 latents (1, 32, h, w) on the CPU."""
        began = time.perf_counter()
        encoder = cast(Encoder, self.autoencoder("encoder"))
        yield loaded(began)
        sizes = {(r.image, r.native_height, r.native_width): None for r in self.recipes if r.image}
        for i, (image, height, width) in enumerate(sizes):
            began = time.perf_counter()
            # Stretched to the size, whatever its own aspect, as the reference does.
            size = width, height
            fitted = Image.fromarray(self.images[image]).resize(size, Image.Resampling.LANCZOS)
            pixels = torch.from_numpy(np.array(fitted))
            attempt = partial(self.latents_of, encoder, pixels)
            ladder = OOMRetry(self.plan.leaner_decoding(), f"the image at {width}x{height}")
            self.starts[image, height, width] = yield from ladder.attempt(attempt)
            yield self.done("image", i + 1, len(sizes), began)

    def latents_of(self, encoder: Encoder, pixels: Tensor, plan: Plan) -> Tensor:
        latents = encode(encoder.to(plan.device), pixels, strip_bytes=plan.strip_bytes)
        return (latents * self.files.vae.scaling_factor).float().cpu()

    def load_transformer(self) -> Iterator[Event]:
        if not self.plan.resident:
            self.decoder = None
            give_back(self.plan.device)
        if self.transformer is None:
            began = time.perf_counter()
            part = self.files.parts["transformer"]
            dit = on_meta(DiT, self.files.dit, part.config)
            load_weights(dit, part.weights, dtype_of(self.recipes[0].dit_dtype))
            self.transformer = self.moved(FusedDiT(dit))
            yield loaded(began)

    def denoise(self, i: int) -> Iterator[Event]:
        """Put a float32 (1, 32, h, w) into `latents`, on the CPU."""
        recipe, files = self.recipes[i], self.files
        texts = [self.texts[recipe.instruction, recipe.prompt]]
        if is_guided(recipe, files):
            texts.insert(0, self.texts["", recipe.negative])
        solver = SOLVERS[recipe.solver]
        schedule = solver.schedule(recipe.steps, recipe.flow_shift)
        first = first_step(recipe.steps, recipe.strength)
        draws = noise(recipe, files)
        sample, previous = next(draws), None
        if recipe.image:
            start = self.starts[recipe.image, recipe.native_height, recipe.native_width]
            sample = torch.lerp(start, sample, schedule.sigmas[first])
        ladder = OOMRetry(self.plan.leaner_denoising(), f"seed {recipe.seed}")
        engine = cast(FusedDiT, self.transformer)
        guided = GuidedVelocity(engine, texts, schedule.timesteps, recipe, files)
        sample = sample.to(self.plan.device)
        began = time.perf_counter()
        launched: list[Callable[[], None]] = []
        for step in range(first, recipe.steps):
            attempt = partial(guided, sample, step)
            velocity = yield from ladder.attempt(attempt)
            fresh = next(draws).to(sample.device) if solver.stochastic else None
            update = solver.update(schedule, step)
            sample, previous = advance(update, sample, velocity, previous, fresh)
            launched.append(self.mark())
            # A GPU is never left without work: a step is waited for when the next is launched.
            while len(launched) > (1 if sample.is_cuda and step < recipe.steps - 1 else 0):
                launched.pop(0)()
                self.steps_done += 1
                yield self.progress("denoise", self.steps_done, self.steps, began)
                began = time.perf_counter()
        self.latents[i] = sample.cpu()
        if fault := engine.unrecorded:
            yield Remark(f"no CUDA graph: {fault}", warning=True)

    # --- pixels --------------------------------------------------------------------------------

    def load_decoder(self) -> Iterator[Event]:
        if not self.plan.resident:
            self.transformer = None
            give_back(self.plan.device)
        if self.decoder is None:
            began = time.perf_counter()
            self.decoder = cast(Decoder, self.autoencoder("decoder"))
            yield loaded(began)

    def decode(self, i: int) -> Iterator[Event]:
        began = time.perf_counter()
        recipe, decoder = self.recipes[i], cast(Decoder, self.decoder)
        attempt = partial(self.pixels_of, self.latents.pop(i), recipe)
        ladder = OOMRetry(self.plan.leaner_decoding(), f"seed {recipe.seed}")
        drawn = yield from ladder.attempt(attempt)
        if fault_of(drawn) and recipe.vae_dtype != "float32":
            decoder.float()
            drawn = yield from ladder.attempt(attempt)
            decoder.to(dtype_of(recipe.vae_dtype))
            yield Remark(
                f"seed {recipe.seed} was decoded again in float32: {recipe.vae_dtype} gave a bad"
                " picture",
                warning=True,
            )
        self.pictures_done += 1
        if fault := fault_of(drawn):
            raise BadImage(
                f"seed {recipe.seed} came out as {fault}",
                "try --dtype float32, another seed, or other weights",
            )
        yield self.done("decode", self.pictures_done, len(self.recipes), began)
        yield Picture(i, drawn.pixels.numpy())

    def pixels_of(self, latent: Tensor, recipe: Recipe, plan: Plan) -> Decoded:
        """The picture, resized or cropped to the size of the recipe."""
        if not plan.resident:
            self.transformer = None
        decoder, vae = cast(Decoder, self.decoder).to(plan.device), self.files.vae
        latent = latent.to(plan.device, decoder.norm_out.weight.dtype) / vae.scaling_factor
        size = recipe.height, recipe.width
        resized = None
        if recipe.fit == "trained":
            height, width = (side * vae.compression for side in latent.shape[-2:])
            resized = covering((height, width), size)
        return decode(decoder, latent, resized=resized, size=size, strip_bytes=plan.strip_bytes)

    def autoencoder(self, half: str) -> nn.Module:
        """The "encoder" or the "decoder"; the other half stays on disk."""
        part = self.files.parts["vae"]
        network = getattr(on_meta(DCAE, self.files.vae, part.config), half)
        load_weights(network, part.weights, None, only=f"{half}.")
        if half == "decoder":
            fold_upsamples(network)  # before its weights are narrowed
        network.to(dtype_of(self.recipes[0].vae_dtype), memory_format=torch.channels_last)
        return self.moved(network)

    # --- shared --------------------------------------------------------------------------------

    def moved(self, network: Network) -> Network:
        """On the device of the plan, if there is room; a leaner plan may put it elsewhere."""
        try:
            return network.to(self.plan.device)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
        return network

    def mark(self) -> Callable[[], None]:
        """Waits for what has been launched until now."""
        if not self.plan.device.startswith("cuda"):
            return lambda: None
        return torch.cuda.current_stream(self.plan.device).record_event().synchronize

    def done(self, stage: str, done: int, total: int, began: float) -> Progress:
        device = self.plan.device
        if device.startswith("cuda"):
            torch.cuda.synchronize(device)
        return self.progress(stage, done, total, began)

    def progress(self, stage: str, done: int, total: int, began: float) -> Progress:
        peak = peak_bytes(self.plan.device) if done == total else 0
        return Progress(stage, done, total, time.perf_counter() - began, peak)


class OOMRetry:
    """Plans that need ever less memory, taken one after the other as it runs out."""

    def __init__(self, plans: Iterator[Plan], what: str) -> None:
        self.plans, self.plan, self.what = plans, next(plans), what

    def attempt(self, work: Callable[[Plan], Result]) -> Generator[Remark, None, Result]:
        """What `work` makes by the first plan that it does not run out of memory with."""
        while True:
            try:
                return work(self.plan)
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
            give_back(self.plan.device)  # what the failed attempt held is free by now
            before, leaner = self.plan, next(self.plans, None)
            if leaner is None:
                raise NotEnoughMemory(
                    f"{self.what}: not enough memory, even in the smallest pieces",
                    "ask for fewer pixels, or use --device cpu",
                )
            self.plan = leaner
            yield Remark(
                f"{self.what}: out of memory; goes on {leaner.difference(before)}", warning=True
            )


def noise(recipe: Recipe, files: ModelFiles) -> Iterator[Tensor]:
    """The recipe's noise, float32 (1, 32, h, w) again and again.

    Drawn on the CPU, so that it is the same whatever the device.
    """
    cell = files.vae.compression
    shape = (1, files.dit.in_channels, recipe.native_height // cell, recipe.native_width // cell)
    generator = torch.Generator("cpu").manual_seed(recipe.seed)
    while True:
        yield torch.randn(shape, generator=generator)


def covering(whole: tuple[int, int], size: tuple[int, int]) -> tuple[int, int]:
    """The smallest (height, width) in the shape of `whole` that covers `size`."""
    ratio = max(wanted / side for wanted, side in zip(size, whole, strict=True))
    # Truncated as the reference does, but never below the target by a rounding error, as can
    # happen there.
    height, width = (
        max(wanted, int(side * ratio)) for wanted, side in zip(size, whole, strict=True)
    )
    return height, width


def fault_of(drawn: Decoded) -> str | None:
    if drawn.low.isnan():
        return "NaN"
    return "one flat colour" if drawn.high - drawn.low < 1 / 255 else None


def dtype_of(name: str) -> torch.dtype:
    return getattr(torch, name)


def loaded(began: float) -> Progress:
    return Progress("load", 1, 1, time.perf_counter() - began)
