"""Text in, batches out: examples, the simulated nurse line, file readers, tokenizer, prompts.

The default data are SIMULATED and are not medical advice. The paper's notes are private, so a
generator stands in: it draws the facts of a call, a rule makes the label from the facts, and note
and rationale are written from them. As facts can be read back, a rationale is checked exactly.
"""

import csv
import functools
import io
import json
import os
import random
import re
from collections import Counter, namedtuple
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import sentencepiece
import torch


class InputError(ValueError):
    """The input cannot be used. The message is one line: what, where, how to mend it."""

    def __init__(self, message: str):
        super().__init__(" ".join(message.split()))  # a name in it may hold a line end


@dataclass(frozen=True)
class Example:
    question: str
    label: str
    rationale: str  # may be empty in a user's data: then it is neither learned nor scored


@dataclass
class Dataset:
    train: list[Example]
    val: list[Example]
    test: list[Example]
    labels: list[str]
    stage1_train: list[Example]  # the same notes with the rationales that stage 1 learns
    stage1_val: list[Example]
    ceiling: list[Example]  # the rule's label and its rationale for each test note
    ceiling_gold: list[Example]  # the gold label and its rationale; a user's data have neither


# ---- The simulated nurse line: words. A fact is named by its usual wording; `other` is another,
# `short` the nurse's abbreviation. `group` is a row of GROUPS, `cue` what reassures, `reasons` what
# a red flag can mean and the same for the nurse.
Complaint = namedtuple("Complaint", ["other", "short", "group", "cue"])
RedFlag = namedtuple("RedFlag", ["tier", "other", "short", "reasons"])
COMPLAINTS = {
    "chest pain": Complaint("pain in the chest", "CP", "heart", "pain only on pressure"),
    "a headache": Complaint("an aching head", "HA", "head", "a known pattern"),
    "abdominal pain": Complaint("belly pain", "abd pain", "belly", "pain only on pressure"),
    "a fever": Complaint("a high temperature", "febrile", "fever", "a good appetite"),
    "a cough": Complaint("a lingering cough", "cough sx", "lungs", "a good appetite"),
    "shortness of breath": Complaint("trouble breathing", "SOB", "lungs", "slow improvement"),
    "dizziness": Complaint("a dizzy spell", "dizzy", "head", "a known pattern"),
    "vomiting": Complaint("throwing up", "emesis", "belly", "a good appetite"),
    "back pain": Complaint("an aching back", "LBP", "heart", "pain only on pressure"),
    "a rash": Complaint("spots on the skin", "rash noted", "skin", "slow improvement"),
    "a head injury": Complaint("a blow to the head", "head inj", "head", "slow improvement"),
    "a nosebleed": Complaint("a bleeding nose", "epistaxis", "heart", "slow improvement"),
    "a sore throat": Complaint("a painful throat", "ST", "lungs", "a good appetite"),
    "an eye problem": Complaint("an irritated eye", "eye c/o", "head", "slow improvement"),
    "leg pain": Complaint("a painful leg", "leg pn", "limbs", "pain only on pressure"),
    "a urinary problem": Complaint("trouble passing urine", "GU c/o", "belly", "a good appetite"),
    "diarrhea": Complaint("loose stools", "loose BM", "belly", "a good appetite"),
    "a wound": Complaint("a cut in the skin", "lac", "skin", "pain only on pressure"),
    "soreness from a fall": Complaint("aches from a fall", "GLF", "limbs", "pain only on pressure"),
    "an allergic reaction": Complaint("an allergy", "allergic rxn", "skin", "a known pattern"),
    "high blood sugar": Complaint("sugar above normal", "BG high", "belly", "a good appetite"),
    "anxiety": Complaint("an anxious feeling", "anx", "mind", "a known pattern"),
}
GROUPS = {  # the red flags that callers of a group of complaints mention, the worst first
    "heart": ["left-arm pressure", "sudden fainting", "coughing up blood", "a racing pulse"],
    "head": ["a drooping face", "a stiff neck", "repeated confusion", "blurred vision"],
    "lungs": ["blue lips", "a swollen tongue", "coughing up blood", "ear pain at night"],
    "fever": ["a long seizure", "a stiff neck", "green phlegm", "ear pain at night"],
    "belly": ["sudden fainting", "black tarry stools", "hardly any urine", "burning urine"],
    "skin": ["blue lips", "a swollen tongue", "a stiff neck", "red skin streaks"],
    "limbs": ["a long seizure", "coughing up blood", "red skin streaks", "a racing pulse"],
    "mind": ["left-arm pressure", "plans of self-harm", "a racing pulse"],
}
RED_FLAGS = {
    "left-arm pressure": RedFlag(4, "a heavy left arm", "L arm sx", ["a heart attack", "MI"]),
    "a drooping face": RedFlag(4, "a face hanging down", "facial droop", ["a stroke", "CVA"]),
    "blue lips": RedFlag(4, "lips turning blue", "cyanosis", ["lack of oxygen", "hypoxia"]),
    "sudden fainting": RedFlag(4, "fainting with cold sweat", "syncope", ["shock", "shock"]),
    "a long seizure": RedFlag(4, "minutes of seizure", "prolonged sz", ["brain damage", "status"]),
    "a swollen tongue": RedFlag(4, "a thick tongue", "tongue edema", ["a closing airway", "angio"]),
    "a stiff neck": RedFlag(3, "a neck that is stiff", "nuchal rig", ["meningitis", "meningitis"]),
    "black tarry stools": RedFlag(3, "stools like tar", "melena", ["a bleeding ulcer", "GIB"]),
    "coughing up blood": RedFlag(3, "bloody sputum", "hemoptysis", ["a clot in the lung", "PE"]),
    "repeated confusion": RedFlag(3, "being confused", "AMS", ["a bleed in the skull", "SDH"]),
    "hardly any urine": RedFlag(3, "almost no urine", "oliguria", ["dehydration", "dehydration"]),
    "plans of self-harm": RedFlag(3, "planning self-harm", "SI w plan", ["a risk to life", "risk"]),
    "burning urine": RedFlag(2, "urine that burns", "dysuria", ["a urinary infection", "UTI"]),
    "green phlegm": RedFlag(2, "phlegm that is green", "productive", ["pneumonia", "PNA"]),
    "blurred vision": RedFlag(2, "seeing a blur", "blurry vision", ["eye pressure", "glaucoma"]),
    "ear pain at night": RedFlag(2, "a painful ear", "otalgia", ["an ear infection", "AOM"]),
    "red skin streaks": RedFlag(2, "streaks on the skin", "streaking", ["an infection", "infxn"]),
    "a racing pulse": RedFlag(2, "a pulse that races", "tachy", ["a rhythm problem", "arrhythmia"]),
}
PHRASES = {  # the wordings of every fact: the usual one first, the nurse's last
    "mild": ["mild", "slight", "mild"],
    "moderate": ["moderate", "medium", "mod"],
    "severe": ["severe", "very strong", "sev"],
    "over a week": ["over a week", ">1wk"],
    "a good appetite": ["a good appetite", "eating and drinking well", "tol PO"],
    "pain only on pressure": ["pain only on pressure", "a tender spot", "reproducible"],
    "a known pattern": ["a known pattern", "episodes like it before", "hx of same"],
    "slow improvement": ["slow improvement", "feeling better since yesterday", "improving"],
    "older age": ["older age", "elderly"],
    "very young age": ["very young age", "infant"],
    "a pregnancy": ["a pregnancy", "expecting a baby", "preg"],
    "a weak immune system": ["a weak immune system", "chemotherapy", "immunosupp"],
    "a blood thinner": ["a blood thinner", "warfarin tablets", "on AC"],
}
IMPLIED = {  # what a rationale says instead of a label's name; the nurse's last
    "home care": ["no visit should be needed for this", "self-care adv"],
    "see doctor within 3 days": ["an office visit this week is soon enough", "appt this wk"],
    "see doctor within 24 hours": ["a doctor should look at this by tomorrow", "appt <24h"],
    "go to ED now": ["emergency care is needed without waiting", "ED"],
    "call 911": ["an ambulance is needed at once", "EMS"],
}
for name, row in (COMPLAINTS | RED_FLAGS).items():
    PHRASES[name] = [name, row.other, row.short]
