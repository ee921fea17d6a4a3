"""Why jqcow and QEMU differ over a damaged image: each reason that is known, and how it is recognised.

A category explains a difference only where the image itself shows the damage that it names: a predicate looks
at the tables with `tests.differential.tables`, not at what jqcow says alone. What none explains is a failure.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from jqcow.checker.check import Kind
from jqcow.cli.common import EXIT_UNSUPPORTED
from tests.differential.evidence import Checking, Evidence, Reading
from tests.differential.tables import L1, OFFSET, Tables

INCOMPATIBLE_DIRTY = 1

BYTES = "other bytes"
ONLY_QEMU = "only QEMU reads"
ONLY_JQCOW = "only jqcow reads"
VERDICT = "other verdict"
NUMBERS = "other numbers"
INFO = "told otherwise"


@dataclass(frozen=True)
class Difference:
    """One difference: its aspect, what was seen, and the reading it is about, if it is about one."""

    aspect: str
    seen: str
    evidence: Evidence
    tables: Tables
    reading: Reading | None = None

    @property
    def checking(self) -> Checking:
        """What the checks said."""
        assert self.evidence.checking is not None
        return self.evidence.checking

    @property
    def l1(self) -> L1:
        """The L1 table of what was read."""
        assert self.reading is not None
        return self.tables.table_of(self.reading.snapshot) or self.tables.active

    @property
    def guest(self) -> int | None:
        """The guest offset that jqcow names in its refusal."""
        assert self.reading is not None
        found = re.search(r"it maps guest offset (0x[0-9a-f]+)", self.reading.ours.reason)
        return int(found[1], 16) if found else None


Predicate = Callable[[Difference], bool]


@dataclass(frozen=True)
class Category:
    """A reason for differences of one aspect: when it is there, and why jqcow does what it does."""

    aspect: str
    name: str
    why: str
    explains: Predicate


def explain(difference: Difference) -> Category | None:
    """Return the category that explains a difference, None where none does."""
    fitting = (found for found in CATEGORIES if found.aspect == difference.aspect)
    return next((found for found in fitting if found.explains(difference)), None)


# Other bytes


def _is_part_of_a_sector(difference: Difference) -> bool:
    reading = difference.reading
    assert reading is not None
    is_whole = not difference.l1.disk_bytes % 512 or reading.differing
    return not is_whole and reading.our_bytes - reading.their_bytes == difference.l1.disk_bytes % 512


def _is_of_another_size(difference: Difference) -> bool:
    reading, size = difference.reading, difference.tables.fields.size
    assert reading is not None
    is_of_each = reading.our_bytes == difference.l1.disk_bytes and reading.their_bytes == size // 512 * 512
    return (
        bool(reading.snapshot) and difference.l1.disk_bytes != size and is_of_each and not reading.differing
    )


def _clusters_that_recovery_changed(difference: Difference) -> list[int | None]:
    """Return the host clusters of the sectors that differ, None for what has none; only of a live image."""
    reading, tables = difference.reading, difference.tables
    assert reading is not None
    if difference.evidence.recovered is None or reading.our_bytes != reading.their_bytes:
        return [None]
    hosts = (tables.host_of(guest, difference.l1) for guest in reading.differing)
    return [None if host is None else host // tables.cluster_bytes for host in hosts]


def _is_freed_by_a_record(difference: Difference) -> bool:
    is_forged = any(part.startswith("frame_operations") for part in difference.evidence.case.story)
    complaint = difference.checking.theirs.complaint
    return is_forged and all(
        cluster is not None and f"cluster {cluster} refcount=0 reference=" in complaint
        for cluster in _clusters_that_recovery_changed(difference)
    )


def _is_overwritten_by_a_record(difference: Difference) -> bool:
    evidence, cluster_bytes = difference.evidence, difference.tables.cluster_bytes
    is_forged = any(part.startswith("frame_operations") for part in evidence.case.story)

    def was_written(cluster: int | None) -> bool:
        if cluster is None:
            return False
        place = slice(cluster * cluster_bytes, (cluster + 1) * cluster_bytes)
        return evidence.case.content[place] != evidence.content[place]

    return is_forged and all(map(was_written, _clusters_that_recovery_changed(difference)))


def _is_metadata_of_a_live_image(difference: Difference) -> bool:
    metadata = difference.tables.metadata()
    return Kind.OVERLAP in difference.checking.counts and all(
        cluster in metadata for cluster in _clusters_that_recovery_changed(difference)
    )


# Only QEMU reads


def _entry_is(words: str, *faults: str) -> Predicate:
    """jqcow refuses with these words, and the entry that it names is damaged like that."""

    def explains(difference: Difference) -> bool:
        assert difference.reading is not None
        guest = difference.guest
        if guest is None or not re.search(words, difference.reading.ours.reason):
            return False
        return bool(difference.tables.faults_at(guest, difference.l1) & set(faults))

    return explains


def _is_shared_table(difference: Difference) -> bool:
    assert difference.reading is not None
    found = re.search(r"the L2 table at (0x[0-9a-f]+) maps two guest ranges", difference.reading.ours.reason)
    return bool(found) and int(found[1], 16) in difference.tables.shared_tables(difference.l1)  # type: ignore[index]


def _is_lost_data(difference: Difference) -> bool:
    assert difference.reading is not None
    found = re.search(r"cluster at host offset (0x[0-9a-f]+): it holds data", difference.reading.ours.reason)
    if found is None or difference.tables.fields.incompatible & INCOMPATIBLE_DIRTY:
        return False
    place, size = int(found[1], 16), difference.tables.cluster_bytes
    leak = rf"^Leaked cluster {place // size} refcount=\d+ reference=0$"
    is_leaked = re.search(leak, difference.checking.theirs.complaint, re.MULTILINE) is not None
    if difference.checking.their_verdict == "errors" and not is_leaked:
        # QEMU follows damaged entries, too.
        is_leaked = place // size not in difference.tables.referenced()
    holds_data = any(difference.tables.content[place : place + size])
    tables = difference.tables
    return is_leaked and holds_data and (tables.has_hole() or tables.has_lost_table())


def _is_bad_name(difference: Difference) -> bool:
    assert difference.reading is not None
    if "backing file name" not in difference.reading.ours.reason:
        return False
    return _has_bad_name(difference.tables)


def _has_bad_name(tables: Tables) -> bool:
    fields = tables.fields
    name = tables.content[fields.backing_offset : fields.backing_offset + fields.backing_bytes]
    starts_early = 0 < fields.backing_offset < fields.header_bytes
    return bool(fields.backing_offset) and (starts_early or not name or b"\0" in name)


def _has_bad_header(tables: Tables) -> bool:
    """Return True if the header is one that the specification does not allow, or an extension is cut off."""
    fields = tables.fields
    if fields.header_bytes % 8 or fields.header_bytes < 72:
        return True
    end = min(fields.backing_offset or tables.cluster_bytes, len(tables.content))
    return any(kind and length > end - place - 8 for place, kind, length in tables.extensions())


def _has_bad_l1(tables: Tables) -> bool:
    place = tables.fields.l1_offset
    return bool(tables.fields.l1_size) and (place % tables.cluster_bytes != 0 or not 0 < place < 1 << 56)


def _is_bad_l1(difference: Difference) -> bool:
    assert difference.reading is not None
    return "L1 table at host offset" in difference.reading.ours.reason and _has_bad_l1(difference.tables)


def _is_bad_header(difference: Difference) -> bool:
    assert difference.reading is not None
    is_told = re.search(r"header_length|header extension .* exceeds", difference.reading.ours.reason)
    return bool(is_told) and _has_bad_header(difference.tables)


def _is_lost_data_below(difference: Difference) -> bool:
    assert difference.reading is not None
    found = re.search(r"cluster at host offset (0x[0-9a-f]+): it holds data", difference.reading.ours.reason)
    return found is not None and any(
        int(found[1], 16) // below.cluster_bytes not in below.referenced() | below.metadata()
        and any(below.content[int(found[1], 16) :][: below.cluster_bytes])
        for below in difference.tables.below()
    )


def _is_refused_by_name(difference: Difference) -> bool:
    assert difference.reading is not None
    return difference.reading.ours.status == EXIT_UNSUPPORTED


def _is_small_l1(difference: Difference) -> bool:
    assert difference.reading is not None
    span = difference.tables.per_table * difference.tables.cluster_bytes
    is_told = "entries are too few" in difference.reading.ours.reason
    return is_told and difference.l1.count * span < difference.l1.disk_bytes


def _is_in_the_journal(difference: Difference) -> bool:
    assert difference.reading is not None
    is_told = "is in the journal" in difference.reading.ours.reason
    return (
        is_told
        and difference.evidence.recovered is not None
        and Kind.RESERVED_RANGE in difference.checking.counts
    )


# Only jqcow reads


def _qemu_refuses(words: str) -> Predicate:
    """QEMU refuses with these words, and jqcow's check finds an error or says why it cannot check."""

    def explains(difference: Difference) -> bool:
        assert difference.reading is not None
        is_told = difference.checking.our_verdict in ("errors", "refused")
        return is_told and bool(re.search(words, difference.reading.theirs.complaint))

    return explains


