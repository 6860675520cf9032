"""data.py: the simulated nurse line, the readers of files, the tokenizer, prompts, batches."""

import json
import random
import re
from functools import cache
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from helpers import changed

import data
from data import DISPOSITIONS, PHRASES, RED_FLAGS, TRIAGE, argues_for, read_facts, triage_tier, ungrounded

SIZES = {"train": 3000, "val": 100, "test": 1000}
SOURCES = ["llm", "nurse", "post"]
sources = pytest.mark.parametrize("source", SOURCES)


@cache
def triage(source: str = "llm", seed: int = 0) -> data.Dataset:
    return data.simulate(SIZES, seed, source, source)


def everything(dataset: data.Dataset) -> list[data.Example]:
    return dataset.train + dataset.val + dataset.test


# ---------------------------------------------------------------------------------------------------------------------
# The simulated nurse line: the table and the rule.


def test_table_has_the_promised_size():
    """Catches rows lost in parsing: 20 complaints with red flags, a cue and advice, all facts in four phrasings."""
    assert len(TRIAGE) >= 20 and len(DISPOSITIONS) == len(set(DISPOSITIONS)) == 5
    for complaint in TRIAGE.values():
        assert len(complaint.flags) >= 3 and set(complaint.flags) <= set(RED_FLAGS) and complaint.advice
        assert complaint.cue in PHRASES and complaint.cue not in RED_FLAGS
    cues = {complaint.cue for complaint in TRIAGE.values()}
    assert all(len(row) == 4 for name, row in PHRASES.items() if name in TRIAGE.keys() | RED_FLAGS.keys() | cues)
    assert set(RED_FLAGS.values()) == {2, 3, 4} and set(data.MODIFIERS) <= set(PHRASES)


def test_no_phrasing_stands_for_two_facts():
    """Catches a phrasing that is listed under two facts, one of which could then never be read back."""
    meanings = {}
    for fact, row in PHRASES.items():
        for says in row:
            meanings.setdefault(data.ARTICLE.sub("", says.lower()), set()).add(fact)
    assert {says: facts for says, facts in meanings.items() if len(facts) > 1} == {}


@pytest.mark.parametrize("frame", ["Reports {}.", "Caller with {} and a dog; it rains.", "{}"])
def test_every_phrasing_is_read_back_as_its_fact(frame):
    """Catches a phrasing that holds another one, or that the pattern misses, in any letter case."""
    read = {says: read_facts(frame.format(says)) for row in PHRASES.values() for says in row}
    read |= {says.upper(): read_facts(frame.format(says).upper()) for row in PHRASES.values() for says in row}
    expected = {says: {fact} for fact, row in PHRASES.items() for s in row for says in (s, s.upper())}
    assert {says: facts for says, facts in read.items() if facts != expected[says]} == {}


@pytest.mark.parametrize("frame", ["Denies {}.", "Is free of {}.", "It is so, and the caller denies {}"])
def test_every_denied_phrasing_is_read_back_as_denied(frame):
    """Catches a denial that is read as a finding."""
    read = {(fact, says): read_facts(frame.format(says)) for fact, row in PHRASES.items() for says in row}
    assert {says: facts for (fact, says), facts in read.items() if facts != {f"no {fact}"}} == {}


def test_denial_ends_with_its_sentence():
    """Catches a denial that reaches back to the facts before it or on into the next sentence."""
    assert read_facts("A cough, and denies blue lips. Ear pain at night.") == {
        "a cough",
        "no blue lips",
        "ear pain at night",
    }


@pytest.mark.parametrize(
    ("text", "facts"),
    [
        ("for 7 days", set()), ("for 8 days", {"over a week"}), ("for 2 weeks", {"over a week"}), ("for 1 week", set()),
        ("a 74-year-old man", set()), ("a 75-year-old man", {"older age"}), ("a 9-month-old boy", {"very young age"}),
        ("a 30-year-old man for 20 days", {"over a week"}), ("a coughing aha", set()), ("", set()),
    ],
)  # fmt: skip
def test_ages_and_durations_are_read(text, facts):
    """Catches a limit off by one, months taken for years, and words found inside other words."""
    assert read_facts(text) == facts


def test_texts_around_the_facts_state_none():
    """Catches a reason, advice, distractor or ending that reads as a finding and so makes a rationale ungrounded."""
    texts = [reason for pair in data.REASONS.values() for reason in pair] + [c.advice for c in TRIAGE.values()]
    texts += data.DISTRACTORS + DISPOSITIONS + [text for row in data.IMPLIED for text in row.split(" | ")]
    assert {text: read_facts(text) for text in texts if read_facts(text)} == {}


def test_texts_around_the_endings_name_none():
    """Catches a fact, reason, advice or distractor that argues for a disposition by its mere words."""
    texts = [reason for pair in data.REASONS.values() for reason in pair] + [c.advice for c in TRIAGE.values()]
    texts += data.DISTRACTORS + [says for row in PHRASES.values() for says in row]
    assert [text for text in texts if data.ENDING_PATTERN.search(text.lower())] == []


