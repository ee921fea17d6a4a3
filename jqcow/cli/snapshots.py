"""The command about internal snapshots: list, make, apply, delete; spelled as in qemu-img."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterable, Iterator
from typing import Any

from jqcow.cli import common, names
from jqcow.cli.common import human_size
from jqcow.errors import printable
from jqcow.offline.info import read_snapshots
from jqcow.ondisk.snapshots import Snapshot

_NANOSECONDS = 10**9
_COLUMNS = ("ID", "TAG", "VM SIZE", "DATE", "VM CLOCK", "ICOUNT")


def add_parsers(commands: Any) -> None:
    """Add the subcommand of this module."""
    snapshot = commands.add_parser(
        "snapshot",
        help="list, make, apply or delete internal snapshots",
        description="List, make, apply or delete internal snapshots. Each change is whole or not at all, and "
        "durable. A crashed image is recovered first.",
    )
    snapshot.set_defaults(command=snapshot_command)
    action = snapshot.add_mutually_exclusive_group(required=True)
    action.add_argument("-l", dest="list", action="store_true", help="list all snapshots; nothing is written")
    action.add_argument("-c", dest="create", metavar="NAME", help="make a snapshot of the disk as it is")
    action.add_argument(
        "-a", dest="apply", metavar="SNAPSHOT", help="make the disk what it was: what it holds now is lost"
    )
    action.add_argument("-d", dest="delete", metavar="SNAPSHOT", help="delete a snapshot, by id or name")
    names.add_image_opts(snapshot)
    names.add_objects(snapshot)
    common.add_journal_size(snapshot)
    common.add_quiet(snapshot)
    common.add_force_share(snapshot)
    common.add_output(snapshot)
    snapshot.add_argument("image", metavar="IMAGE")


def snapshot_command(arguments: argparse.Namespace) -> int:
    """Print the snapshots of an image, or change them."""
    if arguments.profile.is_qemu and not arguments.list:
        from jqcow.cli.qemu import changing

        return changing.snapshot(arguments)
    if not arguments.list:
        return _change(arguments)
    if arguments.journal_size is not None:
        raise common.CommandError("--journal-size is for what writes: -l does not")
    common.print_warnings(arguments, arguments.image, "qcow2", force_share=arguments.force_share)
    with common.opening(arguments, arguments.image):
        found = read_snapshots(arguments.image, force_share=arguments.force_share)
    if arguments.output == "json":
        common.print_json([snapshot_json(snapshot) for snapshot in found])
    elif found:
        print("\n".join(snapshot_lines(found)))
    return common.EXIT_OK


def _change(arguments: argparse.Namespace) -> int:
    if arguments.force_share or arguments.output == "json":
        raise common.CommandError("-U and --output=json are about the list: use them with -l")
    from jqcow.image.opening import open_alone

    # What is below the image stays closed: snapshots share what is its own.
    journal_size = common.journal_size_of(arguments)
    with common.about(arguments.image), open_alone(arguments.image, "r+", journal_size=journal_size) as image:
        if image.recovered is not None and not arguments.quiet:
            print("The image had crashed; it was recovered first.", file=sys.stderr)
        if arguments.create is not None:
            image.create_snapshot(arguments.create)
        elif arguments.apply is not None:
            image.apply_snapshot(arguments.apply)
        else:
            image.delete_snapshot(arguments.delete)
    return common.EXIT_OK


def snapshot_json(snapshot: Snapshot) -> dict[str, Any]:
    """Return a snapshot as JSON values with qemu-img's names; what is not UTF-8 is replaced."""
    seconds, nanoseconds = divmod(snapshot.vm_clock_nanoseconds, _NANOSECONDS)
    told: dict[str, Any] = {} if snapshot.icount is None else {"icount": snapshot.icount}
    return told | {
        "vm-clock-nsec": nanoseconds,
        "name": _as_text(snapshot.name),
        "date-sec": snapshot.date_seconds,
        "date-nsec": snapshot.date_nanoseconds,
        "vm-clock-sec": seconds,
        "id": _as_text(snapshot.id),
        "vm-state-size": snapshot.vm_state_bytes,
    }


def snapshot_lines(snapshots: Iterable[Snapshot]) -> Iterator[str]:
    """Yield the lines of the list of snapshots, as qemu-img prints them; dates in the local time zone."""
    yield "Snapshot list:"
    yield _row(*_COLUMNS)
    for snapshot in snapshots:
        date = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(snapshot.date_seconds))
        icount = "" if snapshot.icount is None else str(snapshot.icount)
        size, clock = human_size(snapshot.vm_state_bytes), _clock(snapshot.vm_clock_nanoseconds)
        yield _row(printable(snapshot.id), printable(snapshot.name), size, date, clock, icount)


def _row(identifier: str, name: str, size: str, date: str, clock: str, icount: str) -> str:
    return f"{_padded(identifier, 9)} {_padded(name, 16)} {size:>8}{date:>20}{clock:>13}{icount:>11}"


def _padded(text: str, width: int) -> str:
    # qemu-img's columns are as wide in bytes.
    return text + " " * (width - len(text.encode()))


def _clock(nanoseconds: int) -> str:
    seconds, rest = divmod(nanoseconds, _NANOSECONDS)
    minutes, hours = seconds // 60, seconds // 3600
    return f"{hours:02}:{minutes % 60:02}:{seconds % 60:02}.{rest // 10**6:03}"


def _as_text(text: str) -> str:
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
