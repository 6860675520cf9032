# ruff: noqa: E501
"""Answers to the assignment: right ones in three styles, and wrong ones with what they must lose.

    python tests/answers.py plain > method.py     a right answer
    python tests/answers.py --seeds 100           grade all of them with so many seeds (minutes)

Students: this file holds solutions.
"""

import random
import sys
import types
from pathlib import Path

IMPORTS = """
import collections
import math
import numpy as np
import torch
import torch.nn.functional as F
"""

# Each style solves all problems, in the order of method.py; functions are apart by blank lines.
PLAIN = """
def p_linear(step, steps, warmup, ramp, cap):
    i = step - warmup * steps
    n = ramp * steps
    if i < 0:
        return 0.0
    if i >= n:
        return cap
    return min(cap, i / n)

def flip_coins(n, p, generator):
    return (torch.rand(n, generator=generator) < p).tolist()

def mix_labels(gold, questions, labels, coins, predict):
    given = list(gold)
    counts = {"used_predicted": 0, "wrong_predicted": 0, "invalid_predicted": 0}
    chosen = [i for i, coin in enumerate(coins) if coin]
    for i, label in zip(chosen, predict([questions[i] for i in chosen])):
        if label in labels:
            counts["used_predicted"] += 1
            counts["wrong_predicted"] += int(label != gold[i])
            given[i] = label
        else:
            counts["invalid_predicted"] += 1
    return given, counts

def explain_prompts(labels, questions):
    return [f"given label: {label}, explain: {question}" for label, question in zip(labels, questions)]

def stage2_loss(token_loss, questions, gold, given, rationales, alpha):
    loss_predict = token_loss([f"predict: {question}" for question in questions], gold)
    loss_explain = token_loss(explain_prompts(given, questions), rationales)
    return alpha * loss_predict + (1 - alpha) * loss_explain

def dose(log):
    updates = [line for line in log if line["stage"] == 2]
    wrong = sum(line["wrong_predicted"] for line in updates)
    prompts = sum(line["prompts"] for line in updates)
    return 100 * wrong / prompts if updates else math.nan

def exposure_gap(statistic, gold, own):
    return statistic(gold) - statistic(own)

def gap_interval(statistic, gold, own, rng):
    gaps = []
    for _ in range(1000):
        drawn = rng.integers(0, len(gold), len(gold))
        gaps.append(statistic(gold[drawn]) - statistic(own[drawn]))
    low, high = np.percentile(gaps, [2.5, 97.5])
    return float(low), float(high)

def following(flipped, predicted, argued):
    rows = [a == f for f, p, a in zip(flipped, predicted, argued) if f != p]
    return 100 * (sum(rows) / len(rows)) if rows else math.nan

def shift_right(targets):
    return F.pad(targets[:, :-1], (1, 0))

def greedy_decode(next_logits, rows, max_new_tokens):
    tokens = torch.zeros(rows, 1, dtype=torch.long)
    done = torch.zeros(rows, dtype=torch.bool)
    while tokens.shape[1] <= max_new_tokens and not done.all():
        new = next_logits(tokens).argmax(-1)
        new = new.masked_fill(done, 0)
        tokens = torch.cat([tokens, new[:, None]], 1)
        done = done | (new == 1)
    return tokens[:, 1:]

def error_by_position(tokens, targets):
    real = targets != 0
    wrong = (tokens != targets) & real
    return (100 * wrong.sum(0) / real.sum(0)).tolist()
"""

