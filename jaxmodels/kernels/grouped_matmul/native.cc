// The grouped products on CPU (see native.py): rows of each group times its own matrix, a(x gate) * (x up), and x_e^T dy_e
// of each group.
//
// One register tile serves all: TALL rows by WIDE columns, summed over a depth, with the right operand packed into a panel
// of WIDE columns that stays in the second-level cache. Only rows of a group are ever read for it, so nothing has to be
// masked. Work is cut into items that write disjoint parts of the output: who takes which changes no bit of the result.

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#if defined(__AVX__)
#include <immintrin.h>
#endif
#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace {

#if defined(__AVX512F__)
constexpr int LANES = 16, VECTORS = 4;  // 24 sums, 4 columns and 1 row of 32 registers
#elif defined(__AVX__)
constexpr int LANES = 8, VECTORS = 2;  // 12 + 2 + 1 of 16
#elif defined(__aarch64__)
constexpr int LANES = 4, VECTORS = 4;
#else
constexpr int LANES = 4, VECTORS = 2;
#endif
constexpr int WIDE = LANES * VECTORS, TALL = 6;
constexpr int64_t DEPTH = 384;  // of a panel: 96 KiB with AVX-512
constexpr int64_t CACHED = 4 << 20;  // bytes of an output that may stay in a cache until somebody reads it
constexpr int64_t CHUNK = 192;  // rows of an item, or columns of x in the outer product; a multiple of TALL

typedef float Vec __attribute__((vector_size(4 * LANES), aligned(4)));
typedef int32_t Mask __attribute__((vector_size(4 * LANES)));

// Weights come from memory, once, and computing from them takes about as long as their journey: what the next panel will
// be packed from is asked for while tiles of this one are computed, a few lines at each step of their depth.
struct Ahead {
  const char* from = nullptr;  // `rows` pieces of `lines` cache lines, `stride` bytes apart
  int64_t stride = 0, rows = 0, lines = 0, line = 0, rate = 0;

  Ahead() = default;
  Ahead(const float* from, int64_t stride, int64_t rows, int64_t columns)
      : from(reinterpret_cast<const char*>(from)), stride(4 * stride), rows(rows), lines((4 * columns + 63) / 64) {}

  void spread(int64_t steps) { rate = std::min<int64_t>((rows * lines + steps - 1) / steps, 4); }

  void step() {
    for (int64_t i = 0; i < rate && rows > 0; ++i) {
      __builtin_prefetch(from + 64 * line, 0, 2);
      if (++line == lines) line = 0, from += stride, --rows;
    }
  }
};

// STREAM: past the caches, for outputs that would not stay in them: nothing is read first to be overwritten.
enum class Store { SET, ADD, STREAM };

inline void stream(float* to, Vec value) {  // `to` is aligned to a vector
#if defined(__AVX512F__)
  _mm512_stream_ps(to, reinterpret_cast<__m512>(value));
#elif defined(__AVX__)
  _mm256_stream_ps(to, reinterpret_cast<__m256>(value));
#else
  *reinterpret_cast<Vec*>(to) = value;
#endif
}

// Before an item counts as done: streamed stores wait for no other.
inline void streamed() {
#if defined(__AVX__)
  _mm_sfence();
#endif
}

// y[r, :] (+)= sum over d of x(r, d) * panel[d, :]; x(r, d) lies at x[r * row + d * step].
template <int R>
void tile(const float* x, int64_t row, int64_t step, const float* panel, int64_t depth, float* y, int64_t stride,
          int64_t columns, Store store, Ahead& ahead) {
  if (store != Store::STREAM)
    for (int r = 0; r < R; ++r)
      for (int64_t c = 0; c < columns; c += 16) __builtin_prefetch(y + r * stride + c, 1, 3);
  Vec sum[R][VECTORS] = {};
  for (int64_t d = 0; d < depth; ++d) {
    ahead.step();
    Vec right[VECTORS];
    for (int v = 0; v < VECTORS; ++v) right[v] = *reinterpret_cast<const Vec*>(panel + d * WIDE + v * LANES);
    for (int r = 0; r < R; ++r) {
      const float left = x[r * row + d * step];
      for (int v = 0; v < VECTORS; ++v) sum[r][v] += left * right[v];
    }
  }
  for (int r = 0; r < R; ++r) {
    float* to = y + r * stride;
    if (columns == WIDE) {
      for (int v = 0; v < VECTORS; ++v) {
        Vec* out = reinterpret_cast<Vec*>(to + v * LANES);
        if (store == Store::STREAM) stream(to + v * LANES, sum[r][v]);
        else *out = store == Store::ADD ? *out + sum[r][v] : sum[r][v];
      }
    } else {
      const float* from = reinterpret_cast<const float*>(sum[r]);
      for (int64_t c = 0; c < columns; ++c) to[c] = store == Store::ADD ? to[c] + from[c] : from[c];
    }
  }
}

