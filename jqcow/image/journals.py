"""How long the journal is to be that an opened image lays, and where."""

from __future__ import annotations

from dataclasses import dataclass

from jqcow.ondisk import root as roots


@dataclass(frozen=True)
class JournalLength:
    """The length in bytes of the next journal, 0 for the default. ``is_exact``: shorter ones do not do.

    ``distance_bytes``: how far behind the end of the file it is laid.
    """

    length_bytes: int
    is_exact: bool = False
    distance_bytes: int = 0


class FarJournal(int):
    """The size in bytes of a journal that is laid far behind the end of the file.

    What is written meanwhile continues the file, which a clean close cuts behind it. A file in use is long.
    """

    distance_bytes: int

    def __new__(cls, length_bytes: int, distance_bytes: int = 1 << 30) -> FarJournal:
        """``distance_bytes``: how far behind; what is written beyond lies behind the journal."""
        far = super().__new__(cls, length_bytes)
        far.distance_bytes = distance_bytes
        return far


def journal_length(journal_size: int | None) -> JournalLength:
    """Return what `open` was asked for."""
    distance_bytes = journal_size.distance_bytes if isinstance(journal_size, FarJournal) else 0
    length_bytes = 0 if journal_size is None else roots.journal_length(journal_size)
    return JournalLength(length_bytes, distance_bytes=distance_bytes)
