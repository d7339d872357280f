// The gradients of cpu_bwd.cpp in bf16, their five products in tiles (cpu/attention/matrix_tiles.h).
//
// numerics: S, dP, P, dS and all sums in fp32; P and dS are rounded to bf16 for dv = P^T dout,
//           dk = dS^T q and dq = dS k, and for these alone: dlogit_scale is of dS unrounded. Tiles
//           and roundings take subnormal numbers for 0
// cost:     per head and block of at most 320 keys, k is packed twice and v once (40 KB each at
//           D = 64). 32 queries, a step of the products over queries, at a time: S and dP over all
//           keys of the block, in fp32 (2 x 40 KB), then P and dS row by row, two rows of which
//           are rounded together: in pairs, as B of dv^T and dk^T, and dS as rows too, as A of dq.
//           After at most 256 queries dv^T += dout^T P and dk^T += q^T dS, [D, keys] in fp32: each
//           of their tiles is then read and written once per 8 steps, not once per step, which
//           would take longer than multiplying. What 256 queries need is 0.8 MB at D = 64, 1.1 MB
//           at D = 128: it stays in an L2 of 2 MB, and the operands of a row of tiles of dk^T (28
//           KB and 16 KB) in an L1 of 48 KB. So reasoned, not measured
// order:    as cpu_bwd.cpp has it, chunks being whole steps
#pragma once

#include "cpu/attention/matrix_tiles.h"
#include "ops/attention/cpu_bwd_rows.h"

