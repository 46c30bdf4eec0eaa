// The operators of fused models (shvit_kernels/ops.py) for CPU tensors: float32, packed weights.
//
// A step is one layer from memory to memory, of images whose channels stand side by side. It says what image it
// makes; with a null result it does no more, so that memory can be found first.

#include <algorithm>
#include <optional>
#include <vector>

#include "../tensors.h"
#include "run.h"

namespace {

using namespace shvit;

const FusedKernels& kernels() { return current_variant().load()->fused; }

// Images [B, C, H, W] whose memory is [B, H, W, C].
struct Shape {
  int64_t B, C, H, W;
  int64_t floats() const { return B * C * H * W; }
};

struct Image {
  Shape shape;
  const float* data;
  bool channels_last = true;
};

const float* floats(const Tensor& t) { return static_cast<const float*>(t.const_data_ptr()); }

// A contiguous float32 parameter.
const float* parameter(const char* name, const Tensor& t, int64_t count) {
  STD_TORCH_CHECK(t.scalar_type() == ScalarType::Float, name, " must be float32");
  STD_TORCH_CHECK(t.is_contiguous() && t.numel() == count, name, " must have ", count,
                  " contiguous values, got ", t.numel());
  return floats(t);
}

// Packed weights [ceil(outputs / 16), inputs, 16] and their bias [outputs].
struct Packed {
  int64_t outputs;
  const float *weight, *bias;
};

int64_t panels(int64_t n) { return (n + kPanel - 1) / kPanel; }

Packed packed(const Tensor& w, const Tensor& b, int64_t inputs) {
  const int64_t outputs = b.numel();
  STD_TORCH_CHECK(
      w.dim() == 3 && w.size(0) == panels(outputs) && w.size(1) == inputs && w.size(2) == kPanel && outputs > 0,
      "weight must be packed from [", outputs, ", ", inputs, "]");
  return {outputs, parameter("weight", w, w.numel()), parameter("bias", b, outputs)};
}

struct DepthwiseWeights {
  const float *taps, *bias;  // [9, C], [C]
};

struct FfnWeights {
  Packed first, second;
};

// Those of the norm and qkv_bias may be null.
struct MixerWeights {
  int64_t pdim;
  const float *norm_weight, *norm_bias, *qkv_weight, *qkv_bias;
  Packed projection;
};

struct PatchMergingWeights {
  Packed conv1;
  DepthwiseWeights conv2;
  Packed fc1, fc2, conv3;
};

// The weights of a sequence in the order of its layers: in each tensor one behind the other, from multiples of
// kPanel values on, so that what a layer reads lies behind what the layer before has read.
class Weights {
 public:
  explicit Weights(const std::vector<Tensor>& tensors) : tensors_(&tensors) {
    for (const Tensor& t : tensors) parameter("weights", t, t.numel());
  }

  // Far beyond any layer, and far from overflow.
  static void check_width(int64_t n) {
    STD_TORCH_CHECK(n >= 1 && n <= 1 << 24, "the widths of a layer must lie between 1 and 2^24, got ", n);
  }
  const float* take(int64_t count) {
    skip_read();
    const int64_t taken = panels(count) * kPanel;
    STD_TORCH_CHECK(tensor_ < tensors_->size() && taken <= current().numel() - at_,
                    "the layers take more weights than the ", tensors_->size(), " tensors have");
    at_ += taken;
    return floats(current()) + at_ - taken;
  }
  Packed packed(int64_t inputs, int64_t outputs) {
    check_width(outputs);
    const float* weight = take(panels(outputs) * inputs * kPanel);
    return {outputs, weight, take(outputs)};
  }
  DepthwiseWeights depthwise(int64_t channels) {
    const float* taps = take(9 * channels);
    return {taps, take(channels)};
  }
  FfnWeights ffn(int64_t channels, int64_t hidden) {
    const Packed first = packed(channels, hidden);
    return {first, packed(hidden, channels)};
  }
  MixerWeights mixer(int64_t channels, int64_t qk_dim, int64_t pdim) {
    check_width(qk_dim);
    check_width(pdim);
    const int64_t O = 2 * qk_dim + pdim;
    MixerWeights w{pdim, take(pdim), take(pdim), take(O * pdim), take(O), {}};
    w.projection = packed(channels, channels);
    return w;
  }
  PatchMergingWeights patch_merging(int64_t channels, int64_t hidden, int64_t squeezed, int64_t outputs) {
    PatchMergingWeights w;
    w.conv1 = packed(channels, hidden);
    w.conv2 = depthwise(hidden);
    w.fc1 = packed(hidden, squeezed);
    w.fc2 = packed(squeezed, hidden);
    w.conv3 = packed(hidden, outputs);
    return w;
  }

