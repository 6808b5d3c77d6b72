"""What a file of jobs may look like, and how its faults are told."""

import bisect
import csv
import io
import itertools
import json

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from sana_cli.batch.rows import FORMATS, Fault, Row, parse
from sana_cli.batch.shards import Shard, parse_shard
from sana_cli.batch.templates import alternatives, columns_of, fill
from sana_cli.errors import UsageError


def rows(text: str | bytes, format: str, *used: str) -> list:
    data = text.encode() if isinstance(text, str) else text
    return list(parse(data.splitlines(keepends=True), format, used))


def fields(text: str, format: str, *used: str) -> list[dict]:
    found = rows(text, format, *used)
    assert all(isinstance(row, Row) for row in found), found
    return [row.fields for row in found]


def fault(text: str | bytes, format: str, *used: str) -> Fault:
    (found,) = (row for row in rows(text, format, *used) if isinstance(row, Fault))
    return found


# --- files -------------------------------------------------------------------------------------


def test_a_text_file_is_a_prompt_a_line_without_comments():
    text = "\ufeff# birds\na heron\r\n\n  an owl, #2  \n"
    assert [(r.number, r.fields) for r in rows(text, "txt")] == [
        (2, {"prompt": "a heron"}),
        (4, {"prompt": "an owl, #2"}),
    ]


def test_braces_and_backslashes_of_a_text_file_are_left_alone():
    assert fields("a {red|blue} \\fox {\n", "txt") == [{"prompt": "a {red|blue} \\fox {"}]


def test_json_lines_hold_the_options_by_their_names():
    line = '{"prompt": "a fox", "text-precision": "fp32", "steps": 4, "seed": [1, 5], "res": 512}'
    assert fields(f'{line}\n\n{{"prompt": "x", "guidance": 2, "instruction": false}}', "jsonl") == [
        {"prompt": "a fox", "text_precision": "fp32", "steps": 4, "seed": "1,5", "res": "512"},
        {"prompt": "x", "guidance": 2.0, "instruction": False},
    ]


def test_json_of_any_depth_is_at_most_the_fault_of_its_row():
    def too_deep(depth: int) -> bool:
        try:
            return json.loads("[" * depth + "0" + "]" * depth) is None
        except RecursionError:
            return True

    limit = bisect.bisect(range(50_000), False, key=too_deep)  # of Python's parser
    for depth in range(limit - 60, limit + 5):
        deep = "[" * depth + "]" * depth
        found, good = rows(f'{{"prompt": "a fox", "seed": {deep}}}\n{{"prompt": "x"}}', "jsonl")
        assert isinstance(found, Fault) and found.row == 1
        assert isinstance(good, Row)


def test_a_table_names_its_columns_and_an_empty_cell_is_none():
    text = 'Prompt,steps,instruction,seed\n"a fox, red",,yes,1..3\n\n"two\nlines",4,0\n'
    assert [(r.number, r.fields) for r in rows(text, "csv")] == [
        (2, {"prompt": "a fox, red", "instruction": True, "seed": "1..3"}),
        (4, {"prompt": "two\nlines", "steps": 4, "instruction": False}),
    ]
    assert fields("prompt\tsteps\na, fox\t3\n", "tsv") == [{"prompt": "a, fox", "steps": 3}]


def test_whole_numbers_of_a_table_that_had_gaps_are_whole():
    assert fields("prompt,steps,seed\nx,4.0,7.0\n", "csv") == [
        {"prompt": "x", "steps": 4, "seed": "7"}
    ]


def test_other_columns_are_for_those_who_use_them():
    text = "prompt,style\nx,Oil on canvas\n"
    (row,) = rows(text, "csv", "style")
    assert row.columns == {"prompt": "x", "style": "Oil on canvas"}
    assert fault(text, "csv") == Fault(
        1, "style", "is not a field, and neither --template nor the name of the image uses it"
    )


