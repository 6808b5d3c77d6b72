"""A job is the same picture, wherever it stands and whoever draws it."""

from pathlib import Path

from batches import DEMO, PROMPTS, lines, pictures


def test_a_picture_is_the_same_alone_reversed_in_a_shard_and_by_generate(sana):
    two, everything = PROMPTS[:2], {}
    for name, prompts in (
        ("all", two),
        ("back", two[::-1]),
        ("more", PROMPTS),
    ):
        Path(f"{name}.txt").write_text("\n".join(prompts))
        assert sana("batch", f"{name}.txt", *DEMO, "-n", "2").code == 0
        everything[name] = pictures(f"{name}-images")
    assert len(everything["all"]) == 4
    assert everything["back"] == everything["all"]
    assert everything["more"].items() >= everything["all"].items()
    for prompt in two:
        Path("alone.txt").write_text(prompt)
        assert sana("batch", "alone.txt", *DEMO, "-n", "2").code == 0
    assert pictures("alone-images") == everything["all"]
    for shard in ("1/2", "2/2"):
        assert (
            sana("batch", "all.txt", *DEMO, "-n", "2", "--shard", shard, "-o", "shards").code == 0
        )
    assert pictures("shards") == everything["all"]
    assert len(list(Path("shards").glob("manifest.*-of-2.jsonl"))) == 2
    for line in lines("all-images", "done")[:2]:
        words = (PROMPTS[line["row"] - 1], "-s", str(line["seed"]), *DEMO, "-o", "alone/")
        assert sana("generate", *words).code == 0
    assert everything["all"].items() >= pictures("alone").items()


def test_equal_rows_are_several_pictures_and_ids_do_not_depend_on_the_machine(sana):
    Path("twice.txt").write_text(f"{PROMPTS[0]}\n{PROMPTS[1]}\n{PROMPTS[0]}\n")
    assert sana("batch", "twice.txt", *DEMO).code == 0
    first, other, second = (line["seed"] for line in lines("twice-images", "done"))
    assert second == first + 1
    assert sana("batch", "twice.txt", *DEMO, "--dtype", "bfloat16", "-o", "half").code == 0
    assert [line["seed"] for line in lines("half", "done")] == [first, other, second]
    ids = [{line["id"] for line in lines(name, "done")} for name in ("twice-images", "half")]
    assert len(ids[0]) == 3 and not ids[0] & ids[1]
