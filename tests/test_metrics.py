"""metrics.py: the peers (scikit-learn, sacreBLEU, NLTK, scipy), then what has no peer."""

import itertools
import json
import random
import re

import numpy as np
import pytest

import metrics
from metrics import Reader, corpus_bleu, macro_f1, per_class, score, sentence_bleu

LABELS = ["home", "doctor", "ED"]


def test_labels_equal_scikit_learn():
    """Catches any difference from the peer: labels never gold or never predicted, invalid ones;
    precision and recall swapped, a mean over the labels seen alone, a wrong scale."""
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


WORDS = (
    "the a Go to ED now pain 3 3.5 1,000 1,000.50 24-hour 2-3 -3 .5 5. 5, 10% $3 7-, 8.- 9,x x,9 "
    "3.,4 1-,2 , . ... !!! --- ?! (see) [x] {y} a/b don't dogs' ''q'' #1 @home _u_ ~ ` ^ | \\ * = "
    '; -lead "quoted" “quoted” &quot;no&quot; &lt;b&gt; &amp; &amp;quot; &lt;skipped&gt; &quot &; '
    "& &#39; &QUOT; &l<skipped>t; <skipped> <SKIPPED> ３．５ 🤒,🤒 wrap- -\n-\n --\n <skip-\nped> "
    "3-\n4 a\n.b \n a\u00a0b 3\u00a0,5 \u200b, -\u2028 a\r\nb -\r\n İ,"
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
    """Catches any difference: tokens beside each of 13,000 characters, pairs alone and pooled;
    averaged BLEU, matches that are not clipped, smoothing that does not double."""
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
    assert corpus_bleu([], []) == corpus_bleu([""], ["a b c d"]) == corpus_bleu(["a b"], [""]) == 0
    with pytest.raises(ValueError):
        corpus_bleu(["a"], ["a", "b"])


def test_sentence_bleu_equals_nltk_method4():
    """Catches any difference from the peer but the tokens: short texts, 2000 nasty pairs."""
    nltk = pytest.importorskip("nltk.translate.bleu_score")
    method4 = nltk.SmoothingFunction().method4
    short = [" ".join(words) for n in range(6) for words in itertools.product("aB", repeat=n)]
    for pair in [*itertools.product(short, short), *nasty_pairs(2000, seed=1)]:
        text, gold = [metrics.tokenize_13a(side.lower()) for side in pair]
        expected = 100 * nltk.sentence_bleu([gold], text, smoothing_function=method4)
        assert sentence_bleu(*pair) == pytest.approx(expected, abs=1e-9), pair


def test_reader_by_hand():
    """Catches a missing prior or smoothing, a wrong total of words, a verdict without a word."""
    reader = Reader(["a a b", "a", "b", "c c"], ["x", "x", "x", "y"], ["x", "y"])
    for text in ("", "zzz", "...", "x", "Y, x: unseen"):  # a label's name is no evidence
        assert reader(text) is None
    assert reader("zzz a") == "x"
    assert reader("C!") == reader("c b") == "y"  # 4 * 1/8 * 3/8 = .19 < 2 * 3/5 * 1/5 = .24
    assert reader("c c b b b") == "y"  # .0033 < .0058, were it not for the smoothing
    assert reader("c b b") == "x"  # .070 > .048
    assert Reader(["", ""], ["y", "y"], ["x", "y"])("a") is None


def test_reader_does_not_read_label_names():
    """Catches a reader that goes by the label that is named, or cuts `no` out of `not`."""
    labels = ["no", "home", "home care", "go to ED now"]
    texts = ["not known: no", "at home", "home care. fluids, sleep", "go to ED now. bleeding"]
    reader = Reader(texts, labels, labels)
    assert reader("Home care, home care, HOME CARE: bleeding") == "go to ED now"
    assert set(reader.log_words) == {"not", "known", "at", "fluids", "sleep", "bleeding"}


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
        for condition, key in metrics.LABEL_KEYS.items():
            given = row[key] if rng.random() < 0.8 else row["predicted_label"]
            words = [word if rng.random() < 0.9 else "pain" for word in reason]
            row[f"rationale_given_{condition}"] = " ".join(words) + f" so {given}"
            row[f"argues_given_{condition}"] = rng.choice([given, given, None])
            row[f"ungrounded_given_{condition}"] = rng.choice([[], [], ["fact"]])
            if "ceiling" not in condition:
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
    """Catches given and gold swapped, a scale of 0-1, a mean of nats per token, an inverted gap; a
    following of notes whose flipped label is the model's own: it argues for that unasked."""
    rows = run_rows(4)
    golds = ["it is so mild", "it is so bad", "see one in a day", "all is so well"]
    texts = [text + " x" for text in golds]
    fill(rows, label=["home", "ED", "doctor", "home"], predicted_label=["home", "ED", "ED", "?"])
    fill(rows, majority_label=["home"] * 4, ceiling_label=["home", "ED", "doctor", "ED"])
    fill(rows, reader_label=["ED"] * 4)
    fill(rows, rationale=golds, rationale_given_gold=golds, rationale_given_predicted=texts)
    fill(rows, rationale_given_ceiling_gold=golds, rationale_given_ceiling=texts)
    fill(rows, argues_given_predicted=["ED"] * 4, ungrounded_given_predicted=[["x"], [], [], []])
    fill(rows, nats_given_gold=[2.0] * 4, nats_given_predicted=[13.0, 3, 3, 3], tokens=[8, 4, 4, 4])
    fill(rows, flipped_label=["home", "ED", "doctor", "home"])
    fill(rows, argues_given_flipped=["home", "ED", "doctor", "ED"])
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
    assert result["exposure"]["ceiling_bleu_gap"] == result["exposure"]["bleu_gap"]
    assert result["exposure"]["following_n"] == 2 and result["exposure"]["following"] == 50
    assert result["reader"]["n"] == 4 and result["reader"]["accuracy"] == 25
    result = score(rows[:1], LABELS)
    assert "following" not in result["exposure"]
    flipped = next(line for line in printed(result) if line.startswith("flipped label"))
    assert re.split(r"\s{2,}", flipped)[2] == "-"  # "0.0" would be made up


OWN = "ceiling|ungrounded"  # what rows of own data lack, and those of a method:
LACKS = {"r2d": "none", "sft": "given_(gold|predicted|flipped)|tokens|nats"}
LACKS["dss"] = "given_(gold|f)"
LACKS["zeroshot"] = "gold|flipped|ceiling|nats|tokens|majority"  # of notebooks/llm.py


def printed(result: dict, method: str = "r2d", data: str = "triage", seed: int = 0) -> list[str]:
    run = {"method": method, "data": data, "seed": seed}
    return metrics.table(json.loads(json.dumps(run | result))).split("\n")  # as in metrics.json


def test_what_the_rows_lack_is_absent():
    """Catches made-up scores for other systems: sft, an LLM; nothing explained; all right. An
    empty reference that is scored, or dropped from the accuracy."""
    rows = run_rows(30)
    bare = [row | {"rationale": "", "predicted_label": "ED"} for row in rows[:10]]
    result, alone = score(bare + rows, LABELS), score(rows, LABELS)
    assert result["label"]["n"] == 40
    assert result == alone | {"label": result["label"]}
    llm = score(without(rows, f"{LACKS['zeroshot']}|{OWN}"), LABELS)
    assert set(llm) == {"label", "rationale", "reader"}
    assert not {"ceiling_accuracy", "majority_accuracy"} & set(llm["label"])
    assert not {"nll", "grounded"} & set(llm["rationale"]["predicted"])
    sft = score(without(rows, LACKS["sft"]), LABELS)
    assert set(sft["rationale"]) == {"ceiling_gold", "ceiling"}
    for nothing in ([row | {"rationale": ""} for row in rows], without(rows, "given|reader")):
        assert list(score(nothing, LABELS)) == ["label"]
    fill(rows, predicted_label=[row["label"] for row in rows])
    assert "predicted_wrong" not in score(rows, LABELS)["rationale"]


@pytest.mark.parametrize("method", LACKS)
@pytest.mark.parametrize("source", ["triage", "/a/long/path" * 20])
def test_every_table_fits_80_columns(method, source):
    """Catches a line that breaks in a terminal, a sixth number in it, a row too many or few."""
    for rows in (run_rows(1), run_rows(2, seed=3), run_rows(20)):
        rows = without(rows, LACKS[method] if source == "triage" else f"{LACKS[method]}|{OWN}")
        result = score(rows, LABELS)
        lines = printed(result, method=method, data=source, seed=10**6)
        for line in lines:
            assert len(line) <= 80 and len(re.findall(r"(?<!±)\d+\.\d| -(?= |$)", line)) <= 5, line
            assert not re.search(r"\d±|\.\d+\.\d", line), line  # two cells in one
        rationale, exposure = [result.get(group, {}) for group in ("rationale", "exposure")]
        n = len(rationale) + ("bleu_gap" in exposure) + ("following" in exposure)
        n += len([key for key in result["label"] if key.endswith("accuracy")])
        n += bool(rationale) and source != "triage"  # who says what a text argues for
        assert sum(re.search(r"\d\.\d|  -", line) is not None for line in lines) == n, lines


def test_the_table_says_what_happened():
    """Catches a row, a number or a sentence that is missing or another's."""
    result = score(run_rows(50, seed=1), LABELS)
    label, rationale, exposure = [result[group] for group in ("label", "rationale", "exposure")]
    lines = printed(result)

    def cell(scores: dict, key: str) -> str:
        low, high = scores[f"{key}_ci95"]
        half = f" ±{(high - low) / 2:.1f}" if key.endswith(("bleu", "f1", "gap")) else ""
        return f"{scores[key]:.1f}{half}"

    names = {"gold": "gold label", "predicted": "predicted label", "flipped": "flipped label"}
    names |= {"ceiling_gold": "ceiling, gold label", "ceiling": "ceiling, rule's label"}
    keys = ["bleu", "argues_given", "argues_gold", "grounded"]
    for condition, name in names.items():
        row = next(line for line in lines if line.startswith(name))
        expected = [cell(rationale[condition], key) for key in keys]
        if condition == "flipped":  # without the notes where it would say so anyway
            assert expected[1] != cell(exposure, "following")
            expected[1] = cell(exposure, "following")
        assert re.split(r"\s{2,}", row)[1:] == expected
    for prefix, line in zip(["", "majority_", "ceiling_"], lines[3:6], strict=True):
        scores = [cell(label, f"{prefix}{key}") for key in ("accuracy", "macro_f1")]
        assert re.split(r"\s{2,}", line)[1:3] == scores
    assert f" costs {cell(exposure, 'bleu_gap')} BLEU" in lines[-3]
    assert f" {cell(rationale['predicted_wrong'], 'argues_given')} % of" in lines[-2]
    assert f" {cell(exposure, 'following')} % of" in lines[-1]
