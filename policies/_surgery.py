"""Experts really taken out of a model, and put back."""

from __future__ import annotations

import copy
import copyreg
import warnings
from typing import Any

import torch
from torch import Tensor, nn

from accelerate_hooks.errors import UnsupportedModelError
from accelerate_hooks.opaque import opaque_functions
from accelerate_hooks.policies._pruning import Layer, stacked
from accelerate_hooks.policies._twins import has_own_forward
from accelerate_hooks.seam import Ledger, Override
from accelerate_hooks.session import InertWarning
from accelerate_hooks.site import Site

_COUNTS = ("num_experts", "num_local_experts")  # what experts call their own number
_OURS = ("__deepcopy__", "__reduce_ex__", "_save_to_state_dict", "_load_from_state_dict")


class Removed:
    """What a module of experts held before some went, for its end and for copies and files of it:
    those hold all experts, as if none had gone."""

    def __init__(
        self, layer: Layer, kept: Tensor | None, matrix: Tensor | None, *, away: bool, drop: bool
    ) -> None:
        self.layer, self.kept, self.matrix, self.away, self.drop = layer, kept, matrix, away, drop
        module = self.module = layer.experts.module
        self.parameters = stacked(module)
        self.versions: dict[str, int] = {}
        self.counts = {n: vars(module)[n] for n in _COUNTS if n in vars(module)}

    def left(self, parameter: Tensor) -> Tensor:
        """What is left of all experts ``[E, ...]``, or made of them."""
        with torch.no_grad():
            return parameter[self.kept] if self.matrix is None else mixed(parameter, self.matrix)

    def whole(self, what: str) -> dict[str, nn.Parameter]:
        """The parameters as they were, on the device and in the dtype of what stands for them."""
        if self.drop:
            raise UnsupportedModelError(
                f"expert_skip: {what} needs the experts of {self.layer.experts.name} that "
                "irreversible=True has deleted; load the model again, or prune it without that"
            )
        for name, parameter in self.parameters.items():
            now = self.module._parameters.get(name)
            if now is None or now is parameter or now.is_meta:
                continue  # nothing has taken its place, or somebody has offloaded that
            if (now.device, now.dtype) != (parameter.device, parameter.dtype):
                parameter.data = parameter.data.to(now.device, now.dtype)
            if self.kept is not None and len(now) == len(self.kept):  # they may have been trained
                parameter.data[self.kept] = now.data
            elif now._version != self.versions[name]:
                warnings.warn(
                    f"expert_skip: {name} of {self.layer.experts.name} was changed while its "
                    f"experts were merged; {what} has the experts as they were",
                    InertWarning,
                    stacklevel=3,
                )
            parameter.requires_grad_(now.requires_grad)
        return self.parameters

    def state(self, what: str) -> dict[str, Any]:
        """The ``__dict__`` of the module as it would be."""
        whole = self.whole(what)
        state = {n: v for n, v in vars(self.module).items() if n not in _OURS}
        return state | self.counts | {"_parameters": dict(self.module._parameters) | whole}

    def deepcopy(self, memo: dict[int, Any]) -> nn.Module:
        new = memo[id(self.module)] = type(self.module).__new__(type(self.module))
        new.__setstate__(copy.deepcopy(self.state("a copy"), memo))
        return new

    def reduce_ex(self, protocol: Any) -> Any:
        return copyreg.__newobj__, (type(self.module),), self.state("a pickle")  # type: ignore[attr-defined]

    def save(self, override: Override, args: Any, kwargs: Any) -> Any:
        result = override.original(*args, **kwargs)
        destination, prefix, keep_vars = args
        for name, whole in self.whole("a state dict").items():
            destination[prefix + name] = whole if keep_vars else whole.detach()
        return result

    def load(self, override: Override, args: Any, kwargs: Any) -> Any:
        """A state dict holds all experts: they are loaded, and those that are left made of them."""
        own, some = self.module._parameters, dict(self.module._parameters)
        own.update(self.whole("loading a state dict"))
        try:
            return override.original(*args, **kwargs)
        finally:
            for name in self.parameters:
                self.parameters[name] = whole = own[name]  # type: ignore[assignment]
                own[name] = some[name]
                some[name].data = self.left(whole)  # type: ignore[union-attr,arg-type]
                self.versions[name] = some[name]._version  # type: ignore[union-attr]
                if self.away:
                    whole.data = whole.data.cpu()  # type: ignore[union-attr]

    def gone(self, override: Override, args: Any, kwargs: Any) -> Any:
        self.whole("a forward without the session")

    def undo(self) -> None:
        if self.drop:  # a copy, a pickle, a state dict and a forward go on to raise
            for name, handler in (
                ("forward", self.gone), (_OURS[2], self.save), (_OURS[3], self.load),
            ):  # fmt: skip
                vars(self.module)[name] = Override(self.module, name, handler)
            return
        for name in _OURS[:2]:
            del vars(self.module)[name]
        vars(self.module).update(self.counts)
        self.module._parameters.update(self.whole("the end of the session"))


