// What a training step does between its matrix products, on a CPU with AVX-512 and bfloat16.
//
// Activations are bfloat16, everything inside is float32. cpu_kernels.py builds and calls this.
// Sums over a batch are taken in an order that the number of threads decides, and nothing else.

#include <immintrin.h>
#include <omp.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

using Int = int64_t;
using Narrow = uint16_t;  // the bits of a bfloat16
using V = __m512;
using Mask = __mmask16;
constexpr Int W = 16;  // floats in a V

static inline Mask lanes(Int left) { return left >= W ? 0xffff : Mask((1u << left) - 1); }
static inline V zero() { return _mm512_setzero_ps(); }
static inline V all(float x) { return _mm512_set1_ps(x); }
static inline V load(const float* p, Mask m = 0xffff) { return _mm512_maskz_loadu_ps(m, p); }
static inline V load(const Narrow* p, Mask m = 0xffff) {
  __m512i bits = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(m, p));
  return _mm512_castsi512_ps(_mm512_slli_epi32(bits, 16));
}
// The line after this one, soon: rows are too far apart for the machine to guess what is next.
static inline void fetch(const Narrow* p) { _mm_prefetch((const char*)(p + 32), _MM_HINT_T0); }
static inline void store(float* p, V x, Mask m = 0xffff) { _mm512_mask_storeu_ps(p, m, x); }
static inline void store(Narrow* p, V x, Mask m = 0xffff) {
  _mm256_mask_storeu_epi16(p, m, (__m256i)_mm512_cvtneps_pbh(x));
}
static inline void add(float* p, V x, Mask m) { store(p, load(p, m) + x, m); }
static inline V multiply_add(V a, V b, V c) { return _mm512_fmadd_ps(a, b, c); }
static inline V positive(V x) { return _mm512_max_ps(x, zero()); }
static inline float total(V x) { return _mm512_reduce_add_ps(x); }

// 2^x, to 3e-6 of the value: a polynomial for what is over a whole number, fitted by least squares.
static inline V power_of_two(V x) {
  V r = _mm512_reduce_ps(x, _MM_FROUND_TO_NEG_INF);
  V p = multiply_add(r, all(0.013534167f), all(0.052011463f));
  p = multiply_add(r, p, all(0.24144276f));
  p = multiply_add(r, p, all(0.69300383f));
  p = multiply_add(r, p, all(1.0000026f));
  return _mm512_scalef_ps(p, x);  // by the whole number, which it takes of x itself
}
constexpr float LOG2_E = 1.44269504f;

// To 6e-5, a sixtieth of what bfloat16 rounds off. Of 1 + infinity it is 0.
static inline V sigmoid(V x) {
  return _mm512_rcp14_ps(all(1.f) + power_of_two(x * all(-LOG2_E)));
}

// A matrix as it is, or with its strides exchanged.
struct Matrix {
  float* at;
  Int row, column = 1;
  Matrix turned() const { return {at, column, row}; }
};

// A thread's floats, zero at first. They start where a line of the cache does: of vectors that lie
// across two lines each costs two reads.
struct Scratch {
  std::vector<float> memory;
  Int used = 0;
  explicit Scratch(Int size) : memory(size + W) {}
  Matrix take(Int rows, Int columns) {
    float* first = memory.data() + (-(uintptr_t)memory.data() % 64) / sizeof(float);
    Matrix made{first + used, columns};
    used += rows * columns;
    return made;
  }
};

// --- the gated depthwise convolution -----------------------------------------------------------

// Sixteen channels of a picture at a time, as planes with a rim of zeros that stay in the cache.
struct Plane {
  Int height, width, row = (width + 2) * W, size = (height + 2) * row;
  Int corner(Int y, Int x) const { return y * row + x * W; }  // of the 3x3 around (y, x)
  Int middle(Int y, Int x) const { return corner(y + 1, x + 1); }
};

