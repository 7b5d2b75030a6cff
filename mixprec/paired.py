"""Who was right where, kept beside a result.

Two accuracies of the same documents go up and down together, so the difference of two cells is far surer than
either's own accuracy. What statistics.py needs to say so is a bit a document: `correct.json` beside
`result.json`, small enough to commit, made from `samples.parquet` by `keep`.
"""

from __future__ import annotations

import hashlib
import json
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from mixprec.store import one_line, write_json


@dataclass(frozen=True)
class Answers:
    """Who was right where: per task, which documents (their hash) and a bool a document, in order."""

    documents: dict[str, str]
    correct: dict[str, np.ndarray]


def keep(root: Path) -> None:
    """Write `correct.json` for every stored cell below `root` whose samples are there."""
    for file in sorted(root.glob("*/*/*/*/samples.parquet")):
        try:
            result = json.loads((file.parent / "result.json").read_text(encoding="utf-8"))
            samples = pd.read_parquet(file, columns=["task", "correct"])
            kept = bits(result["hash"], samples)
            if _answers(kept, result) is None:
                raise ValueError("samples.parquet and result.json are not of one run")
        except FileNotFoundError:
            continue  # a cell that is being written: result.json comes last
        except (OSError, ValueError, KeyError) as error:
            print(f"{file.parent.relative_to(root)}: {one_line(error)}", file=sys.stderr)
            continue
        target = file.with_name("correct.json")
        if target.is_file() and "content_hash" in result:
            continue  # it was stored with the result, which has its hash
        if not target.is_file() or json.loads(target.read_text()) != kept:
            write_json(target, kept)


def bits(result_hash: str, samples: pd.DataFrame) -> dict:
    """correct.json: who was right where, a bit a document, and the hash of the cell it belongs to."""
    tasks = {
        str(task): {
            "n": len(rows),
            "correct": np.packbits(rows.correct.to_numpy(bool)).tobytes().hex(),
        }
        for task, rows in samples.groupby("task")
    }
    return {"hash": result_hash, "tasks": tasks}


def read(folder: Path, result: dict) -> Answers | None:
    """The answers kept beside `result`; None if there are none, or they are another result's."""
    try:
        text = (folder / "correct.json").read_bytes()
        stored = result.get("files", {}).get("correct.json")
        if stored not in (None, hashlib.sha256(text).hexdigest()):
            raise ValueError("it is not what was stored")
        answers = _answers(json.loads(text), result)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        print(f"{folder}: correct.json cannot be read: {one_line(error)}", file=sys.stderr)
        return None
    if answers is None:
        print(f"{folder}: correct.json is of another result", file=sys.stderr)
    return answers


def unpacked(kept: dict) -> dict[str, np.ndarray]:
    """Task -> a bool a document, of what `bits` packed."""
    return {
        task: np.unpackbits(
            np.frombuffer(bytes.fromhex(row["correct"]), np.uint8), count=row["n"]
        ).astype(bool)
        for task, row in kept["tasks"].items()
    }


def _answers(kept: dict, result: dict) -> Answers | None:
    """What `kept` says, if it has the same documents and the same accuracies as `result`."""
    correct = unpacked(kept)
    metrics = {task: (metric["n"], metric["acc"]) for task, metric in result["metrics"].items()}
    same = kept["hash"] == result["hash"] and metrics.keys() == correct.keys()
    same = same and all(
        len(right) == metrics[task][0] and abs(right.mean() - metrics[task][1]) < 1e-9
        for task, right in correct.items()
    )
    return Answers(result["provenance"]["documents"], correct) if same else None
