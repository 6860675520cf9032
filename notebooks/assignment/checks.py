"""The checks of the grader: inputs, and what a right answer to them is.

Expected values are worked out by hand or by small oracles, and stay in the grader's process.
CHECKS holds the checks of each problem in their order. The first is its core: who fails that has
no points for the problem; each of the others gives its points by itself.
"""

import itertools
import math
import random
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np


class WrongError(Exception):
    """A check does not hold; the text is the hint."""


@dataclass(frozen=True)
class Check:
    title: str
    points: int
    run: Callable


PROBLEMS = {  # problem -> the function that solves it, in the order of adapters.py
    "schedule_linear": "p_linear",
    "schedule_exponential": "p_exponential",
    "schedule_inverse_sigmoid": "p_inverse_sigmoid",
    "coin": "flip_coins",
    "mix_labels": "mix_labels",
    "prompts": "explain_prompts",
    "dose": "dose",
    "exposure_gap": "exposure_gap",
    "gap_interval": "gap_interval",
    "following": "following",
    "shift_right": "shift_right",
    "masked_loss": "token_mean_loss",
    "greedy_decode": "greedy_decode",
    "corpus_bleu": "corpus_bleu",
    "macro_f1": "macro_f1",
}
CHECKS: dict[str, list[Check]] = {problem: [] for problem in PROBLEMS}


def check(problem: str, points: int, title: str) -> Callable:
    def register(run: Callable) -> Callable:
        CHECKS[problem].append(Check(title, points, run))
        return run

    return register


def points_of(problem: str) -> int:
    return sum(one.points for one in CHECKS[problem])


# A check gets a `student`. student(FUNCTION, *ARGUMENTS) calls the function in the child process;
# the answer has .value, .values (of several calls), .seen (what was noticed meanwhile) and
# .arguments (as they were left). student.rng is seeded by the grader's seed.
# Arguments that only the child can make:


def tensor(values: list, dtype: str = "int64", grad: bool = False) -> dict:
    return {"make": "tensor", "values": values, "dtype": dtype, "grad": grad}


def array(values: np.ndarray) -> dict:
    return {"make": "array", "values": values.tolist()}


def make(what: str, **further: object) -> dict:
    """A generator or rng (with a seed), a statistic (mean, median, ratio), a model, or predict."""
    return {"make": what, **further}


# What came back:


def kind(value: object) -> str:
    if isinstance(value, dict):
        return value["type"]
    return "None" if value is None else type(value).__name__


def need(holds: bool, hint: str) -> None:
    if not holds:
        raise WrongError(hint)


def is_tensor(value: object) -> bool:
    return isinstance(value, dict) and value["type"] == "tensor"


def number(value: object) -> float:
    if is_tensor(value) and value["shape"] == []:
        value = value["values"]
    right = isinstance(value, (int, float)) and not isinstance(value, bool)
    need(right, f"returned {kind(value)}, not a number")
    return float(value)


def near(got: object, expected: float, what: str, tolerance: float = 1e-4) -> None:
    """The default tolerance leaves room for float32, on scales to 100."""
    value = number(got)
    if math.isnan(expected):
        need(math.isnan(value), f"{what} is {value:.6g}, not nan")
        return
    need(not math.isnan(value), f"{what} is nan")
    side = "high" if value > expected else "low"
    need(abs(value - expected) <= tolerance, f"{what} is {value:.6g}, too {side}")


def int64(value: object, what: str) -> list:
    """The rows of an int64 tensor."""
    need(is_tensor(value), f"{what}: returned {kind(value)}, not a tensor")
    need(value["dtype"] == "int64", f"{what}: the tensor is {value['dtype']}, not int64")
    return value["values"]


# ---- The three schedules


def p_at(student: Callable, problem: str, step: int, expected: float, *shape: float) -> None:
    """P at one step; shape: steps, warmup, ramp, cap."""
    got = student(PROBLEMS[problem], step, *shape).value
    steps, warmup, ramp, cap = (f"{value:.6g}" for value in shape)
    near(got, expected, f"P at step {step} of {steps} (warmup {warmup}, ramp {ramp}, cap {cap})")


@check("schedule_linear", 2, "values worked out by hand")
def linear_values(student: Callable) -> None:
    for step, expected in {0: 0, 1: 1 / 600, 150: 0.25, 300: 0.5, 450: 0.75}.items():
        p_at(student, "schedule_linear", step, expected, 1000, 0.0, 0.6, 1.0)
    for step, expected in {0: 0, 1: 0.25, 2: 0.5, 4: 0.5, 7: 0.5}.items():
        p_at(student, "schedule_linear", step, expected, 8, 0.0, 0.5, 0.5)


@check("schedule_exponential", 2, "values worked out by hand")
def exponential_values(student: Callable) -> None:
    # cap 0.75: epsilon falls to 1/4, so to 1/2 after half of the ramp, 1/sqrt(2) after a quarter
    by_hand = {0: 0, 100: 1 - 0.5**0.5, 200: 0.5, 300: 1 - 0.5**1.5, 400: 0.75, 700: 0.75}
    for step, expected in by_hand.items():
        p_at(student, "schedule_exponential", step, expected, 800, 0.0, 0.5, 0.75)
    by_hand = {300: 1 - 0.1**0.5, 450: 1 - 0.1**0.75, 599: 1 - 0.1 ** (599 / 600)}
    for step, expected in by_hand.items():  # cap 0.9: epsilon falls to 1/10
        p_at(student, "schedule_exponential", step, expected, 1000, 0.0, 0.6, 0.9)


