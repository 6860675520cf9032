"""Scores, 0-100 (nll: nats per token): predictions.jsonl -> `score` -> metrics.json -> `table`.
Peers with the same numbers: scikit-learn, sacreBLEU, NLTK, bert-score, scipy."""

import math
import re
from collections import Counter, defaultdict
from collections.abc import Callable
from functools import partial

import numpy as np

CONDITIONS = {"gold": "label", "predicted": "predicted_label", "flipped": "flipped_label"}
CONDITIONS |= {"ceiling_gold": "label", "ceiling": "ceiling_label"}  # of the label in the prompt


def accuracy(gold: list[str], predicted: list[str]) -> float:
    """Share of labels that are right, 0-100."""
    return 100 * sum(g == p for g, p in zip(gold, predicted, strict=True)) / len(gold)


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
    hits = Counter(g for g, p in zip(gold, predicted, strict=True) if g == p)
    seen = Counter([*gold, *predicted])  # support + guesses; without a hit F1 is 0
    return sum(200 * n / seen[label] for label, n in hits.items()) / len(labels)


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


def bleu_counts(hypothesis: str, reference: str) -> list[int]:
    """Ten counts: matches and n-grams for n = 1, then 2, 3, 4; both lengths."""
    tokens = tokenize_13a(hypothesis)
    expected = tokenize_13a(reference)
    counts = []
    for n in range(1, 5):
        found = ngrams(tokens, n)
        clipped = found & ngrams(expected, n)  # at most as often
        counts += [clipped.total(), found.total()]
    return [*counts, len(tokens), len(expected)]


def bleu_from_counts(counts: np.ndarray, smoothing: float = 1.0) -> float:
    """BLEU (Papineni et al. 2002), 0-100, from the `bleu_counts` (n, 10) of n texts."""
    counts = counts.sum(axis=0).tolist()
    if counts[0] == 0 or counts[7] == 0:  # no word matches or no 4-gram
        return 0.0
    log_bleu = min(0.0, 1 - counts[9] / counts[8])  # the penalty for brevity
    for match, total in zip(counts[0:8:2], counts[1:8:2], strict=True):
        if match == 0:  # the k-th 0 counts as smoothing / 2^k
            smoothing /= 2
            match = smoothing
        if match > 0:  # NLTK leaves 0 out
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
    """BLEU of one text, 0-100, as in the paper: lower case, NLTK's smoothing method 4."""
    counts = np.array([bleu_counts(hypothesis.lower(), reference.lower())])
    counts[:, 1:8:2] = np.maximum(counts[:, 1:8:2], 1)  # else 0 / 0 in short texts
    return bleu_from_counts(counts, smoothing=math.log(max(counts[0, 8], 1)) / 5)


def bertscore(
    x: np.ndarray, y: np.ndarray, x_idf: np.ndarray | None = None, y_idf: np.ndarray | None = None
) -> tuple[float, float, float]:
    """BERTScore (Zhang et al. 2020) of x (T, D) for y (S, D): precision, recall, F1, 0-100."""
    if len(x) == 0 or len(y) == 0:
        return 0.0, 0.0, 0.0
    x = x / np.linalg.norm(x, axis=1, keepdims=True)
    y = y / np.linalg.norm(y, axis=1, keepdims=True)
    cosine = x @ y.T  # (T, D) x (D, S) -> (T, S)
    precision = 100 * float(np.average(cosine.max(axis=1), weights=x_idf))
    recall = 100 * float(np.average(cosine.max(axis=0), weights=y_idf))
    f1 = 2 * precision * recall / (precision + recall) if precision + recall else 0.0
    return precision, recall, f1


