// The operators of shvit_kernels/ops.py for CPU tensors, and the facts about this library that Python asks for.

#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "../tensors.h"
#include "run.h"
#include "running_statistics.h"

namespace {

using namespace shvit;

// ---------------------------------------------------------------------------------------------------------------
// Facts

std::string instruction_sets() {
  std::string names;
  for (const Variant* v : supported_variants()) names += (names.empty() ? "" : " ") + std::string(v->name);
  return names;
}

std::string instruction_set() { return current_variant().load()->name; }

void set_instruction_set(std::string name) {
  for (const Variant* v : supported_variants()) {
    if (name == v->name) {
      current_variant() = v;
      return;
    }
  }
  STD_TORCH_CHECK(false, "instruction set '", name, "' cannot run here; these can: ", instruction_sets());
}

// The architectures of the CUDA kernels in this library, as in "80 90"; setup.py defines them.
std::string cuda_architectures() {
#ifdef SHVIT_CUDA_ARCHITECTURES
  return SHVIT_CUDA_ARCHITECTURES;
#else
  return "";
#endif
}

double product_flops(ScalarType dtype, int64_t repeats) {
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::BFloat16,
                  "dtype must be float32 or bfloat16");
  const Variant* variant = current_variant().load();
  return dtype == ScalarType::Float ? variant->fused_float32.product_flops(repeats)
                                    : variant->fused_bfloat16.product_flops(repeats);
}

const Kernels& kernels_for(ScalarType dtype) {
  const Variant* variant = current_variant().load();
  switch (dtype) {
    case ScalarType::Float:
      return variant->float32;
    case ScalarType::Double:
      return variant->float64;
    case ScalarType::BFloat16:
      return variant->bfloat16;
    default:
      STD_TORCH_CHECK(false, "the cpu kernels take float32, float64 and bfloat16");
  }
}

