"""`python -m training.experiments`: test the paper's claims on sampling on the bundled model.

Solvers: the difference between an image of few steps and that of 500 (paper, figure 8:
Flow-DPM-Solver in 14 to 20 steps against Flow-Euler in 28 to 50). Alignment: the share of prompts
obeyed as a function of steps and of guidance. Precision: the cost of 8 bits and bfloat16 in
alignment and in PSNR to float32. Each cell is saved to the JSON file when it is measured, and not
measured again.
"""

import argparse
import json
import os
from collections.abc import Callable
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import numpy as np
from matplotlib import pyplot

from sana_cli.bench.competitor import psnr
from sana_cli.weights.catalogue import known_models
from sana_cli.weights.layout import folder_parts
from sana_cli.weights.model_files import open_model
from training.evaluate import ROOT, draw_questions, interval, scene_questions, shape_questions

SOLVERS = ("flow-dpm", "flow-euler")
STEPS = (2, 4, 6, 8, 10, 14, 20, 28, 50)
GUIDANCE = (1.0, 1.5, 2.0, 3.0, 4.5, 6.0, 8.0)
PRECISIONS = {
    "float32": {},
    "text bfloat16": {"text_dtype": "bfloat16"},
    "text int8": {"text_dtype": "int8"},
    "transformer bfloat16": {"dit_dtype": "bfloat16"},
}
EQUAL = 99.0  # dB, recorded for equal images


