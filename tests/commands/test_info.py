"""What someone at a shell sees of `sana info`."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, PngImagePlugin
from safetensors.torch import save_file

from examples import exhaustive
from recipes import RECIPE
from sana_cli.images import files as images
from sana_cli.images.metadata import Metadata
from sana_cli.instruction import INSTRUCTION
from sana_cli.recipe import Recipe
from sana_cli.shapes import TRAINED_SHAPES, SizeRequest, choose_canvas
from sana_cli.system import disk

DEMO = replace(
    RECIPE,
    **{"prompt": "a red circle on a blue background", "steps": 2},
    **dict.fromkeys(("width", "height", "native_width", "native_height"), 256),
)


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def save(name: str = "fox.png", **changes) -> str:
    """A picture of the recipe's size with the recipe in it; nobody draws it."""
    recipe = Recipe(**(DEMO.as_dict() | changes))
    pixels = np.zeros((recipe.height, recipe.width, 3), np.uint8)
    record = Metadata(recipe, "cpu", "2.13.0")
    disk.save(Path(name), images.encode(pixels, Path(name).suffix[1:], None, record), True)
    return name


@pytest.fixture
def in_shell(quick):
    """Run a line in a shell that finds `sana`."""

    def run(line: str) -> subprocess.CompletedProcess:
        environment = os.environ | {"PATH": f"{quick}{os.pathsep}{os.environ['PATH']}"}
        command = ["sh", "-ec", line]
        return subprocess.run(command, capture_output=True, timeout=300, env=environment)

    return run


# --- a folder ----------------------------------------------------------------------------------


def test_a_folder_lists_its_newest_images(sana, here):
    for number in range(22):
        name = save(f"{number}.png", seed=number, prompt=f"fox\n{number}")
        os.utime(name, (number, number))
    (here / "broken.webp").write_text("nothing")
    (here / "notes.txt").write_text("no image")
    os.utime("broken.webp", (99, 99))
    run = sana("info", ".")
    lines = run.out.splitlines()
    assert lines[0] == "broken.webp    is not a PNG, JPEG, WebP or AVIF"
    assert lines[1] == "21.png  256x256, demo, seed 21  fox 21"
    assert (run.code, len(lines)) == (0, 20)
    assert "the newest 20 of 23 images" in run.err
    found = json.loads(sana("info", "--json", ".").out)["images"]
    assert [row["path"] for row in found] == [
        "broken.webp",
        *(f"{n}.png" for n in range(21, -1, -1)),
    ]


def test_a_folder_without_images_is_an_error(sana, here):
    run = sana("info", ".")
    assert (run.code, run.out) == (2, "")
    assert "holds no PNG" in run.err


# --- the command that draws it again -----------------------------------------------------------


@pytest.mark.parametrize(
    "words",
    [
        *exhaustive(
            (("a red circle on a blue background", "-s", "7", "-o", "1.png"),),
            (("-s 7", "--res", "320x200", "--fit", "exact", "--instruction", "-o", "1.png"),),
        ),
        (
            *('it\'s "a" $HOME `b`\n!star,\n\n\ttab 🦊 \\', "--negative", "-x 'y' #"),
            *("-g", "3.7", "--solver", "flow-euler", "-o", "1.webp"),
        ),
        ("-", "--res", "200x200", "-o", "1.avif", "--dtype", "bfloat16"),
        ("a \x1b[31mred\x07 'circle'\\n \x9b", "-o", "1.png"),
    ],
    ids=["plain", "dash", "quotes", "stdin", "control"],
)
def test_the_line_draws_the_same_pixels(sana, process, in_shell, words):
    prompt, *options = words
    call = ("generate", *options, "-m", "demo", "--steps", "2")
    if prompt == "-":
        assert process(*call, "-", input=b"-\n").returncode == 0
    else:
        assert sana(*call, "--", prompt).code == 0
    (first,) = Path().iterdir()
    shown = sana("info", "--command", str(first))
    assert (shown.code, shown.err) == (0, "")
    assert "\x1b" not in shown.out
    done = in_shell(shown.out)
    assert done.returncode == 0, done.stderr
    (second,) = (path for path in Path().iterdir() if path != first)
    one, two = json.loads(sana("info", "--json", str(first), str(second)).out)["images"]
    assert one["recipe"] == two["recipe"]
    if first.suffix == ".png":
        with Image.open(first) as a, Image.open(second) as b:
            assert a.tobytes() == b.tobytes()


