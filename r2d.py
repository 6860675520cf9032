"""Reason2Decide from scratch: learn to explain, then to predict and explain (arXiv 2512.20074).

    python r2d.py --stage 2                  everything: stage 1, stage 2, evaluation, table
    python r2d.py --method sft --out sft     a baseline; python r2d.py -h lists all options
    python r2d.py --ask "A 52-year-old man with chest pain for 2 days. It is severe."

The file follows the paper: prompts, stage 1, schedules, stage 2, the training loop, the test under
three labels. Files and options come last. For study, not for patients.
"""

import argparse
import contextlib
import copy
import hashlib
import io
import json
import math
import os
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

import data
import metrics
from data import EXPLAIN, EXPLAIN_GIVEN, PREDICT, Dataset, Example, InputError, Prompts, Tokenizer
from model import ModelConfig, Transformer, load_t5

# torchrun starts WORLD processes, each with a RANK. Rank 0 alone validates, tests and writes.
RANK = int(os.environ.get("RANK", 0))
WORLD = int(os.environ.get("WORLD_SIZE", 1))
EVAL_BATCH = 64  # prompts decoded or scored together


@dataclass
class Run:
    """What all parts of a run share."""

    options: argparse.Namespace
    data: Dataset
    prompts: Prompts
    model: Transformer
    device: str


# ---- Prompts and greedy decoding (paper, section 3): first the label, then the rationale --------
def explain_sources(run: Run, questions: list[str], labels: list[str]) -> list[list[int]]:
    """The explain prompts of stage 2, as token ids. In DSS the explanation never sees a label."""
    sources = []
    for question, label in zip(questions, labels, strict=True):
        prefix = EXPLAIN_GIVEN.format(label=label)
        if run.options.method == "dss":
            prefix = EXPLAIN
        sources.append(run.prompts.source(prefix, question))
    return sources


def decode(run: Run, sources: list[list[int]], max_new_tokens: int) -> list[str]:
    """Greedy decoding, one text per prompt."""
    texts = []
    for start in range(0, len(sources), EVAL_BATCH):
        batch = data.pad(sources[start : start + EVAL_BATCH], run.device)
        for ids in run.model.generate(batch, max_new_tokens).tolist():  # always in eval mode
            texts.append(run.prompts.tokenizer.decode(ids))
    return texts


def predict_labels(run: Run, questions: list[str]) -> list[str]:
    """The predicted labels, as text. An output that is no label stays as it is."""
    sources = [run.prompts.source(PREDICT, question) for question in questions]
    longest = max(len(run.prompts.target(label)) for label in run.data.labels)
    return decode(run, sources, longest)


# ---- Stage 1: rationales alone ------------------------------------------------------------------
def token_loss(run: Run, sources: list[list[int]], targets: list[list[int]]) -> Tensor:
    """Cross-entropy in nats, the mean over the target tokens of the batch; padding counts nothing.

    Under torchrun a process has some rows of the batch, but divides by the tokens of all: so the
    losses of all processes, and their gradients, add up to those of the batch.
    """
    tokens = torch.tensor(sum(len(target) for target in targets), device=run.device)
    if WORLD > 1:
        dist.all_reduce(tokens)
    nats = run.model.nll(data.pad(sources, run.device), data.pad(targets, run.device))  # (B, T)
    return nats.sum() / tokens.clamp(min=1)


def stage1_loss(run: Run, batch: list[Example]) -> tuple[Tensor, dict]:
    """explain: {question} -> rationale. Returns the loss and what the log says of it."""
    sources = [run.prompts.source(EXPLAIN, example.question) for example in batch]
    targets = [run.prompts.target(example.rationale) for example in batch]
    loss = token_loss(run, sources, targets)
    return loss, {"loss": loss.item(), "loss_explain": loss.item()}


