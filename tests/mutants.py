"""Planted bugs: changes of a source that some check must notice."""

from __future__ import annotations

from typing import NamedTuple


def planted(text: str, file: str, old: str, new: str, times: int = 1) -> str:
    """The text of ``file`` with ``new`` for ``old``, which must occur in it exactly ``times``."""
    found = text.count(old)
    assert found == times, f"{file} has {found} times: {old}"
    return text.replace(old, new)


class Mutant(NamedTuple):
    """Replace ``old``, which must occur in ``file`` exactly ``times``, by ``new``."""

    file: str
    old: str
    new: str
    times: int = 1

    def planted_in(self, text: str) -> str:
        return planted(text, *self)
