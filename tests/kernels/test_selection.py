"""Pooling and selection: the laws that block-sparse attention stands on."""

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from accelerate_hooks.kernels import (
    KernelError,
    Selection,
    attention_mass,
    block_sparse_attention,
    esap,
    pool_tokens,
    select_blocks,
    window_attention,
)

SEEDS = st.integers(0, 2**31)
RULES = st.sampled_from(["quantile", "row", "mass"])


def seeded(seed):
    return torch.Generator().manual_seed(seed)


@st.composite
def grids(draw):
    axes = draw(st.integers(1, 3))
    grid = tuple(draw(st.integers(0, 9)) for _ in range(axes))
    return grid, tuple(draw(st.integers(1, 5)) for _ in range(axes))


@given(grids(), SEEDS, st.sampled_from([torch.float64, torch.float32, torch.bfloat16]))
def test_a_pooled_token_is_the_mean_of_its_region(drawn, seed, dtype):
    grid, region = drawn
    x = torch.randn(2, math.prod(grid), 3, generator=seeded(seed)).to(dtype)
    regions = {}
    for place, cell in enumerate(itertools.product(*map(range, grid))):
        regions.setdefault(tuple(c // r for c, r in zip(cell, region, strict=True)), []).append(
            place
        )
    wanted = [x[:, regions[key]].double().mean(1) for key in sorted(regions)]
    wanted = torch.stack(wanted, 1) if wanted else x.new_zeros(2, 0, 3, dtype=torch.float64)
    got = pool_tokens(x, grid, region)
    assert got.dtype == dtype
    bound = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 5e-3}[dtype]
    assert (got.double() - wanted).norm() <= bound * max(wanted.norm(), 1.0)


@st.composite
def maps(draw):
    shape = (draw(st.integers(1, 2)), draw(st.integers(1, 3)))
    shape = (*shape, draw(st.integers(0, 8)), draw(st.integers(0, 8)))
    scores = torch.rand(shape, generator=seeded(draw(SEEDS)), dtype=torch.float64)
    if draw(st.booleans()):
        scores = (scores * 3).floor()  # ties, and zeros
    return scores


@given(maps(), st.floats(0, 1), RULES)
def test_no_row_is_empty(scores, share, rule):
    mask = select_blocks(scores, share, rule=rule)
    assert mask.shape == scores.shape
    assert mask.any(-1).all() or scores.shape[-1] == 0


@given(maps(), st.floats(0, 1), st.floats(0, 1), RULES)
def test_what_is_kept_grows_with_the_share(scores, a, b, rule):
    low, high = (select_blocks(scores, s, rule=rule) for s in sorted((a, b)))
    assert not (low & ~high).any()


@given(maps(), st.floats(0, 1))
def test_mass_keeps_its_share_and_not_a_block_more(scores, share):
    mask = select_blocks(scores, share, rule="mass")
    total, held = scores.sum(-1), (scores * mask).sum(-1)
    assert (held >= share * total - 1e-9).all()
    least = scores.masked_fill(~mask, math.inf).amin(-1) if scores.shape[-1] else total
    fewer = mask.sum(-1) <= 1
    assert (fewer | (held - least < share * total + 1e-9)).all()


@given(maps(), st.floats(0, 1))
def test_counts_are_those_of_the_density(scores, share):
    rows, columns = scores.shape[-2:]
    mask = select_blocks(scores, share, rule="row")
    if rows and columns:
        count = max(1, math.ceil(share * columns - 1e-9))
        assert (mask.sum(-1) == count).all()
        whole = select_blocks(scores, share, rule="quantile").sum((-2, -1))
        count = math.ceil(share * rows * columns - 1e-9)
        assert ((whole >= count) & (whole <= count + rows)).all()


