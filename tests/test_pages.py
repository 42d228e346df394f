"""What README.md and docs/ say was measured is what benchmarks/results/ holds."""

import importlib.util
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def pages():
    spec = importlib.util.spec_from_file_location("pages", ROOT / "benchmarks" / "pages.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_pages_say_what_was_measured(pages):
    assert [path.name for path, _ in pages.stale()] == []


def test_every_block_stands_on_a_page(pages):
    text = "".join(path.read_text() for path in pages.PAGES)
    for name in pages.BLOCKS:
        assert f"<!-- {name} -->" in text and f"<!-- /{name} -->" in text


def test_a_figure_that_was_changed_by_hand_is_seen(pages):
    text = pages.PAGES[0].read_text()
    assert pages.filled(text.replace("| 2x | ", "| 2x | 9", 1)) == text
