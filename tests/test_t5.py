"""model.load_t5 against transformers' T5: each test names the bug it catches."""

import json
import os
import runpy
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from model import Transformer, load_t5, read_t5_config, rename_t5

transformers = pytest.importorskip("transformers")

# The keys of the published files: v1.0 names neither its kind of feed-forward nor the decoder's
# depth. Heads times head width (24) and width (40) differ here, and so do depths in v1.1.
SIZES = {"vocab_size": 140, "d_model": 40, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 3}
V10 = {"model_type": "t5", "relative_attention_num_buckets": 32, "layer_norm_epsilon": 1e-6}
V10 |= {"pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0, "dropout_rate": 0.1}
V10 |= SIZES
V11 = {"feed_forward_proj": "gated-gelu", "num_decoder_layers": 3, "tie_word_embeddings": False}
V11 = V10 | V11
SIZE_KEYS = [*SIZES, "num_decoder_layers", "relative_attention_num_buckets"]
SAVED_AGAIN = {"tie_word_embeddings": True, "scale_decoder_outputs": False}  # by transformers 5
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
        peer.lm_head.weight[1] *= 3  # the end token, now and then
    return peer


def random_weights(config: dict = V11) -> dict[str, Tensor]:
    """Random weights under T5's names, each once."""
    weights = {}
    for name, weight in random_peer(config, tied=config is V10).named_parameters():
        weights[name] = weight.detach().clone()
    return weights


def write_config(folder: Path, config: object) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def write_bin(folder: Path, weights: object, config: object = V11) -> Path:
    write_config(folder, config)
    torch.save(weights, folder / "pytorch_model.bin")
    return folder


def write_safetensors(folder: Path, weights: dict[str, Tensor], config: object = V11) -> Path:
    write_config(folder, config)
    pytest.importorskip("safetensors.torch").save_file(weights, folder / "model.safetensors")
    return folder


def refusal(folder: Path, file: str) -> str:
    """The message of loading this folder: one line of a plain ValueError that names the file."""
    with pytest.raises(ValueError) as caught:
        load_t5(folder)
    message = str(caught.value)
    assert caught.type is ValueError and len(message.splitlines()) == 1 and len(message) < 700
    assert message.startswith(f"{folder / file}: ")
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
        write_bin(folder, peer.state_dict() | {UNUSED: torch.randn(32, 3)}, V10)
    elif request.param == "v1.1 published":
        write_config(folder, V11)
    elif request.param == "v1.1 saved again":
        write_config(folder, saved | SAVED_AGAIN)
    return peer, load_t5(folder).eval()


def random_batch(lengths: list[int]) -> Tensor:
    """Rows of these lengths that end with the end token, padded."""
    ids = torch.zeros(len(lengths), max(lengths), dtype=torch.long)
    generator = torch.Generator().manual_seed(lengths[0])
    for row, length in enumerate(lengths):
        ids[row, :length] = torch.randint(2, 140, (length,), generator=generator)
        ids[row, length - 1] = 1
    return ids


def peer_output(peer, source: Tensor, target: Tensor):
    labels = target.masked_fill(target == 0, -100)
    return peer(source, attention_mask=source != 0, labels=labels)


def test_logits_equal_transformers(pair):
    """Catches a weight in another's place, another network, an output scaled or tied wrongly."""
    peer, ours = pair
    source = random_batch([200, 140, 3])  # beyond 128, where position buckets end
    target = random_batch([180, 150, 4])
    with torch.no_grad():
        logits = ours(source, target)[target != 0]
        expected = peer_output(peer, source, target).logits[target != 0]
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-4)


def test_greedy_tokens_equal_transformers(pair):
    """Catches decoding that differs from T5's, in its first token or after the end of a row."""
    peer, ours = pair
    source = random_batch([20 - i % 18 for i in range(40)])
    # Without transformers' own cache, which fails on a decoder deeper than the encoder.
    options = {"max_new_tokens": 12, "do_sample": False, "num_beams": 1, "use_cache": False}
    expected = peer.generate(source, attention_mask=source != 0, **options)[:, 1:]
    ends = [row.index(1) for row in expected.tolist() if 1 in row]
    assert len(set(ends)) >= 3 and len(ends) < 40  # rows end early, late and never
    assert ours.generate(source, 12).equal(expected)


