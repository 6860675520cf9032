"""Recompute every number of a report from the files of its runs, and say which do not agree.

    python verify.py                          report.md and runs/ in this folder
    python verify.py --zip hand-in.zip        the same; then pack what is handed in
    python verify.py hand-ins/ann             what a student has handed in

Exit status: 0 all agree, 1 something does not, 2 a file is missing or damaged.
"""

import argparse
import json
import math
import re
import statistics
import sys
import zipfile
from pathlib import Path

import numpy as np
import torch

sys.path.append(str(Path(__file__).resolve().parent.parent.parent))  # where the core is
import data
import metrics
import r2d
from data import InputError, reading

HERE = Path(__file__).resolve().parent
OPTIONS = ["--override=0.3", "--stage1-notes=3000"]  # of all runs
ITEMS = {
    "gold": ["--notes=300", "--schedule=none"],
    "sampling": ["--notes=300"],
    "sampling-3000": ["--notes=3000"],
}
SEEDS = [0, 1, 2]
DIFFERENCES = [("sampling", "gold"), ("sampling-3000", "sampling")]
SCORES = ["macro_f1", "bleu_gold", "bleu_predicted", "bleu_flipped", "gap", "following", "dose"]
SPANS = [(1, 8), (9, 16), (17, 24)]  # positions, counted from 1; few rationales are longer
FILES = ["config.json", "log.jsonl", "predictions.jsonl", "tokens.jsonl"]  # of a run
NUMBER = re.compile(r"-?\d+\.\d+|\bnan\b")


def dose(log: list[dict]) -> float:
    """Share of stage 2's explain prompts with a wrong label, 0-100."""
    updates = [line for line in log if line["stage"] == 2]
    wrong = sum(line["wrong_predicted"] for line in updates)
    return 100 * wrong / sum(line["prompts"] for line in updates)


def error_by_position(tokens: torch.Tensor, targets: torch.Tensor) -> list[float]:
    """Share of wrong tokens at each position, 0-100, where the target has not ended."""
    real = targets != 0
    wrong = (tokens != targets) & real
    return (100 * wrong.sum(0) / real.sum(0)).tolist()


# ---- From the files of a run to its numbers


def read_lines(path: Path) -> list[dict]:
    with reading(path):
        lines = path.read_text(encoding="utf-8").splitlines()
        return [json.loads(line) for line in lines]


def run_numbers(folder: Path) -> dict[str, list[float]]:
    """Score -> its numbers: one, or for the gap three, with the ends of its interval."""
    rows = read_lines(folder / "predictions.jsonl")
    columns = {}
    for key in rows[0]:
        columns[key] = np.fromiter([row[key] for row in rows], dtype=object)
    labels = data.DISPOSITIONS
    f1 = metrics.macro_f1(columns["label"].tolist(), columns["predicted_label"].tolist(), labels)
    numbers = {"macro_f1": [f1]}
    counts = {}
    for condition in ("gold", "predicted", "flipped"):
        texts = columns[f"rationale_given_{condition}"]
        counts[condition] = metrics.corpus_counts(texts, columns["rationale"])
        numbers[f"bleu_{condition}"] = [metrics.bleu_from_counts(counts[condition])]
    exposure = metrics.exposure_scores(columns, counts)
    numbers["gap"] = [exposure["bleu_gap"], *exposure["bleu_gap_ci95"]]
    numbers["following"] = [exposure.get("following", math.nan)]
    numbers["dose"] = [float(dose(read_lines(folder / "log.jsonl")))]
    return numbers


def token_numbers(folder: Path) -> dict[str, list[float]]:
    """Mean error over spans of positions, with the true and with the model's own prefix."""
    rows = read_lines(folder / "tokens.jsonl")
    targets = torch.tensor([row["target"] for row in rows])
    numbers = {}
    for prefix in ("true", "own"):
        errors = error_by_position(torch.tensor([row[prefix] for row in rows]), targets)
        for first, last in SPANS:
            span = errors[first - 1 : last]
            numbers[f"{prefix} {first}-{last}"] = [statistics.mean(span) if span else math.nan]
    return numbers


def difference(one: list[float], two: list[float]) -> list[float]:
    """Mean of one minus two over three seeds, and the ends of its 95 % interval (paired t)."""
    differences = [a - b for a, b in zip(one, two, strict=True)]
    mean = statistics.mean(differences)
    half = 4.303 * statistics.stdev(differences) / math.sqrt(3)  # t with 2 degrees of freedom
    return [mean, mean - half, mean + half]


def tables(folder: Path) -> dict[str, dict[str, dict[str, list[float]]]]:
    """Table -> row -> column -> numbers, of all runs in a folder."""
    result: dict[str, dict] = {"run": {}, "difference": {}, "error by position": {}}
    for item in ITEMS:
        for seed in SEEDS:
            name = f"{item}-{seed}"
            result["run"][name] = run_numbers(folder / name)
            result["error by position"][name] = token_numbers(folder / name)
    for one, two in DIFFERENCES:
        row = {}
        for score in SCORES:
            values = []
            for item in (one, two):
                values.append([result["run"][f"{item}-{seed}"][score][0] for seed in SEEDS])
            row[score] = difference(*values)
        result["difference"][f"{one} minus {two}"] = row
    return result


def cell(numbers: list[float]) -> str:
    """A number, or a number and its interval."""
    texts = [f"{number:.1f}" for number in numbers]
    return texts[0] if len(texts) == 1 else f"{texts[0]} [{texts[1]}, {texts[2]}]"


