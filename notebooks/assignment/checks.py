"""The checks of the grader: for each function of method.py a few, each of one concept.

A check calls the student's function on fixed inputs that tell the known wrong answers from the
right one, and on drawn inputs. Fixed answers are worked out by hand. A drawn input is built from
its answer, which is drawn first: so this file holds no solution.
"""

import math
import random
import types
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch


class WrongError(Exception):
    """A check does not hold; the text is the hint."""


@dataclass(frozen=True)
class Check:
    function: str  # of method.py
    points: int
    concept: str
    run: Callable


CHECKS: list[Check] = []


def check(function: str, points: int, concept: str) -> Callable:
    """A decorator: the function below it is a check, called with the module and a random.Random."""

    def register(run: Callable) -> Callable:
        CHECKS.append(Check(function, points, concept, run))
        return run

    return register


def hint_of(one: Check, student: types.ModuleType, seed: int) -> str:
    """What is wrong, in a line; empty if the check holds. Inputs are drawn from the seed."""
    torch.manual_seed(seed)
    torch.set_grad_enabled(True)  # whatever an earlier function has left
    try:
        one.run(student, random.Random(f"{seed} {one.function} {one.concept}"))
    except NotImplementedError:
        return "not written yet"
    except WrongError as error:
        hint = str(error)
    except (Exception, SystemExit) as error:
        line = 0
        trace = error.__traceback__
        while trace is not None:  # the last line that is in the student's file
            if trace.tb_frame.f_code.co_filename == student.__file__:
                line = trace.tb_lineno
            trace = trace.tb_next
        hint = f"raised {type(error).__name__} (line {line} of the file): {error}"
    else:
        return ""
    return " ".join(hint.split())[:300]


def need(holds: bool, hint: str) -> None:
    """Every comparison goes through here or through `near`."""
    if not holds:
        raise WrongError(hint)


def number(value: object, what: str) -> float:
    right = isinstance(value, (int, float, np.number, torch.Tensor, np.ndarray))
    need(right and not isinstance(value, bool), f"{what}: {type(value).__name__}, not a number")
    return float(value.detach() if isinstance(value, torch.Tensor) else value)


def near(value: object, expected: float, what: str, tolerance: float = 1e-4) -> None:
    """A number, within a tolerance that leaves room for float32 on scales to 100."""
    got = number(value, what)
    if math.isnan(expected):
        need(math.isnan(got), f"{what} is {got:.6g}, not nan")
        return
    need(not math.isnan(got), f"{what} is nan")
    side = "high" if got > expected else "low"
    need(abs(got - expected) <= tolerance, f"{what} is {got:.6g}, too {side}")


# ---- p_linear


def p_at(student: types.ModuleType, step: int, expected: float, *shape: float) -> None:
    """P at one step; shape: steps, warmup, ramp, cap."""
    steps, warmup, ramp, cap = shape
    what = f"P at step {step} of {steps} (warmup {warmup:g}, ramp {ramp:g}, cap {cap:g})"
    near(student.p_linear(step, steps, warmup, ramp, cap), expected, what)


@check("p_linear", 1, "a line from 0")
def linear_line(student: types.ModuleType, rng: random.Random) -> None:
    for step, expected in {0: 0, 1: 1 / 600, 150: 0.25, 300: 0.5, 450: 0.75}.items():
        p_at(student, step, expected, 1000, 0.0, 0.6, 1.0)
    hundredths = rng.randrange(1, 100)
    p_at(student, 3 * hundredths, hundredths / 100, 500, 0.0, 0.6, 1.0)


@check("p_linear", 1, "the warm-up")
def linear_warm_up(student: types.ModuleType, rng: random.Random) -> None:
    for step in (0, 1, 100, 199, 200):
        p_at(student, step, 0, 800, 0.25, 0.5, 1.0)
    for step, expected in {300: 0.25, 400: 0.5, 500: 0.75}.items():
        p_at(student, step, expected, 800, 0.25, 0.5, 1.0)
    p_at(student, 3, 1 / 3, 10, 0.25, 0.15, 1.0)  # i = 0.5 of n = 1.5


