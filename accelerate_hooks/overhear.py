"""Hear what is called on an object, with nothing of ours in its ``__dict__``.

The object has a subclass of its own class for as long as somebody listens. Not attributes: those go
along into shallow copies, and with a ``__dict__`` that somebody copies (diffusers' panorama
pipeline does), and act on the original from there. All copies, and all that the subclass is asked
to make, are of the plain class.
"""

from __future__ import annotations

import copyreg
import functools
import weakref
from collections.abc import Callable, Mapping
from typing import Any

from accelerate_hooks.opaque import opaque, opaque_functions

Told = Callable[[Any, Any, Any, Any], None]
_TOLD = "_accelerate_hooks_told"


def overhear(owner: Any, told: Mapping[str, Told]) -> Callable[[], str | None]:
    """After each ``owner.<name>(*args, **kwargs)`` call ``told[name](owner, result, args,
    kwargs)``, once for each listener, until the function that this returns is called; that one
    returns None, or the name of a class that somebody else has put in place of ours meanwhile."""
    if _TOLD not in vars(type(owner)):
        object.__setattr__(owner, "__class__", _listening(type(owner)))
    listening = type(owner)
    listeners: list[Mapping[str, Told]] = vars(listening)[_TOLD]
    listeners.append(told)
    for name in told:
        if name not in vars(listening):
            setattr(listening, name, _heard(listening, name))
    known = weakref.ref(owner)

    def undo() -> str | None:
        listeners[:] = [other for other in listeners if other is not told]
        owner = known()
        if owner is None or listeners:
            return None
        if type(owner) is not listening:
            return type(owner).__name__
        object.__setattr__(owner, "__class__", listening.__base__)
        return None

    return undo


def _listening(base: Any) -> Any:
    """A subclass of its own for each object, so that the listeners die with it."""

    def make(cls: Any, *args: Any, **kwargs: Any) -> Any:
        return base(*args, **kwargs)

    def reduce(self: Any, protocol: Any) -> Any:
        result = base.__reduce_ex__(self, max(int(protocol), 2))
        plain = result[0] is copyreg.__newobj__  # type: ignore[attr-defined]
        if not plain or result[1][0] is not type(self):
            return result
        # Not `copyreg.__newobj__`: pickle holds that one to the class that the object has now.
        return base.__new__, (base, *result[1][1:]), *result[2:]

    body = {
        _TOLD: [],
        "__new__": opaque(make),
        "__reduce_ex__": opaque(reduce),
        "__module__": base.__module__,
        "__qualname__": base.__qualname__,
        "__doc__": base.__doc__,
    }
    return type(base)(base.__name__, (base,), body)


def _heard(listening: Any, name: str) -> Callable[..., Any]:
    plain = getattr(listening, name)

    @opaque
    @functools.wraps(plain)
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = plain(self, *args, **kwargs)
        for told in list(vars(listening)[_TOLD]):
            if name in told:
                told[name](self, result, args, kwargs)
        return result

    return method


opaque_functions(globals())
