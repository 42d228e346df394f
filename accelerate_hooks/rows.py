"""Computing a part of the batch rows: gather, run, scatter; keys and values of all rows written."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from accelerate_hooks import reading, stand_in, tree
from accelerate_hooks.errors import UnsupportedModelError
from accelerate_hooks.frame import Partial
from accelerate_hooks.opaque import opaque_functions
from accelerate_hooks.reading import Axis, Reading

if TYPE_CHECKING:
    from accelerate_hooks.call import Call

Arguments = tuple[tuple[Any, ...], dict[str, Any]]
Rest = torch.Tensor | tuple[torch.Tensor, ...] | None


def proceed(
    call: Call,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    chosen: list[bool],
    rest: Rest,
) -> Any:
    """The site's output with the ``chosen`` rows computed and ``rest`` in the others.

    Which arguments are per-row is found out at the first partial visit, on copies.
    """
    frame, site, batch = call._frame, call.site, len(chosen)
    x = next(tree.leaves(call.x))[1]
    if x.shape[0] != batch:
        raise UnsupportedModelError(
            f"{site.name}: rows has {batch} entries for {x.shape[0]} rows; give one a row"
        )
    go = torch.tensor([i for i, c in enumerate(chosen) if c], device=x.device)
    stay = torch.tensor([i for i, c in enumerate(chosen) if not c], device=x.device)
    record = frame.session.record(site)
    arguments = site.port.named(args, kwargs)
    _, cache = stand_in.find(arguments)
    why = call.unskippable(given=True)
    if why is None and not stand_in.has_cross(cache):
        why = "the cross-attention cache is not there yet"
    if why is not None:
        frame.note(site, why, {})
        full = call._next(args, kwargs)
        part, context = call.outputs(full)
        kept = None if context is None else context[go]
        return call.replaced(full, *_merged(call, part[go], kept, go, batch, rest))
    axes = _axes(arguments, batch)
    key = ("rows", batch, tuple(axes))
    known = record.readings.get(key)
    if known is None:
        known = _known(call, (args, kwargs), go, stay, axes)
        record.remember(key, known)
    inside = Partial(site)
    part = _part(call, (args, kwargs), go, stay, known, inside)
    frame.acted(call._policy_index)
    frame.leave_out(site, tuple(x.shape), (stay.numel() + go.numel() * inside.left_out) / batch)
    return record.fill(call, *_merged(call, *call.outputs(part), go, batch, rest))


def _axes(arguments: dict[str, Any], batch: int) -> list[Axis]:
    """The first axis of every leaf that could hold ``batch`` rows, a whole number of entries each
    (Bloom's ALiBi has one a head)."""
    return [
        (path, 0, leaf.shape[0] // batch)
        for path, leaf in tree.leaves(arguments)
        if leaf.ndim and leaf.shape[0] and leaf.shape[0] % batch == 0
    ]


def _ways(axes: Reading, sure: bool) -> list[Reading]:
    """Leaves with one entry a row likely are per-row, others likely are not."""
    if sure:
        return [axes]
    ways = [axes, frozenset()]
    return ways if all(entries == 1 for _, _, entries in axes) else ways[::-1]


def _entries(rows: torch.Tensor, count: int) -> torch.Tensor:
    if count == 1:
        return rows
    return (rows[:, None] * count + torch.arange(count, device=rows.device)).flatten()


def _known(
    call: Call, given: Arguments, go: torch.Tensor, stay: torch.Tensor, axes: list[Axis]
) -> Reading:
    """The reading under which a part of the rows gives the same as all of them."""
    port = call.site.port
    choices = [
        _ways(frozenset(group), sure=group[0][0][0] in (port.x, port.context))
        for group in reading.grouped(axes, lambda axis: axis[2])
    ]
    with torch.random.fork_rng(devices=[]):
        state = torch.random.get_rng_state()

        def attempt(trial: Reading) -> torch.Tensor:
            torch.random.set_rng_state(state)
            return call.outputs(_part(call, given, go, stay, trial))[0]

        name, cache = stand_in.find(call.arguments())
        args, kwargs = given
        if name is not None:
            args, kwargs = call._replaced_arguments(args, kwargs, {name: stand_in.peeking(cache)})
        wanted = call.outputs(call._frame.plain(call._seam, args, kwargs))[0][go]
        match = reading.first(choices, attempt, wanted)
    call._frame.count_read()
    if match is None:
        names = sorted({str(path[0]) for path, _, _ in axes})
        raise UnsupportedModelError(
            f"{call.site.name}: no reading of {', '.join(names)} as per-row tensors reproduces the "
            "full batch, so batch rows cannot be computed apart here; leave this site out with "
            "only=, or use settings that decide for the whole batch"
        )
    call._frame.note(call.site, "first partial visit: checked against the full one", {})
    return match


def _part(
    call: Call,
    given: Arguments,
    go: torch.Tensor,
    stay: torch.Tensor,
    known: Reading,
    inside: Partial | None = None,
) -> Any:
    """The site's output on the rows ``go``, with the keys and values of ``stay`` written too; for a
    look, without ``inside``, to a copy of the cache's layer and past the other policies."""
    frame = call._frame
    args, kwargs = given
    named = dict(zip(call.site.port.parameters, args, strict=False))
    extra = args[len(named) :]
    name, cache = stand_in.find(named | kwargs)
    fold = {path: fold for path, _, fold in known}

    def split(rows: torch.Tensor, stand: Any) -> Arguments:
        def select(path: tree.Path, leaf: torch.Tensor) -> torch.Tensor:
            return leaf[_entries(rows, fold[path])] if path in fold else leaf

        parts = [tree.transform(select, arguments) for arguments in (named, kwargs)]
        if name is not None:
            parts = [{**p, name: stand} if name in p else p for p in parts]
        return (*parts[0].values(), *extra), parts[1]

    standing = None
    if cache is not None:
        kept = stand_in.capture(lambda s: frame.plain(call._seam, *split(stay, s)), cache, stay)
        standing = stand_in.merged(cache, go, stay, kept, inside is None)
    if inside is None:
        return frame.plain(call._seam, *split(go, standing))
    outer, frame.partial = frame.partial, inside
    try:
        return call._next(*split(go, standing))
    finally:
        frame.partial = outer


def _merged(
    call: Call,
    x_part: torch.Tensor,
    context_part: torch.Tensor | None,
    go: torch.Tensor,
    batch: int,
    rest: Rest,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(x, context) with the computed rows among those that were left as they are."""
    residual = call.site.port.residual
    given = (rest,) if isinstance(rest, torch.Tensor) else rest or ()
    base, base_context = (*given, None, None)[:2]
    if base is None:
        base = call.x if residual else x_part.new_zeros(batch, *x_part.shape[1:])
    x = base.index_copy(0, go, x_part)
    if context_part is None or call.context is None:
        return x, call.context
    if base_context is None and residual:
        base_context = call.context
    elif base_context is None:
        base_context = context_part.new_zeros(batch, *context_part.shape[1:])
    return x, base_context.index_copy(0, go, context_part)


opaque_functions(globals())
