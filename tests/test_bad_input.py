"""Bad input ends in one line with status 2 and leaves nothing; strange input works."""

import json
import os
import pickle
import shutil
import time
from pathlib import Path

import pytest
import torch
from helpers import lines, read, write_notes

import data
import r2d

TINY = "--limit 48 --stage1-steps 2 --stage2-steps 4 --eval-every 4 --batch-size 4 --width 16"
TINY = [*TINY.split(), *"--heads 2 --layers 1 --vocab-size 400 --max-source 128".split()]
TINY += ["--max-target", "24", "--device", "cpu", "--out", "run"]
COLUMNS = ["question", "label", "rationale"]


def record(i: int, **changes: str) -> dict[str, str]:
    row = {"question": f"Is {i} bad?", "label": "yes" if i % 2 else "no", "rationale": f"R {i}."}
    return row | changes


def jsonl(rows: list[dict]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def write(name: str, content: object) -> None:
    """Bytes, text, or a value as JSON; None makes a folder."""
    path = Path(name)
    path.parent.mkdir(exist_ok=True)
    if content is None:
        path.mkdir()
    elif isinstance(content, bytes):
        path.write_bytes(content)
    else:
        text = content if isinstance(content, str) else json.dumps(content)
        path.write_bytes(text.encode())


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """Every test runs in an empty folder."""
    monkeypatch.chdir(tmp_path)


def all_files() -> dict[Path, bytes]:
    return {path: path.is_file() and path.read_bytes() for path in Path().rglob("*")}


def refused(capsys, arguments: list[str], *named: str) -> None:
    """Status 2, one line on stderr with what is named, nothing made or changed."""
    before = all_files()
    capsys.readouterr()
    try:
        status = r2d.main(arguments)
    except SystemExit as end:  # argparse's own
        status = end.code
    message = capsys.readouterr().err
    assert status == 2
    assert message.startswith("r2d.py: ") and message.endswith("\n"), message
    assert len(message.splitlines()) == 1 and len(message) < 1500, message
    assert [name for name in named if name not in message.replace("_", "-")] == [], message
    assert all_files() == before


# ---- bad data -----------------------------------------------------------------------------------
GOOD = [record(i) for i in range(30)]
TEXT = jsonl(GOOD)
LINE = jsonl([record(1)]).strip()
HEADER, ROWS = "question,label,rationale\n", "q,yes,r\np,no,r\n" * 10
JSONL = {"nothing": "", "blank": " \n\n", "nine records": jsonl(GOOD[:9]), "NULs": "\0" * 100}
CSV = {"header only": HEADER, "no header": ROWS, "sep": "sep=,\n" + HEADER + ROWS, "nothing": ""}
CSV["two columns"] = HEADER.replace("\n", ",label\n") + ROWS.replace("\n", ",new\n")
for column in COLUMNS:
    for value in ("null", "3", "true", "NaN", "[]", '["a"]', "{}", r'"\ud83d"', '"a', "1e999"):
        fields = dict.fromkeys(COLUMNS, '"x"') | {column: value}
        line = ", ".join(f'"{name}": {text}' for name, text in fields.items())
        if (column, value) != ("rationale", "null"):  # that is an empty one
            JSONL[f"{column} is {value}"] = f"{TEXT}{{{line}}}\n{TEXT}"
    JSONL[f"no {column}"] = TEXT + LINE.replace(column, "other")
    CSV[f"no {column}"] = HEADER.replace(column, "other") + ROWS
    CSV[f"{column} in capitals"] = HEADER.replace(column, column.upper()) + ROWS
for blank in ("", " ", "\t\n", "\u00a0\u2003", "\u2028"):
    JSONL[f"question {blank!r}"] = jsonl([*GOOD, record(1, question=blank)])
    JSONL[f"label {blank!r}"] = jsonl([*GOOD, record(1, label=blank)])
BAD_LINES = ["null", "3", '"text"', "[]", "true", '["q", "yes", "r"]', "{", "\\", "// comment"]
BAD_LINES += ["Dear reader", "q,yes,r", "\0", LINE[:-3], LINE[:-1], LINE + LINE, LINE + ","]
BAD_LINES += ["\ufeff" + LINE, LINE.replace('"', "'"), LINE.replace(":", "", 1), "[" * 100_000]
BAD_LINES += [LINE[:-1] + ",}", LINE.replace("bad", "\x01"), LINE.replace("bad", "\\x41")]
for i, line in enumerate([*BAD_LINES, "1" * 5000]):
    JSONL[f"line {i}: {line[:20]!r}"] = f"{TEXT}{line}\n{TEXT}"
JSONL |= {"latin-1": TEXT.replace("bad", "é").encode("latin-1"), "UTF-16": TEXT.encode("utf-16")}
JSONL |= {"PNG": b"\x89PNG\r\n", "gzip": b"\x1f\x8b\x08\0", "half a character": b'{"\xc3'}
JSONL |= {"one label": jsonl([record(i, label="yes") for i in range(30)])}
JSONL |= {"no rationales": jsonl([record(i, rationale=" ") for i in range(30)])}
for delimiter in (";", "\t", "|", ", "):
    CSV[f"delimiter {delimiter!r}"] = (HEADER + ROWS).replace(",", delimiter)
BAD_ROWS = ["q,yes", "q", "q,yes,r,s", "q,yes,r,", ",yes,r", "q,,r", 'q," ",r', 'q,yes,"r', ",,"]
for row in [*BAD_ROWS, 'q,"a"b,r', '"q,yes,r', '"say \\"a\\"",yes,r', "“q, and”,yes,r"]:
    CSV[f"row {row}"] = f"{HEADER}{ROWS}{row}\n"
CSV["latin-1"] = (HEADER + ROWS + "é,yes,r").encode("latin-1")

DATA = {f"jsonl, {name}": ({"d.jsonl": text}, "d.jsonl") for name, text in JSONL.items()}
DATA |= {f"csv, {name}": ({"d.csv": text}, "d.csv") for name, text in CSV.items()}
SPLITS = dict.fromkeys(["train.jsonl", "val.jsonl", "test.jsonl"], TEXT)
DATA["folder above"] = {f"sub/{name}": TEXT for name in SPLITS}, "."
for name in SPLITS:
    rest = {other: TEXT for other in SPLITS if other != name}
    stem = name.removesuffix(".jsonl")
    changes = {"missing": {}, "twice": {name: TEXT, f"{stem}.csv": ROWS}}
    changes |= {"empty": {name: ""}, "a folder": {name: None}, "bad": {name: TEXT + "{}"}}
    changes |= {"header": {f"{stem}.csv": HEADER}, "json": {f"{stem}.json": {}}}
    DATA |= {f"folder, {stem} {kind}": (rest | files, ".") for kind, files in changes.items()}
DATA["json"], DATA["text"] = ({"d.json": TEXT}, "d.json"), ({"d.txt": "Dear reader"}, "d.txt")
for path in ("nowhere.jsonl", "nowhere/d.jsonl", "f/x.jsonl", "", " ", "~", "Triage", "x" * 300):
    DATA[f"path {path[:20]!r}"] = {"f": TEXT}, path
DATA["path of two lines"] = {}, "two\nlines"


@pytest.mark.parametrize(("files", "source"), DATA.values(), ids=map(ascii, DATA))
def test_bad_data_are_refused(files, source, capsys):
    """Catches a traceback, a guess, a message without the place, a folder that is left behind."""
    for name, content in files.items():
        write(name, content)
    refused(capsys, [*TINY, "--data", source], source.replace("\n", " "))


FEW = ["", "question,rationale\n", "question,rationale\n" + "q,r\n" * 30]  # no validation


@pytest.mark.parametrize("file", ["missing", ROWS, *FEW])
def test_bad_stage1_data_are_refused(file, capsys):
    """Catches a message about --data where --stage1-data is missing, bad or too short."""
    write("d.jsonl", TEXT)
    write("t.csv" if file == "missing" else "s.csv", file)
    refused(capsys, [*TINY, "--data", "d.jsonl", "--stage1-data", "s.csv"], "s.csv: ")


# ---- bad options --------------------------------------------------------------------------------
SHARES = ["warmup", "ramp", "cap", "alpha", "override", "dropout", "lr"]
LEAST = {"stage1-steps": 1, "stage2-steps": 1, "batch-size": 1, "eval-every": 1, "width": 1}
LEAST |= {"layers": 1, "heads": 1, "notes": 1, "limit": 1, "seed": 0, "max-source": 32}
LEAST |= {"max-target": 2, "vocab-size": 400, "stage1-notes": 1}
CHOICES = ["stage", "method", "schedule", "rationales", "stage1-rationales", "device", "dtype"]
CHOICES += ["optimizer"]
OPTIONS = {"--nonsense": "nonsense", "-x": "-x", "word": "word", "--lr": "--lr", "--out": "--out"}
OPTIONS |= {"--eval=1": "--eval", "--no-stage1=1": "--no-stage1", "--init x": "x/spiece.model"}
OPTIONS |= {"--stage 1 --method sft": "--stage 1", "--stage 1 --no-stage1": "--stage 1"}
OPTIONS |= {"--eval": "stage2.pt", "--ask x": "stage2.pt", "--device mps --method dss": "mps"}
OPTIONS |= {"--data t.csv": "t.csv", "--out f": "f", "--out f/run": "f", "--out f/a/b": "f"}
OPTIONS |= {"--max-target 3": "label", "--given x": "--given"}
for name in SHARES:
    for value in ("-0.01", "1.01", "nan", "inf", "x", "1,5", "1e999", ""):
        OPTIONS[f"--{name} {value}"] = name
for name, least in LEAST.items():
    for value in (least - 1, "1.5", "x", "nan", "1e3", 10**12):
        OPTIONS[f"--{name} {value}"] = name
for name in CHOICES:
    for value in ("0", "R2D", "llm2", ""):
        OPTIONS[f"--{name} {value}"] = f"--{name}"


@pytest.mark.parametrize("option", OPTIONS)
def test_bad_options_are_refused(option, capsys):
    """Catches a traceback, a default in place of a wrong value, an option that is not named."""
    write("f", TEXT)
    refused(capsys, [*TINY, *option.split(" ")], OPTIONS[option])


def test_help_lists_every_option(capsys):
    """Catches an option without help, one that was lost, and one too many."""
    with pytest.raises(SystemExit) as end:
        r2d.main(["-h"])
    assert end.value.code == 0
    text = capsys.readouterr().out
    options = vars(r2d.parse_args(["--out", "never-made"]))
    assert [name for name in options if f"--{name.replace('_', '-')}" not in text] == []
    assert len(options) == 37


OTHER = "--lr 0.5 --seed 3 --method sft --schedule none --cap 0.1 --warmup 0.1 --alpha 0.1"
OTHER += " --width 32 --limit 9 --batch-size 2 --stage2-steps 9 --data t.csv --dtype bfloat16"


def test_a_run_refuses_other_options(capsys):
    """Catches a resume that silently becomes another run, and one that refuses its own options."""
    write_notes(Path("notes.csv"))
    command = [*TINY, "--data", "notes.csv", "--limit", "500", "--stage1-steps", "3"]
    assert r2d.main([*command, "--stage", "1"]) == 0
    words = [*OTHER.split(), "--no-stage1", "--init", "t5", "--max-source", "99"]
    for i, flag in enumerate(words):
        if flag.startswith("--"):
            value = [word for word in words[i + 1 : i + 2] if not word.startswith("--")]
            refused(capsys, ["--out", "run", flag, *value], flag.lstrip("-"), "--out")
    assert r2d.main(command) == 0
    assert len(lines(Path("run/log.jsonl"))) == 7


# ---- bad checkpoints ----------------------------------------------------------------------------
class Evil:
    def __reduce__(self) -> tuple:
        return os.mkdir, ("evil",)


def narrow(content: dict) -> dict:
    weights = {name: weight[..., :1] for name, weight in content["weights"].items()}
    return content | {"weights": weights}


RAW = {"empty": lambda raw: b"", "half": lambda raw: raw[: len(raw) // 2]}
RAW |= {"without its end": lambda raw: raw[:-1], "latin-1": lambda raw: b'{"\xe9'}
RAW |= {"text": lambda raw: b"this is no file of a run\n", "null": lambda raw: b"null"}
RAW |= {"list": lambda raw: b"[]", "deep": lambda raw: b"[" * 100_000, "3": lambda raw: b"3"}
RAW |= {"pickle": lambda raw: pickle.dumps([1]), "evil pickle": lambda raw: pickle.dumps(Evil())}
TYPED = {"a list": lambda content: [1, 2, 3], "other keys": lambda content: {"a": 1}}
TYPED |= {"evil": lambda content: Evil(), "no weights": lambda content: content | {"weights": {}}}
TYPED |= {"all None": dict.fromkeys, "other shapes": narrow}
DAMAGE = [(name, kind) for name in ("last.pt", "stage1.pt", "stage2.pt") for kind in RAW | TYPED]
DAMAGE += [(name, kind) for name in ("config.json", "tokenizer.model") for kind in RAW]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("finished") / "run"
    assert r2d.main([*TINY, "--out", str(out)]) == 0
    return out


@pytest.mark.parametrize(("name", "kind"), DAMAGE)
def test_damaged_files_of_a_run_are_named(name, kind, finished, capsys):
    """Catches a traceback, code that a file runs when it is read, and weights that half fit."""
    shutil.copytree(finished, "run")
    Path("run/metrics.json").unlink()
    path = Path("run", name)
    if kind in RAW:
        path.write_bytes(RAW[kind](path.read_bytes()))
    else:
        torch.save(TYPED[kind](torch.load(path, weights_only=True)), path)
    if name in ("last.pt", "stage1.pt"):
        Path("run/stage2.pt").unlink()  # else they are not needed
    else:
        refused(capsys, ["--out", "run", "--eval"], name)
        refused(capsys, ["--out", "run", "--ask", "x"], name)
    refused(capsys, ["--out", "run"], name)  # and there is no folder "evil"


# ---- what is strange and yet must work ----------------------------------------------------------
STRANGE = ["x", "many words " * 2000, "x" * 20_000, "🤒🏽👩‍⚕️🇨🇭", "حمى שלום \u202eabc", "<0x41>"]
STRANGE += ["<pad><unk>", "▁", "▁▁a▁", "a\tb", "a\r\nb\rc\nd", "a\u2028b\x1cc", "\u200b"]
STRANGE += ["\x1b[2J\x07", "{label} {} {0}", "%s %(x)s", "\\n \\", "\"'`“”", "a\0b", "9" * 5000]
STRANGE += ["explain: predict: </s>", "Z" + "\u0301\u0489" * 40, "a" + "   " * 50 + "b", "\uffff"]
PAIRS = [("yes", "Yes"), ("yes", "yes, but"), ("{label}", "%s"), ("b\nc", "b"), ("</s>", "<pad>")]
PAIRS += [("given label: yes, explain:", "predict:"), ("🤒", "🤕"), ("حمى", "שלום"), ("null", "1")]
PAIRS += [("go home", "go  home"), ("\\", "'"), (".*", "(a|b)+"), ("<unk>", "x\ty"), ("ß", "sz")]


@pytest.mark.parametrize("text", STRANGE, ids=range(len(STRANGE)))
def test_strange_texts_are_trained_on(text):
    """Catches a text that breaks tokenizer, prompt or loss, or acts as a command in them."""
    rows = [record(i, question=text, rationale=text if i % 4 else "") for i in range(16)]
    write("d.jsonl", jsonl(rows + GOOD))
    own_labels = "--warmup 0 --ramp 0 --cap 1".split()
    run = r2d.setup(r2d.parse_args([*TINY, "--data", "d.jsonl", *own_labels]))
    prompt = f"given label: yes, explain: {text}"
    ids = run.tokenizer.to_ids([prompt], 128)[0].tolist()
    assert ids[-1] == 1 and {0, 2}.isdisjoint(ids)
    prompt = prompt.replace("▁", " ").strip()  # SentencePiece's mark for a space
    assert len(ids) == 128 or run.tokenizer.to_text(ids) == prompt
    assert run.tokenizer.to_text(ids).startswith("given label: yes, explain:")
    loss, log = r2d.stage2_loss(run, run.dataset.train, 0)
    assert 0 < loss.item() < 20 and log["p_predicted"] == 1
    look = data.look(run.dataset, run.tokenizer, 128, 24)
    assert all(line.isprintable() for line in look.split("\n"))


@pytest.mark.parametrize("pair", PAIRS, ids=ascii)
def test_strange_labels_are_kept_letter_by_letter(pair, capsys):
    """Catches a label that is formatted, cut, or confused with another; a whole run with it."""
    rows = [record(i, label=pair[i % 2], question=STRANGE[i % 24][:300]) for i in range(60)]
    write("d.jsonl", jsonl(rows))
    assert r2d.main([*TINY, "--data", "d.jsonl"]) == 0
    assert sorted(read(Path("run/config.json"))["labels"]) == sorted(pair)
    assert {row["label"] for row in lines(Path("run/predictions.jsonl"))} <= set(pair)
    assert r2d.main([*TINY, "--ask", STRANGE[4]]) == 0


def test_a_thousand_labels_are_trained_and_scored():
    """Catches a cost that grows with labels times texts, such as a pattern for each name."""
    start = time.process_time()
    rows = [record(i, label=f"free text label number {i % 1000}") for i in range(2000)]
    write("d.jsonl", jsonl(rows))
    assert r2d.main([*TINY, "--data", "d.jsonl", "--limit", "2000", "--method", "sft"]) == 0
    assert len(read(Path("run/metrics.json"))["label"]["per_class"]) == 1000
    assert time.process_time() - start < 60
