"""A T5-shaped encoder-decoder in plain PyTorch: layers, loss, greedy decoding, T5 checkpoints.

T5: Raffel et al. 2020, arXiv 1910.10683, section 2.1. Pre-norm, no biases, relative positions.
Letters: B batch, S source or keys, T target or queries, D width, H heads, K head width,
V vocabulary. The memory is the encoder's output, as the decoder reads it.
"""

import json
import math
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class ModelConfig:
    """The shape of a model. The defaults train in minutes on two CPU cores."""

    vocab_size: int  # V
    d_model: int = 96  # D
    n_heads: int = 6  # H
    d_kv: int = 16  # K
    d_ff: int = 384  # inner width of feed-forward
    n_encoder_layers: int = 2
    n_decoder_layers: int = 2
    dropout: float = 0.0
    n_buckets: int = 32  # relative position buckets
    max_distance: int = 128  # all farther ones share the last bucket
    gated: bool = False  # False: relu (T5 v1.0), True: gated GELU (T5 v1.1, Flan-T5)
    tied: bool = True  # True: the output layer is the embedding (T5 v1.0)
    scaled: bool = True  # True: x * D^-0.5 before the output layer (T5 v1.0)
    pad_id: int = 0  # also starts every decoder input, as in T5
    eos_id: int = 1


def linear(n_in: int, n_out: int, std: float) -> nn.Linear:
    """A linear layer without bias; its initial weights have this standard deviation."""
    layer = nn.Linear(n_in, n_out, bias=False)
    nn.init.normal_(layer.weight, std=std)
    return layer


def relative_position_bucket(
    distance: Tensor, bidirectional: bool, n_buckets: int, max_distance: int
) -> Tensor:
    """Bucket of each distance (key minus query position): same shape, 0..n_buckets-1."""
    if bidirectional:
        n_buckets = n_buckets // 2  # one half for each side of the query
        first_bucket = (distance > 0) * n_buckets
        distance = distance.abs()
    else:
        first_bucket = torch.zeros_like(distance)
        distance = (-distance).clamp(min=0)
    n_exact = n_buckets // 2  # nearer: a bucket per distance; farther: log-spaced
    # growth is 0 at distance n_exact, 1 at max_distance; clamp avoids log(0)
    growth = torch.log(distance.clamp(min=1) / n_exact) / math.log(max_distance / n_exact)
    coarse = n_exact + (growth * (n_buckets - n_exact)).long()
    bucket = torch.where(distance < n_exact, distance, coarse)
    return first_bucket + bucket.clamp(max=n_buckets - 1)


class Attention(nn.Module):
    """Attention of a sequence to itself or to the memory."""

    def __init__(self, c: ModelConfig):
        super().__init__()
        self.config = c
        inner = c.n_heads * c.d_kv
        # Scores are not divided by sqrt(K); instead, q starts smaller by that factor.
        self.q = linear(c.d_model, inner, std=(c.d_model * c.d_kv) ** -0.5)
        self.kv = linear(c.d_model, 2 * inner, std=c.d_model**-0.5)  # one product for both
        self.o = linear(inner, c.d_model, std=inner**-0.5)
        self.dropout = nn.Dropout(c.dropout)

    def keys_values(self, x: Tensor) -> Tensor:
        """The keys, then the values, of x: (B, S, D) -> (2, B, H, S, K)."""
        kv = self.kv(x)  # (B, S, 2 * H * K)
        kv = kv.unflatten(-1, (2, self.config.n_heads, self.config.d_kv))  # (B, S, 2, H, K)
        return kv.permute(2, 0, 3, 1, 4)

    def forward(self, x: Tensor, kv: Tensor, bias: Tensor) -> Tensor:
        """x (B, T, D), kv (2, B, H, S, K), bias that broadcasts to (B, H, T, S) -> (B, T, D)."""
        q = self.q(x).unflatten(-1, (self.config.n_heads, self.config.d_kv))  # (B, T, H, K)
        q = q.transpose(1, 2)  # (B, H, T, K)
        scores = q @ kv[0].mT + bias  # (B, H, T, K) @ (B, H, K, S) + bias -> (B, H, T, S)
        weights = self.dropout(scores.softmax(-1))
        y = weights @ kv[1]  # (B, H, T, S) @ (B, H, S, K) -> (B, H, T, K)
        y = y.transpose(1, 2).flatten(2)  # (B, T, H * K)
        return self.dropout(self.o(y))


