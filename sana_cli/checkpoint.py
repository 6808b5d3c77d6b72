"""From a folder in the published layout to a network ready to run.

    FOLDER/transformer/config.json
    FOLDER/transformer/diffusion_pytorch_model[.VARIANT].safetensors      one file, or
    FOLDER/transformer/diffusion_pytorch_model.safetensors.index[.VARIANT].json   shards

Attribute names in the networks are the published tensor names, so loading is strict equality.
"""

import json
import types
import typing
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from sana_cli.errors import BrokenModel

Config = TypeVar("Config")
WEIGHT_DTYPES = {torch.float32, torch.float16, torch.bfloat16, torch.float64}
NAMES_SHOWN = 8
LARGEST_NUMBER = 2**20  # no number of a config is negative, infinite or near this


def read_json(path: Path) -> dict[str, Any]:
    try:
        # Python's parser also takes the bare -Infinity that published scheduler configs hold.
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise BrokenModel(f"{path} is missing", "is this folder in the published layout?") from None
    except (OSError, ValueError, RecursionError) as error:
        raise BrokenModel(f"{path} cannot be read: {error}") from None
    if not isinstance(value, dict):
        raise BrokenModel(f"{path} is not a JSON object")
    return value


def read_config(cls: type[Config], path: Path) -> tuple[Config, list[str]]:
    """A config dataclass from the published file, and the keys there that it does not know.

    Keys that the file lacks take the defaults: old files lack the later ones.
    """
    values = read_json(path)
    kinds = typing.get_type_hints(cls)
    known: dict[str, Any] = {}
    for key in kinds.keys() & values.keys():
        if not _fits(values[key], kinds[key]):
            raise BrokenModel(f"{path}: {key} is {values[key]!r}, which is no {kinds[key]}")
        known[key] = _frozen(values[key])
    try:
        config = cls(**known)
    except (ValueError, TypeError, ZeroDivisionError) as error:
        raise BrokenModel(f"{path}: {error}") from None
    unknown = [key for key in values if key not in kinds and not key.startswith("_")]
    return config, unknown


def _fits(value: Any, kind: Any) -> bool:
    """Whether a JSON value has the annotated type; lists stand for tuples, whole for real."""
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):
        return any(_fits(value, option) for option in inner)
    if origin is tuple:
        return isinstance(value, list) and all(_fits(item, inner[0]) for item in value)
    if kind is types.NoneType:
        return value is None
    if kind is bool:
        return isinstance(value, bool)
    if isinstance(value, bool):
        return False
    if kind is float:
        return isinstance(value, int | float) and 0 <= value < LARGEST_NUMBER
    if kind is dict:
        return isinstance(value, dict)
    return isinstance(value, kind) and (kind is not int or 0 <= value < LARGEST_NUMBER)


def _frozen(value: Any) -> Any:
    return tuple(_frozen(item) for item in value) if isinstance(value, list) else value


def weight_files(folder: Path, stem: str, variant: str) -> list[Path]:
    """The safetensors files of one part; the variant first, then the plain ones."""
    index_names = [f"{stem}.safetensors.index.json"]
    file_names = [f"{stem}.safetensors"]
    if variant:
        index_names.insert(0, f"{stem}.safetensors.index.{variant}.json")
        file_names.insert(0, f"{stem}.{variant}.safetensors")
    for file_name, index_name in zip(file_names, index_names, strict=True):
        if (folder / file_name).is_file():
            return [folder / file_name]
        if (folder / index_name).is_file():
            return _shards(folder, folder / index_name)
    pickles = sorted(
        p.name for p in folder.glob("*") if p.suffix in (".bin", ".pth", ".pt", ".ckpt")
    )
    if pickles:
        raise BrokenModel(
            f"{folder} holds only {pickles[0]}, a pickle, which is never loaded",
            "convert it to safetensors",
        )
    raise BrokenModel(f"{folder / file_names[-1]} is missing", "is the download complete?")


def _shards(folder: Path, index: Path) -> list[Path]:
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict) or not places:
        raise BrokenModel(f"{index} has no weight_map")
    names = sorted({str(name) for name in places.values()})
    for name in names:
        # A shard lies beside its index: nothing outside the folder is ever opened.
        plain = Path(name).name == name and len(name) < 250
        if not plain or not name.endswith(".safetensors"):
            raise BrokenModel(f"{index} names {name[:80]!r}, which is no shard beside it")
        if not (folder / name).is_file():
            raise BrokenModel(f"{folder / name} is missing", "is the download complete?")
    return [folder / name for name in names]


def load_weights(
    model: nn.Module,
    files: list[Path],
    dtype: torch.dtype | None,
    only: str = "",
    prefix: str = "",
) -> nn.Module:
    """Fill a network built on the meta device from safetensors files, each tensor once.

    Every missing, unexpected or misshapen tensor is reported in one BrokenModel. Tensors outside
    `only` (a name prefix, stripped) are left on disk; `prefix` is dropped from names that have
    it. Afterwards no parameter is on meta and every one has `dtype`, or with None the file's.
    """
    expected = model.state_dict()
    loaded: dict[str, Tensor] = {}
    seen: set[str] = set()
    problems: list[str] = []
    for path in files:
        for full_name, tensor in _tensors(path, only):
            name = full_name.removeprefix(prefix)
            if name not in expected:
                problems.append(f"unexpected {only}{name}")
            elif name in seen:
                problems.append(f"{only}{name} comes twice")
            elif tensor.shape != expected[name].shape:
                has, wants = tuple(tensor.shape), tuple(expected[name].shape)
                problems.append(f"{only}{name} has shape {has}, not {wants}")
            elif tensor.dtype not in WEIGHT_DTYPES:
                problems.append(f"{only}{name} has dtype {tensor.dtype}")
            else:
                loaded[name] = tensor.to(dtype or tensor.dtype)
            seen.add(name)
    problems += [f"missing {only}{name}" for name in expected if name not in seen]
    if problems:
        problems.sort()
        shown = "; ".join(problems[:NAMES_SHOWN])
        more = f"; and {len(problems) - NAMES_SHOWN} more" if len(problems) > NAMES_SHOWN else ""
        where = files[0] if len(files) == 1 else files[0].parent
        raise BrokenModel(
            f"{where} does not fit its config ({len(problems)} tensors): {shown}{more}",
            "are the weights and config.json of the same model?",
        )
    model.load_state_dict(loaded, assign=True, strict=True)
    return model.eval().requires_grad_(False)


def _tensors(path: Path, only: str) -> Iterator[tuple[str, Tensor]]:
    try:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - not a dict
                if name.startswith(only):
                    yield name.removeprefix(only), file.get_tensor(name)
    except (SafetensorError, OSError, ValueError) as error:
        raise BrokenModel(
            f"{path} is not a whole safetensors file: {error}", "download it again"
        ) from None


def on_meta(build: Callable[[Any], Any], config: Any, path: Path) -> Any:
    """The network of a config with shapes only: nothing is allocated until weights are assigned.

    `path` is where the config came from, to name it in the BrokenModel.
    """
    try:
        with torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter(
                "ignore"
            )  # torch warns of sizes of zero; loading will refuse them
            return build(config)
    except Exception as error:  # anything: the numbers are a stranger's, the code a library's
        reason = f"{error}".splitlines()[:1] or [type(error).__name__]
        raise BrokenModel(f"{path} describes no network: {reason[0]}") from None
