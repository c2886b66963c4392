// Which rows belong together, as plain pointers (gradnorm_ext/segments.py says what they mean).
#pragma once

#include <cstdint>

namespace gradnorm {

struct Segments {
  int64_t count;           // S
  const int64_t* offsets;  // [S + 1]: rows offsets[s] .. offsets[s + 1] are segment s
  const int64_t* walk;     // [S]: an order in which every group, and every output, is contiguous
  int64_t levels;          // L
  const int64_t*
      columns;  // [L, S]: where a segment's group of each level, fine to coarse, has its sqnorm
  const int64_t*
      outputs;  // [S] or null: which dw a segment's gradient is added to; null: all to dw[0]
};

}  // namespace gradnorm
