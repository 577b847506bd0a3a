"""Runs problems by modules of CUDA kernels, each in a process of its own: what test_cuda_mutation.py asks of a mutant.

Each line of the input is a job, JSON of the module's path, seeds and ways (launch, problem, vocabulary), and becomes a
fork, so that torch is imported once. It prints JSON: for each way and seed "" or what was wrong, by the check that
found it.
"""

from __future__ import annotations

import json
import mmap
import os
import sys
from pathlib import Path

import shard_cases
import simt_backend
import torch
from inputs import BF16, FP32, Case, Inputs, make_inputs
from shard_ranks import run_ranks
from sparse_cases import SparseCase
from test_loss import Problem
from test_sparse import Problem as SparseProblem

import fastkd


def far_inputs(vocab: int) -> Inputs:
    """Two rows, more than 2^31 elements from each other, in memory of which nothing else is touched."""
    stride = 2**31 + 64
    memory = mmap.mmap(-1, 2 * (stride + vocab), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000)  # NORESERVE
    base = torch.frombuffer(memory, dtype=BF16).as_strided((2, vocab), (stride, 1))
    near = make_inputs(Case("far", lead=(2,), vocab=vocab, student_dtype=BF16, teacher_dtype=BF16))
    base.copy_(near.student)
    return near._replace(student_base=base)


def check_shards(case: Case, ranks: int) -> None:
    """The ranks' parts of the vocabulary, with every option, against the reference."""
    options = {"divergence": "jsd", **shard_cases.EVERYTHING}
    sharded = shard_cases.ShardCase(case, options, backend="native")
    parts = shard_cases.shards(sharded.plan, case.vocab, ranks)
    shard_cases.assert_whole(sharded, run_ranks(lambda rank: shard_cases.run_rank(sharded, rank, ranks), parts))


def wrong_with(seed: int, launch: dict, problem: dict, vocab: int) -> str:
    how = dict(problem)
    inplace, everything, far = how.pop("inplace", False), how.pop("everything", False), how.pop("far", False)
    upstream, tail, ranks = how.pop("upstream", 1.0), how.pop("sparse", ""), how.pop("ranks", 0)
    lead = (how.pop("rows", 2),)
    dtype = FP32 if how.pop("fp32", False) else BF16
    case = Case("mutant", lead=lead, vocab=vocab, student_dtype=dtype, teacher_dtype=dtype, **how)
    problem_of_case: Problem | SparseProblem = Problem(case, "jsd", everything)
    if tail:
        sparse = SparseCase(case, min(40, vocab // 2))
        problem_of_case = SparseProblem(sparse, tail, "forward_kl" if tail == "sampled" else "jsd", everything)
    with simt_backend.native_on_simt(**launch, seed=seed):
        try:
            if ranks:
                check_shards(case, ranks)
            elif far:
                inputs = far_inputs(vocab)
                student = inputs.student_base
                fastkd.kd_loss(student, inputs.teacher, divergence="jsd", backend="native")
            elif upstream != 1.0:
                student = problem_of_case.inputs.student.clone().requires_grad_()
                loss = fastkd.kd_loss(student, problem_of_case.inputs.teacher, divergence="jsd", backend="native")
                (once,) = torch.autograd.grad(loss, student, torch.tensor(1.0), retain_graph=True)
                (more,) = torch.autograd.grad(loss, student, torch.tensor(upstream))
                torch.testing.assert_close(more, once * upstream)
            else:
                problem_of_case.check(problem_of_case.run(backend="native", inplace=inplace))
        except RuntimeError as error:
            return str(error)
        except AssertionError as error:
            return f"numbers: {error}"
    return ""


def run(job: dict) -> None:
    simt_backend.enter(Path(job["module"]))
    found = [wrong_with(seed, *way) for way in job["ways"] for seed in job["seeds"]]
    print("FOUND " + json.dumps(found), flush=True)


def main() -> None:
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            run(json.loads(line))
            os._exit(0)
        _, status = os.waitpid(child, 0)
        print(f"ENDED {status}", flush=True)


if __name__ == "__main__":
    main()
