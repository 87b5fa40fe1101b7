// A small kernel of Hopper's asynchronous instructions for the emulator's own tests: right, or with one
// planted bug. A warp copies tiles; a warpgroup multiplies them, twice over the same buffers.

#include <cstring>
#include <string>

#include "emulated_buffers.h"
#include "kernels/warpgroup_device.h"

namespace {

using device::Global;
using device::Mbarrier;
using device::Shared;
using Half = device::Half;
using Piece = Vector<uint32_t, 4>;

constexpr unsigned kRows = 64;
constexpr unsigned kSize = 128;  // of a row; also keys
constexpr unsigned kKeysHeld = 120;
constexpr unsigned kRounds = 2;
constexpr unsigned kQueryPanel = kRows * device::kTileColumns;
constexpr unsigned kKeyPanel = kSize * device::kTileColumns;
constexpr unsigned kQueryBytes = 2 * kQueryPanel * 2;
constexpr unsigned kKeyBytes = 2 * kKeyPanel * 2;
constexpr unsigned kFull = kQueryBytes + kKeyBytes;
constexpr unsigned kEmpty = kFull + 8;
constexpr unsigned kSharedBytes = kEmpty + 8;
constexpr unsigned kThreads = 128 + 32;

// Names the tests use.
const char* const kBugs[] = {"none",
                             "keys are not waited for",
                             "fewer bytes are expected than copied",
                             "buffers are released before products are done",
                             "sums are read before products are done",
                             "weights change before products are done",
                             "registers are not fenced",
                             "operands are not fenced",
                             "operands are fenced behind the barrier",
                             "operands are written without a barrier",
                             "mbarriers are not fenced",
                             "mbarriers are used without a barrier",
                             "the wrong phase is waited for",
                             "tiles lie at odd places",
                             "half a warpgroup multiplies",
                             "too many arrive",
                             "products are never waited for",
                             "barriers of other counts"};

enum class Bug : int {
  kNone,
  kNoWait,
  kFewerBytes,
  kReleasedEarly,
  kSumsEarly,
  kWeightsChange,
  kNoRegisterFence,
  kNoProxyFence,
  kLateProxyFence,
  kNoBarrier,
  kNoMbarrierFence,
  kNoMbarrierBarrier,
  kWrongPhase,
  kOddPlace,
  kHalfWarpgroup,
  kTooManyArrive,
  kNeverWaited,
  kOtherCounts
};

struct Operands {
  const Half* query;  // [kRounds, kRows, kSize]
  device::TileMap keys;
  float* products;  // [kRounds, kRows, kSize]: query . keys^T
  float* outputs;   // the same: products rounded to Half . keys
};

void copy_keys(const Operands& operands, Bug bug) {
  const Shared<Half> keys(kQueryBytes);
  const Mbarrier full(kFull);
  const Mbarrier empty(kEmpty);
  for (unsigned round = 0; round < kRounds; ++round) {
    empty.wait((round + 1) % 2);
    full.arrive_expecting(bug == Bug::kFewerBytes ? kKeyBytes / 2 : kKeyBytes);
    if (bug == Bug::kTooManyArrive) full.arrive();
    for (unsigned panel = 0; panel < 2; ++panel) {
      const unsigned to = panel * kKeyPanel + (bug == Bug::kOddPlace ? 64 : 0);
      device::copy_tile(keys, to, operands.keys, static_cast<int>(panel * device::kTileColumns), 0,
                        static_cast<int>(round), full);
    }
  }
}

// Rows through registers into the swizzled layout.
void copy_queries(const Operands& operands, unsigned round, Bug bug) {
  const Shared<Half> query(0);
  const Global<const Half> from(operands.query + round * kRows * kSize);
  for (unsigned i = device::thread_index(); i < kRows * kSize / 8; i += 128) {
    const unsigned row = i / (kSize / 8);
    const unsigned piece = i % (kSize / 8);
    query.store(piece / 8 * kQueryPanel + row * 64 + (piece % 8 ^ row % 8) * 8, from.load<Piece>(i * 8));
  }
  const bool fences = bug != Bug::kNoProxyFence;
  if (fences && bug != Bug::kLateProxyFence) device::fence_async_proxy();
  const unsigned met = bug == Bug::kOtherCounts && device::thread_index() >= 64 ? 64 : 128;
  if (bug != Bug::kNoBarrier) device::named_barrier(1, met);
  if (fences && bug == Bug::kLateProxyFence) device::fence_async_proxy();
}

template <int N>
void store(float* to, device::Registers<float, N>& sums) {
  const unsigned thread = device::thread_index();
  for (unsigned i = 0; i < N; ++i) {
    const unsigned row = thread / 32 * 16 + thread % 32 / 4 + i / 2 % 2 * 8;
    Global<float>(to).store(row * kSize + i / 4 * 8 + thread % 4 * 2 + i % 2, sums.at(static_cast<int>(i)));
  }
}

void multiply(const Operands& operands, unsigned round, Bug bug) {
  const Shared<Half> query(0);
  const Shared<Half> keys(kQueryBytes);
  const Mbarrier empty(kEmpty);
  device::Registers<float, 64> sums;
  device::Registers<float, 64> outputs;
  device::Registers<uint32_t, 32> weights;
  if (bug == Bug::kHalfWarpgroup && device::thread_index() < 64) return;
  device::warpgroup_arrive();
  for (unsigned k = 0; k < kSize / 16; ++k) {
    const unsigned at = k % 4 * 16;
    const uint64_t a = device::describe_matrix(query, k / 4 * kQueryPanel + at, 0);
    const uint64_t b = device::describe_matrix(keys, k / 4 * kKeyPanel + at, 0);
    k == 0 ? device::multiply_shared<Half, false>(sums, a, b)
           : device::multiply_shared<Half, true>(sums, a, b);
  }
  device::warpgroup_commit();
  if (bug == Bug::kNeverWaited && round == kRounds - 1) return;
  if (bug == Bug::kSumsEarly) sums.at(0) = 0;
  device::warpgroup_wait<0>(sums);
  for (int i = 0; i < 32; ++i) {
    weights.at(i) = device::pack<Half>(sums.at(2 * i), sums.at(2 * i + 1));
    outputs.at(2 * i) = outputs.at(2 * i + 1) = 0;
  }
  if (bug != Bug::kNoRegisterFence) device::warpgroup_arrive();
  for (unsigned k = 0; k < kSize / 16; ++k) {
    device::multiply_registers<Half>(outputs, weights, static_cast<int>(4 * k),
                                     device::describe_matrix(keys, k * 16 * 64, kKeyPanel * 2));
  }
  device::warpgroup_commit();
  if (bug == Bug::kWeightsChange) weights.at(0) = 0;
  const bool releases = device::thread_index() % 32 == 0;
  if (releases && bug == Bug::kReleasedEarly) empty.arrive();
  device::warpgroup_wait<0>(outputs);
  if (releases && bug != Bug::kReleasedEarly) empty.arrive();
  store(operands.products + round * kRows * kSize, sums);
  store(operands.outputs + round * kRows * kSize, outputs);
}

ROTEXPORT_KERNEL void multiply_tiles(Operands operands, Bug bug) {
  const Mbarrier full(kFull);
  if (device::thread_index() == 128) {
    full.init(1);
    Mbarrier(kEmpty).init(4);
    if (bug != Bug::kNoMbarrierFence) device::fence_async_proxy();
  }
  if (bug != Bug::kNoMbarrierBarrier) device::barrier();
  if (device::thread_index() >= 128) {
    if (device::thread_index() == 128) copy_keys(operands, bug);
    return;
  }
  for (unsigned round = 0; round < kRounds; ++round) {
    copy_queries(operands, round, bug);
    if (bug != Bug::kNoWait) full.wait(bug == Bug::kWrongPhase ? (round + 1) % 2 : round % 2);
    multiply(operands, round, bug);
    device::named_barrier(2, 128);  // nobody reads these queries any more
  }
}

Bug bug_named(const char* name) {
  int i = 0;
  while (std::strcmp(kBugs[i], name) != 0) ++i;
  return static_cast<Bug>(i);
}

}  // namespace

