"""Text in, batches out: the examples, the simulated nurse line, readers of files, the tokenizer, prompts and batches.

The default data set is SIMULATED and is not medical advice. The paper's triage notes are private, so a generator stands
in for them: every note is made from facts, the label follows from the facts by a rule (`triage_tier`), and because the
facts can be read back from any text (`read_facts`), a rationale can be checked exactly. That is why it is the default.
"""

import csv
import hashlib
import io
import json
import os
import random
import re
from array import array
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import sentencepiece
import torch


@dataclass(frozen=True)
class Example:
    """One question with its gold label and gold rationale."""

    question: str
    label: str
    rationale: str


@dataclass(frozen=True)
class Dataset:
    """The three splits, the labels in a fixed order, and the rationales that stage 1 learns from (train, val)."""

    train: list[Example]
    val: list[Example]
    test: list[Example]
    labels: list[str]
    stage1_train: list[Example]
    stage1_val: list[Example]
    ceiling: list[str] | None = None  # triage only: the rule's label for each test note, the best any model can do

    def sha256(self) -> str:
        """A fingerprint of all examples: a run that is resumed must find the data it began with."""
        return hashlib.sha256(repr((self.train, self.val, self.test, self.stage1_train)).encode()).hexdigest()


# ---------------------------------------------------------------------------------------------------------------------
# The simulated nurse line. In every row of phrasings the last but one is held out of train (it is made of words that
# train does show) and the last is the nurse's abbreviation. A fact is named by its first phrasing.

