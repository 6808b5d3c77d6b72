"""`python -m training.lora`: teach the bundled model a style, as a LoRA; resumes after a kill.

The frozen transformer gets a low-rank update of its attention and feed-forward matrices (PEFT),
trained by flow matching on images in the style of `training.blueprint`, with the captions of the
images that they were made from. The file has the names and the metadata that diffusers writes.
"""

import argparse
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model
from safetensors.torch import save_file
from tokenizers import Tokenizer
from transformers import AutoModel

from sana_cli.models.dc_ae import DCAE
from sana_cli.models.dit import DiT
from sana_cli.weights.checkpoint import load_weights, on_meta
from sana_cli.weights.layout import folder_parts
from sana_cli.weights.model_files import open_model
from training.arithmetic import keep_freed_memory
from training.blueprint import blueprint
from training.bundled import DEMO
from training.diffusion import Bank, bank, bank_sample, flow_matching, weight_cells
from training.loop import Losses, Machine, Stage, train
from training.settings import changed_settings, with_changes
from training.text import tokenise
from training.world import World

ROOT = Path(__file__).resolve().parents[1]
WORLD = World()  # of the bundled model
TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "conv_inverted", "conv_point"]


@dataclass(frozen=True)
class Settings:
    """Planned for a few minutes on one CPU core."""

    rank: int = 4  # and alpha, so that the update is B·A at scale 1
    side: int = 512
    images: int = 512
    steps: int = 700
    batch: int = 8
    rate: float = 2e-3
    object_weight: float = 3.0  # in the loss, of a cell that contains an object
    empty_captions: float = 0.1  # so that both halves of guidance learn the style
    average_decay: float = 0.99
    save_seconds: float = 60.0
    log_every: int = 25


@dataclass(frozen=True)
class Captioned:
    """Of a step: indices into the bank, and ids and mask of their captions."""

    settings: Settings
    seed: int
    tokenizer: Tokenizer

    def __call__(self, step: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        s, rng = self.settings, np.random.default_rng((self.seed, 7, step))
        chosen = rng.integers(0, s.images, s.batch)
        samples = [bank_sample(WORLD, self.seed, s.side, int(i)) for i in chosen]
        texts = [WORLD.describe(one, rng).text for one in samples]
        texts = ["" if rng.random() < s.empty_captions else text for text in texts]
        return chosen, *tokenise(self.tokenizer, texts)


def lora_config(settings: Settings) -> LoraConfig:
    return LoraConfig(r=settings.rank, lora_alpha=settings.rank, target_modules=TARGETS)


def train_lora(folder: Path, settings: Settings, machine: Machine, seed: int) -> DiT:
    """Return the transformer with the trained update, after running the steps not done yet."""
    s, parts = settings, folder_parts(DEMO)
    files = open_model(parts)
    vae = on_meta(DCAE, files.vae, parts["vae"].config)
    load_weights(vae, parts["vae"].weights, torch.float32)
    vae = vae.eval().requires_grad_(False).to(machine.device)
    dit = on_meta(DiT, files.dit, parts["transformer"].config)  # not fused: PEFT wraps its modules
    load_weights(dit, parts["transformer"].weights, torch.float32)
    encoder = AutoModel.from_pretrained(DEMO / "text_encoder", dtype=torch.float32)
    encoder = encoder.eval().requires_grad_(False).to(machine.device)
    tokenizer = Tokenizer.from_file(str(DEMO / "tokenizer" / "tokenizer.json"))

    latents = bank(folder, vae, machine, WORLD, seed, s.side, s.images, blueprint)
    scaling = files.vae.scaling_factor
    images: Bank = weight_cells(latents, scaling, s.object_weight, WORLD, seed, s.side)
    torch.manual_seed(seed)
    dit = inject_adapter_in_model(lora_config(s), dit)

    def losses(batch: tuple[np.ndarray, np.ndarray, np.ndarray]) -> Losses:
        return flow_matching(dit, encoder, images, files.flow_shift, batch)

    batches = Captioned(s, seed, tokenizer)
    return train(
        Stage("lora", dit, s.steps, s.rate, s.average_decay, batches, losses), folder, machine, seed
    )


def save_lora(path: Path, dit: DiT, settings: Settings) -> None:
    """Write the update in bfloat16, as `SanaPipeline.save_lora_weights` does, atomically."""
    tensors = {
        f"transformer.{name}": value.to("cpu", torch.bfloat16).contiguous()
        for name, value in get_peft_model_state_dict(dit, save_embedding_layers=False).items()
    }
    config = lora_config(settings).to_dict() | {"base_model_name_or_path": "demo"}
    config = {f"transformer.{name}": value for name, value in config.items()}
    partial = path.with_suffix(".partial")
    # One entry: safetensors writes several in any order, and equal runs give equal bytes.
    metadata = {"lora_adapter_metadata": json.dumps(config, default=sorted)}
    save_file(tensors, partial, metadata=metadata)
    partial.replace(path)


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m training.lora", description=__doc__)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--set", nargs="*", default=[], metavar="NAME=VALUE", help="settings")
    parser.add_argument("--run", type=Path, default=ROOT / "runs" / "lora", help="checkpoints")
    parser.add_argument("--out", type=Path, help="default: RUN/blueprint.safetensors")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args(words)
    try:
        settings = with_changes(Settings(), options.set)
    except ValueError as error:
        parser.error(str(error))
    run, seed = options.run, options.seed
    run.mkdir(parents=True, exist_ok=True)
    changed = changed_settings(run / "settings.json", settings, seed)
    if changed:
        parser.error(f"{run} was started with other {', '.join(changed)}; use another --run")
    machine = Machine(options.device, 0, settings.save_seconds, settings.log_every)
    dit = train_lora(run, settings, machine, seed)
    save_lora(options.out or run / "blueprint.safetensors", dit, settings)


if __name__ == "__main__":
    keep_freed_memory()
    main()
