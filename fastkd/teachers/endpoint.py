"""Asks a server for the log-probabilities of prompts, by the standard library alone."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

from ..topk import Tail, TopKTeacher
from .responses import teacher_from_response

_SHOWN = 500  # characters of a server's answer in an error


def fetch_teachers(
    url: str,
    prompts: Sequence[Sequence[int]],
    k: int,
    *,
    vocab_size: int,
    server: Literal["vllm", "sglang"] = "vllm",
    model: str | None = None,
    tail: Tail = "bucket",
    headers: Mapping[str, str] | None = None,
    timeout: float = 120.0,
    workers: int = 8,
) -> list[TopKTeacher]:
    """The teacher of each prompt, ``(len(prompt) - 1, K)``: row i belongs to the student's logits at token i.

    url: of the server, without a path ("http://host:8000"). prompts: token ids, each of two or more. k: so many
    log-probabilities a position. server: whose requests to speak: vLLM's /v1/completions with prompt_logprobs, which
    needs ``model``, or SGLang's /generate. headers: such as {"Authorization": "Bearer ..."}. timeout: seconds a
    request. workers: requests at a time. Servers return log-probabilities at temperature 1.

    Raises:
        ValueError: an argument, or an answer of the wrong shape, naming prompt and position.
        RuntimeError: a server that cannot be reached or refuses, with what it said.
    """
    if server not in ("vllm", "sglang"):
        raise ValueError(f"server={server!r} is not known; allowed: 'vllm', 'sglang'")
    if server == "vllm" and model is None:
        raise ValueError("model must name the served model for server='vllm'; got None")
    if not url.startswith(("http://", "https://")):
        raise ValueError(f"url must start with http:// or https://; got {url!r}")
    for i, prompt in enumerate(prompts):
        if len(prompt) < 2:
            raise ValueError(f"prompts[{i}] must have two tokens or more, or nothing is predicted; got {len(prompt)}")
    path, body_of = ("/v1/completions", _vllm_body) if server == "vllm" else ("/generate", _sglang_body)
    address = url.rstrip("/") + path

    def fetch(i: int) -> TopKTeacher:
        tokens = [int(token) for token in prompts[i]]
        response = _post(address, body_of(tokens, k, model), headers or {}, timeout, f"prompts[{i}]")
        try:
            return teacher_from_response(response, "prompt", vocab_size=vocab_size, tail=tail, tokens=tokens)
        except (TypeError, ValueError) as error:
            raise ValueError(f"prompts[{i}]: {error}") from error

    with ThreadPoolExecutor(workers) as pool:
        return list(pool.map(fetch, range(len(prompts))))


def _vllm_body(tokens: list[int], k: int, model: str | None) -> dict[str, Any]:
    # one token must be generated; only the prompt is of interest
    return {"model": model, "prompt": tokens, "max_tokens": 1, "temperature": 0.0, "prompt_logprobs": k}


def _sglang_body(tokens: list[int], k: int, model: str | None) -> dict[str, Any]:
    return {
        "input_ids": tokens,
        "sampling_params": {"max_new_tokens": 1, "temperature": 0.0},
        "return_logprob": True,
        "logprob_start_len": 0,
        "top_logprobs_num": k,
    }


def _post(address: str, body: dict[str, Any], headers: Mapping[str, str], timeout: float, who: str) -> Any:
    request = Request(
        address, json.dumps(body).encode(), {"Content-Type": "application/json", **headers}, method="POST"
    )
    try:
        with urlopen(request, timeout=timeout) as answer:
            text = answer.read()
    except HTTPError as error:
        said = error.read(_SHOWN).decode(errors="replace")
        raise RuntimeError(f"{who}: {address} answered {error.code} {error.reason}: {said}") from error
    except (URLError, OSError) as error:
        reason = getattr(error, "reason", error)
        raise RuntimeError(f"{who}: {address} cannot be reached within {timeout} s: {reason}") from error
    try:
        return json.loads(text)
    except ValueError as error:
        shown = text[:_SHOWN].decode(errors="replace")
        raise ValueError(f"{who}: {address} answered no JSON: {shown}") from error
