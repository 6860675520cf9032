# ruff: noqa: E501
"""Answers to the assignment, for tests of its grader: right ones in three styles, wrong ones.

Students: this file holds solutions.
"""

IMPORTS = """
import collections
import math
import numpy as np
import torch
import torch.nn.functional as F
"""

# Every style solves all problems, in the order of adapters.py; functions are apart by blank lines.
VECTORISED = """
def p_linear(step, steps, warmup, ramp, cap):
    i, n = step - warmup * steps, ramp * steps
    return 0.0 if i < 0 or cap == 0 else cap if i >= n else min(cap, i / n)

def p_exponential(step, steps, warmup, ramp, cap):
    i, n = step - warmup * steps, ramp * steps
    if i < 0 or cap == 0: return 0.0
    if i >= n: return cap
    k = (1 - min(cap, 1 - 1e-6)) ** (1 / n)
    return 1 - k**i

def p_inverse_sigmoid(step, steps, warmup, ramp, cap):
    i, n = step - warmup * steps, ramp * steps
    if i < 0 or cap == 0: return 0.0
    if i >= n: return cap
    end = min(cap, 1 - 1e-6)
    low, high = 1e-9 * n, 1e9 * n
    for _ in range(200):
        k = math.sqrt(low * high)
        if n / k - math.log(k) > math.log(end / (1 - end)): low = k
        else: high = k
    return 1 / (1 + k * math.exp(-i / k))

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
    return [f"given label: {a}, explain: {b}" for a, b in zip(labels, questions)]

def dose(log, batch_size):
    wrong = [line["wrong_predicted"] for line in log if line["stage"] == 2]
    return 100 * sum(wrong) / (batch_size * len(wrong)) if wrong else math.nan

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

def token_mean_loss(logits, targets):
    total = F.cross_entropy(logits.transpose(1, 2), targets, ignore_index=0, reduction="sum")
    return total / (targets != 0).sum().clamp(min=1)

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
            ours, theirs = (collections.Counter(zip(*(x[i:] for i in range(n + 1)))) for x in (h, r))
            match += sum((ours & theirs).values())
            total += sum(ours.values())
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
"""

