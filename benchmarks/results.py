"""Stored results: one JSON object a line, appended as they are measured; the last one of a measurement stands."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch

from .gate import is_right

FOLDER = Path(__file__).parent / "results"
# What makes two records the same measurement.
KEY = ("group", "head", "pairs", "positions", "prompt", "padded", "dtype", "kind", "peer", "device", "V", "data")


def key_of(record: Mapping[str, object]) -> tuple:
    return tuple(record.get(name) for name in KEY)


def append(group: str, records: Iterable[Mapping[str, object]], folder: Path = FOLDER) -> None:
    """Add `records` to the file of `group`."""
    folder.mkdir(exist_ok=True, parents=True)
    with open(folder / f"{group}.jsonl", "a") as file:
        for record in records:
            rounded = {k: float(f"{v:.6g}") if isinstance(v, float) else v for k, v in record.items() if k != "seconds"}
            file.write(json.dumps({"group": group, **rounded}) + "\n")


def load(group: str, folder: Path = FOLDER) -> list[dict]:
    """The records of `group`, each measurement once, the newest last; [] where nothing was measured.

    What was timed under a wider gate than today's is judged by today's: it loses its time.
    """
    path = folder / f"{group}.jsonl"
    if not path.exists():
        return []
    latest: dict[tuple, dict] = {}
    for record in map(_judged, map(json.loads, path.read_text().splitlines())):
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


def by_device(records: list[dict]) -> list[list[dict]]:
    """The records of each machine, in the order in which machines were first measured."""
    return [[r for r in records if r["device"] == device] for device in dict.fromkeys(r["device"] for r in records)]


def most_measured(records: list[dict]) -> list[dict]:
    """The records of the machine that has most cases of them; of two that have as many, the one measured last."""

    def cases(part: list[dict]) -> int:
        # Not its rows: one machine may have been measured with more peers.
        return len({tuple(r.get(name) for name in KEY if name != "peer") for r in part})

    return max(reversed(by_device(records)), key=cases)


def shown_in(group: str, stored: dict[str, list[dict]]) -> list[dict]:
    """What a group's picture and the README show: of each dtype one machine, that on which most of it was measured.

    The shares of prompt include the half, which is measured with the heads.
    """
    records = [*(stored["heads"] if group == "prompt_share" else []), *stored[group]]
    shown = []
    # A machine without instructions for bfloat16 measures float32 alone.
    for dtype in dict.fromkeys(r["dtype"] for r in stored[group]):
        device = most_measured([r for r in stored[group] if r["dtype"] == dtype])[0]["device"]
        shown += [r for r in records if (r["dtype"], r["device"]) == (dtype, device)]
    return shown
