"""A T5-shaped encoder-decoder in plain PyTorch: config, layers, loss, greedy decoding with a cache, T5 checkpoints.

The shape is that of T5 (Raffel et al. 2020, arXiv 1910.10683, section 2.1): pre-norm RMSNorm without bias, relative
position buckets instead of position embeddings, attention that is not scaled by 1/sqrt(K), one embedding for the
encoder, the decoder and the output. T5 v1.1 and Flan-T5 have a gated GELU and an output layer of their own, not scaled:
`gated=True, tied=False, scaled=False`.

Letters: B batch, S source length, T target length, D width, H heads, K head width, V vocabulary.
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
    scaled: bool = True  # True: times D^-0.5 before the output layer (T5 v1.0)
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
        x = x * self.config.d_model**-0.5 if self.config.scaled else x
        return F.linear(x, (self.output or self.embedding).weight)

    def shift_right(self, labels: Tensor) -> Tensor:
        """(B, T) -> (B, T): the decoder reads the start token (pad) and then every label but the last."""
        return F.pad(labels[:, :-1], (1, 0), value=self.config.pad_id)

    def decode(self, input_ids: Tensor, labels: Tensor) -> Tensor:
        """Teacher forcing: (B, S) source and (B, T) target, both padded with pad_id -> (B, T, D)."""
        memory, memory_bias = self.encode(input_ids), self.padding_bias(input_ids)
        x = self.dropout(self.embedding(self.shift_right(labels)))
        bias = self.causal_bias(labels.shape[1])
        for layer in self.decoder:
            x = layer(x, bias, layer.cross_attention.keys_values(memory), memory_bias)
        return x

    def forward(self, input_ids: Tensor, labels: Tensor) -> Tensor:
        """The logits of each target token: (B, S), (B, T) -> (B, T, V)."""
        return self.logits(self.decode(input_ids, labels))

    def nll(self, input_ids: Tensor, labels: Tensor) -> Tensor:
        """Nats of each target token: source (B, S), target (B, T) -> (B, T), 0 where the target is padding.

        Only the N real tokens meet the output layer, a fifth of the work of a step: (N, D) -> (N, V).
        """
        real = labels != self.config.pad_id
        logits = self.logits(self.decode(input_ids, labels)[real])
        nats = logits.new_zeros(labels.shape, dtype=torch.float32)
        return nats.masked_scatter(real, F.cross_entropy(logits.float(), labels[real], reduction="none"))

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
        last = input_ids.new_full((size,), c.pad_id)
        done = torch.zeros_like(last, dtype=torch.bool)
        for t in range(max_new_tokens):
            x = self.embedding(last)[:, None]  # (B, 1, D)
            for layer, memory_kv_l, cache_l in zip(self.decoder, memory_kv, cache, strict=True):
                x = layer(x, bias[:, :, t : t + 1, : t + 1], memory_kv_l, memory_bias, cache_l, t)
            last = self.logits(x)[:, 0].argmax(-1).masked_fill(done, c.pad_id)  # (B,)
            out[rows, t] = last
            done |= last == c.eos_id
            left = len(done) - int(done.sum())
            if left == 0:
                return out[:, : t + 1]
            if left <= 0.75 * len(done):  # not at once: leaving costs a copy of all caches
                stay = (~done).nonzero()[:, 0]
                rows, last, done, memory_bias = rows[stay], last[stay], done[stay], memory_bias[stay]
                memory_kv, cache = memory_kv.index_select(2, stay), cache.index_select(2, stay)
        return out


# ---------------------------------------------------------------------------------------------------------------------
# T5 checkpoints in the Hugging Face layout: every size of v1.0, v1.1 and Flan-T5.

WEIGHT_FILES = tuple(name + end for name in ("model.safetensors", "pytorch_model.bin") for end in ("", ".index.json"))


def read_t5_config(path: Path, dropout: float = 0.0) -> ModelConfig:
    """The shape that a config.json describes. Raises ValueError if it is none of T5's, or not there."""
    try:
        c = {"feed_forward_proj": "relu", "layer_norm_epsilon": 1e-6, "decoder_start_token_id": 0}
        c = {**c, "num_decoder_layers": None, **json.loads(path.read_text(encoding="utf-8"))}
        sizes = [c[key] for key in ("vocab_size", "d_model", "num_heads", "d_kv", "d_ff", "num_layers")]
        sizes.append(c["num_layers"] if c["num_decoder_layers"] is None else c["num_decoder_layers"])
        buckets = [c["relative_attention_num_buckets"], c.get("relative_attention_max_distance", 128)]
        fixed = {
            "model_type": ("t5", "mt5"),
            "feed_forward_proj": ("relu", "gated-gelu"),
            "layer_norm_epsilon": (1e-6,),
        }
        fixed |= {"pad_token_id": (0,), "eos_token_id": (1,), "decoder_start_token_id": (0,)}
        for key, allowed in fixed.items():
            if c[key] not in allowed:
                raise ValueError(f"{key} is {c[key]!r}, and only {' or '.join(map(repr, allowed))} can be loaded")
        if not all(type(size) is int and 0 < size < 2**24 for size in sizes + buckets):
            raise ValueError("a size is not a whole number from 1 to 2^24")
        if buckets[0] < 4 or buckets[1] <= buckets[0] // 2:
            raise ValueError(f"{buckets[0]} relative position buckets up to distance {buckets[1]}: too few or too near")
        gated, tied = c["feed_forward_proj"] == "gated-gelu", bool(c.get("tie_word_embeddings", True))
        scaled = bool(c.get("scale_decoder_outputs", tied))  # a key of transformers 5; before, tied said both
        return ModelConfig(*sizes, dropout, *buckets, gated, tied, scaled)
    except OSError as e:
        raise ValueError(f"{path}: {e.strerror}; a T5 folder holds config.json, spiece.model and weights") from None
    except KeyError as e:
        raise ValueError(f"{path}: no {e}; give the config.json of a T5 checkpoint, unchanged") from None
    except (ValueError, TypeError, RecursionError) as e:
        raise ValueError(f"{path}: not the config.json of a T5 checkpoint: {e}") from None


