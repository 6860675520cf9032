"""Bad files and bad options end in one line with status 2 and leave nothing behind; strange but good ones work."""

import json
import math
import os
import re
from pathlib import Path

import pytest
import torch
from helpers import changed

import data
import r2d

TINY = "--limit 48 --stage1-steps 2 --stage2-steps 4 --eval-every 4 --batch-size 4 --width 16 --heads 2 --layers 1"
TINY = [*TINY.split(), "--vocab-size", "400", "--max-source", "128", "--max-target", "24"]
RECORDS = [
    {"question": f"Question {i}?", "label": ["yes", "no"][i % 2], "rationale": f"Reason {i}."} for i in range(30)
]
COLUMNS = ("question", "label", "rationale")
POSIX = pytest.mark.skipif(os.name == "nt", reason="no such files there")
# A remedy: what follows a semicolon; for options, also a message that says itself what would be right
MEND = "; |must be (between|a multiple)|must not pass|needs --|give |(is|are) for --|only --|not together|endpoint like"


def jsonl(rows: list) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def as_csv(rows: list[dict], end: str = "\n") -> str:
    quoted = [",".join('"' + row[c].replace('"', '""') + '"' for c in COLUMNS) for row in rows]
    return end.join([",".join(COLUMNS), *quoted, ""])


def pubmedqa() -> dict:
    return {
        str(100 + i): {
            "QUESTION": f"Does drug {i} help?", "CONTEXTS": [f"Aim {i}.", f"Result {i}."],
            "final_decision": ["yes", "no", "maybe"][i % 3], "LONG_ANSWER": f"It helps {i}.",
        } for i in range(30)
    }  # fmt: skip


def bioasq() -> dict:
    questions = [
        {
            "type": "yesno", "body": f"Is gene {i} bad?", "exact_answer": ["yes", "no"][i % 2],
            "ideal_answer": [f"Gene {i} is."], "snippets": [{"text": f"Snippet {i}."}],
        } for i in range(30)
    ]  # fmt: skip
    return {"questions": questions}


