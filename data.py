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
from collections.abc import Iterable, Iterator
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
    ceiling: list[Example]  # triage: the test as answered by who knows the rule, else empty
    ceiling_gold: list[Example]  # the same if told the gold label


# ---- The simulated nurse line: words. A key is the usual wording of a fact, and its name; `other`
# is a synonym, `short` the nurse's abbreviation, `group` a row of GROUPS, `cue` what reassures.
Words = namedtuple("Words", ["other", "short"])
Complaint = namedtuple("Complaint", ["other", "short", "group", "cue"])
RedFlag = namedtuple("RedFlag", ["other", "short", "tier", "reason"])
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
}
GROUPS = {  # the red flags that callers of a group of complaints mention, the worst first
    "heart": ["left-arm pressure", "sudden fainting", "coughing up blood", "a racing pulse"],
    "head": ["a drooping face", "a stiff neck", "repeated confusion", "blurred vision"],
    "lungs": ["blue lips", "a swollen tongue", "coughing up blood", "ear pain at night"],
    "fever": ["a long seizure", "a stiff neck", "green phlegm", "ear pain at night"],
    "belly": ["sudden fainting", "black tarry stools", "hardly any urine", "burning urine"],
    "skin": ["blue lips", "a swollen tongue", "a stiff neck", "red skin streaks"],
    "limbs": ["a long seizure", "coughing up blood", "red skin streaks", "a racing pulse"],
}
RED_FLAGS = {
    "left-arm pressure": RedFlag("a heavy left arm", "L arm sx", 4, "a heart attack"),
    "a drooping face": RedFlag("a face hanging down", "facial droop", 4, "a stroke"),
    "blue lips": RedFlag("lips turning blue", "cyanosis", 4, "lack of oxygen"),
    "sudden fainting": RedFlag("fainting with cold sweat", "syncope", 4, "shock"),
    "a long seizure": RedFlag("minutes of seizure", "prolonged sz", 4, "brain damage"),
    "a swollen tongue": RedFlag("a thick tongue", "tongue edema", 4, "a closing airway"),
    "a stiff neck": RedFlag("a neck that is stiff", "nuchal rig", 3, "meningitis"),
    "black tarry stools": RedFlag("stools like tar", "melena", 3, "a bleeding ulcer"),
    "coughing up blood": RedFlag("bloody sputum", "hemoptysis", 3, "a clot in the lung"),
    "repeated confusion": RedFlag("being confused", "AMS", 3, "a bleed in the skull"),
    "hardly any urine": RedFlag("almost no urine", "oliguria", 3, "dehydration"),
    "burning urine": RedFlag("urine that burns", "dysuria", 2, "a urinary infection"),
    "green phlegm": RedFlag("phlegm that is green", "productive", 2, "pneumonia"),
    "blurred vision": RedFlag("seeing a blur", "blurry vision", 2, "eye pressure"),
    "ear pain at night": RedFlag("a painful ear", "otalgia", 2, "an ear infection"),
    "red skin streaks": RedFlag("streaks on the skin", "streaking", 2, "a skin infection"),
    "a racing pulse": RedFlag("a pulse that races", "tachy", 2, "a rhythm problem"),
}
SEVERITIES = {
    "mild": Words("slight", "mild"),
    "moderate": Words("medium", "mod"),
    "severe": Words("very strong", "sev"),
}
DURATION = {"over a week": Words("weeks", ">1wk")}
CUES = {
    "a good appetite": Words("eating and drinking well", "tol PO"),
    "pain only on pressure": Words("a tender spot", "reproducible"),
    "a known pattern": Words("episodes like it before", "hx of same"),
    "slow improvement": Words("feeling better since yesterday", "improving"),
}
MODIFIERS = {
    "a weak immune system": Words("chemotherapy", "immunosupp"),
    "a blood thinner": Words("warfarin tablets", "on AC"),
    "diabetes": Words("insulin injections", "DM"),
    "a recent operation": Words("surgery last month", "post-op"),
}
WORDS = COMPLAINTS | RED_FLAGS | SEVERITIES | DURATION | CUES | MODIFIERS
IMPLIED = {  # what a rationale may say instead of a label's name
    "home care": Words("no visit should be needed for this", "self-care adv"),
    "see doctor within 3 days": Words("an office visit this week is soon enough", "appt this wk"),
    "see doctor within 24 hours": Words("a doctor should look at this by tomorrow", "appt <24h"),
    "go to ED now": Words("emergency care is needed without waiting", "ED"),
    "call 911": Words("an ambulance is needed at once", "EMS"),
}
DISPOSITIONS = list(IMPLIED)  # tiers 0 to 4
DISTRACTORS = ["has a dog", "works nights", "plays chess", "moved house", "asks about a flu shot"]


