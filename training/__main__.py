"""`python -m training`: from nothing to `sana_cli/demo`. Kill it and run it again: it resumes."""

import argparse
from pathlib import Path

from training import autoencoder, diffusion, text
from training.export import export

ROOT = Path(__file__).resolve().parents[1]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m training", description=__doc__)
    parser.add_argument("--run", type=Path, default=ROOT / "runs" / "demo", help="states and logs")
    parser.add_argument("--out", type=Path, default=ROOT / "sana_cli" / "demo", help="the result")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--autoencoder-steps", type=int, default=4500)
    parser.add_argument("--text-steps", type=int, default=750)
    parser.add_argument("--diffusion-steps", type=int, default=5200)
    parser.add_argument("--pictures", type=int, default=12_288, help="in the bank of latents")
    options = parser.parse_args()
    options.run.mkdir(parents=True, exist_ok=True)
    autoencoder.train(options.run, options.autoencoder_steps, lr=1e-3, seed=options.seed)
    text.train(options.run, options.text_steps, lr=2e-3, seed=options.seed)
    diffusion.train(
        options.run, options.diffusion_steps, lr=1e-3, seed=options.seed, pictures=options.pictures
    )
    export(options.run, options.out)


if __name__ == "__main__":
    main()
