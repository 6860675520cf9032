"""The assignment: its grader against right, wrong and hostile answers, and its handout.

Students: this file holds solutions.
"""

import csv
import json
import os
import re
import shlex
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from answers import CHEATS, IMPORTS, RIGHT, VECTORISED, WRONG, functions

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "notebooks" / "assignment"
sys.path.insert(0, str(FOLDER))
import grade  # noqa: E402
from checks import CHECKS, PROBLEMS, points_of  # noqa: E402

HANDOUT = (FOLDER / "README.md").read_text(encoding="utf-8")
TINY = "--limit 20 --width 16 --layers 1 --stage1-steps 2 --stage2-steps 4 --max-target 16".split()
BEST = IMPORTS + VECTORISED
PARTS = functions(VECTORISED)

# The core's own functions, where it has the problem's.
CORE = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
from functools import partial
from types import SimpleNamespace
from unittest import mock
import data, metrics, model, r2d

p_linear = lambda i, n, *shape: r2d.p_predicted(i, n, "linear", *shape)
p_exponential = lambda i, n, *shape: r2d.p_predicted(i, n, "exponential", *shape)
p_inverse_sigmoid = lambda i, n, *shape: r2d.p_predicted(i, n, "inverse-sigmoid", *shape)
flip_coins = r2d.flip_coins
macro_f1 = metrics.macro_f1
run = SimpleNamespace(options=SimpleNamespace(method="r2d"))
explain_prompts = partial(r2d.explain_prompts, run)

def mix_labels(gold, questions, labels, coins, predict):
    notes = [data.Example(question, label, "") for question, label in zip(questions, gold)]
    run = SimpleNamespace(dataset=SimpleNamespace(labels=labels))
    with mock.patch.object(r2d, "predict_labels", lambda run, asked: predict(asked)):
        return r2d.mix_labels(run, notes, coins)

def token_mean_loss(logits, targets):
    core = SimpleNamespace(config=SimpleNamespace(pad_id=0), logits=lambda x: x)
    core.decode = lambda source, labels: logits
    return model.Transformer.nll(core, None, targets).sum() / (targets != 0).sum().clamp(min=1)

def corpus_bleu(hypotheses, references):
    return metrics.corpus_bleu(list(map(" ".join, hypotheses)), list(map(" ".join, references)))

def following(flipped, predicted, argued):
    rows = []
    for f, p, a in zip(flipped, predicted, argued):
        row = {{"label": "gold", "rationale": "x", "flipped_label": f, "predicted_label": p}}
        for condition in ("gold", "predicted", "flipped"):
            row |= {{f"rationale_given_{{condition}}": "x", f"argues_given_{{condition}}": a}}
            row |= {{f"nats_given_{{condition}}": 1.0, "tokens": 1}}
        rows.append(row)
    scores = metrics.score(rows, ["gold"]) if rows else {{"exposure": {{}}}}
    return scores["exposure"].get("following", math.nan)
