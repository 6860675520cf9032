"""Text in, numbers out: examples, the simulated nurse line, readers of files, tokenizer, batches.

The default data are SIMULATED and are not medical advice. The paper's notes are private, so a
generator stands in: it draws the facts of a call, a rule makes the label from the facts, and note
and rationale are written from them. Facts can be read back: so any rationale can be checked.
"""

import contextlib
import csv
import io
import json
import random
import re
from collections import Counter, namedtuple
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import sentencepiece
import torch
from torch.nn.utils.rnn import pad_sequence


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
    ceiling: list[Example]  # test notes, the rule's labels: what a perfect reader would answer
    ceiling_gold: list[Example]  # what it would answer if told the gold label; else empty lists


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
AGES = ["very young age", "older age"]
MODIFIERS = [*AGES, "a pregnancy", "a weak immune system", "a blood thinner"]
DISTRACTORS = ["has a dog", "works nights", "plays chess", "moved house", "asks about a flu shot"]
DISPOSITIONS = list(IMPLIED)  # tiers 0 to 4


@dataclass
class Call:
    """The facts of one call. Note, label and rationales are made from them."""

    complaint: str
    severity: str
    days: int
    flags: list[str]  # the red flags, the worst first
    denied: list[str]  # at most one red flag
    cues: list[str]  # at most one
    modifiers: list[str]  # at most one
    ending: float  # of rationales: below a share in NAMED they name the label, else imply it

    def facts(self) -> set[str]:
        facts = {self.complaint, self.severity, *self.flags, *self.cues, *self.modifiers}
        if self.days > 7:
            facts.add("over a week")
        for flag in self.denied:
            facts.add(f"no {flag}")
        return facts


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


def maybe(rng: random.Random, share: float, options: list[str]) -> list[str]:
    """In this share of the calls one of the options, else none."""
    return [rng.choice(options)] if rng.random() < share else []


def draw_call(rng: random.Random) -> Call:
    """One call, with red flags and a cue that fit its complaint."""
    complaint = rng.choice(list(COMPLAINTS))
    group = GROUPS[COMPLAINTS[complaint].group]
    weights = [6 - RED_FLAGS[flag].tier for flag in group]  # the worse, the rarer
    n_flags = rng.choices([0, 1, 2], [48, 40, 12])[0]
    drawn = rng.choices(group, weights, k=n_flags)  # perhaps the same one twice
    modifiers = MODIFIERS[1:] if complaint == "anxiety" else MODIFIERS  # a baby is not anxious
    return Call(
        complaint=complaint,
        severity=rng.choices(["mild", "moderate", "severe"], [46, 36, 18])[0],
        days=rng.randint(2, 7) if rng.random() < 0.75 else rng.randint(8, 20),
        flags=[flag for flag in group if flag in drawn],
        denied=maybe(rng, 0.15, [flag for flag in group if flag not in drawn]),
        cues=maybe(rng, 0.3, [COMPLAINTS[complaint].cue]),
        modifiers=maybe(rng, 0.3, modifiers),
        ending=rng.random(),
    )


def sentences(parts: list[str]) -> str:
    return " ".join(part[0].upper() + part[1:] + "." for part in parts)


def write_note(call: Call, rng: random.Random) -> str:
    """Who, what and for how long; then the other facts in any order."""

    def say(fact: str) -> str:
        return rng.choice(PHRASES[fact][:-1])

    who = f"{rng.choice(['a woman', 'a man'])} of {rng.randint(18, 74)} years"
    if "older age" in call.modifiers:
        who = f"{rng.choice(['a woman', 'a man'])} of {rng.randint(75, 99)} years"
    elif "a pregnancy" in call.modifiers:
        who = f"a woman of {rng.randint(18, 44)} years"
    elif "very young age" in call.modifiers:
        who = f"a baby of {rng.randint(2, 11)} months"
    what = f"{say(call.complaint)} for {call.days} days"
    opening = rng.choice([f"{who} with {what}", f"{who} has had {what}", f"{what} in {who}"])
    rest = [f"{rng.choice(['it is', 'caller calls it'])} {say(call.severity)}"]
    rest += maybe(rng, 0.5, DISTRACTORS)
    for fact in call.flags + call.cues + call.modifiers:
        rest.append(f"{rng.choice(['reports', 'describes', 'mentions'])} {say(fact)}")
    for flag in call.denied:
        rest.append(f"{rng.choice(['denies', 'is free of'])} {say(flag)}")
    rng.shuffle(rest)
    return sentences([opening, *rest])


