"""`esap`: one minus the total variation distance."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from accelerate_hooks.kernels import KernelError, acceptance, esap


@st.composite
def logits(draw):
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    shape = (*draw(st.lists(st.integers(0, 3), max_size=2)), draw(st.integers(1, 40)))
    dtype = draw(st.sampled_from([torch.float64, torch.float32, torch.bfloat16]))
    p, q = (
        (torch.randn(shape, generator=generator) * draw(st.floats(0, 8))).to(dtype)
        for _ in range(2)
    )
    if draw(st.booleans()):
        q[..., 0] = -math.inf  # a token that cannot be
    return p, q


@given(logits())
def test_it_is_one_minus_the_total_variation_distance(drawn):
    p, q = drawn
    if p.shape[-1] == 1 and q.isinf().any():
        return
    got = esap(p, q)
    wanted = 1 - (p.double().softmax(-1) - q.double().softmax(-1)).abs().sum(-1) / 2
    assert got.shape == p.shape[:-1]
    assert torch.allclose(got.double(), wanted, atol=1e-6)
    assert torch.equal(got, esap(q, p))


def test_equal_models_accept_all_and_parts_agree(monkeypatch):
    p, q = torch.randn(2, 7, 50, generator=torch.Generator().manual_seed(0)).unbind(0)
    assert torch.allclose(esap(p, p), torch.ones(7))
    whole = esap(p, q)
    monkeypatch.setattr(acceptance, "_ROOM", 50 * 4 * 2)
    assert torch.equal(esap(p, q), whole)


@pytest.mark.parametrize(
    ("p", "q", "words"),
    [
        (torch.zeros(2, 3), torch.zeros(2, 4), "of one shape"),
        (torch.zeros(2, 3).long(), torch.zeros(2, 3), "floating-point"),
        (torch.zeros(2, 0), torch.zeros(2, 0), "no vocabulary"),
        ([0.0], torch.zeros(1), "give tensors"),
        (torch.zeros(2, 3), torch.zeros(2, 3, device="meta"), "on one device"),
    ],
)
def test_errors_name_the_cause_and_the_fix(p, q, words):
    with pytest.raises(KernelError, match=words):
        esap(p, q)
