"""Sparse teachers from the JSON that servers return.

Four shapes are known, as vLLM and SGLang document and produce them; in each, entry i of a list belongs to token i, the
distribution that was there *before* it:

    prompt       vLLM /v1/completions: choices[c].prompt_logprobs = [null, {"<id>": {"logprob": ..}, ..}, ..]
                 SGLang /generate: meta_info.input_top_logprobs = [null, [[logprob, id, text], ..], ..]
    completion   OpenAI, vLLM, SGLang /v1/completions: choices[c].logprobs.top_logprobs = [{"<token>": logprob, ..}, ..]
                 SGLang /generate: meta_info.output_top_logprobs

The first prompt token has no distribution before it: null, which is left out. So row i of the teacher belongs to the
student's logits at token i, as in ``logits[:, :-1]`` against ``tokens[:, 1:]``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from ..topk import PADDING, Tail, TopKTeacher, mass_limit

_TOKEN_ID = "token_id:"  # how vLLM writes a token with return_tokens_as_token_ids
_LOWEST = -9999.0  # what servers write for -inf, which JSON lacks

_Row = dict[int, float]  # id -> log-probability


def teacher_from_response(
    response: Mapping[str, Any],
    part: Literal["prompt", "completion"] = "prompt",
    *,
    vocab_size: int,
    tail: Tail = "bucket",
    k: int | None = None,
    choice: int = 0,
    tokens: Sequence[int] | None = None,
    token_ids: Mapping[str, int] | None = None,
) -> TopKTeacher:
    """The teacher in the JSON of a completion: ``(rows, K)`` on the CPU, best first, padded where a row has fewer.

    part: of the prompt, or of what was generated. vocab_size: of the student; a larger id is an error. k: at most so
    many, the best; None: all that came (vLLM adds the prompt's own token to its top k). choice: of ``choices``. tokens:
    ids of the prompt (of the completion, with part="completion"); their number, and with vLLM's prompt_logprobs their
    presence in each row, is then checked. token_ids: from a token's text to its id, for servers that answer in texts
    (ask vLLM with return_tokens_as_token_ids and it is not needed; texts are ambiguous).

    Raises:
        TypeError, ValueError: a response of another shape; the message names the position.
    """
    if part not in ("prompt", "completion"):
        raise ValueError(f"part={part!r} is not known; allowed: 'prompt', 'completion'")
    name, entries, parse = _find(response, part, choice, token_ids)
    if not isinstance(entries, list):
        raise ValueError(f"{name} must be a list with an entry a token; got {_shape_of(entries)}")
    if tokens is not None and len(tokens) != len(entries):
        raise ValueError(f"{name} has {len(entries)} entries; the tokens are {len(tokens)}")
    rows = []
    for position, entry in enumerate(entries):
        where = f"{name}[{position}]"
        if entry is None and position == 0:
            continue  # nothing comes before the first token
        row = parse(where, entry)
        _check_row(where, row, vocab_size)
        own = None if tokens is None else tokens[position]
        if own is not None and name.endswith("prompt_logprobs") and own not in row:
            raise ValueError(f"{where} does not have the prompt's own token {own}: the response is of another prompt")
        rows.append(row)
    if not rows:
        raise ValueError(f"{name} has no distribution; got {len(entries)} entries")
    return _as_teacher(rows, k, tail)


def stack_teachers(teachers: Sequence[TopKTeacher], rows: int | None = None) -> TopKTeacher:
    """Teachers of sequences ``(rows_b, K_b)`` as one ``(B, rows, K)``; what is missing is padding without an entry.

    rows: of the batch; default the longest. A row without an entry counts nothing with tail="bucket", and must be at an
    ignored label with the others.
    """
    if not teachers:
        raise ValueError("teachers must have at least one; got none")
    first = teachers[0]
    for t in teachers:
        if (t.tail, t.temperature) != (first.tail, first.temperature) or t.ids.dim() != 2:
            raise ValueError("teachers must be (rows, K) with one tail and temperature to be stacked")
    longest, k = max(len(t.ids) for t in teachers), max(t.k for t in teachers)
    rows = longest if rows is None else rows
    if rows < longest:
        raise ValueError(f"rows must be at least that of the longest teacher, {longest}; got {rows}")

    def stacked(name: str, fill: float) -> Tensor:
        given = [getattr(t, name) for t in teachers]
        return torch.stack(
            [torch.nn.functional.pad(x, (0, k - x.shape[1], 0, rows - x.shape[0]), value=fill) for x in given]
        )

    weights = None
    if any(t.weights is not None for t in teachers):
        if not all(t.weights is not None for t in teachers):
            raise ValueError("teachers must all have weights, or none, to be stacked")
        weights = stacked("weights", 0.0)
    ids, logprobs = stacked("ids", PADDING), stacked("logprobs", float("-inf"))
    return TopKTeacher(ids, logprobs, first.tail, weights=weights, temperature=first.temperature)


def _find(
    response: Mapping[str, Any], part: str, choice: int, token_ids: Mapping[str, int] | None
) -> tuple[str, Any, Callable[[str, Any], _Row]]:
    """Name, list and parser of the entries that were asked for."""
    if not isinstance(response, Mapping):
        raise TypeError(f"response must be the decoded JSON object of a completion; got {type(response).__name__}")
    if "error" in response or response.get("object") == "error":
        raise ValueError(f"response is an error of the server: {response.get('error', response.get('message'))}")
    if "meta_info" in response:
        key = "input_top_logprobs" if part == "prompt" else "output_top_logprobs"
        if not isinstance(response["meta_info"], Mapping) or key not in response["meta_info"]:
            raise ValueError(f"meta_info of the response has no {key}; ask with return_logprob, top_logprobs_num and, "
                             "for the prompt, logprob_start_len 0")  # fmt: skip
        return f"meta_info.{key}", response["meta_info"][key], _parse_triples
    choices = response.get("choices")
    if not isinstance(choices, list) or not 0 <= choice < len(choices) or not isinstance(choices[choice], Mapping):
        raise ValueError(f"response has no choices[{choice}]; got {_shape_of(choices)}")
    name, picked = f"choices[{choice}]", choices[choice]
    if part == "prompt":
        if picked.get("prompt_logprobs") is None:
            raise ValueError(f"{name} has no prompt_logprobs; ask with prompt_logprobs=K")
        return f"{name}.prompt_logprobs", picked["prompt_logprobs"], _parse_by_id
    logprobs = picked.get("logprobs")
    if not isinstance(logprobs, Mapping) or logprobs.get("top_logprobs") is None:
        raise ValueError(f"{name} has no logprobs.top_logprobs; ask with logprobs=K")
    return f"{name}.logprobs.top_logprobs", logprobs["top_logprobs"], _parser_by_text(token_ids)


def _parse_by_id(where: str, entry: Any) -> _Row:
    """vLLM: {"<id>": {"logprob": -0.1, "rank": 1, "decoded_token": "a"}, ..}."""
    row: _Row = {}
    for key, value in _pairs(where, entry):
        if not key.isdecimal():
            raise ValueError(f"{where} has the key {key!r}, which is no token id")
        if not isinstance(value, Mapping) or "logprob" not in value:
            raise ValueError(f"{where}[{key!r}] must be an object with a logprob; got {_shape_of(value)}")
        row[int(key)] = _logprob(f"{where}[{key!r}]", value["logprob"])
    return row


def _parser_by_text(token_ids: Mapping[str, int] | None) -> Callable[[str, Any], _Row]:
    """OpenAI: {"<token>": -0.1, ..}, tokens as texts or as token_id:<id>."""

    def parse(where: str, entry: Any) -> _Row:
        row: _Row = {}
        for text, value in _pairs(where, entry):
            digits = text.removeprefix(_TOKEN_ID)
            if digits != text and digits.isdecimal():
                token = int(digits)
            elif token_ids is None:
                raise ValueError(f"{where} names the token {text!r} by its text; pass token_ids, or ask the server "
                                 "with return_tokens_as_token_ids")  # fmt: skip
            elif text not in token_ids:
                raise ValueError(f"{where} names the token {text!r}, which token_ids does not have")
            else:
                token = token_ids[text]
            if token in row:
                raise ValueError(f"{where} names the token {token} twice")
            row[token] = _logprob(f"{where}[{text!r}]", value)
        return row

    return parse


def _parse_triples(where: str, entry: Any) -> _Row:
    """SGLang: [[logprob, id, text or null], ..]."""
    if not isinstance(entry, list):
        raise ValueError(f"{where} must be a list of [logprob, id, text]; got {_shape_of(entry)}")
    row: _Row = {}
    for i, triple in enumerate(entry):
        if (
            not isinstance(triple, list)
            or len(triple) < 2
            or isinstance(triple[1], bool)
            or not isinstance(triple[1], int)
        ):
            raise ValueError(f"{where}[{i}] must be [logprob, id, text]; got {triple!r}")
        if triple[1] in row:
            raise ValueError(f"{where} names the token {triple[1]} twice")
        row[triple[1]] = _logprob(f"{where}[{i}]", triple[0])
    return row


def _pairs(where: str, entry: Any):
    if not isinstance(entry, Mapping):
        raise ValueError(f"{where} must be an object of tokens; got {_shape_of(entry)}")
    return entry.items()


def _logprob(where: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or math.isnan(value):
        raise ValueError(f"{where}: the log-probability must be a number; got {value!r}")
    return float("-inf") if value <= _LOWEST else float(value)


def _check_row(where: str, row: _Row, vocab_size: int) -> None:
    if not row:
        raise ValueError(f"{where} has no token")
    for token in row:
        if not 0 <= token < vocab_size:
            raise ValueError(f"{where} names the token {token}, outside [0, {vocab_size})")
    mass = math.fsum(math.exp(min(x, 1.0)) for x in row.values())
    if mass > mass_limit(torch.float32):
        raise ValueError(f"{where}: the probabilities sum to {mass:.6g}, above 1")


def _as_teacher(rows: Sequence[_Row], k: int | None, tail: Tail) -> TopKTeacher:
    ranked = [sorted(row.items(), key=lambda pair: (-pair[1], pair[0]))[:k] for row in rows]
    width = max(len(row) for row in ranked)
    padded = [row + [(PADDING, float("-inf"))] * (width - len(row)) for row in ranked]
    ids = torch.tensor([[token for token, _ in row] for row in padded])
    logprobs = torch.tensor([[logprob for _, logprob in row] for row in padded], dtype=torch.float32)
    return TopKTeacher(ids, logprobs, tail, temperature=1.0)


def _shape_of(x: Any) -> str:
    return f"{type(x).__name__} of {len(x)}" if isinstance(x, (list, Mapping)) else repr(x)
