"""Teachers from JSON in the shapes that vLLM and SGLang document, and from a server that speaks them."""

from __future__ import annotations

import copy
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch

from fastkd import TopKTeacher, sparse_kd_loss
from fastkd.teachers import fetch_teachers, stack_teachers, teacher_from_response

DATA = Path(__file__).parent / "data"
VOCAB = 50000
NEG_INF = float("-inf")


def recorded(name: str) -> dict:
    return json.loads((DATA / f"{name}.json").read_text())


def assert_rows(teacher: TopKTeacher, rows: list[dict[int, float]]) -> None:
    """Row by row: ids with their log-probabilities, best first, then padding."""
    assert teacher.temperature == 1.0 and teacher.logprobs.dtype == torch.float32
    assert len(teacher.ids) == len(rows)
    for ids, logprobs, row in zip(teacher.ids.tolist(), teacher.logprobs.tolist(), rows):
        assert ids == [*row, *[-1] * (len(ids) - len(row))]
        assert logprobs == pytest.approx([*row.values(), *[NEG_INF] * (len(ids) - len(row))])


def test_vllm_prompt() -> None:
    """The prompt's own token comes beside the top k, -9999 is -inf, and the null of the first token is left out."""
    teacher = teacher_from_response(recorded("vllm_prompt_logprobs"), vocab_size=VOCAB, tokens=[976, 290, 4853, 19705])
    assert_rows(
        teacher,
        [
            {11: -0.9162907, 290: -1.6094379, 976: -6.25},
            {4853: -0.2231436, 3280: -2.302585},
            {38835: -0.0512933, 11: -3.5, 19705: NEG_INF},
        ],
    )
    best = teacher_from_response(recorded("vllm_prompt_logprobs"), vocab_size=VOCAB, k=1)
    assert best.ids.tolist() == [[11], [4853], [38835]]


def test_vllm_completion_with_token_ids() -> None:
    teacher = teacher_from_response(recorded("vllm_completion_token_ids"), "completion", vocab_size=VOCAB)
    assert_rows(teacher, [{29082: -0.35667494, 1917: -1.6094379}, {13: -0.10536052, 11: -2.9957323, 6446: NEG_INF}])


def test_sglang() -> None:
    prompt = teacher_from_response(recorded("sglang_generate"), vocab_size=VOCAB, tail="renormalize")
    rows = [{11: -0.9162907, 290: -1.6094379}, {4853: -0.2231436, 3280: -2.302585}, {38835: -0.0512933, 11: -3.5}]
    assert_rows(prompt, rows)
    assert prompt.tail == "renormalize"
    generated = teacher_from_response(recorded("sglang_generate"), "completion", vocab_size=VOCAB)
    assert_rows(generated, [{6446: -0.1053605, 13: -2.9957323}])


def test_tokens_named_by_text() -> None:
    texts = {" best": 3, " quick": 4, " fox": 5, " dog": 6}
    response = recorded("openai_echo_texts")
    teacher = teacher_from_response(response, "completion", vocab_size=VOCAB, token_ids=texts)
    assert_rows(teacher, [{3: -0.69314718, 4: -1.2039728}, {5: -0.22314355, 6: -2.3025851}])
    with pytest.raises(
        ValueError, match=r"choices\[0\]\.logprobs\.top_logprobs\[1\] names the token ' best' by its text"
    ):
        teacher_from_response(response, "completion", vocab_size=VOCAB)
    del texts[" dog"]
    with pytest.raises(ValueError, match=r"top_logprobs\[2\] names the token ' dog', which token_ids does not have"):
        teacher_from_response(response, "completion", vocab_size=VOCAB, token_ids=texts)
    with pytest.raises(ValueError, match=r"top_logprobs\[2\] names the token 5 twice"):
        teacher_from_response(response, "completion", vocab_size=VOCAB, token_ids={**texts, " dog": 5})


# --- malformed: each names the position ------------------------------------------------------------------------------


