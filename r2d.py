"""Reason2Decide from scratch: learn to explain, then to predict and explain (arXiv 2512.20074).

    python r2d.py --stage 2                     everything: stage 1, stage 2, test, table
    python r2d.py --ask "TEXT" --given LABEL    the rationale for a label of your choice

In the paper's order; files and options come last. For study, not for patients.
"""

import copy
import io
import json
import math
import os
import random
import statistics
import sys
from argparse import SUPPRESS, ArgumentDefaultsHelpFormatter, ArgumentParser, Namespace
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

import data
import metrics
from data import Dataset, Example, InputError, Tokenizer, columns, reading, write_file
from model import ModelConfig, Transformer, load_t5

# torchrun starts WORLD processes, each with a RANK; rank 0 alone tests and writes.
RANK = int(os.environ.get("RANK", 0))
WORLD = int(os.environ.get("WORLD_SIZE", 1))
ACCELERATOR = str(torch.accelerator.current_accelerator(check_available=True) or "cpu")
AT_ONCE = 128  # prompts in one pass of the model; in passes of 64 decoding took 25 % longer


@dataclass
class Run:
    """What all parts of a run share."""

    options: Namespace
    dataset: Dataset
    tokenizer: Tokenizer
    model: Transformer
    label_tokens: int  # of the longest label, with its end: no prediction needs more


# ---- Prompts and greedy decoding (paper, section 3): first the label, then the rationale
def explain_prompts(run: Run, labels: list[str], questions: list[str]) -> list[str]:
    """The prompts of stage 2 for a rationale. They show a label, except in the baseline DSS."""
    if run.options.method == "dss":
        return [f"explain: {question}" for question in questions]
    pairs = zip(labels, questions, strict=True)
    return [f"given label: {label}, explain: {question}" for label, question in pairs]


def generate_texts(run: Run, prompts: list[str], max_new_tokens: int) -> list[str]:
    """What the model writes after each prompt, greedily; `generate` itself turns dropout off."""
    texts = []
    for start in range(0, len(prompts), AT_ONCE):
        batch = prompts[start : start + AT_ONCE]
        input_ids = run.tokenizer.to_ids(batch, run.options.max_source).to(run.options.device)
        for row in run.model.generate(input_ids, max_new_tokens).tolist():
            texts.append(run.tokenizer.to_text(row))
    return texts


def predict_labels(run: Run, questions: list[str]) -> list[str]:
    """The predicted labels. An output that is no label stays as it is."""
    prompts = [f"predict: {question}" for question in questions]
    return generate_texts(run, prompts, run.label_tokens)


# ---- Stage 1: rationales alone
def target_nll(run: Run, prompts: list[str], targets: list[str]) -> tuple[Tensor, Tensor]:
    """Of each target: its negative log-likelihood in nats (B,), its number of tokens (B,)."""
    o = run.options
    nll, n_tokens = [], []
    for start in range(0, len(prompts), AT_ONCE):
        rows = slice(start, start + AT_ONCE)
        input_ids = run.tokenizer.to_ids(prompts[rows], o.max_source).to(o.device)
        target_ids = run.tokenizer.to_ids(targets[rows], o.max_target).to(o.device)
        nll.append(run.model.nll(input_ids, target_ids).sum(1))
        n_tokens.append(target_ids.count_nonzero(1))  # 0 is padding
    return torch.cat(nll), torch.cat(n_tokens)


def token_loss(run: Run, prompts: list[str], targets: list[str]) -> Tensor:
    """Mean over all target tokens; of several processes each returns its part of that mean."""
    nll, tokens = target_nll(run, prompts, targets)
    n_tokens = tokens.sum()
    if WORLD > 1:
        dist.all_reduce(n_tokens)  # the sum over all processes
    return nll.sum() / n_tokens.clamp(min=1)  # a batch may have no rationale, so no token


def stage1_loss(run: Run, batch: list[Example], step: int) -> tuple[Tensor, dict]:
    """explain: {question} -> rationale. Returns the loss, and values for log.jsonl."""
    questions, _, rationales = columns(batch[RANK::WORLD])  # the rows of this process
    prompts = [f"explain: {question}" for question in questions]
    loss = token_loss(run, prompts, rationales)
    return loss, {"loss": loss.item(), "loss_explain": loss.item()}


