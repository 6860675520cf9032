"""Feeds mutated and random files to the readers of data.py:  python tests/fuzz.py --n 100000 --seed 0

Every input must end in examples (texts, not empty, encodable) or in an InputError of one line, within two seconds of
computing. Exit status 1 and the inputs saved beside this script (or in --save DIR) if one does not.
"""

import argparse
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

COLUMNS, LIMIT = ("question", "label", "rationale"), 2.0  # seconds for one input
RECORDS = [
    {"question": f"Is it {i}, \u00e9 \U0001f912?", "label": ["yes", "no"][i % 2], "rationale": f'R "{i}".'}
    for i in range(12)
]
LINES = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in RECORDS)
ROWS = [",".join('"' + record[c].replace('"', '""') + '"' for c in COLUMNS) for record in RECORDS]
PUBMEDQA = {
    str(i): {"QUESTION": f"q{i}", "CONTEXTS": ["c", "d"], "final_decision": ["yes", "no"][i % 2], "LONG_ANSWER": "a"}
    for i in range(12)
}
BIOASQ = [
    {"type": "yesno", "body": f"q{i}", "exact_answer": ["yes", "no"][i % 2], "ideal_answer": ["a"]}
    | {"snippets": [{"text": "s"}]}
    for i in range(12)
]
SEEDS = {
    "jsonl": LINES, "array": json.dumps(RECORDS, indent=1), "csv": "\n".join([",".join(COLUMNS), *ROWS, ""]),
    "pubmedqa": json.dumps(PUBMEDQA), "bioasq": json.dumps({"questions": BIOASQ}),
    "truth": json.dumps(dict.fromkeys(["1", "2", "3"], "yes")),  # test_ground_truth.json beside a good PubMedQA
    "folder": LINES,  # val.jsonl of a folder
}  # fmt: skip
SEEDS = {name: text.encode() for name, text in SEEDS.items()}
TOKENS = [
    b'"', b'""', b"{", b"}", b"[", b"]", b":", b",", b"'", b"\\", b"\\n", b"\\ud800", b"\\udc00", b"\\u0000",
    b"\\u2028", b"NaN", b"-Infinity", b"null", b"true", b"1e999", b"-0", b"9" * 400, b"9" * 5000, b"[" * 5000,
    b'{"a":' * 5000, b"[" * 100_000, b"\0", b"\xef\xbb\xbf", b"\r", b"\n", b"\r\n", b"\t", b" ", b"\xe2\x80\xa8",
    b"\xc2\x85", b"\x0c",
    b"\x1c", b"\xed\xa0\x80", b"\xff", b"\xc3", b'"questions"', b'"question": ', b'"label": "a", ', b'"type": "yesno"',
    b"question,label,rationale\n", b"//", b"#", b"{}", b"[]", b'""""', b"QUESTION", b'"a\\nb": {}, ',
    b"\xf0\x9f\xa4\x92",
]  # fmt: skip
CODECS = ["utf-16", "utf-16-le", "utf-32", "cp1252", "utf-8-sig", "utf-7"]


def mutate(rng: random.Random, content: bytes) -> bytes:
    """One to four changes: bits, cuts, copies, tokens, pieces of other formats, line ends, encodings."""
    for _ in range(rng.choice([1, 1, 1, 1, 2, 4])):
        a, b = sorted(rng.randrange(len(content) + 1) for _ in range(2))
        b = rng.choice([b, min(a + rng.randrange(12), b)])  # more often a short piece
        kind = rng.randrange(11)
        if kind == 0 and a < len(content):
            content = content[:a] + bytes([content[a] ^ 1 << rng.randrange(8)]) + content[a + 1 :]
        elif kind == 1:
            content = content[:a] + content[b:]
        elif kind == 2:
            content = content[:a]
        elif kind == 3:
            content = content[:b] + content[a:b] * rng.choice([1, 1, 3]) + content[b:]
        elif kind <= 6:
            content = content[:a] + rng.choice(TOKENS) + content[rng.choice([a, b]) :]
        elif kind == 7:
            other = rng.choice(list(SEEDS.values()))
            at = rng.randrange(len(other))
            content = content[:a] + other[at : at + rng.randrange(200)] + content[b:]
        elif kind == 8:
            content = content[:a] + rng.randbytes(rng.randrange(1, 9)) + content[a:]
        elif kind == 9:
            content = content.replace(b"\n", rng.choice([b"\r", b"\r\n", b"\n\n", b"", b"\xe2\x80\xa8", b" "]))
        elif rng.random() < 0.2:
            content = content.decode("utf-8", "replace").encode(rng.choice(CODECS), "replace")
    return content


