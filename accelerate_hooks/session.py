"""What `enable` returns, and the one place where visits come in."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from accelerate_hooks import flow, shorter, stand_in, tree
from accelerate_hooks.attention import AttentionMode, lengths
from accelerate_hooks.audit import Audit
from accelerate_hooks.call import Call
from accelerate_hooks.errors import SpecError, UnsupportedModelError
from accelerate_hooks.flops import FlopMode, can_count
from accelerate_hooks.frame import FRAME, HEADING, PLAIN_INSIDE, Frame, Root
from accelerate_hooks.held import Held
from accelerate_hooks.listen import begin, follow_scheduler
from accelerate_hooks.opaque import opaque_functions
from accelerate_hooks.patch import Patch
from accelerate_hooks.place import cache_of, length_of, step_of
from accelerate_hooks.policy import Policy
from accelerate_hooks.record import Record
from accelerate_hooks.replaced import tell_replaced
from accelerate_hooks.run import Run, Step
from accelerate_hooks.schedule import Schedules
from accelerate_hooks.seam import Ledger, Seam
from accelerate_hooks.site import Site
from accelerate_hooks.tally import Tally
from accelerate_hooks.trace import Trace

if TYPE_CHECKING:
    from accelerate_hooks.recipe import Addressed

_SHAPES_COUNTED = 16
_COUNTED_IN_PART = 8  # forwards in which something was left out while FLOPs were counted


class InertWarning(UserWarning):
    """Policies were asked to act where they must not (gradients on, training mode)."""


class Session:
    """Policies at work on a model. A context manager; ``disable()`` undoes everything."""

    def __init__(
        self,
        roots: list[Root],
        addressed: list[Addressed],
        plan: dict[Site, list[tuple[int, Policy]]],
        notes: list[str],
        audit: int | None = None,
    ) -> None:
        self.addressed = addressed
        self.policies = policies = [item.policy for item in addressed]
        self.notes = notes
        self.strict = True
        self.trace = Trace()
        self.host_reads = 0
        self.forwards = 0
        self.inert_forwards: dict[str, int] = {}
        self.skips: dict[int, int] = {}
        self.dropped_for_bytes = 0
        self.ledger = Ledger()
        self.counting = True
        self.tally = Tally()
        self.audit = None if audit is None else Audit(audit)
        self._active = True
        self._plan = plan
        self._records: dict[Site, Record] = {}
        self._roots = {id(root.model): root for root in roots}
        self.schedules = Schedules()
        self._pauses: Held[bool] = Held()
        self._warned: set[str] = set()
        self._reach: dict[Site, Any] = {}
        self._told: dict[Site, dict[Any, Any]] = {}
        self._trains = bool(policies) and all(policy.trains for policy in policies)
        self.scheduler: Any = None
        self.pipeline: Callable[[], Any] = lambda: None
        self.private_key: str | None = None

    # -- the user's side ---------------------------------------------------------------------

    @property
    def active(self) -> bool:
        return self._active

    @property
    def sites(self) -> list[Site]:
        """The sites at which a policy acts."""
        return [site for site, policies in self._plan.items() if policies]

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *_: Any) -> None:
        self.disable()

    def disable(self) -> list[str]:
        """Undo everything (again and again is fine); returns the names of seams that somebody has
        wrapped meanwhile: those are inert, but only who wrapped them can take them out."""
        if not self._active:
            return []
        self._active = False
        self.reset()
        try:
            left = self.ledger.undo()  # which knows its seams by what they say, `active` too
        finally:
            for root in self._roots.values():
                for seam in root.seams:
                    seam.active = False
        if left:
            warnings.warn(
                f"{', '.join(left)}: wrapped by somebody else since enable; our part is inert and "
                "goes when that wrapper goes",
                InertWarning,
                stacklevel=2,
            )
        if self.ledger.taken_out:
            warnings.warn(
                f"{', '.join(self.ledger.taken_out)}: taken out by somebody else while enabled "
                "(removing offload hooks does that); policies did not act there since",
                InertWarning,
                stacklevel=2,
            )
        tell_replaced(self)
        for root in self._roots.values():
            root.let_go()
        self.scheduler = None
        self._reach.clear()
        return left

    def reset(self) -> None:
        """Forget every run; the next forward starts clean."""
        for run in self.schedules.explicit.everywhere():
            run.restart()
        for root in self._roots.values():
            root.recogniser.forget()

    @contextmanager
    def run(self, total: int | None = None) -> Generator[Run]:
        """Say that the forwards inside are one generation (of ``total`` steps)."""
        if total is not None and (type(total) is not int or total < 1):
            raise SpecError(f"total={total!r} is out of range; give a number of steps, or None")
        with self.schedules.declared(total) as run:
            yield run

    @contextmanager
    def paused(self) -> Generator[None]:
        """Inside, in this thread or task, the model computes plainly."""
        with self._pauses.hold(True):
            yield

    def report(self, run: int | None = None) -> Any:
        from accelerate_hooks.report import Report

        if self._active:
            tell_replaced(self)
        if self.schedules.explicit.lost() or self._pauses.lost():
            self.say(
                "a session.run() or paused() is still open, but the coroutine, generator or task "
                "that opened it has ended: it holds nowhere"
            )
        return Report.of(self, run)

    def save_recipe(self, path: str | os.PathLike[str]) -> None:
        """Write the policies, and where they act, to a recipe that `enable` takes by its path."""
        from accelerate_hooks.recipe import save_recipe

        save_recipe(path, self.addressed)

    # -- the runtime's side ------------------------------------------------------------------

    def root(self, model: nn.Module) -> Root:
        return self._roots[id(model)]

    @property
    def roots(self) -> list[Root]:
        return list(self._roots.values())

    def patch(self, model: nn.Module) -> Patch:
        return self._roots[id(model)].patch

    def record(self, site: Site) -> Record:
        record = self._records.get(site)
        if record is None:
            record = self._records[site] = Record(site)
        return record

    @property
    def records(self) -> dict[Site, Record]:
        return self._records

    def know(self, policy: Policy, site: Site, name: str, fact: Any) -> None:
        """Tell ahead what ``call.known(..., name)`` of this policy gives at a site."""
        for index, mine in enumerate(self.policies):
            if mine is policy:
                told = self._told.setdefault(site, {})
                told["known", index, name] = self.record(site).facts["known", index, name] = fact

    def policies_at(self, site: Site) -> list[tuple[int, Policy]]:
        return self._plan.get(site, _NONE)

    def adopt(self, old: Site, new: Site) -> None:
        """A module turned out to be visited once more in a forward: the same policies act there."""
        self._plan[new] = [(i, policy) for i, policy in self.policies_at(old) if policy.acts(new)]
        self.record(new).facts.update(self._told.get(old, {}))
        if old in self._reach:
            self._reach[new] = self._reach[old]

    def leave_out(self, site: Site) -> None:
        """No policy acts at this site any more."""
        self._plan[site] = []

    def knows_layout(self, root: Root) -> bool:
        """Whether the patch can say where the tokens of this model stand."""
        return root.patch.layout_of(root.model) is not None

    def block_count(self, model: nn.Module) -> int:
        return sum(site.kind == "block" for site in self.root(model).sites)

    def _visit(self, seam: Seam, args: Any, kwargs: Any) -> Any:
        frame = FRAME.get()
        while frame is not None and frame.session is not self:
            frame = frame.outer
        site = seam.sites[0]
        if frame is None or (site.kind == "model" and frame.root is not site.module):
            if site.kind != "model":
                return seam.original(*args, **kwargs)
            return self._enter(seam, site, args, kwargs)
        if PLAIN_INSIDE.get() is frame:
            return seam.original(*args, **kwargs)
        heading = HEADING.get()
        if heading is not None and heading[0] is frame and site.kind == "block":
            return self._pass(frame, seam, site, args, kwargs)
        watch = frame.watch
        if watch is not None or len(seam.sites) > 1:
            visit = frame.visits.get(seam, 0)
            frame.visits[seam] = visit + 1
            if visit < len(seam.sites):
                site = seam.sites[visit]
            elif watch is not None and not frame.partial:
                site = self.root(frame.root).flow.another(self, self.root(frame.root), seam, visit)
            else:
                site = seam.sites[-1]
        given = (args, kwargs)
        if frame.cuts or frame.step.run.cuts:
            args, kwargs = shorter.rewrite(frame, site, args, kwargs)
        out = self._dispatch(frame, seam, site, args, kwargs)
        if frame.cuts and site.kind == "block" and site.index == site.count - 1:
            call = Call(site, frame, seam, args, kwargs, _NONE, frame.parent)
            out = shorter.restored(frame, site, call, out)
        if watch is not None and site.kind == "block" and not frame.partial:
            watch.see(site, site.port.named(*given), out)
        return out

    def _dispatch(self, frame: Frame, seam: Seam, site: Site, args: Any, kwargs: Any) -> Any:
        policies = self._plan.get(site, _NONE)
        call = Call(site, frame, seam, args, kwargs, policies, frame.parent)
        if not policies or frame.plainly:
            return frame.compute(call, args, kwargs)
        outer, frame.parent = frame.parent, call
        try:
            return policies[0][1].around(call)
        except flow.Unsure:
            if not frame.repeatable or site.kind == "model":
                raise
            frame.plainly = True  # to its end: what others keep of a forward needs the whole of it
            return frame.plain(seam, args, kwargs)
        finally:
            frame.parent = outer

    def _enter(self, seam: Seam, site: Site, args: Any, kwargs: Any) -> Any:
        """A forward of a root begins."""
        why = self._inert(site.module)
        if why is not None:
            self.inert_forwards[why] = self.inert_forwards.get(why, 0) + 1
            return seam.original(*args, **kwargs)
        root = self.root(site.module)
        arguments = site.port.named(args, kwargs)
        scheduler = getattr(self.pipeline(), "scheduler", None)
        other = scheduler is not self.scheduler and scheduler is not None
        if other and follow_scheduler(self, scheduler):  # the pipeline was given another
            begin(self, scheduler)
        step = step_of(root, self.schedules, arguments)
        frame = Frame(self, root, step, FRAME.get(), arguments)
        x = site.port.main(arguments.get)
        _, cache = cache_of(arguments)
        frame.length = length_of(arguments)
        if step.run.cuts and cache is not None:
            frame.keys = int(stand_in.decoder_cache(cache).get_seq_length()) + frame.length
        self.forwards += 1
        shape = (tuple(x.shape), step.phase) if isinstance(x, torch.Tensor) else None
        new = shape is not None and shape not in root.counted
        if new and self.counting and len(root.counted) < _SHAPES_COUNTED and can_count(site.module):
            frame.flops = FlopMode()
        token = FRAME.set(frame)
        try:
            if frame.flops is None:
                out = self._begin(root, frame, seam, args, kwargs)
            else:
                with frame.flops:
                    out = self._begin(root, frame, seam, args, kwargs)
                root.tries += frame.uncounted > 0
                if frame.uncounted == 0 or root.tries > _COUNTED_IN_PART:
                    root.counted.add(shape)
        except BaseException:
            frame.account()
            step.run.broken = True
            step.run.clear()
            self.tally.forward(frame, root.name, None)  # nobody knows how much of it was computed
            raise
        finally:
            FRAME.reset(token)
            frame.account()
        self._leave(root, frame, out)
        if step.phase == "denoise" and step.run.slots and self.policies_at(site):
            # a caller may write to what it gets, a policy may have kept it
            out = tree.transform(_copy, out)
        return out

    def _begin(self, root: Root, frame: Frame, seam: Seam, args: Any, kwargs: Any) -> Any:
        """The forward of a root."""
        try:
            if frame.watch is None or not root.asks_blocks:
                return self._dispatch(frame, seam, root.site, args, kwargs)
            return self._watched(root, frame, seam, args, kwargs)
        except flow.Unsure as unsure:
            raise UnsupportedModelError(str(unsure)) from None

    def _watched(self, root: Root, frame: Frame, seam: Seam, args: Any, kwargs: Any) -> Any:
        """The same; where a policy asks more of a block than its names tell, one that is only
        watched goes before it."""
        site = root.site
        state, before = torch.get_rng_state(), self._counters(frame)
        cached = cache_of(frame.arguments)[1] is not None
        # what another model of the run has kept is not to be begun again
        whole = False
        if cached or root.flow.watched or not frame.step.run.slots:
            frame.repeatable = not cached
            try:
                out = self._dispatch(frame, seam, site, args, kwargs)
            except flow.Unsure:
                if cached:
                    raise
            else:
                if not frame.plainly:
                    return out
                whole = not (frame.left_out or frame.cuts)  # and so watched already
            frame.step.run.clear()
        if not whole:
            self._rewind(frame, state, before)
            frame.watch, frame.plainly = root.flow.watch(), True
            seam.original(*args, **kwargs)
        frame.looks += 1
        root.flow.settle(self, root, frame.watch or flow.Watch())
        frame.watch, frame.plainly, frame.repeatable = None, False, False
        self._rewind(frame, state, before)
        return self._dispatch(frame, seam, site, args, kwargs)

    def _counters(self, frame: Frame) -> Any:
        """What a forward that is begun again must not have counted."""
        records = {site: record.counters() for site, record in self._records.items()}
        return records, dict(self.skips), len(self.trace), self.host_reads

    def _rewind(self, frame: Frame, state: torch.Tensor, before: Any) -> None:
        records, skips, entries, reads = before
        frame.forget()
        for site, record in self._records.items():
            record.restore(records.get(site))
        self.skips = dict(skips)
        self.trace.cut(entries)
        self.host_reads = reads
        torch.set_rng_state(state)

    def generate(self, override: Any, site: Site, args: Any, kwargs: Any) -> Any:
        """A generation begins: the forwards inside are no part of this frame, each has its own."""
        root = self.root(site.module)
        run = Run(signal=site.path, index=0)
        step = Step(run, 0, None, "prefill", root.name or "main", site.path)
        arguments = site.port.named(args, kwargs)
        frame = Frame(self, root, step, FRAME.get(), arguments)
        try:
            return self._dispatch(frame, override, site, args, kwargs)
        finally:
            frame.account()

    def _leave(self, root: Root, frame: Frame, out: Any) -> None:
        run = frame.step.run
        if frame.watch is not None:
            root.flow.settle(self, root, frame.watch)
        if frame.step.phase == "prefill" and not run.cached:
            made = getattr(out, "past_key_values", None)
            if stand_in.is_cache(made):
                run.signal = "cache" if run.signal == "forward" else run.signal
                root.recogniser.bind_cache(made, run)
        self._bound(run)
        x = root.site.port.main(frame.arguments.get)
        shape = tuple(x.shape) if isinstance(x, torch.Tensor) else ()
        self.tally.forward(frame, root.name, self.record(root.site).flops.get(shape))

    def _bound(self, run: Run) -> None:
        """Keep what the run caches under each policy's ``max_cache_bytes``."""
        if not run.slots:
            return
        run.measure()
        for index, policy in enumerate(self.policies):
            cap = getattr(policy, "max_cache_bytes", None)
            if cap is None:
                continue
            mine = [key for key, slot in run.slots.items() if slot.policy == index]
            if sum(tree.nbytes(run.slots[key].value) for key in mine) > cap:
                self.say_inert(
                    f"{policy.name}: what it keeps of a run passes max_cache_bytes={cap} and is "
                    "dropped; give more, or a narrower scope"
                )
                for key in mine:
                    del run.slots[key]
                self.dropped_for_bytes += 1

    def say(self, text: str) -> bool:
        """A line in the report, once; whether this is the first time."""
        first = text not in self._warned
        if first:
            self._warned.add(text)
            self.notes.append(text)
        return first

    def say_inert(self, why: str) -> None:
        """A line in the report, and, where the session is strict, a warning; once."""
        if self.say(why) and self.strict:
            warnings.warn(why, InertWarning, stacklevel=2)

    def is_paused(self) -> bool:
        return not self._active or bool(self._pauses.get())

    def _inert(self, model: nn.Module) -> str | None:
        if self.is_paused():
            return "paused"
        why = None
        if torch.compiler.is_exporting():
            why = "the model is being exported (what comes out is the plain model)"
        elif self._trains:
            return None
        elif torch.is_grad_enabled():
            why = "gradients are on (use torch.no_grad() or torch.inference_mode())"
        elif model.training:
            why = "the model is in training mode (call model.eval())"
        if why is not None and why not in self._warned:
            self._warned.add(why)
            warnings.warn(f"policies are inert: {why}", InertWarning, stacklevel=5)
        return why

    def head(self, call: Call, x: torch.Tensor) -> Any:
        """The model's output if ``x`` were that of the last block of the call's stack: its forward
        once more, with blocks that only hand on."""
        frame = call._frame
        if call.site.kind != "block":
            raise UnsupportedModelError(f"{call.site.name} is no block: only these know the head")
        seam = next(s for s in self.root(frame.root).seams if s.owner is frame.root)
        token = HEADING.set((frame, call, x))
        try:
            out = seam.original(**frame.arguments)
        finally:
            HEADING.reset(token)
        logits = getattr(out, "logits", None)
        return next(tree.leaves(out))[1] if logits is None else logits

    def _pass(self, frame: Frame, seam: Seam, site: Site, args: Any, kwargs: Any) -> Any:
        _, asked, x = HEADING.get()
        call = Call(site, frame, seam, args, kwargs, _NONE, frame.parent)
        mine = site.stack == asked.site.stack
        record = self.record(site)
        if record.unskippable(call, mine) is not None:
            record = self.record(asked.site)
        why = record.unskippable(call, mine)
        if why is not None:
            raise UnsupportedModelError(f"{site.name}: the head cannot be reached, {why}")
        return record.fill(call, x if mine else call.x, call.context, mine)

    def attend(self, call: Call, fn: Any) -> Any:
        """Run a call with ``fn`` as its attention."""
        root = self.root(call._frame.root)
        make = self._reach.get(call.site)
        make = AttentionMode if make is None else make
        mode = make(fn, lengths(call), call.layout)
        try:
            with mode:
                out = call.proceed()
        except Exception as error:
            if not type(error).__module__.startswith("torch._dynamo"):
                raise
            raise UnsupportedModelError(
                f"{call.site.name}: its attention compiles itself (the flex backend), and what is "
                "reached from outside cannot be compiled; choose another backend of attention"
            ) from error
        if mode.calls == 0:
            raise UnsupportedModelError(
                f"{call.site.name} ({type(call.site.module).__name__} in "
                f"{type(root.model).__name__}): its attention never reached "
                "scaled_dot_product_attention; load the model with attn_implementation='sdpa', or "
                "leave this site out with only="
            )
        return out

    def reach(self, site: Site, make: Any) -> None:
        """How the attention of a site is reached, where the default does not."""
        if make is not None:
            self._reach[site] = make


def _copy(path: tree.Path, tensor: torch.Tensor) -> torch.Tensor:
    return tensor.clone()


_NONE: list[tuple[int, Policy]] = []


opaque_functions(globals())
