// Attention over packed prompts and completions, forward and backward.
//
// A group is a prompt and its completions. Its tokens have places: the prompt's tokens from 0, then the tokens of one completion
// after the other. Work is cut into tasks by sizes, never by the number of threads, so that sums do not depend on it.

#include <algorithm>
#include <vector>

#include "products.h"

struct Groups {
    const int64_t *segments, *first;  // [count, 2]: begin and end in the row; number of each group's first, and their count
    int64_t count;
};

struct Sizes {
    int64_t heads, repeats, size, window;
    float scale;
    int64_t query_stride, key_stride, value_stride;  // from token to token
};

template <class T>
struct Inputs {
    const T *query, *key, *value;
    Groups groups;
    Sizes sizes;
};

// Query tokens [from, to) of a group and one head of its keys.
struct Task {
    int64_t group, head, from, to;
};

constexpr int64_t QUERIES = 12;           // approximate rows of queries that are multiplied together: two tiles
constexpr int64_t TASK = 256, MOST = 16;  // tokens of a task, and most tasks of a group (longer groups get larger tasks)
constexpr int64_t ROOM = 1 << 22;         // approximate limit of numbers that wait to be summed up over tasks

static std::vector<Task> tasks_of(const Groups& groups, int64_t group, int64_t head) {
    int64_t tokens = 0;
    for (int64_t s = groups.first[group]; s < groups.first[group + 1]; ++s) tokens += groups.segments[2 * s + 1] - groups.segments[2 * s];
    int64_t count = std::clamp<int64_t>(tokens / TASK, 1, MOST), each = (tokens + count - 1) / count;
    std::vector<Task> tasks;
    for (int64_t from = 0; from < tokens; from += each) tasks.push_back({group, head, from, std::min(tokens, from + each)});
    return tasks;
}

// Queries of neighbouring tokens of one segment, and the keys that they see in the prompt and in their own segment.
struct Block {
    int64_t token, tokens;  // index of the first token in the packed row, and their number
    struct Range {
        int64_t begin, size;  // among the task's keys
    } prompt, own;
    int64_t last;                   // own keys that the first token sees; each further token sees one more
    int64_t hidden;                 // positions that lie before the first token's window
};

// Inputs of a task: keys and values of its group's prompt and of the segments with its queries.
template <class T>
class Scope {
  public:
    Scope(const Inputs<T>& in, const Task& task, bool backward) : in(in), task(task), lanes(padded(in.sizes.size)) {
        find_keys();
        columns = padded(int64_t(tokens.size())) + LANES;
        keys_across = gathered_across(in.key, in.sizes.key_stride);
        values = gathered(in.value, in.sizes.value_stride);
        if (backward) keys = gathered(in.key, in.sizes.key_stride), values_across = gathered_across(in.value, in.sizes.value_stride);
    }

    // Call a function with each block of queries.
    template <class Function>
    void each_block(Function function) const {
        int64_t place = 0, most = std::max<int64_t>(1, QUERIES / in.sizes.repeats), local = 0;
        for (int64_t s = first(); s < last(); ++s) {
            int64_t length = size(s), begin = std::max(task.from - place, int64_t(0)), end = std::min(task.to - place, length);
            for (int64_t at = begin; at < end; at += most) {
                int64_t count = std::min(most, end - at), shared = s == first() ? 0 : prompt;
                Block block{in.groups.segments[2 * s] + at, count, {0, shared}, {local, at + count}, at + 1, 0};
                if (in.sizes.window > 0) hide(block, shared + at + 1 - in.sizes.window);
                function(block);
            }
            place += length;
            if (s == first() || begin < end) local += length;
        }
    }

    const Inputs<T>& in;
    const Task& task;
    int64_t lanes, columns, prompt;            // numbers of a head in full lanes; keys in full lanes; keys of the prompt
    std::vector<int64_t> tokens;               // number in the row of each key
    std::vector<float> keys, values;           // [keys, lanes]
    std::vector<float> keys_across, values_across;  // [lanes, columns]

  private:
    int64_t first() const { return in.groups.first[task.group]; }
    int64_t last() const { return in.groups.first[task.group + 1]; }
    int64_t size(int64_t segment) const { return in.groups.segments[2 * segment + 1] - in.groups.segments[2 * segment]; }

