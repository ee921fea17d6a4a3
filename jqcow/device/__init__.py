"""Where bytes live and what a barrier is."""

from jqcow.device.base import Device, ReadBuffer
from jqcow.device.file import FileDevice

__all__ = ["Device", "FileDevice", "ReadBuffer"]
