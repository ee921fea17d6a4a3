"""Names of the form ``json:{...}``: QEMU's options for opening a disk, of which one kind is a plain file.

``{"driver": "qcow2", "file": {"driver": "file", "filename": "base.qcow2"}}`` names what a path could name,
and so does its dotted spelling, ``{"driver": "qcow2", "file.filename": "base.qcow2"}``. QEMU and libvirt
write both. All else is refused: what would show other bytes than the file has (``offset`` and ``size`` of
driver raw, another ``backing``), and what names no file.

The text comes from whoever made the image: its length and its depth are bounded before it is parsed, and
numbers are not worked out.
What two programs could read differently (a key twice) is refused.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import NoReturn

MAX_JSON_CHARS = 4096
MAX_JSON_DEPTH = 8

_STRING = re.compile(r'"(?:[^"\\]|\\.)*+"')
_DRIVERS = ("qcow2", "raw")
_HARMLESS = {
    f"{layer}{option}"
    for layer in ("", "file.")
    for option in (
        "auto-read-only",
        "cache.direct",
        "cache.no-flush",
        "detect-zeroes",
        "discard",
        "node-name",
        "read-only",
    )
} | {
    "cache-clean-interval",
    "cache-size",
    "encrypt.format",
    "encrypt.key-secret",
    "file.aio",
    "file.locking",
    "l2-cache-entry-size",
    "l2-cache-size",
    "refcount-cache-size",
}
"""Options that say how a file is opened, not what it shows. jqcow opens it in its own way.

Those of encryption say which of QEMU's secrets has the passphrase; jqcow gets it from its caller.
"""


class RefusedName(Exception):
    """A name that is no plain file, with the reason."""


def parse_json_name(text: str) -> tuple[str, str | None]:
    """Return the file name in what follows ``json:``, and the driver that reads it; None: any.

    Raises:
        RefusedName: it names something else, or nothing.
    """
    options = _parse(text)
    driver = options.pop("driver", None)
    if driver is not None and driver not in _DRIVERS:
        raise RefusedName(f"the driver {driver!r} is none of {' and '.join(_DRIVERS)}")
    protocol = options.pop("file.driver", "file")
    if protocol != "file":
        raise RefusedName(f"the driver {protocol!r} reads no plain file")
    filename = options.pop("file.filename", None)
    other = sorted(options.keys() - _HARMLESS)
    if other:
        raise RefusedName(f"the option {other[0]!r} may change what the file shows")
    if not isinstance(filename, str) or not filename:
        raise RefusedName("it has no file.filename")
    if "\0" in filename or any("\ud800" <= char <= "\udfff" for char in filename):
        raise RefusedName("its file.filename is no name that a file can have")
    # Only what is in the tuple compares equal, and that is text.
    return filename, None if driver is None else str(driver)


def _parse(text: str) -> dict[str, object]:
    """Return the options, those of layers below with dotted names."""
    if len(text) > MAX_JSON_CHARS:
        raise RefusedName(f"it has more than {MAX_JSON_CHARS} characters")
    depth = deepest = 0
    for char in _STRING.sub("", text):
        depth += (char in "{[") - (char in "}]")
        deepest = max(deepest, depth)
    if deepest > MAX_JSON_DEPTH:
        raise RefusedName(f"it is nested more than {MAX_JSON_DEPTH} times")
    try:
        parsed = json.loads(
            text,
            object_pairs_hook=_unique,
            parse_int=_number,
            parse_float=_number,
            parse_constant=_refuse_constant,
        )
    except ValueError as error:
        raise RefusedName(f"it is not JSON ({error})") from error
    if not isinstance(parsed, dict):
        raise RefusedName("it is no JSON object")
    return _unique(list(_dotted("", parsed)))


def _dotted(prefix: str, options: dict[str, object]) -> Iterator[tuple[str, object]]:
    for name, value in options.items():
        if isinstance(value, dict) and value:
            yield from _dotted(f"{prefix}{name}.", value)
        else:
            yield f"{prefix}{name}", value


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found: dict[str, object] = {}
    for name, value in pairs:
        if name in found:
            raise RefusedName(f"the option {name!r} comes twice")
        found[name] = value
    return found


def _number(_: str) -> int:
    """Return a number: no option here needs to know which, and one of many digits takes long."""
    return 0


def _refuse_constant(name: str) -> NoReturn:
    raise RefusedName(f"{name} is not JSON")