DISPOSITIONS = ["home care", "see doctor within 3 days", "see doctor within 24 hours", "go to ED now", "call 911"]
# Findings: a letter, the tier of the red flag (0: a reassuring cue), phrasings | what it can mean / for short.
FINDING_TABLE = """
A 4 pressure spreading to the left arm / heaviness spreading down the left arm / spreading pressure of the left arm / L arm pressure | a heart attack / MI
B 4 one side of the face drooping / a drooping face on one side / face drooping on one side / facial droop | a stroke / CVA
C 4 blue lips / lips turning blue / blue turning lips / cyanosis | lack of oxygen / hypoxia
D 4 fainting with cold sweat / cold sweat and fainting / fainting and cold sweat / syncope | shock / shock
E 4 a seizure lasting five minutes / five minutes of seizure / seizure of five minutes / prolonged sz | brain damage / status
F 4 swelling of the tongue / a swollen tongue / tongue swelling / tongue edema | a closing airway / anaphylaxis
G 3 a stiff neck with fever / fever and a stiff neck / stiff neck and fever / nuchal rigidity | meningitis / meningitis
H 3 black tarry stools / stools black as tar / tarry black stools / melena | a bleeding ulcer / GIB
I 3 coughing up blood / blood coughed up / blood when coughing / hemoptysis | a clot in the lung / PE
J 3 repeated confusion / being confused again and again / repeated and confused again / AMS | a bleed in the skull / SDH
K 3 passing hardly any urine / hardly any urine all day / all day hardly passing urine / oliguria | serious dehydration / dehydration
L 3 a plan for self-harm / planning self-harm / self-harm plan / SI w plan | a risk to life / suicide risk
M 2 burning when passing urine / urine that burns / burning urine / dysuria | a urinary infection / UTI
N 2 green phlegm with chills / chills and green phlegm / chills with phlegm that is green / productive w chills | pneumonia / PNA
O 2 blurred vision since the start / vision that is blurred / blurred vision / blurry vision | pressure on the brain / ICP
P 2 ear pain at night / a painful ear at night / ear that is painful at night / otalgia | an ear infection / AOM
Q 2 red streaks on the skin / skin with red streaks / red skin streaks / lymphangitis | a spreading infection / infxn
R 2 a racing pulse at rest / a pulse that races while resting / a resting pulse that races / tachy | a rhythm problem / arrhythmia
S 0 eating and drinking well / a good appetite / good appetite and drinking well / tol PO
T 0 pain only when pressing the spot / a spot that hurts only when pressed / pain only with the spot pressed / reproducible
U 0 the same pattern as earlier episodes / earlier episodes of this pattern / the same pattern as episodes earlier / known pattern
V 0 slow improvement since yesterday / slowly improving since yesterday / improving since yesterday / improving
"""
# Complaints: phrasings | self-care advice | the findings that callers with it mention, the reassuring cue last.
COMPLAINT_TABLE = """
chest pain / pain in the chest / chest that is in pain / CP | rest and an antacid | A D I R T
a headache / an aching head / a head that is aching / HA | fluids and a dark room | B G J O U
abdominal pain / belly pain / pain in the belly / abd pain | small meals and rest | D H K M T
a fever / a high temperature / a temperature that is high / febrile | fluids and light clothing | E G N P S
a cough / a lingering cough / a cough that is lingering / cough sx | honey and warm drinks | C I N P S
shortness of breath / trouble breathing / trouble and shortness of breath / SOB | an inhaler as prescribed | C F I R V
dizziness / a dizzy spell / a spell of dizziness / dizzy | standing up slowly | B D H O U
vomiting / throwing up / repeated vomiting / emesis | small sips of fluids | D H K R S
back pain / an aching back / pain in the back / LBP | heat and gentle walking | A D H M T
a rash / spots on the skin / skin spots / rash noted | a cool compress | F G P Q V
a head injury / a blow to the head / an injury of the head / head inj | a cold pack and rest | B E J O V
a nosebleed / a bleeding nose / a nose that is bleeding / epistaxis | pinching the nose | D H J R V
a sore throat / a painful throat / a throat that is sore / ST | warm salt water | C F K P S
an eye problem / an irritated eye / an eye that is irritated / eye c/o | lubricating drops | B G O Q V
leg pain / a painful leg / pain in the leg / leg pn | raising the leg | C I Q R T
a urinary problem / trouble passing urine / a problem passing urine / GU c/o | plenty of water | D J K M S
diarrhea / loose stools / stools being loose / loose BM | fluids with salt and sugar | D H K R S
a wound / a cut in the skin / a wound in the skin / lac | soap and a clean bandage | D E J Q T
soreness from a fall / aches from a fall / soreness and aches from a fall / GLF | ice and rest | B E J O T
an allergic reaction / an allergy / a reaction of allergy / allergic rxn | an antihistamine | C F J R U
high blood sugar / sugar readings above normal / blood sugar above normal / BG high | the usual insulin | E J K O S
anxiety / an anxious feeling / a feeling of anxiety / anx | slow breathing and a walk | A D L R U
"""
OTHER_FACTS = """
older age / elderly
very young age / infant
a current pregnancy / expecting a baby / a pregnancy and expecting a baby / preg
a weak immune system / chemotherapy / a weak immune system from chemotherapy / immunosupp
a blood thinner / warfarin tablets / blood thinner tablets / on AC
mild / slight / slight and mild / mild
moderate / medium / medium to moderate / mod
severe / very strong / strong and severe / sev
over a week / >1wk
"""
DISTRACTORS = (
    "Also works night shifts / Has a dog / Moved house last month / Asks about opening hours / Had a flu shot last year / "
    "Calls from the car / Lives with two flatmates / Has insurance through work / Wants a call back at noon / "
    "Mentions a brother with diabetes / Also plays chess / Came back from a holiday / Is between two jobs"
).split(" / ")
# What a rationale says to argue for each disposition, without naming it: LLM | nurse | the nurse's, post-processed.
IMPLIED = [
    "Managing this without a visit should be enough | self-care adv | Advised to look after this alone",
    "An office visit this week is soon enough | appt this wk | An appointment this week",
    "A doctor should look at this today or tomorrow | appt <24h | An appointment within a day",
    "Emergency care is needed without waiting | ED | Sent to the emergency department",
    "An ambulance is needed at once | EMS | An ambulance was sent",
]
TRIAGE_SIZES = {"train": 20000, "val": 500, "test": 1000}
AGE_LIMIT, LONG_DAYS, OVERRIDE_RATE = 75, 7, 0.02  # years from which age matters; days after which duration matters


class Complaint(NamedTuple):
    advice: str
    flags: list[str]  # the red flags that callers with it mention
    cue: str  # the reassuring one


def parse_table(table: str) -> list[list[list[str]]]:
    """Rows of fields (between |) of alternatives (between /)."""
    return [[field.split(" / ") for field in line.split(" | ")] for line in table.strip().split("\n")]


