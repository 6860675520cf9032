"""data.py: the simulated nurse line, files, the look at the data, tokenizer and batches."""

import hashlib
import random
import re
from collections import Counter
from functools import cache
from pathlib import Path

import pytest
import torch
from helpers import jsonl, record, t5_like

import data
import metrics
import r2d
from data import COMPLAINTS, DISPOSITIONS, RED_FLAGS, WORDS, Example, Tokenizer, read_facts

in_each_voice = pytest.mark.parametrize("voice", ["llm", "nurse", "post"])


def load(source: str | Path, content: str = "", **changes: object) -> data.Dataset:
    """By r2d.py's default options and these changes, from a file with this content, if given."""
    if content:
        source.write_bytes(content.encode())
    o = r2d.parse_args(["--out", "never-made", "--data", str(source)])
    assert changes.keys() <= vars(o).keys()
    vars(o).update(changes)
    return data.load_data(o)


@cache
def triage(voice: str = "llm", **changes: object) -> data.Dataset:
    return load("triage", **{"rationales": voice, "stage1_rationales": voice} | changes)


def everything(dataset: data.Dataset) -> list[Example]:
    return dataset.train + dataset.val + dataset.test


# ---- The simulated nurse line: words and rule.
@pytest.mark.parametrize("frame", ["Reports {}.", "A man with {} and a dog; it rains.", "{}"])
def test_every_wording_is_read_back_as_its_fact(frame):
    """Catches a wording of two facts, one that holds another, a denial that goes too far."""
    for fact, words in WORDS.items():
        for wording in [fact, words.other, words.short, fact.upper()]:
            assert read_facts(frame.format(wording)) == {fact}, wording
            denied = f"Medium, denies {wording}. Blue lips."
            assert read_facts(denied) == {"moderate", f"no {fact}", "blue lips"}


def test_short_texts_are_read():
    """Catches words found inside words, a label of none or two, grounds that are no fact at all."""
    assert read_facts("for 7 days, coughing whether rashly, for 2 weeks") == {"over a week"}
    for text in ("", "Go home, careful.", "Blue lips. Severe.", "Home care. Call 911."):
        assert data.argues_for(text) is None
    assert data.argues_for("CALL 911.") == data.argues_for("Blue lips. EMS.") == "call 911"
    for text in ("", "zzz", "Call 911.", "An ambulance is needed at once."):
        assert data.ungrounded(text, "A cough for 3 days. It is mild.") == ["no fact at all"]
    assert data.ungrounded("Slight. Coughing up blood.", "It is mild.") == ["coughing up blood"]
    assert data.ungrounded("Denies blue lips.", "Blue lips.") == ["no blue lips"]


RULE = {"mild": 0, "severe": 2, "mild, over a week": 1, "severe, over a week": 2}
RULE |= {"mild, no blue lips": 0, "severe, blue lips, ear pain at night": 4}
RULE |= {"severe, a good appetite": 1, "mild, a good appetite, ear pain at night": 2}
RULE |= {"mild, diabetes": 1, "severe, a recent operation": 3, "mild, diabetes, blue lips": 4}
RULE |= {"mild, diabetes, a blood thinner": 1, "mild, diabetes, coughing up blood": 3}


@pytest.mark.parametrize("facts", RULE)
def test_the_rule(facts):
    """Catches a rule that differs from its description, on records written by hand."""
    assert data.triage_tier({"a cough", *facts.split(", ")}) == RULE[facts]


