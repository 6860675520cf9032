"""Reason2Decide from scratch: learn to explain, then to predict and explain, with scheduled sampling on the label.

    python r2d.py --stage 2                 everything: stage 1, stage 2, evaluation, table
    python r2d.py --method sft --out sft    a baseline; see python r2d.py -h for all options
    python r2d.py --ask "A 52-year-old man with chest pain for 2 days. It is severe."

The file follows the paper (arXiv 2512.20074): the schedules, the losses of the two stages, one training loop, the
evaluation under the gold, the predicted and a flipped label, and the command line. It is for study, not for patients.
"""

import argparse
import contextlib
import dataclasses
import functools
import io
import json
import math
import os
import pickle
import platform
import re
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import get_args

import numpy as np
import sentencepiece
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import data
import metrics
from data import EXPLAIN, EXPLAIN_GIVEN, PREDICT, Dataset, Example, InputError, Prompts, Tokenizer, need
from model import ModelConfig, Transformer, load_t5

# ---------------------------------------------------------------------------------------------------------------------
# Options: one frozen dataclass; the command line is made from it.


def option(default: object, help: str, choices: tuple = (), metavar: str | None = None) -> object:
    return field(default=default, metadata={"help": help, "choices": choices, "metavar": metavar})


METHODS = ("r2d", "sft", "dss", "zeroshot")
SCHEDULES = ("linear", "exponential", "inverse-sigmoid", "none")


@dataclass(frozen=True)
class Options:
    stage: int = option(2, "1: rationale pre-training only; 2: the rest, after stage 1 if that is missing", (1, 2))
    method: str = option("r2d", "sft: label only; dss: label and rationale apart; zeroshot: an LLM", METHODS)
    no_stage1: bool = option(False, "ablation: start stage 2 from random weights")
    schedule: str = option("linear", "how P(predicted label in the prompt) rises; none: gold labels only", SCHEDULES)
    warmup: float = option(0.05, "share of stage 2 in which P(predicted) is 0 and alpha rises from 0")
    ramp: float = option(0.6, "share of stage 2 in which P(predicted) then rises to the cap")
    cap: float = option(0.9, "P(predicted) after the ramp, 0 to 1")
    alpha: float = option(0.7, "weight of the label loss, 0 to 1; the rationale loss has 1 - alpha")
    data: str = option("triage", "triage (simulated), a .jsonl, .csv or .json file, or a folder", metavar="DATA")
    rationales: str = option("llm", "whose rationales stage 2 learns (triage only)", ("llm", "nurse", "post"))
    stage1_rationales: str = option("llm", "whose rationales stage 1 learns (triage only)", ("llm", "nurse", "post"))
    out: str = option("out", "folder of the run", metavar="DIR")
    seed: int = option(0, "decides the data split, the weights, the order of examples and the coins")
    stage1_steps: int | None = option(None, "updates in stage 1; default 200, or 20 epochs if that is less")
    stage2_steps: int | None = option(None, "updates in stage 2; default 1200 or 20 epochs, plus stage 1's if left out")
    batch_size: int = option(32, "examples per update, over all processes")
    accumulate: int = option(1, "parts that a batch is computed in, one after the other; saves memory, not time")
    lr: float | None = option(None, "peak rate, relative to each tensor's size; default 0.02, with --init 0.001")
    eval_every: int = option(150, "updates between two validations")
    width: int = option(128, "width of the model (d_model); feed-forward layers are 4 times as wide")
    layers: int = option(2, "layers of the encoder, and of the decoder")
    heads: int = option(4, "attention heads")
    dropout: float = option(0.0, "dropout rate, 0 to 1")
    vocab_size: int = option(1536, "pieces of the tokenizer")
    max_source: int = option(256, "longest prompt in tokens; longer questions are cut and counted")
    max_target: int = option(128, "longest rationale in tokens")
    limit: int | None = option(None, "use at most N examples of each split, for trying; default all", metavar="N")
    device: str = option("auto", "where to compute", ("auto", "cpu", "cuda", "mps"))
    dtype: str = option("float32", "of matrix products; weights and sums stay float32", ("float32", "bfloat16"))
    compile: bool = option(False, "compile the loss with torch.compile: slow to start, for long runs on a GPU")
    eval: bool = option(False, "evaluate the checkpoint in --out, without training")
    init: str | None = option(None, "start from the T5 or Flan-T5 in this folder; default random", metavar="DIR")
    ask: str | None = option(None, "judge one note with the checkpoint in --out; default no note", metavar="TEXT")
    fresh: bool = option(False, "start over: move what is in --out aside first")
    bertscore: str | None = option(None, "BERTScore by the encoder of this T5; default the run's own", metavar="DIR")
    judge: str | None = option(None, "a chat endpoint that grades the rationales; default none", metavar="URL")
    judge_model: str | None = option(None, "its model, default none; key: the variable R2D_API_KEY", metavar="NAME")
    llm: str | None = option(None, "the chat endpoint of --method zeroshot; default none", metavar="URL")
    llm_model: str | None = option(None, "its model; default none", metavar="NAME")
    compare: tuple[str, ...] | None = option(None, "compare METHOD[,OPTION=VALUE...]; default none", metavar="METHOD")
    seeds: tuple[int, ...] | None = option(None, "the seeds of --compare; default 0 1 2 3 4", metavar="N")

    @property
    def has_stage1(self) -> bool:
        return self.method == "r2d" and not self.no_stage1


# These may change between two calls on one folder; everything else is the run's identity.
FREE = {"stage", "out", "device", "eval", "ask", "fresh", "bertscore", "judge", "judge_model", "compare", "seeds"}
IDENTITY = {f.name for f in fields(Options)} - FREE


# ---------------------------------------------------------------------------------------------------------------------
# Schedules: pure functions of the step.


def p_predicted(step: int, steps: int, schedule: str, warmup: float, ramp: float, cap: float) -> float:
    """P(the label in the explain prompt is the model's own) at `step` of `steps`; the paper's 1 - epsilon.

    0 during the warm-up; then, with i steps into a ramp of n = ramp * steps, one of the decays of Bengio et al. (2015,
    section 2.4), its constant chosen so that all reach `cap` at i = n; `cap` from there on.
        linear:          epsilon = 1 - cap * i / n                        (the paper)
        exponential:     epsilon = k^i
        inverse-sigmoid: epsilon = k / (k + e^(i/k))                      (starts at 1 / (k + 1), a little above 0)
    """
    i, n = step - warmup * steps, ramp * steps
    if schedule == "none" or cap == 0 or i < 0:
        return 0.0
    if i >= n:
        return cap
    if schedule == "linear":
        return cap * i / n
    reach = min(cap, 1 - 1e-6)  # neither curve ever reaches 1
    if schedule == "exponential":
        return 1 - (1 - reach) ** (i / n)
    log_odds = math.log(reach / (1 - reach))
    low, high = 1e-9 * n, 1e9 * n  # n/k - ln k falls with k and must equal the log odds of the cap: bisection
    for _ in range(200):
        k = math.sqrt(low * high)
        low, high = (k, high) if n / k - math.log(k) > log_odds else (low, k)
    return 1 / (1 + k * math.exp(-i / k))


def alpha_at(step: int, steps: int, warmup: float, alpha: float) -> float:
    """Weight of the label loss (paper, section 3): from 0 linearly to `alpha` over the warm-up, then constant."""
    return alpha * min(1.0, step / (warmup * steps)) if warmup * steps > 0 else alpha


def lr_at(step: int, steps: int, lr: float, warmup: float = 0.1) -> float:
    """Learning rate: up linearly over the first tenth, down linearly to 0.

    The paper has no warm-up; from small random models Adam at full rate wipes out stage 1 when stage 2 begins.
    """
    return lr * min(1, (step + 1) / max(warmup * steps, 1), (steps - step) / max((1 - warmup) * steps, 1))


