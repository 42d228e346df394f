"""Recomputing some of the skipped visits beside, to know what skipping them really cost.

The error of a skipped visit is ``||skipped - true|| / ||true||`` over the site's x and context. It
stays on its device until somebody asks: an audited loop reads nothing on the host.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from accelerate_hooks import tree
from accelerate_hooks.history import relative_error
from accelerate_hooks.opaque import opaque_functions
from accelerate_hooks.stand_in import NAMES, is_cache

if TYPE_CHECKING:
    from accelerate_hooks.call import Call
    from accelerate_hooks.frame import Frame
    from accelerate_hooks.session import Session
    from accelerate_hooks.site import Site

_PENDING = 4096


@dataclass
class Errors:
    """The true errors of a site: how many, their sum and the largest."""

    count: int = 0
    sum: float = 0.0
    max: float = 0.0


class Audit:
    """One of ``every`` skipped visits of each site is recomputed."""

    def __init__(self, every: int) -> None:
        self.every = every
        self.left_out: dict[str, int] = {}
        self.errors: dict[Site, Errors] = {}
        self._pending: list[tuple[Site, dict[str, float], torch.Tensor]] = []

    def due(self, skipped: int) -> bool:
        """Is the ``skipped``-th skipped visit of a site (from 1) one of those? The place moves by
        one in every window of ``every``, so that it does not always meet the same CFG branch."""
        window, place = divmod(skipped - 1, self.every)
        return place == window % self.every

    def check(self, call: Call, out: Any, alone: bool = True) -> None:
        """Compare a skipped output with what the site makes of the same arguments."""
        frame, site = call._frame, call.site
        if not self.due(frame.session.record(site).skipped):
            return
        if not alone:
            why = "several blocks are left out together: none has an output of its own"
            self.left_out[why] = self.left_out.get(why, 0) + 1
            return
        if any(is_cache(v) or (n in NAMES and v is not None) for n, v in call.arguments().items()):
            why = "a KV cache is among the arguments: computing again would write to it"
            self.left_out[why] = self.left_out.get(why, 0) + 1
            return
        x, context = (tree.transform(_copy, t) for t in (call.x, call.context))
        args, kwargs = call._with(x, context, None)
        counted = 0 if frame.flops is None else frame.flops.total
        with torch.random.fork_rng(_accelerators(x)):
            true = frame.plain(call._seam, args, kwargs)
        if frame.flops is not None:
            frame.flops.total = counted
        error = relative_error(_tensors(call, out), _tensors(call, true))
        self.add(frame, site, error)

    def add(self, frame: Frame, site: Site, error: torch.Tensor) -> None:
        """Keep the error of a visit until it is read."""
        numbers: dict[str, float] = {}
        frame.log(site, "audit", numbers=numbers)
        self._pending.append((site, numbers, error))
        if len(self._pending) >= _PENDING:
            frame.count_read()
            self.settle(frame.session)

    def settle(self, session: Session) -> None:
        """Read the errors that are still on their devices, into the trace and the sums."""
        pending, self._pending = self._pending, []
        by_device: dict[torch.device, list[int]] = {}
        for i, (_, _, error) in enumerate(pending):
            by_device.setdefault(error.device, []).append(i)
        for places in by_device.values():
            values = torch.stack([pending[i][2] for i in places]).tolist()
            for i, value in zip(places, values, strict=True):
                site, numbers, _ = pending[i]
                numbers["true_error"] = value
                errors = self.errors.setdefault(site, Errors())
                errors.count += 1
                errors.sum += value
                errors.max = worst(errors.max, value)

    def of(self, site: Site) -> Errors | None:
        return self.errors.get(site)


def worst(*values: float) -> float:
    """The largest, NaN if there is one."""
    return math.nan if any(map(math.isnan, values)) else max(values)


def _copy(path: tree.Path, leaf: torch.Tensor) -> torch.Tensor:
    """A site may work in place on what it is given, and a skipped output may be its input."""
    return leaf.clone()


def _accelerators(x: Any) -> list[torch.device]:
    return [t.device for _, t in tree.leaves(x) if t.device.type == "cuda"][:1]


def _tensors(call: Call, out: Any) -> tuple[torch.Tensor, ...]:
    x, context = call.outputs(out)
    return (x,) if context is None else (x, context)


opaque_functions(globals())