@check("schedule_inverse_sigmoid", 2, "values of the formula")
def inverse_sigmoid_values(student: Callable) -> None:
    inverse_sigmoid_curves(student, warm=0)


def inverse_sigmoid_curves(student: Callable, warm: float) -> None:
    """k is drawn first and gives the cap at n: so the right values need no search."""
    drawn = [(student.rng.uniform(5, 300), student.rng.uniform(-0.5, 4)) for _ in range(5)]
    for k, beyond in [(100.0, 1.4), (2.0, 1.3), (1000.0, 0.6), (0.5, 3.7), *drawn]:
        n = k * (math.log(k) + beyond)
        cap = 1 / (1 + k * math.exp(-n / k))
        steps = 4 * 2 ** math.ceil(math.log2(n + 1))  # the shares below are exact
        for share in (0, 0.1, 0.5, 0.9, 0.99):
            step = math.floor(warm + share * n)
            if step < warm:
                continue
            expected = 1 / (1 + k * math.exp(-(step - warm) / k))
            shape = (steps, warm / steps, n / steps, cap)
            p_at(student, "schedule_inverse_sigmoid", step, expected, *shape)


def on_the_ramp(problem: str, share: float, cap: float) -> float:
    """The right P of the first two curves after a share of the ramp."""
    if problem == "schedule_linear":
        return min(cap, share)
    return 1 - (1 - cap) ** share


def add_common_checks(problem: str, split: bool) -> None:
    """What holds for all three curves; `split`: as three checks of a point each, else as two."""

    def warm_up(student: Callable) -> None:
        for step in (0, 1, 100, 199):
            p_at(student, problem, step, 0, 800, 0.25, 0.5, 0.9)
        if problem == "schedule_inverse_sigmoid":
            p = number(student(PROBLEMS[problem], 200, 800, 0.25, 0.5, 0.9).value)
            need(0 < p < 0.1, f"P at the end of the warm-up is {p:.6g}; it must be 1 / (k + 1)")
            inverse_sigmoid_curves(student, warm=1.5)
            return
        for step in (200, 300, 400, 500):
            expected = on_the_ramp(problem, (step - 200) / 400, 0.9)
            p_at(student, problem, step, expected, 800, 0.25, 0.5, 0.9)
        # i = 0.5 of n = 1.5: both are fractions
        p_at(student, problem, 3, on_the_ramp(problem, 1 / 3, 0.9), 10, 0.25, 0.15, 0.9)

    def end(student: Callable) -> None:
        for step, cap in ((600, 0.9), (601, 0.9), (799, 0.9), (600, 0.4), (799, 1.0)):
            p_at(student, problem, step, cap, 800, 0.25, 0.5, cap)
        values = []
        for step in range(200, 600, 13):
            values.append(number(student(PROBLEMS[problem], step, 800, 0.25, 0.5, 0.9).value))
        pairs = itertools.pairwise(values)
        need(all(a <= b for a, b in pairs), "P falls somewhere on the ramp")
        need(0 <= min(values) and max(values) <= 0.9 + 1e-9, "P leaves 0 to the cap, 0.9")

    def edges(student: Callable) -> None:
        for step, expected in ((199, 0), (200, 0.9), (201, 0.9)):
            p_at(student, problem, step, expected, 800, 0.25, 0.0, 0.9)  # a ramp of length 0
        for step in (0, 100, 200, 300, 700):
            p_at(student, problem, step, 0, 800, 0.25, 0.5, 0.0)  # a cap of 0
        p_at(student, problem, 300, 0, 800, 0.25, 0.0, 0.0)
        p_at(student, problem, 100, 0, 800, 0.0, 0.0, 0.0)
        p_at(student, problem, 500, 1, 1000, 0.0, 0.5, 1.0)  # a cap of 1
        if problem == "schedule_exponential":  # epsilon falls to 1e-6
            for step, expected in ((125, 1 - 10**-1.5), (250, 1 - 1e-3)):
                p_at(student, problem, step, expected, 1000, 0.0, 0.5, 1.0)
        if problem == "schedule_inverse_sigmoid":
            n = 30 * (math.log(30) + math.log(1e6 - 1))  # so k is 30
            for step in (50, 100, 200, 400):
                expected = 1 / (1 + 30 * math.exp(-step / 30))
                p_at(student, problem, step, expected, 1024, 0.0, n / 1024, 1.0)

    if split:
        check(problem, 1, "the warm-up, and the ramp after it")(warm_up)
        check(problem, 1, "the cap from the end of the ramp on, and never more")(end)
    else:

        def both(student: Callable) -> None:
            warm_up(student)
            end(student)

        check(problem, 1, "the warm-up, and the cap from the end of the ramp on")(both)
    check(problem, 1, "a ramp of length 0, a cap of 0 or 1")(edges)


add_common_checks("schedule_linear", split=True)
add_common_checks("schedule_exponential", split=True)
add_common_checks("schedule_inverse_sigmoid", split=False)


# ---- The coin. Statistical comparisons have 5 sigma: each fails a right answer once in a million.


