"""Every registered policy keeps every law on models of every kind."""

import copy
import dataclasses
import functools
import pickle

import contract
import pytest
import torch
from tiny_models import TINY

from accelerate_hooks import available_policies, enable
from accelerate_hooks.errors import UnsupportedModelError

# One stream, joint text, cross-attention, video, lists of tensors, residual stages; text; experts.
DIFFUSION = ("dit", "flux", "wan", "zimage", "unet")
TEXT = ("llama", "bert", "bart", "mixtral", "qwen3_moe", "olmoe")
POLICIES = available_policies()


@functools.cache
def _built(name):
    return TINY[name].build()


def case(name):
    """(make_model, make_inputs) of a row of the table."""
    return lambda: copy.deepcopy(_built(name)), TINY[name].inputs


@functools.cache
def refused(policy, name):
    """Why a policy does not work on a model, by its own word."""
    try:
        enable(_built(name), POLICIES[policy].example()).disable()
    except UnsupportedModelError as error:
        return str(error)
    return None


@pytest.mark.parametrize("law", contract.LAWS, ids=lambda law: law.__name__)
@pytest.mark.parametrize("name", DIFFUSION + TEXT)
@pytest.mark.parametrize("policy", POLICIES)
def test_every_policy_keeps_every_law(policy, name, law):
    why = refused(policy, name)
    if why is not None:
        pytest.skip(why)
    law(*case(name), POLICIES[policy])


@pytest.mark.parametrize("policy", POLICIES)
def test_every_policy_works_on_some_model(policy):
    accepted = [name for name in DIFFUSION + TEXT if refused(policy, name) is None]
    assert len(accepted) >= 3, accepted


@pytest.mark.parametrize("policy", POLICIES)
def test_pickles_of_enabled_models_need_nothing_of_ours(policy):
    pickles = {}
    for name in ("flux", "llama"):
        if refused(policy, name) is not None:
            continue
        model = case(name)[0]()
        inputs = TINY[name].inputs(2)
        with enable(model, POLICIES[policy].example()):
            contract.outputs(model, inputs, 2)
            pickles[name] = pickle.dumps((model, inputs))
    contract.unpickles_without_us(pickles)


@pytest.mark.parametrize("law", contract.LAWS, ids=lambda law: law.__name__)
@pytest.mark.parametrize(
    ("name", "policy"),
    [
        ("flux", contract.BlockReuse),
        ("llama", contract.BlockSkip),
        ("t5", contract.BlockSkip),
        pytest.param("sd3", contract.BlockReuse, marks=pytest.mark.slow),
        pytest.param("hidream", contract.BlockReuse, marks=pytest.mark.slow),
        pytest.param("gptj", contract.BlockSkip, marks=pytest.mark.slow),
        pytest.param("albert", contract.BlockSkip, marks=pytest.mark.slow),
        pytest.param("whisper", contract.BlockSkip, marks=pytest.mark.slow),
    ],
)
def test_block_policies_keep_every_law(name, policy, law):
    law(*case(name), policy)


@pytest.mark.parametrize(
    "regional",
    [pytest.param(False, marks=pytest.mark.slow), True],
    ids=["whole", "regional"],
)
def test_compile_with_block_policies(regional):
    contract.compile_keeps_up(
        deep("dit"), TINY["dit"].inputs, contract.BlockReuse, regional=regional
    )


def deep(name):
    """make_model(depth) for the compile law."""
    key = {"dit": "num_layers", "flux": "num_single_layers", "llama": "num_hidden_layers"}[name]

    def make(depth):
        tiny = TINY[name]
        return dataclasses.replace(tiny, config={**tiny.config, key: depth}).build()

    return make


@pytest.mark.parametrize("regional", [False, True], ids=["whole", "regional"])
@pytest.mark.parametrize(
    "compile_first",
    [pytest.param(False, marks=pytest.mark.slow), True],
    ids=["enable_first", "compile_first"],
)
@pytest.mark.parametrize("name", ["dit", pytest.param("flux", marks=pytest.mark.slow)])
@pytest.mark.parametrize("policy", POLICIES)
def test_compile(policy, name, regional, compile_first):
    if refused(policy, name) is not None:
        pytest.skip("not for this model")
    contract.compile_keeps_up(
        deep(name),
        TINY[name].inputs,
        POLICIES[policy],
        regional=regional,
        compile_first=compile_first,
    )


def test_the_laws_look_at_models_that_compute():
    """The generations that the laws rest on depend on their inputs and move."""
    for name in DIFFUSION + TEXT:
        steps = contract.outputs(case(name)[0](), TINY[name].inputs(2), 3)
        assert all(torch.isfinite(t).all() for step in steps for t in step), name
        if name not in ("bert", "bart"):
            assert not contract.equal(steps[:1], steps[1:2]), name
