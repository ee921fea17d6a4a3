"""Stories of encrypted images: their passphrases, their sectors, their header."""

from __future__ import annotations

from contextlib import suppress

import jqcow
from jqcow.engine.guestdata import unlock
from jqcow.engine.keyslots import KeySlots
from jqcow.errors import JqcowError, WrongPassphrase
from jqcow.offline.passphrases import slots_opened_in
from jqcow.ondisk.entries import COPIED
from jqcow.ondisk.keys import Secret
from jqcow.testing import SimulatedDevice, enumerate_states
from tests.crash.judge import PromiseBroken, require
from tests.support.encrypted import PASSPHRASE, encryption, without_chance
from tests.support.expectation import SECTOR_BYTES
from tests.support.patients import Tables
from tests.support.users import JOURNAL_BYTES, create_simulated, open_simulated, salts_of

CLUSTER_BYTES = 4096
ANOTHER = b"battery staple"
DATA = b"\x33" * CLUSTER_BYTES
STATES = 48


def _encrypted_image() -> SimulatedDevice:
    device = SimulatedDevice()
    with without_chance(), create_simulated(device, 1 << 20, CLUSTER_BYTES, encryption=encryption()) as image:
        image.pwrite(DATA, 0)
    device.reopen()
    return device


def part_of_a_sector() -> None:
    """What lies beside the bytes that a guest writes stays as it was."""
    device = _encrypted_image()
    with open_simulated(device) as image:
        image.pwrite(b"new", 700)
        expected = DATA[:700] + b"new" + DATA[703:]
        require(image.pread(CLUSTER_BYTES, 0) == expected, "P1: a write of three bytes changed others")


def entry_into_luks_header() -> None:
    """P6: a guest write must not land on the LUKS header that an entry leads to."""
    device = _encrypted_image()
    with open_simulated(device) as image:
        place = KeySlots(image._engine.lifecycle).pointer.offset
    tables = Tables(device.content())
    tables.set_entry(tables.l2, place | COPIED)
    image = open_simulated(SimulatedDevice(bytes(tables.image)))
    try:
        image.pwrite(b"x" * SECTOR_BYTES, 0)
    except JqcowError:
        return
    require(False, "P6: a guest write destroyed the LUKS header")


class _Judge:
    """Cuts the power at every barrier: each active slot opens, and those that were promised do."""

    def __init__(self) -> None:
        self.promised = {PASSPHRASE}
        self.wiped: tuple[int, bytes] | None = None

    def cut(self, name: str, device: SimulatedDevice) -> None:
        for state in enumerate_states(device, budget=STATES):
            self.judge(device.crash(state))

    def judge(self, crashed: SimulatedDevice) -> None:
        if self.wiped is not None:
            place, material = self.wiped
            found = crashed.pread(len(material), place)
            require(found != material, "P1: the key material of a removed passphrase is there")
        with _opened(crashed) as image:
            require(image.pread(CLUSTER_BYTES, 0) == DATA, "P1: the data of an encrypted image")
            slots = KeySlots(image._engine.lifecycle)
            opened = {word: _slots_of(image, word) for word in (PASSPHRASE, ANOTHER)}
            active = set(slots.header.active_slots())
            require(active == set().union(*opened.values()), "P3: an active key slot that nothing opens")
            require(all(opened[word] for word in self.promised), "P1: a passphrase is lost")
            require(image.check().ok, "P2: after recovery")


def _opened(crashed: SimulatedDevice) -> jqcow.Image:
    """Open a crashed image by whichever passphrase it has."""
    for word in (PASSPHRASE, ANOTHER):
        crashed.reopen()
        with suppress(WrongPassphrase):
            return jqcow.open_device(
                crashed, "r+", journal_size=JOURNAL_BYTES, new_salt=salts_of(crashed), passphrase=word
            )
    raise PromiseBroken("P1: no passphrase opens the image")


def _slots_of(image: jqcow.Image, passphrase: bytes) -> tuple[int, ...]:
    try:
        return slots_opened_in(image, passphrase)
    except WrongPassphrase:
        return ()


def key_slots(drop_barriers: tuple[str, ...]) -> None:
    """A passphrase is added, another removed, the last replaced: a crash leaves what was promised."""
    device, judge = _encrypted_image(), _Judge()
    device.drop_barriers = set(drop_barriers)
    with without_chance():
        image = open_simulated(device)
        slots = KeySlots(image._engine.lifecycle)
        found = unlock(image._medium, image._engine.public.view, PASSPHRASE)
        require(found is not None, "P1: the passphrase opens its slot")
        key = found[1] if found else Secret(b"")
        device.barrier_listeners.append(judge.cut)
        slots.add(key, Secret(ANOTHER), 1)
        judge.promised = {ANOTHER}
        first = slots.header.slots[0]
        place = slots.pointer.offset + first.material_offset
        material = device.pread(slots.header.material_bytes(first), place)
        slots.remove(0)
        judge.wiped = place, material
        judge.cut("removed", device)
        judge.promised, judge.wiped = set(), None
        slots.replace(1, key, Secret(PASSPHRASE), 1)
        judge.promised = {PASSPHRASE}
        judge.cut("replaced", device)
        image.close()
    device.reopen()
    judge.judge(device)
