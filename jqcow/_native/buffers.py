"""Buffers as the twins take them: anything that gives contiguous bytes."""

from __future__ import annotations

from array import array

Buffer = bytes | bytearray | memoryview
WritableBuffer = bytearray | memoryview


def byte_view(data: Buffer | array[int]) -> memoryview:
    """Return ``data`` as a flat view of bytes; its length is in bytes."""
    view = memoryview(data)
    if view.format == "B" and view.ndim == 1:
        return view
    # An empty view refuses the cast.
    return view.cast("B") if view.nbytes else memoryview(b"")
