"""What the README says is so."""

import json
import re
import shlex
from pathlib import Path

import pytest

from sana_cli.weights.catalogue import known_models

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```(\w*)\n(.*?)```", README, re.DOTALL)


def test_the_quick_start_is_the_first_two_code_blocks():
    (kind, install), (_, test) = BLOCKS[:2]
    assert kind == "sh"
    assert install.strip() == (
        'python -m pip install . && sana generate "a red circle on a blue background" --model demo'
    )
    assert test.strip() == 'python -m pip install ".[test]" && pytest -n auto'


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
    table = README.split("<!-- models -->")[1].split("<!-- /models -->")[0].strip().splitlines()
    assert table == table_of_models()


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
    table = README.split("<!-- cpu -->")[1].split("<!-- /cpu -->")[0].strip().splitlines()
    assert table == table_of_cpu()


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
    table = README.split("<!-- startup -->")[1].split("<!-- /startup -->")[0].strip().splitlines()
    assert table == table_of_startup()


def test_the_rates_of_batches_are_what_was_measured():
    measured = json.loads((ROOT / "benchmarks" / "batch.json").read_text())
    rate = {way: f"{a_minute:.0f}" for way, a_minute in measured["pictures_a_minute"].items()}
    assert (
        f"A batch of {measured['pictures']} pictures of `demo` at 256² (`benchmarks/batch.py`, "
        f"`benchmarks/batch.json`, one thread): {rate['batch']} a minute, against "
        f"{rate['shell loop']} in a shell loop over `sana generate` "
        f"({measured['times_the_shell_loop']:.1f} times) and {rate['diffusers loop']} in a loop "
        f"over diffusers in one process ({measured['times_the_diffusers_loop']:.2f} times)."
    ) in " ".join(README.split())


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
    table = README.split("<!-- decode -->")[1].split("<!-- /decode -->")[0].strip().splitlines()
    assert [line for line in table if line.startswith("|")] == table_of_decodes()


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
    table = README.split("<!-- demo -->")[1].split("<!-- /demo -->")[0].strip().splitlines()
    assert table == table_of_demo()


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
    found = README.split("<!-- claims -->")[1].split("<!-- /claims -->")[0].strip().splitlines()
    assert found == tables_of_claims()


def demo_commands() -> list[str]:
    lines = "\n".join(text for kind, text in BLOCKS[2:] if kind == "sh").splitlines()
    return [line for line in lines if line.startswith("sana generate") and " demo" in line]


@pytest.mark.parametrize("line", demo_commands())
def test_every_command_on_the_demo_runs(sana, line, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = shlex.split(line.split(" > ")[0])[1:]
    run = sana(*words, "--dry-run")
    assert run.code == 0, run.err


def test_every_file_it_names_exists():
    tree = next(text for _, text in BLOCKS if text.startswith("sana_cli/app.py"))
    names = [line.split()[0] for line in tree.splitlines()]
    for name in names:
        head, _, tail = name.partition("{")
        parts = tail.rstrip(".py").rstrip("}").split(",") if tail else [""]
        for part in parts:
            assert (ROOT / f"{head}{part}{'.py' if tail else ''}").exists(), name
    for link in re.findall(r"\]\(((?!http|#)[^)]+)\)", README):
        assert (ROOT / link).exists(), link