def test_calls_are_consistent_and_notes_state_their_facts():
    """Catches flags of another complaint or not the worst first, facts lost or invented in words,
    a cue without a wording, a flag nobody mentions."""
    rng, wordings = random.Random(1), Counter()
    for _ in range(5000):
        call = data.draw_call(rng)
        own = COMPLAINTS[call.complaint].group
        group = [flag for flag, words in RED_FLAGS.items() if own in words.groups.split()]
        assert call.flags == [flag for flag in group if flag in call.flags]
        tiers = [RED_FLAGS[flag].tier for flag in call.flags]
        assert tiers == sorted(tiers, reverse=True)
        assert set(call.denied) <= set(group) - set(call.flags)
        assert call.cues in ([], [COMPLAINTS[call.complaint].cue])
        note = data.write_note(call, rng)
        assert read_facts(note) == call.facts(), note
        wordings.update(data.ANY_FACT.findall(note.lower()))
    for fact in [*COMPLAINTS, *RED_FLAGS, *data.CUES]:
        for wording in [fact, WORDS[fact].other]:
            assert wordings[re.sub("^(a|an) ", "", wording)] > 10, wording


@in_each_voice
@pytest.mark.parametrize("override", [0.0, 0.2, 1.0])
def test_labels_and_their_rationales(voice, override):
    """Catches overrides that never or always happen, go too far, or show in the note; a rationale
    that argues for something else or cites what the note does not say."""
    examples, steps = everything(triage(voice, override=override)), []
    for example in examples:
        assert data.argues_for(example.rationale) == example.label, example
        assert data.ungrounded(example.rationale, example.question) == [], example
        rule = data.triage_tier(read_facts(example.question))
        steps.append(DISPOSITIONS.index(example.label) - rule)
        assert abs(steps[-1]) <= 1 and ("on judgement" in example.rationale) == (steps[-1] != 0)
    sigma = (override * (1 - override) / len(steps)) ** 0.5
    assert sum(map(abs, steps)) / len(steps) == pytest.approx(override, abs=5 * sigma)
    assert abs(sum(steps)) < 0.1 * len(steps)  # as often up as down
    assert [e.question for e in examples] == [e.question for e in everything(triage())]
    labels = Counter(example.label for example in examples)
    assert len(labels) == 5 and min(labels.values()) > 200 and max(labels.values()) < 1000


def test_splits_and_voices_do_not_disturb_each_other():
    """Catches a shared generator, sets or hashes: other sizes, voices, machines, the same notes
    (and by the hash all shares that the simulation draws with);
    stage-1 notes that are others than stage 2's, or that change one of its notes."""
    for notes, stage1_notes in [(30, 50), (50, 30), (50, None)]:
        dataset = triage("post", notes=notes, stage1_notes=stage1_notes)
        assert dataset.train == triage("post").train[:notes]
        assert dataset.stage1_train == triage("post").train[: stage1_notes or notes]
        for split in ("val", "test", "stage1_val", "ceiling"):
            assert getattr(dataset, split) == getattr(triage("post"), split)
    small = triage("post", limit=7, notes=20, stage1_rationales="nurse")
    content = repr(everything(triage()) + small.stage1_train + small.ceiling)
    assert hashlib.sha256(content.encode()).hexdigest()[:16] == "6908a0f44277da71"
    for split in ("train", "val", "test", "ceiling"):
        assert getattr(small, split) == getattr(triage("post"), split)[:7]
    assert small.stage1_train == triage("nurse").train[:7]
    assert small.stage1_val == triage("nurse").val[:7]
    notes = [example.question for example in everything(triage()) + everything(triage(seed=1))]
    assert len(notes) == 5000 and len(set(notes)) > 4900  # no split or seed repeats another


# ---- The simulated nurse line: rationales and their checks.
def test_reasons_are_the_llms_without_the_ending():
    """Catches a label or a judgement in the reasons, facts that are lost, a text with neither."""
    reasons = triage(stage1_rationales="reasons").stage1_train
    for example, whole in zip(reasons, triage().train, strict=True):
        assert data.argues_for(example.rationale) is None
        assert read_facts(example.rationale) == read_facts(whole.rationale) - set(DISPOSITIONS)
        ending = whole.rationale.removeprefix(example.rationale)
        assert 1 <= ending.count(".") <= 2 and ("judgement" in ending) == (ending.count(".") == 2)


