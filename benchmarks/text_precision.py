"""What 8 bits and 16 bits cost in accuracy, and what they save, in the text encoder.

    python benchmarks/text_precision.py --save benchmarks/text-precision.json
    python benchmarks/text_precision.py --full --save benchmarks/text-precision.json

On the bundled model: states and pictures against float32. With --full also on a random model of
Gemma-2-2B's exact size (8 GB of disk, 9 GB of memory, minutes), with large norm weights in a few
channels, so that there are outliers to take care of, as in every large language model.
Every run of it is a process of its own; `second` finds what `first` has kept.
"""

import argparse
import dataclasses
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file

ROOT = Path(__file__).resolve().parents[1]
DEMO = ROOT / "sana_cli" / "demo"
sys.path.append(str(ROOT))

PREFIX, PROMPT = 208, 24  # tokens: the instruction's, and of a prompt of 17 words
OUTLIERS = 8  # channels with large norm weights, in each layer


def relative(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return ((ours.float() - theirs.float()).norm() / theirs.float().norm()).item()


def on_demo(count: int) -> dict:
    from sana_cli.bench.competitor import psnr
    from sana_cli.pipeline.draw import ImageDone, draw
    from sana_cli.pipeline.plan import Plan
    from sana_cli.pipeline.text_encoder import TextEncoder
    from sana_cli.weights.layout import folder_parts
    from sana_cli.weights.model_files import open_model
    from training.evaluate import recipe
    from training.prompts import shape_prompts
    from training.shape_checker import check

    parts = folder_parts(DEMO)
    files = open_model(parts)
    scenes, prompts = zip(*shape_prompts(count, 1), strict=True)
    states, pictures = {}, {}
    for precision in ("float32", "bfloat16", "int8"):
        encoder = TextEncoder(parts, precision, "cpu")
        with torch.inference_mode():
            states[precision] = [encoder.encode(prompt) for prompt in prompts]
        recipes = [recipe(p, s, files.flow_shift, 20, 4.5) for s, p in enumerate(prompts)]
        recipes = [dataclasses.replace(one, text_dtype=precision) for one in recipes]
        with torch.inference_mode():
            events = list(draw(recipes, files, Plan("cpu")))
        pictures[precision] = [e.pixels for e in events if isinstance(e, ImageDone)]
    report: dict = {"prompts": count}
    for precision, drawn in pictures.items():
        right = sum(all(check(s, p).values()) for s, p in zip(scenes, drawn, strict=True))
        report[precision] = {"obeyed": right}
        if precision != "float32":
            pairs = list(zip(states[precision], states["float32"], strict=True))
            errors = [relative(*pair) for pair in pairs]
            both = zip(drawn, pictures["float32"], strict=True)
            likeness = [math.inf if (db := psnr(*pair)) is None else db for pair in both]
            report[precision] |= {
                "relative_error": float(np.mean(errors)),
                "largest_error": max(errors),
                "median_psnr_db": float(np.median(likeness)),
                "lowest_psnr_db": min(likeness),
            }
    return report


def write_full_size(folder: Path) -> None:
    """Random Gemma-2-2B in bfloat16, a shard a layer, so that no more is ever in memory."""
    from sana_cli.models.configs import GemmaConfig
    from sana_cli.models.gemma import Layer

    torch.manual_seed(0)
    config = GemmaConfig()
    part = folder / "text_encoder"
    part.mkdir(parents=True)
    (part / "config.json").write_text(json.dumps(dataclasses.asdict(config)))
    places = {}

    def shard(name: str, tensors: dict[str, torch.Tensor]) -> None:
        save_file({n: t.to(torch.bfloat16) for n, t in tensors.items()}, part / name)
        places.update(dict.fromkeys(tensors, name))

    with torch.device("meta"):
        shapes = {name: p.shape for name, p in Layer(config).named_parameters()}
    for i in range(config.num_hidden_layers):
        layer = {}
        for name, shape in shapes.items():
            if "norm" in name:
                layer[name] = 0.2 * torch.randn(shape)
                if name.startswith(("input_", "pre_")):
                    layer[name][torch.randperm(shape[0])[:OUTLIERS]] = 6.0
            else:
                layer[name] = 0.02 * torch.randn(shape)
        shard(f"{i}.safetensors", {f"layers.{i}.{n}": t for n, t in layer.items()})
    shard("norm.safetensors", {"norm.weight": 0.2 * torch.randn(config.hidden_size)})
    table = 0.02 * torch.randn(config.vocab_size, config.hidden_size)
    shard("table.safetensors", {"embed_tokens.weight": table})
    index = {"weight_map": places}
    (part / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "tokenizer").symlink_to(DEMO / "tokenizer")


def one_start(folder: Path, precision: str, cache: Path) -> None:
    """Load, run the prefix and a prompt behind it, and the whole at once; print JSON."""
    from sana_cli.pipeline.text_cache import TextCache
    from sana_cli.pipeline.text_encoder import TextEncoder
    from sana_cli.weights.layout import find_part

    parts = {name: find_part(folder / name) for name in ("text_encoder", "tokenizer")}
    began = time.perf_counter()
    texts = TextCache(cache, parts, precision, "cpu")
    identified = time.perf_counter()
    encoder = TextEncoder(parts, precision, "cpu", texts)
    loaded = time.perf_counter()
    ids = torch.randint(
        4, 256_000, (1, PREFIX + PROMPT), generator=torch.Generator().manual_seed(1)
    )
    largest = [0.0]
    for layer in encoder.model.layers:
        layer.mlp.down_proj.register_forward_pre_hook(
            lambda _, inputs: largest.append(inputs[0].abs().max().item())
        )
    with torch.inference_mode():
        _, past = encoder.model(ids[:, :PREFIX])
        prefixed = time.perf_counter()
        behind, _ = encoder.model(ids[:, PREFIX:], past)
        run = time.perf_counter()
        whole, _ = encoder.model(ids)
        end = time.perf_counter()
    save_file({"states": whole.contiguous()}, cache / f"{precision}.safetensors")
    report = {
        "identify_seconds": identified - began,
        "load_seconds": loaded - identified,
        "prefix_seconds": prefixed - loaded,
        "prompt_seconds": run - prefixed,
        "whole_seconds": end - run,
        "peak_bytes": memory("VmHWM"),  # with the pages of mapped files that were read
        "anonymous_bytes": memory("RssAnon"),  # without, at the end
        "prefix_bytes": sum(k.nbytes + v.nbytes for k, v in past),
        "largest_input_of_down_proj": max(largest),
        "behind_a_prefix_or_whole": relative(behind, whole[:, PREFIX:]),
    }
    sys.stdout.write(json.dumps(report))


def memory(field: str) -> int:
    """Bytes of this process alone, which getrusage mixes with those of its parent (Linux)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return 1024 * int(line.split()[1])
    raise SystemExit(f"no {field} in /proc/self/status")


def on_full_size() -> dict:
    report: dict = {"tokens": [PREFIX, PROMPT]}
    with tempfile.TemporaryDirectory() as name:
        folder, cache = Path(name) / "model", Path(name) / "cache"
        cache.mkdir()
        write_full_size(folder)
        runs = [("float32", "first"), ("bfloat16", "first"), ("int8", "first"), ("int8", "second")]
        for precision, start in runs:
            command = [sys.executable, __file__, "--one", precision, str(folder), str(cache)]
            done = subprocess.run(command, capture_output=True, text=True, env=dict(os.environ))
            if done.returncode:
                sys.exit(done.stderr)
            row = json.loads(done.stdout)
            states = load_file(cache / f"{precision}.safetensors")["states"]
            if precision == "float32":
                truth = states
            else:
                row["relative_error"] = relative(states, truth)
                row["largest_error_of_a_token"] = max(
                    relative(a, b) for a, b in zip(states[0], truth[0], strict=True)
                )
            report.setdefault(precision, {})[start] = row
        report["weight_bytes"] = sum(p.stat().st_size for p in (folder / "text_encoder").iterdir())
        report["int8_bytes"] = sum(p.stat().st_size for p in (cache / "int8").iterdir())
    return report


def main() -> None:
    if sys.argv[1:2] == ["--one"]:
        return one_start(Path(sys.argv[3]), sys.argv[2], Path(sys.argv[4]))
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prompts", type=int, default=40, help="drawn with the bundled model")
    parser.add_argument("--full", action="store_true", help="also at the size of Gemma-2-2B")
    parser.add_argument("--save", type=Path)
    options = parser.parse_args()
    threads = torch.get_num_threads()
    report = {"torch": torch.__version__, "threads": threads, "demo": on_demo(options.prompts)}
    if options.full:
        report["gemma_2_2b"] = on_full_size()
    text = json.dumps(report, indent=1)
    if options.save:
        options.save.write_text(text + "\n")
    sys.stdout.write(text + "\n")
    return None


if __name__ == "__main__":
    main()
