"""What must hold for every input, tried on inputs that hypothesis makes up: readers, tokenizer, batches, scores."""

import csv
import functools
import io
import json
import math
from itertools import pairwise

import numpy as np
import pytest

import data
import metrics
import r2d

pytest.importorskip("hypothesis")
import fuzz
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st

EASY = list(HealthCheck)  # fixtures that last, slow generation: all fine here


def some(n: int) -> settings:
    return settings(derandomize=True, deadline=None, database=None, max_examples=n, suppress_health_check=EASY)


texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)
filled = texts.filter(str.strip)
records = st.fixed_dictionaries({"question": filled, "label": filled, "rationale": texts})
WORDS = [
    "the",
    "a",
    "fever",
    "3-day",
    "1,000.5",
    "E.D.",
    "it's",
    "-",
    "(no)",
    "&amp;",
    "x/y",
    "<b>",
    "é",
    "$5",
    "-\n",
    "?!",
]
sentences = st.lists(st.sampled_from(WORDS), max_size=12).map(" ".join)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory):
    return tmp_path_factory.mktemp("properties")


# ---------------------------------------------------------------------------------------------------------------------
# Readers.


def stripped(rows: list[dict]) -> list[dict]:
    return [{column: row[column].strip() for column in data.COLUMNS} for row in rows]


def read(path, content: bytes) -> list[dict]:
    path.write_bytes(content)
    return [vars(row) for row in data.read_file(path)[0]]


@some(150)
@given(rows=st.lists(records, min_size=1, max_size=4), ascii_only=st.booleans(), indent=st.sampled_from([None, 1]))
def test_json_reads_back_what_was_written(rows, ascii_only, indent, folder):
    """Catches a text that is split, unescaped or stripped within, and a format that is guessed from a text."""
    dump = functools.partial(json.dumps, ensure_ascii=ascii_only)
    for content in ("\n".join(map(dump, rows)), "\ufeff" + "\r\n\n".join(map(dump, rows)), dump(rows, indent=indent)):
        assert read(folder / "d", content.encode()) == stripped(rows)


@some(150)
@given(rows=st.lists(records, min_size=1, max_size=4), end=st.sampled_from(["\n", "\r\n"]), quote=st.booleans())
def test_csv_reads_back_what_was_written(rows, end, quote, folder):
    """Catches quotes, commas, line ends or leading brackets in a text that the reader takes for its own."""
    rows = [{c: text.replace("\0", "").replace("\r", "") for c, text in row.items()} for row in rows]
    assume(all(row["question"].strip() and row["label"].strip() for row in rows))
    out = io.StringIO(newline="")
    writer = csv.DictWriter(
        out, data.COLUMNS, lineterminator=end, quoting=csv.QUOTE_ALL if quote else csv.QUOTE_MINIMAL
    )
    writer.writeheader()
    writer.writerows(rows)
    assert read(folder / "d", out.getvalue().encode()) == stripped(rows)


json_like = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                [*data.COLUMNS, "questions", "body", "type", "snippets", "text", "QUESTION", "CONTEXTS", "1", "a\nb"]
            ),
            inner,
            max_size=4,
        )
    ),
    max_leaves=12,
)


@some(300)
@example(content=b'{"a\\nb": {}}')
@given(content=st.binary(max_size=60) | json_like.map(lambda value: json.dumps(value).encode()))
def test_any_file_is_read_or_refused_in_one_line(content, folder):
    """Catches any exception but InputError, a message of several lines, and texts that cannot be written again."""
    try:
        rows = read(folder / "d", content)
    except data.InputError as e:
        assert str(e) and "\n" not in str(e)
    else:
        assert all(row["question"] and row["label"] for row in rows)
        assert json.dumps(rows, ensure_ascii=False).encode()


def test_fuzz_finds_nothing(tmp_path, capsys):
    """Catches what the readers do with damaged files: tests/fuzz.py on a few hundred, run it on more."""
    assert fuzz.main(["--n", "700", "--seed", "1", "--save", str(tmp_path)]) == 0, capsys.readouterr().err
    assert "700 inputs, 0 failures" in capsys.readouterr().out and not list(tmp_path.iterdir())


