"""Models and modules that somebody has put in the place of ours: nothing is heard of these."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn

from accelerate_hooks.opaque import opaque_functions

if TYPE_CHECKING:
    from accelerate_hooks.session import Session


def tell_replaced_models(session: Session) -> None:
    """Say which models the pipeline does not have any more."""
    pipeline = session.pipeline()
    for root in session.roots if pipeline is not None else ():
        if root.name and not _holds(getattr(pipeline, root.name, None), root.model):
            session.say_inert(
                f"{root.name}: the pipeline was given another one since enable, which computes "
                "plainly; call disable() and enable(pipe, ...) again"
            )


def tell_replaced(session: Session) -> None:
    """Say which models, and which of their modules, are not in their place any more."""
    tell_replaced_models(session)
    for root in session.roots:
        gone = [
            seam.sites[0].path
            for seam in root.seams
            if seam.owner is not root.model and not _holds(_at(root.model, seam), seam.owner)
        ]
        if gone:
            where = ", ".join(f"{root.name}.{path}" if root.name else path for path in gone[:4])
            more = f" and {len(gone) - 4} more" if len(gone) > 4 else ""
            session.say_inert(
                f"{where}{more}: replaced since enable; policies did not act there since"
            )


def _at(model: nn.Module, seam: Any) -> Any:
    try:
        return model.get_submodule(seam.sites[0].path)
    except AttributeError:
        return None


def _holds(now: Any, module: nn.Module) -> bool:
    """Whether ``now`` is the module, or something that was put around it."""
    return now is module or (isinstance(now, nn.Module) and any(m is module for m in now.modules()))


opaque_functions(globals())
