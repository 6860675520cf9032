"""The method and its runs: schedules, losses, training, the test. Each test names its bug."""

import copy
import itertools
import json
import math
import re
import shutil
import signal
import statistics
from collections import Counter
from pathlib import Path

import pytest
import torch
from helpers import FILES, TINY, contents, lines, read, same, write_folder, write_notes, write_t5
from torch import Tensor

import data
import metrics
import r2d


def start(out: Path, *arguments: str) -> int:
    return r2d.main([*TINY, "--out", str(out), *arguments])


def tiny(*arguments: str) -> r2d.Run:
    return r2d.setup(r2d.parse_args([*TINY, "--out", "never-made", *arguments]))


def weights(path: Path) -> dict[str, Tensor]:
    return torch.load(path, weights_only=True)["weights"]


@pytest.fixture(scope="module")
def easy(tmp_path_factory):
    """Options under which labels are valid after a few updates."""
    notes = write_notes(tmp_path_factory.mktemp("notes") / "notes.csv")
    return ["--data", str(notes), "--width", "32", "--lr", "0.1", "--stage2-steps", "16"]


@pytest.fixture(scope="module")
def easy_run(easy, tmp_path_factory):
    out = tmp_path_factory.mktemp("easy") / "run"
    assert start(out, *easy, "--stage2-steps", "60") == 0
    return out


# ---- schedules and coins ------------------------------------------------------------------------
# Update of 1000: P(predicted), warm-up 0.05, ramp 0.6, cap 0.9; linear is at 0.9 from 590 on
LINEAR = {0: 0, 49: 0, 50: 0, 51: 1 / 600, 200: 0.25, 350: 0.5, 589: 539 / 600, 590: 0.9, 999: 0.9}
EXPONENTIAL = {0: 0, 50: 0, 350: 1 - 0.1**0.5, 500: 1 - 0.1**0.75, 650: 0.9, 999: 0.9}
# 1 - k / (k + e^(i/k)), k = 89.6448: the root of P = 0.9 at i = 600, by scipy's brentq
SIGMOID = {49: 0, 50: 0.0110321, 200: 0.0561158, 350: 0.2406141, 500: 0.628072, 649: 0.8989915}
TABLES = {"linear": LINEAR, "exponential": EXPONENTIAL, "inverse-sigmoid": SIGMOID}


@pytest.mark.parametrize("schedule", TABLES)
def test_schedule_has_the_values_worked_out_by_hand(schedule):
    """Catches a ramp of another length, one that counts from update 0, epsilon for P; a schedule
    that falls, overshoots, divides by 0."""
    for step, expected in TABLES[schedule].items():
        p = r2d.p_predicted(step, 1000, schedule, 0.05, 0.6, 0.9)
        assert p == pytest.approx(expected, abs=1e-6), step
    for cap, steps in itertools.product([0.0, 0.3, 0.9, 1.0], [10, 1500]):
        p = [r2d.p_predicted(step, steps, schedule, 0.05, 0.6, cap) for step in range(steps)]
        assert (p, p[0], p[-1]) == (sorted(p), 0, cap)
        assert r2d.p_predicted(0, steps, schedule, 0, 0, cap) == cap
        assert r2d.p_predicted(steps - 1, steps, "none", 0.05, 0.6, cap) == 0


def test_alpha_and_learning_rate():
    """Catches an alpha that starts high or keeps rising, and a rate without or with a warm-up."""
    values = [r2d.alpha_at(step, 1000, 0.05, 0.7) for step in (0, 25, 50, 999)]
    assert values == pytest.approx([0, 0.35, 0.7, 0.7])
    assert r2d.alpha_at(0, 1000, 0, 0.7) == 0.7
    rates = [r2d.lr_at(step, 100, 0.5, 0.1) for step in (0, 4, 9, 55, 99)]
    assert rates == pytest.approx([0.05, 0.25, 0.5, 0.25, 0.5 / 90])
    assert [r2d.lr_at(step, 4, 0.5, 0) for step in range(4)] == [0.5, 0.375, 0.25, 0.125]


