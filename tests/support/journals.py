"""Journals of unusual places."""

from __future__ import annotations

from jqcow.image.journals import FarJournal

FAR_JOURNAL = FarJournal(64 << 10, distance_bytes=64 << 10)
"""Near enough that what is written soon lies behind it, too."""
