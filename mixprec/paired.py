"""Who was right where, kept beside a result.

Two accuracies of the same documents go up and down together, so the difference of two cells is far surer than
either's own accuracy. What statistics.py needs to say so is a bit a document: `correct.json` beside
`result.json`, small enough to commit, made from `samples.parquet` by `keep`.
"""

from __future__ import annotations

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
            bits = {
                task: {
                    "n": len(rows),
                    "correct": np.packbits(rows.correct.to_numpy(bool)).tobytes().hex(),
                }
                for task, rows in samples.groupby("task")
            }
            kept = {"hash": result["hash"], "tasks": bits}
            if _answers(kept, result) is None:
                raise ValueError("samples.parquet and result.json are not of one run")
        except FileNotFoundError:
            continue  # a cell that is being written: result.json comes last
        except (OSError, ValueError, KeyError) as error:
            print(f"{file.parent.relative_to(root)}: {one_line(error)}", file=sys.stderr)
            continue
        target = file.with_name("correct.json")
        if not target.is_file() or json.loads(target.read_text()) != kept:
            write_json(target, kept)


def read(folder: Path, result: dict) -> Answers | None:
    """The answers kept beside `result`; None if there are none, or they are another result's."""
    try:
        kept = json.loads((folder / "correct.json").read_text(encoding="utf-8"))
        answers = _answers(kept, result)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        print(f"{folder}: correct.json cannot be read: {one_line(error)}", file=sys.stderr)
        return None
    if answers is None:
        print(f"{folder}: correct.json is of another result", file=sys.stderr)
    return answers


def _answers(kept: dict, result: dict) -> Answers | None:
    """What `kept` says, if it has the same documents and the same accuracies as `result`."""
    correct = {
        task: np.unpackbits(
            np.frombuffer(bytes.fromhex(row["correct"]), np.uint8), count=row["n"]
        ).astype(bool)
        for task, row in kept["tasks"].items()
    }
    metrics = {task: (metric["n"], metric["acc"]) for task, metric in result["metrics"].items()}
    same = kept["hash"] == result["hash"] and metrics.keys() == correct.keys()
    same = same and all(
        len(right) == metrics[task][0] and abs(right.mean() - metrics[task][1]) < 1e-9
        for task, right in correct.items()
    )
    return Answers(result["provenance"]["documents"], correct) if same else None