LOOPS = """
def p_linear(step, steps, warmup, ramp, cap):
    start = warmup * steps
    end = start + ramp * steps
    if step < start:
        return 0
    if step >= end:
        return cap
    p = (step - start) / (end - start)
    if p > cap:
        p = cap
    return p

def p_exponential(step, steps, warmup, ramp, cap):
    i = step - warmup * steps
    n = ramp * steps
    if i < 0:
        return 0
    elif i >= n:
        return cap
    elif cap == 0:
        return 0
    else:
        rate = math.log(1 - min(cap, 1 - 1e-6)) / n
        return -math.expm1(rate * i)

def p_inverse_sigmoid(step, steps, warmup, ramp, cap):
    i = step - warmup * steps
    n = ramp * steps
    if i < 0 or cap <= 0:
        return 0.0
    if i >= n:
        return cap
    p = min(cap, 1 - 1e-6)
    k = 1e-12
    for size in (1e6, 1e3, 1.0, 1e-3, 1e-6, 1e-9, 1e-12):  # a step at a time, ever smaller
        for _ in range(1000):
            if n / (k + size) - math.log(k + size) < math.log(p) - math.log(1 - p):
                break
            k += size
    return 1 - k / (k + math.exp(min(i / k, 700)))

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
                if label != right:
                    wrong += 1
        given.append(label)
    return given, dict(invalid_predicted=invalid, wrong_predicted=wrong, used_predicted=used)

def explain_prompts(labels, questions):
    prompts = []
    for i in range(len(labels)):
        prompts.append("given label: " + labels[i] + ", explain: " + questions[i])
    return prompts

def dose(log, batch_size):
    wrong = 0
    prompts = 0
    for line in log:
        if line["stage"] == 2:
            wrong += line["wrong_predicted"]
            prompts += batch_size
    if prompts == 0:
        return float("nan")
    return wrong / prompts * 100

def exposure_gap(statistic, gold, own):
    difference = statistic(gold)
    difference -= statistic(own)
    return difference

def gap_interval(statistic, gold, own, rng):
    n = len(gold)
    gaps = []
    for _ in range(1000):
        drawn = []
        for _ in range(n):
            drawn.append(int(rng.random() * n))
        gaps.append(statistic(gold[drawn]) - statistic(own[drawn]))
    gaps.sort()
    return gaps[25], gaps[974]

def following(flipped, predicted, argued):
    followed = asked = 0
    for i in range(len(flipped)):
        if flipped[i] == predicted[i]:
            continue
        asked += 1
        if argued[i] == flipped[i]:
            followed += 1
    if asked == 0:
        return math.nan
    return followed / asked * 100

def shift_right(targets):
    rows = []
    for row in targets.tolist():
        rows.append([0] + row[:-1])
    return torch.tensor(rows)

def token_mean_loss(logits, targets):
    total, count = 0 * logits.sum(), 0
    for b in range(targets.shape[0]):
        for t in range(targets.shape[1]):
            if targets[b, t] != 0:
                total = total - torch.log_softmax(logits[b, t], 0)[targets[b, t]]
                count += 1
    return total / max(count, 1)

def greedy_decode(model, source, max_new_tokens):
    was_training = model.training
    model.eval()
    rows = [[0] for _ in range(source.shape[0])]
    with torch.inference_mode():
        for _ in range(max_new_tokens):
            if all(1 in row for row in rows):
                break
            logits = model(source, torch.tensor(rows))
            for b, row in enumerate(rows):
                row.append(0 if 1 in row else int(logits[b, -1].argmax()))
    if was_training:
        model.train()
    return torch.tensor(rows)[:, 1:]

def corpus_bleu(hypotheses, references):
    precisions = []
    smooth = 1.0
    for n in (1, 2, 3, 4):
        matches = total = 0
        for hypothesis, reference in zip(hypotheses, references):
            theirs = {}
            for i in range(len(reference) - n + 1):
                gram = tuple(reference[i:i + n])
                theirs[gram] = theirs.get(gram, 0) + 1
            for i in range(len(hypothesis) - n + 1):
                gram = tuple(hypothesis[i:i + n])
                total += 1
                if theirs.get(gram, 0) > 0:
                    theirs[gram] -= 1
                    matches += 1
        if total == 0 or (n == 1 and matches == 0):
            return 0.0
        if matches == 0:
            smooth *= 2
            precisions.append(1 / (smooth * total))
        else:
            precisions.append(matches / total)
    h, r = sum(len(x) for x in hypotheses), sum(len(x) for x in references)
    penalty = 1.0 if h >= r else math.exp(1 - r / h)
    return 100 * penalty * math.exp(sum(math.log(p) for p in precisions) / 4)

def macro_f1(gold, predicted, labels):
    total = 0
    for label in labels:
        tp = fp = fn = 0
        for g, p in zip(gold, predicted):
            tp += g == label and p == label
            fp += g != label and p == label
            fn += g == label and p != label
        precision = tp / (tp + fp) if tp + fp else 0
        recall = tp / (tp + fn) if tp + fn else 0
        if precision + recall:
            total += 2 * precision * recall / (precision + recall)
    return 100 * total / len(labels)
"""