def test_fuzz_saves_what_fails(tmp_path, monkeypatch, capsys):
    """Catches a fuzzer that finds nothing because it cannot: another exception must be told, saved and end in 1."""

    class TwoLines(data.InputError):
        def __str__(self):
            return "two\nlines"

    def fails(error):
        def read_file(path):
            raise error

        return read_file

    monkeypatch.setattr(data, "read_file", fails(KeyError("key")))
    assert fuzz.main(["--n", "5", "--save", str(tmp_path)]) == 1
    assert len(list(tmp_path.iterdir())) > 0 and "KeyError" in capsys.readouterr().err
    monkeypatch.setattr(data, "read_file", lambda path: ([data.Example("q\ud800", "a", "")] * 20, None))
    assert fuzz.main(["--n", "5", "--save", str(tmp_path)]) == 1
    monkeypatch.setattr(data, "read_file", fails(TwoLines("")))
    assert fuzz.main(["--n", "5", "--save", str(tmp_path)]) == 1


# ---------------------------------------------------------------------------------------------------------------------
# Tokenizer, prompts, batches.


@functools.cache
def tokenizer() -> data.Tokenizer:
    dataset = data.simulate({"train": 150, "val": 1, "test": 1}, 0, "llm", "llm")
    return data.Tokenizer.train([text for e in dataset.train for text in (e.question, e.rationale, e.label)], 600)


notes = st.text("abcdefghinorstuvy EDC0159.,'-", max_size=60)


@some(300)
@given(text=notes | texts)
def test_tokenizer_gives_the_text_back(text):
    """Catches any letter that is lost or changed; SentencePiece's own mark for a space comes back as a space."""
    ids = tokenizer().encode(text)
    assert tokenizer().decode(ids) == text.replace("\u2581", " ").strip()
    assert all(2 < i < len(tokenizer()) for i in ids)
    assert tokenizer().decode([*ids, 1, *ids, 0]) == tokenizer().decode([0, *ids])


@some(200)
@given(label=filled, text=notes | texts, max_source=st.integers(32, 90), max_target=st.integers(2, 40))
def test_prompt_keeps_head_and_end(label, text, max_source, max_target):
    """Catches a prompt over the limit, a head that is cut, a question not cut at its end, and a lost end token."""
    prompts = data.Prompts(tokenizer(), max_source, max_target)
    for head in ("explain:", "predict:", data.EXPLAIN_GIVEN.format(label=label)):
        ids, head_ids, text_ids = prompts.source(head, text), tokenizer().encode(head), tokenizer().encode(text)
        if len(head_ids) < max_source:
            assert len(ids) == min(len(head_ids) + len(text_ids) + 1, max_source)
        assert ids[: len(head_ids)] == head_ids and ids[-1] == 1
        question = ids[len(head_ids) : -1]
        assert question == text_ids[: len(question)]
    target = prompts.target(text)
    assert target == ([*tokenizer().encode(text)[: max_target - 1], 1] if text else [])