@pytest.mark.parametrize(
    ("facts", "tier"),
    [
        ("a cough, mild", 0), ("a cough, moderate", 1), ("a cough, severe", 2),
        ("a cough, mild, over a week", 1), ("a cough, severe, over a week", 2),  # a week makes it at least 1
        ("a cough, mild, green phlegm with chills", 2), ("a cough, mild, coughing up blood", 3),
        ("a cough, mild, blue lips", 4), ("a cough, mild, green phlegm with chills, blue lips", 4),
        ("a cough, severe, green phlegm with chills", 2),  # a flag raises to its own tier, and never lowers
        ("a cough, mild, no blue lips", 0), ("a cough, severe, no CUE", 2),  # what is denied does not count
        ("a cough, severe, CUE", 1), ("a cough, mild, CUE", 0), ("a cough, moderate, over a week, CUE", 0),
        ("a cough, mild, green phlegm with chills, CUE", 2),  # no cue helps against a red flag
        ("a cough, mild, older age", 1), ("a cough, severe, older age", 3), ("a cough, mild, no older age", 0),
        ("a cough, mild, older age, a weak immune system", 1),  # raised once only
        ("a cough, mild, coughing up blood, older age", 3),  # not past the emergency department
        ("a cough, mild, blue lips, older age", 4), ("a cough, moderate, CUE, older age", 1),
        ("a cough", 0), ("", 0), ("blue lips", 4), ("severe", 2),
    ],
)  # fmt: skip
def test_triage_tier_table(facts, tier):
    """Catches a rule that differs from its description. CUE is the reassuring cue of a cough."""
    assert triage_tier(set(facts.replace("CUE", TRIAGE["a cough"].cue).split(", ")) - {""}) == tier


# ---------------------------------------------------------------------------------------------------------------------
# The simulated nurse line: the notes.


def test_notes_and_labels_do_not_depend_on_the_rationale_source():
    """Catches a shared generator: comparing rationale sources would then compare different notes."""
    notes = {source: [(e.question, e.label) for e in everything(triage(source))] for source in SOURCES}
    assert notes["llm"] == notes["nurse"] == notes["post"]
    mixed = data.simulate({"train": 50, "val": 10, "test": 10}, 0, "llm", "nurse")
    assert [(e.question, e.label) for e in mixed.train] == [(e.question, e.label) for e in mixed.stage1_train]
    assert mixed.train == triage("llm").train[:50] and mixed.stage1_train == triage("nurse").train[:50]
    assert mixed.stage1_val == triage("nurse").val[:10] and mixed.val == triage("llm").val[:10]


def test_simulation_follows_its_seed_and_nothing_else():
    """Catches data that change from run to run, or that ignore the seed; more notes keep the first ones."""
    again = data.simulate(SIZES, 0, "nurse", "nurse")
    assert again == triage("nurse")
    other = {e.question for e in everything(triage(seed=1))}
    assert len(other & {e.question for e in everything(triage())}) < 20


def test_splits_are_not_the_same_notes():
    """Catches one generator for all splits, or so few possible notes that test stands in train."""
    train, val, test = ({e.question for e in split} for split in (triage().train, triage().val, triage().test))
    assert len(train) > 2990 and not (train & val or train & test or val & test)


def test_the_rule_on_the_text_gives_the_ceiling():
    """Catches a ceiling taken after the nurse's override, or one label off."""
    dataset = triage()
    assert [DISPOSITIONS[triage_tier(read_facts(e.question))] for e in dataset.test] == dataset.ceiling
    assert dataset.labels == DISPOSITIONS


@pytest.mark.parametrize("split", ["train", "test"])
def test_override_rate_is_four_percent(split):
    """Catches overrides that never happen, always happen, or change nothing: 2 % within 5 sigma, one level each."""
    examples = getattr(triage(), split)
    rule = [triage_tier(read_facts(e.question)) for e in examples]
    steps = [abs(DISPOSITIONS.index(e.label) - tier) for e, tier in zip(examples, rule, strict=True)]
    assert set(steps) == {0, 1}
    assert sum(steps) / len(steps) == pytest.approx(0.02, abs=5 * (0.02 * 0.98 / len(steps)) ** 0.5)


def test_labels_are_imbalanced_but_all_there():
    """Catches a label that hardly occurs, which makes macro-F1 noise, or one that swallows the rest."""
    for split in (triage().train, triage().test):
        shares = [sum(e.label == label for e in split) / len(split) for label in DISPOSITIONS]
        assert min(shares) > 0.04 and max(shares) < 0.4


def test_every_sentence_of_a_note_states_one_fact():
    """Catches a note that says more or less than was drawn: one fact a sentence, none in a distractor."""
    for example in triage().train[:1000] + triage().test:
        opening, *rest = re.split(r"(?<=\.) ", example.question)
        assert len(read_facts(opening) & TRIAGE.keys()) == 1, example.question
        assert read_facts(opening) <= {*TRIAGE, "over a week", "older age", "very young age"}, example.question
        for sentence in rest:
            assert len(read_facts(sentence)) == (sentence[:-1] not in data.DISTRACTORS), sentence
        assert len(read_facts(example.question) & set(data.SEVERITY)) == 1, example.question


def test_denied_and_irrelevant_things_occur():
    """Catches notes that are too easy: some must deny red flags, mention distractors or have modifiers."""
    notes = [e.question for e in triage().train]
    facts = [read_facts(note) for note in notes]
    denied = sum(any(f.startswith("no ") for f in fs) for fs in facts)
    distracted = sum(any(text in note for text in data.DISTRACTORS) for note in notes)
    modified = sum(bool(fs & set(data.MODIFIERS)) for fs in facts)
    assert min(denied, distracted, modified) > 300