class Reader:
    """Which label does a text argue for? Naive Bayes over words, the labels' names masked."""

    def __init__(self, rationales: list[str], gold: list[str], labels: list[str]):
        self.labels = list(labels)
        self.names = sorted(map(str.lower, labels), key=len, reverse=True)
        texts_of = np.ones(len(labels))  # add-one smoothing, here and for each word
        times = defaultdict(lambda: np.ones(len(labels)))  # word -> how often under each label
        for text, label in zip(rationales, gold, strict=True):
            i = self.labels.index(label)
            texts_of[i] += 1
            for word in self.words(text):
                times[word][i] += 1
        self.log_prior = np.log(texts_of)
        words_of = sum(times.values())
        self.log_words = {word: np.log(n / words_of) for word, n in times.items()}

    def words(self, text: str) -> list[str]:
        """The words of a text without the names of the labels."""
        text = text.lower()
        for name in self.names:  # the longest first: "not urgent" before "urgent"
            if name in text:
                text = re.sub(rf"(?<!\w){re.escape(name)}(?!\w)", " ", text)
        return re.findall(r"\w+", text)

    def __call__(self, text: str) -> str | None:
        """The most probable label; None for an empty text."""
        scores = self.log_prior.copy()
        for word in self.words(text):
            if word in self.log_words:
                scores += self.log_words[word]
        return self.labels[scores.argmax()] if text.strip() else None