# ---- Schedules: pure functions of the update
def p_predicted(
    step: int, steps: int, schedule: str, warmup: float, ramp: float, cap: float
) -> float:
    """P(the label in the explain prompt is the predicted one) at update `step` of `steps`.

    Bengio et al. (2015, section 2.4) write epsilon = 1 - P. P is 0 during the warm-up, then rises
    to the cap during a ramp of n = ramp * steps updates, here in its update i:
        linear           P = min(cap, i / n): at the cap from cap * n on, as in the authors' code
        exponential      P = 1 - k^i, with the k that reaches the cap at n
        inverse-sigmoid  P = 1 - k / (k + e^(i/k)), likewise; it starts a little above 0
    """
    i = step - warmup * steps
    n = ramp * steps
    if schedule == "none" or cap == 0 or i < 0:  # none: gold labels only
        return 0.0
    if i >= n:
        return cap
    if schedule == "linear":
        return min(cap, i / n)
    top = min(cap, 1 - 1e-6)  # the two curves come close to 1 and never reach it
    if schedule == "exponential":
        return 1 - (1 - top) ** (i / n)  # k = (1 - top)^(1 / n)
    k = inverse_sigmoid_k(n, top)
    return 1 / (1 + k * math.exp(-i / k))  # = 1 - k / (k + e^(i/k)), without overflow


def inverse_sigmoid_k(n: float, p: float) -> float:
    """The k that gives P = p after n updates: x = n / k solves x + ln(x) = c. Newton's method."""
    c = math.log(p / (1 - p)) + math.log(n)
    x = min(1.0, math.exp(c - 1))  # below the solution, so that no step leads too far
    for _ in range(100):
        x *= (1 + c - math.log(x)) / (1 + x)
    return n / x


def alpha_at(step: int, steps: int, warmup: float, alpha: float) -> float:
    """Weight of the label loss: from 0 linearly to `alpha` over the warm-up, then constant."""
    return alpha if step >= warmup * steps else alpha * step / (warmup * steps)


def flip_coins(n: int, p: float, generator: torch.Generator) -> list[bool]:
    """One coin per example, True with probability p, from a generator that nothing else uses."""
    return (torch.rand(n, generator=generator) < p).tolist()


# ---- Stage 2: label and rationale, with scheduled sampling of the label in the prompt
def mix_labels(run: Run, batch: list[Example], coins: list[bool]) -> tuple[list[str], dict]:
    """The labels for the explain prompts: predicted where the coin is True, else gold. (The
    authors' code predicts for all examples, with dropout, and keeps invalid labels.) And counts
    for log.jsonl: `wrong_predicted`, the prompts that now hold a wrong label, is the dose."""
    questions, labels, _ = columns(batch)
    counts = {"used_predicted": 0, "wrong_predicted": 0, "invalid_predicted": 0}
    chosen = [i for i, coin in enumerate(coins) if coin]
    predicted = predict_labels(run, [questions[i] for i in chosen])
    for i, label in zip(chosen, predicted, strict=True):
        if label in run.dataset.labels:
            counts["used_predicted"] += 1
            counts["wrong_predicted"] += int(label != batch[i].label)
            labels[i] = label
        else:
            counts["invalid_predicted"] += 1  # gold stays in the prompt
    return labels, counts


def stage2_loss(run: Run, batch: list[Example], step: int) -> tuple[Tensor, dict]:
    """L = alpha * L_predict + (1 - alpha) * L_explain, and values for log.jsonl."""
    o = run.options
    alpha, p = o.alpha, 0.0  # the baselines: alpha does not rise, no label is sampled
    if o.method == "r2d":
        alpha = alpha_at(step, o.stage2_steps, o.warmup, o.alpha)
        p = p_predicted(step, o.stage2_steps, o.schedule, o.warmup, o.ramp, o.cap)
    seed = random.Random(f"{o.seed} coins {step}").getrandbits(60)  # when resumed, the same
    coins = flip_coins(len(batch), p, torch.Generator().manual_seed(seed))
    batch, coins = batch[RANK::WORLD], coins[RANK::WORLD]  # the rows of this process
    questions, gold, rationales = columns(batch)
    prompts = [f"predict: {question}" for question in questions]
    loss_predict = token_loss(run, prompts, gold)
    log = {"prompts": len(batch), "loss": loss_predict.item(), "loss_predict": loss_predict.item()}
    if o.method == "sft":  # fine-tuning on labels alone
        return loss_predict, log
    labels, counts = mix_labels(run, batch, coins)
    loss_explain = token_loss(run, explain_prompts(run, labels, questions), rationales)
    loss = alpha * loss_predict + (1 - alpha) * loss_explain
    log.update(loss=loss.item(), loss_explain=loss_explain.item(), **counts)
    return loss, {**log, "alpha": alpha, "p_predicted": p}


