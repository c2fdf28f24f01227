// Between the matrix products of attention in training: from scores to weights and from slopes of weights to slopes of scores. Those
// of the prompt's keys and of a completion's own lie in two matrices, [P, K, G, R, T, S] and [P, K, G, R, T, M], of one softmax.

#include <vector>

#include "numbers.h"

// Which keys a query sees: a byte for each, by prompt, completion and query; or all of them.
struct Mask {
    const uint8_t* seen;
    int64_t of_prompt, of_sample, of_query;  // strides

    const uint8_t* row(int64_t prompt, int64_t sample, int64_t query) const {
        return seen ? seen + prompt * of_prompt + sample * of_sample + query * of_query : nullptr;
    }
};

// Scores times their factor, minus infinity where a query does not look.
static void scaled(const float* scores, int64_t size, const uint8_t* seen, float scale, float* to) {
    if (seen)
#pragma omp simd
        for (int64_t i = 0; i < size; ++i) to[i] = seen[i] ? scores[i] * scale : -INFINITY;
    else
#pragma omp simd
        for (int64_t i = 0; i < size; ++i) to[i] = scores[i] * scale;
}

template <class T>
static void normalised(const float* exponentials, int64_t size, float inverse, float* weights, T* stored) {
#pragma omp simd
    for (int64_t i = 0; i < size; ++i) {
        float value = exponentials[i] * inverse;
        weights[i] = value;
        put(stored[i], value);
    }
}

// Scores become weights, which are stored in T as well; in float32 that is the same place.
template <class T>
static void attention_weights(
    float* prompt, float* own, T* stored_prompt, T* stored_own, Mask prompt_mask, Mask own_mask, const int64_t* shape, int64_t width,
    int64_t length, float scale) {
    int64_t K = shape[1], G = shape[2], R = shape[3], queries = shape[4], rows = shape[0] * K * G * R * queries;
#pragma omp parallel if (rows * (width + length) > GRAIN / 4)
    {
        std::vector<float> buffer(padded(width + length), -INFINITY);  // of a whole row, so that few numbers are beside full lanes
        float* row_of_both = buffer.data();
#pragma omp for
        for (int64_t row = 0; row < rows; ++row) {
            int64_t query = row % queries, sample = row / (queries * R) % G, p = row / (queries * R * G * K);
            float *to_prompt = prompt + row * width, *to_own = own + row * length;
            if (width) scaled(to_prompt, width, prompt_mask.row(p, sample, query), scale, row_of_both);
            scaled(to_own, length, own_mask.row(p, sample, query), scale, row_of_both + width);
            float inverse = 1 / exponentials(row_of_both, width + length);
            if (width) normalised(row_of_both, width, inverse, to_prompt, stored_prompt + row * width);
            normalised(row_of_both + width, length, inverse, to_own, stored_own + row * length);
            for (int64_t i = width + length; i < int64_t(buffer.size()); ++i) row_of_both[i] = -INFINITY;
        }
    }
}

template <class T>
static float product(const float* weights, const T* slopes, int64_t size) {
    float total = 0;
#pragma omp simd reduction(+ : total)
    for (int64_t i = 0; i < size; ++i) total += weights[i] * get(slopes[i]);
    return total;
}

template <class T>
static void slopes_of_scores(float* weights, const T* slopes, int64_t size, float mean, float scale) {
#pragma omp simd
    for (int64_t i = 0; i < size; ++i) weights[i] *= (get(slopes[i]) - mean) * scale;
}

// Weights w become slopes of the scores before they were scaled: s w (d - sum(w d)), d being the slopes of the weights.
template <class T>
static void attention_slopes(
    float* prompt, float* own, const T* prompt_slopes, const T* own_slopes, int64_t rows, int64_t width, int64_t length, float scale) {
#pragma omp parallel for if (rows * (width + length) > GRAIN)
    for (int64_t row = 0; row < rows; ++row) {
        float *to_prompt = prompt + row * width, *to_own = own + row * length;
        const T *of_prompt = prompt_slopes + row * width, *of_own = own_slopes + row * length;
        float mean = product(to_own, of_own, length);
        if (width) mean += product(to_prompt, of_prompt, width);
        slopes_of_scores(to_own, of_own, length, mean, scale);
        if (width) slopes_of_scores(to_prompt, of_prompt, width, mean, scale);
    }
}

#define WEIGHTS(T)                                                                                                        \
    (float* prompt, float* own, T* stored_prompt, T* stored_own, const uint8_t* prompt_seen, const uint8_t* own_seen,     \
     const int64_t* strides, const int64_t* shape, int64_t width, int64_t length, float scale)
EXPORT(
    attention_weights, WEIGHTS,
    (prompt, own, stored_prompt, stored_own, Mask{prompt_seen, strides[0], strides[1], strides[2]},
     Mask{own_seen, strides[3], strides[4], strides[5]}, shape, width, length, scale))

#define SLOPES(T)                                                                                                      \
    (float* prompt, float* own, const T* prompt_slopes, const T* own_slopes, int64_t rows, int64_t width, int64_t length, \
     float scale)
EXPORT(attention_slopes, SLOPES, (prompt, own, prompt_slopes, own_slopes, rows, width, length, scale))
