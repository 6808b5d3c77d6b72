"""`cases.json` counts each case once, and names tests that are here."""

import json
from collections import Counter
from pathlib import Path

HERE = Path(__file__).parent
CASES = json.loads((HERE / "cases.json").read_text(encoding="utf-8"))["cases"]


def test_no_case_is_counted_twice():
    counts = Counter((case["case"], file) for case in CASES for file in case["files"])
    assert set(counts.values()) == {1}


def test_a_case_that_applies_names_a_test_that_exists():
    for case in CASES:
        assert ("test" in case) != ("reason" in case), case
    for name in {case["test"] for case in CASES if "test" in case}:
        file, _, test = name.partition("::")
        assert f"def {test}(" in (HERE / file).read_text(encoding="utf-8"), name