# ---- Training: one loop for both stages and all methods
@dataclass
class Progress:
    """How far a stage has come; with weights and optimisers it is all that resuming needs."""

    stage: int
    step: int = 0  # updates done
    log: list[dict] = field(default_factory=list)  # the lines of log.jsonl, of both stages
    best_score: float = -math.inf
    best_weights: dict[str, Tensor] = field(default_factory=dict)
    bad_evals: int = 0  # validations in a row without a better score


def lr_at(step: int, steps: int, lr: float, rise: float) -> float:
    """Learning rate: up linearly over the share `rise` of the updates, then down to 0."""
    rising = (step + 1) / max(rise * steps, 1)
    falling = (steps - step) / max((1 - rise) * steps, 1)
    return lr * min(1.0, rising, falling)


def sum_over_processes(run: Run, log: dict) -> None:
    """Add up the parts of all processes: the gradients, and the losses and counts for the log."""
    for weight in run.model.parameters():
        dist.all_reduce(weight.grad)
    for key, value in log.items():
        if key not in ("alpha", "p_predicted"):
            total = torch.tensor(value, device=run.options.device)
            dist.all_reduce(total)
            log[key] = total.item()


@torch.no_grad()
def validate(run: Run, stage: int) -> dict[str, float]:
    """Stage 1: loss per token of the rationales. Stage 2: macro-F1 of the predicted labels."""
    if stage == 2:
        questions, gold, _ = columns(run.dataset.val)
        predicted = predict_labels(run, questions)
        return {"val_macro_f1": metrics.macro_f1(gold, predicted, run.dataset.labels)}
    questions, _, rationales = columns(run.dataset.stage1_val)
    prompts = [f"explain: {question}" for question in questions]
    nll, n_tokens = target_nll(run, prompts, rationales)
    return {"val_loss": (nll.sum() / n_tokens.sum()).item()}


