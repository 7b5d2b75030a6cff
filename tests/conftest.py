"""Fixtures: composed configurations, and tiny real models of three architectures."""

import os

if (
    "PYTEST_XDIST_WORKER" in os.environ
):  # a core each: threads of several would wait for one another
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import mixprec.environment  # noqa: F401, I001 - first, as in run.py

import json
from pathlib import Path

import pytest

from mixprec import runner, store, sweep
from mixprec.cell import cell_of
from mixprec.store import Outcome
from mixprec.sweep import configuration

os.environ["HF_HUB_OFFLINE"] = "1"
ROOT = Path(__file__).resolve().parent.parent
CACHE = ROOT / ".cache"  # the packaged model and documents are converted there once
ARCHITECTURES = ("llama", "qwen2", "qwen3")


def cell(*overrides: str):
    return cell_of(configuration(*overrides))


def run(results: Path, *overrides: str) -> Outcome:
    """Run one cell in this process, W&B off."""
    cfg = configuration(f"results='{results}'", f"cache='{CACHE}'", "tracking=off", *overrides)
    return sweep.run_cell(cell_of(cfg), cfg)


@pytest.fixture(autouse=True)
def nothing_kept():
    """The runner keeps a model for the next cell; a test must not inherit one."""
    runner.forget()


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """architecture -> folder of a tiny random model with a byte-level tokenizer."""
    return {name: _tiny_model(name, tmp_path_factory.mktemp(name)) for name in ARCHITECTURES}


@pytest.fixture(scope="session")
def tiny_moe(tmp_path_factory):
    """Folder of a tiny random Qwen3-MoE: three blocks, of which the second is dense."""
    return _tiny_model(
        "qwen3_moe", tmp_path_factory.mktemp("qwen3_moe"), num_experts=6, num_experts_per_tok=2,
        moe_intermediate_size=96, norm_topk_prob=True, mlp_only_layers=[1],
    )  # fmt: skip


def tiny_overrides(folder: Path, *, bos: bool = False) -> list[str]:
    """A tiny model on two documents of two tasks: a cell of seconds."""
    return [
        "model=custom", f"model.path='{folder}'", "model.source=packaged", f"model.bos={bos}",
        "model.limit=2", "eval.tasks=[piqa,winogrande]", "eval.kl.sequences=2", "eval.kl.tokens=64",
        "calibration.samples=2", "calibration.tokens=64",
    ]  # fmt: skip


def _tiny_model(architecture: str, folder: Path, **more) -> Path:
    """more: of its configuration."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    specials = ["<pad>", "<bos>", "<eos>"]
    vocabulary = {token: i for i, token in enumerate([*specials, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    if architecture == "llama":  # as Llama 3: its tokenizer adds the BOS token
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<bos> $A", special_tokens=[("<bos>", vocabulary["<bos>"])]
        )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>"
    ).save_pretrained(folder)
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        architecture, vocab_size=len(vocabulary), hidden_size=64, intermediate_size=160,
        num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, head_dim=16,
        max_position_embeddings=4096, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        **{"tie_word_embeddings": architecture == "qwen3", **more},
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():  # initial weights of 0.02 make all distributions flat
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.mul_(5)
    model.to(torch.bfloat16).save_pretrained(folder)
    return folder


def reseal(folder: Path) -> None:
    """Give a result that a test has changed, and the files beside it, their hashes again."""
    result = json.loads((folder / "result.json").read_text())
    store.write_json(folder / "result.json", store.sealed(result, store.hashes(folder)))


@pytest.fixture(scope="module")
def finished(tiny, tmp_path_factory):
    """Results of three real cells of a tiny model on six documents of two tasks, with their samples."""
    root = tmp_path_factory.mktemp("results")
    overrides = [*tiny_overrides(tiny["llama"], bos=True), "model.name=tiny", "model.limit=6"]
    for baseline in ("bf16", "low", "tail8"):
        outcome = run(root, *overrides, f"baseline={baseline}")
        assert outcome.state == "done", outcome.message
    return root
