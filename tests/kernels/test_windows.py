"""Window attention: every query sees its window, and what else the tiles of that hold."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from accelerate_hooks.kernels import KernelError, tile_order, window_attention

BOUND = {torch.float32: 2e-6, torch.bfloat16: 8e-3}


@st.composite
def windows(draw):
    axes = draw(st.integers(1, 3))
    grid = tuple(draw(st.integers(1, {1: 40, 2: 9, 3: 5}[axes])) for _ in range(axes))
    tile = tuple(draw(st.integers(1, 4)) for _ in range(axes))
    window = tuple(draw(st.integers(0, 5)) for _ in range(axes))
    return grid, tile, window


def seen_by_hand(grid, tile, window):
    """Token by token: blocks of `prod(tile)` tokens in `tile_order`; a block sees another if their
    bounding boxes come within the window."""
    cells = list(itertools.product(*map(range, grid)))
    order = tile_order(grid, tile)
    order = list(range(len(cells))) if order is None else order.tolist()
    size = math.prod(tile)
    blocks = [order[i : i + size] for i in range(0, len(order), size)]
    boxes = [
        [(min(at), max(at)) for at in zip(*(cells[i] for i in b), strict=True)] for b in blocks
    ]
    home = {i: number for number, b in enumerate(blocks) for i in b}

    def near(a, b):
        pairs = zip(boxes[a], boxes[b], window, strict=True)
        return all(max(p[0] - q[1], q[0] - p[1]) <= w for p, q, w in pairs)

    return torch.tensor(
        [[near(home[i], home[j]) for j in range(len(cells))] for i in range(len(cells))]
    )


@given(windows(), st.sampled_from(list(BOUND)), st.booleans(), st.integers(0, 2**31))
def test_it_is_attention_under_the_mask_of_its_window(drawn, dtype, masked, seed):
    grid, tile, window = drawn
    generator = torch.Generator().manual_seed(seed)
    n = math.prod(grid)
    q = torch.randn(2, 4, n, 8, generator=generator).to(dtype)
    k, v = (torch.randn(2, 2, n, 8, generator=generator).to(dtype) for _ in range(2))
    seen = seen_by_hand(grid, tile, window)
    key_mask = None
    if masked:
        key_mask = torch.rand(2, n, generator=generator) < 0.9
    out, lse = window_attention(
        q, k, v, window, grid=grid, tile=tile, enable_gqa=True, key_mask=key_mask, return_lse=True
    )
    dense = seen.expand(2, 1, n, n)
    if key_mask is not None:
        dense = dense & key_mask[:, None, None]
    keys, values = (t.double().repeat_interleave(2, 1) for t in (k, v))
    scores = (q.double() @ keys.mT / math.sqrt(8)).masked_fill(~dense, -math.inf)
    wanted = scores.softmax(-1).nan_to_num() @ values
    assert (out.double() - wanted).norm() <= BOUND[dtype] * wanted.norm()
    assert torch.equal(lse == -math.inf, scores.logsumexp(-1) == -math.inf)


@given(windows())
def test_a_query_sees_all_of_its_window(drawn):
    grid, tile, window = drawn
    seen = seen_by_hand(grid, tile, window)
    cells = torch.tensor(list(itertools.product(*map(range, grid))))
    distance = (cells.unsqueeze(1) - cells).abs()
    assert seen[(distance <= torch.tensor(window)).all(-1)].all()


def test_a_wide_window_is_dense_attention():
    q, k, v = torch.randn(3, 1, 2, 300, 16, generator=torch.Generator().manual_seed(0)).unbind(0)
    dense = F.scaled_dot_product_attention(q, k, v)
    torch.testing.assert_close(window_attention(q, k, v, 300), dense, atol=2e-6, rtol=1e-5)
    out = window_attention(q, k, v, 20, grid=(3, 10, 10), tile=(1, 4, 4))
    torch.testing.assert_close(out, dense, atol=2e-6, rtol=1e-5)
    causal = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    out = window_attention(q, k, v, 300, is_causal=True)
    torch.testing.assert_close(out, causal, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize(("grid", "tile"), [((40,), (1 << 30,)), ((5, 8), (1 << 20, 1 << 20))])
def test_a_tile_is_no_longer_than_what_there_is(grid, tile):
    q = torch.randn(1, 2, 40, 16, generator=torch.Generator().manual_seed(0))
    out = window_attention(q, q, q, 1, grid=grid, tile=tile)
    torch.testing.assert_close(out, F.scaled_dot_product_attention(q, q, q), atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("grid", [None, (0,), (0, 5), (3, 0, 2)])
def test_no_tokens_are_no_work(grid):
    q = torch.zeros(2, 3, 0, 8)
    mask = torch.zeros(2, 0, dtype=torch.bool)
    out, lse = window_attention(q, q, q, 2, grid=grid, key_mask=mask, return_lse=True)
    assert out.shape == (2, 3, 0, 8) and lse.shape == (2, 3, 0)


def test_a_grid_in_its_own_order_is_not_reordered():
    assert tile_order((40,), (8,)) is None
    assert tile_order((4, 5, 6), (2, 5, 6)) is None
    assert tile_order((4, 5, 6), (1, 1, 3)) is None
    assert tile_order((4, 5, 6), (1, 1, 4)) is not None
    assert tile_order((1, 5, 6), (1, 3, 8)) is None
    assert tile_order((4, 5, 6), (1, 2, 3)) is not None


@given(windows(), st.tuples(*[st.integers(1, 3)] * 3))
def test_blocks_are_tiles_where_the_grid_is_a_multiple_of_them(drawn, times):
    _, tile, _ = drawn
    grid = tuple(a * b for a, b in zip(tile, times, strict=False))
    order = tile_order(grid, tile)
    order = torch.arange(math.prod(grid)) if order is None else order
    assert order.sort().values.equal(torch.arange(math.prod(grid)))
    homes = [at // t for at, t in zip(torch.unravel_index(order, grid), tile, strict=True)]
    for home in homes:
        blocks = home.view(-1, math.prod(tile))
        assert (blocks == blocks[:, :1]).all()


def spread(grid, tile):
    """The mean over blocks of the variance of their tokens' places."""
    order = tile_order(grid, tile)
    order = torch.arange(math.prod(grid)) if order is None else order
    at = torch.stack(torch.unravel_index(order, grid)).double()
    blocks = at.split(math.prod(tile), 1)
    return sum(b.var(1, unbiased=False).sum().item() for b in blocks) / len(blocks)


