"""The run: schedules, coin, losses, training loop, resume, evaluation, command line, and the README's commands."""

import json
import math
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from helpers import lines, read, stage2_lines
from torch import nn

import data
import metrics
import r2d

ROOT = Path(__file__).resolve().parent.parent
TINY = "--limit 48 --stage1-steps 4 --stage2-steps 8 --eval-every 4 --batch-size 8 --width 16 --heads 2 --layers 1"
TINY = [*TINY.split(), "--vocab-size", "400", "--max-target", "24"]
FILES = {"config.json", "tokenizer.model", "stage1.pt", "stage2.pt", "last.pt", "log.jsonl"}
FILES |= {"predictions.jsonl", "metrics.json", "previous.pt", "lock"}


def run(out: Path, *arguments: str) -> int:
    return r2d.main([*TINY, "--out", str(out), *arguments])


def tiny_run(tmp_path: Path, **options: object) -> r2d.Run:
    given = {**r2d.parse_options(TINY), "out": str(tmp_path / "run"), **options}
    return r2d.prepare(r2d.Options(**given))


def same_state(one: Path, other: Path) -> bool:
    """Equal weights, coins and random state: much finer than equal predictions of a model this small."""
    a, b = (torch.load(out / "last.pt", weights_only=True) for out in (one, other))
    equal = all(torch.equal(a["model"][key], b["model"][key]) for key in a["model"])
    return equal and torch.equal(a["coin"], b["coin"]) and torch.equal(a["rng"], b["rng"])


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One whole tiny run, shared by the tests that only look at it."""
    out = tmp_path_factory.mktemp("finished") / "run"
    assert run(out) == 0
    return out


# --- schedules and coin

# step of 1000: P(predicted) with the defaults, warm-up 0.05, ramp 0.6, cap 0.9; worked out by hand
LINEAR = {0: 0, 49: 0, 50: 0, 51: 0.0015, 200: 0.225, 350: 0.45, 500: 0.675, 649: 0.8985, 650: 0.9, 999: 0.9}
EXPONENTIAL = {0: 0, 50: 0, 350: 1 - 0.1**0.5, 500: 1 - 0.1**0.75, 650: 0.9, 999: 0.9}


@pytest.mark.parametrize(("schedule", "values"), [("linear", LINEAR), ("exponential", EXPONENTIAL)])
def test_schedule_has_the_values_worked_out_by_hand(schedule: str, values: dict[int, float]) -> None:
    """Catches a ramp that starts early, ends late, or counts from step 0 and not from the end of the warm-up."""
    for step, expected in values.items():
        assert r2d.p_predicted(step, 1000, schedule, 0.05, 0.6, 0.9) == pytest.approx(expected, abs=1e-12)


def test_inverse_sigmoid_is_the_papers_formula_with_one_constant() -> None:
    """Catches a logistic curve of another shape: epsilon = k / (k + e^(i/k)) must hold for one k at every step."""
    p = [r2d.p_predicted(50 + i, 1000, "inverse-sigmoid", 0.05, 0.6, 0.9) for i in (0, 150, 300, 450, 599.999)]
    k = 1 / p[0] - 1  # at i = 0, P = 1 / (k + 1)
    assert k >= 1
    for i, value in zip((0, 150, 300, 450, 599.999), p, strict=True):
        assert value == pytest.approx(1 - k / (k + math.exp(i / k)), abs=1e-6)


@pytest.mark.parametrize("schedule", ["linear", "exponential", "inverse-sigmoid"])
@pytest.mark.parametrize("cap", [0.0, 0.3, 0.9, 1.0])
@pytest.mark.parametrize("steps", [10, 1500])
def test_every_schedule_rises_to_the_cap_at_the_end_of_the_ramp(schedule: str, cap: float, steps: int) -> None:
    """Catches a schedule that never reaches the cap, overshoots it, or falls."""
    p = [r2d.p_predicted(step, steps, schedule, 0.05, 0.6, cap) for step in range(steps)]
    assert p == sorted(p) and p[0] == 0 and max(p) == p[-1] == cap
    assert r2d.p_predicted(0.65 * steps - 1e-6, steps, schedule, 0.05, 0.6, cap) == pytest.approx(cap, abs=1e-4)


def test_schedule_edges() -> None:
    """Catches division by zero for no ramp, and sampling under `none`; P = 1 from the start is an ablation."""
    assert [r2d.p_predicted(s, 100, "linear", 0, 0, 1) for s in (0, 50)] == [1, 1]
    assert all(r2d.p_predicted(s, 100, "none", 0.05, 0.6, 0.9) == 0 for s in range(100))


def test_alpha_rises_over_the_warmup_only() -> None:
    """Catches an alpha that starts at its final value or keeps rising."""
    assert [r2d.alpha_at(s, 1000, 0.05, 0.7) for s in (0, 25, 50, 999)] == pytest.approx([0, 0.35, 0.7, 0.7])
    assert r2d.alpha_at(0, 1000, 0, 0.7) == 0.7


def test_learning_rate_warms_up_and_ends_near_zero() -> None:
    """Catches a restart at full rate, which wipes out stage 1."""
    rates = [r2d.lr_at(s, 100, 1.0) for s in range(100)]
    assert rates[0] == pytest.approx(0.1) and max(rates) == rates[9] == 1.0 and rates[99] == pytest.approx(1 / 90)


def test_coin_is_fair_within_five_sigma_and_independent() -> None:
    """Catches an inverted coin and one coin for the whole batch."""
    coin = torch.Generator().manual_seed(0)
    batches = [r2d.flip_coins(32, 0.3, coin) for _ in range(1000)]
    heads = sum(map(sum, batches))
    assert abs(heads - 9600) < 5 * math.sqrt(32000 * 0.3 * 0.7)
    assert sum(0 < sum(batch) < 32 for batch in batches) > 990
    assert r2d.flip_coins(100, 0.0, coin) == [False] * 100 and r2d.flip_coins(100, 1.0, coin) == [True] * 100


# --- the losses


def test_p_one_puts_the_models_labels_into_every_prompt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches scheduled sampling that silently does nothing, and one that is applied to a part of the batch."""
    one = tiny_run(tmp_path)
    examples = one.data.train[:16]
    wrong = r2d.flipped_labels(examples, one.data.labels, 0)
    monkeypatch.setattr(r2d, "predict_labels", lambda run, questions: wrong[: len(questions)])
    gold = [e.label for e in examples]
    assert r2d.labels_in_prompts(one, examples, [True] * 16) == (wrong, 16, 0)
    assert r2d.labels_in_prompts(one, examples, [False] * 16) == (gold, 0, 0)
    assert r2d.labels_in_prompts(one, examples, [True] + [False] * 15) == (wrong[:1] + gold[1:], 1, 0)


