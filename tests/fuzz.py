"""Feeds damaged files to the readers of data.py:  python tests/fuzz.py --n 100000 --seed 0

Every input must end in examples or an InputError of one line, else it is saved and the status is 1.
"""

import argparse
import io
import json
import random
import shutil
import sys
import tempfile
import time
from argparse import Namespace
from collections import Counter
from pathlib import Path

import sentencepiece

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import data

RECORDS = []
for i in range(12):
    label = ["yes", "no"][i % 2]
    RECORDS.append({"question": f"é{i} \U0001f912", "label": label, "rationale": 'a "b"'})
LINES = "\n".join(json.dumps(record, ensure_ascii=False) for record in RECORDS)
ROWS = "".join('"{question}",{label},"a ""b"""\n'.format(**record) for record in RECORDS)
SEEDS = {"input.jsonl": LINES.encode(), "folder/val.jsonl": LINES.encode()}  # what is damaged
SEEDS |= {name: f"question,label,rationale\n{ROWS}".encode() for name in ("input.csv", "s1.csv")}
SOURCES = {"folder/val.jsonl": {"data": "folder"}}  # the options that name it
SOURCES |= {"s1.csv": {"data": "folder", "stage1_data": "s1.csv"}}
TOKENS = r'"" "" { } [ ] : , \ \n \ud800 \u0000 NaN -Infinity null true 1e999 # {} [] """"'.split()
TOKENS += r'"question": "label":"a", "label":null, "rationale":null, "a\nb":{}, question'.split()
TOKENS += ["\0", "\ufeff", "\r", "\n", "\r\n", "\t", " ", "\u2028", "\x85", "\x1c", "\U0001f912"]
TOKENS += ["9" * 400, "9" * 5000, "[" * 100_000, '{"a":' * 5000, "question,label,rationale\n"]
TOKENS = [token.encode() for token in TOKENS] + [b"\xed\xa0\x80", b"\xff", b"\xc3"]
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1234\n"


def t5_like(texts: list[str], size: int, **ids: int) -> bytes:
    """SentencePiece as in T5: it normalises, and has no bytes for what it does not know."""
    ids = {"pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1, "minloglevel": 2} | ids
    model, train = io.BytesIO(), sentencepiece.SentencePieceTrainer.train
    train(sentence_iterator=iter(texts), model_writer=model, vocab_size=size, **ids)
    return model.getvalue()


TOKENIZER = data.Tokenizer(t5_like([LINES], 40, hard_vocab_limit=False))


def options(**changes: object) -> Namespace:
    """The options that load_data takes, with the defaults of r2d.py."""
    o = {"data": "triage", "seed": 0, "limit": None, "notes": 1000, "stage1_notes": None}
    o |= {"override": 0.2, "rationales": "llm", "stage1_rationales": "llm", "stage1_data": None}
    assert changes.keys() <= o.keys()
    return Namespace(**(o | changes))


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
            token = rng.choice([*TOKENS, rng.randbytes(5)])
            content = before + token + rng.choice([piece, b""]) + after
        elif kind == "other":
            content = before + rng.choice(list(SEEDS.values()))[: rng.randrange(200)] + after
        elif kind == "ends":
            content = content.replace(b"\n", rng.choice([b"\r", b"\r\n", b"\n\n", b"", b" "]))
        elif kind == "codec" and rng.random() < 0.2:
            codec = rng.choice(["utf-16", "utf-16-le", "utf-32", "cp1252", "utf-8-sig", "utf-7"])
            content = content.decode("utf-8", "replace").encode(codec, "replace")
    return content


def check(o: Namespace) -> str:
    """What became of an input. Raises AssertionError, or whatever else is a bug."""
    try:
        dataset = data.load_data(o)
    except data.InputError as error:
        assert str(error) and len(str(error)) < 1000
        return "InputError"
    splits = [dataset.train, dataset.val, dataset.test]
    assert all(splits) and len({example.label for example in dataset.train}) > 1
    for example in [*dataset.train, *dataset.val, *dataset.test, *dataset.stage1_train]:
        assert example.question and example.label in [*dataset.labels, ""]
        for text in (example.question, example.label, example.rationale):
            assert text.encode() == text.strip().encode()
    splits = [{data.normalized(example.question) for example in split} for split in splits]
    assert sum(map(len, splits)) == len(set().union(*splits)) or o.data.endswith("folder")
    seen = data.look(dataset, TOKENIZER, 64, 64).split("\n")
    assert len(seen) < 10 and all(line.isprintable() for line in seen), seen
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
        (root / "folder").mkdir()
        for file in ("folder/train.jsonl", "folder/val.jsonl", "folder/test.jsonl"):
            (root / file).write_bytes(SEEDS["input.jsonl"])
        for i in range(o.n):
            kind = rng.choice(list(SEEDS))
            (root / kind).write_bytes(mutate(rng, SEEDS[kind]))
            source = SOURCES.get(kind, {"data": kind})
            end = time.process_time() + 2
            try:
                outcome = check(options(**{key: str(root / source[key]) for key in source}))
                assert time.process_time() < end, "too slow"
            except Exception as error:
                outcome = "FAILED"
                shutil.copy(root / kind, o.save / f"fuzz-{o.seed}-{i}-{Path(kind).name}")
                print(f"input {i} ({kind}): {error!r}"[:500], file=sys.stderr)
            outcomes[kind, outcome] += 1
            (root / "folder/val.jsonl").write_bytes(SEEDS["input.jsonl"])
    for kind_and_outcome, count in sorted(outcomes.items()):
        print(*kind_and_outcome, count)
    return 1 if any(outcome == "FAILED" for _, outcome in outcomes) else 0


if __name__ == "__main__":
    sys.exit(main())
