"""Released weights for the tests marked `weights`: those in the hub's cache, or fetched now."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from sana_cli.reporter import LogReporter
from sana_cli.weights.catalogue import Component, Model, Source, known_models
from sana_cli.weights.fetch import fetch_lora, fetch_parts, open_component
from sana_cli.weights.hub_cache import find_lora, find_parts, source_parts
from sana_cli.weights.layout import Part
from sana_cli.weights.model_files import ModelFiles, open_model

ASKED = os.environ.get("SANA_TEST_WEIGHTS", "")
if ASKED not in ("", "pull"):
    raise pytest.UsageError(f"SANA_TEST_WEIGHTS is {ASKED!r}: set it to pull, or not at all")


def skip_unless_fetched(name: str, is_here: bool, how: str) -> None:
    if not is_here and not ASKED:
        pytest.skip(f"{name} is not in the hub's cache: {how}, or SANA_TEST_WEIGHTS=pull")


@pytest.fixture
def released() -> Callable[[str], tuple[Model, ModelFiles]]:
    """A released model and its files, by name."""

    def get(name: str) -> tuple[Model, ModelFiles]:
        model = known_models()[name]
        parts = find_parts(model)
        skip_unless_fetched(name, parts is not None, f"sana models pull {name}")
        return model, open_model(parts or fetch_parts(model, LogReporter(), offline=False))

    return get


@pytest.fixture
def component() -> Callable[[Component], Part]:
    """The part of a released autoencoder or ControlNet."""

    def get(chosen: Component) -> Part:
        assert chosen.source is not None
        here = source_parts(chosen.source) is not None
        skip_unless_fetched(chosen.name, here, f"draw with --{chosen.kind} {chosen.name}")
        return open_component(chosen, LogReporter(), offline=False)

    return get


@pytest.fixture
def lora() -> Callable[[Source], Path]:
    """The file of a LoRA that people published."""

    def get(source: Source) -> Path:
        here = find_lora(source) is not None
        skip_unless_fetched(source.repo, here, f"sana models pull {source.repo}")
        return fetch_lora(source, LogReporter(), offline=False)

    return get
