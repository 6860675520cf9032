"""Scores, 0-100 (nll: nats per token): predictions.jsonl -> `score` -> metrics.json -> `table`.

Equal to those of scikit-learn, sacreBLEU, NLTK and scipy, by tests/test_metrics.py.
"""

import math
import re
from collections import Counter, defaultdict
from collections.abc import Callable

import numpy as np

# A condition is the label that a rationale was written for; here is the row's key of it.
LABEL_KEYS = {"gold": "label", "predicted": "predicted_label", "flipped": "flipped_label"}
LABEL_KEYS |= {"ceiling_gold": "label", "ceiling": "ceiling_label"}  # the simulator's texts


def per_class(gold: list[str], predicted: list[str], labels: list[str]) -> dict:
    """{label: precision, recall, f1 (0-100; 0/0 is 0), support}; invalid is a miss."""
    hits = Counter(g for g, p in zip(gold, predicted, strict=True) if g == p)
    support = Counter(gold)
    guesses = Counter(predicted)
    scores = {}
    for label in labels:
        scores[label] = {
            "precision": 100 * hits[label] / max(guesses[label], 1),
            "recall": 100 * hits[label] / max(support[label], 1),
            "f1": 200 * hits[label] / max(support[label] + guesses[label], 1),  # = 2PR / (P + R)
            "support": support[label],
        }
    return scores


def macro_f1(gold: list[str], predicted: list[str], labels: list[str]) -> float:
    """Mean F1 of all `labels`, those never seen too, 0-100."""
    return sum(scores["f1"] for scores in per_class(gold, predicted, labels).values()) / len(labels)


def tokenize_13a(text: str) -> list[str]:
    """The tokens of mteval-v13a: punctuation apart, 1,000.5 and x-ray whole."""
    text = text.rstrip().replace("<skipped>", "").replace("-\n", "").replace("\n", " ")
    text = text.replace("&quot;", '"').replace("&amp;", "&")
    text = text.replace("&lt;", "<").replace("&gt;", ">")
    text = re.sub(r"([{-~\[-`!-&(-+:-@/])", r" \1 ", f" {text} ")  # symbols, but not ' , - .
    text = re.sub(r"([^0-9])([.,])", r"\1 \2 ", text)  # . and , apart but between
    text = re.sub(r"([.,])([^0-9])", r" \1 \2", text)  # two digits
    return re.sub(r"([0-9])(-)", r"\1 \2 ", text).split()


def ngrams(tokens: list[str], n: int) -> Counter:
    return Counter([tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)])


def bleu_counts(hypothesis: str, reference: str) -> np.ndarray:
    """(10,) matching n-grams for n = 1 to 4; all n-grams for n = 1 to 4; both lengths."""
    tokens = tokenize_13a(hypothesis)
    expected = tokenize_13a(reference)
    counts = np.zeros(10, dtype=int)
    counts[8:] = len(tokens), len(expected)
    for n in range(1, 5):
        found = ngrams(tokens, n)
        clipped = found & ngrams(expected, n)  # each at most as often as in the reference
        counts[n - 1] = clipped.total()
        counts[n + 3] = found.total()
    return counts


def bleu_from_counts(counts: np.ndarray, smoothing: float = 1.0) -> float:
    """BLEU (Papineni et al. 2002), 0-100, from the `bleu_counts` (n, 10) of n texts."""
    counts = counts.sum(axis=0).tolist()
    if counts[0] == 0 or counts[7] == 0:  # no word matches, or there is no 4-gram
        return 0.0
    log_bleu = min(0.0, 1 - counts[9] / counts[8])  # the penalty for brevity
    zeros = 0
    for match, total in zip(counts[:4], counts[4:8], strict=True):
        if match == 0:
            zeros += 1
            match = smoothing / 2**zeros  # the first 0 counts as a half, the next as a fourth
        if match > 0:  # NLTK leaves out what is 0 even so
            log_bleu += math.log(match / total) / 4
    return 100 * math.exp(log_bleu)


def corpus_counts(texts: list[str], references: list[str]) -> np.ndarray:
    """(n, 10) the `bleu_counts` of n texts."""
    counts = [bleu_counts(text, gold) for text, gold in zip(texts, references, strict=True)]
    return np.array(counts).reshape(-1, 10)


def corpus_bleu(texts: list[str], references: list[str]) -> float:
    """BLEU of n texts as one, 0-100. Equals sacreBLEU's default."""
    return bleu_from_counts(corpus_counts(texts, references))


def sentence_bleu(hypothesis: str, reference: str) -> float:
    """BLEU of one text, 0-100: lower case, NLTK's smoothing method 4, our tokens."""
    counts = bleu_counts(hypothesis.lower(), reference.lower())
    counts[4:8] = np.maximum(counts[4:8], 1)  # else 0 / 0 in short texts
    return bleu_from_counts(counts[None], smoothing=math.log(max(counts[8], 1)) / 5)


