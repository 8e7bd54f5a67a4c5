// What attention multiplies: rows staged in shared memory, the logits of 16 queries and 16 keys, p v.
//
// A warp owns 16 query rows. Its 16 x 16 logits are two accumulators of the tensor cores (mma.cuh): lane 4 g + t holds
// rows g and g + 8 of the columns 2t, 2t + 1, 8 + 2t and 9 + 2t, in float32 too, so that everything between the two
// products is written once.
//
// Masking costs one fminf a logit. The cap of a masked or absent key is -inf, which fminf prefers to a NaN too; of any
// other +inf, which turns a NaN logit into one that makes its row NaN all the same.
#pragma once
#include "mma.cuh"

namespace tokred {

constexpr int kQueryTile = 16, kKeyTile = 16;

// Of a head counted over the whole batch; a grid has fewer than 2^32 blocks.
__device__ __forceinline__ int64_t image_of(const AttentionBatch& g, int64_t head) {
  return unsigned(head) / unsigned(g.H);
}
__device__ __forceinline__ int64_t within(const AttentionBatch& g, int64_t head) {
  return unsigned(head) % unsigned(g.H);
}
template <typename T>
__device__ __forceinline__ const T* query(const AttentionBatch& g, int64_t head, int64_t row) {
  return static_cast<const T*>(g.q) + image_of(g, head) * g.q_b + within(g, head) * g.q_h + row * g.q_n;
}
template <typename T>
__device__ __forceinline__ const T* key(const AttentionBatch& g, int64_t head, int64_t row) {
  return static_cast<const T*>(g.k) + image_of(g, head) * g.k_b + within(g, head) * g.k_h + row * g.k_n;
}
template <typename T>
__device__ __forceinline__ const T* value(const AttentionBatch& g, int64_t head, int64_t row) {
  return static_cast<const T*>(g.v) + image_of(g, head) * g.v_b + within(g, head) * g.v_h + row * g.v_n;
}
template <typename T>
__device__ __forceinline__ T* result(const AttentionBatch& g, int64_t head, int64_t row) {
  return static_cast<T*>(g.out) + ((image_of(g, head) * g.Nq + row) * g.H + within(g, head)) * g.D;
}
// size from key `first` of the head's image on, or null.
__device__ __forceinline__ const float* sizes(const AttentionBatch& g, int64_t head, int64_t first) {
  return g.size ? g.size + image_of(g, head) * g.N + first : nullptr;
}
// The factor of key n; 0 masks it.
__device__ __forceinline__ float weight_of(const float* size, int64_t n) {
  return !size ? 1 : size[n] > 0 ? size[n] : 0;
}

// Elements from one staged row to the next: an odd number of 16-byte words, so that eight rows meet no bank twice.
template <typename T, int kWidth>
constexpr int kRowPitch = kWidth + 16 / int(sizeof(T));

template <int kLength, typename T>
__device__ __forceinline__ Pack<T, kLength> load_pack(const T* from, bool aligned) {
  if (aligned) return *reinterpret_cast<const Pack<T, kLength>*>(from);
  Pack<T, kLength> pack;
#pragma unroll
  for (int e = 0; e < kLength; ++e) pack.e[e] = from[e];
  return pack;
}

// kRows rows to shared memory by each kBy threads; zeros beyond `count` rows, beyond D and where keep(row) is false.
template <int kWidth, int kBy, int kRows, typename T, typename Keep>
__device__ __forceinline__ void stage_rows(const AttentionBatch& g, const T* from, int64_t stride, int count,
                                           bool negate, T* to, Keep&& keep) {
  constexpr int kVector = 16 / sizeof(T), kPacks = kWidth / kVector, kEach = ceil_div(kRows * kPacks, kBy);
  constexpr int kDeep = kEach < kAhead ? kEach : kAhead;
  for (int first = threadIdx.x % kBy; first < kRows * kPacks; first += kDeep * kBy) {
    Pack<T, kVector> part[kDeep] = {};
#pragma unroll
    for (int k = 0; k < kDeep; ++k) {
      const int row = (first + k * kBy) / kPacks, d = (first + k * kBy) % kPacks * kVector;
      if (row < min(kRows, count) && d < g.D && keep(row))
        part[k] = load_pack<kVector>(from + row * stride + d, g.aligned);
    }
    if (negate)
#pragma unroll
      for (int k = 0; k < kDeep; ++k)
#pragma unroll
        for (int e = 0; e < kVector; ++e) from_float(-to_float(part[k], e), part[k].e[e]);
#pragma unroll
    for (int k = 0; k < kDeep; ++k) {
      const int row = (first + k * kBy) / kPacks, d = (first + k * kBy) % kPacks * kVector;
      if (row < kRows) *reinterpret_cast<Pack<T, kVector>*>(to + row * kRowPitch<T, kWidth> + d) = part[k];
    }
  }
}

// The 16 query rows of a warp from row `first` on.
template <int kWidth, typename T>
__device__ __forceinline__ void stage_queries(const AttentionBatch& g, int64_t head, int64_t first, T* to) {
  __syncwarp();  // the rows before have been read
  stage_rows<kWidth, kWarp, kQueryTile>(g, query<T>(g, head, first), g.q_n, int(g.Nq - first), g.negate, to,
                                        [](int) { return true; });
  __syncwarp();
}

// A chunk of keys, their values behind them, and what their mask says; staged by kBy threads.
template <typename T, int kWidth, int kTiles, int kBy>
struct KeyChunk {
  static constexpr int kKeys = kKeyTile * kTiles, kPitch = kRowPitch<T, kWidth>;
  static constexpr int64_t kBytes = kKeys * 2 * (kPitch * int64_t(sizeof(T)) + int64_t(sizeof(float)));
  T *k, *v;
  float *factor, *cap;