void tiles(int64_t rows, const float* x, int64_t row, int64_t step, const float* panel, int64_t depth, float* y,
           int64_t stride, int64_t columns, Store store, Ahead ahead = {}) {
  ahead.spread((rows + TALL - 1) / TALL * depth);
  for (int64_t r = 0; r < rows; r += TALL) {
    const float* from = x + r * row;
    float* to = y + r * stride;
    switch (std::min<int64_t>(rows - r, TALL)) {
      case 1: tile<1>(from, row, step, panel, depth, to, stride, columns, store, ahead); break;
      case 2: tile<2>(from, row, step, panel, depth, to, stride, columns, store, ahead); break;
      case 3: tile<3>(from, row, step, panel, depth, to, stride, columns, store, ahead); break;
      case 4: tile<4>(from, row, step, panel, depth, to, stride, columns, store, ahead); break;
      case 5: tile<5>(from, row, step, panel, depth, to, stride, columns, store, ahead); break;
      default: tile<TALL>(from, row, step, panel, depth, to, stride, columns, store, ahead);
    }
  }
}

// panel[d, :] = w[d, :columns], zero beyond.
void pack(const float* w, int64_t stride, int64_t depth, int64_t columns, float* panel) {
  for (int64_t d = 0; d < depth; ++d) {
    std::memcpy(panel + d * WIDE, w + d * stride, 4 * columns);
    std::memset(panel + d * WIDE + columns, 0, 4 * (WIDE - columns));
  }
}

template <int STEP>
void exchange(Vec* rows) {
  if constexpr (STEP < LANES) {
    Mask low, high;  // of pairs of rows STEP apart, the blocks of STEP lanes off the diagonal change places
    for (int l = 0; l < LANES; ++l) {
      low[l] = l & STEP ? LANES + l - STEP : l;
      high[l] = l & STEP ? LANES + l : l + STEP;
    }
    for (int i = 0; i < LANES; ++i)
      if (!(i & STEP)) {
        const Vec a = rows[i], b = rows[i + STEP];
#if defined(__clang__)
        for (int l = 0; l < LANES; ++l) {
          rows[i][l] = l & STEP ? b[l - STEP] : a[l];
          rows[i + STEP][l] = l & STEP ? b[l] : a[l + STEP];
        }
#else
        rows[i] = __builtin_shuffle(a, b, low);
        rows[i + STEP] = __builtin_shuffle(a, b, high);
#endif
      }
    exchange<2 * STEP>(rows);
  }
}

// panel[d, c] = w[c, d], zero beyond `columns`.
void pack_transposed(const float* w, int64_t stride, int64_t depth, int64_t columns, float* panel) {
  int64_t c = 0;
  for (; c + LANES <= columns; c += LANES) {
    int64_t d = 0;
    for (; d + LANES <= depth; d += LANES) {
      Vec rows[LANES];
      for (int i = 0; i < LANES; ++i) rows[i] = *reinterpret_cast<const Vec*>(w + (c + i) * stride + d);
      exchange<1>(rows);
      for (int i = 0; i < LANES; ++i) *reinterpret_cast<Vec*>(panel + (d + i) * WIDE + c) = rows[i];
    }
    for (; d < depth; ++d)
      for (int i = 0; i < LANES; ++i) panel[d * WIDE + c + i] = w[(c + i) * stride + d];
  }
  for (; c < WIDE; ++c)
    for (int64_t d = 0; d < depth; ++d) panel[d * WIDE + c] = c < columns ? w[c * stride + d] : 0.0f;
}

