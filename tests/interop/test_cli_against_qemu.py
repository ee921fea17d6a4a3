"""Do jqcow's commands say of an image what qemu-img says, on images made by both?"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import jqcow
from jqcow.cli import main, recover
from tests.interop.commands import plain
from tests.support.patients import Patient
from tests.support.qemu import qemu_io, run

MIB = 1 << 20

WRITER = """
import os, signal, sys, jqcow
image = jqcow.create(sys.argv[1], 16 << 20, cluster_size=int(sys.argv[2]))
for index in range(40):
    image.pwrite(bytes([index + 1]) * 9000, index * 300_000)
    image.flush()
image.write_zeroes(1 << 20, 1 << 20)
image.pwrite(b"not flushed" * 9999, 13 << 20)
os.kill(os.getpid(), signal.SIGKILL)
"""


def qemu(*arguments: object, codes: tuple[int, ...] = (0,)) -> str:
    result = run("qemu-img", *arguments)
    assert result.returncode in codes, result.stdout + result.stderr
    return result.stdout


def ours(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str]:
    capsys.readouterr()
    code = main.main([str(argument) for argument in arguments])
    return code, capsys.readouterr().out


def make_by_jqcow(path: Path, cluster_size: int) -> None:
    with jqcow.create(path, 10 * MIB, cluster_size=cluster_size) as image:
        write_here_and_there(image)


def write_here_and_there(image: jqcow.Image) -> None:
    image.pwrite(b"a" * MIB, 0)
    image.pwrite(b"b" * 70_000, 7 * MIB + 123)
    image.write_zeroes(200_000, 64 * 1024, unmap=False)
    image.write_zeroes(100_000, 512 * 1024, unmap=True)
    image.discard(128 * 1024, 768 * 1024)


def make_by_qemu(path: Path, cluster_size: int) -> None:
    qemu("create", "-q", "-f", "qcow2", "-o", f"cluster_size={cluster_size}", path, "10M")
    qemu_io(
        path,
        "write -P 1 0 1M",
        "write -P 2 7M 70k",
        "write -z 64k 192k",
        "write -z -u 512k 64k",
        "discard 768k 128k",
    )


def make_both(path: Path, cluster_size: int) -> None:
    make_by_qemu(path, cluster_size)
    with jqcow.open(path, "r+") as image:
        image.pwrite(b"c" * 100_000, 3 * MIB)
    qemu_io(path, "write -P 3 5M 64k")


def make_empty(path: Path, cluster_size: int) -> None:
    jqcow.create(path, MIB + 512, cluster_size=cluster_size).close()


def make_by_convert(path: Path, cluster_size: int) -> None:
    other = path.with_suffix(".raw")
    other.write_bytes((b"x" * 5000 + bytes(70_000)) * 40)
    code = main.main(
        [
            "convert",
            "-q",
            "-f",
            "raw",
            "-O",
            "qcow2",
            "-o",
            f"cluster_size={cluster_size}",
            str(other),
            str(path),
        ]
    )
    assert code == 0


def make_compressed(path: Path, cluster_size: int) -> None:
    plain = path.with_suffix(".plain")
    make_by_qemu(plain, cluster_size)
    qemu("convert", "-c", "-O", "qcow2", "-o", f"cluster_size={cluster_size}", plain, path)
    qemu_io(path, "write -P 4 2M 64k")


def make_version_2(path: Path, cluster_size: int) -> None:
    qemu("create", "-q", "-f", "qcow2", "-o", f"compat=0.10,cluster_size={cluster_size}", path, "10M")
    qemu_io(path, "write -P 1 1M 300k")


def make_preallocated(path: Path, cluster_size: int) -> None:
    options = f"preallocation=metadata,cluster_size={cluster_size}"
    qemu("create", "-q", "-f", "qcow2", "-o", options, path, "10M")
    qemu_io(path, "write -P 1 1M 300k")


def make_lazy(path: Path, cluster_size: int) -> None:
    options = f"lazy_refcounts=on,compression_type=zstd,cluster_size={cluster_size}"
    qemu("create", "-q", "-f", "qcow2", "-o", options, path, "10M")


MAKERS = [
    make_by_jqcow, make_by_qemu, make_both, make_empty, make_preallocated,
    make_by_convert, make_compressed, make_version_2, make_lazy,
]  # fmt: skip


@pytest.fixture(params=[4096, 65536])
def cluster_size(request: pytest.FixtureRequest) -> int:
    size: int = request.param
    return size


@pytest.fixture(params=MAKERS, ids=lambda maker: maker.__name__)
def image(request: pytest.FixtureRequest, tmp_path: Path, cluster_size: int) -> Path:
    path = tmp_path / "disk.qcow2"
    make: Callable[[Path, int], None] = request.param
    make(path, cluster_size)
    return path


def test_json_is_that_of_qemu_img(image: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for command in ("info", "check"):
        code, told = ours(capsys, command, "--output=json", image)
        assert code == 0
        theirs = json.loads(qemu(command, "--output=json", image))
        theirs.pop("children", None)
        assert json.loads(told) == theirs
    code, told = ours(capsys, "map", "--output=json", image)
    assert plain(json.loads(told)) == plain(json.loads(qemu("map", "--output=json", image)))


def test_human_reports_are_those_of_qemu_img(image: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert ours(capsys, "check", image) == (0, qemu("check", image))
    assert ours(capsys, "info", image)[1] == qemu("info", image)
    if ours(capsys, "map", image)[0] == 0:
        assert ours(capsys, "map", image)[1] == qemu("map", image)


def test_part_of_a_map(tmp_path: Path, cluster_size: int, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "disk.qcow2"
    make_by_qemu(path, cluster_size)
    limits = ("-s", "100k", "-l", "7M")
    told = ours(capsys, "map", "--output=json", *limits, path)[1]
    assert plain(json.loads(told)) == plain(json.loads(qemu("map", "--output=json", *limits, path)))


def test_map_and_info_of_a_raw_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "disk.raw"
    with path.open("wb") as file:
        file.truncate(3 * MIB)
        file.seek(MIB)
        file.write(b"x" * 65536)
    for command in ("map", "info"):
        told = ours(capsys, command, "-f", "raw", "--output=json", path)[1]
        theirs = json.loads(qemu(command, "-f", "raw", "--output=json", path))
        if isinstance(theirs, dict):
            theirs.pop("children", None)
        assert json.loads(told) == theirs


def damage(path: Path, *, cluster: int, refcount: int) -> None:
    patient = Patient(path)
    patient.set_refcount(cluster * patient.cluster_bytes, refcount)
    path.write_bytes(patient.image)


@pytest.mark.parametrize(("cluster", "refcount"), [(30, 1), (8, 0), (8, 2)])
def test_check_of_damaged_images(
    tmp_path: Path, cluster: int, refcount: int, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "disk.qcow2"
    make_by_qemu(path, 65536)
    with path.open("ab") as file:
        file.truncate(40 * 65536)
    damage(path, cluster=cluster, refcount=refcount)
    found, told = ours(capsys, "check", "--output=json", path)
    theirs = qemu("check", "--output=json", path, codes=(2, 3))
    assert json.loads(told) == json.loads(theirs)
    command = run("qemu-img", "check", path)
    assert found in (2, 3)
    assert (found, ours(capsys, "check", path)[0]) == (command.returncode, command.returncode)


def test_exit_code_of_what_cannot_be_checked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "disk.raw"
    path.write_bytes(b"x" * 65536)
    assert ours(capsys, "check", "-f", "raw", path)[0] == 63
    qemu("check", "-f", "raw", path, codes=(63,))


def test_converted_disks_are_equal(image: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, _ = ours(capsys, "convert", "-q", "-O", "raw", image, tmp_path / "a.raw")
    if code == 63:
        # Compressed clusters are refused by name, and nothing is left.
        assert not (tmp_path / "a.raw").exists()
        return
    assert code == 0
    assert "identical" in qemu("compare", "-f", "qcow2", "-F", "raw", image, tmp_path / "a.raw")
    raw, back = tmp_path / "a.raw", tmp_path / "b.qcow2"
    assert ours(capsys, "convert", "-q", "-f", "raw", "-O", "qcow2", "--verify", raw, back)[0] == 0
    assert "identical" in qemu("compare", "-f", "raw", "-F", "qcow2", raw, back)
    assert "No errors" in qemu("check", back)
    theirs = tmp_path / "c.qcow2"
    qemu("convert", "-f", "raw", "-O", "qcow2", raw, theirs)
    allocated = [
        json.loads(qemu("check", "--output=json", path)).get("allocated-clusters") for path in (back, theirs)
    ]
    assert allocated[0] == allocated[1]


# resize


@pytest.mark.parametrize(
    "size", ["5M", "-3M", "+2M", "1234432", "-1536", "7340155", "+300", "0", "-10M", "64G"]
)
@pytest.mark.parametrize("make", [make_by_jqcow, make_preallocated])
def test_resize_is_that_of_qemu_img(
    tmp_path: Path, cluster_size: int, make: Callable[[Path, int], None], size: str
) -> None:
    """Both ways the same sizes are taken and refused, and the guest sees the same bytes."""
    ours_path, theirs_path = tmp_path / "ours.qcow2", tmp_path / "theirs.qcow2"
    make(ours_path, cluster_size)
    shutil.copy(ours_path, theirs_path)
    whole_sectors = int(re.sub(r"\D", "", size)) % 512 == 0 or size[-1].isalpha()
    theirs = run("qemu-img", "resize", "-q", "--shrink", theirs_path, size)
    found = main.main(["resize", "-q", "--shrink", str(ours_path), size])
    if not whole_sectors:
        # jqcow rounds up where qemu-img refuses.
        assert (found, theirs.returncode) == (0, 1)
        with jqcow.open(ours_path) as image:
            rounded = image.size
        assert rounded % 512 == 0
        qemu("resize", "-q", "--shrink", theirs_path, rounded)
    else:
        assert found == theirs.returncode
    require_equal_disks(ours_path, theirs_path)
    assert "No errors" in qemu("check", ours_path)
    # Where the disk grows again jqcow shows zeros, whoever cut it; qemu-img shows the old end of a cluster.
    for path in (ours_path, theirs_path):
        assert main.main(["resize", "-q", str(path), "128G"]) == 0
        assert "No errors" in qemu("check", path)
    require_equal_disks(ours_path, theirs_path)


def require_equal_disks(one: Path, other: Path) -> None:
    sizes = [json.loads(qemu("info", "--output=json", path))["virtual-size"] for path in (one, other)]
    assert sizes[0] == sizes[1]
    assert "identical" in qemu("compare", "-f", "qcow2", "-F", "qcow2", one, other)


def test_shrinking_must_be_asked_for_in_both(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    make_by_qemu(path, 65536)
    before = path.read_bytes()
    for size in ("5M", "-5M"):
        qemu("resize", path, size, codes=(1,))
        assert main.main(["resize", str(path), size]) == 1
    assert path.read_bytes() == before


def test_shrinking_frees_as_many_clusters(tmp_path: Path, cluster_size: int) -> None:
    allocated = []
    for name, shrink in (
        ("ours", lambda path: main.main(["resize", "-q", "--shrink", str(path), "1M"])),
        ("theirs", lambda path: qemu("resize", "-q", "--shrink", path, "1M")),
    ):
        path = tmp_path / f"{name}.qcow2"
        make_by_qemu(path, cluster_size)
        shrink(path)
        allocated.append(json.loads(qemu("check", "--output=json", path))["allocated-clusters"])
    assert allocated[0] == allocated[1]


# Beside a writer


def test_force_share_looks_as_qemu_img_does(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "disk.qcow2"
    qemu("create", "-q", "-f", "qcow2", path, "10M")
    qemu_io(path, "write -P 1 0 1M", "write -P 2 7M 70k")
    command = ["qemu-io", "-f", "qcow2", str(path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as writer:
        assert writer.stdin is not None and writer.stdout is not None
        # The answer shows that the image is open.
        writer.stdin.write("length\n")
        writer.stdin.flush()
        assert "10 MiB" in writer.stdout.readline()
        for name in ("info", "check", "map"):
            assert ours(capsys, name, path)[0] == 4
            qemu(name, path, codes=(1,))
            code, told = ours(capsys, name, "-U", "--output=json", path)
            assert code == 0
            found, theirs = json.loads(told), json.loads(qemu(name, "-U", "--output=json", path))
            if isinstance(theirs, dict):
                theirs.pop("children", None)
                assert found == theirs
            else:
                assert plain(found) == plain(theirs)
        writer.communicate("quit\n", timeout=20)


@pytest.fixture
def killed(tmp_path: Path, cluster_size: int) -> Path:
    """Return the image of a process that was killed while it wrote."""
    path = tmp_path / "killed.qcow2"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-c", WRITER, str(path), str(cluster_size)]
    result = subprocess.run(command, env=environment, capture_output=True, check=False)
    assert result.returncode == -signal.SIGKILL, result.stderr
    return path


def test_recovery_of_a_killed_process_satisfies_qemu(
    killed: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    refused = run("qemu-img", "info", killed)
    assert refused.returncode == 1
    assert "run jqcow-recover" in refused.stderr
    assert ours(capsys, "check", killed)[0] == 0
    assert recover.main([str(killed)]) == 0
    assert "No errors" in qemu("check", killed)
    told = ours(capsys, "map", "--output=json", killed)[1]
    assert plain(json.loads(told)) == plain(json.loads(qemu("map", "--output=json", killed)))
    with jqcow.open(killed) as image:
        for index in range(40):
            expected = bytes([index + 1]) * 9000
            found = image.pread(9000, index * 300_000)
            zeroed = MIB - 9000 <= index * 300_000 < 2 * MIB
            assert found == expected or zeroed, index
