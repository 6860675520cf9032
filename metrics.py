"""Scores, written out: accuracy, macro-F1, BLEU, BERTScore, the independent reader, bootstrap intervals.

Text in, numbers out. Every score is on a 0-100 scale unless its name says nats; intervals are 95 % and come from
resampling the examples. Each function agrees with its well-known peer (scikit-learn, sacreBLEU, NLTK, bert-score); the
tests compare them.
"""

import math
import re
from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np

# ---------------------------------------------------------------------------------------------------------------------
# Labels.


def accuracy(gold: Sequence[str], predicted: Sequence[str]) -> float:
    """Share of equal labels, 0-100."""
    return 100 * float(np.mean([g == p for g, p in zip(gold, predicted, strict=True)]))


def per_class(gold: Sequence[str], predicted: Sequence[str], labels: Sequence[str]) -> dict[str, dict[str, float]]:
    """Precision, recall and F1 (0-100) and support of each label in `labels`; 0 where a ratio is 0/0.

    A prediction that is no label at all is a miss for the gold class and a false alarm for no class. The classes are
    given, not collected from what was seen: a class that nothing was predicted for still counts, with F1 = 0.
    """
    hits = Counter(g for g, p in zip(gold, predicted, strict=True) if g == p)
    support, guesses = Counter(gold), Counter(predicted)
    scores = {}
    for label in labels:
        precision = 100 * hits[label] / max(guesses[label], 1)
        recall = 100 * hits[label] / max(support[label], 1)
        f1 = 200 * hits[label] / max(support[label] + guesses[label], 1)  # = 2PR / (P + R)
        scores[label] = {"precision": precision, "recall": recall, "f1": f1, "support": support[label]}
    return scores


def macro_f1(gold: Sequence[str], predicted: Sequence[str], labels: Sequence[str]) -> float:
    """Unweighted mean of the F1 of all `labels`, 0-100."""
    return float(np.mean([scores["f1"] for scores in per_class(gold, predicted, labels).values()]))


# ---------------------------------------------------------------------------------------------------------------------
# BLEU (Papineni et al. 2002) and BERTScore.


def tokenize_13a(text: str) -> list[str]:
    """The tokens of mteval-v13a, the default of sacreBLEU: punctuation apart, numbers like 1,000.5 and 3-day whole."""
    text = text.rstrip().replace("<skipped>", "").replace("-\n", "").replace("\n", " ")
    for entity, char in (("&quot;", '"'), ("&amp;", "&"), ("&lt;", "<"), ("&gt;", ">")):
        text = text.replace(entity, char)
    text = re.sub(r"([{-~\[-` -&(-+:-@/])", r" \1 ", f" {text} ")  # symbols, but not ' , - .
    text = re.sub(r"([^0-9])([.,])", r"\1 \2 ", text)  # . and , unless a digit stands before
    text = re.sub(r"([.,])([^0-9])", r" \1 \2", text)  # ... or after
    return re.sub(r"([0-9])(-)", r"\1 \2 ", text).split()


def ngrams(tokens: Sequence[str], n: int) -> Counter:
    return Counter(zip(*(tokens[i:] for i in range(n)), strict=False))


def bleu_counts(hypothesis: Sequence[str], reference: Sequence[str]) -> np.ndarray:
    """What BLEU needs of one pair of token lists: (10,) = matches for n = 1..4, totals for n = 1..4, both lengths."""
    matches, totals = [], []
    for n in range(1, 5):
        found = ngrams(hypothesis, n)
        matches.append((found & ngrams(reference, n)).total())  # & clips each count at the reference's
        totals.append(found.total())
    return np.array([*matches, *totals, len(hypothesis), len(reference)])


def bleu_from_counts(counts: np.ndarray) -> float:
    """Corpus BLEU, 0-100, from summed counts (10,): brevity penalty times the geometric mean of four precisions.

    Smoothing as sacreBLEU's default ("exp"): the k-th precision without a match counts 1/2^k matches.
    """
    matches, totals, (hypothesis, reference) = counts[:4], counts[4:8], counts[8:]
    if not matches.any() or not totals.all():
        return 0.0
    log_precision, halvings = 0.0, 0
    for match, total in zip(matches, totals, strict=True):
        halvings += match == 0
        log_precision += math.log(match / total if match else 0.5**halvings / total) / 4
    return 100 * math.exp(log_precision + min(0.0, 1 - reference / hypothesis))


