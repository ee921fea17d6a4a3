"""Two sets of defaults: jqcow's own, which are careful, and those of qemu-img.

The commands are the same. A profile says what they do unasked, and in whose words they speak.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Profile:
    """What a command does unasked.

    Attributes:
        program: the name that stands before every message.
        is_qemu: options, texts and exit codes are those of qemu-img, also where jqcow would say more.
        overwrites: a new file replaces an existing one.
        allows_files: files that images name inside are opened.
        probes: the format of a file is told by its magic where nothing says it.
        new_format: of a new image.
    """

    program: str
    is_qemu: bool
    overwrites: bool
    allows_files: bool
    probes: bool
    new_format: Literal["qcow2", "raw"]


CAREFUL = Profile(
    "jqcow", is_qemu=False, overwrites=False, allows_files=False, probes=False, new_format="qcow2"
)
QEMU_IMG = Profile(
    "qemu-img", is_qemu=True, overwrites=True, allows_files=True, probes=True, new_format="raw"
)
