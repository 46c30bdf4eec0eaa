// The operators of shvit_kernels/ops.py for CPU tensors, and the facts about this library that Python asks for.
//
// Only the stable ABI of LibTorch is used, so one build serves later releases of PyTorch.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <atomic>
#include <cstdlib>
#include <memory>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "kernels.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using namespace shvit;

// ---------------------------------------------------------------------------------------------------------------
// Choice of the instruction set

const std::vector<const Variant*>& supported_variants() {
  static const std::vector<const Variant*> variants = [] {
    std::vector<const Variant*> found = {&kBaselineWide, &kBaseline};
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
      found.insert(found.end(), {&kAvx2Wide, &kAvx2});
      if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
          __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq"))
        found.push_back(&kAvx512);
    }
#endif
    return found;
  }();
  return variants;
}

std::atomic<const Variant*>& current_variant() {
  static std::atomic<const Variant*> variant = supported_variants().back();
  return variant;
}

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

double fma_flops(int64_t repeats) { return current_variant().load()->fma_flops(repeats); }

// ---------------------------------------------------------------------------------------------------------------
// Running a kernel

struct Free {
  void operator()(char* p) const { std::free(p); }
};
using Buffer = std::unique_ptr<char, Free>;

Buffer allocate(int64_t bytes) {
  constexpr int64_t kAlign = 64;
  char* p = static_cast<char*>(std::aligned_alloc(kAlign, (bytes + kAlign) / kAlign * kAlign));
  STD_TORCH_CHECK(p != nullptr, "out of memory: ", bytes, " bytes of scratch");
  return Buffer(p);
}

// Memory of this thread, kept for the next call: fresh pages would cost as much as a small kernel.
class Arena {
 public:
  char* reserve(int64_t bytes) {
    if (size_ < bytes) {
      buffer_.reset();
      size_ = 0;
      buffer_ = allocate(bytes);
      size_ = bytes;
    }
    return buffer_.get();
  }

 private:
  Buffer buffer_;
  int64_t size_ = 0;
};

Arena& scratch_arena() {
  thread_local Arena arena;
  return arena;
}

Arena& workspace_arena() {
  thread_local Arena arena;
  return arena;
}

// Long images stage megabytes; that much is not kept.
constexpr int64_t kKeptWorkspace = 4 << 20;

// Below this many operations a second thread costs more than it brings.
constexpr int64_t kFlopsPerThread = 500000;

