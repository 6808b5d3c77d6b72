"""A recipe for tests of what is done with one; nothing is drawn by it."""

from sana_cli.recipe import Recipe

RECIPE = Recipe(
    prompt="a red circle",
    negative="",
    instruction="",
    seed=7,
    steps=20,
    guidance=4.5,
    solver="flow-dpm",
    flow_shift=3.0,
    width=64,
    height=32,
    native_width=64,
    native_height=32,
    fit="trained",
    model="demo",
    revision=None,
    text_dtype="float32",
    dit_dtype="float32",
    vae_dtype="float32",
)
