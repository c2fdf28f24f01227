// A decoder's operations on single tokens, besides products with weights.

#include "numbers.h"

// Root mean square norm, rounded in the same places as Llama's: y = w x / sqrt(mean(x^2) + eps), and 1 / sqrt(...) of each row.
template <class T>
static void rms_norm(const T* x, const T* weight, T* y, float* inverses, int64_t rows, int64_t size, float eps) {
#pragma omp parallel for if (rows * size > GRAIN)
    for (int64_t row = 0; row < rows; ++row) {
        const T* from = x + row * size;
        T* to = y + row * size;
        float squares = 0;
#pragma omp simd reduction(+ : squares)
        for (int64_t i = 0; i < size; ++i) squares += get(from[i]) * get(from[i]);
        float inverse = 1.0f / std::sqrt(squares / size + eps);
        inverses[row] = inverse;
#pragma omp simd
        for (int64_t i = 0; i < size; ++i) put(to[i], get(weight[i]) * rounded<T>(get(from[i]) * inverse));
    }
}

// dx = r (w dy) - x r^3 mean(x w dy), with r = 1 / sqrt(...) of the row.
template <class T>
static void rms_norm_backward(
    const T* outer, const T* x, const T* weight, const float* inverses, T* inner, int64_t rows, int64_t size) {
#pragma omp parallel for if (rows * size > GRAIN)
    for (int64_t row = 0; row < rows; ++row) {
        const T *slope = outer + row * size, *from = x + row * size;
        T* to = inner + row * size;
        float along = 0, inverse = inverses[row];
#pragma omp simd reduction(+ : along)
        for (int64_t i = 0; i < size; ++i) along += get(slope[i]) * get(weight[i]) * get(from[i]);
        float factor = along / size * inverse * inverse * inverse;
#pragma omp simd
        for (int64_t i = 0; i < size; ++i) put(to[i], get(slope[i]) * get(weight[i]) * inverse - get(from[i]) * factor);
    }
}

// silu(gate) up. gate_stride and up_stride are in numbers.
template <class T>
static void gated_silu(
    const T* gate, const T* up, T* y, int64_t rows, int64_t size, int64_t gate_stride, int64_t up_stride) {
#pragma omp parallel for if (rows * size > GRAIN / 4)
    for (int64_t row = 0; row < rows; ++row) {
        const T *gates = gate + row * gate_stride, *ups = up + row * up_stride;
        T* to = y + row * size;
#pragma omp simd
        for (int64_t i = 0; i < size; ++i) {
            float value = get(gates[i]);
            put(to[i], rounded<T>(value * sigmoid(value)) * get(ups[i]));
        }
    }
}

// Gradients of gate and up from the gradient `outer` of silu(gate) up; of_gate may overwrite outer.
template <class T>
static void gated_silu_backward(const T* outer, const T* gate, const T* up, T* of_gate, T* of_up, int64_t count) {
#pragma omp parallel for simd if (count > GRAIN / 4)
    for (int64_t i = 0; i < count; ++i) {
        float slope = get(outer[i]), value = get(gate[i]), open = sigmoid(value);
        put(of_up[i], slope * value * open);
        put(of_gate[i], slope * get(up[i]) * open * (1.0f + value * (1.0f - open)));
    }
}

// Rotary position embedding of x [rows, heads, size], or its transpose where sign is -1; y is contiguous.
template <class T>
static void rotary(
    const T* x, const T* cosines, const T* sines, T* y, int64_t rows, int64_t heads, int64_t size, int64_t row_stride,
    int64_t head_stride, float sign) {
    int64_t half = size / 2;
#pragma omp parallel for if (rows * heads * size > GRAIN)
    for (int64_t row = 0; row < rows; ++row) {
        const T *cosine = cosines + row * size, *sine = sines + row * size;
        // The transpose multiplies each number by the sine at the place it came from.
        const T *first_sine = sign > 0 ? sine : sine + half, *second_sine = sign > 0 ? sine + half : sine;
        for (int64_t head = 0; head < heads; ++head) {
            const T* from = x + row * row_stride + head * head_stride;
            T* to = y + (row * heads + head) * size;
#pragma omp simd
            for (int64_t i = 0; i < half; ++i) {
                float first = get(from[i]), second = get(from[i + half]);
                put(to[i], first * get(cosine[i]) - sign * second * get(first_sine[i]));
                put(to[i + half], second * get(cosine[i + half]) + sign * first * get(second_sine[i]));
            }
        }
    }
}

// Four rows of x and four of A at a time, so that each loaded number is used four times.
template <class T>
static void low_rank_block(
    const T* const* rows, const float* const* factors, float (*products)[4], int64_t size) {
    Floats sums[4][4] = {};
    int64_t i = 0;
    for (; i + LANES <= size; i += LANES)
        for (int row = 0; row < 4; ++row) {
            Floats value = load(rows[row] + i);
            for (int r = 0; r < 4; ++r) sums[row][r] += value * load(factors[r] + i);
        }
    for (int row = 0; row < 4; ++row)
        for (int r = 0; r < 4; ++r) {
            products[row][r] = sum(sums[row][r]);
            for (int64_t j = i; j < size; ++j) products[row][r] += get(rows[row][j]) * factors[r][j];
        }
}

// [x, x A'] in one row: the input of a product with [W, s B]. A [rank, size] is float32.
template <class T>
static void with_low_rank(const T* x, const float* down, T* y, int64_t count, int64_t size, int64_t rank, int64_t stride) {
#pragma omp parallel for if (count * size * (rank + 4) > GRAIN)
    for (int64_t begin = 0; begin < count; begin += 4) {
        const T* rows[4];
        int64_t many = count - begin < 4 ? count - begin : 4;
        for (int64_t row = 0; row < 4; ++row) rows[row] = x + (begin + (row < many ? row : 0)) * stride;
        T* to = y + begin * (size + rank);
        for (int64_t row = 0; row < many; ++row) __builtin_memcpy(to + row * (size + rank), rows[row], size * sizeof(T));
        for (int64_t r = 0; r < rank; r += 4) {
            int64_t few = rank - r < 4 ? rank - r : 4;
            const float* factors[4];
            float products[4][4];
            for (int64_t k = 0; k < 4; ++k) factors[k] = down + (r + (k < few ? k : 0)) * size;
            low_rank_block(rows, factors, products, size);
            for (int64_t row = 0; row < many; ++row)
                for (int64_t k = 0; k < few; ++k) put(to[row * (size + rank) + size + r + k], products[row][k]);
        }
    }
}

EXPORT(rms_norm)
EXPORT(rms_norm_backward)
EXPORT(gated_silu)
EXPORT(gated_silu_backward)
EXPORT(rotary)
EXPORT(with_low_rank)
