"""Bugs planted in the shipped CUDA kernels, one at a time: each must be caught under every schedule tried, and by the
check that is named beside it."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import simt_backend
import simt_build
from mutants import planted

SEEDS = (0, 1, 2)
BLOCK = {"variant": "block", "threads": 128}
OWN_COPIES = {"variant": "block", "threads": 128, "arch": 80}  # each thread its own, without bulk copies
CLUSTER = {"variant": "cluster", "threads": 64, "parts": 4}
STREAMING = {"variant": "streaming", "threads": 64, "parts": 3}
PLANNED = {"multiprocessors": 1}


class Mutant(NamedTuple):
    """Replace `old`, which must occur in csrc/kernels/`file` exactly once, by `new`; run it so; who must complain."""

    file: str
    old: str
    new: str
    checks: str  # one of these, separated by |
    launch: dict
    vocab: int = 2051
    problem: dict = {}  # noqa: RUF012


MERGE, RESIDENT, STREAM, VIEW = (f"cuda/{name}.cuh" for name in ("merge", "resident", "streaming", "view"))
PREPARE, COLUMNS, SPARSE = (f"cuda/{name}.cuh" for name in ("sparse_prepare", "sparse_columns", "sparse"))
BUCKET = {"sparse": "bucket", "everything": True}
DRAWS = {"sparse": "sampled", "everything": True}
GATHER, SHARD, ROW = "cuda/shard.cuh", "cuda/shard_sequence.h", "shard_params.h"
RANKS = {"ranks": 2, "rows": 4, "regime": "ascending"}  # which have labels, one of them ignored

MUTANTS = {
    "missing barrier": Mutant(
        MERGE, "shared_store(of_warps + warp, own);\n  block_sync();", "shared_store(of_warps + warp, own);",
        "race|uninitialised", BLOCK,
    ),
    "barrier inside a branch": Mutant(
        MERGE, "  } else {\n    block_sync();\n  }", "  } else if (team.lane != 3) {\n    block_sync();\n  }",
        "divergent-barrier|deadlock", BLOCK,
    ),
    "missing barrier before reuse": Mutant(
        RESIDENT, "broadcast<kWarpTeam>(row, &scratch->before_gradient, team)",
        "broadcast<kWarpTeam>(row, &scratch->before_terms, team)", "race", PLANNED, vocab=777,
    ),
    "missing cluster barrier": Mutant(
        MERGE, "shared_store(of_block, own);\n  cluster_sync();", "shared_store(of_block, own);\n  block_sync();",
        "race|uninitialised", CLUSTER,
    ),
    "shared memory read after the peer's exit": Mutant(
        RESIDENT, "  if (team.parts > 1) cluster_sync();", "", "peer-exit", CLUSTER,
    ),
    "a peer that the cluster does not have": Mutant(
        MERGE, "peer_load(of_block, team.lane)", "peer_load(of_block, team.lane + 1)", "cluster-rank", CLUSTER,
    ),
    "one warp too many is merged": Mutant(
        MERGE, "lane < warps ? shared_load", "lane <= warps ? shared_load", "uninitialised", BLOCK,
    ),
    "wrong mask": Mutant(MERGE, "warp_sync(kAllLanes)", "warp_sync(kAllLanes >> 1)", "bad-mask", PLANNED, vocab=777),
    "missing wait on a copy": Mutant(
        RESIDENT, "  copy_wait<0>();\n}", "  copy_wait<1>();\n}", "missing-wait",
        {**OWN_COPIES, "threads": 64},
    ),
    "waves waited for one late": Mutant(
        RESIDENT, "if (wave == 0) return copy_wait<3>();", "if (wave == 0) return;", "missing-wait", OWN_COPIES,
    ),
    "misaligned vector": Mutant(
        VIEW, "(access.width - column) % access.width", "(access.width - column + 1) % access.width",
        "misaligned", STREAMING,
    ),
    "misaligned copy": Mutant(
        VIEW, "(access.width - column) % access.width", "(access.width - column + 1) % access.width",
        "misaligned", BLOCK,
    ),
    "misaligned copy of a thread": Mutant(
        VIEW, "(access.width - column) % access.width", "(access.width - column + 1) % access.width",
        "misaligned", OWN_COPIES,
    ),
    "missing wait for a wave": Mutant(
        RESIDENT, "if (bulk) phases_wait(scratch->arrived + wave, 0);", "", "missing-wait|uninitialised", BLOCK,
    ),
    "wrong parity": Mutant(
        RESIDENT, "phases_wait(scratch->arrived + wave, 0);", "phases_wait(scratch->arrived + wave, 1);",
        "missing-wait|uninitialised", CLUSTER,
    ),
    "bytes that nobody expects": Mutant(
        RESIDENT, "phases_arrive_expecting(arrived, s + t);", "phases_arrive(arrived);", "barrier-bytes|missing-wait",
        BLOCK,
    ),
    "bytes of one model alone expected": Mutant(
        RESIDENT, "phases_arrive_expecting(arrived, s + t);", "phases_arrive_expecting(arrived, s);", "barrier-bytes",
        CLUSTER,
    ),
    "barriers hidden from copies": Mutant(RESIDENT, "      fence_async();\n", "", "missing-fence", BLOCK),
    "barriers used before they are made": Mutant(
        RESIDENT, "    }\n    block_sync();\n", "    }\n", "race|uninitialised", BLOCK,
    ),
    "a wave brought over another": Mutant(
        RESIDENT, "copy_bulk(student + first * student_bytes,", "copy_bulk(student + first / 2 * student_bytes,",
        "missing-wait", BLOCK,
    ),
    "undersized shared memory": Mutant(
        "cuda/plan.cpp", "return of_student + round_up(", "return of_student - 16 + round_up(", "shared-bounds",
        PLANNED,
    ),
    "wrong slice end": Mutant(
        VIEW, "static_cast<int64_t>(part + 1) * size(chunks)", "static_cast<int64_t>(part + 1) * size(chunks) - 1",
        "unwritten", CLUSTER,
    ),
    "off-by-one tail": Mutant(
        VIEW, "columns - head - chunks * access.width : 0", "columns - head - chunks * access.width - 1 : 0",
        "unwritten", BLOCK,
    ),
    "a column too many": Mutant(
        VIEW, "const int left = (k < heads ? head : columns) - first;",
        "const int left = (k < heads ? head : columns + 1) - first;", "global-bounds|race|uninitialised", STREAMING,
    ),
    "lost rescale of the sums": Mutant(
        MERGE, "p.rebase(largest_s, largest_t, r.softening);", "p.largest_s = largest_s, p.largest_t = largest_t;",
        "numbers", BLOCK,
    ),
    "lost rescale of the gradient": Mutant(
        "cuda/batch.cuh", "if (factor == 1 &&", "if (factor != 0 &&", "numbers", BLOCK, problem={"upstream": 3.0},
    ),
    "a number written by every part": Mutant(
        STREAM, "if (team.part == 0 && team.lane == 0 && r.needs_hard)", "if (team.lane == 0 && r.needs_hard)",
        "race-between-clusters", STREAMING, problem={"everything": True},
    ),
    "a read-only load of what is overwritten": Mutant(
        STREAM, "stream<false>(view, team, [&](const Chunk& c, const Place& at) { sweep.gradient",
        "stream<true>(view, team, [&](const Chunk& c, const Place& at) { sweep.gradient", "stale-read", STREAMING,
        problem={"inplace": True},
    ),
    "int32 overflow": Mutant(
        "params.h", "const int64_t offset = (n / inner) * outer_stride + (n % inner) * inner_stride;",
        "const int offset = static_cast<int>((n / inner) * outer_stride + (n % inner) * inner_stride);",
        "global-bounds", BLOCK, problem={"far": True},
    ),
    "int32 overflow, streamed": Mutant(
        "params.h", "const int64_t offset = (n / inner) * outer_stride + (n % inner) * inner_stride;",
        "const int offset = static_cast<int>((n / inner) * outer_stride + (n % inner) * inner_stride);",
        "global-bounds", STREAMING, problem={"far": True},
    ),
    # sparse teachers
    "sparse: no barrier in the sort": Mutant(
        PREPARE, "        store(keys + high, a);\n      }\n      warp_sync(kAllLanes);",
        "        store(keys + high, a);\n      }", "race", BLOCK, problem=BUCKET,
    ),
    "sparse: a word of the map by two threads": Mutant(
        COLUMNS, "      if (i > 0 && word_of(named.column(i - 1)) == word) continue;\n", "", "race", STREAMING,
        problem=BUCKET,
    ),
    "sparse: the map is a word short": Mutant(
        "cuda/plan.cpp", "round_up(p.sparse ? chunks : ", "round_up(p.sparse ? chunks - 17 : ",
        "shared-bounds", PLANNED, problem=BUCKET,
    ),
    "sparse: named columns are overwritten": Mutant(
        SPARSE, "    block_sync();  // what the others stored is overwritten\n", "", "race", BLOCK, problem=BUCKET,
    ),
    "sparse: named columns of another part": Mutant(
        SPARSE, "if (c.column < first || c.column >= end) continue;", "if (c.column < first) continue;",
        "race-between-clusters|race", STREAMING, problem=BUCKET,
    ),
    "sparse: the named columns stay in the rest": Mutant(
        COLUMNS, "named >> i & 1 ? minus_infinity() : s.value[i]", "s.value[i]", "numbers", BLOCK, problem=BUCKET,
    ),
    "sparse: a draw's weight is lost": Mutant(
        PREPARE, "j < entries && repeats(j); ++j)", "j < entries && repeats(j) && j < 0; ++j)", "numbers", BLOCK,
        problem=DRAWS, vocab=33,
    ),
    # columns of a process
    "shard: every lane writes the sums": Mutant(
        GATHER, "if (lane == 0) s.write_sums(", "s.write_sums(", "race", STREAMING, problem=RANKS, vocab=523,
    ),
    "shard: the last part is not gathered": Mutant(
        GATHER, "merge_parts(call.pieces + n * call.splits, call.splits, lane,",
        "merge_parts(call.pieces + n * call.splits, call.splits - 1, lane,", "numbers", STREAMING, problem=RANKS,
        vocab=523,
    ),
    "shard: the sums of an ignored row are left": Mutant(
        GATHER, "if (lane < (sums ? kFields : 2)) store(s.at(lane, n), 0.0f);", "", "unwritten", STREAMING,
        problem=RANKS, vocab=523,
    ),
    "shard: rows that are none": Mutant(
        GATHER, "  if (n >= s.params.rows) return;\n", "", "global-bounds", STREAMING, problem=RANKS, vocab=523,
    ),
    "shard: the workspace has a piece a row": Mutant(
        SHARD, "s.step == ShardStep::sums ? parts : rows", "rows", "global-bounds", STREAMING, problem=RANKS, vocab=523,
    ),
    "shard: the row is read as if it had parts": Mutant(
        SHARD, "  call.sums_of_row = 1;\n", "", "uninitialised|global-bounds|numbers", STREAMING, problem=RANKS,
        vocab=523,
    ),
    "shard: smoothing over its own columns": Mutant(
        SHARD, "  call.vocabulary = s.vocabulary;\n", "", "numbers", STREAMING, problem=RANKS, vocab=523,
    ),
    "shard: a label that another has": Mutant(
        SHARD, "  call.owned = s.row(kOwned, 0);\n", "", "numbers", STREAMING, problem=RANKS, vocab=523,
    ),
    "shard: the row's scale is lost": Mutant(
        SHARD, "  call.loss.token_weights = s.row(kScale, 0);", "", "numbers", STREAMING, problem=RANKS, vocab=523,
    ),
    "shard: the sum of dlogq in nats": Mutant(
        ROW, "read(row(kDlogq, n)) * kLog2e", "read(row(kDlogq, n))", "numbers", STREAMING, problem=RANKS, vocab=523,
    ),
    "shard: tops by references": Mutant(
        GATHER, "if (r.stats) piece.rebase(", "if (false) piece.rebase(", "numbers", STREAMING,
        problem={**RANKS, "rows": 16, "regime": "ordinary"}, vocab=61,
    ),
    "shard: a column of its own for one of the vocabulary": Mutant(
        ROW, "bits_of(piece.top_t.column + first_column)", "bits_of(piece.top_t.column)", "numbers", STREAMING,
        problem={**RANKS, "regime": "identical"}, vocab=523,
    ),
}  # fmt: skip


class Machine(NamedTuple):
    """Where mutants are built and run: objects that none of them changes, those of the sources as they are, and the
    process that forks for each."""

    common: list[Path]
    kernels: list[Path]
    runner: subprocess.Popen

    def run(self, csrc: Path, folder: Path, ways: list, changed: str = "") -> list[str]:
        """What each way (launch, problem, vocabulary) and seed has to say about sources that differ in one file."""
        sparse = {"sparse" in problem for _, problem, _ in ways}
        kernels = [name for name, asked in (("sparse", True), ("jsd", False)) if asked in sparse]
        known = [path for path in self.kernels if not (changed and simt_build.is_made_of(path, changed))]
        objects = simt_build.compile_kernels(folder, csrc, kernels, known=known)
        binary = simt_backend.link([*self.common, *objects], folder)
        job = {"module": str(binary), "seeds": SEEDS, "ways": ways}
        print(json.dumps(job), file=self.runner.stdin, flush=True)
        lines: list[str] = []
        while not lines or not lines[-1].startswith("ENDED"):
            lines.append(self.runner.stdout.readline())
            assert lines[-1], f"the runner has ended; {lines}"
        found = [line.removeprefix("FOUND ") for line in lines if line.startswith("FOUND ")]
        assert len(found) == 1, lines
        return json.loads(found[0])


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory, native: str) -> Iterator[Machine]:
    folder = tmp_path_factory.mktemp("common")
    objects = [*simt_build.compile_machine(folder), *simt_build.compile_operators(folder)]
    kernels = simt_build.compile_kernels(folder / "kernels", kernels=("sparse", "jsd"))
    command = [sys.executable, str(Path(__file__).with_name("simt_mutant.py"))]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as runner:
        yield Machine(objects, kernels, runner)
        runner.stdin.close()


@pytest.mark.parametrize("name", MUTANTS)
def test_mutant_is_caught(name: str, machine: Machine, tmp_path: Path) -> None:
    mutant = MUTANTS[name]
    csrc = tmp_path / "csrc"
    shutil.copytree(simt_build.CSRC, csrc)
    path = csrc / "kernels" / mutant.file
    path.write_text(planted(path.read_text(), mutant.file, mutant.old, mutant.new))
    ways = [[mutant.launch, mutant.problem, mutant.vocab]]
    for seed, wrong in zip(SEEDS, machine.run(csrc, tmp_path / "build", ways, f"kernels/{mutant.file}")):
        assert re.search(rf"\b({mutant.checks}): ", wrong), f"seed {seed}: {wrong or 'not caught'}"


def test_without_a_mutant(machine: Machine, tmp_path: Path) -> None:
    """The same problems pass on the sources as they are, whose objects know what they are made of."""
    made_of = {file: {path.stem for path in machine.kernels if simt_build.is_made_of(path, file)}
               for file in ("core/row.h", "kernels/cuda/shard.cuh", "kernels/cuda/plan.cpp")}  # fmt: skip
    assert made_of == {"core/row.h": {path.stem for path in machine.kernels}, "kernels/cuda/plan.cpp": {"plan"},
                       "kernels/cuda/shard.cuh": {"launch", "announce"}}  # fmt: skip
    asked = {json.dumps([m.launch, m.problem, m.vocab], sort_keys=True) for m in MUTANTS.values()}
    ways = [json.loads(way) for way in sorted(asked)]
    assert machine.run(simt_build.CSRC, tmp_path, ways) == [""] * (len(ways) * len(SEEDS))