def write(path: Path, content: object) -> Path:
    content = content if isinstance(content, str | bytes) else json.dumps(content)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def snapshot(folder: Path) -> dict[str, bytes | None]:
    return {str(path): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def refused(capsys, folder: Path, arguments: list[str], *named: str, data_file: bool = False) -> None:
    """Status 2; one line on stderr with what is named and a remedy; nothing printed, made or changed."""
    before = snapshot(folder)
    status = r2d.main(arguments)
    printed, message = capsys.readouterr()
    assert status == 2
    assert message.startswith("r2d.py: ") and message.endswith("\n") and len(message.splitlines()) == 1, message
    assert [part for part in named if part not in message] == [], message
    assert re.search(";" if data_file else MEND, message), f"no remedy: {message}"
    assert not (data_file and "free some space" in message), f"the remedy for --out: {message}"
    assert len(message) < 1500 and printed == ""
    assert snapshot(folder) == before


# ---------------------------------------------------------------------------------------------------------------------
# Bad files. name: (file, content, what the message must name beside the file)

# Values that are no text, as they stand in JSON
NO_TEXTS = {
    "null": "null", "int": "3", "float": "1.5", "true": "true", "NaN": "NaN", "Infinity": "-Infinity",
    "1e999": "1e999", "list": "[]", "list of text": '["a"]', "object": "{}", "deep object": '{"a": {"b": "c"}}',
    "4000 digits": "9" * 4000,
}  # fmt: skip
TEXTS = dict.fromkeys(COLUMNS, '"x"')


def raw(record: dict[str, str]) -> str:
    return "{" + ", ".join(f'"{key}": {value}' for key, value in record.items()) + "}"


def without(record: dict, key: str) -> dict:
    return {name: value for name, value in record.items() if name != key}


# One bad record: as line 3 of JSONL and as record 3 of an array
RECORD_FAULTS = {f"{c} is {name}": (raw(TEXTS | {c: v}), f"'{c}'") for c in COLUMNS for name, v in NO_TEXTS.items()}
RECORD_FAULTS |= {f"no {c}": (raw(without(TEXTS, c)), f"no '{c}'") for c in COLUMNS}
RECORD_FAULTS |= {f"{c} capital": (raw(TEXTS).replace(c, c.upper()), f"no '{c}'") for c in COLUMNS}
RECORD_FAULTS |= {f"{c} half": (raw(TEXTS | {c: r'"\ud83d"'}), "half a character") for c in COLUMNS}
RECORD_FAULTS |= {f"{c} half 2": (raw(TEXTS | {c: r'"a\udc00\ud800"'}), "half a character") for c in COLUMNS}
for column in ("question", "label"):
    for blank in ("", " ", r"\t\n", r"\u00a0\u2003", r"\u0085\u2028"):
        fault = raw(TEXTS | {column: f'"{blank}"'})
        RECORD_FAULTS[f"{column} blank {blank}"] = fault, f"'{column}' is empty"
for value in ("null", "3", '"text"', "[]", '["q", "yes", "r"]', "true", "NaN", "{}"):
    RECORD_FAULTS[f"record is {value}"] = value, "question"

# One bad line of JSONL, which as a part of an array would be another fault
LINE_FAULTS = {f"{c} twice": raw(TEXTS)[:-1] + f', "{c}": "y"}}' for c in COLUMNS}
LINE_FAULTS |= {
    "key twice inside": raw(TEXTS | {"more": '{"a": 1, "a": 2}'}),
    "cut in a text": raw(TEXTS)[:-3],
    "cut before the brace": raw(TEXTS)[:-1],
    "cut after a key": '{"question"',
    "one brace": "{",
    "trailing comma": raw(TEXTS)[:-1] + ",}",
    "comma after": raw(TEXTS) + ",",
    "single quotes": raw(TEXTS).replace('"', "'"),
    "no quotes at keys": raw(TEXTS).replace('"question"', "question"),
    "typographic quotes": raw(TEXTS).replace('"x"', "“x”"),
    "comment": "// a comment",
    "comment after": raw(TEXTS) + " // a comment",
    "hash comment": "# a comment",
    "two objects": raw(TEXTS) + raw(TEXTS),
    "two objects and a space": f"{raw(TEXTS)} {raw(TEXTS)}",
    "no comma": raw(TEXTS).replace('"x", ', '"x" ', 1),
    "no colon": raw(TEXTS).replace(":", "", 1),
    "Python's None": raw(TEXTS | {"more": "None"}),
    "Python's True": raw(TEXTS | {"more": "True"}),
    "hexadecimal": raw(TEXTS | {"more": "0x10"}),
    "leading zero": raw(TEXTS | {"more": "007"}),
    "plus": raw(TEXTS | {"more": "+1"}),
    "control character": raw(TEXTS | {"question": '"a\x01b"'}),
    "raw tab": raw(TEXTS | {"question": '"a\tb"'}),
    "NUL in a text": raw(TEXTS | {"question": '"a\0b"'}),
    "NUL after": raw(TEXTS) + "\0",
    "NUL alone": "\0\0\0",
    "raw line end": raw(TEXTS | {"question": '"a\nb"'}),
    "raw CR": raw(TEXTS | {"question": '"a\rb"'}),
    "bad escape": raw(TEXTS | {"question": r'"\x41"'}),
    "short escape": raw(TEXTS | {"question": r'"\u12"'}),
    "BOM within": "\ufeff" + raw(TEXTS),
    "deep": raw(TEXTS | {"more": "[" * 100_000 + "]" * 100_000}),
    "deep objects": raw(TEXTS | {"more": '{"a":' * 100_000 + "1" + "}" * 100_000}),
    "deep and cut": "[" * 100_000,
    "5000 digits": raw(TEXTS | {"more": "1" * 5000}),
    "prose": "Dear reader, this is no data.",
    "CSV": "q,yes,r",
    "backslash": "\\",
}

JSONL = jsonl(RECORDS).splitlines(keepends=True)
CASES = {}
for name, (record, what) in RECORD_FAULTS.items():
    CASES[f"jsonl, {name}"] = "d.jsonl", "".join([*JSONL[:2], record, "\n", *JSONL[3:]]), ["line 3", what]
    CASES[f"array, {name}"] = "d.json", f"[{JSONL[0]}, {JSONL[1]}, {record}, {JSONL[3]}]", ["record 3", what]
for name, line in LINE_FAULTS.items():
    CASES[f"jsonl, {name}"] = "d.jsonl", "".join([*JSONL[:2], line, "\n", *JSONL[3:]]), ["line 3"]
    CASES[f"jsonl, last, {name}"] = "d.jsonl", "".join([*JSONL, "\n", line]), ["line 32"]

HEADER = ",".join(COLUMNS) + "\n"
CASES |= {f"jsonl, first line {name}": ("d.jsonl", line + "\n" + "".join(JSONL), ["line"])
          for name, line in LINE_FAULTS.items() if not name.startswith(("deep", "BOM"))}  # fmt: skip
CASES |= {
    "empty": ("d.jsonl", b"", ["empty"]),
    "blank": ("d.jsonl", b" \t\r\n\n ", ["empty"]),
    "BOM alone": ("d.jsonl", b"\xef\xbb\xbf", ["empty"]),
    "BOM and blank": ("d.csv", b"\xef\xbb\xbf\n", ["empty"]),
    "NULs": ("d.jsonl", bytes(100), ["d.jsonl: line 1"]),
    "latin-1 jsonl": ("d.jsonl", jsonl([{"question": "café"}]).encode("latin-1"), ["byte 17", "UTF-8"]),
    "latin-1 csv": ("d.csv", (HEADER + "café,a,r\n").encode("latin-1"), ["byte 28", "UTF-8"]),
    "windows quotes": ("d.csv", (HEADER + "“q”,a,r\n").encode("cp1252"), ["byte 25", "UTF-8"]),
    "utf-16": ("d.jsonl", "".join(JSONL).encode("utf-16"), ["byte 0", "UTF-8"]),
    "utf-16 csv": ("d.csv", as_csv(RECORDS).encode("utf-16"), ["byte 0", "UTF-8"]),
    "utf-16-le without a mark": ("d.jsonl", "".join(JSONL).encode("utf-16-le"), ["not valid JSON"]),
    "utf-16-be without a mark": ("d.jsonl", "".join(JSONL).encode("utf-16-be"), ["line 1"]),
    "utf-32": ("d.jsonl", "".join(JSONL).encode("utf-32"), ["UTF-8"]),
    "surrogates as bytes": ("d.jsonl", b'{"question": "\xed\xa0\x80"}', ["byte 14", "UTF-8"]),
    "overlong": ("d.jsonl", b'{"question": "\xc0\x80"}', ["byte 14", "UTF-8"]),
    "cut in a character": ("d.jsonl", "".join(JSONL).encode() + "é".encode()[:1], ["UTF-8"]),
    "png": ("d.jsonl", b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR", ["byte 0", "UTF-8"]),
    "gzip": ("d.jsonl.gz", b"\x1f\x8b\x08\0\0\0\0\0\0\x03", ["byte 1", "UTF-8"]),
    "zip, xlsx": ("d.xlsx", b"PK\x03\x04\x14\0\x06\0\x08\0!\0", ["line 1"]),
    "parquet": ("d.parquet", b"PAR1\x15\x04\x15\x80\x01\x15", ["UTF-8"]),
    "all bytes": ("d.bin", bytes(range(256)), ["UTF-8"]),
    "xml": ("d.xml", "<questions><q>a</q></questions>", ["line 1: no column 'question'"]),
    "yaml": ("d.yaml", "- question: a\n  label: b\n  rationale: c\n", ["line 1: no column 'question'"]),
    "prose": ("d.txt", "Dear reader,\nthis is no data.\n", ["line 1: no column 'question'"]),
    "scalar": ("d.json", "3", ["line 1"]),
    "text": ("d.json", '"question,label,rationale"', ["line 1"]),
    "null": ("d.json", "null", ["line 1"]),
    "empty object": ("d.json", "{}", ["no 'question'"]),
    "empty array": ("d.json", "[]", ["the train split is empty"]),
    "array of arrays": ("d.json", '[["q", "a", "r"]]', ["record 1"]),
    "array of texts": ("d.json", '["q", "a", "r"]', ["record 1"]),
    "array in an array": ("d.json", f"[[{raw(TEXTS)}]]", ["record 1"]),
    "array cut": ("d.json", json.dumps(RECORDS)[:-1], ["not valid JSON"]),
    "array cut within": ("d.json", json.dumps(RECORDS, indent=1)[:200], ["not valid JSON", "line"]),
    "array and a comma": ("d.json", json.dumps(RECORDS)[:-1] + ",]", ["not valid JSON"]),
    "array and more": ("d.json", json.dumps(RECORDS) + "]", ["not valid JSON"]),
    "two arrays": ("d.json", json.dumps(RECORDS) * 2, ["not valid JSON"]),
    "lines of arrays": ("d.jsonl", '["q", "a", "r"]\n' * 20, ["not valid JSON"]),
    "concatenated": ("d.jsonl", "".join(JSONL).replace("\n", ""), ["line 1: not valid JSON"]),
    "concatenated with commas": ("d.jsonl", ",".join(JSONL).replace("\n", ""), ["line 1: not valid JSON"]),
    "columns": ("d.json", {c: [r[c] for r in RECORDS] for c in COLUMNS}, ["'question' must be text"]),
    "wrapped": ("d.json", {"data": RECORDS}, ["no 'question'"]),
    "one record": ("d.json", RECORDS[0], ["split is empty"]),
    "nine records": ("d.jsonl", "".join(JSONL[:9]), ["the val split is empty"]),
    "array key twice": ("d.json", '[{"question": "a", "question": "b"}]', ["a key occurs twice"]),
    "array of 5000 digits": ("d.json", "[" + "1" * 5000 + "]", ["number too long"]),
    "array deep": ("d.json", "[" * 100_000 + "]" * 100_000, ["nested too deeply"]),
}  # fmt: skip

# CSV
ROW, ROWS = "q,yes,r\n", "q,yes,r\np,no,r\n" * 10
for i, column in enumerate(COLUMNS):
    names = [name for name in COLUMNS if name != column]
    CASES |= {
        f"csv, no {column}": ("d.csv", ",".join(names) + "\nx,y\n", ["line 1", f"no column '{column}'"]),
        f"csv, {column} twice": ("d.csv", HEADER.strip() + f",{column}\nq,yes,r,x\n", ["line 1", "occurs twice"]),
        f"csv, {column} capital": ("d.csv", HEADER.replace(column, column.title()) + ROWS, ["line 1", f"'{column}'"]),
        f"csv, {column} spaced": ("d.csv", HEADER.replace(column, f" {column}") + ROWS, ["line 1", f"'{column}'"]),
        f"csv, {column} in single quotes": ("d.csv", HEADER.replace(column, f"'{column}'") + ROWS, ["line 1"]),
        f"csv, {column} with NUL": ("d.csv", HEADER.replace(column, f"{column}\0") + ROWS, ["line 1"]),
        f"csv, quote not closed in {column}": (
            "d.csv", HEADER + ROWS + ROW.replace("qyr"[i], '"' + "qyr"[i]), ["line 22"]),
        f"csv, text after a quote in {column}": (
            "d.csv", HEADER + ROWS + "x,x,x\n".replace("x", '"a"b', i + 1), ["line 22", "quote"]),
    }  # fmt: skip
CASES |= {
    "csv, two marks": ("d.csv", b"\xef\xbb\xbf" * 2 + (HEADER + ROWS).encode(), ["line 1", "no column 'question'"]),
    "csv, header only": ("d.csv", HEADER, ["the train split is empty"]),
    "csv, header and empty lines": ("d.csv", HEADER + "\n\n", ["the train split is empty"]),
    "csv, no header": ("d.csv", ROWS, ["line 1", "no column 'question'"]),
    "csv, line before the header": ("d.csv", "sep=,\n" + HEADER + ROWS, ["line 1", "no column 'question'"]),
    "csv, header cut": ("d.csv", '"question,label,rationale\n' + ROWS, ["d.csv: line"]),
    "csv, header with one quote": ("d.csv", 'question,"label,rationale\n' + ROWS, ["d.csv: line"]),
    "csv, nothing for label": ("d.csv", HEADER + ROWS + "q,,r\n", ["line 22", "'label' is empty"]),
    "csv, nothing for question": ("d.csv", HEADER + ROWS + ",yes,r\n", ["line 22", "'question' is empty"]),
    "csv, blank label": ("d.csv", HEADER + ROWS + 'q," \t",r\n', ["line 22", "'label' is empty"]),
    "csv, commas alone": ("d.csv", HEADER + ROWS + ",,\n", ["line 22", "'question' is empty"]),
    "csv, more": ("d.csv", HEADER + ROW + "q, and,yes,r\n" + ROWS, ["line 3", "more fields"]),
    "csv, comma at the end": ("d.csv", HEADER + ROW + "q,yes,r,\n" + ROWS, ["line 3", "more fields"]),
    "csv, fewer": ("d.csv", HEADER + ROW + "q,yes\n" + ROWS, ["line 3", "fewer fields"]),
    "csv, one field": ("d.csv", HEADER + ROW + "q\n" + ROWS, ["line 3", "fewer fields"]),
    "csv, last line cut": ("d.csv", HEADER + ROWS + "q,y", ["line 22", "fewer fields"]),
    "csv, line end without quotes": ("d.csv", HEADER + ROW + "q\nq,yes,r\n" + ROWS, ["line 3", "fewer fields"]),
    "csv, line after a long field": ("d.csv", HEADER + '"q\nq\nq",yes,r\nq,yes\n', ["line 5", "fewer fields"]),
    "csv, typographic quotes": ("d.csv", HEADER + ROW + "“q, and”,yes,r\n", ["line 3", "more fields"]),
    "csv, single quotes": ("d.csv", HEADER + ROW + "'q, and',yes,r\n", ["line 3", "more fields"]),
    "csv, backslash quotes": ("d.csv", HEADER + ROW + '"say \\"a\\"",yes,r\n', ["line 3"]),
    "csv, quote swallows rows": ("d.csv", HEADER + 'q,yes,"r\n' + ROWS, ["d.csv: line"]),
    "csv, fewer after empty lines": ("d.csv", HEADER + ROW + "\n\n" + "q,yes\n" + ROWS, ["line 5", "fewer fields"]),
    "csv, label empty after an empty line": ("d.csv", HEADER + "\n" + "q,,r\n", ["line 3", "'label' is empty"]),
    "csv, empty line before the header": ("d.csv", "\n" + HEADER + ROWS, ["line 1", "no column 'question'"]),
    "csv, more columns named": ("d.csv", HEADER.strip() + ",id\n" + ROWS, ["line 2", "fewer fields"]),
} | {
    f"csv, delimiter {c!r}": ("d.csv", (HEADER + ROWS).replace(",", c), ["line 1", "no column 'question'"])
    for c in (";", "\t", "|", " ", ":", "，")
}  # fmt: skip
CASES["csv, comma and space"] = "d.csv", (HEADER + ROWS).replace(",", ", "), ["line 1", "no column 'label'"]


# PubMedQA and BioASQ
WRONG = {"null": None, "int": 3, "true": True, "object": {"a": "b"}, "list": [1], "NaN": math.nan}
for key in ("QUESTION", "CONTEXTS", "final_decision", "LONG_ANSWER"):
    CASES[f"pubmedqa, no {key}"] = "d.json", pubmedqa() | {"103": without(pubmedqa()["103"], key)}, ["id 103", key]
    for name, value in WRONG.items():
        CASES[f"pubmedqa, {key} is {name}"] = "d.json", changed(pubmedqa(), "103", key, value=value), ["id 103"]
for name, value in {"text": "abstract", "a number": ["a", 3], "null in it": [None], "lists": [["a"]]}.items():
    CASES[f"pubmedqa, CONTEXTS: {name}"] = "d.json", changed(pubmedqa(), "103", "CONTEXTS", value=value), ["id 103"]
for name, value in WRONG.items():
    if name != "object":
        CASES[f"pubmedqa, record is {name}"] = "d.json", changed(pubmedqa(), "103", value=value), ["103"]
CASES |= {
    "pubmedqa, empty record": ("d.json", changed(pubmedqa(), "103", value={}), ["id 103", "QUESTION"]),
    "pubmedqa, other record": ("d.json", changed(pubmedqa(), "103", value=RECORDS[0]), ["id 103", "QUESTION"]),
    "pubmedqa, lower case": ("d.json", json.dumps(pubmedqa()).replace("QUESTION", "question"), ["id 100", "QUESTION"]),
    "pubmedqa, empty decision": ("d.json", changed(pubmedqa(), "103", "final_decision", value=""), ["id 103", "empty"]),
    "pubmedqa, decision Yes": ("d.json", changed(pubmedqa(), "103", "final_decision", value="Yes"), ["only by case"]),
    "pubmedqa, id twice": ("d.json", json.dumps(pubmedqa()).replace('"104"', '"103"'), ["a key occurs twice"]),
    "pubmedqa, key twice": (
        "d.json", json.dumps(pubmedqa()).replace('"LONG', '"QUESTION": "x", "LONG', 1), ["a key occurs twice"]),
    "pubmedqa, cut": ("d.json", json.dumps(pubmedqa(), indent=1)[:-3], ["not valid JSON", "line"]),
    "pubmedqa, half a character": (
        "d.json", changed(pubmedqa(), "103", "CONTEXTS", value=["\ud800"]), ["id 103", "half a character"]),
    "pubmedqa, id of two lines": ("d.json", changed(pubmedqa(), "10\n3", value={}), ["id 10"]),
    "pubmedqa, records are lists": ("d.json", {key: list(r.values()) for key, r in pubmedqa().items()}, ["question"]),
    "pubmedqa, one decision": (
        "d.json", {k: r | {"final_decision": "yes"} for k, r in pubmedqa().items()}, ["one label, 'yes'"]),
    "pubmedqa, no answers": ("d.json", {k: r | {"LONG_ANSWER": ""} for k, r in pubmedqa().items()}, ["rationale"]),
    "pubmedqa, eight": ("d.json", dict(list(pubmedqa().items())[:8]), ["split is empty"]),
}  # fmt: skip
where = "questions", 4
for name, value in (WRONG | {"text": "x", "empty object": {}}).items():
    bad = {"snippets": ("snippets", value, "")}
    if name != "text":
        bad |= {"body": ("body", value, "'body'"), "answer": ("exact_answer", value, "'label'")}
        bad |= {"ideal answer": ("ideal_answer", value, "rationale"), "first": ("ideal_answer", [value], "rationale")}
        bad |= {"snippet": ("snippets", [{"text": "a"}, {"text": value}], "")}
    for what, (key, it, named) in bad.items():
        CASES[f"bioasq, {what} {name}"] = "d.json", changed(bioasq(), *where, key, value=it), ["question 5", named]
    if name != "list":
        CASES[f"bioasq, questions {name}"] = "d.json", {"questions": value}, ["'questions' must be a list"]
    if name not in ("object", "empty object"):
        CASES[f"bioasq, item {name}"] = "d.json", changed(bioasq(), *where, value=value), ["question 5"]
CASES |= {
    f"bioasq, no {key}": (
        "d.json", changed(bioasq(), "questions", 4, value=without(bioasq()["questions"][4], key)), ["question 5"])
    for key in ("body", "exact_answer")
} | {
    "bioasq, empty": ("d.json", {"questions": []}, ["the train split is empty"]),
    "bioasq, no yes/no question": (
        "d.json", {"questions": [{"type": "list", "body": "b"}] * 30}, ["d.json", "split is empty"]),
    "bioasq, blank answer": ("d.json", changed(bioasq(), *where, "exact_answer", value=" "), ["question 5", "empty"]),
    "bioasq, cut": ("d.json", json.dumps(bioasq(), indent=1)[:-3], ["not valid JSON", "line"]),
    "bioasq, key twice": ("d.json", json.dumps(bioasq())[:-1] + ', "questions": []}', ["a key occurs twice"]),
    "bioasq, list without a body": (
        "d.json", {"questions": [*bioasq()["questions"], {"type": "list"}]}, ["question 31", "'body'"]),
}  # fmt: skip

# Labels
for name, (one, other) in {
    "case": ("yes", "Yes"), "capitals": ("yes", "YES"), "inner space": ("go home", "go  home"),
    "tab": ("go home", "go\thome"), "line end": ("go home", "go\nhome"), "no-break space": ("go home", "go\u00a0home"),
    "case and space": ("go home", "Go  Home"), "accents": ("É", "é"), "Greek": ("Σ", "σ"),
}.items():  # fmt: skip
    rows = [r | {"label": ["b", one, other][i % 3]} for i, r in enumerate(RECORDS)]
    CASES[f"labels alike, {name}"] = "d.jsonl", jsonl(rows), ["only by case or spaces", one.lower()]
    rows = [r | {"label": [one, "b"][i % 2]} for i, r in enumerate(RECORDS)]
    CASES[f"one label alike, {name}"] = "d.csv", as_csv([*rows, RECORDS[0] | {"label": other}]), ["only by case"]
CASES |= {
    f"label {name}": ("d.jsonl", jsonl([r | {"label": [label, "b"][i % 2]} for i, r in enumerate(RECORDS)]), [what])
    for name, label, what in [
        ("of 10,000 characters", "x" * 10_000, "label"), ("of 10,000 words", "word " * 10_000, "label"),
        ("of 5,000 marks", "♥" * 5_000, "label"), ("with SentencePiece's space", "b▁c", "label"), ("▁", "▁", "label"),
    ]
} | {
    "one label": ("d.jsonl", jsonl([r | {"label": "yes"} for r in RECORDS]), ["one label, 'yes'"]),
    "one label of two lines": ("d.jsonl", jsonl([r | {"label": "a\nb"} for r in RECORDS]), ["one label"]),
    "no rationales": ("d.jsonl", jsonl([r | {"rationale": ""} for r in RECORDS]), ["rationale", "--method sft"]),
    "blank rationales": ("d.csv", as_csv([r | {"rationale": " \t "} for r in RECORDS]), ["rationale", "--method sft"]),
}  # fmt: skip


@pytest.mark.parametrize(("name", "content", "named"), CASES.values(), ids=CASES)
def test_bad_file_is_refused(name, content, named, tmp_path, monkeypatch, capsys):
    """Catches a traceback, a guess, a message without file, place or remedy, and a folder or file left behind."""
    monkeypatch.chdir(tmp_path)
    write(tmp_path / name, content)
    out = tmp_path / "run"
    refused(capsys, tmp_path, [*TINY, "--data", name, "--out", str(out)], f"r2d.py: {name}:", *named, data_file=True)


# ---------------------------------------------------------------------------------------------------------------------
# Bad folders, and PubMedQA beside its ground truth. name: (files: None is a folder, --data, named)

GOOD = dict.fromkeys(["train.jsonl", "val.jsonl", "test.jsonl"], "".join(JSONL))
FOLDERS = {"empty": ({}, ".", ["neither train.jsonl nor train.csv"])}
for split in ("train", "val", "test"):
    file = f"{split}.jsonl"
    both = GOOD | {f"{split}.csv": as_csv(RECORDS)}
    bad = "".join(JSONL) + "{}\n"
    FOLDERS |= {
        f"no {split}": (without(GOOD, file), ".", [f"neither {split}.jsonl nor {split}.csv"]),
        f"{split} twice": (both, ".", [f"both {split}.jsonl and {split}.csv"]),
        f"{split} as .json": (without(GOOD, file) | {f"{split}.json": "[]"}, ".", [f"neither {split}.jsonl"]),
        f"{split} is a folder": (GOOD | {file: None}, ".", [file, "irectory"]),
        f"{split} of no bytes": (GOOD | {file: ""}, ".", [file, "empty"]),
        f"{split} of no records": (GOOD | {file: "[]"}, ".", [f"the {split} split is empty"]),
        f"{split} of a header": (
            without(GOOD, file) | {f"{split}.csv": HEADER},
            ".",
            [f"the {split} split is empty"],
        ),
        f"{split} with a bad line": (GOOD | {file: bad}, ".", [file, "line 31", "no 'question'"]),
        f"{split} not UTF-8": (GOOD | {file: b"\xff\xfe"}, ".", [file, "byte 0"]),
    }
ONE = jsonl([r | {"label": "yes"} for r in RECORDS])
FOLDERS |= {
    "other names": (dict.fromkeys(["training.jsonl", "dev.jsonl", "eval.jsonl"], "[]"), ".", ["neither train.jsonl"]),
    "the folder above": ({f"sub/{name}": text for name, text in GOOD.items()} | {"sub": None}, ".", ["neither train"]),
    "one label in train alone": (GOOD | {"train.jsonl": ONE}, ".", ["one label, 'yes'"]),
    "labels alike in val": (GOOD | {"val.jsonl": ONE.replace("yes", "Yes")}, ".", ["only by case", "'yes'"]),
    "no rationales in train": (
        GOOD | {"train.jsonl": jsonl([r | {"rationale": ""} for r in RECORDS])},
        ".",
        ["no train example has a rationale"],
    ),
}
ORI, TRUTH = "ori_pqal.json", "test_ground_truth.json"
TRUTHS = {
    "no JSON": "yes", "no bytes": "", "cut": '{"100": "yes"', "key twice": '{"100": "yes", "100": "no"}',
    "not UTF-8": b"\xff\xfe{}", "deep": "[" * 100_000, "a folder": None,
    "a list": ["100", "101"], "a text": '"100"', "a number": "3", "null": "null", "empty": {}, "empty list": [],
    "unknown ids": {"7": "yes"}, "ids with a space": {" 100": "yes"},
}  # fmt: skip
FOLDERS |= {f"ground truth: {name}": ({ORI: pubmedqa(), TRUTH: text}, ORI, [TRUTH]) for name, text in TRUTHS.items()}
FOLDERS["ground truth: all ids"] = {ORI: pubmedqa(), TRUTH: dict.fromkeys(pubmedqa(), "yes")}, ORI, [ORI, "the train"]


@pytest.mark.parametrize(("files", "source", "named"), FOLDERS.values(), ids=FOLDERS)
def test_bad_folder_is_refused(files, source, named, tmp_path, monkeypatch, capsys):
    """Catches a split that is guessed, empty or silently left out, and a message that names the wrong file."""
    monkeypatch.chdir(tmp_path)
    for name in sorted(files):
        (tmp_path / name).mkdir() if files[name] is None else write(tmp_path / name, files[name])
    arguments = [*TINY, "--data", str(tmp_path / source), "--out", "run"]
    refused(capsys, tmp_path, arguments, str(tmp_path), *named, data_file=True)


# ---------------------------------------------------------------------------------------------------------------------
# Bad paths.


@pytest.mark.parametrize(
    ("source", "named"),
    [
        ("nowhere.jsonl", "nowhere.jsonl: No such file"), ("nowhere/d.jsonl", "nowhere"), ("d.jsonl/x", "d.jsonl"),
        ("", "train.jsonl"), (".", "train.jsonl"), ("..", "train.jsonl"), (" ", "No such file"), ("~", "~"),
        ("Triage", "Triage"), ("triage ", "triage"), ("http://host/d.jsonl", "host"), ("*.jsonl", "*.jsonl"),
        pytest.param("/dev/null", "/dev/null: the file is empty", marks=POSIX),
        pytest.param("loop", "loop", marks=POSIX), pytest.param("dangling", "dangling: No such file", marks=POSIX),
        pytest.param("x" * 300, "--data", marks=POSIX),
    ],
)  # fmt: skip
def test_bad_path_is_refused(source, named, tmp_path, monkeypatch, capsys):
    """Catches a traceback for what is no file, and a remedy for --out where --data is wrong."""
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    write(folder / "d.jsonl", "".join(JSONL))
    if os.name != "nt":
        (folder / "loop").symlink_to("loop")
        (folder / "dangling").symlink_to("gone")
    refused(capsys, tmp_path, [*TINY, "--data", source, "--out", "run"], named, data_file=True)


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="root may read everything")
@pytest.mark.parametrize("name", ["d.jsonl", "folder", "folder/d.jsonl"])
def test_path_without_permission_is_refused(name, tmp_path, monkeypatch, capsys):
    """Catches a traceback, or a remedy for --out, where the user may not read."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    for file in ("d.jsonl", "folder/d.jsonl"):
        write(tmp_path / file, "".join(JSONL))
    for locked in ("d.jsonl", "folder"):
        (tmp_path / locked).chmod(0)
    status, message = r2d.main([*TINY, "--data", name, "--out", "run"]), capsys.readouterr().err
    (tmp_path / "folder").chmod(0o700)
    assert status == 2 and message.count("\n") == 1 and name in message
    assert "--data" in message or "needs one of them" in message
    assert not (tmp_path / "run").exists()


# ---------------------------------------------------------------------------------------------------------------------
# Bad options. Each is appended to good ones; the message must name it.

# option: a value below its range, one above
RANGES = {
    "warmup": ("-0.01", "1.01"), "ramp": ("-0.01", "1.01"), "cap": ("-0.01", "1.01"), "alpha": ("-0.01", "1.01"),
    "dropout": ("-0.01", "1"), "lr": ("0", "1.01"), "stage1-steps": ("0", "1000000001"),
    "stage2-steps": ("0", "1000000001"), "batch-size": ("0", "1000001"), "eval-every": ("0", "1000000001"),
    "width": ("2", "100002"), "layers": ("0", "1001"), "heads": ("0", "1001"), "vocab-size": ("399", "1000001"),
    "seed": ("-1", "2147483649"), "max-source": ("31", "100001"), "max-target": ("1", "100001"),
    "limit": ("0", "1000000001"),
}  # fmt: skip
REAL = ("warmup", "ramp", "cap", "alpha", "dropout", "lr")
CHOICES = {
    "stage": ["0", "3", "2.0", "two"], "method": ["R2D", "r2d ", "bert"], "schedule": ["Linear", "cosine", "inverse"],
    "rationales": ["gpt", "LLM", "nurses"], "stage1-rationales": ["gpt", "Post"], "device": ["gpu", "CPU", "cuda:0"],
}  # fmt: skip
OPTIONS = [([f"--{name}", value], f"--{name}") for name, pair in RANGES.items() for value in pair]
for name in RANGES:
    values = ["x", "nan", "inf", "-inf", "", " ", "1,5", "1;5", "0x10", "1e999", "None", "1 2"]
    values += [] if name in REAL else ["1.5", "1e3", "9" * 400, "²"]
    OPTIONS += [([f"--{name}={value}"], f"--{name}") for value in values]
OPTIONS += [([f"--{name}", value], f"--{name}") for name, some in CHOICES.items() for value in [*some, ""]]
OPTIONS += [([f"--{f.name.replace('_', '-')}"], f"--{f.name.replace('_', '-')}")  # without its value
            for f in r2d.fields(r2d.Options) if not isinstance(f.default, bool)]  # fmt: skip
OPTIONS += [([f"--{name}=1"], f"--{name}") for name in ("eval", "fresh", "no-stage1")]
CHAT, URL = "--llm http://h/v1 --llm-model m", "http://h/v1"
CONFLICTS = {
    "--nonsense": "--nonsense", "--nonsense 3": "--nonsense", "-x": "-x", "--": "", "word": "word", "-": "-",
    "--batch_size 8": "--batch_size", "--stag 1": "--stag", "--meth sft": "--meth", "--max 32": "--max",
    "--no-stage": "--no-stage", "--learning-rate 1": "--learning-rate", "-lr 0.1": "-lr", "--LR 0.1": "--LR",
    "--warmup 0.6 --ramp 0.6": "--ramp", "--warmup 1 --ramp 0.01": "--ramp", "--ramp 0.96": "--warmup",
    "--heads 3": "--heads", "--width 18 --heads 4": "--width", "--heads 32": "--heads",
    "--eval --ask x": "--ask", "--eval --fresh": "--fresh", "--ask x --fresh": "--fresh",
    "--eval --ask x --fresh": "--eval", "--ask ''": "--ask", "--ask ' '": "--ask",
    "--eval": "stage2.pt", "--ask x": "stage2.pt",
    "--data d.jsonl --rationales nurse": "--rationales", "--data d.jsonl --rationales post": "--rationales",
    "--data d.jsonl --stage1-rationales nurse": "--stage1-rationales",
    "--method zeroshot": "--llm", "--method zeroshot --llm http://h/v1": "--llm-model",
    "--method zeroshot --llm-model m": "--llm", f"--method zeroshot {CHAT} --stage 1": "--stage",
    f"--method zeroshot {CHAT} --ask x": "--ask", f"--method zeroshot {CHAT} --init x": "--init",
    "--method zeroshot --llm h:80 --llm-model m": "h:80", "--method zeroshot --llm '' --llm-model m": "--llm",
    CHAT: "--llm", "--llm http://h/v1": "--llm", "--llm-model m": "--llm-model",
    "--judge http://h/v1": "--judge-model", "--judge-model m": "--judge",
    "--judge http://h/v1 --judge-model m --method sft": "--judge",
    "--judge http://h/v1 --judge-model m --stage 1": "--judge",
    "--judge http://h/v1 --judge-model m --ask x": "--judge", "--judge '' --judge-model m": "--judge",
    "--judge h --judge-model m": "h:", "--judge ftp://h --judge-model m": "ftp",
    "--judge 'http://h h/v1' --judge-model m": "h h", "--judge http://h:99999/v1 --judge-model m": "99999",
    "--judge http:///v1 --judge-model m": "http:///v1", "--judge file:///etc/passwd --judge-model m": "file",
    "--judge http://me:secret@h/v1 --judge-model m": "not an endpoint",
    "--bertscore nowhere": "--bertscore", "--bertscore d.jsonl": "--bertscore", "--bertscore ''": "--bertscore",
    "--bertscore folder": "spiece.model", "--seeds 1 2": "--seeds",
    "--init nowhere --heads 2": "--init", "--device 'cuda '": "--device",
    "--compare bert": "bert", "--compare ''": "--method", "--compare R2D": "R2D",
    "--compare r2d,colour=red": "colour", "--compare r2d,lr": "--lr", "--compare r2d,lr=2": "--lr",
    "--compare r2d,lr=fast": "--lr", "--compare r2d,out=x": "out", "--compare r2d,seed=1": "seed",
    "--compare r2d,help": "r2d,help", "--compare sft r2d,ramp=1": "--ramp", "--compare r2d,eval": "eval",
    "--compare r2d --seed 1": "--seed", "--compare r2d --method sft": "--method", "--compare r2d --ask x": "--ask",
    "--compare r2d --stage 1": "--stage", "--compare r2d --seeds x": "--seeds", "--compare r2d --seeds -1": "--seed",
    "--compare r2d --seeds 1.5": "--seeds", "--compare zeroshot": "--llm",
    "--out d.jsonl": "d.jsonl", "--out d.jsonl/run": "d.jsonl", "--out d.jsonl/a/b": "d.jsonl",
    "--out d.jsonl --fresh": "d.jsonl", "--out d.jsonl --eval": "stage2.pt",
    "--max-target 2": "--max-target",
}  # fmt: skip
OPTIONS += [(re.findall(r"'[^']*'|\S+", text), named) for text, named in CONFLICTS.items()]
OPTIONS = [([a[1:-1] if a[:1] == "'" else a for a in arguments], named) for arguments, named in OPTIONS]
OPTIONS += [(["--nonsense", "two\nlines"], "two lines"), (["--lr", "two\r\nlines"], "--lr"), (["\x85"], "arguments")]
OPTIONS += [(["--" + "x" * 1000], "--xxx"), (["--method", "\ud800"], "--method"), (["--out", "x" * 300], "xxx")]


@pytest.mark.parametrize(
    ("arguments", "named"), OPTIONS, ids=lambda value: ascii(" ".join(value)[:50]) if isinstance(value, list) else ""
)
def test_bad_option_is_refused(arguments, named, tmp_path, monkeypatch, capsys):
    """Catches a traceback, a default taken instead, an option not named, and training that begins in spite of it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    write(tmp_path / "d.jsonl", "".join(JSONL))
    (tmp_path / "folder").mkdir()
    if arguments == ["--"]:
        arguments, named = ["--", "--lr", "0.1"], "--lr"
    refused(capsys, tmp_path, [*TINY, "--out", "run", *arguments], named)


@pytest.mark.parametrize("folder", ["", "nowhere", "d.jsonl", "empty"])
def test_bad_init_is_refused(folder, tmp_path, monkeypatch, capsys):
    """Catches random weights in place of a checkpoint that is not there: an unset shell variable, a typing error."""
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "d.jsonl", "".join(JSONL))
    (tmp_path / "empty").mkdir()
    options = "--limit 20 --stage1-steps 1 --stage2-steps 1 --batch-size 2 --eval-every 1 --max-target 24".split()
    refused(capsys, tmp_path, [*options, "--data", "d.jsonl", "--out", "run", "--init", folder], folder or "--init")


