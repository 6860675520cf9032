"""The assignment in notebooks/assignment: its grader against right, wrong and hostile answers, and its handout.

The reference is the core itself: REFERENCE fills the functions of adapters.py with those of r2d, model and metrics.
"""

import importlib.util
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from test_r2d import ROOT, TINY

import r2d

FOLDER = ROOT / "notebooks" / "assignment"
REFERENCE = f"""
import math, sys, time
import contextlib
from types import SimpleNamespace
from unittest import mock
import torch
import torch.nn.functional as F
sys.path.insert(0, {str(ROOT)!r})
import metrics, r2d
from model import Transformer

def p_linear(step, steps, warmup, ramp, cap):
    return r2d.p_predicted(step, steps, "linear", warmup, ramp, cap)

def p_exponential(step, steps, warmup, ramp, cap):
    return r2d.p_predicted(step, steps, "exponential", warmup, ramp, cap)

def p_inverse_sigmoid(step, steps, warmup, ramp, cap):
    return r2d.p_predicted(step, steps, "inverse-sigmoid", warmup, ramp, cap)

draw_coins = r2d.flip_coins

def explain_batch(examples, labels, coins, predict, training):
    notes = [SimpleNamespace(**e) for e in examples]
    run = SimpleNamespace(data=SimpleNamespace(labels=labels))
    with mock.patch.object(r2d, "predict_labels", lambda run, questions: predict(questions)):
        given = r2d.labels_in_prompts(run, notes, coins)[0] if training else [note.label for note in notes]
    heads = [r2d.explain_head("r2d", label) for label in given]
    prompts = [f"{{head}} {{note.question}}" for head, note in zip(heads, notes)]
    return prompts, [note.rationale for note in notes]

class Core:  # the core's methods over any model
    config = SimpleNamespace(pad_id=0, eos_id=1)
    shift_right = Transformer.shift_right
    generate_plain = Transformer.generate_plain
    nll = Transformer.nll
    training = property(lambda self: self.model.training)

    def __init__(self, model):
        self.model = model

    def eval(self):
        self.model.eval()

    def train(self, mode):
        self.model.train(mode)

    def forward(self, source, labels):
        return self.model(source, self.shift_right(labels))

def shift_right(targets):
    return Core(None).shift_right(targets)

def token_mean_loss(logits, targets):
    core = Core(None)
    core.decode, core.logits = (lambda source, labels: logits), (lambda x: x)
    run = SimpleNamespace(tokens=0, device="cpu", nll=core.nll, autocast=contextlib.nullcontext)
    return r2d.token_mean(run, targets.tolist(), targets.tolist(), int((targets != 0).sum()))

def greedy_decode(model, source, max_new_tokens):
    return Transformer.generate(Core(model), source, max_new_tokens, use_cache=False)

def corpus_bleu(hypotheses, references):
    return metrics.bleu_from_counts(sum(map(metrics.bleu_counts, hypotheses, references)))

macro_f1 = metrics.macro_f1

def exposure_gap(gold_scores, predicted_scores):
    rows = [metrics.mean_and_interval("score", row)["score"] for row in (gold_scores, predicted_scores)]
    return rows[0] - rows[1]

def following(given, gold, argued):
    flipped = [100 * (a == g) for g, y, a in zip(given, gold, argued) if g != y]
    return metrics.mean_and_interval("argues_given", flipped)["argues_given"] if flipped else math.nan
"""

