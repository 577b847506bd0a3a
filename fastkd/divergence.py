"""Names of the divergences and what their ``beta`` means. The C++ core parses the same names."""

from __future__ import annotations

from typing import NamedTuple


class DivergenceSpec(NamedTuple):
    """What the public functions need to know of a divergence."""

    formula: str  # p is the teacher, q the student
    beta_range: str | None  # None: beta is not used


SPECS: dict[str, DivergenceSpec] = {
    "forward_kl": DivergenceSpec("KL(p || q)", None),
    "reverse_kl": DivergenceSpec("KL(q || p)", None),
    "symmetric_kl": DivergenceSpec("beta KL(p || q) + (1 - beta) KL(q || p)", "[0, 1]"),
    "jsd": DivergenceSpec("beta KL(p || m) + (1 - beta) KL(q || m), m = beta p + (1 - beta) q", "(0, 1)"),
    "total_variation": DivergenceSpec("1/2 sum |p - q|", None),
    "skew_forward_kl": DivergenceSpec("KL(p || beta p + (1 - beta) q)", "(0, 1)"),
    "skew_reverse_kl": DivergenceSpec("KL(q || beta q + (1 - beta) p)", "(0, 1)"),
}


def beta_is_allowed(divergence: str, beta: float) -> bool:
    """True where ``beta`` lies in the range of ``divergence`` (always true where beta is not used)."""
    allowed = SPECS[divergence].beta_range
    if allowed is None:
        return True
    above = beta > 0 if allowed[0] == "(" else beta >= 0
    below = beta < 1 if allowed[-1] == ")" else beta <= 1
    return above and below
