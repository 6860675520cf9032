"""Published data sets as r2d.py reads them: question,label,rationale in train, val and test.csv.

    python notebooks/convert.py pubmedqa ori_pqal.json [test_ground_truth.json] OUT_DIR
    python notebooks/convert.py bioasq TASK_B.json... OUT_DIR
    python notebooks/convert.py esnli FOLDER OUT_DIR

PubMedQA: GitHub, pubmedqa/pubmedqa (MIT). test_ground_truth.json has the ids of the official test.
BioASQ: participants' area of bioasq.org, after registration. Only the yes/no questions are taken.
e-SNLI: GitHub, OanaMariaCamburu/e-SNLI (MIT): s1, s2, labels and preproc1_expl_1 of dev and test.
If the same files of train are there, the splits are as published; else dev becomes val and train.

What its authors did not split is split at random, always in the same way: a tenth is val, a tenth
test. Equal questions, in e-SNLI equal premises, never stand in two splits.
"""

import argparse
import csv
import io
import json
import random
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from data import InputError, write_file


class Row(NamedTuple):
    question: str
    label: str
    rationale: str
    group: str  # rows of one group must stand in one split


Splits = dict[str, list[Row]]


def make_row(question: str, label: str, rationale: str, group: str) -> Row:
    (question + label + rationale).encode()  # a lone surrogate, which JSON can hold, fails
    group = " ".join(group.casefold().split())  # case and blanks make no other text
    return Row(question.strip(), label.strip(), rationale.strip(), group)


# ---- Reading. Each data set gives the texts of its rows.
def read_text(path: Path) -> str:
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: {error}; give the file as it was published") from None
    if text.startswith("version https://git-lfs"):
        raise InputError(f"{path}: only a Git LFS pointer; get the file by git lfs pull")
    return text


def read_json(path: Path, texts_of: Callable) -> dict[str, Row]:
    """The rows by their place in the file. Raises InputError, which names the place."""
    text = read_text(path)
    rows = {}
    place = "the start"  # until the first row could be read
    try:
        for place, *texts in texts_of(json.loads(text)):
            rows[place] = make_row(*texts)
    except Exception as error:  # damaged files raise a dozen types
        problem = f"{type(error).__name__}: {str(error)[:300]}, at or after {place}"
        raise InputError(f"{path}: {problem}; give the file as it was published") from None
    return rows


def pubmedqa_texts(content: dict) -> Iterator[tuple]:
    for key, item in content.items():
        question = " ".join([item["QUESTION"]] + item["CONTEXTS"])
        yield key, question, item["final_decision"], item["LONG_ANSWER"], question


def truth_texts(content: dict) -> Iterator[tuple]:
    """PubMedQA's test_ground_truth.json: ids and labels."""
    for key, label in content.items():
        yield key, "", label, "", ""


def bioasq_texts(content: dict) -> Iterator[tuple]:
    for number, item in enumerate(content["questions"], 1):
        if item["type"] != "yesno":
            continue
        texts = [item["body"]]
        for snippet in item.get("snippets", []):  # some questions have none
            texts.append(snippet["text"])
        label, rationale = item["exact_answer"], item["ideal_answer"]
        if isinstance(label, list):  # newer files give lists, the best answer first
            label = label[0]
        if isinstance(rationale, list):
            rationale = rationale[0]
        yield f"question {number}", " ".join(texts), label.lower(), rationale, item["body"]


def read_esnli(folder: Path, name: str) -> list[Row]:
    """Line i of each of the four files belongs to example i."""
    columns = []
    for kind in ("s1", "s2", "labels", "preproc1_expl_1"):
        path = folder / f"{kind}.{name}"
        lines = read_text(path).removesuffix("\n").split("\n")  # some lack the last line end
        columns.append([line.strip() for line in lines])
        if len(lines) != len(columns[0]):
            problem = f"has {len(lines)} lines, s1.{name} has {len(columns[0])}"
            raise InputError(f"{path}: {problem}; give both as they were published")
    rows = []
    for premise, hypothesis, label, explanation in zip(*columns, strict=True):
        question = f"premise: {premise} hypothesis: {hypothesis}"
        if not premise or not hypothesis:
            question = ""
        if label == "-":  # the annotators did not agree
            label = ""
        rows.append(make_row(question, label, explanation, premise))
    return rows