static inline V convolved(const float* corner, Int row, const V* taps, V sum) {
  V second = zero(), third = zero();
  for (Int j = 0; j < 3; ++j) {
    sum = multiply_add(load(corner + j * W), taps[j], sum);
    second = multiply_add(load(corner + row + j * W), taps[3 + j], second);
    third = multiply_add(load(corner + 2 * row + j * W), taps[6 + j], third);
  }
  return sum + (second + third);
}

template <bool SLOPE>
static void silu_plane(const Narrow* h, Int stride, V up, Mask m, Plane p, float* s, float* slope) {
  for (Int y = 0; y < p.height; ++y)
    for (Int x = 0; x < p.width; ++x, h += stride) {
      fetch(h);
      V a = load(h, m) + up, open = sigmoid(a), made = a * open;
      store(s + p.middle(y, x), made);
      if (SLOPE) store(slope + p.middle(y, x), multiply_add(made, all(1.f) - open, open));
    }
}

// h (B, H, W, 2E), of which `up` (2E) is the bias; taps (9, 2E), bias (2E) -> out (B, H, W, E).
extern "C" void gated_forward(const Narrow* h, const float* up, const float* taps,
                              const float* bias, Narrow* out, Int B, Int H, Int width, Int E,
                              int threads) {
  Int blocks = (E + W - 1) / W, C = 2 * E, N = H * width;
#pragma omp parallel num_threads(threads)
  {
    const Plane p{H, width};
    Scratch planes(2 * p.size);
    float* s[2] = {planes.take(1, p.size).at, planes.take(1, p.size).at};
#pragma omp for schedule(static)
    for (Int job = 0; job < B * blocks; ++job) {
      Int b = job / blocks, c = job % blocks * W;
      Mask m = lanes(E - c);
      V tap[2][9], start[2];
      for (Int half = 0; half < 2; ++half) {
        Int from = half * E + c;
        for (Int k = 0; k < 9; ++k) tap[half][k] = load(taps + k * C + from, m);
        start[half] = load(bias + from, m);
        silu_plane<false>(h + b * N * C + from, C, load(up + from, m), m, p, s[half], nullptr);
      }
      Narrow* to = out + b * N * E + c;
      for (Int y = 0; y < H; ++y)
        for (Int x = 0; x < width; ++x, to += E) {
          V value = convolved(s[0] + p.corner(y, x), p.row, tap[0], start[0]);
          V gate = convolved(s[1] + p.corner(y, x), p.row, tap[1], start[1]);
          store(to, value * gate * sigmoid(gate), m);
        }
    }
  }
}

