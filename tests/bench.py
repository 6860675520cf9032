"""Ours against a transformers T5 trained the way the paper's stage 2 works: python tests/bench.py [--size t5-small]

Both have the same weights and train on notes of the same data, in turn, in one process; each row is the median, and the
ratio of the medians (above 1: ours is better). The peer tokenizes in the loop, pads batches in the order of the data,
generates labels for the whole batch and then draws the coins, with T5's dropout of 0.1 (ours has none by default); its
steps are timed without dropout as well. Needs tests/requirements.txt. Prints a table, then JSON.
"""

import argparse
import contextlib
import io
import json
import random
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import data  # noqa: E402
import r2d  # noqa: E402
from model import ModelConfig, Transformer, t5_names  # noqa: E402

SIZES = {"default": {}, "t5-small": {"width": 512, "layers": 6, "heads": 8, "vocab_size": 8000}}


def ours(size: str, steps: int, out: str) -> r2d.Run:
    """A run of this size with some steps of stage 1 behind it, so that rationales end where real ones do."""
    run = r2d.prepare(r2d.Options(out=out, stage1_steps=max(steps, 1), **SIZES[size]))
    Path(out).mkdir(parents=True, exist_ok=True)
    if steps:
        r2d.train(run, 1, r2d.last_state(run.out))
    return run


class Peer:
    """T5ForConditionalGeneration with our weights, and the authors' kind of step."""

    def __init__(self, run: r2d.Run, dropout: float):
        from transformers import T5Config, T5ForConditionalGeneration, logging

        logging.set_verbosity_error()
        c, self.tokenizer = run.model.config, run.prompts.tokenizer
        config = T5Config(
            vocab_size=c.vocab_size, d_model=c.d_model, d_kv=c.d_kv, d_ff=c.d_ff, num_layers=c.n_encoder_layers,
            num_decoder_layers=c.n_decoder_layers, num_heads=c.n_heads, dropout_rate=dropout, decoder_start_token_id=0,
        )  # fmt: skip
        self.model, weights = T5ForConditionalGeneration(config), {}
        for name, p in run.model.named_parameters():
            names = t5_names(name, c.gated)
            weights |= dict(zip(names, p.detach().chunk(len(names)), strict=True))
        assert not self.model.load_state_dict(weights, strict=False).unexpected_keys
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-5)
        self.model.train()

    def tokens(self, texts: list[str], limit: int = 256) -> torch.Tensor:
        return data.pad([[*self.tokenizer.encode(text)[: limit - 1], 1] for text in texts])

    def loss(self, sources: list[str], targets: list[str]) -> torch.Tensor:
        ids, labels = self.tokens(sources), self.tokens(targets)
        labels = labels.masked_fill(labels == 0, -100)
        return self.model(input_ids=ids, attention_mask=(ids != 0).long(), labels=labels).loss

    def generate(self, sources: list[str], limit: int) -> list[str]:
        ids = self.tokens(sources)
        kind = {"max_new_tokens": limit, "num_beams": 1, "do_sample": False}
        out = self.model.generate(ids, attention_mask=(ids != 0).long(), **kind)
        return [self.tokenizer.decode(row) for row in out[:, 1:].tolist()]

    def step(self, batch: list[data.Example], stage: int, p: float, longest: int) -> None:
        gold, given = [e.label for e in batch], [f"{data.EXPLAIN} {e.question}" for e in batch]
        loss = 0.0
        if stage == 2:
            prompts = [f"{data.PREDICT} {e.question}" for e in batch]
            own = self.generate(prompts, longest) if p > 0 else gold
            labels = [a if random.random() < p else b for a, b in zip(own, gold, strict=True)]
            heads = [data.EXPLAIN_GIVEN.format(label=label) for label in labels]
            given = [f"{head} {e.question}" for head, e in zip(heads, batch, strict=True)]
            loss = 0.7 * self.loss(prompts, gold)
        loss = loss + (0.3 if stage == 2 else 1.0) * self.loss(given, [e.rationale for e in batch])
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()


def our_step(run: r2d.Run, batch: list[data.Example], stage: int, p: float, optimizer: r2d.Adam) -> None:
    run.options = replace(run.options, warmup=0.0, ramp=0.0, cap=p, stage2_steps=1000)
    run.model.zero_grad()
    r2d.gradients(run, stage, 500, batch, torch.Generator().manual_seed(0), [])
    torch.nn.utils.clip_grad_norm_(run.model.parameters(), 1.0)
    optimizer.step(1e-5)


def in_turn(tries: int, *works: Callable[[int], object]) -> list[float]:
    """Median seconds of each work, run in turn on the same item; one try of each before the clock starts."""
    times = [[] for _ in works]
    for i in range(-1, tries):
        for work, column in zip(works, times, strict=True):
            began = time.perf_counter()
            work(max(i, 0))
            column.append(time.perf_counter() - began)
    return [statistics.median(column[1:]) for column in times]