# ---- The simulated nurse line: a rationale for a call and a tier, in three voices. If the tier is
# not the rule's, the nurse had reasons that no note holds, and the rationale says so.
def llm_rationale(call: Call, tier: int, named: bool) -> str:
    """Sentences with a reason for each step of the rule."""
    if call.flags:
        steps = [f"{call.flags[0]} can mean {RED_FLAGS[call.flags[0]].reasons[0]}"]
    else:
        long = " for over a week" if call.days > 7 else ""
        steps = [f"{call.complaint} is {call.severity}{long}"]
        steps += [f"the caller denies {flag}" for flag in call.denied]
        steps += [f"{cue} is reassuring" for cue in call.cues]
    steps += [f"{modifier} raises the risk" for modifier in call.modifiers]
    return sentences(steps + closing(call, tier, named, 0))


def nurse_rationale(call: Call, tier: int, named: bool, wording: int = -1) -> str:
    """The facts alone, in the nurse's abbreviations."""
    steps = [f"{PHRASES[call.complaint][wording]}, {PHRASES[call.severity][wording]}"]
    if call.days > 7:
        steps[0] += f", {PHRASES['over a week'][wording]}"
    if call.flags:
        steps[0] += f", suspect {RED_FLAGS[call.flags[0]].reasons[wording]}"
    steps += [f"denies {PHRASES[flag][wording]}" for flag in call.denied]
    reasons = call.flags[:1] or call.cues
    steps += [PHRASES[fact][wording] for fact in reasons + call.modifiers]
    return sentences(steps + closing(call, tier, named, wording))


def post_rationale(call: Call, tier: int, named: bool) -> str:
    """The nurse's rationale, post-processed: in the usual words."""
    return nurse_rationale(call, tier, named, wording=0)


def closing(call: Call, tier: int, named: bool, wording: int) -> list[str]:
    """Any override of the rule; then the label, named or implied."""
    label = DISPOSITIONS[tier]
    steps = [label if named else IMPLIED[label][wording]]
    rule = triage_tier(call.facts())
    if tier != rule:
        steps.insert(0, f"one level {'up' if tier > rule else 'down'} on judgement")
    return steps


VOICES = {"llm": llm_rationale, "nurse": nurse_rationale, "post": post_rationale}
NAMED = {"llm": 0.75, "nurse": 0.4, "post": 0.4}  # share of rationales that name their label


def explain(call: Call, note: str, tier: int, voice: str, ending: float) -> Example:
    """The note as an example, with a rationale for this tier."""
    rationale = VOICES[voice](call, tier, named=ending < NAMED[voice])
    return Example(note, DISPOSITIONS[tier], rationale)


def simulate(
    sizes: dict[str, int], override: float, seed: int, voice: str, stage1_voice: str
) -> Dataset:
    """The simulated nurse line; `sizes` of train, val and test, the voices of both stages.

    In a share `override` of the calls the nurse decides one level above or below the rule, for
    reasons that the note does not hold. Notes and labels do not depend on the voices.
    """
    data = Dataset([], [], [], DISPOSITIONS, [], [], [], [])
    for split, size in sizes.items():
        rng = random.Random(f"{seed} {split}")
        for _ in range(size):
            call = draw_call(rng)
            note = write_note(call, rng)
            rule = triage_tier(call.facts())
            neighbour = rng.choice([tier for tier in (rule - 1, rule + 1) if 0 <= tier <= 4])
            tier = neighbour if rng.random() < override else rule  # drawn or not: same notes
            example = explain(call, note, tier, voice, call.ending)
            getattr(data, split).append(example)
            if split == "test":  # the reference explainer always takes the likelier ending
                data.ceiling.append(explain(call, note, rule, voice, 0.5))
                data.ceiling_gold.append(explain(call, note, tier, voice, 0.5))
            else:
                if stage1_voice != voice:
                    example = explain(call, note, tier, stage1_voice, call.ending)
                getattr(data, f"stage1_{split}").append(example)
    return data


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
        for number in re.findall(r"for (\d{1,4}) days", sentence):
            if int(number) > 7:
                facts.add("over a week")
    return facts


def argues_for(text: str) -> str | None:
    """The disposition that a rationale names or implies; None where it is not exactly one."""
    labels = read_facts(text).intersection(DISPOSITIONS)
    return labels.pop() if len(labels) == 1 else None


