"""Which classes of transformers and diffusers can be intercepted: writes docs/coverage.md and
docs/moe_coverage.md.

    python -P benchmarks/coverage.py [--check]

Every row of `tests/tiny_models.py` is built, run under a policy that leaves blocks out, and looked
at: sites by kind, stacks of blocks whose ports were confirmed, whether skipping changed the output.
Every row of `tests/moe_models.py` is run under ExpertSkip, and its experts are looked at. What is
refused comes with the reason. `--check` writes nothing and exits with 1 on a difference.
"""

from __future__ import annotations

import argparse
import importlib.util
import logging
import re
import sys
import warnings
from collections import Counter
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from accelerate_hooks import ExpertSkip, LazyStep, enable
from accelerate_hooks.errors import UnsupportedModelError
from accelerate_hooks.policies._experts import read_experts
from accelerate_hooks.registry import patch_for
from accelerate_hooks.site import KINDS, Site

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "coverage.md"
EXPERTS_PAGE = ROOT / "docs" / "moe_coverage.md"
STEPS = 3
HEAD = """# Coverage

Written by `benchmarks/coverage.py` from the table of tiny models in `tests/tiny_models.py`; do not
edit. *Sites* are counted by kind (a module visited again in the same forward has a site a visit).
*Stacks* are runs of blocks whose output is the next one's input, as watched in a forward: `4` is
one stack of four blocks, `2x4` two of them. *Skips* says which policies really left work out and
changed the output: whole steps (LazyStep), or blocks.

"""
REFUSED = """
## Refused, or not built

Block policies refuse these when they are enabled; others are not in the table. This list may only
shrink.

| class | why |
|---|---|
"""
EXPERTS_HEAD = """# Families with experts

Written by `benchmarks/coverage.py` from the table of tiny models in `tests/moe_models.py`; do not
edit. `tests/policies/test_moe_families.py` holds each family to oracles made of its own parts.
*Sites* are counted by kind. *Experts* says in which module they lie and in what form: matrices of
all experts that `kernels.skip_experts` reads (gated or plain; `[E, out, in]` or transposed; with
biases; the activation), or how else fewer slots are computed:

- *in turn*: the module's own forward, once for the tokens that keep one expert, once for two, and
  so on;
- *list*: each expert is a module, and gets the rows of the tokens that keep it;
- *choosing*: experts choose their tokens, and get the rows of those that keep them.

*One sum* says whether the router weighs all tokens to one sum, by its answer to tokens of noise:
then what is kept is brought back to it. One that cannot be asked beside a visit is judged by the
tokens of each.

| family | class | sites | experts | one sum |
|---|---|---|---|---|
"""
EXPERTS_REFUSED = """
## Not served

ExpertSkip refuses these, or says in a warning and in its report that it leaves them alone.

| class | why |
|---|---|
"""


def load(name: str) -> ModuleType:
    """A module of ``tests/`` by its name, as tests/conftest.py does it."""
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, ROOT / "tests" / f"{name}.py")
        assert spec is not None and spec.loader is not None
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


def kinds(sites: list[Site]) -> str:
    count = Counter(site.kind for site in sites)
    return ", ".join(f"{count[kind]} {kind}" for kind in KINDS if count[kind] and kind != "model")


def stacks(sites: list[Site]) -> str:
    lengths = [s.count for s in sites if s.kind == "block" and s.index == 0]
    return " + ".join(f"{n}x{length}" if n > 1 else f"{length}" for length, n in _runs(lengths))


def _runs(values: list[int]) -> list[tuple[int, int]]:
    runs: list[tuple[int, int]] = []
    for value in values:
        if runs and runs[-1][0] == value:
            runs[-1] = value, runs[-1][1] + 1
        else:
            runs.append((value, 1))
    return runs