# what a program imports that trains a transformers T5 and scores its labels and texts
PEER_IMPORTS = """import argparse, torch
from sacrebleu import corpus_bleu
from sklearn.metrics import f1_score
from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments, T5ForConditionalGeneration, T5Tokenizer"""


def child(program: list[str]) -> float:
    """Peak memory in MB of a whole process."""
    code = "import resource, subprocess, sys; subprocess.run(sys.argv[1:], stdout=subprocess.DEVNULL, check=True)"
    code += "; print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)"
    said = subprocess.run([sys.executable, "-c", code, *program], capture_output=True, text=True, check=True).stdout
    return int(said) / 1024


def memory_run(who: str, size: str, out: str) -> None:
    """Ten steps of stage 2 at P = 0.9: what `child` measures the memory of."""
    run = ours(size, 0, out)
    run.model.train()
    peer = Peer(run, 0.0) if who == "peer" else None
    optimizer = r2d.Adam(run.model)
    for batch in (run.data.train[i * 32 : i * 32 + 32] for i in range(10)):
        peer.step(batch, 2, 0.9, 8) if peer else our_step(run, batch, 2, 0.9, optimizer)


# width, layers (of each stack), source and target tokens, batch: the default's shape, then one change at a time
POINTS = [(128, 2, 64, 32, 32), (256, 2, 64, 32, 32), (512, 2, 64, 32, 32), (128, 4, 64, 32, 32), (128, 8, 64, 32, 32)]
POINTS += [(128, 2, 128, 64, 32), (128, 2, 256, 128, 32), (128, 2, 512, 256, 32)]
POINTS += [(128, 2, 64, 32, 8), (128, 2, 64, 32, 128), (512, 6, 64, 32, 32)]  # the last is T5-small's shape


