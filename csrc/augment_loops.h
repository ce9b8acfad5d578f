// SPDX-License-Identifier: MIT
// The augmentation operators on the CPU: images from where they lie, through the steps of their
// plan, to where they belong; see cpu_isa.h for how this is compiled.
#pragma once

#include "augment_isa.h"
#include "augment_plan.h"
#include "augment_steps.h"
#include "convert_loops.h"
#include "loop_headers.h"

namespace dmfast {
namespace {

// Whether the elements of an image lie in memory as they do in the scratch images.
inline bool is_dense(const Images& x, const Layout& layout) {
  const int64_t row = layout.width * layout.adjacent;
  const bool rows =
      (layout.width == 1 || x.sx == layout.adjacent) && (layout.height == 1 || x.sy == row);
  return rows &&
         (layout.channels() == 1 || x.sc == (layout.channels_last() ? 1 : layout.height * row));
}

// Calls visit(i, at): element i of a scratch image is at that offset in an image of x.
template <typename Visit>
void for_each_element(const Images& x, const Layout& layout, const Visit& visit) {
  int64_t i = 0;
  for (int64_t plane = 0; plane < layout.planes; ++plane) {
    for (int64_t row = 0; row < layout.height; ++row) {
      const int64_t first = plane * x.sc + row * x.sy;
      for (int64_t column = 0; column < layout.width; ++column) {
        for (int64_t c = 0; c < layout.adjacent; ++c, ++i)
          visit(i, first + column * x.sx + c * x.sc);
      }
    }
  }
}

// ---- Where images come from and go to ----------------------------------------------------------

// Images of a batch, in its dtype. operator() gives image n as a scratch image: where it is one
// already itself, else converted to `scratch`.
template <typename acc_t>
struct Batch {
  const Images& x;
  const Layout& layout;
  bool dense;

  const acc_t* operator()(int64_t n, acc_t* scratch) const {
    const acc_t* image = scratch;
    with_dtype(x.dtype, [&](auto element) {
      using T = decltype(element);
      const T* from = static_cast<const T*>(x.data) + n * x.sn;
      if constexpr (std::is_same_v<T, acc_t>) {
        if (dense) {
          image = from;
          return;
        }
      }
      if (dense) {
        widen(from, layout.numel(), scratch);
      } else {
        for_each_element(x, layout,
                         [&](int64_t i, int64_t at) { scratch[i] = static_cast<acc_t>(from[at]); });
      }
    });
    return image;
  }
};

// Images picked and normalised.
template <typename acc_t>
struct Gathered {
  const Images& images;
  const int64_t* index;
  const Normalisation& normalisation;
  const Layout& layout;
  bool dense;

  const acc_t* operator()(int64_t n, acc_t* scratch) const {
    const int64_t first = index[n] * images.sn;
    if (images.dtype == DType::kUInt8) {
      pick(static_cast<const uint8_t*>(images.data) + first, scratch,
           [lookup = normalisation.lookup](uint8_t byte, int64_t c) {
             return lookup[c * 256 + byte];
           });
    } else {
      pick(static_cast<const float*>(images.data) + first, scratch,
           [mean = normalisation.mean, std = normalisation.std](float value, int64_t c) {
             return (value - mean[c]) / std[c];
           });
    }
    return scratch;
  }

