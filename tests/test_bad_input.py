"""Bad input ends in one line with status 2 and leaves nothing; strange input works."""

import pickle
import re
import shutil
from pathlib import Path

import pytest
import torch
from helpers import POINTER, TINY, Evil, jsonl, lines, read, record, refusal, t5_like, write

import data
import r2d

RUN = [*TINY, "--stage1-steps", "2", "--stage2-steps", "4", "--out", "run"]
pytestmark = pytest.mark.usefixtures("here")


# ---- bad data -----------------------------------------------------------------------------------
# Case -> the content of the file, what the message must say; the folder's and others' are below
GOOD = [record(i) for i in range(30)]
TEXT = jsonl(GOOD)
LINE = jsonl([record(1)]).strip()
HEADER, ROWS = "question,label,rationale\n", "q,yes,r\np,no,r\n" * 10
JSONL = {"nothing": ("", "10 questions"), "nine records": (jsonl(GOOD[:9]), "10 questions")}
JSONL["one label"] = jsonl(GOOD[::2]), "2 labels in train"
JSONL["no rationales"] = jsonl([record(i, rationale=" ") for i in range(30)]), "no rationales"
JSONL["latin-1"] = TEXT.replace("bad", "é").encode("latin-1"), "UnicodeDecodeError"
BAD_LINES = ["null", "3", "[]", "{", "Dear reader", "\0", LINE[:-1], LINE + LINE, "\ufeff" + LINE]
for line in [*BAD_LINES, "[" * 100_000, "1" * 5000]:
    JSONL[f"line {line[:20]!r}"] = f"{TEXT}\n\n{line}\n{TEXT}", "after line 3[03]; needs"
for column in record(0):
    JSONL[f"no {column}"] = TEXT + LINE.replace(column, "other"), f"'{column}'.* after line"
    JSONL[f"{column} twice"] = TEXT + LINE.replace("{", f'{{"{column}": "x", '), "same name"
    for value in ("null", "3", "[]", r'"\ud83d"', '" \u00a0"'):
        broken = re.sub(f'("{column}": )"[^"]*"', lambda match, v=value: match[1] + v, LINE)
        JSONL[f"{column} is {value}"] = f"{TEXT}{broken}\n{TEXT}", "after line 3[01]; needs"
for value in ("null", '" \u00a0"'):
    del JSONL[f"rationale is {value}"]  # that is an empty one
CSV = {"no header": (ROWS, "'question'.* needs question,label,rationale"), "nothing": ("", "10")}
CSV["two columns"] = HEADER.replace("\n", ",label\n") + ROWS.replace("\n", ",new\n"), "same name"
for row in ("q,yes", "q,yes,r,s", "“q, and”,yes,r", "q,yes,r,"):
    CSV[f"row {row}"] = f"{HEADER}{ROWS}{row}\n", "fields as columns; put texts in double quotes"
for row in (",yes,r", "q, ,r", 'q,yes,"r', 'q,"a"b,r', '"say \\"a\\"",yes,r'):
    CSV[f"row {row}"] = f"{HEADER}{ROWS}{row}\n", "after line 2[12]; needs"

DATA = {}  # case -> files, --data, what the message must say
for ending, cases in {"jsonl": JSONL, "csv": CSV}.items():
    for name, (content, words) in cases.items():
        DATA[f"{ending}, {name}"] = {f"d.{ending}": content}, f"d.{ending}", words
SPLITS = dict.fromkeys(["train.jsonl", "val.jsonl", "test.jsonl"], TEXT)
for stem in ("train", "val", "test"):
    rest = {name: TEXT for name in SPLITS if stem not in name}
    one = f"needs one file {stem}.jsonl or {stem}.csv"
    DATA[f"folder, {stem} missing"] = rest, ".", one
    DATA[f"folder, {stem} twice"] = SPLITS | {f"{stem}.csv": ROWS}, ".", one
    DATA[f"folder, {stem} empty"] = rest | {f"{stem}.csv": HEADER}, ".", "10 questions"
DATA["json"] = {"d.json": TEXT}, "d.json", r"end in .csv or .jsonl \(a JSON object on each"
for path in ("nowhere.jsonl", "f/x.jsonl", "", "Triage", "x" * 300, "two\nlines"):
    DATA[f"path {path[:20]!r}"] = {"f": TEXT}, path, ""


