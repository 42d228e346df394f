"""Sequences that get shorter behind a block, and sites that see their tokens in another order.

The oracle of a shortened prompt has no cache: every forward runs over the whole sequence, and masks
hide the tokens that left from all others in the blocks behind the cut.
"""

import inspect
import warnings
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from tiny_models import TINY
from torch import nn
from transformers import DynamicCache, StaticCache

from accelerate_hooks import Effect, Policy, UnsupportedModelError, enable

NEW = 4
LENGTH = 7
ONE = ((1, ((0, 1, 2, 5, 6),)),)
ROWS = ((1, ((0, 1, 2, 5, 6), (0, 2, 3, 4, 6))),)
TWO = ((1, ((0, 1, 2, 5, 6),)), (2, ((0, 2, 3, 4),)))
CUTS = {"one": ONE, "rows": ROWS, "two": TWO}


@dataclass(frozen=True, kw_only=True)
class Shorten(Policy):
    """Behind block ``at``, only tokens ``keep`` go on; ``cuts`` has (at, keep) pairs, keep for all
    rows or one a row."""

    name: ClassVar[str] = "shorten"
    cuts: tuple[tuple[int, tuple[tuple[int, ...], ...]], ...] = ONE
    restore: bool = True

    @property
    def kinds(self):
        return ("block",)

    def acts(self, site):
        return frozenset({Effect.RESHAPE})

    def around(self, call):
        out = call.proceed()
        for at, keep in self.cuts:
            if call.site.index == at and call.step.phase != "decode":
                chosen = torch.tensor(keep[0] if len(keep) == 1 else keep)
                out = call.shorten(out, chosen, restore=self.restore)
        return out


def blocks_of(model: nn.Module) -> nn.ModuleList:
    return next(m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == 4)


class Hiding:
    """A block's forward behind cuts: tokens that left are seen by themselves only."""

    def __init__(
        self, block: nn.Module, index: int, left: list[tuple[int, list[set[int]]]]
    ) -> None:
        self.forward, self.index, self.left = block.forward, index, left
        self.parameters = list(inspect.signature(block.forward).parameters)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        given = dict(zip(self.parameters, args, strict=False)) | kwargs
        name = next(n for n, v in given.items() if isinstance(v, torch.Tensor) and v.ndim == 4)
        mask = given[name].clone()
        least = False if mask.dtype == torch.bool else torch.finfo(mask.dtype).min
        for at, rows in self.left:
            for row, tokens in enumerate(rows):
                for token in tokens if self.index > at else ():
                    seen = mask[row, :, token, token].clone()
                    mask[row, :, :, token] = least
                    mask[row, :, token, token] = seen
        if name in kwargs:
            kwargs[name] = mask
        else:
            args = tuple(mask if n == name else a for n, a in zip(self.parameters, args))  # noqa: B905
        return self.forward(*args, **kwargs)


def left_of(cuts: Any, batch: int, offset: int = 0) -> list[tuple[int, list[set[int]]]]:
    rows = [list(range(LENGTH)) for _ in range(batch)]
    left = []
    for at, keep in cuts:
        keep = keep * batch if len(keep) == 1 else keep
        kept = [[row[i] for i in k] for row, k in zip(rows, keep, strict=True)]
        before = [set(range(LENGTH)) - set(k) for k in kept]
        left.append((at, [{offset + token for token in tokens} for tokens in before]))
        rows = kept
    return left


def whole(model: nn.Module, ids: Any, mask: Any, left: Any, new: int) -> Any:
    """Greedy decoding without a cache."""
    logits = []
    blocks = blocks_of(model)
    takes = "position_ids" in inspect.signature(model.forward).parameters
    for index, block in enumerate(blocks):
        block.forward = Hiding(block, index, left)
    with torch.no_grad():
        for _ in range(new):
            more = {"position_ids": (mask.cumsum(-1) - 1).clamp(min=0)} if takes else {}
            out = model(input_ids=ids, attention_mask=mask, use_cache=False, **more)
            logits.append(out.logits[:, -1])
            ids = torch.cat([ids, logits[-1].argmax(-1, keepdim=True)], 1)
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
    for block in blocks:
        del block.forward
    return ids, torch.stack(logits, 1)


