"""The table of features: what it refuses, by which name, and that docs/format tells the same."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from jqcow.errors import UnsupportedFeatureError
from jqcow.ondisk import features
from jqcow.ondisk import header as headers
from jqcow.ondisk.blank import blank_image
from jqcow.ondisk.features import FEATURES, Use
from jqcow.ondisk.form import Form
from jqcow.ondisk.header import HeaderArea

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "format.md"
PLAIN = HeaderArea.parse(blank_image(1 << 20, Form(16)).parts[0][1])
USES: tuple[Use, ...] = ("read", "write", "check", "repair")


def announcing(**fields: int) -> HeaderArea:
    return replace(PLAIN, header=replace(PLAIN.header, **fields))


def incompatible(bits: int) -> HeaderArea:
    return announcing(incompatible_features=bits)


CASES = {
    "live journal": incompatible(headers.INCOMPATIBLE_JOURNAL),
    "snapshots and data file": announcing(
        incompatible_features=headers.INCOMPATIBLE_EXTERNAL_DATA, nb_snapshots=1
    ),
    "unknown incompatible bits": incompatible(1 << 20),
    "AES encryption": announcing(crypt_method=1),
    "unknown compression type": announcing(
        compression_type=2, incompatible_features=headers.INCOMPATIBLE_COMPRESSION
    ),
    "corrupt bit": incompatible(headers.INCOMPATIBLE_CORRUPT),
}


def documented() -> dict[str, tuple[str, str]]:
    """Return (reading, writing) of each feature that docs/format lists."""
    section = DOCUMENT.read_text(encoding="utf-8").split("\n## Features\n")[1].split("\n## ")[0]
    rows = [line.strip("|").split("|") for line in section.splitlines() if line.startswith("| ")][1:]
    return {cells[0].strip(): (cells[1].strip(), cells[2].strip()) for cells in rows}


def test_every_feature_has_a_case() -> None:
    assert list(CASES) == [feature.name for feature in FEATURES]


@pytest.mark.parametrize("feature", FEATURES, ids=lambda feature: feature.name)
@pytest.mark.parametrize("use", USES)
def test_what_is_refused_is_refused_by_name(feature: features.Feature, use: Use) -> None:
    if feature.allows(use):
        features.refuse(CASES[feature.name], use)
    else:
        with pytest.raises(UnsupportedFeatureError) as refused:
            features.refuse(CASES[feature.name], use)
        words = feature.find(CASES[feature.name])
        assert words is not None and refused.value.feature == words[0]


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize(
    "area",
    [
        PLAIN,
        incompatible(headers.INCOMPATIBLE_DIRTY),
        announcing(compression_type=1, incompatible_features=headers.INCOMPATIBLE_COMPRESSION),
        announcing(compatible_features=0xFF, autoclear_features=0xF0),
        incompatible(headers.INCOMPATIBLE_EXTENDED_L2),
        announcing(version=2),
        announcing(autoclear_features=headers.AUTOCLEAR_BITMAPS),
        announcing(crypt_method=headers.CRYPT_LUKS),
        incompatible(headers.INCOMPATIBLE_EXTERNAL_DATA),
    ],
    ids=[
        "nothing",
        "dirty bit",
        "compression type",
        "other bits",
        "extended L2 entries",
        "version 2",
        "bitmaps",
        "LUKS",
        "external data file",
    ],
)
def test_what_is_not_listed_hinders_nothing(area: HeaderArea, use: Use) -> None:
    features.refuse(area, use)


@pytest.mark.parametrize("announced", [0, headers.INCOMPATIBLE_COMPRESSION])
def test_a_compression_type_that_its_bit_contradicts_is_not_read(announced: int) -> None:
    area = announcing(compression_type=0 if announced else 1, incompatible_features=announced)
    with pytest.raises(UnsupportedFeatureError, match="compression type"):
        features.refuse(area, "read")


def test_a_name_ends_where_qemu_ends_it() -> None:
    """At the first zero byte; a last entry that is cut short counts, too."""
    names = b"\0\x3done\0 more".ljust(48, b"\0") + b"\0\x3etwo"
    area = announcing(incompatible_features=3 << 61)
    area = area.with_extension(
        headers.Extension(headers.EXTENSION_FEATURE_NAMES, names), autoclear_features=0
    )
    assert features.unknown_features(area) == ("bit 61 (one)", "bit 62 (two)")


@pytest.mark.parametrize(
    "feature",
    [feature for feature in FEATURES if feature.name not in ("live journal",)],
    ids=lambda feature: feature.name,
)
def test_the_document_tells_the_same(feature: features.Feature) -> None:
    (told,) = [cells for name, cells in documented().items() if name.startswith(feature.name)]
    for cell, allowed in zip(told, (feature.read, feature.write), strict=True):
        assert cell.startswith("yes" if allowed else "refused")
