// What the operators of every device share: image tensors, parameters and gradients as kernels want them.
//
// Only the stable ABI of LibTorch is used, so one build serves later releases of PyTorch.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <vector>

namespace shvit {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Whether the memory of an image tensor [B, C, H, W] is [B, H, W, C].
inline bool has_adjacent_channels(const Tensor& t) {
  const auto size = t.sizes(), stride = t.strides();
  int64_t expected = 1;
  for (const int d : {1, 3, 2, 0}) {
    if (size[d] != 1 && stride[d] != expected) return false;
    expected *= size[d];
  }
  return true;
}

// Whether an image tensor [B, C, H, W] is channels_last (and not also NCHW-contiguous).
inline bool is_channels_last(const Tensor& t) {
  if (t.is_contiguous()) return false;
  STD_TORCH_CHECK(has_adjacent_channels(t), "image tensors must be NCHW-contiguous or channels_last");
  return true;
}

// torch::stable::new_empty, which looks its operator up by name at each call, without that.
inline Tensor make_empty(const Tensor& like, torch::headeronly::IntHeaderOnlyArrayRef size, ScalarType type) {
  int32_t device_type, device_index, layout;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(like.get(), &device_index));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_layout(like.get(), &layout));
  int32_t dtype = torch::stable::detail::to<int32_t>(torch::stable::detail::from(type));
  AtenTensorHandle made;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_aten_new_empty(like.get(), size.data(),
                                                          static_cast<int64_t>(size.size()), &dtype, &layout,
                                                          &device_type, device_index, nullptr, &made));
  return Tensor(made);
}

inline Tensor empty_channels_last(const Tensor& like, int64_t B, int64_t C, int64_t H, int64_t W) {
  // Not a dense tensor seen as another: results that are views could not be modified in place.
  return torch::stable::empty({B, C, H, W}, like.scalar_type(), std::nullopt, like.device(), std::nullopt,
                              torch::headeronly::MemoryFormat::ChannelsLast);
}

inline Tensor empty_image(const Tensor& like, int64_t channels, bool channels_last) {
  const int64_t B = like.size(0), H = like.size(2), W = like.size(3);
  if (channels_last) return empty_channels_last(like, B, channels, H, W);
  return make_empty(like, {B, channels, H, W}, like.scalar_type());
}

// The gradient of `images`, with C channels; size [0] where not needed.
inline Tensor image_gradient(const Tensor& images, int64_t C, bool channels_last, bool needed) {
  return needed ? empty_image(images, C, channels_last) : make_empty(images, {0}, images.scalar_type());
}

inline void check_gradient_of(const Tensor& y, const Tensor& dy) {
  STD_TORCH_CHECK(dy.numel() == y.numel() && is_channels_last(dy) == is_channels_last(y),
                  "dy must have the shape and memory format of y");
}

// The sizes of a call on image tensors [B, C, H, W].
template <class Sizes>
Sizes sizes_of(const Tensor& images, int64_t P, int64_t D) {
  STD_TORCH_CHECK(images.dim() == 4, "image tensors must be [B, C, H, W], got ", images.dim(), " dimensions");
  STD_TORCH_CHECK(images.size(2) * images.size(3) > 0, "images must have at least one token");
  STD_TORCH_CHECK(P >= 1 && P <= images.size(1), "pdim must lie between 1 and ", images.size(1), ", got ", P);
  Sizes s;
  s.B = images.size(0);
  s.C = static_cast<decltype(s.C)>(images.size(1));
  s.P = static_cast<decltype(s.P)>(P);
  s.D = static_cast<decltype(s.D)>(D);
  s.N = static_cast<decltype(s.N)>(images.size(2) * images.size(3));
  return s;
}

// A parameter of `count` values in the type that kernels read; keeps a converted copy alive.
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

// The group normalisation's affine parameters, [P].
struct Norm {
  Norm(const std::optional<Tensor>& weight, const std::optional<Tensor>& bias, int64_t P, ScalarType type)
      : weight("norm_weight", weight, P, type), bias("norm_bias", bias, P, type) {}
  const Parameter weight, bias;
};

