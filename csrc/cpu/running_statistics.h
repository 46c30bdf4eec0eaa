// Running statistics of a batch normalisation, updated as torch.nn.BatchNorm2d does.
#pragma once

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <optional>

#include "../tensors.h"

namespace shvit {

class RunningStatistics {
 public:
  // Of `channels` channels; what is absent is not updated. Names in errors begin with `prefix`.
  RunningStatistics(const char* prefix, const std::optional<Tensor>& mean, const std::optional<Tensor>& var,
                    const std::optional<Tensor>& num_batches_tracked, std::optional<double> momentum,
                    int64_t channels)
      : mean_(mean), var_(var), num_batches_tracked_(num_batches_tracked), momentum_(momentum) {
    STD_TORCH_CHECK(mean.has_value() == var.has_value(), prefix, "running_mean and ", prefix,
                    "running_var must be given together");
    if (mean.has_value()) check_running_statistics(prefix, *mean, *var, channels);
    if (num_batches_tracked.has_value()) check_num_batches_tracked(prefix, *num_batches_tracked);
  }

  // From mean and biased variance, float32 or float64, of `count` values of each channel.
  void update(ScalarType type, const void* mean, const void* variance, int64_t count) const {
    int64_t batches = 0;
    if (num_batches_tracked_.has_value())
      batches = ++*static_cast<int64_t*>(num_batches_tracked_->mutable_data_ptr());
    if (!mean_.has_value() || count == 0) return;
    const double average = batches > 0 ? 1 / static_cast<double>(batches) : 0;
    const double share = momentum_.value_or(average);
    const auto move = type == ScalarType::Double ? move_towards<double> : move_towards<float>;
    move(*mean_, mean, share, 1);
    move(*var_, variance, share, bessel_correction(count));
  }

 private:
  template <class T>
  static void move_towards(const Tensor& running, const void* batch, double share, double factor) {
    const T* values = static_cast<const T*>(batch);
    switch (running.scalar_type()) {
      case ScalarType::Float:
        return move_values<float>(running, values, share, factor);
      case ScalarType::Double:
        return move_values<double>(running, values, share, factor);
      case ScalarType::BFloat16:
        return move_values<torch::headeronly::BFloat16>(running, values, share, factor);
      default:
        return move_values<torch::headeronly::Half>(running, values, share, factor);
    }
  }

  template <class S, class T>
  static void move_values(const Tensor& running, const T* batch, double share, double factor) {
    S* values = static_cast<S*>(running.mutable_data_ptr());
    for (int64_t o = 0; o < running.numel(); ++o) {
      const double old = static_cast<double>(values[o]), aim = static_cast<double>(batch[o]) * factor;
      // From the nearer end, so that a share of one leaves nothing of a large old value.
      const double moved = share < 0.5 ? old + share * (aim - old) : aim - (1 - share) * (aim - old);
      values[o] = static_cast<S>(moved);
    }
  }

  const std::optional<Tensor> mean_, var_, num_batches_tracked_;
  const std::optional<double> momentum_;
};

}  // namespace shvit
