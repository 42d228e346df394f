"""The base class of all policies."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from accelerate_hooks.site import Effect, Kind, Site

if TYPE_CHECKING:
    from accelerate_hooks.call import Call

Decides = Literal["ahead", "step", "site"]


@dataclass(frozen=True, kw_only=True)
class Policy:
    """Settings and one decision method. Subclasses are frozen keyword-only dataclasses.

    An instance holds nothing of a generation (that lives in ``call.slot``), so one may serve many
    models and threads. Types of settings are checked here; validate the rest in ``__post_init__``
    (call ``super().__post_init__()`` first) with `require`.
    """

    name: ClassVar[str]
    trains: ClassVar[bool] = False
    """Whether the policy may act with gradients on or in training mode."""

    def __post_init__(self) -> None:
        from accelerate_hooks._settings import verify

        verify(self)

    @property
    def kinds(self) -> tuple[Kind, ...]:
        """The kinds of sites that the policy wants to be asked about."""
        raise NotImplementedError

    @property
    def decides(self) -> Decides:
        """How often the host must read: ``"ahead"`` never, ``"step"`` at most once a forward,
        ``"site"`` at most once a visit."""
        return "ahead"

    @classmethod
    def exact(cls) -> Self:
        """Settings under which nothing is skipped."""
        raise NotImplementedError

    @classmethod
    def example(cls) -> Self:
        """Settings under which something surely is skipped (the contract suite uses both)."""
        raise NotImplementedError

    def acts(self, site: Site) -> frozenset[Effect]:
        """What the policy may do at a site under its settings; empty leaves the site alone."""
        return frozenset({Effect.SKIP})

    def around(self, call: Call) -> Any:
        """Decide one visit: return ``call.proceed(...)``, ``call.skip(...)`` or the like."""
        return call.proceed()

    def check(self, session: Any) -> list[str]:
        """Called once by ``enable`` before anything is touched: raise if the policy cannot work on
        ``session.sites``; return lines that the report shall show."""
        return []

    def install(self, session: Any) -> None:
        """Called once by ``enable``, before the first visit, for what is done to modules once and
        for all. Every change goes with its undoing into ``session.ledger``; what the visits have to
        know of it goes into ``session.know``."""

    def fit(
        self,
        model: Any,
        data: Any,
        *,
        target: float | None = None,
        resume: str | None = None,
        progress: bool = True,
    ) -> Self:
        """Learn what the settings leave open; returns a new policy that carries an artifact."""
        raise NotImplementedError(f"{self.name} has nothing to fit")

    def require(self, field: str, ok: bool, wanted: str) -> None:
        """Raise a `SpecError` that names the field, its value and what was wanted."""
        if not ok:
            from accelerate_hooks.errors import SpecError

            got = getattr(self, field)
            raise SpecError(f"{self.name}: {field}={got!r} is out of range; give {wanted}")

    def __str__(self) -> str:
        from accelerate_hooks.spec import render

        return render(self)

    def settings(self) -> dict[str, Any]:
        return {f.name: getattr(self, f.name) for f in fields(self)}


PolicyFactory = Callable[..., Policy]
