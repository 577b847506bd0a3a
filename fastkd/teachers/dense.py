"""Sparse teachers from a model at hand: a few rows of logits at a time, never N x V of anything new."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..checks import FLOATS, describe
from ..topk import Tail, TopKTeacher

MEMORY_BUDGET = 64 << 20  # bytes of fp32 logits in work at a time
_COPIES = 3  # of a chunk alive at once: logits, their exponentials, what sorts them

# (logits (R, V) fp32, divided by nothing) -> tensors (R, K)
_Pick = Callable[[Tensor], tuple[Tensor, ...]]


def topk_from_logits(
    logits: Tensor,
    k: int,
    *,
    tail: Tail = "bucket",
    temperature: float = 1.0,
    softcap: float | None = None,
    memory_budget: int = MEMORY_BUDGET,
) -> TopKTeacher:
    """The k largest log-probabilities of each row of ``(..., V)`` logits, best first.

    temperature: of the softmax; the loss's own for tail="bucket". softcap: c tanh(logits / c) first. memory_budget:
    bytes that the work may take beside its input and output.

    Raises:
        TypeError, ValueError: an argument of the wrong type or value; the message names it.
    """
    _check_dense(logits, "logits", k, "k", temperature, softcap, memory_budget)
    _check_count("k", k, logits.shape[-1])
    flat = logits.detach().reshape(-1, logits.shape[-1])
    ids, logprobs = _in_chunks(
        flat.__getitem__, len(flat), flat.shape[-1], _top(k, temperature), softcap, memory_budget
    )
    return TopKTeacher(_like(ids, logits), _like(logprobs, logits), tail, temperature=temperature)


def sample_from_logits(
    logits: Tensor,
    draws: int,
    *,
    temperature: float = 1.0,
    proposal_temperature: float | None = None,
    generator: torch.Generator | None = None,
    softcap: float | None = None,
    memory_budget: int = MEMORY_BUDGET,
) -> TopKTeacher:
    """Draws with replacement from each row of ``(..., V)`` logits, for tail="sampled" (Anshumann et al. 2025).

    temperature: of the teacher, which is the loss's. proposal_temperature: of the distribution that is drawn from, the
    same logits at another temperature (flatter: more of the tail, at more variance elsewhere); the draws then carry the
    weights that keep the loss unbiased. None: the teacher itself. Other arguments as :func:`topk_from_logits`.
    """
    _check_dense(logits, "logits", draws, "draws", temperature, softcap, memory_budget)
    _check_temperature("proposal_temperature", proposal_temperature, optional=True)
    flat = logits.detach().reshape(-1, logits.shape[-1])
    pick = _draw(draws, temperature, proposal_temperature, generator)
    found = _in_chunks(flat.__getitem__, len(flat), flat.shape[-1], pick, softcap, memory_budget)
    return _sampled([_like(x, logits) for x in found], temperature)


def topk_from_hidden(
    hidden: Tensor,
    weight: Tensor,
    k: int,
    *,
    bias: Tensor | None = None,
    tail: Tail = "bucket",
    temperature: float = 1.0,
    softcap: float | None = None,
    memory_budget: int = MEMORY_BUDGET,
) -> TopKTeacher:
    """:func:`topk_from_logits` of ``hidden (..., H) @ weight (V, H).T + bias (V)``, made a few rows at a time."""
    logits_of, rows = _head(hidden, weight, bias)
    _check_dense(hidden, "hidden", k, "k", temperature, softcap, memory_budget)
    _check_count("k", k, weight.shape[0])
    ids, logprobs = _in_chunks(logits_of, rows, weight.shape[0], _top(k, temperature), softcap, memory_budget)
    return TopKTeacher(_like(ids, hidden), _like(logprobs, hidden), tail, temperature=temperature)


def sample_from_hidden(
    hidden: Tensor,
    weight: Tensor,
    draws: int,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    proposal_temperature: float | None = None,
    generator: torch.Generator | None = None,
    softcap: float | None = None,
    memory_budget: int = MEMORY_BUDGET,
) -> TopKTeacher:
    """:func:`sample_from_logits` of ``hidden (..., H) @ weight (V, H).T + bias (V)``, made a few rows at a time."""
    logits_of, rows = _head(hidden, weight, bias)
    _check_dense(hidden, "hidden", draws, "draws", temperature, softcap, memory_budget)
    _check_temperature("proposal_temperature", proposal_temperature, optional=True)
    pick = _draw(draws, temperature, proposal_temperature, generator)
    found = _in_chunks(logits_of, rows, weight.shape[0], pick, softcap, memory_budget)
    return _sampled([_like(x, hidden) for x in found], temperature)


def _head(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Callable[[slice], Tensor], int]:
    """Rows of logits on demand, and how many there are."""
    for name, x, dims in (("hidden", hidden, None), ("weight", weight, 2), ("bias", bias, 1)):
        if name == "bias" and x is None:
            continue
        if not isinstance(x, Tensor) or x.dtype not in FLOATS:
            raise TypeError(f"{name} must be a floating point tensor; got {describe(x)}")
        if dims is not None and x.dim() != dims:
            raise ValueError(f"{name} must have {dims} dimension{'s' if dims > 1 else ''}; got {describe(x)}")
    if hidden.dim() == 0 or hidden.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"hidden (..., H) and weight (V, H) must agree in H; got {describe(hidden)} and {describe(weight)}"
        )
    if bias is not None and bias.shape[0] != weight.shape[0]:
        raise ValueError(f"bias (V) and weight (V, H) must agree in V; got {describe(bias)} and {describe(weight)}")
    flat, head = hidden.detach().reshape(-1, hidden.shape[-1]), weight.detach()
    return lambda rows: torch.nn.functional.linear(flat[rows], head, None if bias is None else bias.detach()), len(flat)


def _in_chunks(
    logits_of: Callable[[slice], Tensor], rows: int, columns: int, pick: _Pick, softcap: float | None, budget: int
) -> list[Tensor]:
    """``pick`` of a few rows of fp32 logits at a time, put together."""
    step = max(1, budget // (_COPIES * 4 * columns))
    parts = []
    with torch.no_grad():
        for first in range(0, max(rows, 1), step):
            logits = logits_of(slice(first, first + step))
            logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
            if softcap is not None:
                logits = torch.where(torch.isneginf(logits), logits, softcap * torch.tanh(logits / softcap))
            parts.append(pick(logits))
    return [torch.cat(columns) for columns in zip(*parts)]


def _log_softmax_at(logits: Tensor, columns: Tensor, temperature: float) -> Tensor:
    """Log-probabilities of some columns ``(R, K)`` without those of all. The maximum first: its logit is exact."""
    top = logits.amax(-1, keepdim=True)
    lse = ((logits - top) / temperature).exp_().sum(-1, keepdim=True).log()
    return (logits.gather(-1, columns) - top) / temperature - lse


def _top(k: int, temperature: float) -> _Pick:
    def pick(logits: Tensor) -> tuple[Tensor, ...]:
        ids = logits.topk(k, -1).indices
        return ids, _log_softmax_at(logits, ids, temperature)

    return pick


def _draw(draws: int, temperature: float, proposal: float | None, generator: torch.Generator | None) -> _Pick:
    def pick(logits: Tensor) -> tuple[Tensor, ...]:
        drawn_at = temperature if proposal is None else proposal
        probabilities = torch.softmax(logits / drawn_at, -1)
        if len(logits):
            ids = torch.multinomial(probabilities, draws, replacement=True, generator=generator)
        else:
            ids = torch.zeros((0, draws), dtype=torch.int64, device=logits.device)
        logprobs = _log_softmax_at(logits, ids, temperature)
        if proposal is None:
            return ids, logprobs
        return ids, logprobs, (logprobs - _log_softmax_at(logits, ids, proposal)).exp() / draws

    return pick


def _sampled(found: list[Tensor], temperature: float) -> TopKTeacher:
    ids, logprobs, *weights = found
    return TopKTeacher(ids, logprobs, "sampled", weights=weights[0] if weights else None, temperature=temperature)


def _like(x: Tensor, logits: Tensor) -> Tensor:
    return x.reshape(*logits.shape[:-1], x.shape[-1])


def _check_dense(
    x: object, name: str, count: object, count_name: str, temperature: object, softcap: object, budget: object
) -> None:
    if not isinstance(x, Tensor) or x.dtype not in FLOATS or x.dim() == 0:
        raise TypeError(f"{name} must be a floating point tensor with a last dimension; got {describe(x)}")
    if isinstance(count, bool) or not isinstance(count, int):
        raise TypeError(f"{count_name} must be an int; got {type(count).__name__}")
    if count < 1:
        raise ValueError(f"{count_name} must be >= 1; got {count}")
    _check_temperature("temperature", temperature)
    _check_temperature("softcap", softcap, optional=True)
    if not isinstance(budget, int) or budget < 1:
        raise ValueError(f"memory_budget must be a number of bytes >= 1; got {budget!r}")


def _check_count(name: str, count: int, columns: int) -> None:
    if count > columns:
        raise ValueError(f"{name} must be at most the vocabulary, {columns}; got {count}")


def _check_temperature(name: str, value: object, optional: bool = False) -> None:
    if optional and value is None:
        return
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < float("inf"):
        raise ValueError(f"{name} must be a finite number > 0{' or None' if optional else ''}; got {value!r}")
