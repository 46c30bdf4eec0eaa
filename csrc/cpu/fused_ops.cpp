// The operators of fused models (shvit_kernels/ops.py) for CPU tensors: float32 or bfloat16, packed weights.
// S is the type of all their tensors.
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

template <class S>
const FusedKernels<S>& kernels() {
  const Variant* variant = current_variant().load();
  if constexpr (std::is_same_v<S, float>) {
    return variant->fused_float32;
  } else {
    return variant->fused_bfloat16;
  }
}

// Images [B, C, H, W] whose memory is [B, H, W, C].
struct Shape {
  int64_t B, C, H, W;
  int64_t values() const { return B * C * H * W; }
};

template <class S>
struct Image {
  Shape shape;
  const S* data;
  bool channels_last = true;
};

const char* name_of(ScalarType type) {
  switch (type) {
    case ScalarType::Float:
      return "float32";
    case ScalarType::BFloat16:
      return "bfloat16";
    case ScalarType::Double:
      return "float64";
    case ScalarType::Half:
      return "float16";
    default:
      return "another type";
  }
}

template <class S>
const S* values(const char* name, const Tensor& t) {
  constexpr ScalarType kType = std::is_same_v<S, float> ? ScalarType::Float : ScalarType::BFloat16;
  STD_TORCH_CHECK(t.scalar_type() == kType, name, " must be ", name_of(kType), " as x is, got ",
                  name_of(t.scalar_type()));
  return static_cast<const S*>(t.const_data_ptr());
}

// A contiguous parameter.
template <class S>
const S* parameter(const char* name, const Tensor& t, int64_t count) {
  STD_TORCH_CHECK(t.is_contiguous() && t.numel() == count, name, " must have ", count,
                  " contiguous values, got ", t.numel());
  return values<S>(name, t);
}

// Packed weights [ceil(outputs / 16), inputs + 1, 16] and their bias [outputs].
template <class S>
struct Packed {
  int64_t outputs;
  const S *weight, *bias;
};

int64_t panels(int64_t n) { return (n + kPanel - 1) / kPanel; }

template <class S>
Packed<S> packed(const Tensor& w, const Tensor& b, int64_t inputs) {
  const int64_t outputs = b.numel();
  STD_TORCH_CHECK(w.dim() == 3 && w.size(0) == panels(outputs) && w.size(1) == inputs + 1 &&
                      w.size(2) == kPanel && outputs > 0,
                  "weight must be packed from [", outputs, ", ", inputs, "]");
  return {outputs, parameter<S>("weight", w, w.numel()), parameter<S>("bias", b, outputs)};
}

// Packed from [outputs, 9 or 25 * inputs].
template <class S>
struct Conv3x3Weights {
  Packed<S> packed;
  bool winograd;
  static int64_t products(bool winograd) { return winograd ? 25 : 9; }
};

template <class S>
struct DepthwiseWeights {
  const S *taps, *bias;  // [9, C], [C]
};

template <class S>
struct FfnWeights {
  Packed<S> first, second;
};

// Those of the norm and qkv_bias may be null.
template <class S>
struct MixerWeights {
  int64_t pdim;
  const S *norm_weight, *norm_bias, *qkv_weight, *qkv_bias;
  Packed<S> projection;
};

template <class S>
struct PatchMergingWeights {
  Packed<S> conv1;
  DepthwiseWeights<S> conv2;
  Packed<S> fc1, fc2, conv3;
};

// The weights of a sequence in the order of its layers: in each tensor one behind the other, from multiples of
// kPanel values on, so that what a layer reads lies behind what the layer before has read.
template <class S>
class Weights {
 public:
  explicit Weights(const std::vector<Tensor>& tensors) : tensors_(&tensors) {
    for (const Tensor& t : tensors) parameter<S>("weights", t, t.numel());
  }

