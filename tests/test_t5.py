"""T5 checkpoints: model.load_t5 against transformers, --init against what is broken."""

import json
from pathlib import Path

import pytest
import torch
from helpers import POINTER, TINY, Evil, t5_like
from torch import Tensor, nn

import data
import r2d
from model import load_t5, rename_t5

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.usefixtures("here")

# The keys of the published files: v1.0 names neither its kind of feed-forward nor the decoder's
# depth. Heads times head width (24) and width (40) differ here, and so do depths in v1.1.
SIZES = {"vocab_size": 140, "d_model": 40, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 3}
V10 = {"model_type": "t5", "relative_attention_num_buckets": 32, "layer_norm_epsilon": 1e-6}
V10 |= {"pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0, "dropout_rate": 0.1}
V10 |= SIZES
V11 = {"feed_forward_proj": "gated-gelu", "num_decoder_layers": 3, "tie_word_embeddings": False}
V11 = V10 | V11
SAVED_AGAIN = {"tie_word_embeddings": True, "scale_decoder_outputs": False}  # by transformers 5
PIECES = t5_like(["yes no a cough and fever"] * 9, 20)
UNUSED = "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"


def random_peer(config: dict, tied: bool):
    """A random T5 of transformers, norms and position biases too, whose outputs vary and end."""
    torch.manual_seed(0)
    peer = transformers.T5ForConditionalGeneration(transformers.T5Config(**config)).eval()
    with torch.no_grad():
        for name, weight in peer.named_parameters():
            if "norm" in name:
                weight.uniform_(0.5, 1.5)
            elif "relative_attention_bias" in name:
                weight.normal_()
            elif name.endswith(("EncDecAttention.q.weight", ".o.weight")):
                weight.mul_(3)
        if not tied:  # transformers 5 ties every T5 that it makes, whatever its config says
            peer.lm_head.weight = nn.Parameter(0.3 * torch.randn(140, 40))
        peer.lm_head.weight[1] *= 7  # the end token, often
    return peer


def random_weights() -> dict[str, Tensor]:
    """Random weights under T5's names, each once."""
    peer = random_peer(V11, tied=False)
    return {name: weight.detach().clone() for name, weight in peer.named_parameters()}


def write_parts(folder: Path, weights: object = None, config: object = V11) -> Path:
    """A folder with these parts of a checkpoint, and a tokenizer that fits."""
    (folder / "spiece.model").write_bytes(PIECES)
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    if weights is not None:
        torch.save(weights, folder / "pytorch_model.bin")
    return folder


def write_safetensors(folder: Path, weights: dict[str, Tensor], config: object = V11) -> Path:
    pytest.importorskip("safetensors.torch").save_file(weights, folder / "model.safetensors")
    return write_parts(folder, config=config)


def refusal(folder: Path) -> str:
    """The message about this folder, which says how to mend it."""
    with pytest.raises(data.InputError) as caught:
        r2d.setup(r2d.parse_args([*TINY, "--init", str(folder)]))
    message = str(caught.value)
    assert message.startswith(f"{folder}: ") and "in full (git lfs pull)" in message
    return message.replace(str(folder), "")  # the folder's name holds the test's


# Equality with transformers, for files as published and as transformers saves them (again).
CASES = ["v1.0 saved", "v1.0 published", "v1.1 saved", "v1.1 published", "v1.1 saved again"]


@pytest.fixture(scope="module", params=CASES)
def pair(request, tmp_path_factory):
    """transformers' model and ours, loaded from the files of the first."""
    config = V10 if request.param.startswith("v1.0") else V11
    tied = config is V10 or request.param == "v1.1 saved"
    peer = random_peer(config, tied)
    folder = tmp_path_factory.mktemp("t5")
    peer.save_pretrained(folder)
    saved = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if request.param == "v1.0 published":  # a .bin that holds the embedding four times
        (folder / "model.safetensors").unlink()
        write_parts(folder, peer.state_dict() | {UNUSED: torch.randn(32, 3)}, V10)
    elif request.param == "v1.1 published":
        write_parts(folder)
    elif request.param == "v1.1 saved again":
        write_parts(folder, config=saved | SAVED_AGAIN)
    return peer, load_t5(folder).eval()


def random_batch(lengths: list[int]) -> Tensor:
    """Rows of these lengths that end with the end token, padded."""
    ids = torch.zeros(len(lengths), max(lengths), dtype=torch.long)
    generator = torch.Generator().manual_seed(lengths[0])
    for row, length in enumerate(lengths):
        ids[row, :length] = torch.randint(2, 140, (length,), generator=generator)
        ids[row, length - 1] = 1
    return ids


def test_greedy_tokens_equal_transformers(pair):
    """Catches decoding that differs from T5's, in its first token or after the end of a row; a
    cache or a mask of the wrong rows or positions."""
    peer, ours = pair
    source = random_batch([20 - i % 18 for i in range(40)])
    # Without transformers' own cache, which fails on a decoder deeper than the encoder.
    options = {"max_new_tokens": 12, "do_sample": False, "num_beams": 1, "use_cache": False}
    expected = peer.generate(source, attention_mask=source != 0, **options)[:, 1:]
    ends = [row.index(1) for row in expected.tolist() if 1 in row]
    assert len(set(ends)) >= 3 and 10 <= len(ends) < 40  # rows end early, late and never
    assert ours.generate(source, 12).equal(expected)


def test_logits_loss_and_gradients_equal_transformers(pair):
    """Catches a weight in another's place, another network, an output scaled or tied wrongly, a
    missing or shifted causal mask, padding that is attended to or scored, targets off by one,
    wrong position buckets or biases; a loaded weight that is not trained, or twice."""
    peer, ours = pair
    source = random_batch([200, 140, 1, 3])  # beyond 128, where position buckets end
    target = random_batch([180, 150, 1, 4])
    labels = target.masked_fill(target == 0, -100)
    expected = peer(source, attention_mask=source != 0, labels=labels)
    logits = ours(source, target)[target != 0]
    torch.testing.assert_close(logits, expected.logits[target != 0], rtol=1e-5, atol=1e-4)
    loss = ours.nll(source, target).sum() / (target != 0).sum()
    assert loss.item() == pytest.approx(expected.loss.item(), rel=1e-5)
    peer.zero_grad()
    ours.zero_grad()
    expected.loss.backward()
    loss.backward()
    # Their gradients as if they were weights, so that the loader gives them our names.
    gradients = {name: weight.grad for name, weight in peer.named_parameters()}
    names = rename_t5(gradients)
    for name, weight in ours.named_parameters():
        expected = names.pop(name)
        assert expected.norm() > 0, name
        assert (weight.grad - expected).norm() <= 1e-4 * expected.norm(), name
    assert not names


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("write", [write_parts, write_safetensors])
def test_both_files_and_all_types_give_float32(tmp_path, write, dtype):
    """Catches a format that is not read, a pickle preferred to the safetensors file beside it, a
    model that trains in the type of its file, config.json's dropout in training, and weights drawn
    in vain before they are read."""
    weights = {name: weight.to(dtype) for name, weight in random_weights().items()}
    expected = rename_t5(weights)
    write_parts(tmp_path, {"other.weight": torch.ones(1)})
    write(tmp_path, weights)
    before = torch.get_rng_state()
    model = load_t5(tmp_path, dropout=0.3)
    assert torch.get_rng_state().equal(before)
    assert {module.p for module in model.modules() if isinstance(module, nn.Dropout)} == {0.3}
    for name, weight in model.named_parameters():
        assert weight.dtype == torch.float32 and weight.is_leaf and weight.requires_grad
        assert weight.equal(expected.pop(name)), name
    assert not expected


# ---- What is refused, in words that say what is wrong.
WRONG = {"model_type": "bert", "feed_forward_proj": "gated-silu", "layer_norm_epsilon": 1e-5}
WRONG |= {"pad_token_id": None, "eos_token_id": [2], "decoder_start_token_id": 5}


def test_bad_configs_are_refused(tmp_path):
    """Catches a traceback for a file that is not JSON, not text, or no object of T5's keys; a
    model that loads and computes something else, and a size that does not fit."""
    weights = random_weights()
    path = write_parts(tmp_path, weights) / "config.json"
    path.unlink()
    assert "config.json" in refusal(tmp_path)  # not there at all
    for content in ("{", "[1, 2]", "7", "null", "{}", "[" * 100_000, "\xff"):
        path.write_text(content, encoding="latin-1")
        refusal(tmp_path)
    for key, value in WRONG.items():
        assert f"{key} is {value!r}" in refusal(write_parts(tmp_path, weights, V11 | {key: value}))
    for key in [*SIZES, "relative_attention_num_buckets"]:
        for value in ("32", -1, 33, None):
            refusal(write_parts(tmp_path, weights, V11 | {key: value}))
        config = {name: value for name, value in V11.items() if name != key}
        assert repr(key) in refusal(write_parts(tmp_path, weights, config))


def test_weights_that_are_not_whole_are_refused_by_name(tmp_path):
    """Catches a weight that stays random, is broadcast, cut or left over, and a KeyError."""
    (write_parts(tmp_path) / "model.safetensors.index.json").write_text('{"weight_map": {}}')
    assert "No such file" in refusal(tmp_path)  # of parts none is read
    weights = random_weights()
    names = {"decoder.block.2.layer.2.layer_norm.weight": "decoder.2.ff_norm.weight"}
    names["lm_head.weight"] = "lm_head.weight"  # v1.1 without its output layer is not tied
    for name, ours in names.items():
        less = {other: weights[other] for other in weights if other != name}
        assert ours in refusal(write_parts(tmp_path, less))
        for other in (weights[name][:-1], weights[name][None], weights[name].sum()):
            assert ours in refusal(write_parts(tmp_path, weights | {name: other.clone()}))
    deeper = "encoder.block.2.layer.0.SelfAttention.q.weight"  # than config.json says
    for name in (deeper, "encoder.block.0.layer.1.DenseReluDense.wi_2.weight", "zebra"):
        assert "Unexpected" in refusal(write_parts(tmp_path, weights | {name: torch.ones(3)}))


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.safetensors"])
def test_damaged_weights_are_refused(tmp_path, name):
    """Catches a traceback for a download that broke off, a pointer or a page in its place, a
    training state; a stranger's file that runs code."""
    write = write_parts if name == "pytorch_model.bin" else write_safetensors
    weights = random_weights()
    file = write(tmp_path, weights) / name
    content = file.read_bytes()
    for damaged in (b"", content[: len(content) // 2], content[:-1], POINTER, b"<html>\n" * 20):
        file.write_bytes(damaged)
        refusal(tmp_path)
    for content in ([1], "x", {"step": 3}, {1: torch.ones(2)}, weights | {"zebra": Evil()}):
        torch.save(content, file)
        assert "weights_only" not in refusal(tmp_path)  # torch's advice to let it
    assert not Path("evil").exists()
