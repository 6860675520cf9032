"""Ours against a transformers T5 trained as the paper's stage 2 is: python tests/bench.py

Both have the same weights and train on the same notes, in turn, in one process; a row has medians
and their ratio (above 1: ours is better). The peer takes notes in the order of the data, generates
labels for the whole batch, then draws the coins. It has T5's dropout of 0.1, ours none by default,
so its updates are timed without dropout as well. Prints a table, then JSON.
"""

import argparse
import json
import random
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import r2d  # noqa: E402
from data import Example, batch_order, columns, with_prefix  # noqa: E402
from model import rename_t5  # noqa: E402

SIZES = {"default": [], "t5-small": "--width 512 --layers 6 --heads 8 --vocab-size 8000".split()}
SIZES["tiny"] = "--width 16 --layers 1 --heads 2 --vocab-size 400 --notes 100".split()


def our_run(size: str, steps: int, out: str) -> r2d.Run:
    """A run with some updates of stage 1 behind it, so that rationales end where real ones do."""
    arguments = [*SIZES[size], "--out", out, "--stage1-steps", str(max(steps, 1))]
    run = r2d.setup(r2d.parse_args([*arguments, "--device", "cpu"]))
    Path(out).mkdir(parents=True, exist_ok=True)
    if steps:
        r2d.train(run, 1)
    return run


def t5_weights(model: torch.nn.Module, peer: dict[str, Tensor]) -> dict[str, Tensor]:
    """Our weights under the peer's names: model.rename_t5 turned round."""
    ours, state = model.state_dict(), {}
    for name, weight in peer.items():
        if weight.shape == ours["embedding.weight"].shape:
            state[name] = ours["embedding.weight"]  # the embedding and its copies
            continue
        (our_name,) = rename_t5({name.replace(".k.", ".kv.").replace(".v.", ".kv."): weight})
        state[name] = ours[our_name]
        if ".kv." in our_name:  # keys and values are one matrix
            k, v = ours[our_name].chunk(2)
            state[name] = k if ".k." in name else v
    return state


class Peer:
    """T5ForConditionalGeneration with our weights, and the authors' kind of update."""

    def __init__(self, run: r2d.Run, dropout: float):
        from transformers import T5Config, T5ForConditionalGeneration, logging

        logging.set_verbosity_error()
        self.run = run
        c = run.model.config
        shape = {"vocab_size": c.vocab_size, "d_model": c.d_model, "d_kv": c.d_kv, "d_ff": c.d_ff}
        shape |= {"num_layers": c.n_encoder_layers, "num_decoder_layers": c.n_decoder_layers}
        shape |= {"num_heads": c.n_heads, "dropout_rate": dropout, "decoder_start_token_id": 0}
        self.model = T5ForConditionalGeneration(T5Config(**shape))
        self.model.load_state_dict(t5_weights(run.model, self.model.state_dict()))
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-5)
        self.model.train()

    def loss(self, prompts: list[str], targets: list[str]) -> Tensor:
        ids = self.run.tokenizer.encode(prompts, 256)
        labels = self.run.tokenizer.encode(targets, 256)
        labels = labels.masked_fill(labels == 0, -100)
        return self.model(input_ids=ids, attention_mask=(ids != 0).long(), labels=labels).loss

    def generate(self, prompts: list[str], limit: int, batch_size: int = 32) -> list[str]:
        texts = []
        for start in range(0, len(prompts), batch_size):
            ids = self.run.tokenizer.encode(prompts[start : start + batch_size], 256)
            greedy = {"max_new_tokens": limit, "num_beams": 1, "do_sample": False}
            out = self.model.generate(ids, attention_mask=(ids != 0).long(), **greedy)
            texts += [self.run.tokenizer.decode(row) for row in out[:, 1:].tolist()]
        return texts

    def step(self, batch: list[Example], stage: int, p: float) -> None:
        questions, labels, rationales = columns(batch)
        if stage == 1:
            loss = self.loss(with_prefix("explain:", questions), rationales)
        else:
            prompts = with_prefix("predict:", questions)
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


def our_step(run: r2d.Run, batch: list[Example], stage: int, p: float, state: dict) -> None:
    coins = r2d.flip_coins(len(batch), p, torch.Generator().manual_seed(0))
    if stage == 1:
        loss, _ = r2d.stage1_loss(run, batch)
    else:
        loss, _ = r2d.stage2_loss(run, batch, coins, 0.7)
    run.model.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(run.model.parameters(), 1.0)
    r2d.optimize(run.model, state, 1e-5)  # the weights hardly move


def in_turn(tries: int, *works) -> list[float]:
    """Median seconds of each work, in turn on the same item, after one try without the clock."""
    times = [[] for _ in works]
    for i in range(-1, tries):
        for work, column in zip(works, times, strict=True):
            began = time.perf_counter()
            work(max(i, 0))
            column.append(time.perf_counter() - began)
    return [statistics.median(column[1:]) for column in times]