PHRASES: dict[str, list[str]] = {}  # fact: its phrasings, the last but one held out, the last an abbreviation
RED_FLAGS: dict[str, int] = {}  # red flag: its tier
REASONS: dict[str, list[str]] = {}  # red flag: what it can mean, and that for short
TRIAGE: dict[str, Complaint] = {}
LETTERS: dict[str, str] = {}  # letter in the tables: finding
for (first, *others), *reason in parse_table(FINDING_TABLE):
    letter, tier, name = first.split(" ", 2)
    PHRASES[name], LETTERS[letter] = [name, *others], name
    if reason:
        RED_FLAGS[name], REASONS[name] = int(tier), reason[0]
for says, (advice,), (letters,) in parse_table(COMPLAINT_TABLE):
    *flags, cue = (LETTERS[letter] for letter in letters.split())
    PHRASES[says[0]], TRIAGE[says[0]] = says, Complaint(advice, flags, cue)
PHRASES |= {says[0]: says for (says,) in parse_table(OTHER_FACTS)}
CUES = {complaint.cue for complaint in TRIAGE.values()}
SEVERITY = {"mild": 0, "moderate": 1, "severe": 2}
MODIFIERS = ["older age", "very young age", "a current pregnancy", "a weak immune system", "a blood thinner"]
ARTICLE = re.compile("^(a|an|the) ")
FACT_OF = {ARTICLE.sub("", says.lower()): fact for fact, row in PHRASES.items() for says in row}
FACT_PATTERN = re.compile(rf"(?<!\w)({'|'.join(map(re.escape, sorted(FACT_OF, key=len, reverse=True)))})(?!\w)")
ENDING_OF = {text.lower(): i for i, row in enumerate(IMPLIED) for text in (DISPOSITIONS[i], *row.split(" | "))}
ENDING_PATTERN = re.compile(rf"(?<!\w)({'|'.join(map(re.escape, sorted(ENDING_OF, key=len, reverse=True)))})(?!\w)")
NEGATION = re.compile(r"\b(denies|free of)\b")


def read_facts(text: str) -> set[str]:
    """The facts that a note or a rationale states, as names; "no NAME" where the sentence denies them.

    Exact for generated text: longest phrasing first; a negation holds for the rest of its sentence.
    """
    facts = set()
    for sentence in re.split(r"[.;]\s*", text.lower()):
        negation = NEGATION.search(sentence)
        for match in FACT_PATTERN.finditer(sentence):
            denied = negation is not None and negation.end() <= match.start()
            facts.add("no " * denied + FACT_OF[match[1]])
        for number, unit in re.findall(r"(\d+)[- ](month|year|day|week)", sentence):
            days = int(number) * {"day": 1, "week": 7}.get(unit, 0)
            facts |= {"over a week"} if days > LONG_DAYS else set()
            facts |= {"very young age"} if unit == "month" else set()
            facts |= {"older age"} if unit == "year" and int(number) >= AGE_LIMIT else set()
    return facts


def triage_tier(facts: set[str]) -> int:
    """The rule of the simulated line: facts -> tier 0..4, an index into DISPOSITIONS. A fact denied does not count.

    1. Severity gives the base (mild 0, moderate 1, severe 2); more than a week makes it at least 1.
    2. A red flag raises the tier to its own. Only without one, a reassuring cue lowers it by one.
    3. A modifier (age, pregnancy, ...) raises it by one, up to the emergency department.
    """
    tier = max((SEVERITY[fact] for fact in facts & SEVERITY.keys()), default=0)
    tier = max(tier, "over a week" in facts)
    if flags := facts & RED_FLAGS.keys():
        tier = max(tier, *(RED_FLAGS[flag] for flag in flags))
    elif facts & CUES:
        tier = max(tier - 1, 0)
    if facts.intersection(MODIFIERS):
        tier = max(tier, min(tier + 1, 3))
    return tier


