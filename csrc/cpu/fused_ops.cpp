// The operators of fused models (shvit_kernels/ops.py) for CPU tensors: float32, channels side by side, packed
// weights.

#include "../tensors.h"
#include "run.h"

namespace {

using namespace shvit;

const FusedKernels& kernels() { return current_variant().load()->fused; }

constexpr int64_t kPanel = 16;

const float* floats(const Tensor& t) { return static_cast<const float*>(t.const_data_ptr()); }

void check_float(const char* name, const Tensor& t) {
  STD_TORCH_CHECK(t.scalar_type() == ScalarType::Float, name, " must be float32");
}

// Images [B, C, H, W] whose memory is [B, H, W, C].
struct Images {
  int64_t B, C, H, W;

  explicit Images(const Tensor& x, bool any_order = false) {
    check_float("x", x);
    STD_TORCH_CHECK(x.dim() == 4, "x must be [B, C, H, W], got ", x.dim(), " dimensions");
    B = x.size(0), C = x.size(1), H = x.size(2), W = x.size(3);
    STD_TORCH_CHECK(C * H * W > 0, "x must have a channel and a pixel");
    if (any_order && x.is_contiguous()) return;
    int64_t expected = 1;
    for (const int d : {1, 3, 2, 0}) {
      STD_TORCH_CHECK(x.size(d) == 1 || x.stride(d) == expected, "x must be channels_last");
      expected *= x.size(d);
    }
  }
};

// Packed weights [ceil(outputs / 16), inputs, 16] and their bias [outputs].
struct Packed {
  const float *weight, *bias;
  int64_t outputs;

