// What the weights of a KL row's entries are relative to, for host and device. docs/numerics.md has the formulas.
#pragma once

#include <cmath>

#include "elementary.h"

namespace tnt {
inline namespace TNT_ISA {

// Of a whole row, or of a tile.
template <class Real>
struct KlShift {
  static constexpr double LOG_UNIT = UNIT<Real>;  // a natural logarithm of 1, in what lead() is counted in

  Real scale, inverse_t;  // log2(e)/T, 1/T
  Real x_ref, o_ref;      // near the maxima
  Real c;                 // x_ref scale
  Real a;                 // near the log of the ratio of the two rows' sums; see `value`
  Real rho;               // e e^y = 2^((o - o_ref) scale + rho)
  double more;            // by which a exceeds (o_ref - x_ref)/T

  KlShift() = default;
  TNT_FN KlShift(double inverse_temperature, Real x_top, Real o_top, double more_)
      : scale(exponent_scale<Real>(inverse_temperature)),
        inverse_t(Real(inverse_temperature)),
        x_ref(usable(x_top)),
        o_ref(usable(o_top)),
        c(FUSED<Real> ? x_ref * scale : Real(0)),
        more(more_) {
    const double apart = (double(o_ref) - double(x_ref)) * double(inverse_t);
    a = stored(apart + more);
    rho = Real(lead() + (apart - value(a)) * UNIT<Real>);
  }
  // Without a fused multiply-add, a level is subtracted before the product with 1/T would round: it is stored times T.
  TNT_FN Real stored(double level) const { return Real(FUSED<Real> ? level : level / double(inverse_t)); }
  TNT_FN double value(Real level) const { return FUSED<Real> ? double(level) : double(level) * double(inverse_t); }
  TNT_FN double log_ratio() const { return value(a) - (double(o_ref) - double(x_ref)) * double(inverse_t); }
  // For a second pass, which has its own numbers in place of `rho` and `more`.
  TNT_FN KlShift(double inverse_temperature, Real x_ref_, Real o_ref_, Real a_, Real c_)
      : scale(exponent_scale<Real>(inverse_temperature)),
        inverse_t(Real(inverse_temperature)),
        x_ref(x_ref_),
        o_ref(o_ref_),
        c(c_),
        a(a_),
        rho(0),
        more(0) {}
  // The same with weights that add up to about 2^`sum`, given the log of their sum relative to x_ref.
  TNT_FN KlShift with_sum(double log_sum, double sum) const {
    KlShift to = *this;
    const double by = log_sum * UNIT<Real> - sum;
    if (fabs(by) < 1e9) to.c = Real((FUSED<Real> ? double(x_ref) * double(scale) : 0) + by);
    return to;
  }
  // log of e e^y at o_ref, which rho rounds.
  TNT_FN double log_lead_of_other() const { return lead() / UNIT<Real> - log_ratio(); }
  TNT_FN bool operator==(const KlShift& other) const {
    return x_ref == other.x_ref && o_ref == other.o_ref && a == other.a;
  }
  // log2 of the weight of an x of x_ref. In a first pass it is what rounding took from c.
  TNT_FN double lead() const { return (FUSED<Real> ? double(x_ref) * double(scale) : 0) - double(c); }

  TNT_FN static Real usable(Real top) { return top < Real(1e29) && top > Real(-1e29) ? top : Real(0); }
};

}  // namespace TNT_ISA
}  // namespace tnt
