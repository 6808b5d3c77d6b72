"""Training a LoRA: it resumes to the bit, and the one that is shipped draws in its style."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from reference import assert_same_picture, draw
from sana_cli.weights.lora import describe

ROOT = Path(__file__).resolve().parents[2]
BLUEPRINT = ROOT / "benchmarks" / "gallery" / "blueprint.safetensors"
PROMPT = "a red house in front of hills at noon"


def test_a_run_that_was_stopped_ends_in_the_same_bits(tmp_path, monkeypatch):
    from training import lora

    words = ["--set", "side=128", "images=4", "steps=3", "batch=2", "log_every=1", "save_seconds=0"]
    lora.main([*words, "--run", f"{tmp_path}/whole"])
    steps, loss = iter(range(3)), lora.flow_matching

    def stopped(*args):
        if next(steps) == 2:
            raise KeyboardInterrupt
        return loss(*args)

    monkeypatch.setattr(lora, "flow_matching", stopped)
    with pytest.raises(KeyboardInterrupt):
        lora.main([*words, "--run", f"{tmp_path}/cut"])
    assert not (tmp_path / "cut" / "blueprint.safetensors").exists()
    monkeypatch.setattr(lora, "flow_matching", loss)
    lora.main([*words, "--run", f"{tmp_path}/cut"])
    files = [tmp_path / run / "blueprint.safetensors" for run in ("whole", "cut")]
    assert files[0].read_bytes() == files[1].read_bytes()
    about = describe(files[0])
    assert (about["ranks"], about["fits"]) == ([4], ["demo"])


def test_the_shipped_one_draws_blue_and_the_same_in_diffusers(sana, tmp_path):
    from diffusers import SanaPipeline

    assert BLUEPRINT.stat().st_size < 1e6

    def ours(*words: str) -> np.ndarray:
        out = tmp_path / f"{len(words)}.png"
        call = ("-m", "demo", "-r", "256", "-s", "1", "--steps", "8", "-o", str(out))
        run = sana("generate", PROMPT, *call, *words)
        assert run.code == 0, run.err
        return np.asarray(Image.open(out))

    pipe = SanaPipeline.from_pretrained(ROOT / "sana_cli" / "demo", local_files_only=True)
    pipe.to(dtype=torch.float32).load_lora_weights(BLUEPRINT)
    call = {"num_inference_steps": 8, "height": 256, "width": 256}
    call |= {"use_resolution_binning": False, "complex_human_instruction": None}
    styled = ours("--lora", str(BLUEPRINT))
    assert_same_picture(styled, draw(pipe, seeds=[1], prompt=PROMPT, **call)[0])
    red, _, blue = styled.reshape(-1, 3).mean(0)
    assert blue > 2 * red
    red, _, blue = ours().reshape(-1, 3).mean(0)
    assert blue < 2 * red