class Reader:
    """Which label does a text argue for? Naive Bayes over words, the labels' names masked."""

    def __init__(self, rationales: list[str], gold: list[str], labels: list[str]):
        self.labels = list(labels)
        self.names = sorted(map(str.lower, labels), key=len, reverse=True)
        n_texts = np.ones(len(labels))  # add-one smoothing, here and for each word
        counts = defaultdict(lambda: np.ones(len(labels)))  # word -> how often under each label
        for text, label in zip(rationales, gold, strict=True):
            i = self.labels.index(label)
            n_texts[i] += 1
            for word in self.words(text):
                counts[word][i] += 1
        self.log_prior = np.log(n_texts)
        n_words = sum(counts.values())
        self.log_words = {word: np.log(n / n_words) for word, n in counts.items()}

    def words(self, text: str) -> list[str]:
        """The words of a text without the names of the labels."""
        text = text.lower()
        for name in self.names:  # the longest first: "not urgent" before "urgent"
            text = re.sub(rf"(?<!\w){re.escape(name)}(?!\w)", " ", text)
        return re.findall(r"\w+", text)

    def __call__(self, text: str) -> str | None:
        """The most probable label; None for a text without a known word."""
        known = [self.log_words[word] for word in self.words(text) if word in self.log_words]
        return self.labels[(self.log_prior + sum(known)).argmax()] if known else None


