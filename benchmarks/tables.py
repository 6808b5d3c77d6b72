"""Rewrite every generated table of the repository's README.md files from the data behind it.

    python -m benchmarks.tables

A table stands between `<!-- name -->` and `<!-- /name -->` in any README.md; `TABLES` has the
names. Prose around it is left alone, and so are marked blocks of other names.
"""

import glob
import json
import re
import statistics
import sys
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

from sana_cli.weights.catalogue import known_models

ROOT = Path(__file__).resolve().parents[1]
DIFFUSERS_TESTS = "https://github.com/huggingface/diffusers/blob/58eb52c0803e/tests"
BLOCK = re.compile(r"(<!-- (?P<name>[\w-]+) -->\n).*?(<!-- /(?P=name) -->)", re.DOTALL)


def measured(name: str) -> Any:
    return json.loads((ROOT / "benchmarks" / name).read_text(encoding="utf-8"))


def percent(share: float, digits: int = 0) -> str:
    return f"{share:.{digits}%}".replace("%", " %")


def models() -> list[str]:
    rows = ["| name | draws | disk | memory | weights | licence |", "|---|---|---|---|---|---|"]
    for m in known_models().values():
        disk = memory = "–"
        if m.sources and m.memory and m.least_memory:
            whole, own = sum(source.bytes for source in m.sources), m.sources[0].bytes
            disk = f"{whole / 1e9:.1f} GB ({own / 1e9:.1f})"
            memory = f"{m.memory / 1e9:.1f} GB ({m.least_memory / 1e9:.1f})"
        sides = ", ".join(f"{side}²" for side in m.sides)
        rows.append(f"| `{m.name}` | {sides} | {disk} | {memory} | {m.source} | {m.licence} |")
    return rows


def cpu() -> list[str]:
    rows = ["| picture | a step | decode | peak memory |", "|---|---|---|---|"]
    for row in measured("cpu.json")["rows"]:
        cells = [f"{row['side']}²"]
        for what in ("step", "decode"):
            ours, theirs = (f"{row[f'{what} {way}']:.1f} s" for way in ("sana", "diffusers"))
            cells.append(f"{ours} against {theirs}, {row[f'{what} ratio']:.2f} times as fast")
        ours, theirs = (f"{row[f'peak {way}'] / 1e9:.1f} GB" for way in ("sana", "diffusers"))
        cells.append(f"{ours} against {theirs}, {percent(1 / row['peak ratio'])}")
        rows.append(f"| {' | '.join(cells)} |")
    return rows


def cpu_engines() -> list[str]:
    document = measured("cpu-engines.json")
    names = list(document["rows"][0]["seconds"])
    rows = [f"| | {' | '.join(names)} |", f"|---|{'---|' * len(names)}"]
    for row in document["rows"]:
        ours = row["seconds"]["sana"]
        cells = [f"{ours:.2f} s"]
        cells += [f"{row['seconds'][name] / ours:.2f} times as long" for name in names[1:]]
        rows.append(f"| {row['what']}, {row['side']}² | {' | '.join(cells)} |")
    return rows


def cpu_floor() -> list[str]:
    rows = [
        "| image | a step | at least | reached | decode | at least | reached |",
        "|---|---|---|---|---|---|---|",
    ]
    for size in measured("cpu-floor.json")["sizes"]:
        cells = [f"{size['width']}²"]
        for phase, times in (("denoise", size["recipe"]["steps"]), ("decode", 1)):
            facts = size["phases"][phase]
            seconds = facts["seconds"]["median"], facts["floor_seconds"]
            cells += [f"{each / times:.2f} s" for each in seconds] + [percent(facts["share"])]
        rows.append(f"| {' | '.join(cells)} |")
    return rows


def startup() -> list[str]:
    facts = measured("startup.json")
    usage, picture = facts["help"], facts["picture"]
    longer = f"{1 / usage['times_faster']:.1f} times as long"
    peaks = [picture[name] for name in ("peak_bytes", "other_peak_bytes")]
    memory = f"{peaks[0] / 1e6:.0f} MB against {peaks[1] / 1e6:.0f} MB"
    return [
        "| cold start to | `sana` | the other | ratio | peak memory |",
        "|---|---|---|---|---|",
        f"| `--help` | {usage['seconds']:.2f} s "
        f"| importing Typer and Rich: {usage['other_seconds']:.2f} s | {longer} | |",
        f"| a saved picture of `demo`, 512², 20 steps | {picture['seconds']:.2f} s "
        f"| a minimal diffusers script: {picture['other_seconds']:.2f} s "
        f"| {picture['times_faster']:.2f} times faster "
        f"| {memory} ({percent(peaks[0] / peaks[1])}) |",
    ]


