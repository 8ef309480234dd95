// Products and whole decoding steps of the DeepSeek family (MLA) on a CPU, behind a C interface; `native.py`
// fills the structures. Each entry is one parallel region of OpenMP, the one that torch uses.
#include <cmath>
#include <numeric>

#include "product.h"

using namespace whale;

#define EXPORT extern "C" __attribute__((visibility("default")))

namespace {

struct Mlp {
  Weight gate, up, down;
};

struct Layer {
  Weight q_a, q, kv_a, uk, uv, o, router;  // uk [H x C, N], uv [H x (N + V), C], of which V; no q_a: no compressed query
  const float *input_norm, *q_norm, *kv_norm, *post_norm, *bias;
  const Mlp* mlps;  // the routed experts; without a router the one dense block
  int64_t num_mlps;
  Mlp shared;
  void* cache;  // rows [pages, page_size, C + R]
};

struct Shape {
  int64_t hidden, heads, nope, rope, value, latent, interleaved;
  int64_t picks, groups, top_groups, by_two, softmax, normalised;
  float eps, softmax_scale, routed_scale;
};

struct Step {  // T tokens: where their rows go, their positions, and whose they are: pages of runs [., P]
  int64_t tokens, pages, page_size, kind;
  const float *cos, *sin;  // [T, R / 2]
  const int64_t *slots, *positions, *owners, *table;
};

struct Task {
  const Mlp* mlp;
  int64_t first, last, row;  // rows of x, the first of the weight's
};

using Floats = std::vector<float>;

float* room(Floats& buffer, int64_t count) {
  if (static_cast<int64_t>(buffer.size()) < count + kLanes) buffer.assign(count + kLanes, 0);
  return buffer.data();
}

void rms_norm(const float* x, const float* weight, int64_t n, float eps, float* out) {
  double square = 0;
  for (int64_t i = 0; i < n; ++i) square += static_cast<double>(x[i]) * x[i];
  const float factor = 1 / std::sqrt(static_cast<float>(square / static_cast<double>(n)) + eps);
  for (int64_t i = 0; i < n; ++i) out[i] = x[i] * factor * weight[i];
}

void rotate(const float* x, const float* cos, const float* sin, int64_t half, bool interleaved, float* out) {
  for (int64_t i = 0; i < half; ++i) {
    const float a = interleaved ? x[2 * i] : x[i], b = interleaved ? x[2 * i + 1] : x[half + i];
    out[i] = a * cos[i] - b * sin[i];
    out[half + i] = b * cos[i] + a * sin[i];
  }
}

void read(const void* in, int64_t kind, int64_t count, float* out) {
  widen_row(Weight{in, nullptr, kind, 1, count, 1}, 0, out);
}

void write(const float* in, int64_t kind, int64_t count, void* out) {
  if (kind == kF32) {
    std::memcpy(out, in, 4 * count);
  } else {
    for (int64_t i = 0; i < count; ++i) static_cast<uint16_t*>(out)[i] = to_bf16(in[i]);
  }
}

// One token and some heads over its pages, page by page, the softmax corrected as its maximum grows.
void attend(const Layer& layer, const Shape& shape, const Step& step, int64_t token, int64_t heads,
            const float* q, float* out) {
  static thread_local Floats wide_, scores_;
  const int64_t width = shape.latent + shape.rope, k = padded(width), size = step.page_size;
  const int64_t full = (size + 7) / 8 * 8;  // rows behind those seen count nothing, and are finite
  float *wide = room(wide_, full * k), *scores = room(scores_, heads * full);
  const int64_t bytes = step.kind == kF32 ? 4 : 2;
  Floats largest(heads, -INFINITY), total(heads, 0);
  std::fill(out, out + heads * shape.latent, 0.0f);
  for (int64_t page = 0; page * size <= step.positions[token]; ++page) {
    const int64_t seen = std::min(size, step.positions[token] + 1 - page * size);
    const int64_t rows = (seen + 7) / 8 * 8;
    const char* data = static_cast<const char*>(layer.cache) +
                       step.table[step.owners[token] * step.pages + page] * size * width * bytes;
    const Weight cache{data, nullptr, step.kind, size, width, 1};
    for (int64_t row = 0; row < seen; ++row) widen_row(cache, row, wide + row * k);
    for (int64_t row = 0; row < rows; row += kFew)
      times_few(wide + row * k, k, q, width, heads, scores + row, full, kFew);
    for (int64_t head = 0; head < heads; ++head) {
      float *p = scores + head * full, *o = out + head * shape.latent, most = largest[head];
      for (int64_t row = 0; row < seen; ++row) p[row] *= shape.softmax_scale;
      for (int64_t row = 0; row < seen; ++row) most = std::max(most, p[row]);
      const float before = exponential(largest[head] - most);
      for (int64_t row = 0; row < seen; ++row) p[row] = exponential(p[row] - most);
      for (int64_t row = seen; row < rows; ++row) p[row] = 0;
      total[head] = std::accumulate(p, p + seen, total[head] * before);
      if (most != largest[head])
        for (int64_t c = 0; c < shape.latent; ++c) o[c] *= before;
      largest[head] = most;
      for (int64_t row = 0; row < rows; row += 8, p += 8) {
        const float* l = wide + row * k;
        for (int64_t c = 0; c < shape.latent; ++c)
          o[c] += ((p[0] * l[c] + p[1] * l[k + c]) + (p[2] * l[2 * k + c] + p[3] * l[3 * k + c])) +
                  ((p[4] * l[4 * k + c] + p[5] * l[5 * k + c]) + (p[6] * l[6 * k + c] + p[7] * l[7 * k + c]));
      }
    }
  }
  for (int64_t head = 0; head < heads; ++head)
    for (int64_t c = 0; c < shape.latent; ++c) out[head * shape.latent + c] /= total[head];
}

// The best `count` of `n`, best first.
void best_of(const float* values, int64_t n, int64_t count, std::vector<int64_t>& out) {
  out.resize(n);
  std::iota(out.begin(), out.end(), 0);
  std::partial_sort(out.begin(), out.begin() + count, out.end(), [&](int64_t a, int64_t b) {
    return values[a] > values[b] || (values[a] == values[b] && a < b);
  });
  out.resize(count);
}

// `moe.Router` after its product: scores become picked experts and their weights.
void route(const Layer& layer, const Shape& shape, float* scores, int64_t* ids, float* weights) {
  const int64_t n = layer.num_mlps, size = n / shape.groups;
  const float most = *std::max_element(scores, scores + n);
  float sum = 0;
  for (int64_t i = 0; i < n; ++i) {
    scores[i] = shape.softmax ? std::exp(scores[i] - most) : 1 / (1 + std::exp(-scores[i]));
    sum += scores[i];
  }
  if (shape.softmax)
    for (int64_t i = 0; i < n; ++i) scores[i] /= sum;
  Floats choice(scores, scores + n);
  if (layer.bias != nullptr)
    for (int64_t i = 0; i < n; ++i) choice[i] += layer.bias[i];
  std::vector<int64_t> best;
  if (shape.groups > 1) {
    Floats groups(shape.groups);
    for (int64_t g = 0; g < shape.groups; ++g) {
      best_of(&choice[g * size], size, std::min<int64_t>(size, 1 + shape.by_two), best);
      for (int64_t i : best) groups[g] += choice[g * size + i];
    }
    best_of(groups.data(), shape.groups, shape.top_groups, best);
    for (int64_t g = 0; g < shape.groups; ++g)
      if (std::find(best.begin(), best.end(), g) == best.end())
        std::fill_n(&choice[g * size], size, -INFINITY);
  }
  best_of(choice.data(), n, shape.picks, best);
  sum = 0;
  for (int64_t i : best) sum += scores[i];
  for (int64_t i = 0; i < shape.picks; ++i) {
    ids[i] = best[i];
    weights[i] = scores[best[i]] / (shape.normalised ? sum + 1e-20f : 1) * shape.routed_scale;
  }
}

// Within a parallel region: rows of x, each through the block of its task: hidden [N, width], out [N, D].
void run_mlps(const std::vector<Task>& up, const std::vector<Task>& down, const float* x, int64_t x_step,
              const float* weights, float* hidden, int64_t hidden_step, float* out, int64_t out_step) {
#pragma omp for schedule(dynamic)
  for (size_t i = 0; i < up.size(); ++i) {
    static thread_local Floats gate_, up_;
    const Task& task = up[i];
    const int64_t count = task.last - task.first, end = std::min(task.mlp->up.rows, task.row + kChunk);
    float *gate = room(gate_, count * kChunk), *wide = room(up_, count * kChunk);
    times_rows(task.mlp->gate, task.row, end, x + task.first * x_step, x_step, count, gate - task.row, kChunk);
    times_rows(task.mlp->up, task.row, end, x + task.first * x_step, x_step, count, wide - task.row, kChunk);
    for (int64_t m = 0; m < count; ++m) {
      float* to = hidden + (task.first + m) * hidden_step + task.row;
      const float weight = weights[task.first + m];
      for (int64_t r = 0; r < end - task.row; ++r)
        to[r] = silu(gate[m * kChunk + r]) * wide[m * kChunk + r] * weight;
    }
  }
#pragma omp for schedule(dynamic)
  for (size_t i = 0; i < down.size(); ++i) {
    const Task& task = down[i];
    const Weight& weight = task.mlp->down;
    times_rows(weight, task.row, std::min(weight.rows, task.row + kChunk), hidden + task.first * hidden_step,
               hidden_step, task.last - task.first, out + task.first * out_step, out_step);
  }
}

void add_tasks(const Mlp& mlp, int64_t first, int64_t last, std::vector<Task>& up, std::vector<Task>& down) {
  if (first == last) return;
  for (int64_t row = 0; row < mlp.up.rows; row += kChunk) up.push_back({&mlp, first, last, row});
  for (int64_t row = 0; row < mlp.down.rows; row += kChunk) down.push_back({&mlp, first, last, row});
}

}  // namespace