def share(name: str, hits: np.ndarray) -> dict:
    """{name: share of true values, 0-100, name_ci95: its 95 % interval (Wilson 1927)}."""
    n = len(hits)
    p = int(sum(hits)) / n
    z = 1.959963984540054  # the normal distribution's 97.5 % point
    mid = (p + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z * math.sqrt(p * (1 - p) / n + (z / (2 * n)) ** 2) / (1 + z**2 / n)
    return {name: 100 * p, f"{name}_ci95": [100 * max(mid - half, 0), 100 * min(mid + half, 1)]}


def bootstrap(name: str, statistic: Callable, *columns: np.ndarray) -> dict:
    """{name: statistic(*columns), name_ci95: its 95 % percentile interval (Efron 1979)}.

    With fewer than 100 rows it is too narrow: of macro-F1 with 40 rows, it holds the truth in 75 %.
    """
    n = len(columns[0])
    rng = np.random.default_rng(0)
    values = []
    for _ in range(1000):
        sample = rng.integers(0, n, n)  # with replacement, the same rows of each column
        values.append(statistic(*[column[sample] for column in columns]))
    interval = np.percentile(values, [2.5, 97.5]).tolist()
    return {name: float(statistic(*columns)), f"{name}_ci95": interval}


def bleu_gap(counts: np.ndarray, others: np.ndarray) -> float:
    return bleu_from_counts(counts) - bleu_from_counts(others)


def per_token(nats: np.ndarray, tokens: np.ndarray) -> float:
    return nats.sum() / tokens.sum()


def label_scores(data: dict, labels: list[str]) -> dict:
    """The group `label`: the answers of the model, of the majority and of the ceiling."""
    gold = data["label"]
    answers = {"": "predicted_label", "majority_": "majority_label", "ceiling_": "ceiling_label"}
    scores = {"n": len(gold)}
    for name, key in answers.items():
        if key in data:
            scores |= share(f"{name}accuracy", gold == data[key])
            f1 = bootstrap(f"{name}macro_f1", lambda g, p: macro_f1(g, p, labels), gold, data[key])
            scores |= f1
    scores["per_class"] = per_class(gold, data["predicted_label"], labels)
    invalid = [label not in labels for label in data["predicted_label"]]
    return scores | share("invalid", invalid)


def rationale_scores(data: dict, counts: np.ndarray, condition: str) -> dict:
    """One condition of the group `rationale`; `counts` are the `corpus_counts` of its texts."""
    given = f"given_{condition}"
    argues = data[f"argues_{given}"]  # the label that each text argues for, or None
    sentence = list(map(sentence_bleu, data[f"rationale_{given}"], data["rationale"]))
    scores = {"n": len(argues)} | bootstrap("bleu", bleu_from_counts, counts)
    scores |= bootstrap("sentence_bleu", np.mean, np.array(sentence))
    if f"nats_{given}" in data:
        scores |= bootstrap("nll", per_token, data[f"nats_{given}"], data["tokens"])
    scores |= share("argues_given", argues == data[LABEL_KEYS[condition]])
    scores |= share("argues_gold", argues == data["label"])
    if f"ungrounded_{given}" in data:
        scores |= share("grounded", [not facts for facts in data[f"ungrounded_{given}"]])
    return scores


def exposure_scores(data: dict, counts: dict[str, np.ndarray]) -> dict:
    """The group `exposure`: the cost of the predicted label, the following of a flipped one."""
    scores = bootstrap("bleu_gap", bleu_gap, counts["gold"], counts["predicted"])
    cost = data["nats_given_predicted"] - data["nats_given_gold"]
    scores |= bootstrap("nll_gap", per_token, cost, data["tokens"])
    differs = data["flipped_label"] != data["predicted_label"]  # else it may argue for its own
    followed = data["argues_given_flipped"] == data["flipped_label"]
    scores["following_n"] = int(differs.sum())
    if differs.any():
        scores |= share("following", followed[differs])
    if "ceiling" in counts:
        scores |= bootstrap("ceiling_bleu_gap", bleu_gap, counts["ceiling_gold"], counts["ceiling"])
    return scores


def score(rows: list[dict], labels: list[str]) -> dict:
    """Rows of predictions.jsonl -> the scores of metrics.json."""
    data = {}  # key -> (n,) what the rows hold under it; np.array would unpack lists
    for key in rows[0]:
        data[key] = np.fromiter([row[key] for row in rows], dtype=object)
    result = {"label": label_scores(data, labels)}
    explained = data["rationale"] != ""
    if not explained.any():
        return result
    data = {key: values[explained] for key, values in data.items()}
    counts = {}
    rationale = {}
    for condition in LABEL_KEYS:
        texts = data.get(f"rationale_given_{condition}")
        if texts is not None:
            counts[condition] = corpus_counts(texts, data["rationale"])
            rationale[condition] = rationale_scores(data, counts[condition], condition)
    wrong = data["predicted_label"] != data["label"]
    if "predicted" in rationale and wrong.any():
        part = {key: values[wrong] for key, values in data.items()}
        rationale["predicted_wrong"] = rationale_scores(
            part, counts["predicted"][wrong], "predicted"
        )
    if rationale:
        result["rationale"] = rationale
    if "gold" in rationale:
        result["exposure"] = exposure_scores(data, counts)
    if "reader_label" in data:
        right = data["reader_label"] == data["label"]
        result["reader"] = {"n": len(right)} | share("accuracy", right)
    return result


def show(scores: dict, key: str) -> str:
    """A score, that of BLEU or macro-F1 ± half of its interval; "-" if there is none."""
    if scores.get(key) is None:
        return "-"
    if not key.endswith(("bleu", "macro_f1", "bleu_gap")):
        return f"{scores[key]:.1f}"
    low, high = scores[f"{key}_ci95"]
    return f"{scores[key]:.1f} ±{(high - low) / 2:.1f}"


def table(result: dict) -> str:
    """metrics.json, or `score` and method, data, seed, as text of at most 80 columns."""
    label = result["label"]
    rationale = result.get("rationale", {})
    exposure = result.get("exposure", {})
    head = f"{result['method'][:12]} on {result['data'][-20:]}, seed {result['seed']}"
    lines = [f"{head}; ± is half of a 95 % interval", ""]
    lines.append(f"{'label':24}{'accuracy':>14}{'macro F1':>14}{'no label':>14}")
    names = {"": "predicted", "majority_": "most frequent", "ceiling_": "ceiling (the rule's)"}
    for prefix, name in names.items():
        if f"{prefix}accuracy" in label:
            accuracy = show(label, f"{prefix}accuracy")
            f1 = show(label, f"{prefix}macro_f1")
            lines.append(f"{name:24}{accuracy:>14}{f1:>14}{show(label, prefix + 'invalid'):>14}")
    if rationale:
        lines.append(f"\n{'':38}{'argues for':>14}{'argues for':>14}{'states only':>14}")
        lines.append(f"rationale, given the{'BLEU':>18}    that label    gold label facts of note")
    names = {"gold": "gold label", "predicted": "predicted label", "flipped": "flipped label"}
    names |= {"ceiling_gold": "ceiling, gold label", "ceiling": "ceiling, rule's label"}
    for condition, name in names.items():
        scores = rationale.get(condition, {})
        if condition == "flipped":  # only notes where the model predicts another label
            scores = {**scores, "argues_given": exposure.get("following")}
        line = f"{name:24}"
        for key in ("bleu", "argues_given", "argues_gold", "grounded"):
            line += f"{show(scores, key):>14}"
        if condition in rationale:
            lines.append(line)
    if rationale and "reader" in result and result["data"] != "triage":  # there a checker reads
        right = f"{result['reader']['accuracy']:.1f} % of the gold ones"
        lines.append(f"A classifier reads what they argue for; it is right on {right}.")
    if exposure:
        gap = show(exposure, "bleu_gap")
        lines.append(f"\nThe predicted label in place of the gold one costs {gap} BLEU.")
    if "predicted_wrong" in rationale:
        argues = show(rationale["predicted_wrong"], "argues_given")
        lines.append(f"Where it is wrong, {argues} % of the rationales argue for it.")
    if "following" in exposure:
        argues = show(exposure, "following")
        lines.append(f"Given a flipped label, {argues} % of the rationales argue for that one.")
    return "\n".join(lines)
