"""model.py's loader of T5 checkpoints: each test names the bug it catches. The peer is transformers; it is optional."""

import json
import os
import pickle
import runpy
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from model import ModelConfig, Transformer, load_t5, read_t5_config, t5_names

# The keys of the published files, and no others: v1.0 names neither the feed-forward layer nor the decoder's depth.
SIZES = {"vocab_size": 140, "d_model": 40, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 3}
V10 = SIZES | {
    "model_type": "t5", "architectures": ["T5ForConditionalGeneration"], "relative_attention_num_buckets": 32,
    "pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0, "dropout_rate": 0.1, "n_positions": 512,
    "initializer_factor": 1.0, "is_encoder_decoder": True, "layer_norm_epsilon": 1e-6,
}  # fmt: skip
V11 = V10 | {"feed_forward_proj": "gated-gelu", "num_decoder_layers": 3, "tie_word_embeddings": False}
SIZE_KEYS = [*SIZES, "num_decoder_layers", "relative_attention_num_buckets", "relative_attention_max_distance"]
UNUSED = "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"


def random_weights(gated: bool = True, depths: tuple[int, int] = (2, 3)) -> dict[str, Tensor]:
    """Random weights of V11 (or V10: not gated, depths (2, 2)) under T5's names, written out by hand."""
    shapes = {"shared": (140, 40)} | ({"lm_head": (140, 40)} if gated else {})
    kinds = {"encoder": ["SelfAttention", "DenseReluDense"]}
    kinds["decoder"] = ["SelfAttention", "EncDecAttention", "DenseReluDense"]
    for stack, depth in zip(kinds, depths, strict=True):
        shapes[f"{stack}.final_layer_norm"] = (40,)
        shapes[f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias"] = (32, 3)
        for i in range(depth):
            for j, kind in enumerate(kinds[stack]):
                at = f"{stack}.block.{i}.layer.{j}"
                shapes[f"{at}.layer_norm"] = (40,)
                if kind == "DenseReluDense":
                    shapes |= {f"{at}.{kind}.{leaf}": (48, 40) for leaf in (["wi_0", "wi_1"] if gated else ["wi"])}
                    shapes[f"{at}.{kind}.wo"] = (40, 48)
                else:
                    shapes |= {f"{at}.{kind}.{leaf}": (24, 40) for leaf in "qkv"} | {f"{at}.{kind}.o": (40, 24)}
    generator = torch.Generator().manual_seed(0)
    return {f"{name}.weight": torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def write_config(folder: Path, config: object) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def write_bin(folder: Path, weights: object, config: object = V11) -> Path:
    torch.save(weights, write_config(folder, config) / "pytorch_model.bin")
    return folder


def write_index(folder: Path, index: object) -> Path:
    (write_config(folder, V11) / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    return folder


def assert_holds(model: Transformer, weights: dict[str, Tensor]) -> None:
    """Each of these T5 weights stands in the model, once and exactly, in float32, ready to be trained."""
    names = []
    for name, parameter in model.named_parameters():
        names += (parts := t5_names(name, model.config.gated))
        assert parameter.dtype == torch.float32 and parameter.is_leaf and parameter.requires_grad
        assert parameter.equal(torch.cat([weights[part] for part in parts]).float())
    assert sorted(names) == sorted(weights)


def refusal(folder: Path, file: str, *words: str) -> None:
    """Loading raises a plain ValueError of one line that begins with the file and holds these words."""
    with pytest.raises(ValueError) as caught:
        load_t5(folder)
    message = str(caught.value)
    assert caught.type is ValueError and len(message.splitlines()) == 1
    assert message.startswith(f"{folder / file}: ")
    message = message.replace(str(folder), "")  # its name is the test's, and may hold the words
    assert [word for word in words if word not in message] == [], message


# ---------------------------------------------------------------------------------------------------------------------
# Equality with transformers: as it saves a model, and as the published files are.

CASES = ["v1.0", "v1.0 published", "v1.1", "v1.1 published", "v1.1 published, saved again"]


def random_peer(case: str):
    """transformers' T5 in eval mode with random norms and position biases too, and outputs that vary and end."""
    transformers = pytest.importorskip("transformers")
    gated, published = case.startswith("v1.1"), "published" in case
    depths = {"num_layers": 2 if gated or published else 3, "num_decoder_layers": 3 if gated else 2}
    kind = {"feed_forward_proj": "gated-gelu" if gated else "relu", "tie_word_embeddings": not gated}
    torch.manual_seed(0)
    config = transformers.T5Config(**(SIZES | depths | kind), decoder_start_token_id=0)
    peer = transformers.T5ForConditionalGeneration(config).eval()
    with torch.no_grad():
        for name, parameter in peer.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
            elif "relative_attention_bias" in name:
                parameter.normal_()
            elif name.endswith(("EncDecAttention.q.weight", ".o.weight")):
                parameter.mul_(3)
        if gated and published:  # transformers 5 ties every T5, whatever the config says
            peer.lm_head.weight = nn.Parameter(0.3 * torch.randn(140, 40))
        peer.lm_head.weight[1] *= 3  # the end token, now and then
    return peer


@pytest.fixture(scope="module", params=CASES)
def pair(request, tmp_path_factory):
    """(transformers' model, ours, loaded from the files of the first)."""
    peer, folder = random_peer(request.param), tmp_path_factory.mktemp("t5")
    peer.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    if "published" in request.param:
        weights = peer.state_dict()
        assert weights["lm_head.weight"].equal(weights["shared.weight"]) == (request.param[:4] == "v1.0")
    if request.param == "v1.0 published":
        (folder / "model.safetensors").unlink()
        write_bin(folder, weights | {UNUSED: torch.randn(32, 3)}, V10)
    elif request.param == "v1.1 published":
        write_config(folder, V11)
    elif request.param == "v1.1 published, saved again":
        write_config(folder, config | {"tie_word_embeddings": True, "scale_decoder_outputs": False})
    return peer, load_t5(folder).eval()


def random_batch(source: list[int], target: list[int]) -> tuple[Tensor, Tensor]:
    """Source and target rows of these lengths, padded with 0; a target ends with 1."""
    generator, batch = torch.Generator().manual_seed(0), []
    for lengths in (source, target):
        ids = torch.randint(2, 140, (len(lengths), max(lengths)), generator=generator)
        batch.append(ids.masked_fill(torch.arange(max(lengths)) >= torch.tensor(lengths)[:, None], 0))
    batch[1][torch.arange(len(target)), torch.tensor(target) - 1] = 1
    return batch[0], batch[1]


def test_logits_equal_transformers(pair):
    """Catches a weight in another's place, a wrong shape of the network, an output that is scaled or tied wrongly."""
    peer, ours = pair
    source, target = random_batch([200, 140, 3], [180, 150, 4])  # beyond the 128 where position buckets end
    with torch.no_grad():
        theirs = peer(source, attention_mask=source != 0, labels=target.masked_fill(target == 0, -100)).logits
        torch.testing.assert_close(ours(source, target)[target != 0], theirs[target != 0], rtol=1e-5, atol=5e-5)


def test_greedy_tokens_equal_transformers(pair):
    """Catches decoding that differs from T5's, in its first token or after the end token of some rows."""
    peer, ours = pair
    source, _ = random_batch([20 - i % 18 for i in range(40)], [1])
    # Without transformers' cache, which fails on a decoder deeper than the encoder.
    options = {"max_new_tokens": 12, "do_sample": False, "num_beams": 1, "use_cache": False}
    theirs = peer.generate(source, attention_mask=source != 0, **options)[:, 1:]
    ends = [row.index(1) for row in theirs.tolist() if 1 in row]
    assert len(set(ends)) >= 3 and len(ends) < 40 and len(theirs.unique()) > 20  # rows end early, late and never
    assert ours.generate(source, 12).equal(theirs)


def test_loss_and_gradients_equal_transformers(pair):
    """Catches a loss that counts padding, and a loaded weight that is not trained, or twice."""
    peer, ours = pair
    source, target = random_batch([12, 7, 1, 9], [10, 1, 6, 3])
    expected = peer(source, attention_mask=source != 0, labels=target.masked_fill(target == 0, -100)).loss
    loss = ours.nll(source, target).sum() / (target != 0).sum()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    peer.zero_grad()
    ours.zero_grad()
    expected.backward()
    loss.backward()
    theirs = {name: parameter.grad for name, parameter in peer.named_parameters()}
    for name, parameter in ours.named_parameters():
        grad = torch.cat([theirs.pop(t5_name) for t5_name in t5_names(name, ours.config.gated)])
        assert grad.norm() > 0 and (parameter.grad - grad).norm() <= 2e-5 * grad.norm(), name
    assert not theirs


# ---------------------------------------------------------------------------------------------------------------------
# Every published size.

# d_model, d_kv, d_ff, layers of either stack, heads; the number of weights.
PUBLISHED_SIZES = {
    "v1.0-small": ((512, 64, 2048, 6, 8), 60_506_624),
    "v1.0-base": ((768, 64, 3072, 12, 12), 222_903_552),
    "v1.0-large": ((1024, 64, 4096, 24, 16), 737_668_096),
    "v1.0-3b": ((1024, 128, 16384, 24, 32), 2_851_598_336),
    "v1.0-11b": ((1024, 128, 65536, 24, 128), 11_307_321_344),
    "v1.1-small": ((512, 64, 1024, 8, 6), 76_961_152),
    "v1.1-base": ((768, 64, 2048, 12, 12), 247_577_856),
    "v1.1-large": ((1024, 64, 2816, 24, 16), 783_150_080),
    "v1.1-xl": ((2048, 64, 5120, 24, 32), 2_849_757_184),
    "v1.1-xxl": ((4096, 64, 10240, 24, 64), 11_135_332_352),
}


@pytest.mark.parametrize("name", PUBLISHED_SIZES)
def test_every_published_size(tmp_path, name):
    """Catches a size that cannot be built, or that has other weights, or others' names, than T5's."""
    (d_model, d_kv, d_ff, layers, heads), count = PUBLISHED_SIZES[name]
    config = V10 if name.startswith("v1.0") else V11 | {"num_decoder_layers": layers}
    config = config | {"vocab_size": 32128, "d_model": d_model, "d_kv": d_kv, "d_ff": d_ff}
    config |= {"num_layers": layers, "num_heads": heads}
    read = read_t5_config(write_config(tmp_path, config) / "config.json")
    with torch.device("meta"):
        ours = Transformer(read)
    assert sum(parameter.numel() for parameter in ours.parameters()) == count
    transformers = pytest.importorskip("transformers")
    with torch.device("meta"):
        peer = transformers.T5ForConditionalGeneration(transformers.T5Config(**config))
    theirs = {name: tuple(weight.shape) for name, weight in peer.state_dict().items()}
    for copy in ("encoder.embed_tokens", "decoder.embed_tokens", *(["lm_head"] if read.tied else [])):
        del theirs[f"{copy}.weight"]
    for name, parameter in ours.named_parameters():
        shapes = [theirs.pop(t5_name) for t5_name in t5_names(name, read.gated)]
        assert (sum(shape[0] for shape in shapes), *shapes[0][1:]) == parameter.shape
    assert not theirs


# ---------------------------------------------------------------------------------------------------------------------
# config.json.

READ = ModelConfig(140, 40, 3, 8, 48, n_encoder_layers=2, n_decoder_layers=2, dropout=0.0, n_buckets=32)
READ_V11 = ModelConfig(140, 40, 3, 8, 48, 2, 3, 0.0, 32, 128, gated=True, tied=False, scaled=False)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (V10, READ),
        (V11, READ_V11),
        (V11 | {"model_type": "mt5"}, READ_V11),
        (V10 | {"feed_forward_proj": "relu", "tie_word_embeddings": True, "num_decoder_layers": None}, READ),
        (V10 | {"relative_attention_num_buckets": 16, "relative_attention_max_distance": 20},
         ModelConfig(140, 40, 3, 8, 48, 2, 2, dropout=0.0, n_buckets=16, max_distance=20)),
        (V11 | {"tie_word_embeddings": True, "scale_decoder_outputs": False},
         ModelConfig(140, 40, 3, 8, 48, 2, 3, 0.0, 32, 128, gated=True, tied=True, scaled=False)),
        (V11 | {"scale_decoder_outputs": True},
         ModelConfig(140, 40, 3, 8, 48, 2, 3, 0.0, 32, 128, gated=True, tied=False, scaled=True)),
    ],
    ids=["v1.0", "v1.1", "mt5", "defaults-named", "other-numbers", "transformers-5", "scaled-untied"],
)  # fmt: skip
def test_config_is_read(tmp_path, config, expected):
    """Catches a key read as another, and a wrong default for one that older files do not have."""
    assert read_t5_config(write_config(tmp_path, config) / "config.json") == expected


def test_no_config_is_refused(tmp_path):
    """Catches a traceback for a folder that is empty, or not there."""
    refusal(tmp_path, "config.json", "T5 folder")
    refusal(tmp_path / "nowhere", "config.json", "T5 folder")


@pytest.mark.parametrize("content", [b"", b"{", b"d_model: 512", b"\xff\xfe", b"[1, 2]", b"[]", b'"ab"', b"7", b"null"])
def test_a_config_that_is_none_is_refused(tmp_path, content):
    """Catches a traceback for a file that is not JSON, not text, or JSON of another type than an object."""
    (tmp_path / "config.json").write_bytes(content)
    refusal(tmp_path, "config.json", "config.json of a T5 checkpoint")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("model_type", "bert"), ("model_type", ["t5"]), ("feed_forward_proj", "gated-silu"),
        ("feed_forward_proj", "gelu"), ("pad_token_id", 1), ("eos_token_id", 2), ("decoder_start_token_id", 5),
        ("pad_token_id", None), ("layer_norm_epsilon", 1e-5), ("layer_norm_epsilon", "1e-6"),
    ],
)  # fmt: skip
def test_another_kind_of_model_is_refused(tmp_path, key, value):
    """Catches a model that loads and computes something else than the one that was trained."""
    refusal(write_config(tmp_path, V11 | {key: value}), "config.json", f"{key} is {value!r}")