extern "C" {

// query [2, 64, 128], keys [2, 120, 128] of halves. Returns 0, or 1 with the report in `message`.
int planted_warpgroup(const char* bug, uint64_t schedule, const uint16_t* query, const uint16_t* keys,
                      float* products, float* outputs, char* message, size_t capacity) {
  constexpr size_t kQueries = kRounds * kRows * kSize;
  auto& machine = emulator::Machine::instance();
  Buffers buffers;
  Operands operands{};
  operands.query = static_cast<const Half*>(buffers.upload(query, kQueries * 2, "query"));
  const void* held = buffers.upload(keys, kRounds * kKeysHeld * kSize * 2, "keys");
  device::make_tile_map(operands.keys, {held, kSize, kKeysHeld, kKeysHeld, kRounds}, kSize);
  operands.products = static_cast<float*>(buffers.allocate(kQueries * 4, "products"));
  operands.outputs = static_cast<float*>(buffers.allocate(kQueries * 4, "outputs"));
  machine.set_schedule(schedule);
  const Status status =
      device::launch(multiply_tiles, {1, kThreads, kSharedBytes}, nullptr, operands, bug_named(bug));
  machine.set_schedule(0);
  if (!status) return report(status.message, message, capacity);
  machine.download(products, operands.products, kQueries * 4);
  machine.download(outputs, operands.outputs, kQueries * 4);
  return 0;
}
}
