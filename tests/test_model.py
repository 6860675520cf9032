"""model.py: weights, dropout, decoding, optimisers (that it computes what T5 does: test_t5.py)."""

import pytest
import torch
from torch import nn

from model import ModelConfig, Transformer

V10 = {"gated": False, "tied": True, "scaled": True}
V11 = {"gated": True, "tied": False, "scaled": False}
SHAPE = {"vocab_size": 30, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_heads": 2}
SHAPE |= {"num_layers": 2, "num_decoder_layers": 2}


def tiny(**options) -> Transformer:
    """A random model in eval mode."""
    torch.manual_seed(0)
    return Transformer(ModelConfig(**(SHAPE | options))).eval()


def random_ids(rows: int, length: int, seed: int = 0) -> torch.Tensor:
    """(rows, length) token ids, no padding and no end token among them."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(2, 30, (rows, length), generator=generator)


@pytest.mark.parametrize("variant", [V10, V11], ids=["v1.0", "v1.1"])
def test_initialisation_is_t5s(variant):
    """Catches a q without the 1/sqrt(K) that attention leaves out, and any other wrong scale."""
    torch.manual_seed(0)
    shape = SHAPE | {"vocab_size": 2000, "d_model": 64, "num_heads": 3, "d_kv": 16, "d_ff": 256}
    model = Transformer(ModelConfig(**shape | variant))
    stds = {"embedding": 1.0, "lm_head": 1.0, "q": (64 * 16) ** -0.5, "o": 48**-0.5, "wo": 1 / 16}
    for name, weight in model.named_parameters():
        part = name.split(".")[-2]
        if "norm" not in part:
            std = stds.get(part, 64**-0.5)
            sigma = std / (2 * weight.numel()) ** 0.5  # the error of a sample of that size
            assert weight.std().item() == pytest.approx(std, abs=5 * sigma), name


def test_dropout_stands_where_t5_has_it():
    """Catches a forgotten dropout: 4 at the ends of the stacks, 4 in a layer of the encoder, 6 in
    one of the decoder (attention: weights and output; feed-forward: inside and output)."""
    model = tiny(dropout=0.5)
    calls = []
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.register_forward_hook(lambda module, x, output: calls.append(module.p))
    model(random_ids(2, 5), random_ids(2, 4, seed=1))
    assert calls == [0.5] * (4 + 2 * 4 + 2 * 6)


@pytest.mark.parametrize("training", [True, False])
def test_generate_inside_a_training_step(training):
    """Catches labels sampled with dropout on, a graph that is kept, a mode that is not restored."""
    model = tiny(dropout=0.5)
    source = random_ids(8, 5)
    expected = model.generate(source, 6)
    graphs = []
    model.decoder[0].register_forward_hook(lambda _, x, output: graphs.append(output.requires_grad))
    model.train(training)
    assert model.generate(source, 6).equal(expected)
    assert graphs == [False] * 6
    assert {module.training for module in model.modules()} == {training}


# ---- The optimisers.
@pytest.mark.parametrize("name", ["muon", "adamw"])
def test_an_update_moves_each_weight_by_its_rate(name):
    """Catches a weight with no rate or two, one at 0 for ever, torch's scale of Muon (a fifth)."""
    model = tiny(**V11, d_model=32, d_ff=64)
    empty = model.encoder[0].self_attention
    nn.init.constant_(model.encoder_norm.weight, 7.0)
    nn.init.zeros_(empty.q.weight)  # as in some models; then k has no gradient yet
    optimizers = model.make_optimizers(name)
    before = {weight: weight.detach().clone() for weight in model.parameters()}
    model.nll(random_ids(8, 9), random_ids(8, 9, seed=1)).sum().backward()
    del before[empty.k.weight]
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            assert group["weight_decay"] == 0
            group["lr"] = 0.01 * group["relative_lr"]
        optimizer.step()
    biases = {model.encoder_bias.weight, model.decoder_bias.weight}
    for weight, old in before.items():
        moved = (weight - old)[weight.grad != 0].square().mean().sqrt().item()
        size = 3 if weight in biases else max(old.square().mean().sqrt().item(), 1e-3)
        size = 1 if name == "adamw" else size  # there all rates are the same
        assert moved == pytest.approx(0.01 * size, rel=0.3)
    layers = [*model.encoder.parameters(), *model.decoder.parameters()]
    matrices = {weight for weight in layers if weight.ndim == 2}
    assert name == "adamw" or matrices == {g["params"][0] for g in optimizers[0].param_groups}
