"""The method and its runs: schedules, losses, training, the test. Each test names its bug."""

import math
import shutil
import statistics
from pathlib import Path

import pytest
import torch
from helpers import contents, lines, read, write_notes, write_t5
from torch import Tensor

import data
import metrics
import r2d

TINY = "--limit 48 --stage1-steps 4 --stage2-steps 8 --eval-every 4 --batch-size 8 --width 16"
TINY += " --heads 2 --layers 1 --vocab-size 400 --max-target 24 --device cpu"
TINY = TINY.split()
FILES = {"config.json", "tokenizer.model", "stage1.pt", "stage2.pt", "last.pt", "log.jsonl"}
FILES |= {"predictions.jsonl", "metrics.json"}


def start(out: Path, *arguments: str) -> int:
    return r2d.main([*TINY, "--out", str(out), *arguments])


def tiny(*arguments: str) -> r2d.Run:
    return r2d.setup(r2d.parse_args([*TINY, "--out", "never-made", *arguments]))


def weights(path: Path) -> dict[str, Tensor]:
    return torch.load(path, weights_only=True)["weights"]


def same_weights(one: dict, other: dict) -> bool:
    return one.keys() == other.keys() and all(one[key].equal(other[key]) for key in one)


def same_training(one: Path, other: Path) -> bool:
    same_log = (one / "log.jsonl").read_bytes() == (other / "log.jsonl").read_bytes()
    return same_log and same_weights(weights(one / "stage2.pt"), weights(other / "stage2.pt"))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """One whole tiny run on the simulated line, for the tests that only look at it."""
    out = tmp_path_factory.mktemp("finished") / "run"
    assert start(out) == 0
    return out


@pytest.fixture(scope="module")
def easy(tmp_path_factory):
    """Options under which labels are valid after a few updates."""
    notes = write_notes(tmp_path_factory.mktemp("notes") / "notes.csv")
    return ["--data", str(notes), "--width", "32", "--lr", "0.1", "--stage2-steps", "16"]


@pytest.fixture(scope="module")
def easy_run(easy, tmp_path_factory):
    out = tmp_path_factory.mktemp("easy") / "run"
    assert start(out, *easy) == 0
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
    """Catches a ramp of another length, one that counts from update 0, and epsilon for P."""
    for step, expected in TABLES[schedule].items():
        p = r2d.p_predicted(step, 1000, schedule, 0.05, 0.6, 0.9)
        assert p == pytest.approx(expected, abs=1e-6), step


@pytest.mark.parametrize("schedule", ["linear", "exponential", "inverse-sigmoid"])
@pytest.mark.parametrize("cap", [0.0, 0.3, 0.9, 1.0])
@pytest.mark.parametrize("steps", [10, 1500])
def test_every_schedule_rises_to_its_cap(schedule, cap, steps):
    """Catches a schedule that falls, overshoots, starts early, ends late, divides by 0."""
    p = [r2d.p_predicted(step, steps, schedule, 0.05, 0.6, cap) for step in range(steps)]
    assert p == sorted(p)
    assert (p[0], p[-1]) == (0, cap)
    end = 0.05 + 0.6 * (cap if schedule == "linear" else 1)
    before_the_end = r2d.p_predicted(end * steps - 1e-6, steps, schedule, 0.05, 0.6, cap)
    assert before_the_end == pytest.approx(cap, abs=1e-4)
    assert r2d.p_predicted(0, steps, schedule, 0, 0, cap) == cap
    assert r2d.p_predicted(steps - 1, steps, "none", 0.05, 0.6, cap) == 0


def test_alpha_and_learning_rate():
    """Catches an alpha that starts high or keeps rising; a full rate that wipes out stage 1."""
    values = [r2d.alpha_at(step, 1000, 0.05, 0.7) for step in (0, 25, 50, 999)]
    assert values == pytest.approx([0, 0.35, 0.7, 0.7])
    assert r2d.alpha_at(0, 1000, 0, 0.7) == 0.7
    rates = [r2d.lr_at(step, 100, 0.5) for step in range(100)]
    assert [rates[i] for i in (0, 4, 9, 55, 99)] == pytest.approx([0.05, 0.25, 0.5, 0.25, 0.5 / 90])


