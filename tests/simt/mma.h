// Stands in for the hardware behind csrc/cuda/mma.cuh: the lanes hand their words to each other. Products are exact,
// their sum is a double, of which a float's bits are kept: how tensor cores round is not documented, and the nearest
// float would flatter them.
#pragma once
#include <cmath>
#include <stdexcept>
#include <type_traits>

namespace tokred {

// No address depends on a product: what only counts them does without, a hundred times faster.
#ifdef SIMT_COUNTING
constexpr bool kOnlyCounts = true;
#else
constexpr bool kOnlyCounts = false;
#endif

template <typename T>
float element_of(unsigned word, int i) {
  if constexpr (sizeof(T) == 2) {
    const uint16_t bits = uint16_t(word >> 16 * i);
    T value;
    memcpy(&value, &bits, sizeof value);
    return to_float(value);
  } else {
    if (word % 8192) throw std::runtime_error("simt: a word that is not TF32");
    return __uint_as_float(word);
  }
}

// A lane reads the row whose address it gives, so that ThreadSanitizer knows who did.
template <bool kTransposed, typename T>
void load_matrices(const T* row, unsigned (&m)[4], const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  if (uintptr_t(row) % 16) throw std::runtime_error("simt: ldmatrix of a row that is not aligned");
  if (kOnlyCounts) return;
  simt::Words mine = {};
  memcpy(mine.word, row, 16);
  const simt::Words* all = simt::gather(mine, {file, line});
  const int g = simt::lane() / 4, t = simt::lane() % 4;
  for (int i = 0; i < 4; ++i) {
    const simt::Words* rows = all + 8 * i;
    if (kTransposed) {
      const unsigned low = rows[2 * t].word[g / 2] >> 16 * (g % 2), high = rows[2 * t + 1].word[g / 2] >> 16 * (g % 2);
      m[i] = (low & 0xffff) | high << 16;
    } else {
      m[i] = rows[g].word[t];
    }
  }
}

inline float cut_off(double x) {
  const float nearest = float(x);
  return std::fabs(nearest) < INFINITY && std::fabs(nearest) > std::fabs(x) ? nextafterf(nearest, 0) : nearest;
}

template <typename T>
void multiply_add(float (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1, const char* file = __builtin_FILE(),
                  int line = __builtin_LINE()) {
  if (kOnlyCounts) return;
  const simt::Words* all = simt::gather({{a[0], a[1], a[2], a[3], b0, b1}}, {file, line});
  const int g = simt::lane() / 4, t = simt::lane() % 4;
  constexpr int kEach = 4 / sizeof(T), kDeep = 8 * kEach;  // elements of a word, of a row
  for (int i = 0; i < 4; ++i) {
    const int column = 2 * t + i % 2;
    double sum = c[i];
    for (int k = 0; k < kDeep; ++k) {
      const int from = k % (kDeep / 2) / kEach, half = k / (kDeep / 2);
      const unsigned left = all[4 * g + from].word[i / 2 + half * 2], right = all[4 * column + from].word[4 + half];
      sum += double(element_of<T>(left, k % kEach)) * double(element_of<T>(right, k % kEach));
    }
    c[i] = cut_off(sum);
  }
}

template <typename T>
unsigned round_pair(float low, float high) {
  T pair[2];
  from_float(low, pair[0]), from_float(high, pair[1]);
  unsigned word;
  memcpy(&word, pair, sizeof word);
  return word;
}

inline float fast_exp2(float x) { return exp2f(x); }

}  // namespace tokred
