"""Shared prefixes: tries are what they should be, and answers are those of lm-eval's HFLM."""

from __future__ import annotations

import random

import pytest
import torch

from mixprec.evaluate import shared_prefix

WORDS = 200  # tokens of the requests are below this
MAX_LENGTH = 64
PLENTY = 1e9  # attention parity: attention costs nothing, so that all that can be shared is


def words(rng: random.Random, count: int) -> list[int]:
    return [rng.randrange(3, WORDS) for _ in range(count)]


def some_requests(seed: int = 0) -> list:
    """Requests (texts, context, continuation) that share prefixes in every way there is."""
    rng = random.Random(seed)
    pairs = []
    head = words(rng, 20)  # of several documents
    for document in range(6):
        context = (head if document % 2 else []) + words(rng, rng.randrange(1, 20))
        pairs += [(context, words(rng, rng.randrange(1, 9))) for _ in range(4)]
        pairs += [(context, [word]) for word in words(rng, 4)]  # as mmlu's letters
        ending = words(rng, 5)  # as in winogrande: two contexts, one ending
        pairs += [(context + words(rng, 2), ending) for _ in range(2)]
    context, continuation = pairs[0]
    pairs += [pairs[0], pairs[0]]  # identical
    pairs += [(context, continuation[:1]), (context + continuation, words(rng, 3))]  # extended
    pairs += [(context[:1], context[1:] + continuation)]  # the same tokens, cut elsewhere
    pairs += [([7], [8]), ([7], words(rng, MAX_LENGTH))]  # the shortest, the longest continuation
    long = words(rng, 3 * MAX_LENGTH)
    pairs += [(long, words(rng, n)) for n in (1, 1, 4, 9)]  # truncated from the left
    pairs += [(long[:MAX_LENGTH], [5]), (long[: MAX_LENGTH - 1], [5, 6])]  # just not
    rng.shuffle(pairs)
    return [((f"c{i}", f"d{i}"), *pair) for i, pair in enumerate(pairs)]


def both(model, tokenizer, **options):
    """(lm-eval's HFLM, ours) around one model."""
    from lm_eval.models.huggingface import HFLM

    common = {"pretrained": model, "tokenizer": tokenizer, "batch_size": 8}
    common |= {"max_length": MAX_LENGTH, "softmax_dtype": "float32"}
    return HFLM(**common), shared_prefix.SharedPrefixLM(**common, **options)


def answers(lm, requests):
    return lm._loglikelihood_tokens(requests, disable_tqdm=True)


def differences(one, other) -> list[float]:
    """Relative differences of log-likelihoods; greedy flags must agree."""
    assert [greedy for _, greedy in one] == [greedy for _, greedy in other]
    return [abs(a - b) / abs(a) for (a, _), (b, _) in zip(one, other, strict=True)]


@pytest.fixture
def load(tiny):
    """A function that loads a tiny model of an architecture in float32, and its tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    def load(architecture: str, **options):
        folder = tiny[architecture]
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options)
        return model.eval(), AutoTokenizer.from_pretrained(folder)

    return load


def to_paths(requests) -> list[tuple[int, ...]]:
    return sorted({tuple((c + d)[-(MAX_LENGTH + 1) :][:-1]) for _, c, d in requests})