class FeedForward(nn.Module):
    """T5 v1.0: relu(x W_i) W_o. T5 v1.1: (gelu(x W_0) * x W_1) W_o (arXiv 2002.05202)."""

    def __init__(self, c: ModelConfig):
        super().__init__()
        self.gated = c.gated
        if c.gated:
            self.wi_0 = linear(c.d_model, c.d_ff, std=c.d_model**-0.5)
            self.wi_1 = linear(c.d_model, c.d_ff, std=c.d_model**-0.5)
        else:
            self.wi = linear(c.d_model, c.d_ff, std=c.d_model**-0.5)
        self.wo = linear(c.d_ff, c.d_model, std=c.d_ff**-0.5)
        self.dropout = nn.Dropout(c.dropout)

    def forward(self, x: Tensor) -> Tensor:  # (B, T, D) -> (B, T, D)
        if self.gated:
            h = F.gelu(self.wi_0(x), approximate="tanh") * self.wi_1(x)  # (B, T, d_ff)
        else:
            h = F.relu(self.wi(x))
        h = self.wo(self.dropout(h))  # (B, T, D)
        return self.dropout(h)


class Layer(nn.Module):
    """A layer of the encoder or, with attention to the memory, of the decoder."""

    def __init__(self, c: ModelConfig, cross: bool):
        super().__init__()
        self.self_norm = nn.RMSNorm(c.d_model, eps=1e-6)
        self.self_attention = Attention(c)
        if cross:
            self.cross_norm = nn.RMSNorm(c.d_model, eps=1e-6)
            self.cross_attention = Attention(c)
        self.ff_norm = nn.RMSNorm(c.d_model, eps=1e-6)
        self.feed_forward = FeedForward(c)

    def forward(self, x, bias, memory_kv=None, memory_bias=None, cache=None, t=0) -> Tensor:
        """x (B, T, D) -> (B, T, D); in the decoder memory_kv (2, B, H, S, K) is of the memory."""
        h = self.self_norm(x)
        kv = self.self_attention.keys_values(h)  # (2, B, H, T, K)
        if cache is not None:  # x is token t; the cache has the keys and values before it
            cache[:, :, :, t : t + 1] = kv  # in place; (2, B, H, T_max, K)
            kv = cache[:, :, :, : t + 1]  # (2, B, H, t + 1, K)
        x = x + self.self_attention(h, kv, bias)
        if memory_kv is not None:
            x = x + self.cross_attention(self.cross_norm(x), memory_kv, memory_bias)
        return x + self.feed_forward(self.ff_norm(x))