  __device__ __forceinline__ explicit KeyChunk(unsigned char* shared) {
    factor = reinterpret_cast<float*>(shared), cap = factor + kKeys;
    k = reinterpret_cast<T*>(cap + kKeys), v = k + kKeys * kPitch;
  }

  __device__ __forceinline__ void stage(const AttentionBatch& g, int64_t head, int first) const {
    const int count = g.N - first;
    const float* size = sizes(g, head, first);
    stage_rows<kWidth, kBy, kKeys>(g, key<T>(g, head, first), g.k_n, count, false, k, [](int) { return true; });
    if (g.out)  // 0 times a NaN would be one
      stage_rows<kWidth, kBy, kKeys>(g, value<T>(g, head, first), g.v_n, count, false, v,
                                     [&](int j) { return !size || size[j] > 0; });
    for (int j = threadIdx.x; j < kKeys; j += kBy) {
      const float weight = j < count ? weight_of(size, j) : 0;
      factor[j] = weight;
      cap[j] = weight > 0 ? INFINITY : -INFINITY;
    }
  }

  // Bounds the logits of tile j by the caps of their keys.
  __device__ __forceinline__ void limit(int j, float (&s)[2][4]) const {
#pragma unroll
    for (int n = 0; n < 2; ++n) {
      const Pack<float, 2> most = pair(cap, j, n);
#pragma unroll
      for (int e = 0; e < 4; ++e) s[n][e] = fminf(s[n][e], most.e[e % 2]);
    }
  }

  // From logits to size exp2(s - highest), for the two rows of a lane.
  __device__ __forceinline__ void exponentiate(int j, float scale, const float (&highest)[2], float (&s)[2][4]) const {
#pragma unroll
    for (int n = 0; n < 2; ++n) {
      const Pack<float, 2> weight = pair(factor, j, n);
#pragma unroll
      for (int e = 0; e < 4; ++e) s[n][e] = weight.e[e % 2] * fast_exp2(fmaf(s[n][e], scale, -highest[e / 2]));
    }
  }

 private:
  __device__ __forceinline__ static const Pack<float, 2>& pair(const float* of_key, int j, int n) {
    return *reinterpret_cast<const Pack<float, 2>*>(of_key + j * kKeyTile + 8 * n + threadIdx.x % 4 * 2);
  }
};

// The products of a warp's 16 rows, by tensor cores.
template <typename T, int kWidth>
class RowTile {
 public:
  static constexpr int kPitch = kRowPitch<T, kWidth>;

  __device__ __forceinline__ explicit RowTile(const T* rows) {
    const int lane = threadIdx.x % kWarp;
#pragma unroll
    for (int d = 0; d < kWidth / 16; ++d)
      load_matrices<false>(rows + lane % 16 * kPitch + d * 16 + lane / 16 * 8, rows_[d]);
  }

  // s: products with 16 other rows.
  __device__ __forceinline__ void logits(const T* others, float (&s)[2][4]) const {
    const int lane = threadIdx.x % kWarp;
    const T* row = others + (lane % 8 + lane / 16 * 8) * kPitch + lane / 8 % 2 * 8;
#pragma unroll
    for (int e = 0; e < 4; ++e) s[0][e] = s[1][e] = 0;
#pragma unroll
    for (int d = 0; d < kWidth / 16; ++d) {
      unsigned other[4];
      load_matrices<false>(row + d * 16, other);
      multiply_add<T>(s[0], rows_[d], other[0], other[1]);
      multiply_add<T>(s[1], rows_[d], other[2], other[3]);
    }
  }