def point(width: int, layers: int, source: int, target: int, batch: int) -> None:
    """One update on random tokens: median milliseconds, Gflop, and how far the peak memory rose above the imports."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    torch.manual_seed(0)
    shape = (width, width // 32, 32, 4 * width, layers, layers, 0.0)
    model = Transformer(ModelConfig(1536, *shape))
    optimizer = r2d.Adam(model)
    ids, labels = (torch.randint(3, 1536, (batch, length)) for length in (source, target))

    def update(i: int) -> None:
        model.zero_grad()
        model.nll(ids, labels).mean().backward()
        optimizer.step(1e-3)

    (seconds,) = in_turn(7, update)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with FlopCounterMode(display=False) as counter:
        update(0)
    size, gflop = sum(p.numel() for p in model.parameters()), counter.get_total_flops() / 1e9
    row = f"{1e3 * seconds:.0f} | {1e6 * seconds / batch / (source + target):.1f} | {gflop:.1f} | {gflop / seconds:.0f}"
    columns = f"{width} | {layers} | {source} + {target} | {batch} | {size / 1e6:.2f} | {row}"
    print(f"| {columns} | {(peak - before) / 1024:.0f} |", flush=True)


def scale() -> None:
    """The README's table: every point in a process of its own, so that its peak memory is its own."""
    print("| width | layers | source + target | batch | million weights | ms | us a token | Gflop | Gflop/s | MB |")
    print("|" + "---|" * 10, flush=True)
    for numbers in POINTS:
        subprocess.run([sys.executable, __file__, "--point", *map(str, numbers)], check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="default")
    parser.add_argument("--tries", type=int, default=15, help="steps of each kind (default 15)")
    parser.add_argument("--steps", type=int, default=200, help="steps of stage 1 before the timing (default 200)")
    parser.add_argument("--notes", type=int, default=256, help="test notes for generation and evaluation (default 256)")
    parser.add_argument("--out", default="bench", help="folder for the run that is timed (default bench)")
    parser.add_argument("--scale", action="store_true", help="cost of a step by width, depth, length and batch instead")
    parser.add_argument("--memory", choices=("ours", "peer"), help=argparse.SUPPRESS)
    parser.add_argument("--point", type=int, nargs=5, help=argparse.SUPPRESS)
    o = parser.parse_args()
    if o.scale:
        return scale()
    if o.point:
        return point(*o.point)
    if o.memory:
        return memory_run(o.memory, o.size, o.out)
    run = ours(o.size, o.steps, o.out)
    peer, without, rows = Peer(run, 0.1), Peer(run, 0.0), {}
    optimizer = r2d.Adam(run.model)
    lengths = [len(run.prompts.source(data.EXPLAIN, e.question)) for e in run.data.train]
    bucketed = [[run.data.train[i] for i in rows] for rows in data.batch_order(lengths, 32, 0, 0)]
    plain = [run.data.train[i : i + 32] for i in range(0, 32 * (o.tries + 1), 32)]
    longest = max(len(run.prompts.target(label)) for label in run.data.labels)

    def row(name: str, unit: str, ours: float, *peers: float, ratios: tuple = ()) -> None:
        ratios = ratios or [peer / ours for peer in peers]
        rows[name] = {"unit": unit, "ours": ours, "peer": peers[0], "ratio": ratios[0]}
        rows[name] |= {"peer_without_dropout": peers[1], "ratio_without_dropout": ratios[1]} if peers[1:] else {}
        columns = "".join(f"{peer:12.1f}{ratio:8.2f}" for peer, ratio in zip(peers, ratios, strict=True))
        print(f"{name:42}{unit:9}{ours:10.1f}{columns}", flush=True)

    print(f"{o.size}: {sum(p.numel() for p in run.model.parameters()):,} weights, {torch.get_num_threads()} threads")
    print(f"{'':51}{'ours':>10}{'peer':>12}{'ratio':>8}{'no dropout':>12}{'ratio':>8}")
    run.model.train()
    for stage, p in ((1, 0.0), (2, 0.0), (2, 0.5), (2, 0.9)):
        seconds = in_turn(
            o.tries,
            lambda i, stage=stage, p=p: our_step(run, bucketed[i], stage, p, optimizer),
            lambda i, stage=stage, p=p: peer.step(plain[i], stage, p, longest),
            lambda i, stage=stage, p=p: without.step(plain[i], stage, p, longest),
        )
        row(f"stage {stage} step" + f", P(predicted) {p}" * (stage == 2), "ms", *(1000 * s for s in seconds))
    run.model.eval()
    peer.model.eval()
    test = run.data.test[: o.notes]
    questions, gold = [e.question for e in test], [e.label for e in test]
    prompts = [data.EXPLAIN_GIVEN.format(label=e.label) + " " + e.question for e in test]
    tokens = sum(len(run.prompts.ids(text)) + 1 for text in r2d.explain(run, questions, gold))

    def peer_explains(batch: int) -> None:
        for i in range(0, len(prompts), batch):
            peer.generate(prompts[i : i + batch], run.options.max_target)

    for batch, what in ((32, "batches of 32, as in training"), (8, "of 8, the default")):
        seconds = in_turn(3, lambda i: r2d.explain(run, questions, gold), lambda i, batch=batch: peer_explains(batch))
        speeds = [tokens / s for s in seconds]
        row(f"rationales (peer: {what})", "tokens/s", *speeds, ratios=(seconds[1] / seconds[0],))
    run.data = replace(run.data, test=test, ceiling=None)

    def peer_evaluates(i: int) -> None:
        """Labels; rationales and their likelihood under three conditions; the scores are left to us."""
        chunks = [slice(i, i + 32) for i in range(0, len(prompts), 32)]
        for rows in chunks:
            peer.generate(prompts[rows], longest)
        for _ in range(3):
            peer_explains(32)
            with torch.no_grad():
                [peer.loss(prompts[rows], [e.rationale for e in test[rows]]) for rows in chunks]

    with contextlib.redirect_stdout(io.StringIO()):
        evaluated = in_turn(1, lambda i: r2d.evaluate(run), peer_evaluates)
    row("evaluation (the peer's without scores)", "s", *evaluated)
    programs = [[str(ROOT / "r2d.py"), "--help"], ["-c", PEER_IMPORTS]]
    helped = in_turn(
        min(o.tries, 5), *(lambda i, program=program: child([sys.executable, *program]) for program in programs)
    )
    row("start-up (--help; the peer's imports)", "s", *helped)
    command = [sys.executable, __file__, "--size", o.size, "--out", o.out, "--memory"]
    row("peak memory, stage 2", "MB", *(child([*command, who]) for who in ("ours", "peer")))

    run.model.train()
    with FlopCounterMode(display=False) as counter:
        our_step(run, bucketed[0], 1, 0.0, optimizer)
    a, b = torch.randn(1024, 1024), torch.randn(1024, 1024)
    step, product = in_turn(o.tries, lambda i: our_step(run, bucketed[0], 1, 0.0, optimizer), lambda i: a @ b)
    ceiling, rate = 2 * 1024**3 / product, counter.get_total_flops() / step
    rows["utilisation"] = {"ours": 100 * rate / ceiling, "gflops": rate / 1e9, "ceiling_gflops": ceiling / 1e9}
    print(f"stage 1 step: {rate / 1e9:.0f} Gflop/s, {100 * rate / ceiling:.0f} % of a product's {ceiling / 1e9:.0f}")
    print(json.dumps({"size": o.size, "threads": torch.get_num_threads(), "rows": rows}))


if __name__ == "__main__":
    main()
