"""Another format for an image that is open: checked first, then changed whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from jqcow.engine.amending import Amending
from jqcow.engine.recounting import Recounting
from jqcow.engine.tables import Tables
from jqcow.image.image import Image
from jqcow.ondisk import naming
from jqcow.ondisk import root as roots
from jqcow.ondisk.amendment import Amendment, AmendOptions
from jqcow.ondisk.form import flag
from jqcow.ondisk.header import AUTOCLEAR_DATA_FILE_RAW, EXTENSION_EXTERNAL_DATA, HeaderArea
from jqcow.ondisk.keys import Passphrase
from jqcow.ondisk.layout import HostOffset

Progress = Callable[[int, int], None]
"""Told how much is done, and how much there is."""


@dataclass(frozen=True)
class AmendReport:
    """What an amendment changed.

    Attributes:
        compat: it is another version now.
        lazy_refcounts: they are on, or off, and were not.
        refcount_bits: refcounts have another width now.
        size: the disk has another size now.
        data_file: the external data file has another name now.
        data_file_raw: it is no raw one any more.
        zero_clusters: so many entries lost a zero flag, which version 2 does not have.
    """

    compat: bool = False
    lazy_refcounts: bool = False
    refcount_bits: bool = False
    size: bool = False
    data_file: bool = False
    data_file_raw: bool = False
    zero_clusters: int = 0

    @property
    def changed(self) -> bool:
        """True if anything was changed."""
        of_file = self.data_file or self.data_file_raw
        return self.compat or self.lazy_refcounts or self.refcount_bits or self.size or of_file


def amend_image(
    image: Image,
    options: AmendOptions,
    progress: Progress = lambda done, total: None,
    passphrase: Passphrase | None = None,
) -> AmendReport:
    """Give an image that is open for writing, and in nobody else's use, another format; durable on return.

    The caller closes it next: what is open goes on by the old format. The ``passphrase`` is of an image that
    is still locked; zeros over a backing file are encrypted with it.

    Raises:
        PassphraseError: it is needed and does not fit; nothing is changed.
        ValueError: what no image can be, or not this one; nothing is changed.
        UnsupportedFeatureError: a refcount does not fit its new width, and the like; nothing is changed.
        CorruptionError: a table is damaged.
        OSError: the host failed. The image has its old format.
    """
    return _Amended(image, options).amend(progress, passphrase)


def _new_name(area: HeaderArea, name: str | None) -> str | None:
    """Return a name for the data file, None if it has that already, or is to keep the one it has."""
    if name is None:
        return None
    if not area.header.has_data_file:
        raise ValueError("data_file is for an image that has an external data file")
    # Also of a name that it has already: what cannot be followed is refused.
    naming.meaning_of(name, "")
    stored = area.find(EXTENSION_EXTERNAL_DATA)
    return None if stored is not None and stored.data == os.fsencode(name) else name


def _gives_up_raw(area: HeaderArea, options: AmendOptions) -> bool:
    """Return True if the data file is a raw one, and is not to be one any more."""
    is_raw = bool(area.header.autoclear_features & AUTOCLEAR_DATA_FILE_RAW) and area.header.has_data_file
    wanted = flag(options.get("data_file_raw", is_raw), "data_file_raw")
    if wanted and not is_raw:
        raise ValueError("data_file_raw cannot be set on an existing image")
    return is_raw and not wanted


class _Amended:
    """One amendment of one image."""

    def __init__(self, image: Image, options: AmendOptions) -> None:
        self._image = image
        self._lock, self._lifecycle = image._lock, image._engine.lifecycle
        self._tables = image._engine.public
        header = self._tables.view.header
        self._old = Amendment.of(header, {})
        self._new = Amendment.of(header, options)
        self._data_file = _new_name(self._tables.view.area, options.get("data_file"))
        self._gives_up_raw = _gives_up_raw(self._tables.view.area, options)
        self._converted = 0

    def amend(self, progress: Progress, passphrase: Passphrase | None) -> AmendReport:
        old, new = self._old, self._new
        if old == new and self._data_file is None and not self._gives_up_raw:
            return AmendReport()
        self._check()
        if self._loses_zero_flags and self._image.backing_file is not None and passphrase is not None:
            self._image._engine.unlock(passphrase)
        self._take_zero_flags(progress)
        with self._image.transaction() as transaction:
            if new.size_bytes != old.size_bytes:
                transaction.resize(new.size_bytes)
            transaction._operate(self._stage)
        return AmendReport(
            compat=new.version != old.version,
            lazy_refcounts=new.lazy_refcounts != old.lazy_refcounts,
            refcount_bits=new.refcount_order != old.refcount_order,
            size=new.size_bytes != old.size_bytes,
            data_file=self._data_file is not None,
            data_file_raw=self._gives_up_raw,
            zero_clusters=self._converted,
        )

    def _check(self) -> None:
        """Refuse what cannot be, before anything is changed."""
        old, new, tables = self._old, self._new, self._tables
        area, snapshots = tables.view.area, self._image.snapshots()
        new.require_place_for(area, snapshots)
        with self._lock:
            self._lifecycle.prepare_to_change()
            if new.version != old.version:
                amended = area.with_version(new.version)
                roots.check_room(amended.header, len(amended.data))
            if self._data_file is not None:
                naming.name_data_file(area, self._data_file)
            if new.version > old.version:
                # What is damaged in version 2 could be a zero flag in version 3.
                tables.snapshots.check_all_mapped()
            if new.refcount_order != old.refcount_order:
                Recounting(tables, new.refcount_order).check()

    # Zero flags

    @property
    def _loses_zero_flags(self) -> bool:
        return self._new.version < self._old.version

    def _take_zero_flags(self, progress: Progress) -> None:
        """Do most of the work in transactions of bounded size: each leaves the disk as it was."""
        if not self._loses_zero_flags:
            return
        with self._lock:
            left = self._amending(self._tables).l2_tables()
        total = len(left)
        left.reverse()
        while left:
            with self._image.transaction() as transaction:
                amending = self._amending(transaction._tables)
                while left and not transaction._is_large:
                    transaction._operate(partial(_convert_next, amending, left))
                    progress(total - len(left), total)
                # Once: it walks all tables.
                transaction._operate(partial(_finish, amending))
            self._converted += amending.converted

    def _amending(self, tables: Tables) -> Amending:
        return Amending(tables, self._image._engine.data)

    # The header

    def _stage(self, tables: Tables) -> None:
        old, new, amending = self._old, self._new, self._amending(tables)
        if self._loses_zero_flags:
            # A resize may have made some.
            for table in amending.l2_tables():
                amending.take_zero_flags(table)
            amending.set_copied_flags()
            self._converted += amending.converted
        if new.version > old.version:
            amending.set_version(new.version)
        if new.refcount_order != old.refcount_order:
            # Last of all that counts clusters.
            Recounting(tables, new.refcount_order).stage()
        if new.version < old.version:
            amending.set_version(new.version)
        if self._data_file is not None:
            tables.view.set_area(naming.name_data_file(tables.view.area, self._data_file))
        if self._gives_up_raw:
            amending.give_up_raw()
        if new.version > 2:
            amending.set_lazy_refcounts(lazy=new.lazy_refcounts)


def _convert_next(amending: Amending, left: list[HostOffset], _: Tables) -> None:
    amending.take_zero_flags(left.pop())


def _finish(amending: Amending, _: Tables) -> None:
    amending.set_copied_flags()
