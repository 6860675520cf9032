"""metrics.py: hand-computed cases, then the optional peers' numbers (sacreBLEU, NLTK, scikit-learn, bert-score)."""

import itertools
import math
import random

import numpy as np
import pytest
import torch
from torch.nn.utils.rnn import pad_sequence

from metrics import (
    Reader,
    accuracy,
    bertscore,
    bleu_counts,
    bleu_from_counts,
    bootstrap_interval,
    corpus_bleu,
    label_scores,
    macro_f1,
    mean_and_interval,
    mean_over_seeds,
    per_class,
    ratio_and_interval,
    rationale_scores,
    sentence_bleu,
    tokenize_13a,
)

LABELS = ["home", "doctor", "ED"]
GOLD = ["home", "home", "home", "doctor", "doctor", "ED"]
PREDICTED = ["home", "home", "doctor", "doctor", "I do not know", "home"]


# ---------------------------------------------------------------------------------------------------------------------
# Labels.


def test_accuracy_by_hand():
    """Catches a wrong scale or a wrong count: 3 of 6 are right."""
    assert accuracy(GOLD, PREDICTED) == 50


def test_per_class_by_hand():
    """Catches precision and recall swapped: home has 2 hits of 3 guesses and 3 gold, doctor 1 of 2 and 2, ED none."""
    scores = per_class(GOLD, PREDICTED, LABELS)
    assert list(scores) == LABELS
    assert scores["home"] == pytest.approx({"precision": 200 / 3, "recall": 200 / 3, "f1": 200 / 3, "support": 3})
    assert scores["doctor"] == {"precision": 50, "recall": 50, "f1": 50, "support": 2}
    assert scores["ED"] == {"precision": 0, "recall": 0, "f1": 0, "support": 1}
    uneven = per_class(["home"] * 4, ["home", "ED", "ED", "ED"], LABELS)["home"]
    assert uneven == {"precision": 100, "recall": 25, "f1": 40, "support": 4}  # 2 * 100 * 25 / 125


def test_macro_f1_counts_every_label():
    """Catches a mean weighted by support, or over the seen classes only: (66.67 + 50 + 0) / 3, and a fourth label."""
    assert macro_f1(GOLD, PREDICTED, LABELS) == pytest.approx((200 / 3 + 50) / 3)
    assert macro_f1(GOLD, PREDICTED, [*LABELS, "never seen"]) == pytest.approx((200 / 3 + 50) / 4)


def test_invalid_prediction_is_a_miss_but_no_class():
    """Catches an invalid output that counts as right, is dropped from the mean, or becomes a class of its own."""
    scores = label_scores(["home", "ED"], ["home", "nonsense"], ["home", "ED"])
    assert scores["accuracy"] == 50 and scores["invalid"] == 50 and scores["macro_f1"] == 50
    assert list(scores["per_class"]) == ["home", "ED"]
    assert label_scores(GOLD, PREDICTED, LABELS)["invalid"] == pytest.approx(100 / 6)


def test_label_metrics_equal_scikit_learn():
    """Catches any difference from the peer: classes never gold or never predicted, invalid labels, any label order."""
    sklearn = pytest.importorskip("sklearn.metrics")
    rng = random.Random(0)
    for case in range(400):
        n, names = rng.randint(1, 60), [f"label {i}" for i in range(rng.randint(1, 7))]
        gold = rng.choices(rng.sample(names, rng.randint(1, len(names))), k=n)
        guesses = rng.choices(rng.sample([*names, "invalid", "", "Label 0"], rng.randint(1, len(names) + 3)), k=n)
        predicted = [g if rng.random() < 0.5 else p for g, p in zip(gold, guesses, strict=True)]
        rng.shuffle(names)
        scores = per_class(gold, predicted, names)
        kwargs = {"labels": names, "zero_division": 0}
        precision, recall, f1, support = sklearn.precision_recall_fscore_support(gold, predicted, **kwargs)
        assert list(scores) == names
        for key, values in {"precision": precision, "recall": recall, "f1": f1, "support": support / 100}.items():
            assert [scores[name][key] for name in names] == pytest.approx(list(100 * values), abs=1e-9), key
        assert macro_f1(gold, predicted, names) == pytest.approx(100 * f1.mean(), abs=1e-9)
        if case % 10 == 0:  # scikit-learn is slow
            expected = sklearn.f1_score(gold, predicted, average="macro", **kwargs)
            assert macro_f1(gold, predicted, names) == pytest.approx(100 * expected, abs=1e-9)
            assert accuracy(gold, predicted) == pytest.approx(100 * sklearn.accuracy_score(gold, predicted))


