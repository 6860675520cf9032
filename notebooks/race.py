"""What is learned in a minute: ours against a transformers T5 trained as the paper trains it.

    python notebooks/race.py --seeds 0 1 2 --out race       # writes race/race.json, prints a table
    python notebooks/race.py --draw race/race.json race.png # a picture of it

Same shape, same notes, same tokenizer, same cores, in turn, each a process of its own. Its clock
starts with the process and stands still while it is measured, on 300 validation notes. Ours is the
default job. The peer has T5's dropout, AdamW with its rate falling linearly to 0 over the given
seconds, the paper's stages and schedule over the same time, and labels generated for whole batches.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

BEGAN = time.perf_counter()  # before the imports, which take their time, too
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import metrics  # noqa: E402
import r2d  # noqa: E402
from data import columns, make_batches  # noqa: E402

NOTES = 300


class Clock:
    """The seconds of this process without those of its measurements, which it prints."""

    def __init__(self, generate: Callable, every: float):
        self.generate = generate  # (run, prompts, limit) -> texts
        self.every = every
        self.paused = 0.0
        self.updates = 0
        self.next = every

    def seconds(self) -> float:
        return time.perf_counter() - BEGAN - self.paused

    def tick(self, run: r2d.Run) -> None:
        """Before each update."""
        if self.seconds() >= self.next:
            self.next += self.every
            self.measure(run)
        self.updates += 1

    def measure(self, run: r2d.Run) -> None:
        now = self.seconds()
        questions, gold, rationales = columns(run.dataset.val[:NOTES])
        prompts = [f"predict: {question}" for question in questions]
        predicted = self.generate(run, prompts, run.label_tokens)
        row = {"seconds": now, "updates": self.updates}
        row["macro_f1"] = metrics.macro_f1(gold, predicted, run.dataset.labels)
        for name, labels in [("bleu_gold", gold), ("bleu_predicted", predicted)]:
            prompts = r2d.explain_prompts(run, labels, questions)
            texts = self.generate(run, prompts, run.options.max_target)
            row[name] = metrics.corpus_bleu(texts, rationales)
        print(json.dumps(row), flush=True)
        self.paused = time.perf_counter() - BEGAN - now


def race_ours(options: list[str], every: float) -> None:
    """The default job; measured before the first update that passes a mark, and for its test."""
    clock = Clock(r2d.generate_texts, every)

    def ticking(loss_of: Callable) -> Callable:
        def tick_and_loss(run: r2d.Run, batch: list, step: int) -> tuple:
            clock.tick(run)
            return loss_of(run, batch, step)

        return tick_and_loss

    r2d.stage1_loss = ticking(r2d.stage1_loss)
    r2d.stage2_loss = ticking(r2d.stage2_loss)
    r2d.evaluate = clock.measure
    r2d.main(options)


def race_peer(options: list[str], every: float, seconds: float, lr: float) -> None:
    """The paper's loop for so many seconds; stage 1 has the share of them that it has in ours."""
    import bench

    run = r2d.setup(r2d.parse_args(options))
    o = run.options
    peer = bench.Peer(run, dropout=0.1)

    def generate(run: r2d.Run, prompts: list[str], limit: int) -> list[str]:
        peer.model.eval()
        texts = peer.generate(prompts, limit)
        peer.model.train()
        return texts

    clock = Clock(generate, every)
    stage1_seconds = seconds * o.stage1_steps / (o.stage1_steps + o.stage2_steps)
    batches = []
    while clock.seconds() < seconds:
        clock.tick(run)
        if not batches:
            batches = make_batches(run.dataset.train, o.batch_size, o.seed, epoch=clock.updates)
        batch = batches.pop()
        now = clock.seconds()
        for group in peer.optimizer.param_groups:
            group["lr"] = lr * max(1 - now / seconds, 0)
        if now < stage1_seconds:
            peer.step(batch, 1, 0.0)
        else:
            done = now - stage1_seconds
            p = r2d.p_predicted(done, seconds - stage1_seconds, "linear", o.warmup, o.ramp, o.cap)
            peer.step(batch, 2, p)
    clock.measure(run)