// Asks for large pages under an output that nobody has touched: of the time to write 20 MB the first time, most goes into
// a fault for every 4 KiB.
void large_pages(void* from, int64_t bytes) {
#if defined(MADV_HUGEPAGE)
  constexpr uintptr_t page = 2 << 20;
  const uintptr_t start = (reinterpret_cast<uintptr_t>(from) + page - 1) & ~(page - 1);
  const uintptr_t end = (reinterpret_cast<uintptr_t>(from) + bytes) & ~(page - 1);
  if (end > start) madvise(reinterpret_cast<void*>(start), end - start, MADV_HUGEPAGE);
#endif
}

template <int PURPOSE>
float* memory_of_this_thread(int64_t numbers) {
  thread_local std::vector<float> memory(numbers + 16);
  const auto address = reinterpret_cast<uintptr_t>(memory.data());
  return reinterpret_cast<float*>((address + 63) & ~uintptr_t{63});
}

float* panel_of_this_thread() { return memory_of_this_thread<0>(DEPTH * WIDE); }

typedef int32_t Ints __attribute__((vector_size(4 * LANES)));

// e^x to 2 units in the last place (the polynomial of the Cephes library's expf), within [-87, 88]; NaN stays NaN.
Vec exponential(Vec x) {
  constexpr float shift = 12582912.0f;  // 1.5 * 2^23: adding it rounds to a whole number
  x = x > 88.0f ? Vec{} + 88.0f : x < -87.0f ? Vec{} - 87.0f : x;
  const Vec whole = (x * 1.44269504f + shift) - shift;
  const Vec rest = x - whole * 0.693359375f + whole * 2.12194440e-4f;
  Vec sum = Vec{} + 1.9875691500e-4f;
  for (const float c : {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f})
    sum = sum * rest + c;
  sum = sum * rest * rest + rest + 1.0f;
  const Ints power = (__builtin_convertvector(x == x ? whole : Vec{}, Ints) + 127) << 23;
  return sum * reinterpret_cast<Vec>(power);
}

// The numbers are those of native.py: silu, relu, gelu_tanh.
template <int ACTIVATION>
Vec activated(Vec x) {
  if constexpr (ACTIVATION == 1) return x < 0.0f ? Vec{} : x;
  const Vec inner = ACTIVATION == 0 ? x : 1.59576912f * (x + 0.044715f * x * x * x);
  return x / (1.0f + exponential(-inner));
}

// h = a(g) * u over rows of `columns` numbers.
template <int ACTIVATION>
void gated(int64_t rows, int64_t columns, const float* g, const float* u, int64_t from, float* h, int64_t to) {
  for (int64_t r = 0; r < rows; ++r, g += from, u += from, h += to) {
    int64_t c = 0;
    for (; c + LANES <= columns; c += LANES)
      *reinterpret_cast<Vec*>(h + c) = activated<ACTIVATION>(*reinterpret_cast<const Vec*>(g + c)) *
                                       *reinterpret_cast<const Vec*>(u + c);
    if (c == columns) continue;
    Vec last[2] = {};
    std::memcpy(&last[0], g + c, 4 * (columns - c));
    std::memcpy(&last[1], u + c, 4 * (columns - c));
    last[0] = activated<ACTIVATION>(last[0]) * last[1];
    std::memcpy(h + c, &last[0], 4 * (columns - c));
  }
}

// Runs work(i) for every i below count, on this thread and on those of the pool that come in time.
template <typename Work>
void share(ffi::ThreadPool pool, int64_t count, const Work& work) {
  struct State {
    std::atomic<int64_t> next{0}, done{0};
    std::mutex mutex;
    std::condition_variable all;
  };
  auto state = std::make_shared<State>();  // a helper may start when everything is over and its caller has returned
  auto run = [state, count, &work] {
    int64_t finished = 0;
    for (int64_t i; (i = state->next.fetch_add(1)) < count; ++finished) work(i);
    if (finished && state->done.fetch_add(finished) + finished == count) {
      std::lock_guard<std::mutex> lock(state->mutex);
      state->all.notify_one();
    }
  };
  const int64_t helpers = std::min<int64_t>(pool.num_threads(), count) - 1;
  for (int64_t i = 0; i < helpers; ++i) pool.Schedule(std::function<void()>(run));
  run();
  std::unique_lock<std::mutex> lock(state->mutex);
  state->all.wait(lock, [&] { return state->done.load() == count; });
}

