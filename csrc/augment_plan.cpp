// SPDX-License-Identifier: MIT
#include "augment_plan.h"

#include <algorithm>
#include <cstring>

namespace dmfast {
namespace {

int64_t clip(int64_t value, int64_t size) { return std::clamp<int64_t>(value, 0, size); }

}  // namespace

void RowCopies::make(const float* params, const Layout& layout, bool adjoint) {
  const int64_t height = layout.height, width = layout.width;
  const Shift<> shift(params, height, width);
  is_identity = shift.is_identity();
  if (is_identity) return;
  mirrored = shift.flip;
  // The adjoint reads where the forward map writes: crop turned round, the hole moved along.
  down = adjoint ? -shift.crop_y : shift.crop_y;
  first = mirrored ? width - 1 + shift.crop_x : adjoint ? -shift.crop_x : shift.crop_x;
  top = clip(-down, height);
  bottom = clip(height - down, height);
  left = clip(mirrored ? first - (width - 1) : -first, width);
  right = clip(mirrored ? first + 1 : width - first, width);
  bottom = std::max(top, bottom);
  right = std::max(left, right);
  const int64_t hole_down = adjoint ? shift.crop_y : 0, hole_right_by = adjoint ? shift.crop_x : 0;
  const bool mirrored_hole = mirrored && !adjoint;
  hole_top = clip(shift.cut_top + hole_down, height);
  hole_bottom = std::max(hole_top, clip(shift.cut_bottom + hole_down, height));
  hole_left = clip(mirrored_hole ? width - shift.cut_right : shift.cut_left + hole_right_by, width);
  hole_right =
      clip(mirrored_hole ? width - shift.cut_left : shift.cut_right + hole_right_by, width);
  if (hole_left >= hole_right) hole_top = hole_bottom;  // no hole

  const auto mark = [&](std::vector<int8_t>* marks, int64_t begin, int64_t end, int8_t value) {
    std::fill(marks->begin() + begin * layout.adjacent, marks->begin() + end * layout.adjacent,
              value);
  };
  const int64_t row = width * layout.adjacent;
  keep.assign(left > 0 || right < width ? row : 0, 0);
  if (!keep.empty()) mark(&keep, left, right, -1);
  keep_beside_hole.assign(hole_top < hole_bottom ? row : 0, 0);
  if (!keep_beside_hole.empty()) {
    mark(&keep_beside_hole, left, right, -1);
    mark(&keep_beside_hole, hole_left, hole_right, 0);
  }
}

// As Range::beside and tent, in a loop that becomes vectors.
template <typename acc_t>
void PixelMap<acc_t>::Pair::find(int32_t size) {
  const size_t count = source.size();
  for (size_t i = 0; i < count; ++i) {
    const acc_t centre = source[i];
    const bool inside = centre > acc_t(-1) && centre < acc_t(size);
    const acc_t safe = inside ? centre : acc_t(0);
    const int32_t whole = static_cast<int32_t>(safe);
    const int32_t low = whole - (static_cast<acc_t>(whole) > safe ? 1 : 0);
    const acc_t at_low = tent(safe - static_cast<acc_t>(low));
    const acc_t above = tent(safe - static_cast<acc_t>(low + 1));
    first[i] = low;
    weight[i] = inside && low >= 0 ? at_low : acc_t(0);
    next_weight[i] = inside && low + 1 < size ? above : acc_t(0);
  }
}

template <typename acc_t>
void PixelMap<acc_t>::make(const Warp<acc_t, int32_t>& warp) {
  const int32_t height = warp.height, width = warp.width;
  starts.resize(static_cast<size_t>(height) * width + 1);
  terms.resize(4 * (starts.size() - 1));
  for (Pair* pair : {&rows_, &columns_}) {
    pair->first.resize(width);
    for (auto* values : {&pair->source, &pair->weight, &pair->next_weight}) values->resize(width);
  }
  Term* const first = terms.data();
  Term* term = first;
  int32_t* start = starts.data();
  for (int32_t y = 0; y < height; ++y) {
    for (int32_t x = 0; x < width; ++x) warp.source(y, x, &rows_.source[x], &columns_.source[x]);
    rows_.find(height);
    columns_.find(width);
    for (int32_t x = 0; x < width; ++x) {
      *start++ = static_cast<int32_t>(term - first);
      const int32_t source = rows_.first[x] * width + columns_.first[x];
      const auto add = [&](int32_t pixel, acc_t weight) {
        *term = {pixel, weight};
        term += weight > acc_t(0);
      };
      add(source, rows_.weight[x] * columns_.weight[x]);
      add(source + 1, rows_.weight[x] * columns_.next_weight[x]);
      add(source + width, rows_.next_weight[x] * columns_.weight[x]);
      add(source + width + 1, rows_.next_weight[x] * columns_.next_weight[x]);
    }
  }
  *start = static_cast<int32_t>(term - first);
}

template <typename acc_t>
void PixelMap<acc_t>::transpose() {
  const int64_t pixels = static_cast<int64_t>(starts.size()) - 1;
  next_.assign(pixels + 1, 0);
  for (int32_t t = 0; t < starts[pixels]; ++t) ++next_[terms[t].source + 1];
  for (int64_t p = 0; p < pixels; ++p) next_[p + 1] += next_[p];
  spare_.resize(terms.size());
  std::vector<int32_t>& of_output = starts;
  for (int64_t p = 0; p < pixels; ++p) {
    for (int32_t t = of_output[p]; t < of_output[p + 1]; ++t) {
      spare_[next_[terms[t].source]++] = {static_cast<int32_t>(p), terms[t].weight};
    }
  }
  // Each entry has moved on to the start of the next.
  const int32_t count = starts[pixels];
  starts[0] = 0;
  std::copy(next_.begin(), next_.begin() + pixels, starts.begin() + 1);
  starts[pixels] = count;
  terms.swap(spare_);
}

template <typename acc_t>
void Plan<acc_t>::make(const float* row, const Layout& of_image, bool is_adjoint) {
  if (std::memcmp(params, row, sizeof params) == 0 && adjoint == is_adjoint &&
      std::memcmp(&layout, &of_image, sizeof layout) == 0) {
    return;
  }
  std::memcpy(params, row, sizeof params);
  layout = of_image;
  adjoint = is_adjoint;
  brightness = adjoint ? acc_t(0) : acc_t(row[kBrightness]);  // the adjoint of x + b is x
  saturation = acc_t(row[kSaturation]);
  contrast = acc_t(row[kContrast]);
  colors = brightness != acc_t(0) || saturation != acc_t(1) || contrast != acc_t(1);
  copies.make(row, layout, adjoint);
  shifts = !copies.is_identity;
  scales = row[kScaleX] != 1.0f || row[kScaleY] != 1.0f;
  rotates = row[kAngle] != 0.0f;
  identity = !colors && !shifts && !scales && !rotates;
  using warp_t = Warp<acc_t, int32_t>;
  const int32_t height = static_cast<int32_t>(layout.height);
  const int32_t width = static_cast<int32_t>(layout.width);
  if (scales) scale.make(warp_t::scale(row, height, width));
  if (rotates) rotate.make(warp_t::rotate(row, height, width));
  if (adjoint && scales) scale.transpose();
  if (adjoint && rotates) rotate.transpose();
}

template <typename acc_t>
Workspace<acc_t>& Workspace<acc_t>::mine() {
  thread_local Workspace workspace;
  return workspace;
}

template <typename acc_t>
void Workspace<acc_t>::trim() {
  constexpr size_t kKept = size_t{8} << 20;
  const size_t terms = plan.scale.terms.capacity() + plan.rotate.terms.capacity();
  if (images.bytes() + lanes.bytes() + terms * 4 * sizeof(acc_t) > kKept) *this = Workspace();
}

template struct Plan<float>;
template struct Plan<double>;
template struct Workspace<float>;
template struct Workspace<double>;

}  // namespace dmfast
