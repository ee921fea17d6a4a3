"""Where bytes live and what a barrier is."""

from jqcow.device.base import Device, FixedSize, ReadBuffer
from jqcow.device.block import BlockDevice
from jqcow.device.file import FileDevice

__all__ = ["BlockDevice", "Device", "FileDevice", "FixedSize", "ReadBuffer"]
