"""The table of sparse teachers, each row with its reason, and how a row becomes tensors and runs."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from inputs import BF16, CHUNK, FP16, FP32, FP64, Case, Inputs, Outcome, make_inputs, to_numpy
from reference import Reference
from sparse_reference import Teacher, sparse_reference
from torch import Tensor

import fastkd
from fastkd import TopKTeacher
from fastkd.topk import mass_resolution

TAILS = {
    "bucket": (
        "forward_kl",
        "reverse_kl",
        "jsd",
        "total_variation",
        "skew_forward_kl",
        "skew_reverse_kl",
        "symmetric_kl",
    ),
    "renormalize": ("forward_kl", "jsd", "total_variation", "skew_forward_kl", "skew_reverse_kl"),
    "sampled": ("forward_kl",),
}


@dataclass(frozen=True)
class SparseCase:
    """case: the logits of both models; the teacher is made of its own."""

    case: Case
    k: int
    order: str = "shuffled"  # of the ids: "shuffled", "ascending", "by_rank"
    padding: bool = False  # rows have fewer and fewer entries, padding anywhere between them
    logprob_dtype: torch.dtype = FP32
    id_dtype: torch.dtype = torch.int64

    @property
    def name(self) -> str:
        return f"{self.case.name}-k{self.k}-{self.order}{'-padded' if self.padding else ''}"


def _case(reason: str, k: int = 5, dtype: torch.dtype = FP32, order: str = "shuffled", padding: bool = False,
          logprob_dtype: torch.dtype = FP32, id_dtype: torch.dtype = torch.int64, **fields) -> SparseCase:  # fmt: skip
    return SparseCase(Case(reason, student_dtype=dtype, **fields), k, order, padding, logprob_dtype, id_dtype)


SPARSE_CASES = [
    _case("one column: K = V = 1", k=1, vocab=1),
    _case("two columns, one of them named", k=1, vocab=2),
    _case("K = V: no rest", k=37),
    _case("K = V over a chunk, in bf16", k=CHUNK + 9, dtype=BF16, lead=(2,), vocab=CHUNK + 9),
    _case("K = V - 1: a rest of one column", k=36),
    _case("the named columns in one vector group", k=3, vocab=40, regime="peaked"),
    _case("vector of 16 plus one, ids in order", k=4, vocab=17, order="ascending"),
    _case("no row", lead=(0,)),
    _case("one row, no leading dimension", lead=(), vocab=65),
    _case("rows of two levels", lead=(2, 3), vocab=65, dtype=FP16),
    _case("fewer entries than K, padding between them", k=9, vocab=120, padding=True),
    _case("... in bf16, two chunks", k=30, dtype=BF16, vocab=CHUNK + 100, lead=(3,), padding=True),
    _case("int32 ids, best first", k=8, vocab=300, order="by_rank", id_dtype=torch.int32),
    _case("many ids in every chunk", k=200, vocab=3 * CHUNK + 5, lead=(2,)),
    _case("a chunk's end: ids on both sides", k=CHUNK, vocab=CHUNK + 7, lead=(2,), regime="late_top"),
    _case("a chunk wholly named", k=CHUNK, vocab=2 * CHUNK, lead=(2,), regime="ascending", order="ascending"),
    _case("Llama 3, a row split over threads", k=64, dtype=BF16, lead=(1,), vocab=128256),
    _case("T = 1", temperature=1.0, vocab=300, k=10),
    _case("T = 1, bf16", dtype=BF16, temperature=1.0, vocab=300, k=10),
    _case("T = 3: third powers", temperature=3.0, vocab=300, k=10),
    _case("T = 2.5: an exponential of its own, fp16", dtype=FP16, temperature=2.5, vocab=CHUNK + 1, lead=(2,), k=20),
    _case("T = 0.1", temperature=0.1, vocab=100, k=10),
    _case("T = 20", temperature=20.0, vocab=100, k=10),
    _case("the named hold nearly all mass: the rest is a difference", regime="peaked", vocab=500, temperature=1.0),
    _case("... in bf16", regime="peaked", dtype=BF16, vocab=500, temperature=1.0, k=20),
    _case("the student's mass is on the rest", regime="disagreeing", vocab=500, temperature=1.0),
    _case("the student's mass is on the rest, hard", regime="disagreeing", vocab=500, temperature=0.1),
    _case("late in training", regime="near", vocab=1000, k=50, temperature=1.0),
    _case("late in training, over chunks, bf16", regime="near", dtype=BF16, vocab=CHUNK * 2 + 30, k=50, lead=(2,)),
    _case("underflow of either", regime="exact_zeros", vocab=200, k=20, temperature=1.0),
    _case("masks in both, rest wholly masked", regime="masked_both", vocab=30, k=25),
    _case("masks in both", regime="masked_both", vocab=3 * CHUNK + 5, lead=(2,), k=20),
    _case("student masks named columns", regime="masked_student", vocab=50, k=10),
    _case("ids of probability 0", regime="masked_teacher", vocab=50, k=45),
    _case("ties everywhere", regime="flat", vocab=100, k=7),
    _case("logits of +-1e4", regime="huge", vocab=100, k=7),
    _case("a common offset of 1e4", regime="offset", vocab=CHUNK + 100, k=7, lead=(2,)),
    _case("maximum moves in every chunk", regime="ascending", vocab=5 * CHUNK + 3, lead=(2,), k=11),
    _case("log-probabilities stored in bf16", k=10, vocab=100, logprob_dtype=BF16),
    _case("log-probabilities stored in fp16", k=10, vocab=100, logprob_dtype=FP16, dtype=FP16),
    _case("row stride > V", layout="padded", lead=(5,), vocab=67),
    _case("... over a chunk in bf16", dtype=BF16, layout="padded", lead=(3,), vocab=CHUNK + 3, k=30),
    _case("logits[:, 1:]", layout="shifted", lead=(3, 4), vocab=33),
    _case("more levels of strides than the kernels address", layout="permuted", lead=(2, 3, 4), vocab=17),
    _case("transposed last dimension", layout="columns_first", lead=(5,), vocab=33),
]  # fmt: skip


class SparseInputs:
    """Tensors of a case; the same every time."""

    def __init__(self, sparse: SparseCase, tail: str) -> None:
        self.sparse, self.tail, case = sparse, tail, sparse.case
        self.inputs: Inputs = make_inputs(case)
        self.labels, self.token_weights = self.inputs.labels, self.inputs.token_weights
        taken_at = 1.0 if tail == "renormalize" else case.temperature
        lp = torch.log_softmax(self.inputs.teacher.contiguous().double() / taken_at, -1)
        g = torch.Generator().manual_seed(7)
        ids = _draws(lp, sparse.k, g) if tail == "sampled" else lp.topk(sparse.k).indices
        ids = _ordered(ids, sparse.order, g)
        lp = lp.gather(-1, ids)
        if sparse.padding:
            absent = torch.rand(ids.shape, generator=g) < torch.linspace(0, 0.8, ids.shape[0])[:, None]
            absent[..., 0] = False
            ids, lp = ids.masked_fill(absent, -1), lp.masked_fill(absent, float("-inf"))
        weights = 0.1 + torch.rand(ids.shape, generator=g) if tail == "sampled" and sparse.k % 2 == 0 else None
        temperature = 1.0 if tail == "renormalize" else None
        self.teacher = TopKTeacher(
            ids.to(sparse.id_dtype), lp.to(sparse.logprob_dtype), tail, weights=weights, temperature=temperature
        )

    def rows(self, lp_dtype: torch.dtype = FP64) -> list[Teacher]:
        """The teacher for the reference."""
        t = self.teacher
        ids, lp = (to_numpy(x).reshape(-1, t.k) for x in (t.ids, t.logprobs.to(lp_dtype)))
        weights = None if t.weights is None else to_numpy(t.weights).reshape(-1, t.k)
        resolution = mass_resolution(t.logprobs.dtype)
        found = []
        for n in range(len(ids)):
            keep = ids[n] >= 0
            w = None if weights is None else weights[n][keep].astype(np.float64)
            found.append(Teacher(ids[n][keep].astype(int), lp[n][keep], w, t.tail, t.temperature, resolution))
        return found


def _draws(lp: Tensor, k: int, g: torch.Generator) -> Tensor:
    rows = lp.exp().reshape(-1, lp.shape[-1])
    if not len(rows):
        return torch.zeros((*lp.shape[:-1], k), dtype=torch.int64)
    return torch.multinomial(rows, k, replacement=True, generator=g).reshape(*lp.shape[:-1], k)


def _ordered(ids: Tensor, order: str, g: torch.Generator) -> Tensor:
    if order == "ascending":
        return ids.sort(-1).values
    if order == "by_rank":
        return ids
    return ids[..., torch.randperm(ids.shape[-1], generator=g)]


def options_of(inputs: SparseInputs, divergence: str, everything: bool) -> tuple[dict, Tensor | None]:
    """Keywords of sparse_kd_loss and the upstream gradient: the divergence alone, or every other option at once."""
    case, labels = inputs.sparse.case, inputs.labels
    options = {"divergence": divergence, "temperature": case.temperature, "return_stats": True, **case.options}
    if not everything:
        return options, None
    options |= {
        "labels": labels,
        "token_weights": inputs.token_weights,
        "beta": 0.2,
        "kd_weight": 0.7,
        "ce_weight": 0.6,
        "label_smoothing": 0.0 if case.regime.startswith("masked") else 0.1,
        "z_loss": 1e-3,
        "reduction": "none",
    }
    return options, torch.linspace(-1, 2, max(1, labels.numel()))[: labels.numel()].view(case.lead)


def run_sparse(
    inputs: SparseInputs, options: dict, upstream: Tensor | None = None, dtype: torch.dtype | None = None
) -> Outcome:
    """Loss, gradient and statistics; dtype: the same values with the student in another one."""
    dense = inputs.inputs
    base = dense.student_base if dtype is None else dense.student_base.to(dtype)
    leaf = base.detach().requires_grad_()
    student = dense.student_of(leaf.clone() if options.get("inplace") else leaf)
    result = fastkd.sparse_kd_loss(student, inputs.teacher, **options)
    loss, stats = result if options.get("return_stats") else (result, None)
    (gradient,) = torch.autograd.grad(loss, leaf, upstream)
    return Outcome(loss.detach(), dense.student_of(gradient), stats)


def sparse_reference_of(inputs: SparseInputs, options: dict, upstream: Tensor | None = None) -> Reference:
    """The reference for the same keywords."""
    keywords = {k: v for k, v in options.items() if k not in ("backend", "inplace", "return_stats")}
    for name in ("labels", "token_weights", "temperature"):
        if isinstance(keywords.get(name), Tensor):
            keywords[name] = to_numpy(keywords[name])
    up = 1.0 if upstream is None else to_numpy(upstream)
    return sparse_reference(to_numpy(inputs.inputs.student), inputs.rows(), upstream=up, **keywords)
