"""Reason2Decide from scratch: learn to explain, then to predict and explain (arXiv 2512.20074).

    python r2d.py --stage 2                  everything: stage 1, stage 2, evaluation, table
    python r2d.py --method sft --out sft     a baseline; python r2d.py -h lists all options

In the paper's order; files and options come last. For study, not for patients.
"""

import argparse
import copy
import hashlib
import json
import math
import os
import random
import statistics
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

import data
import metrics
from data import Dataset, Example, InputError, Tokenizer, columns, reading, with_prefix, write_file
from model import ModelConfig, Transformer, load_t5

# torchrun starts WORLD processes, each with a RANK; rank 0 alone validates, tests and writes.
RANK = int(os.environ.get("RANK", 0))
WORLD = int(os.environ.get("WORLD_SIZE", 1))
DECODE_BATCH = 128  # prompts decoded, or scored without gradients, together


@dataclass
class Run:
    """What all parts of a run share."""

    options: argparse.Namespace
    dataset: Dataset
    tokenizer: Tokenizer
    model: Transformer
    device: str
    label_tokens: int  # of the longest label


# ---- Prompts and greedy decoding (paper, section 3): first the label, then the rationale
def explain_prompts(run: Run, labels: list[str], questions: list[str]) -> list[str]:
    """Prompts that show a label. In DSS the explanation never sees one."""
    if run.options.method == "dss":
        return with_prefix("explain:", questions)
    pairs = zip(labels, questions, strict=True)
    return [f"given label: {label}, explain: {question}" for label, question in pairs]


def decode(run: Run, prompts: list[str], max_new_tokens: int) -> list[str]:
    """What the model writes after each prompt, greedily; `generate` itself turns dropout off."""
    texts = []
    for start in range(0, len(prompts), DECODE_BATCH):
        batch = prompts[start : start + DECODE_BATCH]
        input_ids = run.tokenizer.encode(batch, run.options.max_source).to(run.device)
        rows = run.model.generate(input_ids, max_new_tokens).tolist()
        texts += map(run.tokenizer.decode, rows)
    return texts


def predict_labels(run: Run, questions: list[str]) -> list[str]:
    """The predicted labels. An output that is no label stays as it is."""
    return decode(run, with_prefix("predict:", questions), run.label_tokens)


# ---- Stage 1: rationales alone
def target_nats(run: Run, prompts: list[str], targets: list[str]) -> tuple[Tensor, Tensor]:
    """Cross-entropy in nats of each target after its prompt, and its tokens: (B,), (B,)."""
    input_ids = run.tokenizer.encode(prompts, run.options.max_source).to(run.device)
    target_ids = run.tokenizer.encode(targets, run.options.max_target).to(run.device)
    return run.model.nll(input_ids, target_ids).sum(1), target_ids.count_nonzero(1)  # 0 is padding


def token_loss(run: Run, prompts: list[str], targets: list[str]) -> Tensor:
    """This process's share of the mean over all target tokens: the shares add up to it."""
    nats, tokens = target_nats(run, prompts, targets)
    n_tokens = tokens.sum()
    if WORLD > 1:
        dist.all_reduce(n_tokens)
    return nats.sum() / n_tokens.clamp(min=1)  # an empty rationale has none, not even the end


def stage1_loss(run: Run, batch: list[Example]) -> tuple[Tensor, dict]:
    """explain: {question} -> rationale. Returns the loss, and values for log.jsonl."""
    questions, _, rationales = columns(batch)
    loss = token_loss(run, with_prefix("explain:", questions), rationales)
    return loss, {"loss": loss.item(), "loss_explain": loss.item()}