 private:
  template <typename T, typename Normalise>
  void pick(const T* from, acc_t* scratch, const Normalise& normalise) const {
    const int64_t pixels = layout.pixels();
    if (dense && layout.channels() == 3 && layout.channels_last()) {
      for (int64_t p = 0; p < pixels; ++p) {
        for (int64_t c = 0; c < 3; ++c) scratch[3 * p + c] = normalise(from[3 * p + c], c);
      }
    } else if (dense && layout.channels() == 1) {
      for (int64_t p = 0; p < pixels; ++p) scratch[p] = normalise(from[p], 0);
    } else {
      int64_t c = 0;
      const int64_t run = layout.channels_last() ? 1 : pixels;  // elements of one channel
      int64_t left = run;
      for_each_element(images, layout, [&](int64_t i, int64_t at) {
        scratch[i] = normalise(from[at], c);
        if (--left == 0) {
          left = run;
          c = c + 1 < layout.channels() ? c + 1 : 0;
        }
      });
    }
  }
};

template <typename acc_t>
void store(const acc_t* image, const Layout& layout, bool dense, const Images& y, int64_t n) {
  with_dtype(y.dtype, [&](auto element) {
    using T = decltype(element);
    T* to = static_cast<T*>(y.data) + n * y.sn;
    if (dense) {
      narrow(image, layout.numel(), to);
    } else {
      for_each_element(y, layout,
                       [&](int64_t i, int64_t at) { to[at] = static_cast<T>(image[i]); });
    }
  });
}

// ---- The steps of a plan -----------------------------------------------------------------------

// An image on its way: each step writes to one of two scratch images, the last one straight to the
// output where that is one too.
template <typename acc_t>
struct Route {
  const acc_t* at;
  acc_t* scratch[2];
  acc_t* output;  // null: it is to be converted
  int steps;

