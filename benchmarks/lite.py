"""Decoding with DC-AE-Lite (`--vae lite`) beside the full decoder: seconds and peak memory.

    OMP_NUM_THREADS=1 python benchmarks/lite.py --save benchmarks/lite.json

Both have the released sizes and random weights in float32, and decode the same latents in strips.
They take turns, each decode in a process of its own, and every turn is saved as it finishes. Wall
seconds depend on what else the machine does; CPU seconds of the process hardly do. Peaks are
resident memory with the weights.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from decode import RELEASED, latent, resident

LITE = RELEASED | {
    "decoder_block_types": ("ResBlock",) * 6,
    "decoder_layers_per_block": (0, 3, 5, 4, 4, 4),
    "decoder_qkv_multiscales": ((),) * 6,
    "upsample_block_type": "pixel_shuffle",
    "decoder_conv_act_fn": "silu",
}
DECODERS = {"full": RELEASED, "lite": LITE}


@torch.inference_mode()
def measure(name: str, side: int) -> dict:
    from sana_cli.bench.random_weights import RandomTensors
    from sana_cli.models.configs import DCAEConfig
    from sana_cli.models.dc_ae import DCAE, Decoder
    from sana_cli.models.streaming.autoencoder import decode, prepare
    from sana_cli.system.devices import reuse_freed_blocks
    from sana_cli.weights.checkpoint import load_weights

    reuse_freed_blocks()
    config = DCAEConfig(**DECODERS[name])
    with torch.device("meta"):
        shapes = {key: tensor.shape for key, tensor in DCAE(config).state_dict().items()}
        decoder = Decoder(config)
    load_weights(decoder, (RandomTensors(shapes, torch.float32, "cpu"),), None, only="decoder.")
    parameters = sum(parameter.numel() for parameter in decoder.parameters())
    prepare(decoder, torch.float32)
    decode(decoder, latent(128))
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    wall, cpu = time.perf_counter(), time.process_time()
    decode(decoder, latent(side))
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    peak = resident("VmHWM")
    return {
        "decoder": name,
        "side": side,
        "seconds": wall,
        "cpu_seconds": cpu,
        "parameters": parameters,
        "peak": peak,
        "peak_above_weights": peak - before,
    }


def summary(turns: list[dict]) -> list[dict]:
    rows = []
    for side in dict.fromkeys(turn["side"] for turn in turns):
        row: dict = {"side": side}
        for name in DECODERS:
            found = [turn for turn in turns if (turn["decoder"], turn["side"]) == (name, side)]
            if not found:
                continue
            for key in ("seconds", "cpu_seconds", "parameters", "peak", "peak_above_weights"):
                row[f"{key} {name}"] = statistics.median(turn[key] for turn in found)
            row["turns"] = len(found)
        rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sides", type=int, nargs="+", default=[1024])
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--save", type=Path)
    parser.add_argument("--one", choices=DECODERS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        sys.stdout.write(json.dumps(measure(options.one, options.sides[0])) + "\n")
        return
    turns: list[dict] = []
    for side in options.sides:
        for _ in range(options.turns):
            for name in DECODERS:
                command = [sys.executable, __file__, "--one", name, "--sides", str(side)]
                done = subprocess.run(command, capture_output=True, text=True, check=True)
                turns.append(json.loads(done.stdout.splitlines()[-1]))
                report = {
                    "machine": platform.processor() or platform.machine(),
                    "cores": os.cpu_count(),
                    "threads": torch.get_num_threads(),
                    "rows": summary(turns),
                    "raw": turns,
                }
                if options.save:
                    options.save.write_text(json.dumps(report, indent=1) + "\n")
                sys.stdout.write(json.dumps(turns[-1]) + "\n")
                sys.stdout.flush()


if __name__ == "__main__":
    main()
