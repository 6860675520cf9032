"""A T5-shaped encoder-decoder in plain PyTorch: layers, loss, greedy decoding, T5 checkpoints.

T5: Raffel et al. 2020, arXiv 1910.10683, section 2.1. No linear layer has an additive bias; a
position bias, by the distance of query and key, is added to each attention score instead.
Letters: B batch, S source or keys, T target or queries, D width, H heads, K head width,
V vocabulary. The memory is the encoder's output, as the decoder reads it.
"""

import json
import math
from dataclasses import dataclass, fields, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class ModelConfig:
    """The shape of a model. The first seven names are those of a T5 config.json."""

    vocab_size: int  # V
    d_model: int  # D
    d_kv: int  # K
    d_ff: int  # inner width of feed-forward
    num_heads: int  # H
    num_layers: int  # of the encoder
    num_decoder_layers: int
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
    """Attention to the sequence itself or to the memory."""

    def __init__(self, c: ModelConfig):
        super().__init__()
        self.heads = (c.num_heads, c.d_kv)  # (H, K)
        inner = c.num_heads * c.d_kv
        # Scores are not divided by sqrt(K); instead, q starts smaller by that factor.
        self.q = linear(c.d_model, inner, std=(c.d_model * c.d_kv) ** -0.5)
        self.k = linear(c.d_model, inner, std=c.d_model**-0.5)
        self.v = linear(c.d_model, inner, std=c.d_model**-0.5)
        self.o = linear(inner, c.d_model, std=inner**-0.5)
        self.dropout = nn.Dropout(c.dropout)

    def keys_values(self, x: Tensor) -> Tensor:
        """The keys, then the values, of x: (B, S, D) -> (2, B, H, S, K)."""
        kv = torch.stack([self.k(x), self.v(x)])  # (2, B, S, H * K)
        return kv.unflatten(-1, self.heads).transpose(2, 3)

    def forward(self, x: Tensor, kv: Tensor, bias: Tensor) -> Tensor:
        """x (B, T, D), kv (2, B, H, S, K), bias that broadcasts to (B, H, T, S) -> (B, T, D)."""
        q = self.q(x).unflatten(-1, self.heads).transpose(1, 2)  # (B, H, T, K)
        scores = q @ kv[0].mT + bias  # (B, H, T, K) @ (B, H, K, S) + bias -> (B, H, T, S)
        weights = self.dropout(scores.softmax(-1))
        y = weights @ kv[1]  # (B, H, T, S) @ (B, H, S, K) -> (B, H, T, K)
        y = y.transpose(1, 2).flatten(2)  # (B, T, H * K)
        return self.dropout(self.o(y))


