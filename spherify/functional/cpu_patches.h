/* Windows of single channels on channels-last maps, sixteen channels at a time: products with a filter, norms, and what
   gradients by the input are made of. Rows come with zeros beside them. As cpu_kernels.c says. */

enum { BLOCK = 16, MOST_HELD_FILTERS = 9 };
typedef float Block __attribute__((vector_size(BLOCK * sizeof(float)), aligned(sizeof(float)), may_alias));

INLINE Block block_at(const float *from) { return *(const Block *)from; }

INLINE Block inverse_root_of_block(Block energy, float eps) {
#ifdef __AVX512F__
    return (Block)inverse_root((__m512)(energy + eps), 1.0f);
#else
    for (int i = 0; i < BLOCK; i++) energy[i] = 1.0f / sqrtf(energy[i] + eps);
    return energy;
#endif
}

/* Rows of a map that are needed at once, zeros beside them; the i-th lies at i modulo `many`. */
typedef struct {
    float *numbers;
    const float *zeros; /* what stands for a row outside of the map */
    long many, columns, left, wide;
} Band;

/* Numbers from one column to the next: whole blocks, of which an odd number does not meet itself in the cache. */
INLINE long wide_of(long channels) { return ((channels + BLOCK - 1) / BLOCK | 1) * BLOCK; }

INLINE long numbers_of(const Band *b) { return b->many * b->columns * b->wide; }

INLINE float *row_of(const Band *b, long row) { return b->numbers + row % b->many * b->columns * b->wide; }

/* Numbers that will be needed, asked for while there is something to compute: `each` of them a patch. */
typedef struct { const float *from; long each; } Ahead;

/* The share of a block of channels in `count` numbers. */
INLINE Ahead ahead_of(const float *from, long count, long patches, long c, long channels) {
    long each = (count * BLOCK / channels / patches + BLOCK - 1) / BLOCK * BLOCK;
    return (Ahead){from + c / BLOCK * patches * each, each};
}

INLINE void fetch(const Ahead *a, long q, const long count, const int is_written) {
    const float *from = a->from + q * a->each;
    for (long i = 0; i < count * a->each; i += BLOCK) {
        if (is_written) __builtin_prefetch(from + i, 1);
        else __builtin_prefetch(from + i, 0);
    }
}

/* A window of `many` rows of `size` columns, each `gap` from the last, and the next patch `step` on. */
typedef struct { long many, size, step, gap; } Shape;

/* What becomes of a patch: its product and norm; the cosine's response; its norm; with the cosine, the gradient by the
   product and what it has along the patch, times the norm squared; what a pixel gets from the patches that hold it. */
enum { PRODUCTS, COSINES, NORMS, BY_COSINES, GRADIENT };

typedef struct {
    const float *const *rows; /* of the window */
    const float *const *others; /* whose sum over the window is wanted in place of the squares' */
    const float *x, *gradient, *saved, *length; /* the input, the gradient by the response, the response, by filter */
    float *to, *norms;
    long first, wide, count; /* where the first patch begins, from one column to the next, patches */
    long apart, taken; /* from one place of a tensor to the next, and how many channels are there */
    float eps;
    Ahead ahead[2]; /* to be read, and to be written */
} Along;

/* For `count` patches from `place` on, the product with a filter, and the sum over the window of squares, or of others. */
INLINE void tile(const Along *a, const Block *weight, long place, const Shape s, const int kind, const int has_product,
                 const long count, Block *product, Block *total) {
    const long reach = (count - 1) * s.step + s.size;
    Block column[16];
#pragma GCC unroll 4
    for (long t = 0; t < count; t++) product[t] = total[t] = (Block){0};
    if (count == 1) {
        for (long u = 0; u < s.many; u++) {
            for (long v = 0; v < s.size; v++) {
                Block one = block_at(a->rows[u] + place + v * s.gap * a->wide);
                if (kind == GRADIENT) total[0] += block_at(a->others[u] + place + v * s.gap * a->wide);
                else total[0] += one * one;
                if (has_product) product[0] += one * weight[u * s.size + v];
            }
        }
        return;
    }
#pragma GCC unroll 16
    for (long j = 0; j < reach; j++) column[j] = (Block){0};
    for (long u = 0; u < s.many; u++) {
        const float *from = a->rows[u] + place, *other = kind == GRADIENT ? a->others[u] + place : NULL;
#pragma GCC unroll 16
        for (long j = 0; j < reach; j++) {
            Block one = block_at(from + j * a->wide);
            if (kind == GRADIENT) column[j] += block_at(other + j * a->wide);
            else column[j] += one * one;
#pragma GCC unroll 4
            for (long t = 0; t < count; t++)
                if (has_product && j >= t * s.step && j < t * s.step + s.size)
                    product[t] += one * weight[u * s.size + j - t * s.step];
        }
    }
#pragma GCC unroll 4
    for (long t = 0; t < count; t++) {
#pragma GCC unroll 8
        for (long v = 0; v < s.size; v++) total[t] += column[t * s.step + v];
    }
}

INLINE Block some_at(const float *from, long taken, const int is_few) {
    Block numbers = {0};
    if (!is_few) return block_at(from);
    memcpy(&numbers, from, taken * sizeof(float));
    return numbers;
}