def batch() -> list[str]:
    small, large = (measured(name) for name in ("batch.json", "batch-512.json"))
    titles = [f"{facts['pictures']} at {facts['side']}²" for facts in (small, large)]
    rows = [f"| images of `demo` a minute | {' | '.join(titles)} |", "|---|---|---|"]
    names = {
        "batch": "`sana batch`",
        "shell loop": "a shell loop over `sana generate`",
        "diffusers loop": "a loop over diffusers in one process",
    }
    for way, name in names.items():
        cells = [f"{facts['pictures_a_minute'][way]:.0f}" for facts in (small, large)]
        if way != "batch":
            ratios = [facts[f"times_the_{way.replace(' ', '_')}"] for facts in (small, large)]
            cells = [
                f"{cell}; `sana batch` {ratio:.2f} times as many"
                for cell, ratio in zip(cells, ratios, strict=True)
            ]
        rows.append(f"| {name} | {' | '.join(cells)} |")
    return rows


def decode() -> list[str]:
    rows = ["| picture | way | above the weights | seconds | likeness |", "|---|---|---|---|---|"]
    for row in sorted(measured("decode.json")["rows"], key=lambda row: row["side"]):
        way = {"strips": "**strips (ours)**", "untiled": "diffusers, untiled"}.get(
            row["way"], f"diffusers, {row['way']}"
        )
        if "failed" in row:
            cells = "does not fit", "–", "–"
        else:
            psnr = row.get("psnr")
            like = "–" if "psnr" not in row else "the same" if psnr is None else f"{psnr:.1f} dB"
            cells = f"{row['peak_above_weights'] / 1e9:.2f} GB", f"{row['seconds']:.0f}", like
        rows.append(f"| {row['side']}² | {way} | {' | '.join(cells)} |")
    return rows


def encode() -> list[str]:
    rows = [
        "| encoder | image | way | above the weights | CPU seconds | largest difference |",
        "|---|---|---|---|---|---|",
    ]
    for row in measured("encode.json")["rows"]:
        cells = [row["encoder"], f"{row['side']}²", row["way"]]
        cells += [f"{row['peak_above_weights'] / 1e9:.2f} GB", f"{row['cpu_seconds']:.0f}"]
        cells.append(f"{row['difference']:.0e} σ" if "difference" in row else "")
        rows.append(f"| {' | '.join(cells)} |")
    return rows


def lite() -> list[str]:
    rows = [
        "| decoder | parameters | CPU seconds at 1024² | peak with weights | above the weights |",
        "|---|---|---|---|---|",
    ]
    (row,) = measured("lite.json")["rows"]
    for name, words in {"full": "the model's own", "lite": "`--vae lite`"}.items():
        cells = [words, f"{row[f'parameters {name}'] / 1e6:.0f} M"]
        cells.append(f"{row[f'cpu_seconds {name}']:.1f}")
        cells += [f"{row[f'{key} {name}'] / 1e9:.2f} GB" for key in ("peak", "peak_above_weights")]
        rows.append(f"| {' | '.join(cells)} |")
    return rows


def serve() -> list[str]:
    facts = measured("serve.json")
    warm, clients, resident = facts["warm"], facts["clients"], facts["memory"]["resident"]
    rows = [
        "| warm images of `demo`, 256², 20 steps | times as long as their computation |",
        "|---|---|",
    ]
    names = {
        "request": "a request to `sana serve`",
        "many": f"a process of `sana generate --server -n {warm['many']}`",
        "through": "a process of `sana generate --server`",
        "cold": "a cold process of `sana generate`",
    }
    rows += [f"| {words} | {warm['ratios'][name]:.2f} |" for name, words in names.items()]
    rows += ["", f"| requests | {' | '.join(resident)} |", "|---" * (len(resident) + 1) + "|"]
    sizes = (f"{size / 1e6:.0f} MB" for size in resident.values())
    rows.append(f"| resident memory of the server | {' | '.join(sizes)} |")
    answers = f"{clients['answered']} of {clients['clients']} clients that ask at once"
    return [*rows, "", f"{answers} get their image."]


