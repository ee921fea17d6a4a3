"""What names inside images mean: QEMU's rules, refusals by name, and who is asked."""

from __future__ import annotations

import errno
import json
import os
import re
import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jqcow.disks.policy import require_allowed, stored_format
from jqcow.errors import FileAccessDenied, FormatError, JqcowError, UnsupportedFeatureError
from jqcow.ondisk import naming
from jqcow.ondisk.blank import blank_image
from jqcow.ondisk.form import Form
from jqcow.ondisk.header import EXTENSION_BACKING_FORMAT, EXTENSION_EXTERNAL_DATA, Extension, HeaderArea
from jqcow.ondisk.naming import NamedFile

PROTOCOLS = [
    ("json:{}", "json"),
    ("nbd:localhost:10809", "nbd"),
    ("nbd+unix:///disk?socket=x", "nbd+unix"),
    ("http://host/disk", "http"),
    ("rbd:pool/disk", "rbd"),
    ("iscsi://host/target/0", "iscsi"),
    ("ssh://host/disk", "ssh"),
    ("file:", "file"),
    ("a:b", "a"),
    (":x", ""),
]
PATHS = [
    ("base.qcow2", "images/overlay.qcow2", "images/base.qcow2"),
    ("base.qcow2", "overlay.qcow2", "base.qcow2"),
    ("../base", "a/b", "a/../base"),
    ("./a:b", "d/x", "d/./a:b"),
    ("a/b:c", "d/x", "d/a/b:c"),
    ("/abs/a:b", "d/x", "/abs/a:b"),
    ("base", "/top", "/base"),
    ("base", "a//b", "a//base"),
]


def area_with(name: bytes, backing_format: bytes | None = b"qcow2", cluster_bits: int = 16) -> HeaderArea:
    blank = HeaderArea.parse(blank_image(1 << 20, Form(cluster_bits)).parts[0][1])
    return HeaderArea.parse(blank.with_backing_file(name, backing_format).data)


@pytest.mark.parametrize(("name", "protocol"), PROTOCOLS)
def test_names_with_a_protocol_are_refused_by_it(name: str, protocol: str) -> None:
    assert naming.protocol_of(name) == protocol
    for attempt in (
        lambda: naming.resolve(name, "d/image"),
        lambda: naming.backing_file_of(area_with(name.encode()), "d/image"),
        lambda: blank_image(1 << 20, Form(16), backing_file=name, backing_format="raw"),
    ):
        with pytest.raises(UnsupportedFeatureError, match=f"'{protocol}:'".replace("+", r"\+")):
            attempt()


@pytest.mark.parametrize(("name", "image", "path"), PATHS)
def test_paths_are_relative_to_the_directory_of_the_image(name: str, image: str, path: str) -> None:
    assert naming.protocol_of(name) is None
    named = naming.backing_file_of(area_with(name.encode()), image)
    assert named == NamedFile(image, name, path, "qcow2")


