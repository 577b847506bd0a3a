"""The mutation check: one change at a time to the kernel sources, and the harness must fail. A mutant that survives is
a hole in the harness's table of problems, or a line that does nothing."""

from __future__ import annotations

import shutil
from pathlib import Path

import harness
import pytest
from mutants import Mutant

FLAGS = ("-O1",)


ROW, KERNEL, SWEEPS = "core/row.h", "kernels/cpu/row_kernel.h", "kernels/cpu/sweeps.h"
SUMS, CONVERT, LAUNCH = "core/accumulators.h", "kernels/cpu/convert.h", "kernels/cpu/launch.cpp"
SPARSE, SPARSE_ROW, SPARSE_LAUNCH = "core/sparse.h", "kernels/cpu/sparse_row.h", "kernels/cpu/sparse_launch.cpp"
PRODUCTS = "kernels/cpu/products.h"
TERMS, KERNELS, FINISH = "core/divergence.h", "kernels/cpu/kernels.h", "core/finish.h"

MUTANTS = {  # files of csrc
    # signs
    "sign of the label's gradient": Mutant(ROW, "c.label = -weight", "c.label = weight"),
    "sign of the smoothing's gradient": Mutant(ROW, "c.constant = -weight", "c.constant = weight"),
    "sign of the ratio in reverse_kl": Mutant(ROW, "c.ratio = -reverse", "c.ratio = reverse"),
    "sign of the mixture's log in jsd": Mutant(
        TERMS, "F(-rest) * c.q * m.log2_m_over_q", "F(rest) * c.q * m.log2_m_over_q",
    ),
    "sign at p > q in total_variation": Mutant(TERMS, "difference > zero, zero - half_q", "difference > zero, half_q"),
    # maxima and rebasing
    "a later, larger maximum is missed": Mutant(SUMS, "max(later.largest_s, largest_s)", "largest_s"),
    "the smaller maximum is taken": Mutant(SUMS, "max(later.largest_t, largest_t)", "min(later.largest_t, largest_t)"),
    "dot product not rebased": Mutant(SUMS, "sum_t * (shift_t - shift_s)", "0.0f * (shift_t - shift_s)"),
    "power not rebased": Mutant(SUMS, "sum_hard *= exp2(softening.temperature * shift_s)", "sum_hard *= scale_s"),
    "hard exponentials of a block not rebased": Mutant(
        KERNEL, "exp2(job.options.temperature * shift_s)", "exp2(shift_s)"
    ),
    "linear sum not rebased": Mutant(SUMS, "columns * shift_s", "0.0f * shift_s"),
    "exponentials made again relative to the row's maximum": Mutant(
        KERNEL, "lanes_of(job.softening.relative_to(piece.largest_s))",
        "lanes_of(job.softening.relative_to(job.row.largest_s))",
    ),
    "the powers are not made again": Mutant(
        KERNEL, "job.hard == Hard::power ? static_cast<int>(temperature) : 0", "0"
    ),
    # guards
    "empty sums are shifted": Mutant(
        SUMS, "dot_t = scale_t == 0 ? 0.0f : scale_t * (dot_t + (sum_t == 0 ? 0.0f : sum_t * (shift_t - shift_s)))",
        "dot_t = scale_t * (dot_t + sum_t * (shift_t - shift_s))",
    ),
    "0 times infinity counts": Mutant(
        "core/numerics.h", "select(weight > F(0.0f), weight * value, F(0.0f))", "weight * value"
    ),
    "a tie of total_variation has a gradient": Mutant(TERMS, "select(tie, zero, dlogq)", "dlogq"),
    "label V is accepted": Mutant(LAUNCH, "p.labels[n] >= p.columns", "p.labels[n] > p.columns"),
    "the derivative of the softcap": Mutant("core/softcap.h", "one - u * u", "one"),
    # tails
    "the last column is not loaded": Mutant(
        CONVERT, "std::memcpy(tail, src + i * size, static_cast<size_t>(n - i) * size)",
        "std::memcpy(tail, src + i * size, static_cast<size_t>(n - i - 1) * size)",
    ),
    "the load reads beyond the row": Mutant(
        CONVERT, "std::memcpy(tail, src + i * size, static_cast<size_t>(n - i) * size)",
        "std::memcpy(tail, src + i * size, sizeof(tail))",
    ),
    "the store writes beyond the row": Mutant(
        CONVERT, "std::memcpy(dst + i * size, tail, static_cast<size_t>(n - i) * size)",
        "std::memcpy(dst + i * size, tail, sizeof(tail))",
    ),
    "the padding counts as logits of 0": Mutant(
        CONVERT, "store_lanes<dtype>(tail, Vec(minus_inf))", "store_lanes<dtype>(tail, Vec(0.0f))"
    ),
    "the label in the last column is missed": Mutant(KERNEL, "label_at < columns", "label_at < columns - 1"),
    "columns beyond the common vocabulary are left": Mutant(
        KERNELS, "    last_step(job, 0, blocks);\n    zero_gradient(p, n, p.columns);", "    last_step(job, 0, blocks);"
    ),
    "the gradient of an ignored row is left": Mutant(KERNEL, "  zero_gradient(p, n, 0);\n", ""),
    # factors
    "T for T squared": Mutant(FINISH, "o.temperature * o.temperature", "o.temperature"),
    "half of the z-loss": Mutant(ROW, "1.0f + 2.0f * o.z_loss", "1.0f + o.z_loss"),
    "the square is left out": Mutant(SWEEPS, "sum_hard += e_s * e_s", "sum_hard += e_s"),
    "one power too few": Mutant(SWEEPS, "for (int k = 1; k < power; ++k)", "for (int k = 2; k < power; ++k)"),
    "the token's weight is left out": Mutant(FINISH, "  out.loss *= in.token_weight;\n", ""),
    "ignored rows count in the mean": Mutant(LAUNCH, "if (!call.params.ignored(n)) denominator", "denominator"),
    "the pending scale is left out": Mutant(
        KERNELS, "p.factor[n * p.factor_stride] * p.common", "p.factor[n * p.factor_stride]",
    ),
    "the value of skew_forward_kl without its weight": Mutant(
        TERMS, "c.p * m.log2_p_over_m, F(-rest", "m.log2_p_over_m, F(-rest",
    ),
    # rounding and threads
    "bf16 by truncation": Mutant(CONVERT, "(bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16", "bits >> 16"),
    "gradient of the sharing threads skips a block": Mutant(
        KERNEL, "executor->run(blocks, 1, body", "executor->run(blocks - 1, 1, body"
    ),
    # between the products of the linear loss
    "the last columns of a product are not added": Mutant(
        PRODUCTS, "for (int64_t i = whole; i < columns; ++i)", "for (int64_t i = whole; i < columns - 1; ++i)"
    ),
    "the last rows of a transpose are left": Mutant(
        PRODUCTS, "turn_tile<kWide>(p, v, h, high, wide)", "turn_tile<kWide>(p, v, h, high - 1, wide)"
    ),
    "a tile of a transpose is as wide as the last": Mutant(
        PRODUCTS, "p.columns - h < kWide ? p.columns - h : kWide", "p.columns < kWide ? p.columns : kWide"
    ),
    # sparse teachers
    "sparse: the rest's mass by the difference alone": Mutant(
        SPARSE_LAUNCH, "left = -std::expm1(static_cast<double>(entries[top].logprob))",
        "left = 1 - static_cast<double>(std::exp(entries[top].logprob))",
    ),
    "sparse: the entries are not sorted": Mutant(
        SPARSE_LAUNCH, "if (!std::is_sorted(entries.begin(), entries.end(), before))", "if (false)"
    ),
    "sparse: an id twice is accepted": Mutant(SPARSE_LAUNCH, "i < entries.size() && !sampled; ++i", "false; ++i"),
    "sparse: not normalised over the ids": Mutant(SPARSE_LAUNCH, "c.log2_p -= mass", "c.log2_p -= 0 * mass"),
    "sparse: the weight of a second draw is lost": Mutant(SPARSE, "c.weight = total;", ""),
    "sparse: the rest is no outcome": Mutant(SPARSE, "  terms.value += rest.value;\n", ""),
    "sparse: the rest's gradient is lost": Mutant(
        SPARSE, "c.student += kd * terms.dlogq_rest / rest.sum", "c.student += 0"
    ),
    "sparse: a block's exponentials not shifted": Mutant(
        SPARSE_ROW, "const float student = c.student * exp2(shift)", "const float student = c.student"
    ),
    "sparse: the named columns stay in the rest": Mutant(SPARSE_ROW, "    logit = minus_infinity();\n", ""),
    "sparse: the rest's largest is that of all": Mutant(
        SPARSE_ROW, "if (!was_largest) return largest;", "return largest;"
    ),
    "sparse: the peak is that of the rest": Mutant(
        SPARSE, "all.largest_s = rest.peak;", "all.largest_s = rest.largest;"
    ),
    "sparse: named columns keep the rest's gradient": Mutant(
        SPARSE_ROW, "      gradient[c->column - first_column] = c->gradient;", "      (void)c;"
    ),
    "sparse: the label's part is lost": Mutant(
        SPARSE_ROW, "gradient[label - first_column] += job.coefficients.label", "gradient[label - first_column] += 0"
    ),
    "sparse: the last block is not swept": Mutant(
        SPARSE_ROW, "executor->run(blocks, 1, body, &context)", "executor->run(blocks - 1, 1, body, &context)"
    ),
}  # fmt: skip
# the processor's own bf16 conversion passes by the code of this mutant
ISA = {"bf16 by truncation": "baseline"}


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Path]]:
    """The harness's own objects per instruction set: they do not change with the kernels."""
    out = {}
    for isa in {harness.runnable_isas()[-1], *ISA.values()}:
        folder = tmp_path_factory.mktemp(isa)
        out[isa] = harness.compile_parts(folder, isa, ("-O2",))
    return out