def train(
    run: Run, stage: int, examples: list, steps: int, loss_of: Callable, since: float, patience: int
) -> None:
    """One stage: from the last save, or the weights in the model, to its best checkpoint.

    Only weights since update `since` can be the best; `patience` validations without better end it.
    """
    o = run.options
    if (o.out / f"stage{stage}.pt").exists():  # done before
        load(run, f"stage{stage}.pt")
        return
    progress = Progress(stage)
    optimizers = run.model.make_optimizers(o.optimizer)
    if (o.out / "last.pt").exists():
        with reading(o.out / "last.pt", "start over in another --out"):
            saved = torch.load(o.out / "last.pt", map_location=o.device, weights_only=True)
            progress.log = saved["progress"]["log"]  # stage 2 needs no more of a save of stage 1
            if saved["progress"]["stage"] == stage:
                vars(progress).update(saved["progress"])
                run.model.load_state_dict(saved["weights"])
                for optimizer, state in zip(optimizers, saved["optimizers"], strict=True):
                    optimizer.load_state_dict(state)
    batches = []  # of all updates
    epoch = 0
    while len(batches) < steps:
        batches += data.make_batches(examples, o.batch_size, o.seed, epoch)
        epoch += 1
    run.model.train()
    for step in tqdm(range(progress.step, steps), f"stage {stage}", disable=RANK > 0 or None):
        if progress.bad_evals == patience:
            break
        # A seed for each update: a resumed run has the same dropout.
        torch.manual_seed(random.Random(f"{o.seed} {stage} {step} {RANK}").getrandbits(60))
        loss, log = loss_of(run, batches[step], step)
        run.model.zero_grad()
        loss.backward()
        if WORLD > 1:
            sum_over_processes(run, log)
        grad_norm = torch.nn.utils.clip_grad_norm_(run.model.parameters(), 1.0).item()
        if not math.isfinite(grad_norm):  # before it reaches a weight, and so a file
            raise InputError(f"update {step}: infinite gradients; lower --lr and change --out")
        lr = lr_at(step, steps, o.lr, 0.0 if o.optimizer == "adamw" else 0.1)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr * group["relative_lr"]
            optimizer.step()
        progress.step = step + 1
        line = {"stage": stage, "step": step, **log, "lr": lr, "grad_norm": grad_norm}
        progress.log.append(line)  # a validation adds its score to it
        if progress.step % o.eval_every == 0 or progress.step == steps:
            run.model.eval()
            line.update(validate(run, stage))  # on all ranks alike, so that all stop together
            run.model.train()
            score = line["val_macro_f1"] if stage == 2 else -line["val_loss"]
            if progress.step >= since and score > progress.best_score:
                progress.best_score = score
                progress.best_weights = copy.deepcopy(run.model.state_dict())
                progress.bad_evals = 0
            elif progress.step >= since:
                progress.bad_evals += 1
            if RANK == 0:
                lines = [json.dumps(entry) + "\n" for entry in progress.log]
                write_file(o.out / "log.jsonl", "".join(lines).encode())
                states = [optimizer.state_dict() for optimizer in optimizers]
                save(run, "last.pt", progress=vars(progress), optimizers=states)
    run.model.load_state_dict(progress.best_weights)
    if RANK == 0:
        save(run, f"stage{stage}.pt")


# ---- The test: the same notes explained under the gold, the predicted and a flipped label
@torch.no_grad()
def test_rows(run: Run) -> list[dict]:
    """One row per test example, with every fact that the scores need: predictions.jsonl."""
    o = run.options
    questions, _, rationales = columns(run.dataset.test)
    predicted = predict_labels(run, questions)
    majority = statistics.mode(columns(run.dataset.train)[1])
    rng = random.Random(o.seed)
    rows = []
    for i, example in enumerate(run.dataset.test):
        wrong = [label for label in run.dataset.labels if label != example.label]
        row = {**vars(example), "predicted_label": predicted[i], "majority_label": majority}
        row["flipped_label"] = rng.choice(wrong)
        if run.dataset.ceiling:  # triage: the rule's answer
            row.update(run.dataset.ceiling[i])
        rows.append(row)
    conditions = {"r2d": ["gold", "predicted", "flipped"], "dss": ["predicted"], "sft": []}
    for condition in conditions[o.method]:
        labels = [row[metrics.LABEL_KEYS[condition]] for row in rows]
        prompts = explain_prompts(run, labels, questions)
        texts = generate_texts(run, prompts, o.max_target)
        nll, n_tokens = target_nll(run, prompts, rationales)
        for i, row in enumerate(rows):
            row["tokens"] = n_tokens[i].item()  # of the gold rationale, always the same
            row[f"nats_given_{condition}"] = nll[i].item()
            row[f"rationale_given_{condition}"] = texts[i]
    add_verdicts(run, rows)
    return rows


def add_verdicts(run: Run, rows: list[dict]) -> None:
    """The label each text argues for: the checker's on triage, elsewhere the reader's."""
    _, gold, rationales = columns(run.dataset.train)
    reader = metrics.Reader(rationales, gold, run.dataset.labels)
    for row in rows:
        row["reader_label"] = reader(row["rationale"])
        for condition in metrics.LABEL_KEYS:
            text = row.get(f"rationale_given_{condition}")
            if text is not None and run.options.data == "triage":
                row[f"argues_given_{condition}"] = data.argues_for(text)
                row[f"ungrounded_given_{condition}"] = data.ungrounded(text, row["question"])
            elif text is not None:
                row[f"argues_given_{condition}"] = reader(text)


