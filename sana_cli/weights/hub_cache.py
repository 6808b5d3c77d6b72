"""The Hugging Face cache on this machine, where all weights live, and the lock that pins them.

    HF_HUB_CACHE/models--OWNER--NAME/snapshots/COMMIT/vae/config.json -> ../../../blobs/HASH

The lock (one JSON file of ours) holds, for every repository and revision that was fetched, the
commit it meant then and the size and hash of each file. It is why `main` stays what it was.
"""

import hashlib
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sana_cli.errors import BrokenModel, SanaError
from sana_cli.system.disk import Lock, replace
from sana_cli.weights.catalogue import Model, Source
from sana_cli.weights.fingerprint import fingerprint
from sana_cli.weights.layout import (
    COMPONENTS,
    CONFIGS,
    INDEX,
    LORA,
    Parts,
    beside_lora,
    find_part,
    folder_parts,
)

COMMIT = re.compile(r"[0-9a-f]{40}")
LOCAL = "local:"  # in the place of a commit, before a hash of contents


@dataclass(frozen=True)
class Digest:
    """Size and hash of a file on the hub: sha256, or git's hash where it is small."""

    size: int
    kind: str  # "sha256" or "git"
    value: str

    def fits(self, path: Path) -> bool:
        """Return whether a file has this size and hash; the whole file is read."""
        if path.stat().st_size != self.size:
            return False
        if self.kind == "sha256":
            state = hashlib.sha256()
        else:  # git-hash-object
            state = hashlib.sha1(b"blob %d\0" % self.size, usedforsecurity=False)
        with path.open("rb") as file:
            while chunk := file.read(1 << 22):
                state.update(chunk)
        return state.hexdigest() == self.value


# --- where files lie ---------------------------------------------------------------------------


def repo_folder(repo: str) -> Path:
    from huggingface_hub.constants import HF_HUB_CACHE

    return Path(HF_HUB_CACHE) / f"models--{repo.replace('/', '--')}"


def snapshot(source: Source) -> Path | None:
    """Return the local folder of the commit that a source means; None before any download."""
    commit = pinned_commit(source)
    return repo_folder(source.repo) / "snapshots" / commit if commit else None


def pinned_commit(source: Source) -> str | None:
    """Return the commit of `weights.toml`, else of the lock, else of what other tools fetched."""
    if COMMIT.fullmatch(source.revision):
        return source.revision
    if locked := read_lock().get(_key(source)):
        return locked["commit"]
    ref = repo_folder(source.repo) / "refs" / source.revision
    commit = ref.read_text().strip() if ref.is_file() else ""
    return commit if COMMIT.fullmatch(commit) else None


def commit_of(model: Model) -> str | None:
    """Return the commit of a model's weights; its revision before a download.

    Of the user's own folder or file it is "local:" and a hash of its contents. None of the bundled
    model. BrokenModel for a folder that lacks a part, or cannot be read.
    """
    if not model.sources and not model.is_bundled:
        try:
            return LOCAL + fingerprint(_own_files(model))
        except OSError as error:
            raise BrokenModel(f"{error.filename} cannot be read: {error.strerror}") from None
    if not model.sources:
        return None
    return pinned_commit(model.sources[0]) or model.sources[0].revision


def _own_files(model: Model) -> Iterator[tuple[str, Path]]:
    """Yield the files that make a model in a folder, or in a file, and what each of them is."""
    if model.file is not None:
        yield "transformer", Path(model.file)
        return
    folder = Path(model.folder or "")
    yield INDEX, folder / INDEX
    for name, part in folder_parts(folder).items():
        for path in (*(part.folder / config for config in CONFIGS[name]), *part.files):
            if path.is_file():
                yield name, path


def find_parts(model: Model) -> Parts | None:
    """Find the parts of a model; None unless all are on this machine.

    BrokenModel for a folder that the user named and that lacks a part.
    """
    if model.folder is not None:
        return folder_parts(Path(model.folder))
    found: Parts = {}
    for source in model.sources:
        parts = source_parts(source)
        if parts is None:
            return None
        found |= parts
    return found


def source_parts(source: Source) -> Parts | None:
    place = snapshot(source)
    if place is None:
        return None
    try:
        parts = {folder: find_part(place / folder, source.variants) for folder in source.folders}
        if source.root:
            parts[source.root] = find_part(place, source.variants, source.root)
    except BrokenModel:
        return None
    known = {name: digest for name, digest in digests(source).items() if _belongs(name, source)}
    # What other tools have fetched, or we in part, is in no lock: then all configs must be there.
    every = CONFIGS | COMPONENTS
    configs = {f"{folder}/{name}" for folder in source.folders for name in every[folder]}
    configs |= {"config.json"} if source.root else set()
    whole = all(_size(place / name) == digest.size for name, digest in known.items())
    whole = whole and (bool(known) or all((place / name).is_file() for name in configs))
    return parts if whole else None