@pytest.mark.parametrize("key", [key for key in V10 if key in ("model_type", *SIZE_KEYS) or key.endswith("token_id")])
def test_a_missing_key_is_refused_by_name(tmp_path, key):
    """Catches a KeyError without the file, and a size that is made up."""
    config = {k: v for k, v in V11.items() if k != key}
    if key == "decoder_start_token_id":  # the one of them that has a default
        assert read_t5_config(write_config(tmp_path, config) / "config.json") == READ_V11
    else:
        refusal(write_config(tmp_path, config), "config.json", f"no {key!r}")


@pytest.mark.parametrize("key", SIZE_KEYS)
def test_a_size_that_is_no_whole_number_above_0_is_refused(tmp_path, key):
    """Catches a model of no layers, or a crash deep inside torch."""
    for value in (
        "32",
        True,
        0,
        -1,
        32.0,
        [32],
        10**30,
        *([None] if key != "num_decoder_layers" else []),
    ):
        refusal(write_config(tmp_path, V11 | {key: value}), "config.json", "size")


# ---------------------------------------------------------------------------------------------------------------------
# The ways that weights are stored.


@pytest.mark.parametrize(("buckets", "distance"), [(1, 128), (3, 128), (32, 16), (16, 4)])
def test_buckets_that_divide_by_zero_are_refused(tmp_path, buckets, distance):
    """Catches a ZeroDivisionError in the first forward pass."""
    config = V10 | {"relative_attention_num_buckets": buckets, "relative_attention_max_distance": distance}
    refusal(write_config(tmp_path, config), "config.json", "buckets")


