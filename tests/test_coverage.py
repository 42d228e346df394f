"""docs/coverage.md is what benchmarks/coverage.py would write, and its second list only shrinks."""

import importlib.util
import re
from pathlib import Path

import pytest
from tiny_models import TINY, UNBUILT, names

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "coverage.md").read_text()
# May only become shorter.
NOT_COVERED = {
    *(TINY[name].cls for name in names(kind="recurrent")),
    "Gemma3nForCausalLM",
    "AnyFlowFARTransformer3DModel",
    "Cosmos3OmniTransformer",
    "DbrxForCausalLM",
    "GlmForCausalLM",
    "Kandinsky6SRTransformer3DModel",
    "MiniMaxH3Transformer3DModel",
    "RFD4ProteinaTransformer",
    "SanaWMLTX2RefinerTransformer3DModel",
    "TransformerTemporalModel",
    "WanAnimate2Transformer3DModel",
}


@pytest.fixture(scope="module")
def coverage():
    spec = importlib.util.spec_from_file_location("coverage_page", ROOT / "benchmarks/coverage.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_row_of_the_table_is_there():
    first, second = PAGE.split("## Refused")
    rows = {line.split(" | ")[1]: line for line in first.splitlines() if line.count(" | ") == 5}
    refused = set(re.findall(r"^\| (\w+) \|", second, re.MULTILINE)) - {"class"}
    assert {n for n, tiny in TINY.items() if n not in rows and tiny.cls not in refused} == set()
    assert refused >= set(UNBUILT)
    assert refused <= NOT_COVERED
    assert not [line for line in rows.values() if line.endswith(("| no |", "| ? |"))]


@pytest.mark.parametrize(
    "name", ["flux", "wan", "unet", "hidream", "llama", "mixtral", "t5", "vit"]
)
def test_sites_are_current(coverage, name):
    line = next(line for line in PAGE.splitlines() if f" | {name} | " in line)
    assert f" | {coverage.structure(name)} | " in line


@pytest.mark.slow
def test_the_page_is_current(coverage):
    assert coverage.page() == PAGE
