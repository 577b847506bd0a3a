"""Who may include and import what (DESIGN §3), as functions of a tree, so that planted trees can be checked too."""

from __future__ import annotations

import ast
import re
from pathlib import Path

MAX_LINES = 400
MAX_SETUP_LINES = 120

# folder of csrc -> folders whose headers it may include
CSRC_MAY_INCLUDE = {
    "core": {"core"},
    "kernels": {"core", "kernels"},
    "torch": {"core", "kernels", "torch"},
}
TORCH_HEADER = re.compile(r"^(torch|ATen|c10|pybind11|Python\.h)")
CUDA_HEADER = re.compile(r"^(cuda|cub/|cooperative_groups|thrust/)")

# outer packages of fastkd and the module that hands commands to them by name
OUTER = {"bench", "cache", "demo", "files", "teachers", "trainer", "integrations", "cli", "__main__"}
# outer package -> the outer packages it may use
OUTER_MAY_IMPORT = {
    "cache": {"cache", "files"},
    "trainer": {"trainer", "cache", "files", "teachers"},
    "demo": {"demo", "trainer", "cache", "files"},
    "__main__": {"cli"},
}
# packages that the core of fastkd may import besides the standard library
CORE_MAY_IMPORT = {"torch", "fastkd"}
# package of the core -> what else it may import; nothing of the core imports such a package but by name, when asked for
ALSO_MAY_IMPORT = {"triton": {"triton"}}
# modules of the core, lowest first: each may import from the rows above its own
CORE_ORDER = (
    {"_C"},
    {"checks", "counted", "divergence", "shard", "stats"},
    {"linear_checks", "linear_rows", "options", "shard_dtensor", "shard_exchange", "topk"},
    {"cuda", "eager", "linear_dtensor", "ops", "shard_rows", "sparse_checks"},
    {"products", "shard_eager", "sparse_eager", "sparse_ops"},
    {"linear_models", "shard_native"},
    {"shard_ops"},
    {"triton"},
    {"backends", "linear_chunks", "shard_loss"},
    {"functional", "linear_eager", "shard_linear", "sparse"},
    {"linear"},
    {"linear_sparse"},
    {"modules"},
    {"__init__"},
)


def includes(path: Path) -> list[str]:
    return re.findall(r'^\s*#\s*include\s*[<"]([^>"]+)[>"]', path.read_text(), re.MULTILINE)


def csrc_violations(csrc: Path) -> list[str]:
    found = []
    for path in sorted(p for p in csrc.rglob("*") if p.suffix in {".h", ".cpp", ".cu", ".cuh"}):
        layer = path.relative_to(csrc).parts[0]
        for header in includes(path):
            if layer != "torch" and TORCH_HEADER.match(header):
                found.append(f"{path.relative_to(csrc)} includes {header}: only csrc/torch knows torch")
            if layer == "core" and CUDA_HEADER.match(header):
                found.append(f"{path.relative_to(csrc)} includes {header}: csrc/core knows no CUDA")
            targets = [(folder / header).resolve() for folder in (path.parent, csrc)]
            for target in (t for t in targets if t.is_file() and csrc.resolve() in t.parents):
                other = target.relative_to(csrc.resolve()).parts[0]
                if other not in CSRC_MAY_INCLUDE[layer]:
                    found.append(f"{path.relative_to(csrc)} includes {header}: {layer} may not know {other}")
    return found


def imports(path: Path, package: tuple[str, ...]) -> set[str]:
    """Absolute dotted names that a module of ``package`` imports, anywhere in its text."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join([*base, *([node.module] if node.module else [])])
            names |= {f"{module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in {"import_module", "__import__"}:
            names |= {
                arg.value for arg in node.args[:1] if isinstance(arg, ast.Constant) and isinstance(arg.value, str)
            }
    return names


def core_height(module: str) -> int:
    """Row of ``CORE_ORDER``; a name that is no module comes from the package's ``__init__``, and is as high."""
    return next((height for height, row in enumerate(CORE_ORDER) if module in row), len(CORE_ORDER) - 1)


def python_violations(root: Path, standard_library: frozenset[str]) -> list[str]:
    found = []
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root.parent)
        package = relative.parts[:-1]
        own = relative.parts[1].removesuffix(".py")
        in_core = own not in OUTER
        if in_core and not any(own in row for row in CORE_ORDER):
            found.append(f"{relative} has no place in CORE_ORDER")
        for name in imports(path, package):
            top, *rest = name.split(".")
            if top == "fastkd":
                part = rest[0] if rest else ""
                allowed = OUTER_MAY_IMPORT.get(own, {own})
                if part in OUTER and part not in allowed:
                    found.append(f"{relative} imports {name}: {own} may not know {part}")
                elif in_core and part not in {*OUTER, own} and core_height(part) >= core_height(own):
                    found.append(f"{relative} imports {name}: {own} is not above {part or 'the package'}")
            elif in_core and top not in CORE_MAY_IMPORT | standard_library | ALSO_MAY_IMPORT.get(own, set()):
                found.append(f"{relative} imports {name}: the core depends on torch alone")
    return found


def length_violations(root: Path, files: list[Path]) -> list[str]:
    found = []
    for path in files:
        limit = MAX_SETUP_LINES - 1 if path == root / "setup.py" else MAX_LINES
        lines = len(path.read_text().splitlines())
        if lines > limit:
            found.append(f"{path.relative_to(root)} has {lines} lines; at most {limit}")
    return found
