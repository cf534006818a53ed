// cross_entropy: the decoder's product and the loss over the vocabulary, labelled tokens only.
//
// The logits of a panel of the vocabulary are made, used and forgotten. Forward keeps the running
// maximum and sum of each token (as attention does); backward makes the logits again, turns them
// into dlogits = (softmax - onehot) * dloss / count, and adds up all three gradients at once, so
// that each row of the decoder is read once in either direction.
#include <sched.h>

#include <cmath>

#include "kernels.h"
#include "matmul.h"
#include "parallel.h"
#include "scratch.h"
#include "vector.h"

namespace bertfast {
namespace {

// Rows of logits that are made and used together.
constexpr int64_t tokens_together = 4 * tile_rows;
// Shares of the vocabulary whose sums are made apart and added up in order: the result must not
// depend on the number of threads. In backward each thread holds one share's dhidden, in float.
constexpr int64_t most_shares = 16;

inline int64_t shares_of(int64_t vocabulary) {
  return smaller(most_shares, (vocabulary + panel_columns - 1) / panel_columns);
}

inline int64_t share_begin(int64_t share, int64_t vocabulary) {
  const int64_t panels = (vocabulary + panel_columns - 1) / panel_columns;
  return smaller(panels * share / shares_of(vocabulary) * panel_columns, vocabulary);
}

template <class Arguments>
inline int64_t label_of(const Arguments& a, int64_t token) {
  return a.wide_labels ? static_cast<const int64_t*>(a.labels)[token]
                       : static_cast<const int32_t*>(a.labels)[token];
}

// The tokens that have a label, in order.
class Labelled {
 public:
  template <class Arguments>
  explicit Labelled(const Arguments& a)
      : tokens_(static_cast<int64_t*>(
            std::malloc(sizeof(int64_t) * static_cast<size_t>(a.tokens + 1)))) {
    for (int64_t i = 0; tokens_ && i < a.tokens; ++i) {
      const int64_t label = label_of(a, i);
      if (label != a.ignore_index && label >= 0 && label < a.vocabulary) tokens_[count_++] = i;
    }
  }
  ~Labelled() { std::free(tokens_); }
  Labelled(const Labelled&) = delete;
  Labelled& operator=(const Labelled&) = delete;

  bool there() const { return tokens_ != nullptr; }
  int64_t count() const { return count_; }
  int64_t operator[](int64_t i) const { return tokens_[i]; }

 private:
  int64_t* tokens_;
  int64_t count_ = 0;
};

// One element of a bias of either dtype, and back.
inline float element(const void* p, Dtype dtype, int64_t i) {
  return dtype == Dtype::float32 ? static_cast<const float*>(p)[i]
                                 : load_first(static_cast<const Bfloat16*>(p) + i, 1)[0];
}

inline void set_element(void* p, Dtype dtype, int64_t i, float value) {
  if (dtype == Dtype::float32)
    static_cast<float*>(p)[i] = value;
  else
    store_first(static_cast<Bfloat16*>(p) + i, broadcast(value), 1);
}

// The labelled tokens' hidden states as a left operand, and the logits they have in one panel.
template <class Units, class T, class W, class Arguments>
class Logits {
 public:
  using Unit = typename Units::Unit;

  Logits(const Arguments& a, const Labelled& labelled)
      : a(a),
        labelled(labelled),
        depth(units<Units>(a.columns)),
        left_stride(round_up(depth, width)),
        panel_size(depth * panel_columns) {}

  int64_t left_size() const { return labelled.count() * left_stride; }

  void pack_hidden(Unit* left, int64_t begin, int64_t end) const {
    for (int64_t i = begin; i < end; ++i)
      pack_left<Units>(left + i * left_stride, left_stride,
                       static_cast<const T*>(a.hidden) + labelled[i] * a.columns, 0, 1, a.columns);
  }

