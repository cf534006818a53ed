// The device a launch goes to, and what a status means.
#include "common.h"
#include "kernels.h"

namespace bertfast {

int set_device(int device) {
#if defined(BERTFAST_EMULATION)
  (void)device;
  return 0;
#else
  return static_cast<int>(cudaSetDevice(device));
#endif
}

#if !defined(BERTFAST_EMULATION)
namespace {
__global__ void nothing(int) {}
}  // namespace
#endif

int try_device(int device) {
#if defined(BERTFAST_EMULATION)
  (void)device;
  return 0;
#else
  if (const cudaError_t failed = cudaSetDevice(device)) return static_cast<int>(failed);
  cudaFuncAttributes attributes;
  return static_cast<int>(
      cudaFuncGetAttributes(&attributes, reinterpret_cast<const void*>(&nothing)));
#endif
}

const char* status_text(int status) {
#if defined(BERTFAST_EMULATION)
  (void)status;
  return emulation::Emulator::the().error.c_str();
#else
  return cudaGetErrorString(static_cast<cudaError_t>(status));
#endif
}

}  // namespace bertfast
