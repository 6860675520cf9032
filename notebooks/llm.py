"""Let a language model grade the rationales of a run, or label and explain the test notes itself.

    python notebooks/llm.py judge RUN --url http://localhost:8000/v1 --model NAME
    python notebooks/llm.py zeroshot --out DIR --url ... --model NAME [--data ... as of r2d.py]

R2D_API_KEY in the environment is the endpoint's key. answers.jsonl keeps what was paid for."""

import json
import os
import re
import sys
import unicodedata
from argparse import SUPPRESS, ArgumentParser, Namespace, RawTextHelpFormatter
from contextlib import suppress
from pathlib import Path

import numpy as np
import openai
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import metrics
import r2d
from data import InputError, load_data, normalized, reading, write_file

GRADES = ["supports", "grounded", "agrees"]
JUDGE = """Note: {question}\nLabel: {}\nExplanation: {}\nReference: {rationale}\n
Grade the explanation from 1 (not at all) to 5 (fully): does it argue for the label, is it true to
the note, does it give the reference's reasons? Answer with three digits alone, such as 2 4 3"""
ZERO_SHOT = """Text: {question}\n\nLabels:\n{labels}\n
Write the right label, just as it stands there, on the first line, and your reason on the next."""

# In replies: thoughts, also without their first or last tag, and marks
NOISE = r"""(?isx) [<[]think\w*[]>] .*? (?: [<[]/think\w*[]>] | \Z )
    | \A (?: (?! [<[]think ) . )* [<[]/think\w*[]>]
    | </? (?: answer | label | reason | rationale ) > | \*\* | ` """
# A label that begins its line, but for marks and words such as "Label:" or "the answer is", and
# that ends it, or comes before a stop or "because", though not before other labels alone
ANSWER = r"""(?imx)
    ^ (?: .{0,99}? \b (?: label | answer | class\w* | category | choice | decision | diagnosis
          | disposition | prediction | verdict ) \b .{0,30}? (?: [:=>–-] | \bis\b ) )??
    (?: [^\w\n] | _ | \d[.)][ ] )*?  # marks, an item's number
    (?P<label> LABELS ) (?! -?[^\W_] | [.,]\d | (?: [^\w\n]+ (?:LABELS) )+ [^\w\n]* $ )
    (?: (?P<alone> [^\w\n?+#%]* _* $ ) | (?= _* \s* (?: [^\w\s?+#%] | because\b ) ) )"""
# What comes before a reason: marks, and its name
LEAD = r"""(?ix) ^ (?: [^\w(<>+-] | _ | [->]+\s | \d[.)]\s )*
    (?: (?:\w+[ ])? (?: reason | reasoning | rationale | explanation | justification | why )
        [^\w\n]* [:\n-] ["\s]* )?"""


def read_answer(reply: str, labels: list[str]) -> tuple[str, str]:
    """Label and reason. A reply with no label, or with several, stays whole, without a reason."""
    text = unicodedata.normalize("NFC", re.sub(NOISE, " ", reply)).strip()
    longest_first = sorted(labels, key=len, reverse=True)  # else "not urgent" is read as "urgent"
    names = "|".join(map(re.escape, longest_first)).replace(r"\ ", r"\s+")
    pattern = ANSWER.replace("LABELS", unicodedata.normalize("NFC", names))
    found = list(re.finditer(pattern, text))
    alone = [match for match in found if match["alone"] is not None]
    answers = alone or found  # a line with the reason in it counts less
    named = {normalized(match["label"]) for match in answers}
    known = [label for label in labels if normalized(label) in named]
    if len(known) != 1:
        return text, ""
    after = re.sub(LEAD, "", text[answers[0].end() :])
    before = re.sub(LEAD, "", text[: answers[0].start()])
    return known[0], (after or before).rstrip("\n \"'”_}],")


def read_grades(reply: str) -> list[int]:
    """The three grades: the only numbers of a reply or of a line. Empty if that is unclear."""
    text = re.sub(NOISE + r"| /[ ]?5\b | \bof[ ]5\b | [(]1-5[)] | \.0\b", " ", reply)
    text = re.sub(r"(?m)^[^\w\n]*\d[.)] (?=[^\d\n]*\d[^\d\n]*$)", "", text)  # an item's number
    found = set()
    for part in [text, *text.split("\n")]:
        numbers = " ".join(re.findall(r"(?<!\d)-?\d+(?:\.\d+)?", part))
        if re.fullmatch("[1-5] [1-5] [1-5]", numbers):
            found.add(numbers)
    return [int(grade) for grade in found.pop().split()] if len(found) == 1 else []


def warn(what: str, n_bad: int, n: int) -> None:
    """Say how many replies could not be read, loudly if none could."""
    if n_bad:
        loud = "warning" if n_bad < n else "WARNING, NOTHING TO SCORE"
        unread = f"{n_bad} of {n} replies could not be read as {what}; see answers.jsonl"
        print(f"llm.py: {loud}: {unread}", file=sys.stderr)


