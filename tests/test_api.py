"""Arguments: what is refused, with which error, and that the message names the argument, what came, what is allowed."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from inputs import BF16, FP32, FP64

import fastkd

LEAD, V = (2, 3), 7
BACKENDS = ("native", "eager", "auto")
NAN, INF = float("nan"), float("inf")


def _logits(*shape: int, dtype: torch.dtype = FP32, grad: bool = False) -> torch.Tensor:
    return torch.randn(*(shape or (*LEAD, V))).to(dtype).requires_grad_(grad)


def _labels() -> torch.Tensor:
    return torch.randint(V, LEAD)


def _with(x: torch.Tensor, place: tuple[int, ...], value: float) -> torch.Tensor:
    x = x.clone()
    x[place] = value
    return x


class Bad(NamedTuple):
    """error, the words that its message must hold (argument, what came, what is allowed), and the call."""

    error: type[Exception]
    words: tuple[str, ...]
    keywords: Callable[[], dict]


def _bad(error: type[Exception], *words: str, **keywords) -> Bad:
    return Bad(error, words, lambda: {k: v() if callable(v) else v for k, v in keywords.items()})


BAD = {
    # tensors: type, dtype, shape
    "student list": _bad(TypeError, "student_logits", "list", "tensor", student_logits=lambda: [1.0]),
    "teacher None": _bad(TypeError, "teacher_logits", "NoneType", "tensor", teacher_logits=lambda: None),
    "student int64": _bad(TypeError, "student_logits", "int64", "float32", student_logits=lambda: _labels()),
    "teacher bool": _bad(TypeError, "teacher_logits", "bool", "bfloat16", teacher_logits=lambda: _logits() > 0),
    "student complex": _bad(TypeError, "student_logits", "complex64", "float16", student_logits=lambda: _logits() * 1j),
    "student 0-d": _bad(ValueError, "student_logits", "()", "V >= 1", student_logits=lambda: torch.tensor(1.0)),
    "no columns": _bad(ValueError, "student_logits", "(2, 3, 0)", "V >= 1", student_logits=lambda: _logits(2, 3, 0)),
    "teacher of other rows": _bad(
        ValueError, "student_logits", "teacher_logits", "(2, 3, 7)", "(2, 4, 7)",
        teacher_logits=lambda: _logits(2, 4, 7),
    ),
    "teacher of other rank": _bad(
        ValueError, "teacher_logits", "(6, 7)", "(2, 3, 7)", teacher_logits=lambda: _logits(6, 7)
    ),
    "other vocabulary": _bad(
        ValueError, "student_logits", "teacher_logits", "7", "9", "truncate", teacher_logits=lambda: _logits(2, 3, 9)
    ),
    "teacher requires grad": _bad(
        ValueError, "teacher_logits", "require grad", "detach", teacher_logits=lambda: _logits(grad=True)
    ),
    "teacher on another device": _bad(
        ValueError, "teacher_logits", "meta", "cpu", teacher_logits=lambda: _logits().to("meta")
    ),
    # labels
    "labels int32": _bad(TypeError, "labels", "int32", "int64", labels=lambda: _labels().int()),
    "labels float": _bad(TypeError, "labels", "float32", "int64", labels=lambda: _labels().float()),
    "labels list": _bad(TypeError, "labels", "list", "tensor", labels=lambda: [1, 2]),
    "labels flat": _bad(ValueError, "labels", "(6,)", "(2, 3)", labels=lambda: _labels().view(-1)),
    "labels one-hot": _bad(ValueError, "labels", "(2, 3, 1)", "(2, 3)", labels=lambda: _labels()[..., None]),
    "label V": _bad(ValueError, "labels", "[1, 2]", "7", "ignore_index", labels=lambda: _with(_labels(), (1, 2), V)),
    "label -1": _bad(ValueError, "labels", "[0, 1]", "-1", "[0, 7)", labels=lambda: _with(_labels(), (0, 1), -1)),
    "label -100 not ignored": _bad(
        ValueError, "labels", "-100", "ignore_index", labels=lambda: _with(_labels(), (0, 1), -100), ignore_index=-1
    ),
    "label far out": _bad(ValueError, "labels", str(2**40), labels=lambda: _with(_labels(), (1, 0), 2**40)),
    "label with ce": _bad(
        ValueError, "labels", "[0, 0]", "99", labels=lambda: _with(_labels(), (0, 0), 99), ce_weight=1.0
    ),
    "label beyond the common prefix": _bad(
        ValueError, "labels", "6", "5", labels=lambda: _with(_labels() % 5, (0, 0), 6),
        teacher_logits=lambda: _logits(2, 3, 5), vocab="truncate",
    ),
    "ce without labels": _bad(ValueError, "ce_weight", "0.5", "labels", labels=None, ce_weight=0.5),
    # temperature
    "temperature 0": _bad(ValueError, "temperature", "0", "> 0", temperature=0.0),
    "temperature negative": _bad(ValueError, "temperature", "-2", "> 0", temperature=-2.0),
    "temperature nan": _bad(ValueError, "temperature", "nan", "finite", temperature=NAN),
    "temperature inf": _bad(ValueError, "temperature", "inf", "finite", temperature=INF),
    "temperature str": _bad(TypeError, "temperature", "str", "number", temperature="2"),
    "temperature bool": _bad(TypeError, "temperature", "bool", "number", temperature=True),
    "temperature of other shape": _bad(
        ValueError, "temperature", "(3,)", "(2, 3)", temperature=lambda: torch.ones(3)
    ),
    "temperature 0-d": _bad(ValueError, "temperature", "()", "(2, 3)", temperature=lambda: torch.tensor(2.0)),
    "temperature tensor with a nan": _bad(
        ValueError, "temperature", "[1, 1]", "nan", temperature=lambda: _with(torch.ones(LEAD), (1, 1), NAN)
    ),
    "temperature tensor with a 0": _bad(
        ValueError, "temperature", "[0, 2]", "> 0", temperature=lambda: _with(torch.ones(LEAD), (0, 2), 0.0)
    ),
    "temperature tensor negative": _bad(
        ValueError, "temperature", "[0, 0]", "-1", temperature=lambda: _with(torch.ones(LEAD), (0, 0), -1.0)
    ),
    "temperature tensor inf": _bad(
        ValueError, "temperature", "[1, 0]", "inf", temperature=lambda: _with(torch.ones(LEAD), (1, 0), INF)
    ),
    "temperature requires grad": _bad(
        ValueError, "temperature", "require grad", "detach", temperature=lambda: torch.ones(LEAD, requires_grad=True)
    ),
    "temperature on another device": _bad(
        ValueError, "temperature", "meta", "cpu", temperature=lambda: torch.ones(LEAD, device="meta")
    ),
    # names
    "divergence": _bad(ValueError, "divergence", "'kl'", "'forward_kl'", "'skew_reverse_kl'", divergence="kl"),
    "divergence None": _bad(ValueError, "divergence", "None", "'jsd'", divergence=None),
    "reduction": _bad(ValueError, "reduction", "'batchmean'", "'mean'", "'none'", reduction="batchmean"),
    "vocab": _bad(ValueError, "vocab", "'pad'", "'truncate'", vocab="pad"),
    "backend": _bad(ValueError, "backend", "'cuda'", "'native'", "'eager'", backend="cuda"),
    # beta
    "jsd beta 0": _bad(ValueError, "beta", "0", "(0, 1)", "jsd", divergence="jsd", beta=0.0),
    "jsd beta 1": _bad(ValueError, "beta", "1", "(0, 1)", divergence="jsd", beta=1.0),
    "jsd beta nan": _bad(ValueError, "beta", "nan", "(0, 1)", divergence="jsd", beta=NAN),
    "skew beta 1": _bad(ValueError, "beta", "1", "(0, 1)", divergence="skew_forward_kl", beta=1),
    "skew beta -0.1": _bad(ValueError, "beta", "-0.1", "(0, 1)", divergence="skew_reverse_kl", beta=-0.1),
    "symmetric beta 1.5": _bad(ValueError, "beta", "1.5", "[0, 1]", divergence="symmetric_kl", beta=1.5),
    "beta str": _bad(TypeError, "beta", "str", "number", beta="half"),
    "beta tensor": _bad(TypeError, "beta", "Tensor", "number", beta=lambda: torch.tensor(0.5)),
    # weights and their like
    "kd_weight negative": _bad(ValueError, "kd_weight", "-1", ">= 0", kd_weight=-1.0),
    "kd_weight nan": _bad(ValueError, "kd_weight", "nan", "finite", kd_weight=NAN),
    "ce_weight inf": _bad(ValueError, "ce_weight", "inf", "finite", ce_weight=INF),
    "ce_weight None": _bad(TypeError, "ce_weight", "NoneType", "number", ce_weight=None),
    "label_smoothing 1": _bad(ValueError, "label_smoothing", "1", "[0, 1)", label_smoothing=1.0),
    "label_smoothing negative": _bad(ValueError, "label_smoothing", "-0.1", "[0, 1)", label_smoothing=-0.1),
    "z_loss negative": _bad(ValueError, "z_loss", "-1", ">= 0", z_loss=-1.0),
    "student_softcap 0": _bad(ValueError, "student_softcap", "0", "> 0", "None", student_softcap=0.0),
    "teacher_softcap negative": _bad(ValueError, "teacher_softcap", "-30", "> 0", teacher_softcap=-30.0),
    "teacher_softcap nan": _bad(ValueError, "teacher_softcap", "nan", "finite", teacher_softcap=NAN),
    "student_softcap str": _bad(TypeError, "student_softcap", "str", "None", student_softcap="30"),
    "ignore_index float": _bad(TypeError, "ignore_index", "float", "int", ignore_index=-100.0),
    "ignore_index None": _bad(TypeError, "ignore_index", "NoneType", "int", ignore_index=None),
    "scale_by_t2 int": _bad(TypeError, "scale_by_t2", "int", "bool", scale_by_t2=1),
    "vocab_shard tuple": _bad(TypeError, "vocab_shard", "(0, 7)", "VocabShard", vocab_shard=lambda: (0, 7)),
    "shard start": _bad(
        TypeError, "vocab_shard.start", "float", "int", vocab_shard=lambda: fastkd.VocabShard(0.0, 7)
    ),
    "shard backwards": _bad(
        ValueError, "vocab_shard", "start=7", "stop=3", "<=", vocab_shard=lambda: fastkd.VocabShard(7, 3)
    ),
    "shard group": _bad(
        TypeError, "vocab_shard.group", "str", "ProcessGroup", vocab_shard=lambda: fastkd.VocabShard(0, 7, "tp")
    ),
    "inplace str": _bad(TypeError, "inplace", "str", "bool", inplace="yes"),
    "return_stats None": _bad(TypeError, "return_stats", "NoneType", "bool", return_stats=None),
    # per-token weights
    "token_weights of other shape": _bad(
        ValueError, "token_weights", "(2, 3, 1)", "(2, 3)", token_weights=lambda: torch.ones(2, 3, 1)
    ),
    "token_weights int": _bad(TypeError, "token_weights", "int64", "float32", token_weights=lambda: _labels()),
    "token_weights float": _bad(TypeError, "token_weights", "float", "tensor", token_weights=1.0),
    "token_weights require grad": _bad(
        ValueError, "token_weights", "require grad", "detach",
        token_weights=lambda: torch.ones(LEAD, requires_grad=True),
    ),
    # the denominator
    "num_items 0": _bad(ValueError, "num_items_in_batch", "0", "> 0", num_items_in_batch=0),
    "num_items negative": _bad(ValueError, "num_items_in_batch", "-3", "> 0", num_items_in_batch=-3),
    "num_items str": _bad(TypeError, "num_items_in_batch", "str", "int", num_items_in_batch="3"),
    "num_items bool": _bad(TypeError, "num_items_in_batch", "bool", "int", num_items_in_batch=True),
    "num_items 1-d": _bad(
        ValueError, "num_items_in_batch", "(1,)", "0-d", num_items_in_batch=lambda: torch.tensor([3])
    ),
    "num_items with sum": _bad(
        ValueError, "num_items_in_batch", "'sum'", "mean", num_items_in_batch=3, reduction="sum"
    ),
    "num_items with none": _bad(
        ValueError, "num_items_in_batch", "'none'", "mean", num_items_in_batch=3, reduction="none"
    ),
}  # fmt: skip


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("grad", [False, True], ids=["value", "gradient"])
@pytest.mark.parametrize("bad", BAD.values(), ids=BAD)
def test_bad_input(bad: Bad, grad: bool, backend: str, native: str) -> None:
    keywords = {"student_logits": _logits(grad=grad), "teacher_logits": _logits(), "labels": _labels()}
    keywords |= {"backend": backend} | bad.keywords()
    with pytest.raises(bad.error) as caught:
        fastkd.kd_loss(**keywords)
    assert type(caught.value) is bad.error
    message = str(caught.value)
    missing = [word for word in bad.words if word not in message]
    assert not missing, f"the message lacks {missing}: {message}"
    assert message.count("\n") <= 1 and "csrc" not in message


def test_the_table_covers_every_argument() -> None:
    """An argument added to kd_loss without a row here is an argument without a check."""
    import inspect

    covered = {name for bad in BAD.values() for name in bad.keywords()} | {"student_logits"}
    assert set(inspect.signature(fastkd.kd_loss).parameters) <= covered


def test_nothing_is_written_when_a_value_is_wrong(native: str) -> None:
    """In place, a bad label in the last row must not cost the logits of the first."""
    logits = _logits(grad=True) * 1
    before = logits.detach().clone()
    labels = _with(_labels(), (1, 2), V + 3)
    with pytest.raises(ValueError, match=r"labels"):
        fastkd.kd_loss(logits, _logits(), labels, inplace=True, backend=native)
    assert torch.equal(logits, before)


def test_shard_without_a_process_group() -> None:
    with pytest.raises(RuntimeError, match=r"vocab_shard.*group=None.*init_process_group"):
        fastkd.kd_loss(_logits(), _logits(), vocab_shard=fastkd.VocabShard(0, V))


class TestInplace:
    """Overwriting is refused wherever autograd would then be wrong."""

    def _refused(self, logits: torch.Tensor, *words: str) -> None:
        before = logits.detach().clone()
        with pytest.raises(ValueError) as caught:
            fastkd.kd_loss(logits, _logits(*logits.shape), inplace=True, backend="native")
        for word in ("inplace=True", "student_logits", "inplace=False", *words):
            assert word in str(caught.value), str(caught.value)
        assert torch.equal(logits, before), "overwritten although refused"

    def test_leaf(self, native: str) -> None:
        self._refused(_logits(grad=True), "leaf")

    def test_view_of_a_leaf(self, native: str) -> None:
        self._refused(_logits(4, 9, grad=True)[:, 1:8], "leaf")

    def test_reshaped_view_of_a_leaf(self, native: str) -> None:
        self._refused(_logits(grad=True).view(6, V), "leaf")

    @pytest.mark.parametrize(
        "function",
        [
            torch.exp,
            torch.tanh,
            torch.sigmoid,
            lambda x: x.softmax(-1),
            lambda x: x.log_softmax(-1),
            torch.sqrt,
            torch.relu,
        ],
        ids=["exp", "tanh", "sigmoid", "softmax", "log_softmax", "sqrt", "relu"],
    )
    def test_output_that_its_producer_saved(self, function: Callable, native: str) -> None:
        self._refused(function(_logits(grad=True).abs()), "autograd")

    @pytest.mark.parametrize("view", [lambda x: x.view(6, V), lambda x: x[:, 1:], lambda x: x.transpose(0, 1)])
    def test_view_of_an_output_that_its_producer_saved(self, view: Callable, native: str) -> None:
        self._refused(view(torch.tanh(_logits(grad=True))), "autograd")

    def test_expanded_rows(self, native: str) -> None:
        self._refused((_logits(1, V, grad=True) * 1).expand(4, V), "expanded")

    def test_transposed_columns(self, native: str) -> None:
        self._refused((_logits(V, 4, grad=True) * 1).t(), "stride")

    def test_overlapping_rows(self, native: str) -> None:
        self._refused((_logits(40, grad=True) * 1).unfold(0, V, 3), "share memory")

    def test_teacher_that_shares_memory_with_other_rows(self, native: str) -> None:
        """Row n of the gradient would overwrite the teacher of row n - 1 before it is read."""
        both = _logits(5, V, grad=True) * 1
        with pytest.raises(ValueError, match=r"inplace=True.*teacher_logits"):
            fastkd.kd_loss(both[1:], both[:-1].detach(), inplace=True, backend=native)

    def test_linear_layer_is_allowed(self, native: str) -> None:
        """The case that the option is for: the head saves its input and weight, not the logits."""
        head = torch.nn.Linear(4, V)
        logits = head(torch.randn(*LEAD, 4))
        loss = fastkd.kd_loss(logits[:, :-1], _logits(*LEAD, V)[:, :-1], inplace=True, backend=native)
        loss.backward()
        assert head.weight.grad.isfinite().all()

    def test_what_the_eager_backend_does(self) -> None:
        """It ignores the option: logits unchanged, loss right."""
        leaf = _logits(grad=True)
        teacher = _logits()
        loss = fastkd.kd_loss(leaf, teacher, inplace=True, backend="eager")
        assert torch.equal(loss, fastkd.kd_loss(leaf, teacher, backend="eager"))


class TestBackends:
    """Who computes, and why not the others."""

    def test_explicit_native_raises_with_the_reason(self, native: str) -> None:
        with pytest.raises(RuntimeError, match=r"native.*float64.*eager"):
            fastkd.kd_loss(_logits(dtype=FP64), _logits(dtype=FP64), backend="native")
        with pytest.raises(RuntimeError, match=r"native.*meta"):
            fastkd.kd_loss(_logits().to("meta"), _logits().to("meta"), backend="native")

    def test_auto_is_native_where_it_can_run(self, native: str) -> None:
        x, t = _logits(dtype=BF16), _logits()
        auto, explicit = fastkd.kd_loss(x, t), fastkd.kd_loss(x, t, backend="native")
        assert torch.equal(auto, explicit)
        assert fastkd.explain(x, t).backend == "native"

    def test_auto_is_eager_elsewhere(self) -> None:
        x = _logits(dtype=FP64)
        assert fastkd.explain(x, x).backend == "eager"
        assert "float64" in str(fastkd.explain(x, x)) and "student_logits" in str(fastkd.explain(x, x))
        assert fastkd.kd_loss(x, x).dtype == FP64

    def test_explain_prints_every_backend_with_a_reason(self, native: str) -> None:
        answer = fastkd.explain(_logits(), _logits())
        lines = str(answer).splitlines()
        assert [line.split()[0 if not line.startswith("->") else 1] for line in lines] == ["native", "triton", "eager"]
        assert [line.startswith("->") for line in lines] == [True, False, False]
        assert all(len(reason) > 10 for reason in answer.reasons.values())

    def test_explain_of_an_explicit_backend(self, native: str) -> None:
        assert fastkd.explain(_logits(), _logits(), backend="eager").backend == "eager"
        wide = _logits(dtype=FP64)
        assert fastkd.explain(wide, wide, backend="native").backend == ""

    def test_explain_refuses_what_the_loss_refuses(self) -> None:
        with pytest.raises(ValueError, match=r"backend.*'cuda'"):
            fastkd.explain(_logits(), _logits(), backend="cuda")

    def test_backends_names_instruction_sets(self, native: str) -> None:
        text = str(fastkd.backends())
        assert "native" in text and "eager" in text
        assert "baseline" in text and "FASTKD_CPU_ISA" in text
