"""Passphrases of an encrypted image: the key slots of its LUKS header, one changed at a time.

A slot's state is in the header's first bytes, which change as metadata does: by a record. Its key material is
written in place, and nobody reads that of a slot which is not active. The caller is alone.

E3. The key material of a slot is durable before the record that makes it active.
E4. The key material of a passphrase stays as it is until the record that takes the passphrase away is
    durable, and one active slot always remains.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from contextlib import suppress

from jqcow.engine.commit import Commits
from jqcow.engine.guestdata import read_luks
from jqcow.engine.lifecycle import Lifecycle
from jqcow.errors import FormatError, UnsupportedFeatureError
from jqcow.ondisk import keys, layout, luks
from jqcow.ondisk.keys import Secret
from jqcow.ondisk.layout import HostOffset
from jqcow.ondisk.luks import KeySlot, LuksHeader, Pointer


class KeySlots:
    """The key slots of one image that is open for writing.

    Errors of all: OSError where the host failed; the passphrases are then as before, or as asked for.
    """

    def __init__(self, lifecycle: Lifecycle) -> None:
        """Read the slots.

        Raises:
            ValueError: the image is not encrypted.
        """
        self._lifecycle = lifecycle
        self._medium = lifecycle.medium
        self._commits: Commits = lifecycle.commits
        self._view = lifecycle.public.view
        self.pointer, self.header = self._read()

    def _read(self) -> tuple[Pointer, LuksHeader]:
        found = read_luks(self._view)
        if found is None:
            raise ValueError("the image is not encrypted")
        return found

    def add(self, key: Secret, secret: Secret, iter_time: int, wanted: int | None = None) -> int:
        """Give the master key another passphrase, durably; return its slot: that ``wanted``, or a free one.

        Raises:
            ValueError: the slot that is wanted has a passphrase, or is none.
            UnsupportedFeatureError: all slots have one.
        """
        number = self._free_slot(range(len(self.header.slots)) if wanted is None else [wanted])
        iterations = keys.iterations_for(self.header.hash, iter_time, self.header.key_bytes)
        slot, material = keys.lock(self.header, number, key, secret, iterations)
        changed = self.header.with_slot(number, slot)
        changed.validate(self.pointer.length)
        self._lifecycle.go_live(self._medium.require_healthy)
        self._medium.pwrite(material, HostOffset(self.pointer.offset + slot.material_offset))
        # Durable now: the key material. The record that makes the slot active may land from here on (E3).
        self._medium.barrier("slots.material")
        self._record(changed)
        return number

    def remove(self, number: int, *, last_too: bool = False) -> None:
        """Take the passphrase of a slot away, durably; of a slot without one what a crash left.

        Raises:
            ValueError: it is the last one, and that one is not to go ``last_too``; or there is no such slot.
            UnsupportedFeatureError: its key material cannot be overwritten where it lies.
        """
        self._require_slot(number)
        slot = self.header.slots[number]
        if not last_too and self.header.active_slots() == (number,):
            raise ValueError("the last passphrase cannot be removed: nobody could read the disk")
        try:
            self._require_apart(number, *self.header.place_of(number, self.pointer.length))
        except FormatError as error:
            if slot.is_active:
                raise UnsupportedFeatureError("removing this passphrase", str(error)) from error
            # Nobody had key material there.
            return
        self._lifecycle.go_live(self._medium.require_healthy)
        if slot.is_active:
            self._record(self.header.with_slot(number, keys.emptied(slot)))
        self._wipe(slot)

    def replace(self, number: int, key: Secret, secret: Secret, iter_time: int) -> None:
        """Give a slot another passphrase, durably; a crash may leave that in a second slot.

        Where a slot is free that passphrase is there first: at no time does none open the disk.

        Raises:
            ValueError, UnsupportedFeatureError: as `add` and `remove`.
        """
        self._require_slot(number)
        is_full = len(self.header.active_slots()) == len(self.header.slots)
        waiting = None if is_full else self.add(key, secret, iter_time)
        self.remove(number)
        self.add(key, secret, iter_time, number)
        if waiting is not None:
            self.remove(waiting)

    def _wipe(self, slot: KeySlot) -> None:
        material = secrets.token_bytes(self.header.material_bytes(slot))
        self._medium.pwrite(material, HostOffset(self.pointer.offset + slot.material_offset))
        # Durable now: other bytes than the key material. Whoever removed a passphrase relies on it.
        self._medium.barrier("slots.wiped")

    def _record(self, header: LuksHeader) -> None:
        """Make another header durable, by a record (E4)."""
        data, start = header.pack(), self.pointer.offset
        step = self._lifecycle.geometry.block_bytes
        with self._medium.lock, self._lifecycle.public.operation():
            for position in range(0, len(data), step):
                part = data[position : position + step]
                self._view.edit(HostOffset(start + position))[: len(part)] = part
        self._commits.flush(self._medium.require_healthy)
        self.header = header

    def _free_slot(self, wanted: Sequence[int]) -> int:
        for number in wanted:
            self._require_slot(number)
            if not self.header.slots[number].is_active:
                with suppress(FormatError):
                    self._require_apart(number, *self.header.place_of(number, self.pointer.length))
                    return number
        if len(wanted) == 1:
            raise ValueError(f"key slot {wanted[0]} is in use")
        raise UnsupportedFeatureError(
            f"more than {len(self.header.active_slots())} passphrases", "every key slot is in use"
        )

    def _require_slot(self, number: int) -> None:
        if number not in range(len(self.header.slots)):
            raise ValueError(f"there is no key slot {number}")

    def _require_apart(self, number: int, start: int, end: int) -> None:
        """Raise FormatError unless key material is apart from active slots and from journalled blocks."""
        if start < layout.round_up(luks.HEADER_BYTES, self._lifecycle.geometry.block_bytes):
            raise FormatError("key material in a block of the LUKS header")
        for other in self.header.active_slots():
            first, last = self.header.place_of(other, self.pointer.length)
            if other != number and first < end and start < last:
                raise FormatError("key slots overlap")