@pytest.mark.parametrize(("name", "image", "path"), [case for case in PATHS if case[1] != "/top"])
def test_qemu_resolves_the_same_way(
    name: str, image: str, path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path(image).parent.mkdir(parents=True, exist_ok=True)
    create = ["qemu-img", "create", "-u", "-q", "-f", "qcow2", "-b", name, "-F", "qcow2", image, "1M"]
    subprocess.run(create, check=True)
    told = subprocess.run(["qemu-img", "info", "--output=json", image], check=True, capture_output=True)
    assert json.loads(told.stdout)["full-backing-filename"] == path
    area = HeaderArea.parse(Path(image).read_bytes())
    assert naming.backing_file_of(area, image) == NamedFile(image, name, path, "qcow2")


PLAIN = [
    ("file:base", "base", None),
    ("file:/abs/a:b", "/abs/a:b", None),
    ("file://abs", "//abs", None),
    ("file:file:base", "file:base", None),
    ('json:{"driver":"qcow2","file":{"driver":"file","filename":"d/base"}}', "d/base", "qcow2"),
    ('json:{"driver":"raw","file.driver":"file","file.filename":"base"}', "base", "raw"),
    ('json: {"file.filename":"/a\\u0062s"} ', "/abs", None),
    ('json:{"file":{"filename":"nbd://h"}}', "nbd://h", None),
    (
        'json:{"driver":"qcow2","node-name":"n","cache":{"direct":true},"read-only":true,'
        '"file":{"driver":"file","filename":"b","locking":"off","cache.no-flush":false}}',
        "b",
        "qcow2",
    ),
    ('json:{"encrypt.key-secret":"s0","driver":"qcow2","file.filename":"b"}', "b", "qcow2"),
    (
        'json:{"driver":"qcow2","encrypt":{"format":"luks","key-secret":"s"},"file":{"filename":"b"}}',
        "b",
        "qcow2",
    ),
]
FILE = '"file":{"driver":"file","filename":"/etc/passwd"}'
NO_PLAIN_FILE = [
    ("json:", "not JSON"),
    ("json:{}", "no file.filename"),
    ("json:[]", "no JSON object"),
    ('json:"x"', "no JSON object"),
    ("json:{'file.filename':'b'}", "not JSON"),
    ('json:{"file.filename":"b"} c', "not JSON"),
    ('json:{"file.filename":"b","x":NaN}', "NaN is not JSON"),
    ('json:{"file.filename":""}', "no file.filename"),
    ('json:{"file.filename":null}', "no file.filename"),
    ('json:{"file.filename":7}', "no file.filename"),
    ('json:{"file.filename":"a\\u0000b"}', "no name that a file can have"),
    ('json:{"file.filename":"\\ud800"}', "no name that a file can have"),
    ('json:{"file.filename":"\udcff"}', "no name that a file can have"),
    ('json:{"driver":"file","filename":"/etc/passwd"}', "driver 'file'"),
    (f'json:{{"driver":"vmdk",{FILE}}}', "driver 'vmdk'"),
    (f'json:{{"driver":"blkdebug","image":{{{FILE}}}}}', "driver 'blkdebug'"),
    (f'json:{{"driver":null,{FILE},"driver":"raw"}}', "'driver' comes twice"),
    (f'json:{{"driver":"raw",{FILE},"file.filename":"b"}}', "'file.filename' comes twice"),
    (f'json:{{"driver":"raw","offset":512,{FILE}}}', "'offset' may change"),
    (f'json:{{"driver":"raw","size":"512",{FILE}}}', "'size' may change"),
    (f'json:{{"driver":"qcow2","backing":null,{FILE}}}', "'backing' may change"),
    (f'json:{{"driver":"qcow2","backing":{{}},{FILE}}}', "'backing' may change"),
    (f'json:{{"driver":"qcow2","data-file":{{{FILE}}},{FILE}}}', "'data-file.file.driver' may change"),
    (f'json:{{"driver":"qcow2","file":{{"driver":"raw",{FILE}}}}}', "driver 'raw' reads no plain file"),
    ('json:{"driver":"raw","file":{"driver":"nbd","host":"h"}}', "driver 'nbd' reads no plain file"),
    ('json:{"driver":"raw","file":"node"}', "'file' may change"),
    ('json:{"file.filename":["b"]}', "no file.filename"),
    ("json:" + "[" * 4096, "nested more than 8"),
    ("json:" + '{"a":' * 700, "nested more than 8"),
    ("json:" + '{"a":"' + "x" * 4096, "more than 4096 characters"),
    ("json:" + "9" * 4000, "no JSON object"),
    ("json:" + '"' * 4095, "not JSON"),
]


@pytest.mark.parametrize(("name", "path", "told"), PLAIN)
def test_some_protocols_name_plain_files(name: str, path: str, told: str | None) -> None:
    assert naming.meaning_of(name, "d/image") == naming.Meaning(path, told)
    for stored in (told or "raw", None):
        named = naming.backing_file_of(area_with(name.encode(), stored and stored.encode()), "d/image")
        assert named == NamedFile("d/image", name, path, stored or told)


@pytest.mark.parametrize(("name", "reason"), NO_PLAIN_FILE)
def test_options_that_name_no_plain_file_are_refused(name: str, reason: str) -> None:
    with pytest.raises(UnsupportedFeatureError, match="the protocol 'json:'") as refused:
        naming.meaning_of(name, "d/image")
    assert reason in str(refused.value)


def test_a_name_and_the_header_must_not_contradict() -> None:
    name = PLAIN[4][0]
    for attempt in (
        lambda: naming.backing_file_of(area_with(name.encode(), b"raw"), "d/image"),
        lambda: blank_image(1 << 20, Form(16), backing_file=name, backing_format="raw"),
    ):
        with pytest.raises(UnsupportedFeatureError, match="format 'raw' and driver 'qcow2'"):
            attempt()


def data_area(name: bytes) -> HeaderArea:
    blank = HeaderArea.parse(blank_image(1 << 20, Form(16)).parts[0][1])
    data = blank.data[:112] + Extension(EXTENSION_EXTERNAL_DATA, name).pack() + bytes(8)
    return HeaderArea.parse(data[:72] + (4).to_bytes(8, "big") + data[80:])


def test_names_of_data_files_are_judged_alike() -> None:
    assert naming.data_file_of(HeaderArea.parse(blank_image(1 << 20, Form(16)).parts[0][1]), "d/i") is None
    named = naming.data_file_of(data_area(b"disk.raw"), "d/i")
    assert named == NamedFile("d/i", "disk.raw", "disk.raw", "raw", "data")
    for name, protocol in PROTOCOLS:
        with pytest.raises(UnsupportedFeatureError, match=re.escape(f"the protocol '{protocol}:'")):
            naming.data_file_of(data_area(name.encode()), "d/i")
        with pytest.raises(UnsupportedFeatureError, match=re.escape(f"the protocol '{protocol}:'")):
            naming.name_data_file(data_area(b"disk.raw"), name)
    for hostile, match in ((b"a\0b", "data file name has a NUL"), (b"", "data file name is empty")):
        with pytest.raises(FormatError, match=match):
            naming.data_file_of(data_area(hostile), "d/i")


def test_another_name_for_a_data_file() -> None:
    renamed = naming.name_data_file(data_area(b"disk.raw"), "file:other/disk.raw")
    named = naming.data_file_of(HeaderArea.parse(renamed.data), "d/i")
    assert named == NamedFile("d/i", "file:other/disk.raw", "other/disk.raw", "raw", "data")
    with pytest.raises(ValueError, match="has no external data file"):
        naming.name_data_file(HeaderArea.parse(blank_image(1 << 20, Form(16)).parts[0][1]), "disk.raw")


@pytest.mark.parametrize(
    ("name", "match"), [(b"", "empty"), (b"a\0b", "NUL"), (b"x" * 1024, "1024 bytes, more than 1023")]
)
def test_names_that_no_file_has(name: bytes, match: str) -> None:
    with pytest.raises(FormatError, match=match):
        naming.decode_name(name)


def test_any_other_bytes_are_a_name() -> None:
    named = naming.backing_file_of(area_with(b"\xff\n\xfe"), "d/i")
    assert named is not None
    assert named.path == "d/\udcff\n\udcfe"


@given(st.binary(min_size=1, max_size=1023), st.binary(max_size=20))
def test_hostile_names_give_a_name_or_a_jqcow_error(name: bytes, backing_format: bytes) -> None:
    area = area_with(name, backing_format)
    try:
        named = naming.backing_file_of(area, "images/disk")
        assert named is not None and named.path
        stored_format(named, probe=True)
    except JqcowError:
        pass


def test_formats() -> None:
    for stored, known in ((b"raw", "raw"), (b"qcow2", "qcow2"), (b"", None), (None, None)):
        named = naming.backing_file_of(area_with(b"base", stored), "i")
        assert named is not None
        assert stored_format(named, probe=True) == known
    for stored in (b"vmdk", b"QCOW2", b"host_device", b"\xff", b"raw\0"):
        named = naming.backing_file_of(area_with(b"base", stored), "i")
        assert named is not None
        with pytest.raises(UnsupportedFeatureError, match="of base, the backing file of i"):
            stored_format(named, probe=True)


def test_no_backing_file() -> None:
    assert naming.backing_file_of(HeaderArea.parse(blank_image(1 << 20, Form(16)).parts[0][1]), "i") is None


def test_the_policy_decides() -> None:
    named = NamedFile("d/i", "base", "d/base", "raw")
    asked: list[NamedFile] = []

    def only_base(file: NamedFile) -> bool:
        asked.append(file)
        return file.path == "d/base"

    assert require_allowed(named, True) is named
    judged = require_allowed(named, only_base)
    assert asked == [named] and judged.real_path == asked[0].real_path == os.path.realpath("d/base")
    for policy in (False, lambda _: False):
        with pytest.raises(FileAccessDenied) as denied:
            require_allowed(named, policy)
        assert isinstance(denied.value, PermissionError) and denied.value.errno == errno.EACCES
        told = (denied.value.image, denied.value.purpose, denied.value.name, denied.value.path)
        assert told == ("d/i", "backing", "base", "d/base")
        for words in ("d/i", "'base'", "'d/base'", "--allow-files", "allow_files"):
            assert words in str(denied.value)


# Names to be stored


def test_a_name_is_stored_and_removed() -> None:
    area = HeaderArea.parse(blank_image(1 << 20, Form(16)).parts[0][1])
    named = naming.name_backing_file(area, "bäse", "raw")
    assert named.backing_file_name == "bäse".encode()
    assert named.find(EXTENSION_BACKING_FORMAT) == Extension(EXTENSION_BACKING_FORMAT, b"raw")
    bare = naming.name_backing_file(named, None, None)
    assert bare.backing_file_name is None and not bare.extensions


@pytest.mark.parametrize(
    ("name", "backing_format", "match"),
    [
        ("base", None, "format"),
        ("base", "vmdk", "vmdk"),
        (None, "raw", "needs a backing file"),
        ("", "raw", "empty"),
        ("a\0b", "raw", "NUL"),
        ("x" * 1024, "raw", "1024"),
        ("ä" * 512, "raw", "1024"),
    ],
)
def test_what_cannot_be_stored(name: str | None, backing_format: str | None, match: str) -> None:
    area = HeaderArea.parse(blank_image(1 << 20, Form(16)).parts[0][1])
    with pytest.raises(ValueError, match=match):
        naming.name_backing_file(area, name, backing_format)
    with pytest.raises(ValueError, match=match):
        blank_image(1 << 20, Form(16), backing_file=name, backing_format=backing_format)


@pytest.mark.parametrize(("other_bytes", "fits"), [(2936, True), (2944, False)])
def test_the_header_stays_within_what_the_journal_holds(other_bytes: int, fits: bool) -> None:
    # The fixed fields take 112 bytes, the format 16, the end of the list 8, the name 1023.
    blank = HeaderArea.parse(blank_image(1 << 20, Form(16)).parts[0][1])
    other = Extension(0x1234, b"x" * (other_bytes - 8)).pack()
    area = HeaderArea.parse(blank.data[:112] + other + bytes(8))
    if fits:
        assert len(naming.name_backing_file(area, "n" * 1023, "raw").data) == 4095
        return
    with pytest.raises(UnsupportedFeatureError, match="4096"):
        naming.name_backing_file(area, "n" * 1023, "raw")
