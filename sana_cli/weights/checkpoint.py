"""From safetensors files to a network ready to run.

Attribute names in the networks are the published tensor names, so loading is strict equality.
"""

import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sana_cli.errors import BrokenModel
from sana_cli.system.devices import drop_pages
from sana_cli.weights.headers import NAMES_SHOWN, open_safetensors
from sana_cli.weights.layout import Tensors

WEIGHT_DTYPES = {torch.float32, torch.float16, torch.bfloat16, torch.float64}


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
