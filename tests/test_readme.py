"""Every generated table of a README.md is what its data make."""

import json
from pathlib import Path

from sana_cli.weights.catalogue import known_models

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("benchmarks", "sana_cli", "training")
PAGES = [
    p.read_text(encoding="utf-8") for name in FOLDERS for p in (ROOT / name).rglob("README.md")
]


def table(name: str) -> list[str]:
    """The generated table between two markers, on whichever page it is."""
    (page,) = (text for text in PAGES if f"<!-- {name} -->" in text)
    return page.split(f"<!-- {name} -->")[1].split(f"<!-- /{name} -->")[0].strip().splitlines()


def table_of_models() -> list[str]:
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


def test_the_table_of_models_is_that_of_weights_toml():
    assert table("models") == table_of_models()


def table_of_cpu() -> list[str]:
    rows = ["| picture | a step | decode | peak memory |", "|---|---|---|---|"]
    for row in json.loads((ROOT / "benchmarks" / "cpu.json").read_text())["rows"]:
        cells = [f"{row['side']}²"]
        for what in ("step", "decode"):
            ours, theirs = (f"{row[f'{what} {way}']:.1f} s" for way in ("sana", "diffusers"))
            cells.append(f"{ours} against {theirs}, {row[f'{what} ratio']:.2f} times as fast")
        ours, theirs = (f"{row[f'peak {way}'] / 1e9:.1f} GB" for way in ("sana", "diffusers"))
        cells.append(f"{ours} against {theirs}, {100 / row['peak ratio']:.0f} %")
        rows.append(f"| {' | '.join(cells)} |")
    return rows


def test_the_table_of_the_cpu_is_what_was_measured():
    assert table("cpu") == table_of_cpu()


def table_of_startup() -> list[str]:
    measured = json.loads((ROOT / "benchmarks" / "startup.json").read_text())
    usage, picture = measured["help"], measured["picture"]
    longer = f"{1 / usage['times_faster']:.1f} times as long"
    peaks = [picture[name] for name in ("peak_bytes", "other_peak_bytes")]
    share = f"{peaks[0] / 1e6:.0f} MB against {peaks[1] / 1e6:.0f} MB ({peaks[0] / peaks[1]:.0%}"
    return [
        "| cold start to | `sana` | the other | ratio | peak memory |",
        "|---|---|---|---|---|",
        f"| `--help` | {usage['seconds']:.2f} s "
        f"| importing Typer and Rich: {usage['other_seconds']:.2f} s | {longer} | |",
        f"| a saved picture of `demo`, 512², 20 steps | {picture['seconds']:.2f} s "
        f"| a minimal diffusers script: {picture['other_seconds']:.2f} s "
        f"| {picture['times_faster']:.2f} times faster | {share.replace('%', ' %')}) |",
    ]


def test_the_table_of_cold_starts_is_what_was_measured():
    assert table("startup") == table_of_startup()


def table_of_batches() -> list[str]:
    facts = json.loads((ROOT / "benchmarks" / "batch.json").read_text())
    rate = facts["pictures_a_minute"]
    shell, diffusers = facts["times_the_shell_loop"], facts["times_the_diffusers_loop"]
    return [
        f"| {facts['pictures']} pictures of `demo` at 256² | a minute | `sana batch` beside it |",
        "|---|---|---|",
        f"| `sana batch` | {rate['batch']:.0f} |  |",
        f"| a shell loop over `sana generate` | {rate['shell loop']:.0f} | {shell:.1f} times as many |",
        f"| a loop over diffusers in one process | {rate['diffusers loop']:.0f} "
        f"| {diffusers:.2f} times as many |",
    ]


def test_the_table_of_batches_is_what_was_measured():
    assert table("batch") == table_of_batches()


def table_of_decodes() -> list[str]:
    rows = ["| picture | way | above the weights | seconds | likeness |", "|---|---|---|---|---|"]
    measured = json.loads((ROOT / "benchmarks" / "decode.json").read_text())["rows"]
    for row in sorted(measured, key=lambda row: row["side"]):
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


def test_the_table_of_decodes_is_what_was_measured():
    assert table("decode") == table_of_decodes()


def table_of_demo() -> list[str]:
    """Shares of prompts obeyed, with their 95 % intervals."""
    rows = ["| prompts | 512² | 256² |", "|---|---|---|"]
    for world in ("scenes", "shapes"):
        files = [ROOT / "benchmarks" / "demo" / f"{world}-{side}.json" for side in (512, 256)]
        measured = [json.loads(file.read_text())["categories"] for file in files]
        for category in measured[0]:
            cells = [f"{measured[0][category]['prompts']} of {category}"]
            for row in (each[category] for each in measured):
                low, high = row["interval"]
                cells.append(f"**{row['all']:.1%}** ({low:.0%} – {high:.0%})".replace("%", " %"))
            rows.append(f"| {' | '.join(cells)} |")
    return rows


def test_the_table_of_the_demo_is_what_was_measured():
    assert table("demo") == table_of_demo()


def tables_of_claims() -> list[str]:
    cells = json.loads((ROOT / "benchmarks" / "demo" / "claims.json").read_text())
    error = [name for name in cells if name.startswith("error, flow-dpm")]
    steps = [int(name.split()[-2]) for name in error]

    def share(name: str) -> str:
        low, high = cells[name]["interval"]
        return f"{cells[name]['obeyed']:.0%} ({low:.0%} – {high:.0%})".replace("%", " %")

    heads = "| steps | likeness, DPM | likeness, Euler | obeyed, DPM | obeyed, Euler |"
    rows = [heads, "|---|---|---|---|---|"]
    for n in steps:
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


def test_the_tables_of_the_papers_claims_are_what_was_measured():
    assert table("claims") == tables_of_claims()
