"""ours: AutoRound's AutoScheme with the report's settings, run as its authors ship it.

The report's command is `auto_round --avg_bits B --options ... --ignore_scale_zp_bits --iters 0`. The
scores take a minute or more and do not depend on the budget; auto-round stores them as files in
AR_AUTO_SCHEME_CACHE. That folder is ours here, one for each model's contents, options and
calibration, with a lock around it. The first budget is what auto-round makes of it; for any other
its own solver is run on its stored scores, without loading the model again.
"""

from __future__ import annotations

import os
from contextlib import contextmanager

from filelock import FileLock

from mixprec import data, models
from mixprec.allocate import autoscheme_scores
from mixprec.cell import digest
from mixprec.store import write_json

BATCH_SIZE = 8  # samples in one backward pass; the command line's, where no flag sets it
LOADS_A_COPY = True  # auto-round changes the model that it is given


def allocate(layers, schemes, budget, request) -> dict[str, str]:
    checkpoint = models.checkpoint(request.model, request.cache)
    tokenizer = models.load_tokenizer(checkpoint, request.model)
    texts = data.calibration_texts(request.calibration, tokenizer, request.cache)
    key = digest(
        [checkpoint.fingerprint, [s.name for s in schemes], request.calibration.tokens, texts]
    )
    folder = (request.cache / "autoscheme" / f"{request.model.name}-{key[:16]}").resolve()
    # auto-round tries to read every JSON file beside its scores as scores, so the texts lie below.
    texts_file = folder / "calibration" / "texts.json"
    texts_file.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / "lock"):
        # auto-round tokenizes as the tokenizer does by default; model.bos is about evaluation only.
        first = tokenizer(texts[0]).input_ids[0]
        request.note("calibration_begins_with_bos", first == tokenizer.bos_token_id)
        solved = autoscheme_scores.by_auto_round(folder, layers, schemes, budget)
        request.note("autoscheme_scores_stored", solved is not None)
        if solved is not None:
            return solved
        write_json(texts_file, [{"text": text} for text in texts])
        chosen = _autoscheme(checkpoint, tokenizer, schemes, budget, request, texts_file)
    names = {_identity(scheme.preset): scheme.name for scheme in schemes}
    return {layer.name: names[_fields(chosen[layer.name])] for layer in layers}


def _autoscheme(checkpoint, tokenizer, schemes, budget, request, texts_file) -> dict[str, dict]:
    """AutoScheme's own configuration of every layer."""
    import torch
    from auto_round import AutoRound, AutoScheme, RTNConfig

    calibration = request.calibration
    variables = {
        "AR_AUTO_SCHEME_CACHE": str(texts_file.parent.parent),
        # auto-round lets these two, set by whomever, override what it is given below.
        "AR_AUTO_SCHEME_NSAMPLES": str(calibration.samples),
        "AR_AUTO_SCHEME_SEQLEN": str(calibration.tokens),
    }
    with _environment(variables):
        compressor = AutoRound(
            models.load_for_auto_round(checkpoint, request.model),
            tokenizer,
            scheme=AutoScheme(
                avg_bits=budget,
                options=",".join(scheme.preset for scheme in schemes),
                ignore_scale_zp_bits=True,
                nsamples=calibration.samples,
                seqlen=calibration.tokens,
                batch_size=BATCH_SIZE,
                dataset=str(texts_file),
                low_gpu_mem_usage=True,  # its default: one block at a time on the GPU
            ),
            dataset=str(texts_file),
            alg_configs=RTNConfig(disable_opt_rtn=True),
            iters=0,
            low_gpu_mem_usage=request.model.low_memory,
            device_map="cuda" if torch.cuda.is_available() else "cpu",
            enable_torch_compile=False,
        )
        compressor.post_init()  # scores, or reads the stored ones, and solves; quantizes nothing
        chosen = compressor.layer_config
    models.release_from_auto_round()
    return chosen


@contextmanager
def _environment(variables: dict[str, str]):
    """The process's environment with `variables`, and afterwards as it was."""
    previous = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in previous.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _identity(preset: str) -> tuple:
    from dataclasses import asdict

    from auto_round.schemes import preset_name_to_scheme

    return _fields(asdict(preset_name_to_scheme(preset)))


def _fields(settings: dict) -> tuple:
    return settings["bits"], settings["group_size"], settings["data_type"], settings["act_bits"]