def write_note(rng: random.Random, heldout: bool) -> str:
    """One simulated call. With `heldout`, a tenth of its phrasings and frames are ones that train never has."""

    def pick(options: list[str], unseen: list[str]) -> str:
        return rng.choice(unseen if unseen and heldout and rng.random() < 0.1 else options)

    def say(fact: str) -> str:
        *options, unseen, _ = PHRASES[fact]
        return pick(options or [fact], [unseen] if options else [])

    complaint_name = rng.choice(list(TRIAGE))
    complaint = TRIAGE[complaint_name]
    modifiers = rng.sample(MODIFIERS, rng.random() < 0.3)
    if complaint_name == "anxiety":  # no infant makes plans
        modifiers = [modifier for modifier in modifiers if modifier != "very young age"]
    age, unit, sex = rng.randint(18, AGE_LIMIT - 1), "year", rng.choice(["woman", "man"])
    if "a current pregnancy" in modifiers:
        age, sex = rng.randint(18, 44), "woman"
    elif "older age" in modifiers:
        age = rng.randint(AGE_LIMIT, 99)
    elif "very young age" in modifiers:
        age, unit, sex = rng.randint(2, 11), "month", {"woman": "girl", "man": "boy"}[sex]
    days = rng.randint(2, LONG_DAYS) if rng.random() < 0.75 else rng.randint(LONG_DAYS + 1, 20)
    call = {"what": say(complaint_name), "time": f"{days // 7} weeks" if days in (14, 21) else f"{days} days"}
    call["who"] = f"{'an' if age in (8, 11, 18) or 80 <= age < 90 else 'a'} {age}-{unit}-old {sex}"
    openings = [
        "{who} with {what} for {time}.",
        "Caller reports {what} for {time} in {who}.",
        "For {time}, {who} has {what}.",
    ]
    opening = pick(openings, ["For {time}, {what} in {who}."]).format(**call)

    tiers = [(0, 0, 45, 35, 20)[RED_FLAGS[flag]] for flag in complaint.flags]
    present = {rng.choices(complaint.flags, tiers)[0]: None for _ in range(rng.choices([0, 1, 2], [48, 40, 12])[0])}
    absent = [flag for flag in complaint.flags if flag not in present]
    severity = rng.choices(list(SEVERITY), [46, 36, 18])[0]
    rest = [pick(["It is {}.", "Caller calls it {}."], ["Calls it {}."]).format(say(severity))]
    for flag in present:
        rest.append(pick(["Reports {}.", "Describes {}."], ["Also reports {}."]).format(say(flag)))
    for flag in rng.sample(absent, rng.random() < 0.15):
        rest.append(pick(["Denies {}.", "Is free of {}."], ["Also denies {}."]).format(say(flag)))
    if rng.random() < 0.3:
        rest.append(pick(["Mentions {}.", "Notes {}."], ["Also notes {}."]).format(say(complaint.cue)))
    rest += [f"Background of {say(modifier)}." for modifier in modifiers if "age" not in modifier]
    rest += [f"{rng.choice(DISTRACTORS)}."] * rng.randint(0, 1)
    rng.shuffle(rest)
    return " ".join([opening[0].upper() + opening[1:], *rest])


def write_rationale(facts: set[str], tier: int, source: str, rng: random.Random) -> str:
    """Why a call with these facts gets this tier, in the voice of a source: `llm`, `nurse` or `post`.

    The steps are those of `triage_tier`: the worst red flag, or else the severity, the duration and the cue; then the
    modifier; then the disposition, named or implied. The nurse abbreviates and sometimes leaves the end out, where what
    is left still argues for the tier.
    """
    say = {fact: row[-1] if source == "nurse" else row[0] for fact, row in PHRASES.items()}
    (name,) = facts & TRIAGE.keys()
    complaint = TRIAGE[name]
    flag = max((f for f in complaint.flags if f in facts), key=RED_FLAGS.get, default=None)
    denied = [f for f in complaint.flags if f"no {f}" in facts][:1]
    severity = next(fact for fact in SEVERITY if fact in facts)
    cue = flag is None and complaint.cue in facts
    risks = [say[fact] for fact in MODIFIERS if fact in facts]
    override = (tier > triage_tier(facts)) - (tier < triage_tier(facts))  # the nurse went up (1) or down (-1)
    label, implied = DISPOSITIONS[tier], IMPLIED[tier].split(" | ")
    if source == "llm":
        if flag:
            steps = [f"{flag} can mean {REASONS[flag][0]}"]
        else:
            long = " for over a week" if "over a week" in facts else ""
            tail = f", and the caller denies {denied[0]}" if denied else ""
            steps = [f"The {ARTICLE.sub('', name)} is {severity}{long}{tail}"]
        steps += [f"{complaint.cue} is reassuring"] * cue + [f"{risk} raises the risk" for risk in risks]
        steps += [f"clinical judgement is {'more' if override > 0 else 'less'} cautious here"] if override else []
        end = implied[0] if rng.random() < 0.25 else f"The safe choice is {'to ' * (tier > 0)}{label}"
        steps.append(end + f" with {complaint.advice}" * (tier == 0))
    else:
        nurse = source == "nurse"
        first = [say[name], say[severity]] + [say["over a week"]] * ("over a week" in facts)
        if flag:
            short, reason = REASONS[flag][1], ARTICLE.sub("", REASONS[flag][0])
            first.append(f"r/o {short}" if nurse else f"possible {reason}")
        steps = [", ".join(first)] + ([say[flag]] if flag else [])
        steps += [f"denies {say[f]}" for f in denied] + [say[complaint.cue]] * cue + risks
        steps += [f"{'up' if override > 0 else 'down'} one level {'per RN' if nurse else 'on judgement'}"] * abs(
            override
        )
        end = label if rng.random() < 0.4 else implied[1 if nurse else 2]
        if not nurse or rng.random() < 0.6 or argues_for(". ".join(steps)) != label:
            steps.append(end)
    return ". ".join(step[0].upper() + step[1:] for step in steps) + "."