@check("p_linear", 1, "the slope does not depend on the cap")
def linear_slope(student: types.ModuleType, rng: random.Random) -> None:
    for step, expected in {40: 0.1, 100: 0.25, 199: 0.4975}.items():
        p_at(student, step, expected, 800, 0.0, 0.5, 0.5)


@check("p_linear", 1, "never above the cap, and the cap at the end")
def linear_cap(student: types.ModuleType, rng: random.Random) -> None:
    cap = rng.randrange(20, 80) / 100
    for step in range(0, 400, 13):
        p = number(student.p_linear(step, 800, 0.0, 0.5, cap), "P")
        need(p <= cap + 1e-9, f"P at step {step} of 800 (ramp 0.5, cap {cap}) is {p:.6g}")
    for step in (400, 401, 799):
        p_at(student, step, 0, 800, 0.0, 0.5, 0.0)
        p_at(student, step, cap, 800, 0.0, 0.5, cap)
        p_at(student, step, 1, 800, 0.0, 0.5, 1.0)


@check("p_linear", 1, "a ramp of length 0")
def linear_edges(student: types.ModuleType, rng: random.Random) -> None:
    for cap in (0.9, 1.0):
        for step in (0, 1, 700):  # as after a ramp that is shorter than an update
            after = number(student.p_linear(step + 1, 800, 0.0, 0.001, cap), "P")
            p_at(student, step, after, 800, 0.0, 0.0, cap)


# ---- flip_coins. A right answer is 5 standard deviations from failing: once in a million.


def coins_of(student: types.ModuleType, n: int, p: float, seed: int, batches: int) -> list:
    """The coins of so many calls with one generator."""
    generator = torch.Generator().manual_seed(seed)
    coins = []
    for _ in range(batches):
        coins.append(list(map(bool, student.flip_coins(n, p, generator))))
    return coins


@check("flip_coins", 1, "a list of n bools")
def coin_form(student: types.ModuleType, rng: random.Random) -> None:
    for n in (1, 2, 24, 64):
        coins = student.flip_coins(n, 0.5, torch.Generator().manual_seed(1))
        need(isinstance(coins, list), f"returned {type(coins).__name__}, not a list")
        need(len(coins) == n, f"{len(coins)} coins for {n} examples")
        for coin in coins:
            need(isinstance(coin, bool), f"a coin is of type {type(coin).__name__}, not bool")


@check("flip_coins", 2, "True with probability p")
def coin_share(student: types.ModuleType, rng: random.Random) -> None:
    calls = 1500  # with one example each, so that the coins of a batch do not matter here
    for p in (0.0, 0.11, 0.9, 1.0, rng.uniform(0.2, 0.45)):
        batches = coins_of(student, 1, p, rng.randrange(10**6), calls)
        share = sum(batch[0] for batch in batches) / calls
        sigma = math.sqrt(p * (1 - p) / calls)
        need(abs(share - p) <= 5 * sigma, f"p = {p:.2f}: {100 * share:.1f} % of coins are True")


@check("flip_coins", 2, "independent")
def coin_independent(student: types.ModuleType, rng: random.Random) -> None:
    n_batches = 400
    batches = coins_of(student, 16, 0.5, rng.randrange(10**6), n_batches)
    n = len(batches[0])
    squares = 0.0
    for batch in batches:
        squares += (sum(batch) - n / 2) ** 2
    ratio = squares / n_batches / (n / 4)  # 1 if independent, with standard deviation 0.07
    need(ratio > 0.65, "batches have too equal numbers of True")
    need(ratio < 1.35, "the coins of a batch depend on each other")


