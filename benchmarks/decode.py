"""Peak memory, seconds and likeness of the decode: strips beside diffusers, untiled and tiled.

    python benchmarks/decode.py --sides 1024 2048 4096 --save benchmarks/decode.json

The decoder has the released size and random weights (scaled so that pictures use the whole range).
Every row is a process of its own, and is saved as it finishes: what --save already holds is not
measured again. On the CPU a process may take nine tenths of what memory is free, and its failure
is the row. Likeness is the PSNR to the picture that diffusers decodes untiled in float32, or,
where that does not fit, to that of float32 strips; the row says which.

Peaks are what the decode adds to the loaded weights: resident memory on the CPU (Linux), allocated
memory on CUDA.
"""

import argparse
import json
import os
import platform
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch

from sana_cli.bench.competitor import psnr
from sana_cli.system.devices import release_unused_memory

RELEASED = {
    "encoder_block_types": ("ResBlock",) * 3 + ("EfficientViTBlock",) * 3,
    "decoder_block_types": ("ResBlock",) * 3 + ("EfficientViTBlock",) * 3,
    "encoder_layers_per_block": (2, 2, 2, 3, 3, 3),
    "upsample_block_type": "interpolate",
    "downsample_block_type": "Conv",
    "scaling_factor": 0.41407,
}
WAYS = ("strips", "untiled", "tiles 1024/896", "tiles 512/448")


