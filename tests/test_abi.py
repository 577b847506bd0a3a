"""The extension's symbols and instructions: stable ABI only, no code of one instruction set leaking into another."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from elftools.elf.elffile import ELFFile
from elftools.elf.sections import SymbolTableSection

import fastkd.ops

ROOT = Path(__file__).parents[1]
STABLE = re.compile(r"^(aoti_)?torch_[a-z0-9_]+$")  # the C shims; everything mangled is outside the stable ABI
TORCH_NAME = re.compile(r"torch|c10|caffe2|at6native|N2at|aoti", re.IGNORECASE)
SHIM_HEADERS = ("torch/csrc/inductor/aoti_torch/c/shim.h", "torch/csrc/stable/c/shim.h")

needs_objdump = pytest.mark.skipif(not shutil.which("objdump"), reason="objdump (binutils) is not installed")
needs_compiler = pytest.mark.skipif(not shutil.which("g++"), reason="g++ is not installed")
x86_only = pytest.mark.skipif("avx2" not in fastkd.ops.cpu_isas(), reason="instruction sets of x86-64")


def undefined_symbols(library: Path) -> set[str]:
    with library.open("rb") as file:
        tables = [s for s in ELFFile(file).iter_sections() if isinstance(s, SymbolTableSection)]
        return {s.name for table in tables for s in table.iter_symbols() if s["st_shndx"] == "SHN_UNDEF" and s.name}


def weak_symbols(library: Path) -> set[str]:
    """Undefined names that the loader leaves null where nothing defines them."""
    with library.open("rb") as file:
        table = ELFFile(file).get_section_by_name(".dynsym")
        undefined = [s for s in table.iter_symbols() if s["st_shndx"] == "SHN_UNDEF"]
        return {s.name for s in undefined if s["st_info"]["bind"] == "STB_WEAK"}


def outside_stable_abi(symbols: set[str]) -> set[str]:
    return {name for name in symbols if TORCH_NAME.search(name) and not STABLE.match(name)}


def extension() -> Path:
    spec = importlib.util.find_spec("fastkd._C")
    assert spec and spec.origin
    return Path(spec.origin)


def test_only_stable_symbols_of_torch() -> None:
    assert extension().name == "_C.abi3.so"
    symbols = undefined_symbols(extension())
    assert "torch_call_dispatcher" in symbols
    assert outside_stable_abi(symbols) == set()
    include = Path(torch.__file__).parent / "include"
    declared = "".join(before_torch_2_11((include / header).read_text()) for header in SHIM_HEADERS)
    weak = weak_symbols(extension())
    cuda = {"aoti_torch_get_current_cuda_stream"} if fastkd.ops.cuda_architectures() else set()
    expected = {"torch_from_blob"} | cuda
    assert {s for s in weak if STABLE.match(s)} == expected, "what a torch may lack, and code that copes"
    assert {s for s in symbols - weak if STABLE.match(s) and s not in declared} == set()


def before_torch_2_11(header: str) -> str:
    """The text of a shim header without the blocks for later versions, each closed by its commented #endif."""
    later = r"#if TORCH_FEATURE_VERSION >= TORCH_VERSION_2_1[1-9]_0$.*?^#endif // TORCH_FEATURE_VERSION[^\n]*$"
    return re.sub(later, "", header, flags=re.DOTALL | re.MULTILINE)


def test_later_shims_are_not_taken_for_old_ones() -> None:
    header = (Path(torch.__file__).parent / "include" / SHIM_HEADERS[1]).read_text()
    old = before_torch_2_11(header)
    assert "torch_call_dispatcher" in old and "torch_from_blob" not in old


def test_only_the_limited_python_api() -> None:
    """Names that the abi3 of Python 3.10 has; private ones start with an underscore."""
    python = {s for s in undefined_symbols(extension()) if s.startswith(("Py", "_Py"))}
    assert python == {
        "PyArg_ParseTuple", "PyErr_SetString", "PyExc_ValueError", "PyLong_FromSize_t", "PyModule_Create2",
        "PyUnicode_FromString",
    }  # fmt: skip


@needs_compiler
def test_planted_symbol_is_found(tmp_path: Path) -> None:
    source, library = tmp_path / "planted.cpp", tmp_path / "planted.so"
    source.write_text("namespace c10 { void warn(int); } void f() { c10::warn(1); }")
    subprocess.run(["g++", "-shared", "-fPIC", source, "-o", library], check=True)
    assert outside_stable_abi(undefined_symbols(library)) == {"_ZN3c104warnEi"}


@pytest.fixture(scope="module")
def objects(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Every instruction set compiled with the flags of setup.py, whether or not this machine can run it."""
    text = (ROOT / "setup.py").read_text()
    namespace: dict = {}
    start, end = text.index("CPU = Path"), text.index("class Build")
    exec("import platform\nfrom pathlib import Path\n" + text[start:end], namespace)
    folder = tmp_path_factory.mktemp("isa")
    built = {}
    for isa, flags in namespace["ISA_FLAGS"].items():
        built[isa] = folder / f"{isa}.o"
        source = ROOT / "csrc" / "kernels" / "cpu" / f"isa_{isa}.cpp"
        subprocess.run(["g++", "-fPIC", *namespace["FLAGS"], *flags, "-c", source, "-o", built[isa]], check=True)
    return built


@needs_compiler
def test_no_weak_symbols(objects: dict[str, Path]) -> None:
    """A weak function compiled for AVX-512 could be the one that the linker keeps for all."""
    for isa, path in objects.items():
        with path.open("rb") as file:
            table = ELFFile(file).get_section_by_name(".symtab")
            defined = [s for s in table.iter_symbols() if s["st_shndx"] != "SHN_UNDEF"]
        weak = [s.name for s in defined if s["st_info"]["bind"] in ("STB_WEAK", "STB_LOOS")]
        shared = [s.name for s in defined if s["st_info"]["bind"] == "STB_GLOBAL"]
        assert weak == [], isa
        assert len(shared) == 1 and "Kernels" in shared[0], isa


def disassembly(path: Path) -> str:
    return subprocess.run(["objdump", "-d", path], capture_output=True, text=True, check=True).stdout


@needs_compiler
@needs_objdump
@x86_only
def test_each_object_holds_its_own_instructions(objects: dict[str, Path]) -> None:
    baseline, avx2, avx512 = (disassembly(objects[isa]) for isa in ("baseline", "avx2", "avx512"))
    assert "%xmm" in baseline and "%ymm" not in baseline and "%zmm" not in baseline
    assert "%ymm" in avx2 and "vfmadd" in avx2 and "%zmm" not in avx2
    assert "%zmm" in avx512 and "vscalefps" in avx512 and "vcvtne2ps2bf16" in avx512


@needs_objdump
@x86_only
def test_the_extension_holds_them_all() -> None:
    text = disassembly(extension())
    assert "vcvtne2ps2bf16" in text and "vfmadd" in text


def test_standard_library_only_besides() -> None:
    """No OpenMP, no MKL: threads come from torch."""
    with extension().open("rb") as file:
        dynamic = ELFFile(file).get_section_by_name(".dynamic")
        needed = {tag.needed for tag in dynamic.iter_tags() if tag.entry.d_tag == "DT_NEEDED"}
    allowed = re.compile(r"^(libc10|libtorch|libtorch_cpu|libstdc\+\+|libm|libgcc_s|libc|libpthread|ld-linux[^.]*)\.so")
    assert [name for name in needed if not allowed.match(name)] == []