def race(who: str, seed: int, o: argparse.Namespace) -> list[dict]:
    """One process: the rows that it printed."""
    command = [sys.executable, __file__, "--who", who, "--seeds", str(seed)]
    command += ["--seconds", str(o.seconds), "--every", str(o.every), "--peer-lr", str(o.peer_lr)]
    text = subprocess.check_output([*command, *o.options], text=True)
    rows = [json.loads(line) for line in text.splitlines() if line.startswith("{")]
    return [{"who": who, "seed": seed, **row} for row in rows]


def table(rows: list[dict]) -> str:
    """Per racer and mark: the means over seeds of seconds, updates and scores."""
    lines = ["who      seconds  updates  macro-F1  BLEU, gold  BLEU, predicted"]
    for who in ("ours", "peer"):
        runs = {}
        for row in rows:
            if row["who"] == who:
                runs.setdefault(row["seed"], []).append(row)
        for marks in zip(*runs.values(), strict=False):  # of all seeds
            means = []
            for key in ("seconds", "updates", "macro_f1", "bleu_gold", "bleu_predicted"):
                means.append(sum(mark[key] for mark in marks) / len(marks))
            lines.append("{:6}{:10.0f}{:9.0f}{:10.1f}{:12.1f}{:17.1f}".format(who, *means))
    return "\n".join(lines)


def draw(rows: list[dict], picture: str) -> None:
    import matplotlib.pyplot as plt
    import numpy as np

    titles = {"macro_f1": "macro-F1", "bleu_gold": "BLEU, gold label"}
    titles["bleu_predicted"] = "BLEU, predicted label"
    fig, axes = plt.subplots(1, 3, figsize=(7, 3), sharex=True, layout="constrained")
    for ax, (key, title) in zip(axes, titles.items(), strict=True):
        for who, colour, marker in [("ours", "#0072B2", "s"), ("peer", "#7F7F7F", "o")]:
            for seed in sorted({row["seed"] for row in rows}):
                mine = [row for row in rows if (row["who"], row["seed"]) == (who, seed)]
                x = [row["seconds"] for row in mine]
                y = [row[key] for row in mine]
                label = {"ours": "ours", "peer": "transformers T5"}[who] if seed == 0 else None
                ax.plot(x, y, color=colour, marker=marker, markersize=3, linewidth=1, label=label)
        ax.set(title=title, xlabel="seconds", xlim=(0, None), ylim=(0, 100))
    fig.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    ends = {}
    for who in ("ours", "peer"):
        last = {row["seed"]: row for row in rows if row["who"] == who}.values()  # of each seed
        macro_f1, seconds = [np.mean([row[key] for row in last]) for key in ("macro_f1", "seconds")]
        ends[who] = f"{macro_f1:.0f} after {seconds:.0f} s"
    fig.suptitle("macro-F1: ours {ours}, transformers T5 {peer}".format(**ends))
    fig.savefig(picture, dpi=150)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--seeds", type=int, nargs="+", default=[0, 1, 2])
    add("--seconds", type=float, default=300, help="of the peer; ours ends when it is done")
    add("--every", type=float, default=15, help="seconds between two measurements")
    add("--peer-lr", type=float, default=1e-3)
    add("--out", type=Path, default="race")
    add("--draw", nargs=2, metavar=("JSON", "PNG"), help="a picture of a finished race")
    add("--who", choices=["ours", "peer"], help=argparse.SUPPRESS)
    o, o.options = parser.parse_known_args(arguments)  # what is not known here is r2d.py's
    if o.draw:
        draw(json.loads(Path(o.draw[0]).read_text(encoding="utf-8")), o.draw[1])
    elif o.who:
        with tempfile.TemporaryDirectory() as folder:
            options = ["--out", folder, "--seed", str(o.seeds[0]), "--device", "cpu", *o.options]
            if o.who == "ours":
                race_ours(options, o.every)
            else:
                race_peer(options, o.every, o.seconds, o.peer_lr)
    else:
        rows = []
        for seed in o.seeds:
            for who in ("ours", "peer"):
                rows += race(who, seed, o)
                o.out.mkdir(parents=True, exist_ok=True)
                (o.out / "race.json").write_text(json.dumps(rows), encoding="utf-8")
        print(table(rows))


if __name__ == "__main__":
    main()
