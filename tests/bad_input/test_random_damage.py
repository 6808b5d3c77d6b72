"""Files that are damaged at random."""

import json

import pytest
import torch
from hypothesis import given

from faults import CONFIGS, DAMAGE, FAST, PARTS, damaged
from random_inputs import FUZZ, headers
from sana_cli.models.architectures import TRANSFORMERS
from sana_cli.weights.lora import transformer_shapes


@pytest.fixture
def draws_or_refuses(sana, no_hang, count_ending):
    def run(*words: str) -> None:
        no_hang()
        done = sana("generate", "a fox", *words, "-o", "fox.png", "-f")
        count_ending(f"exit code {done.code}")
        assert_survived(done)

    return run


def assert_survived(run) -> None:
    assert run.code in (0, 1, 2, 7), run.err
    assert "Traceback" not in run.err and "panicked" not in run.err, run.err
    assert len([line for line in run.err.splitlines() if line.startswith("error:")]) == bool(
        run.code
    )
    assert bool(run.out) == (run.code == 0)


@pytest.mark.hypothesis
@pytest.mark.parametrize("config", CONFIGS)
def test_random_damage_to_a_config_is_survived(draws_or_refuses, model, config):
    original = (model / config).read_bytes()
    # What the plan reads is not drawn: a digit more in a size would take minutes and gigabytes.
    draws = config.startswith(("text_encoder", "tokenizer"))
    words = ("-m", str(model), *FAST, *(() if draws else ("--dry-run",)))

    @FUZZ
    @given(DAMAGE)
    def survives(damage):
        (model / config).write_bytes(damaged(original, damage, len(original)))
        draws_or_refuses(*words)

    survives()


@pytest.mark.hypothesis
@PARTS
def test_random_damage_to_a_weight_header_is_survived(draws_or_refuses, model, part):
    original = (model / part).read_bytes()
    header = 8 + int.from_bytes(original[:8], "little")
    (model / part).unlink()

    @FUZZ
    @given(DAMAGE)
    def survives(damage):
        (model / part).write_bytes(damaged(original, damage, header))
        draws_or_refuses("-m", str(model), *FAST)

    survives()


@pytest.mark.hypothesis
def test_a_random_header_of_a_lora(survives, files):
    lora = files / "lora.safetensors"
    original = lora.read_bytes()
    end = 8 + int.from_bytes(original[:8], "little")

    @FUZZ
    @given(headers(original[:end]))
    def holds(header):
        lora.write_bytes(header + original[end:])
        survives("info", "lora.safetensors")
        survives("generate", "a star", "-m", "demo", "--lora", "lora.safetensors", "--dry-run")

    holds()


@pytest.mark.hypothesis
def test_a_random_header_of_a_checkpoint(survives, tmp_path):
    header, end = {}, 0
    for name, shape in transformer_shapes(TRANSFORMERS["sana-0.6b"]).items():
        start, end = end, end + 2 * torch.Size(shape).numel()
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    path = tmp_path / "checkpoint.safetensors"

    @FUZZ
    @given(headers(len(text).to_bytes(8, "little") + text))
    def holds(header):
        path.write_bytes(header)
        with path.open("r+b") as file:
            file.truncate(len(header) + end)  # the weights are a hole on the disk
        survives("generate", "a star", "-m", str(path), "--dry-run")

    holds()