@pytest.mark.parametrize("device", ["cuda", "mps"])
def test_missing_device_is_refused(device, tmp_path, monkeypatch, capsys):
    """Catches a traceback on a machine without the accelerator that was asked for."""
    module = getattr(torch, device)
    monkeypatch.setattr(module, "is_available", lambda: False)
    refused(capsys, tmp_path, [*TINY, "--out", str(tmp_path / "run"), "--device", device], "--device", device)


def test_no_key_is_shown(tmp_path, monkeypatch, capsys):
    """Catches a key that reaches the screen, from the URL or from the variable."""
    for url, key in (("http://me:secret@h/v1", ""), ("http://h/v1", "secret key"), ("http://h/v1", "sécret")):
        monkeypatch.setenv("R2D_API_KEY", key)
        status = r2d.main([*TINY, "--out", str(tmp_path / "run"), "--judge", url, "--judge-model", "m"])
        message = capsys.readouterr().err
        assert status == 2 and len(message.splitlines()) == 1 and "cret" not in message, message


# --- a folder of a run that is not one

CONFIGS = {
    "empty": "", "no JSON": "x", "list": "[]", "object": "{}", "number": "3", "null": "null", "not UTF-8": b"\xff",
    "deep": "[" * 100_000, "5000 digits": "1" * 5000, "surrogate": '"\\ud800"', "cut": '{"stage": 2, "method": "r2',
}  # fmt: skip


