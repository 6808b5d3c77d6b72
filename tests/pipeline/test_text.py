"""Texts: read in any script, run through Gemma once, found again on disk."""

import json
import os
import shutil
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from examples import exhaustive
from reference import TOKENIZER, text_encoder
from sana_cli.instruction import INSTRUCTION
from sana_cli.pipeline.text_cache import TextCache
from sana_cli.system.folders import cache_folder
from sana_cli.weights.layout import folder_parts
from sana_cli.weights.tensor_cache import TensorCache, identity

DEMO = Path(__file__).resolve().parents[2] / "sana_cli" / "demo"
CALL = ("generate", "-m", "demo", "-r", "256", "-s", "1", "--steps", "1", "--device", "cpu")
TEXTS = {
    "chinese": "一只狐狸在雪地里",
    "japanese": "雪の中のキツネ、ｶﾅ",
    "emoji": "a 🦊 in ❄️",
    "family": "👩‍👩‍👧‍👦 and 🏳️‍🌈 with 👍🏽",
    "arabic": "ثعلب أحمر في الثلج",
    "hebrew": "שׁוּעָל אָדֹם \u200fabc\u200e",
    "hindi": "हिन्दी में लोमड़ी",
    "composed": "café Å",
    "decomposed": "cafe\u0301 A\u030a",
    "zalgo": "f̷̢̛o̴͚͝x̸̱̔",
    "controls": "a\u00a0fox\u2028in\tsnow\u200b",
    "rare plane": "𠜎𝕗𝕠𝕩 \U0010ffff",
}
SCRIPTS = pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS.keys())


def relative_error(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return ((ours - theirs).norm() / theirs.norm()).item()


def demo_cache(folder: Path, precision: str = "float32") -> TextCache:
    return TextCache(folder, folder_parts(DEMO), precision, "cpu")


# --- reading -----------------------------------------------------------------------------------


@SCRIPTS
def test_a_prompt_of_any_script_becomes_the_tokens_of_transformers(text):
    from transformers import AutoTokenizer

    ours = text_encoder(DEMO)
    theirs = AutoTokenizer.from_pretrained(TOKENIZER)
    for prompt in (text, INSTRUCTION + text):
        ids = ours.tokens(prompt)
        assert ids == theirs(prompt).input_ids
        assert ours.tokenizer.decode(ids[1:]) == prompt, "some of the prompt is lost"


def test_composed_and_decomposed_letters_stay_what_they_are():
    tokens = text_encoder(DEMO).tokens
    assert tokens(TEXTS["composed"]) != tokens(TEXTS["decomposed"])


@pytest.mark.parametrize("format", ["png", "webp"])
def test_prompts_of_any_script_are_stored_as_they_were_typed(sana, tmp_path, format):
    negative = " ".join(TEXTS.values())
    call = (*CALL, "--negative", negative, "-o", f"{tmp_path}/", "--format", format)
    run = sana(*call, *TEXTS.values())
    assert run.code == 0, run.err
    for path, text in zip(run.out.splitlines(), TEXTS.values(), strict=True):
        with Image.open(path) as image:
            if format == "png":
                record, said = image.text["sana"], image.text["parameters"]
            else:
                exif = image.getexif()
                record = exif[0x010E]
                said = exif.get_ifd(0x8769)[0x9286].removeprefix(b"UNICODE\0").decode("utf-16-be")
        recipe = json.loads(record)["recipe"]
        assert (recipe["prompt"], recipe["negative"]) == (text, negative)
        assert said.startswith(f"{text}\nNegative prompt: {negative}\n")


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("chinese", "一只狐狸在雪地里-1.png"),
        ("emoji", "a-in-1.png"),
        ("family", "and-with-1.png"),
        ("arabic", "ثعلب-أحمر-في-الثلج-1.png"),
        ("hindi", "हिन्दी-में-लोमड़ी-1.png"),
        ("decomposed", "café-å-1.png"),
    ],
)
def test_a_file_is_named_in_the_script_of_its_prompt(sana, tmp_path, text, name):
    run = sana(*CALL, TEXTS[text], "-o", f"{tmp_path}/")
    assert run.code == 0, run.err
    assert os.listdir(tmp_path) == [name]
    assert run.out == f"{tmp_path}/{name}\n"


