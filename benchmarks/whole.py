"""A whole picture on a CPU with the 0.6B and Gemma-2-2B at full size: `sana` beside diffusers.

    python benchmarks/whole.py --save benchmarks/whole.json

Random weights, kept in 16 bits as the released ones are (7 GB in the work folder) and run in
float32. Each is one process from its start to a saved picture; peaks are resident memory.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path

import torch
from cpu import DIT
from decode import RELEASED

ROOT = Path(__file__).resolve().parents[1]
TOKENIZER = ROOT / "sana_cli" / "demo" / "tokenizer"
PROMPT = "a red fox in snow, in the light of a low winter sun"
DIFFUSERS = """
import sys, torch
from diffusers import SanaPipeline
folder, side, steps, out = sys.argv[1:]
pipe = SanaPipeline.from_pretrained(folder, torch_dtype=torch.float32)
pipe.set_progress_bar_config(disable=True)
generator = torch.Generator("cpu").manual_seed(1)
call = {"height": int(side), "width": int(side), "num_inference_steps": int(steps)}
pipe(sys.stdin.read(), generator=generator, **call).images[0].save(out)
"""


def save_pipeline(folder: Path) -> None:
    from diffusers import (
        AutoencoderDC,
        DPMSolverMultistepScheduler,
        SanaPipeline,
        SanaTransformer2DModel,
    )
    from transformers import AutoTokenizer, Gemma2Config, Gemma2Model

    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    scheduler = DPMSolverMultistepScheduler(
        flow_shift=3.0, use_flow_sigmas=True, prediction_type="flow_prediction"
    )
    pipe = SanaPipeline(
        AutoTokenizer.from_pretrained(TOKENIZER),
        Gemma2Model(Gemma2Config()),
        AutoencoderDC(**RELEASED),
        SanaTransformer2DModel(**DIT, sample_size=16),
        scheduler,
    )
    pipe.save_pretrained(folder)


def run(way: str, folder: Path, side: int, steps: int) -> dict:
    out = folder.parent / f"{way}.png"
    out.unlink(missing_ok=True)
    if way == "sana":
        program = [str(Path(sys.executable).with_name("sana")), "generate", "-m", str(folder)]
        size = ["--res", str(side), "--steps", str(steps), "--seed", "1", "-o", str(out)]
        command = [*program, *size, "--device", "cpu", "--no-cache", "-q", PROMPT]
    else:
        command = [sys.executable, "-c", DIFFUSERS, str(folder), str(side), str(steps), str(out)]
    began = time.perf_counter()
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL)
    process.stdin.write(PROMPT.encode())
    process.stdin.close()
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{way} ended with {process.returncode}")
    return {"seconds": time.perf_counter() - began, "peak": used.ru_maxrss * 1024}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sides", type=int, nargs="+", default=[512])
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--work", type=Path, default=Path("runs/whole"))
    parser.add_argument("--save", type=Path)
    options = parser.parse_args()
    folder = options.work / "random"
    if not (folder / "model_index.json").exists():
        folder.mkdir(parents=True, exist_ok=True)
        save = [sys.executable, __file__, "--work", str(options.work), "--sides"]
        if not options.sides[0]:
            return save_pipeline(folder)
        subprocess.run([*save, "0"], check=True)  # what it held would count for the others
    rows = []
    for side in options.sides:
        row = {way: run(way, folder, side, options.steps) for way in ("diffusers", "sana")}
        share = row["sana"]["peak"] / row["diffusers"]["peak"]
        faster = row["diffusers"]["seconds"] / row["sana"]["seconds"]
        rows.append({"side": side, "memory": share, "times_as_fast": faster} | row)
    report = {
        "machine": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "steps": options.steps,
        "rows": rows,
    }
    text = json.dumps(report, indent=1)
    if options.save:
        options.save.write_text(text + "\n")
    sys.stdout.write(text + "\n")


if __name__ == "__main__":
    main()
