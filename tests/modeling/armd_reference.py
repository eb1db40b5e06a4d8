"""ARMD as a reader of the paper would write it down first: one position at a time, no streams, no masks, no cache.

To predict position n it takes the tokens of earlier blocks, and works out the content stream for them and the query
stream for n from the definitions. Exponentially slow, in float64, and it shares only the weights with the library.
"""

import math

import torch
from torch.nn import functional as F


class Reference:
    def __init__(self, model):
        self.config = model.config
        self.weights = {name: weight.detach().double() for name, weight in model.state_dict().items()}

    def logits(self, text, blocks):
        """Row n: the logits of position n, given the tokens of blocks earlier than its own."""
        return torch.stack([self.predict(text, blocks, n) for n in range(len(text))])

    def predict(self, text, blocks, n):
        lower = self.config.num_two_stream_layers
        # Upper layers: n reads the query states of its own block and of earlier ones.
        states = {m: self.query_state(text, blocks, m, lower) for m in range(len(text)) if blocks[m] <= blocks[n]}
        for layer in range(lower, self.config.num_hidden_layers):
            states = {
                m: self.sublayers(
                    layer, states[m], m + 1, [(k + 1, states[k]) for k in states if blocks[k] <= blocks[m]]
                )
                for m in states
            }
        return self.norm("model.norm", states[n]) @ self.weights["lm_head.weight"].T

    def content_state(self, text, blocks, m, depth):
        """State of the token at m (-1: the start symbol) after `depth` layers; it reads blocks up to its own."""
        if depth == 0:
            return self.weights["model.start"] if m < 0 else self.weights["model.embed_tokens.weight"][text[m]]
        block = -1 if m < 0 else blocks[m]
        read = [-1, *(k for k in range(len(text)) if blocks[k] <= block)]
        keys = [(k + 1, self.content_state(text, blocks, k, depth - 1)) for k in read]
        return self.sublayers(depth - 1, self.content_state(text, blocks, m, depth - 1), m + 1, keys)

    def query_state(self, text, blocks, n, depth):
        """State of the query for n after `depth` layers; it reads content of blocks earlier than its own."""
        earlier = [-1, *(k for k in range(len(text)) if blocks[k] < blocks[n])]
        if depth:
            keys = [(k + 1, self.content_state(text, blocks, k, depth - 1)) for k in earlier]
            return self.sublayers(depth - 1, self.query_state(text, blocks, n, depth - 1), n + 1, keys)
        encoding = self.encoding(n + 1)
        state = (
            sum((encoding @ self.encoding(k + 1)) * self.content_state(text, blocks, k, 0) for k in earlier)
            * self.config.prefix_scale
        )
        if self.config.left_neighbour:
            known = n - 1 in earlier
            state = state + (
                self.content_state(text, blocks, n - 1, 0) if known else self.weights["model.no_neighbour"]
            )
        return state

    def encoding(self, position):
        half = self.config.prefix_encoding_size // 2
        # The library computes its angles in float32, whatever the dtype of the model.
        angles = torch.tensor([position * float(torch.tensor(-math.log(1e4) / half * i).exp()) for i in range(half)])
        features = torch.cat([angles.sin(), angles.cos()]).double()
        return features @ self.weights["model.position_encoding.proj.weight"].T

    def sublayers(self, layer, state, position, keys):
        prefix = f"model.layers.{layer}."
        attended = self.attention(prefix + "self_attn.", prefix, state, position, keys)
        state = state + attended
        hidden = self.norm(prefix + "post_attention_layernorm", state)
        hidden = hidden @ self.weights[prefix + "mlp.up_proj.weight"].T + self.weights[prefix + "mlp.up_proj.bias"]
        hidden = F.gelu(hidden, approximate="tanh") @ self.weights[prefix + "mlp.down_proj.weight"].T
        return state + hidden + self.weights[prefix + "mlp.down_proj.bias"]

    def attention(self, name, prefix, state, position, keys):
        heads, width = self.config.num_attention_heads, self.config.hidden_size
        size = width // heads
        normed = self.norm(prefix + "input_layernorm", state)
        query = (normed @ self.weights[name + "q_proj.weight"].T).view(heads, size)
        outputs = []
        for head in range(heads):
            scores, values = [], []
            for key_position, key_state in keys:
                key_normed = self.norm(prefix + "input_layernorm", key_state)
                key = (key_normed @ self.weights[name + "k_proj.weight"].T).view(heads, size)[head]
                values.append((key_normed @ self.weights[name + "v_proj.weight"].T).view(heads, size)[head])
                scores.append(self.rotate(query[head], position) @ self.rotate(key, key_position) / math.sqrt(size))
            outputs.append(torch.softmax(torch.stack(scores), 0) @ torch.stack(values))
        return torch.cat(outputs) @ self.weights[name + "o_proj.weight"].T

    @staticmethod
    def rotate(vector, position):
        """Pairs (i, i + half) turned by position / 10000^(i / half)."""
        half = len(vector) // 2
        turned = vector.clone()
        for i in range(half):
            angle = position / 10000 ** (i / half)
            x, y = vector[i], vector[i + half]
            turned[i] = x * math.cos(angle) - y * math.sin(angle)
            turned[i + half] = y * math.cos(angle) + x * math.sin(angle)
        return turned

    def norm(self, name, state):
        return F.layer_norm(state, state.shape, eps=self.config.layer_norm_eps) * self.weights[name + ".weight"]