  // out += p v for 16 keys.
  __device__ __forceinline__ static void add_values(const float (&p)[2][4], const T* values,
                                                    float (&out)[kWidth / 8][4]) {
    const int lane = threadIdx.x % kWarp;
    const T* row = values + lane % 16 * kPitch + lane / 16 * 8;
    const unsigned a[4] = {round_pair<T>(p[0][0], p[0][1]), round_pair<T>(p[0][2], p[0][3]),
                           round_pair<T>(p[1][0], p[1][1]), round_pair<T>(p[1][2], p[1][3])};
#pragma unroll
    for (int d = 0; d < kWidth / 16; ++d) {
      unsigned v[4];
      load_matrices<true>(row + d * 16, v);
      multiply_add<T>(out[2 * d], a, v[0], v[1]);
      multiply_add<T>(out[2 * d + 1], a, v[2], v[3]);
    }
  }

 private:
  unsigned rows_[kWidth / 16][4];
};

// A float as two of TF32, 22 of its 24 bits: the first cut off, the second rounded. By integers: cvt.rna.tf32 takes
// three instructions. Adding to the bits may make a zero of NaN, which the large part still is.
struct Split {
  unsigned large[4], small[4];
  __device__ __forceinline__ explicit Split(const float (&x)[4]) {
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      large[e] = __float_as_uint(x[e]) & kTf32;
      small[e] = (__float_as_uint(x[e] - __uint_as_float(large[e])) + (~kTf32 + 1) / 2) & kTf32;
    }
  }
};

// The same for float32 by three products of TF32; the fourth is at most 2^-20 of what it belongs to. The two small ones
// are added up apart: beside an infinity they are NaN or of any sign. p v is added up outside of the tensor cores,
// which may cut off where floats round.
template <int kWidth>
class RowTile<float, kWidth> {
 public:
  static constexpr int kPitch = kRowPitch<float, kWidth>;

  __device__ __forceinline__ explicit RowTile(const float* rows)
      : rows_(rows + threadIdx.x % 16 * kPitch + threadIdx.x % kWarp / 16 * 4) {}

  __device__ __forceinline__ void logits(const float* others, float (&s)[2][4]) const {
    const int lane = threadIdx.x % kWarp;
    others += (lane % 8 + lane / 16 * 8) * kPitch + lane / 8 % 2 * 4;
    float small[2][4] = {};
#pragma unroll
    for (int e = 0; e < 4; ++e) s[0][e] = s[1][e] = 0;
#pragma unroll 2
    for (int d = 0; d < kWidth; d += 8) {
      const Split row(load(rows_ + d)), other(load(others + d));
#pragma unroll
      for (int n = 0; n < 2; ++n) {
        multiply_add<float>(small[n], row.small, other.large[2 * n], other.large[2 * n + 1]);
        multiply_add<float>(small[n], row.large, other.small[2 * n], other.small[2 * n + 1]);
        multiply_add<float>(s[n], row.large, other.large[2 * n], other.large[2 * n + 1]);
      }
    }
#pragma unroll
    for (int e = 0; e < 8; ++e) s[e / 4][e % 4] += finite(small[e / 4][e % 4]);
  }

  // Key 2t is the product's t, key 2t + 1 its t + 4: p is where it must be.
  __device__ __forceinline__ static void add_values(const float (&p)[2][4], const float* values,
                                                    float (&out)[kWidth / 8][4]) {
    const int lane = threadIdx.x % kWarp;
    values += lane % 4 * 2 * kPitch + lane / 4;
    const Split of_keys[2] = {Split({p[0][0], p[0][2], p[0][1], p[0][3]}), Split({p[1][0], p[1][2], p[1][1], p[1][3]})};
#pragma unroll
    for (int d = 0; d < kWidth / 8; ++d) {
      const float* v = values + 8 * d;
      const Split value({v[0], v[kPitch], v[8 * kPitch], v[9 * kPitch]});
      float sum[4] = {};
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        multiply_add<float>(sum, of_keys[h].small, value.large[2 * h], value.large[2 * h + 1]);
        multiply_add<float>(sum, of_keys[h].large, value.small[2 * h], value.small[2 * h + 1]);
      }
#pragma unroll
      for (int e = 0; e < 4; ++e) sum[e] = finite(sum[e]);
#pragma unroll
      for (int h = 0; h < 2; ++h)
        multiply_add<float>(sum, of_keys[h].large, value.large[2 * h], value.large[2 * h + 1]);
#pragma unroll
      for (int e = 0; e < 4; ++e) out[d][e] += sum[e];
    }
  }

 private:
  const float* rows_;

  __device__ __forceinline__ static Split load(const float* at) {
    unsigned word[4];
    load_matrices<false>(at, word);
    return Split(
        {__uint_as_float(word[0]), __uint_as_float(word[1]), __uint_as_float(word[2]), __uint_as_float(word[3])});
  }

  __device__ __forceinline__ static float finite(float x) { return fabsf(x) < INFINITY ? x : 0; }
};

}  // namespace tokred