# ---------------------------------------------------------------------------------------------------------------------
# BLEU.


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("Go to ED, now.", "Go to ED , now ."),
        ("a 3.5-day fever (39.2)", "a 3.5 - day fever ( 39.2 )"),
        ("1,000.5 and 2, 3.", "1,000.5 and 2 , 3 ."),
        ("x-ray isn't a/b", "x-ray isn't a / b"),
        ("&lt;b&gt; &amp; &quot;q&quot;", '< b > & " q "'),
        ("one\ntwo hyphen-\nated", "one two hyphenated"),
        ("  <skipped> spaced\t out \n", "spaced out"),
        ("5.", "5 ."),
        (".5 a.b ...", ". 5 a . b . . ."),
        ("", ""),
    ],
)
def test_tokenize_13a_table(text, tokens):
    """Catches numbers torn apart, punctuation left on words, entities and line ends kept."""
    assert tokenize_13a(text) == tokens.split()


def test_bleu_counts_by_hand():
    """Catches counts that are not clipped: `the` stands seven times in the hypothesis and twice in the reference."""
    # Papineni's example. Unigrams: 2 of 7 (clipped), bigrams: `the the` is not in the reference, 0 of 6, and so on.
    counts = bleu_counts(["the"] * 7, "the cat is on the mat".split())
    assert counts.tolist() == [2, 0, 0, 0, 7, 6, 5, 4, 7, 6]


def test_corpus_bleu_by_hand():
    """Catches a wrong mean of the precisions: 4/5, 2/4, 1/3 and, smoothed, (1/2)/2; equal lengths, no penalty."""
    assert corpus_bleu(["a b c d e"], ["a b c x e"]) == pytest.approx(100 * (4 / 5 * 2 / 4 * 1 / 3 * 1 / 4) ** 0.25)


def test_corpus_bleu_smooths_each_miss_by_another_half():
    """Catches a smoothing that does not double: no bigram, trigram or 4-gram matches, so 1/2, 1/4 and 1/8 do."""
    value = (2 / 4 * (1 / 2) / 3 * (1 / 4) / 2 * (1 / 8) / 1) ** 0.25
    assert corpus_bleu(["a x b y"], ["b p q a"]) == pytest.approx(100 * value)


def test_brevity_penalty():
    """Catches a penalty that is missing, inverted, or applied to texts that are too long."""
    long, short = "a b c d e f g h", "a b c d e f"
    assert corpus_bleu([short], [long]) == pytest.approx(100 * math.exp(1 - 8 / 6))  # all precisions are 1
    precisions = (6 / 8) * (5 / 7) * (4 / 6) * (3 / 5)
    assert corpus_bleu([long], [short]) == pytest.approx(100 * precisions**0.25)


def test_corpus_bleu_pools_counts():
    """Catches a mean of sentence scores: pooled, 4 + 4 words of 8 match, but 3 + 2 bigrams of 6, and so on."""
    hypotheses, references = ["a b c d", "a b x c d"], ["a b c d", "a b y c d"]
    pooled = 100 * (8 / 9 * 5 / 7 * 2 / 5 * 1 / 3) ** 0.25
    assert corpus_bleu(hypotheses, references) == pytest.approx(pooled)
    alone = [corpus_bleu([h], [r]) for h, r in zip(hypotheses, references, strict=True)]
    assert abs(pooled - sum(alone) / 2) > 1


@pytest.mark.parametrize(
    ("hypotheses", "references", "score"),
    [
        ([""], ["a b c d"], 0),
        (["a b c d"], [""], 0),
        ([], [], 0),
        (["a b c"], ["a b c"], 0),
        (["a b c d"] * 2, ["a b c d"] * 2, 100),
    ],
)
def test_corpus_bleu_of_little_or_no_text(hypotheses, references, score):
    """Catches a division by zero; three words hold no 4-gram and score 0, as in sacreBLEU."""
    assert corpus_bleu(hypotheses, references) == pytest.approx(score)


