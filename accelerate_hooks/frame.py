"""One model of a session, and one forward of it."""

from __future__ import annotations

import contextvars
import inspect
import time
import weakref
from collections.abc import Generator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from accelerate_hooks import flow
from accelerate_hooks.flops import FlopMode
from accelerate_hooks.form import flags
from accelerate_hooks.opaque import opaque_functions
from accelerate_hooks.patch import Patch
from accelerate_hooks.recognise import Recogniser, version_of
from accelerate_hooks.run import Step
from accelerate_hooks.seam import Seam
from accelerate_hooks.site import Site, TokenLayout

if TYPE_CHECKING:
    from accelerate_hooks.call import Call
    from accelerate_hooks.session import Session

FRAME: contextvars.ContextVar[Frame | None] = contextvars.ContextVar("frame", default=None)
HEADING: contextvars.ContextVar[Any] = contextvars.ContextVar("heading", default=None)
PLAIN_INSIDE: contextvars.ContextVar[Frame | None] = contextvars.ContextVar("plain", default=None)
_UNSET = object()


class Root:
    """One model of the target: its patch, its sites and how its runs are told apart."""

    def __init__(self, name: str, model: nn.Module, patch: Patch, sites: list[Site]) -> None:
        self.name = name
        self.class_name = type(model).__name__
        self.patch = patch
        self.sites = sites
        first: dict[str, Site] = {}
        for site in sites:
            if first.setdefault(site.path, site).kind != site.kind:
                site.learn(alone=False)
        self.recogniser = Recogniser()
        self.flow = flow.Flow()
        self.asks_blocks = False
        self.counted: set[Any] = set()
        self.tries = 0
        self.seams: list[Seam] = []

    @property
    def model(self) -> nn.Module:
        return self.site.module

    def let_go(self) -> None:
        """Do not keep the model alive any more."""
        self.seams = []
        for site in self.sites:
            site.let_go()

    @property
    def site(self) -> Site:
        return self.sites[0]

    @property
    def denoises(self) -> bool:
        """Whether the model is given a timestep, so that its forwards are steps of a loop."""
        names = inspect.signature(type(self.model).forward).parameters
        return any(name in names for name in self.patch.timesteps)


class Partial:
    """A visit of which some rows are computed, and the share of these that is left out inside."""

    def __init__(self, site: Site) -> None:
        self.site = site
        self.left_out = 0.0


