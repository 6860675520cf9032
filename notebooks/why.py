"""Does sampling work by the model's own errors, or by any wrong label in the prompt?

    python notebooks/why.py folds OPTIONS         labels of models that did not see the note
    python notebooks/why.py random RUN OPTIONS    random wrong labels, as many as RUN had

Each is a run of r2d.py, with its options, in which another function replaces `mix_labels`.
"""

import functools
import json
import random
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import r2d
from data import Example, InputError, columns, reading


def labels_of_unseen(options: list[str]) -> dict[str, str]:
    """Question -> label for each training note, by a classifier trained on the other half."""
    o = r2d.parse_args(options)
    labels = {}
    for fold in (0, 1):
        out = o.out / f"fold{fold}"
        run = r2d.setup(r2d.parse_args([*options, "--method=sft", f"--out={out}"]))
        steps = o.stage1_steps + o.stage2_steps
        unseen = run.dataset.train[fold::2]
        run.dataset.train = run.dataset.train[1 - fold :: 2]
        out.mkdir(parents=True, exist_ok=True)
        r2d.train(run, 2, run.dataset.train, steps, r2d.stage2_loss, 5, 0.65 * steps)
        run.model.eval()
        questions = columns(unseen)[0]
        labels.update(zip(questions, r2d.predict_labels(run, questions), strict=True))
    return labels


def mix_unseen(predicted: dict, run: r2d.Run, batch: list[Example], coins: list[bool]) -> tuple:
    """In place of `mix_labels`: the label of a model that did not see the note, by the coin."""
    labels = columns(batch)[1]
    counts = {"used_predicted": 0, "wrong_predicted": 0, "invalid_predicted": 0}
    for i, coin in enumerate(coins):
        label = predicted[batch[i].question]
        if coin and label in run.dataset.labels:
            counts["used_predicted"] += 1
            counts["wrong_predicted"] += int(label != labels[i])
            labels[i] = label
    return labels, counts


def mix_random(
    n_wrong: int, rng: random.Random, run: r2d.Run, batch: list[Example], coins: list[bool]
) -> tuple:
    """In place of `mix_labels`: gold labels, but for `n_wrong` random wrong ones."""
    labels = columns(batch)[1]
    for i in rng.sample(range(len(batch)), n_wrong):
        wrong = [label for label in run.dataset.labels if label != labels[i]]
        labels[i] = rng.choice(wrong)
    return labels, {"used_predicted": n_wrong, "wrong_predicted": n_wrong, "invalid_predicted": 0}


def doses(folder: Path) -> list[int]:
    """The wrong labels in the prompts of each update of stage 2 of a finished run."""
    with reading(folder / "log.jsonl", "give the folder of a finished run of --method r2d"):
        log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
        return [line["wrong_predicted"] for line in log if line["stage"] == 2]


def main(arguments: list[str]) -> int:
    """The exit status: 0 done, 2 bad input, 130 stopped by Ctrl-C."""
    stage2_loss = r2d.stage2_loss
    try:
        if arguments[:1] == ["folds"]:
            options = arguments[1:]
            r2d.mix_labels = functools.partial(mix_unseen, labels_of_unseen(options))
        elif arguments[:1] == ["random"] and len(arguments) > 1:
            options = arguments[2:]
            n_wrong = doses(Path(arguments[1]))

            def loss_with_random_labels(run: r2d.Run, batch: list[Example], step: int) -> tuple:
                rng = random.Random(f"{run.options.seed} random labels {step}")
                r2d.mix_labels = functools.partial(mix_random, n_wrong[step], rng)
                return stage2_loss(run, batch, step)

            r2d.stage2_loss = loss_with_random_labels
        else:
            raise InputError("the first word is folds, or random and a run")
    except InputError as error:
        print(f"why.py: {error}", file=sys.stderr)
        return 2
    return r2d.main(options)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