def evaluate(run: Run) -> None:
    """Write predictions.jsonl and metrics.json; print the table and three examples."""
    o = run.options
    run.model.eval()
    rows = test_rows(run)
    result = {"method": o.method, "data": o.data, "seed": o.seed}
    result.update(metrics.score(rows, run.dataset.labels))
    lines = [json.dumps(row) + "\n" for row in rows]
    write_file(o.out / "predictions.jsonl", "".join(lines).encode())
    write_file(o.out / "metrics.json", json.dumps(result, indent=2).encode())
    print("\n" + metrics.table(result))
    for row in rows[:3]:
        print(f"\nnote       {row['question']}\ngold       {row['label']}: {row['rationale']}")
        print(f"model      {row['predicted_label']}: {row.get('rationale_given_predicted', '-')}")


# ---- The files of a run
def save(run: Run, name: str, **more) -> None:
    """A checkpoint: the weights and the shape of the model, and what else resuming needs."""
    buffer = io.BytesIO()
    config = asdict(run.model.config)
    torch.save({"config": config, "weights": run.model.state_dict(), **more}, buffer)
    write_file(run.options.out / name, buffer.getvalue())


def load(run: Run, name: str) -> None:
    """Put the weights of a checkpoint into the model. Raises InputError."""
    path = run.options.out / name
    with reading(path, "train it first, or give another --out"):
        saved = torch.load(path, map_location=run.options.device, weights_only=True)
        run.model.load_state_dict(saved["weights"])


def read_config(out: Path) -> dict:
    """The config.json of the run in `out`; empty if there is no run yet."""
    path = out / "config.json"
    with reading(path, "start over in another --out"):  # {**...} raises for what is no object
        return {**json.loads(path.read_text(encoding="utf-8"))} if path.exists() else {}


def write_config(run: Run) -> None:
    """config.json and tokenizer.model: with stage2.pt they are all that --ask needs."""
    o = run.options
    may_change = ["stage", "out", "device", "eval", "ask", "given"]  # from call to call
    config = {name: value for name, value in vars(o).items() if name not in may_change}
    config.update(labels=run.dataset.labels, model=asdict(run.model.config))
    o.out.mkdir(parents=True, exist_ok=True)
    write_file(o.out / "tokenizer.model", run.tokenizer.model)  # first: config.json stands for both
    write_file(o.out / "config.json", json.dumps(config, indent=2).encode())


# ---- The command line
def between(low: float, high: float, kind: type) -> dict:
    """Keywords for `add_argument`: the type and range of a number from low to high."""

    def parse(text: str) -> float:
        if not low <= kind(text) <= high:
            raise ValueError
        return kind(text)

    parse.__name__ = f"{kind.__name__} from {low} to {high}"  # argparse puts it into its message
    return {"type": parse, "metavar": f"{low}..{high}"}


