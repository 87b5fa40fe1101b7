// Device memory for the host: the emulator's or the GPU's. Every function throws std::runtime_error.
#pragma once

#include <cstddef>

namespace host {

class DeviceBuffer {
 public:
  DeviceBuffer(size_t bytes, const char* name);
  ~DeviceBuffer();
  DeviceBuffer(DeviceBuffer&& other) noexcept : data_(other.data_) { other.data_ = nullptr; }
  DeviceBuffer(const DeviceBuffer&) = delete;
  DeviceBuffer& operator=(const DeviceBuffer&) = delete;

  void* data() const { return data_; }
  void upload(const void* from, size_t bytes);
  // Waits for the device first.
  void download(void* to, size_t bytes) const;

 private:
  void* data_;
};

}  // namespace host
