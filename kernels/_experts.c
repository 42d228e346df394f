/* Experts of a mixture for few tokens: weights are read once, where they lie.

   `plan` sorts the slots by expert. Then each thread does jobs taken from a shared counter: first chunks of the inner features of an expert,
   activated, for all tokens that go to it; then chunks of the output, over all experts. The time is
   that of reading the matrices of the experts that are touched. Sums are float32; tokens, matrices
   and biases are float32 or bfloat16. Inputs of a product are float32, or bfloat16 too where the
   CPU multiplies that (`reads_bf16`). */

#include <math.h>
#include <sched.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if defined(__AVX512F__)
#define LANES 16
#define TOKENS 6 /* tokens a pass over a matrix: as many as registers hold sums for */
#define EACH(DO) DO(0) DO(1) DO(2) DO(3) DO(4) DO(5)
#else
#if defined(__AVX__)
#define LANES 8
#else
#define LANES 4
#endif
#define TOKENS 2
#define EACH(DO) DO(0) DO(1)
#endif
#if defined(__AVX512BF16__)
#include <immintrin.h>
const int reads_bf16 = 1;
#else
const int reads_bf16 = 0;
#endif
#define INNER 64          /* inner features a job */
#define OUTER 64          /* outputs a job */
#define ROW (2 * INNER)
#define MANY (4 * TOKENS) /* tokens that share a reading of a matrix */
#define AHEAD 32          /* steps along columns whose weights are on their way */

typedef float floats __attribute__((vector_size(4 * LANES)));
typedef float quad __attribute__((vector_size(16)));
typedef uint32_t words __attribute__((vector_size(4 * LANES)));
typedef uint16_t halves __attribute__((vector_size(2 * LANES)));

enum { SILU, GELU, GELU_TANH, RELU, RELU2, CLAMPED_SWIGLU };

typedef struct {
    const void *hidden;     /* [tokens, width] */
    const int64_t *indices; /* [tokens, k] */
    const void *weights;    /* [tokens, k] */
    const void *up, *down;  /* [experts, features, width], [experts, width, inner], or transposed */
    const void *up_bias, *down_bias; /* [experts, features], [experts, width], or NULL */
    void *out;              /* [tokens, width] */
    int64_t tokens, k, experts, width, inner, features; /* the last three: multiples of 16 */
    int64_t act, gated, transposed, is_bf16, weights_are_bf16;
    /* up to here it is given */
    int32_t *expert;        /* [experts]: those touched, ascending */
    int32_t *start;         /* [experts + 1]: their slots */
    int32_t *token;         /* [tokens * k]: whose a slot is */
    float *weight;          /* [tokens * k] */
    const void *inputs;     /* [tokens, width]: hidden as products take it */
    void *inside;           /* [slots, inner]: activated features, likewise */
    float *sum;             /* [tokens, width]: out itself where that is float32 */
    int64_t touched, next, done;
} Problem;