CUES = ["a good appetite", "pain only on pressure", "a known pattern", "slow improvement"]
AGES = ["older age", "very young age"]
MODIFIERS = [*AGES, "a pregnancy", "a weak immune system", "a blood thinner"]
DISTRACTORS = ["has a dog", "works nights", "plays chess", "moved house", "asks about a flu shot"]
DISPOSITIONS = list(IMPLIED)  # tiers 0 to 4
ENDINGS = {  # how the rationales of a voice end, in shares
    "llm": {"named": 0.75, "implied": 0.25},
    "nurse": {"left out": 0.4, "implied": 0.36, "named": 0.24},
    "post": {"implied": 0.6, "named": 0.4},
}
OLD_YEARS, LONG_DAYS = 75, 7


@dataclass(frozen=True)
class Call:
    """The facts of one call. Label, note and rationales are made from them."""

    complaint: str
    severity: str
    days: int
    person: str  # "a woman of 58 years"
    flags: list[str]  # the red flags, the worst first
    denied: list[str]  # red flags that the caller denies; of this and the rest one or none
    cues: list[str]
    modifiers: list[str]
    distractors: list[str]

    def facts(self) -> set[str]:
        facts = {self.complaint, self.severity, *self.flags, *self.cues, *self.modifiers}
        facts.update(f"no {flag}" for flag in self.denied)
        return facts | {"over a week"} if self.days > LONG_DAYS else facts


