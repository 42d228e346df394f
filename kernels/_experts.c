/* Experts of a mixture for few tokens: weights are read once, where they lie.

   `plan` sorts the slots by expert. `experts` then does jobs taken from a shared counter, so that
   any number of threads may run the same problem: first chunks of the inner features of an expert,
   activated, for all tokens that go to it; then chunks of the output, over all experts. The time is
   that of reading the matrices of the experts that are touched. Sums are float32; tokens, matrices
   and biases are float32 or bfloat16. */

#include <math.h>
#include <sched.h>
#include <stdint.h>
#include <string.h>

#if defined(__AVX512F__)
#define LANES 16
#define TOKENS 8 /* tokens a pass over a matrix: as many as the registers hold sums for */
#elif defined(__AVX__)
#define LANES 8
#define TOKENS 4
#else
#define LANES 4
#define TOKENS 4
#endif
#define INNER 64   /* inner features a job */
#define OUTER 32   /* outputs a job */
#define ROW (2 * INNER)

typedef float floats __attribute__((vector_size(4 * LANES)));
typedef uint32_t words __attribute__((vector_size(4 * LANES)));
typedef uint16_t halves __attribute__((vector_size(2 * LANES)));

enum { SILU, GELU, GELU_TANH, RELU, RELU2, CLAMPED_SWIGLU };

typedef struct {
    const void *hidden;     /* [tokens, width] */
    const int64_t *indices; /* [tokens, k] */
    const float *weights;   /* [tokens, k] */
    const void *up, *down;  /* [experts, features, width], [experts, width, inner], or transposed */
    const void *up_bias, *down_bias; /* [experts, features], [experts, width], or NULL */
    void *out;              /* [tokens, width] */
    int32_t *expert;        /* [experts]: those touched, ascending */
    int32_t *start;         /* [experts + 1]: their slots */
    int32_t *token;         /* [tokens * k]: whose a slot is */
    float *weight;          /* [tokens * k] */
    float *wide;            /* [tokens, width]: hidden in float32 */
    float *sum;             /* [tokens, width]: out itself where that is float32 */
    float *inside;          /* [slots, inner]: activated features */
    int64_t tokens, k, experts, width, inner, features; /* multiples of 16 */
    int64_t act, gated, transposed, is_bf16;
    int64_t touched, next, done;
} Problem;

/* Sort what is kept by expert. Returns the number of slots, and sets `touched`. */
int64_t plan(Problem *t) {
    int32_t *at = t->start + 1; /* at[e]: slots of e, then where its next slot goes */
    memset(t->start, 0, (t->experts + 1) * sizeof(int32_t));
    for (int64_t i = 0; i < t->tokens * t->k; i++)
        if (t->weights[i] != 0.0f && t->indices[i] >= 0 && t->indices[i] < t->experts)
            at[t->indices[i]]++;
    int32_t slots = 0;
    for (int64_t e = 0; e < t->experts; e++) {
        int32_t count = at[e];
        at[e] = slots;
        slots += count;
    }
    for (int64_t i = 0; i < t->tokens * t->k; i++)
        if (t->weights[i] != 0.0f && t->indices[i] >= 0 && t->indices[i] < t->experts) {
            int32_t slot = at[t->indices[i]]++;
            t->token[slot] = i / t->k;
            t->weight[slot] = t->weights[i];
        }
    t->touched = 0; /* now at[e] is where e ends; keep those that have slots */
    for (int64_t e = 0, before = 0; e < t->experts; before = at[e++])
        if (at[e] > before) {
            int32_t end = at[e];
            t->expert[t->touched++] = e;
            t->start[t->touched] = end;
        }
    return slots;
}