@pytest.mark.parametrize("arguments", [[], ["--eval"], ["--ask", "x"]], ids=["train", "eval", "ask"])
@pytest.mark.parametrize("content", CONFIGS.values(), ids=CONFIGS)
def test_damaged_config_is_refused(content, arguments, tmp_path, capsys):
    """Catches a traceback, and a folder that is written over, where --out holds something else than a run."""
    (tmp_path / "run").mkdir()
    write(tmp_path / "run" / "config.json", content)
    write(tmp_path / "run" / "stage2.pt", "")
    refused(capsys, tmp_path, [*TINY, "--out", str(tmp_path / "run"), *arguments], "config.json", "another --out")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("lr", "fast"),
        ("batch_size", "8"),
        ("seed", None),
        ("data", 3),
        ("warmup", [0]),
        ("method", "bert"),
        ("heads", 0),
    ],
)
def test_edited_config_is_refused(key, value, tmp_path, capsys):
    """Catches a traceback, or a run of unknown options, where config.json was edited by hand."""
    out = tmp_path / "run"
    out.mkdir()
    r2d.start(r2d.prepare(r2d.settle_options(r2d.parse_options([*TINY, "--out", str(out)]))))
    config = json.loads((out / "config.json").read_text(encoding="utf-8"))
    write(out / "config.json", config | {key: value})
    refused(capsys, tmp_path, ["--out", str(out)], key if key == "heads" else "config.json")