# ---- Splitting
def split(rows: Iterable[Row], test: list[Row] | None = None) -> Splits:
    """A tenth of the groups for val; a tenth for test, if that is not given; the rest for train."""
    by_group = defaultdict(list)
    for row in rows:
        by_group[row.group].append(row)
    groups = list(by_group.values())
    random.Random(0).shuffle(groups)
    tenth = round(len(groups) / 10)
    splits = {"train": [], "val": [], "test": test or []}
    for i, group in enumerate(groups):
        if i < tenth:
            splits["val"] += group
        elif i < 2 * tenth and test is None:
            splits["test"] += group
        else:
            splits["train"] += group
    return splits


def pubmedqa_splits(path: Path, truth: Path | None = None) -> Splits:
    rows = read_json(path, pubmedqa_texts)
    if truth is None:
        return split(rows.values())
    official = read_json(truth, truth_texts)
    test = [row for key, row in rows.items() if key in official]
    rest = [row for key, row in rows.items() if key not in official]
    if len(test) < len(official):
        print(f"note: {len(official) - len(test)} ids of {truth} are not in {path}")
    return split(rest, test)


def bioasq_splits(*paths: Path) -> Splits:
    rows = {}
    for path in paths:
        for row in read_json(path, bioasq_texts).values():
            rows.setdefault(row.group, row)  # files repeat the questions of earlier years
    return split(rows.values())


def esnli_splits(folder: Path) -> Splits:
    dev = read_esnli(folder, "dev")
    test = read_esnli(folder, "test")
    if list(folder.glob("*.train")):
        return {"train": read_esnli(folder, "train"), "val": dev, "test": test}
    return split(dev, test)


def select(splits: Splits) -> Splits:
    """The complete rows; of a group that stands in two splits those of test, or else of val."""
    selected = {}
    seen = set()
    for name in ("test", "val", "train"):
        selected[name] = []
        skipped = Counter()
        for row in splits[name]:
            if not row.question or not row.label:
                skipped["without question or label"] += 1
            elif row.group in seen:
                skipped["also in another split"] += 1
            else:
                selected[name].append(row)
        for reason, count in skipped.items():
            print(f"note: {count} of {name} skipped: {reason}")
        seen.update(row.group for row in selected[name])
    return selected


def write_splits(splits: Splits, out: Path) -> None:
    for name, rows in splits.items():
        text = io.StringIO()
        writer = csv.writer(text)
        writer.writerow(["question", "label", "rationale"])
        for row in rows:
            writer.writerow([row.question, row.label, row.rationale])
        write_file(out / f"{name}.csv", text.getvalue().encode())


def main(arguments: list[str] | None = None) -> int:
    """The exit status: 0 done, 2 bad input."""
    kinds = {"pubmedqa": pubmedqa_splits, "bioasq": bioasq_splits, "esnli": esnli_splits}
    most = {"pubmedqa": 2, "bioasq": sys.maxsize, "esnli": 1}
    style = {"usage": argparse.SUPPRESS, "formatter_class": argparse.RawDescriptionHelpFormatter}
    parser = argparse.ArgumentParser("convert.py", description=__doc__, **style)
    parser.add_argument("kind", choices=kinds)
    parser.add_argument("sources", nargs="+", type=Path, metavar="SOURCE")
    parser.add_argument("out", type=Path, metavar="OUT_DIR")
    args = parser.parse_args(arguments)
    try:
        if len(args.sources) > most[args.kind]:
            raise InputError(f"{args.sources[-1]}: one file too many; -h says what is needed")
        for path in args.out.glob("*.*"):
            if path.stem in ("train", "val", "test"):
                raise InputError(f"{path}: is already there; give another OUT_DIR")
        splits = select(kinds[args.kind](*args.sources))
        for name, rows in splits.items():
            if not rows:
                files = ", ".join(map(str, args.sources))
                raise InputError(f"{files}: no examples for {name}; give more, or other files")
        args.out.mkdir(parents=True, exist_ok=True)
        write_splits(splits, args.out)
    except InputError as error:
        print(f"convert.py: {error}", file=sys.stderr)
        return 2
    except OSError as error:  # reading raises InputError
        print(f"convert.py: {error}; give another OUT_DIR", file=sys.stderr)
        return 2
    for name in ("train", "val", "test"):
        counts = Counter(row.label for row in splits[name])
        labels = [f"{label} {count}" for label, count in sorted(counts.items())]
        print(f"{name}: {len(splits[name])} examples: {', '.join(labels)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