class FeedForward(nn.Module):
    """T5 v1.0: relu(x W_i) W_o. T5 v1.1: (gelu(x W_i) * x gate) W_o (arXiv 2002.05202)."""

    def __init__(self, c: ModelConfig):
        super().__init__()
        self.gated = c.gated
        self.wi = linear(c.d_model, c.d_ff, std=c.d_model**-0.5)
        if c.gated:
            self.gate = linear(c.d_model, c.d_ff, std=c.d_model**-0.5)
        self.wo = linear(c.d_ff, c.d_model, std=c.d_ff**-0.5)
        self.dropout = nn.Dropout(c.dropout)

    def forward(self, x: Tensor) -> Tensor:  # (B, T, D) -> (B, T, D)
        h = self.wi(x)  # (B, T, d_ff)
        if self.gated:
            h = F.gelu(h, approximate="tanh") * self.gate(x)
        else:
            h = F.relu(h)
        return self.dropout(self.wo(self.dropout(h)))


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
        """x (B, T, D) -> (B, T, D); memory_kv (2, B, H, S, K) is given in the decoder alone."""
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
        self.encoder_bias = nn.Embedding(c.n_buckets, c.num_heads)  # one for all encoder layers
        self.decoder_bias = nn.Embedding(c.n_buckets, c.num_heads)
        nn.init.normal_(self.encoder_bias.weight, std=c.d_model**-0.5)
        nn.init.normal_(self.decoder_bias.weight, std=c.d_model**-0.5)
        self.encoder = nn.ModuleList([Layer(c, cross=False) for _ in range(c.num_layers)])
        self.decoder = nn.ModuleList([Layer(c, cross=True) for _ in range(c.num_decoder_layers)])
        self.encoder_norm = nn.RMSNorm(c.d_model, eps=1e-6)
        self.decoder_norm = nn.RMSNorm(c.d_model, eps=1e-6)
        self.dropout = nn.Dropout(c.dropout)
        if not c.tied:
            self.lm_head = linear(c.d_model, c.vocab_size, std=1.0)

    def make_optimizers(self, name: str) -> list[torch.optim.Optimizer]:
        """adamw as in the paper; muon: Muon for the layers' matrices and Adam for the rest.

        Muon (Jordan et al. 2024) makes the mean gradient orthogonal: what is rare is learned as
        fast as what is frequent. Rates are relative to the tensors' sizes (RMS) at this time, as
        in T5's own optimiser (arXiv 1804.04235): in T5 sizes differ a hundredfold.
        """
        if name == "adamw":
            group = {"params": list(self.parameters()), "relative_lr": 1.0}
            return [torch.optim.AdamW([group], weight_decay=0.0)]
        layers = {*self.encoder.parameters(), *self.decoder.parameters()}
        matrices, others = [], []
        for weight in self.parameters():
            rms = weight.detach().square().mean().sqrt().clamp(min=1e-3).item()
            if weight is self.encoder_bias.weight or weight is self.decoder_bias.weight:
                rms = 3.0  # they start near 0; attention to a neighbour needs several units
            if weight in layers and weight.ndim == 2:
                matrices.append({"params": [weight], "relative_lr": 5 * rms})  # Muon has * 0.2
            else:
                others.append({"params": [weight], "relative_lr": rms})
        settings = {"momentum": 0.8, "nesterov": False, "ns_steps": 3, "weight_decay": 0.0}
        muon = torch.optim.Muon(matrices, adjust_lr_fn="match_rms_adamw", **settings)
        return [muon, torch.optim.Adam(others, betas=(0.8, 0.95))]

    def padding_bias(self, input_ids: Tensor) -> Tensor:
        """(B, S) -> (B, 1, 1, S): -inf at padding, which nothing may attend to, else 0."""
        padding = (input_ids == self.config.pad_id)[:, None, None]
        return torch.where(padding, -math.inf, 0.0)

    def position_bias(self, length: int, causal: bool) -> Tensor:
        """(1, H, query, key), by distance; causal (the decoder's): -inf at later keys."""
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
        """(B, S) token ids -> (B, S, D). Outputs at padding mean nothing."""
        x = self.dropout(self.embedding(input_ids))
        bias = self.position_bias(input_ids.shape[1], causal=False)  # (1, H, S, S)
        bias = bias + self.padding_bias(input_ids)  # (B, H, S, S)
        for layer in self.encoder:
            x = layer(x, bias)
        return self.dropout(self.encoder_norm(x))

    def decoder_states(self, input_ids: Tensor, target_ids: Tensor) -> Tensor:
        """Teacher forcing: source (B, S), target (B, T) -> (B, T, D), not yet normed."""
        memory = self.encode(input_ids)  # (B, S, D)
        memory_bias = self.padding_bias(input_ids)  # (B, 1, 1, S)
        bias = self.position_bias(target_ids.shape[1], causal=True)  # (1, H, T, T)
        shifted = F.pad(target_ids[:, :-1], (1, 0), value=self.config.pad_id)
        x = self.dropout(self.embedding(shifted))
        for layer in self.decoder:
            x = layer(x, bias, layer.cross_attention.keys_values(memory), memory_bias)
        return x

    def logits(self, x: Tensor) -> Tensor:
        """The last norm and the output layer: (..., D) -> (..., V)."""
        x = self.dropout(self.decoder_norm(x))
        if self.config.scaled:
            x = x * self.config.d_model**-0.5
        layer = self.embedding if self.config.tied else self.lm_head
        return F.linear(x, layer.weight)

    def forward(self, input_ids: Tensor, target_ids: Tensor) -> Tensor:
        """Logits of each target token: source (B, S), target (B, T) -> (B, T, V)."""
        return self.logits(self.decoder_states(input_ids, target_ids))

    def nll(self, input_ids: Tensor, target_ids: Tensor) -> Tensor:
        """-ln p of each target token, in nats: (B, S), (B, T) -> (B, T), 0 at padding."""
        real = target_ids != self.config.pad_id  # (B, T)
        x = self.decoder_states(input_ids, target_ids)[real]  # (N, D): no logits at padding
        logits = self.logits(x).float()  # (N, V)
        nll = torch.zeros(target_ids.shape, device=x.device)
        nll[real] = F.cross_entropy(logits, target_ids[real], reduction="none")
        return nll

    @torch.no_grad()
    def generate(self, input_ids: Tensor, max_new_tokens: int) -> Tensor:
        """Greedy decoding, never with dropout: (B, S) -> (B, max_new_tokens), padded."""
        was_training = self.training
        self.eval()
        c = self.config
        rows = torch.arange(len(input_ids), device=input_ids.device)  # of those still computed
        memory = self.encode(input_ids)  # (B, S, D)
        memory_bias = self.padding_bias(input_ids)  # (B, 1, 1, S)
        memory_kvs = [layer.cross_attention.keys_values(memory) for layer in self.decoder]
        memory_kv = torch.stack(memory_kvs)  # (layers, 2, B, H, S, K)
        cache = memory_kv.new_empty(*memory_kv.shape[:4], max_new_tokens, c.d_kv)
        bias = self.position_bias(max_new_tokens, causal=True)  # (1, H, T, T)
        tokens = input_ids.new_full((len(rows), max_new_tokens + 1), c.pad_id)  # [:, 0]: start
        done = torch.zeros_like(rows, dtype=torch.bool)
        for t in range(max_new_tokens):
            x = self.embedding(tokens[rows, t])[:, None]  # (rows, 1, D)
            for i, layer in enumerate(self.decoder):
                x = layer(x, bias[:, :, t, None, : t + 1], memory_kv[i], memory_bias, cache[i], t)
            new = self.logits(x)[:, 0].argmax(-1).masked_fill(done, c.pad_id)  # (rows,)
            tokens[rows, t + 1] = new
            done = done | (new == c.eos_id)
            stay = torch.where(~done)[0]  # places in `rows` and `done`, not numbers of rows
            if len(stay) == 0:
                break
            if len(stay) <= 0.75 * len(done):  # not one by one: it copies the cache
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
    "wi_0": "wi",
    "wi_1": "gate",
    "layer.0.layer_norm": "self_norm",
    "layer.1.layer_norm": "cross_norm",
    "layer.2.layer_norm": "ff_norm",
}