def corpus_bleu(hypotheses: Sequence[str], references: Sequence[str]) -> float:
    """Corpus BLEU, 0-100: counts are pooled over all pairs first, never averaged. Equals sacreBLEU's default."""
    pairs = zip(hypotheses, references, strict=True)
    return bleu_from_counts(sum(bleu_counts(tokenize_13a(h), tokenize_13a(r)) for h, r in pairs) + np.zeros(10, int))


def sentence_bleu(hypothesis: Sequence[str], reference: Sequence[str]) -> float:
    """BLEU of one pair of token lists, 0-100, smoothing method 4 (Chen & Cherry 2014), as NLTK computes it.

    The k-th precision without a match counts ln(length) / (5 * 2^k) matches. NLTK's two quirks are kept: a one-word
    hypothesis is not smoothed, and a precision of 0 is then left out of the mean.
    """
    counts = bleu_counts(hypothesis, reference).tolist()
    length, log_precision, misses = len(hypothesis), 0.0, 0
    if counts[0] == 0:
        return 0.0
    for match, total in zip(counts[:4], counts[4:8], strict=True):
        if match == 0 and length > 1:
            misses += 1
            match = math.log(length) / (5 * 2**misses)
        log_precision += math.log(match / max(total, 1)) / 4 if match else 0.0
    return 100 * math.exp(log_precision + min(0.0, 1 - len(reference) / length))


def bertscore(
    hypothesis: np.ndarray,
    reference: np.ndarray,
    hypothesis_weights: np.ndarray | None = None,
    reference_weights: np.ndarray | None = None,
) -> tuple[float, float, float]:
    """BERTScore (Zhang et al. 2020, section 3) of one pair: precision, recall, F1, 0-100 (-100 at worst).

    Token vectors (T, D) and (S, D) -> each token is matched with its nearest token of the other text by cosine; the
    optional weights (T,), (S,) are the idf of the tokens. A text without tokens scores 0.
    """
    if not (len(hypothesis) and len(reference)):
        return 0.0, 0.0, 0.0
    cosine = (hypothesis / np.linalg.norm(hypothesis, axis=1, keepdims=True)) @ (
        reference / np.linalg.norm(reference, axis=1, keepdims=True)
    ).T  # (T, S)
    precision = float(np.average(cosine.max(1), weights=hypothesis_weights))
    recall = float(np.average(cosine.max(0), weights=reference_weights))
    f1 = 2 * precision * recall / (precision + recall) if precision + recall else 0.0
    return 100 * precision, 100 * recall, 100 * f1


# ---------------------------------------------------------------------------------------------------------------------
# Who reads the rationale: a classifier that the model never met.


class Reader:
    """Which label does a text argue for? Multinomial naive Bayes over words, fitted on gold training rationales.

    Label strings are masked before fitting and reading, so it judges what is said and not what is named. It never met
    the model; its accuracy on gold test rationales is its own ceiling and is reported beside its verdicts.
    """

    def __init__(self, rationales: Sequence[str], gold: Sequence[str], labels: Sequence[str]):
        self.labels = list(labels)
        names = "|".join(re.escape(label.lower()) for label in sorted(labels, key=len, reverse=True))
        self.mask = re.compile(rf"(?<!\w)(?:{names})(?!\w)")
        bags = [self.words(text) for text in rationales]
        self.column = {word: i for i, word in enumerate(sorted(set().union(*bags)))}
        counts = np.ones((len(labels), len(self.column)))  # add-one smoothing
        for bag, label in zip(bags, gold, strict=True):
            for word, n in bag.items():
                counts[self.labels.index(label), self.column[word]] += n
        self.log_likelihood = np.log(counts / counts.sum(1, keepdims=True))  # (labels, words)
        self.log_prior = np.log([1 + sum(g == label for g in gold) for label in labels])

    def words(self, text: str) -> Counter:
        return Counter(re.findall(r"\w+", self.mask.sub(" ", text.lower())))

    def __call__(self, text: str) -> str:
        known = [(self.column[word], n) for word, n in self.words(text).items() if word in self.column]
        scores = self.log_prior + sum(n * self.log_likelihood[:, i] for i, n in known)
        return self.labels[int(np.argmax(scores))]


