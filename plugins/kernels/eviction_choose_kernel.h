// Which tokens of a key head stay, and where.
//
// Tokens are numbered as in the body: those of the call from the newest on, then those of the slots. A thread
// block ranks the tokens of one key head in whole numbers, finds the rank of the last that stays digit by
// digit, from counts of how many tokens have each digit, and gives slots to what stays in the order of its
// numbers. Of equals the first stay.
#pragma once

#include "kernels/eviction_tokens.h"

namespace eviction {

constexpr int kChooseThreads = 512;

class Choose {
  static constexpr int kWarps = kChooseThreads / 32;
  static constexpr int kDigits = 256;
  static constexpr uint32_t kUnusable = 0;
  static constexpr uint32_t kCertain = 0xffffffffu;
  // Words of shared memory.
  static constexpr unsigned kFound = kDigits;
  static constexpr unsigned kMoves = kFound + 2;
  static constexpr unsigned kCounts = kMoves + 2;

 public:
  static constexpr unsigned kSharedBytes = (kCounts + 2 * kWarps) * 4;

  template <class Element>
  ROTEXPORT_DEVICE Choose(const Geometry& g, const Rules& rules, const Views<Element>& views)
      : g_(g),
        rules_(rules),
        tokens_(g, views, head()),
        mass_(views.scratch.mass),
        norm_(views.scratch.norm),
        held_score_(static_cast<const float*>(views.cache.window_score)),
        score_(views.scratch.score),
        rank_(views.scratch.rank),
        scratch_(views.scratch),
        shared_(0) {
    const int64_t first = int64_t{head()} * count();
    mass_ = mass_.from(first);
    norm_ = norm_.from(first);
    score_ = score_.from(first);
    rank_ = rank_.from(first);
    held_score_ = held_score_.from(int64_t{head()} * g.window);
  }

  ROTEXPORT_DEVICE void run() {
    if (thread() < 2) shared_.store(kMoves + thread(), uint32_t{0});
    const float memory = rules_.policy == Policy::kHeavyHitter ? faded(rules_, tokens_.row.fresh) : 1.0f;
    for (int number = thread(); number < count(); number += kChooseThreads) {
      const float score = score_of(number, memory);
      score_.store(number, score);
      rank_.store(number, rank_of(number, score));
    }
    device::barrier();
    find_limit();
    assign();
    device::barrier();
    if (thread() < 2) {
      device::Global<int>(scratch_.moves)
          .from(int64_t{head()} * 2)
          .store(thread(), shared_.load<int>(kMoves + thread()));
    }
  }

 private:
  ROTEXPORT_DEVICE int count() const { return g_.tokens + g_.window; }

  // Of a number: its place in the call or among slots, where its mass is, its position if it is to be ranked.
  ROTEXPORT_DEVICE bool is_fresh(int number) const { return number < g_.tokens; }
  ROTEXPORT_DEVICE int place(int number) const {
    return is_fresh(number) ? g_.tokens - 1 - number : number - g_.tokens;
  }
  ROTEXPORT_DEVICE int column(int number) const {
    return is_fresh(number) ? g_.window + place(number) : place(number);
  }
  ROTEXPORT_DEVICE int usable_position(int number) const {
    const int j = is_fresh(number) ? tokens_.fresh(place(number)) : tokens_.held(place(number));
    return j != kNone && tokens_.end() - j < rules_.context ? j : kNone;
  }

  ROTEXPORT_DEVICE float score_of(int number, float memory) const {
    if (usable_position(number) == kNone) return 0;
    if (!is_fresh(number)) {
      return held_score_.load<float>(place(number)) * memory + mass_.load<float>(column(number));
    }
    return rules_.policy == Policy::kSnap ? mean_around(place(number)) : mass_.load<float>(column(number));
  }

  // Over the tokens of the call up to two away.
  ROTEXPORT_DEVICE float mean_around(int token) const {
    float sum = 0;
    int counted = 0;
    for (int other = token - 2; other <= token + 2; ++other) {
      if (tokens_.fresh(other) == kNone) continue;
      sum += mass_.load<float>(g_.window + other);
      ++counted;
    }
    return sum / static_cast<float>(counted);
  }

  // Larger is better. A score that is not a number ranks last.
  ROTEXPORT_DEVICE uint32_t rank_of(int number, float score) const {
    const int j = usable_position(number);
    if (j == kNone) return kUnusable;
    if (tokens_.end() - j <= rules_.recent) return kCertain;
    if (tokens_.row.fresh == 0) return kCertain;  // nothing comes, so nothing goes
    const float worth = score * norm_.load<float>(column(number));
    return 1 + (worth > 0 ? device::float_bits(worth) : 0u);
  }