  void check_all_taken() {
    skip_read();
    STD_TORCH_CHECK(tensor_ == tensors_->size(), "the layers take fewer weights than the ", tensors_->size(),
                    " tensors have");
  }

 private:
  const Tensor& current() const { return (*tensors_)[tensor_]; }
  void skip_read() {
    while (tensor_ < tensors_->size() && at_ >= current().numel()) {
      ++tensor_;
      at_ = 0;
    }
  }

  const std::vector<Tensor>* tensors_;
  size_t tensor_ = 0;
  int64_t at_ = 0;
};

// Memory between the steps of a sequence: pieces of one buffer, only counted where there is none.
class Buffers {
 public:
  explicit Buffers(char* base) : base_(base) {}
  float* take(int64_t count) {
    char* piece = base_ ? base_ + used_ : nullptr;
    used_ += (count * static_cast<int64_t>(sizeof(float)) + 63) / 64 * 64;
    most_ = used_ > most_ ? used_ : most_;
    return reinterpret_cast<float*>(piece);
  }
  int64_t used() const { return used_; }
  void give_back_to(int64_t used) { used_ = used; }
  int64_t most() const { return most_; }

 private:
  char* base_;
  int64_t used_ = 0, most_ = 0;
};

// ---------------------------------------------------------------------------------------------------------------
// Steps

Conv3x3Params conv3x3_params(const Image& x, const Packed& w, bool relu, float* y) {
  const Shape& s = x.shape;
  return {s.B,
          s.C,
          s.H,
          s.W,
          w.outputs,
          x.channels_last,
          relu,
          x.data,
          w.weight,
          w.bias,
          y,
          nullptr,
          torch::stable::get_num_threads(),
          nullptr};
}

Shape shape_of(const Conv3x3Params& p) { return {p.images, p.outputs, (p.height + 1) / 2, (p.width + 1) / 2}; }

Shape conv3x3_step(const Image& x, const Packed& w, bool relu, float* y) {
  Conv3x3Params params = conv3x3_params(x, w, relu, y);
  if (y) run(kernels().conv3x3, params);
  return shape_of(params);
}

// Two of them, the first of which makes its rows as the second needs them.
Shape conv3x3_pair_step(const Image& x, const Packed& w1, bool relu1, const Packed& w2, bool relu2, float* y) {
  const Conv3x3Params first = conv3x3_params(x, w1, relu1, nullptr);
  Conv3x3Params second = conv3x3_params({shape_of(first), nullptr}, w2, relu2, y);
  second.source = &first;
  if (y) run(kernels().conv3x3, second);
  return shape_of(second);
}

PointwiseParams pointwise_params(const Image& x, const float* scale, const Packed& w, Activation activation,
                                 float* y) {
  const Shape& s = x.shape;
  return {s.B, s.H * s.W, s.C, w.outputs, activation, x.data, scale, w.weight, w.bias, y, nullptr};
}

Shape pointwise_step(const Image& x, const float* scale, const Packed& w, Activation activation, float* y) {
  PointwiseParams params = pointwise_params(x, scale, w, activation, y);
  if (y) run(kernels().pointwise, params);
  return {x.shape.B, params.outputs, x.shape.H, x.shape.W};
}

// `source` makes x, or is null.
Shape depthwise_step(const Image& x, const PointwiseParams* source, const DepthwiseWeights& w, int64_t stride,
                     bool relu, float* y) {
  const Shape& s = x.shape;
  STD_TORCH_CHECK(stride == 1 || stride == 2, "stride must be 1 or 2, got ", stride);
  if (y) {
    DepthwiseParams params{s.B, s.C, s.H, s.W, stride, relu, x.data, w.taps, w.bias, y, source, nullptr};
    run(kernels().depthwise, params);
  }
  return {s.B, s.C, (s.H + stride - 1) / stride, (s.W + stride - 1) / stride};
}

Shape ffn_step(const Image& x, const FfnWeights& w, float* y) {
  const Shape& s = x.shape;
  if (y) {
    FfnParams params{
        s.B * s.H * s.W, s.C, w.first.outputs, x.data, w.first.weight, w.first.bias, w.second.weight,
        w.second.bias,   y,   nullptr};
    run(kernels().ffn, params);
  }
  return s;
}

Shape mixer_step(const Image& x, const MixerWeights& w, int64_t qk_dim, double norm_eps, double scale,
                 float* y) {
  const Shape& s = x.shape;
  STD_TORCH_CHECK(w.pdim >= 1 && w.pdim <= s.C, "pdim must lie between 1 and ", s.C, ", got ", w.pdim);
  ShsaForwardParams attention{};
  attention.sizes = {s.B, s.C, w.pdim, qk_dim, s.H * s.W};
  attention.channels_last = attention.relu = true;
  attention.norm_eps = norm_eps;
  attention.scale = scale;
  attention.x = x.data;
  attention.norm_weight = w.norm_weight;
  attention.norm_bias = w.norm_bias;
  attention.qkv_weight = w.qkv_weight;
  attention.qkv_bias = w.qkv_bias;
  if (y) {
    MixerParams params{attention, w.projection.weight, w.projection.bias, y, nullptr};
    run(kernels().mixer, params);
  }
  return s;
}

Shape pool_step(const Image& x, float* y) {
  const Shape& s = x.shape;
  if (y) {
    PoolParams params{s.B, s.H * s.W, s.C, x.data, y, nullptr};
    run(kernels().pool, params);
  }
  return {s.B, s.C, 1, 1};
}

Shape patch_merging_step(const Image& x, const PatchMergingWeights& w, Buffers& buffers, float* y) {
  const int64_t before = buffers.used();
  // Of one image, what is expanded stays in cache as a whole; of more, a band at a time does.
  const bool bands = x.shape.B > 1;
  PointwiseParams expand = pointwise_params(x, nullptr, w.conv1, Activation::kRelu, nullptr);
  Image wide{{x.shape.B, expand.outputs, x.shape.H, x.shape.W}, nullptr};
  if (!bands) wide.data = expand.y = buffers.take(wide.shape.floats());
  const Shape small = depthwise_step(wide, nullptr, w.conv2, 2, true, nullptr);
  float *reduced = buffers.take(small.floats()), *means = buffers.take(small.B * small.C),
        *gate = buffers.take(small.B * small.C);
  const Image merged{small, reduced}, pooled{{small.B, small.C, 1, 1}, means};
  const Shape squeezed = pointwise_step(pooled, nullptr, w.fc1, Activation::kRelu, nullptr);
  float* narrow = buffers.take(squeezed.floats());
  const Image bottleneck{squeezed, narrow};
  if (y) {
    if (!bands) run(kernels().pointwise, expand);
    depthwise_step(wide, bands ? &expand : nullptr, w.conv2, 2, true, reduced);
    pool_step(merged, means);
    pointwise_step(pooled, nullptr, w.fc1, Activation::kRelu, narrow);
    pointwise_step(bottleneck, nullptr, w.fc2, Activation::kSigmoid, gate);
  }
  const Shape out = pointwise_step(merged, gate, w.conv3, Activation::kNone, y);
  buffers.give_back_to(before);
  return out;
}

// Planes as rows.
void rows_step(const Image& x, float* y) {
  RowsParams params{x.shape.B, x.shape.C, x.shape.H * x.shape.W, x.data, y, nullptr};
  run(kernels().rows, params);
}

// The kinds of layer of shvit_kernels/ops.py.
enum Kind : int64_t { kConv3x3, kDepthwise, kFfn, kMixer, kPatchMerging, kPool, kPointwise };
constexpr size_t kCode = 5;  // integers of a layer: its kind, the channels of its input and three settings

// A sequence of layers, each given by its code, weights and constants.
//
// It is cut into segments where images get smaller. A segment takes as many images at a time as keep their
// tokens in cache, and asks the one before for them: so few images of the first layers and more of the last are
// at work.
class Sequence {
 public:
  // Shapes and sizes, from one image.
  Sequence(const std::vector<Tensor>& weights, const std::vector<int64_t>& layers,
           const std::vector<double>& constants, const Image& x)
      : layers_(layers), constants_(constants), x_(x) {
    STD_TORCH_CHECK(!layers.empty() && layers.size() % kCode == 0, "layers must be ", kCode,
                    " integers each, got ", layers.size());
    Weights::check_width(x.shape.C);
    Image one = x;
    one.shape.B = 1;
    Weights rest(weights);
    size_t constant = 0;
    for (size_t begin = 0; begin < layers.size(); begin = segments_.back().end) {
      segments_.push_back(segment(begin, rest, constant, one));
      one = {segments_.back().out, nullptr};
    }
    rest.check_all_taken();
  }