def _has_marked_length(difference: Difference) -> bool:
    told = difference.reading.theirs if difference.reading is not None else difference.checking.theirs
    is_told = "Header extension too large" in told.complaint
    return is_told and any(not kind and length for _, kind, length in difference.tables.extensions())


# Other verdicts


def _verdicts(difference: Difference) -> tuple[str, str]:
    return difference.checking.our_verdict, difference.checking.their_verdict


def _is_refused_for_a_feature(difference: Difference) -> bool:
    checking, fields = difference.checking, difference.tables.fields
    is_told = checking.our_verdict == "refused" and checking.ours.status == EXIT_UNSUPPORTED
    return is_told and bool(fields.incompatible & ~0xB or fields.crypt_method)


def _is_refused_for_the_header(difference: Difference) -> bool:
    tables = difference.tables
    is_bad = _has_bad_header(tables) or _has_bad_name(tables) or _has_bad_l1(tables)
    return difference.checking.our_verdict == "refused" and is_bad


def _is_refused_for_the_snapshot_table(difference: Difference) -> bool:
    fields, checking = difference.tables.fields, difference.checking
    is_placed = fields.snapshots_offset and not fields.snapshots_offset % difference.tables.cluster_bytes
    is_told = "snapshot" in checking.ours.reason
    return (
        checking.our_verdict == "refused"
        and is_told
        and (not is_placed or _has_long_entry(difference.tables))
    )