namespace mimkernels::MIMKERNELS_ISA {

class TileBackward;

#if defined(MIMKERNELS_MATRIX_TILES)

// ---- rounding ----

#if defined(__AVX512BF16__)
// The numbers of two registers, rounded, one after the other; and these in pairs.
MIMKERNELS_INLINE __m512i round_both(Floats even, Floats odd) {
  return (__m512i)_mm512_cvtne2ps_pbh((__m512)odd, (__m512)even);
}
MIMKERNELS_INLINE Words pair_halves(__m512i both) {
  VecTypes<32>::H order;
  MIMKERNELS_UNROLL
  for (int i = 0; i < 32; ++i) order[i] = static_cast<uint16_t>(i / 2 + i % 2 * 16);
  return (Words)_mm512_permutexvar_epi16((__m512i)order, both);
}
#endif

// Numbers of `even`, rounded, in the low halves of words, those of `odd` in the high ones.
MIMKERNELS_INLINE Words round_pairs(Floats even, Floats odd) {
#if defined(__AVX512BF16__)
  return pair_halves(round_both(even, odd));
#else
  return to_bf16_words<kLanes>(even) | to_bf16_words<kLanes>(odd) << 16;
#endif
}

// Two rows of weights, rounded: one register of each as a row of A, and both as pairs of B.
MIMKERNELS_INLINE void store_weight_pairs(Floats even, Floats odd, bf16* pairs, bf16* even_row,
                                          bf16* odd_row) {
#if defined(__AVX512BF16__)
  const __m512i both = round_both(even, odd);
  const Words words = pair_halves(both);
  const __m256i low = _mm512_maskz_extracti64x4_epi64(0xf, both, 0);
  const __m256i high = _mm512_maskz_extracti64x4_epi64(0xf, both, 1);
  memcpy(even_row, &low, sizeof(low));
  memcpy(odd_row, &high, sizeof(high));
#else
  const Words words = round_pairs(even, odd);
  store_weights(even_row, even);
  store_weights(odd_row, odd);
#endif
  memcpy(pairs, &words, sizeof(words));
}

// ---- transposes ----

// 32 queries of `dim` features, of which there are `rows`: as rows of A, dst_stride apart, and
// transposed, a feature to a row, columns_stride apart, those that are missing 0. No columns if
// null.
MIMKERNELS_INLINE void take_queries(const bf16* src, int64_t stride, int64_t rows, int64_t dim,
                                    bf16* dst, int64_t dst_stride, bf16* columns,
                                    int64_t columns_stride) {
  const bf16* from[kTileDepth];
  for (int64_t i = 0; i < kTileDepth; ++i) {
    from[i] = i < rows ? src + i * stride : kNoRow;
    if (i < rows) copy_features(from[i], dim, dst + i * dst_stride);
  }
  if (columns == nullptr) return;
  for (int64_t c = 0; c < dim; c += 16) {
    WordRow words[16];
    const bool whole = dim - c >= 16;
    MIMKERNELS_UNROLL
    for (int i = 0; i < 16; ++i) {
      const bf16* const even = from[2 * i] + c;
      const bf16* const odd = from[2 * i + 1] + c;
      if (whole) {
        MIMKERNELS_UNROLL
        for (int k = 0; k < WordRow::kParts; ++k) {
          words[i].part[k] = pair_up<kLanes>(even + k * kLanes, odd + k * kLanes);
        }
      } else {
        const typename VecTypes<8>::U half = pair_up<8>(even, odd);
        words[i] = {};
        memcpy(&words[i], &half, sizeof(half));
      }
    }
    transpose_words(words);
    MIMKERNELS_UNROLL
    for (int i = 0; i < 16; ++i) {
      if (i >= 8 && !whole) break;
      memcpy(columns + (c + i) * columns_stride, &words[i], sizeof(words[i]));
    }
  }
}

// dst[j, :] = scale * src[:, j] for `count` columns j of src, which is padded to tiles.
MIMKERNELS_INLINE void write_transposed(const float* src, int64_t src_stride, int64_t count,
                                        int64_t dim, float scale, bf16* dst, int64_t stride) {
  for (int64_t j = 0; j < count; j += kTileColumns) {
    const int64_t rows = min_of(count - j, kTileColumns);
    for (int64_t c = 0; c < dim; c += kTileDepth) {
      const int64_t features = min_of(dim - c, kTileDepth);
      const float* const from = src + c * src_stride + j;
      WordRow words[16];
      MIMKERNELS_UNROLL
      for (int i = 0; i < 16; ++i) {
        const float* const even = from + 2 * i * src_stride;
        MIMKERNELS_UNROLL
        for (int k = 0; k < WordRow::kParts; ++k) {
          words[i].part[k] = i >= 8 && features <= kTileRows
                                 ? Words{}
                                 : round_pairs(load_floats(even + k * kLanes) * scale,
                                               load_floats(even + src_stride + k * kLanes) * scale);
        }
      }
      transpose_words(words);
      for (int64_t i = 0; i < rows; ++i) {
        bf16* const to = dst + (j + i) * stride + c;
        if (features == kTileDepth) {
          memcpy(to, &words[i], sizeof(words[i]));
        } else {
          for (int64_t f = 0; f < features; f += 8) {
            memcpy(to + f, reinterpret_cast<const bf16*>(&words[i]) + f, 8 * sizeof(bf16));
          }
        }
      }
    }
  }
}
MIMKERNELS_INLINE void write_transposed(const float* src, int64_t src_stride, int64_t count,
                                        int64_t dim, float scale, float* dst, int64_t stride) {
  for (int64_t j = 0; j < count; j += kSquare) {
    const int64_t rows = min_of(count - j, kSquare);
    for (int64_t c = 0; c < dim; c += kSquare) {
      SquareRow square[kSquare];
      MIMKERNELS_UNROLL
      for (int64_t i = 0; i < kSquare; ++i) {
        square[i] = load_part<kSquare>(src + (c + i) * src_stride + j) * scale;
      }
      transpose_square(square);
      for (int64_t i = 0; i < rows; ++i) store_part<kSquare>(dst + (j + i) * stride + c, square[i]);
    }
  }
}

// ---- the worker ----

class TileBackward : PassWorker<bf16> {
 public:
  static constexpr int64_t kBlockRows = 64;  // enough for a task that computes dbias alone