  Packed(const Tensor& w, const Tensor& b, int64_t inputs)
      : weight(floats(w)), bias(floats(b)), outputs(b.numel()) {
    check_float("weight", w);
    check_float("bias", b);
    STD_TORCH_CHECK(w.is_contiguous() && b.is_contiguous(), "weight and bias must be contiguous");
    STD_TORCH_CHECK(w.dim() == 3 && w.size(0) == (outputs + kPanel - 1) / kPanel && w.size(1) == inputs &&
                        w.size(2) == kPanel && outputs > 0,
                    "weight must be packed from [", outputs, ", ", inputs, "]");
  }
};

Tensor empty_rows(const Tensor& like, int64_t B, int64_t H, int64_t W, int64_t C) {
  const Tensor dense = torch::stable::new_empty(like, {B, H, W, C});
  return torch::stable::transpose(torch::stable::transpose(dense, 2, 3), 1, 2);
}

float* result(const Tensor& y) { return static_cast<float*>(y.mutable_data_ptr()); }

Tensor conv3x3(Tensor x, Tensor weight, Tensor bias, bool relu) {
  const Images s(x, true);
  const Packed packed(weight, bias, 9 * s.C);
  Tensor y = empty_rows(x, s.B, (s.H + 1) / 2, (s.W + 1) / 2, packed.outputs);
  Conv3x3Params params{s.B,  s.C,       s.H,           s.W,         packed.outputs, !x.is_contiguous(),
                       relu, floats(x), packed.weight, packed.bias, result(y),      nullptr};
  run(kernels().conv3x3, params);
  return y;
}

Tensor depthwise(Tensor x, Tensor weight, Tensor bias, int64_t stride, bool relu) {
  const Images s(x);
  check_float("weight", weight);
  check_float("bias", bias);
  STD_TORCH_CHECK(stride == 1 || stride == 2, "stride must be 1 or 2, got ", stride);
  STD_TORCH_CHECK(
      weight.is_contiguous() && bias.is_contiguous() && weight.numel() == 9 * s.C && bias.numel() == s.C,
      "weight must be [9, ", s.C, "] and bias [", s.C, "], contiguous");
  const int64_t H = (s.H + stride - 1) / stride, W = (s.W + stride - 1) / stride;
  Tensor y = empty_rows(x, s.B, H, W, s.C);
  DepthwiseParams params{s.B,          s.C,       s.H,    s.W, stride, relu, floats(x), floats(weight),
                         floats(bias), result(y), nullptr};
  run(kernels().depthwise, params);
  return y;
}

Tensor pointwise(Tensor x, std::optional<Tensor> scale, Tensor weight, Tensor bias, bool relu) {
  const Images s(x);
  const Packed packed(weight, bias, s.C);
  if (scale.has_value()) {
    check_float("scale", *scale);
    STD_TORCH_CHECK(scale->is_contiguous() && scale->numel() == s.B * s.C, "scale must have ", s.B * s.C,
                    " contiguous values, got ", scale->numel());
  }
  Tensor y = empty_rows(x, s.B, s.H, s.W, packed.outputs);
  PointwiseParams params{s.B,
                         s.H * s.W,
                         s.C,
                         packed.outputs,
                         relu,
                         floats(x),
                         scale.has_value() ? floats(*scale) : nullptr,
                         packed.weight,
                         packed.bias,
                         result(y),
                         nullptr};
  run(kernels().pointwise, params);
  return y;
}

Tensor ffn(Tensor x, Tensor weight1, Tensor bias1, Tensor weight2, Tensor bias2) {
  const Images s(x);
  const Packed first(weight1, bias1, s.C), second(weight2, bias2, first.outputs);
  STD_TORCH_CHECK(second.outputs == s.C, "weight2 must have ", s.C, " outputs, got ", second.outputs);
  Tensor y = empty_rows(x, s.B, s.H, s.W, s.C);
  FfnParams params{s.B * s.H * s.W, s.C,           first.outputs, floats(x), first.weight,
                   first.bias,      second.weight, second.bias,   result(y), nullptr};
  run(kernels().ffn, params);
  return y;
}

Tensor mixer(Tensor x, std::optional<Tensor> norm_weight, std::optional<Tensor> norm_bias, Tensor qkv_weight,
             std::optional<Tensor> qkv_bias, Tensor weight, Tensor bias, int64_t qk_dim, double norm_eps,
             double scale) {
  const Images images(x);
  const auto s = sizes_of<Sizes>(x, qkv_weight.size(1), qk_dim);
  const Norm norm(norm_weight, norm_bias, s.P, ScalarType::Float);
  const Projection qkv("qkv_weight", qkv_weight, "qkv_bias", qkv_bias, s.O(), s.P, ScalarType::Float);
  const Packed packed(weight, bias, s.C);
  STD_TORCH_CHECK(packed.outputs == s.C, "weight must have ", s.C, " outputs, got ", packed.outputs);
  Tensor y = empty_rows(x, images.B, images.H, images.W, s.C);
  ShsaForwardParams attention{};
  attention.sizes = s;
  attention.channels_last = attention.relu = true;
  attention.norm_eps = norm_eps;
  attention.scale = scale;
  attention.x = floats(x);
  attention.norm_weight = norm.weight.data();
  attention.norm_bias = norm.bias.data();
  attention.qkv_weight = qkv.weight.data();
  attention.qkv_bias = qkv.bias.data();
  MixerParams params{attention, packed.weight, packed.bias, result(y), nullptr};
  run(kernels().mixer, params);
  return y;
}

Tensor pool(Tensor x) {
  const Images s(x);
  Tensor y = torch::stable::new_empty(x, {s.B, s.C});
  PoolParams params{s.B, s.H * s.W, s.C, floats(x), result(y), nullptr};
  run(kernels().pool, params);
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(shvit_kernels, CPU, m) {
  m.impl("fused_conv3x3", TORCH_BOX(&conv3x3));
  m.impl("fused_depthwise", TORCH_BOX(&depthwise));
  m.impl("fused_pointwise", TORCH_BOX(&pointwise));
  m.impl("fused_ffn", TORCH_BOX(&ffn));
  m.impl("fused_mixer", TORCH_BOX(&mixer));
  m.impl("fused_pool", TORCH_BOX(&pool));
}
