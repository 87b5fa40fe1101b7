// Small kernels for the emulator's own tests: each with one planted bug, and
// beside it the same kernel without.

#include <cstdio>
#include <functional>
#include <map>
#include <string>
#include <vector>

#include "kernels/attention_fp8.h"
#include "kernels/device.h"

namespace {

using device::Global;
using device::Shared;

constexpr unsigned kThreads = 64;

ROTEXPORT_KERNEL void copy(Global<const float> x, Global<float> y, int first, int count) {
  const int i = static_cast<int>(device::thread_index());
  if (i < count) y.store(i, x.from(first).load<float>(i));
}

ROTEXPORT_KERNEL void shared_bounds(Global<float> y, unsigned index) {
  const Shared<float> shared(0);
  if (device::thread_index() == 0) {
    shared.store(index, 1.0f);
    y.store(0, shared.load<float>(index));
  }
}

ROTEXPORT_KERNEL void shared_unwritten(Global<float> y, unsigned written) {
  const Shared<float> shared(0);
  const unsigned i = device::thread_index();
  if (i < written) shared.store(i, 1.0f);
  y.store(i, shared.load<float>(i));
}

ROTEXPORT_KERNEL void misaligned(Global<const float> x, Global<float> y, int first) {
  if (device::thread_index() == 0) y.store(0, x.load<Vector<float, 4>>(first).values[0]);
}

// Reverses 64 values through shared memory.
ROTEXPORT_KERNEL void reverse(Global<float> y, bool with_barrier) {
  const Shared<float> shared(0);
  const unsigned i = device::thread_index();
  shared.store(i, static_cast<float>(i));
  if (with_barrier) device::barrier();
  y.store(i, shared.load<float>(kThreads - 1 - i));
}

// Writes, reads across, then writes again: the second barrier keeps the last
// write from the readers.
ROTEXPORT_KERNEL void reuse(Global<float> y, bool with_second_barrier) {
  const Shared<float> shared(0);
  const unsigned i = device::thread_index();
  shared.store(i, static_cast<float>(i));
  device::barrier();
  y.store(i, shared.load<float>(kThreads - 1 - i));
  if (with_second_barrier) device::barrier();
  shared.store(i, 0.0f);
}

// The same inside each warp, where a warp barrier is enough.
ROTEXPORT_KERNEL void reverse_in_warp(Global<float> y, unsigned across, bool with_barrier) {
  const Shared<float> shared(0);
  const unsigned i = device::thread_index();
  shared.store(i, static_cast<float>(i));
  if (with_barrier) device::warp_barrier();
  y.store(i, shared.load<float>(i ^ across));
}

ROTEXPORT_KERNEL void divergent(Global<float> y, bool diverge) {
  if (diverge && device::thread_index() >= 32) {
    device::barrier();
  } else {
    device::barrier();
  }
  y.store(device::thread_index(), 1.0f);
}

ROTEXPORT_KERNEL void partial(Global<float> y, unsigned arriving) {
  y.store(device::thread_index(), 1.0f);
  if (device::thread_index() < arriving) device::barrier();
}

ROTEXPORT_KERNEL void shuffle(Global<float> y, uint32_t mask, unsigned lanes) {
  const unsigned i = device::thread_index();
  if (i % 32 < lanes) y.store(i, device::shuffle_xor(1.0f, 1, mask));
}

ROTEXPORT_KERNEL void mixed_collectives(Global<float> y, bool mix) {
  const unsigned i = device::thread_index();
  float value = 0;
  if (mix && i % 32 >= 16) {
    value = device::ballot(true) ? 1.0f : 0.0f;
  } else {
    value = device::shuffle_xor(1.0f, 1);
  }
  y.store(i, value);
}

ROTEXPORT_KERNEL void asynchronous(const float* x, Global<float> y, bool wait, bool synchronize) {
  const Shared<float> shared(0);
  const unsigned i = device::thread_index();
  if (i < kThreads / 4) device::copy_async(shared, 4 * i, x + 4 * i);
  device::copy_async_commit();
  if (wait) device::copy_async_wait<0>();
  if (synchronize) device::barrier();
  y.store(i, shared.load<float>(kThreads - 1 - i));
  device::copy_async_wait<0>();
}

ROTEXPORT_KERNEL void overlapping_blocks(Global<float> y, bool overlap) {
  const unsigned first = overlap ? 0 : device::block_index() * kThreads;
  y.store(first + device::thread_index(), 1.0f);
}

// A ring that one block reads while another has already begun to write it.
ROTEXPORT_KERNEL void read_and_write(Global<float> ring, Global<float> y, unsigned reads) {
  const unsigned i = device::thread_index();
  if (device::block_index() == reads) {
    y.store(i, ring.load<float>(i));
  } else if (device::block_index() == 0) {
    ring.store(i, 1.0f);
  }
}

ROTEXPORT_KERNEL void count(Global<float> y, bool atomically) {
  const Shared<int> shared(0);
  if (device::thread_index() == 0) shared.store(0, 0);
  device::barrier();
  if (atomically) {
    shared.atomic_add(0, 1);
  } else {
    shared.store(0, shared.load<int>(0) + 1);
  }
  device::barrier();
  y.store(device::thread_index(), static_cast<float>(shared.load<int>(0)));
}

// The order in which threads arrive: right in no schedule, and different in
// each.
ROTEXPORT_KERNEL void arrival_order(Global<float> y) {
  const Shared<float> shared(0);
  if (device::thread_index() == 0) shared.store(0, 0.0f);
  device::barrier();
  shared.atomic_add(0, 0.1f * static_cast<float>(1 + device::thread_index()));
  device::barrier();
  y.store(device::thread_index(), shared.load<float>(0));
}

// y (16x8) = a (16x16) . b (16x8): a through ldmatrix, b assembled by hand or
// through the transposing ldmatrix, one warp.
template <class T, bool kTransposes>
ROTEXPORT_KERNEL void product(Global<const T> a, Global<const T> b, Global<float> y) {
  using Row = Vector<uint32_t, 4>;
  using Element = Vector<uint16_t, 1>;
  const Shared<T> shared(0);
  const unsigned lane = device::thread_index();
  shared.template store<Row>(8 * lane, a.template load<Row>(8 * lane));
  device::warp_barrier();
  uint32_t left[4];
  device::load_matrices(left, shared, (lane % 16) * 16 + lane / 16 * 8);
  uint32_t right[2];
  if constexpr (kTransposes) {
    const Shared<T> rows(512);
    if (lane < 16) rows.template store<Row>(8 * lane, b.template load<Row>(8 * lane));
    device::warp_barrier();
    uint32_t twice[4];
    device::load_matrices_transposed(twice, rows, lane % 16 * 8);
    for (unsigned i = 0; i < 2; ++i) right[i] = twice[i];
  }
  for (unsigned i = 0; i < 2 && !kTransposes; ++i) {
    const unsigned k = lane % 4 * 2 + 8 * i;
    const uint32_t low = b.template load<Element>(k * 8 + lane / 4).values[0];
    const uint32_t high = b.template load<Element>((k + 1) * 8 + lane / 4).values[0];
    right[i] = low | high << 16;
  }
  float sums[4] = {};
  device::multiply_add<T>(sums, left, right);
  for (unsigned i = 0; i < 4; ++i) {
    y.store((lane / 4 + i / 2 * 8) * 8 + lane % 4 * 2 + i % 2, sums[i]);
  }
}

// y (16x8) = a (16x32) . b (8x32)^T in 8-bit integers, one warp.
ROTEXPORT_KERNEL void integer_product(Global<const int8_t> a, Global<const int8_t> b, Global<int32_t> y) {
  const unsigned g = device::thread_index() / 4;
  const unsigned q = device::thread_index() % 4;
  uint32_t left[4];
  uint32_t right[2];
  for (unsigned i = 0; i < 4; ++i) left[i] = a.load<uint32_t>((g + 8 * (i % 2)) * 32 + 16 * (i / 2) + 4 * q);
  for (unsigned i = 0; i < 2; ++i) right[i] = b.load<uint32_t>(g * 32 + 16 * i + 4 * q);
  int32_t sums[4] = {};
  device::multiply_add_int8(sums, left, right);
  for (unsigned i = 0; i < 4; ++i) y.store((g + i / 2 * 8) * 8 + 2 * q + i % 2, sums[i]);
}

using Floats = std::vector<float>;

float* device_copy(const Floats& values, const char* name) {
  auto& machine = emulator::Machine::instance();
  auto* data = static_cast<float*>(machine.allocate(values.size() * sizeof(float), name));
  machine.upload(data, values.data(), values.size() * sizeof(float));
  return data;
}

// Buffers of one run. y is two blocks of kThreads values.
struct Buffers {
  const float* x = device_copy(Floats(kThreads, 2.0f), "x");
  Global<const float> input{x};
  float* ring_data = device_copy(Floats(kThreads, 3.0f), "ring");
  Global<float> ring{ring_data};
  float* y_data =
      static_cast<float*>(emulator::Machine::instance().allocate(2 * kThreads * sizeof(float), "y"));
  Global<float> y{y_data};