def test_coins_are_fair_within_five_sigma_and_one_per_example():
    """Catches an inverted coin, one coin for the whole batch, and a generator that is not used."""
    generator = torch.Generator().manual_seed(0)
    sums = [sum(r2d.flip_coins(32, 0.3, generator)) for _ in range(1000)]
    assert abs(sum(sums) - 9600) < 5 * math.sqrt(32000 * 0.3 * 0.7)
    assert len(set(sums)) > 10
    assert r2d.flip_coins(100, 0.0, generator) == [False] * 100
    assert r2d.flip_coins(100, 1.0, generator) == [True] * 100


# ---- losses -------------------------------------------------------------------------------------
def test_mix_labels_takes_valid_predicted_labels_where_the_coin_says(monkeypatch):
    """Catches sampling that does nothing, swapped coins, garbage in a prompt (the authors' code
    has it), wrong counts, and labels that are generated for examples that do not use them."""
    run = tiny()
    batch = run.dataset.train[:6]
    gold = [example.label for example in batch]
    wrong = next(label for label in run.dataset.labels if label != gold[0])
    answers = {batch[0].question: wrong, batch[2].question: "nonsense", batch[4].question: ""}
    answers[batch[5].question] = gold[5]
    asked = []

    def predict(run: r2d.Run, questions: list[str]) -> list[str]:
        asked.extend(questions)
        return [answers.get(question, gold[3]) for question in questions]

    monkeypatch.setattr(r2d, "predict_labels", predict)
    coins = [True, False, True, True, True, True]
    labels, counts = r2d.mix_labels(run, batch, coins)
    assert labels == [wrong, *gold[1:]]
    assert counts == {"used_predicted": 3, "wrong_predicted": 1, "invalid_predicted": 2}
    assert asked == [batch[i].question for i in (0, 2, 3, 4, 5)]
    assert r2d.mix_labels(run, batch, [False] * 6)[0] == gold


def test_predicting_leaves_the_training_mode_and_the_random_state_alone():
    """Catches dropout while labels are generated or validated, and a model left in eval mode."""
    run = tiny("--dropout", "0.5")
    run.model.train()
    before = torch.get_rng_state()
    questions = [example.question for example in run.dataset.train[:8]]
    assert r2d.predict_labels(run, questions) == r2d.predict_labels(run, questions)
    assert torch.get_rng_state().equal(before)
    assert r2d.validate(run, 1) == r2d.validate(run, 1)
    assert run.model.training


@pytest.mark.parametrize("method", ["r2d", "dss", "sft"])
def test_prompts_and_targets_of_every_method(method, monkeypatch):
    """Catches a swapped rationale, a label in a prompt of DSS, a second task in SFT."""
    run = tiny("--method", method, "--max-target", "200")
    batch = run.dataset.train[:4]
    seen = []

    def nll(input_ids: Tensor, labels: Tensor) -> Tensor:
        for source, target in zip(input_ids.tolist(), labels.tolist(), strict=True):
            seen.append((run.tokenizer.decode(source), run.tokenizer.decode(target)))
        return torch.zeros(labels.shape)

    monkeypatch.setattr(run.model, "nll", nll)
    monkeypatch.setattr(r2d, "predict_labels", lambda run, questions: ["home care"] * 4)
    r2d.stage2_loss(run, batch, [True] * 4, 0.7)
    expected = [(f"predict: {example.question}", example.label) for example in batch]
    prefix = {"r2d": "given label: home care, explain:", "dss": "explain:"}.get(method)
    if method != "sft":
        expected += [(f"{prefix} {example.question}", example.rationale) for example in batch]
    assert seen == expected
    seen.clear()
    r2d.stage1_loss(run, batch)
    assert seen == [(f"explain: {example.question}", example.rationale) for example in batch]


def nats(run: r2d.Run, prompt: str, target: str) -> tuple[float, int]:
    """The nats of one target, alone in its batch, and its tokens."""
    source = run.tokenizer.encode([prompt], 256)
    labels = run.tokenizer.encode([target], 24)
    with torch.no_grad():
        return run.model.nll(source, labels).sum().item(), labels.shape[1]


def token_mean(run: r2d.Run, pairs: list[tuple[str, str]]) -> float:
    counts = [nats(run, prompt, target) for prompt, target in pairs]
    return sum(n for n, _ in counts) / sum(t for _, t in counts)


