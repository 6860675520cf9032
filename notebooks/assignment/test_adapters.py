"""The grader of the assignment. From the repository root: python -m pytest -q notebooks/assignment

It never imports a solution. The graded file runs in a child process (worker.py) that only gets
inputs and returns values; the expected values stay here: tables worked out by hand, and small
oracles. A problem's points come whole: all its checks hold, or it has 0. Environment variables:

    R2D_ADAPTERS       the file to grade, default adapters.py beside this file
    R2D_GRADE_DIR      folder for grade.json and grade.txt, default this folder
    R2D_GRADE_SECONDS  time limit of a problem, default 10
    R2D_GRADE_SEED     decides the random inputs, default 0
"""

import contextlib
import itertools
import json
import math
import os
import platform
import queue
import random
import re
import secrets
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
POINTS = {
    "schedule_linear": 4,
    "schedule_exponential": 4,
    "schedule_inverse_sigmoid": 7,
    "coin": 6,
    "mix_prompts": 9,
    "shift_right": 4,
    "masked_loss": 7,
    "greedy_decode": 8,
    "corpus_bleu": 9,
    "macro_f1": 5,
    "exposure_gap": 3,
    "following": 4,
}
BY_HAND = 30  # points of the written questions and the experiment
GIBIBYTES = 2.0  # what a graded file may allocate beside torch, where the system can limit it
LONGEST = 2**23  # bytes of one answer


# --------------------------------------------------------------------------------------------------
# The child process.


class StoppedError(Exception):
    """Nothing more can be asked for this problem: no child any more, or no such function."""


class WrongError(Exception):
    """A check does not hold; the text is the hint."""


@dataclass(frozen=True)
class Answer:
    values: list
    seen: dict

    @property
    def value(self) -> object:
        return self.values[0]


class Child:
    """worker.py at work on one graded file; it is started when it is needed."""

    def __init__(self) -> None:
        self.process, self.source, self.path, self.ready = None, "", "", {}

    def start(self) -> None:
        self.home = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        hidden = {"R2D_API_KEY", "R2D_ADAPTERS", "R2D_GRADE_DIR", "R2D_GRADE_SEED"}
        environment = {name: value for name, value in os.environ.items() if name not in hidden}
        environment |= {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            [sys.executable, str(HERE / "worker.py"), str(GIBIBYTES)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            cwd=self.home.name,
            env=environment,
            start_new_session=os.name == "posix",  # so that what it starts can be ended with it
        )
        self.replies: queue.Queue[bytes] = queue.Queue(4)
        self.reader = threading.Thread(
            target=self.read, args=(self.process, self.replies), daemon=True
        )
        self.reader.start()
        self.ready = self.reply(0, 120)
        if "fatal" in self.ready:
            raise RuntimeError(
                f"cannot start: {self.ready['fatal']}; run pip install -r requirements.txt"
            )

    @staticmethod
    def read(process: subprocess.Popen, replies: "queue.Queue[bytes]") -> None:
        with contextlib.suppress(ValueError, OSError):  # the pipe was closed
            while line := process.stdout.readline(LONGEST):
                replies.put(line)
        replies.put(b"")

    def stop(self) -> None:
        if self.process is None:
            return
        if os.name == "posix":
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self.process.pid, signal.SIGKILL)
        self.process.kill()
        self.process.wait()
        for _ in range(100):  # the reading thread may wait for room in the queue
            with contextlib.suppress(queue.Empty):
                self.replies.get(timeout=0.01)
            if not self.reader.is_alive():
                self.process.stdout.close()
                break
        with contextlib.suppress(OSError):
            self.process.stdin.close()
        self.home.cleanup()
        self.process = None

    def reply(self, number: int, seconds: float) -> dict:
        deadline = time.monotonic() + seconds
        while True:
            left, line = deadline - time.monotonic(), None
            with contextlib.suppress(queue.Empty):
                line = self.replies.get(timeout=left) if left > 0 else None
            if line is None:
                self.stop()
                raise StoppedError("stopped at the time limit: an endless loop, or far too slow?")
            if not line:
                self.stop()
                raise StoppedError(
                    "the process ended in the middle: os._exit, a crash, or out of memory?"
                )
            with contextlib.suppress(ValueError, RecursionError):
                reply = json.loads(line)
                if isinstance(reply, dict) and reply.get("id") == number:
                    return reply

    def ask(self, request: dict, seconds: float) -> dict:
        # not to be guessed: graded code may write into the pipe itself
        number = secrets.randbits(60)
        line = json.dumps({"id": number, **request}).encode() + b"\n"
        try:
            self.process.stdin.write(line)
            self.process.stdin.flush()
        except OSError:
            self.stop()
            raise StoppedError(
                "the process ended before it was asked: os._exit, or a crash?"
            ) from None
        return self.reply(number, seconds)

    def load(self, source: str, path: str) -> None:
        """Raises WrongError or StoppedError if the file cannot be loaded."""
        self.source, self.path = source, path
        if self.process is None:
            self.start()
        raise_error(self.ask({"load": path, "source": source}, 60))


def raise_error(reply: dict) -> None:
    if "error" in reply:
        where = f" (line {reply['line']})" if reply.get("line") else ""
        text = f": {' '.join(str(reply['message']).split())}" if reply.get("message") else ""
        if reply["error"] == "NotImplementedError":
            raise NotImplementedError
        raise WrongError(f"raised {reply['error']}{where}{text}")


