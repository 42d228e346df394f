"""`skip_experts`: each path against the formula in float64."""

from typing import get_args
from unittest.mock import Mock

import numpy as np
import pytest
import torch
import torch._dynamo.testing
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from accelerate_hooks.kernels import FALLBACKS, KernelError, _native, experts, skip_experts
from accelerate_hooks.kernels._dispatch import interpreted

BOUND = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}


@st.composite
def mixtures(draw, widths=(16, 32, 80), dtypes=tuple(BOUND)):
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    count, k = draw(st.integers(1, 5)), draw(st.integers(1, 4))
    tokens = draw(st.sampled_from([0, 1, 2, 3, 7, 30]))
    h, inner = draw(st.sampled_from(widths)), draw(st.sampled_from(widths))
    act = draw(st.sampled_from(get_args(experts.Act)))
    gated = draw(st.booleans()) or act == "clamped_swiglu"
    transposed, biased = draw(st.booleans()), draw(st.booleans())
    dtype = draw(st.sampled_from(dtypes))

    def tensor(*shape, scale=1.0):
        return (torch.randn(*shape, generator=generator) * scale).to(dtype)

    features = inner * (2 if gated else 1)
    up, down = tensor(count, features, h, scale=h**-0.5), tensor(count, h, inner, scale=0.2)
    if transposed:
        up, down = up.mT.contiguous(), down.mT.contiguous()
    indices = torch.randint(0, count + draw(st.integers(0, 1)), (tokens, k), generator=generator)
    weights = torch.rand(tokens, k, generator=generator)
    weights *= torch.rand(tokens, k, generator=generator) < draw(st.sampled_from([0.0, 0.5, 1.0]))
    biases = (tensor(count, features), tensor(count, h)) if biased else (None, None)
    return (tensor(tokens, h), indices, weights, up, down, *biases, act, gated, transposed)


def wide(given_):
    return [t.double() if torch.is_tensor(t) and t.is_floating_point() else t for t in given_]


def agree(got, given_):
    wanted = experts.reference(*wide(given_))
    assert got.dtype == given_[0].dtype and got.shape == given_[0].shape
    assert (got.double() - wanted).norm() <= BOUND[got.dtype] * wanted.norm() + 1e-12


def by_hand(hidden, indices, weights, up, down, a, b, act, gated, transposed):
    """Dense: every expert for every token, weighed with a matrix of weights."""
    up, down = (m.mT if transposed else m for m in (up, down))
    x = torch.einsum("efh,th->tef", up, hidden)
    x = x if a is None else x + a
    y = torch.einsum("ehi,tei->teh", down, experts.activate(x, act, gated))
    y = y if b is None else y + b
    share = weights.new_zeros(len(hidden), len(up) + 1).scatter_add(1, indices, weights)[:, :-1]
    return torch.einsum("te,teh->th", share, y)


@given(mixtures())
@settings(max_examples=50)
def test_the_reference_is_the_formula(drawn):
    exact = wide(drawn)
    wanted = by_hand(*exact)
    assert torch.allclose(experts.reference(*exact), wanted, rtol=1e-10, atol=1e-12)


@given(mixtures(widths=(5, 16, 80)))
def test_products_agree(drawn):
    agree(experts.grouped(*drawn), drawn)


@given(mixtures(widths=(16, 32, 80, 208), dtypes=(torch.float32, torch.bfloat16)))
def test_streams_agree(drawn):
    agree(experts.streamed(*drawn), drawn)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("act", get_args(experts.Act))
def test_streams_hide_no_nan(act, bad):
    hidden, indices, weights, up, down = example()
    hidden[1, 3] = bad
    given_ = (hidden, indices, weights, up, down[..., :32], None, None, act, True, False)
    got, wanted = experts.streamed(*given_), experts.grouped(*given_)
    assert torch.equal(got.isfinite(), wanted.isfinite()) and not got[1].isfinite().all()


@given(mixtures(widths=(5, 24)))
@settings(max_examples=30)
def test_any_width_is_taken(drawn):
    agree(skip_experts(*drawn[:5], up_bias=drawn[5], down_bias=drawn[6], act=drawn[7],
                       gated=drawn[8], transposed=drawn[9]), drawn)  # fmt: skip


