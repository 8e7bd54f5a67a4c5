// The kernels of attention as cases.cpp runs the others: one of each kind, the widths and dtypes being the same code.
#include <cstdio>
#include <cstdlib>

#include "buffers.h"
#include "kernels.h"

using namespace tokred;

template <typename T>
struct Attention {
  AttentionBatch g;
  Buffer<T> q, k, v, out;
  Buffer<float> size, partial, scores;
  Buffer<RowStatistics> rows;

  // pad: elements between rows, which 16 bytes must divide for wide loads.
  Attention(int B, int H, int Nq, int N, int D, int pad)
      : q(normal<T>(size_t(B) * H * Nq * (D + pad) - pad)),
        k(normal<T>(size_t(B) * H * N * (D + pad) - pad)),
        v(normal<T>(size_t(B) * H * N * (D + pad) - pad)),
        out(size_t(B) * Nq * H * D),
        size(normal<float>(size_t(B) * N)),  // half of the keys are masked
        partial(size_t(B) * H * N),
        scores(size_t(B) * N),
        rows(size_t(B) * H * Nq) {
    const int64_t row = D + pad;
    g = {q,        k,       v,
         size,     out,     partial,
         rows,     B,       H * Nq * row,
         Nq * row, row,     H * N * row,
         N * row,  row,     H * N * row,
         N * row,  row,     H,
         Nq,       N,       D,
         0.2f,     pad > 0, pad * sizeof(T) % 16 == 0};
  }

  template <int kWidth, int kTiles, bool kResident, bool kMean>
  void run(int parts) {
    launch_attention_kernel<T, kWidth, kTiles, kResident, kMean>(g, parts, Launcher{});
    printf("attention N=%d D=%d: %08x %08x\n", g.N, g.D, hash(out), kResident ? hash(partial) : hash(rows));
  }

  template <int kWidth>
  void columns() {
    launch_columns<T, kWidth>(g, Launcher{});
    printf("columns N=%d D=%d: %08x\n", g.N, g.D, hash(partial));
  }

  void cls() {
    launch_cls<T>(g, Launcher{});
    launch_head_mean(g, scores, float(g.H), Launcher{});
    printf("cls N=%d D=%d: %08x\n", g.N, g.D, hash(scores));
  }
};

int main(int, char** arguments) {
  simt::seed(unsigned(atoi(arguments[1])));
  Attention<__half>(2, 1, 19, 37, 64, 0).run<64, 7, true, false>(1);
  Attention<__half>(1, 2, 67, 113, 56, 1).run<64, 13, true, true>(1);
  Attention<__nv_bfloat16>(1, 1, 70, 200, 40, 8).run<64, 13, true, false>(2);
  Attention<__nv_bfloat16> streamed(1, 2, 65, 130, 24, 0);
  streamed.run<32, 4, false, false>(2);
  streamed.columns<32>();
  streamed.cls();
  Attention<float> wide(2, 1, 18, 35, 72, 3);
  wide.run<80, 2, false, false>(1);
  wide.columns<80>();
  wide.cls();
}