class Student:
    """Calls the functions of the graded file in the child, within the time left for the problem."""

    def __init__(self, child: Child, seconds: float, seed: str) -> None:
        self.child, self.deadline, self.rng = child, time.monotonic() + seconds, random.Random(seed)

    def __call__(self, function: str, *arguments: object, repeat: int = 1) -> Answer:
        request = {"call": function, "arguments": arguments, "repeat": repeat}
        reply = self.child.ask(request, max(0.05, self.deadline - time.monotonic()))
        raise_error(reply)
        if "missing" in reply:
            raise StoppedError(f"the file has no function {function}")
        return Answer(reply["values"], reply["seen"])


# Arguments that only the child can make.


def tensor(values: list, dtype: str = "int64", grad: bool = False) -> dict:
    return {"make": "tensor", "values": values, "dtype": dtype, "grad": grad}


def generator(seed: int) -> dict:
    return {"make": "generator", "seed": seed}


def predictor(table: dict[str, str]) -> dict:
    return {"make": "predict", "table": table}


def model(scripts: dict[tuple, list[int]], training: bool) -> dict:
    return {
        "make": "model",
        "scripts": [[list(row), target] for row, target in scripts.items()],
        "training": training,
    }


# What came back.


def kind(value: object) -> str:
    return (
        value.get("type", "dict")
        if isinstance(value, dict)
        else "None"
        if value is None
        else type(value).__name__
    )


def is_tensor(value: object) -> bool:
    return isinstance(value, dict) and value.get("type") == "Tensor"


def number(value: object) -> float:
    if is_tensor(value) and value["shape"] == []:
        value = value["values"]
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise WrongError(f"returned {kind(value)}, not a number")
    return float(value)


def near(got: object, expected: float, what: str, tolerance: float = 1e-6) -> None:
    value = number(got)
    if math.isnan(expected):
        need(math.isnan(value), f"{what} is {value:.6g}, not nan")
    else:
        need(not math.isnan(value), f"{what} is nan")
        side = "high" if value > expected else "low"
        need(abs(value - expected) <= tolerance, f"{what} is {value:.6g}, too {side}")


def integers(value: object, what: str) -> list:
    """The rows of an int64 tensor."""
    need(is_tensor(value), f"{what}: returned {kind(value)}, not a tensor")
    need(value["dtype"] == "int64", f"{what}: the tensor is {value['dtype']}, not int64")
    return value["values"]


def need(holds: bool, hint: str) -> None:
    if not holds:
        raise WrongError(hint)


# --------------------------------------------------------------------------------------------------
# CHECKS[problem]: pairs (title, function of the student). A check raises WrongError with a hint.

CHECKS: dict[str, list[tuple[str, Callable[[Student], None]]]] = {problem: [] for problem in POINTS}


def check(problem: str, title: str) -> Callable:
    def register(function: Callable[[Student], None]) -> Callable[[Student], None]:
        CHECKS[problem].append((title, function))
        return function

    return register


# --- the three schedules


def schedule_value(
    student: Student, function: str, expected: float, step: int, *shape: float
) -> None:
    got = student(function, step, *shape).value
    steps, warmup, ramp, cap = (f"{value:.6g}" for value in shape)
    near(got, expected, f"P at step {step} of {steps} (warmup {warmup}, ramp {ramp}, cap {cap})")


def add_schedule_checks(problem: str, function: str) -> None:
    """What holds for all three curves."""

    @check(problem, "0 during the warm-up")
    def warm_up(student: Student) -> None:
        for step in (0, 1, 100, 199):
            schedule_value(student, function, 0, step, 800, 0.25, 0.5, 0.9)

    @check(problem, "the cap from the end of the ramp on")
    def reaches_the_cap(student: Student) -> None:
        for step, cap in ((600, 0.9), (601, 0.9), (799, 0.9), (600, 0.4), (799, 1.0)):
            schedule_value(student, function, cap, step, 800, 0.25, 0.5, cap)

    @check(problem, "a ramp of length 0, a cap of 0")
    def no_ramp(student: Student) -> None:
        for step, cap, expected in (
            (199, 0.9, 0),
            (200, 0.9, 0.9),
            (201, 0.9, 0.9),
            (0, 0, 0),
            (300, 0, 0),
        ):
            schedule_value(student, function, expected, step, 800, 0.25, 0.0, cap)
        schedule_value(student, function, 0, 400, 800, 0.25, 0.5, 0)

    @check(problem, "rises, and never passes the cap")
    def rises(student: Student) -> None:
        for cap in (0.3, 0.9, 1.0):
            end = 80 + 320 * (cap if function == "p_linear" else 1)  # where P reaches the cap
            values = []
            for step in range(70, int(end) + 1, 13):
                values.append(number(student(function, step, 640, 0.125, 0.5, cap).value))
            need(all(a < b for a, b in itertools.pairwise(values)), "P does not rise on the ramp")
            need(0 <= min(values) and max(values) <= cap + 1e-9, f"P leaves 0 to {cap}")


add_schedule_checks("schedule_linear", "p_linear")
add_schedule_checks("schedule_exponential", "p_exponential")
add_schedule_checks("schedule_inverse_sigmoid", "p_inverse_sigmoid")