# ---------------------------------------------------------------------------------------------------------------------
# What is strange and yet must work.

NORMAL = [
    {"question": f"Has fever {i}?", "label": ["home", "clinic"][i % 2], "rationale": f"Fever {i}."} for i in range(16)
]
STRANGE = {
    "one character": "x", "100,000 characters": "many words " * 9091, "100,000 letters": "x" * 100_000,
    "emoji": "🤒🏽👩‍⚕️🇨🇭", "right to left": "حمى شديدة שלום \u202eabc", "combining": "Z" + "\u0301\u0327\u0489" * 40,
"explain": "explain: predict:", "pad": "<pad><pad>", "unknown": "<unk> ⁇", "byte": "<0x41>", "sentinel": "<extra_id_0>",
    "block": "▁", "blocks": "▁▁a▁", "tab": "a\tb", "two lines": "a\r\nb\rc\nd", "line end": "a\nb",
    "separators": "a\u2028b\u2029c\x0bd\x1ce",
    "zero width": "\u200b", "mark": "a\ufeffb", "NUL": "a\0b", "control": "\x1b[2J\x07\x7f", "braces": "{label} {} {0}",
    "percent": "%s %d %(x)s %", "backslash": "\\n \\u0041 \\", "quotes": "\"'`“”", "HTML": "<b>&amp;</b>",
    "private": "\ue000\U000f0000", "no characters": "\uffff\U0010ffff", "spaces": "a" + "   " * 50 + "b",
    "digits": "9" * 5000,
}  # fmt: skip


