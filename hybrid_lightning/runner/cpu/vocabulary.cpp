// From hidden states to logits over a vocabulary, and from logits to tokens and log-probabilities. One thread computes each sum,
// so results do not depend on the number of threads.

#include <algorithm>
#include <vector>

#include "numbers.h"

// Blocks of this many numbers are summed in float32, and the blocks' sums in float64: V small float32 numbers would not add up to
// 1 accurately enough.
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

// Draw a token for each row by inverting the distribution function at a uniform number; also its log-probability.
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
            // The first token with a cumulative probability above the number. If rounding of the block's sum leaves none, the last
            // token with any probability: never one with probability zero.
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

// Log-probability of a token and entropy in each row. On request, logits are overwritten by onehot(token) - p.
template <class T>
static void token_logprobs(
    T* logits, const int64_t* tokens, float* logprobs, float* entropies, int64_t rows, int64_t size,
    float inverse_temperature, int64_t slopes) {
#pragma omp parallel for schedule(dynamic) if (rows * size > GRAIN)
    for (int64_t row = 0; row < rows; ++row) {
        T* from = logits + row * size;
        float most = largest(from, size, inverse_temperature);
        double total = 0, moment = 0;  // sums of e^s and of s e^s, with s = logit - largest logit
        for (int64_t begin = 0; begin < size; begin += BLOCK) {
            int64_t end = begin + BLOCK < size ? begin + BLOCK : size;
            float part = 0, moments = 0;
#pragma omp simd reduction(+ : part, moments)
            for (int64_t i = begin; i < end; ++i) {
                float shifted = get(from[i]) * inverse_temperature - most, weight = exponential(shifted);
                part += weight;
                moments += weight > 0 ? weight * shifted : 0.0f;  // avoids nan if a logit is minus infinity
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

constexpr int64_t PANEL = 256;  // rows at a time
constexpr int64_t CHUNK = 128;  // tokens of the vocabulary per task of a thread

// torch's product of small matrices by oneDNN, c [m, n] = a [m, k] b for b [k / 2, n, 2], and a function that releases its units.
typedef void Brgemm(int64_t m, int64_t n, int64_t k, int64_t, int64_t, int64_t, bool add, const bf16*, const bf16*, float*, bool);
typedef void Release(bool);

// Logits [rows, size] of hidden states [rows, depth] under an output layer [size, depth], never rounded to bfloat16; depth is even.
// They are nan if oneDNN refuses.
static void float_logits(
    const bf16* hidden, const bf16* weight, float* logits, Brgemm* brgemm, Release* release, int64_t rows, int64_t depth,
    int64_t size) {
    for (; rows > 0; rows -= PANEL, hidden += PANEL * depth, logits += PANEL * size) {
        int64_t count = rows < PANEL ? rows : PANEL, lanes = padded(count);
        std::vector<bf16> columns(depth * lanes);
        for (int64_t row = 0; row < count; ++row)
            for (int64_t k = 0; k < depth; ++k) columns[(k / 2 * lanes + row) * 2 + k % 2] = hidden[row * depth + k];
#pragma omp parallel if (count * size > GRAIN)
        {
            std::vector<float> part(CHUNK * lanes);
#pragma omp for schedule(dynamic)
            for (int64_t begin = 0; begin < size; begin += CHUNK) {
                int64_t some = begin + CHUNK < size ? CHUNK : size - begin;
                const bf16* from = weight + begin * depth;
                try {
                    brgemm(some, lanes, depth, depth, lanes, lanes, false, from, columns.data(), part.data(), true);
                } catch (...) {
                    std::fill(part.begin(), part.end(), NAN);
                }
                for (int64_t row = 0; row < count; ++row)
                    for (int64_t i = 0; i < some; ++i) logits[row * size + begin + i] = part[i * lanes + row];
            }
            release(true);
        }
    }
}

extern "C" { auto float_logits_bf16 = float_logits; }
EXPORT(draw_tokens)
EXPORT(token_logprobs)