  ~Buffers() {
    auto& machine = emulator::Machine::instance();
    for (const float* data : {x, static_cast<const float*>(ring_data), static_cast<const float*>(y_data)}) {
      machine.release(const_cast<float*>(data));
    }
  }
};

constexpr device::LaunchShape kOne{1, kThreads, kThreads * sizeof(float)};
constexpr device::LaunchShape kTwo{2, kThreads, 0};

template <class Kernel, class... Arguments>
std::function<Status(Buffers&)> case_of(Kernel kernel, device::LaunchShape shape, Arguments... arguments) {
  return [=](Buffers& buffers) { return device::launch(kernel, shape, nullptr, buffers.y, arguments...); };
}

std::function<Status(Buffers&)> copy_case(int first, int number) {
  return [=](Buffers& b) { return device::launch(copy, kOne, nullptr, b.input, b.y, first, number); };
}

std::function<Status(Buffers&)> asynchronous_case(bool wait, bool synchronize) {
  return [=](Buffers& b) { return device::launch(asynchronous, kOne, nullptr, b.x, b.y, wait, synchronize); };
}

const std::map<std::string, std::function<Status(Buffers&)>>& cases() {
  static const std::map<std::string, std::function<Status(Buffers&)>> table = {
      {"copy", copy_case(0, 64)},
      {"copy: reads past the end", copy_case(1, 64)},
      {"copy: reads before the start", copy_case(-1, 64)},
      {"copy: reads far outside", copy_case(1 << 28, 64)},
      {"misaligned: right",
       [](Buffers& b) { return device::launch(misaligned, kOne, nullptr, b.input, b.y, 4); }},
      {"misaligned", [](Buffers& b) { return device::launch(misaligned, kOne, nullptr, b.input, b.y, 2); }},
      {"unwritten global",
       [](Buffers& b) {
         return device::launch(copy, kOne, nullptr, Global<const float>(b.y_data), b.ring, 0, 1);
       }},
      {"shared bounds: right", case_of(shared_bounds, kOne, 63u)},
      {"shared bounds", case_of(shared_bounds, kOne, 64u)},
      {"unwritten shared: right", case_of(shared_unwritten, kOne, 64u)},
      {"unwritten shared", case_of(shared_unwritten, kOne, 63u)},
      {"reverse", case_of(reverse, kOne, true)},
      {"reverse: no barrier", case_of(reverse, kOne, false)},
      {"reuse", case_of(reuse, kOne, true)},
      {"reuse: no second barrier", case_of(reuse, kOne, false)},
      {"reverse in warp", case_of(reverse_in_warp, kOne, 31u, true)},
      {"reverse in warp: no barrier", case_of(reverse_in_warp, kOne, 31u, false)},
      {"reverse in warp: across warps", case_of(reverse_in_warp, kOne, 63u, true)},
      {"barrier", case_of(divergent, kOne, false)},
      {"barrier: divergent", case_of(divergent, kOne, true)},
      {"barrier: partial", case_of(partial, kOne, 32u)},
      {"barrier: all arrive", case_of(partial, kOne, 64u)},
      {"shuffle", case_of(shuffle, kOne, 0xffffffffu, 32u)},
      {"shuffle: half a warp", case_of(shuffle, kOne, 0xffffu, 16u)},
      {"shuffle: lanes missing", case_of(shuffle, kOne, 0xffffffffu, 16u)},
      {"shuffle: own lane not in mask", case_of(shuffle, kOne, 0xffffu, 32u)},
      {"collectives", case_of(mixed_collectives, kOne, false)},
      {"collectives: mixed", case_of(mixed_collectives, kOne, true)},
      {"asynchronous", asynchronous_case(true, true)},
      {"asynchronous: no wait", asynchronous_case(false, true)},
      {"asynchronous: no barrier", asynchronous_case(true, false)},
      {"blocks", case_of(overlapping_blocks, kTwo, false)},
      {"blocks: overlap", case_of(overlapping_blocks, kTwo, true)},
      {"ring: read",
       [](Buffers& b) { return device::launch(read_and_write, {1, kThreads, 0}, nullptr, b.ring, b.y, 0u); }},
      {"ring: read and written",
       [](Buffers& b) { return device::launch(read_and_write, kTwo, nullptr, b.ring, b.y, 1u); }},
      {"count", case_of(count, kOne, true)},
      {"count: not atomic", case_of(count, kOne, false)},
      {"arrival order", case_of(arrival_order, kOne)},
  };
  return table;
}

void report(const char* text, char* message, size_t capacity) {
  std::snprintf(message, capacity, "%s", text);
}

template <class T, bool kTransposes>
void run_product(const uint16_t* a, const uint16_t* b, float* y) {
  auto& machine = emulator::Machine::instance();
  void* device_a = machine.allocate(512, "a");
  void* device_b = machine.allocate(256, "b");
  void* device_y = machine.allocate(512, "y");
  machine.upload(device_a, a, 512);
  machine.upload(device_b, b, 256);
  const Status status = device::launch(
      product<T, kTransposes>, {1, 32, 768}, nullptr, Global<const T>(static_cast<T*>(device_a)),
      Global<const T>(static_cast<T*>(device_b)), Global<float>(static_cast<float*>(device_y)));
  if (status) machine.download(y, device_y, 512);
  for (void* data : {device_a, device_b, device_y}) machine.release(data);
}

}  // namespace

