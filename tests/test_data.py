"""data.py: the simulated nurse line, the readers of files, tokenizer, prompts and batches."""

import hashlib
import json
import random
import re
from collections import Counter
from dataclasses import replace
from functools import cache
from pathlib import Path

import fuzz
import pytest
import torch

import data
import metrics
from data import COMPLAINTS, DISPOSITIONS, GROUPS, RED_FLAGS, WORDS, Call, Example, read_facts

VOICES = ["llm", "nurse", "post"]
in_each_voice = pytest.mark.parametrize("voice", VOICES)


@cache
def triage(voice: str = "llm", override: float = 0.2, seed: int = 0) -> data.Dataset:
    return data.load_data("triage", seed, None, 1000, override, voice, voice)


def everything(dataset: data.Dataset) -> list[Example]:
    return dataset.train + dataset.val + dataset.test


# ---- The simulated nurse line: words and rule.
def test_tables_fit_together():
    """Catches a cue that has no wording, a flag nobody mentions, a worst flag that is not first."""
    assert len(COMPLAINTS) >= 20 and len(DISPOSITIONS) == 5
    for complaint in COMPLAINTS.values():
        assert complaint.group in GROUPS and complaint.cue in data.CUES
    for flags in GROUPS.values():
        tiers = [RED_FLAGS[flag].tier for flag in flags]
        assert len(flags) >= 3 and tiers == sorted(tiers, reverse=True)
    assert set().union(*GROUPS.values()) == set(RED_FLAGS)
    for text in [*data.DISTRACTORS, *(flag.reason for flag in RED_FLAGS.values())]:
        assert read_facts(text) == set(), text  # else it would be a fact that nobody stated


@pytest.mark.parametrize("frame", ["Reports {}.", "A man with {} and a dog; it rains.", "{}"])
def test_every_wording_is_read_back_as_its_fact(frame):
    """Catches a wording of two facts, one that holds another, a denial that goes too far."""
    for fact, words in WORDS.items():
        for wording in [fact, words.other, words.short, fact.upper()]:
            assert read_facts(frame.format(wording)) == {fact}, wording
            denied = f"Medium, denies {wording}. Blue lips."
            assert read_facts(denied) == {"moderate", f"no {fact}", "blue lips"}


def test_short_texts_are_read():
    """Catches words found inside words, a label where none or two are named."""
    assert read_facts("for 7 days, coughing whether rashly, for 2 weeks") == {"over a week"}
    for text in ("", "Go home, careful.", "Blue lips. Severe.", "Home care. Call 911."):
        assert data.argues_for(text) is None
    assert data.argues_for("CALL 911.") == data.argues_for("Blue lips. EMS.") == "call 911"


PLAIN = Call("a cough", "mild", [], [], [], [], [])
BLUE, BLOOD, EAR, CUE = "blue lips", "coughing up blood", "ear pain at night", "a good appetite"


@pytest.mark.parametrize(
    ("changes", "tier"),
    [
        ({}, 0),
        ({"severity": "severe"}, 2),
        ({"duration": ["over a week"]}, 1),  # makes it at least 1
        ({"duration": ["over a week"], "severity": "severe"}, 2),
        ({"flags": [BLUE, EAR], "severity": "severe"}, 4),
        ({"denied": [BLUE]}, 0),  # what is denied does not count
        ({"cues": [CUE], "severity": "severe"}, 1),
        ({"cues": [CUE], "flags": [EAR]}, 2),  # no help against a red flag
        ({"modifiers": ["diabetes"]}, 1),
        ({"modifiers": ["a recent operation"], "severity": "severe"}, 3),
        ({"modifiers": ["diabetes", "a blood thinner"]}, 1),  # raised once
        ({"modifiers": ["diabetes"], "flags": [BLOOD]}, 3),  # not past the emergency department
        ({"modifiers": ["diabetes"], "flags": [BLUE]}, 4),
    ],
)
def test_the_rule(changes, tier):
    """Catches a rule that differs from its description, on records written by hand."""
    assert data.triage_tier(replace(PLAIN, **changes).facts()) == tier


