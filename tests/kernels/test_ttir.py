"""The kernels' intermediate code, executed in order, with its memory accesses checked (`ttir.py`).

Triton's interpreter runs the Python source of a kernel with numpy, whose products add in blocks;
it has no bfloat16 and sees no access out of bounds.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
pytest.importorskip("ttsem", reason='needs Python 3.12 and `pip install -e ".[exhaustive]"`')

from sana_cli.kernels.selfcheck import OPERATIONS, OPERATIONS8

pytestmark = pytest.mark.exhaustive


def executed(what: str) -> list[dict]:
    kept = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, str(Path(__file__).with_name("ttir.py")), what]
    done = subprocess.run(command, capture_output=True, text=True, env=kept)
    assert done.returncode == 0, done.stderr
    return list(map(json.loads, done.stdout.splitlines()))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_every_check_is_exact_within_bounds_and_without_races(dtype):
    *checks, total = executed(dtype)
    assert {check["operation"] for check in checks} == {*OPERATIONS, *OPERATIONS8}
    assert [check for check in checks if not check["decibels"] >= check["least"]] == []
    assert total["launches"] >= len(checks)
    assert total["unchecked"] == 0


def test_a_product_has_the_same_bits_in_every_block_shape():
    *products, _ = executed("shapes")
    assert [product["equal"] for product in products] == [True] * 3


def test_an_access_out_of_bounds_and_a_race_are_found():
    *launches, _ = executed("faulty")
    assert [launch["fault"] for launch in launches] == [None, "oob_write", "race"]