def demo() -> list[str]:
    """Shares of prompts obeyed, with their 95 % intervals."""
    rows = ["| prompts | 512² | 256² |", "|---|---|---|"]
    for world in ("scenes", "shapes"):
        sides = [measured(f"demo/{world}-{side}.json")["categories"] for side in (512, 256)]
        for category in sides[0]:
            cells = [f"{sides[0][category]['prompts']} of {category}"]
            for row in (each[category] for each in sides):
                low, high = map(percent, row["interval"])
                cells.append(f"**{percent(row['all'], 1)}** ({low} – {high})")
            rows.append(f"| {' | '.join(cells)} |")
    return rows


def claims() -> list[str]:
    cells = measured("demo/claims.json")

    def share(name: str) -> str:
        low, high = map(percent, cells[name]["interval"])
        return f"{percent(cells[name]['obeyed'])} ({low} – {high})"

    heads = "| steps | likeness, DPM | likeness, Euler | obeyed, DPM | obeyed, Euler |"
    rows = [heads, "|---|---|---|---|---|"]
    for n in (int(name.split()[-2]) for name in cells if name.startswith("error, flow-dpm")):
        ways = [f"{solver}, {n} steps" for solver in ("flow-dpm", "flow-euler")]
        likeness = [f"{cells[f'error, {way}']['median psnr']:.1f} dB" for way in ways]
        shares = [share(f"alignment, {way}") for way in ways]
        rows.append(f"| {n} | {' | '.join(likeness + shares)} |")
    rows += ["", "| guidance | obeyed |", "|---|---|"]
    for name in (n for n in cells if n.startswith("alignment, guidance")):
        rows.append(f"| {name.split()[-1]} | {share(name)} |")
    rows += ["", "| precision | obeyed | median PSNR to float32 |", "|---|---|---|"]
    for name in (n for n in cells if n.startswith("precision")):
        psnr = cells[name]["median psnr"]
        like = "the same" if psnr == 99 else f"{psnr:.1f} dB"
        rows.append(f"| {name.removeprefix('precision, ')} | {share(name)} | {like} |")
    return rows


def settings() -> list[str]:
    """Every number of the training recipe, on a GPU, on a CPU, and there with Noto's things."""
    from training.settings import CPU, H200, THINGS

    rows = ["| | GPU | CPU | CPU, things |", "|---|---|---|---|"]
    for name in (f.name for f in fields(H200)):
        numbers = [getattr(preset, name) for preset in (H200, CPU, THINGS)]
        if isinstance(numbers[0], int | float):
            rows.append(f"| `{name}` | {' | '.join(f'{n:g}' for n in numbers)} |")
    return rows


def one_command() -> list[str]:
    """Shares of prompts obeyed by what one command made, and by the weights in the box."""
    files = ["demo-training/one-command/scenes-512.json", "demo/scenes-512.json"]
    runs = [measured(name)["categories"] for name in files]
    rows = ["| prompts | one command | in the box |", "|---|---|---|"]
    for category, row in runs[0].items():
        shares = [percent(run[category]["all"], 1) for run in runs]
        rows.append(f"| {row['prompts']} of {category} | {' | '.join(shares)} |")
    return rows


def registers() -> list[str]:
    """Of each kernel on each GPU the case that takes most registers, in bfloat16 and in int8."""
    costs = [
        cost | {"kernel": kernel + (", int8" if words[0] == "int8" else "")}
        for cost in measured("kernels.json")
        for kernel, *words in [cost["case"].split()]
        if words[0] not in ("float16", "float32")
    ]
    archs = sorted({cost["arch"] for cost in costs})
    rows = [
        f"| kernel | {' | '.join(f'sm_{arch}' for arch in archs)} |",
        f"|---{'|---' * len(archs)}|",
    ]
    for name in sorted({cost["kernel"] for cost in costs}):
        cells = []
        for arch in archs:
            cases = [c for c in costs if c["arch"] == arch and c["kernel"] == name]
            most = max(cases, key=lambda cost: (cost["registers"], cost["shared"]))
            facts = [str(most["registers"]), f"{most['shared'] / 1024:.0f}"]
            if most["tensor_cores"]:
                core = most["tensor_cores"].split(".")[0]
                facts.append(f"{core} tf32" if "TF32" in most["tensor_cores"] else core)
            cells.append(", ".join(facts))
        kernel, comma, kind = name.partition(",")
        rows.append(f"| `{kernel}`{comma}{kind} | {' | '.join(cells)} |")
    return rows