  // Far beyond any layer, and far from overflow.
  static void check_width(int64_t n) {
    STD_TORCH_CHECK(n >= 1 && n <= 1 << 24, "the widths of a layer must lie between 1 and 2^24, got ", n);
  }
  const S* take(int64_t count) {
    skip_read();
    const int64_t taken = panels(count) * kPanel;
    STD_TORCH_CHECK(tensor_ < tensors_->size() && taken <= current().numel() - at_,
                    "the layers take more weights than the ", tensors_->size(), " tensors have");
    at_ += taken;
    return static_cast<const S*>(current().const_data_ptr()) + at_ - taken;
  }
  Packed<S> packed(int64_t inputs, int64_t outputs) {
    check_width(outputs);
    const S* weight = take(panels(outputs) * (inputs + 1) * kPanel);
    return {outputs, weight, take(outputs)};
  }
  Conv3x3Weights<S> conv3x3(int64_t channels, int64_t outputs, bool winograd) {
    return {packed(Conv3x3Weights<S>::products(winograd) * channels, outputs), winograd};
  }
  DepthwiseWeights<S> depthwise(int64_t channels) {
    const S* taps = take(9 * channels);
    return {taps, take(channels)};
  }
  FfnWeights<S> ffn(int64_t channels, int64_t hidden) {
    const Packed<S> first = packed(channels, hidden);
    return {first, packed(hidden, channels)};
  }
  MixerWeights<S> mixer(int64_t channels, int64_t qk_dim, int64_t pdim) {
    check_width(qk_dim);
    check_width(pdim);
    const int64_t O = 2 * qk_dim + pdim;
    MixerWeights<S> w{pdim, take(pdim), take(pdim), take(O * pdim), take(O), {}};
    w.projection = packed(channels, channels);
    return w;
  }
  PatchMergingWeights<S> patch_merging(int64_t channels, int64_t hidden, int64_t squeezed, int64_t outputs) {
    PatchMergingWeights<S> w;
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
template <class S>
class Buffers {
 public:
  explicit Buffers(char* base) : base_(base) {}
  S* take(int64_t count) {
    char* piece = base_ ? base_ + used_ : nullptr;
    used_ += (count * static_cast<int64_t>(sizeof(S)) + 63) / 64 * 64;
    most_ = used_ > most_ ? used_ : most_;
    return reinterpret_cast<S*>(piece);
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

template <class S>
Conv3x3Params<S> conv3x3_params(const Image<S>& x, const Conv3x3Weights<S>& w, bool relu, S* y) {
  const Shape& s = x.shape;
  return {s.B,
          s.C,
          s.H,
          s.W,
          w.packed.outputs,
          x.channels_last,
          relu,
          w.winograd,
          x.data,
          w.packed.weight,
          w.packed.bias,
          y,
          nullptr,
          torch::stable::get_num_threads(),
          nullptr};
}

template <class S>
Shape shape_of(const Conv3x3Params<S>& p) {
  return {p.images, p.outputs, (p.height + 1) / 2, (p.width + 1) / 2};
}

template <class S>
Shape conv3x3_step(const Image<S>& x, const Conv3x3Weights<S>& w, bool relu, S* y) {
  Conv3x3Params<S> params = conv3x3_params(x, w, relu, y);
  if (y) run(kernels<S>().conv3x3, params);
  return shape_of(params);
}

// Two of them, the first of which makes its rows as the second needs them.
template <class S>
Shape conv3x3_pair_step(const Image<S>& x, const Conv3x3Weights<S>& w1, bool relu1, const Conv3x3Weights<S>& w2,
                        bool relu2, S* y) {
  const Conv3x3Params<S> first = conv3x3_params<S>(x, w1, relu1, nullptr);
  Conv3x3Params<S> second = conv3x3_params<S>({shape_of(first), nullptr}, w2, relu2, y);
  second.source = &first;
  if (y) run(kernels<S>().conv3x3, second);
  return shape_of(second);
}

template <class S>
PointwiseParams<S> pointwise_params(const Image<S>& x, const S* scale, const Packed<S>& w,
                                    Activation activation, S* y) {
  const Shape& s = x.shape;
  return {s.B, s.H * s.W, s.C, w.outputs, activation, x.data, scale, w.weight, w.bias, y, nullptr};
}

template <class S>
Shape pointwise_step(const Image<S>& x, const S* scale, const Packed<S>& w, Activation activation, S* y) {
  PointwiseParams<S> params = pointwise_params(x, scale, w, activation, y);
  if (y) run(kernels<S>().pointwise, params);
  return {x.shape.B, params.outputs, x.shape.H, x.shape.W};
}

// `source` makes x, or is null.
template <class S>
Shape depthwise_step(const Image<S>& x, const PointwiseParams<S>* source, const DepthwiseWeights<S>& w,
                     int64_t stride, bool relu, S* y) {
  const Shape& s = x.shape;
  STD_TORCH_CHECK(stride == 1 || stride == 2, "stride must be 1 or 2, got ", stride);
  if (y) {
    DepthwiseParams<S> params{s.B, s.C, s.H, s.W, stride, relu, x.data, w.taps, w.bias, y, source, nullptr};
    run(kernels<S>().depthwise, params);
  }
  return {s.B, s.C, (s.H + stride - 1) / stride, (s.W + stride - 1) / stride};
}

template <class S>
Shape ffn_step(const Image<S>& x, const FfnWeights<S>& w, S* y) {
  const Shape& s = x.shape;
  if (y) {
    FfnParams<S> params{
        s.B * s.H * s.W, s.C, w.first.outputs, x.data, w.first.weight, w.first.bias, w.second.weight,
        w.second.bias,   y,   nullptr};
    run(kernels<S>().ffn, params);
  }
  return s;
}

template <class S>
Shape mixer_step(const Image<S>& x, const MixerWeights<S>& w, int64_t qk_dim, double norm_eps, double scale,
                 S* y) {
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
    MixerParams<S> params{attention, w.projection.weight, w.projection.bias, y, nullptr};
    run(kernels<S>().mixer, params);
  }
  return s;
}

template <class S>
Shape pool_step(const Image<S>& x, S* y) {
  const Shape& s = x.shape;
  if (y) {
    PoolParams<S> params{s.B, s.H * s.W, s.C, x.data, y, nullptr};
    run(kernels<S>().pool, params);
  }
  return {s.B, s.C, 1, 1};
}

template <class S>
Shape patch_merging_step(const Image<S>& x, const PatchMergingWeights<S>& w, Buffers<S>& buffers, S* y) {
  const int64_t before = buffers.used();
  // Of one image, what is expanded stays in cache as a whole; of more, a band at a time does.
  const bool bands = x.shape.B > 1;
  PointwiseParams<S> expand = pointwise_params<S>(x, nullptr, w.conv1, Activation::kRelu, nullptr);
  Image<S> wide{{x.shape.B, expand.outputs, x.shape.H, x.shape.W}, nullptr};
  if (!bands) wide.data = expand.y = buffers.take(wide.shape.values());
  const Shape small = depthwise_step<S>(wide, nullptr, w.conv2, 2, true, nullptr);
  S *reduced = buffers.take(small.values()), *means = buffers.take(small.B * small.C),
    *gate = buffers.take(small.B * small.C);
  const Image<S> merged{small, reduced}, pooled{{small.B, small.C, 1, 1}, means};
  const Shape squeezed = pointwise_step<S>(pooled, nullptr, w.fc1, Activation::kRelu, nullptr);
  S* narrow = buffers.take(squeezed.values());
  const Image<S> bottleneck{squeezed, narrow};
  if (y) {
    if (!bands) run(kernels<S>().pointwise, expand);
    depthwise_step<S>(wide, bands ? &expand : nullptr, w.conv2, 2, true, reduced);
    pool_step(merged, means);
    pointwise_step<S>(pooled, nullptr, w.fc1, Activation::kRelu, narrow);
    pointwise_step<S>(bottleneck, nullptr, w.fc2, Activation::kSigmoid, gate);
  }
  const Shape out = pointwise_step(merged, gate, w.conv3, Activation::kNone, y);
  buffers.give_back_to(before);
  return out;
}

// Planes as rows.
template <class S>
void rows_step(const Image<S>& x, S* y) {
  RowsParams<S> params{x.shape.B, x.shape.C, x.shape.H * x.shape.W, x.data, y, nullptr};
  run(kernels<S>().rows, params);
}

// The kinds of layer of shvit_kernels/ops.py.
enum Kind : int64_t { kConv3x3, kDepthwise, kFfn, kMixer, kPatchMerging, kPool, kPointwise };
constexpr size_t kCode = 5;  // integers of a layer: its kind, the channels of its input and three settings

// A sequence of layers, each given by its code, weights and constants.
//
// It is cut into segments where images get smaller. A segment takes as many images at a time as keep their
// tokens in cache, and asks the one before for them: so few images of the first layers and more of the last are
// at work.
template <class S>
class Sequence {
 public:
  // Shapes and sizes, from one image.
  Sequence(const std::vector<Tensor>& weights, const std::vector<int64_t>& layers,
           const std::vector<double>& constants, const Image<S>& x)
      : layers_(layers), constants_(constants), x_(x) {
    STD_TORCH_CHECK(!layers.empty() && layers.size() % kCode == 0, "layers must be ", kCode,
                    " integers each, got ", layers.size());
    Weights<S>::check_width(x.shape.C);
    Image<S> one = x;
    one.shape.B = 1;
    Weights<S> rest(weights);
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

  void run(S* y) {
    if (x_.shape.B == 0) return;
    Buffers<S> measured(nullptr);
    const Memory memory(sequence_arena(), lay_out(measured), kKeptSequence);
    Buffers<S> buffers(memory.data());
    lay_out(buffers);
    make(segments_.size() - 1, 0, x_.shape.B, y);
  }

 private:
  // Tokens that a segment takes at a time.
  static constexpr int64_t kTokens = 256;

  struct Segment {
    size_t begin, end;    // layers, from integer to integer
    Weights<S> weights;   // from its first one on
    size_t constant;      // its first one
    Shape in, out;        // of one image
    int64_t images;       // at a time
    int64_t scratch = 0;  // bytes of one image, of a layer
    // Values of one image: results between layers alternate between two pieces of memory.
    int64_t between[2] = {};
    S* input = nullptr;  // made by the segment before, or from planes
    char* memory = nullptr;
  };

  // The first convolution of a stem reads images as they come, other layers want their channels side by side.
  bool turns_planes() const { return !x_.channels_last && layers_[0] != kConv3x3; }

  static bool halves(const int64_t* layer) {
    return layer[0] == kConv3x3 || layer[0] == kPatchMerging || (layer[0] == kDepthwise && layer[2] == 2);
  }

  // The segment that starts with layer `begin`.
  Segment segment(size_t begin, Weights<S>& weights, size_t& constant, Image<S> x) const {
    Segment s{begin, begin, weights, constant, x.shape, {}, 0};
    int64_t tokens = 0;
    for (int step = 0; s.end < layers_.size() && (step == 0 || !halves(&layers_[s.end])); ++step) {
      if (step > 0) s.between[step % 2] = std::max(s.between[step % 2], x.shape.values());
      Buffers<S> buffers(nullptr);
      x = {this->step(x, s.end, weights, constant, buffers, nullptr), nullptr};
      s.scratch = std::max(s.scratch, buffers.most());
      if (step == 0) tokens = x.shape.H * x.shape.W;
    }
    s.out = x.shape;
    s.images = std::min(std::max<int64_t>(x_.shape.B, 1), (kTokens - 1) / tokens + 1);
    return s;
  }

  // Gives memory to the segments, the same to all for what is between their layers; returns its bytes.
  int64_t lay_out(Buffers<S>& buffers) {
    for (Segment& s : segments_)
      if (s.begin > 0 || turns_planes()) s.input = buffers.take(s.images * s.in.values());
    const int64_t inputs = buffers.used();
    for (Segment& s : segments_) {
      s.memory = reinterpret_cast<char*>(buffers.take(0));
      buffers.take(s.images * s.between[0]);
      buffers.take(s.images * s.between[1]);
      buffers.take(s.images * s.scratch / static_cast<int64_t>(sizeof(S)));
      buffers.give_back_to(inputs);
    }
    return buffers.most();
  }

  // The results of a segment, of `count` images from `first` on.
  void make(size_t number, int64_t first, int64_t count, S* y) {
    const Segment& s = segments_[number];
    for (int64_t done = 0; done < count; done += s.images) {
      const int64_t images = std::min(s.images, count - done);
      Image<S> x = x_;
      x.shape.B = images;
      if (number == 0) {
        x.data += (first + done) * s.in.values();
        if (turns_planes()) rows_step(x, s.input);
      } else {
        make(number - 1, first + done, images, s.input);
      }
      if (s.input) x = {{images, s.in.C, s.in.H, s.in.W}, s.input};
      apply(s, x, y + done * s.out.values());
    }
  }

  void apply(const Segment& s, Image<S> x, S* y) const {
    Buffers<S> buffers(s.memory);
    S* const between[2] = {buffers.take(s.images * s.between[0]), buffers.take(s.images * s.between[1])};
    Weights<S> weights = s.weights;
    size_t layer = s.begin, constant = s.constant;
    for (int step = 1; layer < s.end; ++step) {
      S* to = layer + length(layer) == s.end ? y : between[step % 2];
      x = {this->step(x, layer, weights, constant, buffers, to), to};
    }
  }

  // Integers of a step: those of one layer, or of both convolutions that a stem starts with. One in squares
  // makes no single rows.
  size_t length(size_t layer) const {
    const bool pair = layer == 0 && layers_.size() > kCode && layers_[0] == kConv3x3 && layers_[4] == 0 &&
                      layers_[kCode] == kConv3x3;
    return pair ? 2 * kCode : kCode;
  }

  void check_channels(const int64_t* layer, int64_t channels) const {
    STD_TORCH_CHECK(layer[0] == kPool || layer[1] == channels, "x must have ", layer[1], " channels at layer ",
                    (layer - layers_.data()) / kCode, ", got ", channels);
  }

  // Runs the layer (or two) at `at`, which then is the next one.
  Shape step(const Image<S>& x, size_t& at, Weights<S>& weights, size_t& constant, Buffers<S>& buffers,
             S* y) const {
    const int64_t* layer = &layers_[at];
    const int64_t *settings = layer + 2, C = layer[1];
    const bool pair = length(at) > kCode;
    at += length(at);
    check_channels(layer, x.shape.C);
    switch (layer[0]) {
      case kConv3x3: {
        const Conv3x3Weights<S> w = weights.conv3x3(C, settings[0], settings[2] != 0);
        if (!pair) return conv3x3_step(x, w, settings[1] != 0, y);
        const int64_t* next = layer + kCode;
        check_channels(next, settings[0]);
        return conv3x3_pair_step(x, w, settings[1] != 0, weights.conv3x3(next[1], next[2], next[4] != 0),
                                 next[3] != 0, y);
      }
      case kDepthwise:
        return depthwise_step<S>(x, nullptr, weights.depthwise(C), settings[0], settings[1] != 0, y);
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
        return pointwise_step<S>(x, nullptr, weights.packed(C, settings[0]),
                                 settings[1] != 0 ? Activation::kRelu : Activation::kNone, y);
      default:
        STD_TORCH_CHECK(false, "there is no layer of kind ", layer[0]);
    }
  }

  const std::vector<int64_t>& layers_;
  const std::vector<double>& constants_;
  const Image<S> x_;
  std::vector<Segment> segments_;
};

// ---------------------------------------------------------------------------------------------------------------
// Operators

// f(S) for the type of x.
template <class F>
Tensor of_type(const Tensor& x, F f) {
  const ScalarType type = x.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::BFloat16,
                  "x must be float32 or bfloat16, got ", name_of(type));
  return type == ScalarType::Float ? f(float{}) : f(BFloat16{});
}

template <class S>
Image<S> image_of(const Tensor& x, bool any_order = false) {
  STD_TORCH_CHECK(x.dim() == 4, "x must be [B, C, H, W], got ", x.dim(), " dimensions");
  const Shape s{x.size(0), x.size(1), x.size(2), x.size(3)};
  STD_TORCH_CHECK(s.C * s.H * s.W > 0, "x must have a channel and a pixel");
  const bool planes = any_order && x.is_contiguous();
  STD_TORCH_CHECK(planes || has_adjacent_channels(x), "x must be channels_last");
  return {s, values<S>("x", x), !planes};
}

template <class S>
Image<S> rows_of(const Tensor& x) {
  STD_TORCH_CHECK(x.dim() == 2 && x.size(1) > 0 && x.is_contiguous(), "x must be contiguous rows");
  return {{x.size(0), x.size(1), 1, 1}, values<S>("x", x)};
}

Tensor empty_images(const Tensor& like, const Shape& s) {
  return empty_channels_last(like, s.B, s.C, s.H, s.W);
}

template <class S>
S* result(const Tensor& y) {
  return static_cast<S*>(y.mutable_data_ptr());
}

// The result of step(memory or null) as a tensor.
template <class S, class Step>
Tensor in_a_tensor(const Tensor& x, Step step) {
  const Tensor y = empty_images(x, step(nullptr));
  step(result<S>(y));
  return y;
}

Tensor conv3x3(Tensor x, Tensor weight, Tensor bias, bool relu, bool winograd) {
  return of_type(x, [&]<class S>(S) {
    const Image<S> image = image_of<S>(x, true);
    const int64_t products = Conv3x3Weights<S>::products(winograd);
    const Conv3x3Weights<S> w{packed<S>(weight, bias, products * image.shape.C), winograd};
    return in_a_tensor<S>(x, [&](S* y) { return conv3x3_step(image, w, relu, y); });
  });
}

Tensor depthwise(Tensor x, Tensor weight, Tensor bias, int64_t stride, bool relu) {
  return of_type(x, [&]<class S>(S) {
    const Image<S> image = image_of<S>(x);
    const int64_t C = image.shape.C;
    const DepthwiseWeights<S> w{parameter<S>("weight", weight, 9 * C), parameter<S>("bias", bias, C)};
    return in_a_tensor<S>(x, [&](S* y) { return depthwise_step<S>(image, nullptr, w, stride, relu, y); });
  });
}

Tensor pointwise(Tensor x, std::optional<Tensor> scale, Tensor weight, Tensor bias, bool relu) {
  return of_type(x, [&]<class S>(S) {
    const Image<S> image = image_of<S>(x);
    const S* s = scale.has_value() ? parameter<S>("scale", *scale, image.shape.B * image.shape.C) : nullptr;
    const Packed<S> w = packed<S>(weight, bias, image.shape.C);
    const Activation activation = relu ? Activation::kRelu : Activation::kNone;
    return in_a_tensor<S>(x, [&](S* y) { return pointwise_step(image, s, w, activation, y); });
  });
}

Tensor ffn(Tensor x, Tensor weight1, Tensor bias1, Tensor weight2, Tensor bias2) {
  return of_type(x, [&]<class S>(S) {
    const Image<S> image = image_of<S>(x);
    const Packed<S> first = packed<S>(weight1, bias1, image.shape.C);
    const FfnWeights<S> w{first, packed<S>(weight2, bias2, first.outputs)};
    STD_TORCH_CHECK(w.second.outputs == image.shape.C, "weight2 must have ", image.shape.C, " outputs, got ",
                    w.second.outputs);
    return in_a_tensor<S>(x, [&](S* y) { return ffn_step(image, w, y); });
  });
}

Tensor mixer(Tensor x, std::optional<Tensor> norm_weight, std::optional<Tensor> norm_bias, Tensor qkv_weight,
             std::optional<Tensor> qkv_bias, Tensor weight, Tensor bias, int64_t qk_dim, double norm_eps,
             double scale) {
  STD_TORCH_CHECK(qkv_weight.dim() == 2, "qkv_weight must have 2 dimensions, got ", qkv_weight.dim());
  const int64_t P = qkv_weight.size(1), O = 2 * qk_dim + P;
  return of_type(x, [&]<class S>(S) {
    const Image<S> image = image_of<S>(x);
    const auto optional = [](const char* name, const std::optional<Tensor>& t, int64_t count) {
      return t.has_value() ? parameter<S>(name, *t, count) : nullptr;
    };
    const MixerWeights<S> w{P,
                            optional("norm_weight", norm_weight, P),
                            optional("norm_bias", norm_bias, P),
                            parameter<S>("qkv_weight", qkv_weight, O * P),
                            optional("qkv_bias", qkv_bias, O),
                            packed<S>(weight, bias, image.shape.C)};
    STD_TORCH_CHECK(w.projection.outputs == image.shape.C, "weight must have ", image.shape.C, " outputs, got ",
                    w.projection.outputs);
    return in_a_tensor<S>(x, [&](S* y) { return mixer_step(image, w, qk_dim, norm_eps, scale, y); });
  });
}

Tensor pool(Tensor x) {
  return of_type(x, [&]<class S>(S) {
    const Image<S> image = image_of<S>(x);
    Tensor y = make_empty(x, {image.shape.B, image.shape.C}, x.scalar_type());
    pool_step(image, result<S>(y));
    return y;
  });
}

// Of images, or of rows [B, C], which are images of one pixel.
Tensor sequence(Tensor x, std::vector<Tensor> weights, std::vector<int64_t> layers,
                std::vector<double> constants) {
  return of_type(x, [&]<class S>(S) {
    const bool rows = x.dim() == 2;
    Sequence<S> all(weights, layers, constants, rows ? rows_of<S>(x) : image_of<S>(x, true));
    const Shape s = all.result();
    const Tensor y = rows || all.pools() ? make_empty(x, {s.B, s.C}, x.scalar_type()) : empty_images(x, s);
    all.run(result<S>(y));
    return y;
  });
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
