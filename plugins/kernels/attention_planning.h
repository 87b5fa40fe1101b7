// What the planners of attention operators share.
#pragma once

#include <string>

#include "kernels/attention_call.h"
#include "kernels/planning.h"

namespace attention {

// Why no kernel takes these sizes, naming the value; empty where one does.
std::string complaint_about(const Sizes& sizes);

// Fills in what follows from sizes alone.
void describe(const Sizes& sizes, Geometry& geometry);

// Sizes to which heads are padded for products of matrices.
constexpr int kHeadSizes[] = {64, 80, 96, 128, 256};

// The smallest that holds a legal size.
int padded_head(int64_t size);

// Into how many parts a row's keys go for `blocks` blocks of queries, where more than `useful` parts gain
// nothing. The same on all devices: sums are then taken in the same order.
int count_splits(int64_t blocks, int64_t useful);

}  // namespace attention
