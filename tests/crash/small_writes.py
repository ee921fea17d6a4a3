"""Stories of small writes that wait in the journal: see `jqcow.engine.destaging`."""

from __future__ import annotations

from tests.crash.stories import turns

_LIVE = "open unmap:0:c write:0:s flush"
"""A change of the tables makes the image live: from here on small writes wait."""

_SMALL = "write:w%s:s write:w%s:2s write:w+w%s:s"

LOGGED = f"""{_LIVE} {turns(3, f"{_SMALL} flush")} look close
    {_LIVE} {_SMALL} flush flush {_SMALL} checkpoint {_SMALL} close"""
"""Small writes and flushes; at the end they are brought home."""

_OVER = "v=w%s write:v:2s flush write:v:s write:v+s:s write:v:s flush write:v:2s"
OVER_EACH_OTHER = f"{_LIVE} {turns(3, _OVER)} flush close"
"""The same sectors again and again: in a record, in the next, and in none."""

_PARTS = "v=w%s write:v:s flush write:v+7:9 {n} write:v:s 0.5{{ flush }} write:v+s-9:20 flush"
PARTS_OF_SECTORS = f"{_LIVE} {turns(4, _PARTS, '', 'flush')} close"
"""Parts of sectors, which do not wait, and whole ones."""

MIXED = (
    f"{_LIVE} "
    + turns(
        8,
        f"{_SMALL} 0.7{{{{ flush }}}} {{n}} 0.5{{{{ flush }}}}",
        "write:0:w",
        "v=w%s write:v:3s+7 write:v:s",
        "discard:0:c",
        "zeroes:0:w/2",
        "change:2:1",
        "packed:0:c",
        "fua:w%s:s zeroes:w%s:s",
        "write:w/2:2c",
    )
    + " close"
)
"""Other changes of the same places: before, in between and after."""

EPOCHS = f"{_LIVE} {turns(16, f'{_SMALL} flush')} write:w:w flush {turns(4, f'{_SMALL} flush')} close"
"""So many flushes that the journal's halves are filled in turn."""

KILLED = (
    turns(3, f"{_LIVE} {_SMALL} flush {_SMALL} kill open look {_SMALL} flush 0.5{{{{ change flush }}}} kill")
    + """
    open look close"""
)
"""The writer is killed; the next one goes on with what waits, and is killed too."""

FAILS = (
    f"{_LIVE} "
    + turns(
        6,
        "fail:error=EIO|ENOSPC:applied=0|512|4096|all:call=pwrite|pwrite|allocate|punch|truncate:at=1..5{{"
        f" {_SMALL} flush {_SMALL} checkpoint }}}} {_SMALL} flush",
    )
    + " close"
)
"""Calls of the host fail while small writes are logged and brought home; work goes on each time."""

_LATE = f"fail:call=barrier:at=1..5{{{{ {_SMALL} flush {_SMALL} checkpoint change flush }}}} change:2:2"
BARRIER_FAILS = f"open {turns(3, _LATE)} close"
"""Barriers fail; the next opening recovers."""

DISK_FULL = (
    f"{_LIVE} {_SMALL} flush fail:full=1..12{{ {_SMALL} flush change:4:2 checkpoint }} {_SMALL} flush close"
)
"""The host's disk is full for a while, and then is not."""

MOVES = f"{_LIVE} {_SMALL} flush outgrow:10 {_SMALL} flush {_SMALL} kill open {_SMALL} outgrow:10 flush close"
"""The journal moves while small writes wait in it."""

TRANSACTIONS = (
    f"{_LIVE} "
    + turns(
        4, f"{_SMALL} 0.5{{{{ flush }}}} begin change:2 {{n}} flush", "commit", "rollback", "grow:4 commit"
    )
    + " snapshot write:0:s flush delete:0 close"
)
"""User transactions between small writes."""