def _has_long_entry(tables: Tables) -> bool:
    """Return True if a snapshot table is longer than QEMU opens, or an entry of it."""
    if tables.fields.snapshot_count > 65536:
        return True
    place = tables.fields.snapshots_offset
    extra = [int.from_bytes(tables.content[place + 36 : place + 40], "big")]
    return extra[0] > 1024 or len(list(tables.snapshots())) < tables.fields.snapshot_count


def _has_no_end_in_qemu(difference: Difference) -> bool:
    told = difference.reading.theirs if difference.reading is not None else difference.checking.theirs
    return told.status is None


def _is_data_cut_off(difference: Difference) -> bool:
    tables = difference.tables
    every = [tables.active, *(l1 for _, l1 in tables.snapshots())]
    is_missing = any(next(tables.missing(l1), None) is not None for l1 in every)
    return is_missing and Kind.PAST_END in difference.checking.counts


def _is_not_opened_by_qemu(difference: Difference) -> bool:
    return _verdicts(difference) == ("errors", "refused")


def _lacks_its_backing_file(difference: Difference) -> bool:
    checking = difference.checking
    is_told = re.search(r"backing file", checking.theirs.complaint)
    return checking.their_verdict == "refused" and bool(is_told and difference.tables.fields.backing_offset)


def _lacks_its_data_file(difference: Difference) -> bool:
    checking = difference.checking
    is_told = re.search(r"'data-file' is required|No such file", checking.theirs.complaint)
    return checking.their_verdict == "refused" and bool(is_told) and difference.tables.has_data_file


def _has_a_bitmap_with_extra_data(difference: Difference) -> bool:
    told = difference.reading.theirs if difference.reading is not None else difference.checking.theirs
    has_it = any(flags & 4 or extra_bytes for flags, extra_bytes in difference.tables.bitmaps())
    return has_it and "satisfy the constraints" in told.complaint


def _has_a_name_in_an_extension(difference: Difference) -> bool:
    fields = difference.tables.fields
    is_told = "Header extension too large" in difference.checking.theirs.complaint
    return is_told and fields.header_bytes < fields.backing_offset < fields.header_bytes + 8


def _lacks_its_passphrase(difference: Difference) -> bool:
    is_told = "key-secret" in difference.checking.theirs.complaint
    return is_told and difference.tables.fields.crypt_method == 2


def _is_counted_by_recovery(difference: Difference) -> bool:
    checking, settled = difference.checking, difference.evidence.settled
    if difference.evidence.recovered is None or settled is None or checking.report is None:
        return False
    mended = {Kind(kind) for kind, count in checking.counts.items() if settled.counts.get(kind, 0) < count}
    is_alike = (settled.corruptions, settled.leaks) == (checking.corruptions, checking.leaks)
    return is_alike and mended <= {Kind.REFCOUNT_TOO_LOW, Kind.COPIED_FLAG}