def ungrounded(text: str, question: str) -> list[str]:
    """The facts that a rationale states and its question does not."""
    return sorted(read_facts(text) - read_facts(question) - set(DISPOSITIONS))


# ---- Files.
def write_file(path: Path, content: bytes) -> None:
    """Write under another name first: the file is never half there."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_bytes(content)
    temporary.replace(path)


def write_checkpoint(path: Path, content: dict) -> None:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    write_file(path, buffer.getvalue())


@contextlib.contextmanager
def reading(path: Path) -> Iterator[None]:
    """Whatever is wrong with a file becomes one InputError."""
    try:
        yield
    except Exception as error:  # a missing or damaged file raises a dozen types
        problem = f"{type(error).__name__}: {str(error)[:100]}"
        raise InputError(f"{path}: {problem}; mend it or give another path") from None


def read_records(path: Path) -> Iterator[tuple[str, list[str]]]:
    """Place, question, label and rationale of each record; the suffix tells the format."""
    csv.field_size_limit(2**31 - 1)  # the default, 131072, is too short for articles
    text = path.read_text(encoding="utf-8-sig")  # -sig: without Excel's byte order mark
    if path.suffix == ".csv":
        rows = csv.DictReader(io.StringIO(text, newline=""), strict=True)
        for row in rows:
            if None in row:
                raise ValueError("more fields than columns; put texts in double quotes")
            yield f"line {rows.line_num}", [row["question"], row["label"], row["rationale"]]
    elif path.suffix == ".jsonl":
        for number, line in enumerate(text.split("\n"), 1):
            if line.strip():
                row = json.loads(line)
                yield f"line {number}", [row["question"], row["label"], row["rationale"]]
    elif path.suffix != ".json":
        raise ValueError("its name must end in .csv, .jsonl or .json")
    else:
        content = json.loads(text)
        for number, item in enumerate(content.get("questions", []), 1):  # BioASQ, Task B
            if item["type"] == "yesno":
                texts = [item["body"]] + [snippet["text"] for snippet in item["snippets"]]
                answer = item["ideal_answer"]
                if isinstance(answer, list):  # newer files give several
                    answer = answer[0]
                yield f"question {number}", [" ".join(texts), item["exact_answer"].lower(), answer]
        if "questions" not in content:  # PubMedQA's ori_pqal.json
            for key, item in content.items():
                question = " ".join([item["QUESTION"]] + item["CONTEXTS"])
                yield key, [question, item["final_decision"], item["LONG_ANSWER"]]


def read_file(path: Path) -> dict[str, Example]:
    """The examples of a file by their place in it; PubMedQA's by their ids."""
    examples = {}
    place = "the start"
    try:
        for place, (question, label, rationale) in read_records(path):  # place: for the message
            example = Example(question.strip(), label.strip(), rationale.strip())
            (question + label + rationale).encode()  # a lone surrogate, which JSON can hold, fails
            if not example.question or not example.label:
                raise ValueError("question or label is empty")
            examples[place] = example
    except Exception as error:
        problem = f"{type(error).__name__}: {error}, at or after {place}"
        hint = "needs question,label,rationale as UTF-8 text; .json only as PubMedQA or BioASQ"
        raise InputError(f"{path}: {problem}; {hint}") from None
    return examples