def as_bin(folder: Path, weights: dict[str, Tensor]) -> None:
    torch.save(weights, folder / "pytorch_model.bin")


def as_safetensors(folder: Path, weights: dict[str, Tensor]) -> None:
    pytest.importorskip("safetensors.torch").save_file(weights, folder / "model.safetensors")


def as_two_safetensors(folder: Path, weights: dict[str, Tensor]) -> None:
    save_file = pytest.importorskip("safetensors.torch").save_file
    write_shards(folder, weights, save_file, "model", "safetensors")


def as_two_bins(folder: Path, weights: dict[str, Tensor]) -> None:
    write_shards(folder, weights, torch.save, "pytorch_model", "bin")


def write_shards(folder: Path, weights: dict[str, Tensor], save, stem: str, suffix: str) -> None:
    """Two files that take turns, so that keys and values lie apart, and the index over them."""
    files = [f"{stem}-0000{i}-of-00002.{suffix}" for i in (1, 2)]
    weight_map = {name: files[i % 2] for i, name in enumerate(weights)}
    for file in files:
        save({name: weights[name] for name in weights if weight_map[name] == file}, folder / file)
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps(index))


def as_old_bin(folder: Path, weights: dict[str, Tensor]) -> None:
    torch.save(weights, folder / "pytorch_model.bin", _use_new_zipfile_serialization=False)


