"""Block-sparse attention: each implementation against the formula in float64."""

import math
import platform
import shutil
import threading
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import forward_ad

from accelerate_hooks.kernels import (
    KernelError,
    _native,
    attention_mass,
    block_sparse,
    block_sparse_attention,
)
from accelerate_hooks.kernels._dispatch import FALLBACKS, heard, interpreted

# Relative RMS of the output against float64 on the same (rounded) inputs.
BOUND = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
# Scores are summed in float32 whatever the dtype. PyTorch's CPU attention takes exponentials of
# half-precision inputs by a polynomial that is off by 5e-5 (measured at a single key).
LSE_BOUND = {torch.float32: 2e-6, torch.float16: 1e-4, torch.bfloat16: 1e-4}
FLOATS = st.sampled_from(list(BOUND))


@dataclass
class Problem:
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    mask: torch.Tensor
    block: tuple[int, int]
    causal: bool
    scale: float
    kept: torch.Tensor | None = None

    def arguments(self):
        counts, indices = block_sparse.to_indices(self.mask)
        return (
            self.q,
            self.k,
            self.v,
            counts,
            indices,
            self.kept,
            *self.block,
            self.causal,
            self.scale,
        )

    def with_lse(self):
        return *self.arguments(), True


@st.composite
def problems(draw, blocks=(16, 32), dtypes=FLOATS, most=100):
    batch, kv_heads = draw(st.integers(0, 2)), draw(st.integers(1, 2))
    heads = kv_heads * draw(st.integers(1, 3))
    n, m = draw(st.integers(0, most)), draw(st.integers(0, most))
    d = draw(st.sampled_from([1, 8, 20, 32, 40, 64]))
    bq, bk = draw(st.sampled_from(blocks)), draw(st.sampled_from(blocks))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    spread = draw(st.sampled_from([0.1, 1.0, 6.0]))
    dtype, strided = draw(dtypes), draw(st.sampled_from(["plain", "tokens first", "every second"]))

    def tensor(count, length):
        if strided == "tokens first":
            t = torch.randn(batch, length, count, d, generator=generator).transpose(1, 2)
        elif strided == "every second":
            t = torch.randn(batch, count, length, 2 * d, generator=generator)[..., ::2]
        else:
            t = torch.randn(batch, count, length, d, generator=generator)
        return (t * spread).to(dtype)

    shape = (draw(st.sampled_from([1, batch])), draw(st.sampled_from([1, heads])))
    density = draw(st.sampled_from([0.0, 0.3, 0.7, 1.0]))
    shape = (*shape, math.ceil(n / bq), math.ceil(m / bk))
    mask = torch.rand(shape, generator=generator) < density
    q, k, v = tensor(heads, n), tensor(kv_heads, m), tensor(kv_heads, m)
    scale = draw(st.sampled_from([1.0 / math.sqrt(d), 0.05]))
    kept = None
    if draw(st.booleans()):
        kept = torch.rand(batch, m, generator=generator) < draw(st.sampled_from([0.0, 0.5, 0.9]))
    return Problem(q, k, v, mask, (bq, bk), draw(st.booleans()), scale, kept)