# ---- Schedules: pure functions of the update
def p_predicted(
    step: int, steps: int, schedule: str, warmup: float, ramp: float, cap: float
) -> float:
    """P(the label in the explain prompt is the predicted one) at update `step` of `steps`.

    Bengio et al. (2015, section 2.4) write epsilon = 1 - P. P is 0 during the warm-up; then, i
    updates into a ramp of n = ramp * steps:
        linear           P = min(cap, i / n), which is at the cap from cap * n on (authors' code)
        exponential      epsilon = k^i, with the k that reaches the cap at n
        inverse-sigmoid  epsilon = k / (k + e^(i/k)), likewise; P starts a little above 0
    """
    i = step - warmup * steps
    n = ramp * steps
    if schedule == "none" or cap == 0 or i < 0:  # none: gold labels only
        return 0.0
    if i >= n:
        return cap
    if schedule == "linear":
        return min(cap, i / n)
    end = min(cap, 1 - 1e-6)  # the two curves come close to 1 and never reach it
    if schedule == "exponential":
        k = (1 - end) ** (1 / n)
        return 1 - k**i
    k = inverse_sigmoid_k(n, end)
    return 1 / (1 + k * math.exp(-i / k))  # = 1 - k / (k + e^(i/k)), without overflow


def inverse_sigmoid_k(n: float, p: float) -> float:
    """The k that gives P = p after n updates: its log odds, n/k - ln(k), fall with k. Bisection."""
    low, high = 1e-9 * n, 1e9 * n
    for _ in range(200):
        k = math.sqrt(low * high)
        if n / k - math.log(k) > math.log(p / (1 - p)):
            low = k
        else:
            high = k
    return k


def alpha_at(step: int, steps: int, warmup: float, alpha: float) -> float:
    """Weight of the label loss: from 0 linearly to `alpha` over the warm-up, then constant."""
    return alpha if step >= warmup * steps else alpha * step / (warmup * steps)


def flip_coins(n: int, p: float, generator: torch.Generator) -> list[bool]:
    """One coin per example, True with probability p, from a generator that nothing else uses."""
    return (torch.rand(n, generator=generator) < p).tolist()


# ---- Stage 2: label and rationale, with scheduled sampling of the label in the prompt
def mix_labels(run: Run, batch: list[Example], coins: list[bool]) -> tuple[list[str], dict]:
    """The labels for the explain prompts: predicted where the coin is True, else gold.

    The authors' code predicts all, with dropout on, and takes invalid labels, too. Returns counts
    for log.jsonl as well: `wrong_predicted`, prompts with a wrong label, is the dose.
    """
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


def stage2_loss(
    run: Run, batch: list[Example], coins: list[bool], alpha: float
) -> tuple[Tensor, dict]:
    """L = alpha * L_predict + (1 - alpha) * L_explain, and values for log.jsonl."""
    questions, gold, rationales = columns(batch)
    labels, log = mix_labels(run, batch, coins)
    loss_predict = token_loss(run, with_prefix("predict:", questions), gold)
    log.update(loss=loss_predict.item(), loss_predict=loss_predict.item())
    if run.options.method == "sft":  # which explains nothing
        return loss_predict, log
    loss_explain = token_loss(run, explain_prompts(run, labels, questions), rationales)
    loss = alpha * loss_predict + (1 - alpha) * loss_explain
    log.update(loss=loss.item(), loss_explain=loss_explain.item())
    return loss, log


# ---- Training: one loop for both stages and all methods
def orthogonal(matrix: Tensor) -> Tensor:
    """The matrix, its singular values moved near 1 by Newton-Schulz steps with Muon's numbers."""
    wide = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    x = wide / wide.norm().clamp(min=1e-30)
    for _ in range(3):  # Muon has 5; more did not help
        gram = x @ x.T
        x = 3.4445 * x + (2.0315 * gram @ gram - 4.775 * gram) @ x
    return x if wide is matrix else x.T


