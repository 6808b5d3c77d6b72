"""A machine with a cache of its own, the model it fetches, and what `sana` says there."""

import json
import os
import subprocess
from dataclasses import dataclass
from pathlib import Path

from sana_cli.weights.catalogue import known_models

NAME = "sana-0.6b-512"
OWN, TEXT, VAE = known_models()[NAME].sources
TRANSFORMER = "transformer/diffusion_pytorch_model.fp16.safetensors"
NEEDED = {
    OWN.repo: {
        "model_index.json",
        "scheduler/scheduler_config.json",
        "transformer/config.json",
        TRANSFORMER,
    },
    TEXT.repo: {
        "text_encoder/config.json",
        "text_encoder/model.bf16-00001-of-00002.safetensors",
        "text_encoder/model.bf16-00002-of-00002.safetensors",
        "text_encoder/model.safetensors.index.bf16.json",
        "tokenizer/tokenizer.json",
        "tokenizer/tokenizer_config.json",
        "vae/config.json",
        "vae/diffusion_pytorch_model.bf16.safetensors",
    },
}


@dataclass
class Laptop:
    """A machine of its own: cache, lock, and the hub it talks to."""

    home: Path
    url: str
    program: Path

    def __post_init__(self) -> None:
        self.env = os.environ | {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(self.home / "hf"),
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DOWNLOAD_TIMEOUT": "1",
            "SANA_DATA_DIR": str(self.home / "data"),
            "NO_PROXY": "127.0.0.1",
            "COLUMNS": "200",
        }
        self.env.pop("HF_TOKEN", None)

    def command(self, *words: str) -> list[str]:
        return [str(self.program), *words]

    def sana(self, *words: str, code: int = 0, **env: str) -> subprocess.CompletedProcess:
        run = subprocess.run(
            self.command(*words),
            **{"capture_output": True, "text": True, "timeout": 120, "cwd": self.home},
            env=self.env | env,
        )
        assert run.returncode == code, run.stderr
        return run

    def pull(self, code: int = 0, **env: str) -> subprocess.CompletedProcess:
        return self.sana("models", "pull", NAME, code=code, **env)

    def row(self, name: str = NAME) -> dict:
        rows = json.loads(self.sana("models", "list", "--json").stdout)["models"]
        return next(row for row in rows if row["name"] == name)

    def files(self, repo: str) -> set[str]:
        """Names of the files of a repository in the cache."""
        place = self.home / "hf" / "hub" / f"models--{repo.replace('/', '--')}" / "snapshots"
        found = [path for path in place.rglob("*") if path.is_file()]
        return {path.relative_to(place).as_posix().split("/", 1)[1] for path in found}

    def blobs(self) -> list[Path]:
        return [path for path in (self.home / "hf").rglob("blobs/*") if path.is_file()]


def assert_whole(laptop: Laptop) -> None:
    assert laptop.row()["cached"]
    assert json.loads(laptop.sana("models", "verify", NAME, "--json").stdout)["models"] == [
        {"name": NAME, "ok": True, "damaged": []}
    ]
    assert not [path for path in laptop.blobs() if path.name.endswith(".incomplete")]


def polite(run: subprocess.CompletedProcess) -> str:
    """The error line and the hint, after checking that there is nothing worse."""
    assert "Traceback" not in run.stderr
    last, hint = run.stderr.strip().splitlines()[-2:]
    assert last.startswith("error: ")
    assert hint.startswith("hint: ")
    return f"{last}\n{hint}"
