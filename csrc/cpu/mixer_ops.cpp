// The operators of the whole attention layer (shvit_kernels/ops.py) for CPU tensors: float32 and float64.

#include <optional>
#include <tuple>
#include <vector>

#include "../tensors.h"
#include "run.h"
#include "running_statistics.h"

namespace {

using namespace shvit;

const MixerKernels& kernels_for(ScalarType dtype) {
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::Double,
                  "mixer_train and mixer_eval take float32 and float64");
  const Variant* variant = current_variant().load();
  return dtype == ScalarType::Float ? variant->mixer_float32 : variant->mixer_float64;
}

void* data(const Tensor& t) { return t.mutable_data_ptr(); }

// What the forward keeps for the backward besides its projection: one tensor, for each costs as much as a small
// kernel. First come mean and variance of both projections.
class Statistics {
 public:
  Statistics(const Tensor& t, ScalarType type, const Sizes& s)
      : at_(static_cast<char*>(data(t))), value_bytes_(t.element_size()) {
    STD_TORCH_CHECK(t.numel() == values(s) && t.is_contiguous() && t.scalar_type() == type,
                    "statistics must be contiguous, of the type of x, with ", values(s), " values, got ",
                    t.numel());
    for (void** part : {&mean, &variance}) *part = take(s.O());
    for (void** part : {&proj_mean, &proj_var}) *part = take(s.C);
    for (void** part : {&image_mean, &image_rstd}) *part = take(s.B);
    for (void** part : {&row_max, &row_sum}) *part = take(s.B * s.N);
  }
  static int64_t values(const Sizes& s) { return 2 * (s.O() + s.C + s.B + s.B * s.N); }

  // [O], [O], [C], [C], of the images [B] each, of the rows of the softmax [B, N] each.
  void *mean, *variance, *proj_mean, *proj_var, *image_mean, *image_rstd, *row_max, *row_sum;

 private:
  void* take(int64_t count) {
    char* part = at_;
    at_ += count * value_bytes_;
    return part;
  }
  char* at_;
  int64_t value_bytes_;
};

// The parameters of the layer in training, in the order of the schema.
struct Layer {
  const Norm norm;
  const Parameter weight, bn_weight, bn_bias, proj_weight, proj_bn_weight, proj_bn_bias;

  BatchNorm batch_norm(double eps, const Statistics& of) const {
    return {bn_weight.data(), bn_bias.data(), eps, of.mean, of.variance};
  }
  BatchNorm proj_norm(double eps, const Statistics& of) const {
    return {proj_bn_weight.data(), proj_bn_bias.data(), eps, of.proj_mean, of.proj_var};
  }
};

Layer layer_of(const Sizes& s, ScalarType type, const std::optional<Tensor>& norm_weight,
               const std::optional<Tensor>& norm_bias, const Tensor& weight,
               const std::optional<Tensor>& bn_weight, const std::optional<Tensor>& bn_bias,
               const Tensor& proj_weight, const std::optional<Tensor>& proj_bn_weight,
               const std::optional<Tensor>& proj_bn_bias) {
  return {Norm(norm_weight, norm_bias, s.P, type),
          Parameter("weight", weight, s.O() * s.P, type),
          Parameter("bn_weight", bn_weight, s.O(), type),
          Parameter("bn_bias", bn_bias, s.O(), type),
          Parameter("proj_weight", proj_weight, s.C * s.C, type),
          Parameter("proj_bn_weight", proj_bn_weight, s.C, type),
          Parameter("proj_bn_bias", proj_bn_bias, s.C, type)};
}

// What the attention of a layer reads besides its projection.
ShsaForwardParams attention_of(const Tensor& x, const Sizes& s, const Norm& norm, double norm_eps,
                               double scale) {
  ShsaForwardParams attention{};
  attention.sizes = s;
  attention.channels_last = is_channels_last(x);
  attention.relu = true;
  attention.norm_eps = norm_eps;
  attention.scale = scale;
  attention.x = x.const_data_ptr();
  attention.norm_weight = norm.weight.data();
  attention.norm_bias = norm.bias.data();
  return attention;
}