def generate(model: nn.Module, ids: Any, mask: Any, **more: Any) -> Any:
    settings: dict[str, Any] = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0}
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return model.generate(
            ids,
            attention_mask=mask,
            **settings | more,
            return_dict_in_generate=True,
            output_logits=True,
        )


def prompts(name: str) -> Any:
    inputs = TINY[name].inputs(2)
    mask = inputs["attention_mask"]
    mask[0, :2] = 0
    return TINY[name].build(), inputs["input_ids"] * mask, mask


def latest(ids: Any, mask: Any) -> dict[str, Any]:
    """The last token as `generate` gives it to the model: padding on the left has no position."""
    positions = mask.cumsum(-1)[:, -1:] - 1
    return {"input_ids": ids[:, -1:], "attention_mask": mask, "position_ids": positions}


def agree(out: Any, want: Any) -> None:
    ids, logits = want
    got = torch.stack(out.logits, 1)
    assert torch.equal(out.sequences, ids)
    assert (got - logits).abs().max() < 1e-4 * logits.abs().max()


@pytest.mark.parametrize("cuts", CUTS.values(), ids=CUTS)
@pytest.mark.parametrize("name", ["llama", "opt", "gpt_neox", "mixtral", "gemma2", "qwen3"])
def test_decoding_goes_on_behind_a_shortened_prompt(name, cuts):
    model, ids, mask = prompts(name)
    want = whole(model, ids, mask, left_of(cuts, 2), NEW)
    plain = torch.stack(generate(model, ids, mask).logits, 1)
    with enable(model, Shorten(cuts=cuts)):
        out = generate(model, ids, mask)
    agree(out, want)
    assert (plain - want[1]).abs().max() > 1e-3 * plain.abs().max(), "the oracle changes nothing"
    lengths = [out.past_key_values.get_seq_length(i) for i in range(4)]
    full = LENGTH + NEW - 1
    assert lengths == [full, full, full - 2, full - 2 - (len(cuts) > 1)]


@pytest.mark.parametrize("cuts", CUTS.values(), ids=CUTS)
def test_a_second_turn_sees_what_the_first_one_kept(cuts):
    model, ids, mask = prompts("llama")
    turn = TINY["llama"].inputs(2)["input_ids"].flip(1)
    with enable(model, Shorten(cuts=cuts)):
        first = generate(model, ids, mask)
        ids = torch.cat([first.sequences, turn], 1)
        mask = torch.cat([mask, mask.new_ones(2, NEW + LENGTH)], 1)
        # The last new token of the first turn is not in the cache yet.
        cache = first.past_key_values
        with torch.no_grad():
            model(past_key_values=cache, **latest(first.sequences, mask[:, : LENGTH + NEW]))
        out = generate(model, ids, mask, past_key_values=cache)
    left = left_of(cuts, 2) + left_of(cuts, 2, offset=LENGTH + NEW)
    agree(out, whole(model, ids, mask, left, NEW))


@pytest.mark.parametrize("given", [True, False])
def test_two_caches_in_a_declared_run_have_their_own_gaps(given):
    """Their forwards take turns; one cache is used on when the run has ended."""
    model, ids, mask = prompts("llama")
    batches = [(ids, mask), (ids.flip(1) * mask, mask)]
    longer = torch.cat([mask, mask.new_ones(2, 1)], 1)
    want = [whole(model, *batch, left_of(ONE, 2), 2)[1][:, 1] for batch in batches]
    firsts = [whole(model, *batch, left_of(ONE, 2), 1)[0] for batch in batches]
    with torch.no_grad(), enable(model, Shorten()) as session:
        with session.run():
            caches = []
            for i, m in batches:
                more = {"past_key_values": DynamicCache(config=model.config)} if given else {}
                positions = (m.cumsum(-1) - 1).clamp(min=0)
                out = model(input_ids=i, attention_mask=m, position_ids=positions, **more)
                caches.append(out.past_key_values)
            got = [model(past_key_values=caches[1], **latest(firsts[1], longer)).logits[:, -1]]
        got.append(model(past_key_values=caches[0], **latest(firsts[0], longer)).logits[:, -1])
    for a, b in zip(got, want[::-1], strict=True):
        assert (a - b).abs().max() < 1e-4 * b.abs().max()