def as_parameters(folder: Path, weights: dict[str, Tensor]) -> None:
    as_bin(folder, {name: nn.Parameter(weight) for name, weight in weights.items()})


LAYOUTS = [as_safetensors, as_two_safetensors, as_bin, as_two_bins, as_old_bin, as_parameters]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("gated", [True, False])
def test_every_layout_gives_the_same_weights(tmp_path, layout, gated):
    """Catches a layout that cannot be read, loses a part, or gives weights that cannot be trained."""
    config, weights = (V11, random_weights()) if gated else (V10, random_weights(False, (2, 2)))
    layout(write_config(tmp_path, config), weights)
    assert_holds(load_t5(tmp_path), weights)


def test_shards_of_transformers_are_read(tmp_path):
    """Catches an index as transformers itself writes it that is not understood."""
    peer = random_peer("v1.1 published")
    peer.save_pretrained(tmp_path, max_shard_size="20KB")
    assert not (tmp_path / "model.safetensors").exists() and len(list(tmp_path.glob("*.safetensors"))) > 2
    weights = {name: weight for name, weight in peer.state_dict().items() if "embed_tokens" not in name}
    assert_holds(load_t5(tmp_path), weights)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("layout", [as_safetensors, as_bin])
def test_other_types_load_as_float32(tmp_path, layout, dtype):
    """Catches a model that trains in the type of its file."""
    weights = {name: weight.to(dtype) for name, weight in random_weights().items()}
    layout(write_config(tmp_path, V11), weights)
    assert_holds(load_t5(tmp_path), weights)