@torch.no_grad()
def optimize(model: Transformer, state: dict[str, tuple], lr: float) -> None:
    """Muon (Jordan et al. 2024) in the layers, Adam (arXiv 1412.6980) for embeddings and norms.

    Muon makes the mean gradient orthogonal: what is rare is learned as fast as what is frequent.
    Rates are relative to the size (RMS) of a weight when the stage begins, as in T5's own
    optimiser (Adafactor, arXiv 1804.04235): in T5 sizes differ a hundredfold.
    """
    for name, weight in model.named_parameters():
        if name not in state:
            least = 3.0 if "bias" in name else 1e-3  # position biases begin near 0, but are logits
            size = weight.square().mean().sqrt().clamp(min=least)
            state[name] = (size, torch.zeros_like(weight), torch.zeros_like(weight))
        size, mean, square = state[name]
        mean.lerp_(weight.grad, 0.2)  # 0.8 of the mean and 0.2 of the gradient
        if weight.ndim == 2 and name.startswith(("encoder.", "decoder.")):
            direction = orthogonal(mean) * max(weight.shape) ** 0.5  # its RMS is then 1
        else:
            square.lerp_(weight.grad.square(), 0.05)  # no bias correction: there is a warm-up
            direction = mean / (square.sqrt() + 1e-8)
        weight -= lr * size * direction


def lr_at(step: int, steps: int, lr: float) -> float:
    """Learning rate: up linearly over the first tenth of the updates, then down linearly to 0."""
    rising = (step + 1) / max(0.1 * steps, 1)  # not in the paper; without it stage 1 is undone
    falling = (steps - step) / max(0.9 * steps, 1)
    return lr * min(1.0, rising, falling)


def sum_over_processes(run: Run, log: dict) -> None:
    """Add up the gradients of all processes, and the losses and counts for the log."""
    for weight in run.model.parameters():
        dist.all_reduce(weight.grad)
    for key, value in log.items():
        total = torch.tensor(value, device=run.device)
        dist.all_reduce(total)
        log[key] = total.item()


@torch.no_grad()
def rationale_nats(run: Run, prompts: list[str], rationales: list[str]) -> tuple[list, list]:
    """Nats of each gold rationale after its prompt, and its number of tokens."""
    nats, tokens = [], []
    for start in range(0, len(prompts), DECODE_BATCH):
        rows = slice(start, start + DECODE_BATCH)
        more_nats, more_tokens = target_nats(run, prompts[rows], rationales[rows])
        nats += more_nats.tolist()
        tokens += more_tokens.tolist()
    return nats, tokens


def validate(run: Run, stage: int) -> dict[str, float]:
    """Scores on the validation split: rank 0 computes them, all processes get them."""
    run.model.eval()
    scores = [{}]  # a list, for broadcast to fill
    if RANK == 0 and stage == 1:
        questions, _, rationales = columns(run.dataset.stage1_val)
        nats, tokens = rationale_nats(run, with_prefix("explain:", questions), rationales)
        scores[0]["val_loss"] = sum(nats) / max(sum(tokens), 1)
    elif RANK == 0:
        questions, gold, _ = columns(run.dataset.val)
        predicted = predict_labels(run, questions)
        scores[0]["val_macro_f1"] = metrics.macro_f1(gold, predicted, run.dataset.labels)
    run.model.train()
    if WORLD > 1:
        dist.broadcast_object_list(scores)
    return scores[0]


