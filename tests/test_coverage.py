"""The pages are what benchmarks/coverage.py would write, and their second lists only shrink."""

import importlib.util
import re
from pathlib import Path

import pytest
import torch
from moe_models import MOE, UNSERVED
from tiny_models import TINY, UNBUILT, names

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "coverage.md").read_text()
EXPERTS_PAGE = (ROOT / "docs" / "moe_coverage.md").read_text()
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


def test_every_family_with_experts_is_there():
    first, second = EXPERTS_PAGE.split("## Not served")
    assert re.findall(r"^\| (\w+) \| \w+ \|", first, re.MULTILINE)[1:] == list(MOE)
    assert all(f"| {cls} | {why} |" in second for cls, why in UNSERVED.values())
    assert second.count("\n| ") == len(UNSERVED) + 1
    # may only become shorter
    assert set(UNSERVED) <= {
        "cosmos3", "dbrx", "doge", "jetmoe", "llama4", "switch_transformers", "vitpose_backbone",
        "zaya",
    }  # fmt: skip


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "deepseek_v4", "hidream"])
def test_experts_are_current(coverage, name):
    with torch.no_grad():
        assert f"\n{coverage.experts_row(MOE[name])}\n" in EXPERTS_PAGE


@pytest.mark.slow
def test_the_page_of_experts_is_current(coverage):
    with torch.no_grad():
        assert coverage.experts_page() == EXPERTS_PAGE
