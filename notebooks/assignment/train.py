"""Train with your own code: the functions of adapters.py in the places of the core's.

    python notebooks/assignment/train.py r2d --seeds 0 --out out/mine
    python notebooks/assignment/train.py r2d r2d,schedule=none --seeds 0 1 2 --out out/mine

The arguments are those of notebooks/compare.py. Yours are the schedule, the coin, the labels and
prompts of stage 2, and of the scores macro-F1, BLEU, the gap with its interval, following and the
dose. R2D_ADAPTERS names another file than adapters.py. With right answers a run has the same bytes
as the core's. The folder of each run of r2d also gets a picture, coins.png: what your schedule and
your coin did, beside what was asked for.
"""

import importlib.util
import json
import math
import os
import sys
from pathlib import Path
from types import ModuleType
from unittest import mock

import matplotlib.pyplot as plt
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import compare  # and with it the core's folder

import metrics
import r2d

HERE = Path(__file__).resolve().parent

CURVES = {"linear": "p_linear", "exponential": "p_exponential"}
CURVES["inverse-sigmoid"] = "p_inverse_sigmoid"
core_p_predicted = r2d.p_predicted
core_explain_prompts = r2d.explain_prompts
core_validate = r2d.validate
core_score = metrics.score
core_main = r2d.main
summaries: list[str] = []  # a line for each run