  TileBackward(const AttentionBwdParams& params, const Pass& pass)
      : PassWorker(params, pass, most_steps(params, pass) * kTileDepth, kTileDepth),
        steps_(ceil_div(s_.queries, kTileDepth)),
        chunk_steps_(most_steps(params, pass)),
        block_rows_(min_of(chunk_steps_, kBlockSteps) * kTileDepth),
        dim_tiles_(ceil_div(s_.dim, kTileColumns)),
        depth_(ceil_div(s_.dim, kTileDepth) * kTileDepth),
        score_stride_((ceil_div(blocks_.size, kTileColumns) | 1) * kTileColumns),
        weight_stride_((ceil_div(blocks_.size, kTileDepth) | 1) * kTileDepth),
        dq_stride_((dim_tiles_ | 1) * kTileColumns),
        panel_(block_rows_ * kTileColumns + 2 * kTileColumns) {}

  bool reserve() {
    allocate();
    if (!arena_.reserve()) return false;
    allocate();
    // Nothing is written there, but multiplied by 0.
    const size_t rows = static_cast<size_t>(kTileDepth * depth_) * sizeof(bf16);
    memset(query_, 0, rows);
    memset(upstream_, 0, rows);
    if (!pass_.grads) return true;
    const size_t columns = static_cast<size_t>(column_size()) * sizeof(bf16);
    memset(query_columns_, 0, columns);
    memset(upstream_columns_, 0, columns);
    return true;
  }

  // One chunk of rows of one group of heads.
  void run(int64_t task) {
    const int64_t chunk = task % pass_.chunks;
    const int64_t begin = steps_ * chunk / pass_.chunks;
    const int64_t end = steps_ * (chunk + 1) / pass_.chunks;
    first_row_ = begin * kTileDepth;
    visit_heads(task, first_row_, min_of(end * kTileDepth, s_.queries), [&](int64_t member) {
      set_next_head(member);
      for (int64_t block = 0; block < blocks_.blocks; ++block) visit_block(block, begin, end);
    });
  }

 private:
  static int64_t most_steps(const AttentionBwdParams& params, const Pass& pass) {
    return ceil_div(ceil_div(params.scores.queries, kTileDepth), pass.chunks);
  }

  static constexpr int64_t kBlockSteps = 8;  // whose P and dS are kept for dk and dv

  int64_t column_size() const { return dim_tiles_ * kTileRows * block_rows_; }

  void allocate() {
    const int64_t keys = blocks_.size;
    const int64_t key_tiles = ceil_div(keys, kTileColumns);
    const int64_t grads = pass_.grads ? 1 : 0;
    const int64_t dq_rows = blocks_.blocks > 1 ? chunk_steps_ * kTileDepth : kTileDepth;
    keys_ = arena_.take<bf16>(tiles_transposed_size(keys, s_.dim));
    values_ = arena_.take<bf16>(tiles_transposed_size(keys, s_.dim));
    key_rows_ = arena_.take<bf16>(grads * tiles_rows_size(keys, s_.dim));
    query_ = arena_.take<bf16>(kTileDepth * depth_);
    upstream_ = arena_.take<bf16>(kTileDepth * depth_);
    query_columns_ = arena_.take<bf16>(grads * column_size());
    upstream_columns_ = arena_.take<bf16>(grads * column_size());
    scores_ = arena_.floats(kTileDepth * score_stride_);
    products_ = arena_.floats(kTileDepth * score_stride_);
    ds_rows_ = arena_.take<bf16>(grads * kTileDepth * weight_stride_);
    p_pairs_ = arena_.take<bf16>(grads * key_tiles * panel_);
    ds_pairs_ = arena_.take<bf16>(grads * key_tiles * panel_);
    dq_ = arena_.floats(grads * dq_rows * dq_stride_);
    dk_ = arena_.floats(grads * dim_tiles_ * kTileRows * score_stride_);
    dv_ = arena_.floats(grads * dim_tiles_ * kTileRows * score_stride_);
    allocate_rows(score_stride_);
  }