class Frame:
    """One forward of one root."""

    __slots__ = (
        "_layout",
        "arguments",
        "cuts",
        "flops",
        "keys",
        "left_out",
        "length",
        "looks",
        "outer",
        "parent",
        "partial",
        "pending",
        "plainly",
        "reads",
        "repeatable",
        "root",
        "saved_flops",
        "session",
        "spared",
        "step",
        "uncounted",
        "visits",
        "watch",
    )

    def __init__(
        self, session: Session, root: Root, step: Step, outer: Any, arguments: dict[str, Any]
    ) -> None:
        self.session = session
        self.root = root.model
        self.step = step
        self.outer = outer
        self.arguments = arguments
        self.parent: Call | None = None
        self.partial: Partial | None = None
        self.cuts: list[Any] = []
        self.flops: FlopMode | None = None
        self.watch = root.flow.watch()
        self.plainly = False
        self.repeatable = False
        self.pending: list[Any] = []
        self.visits: dict[Seam, int] = {}
        self.reads = 0
        self.looks = 0
        self.left_out = 0
        self.saved_flops = 0
        self.uncounted = 0
        self.length = 0
        self.keys = 0
        self.spared = 0.0
        self._layout: Any = _UNSET

    @property
    def layout(self) -> TokenLayout | None:
        """Of the tokens of this forward; asked once."""
        if self._layout is _UNSET:
            rule = self.session.patch(self.root).layout_of(self.root)
            self._layout = None if rule is None else rule(self.arguments, self.values_of)
        return self._layout

    def values_of(self, tensor: torch.Tensor) -> torch.Tensor:
        """A tensor on the host: read once a run, as long as it is that tensor and nobody has
        written to it (a tensor of inference mode does not tell, and is read each time)."""
        if tensor.device.type == "cpu":
            return tensor
        readings = self.step.run.readings
        for known, version, values in readings:
            if known() is tensor and version == version_of(tensor):
                return values
        self.count_read()
        values = tensor.detach().cpu()
        if not tensor.is_inference():
            readings.append((weakref.ref(tensor), version_of(tensor), values))
        return values

    def count_read(self) -> None:
        self.session.host_reads += 1
        self.reads += 1

    def forget(self) -> None:
        """The forward is begun again: nothing of it has happened."""
        self.pending.clear()
        self.visits.clear()
        self.cuts.clear()
        self.left_out = self.saved_flops = self.uncounted = self.reads = 0
        self.spared = 0.0
        if self.flops is not None:
            self.flops.total = 0

    def note(self, site: Site, reason: str, numbers: dict[str, float]) -> None:
        reasons = self.session.record(site).reasons
        reasons[reason] = reasons.get(reason, 0) + 1
        self.log(site, "note", reason, numbers)

    def log(
        self,
        site: Site,
        action: str,
        reason: str | None = None,
        numbers: dict[str, float] | None = None,
    ) -> None:
        self.account()
        self._write(site, action, reason, numbers)

    def _write(self, site: Site, action: str, reason: Any = None, numbers: Any = None) -> None:
        step = self.step
        self.session.trace.add(
            (step.run.number, step.index, step.branch, site.name, action, reason, numbers)
        )

    def skipped(self, site: Site, policy: int) -> None:
        call = self.parent
        shape = call.x.shape if call is not None and isinstance(call.x, torch.Tensor) else ()
        self.leave_out(site, tuple(shape))
        self.acted(policy)

    def acted(self, policy: int) -> None:
        """A policy left something out."""
        skips = self.session.skips
        skips[policy] = skips.get(policy, 0) + 1

    def leave_out(self, site: Site, shape: tuple[int, ...], share: float = 1.0) -> None:
        """Count a visit of x's ``shape`` as left out, or a share of its rows; inside a visit of the
        site of which only some rows are computed, that visit counts for both."""
        if self.partial is not None and self.partial.site is site:
            self.partial.left_out += share
            return
        saved = self.session.record(site).count_skip(shape, share)
        self.left_out += 1
        numbers = {} if share == 1.0 else {"share_left_out": share}
        if saved is None:
            self.uncounted += 1
        else:
            self.saved_flops += saved
            numbers["flops_saved"] = saved
        self.log(site, "skip" if share == 1.0 else "rows", numbers=numbers)

    def spare(self, policy: int, flops: float, done: float) -> None:
        """The visit that is being computed leaves out ``flops`` operations; ``done`` are some that
        no counter sees."""
        self.spared += flops
        if self.flops is not None:
            self.flops.total += round(done)
        self.acted(policy)

    def plain(self, seam: Seam, args: Any, kwargs: Any) -> Any:
        """The original forward without policies inside, for checks and skipped keys and values."""
        token = PLAIN_INSIDE.set(self)
        try:
            return seam.original(*args, **kwargs)
        finally:
            PLAIN_INSIDE.reset(token)

    @contextmanager
    def beside(self, asked: bool) -> Generator[None]:
        """Inside, FLOPs are not counted; unless ``asked``, no policy is."""
        before = 0 if self.flops is None else self.flops.total
        token = None if asked else PLAIN_INSIDE.set(self)
        try:
            yield
        finally:
            if token is not None:
                PLAIN_INSIDE.reset(token)
            if self.flops is not None:
                self.flops.total = before

    def compute(
        self, call: Call, args: Any, kwargs: Any, work: Any = None, spared: Any = ()
    ) -> Any:
        """The original forward, or ``work`` in its place, watched."""
        parent, self.parent = self.parent, call
        flops, uncounted, saved = self.flops, self.uncounted, self.saved_flops
        before = 0 if flops is None else flops.total
        around, self.spared = self.spared, 0.0
        for policy, operations in spared:
            self.spare(policy, operations, 0.0)
        x = call.x
        is_tensor = isinstance(x, torch.Tensor)
        events = _events() if is_tensor and x.is_cuda else None
        start = time.perf_counter()
        try:
            out = call._seam.original(*args, **kwargs) if work is None else work()
        finally:
            self.parent = parent
            spared, self.spared = self.spared, around
        took: Any = time.perf_counter() - start
        if events is not None:
            events[1].record()
            took = events
        site = call.site
        usual = is_tensor and isinstance(out, torch.Tensor) and site.port.confirmed
        if usual and flops is None and not self.partial and not spared:
            self.pending.append((site, took, flags(call), x.shape, out.shape))
            return out
        record = self.session.record(site)
        record.count(took, rough=flops is not None, partial=self.partial is not None or spared > 0)
        if flops is not None and is_tensor and self.uncounted == uncounted:
            saved = self.saved_flops - saved + round(spared)
            record.flops[tuple(x.shape)] = flops.total - before + saved
        if not self.partial:
            record.form.learn(call, out)
            if spared:
                self._leave_out_part(site, x, spared)
            else:
                self.log(site, "run")
        return out

    def _leave_out_part(self, site: Site, x: Any, spared: float) -> None:
        """A visit was computed with ``spared`` operations fewer than it has."""
        record = self.session.record(site)
        whole = record.flops_of(tuple(x.shape) if isinstance(x, torch.Tensor) else ())
        share = min(1.0, spared / whole) if whole else 0.0
        record.partly += 1
        record.rows_left_out += share
        record.saved_flops += round(spared)
        self.left_out += 1
        self.saved_flops += round(spared)
        numbers = {"share_left_out": share, "flops_saved": round(spared)}
        self.log(site, "rows", numbers=numbers)

    def account(self) -> None:
        """Write down the visits computed since the last time: together, since between two visits
        this code is no longer in the processor's caches and takes several times as long."""
        if not self.pending:
            return
        pending, self.pending = self.pending, []
        for site, took, given, x, out in pending:
            record = self.session.record(site)
            record.count(took)
            record.form.learn_plain(given, site.port.x, x, out)
            self._write(site, "run")


def _events() -> tuple[Any, Any]:
    pair = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    pair[0].record()
    return pair


opaque_functions(globals())
