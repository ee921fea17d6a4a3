"""Passphrases of an encrypted image: which key slots it has, another passphrase, one less."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

from jqcow.device.file import path_of
from jqcow.engine.guestdata import read_luks, unlock
from jqcow.engine.keyslots import KeySlots
from jqcow.errors import PassphraseError, WrongPassphrase
from jqcow.image.image import Image
from jqcow.image.opening import open_alone
from jqcow.ondisk.keys import Passphrase, Secret, emptied, hidden, new_secret, secret_for
from jqcow.ondisk.keys import unlock as unlock_slot
from jqcow.ondisk.layout import HostOffset
from jqcow.ondisk.luks import SLOT_COUNT

ITER_TIME_MILLISECONDS = 2000


def add_passphrase(
    path: str | os.PathLike[str],
    passphrase: Passphrase,
    new: Secret | bytes,
    *,
    iter_time: int = ITER_TIME_MILLISECONDS,
    slot: int | None = None,
    journal_size: int | None = None,
) -> int:
    """Give an encrypted image another passphrase, durably; return its key slot.

    A crash leaves the slot with the new passphrase or without one. All other slots stay as they are.

    Args:
        path: the image.
        passphrase: one that it has, as in `jqcow.open`.
        new: the new one.
        iter_time: in milliseconds, what a try of the new one is to cost on this machine.
        slot: number of the key slot that gets it, 0 to 7; None: the first free one.
        journal_size: in bytes, as in `jqcow.open`.

    Raises:
        ValueError: the image is not encrypted, the new one is not UTF-8 without NUL bytes, as QEMU wants, or
            the slot has a passphrase.
        WrongPassphrase: it opens no key slot.
        UnsupportedFeatureError: all eight key slots have a passphrase.
        JqcowError, OSError: as `jqcow.open`.
    """
    passphrase, new = hidden(passphrase), new_secret(new)
    with _key_slots(path, journal_size) as (slots, image):
        return slots.add(_opened(image, passphrase)[1], new, iter_time, slot)


def remove_passphrase(
    path: str | os.PathLike[str],
    passphrase: Passphrase,
    *,
    slot: int | None = None,
    last_too: bool = False,
    journal_size: int | None = None,
) -> int:
    """Take a passphrase away from an encrypted image, durably; return its key slot.

    Its key material is overwritten where it lies. Copies of the image keep it, and so may the host.

    Args:
        path: the image.
        passphrase: the one to be removed; with ``slot`` one that stays.
        slot: number of the key slot to be emptied, 0 to 7. What a crash left in an empty one is overwritten.
        last_too: the last one too, or the one given: nobody may be able to read the disk after that.
        journal_size: in bytes, as in `jqcow.open`.

    Raises:
        ValueError: the image is not encrypted, there is no such slot, or it is the last passphrase.
        PassphraseError: the passphrase that is to stay is that of the slot.
        WrongPassphrase: it opens no key slot.
        JqcowError, OSError: as `jqcow.open`.
    """
    passphrase = hidden(passphrase)
    with _key_slots(path, journal_size) as (slots, image):
        found, _ = _opened(image, passphrase)
        if slot is None:
            slot = found
        elif slot == found and not last_too:
            raise PassphraseError(f"it is the passphrase of key slot {slot} itself: give one that stays")
        slots.remove(slot, last_too=last_too)
        return slot


def replace_passphrase(
    path: str | os.PathLike[str],
    passphrase: Passphrase,
    new: Secret | bytes,
    slot: int,
    *,
    iter_time: int = ITER_TIME_MILLISECONDS,
    journal_size: int | None = None,
) -> None:
    """Give a key slot that has a passphrase another one, durably.

    A crash leaves the old one, the new one, or both; the new one may then be in a second slot. Where all
    slots are in use it may leave this one without any, and the others as they were.

    Args, Raises: as `add_passphrase`; ``passphrase`` may be the one that is replaced.
    """
    passphrase, new = hidden(passphrase), new_secret(new)
    with _key_slots(path, journal_size) as (slots, image):
        slots.replace(slot, _opened(image, passphrase)[1], new, iter_time)


def slots_opened(
    path: str | os.PathLike[str], passphrase: Passphrase, *, limit: int = SLOT_COUNT
) -> tuple[int, ...]:
    """Return the key slots that a passphrase opens, up to ``limit`` of them.

    Raises:
        ValueError: the image is not encrypted.
        WrongPassphrase: it opens none.
        JqcowError, OSError: as `jqcow.open`.
    """
    passphrase = hidden(passphrase)
    with open_alone(path, "r") as image:
        return slots_opened_in(image, passphrase, limit=limit)


def slots_opened_in(image: Image, passphrase: Passphrase, *, limit: int = SLOT_COUNT) -> tuple[int, ...]:
    """Do what `slots_opened` does for an image that is open."""
    found = read_luks(image._engine.public.view)
    if found is None:
        raise ValueError("the image is not encrypted")
    pointer, header = found
    name = path_of(image._medium.device)
    secret, numbers = secret_for(passphrase, name), list[int]()

    def read(length: int, offset: int) -> bytes:
        return image._medium.pread(length, HostOffset(pointer.offset + offset))

    while len(numbers) < limit:
        try:
            number, _ = unlock_slot(header, read, secret, name)
        except WrongPassphrase:
            if not numbers:
                raise
            break
        numbers.append(number)
        header = header.with_slot(number, emptied(header.slots[number]))
    return tuple(numbers)


@contextmanager
def _key_slots(path: str | os.PathLike[str], journal_size: int | None) -> Iterator[tuple[KeySlots, Image]]:
    with open_alone(path, "r+", journal_size=journal_size) as image:
        engine = image._engine
        with engine.guard.turnstile, engine.guard.alone():
            with engine.medium.lock:
                engine.lifecycle.prepare_to_change()
                slots = KeySlots(engine.lifecycle)
            yield slots, image


def _opened(image: Image, passphrase: Passphrase) -> tuple[int, Secret]:
    """Return the key slot that a passphrase opens, and the master key."""
    medium, secret = image._medium, secret_for(passphrase, path_of(image._medium.device))
    opened = unlock(medium, image._engine.public.view, secret)
    if opened is None:
        raise ValueError("the image is not encrypted")
    return opened