def test_the_cache_may_be_cropped_behind_the_cut_only():
    model, ids, mask = prompts("llama")
    want = whole(model, ids, mask, left_of(ONE, 2), NEW)
    with enable(model, Shorten()):
        out = generate(model, ids, mask)
        cache = out.past_key_values
        cache.crop(-(NEW - 1))
        token = out.sequences[:, LENGTH : LENGTH + 1]
        mask = torch.cat([mask, mask.new_ones(2, 1)], 1)
        with torch.no_grad():
            again = model(past_key_values=cache, **latest(token, mask))
        assert (again.logits[:, -1] - want[1][:, 1]).abs().max() < 1e-4 * want[1].abs().max()
        with pytest.raises(UnsupportedModelError, match="cropped to before"):
            cache.crop(-2)


def test_cut_rows_follow_the_cache():
    model, ids, mask = prompts("llama")
    left = left_of(ROWS, 2)
    left = [(at, [rows[1], rows[0]]) for at, rows in left]
    want = whole(model, ids.flip(0), mask.flip(0), left, 2)
    with enable(model, Shorten(cuts=ROWS)), torch.no_grad():
        cache = model(input_ids=ids, attention_mask=mask).past_key_values
        cache.reorder_cache(torch.tensor([1, 0]))
        mask = torch.cat([mask.flip(0), mask.new_ones(2, 1)], 1)
        token = want[0][:, LENGTH : LENGTH + 1]
        out = model(input_ids=token, attention_mask=mask, past_key_values=cache)
    assert (out.logits[:, -1] - want[1][:, 1]).abs().max() < 1e-4 * want[1].abs().max()


@pytest.mark.parametrize("name", ["vit", "dinov2", "siglip_vision"])
def test_an_encoder_gets_its_full_length_back(name):
    """25 patches, and a class token in two of them."""
    model, inputs = TINY[name].build(), TINY[name].inputs(2)
    blocks = blocks_of(model)
    kept: dict[str, Any] = {}

    def shortened(module, args, output):
        length = output.shape[1]
        kept["index"] = torch.tensor([i for i in range(length) if i not in (3, 7)])
        kept["base"] = output
        return output[:, kept["index"]]

    def full(module, args, output):
        base = kept["base"].clone()
        base[:, kept["index"]] = output
        return base

    hooks = [blocks[1].register_forward_hook(shortened), blocks[3].register_forward_hook(full)]
    with torch.no_grad():
        want = model(**inputs).last_hidden_state
        for hook in hooks:
            hook.remove()
        keep = tuple(kept["index"].tolist())
        with enable(model, Shorten(cuts=((1, (keep,)),))):
            got = model(**inputs).last_hidden_state
        assert torch.equal(got, want)
        with enable(model, Shorten(cuts=((1, (keep,)),), restore=False)):
            assert model(**inputs).last_hidden_state.shape[1] == len(keep)
        plain = model(**inputs).last_hidden_state
        assert not torch.equal(got, plain)


def test_what_cannot_be_shortened_is_refused():
    model, ids, mask = prompts("llama")
    cache = StaticCache(config=model.config, max_cache_len=16)
    with enable(model, Shorten()), pytest.raises(UnsupportedModelError, match="DynamicCache"):
        generate(model, ids, mask, past_key_values=cache)
    model, ids, mask = prompts("gemma2")
    cuts = ((0, ((0, 1, 2, 5, 6),)),)
    with (
        enable(model, Shorten(cuts=cuts)),
        pytest.raises(UnsupportedModelError, match="first layer of each kind"),
    ):
        generate(model, ids, mask)
    flux = TINY["flux"]
    cuts = ((1, (tuple(range(20)),)),)
    with (
        torch.no_grad(),
        enable(flux.build(), Shorten(cuts=cuts)) as session,
        pytest.raises(UnsupportedModelError, match="two streams"),
    ):
        session.roots[0].model(**flux.inputs(2))