def flip_coins(n: int, p: float, generator: torch.Generator) -> list[bool]:
    """One independent coin per example, True with probability `p`, from a generator that nothing else draws from."""
    return (torch.rand(n, generator=generator) < p).tolist()


# ---------------------------------------------------------------------------------------------------------------------
# The run: what all parts below share.


@dataclass
class Run:
    options: Options
    data: Dataset
    prompts: Prompts | None  # these two: not for --method zeroshot
    model: Transformer | None
    device: str
    nll: Callable[[Tensor, Tensor], Tensor] | None = None  # the model's, perhaps compiled or shared over processes
    tokens: int = 0  # source and target tokens seen by the losses, for the log

    def __post_init__(self) -> None:
        self.nll = self.nll or (self.model and self.model.nll)

    @property
    def out(self) -> Path:
        return Path(self.options.out)

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device, torch.bfloat16, enabled=self.options.dtype == "bfloat16")


# Several processes (torchrun): each has its rank, they share out a batch and an evaluation, and rank 0 alone writes.


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def wait_for_all() -> None:
    if dist.is_initialized():
        dist.barrier()


def in_batches(items: list, work: Callable[[list], Iterable], share: bool = True) -> list:
    """work(items), one result per item, 64 at a time; with `share` by all processes, and gathered in order."""
    share = share and world() > 1
    mine = items[rank() :: world()] if share else items
    results = [result for i in range(0, len(mine), 64) for result in work(mine[i : i + 64])]
    if share:
        parts = [None] * world()
        dist.all_gather_object(parts, results)
        results = [None] * len(items)
        for i, part in enumerate(parts):
            results[i :: world()] = part
    return results


class Loss(nn.Module):
    """The model as DistributedDataParallel wants it: a module whose call is the loss."""

    def __init__(self, model: Transformer):
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, labels: Tensor) -> Tensor:
        return self.model.nll(input_ids, labels)


def explain_head(method: str, label: str) -> str:
    """What stands before the question in the explain prompt of stage 2; Distilling Step-by-Step never shows a label."""
    return EXPLAIN if method == "dss" else EXPLAIN_GIVEN.format(label=label)


def decode_all(run: Run, sources: list[list[int]], max_new_tokens: int) -> list[str]:
    """Greedy decoding of any number of prompts; equal prompts are decoded once, neighbours in length together."""

    def work(rows: list[tuple]) -> Iterable[str]:
        with run.autocast():
            tokens = run.model.generate(data.pad(rows, run.device), max_new_tokens)
        return map(run.prompts.tokenizer.decode, tokens.tolist())

    unique = sorted(set(map(tuple, sources)), key=lambda ids: (len(ids), ids))
    # in training, every process has sources of its own
    texts = dict(zip(unique, in_batches(unique, work, share=not run.model.training), strict=True))
    return [texts[tuple(ids)] for ids in sources]


def predict_labels(run: Run, questions: list[str]) -> list[str]:
    """The model's own labels, as text; an output that is no label stays as it is."""
    longest = max(len(run.prompts.target(label)) for label in run.data.labels)
    return decode_all(run, [run.prompts.source(PREDICT, question) for question in questions], longest)


def explain(run: Run, questions: list[str], labels: list[str]) -> list[str]:
    sources = [
        run.prompts.source(explain_head(run.options.method, label), question)
        for question, label in zip(questions, labels, strict=True)
    ]
    return decode_all(run, sources, run.options.max_target)


# ---------------------------------------------------------------------------------------------------------------------
# The losses of the two stages, term by term: `gradients` frees the memory of one before the next is computed.


def token_mean(run: Run, sources: list[list[int]], targets: list[list[int]], total: int) -> Tensor:
    """Cross-entropy in nats over `total`, the target tokens of the whole batch; these rows may be a part of it.

    Padding and empty targets count nothing.
    """
    run.tokens += sum(map(len, sources)) + sum(map(len, targets))
    with run.autocast():
        return run.nll(data.pad(sources, run.device), data.pad(targets, run.device)).sum() / max(total, 1)


def stage1_loss(run: Run, examples: list[Example], totals: list[int], log: dict) -> Iterator[Tensor]:
    """explain: {question} -> rationale. `totals`: label, rationale tokens of the whole batch; `log` is filled."""
    sources = [run.prompts.source(EXPLAIN, e.question) for e in examples]
    loss = token_mean(run, sources, [run.prompts.target(e.rationale) for e in examples], totals[1])
    log["loss_explain"] = loss.item()
    yield loss


def labels_in_prompts(run: Run, examples: list[Example], coins: list[bool]) -> tuple[list[str], int, int]:
    """Scheduled sampling: gold labels, some replaced by the model's own; how many were, and how many were no labels.

    Only the labels that are used are generated, in eval mode (the authors' code generates all, with dropout on). What
    is no label never enters a training prompt: gold stays there.
    """
    labels = [e.label for e in examples]
    chosen = [i for i, heads in enumerate(coins) if heads]
    invalid = 0
    for i, label in zip(chosen, predict_labels(run, [examples[i].question for i in chosen]), strict=True):
        if label in run.data.labels:
            labels[i] = label
        else:
            invalid += 1
    return labels, len(chosen) - invalid, invalid


def stage2_loss(
    run: Run, examples: list[Example], totals: list[int], log: dict, coins: list[bool], alpha: float
) -> Iterator[Tensor]:
    """The terms of alpha * L_predict + (1 - alpha) * L_explain; `totals` and `log` as in stage 1.

    The target is the gold rationale, whichever label is in the prompt.
    """
    o, labels = run.options, [e.label for e in examples]
    sources = [run.prompts.source(PREDICT, e.question) for e in examples]
    loss = token_mean(run, sources, [run.prompts.target(label) for label in labels], totals[0])
    log["loss_predict"] = loss.item()
    yield alpha * loss
    if o.method == "sft":
        return
    if o.method == "r2d":
        labels, log["used_predicted"], log["invalid_predicted"] = labels_in_prompts(run, examples, coins)
    heads = [explain_head(o.method, label) for label in labels]
    sources = [run.prompts.source(head, e.question) for head, e in zip(heads, examples, strict=True)]
    loss = token_mean(run, sources, [run.prompts.target(e.rationale) for e in examples], totals[1])
    log["loss_explain"] = loss.item()
    yield (1 - alpha) * loss


# ---------------------------------------------------------------------------------------------------------------------
# Files of a run. Every write goes to a temporary name first: what stands under the real name is always whole.

FAULTS = (pickle.UnpicklingError, RuntimeError, EOFError, OSError, LookupError, ValueError, TypeError, AttributeError)
STATE = {"stage", "step", "best", "worse", "model", "optimizer", "log_size", "rng", "coin"}  # what last.pt holds


def write_file(path: Path, content: bytes, previous: Path | None = None) -> None:
    """Replace `path` in one step; what it held before is kept as `previous`. Of several processes the first writes."""
    if rank() > 0:
        return
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as f:
            f.write(content)
            f.flush()
            os.fsync(f.fileno())
        if previous and path.exists():
            os.replace(path, previous)
        os.replace(temporary, path)
    except OSError as e:
        temporary.unlink(missing_ok=True)  # half a file on a full disk
        e.filename = e.filename or str(path)
        raise


def write_json(path: Path, content: object) -> None:
    write_file(path, (json.dumps(content, indent=2) + "\n").encode())


def save_checkpoint(path: Path, content: dict, previous: Path | None = None) -> None:
    if rank() == 0:
        buffer = io.BytesIO()
        torch.save(content, buffer)
        write_file(path, buffer.getvalue(), previous)
    wait_for_all()  # nobody reads before it is written


