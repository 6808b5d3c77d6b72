"""Weights for a call: found on this machine, or fetched while the reporter shows progress."""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from sana_cli.errors import MissingModel
from sana_cli.system.signals import exit_by_exception
from sana_cli.units import gigabytes, rough_time
from sana_cli.weights.hub_cache import find_parts, source_parts

if TYPE_CHECKING:
    from sana_cli.reporter import Reporter
    from sana_cli.weights.catalogue import Component, Model, Source
    from sana_cli.weights.download import Listing
    from sana_cli.weights.layout import Part, Parts
    from sana_cli.weights.model_files import ModelFiles

USUAL_SPEED = 100e6 / 8  # bytes a second, for the time that a download is expected to take


def open_or_fetch(
    model: "Model", reporter: "Reporter", *, offline: bool, dry_run: bool = False
) -> "ModelFiles":
    """Read the configs of a model, after fetching the model if it is not on this machine.

    With `dry_run` nothing is fetched: the configs of a missing model are the released ones.
    MissingModel if it cannot be fetched, BrokenModel if its files are unusable.
    """
    if model.file is not None:
        return _open_file(model.file, reporter, offline, dry_run)
    parts = find_parts(model)
    if parts is None and not dry_run:
        parts = fetch_parts(model, reporter, offline)
    from sana_cli.weights.model_files import open_model, released_model

    files = open_model(parts) if parts else released_model(model)
    for key in files.unknown_keys:
        reporter.warn(f"the model's config sets {key}, which this version does not support")
    return files


def _open_file(file: str, reporter: "Reporter", offline: bool, dry_run: bool) -> "ModelFiles":
    """Open a transformer in one file behind the text encoder and autoencoder of its family."""
    from sana_cli.weights.catalogue import model_of
    from sana_cli.weights.model_files import open_single_file, released_model
    from sana_cli.weights.single_file import architecture_of, native_side, read_single_file

    single = read_single_file(Path(file))
    family = model_of(architecture_of(single), native_side(single))
    shared = replace(family, sources=family.sources[1:])
    reporter.info(f"{file} has the transformer of {family.name}, whose other networks it shares")
    parts = find_parts(shared)
    if parts is None and dry_run:
        return released_model(family)
    return open_single_file(single, parts or fetch_parts(shared, reporter, offline))


def fetch_parts(model: "Model", reporter: "Reporter", offline: bool) -> "Parts":
    """Fetch what is missing of a model and return its parts."""
    if offline or no_network():
        raise MissingModel(
            f"the weights of {model.name} are not on this machine ({model.source})",
            f"fetch them once, with a network: sana models pull {model.name}",
        )
    reporter.info(f"fetching {model.name} from {model.source}, licence {model.licence}")
    missing = [source for source in model.sources if source_parts(source) is None]
    transfer(list_sources(missing, reporter), reporter)
    parts = find_parts(model)
    if parts is None:
        raise MissingModel(
            f"{model.source} was fetched and is still incomplete",
            f"sana models verify {model.name}",
        )
    return parts


def fetch_lora(source: "Source", reporter: "Reporter", offline: bool) -> "Path":
    """Find the LoRA file of a source (`lora_choice.lora_source`), fetching it if it is missing."""
    from sana_cli.weights.hub_cache import find_lora

    path = find_lora(source)
    if path is None:
        name = "/".join(filter(None, (source.repo, source.lora)))
        if offline or no_network():
            raise MissingModel(
                f"the LoRA {name} is not on this machine",
                f"fetch it once, with a network: sana models pull {name}",
            )
        listings = list_sources([source], reporter)
        reporter.info(f"fetching the LoRA {listings[0].files[0].name} of {source.repo}")
        transfer(listings, reporter)
        path = find_lora(source)
        if path is None:
            raise MissingModel(f"{name} was fetched and is still not whole", "try again later")
    return path


def open_component(component: "Component", reporter: "Reporter", offline: bool) -> "Part":
    """Find an autoencoder or a ControlNet, fetching it if it is not on this machine."""
    from sana_cli.weights.layout import find_component

    if component.source is None:
        assert component.folder is not None
        return find_component(Path(component.folder), component.kind)
    parts = source_parts(component.source)
    if parts is None:
        if offline or no_network():
            raise MissingModel(
                f"the {component.kind} {component.name} is not on this machine"
                f" ({component.source.repo})",
                "draw with it once, with a network: without --offline and --dry-run",
            )
        reporter.info(
            f"fetching the {component.kind} {component.name} from {component.source.repo}"
        )
        transfer(list_sources([component.source], reporter), reporter)
        parts = source_parts(component.source)
    if parts is None:
        raise MissingModel(f"{component.source.repo} was fetched and is still incomplete")
    return parts[component.kind]


def list_sources(
    sources: "list[Source]", reporter: "Reporter", newest: bool = False
) -> "list[Listing]":
    """List the files of each source on the hub, at its pinned commit or the newest one."""
    from sana_cli.weights.download import list_source

    return [list_source(source, reporter.warn, newest) for source in sources]


def transfer(listings: "list[Listing]", reporter: "Reporter") -> None:
    """Download the files of some listings, after telling how much that is.

    MissingModel if the person at the terminal does not agree.
    """
    from sana_cli.weights.download import fetch, free_disk

    size = sum(file.missing_bytes for listing in listings for file in listing.files)
    place, free = free_disk()
    if size:
        reporter.info(
            f"to fetch: {gigabytes(size)}, of {gigabytes(free)} free in {place}; about"
            f" {rough_time(size / USUAL_SPEED)} at 100 Mbit/s"
        )
    # What does not fit is refused by `fetch`, without a question.
    if 0 < size < free and not reporter.confirm(f"Fetch {gigabytes(size)}?"):
        raise MissingModel("nothing was fetched", "sana models list shows what is on this machine")
    try:
        with exit_by_exception(), reporter.transfer() as progress:
            fetch(listings, progress)
    except SystemExit:
        reporter.warn("interrupted; what was fetched is kept, and the same command goes on from it")
        raise


def no_network() -> bool:
    """Return whether HF_HUB_OFFLINE forbids the network, as the hub's own client reads it."""
    from huggingface_hub.constants import is_offline_mode

    return is_offline_mode()