@check("flip_coins", 1, "all randomness from the generator")
def coin_generator(student: types.ModuleType, rng: random.Random) -> None:
    seed = rng.randrange(10**6)
    state = torch.get_rng_state()
    one = coins_of(student, 16, 0.5, seed, 64)
    need(torch.equal(state, torch.get_rng_state()), "the global random state of torch was used")
    need(one == coins_of(student, 16, 0.5, seed, 64), "the same seed gives other coins")
    need(one != coins_of(student, 16, 0.5, seed + 1, 64), "another seed gives the same coins")


# ---- mix_labels

LABELS = ["call 911", "see doctor", "home care", "wait"]
QUESTIONS = ["pain, note 1", "a cough", "a fever", "a rash, note 4", "vomiting", "a fall"]
GOLD = ["call 911", "see doctor", "home care", "call 911", "see doctor", "home care"]
OTHERS = ["see doctor", "wait", "call 911", "wait", "home care", "wait"]  # valid, and none is gold


class Mixed:
    """A call of mix_labels, where the model predicts `answers`."""

    def __init__(self, student: types.ModuleType, coins: list[bool], answers: list[str]) -> None:
        table = dict(zip(QUESTIONS, answers, strict=True))
        self.asked: list[str] = []

        def predict(questions: list[str]) -> list[str]:
            self.asked += questions
            need(set(questions) <= set(QUESTIONS), "predict was asked about another text")
            return [table[question] for question in questions]

        sent = [list(GOLD), list(QUESTIONS), list(LABELS), list(coins)]
        both = student.mix_labels(*sent, predict)
        need(isinstance(both, tuple) and len(both) == 2, "does not return (labels, counts)")
        self.given, self.counts = both
        need(len(self.given) == 6, f"{len(self.given)} labels for 6 prompts")
        self.unchanged = sent == [GOLD, QUESTIONS, LABELS, list(coins)]

    def count_is(self, name: str, expected: int, what: str) -> None:
        need(name in self.counts, f"the counts lack {name}")
        near(self.counts[name], expected, f"{what}: {name}")


@check("mix_labels", 3, "the example's own prediction where the coin is True, else gold")
def mix_values(student: types.ModuleType, rng: random.Random) -> None:
    drawn = [rng.random() < 0.5 for _ in range(6)]
    for coins in ([False] * 6, [True] * 6, [False, True, False, True, True, False], drawn):
        given = Mixed(student, coins, OTHERS).given
        for i, coin in enumerate(coins):
            wanted = OTHERS[i] if coin else GOLD[i]
            need(given[i] == wanted, f"coin {coin} of example {i}: the prompt shows {given[i]!r}")


@check("mix_labels", 2, "an invalid prediction never enters a prompt, and is counted")
def mix_invalid(student: types.ModuleType, rng: random.Random) -> None:
    invalid = ["", "see_doctor", "Home care", "call 911 ", "see doctor, home care", "home"]
    rng.shuffle(invalid)
    mixed = Mixed(student, [True] * 6, invalid)
    for i, label in enumerate(mixed.given):
        need(label == GOLD[i], f"predicted {invalid[i]!r}: the prompt shows {label!r}")
    mixed.count_is("invalid_predicted", 6, "six invalid predictions")
    mixed.count_is("used_predicted", 0, "six invalid predictions")
    # "wait" is valid, though no example of the batch has it as its gold label
    mixed = Mixed(student, [True] * 6, ["wait", *invalid[1:]])
    need("wait" in mixed.given, "a valid prediction did not enter the prompt")


@check("mix_labels", 2, "predicts only where a coin is True")
def mix_economy(student: types.ModuleType, rng: random.Random) -> None:
    for true in ([], [rng.randrange(6)], [0, 1, 4]):
        coins = [i in true for i in range(6)]
        asked = Mixed(student, coins, OTHERS).asked
        hint = f"{len(true)} coins are True, and predict was asked about {len(asked)} questions"
        need(sorted(asked) == sorted(QUESTIONS[i] for i in true), hint)


