"""The command that serves an image over NBD; options as in qemu-nbd where it has them."""

from __future__ import annotations

import argparse
import os
import signal
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from typing import TYPE_CHECKING, Any

import jqcow
from jqcow.cli import common, names, secrets
from jqcow.cli.common import CommandError

if TYPE_CHECKING:
    from jqcow.nbd import Server
    from jqcow.nbd.listening import Address

_PORT_MAX = 65535
_STOPPING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


def add_parsers(commands: Any) -> None:
    """Add the subcommand of this module."""
    parser = commands.add_parser(
        "serve",
        help="serve a disk over NBD",
        description="Serve the disk of a qcow2 image over NBD until SIGTERM, SIGINT or SIGHUP, or until the "
        "last client is gone; then close the image cleanly. Prints the URI of the export.",
    )
    names.add_image_opts(parser)
    names.add_objects(parser)
    parser.add_argument(
        "-k", "--socket", metavar="PATH", help="the unix socket to listen at (default: IMAGE.nbd)"
    )
    parser.add_argument("-p", "--port", metavar="PORT", type=int, help="listen by TCP; 0 takes a free port")
    parser.add_argument(
        "-b", "--bind", metavar="HOST", help="listen by TCP at this name or address (default: localhost)"
    )
    parser.add_argument("-r", "--read-only", action="store_true", help="refuse all changes")
    parser.add_argument("-x", "--export-name", metavar="NAME", default="", help="name of the export")
    parser.add_argument("-D", "--description", metavar="TEXT", default="", help="description of the export")
    parser.add_argument(
        "-t", "--persistent", action="store_true", help="serve on when the last client is gone"
    )
    parser.add_argument(
        "-e", "--shared", metavar="N", type=int, help="clients at a time; others wait (default: 64)"
    )
    parser.add_argument(
        "--pid-file", metavar="PATH", help="write the process id to a file when clients can come"
    )
    common.add_allow_files(parser)
    secrets.add_passphrase(parser)
    common.add_quiet(parser)
    parser.add_argument("image", metavar="IMAGE", nargs="?")
    parser.set_defaults(command=serve_command)


def serve_command(arguments: argparse.Namespace) -> int:
    """Serve an image."""
    from jqcow.nbd import Export, Limits, Server

    if arguments.image is None:
        raise CommandError("an image is to be named")
    limits = Limits()
    if arguments.shared is not None:
        if arguments.shared < 1:
            raise CommandError("--shared must be at least 1")
        limits = Limits(clients=arguments.shared)
    address = _address(arguments)
    with ExitStack() as stack:
        with common.opening(arguments, arguments.image):
            image = jqcow.open(
                arguments.image,
                "r" if arguments.read_only else "r+",
                allow_files=arguments.allow_files,
                probe=arguments.probe,
                passphrase=secrets.passphrase_of(arguments),
            )
        stack.enter_context(image)
        export = Export(image, arguments.export_name, arguments.description, read_only=arguments.read_only)
        server = Server(export, address, limits=limits, persistent=arguments.persistent)
        stack.enter_context(closing(server))
        stack.enter_context(_stopping(server))
        if arguments.pid_file is not None:
            stack.enter_context(_pid_file(arguments.pid_file))
        if not arguments.quiet:
            print(server.uri, flush=True)
        server.run()
    return common.EXIT_OK


def _address(arguments: argparse.Namespace) -> Address:
    from jqcow.nbd.listening import DEFAULT_PORT, TcpAddress, UnixAddress

    if arguments.port is None and arguments.bind is None:
        return UnixAddress(arguments.socket or f"{arguments.image}.nbd")
    if arguments.socket is not None:
        raise CommandError("-k does not go with -p and -b")
    port = DEFAULT_PORT if arguments.port is None else arguments.port
    if not 0 <= port <= _PORT_MAX:
        raise CommandError(f"a port is a number up to {_PORT_MAX}, not {port}")
    return TcpAddress(arguments.bind or "localhost", port)


@contextmanager
def _stopping(server: Server) -> Iterator[None]:
    """Have the signals that ask a process to end stop the server; the image is closed cleanly then."""
    before = {one: signal.signal(one, lambda *_: server.request_stop()) for one in _STOPPING}
    try:
        yield
    finally:
        for one, handler in before.items():
            signal.signal(one, handler)


@contextmanager
def _pid_file(path: str) -> Iterator[None]:
    with open(path, "w", encoding="ascii") as file:
        file.write(f"{os.getpid()}\n")
    try:
        yield
    finally:
        os.unlink(path)