def train(run: Run, stage: int) -> None:
    """One stage: from the last save, or the weights in the model, to its best checkpoint.

    Best: in stage 1 the lowest validation loss, in stage 2 the highest macro-F1, but only after
    the ramp and 65 % of the updates: the authors may choose weights that never saw own labels.
    """
    o = run.options
    examples, steps, patience, select_from = run.dataset.stage1_train, o.stage1_steps, 3, 0
    if stage == 2:
        examples, steps, patience = run.dataset.train, o.stage2_steps, 5
        select_from = steps * min(1, max(0.65, o.warmup + o.ramp))
    progress = SimpleNamespace(stage=stage, step=0, log=[], optimizer={}, bad_evals=0)
    progress.best_score, progress.best_weights = -math.inf, {}
    if (o.out / "last.pt").exists():
        load(run, progress)
    lengths = [len(example.question) for example in examples]
    batches = []  # of all updates
    while len(batches) < steps:
        batches += data.batch_order(lengths, o.batch_size, o.seed, epoch=len(batches))
    run.model.train()
    for step in tqdm(range(progress.step, steps), f"stage {stage}", disable=RANK > 0 or None):
        if progress.bad_evals == patience:
            break
        batch = [examples[i] for i in batches[step]]
        seed = 10**12 * o.seed + 10**5 * step  # of this update: a resumed run draws the same
        torch.manual_seed(seed + RANK)  # for dropout
        if stage == 1:
            schedule = {}
            loss, log = stage1_loss(run, batch[RANK::WORLD])  # the rows of this process
        else:
            alpha, p = o.alpha, 0.0
            if o.method == "r2d":
                alpha = alpha_at(step, steps, o.warmup, o.alpha)
                p = p_predicted(step, steps, o.schedule, o.warmup, o.ramp, o.cap)
            schedule = {"alpha": alpha, "p_predicted": p}
            coins = flip_coins(len(batch), p, torch.Generator().manual_seed(seed + 99999))
            loss, log = stage2_loss(run, batch[RANK::WORLD], coins[RANK::WORLD], alpha)
        run.model.zero_grad()
        loss.backward()
        if WORLD > 1:
            sum_over_processes(run, log)
        grad_norm = torch.nn.utils.clip_grad_norm_(run.model.parameters(), 1.0).item()
        if not math.isfinite(grad_norm):
            raise InputError(f"update {step}: infinite gradients; lower --lr and change --out")
        lr = lr_at(step, steps, o.lr)
        optimize(run.model, progress.optimizer, lr)
        progress.step = step + 1
        line = {"stage": stage, "step": step, **schedule, **log, "lr": lr, "grad_norm": grad_norm}
        progress.log.append(line)
        if progress.step % o.eval_every == 0 or progress.step == steps:
            line.update(validate(run, stage))
            score = -line["val_loss"] if stage == 1 else line["val_macro_f1"]
            if progress.step >= select_from and score > progress.best_score:
                progress.best_score = score
                progress.best_weights = copy.deepcopy(run.model.state_dict())
                progress.bad_evals = 0
            elif progress.step >= select_from:
                progress.bad_evals += 1  # in a row
            if RANK == 0:
                save(run, progress)
    run.model.load_state_dict(progress.best_weights)
    if RANK == 0:
        checkpoint = {"config": asdict(run.model.config), "weights": progress.best_weights}
        data.write_checkpoint(o.out / f"stage{stage}.pt", checkpoint)


# ---- The test: the same notes explained under the gold, the predicted and a flipped label
def test_rows(run: Run) -> list[dict]:
    """One row per test example, with every fact that the scores need: predictions.jsonl."""
    questions, _, rationales = columns(run.dataset.test)
    predicted = predict_labels(run, questions)
    conditions = {"r2d": ["gold", "predicted", "flipped"], "dss": ["predicted"], "sft": []}
    majority = statistics.mode(columns(run.dataset.train)[1])
    rng = random.Random(run.options.seed)
    rows = []
    for i, example in enumerate(run.dataset.test):
        wrong = [label for label in run.dataset.labels if label != example.label]
        row = {**vars(example), "predicted_label": predicted[i], "flipped_label": rng.choice(wrong)}
        row["majority_label"] = majority
        if run.dataset.ceiling:  # on triage: the answers of who knows the rule
            row["ceiling_label"] = run.dataset.ceiling[i].label
        if run.dataset.ceiling and run.options.method != "sft":
            row["rationale_given_ceiling"] = run.dataset.ceiling[i].rationale
            row["rationale_given_ceiling_gold"] = run.dataset.ceiling_gold[i].rationale
        rows.append(row)
    for condition in conditions[run.options.method]:  # the prompts of DSS hold no label
        labels = [row[metrics.CONDITIONS[condition]] for row in rows]  # CONDITIONS has the key
        prompts = explain_prompts(run, labels, questions)
        texts = decode(run, prompts, run.options.max_target)
        nats, tokens = rationale_nats(run, prompts, rationales)
        for i, row in enumerate(rows):
            row["tokens"] = tokens[i]
            row[f"nats_given_{condition}"] = nats[i]
            row[f"rationale_given_{condition}"] = texts[i]
    add_verdicts(run, rows)
    return rows


