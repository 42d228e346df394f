"""Where in time a forward stands, by what the host can see of its timestep."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from accelerate_hooks.opaque import opaque_functions


@dataclass
class Clock:
    """A timestep as the host sees it: the view it is of a schedule, or its value."""

    storage: Any  # the timestep tensor, kept so that its memory is not given to another schedule
    offset: int | None
    value: float | None

    @classmethod
    def read(cls, timestep: Any, device_value: float | None = None) -> Clock | None:
        if timestep is None:
            return None
        if not isinstance(timestep, torch.Tensor):
            return cls(None, None, float(timestep))
        view = timestep.untyped_storage()
        items = view.nbytes() // max(timestep.element_size(), 1)
        value = device_value
        if timestep.device.type == "cpu" and timestep.numel():
            value = float(timestep.detach().reshape(-1)[0])
        single = timestep.numel() == 1 or all(s == 0 for s in timestep.stride())
        if single and items > 1:
            return cls(timestep, int(timestep.storage_offset()), value)
        return cls(timestep, None, value)

    def same_schedule(self, other: Clock) -> bool:
        return (
            self.offset is not None
            and other.offset is not None
            and self.storage.untyped_storage().data_ptr()
            == other.storage.untyped_storage().data_ptr()
        )

    def other_schedule(self, other: Clock) -> bool:
        """Whether both are views of schedules, and not of the same."""
        known = self.offset is not None and other.offset is not None
        return known and not self.same_schedule(other)

    def place_in(self, timesteps: Any, by_value: bool = False) -> int | None:
        """Which of a scheduler's timesteps this is a view of (or has the value of, where only one
        has and the host knows it); None for none."""
        if not isinstance(timesteps, torch.Tensor) or timesteps.ndim != 1:
            return None
        whole = Clock(timesteps, int(timesteps.storage_offset()), None)
        if self.same_schedule(whole) and self.storage.dtype == timesteps.dtype:
            place, off = divmod(self.offset - whole.offset, timesteps.stride(0) or 1)  # type: ignore
            return place if not off and 0 <= place < len(timesteps) else None
        if not by_value or self.value is None or timesteps.device.type != "cpu":
            return None
        found = [i for i, time in enumerate(timesteps.tolist()) if time == self.value]
        return found[0] if len(found) == 1 else None

    def direction_to(self, later: Clock) -> int | None:
        """+1 or -1 when time moved on (offsets count as +1), 0 when not, None when unknown."""
        if self.same_schedule(later):
            return (later.offset > self.offset) - (later.offset < self.offset)  # type: ignore
        if self.other_schedule(later):
            return None  # whatever its values, another generation
        if self.value is None or later.value is None:
            return None
        return (later.value > self.value) - (later.value < self.value)


opaque_functions(globals())
