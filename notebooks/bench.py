"""Ours against a transformers T5 trained as the paper's stage 2 is: python notebooks/bench.py

Both have the same weights, train on the same notes, with AdamW and without dropout, in turn, in one
process; a row has medians and their ratio (above 1: ours is better). The peer takes notes in the
order of the data, generates labels for the whole batch, then draws the coins. A row more has ours
with Muon, the default. Prints a table, then JSON. Needs tests/requirements.txt, as race.py does.
"""

import argparse
import json
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import fields
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import r2d
from data import Example, columns, make_batches
from model import rename_t5

SIZES = {"default": [], "t5-small": "--width 512 --layers 6 --heads 8 --vocab-size 8000".split()}
SIZES["tiny"] = "--width 16 --layers 1 --heads 2 --vocab-size 400 --notes 100".split()
PEER_BATCH = 32  # rationales that the peer writes together


def our_run(size: str, steps: int, out: Path) -> r2d.Run:
    """A run with some updates of stage 1 behind it, so that rationales end where real ones do."""
    out.mkdir(parents=True, exist_ok=True)
    arguments = [*SIZES[size], "--out", str(out), "--stage1-steps", str(steps), "--device", "cpu"]
    run = r2d.setup(r2d.parse_args(arguments))
    r2d.train(run, 1, run.dataset.stage1_train, steps, r2d.stage1_loss, since=0, patience=3)
    return run


def t5_weights(model: torch.nn.Module, peer: dict[str, Tensor]) -> dict[str, Tensor]:
    """Our weights under the peer's names: model.rename_t5 turned round."""
    ours, state = model.state_dict(), {}
    for name, weight in peer.items():
        our_name = "embedding.weight"  # the embedding and its copies
        if weight.shape != ours[our_name].shape:
            (our_name,) = rename_t5({name: weight})
        state[name] = ours[our_name]
    return state


class Peer:
    """T5ForConditionalGeneration with our weights, and the authors' kind of update."""

    def __init__(self, run: r2d.Run, dropout: float):
        from transformers import T5Config, T5ForConditionalGeneration, logging

        logging.set_verbosity_error()
        self.run = run
        c = run.model.config
        sizes = {field.name: getattr(c, field.name) for field in fields(c)[:7]}  # named as in T5
        config = T5Config(**sizes, dropout_rate=dropout, decoder_start_token_id=0)
        self.model = T5ForConditionalGeneration(config)
        self.model.load_state_dict(t5_weights(run.model, self.model.state_dict()))
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-5, weight_decay=0.0)
        self.model.train()

    def loss(self, prompts: list[str], targets: list[str]) -> Tensor:
        ids = self.run.tokenizer.to_ids(prompts, 256)
        labels = self.run.tokenizer.to_ids(targets, 256)
        labels = labels.masked_fill(labels == 0, -100)
        return self.model(input_ids=ids, attention_mask=(ids != 0).long(), labels=labels).loss

    def generate(self, prompts: list[str], limit: int) -> list[str]:
        texts = []
        for start in range(0, len(prompts), PEER_BATCH):
            ids = self.run.tokenizer.to_ids(prompts[start : start + PEER_BATCH], 256)
            greedy = {"max_new_tokens": limit, "num_beams": 1, "do_sample": False}
            out = self.model.generate(ids, attention_mask=(ids != 0).long(), **greedy)
            texts += [self.run.tokenizer.to_text(row) for row in out[:, 1:].tolist()]
        return texts

    def step(self, batch: list[Example], stage: int, p: float) -> None:
        questions, labels, rationales = columns(batch)
        if stage == 1:
            loss = self.loss([f"explain: {question}" for question in questions], rationales)
        else:
            prompts = [f"predict: {question}" for question in questions]
            loss = 0.7 * self.loss(prompts, labels)
            if p > 0:
                for i, label in enumerate(self.generate(prompts, self.run.label_tokens)):
                    if random.random() < p:
                        labels[i] = label
            prompts = r2d.explain_prompts(self.run, labels, questions)
            loss = loss + 0.3 * self.loss(prompts, rationales)
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()


def our_optimizers(run: r2d.Run, name: str) -> list[torch.optim.Optimizer]:
    optimizers = run.model.make_optimizers(name)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = 1e-5 * group["relative_lr"]  # the weights hardly move
    return optimizers


def our_step(run: r2d.Run, optimizers: list, batch: list[Example], stage: int, p: float) -> None:
    o = run.options
    o.warmup, o.ramp, o.cap = 0.0, 0.0, p  # so P(predicted) is p from the first update on
    loss_of = r2d.stage1_loss if stage == 1 else r2d.stage2_loss
    loss, _ = loss_of(run, batch, 0)
    run.model.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(run.model.parameters(), 1.0)
    for optimizer in optimizers:
        optimizer.step()


def in_turn(tries: int, *works: Callable) -> list[float]:
    """Median seconds of each work, in turn on the same item, after one try without the clock."""
    times = [[] for _ in works]
    for i in range(-1, tries):
        for work, column in zip(works, times, strict=True):
            began = time.perf_counter()
            work(max(i, 0))
            column.append(time.perf_counter() - began)
    return [statistics.median(column[1:]) for column in times]