def add_verdicts(run: Run, rows: list[dict]) -> None:
    """The label each text argues for: the checker's on triage, elsewhere the reader's."""
    _, gold, rationales = columns(run.dataset.train)
    reader = metrics.Reader(rationales, gold, run.dataset.labels)
    for row in rows:
        row["reader_label"] = reader(row["rationale"])
        for condition in metrics.CONDITIONS:
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
def save(run: Run, progress: SimpleNamespace) -> None:
    """The log so far, in log.jsonl; then all that `load` needs, in last.pt."""
    lines = [json.dumps(line) + "\n" for line in progress.log]
    write_file(run.options.out / "log.jsonl", "".join(lines).encode())
    state = {"progress": vars(progress), "weights": run.model.state_dict()}
    data.write_checkpoint(run.options.out / "last.pt", state)


def load(run: Run, progress: SimpleNamespace) -> None:
    """Put the last save back in place; of a save of stage 1, stage 2 takes the log alone."""
    path = run.options.out / "last.pt"
    with reading(path):
        state = torch.load(path, map_location=run.device, weights_only=True)
        progress.log = state["progress"]["log"]
        if state["progress"]["stage"] == progress.stage:
            vars(progress).update(state["progress"])
            run.model.load_state_dict(state["weights"])


def load_weights(run: Run, stage: int) -> None:
    """The best weights of a stage, from its checkpoint."""
    path = run.options.out / f"stage{stage}.pt"
    with reading(path):
        checkpoint = torch.load(path, map_location=run.device, weights_only=True)
        run.model.load_state_dict(checkpoint["weights"])


# ---- The command line
def make_parser() -> argparse.ArgumentParser:
    formatter = argparse.ArgumentDefaultsHelpFormatter
    parser = argparse.ArgumentParser("r2d.py", usage=argparse.SUPPRESS, formatter_class=formatter)
    add = parser.add_argument_group("method").add_argument
    add("--stage", type=int, choices=[1, 2], default=2, help="1: stop after stage 1")
    add("--method", choices=["r2d", "sft", "dss"], default="r2d", help="the paper's, or a baseline")
    add("--no-stage1", action="store_true", help="ablation: stage 2 alone")
    schedules = ["linear", "exponential", "inverse-sigmoid", "none"]
    add("--schedule", choices=schedules, default="linear", help="of P; none: gold only")
    add("--warmup", type=float, default=0.05, help="share of stage 2 with P = 0 and alpha rising")
    add("--ramp", type=float, default=0.6, help="share in which P then rises to the cap")
    add("--cap", type=float, default=0.9, help="P after the ramp")
    add("--alpha", type=float, default=0.7, help="weight of the label loss after the warm-up")
    add = parser.add_argument_group("data").add_argument
    add("--data", default="triage", help="triage (simulated), a file or a folder")
    add("--override", type=float, default=0.2, help="triage: calls decided against the rule")
    add("--notes", type=int, default=20000, help="triage: training notes")
    voices = ["llm", "nurse", "post"]
    add("--rationales", choices=voices, default="llm", help="triage: whose rationales are learned")
    add("--stage1-rationales", choices=voices, default="llm", help="triage: the same in stage 1")
    add("--limit", type=int, help="at most so many examples of a split")
    add("--max-source", type=int, default=256, help="tokens of a prompt at most")
    add("--max-target", type=int, default=128, help="tokens of a rationale at most")
    add("--vocab-size", type=int, default=1536, help="pieces of the tokenizer")
    add = parser.add_argument_group("model and training").add_argument
    add("--init", help="folder of a T5 or Flan-T5 checkpoint to start from; else:")
    add("--width", type=int, default=96, help="of the model")
    add("--layers", type=int, default=2, help="of the encoder, and of the decoder")
    add("--heads", type=int, default=6, help="attention heads")
    add("--stage1-steps", type=int, default=30, help="updates in stage 1")
    add("--stage2-steps", type=int, default=290, help="updates in stage 2")
    add("--batch-size", type=int, default=24, help="examples per update")
    add("--lr", type=float, default=0.04, help="peak, relative to weights; give 0.001 with --init")
    add("--eval-every", type=int, default=100, help="updates between two validations")
    add("--dropout", type=float, default=0.0, help="dropout rate")
    add("--dtype", choices=["float32", "bfloat16"], default="float32", help="of matrix products")
    add = parser.add_argument_group("run").add_argument
    add("--out", type=Path, default="out", help="folder of the run")
    add("--seed", type=int, default=0, help="of all chance")
    add("--device", choices=["auto", "cpu", "cuda", "mps"], default="auto", help="where to compute")
    add("--eval", action="store_true", help="evaluate without training")
    add("--ask", metavar="TEXT", help="predict and explain one note")
    return parser