NUMPY = """
def p_linear(step, steps, warmup, ramp, cap):
    i = np.float64(step) - np.float64(warmup) * steps
    n = np.float64(ramp) * steps
    if i < 0:
        return np.float64(0)
    return np.float64(cap) if i >= n else np.clip(i / n, 0, cap)

def p_exponential(step, steps, warmup, ramp, cap):
    i = torch.tensor(step - warmup * steps, dtype=torch.float64)
    n = ramp * steps
    if i < 0:
        return torch.zeros(())
    if i >= n or cap == 0:
        return torch.tensor(cap, dtype=torch.float64)
    return 1 - (1 - min(cap, 1 - 1e-6)) ** (i / n)

def p_inverse_sigmoid(step, steps, warmup, ramp, cap):
    i = step - warmup * steps
    n = ramp * steps
    if i < 0 or cap == 0:
        return 0.0
    if i >= n:
        return cap
    reach = min(cap, 1 - 1e-6)
    odds = np.log(reach / (1 - reach))
    x = 0.0  # Newton's method on x = ln k, with f = n e^-x - x - odds
    for _ in range(500):
        x += (n * np.exp(-x) - x - odds) / (n * np.exp(-x) + 1)
    k = np.exp(x)
    return 1 / (1 + np.exp(x - i / k))

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

def dose(log, batch_size):
    wrong = np.array([line.get("wrong_predicted", 0) for line in log if line["stage"] > 1])
    return 100 * wrong.mean() / batch_size if len(wrong) else np.nan

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
    if not asked.any():
        return math.nan
    return 100 * np.mean((np.array(argued, dtype=object) == flipped)[asked])

def shift_right(targets):
    read = targets.clone()
    read[:, 1:] = targets[:, :-1]
    read[:, 0] = 0
    return read

def token_mean_loss(logits, targets):
    logits = logits.double()
    chosen = logits.gather(2, targets.unsqueeze(2)).squeeze(2)
    nats = torch.logsumexp(logits, dim=2) - chosen
    keep = (targets != 0).double()
    nats = nats.mul(keep)
    return nats.sum().div(keep.sum().clamp_(min=1.0))

@torch.no_grad()
def greedy_decode(model, source, max_new_tokens):
    training = model.training
    model.train(False)
    out = torch.zeros(source.size(0), max_new_tokens + 1, dtype=torch.int64)
    alive = torch.arange(source.size(0))  # rows that have not ended: only these are asked for
    t = 0
    while t < max_new_tokens and len(alive):
        out[alive, t + 1] = model(source[alive], out[alive, : t + 1])[:, -1].max(dim=-1).indices
        t += 1
        alive = alive[out[alive, t] != 1]
    model.train(training)
    return out[:, 1 : t + 1]

def corpus_bleu(hypotheses, references):
    counts = np.zeros((4, 2))
    for ours, theirs in zip(hypotheses, references):
        for n in range(1, 5):
            grams = [" ".join(ours[i:i + n]) for i in range(len(ours) - n + 1)]
            others = [" ".join(theirs[i:i + n]) for i in range(len(theirs) - n + 1)]
            counts[n - 1] += sum(min(grams.count(g), others.count(g)) for g in set(grams)), len(grams)
    if counts[0, 0] == 0 or counts[:, 1].min() == 0:
        return 0
    empty = counts[:, 0] == 0
    counts[empty, 0] = 0.5 ** np.arange(1, empty.sum() + 1)
    lengths = np.array([[len(h), len(r)] for h, r in zip(hypotheses, references)]).sum(0)
    penalty = np.exp(min(0, 1 - lengths[1] / lengths[0]))
    return 100 * penalty * np.exp(np.log(counts[:, 0] / counts[:, 1]).mean())

def macro_f1(gold, predicted, labels):
    gold, predicted = np.array(gold), np.array(predicted)
    label = np.array(labels)[:, None]
    hits = ((gold == label) & (predicted == label)).sum(1)
    either = (gold == label).sum(1) + (predicted == label).sum(1)
    return float(np.mean(200 * hits / np.maximum(either, 1)))
"""

RIGHT = {"vectorised": VECTORISED, "loops": LOOPS, "numpy": NUMPY}