WORDS = (
    "the a Go to ED now pain fever denies 3 3.5 1,000 1,000.50 1.000,5 24-hour 2-3 -3 3-4 .5 5. 5, 1e-5 10% $3 7-, 8.- "
    "9,x x,9 x.9 3.,4 1-,2 , . ... !!! ,,, --- -- ?! .,. 5... ...5 (see) [x] {y} a/b don't 'tis dogs' ''q'' x-ray #1 "
    '@home _under_ ~ ` ^ | \\ * + = ; : co-operate- -lead "quoted" “quoted” ‘so’ &quot;no&quot; &lt;b&gt; &amp; '
    "&amp;quot; &amp;amp; &amp;lt; &lt;skipped&gt; &quot &lt; &; & &amp &#39; &apos; &QUOT; &l<skipped>t; <skipped> "
    "<skipped <skip<skipped>ped> <SKIPPED> é e\u0301 naïve 日本語 发烧。 ，！？（） ３．５ ٣,٥ ٣-٥ ½,² — – … حمى, "
    "שלום. 🤒 👩\u200d⚕️ 🤒,🤒 wrap- -\n-\n --\n <skip-\nped> 3-\n4 3\n-4 a\n.b \n a\u00a0b 3\u00a0,5 a\u200bb \u200b, "
    "\ufeffa a\u3000b a\u2028b -\u2028 a\u2029b tab\tbed a\x1cb \x1d. 5\x1e, \x1f a\x85b "
    "a\x0bb a\x0cb a\r\nb -\r\n a\x00b"
).split(" ")
SOUP = [*map(chr, range(32, 127)), *"\n\t.,-.,-0123 é中，。\u0301\u00a0\u200b\u2028\x1c", "-\n", "&amp;", "<skipped>"]


def adversarial_pairs(n: int, seed: int) -> list[tuple[str, str]]:
    """Hypothesis and reference from few, nasty words or characters, the one often an edit of the other."""
    rng = random.Random(seed)

    def text() -> str:
        if rng.random() < 0.15:
            return "".join(rng.choices(SOUP, k=rng.randint(0, 40)))
        glue = rng.choice([" ", " ", " ", " ", "", "\n", "-\n", "  ", "\u2028", " \t"])
        words = rng.choices(rng.choice([WORDS, WORDS[:12]]), k=rng.choice([0, 1, 1, 2, 3, 4, 5, 8, 8, 13, 21]))
        return rng.choice(["", "", " ", "\n"]) + glue.join(words) + rng.choice(["", "", " ", "\n", "-\n", "\x1f\u2028"])

    def edited(reference: str) -> str:
        words = reference.split(" ")
        return " ".join(w if rng.random() < 0.8 else rng.choice(["", *WORDS]) for w in words)

    pairs = []
    for _ in range(n):
        reference = text()
        edit = rng.choice([text, lambda r=reference: edited(r), lambda r=reference: edited(r), lambda r=reference: r])
        pairs.append((edit(), reference))
    return pairs


def test_tokens_equal_sacrebleu():
    """Catches a token that differs from the peer's, in nasty texts and beside each of 13,000 characters."""
    peer = pytest.importorskip("sacrebleu.tokenizers.tokenizer_13a").Tokenizer13a()
    texts = [text for pair in adversarial_pairs(3000, seed=0) for text in pair] + WORDS
    for c in map(chr, [*range(0x3100), *range(0xFE00, 0x10000), *range(0x1F600, 0x1F680)]):
        texts.append(f"a{c}a 1{c}1 a{c}1 1{c}a {c} {c}{c} {c}.{c} {c}-{c}")
    for text in texts:
        assert tokenize_13a(text) == peer(text.rstrip()).split(), repr(text)  # BLEU() strips before it tokenizes


def test_corpus_bleu_equals_sacrebleu():
    """Catches any difference from the peer in tokens, clipping, smoothing or penalty: 3000 pairs, alone and pooled."""
    peer, pairs = pytest.importorskip("sacrebleu").corpus_bleu, adversarial_pairs(3000, seed=0)
    for size in (1, 2, 10, 100, 3000):
        for start in range(0, 3000, size):
            hypotheses, references = map(list, zip(*pairs[start : start + size], strict=True))
            expected = peer(hypotheses, [references], force=True).score  # force: no advice on tokenized texts
            assert corpus_bleu(hypotheses, references) == pytest.approx(expected, abs=1e-6), (size, start)