# ---- Schedules: pure functions of the update ----------------------------------------------------
def p_predicted(
    step: int, steps: int, schedule: str, warmup: float, ramp: float, cap: float
) -> float:
    """P(the label in the explain prompt is the predicted one) at update `step` of `steps`.

    Bengio et al. (2015, section 2.4) write epsilon = 1 - P. P is 0 during the warm-up. Then, i
    updates into a ramp of n = ramp * steps:
        linear:          P = min(cap, i / n), so the cap is reached at cap * n   (the paper's code)
        exponential:     epsilon = k^i, with the k that reaches the cap at n
        inverse-sigmoid: epsilon = k / (k + e^(i/k)), likewise; it starts a little below 1
    After the ramp P is the cap. The schedule `none` has P = 0 throughout: gold labels only.
    """
    i = step - warmup * steps
    n = ramp * steps
    if schedule == "none" or cap == 0 or i < 0:
        return 0.0
    if i >= n:
        return cap
    if schedule == "linear":
        return min(cap, i / n)
    reached = min(cap, 1 - 1e-6)  # the two curves come close to 1 and never reach it
    if schedule == "exponential":
        k = (1 - reached) ** (1 / n)
        return 1 - k**i
    k = inverse_sigmoid_k(n, reached)
    return 1 / (1 + k * math.exp(-i / k))  # = 1 - k / (k + e^(i/k)), without overflow


def inverse_sigmoid_k(n: float, p: float) -> float:
    """The k with which the inverse sigmoid has P = p after n updates.

    P's log odds at n are n/k - ln(k). They fall as k grows, so bisection (of ln k) finds k.
    """
    low = 1e-9 * n
    high = 1e9 * n
    for _ in range(200):
        k = math.sqrt(low * high)
        if n / k - math.log(k) > math.log(p / (1 - p)):
            low = k
        else:
            high = k
    return k


def alpha_at(step: int, steps: int, warmup: float, alpha: float) -> float:
    """Weight of the label loss: from 0 linearly to `alpha` over the warm-up, then constant."""
    if step >= warmup * steps:
        return alpha
    return alpha * step / (warmup * steps)


def flip_coins(n: int, p: float, generator: torch.Generator) -> list[bool]:
    """One coin per example, True with probability p, from a generator that nothing else uses."""
    return (torch.rand(n, generator=generator) < p).tolist()


# ---- Stage 2: label and rationale, with scheduled sampling of the label in the prompt -----------
def mix_labels(run: Run, batch: list[Example], coins: list[bool]) -> tuple[list[str], dict]:
    """The labels for the explain prompts: predicted where the coin is True, else gold.

    Predicts for these examples alone; the authors' code predicts for all, with dropout on. An
    invalid output never enters a training prompt: gold stays there. The counts are for the log;
    `wrong_predicted` is the dose: prompts that held a wrong predicted label.
    """
    labels = [example.label for example in batch]
    counts = {"used_predicted": 0, "wrong_predicted": 0, "invalid_predicted": 0}
    chosen = [i for i, coin in enumerate(coins) if coin]
    predicted = predict_labels(run, [batch[i].question for i in chosen])
    for i, label in zip(chosen, predicted, strict=True):
        if label not in run.data.labels:
            counts["invalid_predicted"] += 1
            continue
        counts["used_predicted"] += 1
        if label != batch[i].label:
            counts["wrong_predicted"] += 1
        labels[i] = label
    return labels, counts


def stage2_loss(
    run: Run, batch: list[Example], coins: list[bool], alpha: float
) -> tuple[Tensor, dict]:
    """L = alpha * L_predict + (1 - alpha) * L_explain; returns it and what the log says of it.

    The target is the gold rationale, whichever label is in the prompt.
    """
    questions = [example.question for example in batch]
    labels, counts = mix_labels(run, batch, coins)

    sources = [run.prompts.source(PREDICT, question) for question in questions]
    targets = [run.prompts.target(example.label) for example in batch]
    loss_predict = token_loss(run, sources, targets)
    if run.options.method == "sft":  # the baseline that explains nothing
        return loss_predict, {"loss": loss_predict.item(), "loss_predict": loss_predict.item()}

    sources = explain_sources(run, questions, labels)
    targets = [run.prompts.target(example.rationale) for example in batch]
    loss_explain = token_loss(run, sources, targets)
    loss = alpha * loss_predict + (1 - alpha) * loss_explain
    log = {"loss": loss.item(), "loss_predict": loss_predict.item(), **counts}
    log["loss_explain"] = loss_explain.item()
    return loss, log


