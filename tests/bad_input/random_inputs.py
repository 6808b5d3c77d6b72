"""What might be typed, written into a file or said in a header: right values, those of another
place, and anything.
"""

import json

from hypothesis import settings
from hypothesis import strategies as st

from faults import DAMAGE, damaged
from sana_cli.settings import FileOptions, RunOptions, Seeds, Settings, declared, flag

FUZZ = settings(max_examples=max(1, settings.default.max_examples // 4), database=None)
OPTIONS = declared(Settings, Seeds, FileOptions, RunOptions)
# Nothing that a terminal could not pass: no NUL.
TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=12)
NUMBERS = st.sampled_from(["0", "-1", "1", "2", "3.5", "1e3", "nan", "inf", "4294967296", "٣", ""])
FILES = st.sampled_from(["in.png", "mask.png", "cut.png", "text.png", "lora.safetensors", ".", "x"])
SIZES = st.sampled_from(["256", "512", "200x180", "256x256", "0", "1x1", "1k", "4096", "-512"])
SHAPES = st.sampled_from(["16:9", "1:1", "0:1", "9:16", "1:1000"])
MODELS = st.sampled_from(["demo", "sana-0.6b-512", "sana-sprint-0.6b", "dmeo", "a/b", "lora:2"])
ANY = (NUMBERS, FILES, SIZES, SHAPES, MODELS, TEXT)


@st.composite
def values(draw, name: str) -> str:
    """What might be typed after an option: what it takes, what another takes, and anything."""
    option = OPTIONS[name].option
    pools = list(ANY)
    if option.choices:
        pools += [st.sampled_from(option.choices)] * len(pools)
    if option.bounds:
        low, high = option.bounds
        edges = [low, high, low - 1, high + 1, (low + high) / 2]
        pools += [st.sampled_from([f"{edge:g}" for edge in edges])] * len(pools)
    own = {"res": SIZES, "ar": SHAPES, "model": MODELS, "image": FILES, "mask": FILES}
    pools += [own[name]] * len(pools) if name in own else []
    return draw(st.one_of(pools))


# `count` is tested in `test_call.py`: a hundred thousand recipes take their time.
NAMES = st.sampled_from([name for name in OPTIONS if name != "count"])


@st.composite
def words(draw) -> list[str]:
    """The words of a call."""
    given = list(draw(st.lists(TEXT, max_size=2)))
    for name in draw(st.lists(NAMES, max_size=4)):
        if OPTIONS[name].kind is bool:
            given.append(draw(st.sampled_from([flag(name), f"--no-{flag(name)[2:]}"])))
        else:
            given += [flag(name), draw(values(name))]
    given += draw(st.lists(st.sampled_from(["--json", "-q", "-v", "--", "-n2", "--force"])))
    return draw(st.permutations(given)) if draw(st.booleans()) else given


CELLS = NAMES.flatmap(values) | TEXT
JSON = CELLS | st.none() | st.booleans() | st.integers() | st.floats() | st.lists(st.integers())

DTYPES = st.sampled_from(["F32", "BF16", "F64", "I64", "U8", "BOOL", "F8_E4M3", "F4", "C64", "x"])
PLACES = st.sampled_from([-1, 0, 1, 2, 4, 8, 1 << 31, 1 << 40, (1 << 63) - 1, 1 << 63, 1 << 64])
NEW_FACTS = {
    "dtype": DTYPES | JSON,
    "shape": st.lists(PLACES | st.integers(0, 4), max_size=4) | JSON,
    "data_offsets": st.lists(PLACES, min_size=2, max_size=2) | JSON,
}


@st.composite
def headers(draw, original: bytes) -> bytes:
    """The length and the JSON of a safetensors file's header, with something wrong, most likely."""
    kind = draw(st.sampled_from(["bytes", "length", "facts", "facts"]))
    if kind == "bytes":
        return damaged(original, draw(DAMAGE), len(original))
    if kind == "length":
        size = draw(PLACES.filter(lambda place: 0 <= place < 1 << 64) | st.integers(0, 1 << 20))
        return size.to_bytes(8, "little") + original[8:]
    tensors = json.loads(original[8:])
    for name in draw(st.lists(st.sampled_from(sorted(tensors)), min_size=1, max_size=3)):
        what = draw(st.sampled_from([*NEW_FACTS, "name", "all", "gone", "__metadata__"]))
        if what == "__metadata__":
            tensors[what] = draw(st.dictionaries(TEXT, TEXT, max_size=2) | JSON)
        elif what == "all":
            tensors[name] = draw(JSON)
        elif what in ("gone", "name"):
            facts = tensors.pop(name, {})
            if what == "name":
                tensors[draw(TEXT | st.just(f"{name}.SCB") | st.just(f"model.{name}"))] = facts
        elif isinstance(tensors.get(name), dict):
            tensors[name][what] = draw(NEW_FACTS[what])
    text = json.dumps(tensors).encode()
    return len(text).to_bytes(8, "little") + text
