"""Encrypted images for the laboratory: of few stripes and iterations, and the same on every run."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from random import Random
from unittest.mock import patch

from jqcow.ondisk.encryption import Encryption

PASSPHRASE = b"correct horse"
STRIPES = 2
"""QEMU reads 4000 alone; they make a header that no crash state needs."""


def encryption() -> Encryption:
    """Return how images of the laboratory are encrypted."""
    return Encryption(PASSPHRASE, "aes-128", iter_time=1, _stripes=STRIPES)


@contextmanager
def without_chance() -> Iterator[None]:
    """Make keys and salts that are the same on every run, of as few iterations as there can be."""
    random = Random("keys")
    with (
        patch("secrets.token_bytes", random.randbytes),
        patch("uuid.uuid4", lambda: uuid.UUID(int=1)),
        patch("jqcow.ondisk.keys.iterations_for", lambda *_: 1000),
    ):
        yield
