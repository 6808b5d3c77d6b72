"""Stage 2: a tokenizer for the captions and a small Gemma-2 that has understood them.

The released models condition on a frozen language model. Ours is pretrained to say, from the
state of a caption's last token, everything the caption states; then it is frozen too.
"""

import json
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import (
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from torch import nn
from transformers import Gemma2Config, Gemma2Model

from training.optim import Average, Muon, descend, load_state, open_log, save_state, schedule
from training.shapes import (
    COLOURS,
    POSITIONS,
    RELATIONS,
    SHAPES,
    SIZES,
    Scene,
    describe,
    training_scene,
)

SPECIAL = ["<pad>", "<eos>", "<bos>", "<unk>"]
WIDTH = 128
BATCH = 128


def train_tokenizer(path: Path, seed: int = 0, captions: int = 20_000) -> None:
    """Byte-fallback BPE in Gemma's form: spaces become "▁", any text has an encoding."""
    rng = np.random.default_rng(seed)
    texts = [describe(training_scene(rng), rng) for _ in range(captions)]
    learner = Tokenizer(models.BPE())
    learner.normalizer = normalizers.Replace(" ", "▁")
    learner.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")  # no token spans words
    printable = [chr(c) for c in range(33, 127)]
    learner.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=1000, min_frequency=20, initial_alphabet=printable, show_progress=False
        ),
    )
    learned = json.loads(learner.to_str())["model"]
    pieces = sorted(learned["vocab"], key=learned["vocab"].get)
    names = [*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256)), *pieces]
    tokenizer = Tokenizer(
        models.BPE(
            vocab={name: index for index, name in enumerate(names)},
            merges=[tuple(pair) for pair in learned["merges"]],
            unk_token="<unk>",
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    tokenizer.add_special_tokens(SPECIAL)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A <bos> $B", special_tokens=[("<bos>", 2)]
    )
    path.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(path / "tokenizer.json"))
    settings = {
        "tokenizer_class": "GemmaTokenizer",
        "bos_token": "<bos>",
        "eos_token": "<eos>",
        "pad_token": "<pad>",
        "unk_token": "<unk>",
        "add_bos_token": True,
        "add_eos_token": False,
        "padding_side": "right",
        "model_max_length": 8192,
    }
    (path / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")


def encoder_config(vocabulary: int) -> Gemma2Config:
    return Gemma2Config(
        vocab_size=vocabulary,
        hidden_size=WIDTH,
        intermediate_size=3 * WIDTH,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        query_pre_attn_scalar=32,
        max_position_embeddings=8192,
    )


class Reader(nn.Module):
    """The encoder with one linear question per fact that a caption can state."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.encoder = Gemma2Model(encoder_config(vocabulary))
        self.questions = nn.ModuleDict({k: nn.Linear(WIDTH, len(v)) for k, v in ANSWERS.items()})

    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> dict[str, torch.Tensor]:
        states = self.encoder(ids, attention_mask=mask).last_hidden_state
        last = states[torch.arange(len(ids)), mask.sum(1) - 1]
        return {name: question(last) for name, question in self.questions.items()}


ANSWERS: dict[str, list[str | None]] = {
    "first colour": [*COLOURS],
    "first shape": [*SHAPES],
    "second colour": [None, *COLOURS],
    "second shape": [None, *SHAPES],
    "relation": [None, *RELATIONS],
    "size": [None, *SIZES],
    "position": [None, *POSITIONS],
    "background": [*COLOURS],
    "second background": [None, *COLOURS],
    "axis": [None, "over", "beside"],
}


def facts(scene: Scene) -> dict[str, str | None]:
    first, second = scene.objects[0], scene.objects[1] if scene.relation else None
    two_tone = len(scene.background) == 2
    return {
        "first colour": first.colour,
        "first shape": first.shape,
        "second colour": second and second.colour,
        "second shape": second and second.shape,
        "relation": scene.relation,
        "size": first.size,
        "position": first.position,
        "background": scene.background[0],
        "second background": scene.background[1] if two_tone else None,
        "axis": ("over", "beside")[scene.axis] if two_tone else None,
    }


def tokenise(tokenizer: Tokenizer, captions: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """Right-padded ids and mask, both int64 (B, longest)."""
    rows = [e.ids for e in tokenizer.encode_batch(captions)]
    ids = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.long)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = torch.tensor(row)
        mask[i, : len(row)] = 1
    return ids, mask


def train(folder: Path, steps: int, lr: float, seed: int) -> None:
    if not (folder / "tokenizer" / "tokenizer.json").is_file():
        train_tokenizer(folder / "tokenizer", seed)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer" / "tokenizer.json"))
    torch.manual_seed(seed)
    model = Reader(tokenizer.get_vocab_size())
    optimiser, average = Muon(model, lr), Average(model, 0.99)
    state = folder / "text.safetensors"
    note = load_state(state, model, average, optimiser) or {"step": 0, "seconds": 0.0}
    began = time.monotonic() - note["seconds"]
    log = open_log(folder / "text.jsonl", note["step"])
    for step in range(note["step"], steps):
        rng = np.random.default_rng((seed, 2, step))
        scenes = [training_scene(rng) for _ in range(BATCH)]
        ids, mask = tokenise(tokenizer, [describe(s, rng) for s in scenes])
        answers = model(ids, mask)
        truths = [facts(s) for s in scenes]
        loss, right = torch.zeros(()), torch.ones(BATCH, dtype=torch.bool)
        for name, options in ANSWERS.items():
            target = torch.tensor([options.index(t[name]) for t in truths])
            loss = loss + F.cross_entropy(answers[name], target)
            right &= answers[name].argmax(1) == target
        descend(loss, model, optimiser, average, lr * schedule(step, steps), step)
        if (step + 1) % 25 == 0 or step + 1 == steps:
            row = {"step": step + 1, "loss": round(loss.item(), 4)}
            row |= {
                "all_right": right.float().mean().item(),
                "seconds": round(time.monotonic() - began),
            }
            print(json.dumps(row), file=log, flush=True)
        if (step + 1) % 250 == 0 or step + 1 == steps:
            note = {"step": step + 1, "seconds": time.monotonic() - began}
            save_state(state, model, average, optimiser, note)