def test_calls_keep_their_probabilities():
    """Catches data that became easier or harder: every share within 5 sigma of what was meant."""
    rng, counts = random.Random(0), Counter()
    for _ in range(20_000):
        call = data.draw_call(rng)
        counts.update([call.severity, f"{len(call.denied)} denied", f"{len(call.cues)} cues"])
        counts.update(call.flags + call.modifiers)
        counts["no flag"] += not call.flags
        counts["long"] += call.duration != []
    shares = {"mild": 0.46, "severe": 0.18, "long": 0.25, "no flag": 0.48, "1 denied": 0.1}
    shares |= {"1 cues": 0.3, "diabetes": 0.3 / 4}
    for name, p in shares.items():
        assert counts[name] / 20_000 == pytest.approx(p, abs=5 * (p * (1 - p) / 20_000) ** 0.5)
    assert 1.1 < counts["burning urine"] / counts["black tarry stools"] < 1.6  # worse, rarer


def test_calls_are_consistent_and_notes_state_their_facts():
    """Catches flags of another complaint, facts lost or invented in words."""
    rng, wordings, distracted = random.Random(1), Counter(), 0
    for _ in range(5000):
        call = data.draw_call(rng)
        group = GROUPS[COMPLAINTS[call.complaint].group]
        assert call.flags == [flag for flag in group if flag in call.flags]
        assert set(call.denied) <= set(group) - set(call.flags)
        assert call.cues in ([], [COMPLAINTS[call.complaint].cue])
        note = data.write_note(call, rng)
        assert read_facts(note) == call.facts(), note
        distracted += any(text in note.lower() for text in data.DISTRACTORS)
        wordings.update(data.ANY_FACT.findall(note.lower()))
    assert distracted / 5000 == pytest.approx(0.5, abs=0.04)
    for fact in [*COMPLAINTS, *RED_FLAGS, *data.CUES]:
        for wording in [fact, WORDS[fact].other]:
            assert wordings[re.sub("^(a|an) ", "", wording)] > 10, wording


@pytest.mark.parametrize("override", [0.0, 0.2, 1.0])
def test_override_rate_and_step(override):
    """Catches overrides that never or always happen, go too far, or show in the note."""
    examples, steps = everything(triage(override=override)), []
    for example in examples:
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
    """Catches a shared generator, sets or hashes: other sizes, voices, machines, the same notes."""
    small = data.load_data("triage", 0, 7, 20, 0.2, "post", "nurse")
    assert hashlib.sha256(repr(small).encode()).hexdigest()[:16] == "b787b236667d44b8"
    for split in ("train", "val", "test", "ceiling"):
        assert getattr(small, split) == getattr(triage("post"), split)[:7]
    assert small.stage1_train == triage("nurse").train[:7]
    assert small.stage1_val == triage("nurse").val[:7]
    for voice in VOICES:
        pairs = [(example.question, example.label) for example in everything(triage(voice))]
        assert pairs == [(example.question, example.label) for example in everything(triage())]
    notes = [example.question for example in everything(triage()) + everything(triage(seed=1))]
    assert len(notes) == 5000 and len(set(notes)) > 4900  # no split or seed repeats another


# ---- The simulated nurse line: rationales and their checks.
@in_each_voice
@pytest.mark.parametrize("override", [0.0, 0.2, 1.0])
def test_every_rationale_argues_for_its_label_and_is_grounded(voice, override):
    """Catches a rationale that argues for something else or cites what the note does not say."""
    dataset = triage(voice, override)
    for example in everything(dataset) + dataset.ceiling + dataset.ceiling_gold:
        assert data.argues_for(example.rationale) == example.label, example
        assert data.ungrounded(example.rationale, example.question) == [], example


@in_each_voice
def test_the_checks_see_a_changed_rationale(voice):
    """Catches checks that look at the note only: another label, an invented or a denied fact."""
    denials = 0
    for example in triage(voice).test[:300]:
        note, text = example.question, example.rationale
        other = DISPOSITIONS[(DISPOSITIONS.index(example.label) + 1) % 5]
        assert data.argues_for(f"{text} {other}.") is None  # argues for two
        assert data.argues_for(text.rsplit(". ", 1)[0] + f". {other}.") == other
        for flag in RED_FLAGS:
            said = WORDS[flag].short if voice == "nurse" else flag
            if flag not in read_facts(note):
                assert data.ungrounded(f"{text} {said}.", note) == [flag]
            elif flag in read_facts(text):
                denied = re.sub(re.escape(said), f"denies {said}", text, flags=re.IGNORECASE)
                assert data.ungrounded(denied, note) == [f"no {flag}"]
                denials += 1
    assert denials > 50


