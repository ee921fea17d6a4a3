"""``-`` among the files of convert: standard input, and standard output.

As `jqcow-img` a ``-`` is a file of that name, as in qemu-img.
"""

from __future__ import annotations

import argparse
import os
from typing import TYPE_CHECKING

from jqcow.cli.common import CommandError

if TYPE_CHECKING:
    from jqcow.device.stream import OutputStream
    from jqcow.disks.files import Source

PIPE = "-"
STDIN, STDOUT = 0, 1
SPOOL_DIRECTORY = "/var/tmp"
"""Not that of Python's `tempfile`, which is often memory: what is kept there may be as large as a disk."""


def check(arguments: argparse.Namespace) -> None:
    """Refuse what does not go with a pipe.

    Raises:
        CommandError: says what.
    """
    if arguments.sources.count(PIPE) > 1:
        raise CommandError("'-' is standard input, which can be read once")
    if arguments.target != PIPE:
        return
    if arguments.into or arguments.backing_file is not None or len(arguments.sources) > 1:
        raise CommandError(
            "'-' as the target is for one source, without -n and -B; ./- is a file of that name"
        )
    if arguments.sparse is not None:
        raise CommandError("'-' as the target: -S is about files")
    if arguments.output == "json":
        raise CommandError("--output=json is printed where the image goes: leave it out with the target '-'")


def is_pipe(arguments: argparse.Namespace, name: str) -> bool:
    """Tell whether a name means standard input or output."""
    return name == PIPE and not arguments.profile.is_qemu


def opened(arguments: argparse.Namespace, path: str) -> Source:
    """Return a source: its path, or for ``-`` a copy of what standard input gives."""
    if is_export(path):
        from jqcow.device.file import FileDevice

        return FileDevice.open(path, writable=False)
    if not is_pipe(arguments, path):
        return path
    from jqcow.device.stream import spool_of

    return spool_of(STDIN, spool_directory())


def is_export(path: str) -> bool:
    """Tell whether a path that `jqcow.cli.names` gave is the URI of an export."""
    return path.startswith(("nbd://", "nbd+"))


def output(arguments: argparse.Namespace, path: str) -> OutputStream | None:
    """Return standard output or an export, if that is the target, None for a file.

    Raises:
        CommandError: it is a terminal.
    """
    if is_export(path):
        from jqcow.cli.qemu.exports import export_at
        from jqcow.nbd.device import ExportStream

        return ExportStream(export_at(path), spool_directory())
    if not is_pipe(arguments, path):
        return None
    from jqcow.device.stream import OutputStream

    try:
        return OutputStream(STDOUT, spool_directory())
    except OSError as error:
        raise CommandError(f"{error.strerror}: standard output is one") from error


def spool_directory() -> str:
    """Return where temporary files go."""
    return os.environ.get("TMPDIR") or SPOOL_DIRECTORY