"""
HOSTILE = {  # the first lines of exposure_gap
    "exits": "__import__('os')._exit(0)",
    "loops without end": "while True: pass",
    "waits without end": "__import__('time').sleep(1000)",
    "allocates 100 GB": "return torch.empty(100 * 2**30, dtype=torch.uint8)",
    "recurses": "return exposure_gap(statistic, gold, own)",
    "writes a report": f"open({str(FOLDER / 'grade.json')!r}, 'w').write('{{}}')",
    "listens": "__import__('socket').create_server(('127.0.0.1', 0))",
    "ends its parent": "import os, signal; os.kill(os.getppid(), signal.SIGKILL)",
    "returns a gigabyte": "return 'x' * 10**9",
}


def graded(code: str, seed: int = 0, closed: tuple = (), **limits: float) -> dict:
    return grade.Grader(code, "answer.py", seed, list(closed), **limits).grade()


def lost(result: dict) -> dict[str, list[str]]:
    """The hints of the problems that do not get all of their points."""
    problems = result["problems"].items()
    return {name: one["failed"] for name, one in problems if one["points"] < one["of"]}


@pytest.fixture(scope="module")
def grader():
    """One child for all answers that are graded by a problem: starting torch costs time."""
    one = grade.Grader(BEST, "answer.py", 0, [])
    yield one
    one.child.stop()


def regrade(grader: object, problem: str, function: str) -> dict:
    """Grade one problem, its function replaced."""
    grader.source = f"{BEST}\n{function}\n"
    grader.load()
    return grader.grade_problem(problem)


@pytest.mark.parametrize("style", RIGHT)
@pytest.mark.parametrize("seed", range(2))
def test_right_answers_get_all_points(style: str, seed: int) -> None:
    """Catches a check that allows one way only, or fails for some random inputs."""
    result = graded(IMPORTS + RIGHT[style], seed)
    assert not lost(result) and result["points"] == 70 and not result["notes"]


def test_the_core_gets_all_points(monkeypatch) -> None:
    """Catches a check that contradicts what r2d.py does. The fence is opened for that."""
    monkeypatch.setattr(grade, "SOLUTIONS", [])
    assert not lost(graded(BEST + CORE))


@pytest.mark.parametrize(("problem", "name", "old", "new"), WRONG)
def test_a_wrong_answer_loses_points(grader, problem, name, old, new) -> None:
    """Catches a check that cannot fail, and a hint that says nothing."""
    right = PARTS[PROBLEMS[problem]]
    assert right.count(old) >= 1
    result = regrade(grader, problem, right.replace(old, new))
    assert result["points"] < result["of"] and 10 < len(result["failed"][0]) < 400


@pytest.mark.parametrize("name", CHEATS)
def test_a_cheat_gets_no_points_for_any_problem(grader, name) -> None:
    """Catches expected values, or a solution, within reach of the graded code."""
    body = CHEATS[name].format(folder=str(FOLDER), root=str(ROOT))
    for problem, function in PROBLEMS.items():
        signature = PARTS[function][PARTS[function].index("def ") :].split("\n")[0]
        assert regrade(grader, problem, f"{signature}\n    {body}")["points"] == 0, problem


def test_each_problem_has_enough_wrong_answers() -> None:
    """Catches a problem whose checks nobody tried."""
    for problem in PROBLEMS:
        assert sum(row[0] == problem for row in WRONG) >= 8


def test_partial_credit() -> None:
    """Catches points that come whole, and points without the core of a problem."""
    coin = PARTS["flip_coins"]
    one_check = coin.replace("    return", "    generator.manual_seed(1)\n    return")
    result = graded(f"{BEST}\n{one_check}\n")
    assert 0 < result["problems"]["coin"]["points"] < points_of("coin")
    assert set(lost(result)) == {"coin"} and result["points"] < 70
    no_core = coin.replace("< p", "< 0.5")  # independent, from the generator, and wrong
    assert graded(f"{BEST}\n{no_core}\n")["problems"]["coin"]["points"] == 0


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_answer_loses_its_problem_and_no_other(name) -> None:
    """Catches a grader that hangs, dies, or runs out of memory with an answer."""
    code = f"def exposure_gap(statistic, gold, own):\n    {HOSTILE[name]}\n    return 5.0\n"
    result = graded(BEST + code, seconds=4, waiting=20 if "waits" in name else 300)
    assert result["points"] == 67 and set(lost(result)) == {"exposure_gap"}


@pytest.mark.parametrize(
    "code", ["def p_linear(:", "raise SystemExit", "import no_such_module", "\0", "x = " + "(" * 500]
)
def test_a_file_that_cannot_be_loaded_gets_nothing(code) -> None:
    """Catches a traceback, or points, for a file with an error outside of its functions."""
    result = graded(IMPORTS + code)
    assert result["points"] == 0 and "cannot be loaded" in result["trouble"]


def test_a_busy_machine_changes_no_grade() -> None:
    """Catches a limit on the time of the clock: here a right answer has a tenth of a processor."""
    stop = threading.Event()
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(8)]
    try:
        assert graded(BEST, seed=7, seconds=8)["points"] == 70
    finally:
        stop.set()
        for process in busy:
            process.kill()


def test_notes_for_a_person() -> None:
    """Catches an import check that sees only plain lines."""
    code = "import torch; import sacrebleu as s\nif 1: from r2d import load\nmodel.eval()\n"
    code += "x = __import__('metrics'); exec('import model')\nimport importlib, re\n"
    notes = grade.notes_on(code + "f = re.compile('a'); f.__closure__")
    lines = [1, 2, 4, 4, 5, 6]
    assert [int(note.split()[1]) for note in notes] == lines


def test_a_class(tmp_path: Path) -> None:
    """Catches a submission that stops the class, reads another one, or is lost from the table."""
    folder = tmp_path / "class"
    (folder / "ann").mkdir(parents=True)
    (folder / "empty").mkdir()
    (folder / "ann" / "adapters.py").write_text(BEST, encoding="utf-8")
    (folder / "=bob.py").write_text("raise SystemExit", encoding="utf-8")
    theft = f"exec(open({str(folder / 'ann' / 'adapters.py')!r}).read())"
    (folder / "cheat.py").write_text(theft, encoding="utf-8")
    os.symlink(folder / "ann" / "adapters.py", folder / "link.py")
    target = tmp_path / "all.csv"
    assert grade.main([str(folder), "--csv", str(target), "--jobs", "2"]) == 0
    rows = {row["name"]: row for row in csv.DictReader(target.open(encoding="utf-8"))}
    assert {name: int(row["points"]) for name, row in rows.items()} == {
        "'=bob": 0, "ann": 70, "cheat": 0, "empty": 0, "link": 0
    }  # fmt: skip
    assert "PermissionError" in rows["cheat"]["trouble"] and "exec" in rows["cheat"]["notes"]
    assert [int(rows["ann"][problem]) for problem in PROBLEMS] == list(map(points_of, PROBLEMS))


@pytest.mark.parametrize("arguments", [["nowhere.py"], ["."], ["adapters.py", "--csv", "x"]])
def test_bad_input_of_the_grader(arguments: list[str], monkeypatch, capsys) -> None:
    """Catches a traceback."""
    monkeypatch.chdir(FOLDER)
    assert grade.main(arguments) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_gradescope(tmp_path: Path) -> None:
    """Catches scripts that do not run as Gradescope runs them, and another format than theirs."""
    source, submission = tmp_path / "source", tmp_path / "submission"
    for folder in (source, submission, tmp_path / "results"):
        folder.mkdir()
    listed = re.search(r"^zip -j autograder.zip (.*)$", INSTRUCTORS, re.M)[1]
    for name in shlex.split(listed):  # what the zip file holds, flat
        for path in FOLDER.glob(name):
            (source / path.name).write_bytes(path.read_bytes())
    for script in ("setup.sh", "run_autograder"):
        assert (source / script).read_bytes().startswith(b"#!/usr/bin/env bash\n")
        subprocess.run(["bash", "-n", source / script], check=True)
    bad = PARTS["dose"].replace("100 * sum", "sum")
    for code, score in ((BEST + bad, 66), (None, 0)):
        if code:
            (submission / "adapters.py").write_text(code, encoding="utf-8")
        else:
            (submission / "adapters.py").unlink()
        environment = {**os.environ, "AUTOGRADER": str(tmp_path), "PYTHON": sys.executable}
        subprocess.run(["bash", source / "run_autograder"], check=True, env=environment)
        result = json.loads((tmp_path / "results" / "results.json").read_text(encoding="utf-8"))
        check_gradescope(result)
        assert result["score"] == score


def check_gradescope(result: dict) -> None:
    """The format of results.json, from Gradescope's autograder documentation."""
    tops = {"score": (int, float), "execution_time": (int, float), "output": str}
    tops |= {"output_format": str, "visibility": str, "stdout_visibility": str}
    tops |= {"extra_data": dict, "tests": list, "leaderboard": list}
    fields = {"score": (int, float), "max_score": (int, float), "status": str, "name": str}
    fields |= {"name_format": str, "number": str, "output": str, "output_format": str}
    fields |= {"tags": list, "visibility": str, "extra_data": dict}
    shown = {"hidden", "after_due_date", "after_published", "visible"}
    for entry, allowed in [(result, tops), *((test, fields) for test in result["tests"])]:
        for key, value in entry.items():
            assert isinstance(value, allowed[key]), key
        assert entry.get("visibility", "visible") in shown
        assert entry.get("status", "passed") in {"passed", "failed"}
    scores = [test["score"] for test in result["tests"] if "score" in test]
    assert sum(scores) == result["score"]
    assert sum(test.get("max_score", 0) for test in result["tests"]) == 70


