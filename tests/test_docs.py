"""README and CHANGELOG: their Python runs, their links resolve, their commands exist, their version is right."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

import fastkd
from fastkd.cli import DELEGATED

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
COMMANDS = {"backends", "explain", "plan", *DELEGATED}


def python_blocks(text: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def test_python_of_the_readme_runs() -> None:
    """All blocks in one namespace, in order, as a reader would type them."""
    blocks = python_blocks(README)
    assert len(blocks) >= 3
    namespace: dict = {}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), namespace)


@pytest.mark.parametrize("name", ["README.md", "DESIGN.md", "CHANGELOG.md", "bench/README.md"])
def test_links_resolve(name: str) -> None:
    path = ROOT / name
    for link in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", path.read_text()):
        if not re.match(r"https?://|mailto:", link):
            assert (path.parent / link).exists(), f"{name} links to {link}"


def test_memory_table() -> None:
    done = subprocess.run([sys.executable, ROOT / "bench" / "memory_table.py"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\n") == 10 and done.stdout in README


def test_commands_exist() -> None:
    named = set(re.findall(r"(?:^ {4}|`)fastkd ([a-z-]+)\b", README, re.MULTILINE))
    assert {"bench", "distill"} <= named <= COMMANDS
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    made = set(re.findall(r"(?:^ {4}|`)make ([a-z]+)\b", README, re.MULTILINE))
    assert {"demo", "test"} <= made <= targets


@pytest.fixture(scope="module")
def helps() -> dict[str, str]:
    """What each command prints when asked for help."""
    printed = {}
    for command in sorted(COMMANDS):
        done = subprocess.run([sys.executable, "-m", "fastkd", command, "--help"], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        printed[command] = done.stdout
    return printed


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_help(command: str, helps: dict[str, str]) -> None:
    assert f"usage: fastkd {command}" in helps[command]


def commands_with_flags(text: str) -> dict[str, set[str]]:
    """Command -> flags that follow it, lines that end in a backslash joined."""
    found: dict[str, set[str]] = {}
    for command, rest in re.findall(r"fastkd ([a-z-]+)\b([^`\n]*)", text.replace("\\\n", " ")):
        found.setdefault(command, set()).update(re.findall(r"--[a-z][a-z0-9_.-]*", rest))
    return found


def test_flags_exist(helps: dict[str, str]) -> None:
    named = commands_with_flags(README)
    assert {"--teacher.path", "--data.train", "--output_dir"} <= named["distill"]
    for command, flags in named.items():
        unknown = flags - set(re.findall(r"--[a-z][a-z0-9_.-]*", helps.get(command, "")))
        assert command not in COMMANDS or not unknown, f"fastkd {command}: {unknown}"
    alone = set(re.findall(r"`(--[a-z][a-z0-9_.-]*)[^`]*`", README))
    known = set(re.findall(r"--[a-z][a-z0-9_.-]*", " ".join(helps.values())))
    assert alone and alone <= known, alone - known


def test_changelog_has_this_version() -> None:
    assert re.search(rf"^## {re.escape(fastkd.__version__)}\b", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert f'version = "{fastkd.__version__}"' in (ROOT / "pyproject.toml").read_text()


def test_options_of_the_readme_are_those_of_the_function() -> None:
    import inspect

    table = set(re.findall(r"^\| `([a-z0-9_]+)`", README, re.MULTILINE))
    rows = set(re.findall(r"`([a-z0-9_]+)`", "\n".join(re.findall(r"^\| (`[^|]*) \|", README, re.MULTILINE))))
    keywords = {
        name
        for name, parameter in inspect.signature(fastkd.kd_loss).parameters.items()
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY
    }
    assert keywords <= table | rows, f"missing in the README: {keywords - table - rows}"
