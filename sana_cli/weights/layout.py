"""The published layout of a model: which files lie in which folder, and which of them are used.

    model_index.json
    scheduler/scheduler_config.json
    tokenizer/tokenizer.json
    text_encoder/config.json  model[.VARIANT].safetensors
    transformer/config.json   diffusion_pytorch_model[.VARIANT].safetensors
    vae/config.json           diffusion_pytorch_model[.VARIANT].safetensors

Weights may be cut into shards: STEM[.VARIANT]-00001-of-00002.safetensors beside
STEM.safetensors.index[.VARIANT].json.
"""

import json
import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Protocol

from sana_cli.errors import BrokenModel

INDEX = "model_index.json"
CONFIGS = {
    "transformer": ("config.json",),
    "vae": ("config.json",),
    "text_encoder": ("config.json",),
    "tokenizer": ("tokenizer.json", "tokenizer_config.json"),
    "scheduler": ("scheduler_config.json",),
}
# Networks that stand beside a model's own or in the place of one.
COMPONENTS = {"controlnet": ("config.json",)}
STEMS = {
    "controlnet": "diffusion_pytorch_model",
    "transformer": "diffusion_pytorch_model",
    "vae": "diffusion_pytorch_model",
    "text_encoder": "model",
}
LORA = "pytorch_lora_weights.safetensors"  # as diffusers calls it
ADAPTER_CONFIG = (
    "adapter_config.json"  # beside one that PEFT has saved, with the scale of its update
)
PICKLES = (".bin", ".pth", ".pt", ".ckpt")
SHOWN = 6  # names of files in a message
ANY_VARIANT = ("", "bf16", "fp16")  # of a folder that nobody has described: the plain ones first


class Tensors(Protocol):
    """A source of weights other than a file: random, merged, or in another object's memory."""

    def tensors(self, only: str) -> Iterator[tuple[str, Any]]:
        """Yield the tensors whose names begin with `only`, which is stripped, each once."""


@dataclass(frozen=True)
class Part:
    """One folder of a model on this machine, and the sources of its weights."""

    folder: Path
    weights: tuple[Path | Tensors, ...] = ()

    @property
    def files(self) -> list[Path]:
        return [path for path in self.weights if isinstance(path, Path)]

    @property
    def config(self) -> Path:
        return self.folder / "config.json"


Parts = dict[str, Part]  # by the folders' names


def folder_parts(folder: Path) -> Parts:
    """Find the parts of a model in one folder. BrokenModel names what is missing."""
    if not (folder / INDEX).is_file():
        raise BrokenModel(f"{folder / INDEX} is missing", "is this folder in the published layout?")
    return {name: find_part(folder / name) for name in CONFIGS}


def find_component(folder: Path, kind: str) -> Part:
    """Find a network of a kind ("vae", "controlnet") in its own folder or in that of a model."""
    inside = folder / kind
    return find_part(inside if inside.is_dir() else folder, kind=kind)


def find_part(
    folder: Path, variants: tuple[str, ...] = ANY_VARIANT, kind: str | None = None
) -> Part:
    """Find a part with its weight files, in the first variant that exists, else BrokenModel.

    Its kind is the name of the folder unless that is given.
    """
    kind = kind or folder.name
    if kind not in STEMS:
        return Part(folder)
    stem = STEMS[kind]
    for variant in variants:
        single, index = weight_names(stem, variant)
        if (folder / single).is_file():
            return Part(folder, (folder / single,))
        if (folder / index).is_file():
            return Part(folder, tuple(_shards(folder, folder / index)))
    pickles = sorted(p.name for p in folder.glob("*") if p.suffix in PICKLES)
    if pickles:
        raise BrokenModel(
            f"{folder} holds only {pickles[0]}, a pickle, which is never loaded",
            "convert it to safetensors",
        )
    if packed := sorted(path.name for path in folder.glob("*.gguf")):
        raise BrokenModel(
            f"{folder} holds only {packed[0]}, quantised weights, which are not supported",
            "use the same model in bfloat16, float16 or float32",
        )
    raise BrokenModel(
        f"{folder / weight_names(stem, variants[0])[0]} is missing", "is the download complete?"
    )


def refuse_pickle(path: Path) -> None:
    """Raise BrokenModel if a file is a pickle, by its name or its first bytes, or unreadable."""
    try:
        with path.open("rb") as file:
            start = file.read(4)
    except OSError as error:
        raise BrokenModel(f"{path} cannot be read: {error.strerror}") from None
    # The length of a safetensors header can begin alike, but is followed by zeros.
    pickled = start[:1] == b"\x80" and start[1:2] in (b"\2", b"\3", b"\4", b"\5") and any(start[2:])
    if path.suffix in PICKLES or start == b"PK\3\4" or pickled:
        raise BrokenModel(f"{path} is a pickle, which is never loaded", "convert it to safetensors")


