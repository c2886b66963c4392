// What hopper.h emulates, piece by piece: that it does what PTX says, and that kernels which are
// wrong in one way each are found out.
#include "emulated.h"
#include "hopper.h"

namespace {

using namespace emulator;

void expect(bool ok, const std::string& what) {
  std::printf("%s %s\n", ok ? "ok" : "FAIL", what.c_str());
  check::failures += !ok;
}

constexpr int kGroup = 128;
constexpr Order kOrders[] = {Order::kForward, Order::kBackward, Order::kShuffled, Order::kLagging};

std::function<void(float*)> body;
__global__ void body_kernel(float* out) { body(out); }

// What one block of `threads` threads leaves in out[0] to out[size - 1], in every order.
std::vector<std::vector<float>> run_in_every_order(int threads, int64_t size, size_t shared_bytes,
                                                   const std::function<void(float*)>& one) {
  body = one;
  const check::Fenced<float> out(size);
  std::vector<std::vector<float>> found;
  for (const Order in : kOrders) {
    order = in;
    std::fill_n(out.data(), size, -1.0f);
    gradnorm::launch("test", body_kernel, 1, dim3(threads), shared_bytes, nullptr, out.data());
    found.push_back(out.values());
  }
  order = Order::kForward;
  return found;
}

bool all_same(const std::vector<std::vector<float>>& found) {
  return std::all_of(found.begin(), found.end(), [&](const std::vector<float>& one) {
    return !std::memcmp(one.data(), found[0].data(), one.size() * sizeof(float));
  });
}

std::vector<float> run(int threads, int64_t size, size_t shared_bytes,
                       const std::function<void(float*)>& one) {
  const auto found = run_in_every_order(threads, size, shared_bytes, one);
  if (!all_same(found)) expect(false, "the same in every order");
  return found[0];
}

bool is_refused(const std::string& with, int threads, size_t shared_bytes,
                const std::function<void()>& one) {
  body = [&](float*) { one(); };
  bool everywhere = true;
  for (const Order in : kOrders) {
    order = in;
    bool here = false;
    try {
      gradnorm::launch("test", body_kernel, 1, dim3(threads), shared_bytes, nullptr,
                       static_cast<float*>(nullptr));
    } catch (const Refused& refused) {
      here = std::string(refused.what()).find(with) != std::string::npos;
      if (!here || in == Order::kForward) std::printf("   %s\n", refused.what());
    }
    everywhere &= here;
  }
  order = Order::kForward;
  return everywhere;
}

template <typename T>
T* shared(size_t offset = 0) {
  return reinterpret_cast<T*>(shared_memory() + offset);
}

// --- mbarriers ---

struct Ring {
  uint64_t full[2], empty[2];
  float value[2];
};

void start_ring(unsigned consumers) {
  Ring& ring = *shared<Ring>();
  if (threadIdx.x == 0) {
    for (int i = 0; i < 2; ++i) {
      mbarrier_init(&ring.full[i], 1);
      mbarrier_init(&ring.empty[i], consumers);
    }
    mbarrier_init_fence();
  }
  __syncthreads();
}

// Thread 0 hands ten values to all others through two places.
void pass_values(float* out, uint32_t first_phase, bool releases, bool waits) {
  Ring& ring = *shared<Ring>();
  start_ring(blockDim.x - 1);
  float sum = 0;
  for (int i = 0; i < 10; ++i) {
    const int place = i % 2;
    const uint32_t phase = i / 2 % 2;
    if (threadIdx.x == 0) {
      mbarrier_wait(&ring.empty[place], phase ^ 1);
      ring.value[place] = float(i + 1);
      mbarrier_arrive(&ring.full[place]);
    } else {
      if (waits) mbarrier_wait(&ring.full[place], phase ^ first_phase);
      sum = 2 * sum + ring.value[place];
      if (releases) mbarrier_arrive(&ring.empty[place]);
    }
  }
  if (out) out[threadIdx.x] = sum;
}

void test_mbarriers() {
  const auto sums = run(70, 70, sizeof(Ring), [](float* out) { pass_values(out, 0, true, true); });
  float sum = 0;
  for (int i = 0; i < 10; ++i) sum = 2 * sum + float(i + 1);
  expect(sums[1] == sum && sums[69] == sum, "values pass through two places, in phases");
  expect(is_refused("threads wait for what never comes", 70, sizeof(Ring),
                    [] { pass_values(nullptr, 1, true, true); }),
         "a wait for the wrong phase");
  bool is_seen;
  try {
    is_seen = !all_same(run_in_every_order(70, 70, sizeof(Ring),
                                           [](float* out) { pass_values(out, 0, true, false); }));
  } catch (const Refused&) {
    is_seen = true;
  }
  expect(is_seen, "a missing wait is seen");
  expect(is_refused("threads wait for what never comes", 70, sizeof(Ring),
                    [] { pass_values(nullptr, 0, false, true); }),
         "a place that is never released");
  expect(is_refused("not initialised", 32, 8, [] { mbarrier_wait(shared<uint64_t>(), 0); }),
         "an mbarrier that is not initialised");
  expect(is_refused("more arrivals than are expected", 32, 8,
                    [] {
                      if (threadIdx.x) return;
                      mbarrier_init(shared<uint64_t>(), 1);
                      mbarrier_arrive(shared<uint64_t>(), 16);
                      mbarrier_arrive(shared<uint64_t>());
                    }),
         "an arrival too many");
}

// --- named barriers ---

void test_named_barriers() {
  const auto halves = [](float* out, bool waits) {
    float* values = shared<float>();
    const unsigned half = threadIdx.x / 64;
    values[threadIdx.x] = float(threadIdx.x);
    if (waits) named_barrier(64, 1 + half);
    out[threadIdx.x] = values[half * 64 + 63 - threadIdx.x % 64];
  };
  const auto found = run(128, 128, 512, [&](float* out) { halves(out, true); });
  expect(found[0] == 63 && found[64] == 127, "halves of a block that wait by themselves");
  expect(!all_same(run_in_every_order(128, 128, 512, [&](float* out) { halves(out, false); })),
         "a missing named barrier is seen");
  expect(is_refused("two numbers of threads", 128, 0,
                    [] { named_barrier(threadIdx.x < 32 ? 64 : 128, 1); }),
         "one barrier for two numbers of threads");
  expect(is_refused("what never comes", 96, 0, [] { named_barrier(128, 1); }),
         "a named barrier that not enough threads reach");
}

// --- TMA ---

constexpr int64_t kWidth = 88, kStride = 96, kCount = 21;

CUresult encode(CUtensorMap* map, const void* rows, int64_t stride, uint32_t box, uint32_t box_rows,
                CUtensorMapSwizzle swizzle) {
  const cuuint64_t sizes[] = {kWidth, kCount}, strides[] = {cuuint64_t(stride) * 2};
  const cuuint32_t boxes[] = {box, box_rows}, steps[] = {1, 1};
  return cuTensorMapEncodeTiled(map, CU_TENSOR_MAP_DATA_TYPE_FLOAT16, 2, const_cast<void*>(rows),
                                sizes, strides, boxes, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
                                swizzle, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                                CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
}

check::Fenced<uint16_t> numbered_rows() {
  std::vector<uint16_t> rows(kCount * kStride);
  for (int64_t i = 0; i < kCount * kStride; ++i)
    rows[i] = uint16_t(i / kStride * 256 + i % kStride);
  return check::Fenced<uint16_t>(rows);
}

// One box at (column, row) to the start of shared memory, and from there to `out`.
void load_box(const CUtensorMap& map, int32_t column, int32_t row, uint32_t expected, float* out,
              bool waits) {
  const uint32_t entries = map.box_width * map.box_rows;
  uint64_t* full = shared<uint64_t>(entries * 2);
  if (threadIdx.x == 0) {
    mbarrier_init(full, 1);
    mbarrier_init_fence();
    mbarrier_arrive(full, expected);
    load_tile(&map, full, shared<void>(), column, row);
  }
  __syncthreads();
  if (waits) mbarrier_wait(full, 0);
  if (!out) return;
  for (uint32_t i = threadIdx.x; i < entries; i += blockDim.x) out[i] = shared<uint16_t>()[i];
  __syncthreads();
  mbarrier_wait(full, 0);
}

void test_tma() {
  const auto rows = numbered_rows();
  CUtensorMap map;
  for (const auto& [column, row] : {std::pair(0, 0), {64, 8}, {24, -3}, {-8, 16}, {85, 0}}) {
    const bool ok =
        encode(&map, rows.data(), kStride, 64, 16, CU_TENSOR_MAP_SWIZZLE_128B) == CUDA_SUCCESS;
    const auto found = run(64, 1024, 2056, [&, c = column, r = row](float* out) {
      load_box(map, c, r, 2048, out, true);
    });
    // The eight pieces of a row of 128 bytes, by the row's place among eight.
    constexpr int kPlaces[8][8] = {{0, 1, 2, 3, 4, 5, 6, 7}, {1, 0, 3, 2, 5, 4, 7, 6},
                                   {2, 3, 0, 1, 6, 7, 4, 5}, {3, 2, 1, 0, 7, 6, 5, 4},
                                   {4, 5, 6, 7, 0, 1, 2, 3}, {5, 4, 7, 6, 1, 0, 3, 2},
                                   {6, 7, 4, 5, 2, 3, 0, 1}, {7, 6, 5, 4, 3, 2, 1, 0}};
    bool same = ok;
    for (int r = 0; r < 16; ++r) {
      for (int c = 0; c < 64; ++c) {
        const int64_t at_row = row + r, at_column = column + c;
        const bool inside = at_row >= 0 && at_row < kCount && at_column >= 0 && at_column < kWidth;
        const float expected = inside ? float(at_row * 256 + at_column) : 0.0f;
        same &= found[r * 64 + kPlaces[r % 8][c / 8] * 8 + c % 8] == expected;
      }
    }
    expect(same, "a box at column " + std::to_string(column) + ", row " + std::to_string(row));
  }

  for (const auto& [swizzle, box, shift] : {std::tuple(CU_TENSOR_MAP_SWIZZLE_64B, 32, 1),
                                            {CU_TENSOR_MAP_SWIZZLE_32B, 16, 2},
                                            {CU_TENSOR_MAP_SWIZZLE_NONE, 24, 0}}) {
    const bool ok = encode(&map, rows.data(), kStride, box, 8, swizzle) == CUDA_SUCCESS;
    const int width = box, pieces = box / 8;
    const auto found = run(64, width * 8, width * 16 + 8,
                           [&](float* out) { load_box(map, 0, 0, width * 16, out, true); });
    bool same = ok;
    for (int r = 0; r < 8; ++r) {
      for (int c = 0; c < width; ++c) {  // a line of 128 bytes holds 2, 4 rows
        const int piece = c / 8 ^ (shift ? (r >> shift) % pieces : 0);
        same &= found[r * width + piece * 8 + c % 8] == float(r * 256 + c);
      }
    }
    expect(same, "a box of " + std::to_string(box) + " columns");
  }

  const auto is_encoded = [&](const uint16_t* at, int64_t stride, uint32_t box, uint32_t box_rows) {
    return encode(&map, at, stride, box, box_rows, CU_TENSOR_MAP_SWIZZLE_128B) == CUDA_SUCCESS;
  };
  expect(is_encoded(rows.data(), kStride, 64, 256), "what cuTensorMapEncodeTiled takes");
  expect(!is_encoded(rows.data() + 4, kStride, 64, 16), "an address off a multiple of 16 bytes");
  expect(!is_encoded(rows.data(), kStride + 4, 64, 16), "a stride off a multiple of 16 bytes");
  expect(!is_encoded(rows.data(), kWidth - 8, 64, 16), "a stride within a row");
  expect(!is_encoded(rows.data(), kStride, 64, 257), "more than 256 rows");
  expect(!is_encoded(rows.data(), kStride, 72, 16), "more columns than are swizzled");
  expect(!is_encoded(rows.data(), kStride, 60, 16), "columns off a multiple of 16 bytes");

  is_encoded(rows.data(), kStride, 64, 16);
  expect(!all_same(run_in_every_order(64, 1024, 2056,
                                      [&](float* out) { load_box(map, 0, 0, 2048, out, false); })),
         "a copy that is not waited for");
  expect(is_refused("more bytes than are expected", 64, 2056,
                    [&] { load_box(map, 0, 0, 2032, nullptr, true); }),
         "fewer bytes expected than come");
  expect(
      is_refused("what never comes", 64, 2056, [&] { load_box(map, 0, 0, 2064, nullptr, true); }),
      "more bytes expected than come");
  expect(is_refused("outside shared memory", 64, 1032,
                    [&] {
                      if (threadIdx.x) return;
                      mbarrier_init(shared<uint64_t>(), 1);
                      mbarrier_init_fence();
                      load_tile(&map, shared<uint64_t>(), shared<void>(), 0, 0);
                    }),
         "a box that does not fit");
  expect(is_refused("without fence.mbarrier_init", 64, 4096,
                    [&] {
                      if (threadIdx.x) return;
                      mbarrier_init(shared<uint64_t>(2048), 1);
                      load_tile(&map, shared<uint64_t>(2048), shared<void>(), 0, 0);
                    }),
         "an mbarrier that is not fenced");
}

// --- wgmma ---

// Where entry (k, i) of an operand is, from the figures of MN-major layouts: patterns of eight
// rows, each of `pieces` 16-byte pieces, mixed as in a box of TMA.
size_t place_of(int k, int i, int pieces, size_t leading, size_t stride) {
  const int row = k % 8, piece = i / 8 % pieces;
  const int mixed = pieces == 8 ? piece ^ row : pieces == 4 ? piece ^ row / 2 : piece ^ row / 4;
  return i / (8 * pieces) * leading + k / 8 * stride + row * pieces * 16 + mixed * 16 + i % 8 * 2;
}

struct Layout {
  int pieces;
  size_t start, leading, stride;
  uint64_t descriptor() const {
    const uint64_t address = address_of(shared<void>(start)) >> 4;
    const uint64_t mode = pieces == 8 ? 1 : pieces == 4 ? 2 : 3;
    return address | uint64_t(leading >> 4) << 16 | uint64_t(stride >> 4) << 32 | mode << 62;
  }
  void put(int k, int i, uint16_t value) const {
    std::memcpy(shared<char>(start + place_of(k, i, pieces, leading, stride)), &value, 2);
  }
};

enum class Scale { Zero, One };

enum class Wrong {
  kNothing,
  kNoFence,
  kNoProxyFence,
  kNoWait,
  kOverwrites,
  kTouches,
  kDescriptors,
  kNotWaited
};

float bf16(uint16_t bits) { return widen_bfloat16(bits); }
uint16_t entry(int k, int i, int of) {  // small integers
  const float value = float((k * 7 + i * 3 + of * 5 + i / 16) % 9 - 4);
  return check::rounded<check::BFloat16>(value).bits;
}

template <int kColumns>
struct Multiplication {
  Layout a, b;
  Wrong wrong = Wrong::kNothing;
  bool adds = true;

  // out [64, kColumns] = 1 + 2 a^T b: twice in one group, then waited for.
  void operator()(float* out) const {
    for (int i = threadIdx.x; i < 16 * 64; i += kGroup)
      a.put(i / 64, i % 64, entry(i / 64, i % 64, 0));
    for (int i = threadIdx.x; i < 16 * kColumns; i += kGroup) {
      b.put(i / kColumns, i % kColumns, entry(i / kColumns, i % kColumns, 1));
    }
    if (wrong != Wrong::kNoProxyFence) hopper.fence_proxy();
    __syncthreads();
    float sum[kColumns / 2];
    std::fill_n(sum, kColumns / 2, 1.0f);
    const uint64_t of_a = a.descriptor() + (wrong == Wrong::kDescriptors && threadIdx.x == 77);
    if (wrong != Wrong::kNoFence) wgmma_fence();
    [&]<size_t... kIs>(std::index_sequence<kIs...>) {
      const auto multiply = Wgmma<kColumns, widen_bfloat16>::template multiply<
          Scale, std::remove_reference_t<decltype((void(kIs), sum[0]))>...>;
      multiply(of_a, b.descriptor(), Scale::One, sum[kIs]...);
      multiply(of_a, b.descriptor(), adds ? Scale::One : Scale::Zero, sum[kIs]...);
    }(std::make_index_sequence<kColumns / 2>());
    wgmma_commit();
    if (wrong == Wrong::kOverwrites && threadIdx.x == 5) b.put(15, kColumns - 1, 0);
    if (wrong == Wrong::kTouches) sum[3] = 0;
    if (wrong == Wrong::kNotWaited) return;
    if (wrong != Wrong::kNoWait) wgmma_wait(0);
    for (int i = 0; i < kColumns / 2 && out; ++i) {  // as PTX has it: four lanes to a row of eight
      const int row = int(threadIdx.x) / 32 * 16 + int(threadIdx.x) % 32 / 4 + (i % 4 > 1 ? 8 : 0);
      out[row * kColumns + i / 4 * 8 + threadIdx.x % 4 * 2 + i % 2] = sum[i];
    }
    if (wrong == Wrong::kNoWait) wgmma_wait(0);
  }

  size_t bytes() const { return b.start + 64 * 1024; }
  std::vector<float> found() const { return run(kGroup, 64 * kColumns, bytes(), *this); }
  bool is_right() const {
    const auto all = found();
    bool same = true;
    for (int m = 0; m < 64; ++m) {
      for (int n = 0; n < kColumns; ++n) {
        float sum = 0;
        for (int k = 0; k < 16; ++k) sum += bf16(entry(k, m, 0)) * bf16(entry(k, n, 1));
        same &= all[m * kColumns + n] == (adds ? 1 + 2 * sum : sum);
      }
    }
    return same;
  }
};

template <int kColumns>
bool is_wrong(Multiplication<kColumns> one, Wrong wrong, const std::string& with) {
  one.wrong = wrong;
  return is_refused(with, kGroup, one.bytes(), [&] { one(nullptr); });
}

void test_wgmma() {
  const Layout a = {8, 0, 0, 1024}, b = {8, 4096, 8192, 1024};
  const Multiplication<192> plain = {a, b};
  expect(plain.is_right(), "a product of 64 x 192");
  expect(Multiplication<192>{a, b, Wrong::kNothing, false}.is_right(),
         "a product that adds nothing");
  expect(Multiplication<256>{a, {8, 4096, 4096, 1024}}.is_right(), "a product of 64 x 256");
  expect(Multiplication<192>{{8, 1024, 0, 2048}, {8, 8192, 4096, 2048}}.is_right(),
         "rows that lie further apart");
  expect(Multiplication<192>{{4, 0, 2048, 512}, {4, 4096, 1024, 8192}}.is_right(),
         "a swizzle of 64 bytes");
  expect(Multiplication<192>{{2, 0, 1024, 256}, {2, 4096, 512, 8192}}.is_right(),
         "a swizzle of 32 bytes");

  expect(is_wrong(plain, Wrong::kNoFence, "without wgmma.fence"), "no wgmma.fence");
  expect(is_wrong(plain, Wrong::kNoProxyFence, "without fence.proxy.async"),
         "no fence.proxy.async");
  expect(is_wrong(plain, Wrong::kOverwrites, "changed under a product"), "operands overwritten");
  expect(is_wrong(plain, Wrong::kTouches, "accumulators written"), "accumulators written");
  expect(is_wrong(plain, Wrong::kDescriptors, "descriptors that differ"), "another descriptor");
  expect(is_wrong(plain, Wrong::kNotWaited, "still under way"), "a product left behind");
  Multiplication<192> early = plain;
  early.wrong = Wrong::kNoWait;
  const auto found = early.found();
  expect(std::all_of(found.begin(), found.end(), [](float one) { return std::isnan(one); }),
         "accumulators are NaN before they are waited for");
}

}  // namespace

int main() {
  test_mbarriers();
  test_named_barriers();
  test_tma();
  test_wgmma();
  return check::failures != 0;
}
