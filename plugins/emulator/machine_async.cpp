// Named barriers, mbarriers, tile copies and warpgroup products of the emulated device.
#include <algorithm>
#include <cstring>

#include "emulator/machine.h"

namespace emulator {

void Machine::named_barrier(unsigned number, unsigned threads, const Site& site) {
  if (number >= named_barriers_.size() || threads % kWarp != 0 || threads == 0) {
    abandon(Fault("barrier " + std::to_string(number) + " of " + std::to_string(threads) + " threads, " +
                  to_string(site)));
  }
  clocks_.start();
  NamedBarrier& barrier = named_barriers_[number];
  if (!barrier.threads.empty() && barrier.expected != threads) {
    abandon(Fault("barrier " + std::to_string(number) + " is met by " + std::to_string(barrier.expected) +
                  " and by " + std::to_string(threads) + " threads, " + to_string(site)));
  }
  barrier.expected = threads;
  barrier.threads.push_back(current_);
  if (barrier.threads.size() < threads) {
    threads_[current_].state = State::kAtNamedBarrier;
    threads_[current_].meets_at = number;
    threads_[current_].waiting_at = site;
    wait();
    return;
  }
  clocks_.meet(barrier.threads);
  for (unsigned thread : barrier.threads) threads_[thread].state = State::kReady;
  barrier.threads.clear();
}

Mbarrier& Machine::mbarrier_at(void* at, const Site& site) {
  access(at, 8, Access::kRead, site);  // the initialization is ordered before
  const auto offset = static_cast<size_t>(static_cast<char*>(at) - shared_->data());
  for (Mbarrier& barrier : mbarriers_) {
    if (barrier.offset == offset) return barrier;
  }
  abandon(Fault("no mbarrier was initialized here, " + to_string(site)));
}

void Machine::mbarrier_init(void* at, unsigned arrivals, const Site& site) {
  clocks_.start();
  access(at, 8, Access::kWrite, site);
  std::memset(at, 0, 8);
  const auto offset = static_cast<size_t>(static_cast<char*>(at) - shared_->data());
  if (mbarriers_.size() == kMostMbarriers) abandon(Fault("too many mbarriers, " + to_string(site)));
  mbarriers_.push_back({offset, arrivals, arrivals, 0, 0, clocks_.none(), clocks_.none()});
}

void Machine::complete_phase(Mbarrier& barrier) {
  if (barrier.missing > 0 || barrier.bytes != 0) return;
  barrier.missing = barrier.arrivals;
  barrier.completed = barrier.arriving;
  ++barrier.phase;
}

void Machine::mbarrier_arrive(void* at, unsigned expected_bytes, const Site& site) {
  Mbarrier& barrier = mbarrier_at(at, site);
  if (barrier.missing == 0) abandon(Fault("more arrivals than the mbarrier counts, " + to_string(site)));
  clocks_.release(current_, barrier.arriving);
  barrier.bytes += expected_bytes;
  --barrier.missing;
  complete_phase(barrier);
}

// Goes on once it sees that the phase of this parity is over, as the instruction does: it cannot tell phases
// two apart, and who looks too late waits on.
void Machine::mbarrier_wait(void* at, unsigned parity, const Site& site) {
  const auto number = static_cast<unsigned>(&mbarrier_at(at, site) - mbarriers_.data());
  while (mbarriers_[number].phase % 2 == parity) {
    Thread& self = threads_[current_];
    self.state = State::kAtMbarrier;
    self.meets_at = number;
    self.parity = parity;
    self.waiting_at = site;
    wait();
  }
  clocks_.acquire(current_, mbarrier_at(at, site).completed);
}

bool Machine::wake_waiting() {
  bool woken = false;
  for (unsigned i = 0; i < shape_.block; ++i) {
    Thread& thread = threads_[i];
    if (thread.state != State::kAtMbarrier || mbarriers_[thread.meets_at].phase % 2 == thread.parity)
      continue;
    thread.state = State::kReady;
    woken = true;
  }
  return woken;
}

void Machine::fence_proxy() {
  clocks_.start();
  clocks_.learn(current_, fence_entry(shape_.block, current_), clocks_.tick(current_));
  Clock unused = clocks_.none();
  clocks_.release(current_, unused);  // what comes later is not fenced
}

void Machine::copy_tile(void* to, const TileMap& map, const TileIndex& index, void* mbarrier,
                        const Site& site) {
  Mbarrier& barrier = mbarrier_at(mbarrier, site);
  access(mbarrier, 8, Access::kOperandRead, site);  // the copies see the initialization too
  auto* start = static_cast<char*>(to);
  const auto offset = static_cast<size_t>(start - shared_->data());
  if (offset % 1024 != 0)
    abandon(Fault("a swizzled tile starts at a multiple of 1024 bytes, " + to_string(site)));
  for (unsigned i = 0; i < map.box_rows * kSwizzledRow; i += 16)
    access(start + i, 16, Access::kTileWrite, site);
  const PendingTile tile{map, index, start, static_cast<unsigned>(&barrier - mbarriers_.data()),
                         accessor().thread};
  for (unsigned row = 0; row < map.box_rows; ++row) {
    for (unsigned piece = 0; piece < 8; ++piece) {
      if (const char* from = tile.source(row, piece)) access(from, 16, Access::kRead, site);
    }
  }
  tiles_.push_back(tile);
  ++copied_tiles_;
}

const char* PendingTile::source(unsigned row, unsigned piece) const {
  const int64_t at_row = int64_t{index.row} + row;
  const int64_t column = int64_t{index.column} + 8 * piece;
  if (at_row < 0 || at_row >= map.rows || column < 0 || column >= map.columns) return nullptr;
  if (index.head < 0 || static_cast<unsigned>(index.head) >= map.heads) return nullptr;
  return map.data + ((int64_t{index.head} * map.rows + at_row) * map.columns + column) * 2;
}

// One tile arrives: the oldest, or any.
bool Machine::land_tile(std::mt19937_64* random) {
  if (tiles_.empty()) return false;
  const auto chosen = tiles_.begin() + static_cast<long>(random ? (*random)() % tiles_.size() : 0);
  const PendingTile tile = *chosen;
  tiles_.erase(chosen);
  Mbarrier& barrier = mbarriers_[tile.mbarrier];
  const unsigned entry = engine_entry(shape_.block, tile.mbarrier);
  for (unsigned row = 0; row < tile.map.box_rows; ++row) {
    for (unsigned piece = 0; piece < 8; ++piece) {
      char* to = shared_->data() + swizzled(tile.to - shared_->data() + row * kSwizzledRow + piece * 16);
      const char* from = tile.source(row, piece);
      from ? static_cast<void>(std::memcpy(to, from, 16)) : static_cast<void>(std::memset(to, 0, 16));
    }
  }
  const unsigned bytes = tile.map.box_rows * kSwizzledRow;
  shared_->land(tile.to, bytes, {tile.thread, 0, 0, barrier.phase + 1, entry});
  barrier.arriving[entry] = barrier.phase + 1;
  barrier.bytes -= bytes;
  complete_phase(barrier);
  return true;
}

void Machine::touch(RegisterGuard& guard, const Site& site) {
  require_done(guard, site);
  guard.touched = threads_[current_].register_fences;
}

void Machine::require_done(const RegisterGuard& guard, const Site& site) {
  if (guard.product == 0) return;
  if (guard.product > clocks_.of(current_)[products_entry(shape_.block, current_ / kWarp)]) {
    abandon(Fault("registers of a product that was not waited for, " + to_string(site)));
  }
}

void Machine::warpgroup_product(const ProductKind& kind, const Product& mine, const Site& site) {
  Thread& self = threads_[current_];
  for (const RegisterGuard* guard : {mine.sums_guard, mine.a_guard}) {
    if (guard && guard->touched == self.register_fences) {
      abandon(
          Fault("product of registers that were used since the last warpgroup_arrive, " + to_string(site)));
    }
  }
  ++self.products;
  for (RegisterGuard* guard : {mine.sums_guard, mine.a_guard}) {
    if (guard) guard->product = self.products;
  }
  products_.resize(std::max<size_t>(products_.size(), shape_.block));
  products_[current_] = mine;
  self.state = State::kInWarpgroup;
  self.collective = kind.name;
  self.waiting_at = site;
  const unsigned first = current_ / kWarpgroup * kWarpgroup;
  for (unsigned i = first; i < first + kWarpgroup; ++i) {
    if (i < shape_.block && threads_[i].state == State::kInWarpgroup) continue;
    wait();
    return;
  }
  for (unsigned i = first; i < first + kWarpgroup; ++i) {
    const Product& other = products_[i];
    if (threads_[i].collective != kind.name || other.b_matrix != mine.b_matrix ||
        other.a_matrix != mine.a_matrix || other.accumulates != mine.accumulates) {
      abandon(Fault("threads of one warpgroup meet in different products, " + to_string(site)));
    }
    threads_[i].state = State::kReady;
  }
  issue_product(kind, first, site);
}

// Operands are read and sums are written at once: until the product is waited for nobody may touch either.
void Machine::issue_product(const ProductKind& kind, unsigned first, const Site& site) {
  const Product& one = products_[first];
  uint16_t a[64 * 16];
  std::vector<uint16_t> b(kind.columns * 16);
  if (one.a) {
    gather_fragments(&products_[first], a);
  } else {
    read_operand(SharedMatrix(one.a_matrix, false), 64, 2, first, a, site);
  }
  const SharedMatrix matrix(one.b_matrix, kind.b_by_columns);
  if (kind.b_by_columns) {
    read_operand(matrix, 16, kind.columns / 8, first, b.data(), site);
  } else {
    read_operand(matrix, kind.columns, 2, first, b.data(), site);
  }
  const size_t along_k = kind.b_by_columns ? kind.columns : 1;
  const size_t along_columns = kind.b_by_columns ? 1 : 16;
  std::vector<float> wide(b.size());
  for (size_t k = 0; k < 16; ++k) {
    for (size_t n = 0; n < kind.columns; ++n) {
      wide[k * kind.columns + n] = kind.widen(b[k * along_k + n * along_columns]);
    }
  }
  std::vector<float> products(64 * kind.columns, 0.0f);
  for (size_t row = 0; row < 64; ++row) {
    for (size_t k = 0; k < 16; ++k) {
      const float factor = kind.widen(a[row * 16 + k]);
      for (size_t n = 0; n < kind.columns; ++n) {
        products[row * kind.columns + n] += factor * wide[k * kind.columns + n];
      }
    }
  }
  add_to_fragments(&products_[first], kind.columns, products.data());
}

void Machine::read_operand(const SharedMatrix& matrix, unsigned lines, unsigned pieces, unsigned first,
                           uint16_t* content, const Site& site) {
  if (const char* complaint = matrix.complaint())
    abandon(Fault(std::string(complaint) + ", " + to_string(site)));
  const unsigned caller = current_;
  for (unsigned line = 0; line < lines; ++line) {
    for (unsigned piece = 0; piece < pieces; ++piece) {
      const size_t offset = matrix.piece(line, piece);
      char* at = shared_->data() + offset;
      access(at, 16, Access::kOperandRead, site);
      for (unsigned warp = first / kWarp; warp < (first + kWarpgroup) / kWarp; ++warp) {
        current_ = warp * kWarp;  // each warp reads: one byte shows whether it may
        try {
          shared_->access(at, 1, Access::kOperandRead, accessor(), site);
        } catch (const Fault& fault) {
          fault_ = std::make_unique<Fault>(fault);
        }
        current_ = caller;
        if (fault_) abandon(Fault(*fault_));
        operand_reads_.record(offset, warp, threads_[first].products);
      }
      std::memcpy(content + (line * pieces + piece) * 8, at, 16);
    }
  }
}

void Machine::warpgroup_commit() {
  Thread& self = threads_[current_];
  self.product_groups.push_back(self.products);
}

void Machine::warpgroup_wait(size_t groups_left, const Site& site) {
  collective("warpgroup_wait", kFullMask, {}, [](Lanes&, uint32_t) {}, site);
  Thread& self = threads_[current_];
  while (self.product_groups.size() > groups_left) {
    clocks_.learn(current_, products_entry(shape_.block, current_ / kWarp), self.product_groups.front());
    self.product_groups.erase(self.product_groups.begin());
  }
}

}  // namespace emulator
