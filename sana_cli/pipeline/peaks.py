"""The peak memory of networks, counted once for every size and kept in the cache folder.

A peak is the weights of a network plus the peak of its forward pass, which is counted by running
the pass on the meta device, where tensors have shapes but take no memory. That imports the networks
and takes up to seconds, so a peak is kept in this process, and in the cache folder, under all that
it depends on: the arguments of the count, the sources of the networks, and the version of torch.
"""

import functools
import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from sana_cli import kernels, models, system
from sana_cli.errors import BrokenModel
from sana_cli.models.configs import ControlNetConfig, DCAEConfig, DiTConfig, GemmaConfig
from sana_cli.system.devices import torch_version
from sana_cli.system.disk import replace

if TYPE_CHECKING:
    import torch

FILE = "peaks.json"


class PeakCache:
    """Peaks in bytes. Every `dtype` is the name of one of torch's."""

    counted: ClassVar[dict[str, int]] = {}  # by this process, by hashes

    def __init__(self, folder: Path | None = None) -> None:
        """With a `folder` peaks are kept there in a file too."""
        self.folder = folder
        self.fault: str | None = None  # why a peak could not be kept, if one could not
        self._peaks: dict[str, int] | None = None  # on disk; None: not read yet

    def text_encoder(self, config: GemmaConfig, precision: str, tokens: int) -> int:
        """See `gemma.peak_bytes`."""

        def count() -> int:
            from sana_cli.models.gemma import peak_bytes

            return peak_bytes(config, precision, tokens)

        return self._kept(count, config, precision, tokens)

    def transformer(
        self,
        config: DiTConfig,
        dtype: str,
        grid: tuple[int, int],
        text_lengths: Sequence[int],
        steps: int,
        **options: Any,
    ) -> int:
        """See `fused_dit.peak_bytes`."""

        def count() -> int:
            from sana_cli.models.fused_dit import peak_bytes

            return peak_bytes(config, _dtype(dtype), grid, text_lengths, steps, **options)

        return self._kept(count, config, dtype, grid, text_lengths, steps, options)

    def quantising(self, config: DiTConfig, dtype: str, controlnet: ControlNetConfig | None) -> int:
        """See `fused_dit.quantising_bytes`."""

        def count() -> int:
            from sana_cli.models.fused_dit import quantising_bytes

            return quantising_bytes(config, _dtype(dtype), controlnet)

        return self._kept(count, config, dtype, controlnet)

    def autoencoder(
        self,
        config: DCAEConfig,
        half: Literal["encoder", "decoder"],
        dtype: str,
        grid: tuple[int, int],
        strip_bytes: int,
    ) -> int:
        """See `streaming.autoencoder.peak_bytes`."""

        def count() -> int:
            from sana_cli.models.streaming.autoencoder import peak_bytes

            return peak_bytes(config, half, _dtype(dtype), grid, strip_bytes=strip_bytes)

        return self._kept(count, config, half, dtype, grid, strip_bytes)

    def _kept(self, count: Callable[[], int], *facts: Any) -> int:
        """Return what was counted for some facts, of any types whose `repr` is complete."""
        if self._peaks is None:
            self._peaks = self._read()
        key = hashlib.sha256(repr((count.__qualname__, facts)).encode()).hexdigest()
        if key not in self._peaks:
            if key not in self.counted:
                try:
                    self.counted[key] = count()
                except Exception as error:  # the numbers are a stranger's, the code is torch's
                    network = type(facts[0]).__name__.removesuffix("Config")
                    raise BrokenModel(
                        f"the model's {network} config describes no network: {error}"
                    ) from error
            self._peaks[key] = self.counted[key]
            self._write()
        return self._peaks[key]

    def _read(self) -> dict[str, int]:
        """Return the peaks on disk; none of other sources, or from a file that is damaged."""
        if self.folder is None:
            return {}
        try:
            document = json.loads((self.folder / FILE).read_bytes())
        except (OSError, ValueError, RecursionError):
            return {}
        if not isinstance(document, dict) or document.get("sources") != sources():
            return {}
        peaks = document.get("peaks")
        if not isinstance(peaks, dict) or not all(type(n) is int and n > 0 for n in peaks.values()):
            return {}
        return peaks

    def _write(self) -> None:
        # Another process may write at the same time: the file is whole, and may lack a peak.
        if self.folder is not None:
            document = {"sources": sources(), "peaks": self._peaks}
            try:
                replace(self.folder / FILE, json.dumps(document).encode())
            except OSError as error:
                self.fault = str(error)


@functools.cache
def sources() -> str:
    """Hash the code that counts: the networks, their kernels, the counter, and torch's version."""
    whole = hashlib.sha256(torch_version().__version__.encode())
    for package in (models, kernels, system):
        folder = Path(package.__path__[0])
        for file in sorted(folder.rglob("*.py")):
            whole.update(f"{file.relative_to(folder).as_posix()}\0".encode() + file.read_bytes())
    return whole.hexdigest()


def _dtype(name: str) -> "torch.dtype":
    import torch

    return getattr(torch, name)
