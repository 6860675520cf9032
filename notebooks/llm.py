"""Let a language model grade the rationales of a run, or label and explain the test notes itself.

    python notebooks/llm.py judge RUN --url http://localhost:8000/v1 --model NAME
    python notebooks/llm.py zeroshot --out DIR --url ... --model NAME [--data ... as of r2d.py]

R2D_API_KEY in the environment is the endpoint's key. answers.jsonl keeps what was paid for."""

import json
import os
import re
import sys
from argparse import SUPPRESS, ArgumentParser, Namespace, RawTextHelpFormatter
from contextlib import suppress
from pathlib import Path

import numpy as np
import openai
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import metrics
import r2d
from data import InputError, load_data, reading, write_file

GRADES = ["supports", "grounded", "agrees"]
JUDGE = """Note: {question}\nLabel: {}\nExplanation: {}\nReference: {rationale}\n
Grade the explanation from 1 (not at all) to 5 (fully): does it argue for the label, is it true to
the note, does it give the reference's reasons? Answer with three digits alone, such as 2 4 3"""
ZERO_SHOT = """Text: {question}\nLabels: {labels}\n
Write the right label, just as it stands there, on the first line, and your reason on the next."""


def ask(args: Namespace, folder: Path, prompts: list[str]) -> list[str]:
    """The answers: those in the folder's answers.jsonl and, kept there at once, the endpoint's."""
    path = folder / "answers.jsonl"
    path.touch()
    answers = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        with suppress(ValueError):  # a line cut when the command was stopped
            model, prompt, answer = json.loads(line)
            if model == args.model:
                answers[prompt] = answer
    key = os.environ.get("R2D_API_KEY") or "R2D_API_KEY"  # not empty: it is replaced below
    try:
        chat = openai.OpenAI(base_url=args.url, api_key=key, timeout=120, max_retries=4).chat
        for prompt in tqdm(sorted(set(prompts) - set(answers)), disable=None):
            messages = [{"role": "user", "content": prompt}]
            reply = chat.completions.create(model=args.model, messages=messages, temperature=0)
            answer = reply.choices[0].message.content.strip().replace(key, "(key)")
            with open(path, "a", encoding="utf-8") as file:  # its last line may be cut
                file.write("\n" + json.dumps([args.model, prompt, answer]))
            answers[prompt] = answer
    except Exception as e:  # of a dozen types; its text may quote the key
        raise InputError(f"{type(e).__name__}: check --url, --model and R2D_API_KEY") from None
    return [answers[prompt] for prompt in prompts]


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
                    asked.append(JUDGE.format(row[metrics.CONDITIONS[condition]], text, **row))
    if not any(prompts.values()):
        raise InputError(f"{path}: there are no rationales to grade")
    result = {"model": args.model}
    for condition, asked in prompts.items():
        answers = ask(args, run, asked)
        valid = [answer.split() for answer in answers if re.fullmatch("[1-5] [1-5] [1-5]", answer)]
        result[condition] = {"n": len(valid), "malformed": len(answers) - len(valid)}
        if valid:
            for name, grades in zip(GRADES, np.array(valid, dtype=int).T, strict=True):
                result[condition] |= metrics.bootstrap(name, np.mean, grades)
        print(condition, result[condition])
    write_file(run / "judge.json", json.dumps(result, indent=2).encode())


def zeroshot(args: Namespace, o: Namespace) -> None:
    """Label and explain the test notes chosen by `o`, options of r2d.py: the files of a run."""
    if (o.out / "config.json").exists():
        raise InputError(f"{o.out}: holds a run of r2d.py; give another --out")
    dataset = load_data(o.data, o.seed, o.limit, o.notes, o.override, o.rationales, "llm")
    prompts = [ZERO_SHOT.format(labels=dataset.labels, **vars(e)) for e in dataset.test]
    o.out.mkdir(parents=True, exist_ok=True)
    answers = ask(args, o.out, prompts)
    rows = []
    for example, answer in zip(dataset.test, answers, strict=True):
        label, _, text = map(str.strip, answer.partition("\n"))
        row = {**vars(example), "predicted_label": label, "rationale_given_predicted": text}
        rows.append(row)
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
