"""Settings to a recipe: every choice that is left open is made here, and only here."""

import contextlib
import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from sana_cli.errors import SanaError, UsageError
from sana_cli.instruction import INSTRUCTION
from sana_cli.recipe import Adapter, Recipe
from sana_cli.settings import Settings
from sana_cli.shapes import (
    Canvas,
    Margins,
    SizeRequest,
    choose_canvas,
    parse_aspect,
    parse_outpaint,
    parse_resolution,
)
from sana_cli.weights.catalogue import (
    Component,
    Model,
    choose_component,
    choose_model,
    known_components,
    known_models,
)
from sana_cli.weights.hub_cache import commit_of
from sana_cli.weights.lora_choice import LoraChoice, parse_lora

if TYPE_CHECKING:
    import numpy as np

    from sana_cli.images.files import Loaded
    from sana_cli.weights.model_files import ModelFiles

# Of an input image. "alpha" is its own transparency as a mask.
Role = Literal["init", "mask", "alpha", "control"]

MAX_SPRINT_STEPS = 4  # that Sana-Sprint was distilled to
DEFAULT_STRENGTH = 0.6
DEFAULT_PAG_LAYER = 8  # that of NVlabs' pipeline and of the model cards


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
    """An image or a mask given with the settings, by the SHA-256 of its bytes."""

    role: Role
    path: str
    sha256: str
    width: int
    height: int
    convention: str = ""  # of a mask: what is repainted
    turned: bool = False  # upright, by its EXIF
    notes: tuple[str, ...] = ()  # what of it was not used, for the user