@check("mix_labels", 2, "the counts")
def mix_counts(student: types.ModuleType, rng: random.Random) -> None:
    half_right = [GOLD[0], OTHERS[1], GOLD[2], OTHERS[3], GOLD[4], OTHERS[5]]
    cases = [
        ([False] * 6, OTHERS, 0, 0),
        ([True] * 6, OTHERS, 6, 6),
        ([True] * 6, GOLD, 6, 0),
        ([True] * 6, half_right, 6, 3),
        ([True, True, False, False, True, False], half_right, 3, 1),
    ]
    for coins, answers, used, wrong in cases:
        mixed = Mixed(student, coins, answers)
        what = f"{sum(coins)} coins are True, {wrong} of these predictions are wrong"
        mixed.count_is("used_predicted", used, what)
        mixed.count_is("wrong_predicted", wrong, what)


@check("mix_labels", 1, "the gold labels stay as they are")
def mix_unchanged(student: types.ModuleType, rng: random.Random) -> None:
    need(Mixed(student, [True] * 6, OTHERS).unchanged, "an argument was changed in place")


# ---- explain_prompts, stage2_loss


@check("explain_prompts", 1, "given label: {label}, explain: {question}")
def prompt_texts(student: types.ModuleType, rng: random.Random) -> None:
    labels = ["Call 911", "see doctor", "a_b ", f"w{rng.randrange(1000)}"]
    questions = ["A man has had a cough. " * 9, "  two spaces", "a, b:\nc", "Is it?"]
    prompts = student.explain_prompts(list(labels), list(questions))
    need(isinstance(prompts, list) and len(prompts) == 4, "does not return a prompt per question")
    for i in range(4):
        wanted = "given label: " + labels[i] + ", explain: " + questions[i]
        need(prompts[i] == wanted, f"{prompts[i]!r:.80} is not the prompt of this question")


RATIONALES = ["Shock. Call 911.", "Two weeks.", "Mild.", "Seizure. At once.", "A flag.", "Small."]


class Loss:
    """A call of stage2_loss. Its token_loss gives 2 for labels as targets, 10 for rationales."""

    def __init__(self, student: types.ModuleType, given: list[str], alpha: float) -> None:
        self.calls: list[tuple[list[str], list[str]]] = []
        self.leaves = {"labels": torch.tensor(2.0), "rationales": torch.tensor(10.0)}
        for leaf in self.leaves.values():
            leaf.requires_grad_()

        def token_loss(prompts: list[str], targets: list[str]) -> torch.Tensor:
            self.calls.append((list(prompts), list(targets)))
            name = "rationales" if set(targets) & set(RATIONALES) else "labels"
            return self.leaves[name] * 1

        texts = [list(QUESTIONS), list(GOLD), list(given), list(RATIONALES)]
        self.loss = student.stage2_loss(token_loss, *texts, alpha)

    def task_is(self, prompts: list[list[str]], targets: list[str], rationales: bool) -> None:
        """The one call of the task: its pairs, where any of several lists of prompts is right."""
        calls = [call for call in self.calls if bool(set(call[1]) & set(RATIONALES)) == rationales]
        task = "rationales" if rationales else "labels"
        need(len(calls) == 1, f"token_loss was called {len(calls)} times with {task} as targets")
        need(sorted(calls[0][1]) == sorted(targets), f"the {task} are not the right targets")
        pairs = sorted(zip(*calls[0], strict=True))
        right = any(sorted(zip(wanted, targets, strict=True)) == pairs for wanted in prompts)
        need(right, f"the targets are {task}, and a prompt is {calls[0][0][0]!r:.70}")


@check("stage2_loss", 3, "the label task: its prompts and targets")
def loss_labels(student: types.ModuleType, rng: random.Random) -> None:
    prompts = ["predict: " + question for question in QUESTIONS]
    Loss(student, OTHERS, 0.7).task_is([prompts], GOLD, rationales=False)


@check("stage2_loss", 4, "the explain task: its prompts and targets")
def loss_rationales(student: types.ModuleType, rng: random.Random) -> None:
    wanted = []
    for label, question in zip(OTHERS, QUESTIONS, strict=True):
        wanted.append("given label: " + label + ", explain: " + question)
    allowed = [wanted]
    try:  # a mistake in explain_prompts costs points there, and not here again
        allowed.append(student.explain_prompts(list(OTHERS), list(QUESTIONS)))
    except Exception:
        pass
    Loss(student, OTHERS, 0.7).task_is(allowed, RATIONALES, rationales=True)