@some(150)
@given(
    lengths=st.lists(st.integers(1, 300), min_size=1, max_size=200),
    size=st.integers(1, 40),
    seed=st.integers(0, 2**31),
    epoch=st.integers(0, 10**6),
)
def test_batches_are_full_disjoint_and_repeatable(lengths, size, seed, epoch):
    """Catches an example drawn twice in an epoch, a batch that is not full, and an order that cannot be resumed."""
    batches = data.batch_order(lengths, size, seed, epoch)
    drawn = [i for batch in batches for i in batch]
    assert len(set(drawn)) == len(drawn) and set(drawn) <= set(range(len(lengths)))
    assert {len(batch) for batch in batches} == {min(size, len(lengths))}
    assert len(batches) == max(len(lengths) // size, 1)
    assert data.batch_order(lengths, size, seed, epoch) == batches


@some(100)
@given(rows=st.lists(st.lists(st.integers(1, 5000), max_size=20), min_size=1, max_size=8))
def test_pad_keeps_every_row(rows):
    """Catches padding that moves, cuts or overwrites tokens."""
    out = data.pad(rows)
    assert out.shape == (len(rows), max(1, *map(len, rows)))
    assert [[i for i in row if i] for row in out.tolist()] == rows
    assert all(not any(row[len(ids) :]) for row, ids in zip(out.tolist(), rows, strict=True))


# ---------------------------------------------------------------------------------------------------------------------
# Scores.


@some(150)
@given(pairs=st.lists(st.tuples(sentences, sentences | texts), min_size=1, max_size=5), order=st.randoms())
def test_bleu_is_sacrebleus_and_blind_to_order(pairs, order):
    """Catches counts, smoothing, tokens or a brevity penalty that differ, and averages of sentences."""
    sacrebleu = pytest.importorskip("sacrebleu")
    ours = metrics.corpus_bleu(*zip(*pairs, strict=True))
    theirs = sacrebleu.corpus_bleu([h for h, _ in pairs], [[r for _, r in pairs]]).score
    assert ours == pytest.approx(theirs, abs=1e-6) and 0 <= ours <= 100 + 1e-9
    order.shuffle(pairs)
    assert metrics.corpus_bleu(*zip(*pairs, strict=True)) == pytest.approx(ours, abs=1e-9)


@some(150)
@given(hypotheses=st.lists(sentences | texts, min_size=1, max_size=4))
def test_bleu_of_equal_texts_is_100(hypotheses):
    """Catches a penalty or smoothing that hits a perfect match."""
    assume(any(len(metrics.tokenize_13a(text)) >= 4 for text in hypotheses))
    assert metrics.corpus_bleu(hypotheses, hypotheses) == pytest.approx(100)


@some(300)
@given(hypothesis=sentences.map(str.split), reference=sentences.map(str.split))
def test_sentence_bleu_is_bounded(hypothesis, reference):
    """Catches a logarithm of 0, a smoothed count above its total, and a perfect score for another text."""
    score = metrics.sentence_bleu(hypothesis, reference)
    assert 0 <= score <= 100 + 1e-9
    assert (score > 0) == bool(set(hypothesis) & set(reference))
    if len(hypothesis) >= 4:
        assert (score > 100 - 1e-9) == (hypothesis == reference)


pairs_of_labels = st.tuples(st.sampled_from("abcd"), st.sampled_from("abcde"))
apart = pairs_of_labels.filter(lambda pair: pair == ("a", "a") or "a" not in pair)  # a is never confused
answers = st.lists(pairs_of_labels, min_size=1, max_size=30) | st.lists(apart, min_size=1, max_size=30)


@some(300)
@given(pairs=answers, order=st.randoms(), labels=st.permutations("abcd"))
def test_macro_f1_is_bounded_blind_to_order_and_100_for_equal_labels_only(pairs, order, labels):
    """Catches weights by class size, classes taken from what was seen, and 100 for a wrong one."""
    gold, predicted = zip(*pairs, strict=True)
    score = metrics.macro_f1(gold, predicted, "abcd")
    assert 0 <= score <= 100
    assert metrics.macro_f1(gold, predicted, labels) == pytest.approx(score)
    twice = [
        pair for pair in pairs for _ in range(1 + (pair[0] == "a"))
    ]  # more of a class changes no F1 if it is never confused
    if all("a" not in pair or pair == ("a", "a") for pair in pairs):
        assert metrics.macro_f1(*zip(*twice, strict=True), "abcd") == pytest.approx(score)
    order.shuffle(pairs)
    assert metrics.macro_f1(*zip(*pairs, strict=True), "abcd") == pytest.approx(score)
    if set(gold) == set("abcd"):
        assert (score == pytest.approx(100)) == (gold == predicted)


vectors = st.tuples(st.integers(1, 6), st.integers(1, 6), st.integers(2, 5), st.integers(0, 10**6))


def pair_of_texts(shape: tuple) -> list[np.ndarray]:
    rng = np.random.default_rng(shape[3])
    return [rng.normal(size=(n, shape[2])) + rng.choice([-1, 0, 2]) for n in shape[:2]]


@some(200)
@given(shape=vectors)
def test_bertscore_of_a_text_with_itself_is_100_and_sides_swap(shape):
    """Catches vectors that are not normed, precision and recall swapped, and one that depends on the order."""
    a, b = pair_of_texts(shape)
    assert metrics.bertscore(a, a) == pytest.approx((100, 100, 100))
    assert metrics.bertscore(a, 7 * a[::-1]) == pytest.approx((100, 100, 100))
    precision, recall, f1 = metrics.bertscore(a, b)
    assert metrics.bertscore(b, a) == pytest.approx((recall, precision, f1))
    assert -100 - 1e-9 <= min(precision, recall) and max(precision, recall) <= 100 + 1e-9
    if precision * recall > 0:  # of opposite sign, F1 has no bound, neither here nor in the package bert-score
        assert min(precision, recall) - 1e-9 <= f1 <= max(precision, recall) + 1e-9


@some(300)
@given(values=st.lists(st.floats(-1e6, 1e6) | st.just(math.nan), max_size=8))
def test_interval_over_seeds_holds_the_mean(values):
    """Catches an interval beside its mean, a p outside 0..1, and a seed without a number that spoils the rest."""
    result, known = metrics.mean_over_seeds(values), [value for value in values if not math.isnan(value)]
    assert (result["mean"] is None) == (not known) and (result["ci95"] is None) == (len(known) < 2) == (
        result["p"] is None
    )
    if len(known) > 1:
        low, high = result["ci95"]
        assert low <= result["mean"] <= high and 0 <= result["p"] <= 1
        assert min(known) - 1e-6 <= result["mean"] <= max(known) + 1e-6
        spread = max(known) - min(known)
        if spread > 1e-3:  # the interval leaves out 0 exactly where p < 0.05
            assert abs(result["p"] - 0.05) < 1e-3 or (low <= 0 <= high) == (result["p"] > 0.05)


# ---------------------------------------------------------------------------------------------------------------------
# Schedules and options.

shares = st.integers(0, 1000).map(lambda n: n / 1000)
plans = st.tuples(shares, shares).filter(lambda plan: sum(plan) <= 1)


@some(300)
@given(plan=plans, cap=shares, steps=st.integers(1, 400), schedule=st.sampled_from(r2d.SCHEDULES))
def test_sampling_rises_from_0_to_the_cap(plan, cap, steps, schedule):
    """Catches a schedule that falls, overshoots, begins in the warm-up or ends elsewhere than at the cap."""
    warmup, ramp = plan
    p = [r2d.p_predicted(step, steps, schedule, warmup, ramp, cap) for step in range(steps + 1)]
    cap = 0 if schedule == "none" else cap
    assert all(0 <= value <= cap + 1e-6 for value in p)
    assert all(after >= before - 1e-6 for before, after in pairwise(p))
    for step, value in enumerate(p):
        assert value == 0 or step >= warmup * steps
        assert step < (warmup + ramp) * steps + 1e-6 or value == pytest.approx(cap, abs=1e-5)


@some(200)
@given(warmup=shares, alpha=shares, steps=st.integers(1, 400))
def test_alpha_rises_to_its_value(warmup, alpha, steps):
    """Catches a weight that is negative, falls, or is not there at the end of the warm-up."""
    alphas = [r2d.alpha_at(step, steps, warmup, alpha) for step in range(steps)]
    assert alphas == sorted(alphas) and alphas[0] >= 0 and alphas[-1] <= alpha
    assert all(value == pytest.approx(alpha) for step, value in enumerate(alphas) if step >= warmup * steps)


@some(200)
@given(lr=st.floats(1e-8, 1), steps=st.integers(1, 400))
def test_rate_rises_falls_and_keeps_below_its_peak(lr, steps):
    """Catches a rate of 0, with which nothing is learned, and one above --lr, "peak rate of AdamW"."""
    rates = [r2d.lr_at(step, steps, lr) for step in range(steps)]
    assert all(0 < rate <= lr * (1 + 1e-9) for rate in rates)
    peak = rates.index(max(rates))
    assert rates[:peak] == sorted(rates[:peak]) and rates[peak:] == sorted(rates[peak:], reverse=True)


FLAGS = ["--" + field.name.replace("_", "-") for field in r2d.fields(r2d.Options)]
values = st.sampled_from(
    [
        "0",
        "1",
        "-1",
        "0.5",
        "nan",
        "1e9",
        "r2d",
        "sft",
        "zeroshot",
        "linear",
        "none",
        "nurse",
        "cpu",
        "r2d,lr=1",
        "",
        "http://h/v1",
    ]
)
words = (
    st.sampled_from(FLAGS) | values | st.text(max_size=6) | st.sampled_from(["-h", "--help", "--", "-", "@x", "--x=1"])
)
pairs_of_words = st.tuples(st.sampled_from(FLAGS), values).map(list) | words.map(lambda word: [word])


@some(400)
@given(parts=st.lists(pairs_of_words, max_size=5))
def test_any_options_are_taken_or_refused(parts, folder, monkeypatch, capsys):
    """Catches any exception but InputError (or ConnectionError for a URL); only -h ends the program."""
    monkeypatch.chdir(folder)
    arguments = [word for part in parts for word in part]
    try:
        given_options = r2d.parse_options(arguments)
        assert isinstance(given_options, dict) and set(given_options) <= {f.name for f in r2d.fields(r2d.Options)}
        options = r2d.settle_options(given_options)
        assert all(getattr(options, name) == value for name, value in given_options.items())
        assert 0 <= options.warmup + options.ramp <= 1 and options.width % options.heads == 0
        assert options.batch_size >= 1 and (options.lr is None or 0 < options.lr <= 1)
    except (data.InputError, ConnectionError) as e:
        assert str(e)
    except SystemExit as e:
        assert e.code == 0 and any(word.startswith(("-h", "--help")) for word in arguments)
