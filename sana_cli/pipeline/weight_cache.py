"""The transformer's 8-bit weights, kept on disk beside those of the text encoder."""

from collections.abc import Sequence
from pathlib import Path

from torch import nn

from sana_cli.models import w8a8
from sana_cli.pipeline.text_cache import INT8_LIMIT
from sana_cli.recipe import Adapter
from sana_cli.weights.layout import Part
from sana_cli.weights.single_file import SingleFile
from sana_cli.weights.tensor_cache import TensorCache, identity

FORMAT = "w8a8, 1"  # of the tensors; another one when they change


def quantise(
    network: nn.Module,
    parts: Sequence[Part],
    dtype: str,
    adapters: tuple[Adapter, ...],
    folder: Path | None,
) -> str | None:
    """Put a network, made of `parts` and LoRAs in `dtype`, into 8 bits; quantise it only once.

    Without a folder, or with weights that are not in files, nothing is kept. Return why the result
    could not be kept, if that failed.
    """
    files = [
        source.path if isinstance(source, SingleFile) else source
        for part in parts
        for source in part.weights
    ]
    paths = [file for file in files if isinstance(file, Path)]
    if folder is None or len(paths) < len(files):
        w8a8.install(network, w8a8.quantise(network))
        return None
    facts = [FORMAT, identity(paths), dtype, *map(str, adapters)]
    cache = TensorCache(folder / "int8", INT8_LIMIT, facts, checked=False)
    tensors = cache.read("transformer")
    if tensors is None or not w8a8.is_quantised_from(network, tensors):
        tensors = w8a8.quantise(network)
        cache.write(tensors, "transformer")
        # Mapped from the file, they take as little memory as in later runs.
        tensors = cache.read("transformer") or tensors
    w8a8.install(network, tensors)
    return cache.fault