ScalarType compute_type(ScalarType storage) {
  return storage == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// ---------------------------------------------------------------------------------------------------------------
// Kernels on tensors

void attend(const Kernels& kernels, const Sizes& s, const Tensor& x, const Norm& norm, const void* qkv_weight,
            const void* qkv_bias, double norm_eps, double scale, bool relu, const Tensor& y, const Saved* saved,
            const BatchNorm& batch_norm = {}, void* x1 = nullptr) {
  const auto data = [](const Tensor& t) { return t.mutable_data_ptr(); };
  ShsaForwardParams params{s,
                           is_channels_last(x),
                           relu,
                           norm_eps,
                           scale,
                           x.const_data_ptr(),
                           norm.weight.data(),
                           norm.bias.data(),
                           qkv_weight,
                           qkv_bias,
                           batch_norm,
                           data(y),
                           saved ? data(saved->mean) : nullptr,
                           saved ? data(saved->rstd) : nullptr,
                           saved ? data(saved->row_max) : nullptr,
                           saved ? data(saved->row_sum) : nullptr,
                           x1,
                           false,
                           nullptr};
  run(kernels.shsa_forward, params);
}

void attend_backward(const Kernels& kernels, const Sizes& s, const Tensor& dy, const Tensor& x1,
                     const Tensor& y, const Saved& saved, const Norm& norm, const void* qkv_weight,
                     const void* qkv_bias, double scale, bool relu, void* dx, const NormGradient& dnorm,
                     void* dqkv_weight, void* dqkv_bias, const BatchNorm& batch_norm = {},
                     void* dbn_weight = nullptr, void* dbn_bias = nullptr) {
  ShsaBackwardParams params{s,
                            is_channels_last(y),
                            is_channels_last(x1),
                            relu,
                            scale,
                            dy.const_data_ptr(),
                            x1.const_data_ptr(),
                            y.const_data_ptr(),
                            saved.mean.const_data_ptr(),
                            saved.rstd.const_data_ptr(),
                            saved.row_max.const_data_ptr(),
                            saved.row_sum.const_data_ptr(),
                            norm.weight.data(),
                            norm.bias.data(),
                            qkv_weight,
                            qkv_bias,
                            batch_norm,
                            dx,
                            dnorm.weight.data(),
                            dnorm.bias.data(),
                            dqkv_weight,
                            dqkv_bias,
                            dbn_weight,
                            dbn_bias,
                            s.P,
                            false,
                            nullptr,
                            false,
                            nullptr};
  run(kernels.shsa_backward, params);
}

// The projection with the running statistics folded in, in compute type.
class Folded {
 public:
  Folded(const Kernels& kernels, const Sizes& s, ScalarType type, double eps, const Projection& plain,
         const RunningNorm& bn) {
    const int64_t value = type == ScalarType::Double ? sizeof(double) : sizeof(float);
    memory_ = allocate((s.O() * s.P + s.O()) * value);
    bias_ = memory_.get() + s.O() * s.P * value;
    FoldParams params{s.O(),
                      s.P,
                      eps,
                      plain.weight.data(),
                      plain.bias.data(),
                      bn.weight.data(),
                      bn.bias.data(),
                      bn.mean.data(),
                      bn.var.data(),
                      memory_.get(),
                      bias_,
                      nullptr};
    run(kernels.fold, params);
  }
  const void* weight() const { return memory_.get(); }
  const void* bias() const { return bias_; }

 private:
  Buffer memory_;
  char* bias_;
};

// ---------------------------------------------------------------------------------------------------------------
// Operators

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> shsa_forward(
    Tensor x, std::optional<Tensor> norm_weight, std::optional<Tensor> norm_bias, Tensor qkv_weight,
    std::optional<Tensor> qkv_bias, int64_t qk_dim, double norm_eps, double scale, bool relu, bool, bool) {
  const ScalarType type = compute_type(x.scalar_type());
  const auto s = sizes_of<Sizes>(x, qkv_weight.size(1), qk_dim);
  const Norm norm(norm_weight, norm_bias, s.P, type);
  const Projection qkv("qkv_weight", qkv_weight, "qkv_bias", qkv_bias, s.O(), s.P, type);
  Tensor y = empty_image(x, s.C, is_channels_last(x));
  const Saved saved = empty_saved(x, s.B, s.N, type);
  attend(kernels_for(x.scalar_type()), s, x, norm, qkv.weight.data(), qkv.bias.data(), norm_eps, scale, relu, y,
         &saved);
  return {y, saved.mean, saved.rstd, saved.row_max, saved.row_sum};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> shsa_backward(
    Tensor dy, Tensor x1, Tensor y, Tensor mean, Tensor rstd, Tensor row_max, Tensor row_sum,
    std::optional<Tensor> norm_weight, std::optional<Tensor> norm_bias, Tensor qkv_weight,
    std::optional<Tensor> qkv_bias, int64_t qk_dim, double, double scale, bool relu, bool, bool,
    std::vector<bool> needs) {
  const ScalarType type = compute_type(y.scalar_type());
  check_gradient_of(y, dy);
  const auto s = sizes_of<Sizes>(y, qkv_weight.size(1), qk_dim);
  const Norm norm(norm_weight, norm_bias, s.P, type);
  const Projection qkv("qkv_weight", qkv_weight, "qkv_bias", qkv_bias, s.O(), s.P, type);
  Tensor dx = image_gradient(y, s.C, is_channels_last(y), needs[0]);
  const NormGradient dnorm(norm_weight, norm_bias, needs, y, type);
  const Gradient dweight(qkv_weight, needs[3], y, type), dbias(qkv_bias, needs[4], y, type);
  attend_backward(kernels_for(y.scalar_type()), s, dy, x1, y, {mean, rstd, row_max, row_sum}, norm,
                  qkv.weight.data(), qkv.bias.data(), scale, relu, needs[0] ? dx.mutable_data_ptr() : nullptr,
                  dnorm, dweight.data(), dbias.data());
  return {dx, dnorm.weight.result(), dnorm.bias.result(), dweight.result(), dbias.result()};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> partial_moments_forward(Tensor x, std::optional<Tensor> norm_weight,
                                                                   std::optional<Tensor> norm_bias,
                                                                   int64_t pdim, double norm_eps) {
  const ScalarType type = compute_type(x.scalar_type());
  const auto s = sizes_of<Sizes>(x, pdim, 0);
  const Norm norm(norm_weight, norm_bias, s.P, type);
  Tensor mean = make_empty(x, {pdim}, type), cov = make_empty(x, {pdim, pdim}, type);
  Tensor image_mean = make_empty(x, {s.B}, type);
  Tensor image_rstd = make_empty(x, {s.B}, type);
  MomentsForwardParams params{s,
                              is_channels_last(x),
                              norm_eps,
                              x.const_data_ptr(),
                              norm.weight.data(),
                              norm.bias.data(),
                              mean.mutable_data_ptr(),
                              cov.mutable_data_ptr(),
                              image_mean.mutable_data_ptr(),
                              image_rstd.mutable_data_ptr(),
                              nullptr};
  run(kernels_for(x.scalar_type()).moments_forward, params);
  return {mean, cov, image_mean, image_rstd};
}

std::tuple<Tensor, Tensor, Tensor> partial_moments_backward(Tensor dmean, Tensor dcov, Tensor x1, Tensor mean,
                                                            Tensor image_mean, Tensor image_rstd,
                                                            std::optional<Tensor> norm_weight,
                                                            std::optional<Tensor> norm_bias, int64_t channels,
                                                            std::vector<bool> needs) {
  const ScalarType type = compute_type(x1.scalar_type());
  auto s = sizes_of<Sizes>(x1, x1.size(1), 0);
  s.C = channels;
  const Norm norm(norm_weight, norm_bias, s.P, type);
  Tensor dx = image_gradient(x1, channels, is_channels_last(x1), needs[0]);
  const NormGradient dnorm(norm_weight, norm_bias, needs, x1, type);
  MomentsBackwardParams params{s,
                               is_channels_last(x1),
                               dmean.const_data_ptr(),
                               dcov.const_data_ptr(),
                               x1.const_data_ptr(),
                               mean.const_data_ptr(),
                               image_mean.const_data_ptr(),
                               image_rstd.const_data_ptr(),
                               norm.weight.data(),
                               norm.bias.data(),
                               needs[0] ? dx.mutable_data_ptr() : nullptr,
                               dnorm.weight.data(),
                               dnorm.bias.data(),
                               nullptr};
  run(kernels_for(x1.scalar_type()).moments_backward, params);
  return {dx, dnorm.weight.result(), dnorm.bias.result()};
}

Tensor shsa_eval(Tensor x, std::optional<Tensor> norm_weight, std::optional<Tensor> norm_bias, Tensor weight,
                 std::optional<Tensor> bias, std::optional<Tensor> bn_weight, std::optional<Tensor> bn_bias,
                 std::optional<Tensor> bn_mean, std::optional<Tensor> bn_var, int64_t qk_dim, double norm_eps,
                 double bn_eps, double scale, bool relu, bool, bool) {
  const ScalarType type = compute_type(x.scalar_type());
  const auto s = sizes_of<Sizes>(x, weight.size(1), qk_dim);
  const Norm norm(norm_weight, norm_bias, s.P, type);
  const Projection plain("weight", weight, "bias", bias, s.O(), s.P, type);
  const RunningNorm bn(bn_weight, bn_bias, bn_mean, bn_var, s.O(), type, type);
  Tensor y = empty_image(x, s.C, is_channels_last(x));
  const Kernels& kernels = kernels_for(x.scalar_type());
  const void *qkv_weight = plain.weight.data(), *qkv_bias = plain.bias.data();
  std::optional<Folded> folded;
  if (bn.mean.data()) {
    folded.emplace(kernels, s, type, bn_eps, plain, bn);
    qkv_weight = folded->weight();
    qkv_bias = folded->bias();
  }
  attend(kernels, s, x, norm, qkv_weight, qkv_bias, norm_eps, scale, relu, y, nullptr);
  return y;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> shsa_train_forward(
    Tensor x, std::optional<Tensor> norm_weight, std::optional<Tensor> norm_bias, Tensor weight,
    std::optional<Tensor> bn_weight, std::optional<Tensor> bn_bias, int64_t qk_dim, double norm_eps,
    double bn_eps, double scale, bool relu, bool, bool) {
  const ScalarType type = compute_type(x.scalar_type());
  const auto s = sizes_of<Sizes>(x, weight.size(1), qk_dim);
  const bool channels_last = is_channels_last(x);
  const auto fresh = [&](torch::headeronly::IntHeaderOnlyArrayRef size) { return make_empty(x, size, type); };
  const Norm norm(norm_weight, norm_bias, s.P, type);
  const Projection plain("weight", weight, "", std::nullopt, s.O(), s.P, type);
  const Parameter gamma("bn_weight", bn_weight, s.O(), type), beta("bn_bias", bn_bias, s.O(), type);
  Tensor y = empty_image(x, s.C, channels_last), x1 = empty_image(x, s.P, channels_last);
  const Saved saved = empty_saved(x, s.B, s.N, type);
  Tensor mean = fresh({s.O()}), variance = fresh({s.O()});
  const BatchNorm batch_norm{gamma.data(), beta.data(), bn_eps, mean.mutable_data_ptr(),
                             variance.mutable_data_ptr()};
  attend(kernels_for(x.scalar_type()), s, x, norm, plain.weight.data(), nullptr, norm_eps, scale, relu, y,
         &saved, batch_norm, x1.mutable_data_ptr());
  // No moments of z: the statistics are those of the staged projection.
  const Tensor z_mean = torch::stable::fill_(fresh({s.P}), 0),
               z_cov = torch::stable::fill_(fresh({s.P, s.P}), 0);
  return {y, x1, saved.mean, saved.rstd, saved.row_max, saved.row_sum, z_mean, z_cov, mean, variance};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> shsa_train_backward(
    Tensor dy, Tensor y, Tensor x1, Tensor mean, Tensor rstd, Tensor row_max, Tensor row_sum, Tensor, Tensor,
    Tensor batch_mean, Tensor batch_var, std::optional<Tensor> norm_weight, std::optional<Tensor> norm_bias,
    Tensor weight, std::optional<Tensor> bn_weight, std::optional<Tensor> bn_bias, int64_t qk_dim, double,
    double bn_eps, double scale, bool relu, bool, bool, std::vector<bool> needs) {
  const ScalarType type = compute_type(y.scalar_type());
  check_gradient_of(y, dy);
  const auto s = sizes_of<Sizes>(y, weight.size(1), qk_dim);
  const Norm norm(norm_weight, norm_bias, s.P, type);
  const Projection plain("weight", weight, "", std::nullopt, s.O(), s.P, type);
  const Parameter gamma("bn_weight", bn_weight, s.O(), type), beta("bn_bias", bn_bias, s.O(), type);
  Tensor dx = image_gradient(y, s.C, is_channels_last(y), needs[0]);
  const NormGradient dnorm(norm_weight, norm_bias, needs, y, type);
  const Gradient dweight(weight, needs[3], y, type), dbn_weight(bn_weight, needs[4], y, type),
      dbn_bias(bn_bias, needs[5], y, type);
  const BatchNorm batch_norm{gamma.data(), beta.data(), bn_eps, batch_mean.mutable_data_ptr(),
                             batch_var.mutable_data_ptr()};
  attend_backward(kernels_for(y.scalar_type()), s, dy, x1, y, {mean, rstd, row_max, row_sum}, norm,
                  plain.weight.data(), nullptr, scale, relu, needs[0] ? dx.mutable_data_ptr() : nullptr, dnorm,
                  dweight.data(), nullptr, batch_norm, dbn_weight.data(), dbn_bias.data());
  return {
      dx, dnorm.weight.result(), dnorm.bias.result(), dweight.result(), dbn_weight.result(), dbn_bias.result()};
}

void update_running_statistics(Tensor running_mean, Tensor running_var, Tensor num_batches_tracked, Tensor mean,
                               Tensor variance, int64_t count, std::optional<double> momentum) {
  const RunningStatistics running("", running_mean, running_var, num_batches_tracked, momentum, mean.numel());
  const ScalarType type = compute_type(running_mean.scalar_type());
  check_batch_statistics(type, mean, variance);
  running.update(type, mean.const_data_ptr(), variance.const_data_ptr(), count);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(shvit_kernels, CPU, m) {
  m.impl("update_running_statistics_native", TORCH_BOX(&update_running_statistics));
  m.impl("shsa_train_forward_native", TORCH_BOX(&shsa_train_forward));
  m.impl("shsa_train_backward_native", TORCH_BOX(&shsa_train_backward));
  m.impl("shsa_eval_native", TORCH_BOX(&shsa_eval));
  m.impl("shsa_forward_native", TORCH_BOX(&shsa_forward));
  m.impl("shsa_backward_native", TORCH_BOX(&shsa_backward));
  m.impl("partial_moments_forward_native", TORCH_BOX(&partial_moments_forward));
  m.impl("partial_moments_backward_native", TORCH_BOX(&partial_moments_backward));
}

STABLE_TORCH_LIBRARY(shvit_kernels_native, m) {
  m.def("instruction_set() -> str");
  m.def("instruction_sets() -> str");
  m.def("set_instruction_set(str name) -> ()");
  m.def("product_flops(ScalarType dtype, int repeats) -> float");
  m.def("cuda_architectures() -> str");
}

STABLE_TORCH_LIBRARY_IMPL(shvit_kernels_native, CompositeExplicitAutograd, m) {
  m.impl("instruction_set", TORCH_BOX(&instruction_set));
  m.impl("instruction_sets", TORCH_BOX(&instruction_sets));
  m.impl("set_instruction_set", TORCH_BOX(&set_instruction_set));
  m.impl("product_flops", TORCH_BOX(&product_flops));
  m.impl("cuda_architectures", TORCH_BOX(&cuda_architectures));
}
