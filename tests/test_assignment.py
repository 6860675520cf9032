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
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from answers import CHEATS, IMPORTS, RIGHT, VECTORISED, WRONG, functions
from helpers import contents, write_notes

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "notebooks" / "assignment"
sys.path[:0] = [str(FOLDER), str(ROOT / "notebooks")]
import compare  # noqa: E402
import grade  # noqa: E402
from checks import CHECKS, PROBLEMS, points_of  # noqa: E402

HANDOUT = (FOLDER / "README.md").read_text(encoding="utf-8")
INSTRUCTORS = (FOLDER / "INSTRUCTORS.md").read_text(encoding="utf-8")
TINY = "--limit 20 --width 16 --layers 1 --stage1-steps 2 --stage2-steps 4 --max-target 16".split()
LEARNS = "--limit 32 --stage1-steps 6 --stage2-steps 12 --eval-every 3 --batch-size 8 --width 32"
LEARNS += " --heads 2 --layers 1 --lr 0.1 --vocab-size 400 --max-target 16 --device cpu"
LEARNS = LEARNS.split()
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
    core.decoder_states = lambda source, targets: logits
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
    "is right with 3 GB": """torch.empty(3 * 2**30, dtype=torch.uint8)
    return statistic(gold) - statistic(own)""",
    "recurses": "return exposure_gap(statistic, gold, own)",
    "writes a report": f"open({str(FOLDER / 'grade.json')!r}, 'w').write('{{}}')",
    "listens": "__import__('socket').create_server(('127.0.0.1', 0))",
    "ends its parent": "import os, signal; os.kill(os.getppid(), signal.SIGKILL)",
    "returns a gigabyte": "return 'x' * 10**9",
    "answers too much": "return ['x' * 90000] * 100",
    "answers for the worker": """f = __import__('sys')._getframe()
    while "request" not in f.f_locals: f = f.f_back
    f.f_locals["pipe"].send({"id": f.f_locals["request"]["id"], "error": "x"})""",
}


def graded(code: str, seed: int = 0, **limits: float) -> dict:
    return grade.Grader(code, "answer.py", seed, [], **limits).grade()


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


@pytest.mark.parametrize(("seed", "style"), list(enumerate(RIGHT)))
def test_right_answers_get_all_points(seed: int, style: str) -> None:
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
    if name.startswith("patched"):  # it changes its child: others need another one
        grader = grade.Grader(BEST, "answer.py", 0, [])
    for problem, function in PROBLEMS.items():
        signature = PARTS[function][PARTS[function].index("def ") :].split("\n")[0]
        cheat = f"{signature}\n    {body}"
        assert regrade(grader, problem, cheat)["points"] == 0, problem
    if name.startswith("patched"):
        grader.child.stop()


def test_each_problem_has_enough_wrong_answers() -> None:
    """Catches a problem whose checks nobody tried."""
    for problem in PROBLEMS:
        assert sum(row[0] == problem for row in WRONG) >= 8


def test_partial_credit(grader) -> None:
    """Catches points that come whole, and points without the core of a problem."""
    coin = PARTS["flip_coins"]
    repeats = coin.replace("    return", "    generator.manual_seed(1)\n    return")
    assert regrade(grader, "coin", repeats)["points"] == 2
    half = coin.replace("< p", "< 0.5")  # independent, from the generator, and wrong
    assert regrade(grader, "coin", half)["points"] == 0


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_answer_loses_its_problem_and_no_other(name) -> None:
    """Catches a grader that hangs, dies, or runs out of memory with an answer."""
    code = f"def exposure_gap(statistic, gold, own):\n    {HOSTILE[name]}\n    return 5.0\n"
    waiting = 2 if name == "waits without end" else 300
    one = grade.Grader(BEST + code, "answer.py", 0, [], seconds=1, waiting=waiting)
    one.load()
    if name == "is right with 3 GB" and sys.platform != "linux":
        pytest.skip("memory has a limit on Linux alone; the handout says so")
    try:
        result = one.grade_problem("exposure_gap")
        assert result["points"] == 0
        if name == "loops without end" and os.name == "posix":  # and not by the clock
            assert "seconds of computing" in result["failed"][0]
        assert one.grade_problem("dose")["points"] == points_of("dose")
    finally:
        one.child.stop()


