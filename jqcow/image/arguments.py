"""Arguments of the Python interface, taken as what they should be before anything else happens.

A number is whatever counts as an index, as numpy's do; a float is none, however whole. What is not of its
type raises TypeError, and nothing is read or written.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from operator import index as number
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

__all__ = [
    "check_date",
    "number",
    "optional_number",
    "optional_path",
    "optional_text",
    "text",
    "writable_view",
]


def optional_number(value: int | None) -> int | None:
    """Return a number as an int, None as None."""
    return None if value is None else number(value)


def text(value: str) -> str:
    """Return a text.

    Raises:
        TypeError: it is none; bytes are not, as nobody tells how to read them.
    """
    if not isinstance(value, str):
        raise TypeError(f"a str is needed, not {type(value).__name__}")
    return value


def optional_text(value: str | None) -> str | None:
    """Return a text, None as None."""
    return None if value is None else text(value)


def optional_path(value: str | os.PathLike[str] | None) -> str | None:
    """Return a path as a str, None as None.

    Raises:
        TypeError: it is none; bytes are not, as what an image stores is text.
    """
    return None if value is None else text(os.fspath(value))


def check_date(value: datetime | None) -> None:
    """Raise TypeError unless ``value`` is a date and time, or None."""
    if value is not None and not isinstance(value, datetime):
        raise TypeError(f"a datetime is needed, not {type(value).__name__}")


@contextmanager
def writable_view(buffer: WriteableBuffer) -> Iterator[memoryview]:
    """Give a buffer as bytes that can be written.

    Raises:
        TypeError: it cannot be written, or is none.
    """
    with memoryview(buffer) as whole, whole.cast("B") as view:
        if view.readonly:
            raise TypeError(f"a {type(buffer).__name__} cannot be written")
        yield view