class Report:
    """The JSON file of measured cells by name, written atomically after each."""

    def __init__(self, path: Path, about: dict) -> None:
        self.path = path
        self.cells: dict = json.loads(path.read_text()) if path.is_file() else {"about": about}
        if self.cells["about"] != about:
            raise SystemExit(
                f"{path} was measured with other options: {self.cells['about']}; move it away"
            )

    def measure(self, name: str, cell: Callable[[], dict]) -> dict:
        if name not in self.cells:
            self.cells[name] = cell()
            partial = self.path.with_suffix(".partial")
            partial.write_text(json.dumps(self.cells, indent=2) + "\n")
            os.replace(partial, self.path)
        return self.cells[name]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m training.experiments", description=__doc__)
    parser.add_argument("--model", type=Path, default=ROOT / "sana_cli" / "demo")
    parser.add_argument("--world", choices=("scenes", "shapes"), default="scenes")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "demo" / "claims.json")
    parser.add_argument("--every", type=int, default=5, help="use one in N prompts for alignment")
    parser.add_argument("--images", type=int, default=16, help="compared with the reference")
    parser.add_argument("--reference", type=int, default=500, help="steps of the reference")
    parser.add_argument("--steps", type=int, nargs="+", default=STEPS)
    parser.add_argument("--guidances", type=float, nargs="+", default=GUIDANCE)
    parser.add_argument("--side", type=int, default=known_models()["demo"].side)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()

    ask = scene_questions if options.world == "scenes" else shape_questions
    questions = list(enumerate(ask()))[:: options.every]
    few = questions[:: max(1, len(questions) // options.images)][: options.images]
    files = open_model(folder_parts(options.model))
    about = {name: getattr(options, name) for name in ("world", "every", "reference", "side")}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    report = Report(options.out, about | {"images": len(few), "prompts": len(questions)})

    def drawn(asked: list, **changes) -> list[np.ndarray]:
        how = {"steps": 20, "guidance": 4.5, "solver": "flow-dpm", "side": options.side} | changes
        return draw_questions(asked, files, options.device, **how)

    def aligned(found: list[np.ndarray]) -> dict:
        pairs = zip(questions, found, strict=True)
        right = sum(all(question.judge(pixels).values()) for (_, question), pixels in pairs)
        low, high = interval(right, len(found))
        return {
            "obeyed": round(right / len(found), 4),
            "interval": [round(low, 4), round(high, 4)],
        }

    def likeness(found: list[np.ndarray], truth: list[np.ndarray]) -> dict:
        each = [psnr(*pair) for pair in zip(found, truth, strict=True)]
        each = [EQUAL if value is None else value for value in each]
        return {"median psnr": round(float(np.median(each)), 2), "lowest": round(min(each), 2)}

    cells = [(solver, steps) for solver in SOLVERS for steps in options.steps]
    if any(f"error, {solver}, {steps} steps" not in report.cells for solver, steps in cells):
        truth = drawn(few, steps=options.reference)
        for solver, steps in [*cells, ("flow-euler", options.reference)]:
            report.measure(
                f"error, {solver}, {steps} steps",
                lambda s=solver, n=steps: likeness(drawn(few, steps=n, solver=s), truth),
            )
    for solver, steps in cells:
        report.measure(
            f"alignment, {solver}, {steps} steps",
            lambda s=solver, n=steps: aligned(drawn(questions, steps=n, solver=s)),
        )
    for guidance in options.guidances:
        report.measure(
            f"alignment, guidance {guidance}",
            lambda g=guidance: aligned(drawn(questions, guidance=g)),
        )
    if any(f"precision, {name}" not in report.cells for name in PRECISIONS):
        exact = drawn(questions)
        for name, change in PRECISIONS.items():

            def cell(change: dict = change) -> dict:
                found = drawn(questions, **change)
                return aligned(found) | likeness(found, exact)

            report.measure(f"precision, {name}", cell)
    plot(report.cells, options.steps, options.guidances, options.out.with_suffix(".png"))
    print(table(report.cells))


def plot(cells: dict, counts: list[int], guidances: list[float], path: Path) -> None:
    figure, (error, steps, guidance) = pyplot.subplots(1, 3, figsize=(14, 4), layout="constrained")
    for solver in SOLVERS:
        error.plot(
            counts,
            [cells[f"error, {solver}, {n} steps"]["median psnr"] for n in counts],
            marker="o",
            label=solver,
        )
        _shares(steps, cells, counts, [f"alignment, {solver}, {n} steps" for n in counts], solver)
    names = [f"alignment, guidance {g}" for g in guidances]
    _shares(guidance, cells, guidances, names, "flow-dpm")
    reference = cells["about"]["reference"]
    error.set(xlabel="steps", ylabel=f"dB to {reference} steps", title="similarity to the solution")
    steps.set(xlabel="steps", ylabel="prompts obeyed", title="alignment, guidance 4.5")
    guidance.set(xlabel="guidance", ylabel="prompts obeyed", title="alignment, 20 steps")
    for panel in (error, steps):
        panel.set_xscale("log")
        panel.set_xticks(counts, [str(n) for n in counts])
        panel.minorticks_off()
    for panel in (error, steps, guidance):
        panel.grid(alpha=0.3)
        panel.legend()
    figure.savefig(path, dpi=90)


def _shares(panel, cells: dict, at: list, names: list[str], label: str) -> None:
    """Plot shares with their 95 % intervals."""
    shares = np.array([cells[name]["obeyed"] for name in names])
    ends = np.array([cells[name]["interval"] for name in names]).T
    panel.errorbar(at, shares, np.abs(ends - shares), marker="o", capsize=3, label=label)


def table(cells: dict) -> str:
    """Format a Markdown table with a row for each cell."""
    lines = ["| | obeyed | 95 % interval | median PSNR |", "|---|---|---|---|"]
    for name, cell in cells.items():
        if name == "about":
            continue
        share = f"{cell['obeyed']:.1%}" if "obeyed" in cell else "–"
        ends = " – ".join(f"{end:.1%}" for end in cell.get("interval", ())) or "–"
        likeness = f"{cell['median psnr']:.1f} dB" if "median psnr" in cell else "–"
        lines.append(f"| {name} | {share} | {ends} | {likeness} |".replace("%", " %"))
    return "\n".join(lines)


if __name__ == "__main__":
    main()
