// Gradients of attention, its lse and its row statistics, from lse, without the N x N matrix:
//   L = (S - lse) - lse_low,  P = exp(L),  dP = dout v^T,  delta = dout . out,
//   dS = P * (dP - delta + c(j) + a(j) L + [i = j] s + w d),  dq = scale dS k,  dk = scale dS^T q,
//   dv = P^T dout,  dbias = dS summed over the dims that bias broadcasts over;
// of cosine attention, with f = exp(min(logit_scale, ln 100)) / |q| and g = 1 / |k|:
//   G = f dS g,  x = G k,  dq = x - q (q . x) / |q|^2,  dlogit_scale = sum of q . x,  dk alike.
//
// in:       q, k, v, out, dout by strides, features contiguous; lse and lse_low [B, H, Nq]; coef
//           [6, B, H, Nq] or none
// out:      dq [B, Nq, H, D], dk and dv [B, Nk, H, D], apart or the parts of [B, N, 3, H, D]; dbias
//           like bias, dtable like table, dlogit_scale [H]; every element written
// numerics: everything in fp32, rounded once; delta is the sum of P dP where one block of keys
//           holds them all. Where bf16 has a dot product of its own, P and dS are rounded to bf16
//           for it, and where it has tiles (cpu_bwd_tiles.h), but for dlogit_scale
// cost:     per block of keys (packed three ways, in L2) and block of rows five products: scores
//           and dP a few rows at a time, dq from them, then dk and dv for the whole block of rows
// order:    a head belongs to one task, its sums run over rows in order; few heads are split into
//           chunks of rows, by shape alone, whose dk and dv are added in order; so is dbias, head
//           by head, and dtable, from parts by groups of images and chunks of rows, and dlogit_scale
#include "cpu/attention/delta.h"
#include "cpu/kernels.h"
#include "ops/attention/cpu_bwd_rows.h"
#include "ops/attention/cpu_bwd_tiles.h"

namespace mimkernels::MIMKERNELS_ISA {
namespace {

constexpr int kStride = kBlockKeys + 16;  // between score rows; an odd number of cache lines
constexpr int64_t kBlockTiles = 72 / kRowTile;
constexpr int64_t kLeastRows = 128;    // of a head that are worth a task
constexpr int64_t kTasks = 8;          // wanted: every further one costs a copy of dk and dv
constexpr int64_t kLeastGroups = 8;    // of heads with a bias of their own that make good tasks
constexpr int64_t kTableGroups = 128;  // of heads that share a table: each has a part of dtable

// A row of weights, rounded.
MIMKERNELS_INLINE void round_weights(bf16* dst, const float* src, int64_t padded) {
  for (int64_t j = 0; j < padded; j += kLanes) store_weights(dst + j, load_floats(src + j));
}

template <typename T>
class Worker : PassWorker<T> {
  using Base = PassWorker<T>;
  using Base::arena_, Base::b_, Base::blocks_, Base::h_, Base::mask_row_, Base::p_, Base::pass_,
      Base::s_, Base::start_;
  using E = Operand<T>;
  static constexpr bool kPairs = kDepth<E> > 1;

 public:
  static constexpr int64_t kBlockRows = kBlockTiles * kRowTile;

  Worker(const AttentionBwdParams& params, const Pass& pass)
      : Base(params, pass, most_rows(params, pass)),
        tiles_(s_.queries),
        columns_(padded_columns(s_.dim)) {}

  bool reserve() {
    allocate();
    if (!arena_.reserve()) return false;
    allocate();
    return true;
  }

  // One chunk of rows of one group of heads.
  void run(int64_t task) {
    const int64_t chunk = task % pass_.chunks;
    const int64_t begin = tiles_.tiles * chunk / pass_.chunks;
    const int64_t end = tiles_.tiles * (chunk + 1) / pass_.chunks;
    first_row_ = tiles_.first(begin);
    Base::visit_heads(task, first_row_, tiles_.first(end), [&](int64_t) {
      for (int64_t block = 0; block < blocks_.blocks; ++block) visit_block(block, begin, end);
    });
  }