extern "C" {

// Runs a case under a schedule and reads back the first `count` values of y
// into `values`. Returns 0, or 1 with the report in `message`, or 2 when there
// is no such case.
int planted_run(const char* name, uint64_t schedule, unsigned number, float* values, char* message,
                size_t capacity) {
  const auto found = cases().find(name);
  if (found == cases().end()) return 2;
  auto& machine = emulator::Machine::instance();
  Buffers buffers;
  machine.set_schedule(schedule);
  const Status status = found->second(buffers);
  machine.set_schedule(0);
  if (!status) {
    report(status.message, message, capacity);
    return 1;
  }
  try {
    machine.download(values, buffers.y_data, number * sizeof(float));
  } catch (const emulator::Fault& fault) {
    report(fault.what(), message, capacity);
    return 1;
  }
  return 0;
}

void product_int8(const int8_t* a, const int8_t* b, int32_t* y) {
  auto& machine = emulator::Machine::instance();
  auto* device_a = static_cast<int8_t*>(machine.allocate(16 * 32, "a"));
  auto* device_b = static_cast<int8_t*>(machine.allocate(8 * 32, "b"));
  auto* device_y = static_cast<int32_t*>(machine.allocate(16 * 8 * sizeof(int32_t), "y"));
  machine.upload(device_a, a, 16 * 32);
  machine.upload(device_b, b, 8 * 32);
  device::launch(integer_product, {1, 32, 0}, nullptr, Global<const int8_t>(device_a),
                 Global<const int8_t>(device_b), Global<int32_t>(device_y));
  machine.download(y, device_y, 16 * 8 * sizeof(int32_t));
  for (void* buffer :
       {static_cast<void*>(device_a), static_cast<void*>(device_b), static_cast<void*>(device_y)})
    machine.release(buffer);
}
void product_half(const uint16_t* a, const uint16_t* b, float* y) {
  run_product<device::Half, false>(a, b, y);
}
void product_bfloat16(const uint16_t* a, const uint16_t* b, float* y) {
  run_product<device::BFloat16, false>(a, b, y);
}
void product_transposed_half(const uint16_t* a, const uint16_t* b, float* y) {
  run_product<device::Half, true>(a, b, y);
}
void product_transposed_bfloat16(const uint16_t* a, const uint16_t* b, float* y) {
  run_product<device::BFloat16, true>(a, b, y);
}
uint32_t multiply_add_halves(uint32_t a, uint32_t b, uint32_t c) {
  return device::multiply_add_pairs<device::Half>(a, b, c);
}
uint32_t multiply_add_bfloat16s(uint32_t a, uint32_t b, uint32_t c) {
  return device::multiply_add_pairs<device::BFloat16>(a, b, c);
}
// Pairs of the numbers of a word's bytes: by the instruction, and by what stands in for it.
void convert_fp8(uint32_t bytes, uint32_t* pairs) {
  device::convert_fp8<device::Half>(*reinterpret_cast<uint32_t (*)[2]>(pairs), bytes);
}
uint32_t widen_upper_fp8_half(uint32_t bytes) {
  return sink_window_attention::widen_upper_fp8<device::Half>(bytes);
}
uint32_t widen_upper_fp8_bfloat16(uint32_t bytes) {
  return sink_window_attention::widen_upper_fp8<device::BFloat16>(bytes);
}
uint32_t nearest_fp8(float size) { return sink_window_attention::nearest_fp8(size); }
uint16_t round_half(float value) { return device::Half::round(value); }
uint16_t round_bfloat16(float value) { return device::BFloat16::round(value); }
float widen_half(uint16_t bits) { return device::Half::widen(bits); }
}
