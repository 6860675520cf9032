"""model.py: each test names the bug it catches. Models are tiny; peers (transformers) are optional."""

import math
from functools import cache

import pytest
import torch

from model import Attention, ModelConfig, RelativePositionBias, RMSNorm, Transformer, relative_position_bucket

VARIANTS = [{}, {"gated": True, "tied": False, "scaled": False}, {"gated": True}, {"tied": False, "scaled": False}]
variants = pytest.mark.parametrize("variant", VARIANTS, ids=["relu-tied", "gated-untied", "gated-tied", "relu-untied"])


def tiny(seed: int = 0, **options) -> Transformer:
    """A random model in eval mode; norms and position biases are random too, so that none of them can go missing."""
    shape = {"vocab_size": 30, "d_model": 16, "n_heads": 2, "d_kv": 8, "d_ff": 32, "dropout": 0.0}
    torch.manual_seed(seed)
    model = Transformer(ModelConfig(**(shape | options)))
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, RMSNorm):
                module.weight.uniform_(0.5, 1.5)
            elif isinstance(module, RelativePositionBias):
                module.embedding.weight.normal_()
    return model.eval()


def random_ids(rows: int, length: int, vocab_size: int = 30, seed: int = 0) -> torch.Tensor:
    """(rows, length) token ids, no padding and no end token among them."""
    return torch.randint(2, vocab_size, (rows, length), generator=torch.Generator().manual_seed(seed))


def pad_tail(ids: torch.Tensor, lengths: list[int]) -> torch.Tensor:
    return ids.masked_fill(torch.arange(ids.shape[1]) >= torch.tensor(lengths)[:, None], 0)


@cache
def talkative(seed: int, **variant) -> tuple[Transformer, torch.Tensor]:
    """A model trained for a moment on targets of 1 to 9 tokens, and 24 sources: rows stop early, late and never."""
    model, lengths = tiny(seed, **variant).train(), [1 + i % 9 for i in range(16)]
    source, labels = (
        pad_tail(random_ids(16, 6, seed=seed), [6 - i % 5 for i in range(16)]),
        random_ids(16, 9, seed=seed),
    )
    labels = pad_tail(labels, lengths)
    labels[torch.arange(16), torch.tensor(lengths) - 1] = 1
    adam = torch.optim.Adam(model.parameters(), lr=0.02)
    for _ in range(20):
        adam.zero_grad()
        model.nll(source, labels).sum().backward()
        adam.step()
    return model.eval(), torch.cat([source, random_ids(8, 6, seed=seed + 9)])


def end_of(tokens: torch.Tensor) -> list[int]:
    """Per row the number of tokens up to and with the end token; the full length where there is none."""
    return [row.index(1) + 1 if 1 in row else len(row) for row in tokens.tolist()]


# ---------------------------------------------------------------------------------------------------------------------
# Masks and padding.


@variants
def test_causality_later_targets_do_not_change_earlier_logits(variant):
    """Catches a missing or shifted causal mask: the decoder would read the token that it has to predict."""
    model, source, labels = tiny(**variant), random_ids(2, 7), random_ids(2, 6, seed=1)
    before = model(source, labels)
    for t in range(6):
        changed = labels.clone()
        changed[:, t] = (labels[:, t] - 1) % 28 + 2
        after = model(source, changed)
        torch.testing.assert_close(after[:, : t + 1], before[:, : t + 1])
        assert t == 5 or not torch.allclose(after[:, t + 1], before[:, t + 1])


def test_decoder_sees_every_earlier_target():
    """Catches a causal mask that hides too much, such as the token right before or all but it."""
    model, source, labels = tiny(n_decoder_layers=1), random_ids(1, 7), random_ids(1, 6, seed=1)
    before = model(source, labels)[0, -1]
    for t in range(5):
        changed = labels.clone()
        changed[:, t] = (labels[:, t] - 1) % 28 + 2
        assert not torch.allclose(model(source, changed)[0, -1], before)


