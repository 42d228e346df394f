"""Skipped blocks and rows leave no holes in KV caches, and slots follow the rows of a cache.

The oracle is slow and obviously right: each row alone (and padded as in the batch), every block
computed in full, which writes its keys and values, and its output then thrown away for its input.
"""

import contextlib
import copy
import gc
import pickle
import warnings
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from tiny_models import TINY, names
from torch import nn
from transformers import DynamicCache

from accelerate_hooks import Effect, Policy, UnsupportedModelError, enable
from accelerate_hooks import stand_in as stand_ins
from accelerate_hooks.run import Run

FAMILIES = (
    "llama", "qwen3", "gemma2", "gemma3_text", "gpt2", "gpt_neox", "gptj", "opt", "bloom", "falcon",
    "mpt", "phi", "mixtral", "gpt_oss", "deepseek_v3",
)  # fmt: skip
REST = tuple(n for n in names(kind="decoder") if n not in (*FAMILIES, "gemma3n_text"))
ENCODER_DECODERS = ("t5", "bart", "whisper")
NEW = 4
DEPTHS = (1, 4, 2)


@dataclass(frozen=True, kw_only=True)
class Exit(Policy):
    """While decoding, row r leaves before block ``depths[r]`` (all rows, if there is one depth)."""

    name: ClassVar[str] = "exit"
    depths: tuple[int, ...] = (2,)

    @property
    def kinds(self):
        return ("block",)

    def around(self, call):
        if call.step.phase != "decode":
            return call.proceed()
        go = [call.site.index < depth for depth in self.depths]
        if len(go) > 1:
            return call.proceed(rows=go)
        return call.proceed() if go[0] else call.skip()


class Discard:
    """A block's forward: all of the block's work, then its input."""

    def __init__(self, block: nn.Module, decoding: list[bool]) -> None:
        self.forward, self.decoding = block.forward, decoding

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        out = self.forward(*args, **kwargs)
        if not self.decoding[0]:
            return out
        x = args[0] if args else kwargs["hidden_states"]
        return x if isinstance(out, torch.Tensor) else (x, *out[1:])


def blocks_of(model: nn.Module) -> nn.ModuleList:
    lists = [
        module
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == 4 and "encoder" not in name
    ]
    return max(lists, key=lambda blocks: sum(p.numel() for p in blocks.parameters()))


@contextmanager
def discarding(model: nn.Module, depth: int) -> Iterator[None]:
    decoding = [False]
    blocks = blocks_of(model)
    for block in blocks[depth:]:
        block.forward = Discard(block, decoding)
    hook = model.register_forward_hook(lambda *_: decoding.__setitem__(0, True))
    try:
        yield
    finally:
        hook.remove()
        for block in blocks[depth:]:
            del block.forward


def generate(model: nn.Module, inputs: dict[str, Any], **more: Any) -> Any:
    settings: dict[str, Any] = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0}
    settings["use_cache"] = True  # MPT would do without
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return model.generate(
            **inputs, **settings | more, return_dict_in_generate=True, output_logits=True
        )


def per_row(model: nn.Module, inputs: dict[str, Any], depths: tuple[int, ...], **more: Any) -> Any:
    tokens, logits = [], []
    for row, depth in enumerate(depths):
        with discarding(model, depth):
            out = generate(model, {k: v[row : row + 1] for k, v in inputs.items()}, **more)
        tokens.append(out.sequences)
        logits.append(torch.stack(out.logits, 1))
    return torch.cat(tokens), torch.cat(logits)


def prompts(name: str) -> dict[str, Any]:
    """Three rows, two of them padded: on the left, or on the right of an encoder."""
    inputs = TINY[name].inputs(3)
    inputs = {k: v for k, v in inputs.items() if k not in ("use_cache", "decoder_input_ids")}
    if TINY[name].kind == "decoder":
        inputs["attention_mask"][0, :3] = 0
        inputs["attention_mask"][2, :1] = 0
    elif "attention_mask" in inputs:
        inputs["attention_mask"][0, 5:] = 0
    if "attention_mask" in inputs:
        inputs["input_ids"] = inputs["input_ids"] * inputs["attention_mask"]
    return inputs