class Transformer(nn.Module):
    """Encoder and decoder: `forward` gives logits, `nll` a loss, `generate` tokens."""

    def __init__(self, c: ModelConfig):
        super().__init__()
        self.config = c
        self.embedding = nn.Embedding(c.vocab_size, c.d_model)  # N(0, 1), as in T5
        self.encoder_bias = nn.Embedding(c.n_buckets, c.n_heads)  # one for all encoder layers
        self.decoder_bias = nn.Embedding(c.n_buckets, c.n_heads)
        nn.init.normal_(self.encoder_bias.weight, std=c.d_model**-0.5)
        nn.init.normal_(self.decoder_bias.weight, std=c.d_model**-0.5)
        self.encoder = nn.ModuleList([Layer(c, cross=False) for _ in range(c.n_encoder_layers)])
        self.decoder = nn.ModuleList([Layer(c, cross=True) for _ in range(c.n_decoder_layers)])
        self.encoder_norm = nn.RMSNorm(c.d_model, eps=1e-6)
        self.decoder_norm = nn.RMSNorm(c.d_model, eps=1e-6)
        self.dropout = nn.Dropout(c.dropout)
        if not c.tied:
            self.lm_head = linear(c.d_model, c.vocab_size, std=1.0)

    def padding_bias(self, input_ids: Tensor) -> Tensor:
        """(B, S) -> (B, 1, 1, S): -inf at padding, so that no query attends to it, else 0."""
        padding = (input_ids == self.config.pad_id)[:, None, None]
        return torch.where(padding, -math.inf, 0.0)

    def position_bias(self, length: int, causal: bool) -> Tensor:
        """(1, H, query, key), by distance; causal (the decoder's): -inf at keys after the query."""
        c = self.config
        embedding = self.decoder_bias if causal else self.encoder_bias
        position = torch.arange(length, device=embedding.weight.device)
        distance = position[None, :] - position[:, None]  # (query, key)
        bucket = relative_position_bucket(distance, not causal, c.n_buckets, c.max_distance)
        bias = embedding(bucket).permute(2, 0, 1)[None]  # (1, H, query, key)
        if causal:
            bias = bias.masked_fill(distance > 0, -math.inf)
        return bias

    def encode(self, input_ids: Tensor) -> Tensor:
        """(B, S) token ids, padded with pad_id -> (B, S, D). Outputs at padding mean nothing."""
        x = self.dropout(self.embedding(input_ids))
        bias = self.position_bias(input_ids.shape[1], causal=False)  # (1, H, S, S)
        bias = bias + self.padding_bias(input_ids)  # (B, H, S, S)
        for layer in self.encoder:
            x = layer(x, bias)
        return self.dropout(self.encoder_norm(x))

    def shift_right(self, labels: Tensor) -> Tensor:
        """(B, T) -> (B, T): the decoder reads the start token and all labels but the last."""
        return F.pad(labels[:, :-1], (1, 0), value=self.config.pad_id)

    def decode(self, input_ids: Tensor, labels: Tensor) -> Tensor:
        """Teacher forcing: (B, S) source and (B, T) target, padded -> (B, T, D), not yet normed."""
        memory = self.encode(input_ids)  # (B, S, D)
        memory_bias = self.padding_bias(input_ids)  # (B, 1, 1, S)
        bias = self.position_bias(labels.shape[1], causal=True)  # (1, H, T, T)
        x = self.dropout(self.embedding(self.shift_right(labels)))
        for layer in self.decoder:
            memory_kv = layer.cross_attention.keys_values(memory)  # (2, B, H, S, K)
            x = layer(x, bias, memory_kv, memory_bias)
        return x

    def logits(self, x: Tensor) -> Tensor:
        """The last norm and the output layer: (..., D) -> (..., V)."""
        x = self.dropout(self.decoder_norm(x))
        if self.config.scaled:
            x = x * self.config.d_model**-0.5
        layer = self.embedding if self.config.tied else self.lm_head
        return F.linear(x, layer.weight)

    def forward(self, input_ids: Tensor, labels: Tensor) -> Tensor:
        """The logits of each target token: source (B, S), target (B, T) -> (B, T, V)."""
        return self.logits(self.decode(input_ids, labels))

    def nll(self, input_ids: Tensor, labels: Tensor) -> Tensor:
        """-ln p of each target token: source (B, S), target (B, T) -> (B, T), 0 at padding."""
        real = labels != self.config.pad_id  # (B, T)
        x = self.decode(input_ids, labels)[real]  # (N, D): no logits at padding
        logits = self.logits(x).float()  # (N, V)
        nats = F.cross_entropy(logits, labels[real], reduction="none")  # (N,)
        return torch.zeros(labels.shape, device=nats.device).masked_scatter(real, nats)

    @torch.no_grad()
    def generate(self, input_ids: Tensor, max_new_tokens: int) -> Tensor:
        """Greedy decoding: (B, S) -> (B, max_new_tokens), padded after the end token.

        Always without dropout: in training, too, a label must be the one given at inference.
        """
        was_training = self.training
        self.eval()
        c = self.config
        rows = torch.arange(len(input_ids), device=input_ids.device)  # those still in the batch
        memory = self.encode(input_ids)  # (B, S, D)
        memory_bias = self.padding_bias(input_ids)  # (B, 1, 1, S)
        memory_kvs = [layer.cross_attention.keys_values(memory) for layer in self.decoder]
        memory_kv = torch.stack(memory_kvs)  # (layers, 2, B, H, S, K)
        cache = memory_kv.new_empty(len(memory_kv), 2, len(rows), c.n_heads, max_new_tokens, c.d_kv)
        bias = self.position_bias(max_new_tokens, causal=True)  # (1, H, T, T)
        tokens = input_ids.new_full((len(rows), max_new_tokens + 1), c.pad_id)  # first: start
        done = torch.zeros_like(rows, dtype=torch.bool)
        for t in range(max_new_tokens):
            x = self.embedding(tokens[rows, t])[:, None]  # (rows, 1, D)
            bias_t = bias[:, :, t : t + 1, : t + 1]  # (1, H, 1, t + 1)
            for i, layer in enumerate(self.decoder):
                x = layer(x, bias_t, memory_kv[i], memory_bias, cache[i], t)
            new = self.logits(x)[:, 0].argmax(-1).masked_fill(done, c.pad_id)  # (rows,)
            tokens[rows, t + 1] = new
            done = done | (new == c.eos_id)
            stay = torch.where(~done)[0]  # places in `rows`
            if len(stay) == 0:
                break
            if len(stay) <= 0.75 * len(done):  # leaving copies the cache: not one by one
                rows = rows[stay]
                done = done[stay]
                memory_bias = memory_bias[stay]
                memory_kv = memory_kv.index_select(2, stay)
                cache = cache.index_select(2, stay)
        self.train(was_training)
        return tokens[:, 1:]