def argues_for(rationale: str) -> str | None:
    """The disposition that a rationale argues for: the one it names or implies, or else what `triage_tier` makes of the
    facts it states. None where it argues for two, or states nothing."""
    text = rationale.lower()
    tiers = {ENDING_OF[match] for match in ENDING_PATTERN.findall(text)}
    if not tiers and (facts := read_facts(rationale)):
        tiers = {triage_tier(facts)}
    return DISPOSITIONS[tiers.pop()] if len(tiers) == 1 else None


def ungrounded(rationale: str, question: str) -> set[str]:
    """The facts that a rationale states and its question does not. Empty: the rationale is grounded."""
    return read_facts(rationale) - read_facts(question)


def simulate(n: dict[str, int], seed: int, source: str, stage1_source: str) -> Dataset:
    """The simulated nurse line: `n` examples of each split. Notes and labels do not depend on the rationale sources."""
    splits, ceiling = {}, []
    for split, size in n.items():
        rng = random.Random(f"{seed} {split}")  # a string seed: the same on every machine and run
        for i in range(size):
            note = write_note(rng, heldout=split != "train")
            facts = read_facts(note)
            rule = tier = triage_tier(facts)
            if rng.random() < OVERRIDE_RATE:  # the nurse decides one level up or down
                tier = rng.choice([t for t in (tier - 1, tier + 1) if 0 <= t <= 4])
            ceiling += [DISPOSITIONS[rule]] * (split == "test")
            for voice in {source, stage1_source}:
                rationale = write_rationale(facts, tier, voice, random.Random(f"{seed} {split} {i} {voice}"))
                splits.setdefault((split, voice), []).append(Example(note, DISPOSITIONS[tier], rationale))
    train, val, test = (splits[split, source] for split in n)
    return Dataset(
        train, val, test, DISPOSITIONS, splits["train", stage1_source], splits["val", stage1_source], ceiling
    )


# ---------------------------------------------------------------------------------------------------------------------
# Files: JSONL, CSV, PubMedQA, BioASQ. The format is told by the content; every error names the place and the remedy.

COLUMNS = ("question", "label", "rationale")


class InputError(ValueError):
    """What the user gave cannot be used. The message is one line: what, where, how to mend it."""

    def __init__(self, message: str):
        super().__init__(" ".join(message.split()))  # a key or a label in it may hold a line end


def need(condition: object, message: str) -> None:
    if not condition:
        raise InputError(message)


def make_example(record: object, where: str) -> Example:
    """A record with the three columns -> Example. The rationale may be empty (it is then never trained on or scored).

    Raises InputError if the record is no object, a column is missing, a value is no string, or question or label is empty.
    """
    need(isinstance(record, dict), f"{where}: expected an object; each record needs {', '.join(COLUMNS)}")
    for column in COLUMNS:
        need(column in record, f"{where}: no '{column}'; each record needs {', '.join(COLUMNS)}")
        text, kind = record[column], type(record[column]).__name__
        need(isinstance(text, str), f"{where}: '{column}' must be text, found {kind}; write it in quotes")
        halves = any("\ud800" <= char <= "\udfff" for char in text)
        need(not halves, f"{where}: '{column}' holds half a character (a lone surrogate); delete it")
        filled = column == "rationale" or text.strip()
        need(filled, f"{where}: '{column}' is empty; fill it in or delete the record")
    return Example(*(record[column].strip() for column in COLUMNS))


