"""Keeps what a test script's folder holds, before and after each command of QEMU's: the stand-ins run it.

    python capture.py FOLDER STORE

A *state* is all regular files of FOLDER, where one is a qcow2 image; contents are kept once each, by their
hash, sparse, and a line of ``STORE/states`` names them. It takes nothing but the standard library, and is
quick: a script has hundreds of commands.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import sys
from collections.abc import Iterator

MAGIC = b"QFI\xfb"
HELD_BYTES_MAX = 64 << 20
"""Files that hold more are left out."""

FILES_MAX = 40
PIECE_BYTES = 1 << 20


def pieces(descriptor: int) -> Iterator[tuple[int, bytes]]:
    """Yield (offset, bytes) of what is not a hole."""
    at, size = 0, os.fstat(descriptor).st_size
    while at < size:
        try:
            at = os.lseek(descriptor, at, os.SEEK_DATA)
        except OSError:
            return
        end = os.lseek(descriptor, at, os.SEEK_HOLE)
        while at < end:
            piece = os.pread(descriptor, min(PIECE_BYTES, end - at), at)
            if not piece:
                return
            yield at, piece
            at += len(piece)


def keep(path: str, store: str) -> str:
    """Keep a file's content; return its hash."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        size = os.fstat(descriptor).st_size
        digest = hashlib.sha256(str(size).encode())
        for offset, piece in pieces(descriptor):
            # Zeros that are written and holes are one content.
            if piece.count(0) < len(piece):
                digest.update(offset.to_bytes(8, "big") + piece)
        name = digest.hexdigest()[:24]
        kept = os.path.join(store, name)
        if not os.path.exists(kept):
            copy(descriptor, kept, size)
        return name
    finally:
        os.close(descriptor)


def copy(descriptor: int, kept: str, size: int) -> None:
    """Copy a file, with its holes."""
    target = os.open(f"{kept}.{os.getpid()}", os.O_RDWR | os.O_CREAT, 0o600)
    try:
        for offset, piece in pieces(descriptor):
            if piece.count(0) < len(piece):
                os.pwrite(target, piece, offset)
        os.ftruncate(target, size)
    finally:
        os.close(target)
    os.rename(f"{kept}.{os.getpid()}", kept)


def found_in(folder: str, store: str, known: dict[str, list[object]]) -> dict[str, str]:
    """Return the name and hash of each file; ``known`` spares those that did not change."""
    found: dict[str, str] = {}
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name)[:FILES_MAX]:
        if not entry.is_file(follow_symlinks=False):
            continue
        state = entry.stat(follow_symlinks=False)
        if state.st_blocks * 512 > HELD_BYTES_MAX:
            continue
        facts: list[object] = [state.st_ino, state.st_size, state.st_blocks, state.st_mtime_ns]
        if entry.name in known and known[entry.name][:-1] == facts:
            found[entry.name] = str(known[entry.name][-1])
            continue
        found[entry.name] = keep(entry.path, store)
        known[entry.name] = [*facts, found[entry.name]]
    return found


def is_image(path: str) -> bool:
    """Return True if a file starts as a qcow2 image does."""
    with open(path, "rb") as file:
        return file.read(4) == MAGIC


def main(folder: str, store: str) -> None:
    """Keep the state of the folder, if it is another one than the last."""
    with open(os.path.join(store, "known"), "a+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.seek(0)
        text = file.read()
        known, last = json.loads(text) if text else ({}, {})
        found = found_in(folder, store, known)
        if found != last and any(is_image(os.path.join(store, name)) for name in set(found.values())):
            with open(os.path.join(store, "states"), "a") as states:
                states.write(json.dumps(found) + "\n")
        file.seek(0)
        file.truncate()
        file.write(json.dumps([known, found]))


if __name__ == "__main__":
    # A file may go while it is looked at: the script's command is what counts.
    try:
        main(*sys.argv[1:])
    except OSError as error:
        with open(os.path.join(sys.argv[2], "errors"), "a") as told:
            print(error, file=told)
