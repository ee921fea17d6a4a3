"""The Python interface: images, transactions, opening and creating, a disk as a file object."""

from jqcow.image.entering import Mode
from jqcow.image.image import Image
from jqcow.image.reports import ImageInfo, JournalInfo, Recovered

__all__ = ["Image", "ImageInfo", "JournalInfo", "Mode", "Recovered"]