@contextlib.contextmanager
def reading(path: Path) -> Iterator[None]:
    """Whatever is wrong with a checkpoint, of ours or from a stranger, becomes an InputError that names it."""
    try:
        yield
    except InputError:
        raise
    except FileNotFoundError:
        raise InputError(f"{path}: no such checkpoint; train first, or give a finished run to --out") from None
    except FAULTS as e:
        what = f"not a checkpoint of this run and version ({type(e).__name__})"
        raise InputError(f"{path}: {what}; delete it, or start over with --fresh") from None


def load_checkpoint(path: Path, device: str, keys: set[str]) -> dict:
    """Tensors and plain values under these keys: weights_only=True refuses a pickle that would run code."""
    with reading(path):
        content = dict(torch.load(path, map_location=device, weights_only=True))
        return {key: content[key] for key in keys}


def load_weights(run: Run, model: Transformer, stage: int) -> None:
    """The best weights of a stage, from stage1.pt or stage2.pt."""
    path = run.out / f"stage{stage}.pt"
    with reading(path):
        checkpoint = load_checkpoint(path, run.device, {"config", "weights"})
        need(checkpoint["config"] == asdict(model.config), f"{path}: has another shape than the options; use --fresh")
        model.load_state_dict(checkpoint["weights"])


def last_state(out: Path) -> dict | None:
    """The last save, or the one before it if that one is damaged or was being replaced; None before the first."""
    damage = None
    for path in (out / "last.pt", out / "previous.pt"):
        if path.exists():
            try:
                with reading(path):
                    state = load_checkpoint(path, "cpu", STATE)
                    numbers = {key: int(state[key]) for key in ("stage", "step", "worse", "log_size")}
                    return state | numbers | {"best": float(state["best"]), "path": path}
            except InputError as e:
                damage = e
                print(f"note: {e}", file=sys.stderr)
    need(damage is None, str(damage))
    return None


def begun(out: Path) -> bool:
    return (out / "last.pt").exists() or (out / "previous.pt").exists()


@contextlib.contextmanager
def locked(out: Path) -> Iterator[None]:
    """No second run can be at work in this folder. The system drops the lock however the program ends."""
    with open(out / "lock", "ab") as f:
        try:
            if os.name == "nt":
                import msvcrt

                msvcrt.locking(f.fileno(), msvcrt.LK_NBLCK, 1)
            else:
                import fcntl

                fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            raise InputError(f"{out}: another run is at work in this folder; wait, or give another --out") from None
        yield


@contextlib.contextmanager
def alone(out: Path, fresh: bool) -> Iterator[None]:
    """The folder of a run, made if need be and locked by the first process; `fresh` moves the old one aside first."""
    if rank() == 0:
        if fresh and out.exists():
            with locked(out):  # nobody is at work there
                aside = next(p for i in range(1, 10**6) if not (p := out.with_name(f"{out.name}.old{i}")).exists())
            out.rename(aside)
            print(f"--fresh: the old run is now in {aside}")
        out.mkdir(parents=True, exist_ok=True)
    with locked(out) if rank() == 0 else contextlib.nullcontext():
        wait_for_all()
        yield


# ---------------------------------------------------------------------------------------------------------------------
# The one training loop.


class Adam:
    """Adam (Kingma & Ba 2015, algorithm 1; AdamW without decay), each rate times the size (RMS) of its first weights.

    T5's own optimiser has the latter from Adafactor (arXiv 1804.04235). T5's initial weights differ a hundredfold: at
    one rate for all, q explodes and embeddings stand still. torch.optim would load the compiler: 60 MB and a second.
    """

    def __init__(self, model: nn.Module):
        self.parameters, self.steps = list(model.parameters()), 0
        self.sizes = [max(p.detach().square().mean().sqrt().item(), 1e-3) for p in self.parameters]
        self.means, self.squares = ([torch.zeros_like(p) for p in self.parameters] for _ in range(2))

    @torch.no_grad()
    def step(self, lr: float, beta1: float = 0.9, beta2: float = 0.999, eps: float = 1e-8) -> None:
        self.steps += 1
        bias1, bias2 = 1 - beta1**self.steps, 1 - beta2**self.steps
        for p, size, mean, square in zip(self.parameters, self.sizes, self.means, self.squares, strict=True):
            mean.lerp_(p.grad, 1 - beta1)
            square.mul_(beta2).addcmul_(p.grad, p.grad, value=1 - beta2)
            p.addcdiv_(mean, (square / bias2).sqrt_().add_(eps), value=-lr * size / bias1)

    def state(self) -> dict:
        return {key: value for key, value in vars(self).items() if key != "parameters"}

    def restore(self, state: dict) -> None:
        """Raises ValueError or RuntimeError for the state of another model."""
        self.steps, sizes = int(state["steps"]), zip(self.sizes, state["sizes"], strict=True)
        self.sizes = [float(size) for _, size in sizes]
        for mine, saved in zip(self.means + self.squares, state["means"] + state["squares"], strict=True):
            mine.copy_(saved.view_as(mine))


