"""``map`` of what an NBD server exports, as in qemu-img: names of exports, and block status as extents."""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from urllib.parse import parse_qs, quote, unquote, urlsplit

from jqcow.cli import common
from jqcow.cli.common import CommandError
from jqcow.cli.qemu.options import plain_pairs
from jqcow.cli.qemu.wording import opening
from jqcow.device.file import FileDevice
from jqcow.errors import printable
from jqcow.nbd.client import Export, Status, read_status
from jqcow.nbd.device import ExportDevice
from jqcow.nbd.listening import DEFAULT_PORT
from jqcow.nbd.protocol import ALLOCATION, DEPTH, STATE_HOLE, STATE_ZERO

_SCHEMES = ("nbd", "nbd+tcp", "nbd+unix")
_OPTIONS = {
    "driver",
    "server.type",
    "server.path",
    "server.host",
    "server.port",
    "path",
    "host",
    "port",
    "export",
    "x-dirty-bitmap",
}
_DEPTHS_TOLD = 2
"""As in QEMU: what lies deeper is told as this depth."""
_ROW = "{:<16}{:<16}{:<16}{}"


@dataclass(frozen=True)
class NamedExport:
    """An export among arguments; ``context`` says what its status is to tell."""

    export: Export
    context: str = ALLOCATION


def export_named(text: str, *, image_opts: bool) -> NamedExport | None:
    """Return the export that an argument names, None where it names none.

    Raises:
        CommandError: an export whose name says more than where it is.
    """
    if image_opts:
        options = plain_pairs(text)
        return _of_options(text, options) if options.get("driver") == "nbd" else None
    parts = urlsplit(text)
    if parts.scheme not in _SCHEMES or not text.startswith(f"{parts.scheme}://"):
        return None
    name = unquote(parts.path.removeprefix("/"))
    if parts.scheme != "nbd+unix":
        return NamedExport(Export((parts.hostname or "localhost", parts.port or DEFAULT_PORT), name))
    paths = parse_qs(parts.query).get("socket")
    if not paths:
        raise CommandError(f"Could not open '{text}': Invalid NBD URI")
    return NamedExport(Export(paths[0], name))


def openable(text: str, *, image_opts: bool) -> str | None:
    """Return the URI of the export that an argument names, None where it names none.

    Whoever opens a file by that reads the export from then on.
    """
    found = export_named(text, image_opts=image_opts)
    if found is None:
        return None
    FileDevice.protocols.update(dict.fromkeys(_SCHEMES, _open))
    name = quote(found.export.name)
    if isinstance(found.export.address, str):
        return f"nbd+unix:///{name}?socket={quote(found.export.address)}" if image_opts else text
    host, port = found.export.address
    return f"nbd://{host}:{port}/{name}" if image_opts else text


def export_at(uri: str) -> Export:
    """Return the export that a URI of `openable` names."""
    found = export_named(uri, image_opts=False)
    if found is None:
        raise ValueError(f"{uri} is no URI of NBD")
    return found.export


def _open(uri: str) -> FileDevice:
    return ExportDevice(export_at(uri), uri)


def _of_options(text: str, options: dict[str, str]) -> NamedExport:
    others = sorted(options.keys() - _OPTIONS)
    if others:
        raise CommandError(f"Could not open '{text}': the option '{others[0]}' of NBD is not supported")
    path = options.get("server.path", options.get("path"))
    host = options.get("server.host", options.get("host"))
    if (path is None) == (host is None):
        raise CommandError(f"Could not open '{text}': NBD server address missing")
    port = options.get("server.port", options.get("port", str(DEFAULT_PORT)))
    address = path if path is not None else (str(host), int(port) if port.isdecimal() else DEFAULT_PORT)
    export = Export(address, options.get("export", ""))
    return NamedExport(export, options.get("x-dirty-bitmap", ALLOCATION))


def map_export(arguments: argparse.Namespace) -> int:
    """Print what an export holds."""
    named: NamedExport = arguments.export
    with opening(arguments.given):
        found = [_told(status, named.context) for status in read_status(named.export, named.context)]
    if arguments.output == "json":
        print("[" + ",\n".join(_line(status) for status in found) + "]")
        return common.EXIT_OK
    print(_ROW.format("Offset", "Length", "Mapped to", "File"))
    for status in found:
        if not status.flags & (STATE_HOLE | STATE_ZERO):
            start = _hex(status.offset)
            print(_ROW.format(start, _hex(status.length), start, printable(arguments.given)))
    return common.EXIT_OK


def _told(status: Status, context: str) -> Status:
    return status._replace(flags=min(status.flags, _DEPTHS_TOLD)) if context == DEPTH else status


def _hex(number: int) -> str:
    return f"{number:#x}" if number else "0"


def _line(status: Status) -> str:
    is_data, is_zero = not status.flags & STATE_HOLE, bool(status.flags & STATE_ZERO)
    told = {"start": status.offset, "length": status.length, "depth": 0}
    told |= {"present": is_data or is_zero, "zero": is_zero, "data": is_data}
    if is_data or is_zero:
        told["offset"] = status.offset
    return f"{{ {json.dumps(told)[1:-1]}}}"