@check("stage2_loss", 3, "the weights")
def loss_weights(student: types.ModuleType, rng: random.Random) -> None:
    for alpha, expected in {0.0: 10, 1.0: 2, 0.25: 8, 0.7: 4.4}.items():
        near(Loss(student, GOLD, alpha).loss, expected, f"losses 2 and 10, alpha {alpha}: L")


@check("stage2_loss", 1, "gradients of both tasks")
def loss_gradients(student: types.ModuleType, rng: random.Random) -> None:
    loss = Loss(student, GOLD, 0.3)
    need(isinstance(loss.loss, torch.Tensor), f"returned {type(loss.loss).__name__}, not a tensor")
    need(loss.loss.requires_grad, "no gradient flows back")
    loss.loss.backward()
    for name, leaf in loss.leaves.items():
        need(leaf.grad is not None, f"no gradient reaches the loss of the {name}")


# ---- dose, exposure_gap


def log_lines(wrong: list[int], prompts: list[int], stage1: int = 0) -> list[dict]:
    """Updates of both stages, as in log.jsonl."""
    lines = []
    for step in range(stage1):
        lines.append({"stage": 1, "step": step, "loss": 2.0, "loss_explain": 2.0})
    for step, n in enumerate(wrong):
        line = {"stage": 2, "step": step, "prompts": prompts[step], "loss": 1.5}
        lines.append(line | {"used_predicted": n + 1, "wrong_predicted": n, "p_predicted": 0.5})
    return lines


@check("dose", 2, "a share of all prompts")
def dose_values(student: types.ModuleType, rng: random.Random) -> None:
    near(student.dose(log_lines([0, 2, 4], [8, 8, 8])), 25, "6 wrong labels in 24 prompts: dose")
    near(student.dose(log_lines([1, 0], [4, 16])), 5, "1 wrong label in 4 and 16 prompts: dose")
    near(student.dose(log_lines([0, 0], [8, 8])), 0, "no wrong label: dose")
    total = rng.randrange(40, 200)
    wrong = [0] * 10
    for _ in range(total):
        wrong[rng.randrange(10)] += 1
    lines = log_lines(wrong, [400, 600] * 5)  # 5000 prompts
    near(student.dose(lines), total / 50, f"{total} wrong labels in 5000 prompts: dose")


@check("dose", 1, "stage 1 does not count")
def dose_stage(student: types.ModuleType, rng: random.Random) -> None:
    lines = log_lines([2, 2, 2], [8, 8, 8], stage1=rng.randrange(3, 20))
    near(student.dose(lines), 25, "6 wrong labels in 24 prompts, after a stage 1: dose")


@check("dose", 1, "without stage 2")
def dose_none(student: types.ModuleType, rng: random.Random) -> None:
    near(student.dose([]), math.nan, "an empty log: dose")


@check("exposure_gap", 2, "its size and sign")
def gap_values(student: types.ModuleType, rng: random.Random) -> None:
    def mean(rows: np.ndarray) -> float:
        return float(rows.mean())

    drawn = rng.uniform(-20, 20)
    own = np.array([rng.uniform(20, 80) for _ in range(9)])
    cases = {5: ([90, 80, 70, 60], [80, 80, 65, 55]), -10: ([60, 70], [70, 80])}
    cases[10] = ([90, 10], [20, 60])
    cases[drawn] = (own + drawn, own)
    for gap, (one, two) in cases.items():
        rows = np.array(one, dtype=float), np.array(two, dtype=float)
        near(student.exposure_gap(mean, *rows), gap, f"gold {one}, own {two}, mean: the gap")