# FLOP/s in bfloat16 with float32 sums, bytes/s, and how many times as fast 8 bits are.
CARDS = {
    "RTX 4060 Laptop, 29 TFLOP/s and 256 GB/s as listed": (29.1e12, 256e9, 4),
    "RTX 4090 Laptop, 76 TFLOP/s and 576 GB/s as listed": (75.9e12, 576e9, 4),
    "H200, 790 TFLOP/s and 4.3 TB/s as others measured": (790e12, 4.3e12, 2),
}
HALVED = 4  # times by which GeForce cards multiply int8 faster: twice float16 with float16 sums
STEPS = 20
LAUNCHED_ON = CARDS | {"B200, 2.2 PFLOP/s and 8 TB/s as listed": (2.2e15, 8e12, 2)}


def predicted() -> list[str]:
    """Seconds of an image at 1024² on GPUs that none of this has run on."""
    from sana_cli.bench.counted import Count
    from sana_cli.bench.forecast import EFFICIENCY, Rates, seconds

    ways = "bfloat16", "float16 with sums in float16", "w8a8"
    heads = "predicted at 1024²", f"a step in {', in '.join(ways)}", "a decode", "20 steps and it"
    rows = [f"| {' | '.join(heads)} | measured |", "|---|---|---|---|---|"]
    for card, (flops, bandwidth, eight) in CARDS.items():
        rates = Rates(flops, bandwidth, eight * flops)
        for model, work in measured("work.json")["models"].items():
            step, quantised, decode = (
                seconds(Count(**work[stage]), rates, EFFICIENCY["cuda"])
                for stage in ("step", "w8a8 step", "decode")
            )
            steps: list[float | None] = [step, None, quantised]
            if eight == HALVED:
                twice = rates._replace(products=2 * flops)
                steps[1] = seconds(Count(**work["step"]), twice, EFFICIENCY["cuda"])
            each = ", ".join(f"{1000 * one:.3g}" if one else "–" for one in steps)
            total = ", ".join(f"{STEPS * one + decode:.2g}" if one else "–" for one in steps)
            cells = [f"{each} ms", f"{1000 * decode:.3g} ms", f"{total} s", "not measured yet"]
            rows.append(f"| {model} on an {card} | {' | '.join(cells)} |")
    return rows


def launching() -> list[str]:
    """What Python takes to launch a decode, beside what GPUs are predicted to take for it."""
    from sana_cli.models.streaming.graphed_decoder import LAUNCH_BOUND

    cards = [card.partition(",")[0] for card in LAUNCHED_ON]
    kinds = {"8.9": "GeForce", "9.0": "H200"}
    rows = [
        f"| a decode | {' | '.join(f'launches on {one}, Python' for one in kinds.values())}"
        f" | {' | '.join(cards)} |",
        f"|---|---|---{'|---' * len(cards)}|",
    ]
    for side, found in measured("work.json")["decodes"].items():
        cells = []
        for kind in kinds:
            launches, python = found[kind]["count"]["operations"], found[kind]["python"]
            cells.append(f"{launches}, {1000 * python:.2g} ms")
        for card, (_, _, eight) in LAUNCHED_ON.items():
            facts = found["8.9" if eight == HALVED else "9.0"]
            without, graphed = facts["seconds"][card]
            share = facts["python"] / without
            text = f"{1000 * without:.2g} ms" if without < 0.1 else f"{without:.2g} s"
            text += f", {share:.0%}"
            text += f"; {1000 * graphed:.2g} ms" if share >= LAUNCH_BOUND else ""
            cells.append(text)
        rows.append(f"| {side}² | {' | '.join(cells)} |")
    return rows