 private:
  static int64_t most_rows(const AttentionBwdParams& params, const Pass& pass) {
    return ceil_div(params.scores.queries, pass.chunks) + 2 * kRowTile;
  }

  void allocate() {
    const int64_t block = blocks_.size;
    const int64_t chunk_rows = most_rows(p_, pass_);
    keys_ = arena_.template take<E>(block * s_.dim);
    values_ = arena_.template take<E>(block * s_.dim);
    key_rows_ = arena_.template take<E>(pass_.grads ? block * columns_ : 0);
    dk_ = arena_.floats(pass_.grads ? block * columns_ : 0);
    dv_ = arena_.floats(pass_.grads ? block * columns_ : 0);
    p_rows_ = arena_.floats((kPairs ? kRowTile : kBlockRows) * kStride);
    ds_rows_ = arena_.floats((kPairs ? kRowTile : kBlockRows) * kStride);
    p_weights_ = arena_.template take<E>(kPairs ? kBlockRows * kStride : 0);
    ds_weights_ = arena_.template take<E>(kPairs ? kBlockRows * kStride : 0);
    pairs_ = arena_.template take<E>(kPairs ? (kBlockRows + 1) * kStride : 0);
    query_ = arena_.template take<E>((kBlockRows + 1) * kDimStride);
    upstream_ = arena_.template take<E>((kBlockRows + 1) * kDimStride);
    dq_ = arena_.floats((blocks_.blocks > 1 ? chunk_rows : kRowTile) * kDimStride);
    Base::allocate_rows(kStride);
  }

  void visit_block(int64_t block, int64_t begin, int64_t end) {
    const int64_t first = blocks_.first(block);
    const int64_t count = blocks_.length(block);
    const uint8_t* allowed = mask_of(s_.key_mask, b_);
    const T* k = head_at<T>(s_.k, b_, h_, first);
    pack_transposed(k, s_.k.stride_token, count, s_.dim,
                    allowed == nullptr ? nullptr : allowed + first, keys_);
    pack_transposed(head_at<T>(p_.v, b_, h_, first), p_.v.stride_token, count, s_.dim, nullptr,
                    values_);
    start_.set_block(mask_row_, b_, h_, first, count);
    if (pass_.grads) {
      pack_rows(k, s_.k.stride_token, count, s_.dim, key_rows_);
      memset(dk_, 0, static_cast<size_t>(count * columns_) * sizeof(float));
      memset(dv_, 0, static_cast<size_t>(count * columns_) * sizeof(float));
    }
    const int64_t tiles = end - begin;
    const int64_t parts = ceil_div(tiles, kBlockTiles);
    for (int64_t part = 0; part < parts; ++part) {
      visit_rows(begin + tiles * part / parts, begin + tiles * (part + 1) / parts, block);
    }
    if (pass_.grads) write_keys(first, count);
  }

  void visit_rows(int64_t begin, int64_t end, int64_t block) {
    const int64_t top = tiles_.first(begin);
    const int64_t rows = tiles_.first(end) - top;
    const int64_t count = blocks_.length(block);
    copy_rows(head_at<T>(s_.q, b_, h_, top), s_.q.stride_token, rows, s_.dim, scale_.rows, query_);
    copy_rows(head_at<T>(p_.dout, b_, h_, top), p_.dout.stride_token, rows, s_.dim, 1.0f,
              upstream_);
    for (int64_t tile = begin; tile < end; ++tile) {
      const int64_t row = tiles_.first(tile);
      const int64_t n = tiles_.first(tile + 1) - row;
      score_tile(row, n, row - top, block);
      if (pass_.grads) finish_queries(row, n, row - top, block);
    }
    if (!pass_.grads) return;
    gather_keys(p_weights(), upstream_, rows, count, dv_);
    gather_keys(ds_weights(), query_, rows, count, dk_);
  }