def test_the_first_layout_is_read_and_no_other(tmp_path):
    """Catches a pickle that is preferred to, or mixed with, the safetensors file beside it."""
    weights = random_weights()
    write_bin(tmp_path, {name: weight + 1 for name, weight in weights.items()} | {"other.weight": torch.ones(1)})
    as_safetensors(tmp_path, weights)
    assert_holds(load_t5(tmp_path), weights)


@pytest.mark.parametrize("copies", [["encoder.embed_tokens"], ["decoder.embed_tokens", "lm_head"], ["lm_head"]])
@pytest.mark.parametrize("with_shared", [True, False])
def test_copies_of_the_embedding_are_accepted(tmp_path, copies, with_shared):
    """Catches old files refused for a name too many, or for the embedding under another of its names."""
    weights = random_weights(False, (2, 2))
    stored = weights | {f"{copy}.weight": weights["shared.weight"].clone() for copy in copies}
    if not with_shared:
        del stored["shared.weight"]
    write_bin(tmp_path, stored | {UNUSED: torch.ones(32, 3)}, V10)
    if with_shared or copies != ["lm_head"]:
        assert_holds(load_t5(tmp_path), weights)
    else:  # an output layer alone may be anything
        refusal(tmp_path, "pytorch_model.bin", "shared.weight is missing")