def share(name: str, flags: np.ndarray) -> dict:
    """{name: share of true flags, 0-100, name_ci95: its 95 % interval (Wilson 1927)}."""
    n = len(flags)
    p = int(sum(flags)) / n
    z = 1.959963984540054  # the normal distribution's 97.5 % point
    mid = (p + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z * math.sqrt(p * (1 - p) / n + (z / (2 * n)) ** 2) / (1 + z**2 / n)
    return {name: 100 * p, f"{name}_ci95": [100 * max(mid - half, 0), 100 * min(mid + half, 1)]}


def bootstrap(name: str, statistic: Callable, *columns: np.ndarray) -> dict:
    """{name: statistic(*columns), name_ci95: its 95 % percentile interval (Efron 1979)}."""
    n = len(columns[0])
    rng = np.random.default_rng(0)
    values = []
    for _ in range(1000):
        sample = rng.integers(0, n, n)  # with replacement, the same rows of each column
        values.append(statistic(*[column[sample] for column in columns]))
    interval = np.percentile(values, [2.5, 97.5]).tolist()
    return {name: float(statistic(*columns)), f"{name}_ci95": interval}


def bleu_gap(gold: np.ndarray, own: np.ndarray) -> float:
    return bleu_from_counts(gold) - bleu_from_counts(own)


def per_token(nats: np.ndarray, tokens: np.ndarray) -> float:
    return nats.sum() / tokens.sum()


def label_scores(data: dict, labels: list[str]) -> dict:
    """The group `label`: the answers of the model, of the majority and of the ceiling."""
    gold = data["label"]
    answers = {"": "predicted_label", "majority_": "majority_label", "ceiling_": "ceiling_label"}
    scores = {"n": len(gold)}
    f1 = partial(macro_f1, labels=labels)
    for name, key in answers.items():
        if key in data:
            scores |= share(f"{name}accuracy", gold == data[key])
            scores |= bootstrap(f"{name}macro_f1", f1, gold, data[key])
    scores["per_class"] = per_class(gold, data["predicted_label"], labels)
    invalid = [label not in labels for label in data["predicted_label"]]
    return scores | share("invalid", invalid)


def rationale_scores(data: dict, condition: str) -> dict:
    """One condition of the group `rationale`."""
    given = f"given_{condition}"
    argues = data[f"argues_{given}"]
    sentence = list(map(sentence_bleu, data[f"rationale_{given}"], data["rationale"]))
    scores = {"n": len(argues)} | bootstrap("bleu", bleu_from_counts, data[f"counts_{given}"])
    scores |= bootstrap("sentence_bleu", np.mean, np.array(sentence))
    if f"nats_{given}" in data:
        scores |= bootstrap("nll", per_token, data[f"nats_{given}"], data["tokens"])
    scores |= share("argues_given", argues == data[CONDITIONS[condition]])
    scores |= share("argues_gold", argues == data["label"])
    if f"ungrounded_{given}" in data:
        scores |= share("grounded", [not facts for facts in data[f"ungrounded_{given}"]])
    return scores


def exposure_scores(data: dict) -> dict:
    """The group `exposure`: the cost of the own label, the following of a flipped one."""
    gold = data["counts_given_gold"]
    scores = bootstrap("bleu_gap", bleu_gap, gold, data["counts_given_predicted"])
    cost = data["nats_given_predicted"] - data["nats_given_gold"]
    scores |= bootstrap("nll_gap", per_token, cost, data["tokens"])
    asked = data["flipped_label"] != data["predicted_label"]  # else it agrees anyway
    followed = data["argues_given_flipped"] == data["flipped_label"]
    scores["following_n"] = int(asked.sum())
    if asked.any():
        scores |= share("following", followed[asked])
    if "counts_given_ceiling" in data:
        gold = data["counts_given_ceiling_gold"]
        scores |= bootstrap("ceiling_bleu_gap", bleu_gap, gold, data["counts_given_ceiling"])
    return scores


def score(rows: list[dict], labels: list[str]) -> dict:
    """Rows of predictions.jsonl -> the scores of metrics.json."""
    data = {}  # key -> (n,) what the rows hold under it
    for key in rows[0]:
        data[key] = np.fromiter([row[key] for row in rows], dtype=object)
    result = {"label": label_scores(data, labels)}
    explained = data["rationale"] != ""
    if not explained.any():
        return result
    data = {key: values[explained] for key, values in data.items()}
    rationale = {}
    for condition in CONDITIONS:
        texts = data.get(f"rationale_given_{condition}")
        if texts is not None:
            data[f"counts_given_{condition}"] = corpus_counts(texts, data["rationale"])
            rationale[condition] = rationale_scores(data, condition)
    wrong = data["predicted_label"] != data["label"]
    if "predicted" in rationale and wrong.any():
        subset = {key: values[wrong] for key, values in data.items()}
        rationale["predicted_wrong"] = rationale_scores(subset, "predicted")
    if rationale:
        result["rationale"] = rationale
    if "gold" in rationale:
        result["exposure"] = exposure_scores(data)
    if "reader_label" in data:
        right = data["reader_label"] == data["label"]
        result["reader"] = {"n": len(right)} | share("accuracy", right)
    return result


def show(scores: dict, key: str) -> str:
    """A score ± half of its interval, "-" if there is no score."""
    if key not in scores:
        return "-"
    digits = 3 if key.startswith("nll") and abs(scores[key]) < 10 else 1
    low, high = scores[f"{key}_ci95"]
    return f"{scores[key]:.{digits}f} ±{(high - low) / 2:.{digits}f}"


def line(name: str, scores: dict, keys: list[str]) -> str:
    text = name.replace("_", " ").ljust(15) + str(scores["n"]).rjust(6)
    for key in keys:
        text += show(scores, key).rjust(13)
    return text


def table(result: dict) -> str:
    """metrics.json, or `score` and method, data, seed, as text of at most 100 columns."""
    label = result["label"]
    rationale, exposure = result.get("rationale", {}), result.get("exposure", {})
    keys = ["bleu", "sentence_bleu", "nll", "argues_given", "argues_gold", "grounded"]
    lines = [f"{result['method'][:20]} on {result['data'][-50:]}, seed {result['seed']}", ""]
    lines.append("label               n     accuracy     macro f1      invalid")
    lines.append(line("model", label, ["accuracy", "macro_f1", "invalid"]))
    lines.append(line("majority", label, ["majority_accuracy", "majority_macro_f1"]))
    if "ceiling_accuracy" in label:
        lines.append(line("ceiling", label, ["ceiling_accuracy", "ceiling_macro_f1"]))
    if rationale:
        header = "n        bleu sentence bleu          nll argues given  argues gold     grounded"
        lines.append(f"\nrationale given     {header}")
    for name, scores in rationale.items():
        lines.append(line(name, scores, keys))
    if result["data"] == "triage":
        lines.append("argues, grounded: read by an exact checker")
    elif "reader" in result:
        right = show(result["reader"], "accuracy")
        lines.append(f"argues: read by a reader, right on {right} % of gold rationales")
    if exposure:
        cost = f"{show(exposure, 'bleu_gap')} BLEU, {show(exposure, 'nll_gap')} nats per token"
        lines.append(f"Its own label in place of gold costs the model {cost}.")
    if "predicted_wrong" in rationale:
        wrong = rationale["predicted_wrong"]
        says = f"{wrong['argues_given']:.1f} %, for gold in {wrong['argues_gold']:.1f} %"
        lines.append(f"Where its own label is wrong, its text argues for that label in {says}.")
    if "following" in exposure:
        says = f"{show(exposure, 'following')} % of {exposure['following_n']} notes"
        lines.append(f"Given a flipped label, its text argues for that label in {says}.")
    if not exposure:
        lines.append("No text was given the gold label: no exposure gap, no following.")
    return "\n".join(lines)