def triage_tier(facts: set[str]) -> int:
    """The rule: facts -> tier, an index into DISPOSITIONS. A denied fact ("no ...") never counts.

    1. Severity gives the base (mild 0, moderate 1, severe 2); over a week makes it at least 1.
    2. A red flag raises the tier to its own. Only without one, a reassuring cue lowers it by one.
    3. A modifier (age, pregnancy, ...) raises it by one, up to the emergency department.
    """
    tier = 0
    if "severe" in facts:
        tier = 2
    elif "moderate" in facts or "over a week" in facts:
        tier = 1
    flags = facts & RED_FLAGS.keys()
    for flag in flags:
        tier = max(tier, RED_FLAGS[flag].tier)
    if tier > 0 and not flags and not facts.isdisjoint(CUES):
        tier -= 1
    if tier < 3 and not facts.isdisjoint(MODIFIERS):
        tier += 1
    return tier


def draw_call(rng: random.Random) -> Call:
    """One call, with red flags and a cue that fit its complaint."""

    def maybe(share: float, options: list[str]) -> list[str]:
        return [rng.choice(options)] if rng.random() < share else []

    complaint = rng.choice(list(COMPLAINTS))
    group = GROUPS[COMPLAINTS[complaint].group]
    weights = [6 - RED_FLAGS[flag].tier for flag in group]  # the worse, the rarer
    drawn = rng.choices(group, weights, k=rng.choices([0, 1, 2], [48, 40, 12])[0])
    flags = [flag for flag in group if flag in drawn]
    denied = maybe(0.15, [flag for flag in group if flag not in drawn])
    severity = rng.choices(["mild", "moderate", "severe"], [46, 36, 18])[0]
    days = rng.randint(2, LONG_DAYS) if rng.random() < 0.75 else rng.randint(LONG_DAYS + 1, 20)
    modifiers = maybe(0.3, MODIFIERS)
    sex = rng.choice(["woman", "man"])
    person = f"a {sex} of {rng.randint(18, OLD_YEARS - 1)} years"
    if "older age" in modifiers:
        person = f"a {sex} of {rng.randint(OLD_YEARS, 99)} years"
    elif "a pregnancy" in modifiers:
        person = f"a woman of {rng.randint(18, 44)} years"
    elif "very young age" in modifiers and complaint == "anxiety":
        modifiers = []  # babies have none
    elif "very young age" in modifiers:
        person = f"a baby of {rng.randint(2, 11)} months"
    cues = maybe(0.3, [COMPLAINTS[complaint].cue])
    distractors = maybe(0.5, DISTRACTORS)
    return Call(complaint, severity, days, person, flags, denied, cues, modifiers, distractors)


def sentences(parts: list[str]) -> str:
    return " ".join(part[0].upper() + part[1:] + "." for part in parts)


def write_note(call: Call, rng: random.Random) -> str:
    """Who, what and for how long; then the other facts in any order."""

    def say(fact: str) -> str:
        return rng.choice(PHRASES[fact][:-1])

    who = call.person
    what = f"{say(call.complaint)} for {call.days} days"
    opening = rng.choice([f"{who} with {what}", f"{who} has had {what}", f"{what} in {who}"])
    rest = [f"{rng.choice(['it is', 'caller calls it'])} {say(call.severity)}", *call.distractors]
    for fact in call.flags + call.cues + call.modifiers:
        if fact not in AGES:  # the opening tells the age
            rest.append(f"{rng.choice(['reports', 'describes', 'mentions'])} {say(fact)}")
    for flag in call.denied:
        rest.append(f"{rng.choice(['denies', 'is free of'])} {say(flag)}")
    rng.shuffle(rest)
    return sentences([opening, *rest])


