// Gradients of attention, its lse and its row statistics, from lse, without the N x N matrix:
//   L = (S - lse) - lse_low,  P = exp(L),  dP = dout v^T,  delta = dout . out,
//   dS = P * (dP - delta + c(j) + a(j) L + [i = j] s + w d),  dq = scale dS k,  dk = scale dS^T q,
//   dv = P^T dout,  dbias = dS summed over the dims that bias broadcasts over.
//
// in:       q, k, v, out, dout by strides, features contiguous; lse and lse_low [B, H, Nq]; coef
//           [6, B, H, Nq] or none
// out:      dq [B, Nq, H, D], dk and dv [B, Nk, H, D], apart or the parts of [B, N, 3, H, D]; dbias
//           like bias; every element written
// numerics: everything in fp32, rounded once; delta is the sum of P dP where one block of keys
//           holds them all. Where bf16 has a dot product of its own, P and dS are rounded to bf16
//           for it
// cost:     per block of keys (packed three ways, in L2) and block of rows five products: scores
//           and dP a few rows at a time, dq from them, then dk and dv for the whole block of rows
// order:    a head belongs to one task, its sums run over rows in order; few heads are split into
//           chunks of rows, by shape alone, whose dk and dv are added in order; so is dbias, head
//           by head
#include "cpu/attention/block.h"
#include "cpu/kernels.h"
#include "ops/attention/params.h"

namespace mimkernels::MIMKERNELS_ISA {
namespace {

constexpr int64_t kBlockKeys = 320;
constexpr int kStride = kBlockKeys + 16;  // between score rows; an odd number of cache lines
constexpr int64_t kBlockTiles = 72 / kRowTile;
constexpr int64_t kBlockRows = kBlockTiles * kRowTile;
constexpr int64_t kLeastRows = 128;  // of a head that are worth a task
constexpr int64_t kTasks = 8;        // wanted: every further one costs a copy of dk and dv
constexpr int64_t kLeastGroups = 8;  // of heads with a bias of their own that make good tasks

// The six numbers of a row that lead from upstream gradients of lse and statistics to dS.
struct RowCoef {
  float c_prefix = 0.0f;
  float a_prefix = 0.0f;
  float c_patch = 0.0f;
  float a_patch = 0.0f;
  float own = 0.0f;
  float far = 0.0f;
};

// For one row, with x = dP - centre, replaces scores s by P and dP by x + c(j) + a(j) L + w d;
// returns the sum of P x.
template <bool kCoef, bool kFarther>
MIMKERNELS_INLINE float probability_row(float* s, float* dp, const float* distance, int64_t padded,
                                        int64_t prefix, float lse, float lse_low, float centre,
                                        const RowCoef& coef) {
  const Floats shift = splat(lse);
  const Floats low = splat(lse_low);
  Floats sum = {};
  const auto step = [&](int64_t j, Floats c, Floats a) MIMKERNELS_LAMBDA_INLINE {
    Floats log_p;
    const Floats p = exp_clamped((load_floats(s + j) - shift) - low, log_p);
    Floats t = load_floats(dp + j) - splat(centre);
    sum = mul_add(p, t, sum);
    store_floats(s + j, p);
    if constexpr (kCoef) t += mul_add(a, log_p, c);
    if constexpr (kFarther) t = mul_add(splat(coef.far), load_floats(distance + j), t);
    store_floats(dp + j, t);
  };
  int64_t j = 0;
  if constexpr (kCoef) {
    for (; j < prefix; j += kLanes) {
      const Ints patch =
          (Ints)(lane_numbers(static_cast<int32_t>(j)) >= static_cast<int32_t>(prefix));
      step(j, choose_lanes(patch, splat(coef.c_patch), splat(coef.c_prefix)),
           choose_lanes(patch, splat(coef.a_patch), splat(coef.a_prefix)));
    }
  }
  const Floats c = splat(coef.c_patch);
  const Floats a = splat(coef.a_patch);
  for (; j < padded; j += kLanes) step(j, c, a);
  return add_lanes(sum);
}

// dS = P * (t - rest), in t's place.
MIMKERNELS_INLINE void gradient_row(const float* p, float* t, int64_t padded, float rest) {
  const Floats minus = splat(rest);
  for (int64_t j = 0; j < padded; j += kLanes) {
    store_floats(t + j, load_floats(p + j) * (load_floats(t + j) - minus));
  }
}

// A row of weights, rounded.
MIMKERNELS_INLINE void round_weights(bf16* dst, const float* src, int64_t padded) {
  for (int64_t j = 0; j < padded; j += kLanes) store_weights(dst + j, load_floats(src + j));
}

template <typename T>
MIMKERNELS_INLINE float dot_row(const T* a, const T* b, int64_t dim) {
  Floats sum = {};
  for (int64_t c = 0; c < dim; c += kLanes)
    sum = mul_add(load_columns(a + c, dim - c), load_columns(b + c, dim - c), sum);
  return add_lanes(sum);
}

// dst (+)= src for one row of dbias.
template <typename T>
MIMKERNELS_INLINE void put_bias_row(T* dst, const float* src, int64_t count, bool add) {
  int64_t j = 0;
  for (; j + kLanes <= count; j += kLanes) {
    Floats value = load_floats(src + j);
    if (add) value += load_part<kLanes>(dst + j);
    store_part<kLanes>(dst + j, value);
  }
  if (j == count) return;
  Pack<kLanes> last;
  last.v[0] = load_floats(src + j);
  if (add) last.v[0] += load_some<kLanes>(dst + j, count - j).v[0];
  store_some<kLanes>(dst + j, last, count - j);
}

// Which heads share a row of dbias: those of one group, which are visited in order.
struct HeadGroups {
  int64_t batch = 0;
  int64_t heads = 0;
  int64_t group_batch = 0;  // 1 or batch
  int64_t group_heads = 0;  // 1 or heads