static inline float to_float(const void *from, int64_t at, int is_bf16) {
    if (!is_bf16) return ((const float *)from)[at];
    uint32_t bits = (uint32_t)((const uint16_t *)from)[at] << 16;
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

static inline uint16_t to_bf16(float x) { /* to the nearest, ties to even */
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    if (x != x) return (bits >> 16) | 0x40;
    return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

static inline floats load(const void *from, int64_t at, int is_bf16) {
    if (is_bf16) {
        halves h;
        memcpy(&h, (const uint16_t *)from + at, sizeof h);
        return (floats)(__builtin_convertvector(h, words) << 16);
    }
    floats x;
    memcpy(&x, (const float *)from + at, sizeof x);
    return x;
}

static inline floats from(const float *p) {
    floats x;
    memcpy(&x, p, sizeof x);
    return x;
}

/* y[r][o] = row (first + o) of W times x[r], for `tokens` vectors and `count` rows. */
static inline __attribute__((always_inline)) void by_rows(
    const void *matrix, int64_t base, int64_t inputs, int64_t first, int64_t count,
    const float *const *x, int tokens, float (*y)[ROW], int is_bf16) {
    for (int64_t o = 0; o < count; o++) {
        floats sum[TOKENS][2] = {0};
        int64_t row = base + (first + o) * inputs, i = 0;
        for (; i + 2 * LANES <= inputs; i += 2 * LANES) {
            floats a = load(matrix, row + i, is_bf16);
            floats b = load(matrix, row + i + LANES, is_bf16);
            for (int r = 0; r < tokens; r++) {
                sum[r][0] += a * from(x[r] + i);
                sum[r][1] += b * from(x[r] + i + LANES);
            }
        }
        for (; i < inputs; i += LANES)
            for (int r = 0; r < tokens; r++)
                sum[r][0] += load(matrix, row + i, is_bf16) * from(x[r] + i);
        for (int r = 0; r < tokens; r++) {
            floats both = sum[r][0] + sum[r][1];
            float total = 0.0f;
            for (int j = 0; j < LANES; j++) total += both[j];
            y[r][o] = total;
        }
    }
}

/* The same where features are columns. */
static inline __attribute__((always_inline)) void by_columns(
    const void *matrix, int64_t base, int64_t inputs, int64_t outputs, int64_t first,
    int64_t count, const float *const *x, int tokens, float (*y)[ROW], int is_bf16) {
    for (int r = 0; r < tokens; r++) {
        floats sum[ROW / LANES] = {0};
        for (int64_t i = 0; i < inputs; i++) {
            int64_t row = base + i * outputs + first;
            for (int j = 0; j < ROW / LANES; j++)
                if (j * LANES < count) sum[j] += x[r][i] * load(matrix, row + j * LANES, is_bf16);
        }
        for (int j = 0; j < ROW / LANES; j++)
            if (j * LANES < count) memcpy(y[r] + j * LANES, &sum[j], sizeof sum[j]);
    }
}

static inline __attribute__((always_inline)) void multiply(
    const void *matrix, int64_t expert, int64_t inputs, int64_t outputs, int64_t first,
    int64_t count, const float *const *x, int tokens, float (*y)[ROW], int transposed,
    int is_bf16) {
    int64_t base = expert * inputs * outputs;
    if (transposed)
        return by_columns(matrix, base, inputs, outputs, first, count, x, tokens, y, is_bf16);
    switch (tokens) { /* known when compiled: the sums stay in registers */
#define CASE(n) \
    case n: by_rows(matrix, base, inputs, first, count, x, n, y, is_bf16); break;
        CASE(1) CASE(2) CASE(3) CASE(4)
#if TOKENS == 8
        CASE(5) CASE(6) CASE(7) CASE(8)
#endif
#undef CASE
    }
}

static inline float activate(float x, int64_t act) {
    switch (act) {
    case SILU: return x / (1.0f + expf(-x));
    case GELU: return 0.5f * x * (1.0f + erff(x * 0.70710678f));
    case GELU_TANH: return 0.5f * x * (1.0f + tanhf(0.79788456f * (x + 0.044715f * x * x * x)));
    case RELU: return x > 0.0f || x != x ? x : 0.0f;
    default: return x > 0.0f || x != x ? x * x : 0.0f;
    }
}

static inline float clamp(float x, float low, float high) {
    return x < low ? low : x > high ? high : x; /* NaN stays */
}

/* Inner features `first` .. `first + count` of one touched expert, activated. */
static inline __attribute__((always_inline)) void into(
    const Problem *t, int64_t number, int64_t first, int64_t count, int is_bf16) {
    int64_t expert = t->expert[number], slot = t->start[number], end = t->start[number + 1];
    int interleaved = t->act == CLAMPED_SWIGLU, split = t->gated && !interleaved;
    float y[TOKENS][ROW], gate[TOKENS][ROW];
    for (int64_t tokens; slot < end; slot += tokens) {
        tokens = end - slot < TOKENS ? end - slot : TOKENS;
        const float *x[TOKENS];
        for (int r = 0; r < tokens; r++) x[r] = t->wide + t->token[slot + r] * t->width;
        int64_t start = interleaved ? 2 * first : first, rows = interleaved ? 2 * count : count;
        multiply(t->up, expert, t->width, t->features, start, rows, x, tokens, gate,
                 t->transposed, is_bf16);
        if (split)
            multiply(t->up, expert, t->width, t->features, t->inner + first, count, x, tokens, y,
                     t->transposed, is_bf16);
        for (int r = 0; r < tokens; r++) {
            float *inside = t->inside + (slot + r) * t->inner + first;
            if (t->up_bias) {
                int64_t bias = expert * t->features + start;
                for (int64_t o = 0; o < rows; o++)
                    gate[r][o] += to_float(t->up_bias, bias + o, is_bf16);
                if (split)
                    for (int64_t o = 0; o < count; o++)
                        y[r][o] += to_float(t->up_bias, bias + t->inner + o, is_bf16);
            }
            for (int64_t o = 0; o < count; o++)
                if (interleaved) {
                    float g = clamp(gate[r][2 * o], -INFINITY, 7.0f);
                    float linear = clamp(gate[r][2 * o + 1], -7.0f, 7.0f);
                    inside[o] = g / (1.0f + expf(-1.702f * g)) * (linear + 1.0f);
                } else {
                    inside[o] = activate(gate[r][o], t->act) * (split ? y[r][o] : 1.0f);
                }
        }
    }
}

/* Outputs `first` .. `first + count` of every token, over all its experts. */
static inline __attribute__((always_inline)) void out_of(
    const Problem *t, int64_t first, int64_t count, int is_bf16) {
    float y[TOKENS][ROW];
    for (int64_t token = 0; token < t->tokens; token++)
        memset(t->sum + token * t->width + first, 0, count * sizeof(float));
    for (int64_t number = 0; number < t->touched; number++) {
        int64_t expert = t->expert[number], slot = t->start[number], end = t->start[number + 1];
        for (int64_t tokens; slot < end; slot += tokens) {
            tokens = end - slot < TOKENS ? end - slot : TOKENS;
            const float *x[TOKENS];
            for (int r = 0; r < tokens; r++) x[r] = t->inside + (slot + r) * t->inner;
            multiply(t->down, expert, t->inner, t->width, first, count, x, tokens, y,
                     t->transposed, is_bf16);
            for (int r = 0; r < tokens; r++) {
                float *sum = t->sum + t->token[slot + r] * t->width + first;
                if (t->down_bias)
                    for (int64_t o = 0; o < count; o++)
                        y[r][o] += to_float(t->down_bias, expert * t->width + first + o, is_bf16);
                for (int64_t o = 0; o < count; o++) sum[o] += t->weight[slot + r] * y[r][o];
            }
        }
    }
    for (int64_t token = 0; token < t->tokens; token++) {
        int64_t at = token * t->width + first;
        for (int64_t o = 0; is_bf16 && o < count; o++)
            ((uint16_t *)t->out)[at + o] = to_bf16(t->sum[at + o]);
    }
}

static inline __attribute__((always_inline)) void work(Problem *t, int is_bf16) {
    int64_t chunks = (t->inner + INNER - 1) / INNER, before = t->touched * chunks;
    int64_t all = before + (t->width + OUTER - 1) / OUTER;
    for (;;) {
        int64_t job = __atomic_fetch_add(&t->next, 1, __ATOMIC_RELAXED);
        if (job >= all) return;
        if (job < before) {
            int64_t first = job % chunks * INNER, left = t->inner - first;
            into(t, job / chunks, first, left < INNER ? left : INNER, is_bf16);
            __atomic_fetch_add(&t->done, 1, __ATOMIC_RELEASE);
        } else { /* those who took the first jobs finish them: none of them waits */
            while (__atomic_load_n(&t->done, __ATOMIC_ACQUIRE) < before) sched_yield();
            int64_t first = (job - before) * OUTER, left = t->width - first;
            out_of(t, first, left < OUTER ? left : OUTER, is_bf16);
        }
    }
}

/* Do jobs until none is left. */
void experts(Problem *t) {
    if (t->is_bf16)
        work(t, 1);
    else
        work(t, 0);
}
