"""Stage 2: a tokenizer for the captions and a small Gemma-2 that reads them.

The released models are conditioned on a frozen language model. This one is pretrained to predict,
from the state of a caption's last token, every fact that the caption states, and then frozen.
"""

import json
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import (
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from torch import Tensor, nn
from transformers import Gemma2Config, Gemma2Model

from sana_cli.instruction import normalise_prompt
from training.captions import NONSENSE
from training.loop import Losses, Machine, Stage, train
from training.prompts import prompts
from training.settings import Settings
from training.thing_prompts import thing_prompts
from training.world import QUESTIONS, World

os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the workers are forked from this process

SPECIAL = ["<pad>", "<eos>", "<bos>", "<unk>"]


def train_tokenizer(path: Path, world: World, seed: int, captions: int, size: int) -> None:
    """Train a byte-fallback BPE in Gemma's format: spaces become "▁", any text can be encoded."""
    rng = np.random.default_rng(seed)
    # Of random Chinese characters, most would be tokens.
    nonsense = 0.0 if world.things else NONSENSE
    texts = [world.describe(world.sample(rng), rng, nonsense).text for _ in range(captions)]
    learner = Tokenizer(models.BPE())
    learner.normalizer = normalizers.Replace(" ", "▁")
    # No token crosses a word boundary; Chinese characters and emoji are tokens of their own.
    learner.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split("▁", "merged_with_next"),
            pre_tokenizers.Split(Regex("[^ -~▁]"), "isolated"),
        ]
    )
    printable = [chr(c) for c in range(33, 127)]
    learner.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=size, min_frequency=20, initial_alphabet=printable, show_progress=False
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
    tokenizer.save(str(path / "tokenizer.json.partial"))
    os.replace(path / "tokenizer.json.partial", path / "tokenizer.json")


def encoder_config(vocabulary: int, width: int, layers: int) -> Gemma2Config:
    return Gemma2Config(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=width // 4,
        query_pre_attn_scalar=width // 4,
        max_position_embeddings=8192,
    )


class Reader(nn.Module):
    """The encoder with a linear classifier for every fact that a caption can state."""

    def __init__(self, vocabulary: int, width: int, layers: int) -> None:
        super().__init__()
        self.encoder = Gemma2Model(encoder_config(vocabulary, width, layers))
        self.questions = nn.ModuleDict({k: nn.Linear(width, len(v)) for k, v in QUESTIONS.items()})

    def forward(self, ids: Tensor, mask: Tensor) -> dict[str, Tensor]:
        states = self.encoder(ids, attention_mask=mask, use_cache=False).last_hidden_state
        last = states[torch.arange(len(ids), device=ids.device), mask.sum(1) - 1]
        return {name: question(last) for name, question in self.questions.items()}


def tokenise(tokenizer: Tokenizer, captions: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """Return right-padded ids and their mask, both int64 (B, longest)."""
    rows = [e.ids for e in tokenizer.encode_batch(captions)]
    lengths = np.array([len(row) for row in rows])
    mask = (np.arange(lengths.max()) < lengths[:, None]).astype(np.int64)
    ids = np.zeros_like(mask)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = row
    return ids, mask


@dataclass(frozen=True)
class Captions:
    """Ids and mask of a step's captions, and the index of every answer, (B, questions)."""

    world: World
    seed: int
    batch: int
    tokenizer: Tokenizer

    def __call__(self, step: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        rng = np.random.default_rng((self.seed, 3, step))
        captions = [self.world.describe(self.world.sample(rng), rng) for _ in range(self.batch)]
        ids, mask = tokenise(self.tokenizer, [one.text for one in captions])
        answers = [[QUESTIONS[q].index(one.facts.get(q)) for q in QUESTIONS] for one in captions]
        return ids, mask, np.array(answers)


def stage(settings: Settings, machine: Machine, seed: int, tokenizer: Tokenizer) -> Stage:
    torch.manual_seed(seed)
    model = Reader(tokenizer.get_vocab_size(), settings.text_width, settings.text_layers)

    def losses(batch: tuple[np.ndarray, np.ndarray, np.ndarray]) -> Losses:
        ids, mask, truth = (torch.from_numpy(part).to(machine.device) for part in batch)
        answers = model(ids, mask)
        loss = ids.new_zeros((), dtype=torch.float32)
        right = torch.ones_like(ids[:, 0], dtype=torch.bool)
        for i, answer in enumerate(answers.values()):
            loss = loss + F.cross_entropy(answer.float(), truth[:, i])
            right &= answer.argmax(1) == truth[:, i]
        return {"loss": loss, "all right": right.float().mean()}

    captions = Captions(settings.world, seed, settings.text_batch, tokenizer)
    return Stage("text", model, settings.text_steps, settings.text_rate, 0.99, captions, losses)


def train_text_encoder(
    folder: Path, settings: Settings, machine: Machine, seed: int
) -> tuple[Tokenizer, Gemma2Model]:
    """Return tokenizer and frozen encoder, after running the steps that are not done yet."""
    path = folder / "tokenizer" / "tokenizer.json"
    if not path.is_file():
        s = settings
        train_tokenizer(path.parent, s.world, seed, s.tokenizer_captions, s.tokenizer_size)
    tokenizer = Tokenizer.from_file(str(path))
    reader = train(stage(settings, machine, seed, tokenizer), folder, machine, seed)
    accuracy = reading_accuracy(settings.world, tokenizer, reader, machine)
    (folder / "reading.json").write_text(json.dumps(accuracy) + "\n")
    return tokenizer, reader.encoder


@torch.no_grad()
def reading_accuracy(
    world: World, tokenizer: Tokenizer, reader: nn.Module, machine: Machine
) -> dict[str, float]:
    """Return, by category, the share of evaluation prompts of which every fact is read correctly.

    The wording of these prompts differs from that of the training captions.
    """
    asked = [(p.category, p.text, p.facts) for p in prompts()]
    if world.things:
        asked += [(f"{p.language}, {p.category}", p.text, p.facts) for p in thing_prompts()]
    texts = [normalise_prompt(text) for _, text, _ in asked]
    batch = (torch.from_numpy(part) for part in tokenise(tokenizer, texts))
    answers = reader(*(part.to(machine.device) for part in batch))
    read = {q: answers[q].argmax(1).tolist() for q in QUESTIONS}
    right: dict[str, list[bool]] = {}
    for i, (category, _, stated) in enumerate(asked):
        facts = [QUESTIONS[q][read[q][i]] == fact for q, fact in stated.items()]
        right.setdefault(category, []).append(all(facts))
    return {category: round(sum(found) / len(found), 3) for category, found in right.items()}
