// The functions that rows of the CPU backend are made of, for tests: of one argument, by name, over arrays of doubles
// that are floats where the function takes floats. Compiled once per instruction set, as csrc/cpu/rows.cpp is.
#include <cmath>
#include <cstring>
#include <functional>
#include <map>
#include <string>

#include "cpu/kl_row.h"

namespace tnt {
inline namespace TNT_ISA {
namespace {

template <class Function>
std::function<double(double)> of_float(Function f) {
  return [f](double x) { return double(f(float(x))); };
}
// The lanes of a vector are alike.
template <class Function>
std::function<double(double)> of_lane(Function f) {
  return [f](double x) {
    const Floats y = f(same(float(x)));
    for (int i = 1; i < FLOATS; ++i)
      if (memcmp(&y, reinterpret_cast<const float*>(&y) + i, sizeof(float)) != 0) return double(NAN);
    return double(y[0]);
  };
}
// Stored and loaded again, every entry of a pair of vectors.
template <class Stored>
double rounded(double x) {
  Stored memory[2 * FLOATS];
  store_pair(memory, Pair<float>{same(float(x)), same(float(x))});
  const Pair<float> y = load_pair(memory);
  for (int i = 0; i < FLOATS; ++i)
    if (y.a[i] != y.a[0] || y.b[i] != y.a[0]) return double(NAN);
  return double(y.a[0]);
}

const std::map<std::string, std::function<double(double)>>& functions() {
  static const std::map<std::string, std::function<double(double)>> all = {
      {"exponential", of_float([](float x) { return exponential(x); })},
      {"logarithm", of_float([](float x) { return logarithm(x); })},
      {"expm1", of_float([](float x) { return expm1_phi(x).value; })},
      {"phi", of_float([](float x) { return expm1_phi(x).phi; })},
      {"expm1 double", [](double x) { return expm1_phi(x).value; }},
      {"phi double", [](double x) { return expm1_phi(x).phi; }},
      {"softplus", [](double x) { return softplus(x); }},
      {"phi of a logarithm", [](double x) { return phi_of_log(::expm1(x), x); }},
      {"power", of_lane([](Floats x) { return power(x); })},
      {"short power", of_lane([](Floats x) { return power(x, SHORT_POWER); })},
      {"phi_near", of_lane([](Floats x) { return phi_near(x); })},
      {"phi_wide", of_lane([](Floats x) { return phi_ratio<true>(x) * (x * x); })},
      {"phi_wide double", [](double x) { return phi_ratio<true>(x) * (x * x); }},
      {"sinh_ratio_near", of_lane([](Floats x) { return sinh_ratio<false>(x); })},
      {"sinh_ratio_wide", of_lane([](Floats x) { return sinh_ratio<true>(x); })},
      {"sinh_ratio_near double", [](double x) { return sinh_ratio<false>(x); }},
      {"sinh_ratio_wide double", [](double x) { return sinh_ratio<true>(x); }},
      {"stored as float32", rounded<float>},
      {"stored as bfloat16", rounded<BFloat16>},
      {"stored as loaded",
       [](double x) {
         BFloat16 memory[2 * FLOATS];
         store_even_and_odd(memory, {same(float(x)), same(float(x))});
         return double(load(memory[1]));
       }},
      {"stored as float16", rounded<Float16>},
  };
  return all;
}

}  // namespace
}  // namespace TNT_ISA
}  // namespace tnt

extern "C" {

__attribute__((visibility("default"))) int apply(const char* name, const double* x, double* y, int64_t n) {
  const auto& all = tnt::functions();
  const auto found = all.find(name);
  if (found == all.end()) return 1;
  for (int64_t i = 0; i < n; ++i) y[i] = found->second(x[i]);
  return 0;
}

__attribute__((visibility("default"))) int vector_floats() { return tnt::FLOATS; }
// Of FLOATS floats: their sum as double, the greatest.
__attribute__((visibility("default"))) void folds(const float* x, double* sum, double* top) {
  tnt::Floats v;
  memcpy(&v, x, sizeof v);
  *sum = tnt::sum_of(v);
  *top = double(tnt::greatest(v));
}
// The entries of a block, with 0 for those whose bit is set, as logits of float32 or of bfloat16.
__attribute__((visibility("default"))) void leave_out(int sixteen_bits, uint64_t bits, const float* from, float* to) {
  const auto run = [&](auto logit) {
    using Logit = decltype(logit);
    Logit memory[4 * tnt::FLOATS];
    for (int i = 0; i < 4 * tnt::FLOATS; ++i) tnt::store(memory + i, from[i]);
    tnt::Floats x[4];
    tnt::load_block(memory, x);
    tnt::leave_out(tnt::BlockMasks<Logit>(bits), x, 0.0f);
    tnt::put<Logit, Logit, float>(memory, x);
    for (int i = 0; i < 4 * tnt::FLOATS; ++i) to[i] = tnt::load(memory[i]);
  };
  sixteen_bits ? run(tnt::BFloat16{}) : run(float{});
}
__attribute__((visibility("default"))) double log_add(double a, double b) { return tnt::log_add(a, b); }
}