@check("exposure_gap", 1, "a score that is no mean over notes")
def gap_median(student: types.ModuleType, rng: random.Random) -> None:
    def median(rows: np.ndarray) -> float:
        return float(np.median(rows))

    rows = np.array([10.0, 20.0, 90.0]), np.array([5.0, 30.0, 31.0])
    near(student.exposure_gap(median, *rows), -10, "medians 20 and 30: the gap")


# ---- gap_interval


class Bootstrap:
    """A call of gap_interval on 12 rows that know their note; the statistic records its calls."""

    def __init__(self, student: types.ModuleType, seed: int) -> None:
        self.notes: dict[str, list] = {"gold": [], "own": []}  # of each call, the notes drawn
        self.scores: dict[str, list] = {"gold": [], "own": []}
        values = [-4.0, 3, 0, 5, -2, 1, 6, -5, 2, -1, 4, -3]
        gold = np.array([[0, note, value] for note, value in enumerate(values)])
        own = np.array([[1, note, value / 2] for note, value in enumerate(values)])

        def statistic(rows: np.ndarray) -> float:
            name = "own" if rows[0, 0] else "gold"
            # Skewed: an interval of a mean and standard deviations is far from the percentiles.
            score = math.exp(rows[:, 2].mean())
            drawn = rows[:, 1].tolist()
            if drawn != list(range(12)):  # the gap of all notes is no draw
                self.notes[name].append(drawn)
                self.scores[name].append(score)
            return score

        rng = np.random.default_rng(seed)
        ends = student.gap_interval(statistic, gold, own, rng)
        need(len(ends) == 2, "does not return (low, high)")
        self.low, self.high = (number(end, "an end of the interval") for end in ends)


@check("gap_interval", 2, "1000 draws of n notes with replacement")
def interval_draws(student: types.ModuleType, rng: random.Random) -> None:
    drawn = Bootstrap(student, rng.randrange(10**6)).notes["gold"]
    need(len(drawn) >= 1000, f"the statistic was called for {len(drawn)} draws")
    need(all(len(notes) == 12 for notes in drawn), "a draw from 12 notes has another number")
    repeated = sum(len(set(notes)) < 12 for notes in drawn)
    need(repeated > 900, "draws without replacement")  # 99.995 % of right draws repeat a note
    need(set().union(*drawn) == set(range(12)), "some notes are never drawn")


@check("gap_interval", 4, "paired: both rows of a note are drawn together")
def interval_paired(student: types.ModuleType, rng: random.Random) -> None:
    notes = Bootstrap(student, rng.randrange(10**6)).notes
    need(len(notes["gold"]) > 0, "no draw was made from gold")
    hint = f"{len(notes['gold'])} draws from gold, {len(notes['own'])} from own"
    need(len(notes["gold"]) == len(notes["own"]), hint)
    for one, two in zip(notes["gold"], notes["own"], strict=True):
        need(sorted(one) == sorted(two), "the notes drawn from own are others than those from gold")


@check("gap_interval", 3, "from the 2.5th to the 97.5th percentile of the gaps")
def interval_ends(student: types.ModuleType, rng: random.Random) -> None:
    one = Bootstrap(student, rng.randrange(10**6))
    pairs = min(len(one.scores["gold"]), len(one.scores["own"]))
    need(pairs > 100, f"the statistic was called for {pairs} draws of both")
    gaps = np.sort(np.array(one.scores["gold"][:pairs]) - np.array(one.scores["own"][:pairs]))
    for end, percent in ((one.low, 2.5), (one.high, 97.5)):
        place = percent / 100 * (pairs - 1)
        lowest, highest = gaps[math.floor(place) - 1], gaps[math.ceil(place) + 1]
        what = f"the {percent}th percentile"
        need(end >= lowest - 1e-9, f"{end:.4g} is below {what} of the gaps of these draws")
        need(end <= highest + 1e-9, f"{end:.4g} is above {what} of the gaps of these draws")