@in_each_voice
def test_the_ceiling_knows_the_rule_and_no_more(voice):
    """Catches a ceiling taken after the override, one that peeks at the drawn ending, a voice whose
    text always names its label."""
    exact, bleu = 0, []
    for example, answer in zip(triage(voice).test, triage(voice).ceiling, strict=True):
        rule, label = data.triage_tier(read_facts(example.question)), answer["ceiling_label"]
        by_gold, by_rule = [answer[f"rationale_given_{c}"] for c in ("ceiling_gold", "ceiling")]
        assert DISPOSITIONS.index(label) == rule and "on judgement" not in by_rule
        assert (data.argues_for(by_gold), data.argues_for(by_rule)) == (example.label, label)
        assert data.ungrounded(f"{by_gold} {by_rule}", example.question) == []
        assert (by_gold == by_rule) == (example.label == label)
        exact += by_gold == example.rationale
    assert exact / 1000 == pytest.approx(data.NAMED, abs=0.06)
    questions, labels, golds = data.columns(triage(voice).test)
    assert (questions, labels) == data.columns(triage().test)[:2]
    for condition in ("ceiling_gold", "ceiling"):
        texts = [answer[f"rationale_given_{condition}"] for answer in triage(voice).ceiling]
        bleu.append(metrics.corpus_bleu(texts, golds))
    assert bleu[0] - bleu[1] > 9  # a wrong label has its price


# ---- Files.
RECORDS = [record(i) for i in range(30)]
EXAMPLES = [Example(**record) for record in RECORDS]
NASTY = {"question": 'A "q",\nof 2 lines, é 日本 \u2028 x', "label": "a, b", "rationale": ""}


def as_csv(records: list[dict]) -> str:
    rows = [",".join(records[0])]
    for row in records:
        rows.append(",".join('"' + text.replace('"', '""') + '"' for text in row.values()))
    return "\r\n".join(rows)


@pytest.mark.parametrize(("name", "dump"), [("a.jsonl", jsonl), ("a.csv", as_csv)])
def test_files_read_back_as_they_were_written(tmp_path, name, dump):
    """Catches lost quotes and line ends, byte order marks, long fields, blank lines."""
    records = [*RECORDS, NASTY, RECORDS[0] | {"question": "long " * 40_000 + "end"}]
    rows = dump(records)
    null = rows.replace('"rationale": ""', '"rationale": null')  # as pandas writes
    for content in (rows, "\ufeff" + rows, rows.replace("\r", "") + "\n\n", null):
        dataset = load(tmp_path / name, content)
        assert sorted(map(repr, everything(dataset))) == sorted(repr(Example(**r)) for r in records)
        assert dataset.stage1_train == [e for e in dataset.train if e.rationale]
        assert dataset.stage1_val == [e for e in dataset.val if e.rationale]
        assert sorted(dataset.labels) == ["a, b", "no", "yes"] and dataset.ceiling == []


ALIKE = ["Is it  é {}?", "is IT é {}? ", "Is it e\u0301 {}?", "Ｉs\u00a0it é\n{}?"]
ALIKE += ["Is it é\u200b {}?"]


@pytest.mark.parametrize("form", ALIKE, ids=ascii)
def test_equal_questions_stay_in_one_split(tmp_path, form):
    """Catches a question that is learned and then tested, in other letters, blanks or code; wrong
    shares, a seed without effect, and a limit that changes who is in test."""
    twins = []
    for i in range(30):
        twins += [record(i, question=text.format(i)) for text in ("Is it é {}?", form)]
    dataset = load(tmp_path / "a.jsonl", jsonl(twins))
    for split, n in [(dataset.train, 24), (dataset.val, 3), (dataset.test, 3)]:
        numbers = Counter(re.sub(r"\D", "", e.question) for e in split)
        assert list(numbers.values()) == [2] * n
    assert load(tmp_path / "a.jsonl", seed=1).test != dataset.test
    small = load(tmp_path / "a.jsonl", limit=4)
    assert everything(small) == dataset.train[:4] + dataset.val[:4] + dataset.test[:4]


