"""The passphrases of an encrypted image, as qemu-img amends them: ``amend -o encrypt.state=...``."""

from __future__ import annotations

import argparse
from collections.abc import Mapping

from jqcow.cli import secrets
from jqcow.cli.common import CommandError
from jqcow.cli.qemu.wording import opening, reworded
from jqcow.errors import PassphraseError, WrongPassphrase
from jqcow.offline.info import read_info
from jqcow.offline.passphrases import (
    ITER_TIME_MILLISECONDS,
    add_passphrase,
    remove_passphrase,
    replace_passphrase,
    slots_opened,
)
from jqcow.ondisk.keys import Passphrase

_ERASES_ALL = "will erase all the data in the image irreversibly - refusing operation"


def amend_slots(arguments: argparse.Namespace, found: Mapping[str, str]) -> None:
    """Add a passphrase to the image, or take some away, as options say; checked in QEMU's order."""
    options = {
        name.removeprefix("encrypt."): value for name, value in found.items() if name.startswith("encrypt.")
    }
    facts = read_info(arguments.image, "qcow2").qcow2
    if facts is None or facts.luks is None:
        raise CommandError("Can't amend encryption options - encryption not present")
    if "state" not in options:
        raise CommandError("Parameter 'state' is missing")
    slots = _Slots(arguments, options, [slot.iters is not None for slot in facts.luks.slots])
    match options["state"]:
        case "active":
            slots.activate()
        case "inactive":
            slots.deactivate()
        case state:
            raise CommandError(f"Parameter 'state' does not accept value '{state}'")


class _Slots:
    """The key slots of one image, and what ``options`` ask for; ``active`` says which of them are."""

    def __init__(self, arguments: argparse.Namespace, options: dict[str, str], active: list[bool]) -> None:
        self._arguments = arguments
        self._options = options
        self._active = active
        self._force = bool(arguments.force)
        self._passphrase: Passphrase = secrets.passphrase_of(arguments)
        with opening(arguments.given):
            slots_opened(arguments.image, self._passphrase, limit=1)

    def _wanted(self) -> int | None:
        if "keyslot" not in self._options:
            return None
        number, last = int(self._options["keyslot"]), len(self._active) - 1
        if not 0 <= number <= last:
            raise CommandError(f"Invalid keyslot {number} specified, must be between 0 and {last}")
        return number

    def activate(self) -> None:
        options = self._options
        if "new-secret" not in options:
            raise CommandError("'new-secret' is required to activate a keyslot")
        if "old-secret" in options:
            raise CommandError("'old-secret' must not be given when activating keyslots")
        number = self._wanted()
        replaces = number is not None and self._active[number]
        if replaces and not self._force:
            raise CommandError(f"Refusing to overwrite active keyslot {number} - please erase it first")
        if all(self._active) and not replaces:
            raise CommandError("Can't add a keyslot - all keyslots are in use")
        new = secrets.secret_named(self._arguments, options["new-secret"])
        iter_time = int(options.get("iter-time", ITER_TIME_MILLISECONDS))
        path = self._arguments.image
        with reworded(""):
            if number is not None and replaces:
                replace_passphrase(path, self._passphrase, new, number, iter_time=iter_time)
            else:
                add_passphrase(path, self._passphrase, new, iter_time=iter_time, slot=number)

    def deactivate(self) -> None:
        options, path = self._options, self._arguments.image
        for name in ("new-secret", "iter-time"):
            if name in options:
                raise CommandError(f"'{name}' must not be given when erasing keyslots")
        old = None
        if "old-secret" in options:
            old = secrets.secret_named(self._arguments, options["old-secret"])
        number = self._wanted()
        with reworded(""):
            if number is not None:
                self._erase(number, () if old is None else self._opened_by(old), is_told=old is not None)
            elif old is not None:
                for _ in self._matching(old):
                    remove_passphrase(path, old, last_too=self._force)
            else:
                raise CommandError(
                    "To erase keyslot(s), either explicit keyslot index or the password currently contained "
                    "in them must be given"
                )

    def _opened_by(self, passphrase: Passphrase) -> tuple[int, ...]:
        try:
            return slots_opened(self._arguments.image, passphrase)
        except WrongPassphrase:
            return ()

    def _matching(self, old: Passphrase) -> tuple[int, ...]:
        matching = self._opened_by(old)
        if not matching:
            raise CommandError("No keyslots match given (old) password for erase operation")
        if len(matching) == sum(self._active) and not self._force:
            told = "All the active keyslots match the (old) password that was given and erasing them"
            raise CommandError(f"{told} {_ERASES_ALL}")
        return matching

    def _erase(self, number: int, matching: tuple[int, ...], *, is_told: bool) -> None:
        if is_told and number not in matching:
            told = f"Given keyslot {number} doesn't contain the given old password for erase operation"
            raise CommandError(told)
        if self._force:
            remove_passphrase(self._arguments.image, self._passphrase, slot=number, last_too=True)
            return
        if not self._active[number]:
            raise CommandError(f"Given keyslot {number} is already erased (inactive) ")
        if sum(self._active) == 1:
            raise CommandError(f"Attempt to erase the only active keyslot {number} which {_ERASES_ALL}")
        try:
            remove_passphrase(self._arguments.image, self._passphrase, slot=number)
        except WrongPassphrase:
            raise
        except PassphraseError:
            # It is that of the slot itself, and there are others.
            remove_passphrase(self._arguments.image, self._passphrase)