# ---- The simulated nurse line: a rationale for a call and a tier, in three voices. If the tier is
# not the rule's, the nurse had reasons that no note holds, and the rationale says so.
def llm_rationale(call: Call, tier: int, ending: str) -> str:
    """Sentences with a reason for each step of the rule."""
    if call.flags:
        steps = [f"{call.flags[0]} can mean {RED_FLAGS[call.flags[0]].reasons[0]}"]
    else:
        long = " for over a week" if call.days > LONG_DAYS else ""
        steps = [f"{call.complaint} is {call.severity}{long}"]
        steps += [f"the caller denies {flag}" for flag in call.denied]
        steps += [f"{cue} is reassuring" for cue in call.cues]
    steps += [f"{modifier} raises the risk" for modifier in call.modifiers]
    return sentences(steps + closing(call, tier, ending, 0))


def nurse_rationale(call: Call, tier: int, ending: str, wording: int = -1) -> str:
    """Abbreviations, and often no label at the end, where the facts argue for it."""
    steps = [f"{PHRASES[call.complaint][wording]}, {PHRASES[call.severity][wording]}"]
    if call.days > LONG_DAYS:
        steps[0] += f", {PHRASES['over a week'][wording]}"
    if call.flags:
        steps[0] += f", suspect {RED_FLAGS[call.flags[0]].reasons[wording]}"
    steps += [f"denies {PHRASES[flag][wording]}" for flag in call.denied]
    reasons = call.flags[:1] or call.cues
    steps += [PHRASES[fact][wording] for fact in reasons + call.modifiers]
    return sentences(steps + closing(call, tier, ending, wording))


def post_rationale(call: Call, tier: int, ending: str) -> str:
    """The nurse's rationale, post-processed: in the usual words, with an end."""
    return nurse_rationale(call, tier, ending, wording=0)


def closing(call: Call, tier: int, ending: str, wording: int) -> list[str]:
    """Any override of the rule, and the label: named, implied or left out."""
    label = DISPOSITIONS[tier]
    advice = "the advice is: " if wording == 0 else ""
    rule = triage_tier(call.facts())
    steps = []
    if tier != rule:
        steps.append(f"one level {'up' if tier > rule else 'down'} on judgement")
    if ending == "named":
        steps.append(advice + label)
    elif ending == "implied" or tier != rule:  # left out, the facts would argue for the rule
        steps.append(advice + IMPLIED[label][wording])
    return steps


VOICES = {"llm": llm_rationale, "nurse": nurse_rationale, "post": post_rationale}


def draw_case(rng: random.Random, override: float) -> tuple[Call, str, int]:
    """A call, its note and the tier that the nurse decides on."""
    call = draw_call(rng)
    note = write_note(call, rng)
    rule = triage_tier(call.facts())
    neighbour = rng.choice([tier for tier in (rule - 1, rule + 1) if 0 <= tier <= 4])
    tier = neighbour if rng.random() < override else rule
    return call, note, tier


def explain(cases: list, voice: str, endings: dict[str, float], seed: str) -> list[Example]:
    """The cases as examples, with rationales in one voice whose endings have these shares."""
    rng = random.Random(seed)
    examples = []
    for call, note, tier in cases:
        ending = rng.choices(list(endings), endings.values())[0]
        rationale = VOICES[voice](call, tier, ending)
        examples.append(Example(note, DISPOSITIONS[tier], rationale))
    return examples