# --- the instruction's prefix ------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "prompt",
    ["a red fox", "red", "狐", "🦊", "  a  fox ", "word " * 400],
    ids=["merged", "one", "chinese", "emoji", "spaces", "long"],
)
def test_behind_a_kept_prefix_the_states_are_those_of_the_whole_text(cache, precision, prompt):
    plain = text_encoder(DEMO, precision)
    kept = text_encoder(DEMO, precision, demo_cache(cache, precision))
    again = text_encoder(DEMO, precision, demo_cache(cache, precision))
    with torch.inference_mode():
        whole = plain.encode(prompt, INSTRUCTION)
        first, second = (encoder.encode(prompt, INSTRUCTION) for encoder in (kept, again))
    assert whole.shape[1] == min(300, whole.shape[1]) > 1
    assert torch.equal(first, second), "a prefix read from disk is the one that was written"
    bound = 1e-5 if precision == "float32" else 1e-2
    assert relative_error(first.float(), whole.float()) < bound


def test_the_instruction_is_run_once_for_all_prompts_and_all_runs(cache):
    seen = []

    def tokens_run(encoder, *prompts):
        encoder.model.layers[0].register_forward_pre_hook(lambda _, x: seen.append(x[0].shape[1]))
        seen.clear()
        for prompt in prompts:
            encoder.encode(prompt, INSTRUCTION)
        return list(seen)

    first = tokens_run(text_encoder(DEMO, cache=demo_cache(cache)), "a red fox", "an owl")
    second = tokens_run(text_encoder(DEMO, cache=demo_cache(cache)), "a green owl")
    assert first[0] > 500 and max(first[1:]) < 10
    assert len(second) == 1 and second[0] < 10


def test_a_past_can_be_cut_anywhere():
    model = text_encoder(DEMO).model
    ids = torch.randint(4, 500, (2, 31), generator=torch.Generator().manual_seed(0))
    whole, past = model(ids)
    for cut in (1, 13, 30):
        behind, own = model(ids[:, cut:], [(k[:, :, :cut], v[:, :, :cut]) for k, v in past])
        assert relative_error(behind, whole[:, cut:]) < 1e-5
        assert own[0][0].shape[2] == 31 - cut


# --- states found again ------------------------------------------------------------------------


def picture(run, *words: str) -> bytes:
    """Of the one picture of a call, which must succeed."""
    done = run(*CALL, *words, "-f", "-v")
    assert done.code == 0, done.err
    return Path(done.out.strip()).read_bytes()


def kept(cache: Path) -> list[Path]:
    return sorted((cache / "text").glob("*"))


@pytest.mark.parametrize(
    "words",
    [(), ("--instruction",), ("--instruction", "--text-precision", "int8")],
    ids=["", "instruction", "int8"],
)
def test_a_text_that_was_read_before_gives_the_same_bytes(sana, cache, tmp_path, words):
    call = ("a green ring on white", "-o", f"{tmp_path}/x.png", *words)
    missed = picture(sana, *call)
    times = [path.stat().st_ino for path in kept(cache)]
    assert picture(sana, *call) == missed
    assert times == [path.stat().st_ino for path in kept(cache)], "nothing was computed again"
    if "int8" in words or not words:  # else equal to rounding
        assert picture(sana, *call, "--no-cache") == missed


def test_a_run_says_with_verbose_what_it_found(sana, tmp_path):
    call = (*CALL, "-o", f"{tmp_path}/", "-v")
    assert "0 of 2 texts found" in sana(*call, "a fox").err
    assert "2 of 2 texts found" in sana(*call, "a fox").err
    # The negative prompt is known, and case and outer space are not read.
    assert "2 of 4 texts found" in sana(*call, "an owl", " An OWL", "a cat").err
    assert "text cache" not in sana(*call, "an owl", "--no-cache").err