# Other right answers, in which one place can be broken.
RIGHT = {
    "schedule_linear": """
def p_linear(step, steps, warmup, ramp, cap):
    i, n = step - warmup * steps, ramp * steps
    return 0.0 if i < 0 or cap == 0 else cap if i >= n else cap * i / n
""",
    "schedule_exponential": """
def p_exponential(step, steps, warmup, ramp, cap):
    i, n, reach = step - warmup * steps, ramp * steps, min(cap, 1 - 1e-6)
    return 0.0 if i < 0 or cap == 0 else cap if i >= n else 1 - (1 - reach) ** (i / n)
""",
    "schedule_inverse_sigmoid": """
def p_inverse_sigmoid(step, steps, warmup, ramp, cap):
    i, n, reach = step - warmup * steps, ramp * steps, min(cap, 1 - 1e-6)
    if i < 0 or cap == 0 or i >= n:
        return 0.0 if i < 0 else cap
    low, high = n / 800, 1e6 * n + 10
    for _ in range(200):
        k = (low + high) / 2
        low, high = (k, high) if math.log(k) - n / k < math.log(1 / reach - 1) else (low, k)
    return 1 / (1 + k * math.exp(-i / k))
""",
    "coin": """
def draw_coins(n, p, generator):
    return [bool(torch.rand(1, generator=generator) < p) for _ in range(n)]
""",
    "mix_prompts": """
def explain_batch(examples, labels, coins, predict, training):
    given = [e["label"] for e in examples]
    chosen = [i for i, coin in enumerate(coins) if coin and training]
    asked = [examples[i]["question"] for i in chosen]
    for i, label in zip(chosen, predict(asked)):
        given[i] = label if label in labels else given[i]
    prompts = [f"given label: {label}, explain: {e['question']}" for label, e in zip(given, examples)]
    return prompts, [e["rationale"] for e in examples]
""",
    "shift_right": """
def shift_right(targets):
    return torch.cat([torch.zeros_like(targets[:, :1]), targets[:, :-1]], dim=1)
""",
    "masked_loss": """
def token_mean_loss(logits, targets):
    nats = F.cross_entropy(logits.transpose(1, 2), targets, reduction="none")
    nats = nats * (targets != 0)
    return nats.sum() / (targets != 0).sum().clamp(min=1)
""",
    "greedy_decode": """
def greedy_decode(model, source, max_new_tokens):
    mode = model.training
    model.eval()
    with torch.no_grad():
        tokens, done = torch.zeros(len(source), 1, dtype=torch.long), torch.zeros(len(source), dtype=torch.bool)
        while tokens.shape[1] <= max_new_tokens and not done.all():
            new = model(source, tokens)[:, -1].argmax(-1)
            new = new.masked_fill(done, 0)
            tokens, done = torch.cat([tokens, new[:, None]], 1), done | (new == 1)
    model.train(mode)
    return tokens[:, 1:]
""",
    "corpus_bleu": """
def corpus_bleu(hypotheses, references):
    counts = sum(map(metrics.bleu_counts, hypotheses, references))
    grams = lambda texts, n: [metrics.ngrams(tokens, n) for tokens in texts]
    for n in (1, 2, 3, 4):
        pairs = zip(grams(hypotheses, n), grams(references, n))
        counts[n - 1] = sum((h & r).total() for h, r in pairs)
    return metrics.bleu_from_counts(counts)
""",
    "macro_f1": """
def macro_f1(gold, predicted, labels):
    f1 = []
    for label in labels:
        both = gold.count(label) + predicted.count(label)
        f1.append(200 * sum(g == p == label for g, p in zip(gold, predicted)) / max(both, 1))
    return sum(f1) / len(f1)
""",
    "exposure_gap": """
def exposure_gap(gold_scores, predicted_scores):
    return sum(g - p for g, p in zip(gold_scores, predicted_scores)) / len(gold_scores)
""",
    "following": """
def following(given, gold, argued):
    rows = [a == g for g, y, a in zip(given, gold, argued) if g != y]
    return 100 * sum(rows) / len(rows) if rows else math.nan
""",
}


def bug(problem: str, name: str, old: str, new: str) -> tuple[str, str, str]:
    """A right answer with one place broken."""
    assert RIGHT[problem].count(old) == 1, old
    return problem, name, RIGHT[problem].replace(old, new)