// The projection, [O, P] and [O].
struct Projection {
  Projection(const char* name, const Tensor& weight, const char* bias_name, const std::optional<Tensor>& bias,
             int64_t O, int64_t P, ScalarType type)
      : weight(name, weight, O * P, type), bias(bias_name, bias, O, type) {}
  const Parameter weight, bias;
};

// A batch normalisation with running statistics, [O] each; mean and var are null together.
struct RunningNorm {
  RunningNorm(const std::optional<Tensor>& weight, const std::optional<Tensor>& bias,
              const std::optional<Tensor>& mean, const std::optional<Tensor>& var, int64_t O, ScalarType type,
              ScalarType statistics_type)
      : weight("bn_weight", weight, O, type),
        bias("bn_bias", bias, O, type),
        mean("bn_mean", mean, O, statistics_type),
        var("bn_var", var, O, statistics_type) {
    STD_TORCH_CHECK(mean.has_value() == var.has_value(), "bn_mean and bn_var must be given together");
  }
  const Parameter weight, bias, mean, var;
};

// Statistics [channels] that kernels read or write in place.
inline void check_statistics(const char* prefix, const char* name, const Tensor& t, int64_t channels,
                             ScalarType type) {
  STD_TORCH_CHECK(t.numel() == channels, prefix, name, " must have ", channels, " values, got ", t.numel());
  STD_TORCH_CHECK(t.scalar_type() == type && t.is_contiguous(), prefix, name,
                  " must be contiguous and of the type that the kernel takes");
}

inline void check_num_batches_tracked(const char* prefix, const Tensor& num_batches_tracked) {
  check_statistics(prefix, "num_batches_tracked", num_batches_tracked, 1, ScalarType::Long);
}

// Both of one type, any that batch normalisation comes in.
inline void check_running_statistics(const char* prefix, const Tensor& running_mean, const Tensor& running_var,
                                     int64_t channels) {
  const ScalarType type = running_mean.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::Double || type == ScalarType::BFloat16 ||
                      type == ScalarType::Half,
                  prefix, "running_mean must be float16, bfloat16, float32 or float64");
  check_statistics(prefix, "running_mean", running_mean, channels, type);
  check_statistics(prefix, "running_var", running_var, channels, type);
}

// Mean and variance of a batch, as the update of running statistics reads them.
inline void check_batch_statistics(ScalarType type, const Tensor& mean, const Tensor& variance) {
  check_statistics("", "mean", mean, mean.numel(), type);
  check_statistics("", "variance", variance, mean.numel(), type);
}

// From the variance of `count` values to an estimate of that of all.
inline double bessel_correction(int64_t count) {
  return static_cast<double>(count) / static_cast<double>(count - 1);
}

// Mean and rstd of the images [B], maximum and sum of each row of the softmax [B, N].
struct Saved {
  Tensor mean, rstd, row_max, row_sum;
};

inline Saved empty_saved(const Tensor& x, int64_t B, int64_t N, ScalarType type) {
  return {make_empty(x, {B}, type), make_empty(x, {B}, type), make_empty(x, {B, N}, type),
          make_empty(x, {B, N}, type)};
}

// A gradient of the shape and type of a parameter: written by kernels in `type`, converted at the end.
class Gradient {
 public:
  Gradient(const std::optional<Tensor>& parameter, bool needed, const Tensor& like, ScalarType type)
      : type_(parameter.has_value() ? parameter->scalar_type() : like.scalar_type()) {
    const bool made = needed && parameter.has_value();
    tensor_ = made ? make_empty(*parameter, parameter->sizes(), type) : make_empty(like, {0}, type_);
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

struct NormGradient {
  NormGradient(const std::optional<Tensor>& norm_weight, const std::optional<Tensor>& norm_bias,
               const std::vector<bool>& needs, const Tensor& like, ScalarType type)
      : weight(norm_weight, needs[1], like, type), bias(norm_bias, needs[2], like, type) {}
  const Gradient weight, bias;
};

}  // namespace shvit
