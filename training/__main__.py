"""`python -m training`: from nothing to a model folder. Kill it and run it again: it resumes.

Every number is in `training/settings.py`, for a GPU within 25 minutes and for two CPU cores in a
few hours. `--estimate` runs a few steps of each stage and says how long all of it would take here.
"""

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path

import torch

from sana_cli.kernels.dispatch import chosen_path
from training import autoencoder, diffusion, text
from training.arithmetic import keep_freed_memory
from training.estimate import estimate
from training.export import export
from training.loop import Machine
from training.settings import PRESETS, Settings, with_changes

ROOT = Path(__file__).resolve().parents[1]


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m training", description=__doc__)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--preset", choices=PRESETS, help="h200 on cuda, cpu on a cpu")
    parser.add_argument("--set", nargs="*", default=[], metavar="NAME=VALUE", help="one number")
    parser.add_argument("--run", type=Path, default=ROOT / "runs" / "demo", help="states and logs")
    parser.add_argument("--out", type=Path, help="the result; RUN/model")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--estimate", action="store_true", help="train nothing, print a forecast")
    options = parser.parse_args(words)
    try:
        preset = PRESETS[options.preset or {"cpu": "cpu", "cuda": "h200"}[options.device]]
        settings = with_changes(preset, options.set)
    except ValueError as error:
        parser.error(str(error))
    if options.device == "cuda":
        torch.backends.cudnn.benchmark = True
    print("kernels: {} path, as {}".format(*chosen_path(options.device)), file=sys.stderr)
    machine = Machine(options.device, settings.workers, settings.save_seconds, settings.log_every)
    if options.estimate:
        print(estimate(settings, machine, options.seed))
        return
    run, seed = options.run, options.seed
    run.mkdir(parents=True, exist_ok=True)
    changed = begun_otherwise(run / "settings.json", settings, seed)
    if changed:
        parser.error(f"{run} was begun with other {', '.join(changed)}; use another --run")
    vae = autoencoder.trained(run, settings, machine, seed)
    tokenizer, encoder = text.finished(run, settings, machine, seed)
    dit = diffusion.finished(run, settings, machine, seed, vae, tokenizer, encoder)
    vae = autoencoder.finetuned(run, settings, machine, seed, vae)
    export(run, options.out or run / "model", settings, vae, encoder, dit)


def begun_otherwise(path: Path, settings: Settings, seed: int) -> list[str]:
    """What differs from the settings that the run was begun with; notes them if it is new.

    Only what changes the result: not the workers, nor when it is saved.
    """
    now = json.loads(json.dumps(asdict(settings) | {"seed": seed}))
    if not path.is_file():
        path.write_text(json.dumps(now, indent=2) + "\n")
    begun = json.loads(path.read_text())
    free = {"workers", "save_seconds", "log_every"}
    return [name for name in now if name not in free and begun.get(name) != now[name]]


if __name__ == "__main__":
    keep_freed_memory()
    main()