def _verdict(
    folder: Path, isa: str, parts: dict[str, list[Path]], csrc: Path, problems: str = "quick"
) -> tuple[int, str]:
    objects = parts[isa] + harness.compile_kernels(folder, isa, FLAGS, csrc)
    done = harness.run(harness.link(objects, folder / "harness"), problems, "4", timeout=120)
    return done.returncode, done.stdout + done.stderr


@pytest.mark.parametrize("isa", sorted({harness.runnable_isas()[-1], *ISA.values()}))
def test_the_original_passes(isa: str, parts: dict[str, list[Path]], tmp_path: Path) -> None:
    status, output = _verdict(tmp_path, isa, parts, harness.ROOT / "csrc")
    assert status == 0, output


@pytest.mark.parametrize("name", MUTANTS)
def test_mutant_is_caught(name: str, parts: dict[str, list[Path]], tmp_path: Path) -> None:
    mutant = MUTANTS[name]
    isa = ISA.get(name, harness.runnable_isas()[-1])
    csrc = tmp_path / "csrc"
    shutil.copytree(harness.ROOT / "csrc", csrc)
    path = csrc / mutant.file
    path.write_text(mutant.planted_in(path.read_text()))
    status, output = _verdict(tmp_path, isa, parts, csrc, "sparse" if name.startswith("sparse:") else "quick")
    assert status != 0, f"survived: {name}\n{output}"