  int64_t count() const { return group_batch * group_heads; }
  int64_t members() const { return (batch / group_batch) * (heads / group_heads); }
  int64_t image(int64_t group, int64_t member) const {
    return group_batch == 1 ? member / (heads / group_heads) : group / group_heads;
  }
  int64_t head(int64_t group, int64_t member) const {
    return group_heads == 1 ? member % heads : group % group_heads;
  }
};

// What a pass over the heads computes, and where results go that a task does not finish alone.
struct Pass {
  bool grads = true;  // dq, dk, dv
  bool bias = false;
  HeadGroups groups;
  int64_t chunks = 1;
  float* parts =
      nullptr;  // [2, chunks, B, H, Nk, D]: dk and dv of each chunk, if there are several
  float* bias_sums = nullptr;  // [groups, Nq, Nk] where dbias is 16-bit and sums over heads
};

template <typename T>
class Worker {
  using E = Operand<T>;
  static constexpr bool kPairs = kDepth<E> > 1;

 public:
  Worker(const AttentionBwdParams& params, const Pass& pass)
      : p_(params),
        s_(params.scores),
        pass_(pass),
        tiles_(s_.queries),
        blocks_(s_.keys, kBlockKeys),
        columns_(padded_columns(s_.dim)),
        distances_(params.positions, s_.keys, params.num_prefix, kRowTile) {}

  bool reserve() {
    allocate();
    if (!arena_.reserve()) return false;
    allocate();
    return true;
  }

  // One chunk of rows of one group of heads.
  void run(int64_t task) {
    const int64_t group = task / pass_.chunks;
    chunk_ = task % pass_.chunks;
    const int64_t begin = tiles_.tiles * chunk_ / pass_.chunks;
    const int64_t end = tiles_.tiles * (chunk_ + 1) / pass_.chunks;
    first_row_ = tiles_.first(begin);
    group_ = group;
    const int64_t members = pass_.groups.members();
    for (int64_t member = 0; member < members; ++member) {
      b_ = pass_.groups.image(group, member);
      h_ = pass_.groups.head(group, member);
      opens_bias_ = member == 0;
      distances_.set_image(b_);
      for (int64_t block = 0; block < blocks_.blocks; ++block) visit_block(block, begin, end);
    }
    if (pass_.bias && pass_.bias_sums != nullptr) round_bias(first_row_, tiles_.first(end));
  }

