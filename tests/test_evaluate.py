"""Accuracy is lm-eval's own; KL is what its definition says."""

import math

import pandas as pd
import pytest
import torch
from conftest import CACHE, cell, configuration, tiny_overrides

from mixprec import models
from mixprec.evaluate import harness, kl
from mixprec.evaluate.tasks import tasks_of


def loaded(folder, **kwargs):
    model = configuration(*tiny_overrides(folder, **kwargs)).model
    checkpoint = models.checkpoint(model, CACHE)
    return models.load(checkpoint, model), models.load_tokenizer(checkpoint, model)


@pytest.mark.parametrize("engine", ["shared_prefix", "hf"])
def test_answers_are_those_of_plain_lm_eval(tiny, engine):
    """The same documents through HFLM as anyone would call it, one request at a time."""
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    overrides = [*tiny_overrides(tiny["qwen2"]), "eval.tasks=[piqa,hellaswag,lambada_openai]"]
    one = cell(*overrides, "model.limit=6", f"eval.engine={engine}")
    model, tokenizer = loaded(tiny["qwen2"])
    metrics, samples, _ = harness.accuracy(model, tokenizer, one, CACHE)

    tasks = tasks_of(one.eval, CACHE)
    plain = lm_eval.simple_evaluate(
        model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1),
        tasks=tasks.specs, task_manager=tasks.manager, samples=tasks.documents,
    )  # fmt: skip
    for task, metric in metrics.items():
        assert metric["acc"] == pytest.approx(plain["results"][task]["acc,none"])
        assert metric["stderr"] == pytest.approx(plain["results"][task]["acc_stderr,none"])
        assert metric["n"] == 6
        for sample in plain["samples"][task]:
            row = samples[(samples.task == task) & (samples.doc_id == sample["doc_id"])].iloc[0]
            theirs = [response[0] for response in sample["filtered_resps"]]
            assert list(row.loglikelihoods) == pytest.approx(theirs, rel=1e-5)
            assert row.correct == bool(sample["acc"])
            assert row.doc_hash == sample["doc_hash"]
            place = tasks.documents[task].index(sample["doc_id"])
            document = tasks.loaded["tasks"][task].eval_docs[place]
            assert all(
                document[key] == value for key, value in sample["doc"].items() if key in document
            )


def test_mmlu_is_micro_averaged_over_its_subjects():
    samples = pd.DataFrame({"correct": [True, False, False, True, True]})
    metric = harness.summary(samples)
    assert metric == {"acc": 0.6, "stderr": pytest.approx(math.sqrt(0.6 * 0.4 / 4)), "n": 5}
    assert harness.summary(samples[:1])["stderr"] is None


def test_the_mean_is_unweighted_over_tasks():
    metrics = {
        "a": {"acc": 0.2, "stderr": 0.03, "n": 10},
        "b": {"acc": 0.6, "stderr": 0.04, "n": 90},
    }
    assert harness.mean(metrics) == {"acc": 0.4, "stderr": pytest.approx(0.025), "n": 100}


@pytest.mark.parametrize("bos", [True, False])
def test_the_bos_token_is_there_exactly_if_asked_for(tiny, bos):
    model, tokenizer = loaded(tiny["llama"], bos=bos)
    one = cell(*tiny_overrides(tiny["llama"], bos=bos))
    lm = harness.language_model(model, tokenizer, one)
    assert (lm.tok_encode("The")[0] == tokenizer.bos_token_id) == bos


def test_logits_that_are_not_finite_are_an_error(tiny):
    model, tokenizer = loaded(tiny["llama"])
    model.lm_head.weight[5, 0] = float("nan")
    with pytest.raises(FloatingPointError, match="not finite"):
        harness.accuracy(model, tokenizer, cell(*tiny_overrides(tiny["llama"])), CACHE)
    tokens = torch.full((1, 8), 7)
    with pytest.raises(FloatingPointError, match="not finite"):
        kl.divergence(model, tokens, kl.Reference(torch.zeros(1, 8, 64)))


def test_kl_is_its_definition(tiny, tmp_path):
    model, _ = loaded(tiny["qwen3"])
    tokens = torch.randint(3, 200, (3, 24), generator=torch.Generator().manual_seed(1))
    p = torch.log_softmax(model(tokens).logits, -1)
    reference = kl.Reference.of(model, tokens, tmp_path / "r.safetensors")
    same = kl.divergence(model, tokens, reference)
    assert same["mean"] == pytest.approx(0, abs=1e-6) and same["top1"] == 1

    for parameter in model.model.layers.parameters():
        parameter += 0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2))
    q = torch.log_softmax(model(tokens).logits, -1)
    again = kl.Reference.of(
        model, tokens, tmp_path / "r.safetensors"
    )  # from disk, not from `model`
    other = kl.divergence(model, tokens, again)
    per_token = torch.nn.functional.kl_div(q, p, log_target=True, reduction="none").sum(-1)
    assert other["mean"] == pytest.approx(per_token.mean().item(), rel=1e-4)
    spread = per_token.mean(1)
    assert other["stderr"] == pytest.approx((spread.std() / math.sqrt(3)).item(), rel=1e-3)
    assert other["top1"] == pytest.approx((p.argmax(-1) == q.argmax(-1)).float().mean().item())
    assert (other["sequences"], other["tokens"]) == (3, 72)
