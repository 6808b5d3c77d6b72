"""`python -m training.evaluate`: how often the bundled model draws what held-out prompts say.

Draws 200 one-object and 100 two-object prompts, none of whose combinations of colours, shapes
and relation was trained on, at the default settings of `sana generate`, and lets the checker
judge the pixels. Prints one JSON document; `--sheet` also saves a contact sheet of 24.
"""

import argparse
import json
from pathlib import Path

import numpy as np
from PIL import Image

from sana_cli.layout import folder_parts
from sana_cli.model_files import open_model
from sana_cli.pipeline import Picture, draw
from sana_cli.plan import Plan
from sana_cli.recipe import Recipe
from sana_cli.weights import known_models
from training.shape_checker import check
from training.shapes import Scene, describe, sample_scene

ROOT = Path(__file__).resolve().parents[1]
SEED = 20_000  # of the prompts; training uses other streams


def held_out(count: int, objects: int, seed: int = SEED) -> list[tuple[Scene, str]]:
    rng = np.random.default_rng((seed, objects))
    found = []
    while len(found) < count:
        scene = sample_scene(rng, objects)
        if scene.held_out:
            found.append((scene, describe(scene, rng)))
    return found


def recipe(prompt: str, seed: int, shift: float | None, steps: int, guidance: float) -> Recipe:
    return Recipe(
        prompt=prompt,
        negative="",
        instruction="",
        seed=seed,
        steps=steps,
        guidance=guidance,
        solver="flow-dpm",
        flow_shift=shift,
        width=256,
        height=256,
        native_width=256,
        native_height=256,
        fit="trained",
        model="demo",
        revision=None,
        text_dtype="float32",
        dit_dtype="float32",
        vae_dtype="float32",
    )


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m training.evaluate", description=__doc__)
    parser.add_argument("--model", type=Path, default=ROOT / "sana_cli" / "demo")
    parser.add_argument("--one", type=int, default=200, help="prompts with one object")
    parser.add_argument("--two", type=int, default=100, help="prompts with two objects")
    parser.add_argument("--seed", type=int, default=SEED, help="of the choice of prompts")
    parser.add_argument("--steps", type=int, default=known_models()["demo"].steps)
    parser.add_argument("--guidance", type=float, default=known_models()["demo"].guidance)
    parser.add_argument("--sheet", type=Path, help="save a contact sheet of 24 here")
    options = parser.parse_args()

    files = open_model(folder_parts(options.model))
    prompts = held_out(options.one, 1, options.seed) + held_out(options.two, 2, options.seed)
    recipes = [
        recipe(text, seed, files.flow_shift, options.steps, options.guidance)
        for seed, (_, text) in enumerate(prompts)
    ]
    pictures = [e.pixels for e in draw(recipes, files, Plan("cpu")) if isinstance(e, Picture)]
    verdicts = [check(scene, pixels) for (scene, _), pixels in zip(prompts, pictures, strict=True)]
    report = {
        "prompts": {"one object": options.one, "two objects": options.two},
        "seed": options.seed,
        "steps": options.steps,
        "guidance": options.guidance,
        "one object": summary(verdicts[: options.one]),
        "two objects": summary(verdicts[options.one :]),
    }
    print(json.dumps(report, indent=2))
    if options.sheet:
        halves = pictures[:12], pictures[options.one : options.one + 12]
        rows = [np.concatenate(half[i : i + 6], axis=1) for half in halves for i in (0, 6)]
        Image.fromarray(np.concatenate(rows)).save(options.sheet)
        shown = prompts[:12] + prompts[options.one : options.one + 12]
        print("\n".join(text for _, text in shown))


def summary(verdicts: list[dict[str, bool]]) -> dict[str, float]:
    """Share of prompts with every attribute right, then of each attribute by itself."""
    names = sorted({name for verdict in verdicts for name in verdict})
    shares = {"all": float(np.mean([all(v.values()) for v in verdicts]))}
    for name in names:
        shares[name] = float(np.mean([v[name] for v in verdicts if name in v]))
    return {name: round(share, 3) for name, share in shares.items()}


if __name__ == "__main__":
    main()
