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

  // pad: elements between rows, which 16 bytes must divide for wide loads. groups: rows of partial a head.
  Attention(int B, int H, int Nq, int N, int D, int pad, Emission emit, int groups = 1)
      : q(normal<T>(size_t(B) * H * Nq * (D + pad) - pad)),
        k(normal<T>(size_t(B) * H * N * (D + pad) - pad)),
        v(normal<T>(size_t(B) * H * N * (D + pad) - pad)),
        out(size_t(B) * Nq * H * D),
        size(normal<float>(size_t(B) * N)),  // half of the keys are masked
        partial(size_t(B) * H * groups * N),
        scores(size_t(B) * N) {
    const int64_t row = D + pad;
    g = {q,       k,           v,       size,         out,
         partial, scores,      B,       H * Nq * row, Nq * row,
         row,     H * N * row, N * row, row,          H * N * row,
         N * row, row,         H,       Nq,           N,
         D,       emit,        0.2f,    pad > 0,      pad * sizeof(T) % 16 == 0};
  }

  template <int kWidth, int kTiles, bool kResident, bool kMean>
  void run(int parts) {
    launch_attention_kernel<T, kWidth, kTiles, kResident, kMean>(g, parts, Launcher{});
    printf("attention N=%d D=%d: %08x", g.N, g.D, hash(out));
    if (g.emit) printf(" %08x", hash(partial));
    printf("\n");
  }

  void cls() {
    launch_cls<T>(g, Launcher{});
    launch_head_mean(g, 1, float(g.H), Launcher{});
    printf("cls N=%d D=%d: %08x\n", g.N, g.D, hash(scores));
  }
};

int main(int, char** arguments) {
  simt::seed(unsigned(atoi(arguments[1])));
  Attention<__half>(2, 1, 19, 37, 64, 0, kEmitCls).run<64, 7, true, false>(1);
  Attention<__half>(1, 2, 67, 113, 56, 1, kEmitMean).run<64, 13, true, true>(1);
  Attention<__nv_bfloat16>(1, 1, 70, 200, 40, 8, kEmitNone).run<64, 13, true, false>(2);
  Attention<__nv_bfloat16>(1, 1, 129, 130, 24, 0, kEmitCls).run<32, 4, false, false>(2);
  // Two blocks, of which the first has two tiles of query rows.
  Attention<__nv_bfloat16>(1, 2, 258, 145, 24, 0, kEmitMean, 2).run<32, 4, false, false>(2);
  Attention<float> wide(2, 1, 18, 35, 72, 3, kEmitCls);
  wide.run<80, 2, false, false>(1);
  wide.cls();
  Attention<float>(1, 1, 81, 67, 72, 3, kEmitMean, 1).run<80, 2, false, false>(1);
}