def phrasings_in(texts: list[str]) -> set[str]:
    return {match for text in texts for match in data.FACT_PATTERN.findall(text.lower())}


def test_heldout_phrasings_occur_in_test_only():
    """Catches held-out wording in train, notes or rationales, and held-out wording that test never shows either."""
    heldout = {data.ARTICLE.sub("", row[-2].lower()) for row in PHRASES.values() if len(row) > 2}
    assert len(heldout) > len(TRIAGE) + len(RED_FLAGS)
    for source in SOURCES:
        dataset = triage(source)
        assert phrasings_in([e.question + " " + e.rationale for e in dataset.train]) & heldout == set()
    assert heldout <= phrasings_in([e.question for e in triage().test])
    shown = [bool(phrasings_in([e.question]) & heldout) for e in triage().test]
    assert 0.2 < sum(shown) / len(shown) < 0.9


@pytest.mark.parametrize("frame", [r"^For \d+ \w+, [^,]* in an? ", r"\bCalls it", "Also denies", "Also notes"])
def test_heldout_frames_occur_in_test_only(frame):
    """Catches a sentence frame that is not held out after all."""
    train, test = ([bool(re.search(frame, e.question)) for e in split] for split in (triage().train, triage().test))
    assert not any(train) and any(test)


def test_heldout_wording_is_made_of_words_of_train():
    """Catches a held-out phrasing that is unreadable for a model that has seen the notes of train alone."""
    seen = {word for e in triage().train for word in re.findall(r"[a-z-]+", e.question.lower())}
    heldout = [row[-2].lower() for row in PHRASES.values() if len(row) > 2]
    assert [says for says in heldout if not set(re.findall(r"[a-z-]+", says)) <= seen] == []


# ---------------------------------------------------------------------------------------------------------------------
# The simulated nurse line: the rationales.


@sources
def test_every_rationale_argues_for_its_label_and_is_grounded(source):
    """Catches a rationale that argues for something else, or cites what the note does not say."""
    for example in everything(triage(source)):
        assert argues_for(example.rationale) == example.label, example
        assert ungrounded(example.rationale, example.question) == set(), example


@sources
def test_another_disposition_in_a_rationale_is_caught(source):
    """Catches a check that looks at the note or the facts and not at what the rationale says."""
    swapped = 0
    for example in triage(source).test:
        endings = list(data.ENDING_PATTERN.finditer(example.rationale.lower()))
        if not endings:
            continue
        other = DISPOSITIONS[(DISPOSITIONS.index(example.label) + 1) % 5]
        start, end = endings[-1].span()
        assert argues_for(example.rationale[:start] + other + example.rationale[end:]) == other
        assert argues_for(f"{example.rationale} {other}.") is None  # argues for two
        swapped += 1
    assert swapped > 400


@sources
def test_an_invented_finding_is_caught(source):
    """Catches a groundedness that lets findings through that the note does not state."""
    rng, column = random.Random(0), -1 if source == "nurse" else 0
    for example in triage(source).test[:300]:
        facts = read_facts(example.question)
        invented = rng.choice([fact for fact in PHRASES if fact not in facts])
        text = f"{example.rationale} {PHRASES[invented][column]}."
        assert ungrounded(text, example.question) == {invented}, text


@sources
def test_a_denied_finding_is_caught(source):
    """Catches a check that takes `denies X` for X: turning any stated finding round must be ungrounded."""
    turned, column = 0, -1 if source == "nurse" else 0
    for example in triage(source).test:
        for fact in read_facts(example.rationale) & RED_FLAGS.keys():
            said = PHRASES[fact][column]
            text = re.sub(re.escape(said), f"denies {said}", example.rationale, count=1, flags=re.IGNORECASE)
            assert ungrounded(text, example.question) == {f"no {fact}"}, text
            turned += 1
    assert turned > 200


def test_empty_or_idle_rationales_argue_for_nothing():
    """Catches a default disposition where a text states nothing, or a finding that argues through its denial."""
    assert argues_for("") is None and argues_for("I do not know.") is None
    assert argues_for("Blue lips. Moderate.") == "call 911"
    assert argues_for("Denies blue lips. Moderate.") == "see doctor within 3 days"
    assert argues_for("CALL 911.") == "call 911" and argues_for("Go home, careful.") is None


def test_nurses_do_not_always_name_the_disposition():
    """Catches a source whose rationale always holds the label, from which it could be copied."""
    share = {s: sum(e.label.lower() in e.rationale.lower() for e in triage(s).test) / 1000 for s in SOURCES}
    assert 0.1 < share["nurse"] < 0.5 < share["llm"] < 0.9 and 0.2 < share["post"] < 0.6
    silent = [e for e in triage("nurse").test if not data.ENDING_PATTERN.search(e.rationale.lower())]
    assert len(silent) > 100  # implied by nothing but the facts


def test_the_three_sources_have_their_own_voice():
    """Catches sources mixed up: the nurse is terse and abbreviates, the LLM writes sentences with reasons."""
    words = {s: sum(len(e.rationale.split()) for e in triage(s).test) / 1000 for s in SOURCES}
    assert words["nurse"] < words["post"] < words["llm"]
    said = {s: " ".join(e.rationale for e in triage(s).test) for s in SOURCES}
    assert [s for s in SOURCES if "r/o" in said[s]] == ["nurse"]
    assert [s for s in SOURCES if " can mean " in said[s]] == ["llm"]
    assert [s for s in SOURCES if "possible " in said[s]] == ["post"]


