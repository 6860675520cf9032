"""The assignment: its grader against right, wrong and hostile answers, and its handout."""

import importlib.util
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import r2d

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "notebooks" / "assignment"
HANDOUT = (FOLDER / "README.md").read_text(encoding="utf-8")
TINY = "--limit 20 --width 16 --layers 1 --stage1-steps 2 --stage2-steps 4 --max-target 16".split()

SPEC = importlib.util.spec_from_file_location("grader", FOLDER / "test_adapters.py")
GRADER = sys.modules["grader"] = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(GRADER)

# A right answer to each problem, in the grader's order; in BUGS one place of it is broken.
RIGHT = """
def p_linear(step, steps, warmup, ramp, cap):
    i, n = step - warmup * steps, ramp * steps
    return 0.0 if i < 0 or cap == 0 else cap if i >= n else min(cap, i / n)

def p_exponential(step, steps, warmup, ramp, cap):
    i, n, reach = step - warmup * steps, ramp * steps, min(cap, 1 - 1e-6)
    return 0.0 if i < 0 or cap == 0 else cap if i >= n else 1 - (1 - reach) ** (i / n)

def p_inverse_sigmoid(step, steps, warmup, ramp, cap):
    i, n, reach = step - warmup * steps, ramp * steps, min(cap, 1 - 1e-6)
    if i < 0 or cap == 0 or i >= n:
        return 0.0 if i < 0 else cap
    low, high = n / 800, 1e6 * n + 10
    for _ in range(200):
        k = (low + high) / 2
        low, high = (k, high) if math.log(k) - n / k < math.log(1 / reach - 1) else (low, k)
    return 1 / (1 + k * math.exp(-i / k))

def draw_coins(n, p, generator):
    return [bool(torch.rand(1, generator=generator) < p) for _ in range(n)]

def explain_batch(examples, labels, coins, predict, training):
    given = [e["label"] for e in examples]
    chosen = [i for i, coin in enumerate(coins) if coin and training]
    asked = [examples[i]["question"] for i in chosen]
    for i, label in zip(chosen, predict(asked)):
        given[i] = label if label in labels else given[i]
    pairs = zip(given, examples)
    prompts = [f"given label: {label}, explain: {e['question']}" for label, e in pairs]
    return prompts, [e["rationale"] for e in examples]

def shift_right(targets):
    return torch.cat([torch.zeros_like(targets[:, :1]), targets[:, :-1]], dim=1)

def token_mean_loss(logits, targets):
    nats = F.cross_entropy(logits.transpose(1, 2), targets, reduction="none")
    nats = nats * (targets != 0)
    return nats.sum() / (targets != 0).sum().clamp(min=1)

def greedy_decode(model, source, max_new_tokens):
    mode = model.training
    model.eval()
    with torch.no_grad():
        tokens = torch.zeros(len(source), 1, dtype=torch.long)
        done = torch.zeros(len(source), dtype=torch.bool)
        while tokens.shape[1] <= max_new_tokens and not done.all():
            new = model(source, tokens)[:, -1].argmax(-1)
            new = new.masked_fill(done, 0)
            tokens, done = torch.cat([tokens, new[:, None]], 1), done | (new == 1)
    model.train(mode)
    return tokens[:, 1:]

def corpus_bleu(hypotheses, references):
    bleu, smooth, found = 100, 1, 0
    for n in range(4):
        match, total = 0, 0
        for h, r in zip(hypotheses, references):
            ours, theirs = (Counter(zip(*(x[i:] for i in range(n + 1)))) for x in (h, r))
            match += (ours & theirs).total()
            total += ours.total()
        found += match
        smooth = smooth if match else smooth / 2
        bleu *= ((match or smooth) / total) ** 0.25 if total and found else 0
    ours, theirs = sum(map(len, hypotheses)), sum(map(len, references))
    return bleu * math.exp(min(0, 1 - theirs / max(ours, 1)))

def macro_f1(gold, predicted, labels):
    f1 = []
    for label in labels:
        both = gold.count(label) + predicted.count(label)
        f1.append(200 * sum(g == p == label for g, p in zip(gold, predicted)) / max(both, 1))
    return sum(f1) / len(f1)

def exposure_gap(gold_scores, predicted_scores):
    return sum(g - p for g, p in zip(gold_scores, predicted_scores)) / len(gold_scores)

def following(flipped, predicted, argued):
    rows = [a == f for f, p, a in zip(flipped, predicted, argued) if f != p]
    return 100 * sum(rows) / len(rows) if rows else math.nan
"""
RIGHT = dict(zip(GRADER.POINTS, RIGHT.strip().split("\n\n"), strict=True))
IMPORTS = """
import contextlib, math, os, sys, torch
from collections import Counter
F = torch.nn.functional
"""
ANSWERS = IMPORTS + "\n".join(RIGHT.values()) + "\n"

