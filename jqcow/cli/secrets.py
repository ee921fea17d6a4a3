"""Passphrases for commands: from a file, a file descriptor or a terminal, never from an argument."""

from __future__ import annotations

import argparse
import base64
import binascii
import functools
import getpass
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from jqcow.cli.common import CommandError, split_options
from jqcow.errors import PassphraseError

if TYPE_CHECKING:
    from jqcow.ondisk.encryption import Encryption
    from jqcow.ondisk.keys import Passphrase, Secret

ENCRYPTION_OPTIONS = (
    "encrypt.format",
    "encrypt.key-secret",
    "encrypt.cipher-alg",
    "encrypt.cipher-mode",
    "encrypt.ivgen-alg",
    "encrypt.ivgen-hash-alg",
    "encrypt.hash-alg",
    "encrypt.iter-time",
)
"""Options of ``-o`` that say how a new image is to be encrypted, as in qemu-img."""
ENCRYPTION_HELP = "encrypt.format=luks, encrypt.key-secret=ID"

_HINT = "give it by --passphrase-file or --passphrase-fd"
_NO_LUKS = "encrypt.format must be luks: jqcow encrypts in no other way"
_OF_OPTIONS = {
    "encrypt.cipher-alg": "cipher",
    "encrypt.cipher-mode": "mode",
    "encrypt.ivgen-alg": "ivgen",
    "encrypt.ivgen-hash-alg": "ivgen_hash",
    "encrypt.hash-alg": "hash",
}


def add_passphrase(parser: argparse.ArgumentParser, prefix: str = "", what: str = "encrypted images") -> None:
    """Add ``--passphrase-file`` and ``--passphrase-fd``, of images that are read."""
    group = parser.add_mutually_exclusive_group()
    group.add_argument(
        f"--{prefix}passphrase-file",
        metavar="FILE",
        help=f"a file with the passphrase of {what}, byte for byte (default: ask at the terminal)",
    )
    group.add_argument(
        f"--{prefix}passphrase-fd", metavar="N", type=int, help="the same from a file descriptor"
    )


def passphrase_of(arguments: argparse.Namespace, prefix: str = "") -> Passphrase:
    """Return the passphrase that was given, or what asks for it, once, when an image needs it."""
    found = _given(arguments, prefix)
    named = None if prefix else getattr(arguments, "secret", None)
    if found is None and named is not None:
        found = secret_named(arguments, named)
    below = () if prefix else getattr(arguments, "below", ())
    if below:
        return _of_each(arguments, found, below)
    if found is None and arguments.profile.is_qemu:
        return _refuse
    return functools.cache(_ask) if found is None else found


def _of_each(
    arguments: argparse.Namespace, top: Secret | None, below: Sequence[tuple[str, str | None]]
) -> Passphrase:
    """Return what gives each file of a chain the secret that was named for it."""
    found = {
        os.path.realpath(path): secret_named(arguments, name) for path, name in below if name is not None
    }

    def secret_of(image: str) -> Secret:
        known = found.get(os.path.realpath(image), top)
        return _refuse(image) if known is None else known

    return secret_of


def _refuse(image: str) -> Secret:
    raise PassphraseError("Parameter 'encrypt.key-secret' is required for cipher", image)


def secret_named(arguments: argparse.Namespace, name: str) -> Secret:
    """Return the secret of this id.

    Raises:
        CommandError: no ``--object`` has it.
    """
    found = named_secrets(arguments)
    if name not in found:
        is_qemu = arguments.profile.is_qemu
        raise CommandError(f"No secret with id '{name}'" if is_qemu else f"no --object has the id '{name}'")
    return found[name]


def new_passphrase_of(arguments: argparse.Namespace, prefix: str, image: str) -> Secret:
    """Return the new passphrase that was given, or ask for it twice."""
    found = _given(arguments, prefix)
    return found or _ask_new(image)


def _given(arguments: argparse.Namespace, prefix: str) -> Secret | None:
    name = prefix.replace("-", "_")
    path, descriptor = (getattr(arguments, f"{name}passphrase_{kind}") for kind in ("file", "fd"))
    if path is not None:
        return _from_file(path)
    return None if descriptor is None else _secret(_read_all(lambda size: os.read(descriptor, size)))


def _from_file(path: str) -> Secret:
    with open(path, "rb") as file:
        return _secret(_read_all(file.read))


def _secret(passphrase: bytes) -> Secret:
    # Not at the head: most commands need no secret, and start sooner without what ciphers need.
    from jqcow.ondisk.keys import Secret

    return Secret(passphrase)