// First rows of the groups, and after them the end of the last.
ffi::Error bounds(const int32_t* sizes, int64_t groups, int64_t rows, std::vector<int64_t>* starts) {
  starts->assign(1, 0);
  for (int64_t g = 0; g < groups; ++g) {
    starts->push_back(starts->back() + sizes[g]);
    if (sizes[g] < 0 || starts->back() > rows)
      return ffi::Error::InvalidArgument("group_sizes: group " + std::to_string(g) + " of " + std::to_string(sizes[g]) +
                                         " rows ends at row " + std::to_string(starts->back()) + ", x has " +
                                         std::to_string(rows));
  }
  return ffi::Error::Success();
}

struct Item {
  int64_t group, first, size, column;
};

std::vector<Item> cut(const std::vector<int64_t>& starts, int64_t columns, int64_t every) {
  std::vector<Item> items;  // every: cut this many instead of the rows of the group
  for (int64_t g = 0; g + 1 < static_cast<int64_t>(starts.size()); ++g) {
    const int64_t from = every < 0 ? starts[g] : 0, to = every < 0 ? starts[g + 1] : every;
    for (int64_t first = from; first < to; first += CHUNK)
      for (int64_t column = 0; column < columns; column += WIDE)
        items.push_back({g, first, std::min(CHUNK, to - first), column});
  }
  return items;
}

ffi::Error Matmul(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> x, ffi::Buffer<ffi::F32> w, ffi::Buffer<ffi::S32> sizes,
                  bool transpose, ffi::Result<ffi::Buffer<ffi::F32>> y) {
  const int64_t rows = x.dimensions()[0], K = x.dimensions()[1], N = y->dimensions()[1];
  std::vector<int64_t> starts;
  if (auto error = bounds(sizes.typed_data(), sizes.element_count(), rows, &starts); !error.success()) return error;
  const float *X = x.typed_data(), *W = w.typed_data();
  float* Y = y->typed_data();
  large_pages(Y, y->size_bytes());
  std::memset(Y + starts.back() * N, 0, 4 * N * (rows - starts.back()));
  if (K == 0) std::memset(Y, 0, 4 * N * rows);
  const auto items = cut(starts, N, -1);
  auto source = [&](const Item& item, int64_t k) {
    return W + item.group * K * N + (transpose ? item.column * K + k : k * N + item.column);
  };
  auto ahead = [&](int64_t i, int64_t k) {
    if (k >= K) k = 0, i += pool.num_threads();
    if (i >= static_cast<int64_t>(items.size())) return Ahead();
    const int64_t columns = std::min<int64_t>(WIDE, N - items[i].column), depth = std::min(DEPTH, K - k);
    return transpose ? Ahead(source(items[i], k), K, columns, depth) : Ahead(source(items[i], k), N, depth, columns);
  };
  share(pool, items.size(), [&](int64_t i) {
    const Item& item = items[i];
    const int64_t columns = std::min<int64_t>(WIDE, N - item.column);
    float* panel = panel_of_this_thread();
    for (int64_t k = 0; k < K; k += DEPTH) {
      const int64_t depth = std::min(DEPTH, K - k);
      if (transpose) pack_transposed(source(item, k), K, depth, columns, panel);
      else pack(source(item, k), N, depth, columns, panel);
      tiles(item.size, X + item.first * K + k, K, 1, panel, depth, Y + item.first * N + item.column, N, columns,
            k > 0 ? Store::ADD : Store::SET, ahead(i, k + DEPTH));
    }
  });
  return ffi::Error::Success();
}