  void visit_block(int64_t block, int64_t begin, int64_t end) {
    const int64_t first = blocks_.first(block);
    const int64_t count = blocks_.length(block);
    const uint8_t* allowed = mask_of(s_.key_mask, b_);
    const bf16* k = head_at<bf16>(s_.k, b_, h_, first);
    pack_tiles_transposed(k, s_.k.stride_token, count, s_.dim,
                          allowed == nullptr ? nullptr : allowed + first, keys_);
    pack_tiles_transposed(head_at<bf16>(p_.v, b_, h_, first), p_.v.stride_token, count, s_.dim,
                          nullptr, values_);
    start_.set_block(mask_row_, b_, h_, first, count);
    if (pass_.grads) {
      pack_tiles_rows(k, s_.k.stride_token, count, s_.dim, key_rows_);
      clear_past(count);
    }
    const int64_t steps = end - begin;
    const int64_t parts = ceil_div(steps, kBlockSteps);
    for (int64_t part = 0; part < parts; ++part) {
      const int64_t top = begin + steps * part / parts;
      const int64_t next = begin + steps * (part + 1) / parts;
      for (int64_t step = top; step < next; ++step) visit_step(step, step - top, end, block);
      if (!pass_.grads) continue;
      gather_keys(upstream_columns_, p_pairs_, next - top, count, part > 0, dv_);
      gather_keys(query_columns_, ds_pairs_, next - top, count, part > 0, dk_);
    }
    if (pass_.grads) write_keys(first, count);
  }

  // dq = dS k runs over whole steps of keys.
  void clear_past(int64_t count) {
    if (cleared_ == count) return;
    memset(ds_rows_, 0, static_cast<size_t>(kTileDepth * weight_stride_) * sizeof(bf16));
    cleared_ = count;
  }

  // P and dS of 32 queries, the `at`th of those whose dk and dv are summed next, and dq.
  void visit_step(int64_t step, int64_t at, int64_t end, int64_t block) {
    const int64_t row = step * kTileDepth;
    const int64_t rows = min_of(kTileDepth, s_.queries - row);
    const int64_t count = blocks_.length(block);
    const int64_t columns = at * kTileDepth;
    take_queries(head_at<bf16>(s_.q, b_, h_, row), s_.q.stride_token, rows, s_.dim, query_, depth_,
                 pass_.grads ? query_columns_ + columns : nullptr, block_rows_);
    take_queries(head_at<bf16>(p_.dout, b_, h_, row), p_.dout.stride_token, rows, s_.dim, upstream_,
                 depth_, pass_.grads ? upstream_columns_ + columns : nullptr, block_rows_);
    TileProduct product;
    product.a_stride = depth_;
    product.steps = depth_ / kTileDepth;
    product.b_panel = product.steps * kTileSize;
    product.c_stride = score_stride_;
    product.a = query_;
    product.b = keys_;
    product.c = scores_;
    const int64_t row_tiles = ceil_div(rows, kTileRows);
    const int64_t key_tiles = ceil_div(count, kTileColumns);
    multiply_all_tiles<false>(product, row_tiles, key_tiles);
    product.a = upstream_;
    product.b = values_;
    product.c = products_;
    multiply_all_tiles<false>(product, row_tiles, key_tiles);

    const Ahead ahead = rows_ahead(step, end, block);
    for (int64_t i = 0; i < rows; i += 2) {
      finish_rows(row, i, min_of(rows - i, 2), at, block);
      prefetch_ahead(ahead, row + i, block);
      prefetch_ahead(ahead, row + i + 1, block);
    }
    if (!pass_.grads) return;
    clear_pairs(ceil_div(rows, 2), at, key_tiles);
    finish_queries(row, rows, block);
  }