def prepared(tmp_path: Path, content: object, *arguments: str, name: str = "d.jsonl") -> r2d.Run:
    path = write(tmp_path / name, content)
    given = [*TINY, "--data", str(path), "--out", str(tmp_path / "run"), *arguments]
    return r2d.prepare(r2d.settle_options(r2d.parse_options(given)))


def assert_trains(run: r2d.Run) -> None:
    """Prompts keep head and end within the limit, no token is unknown, the losses of both stages are finite."""
    examples = run.data.train + run.data.val + run.data.test
    for example in examples:
        for head in (data.EXPLAIN, data.PREDICT, data.EXPLAIN_GIVEN.format(label=example.label)):
            ids, start = run.prompts.source(head, example.question), list(run.prompts.ids(head))
            assert len(ids) <= run.options.max_source and ids[: len(start)] == start and ids[-1] == 1
            assert not {0, 1, 2} & set(ids[:-1])
    coin = torch.Generator().manual_seed(0)
    for i in range(0, len(examples), 8):
        one, two = (r2d.gradients(run, stage, 3, examples[i : i + 8], coin, [])["loss"] for stage in (1, 2))
        assert 0 <= one < float("inf") and 0 < two < float("inf")


@pytest.mark.parametrize("text", STRANGE.values(), ids=STRANGE)
def test_strange_text_is_trained_on(text, tmp_path):
    """Catches a question or rationale that breaks tokenizer, prompt or loss, or whose marks act as commands."""
    rows = [row | {"question": text, "rationale": [text, "r"][i % 4 < 2]} for i, row in enumerate(NORMAL)]
    assert_trains(prepared(tmp_path, jsonl(rows + NORMAL)))