# ---- Training: one loop for both stages and all methods -----------------------------------------
class Adam:
    """Adam (Kingma & Ba 2015, algorithm 1), each rate relative to the size of the weights.

    The size of a tensor is the RMS of its first values. In T5 sizes differ a hundredfold, so its
    own optimiser, Adafactor, does the same. Written out: torch.optim loads the compiler, 70 MB.
    """

    def __init__(self, weights: list[Tensor]):
        self.updates = 0
        self.sizes = [max(w.detach().square().mean().sqrt().item(), 1e-3) for w in weights]
        self.means = [torch.zeros_like(w) for w in weights]
        self.squares = [torch.zeros_like(w) for w in weights]

    @torch.no_grad()
    def step(self, weights: list[Tensor], lr: float) -> None:
        """One update from the gradients of the weights."""
        self.updates += 1
        for i, w in enumerate(weights):
            self.means[i].lerp_(w.grad, 0.1)  # beta1 = 0.9
            self.squares[i].lerp_(w.grad.square(), 0.001)  # beta2 = 0.999
            mean = self.means[i] / (1 - 0.9**self.updates)
            square = self.squares[i] / (1 - 0.999**self.updates)
            w -= lr * self.sizes[i] * mean / (square.sqrt() + 1e-8)


def lr_at(step: int, steps: int, lr: float) -> float:
    """Learning rate: up linearly over the first tenth of the updates, then down linearly to 0.

    The paper has no warm-up. Here a fresh Adam at full rate would wipe out stage 1 in stage 2.
    """
    rising = (step + 1) / max(0.1 * steps, 1)
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
def rationale_nats(run: Run, sources: list[list[int]], examples: list[Example]) -> list[float]:
    """Nats of each gold rationale, given its prompt."""
    targets = [run.prompts.target(example.rationale) for example in examples]
    nats = []
    for start in range(0, len(examples), EVAL_BATCH):
        input_ids = data.pad(sources[start : start + EVAL_BATCH], run.device)
        labels = data.pad(targets[start : start + EVAL_BATCH], run.device)
        nats += run.model.nll(input_ids, labels).sum(1).tolist()
    return nats


def validate(run: Run, stage: int) -> dict[str, float]:
    """Scores on the validation split. There are no coins in evaluation."""
    val = run.data.stage1_val if stage == 1 else run.data.val
    questions = [example.question for example in val]
    run.model.eval()
    if stage == 1:
        sources = [run.prompts.source(EXPLAIN, question) for question in questions]
        tokens = sum(len(run.prompts.target(example.rationale)) for example in val)
        scores = {"val_loss": sum(rationale_nats(run, sources, val)) / max(tokens, 1)}
    else:
        gold = [example.label for example in val]
        predicted = predict_labels(run, questions)
        scores = {"val_macro_f1": metrics.macro_f1(gold, predicted, run.data.labels)}
        scores["val_accuracy"] = metrics.accuracy(gold, predicted)
    run.model.train()
    return scores