  // out[key, :] += sum over rows of weights[row, key] * right[row, :].
  void gather_keys(const E* weights, const E* right, int64_t rows, int64_t count, float* out) {
    if constexpr (kPairs) {
      copy_rows<E, kStride>(weights, kStride, rows, padded_columns(count), 1.0f, pairs_);
      weights = pairs_;
    }
    const RowTiles tiles(count);
    for (int64_t tile = 0; tile < tiles.tiles; ++tile) {
      const int64_t key = tiles.first(tile);
      with_row_count(tiles.first(tile + 1) - key, [&](auto n) {
        gather_panels<kStride, n.value>(weights + key * kDepth<E>, right, rows, s_.dim,
                                        out + key * columns_, columns_);
      });
    }
  }

  // P and dS of a block of rows, as the products read them.
  E* p_weights() const {
    if constexpr (kPairs) {
      return p_weights_;
    } else {
      return p_rows_;
    }
  }
  E* ds_weights() const {
    if constexpr (kPairs) {
      return ds_weights_;
    } else {
      return ds_rows_;
    }
  }

  // P and dS of the rows from `row` on, which are rows `at` and up of the buffers.
  void score_tile(int64_t row, int64_t rows, int64_t at, int64_t block) {
    const int64_t count = blocks_.length(block);
    float* s = p_rows_ + (kPairs ? 0 : at * kStride);
    float* ds = ds_rows_ + (kPairs ? 0 : at * kStride);
    ScoreTile<E> scores;
    ScoreTile<E> products;
    if constexpr (kPairs) {
      scores.rows = head_at<T>(s_.q, b_, h_, row);
      scores.row_stride = s_.q.stride_token;
      products.rows = head_at<T>(p_.dout, b_, h_, row);
      products.row_stride = p_.dout.stride_token;
    } else {
      scores.rows = query_ + at * kDimStride;
      products.rows = upstream_ + at * kDimStride;
    }
    scores.panels = keys_;
    scores.dim = s_.dim;
    scores.run = score_run(s_);
    scores.keys = count;
    scores.scale = scale_.products;
    scores.scores = s;
    if (!Base::sums_scale()) start_.template set_rows<kStride>(scores, row, rows);
    products.panels = values_;
    products.dim = s_.dim;
    products.run = product_run(s_.dim);
    products.keys = count;
    products.scores = ds;
    with_row_count(rows, [&](auto n) {
      score_rows<kStride, false, n.value>(scores);
      score_rows<kStride, false, n.value>(products);
    });
    const int64_t columns = padded_columns(count);
    for (int64_t i = 0; i < rows; ++i) {
      float* s_row = s + i * kStride;
      float* ds_row = ds + i * kStride;
      typename Base::RowEnd end;
      if (Base::sums_scale()) {
        Base::start_cosines(row + i, false, count, s_row, kStride);
        end = Base::template begin_row<true>(row + i, block, s_row, ds_row,
                                             Base::start_of(row + i, count), 1.0f);
      } else {
        end = Base::template begin_row<false>(row + i, block, s_row, ds_row, nullptr, 1.0f);
      }
      Base::end_row(row + i, block, s_row, ds_row, end);
      if (Base::sums_scale()) Base::add_cosines(ds_row, false, count, kStride);
      if constexpr (kPairs) {
        round_weights(p_weights_ + (at + i) * kStride, s_row, columns);
        round_weights(ds_weights_ + (at + i) * kStride, ds_row, columns);
      }
    }
  }

