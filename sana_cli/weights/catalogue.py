"""Which models there are (`weights.toml`), and the one that a call asks for."""

import os
import re
import tomllib
from collections.abc import Collection
from dataclasses import dataclass, replace
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import Any

from sana_cli.errors import SanaError, UsageError
from sana_cli.shapes import SizeRequest, nearest_class, squares_of
from sana_cli.weights.layout import component_to_fetch, files_to_fetch, lora_to_fetch, refuse_pickle

PACKAGE = Path(__file__).resolve().parents[1]
DEFAULT_SIDE = 1024
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}")
TRANSFORMER, TEXT, VAE = ("transformer", "scheduler"), ("text_encoder", "tokenizer"), ("vae",)
ANY = ("bf16", "fp16", "")


@dataclass(frozen=True)
class Source:
    """Folders of a hub repository at one revision, in one precision."""

    repo: str
    revision: str
    folders: tuple[str, ...]
    variants: tuple[str, ...]  # suffixes of the weight files, "" for none; the first there is taken
    bytes: int = 0  # of the tensors; 0 where nobody has counted
    # Of a LoRA, which has no folders: the file that is meant, or "" for the repository's only one.
    lora: str | None = None
    root: str = ""  # the kind of a network whose files lie at the root of the repository

    def needs(self, present: Collection[str]) -> list[str]:
        """Choose the files to fetch among those present. BrokenModel if one is missing."""
        if self.lora is not None:
            return lora_to_fetch(present, self.lora)
        if self.root:
            return component_to_fetch(present, self.root, self.variants)
        return files_to_fetch(present, self.folders, self.variants)


@dataclass(frozen=True)
class Model:
    """A row of `weights.toml`, a repository on the hub, or a folder in the published layout."""

    name: str
    side: int | None = None  # native side in pixels; a stranger's is read from its config
    squares: tuple[int, ...] = ()  # the sides of one that was trained on squares alone
    licence: str = "unknown"
    folder: str | None = None
    file: str | None = None  # of a transformer alone; the rest is that of a released model
    sources: tuple[Source, ...] = ()  # its own first, then those it shares
    architecture: str | None = None
    memory: int | None = None  # bytes on a GPU at the native size, as fast as it goes
    least_memory: int | None = None  # and in the smallest pieces
    dtype: str | None = None  # what it was trained in; None where only its files can tell
    instruction: bool = True  # whether it was trained behind the complex human instruction
    # What is taken where nothing is asked for; None where only its files can tell.
    solver: str | None = None
    steps: int | None = None
    guidance: float | None = None

    @property
    def sides(self) -> tuple[int, ...]:
        """The sides that `--res` may ask for, the default first; () where unknown."""
        return self.squares or ((self.side,) if self.side else ())

    @property
    def is_bundled(self) -> bool:
        return self.folder is not None and Path(self.folder).parent == PACKAGE

    @property
    def source(self) -> str:
        """The origin of the weights, for messages."""
        if self.sources:
            return self.sources[0].repo
        if self.file is not None:
            return self.file
        return "bundled" if self.is_bundled else self.folder or ""


@dataclass(frozen=True)
class Component:
    """An autoencoder that replaces a model's own, or a ControlNet beside its transformer."""

    kind: str  # "vae" or "controlnet"
    name: str
    source: Source | None = None  # on the hub
    folder: str | None = None  # or on this machine
    architecture: str | None = None  # of the transformers that a ControlNet was made for


@cache
def known_models() -> dict[str, Model]:
    tables = _tables()
    return {name: _model(name, row, tables) for name, row in tables["models"].items()}


@cache
def known_components(kind: str) -> dict[str, Component]:
    """The autoencoders ("vae") or ControlNets ("controlnet") of `weights.toml`, by name."""
    rows = _tables()[f"{kind}s"]
    return {name: _component(kind, name, row) for name, row in rows.items()}


def _tables() -> dict[str, Any]:
    # A wheel carries the list in sana_cli/data; an editable install reads the checkout's own.
    for path in (PACKAGE / "data" / "weights.toml", PACKAGE.parent / "weights.toml"):
        if path.is_file():
            return tomllib.loads(path.read_text(encoding="utf-8"))
    raise SanaError("`weights.toml` is missing from this installation", "reinstall sana-cli")