@check("gap_interval", 1, "all randomness from rng")
def interval_rng(student: types.ModuleType, rng: random.Random) -> None:
    seed = rng.randrange(10**6)
    one, two, other = (Bootstrap(student, s).notes["gold"] for s in (seed, seed, seed + 1))
    need(len(one) > 0 and one == two, "the same rng gives other draws")
    need(one != other, "another rng gives the same draws")


# ---- following


def following_is(
    student: types.ModuleType, flipped: str, predicted: str, argued: str, expected: float
) -> None:
    """A letter stands for a label, "-" for None."""
    names = {"a": "see doctor", "b": "doctor", "c": "Doctor", "d": "see", "-": None}
    columns = []
    for letters in (flipped, predicted, argued):
        columns.append([names[letter] for letter in letters])
    what = f"flipped {flipped}, predicted {predicted}, argued {argued} (- is None): following"
    near(student.following(*columns), expected, what)


@check("following", 2, "the share that argues for the flipped label")
def following_values(student: types.ModuleType, rng: random.Random) -> None:
    following_is(student, "aabb", "bbaa", "bbaa", 0)
    following_is(student, "abcd", "bcda", "adcb", 50)
    following_is(student, "abc", "cab", "bbb", 100 / 3)
    rows = ["aba"] * rng.randrange(1, 9)  # these follow
    share = 100 * len(rows) / 20
    rows += [rng.choice(["abb", "acd", "abd"]) for _ in range(20 - len(rows))]
    rng.shuffle(rows)
    following_is(student, *map("".join, zip(*rows, strict=True)), share)


@check("following", 3, "notes whose flipped label is the predicted one are left out")
def following_chance(student: types.ModuleType, rng: random.Random) -> None:
    following_is(student, "aabb", "abba", "abbb", 50)  # the first and the third are left out
    following_is(student, "aaaa", "aaab", "aaac", 0)
    following_is(student, "abab", "abaa", "cbcb", 100)


@check("following", 1, "None does not follow; no note is left")
def following_none(student: types.ModuleType, rng: random.Random) -> None:
    following_is(student, "aabb", "bbaa", "a-b-", 50)
    following_is(student, "", "", "", math.nan)
    # Who leaves nothing out has 100 here, and loses the points above for it, not these.
    share = number(student.following(["a"], ["a"], ["a"]), "following")
    need(math.isnan(share) or share == 100, f"no note is left: following is {share:.6g}, not nan")


# ---- shift_right, greedy_decode, error_by_position


def int64(value: object) -> torch.Tensor:
    need(isinstance(value, torch.Tensor), f"returned {type(value).__name__}, not a tensor")
    need(value.dtype == torch.int64, f"returned {value.dtype}, not int64")
    return value


@check("shift_right", 2, "the token before, and START first")
def shift_values(student: types.ModuleType, rng: random.Random) -> None:
    word = rng.randrange(2, 9999)
    table = [
        ([[5, 6, 7, 1]], [[0, 5, 6, 7]]),
        ([[9, word, 8, 1], [4, 1, 0, 0]], [[0, 9, word, 8], [0, 4, 1, 0]]),
        ([[3]], [[0]]),
    ]
    for targets, expected in table:
        got = int64(student.shift_right(torch.tensor(targets))).tolist()
        need(got == expected, f"targets {targets} become {got}")


@check("shift_right", 1, "the targets stay as they are")
def shift_unchanged(student: types.ModuleType, rng: random.Random) -> None:
    targets = torch.tensor([[5, 6, 1], [4, 1, 0]])
    student.shift_right(targets)
    need(targets.tolist() == [[5, 6, 1], [4, 1, 0]], "the targets were changed in place")


