"""The machine of tests/simt: right kernels pass under every schedule, each planted bug is caught by the check that is
there for it, and the counters count."""

from __future__ import annotations

from types import ModuleType

import numpy as np
import pytest
import simt_build

SEEDS = range(24)  # 0: in order
ROWS, COLUMNS = 6, 1024
# a launch that fits the problem, by kernel
LAUNCH = {
    "copy": {"grid": 3, "threads": 64},
    "row_sums": {"grid": 2, "threads": 128, "shared_bytes": 16},
    "twice": {"grid": 24, "threads": 64},
    "rotate": {"grid": 96, "threads": 64, "shared_bytes": 256},
    "cluster_sums": {"grid": 2 * ROWS, "cluster": 2, "threads": 64, "shared_bytes": 144 + COLUMNS},
    "pipeline": {"grid": ROWS, "threads": 128, "shared_bytes": 160 + COLUMNS},
    "neighbours": {"grid": 2 * ROWS, "cluster": 2, "threads": 64, "shared_bytes": 32 + 2 * COLUMNS},
    "two_phases": {"grid": ROWS, "threads": 96, "shared_bytes": 8},
    "many_readers": {"grid": ROWS, "threads": 32, "shared_bytes": 4},
}


@pytest.fixture(scope="module")
def simt(tmp_path_factory: pytest.TempPathFactory) -> ModuleType:
    folder = tmp_path_factory.mktemp("simt")
    objects = [*simt_build.compile_machine(folder), *simt_build.compile_selftest(folder)]
    return simt_build.load("simt_selftest", simt_build.link("simt_selftest", objects, folder))


@pytest.fixture
def x() -> np.ndarray:
    values = np.random.default_rng(0).integers(-8, 8, (ROWS, COLUMNS)).astype(np.float32)
    values.flags.writeable = False
    return values


def run(simt: ModuleType, name: str, x: np.ndarray, bug: str = "none", seed: int = 0, **options) -> tuple:
    """Report and output of one launch; options of the launch or of the binding."""
    launch = {**LAUNCH[name], "seed": seed, **options.pop("launch", {})}
    out = np.zeros(x.shape if name in {"copy", "twice", "rotate"} else x.shape[0], np.float32)
    options = {"rows": x.shape[0], "columns": x.shape[1], "empty": ["out"], **options}
    report = simt.run(name, {"in": x, "out": out}, bug=getattr(simt.Bug, bug), launch=launch, **options)
    return report, out


def rotated(x: np.ndarray) -> np.ndarray:
    """What the kernel rotate makes of each warp, odd ones by halves."""
    warps = x.reshape(-1, 32)
    want = np.empty_like(warps)
    for w, values in enumerate(warps):
        width = 16 if w % 2 else 32
        for lane in range(32):
            base = lane // width * width
            taken = np.roll(values[base : base + width], 3)
            want[w, lane] = taken[0] + (taken[lane - base] > 0)
    return want.reshape(x.shape)


EXPECTED = {
    "copy": lambda x: x,
    "twice": lambda x: 2 * x,
    "rotate": rotated,
    "row_sums": lambda x: x.sum(1),
    "cluster_sums": lambda x: x.sum(1),
    "pipeline": lambda x: x.sum(1),
    "neighbours": lambda x: x.sum(1),
    "two_phases": lambda x: x.ravel()[:ROWS],
    "many_readers": lambda x: x[:, 0],
}


@pytest.mark.parametrize("name", LAUNCH)
@pytest.mark.parametrize("seed", SEEDS)
def test_right_kernels(simt: ModuleType, x: np.ndarray, name: str, seed: int) -> None:
    report, out = run(simt, name, x, seed=seed)
    assert report["errors"] == []
    np.testing.assert_array_equal(out, EXPECTED[name](x))


def test_in_place(simt: ModuleType, x: np.ndarray) -> None:
    """A vector that the same launch writes may be read by a load that does not suppose it constant."""
    both = x.copy()
    for seed in SEEDS:
        both[:] = x
        launch = {**LAUNCH["twice"], "seed": seed}
        report = simt.run("twice", {"out": both}, rows=ROWS, columns=COLUMNS, launch=launch)
        assert report["errors"] == []
        np.testing.assert_array_equal(both, 2 * x)


# what a ring goes through once its phases are out of step
CASCADE = {"missing-wait", "missing-fence", "uninitialised", "race", "barrier-count", "barrier-bytes", "phase-missed"}
CASCADE |= {"deadlock"}

