"""metrics.py: cases by hand, then the peers (scikit-learn, sacreBLEU, NLTK, bert-score, scipy)."""

import itertools
import json
import math
import random
import re
import time

import numpy as np
import pytest
import torch

import metrics
from metrics import Reader, bertscore, corpus_bleu, macro_f1, per_class, score, sentence_bleu

LABELS = ["home", "doctor", "ED"]
GOLD = ["home", "home", "home", "doctor", "doctor", "ED"]
PREDICTED = ["home", "home", "doctor", "doctor", "I do not know", "home"]


def test_labels_by_hand():
    """Catches precision and recall swapped, a wrong scale, a mean over the labels seen alone."""
    assert metrics.accuracy(GOLD, PREDICTED) == 50
    scores = per_class(GOLD, PREDICTED, LABELS)
    assert scores["doctor"] == {"precision": 50, "recall": 50, "f1": 50, "support": 2}
    assert scores["ED"] == {"precision": 0, "recall": 0, "f1": 0, "support": 1}
    uneven = per_class(["home"] * 4, ["home", "ED", "ED", "ED"], LABELS)["home"]
    assert uneven == {"precision": 100, "recall": 25, "f1": 40, "support": 4}  # 2 * 100 * 25 / 125
    assert macro_f1(GOLD, PREDICTED, LABELS) == pytest.approx((200 / 3 + 50) / 3)
    assert macro_f1(GOLD, PREDICTED, [*LABELS, "never"]) == pytest.approx((200 / 3 + 50) / 4)


def test_labels_equal_scikit_learn():
    """Catches any difference from the peer: labels never gold or never predicted, invalid ones."""
    peer = pytest.importorskip("sklearn.metrics").precision_recall_fscore_support
    rng = random.Random(0)
    for _ in range(200):
        names = [f"label {i}" for i in range(rng.randint(1, 7))]
        gold = rng.choices(names, k=rng.randint(1, 60))
        guesses = rng.choices([*names, "invalid", "", "Label 0"], k=len(gold))
        predicted = [rng.choice(pair) for pair in zip(gold, guesses, strict=True)]
        expected = np.array(peer(gold, predicted, labels=names, zero_division=0)) * 100
        scores = per_class(gold, predicted, names)
        for i, key in enumerate(["precision", "recall", "f1"]):
            assert [scores[name][key] for name in names] == pytest.approx(expected[i].tolist())
        assert macro_f1(gold, predicted, names) == pytest.approx(expected[2].mean())


TOKENS = {
    "1,000.5 and a 3.5-day (2, 3.)": "1,000.5 and a 3.5 - day ( 2 , 3 . )",
    "x-ray .5 a.b &lt;b&gt; &amp; &quot;q&quot; a/b 5.": 'x-ray . 5 a . b < b > & " q " a / b 5 .',
    "one\ntwo, <skipped>hyphen-\nated \n": "one two , hyphenated",
}


def test_tokens_and_counts_by_hand():
    """Catches numbers torn apart, entities and line ends kept, matches that are not clipped."""
    for text, tokens in TOKENS.items():
        assert metrics.tokenize_13a(text) == tokens.split()
    counts = metrics.bleu_counts("the the the the the the the", "the cat is on the mat")
    assert counts == [2, 7, 0, 6, 0, 5, 0, 4, 7, 6]


