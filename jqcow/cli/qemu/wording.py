"""Errors in QEMU's words."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator
from contextlib import contextmanager

from jqcow.cli.common import CommandError, describe, exit_code
from jqcow.errors import (
    CorruptionError,
    ImageInUse,
    JqcowError,
    PassphraseError,
    UnsupportedFeatureError,
    WrongPassphrase,
)

_NAMES_IT = " names it as its "
_LOOP = re.compile(r"the chain comes back to (.*)$")
_BIT = re.compile(r"(compatible |autoclear )?(?<!in)bit (\d+)(?: \(([^)]*)\))?")
_WIDE = "Reference count entry width too large; may not exceed 64 bits"
_NO_TABLE = "Image does not contain a reference count table"
_TEXTS = (
    (re.compile(r"an L1 table of \d+ entries is too small"), "L1 table is too small"),
    (re.compile(r"unknown qcow2 version (\d+)"), r"Unsupported qcow2 version \1"),
    (re.compile(r"cluster_bits (\d+) is not in"), r"Unsupported cluster size: 2^\1"),
    (re.compile(r"header_length \d+ is not valid"), "qcow2 header too short"),
    (re.compile(r"header_length \d+ exceeds"), "qcow2 header exceeds cluster size"),
    (
        re.compile(r"refcount_order \d+ is above"),
        _WIDE,
    ),
    (re.compile(r"a disk of \d+ bytes is too large"), "Image is too big"),
    (
        re.compile(r"refcount_table_clusters \d+ is out of bounds"),
        _NO_TABLE,
    ),
    (re.compile(r"an L1 table of \d+ entries is too large"), "Active L1 table too large"),
    (re.compile(r"L1 table at host offset \S+ not a cluster-aligned"), "Active L1 table offset invalid"),
    (
        re.compile(r"refcount table at host offset \S+ not a cl"),
        "Reference count table offset invalid",
    ),
    (re.compile(r"snapshot table at host offset \S+ not a cluster-aligned"), "Snapshot table offset invalid"),
    (re.compile(r"\d+ snapshots are more than"), "Snapshot table too large"),
    (re.compile(r"the backing file name is too long"), "Backing file name too long"),
)
"""What the library says, and QEMU's words for it."""


@contextmanager
def opening(name: str, *, to_write: bool = False) -> Iterator[None]:
    """Have errors of opening an image speak as QEMU does.

    ``to_write``: QEMU opens it for writing at once, and another writer refuses that.
    """
    with reworded(f"Could not open '{name}': "):
        try:
            yield
        except ImageInUse as error:
            error.refused |= to_write
            raise


@contextmanager
def reworded(prefix: str, opened: argparse.Namespace | None = None) -> Iterator[None]:
    """Have errors of the library speak as QEMU does, after ``prefix``.

    ``opened``: the arguments of a command whose image is opened inside, and may be in use.
    """
    try:
        yield
    except CorruptionError as error:
        loop = _LOOP.search(str(error))
        told = f"Backing file '{loop[1]}' creates an infinite loop." if loop else f"{prefix}{reason(error)}"
        raise CommandError(told) from error
    except (JqcowError, OSError, ValueError) as error:
        if opened is not None and isinstance(error, ImageInUse) and str(error).find(opened.image) >= 0:
            prefix = f"Could not open '{opened.given}': "
        raise CommandError(f"{prefix}{reason(error)}", _code(error)) from error


def _code(error: Exception) -> int:
    return exit_code(error) if exit_code(error) == 63 else 1


def reason(error: Exception) -> str:
    """Return what QEMU says of an error of the library, and of how a file below was come to."""
    text = own_reason(error)
    below = [note for note in getattr(error, "__notes__", []) if _NAMES_IT in note]
    for _ in below:
        text = f"Could not open backing file: {text}"
    return text


def own_reason(error: Exception) -> str:
    """Return what QEMU says of an error of the library, however it was come to."""
    if isinstance(error, ImageInUse):
        return _of_lock(error)
    if isinstance(error, WrongPassphrase):
        return "Invalid password, cannot unlock any keyslot"
    if isinstance(error, PassphraseError):
        return (error.strerror or "").removeprefix(f"{error.image}: ")
    if isinstance(error, JqcowError):
        return _of_library(error)
    if isinstance(error, OSError) and error.strerror:
        if error.filename:
            return f"Could not open '{error.filename}': {error.strerror}"
        return error.strerror
    return describe(error)


def _of_lock(error: ImageInUse) -> str:
    told = error.strerror or str(error)
    name = told.partition(" is in use:")[0]
    kind = 'shared "write"' if not error.refused and "for writing" in told else '"write"'
    return f"Failed to get {kind} lock\nIs another process using the image [{name}]?"


def _of_library(error: JqcowError) -> str:
    told = str(error)
    if "the magic is missing" in told:
        return "Image is not in qcow2 format"
    if isinstance(error, UnsupportedFeatureError) and error.feature.startswith("incompatible feature bit"):
        return unsupported(error.feature)
    for pattern, words in _TEXTS:
        found = pattern.search(told)
        if found:
            return found.expand(words)
    return told


def unsupported(listed: str) -> str:
    """Return what QEMU says of incompatible features that are listed in jqcow's words."""
    names, rest = [], 0
    for kind, bit, name in _BIT.findall(listed):
        if kind:
            continue
        if name:
            names.append(name)
        else:
            rest |= 1 << int(bit)
    if rest:
        names.append(f"Unknown incompatible feature: {rest:x}")
    return f"Unsupported qcow2 feature(s): {', '.join(names)}"
