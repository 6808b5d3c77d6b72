"""Weights for a call: on this machine already, or fetched now while the user watches."""

from typing import TYPE_CHECKING

from sana_cli.errors import MissingModel

if TYPE_CHECKING:
    from pathlib import Path

    from sana_cli.ui import Talk
    from sana_cli.weights.catalogue import Model, Source
    from sana_cli.weights.download import Listing
    from sana_cli.weights.layout import Parts
    from sana_cli.weights.model_files import ModelFiles


def open_chosen(model: "Model", talk: "Talk", offline: bool, dry_run: bool) -> "ModelFiles":
    """The configs of a model, fetched with its weights if they are not here; a dry run fetches
    nothing and takes those of the released model."""
    from sana_cli.weights.hub_cache import find_parts

    parts = find_parts(model)
    if parts is None and not dry_run:
        parts = fetch_parts(model, talk, offline)
    from sana_cli.weights.model_files import open_model, released_model  # imports torch

    files = open_model(parts) if parts else released_model(model)
    for key in files.unknown_keys:
        talk.warn(f"the model's config sets {key}, which this version does not know")
    return files


def fetch_parts(model: "Model", talk: "Talk", offline: bool) -> "Parts":
    """The parts of a model that is not whole on this machine, after fetching what lacks."""
    from sana_cli.weights.hub_cache import find_parts, source_parts

    if offline or no_network():
        raise MissingModel(
            f"the weights of {model.name} are not on this machine ({model.source})",
            f"fetch them once, with a network: sana models pull {model.name}",
        )
    talk.say(f"fetching {model.name} from {model.source}, licence {model.licence}")
    transfer(list_sources([s for s in model.sources if source_parts(s) is None], talk), talk)
    parts = find_parts(model)
    if parts is None:
        raise MissingModel(
            f"{model.source} was fetched and is still not whole", f"sana models verify {model.name}"
        )
    return parts


def fetch_lora(source: "Source", talk: "Talk", offline: bool) -> "Path":
    """The LoRA file of a source (`lora_choice.lora_source`), fetched if it is not here."""
    from sana_cli.weights.hub_cache import find_lora

    path = find_lora(source)
    if path is None:
        name = "/".join(filter(None, (source.repo, source.lora)))
        if offline or no_network():
            raise MissingModel(
                f"the LoRA {name} is not on this machine",
                f"fetch it once, with a network: sana models pull {name}",
            )
        listings = list_sources([source], talk)
        talk.say(f"fetching the LoRA {listings[0].files[0].name} of {source.repo}")
        transfer(listings, talk)
        path = find_lora(source)
        if path is None:
            raise MissingModel(f"{name} was fetched and is still not whole", "try again later")
    return path


def list_sources(sources: "list[Source]", talk: "Talk", newest: bool = False) -> "list[Listing]":
    from sana_cli.weights.download import list_source

    return [list_source(source, talk.warn, newest) for source in sources]


def transfer(listings: "list[Listing]", talk: "Talk") -> None:
    from sana_cli.system.signals import leaving_in_order
    from sana_cli.ui import Downloads
    from sana_cli.weights.download import fetch

    with leaving_in_order(), Downloads(talk) as bars:
        fetch(listings, bars)


def no_network() -> bool:
    """Whether the environment forbids it, as the hub's own client reads that."""
    from huggingface_hub.constants import is_offline_mode

    return is_offline_mode()
