"""What several test files need."""

import json
import random
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def read(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def lines(path: Path) -> list:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def contents(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(out.iterdir())}


def changed(content: dict, *path: object, value: object) -> dict:
    place = content
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    return content


def write_notes(path: Path) -> Path:
    """160 notes so easy that labels are valid after a few updates."""
    rng, rows = random.Random(0), ["question,label,rationale"]
    for _ in range(160):
        part = rng.choice(["arm", "leg", "head", "back"])
        degree, label = rng.choice([("bad", "go"), ("mild", "stay")])
        rows.append(f"{degree} {part} {rng.randrange(100)},{label},the {part} is {degree}")
    path.write_text("\n".join(rows), encoding="utf-8")
    return path


def write_t5(folder: Path, tokenizer: bytes) -> Path:
    """A tiny random T5 as transformers saves it, with the tokenizer of a run."""
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": 1600, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_heads": 2}
    sizes |= {"num_layers": 2, "feed_forward_proj": "gated-gelu", "decoder_start_token_id": 0}
    transformers.set_seed(7)
    transformers.T5ForConditionalGeneration(transformers.T5Config(**sizes)).save_pretrained(folder)
    (folder / "spiece.model").write_bytes(tokenizer)
    return folder