def test_coins_are_fair_within_five_sigma_and_one_per_example():
    """Catches an inverted coin, one coin for the whole batch, and a generator that is not used."""
    generator = torch.Generator().manual_seed(0)
    sums = [sum(r2d.flip_coins(32, 0.3, generator)) for _ in range(1000)]
    assert abs(sum(sums) - 9600) < 5 * math.sqrt(32000 * 0.3 * 0.7)
    assert len(set(sums)) > 10
    assert r2d.flip_coins(100, 0.0, generator) == [False] * 100
    before = torch.get_rng_state()
    assert r2d.flip_coins(100, 1.0, generator) == [True] * 100
    assert torch.get_rng_state().equal(before)


# ---- losses -------------------------------------------------------------------------------------
def test_mix_labels_takes_valid_predicted_labels_where_the_coin_says(monkeypatch):
    """Catches sampling that does nothing, swapped coins, garbage in a prompt (the authors' code
    has it), wrong counts, and labels that are generated for examples that do not use them."""
    run = tiny()
    questions, gold, _ = data.columns(run.dataset.train[:6])
    wrong = next(label for label in run.dataset.labels if label != gold[0])
    answers = [wrong, "nonsense", gold[3], "", gold[5]]
    asked = []
    monkeypatch.setattr(r2d, "predict_labels", lambda run, q: asked.extend(q) or answers)
    coins = [True, False, True, True, True, True]
    labels, counts = r2d.mix_labels(run, run.dataset.train[:6], coins)
    assert labels == [wrong, *gold[1:]]
    assert counts == {"used_predicted": 3, "wrong_predicted": 1, "invalid_predicted": 2}
    assert asked == [questions[0], *questions[2:]]


# Method: alpha and P at updates 2 and 6 of 8, with a warm-up of 4 and no ramp
WEIGHTS = {"r2d": [(0.35, 0.0), (0.7, 1.0)], "dss": [(0.7, 0.0)] * 2, "sft": [(None, None)] * 2}


@pytest.mark.parametrize("method", WEIGHTS)
def test_prompts_targets_and_losses_of_every_method(method, monkeypatch):
    """Catches a swapped rationale, a label shown in DSS, a second task in SFT; schedule, coins or
    warm-up in a baseline; a mean over padding or rows, an empty target, alpha on the wrong loss."""
    run = tiny(*"--max-target 200 --warmup 0.5 --ramp 0 --cap 1 --method".split(), method)
    run.dataset.labels = ["?", *run.dataset.labels]
    batch = [*run.dataset.train[:4], data.Example("q", "home care", "")]
    seen = []

    def nll(input_ids: Tensor, target_ids: Tensor) -> Tensor:
        for source, target in zip(input_ids.tolist(), target_ids.tolist(), strict=True):
            seen.append((run.tokenizer.to_text(source), run.tokenizer.to_text(target)))
        return target_ids.float()  # as many nats as its id, 0 for padding

    def mean(texts: list[str]) -> float:
        ids = run.tokenizer.to_ids(texts, 200)
        return pytest.approx((ids.sum() / ids.count_nonzero()).item())

    monkeypatch.setattr(run.model, "nll", nll)
    monkeypatch.setattr(r2d, "predict_labels", lambda run, questions: ["?"] * len(questions))
    prefix = {"r2d": "given label: {}, explain: ", "dss": "explain: "}.get(method)
    _, labels, rationales = data.columns(batch)
    expected = []
    for step, (alpha, p) in zip((2, 6), WEIGHTS[method], strict=True):
        loss, log = r2d.stage2_loss(run, batch, step)
        assert (log.get("alpha"), log.get("p_predicted")) == (alpha, p)
        assert log["loss_predict"] == mean(labels)
        both = log["loss_predict"]
        expected += [(f"predict: {e.question}", e.label) for e in batch]
        if prefix:
            assert log["loss_explain"] == mean(rationales)
            both = alpha * both + (1 - alpha) * log["loss_explain"]
            for e in batch:
                expected.append((prefix.format("?" if p else e.label) + e.question, e.rationale))
        assert loss.item() == log["loss"] == pytest.approx(both)
    loss, log = r2d.stage1_loss(run, batch, 0)
    assert loss.item() == log["loss"] == log["loss_explain"] == mean(rationales)
    assert seen == expected + [(f"explain: {e.question}", e.rationale) for e in batch]
    assert r2d.stage1_loss(run, batch[4:], 0)[0].item() == 0  # and not nan


