// The harness's own fp64 answers, one row at a time, as plainly as the formulas allow. Nothing of csrc/core is used but
// the names of the divergences.
#include <algorithm>
#include <cmath>

#include "harness.h"

namespace harness {
namespace {

using fastkd::Divergence;
using Values = std::vector<double>;

struct LogProbabilities {
  Values values;
  double lse;
};

LogProbabilities log_softmax(const Values& logits, double temperature) {
  const double top = *std::max_element(logits.begin(), logits.end()) / temperature;
  double sum = 0;
  for (double x : logits) sum += std::exp(x / temperature - top);
  LogProbabilities out{Values(logits.size()), top + std::log(sum)};
  for (size_t i = 0; i < logits.size(); ++i) out.values[i] = logits[i] / temperature - out.lse;
  return out;
}

double finite(double x) { return std::isfinite(x) ? x : 0; }
double weighted(double weight, double value) { return weight > 0 ? weight * value : 0; }

double log_mix(double share_a, double log_a, double log_b) {
  const double a = std::log(share_a) + log_a, b = std::log1p(-share_a) + log_b;
  const double top = std::max(a, b);
  return std::isinf(top) ? top : top + std::log(std::exp(a - top) + std::exp(b - top));
}

Term forward(double p, double lp, double lq) {
  return {weighted(p, lp - lq), -p, weighted(p, (2 + std::abs(lp)) * (2 + std::abs(lp) + std::abs(lq)))};
}

Term reverse(double q, double lp, double lq) {
  const double size = weighted(q, (2 + std::abs(lq)) * (2 + std::abs(lp) + std::abs(lq)));
  return {weighted(q, lq - lp), weighted(q, lq - lp + 1), size};
}

// Beside a tie rounding may decide either way; also at one, unless both rows take the same steps.
Term total_variation(double p, double q, double size, double logs, bool ties_are_exact) {
  const bool in_doubt = std::abs(p - q) <= 0x1p-18 * (p + q) * (1 + logs) && !(ties_are_exact && p == q);
  return {0.5 * std::abs(p - q), p > q ? -0.5 * q : q > p ? 0.5 * q : 0, size, in_doubt ? q : 0};
}

double capped(double x, float cap) { return cap == 0 || std::isinf(x) ? x : cap * std::tanh(x / cap); }

double entropy(const Values& log_probabilities) {
  double sum = 0;
  for (double l : log_probabilities) sum -= weighted(std::exp(l), finite(l));
  return sum;
}

int64_t first_top(const Values& x) { return std::max_element(x.begin(), x.end()) - x.begin(); }

void add_divergence(const Problem& p, const Row& row, const LogProbabilities& lq, const LogProbabilities& lp,
                    Answer& a) {
  const double factor = p.options.kd_weight * (p.options.scale_by_t2 ? row.temperature * row.temperature : 1);
  const size_t columns = lq.values.size();
  double total = 0, total_size = 0, total_slack = 0;
  std::vector<Term> terms(columns);
  for (size_t i = 0; i < columns; ++i) {
    terms[i] = term_of(p, lp.values[i], lq.values[i]);
    a.kd += terms[i].value;
    total += terms[i].dlogq;
    total_size += terms[i].size;
    total_slack += terms[i].slack;
  }
  a.loss += factor * a.kd;
  a.loss_magnitude += factor * total_size;
  for (size_t i = 0; i < columns; ++i) {
    const double q = std::exp(lq.values[i]), size_q = weighted(q, 1 + std::abs(lq.values[i]));
    a.gradient[i] += factor / row.temperature * (terms[i].dlogq - weighted(q, total));
    a.magnitude[i] += factor / row.temperature * (terms[i].size + size_q * (std::abs(total) + total_size));
    a.slack[i] += factor / row.temperature * (terms[i].slack + q * total_slack);
  }
}

void add_cross_entropy(const Problem& p, const Row& row, const Values& student, Answer& a) {
  const LogProbabilities h = log_softmax(student, 1);
  const double e = p.options.label_smoothing, z = p.options.z_loss, columns = static_cast<double>(student.size());
  double mean = 0, mean_size = 0;
  if (e != 0)
    for (double x : student) mean += x / columns, mean_size += std::abs(x) / columns;
  const double y = student[static_cast<size_t>(row.label)];
  a.ce = h.lse - (1 - e) * y - e * mean + z * h.lse * h.lse;
  const double weight = p.options.ce_weight;
  a.loss += weight * a.ce;
  a.loss_magnitude += weight * (2 + std::abs(h.lse) + std::abs(y) + mean_size + 2 * z * h.lse * h.lse);
  const double pull = 1 + 2 * z * h.lse;
  for (size_t i = 0; i < student.size(); ++i) {
    const double q = std::exp(h.values[i]), hit = static_cast<int64_t>(i) == row.label ? 1 - e : 0;
    a.gradient[i] += weight * (q * pull - e / columns - hit);
    a.magnitude[i] +=
        weight * (weighted(q, 1 + std::abs(finite(h.values[i]))) * std::abs(pull) * 2 + e / columns + hit);
  }
}

}  // namespace

Term term_of(const Problem& problem, double lp, double lq) {
  const double beta = problem.options.beta;
  const double p = std::exp(lp), q = std::exp(lq), size_p = 2 + std::abs(finite(lp)), size_q = 2 + std::abs(finite(lq));
  const double size = 4 * (p * size_p + q * size_q);
  switch (problem.options.divergence) {
    case Divergence::forward_kl: return forward(p, lp, lq);
    case Divergence::reverse_kl: return reverse(q, lp, lq);
    case Divergence::symmetric_kl: {
      const Term f = forward(p, lp, lq), r = reverse(q, lp, lq);
      return {beta * f.value + (1 - beta) * r.value, beta * f.dlogq + (1 - beta) * r.dlogq, f.size + r.size};
    }
    case Divergence::total_variation: return total_variation(p, q, size, size_p + size_q, problem.ties_are_exact());
    case Divergence::jsd: {
      const double lm = log_mix(beta, lp, lq);
      const double student = (1 - beta) * weighted(q, lq - lm);
      return {beta * weighted(p, lp - lm) + student, student, size};
    }
    case Divergence::skew_forward_kl: {
      const double lm = log_mix(beta, lp, lq);
      return {weighted(p, lp - lm), -(1 - beta) * weighted(p, q > 0 ? std::exp(lq - lm) : 0), size};
    }
    case Divergence::skew_reverse_kl: {
      const double lm = log_mix(beta, lq, lp);
      return {weighted(q, lq - lm), weighted(q, lq - lm + 1 - beta * std::exp(lq - lm)), size};
    }
  }
  return {};
}

Answer answer_of(const Problem& problem, const Row& row) {
  Answer a;
  const size_t own = row.student.size(), columns = std::min(own, row.teacher.size());
  a.gradient.assign(own, 0);
  a.magnitude.assign(own, 0);
  a.slack.assign(own, 0);
  if (row.ignored) return a;
  Values s = row.student, t = row.teacher;
  s.resize(columns);
  t.resize(columns);
  for (double& x : s) x = capped(x, problem.student_softcap);
  for (double& x : t) x = capped(x, problem.teacher_softcap);
  const LogProbabilities lq = log_softmax(s, row.temperature), lp = log_softmax(t, row.temperature);
  a.agreement = first_top(s) == first_top(t);
  a.teacher_entropy = entropy(lp.values);
  if (problem.k > 0) {
    a.top = first_top(s);
    add_sparse_divergence(problem, row, lq.values, a);
  } else {
    add_divergence(problem, row, lq, lp, a);
  }
  if (problem.labels && (problem.options.ce_weight != 0 || problem.stats)) add_cross_entropy(problem, row, s, a);
  a.student_entropy = entropy(lq.values);
  a.loss *= row.weight;
  a.loss_magnitude *= row.weight;
  for (size_t i = 0; i < columns; ++i) {
    const double u = problem.student_softcap == 0 ? 0 : std::tanh(row.student[i] / problem.student_softcap);
    const double slope = std::isinf(row.student[i]) ? 1 : 1 - u * u;
    a.gradient[i] *= row.weight * slope;
    a.magnitude[i] *= row.weight;
    a.slack[i] *= row.weight;
  }
  return a;
}

}  // namespace harness