  // The classes [first, first + count) of the decoder, as B^T, and their biases.
  void pack_classes(Unit* panel, float* biases, int64_t first, int64_t count) const {
    pack_transposed<Units>(panel, panel_size, static_cast<const W*>(a.weight) + first * a.columns,
                           a.columns, count, a.columns);
    for (int64_t c = 0; c < panel_columns; ++c)
      biases[c] = a.bias && c < count ? element(a.bias, a.bias_dtype, first + c) : 0.0f;
  }

  // Rows [i, i + rows) of the panel's logits, without the bias.
  void multiply_rows(const Unit* left, const Unit* panel, int64_t i, int64_t rows, int64_t count,
                     float* logits) const {
    multiply<Units>(left + i * left_stride, left_stride, 1, rows, panel, panel_size, depth, count,
                    logits, panel_columns, false);
  }

  const Arguments& a;
  const Labelled& labelled;
  const int64_t depth, left_stride, panel_size;
};

// What a token has seen of one share of the vocabulary.
struct Seen {
  float largest, total, target;
};

template <class Units, class T, class W>
void see_share(const Logits<Units, T, W, CrossEntropyForward>& logits,
               const typename Units::Unit* left, typename Units::Unit* panel, float* rows,
               int64_t begin, int64_t end, Seen* seen) {
  const CrossEntropyForward& a = logits.a;
  const int64_t tokens = logits.labelled.count();
  for (int64_t i = 0; i < tokens; ++i) seen[i] = {-__builtin_inff(), 0.0f, 0.0f};
  float biases[panel_columns];
  for (int64_t first = begin; first < end; first += panel_columns) {
    const int64_t count = smaller(panel_columns, end - first);
    logits.pack_classes(panel, biases, first, count);
    for (int64_t i = 0; i < tokens; i += tokens_together) {
      const int64_t together = smaller(tokens_together, tokens - i);
      logits.multiply_rows(left, panel, i, together, count, rows);
      for (int64_t r = 0; r < together; ++r) {
        float* row = rows + r * panel_columns;
        Seen& of_token = seen[i + r];
        Floats top = broadcast(-__builtin_inff());
        for (int64_t c = 0; c < count; c += width) {
          Floats z = load(row + c) + load(biases + c);
          if (count - c < width) z = first_lanes(z, count - c, broadcast(-__builtin_inff()));
          store(row + c, z);
          top = top > z ? top : z;
        }
        const float now = largest(top), before = of_token.largest;
        of_token.largest = before > now ? before : now;
        // Where every logit so far is minus infinity, it must not be subtracted from itself.
        const float base = of_token.largest == -__builtin_inff() ? 0.0f : of_token.largest;
        const Floats offset = broadcast(base);
        Floats total = {};
        for (int64_t c = 0; c < count; c += width)
          total += power_of_two((load(row + c) - offset) * log2_e);
        const float rescale = before == of_token.largest
                                  ? 1.0f
                                  : power_of_two(broadcast((before - base) * log2_e))[0];
        of_token.total = of_token.total * rescale + sum(total);
        const int64_t label = label_of(a, logits.labelled[i + r]) - first;
        if (label >= 0 && label < count) of_token.target = row[label];
      }
    }
  }
}

template <class Units, class T, class W>
bool forward(const CrossEntropyForward& a) {
  using Unit = typename Units::Unit;
  const Labelled labelled(a);
  if (!labelled.there()) return false;
  const int64_t tokens = labelled.count();
  for (int64_t i = 0; i < a.tokens; ++i) a.logsumexp[i] = 0.0f;
  *a.loss = 0.0f;
  if (tokens == 0) return true;
  const Logits<Units, T, W, CrossEntropyForward> logits(a, labelled);
  const int64_t shares = shares_of(a.vocabulary);
  Scratch shared;
  if (!shared.reset(Scratch::bytes_for<Unit>(logits.left_size()) +
                    Scratch::bytes_for<Seen>(shares * tokens)))
    return false;
  Unit* left = shared.take<Unit>(logits.left_size());
  Seen* seen = shared.take<Seen>(shares * tokens);
  parallel(a.threads, tokens, tokens * a.columns,
           [&](int64_t begin, int64_t end) { logits.pack_hidden(left, begin, end); });
  int failures = 0;
  parallel_tasks(a.threads, shares, [&](const auto& take) {
    Scratch& scratch = thread_scratch();
    constexpr int64_t rows_size = tokens_together * panel_columns;
    if (!scratch.reset(Scratch::bytes_for<Unit>(logits.panel_size) +
                       Scratch::bytes_for<float>(rows_size))) {
      __atomic_store_n(&failures, 1, __ATOMIC_RELAXED);
      return;
    }
    Unit* panel = scratch.take<Unit>(logits.panel_size);
    float* rows = scratch.take<float>(rows_size);
    for (int64_t share; (share = take()) < shares;)
      see_share(logits, left, panel, rows, share_begin(share, a.vocabulary),
                share_begin(share + 1, a.vocabulary), seen + share * tokens);
    scratch.finish();
  });
  if (failures) return false;
  double loss = 0.0;
  for (int64_t i = 0; i < tokens; ++i) {
    float top = seen[i].largest;
    for (int64_t share = 1; share < shares; ++share) {
      const float other = seen[share * tokens + i].largest;
      // The comparison that keeps NaN.
      top = top >= other ? top : (other >= top ? other : top + other);
    }
    double total = 0.0;
    float target = 0.0f;
    for (int64_t share = 0; share < shares; ++share) {
      const Seen& part = seen[share * tokens + i];
      total += static_cast<double>(part.total) * std::exp(static_cast<double>(part.largest) - top);
      target += part.target;
    }
    const double logsumexp = top + std::log(total);
    a.logsumexp[labelled[i]] = static_cast<float>(logsumexp);
    loss += logsumexp - target;
  }
  *a.loss = static_cast<float>(a.mean ? loss / static_cast<double>(tokens) : loss);
  return true;
}

template <class Units, class T, class W>
class Backward {
 public:
  using Unit = typename Units::Unit;
  using PanelLogits = Logits<Units, T, W, CrossEntropyBackward>;

