"""Ask a language model: to grade the rationales of a run, or to explain the test notes untrained.

    python notebooks/llm.py judge RUN --url http://localhost:8000/v1 --model NAME
    python notebooks/llm.py zeroshot --out DIR --url http://localhost:8000/v1 --model NAME

Any OpenAI-compatible endpoint will do; the environment variable R2D_API_KEY holds its key.
Answers are kept in answers.jsonl in the run's folder: the same command pays for none twice.
"""

import argparse
import json
import os
import re
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Lock

import numpy as np
import openai
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import metrics
import r2d
from data import InputError, load_data

RETRIES = 4  # after a time-out, 429 or 5xx; the client waits longer each time
JUDGE = """You judge an explanation. Give three grades from 1 (not at all) to 5 (fully):
supports: the explanation argues for the label it was given
grounded: all that the explanation states stands in the note
agrees: the explanation gives the same reasons as the reference
Answer with JSON alone: {{"supports": 1-5, "grounded": 1-5, "agrees": 1-5}}

Note: {question}
Label given: {given}
Explanation: {text}
Reference: {rationale}"""
GRADES = ["supports", "grounded", "agrees"]
ZERO_SHOT = """\
Read the text, choose one label for it, and explain your choice in one to three sentences.
Labels: {labels}
Answer with JSON alone: {{"label": "one of the labels", "rationale": "your explanation"}}

Text: {question}"""


def ask(client: openai.OpenAI, model: str, prompt: str) -> str:
    """One answer. InputError if none comes; it never quotes the endpoint, which knows the key."""
    messages = [{"role": "user", "content": prompt}]
    try:
        reply = client.chat.completions.create(model=model, messages=messages, temperature=0)
        answer = reply.choices[0].message.content.strip()
    except (openai.OpenAIError, AttributeError, LookupError, TypeError, ValueError) as error:
        problem = f"no usable answer from {client.base_url} ({type(error).__name__})"
        remedy = "check --url, --model and R2D_API_KEY, then give the same command again"
        raise InputError(f"{problem}; {remedy}: the answers so far are kept") from None
    if len(client.api_key) >= 8:  # no key is shorter, words are
        answer = answer.replace(client.api_key, "(key)")
    return answer


def ask_all(args: argparse.Namespace, folder: Path, prompts: list[str]) -> dict[str, str]:
    """{prompt: answer}. Each answer is in the folder's answers.jsonl before it is used."""
    if not re.fullmatch(r"https?://[\w.-]+(:\d+)?(/[\w./-]*)?", args.url):
        raise InputError("--url: not an endpoint like http://localhost:8000/v1 (no key in it)")
    client = openai.OpenAI(
        base_url=args.url,
        api_key=os.environ.get("R2D_API_KEY", "").strip() or "none",
        timeout=args.timeout,
        max_retries=RETRIES,
        http_client=openai.DefaultHttpxClient(follow_redirects=False),  # the key stays with --url
    )
    path = folder / "answers.jsonl"
    answers = {}
    if path.exists():
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                model, prompt, answer = json.loads(line)
            except ValueError:  # an empty line, or one cut when the command was killed
                continue
            if model == args.model:
                answers[prompt] = answer
    lock = Lock()

    def ask_and_keep(prompt: str) -> None:
        answer = ask(client, args.model, prompt)
        line = json.dumps([args.model, prompt, answer])
        with lock, open(path, "a", encoding="utf-8") as file:
            file.write("\n" + line)  # in front, since the line before may be cut
        answers[prompt] = answer

    missing = sorted(set(prompts) - set(answers))
    folder.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(8) as pool:  # eight requests at a time
        list(tqdm(pool.map(ask_and_keep, missing), total=len(missing), disable=None))
    return answers


def json_answer(answer: str) -> dict:
    """The JSON object in an answer, also within a sentence or a ```json block; else {}."""
    start = answer.find("{")
    end = answer.rfind("}") + 1
    try:
        return json.loads(answer[start:end])
    except (ValueError, RecursionError):  # no braces, no JSON, too deep
        return {}


def judge_scores(answers: list[str]) -> dict:
    """Mean grades with intervals. A malformed answer is counted, and enters no mean."""
    valid = []
    malformed = []
    for answer in answers:
        found = json_answer(answer)
        grades = [found.get(name) for name in GRADES]
        is_valid = all(type(grade) is int and 1 <= grade <= 5 for grade in grades)
        malformed.append(not is_valid)
        if is_valid:
            valid.append(grades)
    scores = {"n": len(answers)} | metrics.share("malformed", malformed)
    if valid:
        for name, grades in zip(GRADES, np.array(valid).T, strict=True):
            scores |= metrics.bootstrap(name, np.mean, grades)
    return scores


