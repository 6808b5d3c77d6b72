"""From a config and safetensors files to a network ready to run.

Attribute names in the networks are the published tensor names, so loading is strict equality.
"""

import contextlib
import re
import types
import typing
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from sana_cli.errors import BrokenModel
from sana_cli.system.devices import drop_pages
from sana_cli.weights.layout import Part, Tensors, read_json

Config = TypeVar("Config")
WEIGHT_DTYPES = {torch.float32, torch.float16, torch.bfloat16, torch.float64}
FLOATS = ("F64", "F32", "F16", "BF16")  # the same, as safetensors calls them
NAMES_SHOWN = 8
# Whose weights they are, by how the names of the tensors end that lie beside them.
QUANTISED_NAMES = {
    "bitsandbytes in 8 bits": r"\.(SCB|weight_format)",
    "bitsandbytes in 4 bits": r"\.(absmax|quant_map|nested_absmax|quant_state\..*)",
    "GPTQ or AWQ": r"\.(qzeros|g_idx)",
    "SVDQuant": r"\.(wscales|wcscales|smooth_factor)",
    "Quanto": r"\.weight\._(data|scale|shift)",
    "FP8 with scales": r"\.(scale_weight|weight_scale|input_scale)|(.*\.)?scaled_fp8",
    "MLX": r"\.weight\.scales|\.(scales|biases)",
}
QUANTISED_DTYPES = {
    **dict.fromkeys(("F8_E4M3", "F8_E5M2", "F8_E8M0"), "FP8"),
    **dict.fromkeys(("I8", "U8", "I4", "U4", "F4"), "whole numbers of 8 bits or fewer"),
}
LARGEST_NUMBER = 2**20  # no number of a config is negative, infinite or near this


def read_config(cls: type[Config], path: Path) -> tuple[Config, list[str]]:
    """Read a published config into a dataclass; return it and the keys that it lacks.

    Keys that the file lacks take the defaults: old files lack the later ones.
    """
    values = read_json(path)
    kinds = typing.get_type_hints(cls)
    known: dict[str, Any] = {}
    for key in kinds.keys() & values.keys():
        if not _fits(values[key], kinds[key]):
            raise BrokenModel(f"{path}: {key} is {values[key]!r}, which is not {kinds[key]}")
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


def refuse_quantised(part: Part) -> None:
    """Raise BrokenModel for weights that another program quantised. Only headers are read.

    A file that cannot be opened is left to `load_weights`, which says what is wrong with it.
    """
    said = read_json(part.config).get("quantization_config") if part.config.is_file() else None
    kind = str(said.get("quant_method", "an unnamed method")) if isinstance(said, dict) else None
    for path in part.files if kind is None else ():
        with contextlib.suppress(SafetensorError, OSError, ValueError):
            kind = kind or _quantised_by(path)
    if kind is not None:
        raise BrokenModel(
            f"{part.folder} holds quantised weights ({kind}), which are not supported",
            "use the same model in bfloat16, float16 or float32",
        )


def _quantised_by(path: Path) -> str | None:
    with safe_open(path, framework="pt") as file:
        names = list(file.keys())
        for kind, ending in QUANTISED_NAMES.items():
            pattern = re.compile(f"(?:{ending})$")
            if any(pattern.search(name) for name in names):
                return kind
        dtypes = (file.get_slice(name).get_dtype() for name in names)
        return next(filter(None, map(QUANTISED_DTYPES.get, dtypes)), None)


def load_weights(
    model: nn.Module,
    files: Sequence[Path | Tensors],
    dtype: torch.dtype | None,
    only: str = "",
    prefix: str = "",
) -> nn.Module:
    """Fill a network built on the meta device from safetensors files, each tensor once.

    Every missing, unexpected or misshapen tensor is reported in one BrokenModel. Tensors outside
    `only` (a name prefix, stripped) are left on disk; `prefix` is dropped from names that have
    it. Afterwards no parameter is on meta and every one has `dtype`; for None each keeps its own
    and stays in its mapped file, read when it is used.
    """
    expected = model.state_dict()
    loaded: dict[str, Tensor] = {}
    seen: set[str] = set()
    problems: list[str] = []
    for path in files:
        for full_name, tensor in read_tensors(path, only):
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
                loaded[name] = tensor if dtype is None else tensor.to(dtype)
            seen.add(name)
    problems += [f"missing {only}{name}" for name in expected if name not in seen]
    if problems:
        problems.sort()
        shown = "; ".join(problems[:NAMES_SHOWN])
        more = f"; and {len(problems) - NAMES_SHOWN} more" if len(problems) > NAMES_SHOWN else ""
        first = files[0]
        where = first.parent if isinstance(first, Path) and len(files) > 1 else first
        raise BrokenModel(
            f"{where} does not fit its config ({len(problems)} tensors): {shown}{more}",
            "are the weights and config.json of the same model?",
        )
    model.load_state_dict(loaded, assign=True, strict=True)
    return model.eval().requires_grad_(False)


def move(
    model: nn.Module, files: Sequence[Path | Tensors], device: str, dtype: torch.dtype
) -> nn.Module:
    """Move a network whose weights are still in their mapped files, like `model.to`.

    What has been converted there is no longer held in memory a second time.
    """
    mapped = all(isinstance(path, Path) for path in files)
    for parameter in model.parameters():
        before = parameter.data
        parameter.data = before.to(device, dtype)
        if mapped and parameter.data_ptr() != before.data_ptr():
            drop_pages(before)
    return model.to(device)


def read_tensors(source: Path | Tensors, only: str) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of a source whose names begin with `only`, which is stripped.

    Those of a file are mapped, and no longer in memory once the next one is asked for.
    """
    if not isinstance(source, Path):
        yield from source.tensors(only)
        return
    with open_safetensors(source) as file:
        for name in file.keys():  # noqa: SIM118 - not a dict
            if name.startswith(only):
                tensor = file.get_tensor(name)
                yield name.removeprefix(only), tensor
                drop_pages(tensor)


@contextmanager
def open_safetensors(path: Path) -> Iterator[Any]:
    """Open a safetensors file. BrokenModel for any other file, or one that is cut off."""
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError, ValueError) as error:
        raise BrokenModel(
            f"{path} is not a whole safetensors file: {error}", "download it again"
        ) from None


def on_meta(build: Callable[[Any], Any], config: Any, path: Path) -> Any:
    """Build the network of a config on the meta device: nothing is allocated until weights are.

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
