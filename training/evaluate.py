"""`python -m training.evaluate`: measure how often a model's images match held-out prompts.

By default the prompts are the 500 of `training.prompts` about illustrated scenes, checked by
`training.checker`. With `--world shapes` they are 200 one-object and 100 two-object prompts about
shapes, checked by `training.shape_checker`, and with `--world things` the 600 of
`training.thing_prompts` in three languages, checked by `training.thing_checker`. Images are drawn
at the default settings of `sana generate`. A prompt is obeyed if every fact that it states is found
in the pixels. `--sheet` saves a contact sheet of 24 images, evenly spaced over the prompts, and
beside it a text file of these prompts. `--copies` checks painted scenes after the model's
autoencoder instead: an upper bound for any transformer. `--resume FILE` appends the verdict of each
prompt to a file of JSON lines and skips the prompts that it has.
"""

import argparse
import json
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from sana_cli.models.dc_ae import DCAE
from sana_cli.pipeline.draw import ImageDone, draw
from sana_cli.pipeline.plan import Plan
from sana_cli.recipe import Recipe
from sana_cli.weights.catalogue import known_models
from sana_cli.weights.checkpoint import load_weights, on_meta
from sana_cli.weights.layout import folder_parts
from sana_cli.weights.model_files import ModelFiles, open_model
from training import checker, shape_checker, thing_checker
from training.autoencoder import to_image
from training.emoji_captions import withheld
from training.prompts import SEED, SHAPES, prompts, shape_prompts
from training.thing_prompts import SEED as THINGS_SEED
from training.thing_prompts import thing_prompts
from training.world import Sample
from training.world import draw as paint

ROOT = Path(__file__).resolve().parents[1]
BATCH = 12  # prompts that are drawn before their verdicts are kept
THUMBNAIL = 256  # pixels of a side on the contact sheet
Verdict = dict[str, bool]


@dataclass(frozen=True)
class Question:
    category: str
    prompt: str
    judge: Callable[[np.ndarray], Verdict]
    scene: Sample  # an example that the prompt describes
    language: str | None = None
    withheld: bool = False  # whether it has a name that the transformer never saw


def recipe(
    prompt: str,
    seed: int,
    shift: float | None,
    steps: int,
    guidance: float,
    *,
    solver: str = "flow-dpm",
    side: int = 256,
) -> Recipe:
    return Recipe(
        prompt=prompt,
        negative="",
        instruction="",
        seed=seed,
        steps=steps,
        guidance=guidance,
        solver=solver,
        flow_shift=shift,
        width=side,
        height=side,
        native_width=side,
        native_height=side,
        fit="trained",
        model="demo",
        revision=None,
        text_dtype="float32",
        dit_dtype="float32",
        vae_dtype="float32",
    )


def scene_questions(seed: int = SEED) -> list[Question]:
    return [
        Question(p.category, p.text, partial(checker.check, p.facts), p.scene)
        for p in prompts(seed)
    ]


def shape_questions(seed: int = SEED) -> list[Question]:
    return [
        Question(category, text, partial(shape_checker.check, scene), scene)
        for objects, (category, count) in enumerate(SHAPES.items(), 1)
        for scene, text in shape_prompts(count, objects, seed)
    ]


def thing_questions(seed: int = THINGS_SEED) -> list[Question]:
    return [
        Question(
            p.category,
            p.text,
            partial(thing_checker.check, p.facts),
            p.scene,
            p.language,
            any(withheld(thing) == p.language for thing in p.scene.things),
        )
        for p in thing_prompts(seed)
    ]


def draw_images(recipes: list[Recipe], files: ModelFiles, device: str) -> list[np.ndarray]:
    return [e.pixels for e in draw(recipes, files, Plan(device)) if isinstance(e, ImageDone)]


def draw_questions(
    questions: list[tuple[int, Question]],
    files: ModelFiles,
    device: str,
    *,
    steps: int,
    guidance: float,
    solver: str,
    side: int,
    **dtypes: str,
) -> list[np.ndarray]:
    """Draw an image for each of the questions, given with their seeds."""
    recipes = [
        recipe(one.prompt, seed, files.flow_shift, steps, guidance, solver=solver, side=side)
        for seed, one in questions
    ]
    return draw_images([replace(one, **dtypes) for one in recipes], files, device)


def copies(scenes: list[Sample], files: ModelFiles, side: int) -> list[np.ndarray]:
    """Paint scenes, encode and decode them; in float32 on the CPU."""
    vae = on_meta(DCAE, files.vae, files.parts["vae"].config)
    load_weights(vae, files.parts["vae"].weights, torch.float32)
    vae.eval().requires_grad_(False)
    found = []
    for scene in scenes:
        image = to_image(paint(scene, side)[None], "cpu")
        copy = vae.decode(vae.encode(image))[0].permute(1, 2, 0)
        found.append(((copy + 1) * 127.5).round().clamp(0, 255).byte().numpy())
    return found