def load(path: Path) -> ModuleType:
    """The student's file as a module."""
    spec = importlib.util.spec_from_file_location("adapters", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def install(mine: ModuleType) -> None:
    """Put the student's functions in the places of the core's."""

    def p_predicted(step: int, steps: int, schedule: str, *shape: float) -> float:
        if schedule == "none":
            return 0.0
        return getattr(mine, CURVES[schedule])(step, steps, *shape)

    def mix_labels(run: r2d.Run, batch: list, coins: list[bool]) -> tuple[list[str], dict]:
        def predict(asked: list[str]) -> list[str]:
            return r2d.predict_labels(run, asked)

        questions, gold, _ = r2d.columns(batch)
        return mine.mix_labels(gold, questions, run.dataset.labels, coins, predict)

    def explain_prompts(run: r2d.Run, labels: list[str], questions: list[str]) -> list[str]:
        if run.options.method == "dss":  # whose prompts show no label
            return core_explain_prompts(run, labels, questions)
        return mine.explain_prompts(labels, questions)

    def validate(run: r2d.Run, stage: int) -> dict[str, float]:
        with mock.patch.object(metrics, "macro_f1", mine.macro_f1):
            return core_validate(run, stage)

    def dose(log: list[dict], batch_size: int) -> float:
        explains = "loss_explain" in log[-1]  # sft does not
        return mine.dose(log, batch_size) if explains else math.nan

    def score(rows: list[dict], labels: list[str]) -> dict:
        result = core_score(rows, labels)
        put_scores(result, rows, labels, mine)
        return result

    r2d.p_predicted = p_predicted
    r2d.flip_coins = mine.flip_coins
    r2d.mix_labels = mix_labels
    r2d.explain_prompts = explain_prompts
    r2d.validate = validate
    metrics.score = score
    compare.dose = dose
    r2d.main = main_and_picture


def put_scores(result: dict, rows: list[dict], labels: list[str], mine: ModuleType) -> None:
    """Put the student's scores in the places of the core's."""

    def put(scores: dict, key: str, value: float) -> None:
        if not math.isclose(value, scores[key], rel_tol=1e-9):  # else the last digits may differ
            scores[key] = float(value)

    def column(key: str) -> list:
        return [row[key] for row in rows]

    predicted = column("predicted_label")
    put(result["label"], "macro_f1", mine.macro_f1(column("label"), predicted, labels))
    if "exposure" not in result:  # sft and dss
        return
    references = column("rationale")
    expected = list(map(metrics.tokenize_13a, references))
    for condition in ("gold", "predicted", "flipped"):
        tokens = list(map(metrics.tokenize_13a, column(f"rationale_given_{condition}")))
        put(result["rationale"][condition], "bleu", mine.corpus_bleu(tokens, expected))
    gold = metrics.corpus_counts(column("rationale_given_gold"), references)
    own = metrics.corpus_counts(column("rationale_given_predicted"), references)
    rows_of_both = (metrics.bleu_from_counts, gold, own)
    exposure = result["exposure"]
    put(exposure, "bleu_gap", mine.exposure_gap(*rows_of_both))
    interval = mine.gap_interval(*rows_of_both, np.random.default_rng(0))
    exposure["bleu_gap_ci95"] = list(map(float, interval))
    argued = column("argues_given_flipped")
    if "following" in exposure:
        put(exposure, "following", mine.following(column("flipped_label"), predicted, argued))


def main_and_picture(arguments: list[str]) -> int:
    """One run, and its picture."""
    status = core_main(arguments)
    if status == 0:
        o = r2d.parse_args(arguments)
        if o.method == "r2d":  # the others flip no coins
            draw(o.out)
        summaries.append(summary(o.out))
    return status


def summary(folder: Path) -> str:
    """What the experiment asks of one run, in a line."""
    run = compare.read_run(folder)
    result = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    bleu = " / ".join(f"{run[key]:.1f}" for key in ("bleu_gold", "bleu", "bleu_flipped"))
    low, high = result.get("exposure", {}).get("bleu_gap_ci95", [math.nan, math.nan])
    gap = f"gap {run['bleu_gap']:.1f} [{low:.1f}, {high:.1f}]"
    return f"{folder.name}: {bleu}, {gap}, following {run['following']:.1f}, dose {run['dose']:.1f}"


def draw(folder: Path) -> None:
    """The share of prompts whose coin was True, beside the P that was asked for, by update."""
    options = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    lines = (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()
    log = [line for line in map(json.loads, lines) if line["stage"] == 2]
    shape = [options[name] for name in ("schedule", "warmup", "ramp", "cap")]
    steps = np.arange(len(log))
    asked = [core_p_predicted(step, options["stage2_steps"], *shape) for step in steps]
    true = np.array([line["used_predicted"] + line["invalid_predicted"] for line in log])
    wrong = np.array([line["wrong_predicted"] for line in log])
    plt.switch_backend("Agg")  # no window
    figure, axes = plt.subplots(figsize=(7, 3.5), layout="constrained")
    axes.plot(steps, [line["p_predicted"] for line in log], color="#0072B2", label="your schedule")
    axes.plot(steps, asked, "k--", label="P(predicted) that was asked for")
    shares = {"prompts whose coin was True": (true, "#E69F00"), "a wrong label": (wrong, "#D55E00")}
    for name, (values, colour) in shares.items():
        share = values / options["batch_size"]
        axes.plot(steps, share, ".", color=colour, markersize=2, alpha=0.5)
        n = min(20, len(steps))  # a mean over 20 updates, for the eye
        smooth = np.convolve(share, np.ones(n) / n, "valid")
        axes.plot(steps[n - 1 :] - (n - 1) / 2, smooth, color=colour, label=name)
    axes.set(xlabel="update of stage 2", ylabel="share of the prompts", ylim=(-0.03, 1.03))
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8)
    figure.savefig(folder / "coins.png", dpi=150)
    plt.close(figure)


def main(arguments: list[str] | None = None) -> int:
    """The exit status of compare.py; 2 also where a function is not written yet."""
    path = Path(os.environ.get("R2D_ADAPTERS", HERE / "adapters.py"))
    try:
        install(load(path))
        status = compare.main(arguments)
        print("\nBLEU under the gold, the predicted, the flipped label", *summaries, sep="\n")
        return status
    except NotImplementedError:
        hint = "a function is not written yet; train.py needs all of them down to `following`"
        print(f"train.py: {path}: {hint}, corpus_bleu and macro_f1", file=sys.stderr)
    except OSError as error:
        print(f"train.py: {path}: {error}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
