"""Text and documents: converted faithfully, chosen reproducibly, and never shared."""

import hashlib
import json
import os
import subprocess
import sys

import pytest
from conftest import CACHE, ROOT, configuration

from mixprec import data, models
from mixprec.cell import FIVE_TASKS, ConfigError
from mixprec.evaluate.tasks import shares, spread, tasks_of


@pytest.fixture(scope="module")
def texts():
    return json.loads((data.packaged_documents(CACHE) / "texts.json").read_text())


@pytest.fixture(scope="module")
def tokenizer():
    model = configuration().model
    return models.load_tokenizer(models.checkpoint(model, CACHE), model)


@pytest.fixture(scope="module")
def loaded():
    tasks = tasks_of(configuration("model.limit=null").eval, CACHE)
    return tasks, tasks.loaded["tasks"]


def test_the_splits_share_no_text(texts):
    grams = {
        name: set().union(*(data.word_grams(t, data.SHARED_WORDS) for t in split))
        for name, split in texts.items()
    }
    assert set(grams) == {"calibration", "selection", "report"}
    assert all(len(split) > 400 for split in texts.values())
    for a in grams:
        for b in grams:
            assert a == b or not grams[a] & grams[b]


def test_neither_calibration_nor_heldout_text_is_in_an_evaluated_document(texts, loaded):
    of_texts = set()
    for split in texts.values():
        for text in split:
            of_texts |= data.word_grams(text, data.SHARED_WORDS)
    for task in loaded[1].values():
        for document in task.eval_docs:
            words = " ".join(str(value) for value in document.values())
            assert not data.word_grams(words, data.SHARED_WORDS) & of_texts


def test_the_splits_are_the_same_in_every_process():
    """Strings hash differently in every process, so a set of them has another order."""
    program = (
        "import sys, json, hashlib; sys.path.insert(0, '.')\n"
        "from mixprec.data import split_texts\n"
        "run = lambda k: ' '.join(f'w{k}-{i}' for i in range(20))\n"
        "pairs = [(run(2 * k), run(2 * k + 1)) for k in range(40)]\n"
        "texts = [t for a, b in pairs for t in (a, b, a + ' ' + b)]  # the third joins the two\n"
        "print(hashlib.sha256(json.dumps(split_texts(texts)).encode()).hexdigest())"
    )
    seen = {
        subprocess.run(
            [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True,
            env={**os.environ, "PYTHONHASHSEED": seed},
        ).stdout
        for seed in "12345"
    }  # fmt: skip
    assert len(seen) == 1


def test_the_packaged_splits_are_these(texts):
    """What every committed KL stands on; a change here makes them incomparable."""
    assert {name: len(split) for name, split in texts.items()} == {
        "calibration": 1524,
        "selection": 552,
        "report": 862,
    }
    assert (
        hashlib.sha256("\n".join(texts["report"]).encode())
        .hexdigest()
        .startswith("585b9c3b8d1d2f69")
    )


def test_overlap_would_be_found():
    joined = data.split_texts(["a b c d e f g h i j k", "x a b c d e f g h i j y", "other"])
    together = [split for split in joined.values() if len(split) >= 2]
    assert together and together[0][0].startswith("a b")


def test_the_five_tasks_are_whole(loaded):
    tasks, by_name = loaded
    sizes = {t: sum(len(by_name[leaf].eval_docs) for leaf in tasks.leaves[t]) for t in FIVE_TASKS}
    assert sizes == {
        "lambada_openai": 5153, "hellaswag": 10042, "piqa": 1838, "winogrande": 1267, "mmlu": 14042,
    }  # fmt: skip
    assert len(tasks.leaves["mmlu"]) == 57


@pytest.mark.parametrize(
    "name", ["piqa", "hellaswag", "winogrande", "lambada_openai", "mmlu_anatomy"]
)
def test_only_the_data_source_of_a_task_is_replaced(name, loaded):
    from lm_eval.tasks._yaml_loader import load_yaml

    tasks, by_name = loaded
    theirs = load_yaml(tasks.manager.task_index[name].yaml_path)
    ours = by_name[name].config
    assert theirs["output_type"] == ours.output_type
    for key in ("doc_to_text", "doc_to_choice", "doc_to_target", "process_docs", "description"):
        if key in theirs:
            mine = getattr(ours, key)
            same_code = getattr(theirs[key], "__code__", 0) == getattr(mine, "__code__", 1)
            assert same_code or mine == theirs[key], key
    assert [m["metric"] for m in ours.metric_list] == [m["metric"] for m in theirs["metric_list"]]
    assert ours.num_fewshot in (None, 0)


def test_lambada_is_put_together_as_lm_eval_takes_it_apart(loaded):
    task = loaded[1]["lambada_openai"]
    document = task.eval_docs[0]
    assert task.doc_to_text(document) + task.doc_to_target(document) == document["text"]
    assert task.doc_to_target(document) == " signs"


def test_calibration_and_heldout_text_are_long_enough_and_repeatable(tokenizer):
    cfg = configuration()
    chosen = data.calibration_texts(cfg.calibration, tokenizer, CACHE)
    assert len(chosen) == 16
    assert all(len(tokenizer(text).input_ids) >= 256 for text in chosen)
    assert chosen == data.calibration_texts(cfg.calibration, tokenizer, CACHE)
    tokens = data.heldout_tokens(cfg.eval, tokenizer, False, CACHE)
    assert tokens.shape == (16, 256)


def test_text_that_is_too_short_says_so(tokenizer):
    cfg = configuration("calibration.samples=9", "calibration.tokens=50000")
    with pytest.raises(ConfigError, match="fewer samples or fewer tokens"):
        data.calibration_texts(cfg.calibration, tokenizer, CACHE)


@pytest.mark.parametrize("filler", ["<|im_end|>", "<|endoftext|>"])
def test_text_that_is_all_padding_says_so(tokenizer, filler, monkeypatch):
    monkeypatch.setattr(data, "_texts", lambda *_: [filler * 300, filler * 300 + " a word"])
    calibration = configuration("calibration.samples=2", "calibration.tokens=256").calibration
    with pytest.raises(
        ConfigError, match=r"^calibration: a sample is nothing but <\|\w+\|>; accepted"
    ):
        data.calibration_texts(calibration, tokenizer, CACHE)


def test_a_limit_takes_the_same_documents_spread_over_a_task():
    first = spread(10_000, 50, 1234, "hellaswag")
    assert first == sorted(set(first)) and len(first) == 50
    assert first == spread(10_000, 50, 1234, "hellaswag")
    assert set(spread(10_000, 20, 1234, "hellaswag")) <= set(first)
    assert first != spread(10_000, 50, 1, "hellaswag")
    assert first != spread(10_000, 50, 1234, "piqa")
    assert max(first) > 9000 and min(first) < 1000
    assert spread(3, 3, 0, "x") == [0, 1, 2]


def test_mmlus_limit_is_shared_out_in_proportion():
    sizes = {"a": 1000, "b": 500, "c": 100}
    assert shares(16, sizes) == {"a": 10, "b": 5, "c": 1}
    assert sum(shares(17, sizes).values()) == 17
    assert shares(1, sizes) == {"a": 1, "b": 1, "c": 1}
    assert shares(5000, sizes) == sizes
    assert shares(10, {"x": 100}) == {"x": 10}
    assert shares(250, {"a": 10_000, "b": 100, "c": 3}) == {"a": 247, "b": 5, "c": 3}