@check("schedule_linear", "values worked out by hand")
def linear_table(student: Student) -> None:
    # the paper's: 1000 updates, a ramp of 600 from 50 on, 1/600 each; the cap at 50 + 540
    by_hand = {50: 0, 51: 1 / 600, 200: 0.25, 350: 0.5, 500: 0.75, 589: 539 / 600, 591: 0.9}
    for step, expected in by_hand.items():
        schedule_value(student, "p_linear", expected, step, 1000, 0.05, 0.6, 0.9)
    for step, expected in {0: 0, 1: 0.25, 2: 0.5, 3: 0.5, 4: 0.5}.items():
        schedule_value(student, "p_linear", expected, step, 8, 0.0, 0.5, 0.5)
    schedule_value(student, "p_linear", 1 / 3, 3, 10, 0.25, 0.15, 0.9)  # i = 0.5 of n = 1.5


@check("schedule_exponential", "values worked out by hand")
def exponential_table(student: Student) -> None:
    # cap 0.75, so epsilon falls to 1/4: 1/2 after half of the ramp, 1/sqrt(2) after a quarter
    for step, expected in {
        200: 0,
        300: 1 - 0.5**0.5,
        400: 0.5,
        500: 1 - 0.5**1.5,
        600: 0.75,
    }.items():
        schedule_value(student, "p_exponential", expected, step, 800, 0.25, 0.5, 0.75)
    # cap 0.9: epsilon falls to 1/10
    for step, expected in {
        350: 1 - 0.1**0.5,
        500: 1 - 0.1**0.75,
        649: 1 - 0.1 ** (599 / 600),
    }.items():
        schedule_value(student, "p_exponential", expected, step, 1000, 0.05, 0.6, 0.9)
    for step, expected in {
        250: 1 - 1e-3,
        375: 1 - 10**-4.5,
        500: 1,
    }.items():  # cap 1: 1e-6 is left at the end
        schedule_value(student, "p_exponential", expected, step, 1000, 0.0, 0.5, 1.0)


def inverse_sigmoid_runs(rng: random.Random) -> Iterator[tuple[float, float, float]]:
    """(k, n, cap) that belong together: who knows k needs no search, the cap is P at n."""
    for k, n in (
        (100.0, 600.0),
        (2.0, 4.0),
        (1000.0, 7500.0),
        *((rng.uniform(5, 300), 0.0) for _ in range(6)),
    ):
        n = n or k * (math.log(k) + rng.uniform(-0.5, 4))
        yield k, n, math.exp(n / k) / (k + math.exp(n / k))


@check("schedule_inverse_sigmoid", "values of the formula, for other constants k")
def inverse_sigmoid_table(student: Student) -> None:
    for k, n, cap in inverse_sigmoid_runs(student.rng):
        # the warm-up is an eighth of the updates, the ramp at most a half
        steps = 2 ** math.ceil(math.log2(2 * n))
        for share in (0, 0.1, 0.5, 0.9, 0.99):
            i = math.floor(share * n)
            expected = 1 / (1 + k * math.exp(-i / k))
            schedule_value(
                student, "p_inverse_sigmoid", expected, steps // 8 + i, steps, 0.125, n / steps, cap
            )


@check("schedule_inverse_sigmoid", "starts a little above 0 at the end of the warm-up")
def inverse_sigmoid_start(student: Student) -> None:
    value = number(student("p_inverse_sigmoid", 200, 800, 0.25, 0.5, 0.9).value)
    need(0 < value < 0.1, f"P at i = 0 is {value:.6g}; it must be 1 / (k + 1)")


# --- coin


def coins_of(answer: Answer, n: int) -> list[list[bool]]:
    for coins in answer.values:
        need(isinstance(coins, list), f"returned {kind(coins)}, not a list")
        need(len(coins) == n, f"returned {len(coins)} coins for {n} examples")
        other = next((kind(coin) for coin in coins if not isinstance(coin, bool)), None)
        need(other is None, f"a coin is of type {other}, not bool")
    return answer.values


@check("coin", "one bool per example; p = 0 never, p = 1 always")
def coin_limits(student: Student) -> None:
    for n in (0, 1, 64):
        need(not any(coins_of(student("draw_coins", n, 0.0, generator(1)), n)[0]), "True at p = 0")
        need(all(coins_of(student("draw_coins", n, 1.0, generator(1)), n)[0]), "False at p = 1")


@check("coin", "the share of True, within 5 sigma")
def coin_share(student: Student) -> None:
    n = 20000
    for p in (0.1, 0.3, 0.9):
        share = sum(coins_of(student("draw_coins", n, p, generator(int(100 * p))), n)[0]) / n
        sigma = math.sqrt(p * (1 - p) / n)
        need(abs(share - p) < 5 * sigma, f"p = {p}: {100 * share:.1f} % of {n} coins are True")


@check("coin", "independent within a batch")
def coin_independent(student: Student) -> None:
    batches = coins_of(student("draw_coins", 16, 0.5, generator(7), repeat=400), 16)
    same = sum(len(set(batch)) == 1 for batch in batches)
    need(same < 20, f"in {same} of 400 batches all 16 coins are equal")
    sums = [sum(batch) for batch in batches]
    variance = sum((x - 8) ** 2 for x in sums) / len(sums)  # 4 = n p (1 - p); 5 sigma are 1.4
    need(variance > 2.6, "batches hold too equal numbers of True: dependent coins")
    need(variance < 5.4, "batches hold too different numbers of True: dependent coins")
    long = coins_of(student("draw_coins", 20000, 0.5, generator(8)), 20000)[0]
    equal = sum(a == b for a, b in itertools.pairwise(long)) / 19999
    need(abs(equal - 0.5) < 2.5 / math.sqrt(19999), "neighbours depend on each other")