def coins(student: Callable, n: int, p: float, seed: int, repeat: int = 1) -> list[list[bool]]:
    """The batches that `repeat` calls with one generator give; their form is checked."""
    generator = make("generator", seed=seed)
    answer = student("flip_coins", n, p, generator, repeat=repeat)
    for batch in answer.values:
        need(isinstance(batch, list), f"returned {kind(batch)}, not a list")
        need(len(batch) == n, f"returned {len(batch)} coins for {n} examples")
        for coin in batch:
            need(isinstance(coin, bool), f"a coin is of type {kind(coin)}, not bool")
    need(not answer.seen["global_rng_moved"], "the global random state of torch was moved")
    return answer.values


@check("coin", 2, "a bool per example, True with probability p")
def coin_share(student: Callable) -> None:
    for n in (1, 64):
        need(not any(coins(student, n, 0.0, 1)[0]), "True at p = 0")
        need(all(coins(student, n, 1.0, 1)[0]), "False at p = 1")
    n = 20000
    for p in (0.004, 0.137, 0.9, student.rng.uniform(0.2, 0.8)):
        batch = coins(student, n, p, student.rng.randrange(10**6))[0]
        sigma = math.sqrt(p * (1 - p) / n)
        share = sum(batch) / n
        need(abs(share - p) < 5 * sigma, f"p = {p:.3f}: {100 * share:.2f} % of {n} coins are True")


@check("coin", 2, "independent")
def coin_independent(student: Callable) -> None:
    batches = coins(student, 16, 0.5, student.rng.randrange(10**6), repeat=400)
    sums = [sum(batch) for batch in batches]
    variance = sum((x - 8) ** 2 for x in sums) / len(sums)  # 4 = n p (1 - p); 5 sigma are 1.4
    need(2.6 < variance < 5.4, "the coins of a batch depend on each other")
    long = coins(student, 20000, 0.5, student.rng.randrange(10**6))[0]
    for distance in (1, 2, 16):
        pairs = zip(long, long[distance:], strict=False)
        equal = sum(a == b for a, b in pairs) / (len(long) - distance)
        need(abs(equal - 0.5) < 2.5 / math.sqrt(len(long)), "the coins of a batch are no chance")


@check("coin", 2, "all randomness comes from the generator")
def coin_generator(student: Callable) -> None:
    seed = student.rng.randrange(10**6)
    one = coins(student, 64, 0.5, seed, repeat=3)
    need(one == coins(student, 64, 0.5, seed, repeat=3), "the same seed gives other coins")
    need(one[0] != coins(student, 64, 0.5, seed + 1)[0], "another seed gives the same coins")
    need(one[0] != one[1], "the second batch has the coins of the first")
    many = coins(student, 64, 0.5, seed, repeat=400)
    need(len(set(map(tuple, many))) == 400, "batches repeat themselves")


# ---- Labels in the prompts

LABELS = ["call 911", "see doctor", "home care", "wait"]
QUESTIONS = ["pain, note 1", "a cough", "a fever", "a rash, note 4", "vomiting", "a cough"]
GOLD = ["call 911", "see doctor", "home care", "call 911", "see doctor", "home care"]
OTHERS = ["see doctor", "wait", "call 911", "wait", "home care", "wait"]  # valid, and none is gold


class Mixed:
    """A call of mix_labels whose form is checked; the model predicts `answers`."""

    def __init__(self, student: Callable, tossed: list[bool], answers: list[str]) -> None:
        table = dict(zip(QUESTIONS, answers, strict=True))
        self.asked: list[str] = []

        def predict(questions: list) -> list[str]:
            self.asked += questions
            known = set(questions) <= set(QUESTIONS)
            need(known, "predict was asked about a text that is none of the questions")
            return [table[question] for question in questions]

        sent = [GOLD, QUESTIONS, LABELS, tossed]
        answer = student("mix_labels", *sent, make("predict"), answer=predict)
        both = answer.value
        need(isinstance(both, list) and len(both) == 2, "does not return a pair (labels, counts)")
        self.given, counts = both
        self.unchanged = answer.arguments[:4] == sent
        texts = isinstance(self.given, list) and all(isinstance(x, str) for x in self.given)
        need(texts and len(self.given) == 6, "the labels are no list of a text per prompt")
        need(kind(counts) == "dict", f"the counts are {kind(counts)}, not a dict")
        self.counts = counts["items"]


@check("mix_labels", 3, "gold where the coin is False, the example's own prediction where True")
def mix_values(student: Callable) -> None:
    for tossed in ([False] * 6, [True] * 6, [False, True, False, True, True, False]):
        given = Mixed(student, tossed, OTHERS).given
        for i, coin in enumerate(tossed):
            wanted = OTHERS[i] if coin else GOLD[i]
            need(given[i] == wanted, f"coin {coin} of example {i}: the prompt has another label")


INVALID = ["", "see_doctor", "Home care", "wait", "call 911 ", "see_doctor"]


@check("mix_labels", 2, "what is no valid label never enters a prompt")
def mix_invalid(student: Callable) -> None:
    twice = "see doctor, home care"
    for answers in (INVALID, ["home", "home care.", "waits", "no", twice, "home care."]):
        given = Mixed(student, [True] * 6, answers).given
        for i, label in enumerate(given):
            wanted = answers[i] if answers[i] in LABELS else GOLD[i]
            need(label == wanted, f"predicted {answers[i]!r}: the prompt says {label!r}")


