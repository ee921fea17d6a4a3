"""The mixed workload on a real file, in a process whose system calls somebody makes fail.

    python -m tests.crash.traced IMAGE

IMAGE holds the bytes of `start`. The process does the same work three times. In the first two it may meet
one error of the host: it shows that the image stays right, and goes on. It prints the errno, or "none".
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from random import Random

import jqcow
from jqcow.testing import FaultPlan, SimulatedDevice
from tests.crash.stories import MIXED
from tests.support.player import Player
from tests.support.starts import Start, full_image
from tests.support.users import JOURNAL_BYTES, Session

CLUSTER_BYTES = 4096


@dataclass
class FileSession(Session):
    """A session on the file ``path``; the device of a session is not used."""

    path: str = ""
    met: str = "none"

    def new_image(self) -> jqcow.Image:
        """Open the file for writing."""
        return jqcow.open(self.path, "r+", journal_size=JOURNAL_BYTES)

    def close(self) -> None:
        """Close: a promise like a flush."""
        with self._promise():
            self.live.close()
        self.image = None

    def look(self) -> None:
        """Look again where the one error came while looking: it has changed nothing."""
        try:
            super().look()
        except OSError as error:
            self.met = str(error.errno)
            super().look()


def start() -> Start:
    """Return what the workload starts from, the same in every process."""
    return full_image(CLUSTER_BYTES, Random("traced"))


def main() -> int:
    """Run; raises what breaks a promise."""
    session = FileSession(SimulatedDevice(), start().expectation(), written=1 << 16, path=sys.argv[1])
    player = Player(session, Random(0))
    for _ in range(2):
        with session.faults(FaultPlan()):
            try:
                player.play(MIXED)
            except OSError as error:
                session.met = str(error.errno)
                raise
    player.play(MIXED)
    session.open()
    session.look()
    session.close()
    print(session.met)
    return 0


if __name__ == "__main__":
    sys.exit(main())