  acc_t* next() { return --steps == 0 && output ? output : scratch[at == scratch[0] ? 1 : 0]; }
};

template <typename acc_t>
void copy_rows_of(const Plan<acc_t>& plan, const acc_t* from, acc_t* to) {
  using word_t = std::conditional_t<sizeof(acc_t) == 8, uint64_t, uint32_t>;
  copy_rows(plan.copies, plan.layout, reinterpret_cast<const word_t*>(from),
            reinterpret_cast<word_t*>(to));
}

// The steps that concern one image alone.
template <typename acc_t>
void recolor_and_shift(const Plan<acc_t>& plan, Route<acc_t>& route) {
  const auto shift = [&] {
    if (!plan.shifts) return;
    acc_t* to = route.next();
    copy_rows_of(plan, route.at, to);
    route.at = to;
  };
  if (plan.adjoint) shift();
  if (plan.colors) {
    acc_t* to = route.next();
    plan.adjoint ? color_adjoint(plan, route.at, to) : color(plan, route.at, to);
    route.at = to;
  }
  if (!plan.adjoint) shift();
}

// Images n .. n + count - 1, which share the plan of the workspace.
template <typename acc_t, typename Load>
void transform(Workspace<acc_t>& workspace, const Load& load, const Images& y, bool y_is_dense,
               int64_t n, int64_t count) {
  const Plan<acc_t>& plan = workspace.plan;
  const int64_t size = plan.layout.numel();
  const DType acc_dtype = sizeof(acc_t) == 8 ? DType::kFloat64 : DType::kFloat32;
  acc_t* scratch = workspace.images.at_least(2 * count * size);
  Route<acc_t> routes[Lanes<acc_t>::kCount];
  const acc_t* from[Lanes<acc_t>::kCount];
  acc_t* to[Lanes<acc_t>::kCount];
  for (int64_t i = 0; i < count; ++i) {
    Route<acc_t>& route = routes[i];
    route.scratch[0] = scratch + 2 * i * size;
    route.scratch[1] = route.scratch[0] + size;
    route.output =
        y_is_dense && y.dtype == acc_dtype ? static_cast<acc_t*>(y.data) + (n + i) * y.sn : nullptr;
    route.steps = plan.colors + plan.shifts + plan.warps();
    route.at = load(n + i, route.steps == 0 && route.output ? route.output : route.scratch[0]);
    if (!plan.adjoint) recolor_and_shift(plan, route);
  }
  if (plan.warps()) {
    for (int64_t i = 0; i < count; ++i) {
      from[i] = routes[i].at;
      to[i] = routes[i].next();
    }
    warp(workspace, from, to, count);
    for (int64_t i = 0; i < count; ++i) routes[i].at = to[i];
  }
  for (int64_t i = 0; i < count; ++i) {
    if (plan.adjoint) recolor_and_shift(plan, routes[i]);
    if (routes[i].at != routes[i].output) store(routes[i].at, plan.layout, y_is_dense, y, n + i);
  }
}

// Images that are copied, or copied row by row: not by way of acc_t, which loses the bits of some
// NaN and the time.
template <typename word_t, typename acc_t>
void copy_image(const Plan<acc_t>& plan, bool dense, const Images& x, const Images& y, int64_t n) {
  const word_t* from = static_cast<const word_t*>(x.data) + n * x.sn;
  word_t* to = static_cast<word_t*>(y.data) + n * y.sn;
  if (plan.shifts) {
    copy_rows(plan.copies, plan.layout, from, to);
  } else if (dense) {
    std::memcpy(to, from, plan.layout.numel() * sizeof(word_t));
  } else {
    const ImageSize size{plan.layout.channels(), plan.layout.height, plan.layout.width};
    for (int64_t c = 0; c < size.channels; ++c) {
      for (int64_t row = 0; row < size.height; ++row) {
        for (int64_t column = 0; column < size.width; ++column) {
          to[c * y.sc + row * y.sy + column * y.sx] = from[c * x.sc + row * x.sy + column * x.sx];
        }
      }
    }
  }
}

template <typename acc_t>
void copy_image_of(const Plan<acc_t>& plan, bool dense, const Images& x, const Images& y,
                   int64_t n) {
  switch (x.dtype) {
    case DType::kFloat64: return copy_image<uint64_t>(plan, dense, x, y, n);
    case DType::kFloat32: return copy_image<uint32_t>(plan, dense, x, y, n);
    default: return copy_image<uint16_t>(plan, dense, x, y, n);
  }
}

// ---- Ranges of images --------------------------------------------------------------------------

// Calls body(n, count) for runs of images that share a row, which is the workspace's plan then.
template <typename acc_t, typename Body>
void for_each_run(Workspace<acc_t>& workspace, const Layout& layout, const Rows& rows, bool adjoint,
                  int64_t begin, int64_t end, const Body& body) {
  for (int64_t n = begin; n < end;) {
    const float* row = rows.of(n);
    workspace.plan.make(row, layout, adjoint);
    const int64_t most = workspace.plan.warps() ? images_at_once<acc_t>(layout) : 1;
    int64_t count = 1;
    while (count < most && n + count < end && rows.of(n + count) == row) ++count;
    body(n, count);
    n += count;
  }
  workspace.trim();
}

template <typename acc_t>
void map_images(const Images& x, const Images& y, ImageSize size, const Rows& rows, bool adjoint,
                int64_t begin, int64_t end) {
  const Layout layout = Layout::of(size, y.sc == 1 && size.channels > 1);
  const bool x_is_dense = is_dense(x, layout), y_is_dense = is_dense(y, layout);
  const bool dense = x_is_dense && y_is_dense;
  const Batch<acc_t> load{x, layout, x_is_dense};
  Workspace<acc_t>& workspace = Workspace<acc_t>::mine();
  for_each_run(workspace, layout, rows, adjoint, begin, end, [&](int64_t n, int64_t count) {
    const Plan<acc_t>& plan = workspace.plan;
    if (plan.identity || (dense && !plan.colors && !plan.warps())) {
      copy_image_of(plan, dense, x, y, n);
    } else {
      transform(workspace, load, y, y_is_dense, n, count);
    }
  });
}

template <typename acc_t>
void gather_images(const Images& images, const int64_t* index, const Normalisation& normalisation,
                   const Images& y, ImageSize size, const Rows& rows, int64_t begin, int64_t end) {
  const Layout layout = Layout::of(size, y.sc == 1 && size.channels > 1);
  const bool y_is_dense = is_dense(y, layout);
  const Gathered<acc_t> load{images, index, normalisation, layout, is_dense(images, layout)};
  Workspace<acc_t>& workspace = Workspace<acc_t>::mine();
  for_each_run(workspace, layout, rows, false, begin, end, [&](int64_t n, int64_t count) {
    transform(workspace, load, y, y_is_dense, n, count);
  });
}

const AugmentLoops kLoops{&map_images<float>, &map_images<double>, &gather_images<float>,
                          &gather_images<double>};

}  // namespace
}  // namespace dmfast