@check("mix_labels", 2, "the counts")
def mix_counts(student: Callable) -> None:
    half = [True, False, True, False, True, True]
    right = [GOLD[0], GOLD[5], *GOLD[2:]]  # the second question is the sixth: one answer for both
    mostly_right = [GOLD[0], "none", OTHERS[2], GOLD[3], GOLD[4], "none"]
    cases = [
        ([False] * 6, OTHERS, (0, 0, 0)),
        ([True] * 6, OTHERS, (6, 6, 0)),
        ([True, False, True, True, True, True], right, (5, 0, 0)),
        ([True] * 6, ["?"] * 6, (0, 0, 6)),
        (half, mostly_right, (3, 1, 1)),
    ]
    keys = ("used_predicted", "wrong_predicted", "invalid_predicted")
    for tossed, answers, expected in cases:
        counts = Mixed(student, tossed, answers).counts
        need(set(counts) == set(keys), f"the counts have the keys {sorted(counts)}")
        for key, value in zip(keys, expected, strict=True):
            what = f"{sum(tossed)} coins True, predicted {answers}: {key}"
            near(counts[key], value, what)


@check("mix_labels", 1, "predict is asked where a coin is True alone; the arguments stay")
def mix_economy(student: Callable) -> None:
    for true in ([], [3], [0, 1, 4]):
        tossed = [i in true for i in range(6)]
        asked = Mixed(student, tossed, OTHERS).asked
        wanted = [QUESTIONS[i] for i in true]
        need(sorted(asked) == sorted(wanted), f"{len(wanted)} coins are True; asked about {asked}")
    for answers in (OTHERS, INVALID):
        for tossed in ([True] * 6, [True, False] * 3):
            need(Mixed(student, tossed, answers).unchanged, "an argument was changed in place")


@check("prompts", 2, "given label: {label}, explain: {question}")
def prompt_texts(student: Callable) -> None:
    word = f"w{student.rng.randrange(1000)}"
    labels = ["Call 911", "see doctor", "a_b ", "yes"]
    long = "A man of 40 years has had a cough for 3 days. " * 5
    questions = [long, f" {word}  two spaces", "a, b:\nc", "Is it?"]
    got = student("explain_prompts", labels, questions).value
    need(isinstance(got, list), f"returned {kind(got)}, not a list")
    wanted = []
    for label, question in zip(labels, questions, strict=True):
        wanted.append("given label: " + label + ", explain: " + question)
    need(len(got) == 4, f"{len(got)} prompts for 4 questions")
    for prompt, right in zip(got, wanted, strict=True):
        need(prompt == right, f"{prompt!r:.80} is not the explain prompt of this question")


# ---- Dose, gap, interval, following


def log_lines(wrong: list[int], stage1: int) -> list[dict]:
    """Updates of both stages, as in log.jsonl."""
    lines = []
    for step in range(stage1):
        lines.append({"stage": 1, "step": step, "loss": 2.0, "loss_explain": 2.0, "lr": 0.01})
    for step, n in enumerate(wrong):
        line = {"stage": 2, "step": step, "loss": 1.5, "p_predicted": 0.5}
        lines.append(line | {"used_predicted": n + 1, "wrong_predicted": n, "lr": 0.01})
    return lines


def dose_is(student: Callable, wrong: list[int], stage1: int, size: int, expected: float) -> None:
    what = f"{stage1} updates of stage 1, then wrong labels {wrong} in batches of {size}: the dose"
    near(student("dose", log_lines(wrong, stage1), size).value, expected, what)


@check("dose", 2, "values worked out by hand")
def dose_values(student: Callable) -> None:
    dose_is(student, [0, 2, 4], 0, 8, 25)
    dose_is(student, [1], 0, 24, 100 / 24)
    dose_is(student, [3, 0, 0, 3], 0, 6, 25)
    wrong = [student.rng.randrange(16) for _ in range(20)]
    dose_is(student, wrong, 0, 16, 100 * sum(wrong) / (16 * 20))


@check("dose", 1, "stage 1 does not count")
def dose_stage(student: Callable) -> None:
    dose_is(student, [0, 2, 4], 3, 8, 25)
    dose_is(student, [5, 5], 20, 10, 50)


@check("dose", 1, "no update of stage 2, no wrong label")
def dose_none(student: Callable) -> None:
    dose_is(student, [], 2, 8, math.nan)
    dose_is(student, [], 0, 8, math.nan)
    dose_is(student, [0, 0, 0], 2, 8, 0)


def gap_is(student: Callable, statistic: str, gold: list, own: list, expected: float) -> None:
    arguments = [array(np.array(gold, dtype=float)), array(np.array(own, dtype=float))]
    answer = student("exposure_gap", make(statistic), *arguments)
    near(answer.value, expected, f"gold {gold}, own {own}, {statistic}: the gap")
    left = [argument["values"] for argument in answer.arguments[1:]]
    need(left == [gold, own], "gold or own was changed in place")


@check("exposure_gap", 2, "values worked out by hand, with their sign")
def gap_values(student: Callable) -> None:
    gap_is(student, "mean", [90, 80, 70, 60], [80, 80, 65, 55], 5)
    gap_is(student, "mean", [60, 70], [70, 80], -10)
    gap_is(student, "mean", [50], [50], 0)
    gap_is(student, "mean", [90, 10], [20, 60], 10)