@contextlib.contextmanager
def finish_the_step() -> Iterator[list[int]]:
    """Ctrl-C and SIGTERM add to the list that this yields instead of ending the program; a second one does end it."""
    asked: list[int] = []

    def handler(number: int, frame: object) -> None:
        if asked:
            raise KeyboardInterrupt
        asked.append(number)

    previous = {number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked
    finally:
        for number, action in previous.items():
            signal.signal(number, action)


@torch.no_grad()
def validate(run: Run, stage: int) -> tuple[float, dict[str, float]]:
    """The score that chooses the checkpoint, higher is better, and all validation scores for the log.

    Labels in the prompts are gold or predicted throughout; scheduled sampling never runs in evaluation.
    """
    o, val, scores = run.options, run.data.stage1_val if stage == 1 else run.data.val, {}
    run.model.eval()
    if stage == 1:
        heads = {"val_loss": [EXPLAIN] * len(val)}
    else:
        gold, predicted = [e.label for e in val], predict_labels(run, [e.question for e in val])
        scores["val_macro_f1"] = metrics.macro_f1(gold, predicted, run.data.labels)
        scores["val_accuracy"] = metrics.accuracy(gold, predicted)
        scores["val_invalid"] = 100 * sum(label not in run.data.labels for label in predicted) / len(val)
        heads = {"val_nll_gold": gold, "val_nll_predicted": predicted} if o.method == "r2d" else {}
        heads = {name: [EXPLAIN_GIVEN.format(label=label) for label in column] for name, column in heads.items()}
    for name, column in heads.items():
        nats, tokens = nll_counts(run, val, column).sum(0)
        scores[name] = float(nats / max(tokens, 1))
    run.model.train()
    return -scores["val_loss"] if stage == 1 else scores["val_macro_f1"], scores


def restore(run: Run, stage: int, state: dict | None, optimizer: Adam, coin: torch.Generator) -> dict:
    """What the last save says of this stage, put back where it came from; its beginning if it says nothing."""
    beginning = {"step": 0, "best": -math.inf, "worse": 0, "log_size": 0}
    if state is None or state["stage"] != stage:
        return beginning | ({"log_size": state["log_size"]} if state and state["stage"] < stage else {})
    with reading(state["path"]):
        run.model.load_state_dict(state["model"])
        optimizer.restore(state["optimizer"])
        torch.set_rng_state(state["rng"])
        coin.set_state(state["coin"])
        print(f"stage {stage}: goes on at step {state['step']}", flush=True)
        return {key: state[key] for key in beginning}


def gradients(
    run: Run, stage: int, step: int, batch: list[Example], coin: torch.Generator, asked: list
) -> dict[str, float | None]:
    """Backward through one batch, in --accumulate parts and shared out over the processes; the numbers for the log."""
    o, alpha, p = run.options, None, 0.0
    if stage == 2:
        alpha = {"sft": 1.0, "dss": o.alpha, "r2d": alpha_at(step, o.stage2_steps, o.warmup, o.alpha)}[o.method]
        if o.method == "r2d":
            p = p_predicted(step, o.stage2_steps, o.schedule, o.warmup, o.ramp, o.cap)
    coins = flip_coins(len(batch), p, coin)  # for the whole batch: the same coins whatever the number of processes
    totals = [
        sum(len(run.prompts.target(text)) for text in column)
        for column in zip(*((e.label, e.rationale) for e in batch), strict=True)
    ]
    sums, run.tokens = Counter(), 0
    for start in range(o.accumulate):
        rows = range(len(batch))[rank() :: world()][start :: o.accumulate]
        examples = [batch[i] for i in rows]
        log: dict[str, float] = {}
        if stage == 1:
            terms = stage1_loss(run, examples, totals, log)
        else:
            terms = stage2_loss(run, examples, totals, log, [coins[i] for i in rows], alpha)
        for term in terms:
            (world() * term).backward()  # DistributedDataParallel takes the mean over processes, and we want the sum
            sums["loss"] += term.item()
        sums.update(log)
    sums.update(tokens=run.tokens, asked=len(asked))  # Ctrl-C must stop all processes at the same step
    if world() > 1:
        values = torch.tensor([float(sums[key]) for key in sorted(sums)], device=run.device)
        dist.all_reduce(values)
        sums = {key: type(sums[key])(value) for key, value in zip(sorted(sums), values.tolist(), strict=True)}
    return {"loss_predict": None, "loss_explain": None, "alpha": alpha, "p_predicted": p, "used_predicted": 0, **sums}


def train(run: Run, stage: int, state: dict | None) -> None:
    """One stage: from the last save, or from the weights in `run.model`, to the best checkpoint, there and on disk.

    Best means the lowest validation loss in stage 1, and in stage 2 the highest validation macro-F1 in the last 35 %,
    which begin where the ramp ends (or later, with a longer ramp), for every method alike: the paper's code may keep a
    checkpoint from before any predicted label was seen. Early stopping counts from there as well.
    """
    o, model = run.options, run.model
    steps, patience, armed = o.stage1_steps, 3, 0
    if stage == 2:
        steps, patience, armed = o.stage2_steps, 5, max(0.65, o.warmup + o.ramp) * o.stage2_steps
    examples = run.data.stage1_train if stage == 1 else run.data.train
    lengths = [len(run.prompts.source(EXPLAIN, e.question)) for e in examples]
    optimizer = Adam(model)
    torch.manual_seed(1000 * o.seed + stage + 10**6 * rank())  # dropout
    coin = torch.Generator().manual_seed(1000 * o.seed + stage)
    state = restore(run, stage, state, optimizer, coin)
    start, best, worse = state["step"], state["best"], state["worse"]
    model.train()
    pause = 0.5 if sys.stderr.isatty() else 20  # seconds between two pictures of the bar
    screen = sys.stdout if rank() else None  # which `join` has sent to nowhere
    bar = tqdm(range(start, steps), f"stage {stage}", steps, initial=start, mininterval=pause, file=screen)

    def save(step: int) -> None:
        log.flush()
        state = {"stage": stage, "step": step, "best": best, "worse": worse, "log_size": log.tell()}
        state |= {"model": model.state_dict(), "optimizer": optimizer.state()}
        state |= {"rng": torch.get_rng_state(), "coin": coin.get_state()}
        save_checkpoint(run.out / "last.pt", state, previous=run.out / "previous.pt")

    with bar, finish_the_step() as asked, open(run.out / "log.jsonl" if rank() == 0 else os.devnull, "ab") as log:
        if rank() == 0:
            log.truncate(min(state["log_size"], log.tell()))  # what was logged after the last save is logged again
            log.seek(0, os.SEEK_END)
        if start == 0 and stage == 1:
            save(0)  # a stage1.pt without a last.pt is one of another run
        for step in bar:
            epoch, place = divmod(step, max(len(examples) // o.batch_size, 1))
            if place == 0 or step == start:
                batches = data.batch_order(lengths, o.batch_size, o.seed, epoch)
            began = time.perf_counter()
            batch = [examples[i] for i in batches[place]]
            model.zero_grad()
            parts = gradients(run, stage, step, batch, coin, asked)
            grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0).item()
            if not math.isfinite(grad_norm):
                raise InputError(f"stage {stage}, step {step}: the loss is {parts['loss']}; try a lower --lr")
            lr = lr_at(step, steps, o.lr)
            optimizer.step(lr)
            stop, speed = parts.pop("asked"), parts.pop("tokens") / (time.perf_counter() - began)
            line = {"stage": stage, "step": step, **parts, "lr": lr, "grad_norm": grad_norm}
            line["tokens_per_second"] = round(speed)
            bar.set_postfix({"loss": f"{line['loss']:.3f}", "P(predicted)": f"{line['p_predicted']:.2f}"}, False)
            done = step + 1
            check = done % o.eval_every == 0 or done == steps
            if check:
                score, scores = validate(run, stage)
                line |= scores
                if done >= armed:
                    worse = 0 if score > best else worse + 1
                    if score > best:
                        best = score
                        content = {"config": asdict(model.config), "weights": model.state_dict(), "step": done}
                        save_checkpoint(run.out / f"stage{stage}.pt", content)
            log.write((json.dumps(line) + "\n").encode())
            if check or stop:
                save(steps if worse >= patience else done)
            if stop:
                raise KeyboardInterrupt
            if worse >= patience:
                break
    load_weights(run, model, stage)


# ---------------------------------------------------------------------------------------------------------------------
# Evaluation: the same rationale under the gold, the predicted and a flipped label.


@torch.no_grad()
def nll_counts(run: Run, examples: list[Example], heads: list[str]) -> np.ndarray:
    """(n, 2): nats and tokens of each gold rationale, given the prompt that begins with each head."""

    def work(rows: list[int]) -> Iterable[tuple[float, int]]:
        labels = data.pad([targets[i] for i in rows], run.device)
        with run.autocast():
            nats = run.model.nll(data.pad([sources[i] for i in rows], run.device), labels).sum(1)
        return zip(nats.tolist(), (labels != 0).sum(1).tolist(), strict=True)

    sources = [run.prompts.source(head, e.question) for head, e in zip(heads, examples, strict=True)]
    targets = [run.prompts.target(e.rationale) for e in examples]
    order = sorted(range(len(examples)), key=lambda i: len(sources[i]))
    out = np.zeros((len(examples), 2))
    out[order] = np.reshape(in_batches(order, work), (-1, 2))
    return out


def flipped_labels(examples: list[Example], labels: list[str], seed: int) -> list[str]:
    """A wrong label for each example, drawn evenly from the others."""
    rng = np.random.default_rng(seed)
    others = ([label for label in labels if label != e.label] for e in examples)
    return [wrong[rng.integers(len(wrong))] for wrong in others]


@torch.no_grad()
def token_vectors(model: Transformer, prompts: Prompts, texts: list[str], device: str) -> dict[str, np.ndarray]:
    """{text: (tokens, D)}: the encoder's output for each token of a text but the end token; for BERTScore."""

    def work(some: list[str]) -> Iterable[np.ndarray]:
        rows = [[*prompts.target(text)[:-1], 1] for text in some]
        encoded = model.encode(data.pad(rows, device)).float().cpu().numpy()
        return (x[: len(row) - 1] for row, x in zip(rows, encoded, strict=True))

    unique = sorted(set(texts), key=lambda text: len(prompts.target(text)))
    return dict(zip(unique, in_batches(unique, work, share=False), strict=True))


def bertscore_vectors(run: Run, texts: list[str]) -> tuple[str | None, dict[str, np.ndarray]]:
    """Whose encoder it is, and its `token_vectors`: --bertscore's, or else this run's, from stage 1 if it had one."""
    o, path = run.options, run.out / "stage1.pt"
    if o.bertscore:
        model, tokenizer = load_pretrained(o.bertscore)
        return o.bertscore, token_vectors(model.to(run.device).eval(), Prompts(tokenizer, 512, 512), texts, run.device)
    if not run.model:
        return None, {}
    if not (o.has_stage1 and path.exists()):
        return "the model itself", token_vectors(run.model, run.prompts, texts, run.device)
    encoder = Transformer(run.model.config).to(run.device).eval()
    load_weights(run, encoder, 1)
    return "stage1.pt of this run", token_vectors(encoder, run.prompts, texts, run.device)


def answers(run: Run, flipped: list[str]) -> tuple[list[str], dict[str, list[str]], dict[str, list[str]]]:
    """Predicted labels; {condition: labels in the prompts}; {condition: the rationales they led to}; for test."""
    o, test, labels = run.options, run.data.test, run.data.labels
    questions, gold = [e.question for e in test], [e.label for e in test]
    if o.method == "zeroshot":
        chat = metrics.Chat(o.llm, o.llm_model, run.out / "llm.jsonl")
        rows = list(tqdm(metrics.zero_shot(chat, questions, labels), "zero-shot", len(test)))
        predicted, texts = map(list, zip(*rows, strict=True))
        return predicted, {"predicted": predicted}, {"predicted": texts}
    run.model.eval()
    predicted = predict_labels(run, questions)
    conditions = {"gold": gold, "predicted": predicted, "flipped": flipped}
    if o.method != "r2d":  # DSS explains without seeing a label: one condition. SFT does not explain.
        conditions = {"predicted": predicted} if o.method == "dss" else {}
    # all at once: a prompt is decoded once, and gold and predicted labels are mostly equal
    texts = explain(run, questions * len(conditions), [label for given in conditions.values() for label in given])
    return predicted, conditions, {name: texts[i * len(test) :][: len(test)] for i, name in enumerate(conditions)}


def evaluate(run: Run) -> dict:
    """Write predictions.jsonl and metrics.json for the test split, and return what the latter holds (keys: README)."""
    o, test, labels = run.options, run.data.test, run.data.labels
    print(f"evaluation of {len(test)} test examples: label, then rationale under every condition", flush=True)
    gold, flipped = [e.label for e in test], flipped_labels(test, labels, o.seed)
    predicted, conditions, texts = answers(run, flipped)
    lines = []
    for i, example in enumerate(test):
        row = {**vars(example), "predicted_label": predicted[i], "flipped_label": flipped[i]}
        for name in ("predicted", "gold", "flipped"):
            row[f"rationale_given_{name}"] = texts[name][i] if name in texts else None
        lines.append(json.dumps(row, ensure_ascii=False) + "\n")
    write_file(run.out / "predictions.jsonl", "".join(lines).encode())

    label = metrics.label_scores(gold, predicted, labels)
    majority = [Counter(e.label for e in run.data.train).most_common(1)[0][0]] * len(test)
    for name, baseline in (("majority", majority), ("ceiling", run.data.ceiling)):
        if baseline:
            label[f"{name}_accuracy"] = metrics.accuracy(gold, baseline)
            label[f"{name}_macro_f1"] = metrics.macro_f1(gold, baseline, labels)
    trained = o.method != "zeroshot" and (run.out / "stage2.pt").exists()
    updates = trained * (o.stage2_steps + o.stage1_steps * o.has_stage1)
    result = {"method": o.method, "data": o.data, "seed": o.seed, "updates": updates, "label": label}
    if texts and any(e.rationale for e in test):
        result |= rationale_report(run, conditions, texts)
    write_json(run.out / "metrics.json", result)
    wait_for_all()  # nobody reads before it is written
    return result


def rationale_report(run: Run, conditions: dict[str, list[str]], texts: dict[str, list[str]]) -> dict:
    """The groups rationale, exposure and self of metrics.json: how good and how faithful the explanations are."""
    o, test, mean = run.options, run.data.test, metrics.mean_and_interval
    gold, references = [e.label for e in test], [e.rationale for e in test]
    explained = [e for e in run.data.train if e.rationale]
    reader = metrics.Reader([e.rationale for e in explained], [e.label for e in explained], run.data.labels)
    argues = data.argues_for if o.data == "triage" else reader
    encoder, vectors = bertscore_vectors(run, references + [text for column in texts.values() for text in column])

    scored = [i for i, text in enumerate(references) if text]
    wrong = [i for i in scored if conditions["predicted"][i] != gold[i]]
    report, nll = {}, {}  # nll of every pair of a note and a label, most of them in several conditions
    if run.model:
        pairs = sorted({(i, column[i]) for column in conditions.values() for i in scored})
        heads = [explain_head(o.method, label) for _, label in pairs]
        nll = dict(zip(pairs, nll_counts(run, [test[i] for i, _ in pairs], heads), strict=True))
    for name, rows in (("gold", scored), ("predicted", scored), ("flipped", scored), ("predicted_wrong", wrong)):
        condition = name.removesuffix("_wrong")
        if condition not in conditions or not rows:
            continue
        given, written = conditions[condition], texts[condition]
        columns = ([column[i] for i in rows] for column in (written, references, given, gold))
        scores = report[name] = metrics.rationale_scores(*columns, argues)
        if encoder:
            f1 = [metrics.bertscore(vectors[written[i]], vectors[references[i]])[2] for i in rows]
            scores |= mean("bertscore_f1", f1)
        if run.model:
            scores |= metrics.ratio_and_interval("nll", *np.array([nll[i, given[i]] for i in rows]).T)
        if o.data == "triage":
            scores |= mean("grounded", [100 * (not data.ungrounded(written[i], test[i].question)) for i in rows])
        if o.judge:
            chat = metrics.Chat(o.judge, o.judge_model, run.out / "judge.jsonl")
            columns = ((test[i].question, given[i], written[i], references[i]) for i in rows)
            asked = [dict(zip(("question", "label", "text", "reference"), row, strict=True)) for row in columns]
            scores |= metrics.judge_scores(list(tqdm(metrics.judge(chat, asked), f"judge, {name}", len(rows))))
    result = {"argues_by": "checker" if o.data == "triage" else "reader", "bertscore_encoder": encoder}
    result |= {"rationale": report} | ({"judge": o.judge_model} if o.judge else {})
    if "gold" in report:
        result["exposure"] = {f"{key}_gap": report["gold"][key] - report["predicted"][key] for key in ("bleu", "nll")}
        flipped = report["flipped"]  # every label is wrong there
        result["exposure"] |= {"following": flipped["argues_given"], "following_ci95": flipped["argues_given_ci95"]}
    result["self"] = mean("reader_accuracy", [100 * (reader(references[i]) == gold[i]) for i in scored])
    if run.model:
        # The paper's P2 and Pg: the model reads its own rationale, or the gold one, as if it were a question.
        again, from_gold = predict_labels(run, texts["predicted"]), predict_labels(run, references)
        result["self"] |= mean("consistency", [100 * (again[i] == conditions["predicted"][i]) for i in scored])
        result["self"] |= mean("sufficiency", [100 * (again[i] == gold[i]) for i in scored])
        result["self"] |= mean("gold_robustness", [100 * (from_gold[i] == gold[i]) for i in scored])
    return result


def table(result: dict) -> str:
    """metrics.json as text: conditions on neighbouring lines; +- is half the width of the 95 % interval."""

    def cell(scores: dict, key: str, digits: int = 1) -> str:
        low, high = scores.get(f"{key}_ci95", (0, 0))
        return f"{scores[key]:.{digits}f} +-{(high - low) / 2:.{digits}f}".rjust(14) if key in scores else "-".rjust(14)

    label = result["label"]
    run = f"{result['method']} on {result['data']}, seed {result['seed']}"
    lines = [f"{run}, {label['n']} test examples, scores 0-100", ""]
    lines += [f"{'label':18}{'accuracy':>14}{'macro-F1':>14}{'no label':>14}"]
    lines += [f"{'  model':18}" + "".join(cell(label, key) for key in ("accuracy", "macro_f1", "invalid"))]
    baselines = {"majority": "always the most frequent label", "ceiling": "the best that any model can reach"}
    for name, what in baselines.items():
        if f"{name}_accuracy" in label:
            numbers = "".join(f"{label[f'{name}_{key}']:.1f}     ".rjust(14) for key in ("accuracy", "macro_f1"))
            lines += [f"  {name:16}{numbers}  {what}"]
    if "rationale" not in result:
        return "\n".join(lines)
    keys = ["bleu", "sentence_bleu", "bertscore_f1", "nll", "argues_given", "argues_gold"]
    keys += ["grounded"] * (result["argues_by"] == "checker")
    grades = ["judge_supports", "judge_grounded", "judge_agrees", "judge_malformed"]
    blocks = {"rationale under": keys} | ({"judged 1-5 under": grades} if "judge" in result else {})
    for title, keys in blocks.items():
        heads = "".join(key.removeprefix("judge_").replace("_", " ").rjust(14) for key in keys)
        lines += ["", f"{title:18}{heads}     n"]
        for name, scores in result["rationale"].items():
            row = "".join(cell(scores, key, 2 if key == "nll" or key in grades[:3] else 1) for key in keys)
            lines += [f"  {name.replace('_', ', '):16}{row}{scores['n']:6}"]
    lines += ["", f"BERTScore's encoder: {result['bertscore_encoder'] or 'none, see --bertscore'}"]
    if "judge" in result:
        lines += [f"the judge is {result['judge']}, a language model; malformed: share of its answers, 0-100"]
    if "exposure" in result:
        gap = result["exposure"]
        gaps = f"BLEU {gap['bleu_gap']:.1f}, nll {gap['nll_gap']:.3f} nats"
        lines += [f"exposure bias (gold minus predicted): {gaps}"]
        lines += [f"follows a wrong label in the prompt: {gap['following']:.1f}"]
    own = [
        f"{key.replace('_', ' ')} {result['self'][key]:.1f}"
        for key in ("consistency", "sufficiency", "gold_robustness")
        if key in result["self"]
    ]
    lines += ["by the model itself: " + ", ".join(own)] if own else []
    lines += [f"an independent reader gets {result['self']['reader_accuracy']:.1f} of the gold rationales right"]
    return "\n".join(lines)


def print_result(run: Run, result: dict) -> None:
    """The table, then three test notes, one of them misjudged, with what the model says of them."""
    print("\n" + table(result))
    lines = (run.out / "predictions.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    right, wrong = ([row for row in rows if (row["label"] == row["predicted_label"]) == same] for same in (True, False))
    for row in (right[:2] + wrong + right[2:])[:3]:
        print(f"\nnote       {row['question'][:500]}\ngold       {row['label']}: {row['rationale'][:500]}")
        print(f"model      {row['predicted_label'][:500]}: {(row['rationale_given_predicted'] or '-')[:500]}")
    print(f"\nfiles in {run.out}: {' '.join(sorted(path.name for path in run.out.iterdir()))}")


# ---------------------------------------------------------------------------------------------------------------------
# The command line.


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:
        raise InputError(f"{message}; python r2d.py -h lists the options")


def parse_options(arguments: list[str] | None) -> dict:
    """Only the options that were given, {name: value}. Raises InputError."""
    style = argparse.RawDescriptionHelpFormatter
    parser = Parser("r2d.py", description=__doc__, formatter_class=style, allow_abbrev=False)
    for f in fields(Options):
        text, choices = f.metadata["help"].replace("%", "%%"), f.metadata["choices"] or None
        shown = f" (default {f.default})" if f.default is not None else ""  # None: the text says it
        shared = {"default": argparse.SUPPRESS, "help": text + shown}
        if isinstance(f.default, bool):
            shared |= {"action": "store_true", "help": f"{text} (default off)"}
        else:
            kind = type(f.default) if f.default is not None else get_args(f.type)[0]
            if several := get_args(kind):  # tuple[str, ...]
                kind, shared["nargs"] = several[0], "+"
            shared |= {"type": kind, "choices": choices, "metavar": f.metadata["metavar"]}
        parser.add_argument("--" + f.name.replace("_", "-"), **shared)
    return vars(parser.parse_args(arguments))


def check(o: Options) -> None:
    """Raises InputError for options out of range or in conflict."""
    ranges = {
        "warmup": (0, 1), "ramp": (0, 1), "cap": (0, 1), "alpha": (0, 1), "dropout": (0, 0.99), "lr": (1e-8, 1),
        "stage1_steps": (1, 10**9), "stage2_steps": (1, 10**9),
        "batch_size": (1, 10**6), "accumulate": (1, 10**6), "eval_every": (1, 10**9),
        "width": (4, 10**5), "layers": (1, 1000), "heads": (1, 1000), "vocab_size": (400, 10**6), "seed": (0, 2**31),
        "max_source": (32, 10**5), "max_target": (2, 10**5), "limit": (1, 10**9),
    }  # fmt: skip
    for name, (low, high) in ranges.items():
        value, flag = getattr(o, name), name.replace("_", "-")
        need(value is None or low <= value <= high, f"--{flag} {value}: must be between {low} and {high}")  # nor nan
    zeroshot, several = o.method == "zeroshot", o.data == "triage" or o.rationales == o.stage1_rationales == "llm"
    alone, judged = not (o.stage == 1 or o.ask or o.init), o.method != "sft" and o.stage == 2 and not o.ask
    asks = o.judge or zeroshot
    has_t5 = not o.bertscore or (Path(o.bertscore) / "spiece.model").is_file()
    rules = {
        f"--warmup {o.warmup} and --ramp {o.ramp}: together they must not pass 1": o.warmup + o.ramp <= 1,
        f"--width {o.width}: must be a multiple of --heads {o.heads}": o.width % o.heads == 0,
        "--eval, --ask and --fresh: give one of them": o.eval + o.fresh + (o.ask is not None) <= 1,
        "--ask: the text is empty; give the note in quotes": o.ask is None or o.ask.strip(),
        "--rationales and --stage1-rationales: only --data triage has several sources": several,
        "--method zeroshot: needs --llm URL and --llm-model NAME": not zeroshot or (o.llm and o.llm_model),
        "--method zeroshot: trains nothing; leave out --stage 1, --ask and --init": not zeroshot or alone,
        "--llm and --llm-model: are for --method zeroshot": zeroshot or not (o.llm or o.llm_model),
        "--judge and --method zeroshot: ask in one process; leave torchrun out": world() == 1 or not asks,
        "--seeds: is for --compare METHOD ...; one run takes --seed N": o.compare or not o.seeds,
        "--judge URL and --judge-model NAME: give both": bool(o.judge) == bool(o.judge_model),
        "--judge: there are no rationales to judge; leave it out": not o.judge or judged,
        "--ask: holds half a character; write the note in UTF-8": not re.search("[\ud800-\udfff]", o.ask or ""),
        "--init, --bertscore, --judge: the text is empty; leave it out": "" not in (o.init, o.bertscore, o.judge),
        f"--bertscore {o.bertscore}: no T5 there; give a folder with spiece.model": has_t5,
    }
    for message, holds in rules.items():
        need(holds, message)
    for url in {o.judge, o.llm} - {None}:
        metrics.Chat(url, "", Path(os.devnull))  # raises ConnectionError for what is no URL, before anything is trained


def read_config(out: Path) -> dict:
    """The config.json of a run. Raises InputError if it is not one of this version."""
    try:
        saved = json.loads((out / "config.json").read_text(encoding="utf-8"))
        if not (isinstance(saved["labels"], list) and all(isinstance(label, str) for label in saved["labels"])):
            raise ValueError
        for f in fields(Options):  # edited by hand?
            value, kind = saved[f.name], get_args(f.type) or f.type
            if f.name in IDENTITY and not (isinstance(value, kind) and value in (f.metadata["choices"] or [value])):
                raise ValueError
        return saved | {"model": saved["model"] and asdict(ModelConfig(**saved["model"]))}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        path = out / "config.json"
        raise InputError(f"{path}: not a file of this version of the program; give another --out") from None


def settle_options(given: dict) -> Options:
    """The options of this call: those given, or else those of the run in --out, or else the defaults."""
    out, saved = Path(given.get("out", Options.out)), {}
    if (out / "config.json").exists() and not given.get("fresh"):
        saved = {name: value for name, value in read_config(out).items() if name in IDENTITY}
    for name in sorted(saved.keys() & given.keys() - {"llm"}):  # an endpoint may move
        was = f"--{name.replace('_', '-')} {given[name]}: the run in {out} has {saved[name]}"
        need(saved[name] == given[name], f"{was}; give another --out, or --fresh to start over")
    shape = [f"--{name.replace('_', '-')}" for name in ("width", "layers", "heads", "vocab_size") if name in given]
    options = Options(**{**saved, **given})
    need(not (options.init and shape), f"{' '.join(shape)}: the checkpoint of --init has its own shape; leave it out")
    check(options)
    return options


def load_pretrained(folder: str, dropout: float = 0.0) -> tuple[Transformer, Tokenizer]:
    """A T5 checkpoint and its own tokenizer. Raises InputError."""
    tokenizer = Tokenizer.load(Path(folder) / "spiece.model")
    try:
        model = load_t5(Path(folder), dropout)
    except ValueError as e:
        raise InputError(str(e)) from None
    size, known = model.config.vocab_size, len(tokenizer)
    need(known <= size, f"{folder}: spiece.model has {known} pieces for weights of {size}; it is another checkpoint's")
    return model, tokenizer


def prepare(o: Options, labels: list[str] | None = None) -> Run:
    """Data, tokenizer and untrained model of a run; with `labels`, no examples. Raises InputError, writes nothing."""
    out, device = Path(o.out), o.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    there = device == "cpu" or getattr(torch, device).is_available()
    need(there, f"--device {device}: this machine has none; use --device cpu")
    if labels:
        dataset = Dataset([], [], [], labels, [], [])
    else:
        dataset = data.load_data(o.data, o.seed, o.limit, o.rationales, o.stage1_rationales)
        some = o.method == "sft" or any(e.rationale for e in dataset.train)
        need(some, f"{o.data}: no train example has a rationale; fill the column, or use --method sft")
        least = min(o.batch_size, len(dataset.train))
        enough = o.method == "zeroshot" or least >= o.accumulate * world()
        need(enough, f"--accumulate {o.accumulate}: {world()} processes cannot share a batch of {least} in these parts")
    epoch = max(len(dataset.train) // o.batch_size, 1)
    stage1 = o.stage1_steps or min(200, 20 * epoch)
    stage2 = o.stage2_steps or min(1200, 20 * epoch) + stage1 * (not o.has_stage1)  # equal budgets: stage 1's go there
    lr = o.lr or (1e-3 if o.init else 2e-2)  # T5 was fine-tuned at 1e-3 relative to the size of its tensors
    o = dataclasses.replace(o, stage1_steps=stage1, stage2_steps=stage2, lr=lr)
    if o.method == "zeroshot":
        return Run(o, dataset, None, None, device)
    torch.manual_seed(o.seed)
    known = (out / "tokenizer.model").exists() and not o.fresh
    if known and (out / "config.json").exists() and not labels:
        same = read_config(out).get("data_sha256") == dataset.sha256()
        need(same, f"{o.data}: changed since the run in {out} began; give another --out, or --fresh to start over")
    if o.init and not (known and begun(out)):
        model, tokenizer = load_pretrained(o.init, o.dropout)
    else:
        if known:
            tokenizer = Tokenizer.load(out / "tokenizer.model")
        else:
            texts = [text for e in dataset.train + dataset.stage1_train for text in (e.question, e.label, e.rationale)]
            tokenizer = Tokenizer.train([EXPLAIN, PREDICT, EXPLAIN_GIVEN, *dataset.labels, *texts], o.vocab_size)
        shape = (o.width, o.heads, o.width // o.heads, 4 * o.width, o.layers, o.layers, o.dropout)
        config = ModelConfig(**read_config(out)["model"]) if o.init else ModelConfig(len(tokenizer), *shape)
        model = Transformer(config)
    prompts = Prompts(tokenizer, o.max_source, o.max_target)
    for label in dataset.labels:
        fits, shown = len(prompts.ids(label)) < o.max_target, label[:50]
        need(fits, f"{o.data}: the label {shown!r} is longer than --max-target; raise that, or rename it")
        same = tokenizer.decode(prompts.target(label)) == label
        need(same, f"{o.data}: the tokenizer cannot write the label {shown!r}; rename it")
        short = len(prompts.ids(EXPLAIN_GIVEN.format(label=label))) <= o.max_source // 2
        need(short, f"{o.data}: the label {shown!r} fills half of a prompt; rename it or raise --max-source")
    run = Run(o, dataset, prompts, model.to(device), device)
    if dist.is_initialized():
        run.nll = DistributedDataParallel(Loss(model))
    if o.compile:
        run.nll = torch.compile(run.nll, dynamic=True)
    return run


def describe(run: Run) -> None:
    """What will be trained on what; how many questions are too long."""
    o, d = run.options, run.data
    size = sum(p.numel() for p in run.model.parameters())
    splits = {"train": d.train, "val": d.val, "test": d.test}
    counts = ", ".join(f"{len(split)} {name}" for name, split in splits.items())
    print(f"{o.data}: {counts} examples, {len(d.labels)} labels; a model of {size:,} weights on {run.device}")
    head = max((EXPLAIN_GIVEN.format(label=label) for label in d.labels), key=lambda text: len(run.prompts.ids(text)))
    room, trained = o.max_source - len(run.prompts.ids(head)) - 1, {e.question for e in d.train}
    for name, split in splits.items():
        if seen := sum(e.question in trained for e in split) * (name != "train"):
            print(f"note: {seen} of {len(split)} {name} questions also stand in train")
        if cut := sum(len(run.prompts.ids(e.question)) > room for e in split):
            print(f"note: {cut} of {len(split)} {name} questions are cut at the end to fit --max-source {o.max_source}")
        if cut := sum(len(run.prompts.ids(e.rationale)) >= o.max_target for e in split):
            print(f"note: {cut} of {len(split)} {name} rationales are cut to fit --max-target {o.max_target}")


def start(run: Run) -> None:
    """Write what does not change in the folder of a run: config.json and tokenizer.model."""
    o, out = run.options, run.out
    versions = {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__}
    versions["sentencepiece"] = sentencepiece.__version__
    shape = {"labels": run.data.labels, "model": run.model and asdict(run.model.config)}
    write_json(out / "config.json", {**asdict(o), **shape, "data_sha256": run.data.sha256(), "versions": versions})
    if run.prompts:
        write_file(out / "tokenizer.model", run.prompts.tokenizer.model)


def ask(o: Options) -> None:
    """One note, one label, one rationale: what a user of the model sees. Needs no data, only the folder of the run."""
    run = prepare(o, read_config(Path(o.out))["labels"])
    load_weights(run, run.model, 2)
    label = predict_labels(run, [o.ask])[0]
    print(f"label      {label}")
    if o.method != "sft":
        print(f"rationale  {explain(run, [o.ask], [label])[0]}")


def job(o: Options) -> None:
    """What one command does: ask, evaluate, or train and evaluate. Goes on where an earlier call was stopped."""
    out = Path(o.out)
    trained = (out / "stage2.pt").exists() or o.method == "zeroshot"
    goes_on = not (o.eval or o.ask or o.fresh)
    state = last_state(out) if goes_on else None
    # an --eval may have come before the end of the training, so metrics.json alone does not tell
    done = state is None or (state["stage"] == 2 and state["step"] >= (o.stage2_steps or 0))
    if goes_on and o.stage == 2 and trained and (out / "metrics.json").exists() and done:
        return print(f"{out} holds a finished run, see its metrics.json; --eval scores it again, --fresh starts over")
    usable = trained or not (o.eval or o.ask) or (o.init and not o.ask and not begun(out))
    need(usable, f"{out / 'stage2.pt'}: no such checkpoint; train first, or give a finished run to --out")
    if o.ask:
        return ask(o)
    run = prepare(o)
    with alone(out, o.fresh):
        if not (o.eval and trained):
            start(run)
        elif run.model:
            load_weights(run, run.model, 2)
        if not o.eval and run.model:
            describe(run)
            (out / "metrics.json").unlink(missing_ok=True)  # of an evaluation before: what has one counts as finished
            if o.stage == 1 or o.has_stage1:
                if (out / "stage1.pt").exists() and (state is None or state["stage"] == 2):  # done, or from another run
                    load_weights(run, run.model, 1)
                else:
                    train(run, 1, state)
                    state = last_state(out)
            if o.stage == 1:
                return
            train(run, 2, state)
        print_result(run, evaluate(run))


# What --compare shows: the name of a column, and where its number stands in metrics.json.
COMPARED = {
    "macro_f1": "label macro_f1", "accuracy": "label accuracy", "bleu": "rationale predicted bleu",
    "bleu_gold": "rationale gold bleu", "bleu_gap": "exposure bleu_gap",
    "argues_given": "rationale predicted argues_given", "argues_gold": "rationale predicted argues_gold",
    "wrong_given": "rationale predicted_wrong argues_given", "following": "exposure following",
}  # fmt: skip


def compare(given: dict) -> None:
    """Every method of --compare on every seed, a folder each; finished runs are skipped. Writes compare.json."""
    items, seeds = dict.fromkeys(given.pop("compare")), list(dict.fromkeys(given.pop("seeds", range(5))))
    out, plan = Path(given.pop("out", "compare")), []
    refused = sorted({"seed", "method", "ask", "stage"} & given.keys())
    need(not refused, f"--{' --'.join(refused)}: not together with --compare METHOD ... --seeds N ...")
    if "stage2_steps" in given:
        given.setdefault("stage1_steps", 200)
    for seed in seeds:
        for item in items:
            method, *changes = item.split(",")
            need(not {"h", "help"} & {*changes}, f"--compare {item}: give python r2d.py -h for help")
            own = parse_options(["--method", method, *(f"--{change}" for change in changes)])
            wrong = sorted(own.keys() & (FREE | {"seed"}))
            need(not wrong, f"--compare {item}: {wrong} is for the whole comparison; give it as an option")
            apart = {"llm", "llm_model"} if method != "zeroshot" else set()
            apart |= {"judge", "judge_model"} if method == "sft" else set()
            own = {name: value for name, value in given.items() if name not in apart} | own
            if "stage2_steps" in given and not Options(**own).has_stage1:  # equal budgets, as in `prepare`
                own["stage2_steps"] = given["stage2_steps"] + given["stage1_steps"]
            folder = out / f"{re.sub('[^a-zA-Z0-9.-]+', '_', item)}-{seed}"
            plan.append((item, settle_options({**own, "seed": seed, "out": str(folder)})))
    results = {item: [] for item in items}
    for item, o in plan:
        print(f"\n{item}, seed {o.seed}", flush=True)
        job(o)
        path = Path(o.out) / "metrics.json"
        try:
            results[item].append(json.loads(path.read_text(encoding="utf-8")))
        except ValueError:
            raise InputError(f"{path}: damaged; delete it and give the same command again") from None

    def number(result: dict, path: str) -> float:
        found = functools.reduce(lambda group, key: group.get(key, {}), path.split(), result)
        return math.nan if found == {} else found

    scores = {
        item: np.array([[number(result, path) for path in COMPARED.values()] for result in column])  # (seeds, scores)
        for item, column in results.items()
    }
    rows = {}
    for item in items:
        rows[item] = {"updates": results[item][0]["updates"], "seeds": seeds}
        for key, values, base in zip(COMPARED, scores[item].T, scores.get("r2d", scores[item]).T, strict=True):
            known = [None if math.isnan(value) else value for value in values.tolist()]
            rows[item][key] = {"values": known, **metrics.mean_over_seeds(values)}
            rows[item][key]["minus_r2d"] = metrics.mean_over_seeds(values - base)
    write_json(out / "compare.json", rows)
    print("\n" + comparison(rows))


def comparison(rows: dict) -> str:
    """compare.json as text: levels, then differences from r2d on the same seeds."""

    def level(score: dict) -> str:
        low, high = score["ci95"] or (math.nan, math.nan)
        return "-" if score["mean"] is None else f"{score['mean']:.1f} +-{(high - low) / 2:.1f}"

    def difference(score: dict) -> str:
        base = score["minus_r2d"]
        return "-" if base["p"] is None else f"{base['mean']:+.1f} p={base['p']:.3f}"

    width = max(map(len, rows)) + 2
    lines = ["".ljust(width) + "updates  seeds" + "".join(key.replace("_", " ").rjust(14) for key in COMPARED)]
    for cell in (level, difference):
        lines += ["mean over the seeds" if cell is level else "minus r2d on the same seeds"]
        for item, row in rows.items():
            if cell is level or item != "r2d":
                cells = "".join(cell(row[key]).rjust(14) for key in COMPARED)
                lines += [f"{item.ljust(width)}{row['updates']:7}{len(row['seeds']):7}{cells}"]
    lines += ["+- half of the 95 % interval over seeds (Student's t); p: paired t-test, two-sided, each on its own"]
    lines += ["checkpoint of every method: best validation macro-F1 in the last 35 % of stage 2"]
    return "\n".join(lines)


def join(given: dict) -> None:
    """Under torchrun, become one of several processes: each its own device, all but the first silent."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not dist.is_initialized():
        on_gpu = torch.cuda.is_available() and given.get("device", "auto") in ("auto", "cuda")
        if on_gpu:
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("nccl" if on_gpu else "gloo")
        if rank() > 0:
            sys.stdout = open(os.devnull, "w", encoding="utf-8")


def main(arguments: list[str] | None = None) -> int:
    """The exit status: 0 done, 2 wrong options or bad input, 130 stopped by Ctrl-C."""
    out = Options.out
    try:
        given = parse_options(arguments)
        out = given.get("out", out)
        join(given)
        if given.get("compare"):
            compare(given)
        else:
            job(settle_options(given))
    except (InputError, ConnectionError) as e:
        print(f"r2d.py: {' '.join(str(e).split())}", file=sys.stderr)
        return 2
    except OSError as e:
        print(f"r2d.py: {e.filename or out}: {e.strerror}; free some space or give another --out", file=sys.stderr)
        return 2
    except RuntimeError as e:
        if world() == 1:
            raise
        lost = f"process {rank()} lost the others ({type(e).__name__})"
        print(f"r2d.py: {lost}; the same command goes on", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nstopped; the same command again goes on where it was last saved", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(encoding="utf-8", errors="replace")  # a note may hold what a Windows console cannot show
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # outside of training as well, like Ctrl-C
    sys.exit(main())
