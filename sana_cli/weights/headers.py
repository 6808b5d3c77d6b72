"""The headers of safetensors files: names, shapes and dtypes, and who quantised the weights."""

import contextlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from sana_cli.errors import BrokenModel
from sana_cli.weights.layout import Part, read_json

NAMES_SHOWN = 8
LARGEST_HEADER = 100_000_000  # bytes that safetensors accepts
FLOATS = ("F64", "F32", "F16", "BF16")  # the dtypes of weights, as safetensors calls them
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


@contextmanager
def open_safetensors(path: Path, framework: str = "pt") -> Iterator[Any]:
    """Open a safetensors file. BrokenModel for any other file, or one that is cut off.

    Its tensors are torch's; with `framework` "np", which does not import torch, the header alone
    is of use, as NumPy lacks bfloat16.
    """
    try:
        with safe_open(path, framework=framework) as file:
            yield file
    except (SafetensorError, OSError, ValueError) as error:
        raise BrokenModel(
            f"{path} is not a whole safetensors file: {error}", "download it again"
        ) from None


def refuse_quantised(part: Part) -> None:
    """Raise BrokenModel for weights that another program quantised. Only headers are read.

    A file that cannot be opened is left to `load_weights`, which says what is wrong with it.
    """
    said = read_json(part.config).get("quantization_config") if part.config.is_file() else None
    kind = str(said.get("quant_method", "an unnamed method")) if isinstance(said, dict) else None
    for path in part.files if kind is None else ():
        with contextlib.suppress(OSError, ValueError, RecursionError):
            kind = kind or _quantised_by(_dtypes(path))
    if kind is not None:
        raise BrokenModel(
            f"{part.folder} holds quantised weights ({kind}), which are not supported",
            "use the same model in bfloat16, float16 or float32",
        )


def _dtypes(path: Path) -> dict[str, str]:
    """Read the dtype of every tensor by name. OSError, ValueError or RecursionError without a
    header.

    safetensors itself opens a file for torch or for NumPy only, and imports it.
    """
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        if size > LARGEST_HEADER:
            raise ValueError(f"a header of {size} bytes")
        header = json.loads(file.read(size))
    if not isinstance(header, dict):
        raise ValueError("the header is not an object")
    return {
        name: str(facts.get("dtype"))
        for name, facts in header.items()
        if isinstance(facts, dict) and name != "__metadata__"
    }


def _quantised_by(dtypes: dict[str, str]) -> str | None:
    for kind, ending in QUANTISED_NAMES.items():
        pattern = re.compile(f"(?:{ending})$")
        if any(pattern.search(name) for name in dtypes):
            return kind
    return next(filter(None, map(QUANTISED_DTYPES.get, dtypes.values())), None)