def test_voices_name_their_labels_and_have_their_words():
    """Catches a voice whose text always holds the label, and voices mixed up."""
    texts = {}
    for voice in VOICES:
        train = triage(voice, 0.0).train
        named = sum(e.label.lower() in e.rationale.lower() for e in train)
        assert named / 1000 == pytest.approx(data.NAMED, abs=0.06)
        texts[voice] = " ".join(example.rationale for example in train)
    assert [voice for voice in VOICES if " can mean " in texts[voice]] == ["llm"]
    assert [voice for voice in VOICES if "SOB." in texts[voice]] == ["nurse"]
    assert [voice for voice in VOICES if "Shortness of breath." in texts[voice]] == ["post"]


@in_each_voice
def test_the_ceiling_knows_the_rule_and_no_more(voice):
    """Catches a ceiling taken after the override, and one that peeks at the drawn ending."""
    dataset, exact = triage(voice), 0
    for i, gold in enumerate(dataset.test):
        by_gold, by_rule = dataset.ceiling_gold[i], dataset.ceiling[i]
        assert by_gold.label == gold.label
        assert DISPOSITIONS.index(by_rule.label) == data.triage_tier(read_facts(gold.question))
        assert by_gold.question == by_rule.question == gold.question
        assert (by_gold == by_rule) == (by_gold.label == by_rule.label)
        assert "on judgement" not in by_rule.rationale
        exact += by_gold == gold
    assert exact / 1000 == pytest.approx(data.NAMED, abs=0.06)


def test_what_a_label_is_worth():
    """Catches data on which a wrong label costs nothing: BLEU of the reference explainer."""
    references = [example.rationale for example in triage().test]
    for answers, bleu in [(triage().ceiling_gold, 88.1), (triage().ceiling, 76.8)]:
        texts = [example.rationale for example in answers]
        assert metrics.corpus_bleu(texts, references) == pytest.approx(bleu, abs=0.1)


# ---- Files.
RECORDS = []
for i in range(30):
    label = ["yes", "no"][i % 2]
    RECORDS.append({"question": f"Is it {i}?", "label": label, "rationale": f"Reason {i}."})
NASTY = {"question": 'A "q",\nof 2 lines, é 日本 \u2028 x', "label": "a, b", "rationale": ""}


def load(path: Path, content: str = "", seed: int = 0, limit: int | None = None) -> data.Dataset:
    if content:
        path.write_bytes(content.encode())
    return data.load_data(str(path), seed, limit, 0, 0.0, "llm", "llm")


def as_jsonl(records: list[dict]) -> str:
    return "\n".join(json.dumps(record, ensure_ascii=False) for record in records)


def as_csv(records: list[dict]) -> str:
    rows = ["question,label,rationale"]
    for record in records:
        rows.append(",".join('"' + text.replace('"', '""') + '"' for text in record.values()))
    return "\r\n".join(rows)


@pytest.mark.parametrize(("name", "dump"), [("a.jsonl", as_jsonl), ("a.csv", as_csv)])
def test_files_read_back_as_they_were_written(tmp_path, name, dump):
    """Catches lost quotes and line ends, byte order marks, long fields, blank lines."""
    records = [*RECORDS, NASTY, RECORDS[0] | {"question": "long " * 40_000 + "end"}]
    rows = dump(records)
    for content in (rows, "\ufeff" + rows, rows.replace("\r", "") + "\n\n"):
        dataset = load(tmp_path / name, content)
        assert sorted(map(repr, everything(dataset))) == sorted(repr(Example(**r)) for r in records)
        assert (dataset.stage1_train, dataset.stage1_val) == (dataset.train, dataset.val)
        assert dataset.labels == ["yes", "no", "a, b"] and dataset.ceiling == []


def test_a_file_is_split_by_seed_and_cut_by_limit(tmp_path):
    """Catches test examples in train, wrong shares, and a limit that changes who is in test."""
    path = tmp_path / "a.jsonl"
    full, small = load(path, as_jsonl(RECORDS + RECORDS[:8])), load(path, limit=4)
    assert [len(full.train), len(full.val), len(full.test)] == [32, 3, 3]
    assert len(set(everything(full))) == 30 and load(path) == full
    assert load(path, seed=1).test != full.test
    assert everything(small) == full.train[:4] + full.val + full.test


