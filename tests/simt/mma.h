// Stands in for the hardware behind csrc/cuda/mma.cuh: the lanes hand their words to each other. Products are exact,
// their sum is a double rounded once; how tensor cores round theirs is not documented.
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
T half_of(unsigned word, int i) {
  const uint16_t bits = uint16_t(word >> 16 * i);
  T value;
  memcpy(&value, &bits, sizeof value);
  return value;
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

template <typename T>
void multiply_add(float (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1, const char* file = __builtin_FILE(),
                  int line = __builtin_LINE()) {
  if (kOnlyCounts) return;
  const simt::Words* all = simt::gather({{a[0], a[1], a[2], a[3], b0, b1}}, {file, line});
  const int g = simt::lane() / 4, t = simt::lane() % 4;
  for (int i = 0; i < 4; ++i) {
    const int column = 2 * t + i % 2;
    double sum = c[i];
    for (int k = 0; k < 16; ++k) {
      const int from = k % 8 / 2;
      const unsigned left = all[4 * g + from].word[i / 2 + k / 8 * 2], right = all[4 * column + from].word[4 + k / 8];
      sum += double(to_float(half_of<T>(left, k % 2))) * double(to_float(half_of<T>(right, k % 2)));
    }
    c[i] = float(sum);
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