def judge(args: argparse.Namespace) -> None:
    """Grade the rationales of a run under each label: judge.json."""
    path = args.run / "predictions.jsonl"
    prompts = {"gold": [], "predicted": [], "flipped": []}
    try:
        for line in path.read_text(encoding="utf-8").rstrip("\n").split("\n"):
            row = json.loads(line)
            for condition, asked in prompts.items():
                text = row.get(f"rationale_given_{condition}")
                if text is not None and row["rationale"]:
                    given = row[metrics.CONDITIONS[condition]]
                    asked.append(JUDGE.format(given=given, text=text, **row))
    except (OSError, AttributeError, LookupError, ValueError) as error:
        raise InputError(f"{path}: not of a finished run ({type(error).__name__})") from None
    if not any(prompts.values()):
        raise InputError(f"{path}: there are no rationales to grade")
    answers = ask_all(args, args.run, prompts["gold"] + prompts["predicted"] + prompts["flipped"])
    result = {"model": args.model}
    print("given label         n     supports     grounded       agrees    malformed")
    for condition, asked in prompts.items():
        if asked:
            result[condition] = judge_scores([answers[prompt] for prompt in asked])
            print(metrics.line(condition, result[condition], [*GRADES, "malformed"]))
    r2d.write_file(args.run / "judge.json", json.dumps(result, indent=2).encode())


def zeroshot(args: argparse.Namespace, o: argparse.Namespace) -> None:
    """Label and rationale of every test note, with the files of a run. `o` are r2d.py's options."""
    if (o.out / "config.json").exists():
        raise InputError(f"{o.out}: holds a run of r2d.py; give another --out")
    voices = (o.rationales, o.stage1_rationales)
    dataset = load_data(o.data, o.seed, o.limit, o.notes, o.override, *voices)
    train_labels = Counter(example.label for example in dataset.train)
    names = {label.lower(): label for label in dataset.labels}
    labels = json.dumps(dataset.labels, ensure_ascii=False)
    prompts = [ZERO_SHOT.format(labels=labels, question=e.question) for e in dataset.test]
    answers = ask_all(args, o.out, prompts)
    rows = []
    for i, example in enumerate(dataset.test):
        answer = answers[prompts[i]]
        found = json_answer(answer)
        label = str(found.get("label") or answer).strip()
        row = dict(vars(example))
        row["predicted_label"] = names.get(label.lower(), label)
        row["majority_label"] = train_labels.most_common(1)[0][0]
        row["rationale_given_predicted"] = str(found.get("rationale") or "").strip()
        if dataset.ceiling:  # triage
            row["ceiling_label"] = dataset.ceiling[i].label
            row["rationale_given_ceiling"] = dataset.ceiling[i].rationale
            row["rationale_given_ceiling_gold"] = dataset.ceiling_gold[i].rationale
        rows.append(row)
    run = argparse.Namespace(options=o, dataset=dataset)  # an r2d.Run without a model
    r2d.add_verdicts(run, rows)
    result = {"method": "zeroshot", "data": o.data, "seed": o.seed, "updates": 0}
    result.update(metrics.score(rows, dataset.labels))
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    text = "".join(lines).encode(errors="replace")  # models may say half characters
    r2d.write_file(o.out / "predictions.jsonl", text)
    r2d.write_file(o.out / "metrics.json", json.dumps(result, indent=2).encode())
    print(metrics.table(result))


def main(arguments: list[str] | None = None) -> int:
    """The exit status: 0 done, 2 bad input or no answer. Ctrl-C ends the program with 130:

    the first one after the open requests, which are paid for, a second one at once.
    """
    endpoint = argparse.ArgumentParser(add_help=False)
    endpoint.add_argument("--url", required=True, help="such as http://localhost:8000/v1")
    endpoint.add_argument("--model", required=True, help="its name there")
    endpoint.add_argument("--timeout", type=float, default=60, help="seconds to wait for an answer")
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("llm.py", description=__doc__, formatter_class=style)
    commands = parser.add_subparsers(dest="command", required=True)
    judging = commands.add_parser("judge", parents=[endpoint])
    judging.add_argument("run", type=Path, metavar="RUN", help="folder of a finished run")
    more = "further options: --out DIR, and those of r2d.py that choose the data"
    commands.add_parser("zeroshot", parents=[endpoint], epilog=more)
    args, further = parser.parse_known_args(arguments)
    if further and args.command == "judge":
        parser.error(f"judge: no such option: {further[0]}")
    try:
        if args.command == "judge":
            judge(args)
        else:
            zeroshot(args, r2d.parse_args(further))
    except (InputError, OSError) as error:
        print(f"llm.py: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nllm.py: stopped; the same command goes on", file=sys.stderr)
        os._exit(130)  # sys.exit would wait for open requests
    return 0


if __name__ == "__main__":
    sys.exit(main())