def parse_args(arguments: list[str] | None) -> argparse.Namespace:
    """The options; a run in --out fixes its own. A wrong one ends the program with status 2."""
    parser = make_parser()
    o = parser.parse_args(arguments)
    path = o.out / "config.json"
    if path.exists():
        with reading(path):
            saved = json.loads(path.read_text(encoding="utf-8"))
            parser.set_defaults(**saved)  # labels, model and data_sha256 among them
        o = parser.parse_args(arguments)
        for name, value in saved.items():
            if getattr(o, name) != value:
                parser.error(f"{name}: the run in {o.out} has {value}; change --out")
    limits = {"seed": (0, 10**6), "max_source": (32, 4096), "max_target": (2, 4096)}
    limits["vocab_size"] = (400, 10**5)
    for name, value in vars(o).items():
        low, high = limits.get(name, (0, 1) if type(value) is float else (1, 10**6))
        if type(value) in (int, float) and not low <= value <= high:
            parser.error(f"{name} {value}: must be between {low} and {high}")
    if o.stage == 1 and (o.method != "r2d" or o.no_stage1 or o.eval):
        parser.error("--stage 1: is training, of --method r2d alone, without --no-stage1")
    if o.ask is not None and not o.ask.encode().strip():  # encode: raises if it is not UTF-8
        parser.error("--ask: the text is empty")
    return o


