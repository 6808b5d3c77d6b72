"""The LoRAs that requests may name: the files of one folder, which the server's owner chose.

A name is compared with those that are there. It is never part of a path.
"""

import os
from dataclasses import dataclass
from pathlib import Path

from sana_cli.errors import UsageError
from sana_cli.weights.lora_choice import split_scale

SUFFIX = ".safetensors"


@dataclass(frozen=True)
class LoraFolder:
    """A folder of LoRAs, or none."""

    folder: Path | None = None

    def files(self) -> dict[str, Path]:
        """The files that are there now, by their names without the suffix."""
        if self.folder is None or not self.folder.is_dir():
            return {}
        found = (path for path in self.folder.iterdir() if path.suffix == SUFFIX and path.is_file())
        return {path.stem: path for path in sorted(found)}

    def choice(self, text: str) -> str:
        """NAME[:SCALE] as a value of `--lora`. UsageError for a name that is not offered."""
        offered = self.files()
        name, scale = (text, 1.0) if text in offered else split_scale(text)
        if name not in offered:
            names = ", ".join(offered)
            hint = f"use one of {names}" if names else "the server's owner offers some by --loras"
            raise UsageError(f"--lora: the server offers no LoRA {ascii(name)[:100]}", hint)
        return f"{offered[name]}:{scale}"

    def without_folder(self, text: str) -> str:
        """A message in which the files are called by their names alone."""
        return text if self.folder is None else text.replace(f"{self.folder}{os.sep}", "")