def train(run: Run, stage: int) -> None:
    """One stage: from the last save, or the weights in the model, to its best checkpoint.

    Best means the lowest validation loss in stage 1, the highest validation macro-F1 in stage 2.
    There the choice is among the last 35 % of the updates, after the ramp, for every method: the
    authors' code may choose weights that never saw a predicted label. Early stopping likewise.
    """
    o = run.options
    examples = run.data.stage1_train if stage == 1 else run.data.train
    steps = o.stage1_steps if stage == 1 else o.stage2_steps
    patience = 3 if stage == 1 else 5
    select_from = 0 if stage == 1 else max(0.65, o.warmup + o.ramp) * steps
    weights = list(run.model.parameters())
    optimizer = Adam(weights)
    coin = torch.Generator().manual_seed(1000 * o.seed + stage)
    progress = SimpleNamespace(stage=stage, step=0, log=[])  # step: updates done
    progress.best_score = -math.inf
    progress.best_weights = {}
    progress.bad_evals = 0  # validations in a row without a better score
    load(run, progress, optimizer, coin)
    lengths = [len(run.prompts.source(EXPLAIN, example.question)) for example in examples]
    n_batches = max(len(examples) // o.batch_size, 1)  # in an epoch
    mine = slice(RANK, None, WORLD)  # the rows of a batch that are this process's
    run.model.train()
    for step in tqdm(range(progress.step, steps), f"stage {stage}", disable=RANK > 0):
        epoch, place = divmod(step, n_batches)
        if place == 0 or step == progress.step:
            batches = data.batch_order(lengths, o.batch_size, o.seed, epoch)
        batch = [examples[i] for i in batches[place]]
        torch.manual_seed(10**9 * o.seed + 10**4 * step + RANK)  # of dropout
        alpha = o.alpha
        p = 0.0
        if stage == 2 and o.method == "r2d":
            alpha = alpha_at(step, steps, o.warmup, o.alpha)
            p = p_predicted(step, steps, o.schedule, o.warmup, o.ramp, o.cap)
        coins = flip_coins(len(batch), p, coin)  # of the whole batch, in every process
        if stage == 1:
            loss, log = stage1_loss(run, batch[mine])
        else:
            loss, log = stage2_loss(run, batch[mine], coins[mine], alpha)
        run.model.zero_grad()
        loss.backward()
        if WORLD > 1:
            sum_over_processes(run, log)
        grad_norm = torch.nn.utils.clip_grad_norm_(weights, 1.0).item()
        if not math.isfinite(grad_norm):
            raise InputError(f"stage {stage}, update {step}: the loss is not finite; lower --lr")
        lr = lr_at(step, steps, o.lr)
        optimizer.step(weights, lr)
        progress.step = step + 1
        line = {"stage": stage, "step": step, **log, "alpha": alpha, "p_predicted": p}
        line.update(lr=lr, grad_norm=grad_norm)
        progress.log.append(line)
        if progress.step % o.eval_every == 0 or progress.step == steps:
            scores = [validate(run, stage) if RANK == 0 else {}]
            if WORLD > 1:
                dist.broadcast_object_list(scores)  # from rank 0, so that all decide alike
            line.update(scores[0])
            score = -line["val_loss"] if stage == 1 else line["val_macro_f1"]
            if progress.step >= select_from and score > progress.best_score:
                progress.best_score = score
                progress.best_weights = copy.deepcopy(run.model.state_dict())
                progress.bad_evals = 0
            elif progress.step >= select_from:
                progress.bad_evals += 1
            save(run, progress, optimizer, coin)
        if progress.bad_evals == patience:
            break
    run.model.load_state_dict(progress.best_weights)
    checkpoint = {"config": asdict(run.model.config), "weights": progress.best_weights}
    write_checkpoint(o.out / f"stage{stage}.pt", checkpoint)


# ---- The test: the same notes explained under the gold, the predicted and a flipped label -------
def flipped_labels(examples: list[Example], labels: list[str], seed: int) -> list[str]:
    """A wrong label for each example, drawn evenly from all wrong ones."""
    generator = torch.Generator().manual_seed(seed)
    flipped = []
    for example in examples:
        wrong = [label for label in labels if label != example.label]
        drawn = torch.randint(len(wrong), (), generator=generator)
        flipped.append(wrong[drawn])
    return flipped


def test_rows(run: Run) -> list[dict]:
    """One row per test example, with every fact that the scores need: predictions.jsonl."""
    test = run.data.test
    predicted = predict_labels(run, [example.question for example in test])
    flipped = flipped_labels(test, run.data.labels, run.options.seed)
    train_labels = Counter(example.label for example in run.data.train)
    rows = []
    for i, example in enumerate(test):
        row = {**vars(example), "predicted_label": predicted[i], "flipped_label": flipped[i]}
        row["majority_label"] = train_labels.most_common(1)[0][0]
        if run.data.ceiling:
            row["ceiling_label"] = run.data.ceiling[i].label
        rows.append(row)
    if run.options.method != "sft":
        add_rationales(run, rows)
        add_verdicts(run, rows)
    return rows


def add_rationales(run: Run, rows: list[dict]) -> None:
    """The rationale under each label, and the nats of the gold rationale under it."""
    questions = [row["question"] for row in rows]
    conditions = ["gold", "predicted", "flipped"]
    if run.options.method == "dss":
        conditions = ["predicted"]  # its prompts hold no label: all conditions are one
    for condition in conditions:
        labels = [row[metrics.CONDITIONS[condition]] for row in rows]
        sources = explain_sources(run, questions, labels)
        texts = decode(run, sources, run.options.max_target)
        nats = rationale_nats(run, sources, run.data.test)
        for i, row in enumerate(rows):
            row["tokens"] = len(run.prompts.target(row["rationale"]))
            row[f"nats_given_{condition}"] = nats[i]
            row[f"rationale_given_{condition}"] = texts[i]
    for i, answer in enumerate(run.data.ceiling):  # none but on triage
        rows[i]["rationale_given_ceiling"] = answer.rationale
        rows[i]["rationale_given_ceiling_gold"] = run.data.ceiling_gold[i].rationale


def add_verdicts(run: Run, rows: list[dict]) -> None:
    """Which label each rationale argues for: by the checker on triage, elsewhere by the reader."""
    explained = [example for example in run.data.train if example.rationale]
    texts = [example.rationale for example in explained]
    reader = metrics.Reader(texts, [example.label for example in explained], run.data.labels)
    for row in rows:
        if row["rationale"]:
            row["reader_label"] = reader(row["rationale"])
        for condition in metrics.CONDITIONS:
            text = row.get(f"rationale_given_{condition}")
            if text is None:
                continue
            if run.options.data == "triage":
                row[f"argues_given_{condition}"] = data.argues_for(text)
                row[f"ungrounded_given_{condition}"] = data.ungrounded(text, row["question"])
            else:
                row[f"argues_given_{condition}"] = reader(text)


def evaluate(run: Run) -> None:
    """Write predictions.jsonl and metrics.json; print the table and three examples."""
    o = run.options
    run.model.eval()
    rows = test_rows(run)
    result = {"method": o.method, "data": o.data, "seed": o.seed}
    result.update(metrics.score(rows, run.data.labels))
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    write_file(o.out / "predictions.jsonl", "".join(lines).encode())
    write_file(o.out / "metrics.json", json.dumps(result, indent=2).encode())
    print("\n" + metrics.table(result))
    right = [row for row in rows if row["predicted_label"] == row["label"]]
    wrong = [row for row in rows if row["predicted_label"] != row["label"]]
    for row in right[:2] + wrong[:1]:
        print(f"\nnote       {row['question'][:500]}")
        print(f"gold       {row['label'][:100]}: {row['rationale'][:500]}")
        rationale = row.get("rationale_given_predicted", "-")
        print(f"model      {row['predicted_label'][:100]}: {rationale[:500]}")


# ---- The files of a run -------------------------------------------------------------------------
def write_file(path: Path, content: bytes) -> None:
    """Write under another name first: the file is never half there. Rank 0 alone writes."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        if RANK == 0:
            temporary.write_bytes(content)
            os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def write_checkpoint(path: Path, content: dict) -> None:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    write_file(path, buffer.getvalue())


@contextlib.contextmanager
def reading(path: Path) -> Iterator[None]:
    """Whatever is wrong with a file of a run becomes one InputError."""
    try:
        yield
    except Exception as e:  # a missing or damaged file raises half a dozen types
        problem = f"cannot be read as a file of this run ({type(e).__name__})"
        raise InputError(f"{path}: {problem}; train first, or give another --out") from None


def save(run: Run, progress: SimpleNamespace, optimizer: Adam, coin: torch.Generator) -> None:
    """All that `load` needs, in last.pt; and the log so far, in log.jsonl."""
    state = {"progress": vars(progress), "optimizer": vars(optimizer), "coin": coin.get_state()}
    write_checkpoint(run.options.out / "last.pt", {**state, "weights": run.model.state_dict()})
    lines = [json.dumps(line) + "\n" for line in progress.log]
    write_file(run.options.out / "log.jsonl", "".join(lines).encode())


def load(run: Run, progress: SimpleNamespace, optimizer: Adam, coin: torch.Generator) -> None:
    """Put the last save of this stage back in place. Stage 2 begins with the log of stage 1."""
    path = run.options.out / "last.pt"
    if not path.exists():
        return
    with reading(path):
        state = torch.load(path, map_location=run.device, weights_only=True)
        progress.log = state["progress"]["log"]
        if state["progress"]["stage"] == progress.stage:
            vars(progress).update(state["progress"])
            vars(optimizer).update(state["optimizer"])
            coin.set_state(state["coin"].cpu())
            run.model.load_state_dict(state["weights"])


def load_weights(run: Run, stage: int) -> None:
    """The best weights of a stage, from its checkpoint."""
    path = run.options.out / f"stage{stage}.pt"
    with reading(path):
        checkpoint = torch.load(path, map_location=run.device, weights_only=True)
        run.model.load_state_dict(checkpoint["weights"])


# ---- The command line ---------------------------------------------------------------------------
def make_parser() -> argparse.ArgumentParser:
    formatter = argparse.ArgumentDefaultsHelpFormatter
    parser = argparse.ArgumentParser("r2d.py", argparse.SUPPRESS, formatter_class=formatter)
    add = parser.add_argument_group("method").add_argument
    add("--stage", type=int, choices=[1, 2], default=2, help="1: stop after stage 1")
    add("--method", choices=["r2d", "sft", "dss"], default="r2d", help="the paper's, or a baseline")
    add("--no-stage1", action="store_true", help="ablation: stage 2 from random weights")
    schedules = ["linear", "exponential", "inverse-sigmoid", "none"]
    add("--schedule", choices=schedules, default="linear", help="of P(predicted); none: gold only")
    add("--warmup", type=float, default=0.05, help="share of stage 2 with P = 0 and alpha rising")
    add("--ramp", type=float, default=0.6, help="share of stage 2 in which P then rises")
    add("--cap", type=float, default=0.9, help="P(predicted) after the ramp")
    add("--alpha", type=float, default=0.7, help="weight of the label loss after the warm-up")
    add = parser.add_argument_group("data").add_argument
    add("--data", default="triage", help="triage (simulated), a .jsonl, .csv or .json, a folder")
    add("--override", type=float, default=0.2, help="triage: share of calls decided off the rule")
    add("--notes", type=int, default=20000, help="triage: training notes")
    voices = ["llm", "nurse", "post"]
    add("--rationales", choices=voices, default="llm", help="triage: whose rationales are learned")
    add("--stage1-rationales", choices=voices, default="llm", help="triage: the same in stage 1")
    add("--limit", type=int, help="at most so many examples of each split, for trying")
    add("--max-source", type=int, default=256, help="tokens of a prompt; longer ones are cut")
    add("--max-target", type=int, default=128, help="tokens of a rationale")
    add("--vocab-size", type=int, default=1536, help="pieces of the tokenizer")
    add = parser.add_argument_group("model").add_argument
    add("--init", help="folder of a T5 or Flan-T5 checkpoint to start from")
    add("--width", type=int, default=128, help="of the model; feed-forward layers: 4 times that")
    add("--layers", type=int, default=2, help="of the encoder, and of the decoder")
    add("--heads", type=int, default=4, help="attention heads")
    add("--dropout", type=float, default=0.0, help="dropout rate")
    add = parser.add_argument_group("training").add_argument
    add("--stage1-steps", type=int, default=150, help="updates in stage 1")
    add("--stage2-steps", type=int, default=700, help="updates in stage 2")
    add("--batch-size", type=int, default=32, help="examples per update, over all processes")
    add("--lr", type=float, default=0.02, help="peak rate, relative; 0.001 suits --init")
    add("--eval-every", type=int, default=100, help="updates between two validations")
    add("--dtype", choices=["float32", "bfloat16"], default="float32", help="of matrix products")
    add = parser.add_argument_group("run").add_argument
    add("--out", type=Path, default="out", help="folder of the run")
    add("--seed", type=int, default=0, help="of data, weights, batches and coins")
    add("--device", choices=["auto", "cpu", "cuda", "mps"], default="auto", help="where to compute")
    add("--eval", action="store_true", help="evaluate the checkpoint in --out; no training")
    add("--ask", metavar="TEXT", help="predict and explain one note with the checkpoint in --out")
    return parser


def parse_args(arguments: list[str] | None) -> argparse.Namespace:
    """The options. A run in --out brings its own, which may be left out but not changed.

    Ends the program with one line and status 2 where an option is wrong.
    """
    parser = make_parser()
    o = parser.parse_args(arguments)
    path = o.out / "config.json"
    if path.exists():
        with reading(path):
            saved = json.loads(path.read_text(encoding="utf-8"))
            parser.set_defaults(**saved)
        o = parser.parse_args(arguments)
        for name in saved:
            if getattr(o, name) != saved[name]:
                flag = name.replace("_", "-")
                parser.error(f"--{flag}: {o.out} has {saved[name]}; give another --out")
    least = {"seed": 0, "max_target": 2, "max_source": 32, "vocab_size": 400}  # others: 1
    for name, value in vars(o).items():
        flag = name.replace("_", "-")
        if type(value) is int and value < least.get(name, 1):
            parser.error(f"--{flag} {value}: must be at least {least.get(name, 1)}")
        if type(value) is float and not 0 <= value <= 1:
            parser.error(f"--{flag} {value}: must be between 0 and 1")
    if o.warmup + o.ramp > 1:
        parser.error("--warmup and --ramp: together they must not pass 1")
    if o.width % o.heads != 0:
        parser.error(f"--width {o.width}: must be a multiple of --heads {o.heads}")
    if o.stage == 1 and (o.no_stage1 or o.method != "r2d"):
        parser.error("--stage 1: only --method r2d has it, and not with --no-stage1")
    return o


def setup(options: argparse.Namespace) -> Run:
    """Data, tokenizer and untrained model of a run. Raises InputError; writes nothing."""
    o = options
    found = torch.accelerator.current_accelerator(check_available=True)
    accelerator = found.type if found else "cpu"
    device = accelerator if o.device == "auto" else o.device
    if device not in ("cpu", accelerator):
        raise InputError(f"--device {device}: this machine has none; use --device cpu")
    voices = (o.rationales, o.stage1_rationales)
    dataset = data.load_data(o.data, o.seed, o.limit, o.notes, o.override, *voices)
    if o.method != "sft" and not any(example.rationale for example in dataset.train):
        raise InputError(f"{o.data}: no rationale in train; fill the column, or use --method sft")
    torch.manual_seed(o.seed)
    if o.init:
        tokenizer = Tokenizer.load(Path(o.init) / "spiece.model")
        model = load_t5(Path(o.init), o.dropout)
        if len(tokenizer) > model.config.vocab_size:
            raise InputError(f"{o.init}: spiece.model is not the tokenizer of these weights")
    else:
        texts = [EXPLAIN, PREDICT, EXPLAIN_GIVEN, *dataset.labels]
        for example in dataset.train + dataset.stage1_train:
            texts += [example.question, example.rationale]
        tokenizer = Tokenizer.train(texts, o.vocab_size)
        shape = (o.width, o.heads, o.width // o.heads, 4 * o.width, o.layers, o.layers, o.dropout)
        model = Transformer(ModelConfig(len(tokenizer), *shape))
    prompts = Prompts(tokenizer, o.max_source, o.max_target)
    for label in dataset.labels:
        if tokenizer.decode(prompts.target(label)) != label:
            raise InputError(
                f"the label {label[:50]!r}: too long, or not in the tokenizer; rename it"
            )
    return Run(o, dataset, prompts, model.to(device), device)


def begin(run: Run) -> None:
    """Say what is trained on what; write config.json and tokenizer.model, or compare with them."""
    o = run.options
    size = sum(weight.numel() for weight in run.model.parameters())
    print(f"{o.data}: {len(run.data.labels)} labels; a model of {size:,} weights on {run.device}")
    for name in ["train", "val", "test"]:
        split = getattr(run.data, name)
        questions = [example.question for example in split]
        sources = explain_sources(run, questions, [example.label for example in split])
        full = sum(len(source) == o.max_source for source in sources)
        print(f"  {name}: {len(split)} examples, {full} of them cut to --max-source {o.max_source}")
    names = {" ".join(label.lower().split()) for label in run.data.labels}
    if len(names) < len(run.data.labels):
        print("note: some labels differ from others only by case or spaces")
    config = {**vars(o), "labels": run.data.labels, "model": asdict(run.model.config)}
    config["data_sha256"] = hashlib.sha256(repr(run.data).encode()).hexdigest()
    for name in ["stage", "out", "device", "eval", "ask"]:  # these may change from call to call
        del config[name]
    if vars(o).get("data_sha256", config["data_sha256"]) != config["data_sha256"]:
        raise InputError(f"{o.data}: changed since the run in {o.out} began; give another --out")
    o.out.mkdir(parents=True, exist_ok=True)
    write_file(o.out / "tokenizer.model", run.prompts.tokenizer.model)
    write_file(o.out / "config.json", json.dumps(config, indent=2).encode())


def run_command(options: argparse.Namespace) -> None:
    """Answer --ask, or train and evaluate what is not done yet."""
    o = options
    trained = (o.out / "stage2.pt").exists()
    if (o.ask or o.eval) and not trained and not (o.eval and o.init):
        raise InputError(f"{o.out}: no finished run; train first, or give another --out")
    finished = trained and (o.out / "metrics.json").exists()
    if o.stage == 1:
        finished = (o.out / "stage1.pt").exists()
    if finished and not (o.ask or o.eval):
        print(f"{o.out} holds a finished run; to start over, delete it or give another --out")
        return
    run = setup(o)
    if o.ask:
        load_weights(run, 2)
        label = predict_labels(run, [o.ask])[0]
        rationale = decode(run, explain_sources(run, [o.ask], [label]), o.max_target)[0]
        print(f"label      {label}\nrationale  {rationale}")
        return
    begin(run)
    stages = [1, 2] if o.stage == 2 else [1]
    if o.no_stage1 or o.method != "r2d":
        stages = [2]
    with torch.autocast(run.device, torch.bfloat16, o.dtype == "bfloat16", cache_enabled=False):
        for stage in stages:
            if (o.out / f"stage{stage}.pt").exists():
                load_weights(run, stage)
            elif not o.eval:
                train(run, stage)
        if o.stage == 2 and RANK == 0:
            evaluate(run)


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit status: 0 done, 1 lost a process, 2 bad input, 130 stopped by Ctrl-C."""
    if RANK > 0:
        sys.stdout = open(os.devnull, "w")
    try:
        options = parse_args(arguments)
        if WORLD > 1:
            dist.init_process_group()
        run_command(options)
        return 0
    except (InputError, OSError) as e:
        print(f"r2d.py: {e}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nstopped; the same command goes on from the last save", file=sys.stderr)
        return 130
    except RuntimeError as e:
        if WORLD == 1:
            raise
        problem = f"another process was lost ({type(e).__name__})"
        print(f"r2d.py: {problem}; the same command goes on", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