# ---- training -----------------------------------------------------------------------------------
def test_rates(easy, easy_run, tmp_path):
    """Catches one rate for all tensors of Muon, sizes measured anew at each update or in another
    stage, AdamW with Muon's rates (the relative ones: test_model.py)."""
    lr = lines(easy_run / "log.jsonl")[-1]["lr"]
    run = tiny(*easy)
    run.model.load_state_dict(weights(easy_run / "stage1.pt"))
    saved = torch.load(easy_run / "last.pt", weights_only=True)["optimizers"]
    for state, optimizer in zip(saved, run.model.make_optimizers("muon"), strict=True):
        expected = [lr * group["relative_lr"] for group in optimizer.param_groups]
        assert [group["lr"] for group in state["param_groups"]] == pytest.approx(expected)
    assert start(tmp_path, "--optimizer", "adamw", "--stage", "1") == 0
    rates = [line["lr"] for line in lines(tmp_path / "log.jsonl")]
    assert rates == pytest.approx([0.001, 0.00075, 0.0005, 0.00025])


LOSSES = [5, 6, 6, 4, 6, 4, 5]  # stage 1: best at the fourth, then patience 3
SCORES = [1, 0, 0, 0, 0, 2, 1, 2, 0, 0, 0]  # stage 2: best at the sixth that counts, patience 5


@pytest.mark.parametrize(("ramp", "first"), [("0.3", 26), ("0.65", 28)])
def test_selection_and_early_stopping(ramp, first, tmp_path, monkeypatch):
    """Catches a checkpoint from before 65 % or the ramp's end, patience that is not reset, a
    stage 2 not from the best weights or from a file, which rank 0 may still be writing; dropout
    in validation, the same dropout or coins again, gradients that are not clipped to norm 1."""
    began, kept, drawn, norms = [], [], [], []
    scores = [{"val_loss": x} for x in LOSSES]
    scores += [{"val_macro_f1": x} for x in [9] * (first - 1) + SCORES]
    token_loss = r2d.token_loss

    def validate(run: r2d.Run, stage: int) -> dict:
        assert not run.model.training
        kept.append(copy.deepcopy(run.model.state_dict()))
        return scores[len(kept) - 1]

    def spy(run: r2d.Run, prompts: list, targets: list) -> Tensor:
        assert run.model.training
        began.append(copy.deepcopy(run.model.state_dict()))
        grads = [weight.grad for weight in run.model.parameters() if weight.grad is not None]
        norms.append(math.hypot(*map(torch.norm, grads)))  # of the update before
        drawn.append(torch.rand(1).item())
        return token_loss(run, prompts, targets)

    def flip_coins(n: int, p: float, generator: torch.Generator) -> list[bool]:
        drawn.append(generator.initial_seed())
        return [False] * n

    new = {"validate": validate, "token_loss": spy, "flip_coins": flip_coins, "evaluate": id}
    new["load"] = None
    for name, function in new.items():
        monkeypatch.setattr(r2d, name, function)
    more = "--stage1-steps 20 --stage2-steps 40 --eval-every 1 --ramp".split()
    assert start(tmp_path, *more, ramp) == 0
    log = lines(tmp_path / "log.jsonl")
    stages = [line["stage"] for line in log]
    assert (stages.count(1), stages.count(2)) == (len(LOSSES), len(scores) - len(LOSSES))
    assert same(weights(tmp_path / "stage1.pt"), kept[3])
    assert same(began[len(LOSSES)], kept[3])
    assert same(weights(tmp_path / "stage2.pt"), kept[len(LOSSES) + first - 1 + 5])
    assert len(set(drawn)) == len(drawn)
    assert log[0]["grad_norm"] > 1 and norms[1] == pytest.approx(1, rel=1e-4)


# Options of stage 1: how many examples it then has for training and for validation
STAGE_1 = {"--stage1-rationales nurse": (100, 200), "--stage1-notes 144": (144, 200)}
STAGE_1 |= {"--stage1-data FILE --dtype bfloat16": (69, 11)}


