"""The demo's text: the sources of the Python documentation, or else the standard library's own text."""

from __future__ import annotations

import ast
import shutil
import subprocess
import sysconfig
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics

DEBIAN_PACKAGE = "python3.11-doc"
SHORTEST = 1200  # characters; shorter documents cannot fill a row of 256 tokens


@dataclass
class Corpus:
    """Documents in a fixed order, and where they came from in words."""

    documents: list[str]
    source: str

    def split(self) -> tuple[list[str], list[str], list[str]]:
        """Training, dev and test documents: whole documents, so that no page is in two of them."""
        numbered = list(enumerate(self.documents))
        dev = [text for i, text in numbered if i % 10 == 6]
        test = [text for i, text in numbered if i % 10 == 1]
        return [text for i, text in numbered if i % 10 not in (1, 6)], dev, test


def load_corpus(cache: Path) -> Corpus:
    """The Python documentation if it is installed, cached or can be fetched; otherwise the standard library's text."""
    for root in (Path("/usr/share/doc"), cache / DEBIAN_PACKAGE / "usr/share/doc"):
        if pages := _pages(root):
            return Corpus(pages, f"Python documentation ({DEBIAN_PACKAGE}, {len(pages)} pages)")
    why = _fetch(cache)
    if pages := _pages(cache / DEBIAN_PACKAGE / "usr/share/doc"):
        return Corpus(pages, f"Python documentation ({DEBIAN_PACKAGE}, {len(pages)} pages)")
    documents = _standard_library()
    return Corpus(
        documents,
        f"the standard library's own text: language reference and docstrings, {len(documents)} documents "
        f"({DEBIAN_PACKAGE} could not be fetched: {why})",
    )


def _pages(root: Path) -> list[str]:
    """Texts of the pages under ``root``. Real paths, because the package reaches every page by two names."""
    found = {file.resolve() for file in root.glob("python3*/html/_sources/**/*.rst.txt")}
    texts = [file.read_text(encoding="utf-8", errors="replace") for file in sorted(found)]
    return [text for text in texts if len(text) >= SHORTEST]


def _fetch(cache: Path) -> str:
    """Download and unpack the Debian package without root and without installing it; why it failed, or ''."""
    if not (shutil.which("apt-get") and shutil.which("dpkg")):
        return "no apt-get and dpkg here"
    work = (cache / "apt").resolve()
    lists = work / "lists"
    (lists / "partial").mkdir(parents=True, exist_ok=True)
    # Package lists of our own, for a machine whose own are empty and cannot be refreshed without root.
    private = ["-o", f"Dir::State::Lists={lists}", "-o", f"Dir::Cache={work}", "-o", "APT::Sandbox::User="]
    why = _run(work, ["apt-get", "-q", "download", DEBIAN_PACKAGE])
    if why:
        _run(work, ["apt-get", "-q", *private, "update"])
        why = _run(work, ["apt-get", "-q", *private, "download", DEBIAN_PACKAGE])
    for archive in work.glob(f"{DEBIAN_PACKAGE}_*.deb"):
        part = work / "unpacked"
        why = _run(work, ["dpkg", "-x", str(archive), str(part)])
        if not why:
            part.rename(cache / DEBIAN_PACKAGE)
    shutil.rmtree(work)
    return why


def _run(folder: Path, command: list[str]) -> str:
    """Run a command; '' or the last line of what it complained about."""
    try:
        subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True, timeout=120)
    except subprocess.CalledProcessError as error:
        return (error.stderr.strip() or str(error)).splitlines()[-1]
    except (subprocess.TimeoutExpired, OSError) as error:
        return str(error)
    return ""


def _standard_library() -> list[str]:
    """The language reference in pydoc, and the docstrings of every module, read from the sources, not imported."""
    documents = [text for _, text in sorted(topics.items())]
    root = Path(sysconfig.get_path("stdlib"))
    for file in sorted(root.rglob("*.py")):
        parts = file.relative_to(root).parts
        if parts[0] in ("test", "site-packages", "dist-packages", "idlelib", "lib2to3") or "tests" in parts:
            continue
        try:
            tree = ast.parse(file.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError):
            continue
        kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
        docs = [ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, kinds)]
        documents.append("\n\n".join(doc for doc in docs if doc))
    return [text for text in documents if len(text) >= SHORTEST]