def check(name: str, depths: tuple[int, ...], **more: Any) -> None:
    model, inputs = TINY[name].build(), prompts(name)
    tokens, logits = per_row(model, inputs, depths, **more)
    plain = torch.stack(generate(model, inputs, **more).logits, 1)
    settings = depths if len(set(depths)) > 1 else depths[:1]
    only = "*decoder*" if TINY[name].kind != "decoder" else None
    with enable(model, Exit(depths=settings), only=only) as session:
        out = generate(model, inputs, **more)
        skipped = sum(r.skipped + r.rows_left_out for r in session.records.values())
    got = torch.stack(out.logits, 1)
    assert torch.equal(out.sequences, tokens)
    assert (got - logits).abs().max() < 1e-4 * logits.abs().max()
    assert (plain - logits).abs().max() > 1e-3 * logits.abs().max(), "the oracle changes nothing"
    assert skipped == pytest.approx(sum(4 - d for d in depths) / 3 * (NEW - 1))
    lengths = {int(out.past_key_values.get_seq_length(i)) for i in range(4)}
    assert len(lengths) == 1, "not all layers are equally long"


@pytest.mark.parametrize("name", [*FAMILIES, *ENCODER_DECODERS])
def test_skipped_blocks_write_their_keys(name):
    check(name, (2, 2, 2))


@pytest.mark.parametrize("name", [*FAMILIES, *ENCODER_DECODERS])
def test_rows_leave_at_their_own_depth(name):
    check(name, DEPTHS)


@pytest.mark.slow
@pytest.mark.parametrize("depths", [(2, 2, 2), DEPTHS], ids=["skip", "rows"])
@pytest.mark.parametrize(
    "name", [*REST, *(n for n in names(kind="encoder-decoder") if n not in ENCODER_DECODERS)]
)
def test_every_other_family(name, depths):
    check(name, depths)


@pytest.mark.parametrize("depths", [(2, 2, 2), DEPTHS], ids=["skip", "rows"])
@pytest.mark.parametrize("name", ["llama", "gemma3_text", "mixtral"])
def test_static_caches(name, depths):
    check(name, depths, cache_implementation="static", disable_compile=True)


@pytest.mark.parametrize("name", ["qwen3_next", "lfm2", "jamba"])
def test_attention_layers_between_recurrent_ones_can_be_skipped(name):
    model, inputs = TINY[name].build(), prompts(name)
    with enable(model, Skipping(), only="model.layers.3") as session:
        out = generate(model, inputs)
        assert sum(r.skipped for r in session.records.values()) == NEW - 1
    assert out.past_key_values.get_seq_length(3) == out.past_key_values.get_seq_length(1)


@dataclass(frozen=True, kw_only=True)
class Skipping(Policy):
    name: ClassVar[str] = "skipping"
    kind: str = "block"

    @property
    def kinds(self):
        return (self.kind,)

    def around(self, call):
        return call.skip() if call.step.phase == "decode" else call.proceed()


@pytest.mark.parametrize("name", ["llama", "gpt2", "t5"])
def test_skipped_attention_writes_its_keys(name):
    """An attention adds nothing where it is skipped, but later tokens still see its keys."""
    model, inputs = TINY[name].build(), prompts(name)
    only = "*3.self_attn" if name == "llama" else "*h.3.attn" if name == "gpt2" else None
    if only is None:
        only = "decoder.block.3.layer.0.SelfAttention"
    with enable(model, Skipping(kind="attention"), only=only) as session:
        out = generate(model, inputs)
        assert sum(r.skipped for r in session.records.values()) == NEW - 1
    attention = model.get_submodule(session.sites[0].path)
    plain, decoding = attention.forward, [False]

    def silent(*args: Any, **kwargs: Any) -> Any:
        result = plain(*args, **kwargs)
        return (torch.zeros_like(result[0]), *result[1:]) if decoding[0] else result

    attention.forward = silent
    hook = model.register_forward_hook(lambda *_: decoding.__setitem__(0, True))
    want = generate(model, inputs)
    hook.remove()
    assert torch.equal(out.sequences, want.sequences)
    assert torch.equal(torch.stack(out.logits), torch.stack(want.logits))