def _vllm(change: Callable[[list], None]) -> tuple[str, Callable[[dict], None]]:
    return "vllm_prompt_logprobs", lambda response: change(response["choices"][0]["prompt_logprobs"])


def _sglang(change: Callable[[list], None]) -> tuple[str, Callable[[dict], None]]:
    return "sglang_generate", lambda response: change(response["meta_info"]["input_top_logprobs"])


def _set(*path: object, to: object) -> Callable[[list], None]:
    def change(entries: list) -> None:
        place = entries
        for key in path[:-1]:
            place = place[key]  # type: ignore[call-overload]
        place[path[-1]] = to  # type: ignore[call-overload]

    return change


_PROMPT, _TOP = r"choices\[0\]\.prompt_logprobs", r"meta_info\.input_top_logprobs"


@pytest.mark.parametrize(
    "case,message",
    [
        (_vllm(_set(2, to=None)), rf"{_PROMPT}\[2\] must be an object of tokens; got None"),
        (_vllm(_set(1, to=[1, 2])), rf"{_PROMPT}\[1\] must be an object of tokens; got list of 2"),
        (_vllm(_set(3, to={})), rf"{_PROMPT}\[3\] has no token"),
        (_vllm(_set(1, "The", to={"logprob": -1.0})), rf"{_PROMPT}\[1\] has the key 'The', which is no token id"),
        (_vllm(_set(1, "-5", to={"logprob": -1.0})), rf"{_PROMPT}\[1\] has the key '-5', which is no token id"),
        (_vllm(_set(1, "11", to=-0.9)), rf"{_PROMPT}\[1\]\['11'\] must be an object with a logprob; got -0.9"),
        (_vllm(_set(1, "11", "logprob", to=None)), rf"{_PROMPT}\[1\]\['11'\]: the log-probability must be a number"),
        (_vllm(_set(1, "11", "logprob", to=True)), rf"{_PROMPT}\[1\]\['11'\]: the log-probability must be a number"),
        (_vllm(_set(1, "11", "logprob", to=float("nan"))), rf"{_PROMPT}\[1\]\['11'\]: the log-probability must be"),
        (_vllm(_set(1, "11", "logprob", to=-0.1)), rf"{_PROMPT}\[1\]: the probabilities sum to 1\.1067\d*, above 1"),
        (_vllm(_set(1, "50000", to={"logprob": -9.0})), rf"{_PROMPT}\[1\] names the token 50000, outside \[0, 50000\)"),
        (_vllm(lambda entries: entries.pop()), rf"{_PROMPT} has 3 entries; the tokens are 4"),
        (_vllm(lambda entries: entries[2].pop("4853")), rf"{_PROMPT}\[2\] does not have the prompt's own token 4853"),
        (_sglang(_set(2, to=None)), rf"{_TOP}\[2\] must be a list of \[logprob, id, text\]; got None"),
        (_sglang(_set(1, 0, to=[-0.5])), rf"{_TOP}\[1\]\[0\] must be \[logprob, id, text\]; got \[-0.5\]"),
        (_sglang(_set(1, 0, to=[-0.5, "11", None])), rf"{_TOP}\[1\]\[0\] must be \[logprob, id, text\]"),
        (_sglang(_set(1, 0, 0, to="x")), rf"{_TOP}\[1\]\[0\]: the log-probability must be a number; got 'x'"),
        (_sglang(_set(1, 0, 1, to=290)), rf"{_TOP}\[1\] names the token 290 twice"),
        (_sglang(_set(3, 1, 1, to=-1)), rf"{_TOP}\[3\] names the token -1, outside"),
    ],
)
def test_malformed_responses_name_the_position(case: tuple, message: str) -> None:
    name, change = case
    response = recorded(name)
    change(response)
    with pytest.raises(ValueError, match=message):
        teacher_from_response(response, vocab_size=VOCAB, tokens=[976, 290, 4853, 19705])