PAIRS = [
    ("yes", "yes, but"), ("a, b", 'say "no"'), ('{"label": "x"}', "[1]"), ("{label}", "{0} {}"), ("%s", "%(x)d"),
    ("b\nc", "b"), ("</s>", "<pad>"), ("given label: yes, explain:", "predict:"), ("1", "2"), ("🤒", "🤕"),
    ("null", "true"), ("a/b", "../c"), ("\\", "'"), (".*", "(a|b)+"), ("حمى", "שלום"), ("<unk>", "x\ty"), ("ß", "sz"),
]  # fmt: skip


@pytest.mark.parametrize("pair", PAIRS, ids=ascii)
def test_strange_labels_are_kept_letter_by_letter(pair, tmp_path):
    """Catches a label that is formatted, cut, confused with another one it contains, or lost in the tokenizer."""
    rows = [row | {"label": pair[i % 2]} for i, row in enumerate(NORMAL)]
    run = prepared(tmp_path, jsonl(rows))
    assert sorted(run.data.labels) == sorted(pair)
    for label in pair:
        assert run.prompts.tokenizer.decode(run.prompts.target(label)) == label
        text = run.prompts.tokenizer.decode(run.prompts.source(r2d.explain_head("r2d", label), "q"))
        assert text == f"given label: {label}, explain: q"
    assert_trains(run)


def stripped(rows: list[dict]) -> list[dict]:
    return [{column: row[column].strip() for column in COLUMNS} for row in rows]


