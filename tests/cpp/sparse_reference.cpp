// The fp64 answer with a sparse teacher: the outcomes are the named columns and all others as one.
#include <algorithm>
#include <cmath>
#include <map>

#include "harness.h"

namespace harness {
namespace {

using fastkd::Tail;

constexpr double kResolution = fastkd::mass_resolution(0x1p-24f);

double log_sum(const std::vector<double>& logs) {
  double top = -INFINITY, sum = 0;
  for (double x : logs) top = std::max(top, x);
  if (std::isinf(top)) return top;
  for (double x : logs) sum += std::exp(x - top);
  return top + std::log(sum);
}

// The teacher's distinct columns with their log-probability and, of draws, their weight.
struct Named {
  double lp, weight;
};
std::map<int64_t, Named> named_of(const Problem& p, const Row& row) {
  std::map<int64_t, Named> named;
  double draws = 0;
  for (size_t k = 0; k < row.ids.size(); ++k) draws += row.ids[k] >= 0 && !std::isinf(row.logprobs[k]);
  for (size_t k = 0; k < row.ids.size(); ++k)
    if (row.ids[k] >= 0) {
      Named& c = named[row.ids[k]];
      c.lp = row.logprobs[k];
      c.weight += 1 / draws;
    }
  if (p.tail == Tail::renormalize) {  // given at T = 1
    std::vector<double> logs;
    for (auto& [id, c] : named) logs.push_back(c.lp /= row.temperature);
    for (auto& [id, c] : named) c.lp -= log_sum(logs);
  }
  return named;
}

// log of the mass of the rest, and what rounding of the others can do to that mass.
struct Rest {
  double lp = -INFINITY, unsure = 0;
};
Rest rest_of(const Problem& p, const std::map<int64_t, Named>& named) {
  Rest rest;
  if (p.tail != Tail::bucket) return rest;
  double largest = -INFINITY, left, others = 0;
  for (const auto& [id, c] : named) largest = std::max(largest, c.lp);
  left = -std::expm1(largest);
  rest.unsure = 2 * left;
  bool skipped = false;
  for (const auto& [id, c] : named) {
    if (c.lp == largest && !skipped) {
      skipped = true;
      continue;
    }
    others += std::exp(c.lp);
    if (!std::isinf(c.lp)) rest.unsure += std::exp(c.lp) * (2 + std::abs(c.lp));
  }
  left -= others;
  rest.lp = std::log(std::max(left, 0.0));
  return rest;
}

// The rest's term: the reverse direction takes its mass no lower than what can be told from 0.
Term rest_term(const Problem& p, double lp, double lq) {
  const fastkd::Divergence d = p.options.divergence;
  const bool reverse = d == fastkd::Divergence::reverse_kl, both = d == fastkd::Divergence::symmetric_kl;
  if (!reverse && !both) return term_of(p, lp, lq);
  const double share = reverse ? 0 : p.options.beta;
  Problem one = p;
  one.options.divergence = fastkd::Divergence::reverse_kl;
  Term sum = term_of(one, std::max(lp, std::log(kResolution)), lq);
  sum = {(1 - share) * sum.value, (1 - share) * sum.dlogq, (1 - share) * sum.size};
  if (!both) return sum;
  one.options.divergence = fastkd::Divergence::forward_kl;
  const Term forward = term_of(one, lp, lq);
  return {sum.value + share * forward.value, sum.dlogq + share * forward.dlogq, sum.size + share * forward.size};
}

Term drawn(const Named& c, double lq) {
  const double size = c.weight * (2 + std::abs(c.lp) + std::abs(lq));
  return {c.weight * (c.lp - lq), -c.weight, 4 * size};
}

double entropy_part(double lp) { return std::isinf(lp) ? 0 : -std::exp(lp) * lp; }

}  // namespace

void add_sparse_divergence(const Problem& p, const Row& row, const std::vector<double>& lq, Answer& a) {
  const double factor = p.options.kd_weight * (p.options.scale_by_t2 ? row.temperature * row.temperature : 1);
  const std::map<int64_t, Named> named = named_of(p, row);
  const bool sampled = p.tail == Tail::sampled;
  std::vector<double> others;
  for (size_t i = 0; i < lq.size(); ++i)
    if (!named.count(static_cast<int64_t>(i))) others.push_back(lq[i]);
  Rest rest = rest_of(p, named);
  const double lq_rest = log_sum(others), q_rest = std::exp(lq_rest);
  if (q_rest == 0 && std::exp(rest.lp) <= kResolution) rest = {};
  Term last = sampled ? Term{0, 0, 0} : rest_term(p, rest.lp, lq_rest);
  const double by_log = std::isinf(rest.lp) ? 0 : q_rest / std::max(std::exp(rest.lp), kResolution);  // of q log p
  last.size += rest.unsure * (2 + std::abs(std::isinf(rest.lp) ? 0 : rest.lp) + by_log);
  double total = last.dlogq, size = last.size, slack = last.slack, largest = -INFINITY;
  int64_t top = -1;
  a.kd = last.value;
  a.teacher_entropy = sampled ? 0 : entropy_part(rest.lp);
  std::map<int64_t, Term> terms;
  for (const auto& [id, c] : named) {
    const double own = lq[static_cast<size_t>(id)];
    const Term term = terms[id] = sampled ? drawn(c, own) : term_of(p, c.lp, own);
    a.kd += term.value;
    total += term.dlogq;
    size += term.size;
    slack += term.slack;
    a.teacher_entropy += sampled ? -c.weight * c.lp : entropy_part(c.lp);
    if (c.lp > largest) largest = c.lp, top = id;
  }
  a.agreement = a.top == top;
  a.loss += factor * a.kd;
  a.loss_magnitude += factor * size;
  for (size_t i = 0; i < lq.size(); ++i) {
    const double q = std::exp(lq[i]), share = q_rest > 0 ? std::exp(lq[i] - lq_rest) : 0;
    const auto found = terms.find(static_cast<int64_t>(i));
    Term own = {0, share * last.dlogq, share * (last.size + (1 + std::abs(lq[i])) * std::abs(last.dlogq)),
                share * last.slack};
    if (found != terms.end()) own = found->second;
    const double size_q = q > 0 ? q * (1 + std::abs(lq[i])) : 0, scale = factor / row.temperature;
    a.gradient[i] += scale * (own.dlogq - q * total);
    a.magnitude[i] += scale * ((q > 0 || found != terms.end() ? own.size : 0) + size_q * (std::abs(total) + size));
    a.slack[i] += scale * (own.slack + q * slack);
  }
}

}  // namespace harness