# bug -> (kernel, checks of which each schedule makes one speak, part of the message, other options; `also` may speak)
BUGS: dict[str, tuple[str, set[str], str, dict]] = {
    "missing_barrier": ("row_sums", {"race", "uninitialised"}, "selftest_kernels.cuh:", {}),
    "missing_reuse_barrier": ("row_sums", {"race"}, "no barrier between", {}),
    "barrier_in_branch": ("row_sums", {"divergent-barrier"}, "block_sync", {"also": {"race", "uninitialised"}}),
    "barrier_at_two_places": ("row_sums", {"divergent-barrier"}, "waits at selftest_kernels.cuh:", {}),
    "divergent_exit": ("row_sums", {"inactive-lane", "divergent-barrier"}, "return", {}),
    "bad_mask": ("row_sums", {"bad-mask"}, "0xfffffff7", {}),
    "differing_masks": ("row_sums", {"bad-mask"}, "0xffff0001", {}),
    "returned_lane": ("row_sums", {"inactive-lane"}, "return", {}),
    "shuffle_from_outside": ("row_sums", {"shuffle-source"}, "lane 20", {}),
    "uninitialised_shared": ("row_sums", {"uninitialised"}, "byte 12", {}),
    "misaligned_vector": ("copy", {"misaligned"}, "load_vector", {}),
    "read_beyond": ("copy", {"global-bounds"}, "0 bytes behind the end of 'in'", {}),
    "write_beyond": ("copy", {"global-bounds"}, "0 bytes behind the end of 'out'", {}),
    "write_to_input": ("copy", {"read-only", "stale-read"}, "'in'", {}),
    "missing_wait": ("cluster_sums", {"missing-wait"}, "under way", {}),
    "uncommitted_copy": ("cluster_sums", {"missing-wait"}, "under way", {}),
    "copy_at_exit": ("cluster_sums", {"missing-wait"}, "returns with a copy under way", {}),
    "missing_copy_barrier": ("cluster_sums", {"race", "missing-wait", "uninitialised"}, "thread", {}),
    "copy_over_readers": ("cluster_sums", {"race", "missing-wait"}, "thread", {}),
    "missing_cluster_barrier": ("cluster_sums", {"race", "uninitialised"}, "thread", {}),
    "peer_exit": ("cluster_sums", {"peer-exit"}, "return", {}),
    "peer_rank": ("cluster_sums", {"cluster-rank"}, "block 2 of a cluster of 2", {}),
    "peer_address": ("cluster_sums", {"shared-bounds"}, "shared_load", {}),
    "deadlock": ("row_sums", {"deadlock"}, "waits in cluster_sync at selftest_kernels.cuh:", {"launch": {"grid": 1}}),
    "benign_race": ("row_sums", {"race"}, "word 0 of the shared memory", {}),
    "missing_warp_sync": ("rotate", {"race", "uninitialised"}, "thread", {}),
    "race_between_blocks": ("row_sums", {"race-between-clusters"}, "word 0 of 'out'", {}),
    "constant_read_of_written": ("twice", {"stale-read"}, "load_vector", {"in_place": True}),
    "raw_overrun": ("row_sums", {"fault"}, "behind the end of 'in'", {}),
    "stack_overflow": ("row_sums", {"fault"}, "behind the end of its stack", {}),
    "phase_unmade": ("pipeline", {"uninitialised"}, "no barrier was made at byte 24", {}),
    "phase_unfenced_init": ("pipeline", {"missing-fence"}, "to the barrier made at selftest_phases.cuh:", {}),
    "phase_made_twice": ("pipeline", {"barrier-state"}, "phases_init", {}),
    "phase_unordered_init": ("pipeline", {"uninitialised", "race"}, "selftest_phases.cuh:", {}),
    "phase_missing_wait": ("pipeline", {"missing-wait", "uninitialised"}, "selftest_phases.cuh:", {"also": CASCADE}),
    "phase_wrong_parity": ("pipeline", {"missing-wait", "uninitialised"}, "selftest_phases.cuh:", {"also": CASCADE}),
    "phase_missing_expect": ("pipeline", {"barrier-bytes"}, "bytes", {"also": CASCADE}),
    "phase_expect_more": ("pipeline", {"deadlock"}, "waits in phases_wait at selftest_phases.cuh:", {}),
    "phase_expect_less": ("pipeline", {"barrier-bytes"}, "bytes", {"also": CASCADE}),
    "phase_expect_too_much": ("pipeline", {"barrier-bytes"}, "expects 1048576 bytes", {}),
    "phase_unarmed": ("pipeline", {"deadlock"}, "waits in phases_wait", {}),
    "phase_reuse_early": ("pipeline", {"missing-wait", "race", "barrier-count"}, "thread 0", {"also": CASCADE}),
    "phase_arrive_early": ("pipeline", {"missing-wait", "race"}, "selftest_phases.cuh:", {"also": CASCADE}),
    "phase_arrive_twice": ("pipeline", {"barrier-count", "race", "missing-wait"}, "thread", {"also": CASCADE}),
    "phase_overwritten": ("pipeline", {"barrier-state"}, "shared_store", {}),
    "bulk_misaligned": ("pipeline", {"misaligned"}, "not aligned to 16 bytes", {}),
    "bulk_odd_size": ("pipeline", {"misaligned"}, "of 504 bytes", {}),
    "bulk_source_written": (
        "pipeline",
        {"missing-wait"},
        "may still be reading",
        {"in_place": True, "launch": {"grid": 1}},
    ),
    "bulk_at_exit": ("pipeline", {"missing-wait"}, "nobody has waited for the copy", {}),
    "bulk_unfenced_write": ("pipeline", {"missing-fence"}, "with no fence_async between", {}),
    "bulk_unseen_by_peers": ("neighbours", {"missing-wait"}, "peer_load", {"also": {"uninitialised"}}),
    "named_missing": ("pipeline", {"race", "uninitialised"}, "shared memory", {}),
    "named_counts": ("pipeline", {"divergent-barrier"}, "have come for", {}),
    "named_absent": ("pipeline", {"deadlock"}, "waits in named_sync at selftest_phases.cuh:", {}),
    "named_zero": ("pipeline", {"barrier-count"}, "named_arrive(0, 128)", {}),
    "unordered_reader": ("many_readers", {"race"}, "word 0 of the shared memory", {}),
}