def _read_all(read: Callable[[int], bytes]) -> bytes:
    from jqcow.ondisk.keys import PASSPHRASE_BYTES_MAX

    found = b""
    while len(found) <= PASSPHRASE_BYTES_MAX and (part := read(PASSPHRASE_BYTES_MAX + 1 - len(found))):
        found += part
    return found


def _require_terminal(image: str) -> None:
    if not sys.stdin.isatty():
        raise PassphraseError(f"the image is encrypted, and its passphrase is needed: {_HINT}", image)


def _ask(image: str) -> Secret:
    _require_terminal(image)
    return _encoded(getpass.getpass(f"Passphrase of {image}: "))


def _encoded(text: str) -> Secret:
    """Return what was typed, also where it is none of the terminal's characters."""
    return _secret(text.encode(errors="surrogateescape"))


def _ask_new(image: str) -> Secret:
    _require_terminal(image)
    first, second = (getpass.getpass(f"{word} passphrase of {image}: ") for word in ("New", "Repeat the new"))
    if first != second:
        raise CommandError("the two passphrases differ")
    return _encoded(first)


def named_secrets(arguments: argparse.Namespace) -> dict[str, Secret]:
    """Return what ``--object`` names, by id. Objects of other kinds are for what jqcow does not do."""
    found: dict[str, Secret] = {}
    for text in arguments.objects:
        kind, *parts = split_options(text) or [""]
        fields = dict(part.partition("=")[::2] for part in parts)
        if kind != "secret":
            continue
        if "data" in fields and not arguments.profile.is_qemu:
            # Not the text: it has a secret in it.
            raise CommandError("a secret among arguments is seen by everybody: use file=, not data=")
        if "id" not in fields or not set(fields) <= {"id", "file", "data", "format"}:
            raise CommandError("--object is secret,id=ID,file=FILE and, perhaps, format=raw or base64")
        if "data" in fields:
            read = _secret(fields["data"].encode(errors="surrogateescape"))
        elif "file" in fields:
            read = _from_file(fields["file"])
        else:
            raise CommandError("--object is secret,id=ID,file=FILE and, perhaps, format=raw or base64")
        found[fields["id"]] = _decoded(read, fields.get("format", "raw"))
    return found


def _decoded(secret: Secret, form: str) -> Secret:
    if form == "raw":
        return secret
    if form != "base64":
        raise CommandError(f"format of a secret is raw or base64, not '{form}'")
    try:
        # All else than base64 would be another passphrase, without a word. Lines are as in QEMU.
        return _secret(base64.b64decode(secret.reveal().replace(b"\n", b""), validate=True))
    except binascii.Error:
        raise CommandError("the secret is not base64") from None


def encryption_of(
    arguments: argparse.Namespace, options: Mapping[str, str], image: str, source: Passphrase | None = None
) -> Encryption | None:
    """Return how ``-o`` options say that a new image is to be encrypted; None if they do not.

    Without ``encrypt.key-secret`` the passphrase is that of ``--passphrase-file``, ``--passphrase-fd`` or
    ``source``, else it is asked for.
    """
    named = {name: value for name, value in options.items() if name in ENCRYPTION_OPTIONS}
    if not named:
        # What is wrong with a secret is told all the same.
        named_secrets(arguments)
        return None
    if named.get("encrypt.format") != "luks":
        raise CommandError(_NO_LUKS)
    from jqcow.ondisk.encryption import Encryption
    from jqcow.ondisk.keys import Secret

    if "encrypt.key-secret" in named:
        secret = secret_named(arguments, named["encrypt.key-secret"])
    elif isinstance(source, Secret):
        secret = source
    else:
        secret = new_passphrase_of(arguments, "", image)
    return Encryption(secret, **_chosen(named), **_iter_time(named))  # type: ignore[arg-type]


def encryption_to_measure(options: Mapping[str, str]) -> Encryption | None:
    """Return how ``-o`` options say that an image would be encrypted; no passphrase is asked for."""
    named = {name: value for name, value in options.items() if name in ENCRYPTION_OPTIONS}
    if not named:
        return None
    if named.get("encrypt.format") != "luks":
        raise CommandError(_NO_LUKS)
    from jqcow.ondisk.encryption import Encryption

    return Encryption(b"any", **_chosen(named))  # type: ignore[arg-type]


def _chosen(named: Mapping[str, str]) -> dict[str, str]:
    return {field: named[name] for name, field in _OF_OPTIONS.items() if name in named}


def _iter_time(named: Mapping[str, str]) -> dict[str, int]:
    text = named.get("encrypt.iter-time")
    if text is None:
        return {}
    return {"iter_time": milliseconds(text)}


def milliseconds(text: str) -> int:
    """Return a time that was given in milliseconds."""
    if not text.isdecimal():
        raise CommandError(f"a time is a number of milliseconds, not '{text}'")
    return int(text)