def pubmedqa_record(record: dict, where: str) -> Example:
    """PubMedQA (Jin et al. 2019): question and abstract -> yes, no or maybe; the long answer is the rationale."""
    unchanged = "this reader takes PubMedQA's ori_pqal.json unchanged"
    need(isinstance(record, dict), f"{where}: expected an object; {unchanged}")
    for key in ("QUESTION", "CONTEXTS", "final_decision", "LONG_ANSWER"):
        need(key in record, f"{where}: no '{key}'; {unchanged}")
    texts = [record["QUESTION"], *record["CONTEXTS"]] if isinstance(record["CONTEXTS"], list) else [None]
    are_texts = all(isinstance(text, str) for text in texts)
    need(are_texts, f"{where}: 'QUESTION' must be text and 'CONTEXTS' a list of texts; {unchanged}")
    values = (" ".join(texts), record["final_decision"], record["LONG_ANSWER"])
    return make_example(dict(zip(COLUMNS, values, strict=True)), where)


def read_bioasq(questions: object, path: Path) -> list[Example]:
    """BioASQ Task B: the yes/no questions with their snippets; the first ideal answer is the rationale."""
    unchanged = "this reader takes BioASQ's Task B file unchanged"
    need(isinstance(questions, list), f"{path}: 'questions' must be a list; {unchanged}")
    examples = []
    for i, item in enumerate(questions):
        where = f"{path}: question {i + 1}"
        need(isinstance(item, dict) and isinstance(item.get("body"), str), f"{where}: no 'body'; {unchanged}")
        if item.get("type") != "yesno":
            continue
        snippets, ideal, answer = item.get("snippets", []), item.get("ideal_answer", ""), item.get("exact_answer")
        snippets = snippets if isinstance(snippets, list) else [None]
        are_texts = all(isinstance(s, dict) and isinstance(s.get("text"), str) for s in snippets)
        need(are_texts, f"{where}: 'snippets' must be a list of objects with a 'text'; {unchanged}")
        record = {"question": " ".join([item["body"], *(s["text"] for s in snippets)])}
        record["label"] = answer.lower() if isinstance(answer, str) else answer
        record["rationale"] = (ideal or [""])[0] if isinstance(ideal, list) else ideal
        examples.append(make_example(record, where))
    return examples


def read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")  # -sig: Excel's byte order mark is no part of the text
    except OSError as e:
        raise InputError(f"{path}: {e.strerror}; check the path given to --data") from None
    except UnicodeDecodeError as e:
        raise InputError(f"{path}: byte {e.start} is not UTF-8; save the file as UTF-8") from None


def parse_json(text: str, where: str) -> object:
    def unique(pairs: list) -> dict:  # json keeps the last of two equal keys, silently
        need(len(dict(pairs)) == len(pairs), f"{where}: a key occurs twice in one object; delete one of them")
        return dict(pairs)

    try:
        return json.loads(text, object_pairs_hook=unique)
    except InputError:
        raise
    except json.JSONDecodeError as e:
        place = f"line {e.lineno}, column {e.colno}" if "\n" in text else f"column {e.colno}"
        raise InputError(f"{where}: not valid JSON ({e.msg} at {place}); mend or delete it") from None
    except (RecursionError, ValueError):  # nested too deeply, or a number too long to read
        raise InputError(f"{where}: JSON nested too deeply, or a number too long; mend or delete the record") from None


def read_csv(text: str, path: Path) -> list[Example]:
    csv.field_size_limit(2**31 - 1)
    reader, rows = csv.DictReader(io.StringIO(text, newline=""), strict=True), []
    try:
        names = reader.fieldnames or []
        need(len(set(names)) == len(names), f"{path}: line 1: a column occurs twice; delete or rename one of them")
        for column in COLUMNS:
            header = f"the header must name {','.join(COLUMNS)}, with commas"
            need(column in names, f"{path}: line 1: no column '{column}'; {header}")
        for row in reader:
            where, more = f"{path}: line {reader.line_num}", None in row
            wrong = f"{where}: {'more' if more else 'fewer'} fields than the header; quote texts with commas"
            need(not more and None not in row.values(), wrong)
            rows.append(make_example(row, where))
        return rows
    except csv.Error as e:
        where = f"{path}: line {reader.reader.line_num}"
        raise InputError(f"{where}: not valid CSV ({e}); quote texts that hold quotes or commas") from None


