"""Does sampling work by the model's own errors, or by any wrong label in the prompt?

    python notebooks/why.py --seeds 30 31 --out why --notes 500 --override 0

Further options are r2d.py's. For each seed it trains R2D, gold only, and three runs in which
another function stands in for `mix_labels`: `folds`, labels predicted by a model that did not see
the note; `random`, as many random wrong labels as R2D had wrong ones; `random-folds`, as many as
folds had. Each run has a folder, OUT/ITEM-SEED, as in compare.py; it writes OUT/compare.json.
"""

import functools
import json
import random
import sys
from argparse import SUPPRESS, ArgumentParser, RawDescriptionHelpFormatter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import compare

import r2d
from data import Example, InputError, columns, reading

GOLD = "r2d,schedule=none"


def labels_of_unseen(options: list[str]) -> dict[str, str]:
    """Question -> label for each training note, by a classifier trained on the other half."""
    o = r2d.parse_args(options)
    labels = {}
    for fold in (0, 1):
        out = o.out / f"fold{fold}"
        run = r2d.setup(r2d.parse_args([*options, "--method=sft", f"--out={out}"]))
        seen = run.dataset.train[1 - fold :: 2]
        unseen = columns(run.dataset.train[fold::2])[0]
        out.mkdir(parents=True, exist_ok=True)
        steps = o.stage1_steps + o.stage2_steps
        r2d.train(run, 2, seen, steps, r2d.stage2_loss, patience=5, since=0.65 * steps)
        run.model.eval()
        labels.update(zip(unseen, r2d.predict_labels(run, unseen), strict=True))
    return labels


def mix_unseen(predicted: dict, run: r2d.Run, batch: list[Example], coins: list[bool]) -> tuple:
    """In place of `mix_labels`: the label of the model that did not see the note, by the coin."""
    labels = columns(batch)[1]
    counts = {"used_predicted": 0, "wrong_predicted": 0, "invalid_predicted": 0}
    for i, coin in enumerate(coins):
        label = predicted[batch[i].question]
        if coin and label in run.dataset.labels:
            counts["used_predicted"] += 1
            counts["wrong_predicted"] += int(label != labels[i])
            labels[i] = label
    return labels, counts


def loss_with_random_labels(doses: list[int], run: r2d.Run, batch: list[Example], step: int):
    """In place of `stage2_loss`: as many random wrong labels in the prompts as `doses` says."""
    rng = random.Random(f"{run.options.seed} random labels {step}")
    n_wrong = doses[min(step, len(doses) - 1)]  # that run may have ended early

    def mix_random(run: r2d.Run, batch: list[Example], coins: list[bool]) -> tuple:
        labels = columns(batch)[1]
        for i in rng.sample(range(len(batch)), n_wrong):
            wrong = [label for label in run.dataset.labels if label != labels[i]]
            labels[i] = rng.choice(wrong)
        counts = {"used_predicted": n_wrong, "wrong_predicted": n_wrong, "invalid_predicted": 0}
        return labels, counts

    r2d.mix_labels = mix_random
    return STAGE2_LOSS(run, batch, step)


def read_doses(folder: Path) -> list[int]:
    """The number of wrong labels in the prompts of each update of stage 2."""
    path = folder / "log.jsonl"
    with reading(path):
        log = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        return [line["wrong_predicted"] for line in log if line["stage"] == 2]


STAGE2_LOSS, MIX_LABELS = r2d.stage2_loss, r2d.mix_labels


def train(item: str, seed: int, out: Path, further: list[str]) -> dict:
    """One run; its scores. Raises InputError."""
    if item in ("r2d", GOLD):
        options = compare.plan(item, seed, out, further)
    else:
        options = [*further, f"--seed={seed}", f"--out={out / f'{item}-{seed}'}"]
    if item == "folds":
        r2d.mix_labels = functools.partial(mix_unseen, labels_of_unseen(options))
    elif item in ("random", "random-folds"):
        source = "r2d" if item == "random" else "folds"
        doses = read_doses(out / f"{source}-{seed}")
        r2d.stage2_loss = functools.partial(loss_with_random_labels, doses)
    status = r2d.main(options)
    r2d.stage2_loss, r2d.mix_labels = STAGE2_LOSS, MIX_LABELS
    if status != 0:
        raise InputError(f"{item}, seed {seed}: stopped; the same command goes on")
    return compare.read_run(r2d.parse_args(options).out)


def main(arguments: list[str] | None = None) -> int:
    """The exit status: 0 done, 2 bad input or stopped."""
    style = {"formatter_class": RawDescriptionHelpFormatter, "allow_abbrev": False}
    parser = ArgumentParser("why.py", SUPPRESS, __doc__, **style)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default="why")
    args, further = parser.parse_known_args(arguments)
    runs = {item: [] for item in ("r2d", GOLD, "folds", "random", "random-folds")}
    try:
        for seed in args.seeds:
            for item in runs:
                runs[item].append(train(item, seed, args.out, further))
        compare.finish(runs, args.seeds, "r2d", args.out)
    except (InputError, OSError) as error:
        print(f"why.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