@pytest.mark.parametrize("bug", BUGS)
def test_planted_bug_is_caught(simt: ModuleType, x: np.ndarray, bug: str) -> None:
    """By every schedule, so without luck, and by the check that is there for it."""
    name, checks, text, how = BUGS[bug]
    launch = {**LAUNCH[name], **how.get("launch", {})}
    for seed in SEEDS:
        if how.get("in_place"):
            report = simt.run(
                name,
                {"out": x.copy()},
                rows=ROWS,
                columns=COLUMNS,
                bug=getattr(simt.Bug, bug),
                launch={**launch, "seed": seed},
            )
        else:
            report, _ = run(simt, name, x, bug, seed, launch=launch)
        found = {check for check, _ in report["errors"]}
        assert found & checks, f"{bug} not seen with seed {seed}: {report['errors']}"
        assert found <= checks | how.get("also", set()), report["errors"]
        assert any(text in message for _, message in report["errors"]), report["errors"]


def test_every_bug_is_planted(simt: ModuleType) -> None:
    assert set(simt.Bug.__members__) == {"none", "phase_runs_ahead", *BUGS}


def test_a_phase_that_runs_ahead(simt: ModuleType, x: np.ndarray) -> None:
    """Threads that wait for the end of a phase see it, miss it or wait for ever, as the schedule has it."""
    found = set()
    for seed in SEEDS:
        report, _ = run(simt, "two_phases", x, "phase_runs_ahead", seed)
        found |= {check for check, _ in report["errors"]}
    assert found == {"phase-missed", "deadlock"}


def test_race_with_right_numbers(simt: ModuleType, x: np.ndarray) -> None:
    """In order, a missing barrier before reuse does not change a number; the detector sees it all the same."""
    report, out = run(simt, "row_sums", x, "missing_reuse_barrier", seed=0)
    np.testing.assert_array_equal(out, x.sum(1))
    (error,) = {check for check, _ in report["errors"]}
    assert error == "race"


def test_undersized_shared_memory(simt: ModuleType, x: np.ndarray) -> None:
    report, _ = run(simt, "row_sums", x, launch={"shared_bytes": 12})
    ((check, text),) = report["errors"]
    assert check == "shared-bounds" and "0 bytes behind the end of the shared memory of 12 bytes" in text


@pytest.mark.parametrize(
    "launch,text",
    [
        ({"threads": 0}, "threads is 0"),
        ({"threads": 48}, "threads is 48"),
        ({"threads": 1056}, "threads is 1056"),
        ({"grid": 0}, "grid is 0"),
        ({"cluster": 0}, "cluster is 0"),
        ({"cluster": 32, "grid": 32}, "cluster is 32"),
        ({"cluster": 2, "grid": 3}, "grid is 3"),
        ({"shared_bytes": 227 * 1024 + 1}, "shared_bytes is 232449"),
    ],
)
def test_bad_launch(simt: ModuleType, x: np.ndarray, launch: dict, text: str) -> None:
    report, out = run(simt, "copy", x, launch=launch)
    ((check, message),) = report["errors"]
    assert check == "bad-launch" and message.startswith(text) and "allowed" in message
    assert report["total"]["bytes_read"] == 0 and np.isnan(out).all()