def make_parser() -> ArgumentParser:
    parser = ArgumentParser("r2d.py", SUPPRESS, formatter_class=ArgumentDefaultsHelpFormatter)
    share, count = between(0, 1, float), between(1, 10**6, int)
    add = parser.add_argument_group("method").add_argument
    add("--stage", type=int, choices=[1, 2], default=2, help="the last stage to train")
    add("--method", choices=["r2d", "sft", "dss"], default="r2d", help="the paper's, or a baseline")
    add("--no-stage1", action="store_true", help="ablation: stage 2 alone")
    schedules = ["linear", "exponential", "inverse-sigmoid", "none"]
    add("--schedule", choices=schedules, default="linear", help="of P(predicted); none: gold only")
    add("--warmup", **share, default=0.05, help="share of stage 2 with P = 0 and alpha rising")
    add("--ramp", **share, default=0.6, help="then P rises over this share (linear: cap * ramp)")
    add("--cap", **share, default=0.9, help="P after the ramp")
    add("--alpha", **share, default=0.7, help="weight of the label loss after the warm-up")
    add = parser.add_argument_group("data").add_argument
    add("--data", default="triage", help="triage (simulated), a .csv or .jsonl file, or a folder")
    add("--override", **share, default=0.2, help="triage: calls decided against the rule")
    add("--notes", **count, default=1000, help="triage: training notes")
    add("--stage1-notes", **count, help="triage: notes whose rationales stage 1 has (as --notes)")
    add("--stage1-data", help="rationales for stage 1: a file with question,rationale")
    add("--rationales", choices=["llm", "nurse", "post"], default="llm", help="triage: by whom")
    add("--stage1-rationales", choices=data.VOICES, default="llm", help="reasons: name no label")
    add("--limit", **count, help="at most so many examples of each split, for trying")
    add("--max-source", **between(32, 4096, int), default=256, help="tokens of a prompt at most")
    add("--max-target", **between(2, 4096, int), default=128, help="tokens of a rationale at most")
    add("--vocab-size", **between(400, 10**5, int), default=1536, help="pieces of the tokenizer")
    add = parser.add_argument_group("model and training").add_argument
    add("--init", help="folder of a T5 or Flan-T5 checkpoint to start from; else:")
    add("--width", **count, default=96, help="of the model")
    add("--layers", **count, default=2, help="of the encoder, and of the decoder")
    add("--heads", **count, default=6, help="attention heads")
    add("--stage1-steps", **count, default=150, help="updates in stage 1")
    add("--stage2-steps", **count, default=220, help="updates in stage 2")
    add("--batch-size", **count, default=24, help="examples per update")
    add("--optimizer", choices=["muon", "adamw"], default="muon", help="adamw: as in the paper")
    add("--lr", **share, help="peak; muon 0.04, relative to the weights; adamw 0.001")
    add("--eval-every", **count, default=50, help="updates between two validations")
    add("--dropout", **share, default=0.0, help="dropout rate")
    add("--dtype", choices=["float32", "bfloat16"], default="float32", help="of matrix products")
    add = parser.add_argument_group("run").add_argument
    add("--out", type=Path, default="out", help="folder of the run")
    add("--seed", **between(0, 10**6, int), default=0, help="random seed")
    devices = dict.fromkeys(["auto", "cpu", ACCELERATOR])
    add("--device", choices=devices, default="auto", help="where to compute")
    add("--eval", action="store_true", help="evaluate without training")
    add("--ask", metavar="TEXT", help="predict and explain one note")
    add("--given", metavar="LABEL", help="with --ask: explain it under this label")
    return parser


def parse_args(arguments: list[str] | None) -> Namespace:
    """The options; a run in --out fixes its own. A wrong one ends the program with status 2."""
    parser = make_parser()
    o = parser.parse_args(arguments)
    saved = {name: value for name, value in read_config(o.out).items() if name in vars(o)}
    parser.set_defaults(**saved)
    o = parser.parse_args(arguments)
    for name, value in saved.items():
        if getattr(o, name) != value:
            parser.error(f"{name}: the run in {o.out} has {value}; change --out")
    if o.lr is None:
        o.lr = 0.04 if o.optimizer == "muon" else 0.001
    if o.device == "auto":
        o.device = ACCELERATOR
    if o.batch_size < WORLD:
        parser.error(f"{WORLD} processes need a batch of as many examples; start fewer")
    o.no_stage1 = o.no_stage1 or o.method != "r2d"  # the baselines have no stage 1
    if o.stage == 1 and (o.no_stage1 or o.eval):
        parser.error("--stage 1: is training, of --method r2d alone, without --no-stage1")
    if o.ask is not None and not o.ask.encode().strip():  # encode: raises if it is not UTF-8
        parser.error("--ask: the text is empty")
    if o.given is not None and (o.ask is None or o.method != "r2d"):
        parser.error("--given: needs --ask, and a run of --method r2d")
    return o