@given(maps(), SEEDS, RULES, st.integers(0, 3))
def test_what_is_asked_for_is_kept(scores, seed, rule, sinks):
    count_rows, count_columns = scores.shape[-2:]
    rows = torch.rand(count_rows, generator=seeded(seed)) < 0.3
    columns = torch.rand(count_columns, generator=seeded(seed + 1)) < 0.3
    mask = select_blocks(
        scores, 0.2, rule=rule, diagonal=True, sinks=sinks, dense_rows=rows, dense_columns=columns
    )
    assert mask[..., rows, :].all() and mask[..., columns].all() and mask[..., :sinks].all()
    for r in range(count_rows if count_columns else 0):
        assert mask[..., r, r * count_columns // count_rows].all()


@given(maps(), SEEDS, RULES, st.floats(0, 1), st.sampled_from([torch.float64, torch.float16]))
def test_laws_hold_for_scores_that_are_no_numbers(scores, seed, rule, share, dtype):
    rows, columns = scores.shape[-2:]
    odd = torch.tensor([math.inf, -math.inf, math.nan, torch.finfo(dtype).max], dtype=dtype)
    which = torch.randint(0, 8, scores.shape, generator=seeded(seed))
    scores = torch.where(which < 4, odd[which % 4], scores.to(dtype))
    if columns and rows:
        scores[..., rows // 2, :] = odd[seed % 4]
    visible = torch.rand(rows, columns, generator=seeded(seed + 1)) < 0.7
    dense = torch.rand(columns, generator=seeded(seed + 2)) < 0.2
    named = {"diagonal": True, "sinks": 1, "visible": visible, "dense_columns": dense}
    plan = Selection.of(rows, columns, rule, **named)
    mask = select_blocks(scores, share, rule=rule, **named)
    assert not (mask & ~visible).any()
    assert mask[..., (visible & dense) | plan.first].all()
    assert torch.equal(mask.any(-1), visible.any(-1).expand(mask.shape[:-1]))
    assert not (mask & ~select_blocks(scores, (share + 1) / 2, rule=rule, **named)).any()
    if rule == "row" and rows:
        free = (visible & ~dense).sum(1)
        count = (free * share - 1e-9).ceil().maximum(plan.first.sum(1))
        count = count.maximum(((free > 0) & ~(visible & dense).any(1)).long())
        assert ((mask & ~dense).sum(-1) == count).all()


@given(maps(), SEEDS, st.sampled_from(["quantile", "row"]), st.floats(0, 1), st.booleans())
def test_the_density_is_known_beforehand(scores, seed, rule, share, causal):
    """Blocks kept by name count as chosen: nothing is kept beyond what was asked for."""
    rows, columns = scores.shape[-2:]
    if causal:
        rows = columns = min(rows, columns)
        scores = scores[..., :rows, :columns]
    if not rows or not columns:
        return
    dense = torch.rand(columns, generator=seeded(seed)) < 0.2
    visible = torch.ones(rows, columns, dtype=torch.bool)
    plan = Selection.of(
        rows, columns, rule, diagonal=True, sinks=1, dense_columns=dense,
        visible=visible.tril() if causal else None,
    )  # fmt: skip
    mask = plan.choose(scores, share)
    seen = visible.tril() if causal else visible
    assert not (mask & ~seen).any()
    kept = mask.sum((-2, -1)) / seen.sum()
    wanted = plan.density(share)
    assert (kept - wanted).abs().max() < 1e-6


@given(maps(), st.sampled_from(["quantile", "row", "mass"]), SEEDS)
def test_each_head_may_have_a_share_of_its_own(scores, rule, seed):
    shares = torch.rand(scores.shape[1], generator=seeded(seed), dtype=torch.float64)
    mask = select_blocks(scores, shares, rule=rule)
    for head, share in enumerate(shares.tolist()):
        assert torch.equal(mask[:, head], select_blocks(scores[:, head], share, rule=rule))


@given(st.integers(0, 10), RULES, st.sampled_from([torch.float32, torch.float16, torch.bfloat16]))
def test_a_share_is_what_its_dtype_can_say(tenths, rule, dtype):
    """0.1 of 10 columns is one, however 0.1 is rounded."""
    scores = torch.ones(1, 1, 10, 10)
    wanted = select_blocks(scores, tenths / 10, rule=rule)
    for share in (torch.tensor([tenths / 10], dtype=dtype), torch.tensor(tenths / 10, dtype=dtype)):
        assert torch.equal(select_blocks(scores, share, rule=rule), wanted)


@given(SEEDS, st.integers(1, 40), st.sampled_from([3, 8]), st.booleans())
def test_mass_is_that_of_the_softmax(seed, tokens, block, causal):
    q, k = torch.randn(2, 2, 4, tokens, 8, generator=seeded(seed), dtype=torch.float64)
    k = k[:, :2]
    mass = attention_mass(q, k, block, is_causal=causal)
    scores = q @ k.repeat_interleave(2, 1).mT / math.sqrt(8)
    if causal:
        scores = scores.masked_fill(torch.ones(tokens, tokens).triu(1).bool(), -math.inf)
    weights = scores.softmax(-1)
    for r, c in itertools.product(range(mass.shape[2]), range(mass.shape[3])):
        wanted = weights[:, :, r * block : (r + 1) * block, c * block : (c + 1) * block]
        wanted = wanted.sum(-1).mean(-1)
        assert torch.allclose(mass[:, :, r, c].double(), wanted, atol=1e-6)


@pytest.mark.parametrize(("n", "m"), [(0, 5), (5, 0), (0, 0)])
def test_there_is_no_mass_in_nothing(n, m):
    mass = attention_mass(torch.zeros(1, 2, n, 4), torch.zeros(1, 2, m, 4), 2)
    assert mass.shape == (1, 2, math.ceil(n / 2), math.ceil(m / 2)) and not mass.any()


def test_a_region_is_no_larger_than_what_there_is():
    x = torch.randn(1, 2, 6, 4, generator=seeded(0))
    large = 1 << 50
    pooled = pool_tokens(x, (2, 3), (large, 2))
    assert torch.equal(pooled, pool_tokens(x, (2, 3), (2, 2)))
    assert torch.equal(attention_mass(x, x[:, :, :4], large), attention_mass(x, x[:, :, :4], 6))


@pytest.mark.slow
def test_a_draft_compiles_as_one_graph():
    q, k, v = torch.randn(3, 1, 2, 256, 32, generator=seeded(0)).unbind(0)

    def sparse(q, k, v):
        a, b = (pool_tokens(t, (16, 16), (4, 8)) for t in (q, k))
        mask = select_blocks((a @ b.mT).softmax(-1), 0.5, rule="row", diagonal=True)
        return block_sparse_attention(q, k, v, mask, block_size=32)

    compiled = torch.compile(sparse, fullgraph=True)
    torch.testing.assert_close(compiled(q, k, v), sparse(q, k, v))


@pytest.mark.slow
def test_a_graph_takes_any_length():
    def sparse(q, k, v):
        n = q.shape[2]
        a, b = (pool_tokens(t, (n,), (16,)) for t in (q, k))
        mask = select_blocks((a @ b.mT).softmax(-1), 0.5, rule="row", diagonal=True)
        out = block_sparse_attention(q, k, v, mask, block_size=16, is_causal=True)
        wide = window_attention(q, k, v, 20, tile=(16,), key_mask=q[:, 0, :, 0] < 1)
        return out + wide, attention_mass(q, k, 16), esap(q, k)

    torch._dynamo.reset()
    compiled = torch.compile(sparse, fullgraph=True, backend="eager")
    for tokens in (64, 96, 70, 33):
        q, k, v = torch.randn(3, 1, 2, tokens, 8, generator=seeded(tokens)).unbind(0)
        torch.testing.assert_close(compiled(q, k, v), sparse(q, k, v))


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: select_blocks(torch.zeros(2, 2), 1.5), "share=1.5"),
        *(
            (lambda share=share: select_blocks(torch.zeros(3, 2, 2), share), words)
            for share, words in (
                (torch.tensor(1.5), "0 to 1"),
                (torch.tensor([0.5, -1.0, 0.5]), "0 to 1"),
                (torch.tensor(math.nan), "0 to 1"),
                (torch.zeros(2), r"\[3\]"),
                (torch.zeros(1, 3), r"\[3\]"),
                (torch.tensor(0.5 + 0j), "0 to 1"),
                ("0.5", "0 to 1"),
                (None, "0 to 1"),
            )
        ),
        (lambda: select_blocks(torch.zeros(2, 2), 0.5, rule="best"), "quantile, row or mass"),
        (
            lambda: select_blocks(torch.zeros(2, 2), 0.5, dense_rows=torch.ones(3).bool()),
            r"bools \[2\]",
        ),
        (lambda: pool_tokens(torch.zeros(5, 2), (2, 2), (1, 1)), "4 tokens"),
        (lambda: pool_tokens(torch.zeros(4, 2), (2, 2), (1,)), "as many axes"),
        (lambda: pool_tokens(torch.zeros(4, 2), (2, 2), (1, 0)), "positive"),
        (lambda: pool_tokens(torch.zeros(4, 2), (4.0,), (2,)), "integers"),
        (lambda: pool_tokens(torch.zeros(4, 2), 4, 2), "integers"),
        (lambda: attention_mass(*torch.zeros(2, 1, 2, 8, 4), 0), "positive"),
        (lambda: attention_mass(*torch.zeros(2, 1, 2, 8, 4), 2.0), "positive"),
        (lambda: attention_mass(torch.zeros(1, 3, 8, 4), torch.zeros(1, 2, 8, 4), 2), "multiple"),
        (lambda: attention_mass(torch.zeros(1, 2, 8, 4), torch.zeros(1, 2, 8, 5), 2), "head size"),
        (lambda: attention_mass(*torch.zeros(2, 2, 8, 4), 2), "give \\[batch"),
        (
            lambda: attention_mass(*torch.zeros(2, 1, 2, 8, 4), 2, key_mask=torch.ones(8).bool()),
            r"bools \[1 or 1, 8\]",
        ),
        (lambda: select_blocks(torch.zeros(2, 2), 0.5, dense_rows=[True, True]), "dense_rows is a"),
    ],
)
def test_errors_name_the_cause_and_the_fix(call, words):
    with pytest.raises(KernelError, match=words):
        call()
