"""Text in, numbers out: examples, files, tokenizer, batches, a look at the data; last a simulator.
The default data are SIMULATED (the paper's notes are private) and are not medical advice."""

import contextlib
import csv
import io
import json
import random
import re
import unicodedata
from argparse import Namespace
from collections import Counter, defaultdict, namedtuple
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path

import sentencepiece
import torch
from torch.nn.utils.rnn import pad_sequence

PAD, END, UNKNOWN = 0, 1, 2  # token ids, as in T5


class InputError(ValueError):
    """The input cannot be used. The message says what, where, and how to mend it."""


# ---- Examples
@dataclass(frozen=True)
class Example:
    question: str
    label: str  # empty in --stage1-data, which needs none
    rationale: str  # may be empty in a user's data: then it is neither learned nor scored


@dataclass
class Dataset:
    labels: list[str]
    train: list[Example] = field(default_factory=list)
    val: list[Example] = field(default_factory=list)
    test: list[Example] = field(default_factory=list)
    stage1_train: list[Example] = field(default_factory=list)  # each has a rationale
    stage1_val: list[Example] = field(default_factory=list)
    ceiling: list[dict] = field(default_factory=list)  # triage: the rule's answer to each test


def columns(examples: list[Example]) -> tuple[list[str], list[str], list[str]]:
    """The questions, the gold labels and the gold rationales."""
    questions = [example.question for example in examples]
    labels = [example.label for example in examples]
    return questions, labels, [example.rationale for example in examples]


def load_data(o: Namespace) -> Dataset:
    """The data set that the options name: `triage`, a file or a folder. Raises InputError."""
    if o.data == "triage":
        dataset = simulate(o)
    else:
        path = Path(o.data)
        if path.is_dir():
            splits = []
            for name in ("train", "val", "test"):
                files = [*path.glob(f"{name}.jsonl"), *path.glob(f"{name}.csv")]
                if len(files) != 1:
                    raise InputError(f"{path}: needs one file {name}.jsonl or {name}.csv")
                splits.append(read_file(files[0]))
        else:
            splits = split(read_file(path), o.seed)
        train, val, test = [examples[: o.limit] for examples in splits]
        labels = dict.fromkeys(columns(train + val + test)[1])  # each once, in their order
        if not val or not test or len(set(columns(train)[1])) < 2:
            raise InputError(f"{o.data}: needs 10 questions or 3 full files; 2 labels in train")
        dataset = Dataset(list(labels), train, val, test, stage1_train=train, stage1_val=val)
    if o.stage1_data:
        examples = read_file(Path(o.stage1_data), ["question", "rationale"])
        train, dataset.stage1_val, test = split(examples, o.seed)
        dataset.stage1_train = train + test  # stage 1 has no test
    dataset.stage1_train = [e for e in dataset.stage1_train if e.rationale][: o.limit]
    dataset.stage1_val = [e for e in dataset.stage1_val if e.rationale][: o.limit]
    return dataset


