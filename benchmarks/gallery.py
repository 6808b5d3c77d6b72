"""Draw the gallery of `sana_cli/pipeline/README.md` with the bundled model.

    python -m benchmarks.gallery

Every row is a WebP file in `benchmarks/gallery/`: image-to-image over strengths, a repaint with its
mask, an outpaint, and a LoRA over scales. `blueprint.safetensors` there is that LoRA, which
`python -m training.lora` has trained.
"""

import argparse
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from sana_cli import Pipeline

GALLERY = Path(__file__).resolve().parent / "gallery"
LORA = GALLERY / "blueprint.safetensors"
SIDE, GAP = 192, 6  # pixels of an image in a row, and between two
HOUSE = "a red house in front of hills at noon"
NIGHT = "a yellow house in front of hills on a starry night"
CACTUS = "a green cactus in front of hills at noon"
WIDE = "a white boat on the sea at sunset"
STYLED = ("a balloon over the city at noon", "two pines in front of mountains at dawn")
STRENGTHS = (0.2, 0.5, 0.7, 0.8, 0.9)
SCALES = (0, 0.5, 1)
BOX = (160, 224, 352, 480)  # left, top, right and bottom of what is repainted
KEPT = 96  # pixels cut off on each side, which outpainting draws again


def row(images: list[Image.Image]) -> Image.Image:
    """Images beside each other, each within a square, at its share of the largest."""
    largest = max(image.width for image in images)
    sheet = Image.new("RGB", (len(images) * (SIDE + GAP) - GAP, SIDE), "white")
    for i, image in enumerate(images):
        side = SIDE * image.width // largest
        small = image.convert("RGB").resize((side, side), Image.Resampling.LANCZOS)
        sheet.paste(small, (i * (SIDE + GAP) + (SIDE - side) // 2, (SIDE - side) // 2))
    return sheet


def image_to_image(pipeline: Pipeline, folder: Path) -> list[Image.Image]:
    (start,) = pipeline.generate(HOUSE, seed=1)
    start.save(folder / "start.png")
    how = {"image": folder / "start.png", "seed": 1}
    return [start, *(pipeline.generate(NIGHT, strength=s, **how)[0] for s in STRENGTHS)]


def repaint(pipeline: Pipeline, folder: Path) -> list[Image.Image]:
    (start,) = pipeline.generate(HOUSE, seed=1)
    start.save(folder / "start.png")
    mask = Image.new("L", start.size)
    mask.paste(255, BOX)
    mask.save(folder / "mask.png")
    how = {"image": folder / "start.png", "mask": folder / "mask.png", "seed": 1}
    (drawn,) = pipeline.generate(CACTUS, **how)
    same = (np.asarray(drawn) == np.asarray(start)).all(-1)
    kept = Image.fromarray(same).convert("L")
    return [start, mask, drawn, ImageOps.colorize(kept, "crimson", "white")]


def outpaint(pipeline: Pipeline, folder: Path) -> list[Image.Image]:
    (whole,) = pipeline.generate(WIDE, seed=1)
    middle = whole.crop((KEPT, KEPT, whole.width - KEPT, whole.height - KEPT))
    middle.save(folder / "middle.png")
    grown = [
        pipeline.generate(WIDE, image=folder / "middle.png", outpaint=str(KEPT), seed=seed)[0]
        for seed in (1, 2)
    ]
    framed = ImageOps.expand(middle, KEPT, "white")
    return [framed, *grown]


def lora(pipeline: Pipeline, folder: Path) -> list[Image.Image]:
    return [
        pipeline.generate(prompt, lora=f"{LORA}:{scale}", seed=1)[0]
        for prompt in STYLED
        for scale in SCALES
    ]


ROWS = {"image-to-image": image_to_image, "repaint": repaint, "outpaint": outpaint, "lora": lora}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gallery", description=__doc__)
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS))
    parser.add_argument("--out", type=Path, default=GALLERY)
    options = parser.parse_args()
    with Pipeline("demo", device="cpu") as pipeline, tempfile.TemporaryDirectory() as folder:
        for name in options.rows:
            sheet = row(ROWS[name](pipeline, Path(folder)))
            sheet.save(options.out / f"{name}.webp", quality=88, method=6)


if __name__ == "__main__":
    main()
