"""Where the data of some guest clusters lies, for reads and writes that need ask no table.

Most requests are short, and go where others went before: a look into a table costs them several times what
the host takes. What a plan has found is remembered here until metadata changes.

Q4. A place is known only as long as no metadata has changed since the tables told it: an operation begins by
    forgetting all, and so does whoever shows a record's content to everybody. A place to write is one that a
    plan would write in place (write.py, W1), in an image without subclusters, encryption or data file.
"""

from __future__ import annotations

from jqcow.ondisk.layout import HostOffset

CLUSTERS_MAX = 1 << 16
"""So many are known at a time: it bounds memory (about 10 MiB)."""


class KnownPlaces:
    """Host offsets of whole guest clusters of data, by their numbers. The lock is held by the caller."""

    def __init__(self) -> None:
        self.to_read: dict[int, HostOffset] = {}
        self.to_write: dict[int, HostOffset] = {}

    def forget(self) -> None:
        """Metadata changes (Q4)."""
        if self.to_read or self.to_write:
            self.to_read.clear()
            self.to_write.clear()

    def learn_to_read(self, cluster: int, host: int) -> None:
        """A guest cluster within the disk is data at ``host``."""
        if len(self.to_read) >= CLUSTERS_MAX:
            self.to_read.clear()
        self.to_read[cluster] = HostOffset(host)

    def learn_to_write(self, cluster: int, host: int) -> None:
        """A guest cluster within the disk may be overwritten at ``host``."""
        if len(self.to_write) >= CLUSTERS_MAX:
            self.to_write.clear()
        self.to_write[cluster] = HostOffset(host)
