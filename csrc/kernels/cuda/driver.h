// Whether CUDA kernels can run here.
#pragma once

#include <string>

namespace gradnorm {

// Why they cannot: no driver, no device, no code for the device's architecture; empty if they can.
std::string cuda_problem();

}  // namespace gradnorm