def test_load_data_of_triage_obeys_limit_and_sources():
    """Catches a limit that is ignored, or rationale sources passed on in the wrong order."""
    dataset = data.load_data("triage", 0, 7, "post", "nurse")
    assert [len(s) for s in (dataset.train, dataset.val, dataset.test, dataset.stage1_train)] == [7, 7, 7, 7]
    assert dataset.train == triage("post").train[:7] and dataset.stage1_train == triage("nurse").train[:7]
    assert len(dataset.ceiling) == 7


# ---------------------------------------------------------------------------------------------------------------------
# Files.

RECORDS = [
    {"question": f"Question {i}?", "label": ["yes", "no"][i % 2], "rationale": f"Reason {i}."} for i in range(30)
]
EXPECTED = sorted(RECORDS, key=str)


def write(path: Path, content: str | bytes | object) -> Path:
    content = content if isinstance(content, str | bytes) else json.dumps(content)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def load(path: Path, seed: int = 0, limit: int | None = None) -> data.Dataset:
    return data.load_data(str(path), seed, limit, "llm", "llm")


def records(examples: list[data.Example]) -> list[dict]:
    return [vars(example) for example in examples]


def jsonl(rows: list) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def as_csv(rows: list[dict], end: str = "\n") -> str:
    quoted = [",".join('"' + row[c].replace('"', '""') + '"' for c in data.COLUMNS) for row in rows]
    return end.join([",".join(data.COLUMNS), *quoted, ""])


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", jsonl(RECORDS)),
        ("told-by-content.txt", jsonl(RECORDS)),
        ("jsonl-named.json", jsonl(RECORDS)),
        ("no-last-newline.jsonl", jsonl(RECORDS).rstrip()),
        ("empty-lines.jsonl", "\n" + jsonl(RECORDS).replace("\n", "\n\n")),
        ("crlf.jsonl", jsonl(RECORDS).replace("\n", "\r\n")),
        ("bom.jsonl", b"\xef\xbb\xbf" + jsonl(RECORDS).encode()),
        ("array.json", json.dumps(RECORDS)),
        ("pretty-array.json", json.dumps(RECORDS, indent=2)),
        ("more-keys.jsonl", jsonl([{"id": 7, **r} for r in RECORDS])),
        ("spaces.jsonl", jsonl([{k: f" {v}\n" for k, v in r.items()} for r in RECORDS])),
        ("a.csv", as_csv(RECORDS)),
        ("csv-named.json", as_csv(RECORDS)),
        ("crlf.csv", as_csv(RECORDS, "\r\n")),
        ("bom.csv", b"\xef\xbb\xbf" + as_csv(RECORDS).encode()),
        ("empty-lines.csv", as_csv(RECORDS).replace("\n", "\n\n")),
        (
            "other-order.csv",
            "rationale,n,label,question\n" + "".join("{rationale},7,{label},{question}\n".format(**r) for r in RECORDS),
        ),
    ],
    ids=lambda value: value if isinstance(value, str) and len(value) < 25 else "",
)  # fmt: skip
def test_formats_are_told_by_content(tmp_path, name, content):
    """Catches a reader chosen by the file's name, and bytes of the format that end up in the text."""
    dataset = load(write(tmp_path / name, content))
    assert sorted(records(dataset.train + dataset.val + dataset.test), key=str) == EXPECTED
    assert sorted(dataset.labels) == ["no", "yes"] and dataset.ceiling is None
    assert dataset.stage1_train == dataset.train and dataset.stage1_val == dataset.val


NASTY = [
    {"question": 'A "quoted", text\nof two lines and é 日本 \u2028 x', "label": "a, b", "rationale": 'He said "no"'}
]


@pytest.mark.parametrize(("name", "dump"), [("a.jsonl", jsonl), ("a.csv", as_csv)])
def test_quotes_commas_and_line_ends_survive(tmp_path, name, dump):
    """Catches a CSV read line by line, and a JSONL split at U+2028."""
    dataset = load(write(tmp_path / name, dump(RECORDS + NASTY)))
    assert NASTY[0] in records(dataset.train + dataset.val + dataset.test)


def test_long_csv_fields_are_read(tmp_path):
    """Catches the csv module's limit of 131072 characters a field, which long abstracts and notes pass."""
    long = RECORDS[0] | {"question": "long " * 40_000 + "end"}
    assert long in records(everything(load(write(tmp_path / "a.csv", as_csv([*RECORDS, long])))))


def test_folder_keeps_its_splits(tmp_path):
    """Catches splits of a folder that are mixed, shuffled or swapped; the formats may differ."""
    write(tmp_path / "train.jsonl", jsonl(RECORDS[:20]))
    write(tmp_path / "val.csv", as_csv(RECORDS[20:24]))
    write(tmp_path / "test.jsonl", jsonl(RECORDS[24:]))
    dataset = load(tmp_path)
    assert [records(s) for s in (dataset.train, dataset.val, dataset.test)] == [
        RECORDS[:20],
        RECORDS[20:24],
        RECORDS[24:],
    ]


def test_split_is_80_10_10_disjoint_and_by_seed(tmp_path):
    """Catches test examples in train, wrong shares, and a split that ignores or does not follow the seed."""
    path = write(tmp_path / "a.jsonl", jsonl(RECORDS))
    dataset = load(path)
    parts = [{e.question for e in split} for split in (dataset.train, dataset.val, dataset.test)]
    assert [len(part) for part in parts] == [24, 3, 3] and len(set.union(*parts)) == 30
    assert load(path) == dataset
    assert load(path, seed=1).test != dataset.test


