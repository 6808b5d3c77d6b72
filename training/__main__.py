"""`python -m training`: train a model from scratch and write its folder; resumes after a kill.

All settings are in `training/settings.py`, planned for 25 minutes on a GPU or a few hours on two
CPU cores. `--estimate` times a few steps of each stage and prints how long a run would take.
"""

import argparse
import sys
from pathlib import Path

import torch

from sana_cli.kernels.dispatch import chosen_path
from training import autoencoder, diffusion, text
from training.arithmetic import keep_freed_memory
from training.estimate import estimate
from training.export import export
from training.loop import Machine
from training.noto import NOTO
from training.npm import PackageUnavailable
from training.settings import PRESETS, changed_settings, with_changes

ROOT = Path(__file__).resolve().parents[1]


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m training", description=__doc__)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--preset", choices=PRESETS, help="default: h200 on cuda, else cpu")
    parser.add_argument("--set", nargs="*", default=[], metavar="NAME=VALUE", help="settings")
    parser.add_argument(
        "--run", type=Path, default=ROOT / "runs" / "demo", help="checkpoints and logs"
    )
    parser.add_argument("--out", type=Path, help="model folder; default: RUN/model")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--estimate", action="store_true", help="only print how long it takes")
    options = parser.parse_args(words)
    try:
        preset = PRESETS[options.preset or {"cpu": "cpu", "cuda": "h200"}[options.device]]
        settings = with_changes(preset, options.set)
    except ValueError as error:
        parser.error(str(error))
    if options.device == "cuda":
        torch.backends.cudnn.benchmark = True
    print("kernels: {} path, as {}".format(*chosen_path(options.device)), file=sys.stderr)
    try:
        if settings.things_share:
            NOTO.archive()
    except PackageUnavailable as error:
        parser.error(str(error))
    machine = Machine(options.device, settings.workers, settings.save_seconds, settings.log_every)
    if options.estimate:
        print(estimate(settings, machine, options.seed))
        return
    run, seed = options.run, options.seed
    run.mkdir(parents=True, exist_ok=True)
    changed = changed_settings(run / "settings.json", settings, seed)
    if changed:
        parser.error(f"{run} was started with other {', '.join(changed)}; use another --run")
    vae = autoencoder.train_autoencoder(run, settings, machine, seed)
    tokenizer, encoder = text.train_text_encoder(run, settings, machine, seed)
    dit = diffusion.train_transformer(run, settings, machine, seed, vae, tokenizer, encoder)
    vae = autoencoder.finetune_decoder(run, settings, machine, seed, vae)
    export(run, options.out or run / "model", settings, vae, encoder, dit)


if __name__ == "__main__":
    keep_freed_memory()
    main()