def hostile(name: str, body: str) -> tuple[str, str, str]:
    return "exposure_gap", name, f"def exposure_gap(g, p):\n    {body}\n    return sum(g) / len(g) - sum(p) / len(p)\n"


FORGED = """import os
    for fd in range(3, 10):
        try:
            os.write(fd, b'{"id": 1, "values": [5.0], "seen": {}}\\n' * 50)
        except OSError:
            pass
    return 5.0"""
# (problem that must lose its points, name of the bug, code that replaces the reference's)
WRONG = [
    bug("schedule_linear", "ramp counted from step 0", "cap * i / n", "min(cap, cap * step / n)"),
    bug("schedule_linear", "never reaches the cap", "cap if i >= n else cap * i / n",
        "cap * min(i, n - 1) / max(n, 1)"),
    bug("schedule_linear", "no warm-up", "i, n = step - warmup * steps", "i, n = step"),
    bug("schedule_linear", "P(gold) instead of P(predicted)", "return", "return 1 -"),
    bug("schedule_exponential", "wrong constant", "1 - (1 - reach) ** (i / n)", "1 - math.exp(-i / n)"),
    bug("schedule_exponential", "curved the other way", "1 - (1 - reach) ** (i / n)", "(1 + reach) ** (i / n) - 1"),
    bug("schedule_exponential", "no warm-up", "= step - warmup * steps,", "= step,"),
    bug("schedule_exponential", "goes on past the ramp", "cap if i >= n else ", ""),
    bug("schedule_inverse_sigmoid", "no warm-up", "= step - warmup * steps,", "= step,"),
    bug("schedule_inverse_sigmoid", "goes on past the ramp", " or i >= n:", ":"),
    bug("schedule_inverse_sigmoid", "fixed k", "low, high = n / 800, 1e6 * n + 10", "low = high = 50"),
    bug("schedule_inverse_sigmoid", "starts at 0", "1 / (1 + k * math.exp(-i / k))", "cap * (i / n) ** 2"),
    bug("coin", "inverted", "< p", ">= p"),
    bug("coin", "one per batch", "[bool(torch.rand(1, generator=generator) < p) for _ in range(n)]",
        "[bool(torch.rand(1, generator=generator) < p)] * n"),
    bug("coin", "a fixed number per batch", "[bool(torch.rand(1, generator=generator) < p) for _ in range(n)]",
        "(torch.randperm(n, generator=generator) < round(p * n)).tolist()"),
    bug("coin", "from the global generator", "torch.rand(1, generator=generator)", "torch.rand(1)"),
    bug("coin", "the same in every batch",
        "    return", "    generator.manual_seed(generator.initial_seed())\n    return"),
    bug("mix_prompts", "sampling in evaluation", "coin and training", "coin"),
    bug("mix_prompts", "invalid labels enter", "label if label in labels else given[i]", "label"),
    bug("mix_prompts", "invalid becomes the first label", "else given[i]", "else labels[0]"),
    bug("mix_prompts", "rationale swapped with the label", '[e["rationale"] for e in examples]', "given"),
    bug("mix_prompts", "coin ignored", "coin and training", "training"),
    bug("mix_prompts", "coin inverted", "coin and training", "not coin and training"),
    bug("mix_prompts", "predicts for the whole batch", "asked = [",
        "predict([e['question'] for e in examples])\n    asked = ["),
    bug("mix_prompts", "labels of other examples", "predict(asked)", "predict(asked)[::-1]"),
    bug("mix_prompts", "gold in the example is overwritten", "    prompts =",
        "    for e, label in zip(examples, given):\n        e['label'] = label\n    prompts ="),
    bug("shift_right", "to the left", "torch.zeros_like(targets[:, :1]), targets[:, :-1]",
        "targets[:, 1:], torch.zeros_like(targets[:, :1])"),
    bug("shift_right", "not at all", "torch.zeros_like(targets[:, :1]), targets[:, :-1]", "targets"),
    bug("shift_right", "the last token comes round", "torch.zeros_like(targets[:, :1])", "targets[:, -1:]"),
    bug("shift_right", "one column too many", "targets[:, :-1]", "targets"),
    bug("shift_right", "in place", "return", "targets[:], targets[:, 0] = targets.roll(1, 1), 0\n    return targets #"),
    bug("masked_loss", "padding counted", "    nats = nats * (targets != 0)\n", ""),
    bug("masked_loss", "padding in the denominator", "(targets != 0).sum().clamp(min=1)", "targets.numel()"),
    bug("masked_loss", "mean of row means", "nats.sum() / (targets != 0).sum().clamp(min=1)",
        "(nats.sum(1) / (targets != 0).sum(1).clamp(min=1)).mean()"),
    bug("masked_loss", "sum", " / (targets != 0).sum().clamp(min=1)", ""),
    bug("masked_loss", "nan without a token", ".clamp(min=1)", ""),
    bug("masked_loss", "log of a softmax", "F.cross_entropy(logits", "F.nll_loss(logits.softmax(-1).log()"),
    bug("masked_loss", "without a gradient", "F.cross_entropy(logits", "F.cross_entropy(logits.detach()"),
    bug("greedy_decode", "dropout on", "    model.eval()\n", ""),
    bug("greedy_decode", "no padding after the end", "            new = new.masked_fill(done, 0)\n", ""),
    bug("greedy_decode", "mode not restored", "    model.train(mode)\n", ""),
    bug("greedy_decode", "always back to training", "train(mode)", "train()"),
    bug("greedy_decode", "with gradients", "torch.no_grad()", "torch.enable_grad()"),
    bug("greedy_decode", "gradients stay off", "    mode =", "    torch.set_grad_enabled(False)\n    mode ="),
    bug("greedy_decode", "does not stop early", " and not done.all()", ""),
    bug("greedy_decode", "stops with the first row", "done.all()", "done.any()"),
    bug("greedy_decode", "one token too few", "<= max_new_tokens", "< max_new_tokens"),
    bug("greedy_decode", "keeps the start token", "tokens[:, 1:]", "tokens"),
    bug("greedy_decode", "reads only the last token", "model(source, tokens)", "model(source, tokens[:, -1:])"),
    bug("corpus_bleu", "no brevity penalty", "    return", "    counts[9] = 0\n    return"),
    bug("corpus_bleu", "brevity penalty of each pair", "    return", "    counts[8:] = sum(\n"
        "        [min(len(h), len(r)), len(r)] * metrics.np.ones(2, int) for h, r in zip(hypotheses, references)\n"
        "    )\n    return"),
    bug("corpus_bleu", "averaged instead of pooled", "metrics.bleu_from_counts(counts)",
        "sum(map(metrics.bleu_from_counts, map(metrics.bleu_counts, hypotheses, references))) / len(references)"),
    bug("corpus_bleu", "counts not clipped", "(h & r).total()", "sum(h[gram] for gram in r)"),
    bug("corpus_bleu", "one bag of references", "        pairs =",
        "        bags = [sum(grams(texts, n), metrics.Counter()) for texts in (hypotheses, references)]\n"
        "        pairs = [bags] or"),
    bug("corpus_bleu", "not smoothed", "    return", "    if 0 in counts[:4]:\n        return 0.0\n    return"),
    bug("corpus_bleu", "3-grams at most", "    return", "    counts[3], counts[7] = counts[2], counts[6]\n    return"),
    bug("corpus_bleu", "0 to 1", "metrics.bleu_from_counts(counts)", "metrics.bleu_from_counts(counts) / 100"),
    bug("macro_f1", "seen labels only", "in labels", "in {*gold, *predicted} & {*labels}"),
    bug("macro_f1", "weighted", "sum(f1) / len(f1)", "sum(f * gold.count(y) for f, y in zip(f1, labels)) / len(gold)"),
    bug("macro_f1", "invalid predictions left out", "    f1 = []",
        "    gold, predicted = zip(*[(g, p) for g, p in zip(gold, predicted) if p in labels] or [('', '')])\n"
        "    f1 = []"),
    bug("macro_f1", "invalid is a class", "in labels", "in sorted({*labels, *predicted})"),
    bug("macro_f1", "recall", "gold.count(label) + predicted.count(label)", "2 * gold.count(label)"),
    bug("exposure_gap", "wrong sign", "g - p", "p - g"),
    bug("exposure_gap", "without a sign", "return sum(g - p", "return abs(1) * sum(abs(g - p)"),
    bug("following", "over all labels", " if g != y]", "]"),
    bug("following", "any wrong label", "[a == g", "[a != y"),
    bug("following", "only texts that argue for something", "if g != y", "if g != y and a"),
    bug("following", "argues for gold", "[a == g", "[a == y"),
    bug("following", "0 without a wrong label", "math.nan", "0.0"),
    hostile("recursion", "return exposure_gap(g, p)"),
    hostile("sys.exit(0)", "sys.exit(0)"),
    hostile("returns nothing", "return None"),
    hostile("a list that holds itself", "g.append(g)\n    return g"),
    hostile("answers everything", "return type('Any', (float,), {'__eq__': lambda a, b: True})(1.5)"),
    ("exposure_gap", "is missing", "del exposure_gap"),
    hostile("reads the grader", f"open({str(FOLDER / 'test_adapters.py')!r}).read()"),
    hostile("imports the grader", f"sys.path.append({str(FOLDER)!r})\n    import test_adapters"),
    hostile("deletes the report", f"__import__('os').remove({str(FOLDER / 'grade.json')!r})"),
    hostile("writes a report of its own", f"open({str(FOLDER / 'grade.json')!r}, 'w').write('{{}}')"),
    hostile("writes replies of its own", FORGED),
    hostile("starts a process", "__import__('subprocess').run([sys.executable, '-c', ''])"),
]  # fmt: skip
# These end the child, which costs the time of a new one each.
STOPPED = [
    hostile("loops without end", "while True: pass"),
    hostile("os._exit(0)", "__import__('os')._exit(0)"),
    hostile("allocates 100 GB", "torch.empty(100 * 2**30, dtype=torch.uint8)"),
]
# These do no harm and cost nothing.
HARMLESS = [
    hostile("prints a flood", "[print('ε' * 10000) for _ in range(200)]"),
    hostile(
        "patches the worker", "main = sys.modules['__main__']\n    main.guard = main.limit_memory = lambda *a: True"
    ),
]