  Backward(const PanelLogits& logits, const Unit* left, const Unit* hidden_panels, float factor)
      : a(logits.a),
        logits(logits),
        tokens(logits.labelled.count()),
        sums(round_up(a.columns, width)),
        token_units(units<Units>(tokens)),
        left(left),
        hidden_panels(hidden_panels),
        factor(factor) {}

  bool reset(Scratch& scratch) {
    const int64_t classes_panel = units<Units>(panel_columns) * panel_columns;
    const int64_t classes = round_up(a.columns, panel_columns) / panel_columns * classes_panel;
    const int64_t rows_size = round_up(tokens, tokens_together) * panel_columns;
    const int64_t pairs = Units::per_unit > 1 ? token_units * panel_columns : 0;
    if (!scratch.reset(Scratch::bytes_for<Unit>(logits.panel_size) +
                       Scratch::bytes_for<Unit>(classes) + Scratch::bytes_for<float>(rows_size) +
                       Scratch::bytes_for<Unit>(pairs) +
                       Scratch::bytes_for<float>(panel_columns * sums) +
                       Scratch::bytes_for<float>(tokens * sums)))
      return false;
    panel = scratch.take<Unit>(logits.panel_size);
    class_panels = scratch.take<Unit>(classes);
    rows = scratch.take<float>(rows_size);
    by_class = Units::per_unit > 1 ? scratch.take<Unit>(pairs) : reinterpret_cast<Unit*>(rows);
    dclasses = scratch.take<float>(panel_columns * sums);
    dhidden = scratch.take<float>(tokens * sums);
    return true;
  }

