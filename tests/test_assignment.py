"""The assignment: its checks against right and wrong answers, the grader, the export, the hand-in.

Students: this file holds solutions.
"""

import csv
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from answers import IMPORTS, PLAIN, RIGHT, WRONG, functions, lost_concepts, module, wrong_answers
from helpers import ROOT, lines, read, write_notes

FOLDER = ROOT / "notebooks" / "assignment"
sys.path[:0] = [str(FOLDER), str(ROOT / "notebooks")]
os.environ.setdefault("OMP_NUM_THREADS", "1")  # of the processes started here
import experiment  # noqa: E402
import export  # noqa: E402
import grade  # noqa: E402
import verify  # noqa: E402
from checks import CHECKS, hint_of  # noqa: E402

import r2d  # noqa: E402

LEARNS = "--limit 32 --stage1-steps 6 --stage2-steps 12 --eval-every 3 --batch-size 8 --width 32"
LEARNS += " --heads 2 --layers 1 --lr 0.1 --vocab-size 400 --max-target 16 --warmup 0.1"
README = (FOLDER / "README.md").read_text(encoding="utf-8")
INSTRUCTORS = (FOLDER / "INSTRUCTORS.md").read_text(encoding="utf-8")


def python(folder: Path, *arguments: object) -> subprocess.CompletedProcess:
    command = list(map(str, [sys.executable, *arguments]))
    return subprocess.run(command, cwd=folder, capture_output=True, encoding="utf-8")


def test_right_answers_keep_all_points_and_wrong_ones_lose_those_of_their_concepts() -> None:
    """Catches a check that allows one way only, that cannot fail, or fails for another concept."""
    for style, code in RIGHT.items():
        for function in WRONG:
            assert not lost_concepts(module(code), function, seed=7), (style, function)
    for function, name, student, lost in wrong_answers():
        assert lost_concepts(student, function, seed=3) == lost, (function, name)
    for function, answers in WRONG.items():
        places = {place for *_, lost in answers for place in lost}
        assert len(answers) >= 8
        assert len(places) == sum(one.function == function for one in CHECKS)  # each can be lost


LINES = ["while True: pass", "__import__('os')._exit(0)", "__import__('time').sleep(1000)"]
LINES += ["torch.empty(3 * 2**30, dtype=torch.uint8)", "open('large', 'wb').write(b'x' * 2**25)"]
HOSTILE = dict(zip(WRONG, LINES, strict=False))  # the first lines of functions that are right else


def test_gradescope_and_code_that_misbehaves(tmp_path) -> None:
    """Catches an archive that lacks a file, packages that differ from a student's, a limit that
    does not hold, and one that costs the points of other functions."""
    for name in ("source", "submission", "results"):
        (tmp_path / name).mkdir()
    source = tmp_path / "source"
    for pattern in re.search(r"^zip -j autograder.zip (.*)$", INSTRUCTORS, re.M)[1].split():
        for path in FOLDER.glob(pattern):
            shutil.copy(path, source)
    packages = (source / "requirements.txt").read_text(encoding="utf-8")
    assert "install -r" in (source / "setup.sh").read_text(encoding="utf-8")
    assert all(package in packages for package in grade.PACKAGES)
    text = (source / "grade.py").read_text(encoding="utf-8")
    (source / "grade.py").write_text(text.replace("SECONDS = 10", "SECONDS = 6"), encoding="utf-8")
    code = IMPORTS + PLAIN
    for function, line in HOSTILE.items():
        first, rest = functions(PLAIN)[function].split("\n", 1)
        code += f"\n{first}\n    {line}\n{rest}\n"
    (tmp_path / "submission" / "method.py").write_text(code, encoding="utf-8")
    environment = {**os.environ, "AUTOGRADER": str(tmp_path), "PYTHON": sys.executable}
    subprocess.run(["bash", source / "run_autograder"], check=True, env=environment)
    result = read(tmp_path / "results" / "results.json")
    for test in result["tests"]:
        assert test["score"] == (0 if test["name"] in HOSTILE else test["max_score"]), test
    assert sum(test["max_score"] for test in result["tests"]) == grade.TOTAL