# ---------------------------------------------------------------------------------------------------------------------
# Intervals and the two groups of scores that metrics.json holds.


def bootstrap_interval(statistic: Callable[[np.ndarray], float], n: int, resamples: int = 1000) -> list[float]:
    """95 % percentile interval (Efron 1979) of `statistic`, a function of example numbers drawn with replacement."""
    rng = np.random.default_rng(0)
    values = [statistic(rng.integers(0, n, n)) for _ in range(resamples)]
    return np.percentile(values, [2.5, 97.5]).tolist()


def mean_and_interval(name: str, values: Sequence[float]) -> dict[str, float | list[float]]:
    """{name: mean, name_ci95: its interval} of one number per example."""
    array = np.asarray(values, dtype=float)
    return {
        name: float(array.mean()),
        f"{name}_ci95": bootstrap_interval(lambda rows: float(array[rows].mean()), len(array)),
    }


def ratio_and_interval(name: str, numerators: np.ndarray, denominators: np.ndarray) -> dict[str, float | list[float]]:
    """{name: sum / sum, name_ci95: its interval}, for means over tokens where examples are what is drawn again."""

    def ratio(rows: np.ndarray) -> float:
        return float(numerators[rows].sum() / max(denominators[rows].sum(), 1))

    everything = np.arange(len(numerators))
    return {name: ratio(everything), f"{name}_ci95": bootstrap_interval(ratio, len(numerators))}


def label_scores(gold: Sequence[str], predicted: Sequence[str], labels: Sequence[str]) -> dict:
    """The group `label` of metrics.json: n, accuracy, macro_f1, per_class, invalid, with intervals."""
    classes = {label: i for i, label in enumerate(labels)}
    g, p = (np.array([classes.get(label, len(labels)) for label in side]) for side in (gold, predicted))

    def fast_macro_f1(rows: np.ndarray) -> float:  # the same as macro_f1, on numbers, for a thousand resamples
        hits = np.bincount(g[rows][g[rows] == p[rows]], minlength=len(labels) + 1)
        both = np.bincount(g[rows], minlength=len(labels) + 1) + np.bincount(p[rows], minlength=len(labels) + 1)
        return float(np.mean(200 * hits[:-1] / np.maximum(both[:-1], 1)))

    return {
        "n": len(gold),
        **mean_and_interval("accuracy", 100 * (g == p)),
        "macro_f1": macro_f1(gold, predicted, labels),
        "macro_f1_ci95": bootstrap_interval(fast_macro_f1, len(gold)),
        "per_class": per_class(gold, predicted, labels),
        **mean_and_interval("invalid", 100 * (p == len(labels))),
    }


def rationale_scores(
    texts: Sequence[str],
    references: Sequence[str],
    given: Sequence[str],
    gold: Sequence[str],
    argues: Callable[[str], str | None],
) -> dict:
    """One condition of the group `rationale`: n, bleu, sentence_bleu, argues_given, argues_gold, with intervals.

    `given` holds the labels in the prompts; `argues` tells which label a text argues for.
    """
    if not texts:
        return {"n": 0}
    pairs = [
        (tokenize_13a(t), tokenize_13a(r), tokenize_13a(t.lower()), tokenize_13a(r.lower()))
        for t, r in zip(texts, references, strict=True)
    ]
    counts = np.array([bleu_counts(hypothesis, reference) for hypothesis, reference, _, _ in pairs])
    verdicts = [argues(text) for text in texts]
    return {
        "n": len(texts),
        "bleu": bleu_from_counts(counts.sum(0)),
        "bleu_ci95": bootstrap_interval(lambda rows: bleu_from_counts(counts[rows].sum(0)), len(texts)),
        **mean_and_interval("sentence_bleu", [sentence_bleu(h, r) for _, _, h, r in pairs]),
        **mean_and_interval("argues_given", [100 * (v == label) for v, label in zip(verdicts, given, strict=True)]),
        **mean_and_interval("argues_gold", [100 * (v == label) for v, label in zip(verdicts, gold, strict=True)]),
    }