def exact(p: Problem):
    """The formula, query by query and key by key, from the mask and not from the indices."""
    q, k, v = (t.double() for t in (p.q, p.k, p.v))
    groups = q.shape[1] // k.shape[1]
    out = torch.zeros_like(q)
    lse = torch.full(q.shape[:3], -math.inf, dtype=torch.float64)
    mask = p.mask.expand(*q.shape[:2], *p.mask.shape[2:])
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            for i in range(q.shape[2]):
                top = min(i + 1, k.shape[2]) if p.causal else k.shape[2]
                row = mask[b, h, i // p.block[0]]
                seen = [j for j in range(top) if row[j // p.block[1]]]
                seen = [j for j in seen if p.kept is None or p.kept[b, j]]
                if seen:
                    scores = k[b, h // groups, seen] @ q[b, h, i] * p.scale
                    lse[b, h, i] = scores.logsumexp(0)
                    out[b, h, i] = scores.softmax(0) @ v[b, h // groups, seen]
    return out, lse


def agree(got, wanted, dtype):
    out, lse = got
    assert torch.isfinite(out).all()
    norm = wanted[0].norm()
    assert (out.double() - wanted[0]).norm() <= BOUND[dtype] * norm
    nothing = wanted[1] == -math.inf
    assert torch.equal(nothing, lse == -math.inf)
    assert not out[nothing].any(), "a query with nothing to attend to gives zeros"
    off = (lse.double() - wanted[1])[~nothing].abs()
    bound = LSE_BOUND[dtype] * (1 + wanted[1].abs()[~nothing])
    assert (off <= bound).all()


@given(problems(most=40))
@settings(max_examples=30)
def test_the_reference_is_the_formula(p):
    agree(block_sparse.reference(*p.with_lse()), exact(p), p.q.dtype)


def wide(p):
    q, k, v, *rest = p.with_lse()
    return block_sparse.reference(q.double(), k.double(), v.double(), *rest)


@pytest.fixture(scope="module")
def memory_of_nan():
    """New tensors hold NaN."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)


@given(problems())
def test_the_gathered_path_agrees(memory_of_nan, p):
    agree(block_sparse.gathered(*p.with_lse()), wide(p), p.q.dtype)


@given(problems(blocks=(5, 24, 128)))
def test_the_gathered_path_takes_any_block(memory_of_nan, p):
    agree(block_sparse.gathered(*p.with_lse()), wide(p), p.q.dtype)


@pytest.fixture(scope="module")
def compiler():
    try:
        _native.library("_block_sparse")
    except _native.Unavailable as error:
        pytest.skip(str(error))


@given(problems(blocks=(16, 32, 48, 128)))
def test_the_compiled_path_agrees(memory_of_nan, compiler, p):
    agree(block_sparse.compiled(*p.with_lse()), wide(p), p.q.dtype)


def test_nan_is_not_hidden(compiler):
    """What is not a number stays so where it is seen, and nowhere else."""
    q, k, v = qkv(n=64)
    q[0, 1, 3, 2] = k[1, 2, 40, 0] = math.nan
    mask = torch.eye(2, dtype=torch.bool).expand(2, 3, 2, 2)
    out = block_sparse_attention(q, k, v, mask, block_size=32).isnan().any(-1)
    wanted = torch.zeros_like(out)
    wanted[0, 1, 3] = wanted[1, 2, 32:] = True
    assert torch.equal(out, wanted)


@pytest.mark.slow
@pytest.mark.parametrize("flag", ["-mno-avx512f", "-mno-avx", "-O0"])
def test_other_vectors_agree(flag, compiler, monkeypatch):
    """The same source on a CPU of fewer lanes."""
    if flag.startswith("-mno") and platform.machine() != "x86_64":
        pytest.skip("x86 only")
    monkeypatch.setenv("CC", f"{shutil.which('gcc') or 'cc'} {flag}")
    monkeypatch.setattr(_native, "_BUILT", {})
    q, k, v = qkv(n=100, d=40)
    mask = torch.rand(2, 3, 4, 4, generator=torch.Generator().manual_seed(3)) < 0.6
    p = Problem(q, k, v, mask, (32, 32), True, 0.2)
    agree(block_sparse.compiled(*p.with_lse()), wide(p), q.dtype)


def test_a_damaged_library_is_built_again(monkeypatch, tmp_path, compiler):
    build = _native._build
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "one"))
    assert not isinstance(build("_experts"), str)
    (made,) = (tmp_path / "one" / "accelerate_hooks").glob("*.so")
    damaged = tmp_path / "two" / "accelerate_hooks" / made.name
    damaged.parent.mkdir(parents=True)
    damaged.write_bytes(b"")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "two"))
    assert not isinstance(build("_experts"), str)
    assert damaged.stat().st_size == made.stat().st_size
    monkeypatch.setenv("CC", 'gcc "')
    assert "No closing quotation" in build("_experts")


def test_without_a_compiler_the_reason_is_counted(monkeypatch):
    monkeypatch.setenv("CC", "no-such-compiler")
    monkeypatch.setattr(_native, "_BUILT", {})
    q, k, v = qkv()
    before = FALLBACKS.copy()
    out = block_sparse_attention(q, k, v, torch.ones(1, 1, 3, 3, dtype=torch.bool))
    ((op, reason),) = FALLBACKS - before
    assert op == "block_sparse_attention"
    assert "no-such-compiler cannot build _block_sparse.c" in reason
    torch.testing.assert_close(out, F.scaled_dot_product_attention(q, k, v))


@pytest.mark.parametrize(
    ("dtype", "size", "reason"),
    [
        (torch.float64, 128, "dtype torch.float64"),
        (torch.float32, 24, "blocks of 24 keys (multiples of 16)"),
    ],
)
def test_what_c_cannot_take_is_counted(dtype, size, reason, monkeypatch):
    monkeypatch.setenv("ACCELERATE_HOOKS_KERNELS", "auto")
    q, k, v = qkv(n=100, dtype=dtype)
    count = math.ceil(100 / size)
    before = FALLBACKS.copy()
    block_sparse_attention(q, k, v, torch.ones(1, 1, count, count).bool(), block_size=size)
    assert FALLBACKS - before == {("block_sparse_attention", reason): 1}


def test_a_broken_compiler_leaves_nothing_behind(monkeypatch, tmp_path):
    monkeypatch.setenv("CC", f"{shutil.which('gcc') or 'cc'} --no-such-flag")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(_native.Unavailable, match="no-such-flag"):
        raise _native.Unavailable(_native._build("_block_sparse"))
    assert list((tmp_path / "accelerate_hooks").iterdir()) == []


def poisoned(p, device="cpu"):
    from accelerate_hooks.kernels import _block_sparse_triton

    out = torch.full(p.q.shape, math.nan, dtype=p.q.dtype, device=device)
    lse = torch.full(p.q.shape[:3], math.nan, device=device)
    given = [t.to(device) if isinstance(t, torch.Tensor) else t for t in p.arguments()]
    _block_sparse_triton.launch(*given, out, lse)
    return out.cpu(), lse.cpu()


@pytest.mark.skipif(not interpreted(), reason="needs TRITON_INTERPRET=1 (make test sets it)")
@given(problems(most=70))
@settings(max_examples=40)
def test_triton_agrees(p):
    agree(poisoned(p), wide(p), p.q.dtype)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@given(problems(blocks=(16, 32, 64, 128), most=500))
def test_triton_agrees_on_a_gpu(p):
    agree(poisoned(p, "cuda"), wide(p), p.q.dtype)


def qkv(n=300, heads=3, d=32, m=None, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, heads, n, d), *[(2, heads, m or n, d)] * 2]
    return [torch.randn(s, generator=generator).to(dtype) for s in shapes]


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("choice", ["torch", "triton"])
def test_a_full_mask_is_dense_attention(causal, choice, monkeypatch):
    if choice == "triton" and not interpreted():
        pytest.skip("needs TRITON_INTERPRET=1 (make test sets it)")
    monkeypatch.setenv("ACCELERATE_HOOKS_KERNELS", choice)
    q, k, v = qkv()
    mask = torch.ones(1, 1, 3, 3, dtype=torch.bool)
    out = block_sparse_attention(q, k, v, mask, is_causal=causal)
    dense = F.scaled_dot_product_attention(q, k, v, is_causal=causal)
    torch.testing.assert_close(out, dense, atol=2e-6, rtol=1e-5)


@given(st.integers(0, 2**31), st.integers(1, 9), st.integers(0, 9))
def test_indices_and_masks_are_inverse(seed, rows, columns):
    mask = torch.rand(2, 3, rows, columns, generator=torch.Generator().manual_seed(seed)) < 0.5
    counts, indices = block_sparse.to_indices(mask)
    assert torch.equal(block_sparse.to_mask(counts, indices), mask)
    assert counts.dtype == indices.dtype == torch.int32


@given(st.integers(0, 2**31), st.integers(1, 4), st.integers(1, 9))
def test_what_stands_behind_the_chosen_is_nobodys(seed, rows, columns):
    """Padding of any kind, and any order."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(2, 3, rows, columns, generator=generator) < 0.5
    counts = mask.sum(-1)
    order = (torch.rand(mask.shape, generator=generator) - 2.0 * mask).argsort(-1)
    padding = torch.randint(-9, 19, mask.shape, generator=generator)
    indices = order.where(torch.arange(columns) < counts.unsqueeze(-1), padding)
    assert torch.equal(block_sparse.to_mask(counts, indices), mask)
    q, k, v = (
        torch.randn(2, 3, n, 8, generator=generator) for n in (rows * 16, *[columns * 16] * 2)
    )
    wanted = block_sparse_attention(q, k, v, mask, block_size=16)
    for dtype in (torch.float32, torch.float64):
        given_ = [t.to(dtype) for t in (q, k, v)]
        got = block_sparse_attention(*given_, (counts, indices), block_size=16)
        torch.testing.assert_close(got.float(), wanted)


def test_indices_in_the_place_of_a_mask():
    q, k, v = qkv()
    mask = torch.rand(2, 1, 3, 3, generator=torch.Generator().manual_seed(1)) < 0.6
    one = block_sparse_attention(q, k, v, mask, return_lse=True)
    other = block_sparse_attention(q, k, v, block_sparse.to_indices(mask), return_lse=True)
    for a, b in zip(one, other, strict=True):
        assert torch.equal(a, b)


def test_indices_of_any_integer_and_none_outside():
    q, k, v = qkv()
    mask = torch.rand(2, 3, 3, 3, generator=torch.Generator().manual_seed(1)) < 0.6
    counts, indices = block_sparse.to_indices(mask)
    wanted = block_sparse_attention(q, k, v, mask)
    got = block_sparse_attention(q, k, v, (counts.long(), indices.long()))
    assert torch.equal(got, wanted)
    full = block_sparse.to_indices(torch.ones_like(mask))
    for wrong in ((full[0], full[1] + 1), (full[0], full[1] - 1), (full[0] + 1, full[1])):
        with pytest.raises(KernelError, match="outside the 3 blocks"):
            block_sparse_attention(q, k, v, wrong)
    with pytest.raises(KernelError, match="outside the 3 blocks"):
        block_sparse_attention(q, k, v, (full[0], full[1].long() + (1 << 32)))
    twice = full[1].clone()
    twice[1, 2, 0] = torch.tensor([0, 2, 0])
    with pytest.raises(KernelError, match="name a block twice"):
        block_sparse_attention(q, k, v, (full[0], twice))
    with pytest.raises(KernelError, match="give integers"):
        block_sparse_attention(q, k, v, (counts.float(), indices))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_default_dtype_is_the_users(dtype):
    q, k, v = qkv()
    mask = torch.ones(1, 1, 3, 3, dtype=torch.bool)
    kept = torch.arange(300).expand(2, -1) < 250
    wanted = block_sparse_attention(q, k, v, mask, key_mask=kept, return_lse=True)
    torch.set_default_dtype(dtype)
    try:
        got = block_sparse_attention(q, k, v, mask, key_mask=kept, return_lse=True)
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("path", ["compiled", "gathered", "reference", "triton"])
@pytest.mark.filterwarnings("ignore:invalid value")  # of the interpreter
def test_what_is_not_seen_is_not_read(path, bad, compiler):
    """Neither keys nor values of blocks that are not chosen, or of padding."""
    if path == "triton" and not interpreted():
        pytest.skip("needs TRITON_INTERPRET=1 (make test sets it)")
    run = poisoned if path == "triton" else lambda p: getattr(block_sparse, path)(*p.with_lse())
    q, k, v = qkv(n=96)
    kept = torch.arange(96).expand(2, -1) % 32 < torch.tensor([[20], [32]])
    mask = torch.tensor([[1, 1, 0], [1, 0, 1], [1, 0, 0]]).bool().expand(2, 3, 3, 3)
    p = Problem(q, k, v, mask, (32, 32), False, 0.2, kept)
    wanted = run(p)
    for t in (k, v):
        t[0, :, ~kept[0]] = bad
    for got, want in zip(run(p), wanted, strict=True):
        assert torch.equal(got, want)
    for t in (k, v):
        t[:, :, 40] = bad
    for got, want in zip(run(p), wanted, strict=True):
        assert not got[:, :, :32].isfinite().all()
        assert torch.equal(got[:, :, 32:], want[:, :, 32:])


@pytest.mark.parametrize("choice", ["auto", "torch", "triton"])
@pytest.mark.parametrize("size", [(1 << 40, 16), (16, 1 << 40), (1 << 40, 1 << 40), (1000, 7000)])
@pytest.mark.parametrize(("n", "m"), [(37, 50), (1, 0)])
def test_a_block_is_no_longer_than_what_there_is(choice, size, n, m, monkeypatch):
    """The memory of a larger one would be terabytes."""
    if choice == "triton" and not interpreted():
        pytest.skip("needs TRITON_INTERPRET=1 (make test sets it)")
    monkeypatch.setenv("ACCELERATE_HOOKS_KERNELS", choice)
    q, k, v = qkv(n=n, m=50)
    k, v = k[:, :, :m], v[:, :, :m]
    mask = torch.ones(1, 1, math.ceil(n / size[0]), math.ceil(m / size[1]), dtype=torch.bool)
    out = block_sparse_attention(q, k, v, mask, block_size=size, is_causal=True)
    wanted = F.scaled_dot_product_attention(q, k, v, is_causal=True) if m else torch.zeros_like(q)
    torch.testing.assert_close(out, wanted, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("block", [16, 24])
@pytest.mark.parametrize("choice", ["auto", "torch"])
def test_heads_of_no_channels_are_no_work(choice, block, monkeypatch):
    monkeypatch.setenv("ACCELERATE_HOOKS_KERNELS", choice)
    q = torch.zeros(1, 2, 40, 0)
    mask = torch.ones(1, 1, math.ceil(40 / block), math.ceil(40 / block), dtype=torch.bool)
    out, lse = block_sparse_attention(q, q, q, mask, block_size=block, scale=1.0, return_lse=True)
    assert out.shape == q.shape
    assert torch.allclose(lse, torch.full((1, 2, 40), math.log(40)))


def test_no_heads_are_no_work():
    q = torch.zeros(1, 0, 8, 4)
    assert block_sparse_attention(q, q, q, torch.ones(1, 1, 1, 1).bool()).shape == q.shape


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("n", "m"), [(70, 70), (0, 70), (70, 0)])
@pytest.mark.parametrize("turned", [False, True])
def test_opcheck(n, m, dtype, turned):
    q, k, v = qkv(n=70, dtype=dtype)
    q, k, v = q[:, :, :n], k[:, :, :m], v[:, :, :m]
    if turned:  # as models have them: [B, N, H, D] underneath
        q, k, v = (t.transpose(1, 2).contiguous().transpose(1, 2) for t in (q, k, v))
    mask = torch.ones(1, 1, math.ceil(n / 32), math.ceil(m / 32), dtype=torch.bool)
    counts, indices = block_sparse.to_indices(mask)
    torch.library.opcheck(
        torch.ops.accelerate_hooks.block_sparse_attention.default,
        (q, k, v, counts, indices, torch.rand(2, m) < 0.8, 32, 32, True, 0.1, True),
    )


@pytest.mark.parametrize("path", ["auto", "torch"])
def test_autocast_changes_nothing(monkeypatch, path):
    """The op says itself in which dtype it computes."""
    monkeypatch.setenv("ACCELERATE_HOOKS_KERNELS", path)
    q, k, v = qkv()
    mask = torch.rand(2, 3, 3, 3, generator=torch.Generator().manual_seed(2)) < 0.7
    wanted = block_sparse_attention(q, k, v, mask), attention_mass(q, k, 32)
    with torch.autocast("cpu", torch.bfloat16):
        got = block_sparse_attention(q, k, v, mask), attention_mass(q, k, 32)
    for a, b in zip(got, wanted, strict=True):
        assert a.dtype == b.dtype == torch.float32 and torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.uint16, torch.uint64, torch.complex64, torch.bool])
def test_numbers_of_blocks_are_integers_that_can_be_counted_with(dtype):
    q, k, v = qkv()
    counts, indices = block_sparse.to_indices(torch.ones(2, 3, 3, 3, dtype=torch.bool))
    with pytest.raises(KernelError, match="give integers"):
        block_sparse_attention(q, k, v, (counts.to(dtype), indices))


@pytest.mark.slow
def test_compiles_as_one_graph():
    q, k, v = qkv()
    mask = torch.rand(2, 3, 3, 3, generator=torch.Generator().manual_seed(2)) < 0.7

    def twice(q, k, v, mask):
        return block_sparse_attention(q * 2, k, v, mask) * 2

    compiled = torch.compile(twice, fullgraph=True)
    torch.testing.assert_close(compiled(q, k, v, mask), twice(q, k, v, mask))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"k": torch.zeros(2, 2, 300, 32), "v": torch.zeros(2, 2, 300, 32)}, "enable_gqa"),
        ({"q": torch.zeros(2, 3, 300, 16)}, "head size"),
        ({"v": torch.zeros(2, 3, 299, 32)}, "k and v differ"),
        ({"q": torch.zeros(2, 3, 300, 32, dtype=torch.float16)}, "one floating-point dtype"),
        ({"block_mask": torch.ones(1, 1, 3, 4, dtype=torch.bool)}, r"block_mask is \(1, 1, 3, 4\)"),
        ({"block_mask": torch.ones(1, 1, 3, 3)}, "give bools"),
        ({"block_size": 0}, "positive"),
        ({"block_size": 16.0}, "give an integer"),
        ({"block_mask": None}, "give bools"),
        ({"block_mask": torch.ones(1, 1, 3, 3, dtype=torch.bool, device="meta")}, "is on meta"),
        ({"block_mask": (None, torch.zeros(1, 1, 3, 3).int())}, "counts are a NoneType"),
        ({"block_mask": (torch.zeros(1, 1, 3).int(), [0])}, "indices are a list"),
        ({"block_mask": torch.zeros(2, 1, 1, 3, 3).int().unbind(0)}, r"counts is \(1, 1, 3, 3\)"),
        ({"key_mask": torch.ones(2, 299).bool()}, r"bools \[2 or 1, 300\]"),
        ({"key_mask": torch.ones(300).bool()}, r"bools \[2 or 1, 300\]"),
        ({"key_mask": torch.ones(2, 300, device="meta").bool()}, "on cpu"),
        ({"key_mask": [True] * 300}, r"bools \[2 or 1, 300\]"),
        ({"q": None}, "q is a NoneType"),
        ({"k": [1.0]}, "k is a list"),
        ({"scale": "a"}, "scale is a str"),
        ({"is_causal": "x"}, "give a bool"),
    ],
)
def test_errors_name_the_cause_and_the_fix(change, words):
    q, k, v = qkv()
    mask = torch.ones(1, 1, 3, 3, dtype=torch.bool)
    given = {"q": q, "k": k, "v": v, "block_mask": mask, **change}
    with pytest.raises(KernelError, match=words):
        block_sparse_attention(**given)


