// Attention of new tokens to the keys and values of their prompt, shared by all its completions, and of their own completion.

#include <algorithm>
#include <vector>

#include "numbers.h"

template <class T>
struct Cache {
    const T *prompt_keys, *prompt_values;  // [P, K, S, D]
    T *keys, *values;                      // [P, K, G, capacity, D]
    int64_t samples, heads, width, capacity;
};

// Attention of `queries` (R of them, D numbers each) to the key-value pairs that one completion sees.
template <class T, int D, int R>
static void attend(
    const float* queries, const T* prompt_keys, const T* prompt_values, int64_t prompt, const T* keys, const T* values,
    int64_t own, float* scores, T* result) {
    constexpr int PARTS = D / LANES;
    int64_t width = prompt + own, stride = padded(width);
    for (int64_t place = 0; place < width; ++place) {
        const T* key = place < prompt ? prompt_keys + place * D : keys + (place - prompt) * D;
        Floats sums[R] = {};
        for (int part = 0; part < PARTS; ++part) {
            Floats value = load(key + part * LANES);
            for (int r = 0; r < R; ++r) sums[r] += value * load(queries + r * D + part * LANES);
        }
        for (int r = 0; r < R; ++r) scores[r * stride + place] = sum(sums[r]);
    }
    float inverses[R];
    for (int r = 0; r < R; ++r) {
        float* row = scores + r * stride;
        for (int64_t i = width; i < stride; ++i) row[i] = -INFINITY;
        inverses[r] = 1 / exponentials(row, width);
    }
    Floats sums[R][PARTS] = {};
    for (int64_t place = 0; place < width; ++place) {
        const T* value = place < prompt ? prompt_values + place * D : values + (place - prompt) * D;
        for (int part = 0; part < PARTS; ++part) {
            Floats numbers = load(value + part * LANES);
            for (int r = 0; r < R; ++r) sums[r][part] += scores[r * stride + place] * numbers;
        }
    }
    for (int r = 0; r < R; ++r)
        for (int i = 0; i < D; ++i) put(result[r * D + i], sums[r][i / LANES][i % LANES] * inverses[r]);
}

template <class T, int D>
static void decode(
    const Cache<T>& cache, const T* query, const T* key, const T* value, const int64_t* slots, const int64_t* counts,
    const int64_t* lengths, T* result, int64_t rows, int64_t repeats, int64_t window, float scale, const int64_t* strides) {
    int64_t G = cache.samples, K = cache.heads, S = cache.width, most = *std::max_element(counts, counts + rows);
#pragma omp parallel if (rows * K * repeats * (S + most) * D > GRAIN)
    {
        std::vector<float> scores(4 * padded(S + most)), queries(4 * D);
        // Store all new keys and values first, since a completion may have several new tokens.
#pragma omp for schedule(static)
        for (int64_t unit = 0; unit < rows * K; ++unit) {
            int64_t row = unit / K, head = unit % K, slot = slots[row], own = (slot / G * K + head) * G + slot % G;
            int64_t place = (own * cache.capacity + counts[row] - 1) * D;
            std::copy_n(key + row * strides[1] + head * D, D, cache.keys + place);
            std::copy_n(value + row * strides[2] + head * D, D, cache.values + place);
        }
#pragma omp for schedule(static)
        for (int64_t unit = 0; unit < rows * K; ++unit) {
            int64_t row = unit / K, head = unit % K, slot = slots[row], prompt = slot / G, own = (prompt * K + head) * G + slot % G;
            T *keys = cache.keys + own * cache.capacity * D, *values = cache.values + own * cache.capacity * D;
            int64_t decoded = counts[row];
            // The first position that the new token sees, counted over prompt and completion.
            int64_t length = lengths[prompt], first = window > 0 ? std::max<int64_t>(0, length + decoded - window) : 0;
            int64_t skipped = std::min(first, length), gone = first - skipped, shared = (prompt * K + head) * S + skipped;
            const T *prompt_keys = cache.prompt_keys + shared * D, *prompt_values = cache.prompt_values + shared * D;
            for (int64_t begin = 0; begin < repeats; begin += 4) {
                int64_t head_of_query = head * repeats + begin, count = std::min<int64_t>(4, repeats - begin);
                const T* from = query + row * strides[0] + head_of_query * D;
                for (int64_t i = 0; i < count * D; ++i) queries[i] = get(from[i]) * scale;
                auto compute = count == 4 ? attend<T, D, 4> : count == 3 ? attend<T, D, 3> : count == 2 ? attend<T, D, 2> : attend<T, D, 1>;
                compute(
                    queries.data(), prompt_keys, prompt_values, length - skipped, keys + gone * D, values + gone * D, decoded - gone,
                    scores.data(), result + (row * K * repeats + head_of_query) * D);
            }
        }
    }
}

template <class T>
static void decode_attention(
    const T* query, const T* key, const T* value, const T* prompt_keys, const T* prompt_values, T* keys, T* values,
    const int64_t* slots, const int64_t* counts, const int64_t* lengths, T* result, int64_t rows, int64_t samples, int64_t heads,
    int64_t repeats, int64_t width, int64_t capacity, int64_t size, int64_t window, float scale, int64_t query_stride,
    int64_t key_stride, int64_t value_stride) {
    Cache<T> cache{prompt_keys, prompt_values, keys, values, samples, heads, width, capacity};
    int64_t strides[3] = {query_stride, key_stride, value_stride};
    auto compute = size == 32 ? decode<T, 32> : size == 64 ? decode<T, 64> : size == 96 ? decode<T, 96> : size == 128 ? decode<T, 128> : decode<T, 256>;
    compute(cache, query, key, value, slots, counts, lengths, result, rows, repeats, window, scale, strides);
}

EXPORT(decode_attention)
