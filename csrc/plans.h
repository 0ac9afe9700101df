// What a row's second pass takes, for a factor of 1. It may have to wait for its factor: as Reals it is kept till then.
#pragma once

namespace tnt {
inline namespace TNT_ISA {

template <class Real>
struct KlPlan {
  Real x_ref, o_ref, c;  // weights are 2^(x scale - c), or where no multiply-add is fused 2^((x - x_ref) scale - c)
  Real x_zero, o_zero;   // what logits are read relative to
  Real shift, rest;      // forward: of y*; reverse: the shift of y
  Real u0, u1;           // forward: h, p_shift; reverse: k0, k1
  // Of removed entries: t = (z - set_max)/T, gradient set_scale e^t (t + set_shift), forward without the bracket.
  Real set_max, set_scale, set_shift;
  Real partial;  // the gradient of a y with -1 < w < 0
};

// Of a loss that reads the policy alone.
template <class Real>
struct ExpPlan {
  Real zero;                // what logits are read relative to
  Real ref, c;              // of the weights
  Real weight, bias;        // on K
  Real set_ref, set, push;  // in the set, of t = (z - set_ref)/T: set e^t, and push unless t < least
  Real least;
};

// Of a KL under uniform smoothing.
template <class Real>
struct UniformPlan {
  Real z_ref, p_inverse, p_log_sum;  // p = e^{(z - z_ref)/T} p_inverse, log p = (z - z_ref)/T - p_log_sum
  Real r_ref, q_inverse;             // q* = e^{(r - r_ref)/T} q_inverse of what is not removed
  Real loss;
};

}  // namespace TNT_ISA
}  // namespace tnt