def test_loss_and_gradients_equal_transformers(pair):
    """Catches a loss that counts padding, and a loaded weight that is not trained, or twice."""
    peer, ours = pair
    source = random_batch([12, 7, 1, 9])
    target = random_batch([10, 1, 6, 3])
    expected = peer_output(peer, source, target).loss
    loss = ours.nll(source, target).sum() / (target != 0).sum()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    peer.zero_grad()
    ours.zero_grad()
    expected.backward()
    loss.backward()
    # Their gradients as if they were weights, so that the loader gives them our names.
    gradients = {name: weight.grad for name, weight in peer.named_parameters()}
    names = rename_t5(gradients)
    for name, weight in ours.named_parameters():
        expected = names.pop(name)
        assert expected.norm() > 0, name
        assert (weight.grad - expected).norm() <= 1e-4 * expected.norm(), name
    assert not names


# Every published size, on the meta device: d_model, d_kv, d_ff, layers, heads; number of weights.

PUBLISHED = {
    "v1.0-small": (512, 64, 2048, 6, 8, 60_506_624),
    "v1.0-base": (768, 64, 3072, 12, 12, 222_903_552),
    "v1.0-large": (1024, 64, 4096, 24, 16, 737_668_096),
    "v1.0-3b": (1024, 128, 16384, 24, 32, 2_851_598_336),
    "v1.0-11b": (1024, 128, 65536, 24, 128, 11_307_321_344),
    "v1.1-small": (512, 64, 1024, 8, 6, 76_961_152),
    "v1.1-base": (768, 64, 2048, 12, 12, 247_577_856),
    "v1.1-large": (1024, 64, 2816, 24, 16, 783_150_080),
    "v1.1-xl": (2048, 64, 5120, 24, 32, 2_849_757_184),
    "v1.1-xxl": (4096, 64, 10240, 24, 64, 11_135_332_352),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_published_size(tmp_path, name):
    """Catches a size that cannot be built, or that has more or fewer weights than T5's."""
    d_model, d_kv, d_ff, layers, heads, count = PUBLISHED[name]
    config = V10 if name.startswith("v1.0") else V11 | {"num_decoder_layers": layers}
    config = config | {"vocab_size": 32128, "d_model": d_model, "d_kv": d_kv, "d_ff": d_ff}
    config |= {"num_layers": layers, "num_heads": heads}
    write_config(tmp_path, config)
    with torch.device("meta"):
        model = Transformer(read_t5_config(tmp_path / "config.json", dropout=0.0))
    assert sum(weight.numel() for weight in model.parameters()) == count


def assert_holds(model: Transformer, weights: dict[str, Tensor]) -> None:
    """The model has exactly these T5 weights, in float32 and ready to be trained."""
    expected = rename_t5(weights)
    parameters = dict(model.named_parameters())
    assert parameters.keys() == expected.keys()
    for name, weight in parameters.items():
        assert weight.dtype == torch.float32 and weight.is_leaf and weight.requires_grad
        assert weight.equal(expected[name]), name


@pytest.mark.parametrize("config", [V10, V11], ids=["v1.0", "v1.1"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("write", [write_bin, write_safetensors])
def test_both_files_and_all_types_give_float32(tmp_path, write, dtype, config):
    """Catches a format that is not read, and a model that trains in the type of its file."""
    weights = {name: weight.to(dtype) for name, weight in random_weights(config).items()}
    assert_holds(load_t5(write(tmp_path, weights, config)), weights)


def test_copies_of_the_embedding_are_accepted(tmp_path):
    """Catches old files refused for a name too many, and a tied output layer that is untied."""
    weights = random_weights(V10)
    copies = {UNUSED: torch.ones(32, 3)}
    for copy in ("encoder.embed_tokens", "decoder.embed_tokens", "lm_head"):
        copies[f"{copy}.weight"] = weights["shared.weight"].clone()
    model = load_t5(write_bin(tmp_path, weights | copies, V10))
    assert_holds(model, weights)
    assert model.config.tied and model.config.scaled


@pytest.mark.parametrize("config", [V11, V11 | SAVED_AGAIN], ids=["published", "saved again"])
def test_an_output_layer_of_its_own_stays_its_own(tmp_path, config):
    """Catches a layer dropped because transformers 5 says "tied" of every T5."""
    model = load_t5(write_bin(tmp_path, random_weights(), config))
    assert_holds(model, random_weights())
    assert not model.config.tied and not model.config.scaled


def test_loading_changes_only_the_dropout(tmp_path):
    """Catches config.json's dropout in training, and weights drawn in vain before they are read."""
    write_bin(tmp_path, random_weights())
    before = torch.get_rng_state()
    model = load_t5(tmp_path, dropout=0.3)
    assert torch.get_rng_state().equal(before)
    assert model.config.dropout == model.decoder[2].cross_attention.config.dropout == 0.3
    assert {module.p for module in model.modules() if isinstance(module, nn.Dropout)} == {0.3}


# What is refused: always by a ValueError of one line that names the file.


def test_a_config_that_is_none_is_refused(tmp_path):
    """Catches a traceback for a file that is not JSON, not text, or no object of T5's keys."""
    refusal(tmp_path, "config.json")  # not there at all
    for content in ("", "{", "d_model: 512", "[1, 2]", "7", "null", "{}", "[" * 100_000, "\xff"):
        (tmp_path / "config.json").write_text(content, encoding="latin-1")
        refusal(tmp_path, "config.json")


def test_another_kind_of_model_is_refused(tmp_path):
    """Catches a model that loads and computes something else than the one that was trained."""
    wrong = {"model_type": "bert", "feed_forward_proj": "gated-silu", "layer_norm_epsilon": 1e-5}
    wrong |= {"pad_token_id": None, "eos_token_id": [2], "decoder_start_token_id": 5}
    write_bin(tmp_path, random_weights())
    for key, value in wrong.items():
        write_config(tmp_path, V11 | {key: value})
        assert f"{key} is {value!r}" in refusal(tmp_path, "config.json")


@pytest.mark.parametrize("key", SIZE_KEYS)
def test_a_size_that_is_none_is_refused(tmp_path, key):
    """Catches a crash deep inside torch, and a config that builds layers for hours."""
    write_bin(tmp_path, random_weights())
    for value in ("32", True, -1, 32.0, [32], {"a": 32}, 10**30):
        write_config(tmp_path, V11 | {key: value})
        refusal(tmp_path, "config.json")
    if "layers" in key:
        write_config(tmp_path, V11 | {key: 10**6})
        refusal(tmp_path, "config.json")
    if key in V10:
        config = dict(V11)
        del config[key]
        assert repr(key) in refusal(write_config(tmp_path, config), "config.json")


def test_buckets_that_divide_by_zero_are_refused(tmp_path):
    """Catches a ZeroDivisionError in the first forward pass."""
    for buckets, distance in [(1, 128), (3, 128), (32, 16), (16, 4)]:
        config = {"relative_attention_num_buckets": buckets}
        config["relative_attention_max_distance"] = distance
        assert "buckets" in refusal(write_config(tmp_path, V11 | config), "config.json")


def test_a_folder_without_whole_weights_is_refused(tmp_path):
    """Catches parts of a checkpoint (an index) of which only the first would be read."""
    write_config(tmp_path, V11)
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {}}')
    assert "model.safetensors; join parts" in refusal(tmp_path, "pytorch_model.bin")


def test_a_weight_missing_or_of_another_shape_is_refused_by_name(tmp_path):
    """Catches a weight that stays random, is broadcast or cut, and a KeyError."""
    names = {  # a T5 weight, and what the message holds of our name for it
        "shared.weight": "embedding.weight",
        "lm_head.weight": "lm_head.weight",
        "encoder.final_layer_norm.weight": "encoder_norm.weight",
        "decoder.block.2.layer.2.layer_norm.weight": "decoder.2.ff_norm.weight",
        "encoder.block.1.layer.0.SelfAttention.k.weight": "encoder.1.self_attention",
        "decoder.block.0.layer.1.EncDecAttention.v.weight": "decoder.0.cross_attention",
        "encoder.block.1.layer.1.DenseReluDense.wi_0.weight": "encoder.1.feed_forward.wi_0",
    }
    for name, ours in names.items():
        weights = random_weights()
        weight = weights.pop(name)
        assert ours in refusal(write_bin(tmp_path, weights), "pytorch_model.bin")
        for other in (weight[:-1], torch.cat([weight, weight]), weight[None], weight.sum()):
            write_bin(tmp_path, weights | {name: other.clone()})
            assert ours in refusal(tmp_path, "pytorch_model.bin")


def test_a_left_over_weight_is_refused(tmp_path):
    """Catches a model that is only a part of the one in the file."""
    names = ["encoder.block.2.layer.0.SelfAttention.q.weight"]  # deeper than config.json says
    names += ["encoder.block.1.layer.0.SelfAttention.relative_attention_bias.weight"]
    names += ["encoder.block.0.layer.1.DenseReluDense.wi.weight", "zebra"]
    for name in names:
        write_bin(tmp_path, random_weights() | {name: torch.ones(3)})
        assert "Unexpected key" in refusal(tmp_path, "pytorch_model.bin")


def test_a_promised_output_layer_must_be_there(tmp_path):
    """Catches a v1.1 checkpoint without its output layer that loads as tied."""
    write_bin(tmp_path, random_weights(V10), V10 | {"tie_word_embeddings": False})
    assert "lm_head.weight" in refusal(tmp_path, "pytorch_model.bin")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.safetensors"])
def test_damaged_weights_are_refused(tmp_path, name):
    """Catches a traceback for a download that broke off, or a page of text in its place."""
    write = write_bin if name == "pytorch_model.bin" else write_safetensors
    file = write(tmp_path, random_weights()) / name
    content = file.read_bytes()
    for part in (0, 4, 100, len(content) // 2, len(content) - 1):
        file.write_bytes(content[:part])
        refusal(tmp_path, name)
    file.write_text("<html>\nfile not found\n</html>\n" * 20)
    refusal(tmp_path, name)


def test_a_bin_of_something_else_is_refused(tmp_path):
    """Catches an AttributeError for a pickle of other things, such as a whole training state."""
    tensor = torch.ones(2)
    for content in ([1], tensor, None, "x", {"step": 3}, {"a": [1.0]}, {1: tensor}):
        refusal(write_bin(tmp_path, content), "pytorch_model.bin")


class Bomb:
    """Unpickled, it makes a folder; it could as well have emptied one."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


def test_a_pickle_cannot_run_code(tmp_path):
    """Catches a .bin from a stranger that does as it likes, and advice to let it."""
    weights = random_weights() | {"zebra": Bomb(tmp_path / "mark")}
    message = refusal(write_bin(tmp_path, weights), "pytorch_model.bin")
    assert "weights_only" not in message and not (tmp_path / "mark").exists()
    torch.load(tmp_path / "pytorch_model.bin", weights_only=False)
    assert (tmp_path / "mark").exists()  # it would have


def test_safetensors_goes_first_and_is_needed_for_its_files_alone(tmp_path, monkeypatch):
    """Catches a pickle preferred to the safetensors file beside it, and a late ImportError."""
    write_bin(tmp_path, {"other.weight": torch.ones(1)})
    load_t5(write_safetensors(tmp_path, random_weights()))
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)  # as if it were not installed
    runpy.run_path(sys.modules["model"].__file__)  # can be imported
    assert "safetensors.torch" in refusal(tmp_path, "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    load_t5(write_bin(tmp_path, random_weights()))
