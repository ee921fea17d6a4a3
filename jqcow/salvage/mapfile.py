"""Maps of what of a file could be read, in the text format of GNU ddrescue.

A line that is no comment has a position, a length in bytes and a status; before these comes a status line: a
position, a status and, in newer maps, the number of a pass. Numbers are decimal, octal (with a leading 0) or
hexadecimal. What follows a ``#`` is a comment.

    +       was read
    -       bad sectors
    ? * /   not tried, or failed and not tried to the sector: a copy has nothing there either
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

from jqcow.errors import FormatError

MAP_BYTES_MAX = 64 << 20
BLOCKS = "?*/-+"
CURRENT = "?*/-FG+"
_NUMBER = re.compile(r"0x[0-9a-f]{1,16}|0[0-7]{0,21}|[1-9][0-9]{0,18}", re.IGNORECASE | re.ASCII)


def parse_map(text: bytes) -> list[tuple[int, int]]:
    """Return the (offset, length) of what a map says was not read.

    Raises:
        FormatError: it is no map.
    """
    if len(text) > MAP_BYTES_MAX:
        raise FormatError(f"a map of {len(text)} bytes is longer than {MAP_BYTES_MAX}")
    lines = _lines(text)
    number, words = next(lines, (0, []))
    if not 2 <= len(words) <= 3 or words[1] not in tuple(CURRENT):
        raise FormatError(f"not a map of ddrescue: line {number} is no status line")
    for word in (words[0], *words[2:]):
        _number(word, number)
    bad, end = list[tuple[int, int]](), 0
    for number, words in lines:
        if len(words) != 3 or words[2] not in tuple(BLOCKS):
            raise FormatError(f"not a map of ddrescue: line {number} is no block")
        offset, length = _number(words[0], number), _number(words[1], number)
        if offset < end:
            raise FormatError(f"not a map of ddrescue: line {number} goes back")
        end = offset + length
        if words[2] != "+" and length:
            bad.append((offset, length))
    return bad


def _lines(text: bytes) -> Iterator[tuple[int, list[str]]]:
    for number, line in enumerate(text.decode("ascii", "replace").splitlines(), 1):
        words = line.partition("#")[0].split()
        if words:
            yield number, words


def _number(word: str, line: int) -> int:
    if not _NUMBER.fullmatch(word):
        raise FormatError(f"not a map of ddrescue: line {line} has {word[:40]!r} for a number")
    base = 16 if word[:2].lower() == "0x" else 8 if word.startswith("0") else 10
    value = int(word, base)
    if value >= 1 << 63:
        raise FormatError(f"not a map of ddrescue: line {line} has a number of more than 63 bits")
    return value


def pack_map(bad: Iterable[tuple[int, int]], file_bytes: int) -> bytes:
    """Return the map of a file of which ``bad``, in order, could not be read; all else counts as read."""
    lines = ["# Mapfile. Written by jqcow-recover", "# current_pos  current_status  current_pass"]
    lines += [f"{file_bytes:#x}     +               1", "#      pos        size  status"]
    reached = 0
    for offset, length in bad:
        start, end = min(offset, file_bytes), min(offset + length, file_bytes)
        if reached < start:
            lines.append(f"{reached:#x}  {start - reached:#x}  +")
        if start < end:
            lines.append(f"{start:#x}  {end - start:#x}  -")
        reached = max(reached, end)
    if reached < file_bytes:
        lines.append(f"{reached:#x}  {file_bytes - reached:#x}  +")
    return ("\n".join(lines) + "\n").encode()