// x [count, cols] -> out [count, rows], both of `kind`.
EXPORT void whalepod_linear(const Weight* w, const void* x, int64_t kind, int64_t count, void* out) {
  static thread_local Floats in_, out_;
  const int64_t bytes = kind == kF32 ? 4 : 2, step = padded(w->cols);
  float *in = room(in_, count * step), *found = room(out_, count * w->rows);
#pragma omp parallel
  {
#pragma omp for
    for (int64_t m = 0; m < count; ++m)
      read(static_cast<const char*>(x) + m * w->cols * bytes, kind, w->cols, in + m * step);
    times(*w, in, step, count, found, w->rows);
#pragma omp barrier
#pragma omp for
    for (int64_t m = 0; m < count; ++m)
      write(found + m * w->rows, kind, w->rows, static_cast<char*>(out) + m * w->rows * bytes);
  }
}

// Rows x [count, D], those up to ends[e] of expert e, times `weights` -> out [count, D].
EXPORT void whalepod_experts(const Mlp* mlps, int64_t num_mlps, const void* x, int64_t kind, int64_t count,
                             const int32_t* ends, const float* weights, void* out) {
  static thread_local Floats in_, hidden_, out_;
  static thread_local std::vector<Task> up_, down_;
  std::vector<Task>&up = up_, &down = down_;
  up.clear(), down.clear();
  for (int64_t e = 0, start = 0; e < num_mlps; start = ends[e++]) add_tasks(mlps[e], start, ends[e], up, down);
  const int64_t size = mlps->up.cols, width = padded(mlps->up.rows), step = padded(size);
  const int64_t used = ends[num_mlps - 1], bytes = kind == kF32 ? 4 : 2;
  float *in = room(in_, used * step), *hidden = room(hidden_, used * width), *found = room(out_, count * size);
  std::fill(found + used * size, found + count * size, 0.0f);
#pragma omp parallel
  {
#pragma omp for
    for (int64_t m = 0; m < used; ++m)
      read(static_cast<const char*>(x) + m * size * bytes, kind, size, in + m * step);
    run_mlps(up, down, in, step, weights, hidden, width, found, size);
#pragma omp for
    for (int64_t m = 0; m < count; ++m)
      write(found + m * size, kind, size, static_cast<char*>(out) + m * size * bytes);
  }
}

