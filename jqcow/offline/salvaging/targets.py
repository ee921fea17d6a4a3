"""What a salvage writes: a raw file, or a qcow2 image that may keep its backing file."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

from jqcow import _native
from jqcow.device.base import Device
from jqcow.disks.making import RAW_UNIT_BYTES
from jqcow.offline.build import BuildState, ImageBuilder
from jqcow.offline.compare import nonzero_runs
from jqcow.offline.salvaging.parts import Part
from jqcow.ondisk.form import Form
from jqcow.ondisk.header import EXTENSION_BACKING_FORMAT
from jqcow.ondisk.l2 import codec_of
from jqcow.salvage.shape import Shape

WINDOW_BYTES = 2 << 20


class Target(Protocol):
    """Takes the parts of a disk in windows, by rising offsets. All numbers are bytes."""

    unit: int
    written_bytes: int

    def take(self, window: memoryview, offset: int, parts: list[Part]) -> None:
        """Write a window of the disk, with the parts that it consists of; ``window`` has their bytes."""
        ...

    def skip(self, part: Part) -> None:
        """Take a part without bytes, of whole units or up to the end of the disk."""
        ...

    def state(self) -> BuildState | None:
        """Return what of the target is not on its device."""
        ...

    def finish(self) -> None:
        """Write what is left."""
        ...


class RawTarget:
    """A raw file; what is zeros stays a hole."""

    unit = RAW_UNIT_BYTES

    def __init__(self, device: Device, size: int, position: int) -> None:
        """Write a disk of ``size`` bytes from ``position`` on; what the device has there goes."""
        self.written_bytes = 0
        self._device = device
        device.truncate(position)
        device.truncate(size)

    def take(self, window: memoryview, offset: int, parts: list[Part]) -> None:
        """See `Target.take`."""
        for start, end in nonzero_runs(window, self.unit):
            self._device.pwrite(window[start:end], offset + start)
            self.written_bytes += end - start

    def skip(self, part: Part) -> None:
        """See `Target.skip`."""

    def state(self) -> BuildState | None:
        """See `Target.state`."""
        return None

    def finish(self) -> None:
        """See `Target.finish`."""


def form_of(shape: Shape) -> Form:
    """Return what the qcow2 target of a damaged image is to be: the clusters are as large as they were."""
    return Form(shape.geometry.cluster_bits, has_subclusters=shape.geometry.has_subclusters)


def backing_of(shape: Shape) -> tuple[bytes, bytes | None] | None:
    """Return name and format of the backing file, as the header stores them; None without one."""
    name, extension = shape.area.backing_file_name, shape.area.find(EXTENSION_BACKING_FORMAT)
    return None if name is None else (name, extension.data if extension else None)


class ImageTarget:
    """A qcow2 image."""

    def __init__(self, device: Device, size: int, shape: Shape, state: BuildState | None) -> None:
        """Build an image of a disk of ``size`` bytes, or go on where ``state`` was."""
        self.written_bytes = 0
        self._backing = backing_of(shape)
        self._codec = codec_of(form_of(shape).geometry)
        self._builder = ImageBuilder(device, size, form_of(shape), backing=self._backing)
        self.unit = self._builder.cluster_bytes
        if state is None:
            device.truncate(0)
        else:
            self._builder.go_on(state)

    def take(self, window: memoryview, offset: int, parts: list[Part]) -> None:
        """See `Target.take`."""
        if self._backing is None:
            for start, end in nonzero_runs(window, self.unit):
                self._builder.write(window[start:end], offset + start)
                self.written_bytes += end - start
            return
        for start in range(0, len(window), self.unit):
            cluster = window[start : start + self.unit]
            inside = [part for part in parts if part.offset < offset + start + self.unit]
            self._over_backing(cluster, offset + start, [p for p in inside if p.end > offset + start])

    def _over_backing(self, cluster: memoryview, offset: int, parts: list[Part]) -> None:
        """Map a cluster so that the backing file shows where the image has nothing of its own."""
        if all(part.kind == "below" for part in parts):
            return
        step, filled, zeroed = self._codec.subcluster_bytes, list[range](), list[range]()
        for number in range(self._codec.subclusters):
            start, end = offset + number * step, offset + (number + 1) * step
            inside = [part for part in parts if part.offset < end and part.end > start]
            if all(part.kind == "below" for part in inside):
                continue
            is_zero = _native.is_zero(cluster[start - offset : end - offset])
            (zeroed if is_zero else filled).append(range(number, number + 1))
        self._builder.write_parts(cluster, offset, filled, zeroed)
        self.written_bytes += len(cluster) if filled else 0

    def skip(self, part: Part) -> None:
        """See `Target.skip`."""
        if self._backing is not None and part.kind != "below":
            self._builder.map_zeros(part.length, part.offset)

    def state(self) -> BuildState | None:
        """See `Target.state`."""
        return self._builder.state()

    def finish(self) -> None:
        """See `Target.finish`."""
        self._builder.finish()


def fill_window(window: memoryview, offset: int, parts: Iterable[Part]) -> None:
    """Put the bytes of parts, which lie in a window, into it."""
    for part in parts:
        if part.content is not None:
            window[part.offset - offset : part.end - offset] = part.content