def _only(kind: Kind, *theirs: str) -> Predicate:
    """jqcow finds this, and nothing else that QEMU calls an error; QEMU has the same leaks."""

    def explains(difference: Difference) -> bool:
        checking, report = difference.checking, difference.checking.report
        if report is None or checking.their_verdict not in theirs or kind not in report.counts:
            return False
        leaks = report.counts.get(Kind.LEAK, 0) + report.lost
        return not report.corruptions and checking.leaks == leaks

    return explains


def _has_an_extension_twice(difference: Difference) -> bool:
    report = difference.checking.report
    if report is None or difference.checking.their_verdict not in ("clean", "leaks"):
        return False
    others = [found for found in report.findings if found.kind not in (Kind.LEAK, Kind.LOST_DATA)]
    return bool(others) and all("another one of its type follows" in found.detail for found in others)


# Other numbers: the same damage, counted in another way


def _qemu_told(difference: Difference, words: str) -> int:
    return len(re.findall(words, difference.checking.theirs.complaint, re.MULTILINE))


def _qemu_gave_up(difference: Difference) -> bool:
    return difference.checking.check_errors > 0


def _is_shared_refcount_block(difference: Difference) -> bool:
    report = difference.checking.report
    lines = _qemu_told(difference, r"ERROR refcount block \d+ refcount=")
    is_all = report is not None and difference.checking.corruptions == report.corruptions + lines
    return bool(lines) and is_all and Kind.OVERLAP in difference.checking.counts


def _is_unaligned(difference: Difference) -> bool:
    told = _qemu_told(difference, r"not properly aligned|not cluster aligned")
    return bool(told) and Kind.UNALIGNED in difference.checking.counts


def _has_flags_in_the_refcount_table(difference: Difference) -> bool:
    told = _qemu_told(difference, r"ERROR refcount table entry \d+ has reserved bits set")
    return bool(told) and Kind.RESERVED_BITS in difference.checking.counts


def _is_refcount_table_gone(difference: Difference) -> bool:
    fields, tables = difference.tables.fields, difference.tables
    end = fields.refcount_table_offset + fields.refcount_table_clusters * tables.cluster_bytes
    return Kind.NO_REFCOUNT_TABLE in difference.checking.counts or end > len(tables.content)


def _names_cluster_0(difference: Difference) -> bool:
    tables = difference.tables
    every = [tables.active, *(l1 for _, l1 in tables.snapshots())]
    return any(not entry & OFFSET for l1 in every for entry in tables.l1_entries(l1))


def _has_the_zero_flag_for_none(difference: Difference) -> bool:
    tables = difference.tables
    has_none = tables.fields.version < 3 or tables.is_extended
    return has_none and Kind.RESERVED_BITS in difference.checking.counts


def _has_subclusters_of_compressed_data(difference: Difference) -> bool:
    told = _qemu_told(difference, r"ERROR compressed cluster \d+ with non-zero subcluster allocation bitmap")
    return bool(told) and Kind.SUBCLUSTERS in difference.checking.counts


def _is_table_cut(difference: Difference) -> bool:
    report = difference.checking.report
    structures = ("header", "snapshot table entry")
    return report is not None and any(
        finding.kind == Kind.PAST_END and finding.structure in structures for finding in report.findings
    )


# Told otherwise


def _tells_unknown_bits(difference: Difference) -> bool:
    fields = difference.tables.fields
    unknown = fields.incompatible & ~0x1F | fields.compatible & ~1 | fields.autoclear & ~3
    return bool(unknown) and re.fullmatch(_UNKNOWN_BITS_ALONE, difference.seen) is not None


def _tells_of_snapshots(difference: Difference) -> bool:
    """Return True if the lists of snapshots alone are told otherwise."""
    return difference.seen.startswith("snapshots: ") and "; " not in difference.seen


def _has_a_name_with_nul(difference: Difference) -> bool:
    return _tells_of_snapshots(difference) and r"\x00" in difference.seen


def _has_a_damaged_snapshot_table(difference: Difference) -> bool:
    assert difference.reading is not None
    is_told = "snapshot table" in difference.reading.ours.complaint
    return is_told and _tells_of_snapshots(difference) and "snapshots: None, QEMU [" in difference.seen


