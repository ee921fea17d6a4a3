"""Random requests from several clients, against a byte array, with kills of the server in between.

    python -m tests.model.clients [--rounds N] [--clients N] [--requests N] [--seed SEED]

Each client has stretches of the disk of its own, interleaved with those of the others, and keeps up to 16
requests in flight. What it reads must be what it wrote. A round ends with a kill, or a stop, of the server;
the image is opened again, recovered, and judged sector by sector: what a flush, or FUA, acknowledged is
there, and what was written since is old or new. QEMU's check finds nothing.

Prints what it did; exit status 1, and the seed, where something is wrong.
"""

from __future__ import annotations

import argparse
import random
import signal
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

import jqcow
from tests.support import nbd
from tests.support.nbd import Answer, Client, Served, connected
from tests.support.qemu import complaint

SECTOR = 512
STRETCH = 64 * SECTOR
"""Neighbours of it are another client's: clusters have several writers."""


class Wrong(Exception):
    """A promise is broken."""


@dataclass
class Sectors:
    """What the sectors of a disk may hold: the durable content, and what was written since, oldest first.

    Writes are numbered as they are sent.
    """

    durable: dict[int, bytes] = field(default_factory=dict)
    since: dict[int, list[tuple[int, bytes]]] = field(default_factory=dict)
    number: int = 0

    def write(self, sector: int, data: bytes) -> None:
        self.number += 1
        self.since.setdefault(sector, []).append((self.number, data))

    def newest(self, sector: int) -> bytes:
        return self.since[sector][-1][1] if sector in self.since else self.durable.get(sector, bytes(SECTOR))

    def flushed(self, marks: dict[int, int]) -> None:
        """All writes of a sector up to its mark are durable."""
        for sector, mark in marks.items():
            for number, data in self.since.pop(sector, []):
                if number <= mark:
                    self.durable[sector] = data
                else:
                    self.since.setdefault(sector, []).append((number, data))

    def check(self, sector: int, found: bytes) -> None:
        allowed = [self.durable.get(sector, bytes(SECTOR)), *(data for _, data in self.since.get(sector, []))]
        if found not in allowed:
            raise Wrong(f"sector {sector} holds {found[:16]!r}, and may hold {[one[:16] for one in allowed]}")
        self.durable[sector] = found
        self.since.pop(sector, None)


@dataclass
class Asked:
    """A request in flight."""

    command: int
    first: int
    count: int
    fua: bool
    data: bytes = b""
    marks: dict[int, int] = field(default_factory=dict)


class Player(threading.Thread):
    """One client, in a thread: asks at random, and looks at every answer."""

    def __init__(self, number: int, clients: int, where: str, size: int, requests: int, seed: int) -> None:
        super().__init__()
        self.random = random.Random(seed)
        self.where = where
        self.requests = requests
        self.stretches = list(range(number * STRETCH, size - STRETCH + 1, clients * STRETCH))
        self.sectors = Sectors()
        self.error: BaseException | None = None
        self.done = 0
        self.depth = self.random.choice((1, 4, 16))
        self.form = self.random.choice(({"structured": False}, {}, {"extended": True}))

    def run(self) -> None:
        try:
            with connected(self.where, **self.form) as client:
                self.play(client)
        except (ConnectionError, TimeoutError):
            # The server was killed. What was asked for last may be done, or not.
            return
        except BaseException as error:
            self.error = error

    def play(self, client: Client) -> None:
        asked: dict[int, Asked] = {}
        left = self.requests
        while left or asked:
            while left and len(asked) < self.depth:
                left -= 1
                request = self.draw(asked)
                if request is not None:
                    self.send(client, request, asked)
            if asked:
                cookie, answer = client.answer()
                self.judge(asked.pop(cookie), answer)
                self.done += 1

    def draw(self, asked: dict[int, Asked]) -> Asked | None:
        """Return a request for sectors that none in flight is about; None if the draw has no luck."""
        command = self.random.choices(
            (nbd.READ, nbd.WRITE, nbd.ZEROES, nbd.TRIM, nbd.FLUSH, nbd.CACHE), (8, 10, 2, 1, 2, 1)
        )[0]
        if command == nbd.FLUSH:
            return Asked(command, 0, 0, fua=False)
        start = self.random.choice(self.stretches) // SECTOR
        count = self.random.choice((1, 1, 3, 8, 64))
        first = start + self.random.randrange(64 - count + 1)
        if any(first < one.first + one.count and one.first < first + count for one in asked.values()):
            return None
        fua = command in (nbd.WRITE, nbd.ZEROES) and self.random.random() < 0.15
        return Asked(command, first, count, fua)

    def send(self, client: Client, request: Asked, asked: dict[int, Asked]) -> None:
        flags = nbd.FUA if request.fua else 0
        numbers = range(request.first, request.first + request.count)
        if request.command == nbd.WRITE:
            request.data = b"".join(self.random.randbytes(16) * 32 for _ in numbers)
        elif request.command == nbd.ZEROES:
            request.data = bytes(request.count * SECTOR)
            flags |= self.random.choice((0, nbd.NO_HOLE))
        for at, number in enumerate(numbers if request.data else ()):
            self.sectors.write(number, request.data[at * SECTOR : (at + 1) * SECTOR])
        if request.fua:
            request.marks = dict.fromkeys(numbers, self.sectors.number)
        if request.command == nbd.FLUSH:
            # It covers what was answered by now: of each sector the last write may be in flight.
            busy = {
                number
                for one in asked.values()
                if one.data
                for number in range(one.first, one.first + one.count)
            }
            request.marks = {
                number: written[-1][0] - (number in busy) for number, written in self.sectors.since.items()
            }
        data = request.data if request.command == nbd.WRITE else b""
        length = 0 if data else request.count * SECTOR
        cookie = client.ask(request.command, request.first * SECTOR, length, data, flags)
        asked[cookie] = request

    def judge(self, request: Asked, answer: Answer) -> None:
        if answer.error:
            raise Wrong(f"{request.command} of {request.count} sectors at {request.first}: {answer}")
        numbers = range(request.first, request.first + request.count)
        if request.command == nbd.READ:
            expected = b"".join(map(self.sectors.newest, numbers))
            if answer.data != expected:
                raise Wrong(f"a read of {request.count} sectors at {request.first} shows something else")
        elif request.marks:
            self.sectors.flushed(request.marks)


