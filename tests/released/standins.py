"""Miniatures under the names of released repositories, in a hub cache as its client lays it out."""

import copy
import hashlib
import json
from pathlib import Path

import torch
from diffusers import SanaPipeline, SanaSprintPipeline

from sana_cli.weights.catalogue import Source, known_models

PLAIN, SPRINT = "sana-0.6b-512", "sana-sprint-0.6b"
OWN, TEXT, VAE = known_models()[PLAIN].sources
MAIN = "0" * 39 + "1"  # the commit that "main" means


def save_own(pipe: SanaPipeline | SanaSprintPipeline, folder: Path, source: Source) -> None:
    """A model's repository: transformer and scheduler, in the precision of its variant."""
    (variant,) = source.variants
    dtype = {"fp16": torch.float16}.get(variant, torch.bfloat16)
    transformer = copy.deepcopy(pipe.transformer).to(dtype)
    transformer.save_pretrained(folder / "transformer", variant=variant or None)
    pipe.scheduler.save_pretrained(folder / "scheduler")
    index = {"_class_name": type(pipe).__name__}
    (folder / "model_index.json").write_text(json.dumps(index))


def save_shared(pipe: SanaPipeline, folder: Path) -> None:
    """What all models share: a text encoder in two shards, a decoder in float32 called bf16."""
    text = copy.deepcopy(pipe.text_encoder).to(torch.bfloat16)
    text.save_pretrained(folder / "text_encoder", variant="bf16", max_shard_size="200KB")
    pipe.tokenizer.save_pretrained(folder / "tokenizer")
    pipe.vae.save_pretrained(folder / "vae", variant="bf16")


def lay(cache: Path, source: Source, folder: Path) -> Path:
    """Put a repository into a cache: files are links to blobs called by their hashes."""
    repo = cache / f"models--{source.repo.replace('/', '--')}"
    commit = MAIN if source.revision == "main" else source.revision
    (repo / "blobs").mkdir(parents=True)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(commit)
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        content = path.read_bytes()
        blob = repo / "blobs" / hashlib.sha256(content).hexdigest()
        blob.write_bytes(content)
        pointer = repo / "snapshots" / commit / path.relative_to(folder)
        pointer.parent.mkdir(parents=True, exist_ok=True)
        pointer.symlink_to(blob)
    return repo / "snapshots" / commit
