// What a kernel needs of the program it runs in: a matrix product and a parallel loop.
//
// The kernels have neither a BLAS nor threads of their own: a second OpenMP or BLAS beside torch's
// would fight it for the cores. The binding hands them torch's; the C++ tests hand them naive ones.
#pragma once

#include <cstdint>

namespace gradnorm {

template <typename T>
struct Matrix {
  T* data;
  int64_t rows, columns;
  int64_t row_stride, column_stride;
};

template <typename T>
struct Host {
  // c = alpha a b + beta c;  beta 0 overwrites whatever c held, NaN included.
  void (*multiply)(const Matrix<const T>& a, const Matrix<const T>& b, const Matrix<T>& c,
                   double alpha, double beta);

  // Calls body(begin, end, context) on disjoint ranges that cover [0, count), perhaps at once.
  void (*parallel_ranges)(int64_t count, void (*body)(int64_t begin, int64_t end, void* context),
                          void* context);

  // How many ranges may run at once.
  int64_t threads;

  // parallel_ranges for any callable (begin, end).
  template <typename Body>
  void parallel(int64_t count, const Body& body) const {
    if (count == 0) return;
    parallel_ranges(
        count,
        [](int64_t begin, int64_t end, void* context) {
          (*static_cast<const Body*>(context))(begin, end);
        },
        const_cast<void*>(static_cast<const void*>(&body)));
  }
};

}  // namespace gradnorm
