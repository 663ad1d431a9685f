"""Stored results: JSON lines, the stamp of a run and then its records; the last record of a measurement stands."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch

from .gate import is_right
from .measure import stamp

FOLDER = Path(__file__).parent / "results"
# What makes two records the same measurement.
KEY = ("group", "head", "pairs", "positions", "prompt", "padded", "dtype", "kind", "peer", "device", "V", "data")


def key_of(record: Mapping[str, object]) -> tuple:
    return tuple(record.get(name) for name in KEY)


def _lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def append(group: str, records: Iterable[Mapping[str, object]], folder: Path = FOLDER) -> None:
    """Add `records` to the file of `group`, under this run's stamp."""
    folder.mkdir(exist_ok=True, parents=True)
    path = folder / f"{group}.jsonl"
    stamps = [line["stamp"] for line in _lines(path) if "stamp" in line]
    lines = [] if stamps and stamps[-1] == stamp() else [{"stamp": stamp()}]
    for record in records:
        lines.append({k: float(f"{v:.6g}") if isinstance(v, float) else v for k, v in record.items() if k != "seconds"})
    with open(path, "a") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)


def load(group: str, folder: Path = FOLDER) -> list[dict]:
    """The records of `group` with their stamps, each measurement once, the newest last; [] where nothing was measured.

    What was timed under a wider gate than today's is judged by today's: it loses its time.
    """
    latest: dict[tuple, dict] = {}
    now: dict[str, object] = {}
    for line in _lines(folder / f"{group}.jsonl"):
        if "stamp" in line:
            now = line["stamp"]
            continue
        record = _judged({"group": group, **now, **line})
        # Out first: what is measured again is the newest, and stands last.
        latest.pop(key_of(record), None)
        latest[key_of(record)] = record
    return [_with_ratio(record, latest) for record in latest.values()]


def _judged(record: dict) -> dict:
    """The record; without its time, and "wrong", where its errors are beyond the limits of today."""
    errors = tuple(record.get(name) for name in ("error_loss", "error_dx", "error_dw"))
    if "median" not in record or errors[0] is None or is_right(errors, getattr(torch, record["dtype"])):
        return record
    times = ("median", "q20", "q80", "least", "ratio")
    return {**{name: value for name, value in record.items() if name not in times}, "status": "wrong"}


def _with_ratio(record: dict, latest: Mapping[tuple, dict]) -> dict:
    """The record with how many times as long TRL took, by the medians that stand in the same table; without, if none.

    Not as stored: another TRL may have been measured since.
    """
    names = ("trl", "trl orpo")
    trl = next((b for name in names if (b := latest.get(key_of({**record, "peer": name})))), {})
    record = {name: value for name, value in record.items() if name != "ratio"}
    return {**record, "ratio": trl["median"] / record["median"]} if {"median"} <= trl.keys() & record.keys() else record


def one_machine(records: list[dict], by: Callable[[dict], object] = lambda r: r["dtype"]) -> list[dict]:
    """The records of one machine for each value of `by`: that which has most cases, of two with as many the last.

    A machine without instructions for bfloat16 measures float32 alone.
    """

    def cases(part: list[dict]) -> int:
        # Not its rows: one machine may have been measured with more peers.
        return len({tuple(r.get(name) for name in KEY if name != "peer") for r in part})

    shown = []
    for value in dict.fromkeys(map(by, records)):
        part = [r for r in records if by(r) == value]
        machines = [[r for r in part if r["device"] == d] for d in dict.fromkeys(r["device"] for r in part)]
        shown += max(reversed(machines), key=cases)
    return shown