@pytest.mark.parametrize("columns", [1, 3, 1024, 1027])
def test_counters(simt: ModuleType, columns: int) -> None:
    x = np.ones((1, columns), np.float32)
    wide, narrow = columns // 4, columns % 4
    report, _ = run(simt, "copy", x, rows=1, columns=columns)
    none = {
        "bytes_read": 0,
        "bytes_written": 0,
        "wide_reads": 0,
        "wide_writes": 0,
        "narrow_reads": 0,
        "narrow_writes": 0,
    }
    read = {"bytes_read": 4 * columns, "wide_reads": wide, "narrow_reads": narrow}
    written = {"bytes_written": 4 * columns, "wide_writes": wide, "narrow_writes": narrow}
    assert report["errors"] == []
    assert report["buffers"] == {"in": {**none, **read}, "out": {**none, **written}}
    assert report["total"] == {**none, **read, **written}


def test_counters_of_a_cluster(simt: ModuleType, x: np.ndarray) -> None:
    """Asynchronous copies are reads of 16 bytes; barriers are counted once for all who pass."""
    report, _ = run(simt, "cluster_sums", x, seed=3)
    assert report["buffers"]["in"]["bytes_read"] == x.nbytes
    assert report["buffers"]["in"]["wide_reads"] == x.size // 4
    assert report["block_barriers"] == 2 * ROWS * 6 and report["cluster_barriers"] == 2 * ROWS
    assert report["warp_meetings"] == 2 * ROWS * 2 * 5
    assert report["shared_bytes"] == 144 + COLUMNS


def test_schedules(simt: ModuleType, x: np.ndarray) -> None:
    """One seed, one schedule; another seed, another one."""
    first = [run(simt, "row_sums", x, seed=seed)[0]["schedule"] for seed in SEEDS]
    again = [run(simt, "row_sums", x, seed=seed)[0]["schedule"] for seed in SEEDS]
    assert first == again
    assert len(set(first)) == len(SEEDS)


@pytest.mark.parametrize("front", [False, True])
@pytest.mark.parametrize("remainder", [0, 4, 12])
def test_placement(simt: ModuleType, x: np.ndarray, front: bool, remainder: int) -> None:
    """Buffers at the guard page before or behind, and at every address that a float may have."""
    where = {"in": remainder, "out": remainder}
    report, out = run(simt, "row_sums", x, front=front, remainder=where)
    assert report["errors"] == []
    np.testing.assert_array_equal(out, x.sum(1))
    report, _ = run(simt, "copy", x, front=front, remainder=where)
    assert {check for check, _ in report["errors"]} == ({"misaligned"} if remainder else set())


def test_reading_an_empty_output(simt: ModuleType) -> None:
    report, _ = run(simt, "copy", np.ones((1, 8), np.float32), empty=["in", "out"])
    ((check, text),) = report["errors"]
    assert check == "uninitialised" and "'in', which nobody has written" in text


def test_largest_cluster(simt: ModuleType) -> None:
    x = np.ones((1, 16 * 8 * 1024), np.float32)
    launch = {"grid": 16, "cluster": 16, "threads": 1024, "shared_bytes": 144 + 16 * 1024}
    report, out = run(simt, "cluster_sums", x, seed=1, launch=launch)
    assert report["errors"] == [] and out[0] == x.size


def test_half_precision(simt: ModuleType) -> None:
    """All fp16 numbers to fp32 and back; rounding to nearest even at, below and above every midpoint of two."""
    bits = np.arange(1 << 16, dtype=np.uint16)
    floats = bits.view(np.float16).astype(np.float32)
    mine = np.array([simt.float_of_fp16(int(b)) for b in bits], np.uint32).view(np.float32)
    np.testing.assert_array_equal(mine, floats)
    finite = np.sort(floats[np.isfinite(floats)])
    middle = ((finite[1:].astype(np.float64) + finite[:-1]) / 2).astype(np.float32)
    extremes = np.array([0.0, -0.0, 65519.9, 65520, 1e6, np.inf, -np.inf, 2**-25, 2**-26, 1e-30], np.float32)
    for near in (middle, np.nextafter(middle, np.float32(np.inf)), np.nextafter(middle, np.float32(-np.inf)), extremes):
        with np.errstate(over="ignore"):
            want = near.astype(np.float16).view(np.uint16)
        mine = np.array([simt.fp16_of_float(int(b)) for b in near.view(np.uint32)], np.uint16)
        np.testing.assert_array_equal(mine, want)
    assert simt.fp16_of_float(0x7FC00000) == 0x7FFF and simt.bf16_of_float(0x7FC00000) == 0x7FFF


def test_bfloat16(simt: ModuleType) -> None:
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(1)
    bits = rng.integers(0, 1 << 32, 20000, dtype=np.uint64).astype(np.uint32)
    bits[:4000] = bits[:4000] & 0xFFFF0000 | 0x8000  # ties
    bits = bits[~np.isnan(bits.view(np.float32))]
    want = torch.from_numpy(bits.view(np.float32)).to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16)
    np.testing.assert_array_equal(np.array([simt.bf16_of_float(int(b)) for b in bits], np.uint16), want)
