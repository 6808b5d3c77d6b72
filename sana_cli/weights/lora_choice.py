"""The LoRA that a user names: FILE or OWNER/NAME[/FILE] on the hub, and :SCALE behind it."""

import os
import re
from dataclasses import dataclass
from pathlib import Path

from sana_cli.errors import UsageError
from sana_cli.weights.catalogue import HUB_ID, Source
from sana_cli.weights.layout import PICKLES

LARGEST_SCALE = 100
NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")
DRIVE = re.compile(r"[A-Za-z]:[\\/]")
FORM = "write FILE.safetensors or OWNER/NAME[/FILE.safetensors], then :SCALE if it is not 1"


@dataclass(frozen=True)
class LoraChoice:
    """A LoRA file on this machine or on the hub, and the scale of its update."""

    place: Path | Source
    scale: float = 1.0

    @property
    def name(self) -> str:
        """The name for messages."""
        if isinstance(self.place, Path):
            return self.place.name
        return "/".join(filter(None, (self.place.repo, self.place.lora)))


def parse_lora(text: str) -> LoraChoice:
    """Parse a value of `--lora`. UsageError for a scale that is not a number, and other faults."""
    if os.path.isfile(text):  # whatever colons are in its name
        return LoraChoice(Path(text))
    place, scale = split_scale(text)
    path = os.path.expanduser(place)
    if os.path.isdir(path):
        raise UsageError(f"--lora {place} is a folder", "give the .safetensors file in it")
    owner, _, rest = place.partition("/")
    name, _, file = rest.partition("/")
    on_disk = os.path.isfile(path) or place.startswith((".", "/", "~")) or "\\" in place
    if not on_disk and HUB_ID.fullmatch(f"{owner}/{name}"):
        if file.endswith(PICKLES):
            raise UsageError(f"--lora {place} is a pickle, which is never loaded", FORM)
        if file.endswith(".safetensors") or not (file or name.endswith((".safetensors", *PICKLES))):
            return LoraChoice(lora_source(f"{owner}/{name}", file), scale)
    if not os.path.isfile(path):
        raise UsageError(f"--lora {place[:200]}: the file does not exist", FORM)
    return LoraChoice(Path(path), scale)


def lora_source(repo: str, file: str = "") -> Source:
    """Return the source of a LoRA on the hub: the file named, or the repository's only one."""
    return Source(repo, "main", (), (), lora=file)


def split_scale(text: str) -> tuple[str, float]:
    """`NAME:0.8` -> NAME and 0.8; the scale is 1 if there is none. UsageError for another word."""
    place, colon, scale = text.rpartition(":")
    if not colon or (len(place) == 1 and DRIVE.fullmatch(text[:3])):
        place, scale = text, "1"
    if place.startswith(("http:", "https:", "hf:")) or place in ("http", "https", "hf"):
        raise UsageError(f"--lora {text[:200]} is an address", FORM)
    if not place:
        raise UsageError(f"--lora {text[:200]!r} names no LoRA", FORM)
    if not NUMBER.fullmatch(scale) or abs(float(scale)) > LARGEST_SCALE:
        raise UsageError(
            f"--lora {text[:200]}: {scale[:80]!r} is not a scale between -{LARGEST_SCALE} and"
            f" {LARGEST_SCALE}",
            FORM,
        )
    return place, float(scale)