def test_bleu_by_hand():
    """Catches a wrong mean, smoothing that does not double, a penalty inverted, averaged BLEU."""
    value = (2 / 4 * (1 / 2) / 3 * (1 / 4) / 2 * (1 / 8) / 1) ** 0.25
    assert corpus_bleu(["a x b y"], ["b p q a"]) == pytest.approx(100 * value)
    long, short = "a b c d e f g h", "a b c d e f"
    assert corpus_bleu([short], [long]) == pytest.approx(100 * math.exp(1 - 8 / 6))
    assert corpus_bleu([long], [short]) == pytest.approx(100 * (3 * 4 / 8 / 7) ** 0.25)
    value = (8 / 9 * 5 / 7 * 2 / 5 * 1 / 3) ** 0.25
    pooled = corpus_bleu(["a b c d", "a b x c d"], ["a b c d", "a b y c d"])
    assert pooled == pytest.approx(100 * value)
    assert corpus_bleu([], []) == corpus_bleu([""], ["a b c d"]) == corpus_bleu(["a b"], [""]) == 0
    assert corpus_bleu(["a b c"], ["a b c"]) == 0  # no 4-gram, as in sacreBLEU
    with pytest.raises(ValueError):
        corpus_bleu(["a"], ["a", "b"])
    value = (3 / 4 * 1 / 3 * (math.log(4) / 10) / 2 * (math.log(4) / 20) / 1) ** 0.25
    assert sentence_bleu("a B x D", "A b c d") == pytest.approx(100 * value)  # in lower case
    assert sentence_bleu("a b", "c") == sentence_bleu("", "c") == 0


WORDS = (
    "the a Go to ED now pain 3 3.5 1,000 1,000.50 24-hour 2-3 -3 .5 5. 5, 10% $3 7-, 8.- 9,x x,9 "
    "3.,4 1-,2 , . ... !!! --- ?! (see) [x] {y} a/b don't dogs' ''q'' #1 @home _u_ ~ ` ^ | \\ * = "
    '; -lead "quoted" “quoted” &quot;no&quot; &lt;b&gt; &amp; &amp;quot; &lt;skipped&gt; &quot &; '
    "& &#39; &QUOT; &l<skipped>t; <skipped> <SKIPPED> é e\u0301 发。 ３．５ ٣,٥ ½,² حمى, 🤒,🤒 "
    "… wrap- -\n-\n --\n <skip-\nped> 3-\n4 a\n.b \n a\u00a0b 3\u00a0,5 \u200b, a\u2028b -\u2028 "
    "tab\tbed a\x1cb 5\x1e, a\x85b a\x0bb a\r\nb -\r\n a\x00b İ,"
).split(" ")


def nasty_pairs(n: int, seed: int) -> list[tuple[str, str]]:
    """Hypothesis and reference of few, nasty words, the one often an edit of the other."""
    rng = random.Random(seed)
    pairs = []
    for _ in range(n):
        glue = rng.choice([" ", " ", " ", "", "\n", "-\n", "  ", "\u2028"])
        length = rng.choice([0, 1, 2, 3, 4, 5, 8, 21])
        words = rng.choices(rng.choice([WORDS, WORDS[:12]]), k=length)
        keep = rng.choice([0, 0.8, 0.8, 1])
        edited = [word if rng.random() < keep else rng.choice(WORDS) for word in words]
        pairs.append((glue.join(edited), rng.choice(["", " "]) + glue.join(words)))
    return pairs


def test_tokens_and_corpus_bleu_equal_sacrebleu():
    """Catches any difference: tokens beside each of 13,000 characters, pairs alone and pooled."""
    peer = pytest.importorskip("sacrebleu.tokenizers.tokenizer_13a").Tokenizer13a()
    texts = [*WORDS, *itertools.chain(*nasty_pairs(3000, seed=0))]
    for c in map(chr, [*range(0x3100), *range(0xFE00, 0x10000), *range(0x1F600, 0x1F680)]):
        texts.append(f"a{c}a 1{c}1 a{c}1 1{c}a {c} {c}{c} {c}.{c} {c}-{c}")
    for text in texts:
        assert metrics.tokenize_13a(text) == peer(text.rstrip()).split(), repr(text)
    peer = pytest.importorskip("sacrebleu").corpus_bleu
    pairs = nasty_pairs(2000, seed=0)
    for size in (1, 2, 10, 100, 2000):
        for start in range(0, 2000, size):
            texts, references = map(list, zip(*pairs[start : start + size], strict=True))
            expected = peer(texts, [references], force=True).score
            assert corpus_bleu(texts, references) == pytest.approx(expected, abs=1e-6)