def test_encoder_reads_both_sides():
    """Catches a causal mask in the encoder: its first state must depend on the last token and the reverse."""
    model, source = tiny(n_encoder_layers=1), random_ids(1, 5)
    states = model.encode(source)
    for changed, seen in ((4, 0), (0, 4)):
        other = source.clone()
        other[0, changed] = source[0, changed] % 28 + 2
        assert not torch.allclose(model.encode(other)[0, seen], states[0, seen])


@variants
def test_source_padding_does_not_change_the_loss(variant):
    """Catches padding that is attended to in the encoder or the cross-attention."""
    model, lengths = tiny(**variant), [9, 4, 1, 6]
    source, labels = pad_tail(random_ids(4, 9), lengths), random_ids(4, 5, seed=1)
    together = model.nll(source, labels)
    for i, n in enumerate(lengths):
        torch.testing.assert_close(together[i : i + 1], model.nll(source[i : i + 1, :n], labels[i : i + 1]))


@pytest.mark.parametrize("use_cache", [True, False])
def test_source_padding_does_not_change_generated_tokens(use_cache):
    """Catches decoding that attends to padding, or keeps the wrong rows' masks when rows leave the batch."""
    for seed in range(2):
        model, source = talkative(seed)
        together = model.generate(source, 8, use_cache)
        for i, n in enumerate((source != 0).sum(1).tolist()):
            alone = model.generate(source[i : i + 1, :n], 8, use_cache)
            assert together[i, : alone.shape[1]].tolist() == alone[0].tolist()
            assert not together[i, alone.shape[1] :].any()


def test_target_padding_adds_nothing_to_the_loss():
    """Catches padded target positions that are scored, or that change the loss of real ones."""
    model, source, lengths = tiny(), random_ids(3, 6), [5, 2, 3]
    labels = pad_tail(random_ids(3, 5, seed=1), lengths)
    nll = model.nll(source, labels)
    assert (nll == 0).tolist() == (labels == 0).tolist()
    for i, n in enumerate(lengths):
        torch.testing.assert_close(nll[i : i + 1, :n], model.nll(source[i : i + 1], labels[i : i + 1, :n]))


def test_empty_target_has_zero_loss_and_finite_gradient():
    """Catches a NaN from a row without target tokens (an example without rationale)."""
    model = tiny()
    model.nll(random_ids(2, 4), torch.tensor([[5, 1], [0, 0]])).sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())
    assert not model.nll(random_ids(2, 4), torch.zeros(2, 1, dtype=torch.long)).any()


# ---------------------------------------------------------------------------------------------------------------------
# Parts, by hand.


def test_shift_right_is_off_by_exactly_one():
    """Catches a decoder input shifted by none or two, or one that starts with something else than padding."""
    assert tiny().shift_right(torch.tensor([[7, 8, 1], [9, 1, 0]])).tolist() == [[0, 7, 8], [0, 9, 1]]


@pytest.mark.parametrize(
    ("bidirectional", "table"),
    [
        # 8 buckets, max_distance 16. One side: 0..3 exact, then 4 + floor(4 ln(d/4)/ln 4): 4, 5 -> 4; 6, 7 -> 5;
        # 8..11 -> 6; 12.. -> 7. A key to the right of the query counts as distance 0.
        (False, {0: 0, -1: 1, -2: 2, -3: 3, -4: 4, -5: 4, -6: 5, -7: 5, -8: 6, -11: 6, -12: 7, -15: 7, -16: 7,
                 -17: 7, -1000: 7, 1: 0, 5: 0, 1000: 0}),
        # Four buckets a side: 0, 1 exact, then 2 + floor(2 ln(d/2)/ln 8): 2..5 -> 2; 6.. -> 3. The right side adds 4.
        (True, {0: 0, -1: 1, -2: 2, -5: 2, -6: 3, -15: 3, -16: 3, -17: 3, -1000: 3, 1: 5, 2: 6, 5: 6, 6: 7, 16: 7,
                1000: 7}),
    ],
)  # fmt: skip
def test_relative_position_bucket_table(bidirectional, table):
    """Catches buckets off by one, sides swapped, and distances past max_distance that leave the table."""
    buckets = relative_position_bucket(torch.tensor(list(table)), bidirectional, 8, 16)
    assert dict(zip(table, buckets.tolist(), strict=True)) == table


