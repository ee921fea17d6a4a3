"""How far a salvage is, in a file beside its target: by that a salvage that was cut off goes on.

The target is built under the name of the target and `PARTIAL`; the state lies under that name and `STATE`.

Z1. What a state says is durable before the state is: target and report are synced, then the state replaces
    the one before it, at once. What lies behind it in either is cut off before a salvage goes on.
Z2. A state is of one source, as it was, and of one way to salvage it; of another it is not taken.
"""

from __future__ import annotations

import base64
import binascii
import json
import os
import zlib
from contextlib import closing
from dataclasses import dataclass
from typing import Any

from jqcow import _native
from jqcow.device.file import FileDevice, remove_file
from jqcow.errors import CorruptionError, FormatError
from jqcow.offline.build import BuildState
from jqcow.ondisk.layout import MAX_CLUSTER_BITS, MAX_L1_BYTES

PARTIAL = ".jqcow-partial"
STATE = ".jqcow-salvage"
VERSION = 1
STATE_BYTES_MAX = 128 << 20


@dataclass(frozen=True)
class SalvageState:
    """How far a salvage is.

    Attributes:
        plan: what is salvaged, and how: source, as it was, and options.
        position: the guest offset up to which the target is written.
        bad: what of the source could not be read, as (offset, length).
        amounts: what the disk came to so far.
        written_bytes: of data in the target.
        build: of a qcow2 target, what is not in it yet.
        report: of the report, if there is one.
    """

    plan: dict[str, Any]
    position: int
    bad: list[tuple[int, int]]
    amounts: dict[str, int]
    written_bytes: int
    build: BuildState | None
    report: dict[str, Any] | None

    def pack(self) -> bytes:
        """Return it as in the file: a line with its checksum, and JSON."""
        build = self.build
        body = {
            "version": VERSION,
            "plan": self.plan,
            "position": self.position,
            "bad": self.bad,
            "amounts": self.amounts,
            "written-bytes": self.written_bytes,
            "report": self.report,
            "build": build
            and {
                "next-cluster": build.next_cluster,
                "reached": build.reached,
                "l1": _pack(build.l1_table),
                "l2-index": build.l2_index,
                "l2": _pack(build.l2_table),
            },
        }
        text = json.dumps(body).encode()
        return f"jqcow-salvage {_native.crc32c(text):08x}\n".encode() + text

    @classmethod
    def unpack(cls, data: bytes) -> SalvageState:
        """Read a state.

        Raises:
            FormatError: it is none.
            CorruptionError: it is damaged.
        """
        head, _, text = data.partition(b"\n")
        if not head.startswith(b"jqcow-salvage "):
            raise FormatError("not the state of a salvage")
        if head[14:] != f"{_native.crc32c(text):08x}".encode():
            raise CorruptionError("state of a salvage", 0, "its checksum does not match")
        try:
            return cls._of(json.loads(text))
        except (KeyError, TypeError, ValueError, binascii.Error, zlib.error, RecursionError) as error:
            raise FormatError(f"not the state of a salvage of this version: {error}") from error

    @classmethod
    def _of(cls, body: dict[str, Any]) -> SalvageState:
        if body["version"] != VERSION:
            raise ValueError(f"version {body['version']}")
        build = body["build"]
        return cls(
            body["plan"],
            int(body["position"]),
            [(int(offset), int(length)) for offset, length in body["bad"]],
            {str(name): int(value) for name, value in body["amounts"].items()},
            int(body["written-bytes"]),
            build
            and BuildState(
                int(build["next-cluster"]),
                int(build["reached"]),
                _unpack(build["l1"], MAX_L1_BYTES),
                int(build["l2-index"]),
                _unpack(build["l2"], 1 << MAX_CLUSTER_BITS),
            ),
            body["report"],
        )


def _pack(table: bytes) -> str:
    return base64.b64encode(zlib.compress(table, 1)).decode()


def _unpack(text: str, bytes_max: int) -> bytes:
    return zlib.decompressobj().decompress(base64.b64decode(text), bytes_max)


def read_state(target: str) -> SalvageState | None:
    """Return the state beside a target; None where there is none.

    Raises:
        FormatError, CorruptionError: something else is there, or it is damaged.
        OSError: the host failed.
    """
    try:
        device = FileDevice.open(target + STATE, writable=False)
    except FileNotFoundError:
        return None
    with closing(device):
        return SalvageState.unpack(device.pread(min(device.size(), STATE_BYTES_MAX), 0))


def write_state(target: str, state: SalvageState) -> None:
    """Put a state beside a target, durably, in the place of the one before it."""
    with closing(FileDevice.create_temporary(target + STATE, follow_links=False)) as device:
        device.pwrite(state.pack(), 0)
        device.publish(overwrite=True)


def remove_state(target: str) -> None:
    """Take the state beside a target away, if there is one."""
    if os.path.lexists(target + STATE):
        with closing(FileDevice.open(target + STATE, writable=True)) as device:
            remove_file(device)