def test_the_handout_names_every_problem_function_and_point() -> None:
    """Catches a handout whose points are not the grader's, and a starter without a function."""
    rows = re.findall(r"^\| `(\w+)` \| `(\w+)` \| (\d+) \|", HANDOUT, re.M)
    assert [(problem, int(points)) for problem, _, points in rows] == [
        (problem, points_of(problem)) for problem in PROBLEMS
    ]
    assert {problem: function for problem, function, _ in rows} == PROBLEMS
    topic = list(PROBLEMS)[: list(PROBLEMS).index("shift_right")]
    assert sum(map(points_of, PROBLEMS)) == 70 and sum(map(points_of, topic)) >= 40
    starter = (FOLDER / "adapters.py").read_text(encoding="utf-8").split("\ndef ")[1:]
    for function, (problem, name) in zip(starter, PROBLEMS.items(), strict=True):
        assert function.startswith(f"{name}(") and f'"""Problem {problem}. ' in function
        assert "raise NotImplementedError" in function
    assert all(len(CHECKS[problem]) >= 1 for problem in PROBLEMS)


def test_every_file_with_solutions_is_named() -> None:
    """Catches a solution that the handout does not tell students to leave closed."""
    closed = re.search(r"do not open(.*?)before you have handed in", HANDOUT, re.S)[1]
    holds = re.compile(r"min\(cap, i / n\)|% of the answer")
    for path in [*ROOT.glob("*.py"), *ROOT.glob("tests/*.py"), *FOLDER.glob("*")]:
        if path.is_file() and holds.search(path.read_text(encoding="utf-8")):
            assert path.name in closed, path