def weight_names(stem: str, variant: str) -> tuple[str, str]:
    """Return the names of a variant's single file and of its index of shards."""
    dot = f".{variant}" if variant else ""
    return f"{stem}{dot}.safetensors", f"{stem}.safetensors.index{dot}.json"


def files_to_fetch(
    present: Collection[str], folders: Collection[str], variants: tuple[str, ...]
) -> list[str]:
    """Choose the files that some folders of a repository need, in one precision.

    BrokenModel if a folder's weights are not there, or not all of their shards.
    """
    chosen = [INDEX] if INDEX in present and "transformer" in folders else []
    for folder in folders:
        configs = (CONFIGS | COMPONENTS)[folder]
        chosen += [f"{folder}/{name}" for name in configs if f"{folder}/{name}" in present]
        if folder in STEMS:
            chosen += _weights_to_fetch(present, f"{folder}/{STEMS[folder]}", variants)
    return chosen


def component_to_fetch(present: Collection[str], kind: str, variants: tuple[str, ...]) -> list[str]:
    """Choose the files of a network at the root of a repository."""
    return ["config.json", *_weights_to_fetch(present, STEMS[kind], variants)]


def _weights_to_fetch(present: Collection[str], stem: str, variants: tuple[str, ...]) -> list[str]:
    for variant in variants:
        single, index = weight_names(stem, variant)
        if single in present:
            return [single]
        if index in present:
            dot = f".{variant}" if variant else ""
            shard = re.compile(re.escape(f"{stem}{dot}-") + r"\d{5}-of-(\d{5})\.safetensors")
            shards = sorted(name for name in present if shard.fullmatch(name))
            if shards and len(shards) == int(shards[0].removesuffix(".safetensors")[-5:]):
                return [index, *shards]
    raise BrokenModel(
        f"the repository has no {weight_names(stem, variants[0])[0]}",
        "is it in the diffusers layout?",
    )


def lora_to_fetch(present: Collection[str], file: str) -> list[str]:
    """Choose the LoRA called `file` in a repository, and PEFT's config if there is one.

    For "" it is the one that diffusers would take, or the only one. BrokenModel if it is not there.
    """
    found = sorted(n for n in present if n.endswith(".safetensors") and ".." not in n.split("/"))
    several = ", ".join(found[:SHOWN]) + (" and more" if len(found) > SHOWN else "")
    if file and file not in found:
        raise BrokenModel(
            f"the repository has no {file}",
            f"it has {several}" if found else "it has no .safetensors file",
        )
    if not file and INDEX in present and LORA not in found:
        raise BrokenModel("the repository is a whole model, not a LoRA", "give it to --model")
    if not file and LORA not in found and len(found) > 1:
        raise BrokenModel(
            f"the repository has several LoRAs: {several}", "name one: OWNER/NAME/FILE"
        )
    if not found:
        pickled = any(name.endswith(PICKLES) for name in present)
        raise BrokenModel(
            f"the repository has no .safetensors file{', only pickles' if pickled else ''}",
            "is it a LoRA's?",
        )
    chosen = file or (LORA if LORA in found else found[0])
    return [name for name in (chosen, beside_lora(chosen)) if name in present]


def beside_lora(file: str) -> str:
    """Return the name of PEFT's config beside a LoRA file."""
    return str(PurePosixPath(file).with_name(ADAPTER_CONFIG))


def read_json(path: Path) -> dict[str, Any]:
    try:
        # Python's parser also takes the bare -Infinity that published scheduler configs hold.
        value = json.loads(path.read_text(encoding="utf-8-sig"))  # as Notepad may have saved it
    except FileNotFoundError:
        raise BrokenModel(f"{path} is missing", "is this folder in the published layout?") from None
    except (OSError, ValueError, RecursionError) as error:
        raise BrokenModel(f"{path} cannot be read: {error}") from None
    if not isinstance(value, dict):
        raise BrokenModel(f"{path} is not a JSON object")
    return value


def _shards(folder: Path, index: Path) -> list[Path]:
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict) or not places:
        raise BrokenModel(f"{index} has no weight_map")
    names = sorted({str(name) for name in places.values()})
    for name in names:
        # A shard lies beside its index: nothing outside the folder is ever opened.
        plain = Path(name).name == name and len(name) < 250
        if not plain or not name.endswith(".safetensors"):
            raise BrokenModel(f"{index} names {name[:80]!r}, which is not a shard beside it")
        if not (folder / name).is_file():
            raise BrokenModel(f"{folder / name} is missing", "is the download complete?")
    return [folder / name for name in names]
