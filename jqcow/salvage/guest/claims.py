"""What orphans say of their own place, gathered before any of it is believed.

A cluster whose blocks name different places is in none of them, and where several clusters name one place
none of them is there with certainty: one of them is a copy, and nothing in it says which.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

from jqcow.salvage.evidence import Certainty, Orphans, PlacedDisk, Placement


class Window:
    """An orphan and the orphans right behind it in the file, for structures longer than a cluster."""

    def __init__(self, host_offset: int, content: bytes, behind: deque[tuple[int, bytes]]) -> None:
        self.host_offset = host_offset
        self.content = content
        self._behind = behind

    def read(self, start: int, length: int) -> bytes | None:
        """Return bytes from an offset in the orphan on; None where the file does not go on with orphans."""
        if start + length <= len(self.content):
            return self.content[start : start + length]
        parts, got, expected = [self.content], len(self.content), self.host_offset
        for host_offset, content in self._behind:
            expected += len(self.content)
            if host_offset != expected or got >= start + length:
                break
            parts.append(content)
            got += len(content)
        return b"".join(parts)[start : start + length] if got >= start + length else None


def windows(orphans: Orphans, ahead_bytes: int) -> Iterator[Window]:
    """Yield each orphan with at least that many bytes of what lies behind it, in one pass."""
    ahead = -(-ahead_bytes // orphans.cluster_bytes)
    queue: deque[tuple[int, bytes]] = deque()
    for item in orphans:
        queue.append(item)
        if len(queue) > ahead:
            host_offset, content = queue.popleft()
            yield Window(host_offset, content, queue)
    while queue:
        host_offset, content = queue.popleft()
        yield Window(host_offset, content, queue)


@dataclass(frozen=True)
class Word:
    """What a structure gives for its place.

    Attributes:
        certainty: that it was where it says, if nothing speaks against it.
        witness: the structure's name.
        age: grows with time among the structures of one file system; 0 if they do not tell.
    """

    certainty: Certainty
    witness: str
    age: int = 0

    def joined(self, other: Word) -> Word:
        """Return what two structures of a cluster say together."""
        surer = self if self.certainty >= other.certainty else other
        return Word(surer.certainty, surer.witness, max(self.age, other.age))


class Claims:
    """Where clusters say that they belong, and what it comes to together."""

    def __init__(self, cluster_bytes: int) -> None:
        self._cluster_bytes = cluster_bytes
        self._by_host: dict[int, tuple[int, Word] | None] = {}

    def say(self, host_offset: int, guest_offset: int, length: int, word: Word) -> None:
        """Take a structure's word that host bytes are guest bytes.

        It may start anywhere in a cluster and go on over clusters that lie behind each other.
        """
        inside = host_offset % self._cluster_bytes
        host, guest = host_offset - inside, guest_offset - inside
        for step in range(0, inside + length, self._cluster_bytes):
            self._note(host + step, guest + step, word)

    def _note(self, host: int, guest: int, word: Word) -> None:
        known = self._by_host.get(host, (guest, word))
        if known is None or known[0] != guest or guest < 0 or guest % self._cluster_bytes:
            self._by_host[host] = None
        else:
            self._by_host[host] = (guest, known[1].joined(word))

    def placements(self, disk: PlacedDisk, at_most: Certainty) -> Iterator[Placement]:
        """Yield what is claimed once as surely as it was said, and the newest of several as likely.

        Nothing is yielded for a place that the disk has bytes for already, or that lies past its end.
        """
        places: dict[int, list[tuple[int, int, Word]]] = {}
        for host, claim in self._by_host.items():
            if claim is not None:
                guest, word = claim
                places.setdefault(guest, []).append((word.age, host, word))
        for guest, said in places.items():
            length = min(self._cluster_bytes, disk.size - guest)
            if length <= 0 or disk.read(guest, min(length, 512)) is not None:
                continue
            _, host, word = max(said, key=lambda one: one[:2])
            alone = Certainty.CERTAIN if len(said) == 1 else Certainty.LIKELY
            yield Placement(guest, host, length, min(word.certainty, at_most, alone), word.witness)