def read_t5_config(file: Path, dropout: float) -> ModelConfig:
    """The shape in a T5 config.json. Raises ValueError if it is not ours."""
    t5 = json.loads(file.read_text(encoding="utf-8"))
    allowed = {"model_type": ["t5"], "feed_forward_proj": ["relu", "gated-gelu"]}
    allowed |= {"layer_norm_epsilon": [1e-6], "decoder_start_token_id": [0]}
    allowed |= {"pad_token_id": [0], "eos_token_id": [1]}
    for key, values in allowed.items():  # a missing key means the first, T5's default
        if t5.get(key, values[0]) not in values:
            raise ValueError(f"{key} is {t5[key]!r}, and only {values} can be loaded")
    t5["num_decoder_layers"] = t5.get("num_decoder_layers") or t5["num_layers"]
    sizes = [t5[field.name] for field in fields(ModelConfig)[:7]]
    buckets = [t5["relative_attention_num_buckets"], t5.get("relative_attention_max_distance", 128)]
    gated = t5.get("feed_forward_proj") == "gated-gelu"
    tied = t5.get("tie_word_embeddings", True)
    scaled = t5.get("scale_decoder_outputs", tied)  # a key of transformers 5
    return ModelConfig(*sizes, dropout, *buckets, gated, tied, scaled)


def rename_t5(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights of a T5 under our names, in float32."""
    state = {}
    for name, weight in weights.items():
        if "embed_tokens" in name or "EncDecAttention.relative_attention_bias" in name:
            continue  # copies of the embedding; a bias of v1.0 that no layer uses
        if name.startswith("encoder"):
            name = name.replace(".layer.1.", ".layer.2.")  # feed-forward, as in the decoder
        for part, ours in T5_NAMES.items():
            name = name.replace(part, ours)
        state[name] = weight.float()
    return state


def load_t5(folder: Path, dropout: float = 0.0) -> Transformer:
    """A T5 v1.0, v1.1 or Flan-T5 from Hugging Face. Raises what its files raise."""
    config = read_t5_config(folder / "config.json", dropout)
    if (folder / "model.safetensors").exists():
        from safetensors.torch import load_file  # an extra package, for such files alone

        weights = load_file(folder / "model.safetensors")
    else:  # weights_only: runs no code
        weights = torch.load(folder / "pytorch_model.bin", map_location="cpu", weights_only=True)
    state = rename_t5(weights)
    if config.tied and "lm_head.weight" in state:  # transformers 5 calls all T5s tied
        if state["lm_head.weight"].equal(state["embedding.weight"]):
            del state["lm_head.weight"]
        else:
            config = replace(config, tied=False)
    with torch.device("meta"):  # the weights come from the file
        model = Transformer(config)
    model.load_state_dict(state, assign=True)
    return model
