"""How tensors flow from block to block: watched in a first forward.

Names in a signature give the right port for two models of three. Which output of a block *is*, by
storage, which argument of the next gives it for all that were tried; where a model works on the
tensor between two blocks, the one output shaped like x does.
"""

from __future__ import annotations

import dataclasses
import threading
from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from accelerate_hooks import tree
from accelerate_hooks.errors import UnsupportedModelError
from accelerate_hooks.opaque import opaque_functions
from accelerate_hooks.site import Port, Site

if TYPE_CHECKING:
    from accelerate_hooks.call import Call
    from accelerate_hooks.frame import Root
    from accelerate_hooks.session import Session

Edge = tuple[tree.Path, tree.Path]  # (path in the producer's output, path in the consumer's input)
Form = tuple[tuple[int, ...], torch.dtype]
_MOST = 16  # forwards watched in vain before blocks that were never visited are given up


class Visit(NamedTuple):
    """One visit of a block: the forms of its tensors, and what the block before it produced."""

    site: Site
    given: dict[tree.Path, Form]
    out: dict[tree.Path, Form]
    before: int | None
    edges: list[Edge]


class Watch:
    """What one forward shows. It holds the output of the last block of each list, no more."""

    def __init__(self) -> None:
        self.visits: list[Visit] = []
        self._held: dict[str, tuple[int, list[tuple[tree.Path, torch.Tensor]]]] = {}
        self._latest: str | None = None

    def see(self, site: Site, arguments: dict[str, Any], out: Any) -> None:
        """What the model gave to a block and was given back."""
        given, produced = list(tree.leaves(arguments)), list(tree.leaves(out))
        before, edges = None, []
        for name in dict.fromkeys((site.stack, self._latest)):
            if name is None or name not in self._held:
                continue
            place, leaves = self._held[name]
            edges = [(o, i) for o, made in leaves for i, taken in given if tree.same(made, taken)]
            if edges:
                before = place
                break
        inputs, outputs = ({path: _form(t) for path, t in leaves} for leaves in (given, produced))
        self.visits.append(Visit(site, inputs, outputs, before, edges))
        self._held[site.stack] = (len(self.visits) - 1, produced)
        self._latest = site.stack


class Flow:
    """The ports of one model's blocks. ``open`` while there are blocks nobody has watched yet,
    ``watched`` the forwards in which some were."""

    def __init__(self) -> None:
        self.open = True
        self.watched = 0
        self._lock = threading.Lock()

    def watch(self) -> Watch | None:
        return Watch() if self.open else None

    def another(self, session: Session, root: Root, seam: Any, visit: int) -> Site:
        """The site of one more visit of the same module within a forward."""
        with self._lock:
            while len(seam.sites) <= visit:
                old = seam.sites[-1]
                new = dataclasses.replace(old, visit=old.visit + 1)
                session.adopt(old, new)
                root.sites.insert(root.sites.index(old) + 1, new)
                seam.sites.append(new)
            return seam.sites[visit]

    def settle(self, session: Session, root: Root, watch: Watch) -> None:
        """Confirm or correct the ports of the blocks that were seen, and cut them into stacks.

        Raises UnsupportedModelError for a block with a policy whose ports cannot be told; where the
        session is not strict, its policies leave such blocks alone and the report says so.
        """
        with self._lock:
            fresh = [not v.site.port.confirmed for v in watch.visits]
            if any(fresh):
                ports, chained = _ports(watch.visits)
                _number(watch.visits, chained, fresh, root.sites)
                for visit, port, new in zip(watch.visits, ports, fresh, strict=True):
                    if new and isinstance(port, Port):
                        visit.site.learn(port=port)
                    elif new:
                        visit.site.learn(port=dataclasses.replace(visit.site.port, confirmed=True))
                        _refuse(session, root, visit.site, str(port))
            self.watched += bool(watch.visits)
            blocks = [site for site in root.sites if site.kind == "block"]
            left = [site for site in blocks if not site.port.confirmed]
            self.open = bool(left) and self.watched < _MOST


class Unsure(Exception):
    """A policy asked for x in the output of a block that nobody has watched, and not exactly one
    tensor there looks like it: the forward starts again, watched and without policies."""

    def __init__(self, call: Call) -> None:
        super().__init__(
            f"{type(call._frame.root).__name__}: which output of {call.site.name} is its "
            f"{call.site.port.x} cannot be told by their shapes; run one forward without a KV "
            "cache first, or give the family a patch"
        )


def places(call: Call, out: Any) -> tuple[tree.Path, tree.Path | None]:
    """Where x and context are in an output: as confirmed, before that by their forms."""
    port = call.site.port
    if port.confirmed or call.site.kind == "model":
        return tree.first(out) if port.out is None else port.out, port.context_out
    if isinstance(out, torch.Tensor) or not isinstance(call.x, torch.Tensor):
        return tree.first(out), None
    # not the batch: a part of the rows looks alike
    forms = {path: _row_form(leaf) for path, leaf in tree.leaves(out)}
    found = [path for path, form in forms.items() if form == _row_form(call.x)]
    if len(found) != 1 and len(forms) > 1 and call.site.kind == "block":
        raise Unsure(call)
    x = found[0] if found else tree.first(out)
    context = call.context
    if not isinstance(context, torch.Tensor):
        return x, None
    found = [path for path, form in forms.items() if form == _row_form(context) and path != x]
    return x, found[0] if len(found) == 1 else None


