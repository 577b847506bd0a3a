"""csrc/core is one text for g++ and nvcc: device code that uses all of it compiles, warnings as errors."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

KERNEL = """
#include "core/row.h"
using namespace fastkd;

template <Divergence kDivergence>
__device__ TermSums term(const Column<float>& column) {
  const Term<float> t = DivergenceTerm<kDivergence>::at(column, 0.3f, 0.7f);
  return {t.value, t.dlogq};
}

// One thread walks a row: every function of the core, none of it written again.
__global__ void row(const float* student, const float* teacher, int columns, RowOptions options, float* out) {
  const Softening softening{options.temperature, kLog2e / options.temperature};
  Piece whole;
  for (int i = 0; i < columns; ++i) {
    Piece one;
    one.largest_s = student[i];
    one.largest_t = teacher[i];
    one.sum_s = one.sum_t = one.sum_hard = one.columns = 1;
    one.top_s = {student[i], i};
    one.top_t = {teacher[i], i};
    whole.merge(one, softening);
  }
  const Denominators z(whole);
  const Column<float> column{0.2f, 0.1f, 1.0f};
  TermSums terms = term<Divergence::jsd>(column);
  terms.merge(term<Divergence::total_variation>(column));
  terms.merge(term<Divergence::skew_forward_kl>(column));
  terms.merge(term<Divergence::skew_reverse_kl>(column));
  GradientCoefficients c = divergence_coefficients(options, whole, z, terms, 1.0f);
  add_cross_entropy(c, options, whole, z, options.ce_weight);
  const float label_y = softening.relative_to(whole.largest_s)(student[0]);
  out[0] = mixed_kl_of(options, whole, z) + cross_entropy_of(options, whole, z, label_y) + zero_unless_nan(whole);
  out[1] = c.student + c.ratio + c.teacher + c.dlogq + c.hard + c.constant + c.label;
  out[2] = entropy_of(whole.entropy_s, whole.sum_s, z.log2_s);
}
"""


@pytest.mark.skipif(not shutil.which("nvcc"), reason="nvcc (CUDA toolkit) is not installed")
@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
def test_core_compiles_for_the_device(tmp_path: Path, arch: str) -> None:
    source = tmp_path / "row.cu"
    source.write_text(KERNEL)
    command = ["nvcc", f"-arch={arch}", "-std=c++17", "-Werror", "all-warnings", "-I", ROOT / "csrc", "-cubin"]
    done = subprocess.run([*command, source, "-o", tmp_path / "row.cubin"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "row.cubin").stat().st_size > 1000