  // P and dS of `there` rows, one or two, of the 32 from `row` on, as the products read them.
  void finish_rows(int64_t row, int64_t i, int64_t there, int64_t at, int64_t block) {
    const int64_t count = blocks_.length(block);
    float* const s = scores_ + i * score_stride_;
    float* const ds = products_ + i * score_stride_;
    RowEnd ends[2];
    bool plain = !pass_.bias && !pass_.table && !s_.cosine.given && pass_.grads;
    for (int64_t k = 0; k < there; ++k) {
      const int64_t query = row + i + k;
      if (s_.cosine.given) {
        start_cosines(query, k > 0, count, s + k * score_stride_, score_stride_);
      }
      ends[k] = begin_row<true>(query, block, s + k * score_stride_, ds + k * score_stride_,
                                start_of(query, count), s_.scale);
      plain = plain && ends[k].own == 0.0f;
    }
    for (int64_t k = 0; !plain && k < there; ++k) {
      end_row(row + i + k, block, s + k * score_stride_, ds + k * score_stride_, ends[k]);
      if (sums_scale()) add_cosines(ds + k * score_stride_, k > 0, count, score_stride_);
    }
    if (!pass_.grads) return;
    if (there < 2) {
      const size_t bytes = static_cast<size_t>(padded_columns(count)) * sizeof(float);
      memset(s + score_stride_, 0, bytes);
      memset(ds + score_stride_, 0, bytes);
    }
    const int64_t pair = at * kTileSize + i * kTileColumns;
    bf16* const weights = ds_rows_ + i * weight_stride_;
    if (plain) {
      round_rows<false>(s, ds, count, ends, p_pairs_ + pair, ds_pairs_ + pair, weights);
    } else {
      round_rows<true>(s, ds, count, ends, p_pairs_ + pair, ds_pairs_ + pair, weights);
    }
  }

  // P and dS of two rows, rounded; kFinished: t is dS.
  template <bool kFinished>
  MIMKERNELS_INLINE void round_rows(const float* p, const float* t, int64_t count,
                                    const RowEnd (&ends)[2], bf16* p_pairs, bf16* ds_pairs,
                                    bf16* ds_rows) const {
    const int64_t stride = score_stride_;
    const int64_t row_stride = weight_stride_;
    const int64_t panel = panel_;
    const Floats rest[2] = {splat(ends[0].rest), splat(ends[1].rest)};
    const auto step = [&](int64_t j, auto last) MIMKERNELS_LAMBDA_INLINE {
      const Floats even = load_floats(p + j);
      const Floats odd = load_floats(p + stride + j);
      Floats even_ds = load_floats(t + j);
      Floats odd_ds = load_floats(t + stride + j);
      if constexpr (!kFinished) {
        even_ds = even * (even_ds - rest[0]);
        odd_ds = odd * (odd_ds - rest[1]);
      }
      if constexpr (last.value != 0) {
        // 0 whatever dout is: dq multiplies it, too.
        const Ints there = (Ints)(lane_numbers(0) < static_cast<int32_t>(count - j));
        even_ds = choose_lanes(there, even_ds, (Floats){});
        odd_ds = choose_lanes(there, odd_ds, (Floats){});
      }
      const int64_t at = j / kTileColumns * panel + j % kTileColumns * 2;
      const Words weights = round_pairs(even, odd);
      memcpy(p_pairs + at, &weights, sizeof(weights));
      store_weight_pairs(even_ds, odd_ds, ds_pairs + at, ds_rows + j, ds_rows + row_stride + j);
    };
    int64_t j = 0;
    for (; j + kLanes <= count; j += kLanes) step(j, Constant<0>{});
    if (j < count) step(j, Constant<1>{});
  }