// The hidden states x [T, D] of `step.kind` through some layers, in place; new rows go into their caches.
EXPORT void whalepod_decode(const Layer* layers, int64_t num_layers, const Shape* shape_, const Step* step_,
                            void* x_) {
  const Shape& shape = *shape_;
  const Step& step = *step_;
  const int64_t T = step.tokens, D = shape.hidden, H = shape.heads, N = shape.nope, R = shape.rope;
  const int64_t V = shape.value, C = shape.latent, d = padded(D), bytes = step.kind == kF32 ? 4 : 2;
  int64_t rank = 0, width = 0, rows = T, experts = 1;
  for (int64_t i = 0; i < num_layers; ++i) {
    const Layer& layer = layers[i];
    rank = std::max({rank, padded(layer.q_a.rows), padded(layer.kv_a.rows)});
    width = std::max({width, padded(layer.mlps->up.rows), padded(layer.shared.up.rows)});
    if (layer.router.data != nullptr) rows = T * (shape.picks + 1), experts = std::max(experts, layer.num_mlps);
  }
  static thread_local Floats f[12];
  float *x = room(f[0], T * d), *h = room(f[1], T * d), *a = room(f[2], T * rank), *b = room(f[3], T * rank);
  float *q = room(f[4], T * H * (N + R)), *absorbed = room(f[5], T * H * (C + R));
  float *seen = room(f[6], T * H * C), *values = room(f[7], T * padded(H * V)), *sent = room(f[8], rows * d);
  float *hidden = room(f[9], rows * width), *out = room(f[10], rows * d), *scores = room(f[11], T * experts);
  Floats weights(rows, 1.0f);
  std::vector<int64_t> ids(rows), row_of(rows), token_of(rows);
  std::vector<Task> up, down;
  const int64_t query = N + R, up_rows = N + V, latent = C + R, v = padded(H * V);
#pragma omp parallel
  {
#pragma omp for
    for (int64_t t = 0; t < T; ++t) {
      read(static_cast<const char*>(x_) + t * D * bytes, step.kind, D, x + t * d);
      rms_norm(x + t * d, layers->input_norm, D, shape.eps, h + t * d);
    }
    for (const Layer* layer = layers; layer < layers + num_layers; ++layer) {
      const Layer& l = *layer;
      if (l.q_a.data != nullptr) times(l.q_a, h, d, T, a, rank);
      times(l.kv_a, h, d, T, b, rank);
#pragma omp barrier
#pragma omp for
      for (int64_t t = 0; t < T; ++t) {
        const float *cos = step.cos + t * R / 2, *sin = step.sin + t * R / 2;
        float *compressed = b + t * rank, *key = absorbed + t * H * latent;  // as scratch
        rms_norm(compressed, l.kv_norm, C, shape.eps, key);
        rotate(compressed + C, cos, sin, R / 2, shape.interleaved, key + C);
        write(key, step.kind, latent, static_cast<char*>(l.cache) + step.slots[t] * latent * bytes);
        if (l.q_a.data != nullptr) rms_norm(a + t * rank, l.q_norm, l.q_a.rows, shape.eps, a + t * rank);
      }
      if (l.q_a.data != nullptr)
        times(l.q, a, rank, T, q, H * query);
      else
        times(l.q, h, d, T, q, H * query);
#pragma omp barrier
#pragma omp for collapse(2) schedule(dynamic)
      for (int64_t head = 0; head < H; ++head)
        for (int64_t row = 0; row < C; row += 4 * kChunk) {
          times_rows(l.uk, head * C + row, head * C + std::min(C, row + 4 * kChunk), q + head * query, H * query,
                     T, absorbed + head * latent - head * C, H * latent);
          if (row > 0) continue;
          for (int64_t t = 0; t < T; ++t)
            rotate(q + (t * H + head) * query + N, step.cos + t * R / 2, step.sin + t * R / 2, R / 2,
                   shape.interleaved, absorbed + (t * H + head) * latent + C);
        }
      const int64_t each = std::min<int64_t>(T > 1 ? H : (H + 1) / 2, 16);  // heads that read a page together
#pragma omp for collapse(2) schedule(dynamic)
      for (int64_t t = 0; t < T; ++t)
        for (int64_t head = 0; head < H; head += each)
          attend(l, shape, step, t, std::min(each, H - head), absorbed + (t * H + head) * latent,
                 seen + (t * H + head) * C);
#pragma omp for collapse(2) schedule(dynamic)
      for (int64_t head = 0; head < H; ++head)
        for (int64_t row = N; row < N + V; row += kChunk)
          times_rows(l.uv, head * up_rows + row, head * up_rows + std::min(N + V, row + kChunk), seen + head * C,
                     H * C, T, values - head * up_rows + head * V - N, v);
      times(l.o, values, v, T, out, d);
#pragma omp barrier
#pragma omp for
      for (int64_t t = 0; t < T; ++t) {
        for (int64_t i = 0; i < D; ++i) x[t * d + i] += out[t * d + i];
        rms_norm(x + t * d, l.post_norm, D, shape.eps, h + t * d);
      }
      const bool routed = l.router.data != nullptr;
      const int64_t K = routed ? shape.picks : 0;
      if (routed) times(l.router, h, d, T, scores, l.num_mlps);
#pragma omp barrier
#pragma omp single
      {
        up.clear(), down.clear();
        // All tokens' rows first, for the shared or the dense block; then those of each expert.
        add_tasks(routed ? l.shared : *l.mlps, 0, l.shared.up.data == nullptr && routed ? 0 : T, up, down);
        std::fill(weights.begin(), weights.end(), 1.0f);
        Floats picked(T * K);
        for (int64_t t = 0; t < T && routed; ++t)
          route(l, shape, scores + t * l.num_mlps, &ids[t * K], &picked[t * K]);
        for (int64_t e = 0, row = T; e < l.num_mlps && routed; ++e) {
          const int64_t start = row;
          for (int64_t p = 0; p < T * K; ++p)
            if (ids[p] == e) row_of[p] = row, token_of[row] = p / K, weights[row++] = picked[p];
          add_tasks(l.mlps[e], start, row, up, down);
        }
      }
#pragma omp for
      for (int64_t row = 0; row < T * (1 + K); ++row)
        std::memcpy(sent + row * d, h + (row < T ? row : token_of[row]) * d, 4 * D);
      run_mlps(up, down, sent, d, weights.data(), hidden, width, out, d);
      const bool everyones = !routed || l.shared.up.data != nullptr;
#pragma omp for
      for (int64_t t = 0; t < T; ++t) {
        for (int64_t i = 0; i < D && everyones; ++i) x[t * d + i] += out[t * d + i];
        for (int64_t k = 0; k < K; ++k)
          for (int64_t i = 0; i < D; ++i) x[t * d + i] += out[row_of[t * K + k] * d + i];
        if (layer + 1 < layers + num_layers)
          rms_norm(x + t * d, layer[1].input_norm, D, shape.eps, h + t * d);
        else
          write(x + t * d, step.kind, D, static_cast<char*>(x_) + t * D * bytes);
      }
    }
  }
}