 private:
  void allocate() {
    const int64_t block = blocks_.size;
    const int64_t chunk_rows = ceil_div(s_.queries, pass_.chunks) + 2 * kRowTile;
    keys_ = arena_.take<E>(block * s_.dim);
    values_ = arena_.take<E>(block * s_.dim);
    key_rows_ = arena_.take<E>(pass_.grads ? block * columns_ : 0);
    dk_ = arena_.floats(pass_.grads ? block * columns_ : 0);
    dv_ = arena_.floats(pass_.grads ? block * columns_ : 0);
    p_rows_ = arena_.floats((kPairs ? kRowTile : kBlockRows) * kStride);
    ds_rows_ = arena_.floats((kPairs ? kRowTile : kBlockRows) * kStride);
    p_weights_ = arena_.take<E>(kPairs ? kBlockRows * kStride : 0);
    ds_weights_ = arena_.take<E>(kPairs ? kBlockRows * kStride : 0);
    pairs_ = arena_.take<E>(kPairs ? (kBlockRows + 1) * kStride : 0);
    query_ = arena_.take<E>((kBlockRows + 1) * kDimStride);
    upstream_ = arena_.take<E>((kBlockRows + 1) * kDimStride);
    dq_ = arena_.floats((blocks_.blocks > 1 ? chunk_rows : kRowTile) * kDimStride);
    mask_row_ = arena_.floats(block + kPanel);
    distances_.allocate(arena_);
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
    const int64_t first = blocks_.first(block);
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
    start_.template set_rows<kStride>(scores, row, rows);
    products.panels = values_;
    products.dim = s_.dim;
    products.run = product_run(s_.dim);
    products.keys = count;
    products.scores = ds;
    with_row_count(rows, [&](auto n) {
      score_rows<kStride, false, n.value>(scores);
      score_rows<kStride, false, n.value>(products);
    });
    const int64_t plane = s_.batch * s_.heads * s_.queries;
    const int64_t prefix = max_of(0, min_of(p_.num_prefix - first, count));
    const int64_t columns = padded_columns(count);
    for (int64_t i = 0; i < rows; ++i) {
      const int64_t index = (b_ * s_.heads + h_) * s_.queries + row + i;
      const float lse = p_.lse[index] == -kInfinity ? 0.0f : p_.lse[index];
      const float low = p_.lse_low[index];
      float* s_row = s + i * kStride;
      float* ds_row = ds + i * kStride;
      RowCoef coef;
      // P dP are summed about delta as out has it: rounding is relative to what is left, and that P
      // sums to 1 only nearly costs nothing.
      const float centre = dot_row(head_at<T>(p_.dout, b_, h_, row + i),
                                   head_at<T>(p_.out, b_, h_, row + i), s_.dim);
      float rest = 0.0f;
      if (!p_.has_coef) {
        rest = probability_row<false, false>(s_row, ds_row, nullptr, columns, 0, lse, low, centre,
                                             coef);
      } else {
        const float* from = p_.coef + index;
        coef = {from[0],         from[plane],     from[2 * plane],
                from[3 * plane], from[4 * plane], from[5 * plane]};
        if (!p_.positions.given) {
          rest = probability_row<true, false>(s_row, ds_row, nullptr, columns, prefix, lse, low,
                                              centre, coef);
        } else {
          const float* distance = distances_.row(row + i, i, first, count);
          rest = probability_row<true, true>(s_row, ds_row, distance, columns, prefix, lse, low,
                                             centre, coef);
        }
      }
      // With all keys at hand, the sum of P dP is free of out's rounding.
      if (blocks_.blocks > 1) rest = 0.0f;
      gradient_row(s_row, ds_row, columns, rest);
      const int64_t own = row + i - first;
      if (coef.own != 0.0f && own >= 0 && own < count) ds_row[own] += s_row[own] * coef.own;
      if (pass_.bias) put_bias(row + i, first, count, ds_row);
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
    T* out = static_cast<T*>(p_.dq) + (b_ * s_.queries + row) * out_stride + h_ * s_.dim;
    const bool last = block + 1 == blocks_.blocks;
    const auto finish = [&](int r, int64_t c, Floats value) MIMKERNELS_LAMBDA_INLINE {
      if (last) {
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
  }

  void write_keys(int64_t first, int64_t count) {
    if (pass_.chunks == 1) {
      const int64_t at = (b_ * s_.keys + first) * p_.stride_grad + h_ * s_.dim;
      T* dk = static_cast<T*>(p_.dk) + at;
      T* dv = static_cast<T*>(p_.dv) + at;
      for (int64_t j = 0; j < count; ++j) {
        write_row(dk + j * p_.stride_grad, dk_ + j * columns_, s_.dim, scale_.products);
        write_row(dv + j * p_.stride_grad, dv_ + j * columns_, s_.dim, 1.0f);
      }
      return;
    }
    const int64_t heads = s_.batch * s_.heads;
    float* dk = pass_.parts + ((chunk_ * heads + b_ * s_.heads + h_) * s_.keys + first) * s_.dim;
    float* dv = dk + pass_.chunks * heads * s_.keys * s_.dim;
    for (int64_t j = 0; j < count; ++j) {
      write_row(dk + j * s_.dim, dk_ + j * columns_, s_.dim, scale_.products);
      write_row(dv + j * s_.dim, dv_ + j * columns_, s_.dim, 1.0f);
    }
  }

  void put_bias(int64_t row, int64_t first, int64_t count, const float* ds) {
    const int64_t at = (group_ * s_.queries + row) * s_.keys + first;
    if (pass_.bias_sums != nullptr) {
      put_bias_row(pass_.bias_sums + at, ds, count, !opens_bias_);
    } else if (s_.bias.dtype == DType::kFloat32) {
      put_bias_row(static_cast<float*>(p_.dbias) + at, ds, count, !opens_bias_);
    } else {
      put_bias_row(static_cast<T*>(p_.dbias) + at, ds, count, false);
    }
  }

  void round_bias(int64_t begin, int64_t end) {
    const int64_t at = (group_ * s_.queries + begin) * s_.keys;
    round_acc<false>(static_cast<T*>(p_.dbias) + at, pass_.bias_sums + at, (end - begin) * s_.keys);
  }

  const AttentionBwdParams& p_;
  const AttentionScores& s_;
  const Pass& pass_;
  RowTiles tiles_;
  KeyBlocks blocks_;
  int64_t columns_;
  SplitScale scale_{s_.scale, !kPairs};
  Distances distances_;
  ScoreStart start_{s_};
  Arena arena_;
  int64_t b_ = 0;
  int64_t h_ = 0;
  int64_t group_ = 0;
  int64_t chunk_ = 0;
  int64_t first_row_ = 0;
  bool opens_bias_ = true;
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
  float* mask_row_ = nullptr;
};

template <typename T>
Status run_pass(const AttentionBwdParams& params, const Pass& pass, ParallelFor parallel_for) {
  int failures = 0;
  run_parallel(parallel_for, pass.groups.count() * pass.chunks, 1, [&](int64_t begin, int64_t end) {
    Worker<T> worker(params, pass);
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
                   round_acc<false>(out + (b * s.keys + key) * p.stride_grad + h * s.dim, sum,
                                    s.dim);
                 }
               });
}

// Of gradients of no score. Packed, which takes as many queries as keys, they are empty themselves.
template <typename T>
void write_zeros(const AttentionBwdParams& p) {
  const AttentionScores& s = p.scores;
  const size_t row = static_cast<size_t>(s.batch * s.heads * s.dim) * sizeof(T);
  memset(p.dq, 0, row * static_cast<size_t>(s.queries));
  memset(p.dk, 0, row * static_cast<size_t>(s.keys));
  memset(p.dv, 0, row * static_cast<size_t>(s.keys));
  if (p.dbias == nullptr) return;
  const size_t size = s.bias.dtype == DType::kFloat32 ? sizeof(float) : sizeof(T);
  memset(p.dbias, 0, static_cast<size_t>(s.bias.batch * s.bias.heads * s.queries * s.keys) * size);
}

template <typename T>
Status run_backward(const AttentionBwdParams& p, ParallelFor parallel_for) {
  const AttentionScores& s = p.scores;
  const int64_t heads = s.batch * s.heads;
  if (heads * s.queries * s.keys == 0) {
    write_zeros<T>(p);
    return Status{};
  }
  const HeadGroups alone{s.batch, s.heads, s.batch, s.heads};
  const HeadGroups sharing{s.batch, s.heads, s.bias.batch, s.bias.heads};
  const bool sums_bias = p.dbias != nullptr && sharing.members() > 1;
  Scratch<float> bias_sums(
      sums_bias && s.bias.dtype != DType::kFloat32 ? sharing.count() * s.queries : 0, s.keys);
  if (bias_sums.failed()) return out_of_memory();
  // Heads that share a bias are one task, in order. Where that leaves too few tasks, dbias gets a
  // pass of its own, which recomputes dS and splits the rows instead.
  const bool together = p.dbias != nullptr && (!sums_bias || sharing.count() >= kLeastGroups);
  Pass main;
  main.bias = together;
  main.groups = together ? sharing : alone;
  main.chunks = row_chunks(main.groups.count(), s.queries, kLeastRows, kTasks);
  main.bias_sums = sums_bias && s.bias.dtype != DType::kFloat32 ? bias_sums.get() : nullptr;
  Scratch<float> parts(main.chunks > 1 ? 2 * main.chunks * heads * s.keys : 0, s.dim);
  if (parts.failed()) return out_of_memory();
  main.parts = parts.get();
  const Status status = run_pass<T>(p, main, parallel_for);
  if (!status.ok()) return status;
  if (main.chunks > 1) add_parts<T>(p, main, parallel_for);
  if (p.dbias == nullptr || together) return Status{};
  Pass bias = main;
  bias.grads = false;
  bias.bias = true;
  bias.groups = sharing;
  bias.chunks = max_of(1, ceil_div(s.queries, kBlockRows));
  return run_pass<T>(p, bias, parallel_for);
}

}  // namespace

Status attention_bwd(const AttentionBwdParams& params, ParallelFor parallel_for) {
  return with_float_type(params.scores.dtype, [&](auto type) {
    return run_backward<decltype(type)>(params, parallel_for);
  });
}

}  // namespace mimkernels::MIMKERNELS_ISA