@pytest.mark.parametrize(
    "code",
    ["def p_linear(:", "raise SystemExit", "import no_such_module", "\0", "x = " + "(" * 500],
)
def test_a_file_that_cannot_be_loaded_gets_nothing(code) -> None:
    """Catches a traceback, or points, for a file with an error outside of its functions."""
    result = graded(IMPORTS + code)
    assert result["points"] == 0 and "cannot be loaded" in result["trouble"]


def test_a_busy_machine_changes_no_grade() -> None:
    """Catches a limit on the time of the clock: here eight others want the processors."""
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(8)]
    try:
        assert graded(BEST, seed=7, seconds=8)["points"] == 70
    finally:
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
        "'=bob.py": 0, "ann": 70, "cheat.py": 0, "empty": 0, "link.py": 0
    }  # fmt: skip
    assert "PermissionError" in rows["cheat.py"]["trouble"] and "exec" in rows["cheat.py"]["notes"]
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


@pytest.mark.parametrize("command", re.findall("^python .*", HANDOUT, re.M))
def test_every_command_of_the_handout_runs(command: str, tmp_path: Path) -> None:
    """Catches a command that no longer works, a starter with points, a report that is lost."""
    program, *arguments = shlex.split(command)[1:]
    if program.endswith("train.py"):  # it runs in the tests below
        seeds = arguments.index("--seeds")
        assert compare.main([arguments[0], *arguments[seeds:], *TINY, "--out", str(tmp_path)]) == 0
        return
    environment = {**os.environ, "R2D_GRADE_DIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, program, *arguments, "-p", "no:cacheprovider"],
        cwd=ROOT,
        capture_output=True,
        encoding="utf-8",
        env=environment,
    )
    assert done.returncode == 1 and "15 failed" in done.stdout and "Traceback" not in done.stdout
    report = (tmp_path / "grade.txt").read_text(encoding="utf-8").strip()
    assert "0 of 70" in report and report in done.stdout
    assert json.loads((tmp_path / "grade.json").read_text(encoding="utf-8"))["points"] == 0


def test_every_file_with_solutions_is_named() -> None:
    """Catches a solution that the handout does not tell students to leave closed."""
    closed = HANDOUT.split("do not open")[1].split("before you have handed in")[0]
    solved = re.compile(r"min\(cap, i / n\)|min\(cap, share\)|\*Full \(4\)\*")
    for path in [*ROOT.glob("*.py"), *ROOT.glob("tests/*.py"), *FOLDER.glob("*.*")]:
        if solved.search(path.read_text(encoding="utf-8")):
            assert f"`{path.name}`" in closed, path


def test_ranges_of_the_experiment_come_from_the_file() -> None:
    """Catches a range typed by hand, or one of an older file."""
    expected = json.loads((FOLDER / "expected.json").read_text(encoding="utf-8"))
    rows = []
    keys = "macro_f1 bleu_gold bleu bleu_flipped bleu_gap nll following dose".split()
    for key in keys:
        columns = []
        for item in ("r2d", "r2d,schedule=none"):
            columns.append(expected["one_thread"][item][key] + expected["two_threads"][item][key])
        columns.append([gold - own for own, gold in zip(*columns, strict=True)])
        digits = 3 if key == "nll" else 1
        cells = [f"{min(column):.{digits}f} to {max(column):.{digits}f}" for column in columns]
        rows.append(" | ".join(cells) + " |")
    assert len(expected["seeds"]) >= 8 and len(columns[0]) == 16
    assert re.findall(r"^\| .+? \| (-?\d.* to .*)$", INSTRUCTORS, re.M) == rows


