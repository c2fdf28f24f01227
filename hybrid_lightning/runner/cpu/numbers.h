// How the kernels load, compute and store numbers: storage in T (float or bfloat16), arithmetic in float32.

#pragma once

#include <cmath>
#include <cstdint>

// Lanes that a processor with AVX-512 computes at once; others take two or four steps for them.
constexpr int LANES = 16;
typedef float Floats __attribute__((vector_size(4 * LANES)));
typedef uint32_t Words __attribute__((vector_size(4 * LANES)));
typedef uint16_t Halves __attribute__((vector_size(2 * LANES)));

// With fewer numbers than this, waking other threads costs more than they save.
constexpr int64_t GRAIN = 32768;

struct bf16 {
    uint16_t bits;
};

static inline float get(float value) { return value; }

static inline float get(bf16 value) { return __builtin_bit_cast(float, uint32_t(value.bits) << 16); }

static inline void put(float& to, float value) { to = value; }

// Round to nearest, ties to even; nan stays nan.
static inline void put(bf16& to, float value) {
    uint32_t bits = __builtin_bit_cast(uint32_t, value);
    uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    to.bits = value != value ? 0x7fc0 : uint16_t(rounded);
}

template <class T>
static inline float rounded(float value) {
    T stored;
    put(stored, value);
    return get(stored);
}

static inline Floats load(const float* from) {
    Floats value;
    __builtin_memcpy(&value, from, sizeof value);
    return value;
}

static inline void store(Floats value, float* to) { __builtin_memcpy(to, &value, sizeof value); }

static inline Floats load(const bf16* from) {
    Halves bits;
    __builtin_memcpy(&bits, from, sizeof bits);
    Words wide = __builtin_convertvector(bits, Words) << 16;
    return __builtin_bit_cast(Floats, wide);
}

// Reduce all lanes with an operation, by halves, so that operations do not wait for each other.
template <class Operation>
static inline float reduced(Floats value, Operation operation) {
    typedef float Eight __attribute__((vector_size(32)));
    typedef float Four __attribute__((vector_size(16)));
    Eight eights[2];
    __builtin_memcpy(eights, &value, sizeof value);
    Eight eight = operation(eights[0], eights[1]);
    Four fours[2];
    __builtin_memcpy(fours, &eight, sizeof eight);
    Four four = operation(fours[0], fours[1]);
    return operation(operation(four[0], four[2]), operation(four[1], four[3]));
}

static inline float sum(Floats value) {
    return reduced(value, [](auto one, auto other) { return one + other; });
}

static inline float largest(Floats value) {
    return reduced(value, [](auto one, auto other) { return one > other ? one : other; });
}

// e^x with a relative error of at most 2e-7; 0 below -87, where float32 has no normal numbers left, and e^88 above 88.
// Uses Cody and Waite's reduction and the polynomial of Cephes' expf. Unlike libm's, compilers turn it into vector code.
static inline float exponential(float x) {
    float bounded = x < -87.0f ? -87.0f : x > 88.0f ? 88.0f : x;
    float power = __builtin_rintf(bounded * 1.44269504088896341f);
    float rest = bounded - power * 0.693359375f + power * 2.12194440e-4f;
    float value = 1.9875691500e-4f;
    value = value * rest + 1.3981999507e-3f;
    value = value * rest + 8.3334519073e-3f;
    value = value * rest + 4.1665795894e-2f;
    value = value * rest + 1.6666665459e-1f;
    value = value * rest + 5.0000001201e-1f;
    value = value * rest * rest + rest + 1.0f;
    float scale = __builtin_bit_cast(float, uint32_t(int32_t(power) + 127) << 23);
    return x < -87.0f ? 0.0f : value * scale;
}

static inline float sigmoid(float x) { return 1.0f / (1.0f + exponential(-x)); }

// `size` rounded up to full lanes.
static inline int64_t padded(int64_t size) { return (size + LANES - 1) / LANES * LANES; }

// Overwrite a row with e^(x - its largest), and return the sum. Full lanes are computed: minus infinity pads the row.
static inline float exponentials(float* row, int64_t size) {
    Floats mosts = load(row);
    for (int64_t begin = LANES; begin < size; begin += LANES) {
        Floats value = load(row + begin);
        mosts = value > mosts ? value : mosts;
    }
    float most = largest(mosts);
    Floats sums = {};
    for (int64_t begin = 0; begin < size; begin += LANES) {
#pragma omp simd
        for (int64_t i = begin; i < begin + LANES; ++i) row[i] = exponential(row[i] - most);
        sums += load(row + begin);
    }
    return sum(sums);
}

// Export a function for each storage type: name_f32 and name_bf16.
#define EXPORT(name) extern "C" { auto name##_f32 = name<float>; auto name##_bf16 = name<bf16>; }