def test_gradients_are_refused():
    q, k, v = qkv()
    mask = torch.ones(1, 1, 3, 3, dtype=torch.bool)
    with pytest.raises(KernelError, match="no backward"):
        block_sparse_attention(q.requires_grad_(), k, v, mask)
    with torch.no_grad():
        block_sparse_attention(q, k, v, mask)


@pytest.mark.filterwarnings("ignore:.torch.jit")  # of jvp itself
@pytest.mark.parametrize("place", range(3))
def test_tangents_are_refused(place):
    given_ = qkv()
    mask = torch.ones(1, 1, 3, 3, dtype=torch.bool)

    def attend(t):
        return block_sparse_attention(*given_[:place], t, *given_[place + 1 :], mask)

    with pytest.raises(KernelError, match="no derivative"):
        torch.func.jvp(attend, (given_[place],), (given_[place],))
    with forward_ad.dual_level(), torch.no_grad():
        with pytest.raises(KernelError, match="no derivative"):
            attend(forward_ad.make_dual(given_[place], given_[place]))
        attend(given_[place])


def test_what_triton_cannot_take_is_counted(monkeypatch):
    if not interpreted():
        pytest.skip("needs TRITON_INTERPRET=1 (make test sets it)")
    monkeypatch.setenv("ACCELERATE_HOOKS_KERNELS", "triton")
    q, k, v = qkv(n=96)
    before = FALLBACKS.copy()
    out = block_sparse_attention(q, k, v, torch.ones(1, 1, 2, 2, dtype=torch.bool), block_size=48)
    new = FALLBACKS - before
    assert list(new) == [("block_sparse_attention", "block size 48 x 48 (powers of two from 16)")]
    torch.testing.assert_close(out, F.scaled_dot_product_attention(q, k, v))


def test_what_falls_back_is_heard_where_it_does(monkeypatch):
    monkeypatch.setenv("ACCELERATE_HOOKS_KERNELS", "auto")
    q, k, v = qkv()
    mask = torch.ones(1, 1, math.ceil(q.shape[2] / 5), math.ceil(k.shape[2] / 5), dtype=torch.bool)

    def other():
        block_sparse_attention(q, k, v, mask, block_size=5)

    with heard() as found:
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
        assert not found
        other()
    assert [op for op, _ in found] == ["block_sparse_attention"]


def test_an_unknown_choice_is_refused(monkeypatch):
    monkeypatch.setenv("ACCELERATE_HOOKS_KERNELS", "fast")
    q, k, v = qkv(n=48)
    with pytest.raises(KernelError, match="auto, torch, triton"):
        block_sparse_attention(q, k, v, torch.ones(1, 1, 1, 1, dtype=torch.bool))