def test_a_folder_keeps_its_splits(tmp_path):
    """Catches splits that are mixed up, and a folder with a split missing or there twice."""
    (tmp_path / "train.jsonl").write_text(as_jsonl(RECORDS[:20]))
    (tmp_path / "val.csv").write_text(as_csv(RECORDS[20:24]))
    with pytest.raises(data.InputError, match=r"test\.jsonl or test\.csv"):
        load(tmp_path)
    (tmp_path / "test.jsonl").write_text(as_jsonl(RECORDS[24:]))
    dataset = load(tmp_path)
    assert [len(dataset.train), *everything(dataset)] == [20, *(Example(**r) for r in RECORDS)]
    (tmp_path / "test.csv").write_text("twice")
    with pytest.raises(data.InputError, match=r"test\.jsonl or test\.csv"):
        load(tmp_path)


def test_pubmedqa(tmp_path):
    """Catches a lost abstract, swapped keys, and official test questions in train."""
    items = {}
    for i in range(30):
        items[str(i)] = {"QUESTION": f"Does {i} help?", "CONTEXTS": [f"Aim {i}.", "Result."]}
        items[str(i)] |= {"final_decision": ["yes", "no"][i % 2], "LONG_ANSWER": f"{i} does."}
    dataset = load(tmp_path / "ori_pqal.json", json.dumps(items, indent=1))
    assert Example("Does 4 help? Aim 4. Result.", "yes", "4 does.") in everything(dataset)
    official = {str(i): "yes" for i in range(0, 30, 3)}
    (tmp_path / "test_ground_truth.json").write_text(json.dumps(official))
    dataset = load(tmp_path / "ori_pqal.json")
    assert {example.question.split()[1] for example in dataset.test} == set(official)
    assert [len(dataset.train), len(dataset.val), len(set(everything(dataset)))] == [18, 2, 30]


def test_bioasq(tmp_path):
    """Catches list questions among the yes/no ones, lost snippets, `Yes` and `yes` as two."""
    items = [{"type": "list", "body": "Which genes?", "exact_answer": [["A"]]}]
    for i in range(30):
        item = {"type": "yesno", "body": f"Is {i} bad?", "exact_answer": ["Yes", "no"][i % 2]}
        item["ideal_answer"] = "Plain." if i == 0 else [f"{i} is.", "Another."]
        items.append(item | {"snippets": [{"text": "It"}, {"text": "is."}]})
    dataset = load(tmp_path / "training.json", json.dumps({"questions": items}))
    assert len(everything(dataset)) == 30 and sorted(dataset.labels) == ["no", "yes"]
    assert Example("Is 0 bad? It is.", "yes", "Plain.") in everything(dataset)
    assert Example("Is 4 bad? It is.", "yes", "4 is.") in everything(dataset)


HALF = '{"question": "\\ud800", "label": "a", "rationale": ""}'
BLANK = {"a\nb": {"QUESTION": " ", "CONTEXTS": [], "final_decision": "a", "LONG_ANSWER": "b"}}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", as_jsonl(RECORDS) + "\n\n{]}\n", "JSONDecodeError.* after line 30;"),
        ("a.jsonl", as_jsonl(RECORDS) + "\n" + HALF, "UnicodeEncodeError.* after line 31;"),
        ("a.csv", "question,label,rationale\nq,a\n", "AttributeError.* after line 2;"),
        ("a.csv", "question,label,rationale\nq,a,r,r\n", "ValueError: more fields"),
        ("a.csv", "question,label,rationale\nq, ,r\n", "question or label is empty"),
        ("a.json", json.dumps(BLANK), "ValueError: question or label is empty, at or after a b;"),
        ("a.jsonl", as_jsonl(RECORDS[::2]), "two labels in train"),
    ],
)
def test_bad_files_are_refused_in_one_line(tmp_path, name, content, message):
    """Catches a traceback, or a message that does not name the place (more: test_bad_input.py)."""
    with pytest.raises(data.InputError, match=message) as caught:
        load(tmp_path / name, content)
    assert str(caught.value).startswith(str(tmp_path / name)) and "\n" not in str(caught.value)


def test_fuzz_finds_nothing(tmp_path):
    """Catches what the readers do with damaged files, by a few of the inputs of fuzz.py."""
    assert fuzz.main(["--n", "500", "--seed", "1", "--save", str(tmp_path)]) == 0


# ---- Tokenizer and batches.
ODD = "E Q Z|NAÏVE café|emoji 🤒🏽|حمى|日本語|two\nlines|a\ttab|a  b   c|½ ﬁ|</s>|<0x41>|x\u2028y|"
CHINESE = [chr(0x4E00 + i) for i in range(3000)]
LENGTHS = [random.Random(i).randint(5, 120) for i in range(1000)]