def test_limit_keeps_at_most_n_of_each_split(tmp_path):
    """Catches a limit on the whole file instead of each split, or one that changes which examples are in test."""
    path = write(tmp_path / "a.jsonl", jsonl(RECORDS))
    small, full = load(path, limit=4), load(path)
    assert (small.train, small.val, small.test) == (full.train[:4], full.val, full.test)


def pubmedqa(n: int = 30) -> dict:
    return {
        str(100 + i): {
            "QUESTION": f"Does drug {i} help?", "CONTEXTS": [f"Aim {i}.", f"Result {i}."], "LABELS": ["AIM", "RESULT"],
            "final_decision": ["yes", "no", "maybe"][i % 3], "LONG_ANSWER": f"It helps {i}.",
        } for i in range(n)
    }  # fmt: skip


@pytest.mark.parametrize("indent", [None, 1])
def test_pubmedqa_is_read(tmp_path, indent):
    """Catches a lost abstract, or label and rationale from the wrong keys."""
    dataset = load(write(tmp_path / "ori_pqal.json", json.dumps(pubmedqa(), indent=indent)))
    assert [len(s) for s in (dataset.train, dataset.val, dataset.test)] == [24, 3, 3]
    expected = data.Example("Does drug 4 help? Aim 4. Result 4.", "no", "It helps 4.")
    assert expected in dataset.train + dataset.val + dataset.test
    assert sorted(dataset.labels) == ["maybe", "no", "yes"]


def test_pubmedqa_takes_its_official_test_split(tmp_path):
    """Catches official test questions in train; the rest is split 90/10."""
    path, official = write(tmp_path / "ori_pqal.json", pubmedqa()), [str(100 + i) for i in range(0, 30, 3)]
    write(tmp_path / "test_ground_truth.json", dict.fromkeys(official, "yes"))
    dataset = load(path)
    assert {e.question.split("?")[0] for e in dataset.test} == {f"Does drug {i} help" for i in range(0, 30, 3)}
    assert [len(s) for s in (dataset.train, dataset.val, dataset.test)] == [18, 2, 10]
    assert len({e.question for e in everything(dataset)}) == 30


def bioasq(n: int = 30) -> dict:
    questions = [
        {
            "id": str(i), "type": "yesno", "body": f"Is gene {i} bad?", "exact_answer": ["Yes", "no"][i % 2],
            "ideal_answer": [f"Gene {i} is.", "Second answer."],
            "snippets": [{"text": f"Snippet {i}."}, {"text": "More."}],
        } for i in range(n)
    ]  # fmt: skip
    return {"questions": [*questions, {"type": "list", "body": "Which genes?", "exact_answer": [["A"], ["B"]]}]}


def test_bioasq_is_read(tmp_path):
    """Catches list questions among the yes/no ones, lost snippets, `Yes` and `yes` as two labels."""
    dataset = load(write(tmp_path / "training.json", bioasq()))
    examples = everything(dataset)
    assert len(examples) == 30 and sorted(dataset.labels) == ["no", "yes"]
    assert data.Example("Is gene 4 bad? Snippet 4. More.", "yes", "Gene 4 is.") in examples


def test_bioasq_without_snippets_or_with_a_plain_answer(tmp_path):
    """Catches the older layout, where the ideal answer is a text, cut to its first letter."""
    content = bioasq()
    content["questions"][0] |= {"ideal_answer": "Plain.", "snippets": []}
    content["questions"][1] |= {"ideal_answer": []}
    examples = everything(load(write(tmp_path / "a.json", content)))
    assert data.Example("Is gene 0 bad?", "yes", "Plain.") in examples
    assert data.Example("Is gene 1 bad? Snippet 1. More.", "no", "") in examples


def replaced(i: int, row: object) -> str:
    return jsonl([*RECORDS[: i - 1], row, *RECORDS[i:]])


