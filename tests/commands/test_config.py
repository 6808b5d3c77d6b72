"""Choices that stand: in variables, ./sana.toml and the user's file, before the defaults."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tomlkit
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from sana_cli import app
from sana_cli.commands._defaults import ONE_CALL
from sana_cli.settings import declared

VERBS = app.command().commands
GENERATE = {p.name: p for p in VERBS["generate"].params}
BATCH = {p.name: p for p in VERBS["batch"].commands["run"].params}
KEYS = sorted(GENERATE.keys() - ONE_CALL)
# A value that each option takes, and that is not its default.
VALUES = {
    "res": "512",
    "ar": "16:9",
    "fit": "exact",
    "model": "demo",
    "negative": "blue",
    "steps": 3,
    "guidance": 2.5,
    "solver": "flow-euler",
    "server": "http://127.0.0.1:7262",
    "pag": 2.0,
    "vae": "lite",
    "instruction": False,
    "output": "out/",
    "format": "webp",
    "quality": 80,
    "metadata": "none",
    "device": "cpu",
    "dtype": "bfloat16",
    "memory": "6GB",
    "quant": "w8a8",
    "text_precision": "fp32",
    "cache": False,
    "offline": True,
    "preview": True,
    "quiet": True,
    "verbose": True,
    "color": False,
}
NOT_OF_A_BATCH = {"output", "preview"}  # its --output is a folder of its own
DRY = ("generate", "a red circle", "-s", "1", "--dry-run")


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch) -> Path:
    """A working folder with room for a sana.toml; the user's file is config/config.toml in it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SANA_CONFIG", str(tmp_path / "config" / "config.toml"))
    (tmp_path / "config").mkdir()
    return tmp_path


def toml(**values) -> str:
    return "".join(f"{key} = {json.dumps(value)}\n" for key, value in values.items())


def keep(level: str, monkeypatch, **values) -> str:
    """Write values at a level; what `config show` calls it, for a single value."""
    if level == "variable":
        for name, value in values.items():
            text = json.dumps(value) if isinstance(value, bool) else str(value)
            monkeypatch.setenv(f"SANA_{name.upper()}", text)
        return f"SANA_{next(iter(values)).upper()}"
    path = Path("sana.toml") if level == "project" else Path(os.environ["SANA_CONFIG"])
    path.write_text(toml(**values), encoding="utf-8")
    return "./sana.toml" if level == "project" else str(path)


def shown(sana, *words: str) -> dict:
    run = sana("config", "show", "--json", *words)
    assert run.code == 0, run.err
    return json.loads(run.out)


# --- rank --------------------------------------------------------------------------------------


def test_a_flag_comes_before_a_variable_the_project_the_user_and_the_default(sana, monkeypatch):
    def steps(*words: str) -> int:
        run = sana(*DRY, "-m", "demo", *words)
        assert run.code == 0, run.err
        return json.loads(run.out)["recipes"][0]["steps"]

    assert steps() == 20
    for number, level in enumerate(("user", "project", "variable"), start=4):
        origin = keep(level, monkeypatch, steps=number)
        assert steps() == number
        assert shown(sana)["settings"]["steps"] == {"value": number, "origin": origin}
    assert steps("--steps", "9") == 9


@pytest.mark.parametrize("level", ["variable", "project", "user"])
@pytest.mark.parametrize("name", KEYS)
def test_every_option_that_can_stand_is_taken_at_every_level(sana, monkeypatch, name, level):
    assert name in VALUES, f"{name} is new: give it a value here, or a reason in ONE_CALL"
    origin = keep(level, monkeypatch, **{name: VALUES[name]})
    assert shown(sana)["settings"][name] == {"value": VALUES[name], "origin": origin}


@pytest.mark.parametrize("command", ["generate", "batch"])
def test_what_stands_is_what_the_verbs_options_become(sana, monkeypatch, command, here):
    """Asked of the parameters themselves, through Click, as the verb would get them."""
    keep("project", monkeypatch, **VALUES)
    from sana_cli.commands._defaults import Defaults

    root = app.command()
    parent = root.make_context("sana", ["generate"], obj={})
    parent.default_map = Defaults(parent).defaults(root)
    _, verb, _ = root.resolve_command(parent, [command])
    words = ["x.txt"]
    context = verb.make_context(command, words, parent=parent)
    if command == "batch":
        name, run, rest = verb.resolve_command(context, ["run", "x.txt"])
        context = run.make_context(name, rest, parent=context)
    apart = NOT_OF_A_BATCH if command == "batch" else set()
    expected = {name: VALUES[name] for name in KEYS if name not in apart}
    taken = {name: context.params[name] for name in expected}
    assert taken == expected
    assert context.params.get("output") == (None if command == "batch" else "out/")


