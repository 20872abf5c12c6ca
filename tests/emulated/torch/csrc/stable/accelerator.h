// In place of torch's header of this name: tensors lie on the CPU, which has no device to guard and no stream.
#pragma once

#include <torch/csrc/stable/c/shim.h>

#include <cstdint>

namespace torch::stable::accelerator {
using DeviceIndex = int32_t;

struct DeviceGuard {
  explicit DeviceGuard(DeviceIndex) {}
  ~DeviceGuard() {}  // as torch's has one: no warning of an unused variable
};
}  // namespace torch::stable::accelerator

inline AOTITorchError aoti_torch_get_current_cuda_stream(int32_t, void** stream) {
  *stream = nullptr;
  return 0;
}