def test_invalid_labels_never_enter_a_training_prompt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches garbage from an untrained model used as a label (the authors' code does that)."""
    one = tiny_run(tmp_path)
    examples = one.data.train[:8]
    monkeypatch.setattr(r2d, "predict_labels", lambda run, questions: ["nonsense"] * len(questions))
    assert r2d.labels_in_prompts(one, examples, [True] * 8) == ([e.label for e in examples], 0, 8)


def test_only_the_labels_that_are_used_are_generated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches generating for the whole batch first and drawing the coins afterwards."""
    asked = []
    monkeypatch.setattr(r2d, "predict_labels", lambda run, questions: asked.extend(questions) or ["x"] * len(questions))
    one = tiny_run(tmp_path)
    expected = r2d.flip_coins(16, 0.5, torch.Generator().manual_seed(3))
    r2d.labels_in_prompts(one, one.data.train[:16], expected)
    assert asked == [e.question for e, heads in zip(one.data.train, expected, strict=False) if heads]


def test_sampling_leaves_training_mode_and_random_state_alone(tmp_path: Path) -> None:
    """Catches dropout on while labels are generated, or a model left in eval mode afterwards."""
    one = tiny_run(tmp_path, dropout=0.5)
    one.model.train()
    before = torch.get_rng_state()
    first = r2d.predict_labels(one, [e.question for e in one.data.train[:8]])
    assert one.model.training and torch.equal(before, torch.get_rng_state())
    assert first == r2d.predict_labels(one, [e.question for e in one.data.train[:8]])


def test_target_stays_gold_whatever_the_label_in_the_prompt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches swapping the rationale together with the label, and a question lost from the prompt."""
    seen = []
    one = tiny_run(tmp_path, warmup=0.0, ramp=0.0, cap=1.0)
    monkeypatch.setattr(r2d, "predict_labels", lambda run, questions: ["home care"] * len(questions))
    decode = one.prompts.tokenizer.decode

    def spy(run: r2d.Run, sources: list[list[int]], targets: list[list[int]], total: int) -> torch.Tensor:
        seen.append([(decode(s), decode(t)) for s, t in zip(sources, targets, strict=True)])
        return torch.zeros(())

    monkeypatch.setattr(r2d, "token_mean", spy)
    one.prompts.max_target = 200
    list(r2d.stage2_loss(one, one.data.train[:4], [1, 1], {}, [True] * 4, 0.7))
    assert seen[0] == [(f"predict: {e.question}", e.label) for e in one.data.train[:4]]
    assert seen[1] == [(f"given label: home care, explain: {e.question}", e.rationale) for e in one.data.train[:4]]


def test_loss_weights(tmp_path: Path) -> None:
    """Catches alpha on the wrong loss: at step 0 of the warm-up the label loss weighs nothing, later 0.7."""
    one = tiny_run(tmp_path)
    for step, alpha in ((0, 0.0), (7, 0.7)):
        log = r2d.gradients(one, 2, step, one.data.train[:8], torch.Generator(), [])
        assert log["alpha"] == pytest.approx(alpha)
        expected = alpha * log["loss_predict"] + (1 - alpha) * log["loss_explain"]
        assert log["loss"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("parts", [1, 3, 8])
def test_a_batch_in_parts_gives_the_gradient_of_the_batch(parts: int, tmp_path: Path, monkeypatch) -> None:
    """Catches parts that are averaged (their targets differ in length), coins that depend on the parts, and parts or
    losses that save no memory: computed before the backward of the one before."""
    one, calls = tiny_run(tmp_path, accumulate=parts, warmup=0.0, ramp=0.0, cap=0.5), []

    def spy(sources: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        calls.append((len(sources), one.model.embedding.weight.grad is None))
        return one.model.nll(sources, targets)

    one.nll = spy
    monkeypatch.setattr(r2d, "predict_labels", lambda run, questions: [one.data.labels[0]] * len(questions))
    log = r2d.gradients(one, 2, 3, one.data.train[:8], torch.Generator().manual_seed(1), [])
    whole = tiny_run(tmp_path, warmup=0.0, ramp=0.0, cap=0.5)
    expected = r2d.gradients(whole, 2, 3, one.data.train[:8], torch.Generator().manual_seed(1), [])
    assert log == pytest.approx(expected, rel=1e-5) and 0 < log["used_predicted"] < 8
    assert max(rows for rows, _ in calls) == math.ceil(8 / parts) and sum(first for _, first in calls) == 1
    for a, b in zip(one.model.parameters(), whole.model.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("option", "tolerance"), [("dtype", 2e-2), ("compile", 1e-5)])
def test_bfloat16_and_compile_give_the_same_loss_within_their_tolerance(
    option: str, tolerance: float, tmp_path
) -> None:
    """Catches an option that changes nothing, or computes something else: losses and weights are float32 with both, and
    bfloat16 holds for decoding and scoring as well."""
    fast = tiny_run(tmp_path, **{option: "bfloat16" if option == "dtype" else True})
    plain = tiny_run(tmp_path)
    for stage in (1, 2):
        log = r2d.gradients(fast, stage, 3, plain.data.train[:8], torch.Generator(), [])
        expected = r2d.gradients(plain, stage, 3, plain.data.train[:8], torch.Generator(), [])
        assert log["loss"] == pytest.approx(expected["loss"], rel=tolerance)
        assert option == "compile" or log["loss"] != expected["loss"]
    assert (fast.autocast()._enabled, fast.nll == fast.model.nll) == (option == "dtype", option == "dtype")
    sums = [*r2d.stage1_loss(fast, plain.data.train[:8], [1, 1], {}), *fast.model.parameters()]
    assert {x.dtype for x in sums} == {torch.float32}
    seen, product = set(), next(part for part in fast.model.modules() if isinstance(part, torch.nn.Linear))
    product.register_forward_hook(lambda part, given, result: seen.add(result.dtype))
    r2d.predict_labels(fast, ["a cough"])
    r2d.nll_counts(fast, plain.data.val[:8], ["explain:"] * 8)
    assert seen == {torch.bfloat16 if option == "dtype" else torch.float32}


@pytest.mark.parametrize("scale", [1.0, 1e-7])  # of the gradients; the second is where eps counts
def test_adam_is_torchs_with_a_rate_per_tensor(scale: float) -> None:
    """Catches a missing bias correction, eps inside the root, and a size that follows the weights as they grow."""
    torch.manual_seed(0)
    ours, peer = (nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 3)) for _ in range(2))
    peer.load_state_dict(ours.state_dict())
    mine = r2d.Adam(ours)
    sizes = [max(p.detach().square().mean().sqrt().item(), 1e-3) for p in peer.parameters()]
    theirs = torch.optim.AdamW([{"params": [p]} for p in peer.parameters()], weight_decay=0.0)
    for step in range(30):
        lr, x = 0.1 / (step + 1), torch.randn(4, 5)
        for model in (ours, peer):
            model.zero_grad()
            (model(x).square().sum() * scale).backward()
        for group, size in zip(theirs.param_groups, sizes, strict=True):
            group["lr"] = lr * size
        mine.step(lr)
        theirs.step()
        if step == 15:  # and goes on from its state
            state, mine = mine.state(), r2d.Adam(ours)
            mine.restore(state)
    for a, b in zip(ours.parameters(), peer.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_token_mean_ignores_padding_and_empty_targets(tmp_path: Path) -> None:
    """Catches a mean over padded positions, or a missing rationale that is trained on as an empty text."""
    one = tiny_run(tmp_path)
    one.model.eval()
    sources = [one.prompts.source("explain:", e.question) for e in one.data.train[:2]]
    targets = [one.prompts.target("go"), one.prompts.target("see doctor within 24 hours")]
    single = [r2d.token_mean(one, [s], [t], len(t)).item() * len(t) for s, t in zip(sources, targets, strict=True)]
    both = r2d.token_mean(one, sources, targets, sum(map(len, targets))).item()
    assert both == pytest.approx(sum(single) / sum(map(len, targets)), rel=1e-5)
    targets.append(one.prompts.target(""))
    with_empty = r2d.token_mean(one, [*sources, sources[0]], targets, sum(map(len, targets))).item()
    assert with_empty == pytest.approx(both, rel=1e-5)


def test_overfits_one_batch(tmp_path: Path) -> None:
    """Catches any break between prompts, model, loss and decoding: eight notes must be learned by heart."""
    one = tiny_run(tmp_path, width=64, vocab_size=800, max_target=96, schedule="none", warmup=0.0, alpha=0.5)
    examples, coin = one.data.train[:8], torch.Generator()
    optimizer = torch.optim.AdamW(one.model.parameters(), lr=3e-3)
    one.model.train()
    for step in range(200):
        optimizer.zero_grad()
        r2d.gradients(one, 2, step, examples, coin, [])
        optimizer.step()
    questions, gold = [e.question for e in examples], [e.label for e in examples]
    assert r2d.predict_labels(one, questions) == gold
    texts = r2d.explain(one, questions, gold)
    assert metrics.corpus_bleu(texts, [e.rationale for e in examples]) > 95


# --- whole runs


def test_a_run_leaves_every_file_of_the_contract(finished: Path) -> None:
    """Catches a file or a key that was renamed or forgotten."""
    assert {path.name for path in finished.iterdir()} == FILES
    result = read(finished / "metrics.json")
    assert {"accuracy", "macro_f1", "per_class", "invalid", "ceiling_accuracy", "ceiling_macro_f1"} <= set(
        result["label"]
    )
    assert (
        {"gold", "predicted", "flipped", "predicted_wrong"}
        >= set(result["rationale"])
        >= {"gold", "predicted", "flipped"}
    )
    keys = {"n", "bleu", "sentence_bleu", "bertscore_f1", "nll", "argues_given", "argues_gold", "grounded"}
    assert all(keys <= set(scores) for scores in result["rationale"].values())
    assert {"bleu_gap", "nll_gap", "following"} <= set(result["exposure"])
    assert {"consistency", "sufficiency", "gold_robustness", "reader_accuracy"} <= set(result["self"])
    for scores in (result["label"], *result["rationale"].values()):
        for key in scores:
            if key.endswith("_ci95"):
                low, high = scores[key]
                assert low <= scores[key.removesuffix("_ci95")] <= high
    rows = lines(finished / "predictions.jsonl")
    assert len(rows) == 48
    expected = {"question", "label", "rationale", "predicted_label", "flipped_label"}
    expected |= {f"rationale_given_{name}" for name in ("predicted", "gold", "flipped")}
    assert all(set(row) == expected and row["flipped_label"] != row["label"] for row in rows)


def test_the_log_tells_what_happened(finished: Path) -> None:
    """Catches a schedule that is not the one logged, or validation scores that are missing."""
    log = lines(finished / "log.jsonl")
    assert [(line["stage"], line["step"]) for line in log] == [(1, s) for s in range(4)] + [(2, s) for s in range(8)]
    stage2 = log[4:]
    for line in stage2:
        assert line["p_predicted"] == r2d.p_predicted(line["step"], 8, "linear", 0.05, 0.6, 0.9)
        assert {"loss", "loss_predict", "loss_explain", "alpha", "lr", "grad_norm", "tokens_per_second"} <= set(line)
    assert "val_loss" in log[3] and {"val_macro_f1", "val_nll_gold", "val_nll_predicted"} <= set(stage2[7])
    assert all(math.isfinite(line["loss"]) for line in log)


@pytest.mark.parametrize("method", ["sft", "dss"])
def test_baselines_run_to_the_end(method: str, tmp_path: Path) -> None:
    """Catches a baseline that needs a stage 1, or that claims conditions it does not have."""
    assert run(tmp_path / "run", "--method", method) == 0
    result = read(tmp_path / "run" / "metrics.json")
    assert ("rationale" in result) == (method == "dss") and "exposure" not in result
    if method == "dss":
        assert set(result["rationale"]) <= {"predicted", "predicted_wrong"}
    assert not (tmp_path / "run" / "stage1.pt").exists()


def test_the_same_seed_gives_the_same_bytes_and_another_seed_does_not(finished: Path, tmp_path: Path) -> None:
    """Catches anything random that the seed does not decide."""
    assert run(tmp_path / "same") == 0 and run(tmp_path / "other", "--seed", "1") == 0
    same, other = ((tmp_path / name / "predictions.jsonl").read_bytes() for name in ("same", "other"))
    assert same == (finished / "predictions.jsonl").read_bytes() != other
    assert same_state(tmp_path / "same", finished) and not same_state(tmp_path / "other", finished)
    one, two = (tiny_run(tmp_path, seed=seed).model.state_dict()["embedding.weight"] for seed in (0, 1))
    assert not torch.equal(one, two)


def test_p_zero_is_gold_only_bit_for_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a coin that draws from the generator of dropout, or sampling that costs a random number at P = 0."""
    assert run(tmp_path / "zero", "--cap", "0", "--dropout", "0.1") == 0
    monkeypatch.setattr(r2d, "flip_coins", lambda n, p, generator: [False] * n)  # no coin at all
    assert run(tmp_path / "none", "--schedule", "none", "--dropout", "0.1") == 0
    zero, none = (torch.load(tmp_path / name / "last.pt", weights_only=True) for name in ("zero", "none"))
    assert all(torch.equal(none["model"][key], zero["model"][key]) for key in none["model"])
    assert torch.equal(none["rng"], zero["rng"])


def stop_at(patch: pytest.MonkeyPatch, stage: int, step: int) -> None:
    """Ctrl-C at this step of this stage."""
    gradients = r2d.gradients

    def stopping(run: r2d.Run, *place: object) -> dict:
        if place[:2] == (stage, step):
            os.kill(os.getpid(), signal.SIGINT)
        return gradients(run, *place)

    patch.setattr(r2d, "gradients", stopping)


def test_an_interrupted_run_goes_on_to_the_same_weights(finished: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    """Catches a resume that repeats, skips or reorders steps, or forgets the optimiser or the coins."""
    with monkeypatch.context() as patch:
        stop_at(patch, stage=2, step=5)
        assert run(tmp_path / "run") == 130
    assert lines(tmp_path / "run" / "log.jsonl")[-1]["step"] == 5  # the step is finished, then the state is saved
    assert r2d.main(["--out", str(tmp_path / "run")]) == 0  # no options: those of the run
    assert "stage 2: goes on at step 6" in capsys.readouterr().out
    assert same_state(tmp_path / "run", finished)
    assert (tmp_path / "run" / "predictions.jsonl").read_bytes() == (finished / "predictions.jsonl").read_bytes()


def test_fresh_over_an_interrupted_stage_1_begins_at_its_beginning(tmp_path: Path, monkeypatch, capsys) -> None:
    """Catches a run that starts over from the last save of the one it has just moved aside."""
    with monkeypatch.context() as patch:
        stop_at(patch, stage=1, step=2)
        assert run(tmp_path / "run", "--stage", "1") == 130
    assert run(tmp_path / "run", "--stage", "1", "--fresh") == 0
    assert [line["step"] for line in lines(tmp_path / "run" / "log.jsonl")] == list(range(4))
    assert "goes on at step" not in capsys.readouterr().out


def test_stage_1_then_stage_2_is_the_whole_job(finished: Path, tmp_path: Path) -> None:
    """Catches a stage 2 that trains stage 1 again, or starts from other weights than stage 1 left."""
    assert run(tmp_path / "run", "--stage", "1") == 0
    assert not (tmp_path / "run" / "metrics.json").exists()
    assert run(tmp_path / "run", "--stage", "2") == 0
    assert same_state(tmp_path / "run", finished)


def test_a_stage_1_brought_from_another_run_is_used(finished: Path, tmp_path: Path) -> None:
    """Catches a stage 2 that ignores a stage1.pt laid into its folder and starts from random weights."""
    (tmp_path / "run").mkdir()
    for name in ("stage1.pt", "tokenizer.model"):
        (tmp_path / "run" / name).write_bytes((finished / name).read_bytes())
    assert run(tmp_path / "run") == 0
    assert lines(tmp_path / "run" / "log.jsonl")[0]["stage"] == 2 and same_state(tmp_path / "run", finished)


def test_a_finished_run_is_left_alone_and_fresh_moves_it_aside(finished: Path, tmp_path: Path, capsys) -> None:
    """Catches a second call that trains again or overwrites, and --fresh that deletes."""
    assert run(tmp_path / "run") == 0
    before = (tmp_path / "run" / "metrics.json").stat().st_mtime_ns
    assert run(tmp_path / "run") == 0 and "finished" in capsys.readouterr().out
    assert (tmp_path / "run" / "metrics.json").stat().st_mtime_ns == before
    assert run(tmp_path / "run", "--fresh", "--seed", "5") == 0
    assert (tmp_path / "run.old1" / "metrics.json").stat().st_mtime_ns == before
    assert read(tmp_path / "run" / "config.json")["seed"] == 5


def test_eval_and_ask_use_the_checkpoint(finished: Path, capsys) -> None:
    """Catches an evaluation of untrained weights, and an --ask that prints something else than a label."""
    before = (finished / "predictions.jsonl").read_bytes()
    assert run(finished, "--eval") == 0
    assert (finished / "predictions.jsonl").read_bytes() == before
    capsys.readouterr()
    assert run(finished, "--ask", lines(finished / "predictions.jsonl")[0]["question"]) == 0
    label = lines(finished / "predictions.jsonl")[0]["predicted_label"]
    assert f"label      {label}\n" in capsys.readouterr().out


def test_selection_takes_no_checkpoint_from_before_the_end_of_the_ramp(finished: Path) -> None:
    """Catches a best checkpoint that never saw a predicted label."""
    assert torch.load(finished / "stage2.pt", weights_only=True)["step"] >= 0.65 * 8


def test_early_stopping_arms_after_the_ramp_and_keeps_the_best(tmp_path: Path, monkeypatch) -> None:
    """Catches a patience that counts from the start, and a best checkpoint that is simply the last."""
    scores = iter(range(1000, 0, -1))

    def worse_each_time(run: r2d.Run, stage: int) -> tuple[float, dict]:
        score = next(scores)
        return score, {"val_loss": -score, "val_macro_f1": score}

    monkeypatch.setattr(r2d, "validate", worse_each_time)
    one = tiny_run(tmp_path, stage1_steps=20, stage2_steps=40, eval_every=1)
    one.out.mkdir()
    r2d.start(one)
    for stage in (1, 2):
        r2d.train(one, stage, r2d.last_state(one.out))
        best = torch.load(one.out / f"stage{stage}.pt", weights_only=True)["weights"]
        assert all(torch.equal(best[key], value) for key, value in one.model.state_dict().items())
    log = lines(tmp_path / "run" / "log.jsonl")
    # stage 1: best after step 1, then patience 3. Stage 2: armed after 0.65 * 40 = 26 steps, then patience 5.
    assert [sum(line["stage"] == stage for line in log) for stage in (1, 2)] == [4, 31]
    saved = [torch.load(tmp_path / "run" / f"stage{stage}.pt", weights_only=True)["step"] for stage in (1, 2)]
    assert saved == [1, 26]


def test_sampling_never_runs_in_evaluation(finished: Path, monkeypatch) -> None:
    """Catches coins in validation or in the final evaluation."""

    def forbidden(*_: object) -> list[bool]:
        raise AssertionError("a coin was flipped")

    monkeypatch.setattr(r2d, "flip_coins", forbidden)
    assert run(finished, "--eval") == 0
    one = r2d.prepare(r2d.Options(**{**r2d.parse_options(TINY), "out": str(finished)}))
    r2d.validate(one, 2)


# --- the command line


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ("--stage 3", "--stage"),
        ("--nonsense", "--nonsense"),
        ("--lr fast", "--lr"),
        ("--lr nan", "--lr"),
        ("--cap 1.5", "--cap"),
        ("--warmup 0.6 --ramp 0.6", "--ramp"),
        ("--width 30 --heads 4", "--heads"),
        ("--eval --ask x", "--ask"),
        ("--eval --fresh", "--fresh"),
        ("--data missing.jsonl", "missing.jsonl"),
        ("--data missing.jsonl --rationales nurse", "--rationales"),
        ("--eval", "stage2.pt"),
        ("--batch-size 0", "--batch-size"),
    ],
)
def test_wrong_options_end_in_one_line_and_status_2(arguments: str, named: str, tmp_path: Path, capsys) -> None:
    """Catches a traceback, a message that does not name the option, and a folder left behind."""
    out = tmp_path / "run"
    assert r2d.main([*shlex.split(arguments), "--out", str(out)]) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1 and named in message and not out.exists()


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ("", "empty"),
        ('{"question": "a", "label": "x"}\n', "rationale"),
        ('{"question": "a", "label": 3, "rationale": "r"}\n', "label"),
        ('{"question": "a", "label": "x", "rationale": "r"}\n', "empty"),
        (
            "".join(f'{{"question": "q{i}", "label": "{"ab"[i % 2]}", "rationale": ""}}\n' for i in range(20)),
            "rationale",
        ),
        ("".join(f'{{"question": "q{i}", "label": "a", "rationale": "r"}}\n' for i in range(20)), "label"),
    ],
)
def test_bad_data_ends_in_one_line_and_leaves_nothing(content: str, named: str, tmp_path: Path, capsys) -> None:
    """Catches a run folder that is made before the data is known to be good."""
    (tmp_path / "d.jsonl").write_text(content, encoding="utf-8")
    assert run(tmp_path / "run", "--data", str(tmp_path / "d.jsonl")) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1 and named in message and "d.jsonl" in message
    assert not (tmp_path / "run").exists()


def test_other_options_than_the_unfinished_runs_are_refused_by_name(tmp_path: Path, capsys) -> None:
    """Catches a resume that silently becomes a different run."""
    assert run(tmp_path / "run", "--stage", "1") == 0
    before = (tmp_path / "run" / "last.pt").read_bytes()
    capsys.readouterr()
    assert run(tmp_path / "run", "--lr", "0.5") == 2
    assert "--lr" in capsys.readouterr().err and (tmp_path / "run" / "last.pt").read_bytes() == before


def test_a_damaged_or_hostile_checkpoint_is_refused(finished: Path, tmp_path: Path, capsys) -> None:
    """Catches a traceback from a truncated file, and a pickle that runs code when it is read."""
    assert run(tmp_path / "run", "--stage", "1") == 0
    last = tmp_path / "run" / "last.pt"
    (tmp_path / "run" / "previous.pt").unlink()  # else the run goes on from there
    last.write_bytes(last.read_bytes()[:1000])
    assert run(tmp_path / "run") == 2 and "last.pt" in capsys.readouterr().err
    torch.save({"stage": Evil(tmp_path / "evil")}, last)
    assert run(tmp_path / "run") == 2 and not (tmp_path / "evil").exists()


class Evil:
    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.path),)


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_state(tmp_path: Path, monkeypatch, capsys) -> None:
    """Catches training on through nan, and a checkpoint full of nan."""
    mean, gradients, at = r2d.token_mean, r2d.gradients, []
    monkeypatch.setattr(r2d, "gradients", lambda r, stage, s, *rest: at.append(s) or gradients(r, stage, s, *rest))
    monkeypatch.setattr(r2d, "token_mean", lambda *a: mean(*a) * (float("nan") if at[-1] == 6 else 1))
    assert run(tmp_path / "run") == 2
    assert "step 6" in capsys.readouterr().err
    state = torch.load(tmp_path / "run" / "last.pt", weights_only=True)
    assert state["step"] == 4 and all(torch.isfinite(w).all() for w in state["model"].values())


def test_long_questions_are_cut_counted_and_reported_and_the_label_is_kept(tmp_path: Path, capsys) -> None:
    """Catches a cut that takes the label, or that nobody hears of."""
    rows = [
        {"question": f"q{i} " + "long words " * 400, "label": "ab"[i % 2], "rationale": "because"} for i in range(20)
    ]
    (tmp_path / "d.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    assert run(tmp_path / "run", "--data", str(tmp_path / "d.jsonl"), "--max-source", "64") == 0
    assert "16 of 16 train questions are cut" in capsys.readouterr().out
    assert read(tmp_path / "run" / "metrics.json")["argues_by"] == "reader"
    (tmp_path / "d.jsonl").unlink()
    assert run(tmp_path / "run", "--max-source", "64", "--ask", "a question") == 0  # asking needs no data


def test_help_has_a_default_for_every_option(capsys) -> None:
    """Catches an option without help: every one says its default."""
    with pytest.raises(SystemExit) as end:
        r2d.main(["-h"])
    text = capsys.readouterr().out
    assert end.value.code == 0
    assert text.count("default") >= len(r2d.fields(r2d.Options))


def test_sigterm_saves_and_says_how_to_go_on(tmp_path: Path) -> None:
    """Catches a preempted run that loses everything: a real process, a real signal."""
    out = tmp_path / "run"
    command = [sys.executable, str(ROOT / "r2d.py"), *TINY, "--out", str(out), "--stage2-steps", "100000"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, encoding="utf-8")
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and len(stage2_lines(out)) <= 8:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, message = process.communicate(timeout=60)
    assert process.returncode == 130 and "same command" in message and "Traceback" not in message
    assert torch.load(out / "last.pt", weights_only=True)["stage"] == 2


def test_the_label_must_survive_the_tokenizer(tmp_path: Path, capsys, monkeypatch) -> None:
    """Catches a tokenizer that cannot write a label (SentencePiece once lost the letter E)."""
    monkeypatch.setattr(data.Tokenizer, "decode", lambda self, ids: "go to D now")
    assert run(tmp_path / "run") == 2
    assert "cannot write the label" in capsys.readouterr().err and not (tmp_path / "run").exists()
