// What all attention operators share: sizes of a problem, tensors of a call, and what kernels know of them.
#pragma once

#include <cstddef>
#include <cstdint>

namespace attention {

enum class Type : int { kHalf, kBFloat16 };

constexpr int kLargestHead = 256;

// Of a problem.
struct Sizes {
  Type type;
  int64_t batch;
  int64_t tokens;
  int64_t query_heads;
  int64_t kv_heads;
  int64_t head_size;
  int64_t value_size;
  int64_t sinks;
  int64_t window;
  float scale;
  float softcap;  // 0: none
};

struct CallOperands {
  const void* query;       // [batch, query_heads, tokens, head_size]
  const void* query_sink;  // the same
  const void* key;         // [batch, kv_heads, tokens, head_size]
  const void* value;       // [batch, kv_heads, tokens, value_size]
  const int32_t* past_length;
  const int32_t* new_length;
  const float* decay;  // [query_heads], not negative
  void* output;        // [batch, query_heads, tokens, value_size]
  void* workspace;
};

// What kernels know of sizes.
struct Geometry {
  int batch;
  int tokens;
  int query_heads;
  int kv_heads;
  int repeat;  // query heads that share a key head
  int head_size;
  int value_size;
  int sinks;
  int sink_slots;
  int window;
  float scale;
  float softcap;
  int row_tiles;  // blocks per key head, of packed query rows
  int splits;     // of a row's keys
};

// A call's tensors as kernels take them.
template <class Element>
struct CallViews {
  const Element* query;
  const Element* query_sink;
  const Element* key;
  const Element* value;
  const int32_t* past_length;
  const int32_t* new_length;
  const float* decay;
  Element* output;
};

template <class Element>
void set_views(CallViews<Element>& views, const CallOperands& operands) {
  views.query = static_cast<const Element*>(operands.query);
  views.query_sink = static_cast<const Element*>(operands.query_sink);
  views.key = static_cast<const Element*>(operands.key);
  views.value = static_cast<const Element*>(operands.value);
  views.past_length = operands.past_length;
  views.new_length = operands.new_length;
  views.decay = operands.decay;
  views.output = static_cast<Element*>(operands.output);
}

// What parts of a row's keys leave for the launch that combines them.
template <class Float>
struct Parts {
  Float* sums;     // [rows, splits, value_size], not yet divided by
  Float* weights;  // [rows, splits, 2]: maximum and sum
};

}  // namespace attention
