"""Text in, batches out: the examples, the simulated nurse line, readers of files, the tokenizer, prompts and batches.

The default data set is SIMULATED and is not medical advice. The paper's triage notes are private, so a generator stands
in for them: every note is made from facts, the label follows from the facts by a rule (`triage_tier`), and because the
facts can be read back from any text (`read_facts`), a rationale can be checked exactly. That is why it is the default.
"""

import csv
import io
import json
import random
import re
from collections import Counter
from collections.abc import Iterator
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


# ---------------------------------------------------------------------------------------------------------------------
# The simulated nurse line. A complaint's first line: its phrasings | self-care advice | the modifiers that matter for
# it. Then its red flags: tier (2, 3 or 4), phrasings | what it can mean. Last, after 0, a reassuring cue. Phrasings end
# with one that train never sees (made of words that train does see), and then the nurse's abbreviation.

DISPOSITIONS = ["home care", "see doctor within 3 days", "see doctor within 24 hours", "go to ED now", "call 911"]
COMPLAINT_TABLE = """
chest pain / pain in the chest / pain across the chest / CP | rest and an antacid | older age, a current pregnancy
4 pressure spreading to the left arm / heaviness spreading down the left arm / left arm pressure that is spreading / L arm pressure | a heart attack / MI
3 breathlessness when lying flat / getting breathless lying flat / lying flat makes breathless / orthopnea | heart failure / CHF
2 a racing pulse at rest / a pulse that races while resting / a resting pulse that races / tachy | a rhythm problem / arrhythmia
0 pain only when pressing the ribs / ribs that hurt only when pressed / pain only with pressed ribs / reproducible
a headache / an aching head / head that is aching / HA | fluids and a dark room | older age, a current pregnancy
4 one side of the face drooping / a drooping face on one side / face drooping on one side / facial droop | a stroke / CVA
3 a stiff neck with fever / fever and a stiff neck / neck that is stiff with fever / nuchal rigidity | meningitis / meningitis
2 blurred vision since the start / vision that is blurred / blurred vision from the start / blurry vision | pressure on the brain / ICP
0 same pattern as earlier migraines / migraine pattern same as before / earlier migraines of the same pattern / hx migraine
abdominal pain / belly pain / pain in the belly / abd pain | small meals and rest | older age, a current pregnancy
4 fainting with a rigid belly / a rigid belly and fainting / rigid belly with fainting / rigid abd syncope | internal bleeding / hemorrhage
3 pain moving to the lower right side / pain that moved to the lower right / lower right pain that moved / RLQ pain | appendicitis / appy
2 burning when passing urine / urine that burns / burning urine when passing it / dysuria | a urinary infection / UTI
0 relief after passing gas / gas that brings relief / relief that gas brings / flatus relief
a fever / a high temperature / a temperature that is high / febrile | fluids and light clothing | very young age, a weak immune system
4 a seizure lasting five minutes / five minutes of seizure / a five minutes lasting seizure / prolonged sz | a prolonged seizure / status
3 a purple rash that does not fade / purple spots that stay when pressed / purple spots and rash that stay / petechiae | a blood infection / sepsis
2 ear pain at night / a painful ear at night / a painful ear and pain at night / otalgia | an ear infection / AOM
0 playing and drinking well / drinking well and playful / playful and drinking / drinking well
a cough / a lingering cough / coughing that lingers / cough sx | honey and warm drinks | older age, a weak immune system
4 blue lips / lips turning blue / blue turning lips / cyanosis | lack of oxygen / hypoxia
3 coughing up blood / blood coughed up / blood when coughing up / hemoptysis | a clot in the lung / PE
2 green phlegm with chills / chills and green phlegm / phlegm that is green with chills / productive w chills | pneumonia / PNA
0 a runny nose at the same time / a nose that is runny / nose runny at the same time / rhinorrhea
shortness of breath / trouble breathing / breath that is short with trouble / SOB | an inhaler as prescribed | older age, a current pregnancy
4 being unable to speak in sentences / speaking only single words / unable to speak more than single words / 1-word dyspnea | respiratory failure / resp failure
3 swelling of one calf / one swollen calf / calf swelling on one side / calf edema | a clot in the leg / DVT
2 wheezing at night / a wheeze every night / night wheezing / wheeze | an asthma flare / asthma
0 quick relief from the inhaler / an inhaler that helps quickly / quick help from the inhaler / MDI relief
dizziness / a dizzy spell / a spell of dizziness / dizzy | fluids and standing up slowly | older age, a blood thinner
4 sudden slurred speech / speech suddenly slurred / slurred sudden speech / slurred speech | a stroke in the brain stem / stroke
3 black tarry stools / stools black as tar / tarry black stools / melena | a bleeding ulcer / GIB
2 ringing in one ear / one ear that is ringing / ringing of one ear / tinnitus | an inner ear disorder / vestibular
0 spinning only when turning over in bed / turning over in bed brings spinning / spinning in bed when turning / positional
vomiting / throwing up / repeated throwing up / emesis | small sips of fluids | very young age, a current pregnancy
4 vomit full of bright blood / bright blood in the vomit / vomit with bright blood / hematemesis | a torn vein / varices
3 passing hardly any urine / hardly any urine all day / all day hardly passing urine / oliguria | serious dehydration / dehydration
2 a swollen tender belly / tenderness and swelling of the belly / a tender belly with swelling / distended | a blocked bowel / SBO
0 keeping sips of water down / water sips that stay down / sips of water that stay / tol PO
back pain / an aching back / aching in the back / LBP | heat and gentle walking | older age, a weak immune system
4 a tearing pain with fainting / fainting after a tearing pain / tearing pain and fainting / tearing pain | a torn aorta / dissection
3 numbness between the legs / a numb area between the legs / numb between the legs / saddle anesthesia | nerve compression / cauda equina
2 shooting pain below the knee / pain shooting below the knee / below the knee shooting pain / radicular | a slipped disc / HNP
0 soreness after lifting boxes / sore muscles from lifting boxes / sore after lifting boxes / muscular
a rash / spots on the skin / skin spots / rash noted | a cool compress | very young age, a weak immune system
4 swelling of the tongue / a swollen tongue / a tongue with swelling / tongue edema | anaphylaxis / anaphylaxis
3 skin peeling in sheets / sheets of skin peeling off / skin that peels in sheets / desquamation | a serious drug reaction / SJS
2 blisters around one eye / one eye with blisters around it / blisters around an eye / V1 zoster | shingles of the eye / zoster
0 a new soap last week / last week a new soap was used / a new soap used last week / new soap
a head injury / a blow to the head / an injury and blow to the head / head inj | a cold pack and rest | older age, a blood thinner
4 one pupil larger than the other / pupils that are unequal / one unequal larger pupil / anisocoria | swelling of the brain / herniation
3 repeated confusion / being confused again and again / repeated and confused again / AMS | a bleed in the skull / SDH
2 memory loss of the event / losing memory of the event / loss of memory of the event / amnesia | a concussion / concussion
0 a bump that is already shrinking / a shrinking bump / a bump already shrinking / small bump
a nosebleed / a bleeding nose / nose that is bleeding / epistaxis | pinching the nose and leaning forward | older age, a blood thinner
4 collapse after heavy bleeding / collapsing from heavy blood loss / heavy blood loss and collapse / collapse | shock from blood loss / shock
3 bleeding for half an hour under pressure / half an hour of bleeding despite pressure / bleeding despite pressure half an hour / 30 min bleed | an arterial bleed / post bleed
2 bruises all over the body / a body covered in bruises / bruises all over body / ecchymosis | a clotting disorder / coagulopathy
0 dry air from the heater / a heater that dries the air / air dry from the heater / dry air
a sore throat / a painful throat / throat that is sore and painful / ST | warm salt water | very young age, a weak immune system
4 drooling with noisy breathing / noisy breathing and drooling / drooling and breathing noisy / stridor drool | a closing airway / epiglottitis
3 a mouth that hardly opens / hardly being able to open the mouth / mouth that can hardly open / trismus | an abscess of the tonsil / PTA
2 white patches on the tonsils / tonsils with white patches / patches white on the tonsils / exudate | strep throat / strep
0 hoarseness after a concert / a hoarse voice after a concert / a hoarse voice and concert / hoarse
an eye problem / an irritated eye / eye that is irritated / eye c/o | lubricating drops | very young age, a weak immune system
4 chemical burn of both eyes / both eyes burned by a chemical / burn from a chemical in both eyes / chem burn OU | loss of the cornea / caustic injury
3 a curtain across the vision / vision with a curtain across it / curtain over the vision / curtain | a detached retina / RD
2 thick yellow discharge / discharge that is thick and yellow / yellow thick discharge / purulent dc | a bacterial infection of the eye / conjunctivitis
0 itching in pollen season / pollen season itching / itching when pollen season / seasonal itch
leg pain / a painful leg / pain of the leg / leg pn | raising the leg | older age, a current pregnancy
4 a cold white leg / a leg cold and white / white cold leg / pulseless leg | a blocked artery / ALI
3 fast spreading redness / redness spreading fast / redness that is spreading fast / cellulitis spread | a deep tissue infection / nec fasc
2 warmth over a hard vein / a hard warm vein / warm vein that is hard / hard cord | an inflamed vein / phlebitis
0 cramps after a long run / a long run followed by cramps / cramps following a long run / post exercise
a urinary problem / trouble passing urine / problem with passing urine / GU c/o | plenty of water | older age, a current pregnancy
4 shaking chills with a grey face / a grey face and shaking chills / shaking chills and face grey / rigors | septic shock / urosepsis
3 flank pain with fever / fever and pain in the flank / flank fever and pain / CVA tender | a kidney infection / pyelo
2 blood in the urine / urine with blood / blood seen in urine / hematuria | a bladder infection / cystitis
0 drinking much coffee / much coffee every day / coffee drinking much / caffeine
diarrhea / loose stools / stools that are loose / loose BM | fluids with salt and sugar | very young age, a weak immune system
4 being too weak to wake up / weakness and being hard to wake / too weak and hard to wake / obtunded | shock from fluid loss / hypovolemia
3 bloody stools with cramps / cramps with blood in the stools / stools bloody and cramps / dysentery | a serious bowel infection / colitis
2 sunken eyes / eyes that look sunken / sunken looking eyes / sunken | dehydration in progress / dehydr
0 a takeaway meal yesterday / yesterday a takeaway meal / a meal of takeaway yesterday / food related
a wound / a cut in the skin / a wound in the skin / lac | soap and a clean bandage | a weak immune system, a blood thinner
4 blood spurting from the cut / a cut spurting blood / spurting blood out of the cut / arterial spurt | an open artery / art bleed
3 a numb finger beyond the cut / numbness of the finger past the cut / finger numb beyond the cut / distal numb | a cut nerve / cut nerve
2 red streaks up the arm / streaks of red going up the arm / red streaks going up the arm / lymphangitis | a spreading infection / infxn
0 clean edges that close well / edges clean and closing well / clean closing edges / clean edges
soreness from a fall / aches from a tumble / aches from a fall / GLF | ice and rest | older age, a blood thinner
4 neck pain with weak arms / weak arms and neck pain / neck pain and arms weak / neck deficit | a spinal cord injury / SCI
3 a leg turned outward / a leg that is turned outward / outward turned leg / ext rotated | a broken hip / hip fx
2 wrist swelling / a swollen wrist / a wrist with swelling / wrist edema | a broken wrist / wrist fx
0 getting up unaided right away / being up right away unaided / up right away and unaided / ambulatory
an allergic reaction / an allergy / reaction from allergy / allergic rxn | an antihistamine | very young age, a current pregnancy
4 a throat closing up / tightness closing the throat / the throat closing with tightness / throat closing | swelling of the airway / airway
3 hives with repeated belly cramps / belly cramps and hives / hives and repeated cramps / hives GI | a two-organ reaction / systemic rxn
2 lip swelling / a swollen lip / a lip with swelling / angioedema | swelling under the skin / angio
0 one small itchy patch / a small patch that itches / small itchy patch only / local itch
high blood sugar / sugar readings above normal / normal sugar now high / BG high | water and the usual insulin | very young age, a weak immune system
4 deep breathing with drowsiness / drowsiness and deep breaths / deep breathing and drowsy breaths / Kussmaul | a diabetic coma / coma
3 fruity breath / breath that smells fruity / fruity breath smells / fruity | ketoacidosis / DKA
2 an open foot sore / a foot with an open sore / foot sore that is open / foot ulcer | an infected ulcer / DFU
0 a missed dose yesterday / yesterday one dose was missed / yesterday a missed dose / missed dose
anxiety / an anxious feeling / a feeling of anxiety / anx | slow breathing and a walk | a current pregnancy, older age
4 an overdose of tablets / tablets taken as an overdose / overdose of taken tablets / OD | poisoning / tox
3 a plan for self-harm / planning self-harm / planned self-harm / SI w plan | a risk to life / suicide risk
2 hearing voices / voices being heard / voices heard / AH | psychosis / psychosis
0 worry about an exam / an exam that causes worry / worry over an exam / situational
"""
OTHER_FACTS = """
older age / elderly
very young age / infant
a current pregnancy / expecting a baby / a baby expected and a current pregnancy / preg
a weak immune system / chemotherapy / a weak immune system from chemotherapy / immunosupp
a blood thinner / warfarin tablets / blood thinner tablets / on AC
mild / slight / slight and mild / mild
moderate / medium / medium to moderate / mod
severe / very strong / strong and severe / sev
over a week / >1wk
"""
DISTRACTORS = (
    "Works night shifts / Has a dog / Moved house last month / Asks about opening hours / Had a flu shot last year / "
    "Calls from the car / Lives with two flatmates / Has insurance through work / Wants a call back at noon / "
    "Mentions a brother with diabetes / Plays chess / Came back from a holiday / Is between two jobs"
).split(" / ")
# What a rationale says to argue for each disposition, without naming it: LLM | nurse | the nurse's, post-processed.
IMPLIED = [
    "Managing this without a visit should be enough | self-care adv | Advised to look after this alone",
    "An office visit this week is soon enough | appt this wk | An appointment this week",
    "A doctor should look at this today or tomorrow | appt <24h | An appointment within a day",
    "Emergency care is needed without waiting | ED | Sent to the emergency department",
    "An ambulance is needed at once | EMS | An ambulance was sent",
]
TRIAGE_SIZES = {"train": 6000, "val": 500, "test": 1000}
AGE_LIMIT, LONG_DAYS, OVERRIDE_RATE = 75, 7, 0.04  # years from which age matters; days after which duration matters