# Broken places of VECTORISED: problem, what is wrong, the place, what stands there instead.
WRONG = [
    ("schedule_linear", "reaches the cap at the end of the ramp", "min(cap, i / n)", "cap * i / n"),
    ("schedule_linear", "passes the cap", "cap if i >= n else min(cap, i / n)", "i / n"),
    ("schedule_linear", "no warm-up", "step - warmup * steps", "step"),
    ("schedule_linear", "falls", "min(cap, i / n)", "cap - min(cap, i / n)"),
    ("schedule_linear", "counts from 1", "step - warmup * steps", "step + 1 - warmup * steps"),
    ("schedule_linear", "ends with the updates", "ramp * steps", "steps"),
    ("schedule_linear", "not after the ramp", "cap if i >= n else ", "0.0 if i >= n else "),
    ("schedule_linear", "a ramp of whole updates", "ramp * steps", "int(ramp * steps)"),
    ("schedule_exponential", "wrong constant", "1 - k**i", "1 - math.exp(-i / n)"),
    ("schedule_exponential", "goes on past the ramp", "    if i >= n: return cap\n", ""),
    ("schedule_exponential", "no warm-up", "step - warmup * steps", "step"),
    ("schedule_exponential", "epsilon itself", "1 - k**i", "k**i"),
    ("schedule_exponential", "a fixed k", "(1 - min(cap, 1 - 1e-6)) ** (1 / n)", "0.99"),
    ("schedule_exponential", "scaled to the cap", "1 - k**i", "cap * (1 - k**i)"),
    ("schedule_exponential", "linear", "1 - k**i", "min(cap, i / n)"),
    ("schedule_exponential", "no cap of 1", "min(cap, 1 - 1e-6)", "min(cap, 0.99)"),
    ("schedule_inverse_sigmoid", "no warm-up", "step - warmup * steps", "step"),
    ("schedule_inverse_sigmoid", "a fixed k", "k = math.sqrt(low * high)", "k = 50"),
    ("schedule_inverse_sigmoid", "a short search", "range(200)", "range(8)"),
    ("schedule_inverse_sigmoid", "the wrong half", " > math.log(end", " < math.log(end"),
    ("schedule_inverse_sigmoid", "epsilon itself", "1 / (1 + k *", "1 - 1 / (1 + k *"),
    ("schedule_inverse_sigmoid", "scaled", "1 / (1 + k *", "cap / (1 + k *"),
    ("schedule_inverse_sigmoid", "goes on", "    if i >= n: return cap\n", ""),
    ("schedule_inverse_sigmoid", "linear", "1 / (1 + k * math.exp(-i / k))", "min(cap, i / n)"),
    ("coin", "inverted", "< p", ">= p"),
    ("coin", "from the global generator", "(n, generator=generator)", "(n)"),
    ("coin", "the same in each batch", "    return", "    generator.manual_seed(1)\n    return"),
    ("coin", "one for all", "torch.rand(n, g", "torch.rand(1, g"),
    ("coin", "one for all, n times", ".tolist()", "[:1].tolist() * n"),
    ("coin", "exactly n p", "(torch.rand(n, generator=generator) < p)", "(torch.randperm(n, generator=generator) < n * p)"),
    ("coin", "pairs", "(torch.rand(n,", "(torch.rand(n // 2 + 1,"),
    ("coin", "pairs of neighbours", ".tolist()", ".repeat_interleave(2)[:n].tolist()"),
    ("coin", "half", "< p", "< 0.5"),
    ("coin", "a tensor", ".tolist()", ""),
    ("mix_labels", "invalid labels enter", "if label in labels", "if True"),
    ("mix_labels", "coin inverted", "if coin]", "if not coin]"),
    ("mix_labels", "predicts for all", "predict([questions[i] for i in chosen])", "[predict(questions)[i] for i in chosen]"),
    ("mix_labels", "labels of other examples", "zip(chosen, ", "zip(chosen[::-1], "),
    ("mix_labels", "in place", "list(gold)", "gold"),
    ("mix_labels", "counts all as wrong", "int(label != gold[i])", "1"),
    ("mix_labels", "counts right ones", "label != gold", "label == gold"),
    ("mix_labels", "counts what it was asked", "    return given", "    counts['used_predicted'] = len(chosen)\n    return given"),
    ("mix_labels", "repairs labels", "in labels:", "in labels or label.strip() in labels:"),
    ("mix_labels", "no counts", "return given, counts", "return given, {}"),
    ("mix_labels", "gold always", "given[i] = label", "pass"),
    ("mix_labels", "the first label for an invalid one", '["invalid_predicted"] += 1', '["invalid_predicted"] += 1; given[i] = labels[0]'),
    ("prompts", "no comma", "{a}, explain", "{a} explain"),
    ("prompts", "the other way round", "zip(labels, questions)", "zip(questions, labels)"),
    ("prompts", "no label", "given label: {a}, ", ""),
    ("prompts", "another prefix", "given label", "label"),
    ("prompts", "a target", "{b}", "{b} {a}"),
    ("prompts", "the first alone", "zip(labels, questions)]", "zip(labels, questions)][:1]"),
    ("prompts", "lower case", "{b}", "{b.lower()}"),
    ("prompts", "no space", "explain: {b}", "explain:{b}"),
    ("dose", "stage 1 counts", 'line["wrong_predicted"] for line in log if line["stage"] == 2', 'line.get("wrong_predicted", 0) for line in log'),
    ("dose", "used ones", 'line["wrong_predicted"]', 'line["used_predicted"]'),
    ("dose", "a fraction", "100 * sum", "sum"),
    ("dose", "per update", "(batch_size * len(wrong))", "len(wrong)"),
    ("dose", "of all lines", "len(wrong)", "len(log)"),
    ("dose", "where any was wrong", "sum(wrong)", "sum(w > 0 for w in wrong)"),
    ("dose", "0 where nothing counts", "math.nan", "0.0"),
    ("dose", "the last update", "sum(wrong)", "wrong[-1]"),
    ("exposure_gap", "wrong sign", "statistic(gold) - statistic(own)", "statistic(own) - statistic(gold)"),
    ("exposure_gap", "without a sign", "statistic(gold) - statistic(own)", "abs(statistic(gold) - statistic(own))"),
    ("exposure_gap", "of differences", "statistic(gold) - statistic(own)", "statistic(gold - own)"),
    ("exposure_gap", "a share", "- statistic(own)", "/ statistic(own)"),
    ("exposure_gap", "gold alone", " - statistic(own)", ""),
    ("exposure_gap", "means", "statistic(gold) - statistic(own)", "(gold - own).mean()"),
    ("exposure_gap", "medians", "statistic(gold) - statistic(own)", "np.median(gold - own)"),
    ("exposure_gap", "never negative", "return statistic(gold) - statistic(own)", "return max(0, statistic(gold) - statistic(own))"),
    ("gap_interval", "unpaired", "statistic(own[drawn])", "statistic(own[rng.integers(0, len(own), len(own))])"),
    ("gap_interval", "of the gold row", " - statistic(own[drawn])", ""),
    ("gap_interval", "90 %", "[2.5, 97.5]", "[5, 95]"),
    ("gap_interval", "99 %", "[2.5, 97.5]", "[0.5, 99.5]"),
    ("gap_interval", "without replacement", "rng.integers(0, len(gold), len(gold))", "rng.permutation(len(gold))"),
    ("gap_interval", "smaller draws", "len(gold), len(gold))", "len(gold), len(gold) // 2)"),
    ("gap_interval", "wrong sign", "statistic(gold[drawn]) - statistic(own[drawn])", "statistic(own[drawn]) - statistic(gold[drawn])"),
    ("gap_interval", "one draw", "        drawn = rng.integers(0, len(gold), len(gold))\n", "        drawn = np.arange(len(gold))\n"),
    ("gap_interval", "the standard error of the mean", "low, high = np.percentile(gaps, [2.5, 97.5])", "d = gold - own; s = 1.96 * d.std() / len(d) ** 0.5; low, high = d.mean() - s, d.mean() + s"),
    ("gap_interval", "marginal intervals", "low, high = np.percentile(gaps, [2.5, 97.5])", "g = np.percentile([statistic(gold[rng.integers(0, len(gold), len(gold))]) for _ in range(1000)], [2.5, 97.5]); low, high = g - statistic(own)"),
    ("gap_interval", "two standard deviations", "low, high = np.percentile(gaps, [2.5, 97.5])", "low, high = np.mean(gaps) - 2 * np.std(gaps), np.mean(gaps) + 2 * np.std(gaps)"),
    ("gap_interval", "of the mean", "statistic(gold[drawn]) - statistic(own[drawn])", "(gold - own)[drawn].mean()"),
    ("following", "over all notes", "if f != p]", "if flipped]"),
    ("following", "any other label", "a == f", "a != p"),
    ("following", "0 where nothing counts", "math.nan", "0.0"),
    ("following", "where it agrees", "if f != p]", "if f == p]"),
    ("following", "the predicted one", "a == f", "a == p"),
    ("following", "no argument follows", "a == f", "a in (f, None)"),
    ("following", "a fraction", "100 * (", "1 * ("),
    ("following", "per note", "sum(rows) / len(rows)", "sum(rows) / len(flipped)"),
    ("shift_right", "not at all", "F.pad(targets[:, :-1], (1, 0))", "targets"),
    ("shift_right", "the last comes round", "F.pad(targets[:, :-1], (1, 0))", "targets.roll(1, 1)"),
    ("shift_right", "to the left", "targets[:, :-1], (1, 0)", "targets[:, 1:], (0, 1)"),
    ("shift_right", "in place", "return F.pad(targets[:, :-1], (1, 0))", "targets[:, 1:] = targets[:, :-1].clone(); targets[:, 0] = 0; return targets"),
    ("shift_right", "longer", "targets[:, :-1]", "targets"),
    ("shift_right", "END first", "(1, 0))", "(1, 0), value=1)"),
    ("shift_right", "float", "(1, 0))", "(1, 0)).float()"),
    ("shift_right", "down the batch", "F.pad(targets[:, :-1], (1, 0))", "F.pad(targets[:-1], (0, 0, 1, 0))"),
    ("masked_loss", "padding counted", "ignore_index=0", "ignore_index=-1"),
    ("masked_loss", "padding below", "(targets != 0).sum().clamp(min=1)", "targets.numel()"),
    ("masked_loss", "nan without a token", ".clamp(min=1)", ""),
    ("masked_loss", "underflows", "total = F.cross_entropy(logits", "total = F.nll_loss(logits.softmax(-1).log()"),
    ("masked_loss", "no gradient", "F.cross_entropy(logits", "F.cross_entropy(logits.detach()"),
    ("masked_loss", "mean of rows", "return total / (targets != 0).sum().clamp(min=1)", "n = (targets != 0).sum(1); x = F.cross_entropy(logits.transpose(1, 2), targets, ignore_index=0, reduction='none').sum(1); return (x / n.clamp(min=1)).mean()"),
    ("masked_loss", "the sum", " / (targets != 0).sum().clamp(min=1)", ""),
    ("masked_loss", "in bits", "return total", "return total / math.log(2)"),
    ("masked_loss", "shifted once more", "total = ", "targets = F.pad(targets[:, :-1], (1, 0)); total = "),
    ("greedy_decode", "dropout on", "    model.eval()\n", ""),
    ("greedy_decode", "dropout on inside", "model.eval()", "model.training = False"),
    ("greedy_decode", "no padding after the end", "new.masked_fill(done, 0)", "new"),
    ("greedy_decode", "mode not restored", "    model.train(mode)\n", ""),
    ("greedy_decode", "training mode restored", "model.train(mode)", "model.train()"),
    ("greedy_decode", "with gradients", "torch.no_grad()", "torch.enable_grad()"),
    ("greedy_decode", "gradients off afterwards", "    model.train(mode)\n", "    model.train(mode)\n    torch.set_grad_enabled(False)\n"),
    ("greedy_decode", "stops with the first row", "done.all()", "done.any()"),
    ("greedy_decode", "never stops", " and not done.all()", ""),
    ("greedy_decode", "reads the last token alone", "(source, tokens)", "(source, tokens[:, -1:])"),
    ("greedy_decode", "with START", "tokens[:, 1:]", "tokens"),
    ("greedy_decode", "one token too few", "<= max_new", "< max_new"),
    ("greedy_decode", "samples", ".argmax(-1)", ".softmax(-1).multinomial(1)[:, 0]"),
    ("greedy_decode", "first position", "[:, -1].argmax", "[:, 0].argmax"),
    ("corpus_bleu", "no brevity penalty", "min(0, 1 - theirs / max(ours, 1))", "0"),
    ("corpus_bleu", "a reward for length", "min(0, 1 - theirs / max(ours, 1))", "1 - theirs / max(ours, 1)"),
    ("corpus_bleu", "not clipped", "(ours & theirs).values()", "ours[g] for g in theirs"),
    ("corpus_bleu", "not smoothed", "if match else smooth / 2", "* 1e-9"),
    ("corpus_bleu", "one pair", "in zip(hypotheses, references):", "in [(hypotheses[0], references[0])]:"),
    ("corpus_bleu", "smoothed alike", "smooth if match else smooth / 2", "0.5"),
    ("corpus_bleu", "three orders", "range(4)", "range(3)"),
    ("corpus_bleu", "a fraction", "= 100, 1, 0", "= 1, 1, 0"),
    ("corpus_bleu", "mean of pairs", "    bleu, smooth", "    if len(hypotheses) > 1: return sum(corpus_bleu([h], [r]) for h, r in zip(hypotheses, references)) / len(hypotheses)\n    bleu, smooth"),
    ("macro_f1", "seen labels only", "in labels", "in {*gold, *predicted} & {*labels}"),
    ("macro_f1", "invalid is a class", "in labels", "in sorted({*labels, *predicted})"),
    ("macro_f1", "recall", "gold.count(label) + predicted.count(label)", "2 * gold.count(label)"),
    ("macro_f1", "precision", "gold.count(label) + predicted.count(label)", "2 * predicted.count(label)"),
    ("macro_f1", "accuracy", "sum(f1) / len(f1)", "100 * sum(g == p for g, p in zip(gold, predicted)) / len(gold)"),
    ("macro_f1", "weighted", "sum(f1) / len(f1)", "sum(f * gold.count(l) for f, l in zip(f1, labels)) / len(gold)"),
    ("macro_f1", "a fraction", "200 *", "2 *"),
    ("macro_f1", "gold labels only", "in labels", "in sorted(set(gold))"),
    ("schedule_inverse_sigmoid", "a warm-up of whole updates", "step - warmup * steps", "step - int(warmup * steps)"),
    ("schedule_inverse_sigmoid", "no cap of 1", "min(cap, 1 - 1e-6)", "min(cap, 1 - 1e-3)"),
    ("schedule_inverse_sigmoid", "k above 1 alone", "1e-9 * n, 1e9 * n", "1, 1e9 * n"),
    ("coin", "tenths", "torch.rand(n, generator=generator) < p", "torch.randint(0, 10, (n,), generator=generator) < 10 * p"),
    ("mix_labels", "labels of the batch", "in labels:", "in gold:"),
    ("mix_labels", "asks about all where no coin is True", "for i in chosen]", "for i in chosen] or questions"),
    ("prompts", "lower-case labels", "{a}", "{a.lower()}"),
    ("exposure_gap", "in place", "return statistic(gold) - statistic(own)", "x = statistic(gold) - statistic(own); gold -= own; return x"),
    ("gap_interval", "its own chance", "rng.integers(0, len(gold), len(gold))", "np.random.default_rng(len(gaps)).integers(0, len(gold), len(gold))"),
    ("gap_interval", "200 draws", "range(1000)", "range(200)"),
    ("gap_interval", "never the last note", "rng.integers(0, len(gold), len(gold))", "rng.integers(0, len(gold) - 1, len(gold))"),
    ("following", "parts of labels", "a == f", "(a or '') in f"),
    ("shift_right", "across rows", "F.pad(targets[:, :-1], (1, 0))", "F.pad(targets.flatten(), (1, 0))[:-1].view_as(targets)"),
    ("greedy_decode", "gradients on for ever", "    model.train(mode)\n", "    model.train(mode)\n    torch.set_grad_enabled(True)\n"),
    ("greedy_decode", "in half precision", "[:, -1].argmax", "[:, -1].half().argmax"),
    ("greedy_decode", "part of the source", "model(source,", "model(source[:, :5],"),
    ("corpus_bleu", "letters, not words", "zip(hypotheses, references):\n            ours, theirs = (", "zip(hypotheses, references):\n            h, r = ' '.join(h).lower().split(), ' '.join(r).lower().split()\n            ours, theirs = ("),
    ("macro_f1", "parts of labels", "g == p == label", "p == label and p in g"),
]  # fmt: skip

