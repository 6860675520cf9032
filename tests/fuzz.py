"""Feeds damaged files to the readers of data.py:  python tests/fuzz.py --n 100000 --seed 0

Every input must end in examples or an InputError of one line, else it is saved and the status is 1.
"""

import argparse
import contextlib
import json
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import data

RECORDS, PUBMEDQA, BIOASQ = [], {}, []
for i in range(12):
    label = ["yes", "no"][i % 2]
    RECORDS.append({"question": f"é{i} \U0001f912", "label": label, "rationale": 'a "b"'})
    PUBMEDQA[i] = {"QUESTION": "q", "CONTEXTS": ["c"], "final_decision": label, "LONG_ANSWER": "a"}
    BIOASQ.append({"type": "yesno", "body": f"q{i}", "exact_answer": label, "ideal_answer": ["a"]})
    BIOASQ[i]["snippets"] = [{"text": "s"}]
LINES = "\n".join(json.dumps(record, ensure_ascii=False) for record in RECORDS)
ROWS = "".join('"{question}",{label},"a ""b"""\n'.format(**record) for record in RECORDS)
OFFICIAL = "official/test_ground_truth.json"
SEEDS = {  # the file that is damaged: good content; what --data names is in SOURCES
    "input.jsonl": LINES.encode(),
    "input.csv": ("question,label,rationale\n" + ROWS).encode(),
    "pubmedqa.json": json.dumps(PUBMEDQA).encode(),
    "bioasq.json": json.dumps({"questions": BIOASQ}).encode(),
    "folder/val.jsonl": LINES.encode(),
    OFFICIAL: json.dumps({"1": "yes", "2": "no"}).encode(),
}
SOURCES = {"folder/val.jsonl": "folder", OFFICIAL: "official/ori_pqal.json"}
TOKENS = r'" "" { } [ ] : , \ \n \ud800 \u0000 NaN -Infinity null true 1e999 # {} [] """"'.split()
TOKENS += r'"questions" "question": "label":"a", "type":"yesno" "a\nb":{}, QUESTION'.split()
TOKENS += ["\0", "\ufeff", "\r", "\n", "\r\n", "\t", " ", "\u2028", "\x85", "\x1c", "\U0001f912"]
TOKENS += ["9" * 400, "9" * 5000, "[" * 100_000, '{"a":' * 5000, "question,label,rationale\n"]
TOKENS = [token.encode() for token in TOKENS] + [b"\xed\xa0\x80", b"\xff", b"\xc3"]


def mutate(rng: random.Random, content: bytes) -> bytes:
    """One to four changes: bits, cuts, copies, tokens, pieces of other formats, encodings."""
    for _ in range(rng.choice([1, 1, 1, 1, 2, 4])):
        start = rng.randrange(len(content) + 1)
        end = min(start + rng.choice([0, 1, 5, 12, 100, 10_000]), len(content))
        before, piece, after = content[:start], content[start:end], content[end:]
        kind = rng.choice(["bit", "cut", "cut", "token", "token", "other", "ends", "codec"])
        if kind == "bit" and piece:
            content = before + bytes([piece[0] ^ 1 << rng.randrange(8)]) + piece[1:] + after
        elif kind == "cut":
            content = before + rng.choice([after, b"", piece * 3 + after])
        elif kind == "token":
            content = (
                before + rng.choice([*TOKENS, rng.randbytes(5)]) + rng.choice([piece, b""]) + after
            )
        elif kind == "other":
            content = before + rng.choice(list(SEEDS.values()))[: rng.randrange(200)] + after
        elif kind == "ends":
            content = content.replace(b"\n", rng.choice([b"\r", b"\r\n", b"\n\n", b"", b" "]))
        elif kind == "codec" and rng.random() < 0.2:
            codec = rng.choice(["utf-16", "utf-16-le", "utf-32", "cp1252", "utf-8-sig", "utf-7"])
            content = content.decode("utf-8", "replace").encode(codec, "replace")
    return content


def check(source: Path) -> str:
    """What became of an input. Raises AssertionError, or whatever else is a bug."""
    try:
        with contextlib.redirect_stdout(None):  # the note on labels that are alike
            dataset = data.load_data(str(source), 0, None, 0, 0.0, "llm", "llm")
    except data.InputError as error:
        assert str(error) and "\n" not in str(error)
        return "InputError"
    assert dataset.val and dataset.test and len({example.label for example in dataset.train}) > 1
    for example in dataset.train + dataset.val + dataset.test:
        assert example.question and example.label in dataset.labels
        for text in (example.question, example.label, example.rationale):
            assert text.encode() == text.strip().encode()
    return "examples"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--n", type=int, default=10_000, help="inputs (default 10000)")
    parser.add_argument("--seed", type=int, default=0, help="decides all inputs (default 0)")
    parser.add_argument("--save", type=Path, default=Path("."), help="folder for failing inputs")
    o = parser.parse_args(arguments)
    rng, outcomes = random.Random(o.seed), Counter()
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        (root / "official").mkdir()
        (root / "folder").mkdir()
        for split in ("train", "test"):
            (root / f"folder/{split}.jsonl").write_bytes(SEEDS["input.jsonl"])
        (root / "official/ori_pqal.json").write_bytes(SEEDS["pubmedqa.json"])
        for i in range(o.n):
            kind = rng.choice(list(SEEDS))
            (root / kind).write_bytes(mutate(rng, SEEDS[kind]))
            end = time.process_time() + 2
            try:
                outcome = check(root / SOURCES.get(kind, kind))
                assert time.process_time() < end, "too slow"
            except Exception as error:
                outcome = "FAILED"
                shutil.copy(root / kind, o.save / f"fuzz-{o.seed}-{i}-{Path(kind).name}")
                print(f"input {i} ({kind}): {error!r}"[:500], file=sys.stderr)
            outcomes[kind, outcome] += 1
    for kind_and_outcome, count in sorted(outcomes.items()):
        print(*kind_and_outcome, count)
    return 1 if any(outcome == "FAILED" for _, outcome in outcomes) else 0


if __name__ == "__main__":
    sys.exit(main())
