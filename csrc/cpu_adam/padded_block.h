// The elements behind the last whole block, in a block of their own: so every path works on whole vectors only.
#pragma once

#include <cstddef>
#include <cstring>

#include "state.h"

namespace offload {

class PaddedBlock {
 public:
  // Copies n elements from element i on, 0 < n < kStateBlock. Those behind them repeat the last one, so that they add
  // nothing to what a block has in common, its scale.
  void Fill(const Buffers& whole, size_t i, size_t n) {
    const size_t moment_size = SizeOfMoment(whole.state_format);
    num_rows_ = 0;
    num_elements_ = n;
    buffers_ = whole;
    buffers_.rounding.first_index += static_cast<uint32_t>(i);
    buffers_.master = Copy(whole.master, i, whole.state_format == StateFormat::kFloat32 ? 4 : 2);
    buffers_.first = Copy(whole.first, i, moment_size);
    buffers_.second = Copy(whole.second, i, moment_size);
    buffers_.max_second = static_cast<float*>(Copy(whole.max_second, i, sizeof(float)));
    buffers_.param = Copy(whole.param, i, SizeOf(whole.param_format));
    num_written_rows_ = num_rows_;
    buffers_.grad = Copy(const_cast<void*>(whole.grad), i, SizeOf(whole.grad_format));
    if (whole.state_format == StateFormat::kInt8) {  // scales stay where they are
      if (whole.first != nullptr) buffers_.first_scale += i / kStateBlock;
      if (whole.second != nullptr) buffers_.second_scale += i / kStateBlock;
    }
  }

  // The n elements are elements 0 to n here.
  const Buffers& buffers() const { return buffers_; }

  void WriteBack() const {
    for (size_t row = 0; row < num_written_rows_; ++row) {
      std::memcpy(rows_[row].source, memory_[row], num_elements_ * rows_[row].item_size);
    }
  }

 private:
  static constexpr size_t kMaxRows = 6;

  struct Row {
    char* source;
    size_t item_size;
  };

  void* Copy(void* source, size_t i, size_t item_size) {
    if (source == nullptr) return nullptr;
    rows_[num_rows_] = Row{static_cast<char*>(source) + i * item_size, item_size};
    char* const copy = memory_[num_rows_];
    std::memcpy(copy, rows_[num_rows_].source, num_elements_ * item_size);
    for (size_t k = num_elements_; k < kStateBlock; ++k) {
      std::memcpy(copy + k * item_size, copy + (num_elements_ - 1) * item_size, item_size);
    }
    ++num_rows_;
    return copy;
  }

  alignas(64) char memory_[kMaxRows][kStateBlock * sizeof(float)];
  Row rows_[kMaxRows];
  size_t num_rows_, num_written_rows_, num_elements_;
  Buffers buffers_;
};

}  // namespace offload
