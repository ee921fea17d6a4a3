"""An NBD server for images: `serve`, and the parts that it is made of."""

from __future__ import annotations

import os
import ssl
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from jqcow.image import Image
from jqcow.image.opening import open as open_image
from jqcow.nbd.export import Export
from jqcow.nbd.limits import Limits
from jqcow.nbd.listening import DEFAULT_PORT, Address, TcpAddress, UnixAddress
from jqcow.nbd.server import Server

__all__ = ["Export", "Limits", "Server", "TcpAddress", "UnixAddress", "serve"]


@contextmanager
def serve(
    image: Image | str | os.PathLike[str],
    *,
    socket: str | os.PathLike[str] | None = None,
    host: str | None = None,
    port: int | None = None,
    name: str = "",
    description: str = "",
    read_only: bool = False,
    tls: ssl.SSLContext | None = None,
    limits: Limits | None = None,
) -> Iterator[Server]:
    """Serve an image over NBD while the block runs; `Server.uri` says where.

    Without an address it is a unix socket in a new directory, which only this user can enter.

    Args:
        image: the image, which stays open; or the path of one, which is opened for this, and closed cleanly.
        socket: path of a unix socket to listen at, with mode 0600.
        host: name or address to listen at by TCP: whoever reaches it can use the disk.
        port: of TCP, 0 for a free one; the host is localhost unless it is given.
        name: of the export.
        description: of the export.
        read_only: refuse all changes.
        tls: a server's context: whoever does not use TLS is told nothing.
        limits: what clients may take.

    Raises:
        ValueError: a socket and a host or port.
        JqcowError, OSError: the image cannot be opened, or nobody can listen there.
    """
    if socket is not None and not (host is None and port is None):
        raise ValueError("a server listens at a unix socket or by TCP, not both")
    with ExitStack() as stack:
        if not isinstance(image, Image):
            image = stack.enter_context(open_image(image, "r" if read_only else "r+"))
        address: Address
        if socket is not None:
            address = UnixAddress(os.fspath(socket))
        elif host is not None or port is not None:
            address = TcpAddress(host or "localhost", DEFAULT_PORT if port is None else port)
        else:
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="jqcow-nbd-"))
            address = UnixAddress(os.path.join(folder, "socket"))
        yield stack.enter_context(
            Server(Export(image, name, description, read_only=read_only), address, limits=limits, tls=tls)
        )