class Script:
    """A model that has a text for each row. After START and the text so far, the likeliest token
    is the text's next one; after the end of a text it is 8; after any other prefix it is 9."""

    def __init__(self, rng: random.Random, lengths: list[int]) -> None:
        """A length is the number of tokens with END; a text of length 0 never ends."""
        self.calls = 0
        self.texts = []
        for length in lengths:
            text = [rng.randint(3, 7) for _ in range(length or 50)]
            if length:
                text[-1] = 1
            self.texts.append(text)

    def next_logits(self, prefix: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        rows = int64(prefix).tolist()
        need(len(rows) == len(self.texts), f"{len(rows)} rows are read, not {len(self.texts)}")
        logits = torch.full((len(rows), 12), -1.01)  # so close to the best that drawing fails
        for row, text, scores in zip(rows, self.texts, logits, strict=True):
            read = len(row) - 1
            token = 9
            if read >= len(text):
                token = 8
            elif row == [0, *text[:read]]:
                token = text[read]
            scores[token] = -1.0
        return logits

    def decode(self, student: types.ModuleType, longest: int) -> list[list[int]]:
        tokens = int64(student.greedy_decode(self.next_logits, len(self.texts), longest))
        need(len(tokens) == len(self.texts), f"{len(tokens)} rows, not {len(self.texts)}")
        return tokens.tolist()


@check("greedy_decode", 3, "the likeliest token after START and all that was written so far")
def decode_tokens(student: types.ModuleType, rng: random.Random) -> None:
    for length in (2, 7, 12):
        script = Script(rng, [length] * 3)
        rows = script.decode(student, length + 3)
        for row, text in zip(rows, script.texts, strict=True):
            need(row[:length] == text, f"the model writes {text}; decoded {row[:length]}")


@check("greedy_decode", 2, "PAD after END")
def decode_padding(student: types.ModuleType, rng: random.Random) -> None:
    script = Script(rng, [3, 8, 1, 5])
    rows = script.decode(student, 10)
    for row, text in zip(rows, script.texts, strict=True):
        rest = row[len(text) :]
        need(not any(rest), f"after END stands {rest}")


@check("greedy_decode", 1, "stops when all rows have ended, or at the limit")
def decode_stops(student: types.ModuleType, rng: random.Random) -> None:
    for lengths, limit, calls in (([3, 2], 40, 3), ([0, 2], 7, 7), ([4], 4, 4), ([1], 9, 1)):
        script = Script(rng, lengths)
        width = len(script.decode(student, limit)[0])
        need(script.calls == calls, f"the model was called {script.calls} times for {calls} tokens")
        need(width == calls, f"{width} tokens from {calls} calls")


def errors_are(
    student: types.ModuleType, tokens: list, targets: list, expected: list[float]
) -> None:
    got = student.error_by_position(torch.tensor(tokens), torch.tensor(targets))
    need(isinstance(got, list), f"returned {type(got).__name__}, not a list")
    need(len(got) == len(expected), f"{len(got)} numbers for {len(expected)} positions")
    for t, share in enumerate(expected):
        near(got[t], share, f"tokens {tokens}, targets {targets}: the error at position {t}")


@check("error_by_position", 2, "the share of wrong tokens at each position")
def error_values(student: types.ModuleType, rng: random.Random) -> None:
    targets = [[5, 6, 1], [5, 7, 1], [4, 6, 1], [3, 6, 1]]
    tokens = [[5, 6, 1], [5, 6, 1], [5, 6, 1], [5, 6, 8]]
    errors_are(student, tokens, targets, [50, 25, 25])
    wrong = rng.sample(range(8), 3)
    targets = [[4, 5, 6, 7]] * 8
    tokens = [list(row) for row in targets]
    for row in wrong:
        tokens[row][2] = 9
    errors_are(student, tokens, targets, [0, 0, 37.5, 0])


@check("error_by_position", 3, "padding of the targets does not count")
def error_padding(student: types.ModuleType, rng: random.Random) -> None:
    # Row 0 ends after 2 tokens; what the model writes after that is no error. Row 1 ends too early.
    targets = [[5, 1, 0, 0], [4, 6, 7, 1], [3, 6, 1, 0], [3, 6, 7, 1]]
    tokens = [[5, 1, 9, 9], [4, 1, 0, 0], [3, 6, 1, 0], [3, 6, 7, 1]]
    errors_are(student, tokens, targets, [0, 25, 100 / 3, 50])