@pytest.mark.parametrize("copy", ["encoder.embed_tokens.weight", "decoder.embed_tokens.weight"])
def test_shared_goes_before_its_copies(tmp_path, copy):
    """Catches an embedding overwritten by what the file holds under another name."""
    weights = random_weights()
    write_bin(tmp_path, weights | {copy: torch.zeros(140, 40)})
    assert_holds(load_t5(tmp_path), weights)


def test_an_output_layer_of_its_own_stays_its_own(tmp_path):
    """Catches a layer that is dropped because config.json says tied, or tied because it still equals the embedding."""
    weights = random_weights()
    config = V11 | {"tie_word_embeddings": True, "scale_decoder_outputs": False}
    model = load_t5(write_bin(tmp_path, weights, config))
    assert_holds(model, weights)
    assert not model.config.tied and not model.config.scaled
    weights["lm_head.weight"] = weights["shared.weight"].clone()
    model = load_t5(write_bin(tmp_path, weights))
    assert_holds(model, weights)
    assert not model.config.tied and not model.config.scaled


def test_dropout_is_the_one_asked_for(tmp_path):
    """Catches config.json's dropout in training, whatever the run's own option says."""
    write_bin(tmp_path, random_weights())
    for options, expected in (({}, 0.0), ({"dropout": 0.3}, 0.3)):
        model = load_t5(tmp_path, **options)
        assert {module.p for module in model.modules() if isinstance(module, nn.Dropout)} == {expected}
        assert model.config.dropout == model.decoder[2].cross_attention.dropout == expected


def test_loading_draws_no_random_numbers(tmp_path):
    """Catches weights drawn in vain before they are read: twice the memory, and the run's random numbers moved on."""
    write_bin(tmp_path, random_weights())
    before = torch.get_rng_state()
    load_t5(tmp_path)
    assert torch.get_rng_state().equal(before)


# ---------------------------------------------------------------------------------------------------------------------
# Weights that are refused.


def test_no_weights_are_refused(tmp_path):
    """Catches a folder without weights that loads a random model."""
    (write_config(tmp_path, V11) / "tf_model.h5").write_bytes(b"x")
    refusal(tmp_path, "", "no weights", "model.safetensors", "pytorch_model.bin")


NAMES = [
    "shared.weight", "lm_head.weight", "encoder.final_layer_norm.weight", "decoder.block.2.layer.2.layer_norm.weight",
    "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight",
    "encoder.block.1.layer.0.SelfAttention.k.weight", "decoder.block.0.layer.1.EncDecAttention.v.weight",
    "decoder.block.1.layer.0.SelfAttention.o.weight", "decoder.block.1.layer.2.DenseReluDense.wi_0.weight",
]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_a_missing_weight_is_refused_by_name(tmp_path, name):
    """Catches a weight that stays random, or a KeyError."""
    weights = random_weights()
    del weights[name]
    refusal(write_bin(tmp_path, weights), "pytorch_model.bin", name, "missing")


@pytest.mark.parametrize("name", NAMES)
def test_a_weight_of_another_shape_is_refused_by_name(tmp_path, name):
    """Catches a weight that is broadcast or cut, or a mismatch that torch reports under our name for it."""
    weights = random_weights()
    weight = weights[name]
    for other in (weight[:-1], torch.cat([weight, weight]), weight[None], weight.flatten()[0]):
        write_bin(tmp_path, weights | {name: other.clone()})
        refusal(tmp_path, "pytorch_model.bin", name, f"{tuple(other.shape)}", f"{tuple(weight.shape)}")


