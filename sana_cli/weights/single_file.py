"""A transformer's weights in one file: NVlabs' names, or the published ones, and what they are of.

Checkpoints in the original form hold more than the network: the position table (made from the
config here) and the embedding of no caption and the head for the loss's weight, which only
training uses. Those are left out by name; anything else unknown is refused.
"""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from sana_cli.errors import BrokenModel, UsageError
from sana_cli.models.architectures import DC_AE_F32C32, TRANSFORMERS
from sana_cli.models.configs import DiTConfig
from sana_cli.system.devices import drop_pages
from sana_cli.weights.headers import FLOATS, NAMES_SHOWN, open_safetensors
from sana_cli.weights.layout import refuse_pickle
from sana_cli.weights.original_names import published_tensors

if TYPE_CHECKING:
    from torch import Tensor

PREFIX = "model.diffusion_model."
POSITIONS = "pos_embed"  # (1, cells, D) of the native grid, in every original checkpoint
LEFT_OUT = (POSITIONS, "y_embedder.y_embedding", "logvar_linear.weight", "logvar_linear.bias")
# The last word of tensors that quantised files have beside their weights, or instead of them.
QUANTISED = re.compile(
    r"(.*\.)?(scaled_fp8|comfy_quant|q(weight|zeros)|wscales|smooth_factor|absmax|quant_map"
    r"|((weight|input)_)?(scale|zero_point|scale_2|scale_inv)|scale_(weight|input))"
)
DEFAULT_SIDE = 1024
BLOCK = re.compile(r"transformer_blocks\.(\d+)\.")


@dataclass(frozen=True)
class SingleFile:
    """A checkpoint whose names and shapes were read; it serves as the weights of a `Part`."""

    path: Path
    parts: dict[str, tuple[str, ...]]  # by a tensor's name: the published tensors, row after row
    shapes: dict[str, tuple[int, ...]]  # of the published tensors
    cells: int | None  # of the position table, if it has one
    original: bool  # under NVlabs' names

    def __str__(self) -> str:
        return str(self.path)

    def tensors(self, only: str) -> "Iterator[tuple[str, Tensor]]":
        """Yield the published tensors whose names begin with `only`, memory-mapped."""
        with open_safetensors(self.path) as file:
            for key, names in self.parts.items():
                if not any(name.startswith(only) for name in names):
                    continue
                tensor = file.get_tensor(key)
                for name, rows in zip(names, tensor.chunk(len(names)), strict=True):
                    if name.startswith(only):
                        yield name.removeprefix(only), rows
                drop_pages(tensor)


def read_single_file(path: Path) -> SingleFile:
    """Read the header of a checkpoint.

    UsageError if there is no file; BrokenModel for one that is not a Sana transformer whole and
    unquantised.
    """
    if not path.is_file():
        raise UsageError(f"{path} does not exist", "check the path")
    refuse_pickle(path)
    with open_safetensors(path, "np") as file:
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
        shapes = {name: tuple(part.get_shape()) for name, part in slices.items()}
        dtypes = {name: part.get_dtype() for name, part in slices.items()}
    _refuse_other_files(path, dtypes)
    plain = {name: name.removeprefix(PREFIX) for name in shapes}
    original = "x_embedder.proj.weight" in plain.values()
    guided = any(name.startswith("cfg_embedder.") for name in plain.values())
    parts: dict[str, tuple[str, ...]] = {}
    unknown = []
    for key, name in plain.items():
        names = published_tensors(name, guided) if original else (name,)
        if original and name in LEFT_OUT:
            continue
        if names is None or not shapes[key] or shapes[key][0] % len(names):
            unknown.append(key)
        else:
            parts[key] = names
    if unknown:
        more = f" and {len(unknown) - NAMES_SHOWN} more" if len(unknown) > NAMES_SHOWN else ""
        raise BrokenModel(
            f"{path} holds tensors that are not of Sana's transformer:"
            f" {', '.join(sorted(unknown)[:NAMES_SHOWN])}{more}",
            "is it a checkpoint of the transformer alone?",
        )
    published = {
        name: (shapes[key][0] // len(names), *shapes[key][1:])
        for key, names in parts.items()
        for name in names
    }
    table = next((shapes[key] for key, name in plain.items() if name == POSITIONS), None)
    cells = table[-2] if table is not None and len(table) > 1 else None
    return SingleFile(path, parts, published, cells, original)


def _refuse_other_files(path: Path, dtypes: dict[str, str]) -> None:
    quantised = [
        name for name, dtype in dtypes.items() if dtype not in FLOATS or QUANTISED.fullmatch(name)
    ]
    if quantised:
        name = min(quantised)
        raise BrokenModel(
            f"{path} holds quantised weights ({name}, {dtypes[name]}), which are not supported",
            "use the bfloat16 or float16 file of the same model",
        )
    known = {f"{prefix}{name}" for prefix in ("", PREFIX) for name in
             ("x_embedder.proj.weight", "patch_embed.proj.weight")}  # fmt: skip
    if not known & dtypes.keys():
        lora = any("lora" in name or "lokr" in name for name in dtypes)
        raise BrokenModel(
            f"{path} holds no Sana transformer",
            f"it is a LoRA: --lora {path}" if lora else "is it for another model?",
        )


def architecture_of(file: SingleFile) -> str:
    """Identify the released architecture (`architectures.TRANSFORMERS`) by a file's shapes.

    By the width, the number of blocks, the channels of latents and captions, and whether it has
    q/k norms and an embedding of guidance. BrokenModel if no released model has them: the numbers
    of heads are in no shape, so another network needs a folder with its config.
    """
    found = _facts(file)
    for name, config in TRANSFORMERS.items():
        if found == _facts_of(config):
            return name
    said = ", ".join(f"{name} {value}" for name, value in found.items())
    raise BrokenModel(
        f"{file.path} is of no released Sana model: {said}",
        "give a folder in the published layout, which has a config.json",
    )


def native_side(file: SingleFile) -> int:
    """Return the side in pixels of the squares that the model was trained on.

    The original checkpoints' position table has a row for each cell of the native grid, whether it
    is used or not (inferred from NVlabs' code, which makes the table anew and never loads one).
    Without a table it is unknown, and taken to be 1024, as for most released models.
    """
    if file.cells is None:
        return DEFAULT_SIDE
    grid = math.isqrt(file.cells)
    if grid * grid != file.cells or not grid:
        raise BrokenModel(
            f"{file.path}: {POSITIONS} has {file.cells} rows, which is not a square number"
        )
    return grid * DC_AE_F32C32.compression


def _facts(file: SingleFile) -> dict[str, object]:
    shapes = file.shapes
    width, channels = [*shapes.get("patch_embed.proj.weight", ()), 0, 0][:2]
    blocks = {int(match[1]) for name in shapes if (match := BLOCK.match(name))}
    return {
        "width": width,
        "blocks": max(blocks, default=-1) + 1,
        "latent channels": channels,
        "caption channels": [*shapes.get("caption_projection.linear_1.weight", ()), 0, 0][1],
        "q/k norms": "transformer_blocks.0.attn1.norm_q.weight" in shapes,
        "guidance": "time_embed.guidance_embedder.linear_1.weight" in shapes,
    }


def _facts_of(config: DiTConfig) -> dict[str, object]:
    return {
        "width": config.width,
        "blocks": config.num_layers,
        "latent channels": config.in_channels,
        "caption channels": config.caption_channels,
        "q/k norms": config.qk_norm is not None,
        "guidance": config.guidance_embeds,
    }