// Of each thread's pictures: sums (threads, 11, 2E), the gradients of taps, bias and `up`.
extern "C" void gated_backward(const Narrow* h, const float* up, const float* taps,
                               const float* bias, const Narrow* gradient, Narrow* dh, float* sums,
                               Int B, Int H, Int width, Int E, int threads) {
  Int blocks = (E + W - 1) / W, C = 2 * E, N = H * width;
#pragma omp parallel num_threads(threads)
  {
    const Plane p{H, width};
    Scratch planes(6 * p.size);
    float *s[2], *slope[2], *d[2];
    for (float** of : {s, slope, d})
      for (Int half = 0; half < 2; ++half) of[half] = planes.take(1, p.size).at;
    float* mine = sums + omp_get_thread_num() * 11 * C;
#pragma omp for schedule(static)
    for (Int job = 0; job < B * blocks; ++job) {
      Int b = job / blocks, c = job % blocks * W;
      Mask m = lanes(E - c);
      V tap[2][9], start[2];
      for (Int half = 0; half < 2; ++half) {
        Int from = half * E + c;
        for (Int k = 0; k < 9; ++k) tap[half][k] = load(taps + k * C + from, m);
        start[half] = load(bias + from, m);
        silu_plane<true>(h + b * N * C + from, C, load(up + from, m), m, p, s[half], slope[half]);
      }
      const Narrow* g = gradient + b * N * E + c;
      for (Int y = 0; y < H; ++y)
        for (Int x = 0; x < width; ++x, g += E) {
          fetch(g);
          V value = convolved(s[0] + p.corner(y, x), p.row, tap[0], start[0]);
          V gate = convolved(s[1] + p.corner(y, x), p.row, tap[1], start[1]);
          V open = sigmoid(gate), made = gate * open, given = load(g, m);
          store(d[0] + p.middle(y, x), given * made);
          V bent = multiply_add(made, all(1.f) - open, open);
          store(d[1] + p.middle(y, x), given * value * bent);
        }
      for (Int half = 0; half < 2; ++half) {
        V of_tap[9], of_bias = zero(), of_up = zero(), turned[9];
        for (Int k = 0; k < 9; ++k) of_tap[k] = zero(), turned[k] = tap[half][8 - k];
        Narrow* to = dh + b * N * C + half * E + c;
        for (Int y = 0; y < H; ++y)
          for (Int x = 0; x < width; ++x, to += C) {
            V here = load(d[half] + p.middle(y, x));
            const float* around = s[half] + p.corner(y, x);
            for (Int k = 0; k < 9; ++k)
              of_tap[k] = multiply_add(here, load(around + k / 3 * p.row + k % 3 * W), of_tap[k]);
            V made = convolved(d[half] + p.corner(y, x), p.row, turned, zero());
            made = made * load(slope[half] + p.middle(y, x));
            of_bias = of_bias + here;
            of_up = of_up + made;
            store(to, made, m);
          }
        float* sum = mine + half * E + c;
        for (Int k = 0; k < 9; ++k) add(sum + k * C, of_tap[k], m);
        add(sum + 9 * C, of_bias, m);
        add(sum + 10 * C, of_up, m);
      }
    }
  }
}

// --- attention, both kinds: a head of a picture at a time, in float32 ---------------------------

constexpr Int SOME = 64;  // tokens at once: so many that all that is made of them is in the cache

template <int R, int C>
static inline void tile(Matrix a, const float* b, Int b_row, float* c, Int c_row, Int inner,
                        bool more) {
  V sum[R][C];
  for (int r = 0; r < R; ++r)
    for (int j = 0; j < C; ++j) sum[r][j] = more ? load(c + r * c_row + j * W) : zero();
  for (Int i = 0; i < inner; ++i) {
    V right[C];
    for (int j = 0; j < C; ++j) right[j] = load(b + i * b_row + j * W);
    for (int r = 0; r < R; ++r) {
      V left = all(a.at[r * a.row + i * a.column]);
      for (int j = 0; j < C; ++j) sum[r][j] = multiply_add(left, right[j], sum[r][j]);
    }
  }
  for (int r = 0; r < R; ++r)
    for (int j = 0; j < C; ++j) store(c + r * c_row + j * W, sum[r][j]);
}

template <int C>
static void strip(Matrix a, const float* b, Int b_row, Matrix c, Int rows, Int inner, bool more) {
  Int r = 0;
  auto from = [&] { return Matrix{a.at + r * a.row, a.row, a.column}; };
  auto to = [&] { return c.at + r * c.row; };
  for (; r + 8 <= rows; r += 8) tile<8, C>(from(), b, b_row, to(), c.row, inner, more);
  for (; r + 2 <= rows; r += 2) tile<2, C>(from(), b, b_row, to(), c.row, inner, more);
  for (; r < rows; ++r) tile<1, C>(from(), b, b_row, to(), c.row, inner, more);
}

// c (rows, columns) = a (rows, inner) b (inner, columns), columns a multiple of 16; or `more` of it.
static void product(Matrix a, Matrix b, Matrix c, Int rows, Int inner, Int columns,
                    bool more = false) {
  Int j = 0;
  for (; j + 2 * W <= columns; j += 2 * W)
    strip<2>(a, b.at + j, b.row, {c.at + j, c.row}, rows, inner, more);
  if (j < columns) strip<1>(a, b.at + j, b.row, {c.at + j, c.row}, rows, inner, more);
}