@check("coin", "all randomness comes from the generator")
def coin_generator(student: Student) -> None:
    one, two = (student("draw_coins", 64, 0.5, generator(3), repeat=3) for _ in range(2))
    need(coins_of(one, 64) == coins_of(two, 64), "the same seed gives other coins")
    need(
        one.value != student("draw_coins", 64, 0.5, generator(4)).value,
        "another seed, the same coins",
    )
    need(one.values[0] != one.values[1], "the second batch has the coins of the first")
    need(not one.seen["global_rng_moved"], "the global random state of torch was moved")


# --- prompts

LABELS = ["call 911", "see doctor", "home care"]
NOTES = [
    {
        "question": f"note {i}, {symptom}",
        "label": LABELS[i % 3],
        "rationale": f"because of {symptom}",
    }
    for i, symptom in enumerate(("pain", "cough", "fever", "rash", "vomiting", "a fall"))
]


def mixed(
    student: Student, notes: list, coins: list[bool], answers: list[str], training: bool = True
) -> Answer:
    """Calls explain_batch and sees to the form of what comes back."""
    questions = [note["question"] for note in notes]
    table = predictor(dict(zip(questions, answers, strict=True)))
    answer = student("explain_batch", notes, LABELS, coins, table, training)
    both = answer.value
    need(isinstance(both, list) and len(both) == 2, "does not return a pair (prompts, targets)")
    for what, texts in zip(("prompts", "targets"), both, strict=True):
        need(
            isinstance(texts, list) and all(isinstance(t, str) for t in texts),
            f"the {what} are no texts",
        )
        need(len(texts) == len(notes), f"{len(texts)} {what} for {len(notes)} examples")
    return answer


def used(prompt: str, note: dict) -> str:
    """The label in a prompt."""
    match = re.fullmatch(r"given label: (.*), explain: " + re.escape(note["question"]), prompt)
    need(match is not None, f"{prompt!r:.90} is not the explain prompt of this question")
    return match[1]


OTHERS = [LABELS[(i + 1) % 3] for i in range(6)]  # for each note a valid label that is not gold


@check("mix_prompts", "no coin fell: gold labels")
def mix_gold(student: Student) -> None:
    prompts = mixed(student, NOTES, [False] * 6, OTHERS).value[0]
    for prompt, note in zip(prompts, NOTES, strict=True):
        need(
            used(prompt, note) == note["label"],
            "a coin is False, and its prompt does not hold gold",
        )


@check("mix_prompts", "a coin fell: the model's own label, of the same example")
def mix_predicted(student: Student) -> None:
    for coins in ([True] * 6, [False, True, False, True, True, False]):
        prompts = mixed(student, NOTES, coins, OTHERS).value[0]
        for i, (prompt, note) in enumerate(zip(prompts, NOTES, strict=True)):
            wanted = OTHERS[i] if coins[i] else note["label"]
            if used(prompt, note) != wanted:
                raise WrongError(f"coin {coins[i]} of example {i}: the prompt has another label")


@check("mix_prompts", "what is no valid label never enters a prompt")
def mix_invalid(student: Student) -> None:
    answers = ["", "home", "Home care", "see doctor", "call 911 ", "see doctor, home care"]
    prompts = mixed(student, NOTES, [True] * 6, answers).value[0]
    for prompt, note, answer in zip(prompts, NOTES, answers, strict=True):
        label = used(prompt, note)
        need(label in LABELS, f"{answer!r} is in a prompt, and is none of the labels")
        wanted = answer if answer in LABELS else note["label"]
        need(label == wanted, f"predicted {answer!r}: the prompt says {label!r}")


@check("mix_prompts", "the target is the gold rationale, whichever label is in the prompt")
def mix_targets(student: Student) -> None:
    for coins in ([False] * 6, [True] * 6, [True, False] * 3):
        for target, note in zip(mixed(student, NOTES, coins, OTHERS).value[1], NOTES, strict=True):
            need(target == note["rationale"], f"a target is {target!r:.60}, not the gold rationale")


@check("mix_prompts", "no sampling outside of training")
def mix_evaluation(student: Student) -> None:
    answer = mixed(student, NOTES, [True] * 6, OTHERS, training=False)
    for prompt, note in zip(answer.value[0], NOTES, strict=True):
        need(used(prompt, note) == note["label"], "training is False, and a label was sampled")
    need(not answer.seen["asked"], "training is False, and predict was called all the same")


@check("mix_prompts", "predict is asked only where a coin fell")
def mix_economy(student: Student) -> None:
    coins = [True, False, False, True, False, False]
    asked = mixed(student, NOTES, coins, OTHERS).seen["asked"]
    wanted = [note["question"] for note, coin in zip(NOTES, coins, strict=True) if coin]
    need(set(wanted) <= set(asked), "predict was not asked about every example whose coin fell")
    need(len(asked) == len(wanted), f"{len(asked)} questions to predict, {len(wanted)} coins fell")


@check("mix_prompts", "the examples stay as they are")
def mix_unchanged(student: Student) -> None:
    seen = mixed(student, NOTES, [True] * 6, OTHERS).seen
    need(not seen["changed"], "the examples, labels or coins were changed in place")


# --- teacher forcing