def test_options_of_a_batch_are_those_of_generate_by_their_very_words():
    """Else what stands would not reach it."""
    same = {n for n in KEYS if n in BATCH and BATCH[n].help == GENERATE[n].help}
    assert set(KEYS) - same == NOT_OF_A_BATCH


def test_an_empty_variable_is_no_choice(sana, monkeypatch):
    keep("project", monkeypatch, model="demo")
    monkeypatch.setenv("SANA_MODEL", "")
    assert shown(sana)["settings"]["model"]["origin"] == "./sana.toml"


def test_what_is_used_is_said_in_one_line_and_not_when_a_flag_replaces_it(sana, monkeypatch):
    keep("project", monkeypatch, model="demo", steps=3, cache=False)
    keep("variable", monkeypatch, guidance=2)
    run = sana(*DRY, "--steps", "4")
    assert run.err.splitlines()[0] == "from ./sana.toml: cache, model; from SANA_GUIDANCE: guidance"
    assert sana(*DRY, "-q").err == ""


# --- types -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("text", "value"), [("0", False), ("no", False), ("1", True)])
def test_switches_take_the_usual_words(sana, monkeypatch, text, value):
    monkeypatch.setenv("SANA_CACHE", text)
    assert shown(sana)["settings"]["cache"]["value"] is value


def test_a_number_may_stand_for_text_and_a_hyphen_for_an_underscore(sana, here):
    (here / "sana.toml").write_text("res = 512\ntext-precision = 'fp32'\n")
    settings = shown(sana)["settings"]
    assert settings["res"]["value"] == "512"
    assert settings["text_precision"]["value"] == "fp32"


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("steps = 'many'", ["./sana.toml: steps is 'many': ", "integer"]),
        ("steps = true", ["./sana.toml: steps is True: it is not a switch"]),
        ("steps = [1, 2]", ["./sana.toml: steps is [1, 2]: one string or number"]),
        ("dtype = 'float8'", ["./sana.toml: dtype is 'float8': ", "bfloat16"]),
        ("cache = 'perhaps'", ["./sana.toml: cache is 'perhaps': "]),
        ("stepz = 3", ["./sana.toml: unknown setting 'stepz'", "did you mean steps?"]),
        ("seed = 3", ["./sana.toml: seed cannot be kept: it belongs to one call"]),
        ("guidance = nan", ["./sana.toml: guidance is nan: it is not finite"]),
        (f"steps = {'9' * 5000}", ["./sana.toml cannot be read: ", "digits"]),
        (f"steps = {'[' * 5000}", ["./sana.toml"]),
        ("[generate]\nsteps = 3", ["./sana.toml: unknown setting 'generate'"]),
        ("steps = 3\nsteps == 4", ["./sana.toml is not valid TOML", "line 2"]),
    ],
)
def test_a_fault_in_a_file_is_one_line_and_a_hint(sana, here, line, words):
    (here / "sana.toml").write_text(line)
    run = sana(*DRY, "-m", "demo")
    assert (run.code, run.out) == (2, "")
    first, hint = run.err.splitlines()
    assert first.startswith("error: ") and hint.startswith("hint: ")
    assert all(word in run.err for word in words), run.err


SCALARS = st.one_of(
    *(st.text(), st.integers(), st.floats(), st.booleans(), st.datetimes()),
    *(st.lists(st.integers()), st.dictionaries(st.text(), st.integers())),
)