template <class Params>
void run(const Kernel<Params>& kernel, Params& params) {
  const Plan plan = kernel.plan(params);
  Buffer large_workspace;
  if (plan.workspace_bytes > kKeptWorkspace) {
    large_workspace = allocate(plan.workspace_bytes);
    params.workspace = large_workspace.get();
  } else {
    params.workspace = workspace_arena().reserve(plan.workspace_bytes);
  }
  for (int phase = 0; phase < plan.phases; ++phase) {
    const int64_t tasks = plan.tasks[phase];
    if (tasks == 0) continue;
    const int64_t flops_per_task = plan.flops / tasks + 1;
    const int64_t grain = 1 + (kFlopsPerThread - 1) / flops_per_task;
    torch::stable::parallel_for(0, tasks, grain, [&](int64_t begin, int64_t end) {
      char* memory = scratch_arena().reserve(plan.scratch_bytes);
      for (int64_t task = begin; task < end; ++task) kernel.run(params, phase, task, memory);
    });
  }
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

// ---------------------------------------------------------------------------------------------------------------
// Tensors

ScalarType compute_type(ScalarType storage) {
  return storage == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// Whether an image tensor [B, C, H, W] is channels_last (and not also NCHW-contiguous).
bool is_channels_last(const Tensor& t) {
  if (t.is_contiguous()) return false;
  const auto size = t.sizes(), stride = t.strides();
  int64_t expected = 1;
  for (const int d : {1, 3, 2, 0}) {
    STD_TORCH_CHECK(size[d] == 1 || stride[d] == expected,
                    "image tensors must be NCHW-contiguous or channels_last");
    expected *= size[d];
  }
  return true;
}

Tensor empty_image(const Tensor& like, int64_t channels, bool channels_last) {
  const int64_t B = like.size(0), H = like.size(2), W = like.size(3);
  if (!channels_last) return torch::stable::new_empty(like, {B, channels, H, W});
  // No memory_format argument in the stable ABI: a dense NHWC tensor, seen as NCHW.
  Tensor dense = torch::stable::new_empty(like, {B, H, W, channels});
  return torch::stable::transpose(torch::stable::transpose(dense, 2, 3), 1, 2);
}

// A parameter of `count` values in compute type; keeps a converted copy alive.
class Parameter {
 public:
  Parameter(const char* name, const std::optional<Tensor>& t, int64_t count, ScalarType type) {
    if (!t.has_value()) return;
    STD_TORCH_CHECK(t->numel() == count, name, " must have ", count, " values, got ", t->numel());
    tensor_ = t;
    if (t->scalar_type() != type) tensor_ = torch::stable::to(*tensor_, type);
    if (!tensor_->is_contiguous()) tensor_ = torch::stable::contiguous(*tensor_);
  }
  const void* data() const { return tensor_.has_value() ? tensor_->const_data_ptr() : nullptr; }

 private:
  std::optional<Tensor> tensor_;
};

// A gradient of the shape and type of a parameter: computed in compute type, converted at the end.
class Gradient {
 public:
  Gradient(const std::optional<Tensor>& parameter, bool needed, const Tensor& like, ScalarType type)
      : type_(parameter.has_value() ? parameter->scalar_type() : like.scalar_type()) {
    const bool made = needed && parameter.has_value();
    tensor_ = made ? torch::stable::new_empty(*parameter, parameter->sizes(), type)
                   : torch::stable::new_empty(like, {0}, type_);
    data_ = made ? tensor_.mutable_data_ptr() : nullptr;
  }
  void* data() const { return data_; }
  Tensor result() const {
    return data_ && tensor_.scalar_type() != type_ ? torch::stable::to(tensor_, type_) : tensor_;
  }

 private:
  ScalarType type_;
  Tensor tensor_;
  void* data_;
};

Sizes sizes_of(const Tensor& image, int64_t P, int64_t D) {
  STD_TORCH_CHECK(image.dim() == 4, "image tensors must be [B, C, H, W], got ", image.dim(), " dimensions");
  STD_TORCH_CHECK(image.size(2) * image.size(3) > 0, "images must have at least one token");
  STD_TORCH_CHECK(P >= 1 && P <= image.size(1), "pdim must lie between 1 and ", image.size(1), ", got ", P);
  return {image.size(0), image.size(1), P, D, image.size(2) * image.size(3)};
}

// ---------------------------------------------------------------------------------------------------------------
// Operators

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> shsa_forward(
    Tensor x, std::optional<Tensor> norm_weight, std::optional<Tensor> norm_bias, Tensor qkv_weight,
    std::optional<Tensor> qkv_bias, int64_t qk_dim, double norm_eps, double scale, bool relu, bool, bool) {
  const ScalarType type = compute_type(x.scalar_type());
  const Sizes s = sizes_of(x, qkv_weight.size(1), qk_dim);
  const bool channels_last = is_channels_last(x);
  Tensor y = empty_image(x, s.C, channels_last);
  Tensor mean = torch::stable::new_empty(x, {s.B}, type), rstd = torch::stable::new_empty(x, {s.B}, type);
  Tensor row_max = torch::stable::new_empty(x, {s.B, s.N}, type);
  Tensor row_sum = torch::stable::new_empty(x, {s.B, s.N}, type);
  const Parameter weight_n("norm_weight", norm_weight, s.P, type), bias_n("norm_bias", norm_bias, s.P, type);
  const Parameter weight("qkv_weight", qkv_weight, s.O() * s.P, type), bias("qkv_bias", qkv_bias, s.O(), type);
  ShsaForwardParams params{s,
                           channels_last,
                           relu,
                           norm_eps,
                           scale,
                           x.const_data_ptr(),
                           weight_n.data(),
                           bias_n.data(),
                           weight.data(),
                           bias.data(),
                           y.mutable_data_ptr(),
                           mean.mutable_data_ptr(),
                           rstd.mutable_data_ptr(),
                           row_max.mutable_data_ptr(),
                           row_sum.mutable_data_ptr(),
                           nullptr};
  run(kernels_for(x.scalar_type()).shsa_forward, params);
  return {y, mean, rstd, row_max, row_sum};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> shsa_backward(
    Tensor dy, Tensor x1, Tensor y, Tensor mean, Tensor rstd, Tensor row_max, Tensor row_sum,
    std::optional<Tensor> norm_weight, std::optional<Tensor> norm_bias, Tensor qkv_weight,
    std::optional<Tensor> qkv_bias, int64_t qk_dim, double, double scale, bool relu, bool, bool,
    std::vector<bool> needs) {
  const ScalarType type = compute_type(y.scalar_type());
  const bool channels_last = is_channels_last(y);
  STD_TORCH_CHECK(dy.numel() == y.numel() && is_channels_last(dy) == channels_last,
                  "dy must have the shape and memory format of y");
  const Sizes s = sizes_of(y, qkv_weight.size(1), qk_dim);
  Tensor dx = needs[0] ? empty_image(y, s.C, channels_last) : torch::stable::new_empty(y, {0});
  const Gradient dnorm_weight(norm_weight, needs[1], y, type), dnorm_bias(norm_bias, needs[2], y, type),
      dweight(qkv_weight, needs[3], y, type), dbias(qkv_bias, needs[4], y, type);
  const Parameter weight_n("norm_weight", norm_weight, s.P, type), bias_n("norm_bias", norm_bias, s.P, type);
  const Parameter weight("qkv_weight", qkv_weight, s.O() * s.P, type), bias("qkv_bias", qkv_bias, s.O(), type);
  ShsaBackwardParams params{s,
                            channels_last,
                            is_channels_last(x1),
                            relu,
                            scale,
                            dy.const_data_ptr(),
                            x1.const_data_ptr(),
                            y.const_data_ptr(),
                            mean.const_data_ptr(),
                            rstd.const_data_ptr(),
                            row_max.const_data_ptr(),
                            row_sum.const_data_ptr(),
                            weight_n.data(),
                            bias_n.data(),
                            weight.data(),
                            bias.data(),
                            needs[0] ? dx.mutable_data_ptr() : nullptr,
                            dnorm_weight.data(),
                            dnorm_bias.data(),
                            dweight.data(),
                            dbias.data(),
                            nullptr};
  run(kernels_for(y.scalar_type()).shsa_backward, params);
  return {dx, dnorm_weight.result(), dnorm_bias.result(), dweight.result(), dbias.result()};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> partial_moments_forward(Tensor x, std::optional<Tensor> norm_weight,
                                                                   std::optional<Tensor> norm_bias,
                                                                   int64_t pdim, double norm_eps) {
  const ScalarType type = compute_type(x.scalar_type());
  const Sizes s = sizes_of(x, pdim, 0);
  Tensor mean = torch::stable::new_empty(x, {pdim}, type),
         cov = torch::stable::new_empty(x, {pdim, pdim}, type);
  Tensor image_mean = torch::stable::new_empty(x, {s.B}, type);
  Tensor image_rstd = torch::stable::new_empty(x, {s.B}, type);
  const Parameter weight("norm_weight", norm_weight, s.P, type), bias("norm_bias", norm_bias, s.P, type);
  MomentsForwardParams params{s,
                              is_channels_last(x),
                              norm_eps,
                              x.const_data_ptr(),
                              weight.data(),
                              bias.data(),
                              mean.mutable_data_ptr(),
                              cov.mutable_data_ptr(),
                              image_mean.mutable_data_ptr(),
                              image_rstd.mutable_data_ptr(),
                              nullptr,
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
  const bool channels_last = is_channels_last(x1);
  Sizes s = sizes_of(x1, x1.size(1), 0);
  s.C = channels;
  Tensor dx = needs[0] ? empty_image(x1, channels, channels_last) : torch::stable::new_empty(x1, {0});
  const Gradient dweight(norm_weight, needs[1], x1, type), dbias(norm_bias, needs[2], x1, type);
  const Parameter weight("norm_weight", norm_weight, s.P, type), bias("norm_bias", norm_bias, s.P, type);
  MomentsBackwardParams params{s,
                               channels_last,
                               false,
                               dmean.const_data_ptr(),
                               dcov.const_data_ptr(),
                               x1.const_data_ptr(),
                               mean.const_data_ptr(),
                               image_mean.const_data_ptr(),
                               image_rstd.const_data_ptr(),
                               weight.data(),
                               bias.data(),
                               needs[0] ? dx.mutable_data_ptr() : nullptr,
                               dweight.data(),
                               dbias.data(),
                               nullptr};
  run(kernels_for(x1.scalar_type()).moments_backward, params);
  return {dx, dweight.result(), dbias.result()};
}

Tensor shsa_eval(Tensor x, std::optional<Tensor> norm_weight, std::optional<Tensor> norm_bias, Tensor weight,
                 std::optional<Tensor> bias, std::optional<Tensor> bn_weight, std::optional<Tensor> bn_bias,
                 std::optional<Tensor> bn_mean, std::optional<Tensor> bn_var, int64_t qk_dim, double norm_eps,
                 double bn_eps, double scale, bool relu, bool, bool) {
  const ScalarType type = compute_type(x.scalar_type());
  const Sizes s = sizes_of(x, weight.size(1), qk_dim);
  const bool channels_last = is_channels_last(x);
  Tensor y = empty_image(x, s.C, channels_last);
  const Parameter weight_n("norm_weight", norm_weight, s.P, type), bias_n("norm_bias", norm_bias, s.P, type);
  const Parameter w("weight", weight, s.O() * s.P, type), b("bias", bias, s.O(), type);
  const Parameter gamma("bn_weight", bn_weight, s.O(), type), beta("bn_bias", bn_bias, s.O(), type);
  const Parameter mean("bn_mean", bn_mean, s.O(), type), var("bn_var", bn_var, s.O(), type);
  STD_TORCH_CHECK(bn_mean.has_value() == bn_var.has_value(), "bn_mean and bn_var must be given together");
  const Kernels& kernels = kernels_for(x.scalar_type());
  const void *qkv_weight = w.data(), *qkv_bias = b.data();
  Buffer folded;
  if (mean.data()) {
    const int64_t value = type == ScalarType::Double ? sizeof(double) : sizeof(float);
    folded = allocate((s.O() * s.P + s.O()) * value);
    FoldForwardParams fold{s.O(),
                           s.P,
                           bn_eps,
                           qkv_weight,
                           qkv_bias,
                           gamma.data(),
                           beta.data(),
                           nullptr,
                           nullptr,
                           const_cast<void*>(mean.data()),
                           const_cast<void*>(var.data()),
                           folded.get(),
                           folded.get() + s.O() * s.P * value,
                           nullptr};
    qkv_weight = fold.qkv_weight;
    qkv_bias = fold.qkv_bias;
    run(kernels.fold_forward, fold);
  }
  ShsaForwardParams shsa{s,
                         channels_last,
                         relu,
                         norm_eps,
                         scale,
                         x.const_data_ptr(),
                         weight_n.data(),
                         bias_n.data(),
                         qkv_weight,
                         qkv_bias,
                         y.mutable_data_ptr(),
                         nullptr,
                         nullptr,
                         nullptr,
                         nullptr,
                         nullptr};
  run(kernels.shsa_forward, shsa);
  return y;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> shsa_train_forward(
    Tensor x, std::optional<Tensor> norm_weight, std::optional<Tensor> norm_bias, Tensor weight,
    std::optional<Tensor> bn_weight, std::optional<Tensor> bn_bias, int64_t qk_dim, double norm_eps,
    double bn_eps, double scale, bool relu, bool, bool) {
  const ScalarType type = compute_type(x.scalar_type());
  const Sizes s = sizes_of(x, weight.size(1), qk_dim);
  const bool channels_last = is_channels_last(x);
  const auto fresh = [&](torch::headeronly::IntHeaderOnlyArrayRef size) {
    return torch::stable::new_empty(x, size, type);
  };
  Tensor y = empty_image(x, s.C, channels_last), x1 = empty_image(x, s.P, channels_last);
  Tensor mean = fresh({s.B}), rstd = fresh({s.B}), row_max = fresh({s.B, s.N}), row_sum = fresh({s.B, s.N});
  Tensor z_mean = fresh({s.P}), z_cov = fresh({s.P, s.P}), batch_mean = fresh({s.O()}),
         batch_var = fresh({s.O()});
  Tensor qkv_weight = fresh({s.O(), s.P}), qkv_bias = fresh({s.O()});
  const Parameter weight_n("norm_weight", norm_weight, s.P, type), bias_n("norm_bias", norm_bias, s.P, type);
  const Parameter w("weight", weight, s.O() * s.P, type), gamma("bn_weight", bn_weight, s.O(), type),
      beta("bn_bias", bn_bias, s.O(), type);
  const Kernels& kernels = kernels_for(x.scalar_type());

  MomentsForwardParams moments{s,
                               channels_last,
                               norm_eps,
                               x.const_data_ptr(),
                               weight_n.data(),
                               bias_n.data(),
                               z_mean.mutable_data_ptr(),
                               z_cov.mutable_data_ptr(),
                               mean.mutable_data_ptr(),
                               rstd.mutable_data_ptr(),
                               x1.mutable_data_ptr(),
                               nullptr};
  run(kernels.moments_forward, moments);
  FoldForwardParams fold{s.O(),
                         s.P,
                         bn_eps,
                         w.data(),
                         nullptr,
                         gamma.data(),
                         beta.data(),
                         z_mean.const_data_ptr(),
                         z_cov.const_data_ptr(),
                         batch_mean.mutable_data_ptr(),
                         batch_var.mutable_data_ptr(),
                         qkv_weight.mutable_data_ptr(),
                         qkv_bias.mutable_data_ptr(),
                         nullptr};
  run(kernels.fold_forward, fold);
  ShsaForwardParams shsa{s,
                         channels_last,
                         relu,
                         norm_eps,
                         scale,
                         x.const_data_ptr(),
                         weight_n.data(),
                         bias_n.data(),
                         qkv_weight.const_data_ptr(),
                         qkv_bias.const_data_ptr(),
                         y.mutable_data_ptr(),
                         mean.mutable_data_ptr(),
                         rstd.mutable_data_ptr(),
                         row_max.mutable_data_ptr(),
                         row_sum.mutable_data_ptr(),
                         nullptr};
  run(kernels.shsa_forward, shsa);
  return {y, x1, mean, rstd, row_max, row_sum, z_mean, z_cov, batch_mean, batch_var};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> shsa_train_backward(
    Tensor dy, Tensor y, Tensor x1, Tensor mean, Tensor rstd, Tensor row_max, Tensor row_sum, Tensor z_mean,
    Tensor z_cov, Tensor batch_mean, Tensor batch_var, std::optional<Tensor> norm_weight,
    std::optional<Tensor> norm_bias, Tensor weight, std::optional<Tensor> bn_weight,
    std::optional<Tensor> bn_bias, int64_t qk_dim, double, double bn_eps, double scale, bool relu, bool, bool,
    std::vector<bool> needs) {
  const ScalarType type = compute_type(y.scalar_type());
  const bool channels_last = is_channels_last(y);
  STD_TORCH_CHECK(dy.numel() == y.numel() && is_channels_last(dy) == channels_last,
                  "dy must have the shape and memory format of y");
  const Sizes s = sizes_of(y, weight.size(1), qk_dim);
  const auto fresh = [&](torch::headeronly::IntHeaderOnlyArrayRef size) {
    return torch::stable::new_empty(y, size, type);
  };
  Tensor dx = needs[0] ? empty_image(y, s.C, channels_last) : torch::stable::new_empty(y, {0});
  const Gradient dnorm_weight(norm_weight, needs[1], y, type), dnorm_bias(norm_bias, needs[2], y, type),
      dweight(weight, needs[3], y, type), dbn_weight(bn_weight, needs[4], y, type),
      dbn_bias(bn_bias, needs[5], y, type);
  const Parameter weight_n("norm_weight", norm_weight, s.P, type), bias_n("norm_bias", norm_bias, s.P, type);
  const Parameter w("weight", weight, s.O() * s.P, type), gamma("bn_weight", bn_weight, s.O(), type),
      beta("bn_bias", bn_bias, s.O(), type);
  Tensor qkv_weight = fresh({s.O(), s.P}), qkv_bias = fresh({s.O()});
  Tensor dqkv_weight = fresh({s.O(), s.P}), dqkv_bias = fresh({s.O()});
  Tensor dz_mean = fresh({s.P}), dz_cov = fresh({s.P, s.P});
  const Kernels& kernels = kernels_for(y.scalar_type());

  FoldForwardParams fold{s.O(),
                         s.P,
                         bn_eps,
                         w.data(),
                         nullptr,
                         gamma.data(),
                         beta.data(),
                         nullptr,
                         nullptr,
                         batch_mean.mutable_data_ptr(),
                         batch_var.mutable_data_ptr(),
                         qkv_weight.mutable_data_ptr(),
                         qkv_bias.mutable_data_ptr(),
                         nullptr};
  run(kernels.fold_forward, fold);
  void* dx_data = needs[0] ? dx.mutable_data_ptr() : nullptr;
  ShsaBackwardParams shsa{s,
                          channels_last,
                          is_channels_last(x1),
                          relu,
                          scale,
                          dy.const_data_ptr(),
                          x1.const_data_ptr(),
                          y.const_data_ptr(),
                          mean.const_data_ptr(),
                          rstd.const_data_ptr(),
                          row_max.const_data_ptr(),
                          row_sum.const_data_ptr(),
                          weight_n.data(),
                          bias_n.data(),
                          qkv_weight.const_data_ptr(),
                          qkv_bias.const_data_ptr(),
                          dx_data,
                          dnorm_weight.data(),
                          dnorm_bias.data(),
                          dqkv_weight.mutable_data_ptr(),
                          dqkv_bias.mutable_data_ptr(),
                          nullptr};
  run(kernels.shsa_backward, shsa);
  FoldBackwardParams fold_backward{s.O(),
                                   s.P,
                                   bn_eps,
                                   dqkv_weight.const_data_ptr(),
                                   dqkv_bias.const_data_ptr(),
                                   w.data(),
                                   gamma.data(),
                                   z_mean.const_data_ptr(),
                                   z_cov.const_data_ptr(),
                                   batch_mean.const_data_ptr(),
                                   batch_var.const_data_ptr(),
                                   dweight.data(),
                                   dbn_weight.data(),
                                   dbn_bias.data(),
                                   dz_mean.mutable_data_ptr(),
                                   dz_cov.mutable_data_ptr(),
                                   nullptr};
  run(kernels.fold_backward, fold_backward);
  MomentsBackwardParams moments{s,
                                channels_last,
                                true,
                                dz_mean.const_data_ptr(),
                                dz_cov.const_data_ptr(),
                                x1.const_data_ptr(),
                                z_mean.const_data_ptr(),
                                mean.const_data_ptr(),
                                rstd.const_data_ptr(),
                                weight_n.data(),
                                bias_n.data(),
                                dx_data,
                                dnorm_weight.data(),
                                dnorm_bias.data(),
                                nullptr};
  if (needs[0] || needs[1] || needs[2]) run(kernels.moments_backward, moments);
  return {
      dx, dnorm_weight.result(), dnorm_bias.result(), dweight.result(), dbn_weight.result(), dbn_bias.result()};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(shvit_kernels, CPU, m) {
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
  m.def("fma_flops(int repeats) -> float");
  m.def("cuda_architectures() -> str");
}

STABLE_TORCH_LIBRARY_IMPL(shvit_kernels_native, CompositeExplicitAutograd, m) {
  m.impl("instruction_set", TORCH_BOX(&instruction_set));
  m.impl("instruction_sets", TORCH_BOX(&instruction_sets));
  m.impl("set_instruction_set", TORCH_BOX(&set_instruction_set));
  m.impl("fma_flops", TORCH_BOX(&fma_flops));
  m.impl("cuda_architectures", TORCH_BOX(&cuda_architectures));
}
