"""Steps and stories of amendments: another version, another width of refcounts, lazy refcounts, another size.

amend:WHAT[:kill]           down, up, width, lazy or all; then the image is closed, or its user killed
"""

from __future__ import annotations

from jqcow.errors import UnsupportedFeatureError
from jqcow.image.amending import amend_image
from jqcow.ondisk.amendment import AmendOptions
from tests.crash.stories import turns
from tests.support import inside
from tests.support.expectation import State, extensions_of, form_of
from tests.support.operations import OPERATIONS, Disk, Operation, draw_resize
from tests.support.player import Player

WIDTHS = (1, 2, 4, 8, 16, 32, 64)


def amend(player: Player, what: str, end: str = "close") -> None:
    """Amend the image as a whole, or not at all; what is refused changes nothing."""
    amend_to(player, options_for(player, what), end)


def amend_to(player: Player, options: AmendOptions, end: str = "close") -> None:
    """Amend the image to what options say, as a whole or not at all."""
    session, expectation = player.session, player.session.expectation
    area = inside.header_of(session.live)
    before = form_of(area.header)
    session.flush()
    expectation.forms = (before, inside.form_after(area.header, options))
    for version in (2, 3):
        expectation.renamed += (extensions_of(area.with_version(version)),)
    refused = []

    def act(disk: Disk) -> None:
        try:
            amend_image(session.live, options)
        except (UnsupportedFeatureError, ValueError) as error:
            refused.append(error)
            raise UnsupportedFeatureError("what the image is to be") from error

    def change(state: State) -> None:
        if "size" in options:
            state.resize(options["size"])

    session.change_at_once(act, change)
    expectation.forms = expectation.forms[:1] if refused else expectation.forms[1:]
    if end == "kill":
        session.kill()
    else:
        session.close()


def options_for(player: Player, what: str) -> AmendOptions:
    """Return options that mean something for the image as it is."""
    header, random = inside.header_of(player.session.live).header, player.random
    if what == "down":
        return {"compat": "0.10", "refcount_bits": 16}
    options: AmendOptions = {"compat": "1.1"}
    if what in ("width", "all"):
        options["refcount_bits"] = random.choice([n for n in WIDTHS if n != 1 << header.refcount_order])
    if what in ("lazy", "all"):
        options["lazy_refcounts"] = not header.compatible_features & 1
    if what == "all":
        window, inside_bytes = map(int, draw_resize(player).arguments)
        options["size"] = window * player.windows.stride_bytes + inside_bytes
    return options


OPERATIONS |= {"amend": Operation(amend, None)}

VERSIONS = turns(2, "change:3:2 zeroes:2w%c:3c unmap:2w%c:2c amend:down change:3:2 amend:up change:2")
"""To version 2, which has no zero flags, and back."""

WIDTHS_IN_TURN = turns(3, "change:2:2 amend:{n}", "width", "all", "width") + " change:3:2"
"""Refcounts of other widths, alone and with all else."""

WITH_BITMAPS = turns(
    2,
    "amend:up bitmap change:2 bitmap note amend:{n} change:2:2 remove:0 remove:0 remove:0"
    " amend:down change:2",
    "width",
    "all",
)
"""Version 2 has no bitmaps: they come with version 3, and go before the image goes back."""

ENDED_BY_KILLS = turns(3, "change:2 unmap:2w%c:2c amend:{n}:kill open change:2 flush", "width", "down", "all")
"""The process is killed when the amendment is durable, before anything is home."""

FAILING = "open " + turns(
    4,
    "zeroes:2w%c:3c fail:call=pwrite|pwrite|barrier|allocate:at=1..9:applied=0|512|all{{ amend:{n} }}"
    " change:2:2",
    "width",
    "down",
    "all",
    "up",
)
"""A call of the host fails meanwhile; work goes on."""

ON_A_FULL_DISK = "open " + turns(
    3, "zeroes:2w%c:3c fail:full=1..9{{ amend:{n} }} change:2:2", "width", "down", "all"
)
"""The host's disk is full meanwhile."""
