"""The 0.6B at full size on a CPU: seconds and peak memory of our engine beside diffusers.

    python benchmarks/cpu.py --save benchmarks/cpu.json

Random weights, the same for both, in float32. The two take turns, each in a process of its own that
loads the transformer, denoises, loads the decoder and decodes; diffusers' pipeline holds both from
the start. Texts are random states of 25 tokens and an empty one: no text encoder runs.
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
from decode import RELEASED, resident, save_weights

DIT = {
    "num_layers": 28,
    "num_attention_heads": 36,
    "num_cross_attention_heads": 16,
    "cross_attention_head_dim": 72,
    "cross_attention_dim": 1152,
}
TOKENS, PADDED = 25, 300  # of the prompt; what the reference pads every text to
WAYS = ("sana", "diffusers")


def inputs(side: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Noise, and the states of an empty text and of a prompt."""
    generator = torch.Generator().manual_seed(7)
    shapes = (1, 32, side // 32, side // 32), (1, 1, 2304), (1, TOKENS, 2304)
    noise, empty, text = (torch.randn(shape, generator=generator) for shape in shapes)
    return noise, empty, text


def save_transformer(folder: Path) -> None:
    from diffusers import SanaTransformer2DModel

    torch.manual_seed(0)
    SanaTransformer2DModel(**DIT).save_pretrained(folder)


def ours(work: Path, side: int, steps: int) -> dict:
    from sana_cli.models.configs import DCAEConfig, DiTConfig
    from sana_cli.models.dc_ae import Decoder
    from sana_cli.models.dit import DiT
    from sana_cli.models.fused_dit import FusedDiT
    from sana_cli.models.streaming.autoencoder import decode, prepare
    from sana_cli.pipeline.solver import SOLVERS, advance
    from sana_cli.system.devices import release_unused_memory, reuse_freed_blocks
    from sana_cli.weights.checkpoint import load_weights, on_meta
    from sana_cli.weights.layout import find_part

    reuse_freed_blocks()
    sample, empty, text = inputs(side)
    solver = SOLVERS["flow-dpm"]
    schedule = solver.schedule(steps, 3.0)
    dit = on_meta(DiT, DiTConfig(**DIT), work)
    load_weights(dit, find_part(work / "transformer").weights, torch.float32)
    engine = FusedDiT(dit)
    engine.pack(mapped=True)
    began = time.perf_counter()
    times = engine.time_modulations(schedule.timesteps)
    texts = [engine.encode_text(t) for t in (empty, text)]
    previous = None
    for step in range(steps):
        without, given = engine.velocity(sample, times[step], texts).chunk(2)
        velocity = torch.lerp(without, given, 4.5)
        sample, previous = advance(solver.update(schedule, step), sample, velocity, previous, None)
    denoise = time.perf_counter() - began
    del engine, dit, texts, times
    release_unused_memory("cpu")
    decoder = on_meta(Decoder, DCAEConfig(**RELEASED), work)
    load_weights(decoder, find_part(work / "vae").weights, None, only="decoder.")
    prepare(decoder, torch.float32)
    began = time.perf_counter()
    decode(decoder, sample / RELEASED["scaling_factor"])
    return {"step": denoise / steps, "decode": time.perf_counter() - began}


def theirs(work: Path, side: int, steps: int) -> dict:
    from diffusers import AutoencoderDC, DPMSolverMultistepScheduler, SanaTransformer2DModel

    sample, empty, text = inputs(side)
    dit = SanaTransformer2DModel.from_pretrained(work / "transformer").eval()
    vae = AutoencoderDC.from_pretrained(work / "vae").eval()
    scheduler = DPMSolverMultistepScheduler(
        flow_shift=3.0, use_flow_sigmas=True, prediction_type="flow_prediction"
    )
    scheduler.set_timesteps(steps)
    states, mask = torch.zeros(2, PADDED, 2304), torch.zeros(2, PADDED)
    for i, one in enumerate((empty, text)):
        states[i, : one.shape[1]], mask[i, : one.shape[1]] = one, 1
    began = time.perf_counter()
    for t in scheduler.timesteps:
        velocity = dit(
            torch.cat([sample] * 2),
            encoder_hidden_states=states,
            encoder_attention_mask=mask,
            timestep=t.expand(2),
            return_dict=False,
        )[0]
        without, given = velocity.chunk(2)
        velocity = without + 4.5 * (given - without)
        sample = scheduler.step(velocity, t, sample, return_dict=False)[0]
    denoise = time.perf_counter() - began
    began = time.perf_counter()
    image = vae.decode(sample / RELEASED["scaling_factor"], return_dict=False)[0]
    ((image[0].permute(1, 2, 0) / 2 + 0.5).clamp(0, 1) * 255).round().byte()
    return {"step": denoise / steps, "decode": time.perf_counter() - began}


@torch.inference_mode()
def measure(way: str, options: argparse.Namespace) -> dict:
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    draw = ours if way == "sana" else theirs
    return draw(options.work, options.sides[0], options.steps) | {"peak": resident("VmHWM")}


def run(way: str, side: int, options: argparse.Namespace) -> dict:
    command = [sys.executable, __file__, "--one", way, "--sides", str(side)]
    command += ["--steps", str(options.steps), "--work", str(options.work)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sides", type=int, nargs="+", default=[512, 1024])
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--work", type=Path, default=Path("runs/cpu"))
    parser.add_argument("--save", type=Path)
    parser.add_argument("--one", choices=WAYS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        sys.stdout.write(json.dumps(measure(options.one, options)) + "\n")
        return
    options.work.mkdir(parents=True, exist_ok=True)
    with torch.inference_mode():
        if not (options.work / "vae" / "config.json").exists():
            save_weights(options.work / "vae")
        if not (options.work / "transformer" / "config.json").exists():
            save_transformer(options.work / "transformer")
    report = {
        "machine": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "steps": options.steps,
        "rows": [],
    }
    for side in options.sides:
        rounds = [{way: run(way, side, options) for way in WAYS} for _ in range(options.rounds)]
        row: dict = {"side": side}
        for what in ("step", "decode", "peak"):
            for way in WAYS:
                row[f"{what} {way}"] = statistics.median(one[way][what] for one in rounds)
            # A ratio of each pair, as machines change their speed.
            pairs = [one["diffusers"][what] / one["sana"][what] for one in rounds]
            row[f"{what} ratio"] = statistics.median(pairs)
        report["rows"].append(row | {"rounds": rounds})
        text = json.dumps(report, indent=1)
        if options.save:
            options.save.write_text(text + "\n")
    sys.stdout.write(text + "\n")


if __name__ == "__main__":
    main()