def test_sentence_bleu_equals_nltk_method4():
    """Catches any difference from the peer, on all texts of up to five words out of two and on 2000 nasty pairs."""
    nltk = pytest.importorskip("nltk.translate.bleu_score")
    method4 = nltk.SmoothingFunction().method4
    short = [list(words) for n in range(6) for words in itertools.product("ab", repeat=n)]
    nasty = [[tokenize_13a(text) for text in pair] for pair in adversarial_pairs(2000, seed=1)]
    for hypothesis, reference in [*itertools.product(short, short), *nasty]:
        expected = 100 * nltk.sentence_bleu([reference], hypothesis, smoothing_function=method4)  # 0 for empty texts
        assert sentence_bleu(hypothesis, reference) == pytest.approx(expected, abs=1e-9), (hypothesis, reference)


def test_sentence_bleu_by_hand():
    """Catches a smoothing other than method 4: 3/4, 1/3, then no match: ln 4 / 10 of 2 and ln 4 / 20 of 1."""
    value = (3 / 4 * 1 / 3 * (math.log(4) / 10) / 2 * (math.log(4) / 20) / 1) ** 0.25
    assert sentence_bleu("a b x d".split(), "a b c d".split()) == pytest.approx(100 * value)
    assert sentence_bleu(["a", "b"], ["c"]) == sentence_bleu([], ["c"]) == 0
    # Twice the words in the reference: all precisions are 1, the penalty is exp(1 - 8/4).
    assert sentence_bleu("a b c d".split(), "a b c d e f g h".split()) == pytest.approx(100 * math.exp(-1))


# ---------------------------------------------------------------------------------------------------------------------
# The reader.

HOME = ["home care. fluids and sleep", "sleep is enough", "fluids, then home care"]
EMERGENCY = ["go to ED now. bleeding and shock", "shock is near, go to ed now", "bleeding"]


def test_reader_separates_an_easy_case():
    """Catches labels, priors or likelihoods mixed up."""
    reader = Reader(HOME + EMERGENCY, ["home care"] * 3 + ["go to ED now"] * 3, ["go to ED now", "home care"])
    assert [reader(text) for text in HOME] == ["home care"] * 3
    assert [reader(text) for text in EMERGENCY] == ["go to ED now"] * 3
    assert reader("Much BLEEDING!") == "go to ED now"


def test_reader_does_not_read_label_names():
    """Catches a reader that looks at the named label: it must go by what is said, whatever is named."""
    labels = ["go to ED now", "home care"]
    reader = Reader(HOME + EMERGENCY, ["home care"] * 3 + ["go to ED now"] * 3, labels)
    assert set(reader.column) == {"fluids", "and", "sleep", "is", "enough", "then", "bleeding", "shock", "near"}
    assert reader("Home care, home care, HOME CARE: bleeding") == "go to ED now"
    assert reader("go to ED now, go to ed now: sleep") == "home care"


def test_reader_masks_whole_names_only():
    """Catches a mask that cuts `no` out of `not`, or a short label out of a longer one."""
    reader = Reader(["not known", "yes it does"], ["no", "yes"], ["no", "yes", "yes it"])
    assert set(reader.column) == {"not", "known", "does"}


def test_reader_by_hand():
    """Catches a missing prior or smoothing: with words never seen, only the prior (1 + 3 against 1 + 1) is left."""
    reader = Reader(["a a b", "a", "b", "c c"], ["x", "x", "x", "y"], ["x", "y"])
    assert reader("unseen") == "x"
    # P(c | x) = (0 + 1) / (5 + 3), P(c | y) = (2 + 1) / (2 + 3): 4 * 1/8 = .5 < 2 * 3/5 = 1.2.
    assert reader("c") == "y"
    # Another b and c: 4 * 1/8 * 3/8 = .19 < 2 * 3/5 * 1/5 = .24, but with a second b .070 > .048.
    assert reader("c b") == "y" and reader("c b b") == "x"


