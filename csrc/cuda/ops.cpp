// The operators of shvit_kernels/ops.py for CUDA tensors.
//
// tests/cuda_host compiles this file and the kernels for CPU tensors, as a family of its own.

#include <algorithm>
#include <optional>
#include <tuple>
#include <vector>

#include "../tensors.h"
#include "kernels.h"

#ifndef SHVIT_FAMILY
#define SHVIT_FAMILY native
#define SHVIT_DISPATCH_KEY CUDA
#endif

// shim.h declares it where USE_CUDA is defined.
extern "C" AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index, void** stream);

namespace operators {  // apart from the functions of kernels.h of the same names
namespace {

using namespace shvit;
using namespace shvit::cuda;

Type type_of(ScalarType type) {
  switch (type) {
    case ScalarType::Half:
      return Type::kFloat16;
    case ScalarType::BFloat16:
      return Type::kBFloat16;
    case ScalarType::Float:
      return Type::kFloat32;
    default:
      STD_TORCH_CHECK(false, "the cuda kernels take float16, bfloat16 and float32");
  }
}

// One call of an operator: the device of `images` is the current one as long as it lives.
class Call {
 public:
  Call(const char* name, const Tensor& images) : name_(name), images_(images), scalar_(images.scalar_type()) {
    type = type_of(scalar_);
    if (!images.is_cuda()) return;
    guard_.emplace(images.get_device_index());
    const AOTITorchError status = aoti_torch_get_current_cuda_stream(images.get_device_index(), &stream);
    STD_TORCH_CHECK(status == AOTI_TORCH_SUCCESS, name, ": PyTorch gives no current stream");
  }

  // Kernels would read what lies elsewhere all the same.
  template <class... Tensors>
  void on_one_device(const Tensors&... tensors) const {
    (check_device(tensors), ...);
  }

  // What a function of kernels.h returned.
  void check(const char* error) const { STD_TORCH_CHECK(error == nullptr, name_, ": ", error); }

  Tensor floats(torch::headeronly::IntHeaderOnlyArrayRef size) const {
    return make_empty(images_, size, ScalarType::Float);
  }
  Tensor bytes(size_t count) const {
    return make_empty(images_, {static_cast<int64_t>(count)}, ScalarType::Byte);
  }
  Precision precision(bool tf32_proj, bool tf32_attn) const {
    return type == Type::kFloat32 ? Precision{tf32_proj, tf32_attn} : Precision{false, false};
  }
  ScalarType scalar() const { return scalar_; }

  Type type;
  void* stream = nullptr;

 private:
  void check_device(const std::optional<Tensor>& t) const {
    if (t.has_value()) check_device(*t);
  }
  void check_device(const Tensor& t) const {
    STD_TORCH_CHECK(t.device() == images_.device(), name_, ": all tensors must be on one device");
  }