def test_sentence_bleu_equals_nltk_method4():
    """Catches any difference from the peer: all texts of up to five words, 2000 nasty pairs."""
    nltk = pytest.importorskip("nltk.translate.bleu_score")
    method4 = nltk.SmoothingFunction().method4
    short = [" ".join(words) for n in range(6) for words in itertools.product("aB", repeat=n)]
    for pair in [*itertools.product(short, short), *nasty_pairs(2000, seed=1)]:
        text, gold = [metrics.tokenize_13a(side.lower()) for side in pair]
        expected = 100 * nltk.sentence_bleu([gold], text, smoothing_function=method4)
        assert sentence_bleu(*pair) == pytest.approx(expected, abs=1e-9), pair


def test_bertscore_by_hand():
    """Catches precision and recall swapped, a match that is not the nearest, a scale of 0-1."""
    east, both = np.array([[1.0, 0.0]]), np.array([[1.0, 0.0], [0.0, 2.0]])
    assert bertscore(east, both) == pytest.approx((100, 50, 200 / 3))  # recall: (1 + 0) / 2
    assert bertscore(both, east) == pytest.approx((50, 100, 200 / 3))
    assert bertscore(east, both, None, np.array([3.0, 1.0]))[1] == pytest.approx(75)
    assert bertscore(east, both[1:]) == bertscore(np.zeros((0, 2)), both) == (0, 0, 0)


def test_bertscore_equals_package():
    """Catches any difference from the peer: cosines of both signs, with and without idf."""
    peer = pytest.importorskip("bert_score.utils").greedy_cos_idf
    rng = np.random.default_rng(0)
    for _ in range(400):
        d = rng.integers(1, 40)
        x = rng.normal(rng.choice([-1, 0, 1]), 1, (rng.integers(3, 25), d))
        y = rng.normal(0.5, 2, (rng.integers(3, 25), d))
        idf = [rng.exponential(size=len(side)) for side in (x, y)]
        ones = [np.ones(len(side)) for side in (x, y)]
        for weights in (ones, idf):
            sides = [y, ones[1], weights[1], x, ones[0], weights[0]]
            sides = [torch.tensor(side[None]) for side in sides]
            expected = 100 * torch.stack(peer(*sides)).numpy()[:, 0]
            assert bertscore(x, y, *weights) == pytest.approx(expected, abs=1e-5)
        assert bertscore(x, y) == pytest.approx(bertscore(x, y, *ones))


def test_reader_by_hand():
    """Catches a missing prior or smoothing, and a wrong total of words."""
    reader = Reader(["a a b", "a", "b", "c c"], ["x", "x", "x", "y"], ["x", "y"])
    assert reader("unseen") == "x"  # the prior alone: 1 + 3 against 1 + 1
    assert reader("C!") == reader("c b") == "y"  # 4 * 1/8 * 3/8 = .19 < 2 * 3/5 * 1/5 = .24
    assert reader("c c b b b") == "y"  # .0033 < .0058, were it not for the smoothing
    assert reader("c b b") == "x"  # .070 > .048
    assert Reader(["", ""], ["y", "y"], ["x", "y"])("a") == "y"


def test_reader_does_not_read_label_names():
    """Catches a reader that goes by the label that is named, or cuts `no` out of `not`."""
    texts = ["home care. fluids, sleep", "sleep", "go to ED now. bleeding", "bleeding, shock"]
    labels = ["home care", "go to ED now"]
    reader = Reader(texts, ["home care"] * 2 + ["go to ED now"] * 2, labels)
    assert reader("Home care, home care, HOME CARE: bleeding") == "go to ED now"
    assert reader("go to ED now: sleep") == "home care"
    assert set(reader.log_words) == {"fluids", "sleep", "bleeding", "shock"}
    reader = Reader(["not known", "yes it does"], ["no", "yes"], ["no", "yes", "yes it"])
    assert set(reader.log_words) == {"not", "known", "does"}