def test_a_class_with_missing_packages_and_damaged_files(tmp_path) -> None:
    """Catches a file that stops the class, and an import that works here and not for grading."""
    (tmp_path / "ann" / "x").mkdir(parents=True)
    (tmp_path / "ann" / "x" / "method.py").write_text(IMPORTS + PLAIN, encoding="utf-8")
    (tmp_path / "bob.py").write_text("import scipy\n", encoding="utf-8")
    (tmp_path / "cid.py").write_text("def broken(:", encoding="utf-8")
    (tmp_path / "dan.py").write_text("x = 1 / 0", encoding="utf-8")
    (tmp_path / "eve").mkdir()
    done = python(tmp_path, FOLDER / "grade.py", ".", "--csv", "all.csv")
    assert done.returncode == 0, done.stderr
    rows = list(csv.DictReader((tmp_path / "all.csv").read_text(encoding="utf-8").splitlines()))
    assert [int(row["points"]) for row in rows] == [grade.TOTAL, 0, 0, 0, 0]
    for row, hint in zip(rows[1:4], ["imports scipy", "syntax", "ZeroDivision"], strict=True):
        assert hint in row["trouble"]


def test_the_handout_names_every_function_and_its_points() -> None:
    """Catches a handout whose points are not the grader's, and a starter without a function."""
    section = README.split("## The automatic part")[1].split("## The experiment")[0]
    rows = re.findall(r"^\| `(\w+)` \| (\d+) \|", section, re.M)
    points = dict.fromkeys(WRONG, 0)
    for one in CHECKS:
        points[one.function] += one.points
    assert [(name, int(text)) for name, text in rows] == list(points.items())
    starter = (FOLDER / "method.py").read_text(encoding="utf-8")
    assert re.findall(r"^def (\w+)", starter, re.M) == list(points)


@pytest.fixture(scope="module")
def course(tmp_path_factory) -> Path:
    """What students get."""
    folder = tmp_path_factory.mktemp("export") / "course"
    export.export(folder)
    return folder


def test_the_export_holds_no_solution(course) -> None:
    """Catches a solution, an answer or a result in any file that students get."""
    telling = ["cap, i / n", "torch.rand(", "if label in run.dataset.labels", 'f"given label:']
    telling += ["* loss_predict", "rng.integers", "np.percentile", '== data["flipped_label"]']
    telling += ["followed[differs]", "target_ids[:, :-1]", "masked_fill(done", "== c.eos_id"]
    telling += ["bleu_from_counts(counts) - bleu_from_counts(others)"]
    files = [*ROOT.glob("*.py"), FOLDER / "verify.py", FOLDER / "INSTRUCTORS.md"]
    repository = "".join(path.read_text(encoding="utf-8") for path in files)
    assert all(piece in repository for piece in telling)  # the list is not out of date
    for code in RIGHT.values():
        for line in code.splitlines():
            if len(line.strip()) > 24 and not line.startswith("def "):
                telling.append(line.strip())
    listed = set(re.findall(r"`(\w+\.py)`", README.split("## The automatic")[0]))
    names = listed | {"README.md", "AGENTS.md", "LICENSE", "requirements.txt"}
    assert {path.name for path in course.iterdir()} == names
    for path in course.iterdir():
        text = path.read_text(encoding="utf-8")
        for piece in telling:
            assert piece not in text, (path.name, piece)
    starter = module((course / "method.py").read_text(encoding="utf-8"))
    for one in CHECKS:
        assert hint_of(one, starter, 0) == "not written yet"
    assert "Do not write" in (course / "AGENTS.md").read_text(encoding="utf-8")


