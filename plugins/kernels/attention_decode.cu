// Instantiates decoding for one element type and cache format: compiled once for each, with ROTEXPORT_ELEMENT
// and ROTEXPORT_FORMAT defined.

#include "kernels/attention_decode_kernel.h"
#include "kernels/attention_launch.h"

namespace sink_window_attention {

template <class Element, Format kFormat>
Status launch_decode(const Plan& plan, const Operands& operands, void* opaque_stream) {
  const Geometry& g = plan.geometry;
  const auto stream = static_cast<device::Stream>(opaque_stream);
  auto* workspace = static_cast<char*>(operands.workspace);
  DecodeOperands<Element> views = {};
  set_views(views, operands);
  if (g.angles > 0) {
    views.key_mean = static_cast<const Element*>(operands.key_mean);
    views.means = reinterpret_cast<const float*>(workspace + plan.means_offset);
  }
  views.cache = operands.present;
  views.parts = {reinterpret_cast<float*>(workspace),
                 reinterpret_cast<float*>(workspace + plan.weights_offset)};
  const auto blocks = static_cast<unsigned>(g.batch * g.kv_heads * g.row_tiles * g.splits);
  const device::LaunchShape shape = {blocks, plan.threads, plan.shared_bytes};
  switch (plan.size) {
    case 64:
      return device::launch(decode<DecodeTraits<Element, kFormat, 64>>, shape, stream, g, views);
    case 128:
      return device::launch(decode<DecodeTraits<Element, kFormat, 128>>, shape, stream, g, views);
    case 256:
      return device::launch(decode<DecodeTraits<Element, kFormat, 256>>, shape, stream, g, views);
  }
  return {"SinkWindowAttention: the plan names a size that was not compiled"};
}

template Status launch_decode<ROTEXPORT_ELEMENT, Format::ROTEXPORT_FORMAT>(const Plan&, const Operands&,
                                                                           void*);

}  // namespace sink_window_attention