  // Of all images.
  Shape result() const {
    Shape s = segments_.back().out;
    s.B = x_.shape.B;
    return s;
  }
  bool pools() const {
    for (size_t layer = 0; layer < layers_.size(); layer += kCode)
      if (layers_[layer] == kPool) return true;
    return false;
  }

  void run(float* y) {
    if (x_.shape.B == 0) return;
    Buffers measured(nullptr);
    const Memory memory(sequence_arena(), lay_out(measured), kKeptSequence);
    Buffers buffers(memory.data());
    lay_out(buffers);
    make(segments_.size() - 1, 0, x_.shape.B, y);
  }

 private:
  // Tokens that a segment takes at a time.
  static constexpr int64_t kTokens = 256;

  struct Segment {
    size_t begin, end;    // layers, from integer to integer
    Weights weights;      // from its first one on
    size_t constant;      // its first one
    Shape in, out;        // of one image
    int64_t images;       // at a time
    int64_t scratch = 0;  // bytes of one image, of a layer
    // Floats of one image: results between layers alternate between two pieces of memory.
    int64_t between[2] = {};
    float* input = nullptr;  // made by the segment before, or from planes
    char* memory = nullptr;
  };

  // The first convolution of a stem reads images as they come, other layers want their channels side by side.
  bool turns_planes() const { return !x_.channels_last && layers_[0] != kConv3x3; }