@given(
    content=st.one_of(
        st.binary(max_size=60),
        st.dictionaries(st.sampled_from(KEYS) | st.text(), SCALARS, max_size=4).map(
            lambda values: tomlkit.dumps(values).encode("utf-8", "replace")
        ),
    )
)
def test_no_file_whatever_it_holds_gives_more_than_error_lines(sana, content):
    Path("sana.toml").write_bytes(content)
    run = sana("config", "show", "--json")
    assert run.code in (0, 2), run.err
    assert (run.code == 2) == bool(json.loads(run.out)["problems"])
    if b"verbose" not in content:  # which asks for more
        assert all(line.startswith(("error: ", "hint: ")) for line in run.err.splitlines())


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_a_file_that_powershell_wrote_is_read_and_set_anew(sana, here, encoding):
    Path(os.environ["SANA_CONFIG"]).write_bytes("steps = 3\r\n# mine\r\n".encode(encoding))
    assert sana("config", "show").code == 0
    assert sana("config", "set", "guidance", "2").code == 0
    text = Path(os.environ["SANA_CONFIG"]).read_text(encoding="utf-8")
    assert text.splitlines()[:2] == ["steps = 3", "# mine"] and "guidance = 2" in text


def test_a_fault_in_a_variable_names_it(sana, monkeypatch):
    monkeypatch.setenv("SANA_STEPS", "many")
    run = sana(*DRY, "-m", "demo")
    assert (run.code, run.out) == (2, "")
    assert run.err.startswith("error: SANA_STEPS is 'many': ")


def test_a_fault_stops_only_those_who_need_the_value(sana, here):
    (here / "sana.toml").write_text("steps = 'many'")
    assert sana(*DRY, "-m", "demo", "--steps", "3").code == 0
    assert sana("models", "list").code == 0
    (here / "sana.toml").write_text("steps = ")
    assert sana("models", "list").code == 2
    help = sana("generate", "--help")
    assert (help.code, help.err) == (0, "")
    assert "the configuration is faulty" in " ".join(help.out.split())


def test_a_variable_that_is_nearly_a_setting_is_warned_of(sana, monkeypatch):
    monkeypatch.setenv("SANA_STEP", "3")
    monkeypatch.setenv("SANA_SEED", "3")
    monkeypatch.setenv("SANA_OF_SOMEBODY_ELSE", "3")
    run = sana(*DRY, "-m", "demo")
    assert run.code == 0
    warnings = [line for line in run.err.splitlines() if line.startswith("warning: ")]
    assert [line.split()[1] for line in warnings] == ["SANA_SEED", "SANA_STEP"]


def test_what_a_model_cannot_use_is_refused_with_its_origin(sana, monkeypatch):
    keep("project", monkeypatch, negative="blue")
    run = sana(*DRY, "-m", "sana-sprint-0.6b")
    assert run.code == 2
    assert "cannot use --negative" in run.err
    assert "(from ./sana.toml: negative)" in run.err


def test_what_is_typed_sets_aside_what_contradicts_it(sana, monkeypatch):
    keep("project", monkeypatch, model="demo", format="webp", quality=80, ar="1:1")
    run = sana(*DRY)
    assert json.loads(run.out)["paths"] == ["a-red-circle-1.webp"]
    run = sana(*DRY, "-o", "fox.png", "--res", "256x256")
    assert json.loads(run.out)["paths"] == ["fox.png"]
    assert run.err.splitlines()[:2] == [
        "from ./sana.toml: model",
        "ignored for this call: ar, format, quality",
    ]
    assert sana(*DRY, "--quality", "50", "-o", "fox.png").code == 2  # as ever


# --- replay ------------------------------------------------------------------------------------


def test_the_recipe_in_a_picture_comes_before_what_stands(sana, monkeypatch, tmp_path):
    call = ("generate", "a red circle", "-m", "demo", "-s", "5", "--steps", "2")
    assert sana(*call, "-o", "first.png").code == 0
    keep(
        "project",
        monkeypatch,
        **{"model": "sana-1.6b-4k", "steps": 7, "guidance": 1.5, "ar": "16:9", "negative": "blue"},
        **{"text_precision": "fp32", "dtype": "bfloat16", "solver": "flow-euler"},
    )
    keep("variable", monkeypatch, fit="exact", instruction=True)
    run = sana("generate", "--from", "first.png", "-o", "second.png")
    assert run.code == 0, run.err
    with Image.open("first.png") as one, Image.open("second.png") as two:
        assert one.tobytes() == two.tobytes()
        assert json.loads(one.text["sana"])["recipe"] == json.loads(two.text["sana"])["recipe"]