def train(out: Path, adapters: Path, *options: str) -> subprocess.CompletedProcess:
    command = [sys.executable, FOLDER / "train.py", "r2d", "--seeds", "3", *options, "--out", out]
    environment = {**os.environ, "R2D_ADAPTERS": str(adapters), "OMP_NUM_THREADS": "1"}
    command = list(map(str, command))
    return subprocess.run(command, capture_output=True, encoding="utf-8", env=environment)


CHANGES = {  # what is wrong, and where it must show
    "coin": ({"flip_coins": ("< p", ">= p")}, {"used_predicted"}),
    "labels": ({"mix_labels": ("given[i] = label", "given[i] = labels[0]")}, {"loss_explain"}),
    "prompts": ({"explain_prompts": ("given label", "label")}, {"loss_explain"}),
    "rest": (
        {
            "p_linear": ("min(cap, i / n)", "cap"),
            "macro_f1": ("200", "100"),
            "corpus_bleu": ("100, 1, 0", "50, 1, 0"),
            "exposure_gap": ("- stat", "+ stat"),
            "gap_interval": ("float(low)", "float(low) - 1"),
            "following": ("a == f", "a != f"),
            "dose": ("100 *", "50 *"),
        },
        {"p_predicted", "val_macro_f1", "macro_f1", "bleu", "bleu_gap", "bleu_gap_ci95"}
        | {"following", "dose"},
    ),
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Path], list[str]]:
    """Tiny runs with right and with wrong answers, on notes so easy that labels become valid."""
    folder = tmp_path_factory.mktemp("trained")
    options = [*LEARNS, "--data", str(write_notes(folder / "notes.csv")), "--warmup", "0.1"]

    def run(name: str) -> Path:
        code = BEST
        for function, (old, new) in CHANGES.get(name, ({}, {}))[0].items():
            assert old in PARTS[function]
            code += "\n" + PARTS[function].replace(old, new) + "\n"
        (folder / f"{name}.py").write_text(code, encoding="utf-8")
        done = train(folder / name, folder / f"{name}.py", *options)
        assert done.returncode == 0, done.stderr
        return folder / name / "r2d-3"

    names = ["right", *CHANGES]
    with ThreadPoolExecutor(2) as pool:
        return dict(zip(names, pool.map(run, names), strict=True)), options


def test_right_answers_train_to_the_same_bytes(trained: tuple, tmp_path: Path) -> None:
    """Catches a function that is not put in its place, or not in the core's form."""
    runs, options = trained
    assert compare.main(["r2d", "--seeds", "3", *options, "--out", str(tmp_path)]) == 0
    mine = contents(runs["right"])
    assert len(mine.pop("coins.png")) > 10000
    assert mine == contents(tmp_path / "r2d-3")
    same = [path / "compare.json" for path in (runs["right"].parent, tmp_path)]
    assert same[0].read_bytes() == same[1].read_bytes()


@pytest.mark.parametrize("name", CHANGES)
def test_a_wrong_answer_shows_in_the_run(name: str, trained: tuple) -> None:
    """Catches a run that uses the core's function where the student's should be."""
    texts = []
    for run in (trained[0]["right"], trained[0][name]):
        files = [run / "log.jsonl", run / "metrics.json", run.parent / "compare.json"]
        texts.append("".join(file.read_text(encoding="utf-8") for file in files))
    for key in CHANGES[name][1]:
        values = rf'"{key}": (\[[^]]*\]|\{{[^}}]*|[^,}}]*)'
        right, wrong = (re.findall(values, text) for text in texts)
        assert right and right != wrong, key


def test_a_function_that_is_not_written_yet(tmp_path: Path) -> None:
    """Catches a traceback for the starter."""
    done = train(tmp_path / "out", FOLDER / "adapters.py", *LEARNS, "--limit", "20")
    assert done.returncode == 2 and "not written yet" in done.stderr
    assert "Traceback" not in done.stderr