def as_markdown(result: dict) -> str:
    """The tables for the report."""
    lines = []
    for title, rows in result.items():
        columns = list(next(iter(rows.values())))
        lines += ["| " + " | ".join([title, *columns]) + " |", "|---" * (len(columns) + 1) + "|"]
        for name, row in rows.items():
            lines.append("| " + " | ".join([name, *map(cell, row.values())]) + " |")
        lines.append("")
    return "\n".join(lines)


# ---- Is a run what it should be, and does the report say what the runs say?


def wrong_in_run(folder: Path, item: str, seed: int) -> list[str]:
    """What tells that a run is another than the experiment's, or that its files were changed."""
    arguments = [*OPTIONS, *ITEMS[item], f"--seed={seed}", f"--out={folder / 'not there'}"]
    o = r2d.parse_args(arguments)
    with reading(folder / "config.json"):
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    found = []
    for name, value in vars(o).items():
        if config.get(name, value) != value:  # those of a call are not in it
            found.append(f"config.json: {name} is {config.get(name)}, not {value}")
    log = [line for line in read_lines(folder / "log.jsonl") if line["stage"] == 2]
    if [line["step"] for line in log] != list(range(o.stage2_steps)):
        found.append(f"log.jsonl: {len(log)} updates of stage 2, not {o.stage2_steps} in order")
    for line in log:
        shape = (o.schedule, o.warmup, o.ramp, o.cap)
        if not math.isclose(line["p_predicted"], r2d.p_predicted(line["step"], len(log), *shape)):
            found.append(f"log.jsonl: p_predicted at update {line['step']} is not the schedule's")
            break
    rows = read_lines(folder / "predictions.jsonl")
    test = data.load_data(o).test
    if [row["question"] for row in rows] != [example.question for example in test]:
        found.append("predictions.jsonl: the notes are not the test notes of this seed")
        return found
    for number, (row, example) in enumerate(zip(rows, test, strict=True), 1):
        right = row["label"] == example.label and row["rationale"] == example.rationale
        for condition in ("gold", "predicted", "flipped"):
            argued = data.argues_for(row[f"rationale_given_{condition}"])
            right = right and argued == row[f"argues_given_{condition}"]
        if not right:
            found.append(f"predictions.jsonl, line {number}: a gold text or a verdict was changed")
            break
    return found


def numbers_of(text: str) -> list[float]:
    return [float(number) for number in NUMBER.findall(text.replace("\N{MINUS SIGN}", "-"))]


def agree(said: list[float], true: list[float]) -> bool:
    """To the digit that is shown. The ends of a bootstrap interval may come from other draws."""
    if len(said) != len(true):
        return False
    for i, (one, two) in enumerate(zip(said, true, strict=True)):
        tolerance = 0.051
        if i > 0:
            tolerance += 0.2 * (true[2] - true[1])  # seven standard deviations of 1000 draws
        if not (math.isnan(one) and math.isnan(two)) and not abs(one - two) <= tolerance:
            return False
    return True


def wrong_in_report(text: str, result: dict) -> list[str]:
    """A line for each number that the runs do not give: in tables, then in the rest of the text
    before the answers to the written questions."""
    found = []
    rows = {}
    prose = []
    title = ""
    for line in text.splitlines():
        cells = [part.strip() for part in line.strip().strip("|").split("|")]
        if not line.lstrip().startswith("|"):
            prose.append(line)
        elif cells[0] in result:
            title = cells[0]
        else:
            rows[title, cells[0]] = cells[1:]
    known = [0.05, 0.3, 0.6, 0.9]  # of the schedule and the data
    for title, table in result.items():
        for name, row in table.items():
            cells = rows.get((title, name), [])
            if len(cells) != len(row):
                found.append(f"table {title}: the row {name} is missing, or has other columns")
                continue
            for said, (column, true) in zip(cells, row.items(), strict=True):
                known += true
                if not agree(numbers_of(said), true):
                    hint = f"the report says {said}, the runs {cell(true)}"
                    found.append(f"table {title}, {name}, {column}: {hint}")
    for number in numbers_of("\n".join(prose).split("# Written questions")[0]):
        if not any(abs(abs(number) - abs(one)) <= 0.051 for one in known):
            found.append(f"text: {number} is in none of the tables")
    return found


def main(arguments: list[str] | None = None) -> int:
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("verify.py", description=__doc__, formatter_class=style)
    parser.add_argument("folder", type=Path, nargs="?", default=HERE, help="of the hand-in")
    parser.add_argument("--zip", type=Path, help="pack the hand-in into this file")
    o = parser.parse_args(arguments)
    found = []
    packed = [o.folder / "method.py", o.folder / "report.md"]
    try:
        for item in ITEMS:
            for seed in SEEDS:
                folder = o.folder / "runs" / f"{item}-{seed}"
                packed += [folder / name for name in FILES]
                for problem in wrong_in_run(folder, item, seed):
                    found.append(f"run {folder.name}, {problem}")
        with reading(o.folder / "report.md", "write it first"):
            text = (o.folder / "report.md").read_text(encoding="utf-8")
        found += wrong_in_report(text, tables(o.folder / "runs"))
    except (InputError, KeyError, IndexError, TypeError) as error:
        print(f"verify.py: {type(error).__name__}: {error}", file=sys.stderr)
        return 2
    print("\n".join(found) or "All numbers of the report agree with its runs.")
    if o.zip:
        with zipfile.ZipFile(o.zip, "w", zipfile.ZIP_DEFLATED) as archive:
            for path in packed:
                archive.write(path, path.relative_to(o.folder))
        print(f"{o.zip}: {len(packed)} files, to be handed in")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
