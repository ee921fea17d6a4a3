"""What a mutant is, and the names by which the parts of the engine are patched."""

from __future__ import annotations

from tests.support.patches import Number, Patch, skipping

AMENDING = "jqcow.engine.amending:Amending"
NEW_CONTENT = "jqcow.device.targets:NewContent"
NATIVE = "jqcow._native"
FRAME = "jqcow.ondisk.frame"
MEDIUM = "jqcow.engine.medium:Medium"
BLOCKS = "jqcow.engine.metadata:Blocks"
VIEW = "jqcow.engine.metadata:View"
CHANGES = "jqcow.engine.metadata:ChangeSet"
COMMITS = "jqcow.engine.commit:Commits"
ENCRYPTED_DATA = "jqcow.engine.guestdata:EncryptedData"
GUARD = "jqcow.engine.request:Guard"
JOURNAL = "jqcow.engine.journal:Journal"
KEY_SLOTS = "jqcow.engine.keyslots:KeySlots"
LEAVE_TO_ONE = "jqcow.engine.write:leave_to_one"
CLOSING = "jqcow.engine.closing:Closing"
LIFECYCLE = "jqcow.engine.lifecycle:Lifecycle"
JOURNAL_MODULE = "jqcow.engine.journal"
LOG_MODULE = "jqcow.engine.log"
LOG = "jqcow.engine.log:Log"
MAPPING = "jqcow.engine.mapping:Mapping"
MAPPING_EDITOR = "jqcow.engine.mapping:MappingEditor"
OPERATION = "jqcow.engine.tables:Operation"
PACKED = "jqcow.engine.packed:PackedWrites"
PREALLOCATING = "jqcow.engine.preallocating:Preallocating"
PRIVATE = "jqcow.engine.transaction:PrivateChanges"
RECOUNTING = "jqcow.engine.recounting:Recounting"
REFCOUNTS = "jqcow.engine.refcounts:Refcounts"
ALLOCATION = "jqcow.engine.refcounts:Allocation"
REFCOUNTS_MODULE = "jqcow.engine.refcounts"
READS = "jqcow.engine.read:Reads"
ROOT = "jqcow.engine.root:Root"
SNAPSHOTS = "jqcow.engine.snapshots:Snapshots"
SPACE = "jqcow.engine.space:Space"
TABLES = "jqcow.engine.tables:Tables"
TRACKING = "jqcow.engine.tracking:Tracking"
TRACKING_MODULE = "jqcow.engine.tracking"
PRIVATE_MARKS = "jqcow.engine.tracking:PrivateMarks"
REGION = "jqcow.engine.tracking:Region"
BITMAPS = "jqcow.engine.bitmaps:Bitmaps"
UNDO_MODULE = "jqcow.disks.undo"
UNDO_HEADER = "jqcow.ondisk.undo:UndoHeader"
VACATED = "jqcow.engine.vacated:VacatedPlaces"
TURN = "jqcow.engine.commit:Turn"
PLACES = "jqcow.engine.places:Places"
DESTAGING = "jqcow.engine.destaging:Destaging"
DESTAGING_MODULE = "jqcow.engine.destaging"
SMALL_WRITES = "jqcow.engine.destaging:SmallWrites"
PENDING = "jqcow.engine.pending:Pending"
REQUESTS = "jqcow.engine.request:Requests"
DATA_FILE = "jqcow.engine.datafile:DataFile"
RESIZING = "jqcow.engine.resizing:Resizing"
WRITES = "jqcow.engine.write:Writes"
ZEROING = "jqcow.engine.zeroing:Zeroing"
PLANNING = "jqcow.engine.planning:Planning"
KNOWN_SUMS = "jqcow.image.known_sums:KnownSums"
PROTECTION = "jqcow.image.protection:ImageProtection"
REFRESH = "jqcow.image.refreshing:Refresh"
REFRESHING_MODULE = "jqcow.image.refreshing"
FRONTIER = "jqcow.engine.frontier:Frontier"


class Mutant:
    """A rule and what is done without it, the patches that do so, and the trials of which one must break."""

    def __init__(self, name: str, *patches: Patch | Number, trials: tuple[str, ...]) -> None:
        self.name = name
        self.rule = name.partition("-")[0]
        self.patches = patches
        self.trials = trials


def seeds(family: str, count: int) -> tuple[str, ...]:
    """Return the first workloads of a family."""
    return tuple(f"{family}/{seed}" for seed in range(count))


def without_barrier(name: str) -> Patch:
    """Leave out a barrier."""
    return skipping(f"{MEDIUM}.barrier", only=lambda medium, barrier, **_: barrier == name)