LOOPS = """
def p_linear(step, steps, warmup, ramp, cap):
    start = warmup * steps
    end = start + ramp * steps
    if step < start: return 0
    if step >= end: return cap
    p = (step - start) / (end - start)
    if p > cap: p = cap
    return p

def flip_coins(n, p, generator):
    coins = []
    for _ in range(n):
        coins.append(torch.rand(1, generator=generator).item() < p)
    return coins

def mix_labels(gold, questions, labels, coins, predict):
    given = []
    used = wrong = invalid = 0
    for right, question, coin in zip(gold, questions, coins):
        label = right
        if coin:
            label = predict([question])[0]
            if label not in labels:
                invalid += 1
                label = right
            else:
                used += 1
                if label != right: wrong += 1
        given.append(label)
    return given, dict(invalid_predicted=invalid, wrong_predicted=wrong, used_predicted=used)

def explain_prompts(labels, questions):
    prompts = []
    for i in range(len(labels)):
        prompts.append("given label: " + labels[i] + ", explain: " + questions[i])
    return prompts

def stage2_loss(token_loss, questions, gold, given, rationales, alpha):
    explain = []
    predict = []
    for label, question in zip(given, questions):
        explain.append(f"given label: {label}, explain: {question}")
        predict.append("predict: " + question)
    loss = (1 - alpha) * token_loss(explain, rationales)
    loss += alpha * token_loss(predict, gold)
    return loss

def dose(log):
    wrong = 0
    prompts = 0
    for line in log:
        if line["stage"] == 2:
            wrong += line["wrong_predicted"]
            prompts += line["prompts"]
    if prompts == 0: return float("nan")
    return wrong / prompts * 100

def exposure_gap(statistic, gold, own):
    return float(statistic(gold)) + -1 * float(statistic(own))

def gap_interval(statistic, gold, own, rng):
    n = len(gold)
    gaps = []
    for _ in range(1000):
        drawn = []
        for _ in range(n):
            drawn.append(int(rng.random() * n))
        gaps.append(exposure_gap(statistic, gold[drawn], own[drawn]))
    gaps.sort()
    return gaps[25], gaps[974]

def following(flipped, predicted, argued):
    followed = asked = 0
    for i in range(len(flipped)):
        if flipped[i] == predicted[i]: continue
        asked += 1
        if argued[i] == flipped[i]: followed += 1
    if asked == 0: return math.nan
    return followed / asked * 100

def shift_right(targets):
    rows = []
    for row in targets.tolist():
        rows.append([0] + row[:-1])
    return torch.tensor(rows)

def greedy_decode(next_logits, rows, max_new_tokens):
    texts = [[0] for _ in range(rows)]
    for _ in range(max_new_tokens):
        if all(1 in text for text in texts): break
        logits = next_logits(torch.tensor(texts))
        for b, text in enumerate(texts):
            text.append(0 if 1 in text else int(logits[b].argmax()))
    return torch.tensor(texts)[:, 1:]

def error_by_position(tokens, targets):
    errors = []
    for t in range(targets.shape[1]):
        wrong = count = 0
        for b in range(targets.shape[0]):
            if targets[b, t] != 0:
                count += 1
                if tokens[b, t] != targets[b, t]: wrong += 1
        errors.append(100 * wrong / count)
    return errors
"""

NUMPY = """
def p_linear(step, steps, warmup, ramp, cap):
    i = np.float64(step) - np.float64(warmup) * steps
    n = np.float64(ramp) * steps
    if i < 0: return np.float64(0)
    return torch.tensor(cap, dtype=torch.float64) if i >= n else np.clip(i / n, 0, cap)

def flip_coins(n, p, generator):
    coins = torch.empty(n, dtype=torch.float64)
    coins.fill_(p)
    return [bool(coin) for coin in torch.bernoulli(coins, generator=generator)]

def mix_labels(gold, questions, labels, coins, predict):
    coins = np.array(coins, dtype=bool)
    given = np.array(gold, dtype=object)
    backwards = np.flatnonzero(coins)[::-1]
    own = predict([questions[i] for i in backwards]) if len(backwards) else []
    counts = collections.Counter(used_predicted=0, wrong_predicted=0, invalid_predicted=0)
    for i, label in zip(backwards, own):
        valid = label in set(labels)
        counts["used_predicted"] += valid
        counts["invalid_predicted"] += not valid
        counts["wrong_predicted"] += valid and label != gold[i]
        if valid:
            given[i] = label
    return given.tolist(), counts

def explain_prompts(labels, questions):
    template = "given label: {}, explain: {}"
    return list(map(template.format, labels, questions))

def stage2_loss(token_loss, questions, gold, given, rationales, alpha):
    tasks = [(list(map("predict: {}".format, questions)), gold), (explain_prompts(given, questions), rationales)]
    losses = torch.stack([token_loss(*task) for task in tasks])
    return losses @ torch.tensor([alpha, 1 - alpha])

def dose(log):
    rows = np.array([(line["wrong_predicted"], line["prompts"]) for line in log if line["stage"] > 1])
    return 100 * np.divide(*rows.sum(0)) if len(rows) else np.nan

def exposure_gap(statistic, gold, own):
    return np.subtract(statistic(gold), statistic(own))

def gap_interval(statistic, gold, own, rng):
    both = np.stack([gold, own], axis=1)
    gaps = np.empty(1000)
    for i in range(1000):
        drawn = rng.choice(both, len(both), axis=0)
        gaps[i] = statistic(drawn[:, 0]) - statistic(drawn[:, 1])
    return tuple(np.quantile(gaps, (0.025, 0.975)))

def following(flipped, predicted, argued):
    flipped, predicted = np.array(flipped, dtype=object), np.array(predicted, dtype=object)
    asked = flipped != predicted
    if not asked.any(): return math.nan
    return 100 * np.mean((np.array(argued, dtype=object) == flipped)[asked])

def shift_right(targets):
    read = targets.clone()
    read[:, 1:] = targets[:, :-1]
    read[:, 0] = 0
    return read

def greedy_decode(next_logits, rows, max_new_tokens):
    out = torch.zeros(rows, max_new_tokens + 1, dtype=torch.int64)
    alive = torch.ones(rows, dtype=torch.bool)
    t = 0
    while t < max_new_tokens and alive.any():
        out[:, t + 1] = next_logits(out[:, : t + 1]).max(dim=-1).indices * alive
        t += 1
        alive &= out[:, t] != 1
    return out[:, 1 : t + 1]

def error_by_position(tokens, targets):
    tokens, targets = tokens.numpy(), np.ma.masked_equal(targets.numpy(), 0)
    return [float(share) for share in 100 * (tokens != targets).mean(axis=0)]
"""