  // One share's dweight and dbias; its dhidden is added to `total` when its turn has come.
  void run(int64_t share, float* total, int64_t* turn) {
    const int64_t begin = share_begin(share, a.vocabulary);
    const int64_t end = share_begin(share + 1, a.vocabulary);
    for (int64_t first = begin; first < end; first += panel_columns)
      add_panel(first, smaller(panel_columns, end - first), first > begin);
    while (__atomic_load_n(turn, __ATOMIC_ACQUIRE) != share) sched_yield();
    for (int64_t i = 0; i < tokens * sums; i += width)
      store(total + i, share == 0 ? load(dhidden + i) : load(total + i) + load(dhidden + i));
    __atomic_store_n(turn, share + 1, __ATOMIC_RELEASE);
  }

 private:
  void add_panel(int64_t first, int64_t count, bool accumulate) {
    const W* weight = static_cast<const W*>(a.weight) + first * a.columns;
    const int64_t panel_stride = units<Units>(panel_columns) * panel_columns;
    logits.pack_classes(panel, biases, first, count);
    pack_panels<Units>(class_panels, panel_stride, weight, a.columns, count, a.columns);
    for (int64_t i = 0; i < tokens; i += tokens_together)
      logits.multiply_rows(left, panel, i, smaller(tokens_together, tokens - i), count,
                           rows + i * panel_columns);
    Floats dbias[panel_vectors] = {};
    for (int64_t i = 0; i < tokens; i += 2) differentiate_rows(i, first, count, dbias);
    if (a.dbias)
      for (int64_t c = 0; c < count; ++c)
        set_element(a.dbias, a.bias_dtype, first + c, dbias[c / width][c % width]);
    multiply<Units>(by_class, 1, panel_columns, count, hidden_panels, token_units * panel_columns,
                    token_units, a.columns, dclasses, sums, false);
    W* dweight = static_cast<W*>(a.dweight) + first * a.columns;
    for (int64_t c = 0; c < count; ++c)
      for_columns(0, a.columns, [&](int64_t column, auto io) {
        io.put(dweight + c * a.columns + column, load(dclasses + c * sums + column));
      });
    multiply<Units>(reinterpret_cast<const Unit*>(rows), panel_columns, 1, tokens, class_panels,
                    panel_stride, units<Units>(count), a.columns, dhidden, sums, accumulate);
  }

  // Rows i and i + 1 of logits to dlogits, as left operands by tokens and by classes.
  void differentiate_rows(int64_t i, int64_t first, int64_t count, Floats* dbias) {
    for (int64_t c = 0; c < count; c += width) {
      Floats d[2] = {};
      for (int64_t j = 0; j < 2 && i + j < tokens; ++j) {
        const int64_t token = logits.labelled[i + j];
        const int64_t at = label_of(a, token) - first - c;
        const Floats z = load(rows + (i + j) * panel_columns + c) + load(biases + c);
        Floats p = power_of_two((z - a.logsumexp[token]) * log2_e);
        if (at >= 0 && at < width) p[at] -= 1.0f;
        if (count - c < width) p = first_lanes(p, count - c, Floats{});
        d[j] = p * factor;
        dbias[c / width] += d[j];
      }
      Units::put_rows(by_class, panel_columns, i, c, d[0], d[1]);
      if (Units::per_unit > 1)
        for (int64_t j = 0; j < 2; ++j)
          Units::put(reinterpret_cast<Unit*>(rows + (i + j) * panel_columns), c, d[j]);
    }
  }