def _component(kind: str, name: str, row: dict[str, Any]) -> Component:
    at_root = row.get("root", False)
    source = _source(row, () if at_root else (kind,))
    source = replace(source, root=kind if at_root else "")
    return Component(kind, name, source, architecture=row.get("architecture"))


def choose_component(kind: str, name: str) -> Component:
    """Choose the autoencoder or ControlNet called `name`, in a folder, or on the hub.

    UsageError if there is none.
    """
    known = known_components(kind)
    if name in known:
        return known[name]
    path = os.path.expanduser(name)
    if name and os.path.isdir(path):
        return Component(kind, Path(path).resolve().name, folder=path)
    if HUB_ID.fullmatch(name):
        return Component(kind, name, Source(name, "main", (kind,), ANY))
    raise UsageError(
        f"--{kind} {name[:80]!r} is neither a name nor a folder",
        f"use one of {', '.join(known)}, a folder, or OWNER/NAME on the hub",
    )


def _model(name: str, row: dict[str, Any], tables: dict[str, Any]) -> Model:
    if "folder" in row:  # of a bundled model, inside this package
        places = {"folder": str(PACKAGE / row["folder"]), "squares": tuple(row["squares"])}
        return Model(name, **row | places)
    own = _source(row, TRANSFORMER)
    text = _source(tables["text_encoders"][row.pop("text_encoder")], TEXT)
    vae = _source(tables["vaes"][row.pop("vae")], VAE)
    rest = {key: value for key, value in row.items() if key in Model.__annotations__}
    return Model(name, sources=(own, text, vae), **rest)


def _source(row: dict[str, Any], folders: tuple[str, ...]) -> Source:
    return Source(row["repo"], row["revision"], folders, (row["variant"],), row["bytes"])


def choose_model(name: str | None, request: SizeRequest | None) -> Model:
    """Choose the model called `name`, on the hub or in a folder; by resolution if it is None."""
    models = known_models()
    if name is None:
        # The bundled model is a demonstration: it is never chosen for the user.
        hub = [model for model in models.values() if model.sources]
        wanted = request or SizeRequest(side=DEFAULT_SIDE)
        side = nearest_class(wanted, [model.side for model in hub if model.side])
        if wanted.side not in (None, side):
            raise UsageError(
                f"no model draws {wanted.side}x{wanted.side}",
                f"use one of {', '.join(map(str, sorted({m.side for m in hub if m.side})))},"
                " or an exact size such as 1280x720",
            )
        return next(model for model in hub if model.side == side)
    if name in models:
        asked = request.side if request else None
        if asked not in (None, *models[name].sides):
            able = [m.name for m in models.values() if asked in m.sides]
            able.sort(key=lambda name: not models[name].sources)  # the demonstration last
            raise UsageError(
                f"{name} draws {squares_of(models[name].sides)}, not {asked}x{asked}",
                f"use --model {able[0]}" if able else f"leave --res out for {models[name].side}",
            )
        return models[name]
    path = os.path.expanduser(name)
    if name and os.path.isdir(path):
        return Model(Path(path).resolve().name, folder=path)
    if name and os.path.isfile(path):
        refuse_pickle(Path(path))
        if not path.endswith(".safetensors"):
            raise UsageError(
                f"--model {name} is a file of another kind",
                "give a .safetensors file, or the folder that holds model_index.json",
            )
        return Model(Path(path).stem, file=path)
    if HUB_ID.fullmatch(name):
        return Model(name, sources=(Source(name, "main", TRANSFORMER + TEXT + VAE, ANY),))
    raise unknown_model(name)


def model_of(architecture: str, side: int) -> Model:
    """Return a released model of an architecture, preferably one of native side `side`."""
    models = [m for m in known_models().values() if m.architecture == architecture]
    return min(models, key=lambda model: (model.side != side, model.side != DEFAULT_SIDE))


def unknown_model(name: str) -> UsageError:
    models = known_models()
    close = get_close_matches(name, models, n=3, cutoff=0.4)
    return UsageError(
        f"no model or folder is called {name[:80]!r}",
        f"did you mean {' or '.join(close)}?" if close else f"use one of {', '.join(models)}",
    )