BAD = {
    "nothing": ("a.jsonl", "", "the file is empty"),
    "blank": ("a.csv", " \n\n", "the file is empty"),
    "latin-1": ("a.csv", "question,label,rationale\ncafé,a,r\n".encode("latin-1"), "not UTF-8"),
    "utf-16": ("a.csv", as_csv(RECORDS).encode("utf-16"), "not UTF-8"),
    "prose": ("a.txt", "Dear reader,\nthis is no data.\n", "line 1: no column 'question'"),
    "jsonl broken line": ("a.jsonl", jsonl(RECORDS[:2]) + '{"question": "x",\n', "line 3: not valid JSON"),
    "jsonl broken first line": ("a.jsonl", '{"question": \n' + jsonl(RECORDS), "not valid JSON"),
    "jsonl line after an empty one": ("a.jsonl", jsonl(RECORDS[:2]) + "\n{]}\n", "line 4: not valid JSON"),
    "jsonl without a label": ("a.jsonl", replaced(5, {"question": "q", "rationale": "r"}), "line 5: no 'label'"),
    "jsonl without a rationale": ("a.jsonl", replaced(2, {"question": "q", "label": "a"}), "line 2: no 'rationale'"),
    "jsonl of lists": ("a.jsonl", replaced(3, ["q", "a", "r"]), "line 3: expected an object"),
    "jsonl of null": ("a.jsonl", replaced(3, None), "line 3: expected an object"),
    "label is a number": ("a.jsonl", replaced(9, RECORDS[8] | {"label": 1}), "line 9: 'label' must be text, found int"),
    "rationale is null": ("a.jsonl", replaced(9, RECORDS[8] | {"rationale": None}), "line 9: 'rationale' must be text"),
    "question is empty": ("a.jsonl", replaced(4, RECORDS[3] | {"question": ""}), "line 4: 'question' is empty"),
    "label is spaces": ("a.jsonl", replaced(4, RECORDS[3] | {"label": " \t"}), "line 4: 'label' is empty"),
    "key twice": (
        "a.jsonl",
        jsonl(RECORDS) + '{"question":"q","label":"a","label":"b","rationale":"r"}',
        "line 31: a key occurs twice",
    ),
    "array item": ("a.json", [*RECORDS, {"question": "q"}], "record 31: no 'label'"),
    "array broken": ("a.json", json.dumps(RECORDS)[:-1], "not valid JSON"),
    "one object": ("a.json", "{}", "no 'question'"),
    "deep": ("a.json", "[" * 100_000, "nested too deeply"),
    "pretty array broken": ("a.json", '[\n{"question": "q",\n"label": }\n]', "line 3"),
    "number of 5000 digits": ("a.jsonl", jsonl(RECORDS) + '{"question": ' + "1" * 5000 + "}", "line 31"),
    "lone surrogate": ("a.jsonl", jsonl(RECORDS) + '{"question":"\\ud800","label":"a","rationale":"r"}', "line 31"),
    "csv column twice": (
        "a.csv",
        as_csv(RECORDS).replace("rationale", "rationale,label", 1).replace('."', '.",x'),
        "line 1",
    ),
    "csv header": ("a.csv", as_csv(RECORDS).replace("label", "labels", 1), "line 1: no column 'label'"),
    "csv semicolons": ("a.csv", "question;label;rationale\nq;a;r\n", "line 1: no column 'question'"),
    "csv more fields": ("a.csv", "question,label,rationale\nq,a,r\nq, s,a,r\n", "line 3: more fields"),
    "csv fewer fields": ("a.csv", "question,label,rationale\nq,a\n", "line 2: fewer fields"),
    "csv quote": ("a.csv", 'question,label,rationale\nq,a,r\nq,"a"b,r\n', "not valid CSV"),
    "csv open quote": ("a.csv", 'question,label,rationale\nq,a,"r\n', "not valid CSV"),
    "csv empty label": ("a.csv", 'question,label,rationale\n"q\nq",a,r\nq,,r\n', "line 4: 'label' is empty"),
    "header only": ("a.csv", "question,label,rationale\n", "the train split is empty"),
    "too few": ("a.jsonl", jsonl(RECORDS[:5]), "the val split is empty"),
    "one label": ("a.jsonl", jsonl([r | {"label": "yes"} for r in RECORDS]), "one label, 'yes'"),
    "labels alike": ("a.jsonl", replaced(4, RECORDS[3] | {"label": "YES"}), "differ only by case or spaces"),
    "pubmedqa key": ("a.json", changed(pubmedqa(), "103", value={"QUESTION": "q"}), "id 103: no 'CONTEXTS'"),
    "pubmedqa contexts": ("a.json", changed(pubmedqa(), "103", "CONTEXTS", value="text"), "id 103: 'QUESTION' must be"),
    "pubmedqa label": ("a.json", changed(pubmedqa(), "103", "final_decision", value=3), "id 103: 'label' must be text"),
    "bioasq list": ("a.json", {"questions": {"a": 1}}, "'questions' must be a list"),
    "bioasq body": ("a.json", changed(bioasq(), "questions", 4, value={"type": "yesno"}), "question 5: no 'body'"),
    "bioasq snippets": (
        "a.json",
        changed(bioasq(), "questions", 4, "snippets", value=["text"]),
        "question 5: 'snippets'",
    ),
    "bioasq no answer": (
        "a.json",
        changed(bioasq(), "questions", 4, "exact_answer", value=None),
        "question 5: 'label'",
    ),
}


@pytest.mark.parametrize(("name", "content", "message"), BAD.values(), ids=BAD)
def test_bad_input_is_told_in_one_line(tmp_path, name, content, message):
    """Catches a traceback, or a message that does not say which file and line is meant, or spans several lines."""
    path = write(tmp_path / name, content)
    with pytest.raises(data.InputError) as caught:
        load(path)
    text = str(caught.value)
    assert text.startswith(str(path)) and message in text and "\n" not in text


def test_missing_file_is_told(tmp_path):
    """Catches a traceback for a mistyped path."""
    with pytest.raises(data.InputError, match=r"nowhere\.jsonl: No such file.*--data"):
        load(tmp_path / "nowhere.jsonl")


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["train.jsonl", "test.jsonl"], "neither val.jsonl"),
        ([], "neither train.jsonl"),
        (["train.jsonl", "train.csv"], "both train.jsonl"),
    ],
)
def test_incomplete_folder_is_told(tmp_path, names, message):
    """Catches a folder with a split missing or there twice, which would be guessed at."""
    for name in names:
        write(tmp_path / name, jsonl(RECORDS))
    with pytest.raises(data.InputError, match=re.escape(f"{tmp_path}: {message}")):
        load(tmp_path)