# -- what is refused -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*names(kind="recurrent"), "gemma3n_text"])
def test_other_states_are_refused_by_name(name):
    model = TINY[name].build()
    with pytest.raises(UnsupportedModelError, match=rf"exit .*{type(model).__name__}.*only="):
        enable(model, Exit())
    assert "forward" not in vars(model)
    enable(model, Exit(), strict=False).disable()


def test_a_model_without_states_is_not_refused():
    for name in ("llama", "t5", "squeezebert", "wav2vec2", "flux"):
        enable(TINY[name].build(), Exit()).disable()


class Peculiar(DynamicCache):
    def push_state(self, *args):
        return args


def test_unknown_methods_of_a_cache_are_refused():
    model, inputs = TINY["llama"].build(), prompts("llama")
    layer = blocks_of(model)[3]
    attention = layer.self_attn
    plain = attention.forward

    def pushing(*args, past_key_values=None, **kwargs):
        past_key_values.push_state(1)
        return plain(*args, past_key_values=past_key_values, **kwargs)

    attention.forward = pushing
    for depths in ((2,), DEPTHS):
        with (
            enable(model, Exit(depths=depths)),
            pytest.raises(UnsupportedModelError, match=r"Peculiar\.push_state"),
        ):
            generate(model, inputs, past_key_values=Peculiar(config=model.config))


def test_a_state_that_is_no_cache_is_refused():
    with pytest.raises(UnsupportedModelError, match="'state' holds a dict"):
        stand_ins.find({"hidden_states": torch.zeros(1), "state": {"a": 1}})
    assert stand_ins.find({"x": None, "past_key_values": None, "use_cache": True}) == (None, None)


# -- which arguments are per-row -------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Some(Policy):
    """Only these rows are computed, in all blocks but the first."""

    name: ClassVar[str] = "some"
    rows: tuple[bool, ...] = (True, False)

    @property
    def kinds(self):
        return ("block",)

    def around(self, call):
        return call.proceed(rows=self.rows) if call.site.index else call.proceed()


def tables_as_long_as_the_batch():
    """(name, batch): flux has 24 image tokens and 7 text tokens, joint tables of 31."""
    return [("flux", 31), ("flux", 24), ("flux", 7), ("wan", 7), ("llama", 7), ("bloom", 8)]


@pytest.mark.parametrize(("name", "batch"), tables_as_long_as_the_batch())
def test_a_table_as_long_as_the_batch_is_not_sliced(name, batch):
    model, inputs = TINY[name].build(), TINY[name].inputs(batch)
    rows = tuple(i % 3 != 1 for i in range(batch))
    with torch.no_grad():
        plain = flat(model(**inputs))
        with enable(model, Some(rows=rows)) as session:
            first, second = flat(model(**inputs)), flat(model(**inputs))
            assert sum(r.rows_left_out for r in session.records.values()) > 1
    kept = torch.tensor(rows)
    for out in (first, second):
        assert (out[kept] - plain[kept]).abs().max() < 1e-5 * plain.abs().max()
        assert (out[~kept] - plain[~kept]).abs().max() > 1e-3 * plain.abs().max()


def flat(out: Any) -> torch.Tensor:
    return out.logits if hasattr(out, "logits") else out[0]


def test_rows_that_depend_on_each_other_are_refused():
    model, inputs = TINY["llama"].build(), TINY["llama"].inputs(3)
    block = blocks_of(model)[2]
    plain = block.forward
    block.forward = lambda *args, **kwargs: plain(*args, **kwargs).roll(1, 0)
    with (
        torch.no_grad(),
        enable(model, Some(rows=(True, False, True))),
        pytest.raises(UnsupportedModelError, match=r"layers\.2.*batch rows cannot be computed"),
    ):
        model(**inputs)