# ---------------------------------------------------------------------------------------------------------------------
# Intervals and groups of scores.


def test_interval_is_that_of_normal_theory():
    """Catches a wrong level, resamples of the wrong size, or sampling without replacement."""
    values = np.random.default_rng(1).normal(10, 2, 400)
    low, high = mean_and_interval("x", values)["x_ci95"]
    se = values.std() / 400**0.5
    assert low < values.mean() < high
    assert low == pytest.approx(values.mean() - 1.96 * se, abs=0.25 * se)
    assert high == pytest.approx(values.mean() + 1.96 * se, abs=0.25 * se)


def test_interval_is_the_same_every_time():
    """Catches an interval that depends on the state of a global generator."""
    values = list(range(50))
    first = mean_and_interval("x", values)
    np.random.seed(7)
    random.seed(7)
    assert mean_and_interval("x", values) == first


def test_interval_narrows_with_more_examples():
    """Catches a width that ignores n: four times the examples halve it."""

    def width(n: int) -> float:
        low, high = mean_and_interval("x", [0, 100] * (n // 2))["x_ci95"]
        return high - low

    assert width(400) == pytest.approx(width(100) / 2, rel=0.15)


def test_interval_of_equal_values_has_no_width():
    """Catches rows drawn from outside the examples."""
    assert mean_and_interval("x", [5.0] * 9) == {"x": 5.0, "x_ci95": [5.0, 5.0]}
    assert bootstrap_interval(lambda rows: float(set(rows.tolist()) <= {0, 1, 2}), 3) == [1.0, 1.0]


def test_mean_over_seeds_equals_scipys_t_test():
    """Catches the normal's 1.96 in place of Student's t, n for n - 1, a one-sided p, and nan taken for a number."""
    scipy_stats = pytest.importorskip("scipy.stats")
    rng = np.random.default_rng(0)
    for n in (2, 3, 5, 10, 40):
        values = rng.normal(rng.normal(), 1, n)
        ours, theirs = mean_over_seeds([*values, math.nan]), scipy_stats.ttest_1samp(values, 0)
        assert ours["mean"] == pytest.approx(values.mean()) and ours["p"] == pytest.approx(theirs.pvalue, abs=1e-5)
        assert ours["ci95"] == pytest.approx(list(theirs.confidence_interval(0.95)), rel=1e-4)
    assert mean_over_seeds([3.0]) == {"mean": 3, "ci95": None, "p": None}
    assert mean_over_seeds([math.nan]) == {"mean": None, "ci95": None, "p": None}
    assert mean_over_seeds([1, 1, 1]) == {"mean": 1, "ci95": [1, 1], "p": 0}


def test_ratio_is_of_sums():
    """Catches a mean of ratios: (1 + 30) / (1 + 10) tokens, not (1/1 + 30/10) / 2. No tokens at all give 0."""
    scores = ratio_and_interval("nll", np.array([1.0, 30.0]), np.array([1, 10]))
    assert scores["nll"] == pytest.approx(31 / 11)
    assert scores["nll_ci95"] == pytest.approx([1, 3])  # both examples the first, both the second
    assert ratio_and_interval("nll", np.zeros(2), np.zeros(2))["nll"] == 0


def test_label_scores_keys_and_scale():
    """Catches a renamed key or a score on a 0-1 scale; metrics.json is made from these."""
    scores = label_scores(GOLD, PREDICTED, LABELS)
    assert set(scores) == {
        "n", "accuracy", "accuracy_ci95", "macro_f1", "macro_f1_ci95", "per_class", "invalid", "invalid_ci95",
    }  # fmt: skip
    assert scores["n"] == 6 and scores["accuracy"] == 50
    assert scores["macro_f1"] == pytest.approx(macro_f1(GOLD, PREDICTED, LABELS))
    assert scores["per_class"] == per_class(GOLD, PREDICTED, LABELS)
    perfect = label_scores(GOLD, GOLD, LABELS)
    assert perfect["accuracy"] == perfect["macro_f1"] == 100 and perfect["invalid"] == 0
    assert perfect["accuracy_ci95"] == [100, 100]


def test_macro_f1_interval_is_that_of_macro_f1():
    """Catches a second, faster macro-F1 that differs from the first, above all on invalid predictions."""
    rng = random.Random(0)
    gold, predicted = rng.choices(LABELS, k=80), rng.choices([*LABELS, "invalid"], k=80)
    slow = bootstrap_interval(lambda rows: macro_f1([gold[i] for i in rows], [predicted[i] for i in rows], LABELS), 80)
    assert label_scores(gold, predicted, LABELS)["macro_f1_ci95"] == pytest.approx(slow)


def test_rationale_scores_keys_and_scale():
    """Catches given and gold labels swapped, a renamed key, a score on a 0-1 scale, or a BLEU that is averaged."""
    texts, references = (
        ["it is mild so home", "it is bad so ED", "it is bad"],
        ["it is mild so home", "it is bad so x", "X"],
    )

    def argues(text: str) -> str | None:
        return {"home": "home", "ED": "ED"}.get(text.split()[-1])

    scores = rationale_scores(texts, references, ["home", "doctor", "ED"], ["home", "ED", "ED"], argues)
    names = ("bleu", "sentence_bleu", "argues_given", "argues_gold")
    assert set(scores) == {"n", *names, *(f"{name}_ci95" for name in names)}
    assert scores["n"] == 3
    assert scores["argues_given"] == pytest.approx(100 / 3) and scores["argues_gold"] == pytest.approx(200 / 3)
    assert scores["bleu"] == pytest.approx(corpus_bleu(texts, references))
    low, high = scores["bleu_ci95"]
    assert 0 <= low < scores["bleu"] < high <= 100 + 1e-9


def test_sentence_bleu_ignores_case_and_corpus_bleu_does_not():
    """Catches a lost lower-casing: the paper's sentence BLEU has it, sacreBLEU's default has not."""
    scores = rationale_scores(["GO TO ED NOW"], ["go to ed now"], ["x"], ["x"], lambda text: "x")
    assert scores["sentence_bleu"] == pytest.approx(100) and scores["bleu"] == 0
    assert bleu_from_counts(bleu_counts(["a"] * 5, ["a"] * 5)) == pytest.approx(100)


def test_rationale_scores_of_nothing():
    """Catches a crash or a made-up score where no example has a rationale."""
    assert rationale_scores([], [], [], [], lambda text: None) == {"n": 0}


def test_sides_of_different_length_are_an_error():
    """Catches scores of examples that were paired wrongly."""
    for call in (
        lambda: accuracy(["a"], ["a", "b"]),
        lambda: macro_f1(["a"], ["a", "b"], ["a"]),
        lambda: corpus_bleu(["a"], ["a", "b"]),
        lambda: rationale_scores(["a"], ["a", "b"], ["x"], ["x"], lambda text: "x"),
    ):
        with pytest.raises(ValueError):
            call()


# ---------------------------------------------------------------------------------------------------------------------
# BERTScore.


def test_bertscore_by_hand() -> None:
    """Catches precision and recall swapped, a match that is not the nearest, and a scale of 0-1."""
    east, north, both = [1.0, 0.0], [0.0, 2.0], [3.0, 3.0]  # cosines: east.north 0, both with either 0.7071
    hypothesis, reference = np.array([east]), np.array([east, north])
    assert bertscore(hypothesis, reference) == pytest.approx((100, 50, 200 / 3))  # recall: (1 + 0) / 2
    assert bertscore(reference, hypothesis) == pytest.approx((50, 100, 200 / 3))
    assert bertscore(np.array([both]), reference)[1] == pytest.approx(70.71067811865476)
    weighted = bertscore(hypothesis, reference, None, np.array([3.0, 1.0]))
    assert weighted[1] == pytest.approx(75)  # idf: (3 * 1 + 1 * 0) / 4
    assert bertscore(np.zeros((0, 2)), reference) == bertscore(reference, reference, np.zeros(2)) == (0, 0, 0)


def package_bertscore(batch: list[tuple]) -> np.ndarray:
    """Precision, recall, F1 (B, 3), 0-100, of the bert-score package for [(hypothesis, reference, their weights), ...].

    It pads each side with vectors of no meaning, mask 0 and weight 0, as the package does with [PAD].
    """

    def padded(vectors, weights):
        rows = [torch.tensor(v) for v in vectors]  # copies: the package writes into them
        masks = [torch.ones(len(v)) for v in rows]
        idf = [m.double() if w is None else torch.tensor(w) for m, w in zip(masks, weights, strict=True)]
        return pad_sequence(rows, True, 1.0), pad_sequence(masks, True), pad_sequence(idf, True)

    hypotheses, references, hypothesis_weights, reference_weights = zip(*batch, strict=True)
    match = pytest.importorskip("bert_score.utils").greedy_cos_idf
    scores = match(*padded(references, reference_weights), *padded(hypotheses, hypothesis_weights))
    return 100 * torch.stack(scores, 1).numpy()


def test_bertscore_equals_package_pair_by_pair():
    """Catches any difference from the peer: 600 pairs of all lengths, cosines of both signs, with and without idf."""
    rng, lowest = np.random.default_rng(0), 0.0
    for _ in range(600):
        (n, m), d = rng.integers(1, 25, 2), rng.integers(1, 40)
        hypothesis, reference = rng.normal(rng.choice([-1, 0, 1]), 1, (n, d)), rng.normal(0.5, 2, (m, d))
        weights = [rng.exponential(size=length) if rng.random() < 0.5 else None for length in (n, m)]
        scores = bertscore(hypothesis, reference, *weights)
        (expected,) = package_bertscore([(hypothesis, reference, *weights)])
        first = 2 if 2 in (n, m) else 0  # the package takes two tokens for [CLS] [SEP] alone: only its F1 is right
        assert scores[first:] == pytest.approx(expected[first:], abs=1e-5), (n, m, d)
        lowest = min(lowest, *scores[:2])
    assert lowest < -10


def test_bertscore_equals_package_in_padded_batches():
    """Catches a score that depends on the weights' scale, or where [CLS] and [SEP] count; all cosines are positive."""
    rng = np.random.default_rng(1)
    for _ in range(40):
        size, d = rng.integers(1, 17), rng.integers(2, 40)
        batch = []
        for _ in range(size):
            sides = [rng.random((length, d)) + 0.01 for length in rng.integers(3, 25, 2)]
            weights = [rng.choice([1, 7]) * rng.choice([np.ones(len(v)), rng.exponential(size=len(v))]) for v in sides]
            for w in weights:
                w[[0, -1]] = 0  # [CLS] and [SEP], which may be matched but do not count
            batch.append((*sides, *weights))
        expected = package_bertscore(batch)
        assert np.array([bertscore(*pair) for pair in batch]) == pytest.approx(expected, abs=1e-5)


class WordTokenizer:
    """As much of a tokenizer as get_idf_dict asks for: [CLS], the words' numbers, [SEP]."""

    model_max_length = 512

    def encode(self, text: str, **_) -> list[int]:
        return [0, *map(int, text.split()), 1]


def test_bertscore_equals_package_with_its_own_idf():
    """Catches idf weights of the wrong side or token: the package's own, log((N + 1) / (df + 1))."""
    utils, tokenizer, rng = pytest.importorskip("bert_score.utils"), WordTokenizer(), np.random.default_rng(2)
    zipf = 1 / np.arange(1, 201)
    texts = [rng.choice(np.arange(2, 202), size=rng.integers(3, 30), p=zipf / zipf.sum()) for _ in range(400)]
    hypotheses, references = ([" ".join(map(str, text)) for text in texts[i::2]] for i in range(2))
    idf = utils.get_idf_dict(references, tokenizer, nthreads=0)
    df = sum("2" in text.split() for text in references)  # the most frequent word
    assert idf[2] == pytest.approx(math.log(201 / (df + 1))) and 0 < idf[2] < 1 < idf[-1] == math.log(201)
    vocabulary = rng.random((202, 16)) + 0.01
    batch = []
    for pair in zip(hypotheses, references, strict=True):
        ids = [tokenizer.encode(text) for text in pair]
        vectors = [vocabulary[side] + 0.2 * rng.random((len(side), 16)) for side in ids]  # a word in its context
        batch.append((*vectors, *(np.array([idf[i] for i in side]) for side in ids)))
    scores = np.array([bertscore(*pair) for pair in batch])
    assert scores == pytest.approx(package_bertscore(batch), abs=1e-5)
    assert np.abs(scores - [bertscore(*pair[:2]) for pair in batch]).max() > 0.5  # idf does matter here
