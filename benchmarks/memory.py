"""Predict the memory that released models take and write it into weights.toml.

    python -m benchmarks.memory [MODEL …]

Of all models unless some are named; nothing is downloaded.
"""

import sys
from pathlib import Path

import tomlkit

from sana_cli.pipeline.peaks import PeakCache
from sana_cli.pipeline.plan import (
    LONGEST_PROMPT,
    _decode_peak,
    _default_plan,
    _denoise_peak,
    _text_peak,
)
from sana_cli.recipe import Recipe
from sana_cli.weights.catalogue import Model, known_models
from sana_cli.weights.model_files import released_model

CATALOGUE = Path(__file__).resolve().parents[1] / "weights.toml"


def peaks(model: Model) -> tuple[int, int]:
    """Bytes at the native size on a GPU: as fast as can be, and with everything in small pieces.

    Weights included, in bfloat16 behind the 8-bit text encoder, for a prompt of the longest kind.
    """
    files = released_model(model)
    recipe = Recipe(
        **{"prompt": "a " * LONGEST_PROMPT, "negative": "", "instruction": "", "seed": 0},
        **{"steps": model.steps, "guidance": model.guidance, "solver": model.solver},
        **dict.fromkeys(("width", "height", "native_width", "native_height"), model.side),
        **{"flow_shift": files.flow_shift, "fit": "exact", "model": model.name, "revision": None},
        **{"text_dtype": "int8", "dit_dtype": "bfloat16", "vae_dtype": "bfloat16"},
    )
    fast = _default_plan("cuda")
    *_, lean_denoise, _ = fast.fallback_plans("denoise")  # the last is the CPU
    *_, lean_decode, _ = fast.fallback_plans("decode")
    cache = PeakCache()
    text = _text_peak(cache, fast, recipe, files)
    return (
        max(
            text,
            _denoise_peak(cache, fast, recipe, files),
            _decode_peak(cache, fast, recipe, files),
        ),
        max(
            text,
            _denoise_peak(cache, lean_denoise, recipe, files),
            _decode_peak(cache, lean_decode, recipe, files),
        ),
    )


def main() -> None:
    document = tomlkit.parse(CATALOGUE.read_text(encoding="utf-8"))
    for name, model in known_models().items():
        if model.sources and (not sys.argv[1:] or name in sys.argv[1:]):
            for key, size in zip(("memory", "least_memory"), peaks(model), strict=True):
                document["models"][name][key] = tomlkit.value(f"{round(size, -7):_}")
    CATALOGUE.write_text(tomlkit.dumps(document), encoding="utf-8")


if __name__ == "__main__":
    main()