  void finish_queries(int64_t row, int64_t rows, int64_t at, int64_t block) {
    float* dq = dq_ + (blocks_.blocks > 1 ? (row - first_row_) * kDimStride : 0);
    const int64_t count = blocks_.length(block);
    const E* weights = ds_weights() + at * kStride;
    const int64_t out_stride = p_.stride_grad;
    T* out = Base::gradient_at(p_.dq, s_.queries, row);
    const bool last = block + 1 == blocks_.blocks;
    const auto finish = [&](int r, int64_t c, Floats value) MIMKERNELS_LAMBDA_INLINE {
      if (last && !s_.cosine.given) {
        put_columns(out + r * out_stride + c, value * splat(s_.scale), s_.dim - c);
      } else {
        store_floats(dq + r * kDimStride + c, value);
      }
    };
    with_row_count(rows, [&](auto n) {
      if (block > 0) {
        weigh_panels<kStride, true, n.value>(weights, key_rows_, count, s_.dim, dq, finish);
      } else {
        weigh_panels<kStride, false, n.value>(weights, key_rows_, count, s_.dim, dq, finish);
      }
    });
    if (!last || !s_.cosine.given) return;
    for (int64_t i = 0; i < rows; ++i) Base::write_query(row + i, dq + i * kDimStride);
  }

  void write_keys(int64_t first, int64_t count) {
    if (pass_.chunks == 1) {
      T* dk = Base::gradient_at(p_.dk, s_.keys, first);
      T* dv = Base::gradient_at(p_.dv, s_.keys, first);
      for (int64_t j = 0; j < count; ++j) {
        if (s_.cosine.given) {
          Base::write_key(first + j, dk_ + j * columns_);
        } else {
          write_row(dk + j * p_.stride_grad, dk_ + j * columns_, s_.dim, scale_.products);
        }
        write_row(dv + j * p_.stride_grad, dv_ + j * columns_, s_.dim, 1.0f);
      }
      return;
    }
    float* dk = Base::part_at(first);
    float* dv = dk + Base::part_distance();
    for (int64_t j = 0; j < count; ++j) {
      write_row(dk + j * s_.dim, dk_ + j * columns_, s_.dim, scale_.products);
      write_row(dv + j * s_.dim, dv_ + j * columns_, s_.dim, 1.0f);
    }
  }

