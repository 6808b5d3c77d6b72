"""Options and pictures that the model at hand cannot use: exit code 2."""

from pathlib import Path

import pytest

from faults import FAST, TEXT, VAE, brief, edit, edit_tensors, named


@pytest.fixture
def photo(tmp_path) -> str:
    from PIL import Image

    Image.linear_gradient("L").convert("RGB").save(tmp_path / "photo.png")
    return str(tmp_path / "photo.png")


@pytest.mark.parametrize(
    ("words", "says"),
    named(
        (("--negative", "dog"), "--negative"),
        (("--negative", "dog", "-g", "1"), "--negative"),
        (("--solver", "flow-dpm"), "--solver flow-dpm"),
        (("--solver", "flow-euler"), "--solver flow-euler"),
        (("--steps", "0"), "--steps"),
        (("--steps", "1001"), "--steps"),
        (("-g", "-1"), "--guidance"),
        (("-g", "nan"), "--guidance"),
        (("-g", "101"), "--guidance"),
        (("--strength", "0.5"), "--image"),
        (("--image", "PHOTO", "--strength", "0"), "--strength"),
        (("--image", "PHOTO", "--strength", "-0.1"), "--strength"),
        (("--image", "PHOTO", "--strength", "1.01"), "--strength"),
        (("--image", "PHOTO", "--strength", "nan"), "--strength"),
        (("--image", "PHOTO", "--strength", "much"), "--strength"),
    ),
)
def test_what_sprint_cannot_use_is_refused(refused, sprint, photo, words, says):
    words = [photo if word == "PHOTO" else word for word in words]
    refused(2, "a fox", "-m", str(sprint), *words, says=(says,))


@pytest.mark.parametrize(
    ("words", "says", "hint"),
    [
        (("--solver", "scm"), "--solver scm", "--solver flow-dpm"),
        (("--strength", "0.5"), "--strength", "--image"),
    ],
    ids=brief,
)
@pytest.mark.parametrize("name", ["folder", "sana-0.6b-1024", "sana1.5-4.8b-1024", None])
def test_what_only_sprint_can_use_is_refused(refused, model, no_weights, words, says, hint, name):
    words = list(words)
    if name is not None:
        words += ["-m", str(model) if name == "folder" else name]
    refused(2, "a fox", *words, says=(says,), hint=hint)


@pytest.mark.parametrize(
    "words", [("--steps", "0"), ("-g", "nan"), ("--strength", "0.5")], ids=brief
)
def test_what_no_model_takes_is_refused_before_a_stranger_s_is_fetched(refused, no_weights, words):
    refused(2, "a fox", "-m", "someone/something", *words, says=(words[0],))


def test_what_sprint_cannot_use_is_refused_though_no_weights_are_here(refused, no_weights):
    refused(2, "a fox", "-m", "sana-sprint-0.6b", "--negative", "dog", says=("--negative",))


@pytest.mark.parametrize(
    "name",
    ["no/such.png", "", "-", "folder", "\udcff.png", "x" * 5000, "a\0b", "empty", "words", "half"],
    ids=brief,
)
def test_what_is_no_picture_is_refused_before_weights_are_read(
    refused, sprint, photo, tmp_path, name
):
    (tmp_path / "folder").mkdir()
    (tmp_path / "empty").touch()
    (tmp_path / "words").write_text("a thousand words")
    whole = Path(photo).read_bytes()
    (tmp_path / "half").write_bytes(whole[: len(whole) // 2])
    (sprint / TEXT).unlink()
    if name in ("folder", "empty", "words", "half"):
        name = str(tmp_path / name)
    refused(2, "a fox", "-m", str(sprint), *FAST, "--image", name, says=("--image",))


def test_a_picture_that_would_fill_the_memory_is_refused(refused, sprint, tmp_path):
    """A bomb: few bytes that unpack to a few hundred megapixels."""
    from PIL import Image

    path = tmp_path / "bomb.png"
    Image.new("1", (12_000, 12_000)).save(path)
    refused(2, "a fox", "-m", str(sprint), *FAST, "--image", str(path), says=("--image", "pixels"))


def test_a_picture_far_from_every_trained_shape_is_refused(refused, sprint, tmp_path):
    from PIL import Image

    Image.new("RGB", (900, 90)).save(tmp_path / "wide.png")
    words = ("--image", str(tmp_path / "wide.png"))
    refused(2, "a fox", "-m", str(sprint), *FAST, *words, says=("10.00:1",), hint="--res")


@pytest.mark.parametrize(
    ("config", "changes"),
    [
        ("model_index.json", {"_class_name": "SanaPipeline"}),
        ("model_index.json", {"_class_name": None}),
        ("transformer/config.json", {"guidance_embeds": False}),
    ],
    ids=["sana", "nameless", "no guidance"],
)
def test_a_folder_that_is_half_sprint_is_refused(refused, sprint, config, changes):
    edit(sprint / config, **changes)
    refused(1, "a fox", "-m", str(sprint), "--no-instruction", says=("guidance_embeds",))


def test_the_encoder_is_read_only_to_start_from_a_picture(refused, sana, here, sprint, photo):
    def cut(tensors):
        for name in [name for name in tensors if name.startswith("encoder.")]:
            del tensors[name]

    edit_tensors(sprint / VAE, cut)
    words = ("a fox", "-m", str(sprint), *FAST)
    refused(1, *words, "--image", photo, says=("vae", "missing encoder."))
    assert sana("generate", *words).code == 0