@pytest.mark.parametrize("more", STAGE_1)
def test_stage_1_learns_and_validates_on_its_own_rationales(more, tmp_path, monkeypatch):
    """Catches a stage 1 that learns stage 2's rationales or is validated on them, one that changes
    the notes of stage 2, --stage1-data that need a label or lose rationales, epochs that repeat the
    batches of the first, a --dtype without effect."""
    pairs = {True: [], False: []}
    target_nll = r2d.target_nll

    def spy(run: r2d.Run, prompts: list[str], targets: list[str]) -> tuple[Tensor, Tensor]:
        assert torch.is_autocast_enabled("cpu") == ("bfloat16" in more)
        pairs[run.model.training].append(tuple(zip(prompts, targets, strict=True)))
        return target_nll(run, prompts, targets)

    monkeypatch.setattr(r2d, "target_nll", spy)
    options = "--limit 200 --notes 100 --stage 1 --batch-size 24 --stage1-steps 12".split()
    plain = tiny(*options).dataset
    file = write_notes(tmp_path / "stage1.csv", every=2)
    file.write_text(re.sub(",(label|go|stay),", ",", file.read_text("utf-8")), "utf-8")
    options += more.replace("FILE", str(file)).split()
    assert start(tmp_path / "run", *options) == 0
    own = tiny(*options).dataset
    assert (len(own.stage1_train), len(own.stage1_val)) == STAGE_1[more]
    assert (own.train, own.val) == (plain.train, plain.val)
    assert set(own.stage1_train).isdisjoint(own.train) == ("notes" not in more)
    assert len(set(pairs[True])) == 12
    for batches, examples in zip(pairs.values(), (own.stage1_train, own.stage1_val), strict=True):
        expected = {(f"explain: {e.question}", e.rationale) for e in examples}
        assert set().union(*batches) == expected


def test_few_rationales_are_enough_but_none_are_refused(tmp_path):
    """Catches a mean over nothing, which no later checkpoint can beat; batches without rationale
    in stage 1 (momentum alone then moves the weights, later NaN); NaN in a file; splits of a
    folder that are mixed up; methods that ask for rationales they do not need."""
    none_in_train = ["--data", write_folder(tmp_path / "a", 999, 1)]
    none_in_val = ["--data", write_folder(tmp_path / "b", 1, 999)]
    for options in (none_in_train, none_in_val):
        with pytest.raises(data.InputError, match="no rationales"):
            tiny(*options)
    tiny(*none_in_train, "--method", "sft")
    tiny(*none_in_val, "--method", "dss")
    tiny(*none_in_val, "--no-stage1")
    more = "--limit 100 --warmup 1 --stage1-steps 12 --data".split()
    more.append(write_folder(tmp_path / "c", 50, 50))
    assert start(tmp_path / "run", *more) == 0
    dataset = tiny(*more).dataset
    assert dataset.stage1_train == [e for e in dataset.train if e.rationale]
    saved = torch.load(tmp_path / "run" / "last.pt", weights_only=True)
    assert all(line["loss"] > 0 for line in saved["progress"]["log"][:12])
    json.dumps(saved, default=Tensor.tolist, allow_nan=False)


# ---- whole runs ---------------------------------------------------------------------------------
def test_a_run_leaves_the_files_of_the_contract(finished):
    """Catches a file, an option or a key that was renamed or left over; another schedule; a seed
    that decides nothing."""
    assert sorted(contents(finished)) == FILES
    config = read(finished / "config.json")
    assert config["labels"] == data.DISPOSITIONS
    assert config["model"]["d_model"] == config["width"] == 16
    assert not same(tiny().model.state_dict(), tiny("--seed", "1").model.state_dict())
    options = set(vars(r2d.parse_args(["--out", "never-made"])))
    assert options - set(config) == {"stage", "out", "device", "eval", "ask", "given"}
    log = lines(finished / "log.jsonl")
    expected = [(1, step) for step in range(4)] + [(2, step) for step in range(8)]
    assert [(line["stage"], line["step"]) for line in log] == expected
    keys = {"stage", "step", "loss", "loss_explain", "lr", "grad_norm"}
    assert [set(line) ^ keys for line in log[:4]] == [set()] * 3 + [{"val_loss"}]
    keys |= {"alpha", "loss_predict", "p_predicted", "prompts", "used_predicted"}
    keys |= {"wrong_predicted", "invalid_predicted"}
    assert [set(line) ^ keys for line in log[4:]] == ([set()] * 3 + [{"val_macro_f1"}]) * 2
    for line in log[4:]:
        assert line["lr"] == r2d.lr_at(line["step"], 8, 0.04, 0.1)
        assert line["p_predicted"] == r2d.p_predicted(line["step"], 8, "linear", 0.05, 0.6, 0.9)
        assert line["alpha"] == r2d.alpha_at(line["step"], 8, 0.05, 0.7)