T5_NAMES = {  # parts of names in T5 checkpoints, and ours; replaced in this order
    "shared": "embedding",
    ".final_layer_norm": "_norm",
    ".block.0.layer.0.SelfAttention.relative_attention_bias": "_bias",
    ".block": "",
    "layer.0.SelfAttention": "self_attention",
    "layer.1.EncDecAttention": "cross_attention",
    "layer.2.DenseReluDense": "feed_forward",
    "layer.0.layer_norm": "self_norm",
    "layer.1.layer_norm": "cross_norm",
    "layer.2.layer_norm": "ff_norm",
}


def read_t5_config(file: Path, dropout: float) -> ModelConfig:
    """The shape in a T5 config.json; raises if it is not ours."""
    t5 = json.loads(file.read_text(encoding="utf-8"))
    allowed = {"model_type": ["t5"], "feed_forward_proj": ["relu", "gated-gelu"]}
    allowed |= {"layer_norm_epsilon": [1e-6], "decoder_start_token_id": [0]}
    allowed |= {"pad_token_id": [0], "eos_token_id": [1]}
    for key, values in allowed.items():  # a missing key means the first, T5's default
        if t5.get(key, values[0]) not in values:
            raise ValueError(f"{key} is {t5[key]!r}, and only {values} can be loaded")
    sizes = [t5["vocab_size"], t5["d_model"], t5["num_heads"], t5["d_kv"], t5["d_ff"]]
    layers = [t5["num_layers"], t5.get("num_decoder_layers") or t5["num_layers"]]
    buckets = [t5["relative_attention_num_buckets"], t5.get("relative_attention_max_distance", 128)]
    for size in sizes + layers + buckets:
        if type(size) is not int or not 0 < size < 10**6:
            raise ValueError(f"a size is {size!r}, not a whole number below a million")
    if max(layers) > 1000 or buckets[0] < 4 or buckets[1] <= buckets[0] // 2:
        raise ValueError("too many layers, or buckets that do not fit their distance")
    gated = t5.get("feed_forward_proj") == "gated-gelu"
    tied = t5.get("tie_word_embeddings", True)
    scaled = t5.get("scale_decoder_outputs", tied)  # a key of transformers 5
    # in ModelConfig's order
    return ModelConfig(*sizes, *layers, dropout, *buckets, gated, tied, scaled)


def rename_t5(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights of a T5 under our names, in float32; keys and values become one matrix."""
    state = {}
    for name, weight in weights.items():
        if "embed_tokens" in name or "EncDecAttention.relative_attention_bias" in name:
            continue  # copies of the embedding, and a bias of v1.0 that no layer uses
        if name.startswith("encoder"):
            name = name.replace(".layer.1.", ".layer.2.")  # where the decoder has its feed-forward
        for part, ours in T5_NAMES.items():
            name = name.replace(part, ours)
        state[name] = weight.float()
    for name in list(state):
        if name.endswith(".k.weight"):
            k = state.pop(name)
            v = state.pop(name.replace(".k.", ".v."))
            if k.shape != v.shape:  # cat would hide it
                raise ValueError(f"{name} is {tuple(k.shape)}, its values {tuple(v.shape)}")
            state[name.replace(".k.", ".kv.")] = torch.cat([k, v])  # (2 * H * K, D)
    return state


def load_t5(folder: Path, dropout: float = 0.0) -> Transformer:
    """A T5 v1.0, v1.1 or Flan-T5 from Hugging Face. Raises ValueError, one line that says why."""
    file = folder / "config.json"
    try:
        config = read_t5_config(file, dropout)
        file = folder / "model.safetensors"
        if file.exists():
            from safetensors.torch import load_file  # an extra package, for such files alone

            weights = load_file(file)
        else:
            file = folder / "pytorch_model.bin"
            if not file.exists():
                raise ValueError("no such file, nor model.safetensors; join parts into one")
            weights = torch.load(file, map_location="cpu", weights_only=True)  # runs no code
        state = rename_t5(weights)
        if config.tied and "lm_head.weight" in state:  # transformers 5 calls all T5s tied
            if state["lm_head.weight"].equal(state["embedding.weight"]):
                del state["lm_head.weight"]
            else:
                config = replace(config, tied=False)
        with torch.device("meta"):  # the weights come from the file
            model = Transformer(config)
        model.load_state_dict(state, assign=True)
    except Exception as error:  # a damaged file raises half a dozen types
        reason = f"{type(error).__name__}: {error}".split(". ")[0]  # torch goes on with advice
        reason = " ".join(reason.split())[:300]
        raise ValueError(f"{file}: cannot be loaded as a T5: {reason}") from None
    return model
