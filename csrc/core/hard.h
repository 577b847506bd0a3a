// Where the student's exponential at T = 1, which the cross-entropy needs, comes from.
#pragma once

#include "macros.h"

namespace fastkd {

enum class Hard {
  none,    // no cross-entropy, or T = 1 where it equals the tempered one
  square,  // T = 2: the square of the tempered one
  power,   // T = 3 ... 8: its integer power
  own,     // any other T: an exponential of its own
};

constexpr int kMaxPower = 8;  // the power multiplies the relative error of 2^y

FASTKD_FN Hard hard_source(float temperature, bool needed) {
  if (!needed || temperature == 1) return Hard::none;
  if (temperature == 2) return Hard::square;
  const bool in_range = temperature > 1 && temperature <= kMaxPower;  // also what makes the cast to int defined
  return in_range && temperature == static_cast<int>(temperature) ? Hard::power : Hard::own;
}

}  // namespace fastkd