def simulate(
    sizes: dict[str, int], override: float, seed: int, rationales: str, stage1_rationales: str
) -> Dataset:
    """The simulated nurse line; `sizes` of train, val and test.

    In a share `override` of the calls the nurse decides one level above or below the rule, for
    reasons that the note does not hold. Notes and labels do not depend on the voices.
    """
    cases = {}
    for split, size in sizes.items():
        rng = random.Random(f"{seed} {split}")  # a string: the same calls on every machine
        cases[split] = [draw_case(rng, override) for _ in range(size)]

    @functools.cache  # if both stages have one voice, nothing is written twice
    def explained(split: str, voice: str) -> list[Example]:
        return explain(cases[split], voice, ENDINGS[voice], f"{seed} {split} {voice}")

    train, val, test = [explained(split, rationales) for split in ("train", "val", "test")]
    stage1_train, stage1_val = [explained(split, stage1_rationales) for split in ("train", "val")]
    # The reference explainer knows the rule and always ends in the likelier way.
    shares = ENDINGS[rationales]
    likelier = {max(shares, key=shares.get): 1}
    by_rule = [(call, note, triage_tier(call.facts())) for call, note, _ in cases["test"]]
    ceiling = explain(by_rule, rationales, likelier, "")
    ceiling_gold = explain(cases["test"], rationales, likelier, "")
    return Dataset(train, val, test, DISPOSITIONS, stage1_train, stage1_val, ceiling, ceiling_gold)


# ---- The simulated nurse line: reading facts back, for checking a rationale.
FACT_OF = {}  # wording in lower case, without its article: fact or label
for name, wordings in (PHRASES | IMPLIED).items():
    for wording in [name, *wordings]:
        FACT_OF[re.sub("^(a|an) ", "", wording.lower())] = name
ANY_FACT = re.compile(rf"(?<!\w)({'|'.join(map(re.escape, FACT_OF))})(?!\w)")


def read_facts(text: str) -> set[str]:
    """The facts and dispositions that a text states; "no ..." for what its sentence denies."""
    facts = set()
    for sentence in re.split("[.;]", text.lower()):
        stated, *denied = re.split("denies|free of", sentence, maxsplit=1)
        for wording in ANY_FACT.findall(stated):
            facts.add(FACT_OF[wording])
        for wording in ANY_FACT.findall("".join(denied)):
            facts.add(f"no {FACT_OF[wording]}")
        for number, unit in re.findall(r"(\d{1,4}) (day|month|year)", sentence):
            if unit == "day" and int(number) > LONG_DAYS:
                facts.add("over a week")
            elif unit == "month":
                facts.add("very young age")
            elif unit == "year" and int(number) >= OLD_YEARS:
                facts.add("older age")
    return facts


def argues_for(text: str) -> str | None:
    """The disposition that a rationale names or implies, or else the rule's for its facts.

    None where it argues for several, or states nothing.
    """
    facts = read_facts(text)
    labels = facts.intersection(DISPOSITIONS)
    if facts and not labels:
        labels = {DISPOSITIONS[triage_tier(facts)]}
    return labels.pop() if len(labels) == 1 else None


def ungrounded(text: str, question: str) -> list[str]:
    """The facts that a rationale states and its question does not."""
    return sorted(read_facts(text) - read_facts(question) - set(DISPOSITIONS))


# ---- Files. Whatever is wrong in them becomes an InputError that names the place.
COLUMNS = ["question", "label", "rationale"]
FAULTS = (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError, csv.Error)


def make_example(record: dict) -> Example:
    """A record with the three columns -> Example. Only the rationale may be empty."""
    texts = []
    for column in COLUMNS:
        text = record.get(column)
        if not isinstance(text, str):
            raise ValueError(f"no text as '{column}'")
        if not text.strip() and column != "rationale":
            raise ValueError(f"'{column}' is empty")
        text.encode()  # half a character (a lone surrogate) is a ValueError
        texts.append(text.strip())
    return Example(*texts)


def parse_json(text: str) -> object:
    def refuse_twins(pairs: list) -> dict:  # json would keep the last of two equal keys
        if len(dict(pairs)) < len(pairs):
            raise ValueError("a key occurs twice in one object")
        return dict(pairs)

    return json.loads(text, object_pairs_hook=refuse_twins)


def pubmedqa_record(item: dict) -> dict:
    texts = [item["QUESTION"]] + item["CONTEXTS"]
    label, rationale = item["final_decision"], item["LONG_ANSWER"]
    return {"question": " ".join(texts), "label": label, "rationale": rationale}


def bioasq_record(item: dict) -> dict:
    texts = [item["body"]] + [snippet["text"] for snippet in item["snippets"]]
    label, rationale = item["exact_answer"].lower(), item["ideal_answer"]
    if isinstance(rationale, list):  # newer files give several
        rationale = rationale[0]
    return {"question": " ".join(texts), "label": label, "rationale": rationale}


