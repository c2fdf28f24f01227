// LoRA in training, in float32: adds the contribution of its factors A [rank, n] and B [m, rank] to a product with frozen
// weights, and computes their gradients. Products of bfloat16 are left to libraries, which use the processor's instructions for
// them.
//
// Libraries are made for wider matrices: their products of 128 numbers into 8 reach a tenth of a processor's peak.

#include <algorithm>
#include <vector>

#include "products.h"

// Rows per block, so that the block and its results stay in a core's own caches.
constexpr int64_t BLOCK = 4 * ROWS;
// Rows are cut into at most this many parts, whatever the number of threads; each part sums up its own gradients of the factors.
constexpr int64_t PARTS = 16;

// Rows padded to full lanes: the original memory, or a copy.
class Wide {
  public:
    void read(const float* from, int64_t rows, int64_t size, int64_t row_stride) {
        numbers = from, stride = row_stride;
        if (size % LANES == 0) return;
        stride = padded(size);
        copy.assign(rows * stride, 0);
        for (int64_t row = 0; row < rows; ++row) std::copy_n(from + row * row_stride, size, copy.data() + row * stride);
        numbers = copy.data();
    }

    const float* numbers;
    int64_t stride;

  private:
    std::vector<float> copy;
};

// y [rows, size] += a b, with b's columns in full lanes.
static void add_product(
    Left a, const std::vector<float>& b, std::vector<float>& sums, float* y, int64_t rows, int64_t size, int64_t depth) {
    int64_t wide = padded(size);
    if (wide == size) return multiply(a, b.data(), wide, y, size, rows, size, depth, true);
    sums.resize(BLOCK * wide);
    multiply(a, b.data(), wide, sums.data(), wide, rows, wide, depth, false);
    for (int64_t row = 0; row < rows; ++row)
        for (int64_t i = 0; i < size; ++i) y[row * size + i] += sums[row * wide + i];
}

// low = x A' [rows, rank],   y [rows, m] += low (s B)'.
static void add_low_rank(
    const float* x, const float* down, const float* up, float* y, float* low, int64_t rows, int64_t n, int64_t m, int64_t rank,
    int64_t x_stride, float scaling) {
    int64_t lanes = padded(rank), wide = padded(m);
    std::vector<float> down_across(n * lanes), up_across(rank * wide);
#pragma omp parallel if (rows * (n + m) * rank > GRAIN)
    {
#pragma omp for nowait
        for (int64_t k = 0; k < n; ++k)
            for (int64_t r = 0; r < rank; ++r) down_across[k * lanes + r] = down[r * n + k];
#pragma omp for
        for (int64_t i = 0; i < m; ++i)
            for (int64_t r = 0; r < rank; ++r) up_across[r * wide + i] = scaling * up[i * rank + r];
        std::vector<float> lows(BLOCK * lanes), sums;
#pragma omp for
        for (int64_t begin = 0; begin < rows; begin += BLOCK) {
            int64_t count = std::min(BLOCK, rows - begin);
            Left from{x + begin * x_stride, x_stride, 1};
            multiply(from, down_across.data(), lanes, lows.data(), lanes, count, lanes, n, false);
            for (int64_t row = 0; row < count; ++row) std::copy_n(lows.data() + row * lanes, rank, low + (begin + row) * rank);
            add_product({lows.data(), lanes, 1}, up_across, sums, y + begin * m, count, m, rank);
        }
    }
}

// With dy [rows, m] and inner = dy (s B):   dx += inner A,   dA = inner' x,   dB = s dy' low.   A null dx is skipped.
static void low_rank_gradients(
    const float* outer, const float* x, const float* low, const float* down, const float* up, float* of_x, float* of_down,
    float* of_up, int64_t rows, int64_t n, int64_t m, int64_t rank, int64_t outer_stride, int64_t x_stride, float scaling) {
    int64_t lanes = padded(rank), inputs = padded(n), outputs = padded(m);
    int64_t share = (rows + PARTS * BLOCK - 1) / (PARTS * BLOCK) * BLOCK, parts = rows == 0 ? 0 : (rows + share - 1) / share;
    std::vector<float> up_wide(m * lanes), down_wide(rank * inputs);
    std::vector<std::vector<float>> downs(parts), ups(parts);  // of each part, [rank, inputs] and [rank, outputs]
#pragma omp parallel if (rows * (n + m) * rank > GRAIN)
    {
#pragma omp for nowait
        for (int64_t i = 0; i < m; ++i)
            for (int64_t r = 0; r < rank; ++r) up_wide[i * lanes + r] = scaling * up[i * rank + r];
#pragma omp for
        for (int64_t r = 0; r < rank; ++r) std::copy_n(down + r * n, n, down_wide.data() + r * inputs);
        Wide input, slopes;
        std::vector<float> inner(BLOCK * lanes), sums;
#pragma omp for schedule(dynamic)
        for (int64_t part = 0; part < parts; ++part) {
            std::vector<float> of_a(rank * inputs), of_b(rank * outputs);
            for (int64_t begin = part * share; begin < std::min(rows, (part + 1) * share); begin += BLOCK) {
                int64_t count = std::min(BLOCK, rows - begin);
                slopes.read(outer + begin * outer_stride, count, m, outer_stride);
                input.read(x + begin * x_stride, count, n, x_stride);
                Left of_y{slopes.numbers, slopes.stride, 1}, across{inner.data(), 1, lanes}, lows{low + begin * rank, 1, rank};
                multiply(of_y, up_wide.data(), lanes, inner.data(), lanes, count, lanes, m, false);
                multiply(across, input.numbers, input.stride, of_a.data(), inputs, rank, inputs, count, true);
                multiply(lows, slopes.numbers, slopes.stride, of_b.data(), outputs, rank, outputs, count, true);
                if (of_x != nullptr) add_product({inner.data(), lanes, 1}, down_wide, sums, of_x + begin * n, count, n, rank);
            }
            downs[part] = std::move(of_a), ups[part] = std::move(of_b);
        }
#pragma omp for nowait
        for (int64_t r = 0; r < rank; ++r)
            for (int64_t k = 0; k < n; ++k) {
                float sum = 0;
                for (const std::vector<float>& part : downs) sum += part[r * inputs + k];
                of_down[r * n + k] = sum;
            }
#pragma omp for
        for (int64_t i = 0; i < m; ++i)
            for (int64_t r = 0; r < rank; ++r) {
                float sum = 0;
                for (const std::vector<float>& part : ups) sum += part[r * outputs + i];
                of_up[i * rank + r] = scaling * sum;
            }
    }
}

extern "C" { auto add_low_rank_f32 = add_low_rank; auto low_rank_gradients_f32 = low_rank_gradients; }