class Inputs(Mapping[str, "np.ndarray"]):
    """Input images by SHA-256: uint8 RGB (height, width, 3), or a mask (height, width).

    The image and the mask used last stay in memory; any other is read again when it is used, so
    that a batch with thousands of them holds two.
    """

    def __init__(self) -> None:
        self._inputs: dict[str, InputImage] = {}
        self._by_file: dict[tuple[object, ...], InputImage] = {}  # by role, path and state
        self._uploads: dict[str, bytes] = {}  # files that are in memory, by name
        self._last: dict[str, tuple[str, np.ndarray]] = {}  # by role
        self.loras: dict[str, Path] = {}  # files by SHA-256

    def __getstate__(self) -> dict[str, Any]:
        """What another process needs, which reads the pixels itself."""
        return self.__dict__ | {"_last": {}}

    def add_bytes(self, name: str, data: bytes) -> None:
        """Put the bytes of an image file under a name, by which `add` finds it.

        UsageError, which names the option `name`, if it is not an image, or too large.
        """
        from sana_cli.images.files import check_upload

        check_upload(data, f"--{name}")
        self._uploads[name] = data

    def add(self, path: str, role: Role = "init") -> InputImage:
        """Read an image, unless its file is as it was when it was added. UsageError if it cannot
        be read."""
        file = None
        if path not in self._uploads:
            with contextlib.suppress(OSError, ValueError):  # reading tells what is wrong
                state = os.stat(os.path.expanduser(path))
                # Copies that keep the time, as by rsync, differ in the file or its change time.
                times = state.st_mtime_ns, state.st_ctime_ns
                file = role, path, state.st_size, state.st_ino, *times
        if file is not None and file in self._by_file:
            return self._by_file[file]
        loaded, pixels, convention = self._read(path, role)
        sha256 = hashlib.sha256(pixels.tobytes()).hexdigest()
        height, width = pixels.shape[:2]
        more = convention, loaded.turned, tuple(loaded.notes)
        image = InputImage(role, path, sha256, width, height, *more)
        alike = self._inputs.get(sha256, image)
        if (alike.width, alike.height) != (width, height):  # both of one colour, as blank masks are
            raise UsageError(
                f"{path} has the same bytes as {alike.path}, in another shape",
                "use them in separate runs",
            )
        self._inputs[sha256] = image
        self._last[role] = sha256, pixels
        if file is not None:
            self._by_file[file] = image
        return image

    def most_pixels(self, path: str) -> int:
        """Return how many pixels an image may have, also once its canvas has grown."""
        from sana_cli.images.files import MAX_PIXELS, UPLOAD_PIXELS

        return UPLOAD_PIXELS if path in self._uploads else MAX_PIXELS

    def _read(self, path: str, role: Role) -> "tuple[Loaded, np.ndarray, str]":
        from sana_cli.images.files import load, rgb
        from sana_cli.images.masks import to_mask

        data = self._uploads.get(path)
        if role in ("init", "control"):
            loaded = load(path, data, "--image" if role == "init" else "--control")
            return loaded, rgb(loaded, path), ""
        loaded = load(path, data, "--mask")
        return loaded, *to_mask(loaded, path, alpha=role == "alpha")

    def images(self) -> list[InputImage]:
        """All images that were added, each once."""
        return list(self._inputs.values())

    def __getitem__(self, sha256: str) -> "np.ndarray":
        """SanaError if the file has other pixels now than when it was added."""
        image = self._inputs[sha256]
        if self._last.get(image.role, ("",))[0] != sha256:
            _, pixels, _ = self._read(image.path, image.role)
            if hashlib.sha256(pixels.tobytes()).hexdigest() != sha256:
                raise SanaError(f"--image {image.path} has changed since this run began")
            self._last[image.role] = sha256, pixels
        return self._last[image.role][1]

    def release(self) -> None:
        """Drop the pixels in memory, which are read again when they are used."""
        self._last.clear()

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
    image: InputImage | None = None
    mask: InputImage | None = None
    margins: Margins | None = None
    control: InputImage | None = None
    vae: Component | None = None
    controlnet: Component | None = None
    loras: tuple[LoraChoice, ...] = ()
    adapters: tuple[Adapter, ...] | None = None  # of the LoRAs, once their files are here

    @property
    def notes(self) -> list[str]:
        """What of the input images is not used, for the user; of each file once."""
        images = filter(None, (self.image, self.mask, self.control))
        return list(dict.fromkeys(note for image in images for note in image.notes))

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

    def text_precision(
        self, files: "ModelFiles", device: str, memory: int | None = None
    ) -> tuple[str, str | None]:
        """Return the precision of the text encoder and a warning; `memory` is the user's limit."""
        from sana_cli.system.devices import choose_dtypes, choose_text_precision

        asked = self.settings
        text_dtype, _, _ = choose_dtypes(asked.dtype, device, self.model.dtype)
        return choose_text_precision(
            *(asked.text_precision, asked.dtype, text_dtype, device),
            *(files.text.linear_weights, memory),
        )

    def all_warnings(
        self, files: "ModelFiles", device: str, memory: int | None = None
    ) -> tuple[str, ...]:
        """Return the warnings about the inputs, the sampler and the choices for a device."""
        _, warning = self.text_precision(files, device, memory)
        return (*self.notes, *self.sampler(files).warnings, *([warning] if warning else []))

    def recipe(
        self, files: "ModelFiles", device: str, seed: int, memory: int | None = None
    ) -> Recipe:
        """Return a recipe for a device; `memory` is the user's limit, in bytes."""
        from sana_cli.kernels.dispatch import sums_in_half
        from sana_cli.system.devices import choose_dtypes

        asked, model, sampler = self.settings, self.model, self.sampler(files)
        text_dtype, _ = self.text_precision(files, device, memory)
        _, dit_dtype, vae_dtype = choose_dtypes(asked.dtype, device, model.dtype)
        in_half = dit_dtype == "float16" and sums_in_half(device)
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
            text_dtype=text_dtype,
            dit_dtype=dit_dtype,
            vae_dtype=vae_dtype,
            image=self.image.sha256 if self.image else None,
            strength=sampler.strength,
            image_fit=(asked.image_fit or "crop") if self.image or self.control else None,
            mask=self.mask.sha256 if self.mask else None,
            outpaint=",".join(map(str, self.margins)) if self.margins else None,
            lora=",".join(map(str, self.adapters or ())) or None,
            control=self.control.sha256 if self.control else None,
            control_scale=self._control_scale(),
            controlnet=self.controlnet.name if self.controlnet else None,
            vae=self.vae.name if self.vae else None,
            quant=None if asked.quant == "none" else asked.quant,
            sums="float16" if in_half else None,
            **self._pag(files),
        )

    def _control_scale(self) -> float | None:
        if self.control is None:
            return None
        return 1.0 if self.settings.control_scale is None else self.settings.control_scale

    def _pag(self, files: "ModelFiles") -> dict[str, Any]:
        """The fields of perturbed-attention guidance. UsageError for a layer that is not there."""
        asked, blocks = self.settings, files.dit.num_layers
        if not asked.pag:
            return {}
        layer = min(DEFAULT_PAG_LAYER, blocks - 1) if asked.pag_layer is None else asked.pag_layer
        if layer >= blocks:
            raise UsageError(
                f"--pag-layer {layer}: {self.model.name} has {blocks} layers",
                f"use 0 to {blocks - 1}",
            )
        return {"pag": asked.pag, "pag_layer": layer, "pag_adaptive": asked.pag_adaptive or None}

    def recipes(
        self, files: "ModelFiles", device: str, seeds: Sequence[int], memory: int | None = None
    ) -> list[Recipe]:
        """One recipe for every seed; everything else is resolved once."""
        first = self.recipe(files, device, seeds[0], memory)
        return [first, *(replace(first, seed=seed) for seed in seeds[1:])]