def read_file(path: Path) -> dict[str, Example]:
    """The examples of a file by their place in it; PubMedQA's by their ids."""
    csv.field_size_limit(2**31 - 1)  # the default, 131072, is too short for articles
    hint = f"each record needs {', '.join(COLUMNS)} as UTF-8 text"
    place, examples = "the file", {}
    try:
        text = path.read_text(encoding="utf-8-sig")  # -sig: without Excel's byte order mark
        if not text.strip() or "\0" in text:
            raise ValueError("it is empty, or no text")
        if path.suffix == ".jsonl":
            for number, line in enumerate(text.split("\n"), 1):
                place = f"line {number}"
                if line.strip():
                    examples[place] = make_example(parse_json(line))
        elif path.suffix == ".csv":
            rows = csv.DictReader(io.StringIO(text, newline=""), strict=True)
            if len(set(rows.fieldnames)) < len(rows.fieldnames):
                raise ValueError("a column occurs twice")
            place = "after line 1"
            for row in rows:
                place = f"line {rows.line_num}"
                if None in row or None in row.values():
                    raise ValueError("not as many fields as columns; quote texts with commas")
                examples[place] = make_example(row)
                place = f"after line {rows.line_num}"
        elif path.suffix == ".json":
            hint = "a .json file must be PubMedQA's or BioASQ's own; name others .jsonl or .csv"
            content = parse_json(text)
            if "questions" not in content:  # PubMedQA's ori_pqal.json
                for place, item in content.items():
                    examples[place] = make_example(pubmedqa_record(item))
            else:  # BioASQ Task B, whose other questions have no single label
                for number, item in enumerate(content["questions"], 1):
                    place = f"question {number}"
                    if item["type"] == "yesno":
                        examples[place] = make_example(bioasq_record(item))
        else:
            raise ValueError("its name must end in .jsonl, .csv or .json")
    except FAULTS as error:
        raise InputError(f"{path}: {place}: {type(error).__name__}: {error}; {hint}") from None
    return examples


def read_splits(path: Path, seed: int) -> list[list[Example]]:
    """Train, val and test: of a folder's files, or of one file, split 80/10/10 by the seed.

    PubMedQA's official test ids decide if its test_ground_truth.json lies beside the file.
    """
    if os.path.isdir(path):
        splits = []
        for split in ("train", "val", "test"):
            files = [path / f"{split}.jsonl", path / f"{split}.csv"]
            files = [file for file in files if os.path.exists(file)]
            if len(files) != 1:
                raise InputError(f"{path}: needs one file {split}.jsonl or {split}.csv")
            splits.append(list(read_file(files[0]).values()))
        return splits
    examples = read_file(path)
    places = list(examples)
    random.Random(seed).shuffle(places)
    n_test = n_val = len(places) // 10
    truth = path.with_name("test_ground_truth.json")
    if path.suffix == ".json" and os.path.exists(truth):
        try:
            official = parse_json(truth.read_text(encoding="utf-8")).keys() & examples.keys()
        except FAULTS:
            official = set()
        if not official:
            raise InputError(f"{truth}: no id of {path.name} in it; mend it or move it elsewhere")
        places.sort(key=lambda place: place not in official)  # the official test ids first
        n_test = len(official)
        n_val = (len(places) - n_test) // 10
    shuffled = [examples[place] for place in places]
    test, rest = shuffled[:n_test], shuffled[n_test:]
    return [rest[n_val:], rest[:n_val], test]


def load_data(
    source: str,
    seed: int,
    limit: int | None,
    notes: int,
    override: float,
    rationales: str,
    stage1_rationales: str,
) -> Dataset:
    """The data set named by `source`: `triage`, a file or a folder. Raises InputError."""
    if source == "triage":
        sizes = {"train": notes, "val": 500, "test": 1000}
        sizes = {split: min(size, limit or size) for split, size in sizes.items()}
        return simulate(sizes, override, seed, rationales, stage1_rationales)
    train, val, test = [split[:limit] for split in read_splits(Path(source), seed)]
    for name, split in (("train", train), ("val", val), ("test", test)):
        if not split:
            raise InputError(f"{source}: the {name} split is empty; add records")
    if len({example.label for example in train}) == 1:
        raise InputError(f"{source}: train has one label only, {train[0].label!r}; add another")
    counts = Counter(example.label for example in train + val + test)
    labels = [label for label, _ in counts.most_common()]
    return Dataset(train, val, test, labels, train, val, [], [])