  const char* name_;
  const Tensor& images_;
  ScalarType scalar_;
  std::optional<torch::stable::accelerator::DeviceGuard> guard_;
};

float* floats(const Tensor& t) { return static_cast<float*>(t.mutable_data_ptr()); }
const float* const_floats(const Tensor& t) { return static_cast<const float*>(t.const_data_ptr()); }

Sizes checked_sizes(const Tensor& images, int64_t P, int64_t D) {
  STD_TORCH_CHECK(P <= kMostPartialChannels && D <= kMostQueryWidth, "the cuda kernels take pdim up to ",
                  kMostPartialChannels, " and qk_dim up to ", kMostQueryWidth, ", got ", P, " and ", D);
  return sizes_of<Sizes>(images, P, D);
}

// ---------------------------------------------------------------------------------------------------------------
// Forward

// All but the parameters of the projection and of its batch normalisation.
ShsaForwardParams forward_params(const Call& call, const Sizes& s, const Tensor& x, const Norm& norm,
                                 double norm_eps, double scale, bool relu, bool tf32_proj, bool tf32_attn,
                                 const Tensor& y, const Saved* saved) {
  ShsaForwardParams p{};
  p.sizes = s;
  p.precision = call.precision(tf32_proj, tf32_attn);
  p.channels_last = is_channels_last(x);
  p.relu = relu;
  p.norm_eps = static_cast<float>(norm_eps);
  p.scale = static_cast<float>(scale);
  p.x = x.const_data_ptr();
  p.norm_weight = norm.weight.data();
  p.norm_bias = norm.bias.data();
  p.y = y.mutable_data_ptr();
  if (saved) {
    p.mean = floats(saved->mean);
    p.rstd = floats(saved->rstd);
    p.row_max = floats(saved->row_max);
    p.row_sum = floats(saved->row_sum);
  }
  return p;
}

void attend(const Call& call, const ShsaForwardParams& p) {
  if (p.sizes.B == 0) return;
  if (shsa_forward_fits(p.sizes, call.type)) {
    call.check(cuda::shsa_forward(p, call.type, call.stream));
  } else {
    const Tensor workspace = call.bytes(shsa_long_forward_workspace(p.sizes, call.type));
    call.check(shsa_long_forward(p, workspace.mutable_data_ptr(), call.type, call.stream));
  }
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> shsa_forward(Tensor x, std::optional<Tensor> norm_weight,
                                                                std::optional<Tensor> norm_bias,
                                                                Tensor qkv_weight,
                                                                std::optional<Tensor> qkv_bias, int64_t qk_dim,
                                                                double norm_eps, double scale, bool relu,
                                                                bool tf32_proj, bool tf32_attn) {
  const Call call("shsa_forward", x);
  call.on_one_device(norm_weight, norm_bias, qkv_weight, qkv_bias);
  const Sizes s = checked_sizes(x, qkv_weight.size(1), qk_dim);
  const Norm norm(norm_weight, norm_bias, s.P, call.scalar());
  const Projection qkv("qkv_weight", qkv_weight, "qkv_bias", qkv_bias, s.O(), s.P, call.scalar());
  Tensor y = empty_image(x, s.C, is_channels_last(x));
  const Saved saved = empty_saved(x, s.B, s.N, ScalarType::Float);
  ShsaForwardParams p =
      forward_params(call, s, x, norm, norm_eps, scale, relu, tf32_proj, tf32_attn, y, &saved);
  p.qkv_weight = qkv.weight.data();
  p.qkv_bias = qkv.bias.data();
  attend(call, p);
  return {y, saved.mean, saved.rstd, saved.row_max, saved.row_sum};
}

Tensor shsa_eval(Tensor x, std::optional<Tensor> norm_weight, std::optional<Tensor> norm_bias, Tensor weight,
                 std::optional<Tensor> bias, std::optional<Tensor> bn_weight, std::optional<Tensor> bn_bias,
                 std::optional<Tensor> bn_mean, std::optional<Tensor> bn_var, int64_t qk_dim, double norm_eps,
                 double bn_eps, double scale, bool relu, bool tf32_proj, bool tf32_attn) {
  const Call call("shsa_eval", x);
  call.on_one_device(norm_weight, norm_bias, weight, bias, bn_weight, bn_bias, bn_mean, bn_var);
  const Sizes s = checked_sizes(x, weight.size(1), qk_dim);
  const Norm norm(norm_weight, norm_bias, s.P, call.scalar());
  const Projection plain("weight", weight, "bias", bias, s.O(), s.P, call.scalar());
  const auto stored = [&](const std::optional<Tensor>& t) {
    return !t.has_value() || t->scalar_type() == call.scalar();
  };
  const ScalarType statistics = stored(bn_mean) && stored(bn_var) ? call.scalar() : ScalarType::Float;
  const RunningNorm bn(bn_weight, bn_bias, bn_mean, bn_var, s.O(), call.scalar(), statistics);
  Tensor y = empty_image(x, s.C, is_channels_last(x));
  ShsaForwardParams p =
      forward_params(call, s, x, norm, norm_eps, scale, relu, tf32_proj, tf32_attn, y, nullptr);
  p.qkv_weight = plain.weight.data();
  p.qkv_bias = plain.bias.data();
  p.bn_eps = static_cast<float>(bn_eps);
  p.bn_weight = bn.weight.data();
  p.bn_bias = bn.bias.data();
  p.bn_mean = bn.mean.data();
  p.bn_var = bn.var.data();
  p.bn_statistics_float32 = statistics == ScalarType::Float;
  attend(call, p);
  return y;
}

Tensor shsa_mixer(Tensor x, std::optional<Tensor> norm_weight, std::optional<Tensor> norm_bias,
                  Tensor qkv_weight, std::optional<Tensor> qkv_bias, Tensor proj_weight,
                  std::optional<Tensor> proj_bias, int64_t qk_dim, double norm_eps, double scale,
                  bool tf32_proj, bool tf32_attn) {
  const Call call("shsa_mixer", x);
  call.on_one_device(norm_weight, norm_bias, qkv_weight, qkv_bias, proj_weight, proj_bias);
  const Sizes s = checked_sizes(x, qkv_weight.size(1), qk_dim);
  const Norm norm(norm_weight, norm_bias, s.P, call.scalar());
  const Projection qkv("qkv_weight", qkv_weight, "qkv_bias", qkv_bias, s.O(), s.P, call.scalar());
  const Projection proj("proj_weight", proj_weight, "proj_bias", proj_bias, s.C, s.C, call.scalar());
  Tensor y = empty_image(x, s.C, is_channels_last(x));
  if (s.B == 0) return y;
  ShsaMixerParams p{};
  p.attention = forward_params(call, s, x, norm, norm_eps, scale, true, tf32_proj, tf32_attn, y, nullptr);
  p.attention.qkv_weight = qkv.weight.data();
  p.attention.qkv_bias = qkv.bias.data();
  p.proj_weight = proj.weight.data();
  p.proj_bias = proj.bias.data();
  const Tensor workspace = call.bytes(shsa_mixer_workspace(p, call.type));
  p.workspace = workspace.mutable_data_ptr();
  call.check(cuda::shsa_mixer(p, call.type, call.stream));
  return y;
}

// ---------------------------------------------------------------------------------------------------------------
// Moments

struct Moments {
  Tensor image_mean, image_rstd, z_mean, z_cov;
};

Moments empty_moments(const Call& call, const Sizes& s) {
  return {call.floats({s.B}), call.floats({s.B}), call.floats({s.P}), call.floats({s.P, s.P})};
}

// Zeros without images. Of `weight`, the batch statistics of the projection too.
void take_moments(const Call& call, const Sizes& s, const Tensor& x, const Norm& norm, double norm_eps,
                  const Moments& moments, const void* weight, Tensor* x1, Tensor* bn_mean, Tensor* bn_var) {
  if (s.B == 0) {
    for (Tensor t : {moments.z_mean, moments.z_cov}) torch::stable::zero_(t);
    for (Tensor* t : {bn_mean, bn_var})
      if (t) torch::stable::zero_(*t);
    return;
  }
  MomentsParams p{};
  p.sizes = s;
  p.channels_last = is_channels_last(x);
  p.norm_eps = static_cast<float>(norm_eps);
  p.x = x.const_data_ptr();
  p.norm_weight = norm.weight.data();
  p.norm_bias = norm.bias.data();
  p.weight = weight;
  p.x1 = x1 ? x1->mutable_data_ptr() : nullptr;
  p.image_mean = floats(moments.image_mean);
  p.image_rstd = floats(moments.image_rstd);
  p.z_mean = floats(moments.z_mean);
  p.z_cov = floats(moments.z_cov);
  p.bn_mean = bn_mean ? floats(*bn_mean) : nullptr;
  p.bn_var = bn_var ? floats(*bn_var) : nullptr;
  const Tensor workspace = call.bytes(moments_workspace(s));
  p.workspace = workspace.mutable_data_ptr();
  call.check(cuda::moments(p, call.type, call.stream));
}

std::tuple<Tensor, Tensor, Tensor, Tensor> partial_moments_forward(Tensor x, std::optional<Tensor> norm_weight,
                                                                   std::optional<Tensor> norm_bias,
                                                                   int64_t pdim, double norm_eps) {
  const Call call("partial_moments_forward", x);
  call.on_one_device(norm_weight, norm_bias);
  const Sizes s = checked_sizes(x, pdim, 0);
  const Norm norm(norm_weight, norm_bias, s.P, call.scalar());
  const Moments moments = empty_moments(call, s);
  take_moments(call, s, x, norm, norm_eps, moments, nullptr, nullptr, nullptr, nullptr);
  return {moments.z_mean, moments.z_cov, moments.image_mean, moments.image_rstd};
}

// ---------------------------------------------------------------------------------------------------------------
// Backward

// Gradients are written in the types of their parameters.
class OwnGradient : public Gradient {
 public:
  OwnGradient(const std::optional<Tensor>& parameter, bool needed, const Tensor& like)
      : Gradient(parameter, needed, like,
                 parameter.has_value() ? parameter->scalar_type() : like.scalar_type()),
        type_(parameter.has_value() ? type_of(parameter->scalar_type()) : Type::kFloat32) {}
  Output output() const { return {data(), type_}; }

 private:
  Type type_;
};

// Sums of parts, finished by one launch.
class Reductions {
 public:
  // parts: [count_of_parts, stride], of which `count` values from `first` on are summed.
  void add(const Tensor& parts, int64_t first, int64_t count, const OwnGradient& total) {
    if (!total.data()) return;
    const int64_t stride = parts.numel() / std::max<int64_t>(parts.size(0), 1);
    reductions_.push_back(
        {const_floats(parts) + first, static_cast<int>(parts.size(0)), stride, count, total.output()});
    parts_.push_back(parts);
  }
  void run(const Call& call) const {
    if (reductions_.empty()) return;
    call.check(reduce(reductions_.data(), static_cast<int>(reductions_.size()), call.stream));
  }

 private:
  std::vector<Reduction> reductions_;
  std::vector<Tensor> parts_;  // kept until they are read
};

// All but the tensors of the projection and of its batch normalisation.
ShsaBackwardParams backward_params(const Call& call, const Sizes& s, const Tensor& dy, const Tensor& x1,
                                   const Tensor& y, const Saved& saved, const Norm& norm, double scale,
                                   bool relu, bool tf32_proj, bool tf32_attn) {
  ShsaBackwardParams p{};
  p.sizes = s;
  p.precision = call.precision(tf32_proj, tf32_attn);
  p.channels_last = is_channels_last(y);
  p.x1_channels_last = is_channels_last(x1);
  p.relu = relu;
  p.scale = static_cast<float>(scale);
  p.dy = dy.const_data_ptr();
  p.x1 = x1.const_data_ptr();
  p.y = y.const_data_ptr();
  p.mean = const_floats(saved.mean);
  p.rstd = const_floats(saved.rstd);
  p.row_max = const_floats(saved.row_max);
  p.row_sum = const_floats(saved.row_sum);
  p.norm_weight = norm.weight.data();
  p.norm_bias = norm.bias.data();
  return p;
}

// What the backward of the attention leaves to be finished; null where not needed.
struct Parts {
  int count = 0;
  std::optional<Tensor> dz, dweight, dbias;
};

Parts attend_backward(const Call& call, ShsaBackwardParams& p, bool dz, bool dweight, bool dbias) {
  const Sizes& s = p.sizes;
  const bool fits = shsa_backward_fits(s, call.type);
  Parts parts;
  if (s.B) parts.count = fits ? shsa_backward_parts(s) : shsa_long_backward_parts(s);
  if (dz) p.dz = floats(parts.dz.emplace(call.floats({s.B, s.P, s.N})));
  if (dweight) p.dweight_parts = floats(parts.dweight.emplace(call.floats({parts.count, s.O(), s.P})));
  if (dbias) p.dbias_parts = floats(parts.dbias.emplace(call.floats({parts.count, s.O()})));
  if (s.B == 0 || !(p.dx || dz || dweight || dbias)) return parts;
  if (fits) {
    call.check(cuda::shsa_backward(p, call.type, call.stream));
  } else {
    const Tensor workspace = call.bytes(shsa_long_backward_workspace(s, call.type));
    call.check(shsa_long_backward(p, workspace.mutable_data_ptr(), call.type, call.stream));
  }
  return parts;
}

// The gradients of the images (with C channels) and of the group normalisation.
struct NormGradients {
  NormGradients(const Tensor& images, int64_t C, const std::optional<Tensor>& norm_weight,
                const std::optional<Tensor>& norm_bias, const std::vector<bool>& needs)
      : dx(image_gradient(images, C, is_channels_last(images), needs[0])),
        weight(norm_weight, needs[1], images),
        bias(norm_bias, needs[2], images) {}
  bool needed() const { return dx.numel() || weight.data() || bias.data(); }
  void* dx_data() const { return dx.numel() ? dx.mutable_data_ptr() : nullptr; }

  Tensor dx;
  OwnGradient weight, bias;
};

NormBackwardParams norm_backward_params(const Sizes& s, const Tensor& x1, const Norm& norm, const Tensor& mean,
                                        const Tensor& rstd) {
  NormBackwardParams p{};
  p.sizes = s;
  p.sizes.D = 0;
  p.x1_channels_last = is_channels_last(x1);
  p.x1 = x1.const_data_ptr();
  p.norm_weight = norm.weight.data();
  p.norm_bias = norm.bias.data();
  p.mean = const_floats(mean);
  p.rstd = const_floats(rstd);
  return p;
}

// Through the group normalisation; leaves its parameters' gradients to be summed.
void finish(const Call& call, NormBackwardParams& p, const NormGradients& gradients, bool channels_last,
            Reductions& reductions) {
  if (!gradients.needed()) return;
  const int64_t P = p.sizes.P;
  const int count = p.sizes.B ? norm_backward_parts(p.sizes) : 0;
  p.channels_last = channels_last;
  p.dx = gradients.dx_data();
  if (gradients.weight.data() || gradients.bias.data()) {
    const Tensor parts = call.floats({count, 2, P});
    p.dnorm_parts = floats(parts);
    reductions.add(parts, 0, P, gradients.weight);
    reductions.add(parts, P, P, gradients.bias);
  }
  if (p.sizes.B == 0) return;
  const Tensor workspace = call.bytes(norm_backward_workspace(p.sizes));
  p.workspace = workspace.mutable_data_ptr();
  call.check(norm_backward(p, call.type, call.stream));
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> shsa_backward(
    Tensor dy, Tensor x1, Tensor y, Tensor mean, Tensor rstd, Tensor row_max, Tensor row_sum,
    std::optional<Tensor> norm_weight, std::optional<Tensor> norm_bias, Tensor qkv_weight,
    std::optional<Tensor> qkv_bias, int64_t qk_dim, double, double scale, bool relu, bool tf32_proj,
    bool tf32_attn, std::vector<bool> needs) {
  const Call call("shsa_backward", y);
  call.on_one_device(dy, x1, mean, rstd, row_max, row_sum, norm_weight, norm_bias, qkv_weight, qkv_bias);
  check_gradient_of(y, dy);
  const Sizes s = checked_sizes(y, qkv_weight.size(1), qk_dim);
  const Norm norm(norm_weight, norm_bias, s.P, call.scalar());
  const Projection qkv("qkv_weight", qkv_weight, "qkv_bias", qkv_bias, s.O(), s.P, call.scalar());
  const NormGradients gradients(y, s.C, norm_weight, norm_bias, needs);
  const OwnGradient dweight(qkv_weight, needs[3], y), dbias(qkv_bias, needs[4], y);
  ShsaBackwardParams p = backward_params(call, s, dy, x1, y, {mean, rstd, row_max, row_sum}, norm, scale, relu,
                                         tf32_proj, tf32_attn);
  p.qkv_weight = qkv.weight.data();
  p.qkv_bias = qkv.bias.data();
  p.dx = gradients.dx_data();
  const Parts parts = attend_backward(call, p, gradients.needed(), dweight.data(), dbias.data());
  Reductions reductions;
  if (parts.dweight) reductions.add(*parts.dweight, 0, int64_t{s.O()} * s.P, dweight);
  if (parts.dbias) reductions.add(*parts.dbias, 0, s.O(), dbias);
  NormBackwardParams through_norm = norm_backward_params(s, x1, norm, mean, rstd);
  through_norm.dz = p.dz;
  finish(call, through_norm, gradients, p.channels_last, reductions);
  reductions.run(call);
  return {gradients.dx, gradients.weight.result(), gradients.bias.result(), dweight.result(), dbias.result()};
}

std::tuple<Tensor, Tensor, Tensor> partial_moments_backward(Tensor dmean, Tensor dcov, Tensor x1, Tensor mean,
                                                            Tensor image_mean, Tensor image_rstd,
                                                            std::optional<Tensor> norm_weight,
                                                            std::optional<Tensor> norm_bias, int64_t channels,
                                                            std::vector<bool> needs) {
  const Call call("partial_moments_backward", x1);
  call.on_one_device(dmean, dcov, mean, image_mean, image_rstd, norm_weight, norm_bias);
  Sizes s = checked_sizes(x1, x1.size(1), 0);
  s.C = static_cast<int>(channels);
  const Norm norm(norm_weight, norm_bias, s.P, call.scalar());
  const NormGradients gradients(x1, channels, norm_weight, norm_bias, needs);
  NormBackwardParams p = norm_backward_params(s, x1, norm, image_mean, image_rstd);
  p.clear_rest = true;
  p.dz_mean = const_floats(dmean);
  p.dz_cov = const_floats(dcov);
  p.z_mean = const_floats(mean);
  Reductions reductions;
  finish(call, p, gradients, is_channels_last(x1), reductions);
  reductions.run(call);
  return {gradients.dx, gradients.weight.result(), gradients.bias.result()};
}

// ---------------------------------------------------------------------------------------------------------------
// Training

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> shsa_train_forward(
    Tensor x, std::optional<Tensor> norm_weight, std::optional<Tensor> norm_bias, Tensor weight,
    std::optional<Tensor> bn_weight, std::optional<Tensor> bn_bias, int64_t qk_dim, double norm_eps,
    double bn_eps, double scale, bool relu, bool tf32_proj, bool tf32_attn) {
  const Call call("shsa_train_forward", x);
  call.on_one_device(norm_weight, norm_bias, weight, bn_weight, bn_bias);
  const Sizes s = checked_sizes(x, weight.size(1), qk_dim);
  const bool channels_last = is_channels_last(x);
  const Norm norm(norm_weight, norm_bias, s.P, call.scalar());
  const Parameter plain("weight", weight, int64_t{s.O()} * s.P, call.scalar());
  const Parameter gamma("bn_weight", bn_weight, s.O(), call.scalar());
  const Parameter beta("bn_bias", bn_bias, s.O(), call.scalar());
  Tensor y = empty_image(x, s.C, channels_last), x1 = empty_image(x, s.P, channels_last);
  const Saved saved = empty_saved(x, s.B, s.N, ScalarType::Float);
  const Moments moments{saved.mean, saved.rstd, call.floats({s.P}), call.floats({s.P, s.P})};
  Tensor mean = call.floats({s.O()}), variance = call.floats({s.O()});
  take_moments(call, s, x, norm, norm_eps, moments, plain.data(), &x1, &mean, &variance);
  ShsaForwardParams p =
      forward_params(call, s, x, norm, norm_eps, scale, relu, tf32_proj, tf32_attn, y, &saved);
  p.statistics_given = true;
  p.qkv_weight = plain.data();
  p.bn_eps = static_cast<float>(bn_eps);
  p.bn_weight = gamma.data();
  p.bn_bias = beta.data();
  p.bn_mean = mean.const_data_ptr();
  p.bn_var = variance.const_data_ptr();
  p.bn_statistics_float32 = true;
  attend(call, p);
  return {y,    x1,      saved.mean, saved.rstd, saved.row_max, saved.row_sum, moments.z_mean, moments.z_cov,
          mean, variance};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> shsa_train_backward(
    Tensor dy, Tensor y, Tensor x1, Tensor mean, Tensor rstd, Tensor row_max, Tensor row_sum, Tensor z_mean,
    Tensor z_cov, Tensor batch_mean, Tensor batch_var, std::optional<Tensor> norm_weight,
    std::optional<Tensor> norm_bias, Tensor weight, std::optional<Tensor> bn_weight,
    std::optional<Tensor> bn_bias, int64_t qk_dim, double, double bn_eps, double scale, bool relu,
    bool tf32_proj, bool tf32_attn, std::vector<bool> needs) {
  const Call call("shsa_train_backward", y);
  call.on_one_device(dy, x1, mean, rstd, row_max, row_sum, z_mean, z_cov, batch_mean, batch_var, norm_weight,
                     norm_bias, weight, bn_weight, bn_bias);
  check_gradient_of(y, dy);
  const Sizes s = checked_sizes(y, weight.size(1), qk_dim);
  const Norm norm(norm_weight, norm_bias, s.P, call.scalar());
  const Parameter plain("weight", weight, int64_t{s.O()} * s.P, call.scalar());
  const Parameter gamma("bn_weight", bn_weight, s.O(), call.scalar());
  const Parameter beta("bn_bias", bn_bias, s.O(), call.scalar());
  const NormGradients gradients(y, s.C, norm_weight, norm_bias, needs);
  const OwnGradient dweight(weight, needs[3], y), dbn_weight(bn_weight, needs[4], y),
      dbn_bias(bn_bias, needs[5], y);
  ShsaBackwardParams p = backward_params(call, s, dy, x1, y, {mean, rstd, row_max, row_sum}, norm, scale, relu,
                                         tf32_proj, tf32_attn);
  p.qkv_weight = plain.data();
  p.bn_eps = static_cast<float>(bn_eps);
  p.bn_weight = gamma.data();
  p.bn_bias = beta.data();
  p.bn_mean = const_floats(batch_mean);
  p.bn_var = const_floats(batch_var);
  p.dx = gradients.dx_data();
  // Through the batch statistics every gradient depends on the projection's.
  const bool fold = gradients.needed() || dweight.data() || dbn_weight.data() || dbn_bias.data();
  const Parts parts = attend_backward(call, p, gradients.needed(), fold, fold);
  Reductions reductions;
  if (fold) {
    const Tensor workspace = call.floats({2, s.O()});
    const Tensor dz_mean = call.floats({s.P}), dz_cov = call.floats({s.P, s.P});
    FoldBackwardParams f{};
    f.O = s.O();
    f.P = s.P;
    f.parts = parts.count;
    f.bn_eps = p.bn_eps;
    f.dweight_parts = p.dweight_parts;
    f.dbias_parts = p.dbias_parts;
    f.weight = plain.data();
    f.bn_weight = gamma.data();
    f.z_mean = const_floats(z_mean);
    f.z_cov = const_floats(z_cov);
    f.bn_mean = p.bn_mean;
    f.bn_var = p.bn_var;
    f.dweight = dweight.output();
    f.dbn_weight = dbn_weight.output();
    f.dbn_bias = dbn_bias.output();
    f.dz_mean = gradients.needed() ? floats(dz_mean) : nullptr;
    f.dz_cov = gradients.needed() ? floats(dz_cov) : nullptr;
    f.workspace = floats(workspace);
    call.check(fold_backward(f, call.type, call.stream));
    NormBackwardParams through_norm = norm_backward_params(s, x1, norm, mean, rstd);
    through_norm.dz = p.dz;
    through_norm.dz_mean = f.dz_mean;
    through_norm.dz_cov = f.dz_cov;
    through_norm.dz_cov_symmetric = true;
    through_norm.z_mean = f.z_mean;
    finish(call, through_norm, gradients, p.channels_last, reductions);
  }
  reductions.run(call);
  return {gradients.dx,     gradients.weight.result(), gradients.bias.result(),
          dweight.result(), dbn_weight.result(),       dbn_bias.result()};
}

void update_running_statistics(Tensor running_mean, Tensor running_var, Tensor num_batches_tracked, Tensor mean,
                               Tensor variance, int64_t count, std::optional<double> momentum) {
  const Call call("update_running_statistics", running_mean);
  call.on_one_device(running_var, num_batches_tracked, mean, variance);
  check_running_statistics("", running_mean, running_var, mean.numel());
  check_num_batches_tracked("", num_batches_tracked);
  check_batch_statistics(ScalarType::Float, mean, variance);
  RunningStatisticsParams p{};
  p.O = static_cast<int>(mean.numel());
  p.count = count;
  p.averages = !momentum.has_value();
  p.momentum = static_cast<float>(momentum.value_or(0));
  p.unbiased = static_cast<float>(bessel_correction(count));
  p.running_mean = running_mean.mutable_data_ptr();
  p.running_var = running_var.mutable_data_ptr();
  p.mean = const_floats(mean);
  p.variance = const_floats(variance);
  p.num_batches_tracked = static_cast<int64_t*>(num_batches_tracked.mutable_data_ptr());
  call.check(cuda::update_running_statistics(p, call.type, call.stream));
}

}  // namespace
}  // namespace operators

#define SHVIT_STRING_OF(name) #name
#define SHVIT_STRING(name) SHVIT_STRING_OF(name)
#define SHVIT_OPERATOR(name) m.impl(#name "_" SHVIT_STRING(SHVIT_FAMILY), TORCH_BOX(&operators::name))

STABLE_TORCH_LIBRARY_IMPL(shvit_kernels, SHVIT_DISPATCH_KEY, m) {
  SHVIT_OPERATOR(shsa_forward);
  SHVIT_OPERATOR(shsa_backward);
  SHVIT_OPERATOR(partial_moments_forward);
  SHVIT_OPERATOR(partial_moments_backward);
  SHVIT_OPERATOR(shsa_train_forward);
  SHVIT_OPERATOR(shsa_train_backward);
  SHVIT_OPERATOR(shsa_eval);
  SHVIT_OPERATOR(shsa_mixer);
  SHVIT_OPERATOR(update_running_statistics);
}