  static bool halves(const int64_t* layer) {
    return layer[0] == kConv3x3 || layer[0] == kPatchMerging || (layer[0] == kDepthwise && layer[2] == 2);
  }

  // The segment that starts with layer `begin`.
  Segment segment(size_t begin, Weights& weights, size_t& constant, Image x) const {
    Segment s{begin, begin, weights, constant, x.shape, {}, 0};
    int64_t tokens = 0;
    for (int step = 0; s.end < layers_.size() && (step == 0 || !halves(&layers_[s.end])); ++step) {
      if (step > 0) s.between[step % 2] = std::max(s.between[step % 2], x.shape.floats());
      Buffers buffers(nullptr);
      x = {this->step(x, s.end, weights, constant, buffers, nullptr), nullptr};
      s.scratch = std::max(s.scratch, buffers.most());
      if (step == 0) tokens = x.shape.H * x.shape.W;
    }
    s.out = x.shape;
    s.images = std::min(std::max<int64_t>(x_.shape.B, 1), (kTokens - 1) / tokens + 1);
    return s;
  }

  // Gives memory to the segments, the same to all for what is between their layers; returns its bytes.
  int64_t lay_out(Buffers& buffers) {
    for (Segment& s : segments_)
      if (s.begin > 0 || turns_planes()) s.input = buffers.take(s.images * s.in.floats());
    const int64_t inputs = buffers.used();
    for (Segment& s : segments_) {
      s.memory = reinterpret_cast<char*>(buffers.take(0));
      buffers.take(s.images * s.between[0]);
      buffers.take(s.images * s.between[1]);
      buffers.take(s.images * s.scratch / static_cast<int64_t>(sizeof(float)));
      buffers.give_back_to(inputs);
    }
    return buffers.most();
  }

  // The results of a segment, of `count` images from `first` on.
  void make(size_t number, int64_t first, int64_t count, float* y) {
    const Segment& s = segments_[number];
    for (int64_t done = 0; done < count; done += s.images) {
      const int64_t images = std::min(s.images, count - done);
      Image x = x_;
      x.shape.B = images;
      if (number == 0) {
        x.data += (first + done) * s.in.floats();
        if (turns_planes()) rows_step(x, s.input);
      } else {
        make(number - 1, first + done, images, s.input);
      }
      if (s.input) x = {{images, s.in.C, s.in.H, s.in.W}, s.input};
      apply(s, x, y + done * s.out.floats());
    }
  }