@pytest.mark.parametrize(
    ("text", "format", "row", "column", "says"),
    [
        ("prompt,sedd\nx,1\n", "csv", 1, "sedd", "did you mean seed?"),
        ('\n{"prompt": "x", "stepps": 1}', "jsonl", 2, "stepps", "did you mean steps?"),
        ("prompt,Prompt\nx,y\n", "csv", 1, "prompt", "twice"),
        ('{"prompt": "x", "prompt": "y"}', "jsonl", 1, "prompt", "twice"),
        ("prompt\nx,y\n", "csv", 2, None, "2 cells, but there are 1 columns"),
        ('prompt\n"x\n', "csv", 2, None, "not CSV"),
        ("prompt,steps\nx,many\n", "csv", 2, "steps", "'many' is not a whole number"),
        ("prompt,steps\nx,2.5\n", "csv", 2, "steps", "'2.5' is not a whole number"),
        ("prompt,guidance\nx,high\n", "csv", 2, "guidance", "'high' is not a number"),
        ("prompt,instruction\nx,maybe\n", "csv", 2, "instruction", "neither true nor false"),
        ('{"prompt": "x", "steps": true}', "jsonl", 1, "steps", "not a number"),
        ('{"prompt": ["x"]}', "jsonl", 1, "prompt", "not text"),
        ('{"prompt": "x", "model": 3}', "jsonl", 1, "model", "not text"),
        ('{"prompt": "x", "seed": {}}', "jsonl", 1, "seed", "not a single value"),
        ('{"prompt": "x"', "jsonl", 1, None, "not JSON"),
        ('"x"', "jsonl", 1, None, "not a JSON object"),
        ("[" * 100_000, "jsonl", 1, None, "not JSON"),
        (b"a fox\n\xff\xfea\x00\n", "txt", 2, None, "not UTF-8"),
    ],
    ids=lambda value: ascii(value)[:30],
)
def test_a_fault_names_its_row_and_column(text, format, row, column, says):
    found = fault(text, format)
    assert (found.row, found.column) == (row, column)
    assert says in found.message


CELL = st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1).map(str.strip)
TABLE = st.lists(st.tuples(CELL, st.integers(1, 1000)), min_size=1, max_size=4)


def without_mark(text: str) -> str:
    return text.replace("\ufeff", "").strip()


@given(
    TABLE.filter(lambda rows: all(without_mark(prompt) for prompt, _ in rows)),
    st.sampled_from(",;\t|"),
    st.sampled_from(FORMATS[2:]),
    st.sampled_from(["utf-8", "utf-8-sig", "utf-16", "utf-16-le"]),
    st.sampled_from(["\n", "\r\n"]),
    st.booleans(),
)
def test_a_table_is_read_whatever_separates_its_columns(
    table, delimiter, format, encoding, end, told
):
    """As csv and Excel write it: quoted where it must be, perhaps with a first line `sep=;`."""
    file = io.StringIO()
    writer = csv.writer(file, delimiter=delimiter, lineterminator=end)
    writer.writerow(["prompt", "steps"])
    writer.writerows(table)
    text = (f"sep={delimiter}{end}" if told else "") + file.getvalue()
    notes: list[str] = []
    found = list(parse([text.encode(encoding)], format, (), notes.append))
    assert [row.fields for row in found] == [
        {"prompt": without_mark(prompt), "steps": steps} for prompt, steps in table
    ]
    usual = "," if format == "csv" else "\t"
    assert bool(notes) == (delimiter != usual and not told)
    assert [row.number for row in found] == [i + 2 + told for i in range(len(table))]


# A cell that no program had to quote, as most that write .tsv never do.
RAW = st.text(st.characters(exclude_categories=["Cs", "Cc", "Zl", "Zp"]), min_size=1)
OPEN = RAW.map(lambda text: '"' + text).filter(lambda text: not text.strip().endswith('"'))


@given(st.lists(OPEN | RAW.filter(lambda text: '"' not in text), min_size=1, max_size=4))
@example(['"Starry Night" by van Gogh', 'a 5" floppy', '"half'])
def test_a_cell_of_a_tsv_that_begins_with_a_quote_is_text(prompts):
    prompts = [without_mark(prompt) for prompt in prompts]
    text = "steps\tprompt\n" + "".join(f"3\t{prompt}\n" for prompt in prompts)
    assert fields(text, "tsv") == [
        {"steps": 3} | ({"prompt": prompt} if prompt else {}) for prompt in prompts
    ]


def test_a_cell_of_a_tsv_that_is_quoted_whole_is_unquoted():
    text = 'prompt\tsteps\n"a\tfox, ""red"""\t3\n"two\nlines"\t4\n"x" y\t"5"\n'
    assert fields(text, "tsv") == [
        {"prompt": 'a\tfox, "red"', "steps": 3},
        {"prompt": "two\nlines", "steps": 4},
        {"prompt": '"x" y', "steps": 5},
    ]


@pytest.mark.parametrize("text", ["prompt,seed,,\nx,1,,\ny,2\n", ",prompt,seed\n,x,1\n,y,2,,,\n"])
def test_an_empty_header_over_empty_cells_is_ignored(text):
    assert fields(text, "csv") == [{"prompt": "x", "seed": "1"}, {"prompt": "y", "seed": "2"}]


