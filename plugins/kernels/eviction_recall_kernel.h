// What a few queries gave each token besides the sinks, from the logits that attention kept: a thread per
// slot or new token of a key head, which adds up the queries in their order.
#pragma once

#include "kernels/eviction_tokens.h"

namespace eviction {

constexpr int kRecallThreads = 128;
constexpr unsigned kRecallShared = kFewRows * sizeof(QueryFacts);

template <class Element>
ROTEXPORT_KERNEL void __launch_bounds__(kRecallThreads)
    recall(Geometry g, Rules rules, Views<Element> views) {
  const int columns = g.window + g.tokens;
  const int blocks = tiles_of(columns, kRecallThreads);
  const int head = static_cast<int>(device::block_index()) / blocks;
  const int thread = static_cast<int>(device::thread_index());
  const int column = static_cast<int>(device::block_index()) % blocks * kRecallThreads + thread;
  const Tokens tokens(g, views, head);
  const int rows = tokens.row.fresh * g.repeat;
  const device::Shared<QueryFacts> facts(0);
  if (thread < rows) facts.store(thread, query_facts(g, rules, views, tokens, head, thread));
  device::barrier();
  if (column >= columns) return;
  const int j = column < g.window ? tokens.held(column) : tokens.fresh(column - g.window);
  if (j == kNone) return;
  const auto logits =
      device::Global<const float>(views.scratch.logits).from(int64_t{head} * g.tokens * g.repeat * columns);
  float sum = 0;
  for (int row = 0; row < rows; ++row) {
    const auto query = facts.template load<QueryFacts>(row);
    const int distance = query.position - j;
    if (distance < 0 || distance >= rules.context || !is_counted(rules, tokens, query.position)) continue;
    sum += device::exp2(logits.template load<float>(row * columns + column) - query.maximum) * query.count;
  }
  device::Global<float>(views.scratch.mass).from(int64_t{head} * columns).store(column, sum);
}

}  // namespace eviction