  void apply(const Segment& s, Image x, float* y) const {
    Buffers buffers(s.memory);
    float* const between[2] = {buffers.take(s.images * s.between[0]), buffers.take(s.images * s.between[1])};
    Weights weights = s.weights;
    size_t layer = s.begin, constant = s.constant;
    for (int step = 1; layer < s.end; ++step) {
      float* to = layer + length(layer) == s.end ? y : between[step % 2];
      x = {this->step(x, layer, weights, constant, buffers, to), to};
    }
  }

  // Integers of a step: those of one layer, or of both convolutions that a stem starts with.
  size_t length(size_t layer) const {
    const bool pair =
        layer == 0 && layers_.size() > kCode && layers_[0] == kConv3x3 && layers_[kCode] == kConv3x3;
    return pair ? 2 * kCode : kCode;
  }

  void check_channels(const int64_t* layer, int64_t channels) const {
    STD_TORCH_CHECK(layer[0] == kPool || layer[1] == channels, "x must have ", layer[1], " channels at layer ",
                    (layer - layers_.data()) / kCode, ", got ", channels);
  }

  // Runs the layer (or two) at `at`, which then is the next one.
  Shape step(const Image& x, size_t& at, Weights& weights, size_t& constant, Buffers& buffers, float* y) const {
    const int64_t* layer = &layers_[at];
    const int64_t *settings = layer + 2, C = layer[1];
    const bool pair = length(at) > kCode;
    at += length(at);
    check_channels(layer, x.shape.C);
    switch (layer[0]) {
      case kConv3x3: {
        const Packed w = weights.packed(9 * C, settings[0]);
        if (!pair) return conv3x3_step(x, w, settings[1] != 0, y);
        const int64_t* next = layer + kCode;
        check_channels(next, w.outputs);
        return conv3x3_pair_step(x, w, settings[1] != 0, weights.packed(9 * w.outputs, next[2]), next[3] != 0,
                                 y);
      }
      case kDepthwise:
        return depthwise_step(x, nullptr, weights.depthwise(C), settings[0], settings[1] != 0, y);
      case kFfn:
        return ffn_step(x, weights.ffn(C, settings[0]), y);
      case kMixer: {
        STD_TORCH_CHECK(constant + 2 <= constants_.size(), "the layers take more than ", constants_.size(),
                        " constants");
        constant += 2;
        return mixer_step(x, weights.mixer(C, settings[0], settings[1]), settings[0], constants_[constant - 2],
                          constants_[constant - 1], y);
      }
      case kPatchMerging:
        return patch_merging_step(x, weights.patch_merging(C, settings[1], settings[2], settings[0]), buffers,
                                  y);
      case kPool:
        return pool_step(x, y);
      case kPointwise:
        return pointwise_step(x, nullptr, weights.packed(C, settings[0]),
                              settings[1] != 0 ? Activation::kRelu : Activation::kNone, y);
      default:
        STD_TORCH_CHECK(false, "there is no layer of kind ", layer[0]);
    }
  }