def test_with_every_text_found_neither_gemma_nor_its_tokenizer_is_loaded(tmp_path):
    words = [*CALL, "a blue star", "-o", f"{tmp_path}/x.png", "-f"]
    code = f"""
import sys
sys.argv = ["sana", *{words!r}]
from sana_cli.app import main
try:
    main()
except SystemExit as stop:
    assert not stop.code, stop.code
text = {{"tokenizers", "transformers", "bitsandbytes", "sana_cli.pipeline.text_encoder"}}
print(sorted(text & set(sys.modules)))
"""
    runs = [
        subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True)
        for _ in range(2)
    ]
    assert [run.returncode for run in runs] == [0, 0], runs[-1].stderr
    first, second = (run.stdout.splitlines()[-1] for run in runs)
    assert first == "['sana_cli.pipeline.text_encoder', 'tokenizers']"
    assert second == "[]"


def test_no_cache_reads_nothing_and_writes_nothing(sana, cache, tmp_path):
    call = ("a red heart", "-o", f"{tmp_path}/x.png")
    right = picture(sana, *call, "--no-cache")
    assert not list(cache.iterdir())
    assert picture(sana, *call) == right
    for path in kept(cache):  # put other states in their place
        store = TensorCache(path.parent, 2**30, [])
        store.path = lambda *_, path=path: path
        store.write({"states": torch.randn_like(load_file(path)["states"])})
    assert picture(sana, *call) != right
    assert picture(sana, *call, "--no-cache") == right


@pytest.fixture
def copy(tmp_path) -> Path:
    return Path(shutil.copytree(DEMO, tmp_path / "copy"))


def _other_weights(model: Path) -> None:
    path = model / "text_encoder" / "model.safetensors"
    tensors = load_file(path)
    tensors["norm.weight"] = tensors["norm.weight"] * 1.5
    save_file(tensors, path)


def _other_config(model: Path) -> None:
    path = model / "text_encoder" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"rms_norm_eps": 1e-2}))


def _other_tokenizer(model: Path) -> None:
    path = model / "tokenizer" / "tokenizer.json"
    path.write_text(path.read_text().replace('"▁"', '"_"'))


@pytest.mark.parametrize("change", [_other_weights, _other_config, _other_tokenizer])
def test_states_of_another_encoder_are_never_taken(cache, copy, change):
    before = TextCache(cache, folder_parts(copy), "float32", "cpu")
    before.keep_states(torch.ones(1, 3, 4), "a fox", "")
    assert before.states("a fox", "") is not None
    assert TextCache(cache, folder_parts(DEMO), "float32", "cpu").states("a fox", "") is not None
    change(copy)
    assert TextCache(cache, folder_parts(copy), "float32", "cpu").states("a fox", "") is None


def test_states_of_another_text_or_precision_are_never_taken(cache):
    texts = demo_cache(cache)
    texts.keep_states(torch.ones(1, 3, 4), "a fox", "")
    assert texts.states("a fox ", "") is None
    assert texts.states("a fo", "x") is None
    assert texts.states("", "a fox") is None
    for other in ("bfloat16", "int8"):
        assert demo_cache(cache, other).states("a fox", "") is None


@pytest.mark.parametrize("place", [0, 12, 200, -1])
@pytest.mark.parametrize("damage", ["flip", "cut", "empty", "other"])
def test_a_broken_file_is_dropped_and_made_again(cache, place, damage):
    states = torch.randn(1, 5, 64)
    texts = demo_cache(cache)
    texts.keep_states(states, "a fox", "")
    (path,) = kept(cache)
    data = bytearray(path.read_bytes())
    if damage == "flip":
        data[place] ^= 1
    elif damage == "cut":
        data = data[:place]
    else:
        data = bytearray() if damage == "empty" else bytearray(b"x" * len(data))
    path.write_bytes(data)
    found = texts.states("a fox", "")
    # A few bits of a safetensors header are spaces that mean nothing.
    assert found is None or torch.equal(found, states)
    if found is None:
        assert not path.exists()
    texts.keep_states(states, "a fox", "")
    assert torch.equal(texts.states("a fox", ""), states)