def latent(side: int) -> torch.Tensor:
    shape = (1, 32, side // 32, side // 32)
    return torch.randn(shape, generator=torch.Generator().manual_seed(7)) / 0.41407


def save_weights(folder: Path) -> None:
    from diffusers import AutoencoderDC

    torch.manual_seed(0)
    vae = AutoencoderDC(**RELEASED).eval().requires_grad_(False)
    conv = vae.decoder.conv_out
    conv.weight *= 0.5 / vae.decode(latent(128)).sample.std()
    conv.bias.zero_()
    vae.save_pretrained(folder)


def ours(weights: Path, device: str, dtype: torch.dtype, strip_bytes: int):
    from sana_cli.models.configs import DCAEConfig
    from sana_cli.models.dc_ae import Decoder
    from sana_cli.models.streaming.autoencoder import decode, prepare
    from sana_cli.system.devices import reuse_freed_blocks
    from sana_cli.weights.checkpoint import load_weights, on_meta
    from sana_cli.weights.layout import find_part

    reuse_freed_blocks()
    decoder = on_meta(Decoder, DCAEConfig(**RELEASED), weights)
    load_weights(decoder, find_part(weights).weights, None, only="decoder.")
    prepare(decoder, dtype)
    decoder.to(device)
    return lambda z: decode(decoder, z, strip_bytes=strip_bytes).pixels.numpy()


def theirs(weights: Path, device: str, dtype: torch.dtype, tile: str):
    from diffusers import AutoencoderDC
    from diffusers.image_processor import VaeImageProcessor

    vae = AutoencoderDC.from_pretrained(weights, torch_dtype=dtype, local_files_only=True).eval()
    del vae.encoder
    vae.to(device)
    if tile:
        size, stride = map(int, tile.split("/"))
        vae.enable_tiling(size, size, stride, stride)
    processor = VaeImageProcessor(vae_scale_factor=32)

    def decode(z: torch.Tensor) -> np.ndarray:
        image = processor.postprocess(vae.decode(z.to(dtype)).sample, output_type="np")
        return (image[0] * 255).round().astype("uint8")

    return decode


def resident(name: str) -> int:
    """VmRSS, resident now, or VmHWM, the most since the last reset, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


@torch.inference_mode()
def measure(way: str, side: int, options: argparse.Namespace) -> dict:
    dtype, cuda = getattr(torch, options.dtype), options.device.startswith("cuda")
    if way == "strips":
        decode = ours(options.work / "vae", options.device, dtype, options.strip_mb << 20)
    else:
        tile = way.removeprefix("tiles ") if way.startswith("tiles") else ""
        decode = theirs(options.work / "vae", options.device, dtype, tile)
    decode(latent(128).to(options.device))
    z = latent(side).to(options.device)
    seconds = []
    release_unused_memory(options.device)
    if cuda:
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
    else:
        before = resident("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    for _ in range(options.repeats):
        began = time.perf_counter()
        picture = decode(z)  # on the CPU, so the device has finished
        seconds.append(time.perf_counter() - began)
    peak = torch.cuda.max_memory_allocated() if cuda else resident("VmHWM")
    np.save(options.work / picture_name(way, side, options), picture)
    return {"seconds": min(seconds), "peak_above_weights": peak - before, "with_weights": peak}


def picture_name(way: str, side: int, options: argparse.Namespace) -> str:
    return f"{way}-{side}-{options.dtype}-{options.device}.npy".replace("/", "-").replace(" ", "-")


def run_row(way: str, side: int, options: argparse.Namespace) -> dict:
    """Measure in a process of its own; a failure, or no memory, is a result too."""
    command = [sys.executable, __file__, "--one", way, "--sides", str(side)]
    for name in ("device", "dtype", "repeats", "strip_mb", "work"):
        command += [f"--{name.replace('_', '-')}", str(getattr(options, name))]

    def limit() -> None:
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))
        resource.setrlimit(resource.RLIMIT_DATA, (free * 1024 * 9 // 10,) * 2)

    limited = None if options.device.startswith("cuda") else limit
    done = subprocess.run(command, capture_output=True, text=True, preexec_fn=limited)
    if done.returncode < 0:
        return {"failed": f"killed by {signal.Signals(-done.returncode).name}"}
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if "memory" in line.lower()]
        return {"failed": (lines or done.stderr.splitlines()[-1:] or ["killed"])[-1][:200]}
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sides", type=int, nargs="+", default=[1024, 2048, 4096])
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--strip-mb", type=int, default=16)
    parser.add_argument("--work", type=Path, default=Path("runs/decode"))
    parser.add_argument("--save", type=Path)
    parser.add_argument("--one", choices=WAYS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        sys.stdout.write(json.dumps(measure(options.one, options.sides[0], options)) + "\n")
        return
    options.work.mkdir(parents=True, exist_ok=True)
    if not (options.work / "vae" / "config.json").exists():
        with torch.inference_mode():
            save_weights(options.work / "vae")
    report: dict = {"rows": []}
    if options.save and options.save.exists():
        report = json.loads(options.save.read_text())
    for side in options.sides:
        for way in options.ways:
            key = {"way": way, "side": side, "device": options.device, "dtype": options.dtype}
            if way == "strips":
                key["strip_mb"] = options.strip_mb
            if any(key.items() <= row.items() for row in report["rows"]):
                continue
            machine = platform.processor() or platform.machine()
            if options.device.startswith("cuda"):
                machine = torch.cuda.get_device_name()
            row = key | run_row(way, side, options)
            row |= {"threads": torch.get_num_threads(), "cores": os.cpu_count(), "on": machine}
            report["rows"].append(row)
            compare(report["rows"], options)
            if options.save:
                partial = options.save.with_suffix(".partial")
                partial.write_text(json.dumps(report, indent=1) + "\n")
                partial.replace(options.save)
            sys.stdout.write(json.dumps(row) + "\n")
            sys.stdout.flush()


def compare(rows: list[dict], options: argparse.Namespace) -> None:
    """Fill in the likeness of this run's pictures, once there is one to compare with."""
    for row in rows:
        mine = options.work / picture_name(row["way"], row["side"], argparse.Namespace(**row))
        if "failed" in row or "psnr" in row or not mine.exists():
            continue
        for way in ("untiled", "strips"):
            truth = next(options.work.glob(f"{way}-{row['side']}-float32-*.npy"), None)
            settled = [r for r in rows if r["way"] == "untiled" and r["side"] == row["side"]]
            if truth is not None and (way == "untiled" or any("failed" in r for r in settled)):
                row["psnr"] = psnr(np.load(mine), np.load(truth))
                row["compared_with"] = f"{way}, float32"
                break


if __name__ == "__main__":
    main()