@pytest.mark.parametrize(
    "changes",
    [
        {"lora": "0:$(touch stolen)"},
        {"image": "0:;touch stolen;#", "strength": 0.5},
        {"mask": "0:`touch stolen`"},
        {"prompt": "a\x01'; touch stolen #"},
        {"negative": "\x7f\\\\'$(touch stolen)' !x"},
        {"model": "a'; touch stolen #"},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_the_line_runs_nothing_that_an_image_says(sana, in_shell, changes):
    shown = sana("info", "--command", save(**changes))
    assert shown.code == 0, shown.err
    done = in_shell(f"sana() {{ :; }}\n{shown.out}")
    assert (done.returncode, done.stderr) == (0, b"")
    assert not Path("stolen").exists()


def test_the_line_names_everything_that_it_can_and_says_what_it_cannot(sana):
    path = save(
        model="owner/fox",
        revision="a" * 40,
        instruction=INSTRUCTION,
        negative="v 1.0",
        fit="exact",
        guidance=4.0,
        text_dtype="bfloat16",
    )
    run = sana("info", "--command", path)
    assert run.out == (
        "sana generate 'a red circle on a blue background' --negative 'v 1.0' --model owner/fox"
        " --fit exact --steps 2 --guidance 4 --solver flow-dpm --res 256x256 --instruction"
        " --dtype float32 --text-precision bf16 --seed 7\n"
    )
    assert "drawn with revision 'aaaa" in run.err
    for changes, remark in [
        ({"instruction": "Draw: "}, "its instruction text is not the one of this version"),
        ({"model": "my model"}, "its model was a folder called 'my model'"),
        ({"image": "ab" * 32, "strength": 0.5}, "an image whose RGB bytes have SHA-256 'abab"),
    ]:
        assert remark in sana("info", "--command", save(**changes)).err


@pytest.mark.parametrize("side", TRAINED_SHAPES)
def test_an_exact_size_finds_every_trained_shape_again(side):
    """The line gives the size that was drawn, not the --ar that led to it."""
    for _, height, width in TRAINED_SHAPES[side]:
        canvas = choose_canvas(SizeRequest(None, width, height), None, "trained", side)
        assert canvas == (width, height, width, height)


def test_a_picture_of_another_tool_gives_a_line_with_what_is_known(sana):
    info = PngImagePlugin.PngInfo()
    info.add_text("parameters", "a fox\nSteps: 20, Sampler: Euler, CFG scale: 7, Size: 512x768")
    Image.new("RGB", (512, 768)).save("fox.png", pnginfo=info)
    run = sana("info", "--command", "fox.png")
    assert run.out == (
        "sana generate 'a fox' --steps 20 --guidance 7 --solver flow-euler --res 512x768\n"
    )
    assert "its seed is not known" in run.err
    assert "its model is not known" in run.err


# --- what it shows -----------------------------------------------------------------------------


def test_people_see_the_prompt_first_and_the_line_last(sana):
    run = sana("info", save(negative="blurry", width=300, height=300))
    lines = run.out.splitlines()
    assert run.code == 0
    assert lines[0] == "a red circle on a blue background"
    facts = dict(line.split(maxsplit=1) for line in lines[1:])
    assert facts["negative"] == "blurry"
    assert facts["seed"] == "7"
    assert facts["size"] == "300x300 (drawn at 256x256)"
    assert facts["sampling"] == "2 steps, flow-dpm, guidance 4.5, flow shift 3"
    assert facts["redraw"].startswith("sana generate 'a red circle on a blue background' --neg")
    assert all(line[11] == " " != line[12] for line in lines[1:])  # aligned
    assert run.err == ""


def test_a_prompt_cannot_play_tricks_on_the_terminal(sana):
    path = save(prompt="a \x1b]0;owned\x07 \u202efox\r [bold]:smile:[/bold] 👩\u200d🎨")
    for words in (("info", path), ("info", "--command", path)):
        out = sana(*words).out
        assert not set("\x1b\x07\r") & set(out)
        assert "\u202e" not in out or "--command" in words
        assert "[bold]:smile:[/bold] 👩\u200d🎨" in out


def test_json_is_one_document(sana):
    path = save(name="fox.webp")
    (document,) = json.loads(sana("info", "--json", path).out)["images"]
    assert document.pop("command").startswith("sana generate ")
    assert document == {
        "path": "fox.webp",
        "format": "webp",
        "width": 256,
        "height": 256,
        "source": "sana",
        "tool": "sana",
        "recipe": DEMO.as_dict(),
        "made": {"sana": document["made"]["sana"], "torch": "2.13.0", "device": "cpu"},
        "not_understood": {},
        "notes": [],
    }


def test_several_pictures_are_a_list_and_a_bad_one_stops_no_other(sana):
    Image.new("RGB", (8, 8)).save("bare.png")
    paths = (save("one.png"), "bare.png", save("two.jpeg", seed=8))
    run = sana("info", "--json", *paths)
    assert run.code == 1
    assert run.err.startswith("error: bare.png holds no recipe")
    rows = json.loads(run.out)["images"]
    assert [row["path"] for row in rows] == list(paths)
    assert [row["recipe"]["seed"] for row in rows if "recipe" in row] == [7, 8]
    assert rows[1]["error"] == "bare.png holds no recipe"
    run = sana("info", "--json", "bare.png")
    assert run.code == 1
    assert json.loads(run.out) == {"images": [{"path": "bare.png", "error": rows[1]["error"]}]}
    run = sana("info", "--command", "-q", *paths)
    assert [line.split("--seed ")[1] for line in run.out.splitlines()] == ["7", "8"]


def test_the_whole_instruction_only_with_verbose(sana):
    path = save(instruction=INSTRUCTION)
    assert "Enhanced" not in sana("info", path).out
    assert "- If the prompt is simple" in sana("info", "-v", path).out


def test_a_picture_drawn_without_metadata_is_one_line_and_a_hint(sana):
    assert sana("generate", "a", "-m", "demo", "--steps", "1", "--metadata", "none").code == 0
    (path,) = Path().iterdir()
    run = sana("info", str(path))
    assert (run.code, run.out) == (1, "")
    assert run.err.startswith(f"error: {path} holds no recipe\nhint: ")
    assert len(run.err.splitlines()) == 2


def test_what_is_no_picture_is_refused_in_a_line(sana, here):
    (here / "text.png").write_text("not a picture")
    (here / "folder").mkdir()
    os.mkfifo(here / "pipe")
    Image.new("RGB", (8, 8)).save("a.gif")
    for name, reason in [
        ("nothing.png", "cannot be read: No such file or directory"),
        ("text.png", "is not a PNG, JPEG, WebP or AVIF"),
        ("a.gif", "is not a PNG, JPEG, WebP or AVIF"),
        ("folder", "holds no PNG, JPEG, WebP or AVIF"),
        ("pipe", "is not a file"),
        ("", "No such file"),
        ("a\0b", "cannot be read"),
        ("x" * 5000, "File name too long"),
    ]:
        run = sana("info", name)
        assert (run.code, run.out) == (2, ""), name
        assert reason in run.err and "Traceback" not in run.err
        assert len(run.err) < 500


def test_json_and_command_exclude_each_other(sana):
    assert sana("info", save(), "--json", "--command").code == 2


def test_a_recipe_too_long_for_a_jpeg_is_refused_before_it_is_drawn(sana, here):
    run = sana("generate", "🦊" * 19_000, "-m", "demo", "-o", "fox.jpg")
    assert (run.code, run.out) == (2, "")
    assert "too long for a JPEG" in run.err and "denoise" not in run.err
    assert not list(here.iterdir())


def test_an_int8_text_encoder_is_asked_for_again(sana):
    line = sana("info", "--command", save(text_dtype="int8", dit_dtype="bfloat16")).out
    assert "--dtype bfloat16 --text-precision int8" in line
    line = sana("info", "--command", save(text_dtype="bfloat16", dit_dtype="float16")).out
    assert "--dtype float16" in line and "--text-precision" not in line


def test_it_never_imports_torch(here):
    code = f"""
import sys
sys.argv = ["sana", "info", {save()!r}]
from sana_cli.app import main
try:
    main()
except SystemExit as stop:
    assert not stop.code, stop.code
assert "torch" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def lora(name: str = "style.safetensors") -> str:
    """A LoRA of rank 4 for the first two blocks of the 1.6B, in PEFT's names."""
    tensors = {}
    for block in range(2):
        module = f"transformer.transformer_blocks.{block}.attn1.to_q"
        tensors[f"{module}.lora_A.weight"] = torch.ones(4, 2240)
        tensors[f"{module}.lora_B.weight"] = torch.ones(2240, 4)
    save_file(tensors, name)
    return name


def test_a_lora_is_described(process):
    run = process("info", lora())
    assert (run.returncode, run.stderr) == (0, b"")
    facts = dict(line.split(maxsplit=1) for line in run.stdout.decode().splitlines()[1:])
    assert facts["rank"] == "4"
    assert facts["modules"] == "2 in 2 blocks of width 2240"
    assert "1.6B" in facts["fits"]
    run = process("info", "--json", save(), lora())
    document = json.loads(run.stdout)
    assert [row["path"] for row in document["images"]] == ["fox.png"]
    (row,) = document["loras"]
    assert (row["path"], row["ranks"], row["width"]) == ("style.safetensors", [4], 2240)


def test_a_lora_has_no_command(process):
    run = process("info", "--command", lora())
    assert (run.returncode, run.stdout) == (2, b"")
    assert b"it has no command\nhint: leave out --command" in run.stderr


def test_a_checkpoint_that_is_no_lora_is_refused_by_name(process):
    save_file({"weight": torch.ones(2)}, "other.safetensors")
    run = process("info", "other.safetensors")
    assert (run.returncode, run.stdout) == (1, b"")
    assert b"other.safetensors" in run.stderr and b"Traceback" not in run.stderr