def row(tiny: Any) -> str:
    """A line of the table; raises UnsupportedModelError where blocks cannot be skipped."""
    contract = load("contract")
    model, inputs = tiny.build(), tiny.inputs(2)
    enable(model, contract.BlockSkip.exact()).disable()
    plain = contract.outputs(model, inputs, STEPS)
    skips = []
    takes_time = any(name in patch_for(model).timesteps for name in inputs)
    for word, policy in (("steps", LazyStep), ("blocks", contract.BlockSkip)):
        if word == "steps" and not takes_time:
            continue
        with enable(model, policy.example()) as session:
            changed = not contract.equal(contract.outputs(model, inputs, STEPS), plain)
            if session.skips and changed:
                skips.append(word)
            sites = session.roots[0].sites
    confirmed = all(s.port.confirmed for s in sites if s.kind == "block")
    cells = [tiny.cls, tiny.name, tiny.kind, kinds(sites), stacks(sites) if confirmed else "?"]
    return f"| {' | '.join([*cells, ' and '.join(skips) or 'no'])} |"


def page() -> str:
    tiny_models = load("tiny_models")
    lines: dict[str, list[str]] = {"diffusers": [], "transformers": []}
    refused: dict[str, str] = {}
    for tiny in tiny_models.TINY.values():
        try:
            lines[tiny.library].append(row(tiny))
        except UnsupportedModelError as error:
            refused[tiny.cls] = reason(error)
        print(tiny.name, file=sys.stderr, flush=True)
    text = HEAD
    for library, rows in lines.items():
        text += f"## {library}\n\n| class | row | kind | sites | stacks | skips |\n"
        text += "|---|---|---|---|---|---|\n" + "\n".join(rows) + "\n\n"
    entries = {**refused, **tiny_models.UNBUILT}
    return text.rstrip() + "\n" + REFUSED + "".join(f"| {c} | {w} |\n" for c, w in entries.items())


def reason(error: Exception) -> str:
    found = re.search(r"\w+ keeps a state beside keys and values \(\w+\)", str(error))
    return found.group() if found else str(error).partition(";")[0]


def structure(name: str) -> str:
    """The sites of one row before any forward, for a quick look at whether the page is current."""
    model = load("tiny_models").TINY[name].build()
    return kinds(patch_for(model).sites(model))


def experts_row(tiny: Any) -> str:
    """A line of the table of families with experts."""
    model, inputs = tiny.build(), tiny.inputs(2)
    with enable(model, ExpertSkip(ratio=0.8)) as session:
        model(**inputs)
        sites = session.roots[0].sites
        found = [s for s in sites if s.kind == "experts"]
        facts = [session.record(s).facts for s in found]
    forms = {form(s, f.get(("known", 0, ""))): None for s, f in zip(found, facts, strict=True)}
    key = ("known", 0, "normalises cpu")
    said = [f[key] for f in facts if key in f]  # where visited
    asked = [bool(one) for one in said if one is not None]
    one_sum = "not asked" if len(asked) < len(said) else "yes" if all(asked) else "no"
    mine = [s for s in sites if s.kind in ("router", "experts")]
    return f"| {' | '.join((tiny.name, tiny.cls, kinds(mine), '; '.join(forms), one_sum))} |"


def form(site: Site, tried: Any) -> str:
    """Where the experts of a site lie, and how ExpertSkip computes fewer of them."""
    name = type(site.module).__name__
    if site.port.routing is None:
        listed = isinstance(site.module.experts, torch.nn.ModuleList)
        return f"{name}: {'list' if listed else 'choosing'}"
    experts = tried or read_experts(site.module)
    if experts is None:
        return f"{name}: in turn"
    biases = experts.arguments["up_bias"] is not None
    words = ["gated" if experts.gated else "plain", experts.act.replace("_", " ")]
    words += ["transposed"] * experts.transposed + ["biases"] * biases
    return f"{name}: {', '.join(words)}"


def experts_page() -> str:
    moe_models = load("moe_models")
    rows = []
    for tiny in moe_models.MOE.values():
        rows.append(experts_row(tiny))
        print(tiny.name, file=sys.stderr, flush=True)
    text = EXPERTS_HEAD + "\n".join(rows) + "\n" + EXPERTS_REFUSED
    return text + "".join(f"| {cls} | {why} |\n" for cls, why in moe_models.UNSERVED.values())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="compare only")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable()
    torch.set_grad_enabled(False)
    texts = {PAGE: page(), EXPERTS_PAGE: experts_page()}
    if options.check:
        return int(any(text != path.read_text() for path, text in texts.items()))
    for path, text in texts.items():
        path.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
