#include "emulator/machine.h"
#include "host/memory.h"

namespace host {

using emulator::Machine;

DeviceBuffer::DeviceBuffer(size_t bytes, const char* name)
    : data_(Machine::instance().allocate(bytes, name)) {}
DeviceBuffer::~DeviceBuffer() {
  if (data_) Machine::instance().release(data_);
}
void DeviceBuffer::upload(const void* from, size_t bytes) { Machine::instance().upload(data_, from, bytes); }
void DeviceBuffer::download(void* to, size_t bytes) const { Machine::instance().download(to, data_, bytes); }

}  // namespace host