def test_what_stands_fills_what_a_recipe_leaves_open(sana, monkeypatch, tmp_path):
    from PIL.PngImagePlugin import PngInfo

    text = PngInfo()
    text.add_text("parameters", "a red circle\nSteps: 3, CFG scale: 4, Seed: 7, Size: 256x256")
    Image.new("RGB", (256, 256)).save("other.png", pnginfo=text)
    keep("project", monkeypatch, model="demo", steps=9, negative="blue")
    run = sana("generate", "--from", "other.png", "--dry-run")
    recipe = json.loads(run.out)["recipes"][0]
    assert (recipe["model"], recipe["steps"], recipe["negative"]) == ("demo", 3, "")


# --- show and path -----------------------------------------------------------------------------


def test_show_tells_where_everything_is(sana, here, cache):
    (cache / "text").mkdir()
    (cache / "text" / "a.safetensors").write_bytes(bytes(1234))
    found = shown(sana)
    assert list(found["settings"]) == [name for name in GENERATE if name in KEYS]
    assert {row["origin"] for row in found["settings"].values()} == {"default"}
    places = found["places"]
    assert places["user_file"] == {"path": os.environ["SANA_CONFIG"], "exists": False}
    assert places["project_file"] == {"path": str(here / "sana.toml"), "exists": False}
    assert places["cache"] == {"path": str(cache), "bytes": 1234}
    assert Path(places["lock"]["path"]).name == "weights.lock.json"
    assert Path(places["hub_cache"]["path"]).is_absolute()
    run = sana("config", "show")
    assert (run.code, run.err) == (0, "")
    rows = {line.split()[0]: line.split()[1:] for line in run.out.splitlines()[1 : len(KEYS) + 1]}
    assert rows["fit"] == ["trained", "default"]
    assert rows["steps"] == ["-", "default"]
    assert os.environ["SANA_CONFIG"] in run.out


def test_show_shows_the_rest_when_something_is_wrong(sana, here):
    (here / "sana.toml").write_text("steps = 'many'\nmodel = 'demo'\n")
    run = sana("config", "show", "--json")
    assert run.code == 2
    found = json.loads(run.out)
    assert found["settings"]["model"]["value"] == "demo"
    assert found["settings"]["steps"] == {"value": None, "origin": "invalid"}
    assert found["problems"][0].startswith("./sana.toml: steps is 'many'")
    assert found["problems"][0] in run.err


def test_path_is_the_users_file(sana, monkeypatch, tmp_path):
    assert sana("config", "path").out == f"{tmp_path}/config/config.toml\n"
    monkeypatch.delenv("SANA_CONFIG")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "xdg"))
    expected = Path(sana("config", "path").out.strip())
    assert expected.name == "config.toml" and expected.parent.name == "sana"
    if sys.platform == "linux":
        assert expected == tmp_path / "xdg" / "sana" / "config.toml"


def test_config_imports_nothing_heavy():
    code = """
import sys
sys.argv = ["sana", "config", "show"]
from sana_cli.app import main
try:
    main()
except SystemExit as stop:
    assert not stop.code, stop.code
found = [name for name in ("torch", "transformers", "numpy", "tomlkit") if name in sys.modules]
assert not found, found
"""
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# --- set ---------------------------------------------------------------------------------------


def user_file() -> Path:
    return Path(os.environ["SANA_CONFIG"])


@pytest.mark.parametrize("name", KEYS)
def test_what_is_set_is_what_stands(sana, name):
    value = VALUES[name]
    text = json.dumps(value) if isinstance(value, bool) else str(value)
    run = sana("config", "set", name.replace("_", "-"), text)
    assert (run.code, run.out) == (0, ""), run.err
    assert shown(sana)["settings"][name] == {"value": value, "origin": str(user_file())}
    assert sana("config", "set", name, "--unset").code == 0
    assert shown(sana)["settings"][name]["origin"] == "default"


