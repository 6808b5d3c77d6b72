"""A hub, a machine that fetches from it, and the transformer that LoRAs change."""

from pathlib import Path

import pytest

from hub import Hub
from laptop import OWN, TEXT, Laptop
from sana_cli.models.configs import DiTConfig
from sana_cli.weights.config_files import read_config


@pytest.fixture(scope="session")
def published(tmp_path_factory) -> tuple[Path, Path]:
    """The two repositories that a model is fetched from, with all that must not be fetched."""
    from reference import random_pipeline

    pipe = random_pipeline(sample_size=16)
    own, shared = (tmp_path_factory.mktemp("published") / name for name in ("own", "shared"))
    for folder, variant in ((own, "fp16"), (shared, "bf16")):
        pipe.save_pretrained(folder)  # the full precision, under the plain names
        pipe.save_pretrained(folder, variant=variant)
        (folder / "transformer" / "diffusion_pytorch_model.int4.safetensors").write_bytes(b"4" * 99)
        (folder / "README.md").write_text("# a card")
    for file in (shared / "text_encoder").glob("model.bf16*"):
        file.unlink()
    pipe.text_encoder.save_pretrained(
        shared / "text_encoder", variant="bf16", max_shard_size="400KB"
    )
    shards = {path.name for path in (shared / "text_encoder").glob("model.bf16-*")}
    assert len(shards) == 2, shards
    return own, shared


@pytest.fixture
def hub(published):
    server = Hub()
    server.push(OWN.repo, published[0], OWN.revision)
    server.push(TEXT.repo, published[1], TEXT.revision)
    yield server
    server.close()


@pytest.fixture
def laptop(hub, tmp_path, quick) -> Laptop:
    return Laptop(tmp_path, hub.url, quick / "sana")


@pytest.fixture(scope="module")
def base(tiny_model) -> Path:
    return tiny_model / "transformer" / "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def config(tiny_model) -> DiTConfig:
    return read_config(DiTConfig, tiny_model / "transformer" / "config.json")[0]