static inline float to_float(const void *from, int64_t at, int is_bf16) {
    if (!is_bf16) return ((const float *)from)[at];
    uint32_t bits = (uint32_t)((const uint16_t *)from)[at] << 16;
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

/* The weight of slot `i`, 0 where it asks no expert. */
static inline float asked(const Problem *t, int64_t i) {
    int64_t expert = t->indices[i];
    return expert < 0 || expert >= t->experts ? 0.0f : to_float(t->weights, i, t->weights_are_bf16);
}

/* Sort what is kept by expert. Returns the number of slots, and sets `touched`. */
static int64_t plan(Problem *t) {
    int32_t *at = t->start + 1; /* at[e]: slots of e, then where its next slot goes */
    memset(t->start, 0, (t->experts + 1) * sizeof(int32_t));
    for (int64_t i = 0; i < t->tokens * t->k; i++)
        if (asked(t, i) != 0.0f) at[t->indices[i]]++;
    int32_t slots = 0;
    for (int64_t e = 0; e < t->experts; e++) {
        int32_t count = at[e];
        at[e] = slots;
        slots += count;
    }
    for (int64_t i = 0; i < t->tokens * t->k; i++)
        if (asked(t, i) != 0.0f) {
            int32_t slot = at[t->indices[i]]++;
            t->token[slot] = i / t->k;
            t->weight[slot] = asked(t, i);
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

static inline uint16_t to_bf16(float x) { /* to the nearest, ties to even */
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    if (x != x) return (bits >> 16) | 0x40;
    return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

/* Element `i` of a product's inputs. */
static inline void *at(const void *inputs, int64_t i, int is_bf16) {
    return (char *)inputs + i * (is_bf16 && reads_bf16 ? sizeof(uint16_t) : sizeof(float));
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

static inline float total(floats x) {
    quad part[LANES / 4];
    memcpy(part, &x, sizeof x);
    for (int j = 1; j < LANES / 4; j++) part[0] += part[j];
    return part[0][0] + part[0][1] + (part[0][2] + part[0][3]);
}

/* What a step of a product takes: four vectors of weights (`left` is what the matrix still has) and
   one of inputs. Where the CPU multiplies 16-bit numbers, each lane holds a pair of them. */
#if defined(__AVX512BF16__)
typedef __m512i vector;

static inline vector part(const void *from, int64_t at, int64_t left, int pairs) {
    if (!pairs) return left > 0 ? _mm512_loadu_si512((const float *)from + at) : (vector){0};
    __mmask32 mask = left >= 32 ? ~0u : left > 0 ? 0xffff : 0;
    return _mm512_maskz_loadu_epi16(mask, (const uint16_t *)from + at);
}

static inline void columns(
    vector *w, const void *from, int64_t at, int64_t outputs, int64_t left, int pairs) {
    if (!pairs) {
        for (int j = 0; j < 4; j++) w[j] = part(from, at + 16 * j, left - 16 * j, 0);
        return;
    }
    for (int j = 0; j < 4; j += 2) { /* of two rows */
        vector even = part(from, at + 16 * j, left - 16 * j, 1);
        vector odd = part(from, at + outputs + 16 * j, left - 16 * j, 1);
        w[j] = _mm512_unpacklo_epi16(even, odd);
        w[j + 1] = _mm512_unpackhi_epi16(even, odd);
    }
}

static inline vector spread(const void *from, int64_t at, int pairs) {
    int32_t pair;
    memcpy(&pair, (const char *)from + at * (pairs ? 2 : 4), sizeof pair);
    return _mm512_set1_epi32(pair);
}

static inline floats add(floats sum, vector w, vector x, int pairs) {
    if (!pairs) return sum + (floats)w * (floats)x;
    return (floats)_mm512_dpbf16_ps((__m512)sum, (__m512bh)w, (__m512bh)x);
}
#else
typedef floats vector;

static inline vector part(const void *from, int64_t at, int64_t left, int is_bf16) {
    return left > 0 ? load(from, at, is_bf16) : (vector){0};
}

static inline void columns(
    vector *w, const void *from, int64_t at, int64_t outputs, int64_t left, int is_bf16) {
    (void)outputs;
    for (int j = 0; j < 4; j++) w[j] = part(from, at + j * LANES, left - j * LANES, is_bf16);
}

static inline vector spread(const void *from, int64_t at, int pairs) {
    (void)pairs;
    return ((const float *)from)[at] + (vector){0};
}

static inline floats add(floats sum, vector w, vector x, int pairs) {
    (void)pairs;
    return sum + w * x;
}
#endif

/* Sums of `columns`, in order. */
static inline void put(float *y, floats a, floats b, floats c, floats d, int pairs) {
    floats all[4] = {a, b, c, d};
    for (int j = 0; j < 4; j++) {
        quad four[LANES / 4];
        memcpy(four, &all[j], sizeof four);
        for (int n = 0; n < LANES / 4; n++)
            memcpy(y + (pairs ? 32 * (j / 2) + 8 * n + 4 * (j % 2) : LANES * j + 4 * n), &four[n],
                   sizeof four[n]);
    }
}

/* Start to read `bytes` from element `at` of a matrix: the CPU does so by itself up to the end of a
   page alone, and not along columns. Inlined always, since gcc drops calls of what has no result. */
static inline __attribute__((always_inline)) void fetch(
    const void *matrix, int64_t at, int64_t bytes, int is_bf16) {
    const char *from = (const char *)matrix + at * (is_bf16 ? 2 : 4);
    for (int64_t line = 0; line < bytes; line += 64) __builtin_prefetch(from + line, 0, 2);
}

/* y[r][o ..] = features first + o .. of x[r], for `tokens` inputs: four rows of W, or four vectors of
   its columns, of which there are `left`. Meanwhile what is read next is fetched, of rows those at
   `next`. Sums have names, since gcc keeps an array of them in memory. */
static inline __attribute__((always_inline)) void tile(
    const void *matrix, int64_t base, int64_t inputs, int64_t outputs, int64_t first, int64_t o,
    int64_t left, int64_t next, const void *const *x, int tokens, float (*y)[ROW],
    int transposed, int is_bf16) {
    const int pairs = is_bf16 && reads_bf16;
    const int step = (transposed ? 1 : LANES) * (pairs ? 2 : 1);
#define START(r) floats a##r = {0}, b##r = {0}, c##r = {0}, d##r = {0};
#define ADD(r)                                                                                \
    if (r < tokens) {                                                                         \
        vector v = transposed ? spread(x[r], i, pairs) : part(x[r], i, inputs - i, pairs);    \
        a##r = add(a##r, w[0], v, pairs);                                                     \
        b##r = add(b##r, w[1], v, pairs);                                                     \
        c##r = add(c##r, w[2], v, pairs);                                                     \
        d##r = add(d##r, w[3], v, pairs);                                                     \
    }
#define END(r)                                                         \
    if (r < tokens) {                                                  \
        float *to = y[r] + o;                                          \
        if (transposed) {                                              \
            put(to, a##r, b##r, c##r, d##r, pairs);                    \
        } else {                                                       \
            to[0] = total(a##r), to[1] = total(b##r);                  \
            to[2] = total(c##r), to[3] = total(d##r);                  \
        }                                                              \
    }
    EACH(START)
    for (int64_t i = 0; i < inputs; i += step) {
        vector w[4];
        if (transposed) {
            int64_t at = base + i * outputs + first + o;
            columns(w, matrix, at, outputs, left, is_bf16);
            for (int row = 0; row <= pairs; row++)
                fetch(matrix, at + (AHEAD * step + row) * outputs, is_bf16 ? 8 * LANES : 16 * LANES,
                      is_bf16);
        } else {
            int64_t at = base + (first + o) * inputs + i;
            for (int j = 0; j < 4; j++) {
                w[j] = part(matrix, at + j * inputs, inputs - i, is_bf16);
                fetch(matrix, next + j * inputs + i, 1, is_bf16);
            }
        }
        EACH(ADD)
    }
    EACH(END)
#undef START
#undef ADD
#undef END
}

/* y[r][o] = feature (first + o) of x[r], for `count` features and up to MANY inputs. What is read
   after that is likely feature `then` of expert `next`. */
static inline __attribute__((always_inline)) void multiply(
    const void *matrix, int64_t expert, int64_t inputs, int64_t outputs, int64_t first,
    int64_t count, int64_t next, int64_t then, const void *const *x, int tokens, float (*y)[ROW],
    int transposed, int is_bf16) {
    int64_t base = expert * inputs * outputs, each = transposed ? 4 * LANES : 4;
    for (int64_t o = 0; o < count; o += each) {
        int64_t row = o + each < count ? base + (first + o + each) * inputs
                                       : (next * outputs + then) * inputs;
        for (int r = 0; r < tokens; r += TOKENS)
            switch (tokens - r < TOKENS ? tokens - r : TOKENS) { /* known when compiled */
#define CASE(n)                                                                                \
            case n + 1:                                                                        \
                if (transposed)                                                                \
                    tile(matrix, base, inputs, outputs, first, o, count - o, row, x + r,       \
                         n + 1, y + r, 1, is_bf16);                                            \
                else                                                                           \
                    tile(matrix, base, inputs, outputs, first, o, count - o, row, x + r,       \
                         n + 1, y + r, 0, is_bf16);                                            \
                break;
                EACH(CASE)
#undef CASE
            }
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
    float y[MANY][ROW], gate[MANY][ROW];
    for (int64_t tokens; slot < end; slot += tokens) {
        tokens = end - slot < MANY ? end - slot : MANY;
        const void *x[MANY];
        for (int r = 0; r < tokens; r++) x[r] = at(t->inputs, t->token[slot + r] * t->width, is_bf16);
        int64_t start = interleaved ? 2 * first : first, rows = interleaved ? 2 * count : count;
        int64_t second = split ? t->inner + first : start;
        multiply(t->up, expert, t->width, t->features, start, rows, expert, second, x, tokens,
                 gate, t->transposed, is_bf16);
        if (split)
            multiply(t->up, expert, t->width, t->features, second, count, expert,
                     start + 2 * count, /* the job between is another thread's */
                     x, tokens, y, t->transposed, is_bf16);
        for (int r = 0; r < tokens; r++) {
            float inside[INNER];
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
            void *to = at(t->inside, (slot + r) * t->inner + first, is_bf16);
            for (int64_t o = 0; o < count; o++)
                if (is_bf16 && reads_bf16)
                    ((uint16_t *)to)[o] = to_bf16(inside[o]);
                else
                    ((float *)to)[o] = inside[o];
        }
    }
}

/* Outputs `first` .. `first + count` of every token, over all its experts. */
static inline __attribute__((always_inline)) void out_of(
    const Problem *t, int64_t first, int64_t count, int is_bf16) {
    float y[MANY][ROW];
    for (int64_t token = 0; token < t->tokens; token++)
        memset(t->sum + token * t->width + first, 0, count * sizeof(float));
    for (int64_t number = 0; number < t->touched; number++) {
        int64_t expert = t->expert[number], slot = t->start[number], end = t->start[number + 1];
        for (int64_t tokens; slot < end; slot += tokens) {
            tokens = end - slot < MANY ? end - slot : MANY;
            const void *x[MANY];
            for (int r = 0; r < tokens; r++) x[r] = at(t->inside, (slot + r) * t->inner, is_bf16);
            int64_t next = number + 1 < t->touched ? t->expert[number + 1] : expert;
            multiply(t->down, expert, t->inner, t->width, first, count, next, first, x, tokens, y,
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

static void share(void *problem) { /* of one thread */
    Problem *t = problem;
    if (t->is_bf16)
        work(t, 1);
    else
        work(t, 0);
}

enum { DONE, TOO_MANY, NO_MEMORY };

/* `given` is the first part of a `Problem`. `parallel` calls a function on that many threads, and
   waits for all. Nothing is done where an expert has more than `few` slots on average. */
int skip_experts(
    const void *given, int few, void (*parallel)(void (*)(void *), void *, unsigned, unsigned),
    int threads) {
    Problem problem = {0}, *t = &problem;
    memcpy(t, given, offsetof(Problem, expert));
    int widened = t->is_bf16 && !reads_bf16, status = NO_MEMORY;
    int64_t all = t->tokens * t->k, numbers = t->tokens * t->width;
    size_t each = t->is_bf16 && !widened ? sizeof(uint16_t) : sizeof(float);
    int32_t *notes = malloc(sizeof *notes * (2 * t->experts + 1 + 2 * all));
    float *inputs = NULL, *sum = NULL;
    if (!notes) return NO_MEMORY;
    t->expert = notes, t->start = t->expert + t->experts;
    t->token = t->start + t->experts + 1, t->weight = (float *)(t->token + all);
    int64_t slots = plan(t);
    if (slots > few * t->touched) {
        status = TOO_MANY;
        goto end;
    }
    t->inside = malloc(slots * t->inner * each + 1);
    t->sum = t->is_bf16 ? sum = malloc(numbers * sizeof(float) + 1) : t->out;
    t->inputs = widened ? inputs = malloc(numbers * sizeof(float) + 1) : t->hidden;
    if (!t->inside || (t->is_bf16 && !sum) || (widened && !inputs)) goto end;
    for (int64_t i = 0; widened && i < numbers; i++) inputs[i] = to_float(t->hidden, i, 1);
    if (threads == 1)
        share(t);
    else
        parallel(share, t, threads, 0);
    status = DONE;
end:
    free(notes), free(t->inside), free(sum), free(inputs);
    return status;
}