static void transpose(Matrix a, Matrix to, Int rows, Int columns) {
  for (Int i = 0; i < rows; ++i)
    for (Int j = 0; j < columns; ++j) to.at[j * to.row + i] = a.at[i * a.row + j];
}

template <bool RELU = false>
static void widen(const Narrow* x, Int stride, Matrix to, Int rows, Int columns) {
  for (Int n = 0; n < rows; ++n)
    for (Int j = 0; j < columns; j += W) {
      fetch(x + n * stride + j);
      V made = load(x + n * stride + j);
      store(to.at + n * to.row + j, RELU ? positive(made) : made);
    }
}

static void narrow(Matrix x, Narrow* to, Int stride, Int rows, Int columns) {
  for (Int n = 0; n < rows; ++n)
    for (Int j = 0; j < columns; j += W) store(to + n * stride + j, load(x.at + n * x.row + j));
}

static inline float dot(const float* a, const float* b, Int size) {
  V sum = zero();
  for (Int j = 0; j < size; j += W) sum = multiply_add(load(a + j), load(b + j), sum);
  return total(sum);
}

constexpr float EPS = 1e-15f;  // as in kernels/linear_attention.py

// qkv (B, N, 3 heads d) -> out (B, N, heads d); with a gradient of it, dqkv instead.
extern "C" void linear_attention(const Narrow* qkv, Narrow* out, const Narrow* gradient,
                                 Narrow* dqkv, Int B, Int N, Int heads, Int d, int threads) {
  Int D = heads * d;
#pragma omp parallel num_threads(threads)
  {
    Scratch scratch(5 * SOME * d + 4 * d * d + 2 * d);
    Matrix q = scratch.take(SOME, d), k = scratch.take(SOME, d), v = scratch.take(SOME, d);
    Matrix g = scratch.take(SOME, d), made = scratch.take(SOME, d);
    Matrix state = scratch.take(d, d), turned = scratch.take(d, d);
    Matrix dstate = scratch.take(d, d), dturned = scratch.take(d, d);
    float *keys = scratch.take(1, d).at, *dkeys = scratch.take(1, d).at;
#pragma omp for schedule(static)
    for (Int job = 0; job < B * heads; ++job) {
      Int first = job / heads * N, head = job % heads * d;
      std::fill(keys, keys + 2 * d, 0.f);
      for (Int at = 0; at < N; at += SOME) {
        Int n = std::min(SOME, N - at);
        const Narrow* from = qkv + (first + at) * 3 * D + head;
        widen<true>(from + D, 3 * D, k, n, d);
        widen(from + 2 * D, 3 * D, v, n, d);
        product(k.turned(), v, state, d, n, d, at > 0);
        for (Int j = 0; j < d; j += W) {
          V sum = load(keys + j);
          for (Int t = 0; t < n; ++t) sum = sum + load(k.at + t * d + j);
          store(keys + j, sum);
        }
      }
      transpose(state, turned, d, d);
      for (Int at = 0; at < N; at += SOME) {
        Int n = std::min(SOME, N - at);
        widen<true>(qkv + (first + at) * 3 * D + head, 3 * D, q, n, d);
        if (!gradient) {
          product(q, state, made, n, d, d);
          for (Int t = 0; t < n; ++t) {
            V share = all(1 / (dot(q.at + t * d, keys, d) + EPS));
            Narrow* to = out + (first + at + t) * D + head;
            for (Int j = 0; j < d; j += W) store(to + j, load(made.at + t * d + j) * share);
          }
          continue;
        }
        widen(gradient + (first + at) * D + head, D, g, n, d);
        float shares[SOME];
        for (Int t = 0; t < n; ++t) {
          shares[t] = 1 / (dot(q.at + t * d, keys, d) + EPS);
          float* row = g.at + t * d;
          for (Int j = 0; j < d; j += W) store(row + j, load(row + j) * all(shares[t]));
        }
        product(g, turned, made, n, d, d);
        product(q.turned(), g, dstate, d, n, d, at > 0);
        for (Int t = 0; t < n; ++t) {
          float *query = q.at + t * d, *of_query = made.at + t * d;
          V under = all(-dot(query, of_query, d) * shares[t]);
          Narrow* to = dqkv + (first + at + t) * 3 * D + head;
          for (Int j = 0; j < d; j += W) {
            V x = load(query + j), dx = multiply_add(under, load(keys + j), load(of_query + j));
            Mask on = _mm512_cmp_ps_mask(x, zero(), _CMP_GT_OQ);
            store(to + j, _mm512_maskz_mov_ps(on, dx));
            store(dkeys + j, multiply_add(under, x, load(dkeys + j)));
          }
        }
      }
      if (!gradient) continue;
      transpose(dstate, dturned, d, d);
      for (Int at = 0; at < N; at += SOME) {
        Int n = std::min(SOME, N - at);
        const Narrow* from = qkv + (first + at) * 3 * D + head;
        Narrow* to = dqkv + (first + at) * 3 * D + head;
        widen<true>(from + D, 3 * D, k, n, d);
        widen(from + 2 * D, 3 * D, v, n, d);
        product(v, dturned, made, n, d, d);
        for (Int t = 0; t < n; ++t)
          for (Int j = 0; j < d; j += W) {
            Mask on = _mm512_cmp_ps_mask(load(k.at + t * d + j), zero(), _CMP_GT_OQ);
            V dx = load(made.at + t * d + j) + load(dkeys + j);
            store(to + D + t * 3 * D + j, _mm512_maskz_mov_ps(on, dx));
          }
        product(k, dstate, made, n, d, d);
        narrow(made, to + 2 * D, 3 * D, n, d);
      }
    }
  }
}