def test_set_and_unset_keep_comments_order_and_other_keys(sana):
    before = "# mine\nmodel = 'demo' # always\n\ntext-precision = \"fp32\"\nsteps = 4  # few\n"
    user_file().write_text(before)
    assert sana("config", "set", "steps", "30").code == 0
    assert sana("config", "set", "text_precision", "int8").code == 0
    changed = before.replace("= 4", "= 30").replace("fp32", "int8")
    assert user_file().read_text() == changed
    assert sana("config", "set", "steps", "--unset").code == 0
    assert user_file().read_text() == changed.replace("steps = 30  # few\n", "")
    assert os.listdir(user_file().parent) == ["config.toml"]


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (("steps", "many"), "steps cannot be 'many'"),
        (("steps", "0"), "--steps 0 is not between"),
        (("res", "77q"), "'77q' is not a resolution"),
        (("device", "foo"), "--device 'foo' is not a device"),
        (("device", "cuda:01"), "--device 'cuda:01' is not a device"),
        (("memory", "lots"), "'lots' is not an amount"),
        (("quality", "101"), "--quality 101 is not between"),
        (("stepz", "3"), "did you mean steps?"),
        (("seed", "3"), "it belongs to one call"),
        (("steps",), "either a VALUE or --unset"),
        (("steps", "3", "--unset"), "either a VALUE or --unset"),
    ],
)
def test_what_cannot_stand_is_not_set(sana, words, reason):
    run = sana("config", "set", *words)
    assert run.code == 2
    assert reason in run.err
    assert not user_file().exists()


BOUNDED = {name: one.option.bounds for name, one in declared().items() if one.option.bounds}


@pytest.mark.parametrize("name", sorted(BOUNDED.keys() & set(KEYS)))
def test_a_number_out_of_its_bounds_is_not_set(sana, name):
    run = sana("config", "set", name, str(int(BOUNDED[name][1]) + 1))
    assert run.code == 2
    assert "is not between" in run.err
    assert not user_file().exists()


def test_set_says_when_something_else_has_the_higher_rank(sana, monkeypatch):
    keep("project", monkeypatch, steps=3)
    run = sana("config", "set", "steps", "5")
    assert "warning: ./sana.toml has the higher rank here: steps is 3" in run.err


def test_set_mends_what_was_wrong(sana):
    user_file().write_text("steps = 'many'\n")
    assert sana(*DRY, "-m", "demo").code == 2
    assert sana("config", "set", "steps", "5").code == 0
    assert sana(*DRY, "-m", "demo").code == 0


def test_set_leaves_a_file_that_is_no_toml_alone(sana):
    user_file().write_text("steps = \n")
    run = sana("config", "set", "steps", "5")
    assert run.code == 2
    assert "line 1" in run.err
    assert user_file().read_text() == "steps = \n"


def test_set_follows_a_link_and_keeps_it(sana, here):
    (here / "dotfiles.toml").write_text("# kept\n")
    user_file().symlink_to(here / "dotfiles.toml")
    assert sana("config", "set", "model", "demo").code == 0
    assert user_file().is_symlink()
    assert (here / "dotfiles.toml").read_text() == '# kept\nmodel = "demo"\n'


def test_a_home_that_cannot_be_written_is_one_line_and_one_that_is_absent_is_no_fault(
    sana, monkeypatch, here
):
    (here / "file").write_text("")
    monkeypatch.setenv("SANA_CONFIG", str(here / "file" / "config.toml"))
    assert sana(*DRY, "-m", "demo").code == 0
    run = sana("config", "set", "model", "demo")
    assert run.code == 1
    first, hint = run.err.splitlines()
    assert "cannot be written" in first and "SANA_CONFIG" in hint
    monkeypatch.setenv("SANA_CONFIG", os.devnull)
    assert sana(*DRY, "-m", "demo").code == 0
    assert sana("config", "set", "model", "demo").code == 2


def test_a_file_that_cannot_be_read_is_one_line(sana, here):
    (here / "sana.toml").mkdir()
    run = sana(*DRY, "-m", "demo")
    assert run.code == 2
    assert run.err.splitlines()[0].startswith("error: ./sana.toml cannot be read: ")


def test_errors_are_as_colourless_and_as_talkative_as_was_set(process, monkeypatch):
    environment = {k: v for k, v in os.environ.items() if k != "NO_COLOR"} | {"FORCE_COLOR": "1"}
    call = ("generate", "x", "-m", "nowhere/", "--offline")
    red = b"\x1b[1;31m"
    assert red in process(*call, env=environment).stderr
    plain = process(*call, env=environment | {"SANA_COLOR": "0"})
    assert b"error: " in plain.stderr.replace(b"\x1b[0m", b"") and red not in plain.stderr
    loud = process(*call, env=environment | {"SANA_VERBOSE": "1"})
    assert b"Traceback" in loud.stderr
