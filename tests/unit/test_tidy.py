"""Does the code keep the rules of docs/contributing that a reader of one file cannot see broken?"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from jqcow.ondisk import entries, l2

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "jqcow"
MODULES = sorted(PACKAGE.rglob("*.py"))
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])

MODULE_LINES_MAX = 600
FUNCTION_LINES_MAX = 60
CLASS_METHODS_MAX = 25
MANY_METHODS = {"Image", "CrashSpace", "SimulatedDevice"}
"""The public face, which only delegates, and the laboratory's device and states."""

# What opens, changes or syncs a file behind the device's back.
FILE_CALLS = {
    "fallocate", "fdatasync", "fsync", "ftruncate", "open", "posix_fallocate", "pread", "preadv",
    "pwrite", "pwritev", "sync", "sync_file_range", "syncfs", "truncate",
}  # fmt: skip
# engine.py puts the parts together: what opening makes of each case is tried there.
UNIT_FILES = {"engine": "test_recovery_cases.py", "places": "test_engine_datafile.py"}
ENVIRONMENT = {"os.environ", "os.environb", "os.getenv", "sys.argv"}

# What a table entry looks like: its size, and its bits.
ENTRY_SIZES = {"ENTRY", "ENTRY_BYTES"}
ENTRY_BITS = {
    "COMPRESSED", "COPIED", "L1_RESERVED", "L2_RESERVED", "OFFSET_MASK", "REFCOUNT_TABLE_OFFSET_MASK",
    "REFCOUNT_TABLE_RESERVED", "ZERO",
}  # fmt: skip
MASKS = {value for module in (entries, l2) for name in ENTRY_BITS if (value := getattr(module, name, 0)) > 1}
LINE_NUMBER = re.compile(r"\.(?:py|c|h):\d+|\blines? \d+", re.IGNORECASE)


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


every_module = pytest.mark.parametrize("path", MODULES, ids=name_of)