def read_file(path: Path) -> tuple[list[Example], list[str] | None]:
    """The examples of one file, and for PubMedQA their ids. Raises InputError."""
    text = read_text(path)
    need(text.strip(), f"{path}: the file is empty; it needs records with {', '.join(COLUMNS)}")
    if text.lstrip()[0] not in "{[":
        return read_csv(text, path), None
    lines = [(f"{path}: line {i}", line) for i, line in enumerate(text.split("\n"), 1) if line.strip()]
    where, first = lines[0]
    if len(lines) > 1 and first.strip()[0] == "{" and first.strip()[-1] == "}":
        return [make_example(parse_json(line, where), where) for where, line in lines], None
    whole = parse_json(text, where if len(lines) == 1 else str(path))
    if isinstance(whole, dict) and "questions" in whole:
        return read_bioasq(whole["questions"], path), None
    if isinstance(whole, dict) and "question" not in whole and any(isinstance(r, dict) for r in whole.values()):
        return [pubmedqa_record(record, f"{path}: id {key}") for key, record in whole.items()], list(whole)
    if isinstance(whole, list):
        return [make_example(record, f"{path}: record {i}") for i, record in enumerate(whole, 1)], None
    return [make_example(whole, where)], None


def read_splits(path: Path, seed: int) -> list[list[Example]]:
    """Train, val, test of a folder or a file. A file is split 80/10/10 by seed; PubMedQA by its official test ids."""
    if os.path.isdir(path):  # Path.is_dir raises where the path cannot be looked at
        splits = []
        for split in ("train", "val", "test"):
            found = [file for file in (path / f"{split}.jsonl", path / f"{split}.csv") if os.path.exists(file)]
            both = f"both {split}.jsonl and" if found else f"neither {split}.jsonl nor"
            need(len(found) == 1, f"{path}: {both} {split}.csv; it needs one of them")
            splits.append(read_file(found[0])[0])
        return splits
    examples, ids = read_file(path)
    order = np.random.default_rng(seed).permutation(len(examples)).tolist()
    truth = path.with_name("test_ground_truth.json")
    if ids and truth.exists():
        official = parse_json(read_text(truth), str(truth))
        official = official if isinstance(official, dict) else {}
        test, order = [i for i in order if ids[i] in official], [i for i in order if ids[i] not in official]
        need(test, f"{truth}: holds no id of {path.name}; take PubMedQA's own file, or move it elsewhere")
        n_val = len(order) // 10
    else:
        n_val = len(order) // 10
        test, order = order[:n_val], order[n_val:]
    return [[examples[i] for i in part] for part in (order[n_val:], order[:n_val], test)]


def load_data(source: str, seed: int, limit: int | None, rationales: str, stage1_rationales: str) -> Dataset:
    """The data set named by `source`: `triage`, a file or a folder. Raises InputError (see the readers)."""
    if source == "triage":
        n = {split: min(size, limit or size) for split, size in TRIAGE_SIZES.items()}
        return simulate(n, seed, rationales, stage1_rationales)
    train, val, test = (split[:limit] for split in read_splits(Path(source), seed))
    for name, split in (("train", train), ("val", val), ("test", test)):
        need(split, f"{source}: the {name} split is empty; it needs at least one record")
    labels = [label for label, _ in Counter(example.label for example in train + val + test).most_common()]
    alike = Counter(" ".join(label.lower().split()) for label in labels).most_common(1)[0]
    like = f"labels that differ only by case or spaces, like '{alike[0]}'"
    need(alike[1] == 1, f"{source}: {like}; spell each label one way")
    one = f"{source}: the train split has one label, '{train[0].label}'; it needs at least two"
    need(len({example.label for example in train}) > 1, one)
    return Dataset(train, val, test, labels, train, val)


# ---------------------------------------------------------------------------------------------------------------------
# Tokens, prompts, batches.


