"""What several test files need: the files of a run as values, and a record with one place changed."""

import json
from pathlib import Path


def read(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def lines(path: Path) -> list:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def stage2_lines(out: Path) -> list[bytes]:
    """So far, of a log that another process is writing; perhaps not there yet, perhaps with half a line at its end."""
    log = out / "log.jsonl"
    return [line for line in log.read_bytes().split(b"\n") if b'"stage": 2' in line] if log.exists() else []


def contents(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(out.iterdir())}


def changed(content: dict, *path: object, value: object) -> dict:
    place = content
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    return content
