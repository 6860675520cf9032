"""Runs from a T5 checkpoint (--init, --bertscore) and comparisons of methods over seeds (--compare)."""

import json
import shutil
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import contents, lines, read
from test_r2d import same_state

import data
import metrics
import r2d
from model import ModelConfig, Transformer, load_t5, t5_names

STEPS = "--limit 48 --stage1-steps 4 --stage2-steps 8 --eval-every 4 --batch-size 8 --max-target 24".split()
TINY = [*STEPS, *"--width 16 --heads 2 --layers 1 --vocab-size 400".split()]


def write_t5(folder: Path, extra: int = 28, **shape: object) -> Path:
    """A random T5 v1.1 in the Hugging Face layout, with a tokenizer of its own and `extra` ids that it never gives."""
    import sentencepiece

    folder.mkdir()
    texts = [text for e in data.load_data("triage", 0, 200, "llm", "llm").train for text in (e.question, e.rationale)]
    prefix = str(folder / "spiece")
    sentencepiece.SentencePieceTrainer.train(  # T5's own kind: unigram, nmt_nfkc, padding 0, end 1, unknown 2
        sentence_iterator=iter([*texts, *data.DISPOSITIONS, "given label: predict: explain:"]), model_prefix=prefix,
        vocab_size=500, hard_vocab_limit=False, pad_id=0, eos_id=1, unk_id=2, bos_id=-1, minloglevel=2,
    )  # fmt: skip
    size = len(data.Tokenizer.load(folder / "spiece.model")) + extra
    torch.manual_seed(7)
    model = Transformer(ModelConfig(size, 16, 2, 8, 24, 2, 1, 0.0, 32, 128, gated=True, tied=False, scaled=False))
    weights = {}
    for name, p in model.named_parameters():
        names = t5_names(name, gated=True)
        weights |= {t5: part.clone() for t5, part in zip(names, p.detach().chunk(len(names)), strict=True)}
    torch.save(weights, folder / "pytorch_model.bin")
    config = {
        "model_type": "t5", "vocab_size": size, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_heads": 2, "num_layers": 2,
        "num_decoder_layers": 1, "relative_attention_num_buckets": 32, "dropout_rate": 0.1, "pad_token_id": 0,
        "eos_token_id": 1, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False, **shape,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def t5(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_t5(tmp_path_factory.mktemp("t5") / "checkpoint")


# --- --init


def test_init_eval_scores_the_weights_as_they_are(t5: Path, tmp_path: Path) -> None:
    """Catches an evaluation of fresh random weights, with another tokenizer, or after some training, and a training
    after it that begins from random weights."""
    out = tmp_path / "run"
    assert r2d.main([*STEPS, "--init", str(t5), "--eval", "--out", str(out)]) == 0
    assert not list(out.glob("*.pt")) and read(out / "metrics.json")["updates"] == 0
    tokenizer, model = data.Tokenizer.load(t5 / "spiece.model"), load_t5(t5).eval()
    row = lines(out / "predictions.jsonl")[0]
    source = [*tokenizer.encode(f"predict: {row['question']}"), 1]
    longest = max(len(tokenizer.encode(label)) + 1 for label in data.DISPOSITIONS)
    assert row["predicted_label"] == tokenizer.decode(model.generate(torch.tensor([source]), longest)[0].tolist())
    assert r2d.main(["--out", str(out), "--stage", "1"]) == 0  # and training can still begin from there
    assert r2d.main([*STEPS, "--init", str(t5), "--stage", "1", "--out", str(tmp_path / "other")]) == 0
    losses = [[line["loss"] for line in lines(folder / "log.jsonl")] for folder in (out, tmp_path / "other")]
    assert losses[0] == losses[1] and len(losses[0]) == 4


def test_init_trains_from_the_checkpoint_at_its_own_rate(t5: Path, tmp_path: Path) -> None:
    """Catches random weights under the checkpoint's shape, a rate for random weights, and dropout left on."""
    one = r2d.prepare(r2d.Options(init=str(t5), limit=48, out=str(tmp_path / "run")))
    theirs = load_t5(t5)
    assert all(torch.equal(a, b) for a, b in zip(one.model.parameters(), theirs.parameters(), strict=True))
    assert one.options.lr == 1e-3 and one.model.config.dropout == 0 and one.model.training
    assert r2d.prepare(r2d.Options(init=str(t5), limit=48, dropout=0.2)).model.decoder[0].dropout.p == 0.2


def test_init_run_resumes_and_answers_without_the_checkpoint(t5: Path, tmp_path: Path, monkeypatch) -> None:
    """Catches a resume that starts from the checkpoint again, and a finished run that still needs its folder."""
    folder = shutil.copytree(t5, tmp_path / "t5")
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert r2d.main([*STEPS, "--init", str(folder), "--out", str(whole)]) == 0
    save, saved = r2d.save_checkpoint, []

    def stop_after_a_save(path: Path, *content: object, **previous: Path) -> None:
        save(path, *content, **previous)
        saved.append(path.name)
        if saved.count("last.pt") == 3:  # in the middle of stage 2
            raise KeyboardInterrupt

    monkeypatch.setattr(r2d, "save_checkpoint", stop_after_a_save)
    assert r2d.main([*STEPS, "--init", str(folder), "--out", str(parts)]) == 130
    monkeypatch.setattr(r2d, "save_checkpoint", save)
    (folder / "pytorch_model.bin").unlink()
    assert r2d.main(["--out", str(parts)]) == 0
    assert same_state(whole, parts)
    assert (whole / "predictions.jsonl").read_bytes() == (parts / "predictions.jsonl").read_bytes()
    shutil.rmtree(folder)
    assert r2d.main(["--out", str(whole), "--ask", "A cough for 2 days."]) == 0


def test_parts_of_a_prompt_give_the_ids_of_the_whole_in_a_t5_tokenizer(t5: Path) -> None:
    """Catches prompts that T5 has never seen: a head and a question joined otherwise than by one space."""
    tokenizer = data.Tokenizer.load(t5 / "spiece.model")
    prompts = data.Prompts(tokenizer, 256, 128)
    for e in data.load_data("triage", 1, 50, "llm", "llm").train:
        for head in (data.PREDICT, data.EXPLAIN, data.EXPLAIN_GIVEN.format(label=e.label)):
            assert prompts.source(head, e.question) == [*tokenizer.encode(f"{head} {e.question}"), 1]


def test_ids_beyond_the_tokenizer_are_no_text(t5: Path) -> None:
    """Catches a crash on T5's extra ids: its vocabulary is padded to more ids than the tokenizer knows."""
    tokenizer = data.Tokenizer.load(t5 / "spiece.model")
    home = tokenizer.encode("home care")
    assert tokenizer.decode([len(tokenizer), *home, len(tokenizer) + 27, 1, 5]) == "home care"


def damage(folder: Path, how: str) -> None:
    weights = folder / "pytorch_model.bin"
    if how == "config":
        (folder / "config.json").unlink()
    elif how == "tokenizer":
        (folder / "spiece.model").unlink()
    elif how == "no tokenizer":
        (folder / "spiece.model").write_bytes(b"not a model")
    elif how == "no weights":
        weights.unlink()
    elif how == "truncated":
        weights.write_bytes(weights.read_bytes()[:-5000])
    elif how == "shape":
        state = torch.load(weights, weights_only=True)
        state["encoder.block.1.layer.1.DenseReluDense.wo.weight"] = torch.zeros(3, 3)
        torch.save(state, weights)
    elif how == "small":
        config = read(folder / "config.json") | {"vocab_size": 99}
        (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
        state = torch.load(weights, weights_only=True)
        state |= {name: state[name][:99].clone() for name in ("shared.weight", "lm_head.weight")}
        torch.save(state, weights)


DAMAGE = {"config": "config.json", "tokenizer": "spiece.model", "no tokenizer": "spiece.model"}
DAMAGE |= {"no weights": "pytorch_model.bin", "truncated": "pytorch_model.bin", "small": "spiece.model"}
DAMAGE |= {"shape": "encoder.block.1.layer.1.DenseReluDense.wo.weight"}


@pytest.mark.parametrize("option", ["--init", "--bertscore"])
@pytest.mark.parametrize("how", DAMAGE)
def test_a_bad_t5_folder_ends_in_one_line_and_loses_nothing(
    how: str, option: str, t5: Path, finished_run: Path, tmp_path: Path, capsys
) -> None:
    """Catches a traceback from a stranger's checkpoint, and a run damaged or left behind by it."""
    folder, out = shutil.copytree(t5, tmp_path / "t5"), tmp_path / "run"
    damage(folder, how)
    if option == "--bertscore":
        shutil.copytree(finished_run, out)
    before = contents(out) if out.exists() else None
    shape = STEPS if option == "--init" else TINY
    assert r2d.main([*shape, option, str(folder), "--out", str(out), "--eval"]) == 2
    message = capsys.readouterr().err
    assert message.count("r2d.py:") == 1 and message.endswith("\n") and DAMAGE[how] in message
    assert before == (contents(out) if out.exists() else None)


# --- --bertscore


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("finished") / "run"
    assert r2d.main([*TINY, "--out", str(out)]) == 0
    return out


def test_bertscore_uses_the_encoder_it_was_given_and_says_so(
    finished_run: Path, t5: Path, tmp_path: Path, capsys, monkeypatch
) -> None:
    """Catches --bertscore that changes only the name in the table, the wrong tokenizer, the end token scored, or texts
    cut at --max-target. A model this small writes nothing, so the notes stand in for what it writes."""
    out, own = shutil.copytree(finished_run, tmp_path / "run"), read(finished_run / "metrics.json")
    assert own["bertscore_encoder"] == "stage1.pt of this run"
    monkeypatch.setattr(r2d, "explain", lambda run, questions, labels: questions)
    assert r2d.main([*TINY, "--out", str(out), "--eval", "--bertscore", str(t5)]) == 0
    assert f"BERTScore's encoder: {t5}" in capsys.readouterr().out
    result = read(out / "metrics.json")
    tokenizer, model = data.Tokenizer.load(t5 / "spiece.model"), load_t5(t5).eval()

    def vectors(text: str) -> np.ndarray:
        return model.encode(torch.tensor([[*tokenizer.encode(text), 1]]))[0, :-1].detach().numpy()

    rows = lines(out / "predictions.jsonl")
    pairs = [(vectors(row["rationale_given_gold"]), vectors(row["rationale"])) for row in rows]
    assert result["bertscore_encoder"] == str(t5)
    expected = np.mean([metrics.bertscore(*pair)[2] for pair in pairs])
    assert result["rationale"]["gold"]["bertscore_f1"] == pytest.approx(expected, abs=1e-3)
    assert result["label"] == own["label"]


def test_bertscore_without_stage1_says_whose_encoder_it_was(tmp_path: Path) -> None:
    """Catches a table that names an encoder that was never trained."""
    assert r2d.main([*TINY, "--method", "dss", "--out", str(tmp_path / "run")]) == 0
    assert read(tmp_path / "run" / "metrics.json")["bertscore_encoder"] == "the model itself"


# --- --compare

ITEMS = ["sft", "dss", "r2d", "r2d,no-stage1", "r2d,schedule=none,rationales=nurse,eval-every=8"]


@pytest.fixture(scope="module")
def comparison(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("compare") / "all"
    assert r2d.main([*TINY, "--out", str(out), "--compare", *ITEMS, "--seeds", "3", "1"]) == 0
    return out


def test_compare_gives_every_method_the_same_budget(comparison: Path) -> None:
    """Catches a baseline with fewer updates: a run without stage 1 makes its updates in stage 2."""
    rows = read(comparison / "compare.json")
    assert {row["updates"] for row in rows.values()} == {12}
    for item, steps in {"sft": 12, "dss": 12, "r2d": 12, "r2d_no-stage1": 12}.items():
        assert len(lines(comparison / f"{item}-3" / "log.jsonl")) == steps
    one = r2d.prepare(r2d.Options(method="sft", limit=48, batch_size=8))
    other = r2d.prepare(r2d.Options(limit=48, batch_size=8)).options
    assert one.options.stage2_steps == other.stage1_steps + other.stage2_steps  # by default as well


def test_compare_sets_the_options_of_each_item(comparison: Path) -> None:
    """Catches an ablation that is the full method under another name, an option of the whole comparison that wins over
    the item's own, and a seed that is not the folder's."""
    config = read(comparison / "r2d_schedule_none_rationales_nurse_eval-every_8-1" / "config.json")
    assert (config["schedule"], config["rationales"], config["eval_every"], config["seed"]) == ("none", "nurse", 8, 1)
    assert read(comparison / "r2d_no-stage1-3" / "config.json")["no_stage1"]
    assert not (comparison / "r2d_no-stage1-3" / "stage1.pt").exists()
    plain = read(comparison / "r2d-3" / "config.json")
    assert (plain["schedule"], plain["no_stage1"], plain["method"]) == ("linear", False, "r2d")
    assert [read(comparison / f"{method}-1" / "config.json")["method"] for method in ("sft", "dss")] == ["sft", "dss"]


def test_compare_reports_the_runs_own_numbers(comparison: Path, tmp_path: Path) -> None:
    """Catches seeds mixed up between methods: values in the order of the seeds, differences paired by seed.

    Runs this small all score 0, so every score is replaced by a number that no other has.
    """
    out, rng = shutil.copytree(comparison, tmp_path / "numbers"), np.random.default_rng(0)
    for path in sorted(out.glob("*/metrics.json")):
        result = read(path)
        for group in (result["label"], *result.get("rationale", {}).values()):
            group |= {key: rng.uniform(0, 100) for key, value in group.items() if isinstance(value, float)}
        path.write_text(json.dumps(result), encoding="utf-8")
    assert r2d.main([*TINY, "--out", str(out), "--compare", *ITEMS, "--seeds", "3", "1"]) == 0
    rows = read(out / "compare.json")
    for key, path in (("accuracy", ("label", "accuracy")), ("bleu_gold", ("rationale", "gold", "bleu"))):
        for item in ("r2d", "r2d,no-stage1"):
            values = []
            for seed in (3, 1):
                score = read(out / f"{item.replace(',', '_')}-{seed}" / "metrics.json")
                for name in path:
                    score = score[name]
                values.append(score)
            assert rows[item][key]["values"] == values
        both = np.array([rows[item][key]["values"] for item in ("r2d,no-stage1", "r2d")])
        assert rows["r2d,no-stage1"][key]["minus_r2d"] == metrics.mean_over_seeds(both[0] - both[1])
    assert len({value for row in rows.values() for value in row["accuracy"]["values"]}) == 2 * len(ITEMS)
    assert rows["sft"]["bleu"]["mean"] is None and rows["sft"]["bleu"]["values"] == [None, None]


def test_compare_skips_what_is_finished_and_goes_on_with_the_rest(comparison: Path, tmp_path: Path, capsys) -> None:
    """Catches work done twice, and a comparison that cannot be continued after Ctrl-C."""
    out = shutil.copytree(comparison, tmp_path / "again")
    trained = [out / name / "last.pt" for name in ("r2d-3", "sft-1")]  # of the second, only the evaluation is missing
    before = [path.stat().st_mtime_ns for path in trained]
    (out / "sft-1" / "metrics.json").unlink()
    shutil.rmtree(out / "dss-1")
    assert r2d.main([*TINY, "--out", str(out), "--compare", "sft", "dss", "r2d", "--seeds", "3", "1"]) == 0
    assert capsys.readouterr().out.count("holds a finished run") == 4
    assert [path.stat().st_mtime_ns for path in trained] == before
    assert read(out / "compare.json")["dss"] == read(comparison / "compare.json")["dss"]


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--compare", "sft", "bert", "--seeds", "1"], "bert"),
        (["--compare", "sft", "r2d,capp=1"], "--capp"),
        (["--compare", "sft", "r2d,cap=2"], "--cap"),
        (["--compare", "sft", "r2d", "--seed", "1"], "--seed"),
        (["--compare", "sft", "r2d", "--method", "sft"], "--method"),
        (["--compare", "sft", "r2d", "--ask", "x"], "--ask"),
        (["--compare", "sft", "r2d,seed=1"], "seed"),
        (["--compare", "sft", "r2d", "--seeds", "x"], "--seeds"),
        (["--compare", "sft", "r2d", "--seeds", "0", "-1"], "--seed"),
        (["--seeds", "1"], "--seeds"),
        (["--init", "nowhere"], "nowhere"),
        (["--bertscore", "nowhere"], "nowhere"),
        (["--init", ".", "--width", "64"], "--width"),
    ],
)
def test_wrong_comparisons_end_before_the_first_run(arguments: list[str], named: str, tmp_path: Path, capsys) -> None:
    """Catches a misspelt option that is noticed after the first hour of training: what comes before it is right."""
    assert r2d.main([*STEPS, *arguments, "--out", str(tmp_path / "out")]) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1 and named in message and not (tmp_path / "out").exists()


def test_table_of_one_seed_has_no_interval(comparison: Path, tmp_path: Path, capsys) -> None:
    """Catches an interval made up from one number."""
    out = shutil.copytree(comparison, tmp_path / "one")
    assert r2d.main([*TINY, "--out", str(out), "--compare", "sft", "r2d", "--seeds", "1"]) == 0
    assert "+-nan" in capsys.readouterr().out
    assert read(out / "compare.json")["sft"]["accuracy"]["minus_r2d"]["p"] is None


def test_config_of_a_model_can_be_read_back(t5: Path, tmp_path: Path) -> None:
    """Catches a field of the model's shape that config.json does not hold."""
    one = r2d.prepare(r2d.Options(init=str(t5), limit=48, out=str(tmp_path)))
    r2d.start(one)
    assert r2d.read_config(tmp_path)["model"] == asdict(one.model.config) == asdict(load_t5(t5).config)