def ask(args: Namespace, folder: Path, prompts: list[str]) -> list[str]:
    """The answers: those in the folder's answers.jsonl and, kept there at once, the endpoint's."""
    path = folder / "answers.jsonl"
    path.touch()
    answers = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        with suppress(ValueError, TypeError):  # a line cut when the command was stopped
            model, prompt, answer = json.loads(line)
            if model == args.model and answer:
                answers[prompt] = answer
    key = os.environ.get("R2D_API_KEY") or "R2D_API_KEY"  # not empty: it is replaced below
    try:
        chat = openai.OpenAI(base_url=args.url, api_key=key, timeout=120, max_retries=4).chat
        for prompt in tqdm(sorted(set(prompts) - set(answers)), disable=None):
            messages = [{"role": "user", "content": prompt}]
            # No temperature: newer models refuse 0, and thinking ones may repeat themselves at 0.
            choices = chat.completions.create(model=args.model, messages=messages).choices
            with suppress(AttributeError, IndexError, TypeError):  # no text: asked next time
                content = choices[0].message.content
                if isinstance(content, list):
                    content = "".join([part.get("text", "") for part in content])
                answers[prompt] = content.strip().replace(key, "(key)")
                line = json.dumps([args.model, prompt, answers[prompt]])
                with open(path, "a", encoding="utf-8") as file:  # its last line may be cut
                    file.write("\n" + line)
    except Exception as e:  # of a dozen types; the server's words may quote the key
        said = str(getattr(e, "body", None) or e).replace(key, "(key)")[:300]
        problem = f"{type(e).__name__}: {said}; check --url, --model and R2D_API_KEY"
        raise InputError(problem) from None
    return [answers.get(prompt, "") for prompt in prompts]


def judge(args: Namespace, run: Path) -> None:
    """Mean grades of the rationales under each label: judge.json."""
    path = run / "predictions.jsonl"
    prompts = {"gold": [], "predicted": [], "flipped": []}
    with reading(path), open(path, encoding="utf-8") as file:
        for line in file:
            row = json.loads(line)
            for condition, asked in prompts.items():
                text = row.get(f"rationale_given_{condition}")
                if text is not None and row["rationale"]:
                    asked.append(JUDGE.format(row[metrics.LABEL_KEYS[condition]], text, **row))
    if not any(prompts.values()):
        raise InputError(f"{path}: there are no rationales to grade")
    result = {"model": args.model}
    for condition, asked in prompts.items():
        answers = ask(args, run, asked)
        valid = [grades for grades in map(read_grades, answers) if grades]
        malformed = len(answers) - len(valid)
        result[condition] = {"n": len(valid), "malformed": malformed}
        warn(f"grades ({condition})", malformed, len(answers))
        if valid:
            for name, grades in zip(GRADES, np.array(valid).T, strict=True):
                result[condition] |= metrics.bootstrap(name, np.mean, grades)
        print(condition, result[condition])
    write_file(run / "judge.json", json.dumps(result, indent=2).encode())


def zeroshot(args: Namespace, o: Namespace) -> None:
    """Label and explain the test notes chosen by `o`, options of r2d.py: the files of a run."""
    if (o.out / "config.json").exists():
        raise InputError(f"{o.out}: holds a run of r2d.py; give another --out")
    dataset = load_data(o)
    labels = "\n".join(dataset.labels)
    prompts = [ZERO_SHOT.format(labels=labels, **vars(example)) for example in dataset.test]
    o.out.mkdir(parents=True, exist_ok=True)
    answers = ask(args, o.out, prompts)
    rows = []
    for example, answer in zip(dataset.test, answers, strict=True):
        label, text = read_answer(answer, dataset.labels)
        rows.append({**vars(example), "predicted_label": label, "rationale_given_predicted": text})
    n_invalid = sum(row["predicted_label"] not in dataset.labels for row in rows)
    warn("labels", n_invalid, len(rows))
    r2d.add_verdicts(Namespace(options=o, dataset=dataset), rows)
    result = {"method": "zeroshot", "data": o.data, "seed": o.seed}
    result.update(metrics.score(rows, dataset.labels))
    write_file(o.out / "predictions.jsonl", "\n".join(map(json.dumps, rows)).encode())
    write_file(o.out / "metrics.json", json.dumps(result, indent=2).encode())
    print(metrics.table(result))


def main(arguments: list[str] | None = None) -> int:
    """The exit status: 0 done, 2 bad input or no answer, 130 stopped by Ctrl-C."""
    parser = ArgumentParser("llm.py", SUPPRESS, __doc__, formatter_class=RawTextHelpFormatter)
    parser.add_argument("command", choices=["judge", "zeroshot"])
    parser.add_argument("--url", required=True)
    parser.add_argument("--model", required=True)
    args, further = parser.parse_known_args(arguments)
    try:
        if args.command == "judge":
            judge(args, r2d.parse_args(["--out", *further]).out)  # RUN is its --out
        else:
            zeroshot(args, r2d.parse_args(further))
    except (InputError, OSError) as error:
        print(f"llm.py: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130  # the same command goes on
    return 0


if __name__ == "__main__":
    sys.exit(main())