def test_losses_are_means_over_target_tokens_weighted_by_alpha():
    """Catches a mean over padding or over rows, an empty rationale that is learned, and alpha on
    the wrong loss: all is compared with sums over single examples."""
    run = tiny()
    full = run.dataset.train[:3]
    batch = [*full, data.Example(full[0].question, full[1].label, "")]
    explain = token_mean(run, [(f"explain: {e.question}", e.rationale) for e in full])
    loss, log = r2d.stage1_loss(run, batch)
    assert loss.item() == log["loss"] == log["loss_explain"] == pytest.approx(explain, rel=1e-5)

    predict = token_mean(run, [(f"predict: {e.question}", e.label) for e in batch])
    pairs = [(f"given label: {e.label}, explain: {e.question}", e.rationale) for e in full]
    explain = token_mean(run, pairs)
    for alpha in (0.0, 0.3, 1.0):
        loss, log = r2d.stage2_loss(run, batch, [False] * 4, alpha)
        assert loss.item() == pytest.approx(alpha * predict + (1 - alpha) * explain, rel=1e-5)
        assert log["loss"] == loss.item()
        assert log["loss_predict"] == pytest.approx(predict, rel=1e-5)
        assert log["loss_explain"] == pytest.approx(explain, rel=1e-5)
    empty = [data.Example(e.question, e.label, "") for e in full]
    assert r2d.stage1_loss(run, empty)[0].item() == 0  # and not nan


def test_matrices_take_the_steps_of_muon():
    """Catches a direction that is not orthogonal, tall matrices, another momentum: the peer is
    PyTorch's own Muon, which computes in bfloat16."""
    model = tiny().model
    peers, state = {}, {}
    for name, weight in model.named_parameters():
        if weight.ndim == 2 and name.startswith(("encoder.", "decoder.")):
            peers[name] = torch.nn.Parameter(weight.detach().clone())
    first = {name: peer.detach().clone() for name, peer in peers.items()}
    assert {peer.shape for peer in peers.values()} == {(16, 16), (32, 16), (64, 16), (16, 64)}
    settings = {"lr": 1.0, "weight_decay": 0.0, "momentum": 0.8, "nesterov": False, "ns_steps": 3}
    muon = torch.optim.Muon(peers.values(), **settings)
    for _ in range(3):
        for name, weight in model.named_parameters():
            weight.grad = torch.randn_like(weight)
            if name in peers:
                peers[name].grad = weight.grad.clone()
        before = {name: peer.detach().clone() for name, peer in peers.items()}
        ours = {name: weight.detach().clone() for name, weight in model.named_parameters()}
        r2d.optimize(model, state, 0.1)
        muon.step()
        for name, peer in peers.items():
            moved = model.get_parameter(name).detach() - ours[name]
            direction = (peer.detach() - before[name]) / max(
                1, peer.shape[0] / peer.shape[1]
            ) ** 0.5
            size = first[name].square().mean().sqrt()
            expected = 0.1 * size * direction * max(peer.shape) ** 0.5
            assert (moved - expected).norm() < 0.03 * expected.norm(), name


def test_the_first_update_moves_each_tensor_by_its_rate(tmp_path):
    """Catches one rate for all tensors, position biases that hardly move, and gradients that are
    not clipped to norm 1."""
    more = "--no-stage1 --stage2-steps 1 --lr 0.1 --batch-size 2".split()
    assert start(tmp_path / "run", *more) == 0
    after = weights(tmp_path / "run" / "stage2.pt")
    state = torch.load(tmp_path / "run" / "last.pt", weights_only=True)["progress"]["optimizer"]
    for name, before in tiny().model.state_dict().items():
        size = 3.0 if "bias" in name else before.square().mean().sqrt().item()
        moved = (after[name] - before).abs() / (0.1 * size)
        if before.ndim == 2 and name.startswith(("encoder.", "decoder.")):
            assert 0.3 < moved.square().mean().sqrt() < 1.3, name
        else:  # Adam: a fifth of the gradient over the root of a twentieth of its square
            assert moved.max().item() == pytest.approx(0.2 / 0.05**0.5, rel=0.01), name
    norm = math.hypot(*[mean.norm() for _, mean, _ in state.values()])
    assert norm == pytest.approx(0.2, rel=1e-4)  # a fifth of the new gradient
    assert lines(tmp_path / "run" / "log.jsonl")[0]["grad_norm"] > 1