def modules_outside(*folders: str) -> list[Path]:
    return [path for path in MODULES if path.relative_to(PACKAGE).parts[0] not in folders]


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def dotted_uses(tree: ast.Module, module: str) -> Iterator[tuple[str, int]]:
    """Yield every ``module.name`` that the code uses or imports by name, with its line."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == module:
            yield f"{module}.{node.attr}", node.lineno
        elif isinstance(node, ast.ImportFrom) and node.module == module:
            yield from ((f"{module}.{alias.name}", node.lineno) for alias in node.names)


def folded(node: ast.AST) -> int | None:
    """Return the value of a number, also of one like ``1 << 63`` or ``~511``."""
    match node:
        case ast.Constant(value=int(value)):
            return value
        case ast.BinOp(
            left=ast.Constant(value=int(left)), op=ast.LShift(), right=ast.Constant(value=int(right))
        ):
            return left << right
        case ast.UnaryOp(op=ast.Invert(), operand=ast.Constant(value=int(value))):
            return ~value
    return None


def entry_layout(tree: ast.Module) -> Iterator[tuple[str, int]]:
    """Yield what a module knows of the size and the bits of table entries, each with its line."""
    for node in ast.walk(tree):
        match node:
            case ast.Attribute(value=ast.Name(id="entries" | "layout"), attr=name):
                if name in ENTRY_SIZES | ENTRY_BITS:
                    yield name, node.lineno
            case ast.ImportFrom(module=str(module)) if module.startswith("jqcow.ondisk"):
                known = (alias.name for alias in node.names if alias.name in ENTRY_SIZES | ENTRY_BITS)
                yield from ((name, node.lineno) for name in known)
            case ast.Import(names=names) if any(alias.name == "struct" for alias in names):
                yield "struct", node.lineno
            case ast.Constant(value=int(value)) if value in MASKS and value > 1 << 48:
                yield f"{value:#x}", node.lineno
            case ast.BinOp(left=left, op=ast.BitAnd() | ast.BitOr(), right=right):
                masks = {folded(left), folded(right)} & (MASKS | {~0x1FF})
                yield from ((f"{mask:#x}", node.lineno) for mask in masks if mask is not None)
            case ast.BinOp(left=left, op=ast.Mult() | ast.FloorDiv() | ast.Mod(), right=right):
                if 8 in (folded(left), folded(right)):
                    yield "8", node.lineno


def function_length(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    return (node.end_lineno or node.lineno) - node.lineno + 1


@every_module
def test_module_is_short(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= MODULE_LINES_MAX


@every_module
def test_functions_are_short(path: Path) -> None:
    too_long = {
        node.name: function_length(node)
        for node in ast.walk(parse(path))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and function_length(node) > FUNCTION_LINES_MAX
    }
    assert not too_long


@every_module
def test_classes_are_small(path: Path) -> None:
    too_many = {
        node.name: count
        for node in ast.walk(parse(path))
        if isinstance(node, ast.ClassDef) and node.name not in MANY_METHODS
        if (count := sum(isinstance(part, ast.FunctionDef) for part in node.body)) > CLASS_METHODS_MAX
    }
    assert not too_many


def test_the_top_level_has_what_belongs_there() -> None:
    """What commands and tests leave behind would be committed with it; what is built git ignores."""
    built = {"build", "dist", "jqcow.egg-info"}
    names = {path.name for path in ROOT.iterdir() if not path.name.startswith(".")}
    assert names - built == {"README.md", "docs", "jqcow", "pyproject.toml", "tests", "tools"}


@pytest.mark.parametrize("path", sorted((PACKAGE / "engine").glob("*.py")), ids=name_of)
def test_module_of_the_engine_has_a_unit_file(path: Path) -> None:
    """Who changes a module finds its tests by its name."""
    name = UNIT_FILES.get(path.stem, f"test_engine_{path.stem}.py")
    assert path.stem == "__init__" or (Path(__file__).parent / name).is_file()


@every_module
def test_module_says_what_it_is(path: Path) -> None:
    assert ast.get_docstring(parse(path))


@pytest.mark.parametrize("path", sorted((PACKAGE / "ondisk").rglob("*.py")), ids=name_of)
def test_bytes_from_disk_are_never_asserted(path: Path) -> None:
    """Assertions are for our own mistakes: at module level, a struct may be held to its specified size."""
    functions = [node for node in ast.walk(parse(path)) if isinstance(node, ast.FunctionDef)]
    asserts = [
        inner.lineno for node in functions for inner in ast.walk(node) if isinstance(inner, ast.Assert)
    ]
    assert not asserts


@pytest.mark.parametrize("path", modules_outside("device"), ids=name_of)
def test_only_the_device_touches_files(path: Path) -> None:
    uses = [use for use in dotted_uses(parse(path), "os") if use[0].removeprefix("os.") in FILE_CALLS]
    assert not uses


@pytest.mark.parametrize("path", modules_outside("cli"), ids=name_of)
def test_only_the_commands_read_arguments_and_environment(path: Path) -> None:
    tree = parse(path)
    uses = [use for module in ("os", "sys") for use in dotted_uses(tree, module) if use[0] in ENVIRONMENT]
    assert not uses


@pytest.mark.parametrize("path", modules_outside("ondisk", "_native"), ids=name_of)
def test_only_the_codec_knows_what_an_entry_looks_like(path: Path) -> None:
    if path.parent.name == "guest":
        return  # A guest's own structures: what they look like is their module's business.
    # A protocol has structures of its own.
    allowed = {"struct"} if path.parent.name in ("device", "nbd") else set()
    assert not [use for use in entry_layout(parse(path)) if use[0] not in allowed]


@pytest.mark.parametrize(
    "code",
    [
        "from jqcow.ondisk.layout import ENTRY_BYTES, Geometry",
        "from jqcow.ondisk.entries import OFFSET_MASK as M",
        "host = entry & entries.OFFSET_MASK",
        "host = entry & 0x00FF_FFFF_FFFF_FE00",
        "MASK = 0x00FF_FFFF_FFFF_FE00",
        "copied = bool(entry & 1 << 63)",
        "entry = host | 1 << 63",
        "host = entry & ~511",
        "reserved = entry & 0x1FF",
        "place = table + index * 8",
        "index = 8 * position",
        "index = (place - table) // 8",
        "import struct",
    ],
)
def test_what_an_entry_looks_like_is_recognised(code: str) -> None:
    assert list(entry_layout(ast.parse(code)))


@pytest.mark.parametrize("path", DOCUMENTS, ids=name_of)
def test_documents_name_functions_not_lines(path: Path) -> None:
    assert not LINE_NUMBER.findall(path.read_text(encoding="utf-8"))