@check("shift_right", "rows worked out by hand")
def shift_table(student: Student) -> None:
    table = [
        ([[5, 6, 7, 1]], [[0, 5, 6, 7]]),
        ([[5, 6, 1, 0], [4, 1, 0, 0], [9, 8, 7, 1]], [[0, 5, 6, 1], [0, 4, 1, 0], [0, 9, 8, 7]]),
        ([[3]], [[0]]),
    ]
    for targets, expected in table:
        answer = student("shift_right", tensor(targets))
        got = integers(answer.value, f"targets {targets}")
        need(answer.value["shape"] == [len(targets), len(targets[0])], "another shape than targets")
        need(all(row[0] == 0 for row in got), "the decoder does not read START first")
        need(got == expected, f"targets {targets} become {got}")


@check("shift_right", "the targets stay as they are")
def shift_unchanged(student: Student) -> None:
    need(
        not student("shift_right", tensor([[5, 6, 1], [4, 1, 0]])).seen["changed"],
        "changed in place",
    )


def token_losses(logits: list, targets: list) -> list[float]:
    """Nats of every target token that is no padding: log sum exp minus the logit of the target."""
    pairs = [
        (x, y)
        for rows, ys in zip(logits, targets, strict=True)
        for x, y in zip(rows, ys, strict=True)
        if y != 0
    ]
    return [max(x) + math.log(sum(math.exp(v - max(x)) for v in x)) - x[y] for x, y in pairs]


def random_logits(rng: random.Random, targets: list, size: int) -> list:
    return [[[rng.gauss(0, 2) for _ in range(size)] for _ in row] for row in targets]


def loss_of(student: Student, logits: list, targets: list, what: str, expected: float) -> Answer:
    answer = student("token_mean_loss", tensor(logits, "float32", grad=True), tensor(targets))
    need(is_tensor(answer.value) and answer.value["shape"] == [], f"{what}: no scalar tensor")
    near(answer.value, expected, f"{what}: the loss", 1e-5)
    return answer


@check("masked_loss", "all words equally probable")
def loss_uniform(student: Student) -> None:
    for targets in ([[2, 1]], [[2, 3, 1, 0, 0], [3, 2, 2, 3, 1]]):
        logits = [[[0.0] * 4 for _ in row] for row in targets]
        loss_of(student, logits, targets, "4 equally probable words", math.log(4))


@check("masked_loss", "the mean over tokens, with rows of different length")
def loss_tokens(student: Student) -> None:
    # probability 1/2 for the one token of row 0, and 1/8 for each of the three tokens of row 1
    logits = [[[0.0, math.log(2), 0.0]] * 3, [[0.0, 0.0, math.log(2 / 7)]] * 3]
    expected = (math.log(2) + 3 * math.log(8)) / 4
    loss_of(student, logits, [[1, 0, 0], [2, 2, 2]], "rows of 1 and 3 tokens", expected)


@check("masked_loss", "padding changes nothing")
def loss_padding(student: Student) -> None:
    targets = [[2, 3, 1], [4, 1, 0]]
    logits = random_logits(student.rng, targets, 5)
    expected = sum(token_losses(logits, targets)) / 5
    loss_of(student, logits, targets, "one position of padding", expected)
    wider = [[*rows, *random_logits(student.rng, [[0] * 4], 5)[0]] for rows in logits]
    loss_of(student, wider, [[*row, 0, 0, 0, 0] for row in targets], "more padding", expected)


@check("masked_loss", "a batch of nothing but padding has loss 0")
def loss_empty(student: Student) -> None:
    loss_of(student, [[[1.0, 2.0, 3.0]] * 2], [[0, 0]], "only padding", 0)


@check("masked_loss", "large logits")
def loss_stable(student: Student) -> None:
    loss_of(student, [[[1000.0, 0.0, 1000.0]]], [[2]], "logits of 1000", math.log(2))
    loss_of(student, [[[1000.0, 0.0, 0.0]]], [[1]], "logits of 1000", 1000)


@check("masked_loss", "the gradient")
def loss_gradient(student: Student) -> None:
    targets = [[2, 1, 0], [3, 2, 1]]
    logits = random_logits(student.rng, targets, 4)
    grad = loss_of(
        student, logits, targets, "random logits", sum(token_losses(logits, targets)) / 5
    ).seen["grad"]
    need(grad is not None, "no gradient reaches the logits")
    need(not any(grad[0][2]), "a gradient reaches the logits of a padding position")
    total = sum(math.exp(v) for v in logits[1][0])
    expected = (math.exp(logits[1][0][3]) / total - 1) / 5  # (p - 1) / number of tokens
    near(grad[1][0][3], expected, "the gradient of a target's logit", 1e-5)


# --- greedy decoding

SCRIPTS = {
    (5, 2): [4, 6, 1],
    (7, 3): [3, 1],
    (2, 2): [6, 5, 4, 3, 1],
    (9, 4): [1],
    (6, 6): [3] * 40,
}


def decoded(student: Student, rows: list[tuple], longest: int, training: bool = False) -> Answer:
    answer = student(
        "greedy_decode", model(SCRIPTS, training), tensor([list(row) for row in rows]), longest
    )
    integers(answer.value, "the result")
    need(
        len(answer.value["shape"]) == 2 and answer.value["shape"][0] == len(rows),
        "not a row per source",
    )
    return answer