@pytest.mark.skipif(not interpreted(), reason="needs TRITON_INTERPRET=1 (make test sets it)")
@given(mixtures(widths=(5, 24, 80)))
@settings(max_examples=25)
def test_triton_agrees(drawn):
    from accelerate_hooks.kernels._experts_triton import launch

    agree(launch(*drawn), drawn)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@given(mixtures(widths=(16, 80, 129, 256)))
def test_triton_agrees_on_a_gpu(drawn):
    moved = [t.cuda() if torch.is_tensor(t) else t for t in drawn]
    agree(torch.ops.accelerate_hooks.skip_experts(*moved).cpu(), drawn)


@pytest.mark.skipif(not interpreted(), reason="needs TRITON_INTERPRET=1 (make test sets it)")
def test_triton_many_tiles_of_one_expert(monkeypatch):
    """More slots than one tile, an expert that nobody asks, and poison where nothing is written."""
    monkeypatch.setenv("ACCELERATE_HOOKS_KERNELS", "triton")
    generator = torch.Generator().manual_seed(0)
    up, down = torch.randn(5, 96, 48, generator=generator), torch.randn(5, 48, 48)
    hidden = torch.randn(300, 48, generator=generator)
    indices = torch.randint(0, 2, (300, 3), generator=generator) * 4
    weights = torch.rand(300, 3, generator=generator)
    weights[::3, 1] = 0.0
    up[1:4] = torch.nan
    given_ = (hidden, indices, weights, up, down)
    got = skip_experts(*given_)
    wanted = experts.grouped(*given_, None, None, "silu", True, False)
    assert (got - wanted).norm() <= 2e-6 * wanted.norm()


def example(tokens=3, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    up, down = (torch.randn(s, generator=generator).to(dtype) for s in ((4, 64, 16), (4, 16, 32)))
    hidden = torch.randn(tokens, 16, generator=generator).to(dtype)
    indices = torch.randint(0, 4, (tokens, 2), generator=generator)
    return hidden, indices, torch.rand(tokens, 2, generator=generator), up, down


def test_skipped_slots_are_not_read():
    hidden, indices, weights, up, down = example()
    indices[:, 1] = 3
    weights[:, 1] = 0.0
    indices[:, 0] = torch.tensor([0, 1, 2])
    up[3] = torch.nan
    assert skip_experts(hidden, indices, weights, up, down).isfinite().all()


@pytest.mark.parametrize("choice", ["auto", "torch", "triton"])
@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int16, torch.int32])
def test_indices_are_any_integers(dtype, choice, monkeypatch):
    if choice == "triton" and not interpreted():
        pytest.skip("needs TRITON_INTERPRET=1 (make test sets it)")
    hidden, indices, weights, up, down = example()
    wanted = skip_experts(hidden, indices, weights, up, down)
    monkeypatch.setenv("ACCELERATE_HOOKS_KERNELS", choice)
    got = skip_experts(hidden, indices.to(dtype), weights, up, down)
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)
    none = skip_experts(hidden, indices.to(dtype), weights, up[:0], down[:0])
    assert torch.equal(none, torch.zeros_like(hidden))


@pytest.mark.parametrize("choice", ["auto", "torch"])
@pytest.mark.parametrize("width", [16, 24])
@pytest.mark.parametrize("autocast", [torch.bfloat16, torch.float16])
def test_autocast_changes_nothing(choice, width, autocast, monkeypatch):
    """What it is given has one dtype already."""
    monkeypatch.setenv("ACCELERATE_HOOKS_KERNELS", choice)
    up, down = torch.randn(4, 64, width), torch.randn(4, width, 32)
    hidden, indices, weights = torch.randn(5, width), torch.randint(0, 4, (5, 2)), torch.rand(5, 2)
    wanted = skip_experts(hidden, indices, weights, up, down)
    with torch.autocast("cpu", autocast):
        assert torch.equal(skip_experts(hidden, indices, weights, up, down), wanted)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_default_dtype_is_the_users(dtype):
    wanted = skip_experts(*example())
    given_ = example()
    torch.set_default_dtype(dtype)
    try:
        got = skip_experts(*given_)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(got, wanted)


@pytest.mark.filterwarnings("ignore:.torch.jit")  # of jvp itself
@pytest.mark.parametrize("place", [0, 2, 3, 4])
def test_tangents_are_refused(place):
    given_ = example()

    def run(t):
        return skip_experts(*given_[:place], t, *given_[place + 1 :])

    with pytest.raises(KernelError, match="no derivative"):
        torch.func.jvp(run, (given_[place],), (given_[place],))


