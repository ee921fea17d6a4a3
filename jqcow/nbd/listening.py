"""Where a server listens: unix sockets, TCP, and sockets that somebody else opened."""

from __future__ import annotations

import errno
import os
import socket
import stat
from contextlib import suppress
from dataclasses import dataclass
from urllib.parse import quote

BACKLOG = 128
DEFAULT_PORT = 10809
FIRST_INHERITED = 3
"""The first descriptor that systemd hands over (sd_listen_fds)."""


@dataclass(frozen=True)
class UnixAddress:
    """A unix socket; ``mode`` are its permissions."""

    path: str
    mode: int = 0o600


@dataclass(frozen=True)
class TcpAddress:
    """A TCP port; port 0 takes a free one."""

    host: str = "localhost"
    port: int = DEFAULT_PORT


Address = UnixAddress | TcpAddress


def listen(address: Address) -> list[socket.socket]:
    """Listen at an address; a host may have several.

    Raises:
        OSError: that cannot be; a unix socket in use, or a file that is none, stays as it is.
    """
    if isinstance(address, UnixAddress):
        return [_listen_unix(address)]
    return _listen_tcp(address)


def _listen_unix(address: UnixAddress) -> socket.socket:
    made = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        _remove_dead(address.path)
        # The socket is nobody's before its permissions are what they should be: nobody can connect to one
        # that does not listen.
        made.bind(address.path)
        os.chmod(address.path, address.mode)
        made.listen(BACKLOG)
    except BaseException:
        made.close()
        raise
    return made


def _remove_dead(path: str) -> None:
    """Remove a socket that a killed server left: one on which nobody listens."""
    try:
        if not stat.S_ISSOCK(os.lstat(path).st_mode):
            return
    except FileNotFoundError:
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            os.unlink(path)


def _listen_tcp(address: TcpAddress) -> list[socket.socket]:
    found: list[socket.socket] = []
    port = address.port
    try:
        for family, kind, protocol, _, place in socket.getaddrinfo(
            address.host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        ):
            made = socket.socket(family, kind, protocol)
            found.append(made)
            made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                made.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            # A free port is one for all families.
            made.bind((place[0], port, *place[2:]))
            port = made.getsockname()[1]
            made.listen(BACKLOG)
    except BaseException:
        for one in found:
            one.close()
        raise
    return found


def inherited(count: int) -> list[socket.socket]:
    """Return the first ``count`` sockets that were handed to this process, as systemd does: from 3 on.

    Raises:
        OSError: a descriptor is not a socket that listens.
    """
    found = []
    for descriptor in range(FIRST_INHERITED, FIRST_INHERITED + count):
        one = socket.socket(fileno=descriptor)
        found.append(one)
        one.set_inheritable(False)
        if not one.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
            raise OSError(errno.EINVAL, f"descriptor {descriptor} is not a socket that listens")
    return found


def uri_of(listener: socket.socket, name: str, *, host: str = "", tls: bool = False) -> str:
    """Return the NBD URI of an export at a listening socket; ``host`` is its name, if it has one."""
    scheme = "nbds" if tls else "nbd"
    export = quote(name, safe="")
    if listener.family == socket.AF_UNIX:
        return f"{scheme}+unix:///{export}?socket={quote(listener.getsockname())}"
    address, port = listener.getsockname()[:2]
    host = host or address
    return f"{scheme}://{f'[{host}]' if ':' in host else host}:{port}/{export}"


def forget(listener: socket.socket) -> None:
    """Close a listening socket that `listen` made, and remove its name."""
    if listener.family == socket.AF_UNIX:
        with suppress(FileNotFoundError):
            os.unlink(listener.getsockname())
    listener.close()
