"""What a session did, what it saved and what that cost, for people and for programs."""

from __future__ import annotations

import copy
import json
import math
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accelerate_hooks import _heatmap, _html, _table
from accelerate_hooks._files import write_atomically
from accelerate_hooks._survey import survey
from accelerate_hooks.errors import AccelerateHooksError

if TYPE_CHECKING:
    from accelerate_hooks.session import Session


class ReportError(AccelerateHooksError, ValueError):
    """Raised when a report cannot be made or saved: no such run, an unknown format."""


class Report:
    """A snapshot of a session, or of one of its runs.

    ``str()`` is a table under 100 columns, `to_dict` JSON-able, `steps` one dict a visit: run,
    step, branch, site, action (``computed``, ``skipped`` or ``partly``), reason, age (steps since
    the site was last computed), numbers.
    """

    def __init__(self, data: dict[str, Any]) -> None:
        self._data = data

    @classmethod
    def of(cls, session: Session, run: int | None = None) -> Report:
        """The report of a session, or of the run with that number.

        Raises ReportError for a run that the session does not know (any more).
        """
        if run is not None:
            known = sorted(
                {s.number for s in list(session.tally.recent)} | set(session.trace.runs())
            )
            if run not in known:
                shown = ", ".join(map(str, known[-8:])) or "none yet"
                raise ReportError(f"there is no run {run!r} in this session; its latest: {shown}")
        return cls(survey(session, run))

    @property
    def steps(self) -> list[dict[str, Any]]:
        return copy.deepcopy(self._data["steps"])

    def to_dict(self) -> dict[str, Any]:
        """Everything, JSON-able; the keys stay as they are within one ``schema``."""
        return copy.deepcopy(self._data)

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write ``.json`` (`to_dict`), ``.html`` (self-contained) or ``.png`` (the heat map of
        steps and sites; needs matplotlib).

        Raises ReportError for another suffix, a folder that is not there, or without matplotlib.
        """
        if not isinstance(path, (str, os.PathLike)):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise ReportError(f"a report is saved to a path, not to a {type(path).__name__}")
        path = Path(path)
        make = _FORMATS.get(path.suffix.lower())
        if make is None:
            raise ReportError(
                f"{path.name!r}: a report is saved as {', '.join(_FORMATS)}; give one of these "
                "suffixes"
            )
        if not path.parent.is_dir():
            raise ReportError(f"{path}: there is no folder {path.parent}; make it first")
        content = make(self._data)
        try:
            write_atomically(path, content)
        except (OSError, ValueError) as error:
            raise ReportError(f"{path} cannot be written ({error}); give another path") from error
        return path

    def __str__(self) -> str:
        return _table.render(self._data)

    def __repr__(self) -> str:
        totals = self._data["totals"]
        return f"<report: {totals['skipped']} of {totals['visits']} visits skipped>"


def _json(data: dict[str, Any]) -> bytes:
    return json.dumps(_finite(data), indent=1, allow_nan=False, default=str).encode()


def _finite(node: Any) -> Any:
    """NaN and infinities as words, since JSON has none."""
    if isinstance(node, dict):
        return {key: _finite(value) for key, value in node.items()}
    if isinstance(node, list):
        return [_finite(value) for value in node]
    return str(node) if isinstance(node, float) and not math.isfinite(node) else node


def _png(data: dict[str, Any]) -> bytes:
    try:
        return _heatmap.png(data)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "matplotlib":
            raise
        raise ReportError(
            "a .png needs matplotlib: pip install 'accelerate-hooks[report]' (.html and .json do "
            "not need it)"
        ) from None


_FORMATS = {".json": _json, ".html": _html.page, ".png": _png}
