// The fused product by the matrix unit of recent Xeons (AMX), which multiplies bfloat16.
#pragma once

#include "kernels/cpu/fused_product.h"

namespace gradnorm {

// Whether this processor has the unit and the system lets this process use it; asked for once.
bool has_amx();

// As exact as a product in float32, but what is below its smallest normal number counts as zero.
// Columns with an infinity, a NaN or what would round to one are left to `otherwise`.
double amx_product(const FusedRows& rows, float scale, bool overwrite, Tile<float> to,
                   std::vector<float>& scratch, FusedProduct* otherwise);

}  // namespace gradnorm