# ---- A look at the data before training.
@cache
def tokenizer() -> Tokenizer:
    texts = [text for e in triage().train for text in (e.question, e.rationale, e.label)]
    return Tokenizer.train(texts, 1536)


@cache
def lossy() -> Tokenizer:
    texts = [f"{e.question} EXYqxé 0123456789 :,?" for e in triage().train]
    return Tokenizer(t5_like(texts, 250, character_coverage=1))


def looked(max_source: int = 64, max_target: int = 64, **more: list[tuple]) -> list[str]:
    """The lines of a look at EXAMPLES, with these examples added to the splits."""
    dataset = data.Dataset([], EXAMPLES[:24], EXAMPLES[24:27], EXAMPLES[27:])
    for name, examples in more.items():
        getattr(dataset, name).extend([Example(*fields) for fields in examples])
    dataset.labels = list(dict.fromkeys(example.label for example in everything(dataset)))
    return data.look(dataset, lossy(), max_source, max_target).split("\n")


LOOKS = [  # what is added to which split, and the warning
    ({}, None),
    ({"test": [("q", "new", "")]}, "1 labels rare.*'new'"),
    ({"train": [("q", "odd", "")]}, "1 labels .*'odd'"),  # one of 25
    ({"val": [("a < b", "no", "> α")]}, "3 characters .*'<', '>', 'α'"),
    ({"train": [("a\nb", "no", "")]}, r"1 characters .*'\\n'"),  # T5 drops it without a word
    ({"train": [("cafe\u0301", "no", "")]}, None),  # T5 makes an é of it
    ({"val": [("Is 3 bad?", "no", "")]}, "1 val.* questions .*'Is 3 bad"),
    ({"test": [("IS  3 bad?", "no", "")]}, "1 test questions .*'IS  3 bad.'"),
    ({"test": [("x", "no", "")], "stage1_train": [("X", "", "r")]}, "1 test questions .*'x'"),
    ({"train": [("q " * 60, "no", "r")], "stage1_train": [("q " * 60, "no", "r")]}, "1 prompts"),
]
for label in ("YES", "Ｙes", "yes\u2003"):
    LOOKS.append(({"train": [("q", label, "")] * 9}, "2 labels .*like.*'yes', '"))


@pytest.mark.parametrize(("more", "warning"), LOOKS, ids=range(len(LOOKS)))
def test_a_look_warns_of_what_is_odd(more, warning):
    """Catches labels, characters and overlaps that nobody sees, and warnings without a cause."""
    sizes, counts, *warnings = looked(**more)
    n = [len(more.get(name, [])) for name in ("train", "val", "test", "stage1_train")]
    expected = [24 + n[0], 3 + n[1], 3 + n[2], n[3]]
    assert [int(number) for number in re.findall(r"\d+", sizes)][:4] == expected
    labels = Counter(["yes", "no"] * 12 + [label for _, label, _ in more.get("train", [])])
    assert all(f"{label!r}: {times}" in counts for label, times in labels.items())
    assert len(warnings) == (warning is not None), warnings
    assert warning is None or re.match(f"warning: {warning}", warnings[0])


def test_a_look_counts_what_is_cut():
    """Catches a limit whose cuts are reported of one text alone, or one token early or late."""
    question, rationale = "cough " * 20, "fever " * 20
    prompt = f"given label: no, explain: {question}"
    n, m = [len(ids) + 1 for ids in lossy().processor.encode([prompt, rationale])]
    more = {"test": [(question, "no", rationale)]}
    assert len(looked(n, m, **more)) == 2
    prompts, rationales = looked(n - 1, m, **more)[2], looked(n, m - 1, **more)[2]
    assert re.match("warning: 1 prompts .*source: 'given label: no, explain: cough", prompts)
    assert re.match("warning: 1 rationales .*target: 'fever fever", rationales)