@cache
def tokenizer() -> data.Tokenizer:
    texts = [text for e in triage().train for text in (e.question, e.rationale, e.label)]
    return data.Tokenizer.train(texts, 1536)


@pytest.mark.parametrize("text", [*DISPOSITIONS, *ODD.split("|")])
def test_text_survives_the_tokenizer(text):
    """Catches dropped letters (once the E of `go to ED now`), normalisation, lost white space."""
    ids = tokenizer().processor.encode(text)
    assert tokenizer().decode(ids) == text and not {0, 1, 2} & set(ids)
    assert tokenizer().decode([0, *ids, 1, *ids, 0]) == text  # stops at the end token
    assert tokenizer().decode([*ids, 1540]) == text  # an id that T5 has too many
    assert len(tokenizer()) == 1536 and len(ids) <= len(text.encode()) + 1


@pytest.mark.parametrize("texts", [["yes"], ["x" * 20_000], CHINESE], ids=["tiny", "long", "many"])
def test_tokenizer_trains_on_odd_data_and_is_loaded_again(tmp_path, texts):
    """Catches SentencePiece's limits on size, length and characters; no model taken for one."""
    small, path = data.Tokenizer.train(texts, 600), tmp_path / "spiece.model"
    path.write_bytes(data.Tokenizer.train(texts, 600).model)
    for text in texts[:50]:
        assert data.Tokenizer.load(path).decode(small.processor.encode(text)) == text
    path.write_bytes(b"no model")
    for wrong in (path, tmp_path / "nowhere"):
        with pytest.raises(data.InputError, match=r"spiece.model|nowhere"):
            data.Tokenizer.load(wrong)


def test_encoding_pads_on_the_right_and_ends_with_the_end_token():
    """Catches padding on the left, a cut that loses the end token or the prefix, empty targets."""
    questions, _, _ = data.columns(triage().test[:5])
    texts = [f"given label: go to ED now, explain: {question}" for question in questions]
    for limit in (256, 20):
        rows = tokenizer().encode([*texts, ""], limit)
        assert rows.dtype == torch.int64 and not rows[5].any()  # nothing to learn
        whole = [tokenizer().processor.encode(text) for text in texts]
        assert rows.shape[1] == min(max(map(len, whole)) + 1, limit)
        for ids, row in zip(whole, rows.tolist(), strict=False):
            ids = [*ids[: limit - 1], 1]
            assert row == ids + [0] * (len(row) - len(ids))
    assert tokenizer().longest(DISPOSITIONS, 64) == tokenizer().encode(DISPOSITIONS, 64).shape[1]
    with pytest.raises(data.InputError, match="rename it"):
        tokenizer().longest(DISPOSITIONS, 3)  # a label that was cut is no label


@pytest.mark.parametrize(("n", "size"), [(512, 16), (1000, 32), (64, 64), (3, 8)])
def test_batches_are_full_and_hold_every_example_at_most_once(n, size):
    """Catches examples drawn twice or lost, and an epoch without any batch."""
    batches = data.batch_order(LENGTHS[:n], size, 0, 0)
    drawn = [i for batch in batches for i in batch]
    assert len(set(drawn)) == len(drawn) == max(n // size * size, min(n, size))
    assert {len(batch) for batch in batches} == {min(n, size)} and set(drawn) <= set(range(n))


def test_batches_change_with_the_epoch_and_waste_little_padding():
    """Catches a global generator, one order for ever, the longest never seen, no pools, sorting."""
    first = data.batch_order(LENGTHS, 32, 0, 3)
    assert data.batch_order(LENGTHS, 32, 0, 3) == first != data.batch_order(LENGTHS, 32, 1, 3)
    left_out = []
    for epoch in range(40):
        drawn = {i for batch in data.batch_order(LENGTHS, 32, 0, epoch) for i in batch}
        left_out += set(range(1000)) - drawn
    assert len(set(left_out)) > 200
    mean = sum(LENGTHS[i] for i in left_out) / len(left_out)
    assert mean == pytest.approx(sum(LENGTHS) / 1000, abs=8)
    longest = [max(LENGTHS[i] for i in batch) for batch in first]
    assert sum(LENGTHS[i] for batch in first for i in batch) > 0.9 * 32 * sum(longest)
    assert 6 < sum(longest[i] < longest[i + 1] for i in range(30)) < 24
