"""Every class of the tiny table: exact when nothing is skipped, changed when something is, and left
as it was; or refused with a reason."""

import inspect

import contract
import diffusers
import pytest
import torch
import transformers
from tiny_models import TINY, names

from accelerate_hooks import LazyStep, enable
from accelerate_hooks.errors import UnsupportedModelError

STEPS = 3
# What block policies must refuse: blocks with a state beside keys and values.
REFUSED = {*names(kind="recurrent"), "gemma3n_text"}
# Without a timestep there is no step to reuse across.
TIMELESS = {"transformer_2d", "dreamlite", "uvit_2d", "music_rvq", "t5_film"}


def thinned(rows):
    """All rows, two of three marked slow."""
    return [
        pytest.param(name, marks=[pytest.mark.slow] if i % 3 else []) for i, name in enumerate(rows)
    ]


def attributes(model):
    return {path: set(vars(module)) for path, module in model.named_modules()}


def confirmed(session):
    blocks = [s for s in session.sites if s.kind == "block" and session.record(s).computed]
    return all(site.port.confirmed for site in blocks)


@pytest.mark.parametrize("name", thinned(n for n in TINY if n not in REFUSED))
def test_exact_and_skipping(name):
    tiny = TINY[name]
    model, inputs = tiny.build(), tiny.inputs(2)
    before = attributes(model)
    torch.manual_seed(0)
    plain = contract.outputs(model, inputs, STEPS)
    state = torch.get_rng_state()
    before = {path: keys | attributes(model)[path] for path, keys in before.items()}
    lazy = tiny.kind == "diffusion" and name not in TIMELESS
    policy = contract.BlockReuse if lazy else contract.BlockSkip
    for settings in (policy.exact(), *([LazyStep.exact()] if lazy else [])):
        torch.manual_seed(0)
        with enable(model, settings) as session:
            assert contract.equal(contract.outputs(model, inputs, STEPS), plain), settings
            assert confirmed(session)
        assert torch.equal(torch.get_rng_state(), state)
        assert not session.skips
    for settings in (policy.example(), *([LazyStep.example()] if lazy else [])):
        with enable(model, settings) as session:
            ours = contract.outputs(model, inputs, STEPS)
            assert session.skips, {r for s in session.sites for r in session.record(s).reasons}
        assert not contract.equal(ours, plain), settings
        assert [[t.shape for t in x] for x in ours] == [[t.shape for t in x] for x in plain]
    assert attributes(model) == before
    assert contract.equal(contract.outputs(model, inputs, 1), plain[:1])


@pytest.mark.parametrize("name", thinned(n for n in names(kind="decoder") if n not in REFUSED))
def test_decoders_without_a_cache(name):
    """The same blocks in plain forwards, where each is a run of its own."""
    tiny = TINY[name]
    model, inputs = tiny.build(), {**tiny.inputs(2), "use_cache": False}
    with torch.no_grad():
        plain = model(**inputs).logits
        with enable(model, contract.BlockSkip.exact()):
            assert torch.equal(model(**inputs).logits, plain)
        with enable(model, contract.BlockSkip.example()) as session:
            model(**inputs)
            skipped = model(**inputs).logits
        assert session.skips
        assert not torch.equal(skipped, plain)
        assert torch.equal(model(**inputs).logits, plain)


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_refused_with_a_reason(name):
    model = TINY[name].build()
    before = attributes(model)
    with pytest.raises(UnsupportedModelError, match="keeps a state"):
        enable(model, contract.BlockSkip.example())
    assert attributes(model) == before


@pytest.mark.parametrize("library", [diffusers, transformers], ids=lambda m: m.__name__)
def test_the_table_is_wide(library):
    rows = [TINY[n] for n in names(library=library.__name__) if n not in REFUSED]
    classes = {getattr(library, row.cls) for row in rows}
    assert len(classes) >= 30
    assert len({tuple(inspect.signature(c.forward).parameters) for c in classes}) >= 15


def test_a_shared_block_has_a_site_a_visit():
    model = TINY["albert"].build()
    with enable(model, contract.BlockSkip.exact()) as session, torch.no_grad():
        model(**TINY["albert"].inputs(2))
        blocks = [s for s in session.sites if s.kind == "block"]
        assert [(s.visit, s.index, s.count) for s in blocks] == [(i, i, 4) for i in range(4)]
        assert [session.record(s).computed for s in blocks] == [1] * 4
        model(**TINY["albert"].inputs(2))
        assert [session.record(s).computed for s in blocks] == [2] * 4


@pytest.mark.parametrize(
    ("name", "x", "out", "context_out"),
    [
        ("flux", "hidden_states", (1,), (0,)),
        ("cogvideox", "hidden_states", (0,), (1,)),
        ("wan", "hidden_states", (), None),
        ("xlnet", "output_h", (0,), None),
        ("squeezebert", "hidden_states", ("feature_map",), None),
        ("kandinsky6", "vis", (0,), None),
        ("wan_vace", "control_hidden_states", (1,), None),
    ],
)
def test_ports(name, x, out, context_out):
    model = TINY[name].build()
    with enable(model, contract.BlockSkip.exact()) as session:
        contract.outputs(model, TINY[name].inputs(2), 1)
    port = [s for s in session.sites if s.kind == "block"][-1].port
    assert (port.x, port.out, port.context_out) == (x, out, context_out)


def test_text_as_long_as_the_image():
    """Where context and x look alike, a watched forward goes before the first one."""
    tiny = TINY["flux"]
    model, inputs = tiny.build(), tiny.inputs(2)
    inputs["hidden_states"] = inputs["hidden_states"][:, :7]
    inputs["img_ids"] = inputs["img_ids"][:7]
    plain = contract.outputs(model, inputs)
    with enable(model, contract.BlockReuse.exact()):
        assert contract.equal(contract.outputs(model, inputs), plain)
    with enable(model, contract.BlockReuse.example()) as session:
        first = contract.outputs(model, inputs)
        assert contract.equal(contract.outputs(model, contract._copied(inputs)), first)
    ports = {(s.port.out, s.port.context_out) for s in session.sites}
    assert ports == {((1,), (0,))}
    assert session.skips


def test_unet_blocks_in_the_order_of_their_visits():
    model = TINY["unet"].build()
    with enable(model, contract.BlockReuse.exact()) as session:
        paths = [s.path for s in session.sites]
    stages = [path.split("_")[0] for path in paths]
    assert stages == sorted(stages, key=["down", "mid", "up"].index)
    assert all(".transformer_blocks." in path for path in paths)
    assert len(paths) == 15