# The core's own functions, where it has the problem's.
CORE = f"""
sys.path.insert(0, {str(ROOT)!r})
from types import SimpleNamespace
from unittest import mock
import data, metrics, model, r2d

p_linear = lambda i, n, *shape: r2d.p_predicted(i, n, "linear", *shape)
p_exponential = lambda i, n, *shape: r2d.p_predicted(i, n, "exponential", *shape)
p_inverse_sigmoid = lambda i, n, *shape: r2d.p_predicted(i, n, "inverse-sigmoid", *shape)
draw_coins = r2d.flip_coins
macro_f1 = metrics.macro_f1

def explain_batch(examples, labels, coins, predict, training):
    notes = [data.Example(**e) for e in examples]
    run = SimpleNamespace(dataset=SimpleNamespace(labels=labels))
    given = [note.label for note in notes]
    with mock.patch.object(r2d, "predict_labels", lambda run, questions: predict(questions)):
        if training:
            given = r2d.mix_labels(run, notes, coins)[0]
    pairs = zip(given, notes)
    prompts = [f"given label: {{label}}, explain: {{note.question}}" for label, note in pairs]
    return prompts, [note.rationale for note in notes]

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
    return metrics.score(rows, ["gold"])["exposure"].get("following", math.nan)
"""

# problem, what is wrong, the place in RIGHT, what stands there instead
BUGS = [
    ("schedule_linear", "reaches the cap at the end of the ramp", "min(cap, i / n)", "cap * i / n"),
    ("schedule_linear", "passes the cap", "cap if i >= n else min(cap, i / n)", "i / n"),
    ("schedule_linear", "no warm-up", "step - warmup * steps", "step"),
    ("schedule_exponential", "wrong constant", "(1 - reach) ** (i / n)", "math.exp(-i / n)"),
    ("schedule_exponential", "goes on past the ramp", "cap if i >= n else ", ""),
    ("schedule_inverse_sigmoid", "no warm-up", "step - warmup * steps", "step"),
    ("schedule_inverse_sigmoid", "a fixed k", "n / 800, 1e6 * n + 10", "50, 50"),
    ("coin", "inverted", "< p", ">= p"),
    ("coin", "from the global generator", "torch.rand(1, generator=generator)", "torch.rand(1)"),
    ("coin", "the same in each batch", "    return", "    generator.manual_seed(1)\n    return"),
    ("coin", "one for all", "for _ in range(n)]", "for _ in range(1)] * n"),
    ("mix_prompts", "samples in evaluation", "coin and training", "coin"),
    ("mix_prompts", "invalid labels enter", "label if label in labels else given[i]", "label"),
    ("mix_prompts", "targets of the sampled label", '[e["rationale"] for e in examples]', "given"),
    ("mix_prompts", "coin inverted", "coin and training", "not coin and training"),
    ("mix_prompts", "predicts for all", "chosen = [i", "chosen = predict(['note 0, pain']) and [i"),
    ("mix_prompts", "labels of other examples", "predict(asked)", "predict(asked)[::-1]"),
    ("mix_prompts", "changes them", "    given[i] =", "    examples[i]['label'] = given[i] ="),
    ("shift_right", "not at all", ", targets[:, :-1]]", "[:, :0], targets]"),
    ("shift_right", "the last comes round", "torch.zeros_like(targets[:, :1])", "targets[:, -1:]"),
    ("shift_right", "in place", "return", "targets[:, -1] += 1\n    return"),
    ("masked_loss", "padding counted", "    nats = nats * (targets != 0)\n", ""),
    ("masked_loss", "padding below", "(targets != 0).sum().clamp(min=1)", "targets.numel()"),
    ("masked_loss", "nan without a token", ".clamp(min=1)", ""),
    ("masked_loss", "underflows", "F.cross_entropy(logits", "F.nll_loss(logits.softmax(-1).log()"),
    ("masked_loss", "no gradient", "F.cross_entropy(logits", "F.cross_entropy(logits.detach()"),
    ("greedy_decode", "dropout on", "    model.eval()\n", ""),
    ("greedy_decode", "no padding after the end", "new.masked_fill(done, 0)", "new"),
    ("greedy_decode", "mode not restored", "    model.train(mode)\n", ""),
    ("greedy_decode", "with gradients", "torch.no_grad()", "torch.enable_grad()"),
    ("greedy_decode", "stops with the first row", "done.all()", "done.any()"),
    ("greedy_decode", "reads the last token alone", "(source, tokens)", "(source, tokens[:, -1:])"),
    ("corpus_bleu", "no brevity penalty", "min(0, 1 - theirs / max(ours, 1))", "0"),
    ("corpus_bleu", "not clipped", "(ours & theirs)", "Counter({g: ours[g] for g in theirs})"),
    ("corpus_bleu", "not smoothed", "if match else smooth / 2", "* 1e-9"),
    ("corpus_bleu", "one pair", "zip(hypotheses, references)", "[(hypotheses[0], references[0])]"),
    ("macro_f1", "seen labels only", "in labels", "in {*gold, *predicted} & {*labels}"),
    ("macro_f1", "invalid is a class", "in labels", "in sorted({*labels, *predicted})"),
    ("macro_f1", "recall", "gold.count(label) + predicted.count(label)", "2 * gold.count(label)"),
    ("exposure_gap", "wrong sign", "g - p", "p - g"),
    ("exposure_gap", "without a sign", "sum(g - p", "sum(abs(g - p)"),
    ("following", "over all notes", "if f != p]", "if flipped != predicted]"),
    ("following", "any other label", "a == f", "a != p"),
    ("following", "0 where nothing counts", "math.nan", "0.0"),
]  # fmt: skip
FENCE = {  # name: the first lines of exposure_gap
    "exits": "os._exit(0)",
    "loops without end": "while True: pass",
    "allocates 100 GB": "torch.empty(100 * 2**30, dtype=torch.uint8)",
    "reads the grader": f"open({str(FOLDER / 'test_adapters.py')!r}).read()",
    "writes a report": f"open({str(FOLDER / 'grade.json')!r}, 'w').write('{{}}')",
    "starts a process": "__import__('subprocess').run([sys.executable, '-c', ''])",
    "forges replies": """for fd in range(3, 10):
        with contextlib.suppress(OSError):
            os.write(fd, b'{"id": 1, "values": [5.0], "seen": {}}\\n' * 50)
    return 5.0""",
}