// q (B, N, heads d), kv (B, L, 2 heads d), mask (B, L) -> out like q; with a gradient of it, dq,
// and dkv where it is not zero. Of text that the mask leaves out nothing is read.
extern "C" void cross_attention(const Narrow* q_, const Narrow* kv, const bool* mask, Narrow* out,
                                const Narrow* gradient, Narrow* dq, Narrow* dkv, Int B, Int N,
                                Int L, Int heads, Int d, int threads) {
  Int D = heads * d, most = (L + W - 1) / W * W;
  float scale = 1 / std::sqrt(float(d));
#pragma omp parallel num_threads(threads)
  {
    Scratch scratch(3 * SOME * d + 2 * SOME * most + 6 * most * d);
    std::vector<Int> real;
#pragma omp for schedule(static)
    for (Int job = 0; job < B * heads; ++job) {
      Int b = job / heads, head = job % heads * d;
      real.clear();
      for (Int l = 0; l < L; ++l)
        if (mask[b * L + l]) real.push_back(l);
      Int R = real.size(), P = (R + W - 1) / W * W;  // P: with zeros up to a whole vector
      scratch.used = 0;
      Matrix q = scratch.take(SOME, d), g = scratch.take(SOME, d), made = scratch.take(SOME, d);
      Matrix p = scratch.take(SOME, P), dp = scratch.take(SOME, P);
      Matrix k = scratch.take(P, d), v = scratch.take(P, d), dk = scratch.take(P, d);
      Matrix dv = scratch.take(P, d), k_turned = scratch.take(d, P), v_turned = scratch.take(d, P);
      std::fill(k.at, k.at + 2 * P * d, 0.f);
      auto text = [&](Int r) { return (b * L + real[r]) * 2 * D + head; };
      for (Int r = 0; r < R; ++r) {
        widen(kv + text(r), 0, {k.at + r * d, d}, 1, d);
        widen(kv + text(r) + D, 0, {v.at + r * d, d}, 1, d);
      }
      transpose(k, k_turned, P, d);
      transpose(v, v_turned, P, d);
      for (Int at = 0; at < N; at += SOME) {
        Int n = std::min(SOME, N - at), tokens = (b * N + at) * D + head;
        widen(q_ + tokens, D, q, n, d);
        product(q, k_turned, p, n, d, P);
        for (Int t = 0; t < n; ++t) {
          float* row = p.at + t * P;
          V top = all(-INFINITY), under = zero();
          for (Int l = 0; l < P; l += W)
            top = _mm512_mask_max_ps(top, lanes(R - l), top, load(row + l));
          top = all(_mm512_reduce_max_ps(top));
          for (Int l = 0; l < P; l += W) {
            V made = power_of_two((load(row + l) - top) * all(scale * LOG2_E));
            made = _mm512_maskz_mov_ps(lanes(R - l), made);
            under = under + made;
            store(row + l, made);
          }
          V share = all(1 / total(under));
          for (Int l = 0; l < P; l += W) store(row + l, load(row + l) * share);
        }
        if (!gradient) {
          product(p, v, made, n, R, d);
          narrow(made, out + tokens, D, n, d);
          continue;
        }
        widen(gradient + tokens, D, g, n, d);
        product(g, v_turned, dp, n, d, P);
        for (Int t = 0; t < n; ++t) {
          float *row = dp.at + t * P, *weights = p.at + t * P;
          V mean = all(dot(row, weights, P));
          for (Int l = 0; l < P; l += W)
            store(row + l, (load(row + l) - mean) * load(weights + l) * all(scale));
        }
        product(dp, k, made, n, R, d);
        narrow(made, dq + tokens, D, n, d);
        product(dp.turned(), q, dk, R, n, d, at > 0);
        product(p.turned(), g, dv, R, n, d, at > 0);
      }
      if (!gradient) continue;
      for (Int r = 0; r < R; ++r) {
        narrow({dk.at + r * d, d}, dkv + text(r), 0, 1, d);
        narrow({dv.at + r * d, d}, dkv + text(r) + D, 0, 1, d);
      }
    }
  }
}