    void find_keys() {
        int64_t place = 0;
        prompt = size(first());
        for (int64_t s = first(); s < last(); place += size(s), ++s)
            if (s == first() || (place < task.to && place + size(s) > task.from))
                for (int64_t i = 0; i < size(s); ++i) tokens.push_back(in.groups.segments[2 * s] + i);
    }

    // No query of a block sees positions before `begin`; each later query sees one position less.
    static void hide(Block& block, int64_t begin) {
        block.hidden = begin;
        int64_t skipped = std::clamp<int64_t>(begin, 0, block.prompt.size), gone = std::max<int64_t>(0, begin - skipped);
        block.prompt = {skipped, block.prompt.size - skipped};
        block.own = {block.own.begin + gone, block.own.size - gone};
        block.last -= gone, block.hidden -= skipped + gone;
    }

    const T* row(const T* part, int64_t stride, size_t key) const { return part + tokens[key] * stride + task.head * in.sizes.size; }

    std::vector<float> gathered(const T* part, int64_t stride) const {
        std::vector<float> result(tokens.size() * lanes);
        for (size_t key = 0; key < tokens.size(); ++key)
            for (int64_t i = 0; i < in.sizes.size; ++i) result[key * lanes + i] = get(row(part, stride, key)[i]);
        return result;
    }

    std::vector<float> gathered_across(const T* part, int64_t stride) const {
        std::vector<float> result(lanes * columns);
        for (size_t key = 0; key < tokens.size(); ++key)
            for (int64_t i = 0; i < in.sizes.size; ++i) result[i * columns + key] = get(row(part, stride, key)[i]);
        return result;
    }
};

// Rows of one block: its queries, their results, and their weights, with the prompt's keys first.
template <class T>
class Rows {
  public:
    Rows(const Scope<T>& scope) : scope(scope), sizes(scope.in.sizes) {}

    void read(const Block& block) {
        this->block = block;
        count = block.tokens * sizes.repeats, width = padded(block.prompt.size), stride = width + padded(block.own.size);
        gather(scope.in.query, sizes.query_stride, sizes.scale, queries);
    }

    // Numbers of the block's rows, from one token to the next `of_token` apart.
    void gather(const T* from, int64_t of_token, float factor, std::vector<float>& to) const {
        to.assign(count * scope.lanes, 0);
        for (int64_t row = 0; row < count; ++row)
            for (int64_t i = 0; i < sizes.size; ++i) to[row * scope.lanes + i] = get(from[place(row, of_token) + i]) * factor;
    }

    int64_t place(int64_t row, int64_t of_token) const {
        int64_t token = block.token + row / sizes.repeats, head = scope.task.head * sizes.repeats + row % sizes.repeats;
        return token * of_token + head * sizes.size;
    }

    // Products of rows with transposed keys or values.
    void across(const std::vector<float>& rows, const std::vector<float>& others, std::vector<float>& to) const {
        to.resize(count * stride);
        Left left{rows.data(), scope.lanes, 1};
        const float* from = others.data();
        multiply(left, from + block.prompt.begin, scope.columns, to.data(), stride, count, width, scope.lanes, false);
        multiply(left, from + block.own.begin, scope.columns, to.data() + width, stride, count, stride - width, scope.lanes, false);
    }

    // Weighted sums of keys or values.
    void along(const std::vector<float>& weights, const std::vector<float>& others, std::vector<float>& to) const {
        to.resize(count * scope.lanes);
        const float *from = others.data(), *of_own = weights.data() + width;
        int64_t n = scope.lanes;
        multiply({weights.data(), stride, 1}, from + block.prompt.begin * n, n, to.data(), n, count, n, block.prompt.size, false);
        multiply({of_own, stride, 1}, from + block.own.begin * n, n, to.data(), n, count, n, block.own.size, true);
    }

    // Add the rows, weighted, to each key or value.
    void back(const std::vector<float>& weights, const std::vector<float>& rows, std::vector<float>& to) const {
        int64_t n = scope.lanes;
        const float *of_own = weights.data() + width, *from = rows.data();
        multiply({weights.data(), 1, stride}, from, n, to.data() + block.prompt.begin * n, n, block.prompt.size, n, count, true);
        multiply({of_own, 1, stride}, from, n, to.data() + block.own.begin * n, n, block.own.size, n, count, true);
    }