def test_bad_line_in_a_folder_names_its_file(tmp_path):
    """Catches an error that names the folder only."""
    for split in ("train", "val", "test"):
        write(tmp_path / f"{split}.jsonl", jsonl(RECORDS[:4]) + ("{}" if split == "val" else ""))
    with pytest.raises(data.InputError, match=re.escape(f"{tmp_path / 'val.jsonl'}: line 5: no 'question'")):
        load(tmp_path)


def test_empty_rationale_is_allowed(tmp_path):
    """Catches a refusal of data that have rationales for a part of the examples only."""
    dataset = load(write(tmp_path / "a.jsonl", jsonl([r | {"rationale": ""} for r in RECORDS])))
    assert {e.rationale for e in everything(dataset)} == {""}


# ---------------------------------------------------------------------------------------------------------------------
# Tokenizer and prompts.


@cache
def tokenizer() -> data.Tokenizer:
    examples = triage().train[:400]
    return data.Tokenizer.train([e.question for e in examples] + [e.rationale for e in examples] + DISPOSITIONS, 700)


@pytest.mark.parametrize(
    "text",
    [
        *DISPOSITIONS, "no", "go to ED now!", "NAÏVE café", "emoji 🤒🏽 👩‍⚕️", "حمى شديدة", "日本語の発熱",
        "two\nlines", "a\ttab", "a  b   c", "½ ﬁ \u212b A\u030a",
        "</s>", "<pad> <unk>", "<0x41>", "nul \0 byte", "x\u2028y\u00a0z", "Q Z X ~ | ^", "1,000.50", "",
    ],
)  # fmt: skip
def test_text_survives_the_tokenizer(text):
    """Catches dropped letters (once the E of `go to ED now`), Unicode normalisation and swallowed white space."""
    ids = tokenizer().encode(text)
    assert tokenizer().decode(ids) == text
    assert not {0, 1, 2} & set(ids)  # no padding, end or unknown token


def test_random_text_survives_the_tokenizer():
    """Catches any character that has no byte to fall back to."""
    rng = random.Random(0)
    for _ in range(500):
        codes = [
            rng.choice([rng.randint(33, 126), 32, rng.randint(160, 0x2500), rng.randint(0x10000, 0x10FFFF)])
            for _ in range(12)
        ]
        text = "".join(map(chr, codes)).strip()
        assert tokenizer().decode(tokenizer().encode(text)) == text


def test_tokenizer_has_the_size_asked_for_and_shortens_text():
    """Catches a vocabulary that collapses or holds nothing but bytes and letters."""
    assert len(tokenizer()) == 700
    note = triage().test[0].question
    assert len(tokenizer().encode(note)) < len(note) / 3


def test_decode_stops_at_the_end_token_and_skips_padding():
    """Catches text after the end token in an answer."""
    ids = tokenizer().encode("home care")
    assert tokenizer().decode([*ids, 1, *tokenizer().encode("call 911"), 0]) == "home care"
    assert tokenizer().decode([0, *ids, 0, 0]) == "home care"
    assert tokenizer().decode([1]) == tokenizer().decode([0, 0]) == tokenizer().decode([]) == ""


def test_tokenizer_is_deterministic_and_can_be_stored():
    """Catches a run that cannot be resumed because its tokenizer comes out different."""
    again = data.Tokenizer.train([e.question for e in triage().train[:50]], 400)
    assert again.model == data.Tokenizer.train([e.question for e in triage().train[:50]], 400).model
    text = triage().test[0].question
    assert data.Tokenizer(again.model).encode(text) == again.encode(text)


@pytest.mark.parametrize(
    "texts",
    [["yes"], ["a b", "c d"], ["x" * 20_000], ["two\nlines", "two\nlines"], ["日本語 🤒 " * 3, "é"]],
    ids=["one", "two", "long", "lines", "unicode"],
)  # fmt: skip
def test_tokenizer_trains_on_very_small_data(texts):
    """Catches a crash where there are fewer pieces to learn than asked for, or a text above SentencePiece's limit."""
    small = data.Tokenizer.train(texts, 1000)
    assert all(small.decode(small.encode(text)) == text.strip() for text in texts)


def test_tokenizer_trains_on_thousands_of_different_characters():
    """Catches a crash on Chinese text: SentencePiece refuses a character coverage below 0.98."""
    texts = ["".join(chr(0x4E00 + (37 * i + 11 * j) % 3000) for j in range(40)) for i in range(200)]
    small = data.Tokenizer.train(texts, 600)
    assert small.decode(small.encode(texts[7])) == texts[7]


HEADS = [data.EXPLAIN, data.PREDICT, *(data.EXPLAIN_GIVEN.format(label=label) for label in DISPOSITIONS)]


@pytest.mark.parametrize("head", HEADS)
def test_prompt_is_the_tokenization_of_the_whole_string(head):
    """Catches a missing or doubled space between head and question, and a missing end token."""
    prompts = data.Prompts(tokenizer(), 256, 64)
    for example in triage().test[:50]:
        assert prompts.source(head, example.question) == [*tokenizer().encode(f"{head} {example.question}"), 1]


def test_prompt_strings_are_the_papers():
    """Catches a changed wording of the three prompts."""
    prompts, text = data.Prompts(tokenizer(), 256, 64), "a cough"
    written = [tokenizer().decode(prompts.source(head, text)) for head in HEADS[:3]]
    assert written == ["explain: a cough", "predict: a cough", "given label: home care, explain: a cough"]