def test_a_few_notes_are_learned_by_heart(tmp_path):
    """Catches any break between prompts, model, loss, optimiser and decoding."""
    notes = write_notes(tmp_path / "train.csv")
    for name in ("val.csv", "test.csv"):
        shutil.copy(notes, tmp_path / name)
    more = ["--data", str(tmp_path), "--limit", "8", "--width", "64", "--lr", "0.05"]
    more += ["--no-stage1", "--stage2-steps", "80", "--schedule", "none"]
    assert start(tmp_path / "run", *more) == 0
    result = read(tmp_path / "run" / "metrics.json")
    assert min(result["label"]["accuracy"], result["rationale"]["predicted"]["bleu"]) > 95


# ---- whole runs ---------------------------------------------------------------------------------
def test_a_run_leaves_the_files_of_the_contract(finished):
    """Catches a file, an option or a key that was renamed or left over; another schedule."""
    assert set(contents(finished)) == FILES
    config = read(finished / "config.json")
    assert config["labels"] == data.DISPOSITIONS
    assert config["model"]["d_model"] == config["width"] == 16
    options = set(vars(r2d.parse_args(["--out", "never-made"])))
    assert options - set(config) <= {"stage", "out", "device", "eval", "ask"}
    log = lines(finished / "log.jsonl")
    expected = [(1, step) for step in range(4)] + [(2, step) for step in range(8)]
    assert [(line["stage"], line["step"]) for line in log] == expected
    keys = {"stage", "step", "loss", "loss_explain", "lr", "grad_norm"}
    more = {"loss_predict", "alpha", "used_predicted", "wrong_predicted", "invalid_predicted"}
    for line in log[:4]:
        assert keys <= set(line)
        assert ("val_loss" in line) == (line["step"] == 3)
    for line in log[4:]:
        assert keys | more <= set(line)
        assert line["lr"] == r2d.lr_at(line["step"], 8, 0.04)
        assert line["p_predicted"] == r2d.p_predicted(line["step"], 8, "linear", 0.05, 0.6, 0.9)
        assert line["alpha"] == r2d.alpha_at(line["step"], 8, 0.05, 0.7)
        assert ("val_macro_f1" in line) == (line["step"] in (3, 7))


@pytest.mark.parametrize("method", ["r2d", "dss", "sft"])
def test_metrics_are_the_scores_of_the_rows(method, easy, tmp_path):
    """Catches scores of something else than these rows, a row without a fact, a reader unused."""
    out = tmp_path / "run"
    assert start(out, "--method", method, *easy) == 0
    rows = lines(out / "predictions.jsonl")
    result = read(out / "metrics.json")
    assert {"method": method, "data": easy[1], "seed": 0}.items() <= result.items()
    scores = metrics.score(rows, read(out / "config.json")["labels"])
    assert {key: result[key] for key in scores} == scores
    assert set(result) - set(scores) <= {"method", "data", "seed", "updates"}
    conditions = {"r2d": ["gold", "predicted", "flipped"], "dss": ["predicted"], "sft": []}[method]
    keys = {"question", "label", "rationale", "predicted_label", "flipped_label", "majority_label"}
    for condition in conditions:
        keys |= {f"{name}_given_{condition}" for name in ("rationale", "argues", "nats")}
    for row in rows:
        assert set(row) - {"tokens", "reader_label"} == keys
        assert {row[key] for key in keys if key.startswith("argues")} <= {"go", "stay"}
    assert (out / "stage1.pt").exists() == (method == "r2d")