def resolve(settings: Settings, images: Inputs) -> Resolution:
    """Resolve settings as far as the catalogue allows; the input image is added to `images`.

    UsageError for everything that can be wrong with settings, if the model's kind is known.
    """
    request = parse_resolution(settings.res) if settings.res is not None else None
    aspect = parse_aspect(settings.ar) if settings.ar is not None else None
    model = choose_model(settings.model, request)
    loras = tuple(map(parse_lora, settings.lora))
    resolution = Resolution(settings, model, request, aspect, loras=loras)
    if model.solver is not None:
        resolution.sampler()
    if settings.vae is not None:
        resolution = replace(resolution, vae=choose_component("vae", settings.vae))
    if settings.control is not None:
        resolution = _with_control(resolution, settings.control, images)
    if settings.image is not None:
        resolution = _with_image(resolution, settings.image, images)
    if model.side is not None:
        resolution.canvas(model.side)
    return resolution


def _with_control(resolution: Resolution, path: str, images: Inputs) -> Resolution:
    """Add the control image and choose the ControlNet. UsageError if there is none."""
    model, name = resolution.model, resolution.settings.controlnet
    if model.solver == "scm":
        raise UsageError(f"{model.name} has no ControlNet", "use a model that is not Sana-Sprint")
    if name is not None:
        controlnet = choose_component("controlnet", name)
    else:
        known = known_components("controlnet").values()
        able = [
            one for one in known if model.architecture and one.architecture == model.architecture
        ]
        if not able:
            raise UsageError(
                f"no ControlNet is known for {model.name}", "give one: --controlnet FOLDER"
            )
        controlnet = able[0]
    control = images.add(path, "control")
    found = replace(resolution, control=control, controlnet=controlnet)
    if resolution.aspect is None and (resolution.request is None or resolution.request.side):
        found = replace(found, aspect=control.width / control.height)
    return found


def _with_image(resolution: Resolution, path: str, images: Inputs) -> Resolution:
    """Add the input image, its mask and margins; they decide the size where nothing else does."""
    asked, request = resolution.settings, resolution.request
    image = images.add(path)
    margins = parse_outpaint(asked.outpaint) if asked.outpaint is not None else None
    mask = None
    if asked.mask is not None:
        own = asked.mask == "alpha"
        mask = images.add(path, "alpha") if own else images.add(asked.mask, "mask")
        if (mask.width, mask.height) != (image.width, image.height):
            raise UsageError(
                f"--mask is {mask.width}x{mask.height} and --image {image.width}x{image.height}",
                "give a mask of the size of the image",
            )
    width, height = image.width, image.height
    if margins:
        width, height = width + margins.left + margins.right, height + margins.top + margins.bottom
        if width * height > (most := images.most_pixels(path)):
            raise UsageError(
                f"--outpaint {asked.outpaint} grows --image to {width}x{height} pixels; at most"
                f" {most / 1e6:.0f} million are taken",
                "give fewer pixels, as in --outpaint 256",
            )
    found = replace(resolution, image=image, mask=mask, margins=margins)
    if resolution.aspect is None and (request is None or request.side is not None):
        found = replace(found, aspect=width / height)
        if (mask or margins) and request is None and found.model.side is not None:
            # Pixels that are kept stay as they are only at their own size, if the model draws it.
            exact = replace(found, request=SizeRequest(None, width, height), aspect=None)
            with contextlib.suppress(UsageError):
                exact.canvas(found.model.side)
                return exact
    return found


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
    if guidance < 1:
        raise UsageError(f"--guidance {guidance} is below 1", "1 switches it off")
    if asked.negative.strip() and guidance == 1:
        raise UsageError(
            "--negative has no effect at --guidance 1", "raise --guidance, or leave it out"
        )
    strength, warnings = _resolve_strength(asked, steps)
    return Sampler(solver, steps, guidance, strength, warnings)


def _resolve_sprint(model: Model, asked: Settings, steps: int, guidance: float) -> Sampler:
    if asked.negative.strip():
        raise UsageError(
            f"{model.name} cannot use --negative: its guidance is built in",
            "leave it out, or use another model",
        )
    if asked.pag:
        able = next(m.name for m in known_models().values() if m.solver != "scm" and m.sources)
        raise UsageError(
            f"{model.name} cannot use --pag: its guidance is built in", f"use --model {able}"
        )
    warnings = []
    if steps > MAX_SPRINT_STEPS:
        warnings.append(f"{model.name} was made for 1 to {MAX_SPRINT_STEPS} steps, not {steps}")
    strength, more = _resolve_strength(asked, steps)
    return Sampler("scm", steps, guidance, strength, (*warnings, *more))


def _resolve_strength(asked: Settings, steps: int) -> tuple[float | None, tuple[str, ...]]:
    """The strength for an input image, if there is one, and a warning if the image is not seen."""
    if asked.image is None:
        return None, ()
    repaints = asked.mask is not None or asked.outpaint is not None
    strength = asked.strength
    if strength is None:
        strength = 1.0 if repaints else DEFAULT_STRENGTH
    if repaints or steps - steps * strength >= 1:
        return strength, ()
    # Every step runs, and the first starts from noise alone.
    most = 100 * (steps - 1) // steps / 100
    use = f"--strength {most:g} or less" if steps > 1 else "more --steps"
    warning = f"the image has no effect at --strength {strength:g} in {steps} steps; use {use}"
    return strength, (warning,)
