"""Stage 4: write the trained parts to a folder in the published layout, which diffusers loads."""

import json
import shutil
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn
from transformers import Gemma2Model

from sana_cli.models.dc_ae import DCAE
from sana_cli.models.dit import DiT
from sana_cli.weights.vocabulary import FILE
from training.settings import Settings
from training.vocabulary import as_json, vocabulary


def export(
    run: Path, target: Path, settings: Settings, vae: DCAE, encoder: Gemma2Model, dit: DiT
) -> None:
    """Write averaged weights in bfloat16 and the configs to `target`, atomically."""
    partial = target.with_name(target.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    scaling = json.loads((run / "scaling.json").read_text())["scaling_factor"]

    shutil.copytree(run / "tokenizer", partial / "tokenizer")
    encoder.config.architectures = ["Gemma2Model"]
    _write_part(partial / "text_encoder", "model", encoder, encoder.config.to_diff_dict())
    config = {"_class_name": "SanaTransformer2DModel", **asdict(settings.transformer)}
    _write_part(partial / "transformer", "diffusion_pytorch_model", dit, config)
    config = {"_class_name": "AutoencoderDC", **asdict(settings.autoencoder)}
    config["scaling_factor"] = scaling
    _write_part(partial / "vae", "diffusion_pytorch_model", vae, config)

    scheduler = {
        "_class_name": "DPMSolverMultistepScheduler",
        "algorithm_type": "dpmsolver++",
        "flow_shift": settings.flow_shift,
        "num_train_timesteps": 1000,
        "prediction_type": "flow_prediction",
        "solver_order": 2,
        "use_flow_sigmas": True,
    }
    _write_json(partial / "scheduler" / "scheduler_config.json", scheduler)
    index = {
        "_class_name": "SanaPipeline",
        "scheduler": ["diffusers", "DPMSolverMultistepScheduler"],
        "text_encoder": ["transformers", "Gemma2Model"],
        "tokenizer": ["transformers", "GemmaTokenizer"],
        "transformer": ["diffusers", "SanaTransformer2DModel"],
        "vae": ["diffusers", "AutoencoderDC"],
    }
    _write_json(partial / "model_index.json", index)
    (partial / FILE).write_text(as_json(vocabulary(settings.world)))
    shutil.rmtree(target, ignore_errors=True)
    partial.rename(target)


def _write_part(folder: Path, stem: str, model: nn.Module, config: dict) -> None:
    _write_json(folder / "config.json", config)
    tensors = {k: v.to("cpu", torch.bfloat16).contiguous() for k, v in model.state_dict().items()}
    save_file(tensors, folder / f"{stem}.safetensors", metadata={"format": "pt"})


def _write_json(path: Path, value: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=2) + "\n")
