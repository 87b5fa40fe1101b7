// Sink/window attention over a bounded cache, and the cache's update, on raw device pointers.
//
// A row of the batch has seen `past` tokens and brings `fresh` new ones (at most Problem::tokens, padded on
// the right). Query position i sees key position j <= i where j < sinks or i - j < window:
//
//   logit = scale <query_sink_i, key_j>                    j < sinks
//         = scale <query_i, key_j>                         elsewhere
//   logit = softcap tanh(logit / softcap)                  softcap > 0
//   logit -= decay_h (i - j)                               j >= sinks
//
// and the output is the softmax-weighted sum of values; 0 for padded tokens. Sinks live in slot j of the sink
// tensors, other tokens in slot (j - sinks) mod window of a ring, as they are or as codes: levels of 8, 4 or
// 2 bits with a scale and a minimum per group of channels (graphs/QuantizeTokens.onnxtxt), or float8e4m3fn
// numbers with a scale per group (graphs/RoundToFp8.onnxtxt). Window tokens of the same call are then read as
// they will be stored.
//
// Of levels alone: with `recent` > 0 tokens less than `recent` behind a query are read in floating point,
// from a second ring. With `angles` > 0 the ring holds keys minus `key_mean`, and to the product of a query
// with a key of codes that of `mean_query` with the key's row of `mean_angles` is added. With `rotated`
// queries and keys are transformed first: x becomes (signs x) H / sqrt(head_size), H Sylvester's; means are
// of rotated keys.
//
// Launches that read the cache come first; one last launch writes it, every slot at most once, so one buffer
// may be cache and updated cache, and results do not depend on the order of blocks. Sums are taken in a fixed
// order: equal inputs give equal outputs.
//
// Error. Products and sums are float32, weights are rounded to the type T of the queries before they meet the
// values. With e = 2^-11 (float16) or 2^-8 (bfloat16), L the largest |logit| and V the largest |value| that a
// query sees, an output is within
//
//   (3 e + 2^-18 (1 + L)) V
//
// of the exact one (of rotated queries and keys: rounded to T); a code differs from the exact level's or
// number's rounding only at ties.
#pragma once

#include "kernels/attention_call.h"
#include "kernels/status.h"

namespace sink_window_attention {

using namespace attention;

enum class Format : int { kFloat, kInt8, kInt4, kInt2, kFp8 };

constexpr int kMostDecodedTokens = 16;

struct Problem : Sizes {
  Format format;         // of the window's ring
  int64_t recent;        // 0: no second ring
  int64_t key_groups;    // of a head, for codes
  int64_t value_groups;  // of a head, for codes
  int64_t angles;        // 0: keys are not centered
  int64_t rotated;       // 0 or 1
};

// Linear tensors [batch, kv_heads, slots, ...], of which the format leaves some out. Sinks have at least one
// slot.
struct Cache {
  void* sink_key;
  void* sink_value;
  void* window_key;
  void* window_value;
  void* window_key_scale;
  void* window_value_scale;
  void* recent_key;
  void* recent_value;
};

struct Operands : CallOperands {
  const void* key_mean;     // [batch, kv_heads, tokens, head_size]
  const void* mean_query;   // [batch, query_heads, tokens, angles]
  const void* mean_angles;  // [batch, window + tokens, angles]: of the ring's slots, then of the tokens
  const void* signs;        // [head_size]
  Cache cache;
  Cache present;  // the cache after the call: the same buffers, or others
};

// What the kernels know of a problem.
struct Geometry : attention::Geometry {
  int recent;
  int key_group;  // channels
  int value_group;
  int key_groups;
  int value_groups;
  int angles;
  int key_row;            // channels of queries and keys that prefill reads
  int key_group_inverse;  // channel * inverse >> 16 is channel / group
  int value_group_inverse;
  int stage_bytes;  // of a warp's tile of keys and values, when decoding
};

struct Plan {
  Problem problem;
  Geometry geometry;
  bool decodes;
  bool on_warpgroups;  // prefill with Hopper's instructions
  int size;            // heads are padded to it
  unsigned threads;
  unsigned shared_bytes;
  size_t weights_offset;  // in the workspace: maxima and sums of partial results
  size_t values_offset;   // in the workspace: staged values
  size_t means_offset;    // in the workspace: products with the mean key
  size_t rows_offset;     // in the workspace: queries and keys as attention reads them
  size_t workspace_bytes;
};

// Whether the library holds kernels of Hopper's warpgroup instructions, and the current device runs them.
bool has_warpgroups();

// Chooses how to run a problem on a device with or without warpgroup instructions. The message of a failure
// names the offending value.
Status make_plan(const Problem& problem, bool warpgroups, Plan& plan);

// Whether kernels of warpgroup instructions could run a plan, also where others are as fast.
bool warpgroups_take(const Plan& plan);

// Bytes of workspace that serve a legal problem and all with fewer tokens or rows.
size_t largest_workspace(const Problem& problem);

// Bytes of each tensor of a cache, in the order of Cache; 0 for those that the format leaves out.
void cache_bytes(const Problem& problem, size_t (&bytes)[8]);

// Runs a plan; `stream` is a cudaStream_t. Operands are aligned to 16 bytes.
Status run(const Plan& plan, const Operands& operands, void* stream);

}  // namespace sink_window_attention