@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize(("n_buckets", "max_distance"), [(32, 128), (8, 20), (16, 64)])
def test_relative_position_bucket_equals_transformers(bidirectional, n_buckets, max_distance):
    """Catches buckets that differ from T5's, which would make its checkpoints useless."""
    t5 = pytest.importorskip("transformers.models.t5.modeling_t5")
    distance = torch.arange(-300, 301)
    expected = t5.T5Attention._relative_position_bucket(distance, bidirectional, n_buckets, max_distance)
    assert relative_position_bucket(distance, bidirectional, n_buckets, max_distance).equal(expected)


def test_position_bias_is_key_minus_query():
    """Catches a transposed bias: a key to the right of the query must take a bucket of the right side."""
    bias = RelativePositionBias(ModelConfig(30, n_heads=1, n_buckets=8, max_distance=16), bidirectional=True)
    with torch.no_grad():
        bias.embedding.weight.copy_(torch.arange(8.0)[:, None])
    assert bias(3)[0, 0].tolist() == [[0, 5, 6], [1, 0, 5], [2, 1, 0]]


def test_attention_is_not_scaled():
    """Catches a division by sqrt(K): T5 leaves it out. One head, K = 4, all projections the identity."""
    attention = Attention(ModelConfig(30, d_model=4, n_heads=1, d_kv=4, dropout=0.0))
    with torch.no_grad():
        attention.q.weight.copy_(torch.eye(4))
        attention.kv.weight.copy_(torch.cat([torch.eye(4), torch.eye(4)]))
        attention.o.weight.copy_(torch.eye(4))
    x = torch.tensor([[[1.0, 0, 0, 0], [0, 1, 0, 1]]])
    y = attention(x, attention.keys_values(x), torch.tensor([[[[0.0, 0.5], [0, 0]]]]))
    # Row 1: scores 1 and 0 plus bias 0 and .5 -> weights s = sigmoid(1 - .5) and 1 - s. Row 2: scores 0 and 2.
    s, r = 1 / (1 + math.exp(-0.5)), 1 / (1 + math.exp(2))
    torch.testing.assert_close(y, torch.tensor([[[s, 1 - s, 0, 1 - s], [r, 1 - r, 0, 1 - r]]]))


def test_attention_keeps_heads_apart():
    """Catches a wrong reshape: with the second head's output cut off, its queries, keys and values must not matter."""
    torch.manual_seed(0)
    attention = Attention(ModelConfig(30, d_model=8, n_heads=2, d_kv=3, dropout=0.0))
    x, bias = torch.randn(2, 5, 8), torch.zeros(1, 1, 5, 5)
    with torch.no_grad():
        attention.o.weight[:, 3:] = 0
        before = attention(x, attention.keys_values(x), bias)
        for weight in (attention.q.weight[3:], attention.kv.weight[3:6], attention.kv.weight[9:]):
            weight.normal_()
        torch.testing.assert_close(attention(x, attention.keys_values(x), bias), before)


def test_rmsnorm_by_hand():
    """Catches a subtracted mean, a sum for a mean, or a missing weight: sqrt((9 + 16) / 2) = 3.5355."""
    norm = RMSNorm(2)
    with torch.no_grad():
        norm.weight.copy_(torch.tensor([1.0, 2.0]))
    torch.testing.assert_close(norm(torch.tensor([[3.0, 4.0]])), torch.tensor([[3 / 12.5**0.5, 8 / 12.5**0.5]]))


def test_rmsnorm_of_bfloat16_computes_in_float32():
    """Catches statistics in bfloat16: the square of 300 has more digits than it holds."""
    x = torch.tensor([[300.0, 2.0, 1.0]], dtype=torch.bfloat16)
    norm = RMSNorm(3).to(torch.bfloat16)
    torch.testing.assert_close(norm(x), RMSNorm(3)(x.float()).to(torch.bfloat16), rtol=0, atol=0)


