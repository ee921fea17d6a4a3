"""The report of a salvage as a file: JSON, a line for each guest range, written as the disk is.

    {"jqcow-salvage-report": 1, "source": ..., "size": ..., "ranges": [
    {"offset": 0, "length": 65536, "kind": "data", "certainty": "certain", "witness": "L2 table", ...}
    ,{...}
    ], "summary": {...}}

Neighbours with one story are one range. Of what is lost, ``reason`` says why.
"""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

from jqcow.device.base import Device
from jqcow.offline.salvaging.parts import Part
from jqcow.salvage.evidence import Certainty

BUFFER_BYTES = 1 << 20


class RangeReport:
    """Writes ranges into a file; it can be gone on with."""

    def __init__(self, device: Device) -> None:
        """Write into ``device`` from its beginning on."""
        self._device = device
        self._buffer = bytearray()
        self._written_bytes = 0
        self._count = 0
        self._pending: Part | None = None

    def begin(self, head: dict[str, Any]) -> None:
        """Write the first line."""
        self._device.truncate(0)
        self._append(json.dumps({"jqcow-salvage-report": 1, **head})[:-1] + ', "ranges": [\n')

    def go_on(self, state: dict[str, Any]) -> None:
        """Take up what another one left; what the file has behind that goes."""
        self._written_bytes, self._count = state["bytes"], state["count"]
        pending = state["pending"]
        if pending is not None:
            certainty = pending.pop("certainty")
            self._pending = Part(certainty=None if certainty is None else Certainty(certainty), **pending)
        self._device.truncate(self._written_bytes)

    def add(self, part: Part) -> None:
        """Take the next range."""
        last, part = self._pending, replace(part, content=None)
        if last is not None and _goes_on(last, part):
            self._pending = replace(last, length=last.length + part.length)
            return
        self._flush_pending()
        self._pending = part

    def state(self) -> dict[str, Any]:
        """Return how far the report is; all before that is made durable."""
        self._write()
        # Durable now: what the state says of the report is there before the state says so.
        self._device.barrier("salvage.report")
        pending = None if self._pending is None else dict(vars(self._pending))
        if pending is not None:
            del pending["content"]
        return {"bytes": self._written_bytes, "count": self._count, "pending": pending}

    def finish(self, summary: dict[str, Any]) -> None:
        """Write the rest."""
        self._flush_pending()
        self._append(f'], "summary": {json.dumps(summary)}}}\n')
        self._write()

    def _flush_pending(self) -> None:
        if self._pending is None:
            return
        part, self._pending = self._pending, None
        story = {
            "offset": part.offset,
            "length": part.length,
            "kind": part.kind,
            "certainty": None if part.certainty is None else part.certainty.name.lower(),
            "witness": part.witness,
            "host-offset": part.host_offset,
            "compressed": part.is_compressed,
            "reason": part.reason,
        }
        self._append(("," if self._count else "") + json.dumps(story) + "\n")
        self._count += 1

    def _append(self, text: str) -> None:
        self._buffer += text.encode()
        if len(self._buffer) >= BUFFER_BYTES:
            self._write()

    def _write(self) -> None:
        if self._buffer:
            self._device.pwrite(self._buffer, self._written_bytes)
            self._written_bytes += len(self._buffer)
            self._buffer = bytearray()


def _goes_on(one: Part, other: Part) -> bool:
    if one.end != other.offset or one.is_compressed != other.is_compressed:
        return False
    if (one.kind, one.certainty, one.witness, one.reason) != (
        other.kind,
        other.certainty,
        other.witness,
        other.reason,
    ):
        return False
    if one.host_offset is None or one.is_compressed:
        return one.host_offset == other.host_offset
    return one.host_offset + one.length == other.host_offset
