// The grouped products on CPU (see native.py): rows of each group times its own matrix, and x_e^T dy_e of each group.
//
// One register tile serves both: TALL rows by WIDE columns, summed over a depth, with the right operand packed into a panel
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
constexpr int64_t CHUNK = 192;  // rows of an item, or columns of x in the outer product; a multiple of TALL

typedef float Vec __attribute__((vector_size(4 * LANES), aligned(4)));
typedef int32_t Mask __attribute__((vector_size(4 * LANES)));

// y[r, :] (+)= sum over d of x(r, d) * panel[d, :]; x(r, d) lies at x[r * row + d * step].
template <int R>
void tile(const float* x, int64_t row, int64_t step, const float* panel, int64_t depth, float* y, int64_t stride,
          int64_t columns, bool add) {
  Vec sum[R][VECTORS] = {};
  for (int64_t d = 0; d < depth; ++d) {
    Vec right[VECTORS];
    for (int v = 0; v < VECTORS; ++v) right[v] = *reinterpret_cast<const Vec*>(panel + d * WIDE + v * LANES);
    for (int r = 0; r < R; ++r) {
      const float left = x[r * row + d * step];
      for (int v = 0; v < VECTORS; ++v) sum[r][v] += left * right[v];
    }
  }
  for (int r = 0; r < R; ++r) {
    float whole[WIDE];
    float* to = columns == WIDE ? y + r * stride : whole;
    for (int v = 0; v < VECTORS; ++v) {
      Vec* out = reinterpret_cast<Vec*>(to + v * LANES);
      *out = columns == WIDE && add ? *out + sum[r][v] : sum[r][v];
    }
    if (columns < WIDE)
      for (int64_t c = 0; c < columns; ++c) y[r * stride + c] = add ? y[r * stride + c] + whole[c] : whole[c];
  }
}

void tiles(int64_t rows, const float* x, int64_t row, int64_t step, const float* panel, int64_t depth, float* y,
           int64_t stride, int64_t columns, bool add) {
  for (int64_t r = 0; r < rows; r += TALL) {
    const float* from = x + r * row;
    float* to = y + r * stride;
    switch (std::min<int64_t>(rows - r, TALL)) {
      case 1: tile<1>(from, row, step, panel, depth, to, stride, columns, add); break;
      case 2: tile<2>(from, row, step, panel, depth, to, stride, columns, add); break;
      case 3: tile<3>(from, row, step, panel, depth, to, stride, columns, add); break;
      case 4: tile<4>(from, row, step, panel, depth, to, stride, columns, add); break;
      case 5: tile<5>(from, row, step, panel, depth, to, stride, columns, add); break;
      default: tile<TALL>(from, row, step, panel, depth, to, stride, columns, add);
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

float* panel_of_this_thread() {
  thread_local std::vector<float> memory(DEPTH * WIDE + 16);
  const auto address = reinterpret_cast<uintptr_t>(memory.data());
  return reinterpret_cast<float*>((address + 63) & ~uintptr_t{63});
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
  std::memset(Y + starts.back() * N, 0, 4 * N * (rows - starts.back()));
  if (K == 0) std::memset(Y, 0, 4 * N * rows);
  const auto items = cut(starts, N, -1);
  share(pool, items.size(), [&](int64_t i) {
    const Item& item = items[i];
    const int64_t columns = std::min<int64_t>(WIDE, N - item.column);
    float* panel = panel_of_this_thread();
    for (int64_t k = 0; k < K; k += DEPTH) {
      const int64_t depth = std::min(DEPTH, K - k);
      const float* matrix = W + item.group * K * N;
      if (transpose) pack_transposed(matrix + item.column * K + k, K, depth, columns, panel);
      else pack(matrix + k * N + item.column, N, depth, columns, panel);
      tiles(item.size, X + item.first * K + k, K, 1, panel, depth, Y + item.first * N + item.column, N, columns, k > 0);
    }
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
  const auto items = cut(starts, N, K);
  share(pool, items.size(), [&](int64_t i) {
    const Item& item = items[i];
    const int64_t columns = std::min<int64_t>(WIDE, N - item.column), end = starts[item.group + 1];
    float *panel = panel_of_this_thread(), *to = W + (item.group * K + item.first) * N + item.column;
    if (starts[item.group] == end)
      for (int64_t k = 0; k < item.size; ++k) std::memset(to + k * N, 0, 4 * columns);
    for (int64_t m = starts[item.group]; m < end; m += DEPTH) {
      const int64_t depth = std::min(DEPTH, end - m);
      pack(D + m * N + item.column, N, depth, columns, panel);
      tiles(item.size, X + m * K + item.first, 1, K, panel, depth, to, N, columns, m > starts[item.group]);
    }
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

XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxmodels_grouped_outer, Outer,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>());