INLINE void put_some(float *to, Block numbers, long taken, const int is_few) {
    if (is_few) memcpy(to, &numbers, taken * sizeof(float));
    else *(Block *)to = numbers;
}

INLINE void put_patch(const Along *a, long q, Block product, Block total, Block length, const int kind, const int is_few) {
    long place = q * a->apart, taken = a->taken;
    if (kind == GRADIENT) {
        put_some(a->to + place, product - some_at(a->x + place, taken, is_few) * total, taken, is_few);
        return;
    }
    Block norm = inverse_root_of_block(total, a->eps), *to = (Block *)(a->to + q * a->wide);
    if (kind == COSINES) put_some(a->to + place, product * norm * length, taken, is_few);
    else if (kind == BY_COSINES) {
        Block by = some_at(a->gradient + place, taken, is_few);
        *to = by * length * norm;
        *(Block *)(a->norms + q * a->wide) = by * some_at(a->saved + place, taken, is_few) * (norm * norm);
    } else *(Block *)(a->norms + q * a->wide) = norm;
    if (kind == PRODUCTS) *to = product;
}

/* `is_few`: the last channels fill no block. */
INLINE void along_row(const Along *along, const Block *weight, const Shape s, const int kind, const int is_fixed,
                      const int is_few) {
    const int has_product = kind == PRODUCTS || kind == COSINES || kind == GRADIENT;
    const int holds = is_fixed && has_product && s.size <= 3; /* the filter in registers */
    Block own[MOST_HELD_FILTERS], product[4], total[4], length = {0};
    const Along a = *along;
    long q = 0;
    if (kind == COSINES || kind == BY_COSINES) length = some_at(a.length, a.taken, is_few);
    if (holds) {
#pragma GCC unroll 9
        for (long i = 0; i < s.many * s.size; i++) own[i] = weight[i];
    }
#define TILE_OF(COUNT)                                                                                                   \
    do {                                                                                                                 \
        fetch(&a.ahead[0], q, COUNT, 0);                                                                                 \
        fetch(&a.ahead[1], q, COUNT, 1);                                                                                 \
        tile(&a, holds ? own : weight, a.first + q * s.step * a.wide, s, kind, has_product, COUNT, product, total);      \
        _Pragma("GCC unroll 4") for (long t = 0; t < COUNT; t++)                                                         \
            put_patch(&a, q + t, product[t], total[t], length, kind, is_few);                                            \
        q += COUNT;                                                                                                      \
    } while (0)
    while (q < a.count) {
        long left = is_fixed && !is_few ? a.count - q : 1;
        if (left >= 4 && left != 6) TILE_OF(4);
        else if (left >= 3) TILE_OF(3);
        else TILE_OF(1);
    }
#undef TILE_OF
}

/* Whether loops over the window's rows are loops, so that rows outside of the map can be left out. */
INLINE int has_any_rows(long size) { return size > 3; }

INLINE int is_shape(const Shape *s, long many, long size, long step) {
    return s->many == many && s->size == size && s->step == step && s->gap == 1;
}

#define ALONG(KIND, MANY, SIZE, STEP)                                                                                    \
    if (is_shape(s, MANY, SIZE, STEP)) along_row(a, weight, (Shape){MANY, SIZE, STEP, 1}, KIND, 1, 0)

/* A function of a row of patches, and of filters `weight`. */
#define OF_ROW(NAME, KIND)                                                                                               \
    static void NAME(const Along *a, const Block *weight, const Shape *s) {                                              \
        if ((KIND == COSINES || KIND == BY_COSINES) && a->taken < BLOCK) along_row(a, weight, *s, KIND, 0, 1);           \
        else ALONG(KIND, 3, 3, 1);                                                                                       \
        else ALONG(KIND, 3, 3, 2);                                                                                       \
        else ALONG(KIND, s->many, 5, 1);                                                                                 \
        else ALONG(KIND, s->many, 5, 2);                                                                                 \
        else ALONG(KIND, s->many, 7, 1);                                                                                 \
        else along_row(a, weight, *s, KIND, 0, 0);                                                                       \
    }
OF_ROW(products_of_row, PRODUCTS)
OF_ROW(cosines_of_row, COSINES)
OF_ROW(norms_of_row, NORMS)
OF_ROW(by_cosines_of_row, BY_COSINES)
#undef OF_ROW

/* A row of the input, of what the products get by `weight`. */
static void gradient_of_row(const Along *a, const Block *weight, const Shape *s) {
    if (a->taken < BLOCK) along_row(a, weight, *s, GRADIENT, 0, 1);
    else ALONG(GRADIENT, 3, 3, 1);
    else ALONG(GRADIENT, 2, 2, 1);
    else ALONG(GRADIENT, 2, 1, 1);
    else ALONG(GRADIENT, 1, 2, 1);
    else ALONG(GRADIENT, 1, 1, 1);
    else ALONG(GRADIENT, s->many, 5, 1);
    else ALONG(GRADIENT, s->many, 7, 1);
    else along_row(a, weight, *s, GRADIENT, 0, 0);
}
#undef ALONG