  const CrossEntropyBackward& a;
  const PanelLogits& logits;
  const int64_t tokens, sums, token_units;
  const Unit *left, *hidden_panels;
  const float factor;
  Unit *panel, *class_panels, *by_class;
  float *rows, *dclasses, *dhidden;
  float biases[panel_columns];
};

template <class Units, class T, class W>
bool backward(const CrossEntropyBackward& a) {
  using Unit = typename Units::Unit;
  const Labelled labelled(a);
  if (!labelled.there()) return false;
  const int64_t tokens = labelled.count();
  ask_for_large_pages(a.dweight, a.vocabulary * a.columns * static_cast<int64_t>(sizeof(W)));
  const Logits<Units, T, W, CrossEntropyBackward> logits(a, labelled);
  T* out = static_cast<T*>(a.dhidden);
  parallel(a.threads, a.tokens, a.tokens * a.columns, [&](int64_t begin, int64_t end) {
    std::memset(out + begin * a.columns, 0,
                sizeof(T) * static_cast<size_t>((end - begin) * a.columns));
  });
  if (tokens == 0) {
    W* dweight = static_cast<W*>(a.dweight);
    parallel(a.threads, a.vocabulary, a.vocabulary * a.columns, [&](int64_t begin, int64_t end) {
      std::memset(dweight + begin * a.columns, 0,
                  sizeof(W) * static_cast<size_t>((end - begin) * a.columns));
    });
    for (int64_t c = 0; a.dbias && c < a.vocabulary; ++c)
      set_element(a.dbias, a.bias_dtype, c, 0.0f);
    return true;
  }
  const int64_t shares = shares_of(a.vocabulary), sums = round_up(a.columns, width);
  const int64_t panel_stride = units<Units>(tokens) * panel_columns;
  const int64_t panels = round_up(a.columns, panel_columns) / panel_columns * panel_stride;
  Scratch shared;
  if (!shared.reset(Scratch::bytes_for<Unit>(logits.left_size()) +
                    Scratch::bytes_for<Unit>(panels) + Scratch::bytes_for<float>(tokens * sums)))
    return false;
  Unit* left = shared.take<Unit>(logits.left_size());
  Unit* hidden_panels = shared.take<Unit>(panels);
  float* dhidden = shared.take<float>(tokens * sums);
  parallel(a.threads, tokens, tokens * a.columns,
           [&](int64_t begin, int64_t end) { logits.pack_hidden(left, begin, end); });
  // From the left operand, which has the labelled rows side by side.
  pack_panels<Units>(hidden_panels, panel_stride, left_numbers(left),
                     logits.left_stride * Units::per_unit, tokens, a.columns);
  const float factor = a.mean ? *a.dloss / static_cast<float>(tokens) : *a.dloss;
  int failures = 0;
  // Shares are given out in order, so whoever waits for its turn waits for one that is being made.
  int64_t turn = 0;
  parallel_tasks(a.threads, shares, [&](const auto& take) {
    Scratch& scratch = thread_scratch();
    Backward<Units, T, W> worker(logits, left, hidden_panels, factor);
    if (worker.reset(scratch))
      for (int64_t share; (share = take()) < shares;) worker.run(share, dhidden, &turn);
    else
      __atomic_store_n(&failures, 1, __ATOMIC_RELAXED);
    scratch.finish();
  });
  if (failures) return false;
  parallel(a.threads, tokens, tokens * sums, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      for_columns(0, a.columns, [&](int64_t c, auto io) {
        io.put(out + labelled[i] * a.columns + c, load(dhidden + i * sums + c));
      });
  });
  return true;
}

template <class Run>
bool with_types(Dtype dtype, Dtype weight_dtype, const Run& run) {
  if (dtype == Dtype::float32) return run(FloatUnits{}, float{}, float{});
  // A decoder in float is not rounded to bfloat16, so the products are float's.
  if (weight_dtype == Dtype::float32) return run(FloatUnits{}, Bfloat16{}, float{});
  return run(Bfloat16Units{}, Bfloat16{}, Bfloat16{});
}

}  // namespace

namespace BERTFAST_ISA {

bool cross_entropy_forward(const CrossEntropyForward& a) {
  return with_types(a.dtype, a.weight_dtype, [&](auto u, auto t, auto w) {
    return forward<decltype(u), decltype(t), decltype(w)>(a);
  });
}

bool cross_entropy_backward(const CrossEntropyBackward& a) {
  return with_types(a.dtype, a.weight_dtype, [&](auto u, auto t, auto w) {
    return backward<decltype(u), decltype(t), decltype(w)>(a);
  });
}

}  // namespace BERTFAST_ISA
}  // namespace bertfast