def test_facts_of_the_rows_on_triage(finished):
    """Catches a ceiling that is the model's, verdicts by the reader, nats of another prompt."""
    run = tiny()
    run.model.load_state_dict(weights(finished / "stage2.pt"))
    rows = lines(finished / "predictions.jsonl")
    majority = statistics.mode(example.label for example in run.dataset.train)
    for row, rule, gold in zip(rows, run.dataset.ceiling, run.dataset.ceiling_gold, strict=True):
        assert row["majority_label"] == majority
        assert row["ceiling_label"] == rule.label
        assert row["rationale_given_ceiling"] == rule.rationale
        assert row["rationale_given_ceiling_gold"] == gold.rationale
        for condition in metrics.CONDITIONS:
            text = row[f"rationale_given_{condition}"]
            assert row[f"argues_given_{condition}"] == data.argues_for(text)
            assert row[f"ungrounded_given_{condition}"] == data.ungrounded(text, row["question"])
        for condition in ("gold", "predicted", "flipped"):
            label = row[metrics.CONDITIONS[condition]]
            prompt = f"given label: {label}, explain: {row['question']}"
            expected, tokens = nats(run, prompt, row["rationale"])
            assert row[f"nats_given_{condition}"] == pytest.approx(expected, rel=1e-4)
            assert row["tokens"] == tokens
    assert set(metrics.CONDITIONS) <= set(read(finished / "metrics.json")["rationale"])


def test_flipped_labels_are_always_wrong_and_even(monkeypatch):
    """Catches a flipped label that is gold, and one that is mostly the next in the list."""
    run = tiny("--limit", "1000", "--notes", "20", "--method", "sft")
    monkeypatch.setattr(r2d, "predict_labels", lambda run, questions: ["x"] * len(questions))
    rows = r2d.test_rows(run)
    for gold in run.dataset.labels:
        drawn = [row["flipped_label"] for row in rows if row["label"] == gold]
        for label in run.dataset.labels:
            p = 0 if label == gold else 1 / 4
            sigma = math.sqrt(len(drawn) * p * (1 - p))
            assert abs(drawn.count(label) - p * len(drawn)) <= 5 * sigma


def test_the_seed_decides_everything(easy_run, easy, tmp_path):
    """Catches anything random that the seed does not decide, and a seed that decides nothing."""
    assert start(tmp_path / "same", *easy) == 0
    assert start(tmp_path / "other", *easy, "--seed", "1") == 0
    for name in ("predictions.jsonl", "metrics.json", "config.json"):
        assert (tmp_path / "same" / name).read_bytes() == (easy_run / name).read_bytes(), name
    assert same_training(tmp_path / "same", easy_run)
    assert not same_training(tmp_path / "other", easy_run)
    assert not same_weights(tiny().model.state_dict(), tiny("--seed", "1").model.state_dict())


def test_p_zero_is_gold_only_and_p_one_is_not(easy, tmp_path, monkeypatch):
    """Catches sampling that costs a random number at P = 0, and one that changes no prompt."""
    more = [*easy, "--dropout", "0.1", "--warmup", "0", "--ramp", "0"]
    assert start(tmp_path / "own", *more, "--cap", "1") == 0
    assert start(tmp_path / "zero", *more, "--cap", "0") == 0
    monkeypatch.setattr(r2d, "flip_coins", lambda n, p, generator: [False] * n)  # no coin at all
    assert start(tmp_path / "gold", *more, "--schedule", "none") == 0
    assert same_training(tmp_path / "zero", tmp_path / "gold")
    log = lines(tmp_path / "own" / "log.jsonl")[4:]
    assert {line["used_predicted"] + line["invalid_predicted"] for line in log} == {8}
    assert sum(line["wrong_predicted"] for line in log) > 0


def test_eval_and_ask_use_the_checkpoint(easy_run, tmp_path, capsys, monkeypatch):
    """Catches an evaluation of untrained weights, coins in it, and an --ask that trains."""
    out = shutil.copytree(easy_run, tmp_path / "run")
    before = contents(out)
    (out / "predictions.jsonl").unlink()
    for forbidden in ("flip_coins", "train"):
        monkeypatch.setattr(r2d, forbidden, None)
    assert r2d.main(["--out", str(out), "--eval"]) == 0  # with the options of the run
    assert contents(out) == before
    row = lines(out / "predictions.jsonl")[0]
    assert r2d.main(["--out", str(out), "--ask", row["question"]]) == 0
    assert f"label      {row['predicted_label']}\n" in capsys.readouterr().out
    monkeypatch.setattr(r2d, "decode", lambda run, prompts, limit: [f"<{prompts[0]}>"])
    assert r2d.main(["--out", str(out), "--ask", "q"]) == 0
    assert "rationale  <given label: <predict: q>, explain: q>\n" in capsys.readouterr().out
    assert contents(out) == before


