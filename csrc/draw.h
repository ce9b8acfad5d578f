// SPDX-License-Identifier: MIT
// What is drawn from Philox: augmentation parameters, batches without replacement, weights.
// No sine or cosine and (by the build's -ffp-contract=off, --fmad=false) no contraction, so that
// the numbers are the same bits on every device.
#pragma once

#include "augment.h"
#include "philox.h"

namespace dmfast {

// ---- Augmentation ------------------------------------------------------------------------------

// The strategy's words by their code.
enum Word : int { kColor, kCrop, kCutout, kFlipWord, kScale, kRotate, kWords };

// Ranges of the parameters, from the published strengths and the size of the images.
struct AugmentationRanges {
  float brightness;              // b in [-brightness / 2, brightness / 2)
  float saturation;              // s in [0, saturation)
  float contrast;                // c in [contrast, contrast + 1)
  int crop_y, crop_x;            // shifts in [-crop, crop] pixels
  int cut_height, cut_width;     // pixels
  int cut_y_count, cut_x_count;  // how many centres there are
  float flip;                    // probability
  float scale_low, scale_span;   // factors in [low, low + span)
  float angle;                   // radians, in [-angle, angle)
};

// The word that group `group` uses in single mode: counter element 0 of the group.
DMFAST_HD int draw_choice(const Draw& draw, uint32_t group, int count) {
  return static_cast<int>(below(draw_words(draw, group, 0).word[0], static_cast<uint32_t>(count)));
}

// Fills one row of the table; `selected` has bit k set where word k is applied. Row r of a group
// takes counter elements 1 + 3 r to 3 + 3 r: twelve words, one place for each parameter whatever
// the strategy is.
DMFAST_HD void draw_row(const Draw& draw, uint32_t group, uint32_t row, unsigned selected,
                        const AugmentationRanges& range, float* params) {
  uint32_t word[12];
  for (uint32_t block = 0; block < 3; ++block) {
    const Words words = draw_words(draw, group, 1 + 3 * row + block);
    for (int i = 0; i < 4; ++i) word[4 * block + i] = words.word[i];
  }
  identity_row(params);
  if (selected >> kColor & 1) {
    params[kBrightness] = (uniform(word[0]) - 0.5f) * range.brightness;
    params[kSaturation] = uniform(word[1]) * range.saturation;
    params[kContrast] = uniform(word[2]) + range.contrast;
  }
  if (selected >> kCrop & 1) {
    params[kCropY] = static_cast<float>(
        static_cast<int>(below(word[3], 2 * static_cast<uint32_t>(range.crop_y) + 1)) -
        range.crop_y);
    params[kCropX] = static_cast<float>(
        static_cast<int>(below(word[4], 2 * static_cast<uint32_t>(range.crop_x) + 1)) -
        range.crop_x);
  }
  if (selected >> kCutout & 1) {
    params[kCutTop] = static_cast<float>(
        static_cast<int>(below(word[5], static_cast<uint32_t>(range.cut_y_count))) -
        range.cut_height / 2);
    params[kCutLeft] = static_cast<float>(
        static_cast<int>(below(word[6], static_cast<uint32_t>(range.cut_x_count))) -
        range.cut_width / 2);
    params[kCutHeight] = static_cast<float>(range.cut_height);
    params[kCutWidth] = static_cast<float>(range.cut_width);
  }
  if (selected >> kFlipWord & 1) params[kFlip] = uniform(word[7]) < range.flip ? 1.0f : 0.0f;
  if (selected >> kScale & 1) {
    params[kScaleX] = uniform(word[8]) * range.scale_span + range.scale_low;
    params[kScaleY] = uniform(word[9]) * range.scale_span + range.scale_low;
  }
  if (selected >> kRotate & 1) params[kAngle] = (2.0f * uniform(word[10]) - 1.0f) * range.angle;
}

// ---- Batches without replacement ---------------------------------------------------------------

// A keyed permutation of 0 .. n-1 in constant memory.
//
// Up to 64 elements are shuffled (Fisher and Yates; Durstenfeld's form): element i changes places
// with one from i on, by word i % 4 of counter element i / 4 of the class. More go through a
// Feistel network on the next power of two, walked until it falls below n again (twice on average
// at most): eight rounds of a 32-bit mixer, whose keys are counter elements 0 and 1. On fewer than
// 64 elements the network's halves would be so narrow that some orders come measurably more often
// than others.
class Permutation {
 public:
  DMFAST_HD Permutation(const Draw& draw, uint32_t group, uint32_t n) : n_(n) {
    if (n <= kShuffled) {
      for (uint32_t i = 0; i < n; ++i) shuffled_[i] = static_cast<uint8_t>(i);
      Words words;
      for (uint32_t i = 0; i < n; ++i) {
        if (i % 4 == 0) words = draw_words(draw, group, i / 4);
        const uint32_t other = i + below(words.word[i % 4], n - i);
        const uint8_t value = shuffled_[i];
        shuffled_[i] = shuffled_[other];
        shuffled_[other] = value;
      }
      return;
    }
    int bits = 7;
    while (bits < 32 && (uint64_t{1} << bits) < n) ++bits;
    low_bits_ = bits / 2;
    high_bits_ = bits - low_bits_;
    for (uint32_t block = 0; block < 2; ++block) {
      const Words words = draw_words(draw, group, block);
      for (int i = 0; i < 4; ++i) key_[4 * block + i] = words.word[i];
    }
  }

  // The image of i, 0 <= i < n.
  DMFAST_HD uint32_t operator()(uint32_t i) const {
    if (n_ <= kShuffled) return shuffled_[i];
    do i = network(i);
    while (i >= n_);
    return i;
  }

 private:
  // The finaliser of MurmurHash3: every input bit reaches every output bit.
  static DMFAST_HD uint32_t mix(uint32_t x) {
    x = (x ^ (x >> 16)) * 0x85EBCA6Bu;
    x = (x ^ (x >> 13)) * 0xC2B2AE35u;
    return x ^ (x >> 16);
  }

  DMFAST_HD uint32_t network(uint32_t i) const {
    const uint32_t low_mask = (1u << low_bits_) - 1, high_mask = (1u << high_bits_) - 1;
    uint32_t low = i & low_mask, high = i >> low_bits_;
    for (int round = 0; round < 8; round += 2) {
      high ^= mix(mix(low ^ key_[round]) + key_[round]) & high_mask;
      low ^= mix(mix(high ^ key_[round + 1]) + key_[round + 1]) & low_mask;
    }
    return high << low_bits_ | low;
  }

  static constexpr uint32_t kShuffled = 64;

  uint32_t n_;
  uint8_t shuffled_[kShuffled];
  int low_bits_, high_bits_;
  uint32_t key_[8];
};

// ---- Weights -----------------------------------------------------------------------------------

// Element `element` of a network's tensors (numbered through all of them, each tensor from a
// multiple of four), uniform in [-bound, bound). The product is the only rounding.
DMFAST_HD float draw_weight(const Words& words, int lane, float bound) {
  return (2.0f * uniform(words.word[lane]) - 1.0f) * bound;
}

}  // namespace dmfast