class Tokenizer:
    """SentencePiece, trained on the training split or T5's own. Ids 0, 1, 2 are padding, end and unknown, as in T5."""

    def __init__(self, model: bytes):
        self.model = model
        self.processor = sentencepiece.SentencePieceProcessor(model_proto=model)

    @classmethod
    def load(cls, path: Path) -> "Tokenizer":
        """Raises InputError."""
        try:
            tokenizer = cls(path.read_bytes())
        except OSError as e:
            raise InputError(f"{path}: {e.strerror}; the tokenizer belongs beside the weights") from None
        except RuntimeError:
            raise InputError(f"{path}: not a SentencePiece model; fetch it again") from None
        like_t5 = (tokenizer.processor.pad_id(), tokenizer.processor.eos_id()) == (0, 1)
        need(like_t5, f"{path}: padding and end are not the ids 0 and 1; give the tokenizer of a T5")
        return tokenizer

    @classmethod
    def train(cls, texts: list[str], vocab_size: int) -> "Tokenizer":
        """Byte-pair encoding: on templated text a unigram vocabulary collapses to a few hundred pieces.

        Rare characters fall back to bytes, so that no text, above all no label, loses a letter; the default coverage of
        SentencePiece once dropped the E of "go to ED now". Text is kept as it is (no Unicode normalisation).
        """
        counts = Counter("".join(texts))
        rare = dict.fromkeys((ord(char) for char, _ in counts.most_common()[vocab_size // 4 :]), " ")
        model = io.BytesIO()
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter([text.translate(rare) for text in texts]), model_writer=model, model_type="bpe", vocab_size=vocab_size,
            hard_vocab_limit=False, byte_fallback=True, character_coverage=1.0,
            max_sentence_length=10**6, normalization_rule_name="identity", remove_extra_whitespaces=False,
            pad_id=0, eos_id=1, unk_id=2, bos_id=-1, minloglevel=2,
        )  # fmt: skip
        return cls(model.getvalue())

    def __len__(self) -> int:
        return self.processor.get_piece_size()

    def encode(self, text: str) -> list[int]:
        return self.processor.encode(text)

    def decode(self, ids: list[int]) -> str:
        """Up to the end token, without padding and without the ids by which T5's vocabulary exceeds its tokenizer."""
        ids = ids[: ids.index(self.processor.eos_id())] if self.processor.eos_id() in ids else ids
        return self.processor.decode([i for i in ids if 0 < i < len(self)]).strip()


EXPLAIN, PREDICT, EXPLAIN_GIVEN = "explain:", "predict:", "given label: {label}, explain:"


class Prompts:
    """Token ids of the three prompts (paper, section 3) and of the targets, each text tokenized once.

    A prompt is its head (`explain:`, ...), the question and the end token. Head and question meet at a space, where
    SentencePiece never joins pieces, so the parts give the ids of the whole. What is too long is cut from the end of
    the question, never from the head: the label stays whole.
    """

    def __init__(self, tokenizer: Tokenizer, max_source: int, max_target: int):
        self.tokenizer, self.max_source, self.max_target = tokenizer, max_source, max_target
        self.cache: dict[str, array] = {}

    def ids(self, text: str) -> array:
        if text not in self.cache:
            self.cache[text] = array("i", self.tokenizer.encode(text))  # 4 bytes a token; in a list it has 36
        return self.cache[text]

    def source(self, head: str, text: str) -> list[int]:
        head_ids, text_ids = self.ids(head), self.ids(text)
        room = max(self.max_source - len(head_ids) - 1, 0)
        return [*head_ids, *text_ids[:room], 1]

    def target(self, text: str) -> list[int]:
        """A label or rationale with its end token. An empty one has no tokens at all, so it adds nothing to a loss."""
        return [*self.ids(text)[: self.max_target - 1], 1] if text else []


def pad(rows: list[list[int]], device: str = "cpu") -> torch.Tensor:
    """Lists of ids -> LongTensor (B, longest), padded with 0 on the right."""
    out = np.zeros((len(rows), max(1, *map(len, rows))), dtype=np.int64)
    for i, row in enumerate(rows):
        out[i, : len(row)] = row
    return torch.from_numpy(out).to(device)


def batch_order(lengths: list[int], batch_size: int, seed: int, epoch: int) -> list[list[int]]:
    """The batches of one epoch, as lists of example numbers; a function of its arguments alone, so a run can resume.

    Shuffled, then sorted by length within pools of 16 batches: neighbours of one length waste little padding, while
    which examples meet still changes from epoch to epoch. What does not fill the last batch is left out, at random.
    """
    rng = np.random.default_rng([seed, epoch])
    order = rng.permutation(len(lengths))
    order = order[: max(len(order) // batch_size, 1) * batch_size]  # before sorting: else the longest are never seen
    pool = 16 * batch_size
    order = np.concatenate([sorted(order[i : i + pool], key=lengths.__getitem__) for i in range(0, len(order), pool)])
    batches = [order[i : i + batch_size].tolist() for i in range(0, len(order), batch_size)]
    return [batches[i] for i in rng.permutation(len(batches))]
