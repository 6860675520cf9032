"""Scores, written out: accuracy, macro-F1, BLEU, BERTScore, the independent reader, intervals; and a client for LLMs.

Text in, numbers out. Every score is on a 0-100 scale unless its name says nats; intervals are 95 % and come from
resampling the examples. Each function agrees with its well-known peer (scikit-learn, sacreBLEU, NLTK, bert-score); the
tests compare them.
"""

import contextlib
import http.client
import json
import math
import os
import re
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.error import HTTPError

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
        if match == 0:
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
    optional weights (T,), (S,) are the idf of the tokens. A text without tokens, or all of weight 0, scores 0.
    """
    weights = [w for w in (hypothesis_weights, reference_weights) if w is not None]
    if not (len(hypothesis) and len(reference) and all(w.any() for w in weights)):
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


def mean_over_seeds(values: Sequence[float]) -> dict[str, float | list[float] | None]:
    """Mean of one number per seed, its 95 % interval and the two-sided p of a true mean of 0 (Student's t).

    For differences between two methods on the same seeds this is the paired t-test. nan is a seed without this number;
    one seed has no interval and none at all no mean: None.
    """
    values = [value for value in values if not math.isnan(value)]
    n, mean = len(values), float(np.mean(values)) if values else None
    if n < 2:
        return {"mean": mean, "ci95": None, "p": None}
    error = float(np.std(values, ddof=1)) / math.sqrt(n)
    angle = np.linspace(0, math.pi / 2, 10001)  # t = sqrt(n - 1) tan(angle) turns Student's density into a cosine power
    area = np.cumsum(np.cos(angle[1:]) ** (n - 2) + np.cos(angle[:-1]) ** (n - 2))
    inside = np.concatenate([[0], area / area[-1]])  # P(|T| < t)
    half = error * math.sqrt(n - 1) * math.tan(np.interp(0.95, inside, angle))
    p = 1 - float(np.interp(math.atan2(abs(mean), error * math.sqrt(n - 1)), angle, inside))
    return {"mean": mean, "ci95": [mean - half, mean + half], "p": p}


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


# ---------------------------------------------------------------------------------------------------------------------
# Large language models, optional: one client, for a judge of rationales and for a zero-shot baseline.


class NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *arguments: object) -> None:  # would hand the key to another host
        return None


class Chat:
    """Any OpenAI-compatible chat endpoint: temperature 0, retries with back-off, every answer kept in a file.

    The key comes from the environment variable R2D_API_KEY; it is sent, and never printed or stored. An answer stands
    in the file `cache` (a JSON line each) before it is used, so a run that was interrupted pays once.
    """

    def __init__(self, url: str, model: str, cache: Path, timeout: float = 60, tries: int = 6, pause: float = 1):
        """Seconds: `timeout`, and `pause` after the first failure, doubled after each. Raises ConnectionError."""
        self.url = url.rstrip("/").removesuffix("/chat/completions") + "/chat/completions"
        self.model, self.cache, self.timeout, self.tries, self.pause = model, cache, timeout, tries, pause
        self.key = os.environ.get("R2D_API_KEY", "").strip()
        port = re.fullmatch(r"https?://(?:[\w.-]+|\[[\da-fA-F:]+\])(?::(\d{1,5}))?(?:/[!-?A-~]*)?", url)
        if not port or int(port[1] or 0) > 65535:
            raise ConnectionError(f"{url.split('@')[-1]}: not an endpoint like http://host:port/v1 (no key inside)")
        if not re.fullmatch("[!-~]*", self.key):
            raise ConnectionError("R2D_API_KEY holds a space or a character that no key has; set it again")
        self.opener, self.lock = urllib.request.build_opener(NoRedirect), threading.Lock()
        self.answers: dict[str, str] = {}
        known = cache.read_text(encoding="utf-8", errors="replace") if cache.exists() else ""
        for line in known.split("\n"):
            with contextlib.suppress(ValueError, TypeError):  # a line that was cut when the run was killed
                asked, prompt, answer = json.loads(line)
                self.answers |= {prompt: answer} if asked == model and isinstance(answer, str) else {}

    def __call__(self, prompts: Sequence[str]) -> Iterator[str]:
        """The answer to each prompt, in order; eight requests at a time. Raises ConnectionError for want of one."""
        open_ones = list(dict.fromkeys(prompt for prompt in prompts if prompt not in self.answers))
        with ThreadPoolExecutor(8) as pool, contextlib.closing(pool.map(self.ask, open_ones)) as arriving:
            for prompt in prompts:
                while prompt not in self.answers:
                    next(arriving)  # in the order asked; raises what the thread raised
                yield self.answers[prompt]

    def ask(self, prompt: str) -> None:
        body = {"model": self.model, "temperature": 0, "messages": [{"role": "user", "content": prompt}]}
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {self.key}"} if self.key else {})
        request = urllib.request.Request(self.url, json.dumps(body).encode(), headers)
        for attempt in range(1, self.tries + 1):
            wait = self.pause * 2 ** (attempt - 1)
            try:
                with self.opener.open(request, timeout=self.timeout) as reply:
                    answer = json.loads(reply.read(10**7))["choices"][0]["message"]["content"]
                break
            except HTTPError as e:
                problem, asked = f"HTTP {e.code}", e.headers.get("Retry-After", "")
                wait = max(wait, min(int(asked[:9]), 60)) if asked.isdecimal() else wait
                may_pass = e.code in (408, 429) or e.code >= 500
            except OSError as e:
                problem, may_pass = str(getattr(e, "reason", e)) or type(e).__name__, True
            except (http.client.HTTPException, ValueError, LookupError, TypeError, RecursionError) as e:
                problem, may_pass = f"what came back is no chat completion ({type(e).__name__})", True
            if attempt == self.tries or not may_pass:
                remedy = "check the URL, the model and R2D_API_KEY, then give the same command again"
                kept = f"no answer in {self.cache} is asked for twice"
                raise ConnectionError(f"{self.url}: {problem}; {remedy}: {kept}")
            time.sleep(wait)
        answer = answer if isinstance(answer, str) else ""  # null: it says nothing
        answer = answer.replace(self.key, "(key)") if len(self.key) > 7 else answer  # should the endpoint echo it
        with self.lock, open(self.cache, "a", encoding="utf-8", newline="\n") as f:
            f.write("\n" + json.dumps([self.model, prompt, answer]))  # a new line first: the last one may be cut
            self.answers[prompt] = answer


def json_answer(answer: str) -> dict:
    """The JSON object in an answer, also within a sentence or a ```json block; {} if there is none."""
    found = re.search(r"\{.*\}", answer, re.DOTALL)
    try:
        record = json.loads(found[0]) if found else {}
    except (ValueError, RecursionError):
        record = {}
    return record if isinstance(record, dict) else {}


ZERO_SHOT = """Read the text, choose one label for it, and explain your choice in one to three sentences.
Labels: {labels}
Answer with JSON alone: {{"label": "one of the labels", "rationale": "your explanation"}}

Text: {question}"""


def zero_shot(chat: Chat, questions: Sequence[str], labels: Sequence[str]) -> Iterator[tuple[str, str]]:
    """What a language model says of each question, untrained: label and rationale.

    The label may differ in case; an answer that holds none is returned whole, as a label that is none.
    """
    names = {label.lower(): label for label in labels}
    prompts = [ZERO_SHOT.format(labels=json.dumps(labels, ensure_ascii=False), question=q) for q in questions]
    for answer in chat(prompts):
        found = json_answer(answer)
        said = (str(found.get(key) or other) for key, other in (("label", answer), ("rationale", "")))
        label, rationale = (text.encode("utf-8", "replace").decode().strip() for text in said)  # no half characters
        yield names.get(label.lower(), label), rationale


JUDGE = """You judge an explanation. Give three grades from 1 (not at all) to 5 (fully):
supports: the explanation argues for the label it was given
grounded: all that the explanation states stands in the note
agrees: the explanation gives the same reasons as the reference
Answer with JSON alone: {{"supports": 1-5, "grounded": 1-5, "agrees": 1-5}}

Note: {question}
Label given: {label}
Explanation: {text}
Reference: {reference}"""
GRADES = ("supports", "grounded", "agrees")


def judge(chat: Chat, rows: Sequence[dict[str, str]]) -> Iterator[list[int] | None]:
    """The grades 1-5 (see JUDGE) of each row {question, label, text, reference}; None for a malformed answer."""
    for answer in chat([JUDGE.format(**row) for row in rows]):
        grades = [json_answer(answer).get(grade) for grade in GRADES]
        yield grades if all(type(grade) is int and 1 <= grade <= 5 for grade in grades) else None


def judge_scores(grades: Sequence[list[int] | None]) -> dict:
    """judge_supports, judge_grounded, judge_agrees: means (1-5), intervals; judge_malformed: share of None, 0-100."""
    valid = [row for row in grades if row]
    scores = {"judge_malformed": 100 * (1 - len(valid) / max(len(grades), 1))}
    for name, column in zip(GRADES, zip(*valid, strict=True), strict=False):
        scores |= mean_and_interval(f"judge_{name}", column)
    return scores