  // The pairs of queries from the `first` on of a step are missing ones.
  void clear_pairs(int64_t first, int64_t at, int64_t key_tiles) {
    if (first == kTileDepth / 2) return;
    const int64_t begin = at * kTileSize + first * 2 * kTileColumns;
    const size_t bytes = static_cast<size_t>((at + 1) * kTileSize - begin) * sizeof(bf16);
    for (int64_t tile = 0; tile < key_tiles; ++tile) {
      memset(p_pairs_ + tile * panel_ + begin, 0, bytes);
      memset(ds_pairs_ + tile * panel_ + begin, 0, bytes);
    }
  }

  void finish_queries(int64_t row, int64_t rows, int64_t block) {
    TileProduct product;
    product.a = ds_rows_;
    product.a_stride = weight_stride_;
    product.steps = ceil_div(blocks_.length(block), kTileDepth);
    product.b = key_rows_;
    product.b_panel = product.steps * kTileSize;
    product.c = dq_ + (blocks_.blocks > 1 ? (row - first_row_) * dq_stride_ : 0);
    product.c_stride = dq_stride_;
    const int64_t row_tiles = ceil_div(rows, kTileRows);
    if (block > 0) {
      multiply_all_tiles<true>(product, row_tiles, dim_tiles_);
    } else {
      multiply_all_tiles<false>(product, row_tiles, dim_tiles_);
    }
    if (block + 1 < blocks_.blocks) return;
    bf16* const out = gradient_at(p_.dq, s_.queries, row);
    for (int64_t i = 0; i < rows; ++i) {
      const float* const grad = product.c + i * dq_stride_;
      if (s_.cosine.given) {
        write_query(row + i, grad);
      } else {
        round_row(out + i * p_.stride_grad, grad, s_.dim, s_.scale);
      }
    }
  }

  // out (+)= left pairs, [D, keys], over the queries of some steps.
  void gather_keys(const bf16* left, const bf16* pairs, int64_t steps, int64_t count, bool add,
                   float* out) {
    TileProduct product;
    product.a = left;
    product.a_stride = block_rows_;
    product.b = pairs;
    product.b_panel = panel_;
    product.c = out;
    product.c_stride = score_stride_;
    product.steps = steps;
    const int64_t key_tiles = ceil_div(count, kTileColumns);
    if (add) {
      multiply_all_tiles<true>(product, dim_tiles_, key_tiles);
    } else {
      multiply_all_tiles<false>(product, dim_tiles_, key_tiles);
    }
  }

  void write_keys(int64_t first, int64_t count) {
    if (pass_.chunks == 1) {
      if (s_.cosine.given) {
        write_tangents(first, count);
      } else {
        write_transposed(dk_, score_stride_, count, s_.dim, s_.scale,
                         gradient_at(p_.dk, s_.keys, first), p_.stride_grad);
      }
      write_transposed(dv_, score_stride_, count, s_.dim, 1.0f, gradient_at(p_.dv, s_.keys, first),
                       p_.stride_grad);
      return;
    }
    float* const dk = part_at(first);
    write_transposed(dk_, score_stride_, count, s_.dim, s_.scale, dk, s_.dim);
    write_transposed(dv_, score_stride_, count, s_.dim, 1.0f, dk + part_distance(), s_.dim);
  }

  // dk of cosine attention.
  void write_tangents(int64_t first, int64_t count) {
    alignas(64) float rows[kSquare * kDimStride];
    for (int64_t j = 0; j < count; j += kSquare) {
      const int64_t n = min_of(count - j, kSquare);
      write_transposed(dk_ + j, score_stride_, n, s_.dim, 1.0f, rows, kDimStride);
      for (int64_t i = 0; i < n; ++i) write_key(first + j + i, rows + i * kDimStride);
    }
  }

  // ---- prefetching ----

  // The queries that come next: `row` is the first of them, less that of the present ones.
  struct Ahead {
    int64_t b = -1;  // -1: none
    int64_t h = 0;
    int64_t offset = 0;
  };

