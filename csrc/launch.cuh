// Launching a kernel: its grid, its shared memory, its cluster, and whether it may start before the one in front ends.
#pragma once

#include <cuda_runtime.h>

#include <type_traits>

#ifdef PHI4RV_EMULATED
#include "emulator/grid.h"
#endif

namespace phi4rv {

struct Launch {
  int blocks, threads;
  int shared = 0;      // bytes
  int cluster = 1;     // blocks
  bool early = false;  // programmatic dependent launch: the kernel calls wait_for_previous_kernel itself
};

template <typename... P>
cudaError_t launch_kernel(const Launch& l, cudaStream_t stream, void (*kernel)(P...), const std::type_identity_t<P>&... arguments) {
#ifdef PHI4RV_EMULATED
  return emulator::run(l.blocks, l.threads, l.shared, l.cluster, [&] { kernel(arguments...); });
#else
  cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, l.shared);
  // A multiprocessor divides itself into L1 and shared memory anew only when it is empty: kernels that overlap ask alike.
  if (!error && l.early)
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared);
  if (error) return error;
  cudaLaunchAttribute attributes[2]{};
  int count = 0;
  if (l.early) {
    attributes[count].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[count++].val.programmaticStreamSerializationAllowed = 1;
  }
  if (l.cluster > 1) {
    attributes[count].id = cudaLaunchAttributeClusterDimension;
    attributes[count++].val.clusterDim = {unsigned(l.cluster), 1, 1};
  }
  cudaLaunchConfig_t config{};
  config.gridDim = l.blocks, config.blockDim = l.threads, config.dynamicSmemBytes = l.shared, config.stream = stream;
  config.attrs = attributes, config.numAttrs = count;
  return cudaLaunchKernelEx(&config, kernel, arguments...);
#endif
}

}  // namespace phi4rv