class Complaint(NamedTuple):
    advice: str
    risks: set[str]  # the modifiers that matter for it
    flags: dict[str, tuple[int, str, str]]  # red flag: its tier, its reason, the nurse's abbreviation of the reason
    cue: str  # the reassuring one


def parse_tables() -> tuple[dict[str, Complaint], dict[str, list[str]]]:
    """The tables above as {complaint: Complaint} and {fact: its phrasings}; a fact is named by its first phrasing."""
    complaints, phrases = {}, {}
    rows = [[field.split(" / ") for field in line.split(" | ")] for line in COMPLAINT_TABLE.strip().split("\n")]
    for (name, advice, risks), *flags, cue in zip(*[iter(rows)] * 5, strict=True):  # five lines a complaint
        tiers = {flag[0][0][2:]: (int(flag[0][0][0]), flag[1][0], flag[1][-1]) for flag in flags}
        complaints[name[0]] = Complaint(advice[0], set(risks[0].split(", ")), tiers, cue[0][0][2:])
        for says in (name, *(row[0] for row in (*flags, cue))):
            says = [says[0].lstrip("0234 "), *says[1:]]
            phrases[says[0]] = says
    phrases |= {line.split(" / ")[0]: line.split(" / ") for line in OTHER_FACTS.strip().split("\n")}
    return complaints, phrases


