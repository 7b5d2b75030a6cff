"""A model's checkpoint as a local folder, and the model loaded from it."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import logging
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from filelock import FileLock

from mixprec.cell import PACKAGED_MODEL, ConfigError, Model, is_folder
from mixprec.schemes import Layer

log = logging.getLogger(__name__)

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# What a checkpoint may consist of: safetensors for weights, and never a pickle.
_HUB_FILES = ["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja"]


@dataclass(frozen=True)
class Checkpoint:
    """A folder with config.json, *.safetensors and a tokenizer.

    fingerprint: sha256 over the contents of all of them: what scores are stored by, so that two
    models in folders of the same name, or a folder whose weights changed, never share any.
    """

    folder: Path
    fingerprint: str
    revision: str | None


def checkpoint(model: Model, cache: Path) -> Checkpoint:
    """Find, download or convert `model`'s checkpoint. Raises ConfigError if it has no safetensors."""
    revision = None
    if model.path == "packaged":
        folder = _convert_packaged(cache)
    elif is_folder(model.path):
        folder = Path(model.path).expanduser().resolve()
    else:
        from huggingface_hub import snapshot_download

        patterns = [*_HUB_FILES, "*.py"] if model.trust_remote_code else _HUB_FILES
        folder = Path(
            snapshot_download(model.path, revision=model.revision, allow_patterns=patterns)
        )
        revision = folder.name  # the commit that `model.revision` stood for
    if not any(folder.glob("*.safetensors")):
        raise ConfigError(f"model.path={model.path}: no *.safetensors there; accepted: safetensors")
    return Checkpoint(folder, _fingerprint(folder, cache), revision)


def is_on_hub(model: Model) -> bool:
    return model.path != "packaged" and not is_folder(model.path)


def in_hub_cache(model: Model) -> Path | None:
    """The folder of a hub model that has been downloaded whole; None otherwise. Asks no network."""
    from huggingface_hub import errors, snapshot_download

    try:
        folder = Path(
            snapshot_download(
                model.path,
                revision=model.revision,
                allow_patterns=_HUB_FILES,
                local_files_only=True,
            )
        )
        index = folder / "model.safetensors.index.json"
        shards = ["model.safetensors"]
        if index.is_file():
            shards = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    except (errors.LocalEntryNotFoundError, errors.IncompleteSnapshotError, ValueError, KeyError):
        return None
    whole = all((folder / file).is_file() for file in ("config.json", *shards))
    return folder if whole else None


def load(checkpoint: Checkpoint, model: Model) -> torch.nn.Module:
    """The reference model, on its device, in evaluation mode.

    Weights are rounded to bfloat16 first: that is what "BF16" means in every table. Where the
    device is a CPU the arithmetic on them is float32, which is as fast as bfloat16 or faster there
    and exact on the same values.
    """
    loaded = _from_pretrained(checkpoint, model, model.device_map)
    if model.device_map is None:
        loaded.to("cuda" if torch.cuda.is_available() else "cpu")
    return loaded.to(arithmetic(model, loaded.device)).requires_grad_(False)


def load_for_auto_round(checkpoint: Checkpoint, model: Model) -> torch.nn.Module:
    """The same weights as auto-round wants them: bfloat16, on the CPU. It changes what it is given."""
    return _from_pretrained(checkpoint, model, None)


def release(model: torch.nn.Module) -> None:
    """Free a model's weights: auto-round's contexts refer to what it was given until its next run."""
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.grad = None
        tensor.data = tensor.data.new_empty(0)


def _from_pretrained(checkpoint: Checkpoint, model: Model, device_map: str | None):
    from transformers import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(
        checkpoint.folder,
        dtype=torch.bfloat16,
        use_safetensors=True,
        trust_remote_code=model.trust_remote_code,
        device_map=device_map,
    )
    _assert_no_hub_kernels()
    return loaded.eval()


def arithmetic(model: Model, device: torch.device) -> torch.dtype:
    """The dtype that activations and products have on `device`."""
    if model.dtype != "auto":
        return _DTYPES[model.dtype]
    return torch.float32 if device.type == "cpu" else torch.bfloat16


def load_tokenizer(checkpoint: Checkpoint, model: Model):
    """The model's tokenizer; raises ConfigError if `bos` is asked for and it has no BOS token."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(
        checkpoint.folder, trust_remote_code=model.trust_remote_code
    )
    if model.bos and tokenizer.bos_token_id is None:
        raise ConfigError(
            f"model.bos=true: the tokenizer of {model.name} has no BOS token; accepted: false"
        )
    return tokenizer


def quantized_layers(model: torch.nn.Module) -> list[Layer]:
    """The linears that are quantized, in the order in which the network applies them.

    All linears but the output head: `lm_head` and the embeddings stay in BF16, as in the report.
    """
    head = model.get_output_embeddings()
    return [
        Layer(name, module.out_features, module.in_features)
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and module is not head
    ]


def _assert_no_hub_kernels() -> None:
    """The report's condition: transformers' own RMSNorm, not one from the `kernels` package."""
    from transformers.integrations import hub_kernels

    if getattr(hub_kernels, "_kernels_enabled", False):
        raise RuntimeError("hub kernels are on; import mixprec.environment before transformers")


def _convert_packaged(cache: Path) -> Path:
    """The packaged Q4_1 GGUF as a safetensors folder, made once (about 20 s, 269 MB)."""
    package = Path(importlib.util.find_spec(PACKAGED_MODEL).submodule_search_locations[0])
    gguf = next(package.glob("*.gguf"))
    folder = cache / "models" / "smollm2_135m"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if folder.is_dir():
            return folder
        log.info("de-quantizing %s once", gguf.name)
        from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

        aside = folder.with_suffix(".tmp")
        shutil.rmtree(aside, ignore_errors=True)
        AutoModelForCausalLM.from_pretrained(
            package,
            gguf_file=gguf.name,
            quantization_config=GgufConfig(dequantize=True),
            dtype=torch.bfloat16,
        ).save_pretrained(aside)
        AutoTokenizer.from_pretrained(package, gguf_file=gguf.name).save_pretrained(aside)
        aside.rename(folder)
    return folder


def _fingerprint(folder: Path, cache: Path) -> str:
    """sha256 over the names and contents of a checkpoint's files.

    Reading 65 GB for it would take minutes, so a file's hash is remembered by path, size and time of
    change; a file of the hub's cache is named by its sha256 already.
    """
    known_path = cache / "hashes.json"
    cache.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{known_path}.lock"):
        known = json.loads(known_path.read_text()) if known_path.is_file() else {}
        whole = hashlib.sha256()
        for file in sorted(folder.iterdir()):
            if file.suffix not in (".safetensors", ".json", ".txt", ".model"):
                continue
            blob = file.resolve()
            stat = blob.stat()
            key = f"{blob}:{stat.st_size}:{stat.st_mtime_ns}"
            if re.fullmatch(r"[0-9a-f]{64}", blob.name):
                known[key] = blob.name
            elif key not in known:
                with blob.open("rb") as stream:
                    known[key] = _sha256(stream)
            whole.update(f"{file.name}:{known[key]}\n".encode())
        aside = known_path.with_suffix(".tmp")
        aside.write_text(json.dumps(known, indent=1))
        aside.replace(known_path)
    return whole.hexdigest()


def _sha256(stream) -> str:
    whole = hashlib.sha256()
    while block := stream.read(1 << 20):
        whole.update(block)
    return whole.hexdigest()