@pytest.mark.parametrize(("files", "source", "words"), DATA.values(), ids=map(ascii, DATA))
def test_bad_data_are_refused(files, source, words, capsys):
    """Catches a traceback, a guess, a message without the place or the way out, a folder that is
    left behind."""
    for name, content in files.items():
        write(name, content)
    message = refusal(capsys, r2d.main, *RUN, "--data", source)
    assert source.replace("\n", " ") in message and re.search(words, message)


FEW = ["", "question,rationale\n", "question,rationale\n" + "q,r\n" * 30]  # no validation


@pytest.mark.parametrize("file", ["missing", ROWS, "question,reason\nq,r\n", *FEW])
def test_bad_stage1_data_are_refused(file, capsys):
    """Catches a message about --data where --stage1-data is missing, bad or too short."""
    write("d.jsonl", TEXT)
    write("t.csv" if file == "missing" else "s.csv", file)
    message = refusal(capsys, r2d.main, *RUN, "--data", "d.jsonl", "--stage1-data", "s.csv")
    assert "s.csv: " in message and ("needs question,rationale as" in message or file in FEW)


# ---- bad options --------------------------------------------------------------------------------
OPTIONS = {"--nonsense": "nonsense", "-x": "-x", "word": "word", "--lr": "--lr", "--out": "--out"}
OPTIONS |= {"--eval=1": "--eval", "--no-stage1=1": "--no-stage1", "--init x": "git lfs pull"}
OPTIONS |= {"--stage 1 --method sft": "--stage 1", "--stage 1 --no-stage1": "--stage 1"}
OPTIONS |= {"--eval": "stage2.pt", "--ask x": "stage2.pt", "--device mps --method dss": "mps"}
OPTIONS |= {"--data t.csv": "t.csv", "--init f": "f/spiece", "--out f": "f", "--out f/a/b": "f"}
OPTIONS |= {"--max-target 3": "label", "--given x": "--given", "--ask caf\udce9": "utf-8"}
OPTIONS["--ask x --given x --method dss"] = "--given"
COUNTS = "stage1-steps stage2-steps batch-size eval-every width layers heads notes limit seed"
for name in [*COUNTS.split(), "stage1-notes", "max-source", "max-target", "vocab-size"]:
    for value in (-1, "1.5", 10**12):
        OPTIONS[f"--{name} {value}"] = name
for name in "warmup ramp cap alpha override dropout lr".split():
    for value in ("-0.01", "1.01", "nan", "x"):
        OPTIONS[f"--{name} {value}"] = name
for name in "stage method schedule rationales stage1-rationales device dtype optimizer".split():
    for value in ("R2D", ""):
        OPTIONS[f"--{name} {value}"] = f"--{name}"
for option in ("limit 0", "batch-size 0", "max-source 31", "max-target 1", "vocab-size 399"):
    OPTIONS[f"--{option}"] = option.split()[0]


@pytest.mark.parametrize("option", OPTIONS)
def test_bad_options_are_refused(option, capsys):
    """Catches a traceback, a default in place of a wrong value, an option that is not named."""
    write("f", TEXT)
    assert OPTIONS[option] in refusal(capsys, r2d.main, *RUN, *option.split(" ")).replace("_", "-")


OTHER = "lr=0.5 seed=3 method=sft schedule=none cap=0.1 warmup=0.1 alpha=0.1 width=32 limit=9"
OTHER += " batch-size=2 stage2-steps=9 data=t.csv dtype=bfloat16 no-stage1 init=t5 max-source=99"


def test_a_run_refuses_other_options(capsys):
    """Catches a resume that silently becomes another run, and one that refuses its own options."""
    write("d.jsonl", TEXT)
    command = [*RUN, "--data", "d.jsonl", "--limit", "500", "--stage1-steps", "3"]
    assert r2d.main([*command, "--stage", "1"]) == 0
    for option in OTHER.split():
        message = refusal(capsys, r2d.main, "--out", "run", f"--{option}")
        assert option.split("=")[0] in message.replace("_", "-") and "--out" in message
    assert r2d.main(command) == 0
    assert len(lines(Path("run/log.jsonl"))) == 7


