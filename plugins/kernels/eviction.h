// Attention to a bounded cache that keeps what drew attention, and the choice of what stays, on raw device
// pointers: operators HeavyHitterAttention and SnapAttention.
//
// For each key head there are sinks, `window` slots that hold any tokens, and the call's own tokens. Query
// position i sees key position j <= i where j < sinks or i - j < context, with the logits of
// kernels/attention.h. A token that no sink slot holds has drawn
//
//   mass_j = sum over queries i of importance_i sum over the heads that share the key of weight_ij
//
// in the call, where importance is forget^(end - 1 - i) for heavy hitters, and 1 for the last `observe`
// tokens of a stream's first call, 0 elsewhere, for snapkv. Its score is what it had, times forget for every
// token of the call, and mass_j; snapkv scores the tokens of its call by their mass averaged over two tokens
// on each side. Then `window` tokens stay, in falling order of position: none with end - j >= context, the
// `recent` newest, and of the others those of the largest score |value|, the newer of equals. Freed slots are
// zeros.
//
// Launches that read the cache come first; one last launch writes it, so one buffer may be cache and updated
// cache. Sums are taken in a fixed order and counts are integers: equal inputs give equal results.
//
// Error. Outputs as in kernels/attention.h. With L the largest |logit| that a query sees, weights are within
// a relative 2^-17 (1 + L) of the exact ones, and so are scores: tokens whose score times norm differs by
// less may change places.
#pragma once

#include "kernels/attention_call.h"
#include "kernels/status.h"

namespace eviction {

using namespace attention;

enum class Policy : int { kHeavyHitter, kSnap };

struct Problem : Sizes {
  Policy policy;
  int64_t recent;
  int64_t context;
  int64_t observe;  // snapkv
  float forget;     // heavy hitters
};

constexpr int kCacheTensors = 6;

// Linear tensors [batch, kv_heads, slots, ...]. Sinks have at least one slot.
struct Cache {
  void* sink_key;
  void* sink_value;
  void* window_key;
  void* window_value;
  void* window_position;  // int32: 1 + position, 0 where a slot is empty
  void* window_score;     // float
};

struct Operands : CallOperands {
  Cache cache;
  Cache present;  // the cache after the call: the same buffers, or others
};

// What the kernels know of a policy.
struct Rules {
  Policy policy;
  int recent;
  int context;
  int observe;
  float log_forget;  // to base 2
};

// Bytes from the start of the workspace.
struct Offsets {
  size_t sums;      // float [rows, splits, value_size]: parts of outputs, where keys are split
  size_t weights;   // float [rows, splits, 2]: their maxima and sums
  size_t stats;     // float [rows, 2]: maximum and sum of each query's softmax
  size_t logits;    // float [heads, rows of a head, window + tokens]: of few queries, as softmax takes them
  size_t mass;      // float [heads, window + tokens]: slots first, then the call's tokens
  size_t norm;      // the same
  size_t score;     // float [heads, tokens + window]: the newest first, then slots
  size_t rank;      // the same, uint32
  size_t source;    // int32 [heads, window]: which of these goes to a slot
  size_t position;  // int32 [heads, window]: 1 + its position
  size_t kept;      // float [heads, window]: its score
  size_t moves;     // int32 [heads, 2]: see Choose
};

struct Plan {
  Problem problem;
  Geometry geometry;
  Rules rules;
  int size;  // heads are padded to it
  bool few;  // queries: logits are kept, so that what tokens drew needs no second look at the cache
  Offsets offsets;
  size_t workspace_bytes;
};

// Chooses how to run a problem. The message of a failure names the offending value.
Status make_plan(const Problem& problem, Plan& plan);

// Bytes of workspace that serve a legal problem and all with fewer tokens or rows.
size_t largest_workspace(const Problem& problem);

// Bytes of each tensor of a cache, in the order of Cache.
void cache_bytes(const Problem& problem, size_t (&bytes)[kCacheTensors]);

// Runs a plan; `stream` is a cudaStream_t. Operands are aligned to 16 bytes.
Status run(const Plan& plan, const Operands& operands, void* stream);

}  // namespace eviction