def test_the_index_of_pandas_is_named_once():
    found = fault(",prompt,seed\n0,x,1\n1,y,2\n", "csv")
    assert (found.row, found.column) == (2, "1")
    assert "'0'" in found.message and "index=False" in found.hint
    found = fault("Unnamed: 0,prompt\n0,x\n1,y\n", "csv")
    assert (found.row, found.column) == (1, "Unnamed: 0")
    assert "index=False" in found.hint


def test_all_faults_of_a_table_are_told_at_once():
    text = 'prompt,sedd,steps,guidance\nx,1,many,"4,5"\ny,2,3,4\n"z" z,1,2,3\nw,1,2,high,5,6\n"u\n'
    assert [(f.row, f.column, f.message) for f in rows(text, "csv") if isinstance(f, Fault)] == [
        (1, "sedd", "is not a field; did you mean seed?"),
        (2, "steps", "'many' is not a whole number"),
        (2, "guidance", "'4,5' is not a number; write it with a point: 4.5"),
        (
            *(4, None),
            "this is not CSV: a quoted cell has text after its closing quote;"
            " double a quote inside it",
        ),
        (5, None, "6 cells, but there are 4 columns"),
        (6, None, "this is not CSV: a quote is opened here and never closed"),
    ]
    text = '{"promt": "x", "steps": "many", "seed": {}}'
    assert [(f.row, f.column) for f in rows(text, "jsonl")] == [
        *((1, "promt"), (1, "steps"), (1, "seed"))
    ]


@given(st.data())
def test_every_wrong_cell_of_a_table_is_told_with_its_place(data):
    wrong = {"steps": "many", "guidance": "high", "seed": "-", "instruction": "maybe"}
    right = {"steps": "2", "guidance": "1", "seed": "7", "instruction": "no"}
    columns = data.draw(st.permutations(list(wrong)))
    at = data.draw(st.sets(st.tuples(st.integers(2, 5), st.sampled_from(columns))))
    at = {(row, name) for row, name in at if name != "seed"}  # which the command line reads
    cells = [
        ["x", *((wrong if (row, n) in at else right)[n] for n in columns)] for row in range(2, 6)
    ]
    text = "\n".join(map(",".join, [["prompt", *columns], *cells]))
    found = [row for row in rows(text, "csv") if isinstance(row, Fault)]
    assert {(fault.row, fault.column) for fault in found} == at


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("sedd", "seed"),
        ("Prompts", "prompt"),
        ("negative_prompt", "negative"),
        ("guidance scale", "guidance"),
        ("num_inference_steps", "steps"),
        ("caption", "prompt"),
        ("colr", "colour"),  # a column that the template uses
    ],
)
def test_a_column_of_another_tool_or_mistyped_is_told_ours(name, meant):
    assert f"did you mean {meant}?" in fault(f"x,{name}\n,1\n", "csv", "x", "colour").message


@pytest.mark.parametrize("text", ['[\n  {"prompt": "x"}\n]\n', '[{"prompt": "x"}, {}]'])
def test_a_json_array_is_told_what_makes_lines_of_it(text):
    found = fault(text, "jsonl")
    assert (found.row, "one JSON array" in found.message) == (1, True)
    assert "jq" in found.hint


def test_a_mark_in_a_name_or_a_value_of_json_is_dropped():
    assert fields('{"\\ufeffprompt": "\\ufeffa fox"}', "jsonl") == [{"prompt": "a fox"}]


def test_text_of_another_code_page_is_named():
    found = fault("prompt,seed\nun café,1\n".encode("cp1252"), "csv")
    assert found.row == 2
    assert "byte 0xE9 after 'un caf'" in found.message and "WINDOWS-1252" in found.hint


@given(st.binary(max_size=200), st.sampled_from(FORMATS))
@example(b"prompt\n\r\x00", "csv")
def test_no_bytes_are_too_strange(data, format):
    for found in rows(data, format):
        assert isinstance(found, Row | Fault)


# --- templates and alternatives ----------------------------------------------------------------

TEXT = st.text(alphabet=st.sampled_from("ab {}|\\é狐\n"), max_size=30)


def escaped(text: str) -> str:
    return "".join(f"\\{c}" if c in "{|}\\" else c for c in text)


def test_a_template_is_filled_from_columns():
    template = r"a {style} photo of {hair color} \{x\}"
    assert columns_of(template, False) == ["style", "hair color"]
    values = {"style": "{old}", "hair color": "red|grey"}
    assert fill(template, values, False) == "a {old} photo of red|grey {x}"


