"""Peak memory and seconds of encoding an image in strips and whole, and how equal the latents are.

    OMP_NUM_THREADS=1 python benchmarks/encode.py --save benchmarks/encode.json

`bundled` is the encoder of `demo` with its weights; `released` has the released sizes and random
weights, in float32. Every row is a process of its own, and is saved as it finishes: what --save
already holds is not measured again. Peaks are what encoding adds to the loaded weights, in resident
memory. The difference is the largest of a latent, in standard deviations of the latents.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
from decode import RELEASED, resident

ROOT = Path(__file__).resolve().parents[1]
SIDES = {"bundled": 4096, "released": 1024}  # what also fits whole
ROWS = [(name, side, way) for name, side in SIDES.items() for way in ("strips", "whole")]
ROWS.append(("released", 4096, "strips"))  # whole, it would take 43 GB


def picture(side: int) -> torch.Tensor:
    """A painted scene with fine noise on it, uint8 (side, side, 3)."""
    sys.path.append(str(ROOT))
    from training.painter import paint
    from training.scenes import training_scene

    rng = np.random.default_rng(1)
    pixels = paint(training_scene(rng), side).astype(np.int16)
    pixels += rng.integers(-20, 21, pixels.shape, np.int16)
    return torch.from_numpy(pixels.clip(0, 255).astype(np.uint8))


def encoder(name: str) -> torch.nn.Module:
    from sana_cli.bench.random_weights import RandomTensors
    from sana_cli.models.configs import DCAEConfig
    from sana_cli.models.dc_ae import DCAE, Encoder
    from sana_cli.weights.checkpoint import load_weights
    from sana_cli.weights.layout import folder_parts
    from sana_cli.weights.model_files import open_model

    files = open_model(folder_parts(ROOT / "sana_cli" / "demo"))
    weights: tuple = files.parts["vae"].weights
    config = files.vae if name == "bundled" else DCAEConfig(**RELEASED)
    with torch.device("meta"):
        network = Encoder(config)
        if name == "released":
            shapes = {key: tensor.shape for key, tensor in DCAE(config).state_dict().items()}
            weights = (RandomTensors(shapes, torch.float32, "cpu"),)
    load_weights(network, weights, torch.float32, only="encoder.")
    return network.to(memory_format=torch.channels_last)


@torch.inference_mode()
def measure(name: str, side: int, way: str, out: Path) -> dict:
    from sana_cli.models.streaming.autoencoder import encode
    from sana_cli.system.devices import return_freed_blocks

    return_freed_blocks()
    network, pixels = encoder(name), picture(side)
    encode(network, pixels[:128, :128])
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    wall, cpu = time.perf_counter(), time.process_time()
    if way == "strips":
        latents = encode(network, pixels)
    else:
        latents = network(pixels.permute(2, 0, 1)[None].float().div_(127.5).sub_(1))
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    above = resident("VmHWM") - before
    np.save(out, latents.numpy())
    return {"seconds": wall, "cpu_seconds": cpu, "peak_above_weights": above}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=Path("runs/encode"))
    parser.add_argument("--save", type=Path)
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        name, side, way = options.one
        out = options.work / f"{name}-{side}-{way}.npy"
        sys.stdout.write(json.dumps(measure(name, int(side), way, out)) + "\n")
        return
    options.work.mkdir(parents=True, exist_ok=True)
    report: dict = {"rows": []}
    if options.save and options.save.exists():
        report = json.loads(options.save.read_text())
    for name, side, way in ROWS:
        key = {"encoder": name, "side": side, "way": way}
        if any(key.items() <= row.items() for row in report["rows"]):
            continue
        words = ["--work", str(options.work), "--one", name, str(side), way]
        command = [sys.executable, __file__, *words]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        row = key | json.loads(done.stdout.splitlines()[-1])
        row |= {"threads": torch.get_num_threads(), "cores": os.cpu_count()}
        row["on"] = platform.processor() or platform.machine()
        if way == "whole":
            files = (options.work / f"{name}-{side}-{one}.npy" for one in ("strips", "whole"))
            strips, whole = map(np.load, files)
            row["difference"] = float(np.abs(strips - whole).max() / whole.std())
        report["rows"].append(row)
        if options.save:
            options.save.write_text(json.dumps(report, indent=1) + "\n")
        sys.stdout.write(json.dumps(row) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