    // Unnormalized weights; `inverses` normalize them.
    void weigh() {
        across(queries, scope.keys_across, weights);
        inverses.resize(count);
        for (int64_t row = 0; row < count; ++row) {
            float *scores = weights.data() + row * stride, *of_own = scores + width;
            int64_t further = row / sizes.repeats;
            std::fill(scores + block.prompt.size, of_own, -INFINITY);
            std::fill(of_own + block.last + further, scores + stride, -INFINITY);
            if (sizes.window > 0) {
                int64_t hidden = std::max<int64_t>(0, block.hidden + further), skipped = std::min(hidden, block.prompt.size);
                std::fill(scores, scores + skipped, -INFINITY);
                std::fill(of_own, of_own + (hidden - skipped), -INFINITY);
            }
            inverses[row] = 1 / exponentials(scores, stride);
        }
    }

    const Scope<T>& scope;
    const Sizes& sizes;
    Block block;
    int64_t count, width, stride;  // rows, weights per row for the prompt, and all weights per row
    std::vector<float> queries, weights, inverses;
};

template <class T>
static void compute(const Inputs<T>& in, const Task& task, T* result) {
    Scope<T> scope(in, task, false);
    Rows<T> rows(scope);
    std::vector<float> sums;
    scope.each_block([&](const Block& block) {
        rows.read(block);
        rows.weigh();
        rows.along(rows.weights, scope.values, sums);
        for (int64_t row = 0; row < rows.count; ++row) {
            T* to = result + rows.place(row, in.sizes.heads * in.sizes.repeats * in.sizes.size);
            for (int64_t i = 0; i < in.sizes.size; ++i) put(to[i], sums[row * scope.lanes + i] * rows.inverses[row]);
        }
    });
}

// One task's contribution to the gradients of the keys and values that its queries see.
struct Added {
    std::vector<int64_t> tokens;
    std::vector<float> keys, values;  // [tokens, lanes]
};

// With w the weights of a query q, and o the gradient of its result:
//   dv_j += w_j o,   d_j = w_j (o v_j - sum_k w_k o v_k),   dk_j += d_j q,   dq = sum_j d_j k_j.
template <class T>
static Added compute_backward(const Inputs<T>& in, const Task& task, const T* gradient, T* of_query) {
    Scope<T> scope(in, task, true);
    Rows<T> rows(scope);
    Added added{scope.tokens, std::vector<float>(scope.keys.size()), std::vector<float>(scope.keys.size())};
    std::vector<float> outer, slopes, sums;
    int64_t of_token = in.sizes.heads * in.sizes.repeats * in.sizes.size;
    scope.each_block([&](const Block& block) {
        rows.read(block);
        rows.gather(gradient, of_token, 1, outer);
        rows.weigh();
        rows.across(outer, scope.values_across, slopes);
        for (int64_t row = 0; row < rows.count; ++row) {
            float *weight = rows.weights.data() + row * rows.stride, *slope = slopes.data() + row * rows.stride, mean = 0;
#pragma omp simd reduction(+ : mean)
            for (int64_t i = 0; i < rows.stride; ++i) weight[i] *= rows.inverses[row], mean += weight[i] * slope[i];
#pragma omp simd
            for (int64_t i = 0; i < rows.stride; ++i) slope[i] = weight[i] * (slope[i] - mean);
        }
        rows.back(rows.weights, outer, added.values);
        rows.back(slopes, rows.queries, added.keys);
        rows.along(slopes, scope.keys, sums);
        for (int64_t row = 0; row < rows.count; ++row) {
            T* to = of_query + rows.place(row, of_token);
            for (int64_t i = 0; i < in.sizes.size; ++i) put(to[i], sums[row * scope.lanes + i] * in.sizes.scale);
        }
    });
    return added;
}

template <class T>
static void packed_attention(
    const T* query, const T* key, const T* value, T* result, const int64_t* segments, const int64_t* first, int64_t groups,
    int64_t heads, int64_t repeats, int64_t size, int64_t window, float scale, int64_t query_stride, int64_t key_stride,
    int64_t value_stride) {
    Sizes sizes{heads, repeats, size, window, scale, query_stride, key_stride, value_stride};
    Inputs<T> in{query, key, value, {segments, first, groups}, sizes};
    std::vector<Task> tasks;
    for (int64_t unit = 0; unit < in.groups.count * in.sizes.heads; ++unit)
        for (const Task& task : tasks_of(in.groups, unit / in.sizes.heads, unit % in.sizes.heads)) tasks.push_back(task);
#pragma omp parallel for schedule(dynamic)
    for (size_t number = 0; number < tasks.size(); ++number) compute(in, tasks[number], result);
}