def setup(o: argparse.Namespace) -> Run:
    """Data, tokenizer and untrained model of a run. Raises InputError; writes nothing."""
    accelerator = str(torch.accelerator.current_accelerator(check_available=True) or "cpu")
    device = accelerator if o.device == "auto" else o.device
    if device not in ("cpu", accelerator):
        raise InputError(f"--device {device}: this machine has none; use --device cpu")
    if device == "cuda":
        torch.cuda.set_device(RANK % torch.cuda.device_count())
    both_voices = (o.rationales, o.stage1_rationales)
    dataset = data.load_data(o.data, o.seed, o.limit, o.notes, o.override, *both_voices)
    questions, _, rationales = columns(dataset.train + dataset.stage1_train)
    if not any(rationales) and o.method != "sft":
        raise InputError(f"{o.data}: train has no rationales; use --method sft")
    torch.manual_seed(o.seed)
    if o.init:
        tokenizer = Tokenizer.load(Path(o.init) / "spiece.model")
        with reading(Path(o.init)):
            model = load_t5(Path(o.init), o.dropout)
    else:
        if (o.out / "tokenizer.model").exists():
            tokenizer = Tokenizer.load(o.out / "tokenizer.model")
        else:
            prefixes = [f"predict: given label: {label}, explain:" for label in dataset.labels]
            tokenizer = Tokenizer.train([*prefixes, *questions, *rationales], o.vocab_size)
        shape = (o.width, o.heads, math.ceil(o.width / o.heads), 4 * o.width, o.layers, o.layers)
        model = Transformer(ModelConfig(len(tokenizer), *shape, o.dropout))
    label_tokens = tokenizer.longest(dataset.labels, min(o.max_target, o.max_source // 2))
    return Run(o, dataset, tokenizer, model.to(device), device, label_tokens)


def write_config(run: Run) -> None:
    """Print the sizes of the data; write config.json and tokenizer.model."""
    o = run.options
    config = {**vars(o), "labels": run.dataset.labels, "model": asdict(run.model.config)}
    config["data_sha256"] = hashlib.sha256(repr(run.dataset).encode()).hexdigest()
    if getattr(o, "data_sha256", config["data_sha256"]) != config["data_sha256"]:
        raise InputError(f"{o.data}: other data than the run in {o.out} has; change --out")
    if RANK > 0:
        return
    questions, labels, _ = columns(run.dataset.test)
    ids = run.tokenizer.encode(explain_prompts(run, labels, questions), o.max_source)
    full = int(ids[:, o.max_source - 1 :].count_nonzero())  # whose last place is filled
    sizes = f"{len(run.dataset.train)} train, {len(run.dataset.val)} val, {len(ids)} test examples"
    print(f"{o.data}: {sizes}; {full} of test fill --max-source and may be cut")
    for name in ["stage", "out", "device", "eval", "ask"]:  # these may change from call to call
        del config[name]
    o.out.mkdir(parents=True, exist_ok=True)
    write_file(o.out / "config.json", json.dumps(config, indent=2).encode())
    write_file(o.out / "tokenizer.model", run.tokenizer.model)


def run_command(o: argparse.Namespace) -> None:
    """Answer --ask, evaluate, or train and evaluate what is not done yet."""
    files = ["stage1.pt"] if o.stage == 1 else ["stage2.pt", "metrics.json"]
    if all((o.out / file).exists() for file in files) and o.ask is None and not o.eval:
        print(f"{o.out}: this run is finished; for a new one give another --out")
        return
    run = setup(o)
    as_is = o.eval and o.init and not (o.out / "last.pt").exists()  # a T5 without training
    if (o.eval or o.ask) and not as_is:
        load_weights(run, 2)
    bfloat16 = o.dtype == "bfloat16"  # without a cache, which would keep old weights
    with torch.autocast(run.device, torch.bfloat16, enabled=bfloat16, cache_enabled=False):
        if o.ask:
            label = predict_labels(run, [o.ask])[0]
            prompts = explain_prompts(run, [label], [o.ask])
            print(f"label      {label}")
            if o.method != "sft":
                print(f"rationale  {decode(run, prompts, o.max_target)[0]}")
            return
        write_config(run)
        stages = [] if o.eval else [1, 2][: o.stage]
        if o.no_stage1 or o.method != "r2d":
            stages = stages[1:]
        for stage in stages:
            if (o.out / f"stage{stage}.pt").exists():
                load_weights(run, stage)
            else:
                train(run, stage)
        if o.stage == 2 and RANK == 0:
            evaluate(run)


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit status: 0 done, 1 lost a process, 2 bad input, 130 stopped by Ctrl-C."""
    try:
        if WORLD > 1:
            dist.init_process_group()
        run_command(parse_args(arguments))
        return 0
    except (InputError, OSError, UnicodeError) as e:  # of text that the screen cannot show, too
        print(f"r2d.py: {e}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("r2d.py: stopped; give the same command to go on", file=sys.stderr)
        return 130
    except RuntimeError as e:
        if WORLD == 1:
            raise
        print(f"r2d.py: lost a process ({str(e)[:60]}); start again to go on", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