def place(folder: Path, kind: str, content: bytes) -> tuple[Path, Path]:
    """Write one input where its kind belongs: the file that holds it, and what --data would be."""
    source = folder / {"folder": "", "truth": "ori_pqal.json"}.get(kind, "input")
    file = {"folder": folder / "val.jsonl", "truth": folder / "test_ground_truth.json"}.get(kind, source)
    file.write_bytes(content)
    return file, source


def one_line(error: data.InputError) -> str:
    assert str(error) and "\n" not in str(error), f"a message of several lines: {str(error)[:200]!r}"
    return "InputError"


def check(file: Path, source: Path) -> str:
    """What became of it: examples, or an InputError at which stage. AssertionError, or whatever else: a bug."""
    try:
        examples = data.read_file(file)[0] if source == file else []
    except data.InputError as e:
        return one_line(e)
    try:
        splits = data.read_splits(source, 0)
    except data.InputError as e:
        return one_line(e) + " (splits)"
    everything = [example for split in splits for example in split]
    for example in everything:
        texts = example.question, example.label, example.rationale
        assert all(isinstance(text, str) and text == text.strip() for text in texts) and all(texts[:2]), example
        assert all(text.encode() is not None for text in texts)  # UnicodeEncodeError for half a character
    if source == file:
        assert sorted(map(repr, examples)) == sorted(map(repr, everything)), "splitting lost or made examples"
    try:
        dataset = data.load_data(str(source), 0, None, "llm", "llm")
    except data.InputError as e:
        return one_line(e) + " (data set)"
    assert dataset.train and dataset.val and dataset.test and len({e.label for e in dataset.train}) > 1
    assert len(set(dataset.labels)) == len(dataset.labels) and {e.label for e in everything} == set(dataset.labels)
    return "examples"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, default=10_000, help="inputs (default 10000)")
    parser.add_argument("--seed", type=int, default=0, help="decides all inputs (default 0)")
    parser.add_argument("--save", type=Path, default=Path(__file__).parent, help="where failing inputs go")
    o = parser.parse_args(arguments)
    rng, counts, failures, began, slowest = random.Random(o.seed), Counter(), 0, time.perf_counter(), 0.0
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        for kind in SEEDS:
            (root / kind).mkdir()
        for split in ("train", "test"):
            (root / "folder" / f"{split}.jsonl").write_bytes(SEEDS["jsonl"])
        (root / "truth" / "ori_pqal.json").write_bytes(SEEDS["pubmedqa"])
        for i in range(o.n):
            kind = rng.choice(list(SEEDS))
            random_bytes = rng.random() < 0.05
            content = rng.randbytes(rng.randrange(200)) if random_bytes else mutate(rng, SEEDS[kind])
            file, source = place(root / kind, kind, content)
            start = time.process_time()
            try:
                outcome = check(file, source)
                seconds = time.process_time() - start
                slowest = max(slowest, seconds)
                assert seconds < LIMIT, f"took {seconds:.1f} s"
            except Exception as e:
                failures += 1
                outcome = f"FAILED: {type(e).__name__}"
                if failures <= 20:
                    saved = o.save / f"fuzz-failure-{o.seed}-{i}.{kind}"
                    shutil.copyfile(file, saved)
                    print(f"input {i} ({kind}): {type(e).__name__}: {str(e)[:300]}; saved as {saved}", file=sys.stderr)
            counts["random" if random_bytes else kind, outcome] += 1
    outcomes = sorted({outcome for _, outcome in counts})
    print("".join(column.rjust(24) for column in ["", *outcomes]))
    for kind in [*SEEDS, "random"]:
        print(kind.rjust(24) + "".join(str(counts[kind, outcome]).rjust(24) for outcome in outcomes))
    print(f"{o.n} inputs, {failures} failures, slowest {slowest:.2f} s, {time.perf_counter() - began:.0f} s in all")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
