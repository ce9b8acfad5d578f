// SPDX-License-Identifier: MIT
// mma_cuda.h's operations of a warp, on the CPU.
#pragma once

#include <map>

#include "cuda_emulation.h"

namespace dmfast::emulation {

struct Operands {
  uint32_t a[4], b[2];
};

DMFAST_NO_TSAN inline void multiply_add(float (&c)[4], const uint32_t (&a)[4], uint32_t b0,
                                        uint32_t b1) {
  const Operands mine{{a[0], a[1], a[2], a[3]}, {b0, b1}};
  Slot bits{};
  static_assert(sizeof mine == sizeof bits, "one slot a lane");
  std::memcpy(&bits, &mine, sizeof bits);
  const Slot* slots = exchange(0xFFFFFFFF, bits);
  Quiet quiet;
  Operands all[kWarpSize];
  std::memcpy(all, slots, sizeof all);
  const auto half = [](uint32_t pair, unsigned which) {
    const uint32_t shifted = which ? pair & 0xFFFF0000 : pair << 16;
    float value;
    std::memcpy(&value, &shifted, sizeof value);
    return value;
  };
  const unsigned g = block.current->lane / 4, t = block.current->lane % 4;
  for (unsigned i = 0; i < 4; ++i) {
    const unsigned lower = i / 2, column = 2 * t + i % 2;
    for (unsigned k = 0; k < 16; ++k) {
      const uint32_t of_a = all[g * 4 + k % 8 / 2].a[lower + 2 * (k / 8)];
      const uint32_t of_b = all[column * 4 + k % 8 / 2].b[k / 8];
      c[i] += half(of_a, k % 2) * half(of_b, k % 2);
    }
  }
}

// The rows are read by the lane that gave their address, as a sanitizer should see it.
inline void load_matrices(uint32_t (&to)[4], const void* row) {
  if (reinterpret_cast<uintptr_t>(row) % 16) fail("a row of a matrix is misaligned");
  uint32_t words[4];
  std::memcpy(words, row, sizeof words);
  Slot bits{};
  std::memcpy(&bits, words, sizeof words);
  const Slot* slots = exchange(0xFFFFFFFF, bits);
  Quiet quiet;
  const unsigned lane = block.current->lane;
  for (unsigned i = 0; i < 4; ++i) {
    std::memcpy(words, &slots[8 * i + lane / 4], sizeof words);
    to[i] = words[lane % 4];
  }
}

// ---- Of a warpgroup ----------------------------------------------------------------------------

struct Matrix {
  const void* first;
  int next_depth, next_rows;  // in cells of 16 bytes

  // Of a row, 16 elements.
  void read(unsigned row, float (&to)[16]) const {
    for (unsigned k = 0; k < 16; ++k) {
      const char* const cell = static_cast<const char*>(first) +
                               16 * (row / 8 * static_cast<unsigned>(next_rows) + row % 8 +
                                     k / 8 * static_cast<unsigned>(next_depth));
      uint16_t half;
      std::memcpy(&half, cell + k % 8 * 2, sizeof half);
      const uint32_t bits = uint32_t{half} << 16;
      std::memcpy(&to[k], &bits, sizeof bits);
    }
  }
};

// A product that a thread has asked for. What it reads must be there from then until the wait: it
// is read at both ends, and must be the same.
struct Product {
  float (*sums)[4];
  Matrix a, b;
  std::vector<float> rows, columns;
  unsigned group;

  void read(std::vector<float>& of_a, std::vector<float>& of_b) const {
    of_a.resize(2 * 16);
    of_b.resize(32 * 16);
    const Fiber& fiber = *block.current;
    const unsigned g = fiber.lane / 4, t = fiber.lane % 4;
    float values[16];
    for (unsigned i = 0; i < 2; ++i) {
      a.read(fiber.warp % 4 * 16 + g + 8 * i, values);
      std::copy(values, values + 16, of_a.begin() + 16 * i);
    }
    for (unsigned i = 0; i < 32; ++i) {
      b.read(i / 2 * 8 + 2 * t + i % 2, values);
      std::copy(values, values + 16, of_b.begin() + 16 * i);
    }
  }
};

struct Products {
  std::vector<Product> asked;
  unsigned groups = 0;
};

inline Products& products_of_thread() {
  static std::map<const Fiber*, Products> all;
  Quiet quiet;
  return all[block.current];
}

inline void multiply_add(float (&sums)[16][4], const Matrix& a, const Matrix& b) {
  Products& mine = products_of_thread();
  Product product{sums, a, b, {}, {}, mine.groups};
  product.read(product.rows, product.columns);
  mine.asked.push_back(std::move(product));
}

inline void commit_products() { ++products_of_thread().groups; }

inline void wait_for_products(unsigned left) {
  Products& mine = products_of_thread();
  std::vector<Product> rest;
  for (Product& product : mine.asked) {
    if (product.group + left >= mine.groups) {
      rest.push_back(std::move(product));
      continue;
    }
    std::vector<float> rows, columns;
    product.read(rows, columns);
    const auto differ = [](const std::vector<float>& x, const std::vector<float>& y) {
      return std::memcmp(x.data(), y.data(), x.size() * sizeof(float)) != 0;
    };
    if (differ(rows, product.rows) || differ(columns, product.columns)) {
      fail("shared memory changed under a product");
    }
    for (unsigned j = 0; j < 16; ++j) {
      for (unsigned i = 0; i < 4; ++i) {
        const float* const row = &rows[i / 2 * 16];
        const float* const column = &columns[(2 * j + i % 2) * 16];
        for (unsigned k = 0; k < 16; ++k) product.sums[j][i] += row[k] * column[k];
      }
    }
  }
  mine.asked = std::move(rest);
}

}  // namespace dmfast::emulation
