// Products of small float32 matrices that fit in a core's own caches.

#pragma once

#include "numbers.h"

// Sums that are kept in registers: limited by the number of a processor's registers.
constexpr int ROWS = 6;
#ifdef __AVX512F__
constexpr int VECTORS = 4;
#else
constexpr int VECTORS = 1;
#endif

// A matrix with strides: from row to row, and from column to column.
struct Left {
    const float* numbers;
    int64_t row, column;
};

template <int M, int V>
static inline void tile(Left a, const float* b, int64_t b_row, float* c, int64_t c_row, int64_t depth, bool add) {
    Floats sums[M][V];
#pragma GCC unroll 6
    for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) sums[m][v] = add ? load(c + m * c_row + v * LANES) : Floats{};
    for (int64_t k = 0; k < depth; ++k) {
        Floats right[V];
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) right[v] = load(b + k * b_row + v * LANES);
#pragma GCC unroll 6
        for (int m = 0; m < M; ++m) {
            float left = a.numbers[m * a.row + k * a.column];
#pragma GCC unroll 4
            for (int v = 0; v < V; ++v) sums[m][v] += left * right[v];
        }
    }
#pragma GCC unroll 6
    for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) store(sums[m][v], c + m * c_row + v * LANES);
}

template <int M, int V>
static void strip(Left a, const float* b, int64_t b_row, float* c, int64_t c_row, int64_t columns, int64_t depth, bool add) {
    int64_t column = 0;
    for (; column + V * LANES <= columns; column += V * LANES) tile<M, V>(a, b + column, b_row, c + column, c_row, depth, add);
    if constexpr (V > 1) strip<M, V / 2>(a, b + column, b_row, c + column, c_row, columns - column, depth, add);
}

// c = a b, or c += a b, for a [rows, depth], b [depth, columns] and c [rows, columns]; columns in full lanes.
static void multiply(
    Left a, const float* b, int64_t b_row, float* c, int64_t c_row, int64_t rows, int64_t columns, int64_t depth, bool add) {
    for (; rows >= ROWS; rows -= ROWS, a.numbers += ROWS * a.row, c += ROWS * c_row)
        strip<ROWS, VECTORS>(a, b, b_row, c, c_row, columns, depth, add);
    if (rows == 5) strip<5, VECTORS>(a, b, b_row, c, c_row, columns, depth, add);
    if (rows == 4) strip<4, VECTORS>(a, b, b_row, c, c_row, columns, depth, add);
    if (rows == 3) strip<3, VECTORS>(a, b, b_row, c, c_row, columns, depth, add);
    if (rows == 2) strip<2, VECTORS>(a, b, b_row, c, c_row, columns, depth, add);
    if (rows == 1) strip<1, VECTORS>(a, b, b_row, c, c_row, columns, depth, add);
}
