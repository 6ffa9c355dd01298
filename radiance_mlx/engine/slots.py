"""Who sits in which slot of the bank. Plain bookkeeping: the weights are written by a loader handed in."""

from collections.abc import Callable
from dataclasses import dataclass

from ..lora.bank import BASE_SLOT


@dataclass
class _Seat:
    key: str
    users: int = 0
    used_at: int = 0


class Slots:
    """Seats for adapters by key (a checkpoint's id); slot 0 is the base and is never given away.

    A seat with users is not taken from them. A seat without keeps its adapter until somebody needs the room;
    the longest unused goes first.
    """

    def __init__(self, count: int) -> None:
        self._seats: dict[int, _Seat | None] = dict.fromkeys(range(1, count))
        self._tick = 0

    def acquire(self, key: str, load: Callable[[int], None]) -> int | None:
        """The slot that holds `key`, loaded if need be, with one user more; None while all are in use."""
        self._tick += 1
        slot = self.find(key)
        if slot is None:
            slot = self._free()
            if slot is None:
                return None
            self._seats[slot] = None
            load(slot)  # may raise: then the seat stays empty
            self._seats[slot] = _Seat(key)
        seat = self._seats[slot]
        assert seat is not None
        seat.users += 1
        seat.used_at = self._tick
        return slot

    def release(self, slot: int) -> None:
        """One user fewer."""
        seat = self._seats.get(slot)
        if slot != BASE_SLOT and seat is not None:
            seat.users -= 1

    def find(self, key: str) -> int | None:
        """The slot that holds `key`."""
        return next((slot for slot, seat in self._seats.items() if seat and seat.key == key), None)

    def users(self, key: str) -> int:
        """How many use `key` now."""
        slot = self.find(key)
        seat = self._seats[slot] if slot is not None else None
        return seat.users if seat else 0

    def forget(self, key: str) -> None:
        """The adapter under `key` is not to be found any more; its present users keep the slot."""
        slot = self.find(key)
        if slot is not None:
            seat = self._seats[slot]
            assert seat is not None
            seat.key = f"{key} (gone {self._tick})"
            if seat.users == 0:
                self._seats[slot] = None

    def _free(self) -> int | None:
        for slot, seat in self._seats.items():
            if seat is None:
                return slot
        idle = [(seat.used_at, slot) for slot, seat in self._seats.items() if seat and seat.users == 0]
        return min(idle)[1] if idle else None
