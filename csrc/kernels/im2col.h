// Rows that need not be in memory as such: what the windows of a convolution see of its images.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

namespace gradnorm {

// Images lie one after the other, their channels side by side. Row r is a window of image
// r / product(positions), the last position running fastest; its entries are those of the kernel,
// the last dimension running fastest, and of each its channels.
struct Im2col {
  // Those that an image lacks have one position and one entry.
  static constexpr int kDimensions = 3;

  int64_t image;  // elements from one image to the next
  int64_t channels;
  int64_t positions[kDimensions];  // windows of an image
  int64_t step[kDimensions];       // elements from one to the next
  int64_t kernel[kDimensions];     // entries of a window
  int64_t spread[kDimensions];     // elements from one to the next

  int64_t rows() const { return positions[0] * positions[1] * positions[2]; }  // of an image
  int64_t columns() const { return kernel[0] * kernel[1] * kernel[2] * channels; }

  // Whether everything that is seen lies inside of an image.
  bool fits() const {
    int64_t last = channels;
    for (int i = 0; i < kDimensions; ++i) {
      if (positions[i] < 1 || kernel[i] < 1 || step[i] < 0 || spread[i] < 0) return false;
      last += (positions[i] - 1) * step[i] + (kernel[i] - 1) * spread[i];
    }
    return channels >= 1 && last <= image;
  }

  // Columns column .. of so many rows, as a matrix [rows, width].
  template <typename T>
  void gather(const T* images, int64_t row, int64_t rows, int64_t column, int64_t width,
              T* to) const {
    struct Run {
      int64_t from, length;
    };
    std::vector<Run> runs;
    for (int64_t at = column, end = column + width; at < end;) {
      const int64_t entry = at / channels, channel = at % channels;
      const int64_t from = entry / (kernel[1] * kernel[2]) * spread[0] +
                           entry / kernel[2] % kernel[1] * spread[1] +
                           entry % kernel[2] * spread[2] + channel;
      const int64_t length = std::min(channels - channel, end - at);
      if (!runs.empty() && runs.back().from + runs.back().length == from) {
        runs.back().length += length;
      } else {
        runs.push_back({from, length});
      }
      at += length;
    }
    for (const int64_t end = row + rows; row < end; ++row) {
      const int64_t position = row % this->rows();
      const T* window =
          images + row / this->rows() * image + position / (positions[1] * positions[2]) * step[0] +
          position / positions[2] % positions[1] * step[1] + position % positions[2] * step[2];
      for (const Run& run : runs) {
        std::memcpy(to, window + run.from, sizeof(T) * run.length);
        to += run.length;
      }
    }
  }
};

}  // namespace gradnorm