@pytest.mark.parametrize(
    "response,message",
    [
        ({"error": {"message": "overloaded"}}, "response is an error of the server: .*overloaded"),
        ({"object": "error", "message": "no such model"}, "error of the server: no such model"),
        ({}, r"response has no choices\[0\]; got None"),
        ({"choices": []}, r"response has no choices\[0\]; got list of 0"),
        ({"choices": [{"prompt_logprobs": None}]}, r"choices\[0\] has no prompt_logprobs; ask with prompt_logprobs=K"),
        ({"choices": [{"prompt_logprobs": {"1": {}}}]}, r"choices\[0\]\.prompt_logprobs must be a list"),
        ({"choices": [{"prompt_logprobs": [None]}]}, r"prompt_logprobs has no distribution; got 1 entries"),
        ({"meta_info": {}}, "meta_info of the response has no input_top_logprobs; ask with return_logprob"),
    ],
)
def test_other_shapes(response: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        teacher_from_response(response, vocab_size=VOCAB)


def test_other_arguments() -> None:
    with pytest.raises(TypeError, match="response must be the decoded JSON object of a completion; got str"):
        teacher_from_response("{}", vocab_size=VOCAB)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="part='both' is not known"):
        teacher_from_response({}, "both", vocab_size=VOCAB)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"choices\[0\] has no logprobs\.top_logprobs; ask with logprobs=K"):
        teacher_from_response(recorded("vllm_prompt_logprobs"), "completion", vocab_size=VOCAB)


# --- a batch ---------------------------------------------------------------------------------------------------------


def test_stacked_teachers_are_each_in_its_row() -> None:
    long = teacher_from_response(recorded("vllm_prompt_logprobs"), vocab_size=VOCAB)
    short = teacher_from_response(recorded("sglang_generate"), "completion", vocab_size=VOCAB)
    batch = stack_teachers([long, short], rows=5)
    assert batch.ids.shape == (2, 5, 3)
    logits = torch.randn(2, 5, VOCAB, generator=torch.Generator().manual_seed(0))
    losses = sparse_kd_loss(logits, batch, reduction="none")
    torch.testing.assert_close(losses[0, :3], sparse_kd_loss(logits[0, :3], long, reduction="none"))
    torch.testing.assert_close(losses[1, :1], sparse_kd_loss(logits[1, :1], short, reduction="none"))
    assert (losses[0, 3:] == 0).all() and (losses[1, 1:] == 0).all()
    with pytest.raises(ValueError, match="rows must be at least that of the longest teacher, 3; got 2"):
        stack_teachers([long, short], rows=2)
    with pytest.raises(ValueError, match="one tail and temperature"):
        stack_teachers([long, teacher_from_response(recorded("sglang_generate"), vocab_size=VOCAB, tail="renormalize")])


# --- a server --------------------------------------------------------------------------------------------------------


class _Server(BaseHTTPRequestHandler):
    """Answers as a server would that serves `answer(path, body)`."""

    answer: Callable[[str, dict, dict], tuple[int, bytes]]

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        code, text = type(self).answer(self.path, body, dict(self.headers))
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def serving(answer: Callable[[str, dict, dict], tuple[int, bytes]]) -> Iterator[str]:
    handler = type("Handler", (_Server,), {"answer": staticmethod(answer)})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}"
        finally:
            server.shutdown()
            thread.join()


def row_after(tokens: list[int], k: int) -> dict[int, float]:
    """What this test's model says comes next: depends on all tokens before, so that a shift or a mix-up shows."""
    seed = hash(tuple(tokens)) % 1000
    logits = torch.randn(VOCAB, generator=torch.Generator().manual_seed(seed))
    lp, ids = torch.log_softmax(logits, -1).topk(k)
    return dict(zip(ids.tolist(), lp.tolist()))


