"""What several test files need."""

import io
import json
import os
import random
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import sentencepiece
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
FILES = ["config.json", "last.pt", "log.jsonl", "metrics.json", "predictions.jsonl"]
FILES += ["stage1.pt", "stage2.pt", "tokenizer.model"]  # what a run leaves
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1234\n"
TINY = "--limit 48 --stage1-steps 4 --stage2-steps 8 --eval-every 4 --batch-size 8 --width 16"
TINY += " --heads 2 --layers 1 --vocab-size 400 --max-target 24 --device cpu"
TINY = TINY.split()


class Evil:
    """Unpickled, it makes a folder; it could as well have emptied one."""

    def __reduce__(self) -> tuple:
        return os.mkdir, ("evil",)


def read(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def lines(path: Path) -> list:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def record(i: int, **changes: str) -> dict[str, str]:
    row = {"question": f"Is {i} bad?", "label": "yes" if i % 2 else "no", "rationale": f"R {i}."}
    return row | changes


def jsonl(rows: list[dict]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def write(name: str, content: object) -> str:
    """A file, and its folder: text or bytes as they are, else as JSON."""
    if not isinstance(content, bytes):
        content = (content if isinstance(content, str) else json.dumps(content)).encode()
    Path(name).parent.mkdir(parents=True, exist_ok=True)
    Path(name).write_bytes(content)
    return name


def contents(folder: Path) -> dict[str, bytes]:
    """All that is in a folder."""
    found = {}
    for path in folder.rglob("*"):
        found[str(path.relative_to(folder))] = path.is_file() and path.read_bytes()
    return found


def status(main: Callable, *arguments: object) -> int:
    """Of r2d.py or a script: what main returns, or what argparse ends the program with."""
    try:
        return main([str(argument) for argument in arguments])
    except SystemExit as end:
        return end.code


def refusal(capsys: pytest.CaptureFixture, main: Callable, *arguments: object) -> str:
    """The one line, with status 2, that refuses these arguments. No file is made or changed."""
    before = contents(Path())
    capsys.readouterr()
    assert status(main, *arguments) == 2
    message = capsys.readouterr().err
    assert re.fullmatch(r"\w+\.py: .*\n", message) and len(message) < 1500, message
    assert contents(Path()) == before
    return message


def same(one: object, two: object) -> bool:
    """Whether two values, as torch.load gives them, are equal to the bit."""
    if isinstance(one, dict):
        return one.keys() == two.keys() and all(same(one[key], two[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(two) and all(map(same, one, two))
    return one.equal(two) if isinstance(one, Tensor) else one == two


def t5_like(texts: list[str], size: int, **ids: object) -> bytes:
    """SentencePiece as in T5: it normalises, and has no bytes for what it does not know."""
    ids = {"pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1, "minloglevel": 2} | ids
    model, train = io.BytesIO(), sentencepiece.SentencePieceTrainer.train
    train(sentence_iterator=iter(texts), model_writer=model, vocab_size=size, **ids)
    return model.getvalue()


def write_notes(path: Path, every: int = 1) -> Path:
    """160 notes so easy that labels are valid after a few updates; `every` 2: each second has a
    rationale."""
    rng, rows = random.Random(0), ["question,label,rationale"]
    for i in range(160):
        part = rng.choice(["arm", "leg", "head", "back"])
        degree, label = rng.choice([("bad", "go"), ("mild", "stay")])
        rationale = f"the {part} is {degree}" if i % every == every - 1 else ""
        rows.append(f"{degree} {part} {rng.randrange(100)},{label},{rationale}")
    path.write_text("\n".join(rows), encoding="utf-8")
    return path


def write_folder(path: Path, train: int = 1, val: int = 1) -> str:
    """The same notes as train, val and test; in two of them each so many-th has a rationale."""
    path.mkdir(exist_ok=True)
    for name, every in {"train": train, "val": val, "test": 1}.items():
        write_notes(path / f"{name}.csv", every)
    return str(path)


def write_t5(folder: Path, tokenizer: bytes, vocab_size: int = 1600) -> Path:
    """A tiny random T5 as transformers saves it, with the tokenizer of a run."""
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": vocab_size, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_heads": 2}
    sizes |= {"num_layers": 2, "feed_forward_proj": "gated-gelu", "decoder_start_token_id": 0}
    transformers.set_seed(7)
    transformers.T5ForConditionalGeneration(transformers.T5Config(**sizes)).save_pretrained(folder)
    (folder / "spiece.model").write_bytes(tokenizer)
    return folder