def read_weights(file: Path) -> dict[str, Tensor]:
    """One weight file. Raises ValueError. A pickle (.bin) is read with weights_only=True: it cannot run code."""
    try:
        if file.suffix == ".safetensors":
            from safetensors.torch import load_file  # needed by those alone who have such a file

            return load_file(file)
        weights = torch.load(file, map_location="cpu", weights_only=True)
        if not all(w.is_floating_point() and w.layout is torch.strided for w in weights.values()):
            raise TypeError("something else than weights")
        return weights
    except ImportError:
        raise ValueError(f"{file}: this format needs one more package: pip install safetensors") from None
    except FileNotFoundError:
        raise ValueError(f"{file}: no such file; fetch the checkpoint again") from None
    except Exception as e:  # a damaged file raises half a dozen types, some of them the library's own
        raise ValueError(f"{file}: cannot be read as weights ({type(e).__name__}); fetch it again") from None


def t5_names(name: str, gated: bool) -> list[str]:
    """The T5 weights that our weight `name` is made of, one below the other: keys and values are one matrix here."""
    bias = "block.0.layer.0.SelfAttention.relative_attention_bias"
    top = {"embedding": "shared", "output": "lm_head", "encoder_norm": "encoder.final_layer_norm"}
    top |= {"decoder_norm": "decoder.final_layer_norm", "encoder_bias.embedding": f"encoder.{bias}"}
    top |= {"decoder_bias.embedding": f"decoder.{bias}"}
    name = name.removesuffix(".weight")
    if name in top:
        return [top[name] + ".weight"]
    stack, block, part, *leaf = name.split(".")
    if part.startswith("norm"):
        return [f"{stack}.block.{block}.layer.{int(part[4:]) - 1}.layer_norm.weight"]
    layer, kind = {"self_attention": (0, "SelfAttention"), "cross_attention": (1, "EncDecAttention")}.get(
        part, (1 + (stack == "decoder"), "DenseReluDense")
    )
    leaves = {"kv": ["k", "v"], "gate": ["wi_0"], "wi": ["wi_1" if gated else "wi"]}.get(leaf[0], leaf)
    return [f"{stack}.block.{block}.layer.{layer}.{kind}.{leaf}.weight" for leaf in leaves]


def load_t5(folder: Path, dropout: float = 0.0) -> Transformer:
    """A T5 v1.0, v1.1 or Flan-T5 checkpoint in float32, its weights mapped by name; `dropout` instead of its own.

    Raises ValueError for a weight that is missing, left over, or of another shape than config.json says, by its name.
    """
    config = read_t5_config(folder / "config.json", dropout)
    path = next((folder / name for name in WEIGHT_FILES if (folder / name).exists()), None)
    if path is None:
        raise ValueError(f"{folder}: no weights; it needs one of {', '.join(WEIGHT_FILES)}")
    files, found = [path.name], {}
    if path.suffix == ".json":
        try:
            files = sorted(set(json.loads(path.read_text(encoding="utf-8"))["weight_map"].values()))
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise ValueError(f"{path}: not an index of weight files; fetch it again") from None
    for file in files:
        if not isinstance(file, str) or Path(file).name != file:  # an index from a stranger
            raise ValueError(f"{path}: names the file {file!r}, which is not beside it")
        found |= read_weights(folder / file)
    # Names that T5 files may hold besides: copies of the embedding, and a bias of v1.0 that no layer uses.
    for copy in ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight"):
        if copy in found:
            found.setdefault("shared.weight", found.pop(copy))
    found.pop("decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight", None)
    if config.tied and "lm_head.weight" in found:  # transformers 5 says tied of every T5; the file knows better
        same = "shared.weight" in found and torch.equal(found["lm_head.weight"], found["shared.weight"])
        config = replace(config, tied=same)
        found.pop("lm_head.weight" if same else "", None)

    with torch.device("meta"):  # the shape alone; the memory is that of the weights read
        model = Transformer(config)
    state = {}
    for name, parameter in model.named_parameters():
        names = t5_names(name, config.gated)
        for t5_name in names:
            shape, tensor = (parameter.shape[0] // len(names), *parameter.shape[1:]), found.get(t5_name)
            if tensor is None:
                raise ValueError(f"{path}: the weight {t5_name} is missing; fetch the checkpoint again")
            if tensor.shape != shape:
                was = f"has shape {tuple(tensor.shape)}, config.json says {tuple(shape)}"
                raise ValueError(f"{path}: the weight {t5_name} {was}")
        state[name] = torch.cat([found.pop(t5_name) for t5_name in names]).float()
    if found:
        raise ValueError(f"{path}: the weight {min(map(str, found))!r} has no place in a T5 of this config.json")
    model.load_state_dict(state, assign=True)
    return model