  // The rank of the last that stays, and how many of this rank do.
  ROTEXPORT_DEVICE void find_limit() {
    limit_ = 0;
    quota_ = g_.window;
    for (int shift = 24; shift >= 0; shift -= 8) {
      if (thread() < kDigits) shared_.store(thread(), uint32_t{0});
      device::barrier();
      const uint32_t known = shift == 24 ? 0u : ~0u << (shift + 8);
      for (int number = thread(); number < count(); number += kChooseThreads) {
        const auto rank = rank_.load<uint32_t>(number);
        if ((rank & known) == limit_) shared_.atomic_add(rank >> shift & (kDigits - 1), 1u);
      }
      device::barrier();
      if (thread() < 32) find_digit();
      device::barrier();
      limit_ |= shared_.load<uint32_t>(kFound) << shift;
      quota_ = shared_.load<int>(kFound + 1);
    }
  }

  // One warp counts from the largest digit down, eight digits to a lane.
  ROTEXPORT_DEVICE void find_digit() const {
    constexpr int kEach = kDigits / 32;
    const int highest = kDigits - 1 - thread() * kEach;
    int own = 0;
    for (int i = 0; i < kEach; ++i) own += shared_.load<int>(highest - i);
    int reached = own;  // by this lane and those before
    for (int lanes = 1; lanes < 32; lanes *= 2) {
      const int before = device::shuffle(reached, thread() >= lanes ? thread() - lanes : thread());
      if (thread() >= lanes) reached += before;
    }
    int left = quota_ - (reached - own);
    if (left <= 0 || reached < quota_) return;
    int digit = highest;
    for (; shared_.load<int>(digit) < left; --digit) left -= shared_.load<int>(digit);
    shared_.store(kFound, static_cast<uint32_t>(digit));
    shared_.store(kFound + 1, static_cast<uint32_t>(left));
  }

  ROTEXPORT_DEVICE void assign() {
    const int warp = thread() / 32;
    const uint32_t lanes_before = (1u << thread() % 32) - 1;
    int above = 0;  // numbers before this round's whose rank is above the limit, and equal to it
    int equal = 0;
    for (int first = 0; first < count(); first += kChooseThreads) {
      const int number = first + thread();
      const uint32_t rank = number < count() ? rank_.load<uint32_t>(number) : 0;
      const bool is_above = number < count() && rank > limit_;
      const bool is_equal = number < count() && rank == limit_;
      const uint32_t above_mask = device::ballot(is_above);
      const uint32_t equal_mask = device::ballot(is_equal);
      if (thread() % 32 == 0) {
        shared_.store(kCounts + 2 * warp, static_cast<uint32_t>(device::population(above_mask)));
        shared_.store(kCounts + 2 * warp + 1, static_cast<uint32_t>(device::population(equal_mask)));
      }
      device::barrier();
      int above_here = above + device::population(above_mask & lanes_before);
      int equal_here = equal + device::population(equal_mask & lanes_before);
      for (int w = 0; w < kWarps; ++w) {
        const int above_there = shared_.load<int>(kCounts + 2 * w);
        const int equal_there = shared_.load<int>(kCounts + 2 * w + 1);
        above += above_there;
        equal += equal_there;
        if (w < warp) above_here += above_there;
        if (w < warp) equal_here += equal_there;
      }
      if (is_above || (is_equal && equal_here < quota_)) {
        put(number, rank, above_here + (equal_here < quota_ ? equal_here : quota_));
      }
      device::barrier();
    }
  }

  // What stays keeps its order: slots whose tokens come from the call or from a slot before are the first
  // ones, those whose tokens come from a slot behind the last. How far they reach is noted for Store.
  ROTEXPORT_DEVICE void put(int number, uint32_t rank, int slot) const {
    const int64_t at = int64_t{head()} * g_.window + slot;
    const int held = rank == kUnusable ? 0 : usable_position(number) + 1;
    device::Global<int>(scratch_.source).from(at).store(0, number);
    device::Global<int>(scratch_.position).from(at).store(0, held);
    device::Global<float>(scratch_.kept).from(at).store(0, score_.load<float>(number));
    const int from = is_fresh(number) ? kNone : place(number);
    const bool freed = from == slot && held == 0 && tokens_.slots.load<int>(slot) != 0;
    if (from < slot || freed) shared_.atomic_max(kMoves, static_cast<uint32_t>(slot + 1));
    if (from > slot) shared_.atomic_max(kMoves + 1, static_cast<uint32_t>(g_.window - slot));
  }

  static ROTEXPORT_DEVICE int head() { return static_cast<int>(device::block_index()); }
  static ROTEXPORT_DEVICE int thread() { return static_cast<int>(device::thread_index()); }

  const Geometry& g_;
  const Rules& rules_;
  Tokens tokens_;
  device::Global<const float> mass_;
  device::Global<const float> norm_;
  device::Global<const float> held_score_;
  device::Global<float> score_;
  device::Global<uint32_t> rank_;
  const Scratch& scratch_;
  device::Shared<uint32_t> shared_;
  uint32_t limit_;
  int quota_;
};

template <class Element>
ROTEXPORT_KERNEL void __launch_bounds__(kChooseThreads, 1)
    choose(Geometry geometry, Rules rules, Views<Element> views) {
  Choose(geometry, rules, views).run();
}

}  // namespace eviction