@check("exposure_gap", 1, "a score that is no mean over notes")
def gap_ratio(student: Callable) -> None:
    # 100 * (8 + 1) / (10 + 90) = 9 against 100 * (2 + 4) / (10 + 10) = 30
    gap_is(student, "ratio", [[8, 10], [1, 90]], [[2, 10], [4, 10]], -21)
    gap_is(student, "ratio", [[3, 4], [1, 4]], [[1, 8], [1, 2]], 30)
    gap_is(student, "median", [10, 20, 90], [5, 30, 31], -10)


def bootstrap(gold: np.ndarray, own: np.ndarray, seed: int) -> np.ndarray:
    """The oracle: both ends of the interval of `ratio`, from 4000 draws."""
    rng = np.random.default_rng(seed)
    gaps = []
    for _ in range(4000):
        drawn = rng.integers(0, len(gold), len(gold))
        gaps.append(ratio(gold[drawn]) - ratio(own[drawn]))
    return np.percentile(gaps, [2.5, 97.5])


def normal(gold: np.ndarray, own: np.ndarray, seed: int) -> np.ndarray:
    """The same for the mean, where no draws are needed: the differences are normal."""
    differences = gold - own
    half = 1.96 * differences.std() / len(differences) ** 0.5
    return differences.mean() + np.array([-half, half])


def interval(
    student: Callable, name: str, gold: np.ndarray, own: np.ndarray, rng: dict
) -> tuple[float, float]:
    """What gap_interval returns; 1000 draws must have been made for it."""
    answer = student("gap_interval", make(name), array(gold), array(own), rng)
    ends = answer.value
    if isinstance(ends, dict) and ends["type"] in ("array", "tensor") and ends["shape"] == [2]:
        ends = ends["values"]
    need(isinstance(ends, list) and len(ends) == 2, f"returned {kind(ends)}, not a pair")
    draws = answer.seen.get("draws", 0)
    need(draws >= 1000, f"the statistic was called for {draws:g} draws, not for 1000")
    low, high = map(number, ends)
    return low, high


def intervals_agree(student: Callable, name: str, ends_of: Callable, draw: Callable) -> None:
    """Ends of ten intervals against the oracle's, in widths of the interval.

    An end from 1000 draws has a standard deviation of 0.02 to 0.04 widths; the mean of ten 0.01.
    """
    off = []
    for _ in range(10):
        seed = student.rng.randrange(10**6)
        gold, own = draw(np.random.default_rng(seed))
        ends = ends_of(gold, own, seed)
        rng = make("rng", seed=seed + 1)
        low, high = interval(student, name, gold, own, rng)
        need(low < high, f"low is {low:.4g}, high is {high:.4g}")
        off.append((np.array([low, high]) - ends) / (ends[1] - ends[0]))
    low, high = np.mean(off, axis=0)  # nan if an end was nan
    hint = f"; on average low is {low:+.2f} and high {high:+.2f} widths from where they should be"
    need(abs(low) < 0.07 and abs(high) < 0.07, f"{name} of rows{hint}")


def ratio(rows: np.ndarray) -> float:
    return 100 * rows[:, 0].sum() / rows[:, 1].sum()


