// SPDX-License-Identifier: MIT
// Philox 4x32-10, the counter-based generator of Salmon, Moraes, Dror and Shaw, "Parallel random
// numbers: as easy as 1, 2, 3" (SC 2011), and the one map from a random choice to its counter.
//
//   key     = (seed low 32 bits, seed high 32 bits)
//   counter = (element, group, stream, step)
//
// `step` is the iteration (of a condensing run) or the epoch or batch (of an evaluation), `stream`
// the purpose (dmfast.ops.Stream), `group` the class, the network or the row of parameters, and
// `element` counts the blocks of four words that one group consumes. Two choices that differ in
// purpose, step or group so never share a counter, and none depends on what was drawn before.
#pragma once

#include <cstdint>

#include "host_device.h"

namespace dmfast {

struct Words {
  uint32_t word[4];
};

struct Draw {
  uint64_t seed;
  uint32_t step;
  uint32_t stream;
};

DMFAST_HD Words philox(Words counter, uint32_t key0, uint32_t key1) {
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = uint64_t{0xD2511F53u} * counter.word[0];
    const uint64_t p1 = uint64_t{0xCD9E8D57u} * counter.word[2];
    counter = Words{
        {static_cast<uint32_t>(p1 >> 32) ^ counter.word[1] ^ key0, static_cast<uint32_t>(p1),
         static_cast<uint32_t>(p0 >> 32) ^ counter.word[3] ^ key1, static_cast<uint32_t>(p0)}};
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
  return counter;
}

DMFAST_HD Words draw_words(const Draw& draw, uint32_t group, uint32_t element) {
  return philox(Words{{element, group, draw.stream, draw.step}}, static_cast<uint32_t>(draw.seed),
                static_cast<uint32_t>(draw.seed >> 32));
}

// Uniform in [0, 1) with 24 bits: every value is a float32, and so is 1 minus it.
DMFAST_HD float uniform(uint32_t word) { return static_cast<float>(word >> 8) * 0x1p-24f; }

// Uniform integer in [0, n), n >= 1; the chance of any value is off by less than n / 2^32.
DMFAST_HD uint32_t below(uint32_t word, uint32_t n) {
  return static_cast<uint32_t>((uint64_t{word} * n) >> 32);
}

}  // namespace dmfast