@dataclass
class Call:
    """The facts of one call. Note, label and rationales are made from them."""

    complaint: str
    severity: str
    duration: list[str]  # "over a week", or empty
    flags: list[str]  # the red flags, the worst first
    denied: list[str]  # at most one red flag; lists, so that they can be added up
    cues: list[str]  # at most one
    modifiers: list[str]  # at most one

    def facts(self) -> set[str]:
        facts = {self.complaint, self.severity}
        facts.update(self.duration, self.flags, self.cues, self.modifiers)
        for flag in self.denied:
            facts.add(f"no {flag}")
        return facts


def triage_tier(facts: set[str]) -> int:
    """The rule: facts -> tier, an index into DISPOSITIONS. A denied fact ("no ...") never counts.

    1. Severity gives the base (mild 0, moderate 1, severe 2); over a week makes it at least 1.
    2. A red flag raises the tier to its own, whatever 1 says. Without one, a cue lowers it by one.
    3. A modifier (diabetes, ...) raises it by one, up to the emergency department.
    """
    tier = 0
    if "severe" in facts:
        tier = 2
    elif "moderate" in facts or "over a week" in facts:
        tier = 1
    flags = facts & RED_FLAGS.keys()
    for flag in flags:
        tier = max(tier, RED_FLAGS[flag].tier)
    if tier > 0 and not flags and facts & CUES.keys():
        tier -= 1
    if tier < 3 and facts & MODIFIERS.keys():
        tier += 1
    return tier


def maybe(rng: random.Random, share: float, options: Iterable[str]) -> list[str]:
    """With probability `share` a list of one of the options, else an empty one."""
    return [rng.choice(list(options))] if rng.random() < share else []


def draw_call(rng: random.Random) -> Call:
    """One call, with red flags and a cue that fit its complaint."""
    complaint = rng.choice(list(COMPLAINTS))
    group = GROUPS[COMPLAINTS[complaint].group]
    weights = [6 - RED_FLAGS[flag].tier for flag in group]  # the worse, the rarer
    n_flags = rng.choices([0, 1, 2], [48, 40, 12])[0]
    drawn = rng.choices(group, weights, k=n_flags)  # perhaps the same one twice
    return Call(
        complaint=complaint,
        severity=rng.choices(list(SEVERITIES), [46, 36, 18])[0],
        duration=maybe(rng, 0.25, DURATION),
        flags=[flag for flag in group if flag in drawn],
        denied=maybe(rng, 0.1, [flag for flag in group if flag not in drawn]),
        cues=maybe(rng, 0.3, [COMPLAINTS[complaint].cue]),
        modifiers=maybe(rng, 0.3, MODIFIERS),
    )


def sentences(parts: list[str]) -> str:
    return " ".join(part[0].upper() + part[1:] + "." for part in parts)


def write_note(call: Call, rng: random.Random) -> str:
    """Who, what and for how long; then the other facts in any order."""

    def say(fact: str) -> str:
        return rng.choice([fact, WORDS[fact].other])

    who = f"{rng.choice(['a woman', 'a man'])} of {rng.randint(18, 94)} years"
    unit = "weeks" if call.duration else "days"
    what = f"{say(call.complaint)} for {rng.randint(2, 6)} {unit}"
    opening = rng.choice([f"{who} with {what}", f"{who} has had {what}", f"{what} in {who}"])
    rest = [f"{rng.choice(['it is', 'caller calls it'])} {say(call.severity)}"]
    rest += maybe(rng, 0.5, DISTRACTORS)
    for fact in call.flags + call.cues + call.modifiers:
        rest.append(f"{rng.choice(['reports', 'describes', 'mentions'])} {say(fact)}")
    for flag in call.denied:
        rest.append(f"denies {say(flag)}")
    rng.shuffle(rest)
    return sentences([opening, *rest])