def memory_run(who: str, size: str, out: str) -> None:
    """Ten updates of stage 2 at P = 0.9; prints the peak memory of the process, in MB."""
    run = our_run(size, 0, out)
    run.model.train()
    peer = Peer(run, 0.0) if who == "peer" else None
    state = {}
    for i in range(0, 320, 32):
        batch = run.dataset.train[i : i + 32]
        peer.step(batch, 2, 0.9) if peer else our_step(run, batch, 2, 0.9, state)
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    print(int(status.split("VmHWM:")[1].split()[0]) / 1024)


def show(rows: dict, name: str, unit: str, *times: float, faster: bool = False) -> None:
    """Print a row: ours, the peer's, the ratio; keep it. `faster`: more of the unit is better."""
    ours, *peers = times
    ratios = [ours / peer if faster else peer / ours for peer in peers]
    rows[name] = {"unit": unit, "ours": ours, "peers": peers, "ratios": ratios}
    text = f"{name:40}{unit:>9}{ours:9.1f}"
    for peer, ratio in zip(peers, ratios, strict=True):
        text += f"{peer:9.1f}{ratio:7.2f}"
    print(text, flush=True)


def compare_steps(run: r2d.Run, tries: int, rows: dict) -> None:
    peer, without = Peer(run, 0.1), Peer(run, 0.0)
    state = {}
    run.model.train()
    train = run.dataset.train
    order = batch_order([len(example.question) for example in train], 32, 0, 0)
    ours = [[train[i] for i in places] for places in order[:tries]]
    plain = [train[i : i + 32] for i in range(0, 32 * tries, 32)]
    for stage, p in [(1, 0.0), (2, 0.0), (2, 0.5), (2, 0.9)]:
        seconds = in_turn(
            tries,
            lambda i, stage=stage, p=p: our_step(run, ours[i], stage, p, state),
            lambda i, stage=stage, p=p: peer.step(plain[i], stage, p),
            lambda i, stage=stage, p=p: without.step(plain[i], stage, p),
        )
        show(rows, f"stage {stage}, P(predicted) {p}", "ms", *[1000 * s for s in seconds])
    with FlopCounterMode(display=False) as counter:
        our_step(run, ours[0], 1, 0.0, state)
    a, b = torch.randn(2, 1024, 1024)
    (product,) = in_turn(tries, lambda i: a @ b)
    rate = counter.get_total_flops() / rows["stage 1, P(predicted) 0.0"]["ours"] / 1e6
    show(rows, "stage 1; the peer: a product", "Gflop/s", rate, 2.147 / product, faster=True)


def compare_rationales(run: r2d.Run, notes: int, rows: dict) -> None:
    peer = Peer(run, 0.0)
    run.model.eval()
    peer.model.eval()
    questions, gold, _ = columns(run.dataset.test[:notes])
    prompts = r2d.explain_prompts(run, gold, questions)
    limit = run.options.max_target
    tokens = run.tokenizer.encode(r2d.decode(run, prompts, limit), limit).count_nonzero().item()
    for size in (32, 8):  # as in training; the default of transformers
        seconds = in_turn(
            3,
            lambda i: r2d.decode(run, prompts, limit),
            lambda i, size=size: peer.generate(prompts, limit, size),
        )
        speeds = [tokens / s for s in seconds]
        show(rows, f"rationales, the peer's in {size}s", "tokens/s", *speeds, faster=True)


# what a program imports that trains a transformers T5 and scores its labels and texts
PEER_IMPORTS = """import argparse, sacrebleu, sklearn.metrics, torch
from transformers import Seq2SeqTrainer, T5ForConditionalGeneration, T5Tokenizer"""


def compare_processes(o: argparse.Namespace, rows: dict) -> None:
    seconds = in_turn(
        min(o.tries, 5),
        lambda i: subprocess.run([sys.executable, ROOT / "r2d.py", "-h"], capture_output=True),
        lambda i: subprocess.run([sys.executable, "-c", PEER_IMPORTS], capture_output=True),
    )
    show(rows, "start (ours: -h; the peer's: imports)", "s", *seconds)
    command = [sys.executable, __file__, "--size", o.size, "--out", o.out, "--memory"]
    memory = [float(subprocess.check_output([*command, who])) for who in ("ours", "peer")]
    show(rows, "peak memory, ten updates of stage 2", "MB", *memory)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--size", choices=SIZES, default="default")
    add("--tries", type=int, default=15, help="updates of each kind")
    add("--steps", type=int, default=150, help="updates of stage 1 before the clock starts")
    add("--notes", type=int, default=256, help="test notes for rationales")
    add("--out", default="bench", help="folder for the run that is timed")
    add("--one-process", action="store_true", help="without start and peak memory")
    add("--memory", choices=["ours", "peer"], help=argparse.SUPPRESS)
    o = parser.parse_args(arguments)
    if o.memory:
        return memory_run(o.memory, o.size, o.out)
    run = our_run(o.size, o.steps, o.out)
    print(f"{o.size:49}{'ours':>9}{'peer':>9}{'ratio':>7}  without dropout")
    rows = {}
    compare_steps(run, o.tries, rows)
    compare_rationales(run, o.notes, rows)
    if not o.one_process:
        compare_processes(o, rows)
    print(json.dumps({"size": o.size, "threads": torch.get_num_threads(), "rows": rows}))


if __name__ == "__main__":
    main()
