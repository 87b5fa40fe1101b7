// Instantiates CUTLASS's product of 8-bit integers for Hopper, for one type of y, with or without an ending:
// compiled with ROTEXPORT_ELEMENT and ROTEXPORT_ENDS defined. Scales, bias and ending are those of
// quantized_linear_ending.h.

#include <cutlass/cutlass.h>
#include <cutlass/gemm/device/gemm_universal_adapter.h>

#include <cute/tensor.hpp>
#include <cutlass/epilogue/collective/collective_builder.hpp>
#include <cutlass/epilogue/fusion/operations.hpp>
#include <cutlass/gemm/collective/collective_builder.hpp>
#include <cutlass/gemm/kernel/gemm_universal.hpp>

#include "kernels/quantized_linear_ending.h"
#include "kernels/quantized_linear_hopper.h"

namespace quantized_linear {

// (sums, residual or gate, whether it is a gate) to y.
template <class Values>
struct End;

template <int kCount>
struct End<cutlass::Array<float, kCount>> {
  using Values = cutlass::Array<float, kCount>;

  CUTLASS_DEVICE Values operator()(const Values& values, const Values& others, const Values& gated) const {
    Values ended_values;
    CUTLASS_PRAGMA_UNROLL
    for (int i = 0; i < kCount; ++i) {
      const Ending ending = gated[i] > 0.0f ? Ending::kGate : Ending::kResidual;
      ended_values[i] = ended(ending, values[i], others[i]);
    }
    return ended_values;
  }
};

namespace {

namespace collective = cutlass::epilogue::collective;
namespace fusion = cutlass::epilogue::fusion;
using cute::_0;
using cute::_1;
using cute::_128;
using cute::_2;
using cute::_256;
using cutlass::layout::ColumnMajor;
using cutlass::layout::RowMajor;

constexpr auto kRound = cutlass::FloatRoundStyle::round_to_nearest;
using Tile = cute::Shape<_128, _256, _128>;
using Cluster = cute::Shape<_2, _1, _1>;  // two tiles of rows share the columns they read

template <class Element, bool kEnds>
struct Product {
  using RowScale = fusion::Sm90ColBroadcast<0, Tile, float, float, cute::Stride<_1, _0, _0>>;
  using ColumnVector = fusion::Sm90RowBroadcast<0, Tile, float, float, cute::Stride<_0, _1, _0>>;
  template <template <class> class Operation, class To>
  using Compute = fusion::Sm90Compute<Operation, To, float, kRound>;

  using Scaled = fusion::Sm90EVT<Compute<cutlass::multiplies, float>, ColumnVector, fusion::Sm90AccFetch>;
  template <class To>
  using Linear =
      fusion::Sm90EVT<Compute<cutlass::homogeneous_multiply_add, To>, RowScale, Scaled, ColumnVector>;
  using Ended = fusion::Sm90EVT<Compute<End, Element>, Linear<float>, fusion::Sm90SrcFetch<Element>,
                                fusion::Sm90ScalarBroadcast<float>>;
  using Fusion = std::conditional_t<kEnds, Ended, Linear<Element>>;
  using Other = std::conditional_t<kEnds, Element, void>;

  static constexpr int kAligned = 128 / cutlass::sizeof_bits<Element>::value;
  using Epilogue = typename collective::CollectiveBuilder<
      cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, Tile, Cluster, collective::EpilogueTileAuto,
      int32_t, float, Other, RowMajor, kAligned, Element, RowMajor, kAligned,
      cutlass::epilogue::TmaWarpSpecializedCooperative, Fusion>::CollectiveOp;
  static constexpr int kEpilogueBytes = static_cast<int>(sizeof(typename Epilogue::SharedStorage));
  using MainLoop = typename cutlass::gemm::collective::CollectiveBuilder<
      cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, int8_t, RowMajor, 16, int8_t, ColumnMajor, 16,
      int32_t, Tile, Cluster, cutlass::gemm::collective::StageCountAutoCarveout<kEpilogueBytes>,
      cutlass::gemm::KernelTmaWarpSpecializedCooperative>::CollectiveOp;
  using Kernel = cutlass::gemm::kernel::GemmUniversal<cute::Shape<int, int, int, int>, MainLoop, Epilogue>;
  using Gemm = cutlass::gemm::device::GemmUniversalAdapter<Kernel>;

  static typename Fusion::Arguments fusion_arguments(const Plan& plan, const Operands& operands) {
    const typename RowScale::Arguments rows{operands.x_scale, 0.0f, {}};
    const typename ColumnVector::Arguments columns{operands.weight_scale, 0.0f, {}};
    const typename ColumnVector::Arguments bias{operands.bias, 0.0f, {}};
    if constexpr (kEnds) {
      const float gated = plan.problem.ending == Ending::kGate ? 1.0f : 0.0f;
      return {{rows, {columns, {}, {}}, bias, {}}, {}, {{gated}}, {}};
    } else {
      return {rows, {columns, {}, {}}, bias, {}};
    }
  }
};

}  // namespace

template <class Element, bool kEnds>
Status launch_hopper(const Plan& plan, const Operands& operands, void* stream) {
  using Chosen = Product<Element, kEnds>;
  using Gemm = typename Chosen::Gemm;
  using Kernel = typename Gemm::GemmKernel;
  const Problem& p = plan.problem;
  const Geometry& g = plan.geometry;
  const typename Kernel::StrideA by_x{p.inputs, _1{}, 0};
  const typename Kernel::StrideB by_weight{p.group * p.groups, _1{}, 0};
  const typename Kernel::StrideC by_other{p.outputs, _1{}, 0};
  const typename Kernel::StrideD by_y{p.outputs, _1{}, 0};
  const typename Gemm::Arguments arguments{
      cutlass::gemm::GemmUniversalMode::kGemm,
      {g.rows, g.outputs, g.x_bytes, 1},
      {operands.x, by_x, operands.weight, by_weight},
      {Chosen::fusion_arguments(plan, operands), static_cast<const Element*>(operands.other), by_other,
       static_cast<Element*>(operands.y), by_y}};
  if (Gemm::get_workspace_size(arguments) > plan.workspace_bytes)
    return {"QuantizedLinear: no room for CUTLASS"};
  Gemm gemm;
  cutlass::Status status = gemm.can_implement(arguments);
  if (status == cutlass::Status::kSuccess) {
    status = gemm.run(arguments, operands.workspace, static_cast<cudaStream_t>(stream));
  }
  return {status == cutlass::Status::kSuccess ? nullptr : cutlass::cutlassGetStatusString(status)};
}

template Status launch_hopper<ROTEXPORT_ELEMENT, ROTEXPORT_ENDS>(const Plan&, const Operands&, void*);

}  // namespace quantized_linear
