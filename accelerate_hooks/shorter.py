"""Sequences that get shorter between blocks: arguments of later blocks, masks of later forwards,
and the full length again before the head."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from accelerate_hooks import stand_in, tokens, tree
from accelerate_hooks.errors import UnsupportedModelError
from accelerate_hooks.opaque import opaque_functions

if TYPE_CHECKING:
    from accelerate_hooks.call import Call
    from accelerate_hooks.frame import Frame
    from accelerate_hooks.site import Site


@dataclass
class Cut:
    """In this forward, behind block ``order`` of a stack, ``keep`` of ``length`` tokens went on.
    ``base`` has the values to which the others come back."""

    stack: str
    order: int
    length: int
    keep: torch.Tensor
    base: torch.Tensor | None
    sizes: torch.Tensor | None


@dataclass
class Gap:
    """What a cut left in a KV cache: of the ``length`` tokens that a forward added behind
    ``before`` others, layers behind ``order`` have only ``keep``. Past ``limit`` keys a layer
    starts to drop some, and which is not known then."""

    stack: str
    order: int
    before: int
    length: int
    keep: torch.Tensor
    limit: float


def shorten(
    call: Call, out: Any, keep: torch.Tensor, sizes: torch.Tensor | None, restore: bool
) -> Any:
    site, frame = call.site, call._frame
    if site.kind != "block":
        raise UnsupportedModelError(
            f"{site.name} is a {site.kind}; a sequence can only be shortened at a block"
        )
    x, _ = call.outputs(out)
    keep = keep.to(x.device)
    _, cache = stand_in.find(call.arguments())
    if cache is not None:
        _gap(call, cache, keep)
    base = x if restore else None
    frame.cuts.append(Cut(site.stack, site.index, x.shape[1], keep, base, sizes))
    return call.replaced(out, tokens.take(x, 1, keep))


def _gap(call: Call, cache: Any, keep: torch.Tensor) -> None:
    """Remember what the layers behind this block will lack."""
    site, frame = call.site, call._frame
    cache = stand_in.decoder_cache(cache)
    layers = getattr(cache, "layers", ())
    if cache.is_compileable or not layers:
        raise UnsupportedModelError(
            f"{site.name}: a sequence cannot be shortened beside a {type(cache).__name__}, whose "
            "masks span its full length; use a DynamicCache"
        )
    if {type(layer) for layer in layers[site.index + 1 :]} - {
        type(layer) for layer in layers[: site.index + 1]
    }:
        raise UnsupportedModelError(
            f"{site.name}: the model makes its masks for the first layer of each kind, and some "
            "kinds only come behind this block; shorten behind a later one"
        )
    lengths = [layer.get_max_length() for layer in layers]
    limit = min((n for n in lengths if n >= 0), default=float("inf"))
    frame.keys = int(cache.get_seq_length())
    _check(site, frame, limit)
    whole = keep
    for cut in reversed(_here(frame.cuts, site.stack)):
        whole = cut.keep[whole] if cut.keep.ndim == 1 else cut.keep.gather(-1, _rows(whole, cut))
    before = frame.keys - frame.length
    gap = Gap(site.stack, site.index, before, frame.length, whole, limit)
    frame.step.run.cuts.append(gap)


def _rows(index: torch.Tensor, cut: Cut) -> torch.Tensor:
    return index if index.ndim == 2 else index.expand(cut.keep.shape[0], -1)


def _check(site: Site, frame: Frame, limit: float) -> None:
    if frame.keys >= limit:
        raise UnsupportedModelError(
            f"{site.name}: {frame.keys} tokens reach over a sliding window of {limit}, in which a "
            "shortened sequence is not supported; leave these blocks out with only="
        )


def _here(cuts: list[Any], stack: str, behind: float = float("inf")) -> list[Any]:
    return [cut for cut in cuts if cut.stack == stack and cut.order < behind]


def rewrite(frame: Frame, site: Site, args: Any, kwargs: Any) -> tuple[Any, Any]:
    """The arguments of a later block, cut to the tokens that went on and the keys that exist."""
    cuts = _here(frame.cuts, site.stack, site.index)
    gaps = _here(frame.step.run.cuts, site.stack, site.index)
    if site.kind != "block" or not (cuts or gaps):
        return args, kwargs
    named = dict(zip(site.port.parameters, args, strict=False))
    extra = args[len(named) :]
    given = named | kwargs
    skip = (site.port.x, site.port.context, *stand_in.NAMES)
    batch = given[site.port.x].shape[0]
    context = given.get(site.port.context) if site.port.context else None
    if gaps:
        _check(site, frame, min(gap.limit for gap in gaps))
    keys = _keys(gaps, frame.keys, given[site.port.x].device) if gaps else None

    def cut(path: tree.Path, leaf: torch.Tensor) -> torch.Tensor:
        if path[0] in skip:
            return leaf
        end = leaf.ndim
        if keys is not None and _over_keys(leaf, frame.keys, batch):
            end -= 1
            fold = leaf.shape[0] // batch if leaf.ndim == 3 else 1
            index = keys if keys.ndim == 1 else keys.repeat_interleave(fold, 0)
            leaf = tokens.take(leaf, end, index)
        for one in cuts:
            for dim in _dims(leaf, one.length, end):
                leaf = tokens.take(leaf, dim, one.keep)
        return leaf

    if isinstance(context, torch.Tensor) and cuts:
        _refuse_joint(site, given, cuts[0].length + context.shape[1], skip)
    named, kwargs = (tree.transform(cut, part) for part in (named, kwargs))
    return (*named.values(), *extra), kwargs


def _keys(gaps: list[Gap], total: int, device: torch.device) -> torch.Tensor:
    """Which of ``total`` keys a layer has: of every forward that was cut, what the last cut before
    the layer left. ``[kept]``, or ``[batch, kept]``."""
    last = {gap.before: gap for gap in sorted(gaps, key=lambda gap: gap.order)}
    pieces, place = [], 0
    for before, gap in sorted(last.items()):
        pieces += [torch.arange(place, before, device=device), gap.keep + before]
        place = before + gap.length
    pieces.append(torch.arange(place, total, device=device))
    rows = max((p.shape[0] for p in pieces if p.ndim == 2), default=0)
    if rows:
        pieces = [p if p.ndim == 2 else p.expand(rows, -1) for p in pieces]
    return torch.cat(pieces, -1)


def _over_keys(leaf: torch.Tensor, total: int, batch: int) -> bool:
    """A mask or bias ``[batch, heads, tokens, keys]``, or an ALiBi ``[batch * heads, 1, keys]``."""
    if leaf.ndim not in (3, 4) or leaf.shape[-1] != total:
        return False
    return leaf.ndim == 4 or (leaf.shape[0] > batch and leaf.shape[0] % batch == 0)


def _dims(leaf: torch.Tensor, length: int, end: int) -> list[int]:
    """The token axes of a leaf: both of a mask, the first of anything else (a table may be as wide
    as the sequence is long). The first axis counts only for a matrix, where it is no batch."""
    dims = [d for d in range(leaf.ndim > 2, end) if leaf.shape[d] == length]
    return dims if leaf.ndim == 4 or leaf.dtype == torch.bool else dims[:1]


def _refuse_joint(site: Site, given: Any, joint: int, skip: tuple[Any, ...]) -> None:
    for path, leaf in tree.leaves(given):
        if path[0] not in skip and joint in leaf.shape:
            raise UnsupportedModelError(
                f"{site.name}: {path[0]!r} spans two streams, so one cannot be shortened alone; "
                "use proceed(tokens=...) inside the block"
            )


def restored(frame: Frame, site: Site, call: Call, out: Any) -> Any:
    """Behind the last block of the stack: the full length again."""
    for cut in reversed(_here(frame.cuts, site.stack)):
        if cut.base is not None:
            x, context = call.outputs(out)
            out = call.replaced(out, tokens.spread(cut.base, x, cut.keep), context)
    return out


opaque_functions(globals())
