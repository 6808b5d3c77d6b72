"""Packages from npm's registry, of a fixed version and content, kept in the user's cache folder.

The registry is the one that npm is configured for or, without npm, `NPM_CONFIG_REGISTRY`.
"""

import base64
import hashlib
import json
import os
import shutil
import subprocess
import tarfile
import tempfile
import urllib.parse
import urllib.request
from dataclasses import dataclass
from pathlib import Path

from sana_cli.system.folders import cache_folder


class PackageUnavailable(Exception):
    """A package is neither in the cache nor to be had from a registry; says what to do."""


@dataclass(frozen=True)
class Package:
    name: str
    version: str
    integrity: str  # "sha512-…" of the archive, as npm prints and checks it

    def read(self, *paths: str) -> list[bytes]:
        """Return the content of some of its files; raise PackageUnavailable."""
        with tarfile.open(self.archive()) as archive:
            return [archive.extractfile(f"package/{path}").read() for path in paths]  # type: ignore[union-attr]

    def archive(self) -> Path:
        """Return the package's archive in the cache, fetched if it is not there."""
        file = self.name.replace("@", "").replace("/", "-") + f"-{self.version}.tgz"
        path = cache_folder() / "npm" / file
        if path.is_file() and self._is_whole(path.read_bytes()):
            return path
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            content = self._by_npm() if shutil.which("npm") else self._by_address()
        except (OSError, subprocess.SubprocessError, KeyError, ValueError) as error:
            raise PackageUnavailable(
                f"{self.name} {self.version} cannot be fetched from npm's registry ({error}); "
                f"put its archive at {path}"
            ) from None
        if not self._is_whole(content):
            raise PackageUnavailable(
                f"{self.name} {self.version} from the registry is not the expected package: "
                f"its checksum differs from {self.integrity[:20]}…"
            )
        with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as scratch:
            scratch.write(content)
        os.replace(scratch.name, path)
        return path

    def _is_whole(self, content: bytes) -> bool:
        found = base64.b64encode(hashlib.sha512(content).digest()).decode()
        return f"sha512-{found}" == self.integrity

    def _by_npm(self) -> bytes:
        with tempfile.TemporaryDirectory() as folder:
            command = ["npm", "pack", f"{self.name}@{self.version}", "--silent"]
            command += ["--pack-destination", folder]
            subprocess.run(command, check=True, capture_output=True, timeout=300)
            (archive,) = Path(folder).glob("*.tgz")
            return archive.read_bytes()

    def _by_address(self) -> bytes:
        registry = os.environ.get("NPM_CONFIG_REGISTRY")
        if not registry:
            raise OSError("npm is not installed, and NPM_CONFIG_REGISTRY names no registry")
        name = urllib.parse.quote(self.name, safe="@")
        with urllib.request.urlopen(
            f"{registry.rstrip('/')}/{name}/{self.version}", timeout=60
        ) as answer:
            facts = json.load(answer)
        with urllib.request.urlopen(facts["dist"]["tarball"], timeout=300) as answer:
            return answer.read()