def test_keys_and_values_are_checked_apart(tmp_path):
    """Catches a check of their sum: 20 rows of keys and 28 of values would pass and mix the two."""
    name, weights = "decoder.block.1.layer.1.EncDecAttention", random_weights()
    weights |= {f"{name}.k.weight": torch.ones(20, 40), f"{name}.v.weight": torch.ones(28, 40)}
    refusal(write_bin(tmp_path, weights), "pytorch_model.bin", f"{name}.k.weight", "(20, 40)", "(24, 40)")


@pytest.mark.parametrize(
    "name",
    [
        "encoder.block.2.layer.0.SelfAttention.q.weight",  # deeper than config.json says
        "encoder.block.1.layer.0.SelfAttention.relative_attention_bias.weight",
        "decoder.block.1.layer.1.EncDecAttention.relative_attention_bias.weight",
        "encoder.block.0.layer.1.DenseReluDense.wi.weight",
        "encoder.block.0.layer.0.SelfAttention.q.bias",
        "classification_head.dense.weight",
        "zebra",
    ],
)
def test_a_left_over_weight_is_refused_by_name(tmp_path, name):
    """Catches a model that is only a part of the one in the file."""
    refusal(write_bin(tmp_path, random_weights() | {name: torch.ones(3)}), "pytorch_model.bin", name, "no place")


def test_a_config_of_another_kind_than_its_weights_is_refused(tmp_path):
    """Catches v1.0's config.json beside v1.1's weights and the reverse, and one that promises an output layer."""
    plain = random_weights(False, (2, 2))
    refusal(write_bin(tmp_path, random_weights(True, (2, 2)), V10), "pytorch_model.bin", "layer.1.DenseReluDense.wi")
    config = V11 | {"num_decoder_layers": 2}
    refusal(write_bin(tmp_path, plain, config), "pytorch_model.bin", "weight is missing")
    config = V10 | {"tie_word_embeddings": False}
    refusal(write_bin(tmp_path, plain, config), "pytorch_model.bin", "lm_head.weight is missing")


