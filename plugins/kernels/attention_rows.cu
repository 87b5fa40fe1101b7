// Instantiates what happens to queries and keys before attention for one element type: compiled once for
// each, with ROTEXPORT_ELEMENT defined.

#include <cmath>

#include "kernels/attention_launch.h"
#include "kernels/attention_mean_kernel.h"
#include "kernels/attention_rows_kernel.h"

namespace sink_window_attention {
namespace {

// Collects sources, each behind the last one in the workspace.
template <class Element>
class Sources {
 public:
  explicit Sources(Element* workspace) : next_(workspace) {}

  // Returns where the rows will be.
  Element* add(const void* rows, const void* tails, int64_t count, int width, bool rotates) {
    found_[used_++] = {
        static_cast<const Element*>(rows), static_cast<const Element*>(tails), next_, count, width, rotates};
    Element* to = next_;
    next_ += count * width;
    total_ += count;
    return to;
  }
  int64_t total() const { return total_; }
  RowOperands<Element> operands(const void* signs, int64_t head_size) const {
    RowOperands<Element> views = {};
    for (int i = 0; i < used_; ++i) views.sources[i] = found_[i];
    views.signs = static_cast<const Element*>(signs);
    views.factor = 1.0f / std::sqrt(static_cast<float>(head_size));
    return views;
  }

 private:
  RowSource<Element> found_[kRowSources];
  int used_ = 0;
  int64_t total_ = 0;
  Element* next_;
};

}  // namespace

template <class Element>
Status launch_rows(const Plan& plan, const Operands& given, Operands& read, Operands& stored, void* stream) {
  const Geometry& g = plan.geometry;
  const int64_t cache_heads = int64_t{g.batch} * g.kv_heads;
  const int64_t queries = int64_t{g.batch} * g.query_heads * g.tokens;
  const bool extends = extends_rows(plan);
  const bool rotates = plan.problem.rotated != 0;
  const int width = arranged_width(plan);
  Sources<Element> sources(
      reinterpret_cast<Element*>(static_cast<char*>(given.workspace) + plan.rows_offset));
  read = stored = given;
  read.query = sources.add(given.query, extends ? given.mean_query : nullptr, queries, width, rotates);
  read.query_sink = sources.add(given.query_sink, nullptr, queries, width, rotates);
  read.key = sources.add(given.key, nullptr, cache_heads * g.tokens, width, rotates);
  if (rotates) stored.key = read.key;
  if (extends) {
    const Cache& cache = given.present;
    read.present.sink_key = sources.add(cache.sink_key, nullptr, cache_heads * g.sink_slots, width, false);
    read.present.recent_key = sources.add(cache.recent_key, nullptr, cache_heads * g.recent, width, false);
    if (rotates) stored.key = sources.add(given.key, nullptr, cache_heads * g.tokens, g.head_size, true);
  }
  const auto blocks = static_cast<unsigned>((sources.total() + kRowWarps - 1) / kRowWarps);
  return device::launch(arrange_rows<Element>, {blocks, 32 * kRowWarps, 0},
                        static_cast<device::Stream>(stream), g,
                        sources.operands(given.signs, plan.problem.head_size));
}

template <class Element>
Status launch_means(const Plan& plan, const Operands& operands, void* stream) {
  const Geometry& g = plan.geometry;
  MeanOperands<Element> views = {};
  views.query = static_cast<const Element*>(operands.mean_query);
  views.angles = static_cast<const Element*>(operands.mean_angles);
  views.past_length = operands.past_length;
  views.new_length = operands.new_length;
  views.products = reinterpret_cast<float*>(static_cast<char*>(operands.workspace) + plan.means_offset);
  const auto blocks = static_cast<unsigned>((g.batch * mean_tiles(g) + kMeanWarps - 1) / kMeanWarps);
  return device::launch(multiply_means<Element>, {blocks, 32 * kMeanWarps, 0},
                        static_cast<device::Stream>(stream), g, views);
}

template Status launch_rows<ROTEXPORT_ELEMENT>(const Plan&, const Operands&, Operands&, Operands&, void*);
template Status launch_means<ROTEXPORT_ELEMENT>(const Plan&, const Operands&, void*);

}  // namespace sink_window_attention