def vllm_answer(path: str, body: dict, headers: dict) -> tuple[int, bytes]:
    assert path == "/v1/completions" and body["model"] == "served" and body["max_tokens"] == 1
    assert headers["Authorization"] == "Bearer key"
    entries: list = [None]
    for i, token in enumerate(body["prompt"][1:], 1):
        row = row_after(body["prompt"][:i], body["prompt_logprobs"])
        row.setdefault(token, -20.0)
        entries.append({str(t): {"logprob": lp, "rank": 1, "decoded_token": "x"} for t, lp in row.items()})
    response = copy.deepcopy(recorded("vllm_prompt_logprobs"))
    response["choices"][0]["prompt_logprobs"] = entries
    return 200, json.dumps(response).encode()


def sglang_answer(path: str, body: dict, headers: dict) -> tuple[int, bytes]:
    assert path == "/generate" and body["return_logprob"] and body["logprob_start_len"] == 0
    tokens, k = body["input_ids"], body["top_logprobs_num"]
    rows = [[[lp, t, None] for t, lp in row_after(tokens[:i], k).items()] for i in range(1, len(tokens))]
    response = copy.deepcopy(recorded("sglang_generate"))
    response["meta_info"]["input_top_logprobs"] = [None, *rows]
    return 200, json.dumps(response).encode()


@pytest.mark.parametrize("server,answer", [("vllm", vllm_answer), ("sglang", sglang_answer)])
def test_fetch_teachers(server: str, answer: Callable) -> None:
    prompts = [[5, 6, 7], [9, 8], list(range(100, 112))]
    with serving(answer) as url:
        teachers = fetch_teachers(
            url + "/", prompts, 4, vocab_size=VOCAB, server=server, model="served",
            headers={"Authorization": "Bearer key"}, workers=3,
        )  # fmt: skip
    for prompt, teacher in zip(prompts, teachers):
        assert len(teacher.ids) == len(prompt) - 1
        for i in range(len(prompt) - 1):
            expected = row_after(prompt[: i + 1], 4)
            got = dict(zip(teacher.ids[i].tolist(), teacher.logprobs[i].tolist()))
            assert {t: got[t] for t in expected} == pytest.approx(expected)


def test_what_a_server_can_do_wrong() -> None:
    arguments = {"vocab_size": VOCAB, "model": "served"}
    with (
        serving(lambda *_: (404, b'{"message": "no such model"}')) as url,
        pytest.raises(RuntimeError, match=r"prompts\[0\]: .*/v1/completions answered 404 .*no such model"),
    ):
        fetch_teachers(url, [[1, 2]], 3, **arguments)
    with (
        serving(lambda *_: (200, b"<html>")) as url,
        pytest.raises(ValueError, match=r"prompts\[0\]: .* answered no JSON: <html>"),
    ):
        fetch_teachers(url, [[1, 2]], 3, **arguments)
    with (
        serving(lambda *_: (200, json.dumps(recorded("vllm_prompt_logprobs")).encode())) as url,
        pytest.raises(ValueError, match=r"prompts\[1\]: choices\[0\]\.prompt_logprobs has 4 entries; the tokens are 2"),
    ):
        fetch_teachers(url, [[976, 290, 4853, 19705], [1, 2]], 3, **arguments)
    with pytest.raises(RuntimeError, match=r"prompts\[0\]: http://127\.0\.0\.1:9/.* cannot be reached"):
        fetch_teachers("http://127.0.0.1:9", [[1, 2]], 3, timeout=5, **arguments)


@pytest.mark.parametrize(
    "change,message",
    [
        ({"server": "tgi"}, "server='tgi' is not known; allowed: 'vllm', 'sglang'"),
        ({"model": None}, "model must name the served model for server='vllm'; got None"),
        ({"url": "localhost:8000"}, "url must start with http:// or https://; got 'localhost:8000'"),
        ({"prompts": [[1, 2], [3]]}, r"prompts\[1\] must have two tokens or more, or nothing is predicted; got 1"),
    ],
)
def test_arguments_of_fetch(change: dict, message: str) -> None:
    arguments = {"url": "http://127.0.0.1:9", "prompts": [[1, 2]], "k": 3, "vocab_size": VOCAB, "model": "m", **change}
    with pytest.raises(ValueError, match=message):
        fetch_teachers(**arguments)
