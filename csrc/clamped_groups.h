// SPDX-License-Identifier: MIT
// Groups of rows in kernels. The host has not read the offsets, so they may be anything: they are
// clamped to the rows, and no row is read or written that is not there. Where they do not ascend,
// a row may be found in no group; it is then as uncovered as one before the first or after the
// last.
#pragma once

#include <cstdint>

#include "host_device.h"

namespace dmfast {

struct ClampedGroups {
  const int64_t* offsets;  // [groups + 1] on the device, or null: evenly
  int64_t groups, rows;

  DMFAST_HD int64_t first(int64_t group) const {
    if (!offsets) return rows / groups * group;
    const int64_t offset = offsets[group];
    return offset < 0 ? 0 : offset < rows ? offset : rows;
  }

  // Rows of a group; 0 too where its offsets descend.
  DMFAST_HD int64_t count(int64_t group) const {
    const int64_t difference = first(group + 1) - first(group);
    return difference > 0 ? difference : 0;
  }

  // The group of a row, or -1.
  DMFAST_HD int64_t of(int64_t row) const {
    if (groups == 0) return -1;
    if (!offsets) return row / (rows / groups);
    int64_t low = 0, high = groups;  // the last group that starts at or before the row
    while (high - low > 1) {
      const int64_t middle = low + (high - low) / 2;
      if (first(middle) <= row) {
        low = middle;
      } else {
        high = middle;
      }
    }
    return first(low) <= row && row < first(low + 1) ? low : -1;
  }
};

}  // namespace dmfast