  RowTiles tiles_;
  int64_t columns_;
  SplitScale scale_{s_.scale, !kPairs};
  int64_t first_row_ = 0;
  E* keys_ = nullptr;
  E* values_ = nullptr;
  E* key_rows_ = nullptr;
  float* dk_ = nullptr;
  float* dv_ = nullptr;
  float* p_rows_ = nullptr;
  float* ds_rows_ = nullptr;
  E* p_weights_ = nullptr;
  E* ds_weights_ = nullptr;
  E* pairs_ = nullptr;
  E* query_ = nullptr;
  E* upstream_ = nullptr;
  float* dq_ = nullptr;
};

// What computes the gradients of T.
template <typename T>
using WorkerOf =
    std::conditional_t<kMatrixTiles && std::is_same_v<T, bf16>, TileBackward, Worker<T>>;

template <typename T>
Status run_pass(const AttentionBwdParams& params, const Pass& pass, ParallelFor parallel_for) {
  int failures = 0;
  run_parallel(parallel_for, pass.groups.count() * pass.chunks, 1, [&](int64_t begin, int64_t end) {
    WorkerOf<T> worker(params, pass);
    if (!worker.reserve()) {
      __atomic_store_n(&failures, 1, __ATOMIC_RELAXED);
      return;
    }
    for (int64_t task = begin; task < end; ++task) worker.run(task);
  });
  return failures != 0 ? out_of_memory() : Status{};
}

// dk and dv as the sums of their chunks, in order.
template <typename T>
void add_parts(const AttentionBwdParams& p, const Pass& pass, ParallelFor parallel_for) {
  const AttentionScores& s = p.scores;
  const int64_t heads = s.batch * s.heads;
  run_parallel(parallel_for, 2 * heads * s.keys, grain_for(pass.chunks * s.dim * 4),
               [&](int64_t begin, int64_t end) {
                 alignas(64) float sum[kDimStride];
                 for (int64_t i = begin; i < end; ++i) {
                   const int64_t which = i / (heads * s.keys);
                   const int64_t head = i / s.keys % heads;
                   const int64_t key = i % s.keys;
                   const float* part = pass.parts + which * pass.chunks * heads * s.keys * s.dim +
                                       (head * s.keys + key) * s.dim;
                   set_acc(sum, part, s.dim);
                   for (int64_t c = 1; c < pass.chunks; ++c) {
                     add_to_acc(sum, part + c * heads * s.keys * s.dim, s.dim);
                   }
                   T* out = static_cast<T*>(which == 0 ? p.dk : p.dv);
                   const int64_t b = head / s.heads;
                   const int64_t h = head % s.heads;
                   out += (b * s.keys + key) * p.stride_grad + h * s.dim;
                   if (which == 0 && s.cosine.given) {
                     write_tangent(out, sum, head_at<T>(s.k, b, h, key), s.dim);
                   } else {
                     round_acc<false>(out, sum, s.dim);
                   }
                 }
               });
}

// dtable as the sum of its parts, in order.
MIMKERNELS_INLINE Status add_table_parts(const AttentionBwdParams& p, const Pass& pass) {
  const AttentionScores& s = p.scores;
  const int64_t parts = pass.groups.group_batch * pass.chunks;
  return with_float_type(s.table.dtype, [&](auto type) {
    auto* const out = static_cast<decltype(type)*>(p.dtable);
    for (int64_t t = 0; t < s.table.entries; ++t) {
      for (int64_t h = 0; h < s.heads; ++h) {
        double sum = 0.0;
        for (int64_t part = 0; part < parts; ++part) {
          sum += pass.table_parts[(part * s.heads + h) * s.table.entries + t];
        }
        put_columns(out + t * s.heads + h, splat(static_cast<float>(sum)), 1);
      }
    }
    return Status{};
  });
}

// dlogit_scale as the sum of its parts, in order; 0 where the scale is at its largest.
MIMKERNELS_INLINE void add_scale_parts(const AttentionBwdParams& p, const Pass& pass) {
  const AttentionScores& s = p.scores;
  for (int64_t h = 0; h < s.heads; ++h) {
    double sum = 0.0;
    for (int64_t part = 0; part < pass.chunks * s.batch; ++part) {
      sum += pass.scale_parts[part * s.heads + h];
    }
    const bool capped = s.cosine.logit_scale[h] > kLargestLogitScale;
    p.dlogit_scale[h] = capped ? 0.0f : static_cast<float>(sum);
  }
}

// Of gradients of no score. Packed, which takes as many queries as keys, they are empty themselves.
template <typename T>
void write_zeros(const AttentionBwdParams& p) {
  const AttentionScores& s = p.scores;
  const size_t row = static_cast<size_t>(s.batch * s.heads * s.dim) * sizeof(T);
  memset(p.dq, 0, row * static_cast<size_t>(s.queries));
  memset(p.dk, 0, row * static_cast<size_t>(s.keys));
  memset(p.dv, 0, row * static_cast<size_t>(s.keys));
  const auto clear = [](void* dst, DType dtype, int64_t count) {
    const size_t size = dtype == DType::kFloat32 ? sizeof(float) : sizeof(T);
    if (dst != nullptr) memset(dst, 0, static_cast<size_t>(count) * size);
  };
  clear(p.dbias, s.bias.dtype, s.bias.windows * s.bias.heads * s.queries * s.keys);
  clear(p.dtable, s.table.dtype, s.table.entries * s.heads);
  clear(p.dlogit_scale, DType::kFloat32, s.heads);
}

template <typename T>
Status run_backward(const AttentionBwdParams& p, ParallelFor parallel_for) {
  const AttentionScores& s = p.scores;
  const Status good = check_table(s);
  if (!good.ok()) return good;
  const int64_t heads = s.batch * s.heads;
  if (heads * s.queries * s.keys == 0) {
    write_zeros<T>(p);
    return Status{};
  }
  const HeadGroups alone{s.batch, s.heads, s.batch, s.heads};
  const HeadGroups sharing{s.batch, s.heads, s.bias.windows, s.bias.heads};
  const HeadGroups of_table{s.batch, s.heads, min_of(s.batch, ceil_div(kTableGroups, s.heads)),
                            s.heads};
  const bool sums_bias = p.dbias != nullptr && sharing.shared();
  Scratch<float> bias_sums(
      sums_bias && s.bias.dtype != DType::kFloat32 ? sharing.count() * s.queries : 0, s.keys);
  if (bias_sums.failed()) return out_of_memory();
  // Heads that share a bias are one task, in order. Where that leaves too few tasks, dbias gets a
  // pass of its own, which recomputes dS and splits the rows instead; so it does beside a table,
  // whose groups are of one head, if heads share the bias.
  const bool together = p.dbias != nullptr && (!sums_bias || sharing.count() >= kLeastGroups) &&
                        (p.dtable == nullptr || sharing.group_heads == s.heads);
  Pass main;
  main.bias = together;
  main.table = p.dtable != nullptr;
  main.groups = together ? sharing : s.table.given ? of_table : alone;
  main.chunks = row_chunks(main.groups.count(), s.queries, kLeastRows, kTasks);
  main.bias_sums = sums_bias && s.bias.dtype != DType::kFloat32 ? bias_sums.get() : nullptr;
  Scratch<float> parts(main.chunks > 1 ? 2 * main.chunks * heads * s.keys : 0, s.dim);
  if (parts.failed()) return out_of_memory();
  main.parts = parts.get();
  Scratch<float> table_parts(main.table ? main.groups.group_batch * main.chunks * s.heads : 0,
                             s.table.entries);
  if (table_parts.failed()) return out_of_memory();
  main.table_parts = table_parts.get();
  Scratch<double> scale_parts(p.dlogit_scale != nullptr ? main.chunks * heads : 0);
  if (scale_parts.failed()) return out_of_memory();
  if (p.dlogit_scale != nullptr) main.scale_parts = scale_parts.get();
  const bool coarse =
      (main.table || s.cosine.given) && !std::is_same_v<T, float> && s.keys > kBlockKeys;
  Scratch<float> delta(coarse ? heads * s.queries : 0);
  if (delta.failed()) return out_of_memory();
  if (coarse) {
    const Status summed = sum_delta<T>(p, delta.get(), parallel_for);
    if (!summed.ok()) return summed;
    main.delta = delta.get();
  }
  const Status status = run_pass<T>(p, main, parallel_for);
  if (!status.ok()) return status;
  if (main.chunks > 1) add_parts<T>(p, main, parallel_for);
  if (main.table) {
    const Status added = add_table_parts(p, main);
    if (!added.ok()) return added;
  }
  if (p.dlogit_scale != nullptr) add_scale_parts(p, main);
  if (p.dbias == nullptr || together) return Status{};
  Pass bias = main;
  bias.grads = false;
  bias.bias = true;
  bias.table = false;
  bias.scale_parts = nullptr;
  bias.groups = sharing;
  bias.chunks = max_of(1, ceil_div(s.queries, WorkerOf<T>::kBlockRows));
  return run_pass<T>(p, bias, parallel_for);
}

}  // namespace

Status attention_bwd(const AttentionBwdParams& params, ParallelFor parallel_for) {
  return with_own_type(params.scores.dtype, [&](auto type) {
    using T = decltype(type);
    return with_factors<T>(params, parallel_for, [&](const AttentionBwdParams& p) {
      return run_backward<T>(p, parallel_for);
    });
  });
}

}  // namespace mimkernels::MIMKERNELS_ISA