def test_rows_need_one_entry_a_row():
    model, inputs = TINY["llama"].build(), TINY["llama"].inputs(3)
    with (
        torch.no_grad(),
        enable(model, Some()),
        pytest.raises(UnsupportedModelError, match="2 entries for 3 rows"),
    ):
        model(**inputs)


# -- slots follow the rows -------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Diary(Policy):
    """Keeps what the first block was given, and compares it with what the cache holds of it."""

    name: ClassVar[str] = "diary"
    pages: ClassVar[list[tuple[int, int]]] = []

    @property
    def kinds(self):
        return ("block",)

    def acts(self, site):
        return frozenset({Effect.OBSERVE}) if site.index == 0 else frozenset()

    def around(self, call):
        follows = call.slot(dict, rows=True)
        stays = call.slot(list, scope="block")
        follows["x"] = torch.cat([follows["x"], call.x], 1) if "x" in follows else call.x
        stays.append(0)
        out = call.proceed()
        block = call.site.module
        value = block.self_attn.v_proj(block.input_layernorm(follows["x"]))
        cached = call.argument("past_key_values").layers[0].values
        cached = cached.transpose(1, 2).flatten(2)
        assert torch.allclose(value, cached, atol=1e-5)
        self.pages.append((follows["x"].shape[1], len(stays)))
        return out