@pytest.fixture(scope="module")
def child():
    """One child process for all files graded here: starting torch is what costs time."""
    child = GRADER.Child()
    yield child
    child.stop()


def lost(child: object, folder: Path, code: str, **options: float) -> dict[str, int]:
    """The problems that do not get all of their points, and what they get."""
    (folder / "answer.py").write_text(code, encoding="utf-8")
    problems = GRADER.grade(folder / "answer.py", child, **options)["problems"]
    return {name: one["points"] for name, one in problems.items() if one["points"] < one["of"]}


@pytest.mark.parametrize("code", [ANSWERS, ANSWERS + CORE], ids=["right", "core"])
def test_right_answers_get_full_points(child: object, tmp_path: Path, code: str) -> None:
    """Catches a check that contradicts the core, for some seeds or all, or allows one way only."""
    for seed in range(2):
        assert not lost(child, tmp_path, code, seed=seed)


def broken(problem: str, old: str, new: str) -> str:
    assert RIGHT[problem].count(old) == 1
    return RIGHT[problem].replace(old, new)


@pytest.mark.parametrize(("problem", "name", "old", "new"), BUGS)
def test_a_wrong_answer_loses_its_problem(child, problem, name, old, new) -> None:
    """Catches a check that cannot fail."""
    child.load(ANSWERS + broken(problem, old, new), "answer.py")
    result = GRADER.grade_problem(problem, child, seconds=10, seed=0)
    assert result["points"] == 0 and 10 < len(result["failed"][0]) < 400