def read_splits(path: Path, seed: int) -> list[list[Example]]:
    """Train, val and test: of a folder's files, or of one file, split 80/10/10 by the seed.

    PubMedQA's official test ids decide if its test_ground_truth.json lies beside the file.
    """
    if path.is_dir():
        splits = []
        for split in ("train", "val", "test"):
            files = [path / f"{split}.jsonl", path / f"{split}.csv"]
            files = [file for file in files if file.exists()]
            if len(files) != 1:
                raise InputError(f"{path}: needs one file {split}.jsonl or {split}.csv")
            splits.append(list(read_file(files[0]).values()))
        return splits
    examples = read_file(path)
    places = list(examples)
    random.Random(seed).shuffle(places)
    test = places[: len(places) // 10]
    truth = path.with_name("test_ground_truth.json")
    if path.suffix == ".json" and truth.exists():
        with reading(truth):
            official = json.loads(truth.read_text(encoding="utf-8"))
            test = [place for place in places if place in official]
    in_test = set(test)
    rest = [place for place in places if place not in in_test]
    val = rest[: len(rest) // 9]  # a tenth of all
    train = rest[len(val) :]
    return [list(map(examples.get, split)) for split in (train, val, test)]


def load_data(
    source: str, seed: int, limit: int | None, notes: int, override: float, *voices: str
) -> Dataset:
    """The data set named by `source`: `triage`, a file or a folder. Raises InputError."""
    if source == "triage":
        sizes = {"train": notes, "val": 500, "test": 1000}
        sizes = {split: min(size, limit or size) for split, size in sizes.items()}
        return simulate(sizes, override, seed, *voices)
    train, val, test = [split[:limit] for split in read_splits(Path(source), seed)]
    labels = Counter(columns(train + val + test)[1])
    if not val or not test or len(set(columns(train)[1])) < 2:
        raise InputError(f"{source}: needs two labels in train, examples in val and test; add some")
    if len({" ".join(label.lower().split()) for label in labels}) < len(labels):
        print(f"note: some labels in {source} differ from others only by case or spaces")
    return Dataset(train, val, test, list(labels), train, val, [], [])


# ---- Texts, tokens, batches.
def columns(examples: list[Example]) -> tuple[list[str], list[str], list[str]]:
    """The questions, the gold labels and the gold rationales."""
    questions = [example.question for example in examples]
    labels = [example.label for example in examples]
    return questions, labels, [example.rationale for example in examples]


def with_prefix(prefix: str, questions: list[str]) -> list[str]:
    """A prompt for each question."""
    return [f"{prefix} {question}" for question in questions]


class Tokenizer:
    """SentencePiece, trained here or T5's own. Ids: 0 padding, 1 end, 2 unknown."""

    def __init__(self, model: bytes):
        self.model = model
        self.processor = sentencepiece.SentencePieceProcessor(model_proto=model)

    @classmethod
    def load(cls, path: Path) -> "Tokenizer":
        with reading(path):
            tokenizer = cls(path.read_bytes())
        if tokenizer.processor.pad_id() != 0 or tokenizer.processor.eos_id() != 1:
            raise InputError(f"{path}: padding and end are not the ids 0 and 1; give a T5's")
        return tokenizer

    @classmethod
    def train(cls, texts: list[str], vocab_size: int) -> "Tokenizer":
        """Byte-pair encoding: on templated text a unigram vocabulary collapses to a few pieces.

        What is not in the vocabulary is written in bytes, so no text, above all no label, loses a
        letter: SentencePiece's default coverage once dropped the E of "go to ED now".
        """
        counts = Counter("".join(texts))
        frequent = sorted(counts, key=counts.get, reverse=True)
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

    def encode(self, texts: list[str], limit: int) -> torch.Tensor:
        """Token ids with the end token, then 0: (B, longest). A text loses what passes `limit`.

        An empty text is nothing but padding, so it adds nothing to a loss.
        """
        rows = []
        for ids in self.processor.encode(texts):
            rows.append(torch.tensor([*ids[: limit - 1], 1] if ids else [0]))
        return pad_sequence(rows, batch_first=True)

    def longest(self, labels: list[str], limit: int) -> int:
        """Tokens of the longest label. Raises InputError for one that cannot be written."""
        rows = self.encode(labels, limit)
        for label, ids in zip(labels, rows.tolist(), strict=True):
            if self.decode(ids) != label:
                raise InputError(f"the label {label[:50]!r} does not fit; rename it")
        return rows.shape[1]

    def decode(self, ids: list[int]) -> str:
        """Up to the end token, without padding and ids above the vocabulary, which T5 can give."""
        if 1 in ids:
            ids = ids[: ids.index(1)]
        return self.processor.decode([i for i in ids if 0 < i < len(self)]).strip()


def batch_order(lengths: list[int], batch_size: int, seed: int, epoch: int) -> list[list[int]]:
    """The batches of an epoch, as lists of example numbers; the same for the same arguments.

    Shuffled, then sorted by length within pools of 16 batches: neighbours of one length need
    little padding. What does not fill the last batch is left out, at random.
    """
    rng = random.Random(f"{seed} {epoch}")
    order = rng.sample(range(len(lengths)), len(lengths))
    full = max(len(order) // batch_size, 1) * batch_size
    order = order[:full]  # before sorting: else the longest would never be seen
    batches = []
    for start in range(0, len(order), 16 * batch_size):
        pool = sorted(order[start : start + 16 * batch_size], key=lambda i: lengths[i])
        for first in range(0, len(pool), batch_size):
            batches.append(pool[first : first + batch_size])
    rng.shuffle(batches)
    return batches
