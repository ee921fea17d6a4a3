"""The writer, as a process of its own: one line on its standard output for each acknowledged batch."""

from __future__ import annotations

import sys
from pathlib import Path

import jqcow
from demo.plan import Plan, write_batches


def main(arguments: list[str]) -> None:
    """Turn the disk of IMAGE from OLD into NEW, in the order of SEED, beginning with batch FIRST."""
    image_path, old_path, new_path, seed, first_batch = arguments
    plan = Plan.between(Path(old_path), Path(new_path), int(seed))
    with jqcow.open(image_path, "r+") as image:
        write_batches(image, plan, int(first_batch), lambda: print("acknowledged", flush=True))


if __name__ == "__main__":
    main(sys.argv[1:])