@given(mixtures(widths=(16, 32, 80), dtypes=(torch.float32, torch.bfloat16)))
@settings(max_examples=50)
@torch.no_grad()
def test_past_the_dispatcher_it_is_the_same(drawn):
    named = dict(
        zip(("up_bias", "down_bias", "act", "gated", "transposed"), drawn[5:], strict=True)
    )
    runs = [skip_experts(*drawn[:5], **named) for _ in range(2)]
    assert experts._looks(drawn) in experts._STREAMED
    runs += [torch.ops.accelerate_hooks.skip_experts(*drawn), experts.streamed(*drawn)]
    assert all(torch.equal(run, runs[0]) for run in runs[1:])


class Names(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.heard = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.heard.add(func.name())
        return func(*args, **(kwargs or {}))


def test_who_listens_hears_it():
    """Also of arguments that are known by now."""
    name, given_ = "accelerate_hooks::skip_experts", example()

    def run():
        return skip_experts(*given_)

    with torch.no_grad():
        wanted = run(), run()
        with Names() as names:
            run()
        with torch.profiler.profile() as profiler:
            run()
        assert name in names.heard and name in {event.key for event in profiler.key_averages()}
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(run(), wanted[0])
        rows = torch.vmap(lambda x: skip_experts(x, *given_[1:]))(given_[0].expand(2, -1, -1))
        assert torch.equal(rows[1], wanted[0])
        given_[0].requires_grad_()
        run()
    with pytest.raises(KernelError, match="no backward"):
        run()


@torch.no_grad()
def test_what_is_known_is_asked_again_where_it_looks_otherwise(monkeypatch):
    given_ = example()
    hidden, up, down = given_[0], *given_[3:]
    wanted = skip_experts(*given_)
    assert experts._looks((*given_, None, None, "silu", True, False)) in experts._STREAMED
    with pytest.raises(KernelError, match="give one of silu"):
        skip_experts(*given_, act=["silu"])
    with pytest.raises(KernelError, match="do not fit together"):
        skip_experts(*given_, transposed=True)
    for flag in (1.0, 1, np.True_):
        with pytest.raises(KernelError, match="give a bool"):
            skip_experts(*given_, gated=flag)
    with pytest.raises(KernelError, match="give dense tensors"):
        skip_experts(hidden.to_mkldnn(), *given_[1:])
    with pytest.raises(KernelError, match="one device"):
        skip_experts(*given_[:4], down.to("meta"))
    turned = up.mT.contiguous().mT
    before = FALLBACKS.copy()
    agree(skip_experts(*given_[:3], turned, down), (*given_, None, None, "silu", True, False))
    assert ("skip_experts", "matrices that are not contiguous") in FALLBACKS - before
    negative = torch.complex(hidden, -hidden).conj().imag  # minus itself, by a bit of the tensor
    assert negative.is_neg() and torch.equal(negative, hidden)
    torch.testing.assert_close(skip_experts(negative, *given_[1:]), wanted)
    monkeypatch.setattr(experts, "streamed", None)
    monkeypatch.setenv("ACCELERATE_HOOKS_KERNELS", "torch")
    torch.testing.assert_close(skip_experts(*given_), wanted)


@torch.no_grad()
def test_memory_that_is_gone_is_an_error():
    given_ = example()
    skip_experts(*given_)
    given_[4].untyped_storage().resize_(0)
    with pytest.raises(KernelError, match="was freed"):
        skip_experts(*given_)


@pytest.mark.parametrize("strict", [False, True])
def test_any_number_of_tokens_is_exported(strict):
    class Layer(torch.nn.Module):
        def forward(self, hidden, indices, weights, up, down):
            return skip_experts(hidden, indices, weights, up, down)

    tokens, given_ = torch.export.Dim("tokens", min=2, max=4096), example()
    shapes = {
        "hidden": {0: tokens}, "indices": {0: tokens}, "weights": {0: tokens},
        "up": None, "down": None,
    }  # fmt: skip
    program = torch.export.export(Layer(), given_, dynamic_shapes=shapes, strict=strict)
    more = example(7)
    torch.testing.assert_close(program.module()(*more), skip_experts(*more))


@torch.no_grad()
def test_what_becomes_known_compiles_nothing_again():
    counter = torch._dynamo.testing.CompileCounter()
    compiled, given_ = torch.compile(skip_experts, backend=counter, fullgraph=True), example()
    for tokens in (3, 5, 7, 9):
        skip_experts(*example(tokens))
        torch.testing.assert_close(compiled(*given_), skip_experts(*given_))
    assert counter.frame_count == 1


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.uint16, torch.int32])
@pytest.mark.parametrize("tokens", [3, 600])
@torch.no_grad()
def test_what_is_known_takes_any_integers(dtype, tokens):
    """As many experts as a byte cannot count, on either side of what C takes."""
    generator = torch.Generator().manual_seed(0)
    up, down = torch.randn(256, 32, 16, generator=generator), torch.randn(256, 16, 16)
    hidden, weights = torch.randn(tokens, 16, generator=generator), torch.ones(tokens, 1)
    indices = torch.randint(0, 3, (tokens, 1), generator=generator)
    given_ = (hidden, indices, weights, up, down, None, None, "silu", True, False)
    assert (experts.streamed(*given_) is None) == (tokens == 600)
    for _ in range(3):
        got = skip_experts(hidden, indices.to(dtype), weights, up, down)
        torch.testing.assert_close(got, experts.grouped(*given_), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("threads", "refused"), [(1, False), (3, False), (3, True)])