@pytest.mark.parametrize("layout", [as_safetensors, as_bin, as_old_bin, as_two_bins, as_two_safetensors])
def test_damaged_weights_are_refused(tmp_path, layout):
    """Catches a traceback out of a library for a download that broke off, or a page of text in its place."""
    layout(write_config(tmp_path, V11), random_weights())
    file = max(file for file in tmp_path.iterdir() if file.suffix in (".bin", ".safetensors"))
    content = file.read_bytes()
    for part in (0, 4, 100, len(content) // 2, len(content) - 1):
        file.write_bytes(content[:part])
        refusal(tmp_path, file.name, "cannot be read as weights")
    file.write_text("<html>\nfile not found\n</html>\n" * 20)
    refusal(tmp_path, file.name, "cannot be read as weights")


class Bomb:
    """Unpickled, it makes a folder; it could as well have emptied one."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


@pytest.mark.parametrize("alone", [True, False])
@pytest.mark.parametrize("kind", ["zip", "old", "plain"])
def test_a_pickle_cannot_run_code(tmp_path, kind, alone):
    """Catches a .bin from a stranger that does as it likes with the reader's machine."""
    content = Bomb(tmp_path / "mark") if alone else random_weights() | {"zebra": Bomb(tmp_path / "mark")}
    file = write_config(tmp_path, V11) / "pytorch_model.bin"
    if kind == "plain":
        file.write_bytes(pickle.dumps(content, protocol=2))
    else:
        torch.save(content, file, _use_new_zipfile_serialization=kind == "zip")
    refusal(tmp_path, file.name, "cannot be read as weights")
    assert not (tmp_path / "mark").exists()
    if kind != "plain":  # and it would have
        torch.load(file, weights_only=False)
        assert (tmp_path / "mark").exists()


@pytest.mark.parametrize("content", [[1], [torch.ones(2)], torch.ones(2), None, 7, "x", {"step": 3}, {"a": [1.0]}, {1}])
def test_a_bin_of_something_else_is_refused(tmp_path, content):
    """Catches an AttributeError for a pickle of other things, such as a whole training state."""
    refusal(write_bin(tmp_path, content), "pytorch_model.bin", "cannot be read as weights")
    if isinstance(content, dict):
        refusal(write_bin(tmp_path, random_weights() | content), "pytorch_model.bin", "cannot be read as weights")


@pytest.mark.parametrize("index", [[], {}, None, "weight_map", {"weight_map": ["a"]}, {"weight_map": {"a": ["b"]}}])
def test_an_index_that_is_none_is_refused(tmp_path, index):
    """Catches a traceback for an index of another form."""
    refusal(write_index(tmp_path, index), "pytorch_model.bin.index.json", "not an index")


@pytest.mark.parametrize("name", [1, None])
def test_an_index_of_names_that_are_no_text_is_refused(tmp_path, name):
    """Catches a TypeError from the path of a file whose name is a number."""
    refusal(write_index(tmp_path, {"weight_map": {"a": name}}), "pytorch_model.bin.index.json", "not beside it")


def test_an_index_that_is_not_json_is_refused(tmp_path):
    """Catches a traceback for an index that broke off."""
    as_two_bins(write_config(tmp_path, V11), random_weights())
    file = tmp_path / "pytorch_model.bin.index.json"
    for content in (b"", file.read_bytes()[:-9], b"\xff\xfe"):
        file.write_bytes(content)
        refusal(tmp_path, file.name, "not an index")


@pytest.mark.parametrize("suffix", [".bin", ".safetensors"])
def test_an_index_that_names_a_missing_file_is_refused(tmp_path, suffix):
    """Catches a part of a download that is left out in silence, or blamed on the format."""
    as_two_bins(write_config(tmp_path, V11), random_weights())
    file = tmp_path / "pytorch_model.bin.index.json"
    index = json.loads(file.read_text())
    index["weight_map"]["shared.weight"] = f"part-3{suffix}"
    write_index(tmp_path, index)
    if suffix == ".safetensors":
        pytest.importorskip("safetensors")
    refusal(tmp_path, f"part-3{suffix}", "no such file")


@pytest.mark.parametrize("place", ["..", "sub", "absolute"])
def test_an_index_cannot_name_a_file_elsewhere(tmp_path, place):
    """Catches a stranger's index that makes us read any file of the machine."""
    folder = write_config(tmp_path / "t5", V11)
    (folder / "sub").mkdir()
    name = str(tmp_path / "outside.bin") if place == "absolute" else f"{place}/outside.bin"
    torch.save(random_weights(), folder / name)  # all that it needs
    write_index(folder, {"weight_map": dict.fromkeys(random_weights(), name)})
    refusal(folder, "pytorch_model.bin.index.json", "outside.bin", "not beside it")


def test_a_missing_weight_of_shards_names_the_index(tmp_path):
    """Catches shards that are each fine and together too few."""
    weights = random_weights()
    del weights["shared.weight"]
    as_two_bins(write_config(tmp_path, V11), weights)
    refusal(tmp_path, "pytorch_model.bin.index.json", "shared.weight is missing")


def test_without_safetensors_it_says_what_to_install(tmp_path, monkeypatch):
    """Catches an ImportError without advice, and one on import or for a .bin, which need no such package."""
    monkeypatch.setitem(sys.modules, "safetensors", None)
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    runpy.run_path(sys.modules["model"].__file__)
    weights = random_weights()
    assert_holds(load_t5(write_bin(tmp_path, weights)), weights)
    (tmp_path / "model.safetensors").write_bytes(b"")
    refusal(tmp_path, "model.safetensors", "pip install safetensors")
