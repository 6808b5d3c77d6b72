"""`python -m training.curves`: copy the logs of a finished run and plot its loss curves."""

import argparse
import json
import shutil
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot

ROOT = Path(__file__).resolve().parents[1]
STAGES = {
    "autoencoder": "l1",
    "decoder": "l1",
    "text": "loss",
    "low": "loss",
    "high": "loss",
}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m training.curves", description=__doc__)
    parser.add_argument("--run", type=Path, default=ROOT / "runs" / "demo")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "demo-training")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    figure, panels = pyplot.subplots(1, len(STAGES), figsize=(18, 3.5), layout="constrained")
    for panel, (stage, quantity) in zip(panels, STAGES.items(), strict=True):
        log = options.run / f"{stage}.jsonl"
        shutil.copy(log, options.out)
        rows = [json.loads(line) for line in log.read_text().splitlines()]
        panel.plot([row["step"] for row in rows], [row[quantity] for row in rows])
        panel.set(title=stage, xlabel="step", ylabel=quantity, yscale="log")
        panel.grid(alpha=0.3, which="both")
    figure.savefig(options.out / "curves.png", dpi=90)


if __name__ == "__main__":
    main()
