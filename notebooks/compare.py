"""Train several methods on the same seeds and compare them.

    python notebooks/compare.py r2d sft dss --seeds 0 1 2 --out compare
    python notebooks/compare.py r2d r2d,schedule=none r2d,no-stage1 --out compare --notes 500

An ITEM is METHOD[,OPTION=VALUE...]. Further options, such as --notes, are r2d.py's and hold for
all runs. Each run has a folder, OUT/ITEM-SEED: given again, the command skips what is finished
and goes on with the rest. It writes OUT/compare.json and prints a table.
"""

import argparse
import json
import math
import re
import sys
from pathlib import Path

import numpy as np
from scipy import stats

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import r2d
from data import InputError, reading

PLACES = {  # score -> where it stands in metrics.json
    "macro_f1": "label macro_f1",
    "accuracy": "label accuracy",
    "bleu_gold": "rationale gold bleu",
    "bleu": "rationale predicted bleu",
    "bleu_flipped": "rationale flipped bleu",
    "nll_gold": "rationale gold nll",
    "nll": "rationale predicted nll",
    "bleu_gap": "exposure bleu_gap",
    "nll_gap": "exposure nll_gap",
    "argues_given": "rationale predicted argues_given",
    "argues_gold": "rationale predicted argues_gold",
    "wrong_given": "rationale predicted_wrong argues_given",
    "following": "exposure following",
    "reader_accuracy": "reader accuracy",
    "ceiling_macro_f1": "label ceiling_macro_f1",
    "ceiling_bleu_gold": "rationale ceiling_gold bleu",
    "ceiling_bleu": "rationale ceiling bleu",
}
SCORES = [*PLACES, "dose", "updates"]


def plan(item: str, seed: int, out: Path, further: list[str]) -> list[str]:
    """The arguments of one run for r2d.main. Ends the program, or raises, if they are wrong."""
    method, *changes = item.split(",")
    own = {"method": method, "seed": seed, "out": out, "stage": 2, "ask": None}
    arguments = [f"--method={method}", f"--seed={seed}", f"--out={out}", *further]
    arguments += [f"--{change}" for change in changes]
    options = vars(r2d.parse_args(arguments))
    if not own.items() <= options.items():
        raise InputError(f"{item}: leave out {', '.join(own)}: the comparison sets them")
    # Equal budgets: a run without stage 1 makes those updates, too.
    if options["no_stage1"] and ",stage2" not in item:
        options["stage2_steps"] += options["stage1_steps"]
        arguments.append(f"--stage2-steps={options['stage2_steps']}")
    options["out"] = out / re.sub("[^a-zA-Z0-9.-]", "_", f"{item}-{seed}")
    arguments.append(f"--out={options['out']}")
    saved = vars(r2d.parse_args(arguments))  # a run in the folder brings its own options
    if not options.items() <= saved.items():
        raise InputError(f"{options['out']}: has other options; give those, or another --out")
    return arguments


def dose(log: list[dict], batch_size: int) -> float:
    """Share of stage 2's explain prompts with a wrong predicted label, 0-100; nan without any."""
    updates = [line for line in log if line["stage"] == 2 and "loss_explain" in line]
    wrong = sum(line["wrong_predicted"] for line in updates)
    return 100 * wrong / (batch_size * len(updates)) if updates else math.nan


def read_run(folder: Path) -> dict[str, float]:
    """The scores of a run, nan where it has none; its dose; its updates, also if it ended early."""
    with reading(folder):
        result = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
        lines = (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()
        log = [json.loads(line) for line in lines]
        n_prompts = log[-1]["prompts"]  # of each update; small data can be less than a batch
        run = {"updates": len(log), "dose": dose(log, n_prompts)}
        for name, place in PLACES.items():
            *groups, key = place.split()
            scores = result
            for group in groups:
                scores = scores.get(group, {})
            run[name] = float(scores.get(key, math.nan))
    return run


def over_seeds(values: np.ndarray) -> dict:
    """Mean, 95 % interval and p of a true mean of 0 (Student's t). nan is a seed without a value.

    Of differences between two items on the same seeds, this is the paired t-test.
    """
    values = values[np.isfinite(values)]
    result = {"mean": None, "ci95": None, "p": None}
    if len(values) > 0:
        result["mean"] = float(values.mean())
    if len(values) > 1 and np.ptp(values) > 0:  # without spread there is no t
        test = stats.ttest_1samp(values, 0)
        result["ci95"] = np.array(test.confidence_interval(0.95)).tolist()
        result["p"] = float(test.pvalue)
    return result


def summarize(runs: dict[str, list[dict]], seeds: list[int], base: str) -> dict:
    """What compare.json holds, from the `read_run` of each item on each seed."""
    rows = {}
    for item in runs:
        rows[item] = {"seeds": seeds}
        for name in SCORES:
            values = np.array([run[name] for run in runs[item]])
            others = np.array([run[name] for run in runs[base]])
            known = [value if math.isfinite(value) else None for value in values.tolist()]
            rows[item][name] = {"values": known, **over_seeds(values)}
            rows[item][name][f"minus_{base}"] = over_seeds(values - others)
    return rows


def show(name: str, score: dict) -> str:
    """Mean ± half of its interval."""
    digits = 3 if name.startswith("nll") else 1
    text = "-" if score["mean"] is None else f"{score['mean']:.{digits}f}"
    if score["ci95"] is not None:
        text += f" ±{(score['ci95'][1] - score['ci95'][0]) / 2:.{digits}f}"
    return text


def table(rows: dict, base: str) -> str:
    """compare.json as text, 100 columns wide: a block for each score, a line for each item."""
    lines = [f"{'mean over seeds ± half of its 95 % interval':67}{'minus ' + base[:27]:>33}"]
    for name in SCORES:
        lines.append(name.replace("_", " "))
        for item, row in rows.items():
            difference = show(name, row[name][f"minus_{base}"])
            lines.append(f"  {item[:50]:50}{show(name, row[name]):>15}{difference:>33}")
    return "\n".join(lines)


def finish(runs: dict[str, list[dict]], seeds: list[int], base: str, out: Path) -> None:
    """Write compare.json and print the table."""
    rows = summarize(runs, seeds, base)
    content = json.dumps(rows, indent=2, allow_nan=False)
    r2d.write_file(out / "compare.json", content.encode())
    print("\n" + table(rows, base))


def main(arguments: list[str] | None = None) -> int:
    """The exit status: 0 done, 2 bad input, 130 stopped by Ctrl-C."""
    style = {"formatter_class": argparse.RawDescriptionHelpFormatter, "allow_abbrev": False}
    parser = argparse.ArgumentParser("compare.py", argparse.SUPPRESS, __doc__, **style)
    parser.add_argument("items", nargs="+", metavar="ITEM", help="such as r2d,no-stage1,cap=0.5")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="(default 0 1 2)")
    parser.add_argument("--out", type=Path, default="compare", help="folder (default compare)")
    args, further = parser.parse_known_args(arguments)
    seeds = sorted(set(args.seeds))
    base = "r2d" if "r2d" in args.items else args.items[0]
    runs = {item: [] for item in args.items}
    try:
        plans = []  # all are checked before the first run begins
        for seed in seeds:
            for item in runs:
                plans.append((item, plan(item, seed, args.out, further)))
        for item, run_arguments in plans:
            print("\nr2d.py", *run_arguments, flush=True)
            status = r2d.main(run_arguments)
            if status != 0:
                return status
            runs[item].append(read_run(r2d.parse_args(run_arguments).out))
        finish(runs, seeds, base, args.out)
    except (InputError, OSError) as error:
        print(f"compare.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