RIGHT = {"plain": PLAIN, "loops": LOOPS, "numpy": NUMPY}

DRAWN = "rng.integers(0, len(gold), len(gold))"
GAP = "statistic(gold[drawn]) - statistic(own[drawn])"
ENDS = "low, high = np.percentile(gaps, [2.5, 97.5])"
# Function -> wrong answers: name, a piece of the plain answer, what stands in its place, and which
# of the function's checks (0 is its first) it must fail; it must pass the others.
WRONG = {
    "p_linear": [
        ("no warm-up", "step - warmup * steps", "step", "1"),
        ("a warm-up of whole updates", "step - warmup * steps", "step - int(warmup * steps)", "1"),
        ("slope cap / n", "min(cap, i / n)", "cap * i / n", "2"),
        ("no cap on the ramp", "min(cap, i / n)", "i / n", "3"),
        ("goes on after the ramp", "return cap", "return i / n", "34"),
        ("1 - P", "min(cap, i / n)", "1 - min(cap, i / n)", "0123"),
        ("n of all updates", "n = ramp * steps", "n = steps", "01234"),
        ("divides by a ramp of length 0", "if i >= n:", "if i > n:", "4"),
    ],
    "flip_coins": [
        ("inverted", "< p", ">= p", "1"),
        ("tenths", "torch.rand(n, generator=generator) < p", "torch.randint(0, 10, (n,), generator=generator) < 10 * p", "1"),
        ("from the global generator", "(n, generator=generator)", "(n)", "3"),
        ("the same in each batch", "    return", "    generator.manual_seed(1)\n    return", "123"),
        ("one for all", ".tolist()", "[:1].tolist() * n", "2"),
        ("exactly n p", "torch.rand(n, generator=generator) < p", "torch.randperm(n, generator=generator) + torch.rand(1, generator=generator) < n * p", "2"),
        ("pairs of neighbours", ".tolist()", ".repeat_interleave(2)[:n].tolist()", "2"),
        ("a tensor", ".tolist()", "", "0"),
    ],
    "mix_labels": [
        ("gold always", "given[i] = label", "pass", "01"),
        ("coin inverted", "if coin]", "if not coin]", "0123"),
        ("labels of other examples", "zip(chosen, ", "zip(chosen[::-1], ", "03"),
        ("invalid labels enter", "if label in labels", "if True", "1"),
        ("predicts for all", "predict([questions[i] for i in chosen])", "[predict(questions)[i] for i in chosen]", "2"),
        ("predicts twice", "    chosen =", "    predict([questions[i] for i, coin in enumerate(coins) if coin])\n    chosen =", "2"),
        ("counts all as wrong", "int(label != gold[i])", "1", "3"),
        ("in place", "list(gold)", "gold", "4"),
    ],
    "explain_prompts": [
        ("no comma", "{label}, explain", "{label} explain", "0"),
        ("the other way round", "in zip(labels, questions)", "in zip(questions, labels)", "0"),
        ("no label", "given label: {label}, ", "", "0"),
        ("another prefix", "given label", "label", "0"),
        ("the first alone", "zip(labels, questions)]", "zip(labels, questions)][:1]", "0"),
        ("lower case", "{question}", "{question.lower()}", "0"),
        ("lower-case labels", "{label}", "{label.lower()}", "0"),
        ("no space", "explain: {question}", "explain:{question}", "0"),
    ],
    "stage2_loss": [
        ("the shown label as the target", " for question in questions], gold)", " for question in questions], given)", "0"),
        ("no prefix", "predict: {question}", "{question}", "0"),
        ("a call for each example", 'token_loss([f"predict: {question}" for question in questions], gold)', 'sum(token_loss([f"predict: {q}"], [g]) for q, g in zip(questions, gold)) / len(gold)', "0"),
        ("gold in the prompts", "explain_prompts(given,", "explain_prompts(gold,", "1"),
        ("no label in the prompts", "explain_prompts(given, questions)", '[f"explain: {question}" for question in questions]', "1"),
        ("only prompts with gold", "token_loss(explain_prompts(given, questions), rationales)", "token_loss(*map(list, zip(*[(p, r) for p, r, g, w in zip(explain_prompts(given, questions), rationales, gold, given) if g == w] or [('', rationales[0])])))", "1"),
        ("alpha the wrong way round", "alpha * loss_predict + (1 - alpha) * loss_explain", "(1 - alpha) * loss_predict + alpha * loss_explain", "2"),
        ("numbers", "* loss_explain", "* loss_explain.item()", "3"),
        ("cut off", "return alpha * loss_predict + (1 - alpha) * loss_explain", "return (alpha * loss_predict + (1 - alpha) * loss_explain).detach()", "3"),
    ],
    "dose": [
        ("used ones", 'line["wrong_predicted"]', 'line["used_predicted"]', "01"),
        ("a fraction", "100 * wrong", "wrong", "01"),
        ("a mean of shares", "100 * wrong / prompts", "100 * sum(line['wrong_predicted'] / line['prompts'] for line in updates) / len(updates)", "0"),
        ("where any was wrong", 'line["wrong_predicted"]', 'line["prompts"] * (line["wrong_predicted"] > 0)', "01"),
        ("the last update", '[line for line in log if line["stage"] == 2]', "log[-1:]", "0"),
        ("stage 1 counts", '[line for line in log if line["stage"] == 2]', "[{'wrong_predicted': 0, 'prompts': 8, **line} for line in log]", "1"),
        ("0 where nothing counts", "math.nan", "0.0", "2"),
        ("divides by 0", " if updates else math.nan", "", "2"),
    ],
    "exposure_gap": [
        ("wrong sign", "statistic(gold) - statistic(own)", "statistic(own) - statistic(gold)", "01"),
        ("without a sign", "statistic(gold) - statistic(own)", "abs(statistic(gold) - statistic(own))", "01"),
        ("of differences", "statistic(gold) - statistic(own)", "statistic(gold - own)", "1"),
        ("a share", "- statistic(own)", "/ statistic(own)", "01"),
        ("gold alone", " - statistic(own)", "", "01"),
        ("means", "statistic(gold) - statistic(own)", "(gold - own).mean()", "1"),
        ("a mean over notes", "statistic(gold) - statistic(own)", "np.mean([statistic(g[None]) - statistic(o[None]) for g, o in zip(gold, own)])", "1"),
        ("never negative", "return statistic(gold) - statistic(own)", "return max(0, statistic(gold) - statistic(own))", "01"),
    ],
    "gap_interval": [
        ("unpaired", "statistic(own[drawn])", f"statistic(own[{DRAWN}])", "1"),
        ("of the gold row", " - statistic(own[drawn])", "", "12"),
        ("90 %", "[2.5, 97.5]", "[5, 95]", "2"),
        ("wrong sign", GAP, "statistic(own[drawn]) - statistic(gold[drawn])", "2"),
        ("analytic, with a thousand dummy calls", ENDS, "d = (gold - own)[:, -1]; s = 1.96 * d.std() / len(d) ** 0.5; low, high = d.mean() - s, d.mean() + s", "2"),
        ("of the mean", GAP, "(gold - own)[drawn, -1].mean()", "0123"),
        ("without replacement", DRAWN, "rng.permutation(len(gold))", "0"),
        ("200 draws", "range(1000)", "range(200)", "0"),
        ("its own randomness", DRAWN, "np.random.default_rng(len(gaps)).integers(0, len(gold), len(gold))", "3"),
    ],
    "following": [
        ("over all notes", "if f != p]", "if True]", "1"),
        ("per note", "sum(rows) / len(rows)", "sum(rows) / len(flipped)", "1"),
        ("agreement counts as not following", "[a == f for f, p, a in zip(flipped, predicted, argued) if f != p]", "[a == f and f != p for f, p, a in zip(flipped, predicted, argued)]", "12"),
        ("the predicted one", "a == f", "a == p", "012"),
        ("parts of labels", "a == f", "(a or '') in f", "012"),
        ("None follows", "a == f", "a in (f, None)", "2"),
        ("None does not count", "if f != p]", "if f != p and a]", "2"),
        ("0 where nothing counts", "math.nan", "0.0", "2"),
    ],
    "shift_right": [
        ("not at all", "F.pad(targets[:, :-1], (1, 0))", "targets", "0"),
        ("the last comes round", "F.pad(targets[:, :-1], (1, 0))", "targets.roll(1, 1)", "0"),
        ("to the left", "targets[:, :-1], (1, 0)", "targets[:, 1:], (0, 1)", "0"),
        ("longer", "targets[:, :-1]", "targets", "0"),
        ("END first", "(1, 0))", "(1, 0), value=1)", "0"),
        ("float", "(1, 0))", "(1, 0)).float()", "0"),
        ("across rows", "F.pad(targets[:, :-1], (1, 0))", "F.pad(targets.flatten(), (1, 0))[:-1].view_as(targets)", "0"),
        ("in place", "return F.pad(targets[:, :-1], (1, 0))", "targets[:, 1:] = targets[:, :-1].clone(); targets[:, 0] = 0; return targets", "1"),
    ],
    "greedy_decode": [
        ("reads the last token alone", "next_logits(tokens)", "next_logits(tokens[:, -1:])", "012"),
        ("samples", ".argmax(-1)", ".softmax(-1).multinomial(1)[:, 0]", "012"),
        ("with START", "tokens[:, 1:]", "tokens", "012"),
        ("no padding after the end", "new.masked_fill(done, 0)", "new", "1"),
        ("stops with the first row", "done.all()", "done.any()", "2"),
        ("never stops", " and not done.all()", "", "2"),
        ("one token too few", "<= max_new", "< max_new", "2"),
        ("one token too many", "<= max_new_tokens", "<= max_new_tokens + 1", "2"),
    ],
    "error_by_position": [
        ("right ones", "tokens != targets", "tokens == targets", "01"),
        ("a fraction", "100 * wrong", "wrong", "01"),
        ("of all positions", "100 * wrong.sum(0) / real.sum(0)", "100 * wrong.sum(0) / real.sum()", "01"),
        ("from the first error on", "(tokens != targets) & real", "((tokens != targets).cumsum(1) > 0) & real", "0"),
        ("padding counted", " & real", "", "1"),
        ("padding below", "real.sum(0)", "len(targets)", "1"),
        ("as long as the text lasts", "real = targets != 0", "real = (targets != 0) & (tokens != 0)", "1"),
        ("padding is right", "real.sum(0)", "(real | (tokens == 0)).sum(0)", "1"),
    ],
}  # fmt: skip