def w8a8() -> list[str]:
    """Likeness to float32 and obedience of the bundled model, in bfloat16 and in 8 bits."""
    facts = measured("w8a8.json")
    like = facts["likeness"]
    rows = [f"| {like['images']} images, {like['side']}² | latents | pixels |", "|---|---|---|"]
    for way, found in like["decibels"].items():
        cells = [
            f"{statistics.mean(found[what]):.1f} dB (worst {min(found[what]):.1f})"
            for what in ("latents", "pixels")
        ]
        rows.append(f"| {way} | {' | '.join(cells)} |")
    asked = facts["obedience"]
    rows += ["", f"| {asked['prompts']} of {asked['of']} prompts, {asked['side']}² | obeyed |"]
    rows.append("|---|---|")
    for way in ("float32", "w8a8"):
        low, high = map(percent, asked[way]["interval"])
        rows.append(f"| {way} | {percent(asked[way]['obeyed'], 1)} ({low} – {high}) |")
    return rows


def w8a8_layers() -> list[str]:
    rows = [
        "| layer | largest input | bfloat16 | w8a8 | weights alone |",
        "|---|---|---|---|---|",
    ]
    for row in measured("w8a8.json")["layers"]:
        cells = [f"{row[name]:.1f} dB" for name in ("bfloat16", "w8a8", "weights")]
        largest = f"{row['largest']:.0f} times the RMS"
        rows.append(f"| {row['model']} `{row['layer']}` | {largest} | {' | '.join(cells)} |")
    return rows


def diffusers_suites() -> list[str]:
    """Of each file of diffusers' tests, how many cases apply here, and why the others do not."""
    cases = measured("../tests/diffusers_suite/cases.json")["cases"]
    reasons = list(dict.fromkeys(case["reason"] for case in cases if "reason" in case))
    rows = [
        f"| file | cases | apply and pass | {' | '.join(reasons)} |",
        f"|---|---|---{'|---' * len(reasons)}|",
    ]
    for file in sorted({file for case in cases for file in case["files"]}):
        own = [case.get("reason", "") for case in cases if file in case["files"]]
        counts = [len(own), own.count(""), *map(own.count, reasons)]
        rows.append(f"| [{file}]({DIFFUSERS_TESTS}/{file}) | {' | '.join(map(str, counts))} |")
    return rows


def diffusers_cases() -> list[str]:
    """Each case of diffusers' tests that applies here, and the test that stands for it."""
    cases = measured("../tests/diffusers_suite/cases.json")["cases"]
    rows = ["| case | files | here |", "|---|---|---|"]
    for case in cases:
        if "test" in case:
            here = case["test"].partition("::")[2]
            rows.append(f"| `{case['case']}` | {len(case['files'])} | `{here}` |")
    return rows


TABLES: dict[str, Callable[[], list[str]]] = {
    "models": models,
    "cpu": cpu,
    "cpu-engines": cpu_engines,
    "cpu-floor": cpu_floor,
    "startup": startup,
    "batch": batch,
    "decode": decode,
    "encode": encode,
    "lite": lite,
    "serve": serve,
    "demo": demo,
    "claims": claims,
    "settings": settings,
    "one-command": one_command,
    "registers": registers,
    "predicted": predicted,
    "launching": launching,
    "w8a8": w8a8,
    "w8a8-layers": w8a8_layers,
    "diffusers-suites": diffusers_suites,
    "diffusers-cases": diffusers_cases,
}


def pages() -> list[Path]:
    """Every README.md, but for those in hidden folders and in what pip built."""
    found = glob.glob("**/README.md", root_dir=ROOT, recursive=True)
    return [ROOT / name for name in sorted(found) if Path(name).parts[0] != "build"]


def rewritten(text: str) -> str:
    """The text of a page with its tables as they should be."""

    def block(match: re.Match[str]) -> str:
        table = TABLES.get(match["name"])
        return "\n".join([match[1].rstrip(), *table(), match[3]]) if table else match[0]

    return BLOCK.sub(block, text)


def main() -> None:
    for page in pages():
        before = page.read_text(encoding="utf-8")
        after = rewritten(before)
        if after != before:
            page.write_text(after, encoding="utf-8")
            sys.stdout.write(f"{page.relative_to(ROOT)}\n")


if __name__ == "__main__":
    main()