// --- the residual stream: a branch comes in, and the next one leaves --------------------------

// sum = x + gate (y + bias), out = layer_norm(sum) (1 + scale) + shift. Null: no y (sum is x and
// not written), no bias, no gate (1), no scale and shift (out is sum). Rows of a picture lie
// `gate_row` and `scale_row` apart.
extern "C" void stream_forward(const float* x, const Narrow* y, const float* bias,
                               const float* gate, Int gate_row, const float* shift,
                               const float* scale, Int scale_row, float eps, float* sum,
                               Narrow* out, Int B, Int N, Int D, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
  for (Int t = 0; t < B * N; ++t) {
    Int b = t / N;
    const float* row = y ? sum + t * D : x + t * D;
    V mean = zero(), square = zero();
    for (Int c = 0; c < D; c += W) {
      Mask m = lanes(D - c);
      V a = load(x + t * D + c, m);
      if (y) {
        V branch = load(y + t * D + c, m);
        if (bias) branch = branch + load(bias + c, m);
        a = gate ? multiply_add(load(gate + b * gate_row + c, m), branch, a) : a + branch;
        store(sum + t * D + c, a, m);
      }
      if (!scale) store(out + t * D + c, a, m);
      mean = mean + a;
    }
    if (!scale) continue;
    mean = all(total(mean) / D);
    for (Int c = 0; c < D; c += W) {
      V off = _mm512_maskz_sub_ps(lanes(D - c), load(row + c, lanes(D - c)), mean);
      square = multiply_add(off, off, square);
    }
    V root = all(1 / std::sqrt(total(square) / D + eps));
    for (Int c = 0; c < D; c += W) {
      Mask m = lanes(D - c);
      V made = (load(row + c, m) - mean) * root, by = load(scale + b * scale_row + c, m);
      made = multiply_add(made, all(1.f) + by, load(shift + b * scale_row + c, m));
      store(out + t * D + c, made, m);
    }
  }
}