def test_a_sliding_window_that_is_reached_is_refused():
    model, ids, mask = prompts("gemma2")
    model.config.sliding_window = 9
    with enable(model, Shorten()), pytest.raises(UnsupportedModelError, match="window of 9"):
        generate(model, ids, mask)


# -- tokens in another order -----------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Shuffle(Policy):
    """Every block sees its tokens in another order, or only every other token."""

    name: ClassVar[str] = "shuffle"
    every: int = 1

    @property
    def kinds(self):
        return ("block",)

    def acts(self, site):
        return frozenset({Effect.RESHAPE})

    def around(self, call):
        length = call.x.shape[1]
        order = torch.randperm(length, generator=call.generator)
        return call.proceed(tokens=order[:: self.every])


@pytest.mark.parametrize(
    "name", ["dit", "flux", "wan", "sd3", "pixart", "vit", "bert", "t5_encoder"]
)
def test_blocks_do_not_mind_the_order_of_their_tokens(name):
    model, inputs = TINY[name].build(), TINY[name].inputs(2)
    # T5's first block makes the position bias, which the others are given.
    only = "*.[1-9]" if name == "t5_encoder" else None
    with torch.no_grad():
        plain = model(**inputs)[0]
        with enable(model, Shuffle(), only=only):
            for _ in range(2):
                got = model(**inputs)[0]
                assert (got - plain).abs().max() < 2e-5 * plain.abs().max()
                assert not torch.equal(got, plain)


def test_a_block_that_counts_its_tokens_is_refused():
    model, inputs = TINY["t5_encoder"].build(), TINY["t5_encoder"].inputs(2)
    with (
        torch.no_grad(),
        enable(model, Shuffle(), only="*.0"),
        pytest.raises(UnsupportedModelError, match="does not follow an order"),
    ):
        model(**inputs)


def test_tokens_left_out_keep_what_adds_nothing():
    model, inputs = TINY["vit"].build(), TINY["vit"].inputs(2)
    index = torch.tensor([3, 9, 4, 25, 0])

    @dataclass(frozen=True, kw_only=True)
    class Few(Shuffle):
        def around(self, call):
            out = call.proceed(tokens=index)
            block = blocks_of(model)[call.site.index]
            want = call.x.clone()
            want[:, index] = type(block).forward(block, call.x[:, index])
            seen.append(torch.equal(call.outputs(out)[0], want))
            return out

    seen: list[bool] = []
    with torch.no_grad(), enable(model, Few(), only="*.1"):
        model(**inputs)
        model(**inputs)
    assert seen == [True, True]


@pytest.mark.parametrize("keep", [5, 7], ids=["fewer than the text has", "as many"])
@pytest.mark.parametrize("name", ["flux", "sd3", "qwenimage", "auraflow", "cogvideox"])
def test_the_first_forward_takes_the_stream_that_later_ones_take(name, keep):
    """Nobody has watched a block yet, and several tensors come out of it."""
    model, inputs = TINY[name].build(), TINY[name].inputs(2)

    @dataclass(frozen=True, kw_only=True)
    class First(Shuffle):
        def around(self, call):
            return call.proceed(tokens=torch.arange(keep))

    with torch.no_grad(), enable(model, First()):
        first, second = (model(**inputs)[0] for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize("name", ["llama", "sana", "swin"])
def test_blocks_that_mind_are_refused(name):
    model, inputs = TINY[name].build(), TINY[name].inputs(2)
    with torch.no_grad(), enable(model, Shuffle()), pytest.raises(UnsupportedModelError):
        model(**inputs)


def test_tokens_beside_a_cache_are_refused():
    model, ids, mask = prompts("llama")
    with enable(model, Shuffle()), pytest.raises(UnsupportedModelError, match="beside a KV cache"):
        generate(model, ids, mask)
