// Which keys a query sees and where they are stored: shared by all kernels of sink/window attention.
#pragma once

#include "kernels/attention.h"
#include "kernels/attention_queries.h"

namespace sink_window_attention {

// Consecutive positions that are stored alike, and what sees them: i - j in [nearest, farthest).
struct Range {
  int first;
  int last;  // below first: empty
  int nearest;
  int farthest;

  ROTEXPORT_DEVICE int count() const { return last < first ? 0 : last - first + 1; }
  ROTEXPORT_DEVICE bool shows(int i, int j) const {
    return i - j >= nearest && i - j < farthest && j <= last;
  }
  // Whether queries i0 ... i1 all see keys j0 ... j1.
  ROTEXPORT_DEVICE bool shows_all(int i0, int i1, int j0, int j1) const {
    return i0 - j1 >= nearest && i1 - j0 < farthest && j1 <= last;
  }
};

// The ranges that queries i0 ... i1 see. Sinks are met by the queries of their own. Codes hold what is `far`;
// without codes `near` is the whole window.
enum Part : int { kSinks, kFar, kNear, kParts };

ROTEXPORT_DEVICE Range range_of(Part part, const Geometry& g, bool coded, int i0, int i1) {
  if (part == kSinks) return {0, (g.sinks <= i1 ? g.sinks : i1 + 1) - 1, 0, kForever};
  const bool far = part == kFar;
  const int nearest = far ? g.recent : 0;
  const int farthest = far || !coded ? g.window : g.recent;
  if (nearest == farthest || (far && !coded)) return {0, -1, 0, 0};
  const int first = i0 - farthest + 1;
  return {first < g.sinks ? g.sinks : first, i1 - nearest, nearest, farthest};
}

// Where positions are: those below `past` in slots, later ones in the call's own tensor.
struct Places {
  int past;
  int slots;
  int oldest;       // a position
  int oldest_slot;  // of it

  ROTEXPORT_DEVICE bool is_fresh(int j) const { return j >= past; }
  ROTEXPORT_DEVICE int token(int j) const { return j - past; }
  ROTEXPORT_DEVICE int slot(int j) const {
    const int straight = j - oldest + oldest_slot;
    return straight < slots ? straight : straight - slots;
  }
};

ROTEXPORT_DEVICE Places sink_places(int past, int sinks) { return {past, sinks, 0, 0}; }
// A ring of `slots`, after `past` tokens; asked only for positions from `sinks` on.
ROTEXPORT_DEVICE Places ring_places(int past, int sinks, int slots) {
  return {past, slots, past - slots, past < sinks ? 0 : (past - sinks) % slots};
}

}  // namespace sink_window_attention