# ---- Tokenizer and batches.
NOTES = [Example("x" * random.Random(i).randint(5, 120), str(i), "") for i in range(1000)]


def test_encoding_pads_on_the_right_and_ends_with_the_end_token():
    """Catches padding on the left, a cut that loses the end token or the prefix, empty targets;
    dropped letters (once the E of `go to ED now`), what follows the end token read as text."""
    ids = tokenizer().processor.encode("go to ED now, é 日本\n")
    assert tokenizer().to_text([0, *ids, 1, *ids, 0]) == "go to ED now, é 日本"
    assert tokenizer().to_text([*ids[:-1], 1540]) == "go to ED now, é 日本"  # T5 has some too many
    questions, _, _ = data.columns(triage().test[:5])
    texts = [f"given label: go to ED now, explain: {question}" for question in questions]
    for limit in (256, 20):
        rows = tokenizer().to_ids([*texts, ""], limit)
        assert rows.dtype == torch.int64 and not rows[5].any()  # nothing to learn
        whole = [tokenizer().processor.encode(text) for text in texts]
        assert rows.shape[1] == min(max(map(len, whole)) + 1, limit)
        for ids, row in zip(whole, rows.tolist(), strict=False):
            ids = [*ids[: limit - 1], 1]
            assert row == ids + [0] * (len(row) - len(ids))


def test_labels_that_would_be_lost_are_refused():
    """Catches a label cut in prompts and targets, and one advice for two different faults."""
    n = tokenizer().to_ids(DISPOSITIONS, 64).shape[1]
    for limit in (64, n):
        assert tokenizer().longest_label(DISPOSITIONS, limit) == n
    with pytest.raises(data.InputError, match=r"label 'see.*raise --max-"):
        tokenizer().longest_label(DISPOSITIONS, n - 1)
    for label in ("<5", "α", "a\nb", "go  home", "\u200b"):
        assert tokenizer().longest_label([label], 64) > 1
        with pytest.raises(data.InputError, match=r"character.*rename") as caught:
            lossy().longest_label(["yes", label], 64)
        assert repr(label) in str(caught.value)


@pytest.mark.parametrize(("n", "size"), [(512, 16), (1000, 32), (64, 64), (3, 8)])
def test_batches_are_full_and_hold_every_example_at_most_once(n, size):
    """Catches examples drawn twice or lost, and an epoch without any batch."""
    batches = data.make_batches(NOTES[:n], size, 0, 0)
    drawn = [note for batch in batches for note in batch]
    assert len(set(drawn)) == len(drawn) == max(n // size * size, min(n, size))
    assert {len(batch) for batch in batches} == {min(n, size)} and set(drawn) <= set(NOTES[:n])


def test_batches_change_with_the_epoch_and_waste_little_padding():
    """Catches a global generator, one order for ever, the longest never seen, no pools, sorting."""
    first = data.make_batches(NOTES, 32, 0, 3)
    assert data.make_batches(NOTES, 32, 0, 3) == first != data.make_batches(NOTES, 32, 1, 3)
    left_out = []
    for epoch in range(40):
        drawn = {note for batch in data.make_batches(NOTES, 32, 0, epoch) for note in batch}
        left_out += set(NOTES) - drawn
    assert len(set(left_out)) > 200
    mean = sum(len(note.question) for note in left_out) / len(left_out)
    assert mean == pytest.approx(sum(len(note.question) for note in NOTES) / 1000, abs=8)
    lengths = [[len(note.question) for note in batch] for batch in first]
    longest = [max(batch) for batch in lengths]
    assert sum(map(sum, lengths)) > 0.9 * 32 * sum(longest)
    assert 6 < sum(longest[i] < longest[i + 1] for i in range(30)) < 24