@pytest.mark.parametrize("template", ["a {} fox", "a {red|blue} fox", "a { fox", "a } fox"])
def test_a_template_that_is_none_is_refused(template):
    with pytest.raises(UsageError, match="--template"):
        columns_of(template, False)


def test_alternatives_are_taken_in_order_the_last_fastest():
    assert alternatives("a {red|blue} {fox|owl}") == [
        "a red fox",
        "a red owl",
        "a blue fox",
        "a blue owl",
    ]
    assert alternatives("{|very }{big|{tiny|small} pink} x") == [
        *("big x", "tiny pink x", "small pink x"),
        *("very big x", "very tiny pink x", "very small pink x"),
    ]
    assert alternatives(r"a|b \{c\|d\} \x \\") == [r"a|b {c|d} \x " + "\\"]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{fox}", "nothing to choose from"),
        ("{a|b", "without a }"),
        ("a}", "without a {"),
        ("{1|2|3|4|5|6|7|8|9|0}" * 6, "more than 100000 combinations"),
        ("{" * 5000, "too deep"),
    ],
    ids=lambda text: text[:20],
)
def test_alternatives_that_are_none_are_refused(text, says):
    with pytest.raises(ValueError, match=says):
        alternatives(text)


@given(st.lists(st.lists(TEXT, min_size=2, max_size=3), max_size=4), TEXT)
def test_alternatives_are_the_product_of_any_choices(groups, between):
    text = escaped(between).join("{" + "|".join(map(escaped, group)) + "}" for group in groups)
    expected = [between.join(choice) for choice in itertools.product(*groups)]
    assert alternatives(text) == expected


@given(TEXT)
def test_escaped_text_is_itself(text):
    assert alternatives(escaped(text)) == [text]
    assert fill(escaped(text), {}, False) == text


@given(TEXT)
def test_any_text_is_expanded_or_refused(text):
    try:
        found = alternatives(text)
    except ValueError as error:
        assert str(error)
    else:
        assert found and all(isinstance(one, str) for one in found)


@given(TEXT, TEXT)
def test_a_filled_template_holds_its_value_untouched(around, value):
    template = f"{escaped(around)}{{x}}{escaped(around)}"
    assert columns_of(template, False) == ["x"]
    assert fill(template, {"x": value}, False) == f"{around}{value}{around}"


# --- shards ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "environment", "expected"),
    [
        ("2/3", {}, (2, 3)),
        ("auto", {"SLURM_ARRAY_TASK_ID": "2", "SLURM_ARRAY_TASK_COUNT": "4"}, (3, 4)),
        (
            "auto",
            {
                "SLURM_ARRAY_TASK_ID": "15",
                "SLURM_ARRAY_TASK_MIN": "10",
                "SLURM_ARRAY_TASK_STEP": "5",
                "SLURM_ARRAY_TASK_COUNT": "3",
                "SLURM_PROCID": "0",
                "SLURM_NTASKS": "1",
            },
            (2, 3),
        ),
        ("auto", {"AWS_BATCH_JOB_ARRAY_INDEX": "0", "AWS_BATCH_JOB_ARRAY_SIZE": "9"}, (1, 9)),
        ("auto", {"RANK": "3", "WORLD_SIZE": "8"}, (4, 8)),
    ],
    ids=lambda value: str(value)[:30],
)
def test_a_shard_is_named_or_found(text, environment, expected):
    assert parse_shard(text, environment) == Shard(*expected)


@pytest.mark.parametrize(
    ("text", "environment"),
    [
        *[(text, {}) for text in ("0/3", "4/3", "1", "x/y", "auto", "1/0", "")],
        ("auto", {"RANK": "8", "WORLD_SIZE": "8"}),
        ("auto", {"RANK": "", "WORLD_SIZE": "8"}),
        ("auto", {"JOB_COMPLETION_INDEX": "1"}),
        (
            "auto",
            {
                "SLURM_ARRAY_TASK_ID": "3",
                "SLURM_ARRAY_TASK_COUNT": "4",
                "SLURM_ARRAY_TASK_STEP": "2",
            },
        ),
    ],
    ids=str,
)
def test_what_is_no_shard_is_refused(text, environment):
    with pytest.raises(UsageError, match="--shard"):
        parse_shard(text, environment)


@given(st.integers(0, 2**64 - 1), st.integers(1, 50))
def test_every_job_is_in_one_shard(number, count):
    held = [i for i in range(1, count + 1) if Shard(i, count).holds(f"{number:016x}")]
    assert len(held) == 1
