"""Results that were kept: read back, and compared with."""

import json
from pathlib import Path

from sana_cli.bench.phases import PHASES, SCHEMA, Facts
from sana_cli.errors import UsageError


def read_baseline(path: Path) -> Facts:
    """Read a document that `--save` wrote. UsageError for any other file."""
    hint = "give a file that `sana bench --save` wrote"
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"--compare {path} cannot be read: {error.strerror}", hint) from None
    except (ValueError, RecursionError):
        raise UsageError(f"--compare {path} is not JSON", hint) from None
    try:
        if document["schema"] != SCHEMA:
            raise UsageError(f"--compare {path} has schema {document['schema']!r}, not {SCHEMA}")
        for size in document["sizes"]:
            _key(size), [size["phases"][name]["seconds"]["median"] for name in (*PHASES, "total")]
        _machine(document)
    except (KeyError, TypeError):
        raise UsageError(f"--compare {path} is not a result of sana bench", hint) from None
    return document


def compare(now: Facts, before: Facts) -> Facts:
    """Compare with an earlier run: ratios of medians, below 1 where this run is faster.

    {"sizes": [{"model", "width", "height", "ratios": {phase: …}}], "differences": […]}; sizes that
    only one of them has are left out.
    """
    differences = [
        f"{name} was {old}, and is {new}"
        for (name, new), old in zip(_machine(now).items(), _machine(before).values(), strict=True)
        if new != old
    ]
    earlier = {_key(size): size for size in before["sizes"]}
    rows = []
    for size in now["sizes"]:
        old = earlier.get(_key(size))
        if old is None:
            continue
        loaded = not (size["random_weights"] or old["random_weights"])
        ratios = {
            name: phase["seconds"]["median"] / old["phases"][name]["seconds"]["median"]
            for name, phase in size["phases"].items()
            if (name != "load" or loaded) and old["phases"][name]["seconds"]["median"]
        }
        rows.append({key: size[key] for key in ("model", "width", "height")} | {"ratios": ratios})
        differences += [
            f"{name} of {size['model']} was {old['recipe'].get(name)}, and is {value}"
            for name, value in size["recipe"].items()
            if name not in ("seed", "prompt") and old["recipe"].get(name) != value
        ]
        if size["random_weights"] != old["random_weights"]:
            differences.append(f"only one of the two ran {size['model']} on random weights")
    return {"sizes": rows, "differences": list(dict.fromkeys(differences))}


def _key(size: Facts) -> tuple[str, int, int]:
    return size["model"], size["width"], size["height"]


def _machine(document: Facts) -> Facts:
    """Return the facts that must be equal for two results to be comparable."""
    names = ("cpu", "cores", "threads", "device", "device_name", "kernels")
    rest = {name: document[name] for name in ("sana", "torch", "triton", "count")}
    return {name: document["machine"][name] for name in names} | rest
