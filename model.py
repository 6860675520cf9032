"""A T5-shaped encoder-decoder transformer in plain PyTorch: config, layers, loss and greedy decoding with a cache.

The shape is that of T5 (Raffel et al. 2020, arXiv 1910.10683, section 2.1): pre-norm RMSNorm without bias, relative
position buckets instead of position embeddings, attention that is not scaled by 1/sqrt(K), one embedding for the
encoder, the decoder and the output. `gated=True, tied=False` gives T5 v1.1 and Flan-T5 (gated GELU, untied output).

Letters: B batch, S source length, T target length, D width, H heads, K head width, V vocabulary.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class ModelConfig:
    """The shape of a model. The defaults train in minutes on two CPU cores."""

    vocab_size: int  # V
    d_model: int = 128  # D
    n_heads: int = 4  # H
    d_kv: int = 32  # K
    d_ff: int = 512  # width of the feed-forward layer
    n_encoder_layers: int = 2
    n_decoder_layers: int = 2
    dropout: float = 0.1
    n_buckets: int = 32  # relative position buckets
    max_distance: int = 128  # all distances from here on share the last bucket
    gated: bool = False  # False: relu (T5 v1.0), True: gated GELU (T5 v1.1, Flan-T5)
    tied: bool = True  # True: the output layer is the embedding (T5 v1.0)
    pad_id: int = 0  # also starts every decoder input, as in T5
    eos_id: int = 1


class RMSNorm(nn.Module):
    """Root mean square norm (Zhang & Sennrich 2019): no mean, no bias; the statistics are always in float32."""

    def __init__(self, d_model: int, eps: float = 1e-6):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(d_model))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:  # (B, T, D) -> (B, T, D)
        wide = x.float()
        return self.weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)).to(x.dtype)


def relative_position_bucket(distance: Tensor, bidirectional: bool, n_buckets: int, max_distance: int) -> Tensor:
    """Bucket of each distance (key position minus query position), same shape, values in 0..n_buckets-1.

    T5's scheme (arXiv 1910.10683, section 2.1): half of the buckets hold one distance each, the other half grow
    logarithmically up to `max_distance`. The encoder spends half of its buckets on keys to the right of the query.
    """
    bucket = torch.zeros_like(distance)
    if bidirectional:
        n_buckets //= 2
        bucket = (distance > 0) * n_buckets
        distance = distance.abs()
    else:
        distance = (-distance).clamp(min=0)  # the decoder never looks to the right
    n_exact = n_buckets // 2
    growth = torch.log(distance.clamp(min=1).float() / n_exact) / math.log(max_distance / n_exact)
    coarse = (n_exact + (growth * (n_buckets - n_exact)).long()).clamp(max=n_buckets - 1)
    return bucket + torch.where(distance < n_exact, distance, coarse)


class RelativePositionBias(nn.Module):
    """One learned number per head and bucket, added to the attention scores of every layer of a stack."""

    def __init__(self, c: ModelConfig, bidirectional: bool):
        super().__init__()
        self.embedding = nn.Embedding(c.n_buckets, c.n_heads)
        self.bidirectional, self.n_buckets, self.max_distance = bidirectional, c.n_buckets, c.max_distance

    def forward(self, length: int) -> Tensor:  # -> (1, H, length, length)
        position = torch.arange(length, device=self.embedding.weight.device)
        distance = position[None, :] - position[:, None]  # (query, key)
        buckets = relative_position_bucket(distance, self.bidirectional, self.n_buckets, self.max_distance)
        return self.embedding(buckets).permute(2, 0, 1)[None]


class Attention(nn.Module):
    """Multi-head attention for self-attention and, with the encoder's keys and values, for cross-attention."""

    def __init__(self, c: ModelConfig):
        super().__init__()
        self.n_heads, self.d_kv, self.dropout = c.n_heads, c.d_kv, c.dropout
        self.q = nn.Linear(c.d_model, c.n_heads * c.d_kv, bias=False)
        self.kv = nn.Linear(c.d_model, 2 * c.n_heads * c.d_kv, bias=False)  # both in one matrix product
        self.o = nn.Linear(c.n_heads * c.d_kv, c.d_model, bias=False)

    def keys_values(self, x: Tensor) -> Tensor:  # (B, S, D) -> (2, B, H, S, K)
        return self.kv(x).unflatten(-1, (2, self.n_heads, self.d_kv)).permute(2, 0, 3, 1, 4)

    def forward(self, x: Tensor, kv: Tensor, bias: Tensor) -> Tensor:
        """x (B, T, D), kv (2, B, H, S, K), bias broadcast to (B, H, T, S) -> (B, T, D)."""
        q = self.q(x).unflatten(-1, (self.n_heads, self.d_kv)).transpose(1, 2)  # (B, H, T, K)
        dropout = self.dropout if self.training else 0.0
        # (B, H, T, K) x (B, H, K, S) -> (B, H, T, S); softmax; x (B, H, S, K) -> (B, H, T, K). T5 scales by 1: the
        # missing 1/sqrt(K) is part of the initialisation of q (below).
        y = F.scaled_dot_product_attention(q, kv[0], kv[1], attn_mask=bias, dropout_p=dropout, scale=1.0)
        return self.o(y.transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    """relu(x W_in) W_out (T5 v1.0), or gelu(x W_gate) * (x W_in) W_out (T5 v1.1; Shazeer 2020, arXiv 2002.05202)."""

    def __init__(self, c: ModelConfig):
        super().__init__()
        self.gate = nn.Linear(c.d_model, c.d_ff, bias=False) if c.gated else None
        self.wi = nn.Linear(c.d_model, c.d_ff, bias=False)
        self.wo = nn.Linear(c.d_ff, c.d_model, bias=False)
        self.dropout = nn.Dropout(c.dropout)

    def forward(self, x: Tensor) -> Tensor:  # (B, T, D) -> (B, T, D)
        h = F.relu(self.wi(x)) if self.gate is None else F.gelu(self.gate(x), approximate="tanh") * self.wi(x)
        return self.wo(self.dropout(h))


class EncoderLayer(nn.Module):
    def __init__(self, c: ModelConfig):
        super().__init__()
        self.norm1, self.self_attention = RMSNorm(c.d_model), Attention(c)
        self.norm2, self.feed_forward = RMSNorm(c.d_model), FeedForward(c)
        self.dropout = nn.Dropout(c.dropout)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:  # (B, S, D), (B, H, S, S) -> (B, S, D)
        h = self.norm1(x)
        x = x + self.dropout(self.self_attention(h, self.self_attention.keys_values(h), bias))
        return x + self.dropout(self.feed_forward(self.norm2(x)))


class DecoderLayer(nn.Module):
    def __init__(self, c: ModelConfig):
        super().__init__()
        self.norm1, self.self_attention = RMSNorm(c.d_model), Attention(c)
        self.norm2, self.cross_attention = RMSNorm(c.d_model), Attention(c)
        self.norm3, self.feed_forward = RMSNorm(c.d_model), FeedForward(c)
        self.dropout = nn.Dropout(c.dropout)

    def forward(
        self, x: Tensor, bias: Tensor, memory_kv: Tensor, memory_bias: Tensor, cache: Tensor | None = None, t: int = 0
    ) -> Tensor:
        """x (B, T, D), memory_kv (2, B, H, S, K) -> (B, T, D).

        In training T is the whole target. In decoding T = 1: this token's key and value join those of the tokens
        before it in `cache` (2, B, H, T_max, K) at position `t`, and `bias` is row t of the full one.
        """
        h = self.norm1(x)
        kv = self.self_attention.keys_values(h)
        if cache is not None:
            cache[:, :, :, t : t + 1] = kv
            kv = cache[:, :, :, : t + 1]
        x = x + self.dropout(self.self_attention(h, kv, bias))
        x = x + self.dropout(self.cross_attention(self.norm2(x), memory_kv, memory_bias))
        return x + self.dropout(self.feed_forward(self.norm3(x)))


class Transformer(nn.Module):
    """Encoder-decoder. `forward` trains (tokens to logits), `nll` is the loss per token, `generate` decodes."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = c = config
        self.embedding = nn.Embedding(c.vocab_size, c.d_model)
        self.encoder_bias = RelativePositionBias(c, bidirectional=True)
        self.decoder_bias = RelativePositionBias(c, bidirectional=False)
        self.encoder = nn.ModuleList(EncoderLayer(c) for _ in range(c.n_encoder_layers))
        self.decoder = nn.ModuleList(DecoderLayer(c) for _ in range(c.n_decoder_layers))
        self.encoder_norm, self.decoder_norm = RMSNorm(c.d_model), RMSNorm(c.d_model)
        self.output = None if c.tied else nn.Linear(c.d_model, c.vocab_size, bias=False)
        self.dropout = nn.Dropout(c.dropout)
        self.init_weights()

    def init_weights(self) -> None:
        """Mesh-TensorFlow's initialisation, as T5 has it: q absorbs the 1/sqrt(K) that attention leaves out."""
        c, inner = self.config, self.config.n_heads * self.config.d_kv
        std = {"q": (c.d_model * c.d_kv) ** -0.5, "kv": c.d_model**-0.5, "o": inner**-0.5, "wi": c.d_model**-0.5}
        std |= {"gate": c.d_model**-0.5, "wo": c.d_ff**-0.5, "output": 1.0, "embedding": 1.0}
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=std[name.split(".")[-1]])
        nn.init.normal_(self.embedding.weight, std=std["embedding"])
        for bias in (self.encoder_bias, self.decoder_bias):
            nn.init.normal_(bias.embedding.weight, std=c.d_model**-0.5)

    def padding_bias(self, input_ids: Tensor) -> Tensor:
        """(B, S) -> (B, 1, 1, S): 0 where a token stands, -inf where padding does, so that no query attends to it."""
        mask = input_ids == self.config.pad_id
        return torch.zeros(mask.shape, device=mask.device).masked_fill(mask, -math.inf)[:, None, None]

    def causal_bias(self, length: int) -> Tensor:
        """(1, H, length, length): the decoder's relative position bias, -inf where the key comes after the query."""
        future = torch.ones(length, length, dtype=torch.bool, device=self.embedding.weight.device).triu(1)
        return self.decoder_bias(length).masked_fill(future, -math.inf)

    def encode(self, input_ids: Tensor) -> Tensor:
        """(B, S) token ids, padded with pad_id -> (B, S, D). Rows of padding hold no meaning."""
        x = self.dropout(self.embedding(input_ids))
        bias = self.encoder_bias(input_ids.shape[1]) + self.padding_bias(input_ids)  # (B, H, S, S)
        for layer in self.encoder:
            x = layer(x, bias)
        return self.dropout(self.encoder_norm(x))

    def logits(self, x: Tensor) -> Tensor:  # (B, T, D) -> (B, T, V)
        x = self.dropout(self.decoder_norm(x))
        if self.output is not None:
            return self.output(x)
        return F.linear(x * self.config.d_model**-0.5, self.embedding.weight)  # tied: scaled by D^-0.5

    def shift_right(self, labels: Tensor) -> Tensor:
        """(B, T) -> (B, T): the decoder reads the start token (pad) and then every label but the last."""
        return F.pad(labels[:, :-1], (1, 0), value=self.config.pad_id)

    def forward(self, input_ids: Tensor, labels: Tensor) -> Tensor:
        """Teacher forcing: (B, S) source and (B, T) target, both padded with pad_id -> logits (B, T, V)."""
        memory, memory_bias = self.encode(input_ids), self.padding_bias(input_ids)
        x = self.dropout(self.embedding(self.shift_right(labels)))
        bias = self.causal_bias(labels.shape[1])
        for layer in self.decoder:
            x = layer(x, bias, layer.cross_attention.keys_values(memory), memory_bias)
        return self.logits(x)

    def nll(self, input_ids: Tensor, labels: Tensor) -> Tensor:
        """Nats of each target token: source (B, S), target (B, T) -> (B, T), 0 where the target is padding."""
        logits = self.forward(input_ids, labels).transpose(1, 2).float()  # (B, V, T)
        return F.cross_entropy(logits, labels, ignore_index=self.config.pad_id, reduction="none")

    @torch.no_grad()
    def generate(self, input_ids: Tensor, max_new_tokens: int, use_cache: bool = True) -> Tensor:
        """Greedy decoding: (B, S) -> (B, T) with T <= max_new_tokens, padded with pad_id after the end token.

        Always in eval mode, also when called in the middle of training: a label sampled with dropout on is not the
        label that the model would give at inference. Rows that are done leave the batch. `use_cache=False` runs the
        whole prefix at every step; it is slow, gives the same tokens, and says in five lines what decoding is.
        """
        was_training = self.training
        self.eval()
        tokens = (self.generate_cached if use_cache else self.generate_plain)(input_ids, max_new_tokens)
        self.train(was_training)
        return tokens

    def generate_plain(self, input_ids: Tensor, max_new_tokens: int) -> Tensor:
        tokens = input_ids.new_empty(len(input_ids), 0)
        done = torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
        while tokens.shape[1] < max_new_tokens and not done.all():
            blank = F.pad(tokens, (0, 1), value=self.config.pad_id)  # shifted right, the last column is never read
            new = self.forward(input_ids, blank)[:, -1].argmax(-1).masked_fill(done, self.config.pad_id)
            tokens = torch.cat([tokens, new[:, None]], dim=1)
            done |= new == self.config.eos_id
        return tokens

    def generate_cached(self, input_ids: Tensor, max_new_tokens: int) -> Tensor:
        c, size = self.config, len(input_ids)
        memory, memory_bias = self.encode(input_ids), self.padding_bias(input_ids)
        memory_kv = torch.stack([layer.cross_attention.keys_values(memory) for layer in self.decoder])
        cache = memory.new_empty(c.n_decoder_layers, 2, size, c.n_heads, max_new_tokens, c.d_kv)
        bias = self.causal_bias(max_new_tokens)
        out = input_ids.new_full((size, max_new_tokens), c.pad_id)
        rows = torch.arange(size, device=input_ids.device)  # which rows of `out` are still being written
        last = input_ids.new_full((size, 1), c.pad_id)
        for t in range(max_new_tokens):
            x = self.embedding(last)  # (B, 1, D)
            for layer, memory_kv_l, cache_l in zip(self.decoder, memory_kv, cache, strict=True):
                x = layer(x, bias[:, :, t : t + 1, : t + 1], memory_kv_l, memory_bias, cache_l, t)
            last = self.logits(x).argmax(-1)  # (B, 1)
            out[rows, t] = last[:, 0]
            alive = last[:, 0] != c.eos_id
            if not alive.all():
                if not alive.any():
                    return out[:, : t + 1]
                rows, last, memory_bias = rows[alive], last[alive], memory_bias[alive]
                memory_kv, cache = memory_kv[:, :, alive], cache[:, :, alive]
        return out
