"""`sana models`: which there are, what of them is on this machine, fetching, checking, removing."""

import json
import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sana_cli.commands._completion import hub_model
from sana_cli.commands._help import Command, Group
from sana_cli.commands._options import Color, Json, Quiet, Verbose
from sana_cli.errors import MissingModel, SanaError, UsageError

if TYPE_CHECKING:
    from collections.abc import Callable

    from sana_cli.ui import Console
    from sana_cli.weights.catalogue import Model, Source

app = typer.Typer(cls=Group, no_args_is_help=True, help="List, fetch, check and remove models.")

Names = Annotated[
    list[str],
    typer.Argument(
        metavar="NAME…",
        help="Models, as `list` calls them; or models and LoRAs on the hub, as OWNER/NAME.",
        autocompletion=hub_model,
    ),
]


@app.command("list", cls=Command)
def list_models(
    json_output: Json = False, quiet: Quiet = False, verbose: Verbose = False, color: Color = True
) -> None:
    """Every model: what it draws, what it takes, whether it is here and fits this machine."""
    rows = described()
    if json_output:
        sys.stdout.write(json.dumps({"models": rows}, indent=2) + "\n")
        return
    from rich.console import Console
    from rich.table import Table

    from sana_cli.units import gigabytes

    # So that every model is one line of 80 columns.
    table = Table(box=None, header_style="bold", pad_edge=False, collapse_padding=True)
    table.add_column("name", no_wrap=True)
    for title in ("draws", "disk", "memory"):
        table.add_column(title, justify="right", no_wrap=True)
    for title in ("here", "fits", "licence"):
        table.add_column(title)
    for row in rows:
        lacks = row["missing_bytes"]
        table.add_row(
            *(row["name"], ", ".join(f"{side}²" for side in row["sides"])),
            *(gigabytes(row[key]) if row[key] else "-" for key in ("bytes", "memory_bytes")),
            "yes" if not lacks else "no" if lacks == row["bytes"] else "in part",
            *(row["fits"], row["licence"]),
        )
    Console(no_color=None if color else True, highlight=False).print(table)


@app.command(cls=Command)
def pull(
    names: Names,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print what would be fetched; fetch nothing.")
    ] = False,
    update: Annotated[
        bool,
        typer.Option("--update", help="Take the newest files of models not pinned to a commit."),
    ] = False,
    json_output: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
    color: Color = True,
) -> None:
    """Fetch models into the Hugging Face cache; what is there already is not fetched again."""
    from sana_cli.ui import Console
    from sana_cli.units import gigabytes
    from sana_cli.weights.fetch import list_sources, no_network, transfer
    from sana_cli.weights.hub_cache import COMMIT, is_here, pinned_commit

    console = Console(quiet, verbose, color)
    models = _hub_models(names)
    if no_network():
        raise MissingModel("HF_HUB_OFFLINE forbids the network", "unset it to fetch models")
    models = [_model_or_lora(model, console) for model in models]
    for model in models:
        console.info(f"{model.name} from {model.source}, licence {model.licence}")
    sources = _distinct(models)
    moving = [s for s in sources if not COMMIT.fullmatch(s.revision) and pinned_commit(s)]
    lacking = [s for s in sources if not is_here(s) and not (update and s in moving)]
    listings = list_sources(lacking, console)
    for newest in list_sources(moving, console, newest=True):
        changed = newest.commit != pinned_commit(newest.source)
        if update and (changed or not is_here(newest.source)):
            listings.append(newest)
        elif changed:
            console.warn(
                f"{newest.source.repo} has changed: {newest.source.revision} was"
                f" {pinned_commit(newest.source)} and is now {newest.commit}. The former stays in"
                " use; `--update` takes the new one"
            )
    waiting = sum(file.missing_bytes for listing in listings for file in listing.files)
    if dry_run:
        console.info(f"would fetch {gigabytes(waiting)}")
    else:
        transfer(listings, console)
    rows = [
        {
            "repo": listing.source.repo,
            "commit": listing.commit,
            "file": file.name,
            "bytes": file.digest.size,
            file.digest.kind: file.digest.value,
        }
        for listing in listings
        for file in listing.files
    ]
    if json_output:
        document = {"models": [m.name for m in models], "fetched_bytes": waiting, "files": rows}
        sys.stdout.write(json.dumps(document, indent=2) + "\n")
    elif dry_run:
        for row in rows:
            sys.stdout.write(f"{row['repo']}/{row['file']}\n")
    elif not quiet:
        for model in models:
            sys.stdout.write(f"{model.name}\n")


@app.command(cls=Command)
def verify(
    names: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[NAME…]",
            help="Models. [dim]default: all on this machine[/dim]",
            autocompletion=hub_model,
        ),
    ] = None,
    json_output: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
    color: Color = True,
) -> None:
    """Read every file of a model and compare it with the hash that the hub promised."""
    from sana_cli.ui import Console
    from sana_cli.weights.catalogue import known_models
    from sana_cli.weights.hub_cache import damaged_files, is_here, stored_files

    console = Console(quiet, verbose, color)
    chosen = _hub_models(names) if names else [m for m in known_models().values() if m.sources]
    faults: dict[str, list[str]] = {}
    seen: dict[Source, list[str]] = {}
    for model in chosen:
        if not any(stored_files(source) for source in model.sources[:1]):
            if names:
                faults[model.name] = [f"{model.source} (nothing is here)"]
            continue
        faults[model.name] = []
        for source in model.sources:
            if source not in seen:
                missing = [] if is_here(source) else ["files are missing"]
                seen[source] = damaged_files(source) or missing
            faults[model.name] += [f"{source.repo}/{name}" for name in seen[source]]
    if json_output:
        rows = [{"name": name, "ok": not bad, "damaged": bad} for name, bad in faults.items()]
        sys.stdout.write(json.dumps({"models": rows}, indent=2) + "\n")
    else:
        for name, bad in faults.items():
            sys.stdout.write(f"{name}: {'damaged' if bad else 'ok'}\n")
            for file in bad:
                sys.stdout.write(f"  {file}\n")
    if not faults:
        console.info("no model has been fetched yet")
    broken = [name for name, bad in faults.items() if bad]
    if broken:
        raise MissingModel(
            f"damaged or not whole: {', '.join(broken)}",
            f"sana models rm -y {' '.join(broken)} && sana models pull {' '.join(broken)}",
        )


