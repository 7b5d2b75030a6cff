"""Shared prefixes: tries are what they should be, and answers are those of lm-eval's HFLM."""

from __future__ import annotations

import logging
import random
from types import SimpleNamespace

import pytest
import torch
from conftest import ARCHITECTURES

from mixprec import models, quantize
from mixprec.evaluate import shared_prefix

MAX_LENGTH = 64
FREE = 1e9  # as attention parity: attention costs nothing, so that all that can be shared is


def words(rng: random.Random, count: int) -> list[int]:
    return [rng.randrange(3, 200) for _ in range(count)]


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
    pairs += [([7], [8]), ([7], words(rng, MAX_LENGTH))]  # the shortest, the longest continuation
    long = words(rng, 3 * MAX_LENGTH)
    pairs += [(long, words(rng, n)) for n in (1, 1, 4, 9)]  # truncated from the left
    pairs += [(long[:MAX_LENGTH], [5]), (long[: MAX_LENGTH - 1], [5, 6])]  # just not
    rng.shuffle(pairs)
    return [((f"c{i}", f"d{i}"), *pair) for i, pair in enumerate(pairs)]


def to_paths(requests) -> list[tuple[int, ...]]:
    return sorted({tuple((c + d)[-(MAX_LENGTH + 1) :][:-1]) for _, c, d in requests})


def prefixes(paths) -> set[tuple[int, ...]]:
    return {path[: i + 1] for path in paths for i in range(len(path))}


# --- tries ------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
def test_a_trie_spells_its_paths_and_has_a_node_for_each_prefix(seed):
    paths = to_paths(some_requests(seed))
    tokens, depths, ends, ways = shared_prefix.spell(paths, shared_prefix.common_prefixes(paths))
    assert len(tokens) == len(prefixes(paths))
    for path, way in zip(paths, ways, strict=True):
        assert tuple(tokens[node] for node in way) == path
        assert [depths[node] for node in way] == list(range(len(path)))
    mask = shared_prefix.attention_mask(torch.tensor([ends]))[0, 0]
    for path, way in zip(paths, ways, strict=True):  # ancestors and itself, and nothing else
        for depth in range(len(path)):
            assert mask[way[depth]].nonzero()[:, 0].tolist() == way[: depth + 1]


@pytest.mark.parametrize("parity", [FREE, 1000.0, 1.0])
def test_cut_covers_every_path_once_and_counts_its_nodes(parity):
    paths = to_paths(some_requests())
    tries = shared_prefix.cut(paths, shared_prefix.common_prefixes(paths), parity)
    chosen = [paths[trie.begin : trie.end] for trie in tries]
    assert sorted(path for some in chosen for path in some) == paths
    for trie, some in zip(tries, chosen, strict=True):
        assert trie.nodes == len(prefixes(some))
        assert trie.branched == (trie.nodes > max(map(len, some)))
    if parity == FREE:  # nothing that can be shared is not
        assert sum(trie.nodes for trie in tries) == len(prefixes(paths))


def test_cut_shares_only_where_it_pays():
    stem, parity = tuple(range(10)), 100.0
    near = [(*stem, 20), (*stem, 21)]  # 12 nodes, not 22
    far = [(0, *range(30, 90)), (0, *range(100, 160))]  # 121 nodes, not 122: attention costs more

    def tries(paths):
        return shared_prefix.cut(paths, shared_prefix.common_prefixes(paths), parity)

    assert [trie.nodes for trie in tries(near)] == [12]
    assert [trie.nodes for trie in tries(far)] == [61, 61]


def test_no_trie_is_larger_than_its_limit_but_for_one_request(monkeypatch):
    monkeypatch.setattr(shared_prefix, "TRIE_NODES", 40)
    paths = to_paths(some_requests())
    tries = shared_prefix.cut(paths, shared_prefix.common_prefixes(paths), FREE)
    assert all(trie.nodes <= 40 or trie.end - trie.begin == 1 for trie in tries)


def test_batches_hold_every_trie_once_and_little_padding():
    rng = random.Random(0)
    tries = [
        shared_prefix.Trie(i, i + 1, rng.randrange(1, 300), rng.random() < 0.5) for i in range(500)
    ]
    batches = shared_prefix.batches(tries, 256)
    assert sorted(trie.begin for batch in batches for trie in batch) == list(range(500))
    for batch in batches:
        padded = len(batch) * max(trie.nodes for trie in batch)
        assert padded <= 256 or len(batch) == 1
        assert sum(trie.nodes for trie in batch) >= 0.95 * padded
        assert len({trie.branched for trie in batch}) == 1
    widths = [batch[0].nodes for batch in batches]
    assert widths == sorted(widths, reverse=True)


