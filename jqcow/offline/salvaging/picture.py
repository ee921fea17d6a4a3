"""A picture of a damaged image: its file and its disk, as two maps of a few thousand cells.

A cell has the colour of what it holds most of; what is rare and matters, such as what cannot be read, has a
strip of its own however little of it there is. Resting on a cell tells its offsets and shares.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterator
from dataclasses import dataclass
from html import escape

from jqcow.errors import printable
from jqcow.ondisk.layout import SECTOR_BYTES, round_up, table_bytes
from jqcow.salvage.amounts import amounts_of
from jqcow.salvage.diagnosis import Diagnosis
from jqcow.salvage.marks import MANY, STRUCTURE
from jqcow.salvage.survey import Survey
from jqcow.salvage.tables import DiskTables

COLUMNS, ROWS_MAX = 64, 40
CELL, GAP, LEFT, WIDTH = 14, 1, 92, 1072
PANEL_HEAD = 96
DAMAGES_LISTED = 200
_UNITS = ("B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB")
_ROW = CELL + GAP

Shares = dict[str, int]
"""How many bytes of a cell are of each kind."""


@dataclass(frozen=True)
class Kind:
    """What a cell can hold: its colour, what it is called, and whether little of it is shown, too."""

    name: str
    colour: str
    text: str
    is_notable: bool = False


HOST_KINDS = (
    Kind("header", "#111111", "header", is_notable=True),
    Kind("tables", "#009e73", "tables"),
    Kind("gone", "#7a0c0c", "a table that is lost", is_notable=True),
    Kind("refcounts", "#7a8a99", "refcounts"),
    Kind("other", "#7d5ba6", "snapshots, bitmaps, keys", is_notable=True),
    Kind("data", "#4a90c2", "data"),
    Kind("orphan", "#e69f00", "in use, and no table names it", is_notable=True),
    Kind("double", "#cc3d8f", "used twice", is_notable=True),
    Kind("bad", "#d5310a", "cannot be read", is_notable=True),
    Kind("free", "#e9ecef", "free, or a hole"),
)
GUEST_KINDS = (
    Kind("certain", "#2b6ca3", "certain"),
    Kind("likely", "#8fc3e8", "likely", is_notable=True),
    Kind("guess", "#f2d64b", "a guess", is_notable=True),
    Kind("zero", "#c3cbd2", "zeros"),
    Kind("below", "#e9ecef", "not allocated"),
    Kind("lost", "#d5310a", "lost", is_notable=True),
)


@dataclass(frozen=True)
class Panel:
    """A map: cells of ``step`` bytes from offset 0 on, up to ``size``."""

    title: str
    size: int
    step: int
    cells: list[Shares]
    kinds: tuple[Kind, ...]

    @property
    def rows(self) -> int:
        """How many rows of cells it has."""
        return -(-len(self.cells) // COLUMNS)

    @property
    def height(self) -> int:
        """Of the whole panel."""
        return PANEL_HEAD + self.rows * _ROW + 24


def step_for(size: int, unit: int) -> int:
    """Return the length of a cell: ``unit`` times a power of two, so that a map has no more than it may."""
    step = unit
    while -(-size // step) > COLUMNS * ROWS_MAX:
        step *= 2
    return step


def host_panel(survey: Survey) -> Panel:
    """Return the map of the file."""
    cluster_bytes, size = survey.shape.geometry.cluster_bytes, survey.source.size()
    step = step_for(size, cluster_bytes)
    tables = sorted({offset for tables in _all_tables(survey) for offset in tables.offsets if offset})
    refcounts = _refcount_places(survey)
    others = sorted((offset, round_up(length, cluster_bytes)) for _, offset, length in survey.others.places)
    cells = []
    for start in range(0, size, step):
        end = min(size, start + step)
        cells.append(_host_cell(survey, start, end, tables, refcounts, others))
    return Panel("The file", size, step, cells, HOST_KINDS)


def _all_tables(survey: Survey) -> list[DiskTables]:
    return [survey.tables, *survey.snapshot_tables]


def _refcount_places(survey: Survey) -> list[tuple[int, int]]:
    header, cluster_bytes = survey.shape.area.header, survey.shape.geometry.cluster_bytes
    table = header.refcount_table_offset, header.refcount_table_clusters * cluster_bytes
    return sorted([table, *((block, cluster_bytes) for block in survey.unnamed.blocks)])


def _within(places: list[tuple[int, int]], start: int, end: int) -> int:
    """Return how many bytes of places, in order and apart, lie in [start, end)."""
    index = max(0, bisect.bisect_left(places, (start, 0)) - 1)
    total = 0
    for offset, length in places[index:]:
        if offset >= end:
            break
        total += max(0, min(end, offset + length) - max(start, offset))
    return total


def _host_cell(
    survey: Survey,
    start: int,
    end: int,
    tables: list[int],
    refcounts: list[tuple[int, int]],
    others: list[tuple[int, int]],
) -> Shares:
    geometry, header = survey.shape.geometry, survey.shape.area.header
    cluster_bytes, bits = geometry.cluster_bytes, geometry.cluster_bits
    first, stop = start >> bits, -(-end >> bits)
    named, many, structures = _marked(survey.guest_map.marks.data, first, stop)
    orphans = _bits_in(survey.unnamed.bits.data, first, stop)
    l1_bytes = round_up(table_bytes(header.l1_size), cluster_bytes)
    l1 = _within([(header.l1_table_offset, l1_bytes)], start, end)
    l2 = (bisect.bisect_left(tables, end) - bisect.bisect_left(tables, start)) * cluster_bytes
    counted, other = _within(refcounts, start, end), _within(others, start, end)
    head = cluster_bytes if not start else 0
    found = {
        "header": head,
        "tables": l1 + l2,
        # Their clusters are known for structures; no L1 entry names them any more.
        "gone": max(0, structures * cluster_bytes - head - l1 - l2 - counted - other),
        "refcounts": counted,
        "other": other,
        "data": named * cluster_bytes,
        "double": many * cluster_bytes,
        "orphan": orphans * cluster_bytes,
        "bad": sum(length for _, length in survey.source.bad.within(start, end - start)),
    }
    found["free"] = max(0, end - start - sum(found.values()))
    return {name: min(length, end - start) for name, length in found.items() if length > 0}


def _marked(marks: bytearray, first: int, stop: int) -> tuple[int, int, int]:
    """Return how many clusters are named once, by several, and are a structure's."""
    number = int.from_bytes(marks[first // 4 : -(-stop // 4)], "little") >> first % 4 * 2
    number &= (1 << (stop - first) * 2) - 1
    low = int.from_bytes(b"\x55" * (-(-(stop - first) // 4) + 1), "little")
    ones, twos = number & low, number >> 1 & low
    structures = (ones & twos).bit_count()
    if MANY != 2 or STRUCTURE != 3:
        raise RuntimeError("marks are read by their bits")
    return ones.bit_count() - structures, twos.bit_count() - structures, structures


def _bits_in(data: bytearray, first: int, stop: int) -> int:
    number = int.from_bytes(data[first >> 3 : (stop + 7) >> 3], "little") >> (first & 7)
    return (number & (1 << stop - first) - 1).bit_count()


def guest_panel(survey: Survey) -> Panel:
    """Return the map of the disk."""
    size = survey.guest_map.size
    step = step_for(size, max(SECTOR_BYTES, survey.shape.geometry.cluster_bytes))
    cells = []
    for start in range(0, size, step):
        amounts = amounts_of(survey.guest_map, start, step).capped(survey.ceiling)
        cells.append({name: length for name, length in vars(amounts).items() if length})
    name = survey.tables.name
    return Panel("The disk" if name == "disk" else f"The disk of {name}", size, step, cells, GUEST_KINDS)


# Drawing


def draw(survey: Survey, diagnosis: Diagnosis) -> str:
    """Return the picture as SVG."""
    panels = [host_panel(survey), guest_panel(survey)]
    height = 64 + sum(panel.height for panel in panels)
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}" '
        f'viewBox="0 0 {WIDTH} {height}" font-family="system-ui, sans-serif" font-size="12" fill="#222">',
        f'<rect width="{WIDTH}" height="{height}" fill="#fff"/>',
        f'<text x="{LEFT}" y="34" font-size="19" font-weight="600">{_text(_title(diagnosis))}</text>',
    ]
    top = 52
    for panel in panels:
        lines += _panel_lines(panel, top)
        top += panel.height
    return "\n".join([*lines, "</svg>", ""])


def _title(diagnosis: Diagnosis) -> str:
    state = {"damaged": "damaged", "live": "crashed, not damaged", "clean": "not damaged"}[diagnosis.state]
    name = (diagnosis.image or "image").rpartition("/")[2]
    return f"{name}: {state}"


def _panel_lines(panel: Panel, top: int) -> Iterator[str]:
    name = f"{panel.title}: {_size(panel.size)}, a cell is {_size(panel.step)}"
    yield f'<text x="{LEFT}" y="{top + 18}" font-size="15" font-weight="600">{_text(name)}</text>'
    yield from _legend(panel, top + 30)
    grid = top + PANEL_HEAD - 12
    for row in range(panel.rows):
        if row % 4 == 0:
            place = _size(row * COLUMNS * panel.step)
            yield (
                f'<text x="{LEFT - 8}" y="{grid + row * _ROW + CELL - 3}" text-anchor="end" '
                f'fill="#555">{_text(place)}</text>'
            )
    for column in range(0, COLUMNS, 16):
        place = "+" + _size(column * panel.step)
        x = LEFT + column * _ROW
        yield f'<text x="{x}" y="{grid - 4}" fill="#888" font-size="10">{_text(place)}</text>'
    for index, cell in enumerate(panel.cells):
        yield from _cell_lines(panel, index, cell, grid)


def _legend(panel: Panel, top: int) -> Iterator[str]:
    totals = {kind.name: sum(cell.get(kind.name, 0) for cell in panel.cells) for kind in panel.kinds}
    place, row = LEFT, 0
    for kind in panel.kinds:
        text = f"{kind.text}: {_size(totals[kind.name])}"
        width = 26 + 7 * len(text)
        if place + width > WIDTH:
            place, row = LEFT, row + 1
        y = top + row * 18
        yield f'<rect x="{place}" y="{y}" width="11" height="11" rx="2" fill="{kind.colour}"/>'
        faint = "" if totals[kind.name] else ' fill="#999"'
        yield f'<text x="{place + 16}" y="{y + 10}"{faint}>{_text(text)}</text>'
        place += width


def _cell_lines(panel: Panel, index: int, cell: Shares, grid: int) -> Iterator[str]:
    start = index * panel.step
    end = min(panel.size, start + panel.step)
    row, column = divmod(index, COLUMNS)
    x, y = LEFT + column * _ROW, grid + row * _ROW
    colours = {kind.name: kind for kind in panel.kinds}
    most = max(cell, key=lambda name: cell[name], default=panel.kinds[-1].name)
    shares = ", ".join(
        f"{colours[name].text} {_percent(cell[name], end - start)}"
        for name in sorted(cell, key=lambda name: -cell[name])
    )
    yield f"<g><title>{_text(f'{start:#x} to {end:#x}: {shares}')}</title>"
    yield f'<rect x="{x}" y="{y}" width="{CELL}" height="{CELL}" fill="{colours[most].colour}"/>'
    reached = y + CELL
    for name in (kind.name for kind in panel.kinds if kind.is_notable):
        if name in cell and name != most:
            height = max(3, round(CELL * cell[name] / (end - start)))
            reached = max(y, reached - height)
            colour = colours[name].colour
            yield f'<rect x="{x}" y="{reached}" width="{CELL}" height="{height}" fill="{colour}"/>'
    yield "</g>"


def _percent(part: int, whole: int) -> str:
    share = 100 * part / whole
    return f"{share:.0f} %" if share >= 1 else "less than 1 %"


def _size(length: int) -> str:
    unit, value = 0, float(length)
    while value >= 1024 and unit < len(_UNITS) - 1:
        value, unit = value / 1024, unit + 1
    return f"{value:.4g} {_UNITS[unit]}"


def _text(text: str) -> str:
    return escape(printable(text))


def draw_page(survey: Survey, diagnosis: Diagnosis) -> str:
    """Return the picture as an HTML page, with a list of damages below."""
    rows = "".join(
        f"<tr><td>{_text(each.structure)}<td>{_place(each.host_offset)}<td>{_text(each.meaning)}"
        f"<td>{_place(each.guest_offset)}<td>{_size(each.guest_length) if each.guest_length else ''}"
        for each in diagnosis.damages[:DAMAGES_LISTED]
    )
    head = "<tr><th>damaged<th>host offset<th>what is wrong<th>guest offset<th>length"
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f"<title>{_text(_title(diagnosis))}</title>"
        "<style>body{margin:24px auto;max-width:1100px;font-family:system-ui,sans-serif;color:#222}"
        "table{border-collapse:collapse;font-size:13px}td,th{padding:4px 10px;text-align:left;"
        "border-bottom:1px solid #ddd}"
        "svg{max-width:100%;height:auto}g:hover rect{stroke:#000;stroke-width:1}</style></head><body>\n"
        f"{draw(survey, diagnosis)}<table>{head}{rows}</table></body></html>\n"
    )


def _place(offset: int | None) -> str:
    return "" if offset is None else f"{offset:#x}"