CONDITIONS = {"r2d": ["gold", "predicted", "flipped"], "dss": ["predicted"], "sft": []}


@pytest.mark.parametrize("method", CONDITIONS)
def test_metrics_are_the_scores_of_the_rows(method, easy, easy_run, tmp_path):
    """Catches scores of something else than these rows, a row without a fact, a reader unused; a
    mask or cache that --dtype bfloat16 cannot have; any break between prompts, model, loss,
    optimiser and decoding, by which nothing would be learned."""
    out = easy_run if method == "r2d" else tmp_path
    assert method == "r2d" or start(out, "--method", method, "--dtype", "bfloat16", *easy) == 0
    rows = lines(out / "predictions.jsonl")
    scores = metrics.score(rows, read(out / "config.json")["labels"])
    scores |= {"method": method, "data": easy[1], "seed": 0}
    assert read(out / "metrics.json") == scores and scores["label"]["accuracy"] > 85
    assert method != "r2d" or scores["rationale"]["predicted"]["bleu"] > 95
    keys = {"question", "label", "rationale", "predicted_label", "flipped_label", "majority_label"}
    for condition in CONDITIONS[method]:
        keys |= {f"{name}_given_{condition}" for name in ("rationale", "argues", "nats")}
    for row in rows:
        assert set(row) - {"tokens", "reader_label"} == keys
        assert {row[key] for key in keys if key.startswith("argues")} <= {"go", "stay", None}
    assert (out / "stage1.pt").exists() == (method == "r2d")


def test_facts_of_the_rows_on_triage(finished):
    """Catches a ceiling that is the model's, verdicts by the reader, nats of another prompt."""
    run = tiny()
    run.model.load_state_dict(weights(finished / "stage2.pt"))
    rows = lines(finished / "predictions.jsonl")
    for row, ceiling in zip(rows, run.dataset.ceiling, strict=True):
        assert ceiling.items() <= row.items()
        for condition in metrics.LABEL_KEYS:
            text = row[f"rationale_given_{condition}"]
            assert row[f"argues_given_{condition}"] == data.argues_for(text)
            assert row[f"ungrounded_given_{condition}"] == data.ungrounded(text, row["question"])
        for condition in CONDITIONS["r2d"]:
            label = row[metrics.LABEL_KEYS[condition]]
            prompt = f"given label: {label}, explain: {row['question']}"
            target_ids = run.tokenizer.to_ids([row["rationale"]], 24)
            nll = run.model.nll(run.tokenizer.to_ids([prompt], 256), target_ids).sum().item()
            assert row[f"nats_given_{condition}"] == pytest.approx(nll, rel=1e-4)
            assert row["tokens"] == target_ids.shape[1]
    assert set(metrics.LABEL_KEYS) <= set(read(finished / "metrics.json")["rationale"])


def test_the_test_split_is_for_the_test(monkeypatch):
    """Catches a flipped label that is gold, or mostly the next in the list; a majority or a reader
    from the test's own labels (train has the next ones here); a checkpoint chosen on the test."""
    run = tiny("--limit", "1000", "--notes", "20", "--method", "sft")
    labels, test, asked = run.dataset.labels, run.dataset.test, []
    after = dict(zip(labels, labels[1:] + labels[:1], strict=True))
    run.dataset.train = [data.Example(e.question, after[e.label], e.rationale) for e in test]
    monkeypatch.setattr(r2d, "predict_labels", lambda run, q: asked.append(q) or q)
    rows = r2d.test_rows(run)
    r2d.validate(run, 2)
    assert asked == [data.columns(test)[0], data.columns(run.dataset.val)[0]]
    majority = after[statistics.mode(data.columns(test)[1])]
    assert {row["majority_label"] for row in rows} == {majority}
    assert sum(row["reader_label"] == after[row["label"]] for row in rows) > 500
    for gold in labels:
        drawn = Counter(row["flipped_label"] for row in rows if row["label"] == gold)
        assert len(drawn) == 4 and gold not in drawn
        assert max(drawn.values()) < 2 * min(drawn.values())