@pytest.mark.parametrize("half", [0, 1])
def test_wrong_answers_lose_no_other_problem(child, tmp_path, half) -> None:
    """Catches a problem whose points depend on the answer to another one."""
    first = {problem: broken(problem, old, new) for problem, _, old, new in reversed(BUGS)}
    chosen = list(first)[half::2]
    code = "\n".join(first[problem] for problem in chosen)
    assert lost(child, tmp_path, ANSWERS + code) == dict.fromkeys(chosen, 0)


@pytest.mark.parametrize("name", FENCE)
def test_a_hostile_answer_loses_its_problem_and_no_other(child, tmp_path, name) -> None:
    """Catches a grader that hangs, dies, can be fooled, or runs out of memory with an answer."""
    code = f"def exposure_gap(g, p):\n    {FENCE[name]}\n    return (sum(g) - sum(p)) / len(g)\n"
    if name == "allocates 100 GB" and not child.ready.get("memory", True):
        pytest.skip("this system cannot limit memory; the handout says so")
    assert lost(child, tmp_path, ANSWERS + code, seconds=3) == {"exposure_gap": 0}


@pytest.mark.parametrize("code", ["def p_linear(:", "sys.exit(0)", "import no_such_module"])
def test_a_file_that_cannot_be_loaded_gets_nothing(child, tmp_path, code) -> None:
    """Catches a traceback, or points, for a file with an error outside of its functions."""
    assert set(lost(child, tmp_path, IMPORTS + code).values()) == {0}


def test_the_handout_names_every_problem_function_and_point() -> None:
    """Catches a handout whose points are not the grader's, and a starter without a function."""
    rows = re.findall(r"^\| `(\w+)` \| `(\w+)` \| (\d+) \|", HANDOUT, re.M)
    assert {problem: int(points) for problem, _, points in rows} == GRADER.POINTS
    assert sum(GRADER.POINTS.values()) == 70
    starter = (FOLDER / "adapters.py").read_text(encoding="utf-8").split("\ndef ")[1:]
    assert [re.match(r"\w+", function)[0] for function in starter] == [row[1] for row in rows]
    for function, row in zip(starter, rows, strict=True):
        assert f'"""Problem {row[0]}. ' in function and "raise NotImplementedError" in function


@pytest.mark.parametrize("command", re.findall("^python .*", HANDOUT, re.M))
def test_every_command_of_the_handout_runs(command: str, tmp_path: Path, monkeypatch) -> None:
    """Catches a command that no longer works, a starter with points, and a stale report."""
    words = shlex.split(command)
    if words[1] == "r2d.py":
        monkeypatch.chdir(tmp_path)
        assert r2d.main([*words[2:], *TINY]) == 0  # the tiny sizes come last and win
        return
    monkeypatch.setenv("R2D_GRADE_DIR", str(tmp_path))
    words = [sys.executable, *words[1:], "-p", "no:cacheprovider"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, encoding="utf-8")
    assert done.returncode == 1 and "12 failed" in done.stdout and "Traceback" not in done.stdout
    report = (tmp_path / "grade.txt").read_text(encoding="utf-8").strip()
    assert "0 of 70" in report and report in done.stdout