@dataclass
class Played:
    """What a run came to."""

    rounds: int = 0
    requests: int = 0
    kills: int = 0


def play(folder: Path, *, seed: int, rounds: int, clients: int, requests: int, size: int = 8 << 20) -> Played:
    """Play some rounds on a new image.

    Raises:
        Wrong: a promise is broken.
    """
    drawn = random.Random(seed)
    path = folder / "disk.qcow2"
    # A trim covers no whole cluster, so it changes nothing: what it does is the other models' business.
    jqcow.create(path, size, cluster_size=drawn.choice((65536, 1 << 20)), overwrite=True).close()
    played, known = Played(), [Sectors() for _ in range(clients)]
    for _ in range(rounds):
        server = Served("-t", "-k", folder / "socket", path)
        players = [
            Player(number, clients, str(folder / "socket"), size, requests, drawn.getrandbits(64))
            for number in range(clients)
        ]
        for player, sectors in zip(players, known, strict=True):
            player.sectors = sectors
            player.start()
        kills = drawn.random() < 0.7
        if kills:
            time.sleep(drawn.uniform(0.05, 0.6))
            server.end(signal.SIGKILL)
        for player in players:
            player.join()
        if not kills and server.end(signal.SIGTERM) != 0:
            raise Wrong("a server that was asked to stop failed")
        for player in players:
            if player.error is not None:
                raise player.error
        played.rounds, played.kills = played.rounds + 1, played.kills + kills
        played.requests += sum(player.done for player in players)
        judge(path, known, clean=not kills)
    return played


def judge(path: Path, known: list[Sectors], *, clean: bool) -> None:
    """Recover the image, and compare every sector that anybody wrote."""
    with jqcow.open(path, "r+") as image:
        if clean and image.recovered is not None:
            raise Wrong("a server that stopped left a crashed image")
        for sectors in known:
            for sector in {*sectors.durable, *sectors.since}:
                if clean:
                    sectors.durable[sector] = sectors.newest(sector)
                    sectors.since.pop(sector, None)
                sectors.check(sector, image.pread(SECTOR, sector * SECTOR))
    told = complaint(path)
    if told:
        raise Wrong(told)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--requests", type=int, default=1000, help="of each client in a round")
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        try:
            played = play(
                Path(folder),
                seed=arguments.seed,
                rounds=arguments.rounds,
                clients=arguments.clients,
                requests=arguments.requests,
            )
        except Wrong as error:
            print(f"seed {arguments.seed}: {error}")
            return 1
    print(f"{played.requests} requests in {played.rounds} rounds, {played.kills} kills: nothing wrong")
    return 0


if __name__ == "__main__":
    sys.exit(main())