def tokens_match(student: Student, rows: list[tuple], longest: int, training: bool = False) -> None:
    got = decoded(student, rows, longest, training).value["values"]
    width = min(longest, max(len(SCRIPTS[row]) for row in rows))
    for row, tokens in zip(rows, got, strict=True):
        script = SCRIPTS[row][:width]
        start = next(
            (t for t, (a, b) in enumerate(zip(tokens, script, strict=False)) if a != b), None
        )
        need(tokens[:1] != [0], "a row begins with START or PAD; START is no part of the result")
        need(start != 0, "the first token is wrong: is START alone what the decoder reads first?")
        need(start is None, f"wrong from token {start} on: does it read START and all so far?")
        need(len(tokens) >= len(script), f"{len(tokens)} tokens, and the row does not end there")
        need(not any(tokens[len(script) :]), "after END stands something else than PAD")
        need(len(tokens) == width, f"{len(tokens)} columns, and {width} calls were enough")


@check("greedy_decode", "the most probable token at each step")
def decode_tokens(student: Student) -> None:
    tokens_match(student, [(5, 2)], 10)
    tokens_match(student, [(2, 2)], 10)


@check("greedy_decode", "padding after the end token")
def decode_padding(student: Student) -> None:
    tokens_match(student, [(5, 2), (7, 3), (2, 2), (9, 4)], 10)


@check("greedy_decode", "stops when all rows have ended, or at the limit")
def decode_stops(student: Student) -> None:
    tokens_match(student, [(9, 4)], 10)
    tokens_match(student, [(6, 6), (7, 3)], 7)
    calls = decoded(student, [(5, 2), (7, 3)], 30).seen["calls"]
    need(calls == 3, f"the model was called {calls} times for rows of 3 and 2 tokens")


@check("greedy_decode", "dropout is off")
def decode_dropout(student: Student) -> None:
    need(
        not decoded(student, [(5, 2)], 10, training=True).seen["trained"],
        "called in training mode",
    )
    tokens_match(student, [(5, 2), (2, 2)], 10, training=True)


@check("greedy_decode", "the model's mode afterwards")
def decode_mode(student: Student) -> None:
    need(decoded(student, [(5, 2)], 10, training=True).seen["training"], "left in eval mode")
    need(not decoded(student, [(5, 2)], 10).seen["training"], "left in training mode")


@check("greedy_decode", "no gradients")
def decode_gradients(student: Student) -> None:
    seen = decoded(student, [(5, 2)], 10).seen
    need(not seen["gradients"], "the model was called with gradients on")
    need(seen["gradients_on"], "gradients stay off after decoding, so that training stops")


# --- BLEU


def words(text: str) -> list[str]:
    return text.split()


def bleu(pairs: list[tuple[list[str], list[str]]]) -> float:
    """The oracle: each n-gram takes an equal one out of its reference, if any is left."""
    product, halving, found_any = 1.0, 1.0, False
    for n in (1, 2, 3, 4):
        matches = total = 0
        for hypothesis, reference in pairs:
            left = [reference[i : i + n] for i in range(len(reference) - n + 1)]
            for i in range(len(hypothesis) - n + 1):
                total += 1
                if hypothesis[i : i + n] in left:
                    left.remove(hypothesis[i : i + n])
                    matches += 1
        found_any |= matches > 0
        if total == 0:
            return 0.0
        if matches == 0:
            halving /= 2
        product *= (matches or halving) / total
    ours, theirs = (sum(len(pair[side]) for pair in pairs) for side in (0, 1))
    return 100 * product**0.25 * min(1.0, math.exp(1 - theirs / ours)) if found_any else 0.0


def bleu_of(student: Student, pairs: list[tuple[str, str]], expected: float, what: str) -> None:
    hypotheses, references = ([words(pair[side]) for pair in pairs] for side in (0, 1))
    near(student("corpus_bleu", hypotheses, references).value, expected, what, 1e-4)


@check("corpus_bleu", "equal texts have 100, texts without a common word 0")
def bleu_ends(student: Student) -> None:
    bleu_of(student, [("a b c d e", "a b c d e")], 100, "the BLEU of two equal texts")
    bleu_of(student, [("a b c d e", "v w x y z")], 0, "the BLEU of texts without a common word")


@check("corpus_bleu", "brevity penalty, for the whole corpus")
def bleu_brevity(student: Student) -> None:
    bleu_of(
        student,
        [("a b c d", "a b c d e f g h")],
        100 * math.exp(-1),
        "half of the reference: BLEU",
    )
    more = (
        100 * (4 / 6 * 3 / 5 * 2 / 4 * 1 / 3) ** 0.25
    )  # longer than the reference: no penalty, and no reward
    bleu_of(student, [("a b c d x y", "a b c d")], more, "two words more than the reference: BLEU")
    # 4 + 8 words against 6 + 6: one is short, the other long, the corpus is neither
    both = [("a b c d", "a b c d e f"), ("g h i j k l x y", "g h i j k l")]
    precisions = 10 / 12 * 8 / 10 * 6 / 8 * 4 / 6
    bleu_of(student, both, 100 * precisions**0.25, "a short and a long text: BLEU")


@check("corpus_bleu", "counts are pooled over the pairs")
def bleu_pooled(student: Student) -> None:
    pairs = [("a b c d", "a b c d"), ("e f g h i", "e f x h i")]
    bleu_of(student, pairs, 100 * (8 / 9 * 5 / 7 * 2 / 5 * 1 / 3) ** 0.25, "two pairs: BLEU")
    bleu_of(
        student,
        [*pairs, ("q", "q r")],
        100 * (9 / 10 * 5 / 7 * 2 / 5 * 1 / 3) ** 0.25 * math.exp(-1 / 10),
        "three pairs: BLEU",
    )