# ---- Files
def write_file(path: Path, content: bytes) -> None:
    """Write under another name first: the file is never half there."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_bytes(content)
    temporary.replace(path)


@contextlib.contextmanager
def reading(path: Path, advice: str = "give another file") -> Iterator[None]:
    """Whatever is wrong with a file becomes one InputError."""
    try:
        yield
    except Exception as error:  # a missing or damaged file raises a dozen types
        first = str(error).partition(". ")[0][:300]  # torch goes on to advise weights_only=False
        raise InputError(f"{path}: {type(error).__name__}: {first}; {advice}") from None


def unique_keys(pairs: list[tuple]) -> dict:
    if len(dict(pairs)) < len(pairs):
        raise ValueError("two columns have the same name")
    return dict(pairs)


def read_records(path: Path) -> Iterator[tuple[int, dict]]:
    """Line number and fields of each record of a .csv or .jsonl file."""
    text = path.read_text(encoding="utf-8-sig")  # -sig: without Excel's byte order mark
    if path.suffix == ".jsonl":
        for number, line in enumerate(text.split("\n"), 1):
            if line.strip():
                yield number, json.loads(line, object_pairs_hook=unique_keys)
    elif path.suffix == ".csv":
        csv.field_size_limit(2**31 - 1)  # the default, 131072, is too short for articles
        rows = csv.DictReader(io.StringIO(text), strict=True)
        unique_keys([(name, None) for name in rows.fieldnames or []])
        for row in rows:
            if None in row or None in row.values():
                raise ValueError("not as many fields as columns; put texts in double quotes")
            yield rows.line_num, row
    else:
        raise ValueError("its name must end in .csv or .jsonl (a JSON object on each line)")


def read_file(path: Path, names: Iterable[str] = ("question", "label", "rationale")) -> list:
    """The examples of a file that has these columns. Raises InputError, which names the line."""
    examples = []
    line = 1  # until the first record could be read
    try:
        for line, record in read_records(path):  # noqa: B007
            texts = {"label": ""}
            for name in names:
                text = record[name]
                if text is None and name == "rationale":  # pandas writes null for an empty cell
                    text = ""
                if type(text) is not str or (not text.strip() and name != "rationale"):
                    raise ValueError(f"{name} is {text!r}: empty, or no text")
                text.encode()  # raises for half of a character pair, which JSON can hold
                texts[name] = text.strip()
            examples.append(Example(**texts))
    except Exception as error:  # of half a dozen types
        problem = f"{type(error).__name__}: {str(error)[:300]}, at or after line {line}"
        raise InputError(f"{path}: {problem}; needs {','.join(names)} as UTF-8 text") from None
    return examples


def normalized(text: str) -> str:
    """For comparing texts: without case, invisible characters, more than one space in a row."""
    visible = [c for c in unicodedata.normalize("NFKC", text) if unicodedata.category(c) != "Cf"]
    return " ".join("".join(visible).casefold().split())


def split(examples: list[Example], seed: int) -> list[list[Example]]:
    """Train, val and test, 80/10/10 at random; examples of one question stay together."""
    by_question = defaultdict(list)
    for example in examples:
        by_question[normalized(example.question)].append(example)
    groups = list(by_question.values())
    random.Random(seed).shuffle(groups)
    tenth = len(groups) // 10
    parts = [groups[2 * tenth :], groups[tenth : 2 * tenth], groups[:tenth]]
    return [list(chain(*part)) for part in parts]


# ---- Tokens and batches
class Tokenizer:
    """SentencePiece, trained here or T5's own. Ids: 0 padding, 1 end, 2 unknown."""

    def __init__(self, model: bytes):
        self.model = model
        self.processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        self.n_pieces = self.processor.get_piece_size()

    @classmethod
    def load(cls, path: Path) -> "Tokenizer":
        with reading(path, "damaged, or not of a T5, or not in full (git lfs pull)"):
            tokenizer = cls(path.read_bytes())
            if tokenizer.processor.pad_id() != PAD or tokenizer.processor.eos_id() != END:
                raise ValueError("padding and end are not the ids 0 and 1")
        return tokenizer

    @classmethod
    def train(cls, texts: list[str], vocab_size: int) -> "Tokenizer":
        """Byte-pair encoding; rare characters are written in bytes, so no text loses a letter."""
        rare = Counter("".join(texts)).most_common()[vocab_size // 4 :]
        blank = {ord(character): " " for character, _ in rare}  # they do not become pieces
        model = io.BytesIO()
        ids = {"pad_id": PAD, "eos_id": END, "unk_id": UNKNOWN, "bos_id": -1}  # -1: none
        unchanged = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False}
        others = {"hard_vocab_limit": False, "max_sentence_length": 10**6, "minloglevel": 2}
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter([text.translate(blank) for text in texts]),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            byte_fallback=True,
            character_coverage=1.0,
            **(ids | unchanged | others),
        )
        return cls(model.getvalue())

    def to_ids(self, texts: list[str], limit: int) -> torch.Tensor:
        """Token ids (texts, longest): cut, ended, padded. An empty text is padding: no loss."""
        rows = []
        for ids in self.processor.encode(texts):
            rows.append(torch.tensor([*ids[: limit - 1], END] if ids else [PAD]))
        return pad_sequence(rows, batch_first=True, padding_value=PAD)

    def to_text(self, ids: list[int]) -> str:
        """Up to the end token, without padding and ids without a piece, of which T5 has some."""
        if END in ids:
            ids = ids[: ids.index(END)]
        return self.processor.decode([i for i in ids if PAD < i < self.n_pieces]).strip()

    def longest_label(self, labels: list[str], limit: int) -> int:
        """Tokens of the longest label, with its end. Raises InputError if a label is not kept."""
        encoded = self.processor.encode(labels)
        for label, ids in zip(labels, encoded, strict=True):
            name = f"label {label[:50]!r}"
            if len(ids) >= limit:
                raise InputError(f"{name}: too long; raise --max-source, --max-target")
            if self.to_text(ids) != label:
                raise InputError(f"{name}: the tokenizer loses a character; rename it")
        return max(map(len, encoded)) + 1


