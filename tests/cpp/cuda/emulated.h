// What tests of emulated kernels share: rows in every type that end where memory ends, and a run in
// every order of blocks and threads, which must give the same bits.
#pragma once

#include <sys/mman.h>

#include <functional>

#include "../check.h"
#include "kernels/cuda/device.h"

namespace check {

using gradnorm::BFloat16;
using gradnorm::Half;

inline double value_of(float value) { return value; }
inline double value_of(double value) { return value; }
inline double value_of(Half value) { return emulator::widen_half(value.bits); }
inline double value_of(BFloat16 value) { return __uint_as_float(unsigned(value.bits) << 16); }

// Rounded toward zero: which value it is does not matter, only that the test knows it.
template <typename T>
T rounded(double value) {
  if constexpr (std::is_same_v<T, BFloat16>) {
    const float narrow = float(value);
    unsigned bits;
    std::memcpy(&bits, &narrow, 4);
    return {uint16_t(bits >> 16)};
  } else if constexpr (std::is_same_v<T, Half>) {
    if (std::isnan(value)) return {0x7e00};
    const uint16_t sign = std::signbit(value) ? 0x8000 : 0;
    value = std::fabs(value);
    int exponent;
    std::frexp(value, &exponent);
    if (value < 0x1p-14) return {uint16_t(sign | int(value * 0x1p24))};
    return {
        uint16_t(sign | (int(std::ldexp(value, 11 - exponent)) - 1024 + ((exponent + 14) << 10)))};
  } else {
    return T(value);
  }
}

template <typename T>
const char* name_of() {
  return std::is_same_v<T, float>    ? "float"
         : std::is_same_v<T, double> ? "double"
         : std::is_same_v<T, Half>   ? "half"
                                     : "bfloat16";
}

// An array on a multiple of 16 bytes, less than 16 bytes before a page that must not be touched.
template <typename T>
class Fenced {
 public:
  explicit Fenced(int64_t size) : size_(size) {
    constexpr size_t kPage = 4096;
    const size_t bytes = (size * sizeof(T) + 15) / 16 * 16;
    mapped_ = (bytes + kPage - 1) / kPage * kPage + kPage;
    pages_ = static_cast<char*>(
        mmap(nullptr, mapped_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    mprotect(pages_ + mapped_ - kPage, kPage, PROT_NONE);
    data_ = reinterpret_cast<T*>(pages_ + mapped_ - kPage - bytes);
    std::memset(static_cast<void*>(data_), 0xff, bytes);  // NaN
  }
  explicit Fenced(const std::vector<T>& values) : Fenced(int64_t(values.size())) {
    std::copy(values.begin(), values.end(), data_);
  }
  Fenced(const Fenced&) = delete;
  ~Fenced() { munmap(pages_, mapped_); }

  T* data() const { return data_; }
  int64_t size() const { return size_; }
  T& operator[](int64_t i) const { return data_[i]; }
  std::vector<T> values() const { return {data_, data_ + size_}; }

 private:
  int64_t size_;
  size_t mapped_;
  char* pages_;
  T* data_;
};

template <typename T>
void fill(const Fenced<T>& array, unsigned seed) {
  std::mt19937 generator(seed);
  std::normal_distribution<double> normal;
  for (int64_t i = 0; i < array.size(); ++i) array[i] = rounded<T>(normal(generator));
}

// What run() returns, the same in every order.
template <typename Result>
Result in_every_order(const std::string& what, const std::function<Result()>& run) {
  emulator::order = emulator::Order::kForward;
  const Result first = run();
  using emulator::Order;
  for (const auto order : {Order::kBackward, Order::kShuffled, Order::kLagging}) {
    emulator::order = order;
    const Result again = run();
    if (std::memcmp(first.data(), again.data(), first.size() * sizeof(first[0]))) {
      std::printf("FAIL %s: another result in another order of threads\n", what.c_str());
      ++failures;
    }
  }
  emulator::order = emulator::Order::kForward;
  return first;
}

}  // namespace check