def test_right_answers_train_as_the_core_does_and_wrong_ones_do_not(course, tmp_path) -> None:
    """Catches a function of the export that is the core's, or is called in another way."""
    options = [*LEARNS.split(), "--data", write_notes(tmp_path / "notes.csv")]
    assert r2d.main([*map(str, options), f"--out={tmp_path / 'core'}"]) == 0
    mistakes = [("< p", ">= p"), ("return alpha *", "return 0.1 *"), ("argmax", "argmin")]
    wrong = PLAIN
    for old, new in [*mistakes, ("F.pad(targets[:, :-1], (1, 0))", "targets")]:
        assert old in wrong
        wrong = wrong.replace(old, new)
    for name, code in {"right": PLAIN, "wrong": wrong}.items():
        (course / "method.py").write_text(IMPORTS + code, encoding="utf-8")
        assert python(course, "r2d.py", *options, "--out", tmp_path / name).returncode == 0
    for file in ("log.jsonl", "predictions.jsonl"):
        one, two = [lines(tmp_path / name / file) for name in ("right", "core")]
        for line, expected in zip(one, two, strict=True):
            assert line == expected
    right, wrong = (lines(tmp_path / name / "log.jsonl") for name in ("right", "wrong"))
    assert right[0]["loss"] != wrong[0]["loss"]  # of stage 1: shift_right
    for line in wrong[6:]:
        weighted = line["alpha"] * line["loss_predict"] + (1 - line["alpha"]) * line["loss_explain"]
        assert line["loss"] != pytest.approx(weighted)  # stage2_loss
    used = [sum(line[key] for key in ("used_predicted", "invalid_predicted")) for line in wrong[6:]]
    assert used[0] == 8 and used[-1] < 8  # flip_coins: P is 0, and then rises
    texts = [lines(tmp_path / name / "predictions.jsonl")[0] for name in ("right", "wrong")]
    assert texts[0]["rationale_given_gold"] != texts[1]["rationale_given_gold"]  # greedy_decode


@pytest.fixture(scope="module")
def hand_in(course, tmp_path_factory) -> Path:
    """The nine runs, all of them one short run, with their report."""
    (course / "method.py").write_text(IMPORTS + PLAIN, encoding="utf-8")
    done = python(course, "experiment.py", "--try")
    numbers = verify.run_numbers(course / "runs" / "try")  # by the core: as by right answers
    assert verify.as_markdown({"run": {"try": numbers}}) in done.stdout, done.stderr
    assert len({numbers[f"bleu_{name}"][0] for name in ("gold", "predicted", "flipped")}) == 3
    folder = tmp_path_factory.mktemp("hand-in")
    shutil.copy(course / "method.py", folder)
    for item in verify.ITEMS:
        for seed in verify.SEEDS:
            shutil.copytree(course / "runs" / "try", folder / "runs" / f"{item}-{seed}")
    text = verify.as_markdown(verify.tables(folder / "runs"))
    (folder / "report.md").write_text(f"The gap may be 5 to 10.\n\n{text}", encoding="utf-8")
    return folder


def test_every_number_of_a_report_is_checked(hand_in) -> None:
    """Catches a number of a report, in a table or in the text, that is not recomputed."""
    result = verify.tables(hand_in / "runs")
    text = (hand_in / "report.md").read_text(encoding="utf-8")
    assert verify.wrong_in_report(text, result) == []
    found = list(verify.NUMBER.finditer(text))
    assert len(found) == 9 * 9 + 2 * 7 * 3 + 9 * 6
    for number in found:
        start, end = number.span()
        wrong = f"{float(number[0]) + 30:.1f}" if number[0] != "nan" else "1.0"
        assert len(verify.wrong_in_report(text[:start] + wrong + text[end:], result)) == 1
    text = "It was 1234.5 here.\n" + text + "\n# Written questions\n98765.4"
    assert verify.wrong_in_report(text, result) == ["text: 1234.5 is in none of the tables"]
    assert len(verify.wrong_in_report(text.replace("| gold-1 ", "| gold-7 "), result)) == 3


def test_a_run_is_what_it_claims_to_be(hand_in, monkeypatch) -> None:
    """Catches other options, a changed log, changed texts."""
    folder = hand_in / "runs" / "sampling-0"
    monkeypatch.setattr(verify, "OPTIONS", [*verify.OPTIONS, *experiment.SHORT])
    assert verify.wrong_in_run(folder, "sampling", 0) == []
    assert "seed" in verify.wrong_in_run(folder, "sampling", 1)[0]
    assert "schedule" in verify.wrong_in_run(folder, "gold", 0)[0]
    change(folder / "log.jsonl", "p_predicted", 0.123)
    change(folder / "predictions.jsonl", "rationale_given_gold", "Call 911. Home care.")
    found = verify.wrong_in_run(folder, "sampling", 0)
    assert len(found) == 2 and "p_predicted" in found[0] and "line 1" in found[1]


def change(path: Path, key: str, value: object) -> None:
    """In the first line of a file that has the key."""
    rows = lines(path)
    next(row for row in rows if key in row)[key] = value
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