def test_selection_and_early_stopping(tmp_path, monkeypatch):
    """Catches a checkpoint from before the end of the ramp, patience that counts from the start, a
    best checkpoint that is the last, and a stage 1 with the rationales of stage 2."""
    kept, learned = [], []
    loss = r2d.stage1_loss

    def worse_each_time(run: r2d.Run, stage: int) -> dict:
        kept.append({key: value.clone() for key, value in run.model.state_dict().items()})
        return {"val_loss": len(kept), "val_macro_f1": -len(kept)}

    monkeypatch.setattr(r2d, "validate", worse_each_time)
    monkeypatch.setattr(r2d, "stage1_loss", lambda run, x: learned.extend(x) or loss(run, x))
    out = tmp_path / "run"
    more = "--stage1-steps 20 --stage2-steps 40 --eval-every 1 --stage1-rationales nurse".split()
    assert start(out, *more) == 0
    assert set(learned) <= set(tiny(*more).dataset.stage1_train)
    stages = [line["stage"] for line in lines(out / "log.jsonl")]
    # stage 1: best after update 1, then patience 3; stage 2: armed after 0.65 * 40, patience 5
    assert (stages.count(1), stages.count(2)) == (1 + 3, 26 + 5)
    assert same_weights(weights(out / "stage1.pt"), kept[0])
    assert same_weights(weights(out / "stage2.pt"), kept[4 + 25])


def test_bfloat16_gives_nearly_the_same_loss(finished, tmp_path):
    """Catches a --dtype without effect, and weights in bfloat16."""
    assert start(tmp_path / "run", "--dtype", "bfloat16") == 0
    loss, exact = [lines(out / "log.jsonl")[0]["loss"] for out in (tmp_path / "run", finished)]
    assert exact != loss == pytest.approx(exact, rel=0.02)
    assert weights(tmp_path / "run" / "stage2.pt")["embedding.weight"].dtype == torch.float32


def test_every_epoch_has_all_notes_in_another_order(tmp_path):
    """Catches epochs that repeat the batches of the first: at a rate of 0 the loss tells them."""
    assert start(tmp_path / "run", "--lr", "0", "--no-stage1", "--stage2-steps", "12") == 0
    losses = [line["loss_predict"] for line in lines(tmp_path / "run" / "log.jsonl")]
    assert losses[:6] != pytest.approx(losses[6:])
    assert sum(losses[:6]) == pytest.approx(sum(losses[6:]), rel=1e-3)


# ---- from a T5 checkpoint -----------------------------------------------------------------------
def test_init_is_evaluated_as_it_is_and_trained(finished, tmp_path):
    """Catches random weights, another tokenizer or shape: nats are those of transformers."""
    transformers = pytest.importorskip("transformers")
    t5 = write_t5(tmp_path / "t5", (finished / "tokenizer.model").read_bytes())
    out = tmp_path / "run"
    assert start(out, "--init", str(t5), "--eval") == 0
    assert set(contents(out)) == FILES - {"stage1.pt", "stage2.pt", "last.pt", "log.jsonl"}
    peer = transformers.T5ForConditionalGeneration.from_pretrained(t5).eval()
    tokenizer = data.Tokenizer.load(t5 / "spiece.model")
    for row in lines(out / "predictions.jsonl")[:3]:
        prompt = f"given label: {row['label']}, explain: {row['question']}"
        source = tokenizer.encode([prompt], 256)
        labels = tokenizer.encode([row["rationale"]], 24)
        loss = peer(input_ids=source, labels=labels).loss.item()
        assert row["nats_given_gold"] == pytest.approx(loss * labels.shape[1], rel=1e-4)
    out = tmp_path / "trained"
    assert start(out, "--init", str(t5), "--lr", "0.001") == 0
    assert (out / "tokenizer.model").read_bytes() == (t5 / "spiece.model").read_bytes()
    assert read(out / "config.json")["model"]["d_ff"] == 24
    trained = weights(out / "stage2.pt")["embedding.weight"]
    assert 0 < (trained - peer.state_dict()["shared.weight"]).abs().max() < 0.1
    assert r2d.main(["--out", str(out), "--ask", "a cough"]) == 0