def test_padding_attends_to_itself_only():
    paths = [(1, 2), (1, 3), (4, 5)]
    tries = [shared_prefix.Trie(0, 2, 3, True), shared_prefix.Trie(2, 3, 2, False)]
    (ids, positions, ends), ways = shared_prefix.lay_out(tries, paths, [0, 1, 0])
    assert ids.tolist() == [[1, 2, 3], [4, 5, 0]]
    assert positions.tolist() == [[0, 1, 1], [0, 1, 0]]
    assert ways == [((1, 2), [0, 1]), ((1, 3), [0, 2]), ((4, 5), [3, 4])]
    mask = shared_prefix.attention_mask(ends)[:, 0].int().tolist()
    assert mask == [[[1, 0, 0], [1, 1, 0], [1, 0, 1]], [[1, 0, 0], [1, 1, 0], [0, 0, 1]]]


# --- answers ----------------------------------------------------------------------------------


@pytest.fixture
def load(tiny):
    """A function that loads a tiny model of an architecture in float32, and its tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    def load(architecture: str, **options):
        folder = tiny[architecture]
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options)
        return model.eval(), AutoTokenizer.from_pretrained(folder)

    return load


def both(model, tokenizer, **options):
    """(lm-eval's HFLM, ours) around one model."""
    from lm_eval.models.huggingface import HFLM

    common = {"pretrained": model, "tokenizer": tokenizer, "batch_size": 8}
    common |= {"max_length": MAX_LENGTH, "softmax_dtype": "float32"}
    return HFLM(**common), shared_prefix.SharedPrefixLM(**common, **options)


def answers(lm, requests):
    return lm._loglikelihood_tokens(requests, disable_tqdm=True)


def largest_difference(one, other) -> float:
    """Relative, of log-likelihoods; greedy flags must agree."""
    assert [greedy for _, greedy in one] == [greedy for _, greedy in other]
    return max(abs(a - b) / abs(a) for (a, _), (b, _) in zip(one, other, strict=True))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_answers_are_those_of_hflm(load, architecture, attention, monkeypatch):
    model, tokenizer = load(architecture, attn_implementation=attention)
    requests = some_requests()
    # A greedy continuation, so that both values of the flag occur.
    for context in ([9, 10, 11], [12] * 20):
        greedy = model.generate(torch.tensor([context]), max_new_tokens=4, do_sample=False)
        requests.append((("greedy", str(context)), context, greedy[0, len(context) :].tolist()))
    for options in ({}, {"tokens_per_forward": 80}, {"tokens_per_forward": 2000}):
        hflm, ours = both(model, tokenizer, **options)
        expected = answers(hflm, requests)
        assert largest_difference(expected, answers(ours, requests)) < 1e-5
        assert {greedy for _, greedy in expected} == {True, False}
        assert ours.tokens_run == len(prefixes(to_paths(requests)))
        assert ours.tokens_run + ours.tokens_padded < ours.tokens_asked / 2
    monkeypatch.setattr(shared_prefix, "HEAD_ELEMENTS", 1000)  # the head in several blocks
    assert largest_difference(expected, answers(both(model, tokenizer)[1], requests)) < 1e-5


def test_bfloat16_differs_from_hflm_by_its_rounding(load):
    model, tokenizer = load("llama")
    requests = some_requests()
    exact = answers(both(model, tokenizer)[0], requests)
    hflm, ours = both(model.bfloat16(), tokenizer)
    error = {
        lm: sorted(abs(a - b) / abs(a) for (a, _), (b, _) in zip(exact, got, strict=True))
        for lm, got in (("hflm", answers(hflm, requests)), ("ours", answers(ours, requests)))
    }
    middle = len(exact) // 2
    assert error["ours"][middle] < 2 * error["hflm"][middle]
    assert error["ours"][-1] < 3 * error["hflm"][-1]


def test_rounded_activations_stay_rounded_a_token_at_a_time(load):
    """MXFP4 inputs. A sum that comes out 1e-7 away can fall on the other side of a tie, which moves
    a log-likelihood by percents in a real model (HFLM's own with sdpa and eager differ so); here
    there are too few values for a tie, so all but one in ten must agree as without rounding."""
    model, tokenizer = load("qwen3")
    layers = models.quantized_layers(model)
    quantize.InMemory(model).apply({layer.name: "mxfp4" for layer in layers})
    requests = some_requests()
    hflm, ours = both(model, tokenizer)
    pairs = zip(answers(hflm, requests), answers(ours, requests), strict=True)
    differences = sorted(abs(a - b) / abs(a) for (a, _), (b, _) in pairs)
    assert differences[int(0.9 * len(differences))] < 1e-4
    assert differences[-1] < 0.2


def test_requests_cut_elsewhere(load):
    """HFLM's cache for one-token continuations (lm-eval 0.4.13) takes the shorter continuation's
    scores from the longer one's first tokens if both spell the same text; without it it is right.
    """
    model, tokenizer = load("llama")
    text = words(random.Random(1), 12)
    requests = [((str(i), ""), text[:i], text[i:]) for i in (1, 4, 9, 11)]
    hflm, ours = both(model, tokenizer)
    hflm.logits_cache = False
    assert largest_difference(answers(hflm, requests), answers(ours, requests)) < 1e-5
    assert ours.tokens_run == ours.tokens_rows == 11


def test_rolling_and_nothing(load):
    model, tokenizer = load("llama")
    hflm, ours = both(model, tokenizer)
    assert answers(ours, []) == []
    texts = [SimpleNamespace(args=("some text that goes on and on, " * n,)) for n in (1, 5)]
    for one, other in zip(
        hflm.loglikelihood_rolling(texts, disable_tqdm=True),
        ours.loglikelihood_rolling(texts, disable_tqdm=True),
        strict=True,
    ):
        assert one == pytest.approx(other, rel=1e-5)


def test_answers_reach_the_cache(load):
    _, ours = both(*load("llama"))
    seen = []
    ours.cache_hook = SimpleNamespace(add_partial=lambda *call: seen.append(call))
    requests = [(("a", "b"), [5, 6], [7, 8]), (None, [5, 6], [7])]
    expected = answers(ours, requests)
    assert seen == [("loglikelihood", ("a", "b"), expected[0])]


def test_lm_eval_knows_it():
    from lm_eval.api.registry import get_model

    assert get_model("shared_prefix") is shared_prefix.SharedPrefixLM


# --- refusals ---------------------------------------------------------------------------------


def _per_tensor(model):
    model.mixprec_activation_scale = "tensor"


def _scaled_logits(model):
    model.forward = lambda *args, _forward=model.forward, **kwargs: SimpleNamespace(
        logits=_forward(*args, **kwargs).logits / 2
    )


def _dynamic_rope(model):
    model.config.rope_parameters["rope_type"] = "dynamic"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (_per_tensor, "per tensor"),
        (_scaled_logits, "output head"),
        (_dynamic_rope, "dynamic"),
    ],
)
def test_where_it_is_not_exact_hflm_answers(load, caplog, change, reason):
    model, tokenizer = load("llama")
    change(model)
    hflm, ours = both(model, tokenizer)
    requests = some_requests()[:10]
    with caplog.at_level(logging.WARNING, logger=shared_prefix.__name__):
        first, second = answers(ours, requests), answers(ours, requests)
    assert first == second == answers(hflm, requests)
    (record,) = (r for r in caplog.records if r.name == shared_prefix.__name__)
    assert reason in record.getMessage() and "\n" not in record.getMessage()
    assert ours.tokens_run == 0


def test_refusals_of_other_models():
    from transformers import AutoConfig, AutoModelForCausalLM

    small = {"vocab_size": 32, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2,
             "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16}  # fmt: skip

    def why_not(model_type, **options):
        config = AutoConfig.for_model(model_type, **small, **options)
        return shared_prefix.refusal(AutoModelForCausalLM.from_config(config))

    assert why_not("qwen2") is None
    window = {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}
    assert "whole prefix" in why_not("qwen2", **window)
    assert "Gemma2ForCausalLM" in why_not("gemma2")
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **small))

    class Mine(type(model)):
        pass

    assert "Mine" in shared_prefix.refusal(Mine(model.config))
    model.config._attn_implementation = "flex_attention"
    assert "flex_attention" in shared_prefix.refusal(model)