# ---- Tokens, prompts, batches.
PREDICT = "predict:"
EXPLAIN = "explain:"
EXPLAIN_GIVEN = "given label: {label}, explain:"


class Tokenizer:
    """SentencePiece, trained here or T5's own. Ids: 0 padding, 1 end, 2 unknown."""

    def __init__(self, model: bytes):
        self.model = model
        self.processor = sentencepiece.SentencePieceProcessor(model_proto=model)

    @classmethod
    def load(cls, path: Path) -> "Tokenizer":
        try:
            tokenizer = cls(path.read_bytes())
        except (OSError, RuntimeError) as error:
            raise InputError(f"{path}: {error}; the tokenizer belongs beside the weights") from None
        if tokenizer.processor.pad_id() != 0 or tokenizer.processor.eos_id() != 1:
            raise InputError(f"{path}: padding and end are not the ids 0 and 1; give a T5's")
        return tokenizer

    @classmethod
    def train(cls, texts: list[str], vocab_size: int) -> "Tokenizer":
        """Byte-pair encoding: on templated text a unigram vocabulary collapses to a few pieces.

        What is not in the vocabulary is written in bytes, so no text, above all no label, loses a
        letter: SentencePiece's default coverage once dropped the E of "go to ED now".
        """
        frequent = [char for char, _ in Counter("".join(texts)).most_common()]
        rare = dict.fromkeys(map(ord, frequent[vocab_size // 4 :]), " ")  # these become bytes
        model = io.BytesIO()
        ids = {"pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1}
        unchanged = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False}
        no_limits = {"hard_vocab_limit": False, "max_sentence_length": 10**6, "minloglevel": 2}
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter([text.translate(rare) for text in texts]),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            byte_fallback=True,
            character_coverage=1.0,
            **(ids | unchanged | no_limits),
        )
        return cls(model.getvalue())

    def __len__(self) -> int:
        return self.processor.get_piece_size()

    def encode(self, text: str) -> list[int]:
        return self.processor.encode(text)

    def decode(self, ids: list[int]) -> str:
        """Up to the end token, without padding and ids above the vocabulary, which T5 can give."""
        if 1 in ids:
            ids = ids[: ids.index(1)]
        return self.processor.decode([i for i in ids if 0 < i < len(self)]).strip()


class Prompts:
    """Token ids of the prompts (paper, section 3) and targets; each text is tokenized once.

    Prefix and question meet at a space, where SentencePiece joins no pieces, so the parts give the
    ids of the whole. A long question is cut at its end; the prefix with its label stays whole.
    """

    def __init__(self, tokenizer: Tokenizer, max_source: int, max_target: int):
        self.tokenizer = tokenizer
        self.max_source = max_source
        self.max_target = max_target
        self.ids = functools.cache(tokenizer.encode)  # text -> list of ids

    def source(self, prefix: str, question: str) -> list[int]:
        room = max(self.max_source - len(self.ids(prefix)) - 1, 0)
        return [*self.ids(prefix), *self.ids(question)[:room], 1]

    def target(self, text: str) -> list[int]:
        """Ends with the end token. An empty text has no tokens, so it adds nothing to a loss."""
        return [*self.ids(text)[: self.max_target - 1], 1] if text else []


def pad(rows: list[list[int]], device: str = "cpu") -> torch.Tensor:
    """Rows of ids -> LongTensor (B, longest row), filled with 0 on the right."""
    out = np.zeros((len(rows), max(1, *map(len, rows))), dtype=np.int64)
    for i, row in enumerate(rows):
        out[i, : len(row)] = row
    return torch.from_numpy(out).to(device)


def batch_order(lengths: list[int], batch_size: int, seed: int, epoch: int) -> list[list[int]]:
    """The batches of an epoch, as lists of example numbers; the same for the same arguments.

    Shuffled, then sorted by length within pools of 16 batches: neighbours of one length need
    little padding. What does not fill the last batch is left out, at random.
    """
    rng = np.random.default_rng([seed, epoch])
    order = rng.permutation(len(lengths)).tolist()
    full = max(len(order) // batch_size, 1) * batch_size
    order = order[:full]  # before sorting: else the longest would never be seen
    batches = []
    for start in range(0, len(order), 16 * batch_size):
        pool = sorted(order[start : start + 16 * batch_size], key=lambda i: lengths[i])
        for first in range(0, len(pool), batch_size):
            batches.append(pool[first : first + batch_size])
    rng.shuffle(batches)
    return batches