def show(rows: dict, name: str, unit: str, ours: float, peer: float) -> None:
    """Print a row: ours, the peer's, the ratio; keep it."""
    ratio = ours / peer if unit == "tokens/s" else peer / ours
    rows[name] = {"unit": unit, "ours": ours, "peer": peer, "ratio": ratio}
    print(f"{name:40}{unit:>9}{ours:9.1f}{peer:9.1f}{ratio:7.2f}", flush=True)


def compare_steps(run: r2d.Run, tries: int, rows: dict) -> None:
    size, train = run.options.batch_size, run.dataset.train
    batches = make_batches(train, size, seed=0, epoch=0)
    peer = Peer(run, dropout=0.0)
    run.model.train()

    def row(name: str, stage: int, p: float, optimizers: list) -> None:
        seconds = in_turn(
            tries,
            lambda i: our_step(run, optimizers, batches[i], stage, p),
            lambda i: peer.step(train[i * size : (i + 1) * size], stage, p),
        )
        show(rows, name, "ms", *[1000 * s for s in seconds])

    adamw = our_optimizers(run, "adamw")
    row("update, stage 1", 1, 0.0, adamw)
    for p in (0.0, 0.5, 0.9):
        row(f"update, stage 2, P(predicted) {p}", 2, p, adamw)
    row("the same, ours with Muon", 2, 0.9, our_optimizers(run, "muon"))


def compare_rationales(run: r2d.Run, notes: int, rows: dict) -> None:
    peer = Peer(run, dropout=0.0)
    peer.model.eval()
    questions, gold, _ = columns(run.dataset.test[:notes])
    prompts = r2d.explain_prompts(run, gold, questions)
    limit = run.options.max_target

    def ours(i: int) -> list[str]:
        return r2d.generate_texts(run, prompts, limit)

    tokens = run.tokenizer.to_ids(ours(0), limit).count_nonzero().item()
    for size in (PEER_BATCH, r2d.AT_ONCE):
        r2d.AT_ONCE = size
        seconds = in_turn(3, ours, lambda i: peer.generate(prompts, limit))
        title = f"rationales, ours in {size}s, peer's in {PEER_BATCH}s"
        show(rows, title, "tokens/s", *[tokens / s for s in seconds])


def memory_run(who: str, run: r2d.Run) -> None:
    """Ten updates of stage 2 at P = 0.9; prints the peak memory of the process, in MB."""
    run.model.train()
    step = partial(our_step, run, our_optimizers(run, "adamw"))
    if who == "peer":
        step = Peer(run, dropout=0.0).step
        run.model = None  # ours must not count
    for batch in make_batches(run.dataset.train, run.options.batch_size, 0, 0)[:10]:
        step(batch, 2, 0.9)
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    print(int(status.split("VmHWM:")[1].split()[0]) / 1024)


# what a program imports that trains a transformers T5 and scores its labels and texts
PEER_IMPORTS = """import argparse, sacrebleu, sklearn.metrics, torch
from transformers import Seq2SeqTrainer, T5ForConditionalGeneration, T5Tokenizer"""


def compare_processes(o: argparse.Namespace, rows: dict) -> None:
    seconds = in_turn(
        min(o.tries, 5),
        lambda i: subprocess.run([sys.executable, r2d.__file__, "-h"], capture_output=True),
        lambda i: subprocess.run([sys.executable, "-c", PEER_IMPORTS], capture_output=True),
    )
    show(rows, "start (ours: -h; the peer's: imports)", "s", *seconds)
    command = [sys.executable, __file__, "--size", o.size, "--steps", str(o.steps), "--out", o.out]
    command.append("--memory")
    memory = [float(subprocess.check_output([*command, who])) for who in ("ours", "peer")]
    show(rows, "peak memory, ten updates of stage 2", "MB", *memory)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--size", choices=SIZES, default="default")
    add("--tries", type=int, default=15, help="updates of each kind")
    add("--steps", type=int, default=150, help="updates of stage 1 before the clock starts")
    add("--notes", type=int, default=256, help="test notes for rationales")
    add("--out", type=Path, default="bench", help="folder for the run that is timed")
    add("--one-process", action="store_true", help="without start and peak memory")
    add("--memory", choices=["ours", "peer"], help=argparse.SUPPRESS)
    o = parser.parse_args(arguments)
    run = our_run(o.size, o.steps, o.out)
    if o.memory:
        return memory_run(o.memory, run)
    print(f"{o.size:49}{'ours':>9}{'peer':>9}{'ratio':>7}")
    rows = {}
    compare_steps(run, o.tries, rows)
    compare_rationales(run, o.notes, rows)
    if not o.one_process:
        compare_processes(o, rows)
    print(json.dumps({"size": o.size, "threads": torch.get_num_threads(), "rows": rows}))


if __name__ == "__main__":
    main()