@check("gap_interval", 3, "rows that do not depend on each other")
def interval_unrelated(student: Callable) -> None:
    def draw(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        return rng.normal(80, 10, 100), rng.normal(76, 14, 100)

    intervals_agree(student, "mean", normal, draw)


@check("gap_interval", 2, "paired rows: most notes are easy, or hard, under both labels")
def interval_paired(student: Callable) -> None:
    def draw(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        gold = rng.normal(70, 20, 100)
        return gold, gold - rng.normal(4, 3, 100)

    intervals_agree(student, "mean", normal, draw)


@check("gap_interval", 2, "a score that is no mean; two notes; all chance from rng")
def interval_ratio(student: Callable) -> None:
    for gold in ([0.0, 20.0], [20.0, 0.0]):  # a quarter of the draws has one note alone
        ends = interval(student, "mean", np.array(gold), np.zeros(2), make("rng", seed=5))
        need(ends == (0, 20), f"gold {gold}, own [0, 0], mean: the interval is {ends}, not (0, 20)")
    rng = np.random.default_rng(student.rng.randrange(10**6))
    gold, own = rng.normal(80, 10, 50), rng.normal(76, 14, 50)
    one, two, other = (
        interval(student, "mean", gold, own, make("rng", seed=seed)) for seed in (1, 1, 2)
    )
    need(one == two, "the same rng gives another interval")
    need(one != other, "another rng gives the same interval")

    def draw(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        length = np.exp(rng.normal(2, 1, 40))
        hits = length * rng.uniform(0.5, 1, 40)
        worse = hits.copy()
        worse[:4] = 0  # a few notes lose everything
        return np.stack([hits, length], 1), np.stack([worse, length], 1)

    intervals_agree(student, "ratio", bootstrap, draw)


def following_is(
    student: Callable, flipped: str, predicted: str, argued: str, expected: float
) -> None:
    """A letter stands for a label, "-" for None."""
    names = {"a": "see doctor", "b": "doctor", "c": "Doctor", "d": "see", "-": None}
    columns = [[names[letter] for letter in text] for text in (flipped, predicted, argued)]
    got = student("following", *columns).value
    what = f"flipped {flipped}, predicted {predicted}, argued {argued} (- is None): following"
    near(got, expected, what)


@check("following", 2, "values worked out by hand")
def following_values(student: Callable) -> None:
    following_is(student, "aabb", "bbaa", "aabb", 100)
    following_is(student, "aabb", "bbaa", "bbaa", 0)
    following_is(student, "abcd", "bcda", "adcb", 50)
    following_is(student, "abc", "cab", "bbb", 100 / 3)


@check("following", 2, "agreement by chance does not count")
def following_chance(student: Callable) -> None:
    following_is(student, "aabb", "abba", "abbb", 50)  # the first and the third do not count
    following_is(student, "aaaa", "aaab", "aaab", 0)
    following_is(student, "abab", "abaa", "babb", 100)


@check("following", 1, "no argument, and no note left")
def following_none(student: Callable) -> None:
    following_is(student, "aabb", "bbaa", "a-b-", 50)
    following_is(student, "aa", "bb", "--", 0)
    following_is(student, "ab", "ab", "ab", math.nan)
    following_is(student, "", "", "", math.nan)


# ---- Teacher forcing


@check("shift_right", 1, "rows worked out by hand")
def shift_values(student: Callable) -> None:
    table = [
        ([[5, 6, 7, 1]], [[0, 5, 6, 7]]),
        (
            [[9, 8, 4099, 1], [4, 1, 0, 0], [5, 31999, 1, 0]],
            [[0, 9, 8, 4099], [0, 4, 1, 0], [0, 5, 31999, 1]],
        ),
        ([[3]], [[0]]),
    ]
    for targets, expected in table:
        value = student("shift_right", tensor(targets)).value
        got = int64(value, f"targets {targets}")
        need(got == expected, f"targets {targets} become {got}")


@check("shift_right", 1, "the targets stay as they are")
def shift_unchanged(student: Callable) -> None:
    targets = [[5, 6, 1], [4, 1, 0]]
    left = student("shift_right", tensor(targets)).arguments[0]
    need(is_tensor(left) and left["values"] == targets, "the targets were changed in place")


def random_logits(rng: random.Random, targets: list, size: int) -> list:
    return [[[rng.gauss(0, 2) for _ in range(size)] for _ in row] for row in targets]


def loss_and_grad(logits: list, targets: list) -> tuple[float, np.ndarray]:
    """The oracle, in float64: mean of log sum exp minus the target's logit; (p - 1) / tokens."""
    x = np.array(logits, dtype=float)
    y = np.array(targets)
    tokens = max((y != 0).sum(), 1)
    top = x.max(axis=-1, keepdims=True)
    total = np.exp(x - top).sum(axis=-1, keepdims=True)
    at_target = np.take_along_axis(x, y[..., None], axis=-1)
    nats = (top + np.log(total) - at_target)[..., 0]
    grad = np.exp(x - top) / total - np.eye(x.shape[-1])[y]
    mask = y != 0
    return float((nats * mask).sum() / tokens), grad * mask[..., None] / tokens


def loss_is(
    student: Callable, logits: list, targets: list, what: str, grad: bool = False
) -> list | None:
    """The gradient, of a loss that is right within rounding.

    float32 has seven digits, so the scale of the logits sets the tolerance.
    """
    scale = 1 + np.abs(logits).max()
    arguments = [tensor(logits, "float32", grad=True), tensor(targets)]
    answer = student("token_mean_loss", *arguments)
    value = answer.value
    need(is_tensor(value) and value["shape"] == [], f"{what}: no scalar tensor")
    loss, right = loss_and_grad(logits, targets)
    near(value, loss, f"{what}: the loss", 2e-6 * scale)
    got = answer.seen["grad"]
    if grad:
        need(got is not None, "no gradient reaches the logits")
        off = np.abs(np.array(got) - right).max()
        need(off < 2e-6 * scale, f"{what}: the gradient is off by {off:.2g}")
    return got


@check("masked_loss", 1, "the mean over tokens, in rows of different length")
def loss_tokens(student: Callable) -> None:
    loss_is(student, [[[0.0] * 4] * 2], [[2, 1]], "4 equally probable words")
    # probability 1/2 for the one token of row 0, and 1/8 for each of the three tokens of row 1
    logits = [[[0.0, math.log(2), 0.0]] * 3, [[0.0, 0.0, math.log(2 / 7)]] * 3]
    loss_is(student, logits, [[1, 0, 0], [2, 2, 2]], "rows of 1 and 3 tokens")
    targets = [[2, 3, 1], [4, 1, 0]]
    logits = random_logits(student.rng, targets, 5)
    loss_is(student, logits, targets, "one position of padding")
    wider = [[*row, *random_logits(student.rng, [[0] * 4], 5)[0]] for row in logits]
    loss_is(student, wider, [[*row, 0, 0, 0, 0] for row in targets], "more padding")


@check("masked_loss", 1, "a batch of nothing but padding has loss 0")
def loss_empty(student: Callable) -> None:
    grad = loss_is(student, [[[1.0, 2.0, 3.0]] * 2], [[0, 0]], "only padding")
    need(grad is None or not np.any(grad), "only padding: the gradient is not 0")  # nan is any


@check("masked_loss", 1, "large logits")
def loss_stable(student: Callable) -> None:
    loss_is(student, [[[1000.0, 0.0, 1000.0]]], [[2]], "logits of 1000")
    loss_is(student, [[[1000.0, 0.0, 0.0]]], [[1]], "logits of 1000")
    loss_is(student, [[[-1000.0, -1000.0, -3000.0]]], [[1]], "logits of -1000")


@check("masked_loss", 1, "the gradient")
def loss_gradient(student: Callable) -> None:
    targets = [[2, 1, 0], [3, 2, 1]]
    loss_is(student, random_logits(student.rng, targets, 4), targets, "random logits", grad=True)


# ---- Greedy decoding


class Scripted:
    """A model that is right only for the right prefix: it has a target for each source.

    After START and the target so far, the likeliest token is the target's next one, and 8 after its
    end. After any other prefix, or for another source, it is 9.
    """

    def __init__(self, rng: random.Random, lengths: list[int]) -> None:
        """A length is the number of tokens with END; a row of 0 never ends."""
        self.calls, self.grad, self.targets = 0, False, {}
        for length in lengths:
            target = [rng.randint(3, 7) for _ in range(length or 50)]
            if length:
                target[-1] = 1
            source = (5, 2, 7, 3, len(self.targets) + 2, rng.randint(2, 11))
            self.targets[source] = target

    def __call__(self, source: dict, decoder_input: dict, mode: dict) -> list:
        self.calls += 1
        self.grad |= mode["grad"]
        need(not mode["training"], "the model was called in training mode")
        logits = []
        rows = zip(int64(source, "source"), int64(decoder_input, "decoder_input"), strict=True)
        for row, read in rows:
            target = self.targets.get(tuple(row))
            known = [] if target is None else [0, *target, *[0] * len(read)]
            logits.append([])
            for t in range(len(read)):
                token = 9
                if read[: t + 1] == known[: t + 1]:
                    token = target[t] if t < len(target) else 8
                position = [-1.0003] * 12  # float32 tells it from -1, float16 does not
                position[token] = -1.0
                logits[-1].append(position)
        return logits

    def decode(
        self, student: Callable, longest: int, training: bool = False, grad: bool = True
    ) -> object:
        """The answer to these sources; its tokens and the number of calls are checked."""
        sources = tensor([list(source) for source in self.targets])
        model = make("model", training=training)
        answer = student("greedy_decode", model, sources, longest, answer=self, grad=grad)
        got = int64(answer.value, "the result")
        width = min(longest, max(map(len, self.targets.values())))
        shape = [len(self.targets), width]
        need(answer.value["shape"] == shape, f"of shape {answer.value['shape']}, not {shape}")
        for tokens, target in zip(got, self.targets.values(), strict=True):
            right = target[:width] + [0] * (width - len(target))
            pairs = zip(tokens, right, strict=True)
            wrong = [t for t, (a, b) in enumerate(pairs) if a != b]
            if wrong:
                start = wrong[0]
                need(start != 0, "the first token is wrong: is START alone what is read first?")
                need(start < len(target), "after END stands something else than PAD")
                raise WrongError(f"wrong from token {start} on: does it read START and all so far?")
        need(self.calls == width, f"the model was called {self.calls} times for {width} tokens")
        return answer


@check("greedy_decode", 2, "the likeliest token at each step, and PAD after END")
def decode_tokens(student: Callable) -> None:
    Scripted(student.rng, [3]).decode(student, 10)
    Scripted(student.rng, [5]).decode(student, 5)
    Scripted(student.rng, [3, 2, 6, 1, 4]).decode(student, 10)


@check("greedy_decode", 1, "stops when all rows have ended, or at the limit")
def decode_stops(student: Callable) -> None:
    Scripted(student.rng, [1]).decode(student, 10)
    Scripted(student.rng, [0, 2]).decode(student, 7)
    Scripted(student.rng, [3, 2]).decode(student, 40)


@check("greedy_decode", 1, "dropout is off")
def decode_dropout(student: Callable) -> None:
    Scripted(student.rng, [3, 5]).decode(student, 10, training=True)


@check("greedy_decode", 1, "the model is left in the mode in which it came")
def decode_mode(student: Callable) -> None:
    seen = Scripted(student.rng, [3]).decode(student, 10, training=True).seen
    need(seen["training"], "a model in training mode was left in another")
    seen = Scripted(student.rng, [3]).decode(student, 10).seen
    need(seen["eval"], "a model in eval mode was left in another")


@check("greedy_decode", 1, "no gradients while it decodes, and gradients on afterwards")
def decode_gradients(student: Callable) -> None:
    model = Scripted(student.rng, [3])
    seen = model.decode(student, 10).seen
    need(not model.grad, "the model was called with gradients on")
    need(seen["grad_enabled"], "gradients stay off afterwards, so training would stop")
    seen = Scripted(student.rng, [3]).decode(student, 10, grad=False).seen
    need(not seen["grad_enabled"], "gradients were off before, and are on afterwards")


# ---- BLEU and F1


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


def bleu_is(student: Callable, texts: list[tuple[str, str]], expected: float, what: str) -> None:
    pairs = [(hypothesis.split(), reference.split()) for hypothesis, reference in texts]
    hypotheses, references = (list(side) for side in zip(*pairs, strict=True))
    near(student("corpus_bleu", hypotheses, references).value, expected, f"{what}: BLEU")


@check("corpus_bleu", 2, "counts are pooled over the pairs")
def bleu_pooled(student: Callable) -> None:
    bleu_is(student, [("a b c d e", "a b c d e")], 100, "equal texts")
    pairs = [("a b c d", "a b c d"), ("e f g h i", "e f x h i")]
    pooled = (8 / 9 * 5 / 7 * 2 / 5 * 1 / 3) ** 0.25
    bleu_is(student, pairs, 100 * pooled, "two pairs")


@check("corpus_bleu", 1, "the brevity penalty, for the whole corpus")
def bleu_brevity(student: Callable) -> None:
    half = [("a b c d", "a b c d e f g h")]
    bleu_is(student, half, 100 * math.exp(-1), "half of the reference")
    longer = 100 * (4 / 6 * 3 / 5 * 2 / 4 * 1 / 3) ** 0.25  # no penalty, and no reward
    bleu_is(student, [("a b c d x y", "a b c d")], longer, "two words more than the reference")
    # 4 + 8 words against 6 + 6: one is short, the other long, the corpus is neither
    both = [("a b c d", "a b c d e f"), ("g h i j k l x y", "g h i j k l")]
    pooled = (10 / 12 * 8 / 10 * 6 / 8 * 4 / 6) ** 0.25
    bleu_is(student, both, 100 * pooled, "a short and a long text")
    three = [("a b c d", "a b c d"), ("e f g h i", "e f x h i"), ("q", "q r")]
    pooled = (9 / 10 * 5 / 7 * 2 / 5 * 1 / 3) ** 0.25
    bleu_is(student, three, 100 * pooled * math.exp(-1 / 10), "three pairs")


@check("corpus_bleu", 1, "matches are clipped, pair by pair")
def bleu_clipped(student: Callable) -> None:
    once = 100 * (4 / 5 * 3 / 4 * 2 / 3 * 1 / 2) ** 0.25  # the second "a" finds no other
    bleu_is(student, [("a a b c d", "a b c d e")], once, "a word twice that the reference has once")
    # the second reference has a word of the first hypothesis: it must not help it
    crossed = [("a b c d e", "a b c d x"), ("f g h i j", "f g h i e")]
    pooled = (8 / 10 * 6 / 8 * 4 / 6 * 2 / 4) ** 0.25
    bleu_is(student, crossed, 100 * pooled, "a word of the other reference")


@check("corpus_bleu", 2, 'smoothing "exp", orders without any n-gram, random texts')
def bleu_smoothing(student: Callable) -> None:
    smoothed = 100 * (4 / 5 * 2 / 4 * (1 / 2) / 3 * (1 / 4) / 2) ** 0.25
    bleu_is(student, [("e f g h i", "e f x h i")], smoothed, "no 3-gram")
    bleu_is(student, [("a b c d e", "v w x y z")], 0, "texts without a common word")
    bleu_is(student, [("a b c", "a b c")], 0, "no 4-grams at all")
    bleu_is(student, [("", "a b c d")], 0, "an empty text")
    with_empty = [("", "a b c d"), ("a b c d", "a b c d")]
    bleu_is(student, with_empty, 100 * math.exp(-1), "an empty text and an equal one")
    rng = student.rng
    words = ["a", "A", "ab", "b", "bc", "c", ",", "1"]  # "ab c" is not "a bc"
    for _ in range(8):
        pairs = []
        for _ in range(rng.randint(1, 9)):
            reference = rng.choices(words, k=rng.randint(4, 14))
            kept = [word if rng.random() < 0.8 else rng.choice(words) for word in reference]
            shorter = kept[: rng.randint(3, 14)] + rng.choices(words, k=rng.randint(0, 2))
            pairs.append((shorter, reference))
        got = student("corpus_bleu", [pair[0] for pair in pairs], [pair[1] for pair in pairs])
        near(got.value, bleu(pairs), f"a random corpus of {len(pairs)} pairs: BLEU")


def f1_is(student: Callable, gold: str, predicted: str, labels: str, expected: float) -> None:
    got = student("macro_f1", gold.split(), predicted.split(), labels.split()).value
    near(got, expected, f"labels {labels}; gold {gold}; predicted {predicted}: macro-F1")


@check("macro_f1", 1, "values worked out by hand; every label counts the same")
def f1_values(student: Callable) -> None:
    f1_is(student, "a b c", "a b c", "a b c", 100)
    f1_is(student, "a b", "b a", "a b", 0)
    f1_is(student, "go gone go", "go go gone", "go gone", 100 * (1 / 2 + 0) / 2)
    f1_is(student, "a A a", "A A a", "a A", 100 * (2 / 3 + 2 / 3) / 2)
    f1_is(student, "a a b b", "a b b b", "a b", 100 * (2 / 3 + 4 / 5) / 2)
    f1_is(student, "a a a a a a b b", "a a a a a a a b", "a b", 100 * (12 / 13 + 2 / 3) / 2)


@check("macro_f1", 1, "a label that never occurs, or is never predicted, still counts")
def f1_unseen(student: Callable) -> None:
    f1_is(student, "a a b c", "a a b c", "a b c d", 75)
    f1_is(student, "a a b", "a a a", "a b", 100 * (4 / 5 + 0) / 2)


@check("macro_f1", 1, "an invalid prediction is a miss, and no class")
def f1_invalid(student: Callable) -> None:
    f1_is(student, "a a b b", "a a b none", "a b", 100 * (1 + 2 / 3) / 2)
    f1_is(student, "a b", "none none", "a b", 0)