def test_share_equals_scipys_wilson_interval():
    """Catches a wrong z or formula, and an interval without width at 0 and 100 %."""
    binomtest = pytest.importorskip("scipy.stats").binomtest
    for n, hits in [(1, 0), (1, 1), (7, 0), (40, 40), (250, 17), (1000, 812)]:
        expected = binomtest(hits, n).proportion_ci(method="wilson")
        scores = metrics.share("x", np.arange(n) < hits)
        values = [scores["x"], *scores["x_ci95"]]
        assert values == pytest.approx([100 * hits / n, 100 * expected.low, 100 * expected.high])


def test_bootstrap_is_that_of_normal_theory():
    """Catches a wrong level, resamples of the wrong size, a state that others share."""
    values = np.random.default_rng(1).normal(10, 2, 400)
    low, high = metrics.bootstrap("x", np.mean, values)["x_ci95"]
    half = 1.96 * values.std() / 400**0.5
    assert [values.mean() - low, high - values.mean()] == pytest.approx([half, half], abs=0.03)
    np.random.seed(7)
    assert metrics.bootstrap("x", np.mean, values)["x_ci95"] == [low, high]
    scores = metrics.bootstrap("gap", lambda a, b: (b - a).mean(), values // 1, values // 1 + 1)
    assert scores == {"gap": 1, "gap_ci95": [1, 1]}  # the same rows of both columns


def run_rows(n: int, seed: int = 0, labels: list = LABELS) -> list[dict]:
    """A made-up run of r2d on triage: texts of the given label, some words wrong."""
    rng = random.Random(seed)
    rows = []
    for _ in range(n):
        label = rng.choice(labels)
        row = {"question": "q", "label": label, "majority_label": labels[0], "tokens": 7}
        row["predicted_label"] = label if rng.random() < 0.7 else rng.choice([*labels, "invalid"])
        row["flipped_label"] = rng.choice([other for other in labels if other != label])
        row["ceiling_label"] = label if rng.random() < 0.8 else rng.choice(labels)
        row["reader_label"] = rng.choice([label, label, labels[0]])
        reason = rng.choices(["pain", "fever", "of", "and", "mild"], k=12)
        row["rationale"] = " ".join(reason) + f" so {label}"
        for condition, key in metrics.CONDITIONS.items():
            given = row[key] if rng.random() < 0.8 else row["predicted_label"]
            words = [word if rng.random() < 0.9 else "pain" for word in reason]
            row[f"rationale_given_{condition}"] = " ".join(words) + f" so {given}"
            row[f"argues_given_{condition}"] = rng.choice([given, given, None])
            row[f"ungrounded_given_{condition}"] = rng.choice([[], [], ["fact"]])
            row[f"nats_given_{condition}"] = rng.random() + (row[key] != label)
        rows.append(row)
    return rows


def without(rows: list[dict], words: str) -> list[dict]:
    """The rows without the keys in which this pattern is found."""
    return [{key: row[key] for key in row if not re.search(words, key)} for row in rows]


def fill(rows: list[dict], **columns: list) -> None:
    for key, values in columns.items():
        for row, value in zip(rows, values, strict=True):
            row[key] = value


def test_score_by_hand():
    """Catches given and gold swapped, a scale of 0-1, a mean of nats per token, an inverted gap."""
    rows = run_rows(4)
    golds = ["it is so mild", "it is so bad", "see one in a day", "all is so well"]
    texts = [text + " x" for text in golds]
    fill(rows, label=["home", "ED", "doctor", "home"], predicted_label=["home", "ED", "ED", "?"])
    fill(rows, majority_label=["home"] * 4, ceiling_label=["home", "ED", "doctor", "ED"])
    fill(rows, reader_label=["ED"] * 4)
    fill(rows, rationale=golds, rationale_given_gold=golds, rationale_given_predicted=texts)
    fill(rows, argues_given_predicted=["ED"] * 4, ungrounded_given_predicted=[["x"], [], [], []])
    fill(rows, nats_given_gold=[2.0] * 4, nats_given_predicted=[13.0, 3, 3, 3], tokens=[8, 4, 4, 4])
    result = score(rows, LABELS)
    label = result["label"]
    assert label["n"] == 4 and label["accuracy"] == 50 and label["invalid"] == 25
    assert label["majority_accuracy"] == 50 and label["ceiling_accuracy"] == 75
    assert label["macro_f1"] == pytest.approx((200 / 3 + 200 / 3 + 0) / 3)
    assert label["ceiling_macro_f1"] == pytest.approx((200 / 3 + 200 / 3 + 100) / 3)
    predicted = result["rationale"]["predicted"]
    assert predicted["n"] == 4 and predicted["nll"] == (13 + 9) / 20
    assert predicted["argues_given"] == 50 and predicted["argues_gold"] == 25
    assert predicted["grounded"] == 75 and predicted["bleu"] == corpus_bleu(texts, golds)
    assert predicted["sentence_bleu"] == np.mean(list(map(sentence_bleu, texts, golds)))
    wrong = result["rationale"]["predicted_wrong"]
    assert wrong["n"] == 2 and wrong["argues_given"] == 50 and wrong["nll"] == 6 / 8
    assert result["exposure"]["bleu_gap"] == pytest.approx(100 - predicted["bleu"]) != 0
    assert result["exposure"]["nll_gap"] == (11 + 3) / 20
    assert result["reader"]["n"] == 4 and result["reader"]["accuracy"] == 25


def test_following_leaves_out_agreement_by_chance():
    """Catches notes whose flipped label is the model's own: it argues for that unasked."""
    rows = run_rows(4)
    fill(rows, flipped_label=["ED", "ED", "doctor", "home"], predicted_label=["ED", *["home"] * 3])
    fill(rows, argues_given_flipped=["ED", "ED", "home", "home"])
    exposure = score(rows, LABELS)["exposure"]
    assert exposure["following_n"] == 2 and exposure["following"] == 50
    assert "following" not in score(rows[:1], LABELS)["exposure"]


def test_gaps_are_paired_by_brute_force():
    """Catches gaps whose two sides are drawn apart, of wrong conditions or with a wrong sign."""
    rows = run_rows(7)
    exposure = score(rows, LABELS)["exposure"]
    rng = np.random.default_rng(0)
    gaps = {"bleu_gap": [], "ceiling_bleu_gap": [], "nll_gap": []}
    for _ in range(1000):
        sample = [rows[i] for i in rng.integers(0, 7, 7)]
        golds = [row["rationale"] for row in sample]
        bleu = {}
        for condition in ("gold", "predicted", "ceiling_gold", "ceiling"):
            texts = [row[f"rationale_given_{condition}"] for row in sample]
            bleu[condition] = corpus_bleu(texts, golds)
        gaps["bleu_gap"].append(bleu["gold"] - bleu["predicted"])
        gaps["ceiling_bleu_gap"].append(bleu["ceiling_gold"] - bleu["ceiling"])
        more = [row["nats_given_predicted"] - row["nats_given_gold"] for row in sample]
        gaps["nll_gap"].append(sum(more) / (7 * 7))
    for name, values in gaps.items():
        expected = np.percentile(values, [2.5, 97.5]).tolist()
        assert exposure[f"{name}_ci95"] == pytest.approx(expected)
    first = json.dumps(exposure)  # plain JSON, and the same to the bit whatever others drew
    np.random.seed(7)
    assert json.dumps(score(rows, LABELS)["exposure"]) == first


def test_a_row_without_a_rationale_counts_for_its_label_alone():
    """Catches an empty reference that is scored, or dropped from the accuracy."""
    rows = run_rows(30)
    bare = [row | {"rationale": "", "predicted_label": "ED"} for row in rows[:10]]
    result = score(bare + rows, LABELS)
    assert result.pop("label")["n"] == 40
    alone = score(rows, LABELS)
    assert result == {group: alone[group] for group in ("rationale", "exposure", "reader")}


def test_a_thousand_labels_are_quick():
    """Catches work that grows with labels times words: 10,000 rationales under 1,000 labels."""
    rng = random.Random(0)
    labels = [f"refer to clinic {i} within {i % 30} days" for i in range(1000)]
    words = [f"word{i}" for i in range(3000)]
    texts = [" ".join(rng.choices(words, k=25)) for _ in range(10_000)]
    gold = [labels[i % 1000] for i in range(10_000)]
    start = time.process_time()
    reader = Reader([f"{t}, so {g}" for t, g in zip(texts, gold, strict=True)], gold, labels)
    assert [reader(text) for text in texts[:300]] == gold[:300]
    score(run_rows(300, labels=labels), labels)
    assert time.process_time() - start < 60


def printed(rows: list[dict], **header: object) -> list[str]:
    run = {"method": "r2d", "data": "triage", "seed": 0, "updates": 9} | header
    numbers = json.dumps(run | score(rows, LABELS))  # as metrics.json has them
    return metrics.table(json.loads(numbers)).split("\n")


def test_what_the_rows_lack_is_absent():
    """Catches made-up scores for other systems: sft, an LLM; nothing explained; all right."""
    rows = run_rows(30)
    sft = without(rows, "_gold|given_predicted|flipped|reader")
    llm = without(rows, "gold|flipped|ceiling|nats|tokens|ungrounded")
    bare = [row | {"rationale": ""} for row in rows]
    assert set(score(sft, LABELS)["rationale"]) == {"ceiling"}
    result = score(llm, LABELS)
    assert set(result) == {"label", "rationale", "reader"}
    assert "ceiling_accuracy" not in result["label"]
    assert not {"nll", "grounded"} & set(result["rationale"]["predicted"])
    for nothing in (bare, without(rows, "given|reader")):
        assert list(score(nothing, LABELS)) == ["label"]
    for lines in (printed(sft), printed(llm, data="x.csv"), printed(bare)):
        assert "no exposure gap, no following" in lines[-1] and "costs" not in str(lines)
    fill(rows, predicted_label=[row["label"] for row in rows])
    assert "predicted_wrong" not in score(rows, LABELS)["rationale"]


def test_table_fits_100_columns_whatever_the_data():
    """Catches a line that breaks in a terminal: long names, one row, wide intervals, high nll."""
    rows = run_rows(2) + [row | {"nats_given_gold": 600.0} for row in run_rows(2)]
    long = {"method": "m" * 200, "data": "/a/long/path" * 20, "seed": 10**9}
    cases = [(rows, {}), (rows[:1], long), (rows[-1:], long), (run_rows(50), long)]
    for some, header in [*cases, (rows * 30, {"data": "x"})]:
        for line in printed(some, **header):
            assert len(line) <= 100, line
            assert not re.search(r"\d±|\.\d+\.", line), line  # two cells in one


def test_table_says_what_happened():
    """Catches a row, a number or a sentence that is missing or another's."""
    rows = run_rows(50)
    result = score(rows, LABELS)
    *lines, reader, cost, wrong, followed = printed(rows)
    names = [line.split("  ")[0] for line in lines]
    assert names[3:6] == ["model", "majority", "ceiling"]
    assert names[8:] == [name.replace("_", " ") for name in result["rationale"]]
    exposure, of_wrong = result["exposure"], result["rationale"]["predicted_wrong"]
    half = np.diff(exposure["bleu_gap_ci95"])[0] / 2
    assert f"costs the model {exposure['bleu_gap']:.1f} ±{half:.1f} BLEU" in cost
    given, gold = of_wrong["argues_given"], of_wrong["argues_gold"]
    assert f"that label in {given:.1f} %, for gold in {gold:.1f} %" in wrong
    assert f"{exposure['following']:.1f} ±" in followed
    assert f"of {exposure['following_n']} notes" in followed
    assert "checker" in reader and "a reader, right on" in printed(rows, data="x.csv")[-4]