def test_tied_output_is_the_embedding_scaled():
    """Catches a tied output without the factor D^-0.5, which makes the first losses enormous."""
    model, x = tiny(), torch.randn(1, 3, 16)
    torch.testing.assert_close(model.logits(x), model.decoder_norm(x) @ model.embedding.weight.T / 4)  # sqrt(16) = 4


def test_untied_output_is_not_scaled():
    """Catches the tied factor being applied to T5 v1.1's own output layer."""
    model, x = tiny(tied=False, scaled=False), torch.randn(1, 3, 16)
    torch.testing.assert_close(model.logits(x), model.decoder_norm(x) @ model.output.weight.T)


def test_nll_is_minus_log_softmax_at_the_target():
    """Catches a loss that is averaged, in bits, or of another position's target."""
    model, source, labels = tiny(), random_ids(2, 5), random_ids(2, 4, seed=1)
    logits, nll = model(source, labels), model.nll(source, labels)
    for b in range(2):
        for t in range(4):
            row = logits[b, t].tolist()
            expected = math.log(sum(map(math.exp, row))) - row[labels[b, t]]
            assert nll[b, t].item() == pytest.approx(expected, abs=1e-5)


def test_initialisation_is_t5s():
    """Catches an initial q without the 1/sqrt(K) that attention leaves out, and any other wrong scale."""
    model = Transformer(ModelConfig(2000, d_model=64, n_heads=4, d_kv=16, d_ff=256, gated=True, tied=False))
    layer = model.decoder[1]
    for weight, std in [
        (layer.self_attention.q.weight, (64 * 16) ** -0.5),
        (layer.cross_attention.kv.weight, 64**-0.5),
        (layer.cross_attention.o.weight, (4 * 16) ** -0.5),
        (layer.feed_forward.gate.weight, 64**-0.5),
        (layer.feed_forward.wi.weight, 64**-0.5),
        (layer.feed_forward.wo.weight, 256**-0.5),
        (model.embedding.weight, 1.0),
        (model.output.weight, 1.0),
        (model.encoder_bias.embedding.weight, 64**-0.5),
    ]:
        sigma = std / (2 * weight.numel()) ** 0.5  # of the standard deviation of that many normal numbers
        assert weight.std().item() == pytest.approx(std, abs=5 * sigma)


def test_same_seed_gives_same_weights():
    """Catches weights that do not follow the seed, or that follow nothing else."""
    one, two, other = (tiny(seed).state_dict() for seed in (0, 0, 1))
    assert all(one[name].equal(two[name]) for name in one)
    assert not one["embedding.weight"].equal(other["embedding.weight"])


@variants
def test_every_weight_gets_a_gradient(variant):
    """Catches a layer that is built and never used."""
    model = tiny(**variant)
    model.nll(random_ids(4, 6), random_ids(4, 5, seed=1)).sum().backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_dropout_acts_in_training_only():
    """Catches dropout that does nothing in training, or that stays on in eval mode."""
    model, source, labels = tiny(dropout=0.5), random_ids(2, 5), random_ids(2, 4, seed=1)
    assert model.nll(source, labels).equal(model.nll(source, labels))
    model.train()
    assert not model.nll(source, labels).equal(model.nll(source, labels))


def test_dropout_stands_where_t5_has_it():
    """Catches a forgotten dropout: 4 at the ends of the stacks, 3 in each encoder layer, 4 in each decoder layer."""
    model, calls = tiny(dropout=0.5), []
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            assert module.p == 0.5
            module.register_forward_hook(lambda *args: calls.append(1))
    model(random_ids(2, 5), random_ids(2, 4, seed=1))
    assert len(calls) == 4 + 2 * 3 + 2 * 4


def test_attention_weights_are_dropped_in_training_only():
    """Catches an attention dropout that is never on, or that ignores eval mode."""
    torch.manual_seed(0)
    attention, x = Attention(ModelConfig(30, d_model=8, n_heads=1, d_kv=8, dropout=0.5)), torch.randn(1, 4, 8)

    def once() -> torch.Tensor:
        return attention(x, attention.keys_values(x), torch.zeros(1, 1, 4, 4))

    assert not once().equal(once())
    attention.eval()
    assert once().equal(once())


