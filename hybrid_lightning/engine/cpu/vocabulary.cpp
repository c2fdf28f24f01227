// From logits over a vocabulary to tokens and to log-probabilities, a row by one thread, so that results do not depend on threads.

#include <vector>

#include "numbers.h"

// Sums of so many numbers are float32, sums of these float64: V small float32 numbers would not add up to 1 well enough.
constexpr int64_t BLOCK = 256;

template <class T>
static float largest(const T* logits, int64_t size, float inverse_temperature) {
    float most = -INFINITY;
#pragma omp simd reduction(max : most)
    for (int64_t i = 0; i < size; ++i) {
        float value = get(logits[i]);
        most = value > most ? value : most;
    }
    return most * inverse_temperature;
}

// A token for each row by inverting the distribution function at a uniform number, and its log-probability.
template <class T>
static void draw_tokens(
    const T* logits, const double* uniform, int64_t* tokens, float* logprobs, int64_t rows, int64_t size,
    float inverse_temperature) {
    int64_t blocks = (size + BLOCK - 1) / BLOCK;
#pragma omp parallel if (rows * size > GRAIN)
    {
        std::vector<double> ends(blocks);
#pragma omp for schedule(dynamic)
        for (int64_t row = 0; row < rows; ++row) {
            const T* from = logits + row * size;
            float most = largest(from, size, inverse_temperature);
            double total = 0;
            for (int64_t block = 0; block < blocks; ++block) {
                int64_t begin = block * BLOCK, end = begin + BLOCK < size ? begin + BLOCK : size;
                float part = 0;
#pragma omp simd reduction(+ : part)
                for (int64_t i = begin; i < end; ++i) part += exponential(get(from[i]) * inverse_temperature - most);
                ends[block] = total += part;
            }
            double target = uniform[row] * total;
            int64_t block = 0;
            while (block + 1 < blocks && ends[block] <= target) ++block;
            int64_t begin = block * BLOCK, end = begin + BLOCK < size ? begin + BLOCK : size;
            // The first token whose cumulative probability exceeds the number, and where rounding of the block's sum leaves none
            // the last with any probability: never one of probability zero.
            double passed = block ? ends[block - 1] : 0;
            int64_t token = begin;
            for (int64_t i = begin; i < end; ++i) {
                float weight = exponential(get(from[i]) * inverse_temperature - most);
                if (weight > 0) token = i;
                if ((passed += weight) > target) break;
            }
            tokens[row] = token;
            logprobs[row] = get(from[token]) * inverse_temperature - most - float(std::log(total));
        }
    }
}

// Log-probability of a token and entropy in each row. Where wanted, logits become onehot(token) - p.
template <class T>
static void token_logprobs(
    T* logits, const int64_t* tokens, float* logprobs, float* entropies, int64_t rows, int64_t size,
    float inverse_temperature, int64_t slopes) {
#pragma omp parallel for schedule(dynamic) if (rows * size > GRAIN)
    for (int64_t row = 0; row < rows; ++row) {
        T* from = logits + row * size;
        float most = largest(from, size, inverse_temperature);
        double total = 0, moment = 0;  // sum of e^s and of s e^s, s being logits less the largest
        for (int64_t begin = 0; begin < size; begin += BLOCK) {
            int64_t end = begin + BLOCK < size ? begin + BLOCK : size;
            float part = 0, moments = 0;
#pragma omp simd reduction(+ : part, moments)
            for (int64_t i = begin; i < end; ++i) {
                float shifted = get(from[i]) * inverse_temperature - most, weight = exponential(shifted);
                part += weight;
                moments += weight > 0 ? weight * shifted : 0.0f;  // no nan where a logit is minus infinity
            }
            total += part;
            moment += moments;
        }
        logprobs[row] = get(from[tokens[row]]) * inverse_temperature - most - float(std::log(total));
        entropies[row] = float(std::log(total) - moment / total);
        if (!slopes) continue;
        float inverse = float(1 / total), own = std::exp(logprobs[row]);
#pragma omp simd
        for (int64_t i = 0; i < size; ++i) put(from[i], -inverse * exponential(get(from[i]) * inverse_temperature - most));
        put(from[tokens[row]], 1 - own);
    }
}

EXPORT(draw_tokens)
EXPORT(token_logprobs)