# ---- The simulated nurse line: why a call has its tier, in three voices.
def llm_steps(call: Call) -> list[str]:
    """A sentence with a reason for each fact that matters."""
    if call.flags:
        steps = [f"{call.flags[0]} can mean {RED_FLAGS[call.flags[0]].reason}"]
    else:
        steps = [f"{call.complaint} is {call.severity}"]
        steps += [f"it has lasted {fact}" for fact in call.duration]
        steps += [f"{cue} is reassuring" for cue in call.cues]
    steps += [f"the caller denies {flag}" for flag in call.denied]
    return steps + [f"{modifier} raises the risk" for modifier in call.modifiers]


def post_steps(call: Call) -> list[str]:
    """The nurse's, post-processed: the facts in their usual words."""
    steps = [call.complaint, call.severity, *call.duration]
    steps += [f"denies {flag}" for flag in call.denied]
    reasons = call.flags[:1] or call.cues  # a cue counts only without a red flag
    return steps + reasons + call.modifiers


def nurse_steps(call: Call) -> list[str]:
    """The same facts in the nurse's abbreviations."""
    steps = []
    for step in post_steps(call):
        fact = step.removeprefix("denies ")
        steps.append(step.replace(fact, WORDS[fact].short))
    return steps


VOICES = {"llm": llm_steps, "nurse": nurse_steps, "post": post_steps}
NAMED = 0.75  # share of the rationales that name their label; the others imply it


def explain(call: Call, note: str, tier: int, voice: str, named: bool) -> Example:
    """The note with this tier's label, and a rationale for it.

    If the tier is not the rule's, the nurse had reasons that no note holds; the rationale says so.
    """
    label = DISPOSITIONS[tier]
    steps = VOICES[voice](call)
    rule = triage_tier(call.facts())
    if tier != rule:
        steps.append(f"one level {'up' if tier > rule else 'down'} on judgement")
    if named:
        steps.append(label)
    else:
        steps.append(IMPLIED[label].short if voice == "nurse" else IMPLIED[label].other)
    return Example(note, label, sentences(steps))


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
            tier = neighbour if rng.random() < override else rule  # always drawn: same notes
            named = rng.random() < NAMED
            getattr(data, split).append(explain(call, note, tier, voice, named))
            if split == "test":  # the reference explainer takes the likelier ending: the name
                data.ceiling.append(explain(call, note, rule, voice, named=True))
                data.ceiling_gold.append(explain(call, note, tier, voice, named=True))
            else:
                example = explain(call, note, tier, stage1_voice, named)
                getattr(data, f"stage1_{split}").append(example)
    return data


# ---- The simulated nurse line: reading facts back, for checking a rationale.
FACT_OF = {}  # from a wording, in lower case and without its article, to its fact or label
for name, words in (WORDS | IMPLIED).items():
    for wording in [name, words.other, words.short]:
        FACT_OF[re.sub("^(a|an) ", "", wording.lower())] = name
ANY_FACT = re.compile(rf"(?<!\w)({'|'.join(map(re.escape, FACT_OF))})(?!\w)")


def read_facts(text: str) -> set[str]:
    """The facts and dispositions that a text states; "no ..." for what its sentence denies."""
    facts = set()
    for sentence in text.lower().split("."):
        stated, _, denied = sentence.partition("denies")
        for wording in ANY_FACT.findall(stated):
            facts.add(FACT_OF[wording])
        for wording in ANY_FACT.findall(denied):
            facts.add(f"no {FACT_OF[wording]}")
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
        problem = f"{type(error).__name__}: {str(error)[:300]}"
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
    place = "the start"  # until the first record could be read
    try:
        for place, (question, label, rationale) in read_records(path):
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
            files = [*path.glob(f"{split}.jsonl"), *path.glob(f"{split}.csv")]
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
    val = rest[: len(rest) // 9]  # a tenth of all, if test is
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
    labels = dict.fromkeys(columns(train + val + test)[1])  # without duplicates, in their order
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
        letter, as it would with SentencePiece's defaults.
        """
        counts = Counter("".join(texts))
        frequent = sorted(counts, key=counts.get, reverse=True)
        rare = dict.fromkeys(map(ord, frequent[vocab_size // 4 :]), " ")  # gets no piece: bytes
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
    little padding. What does not fill the last batch is left out, at random, if there is another.
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
