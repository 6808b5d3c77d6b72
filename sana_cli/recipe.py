"""The Recipe: everything that determines an image, and nothing else."""

import random
import re
from dataclasses import asdict, dataclass
from typing import Any

from sana_cli.errors import UsageError

SEED_LIMIT = 2**32  # the range of other tools that read these files
MAX_IMAGES = 100_000
SUMS = " with sums in "  # in the name of a precision
# Fields of a recipe that the device decides where the settings leave them open.
PRECISION = ("text_dtype", "dit_dtype", "vae_dtype", "sums")


@dataclass(frozen=True)
class Recipe:
    """The full description of an image: on one machine equal recipes give equal images."""

    prompt: str
    negative: str
    instruction: str  # text put before the prompt; "" for none
    seed: int
    steps: int
    guidance: float
    solver: str
    flow_shift: float | None  # None where the solver has none
    width: int  # of the image, in pixels
    height: int
    native_width: int  # of the network's output, which is resized or cropped to width x height
    native_height: int
    fit: str  # "trained" or "exact"
    model: str
    revision: str | None  # a commit of the hub, or "local:" and a hash of the user's own files
    text_dtype: str
    dit_dtype: str
    vae_dtype: str
    image: str | None = None  # SHA-256 of the input image, as RGB bytes; None for noise alone
    strength: float | None = None  # of the noise put on it, in (0, 1]
    # Added in version 0.2, and only written if they differ from these defaults, so that recipes
    # and job ids of images that version 0.1 could draw are unchanged.
    image_fit: str | None = None  # "crop", "pad" or "stretch"; None stretches, as version 0.1 did
    mask: str | None = None  # SHA-256 of where to repaint, a byte of 0 or 255 a pixel
    outpaint: str | None = None  # pixels added to the input image: "left,top,right,bottom"
    lora: str | None = None  # SHA-256 and scale of each LoRA: "hash:0.8,hash:1.0"
    control: str | None = None  # SHA-256 of the control image, as RGB bytes
    control_scale: float | None = None
    controlnet: str | None = None  # its name
    vae: str | None = None  # the name of an autoencoder that is not the model's own
    pag: float | None = None  # scale of perturbed-attention guidance; None for none
    pag_layer: int | None = None  # the transformer block that it perturbs
    pag_adaptive: float | None = None  # decrease of the scale per timestep; None for none
    quant: str | None = None  # "w8a8"; None where all products are in `dit_dtype`
    # "float16" where products in it are summed in it, 64 channels at a time; None for float32.
    sums: str | None = None

    @property
    def products(self) -> str:
        """The precision of the transformer's products, but for those in 8 bits."""
        return self.dit_dtype + (f"{SUMS}{self.sums}" if self.sums else "")

    def as_dict(self) -> dict[str, Any]:
        """Return the fields, for JSON."""
        values = asdict(self)
        first = list(values).index("image_fit")
        later = {name for i, name in enumerate(values) if i >= first and values[name] is None}
        return {name: value for name, value in values.items() if name not in later}


@dataclass(frozen=True)
class Adapter:
    """A LoRA: the SHA-256 of its file, and the scale of its update."""

    sha256: str
    scale: float

    def __str__(self) -> str:
        return f"{self.sha256}:{self.scale}"


def adapters_of(recipe: Recipe) -> tuple[Adapter, ...]:
    """Return the LoRAs of a recipe, in order."""
    words = recipe.lora.split(",") if recipe.lora else []
    pairs = (word.rpartition(":") for word in words)
    return tuple(Adapter(sha256, float(scale)) for sha256, _, scale in pairs)


def parse_seeds(text: str | None, count: int | None) -> list[int]:
    """Parse `7` (and the count-1 seeds after it), `1,5,9` or `1..8`; None is a random seed."""
    highest = SEED_LIMIT - MAX_IMAGES  # leaves room for the seeds after a random one
    seeds = _parse_seed_list(text) if text is not None else [random.randrange(highest)]
    if count is not None:
        if count < 1 or count > MAX_IMAGES:
            raise UsageError(f"--count {count} is not between 1 and {MAX_IMAGES}")
        if len(seeds) > 1:
            raise UsageError("--count cannot be used with several seeds", "leave one of them out")
        seeds = [seeds[0] + i for i in range(count)]
    if max(seeds) >= SEED_LIMIT:
        raise UsageError(f"seed {max(seeds)} is out of range", f"use 0 to {SEED_LIMIT - 1}")
    return seeds


def _parse_seed_list(text: str) -> list[int]:
    words = text.strip()
    span = re.fullmatch(r"(\d{1,20})\.\.(\d{1,20})", words)
    if span:
        first, last = int(span[1]), int(span[2])
        if last < first or last - first >= MAX_IMAGES:
            raise UsageError(f"--seed {text!r} is not a range of 1 to {MAX_IMAGES} seeds")
        return list(range(first, last + 1))
    if not re.fullmatch(r"\d{1,20}(,\d{1,20})*", words):
        raise UsageError(
            f"--seed {text!r} is not a seed", f"use 7, 1,5,9 or 1..8, each below {SEED_LIMIT}"
        )
    seeds = [int(word) for word in words.split(",")]
    if len(set(seeds)) < len(seeds):
        raise UsageError(f"--seed {text!r} names a seed twice")
    return seeds