std::tuple<Tensor, Tensor, Tensor> mixer_train_forward(
    Tensor x, std::optional<Tensor> norm_weight, std::optional<Tensor> norm_bias, Tensor weight,
    std::optional<Tensor> bn_weight, std::optional<Tensor> bn_bias, Tensor proj_weight,
    std::optional<Tensor> proj_bn_weight, std::optional<Tensor> proj_bn_bias, int64_t qk_dim, double norm_eps,
    double bn_eps, double proj_bn_eps, double scale, bool residual, std::optional<Tensor> running_mean,
    std::optional<Tensor> running_var, std::optional<Tensor> num_batches_tracked,
    std::optional<double> momentum, std::optional<Tensor> proj_running_mean,
    std::optional<Tensor> proj_running_var, std::optional<Tensor> proj_num_batches_tracked,
    std::optional<double> proj_momentum) {
  const ScalarType type = x.scalar_type();
  const MixerKernels& kernels = kernels_for(type);
  const auto s = sizes_of<Sizes>(x, weight.size(1), qk_dim);
  const Layer layer = layer_of(s, type, norm_weight, norm_bias, weight, bn_weight, bn_bias, proj_weight,
                               proj_bn_weight, proj_bn_bias);
  const RunningStatistics running("", running_mean, running_var, num_batches_tracked, momentum, s.O()),
      proj_running("proj_", proj_running_mean, proj_running_var, proj_num_batches_tracked, proj_momentum, s.C);
  const bool channels_last = is_channels_last(x);
  const Tensor out = empty_image(x, s.C, channels_last), projected = empty_image(x, s.C, channels_last),
               statistics = make_empty(x, {Statistics::values(s)}, type);
  const Statistics saved(statistics, type, s);
  MixerTrainForwardParams params{attention_of(x, s, layer.norm, norm_eps, scale)};
  ShsaForwardParams& attention = params.attention;
  attention.qkv_weight = layer.weight.data();
  attention.batch_norm = layer.batch_norm(bn_eps, saved);
  attention.mean = saved.image_mean;
  attention.rstd = saved.image_rstd;
  attention.row_max = saved.row_max;
  attention.row_sum = saved.row_sum;
  params.residual = residual;
  params.proj_weight = layer.proj_weight.data();
  params.proj_norm = layer.proj_norm(proj_bn_eps, saved);
  params.projected = data(projected);
  params.out = data(out);
  run(kernels.train_forward, params);
  running.update(type, saved.mean, saved.variance, s.B * s.N);
  proj_running.update(type, saved.proj_mean, saved.proj_var, s.B * s.N);
  return {out, projected, statistics};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> mixer_train_backward(
    Tensor dout, Tensor x, Tensor projected, Tensor statistics, std::optional<Tensor> norm_weight,
    std::optional<Tensor> norm_bias, Tensor weight, std::optional<Tensor> bn_weight,
    std::optional<Tensor> bn_bias, Tensor proj_weight, std::optional<Tensor> proj_bn_weight,
    std::optional<Tensor> proj_bn_bias, int64_t qk_dim, double norm_eps, double bn_eps, double proj_bn_eps,
    double scale, bool residual, std::vector<bool> needs) {
  const ScalarType type = x.scalar_type();
  const MixerKernels& kernels = kernels_for(type);
  check_gradient_of(x, dout);
  const auto s = sizes_of<Sizes>(x, weight.size(1), qk_dim);
  const Layer layer = layer_of(s, type, norm_weight, norm_bias, weight, bn_weight, bn_bias, proj_weight,
                               proj_bn_weight, proj_bn_bias);
  const bool channels_last = is_channels_last(x);
  Tensor dx = image_gradient(x, s.C, channels_last, needs[0]);
  const NormGradient dnorm(norm_weight, norm_bias, needs, x, type);
  const Gradient dweight(weight, needs[3], x, type), dbn_weight(bn_weight, needs[4], x, type),
      dbn_bias(bn_bias, needs[5], x, type), dproj_weight(proj_weight, needs[6], x, type),
      dproj_bn_weight(proj_bn_weight, needs[7], x, type), dproj_bn_bias(proj_bn_bias, needs[8], x, type);
  const Statistics saved(statistics, type, s);
  MixerTrainBackwardParams params{};
  ShsaBackwardParams& attention = params.attention;
  attention.sizes = s;
  attention.channels_last = attention.x1_channels_last = channels_last;
  attention.relu = true;
  attention.scale = scale;
  attention.x1 = x.const_data_ptr();
  attention.x1_channels = s.C;
  attention.mean = saved.image_mean;
  attention.rstd = saved.image_rstd;
  attention.row_max = saved.row_max;
  attention.row_sum = saved.row_sum;
  attention.norm_weight = layer.norm.weight.data();
  attention.norm_bias = layer.norm.bias.data();
  attention.qkv_weight = layer.weight.data();
  attention.batch_norm = layer.batch_norm(bn_eps, saved);
  attention.dx = needs[0] ? data(dx) : nullptr;
  attention.dnorm_weight = dnorm.weight.data();
  attention.dnorm_bias = dnorm.bias.data();
  attention.dqkv_weight = dweight.data();
  attention.dbn_weight = dbn_weight.data();
  attention.dbn_bias = dbn_bias.data();
  params.norm_eps = norm_eps;
  params.residual = residual;
  params.dout = dout.const_data_ptr();
  params.projected = projected.const_data_ptr();
  params.proj_weight = layer.proj_weight.data();
  params.proj_norm = layer.proj_norm(proj_bn_eps, saved);
  params.dproj_weight = dproj_weight.data();
  params.dproj_norm_weight = dproj_bn_weight.data();
  params.dproj_norm_bias = dproj_bn_bias.data();
  run(kernels.train_backward, params);
  return {dx,
          dnorm.weight.result(),
          dnorm.bias.result(),
          dweight.result(),
          dbn_weight.result(),
          dbn_bias.result(),
          dproj_weight.result(),
          dproj_bn_weight.result(),
          dproj_bn_bias.result()};
}

// A projection [O, P] and the running statistics behind it, mean and var null together.
struct FoldedProjection {
  const Parameter weight, bias, bn_weight, bn_bias, mean, var;

  FoldParams params(int64_t O, int64_t P, double eps) const {
    return {O,           P,          eps,     weight.data(), bias.data(), bn_weight.data(), bn_bias.data(),
            mean.data(), var.data(), nullptr, nullptr,       nullptr};
  }
};

Tensor mixer_eval(Tensor x, std::optional<Tensor> norm_weight, std::optional<Tensor> norm_bias, Tensor weight,
                  std::optional<Tensor> bias, std::optional<Tensor> bn_weight, std::optional<Tensor> bn_bias,
                  std::optional<Tensor> bn_mean, std::optional<Tensor> bn_var, Tensor proj_weight,
                  std::optional<Tensor> proj_bias, std::optional<Tensor> proj_bn_weight,
                  std::optional<Tensor> proj_bn_bias, std::optional<Tensor> proj_bn_mean,
                  std::optional<Tensor> proj_bn_var, int64_t qk_dim, double norm_eps, double bn_eps,
                  double proj_bn_eps, double scale, bool residual) {
  const ScalarType type = x.scalar_type();
  const MixerKernels& kernels = kernels_for(type);
  const auto s = sizes_of<Sizes>(x, weight.size(1), qk_dim);
  STD_TORCH_CHECK(bn_mean.has_value() == bn_var.has_value(), "bn_mean and bn_var must be given together");
  STD_TORCH_CHECK(proj_bn_mean.has_value() == proj_bn_var.has_value(),
                  "proj_bn_mean and proj_bn_var must be given together");
  const Norm norm(norm_weight, norm_bias, s.P, type);
  const FoldedProjection qkv{{"weight", weight, s.O() * s.P, type}, {"bias", bias, s.O(), type},
                             {"bn_weight", bn_weight, s.O(), type}, {"bn_bias", bn_bias, s.O(), type},
                             {"bn_mean", bn_mean, s.O(), type},     {"bn_var", bn_var, s.O(), type}};
  const FoldedProjection projection{
      {"proj_weight", proj_weight, s.C * s.C, type}, {"proj_bias", proj_bias, s.C, type},
      {"proj_bn_weight", proj_bn_weight, s.C, type}, {"proj_bn_bias", proj_bn_bias, s.C, type},
      {"proj_bn_mean", proj_bn_mean, s.C, type},     {"proj_bn_var", proj_bn_var, s.C, type}};
  const Tensor out = empty_image(x, s.C, is_channels_last(x));
  MixerEvalParams params{attention_of(x, s, norm, norm_eps, scale)};
  params.residual = residual;
  params.qkv = qkv.params(s.O(), s.P, bn_eps);
  params.projection = projection.params(s.C, s.C, proj_bn_eps);
  params.out = data(out);
  params.threads = torch::stable::get_num_threads();
  run(kernels.eval, params);
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(shvit_kernels, CPU, m) {
  m.impl("mixer_train_forward", TORCH_BOX(&mixer_train_forward));
  m.impl("mixer_train_backward", TORCH_BOX(&mixer_train_backward));
  m.impl("mixer_eval", TORCH_BOX(&mixer_eval));
}