def make_batches(examples: list[Example], size: int, seed: int, epoch: int) -> list[list[Example]]:
    """The batches of an epoch: shuffled, then sorted by length within pools of 16 batches, since
    neighbours of one length need little padding. A last, incomplete one is left out, unless alone.
    """
    rng = random.Random(f"{seed} {epoch}")
    order = rng.sample(examples, len(examples))
    full = max(len(order) // size, 1) * size
    order = order[:full]  # before sorting: else the longest would never be seen
    batches = []
    for start in range(0, len(order), 16 * size):
        pool = sorted(order[start : start + 16 * size], key=lambda e: len(e.question))
        batches += [pool[first : first + size] for first in range(0, len(pool), size)]
    rng.shuffle(batches)
    return batches


# ---- A look at the data before training
def look(dataset: Dataset, tokenizer: Tokenizer, max_source: int, max_target: int) -> str:
    """What to know before training: sizes, labels, and a warning for each thing that is odd."""
    counts = Counter(columns(dataset.train)[1])
    alike = Counter(map(normalized, dataset.labels))
    learned = set(map(normalized, columns(dataset.train + dataset.stage1_train)[0]))
    encode = tokenizer.processor.encode
    odd = defaultdict(list)
    lost = set()
    examples = dataset.train + dataset.val + dataset.test + dataset.stage1_train
    for example in dict.fromkeys(examples):  # each once
        prompt = f"given label: {example.label}, explain: {example.question}"  # the longest
        if len(encode(prompt)) >= max_source:
            odd["prompts cut at --max-source"].append(prompt)
        if len(encode(example.rationale)) >= max_target:
            odd["rationales cut at --max-target"].append(example.rationale)
        for text in (prompt, example.rationale):
            kept = unicodedata.normalize("NFKC", tokenizer.to_text(encode(text)))
            lost.update(set(unicodedata.normalize("NFKC", text)) - set(kept))
    if lost:
        odd["characters lost by the tokenizer"] = sorted(lost)
    for label in dataset.labels:
        if counts[label] < max(3, 0.01 * len(dataset.train)):
            odd["labels rare in train"].append(label)
        if alike[normalized(label)] > 1:
            odd["labels like another"].append(label)
    for name, held_out in [("val", dataset.val), ("test", dataset.test)]:
        for question in columns(held_out)[0]:
            if normalized(question) in learned:
                odd[f"{name} questions also in train or stage 1"].append(question)
    sizes = f"{len(dataset.train)} train, {len(dataset.val)} val, {len(dataset.test)} test examples"
    lines = [f"{sizes}; {len(dataset.stage1_train)} rationales for stage 1"]
    lines.append(f"labels in train: {str(dict(counts.most_common(12)))[1:-1]}")
    for what, found in odd.items():
        lines.append(f"warning: {len(found)} {what}: {', '.join(map(repr, found))[:60]}")
    return "\n".join(lines)


# ---- The simulated nurse line: words. A key is a fact, in its usual wording; `other` is a synonym,
# `short` an abbreviation, `cue` a fact that reassures, `groups` the complaints that a flag fits.
Words = namedtuple("Words", ["other", "short"])
Complaint = namedtuple("Complaint", ["other", "short", "group", "cue"])
Flag = namedtuple("Flag", ["other", "short", "tier", "reason", "groups"])
COMPLAINTS = {
    "chest pain": Complaint("pain in the chest", "CP", "heart", "pain only on pressure"),
    "a headache": Complaint("an aching head", "HA", "head", "a known pattern"),
    "abdominal pain": Complaint("belly pain", "abd pain", "belly", "pain only on pressure"),
    "a fever": Complaint("a high temperature", "febrile", "fever", "a good appetite"),
    "a cough": Complaint("a lingering cough", "cough sx", "lung", "a good appetite"),
    "shortness of breath": Complaint("trouble breathing", "SOB", "lung", "slow improvement"),
    "dizziness": Complaint("a dizzy spell", "dizzy", "head", "a known pattern"),
    "vomiting": Complaint("throwing up", "emesis", "belly", "a good appetite"),
    "back pain": Complaint("an aching back", "LBP", "heart", "pain only on pressure"),
    "a rash": Complaint("spots on the skin", "rash noted", "skin", "slow improvement"),
    "a head injury": Complaint("a blow to the head", "head inj", "head", "slow improvement"),
    "a nosebleed": Complaint("a bleeding nose", "epistaxis", "heart", "slow improvement"),
    "a sore throat": Complaint("a painful throat", "ST", "lung", "a good appetite"),
    "an eye problem": Complaint("an irritated eye", "eye c/o", "head", "slow improvement"),
    "leg pain": Complaint("a painful leg", "leg pn", "limb", "pain only on pressure"),
    "a urinary problem": Complaint("trouble passing urine", "GU c/o", "belly", "a good appetite"),
    "diarrhea": Complaint("loose stools", "loose BM", "belly", "a good appetite"),
    "a wound": Complaint("a cut in the skin", "lac", "skin", "pain only on pressure"),
    "soreness from a fall": Complaint("aches from a fall", "GLF", "limb", "pain only on pressure"),
    "an allergic reaction": Complaint("an allergy", "allergic rxn", "skin", "a known pattern"),
}
RED_FLAGS = {  # the worst first
    "left-arm pressure": Flag("a heavy left arm", "L arm sx", 4, "a heart attack", "heart"),
    "a drooping face": Flag("a face hanging down", "facial droop", 4, "a stroke", "head"),
    "blue lips": Flag("lips turning blue", "cyanosis", 4, "lack of oxygen", "lung skin"),
    "sudden fainting": Flag("fainting with cold sweat", "syncope", 4, "shock", "heart belly"),
    "a long seizure": Flag("minutes of seizure", "prolonged sz", 4, "brain damage", "fever limb"),
    "a swollen tongue": Flag("a thick tongue", "tongue edema", 4, "a closing airway", "lung skin"),
    "a stiff neck": Flag("a neck that is stiff", "nuchal rig", 3, "meningitis", "head fever skin"),
    "black tarry stools": Flag("stools like tar", "melena", 3, "a bleeding ulcer", "belly"),
    "coughing up blood": Flag("bloody sputum", "hemoptysis", 3, "a lung clot", "heart lung limb"),
    "repeated confusion": Flag("being confused", "AMS", 3, "a bleed in the skull", "head"),
    "hardly any urine": Flag("almost no urine", "oliguria", 3, "dehydration", "belly"),
    "burning urine": Flag("urine that burns", "dysuria", 2, "a urinary infection", "belly"),
    "green phlegm": Flag("phlegm that is green", "productive", 2, "pneumonia", "fever"),
    "blurred vision": Flag("seeing a blur", "blurry vision", 2, "eye pressure", "head"),
    "ear pain at night": Flag("a painful ear", "otalgia", 2, "an ear infection", "lung fever"),
    "red skin streaks": Flag("streaks on the skin", "streaky", 2, "a skin infection", "skin limb"),
    "a racing pulse": Flag("a pulse that races", "tachy", 2, "a rhythm problem", "heart limb"),
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
IMPLIED = {  # the labels, tiers 0 to 4, and what a rationale may say instead of their names
    "home care": Words("no visit should be needed for this", "self-care adv"),
    "see doctor within 3 days": Words("an office visit this week is soon enough", "appt this wk"),
    "see doctor within 24 hours": Words("a doctor should look at this by tomorrow", "appt <24h"),
    "go to ED now": Words("emergency care is needed without waiting", "ED"),
    "call 911": Words("an ambulance is needed at once", "EMS"),
}
DISPOSITIONS = list(IMPLIED)
DISTRACTORS = ["has a dog", "works nights", "plays chess", "moved house", "asks about a flu shot"]


@dataclass
class Call:
    """The facts of one call. Note, label and rationales are made from them."""

    complaint: str
    severity: str
    duration: list[str]  # "over a week", or empty
    flags: list[str]  # the red flags, the worst first
    denied: list[str]  # at most one red flag; lists, so that they can be joined
    cues: list[str]  # at most one
    modifiers: list[str]  # at most one

    def facts(self) -> set[str]:
        facts = {self.complaint, self.severity, *self.duration, *self.flags, *self.cues}
        return facts | {*self.modifiers, *[f"no {flag}" for flag in self.denied]}


def triage_tier(facts: set[str]) -> int:
    """The rule: facts -> tier, an index into DISPOSITIONS. A denied fact ("no ...") never counts.

    1. Severity gives the base (mild 0, moderate 1, severe 2); over a week makes it at least 1.
    2. A red flag raises it to its own tier at least. Without one, a cue lowers it by one.
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
    """One call, with red flags and a cue that fit its complaint. All shares are invented."""
    complaint = rng.choice(list(COMPLAINTS))
    group = COMPLAINTS[complaint].group
    possible = [flag for flag in RED_FLAGS if group in RED_FLAGS[flag].groups.split()]
    weights = [6 - RED_FLAGS[flag].tier for flag in possible]  # the worse, the rarer
    n_flags = rng.choices([0, 1, 2], [48, 40, 12])[0]
    drawn = rng.choices(possible, weights, k=n_flags)  # perhaps the same one twice
    return Call(
        complaint=complaint,
        severity=rng.choices(list(SEVERITIES), [46, 36, 18])[0],
        duration=maybe(rng, 0.25, DURATION),
        flags=[flag for flag in possible if flag in drawn],
        denied=maybe(rng, 0.1, [flag for flag in possible if flag not in drawn]),
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
    unit = "weeks" if call.duration else "days"  # "weeks" states the fact "over a week"
    what = f"{say(call.complaint)} for {rng.randint(2, 6)} {unit}"
    opening = rng.choice([f"{who} with {what}", f"{who} has had {what}", f"{what} in {who}"])
    rest = [f"{rng.choice(['it is', 'caller calls it'])} {say(call.severity)}"]
    rest += maybe(rng, 0.5, DISTRACTORS)
    for fact in call.flags + call.cues + call.modifiers:
        rest.append(f"{rng.choice(['reports', 'describes', 'mentions'])} {say(fact)}")
    rest += [f"denies {say(flag)}" for flag in call.denied]
    rng.shuffle(rest)
    return sentences([opening, *rest])


def llm_steps(call: Call) -> list[str]:
    """As a language model may write: a sentence with a reason for each fact that matters."""
    if call.flags:
        steps = [f"{call.flags[0]} can mean {RED_FLAGS[call.flags[0]].reason}"]
    else:
        steps = [f"{call.complaint} is {call.severity}"]
        steps += [f"it has lasted {fact}" for fact in call.duration]
        steps += [f"{cue} is reassuring" for cue in call.cues]
    steps += [f"the caller denies {flag}" for flag in call.denied]
    return steps + [f"{modifier} raises the risk" for modifier in call.modifiers]


def post_steps(call: Call) -> list[str]:
    """The nurse's rationale, post-processed: the facts in their usual words."""
    steps = [call.complaint, call.severity, *call.duration]
    steps += [f"denies {flag}" for flag in call.denied]
    return steps + (call.flags[:1] or call.cues) + call.modifiers  # a cue, if there is no red flag


def nurse_steps(call: Call) -> list[str]:
    """The same facts in the nurse's abbreviations."""
    steps = []
    for step in post_steps(call):
        fact = step.removeprefix("denies ")
        steps.append(step.replace(fact, WORDS[fact].short))
    return steps


VOICES = {"llm": llm_steps, "nurse": nurse_steps, "post": post_steps, "reasons": llm_steps}
NAMED = 0.75  # share of the rationales that name their label; the others imply it


def make_example(call: Call, note: str, tier: int, voice: str, named: bool) -> Example:
    """The note with this tier's label, and a rationale that names the label or implies it.
    If the tier is not the rule's, the nurse had reasons that are not in the note, and says so."""
    label = DISPOSITIONS[tier]
    steps = VOICES[voice](call)
    if voice == "reasons":  # nothing that gives the label away
        return Example(note, label, sentences(steps))
    rule = triage_tier(call.facts())
    if tier != rule:
        steps.append(f"one level {'up' if tier > rule else 'down'} on judgement")
    implied = IMPLIED[label].short if voice == "nurse" else IMPLIED[label].other
    steps.append(label if named else implied)
    return Example(note, label, sentences(steps))


def simulate(o: Namespace) -> Dataset:
    """The simulated nurse line. In a share --override of the calls the nurse decides one level
    above or below the rule, for reasons missing from the note; the notes stay the same."""
    data = Dataset(DISPOSITIONS)
    n_stage1 = o.stage1_notes or o.notes
    train = ("train", max(o.notes, n_stage1), data.train, data.stage1_train)  # lists to fill
    val = ("val", 500, data.val, data.stage1_val)
    for name, size, examples, stage1_examples in [train, val, ("test", 1000, data.test, [])]:
        rng = random.Random(f"{o.seed} {name}")
        for _ in range(min(size, o.limit or size)):
            call = draw_call(rng)
            note = write_note(call, rng)
            rule = triage_tier(call.facts())
            neighbour = rng.choice([tier for tier in (rule - 1, rule + 1) if 0 <= tier <= 4])
            tier = neighbour if rng.random() < o.override else rule  # both drawn always
            named = rng.random() < NAMED
            examples.append(make_example(call, note, tier, o.rationales, named))
            stage1_examples.append(make_example(call, note, tier, o.stage1_rationales, named))
            if name == "test":
                answer = make_example(call, note, rule, o.rationales, named=True)
                by_gold = make_example(call, note, tier, o.rationales, named=True).rationale
                row = {"ceiling_label": answer.label, "rationale_given_ceiling": answer.rationale}
                data.ceiling.append({**row, "rationale_given_ceiling_gold": by_gold})
    data.train = data.train[: o.notes]
    data.stage1_train = data.stage1_train[:n_stage1]
    return data


# ---- The simulated nurse line: reading facts back, for checking a rationale
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
    """The facts that a rationale states and its question does not. Reasons are not checked."""
    facts = read_facts(text) - set(DISPOSITIONS)
    return sorted(facts - read_facts(question)) if facts else ["no fact at all"]