def confirm_inside(call: Call, out: Any) -> None:
    """The port of a site inside a block, from its first computed visit."""
    port = call.site.port
    if not port.confirmed and call.site.kind not in ("model", "block"):
        x, context = places(call, out)
        call.site.learn(port=dataclasses.replace(port, out=x, context_out=context, confirmed=True))


def _form(tensor: torch.Tensor) -> Form:
    return tuple(tensor.shape), tensor.dtype


def _row_form(tensor: torch.Tensor) -> Form:
    return tuple(tensor.shape[1:]), tensor.dtype


def _refuse(session: Session, root: Root, site: Site, why: str) -> None:
    if not session.policies_at(site):
        return
    text = (
        f"{type(root.model).__name__}: {site.name} ({type(site.module).__name__}): {why}; leave "
        "these blocks out with only=, or give the family a patch"
    )
    if session.strict:
        site.learn(port=dataclasses.replace(site.port, confirmed=False))
        raise UnsupportedModelError(text)
    session.leave_out(site)
    session.notes.append(text)


def _ports(visits: list[Visit]) -> tuple[list[Port | str], list[bool]]:
    """The port of every visit, or why it cannot be told; which x came from the visit before."""
    entrances = _by_class((v, name) for v in visits if (name := _entrance(v)) is not None)
    xs = [_most(entrances, v) or v.site.port.x for v in visits]
    chained = [any(i == (x,) for _, i in v.edges) for v, x in zip(visits, xs, strict=True)]
    joins = [
        (visits[v.before], v, x)
        for v, x, joined in zip(visits, xs, chained, strict=True)
        if joined and v.before is not None
    ]
    exits = _by_class((p, o) for p, v, x in joins for o, i in v.edges if i == (x,))
    contexts = _by_class(
        (p, o) for p, v, x in joins for o, i in v.edges if i == (v.site.port.context,) != (x,)
    )
    streams = _by_class((p, (str(i[0]), o)) for p, v, _ in joins for o, i in v.edges if len(i) == 1)
    ports: list[Port | str] = []
    for visit, x in zip(visits, xs, strict=True):
        old = visit.site.port
        out = _most(exits, visit)
        if out is None or out not in visit.out:
            out = _by_form(visit, x)
        if isinstance(out, str):
            ports.append(out)
            continue
        context = _most(contexts, visit) or _context_by_form(visit, out)
        rest = streams.get(type(visit.site.module), Counter())
        ports.append(
            dataclasses.replace(
                old,
                x=x,
                out=out,
                context_out=context if context != out else None,
                streams=tuple((n, o) for n, o in rest if o not in (out, context) and n != x),
                confirmed=True,
            )
        )
    return ports, chained


def _entrance(visit: Visit) -> str | None:
    """The argument of a block that the block before it produced."""
    port = visit.site.port
    names = [str(path[0]) for _, path in visit.edges if len(path) == 1]
    if port.x in names:
        return port.x
    usual = visit.given.get((port.x,))
    if usual in visit.out.values():
        # x goes through, the model worked on it between the blocks; or it is but a look at x
        names = [name for name in names if visit.given[name,] == usual]
    return next((name for name in names if name != port.context), None)


def _by_form(visit: Visit, x: str) -> tree.Path | str:
    """The one output that is shaped like x, or why there is none."""
    form = visit.given.get((x,))
    if form is None:
        return f"its argument {x!r} is no tensor"
    paths = [path for path, other in visit.out.items() if other == form]
    if len(paths) == 1:
        return paths[0]
    if not paths:
        return f"no block takes its output over, and none of it is shaped like {x!r} {form[0]}"
    return f"no block takes its output over, and {len(paths)} outputs are shaped like {x!r}"


def _context_by_form(visit: Visit, out: tree.Path) -> tree.Path | None:
    form = visit.given.get((visit.site.port.context,))  # type: ignore[arg-type]
    paths = [path for path, other in visit.out.items() if other == form and path != out]
    return paths[0] if len(paths) == 1 else None


def _by_class(found: Iterator[tuple[Visit, Any]]) -> dict[type, Counter[Any]]:
    counts: dict[type, Counter[Any]] = {}
    for visit, value in found:
        counts.setdefault(type(visit.site.module), Counter())[value] += 1
    return counts


def _most(counts: dict[type, Counter[Any]], visit: Visit) -> Any:
    common = counts.get(type(visit.site.module), Counter()).most_common(1)
    return common[0][0] if common else None


def _number(visits: list[Visit], chained: list[bool], fresh: list[bool], sites: list[Site]) -> None:
    """Number the blocks anew within every unbroken chain, and what is inside them alike."""
    chains: list[list[int]] = []
    of: dict[int, list[int]] = {}
    for i, visit in enumerate(visits):
        chain = of.get(visit.before) if chained[i] and visit.before is not None else None
        if chain is None or chain[-1] != visit.before:
            chain = []
            chains.append(chain)
        chain.append(i)
        of[i] = chain
    taken: set[str] = set()
    for chain in chains:
        head = visits[chain[0]].site
        stack = head.stack if head.stack not in taken else head.name
        taken.add(stack)
        for index, i in enumerate(chain):
            if not fresh[i]:
                continue
            block = visits[i].site
            for site in sites:
                inside = site.path.startswith(f"{block.path}.") and site.visit == block.visit
                if site is block or inside:
                    site.learn(index=index, count=len(chain), stack=stack)


opaque_functions(globals())
