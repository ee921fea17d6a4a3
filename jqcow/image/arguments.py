"""Arguments of the Python interface, taken as what they should be before anything else happens.

A number is whatever counts as an index, as numpy's do; a float is none, however whole. What is not of its
type raises TypeError, and nothing is read or written.
"""

from __future__ import annotations

import os
from datetime import datetime
from operator import index as number

__all__ = [
    "check_date",
    "number",
    "optional_number",
    "optional_path",
    "optional_text",
    "require_writable",
    "text",
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


def require_writable(view: memoryview) -> None:
    """Raise TypeError if a buffer cannot be written."""
    if view.readonly:
        raise TypeError(f"a {type(view.obj).__name__} cannot be written")