  const std::vector<int64_t>& layers_;
  const std::vector<double>& constants_;
  const Image x_;
  std::vector<Segment> segments_;
};

// ---------------------------------------------------------------------------------------------------------------
// Operators

Image image_of(const Tensor& x, bool any_order = false) {
  STD_TORCH_CHECK(x.scalar_type() == ScalarType::Float, "x must be float32");
  STD_TORCH_CHECK(x.dim() == 4, "x must be [B, C, H, W], got ", x.dim(), " dimensions");
  const Shape s{x.size(0), x.size(1), x.size(2), x.size(3)};
  STD_TORCH_CHECK(s.C * s.H * s.W > 0, "x must have a channel and a pixel");
  const bool planes = any_order && x.is_contiguous();
  STD_TORCH_CHECK(planes || has_adjacent_channels(x), "x must be channels_last");
  return {s, floats(x), !planes};
}

Image rows_of(const Tensor& x) {
  STD_TORCH_CHECK(x.scalar_type() == ScalarType::Float, "x must be float32");
  STD_TORCH_CHECK(x.dim() == 2 && x.size(1) > 0 && x.is_contiguous(), "x must be contiguous rows");
  return {{x.size(0), x.size(1), 1, 1}, floats(x)};
}

Tensor empty_images(const Tensor& like, const Shape& s) {
  return empty_channels_last(like, s.B, s.C, s.H, s.W);
}

float* result(const Tensor& y) { return static_cast<float*>(y.mutable_data_ptr()); }

// The result of step(memory or null) as a tensor.
template <class Step>
Tensor in_a_tensor(const Tensor& x, Step step) {
  const Tensor y = empty_images(x, step(nullptr));
  step(result(y));
  return y;
}

Tensor conv3x3(Tensor x, Tensor weight, Tensor bias, bool relu) {
  const Image image = image_of(x, true);
  const Packed w = packed(weight, bias, 9 * image.shape.C);
  return in_a_tensor(x, [&](float* y) { return conv3x3_step(image, w, relu, y); });
}

Tensor depthwise(Tensor x, Tensor weight, Tensor bias, int64_t stride, bool relu) {
  const Image image = image_of(x);
  const int64_t C = image.shape.C;
  const DepthwiseWeights w{parameter("weight", weight, 9 * C), parameter("bias", bias, C)};
  return in_a_tensor(x, [&](float* y) { return depthwise_step(image, nullptr, w, stride, relu, y); });
}

Tensor pointwise(Tensor x, std::optional<Tensor> scale, Tensor weight, Tensor bias, bool relu) {
  const Image image = image_of(x);
  const float* s = scale.has_value() ? parameter("scale", *scale, image.shape.B * image.shape.C) : nullptr;
  const Packed w = packed(weight, bias, image.shape.C);
  const Activation activation = relu ? Activation::kRelu : Activation::kNone;
  return in_a_tensor(x, [&](float* y) { return pointwise_step(image, s, w, activation, y); });
}

Tensor ffn(Tensor x, Tensor weight1, Tensor bias1, Tensor weight2, Tensor bias2) {
  const Image image = image_of(x);
  const Packed first = packed(weight1, bias1, image.shape.C);
  const FfnWeights w{first, packed(weight2, bias2, first.outputs)};
  STD_TORCH_CHECK(w.second.outputs == image.shape.C, "weight2 must have ", image.shape.C, " outputs, got ",
                  w.second.outputs);
  return in_a_tensor(x, [&](float* y) { return ffn_step(image, w, y); });
}

Tensor mixer(Tensor x, std::optional<Tensor> norm_weight, std::optional<Tensor> norm_bias, Tensor qkv_weight,
             std::optional<Tensor> qkv_bias, Tensor weight, Tensor bias, int64_t qk_dim, double norm_eps,
             double scale) {
  const Image image = image_of(x);
  STD_TORCH_CHECK(qkv_weight.dim() == 2, "qkv_weight must have 2 dimensions, got ", qkv_weight.dim());
  const int64_t P = qkv_weight.size(1), O = 2 * qk_dim + P;
  const auto optional = [](const char* name, const std::optional<Tensor>& t, int64_t count) {
    return t.has_value() ? parameter(name, *t, count) : nullptr;
  };
  const MixerWeights w{P,
                       optional("norm_weight", norm_weight, P),
                       optional("norm_bias", norm_bias, P),
                       parameter("qkv_weight", qkv_weight, O * P),
                       optional("qkv_bias", qkv_bias, O),
                       packed(weight, bias, image.shape.C)};
  STD_TORCH_CHECK(w.projection.outputs == image.shape.C, "weight must have ", image.shape.C, " outputs, got ",
                  w.projection.outputs);
  return in_a_tensor(x, [&](float* y) { return mixer_step(image, w, qk_dim, norm_eps, scale, y); });
}

Tensor pool(Tensor x) {
  const Image image = image_of(x);
  Tensor y = torch::stable::new_empty(x, {image.shape.B, image.shape.C});
  pool_step(image, result(y));
  return y;
}

// Of images, or of rows [B, C], which are images of one pixel.
Tensor sequence(Tensor x, std::vector<Tensor> weights, std::vector<int64_t> layers,
                std::vector<double> constants) {
  const bool rows = x.dim() == 2;
  Sequence all(weights, layers, constants, rows ? rows_of(x) : image_of(x, true));
  const Shape s = all.result();
  const Tensor y = rows || all.pools() ? torch::stable::new_empty(x, {s.B, s.C}) : empty_images(x, s);
  all.run(result(y));
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
  m.impl("fused_sequence", TORCH_BOX(&sequence));
}