@pytest.mark.parametrize(
    "grid", [(30, 52), (45, 80), (30, 45), (30, 53), (52, 76), (5, 30, 52), (13, 45, 80), (33, 17)]
)
def test_blocks_are_compact_where_it_is_none(grid):
    """The sizes of Wan, CogVideoX, Mochi and Flux: a block varies little more than a tile, where
    tiles of a ragged edge one after another varied five times as much."""
    for tile in ((8, 16), (4, 32)) if len(grid) == 2 else ((1, 8, 16), (2, 8, 8)):
        whole = sum((t * t - 1) / 12 for t in tile)
        assert spread(grid, tile) < 1.5 * whole, (grid, tile)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"grid": (3, 5)}, "15 tokens"),
        ({"grid": (4, 5), "is_causal": True}, "one axis"),
        ({"grid": (4, 5), "tile": (2,)}, "as many axes"),
        ({"window": -1}, "0 or more"),
        ({"grid": (1, 1, 4, 5)}, "one to three"),
        ({"grid": 20}, "one to three"),
        ({"grid": (-4, -5)}, "one to three"),
        ({"tile": 16}, "as many axes"),
        ({"window": 4.5}, "as many axes"),
        ({"window": (4.5,)}, "as many axes"),
        ({"grid": (4, 5), "key_mask": torch.ones(20).bool()}, r"bools \[1 or 1, 20\]"),
        ({"grid": (4, 5), "key_mask": torch.ones(1, 19).bool()}, r"bools \[1 or 1, 20\]"),
        ({"grid": (4, 5), "v": torch.zeros(1, 1, 19, 8)}, "k and v differ"),
        ({"q": torch.zeros(20, 8)}, "give \\[batch"),
    ],
)
def test_errors_name_the_cause_and_the_fix(change, words):
    q = torch.zeros(1, 1, 20, 8)
    given = {"q": q, "k": q, "v": q, "window": 2, **change}
    with pytest.raises(KernelError, match=words):
        window_attention(**given)