@check("corpus_bleu", "matches are clipped, pair by pair")
def bleu_clipped(student: Student) -> None:
    repeated = 100 * (2 / 5 * (1 / 2) / 4 * (1 / 4) / 3 * (1 / 8) / 2) ** 0.25
    bleu_of(student, [("a a a a a", "a b a c d")], repeated, "a word five times: BLEU")
    # the second reference has the words of the first hypothesis: they must not help it
    crossed = [("a b c d e", "a b c d x"), ("f g h i j", "f g h i e")]
    bleu_of(student, crossed, 100 * (8 / 10 * 6 / 8 * 4 / 6 * 2 / 4) ** 0.25, "two pairs: BLEU")


@check("corpus_bleu", 'smoothing "exp", and orders without any n-gram')
def bleu_smoothing(student: Student) -> None:
    bleu_of(
        student,
        [("e f g h i", "e f x h i")],
        100 * (4 / 5 * 2 / 4 * 1 / 6 * 1 / 8) ** 0.25,
        "no 3-gram: BLEU",
    )
    bleu_of(student, [("a b c", "a b c")], 0, "no 4-grams at all: BLEU")
    bleu_of(
        student,
        [("", "a b c d"), ("a b c d", "a b c d")],
        100 * math.exp(-1),
        "an empty text: BLEU",
    )
    bleu_of(student, [("", "a b c d")], 0, "an empty text: BLEU")


@check("corpus_bleu", "random corpora")
def bleu_random(student: Student) -> None:
    rng = student.rng
    for _ in range(8):
        pairs = []
        for _ in range(rng.randint(1, 5)):
            reference = rng.choices("abcdefg", k=rng.randint(4, 14))
            kept = [word if rng.random() < 0.8 else rng.choice("abcdefg") for word in reference]
            pairs.append(
                (kept[: rng.randint(3, 14)] + rng.choices("abc", k=rng.randint(0, 2)), reference)
            )
        got = student("corpus_bleu", [pair[0] for pair in pairs], [pair[1] for pair in pairs]).value
        near(got, bleu(pairs), f"a random corpus of {len(pairs)} pairs: BLEU", 1e-4)


# --- macro-F1


def f1_of(student: Student, gold: str, predicted: str, labels: str, expected: float) -> None:
    got = student("macro_f1", words(gold), words(predicted), words(labels)).value
    near(got, expected, f"labels {labels}; gold {gold}; predicted {predicted}: macro-F1", 1e-6)


@check("macro_f1", "values worked out by hand")
def f1_table(student: Student) -> None:
    f1_of(student, "a b c", "a b c", "a b c", 100)
    f1_of(student, "a b", "b a", "a b", 0)
    f1_of(student, "a a b b", "a b b b", "a b", 100 * (2 / 3 + 4 / 5) / 2)


@check("macro_f1", "every label counts the same")
def f1_unweighted(student: Student) -> None:
    f1_of(student, "a a a a a a b b", "a a a a a a a b", "a b", 100 * (12 / 13 + 2 / 3) / 2)


@check("macro_f1", "a label that never occurs, or is never predicted, still counts")
def f1_unseen(student: Student) -> None:
    f1_of(student, "a a b c", "a a b c", "a b c d", 75)
    f1_of(student, "a a b", "a a a", "a b", 100 * (4 / 5 + 0) / 2)


@check("macro_f1", "an invalid prediction is a miss, and no class")
def f1_invalid(student: Student) -> None:
    f1_of(student, "a a b b", "a a b none", "a b", 100 * (1 + 2 / 3) / 2)
    f1_of(student, "a b", "none none", "a b", 0)


# --- the gap, and following


@check("exposure_gap", "values worked out by hand")
def gap_table(student: Student) -> None:
    near(
        student("exposure_gap", [90.0, 80.0, 70.0, 60.0], [80.0, 80.0, 65.0, 55.0]).value,
        5,
        "the gap",
    )
    near(student("exposure_gap", [50.0], [50.0]).value, 0, "the gap of equal rows")


@check("exposure_gap", "the sign: a gap may be negative")
def gap_sign(student: Student) -> None:
    near(student("exposure_gap", [60.0, 70.0], [70.0, 80.0]).value, -10, "a negative gap")


def following_of(student: Student, flipped: str, predicted: str, argued: list, expected: float):
    got = student("following", list(flipped), list(predicted), argued).value
    shown = "".join(label or "-" for label in argued)
    what = f"flipped {flipped}, predicted {predicted}, argued {shown}: following"
    near(got, expected, what)


@check("following", "only notes whose flipped label is not the predicted one count")
def following_counts(student: Student) -> None:
    following_of(student, "aabb", "abab", list("aaab"), 50)  # notes 1 and 2
    following_of(student, "bca", "abc", list("bca"), 100)
    following_of(student, "bca", "abc", list("abc"), 0)


@check("following", "only the label that was given counts")
def following_given(student: Student) -> None:
    following_of(student, "bbbb", "aaaa", ["b", "c", "a", "c"], 25)
    following_of(student, "bbbb", "aaaa", ["b", None, None, "b"], 50)


@check("following", "nan where there is nothing to count")
def following_nan(student: Student) -> None:
    following_of(student, "ab", "ab", list("ab"), math.nan)


# --------------------------------------------------------------------------------------------------
# Grading and the report.