# ---------------------------------------------------------------------------------------------------------------------
# Decoding.


@variants
def test_cached_decoding_equals_plain_decoding(variant):
    """Catches a cache of the wrong rows or positions. Rows must stop early, late and never for this to bite."""
    ends = set()
    for seed in range(3):
        model, source = talkative(seed, **variant)
        cached, plain = model.generate(source, 6), model.generate(source, 6, use_cache=False)
        assert cached.equal(plain)
        ends |= {end_of(row[None])[0] if 1 in row else 99 for row in plain}
    assert ends >= {1, 2, 3, 4, 5, 99}  # else these models are too uniform to show anything


@variants
@pytest.mark.parametrize("use_cache", [True, False])
def test_generated_tokens_are_the_argmax_under_teacher_forcing(variant, use_cache):
    """Catches decoding that feeds itself wrongly: read back as targets, its tokens must be the most likely ones."""
    for seed in range(2):
        model, source = talkative(seed, **variant)
        tokens = model.generate(source, 7, use_cache)
        best = model(source, tokens).argmax(-1)
        for row, expected, n in zip(tokens.tolist(), best.tolist(), end_of(tokens), strict=True):
            assert row[:n] == expected[:n]


@pytest.mark.parametrize("use_cache", [True, False])
def test_rows_are_padded_after_the_end_token(use_cache):
    """Catches text after the end, an output longer than asked for, and one that goes on when all rows are done."""
    model, source = talkative(0)
    source = source[[i for i, n in enumerate(end_of(model.generate(source, 20))) if n < 20]]  # those that do end
    for limit in (20, 4):
        tokens = model.generate(source, limit, use_cache)
        ends = end_of(tokens)
        assert min(ends) < max(ends) == tokens.shape[1] <= limit
        assert all(not row[n:].any() for row, n in zip(tokens, ends, strict=True))


@pytest.mark.parametrize("use_cache", [True, False])
def test_decoding_works_without_a_single_step(use_cache):
    """Catches a crash for a limit of no tokens; the answer is an empty one."""
    assert tiny().generate(random_ids(3, 4), 0, use_cache).shape == (3, 0)


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_generate_is_in_eval_mode_and_restores_the_mode(use_cache, training):
    """Catches labels sampled with dropout on, and a training run that goes on in eval mode after sampling."""
    model, source = tiny(dropout=0.5), random_ids(8, 5)
    expected = model.generate(source, 6, use_cache)
    model.train(training)
    for _ in range(3):
        assert model.generate(source, 6, use_cache).equal(expected)
    assert {module.training for module in model.modules()} == {training}


def test_generate_records_no_gradient():
    """Catches decoding inside the training step that keeps a graph and eats memory."""
    model, grad = tiny(), []
    model.decoder[0].register_forward_hook(lambda module, args, out: grad.append(out.requires_grad))
    model.generate(random_ids(2, 4), 3)
    assert grad and not any(grad)


def test_bfloat16_autocast_trains_and_decodes():
    """Catches a mask or cache of another type than the activations, which fails only with --dtype bfloat16."""
    model, source, labels = tiny(), random_ids(2, 5), random_ids(2, 4, seed=1)
    exact = model.nll(source, labels)
    with torch.autocast("cpu", torch.bfloat16):
        nll = model.nll(source, labels)
        nll.sum().backward()
        assert model.generate(source, 4).shape == (2, 4)
    assert nll.dtype == torch.float32
    torch.testing.assert_close(nll, exact, rtol=0.05, atol=0.1)


# ---------------------------------------------------------------------------------------------------------------------
# The whole.