def test_what_was_used_longest_ago_goes_first(tmp_path):
    store = TensorCache(tmp_path / "s", 20_000, [])
    for i in range(4):
        store.write({"x": torch.full((1000,), float(i))}, i)
        os.utime(store.path(i), (i + 1, i + 1))
    assert store.read(0) is not None  # which makes it the latest
    store.write({"x": torch.zeros(1000)}, 4)
    assert [store.read(i) is not None for i in range(5)] == [True, False, False, True, True]
    total = sum(path.stat().st_size for path in store.folder.iterdir())
    assert 10_000 < total <= 15_000
    for i in range(100):
        store.write({"x": torch.zeros(1000)}, "more", i)
    assert sum(path.stat().st_size for path in store.folder.iterdir()) <= 20_000


def test_a_file_left_half_written_by_a_killed_process_goes_in_time(tmp_path):
    old, new = tmp_path / "old.partial", tmp_path / "new.partial"
    for path in (old, new):
        path.write_text("half")
    os.utime(old, (time.time() - 7200, time.time() - 7200))
    TensorCache(tmp_path, 1000, []).write({"x": torch.zeros(1)}, 1)
    assert not old.exists() and new.exists()


@pytest.mark.skipif(os.name != "posix", reason="file modes")
def test_nothing_of_a_prompt_can_be_read_in_the_cache(sana, cache, tmp_path):
    prompt = "a secret fox"
    run = sana(*CALL, prompt, "--instruction", "-o", f"{tmp_path}/")
    assert run.code == 0, run.err
    assert stat.S_IMODE((cache / "text").stat().st_mode) == 0o700
    assert len(kept(cache)) == 3  # the prompt, the negative prompt, the instruction
    for path in kept(cache):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert len(path.stem) == 64 and int(path.stem, 16)
        assert b"secret" not in path.read_bytes()


@pytest.mark.parametrize(("words", "weights"), [([], 0), *exhaustive((["int8"], 1))])
def test_two_processes_at_once_do_no_harm(program, cache, tmp_path, words, weights):
    precision = [f"--text-precision={word}" for word in words]
    call = [program, *CALL, "a red star", "--instruction", *precision, "-q"]
    both = [subprocess.Popen([*call, "-o", f"{tmp_path}/{name}.png"]) for name in "ab"]
    assert [process.wait(120) for process in both] == [0, 0]
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    assert (len(kept(cache)), len(list(cache.glob("int8/*")))) == (3, weights)


def test_a_cache_that_cannot_be_written_is_a_warning(sana, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("SANA_CACHE_DIR", str(tmp_path / "file"))
    run = sana(*CALL, "a red star", "-o", f"{tmp_path}/")
    assert run.code == 0
    assert run.err.count("warning:") == 1 and "cannot be written" in run.err
    assert (tmp_path / "file").read_text() == "in the way"


@pytest.mark.skipif(sys.platform != "linux", reason="XDG")
def test_the_cache_lies_where_the_platform_keeps_caches(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("SANA_CACHE_DIR", "")
    assert cache_folder() == tmp_path / "sana"
    monkeypatch.setenv("SANA_CACHE_DIR", "~/elsewhere")
    assert cache_folder() == Path.home() / "elsewhere"


def test_gigabytes_are_identified_without_reading_them(tmp_path):
    large = tmp_path / "blobs" / ("0" * 64)
    large.parent.mkdir()
    with open(large, "wb") as file:
        file.truncate(200 * 2**30)  # takes no room on the disk, and minutes to read
    link = tmp_path / "model.safetensors"
    link.symlink_to(large)
    in_the_hub = identity([link])
    os.utime(large, (1, 1))
    assert identity([link]) == in_the_hub, "its name there is its content's hash"
    plain = large.rename(tmp_path / "plain")
    before = identity([plain])
    with open(plain, "r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"x")
    os.utime(plain, (1, 1))
    assert identity([plain]) != before
    os.utime(plain, (2, 2))
    assert identity([plain]) != before
