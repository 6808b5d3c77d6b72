"""Every generated table of a README.md is what its data make."""

from pathlib import Path

import pytest

from benchmarks.tables import BLOCK, TABLES, pages, rewritten

ROOT = Path(__file__).resolve().parents[1]
PAGES = {str(page.relative_to(ROOT)): page.read_text(encoding="utf-8") for page in pages()}


@pytest.mark.parametrize("page", PAGES)
def test_every_generated_table_is_what_its_data_make(page):
    """`python -m benchmarks.tables` writes them."""
    assert rewritten(PAGES[page]) == PAGES[page]


def test_every_generated_table_is_on_a_page():
    found = {match["name"] for text in PAGES.values() for match in BLOCK.finditer(text)}
    assert found >= TABLES.keys()