def setup(o: Namespace) -> Run:
    """Data, tokenizer and untrained model of a run. Raises InputError; writes nothing."""
    config = read_config(o.out)
    if o.ask is None:
        dataset = data.load_data(o)
        if o.method != "sft" and not any(columns(dataset.train)[2]):
            raise InputError(f"{o.data}: no rationales in train; use --method sft")
        if not o.no_stage1 and not (dataset.stage1_train and dataset.stage1_val):
            raise InputError(f"{o.stage1_data or o.data}: no rationales for stage 1 (--no-stage1)")
    else:
        dataset = Dataset(config.get("labels", []))  # the folder of the run is enough
    questions, _, rationales = columns(dataset.train + dataset.stage1_train)
    torch.manual_seed(o.seed)
    if o.init and o.ask is None:
        folder = Path(o.init)
        tokenizer = Tokenizer.load(folder / "spiece.model")
        with reading(folder, "needs config.json and model.safetensors in full (git lfs pull)"):
            model = load_t5(folder, o.dropout)
        if tokenizer.n_pieces > model.config.vocab_size:
            raise InputError(f"{o.init}: spiece.model has more pieces than the model; give its own")
    else:
        if config:
            tokenizer = Tokenizer.load(o.out / "tokenizer.model")
        else:
            words = [f"predict: given label: {label}, explain:" for label in dataset.labels]
            tokenizer = Tokenizer.train([*words, *questions, *rationales], o.vocab_size)
        shape = {"d_model": o.width, "d_kv": math.ceil(o.width / o.heads), "d_ff": 4 * o.width}
        shape |= {"vocab_size": tokenizer.n_pieces, "num_heads": o.heads, "dropout": o.dropout}
        shape |= {"num_layers": o.layers, "num_decoder_layers": o.layers}
        model = Transformer(ModelConfig(**config.get("model", shape)))
    label_tokens = tokenizer.longest_label(dataset.labels, min(o.max_target, o.max_source // 2))
    return Run(o, dataset, tokenizer, model.to(o.device), label_tokens)


def ask(run: Run) -> None:
    """Predict a label for the note in --ask, or take that of --given, and explain it."""
    o = run.options
    if o.given not in [None, *run.dataset.labels]:
        raise InputError(f"--given {o.given}: the labels are {', '.join(run.dataset.labels)}")
    label = o.given or predict_labels(run, [o.ask])[0]
    print(f"label      {label}")
    if o.method != "sft":
        prompts = explain_prompts(run, [label], [o.ask])
        print(f"rationale  {generate_texts(run, prompts, o.max_target)[0]}")


def run_command(o: Namespace) -> None:
    """Answer --ask, evaluate, or train and evaluate what is not done yet."""
    done = set(os.listdir(o.out)) if o.out.is_dir() else set()
    if o.ask is not None and "stage2.pt" not in done:
        raise InputError(f"{o.out}/stage2.pt: is not there; train first, or give another --out")
    finished = {"stage1.pt"} if o.stage == 1 else {"stage2.pt", "metrics.json"}
    if finished <= done and o.ask is None and not o.eval:
        print(f"{o.out}: this run is finished; for a new one give another --out")
        return
    run = setup(o)
    bfloat16 = o.dtype == "bfloat16"  # without a cache, which would keep old weights
    with torch.autocast(o.device, torch.bfloat16, enabled=bfloat16, cache_enabled=False):
        as_it_is = o.init and done.isdisjoint({"stage2.pt", "last.pt"})  # --eval of a T5
        if (o.eval and not as_it_is) or o.ask is not None:
            load(run, "stage2.pt")
        if o.ask is not None:
            return ask(run)
        if RANK == 0:
            write_config(run)
            (o.out / "metrics.json").unlink(missing_ok=True)  # perhaps of other weights
            print(data.look(run.dataset, run.tokenizer, o.max_source, o.max_target))
        if not o.eval and not o.no_stage1:
            train(run, 1, run.dataset.stage1_train, o.stage1_steps, stage1_loss, 0, patience=3)
        if not o.eval and o.stage == 2:
            # From the end of the ramp on; 0.65 for all methods alike. The authors: from 0 on.
            since = o.stage2_steps * min(1, max(0.65, o.warmup + o.ramp))
            train(run, 2, run.dataset.train, o.stage2_steps, stage2_loss, since, patience=5)
        if RANK == 0 and o.stage == 2:
            evaluate(run)


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit status: 0 done, 2 bad input, 130 stopped by Ctrl-C."""
    try:
        if WORLD > 1:
            dist.init_process_group()
        if torch.cuda.is_available():
            torch.cuda.set_device(RANK % torch.cuda.device_count())
        run_command(parse_args(arguments))
        return 0
    except (InputError, OSError, UnicodeError) as error:
        print("r2d.py:", " ".join(str(error).split()), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("r2d.py: stopped; give the same command to go on", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")  # a screen that lacks a letter must not end a run
    sys.exit(main())