// One pass over x for both products, activated while they are in the cache; with `keep` they are outputs too.
ffi::Error Glu(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> x, ffi::Buffer<ffi::F32> gate, ffi::Buffer<ffi::F32> up,
               ffi::Buffer<ffi::S32> sizes, int64_t activation, ffi::Result<ffi::Buffer<ffi::F32>> h,
               ffi::RemainingRets kept) {
  const int64_t rows = x.dimensions()[0], K = x.dimensions()[1], N = h->dimensions()[1];
  std::vector<int64_t> starts;
  if (auto error = bounds(sizes.typed_data(), sizes.element_count(), rows, &starts); !error.success()) return error;
  const float *X = x.typed_data(), *W[2] = {gate.typed_data(), up.typed_data()};
  float *H = h->typed_data(), *products[2] = {nullptr, nullptr};
  for (size_t i = 0; i < kept.size(); ++i) products[i] = kept.get<ffi::Buffer<ffi::F32>>(i).value()->typed_data();
  for (float* out : {H, products[0], products[1]}) {
    if (out == nullptr) continue;
    large_pages(out, 4 * N * rows);
    std::memset(out + starts.back() * N, 0, 4 * N * (rows - starts.back()));
    if (K == 0) std::memset(out, 0, 4 * N * rows);
  }
  const auto run = activation == 0 ? gated<0> : activation == 1 ? gated<1> : gated<2>;
  const auto items = K == 0 ? std::vector<Item>() : cut(starts, N, -1);
  auto source = [&](const Item& item, int side, int64_t k) { return W[side] + (item.group * K + k) * N + item.column; };
  auto ahead = [&](int64_t i, int side, int64_t k) {
    if (k >= K) k = 0, ++side;
    if (side == 2) side = 0, i += pool.num_threads();
    if (i >= static_cast<int64_t>(items.size())) return Ahead();
    return Ahead(source(items[i], side, k), N, std::min(DEPTH, K - k), std::min<int64_t>(WIDE, N - items[i].column));
  };
  share(pool, items.size(), [&](int64_t i) {
    const Item& item = items[i];
    const int64_t columns = std::min<int64_t>(WIDE, N - item.column), corner = item.first * N + item.column;
    const int64_t stride = kept.size() ? N : WIDE;
    float *panel = panel_of_this_thread(), *scratch = memory_of_this_thread<1>(2 * CHUNK * WIDE), *to[2];
    for (int side = 0; side < 2; ++side) {
      to[side] = kept.size() ? products[side] + corner : scratch + side * CHUNK * WIDE;
      for (int64_t k = 0; k < K; k += DEPTH) {
        const int64_t depth = std::min(DEPTH, K - k);
        pack(source(item, side, k), N, depth, columns, panel);
        tiles(item.size, X + item.first * K + k, K, 1, panel, depth, to[side], stride, columns,
              k > 0 ? Store::ADD : Store::SET, ahead(i, side, k + DEPTH));
      }
    }
    run(item.size, columns, to[0], to[1], stride, H + corner, N);
  });
  return ffi::Error::Success();
}

ffi::Error Outer(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> x, ffi::Buffer<ffi::F32> dy, ffi::Buffer<ffi::S32> sizes,
                 ffi::Result<ffi::Buffer<ffi::F32>> dw) {
  const int64_t rows = x.dimensions()[0], K = x.dimensions()[1], N = dy.dimensions()[1];
  std::vector<int64_t> starts;
  if (auto error = bounds(sizes.typed_data(), sizes.element_count(), rows, &starts); !error.success()) return error;
  const float *X = x.typed_data(), *D = dy.typed_data();
  float* W = dw->typed_data();
  large_pages(W, dw->size_bytes());
  const auto items = cut(starts, N, K);
  const bool aligned = N % LANES == 0 && reinterpret_cast<uintptr_t>(W) % (4 * LANES) == 0;
  const Store first = aligned && dw->size_bytes() > CACHED ? Store::STREAM : Store::SET;
  share(pool, items.size(), [&](int64_t i) {
    const Item& item = items[i];
    const int64_t columns = std::min<int64_t>(WIDE, N - item.column), end = starts[item.group + 1];
    float *panel = panel_of_this_thread(), *to = W + (item.group * K + item.first) * N + item.column;
    if (starts[item.group] == end)
      for (int64_t k = 0; k < item.size; ++k) std::memset(to + k * N, 0, 4 * columns);
    for (int64_t m = starts[item.group]; m < end; m += DEPTH) {
      const int64_t depth = std::min(DEPTH, end - m);
      pack(D + m * N + item.column, N, depth, columns, panel);
      // An item of more rows than a panel holds adds to what it wrote: it keeps that in the cache.
      const Store store = m > starts[item.group] ? Store::ADD : m + depth < end ? Store::SET : first;
      tiles(item.size, X + m * K + item.first, 1, K, panel, depth, to, N, columns, store);
    }
    if (first == Store::STREAM) streamed();
  });
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxmodels_grouped_matmul, Matmul,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Attr<bool>("transpose")
                                  .Ret<ffi::Buffer<ffi::F32>>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxmodels_grouped_glu, Glu,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Attr<int64_t>("activation")
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .RemainingRets());

XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxmodels_grouped_outer, Outer,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>());
