#include <cuda_runtime_api.h>

#include <algorithm>
#include <stdexcept>
#include <string>

#include "host/memory.h"

namespace host {
namespace {

constexpr int kPoison = 0xff;  // outputs that nothing writes show as NaN or -1

void check(cudaError_t error, const char* what) {
  if (error != cudaSuccess) throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(error));
}

}  // namespace

DeviceBuffer::DeviceBuffer(size_t bytes, const char* name) : data_(nullptr) {
  check(cudaMalloc(&data_, std::max<size_t>(bytes, 1)), name);
  check(cudaMemset(data_, kPoison, bytes), name);
}
DeviceBuffer::~DeviceBuffer() { cudaFree(data_); }
void DeviceBuffer::upload(const void* from, size_t bytes) {
  check(cudaMemcpy(data_, from, bytes, cudaMemcpyHostToDevice), "upload");
}
void DeviceBuffer::download(void* to, size_t bytes) const {
  check(cudaDeviceSynchronize(), "kernel");
  check(cudaMemcpy(to, data_, bytes, cudaMemcpyDeviceToHost), "download");
}

}  // namespace host