  void set_next_head(int64_t member) {
    const HeadGroups& groups = pass_.groups;
    int64_t group = group_;
    next_b_ = -1;
    if (++member == groups.members(group)) {
      if (pass_.chunks > 1 || ++group == groups.count()) return;
      member = 0;
    }
    next_b_ = groups.image(group, member);
    next_h_ = groups.head(group, member);
  }

  Ahead rows_ahead(int64_t step, int64_t end, int64_t block) const {
    if (step + 1 < end) return {b_, h_, kTileDepth};
    if (block + 1 < blocks_.blocks) return {};
    return {next_b_, next_h_, first_row_ - step * kTileDepth};
  }

  // A row of tokens, into L2: L1 is full.
  void prefetch_token(const HeadRows& tokens, int64_t b, int64_t h, int64_t token) const {
    prefetch_lines(head_at<bf16>(tokens, b, h, token));
  }
  void prefetch_lines(const bf16* row) const {
    for (int64_t c = 0; c < s_.dim; c += kTileDepth) __builtin_prefetch(row + c, 0, 2);
  }

  // What is read after the row at hand, and where its head's gradients go: all of it lies in rows
  // too short and too far apart for the hardware to guess.
  void prefetch_ahead(const Ahead& ahead, int64_t row, int64_t block) const {
    const int64_t next = row + ahead.offset;
    if (ahead.b >= 0 && next < s_.queries) {
      prefetch_token(s_.q, ahead.b, ahead.h, next);
      prefetch_token(p_.dout, ahead.b, ahead.h, next);
      prefetch_token(p_.out, ahead.b, ahead.h, next);
    }
    const bool last = block + 1 == blocks_.blocks;
    const int64_t key = row - first_row_;
    if (last && next_b_ >= 0 && key < blocks_.size) {
      prefetch_token(s_.k, next_b_, next_h_, key);
      prefetch_token(p_.v, next_b_, next_h_, key);
    }
    if (!pass_.grads) return;
    if (last && row < s_.queries) prefetch_lines(gradient_at(p_.dq, s_.queries, row));
    if (pass_.chunks > 1 || key >= blocks_.length(block)) return;
    const int64_t token = blocks_.first(block) + key;
    prefetch_lines(gradient_at(p_.dk, s_.keys, token));
    prefetch_lines(gradient_at(p_.dv, s_.keys, token));
  }

  TilesInUse tiles_in_use_;
  int64_t steps_;        // of 32 queries
  int64_t chunk_steps_;  // at most
  int64_t block_rows_;
  int64_t dim_tiles_;
  int64_t depth_;          // of a row of A over features
  int64_t score_stride_;   // strides are odd numbers of cache lines
  int64_t weight_stride_;  // of dS as rows of A
  int64_t dq_stride_;
  int64_t panel_;  // of pairs of queries, per tile of keys
  int64_t first_row_ = 0;
  int64_t cleared_ = -1;  // the number of keys past which dS is 0
  int64_t next_b_ = -1;   // the next head of this thread, -1: unknown
  int64_t next_h_ = 0;
  bf16* keys_ = nullptr;
  bf16* values_ = nullptr;
  bf16* key_rows_ = nullptr;
  bf16* query_ = nullptr;
  bf16* upstream_ = nullptr;
  bf16* query_columns_ = nullptr;  // q^T and dout^T of a block of rows
  bf16* upstream_columns_ = nullptr;
  float* scores_ = nullptr;    // S, then P
  float* products_ = nullptr;  // dP, then t or dS
  bf16* ds_rows_ = nullptr;
  bf16* p_pairs_ = nullptr;
  bf16* ds_pairs_ = nullptr;
  float* dq_ = nullptr;
  float* dk_ = nullptr;  // transposed: [D, keys]
  float* dv_ = nullptr;
};

#endif  // MIMKERNELS_MATRIX_TILES

}  // namespace mimkernels::MIMKERNELS_ISA