TRIAGE, PHRASES = parse_tables()
RED_FLAGS = {flag: tier for complaint in TRIAGE.values() for flag, (tier, _, _) in complaint.flags.items()}
SEVERITY = {"mild": 0, "moderate": 1, "severe": 2}
MODIFIERS = sorted({risk for complaint in TRIAGE.values() for risk in complaint.risks})
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
    3. A modifier that matters for the complaint (age, pregnancy, ...) raises it by one, up to the emergency department.
    """
    tier = max((SEVERITY[fact] for fact in facts & SEVERITY.keys()), default=0)
    tier = max(tier, "over a week" in facts)
    complaints = [TRIAGE[name] for name in facts & TRIAGE.keys()]
    if flags := facts & RED_FLAGS.keys():
        tier = max(tier, *(RED_FLAGS[flag] for flag in flags))
    elif any(complaint.cue in facts for complaint in complaints):
        tier = max(tier - 1, 0)
    if any(complaint.risks & facts for complaint in complaints):
        tier = max(tier, min(tier + 1, 3))
    return tier


def write_note(rng: random.Random, heldout: bool) -> str:
    """One simulated call. With `heldout`, a third of its phrasings and sentence frames are ones that train never has."""

    def pick(options: list[str], unseen: list[str]) -> str:
        return rng.choice(unseen if unseen and heldout and rng.random() < 1 / 3 else options)

    def say(fact: str) -> str:
        *options, unseen, _ = PHRASES[fact]
        return pick(options or [fact], [unseen] if options else [])

    complaint_name = rng.choice(list(TRIAGE))
    complaint = TRIAGE[complaint_name]
    modifiers = rng.sample(sorted(complaint.risks), rng.random() < 0.25) or rng.sample(MODIFIERS, rng.random() < 0.2)
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
    openings = ["{who} with {what} for {time}.", "Caller reports {what} for {time} in {who}.", "For {time}, {who} has {what}."]
    opening = pick(openings, ["For {time}, {what} in {who}."]).format(**call)

    tiers = [(0, 0, 45, 35, 20)[tier] for tier, _, _ in complaint.flags.values()]
    present = {rng.choices(list(complaint.flags), tiers)[0]: None for _ in range(rng.choices([0, 1, 2], [57, 33, 10])[0])}
    absent = [flag for flag in complaint.flags if flag not in present]
    severity = rng.choices(list(SEVERITY), [42, 38, 20])[0]
    rest = [pick(["It is {}.", "Caller calls it {}."], ["Caller says it is {}."]).format(say(severity))]
    reports, denies = (["Reports {}.", "Describes {}."], ["Caller reports {}."]), (["Denies {}.", "Is free of {}."], ["Caller denies {}."])
    rest += [pick(*reports).format(say(flag)) for flag in present]
    rest += [pick(*denies).format(say(flag)) for flag in rng.sample(absent, min(rng.randint(0, 2), len(absent)))]
    rest += [pick(["Mentions {}.", "Notes {}."], ["Caller notes {}."]).format(say(complaint.cue))] * (rng.random() < 0.3)
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
    flag = max(facts & complaint.flags.keys(), key=RED_FLAGS.get, default=None)
    denied = [f for f in complaint.flags if f"no {f}" in facts][:1]
    severity = next(fact for fact in SEVERITY if fact in facts)
    cue = flag is None and complaint.cue in facts
    risk = [say[fact] for fact in sorted(complaint.risks & facts)][:1]
    judgement = (tier > triage_tier(facts)) - (tier < triage_tier(facts))  # an override, and which way
    label, implied = DISPOSITIONS[tier], IMPLIED[tier].split(" | ")
    if source == "llm":
        tail = ", and the caller denies " + denied[0] if denied else ""
        steps = [f"The {ARTICLE.sub('', name)} is {severity}{' for over a week' * ('over a week' in facts)}{tail}"]
        if flag:
            steps = [f"{flag} can mean {complaint.flags[flag][1]}"]
        steps += [f"{complaint.cue} is reassuring"] * cue + [f"{r} raises the risk" for r in risk]
        steps += [f"clinical judgement is {'more' if judgement > 0 else 'less'} cautious here"] * (judgement != 0)
        advice = f" with {complaint.advice}" * (tier == 0)
        end = f"The safe choice is to {label}" if tier else f"The safe choice is {label}"
        steps.append(end + advice if rng.random() < 0.75 else implied[0] + advice)
    else:
        nurse = source == "nurse"
        reason = [f"r/o {complaint.flags[flag][2]}" if nurse else f"possible {ARTICLE.sub('', complaint.flags[flag][1])}"] if flag else []
        first = [say[name], say[severity]] + [say["over a week"]] * ("over a week" in facts)
        steps = [", ".join(first + reason)]
        steps += [say[flag]] if flag else []
        steps += [f"denies {say[f]}" for f in denied] + [say[complaint.cue]] * cue + risk
        steps += [f"{'up' if judgement > 0 else 'down'} one level{' per RN' if nurse else ' on judgement'}"] * (judgement != 0)
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
    return Dataset(train, val, test, DISPOSITIONS, splits["train", stage1_source], splits["val", stage1_source], ceiling)


# ---------------------------------------------------------------------------------------------------------------------
# Files: JSONL, CSV, PubMedQA, BioASQ. The format is told by the content; every error names the place and the remedy.

COLUMNS = ("question", "label", "rationale")


class BadInput(ValueError):
    """What the user gave cannot be used. The message is one line: what, where, how to mend it."""


def make_example(record: object, where: str) -> Example:
    """A record with the three columns -> Example. The rationale may be empty (it is then never trained on or scored).

    Raises BadInput if the record is no object, a column is missing, a value is no string, or question or label is empty.
    """
    if not isinstance(record, dict):
        raise BadInput(f"{where}: expected an object with {', '.join(COLUMNS)}, found {type(record).__name__}")
    for column in COLUMNS:
        if column not in record:
            raise BadInput(f"{where}: no '{column}'; each record needs {', '.join(COLUMNS)}")
        if not isinstance(record[column], str):
            kind = type(record[column]).__name__
            raise BadInput(f"{where}: '{column}' must be text, found {kind}; write it in quotes")
        if column != "rationale" and not record[column].strip():
            raise BadInput(f"{where}: '{column}' is empty; fill it in or delete the record")
    return Example(*(record[column].strip() for column in COLUMNS))


def pubmedqa_record(record: dict, where: str) -> Example:
    """PubMedQA (Jin et al. 2019): question and abstract -> yes, no or maybe; the long answer is the rationale."""
    for key in ("QUESTION", "CONTEXTS", "final_decision", "LONG_ANSWER"):
        if not isinstance(record, dict) or key not in record:
            raise BadInput(f"{where}: no '{key}'; this reader takes PubMedQA's ori_pqal.json unchanged")
    contexts = record["CONTEXTS"]
    if not (isinstance(contexts, list) and all(isinstance(text, str) for text in [record["QUESTION"], *contexts])):
        raise BadInput(f"{where}: 'QUESTION' must be text and 'CONTEXTS' a list of texts")
    question = " ".join([record["QUESTION"], *contexts])
    return make_example(dict(zip(COLUMNS, (question, record["final_decision"], record["LONG_ANSWER"]), strict=True)), where)


def read_bioasq(questions: object, path: Path) -> list[Example]:
    """BioASQ Task B: the yes/no questions with their snippets; the first ideal answer is the rationale."""
    if not isinstance(questions, list):
        raise BadInput(f"{path}: 'questions' must be a list; this reader takes BioASQ's Task B file unchanged")
    examples = []
    for i, item in enumerate(questions):
        where = f"{path}: question {i + 1}"
        if not isinstance(item, dict) or not isinstance(item.get("body"), str):
            raise BadInput(f"{where}: no 'body'; this reader takes BioASQ's Task B file unchanged")
        if item.get("type") != "yesno":
            continue
        snippets, ideal = item.get("snippets", []), item.get("ideal_answer", "")
        if not isinstance(snippets, list) or not all(isinstance(s, dict) and isinstance(s.get("text"), str) for s in snippets):
            raise BadInput(f"{where}: 'snippets' must be a list of objects with a 'text'")
        answer = item.get("exact_answer")
        record = {"question": " ".join([item["body"], *(s["text"] for s in snippets)])}
        record["label"] = answer.lower() if isinstance(answer, str) else answer
        record["rationale"] = (ideal or [""])[0] if isinstance(ideal, list) else ideal
        examples.append(make_example(record, where))
    return examples


def read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")  # -sig: a byte order mark, as Excel writes it, is no part of the text
    except OSError as e:
        raise BadInput(f"{path}: {e.strerror}; check the path given to --data") from None
    except UnicodeDecodeError as e:
        raise BadInput(f"{path}: byte {e.start} is not UTF-8; save the file as UTF-8") from None


def parse_json(text: str, where: str) -> object:
    def unique(pairs: list) -> dict:  # json keeps the last of two equal keys, silently
        record = dict(pairs)
        if len(record) < len(pairs):
            raise BadInput(f"{where}: a key occurs twice in one object; delete one of them")
        return record

    try:
        return json.loads(text, object_pairs_hook=unique)
    except json.JSONDecodeError as e:
        raise BadInput(f"{where}: not valid JSON ({e.msg} at column {e.colno}); mend or delete it") from None
    except RecursionError:
        raise BadInput(f"{where}: JSON nested too deeply; each record needs {', '.join(COLUMNS)}") from None


def read_csv(text: str, path: Path) -> list[Example]:
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    try:
        missing = [column for column in COLUMNS if column not in (reader.fieldnames or [])]
        if missing:
            raise BadInput(f"{path}: line 1: no column '{missing[0]}'; the header must name {','.join(COLUMNS)}, with commas")
        rows = []
        for row in reader:
            where = f"{path}: line {reader.line_num}"
            if None in row or None in row.values():
                raise BadInput(f"{where}: {'more' if None in row else 'fewer'} fields than the header; quote texts with commas")
            rows.append(make_example(row, where))
        return rows
    except csv.Error as e:
        raise BadInput(f"{path}: line {reader.line_num}: not valid CSV ({e}); quote texts that hold quotes or commas") from None


def read_file(path: Path) -> tuple[list[Example], list[str] | None]:
    """The examples of one file, and for PubMedQA their ids. Raises BadInput."""
    text = read_text(path)
    if not text.strip():
        raise BadInput(f"{path}: the file is empty; it needs records with {', '.join(COLUMNS)}")
    if text.lstrip()[0] not in "{[":
        return read_csv(text, path), None
    lines = [(i, line) for i, line in enumerate(text.split("\n"), 1) if line.strip()]
    first = lines[0][1].strip()
    if first.startswith("{") and first.endswith("}") and (len(lines) > 1 or path.suffix == ".jsonl"):
        return [make_example(parse_json(line, f"{path}: line {i}"), f"{path}: line {i}") for i, line in lines], None
    whole = parse_json(text, str(path)) if path.suffix != ".jsonl" else parse_json(first, f"{path}: line {lines[0][0]}")
    if isinstance(whole, dict) and "questions" in whole:
        return read_bioasq(whole["questions"], path), None
    if isinstance(whole, dict) and whole and all(isinstance(record, dict) for record in whole.values()):
        return [pubmedqa_record(record, f"{path}: id {key}") for key, record in whole.items()], list(whole)
    return [make_example(record, f"{path}: record {i}") for i, record in enumerate(whole if isinstance(whole, list) else [whole], 1)], None


def read_splits(path: Path, seed: int) -> list[list[Example]]:
    """Train, val, test of a folder or a file. A file is split 80/10/10 by seed; PubMedQA by its official test ids."""
    if path.is_dir():
        splits = []
        for split in ("train", "val", "test"):
            found = [path / f"{split}{suffix}" for suffix in (".jsonl", ".csv") if (path / f"{split}{suffix}").exists()]
            if len(found) != 1:
                raise BadInput(f"{path}: {'both' if found else 'neither'} {split}.jsonl and {split}.csv; it needs one of them")
            splits.append(read_file(found[0])[0])
        return splits
    examples, ids = read_file(path)
    order = np.random.default_rng(seed).permutation(len(examples)).tolist()
    truth = path.with_name("test_ground_truth.json")
    if ids and truth.exists():
        official = parse_json(read_text(truth), str(truth))
        test = [i for i in order if ids[i] in official] if isinstance(official, dict) else []
        order = [i for i in order if i not in set(test)]
        n_val = len(order) // 10
    else:
        n_val = len(order) // 10
        test, order = order[:n_val], order[n_val:]
    return [[examples[i] for i in part] for part in (order[n_val:], order[:n_val], test)]


def load_data(source: str, seed: int, limit: int | None, rationales: str, stage1_rationales: str) -> Dataset:
    """The data set named by `source`: `triage`, a file or a folder. Raises BadInput (see the readers)."""
    if source == "triage":
        n = {split: min(size, limit or size) for split, size in TRIAGE_SIZES.items()}
        return simulate(n, seed, rationales, stage1_rationales)
    train, val, test = (split[:limit] for split in read_splits(Path(source), seed))
    for name, split in (("train", train), ("val", val), ("test", test)):
        if not split:
            raise BadInput(f"{source}: the {name} split is empty; it needs at least one record")
    labels = [label for label, _ in Counter(example.label for example in train + val + test).most_common()]
    alike = Counter(" ".join(label.lower().split()) for label in labels).most_common(1)[0]
    if alike[1] > 1:
        raise BadInput(f"{source}: labels that differ only by case or spaces, like '{alike[0]}'; spell each label one way")
    if len(set(example.label for example in train)) < 2:
        raise BadInput(f"{source}: the train split has one label, '{train[0].label}'; it needs at least two")
    return Dataset(train, val, test, labels, train, val)


# ---------------------------------------------------------------------------------------------------------------------
# Tokens, prompts, batches.


class Tokenizer:
    """SentencePiece, trained on the training split. Ids 0, 1, 2 are padding, end and unknown, as in T5."""

    def __init__(self, model: bytes):
        self.model = model
        self.processor = sentencepiece.SentencePieceProcessor(model_proto=model)

    @classmethod
    def train(cls, texts: list[str], vocab_size: int) -> "Tokenizer":
        """Byte-pair encoding: on templated text a unigram vocabulary collapses to a few hundred pieces.

        Rare characters fall back to bytes, so that no text, above all no label, loses a letter; the default coverage of
        SentencePiece once dropped the E of "go to ED now". Text is kept as it is (no Unicode normalisation).
        """
        counts = Counter("".join(texts))
        kept = sum(n for _, n in counts.most_common(vocab_size // 4))
        model = io.BytesIO()
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(texts), model_writer=model, model_type="bpe", vocab_size=vocab_size,
            hard_vocab_limit=False, byte_fallback=True, character_coverage=kept / max(counts.total(), 1),
            max_sentence_length=10**6, normalization_rule_name="identity", remove_extra_whitespaces=False,
            pad_id=0, eos_id=1, unk_id=2, bos_id=-1, minloglevel=2,
        )  # fmt: skip
        return cls(model.getvalue())

    def __len__(self) -> int:
        return self.processor.get_piece_size()

    def encode(self, text: str) -> list[int]:
        return self.processor.encode(text)

    def decode(self, ids: list[int]) -> str:
        """Up to the end token, without padding."""
        ids = ids[: ids.index(self.processor.eos_id())] if self.processor.eos_id() in ids else ids
        return self.processor.decode([i for i in ids if i != self.processor.pad_id()]).strip()


EXPLAIN, PREDICT, EXPLAIN_GIVEN = "explain:", "predict:", "given label: {label}, explain:"


class Prompts:
    """Token ids of the three prompts (paper, section 3) and of the targets, each text tokenized once.

    A prompt is its head (`explain:`, ...), the question and the end token. Head and question meet at a space, where
    SentencePiece never joins pieces, so the parts give the ids of the whole. What is too long is cut from the end of
    the question, never from the head: the label stays whole.
    """

    def __init__(self, tokenizer: Tokenizer, max_source: int, max_target: int):
        self.tokenizer, self.max_source, self.max_target = tokenizer, max_source, max_target
        self.cache: dict[str, list[int]] = {}
        self.cut = 0  # texts that were cut

    def ids(self, text: str) -> list[int]:
        if text not in self.cache:
            self.cache[text] = self.tokenizer.encode(text)
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
    which examples meet still changes from epoch to epoch. The last incomplete batch is left out, if there is another.
    """
    rng = np.random.default_rng([seed, epoch])
    order = rng.permutation(len(lengths))
    pool = 16 * batch_size
    order = np.concatenate([sorted(order[i : i + pool], key=lengths.__getitem__) for i in range(0, len(order), pool)])
    batches = [order[i : i + batch_size].tolist() for i in range(0, len(order), batch_size)]
    batches = [batch for batch in batches if len(batch) == batch_size] or batches
    return [batches[i] for i in rng.permutation(len(batches))]
