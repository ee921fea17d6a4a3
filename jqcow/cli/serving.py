"""The command that serves an image over NBD; options as in qemu-nbd where it has them."""

from __future__ import annotations

import argparse
import os
import re
import signal
import ssl
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from typing import TYPE_CHECKING, Any

import jqcow
from jqcow.cli import common, names, secrets
from jqcow.cli.common import CommandError

if TYPE_CHECKING:
    import socket

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
    shown = parser.add_mutually_exclusive_group()
    shown.add_argument(
        "-l", "--load-snapshot", metavar="SNAPSHOT", help="serve an internal snapshot, read-only"
    )
    shown.add_argument(
        "-s",
        "--snapshot",
        action="store_true",
        help="keep changes in a temporary file, and forget them at the end; IMAGE is only read",
    )
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
    _add_tls(parser)
    common.add_allow_files(parser)
    secrets.add_passphrase(parser)
    common.add_quiet(parser)
    parser.add_argument("image", metavar="IMAGE", nargs="?")
    parser.set_defaults(command=serve_command)


def _add_tls(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--tls-certificates",
        metavar="FOLDER",
        help="serve by TLS alone, with server-cert.pem and server-key.pem of a folder",
    )
    parser.add_argument(
        "--tls-verify-peer",
        action="store_true",
        help="serve clients alone whose certificate ca-cert.pem of the folder signed",
    )
    parser.add_argument(
        "--tls-psk",
        metavar="FILE",
        help="serve by TLS alone, with keys that both sides know, one 'NAME:HEX' a line (needs Python 3.13)",
    )


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
    listeners = _inherited(arguments)
    address = None if listeners else _address(arguments)
    tls = _tls(arguments)
    with ExitStack() as stack:
        image = _open(arguments, stack)
        export = Export(image, arguments.export_name, arguments.description, read_only=arguments.read_only)
        server = Server(
            export, address, listeners=listeners, limits=limits, persistent=arguments.persistent, tls=tls
        )
        stack.enter_context(closing(server))
        stack.enter_context(_stopping(server))
        if arguments.pid_file is not None:
            stack.enter_context(_pid_file(arguments.pid_file))
        if not arguments.quiet:
            print(server.uri, flush=True)
        server.run()
    return common.EXIT_OK


def _open(arguments: argparse.Namespace, stack: ExitStack) -> jqcow.Image:
    """Open what is served; ``stack`` closes it."""
    passphrase = secrets.passphrase_of(arguments)
    with common.opening(arguments, arguments.image):
        if arguments.snapshot:
            # Its name is nobody's business, and no image that stays has it.
            following = {"allow_files": arguments.allow_files, "passphrase": passphrase}
            with jqcow.open(arguments.image, probe=arguments.probe, **following) as image:
                size = image.size
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="jqcow-serve-"))
            return stack.enter_context(
                jqcow.create(
                    os.path.join(folder, "changes.qcow2"),
                    size,
                    backing_file=os.path.abspath(arguments.image),
                    backing_format="qcow2",
                    **following,
                )
            )
        writable = not (arguments.read_only or arguments.load_snapshot)
        return stack.enter_context(
            jqcow.open(
                arguments.image,
                "r+" if writable else "r",
                snapshot=arguments.load_snapshot,
                allow_files=arguments.allow_files,
                probe=arguments.probe,
                passphrase=passphrase,
            )
        )


def _inherited(arguments: argparse.Namespace) -> list[socket.socket]:
    """Return the sockets that systemd, or whoever does as it does, opened for this process."""
    from jqcow.nbd.listening import inherited

    if os.environ.get("LISTEN_PID") != str(os.getpid()):
        return []
    count = os.environ.get("LISTEN_FDS", "")
    if not re.fullmatch("[1-9][0-9]{0,2}", count):
        raise CommandError(f"LISTEN_FDS must be a number of sockets, not '{count}'")
    if not (arguments.socket is arguments.port is arguments.bind is None):
        raise CommandError("-k, -p and -b do not go with sockets from systemd")
    return inherited(int(count))


def _tls(arguments: argparse.Namespace) -> ssl.SSLContext | None:
    folder = arguments.tls_certificates
    if arguments.tls_psk is not None:
        if folder is not None or arguments.tls_verify_peer:
            raise CommandError("--tls-psk does not go with certificates")
        return _psk(arguments.tls_psk)
    if folder is None:
        if arguments.tls_verify_peer:
            raise CommandError("--tls-verify-peer needs --tls-certificates")
        return None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    with common.about(folder):
        context.load_cert_chain(
            os.path.join(folder, "server-cert.pem"), os.path.join(folder, "server-key.pem")
        )
        if arguments.tls_verify_peer:
            context.load_verify_locations(os.path.join(folder, "ca-cert.pem"))
            context.verify_mode = ssl.CERT_REQUIRED
    return context


def _psk(path: str) -> ssl.SSLContext:
    """Return a context whose clients prove that they know a key; as GnuTLS's psktool writes files."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    set_callback = getattr(context, "set_psk_server_callback", None)
    if set_callback is None:
        raise CommandError("--tls-psk needs Python 3.13: its ssl module has no keys before; use certificates")
    keys: dict[str, bytes] = {}
    with common.about(path), open(path, encoding="utf-8") as file:
        for line in file:
            name, colon, key = line.strip().rpartition(":")
            if not colon:
                raise CommandError(f"{path}: each line is 'NAME:HEX'")
            keys[name] = bytes.fromhex(key)
    # OpenSSL's callback of that kind is of TLS 1.2; an unknown name gets a key that nobody knows.
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    context.set_ciphers("PSK")
    set_callback(lambda name: keys.get(name) or os.urandom(32))
    return context


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
