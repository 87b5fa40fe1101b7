// The packed query rows of one key head that a thread block takes: token by token, within a token the query
// heads that share the key head, so that a tile of keys and values is read once for all of them.
#pragma once

#include "kernels/attention_queries.h"

namespace attention {

// Blocks are numbered by key head, which counts through the batch, then by Traits::kRows rows, and, where
// Traits::kSplits, by the part of the keys that a block takes. Views are CallViews and what derives from it.
template <class Traits, class Geometry, class Views>
class QueryBlock {
 protected:
  using Element = typename Traits::Element;
  using Chunk = Vector<uint32_t, 4>;

  ROTEXPORT_DEVICE QueryBlock(const Geometry& geometry, const Views& views) : g_(geometry), views_(views) {}

  // Whether the block has a real token. If so, its queries are known from here on.
  ROTEXPORT_DEVICE bool begin() {
    const int first_token = first_row() / g_.repeat;
    const Row row = lengths();
    past_ = row.past;
    const int last_token = (first_row() + Traits::kRows - 1) / g_.repeat;
    first_query_ = row.past + first_token;
    last_query_ = row.past + (last_token < row.fresh ? last_token : row.fresh - 1);
    return first_token < row.fresh;
  }

  // A packed row of the block that has a query: rows behind the last one repeat it.
  ROTEXPORT_DEVICE int real_row(int row) const {
    const int last_row = (last_query_ - past_ + 1) * g_.repeat - 1;
    return first_row() + row < last_row ? first_row() + row : last_row;
  }
  // Index of its query among all.
  ROTEXPORT_DEVICE int64_t real_query(int row) const { return query_row(g_, key_head(), real_row(row)); }

  // Keeps the facts of rows first ... first + count - 1 for the warp: keep(row, facts). Returns whether any
  // of their logits decay.
  template <class Keep>
  ROTEXPORT_DEVICE bool prepare_rows(int first, int count, const Keep& keep) const {
    bool sloped = false;
    for (int i = lane(); i < count; i += 32) {
      const RowFacts facts = facts_of(g_, views_.decay, past_, key_head(), first_row() + first + i);
      keep(first + i, facts);
      sloped |= facts.slope != 0;
    }
    sloped = device::any(sloped);
    device::warp_barrier();
    return sloped;
  }

  // Writes the warp's rows first ... first + count - 1: value(row, column) for real tokens, zeros for
  // padding.
  template <class Value>
  ROTEXPORT_DEVICE void store(int first, int count, const Value& value) const {
    const int rows = g_.tokens * g_.repeat;
    const int fresh = lengths().fresh;
    const device::Global<Element> output(views_.output);
    for (int i = lane(); i < count * (Traits::kSize / 8); i += 32) {
      const int row = first + i / (Traits::kSize / 8);
      const int column = i % (Traits::kSize / 8) * 8;
      const int packed = first_row() + row;
      if (packed >= rows || column >= g_.value_size) continue;
      const bool real = packed / g_.repeat < fresh;
      output.from(query_row(g_, key_head(), packed) * g_.value_size)
          .store(column, real ? value(row, column) : Chunk{});
    }
  }
  static ROTEXPORT_DEVICE Chunk zeros(int, int) { return Chunk{}; }

  // What the block works on, found again rather than kept: sums need every register.
  static ROTEXPORT_DEVICE int block() { return static_cast<int>(device::opaque(device::block_index())); }
  ROTEXPORT_DEVICE int rows_block() const { return Traits::kSplits ? block() / g_.splits : block(); }
  ROTEXPORT_DEVICE int split() const { return block() % g_.splits; }
  ROTEXPORT_DEVICE int first_row() const { return rows_block() % g_.row_tiles * Traits::kRows; }
  ROTEXPORT_DEVICE int key_head() const { return rows_block() / g_.row_tiles; }
  ROTEXPORT_DEVICE Row lengths() const {
    return load_row(views_.past_length, views_.new_length, key_head() / g_.kv_heads, g_.tokens);
  }

  static ROTEXPORT_DEVICE int thread() { return static_cast<int>(device::thread_index()); }
  static ROTEXPORT_DEVICE int lane() { return thread() % 32; }

  const Geometry& g_;
  const Views& views_;
  int past_;
  int first_query_;
  int last_query_;
};

}  // namespace attention
