"""The least work of a model's passes, from its sizes alone: `counts.py` has to count exactly these operations.

A product of [n, k] and [k, m] is 2 n k m operations. Attention is 4 for each number of a head and pair of query and key that
sees it, and 10 in its backward pass, which multiplies five times instead of twice.
"""

_TOGETHER = (("q", "k", "v"), ("o",), ("gate", "up"), ("down",))  # modules with the same input


class Ideal:
    """Passes over P prompts of S tokens with G completions of T each.

    Args:
        config: The model's config.
        rank: Of LoRA.
        full: Names of the fully trained modules, such as `model.layers.1.mlp.up_proj`; None for all, without LoRA.
        sizes: P, G, S and T.
    """

    def __init__(self, config, rank, full, sizes):
        self.config, self.rank, self._full, (self.prompts, samples, self.prompt, self.length) = config, rank, full, sizes
        hidden, inner, size = config.hidden_size, config.intermediate_size, config.head_dim
        self.rows, self.layers = self.prompts * samples, config.num_hidden_layers
        self.heads, self.keys = config.num_attention_heads * size, config.num_key_value_heads * size
        inputs = {"o": self.heads, "down": inner}
        outputs = {"q": self.heads, "k": self.keys, "v": self.keys, "gate": inner, "up": inner}
        names = [name for some in _TOGETHER for name in some]
        self.shapes = {name: (inputs.get(name, hidden), outputs.get(name, hidden)) for name in names}
        # Each prompt once, and no completion's last token, which predicts nothing; filled up to a multiple of 16.
        tokens = self.prompts * self.prompt + self.rows * (self.length - 1)
        self.tokens, self.predicted = tokens + -tokens % 16, self.rows * self.length
        made = self.length - 1
        pairs = self.prompts * self.prompt * (self.prompt + 1) // 2 + self.rows * (made * self.prompt + made * (made + 1) // 2)
        self._attention = 2 * self.heads * self.layers * pairs
        self._output = 2 * hidden * config.vocab_size

    def is_full(self, layer, name):
        part = "self_attn" if name in "qkvo" else "mlp"
        return self._full is None or f"model.layers.{layer}.{part}.{name}_proj" in self._full

    def forward(self, gradient=True, adapter=True):
        """A pass over all tokens. With a gradient it makes that of the states that predict at once."""
        found = 2 * self._attention + (1 + gradient) * self.predicted * self._output
        for layer in range(self.layers):
            for name, (n, m) in self.shapes.items():
                found += 2 * self.tokens * (n * m + (0 if self.is_full(layer, name) or not adapter else self.rank * (n + m)))
        return found

    def backward(self):
        """The rest of its gradients. The first layer's input needs none."""
        found = 5 * self._attention
        for layer in range(self.layers):
            for name, (n, m) in self.shapes.items():
                of_input = layer > 0 or name not in "qkv"
                if self.is_full(layer, name):
                    found += 2 * self.tokens * n * m * (1 + of_input)
                else:
                    found += 2 * self.tokens * (of_input * (n * m + self.rank * n) + self.rank * (n + 2 * m))
        return found

    def merged(self):
        """Each update by LoRA computed once."""
        modules = [name for layer in range(self.layers) for name in self.shapes if not self.is_full(layer, name)]
        return sum(2 * self.rank * m * n for m, n in map(self.shapes.get, modules))

    def sketches(self):
        """Each gradient times its two test matrices."""
        size = 2 * self.rank + 10
        return sum(2 * m * n * (size + 2 * size + 1) for m, n in self.shapes.values()) * self.layers

    def token(self, rows, keys):
        """A token of each of these rows, which see so many keys in all.

        A of modules with the same input are one matrix, and their B too, with zeros beside its diagonal.
        """
        found = 2 * 2 * self.heads * self.layers * keys + rows * self._output
        for layer in range(self.layers):
            for some in _TOGETHER:
                rank = max(2, self.rank * sum(not self.is_full(layer, name) for name in some))
                outputs = sum(self.shapes[name][1] for name in some)
                found += 2 * rows * (self.shapes[some[0]][0] * (outputs + rank) + rank * outputs)
        return found

    def bytes_of_layer(self, keys):
        """A layer's weights with LoRA in 16 bits, and so many keys with values, each once."""
        return sum(2 * (m * n + self.rank * (m + n)) for n, m in self.shapes.values()) + 4 * keys * self.keys