// Write sums [tokens, lanes] as gradients of the keys or values of one head.
template <class T>
static void write(const Sizes& sizes, int64_t head, const std::vector<int64_t>& tokens, const std::vector<float>& sums, T* to) {
    int64_t lanes = padded(sizes.size);
    for (size_t key = 0; key < tokens.size(); ++key) {
        T* row = to + (tokens[key] * sizes.heads + head) * sizes.size;
        for (int64_t i = 0; i < sizes.size; ++i) put(row[i], sums[key * lanes + i]);
    }
}

// The sum over neighbouring tasks of one group and head, in order. All of them see the prompt, which comes first.
static Added add_up(const Added* begin, const Added* end, int64_t lanes) {
    Added sum = *begin;
    for (const Added* next = begin + 1; next < end; ++next) {
        std::vector<int64_t> places;
        for (size_t key = 0, place = 0; key < next->tokens.size(); ++key, ++place) {
            while (place < sum.tokens.size() && sum.tokens[place] != next->tokens[key]) ++place;
            if (place == sum.tokens.size()) sum.tokens.push_back(next->tokens[key]);
            places.push_back(place);
        }
        sum.keys.resize(sum.tokens.size() * lanes), sum.values.resize(sum.tokens.size() * lanes);
        for (size_t key = 0; key < places.size(); ++key)
            for (int64_t i = 0; i < lanes; ++i) {
                sum.keys[places[key] * lanes + i] += next->keys[key * lanes + i];
                sum.values[places[key] * lanes + i] += next->values[key * lanes + i];
            }
    }
    return sum;
}

template <class T>
static void packed_attention_backward(
    const T* query, const T* key, const T* value, const T* gradient, T* of_query, T* of_key, T* of_value,
    const int64_t* segments, const int64_t* first_segments, int64_t groups, int64_t heads, int64_t repeats, int64_t size,
    int64_t window, float scale, int64_t query_stride, int64_t key_stride, int64_t value_stride) {
    Sizes sizes{heads, repeats, size, window, scale, query_stride, key_stride, value_stride};
    Inputs<T> in{query, key, value, {segments, first_segments, groups}, sizes};
    int64_t units = groups * heads;
    for (int64_t begin = 0, end = 0; begin < units; begin = end) {
        std::vector<Task> tasks;
        std::vector<size_t> first;  // number of each unit's first task
        for (int64_t waiting = 0; end < units && waiting < ROOM; ++end) {
            first.push_back(tasks.size());
            std::vector<Task> more = tasks_of(in.groups, end / heads, end % heads);
            tasks.insert(tasks.end(), more.begin(), more.end());
            int64_t s = in.groups.first[end / heads], prompt = in.groups.segments[2 * s + 1] - in.groups.segments[2 * s];
            if (more.size() > 1) waiting += 2 * padded(in.sizes.size) * int64_t(more.size()) * (prompt + more[0].to);
        }
        first.push_back(tasks.size());
        std::vector<Added> added(tasks.size());
        auto written = [&](const Task& task, const Added& sum) {
            write(in.sizes, task.head, sum.tokens, sum.keys, of_key);
            write(in.sizes, task.head, sum.tokens, sum.values, of_value);
        };
#pragma omp parallel
        {
#pragma omp for schedule(dynamic)
            for (size_t number = 0; number < tasks.size(); ++number) {
                Added of_task = compute_backward(in, tasks[number], gradient, of_query);
                size_t unit = tasks[number].group * heads + tasks[number].head - begin;
                if (first[unit + 1] - first[unit] == 1)
                    written(tasks[number], of_task);
                else
                    added[number] = std::move(of_task);
            }
#pragma omp for schedule(dynamic)
            for (int64_t unit = 0; unit < end - begin; ++unit) {
                const Added* all = added.data();
                if (first[unit + 1] - first[unit] > 1)
                    written(tasks[first[unit]], add_up(all + first[unit], all + first[unit + 1], padded(in.sizes.size)));
            }
        }
    }
}

EXPORT(packed_attention)
EXPORT(packed_attention_backward)
