"""Every wrong argument of linear_kd_loss and LinearKDLoss: the error names it, what came and what is allowed."""

from __future__ import annotations

import inspect

import pytest
import torch
from torch import Tensor

import fastkd
from fastkd import LinearKDLoss, linear_kd_loss


def _arguments() -> dict[str, Tensor]:
    return {
        "student_hidden": torch.randn(2, 3, 4, requires_grad=True),
        "student_weight": torch.randn(9, 4, requires_grad=True),
        "teacher_hidden": torch.randn(2, 3, 6),
        "teacher_weight": torch.randn(9, 6),
        "labels": torch.randint(9, (2, 3)),
    }


def _logits(**options) -> dict:
    return {"teacher_hidden": None, "teacher_weight": None, "teacher_logits": torch.randn(2, 3, 9), **options}


WRONG = {
    "hidden is no tensor": ({"student_hidden": [1.0]}, TypeError, r"student_hidden must be a tensor.*got list"),
    "hidden is int": ({"student_hidden": torch.ones(2, 3, 4).int()}, TypeError, r"student_hidden.*float32.*int32"),
    "hidden is 0-d": ({"student_hidden": torch.tensor(1.0)}, ValueError, r"student_hidden must have.*\(\.\.\., H\)"),
    "weight transposed": ({"student_weight": torch.randn(4, 9)}, ValueError, r"student_weight.*H = 4.*\(4, 9\)"),
    "weight 3-d": ({"student_weight": torch.randn(1, 9, 4)}, ValueError, r"student_weight.*\(V, H\).*\(1, 9, 4\)"),
    "empty weight": ({"student_weight": torch.randn(0, 4)}, ValueError, r"student_weight.*V >= 1"),
    "weight's dtype": ({"student_weight": torch.randn(9, 4).bfloat16()}, TypeError, r"student_weight.*autocast.*bfloa"),
    "weight's device": ({"student_weight": torch.randn(9, 4, device="meta")}, ValueError, r"student_weight.*meta"),
    "bias's shape": ({"student_bias": torch.randn(8)}, ValueError, r"student_bias.*V = 9.*\(8,\)"),
    "bias's dtype": ({"student_bias": torch.randn(9).half()}, TypeError, r"student_bias must have the dtype"),
    "bias 2-d": ({"student_bias": torch.randn(9, 1)}, ValueError, r"student_bias must have the shape \(V\)"),
    "teacher's bias": ({"teacher_bias": torch.randn(1)}, ValueError, r"teacher_bias.*V = 9"),
    "teacher's hidden size": ({"teacher_hidden": torch.randn(2, 3, 5)}, ValueError, r"teacher_weight.*H = 5"),
    "teacher's rows": ({"teacher_hidden": torch.randn(3, 2, 6)}, ValueError, r"\(3, 2, 6\) and \(2, 3, 4\)"),
    "half a teacher": ({"teacher_weight": None}, TypeError, r"teacher_hidden and teacher_weight, or as teacher_logits"),
    "no teacher": ({"teacher_hidden": None, "teacher_weight": None}, TypeError, r"or as teacher_logits"),
    "two teachers": ({"teacher_logits": torch.randn(2, 3, 9)}, TypeError, r"without teacher_hidden.*float32 \(2, 3, 6"),
    "logits and a bias": (_logits(teacher_bias=torch.ones(9)), TypeError, r"without teacher_bias"),
    "logits of no column": (_logits(teacher_logits=torch.randn(2, 3, 0)), ValueError, r"teacher_logits.*V >= 1"),
    "teacher trains": (
        {"teacher_weight": torch.randn(9, 6, requires_grad=True)}, ValueError, r"teacher_weight must not require grad",
    ),
    "logits train": (
        _logits(teacher_logits=torch.randn(2, 3, 9, requires_grad=True)), ValueError, r"teacher_logits must not requ",
    ),
    "vocabularies": ({"teacher_weight": torch.randn(8, 6)}, ValueError, r"9 and 8 columns.*vocab='truncate'"),
    "labels' shape": ({"labels": torch.zeros(6).long()}, ValueError, r"labels must have one value a token"),
    "labels' dtype": ({"labels": torch.zeros(2, 3)}, TypeError, r"labels must be int64"),
    "labels' values": ({"labels": torch.full((2, 3), 9)}, ValueError, r"labels\[0, 0\] = 9 is outside \[0, 9\)"),
    "labels missing": ({"labels": None, "ce_weight": 1.0}, ValueError, r"ce_weight=1.0 needs labels"),
    "temperature's values": ({"temperature": torch.zeros(2, 3)}, ValueError, r"temperature\[.*\] = 0.0"),
    "temperature's device": (
        {"temperature": torch.ones(2, 3, device="meta")}, ValueError, r"temperature.*device of student_hidden",
    ),
    "weights train": (
        {"token_weights": torch.ones(2, 3, requires_grad=True)}, ValueError, r"token_weights must not require grad",
    ),
    "items": ({"num_items_in_batch": 0}, ValueError, r"num_items_in_batch must be > 0; got 0"),
    "items of a sum": ({"num_items_in_batch": 3, "reduction": "sum"}, ValueError, r"num_items_in_batch.*'sum'"),
    "divergence": ({"divergence": "kl"}, ValueError, r"divergence='kl'"),
    "beta": ({"divergence": "jsd", "beta": 1.0}, ValueError, r"beta must lie in \(0, 1\)"),
    "chunk_size": ({"chunk_size": 0}, ValueError, r"chunk_size must be 'auto' or a number of rows >= 1; got 0"),
    "chunk_size as a float": ({"chunk_size": 2.0}, TypeError, r"chunk_size.*got float"),
    "chunk_size as a word": ({"chunk_size": "all"}, TypeError, r"chunk_size.*'all'"),
    "memory_budget": ({"memory_budget": -1}, ValueError, r"memory_budget.*>= 1; got -1"),
    "memory_budget as a word": ({"memory_budget": "1GB"}, TypeError, r"memory_budget.*'1GB'"),
    "both": ({"memory_budget": 1, "chunk_size": 2}, ValueError, r"memory_budget needs chunk_size='auto'"),
    "logits_dtype": ({"logits_dtype": torch.bfloat16}, ValueError, r"logits_dtype must be None, or float32.*bfloat16"),
    "backend": ({"backend": "cuda"}, ValueError, r"backend='cuda'"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_wrong_argument(name: str) -> None:
    changed, kind, message = WRONG[name]
    with pytest.raises(kind, match=message):
        linear_kd_loss(**{**_arguments(), **changed})


def test_the_arguments_themselves_are_right() -> None:
    assert linear_kd_loss(**_arguments()).isfinite()
    assert linear_kd_loss(**{**_arguments(), **_logits()}).isfinite()


def test_fp64_is_not_for_the_kernels(native: str) -> None:
    arguments = {k: v.double() if v.is_floating_point() else v for k, v in _arguments().items()}
    with pytest.raises(RuntimeError, match=r"backend='native' cannot run.*float64"):
        linear_kd_loss(**arguments, backend=native)
    with pytest.raises(ValueError, match=r"logits_dtype must be None, or float64"):
        linear_kd_loss(**arguments, logits_dtype=torch.float32)


def test_every_option_of_kd_loss_but_inplace() -> None:
    of_logits = inspect.signature(fastkd.kd_loss).parameters
    own = inspect.signature(linear_kd_loss).parameters
    for name in set(of_logits) - {"student_logits", "teacher_logits", "inplace"}:
        assert own[name].default == of_logits[name].default, name
        assert own[name].kind == of_logits[name].kind, name
    with pytest.raises(TypeError, match="inplace"):
        linear_kd_loss(**_arguments(), inplace=True)


@pytest.mark.parametrize(
    "options,message",
    [
        ({"inplace": True}, r"unknown options \['inplace'\]; allowed: divergence"),
        ({"alpha": 1}, r"unknown options \['alpha'\]"),
        ({"temperature": -1.0}, r"temperature must be"),
        ({"chunk_size": 0}, r"chunk_size must be"),
        ({"memory_budget": 0}, r"memory_budget must be"),
    ],
)
def test_wrong_option_of_the_module(options: dict, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        LinearKDLoss(**options)


def test_sharded_weight_says_where_to_call(tmp_path) -> None:
    """A DTensor beside plain hidden states may be FSDP's part of the weight or a mesh's part of the vocabulary."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        weight = distribute_tensor(torch.randn(9, 4), init_device_mesh("cpu", (1,)), [Shard(0)])
        with pytest.raises(TypeError, match=r"student_weight is a DTensor, and student_hidden not.*full_tensor"):
            linear_kd_loss(**{**_arguments(), "student_weight": weight})
        with pytest.raises(TypeError, match=r"student_weight is a DTensor.*sparse teacher.*full_tensor"):
            teacher = fastkd.TopKTeacher(torch.zeros(2, 3, 1).long(), torch.zeros(2, 3, 1))
            fastkd.linear_sparse_kd_loss(_arguments()["student_hidden"], weight, teacher)
        with pytest.raises(ValueError, match=r"vocab_shard must be None where student_weight is a DTensor"):
            shard = fastkd.VocabShard(0, 9)
            linear_kd_loss(**{**_arguments(), "student_weight": weight, "vocab_shard": shard})
    finally:
        dist.destroy_process_group()