# ---- bad checkpoints ----------------------------------------------------------------------------
SWAPPED = t5_like(["a b"] * 9, 7, pad_id=1, eos_id=0)
RAW = {"empty": lambda raw: b"", "half": lambda raw: raw[: len(raw) // 2]}
RAW |= {"latin-1": lambda raw: b'{"\xe9', "null": lambda raw: b"null", "3": lambda raw: b"3"}
RAW |= {"list": lambda raw: b"[]", "deep": lambda raw: b"[" * 100_000}
RAW |= {"pointer": lambda raw: POINTER, "swapped": lambda raw: SWAPPED}
RAW |= {"pickle": lambda raw: pickle.dumps([1]), "evil pickle": lambda raw: pickle.dumps(Evil())}
TYPED = {"a list": lambda content: [1, 2, 3], "other keys": lambda content: {"a": 1}}
TYPED |= {"evil": lambda content: Evil(), "no weights": lambda content: content | {"weights": {}}}
TYPED |= {"all None": dict.fromkeys}
DAMAGE = [(name, kind) for name in ("last.pt", "stage1.pt", "stage2.pt") for kind in RAW | TYPED]
DAMAGE += [(name, kind) for name in ("config.json", "tokenizer.model") for kind in RAW]


@pytest.mark.parametrize(("name", "kind"), DAMAGE)
def test_damaged_files_of_a_run_are_named(name, kind, finished, capsys):
    """Catches a traceback, and code that a file runs when it is read."""
    shutil.copytree(finished, "run")
    Path("run/metrics.json").unlink()
    path = Path("run", name)
    if kind in RAW:
        path.write_bytes(RAW[kind](path.read_bytes()))
    else:
        torch.save(TYPED[kind](torch.load(path, weights_only=True)), path)
    commands = [[], ["--eval"], ["--ask", "x"]]
    if name in ("last.pt", "stage1.pt"):
        Path("run/stage2.pt").unlink()  # else they are not needed
        commands = [[]]
    for command in commands:  # none makes the folder "evil"
        assert name in refusal(capsys, r2d.main, "--out", "run", *command)


# ---- what is strange and yet must work ----------------------------------------------------------
STRANGE = ["x", "many words " * 2000, "x" * 20_000, "🤒🏽👩‍⚕️🇨🇭", "حمى שלום \u202eabc", "<0x41>"]
STRANGE += ["<pad><unk>", "▁", "▁▁a▁", "a\tb", "a\r\nb\rc\nd", "a\u2028b\x1cc", "\u200b"]
STRANGE += ["\x1b[2J\x07", "{label} {} {0}", "%s %(x)s", "\\n \\", "\"'`“”", "a\0b", "9" * 5000]
STRANGE += ["explain: predict: </s>", "Z" + "\u0301\u0489" * 40, "a" + "   " * 50 + "b", "\uffff"]
PAIRS = [("yes", "Yes"), ("yes", "yes, but"), ("{label}", "%s"), ("b\nc", "b"), ("</s>", "<pad>")]
PAIRS += [("given label: yes, explain:", "predict:"), ("🤒", "🤕"), ("حمى", "שלום"), ("null", "1")]
PAIRS += [("go home", "go  home"), ("\\", "'"), (".*", "(a|b)+"), ("<unk>", "x\ty")]


@pytest.mark.parametrize("text", STRANGE, ids=range(len(STRANGE)))
def test_strange_texts_are_trained_on(text):
    """Catches a text that breaks tokenizer, prompt or loss, or acts as a command in them."""
    rows = [record(i, question=text, rationale=text if i % 4 else "") for i in range(16)]
    write("d.jsonl", jsonl(rows + GOOD))
    own_labels = "--warmup 0 --ramp 0 --cap 1".split()
    run = r2d.setup(r2d.parse_args([*RUN, "--data", "d.jsonl", *own_labels]))
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
    assert r2d.main([*RUN, "--data", "d.jsonl"]) == 0
    assert sorted(read(Path("run/config.json"))["labels"]) == sorted(pair)
    assert {row["label"] for row in lines(Path("run/predictions.jsonl"))} <= set(pair)
    assert r2d.main([*RUN, "--ask", STRANGE[4]]) == 0
