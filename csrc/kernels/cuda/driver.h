// Whether CUDA kernels can run here, and on how large a device.
#pragma once

#include <string>

namespace gradnorm {

// Why they cannot: no driver, no device, no code for the device's architecture; empty if they can.
std::string cuda_problem();

int multiprocessor_count(int device);

}  // namespace gradnorm