def grade_problem(problem: str, child: Child, seconds: float, seed: int) -> dict:
    """{points, of, checks, failed: a line per failed check}"""
    failed, began = [], time.monotonic()
    try:
        if child.process is None:
            child.load(child.source, child.path)
        student = Student(child, seconds, f"{seed} {problem}")
        for title, function in CHECKS[problem]:
            try:
                function(student)
            except (WrongError, StoppedError) as e:
                failed.append(f"{title}: {e}")
                if isinstance(e, StoppedError):
                    break
            except (LookupError, TypeError, ValueError, AttributeError):
                failed.append(
                    f"{title}: what was returned has another type or shape than the docstring says"
                )
    except NotImplementedError:
        failed = ["not implemented yet"]
    except (StoppedError, WrongError) as e:
        failed.append(str(e))
    points = 0 if failed else POINTS[problem]
    spent = round(time.monotonic() - began, 2)
    return {
        "points": points,
        "of": POINTS[problem],
        "checks": len(CHECKS[problem]),
        "failed": failed,
        "seconds": spent,
    }


def grade(path: Path, child: Child, seconds: float = 10, seed: int = 0) -> dict:
    """The content of grade.json."""
    notes, trouble, problems = [], None, {}
    try:
        source = path.read_text(encoding="utf-8-sig")
        for i, line in enumerate(source.splitlines(), 1):
            if re.match(r"\s*(from|import)\s", line):
                core = re.findall(r"\b(?:r2d|model|data|metrics)\b", line.split(" import ")[0])
                notes += [
                    f"line {i} imports {name}: the repository's own file holds a solution"
                    for name in core
                ]
        child.load(source, str(path))
    except (OSError, UnicodeError) as e:
        trouble = f"the file cannot be read ({type(e).__name__})"
    except NotImplementedError:
        trouble = "the file cannot be loaded: raised NotImplementedError outside of a function"
    except (StoppedError, WrongError) as e:
        trouble = f"the file cannot be loaded: {e}"
    for problem, points in POINTS.items():
        nothing = {
            "points": 0,
            "of": points,
            "checks": len(CHECKS[problem]),
            "failed": [trouble],
            "seconds": 0.0,
        }
        problems[problem] = nothing if trouble else grade_problem(problem, child, seconds, seed)
    memory = f"{GIBIBYTES:g} GiB beside torch" if child.ready.get("memory") else None
    return {
        "file": path.name,
        "points": sum(result["points"] for result in problems.values()),
        "of": sum(POINTS.values()),
        "by_hand": BY_HAND,
        "problems": problems,
        "trouble": trouble,
        "notes": notes,
        "limits": {"seconds": seconds, "memory": memory},
        "seed": seed,
        "versions": {
            "python": platform.python_version(),
            "torch": child.ready.get("torch"),
            "system": sys.platform,
        },
    }


def report_text(result: dict) -> str:
    """grade.json for people."""
    lines = [f"{result['file']}: the automatic part", ""]
    for problem, one in result["problems"].items():
        state = f"all {one['checks']} checks hold" if not one["failed"] else ""
        lines.append(f"{problem:26}{one['points']:3} of {one['of']}   {state}".rstrip())
        lines += [f"    - {hint}" for hint in one["failed"] if not result["trouble"]]
    by_hand = f"and {result['by_hand']} points by hand"
    lines += ["", f"{'total':26}{result['points']:3} of {result['of']}   {by_hand}"]
    lines += [result["trouble"]] if result["trouble"] else []
    lines += [f"note: {note}" for note in result["notes"]]
    memory = result["limits"]["memory"] or "none, because this system has no such limit"
    seconds = f"{result['limits']['seconds']:g} s per problem"
    lines += [f"limits: {seconds}, memory {memory}; seed {result['seed']}"]
    return "\n".join(lines)


def write_report(result: dict, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    content = json.dumps(result, indent=2, ensure_ascii=False)
    (folder / "grade.json").write_text(content + "\n", encoding="utf-8")
    (folder / "grade.txt").write_text(report_text(result) + "\n", encoding="utf-8")


class Report:
    """Prints the report at the end of the pytest run, whatever pytest captures."""

    def __init__(self, text: str) -> None:
        self.text = text

    def pytest_terminal_summary(self, terminalreporter: object) -> None:
        terminalreporter.write_line(
            "\n" + self.text.encode("ascii", "replace").decode()
        )  # any console can show it


@pytest.fixture(scope="session")
def result(request: pytest.FixtureRequest) -> dict:
    """Everything is graded once, before the first test. The old report goes first."""
    path = Path(os.environ.get("R2D_ADAPTERS", HERE / "adapters.py"))
    folder = Path(os.environ.get("R2D_GRADE_DIR", HERE))
    seconds, seed = (
        float(os.environ.get("R2D_GRADE_SECONDS", "10")),
        int(os.environ.get("R2D_GRADE_SEED", "0")),
    )
    for name in ("grade.json", "grade.txt"):
        (folder / name).unlink(missing_ok=True)
    child = Child()
    try:
        graded = grade(path, child, seconds, seed)
    except RuntimeError as e:
        pytest.exit(str(e), 2)
    finally:
        child.stop()
    write_report(graded, folder)
    request.config.pluginmanager.register(Report(report_text(graded)))
    return graded


@pytest.mark.parametrize("problem", POINTS)
def test_problem(problem: str, result: dict) -> None:
    """All checks of the problem hold. What is wrong stands in the report below."""
    one = result["problems"][problem]
    if one["failed"]:
        more = f" (and {len(one['failed']) - 1} more)" if len(one["failed"]) > 1 else ""
        pytest.fail(f"0 of {one['of']} points: {one['failed'][0]}{more}", pytrace=False)
