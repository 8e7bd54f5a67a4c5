// Exactly sized random inputs and a hash of outputs, for the programs that run under sanitizers.
#pragma once
#include <memory>
#include <random>

#include "device.cuh"

namespace tokred {

inline std::mt19937 random_bits;

// Allocated to size: one element more would be found.
template <typename T>
struct Buffer {
  std::unique_ptr<T[]> data;
  size_t count;
  explicit Buffer(size_t n) : data(new T[n]), count(n) { memset(data.get(), 0xFF, n * sizeof(T)); }
  operator T*() { return data.get(); }
};

template <typename T>
Buffer<T> normal(size_t n) {
  Buffer<T> values(n);
  std::normal_distribution<float> draw;
  for (size_t i = 0; i < n; ++i) from_float(draw(random_bits), values[i]);
  return values;
}

template <typename T>
uint32_t hash(const Buffer<T>& values, uint32_t h = 2166136261u) {
  const unsigned char* bytes = reinterpret_cast<const unsigned char*>(values.data.get());
  for (size_t i = 0; i < values.count * sizeof(T); ++i) h = (h ^ bytes[i]) * 16777619u;
  return h;
}

}  // namespace tokred
