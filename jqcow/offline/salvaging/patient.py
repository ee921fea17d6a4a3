"""A damaged image, open to be looked at: nothing of it is ever written.

PA1. A journal that can be replayed is, in memory; one that cannot is a damage, and nothing is certain then:
    the tables in the file may be older than the data.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field

from jqcow.device.base import Reader
from jqcow.device.file import FileDevice
from jqcow.disks.chain import open_below
from jqcow.disks.policy import Following
from jqcow.disks.view import FileView
from jqcow.engine.scan import find_live_root
from jqcow.errors import CorruptionError, FormatError, PassphraseError, UnsupportedFeatureError
from jqcow.ondisk import keys, luks, naming
from jqcow.ondisk.frame import IntentOperation
from jqcow.ondisk.header import CRYPT_NONE
from jqcow.ondisk.keys import Passphrase, secret_for
from jqcow.ondisk.luks import LuksHeader
from jqcow.ondisk.sectors import SectorCipher
from jqcow.salvage.bare import shape_of
from jqcow.salvage.diagnosis import Diagnosis, describe
from jqcow.salvage.evidence import Certainty
from jqcow.salvage.others import Places
from jqcow.salvage.reading import Below
from jqcow.salvage.shape import Damage, Shape
from jqcow.salvage.source import Source
from jqcow.salvage.survey import Survey, survey

JOURNAL = "journal"


class ReplayedSource(Source):
    """A live image as it is after recovery, read around what the host cannot read."""

    def __init__(self, view: FileView, source: Source) -> None:
        """Show ``view``, which reads from ``source``."""
        super().__init__(source)
        self.view = view
        self.lay_over({offset: bytes(block) for offset, block in view.blocks.items()})
        self._size = view.size()
        self.bad = source.bad

    def pread(self, length: int, offset: int) -> bytes:
        """Return ``length`` bytes from ``offset``; what lies past the end, or is bad, reads as zeros."""
        return self.view.read(length, offset)


@dataclass
class Patient:
    """An image that is looked at.

    Attributes:
        path: of the file; nothing where it is a device of the caller's own.
        source: the file, as it is after recovery.
        shape: what it is read as.
        has_live_journal: it crashed while jqcow wrote to it.
        journal: where that lies, as a structure.
        intents: writes of the guest that it has, and the tables do not show, in their order.
        damages: what is wrong with it.
        identity: of the file, which its backing files must not be.
        started: when the look at it began, by `time.perf_counter`.
    """

    path: str
    source: Source
    shape: Shape
    has_live_journal: bool
    identity: tuple[int, int]
    journal: Places = field(default_factory=list)
    damages: list[Damage] = field(default_factory=list)
    started: float = 0.0
    intents: tuple[IntentOperation, ...] = ()

    def survey(self, snapshot: str | None = None) -> Survey:
        """Look at all structures; errors as `jqcow.salvage.survey.survey`."""
        found = survey(self.source, self.shape, snapshot, self.journal)
        self.shape = found.shape
        if snapshot is None:
            found.intents = self.intents or self.shape.intents
        if self.damages or any(each.structure == JOURNAL for each in self.shape.damages):
            found.ceiling = Certainty.LIKELY
        return found

    def diagnose(self, found: Survey) -> Diagnosis:
        """Return what a survey found."""
        return describe(
            found,
            image=self.path or None,
            has_live_journal=self.has_live_journal,
            damages=self.damages,
            started=self.started,
        )

    @contextmanager
    def below(self, following: Following) -> Iterator[Below | None]:
        """Open what the image names below itself; None where it names nothing.

        Raises:
            FileAccessDenied: that is not allowed.
            JqcowError, OSError: as `jqcow.disks.chain.open_below`.
        """
        named = naming.backing_file_of(self.shape.area, self.path)
        if named is None:
            yield None
            return
        with closing(open_below(named, [self.identity], following)) as chain:

            def read(length: int, offset: int) -> bytes:
                found = bytearray(length)
                count = min(length, max(0, chain.size - offset))
                chain.read_into(memoryview(found)[:count], offset)
                return bytes(found)

            yield read

    def cipher(self, passphrase: Passphrase | None) -> SectorCipher | None:
        """Return what decrypts the guest's data; None where it is not encrypted.

        Raises:
            PassphraseError: it is, and there is no passphrase; WrongPassphrase where it opens no key slot.
            JqcowError: the LUKS header is damaged, or not one that jqcow reads.
        """
        if self.shape.area.header.crypt_method == CRYPT_NONE:
            return None
        pointer = luks.pointer_of(self.shape.area)
        if pointer is None:
            raise UnsupportedFeatureError("AES encryption without LUKS")
        if passphrase is None:
            raise PassphraseError("the image is encrypted, and its passphrase is needed", self.path)
        header = LuksHeader.unpack(self.source.pread(luks.HEADER_BYTES, pointer.offset))
        header.validate(pointer.length)
        place = pointer.offset

        def read(length: int, offset: int) -> bytes:
            return self.source.pread(length, place + offset)

        _, key = keys.unlock(header, read, secret_for(passphrase, self.path), self.path)
        return SectorCipher(keys.form_of(header), key.reveal())


@contextmanager
def open_patient(image: str | os.PathLike[str], bad: Iterable[tuple[int, int]] = ()) -> Iterator[Patient]:
    """Open a file to look at it, locked against writers.

    Args:
        image: the file.
        bad: what of it is known not to be readable, as (offset, length).

    Raises:
        FormatError: nothing tells how to read it as an image.
        UnsupportedFeatureError: it has a feature that salvage does not know.
        ImageInUse: a writer has the file.
        OSError: the host failed, other than by what it cannot read.
    """
    with closing(FileDevice.open(image, writable=False)) as device:
        yield patient_on(device, os.fspath(image), device.identity(), bad)


def patient_on(
    reader: Reader, path: str, identity: tuple[int, int], bad: Iterable[tuple[int, int]] = ()
) -> Patient:
    """Look at an image on any reader; errors as `open_patient`."""
    started = time.perf_counter()
    source, damages, journal, is_live = Source(reader, bad), list[Damage](), Places(), False
    intents: tuple[IntentOperation, ...] = ()
    try:
        is_live = find_live_root(source, use_root_copy=True) is not None
        if is_live:
            view = FileView.of_file(source, use_root_copy=True)
            journal = [(JOURNAL, *place) for place in view.reserved]
            source, intents = ReplayedSource(view, source), view.intents
    except (CorruptionError, FormatError) as error:
        # A header that breaks the specification is for `shape_of`.
        if is_live:
            place = error.offset if isinstance(error, CorruptionError) else None
            damages.append(Damage(JOURNAL, place, f"{error}; what was flushed last may be missing"))
    shape = shape_of(source)
    if shape.journal is not None:
        journal = [(JOURNAL, shape.journal.offset, shape.journal.length)]
    return Patient(path, source, shape, is_live, identity, journal, damages, started, intents)