def main() -> None:
    demo = known_models()["demo"]
    parser = argparse.ArgumentParser(prog="python -m training.evaluate", description=__doc__)
    parser.add_argument("--model", type=Path, default=ROOT / "sana_cli" / "demo")
    parser.add_argument("--world", choices=("scenes", "shapes", "things"), default="scenes")
    parser.add_argument("--seed", type=int, help="of the prompts")
    parser.add_argument("--every", type=int, default=1, help="use one in N prompts")
    parser.add_argument("--side", type=int, default=demo.side, help="of the images, in pixels")
    parser.add_argument("--steps", type=int, default=demo.steps)
    parser.add_argument("--guidance", type=float, default=demo.guidance)
    parser.add_argument("--solver", choices=("flow-dpm", "flow-euler"), default="flow-dpm")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--copies", action="store_true", help="check encoded and decoded paintings")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--resume", type=Path, help="keep verdicts in this file and go on from it")
    parser.add_argument("--sheet", type=Path, help="save a contact sheet of 24 images")
    options = parser.parse_args()

    ask = {"scenes": scene_questions, "shapes": shape_questions, "things": thing_questions}
    default = THINGS_SEED if options.world == "things" else SEED
    options.seed = default if options.seed is None else options.seed
    questions = list(enumerate(ask[options.world](options.seed)))[:: options.every]
    files = open_model(folder_parts(options.model))

    def pictures(chosen: list[tuple[int, Question]]) -> list[np.ndarray]:
        if options.copies:
            return copies([question.scene for _, question in chosen], files, options.side)
        return draw_questions(
            chosen,
            files,
            options.device,
            steps=options.steps,
            guidance=options.guidance,
            solver=options.solver,
            side=options.side,
        )

    settings = ("world", "seed", "every", "side", "steps", "guidance", "solver", "copies")
    asked = {name: getattr(options, name) for name in settings}
    known = _verdicts_of(options.resume, asked | {"model": str(options.model.resolve())})
    while todo := [one for one in questions if one[0] not in known][:BATCH]:
        for (index, question), pixels in zip(todo, pictures(todo), strict=True):
            known[index] = question.judge(pixels)
            if options.resume:
                with options.resume.open("a") as file:
                    file.write(json.dumps([index, known[index]]) + "\n")
    report = asked | grouped([(question, known[index]) for index, question in questions])
    print(json.dumps(report, indent=2) if options.json else table(report))
    if options.sheet:
        chosen = [questions[i] for i in np.linspace(0, len(questions) - 1, 24).astype(int)]
        sheet = Image.new("RGB", (6 * THUMBNAIL, 4 * THUMBNAIL))
        for i, pixels in enumerate(pictures(chosen)):
            small = Image.fromarray(pixels).resize((THUMBNAIL, THUMBNAIL))
            sheet.paste(small, (i % 6 * THUMBNAIL, i // 6 * THUMBNAIL))
        sheet.save(options.sheet)
        lines = [f"{i}. {question.prompt}\n" for i, (_, question) in enumerate(chosen, 1)]
        options.sheet.with_suffix(".txt").write_text("".join(lines), encoding="utf-8")


def _verdicts_of(path: Path | None, settings: dict) -> dict[int, Verdict]:
    """Return the verdicts that a file has; its first line has the settings and must equal these.

    A new file is begun. A last line that was cut off by a kill is removed.
    """
    if path is None:
        return {}
    if not path.exists():
        path.write_text(json.dumps(settings) + "\n")
        return {}
    whole = path.read_text().rpartition("\n")[0]
    first, *lines = whole.split("\n")
    if json.loads(first or "null") != settings:
        sys.exit(f"{path} has verdicts of other settings ({first}); choose another file")
    path.write_text(whole + "\n")
    return dict(json.loads(line) for line in lines)


def grouped(verdicts: list[tuple[Question, Verdict]]) -> dict[str, dict]:
    """Summarise by category and, if the questions have languages, by language and both.

    "withheld names" are the prompts with a name that the transformer never saw in that language.
    """
    report = summary([(question.category, verdict) for question, verdict in verdicts])
    spoken = [(q.language, q, verdict) for q, verdict in verdicts if q.language]
    if spoken:
        for name, groups in {
            "languages": [(language, verdict) for language, _, verdict in spoken],
            "categories by language": [(f"{lang}, {q.category}", v) for lang, q, v in spoken],
            "withheld names": [(language, v) for language, q, v in spoken if q.withheld],
        }.items():
            report[name] = summary(groups)["categories"]
    return report


def summary(verdicts: list[tuple[str, Verdict]]) -> dict[str, dict]:
    """Return prompts, share obeyed, its 95 % interval and the share of each fact, by category."""
    report = {}
    for category in dict.fromkeys(category for category, _ in verdicts):
        found = [verdict for name, verdict in verdicts if name == category]
        right = sum(all(verdict.values()) for verdict in found)
        facts = sorted({fact for verdict in found for fact in verdict})
        report[category] = {
            "prompts": len(found),
            "all": round(right / len(found), 3),
            "interval": [round(end, 3) for end in interval(right, len(found))],
        } | {
            fact: round(float(np.mean([v[fact] for v in found if fact in v])), 3) for fact in facts
        }
    return {"categories": report}


def interval(right: int, count: int, z: float = 1.96) -> tuple[float, float]:
    """Return Wilson's 95 % interval of a share."""
    share = right / count
    middle = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * math.sqrt(share * (1 - share) / count + (z / count / 2) ** 2)
    return max(0.0, middle - half), min(1.0, middle + half)


def table(report: dict) -> str:
    """Format Markdown tables like GenEval's: a row for each category, and their mean.

    For prompts in several languages there are more tables, of languages and of withheld names.
    """
    rows = report["categories"]
    mean = float(np.mean([row["all"] for row in rows.values()]))
    prompts_in_all = sum(row["prompts"] for row in rows.values())
    lines = [*_rows("category", rows), f"| mean | {prompts_in_all} | {mean:.1%} | |"]
    for name in ("languages", "categories by language", "withheld names"):
        if name in report:
            lines += ["", *_rows(name, report[name])]
    return "\n".join(lines).replace("%", " %")


def _rows(title: str, rows: dict[str, dict]) -> list[str]:
    lines = [f"| {title} | prompts | obeyed | 95% interval |", "|---|---|---|---|"]
    for name, row in rows.items():
        low, high = row["interval"]
        lines.append(f"| {name} | {row['prompts']} | {row['all']:.1%} | {low:.1%} – {high:.1%} |")
    return lines


if __name__ == "__main__":
    main()