def test_threads_of_our_own_agree(threads, refused, monkeypatch):
    """Where PyTorch's are not those of GNU OpenMP; also where no thread can be had."""
    if refused:
        error = RuntimeError("can't start new thread")
        monkeypatch.setattr(_native.threading.Thread, "start", Mock(side_effect=error))
    count, started = torch.get_num_threads(), []
    new = _native._PARALLEL(
        lambda *given_: (started.append(given_[2]), _native._new_threads(*given_))[0]
    )
    monkeypatch.setattr(_native, "parallel", lambda: new)
    torch.set_num_threads(threads)
    try:
        given_ = (*example(64), None, None, "silu", True, False)
        agree(experts.streamed(*given_), given_)
    finally:
        torch.set_num_threads(count)
    assert started == ([] if threads == 1 else [threads])


def test_opcheck():
    given_ = (*example(), None, None, "silu", True, False)
    torch.library.opcheck(torch.ops.accelerate_hooks.skip_experts.default, given_)


@pytest.mark.slow
def test_compiles_as_one_graph():
    hidden, indices, weights, up, down = example()

    def twice(hidden):
        return skip_experts(hidden * 2, indices, weights, up, down) * 2

    compiled = torch.compile(twice, fullgraph=True)
    torch.testing.assert_close(compiled(hidden), twice(hidden))


def test_without_a_compiler_it_agrees(monkeypatch):
    monkeypatch.setenv("CC", "no-such-compiler")
    monkeypatch.setattr(_native, "_BUILT", {})
    given_ = example()
    agree(skip_experts(*given_), (*given_, None, None, "silu", True, False))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"act": "tanh"}, "give one of silu"),
        ({"weights": torch.ones(2, 2)}, "give \\[T, H\\]"),
        ({"gated": False}, "do not fit together"),
        ({"transposed": True}, "do not fit together"),
        ({"down": torch.zeros(4, 16, 32).bfloat16()}, "one floating-point dtype"),
        ({"indices": torch.zeros(3, 2)}, "give integers"),
        ({"indices": torch.zeros(3, 2, dtype=torch.bool)}, "give integers"),
        ({"up_bias": torch.zeros(4, 63)}, "up_bias is"),
        ({"hidden": torch.zeros(3, 16, requires_grad=True)}, "no backward"),
        ({"weights": torch.ones(3, 2, device="meta")}, "one device"),
        ({"hidden": None}, "give dense tensors"),
        ({"up": [1.0]}, "give dense tensors"),
        ({"down": torch.eye(2).to_sparse()}, "give dense tensors"),
        ({"weights": torch.ones(3, 2, dtype=torch.complex64)}, "give floats"),
        ({"gated": "yes"}, "give a bool"),
    ],
)
def test_errors_name_the_cause_and_the_fix(change, words):
    names = ("hidden", "indices", "weights", "up", "down")
    given_ = dict(zip(names, example(), strict=True)) | change
    with pytest.raises(KernelError, match=words):
        skip_experts(**given_)