MIXED = stripped(
    [
        {"question": f"{text[:300]} {i}", "label": PAIRS[1][i % 2], "rationale": text[:300] if i % 3 else ""}
        for i, text in enumerate(STRANGE.values())
    ]
)
PLAIN = [row for row in MIXED if not set(row["question"]) & {"\r", "\0"}]  # CSV has no escapes for these
WORKING = {
    "BOM": (b"\xef\xbb\xbf" + jsonl(MIXED).encode(), MIXED),
    "CRLF": (jsonl(MIXED).replace("\n", "\r\n"), MIXED),
    "CR": (jsonl(MIXED).replace("\n", "\r"), MIXED),
    "array": (json.dumps(MIXED, indent=1), MIXED),
    "CSV": (as_csv(PLAIN), PLAIN),
    "CSV, CRLF, BOM": (b"\xef\xbb\xbf" + as_csv(PLAIN, "\r\n").encode(), PLAIN),
    "CSV, CR": (as_csv(PLAIN, "\r"), PLAIN),
    "CSV, quoted header": (as_csv(PLAIN).replace("question,label", '"question","label"'), PLAIN),
    "NaN in another column": (jsonl([{"id": math.nan, "more": [None], **row} for row in MIXED]), MIXED),
    "the same record often": (jsonl([*MIXED, *MIXED[:1] * 50]), [*MIXED, *MIXED[:1] * 50]),
}


@pytest.mark.parametrize(("content", "rows"), WORKING.values(), ids=WORKING)
def test_strange_file_is_read_whole(content, rows, tmp_path):
    """Catches records lost or texts changed by a mark, line ends, quotes or a value that nobody needs."""
    run = prepared(tmp_path, content, "--limit", "1000")
    found = [vars(example) for example in run.data.train + run.data.val + run.data.test]
    assert sorted(found, key=str) == sorted(rows, key=str)
    assert_trains(run)


def works(tmp_path: Path, path: Path, *arguments: str) -> dict:
    """A whole tiny run; metrics.json."""
    out = tmp_path / "run"
    assert r2d.main([*TINY, "--data", str(path), "--out", str(out), *arguments]) == 0
    return json.loads((out / "metrics.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("method", ["r2d", "sft", "dss"])
@pytest.mark.parametrize("pair", [PAIRS[1], PAIRS[3], PAIRS[4]], ids=ascii)
def test_strange_texts_go_through_a_whole_run(method, pair, tmp_path, capsys):
    """Catches training, evaluation or a table that stumbles over braces, quotes, emoji or missing rationales."""
    rows = [row | {"label": pair[i % 2]} for i, row in enumerate(MIXED)]
    result = works(tmp_path, write(tmp_path / "d.jsonl", jsonl(rows)), "--method", method)
    assert set(result["label"]["per_class"]) == set(pair) and result["label"]["n"] == len(MIXED) // 10
    asked = STRANGE["right to left"] + STRANGE["control"]
    assert r2d.main(["--out", str(tmp_path / "run"), "--ask", asked]) == 0
    assert "label      " in capsys.readouterr().out


def test_no_rationales_at_all_are_enough_for_sft(tmp_path):
    """Catches a baseline that asks for what it does not learn."""
    path = write(tmp_path / "d.csv", as_csv([row | {"rationale": ""} for row in RECORDS]))
    assert "rationale" not in works(tmp_path, path, "--method", "sft")


def test_line_of_ten_megabytes_is_read_and_cut(tmp_path, capsys):
    """Catches a reader or tokenizer with a limit below what a file may hold; the cut is counted."""
    rows = [RECORDS[0] | {"question": "Question  " * 10**6}, *RECORDS]
    run = prepared(tmp_path, jsonl(rows))
    r2d.describe(run)
    assert re.search(r"note: 1 of \d+ (train|val|test) questions are cut at the end", capsys.readouterr().out)
    assert max(len(run.prompts.source("explain:", e.question)) for e in run.data.train) == run.options.max_source


def test_long_questions_of_every_split_are_counted(tmp_path, capsys):
    """Catches a count over train alone, or of characters instead of tokens; the longest label decides."""
    for split, long in (("train", 3), ("val", 2), ("test", 1)):
        rows = [row | {"question": "long " * 20_000} for row in RECORDS[:long]]
        write(tmp_path / f"{split}.jsonl", jsonl(rows + RECORDS[long:20]))
    works(tmp_path, tmp_path)
    printed = capsys.readouterr().out
    for split, long in (("train", 3), ("val", 2), ("test", 1)):
        assert f"note: {long} of 20 {split} questions are cut at the end to fit --max-source 128" in printed


def test_test_questions_in_train_are_counted(tmp_path, capsys):
    """Catches leaked test questions that nobody hears of: white space around them does not hide them."""
    write(tmp_path / "train.csv", as_csv(RECORDS[:20]))
    write(tmp_path / "val.jsonl", jsonl(RECORDS[20:25]))
    write(tmp_path / "test.jsonl", jsonl([row | {"question": f" {row['question']}\n"} for row in RECORDS[17:27]]))
    works(tmp_path, tmp_path)
    printed = capsys.readouterr().out
    assert "note: 3 of 10 test questions also stand in train" in printed and "val questions also" not in printed


def test_label_that_train_lacks_is_still_a_class(tmp_path):
    """Catches a crash, or a class left out of macro-F1, for a label that only test has."""
    write(tmp_path / "train.jsonl", jsonl(RECORDS[:20]))
    write(tmp_path / "val.jsonl", jsonl(RECORDS[20:25]))
    write(tmp_path / "test.jsonl", jsonl([*RECORDS[25:], RECORDS[0] | {"label": "maybe"}]))
    per_class = works(tmp_path, tmp_path)["label"]["per_class"]
    assert set(per_class) == {"yes", "no", "maybe"} and per_class["maybe"]["f1"] == 0


def answered_or_refused(capfd, *arguments: str) -> bool:
    status, message = r2d.main([*arguments]), capfd.readouterr().err
    return status == 0 or (status == 2 and message.startswith("r2d.py: ") and len(message.splitlines()) == 1)


@POSIX
def test_file_name_that_is_not_utf8_works_or_is_refused(tmp_path, capfd):
    """Catches a traceback when the name is written to config.json; Linux allows any bytes in a name."""
    try:
        path = write(tmp_path / "caf\udce9.jsonl", jsonl(RECORDS))
    except OSError:
        pytest.skip("this file system takes UTF-8 names only")
    assert answered_or_refused(capfd, *TINY, "--data", str(path), "--out", str(tmp_path / "run"))


def test_half_a_character_in_ask_is_answered_or_refused(tmp_path, capfd):
    """Catches a traceback from the tokenizer: a terminal that is not UTF-8 makes such arguments."""
    works(tmp_path, write(tmp_path / "d.jsonl", jsonl(RECORDS)))
    capfd.readouterr()
    assert answered_or_refused(capfd, "--out", str(tmp_path / "run"), "--ask", "caf\udce9")
