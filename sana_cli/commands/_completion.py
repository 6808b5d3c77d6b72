"""What the Tab key offers, in the shells for which `sana --install-completion` was run.

Where nothing is offered the shell completes the names of files and folders by itself.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path

from sana_cli.shapes import squares_of
from sana_cli.weights.catalogue import Model, known_models
from sana_cli.weights.layout import INDEX


def model_or_folder(incomplete: str) -> Iterator[tuple[str, str]]:
    """Models by name, and folders here that hold one; with what shells show beside them."""
    yield from _named(incomplete, known_models().values())
    if incomplete and "/" not in incomplete:
        for index in sorted(Path.cwd().glob(f"*/{INDEX}")):
            if index.parent.name.startswith(incomplete):
                yield index.parent.name, "folder"


def hub_model(incomplete: str) -> Iterator[tuple[str, str]]:
    yield from _named(incomplete, (model for model in known_models().values() if model.sources))


def _named(incomplete: str, models: Iterable[Model]) -> Iterator[tuple[str, str]]:
    for model in models:
        if model.name.startswith(incomplete):
            yield model.name, f"draws {squares_of(model.sides)}"