@app.command(cls=Command)
def rm(
    names: Names,
    yes: Annotated[bool, typer.Option("-y", "--yes", help="Do not ask.")] = False,
    json_output: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
    color: Color = True,
) -> None:
    """Remove models from the Hugging Face cache, but nothing that another model still uses."""
    from sana_cli.ui import Console
    from sana_cli.units import gigabytes
    from sana_cli.weights.catalogue import known_models
    from sana_cli.weights.hub_cache import remove, stored_files

    console = Console(quiet, verbose, color)
    models = _hub_models(names)
    staying = [
        model
        for model in known_models().values()
        if model not in models and model.sources and stored_files(model.sources[0])
    ]
    kept = {path for model in staying for s in model.sources for path in stored_files(s).values()}
    going: list[tuple[Source, list[str], int]] = []
    for source in _distinct(models):
        files = {n: path for n, path in stored_files(source).items() if path not in kept}
        if files:
            going.append((source, list(files), sum(p.stat().st_size for p in files.values())))
    for source, files_of, size in going:
        console.info(f"{len(files_of)} files, {gigabytes(size)}, of {source.repo}")
    if going and not yes:
        if not sys.stdin.isatty():
            raise UsageError("removing asks first, and nobody is at the terminal", "add -y")
        try:
            agreed = typer.confirm("Remove them?", err=True)
        except typer.Abort:  # the input has ended
            agreed = False
        if not agreed:
            raise SanaError("nothing was removed", "add -y to remove without a question")
    freed = sum(remove(source, files_of) for source, files_of, _ in going)
    console.info(f"freed {gigabytes(freed)}" if going else "nothing of that is on this machine")
    if json_output:
        document = {"removed": [m.name for m in models], "freed_bytes": freed}
        sys.stdout.write(json.dumps(document) + "\n")


def described() -> list[dict[str, Any]]:
    """The models as `--json` shows them. SanaError if the lock file is broken."""
    from sana_cli.weights.catalogue import known_models
    from sana_cli.weights.hub_cache import commit_of, source_parts

    fit = _fits_here()
    rows = []
    for model in known_models().values():
        missing = [source for source in model.sources if source_parts(source) is None]
        row = {
            "name": model.name,
            "side": model.side,
            "sides": model.sides,
            "licence": model.licence,
            "source": model.source,
            "revision": commit_of(model),
            "bytes": sum(source.bytes for source in model.sources),
            "memory_bytes": model.memory,
            "least_memory_bytes": model.least_memory,
            "cached": not missing,
            "missing_bytes": sum(source.bytes for source in missing),
            "fits": fit(model),
        }
        rows.append(row)
    return rows


def _fits_here() -> "Callable[[Model], str | None]":
    """Of a model "yes", "tight" or "no"; None where there is no torch to ask for the device."""
    try:
        from sana_cli.pipeline.plan import fits, free_memory
        from sana_cli.system.devices import choose_device

        device = choose_device("auto")
    except ImportError:
        return lambda model: None
    free = free_memory(device)
    return lambda model: fits(model, device, free)


def _hub_models(names: list[str]) -> "list[Model]":
    models = [_hub_model(name) for name in dict.fromkeys(names)]
    for model in models:
        if not model.sources:
            raise UsageError(f"{model.name} is not from the hub", "it needs no download")
    return models


def _hub_model(name: str) -> "Model":
    """A model, or a LoRA (OWNER/NAME/FILE, or OWNER/NAME if that is here), which has one source."""
    from sana_cli.weights.catalogue import HUB_ID, Model, Source, choose_model, known_models
    from sana_cli.weights.hub_cache import is_here
    from sana_cli.weights.lora_choice import lora_source, parse_lora

    if name.endswith(".safetensors"):
        place = parse_lora(name).place
        if not isinstance(place, Source):
            raise UsageError(f"{name} is not from the hub", "it needs no download")
        return Model(name, sources=(place,))
    if name not in known_models() and HUB_ID.fullmatch(name) and is_here(lora_source(name)):
        return Model(name, sources=(lora_source(name),))
    return choose_model(name, None)


def _model_or_lora(model: "Model", console: "Console") -> "Model":
    """A repository that no list has is what the hub holds under its name."""
    from sana_cli.weights.catalogue import Model, known_models
    from sana_cli.weights.download import holds_lora
    from sana_cli.weights.hub_cache import is_here
    from sana_cli.weights.lora_choice import lora_source

    stranger = model.name not in known_models() and model.sources[0].lora is None
    if stranger and not is_here(model.sources[0]) and holds_lora(model.name, console.warn):
        return Model(model.name, sources=(lora_source(model.name),))
    return model


def _distinct(models: "list[Model]") -> "list[Source]":
    return list(dict.fromkeys(source for model in models for source in model.sources))