@pytest.mark.parametrize("head", HEADS)
def test_long_question_is_cut_and_the_label_stays_whole(head):
    """Catches a cut through the label, one that loses the end token, or a prompt longer than the limit."""
    prompts, question = data.Prompts(tokenizer(), 30, 64), " ".join(e.question for e in triage().test[:5])
    ids, head_ids = prompts.source(head, question), tokenizer().encode(head)
    assert len(ids) == 30 and ids[-1] == 1
    assert ids[: len(head_ids)] == head_ids
    assert ids[len(head_ids) : -1] == tokenizer().encode(question)[: 29 - len(head_ids)]
    assert tokenizer().decode(ids).startswith(head)


def test_cutting_does_not_change_what_is_cached():
    """Catches a cache that holds the cut text, or the same text cut for another head."""
    prompts, question = data.Prompts(tokenizer(), 20, 10), triage().test[0].question
    first = [prompts.source(head, question) for head in HEADS] + [prompts.target(question)]
    assert [prompts.source(head, question) for head in HEADS] + [prompts.target(question)] == first
    assert list(prompts.ids(question)) == tokenizer().encode(question)


def test_target_ends_with_the_end_token():
    """Catches a target without end token, whose model never stops, and one that is cut to make no room for it."""
    prompts = data.Prompts(tokenizer(), 256, 8)
    assert prompts.target("home care") == [*tokenizer().encode("home care"), 1]
    long = triage().test[0].question
    assert prompts.target(long) == [*tokenizer().encode(long)[:7], 1]


def test_empty_rationale_has_no_target_tokens():
    """Catches a model that is trained to say nothing where a rationale is missing."""
    prompts = data.Prompts(tokenizer(), 256, 8)
    assert prompts.target("") == []
    assert not data.pad([prompts.target("")]).any()


# ---------------------------------------------------------------------------------------------------------------------
# Batches.


def test_pad_fills_on_the_right_with_zeros():
    """Catches padding on the left, rows swapped, or another type than the embedding takes."""
    out = data.pad([[5, 6, 7], [8], []])
    assert out.tolist() == [[5, 6, 7], [8, 0, 0], [0, 0, 0]] and out.dtype == torch.int64
    assert data.pad([[]]).tolist() == [[0]]  # a batch of empty targets still has a shape


def random_lengths(n: int) -> list[int]:
    rng = random.Random(0)
    return [rng.randint(5, 120) for _ in range(n)]


@pytest.mark.parametrize(("n", "batch_size"), [(512, 16), (1000, 32), (64, 64)])
def test_batches_hold_every_example_at_most_once(n, batch_size):
    """Catches examples drawn twice or lost, beyond the last incomplete batch."""
    batches = data.batch_order(random_lengths(n), batch_size, 0, 0)
    drawn = [i for batch in batches for i in batch]
    assert len(set(drawn)) == len(drawn) == n // batch_size * batch_size
    assert {len(batch) for batch in batches} == {batch_size}
    assert set(drawn) <= set(range(n))


def test_fewer_examples_than_a_batch_make_one_batch():
    """Catches an epoch without any batch, over which a training loop would turn for ever."""
    (batch,) = data.batch_order([3, 1, 2], 8, 0, 0)
    assert sorted(batch) == [0, 1, 2]


def test_which_examples_are_left_out_changes():
    """Catches a last incomplete batch that is always made of the same, say the longest, examples."""
    lengths = random_lengths(100)
    dropped = [set(range(100)) - {i for batch in data.batch_order(lengths, 32, 0, e) for i in batch} for e in range(30)]
    assert len(set.union(*dropped)) > 30
    long = [sum(lengths[i] for i in some) / 4 for some in dropped]
    assert abs(sum(long) / 30 - sum(lengths) / 100) < 12


def test_batch_order_is_a_function_of_seed_and_epoch():
    """Catches an order from a global generator (no exact resume), or the same order in every epoch."""
    lengths = random_lengths(500)
    first = data.batch_order(lengths, 16, 0, 3)
    torch.manual_seed(5)
    random.seed(5)
    assert data.batch_order(lengths, 16, 0, 3) == first
    assert data.batch_order(lengths, 16, 0, 4) != first != data.batch_order(lengths, 16, 1, 3)
    neighbours = [
        {frozenset(pair) for batch in data.batch_order(lengths, 16, 0, epoch) for pair in pairwise(batch)}
        for epoch in (3, 4)
    ]
    assert len(neighbours[0] & neighbours[1]) < len(neighbours[0]) / 4  # who meets whom changes too


def padding(batches: list[list[int]], lengths: list[int]) -> float:
    """Share of padding among all positions."""
    positions = sum(len(batch) * max(lengths[i] for i in batch) for batch in batches)
    return 1 - sum(lengths[i] for batch in batches for i in batch) / positions


def test_batches_waste_little_padding_and_are_not_sorted():
    """Catches lengths that are not bucketed, and an epoch that runs from short to long."""
    lengths = random_lengths(1024)
    batches = data.batch_order(lengths, 16, 0, 0)
    shuffled = random.Random(0).sample(range(1024), 1024)
    assert padding(batches, lengths) < padding([shuffled[i : i + 16] for i in range(0, 1024, 16)], lengths) / 4
    means = [sum(lengths[i] for i in batch) / 16 for batch in batches]
    rises = sum(a < b for a, b in pairwise(means))
    assert 20 < rises < 43  # of 63