def _removed(site: Site) -> Removed | None:
    held = getattr(vars(site.module).get(_OURS[0]), "__self__", None)
    return held if isinstance(held, Removed) else None


def refuse_deleted(sites: list[Site]) -> None:
    """Raises UnsupportedModelError where an earlier session has deleted experts."""
    for removed in filter(None, map(_removed, sites)):
        removed.whole("another session")


def shrink(
    layer: Layer, kept: Tensor | None, matrix: Tensor | None, *, ledger: Ledger, away: bool,
    drop: bool,
) -> int:  # fmt: skip
    """Leave the experts ``kept`` ``[E']`` in a layer, or the averages ``matrix`` ``[E', E]`` of
    them; returns the bytes by which its parameters have shrunk.

    The originals come back when the session ends, the same objects, on the device and in the dtype
    of what stood for them. ``away``: meanwhile they are on the CPU; ``drop``: they are deleted, and
    the experts raise once the session is over.
    """
    if _removed(layer.experts) is not None:
        raise UnsupportedModelError(
            f"expert_skip: several layers share the experts of {layer.experts.name}, and each "
            "would take out others; without free_memory and merge they are hidden from the routers "
            "instead"
        )
    removed = Removed(layer, kept, matrix, away=away, drop=drop)
    module, before = removed.module, removed.parameters
    wrapped = layer.experts.path.endswith(".base_layer") or hasattr(module, "parametrizations")
    if wrapped or not has_own_forward(module):
        raise UnsupportedModelError(
            f"expert_skip: somebody has wrapped the experts of {layer.experts.name} (an adapter, "
            "offloading) and counts on all of them; merge or take off what wraps them, or do "
            "without free_memory and merge"
        )
    if not before or any(
        type(p) is not nn.Parameter or p.is_meta or not p.is_floating_point()
        for p in before.values()
    ):
        raise UnsupportedModelError(
            f"expert_skip: the experts of {layer.experts.name} ({type(module).__name__}) are not "
            "plain stacked parameters on one device, and cannot be taken out; without free_memory "
            "and merge they are hidden from the router instead"
        )
    freed = 0
    ledger.note(removed.undo)
    vars(module).update(zip(_OURS, (removed.deepcopy, removed.reduce_ex), strict=False))
    for name, parameter in before.items():
        some = removed.left(parameter)
        module._parameters[name] = nn.Parameter(some, requires_grad=parameter.requires_grad)
        removed.versions[name] = module._parameters[name]._version  # type: ignore[union-attr]
        freed += (parameter.numel() - some.numel()) * parameter.element_size()
        vars(module).update(dict.fromkeys(removed.counts, len(some)))
        if away and not drop:
            parameter.data = parameter.data.cpu()
    if drop:
        removed.parameters = {}
    ledger.override(Override(module, "_save_to_state_dict", removed.save))
    ledger.override(Override(module, "_load_from_state_dict", removed.load))
    return freed


def mixed(parameter: Tensor, matrix: Tensor) -> Tensor:
    """``sum_j matrix[i, j] * parameter[j]``, one new expert at a time; a row of one 1 copies."""
    out = parameter.new_empty(len(matrix), *parameter.shape[1:])
    for i, row in enumerate(matrix.tolist()):
        used = [(j, w) for j, w in enumerate(row) if w]
        if len(used) == 1 and used[0][1] == 1.0:
            out[i] = parameter[used[0][0]]
            continue
        total = torch.zeros(parameter.shape[1:], dtype=torch.float32, device=parameter.device)
        for j, w in used:
            total.add_(parameter[j], alpha=w)
        out[i] = total
    return out


opaque_functions(globals())