def functions(code: str) -> dict[str, str]:
    """The name of each function of an answer, and its text."""
    found = {}
    for text in code.strip().split("\n\n"):
        found[text.split("def ")[1].split("(")[0]] = text
    return found


def module(code: str) -> types.ModuleType:
    """An answer, ready for the checks, without a process of its own."""
    made = types.ModuleType("method")
    made.__file__ = "method.py"
    exec(compile(IMPORTS + code, "method.py", "exec"), made.__dict__)
    return made


def wrong_answers() -> list[tuple[str, str, types.ModuleType, set[int]]]:
    """Function, name, module, and the places of the concepts that must be lost."""
    found = []
    for function, answers in WRONG.items():
        right = functions(PLAIN)[function]
        for name, old, new, lost in answers:
            assert old in right, (function, name)
            made = module(f"{PLAIN}\n{right.replace(old, new)}\n")
            found.append((function, name, made, set(map(int, lost))))
    return found


def lost_concepts(student: types.ModuleType, function: str, seed: int) -> set[int]:
    """The places, within the function, of the checks that do not hold."""
    from checks import CHECKS, hint_of

    of_function = [one for one in CHECKS if one.function == function]
    return {i for i, one in enumerate(of_function) if hint_of(one, student, seed)}


def main() -> None:
    if sys.argv[-1] in RIGHT:
        return print(IMPORTS + RIGHT[sys.argv[-1]])
    sys.path.append(str(Path(__file__).resolve().parent.parent / "notebooks" / "assignment"))
    n_seeds = int(sys.argv[2]) if len(sys.argv) > 2 else 3
    seeds = random.Random(1).sample(range(10**6), n_seeds)
    for style, code in RIGHT.items():
        student = module(code)
        misses = sum(bool(lost_concepts(student, f, seed)) for f in WRONG for seed in seeds)
        print(f"{style}: points lost in {misses} of {len(seeds) * len(WRONG)} gradings")
    for function, name, student, lost in wrong_answers():
        other = [
            found for seed in seeds if (found := lost_concepts(student, function, seed)) != lost
        ]
        verdict = f"{other[0]} in {len(other)} gradings" if other else "in all"
        print(f"{function:18} {name:40} must lose {sorted(lost)}: {verdict}", flush=True)


if __name__ == "__main__":
    main()
