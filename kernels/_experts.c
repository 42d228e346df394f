/* Experts of a mixture for few tokens: weights are read once, where they lie.

   A job is a chunk of the output features of one expert, for all tokens that go to it: the time is
   that of reading the matrices of the experts that are touched. Jobs are taken from a shared
   counter, so that any number of threads may run the same problem. Sums are float32, weights
   float32 or bfloat16. */

#include <stdint.h>
#include <string.h>

#if defined(__AVX512F__)
#define LANES 16
#elif defined(__AVX__)
#define LANES 8
#else
#define LANES 4
#endif
#define CHUNK 64 /* features a job */
#define TOKENS 4 /* tokens a pass over a matrix */

typedef float floats __attribute__((vector_size(4 * LANES)));
typedef uint32_t words __attribute__((vector_size(4 * LANES)));
typedef uint16_t halves __attribute__((vector_size(2 * LANES)));

typedef struct {
    const float *x;        /* [slots, inputs], the slots of an expert side by side */
    const void *weight;    /* [experts, outputs, inputs], or [experts, inputs, outputs] */
    const int32_t *expert; /* [touched] */
    const int32_t *start;  /* [touched + 1]: slots of the i-th expert touched */
    float *y;              /* [slots, outputs] */
    int64_t touched, inputs, outputs; /* multiples of 16 */
    int64_t transposed, is_bf16;
    int64_t next;
} Problem;

static inline floats load(const void *weight, int64_t at, int is_bf16) {
    if (is_bf16) {
        halves h;
        memcpy(&h, (const uint16_t *)weight + at, sizeof h);
        return (floats)(__builtin_convertvector(h, words) << 16);
    }
    floats x;
    memcpy(&x, (const float *)weight + at, sizeof x);
    return x;
}

static inline floats from(const float *p) {
    floats x;
    memcpy(&x, p, sizeof x);
    return x;
}

/* y[token, first .. first + count] = W x for `tokens` tokens; rows of W are features. */
static inline __attribute__((always_inline)) void by_rows(
    const Problem *t, int64_t base, int64_t slot, int tokens, int64_t first, int64_t count,
    int is_bf16) {
    for (int64_t o = first; o < first + count; o++) {
        floats sum[TOKENS][2] = {0};
        int64_t row = base + o * t->inputs, i = 0;
        for (; i + 2 * LANES <= t->inputs; i += 2 * LANES) {
            floats a = load(t->weight, row + i, is_bf16);
            floats b = load(t->weight, row + i + LANES, is_bf16);
            for (int r = 0; r < tokens; r++) {
                const float *x = t->x + (slot + r) * t->inputs + i;
                sum[r][0] += a * from(x);
                sum[r][1] += b * from(x + LANES);
            }
        }
        for (; i < t->inputs; i += LANES)
            for (int r = 0; r < tokens; r++)
                sum[r][0] += load(t->weight, row + i, is_bf16) *
                             from(t->x + (slot + r) * t->inputs + i);
        for (int r = 0; r < tokens; r++) {
            floats both = sum[r][0] + sum[r][1];
            float total = 0.0f;
            for (int j = 0; j < LANES; j++) total += both[j];
            t->y[(slot + r) * t->outputs + o] = total;
        }
    }
}

/* The same where columns of W are features. */
static inline __attribute__((always_inline)) void by_columns(
    const Problem *t, int64_t base, int64_t slot, int64_t first, int64_t count, int is_bf16) {
    floats sum[CHUNK / LANES] = {0};
    const float *x = t->x + slot * t->inputs;
    for (int64_t i = 0; i < t->inputs; i++) {
        int64_t row = base + i * t->outputs + first;
        for (int j = 0; j < CHUNK / LANES; j++)
            if (j * LANES < count) sum[j] += x[i] * load(t->weight, row + j * LANES, is_bf16);
    }
    for (int j = 0; j < CHUNK / LANES; j++)
        if (j * LANES < count)
            memcpy(t->y + slot * t->outputs + first + j * LANES, &sum[j], sizeof sum[j]);
}

static inline __attribute__((always_inline)) void multiply(
    const Problem *t, int64_t number, int64_t first, int64_t count, int is_bf16) {
    int64_t base = t->expert[number] * t->inputs * t->outputs;
    int64_t slot = t->start[number], end = t->start[number + 1];
    if (t->transposed) {
        for (; slot < end; slot++) by_columns(t, base, slot, first, count, is_bf16);
        return;
    }
    for (; slot + TOKENS <= end; slot += TOKENS)
        by_rows(t, base, slot, TOKENS, first, count, is_bf16);
    switch (end - slot) {
    case 3: by_rows(t, base, slot, 3, first, count, is_bf16); break;
    case 2: by_rows(t, base, slot, 2, first, count, is_bf16); break;
    case 1: by_rows(t, base, slot, 1, first, count, is_bf16); break;
    }
}

/* Do jobs until none is left. */
void experts(Problem *t) {
    int64_t chunks = (t->outputs + CHUNK - 1) / CHUNK;
    for (;;) {
        int64_t job = __atomic_fetch_add(&t->next, 1, __ATOMIC_RELAXED);
        if (job >= t->touched * chunks) break;
        int64_t first = job % chunks * CHUNK, count = t->outputs - first;
        if (count > CHUNK) count = CHUNK;
        if (t->is_bf16)
            multiply(t, job / chunks, first, count, 1);
        else
            multiply(t, job / chunks, first, count, 0);
    }
}