def load_grader() -> object:
    """test_adapters.py as a module, under a name that pytest does not collect."""
    spec = importlib.util.spec_from_file_location("assignment_grader", FOLDER / "test_adapters.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look there
    spec.loader.exec_module(module)
    return module


GRADER = load_grader()
GRADED: list[str] = []  # wrong answers graded so far
FAILED: set[tuple[str, str]] = set()  # and the checks that they failed


@pytest.fixture(scope="module")
def child() -> Iterator[object]:
    """One child process for all files graded here: starting torch is what costs time."""
    child = GRADER.Child()
    yield child
    child.stop()


def grade(child: object, folder: Path, code: str, **options: float) -> dict:
    path = folder / "answer.py"
    path.write_text(code, encoding="utf-8")
    return GRADER.grade(path, child, **options)


def lost(result: dict) -> dict[str, int]:
    return {name: one["points"] for name, one in result["problems"].items() if one["points"] < one["of"]}


def test_the_core_gets_full_points(child: object, tmp_path: Path) -> None:
    """Catches a check that contradicts the repository's own code, for some seeds or for all."""
    for seed in range(3):
        result = grade(child, tmp_path, REFERENCE, seed=seed)
        assert not lost(result), GRADER.report_text(result)
    assert result["points"] == result["of"] == 70
    assert [note.split(":")[0].split()[-1] for note in result["notes"]] == ["metrics", "r2d", "model"]


def test_other_right_answers_get_full_points(child: object, tmp_path: Path) -> None:
    """Catches a grader that accepts one way to write an answer only, and broken answers below that were never right."""
    assert RIGHT.keys() == GRADER.POINTS.keys() == GRADER.CHECKS.keys()
    result = grade(child, tmp_path, REFERENCE + "".join(RIGHT.values()))
    assert not lost(result), GRADER.report_text(result)


@pytest.mark.parametrize(("problem", "code"), [pytest.param(p, code, id=f"{p}: {name}") for p, name, code in WRONG])
def test_a_wrong_answer_loses_its_problem_and_no_other(child: object, tmp_path: Path, problem: str, code: str) -> None:
    """Catches a check that cannot fail, and one that depends on another problem."""
    result = grade(child, tmp_path, REFERENCE + code)
    assert lost(result) == {problem: 0}, GRADER.report_text(result)
    failed = result["problems"][problem]["failed"]
    GRADED.append(code)
    FAILED.update((problem, title) for title, _ in GRADER.CHECKS[problem] for hint in failed if hint.startswith(title))
    assert all("\n" not in hint and 10 < len(hint) < 400 for hint in failed)


def test_every_check_can_fail() -> None:
    """Catches a check that no wrong answer above ever fails."""
    if len(GRADED) < len(WRONG):
        pytest.skip("looks at what the test above found, for all wrong answers")
    checks = {(problem, title) for problem, checks in GRADER.CHECKS.items() for title, _ in checks}
    assert not checks - FAILED


@pytest.mark.parametrize(("problem", "code"), [pytest.param(p, code, id=name) for p, name, code in STOPPED])
def test_a_runaway_answer_loses_its_problem_and_no_other(
    child: object, tmp_path: Path, problem: str, code: str
) -> None:
    """Catches a grader that hangs, dies or runs out of memory together with an answer."""
    if "empty" in code and not child.ready["memory"]:
        pytest.skip("this system cannot limit memory; the handout says so")
    result = grade(child, tmp_path, REFERENCE + code, seconds=4)
    assert lost(result) == {problem: 0}, GRADER.report_text(result)


@pytest.mark.parametrize(("problem", "code"), [pytest.param(p, code, id=name) for p, name, code in HARMLESS])
def test_a_noisy_answer_keeps_its_points(child: object, tmp_path: Path, problem: str, code: str) -> None:
    """Catches prints that fill a pipe or are taken for an answer."""
    assert not lost(grade(child, tmp_path, REFERENCE + code))


@pytest.mark.parametrize("code", ["def p_linear(:", "sys.exit(0)", "import no_such_module", "\0", "raise SystemExit"])
def test_a_file_that_cannot_be_loaded_gets_nothing(child: object, tmp_path: Path, code: str) -> None:
    """Catches a traceback, or points, for a file with an error outside of its functions."""
    result = grade(child, tmp_path, code)
    assert result["points"] == 0
    assert all("cannot be loaded" in one["failed"][0] for one in result["problems"].values())


def test_a_file_that_cannot_be_read_gets_nothing(child: object, tmp_path: Path) -> None:
    """Catches a traceback for a wrong path in R2D_ADAPTERS."""
    assert GRADER.grade(tmp_path / "none.py", child)["points"] == 0


def test_the_command_line_grades_the_file_it_is_given(tmp_path: Path) -> None:
    """Catches an environment variable that is ignored, points that pytest does not show, and report files left out."""
    (tmp_path / "right.py").write_text(REFERENCE, encoding="utf-8")
    given = {"R2D_ADAPTERS": "right.py", "R2D_GRADE_DIR": "reports", "R2D_GRADE_SEED": "5", "R2D_GRADE_SECONDS": "60"}
    arguments = [sys.executable, "-m", "pytest", "-q", str(FOLDER), "-p", "no:cacheprovider"]
    done = subprocess.run(arguments, cwd=tmp_path, env={**os.environ, **given}, capture_output=True, encoding="utf-8")
    assert done.returncode == 0 and "12 passed" in done.stdout and "70 of 70" in done.stdout
    report = json.loads((tmp_path / "reports" / "grade.json").read_text(encoding="utf-8"))
    assert (report["file"], report["points"], report["seed"], report["limits"]["seconds"]) == ("right.py", 70, 5, 60)


def test_the_grader_imports_no_solution() -> None:
    """Catches a grader that compares the answers with the core, or loads the graded file into its own process."""
    for name in ("test_adapters.py", "worker.py", "adapters.py"):
        text = (FOLDER / name).read_text(encoding="utf-8")
        assert not re.search(r"^\s*(from|import)\s+(r2d|model|data|metrics|adapters)\b", text, re.M), name
    assert "import torch" not in (FOLDER / "test_adapters.py").read_text(encoding="utf-8")


# --- the handout


def handout() -> str:
    return (FOLDER / "README.md").read_text(encoding="utf-8")


def commands() -> list[str]:
    blocks = re.findall(r"```bash\n(.*?)```", handout(), re.S)
    return [line.split("#")[0].strip() for block in blocks for line in block.splitlines() if line.strip()]


def test_the_handout_names_every_problem_function_and_point() -> None:
    """Catches a handout whose points are not the grader's, and a starter that misses a function."""
    rows = re.findall(r"^\| `(\w+)` \| `(\w+)` \| (\d+) \|", handout(), re.M)
    assert {problem: int(points) for problem, _, points in rows} == GRADER.POINTS
    starter = (FOLDER / "adapters.py").read_text(encoding="utf-8")
    bodies = re.findall(
        r'^def (\w+)\(.*?"""Problem (\w+)\..*?"""\n    raise NotImplementedError$', starter, re.S | re.M
    )
    assert bodies == [(function, problem) for problem, function, _ in rows]
    by_hand = [int(points) for points in re.findall(r"^\d\. `\w+` \((\d)\)", handout(), re.M)]
    by_hand += [int(points) for points in re.findall(r"^\| [a-d]\. .* \| (\d) \|$", handout(), re.M)]
    assert len(by_hand) == 8 and sum(by_hand) == GRADER.BY_HAND == 100 - sum(GRADER.POINTS.values())


@pytest.mark.parametrize("command", commands())
def test_every_command_of_the_handout_runs(command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a command that no longer works, a starter with points, or a stale report."""
    words = shlex.split(command)
    if words[:3] == ["python", "-m", "pytest"]:
        (tmp_path / "grade.json").write_text('{"points": 70}', encoding="utf-8")
        environment = {**os.environ, "R2D_GRADE_DIR": str(tmp_path)}
        arguments = [sys.executable, *words[1:], "-p", "no:cacheprovider"]
        done = subprocess.run(arguments, cwd=ROOT, env=environment, capture_output=True, encoding="utf-8")
        assert done.returncode == 1 and "12 failed" in done.stdout and "Traceback" not in done.stdout + done.stderr
        report = json.loads((tmp_path / "grade.json").read_text(encoding="utf-8"))
        assert report["points"] == 0 and report["of"] == 70
        assert all(one["failed"] == ["not implemented yet"] for one in report["problems"].values())
        text = (tmp_path / "grade.txt").read_text(encoding="utf-8")
        assert text in done.stdout.replace("\r", "") and "0 of 70" in text
    elif words[:2] == ["python", "r2d.py"]:
        monkeypatch.chdir(tmp_path)
        given = words[2:]
        assert r2d.main([*given, *TINY]) == 0  # the tiny sizes come last and win
        assert (tmp_path / given[given.index("--out") + 1] / "predictions.jsonl").exists()
    else:
        assert command == "pip install -r requirements.txt" and (ROOT / "requirements.txt").exists()
