"""The objects that stand in front of a method while a session lives, and the ledger that undoes
them.

Not ``register_forward_hook``: a hook cannot skip, and one added after ``torch.compile`` is silently
ignored. An object, not a closure: a closure in a deep-copied module would run the original's
weights, while these turn back into the plain method whenever they are copied or pickled.
"""

from __future__ import annotations

import copy
import functools
import inspect
import weakref
from collections.abc import Callable
from typing import Any

from accelerate_hooks.opaque import opaque, opaque_functions
from accelerate_hooks.overhear import Told, overhear
from accelerate_hooks.site import Site


class Override:
    """An instance attribute that stands in front of ``owner.<name>``.

    ``handler(override, args, kwargs)`` is called instead; ``override.original`` is what stood
    there. A deep copy, an unpickled owner and a ``DataParallel`` replica get the plain method,
    bound to themselves.
    """

    def __init__(self, owner: Any, name: str, handler: Callable[..., Any]) -> None:
        self.name = name
        self.handler = handler
        self.had = name in vars(owner)
        self.own = self.had or not hasattr(type(owner), name)  # the latter: a proxy's
        self.original: Callable[..., Any] = getattr(owner, name)
        self._owner = weakref.ref(owner)
        self.__name__ = name
        self.__doc__ = self.original.__doc__
        self.__wrapped__ = self.original
        for known in ("__module__", "__qualname__"):  # what `functools.update_wrapper` copies
            if hasattr(self.original, known):
                setattr(self, known, getattr(self.original, known))
        self.__signature__ = inspect.signature(self.original)

    @property
    def owner(self) -> Any:
        return self._owner()

    @opaque
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.handler(self, args, kwargs)

    def __getattr__(self, name: str) -> Any:
        # `torch.export` says by a forward's code what it exports
        if (name.startswith("__") and name != "__code__") or "original" not in self.__dict__:
            raise AttributeError(name)
        return getattr(self.__dict__["original"], name)

    def plain(self, owner: Any) -> Any:
        """The method as it would be on ``owner`` without us."""
        if owner is None or self.own:
            return self.original
        return getattr(type(owner), self.name).__get__(owner)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        if self.own:
            return copy.deepcopy(self.original, memo)
        return self.plain(memo.get(id(self.owner)))

    def __reduce__(self) -> Any:
        if self.own:
            return copy.copy, (self.original,)
        return getattr, (self.owner, self.name)


class Seam(Override):
    """The override of a module's ``forward``. ``sites`` holds one site a visit within a forward."""

    def __init__(self, session: Any, sites: list[Site]) -> None:
        super().__init__(sites[0].module, "forward", session)
        self.session = session
        self.sites = sites
        self.active = True

    @opaque
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not self.active:
            return self.original(*args, **kwargs)
        return self.session._visit(self, args, kwargs)


@opaque
def _replicate(override: Override, args: Any, kwargs: Any) -> Any:
    replica = override.original(*args, **kwargs)
    _take_out(vars(replica), replica)
    return replica


@opaque
def _getstate(override: Override, args: Any, kwargs: Any) -> Any:
    state = override.original(*args, **kwargs)
    if isinstance(state, dict):
        state = state.copy()  # may be the module's own
        _take_out(state, override.owner)
    return state


def _take_out(state: dict[str, Any], owner: Any) -> None:
    """Shallow copies of a ``__dict__`` share our seams: take them out again."""
    for name, value in list(state.items()):
        if isinstance(value, Override):
            if value.name == name and not value.had:
                del state[name]
            else:  # kept under another name, as accelerate's `_old_forward`
                state[name] = value.plain(owner)
        elif "_accelerate_hooks" in getattr(value, "__dict__", ()):  # a patch's, and what was there
            state[name] = vars(value)["_accelerate_hooks"][0]


def _after(told: Told) -> Any:
    def handler(override: Override, args: Any, kwargs: Any) -> Any:
        result = override.original(*args, **kwargs)
        told(override.owner, result, args, kwargs)
        return result

    return handler


class Ledger:
    """Every change that a session makes to objects of others, undone last first."""

    def __init__(self) -> None:
        self._undo: dict[Callable[[], str | None], weakref.ref[Any] | None] = {}
        self.taken_out: list[str] = []

    def override(self, override: Override, owner: Any = None) -> None:
        vars(override.owner)[override.name] = override
        self.note(lambda: self._restore(override), owner)

    def seam(self, seam: Seam) -> None:
        self.override(seam)
        self.override(Override(seam.owner, "_replicate_for_data_parallel", _replicate))
        self.override(Override(seam.owner, "__getstate__", _getstate))  # which copies ask for

    def overhear(self, owner: Any, told: dict[str, Told]) -> None:
        """Call ``told[name]`` after ``owner.<name>``, also where that is the object's own, or its
        class lacks it (a proxy) or allows no subclass. A TypeError where nothing can be heard."""
        own = [n for n in told if n in vars(owner) or not hasattr(type(owner), n)]
        try:
            undo = overhear(owner, {name: told[name] for name in told if name not in own})
        except Exception:  # whatever the class's own `__init_subclass__` raises
            own = list(told)
        else:
            self.note(undo, owner)
        for name in own:
            self.override(Override(owner, name, _after(told[name])), owner)

    def hears(self, owner: Any) -> bool:
        return any(known is not None and known() is owner for known in list(self._undo.values()))

    def note(self, undo: Callable[[], str | None], owner: Any = None) -> None:
        """Record an undo function; it returns None, or the name of what it could not undo. It is
        forgotten with its owner, if it has one: a server may give a pipeline another scheduler for
        each request."""
        gone = None if owner is None else lambda _: self._undo.pop(undo, None)
        self._undo[undo] = None if gone is None else weakref.ref(owner, gone)

    def undo(self) -> list[str]:
        """Undo everything; the names of what somebody else has wrapped meanwhile. What somebody
        else has taken out is in ``taken_out``. What cannot be undone raises when all else is."""
        left, errors = [], []
        while self._undo:
            undo, _ = self._undo.popitem()
            try:
                name = undo()
            except Exception as error:
                errors.append(error)
                continue
            if name is not None:
                left.append(name)
        if errors:
            raise errors[0]
        return left

    def _restore(self, override: Override) -> str | None:
        owner = override.owner
        if owner is None:
            return None
        state = vars(owner)
        name = f"{type(owner).__name__}.{override.name}"
        plain = override.plain(owner)
        found = state.get(override.name)
        if found is override:
            if override.had:
                state[override.name] = override.original
            else:
                del state[override.name]
        wrapped = found is not override
        for key, value in list(state.items()):
            if value is override:  # kept under another name, as accelerate's `_old_forward`
                state[key] = plain
                wrapped = False
            elif getattr(value, "__wrapped__", None) is override:
                _unwrap(value, override, plain)
        if wrapped and (
            found is None
            or found == getattr(type(owner), override.name, override.original).__get__(owner)
        ):
            self.taken_out.append(name)
            return None
        return name if wrapped else None


def _unwrap(wrapper: Any, override: Override, plain: Any) -> None:
    """``functools.update_wrapper(wrapper, override)`` has copied what ``override`` holds: make it
    what ``update_wrapper(wrapper, plain)`` does."""
    state = vars(wrapper)
    for key in vars(override):
        if state.get(key) is vars(override)[key]:
            del state[key]
    functools.update_wrapper(wrapper, plain)


def seam_of(module: Any) -> Seam | None:
    """The live seam on a module, whoever wrapped it under a name of the module's own."""
    for value in vars(module).values():
        if isinstance(value, Seam) and value.active:
            return value
    return None


opaque_functions(globals())