// Of a gradient of sum (or null) and one of out: dx, dy, and for each picture sums (B, 4, D), zero
// at first: the gradients of gate, bias, shift and scale.
extern "C" void stream_backward(const float* sum, const Narrow* y, const float* bias,
                                const float* gate, Int gate_row, const float* scale,
                                Int scale_row, float eps, const float* of_sum,
                                const Narrow* of_out, float* dx, Narrow* dy, float* sums, Int B,
                                Int N, Int D, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
  for (Int b = 0; b < B; ++b) {
    float *dgate = sums + b * 4 * D, *dbias = dgate + D, *dshift = dbias + D, *dscale = dshift + D;
    for (Int t = b * N; t < (b + 1) * N; ++t) {
      const float* row = sum + t * D;
      V mean = zero(), square = zero(), mean_g = zero(), mean_gx = zero(), root = zero();
      if (scale) {
        for (Int c = 0; c < D; c += W) mean = mean + load(row + c, lanes(D - c));
        mean = all(total(mean) / D);
        for (Int c = 0; c < D; c += W) {
          Mask m = lanes(D - c);
          V off = _mm512_maskz_sub_ps(m, load(row + c, m), mean);
          V g = load(of_out + t * D + c, m) * (all(1.f) + load(scale + b * scale_row + c, m));
          square = multiply_add(off, off, square);
          mean_g = mean_g + g;
          mean_gx = multiply_add(g, off, mean_gx);
        }
        root = all(1 / std::sqrt(total(square) / D + eps));
        mean_g = all(total(mean_g) / D);
        mean_gx = all(total(mean_gx) / D) * root;
      }
      for (Int c = 0; c < D; c += W) {
        Mask m = lanes(D - c);
        V g = load(of_out + t * D + c, m), d = g;
        if (scale) {
          V off = (load(row + c, m) - mean) * root;
          add(dshift + c, g, m);
          add(dscale + c, g * off, m);
          d = g * (all(1.f) + load(scale + b * scale_row + c, m)) - mean_g - off * mean_gx;
          d = d * root;
        }
        if (of_sum) d = d + load(of_sum + t * D + c, m);
        store(dx + t * D + c, d, m);
        if (!y) continue;
        V branch = load(y + t * D + c, m), by = gate ? load(gate + b * gate_row + c, m) : all(1.f);
        if (bias) branch = branch + load(bias + c, m);
        store(dy + t * D + c, d * by, m);
        add(dbias + c, d * by, m);
        if (gate) add(dgate + c, d * branch, m);
      }
    }
  }
}

// --- the autoencoder's norm ---------------------------------------------------------------------

// x (rows, C) -> out = x / rms(x) weight + bias; with a gradient of that, out is the gradient of x,
// and of each thread's rows there are sums (threads, 2, C), the gradients of weight and bias.
extern "C" void channel_norm(const Narrow* x, const float* weight, const float* bias, float eps,
                             const Narrow* gradient, Narrow* out, float* sums, Int rows, Int C,
                             int threads) {
#pragma omp parallel num_threads(threads)
  {
    float *dweight = gradient ? sums + omp_get_thread_num() * 2 * C : nullptr;
#pragma omp for schedule(static)
    for (Int r = 0; r < rows; ++r) {
      const Narrow *row = x + r * C, *given = gradient ? gradient + r * C : nullptr;
      V square = zero(), along = zero();
      for (Int c = 0; c < C; c += W) {
        Mask m = lanes(C - c);
        V a = load(row + c, m);
        square = multiply_add(a, a, square);
        if (given) along = multiply_add(a * load(weight + c, m), load(given + c, m), along);
      }
      V root = all(1 / std::sqrt(total(square) / C + eps));
      V pull = given ? all(total(along) / C) * root * root * root : zero();
      for (Int c = 0; c < C; c += W) {
        Mask m = lanes(C - c);
        V a = load(row + c, m), by = load(weight + c, m) * root;
        if (!given) {
          store(out + r * C + c, multiply_add(a, by, load(bias + c, m)), m);
          continue;
        }
        V g = load(given + c, m);
        add(dweight + c, g * a * root, m);
        add(dweight + C + c, g, m);
        store(out + r * C + c, g * by - a * pull, m);
      }
    }
  }
}
