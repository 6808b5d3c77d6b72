"""Which models there are (`weights.toml`) and where their files lie on this machine."""

import os
import tomllib
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache
from pathlib import Path

from sana_cli.errors import BrokenModel, MissingModel, SanaError, UsageError
from sana_cli.shapes import Request, nearest_class

HERE = Path(__file__).resolve().parent
DEFAULT_SIDE = 1024


@dataclass(frozen=True)
class Model:
    """A row of `weights.toml`, or a folder in the published layout."""

    name: str
    side: int | None = None  # native side in pixels; a folder's is read from its config
    licence: str = "unknown"
    repo: str | None = None
    revision: str | None = None
    variant: str = ""
    folder: str | None = None
    instruction: bool = True  # whether it was trained behind the complex human instruction

    @property
    def source(self) -> str:
        """Where its weights come from, for people."""
        bundled = self.folder is not None and Path(self.folder).parent == HERE
        return self.repo or ("bundled" if bundled else self.folder or "")


@cache
def known_models() -> dict[str, Model]:
    # A wheel carries the list in sana_cli/data; an editable install reads the checkout's own.
    for path in (HERE / "data" / "weights.toml", HERE.parent / "weights.toml"):
        if path.is_file():
            rows = tomllib.loads(path.read_text(encoding="utf-8"))
            for row in rows.values():
                if "folder" in row:  # of a bundled model, inside this package
                    row["folder"] = str(HERE / row["folder"])
            return {name: Model(name, **row) for name, row in rows.items()}
    raise SanaError("`weights.toml` is missing from this installation", "reinstall sana-cli")


def choose_model(name: str | None, request: Request | None) -> Model:
    """The model called `name` or lying in that folder; by the resolution when it is None."""
    models = known_models()
    if name is None:
        # The bundled model is a demonstration: it is never chosen for the user.
        hub = [model for model in models.values() if model.repo]
        wanted = request or Request(side=DEFAULT_SIDE)
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
        if asked not in (None, models[name].side):
            able = [model.name for model in models.values() if model.side == asked]
            raise UsageError(
                f"{name} draws {models[name].side}x{models[name].side}, not {asked}x{asked}",
                f"use --model {able[0]}" if able else f"leave --res out for {models[name].side}",
            )
        return models[name]
    path = os.path.expanduser(name)
    if name and os.path.isdir(path):
        return Model(Path(path).resolve().name, folder=path)
    if name and os.path.exists(path):
        raise UsageError(f"--model {name} is a file", "give the folder that holds model_index.json")
    close = get_close_matches(name, models, n=3, cutoff=0.4)
    raise UsageError(
        f"no model or folder is called {name[:80]!r}",
        f"did you mean {' or '.join(close)}?" if close else f"use one of {', '.join(models)}",
    )


def find_folder(model: Model) -> Path:
    """Where the model's files lie; MissingModel, with the download, where they do not."""
    if model.repo is None:
        return Path(model.folder or "")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        return Path(snapshot_download(model.repo, revision=model.revision, local_files_only=True))
    except LocalEntryNotFoundError:
        # One precision only: whole repositories hold several copies of the same weights.
        files = f"'*.{model.variant}*'" if model.variant else "'*.safetensors'"
        raise MissingModel(
            f"the weights of {model.name} are not on this machine ({model.repo})",
            f"fetch them with: hf download {model.repo} --revision {model.revision}"
            f" --include '*.json' --include 'tokenizer/*' --include {files}",
        ) from None


def find_file(folder: Path, *names: str) -> Path:
    """The first of `names` that exists in `folder`."""
    for name in names:
        if (folder / name).is_file():
            return folder / name
    raise BrokenModel(f"{folder / names[0]} is missing", "is the download complete?")