# Cheats, as the first lines of any function: each tries to come to the right values another way.
CHEATS = {
    "reads the grader": "open({folder!r} + '/checks.py').read()",
    "reads a solution": "open({root!r} + '/r2d.py').read()",
    "opens a folder": "import os; os.open('r2d.py', 0, dir_fd=os.open({root!r}, 0))",
    "reads a text of another class": "open(type('T', (str,), dict(replace=lambda *a: '', startswith=lambda *a: False))({root!r} + '/r2d.py')).read()",
    "lists the grader": "__import__('os').listdir({folder!r})",
    "imports the core": "__import__('sys').path.insert(0, {root!r}); import r2d, metrics",
    "importlib": "__import__('sys').path.insert(0, {root!r}); __import__('importlib').import_module('metrics')",
    "runs the core": "__import__('runpy').run_path({root!r} + '/metrics.py')",
    "a scorer": "from sacrebleu.metrics import BLEU",
    "another scorer": "__import__('importlib').import_module('sklearn.metrics')",
    "starts a process": "__import__('subprocess').run([__import__('sys').executable, '-c', ''])",
    "a constant": "return 0.5",
    "None": "return None",
    "an object equal to all": "return type('All', (float,), dict(__eq__=lambda a, b: True, __sub__=lambda a, b: 0.0))(1.0)",
    "the first argument": "return list(locals().values())[0]",
    "the grader's frames": "f = __import__('sys')._getframe(); found = []\n    while f: found += [v for v in f.f_locals.values() if isinstance(v, (list, float))]; f = f.f_back\n    return found[-1]",
    "patched comparison": "math.isclose = lambda *a, **k: True; math.isnan = lambda x: True; import builtins; builtins.abs = lambda x: 0; return 1.0",
    "patched worker": "w = __import__('sys').modules['__main__']; w.plain = lambda v, depth=0: True; return True",
    "forged replies": "import os\n    for fd in range(3, 12):\n        try: os.write(fd, b'{{\"id\": 1, \"values\": [0.5], \"arguments\": []}}\\n' * 50)\n        except OSError: pass\n    return 0.5",
}  # fmt: skip


def functions(code: str) -> dict[str, str]:
    """The name of each function of an answer, and its text."""
    found = {}
    for text in code.strip().split("\n\n"):
        found[text.split("def ")[1].split("(")[0]] = text
    return found
