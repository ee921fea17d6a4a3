"""The inputs that are kept: a small corpus for each target, and whatever once broke a promise.

A corpus is one compressed archive: its inputs are many, and alike. A finding is a file of its own.
"""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterable
from hashlib import blake2b
from pathlib import Path

HERE = Path(__file__).resolve().parent
CORPORA = HERE / "corpora"
FINDINGS = HERE / "findings"
INPUTS_MAX = 150
BYTES_MAX = 256 << 10
"""What a kept corpus may have: CI runs all of it with the C kernels and with their twins."""


def name_of(data: bytes) -> str:
    """Return what an input is called."""
    return blake2b(data, digest_size=8).hexdigest()


def corpus_path(target: str) -> Path:
    """Return the file that keeps the corpus of a target."""
    return CORPORA / f"{target}.tar.xz"


def read_corpus(target: str) -> list[bytes]:
    """Return the kept corpus of a target; empty where there is none."""
    path = corpus_path(target)
    if not path.exists():
        return []
    with tarfile.open(path) as archive:
        members = (archive.extractfile(member) for member in archive.getmembers())
        return [member.read() for member in members if member is not None]


def write_corpus(target: str, inputs: Iterable[bytes]) -> list[bytes]:
    """Keep the first of some inputs, and return those; the same inputs make the same file."""
    kept: dict[str, bytes] = {}
    room = BYTES_MAX
    for data in inputs:
        if len(kept) < INPUTS_MAX and len(data) <= room:
            kept[name_of(data)] = data
            room -= len(data)
    CORPORA.mkdir(exist_ok=True)
    with tarfile.open(corpus_path(target), "w:xz") as archive:
        for name, data in sorted(kept.items(), key=lambda named: (len(named[1]), named[0])):
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return list(kept.values())


def findings_of(target: str) -> dict[str, bytes]:
    """Return what once broke a promise of a target, by the name of its file."""
    folder = FINDINGS / target
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())} if folder.is_dir() else {}