@variants
def test_overfits_one_batch_and_says_it_by_heart(variant):
    """Catches almost any bug of the model: it must be able to learn eight targets of different lengths by heart."""
    model = tiny(**variant).train()
    source = random_ids(8, 6)
    labels = pad_tail(random_ids(8, 5, seed=1), [5, 1, 4, 2, 3, 5, 2, 4])
    labels[torch.arange(8), (labels != 0).sum(1) - 1] = 1
    adam = torch.optim.Adam(model.parameters(), lr=0.02)
    for _ in range(120):
        loss = model.nll(source, labels).sum() / (labels != 0).sum()
        adam.zero_grad()
        loss.backward()
        adam.step()
    assert loss.item() < 0.05
    for use_cache in (True, False):
        assert model.generate(source, 9, use_cache).equal(labels)


def t5_weights(model: Transformer) -> dict[str, torch.Tensor]:
    """The weights under the names that transformers gives them; the output layer is the embedding."""
    ours, theirs = model.state_dict(), {}
    for name in ("shared", "encoder.embed_tokens", "decoder.embed_tokens", "lm_head"):
        theirs[f"{name}.weight"] = model.embedding.weight
    for stack, attentions in (("encoder", ["self"]), ("decoder", ["self", "cross"])):
        theirs[f"{stack}.final_layer_norm.weight"] = ours[f"{stack}_norm.weight"]
        bias = f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
        theirs[bias] = ours[f"{stack}_bias.embedding.weight"]
        for i, layer in enumerate(getattr(model, stack)):
            block = f"{stack}.block.{i}.layer"
            for j, kind in enumerate(attentions):
                name = f"{block}.{j}.{'SelfAttention' if kind == 'self' else 'EncDecAttention'}"
                attention = getattr(layer, f"{kind}_attention")
                key, value = attention.kv.weight.chunk(2)
                theirs |= {f"{name}.q.weight": attention.q.weight, f"{name}.o.weight": attention.o.weight}
                theirs |= {f"{name}.k.weight": key, f"{name}.v.weight": value}
            for j in range(len(attentions) + 1):
                theirs[f"{block}.{j}.layer_norm.weight"] = getattr(layer, f"norm{j + 1}").weight
            dense, feed = f"{block}.{len(attentions)}.DenseReluDense", layer.feed_forward
            theirs[f"{dense}.wo.weight"] = feed.wo.weight
            theirs[f"{dense}.{'wi' if feed.gate is None else 'wi_1'}.weight"] = feed.wi.weight
            if feed.gate is not None:
                theirs[f"{dense}.wi_0.weight"] = feed.gate.weight
    return theirs


@pytest.mark.parametrize("variant", VARIANTS[:2], ids=["relu-tied", "gated-untied"])
def test_logits_and_tokens_equal_transformers_t5(variant):
    """Catches any difference from T5: norms, activation, position bias past max_distance, masks, output scale."""
    transformers = pytest.importorskip("transformers")
    model = tiny(max_distance=40, **variant)
    config = transformers.T5Config(
        vocab_size=30, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2, dropout_rate=0.0,
        relative_attention_num_buckets=32, relative_attention_max_distance=40, tie_word_embeddings=model.config.tied,
        feed_forward_proj="gated-gelu" if model.config.gated else "relu", decoder_start_token_id=0,
    )  # fmt: skip
    peer = transformers.T5ForConditionalGeneration(config).eval()
    peer.load_state_dict(t5_weights(model))
    if model.output is not None:  # afterwards, as transformers 5 ties it whatever the config says
        peer.lm_head.weight = torch.nn.Parameter(model.output.weight.clone())
    source = pad_tail(random_ids(3, 150), [150, 60, 3])
    labels = pad_tail(random_ids(3, 140, seed=1), [140, 20, 2])
    with torch.no_grad():
        ours = model(source, labels)
        theirs = peer(source, attention_mask=source != 0, decoder_input_ids=model.shift_right(labels)).logits
    torch.testing.assert_close(ours[labels != 0], theirs[labels != 0], rtol=1e-4, atol=1e-4)
    plain = peer.generate(source, attention_mask=source != 0, max_new_tokens=12, do_sample=False, num_beams=1)[:, 1:]
    tokens = model.generate(source, 12)
    assert tokens.tolist() == plain[:, : tokens.shape[1]].tolist()