_UNKNOWN_BITS_ALONE = r"unknown-features: .*, QEMU None"
_FOR_WRITING = r"[Rr]eference count table|[Ss]napshot|bitmaps_ext|Bitmap |extra metadata|bitmap directory"
_HEADER = r"CRYPTO header|data-file-raw|ext_backing_format|ompression type"

CATEGORIES = (
    Category(BYTES, "a size that is no multiple of 512",
             "jqcow reads the disk to its last byte, QEMU to its last whole sector", _is_part_of_a_sector),
    Category(BYTES, "a snapshot of a disk of another size",
             "jqcow shows that disk as large as it was, QEMU as large as it is now", _is_of_another_size),
    Category(BYTES, "guest data in a cluster of metadata, in a live image",
             "recovery writes the metadata; both checks find an error", _is_metadata_of_a_live_image),
    Category(BYTES, "a forged record frees what a table maps",
             "no program writes that; both checks find an error", _is_freed_by_a_record),
    Category(BYTES, "a forged record has a block for a cluster of data",
             "no program writes that; recovery puts the block in place", _is_overwritten_by_a_record),
    Category(ONLY_QEMU, "data or a table past the end of the file",
             "QEMU makes zeros of what is gone", _entry_is("lies past the end", "gone")),
    Category(ONLY_QEMU, "reserved bits in an entry",
             "the entry is noise, and so may be what it names",
             _entry_is("reserved bits|is not valid|zero flag|has subclusters", "invalid")),
    Category(ONLY_QEMU, "a compressed cluster with the COPIED flag",
             "no program writes that: a flag is wrong", _entry_is("compressed and COPIED", "copied")),
    Category(ONLY_QEMU, "an entry that names the header",
             "what lies there is no data", _entry_is("is not a cluster's", "header", "unaligned")),
    Category(ONLY_QEMU, "one L2 table named twice",
             "a disk could repeat without end; both guest ranges are named", _is_shared_table),
    Category(ONLY_QEMU, "lost data beside an empty or a lost table",
             "zeros would be wrong where a table was overwritten with zeros", _is_lost_data),
    Category(ONLY_QEMU, "the same in a backing file", "an overlay shows it", _is_lost_data_below),
    Category(ONLY_QEMU, "a backing file name that is empty, has a NUL, or lies in the header",
             "QEMU reads another file or none: other data", _is_bad_name),
    Category(ONLY_QEMU, "a header that the specification does not allow, or one cut off",
             "nothing vouches for the rest of it", _is_bad_header),
    Category(ONLY_QEMU, "an L1 table where none can be", "the header lies there, or nothing", _is_bad_l1),
    Category(ONLY_QEMU, "what jqcow refuses by name", "a feature or a format that it does not know",
             _is_refused_by_name),
    Category(ONLY_QEMU, "a snapshot's L1 table too small for its disk",
             "the rest of the disk is missing", _is_small_l1),
    Category(ONLY_QEMU, "an entry into the journal", "what lies there is no data", _is_in_the_journal),
    Category(ONLY_JQCOW, "refcount table, snapshot table or bitmaps that QEMU refuses",
             "the disk does not depend on them; the check finds an error", _qemu_refuses(_FOR_WRITING)),
    Category(ONLY_JQCOW, "a header extension that QEMU refuses",
             "the disk does not depend on it; the check finds an error", _qemu_refuses(_HEADER)),
    Category(ONLY_JQCOW, "a length at the end marker of the extensions",
             "nothing follows the marker; jqcow does not look at it", _has_marked_length),
    Category(ONLY_JQCOW, "a bitmap with extra data, or the flag for it",
             "the specification has them", _has_a_bitmap_with_extra_data),
    Category(ONLY_JQCOW, "an opening of QEMU's without end", "jqcow bounds its walks", _has_no_end_in_qemu),
    Category(VERDICT, "what jqcow refuses by name", "it cannot follow the tables", _is_refused_for_a_feature),
    Category(VERDICT, "a header that the specification does not allow, or a bad backing file name",
             "jqcow refuses it, with exit code 1", _is_refused_for_the_header),
    Category(VERDICT, "a snapshot table that cannot be where, or as long as, the image says",
             "jqcow refuses it, with exit code 1", _is_refused_for_the_snapshot_table),
    Category(VERDICT, "a check of QEMU's without end", "jqcow bounds its walks", _has_no_end_in_qemu),
    Category(VERDICT, "an image with errors that QEMU does not open",
             "jqcow says what is wrong, and checks the rest", _is_not_opened_by_qemu),
    Category(VERDICT, "a backing file that is not there", "no check needs it", _lacks_its_backing_file),
    Category(VERDICT, "a bitmap with extra data, or the flag for it",
             "the specification has them", _has_a_bitmap_with_extra_data),
    Category(VERDICT, "a data file that is not there", "no check needs it", _lacks_its_data_file),
    Category(VERDICT, "a backing file name in the head of the first extension",
             "jqcow finds no extension before it", _has_a_name_in_an_extension),
    Category(VERDICT, "an encrypted image without its passphrase",
             "tables are not encrypted, and no check needs it", _lacks_its_passphrase),
    Category(VERDICT, "a length at the end marker of the extensions",
             "nothing follows the marker; jqcow does not look at it", _has_marked_length),
    Category(VERDICT, "a header extension that stands twice",
             "each type may stand once; QEMU looks at none of the feature names", _has_an_extension_twice),
    Category(VERDICT, "compressed data cut off, by less than a cluster",
             "it cannot be read, by QEMU neither", _is_data_cut_off),
    Category(VERDICT, "metadata that shares its cluster, with a refcount that allows it",
             "one write to either destroys the other", _only(Kind.OVERLAP, "clean", "leaks")),
    Category(VERDICT, "data behind the last counted cluster, in a live image",
             "an error in its journal; recovery counts such data", _is_counted_by_recovery),
    Category(VERDICT, "leaks that look like lost data",
             "freeing them may free the only copy", _only(Kind.LOST_DATA, "leaks")),
    Category(VERDICT, "a snapshot's L1 table too small for its disk",
             "the rest of the disk is missing", _only(Kind.L1_TOO_SMALL, "clean", "leaks")),
    Category(VERDICT, "an entry into the journal",
             "recovery may write there", _only(Kind.RESERVED_RANGE, "clean", "leaks")),
    Category(VERDICT, "refcounts of clusters past the end of the file",
             "space that nothing uses: a leak", _only(Kind.LEAK_PAST_END, "clean")),
    Category(NUMBERS, "data behind the last counted cluster, in a live image",
             "an error in its journal; recovery counts such data", _is_counted_by_recovery),
    Category(VERDICT, "the zero flag in version 2, or with subclusters",
             "a reserved bit there; QEMU tells it only when it reads", _has_the_zero_flag_for_none),
    Category(NUMBERS, "a refcount block that shares its cluster",
             "one more error in QEMU", _is_shared_refcount_block),
    Category(NUMBERS, "a refcount block that QEMU cannot read",
             "QEMU ends its check early", _qemu_gave_up),
    Category(NUMBERS, "unaligned offsets",
             "one error; QEMU also counts what lies there", _is_unaligned),
    Category(NUMBERS, "reserved bits in the refcount table",
             "QEMU takes no other notice of such an entry", _has_flags_in_the_refcount_table),
    Category(NUMBERS, "no refcount table, or one past the end of the file",
             "one more error in jqcow", _is_refcount_table_gone),
    Category(NUMBERS, "an L1 entry that names the header",
             "one error; QEMU takes the header for an L2 table", _names_cluster_0),
    Category(NUMBERS, "the zero flag in version 2, or with subclusters",
             "a reserved bit there; QEMU tells it only when it reads", _has_the_zero_flag_for_none),
    Category(NUMBERS, "subclusters of compressed data",
             "one error; QEMU calls the data a leak", _has_subclusters_of_compressed_data),
    Category(NUMBERS, "compressed data cut off, by less than a cluster",
             "it cannot be read, by QEMU neither", _is_data_cut_off),
    Category(NUMBERS, "a table cut by less than a cluster",
             "an error in jqcow: entries are gone", _is_table_cut),
    Category(INFO, "unknown bits that hinder nobody", "QEMU has no field for them", _tells_unknown_bits),
    Category(INFO, "a snapshot whose name or id has a NUL", "QEMU shows it up to there",
             _has_a_name_with_nul),
    Category(INFO, "a damaged snapshot table", "jqcow warns, and lists none of it",
             _has_a_damaged_snapshot_table),
)  # fmt: skip
"""The documents have the same table: `tests/unit` compares them."""


def render() -> Iterator[str]:
    """Yield the lines of the tables for the documents."""
    for aspect in dict.fromkeys(category.aspect for category in CATEGORIES):
        yield f"| {aspect} | why |"
        yield "|---|---|"
        yield from (f"| {found.name} | {found.why} |" for found in CATEGORIES if found.aspect == aspect)
        yield ""