def test_eval_and_ask_use_the_checkpoint(easy_run, tmp_path, capsys, monkeypatch):
    """Catches an evaluation of untrained weights, coins in it, an --ask that trains, needs the
    data or the working folder, or explains another label than the one in --given."""
    out = shutil.copytree(easy_run, tmp_path / "run")
    before = contents(out)
    (out / "predictions.jsonl").unlink()
    for forbidden in ("flip_coins", "train"):
        monkeypatch.setattr(r2d, forbidden, None)
    assert r2d.main(["--out", str(out), "--eval"]) == 0  # with the options of the run
    assert contents(out) == before
    config = read(out / "config.json") | {"data": "renamed.csv"}
    (out / "config.json").write_text(json.dumps(config), encoding="utf-8")
    before = contents(out)
    monkeypatch.chdir(tmp_path)
    row = lines(out / "predictions.jsonl")[0]
    ask = ["--out", str(out), "--ask"]
    assert r2d.main([*ask, row["question"]]) == 0
    answer = f"label      {row['predicted_label']}\nrationale  {row['rationale_given_predicted']}\n"
    assert capsys.readouterr().out.endswith(answer)
    assert r2d.main([*ask, "q", "--given", "gone"]) == 2
    assert "stay" in capsys.readouterr().err
    monkeypatch.setattr(r2d, "generate_texts", lambda run, prompts, limit: [f"<{prompts[0]}>"])
    for given, label in [([], "<predict: q>"), (["--given", "go"], "go")]:
        assert r2d.main([*ask, "q", *given]) == 0
        assert f"rationale  <given label: {label}, explain: q>\n" in capsys.readouterr().out
    assert contents(out) == before


# ---- from a T5 checkpoint -----------------------------------------------------------------------
def test_init_is_evaluated_as_it_is_and_trained(finished, tmp_path, monkeypatch):
    """Catches random weights, another tokenizer or shape (nats are those of transformers), and an
    evaluation of untrained weights after training; the IndexError of a tokenizer too large;
    scores of untrained weights that stay when their run is trained and stopped."""
    transformers = pytest.importorskip("transformers")
    t5 = write_t5(tmp_path / "t5", (finished / "tokenizer.model").read_bytes())
    out = tmp_path / "run"
    assert start(out, "--init", str(t5), "--limit", "16", "--eval") == 0
    assert sorted(contents(out)) == [FILES[0], *FILES[3:5], FILES[7]]  # nothing is trained
    peer = transformers.T5ForConditionalGeneration.from_pretrained(t5).eval()
    tokenizer = data.Tokenizer.load(t5 / "spiece.model")
    for row in lines(out / "predictions.jsonl")[:3]:
        prompt = f"given label: {row['label']}, explain: {row['question']}"
        labels = tokenizer.to_ids([row["rationale"]], 24)
        loss = peer(input_ids=tokenizer.to_ids([prompt], 256), labels=labels).loss.item()
        assert row["nats_given_gold"] == pytest.approx(loss * labels.shape[1], rel=1e-4)
    out = tmp_path / "trained"
    assert start(out, "--init", str(t5), "--limit", "16", "--lr", "0.001") == 0
    assert (out / "tokenizer.model").read_bytes() == (t5 / "spiece.model").read_bytes()
    trained = weights(out / "stage2.pt")["embedding.weight"]
    assert 0 < (trained - peer.state_dict()["shared.weight"]).abs().max() < 0.1
    before = contents(out)
    for gone, status in [("stage2.pt", 2), ("last.pt", 0)]:
        (out / gone).unlink()
        assert r2d.main(["--out", str(out), "--eval"]) == status
        (out / gone).write_bytes(before[gone])
        assert contents(out) == before, gone
    with monkeypatch.context() as patch:
        patch.setattr(r2d, "evaluate", lambda run: signal.raise_signal(signal.SIGINT))
        assert start(tmp_path / "run", "--init", str(t5), "--limit", "16") == 130
    assert not (tmp_path / "run" / "metrics.json").exists()
    shutil.rmtree(t5)
    assert r2d.main(["--out", str(out), "--ask", "a cough"]) == 0
    t5 = write_t5(tmp_path / "pruned", before["tokenizer.model"], 300)
    with pytest.raises(data.InputError, match=r"spiece\.model has more pieces"):
        tiny("--init", str(t5))