@pytest.mark.parametrize("declared", [False, True])
def test_slots_follow_beams(declared):
    model = TINY["llama"].build()
    inputs = prompts("llama")
    Diary.pages.clear()
    moved = []
    plain = DynamicCache.reorder_cache
    with (
        enable(model, Diary()) as session,
        session.run() if declared else contextlib.nullcontext(),
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.setattr(
            DynamicCache,
            "reorder_cache",
            lambda self, index: (moved.append(index.tolist()), plain(self, index))[1],
        )
        generate(model, inputs, num_beams=3, max_new_tokens=8)
    assert any(index != sorted(set(index)) for index in moved), "no beam was ever dropped"
    assert [length for length, _ in Diary.pages] == list(range(7, 15))
    assert all(kept == 1 for _, kept in Diary.pages[1:]), "a slot without rows survived a move"


@pytest.mark.parametrize("beams", [2, 3])
def test_skipped_blocks_under_beam_search(beams):
    model, inputs = TINY["llama"].build(), prompts("llama")
    with discarding(model, 2):
        want = generate(model, inputs, num_beams=beams, max_new_tokens=6)
    with enable(model, Exit()):
        got = generate(model, inputs, num_beams=beams, max_new_tokens=6)
    assert torch.equal(got.sequences, want.sequences)
    mixed = tuple(DEPTHS[i % 3] for i in range(3 * beams))
    with enable(model, Exit(depths=mixed)) as session:
        generate(model, inputs, num_beams=beams, max_new_tokens=6)
        assert sum(r.rows_left_out for r in session.records.values()) > 3


@pytest.mark.parametrize("declared", [False, True])
def test_slots_follow_select_and_repeat(declared):
    model, inputs = TINY["llama"].build(), prompts("llama")
    Diary.pages.clear()
    with (
        torch.no_grad(),
        enable(model, Diary()) as session,
        session.run() if declared else contextlib.nullcontext(),
    ):
        cache = model(**inputs).past_key_values
        cache.batch_select_indices(torch.tensor([2, 0]))
        mask = torch.cat([inputs["attention_mask"], torch.ones(3, 1, dtype=torch.long)], 1)
        mask = mask[[2, 0]]
        token = torch.tensor([[5], [6]])
        model(input_ids=token, attention_mask=mask, past_key_values=cache)
        cache.batch_repeat_interleave(2)
        mask = torch.cat([mask, torch.ones(2, 1, dtype=torch.long)], 1).repeat_interleave(2, 0)
        model(input_ids=torch.arange(4)[:, None], attention_mask=mask, past_key_values=cache)
    assert Diary.pages == [(7, 1), (8, 1), (9, 1)]


@pytest.mark.parametrize("change", ["crop", "reset"])
def test_slots_go_when_the_cache_is_cut(change):
    model, inputs = TINY["llama"].build(), prompts("llama")
    with enable(model, Exit()) as session, torch.no_grad():
        cache = model(**inputs).past_key_values
        (run,) = session.roots[0].recogniser.runs()
        slots = run.slots
        slots["mine"] = object()
        cache.crop(-2) if change == "crop" else cache.reset()
        assert "mine" not in slots


# -- what following leaves behind ------------------------------------------------------------------


def test_followed_caches_are_plain_again():
    model, inputs = TINY["llama"].build(), prompts("llama")
    with torch.no_grad():
        twin = model(**inputs).past_key_values
        session = enable(model, Exit())
        cache = model(**inputs).past_key_values
        assert isinstance(cache, DynamicCache)
        copies = [copy.deepcopy(cache), copy.copy(cache), pickle.loads(pickle.dumps(cache))]
        for plain in copies:
            assert type(plain) is DynamicCache
            assert vars(plain).keys() == vars(twin).keys()
        for deep in (copies[0], copies[2]):  # a shallow copy shares the layers
            deep.reorder_cache(torch.tensor([1, 0, 2]))
        session.disable()
    assert type(cache) is DynamicCache
    assert vars(cache).keys() == vars(twin).keys()
    copies[0].reorder_cache(torch.tensor([1, 0, 2]))
    assert torch.equal(copies[0].layers[0].keys, cache.layers[0].keys)


def test_two_sessions_may_follow_one_cache():
    cache = DynamicCache()
    first, second = Run(signal="cache"), Run(signal="cache")
    stand_ins.follow(cache, first)
    stand_ins.follow(cache, second)
    stand_ins.unfollow(cache, first)
    second.cuts.append(0)
    cache.reset()
    assert second.cuts == []
    stand_ins.unfollow(cache, second)
    assert type(cache) is DynamicCache
    stand_ins.unfollow(cache, second)


def test_finished_caches_die_at_once():
    model, inputs = TINY["llama"].build(), prompts("llama")
    gc.collect()
    gc.disable()
    try:
        with enable(model, Exit(depths=DEPTHS)) as session, torch.no_grad():
            out = model(**inputs, use_cache=True)
            mask = torch.cat([inputs["attention_mask"], torch.ones(3, 1, dtype=torch.long)], 1)
            token = torch.tensor([[5], [6], [7]])
            for _ in range(2):
                out = model(
                    input_ids=token, attention_mask=mask, past_key_values=out.past_key_values
                )
                mask = torch.cat([mask, torch.ones(3, 1, dtype=torch.long)], 1)
            gone = weakref.ref(out.past_key_values)
            assert list(session.roots[0].recogniser.runs())
            del out
            assert gone() is None
            assert not list(session.roots[0].recogniser.runs())
    finally:
        gc.enable()


def test_a_thousand_generations_leave_nothing():
    model = TINY["llama"].build()
    token = torch.tensor([[5]])

    def held(session) -> int:
        records = session.records.values()
        return sum(len(r.readings) + len(r.reasons) + len(r.flops) for r in records)

    with enable(model, Exit()) as session, torch.no_grad():
        recogniser = session.roots[0].recogniser
        sizes = []
        for _ in range(2):
            for length in range(1, 12):
                out = model(input_ids=token.expand(1, length), use_cache=True)
                model(input_ids=token, past_key_values=out.past_key_values)
            sizes.append(held(session))
        assert sizes[0] == sizes[1]
        del out
        for _ in range(1000):
            recogniser.of_cache(DynamicCache())
        assert not list(recogniser.runs())
