"""One model of a session, and one forward of it."""

from __future__ import annotations

import contextvars
import inspect
import time
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from accelerate_hooks import flow
from accelerate_hooks.flops import FlopMode
from accelerate_hooks.form import flags
from accelerate_hooks.opaque import opaque_functions
from accelerate_hooks.patch import Patch
from accelerate_hooks.recognise import Recogniser
from accelerate_hooks.run import Step
from accelerate_hooks.seam import Seam
from accelerate_hooks.site import Site

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
        self.model = model
        self.patch = patch
        self.sites = sites
        self.recogniser = Recogniser()
        self.flow = flow.Flow()
        self.counted: set[Any] = set()
        self.tries = 0
        self.seams: list[Seam] = []

    @property
    def site(self) -> Site:
        return self.sites[0]

    @property
    def denoises(self) -> bool:
        """Whether the model is given a timestep, so that its forwards are steps of a loop."""
        names = inspect.signature(type(self.model).forward).parameters
        return any(name in names for name in self.patch.timesteps)


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
        "outer",
        "parent",
        "partial",
        "pending",
        "plainly",
        "reads",
        "root",
        "saved_flops",
        "session",
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
        self.partial = False
        self.cuts: list[Any] = []
        self.flops: FlopMode | None = None
        self.watch = root.flow.watch()
        self.plainly = False
        self.pending: list[Any] = []
        self.visits: dict[Seam, int] = {}
        self.reads = 0
        self.left_out = 0
        self.saved_flops = 0
        self.uncounted = 0
        self.length = 0
        self.keys = 0
        self._layout: Any = _UNSET

    @property
    def layout(self) -> Any:
        if self._layout is _UNSET:
            patch = self.session.patch(self.root)
            self._layout = patch.layout(self.root, self.arguments)
        return self._layout

    def count_read(self) -> None:
        self.session.host_reads += 1
        self.reads += 1

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
        self.session.skips[policy] = self.session.skips.get(policy, 0) + 1

    def leave_out(self, site: Site, shape: tuple[int, ...], share: float = 1.0) -> None:
        """Count a visit of x's ``shape`` as left out, or a share of its rows."""
        saved = self.session.record(site).count_skip(shape, share)
        self.left_out += 1
        numbers = {} if share == 1.0 else {"share_left_out": share}
        if saved is None:
            self.uncounted += 1
        else:
            self.saved_flops += saved
            numbers["flops_saved"] = saved
        self.log(site, "skip" if share == 1.0 else "rows", numbers=numbers)

    def plain(self, seam: Seam, args: Any, kwargs: Any) -> Any:
        """The original forward without policies inside, for checks and skipped keys and values."""
        token = PLAIN_INSIDE.set(self)
        try:
            return seam.original(*args, **kwargs)
        finally:
            PLAIN_INSIDE.reset(token)

    def compute(self, call: Call, args: Any, kwargs: Any) -> Any:
        """The original forward, watched."""
        parent, self.parent = self.parent, call
        flops, left_out = self.flops, self.left_out
        before = 0 if flops is None else flops.total
        x = call.x
        is_tensor = isinstance(x, torch.Tensor)
        events = _events() if is_tensor and x.is_cuda else None
        start = time.perf_counter()
        try:
            out = call._seam.original(*args, **kwargs)
        finally:
            self.parent = parent
        took: Any = time.perf_counter() - start
        if events is not None:
            events[1].record()
            took = events
        site = call.site
        usual = is_tensor and isinstance(out, torch.Tensor) and site.port.confirmed
        if usual and flops is None and not self.partial:
            self.pending.append((site, took, flags(call), x.shape, out.shape))
            return out
        record = self.session.record(site)
        record.count(took, rough=flops is not None, partial=self.partial)
        if flops is not None and is_tensor and self.left_out == left_out:
            record.flops[tuple(x.shape)] = flops.total - before
        if not self.partial:
            record.form.learn(call, out)
            self.log(site, "run")
        return out

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