def find_lora(source: Source) -> Path | None:
    """Find the LoRA file of a source; None unless it is complete on this machine.

    For a repository's only one the lock has to tell which that is, unless it has diffusers' name:
    others may be on the hub that were never fetched.
    """
    place = snapshot(source)
    if place is None:
        return None
    known = {name: digest for name, digest in digests(source).items() if _belongs(name, source)}
    file = next((n for n in known if n.endswith(".safetensors")), source.lora or LORA)
    whole = all(_size(place / name) == digest.size for name, digest in known.items())
    return place / file if whole and (place / file).is_file() else None


def is_here(source: Source) -> bool:
    found = source_parts(source) if source.lora is None else find_lora(source)
    return found is not None


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return -1


# --- the lock ----------------------------------------------------------------------------------


def lock_path() -> Path:
    from platformdirs import user_data_path

    folder = os.environ.get("SANA_DATA_DIR")
    return (Path(folder) if folder else user_data_path("sana")) / "weights.lock.json"


def read_lock() -> dict[str, Any]:
    try:
        lock = json.loads(lock_path().read_text(encoding="utf-8"))
        if not isinstance(lock, dict) or not all(isinstance(row, dict) for row in lock.values()):
            raise ValueError("it is not an object of objects")
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        raise SanaError(
            f"{lock_path()} cannot be read: {error}", "delete it to start anew"
        ) from None
    return lock


def digests(source: Source) -> dict[str, Digest]:
    """Return the recorded sizes and hashes of a source's files, by name."""
    files = read_lock().get(_key(source), {}).get("files", {})
    return {name: Digest(**facts) for name, facts in files.items()}


def record(source: Source, commit: str, files: dict[str, Digest]) -> None:
    """Pin a source to a commit. Files of an earlier commit are forgotten."""
    path = lock_path()
    with _alone(path.with_suffix(".lock")):
        lock = read_lock()
        before = lock.get(_key(source), {})
        kept = before["files"] if before.get("commit") == commit else {}
        facts = {name: vars(digest) for name, digest in files.items()}
        lock[_key(source)] = {"commit": commit, "files": kept | facts}
        replace(path, json.dumps(lock, indent=1, sort_keys=True).encode())


def forget(source: Source, names: list[str]) -> None:
    """Drop files from the lock, and the pin with the last of them."""
    path = lock_path()
    with _alone(path.with_suffix(".lock")):
        lock = read_lock()
        entry = lock.get(_key(source))
        if entry is None:
            return
        entry["files"] = {k: v for k, v in entry["files"].items() if k not in names}
        if not entry["files"]:
            del lock[_key(source)]
        replace(path, json.dumps(lock, indent=1, sort_keys=True).encode())


def _key(source: Source) -> str:
    # The only LoRA of a repository has a pin of its own, so that the lock tells which file it is.
    return f"{source.repo}@{source.revision}" + (":lora" if source.lora == "" else "")


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    path.parent.mkdir(parents=True, exist_ok=True)
    with Lock(path, wait=True):
        yield


# --- checking and removing ---------------------------------------------------------------------


def stored_files(source: Source) -> dict[str, Path]:
    """Find the files of a source on this machine, by name."""
    place = snapshot(source)
    if place is None or not place.is_dir():
        return {}
    names = {path.relative_to(place).as_posix() for path in place.rglob("*") if path.is_file()}
    ours = {name for name in digests(source) if _belongs(name, source)}
    try:  # without a lock, what would be fetched if the hub had no more than this
        ours = ours or set(source.needs(names))
    except BrokenModel:
        ours = {name for name in names if _belongs(name, source)}
    return {name: place / name for name in sorted(names & ours)}


def damaged_files(source: Source) -> list[str]:
    """Read all files; return the names of those that are missing or differ from the hub's hash."""
    stored, promised = stored_files(source), digests(source)
    faults = [name for name in promised if _belongs(name, source) and name not in stored]
    for name, path in stored.items():
        digest = promised.get(name) or _digest_by_name(path)
        if digest is not None and not digest.fits(path):
            faults.append(name)
    return sorted(faults)


def _belongs(name: str, source: Source) -> bool:
    if source.lora is not None:
        return source.lora == "" or name in (source.lora, beside_lora(source.lora))
    if source.root:
        return "/" not in name
    return (name.split("/")[0] if name != INDEX else "transformer") in source.folders


def _digest_by_name(path: Path) -> Digest | None:
    """A file of the cache is a link to one that is called by its hash."""
    blob = path.resolve()
    if not path.is_symlink():
        return None
    kind = "sha256" if len(blob.name) == 64 else "git"
    return Digest(blob.stat().st_size, kind, blob.name)


def remove(source: Source, names: list[str]) -> int:
    """Delete files of a source, and their contents unless another commit has them: bytes freed."""
    place = snapshot(source)
    if place is None:
        return 0
    freed = 0
    blobs = {(place / name).resolve() for name in names if (place / name).is_symlink()}
    for name in names:
        if not (place / name).is_symlink():
            freed += (place / name).stat().st_size
        (place / name).unlink()
    used = {path.resolve() for path in place.parent.rglob("*") if path.is_symlink()}
    for blob in blobs - used:
        freed += blob.stat().st_size
        blob.unlink()
    for folder in sorted((p for p in place.rglob("*") if p.is_dir()), reverse=True):
        if not any(folder.iterdir()):
            folder.rmdir()
    forget(source, names)
    return freed
