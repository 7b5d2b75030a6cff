"""A model's checkpoint as a local folder, and the model loaded from it."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import json
import logging
import re
import shutil
from dataclasses import dataclass
from functools import cache as once
from pathlib import Path
from urllib.parse import urlsplit

import httpx2  # huggingface_hub's own client, whose errors it lets through
import torch
from filelock import FileLock

from mixprec import experts
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
    """Find, download or convert `model`'s checkpoint.

    Raises ConfigError if its weights are no safetensors, or if the hub does not give it: see
    `_download`.
    """
    _limit_waiting()
    revision = None
    if model.path == "packaged":
        folder = _convert_packaged(cache)
    elif is_folder(model.path):
        folder = Path(model.path).expanduser().resolve()
    else:
        folder = _download(model)
        revision = folder.name  # the commit that `model.revision` stood for
    if not any(folder.glob("*.safetensors")):
        raise ConfigError(f"model.path={model.path}: no *.safetensors there; accepted: safetensors")
    if other := _other_weights(folder):
        raise ConfigError(f"model.path={model.path}: {other}; accepted: safetensors")
    return Checkpoint(folder, _fingerprint(folder, cache), revision)


def _other_weights(folder: Path) -> str | None:
    """What else than the folder's own safetensors transformers would load for it, if anything."""
    if (folder / "adapter_config.json").exists():
        return "adapter_config.json makes it an adapter of another model"
    named = []
    with contextlib.suppress(OSError, ValueError):  # transformers says what is wrong with the file
        named.append(json.loads((folder / "config.json").read_text()).get("transformers_weights"))
    for index in sorted(folder.glob("*.safetensors.index.json")):
        with contextlib.suppress(OSError, ValueError, KeyError, AttributeError):
            named += json.loads(index.read_text())["weight_map"].values()
    for name in dict.fromkeys(filter(None, named)):
        own = str(name).endswith((".safetensors", ".safetensors.index.json"))
        if not own or Path(name).name != name:
            return f"its weights are to be read from {name}"
    return None


def _download(model: Model) -> Path:
    """The folder in huggingface_hub's cache that holds `model`'s commit; it bears the commit's name.

    A folder without safetensors may come back: then nothing at all was fetched. Raises ConfigError
    if the repository is gated, unknown or out of reach, or if the download broke off. Its text
    holds no URL: those of huggingface_hub's own errors may be signed, which is as good as a token.
    """
    from huggingface_hub import constants, errors, snapshot_download

    for name in ("file_download", "utils._http"):
        logging.getLogger(f"huggingface_hub.{name}").addFilter(_without_query)
    asked = f"model.path={model.path}"
    revision = model.revision or constants.DEFAULT_REVISION
    patterns = [*_HUB_FILES, "*.py"] if model.trust_remote_code else _HUB_FILES
    try:
        # The weights first and alone, so that a repository without them costs nothing; then the
        # rest of the same commit, whatever a branch points to by then.
        folder = Path(
            snapshot_download(model.path, revision=revision, allow_patterns="*.safetensors")
        )
        if any(folder.glob("*.safetensors")):
            snapshot_download(model.path, revision=folder.name, allow_patterns=patterns)
        return folder
    except errors.GatedRepoError as error:
        refused = "no token" if error.response.status_code == 401 else "no access for this token"
        raise ConfigError(
            f"{asked}: gated on the hub, {refused}; accept its licence there, then set HF_TOKEN or "
            "run `hf auth login`"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise ConfigError(
            f"{asked}: no such repository on the hub, or a private one that needs HF_TOKEN; "
            "accepted: a hub id such as Qwen/Qwen3-8B"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise ConfigError(
            f"model.revision={revision}: not in {model.path} on the hub; accepted: its branches, "
            "tags and commits in full"
        ) from error
    except errors.LocalEntryNotFoundError as error:
        raise ConfigError(
            f"{asked}: {_why(error)}, and revision {revision} is not whole in the cache; check the "
            "network, HF_ENDPOINT and HF_HUB_OFFLINE"
        ) from error
    except errors.HfHubHTTPError as error:
        advice = "check HF_TOKEN" if error.response.status_code in (401, 403) else "try again later"
        raise ConfigError(f"{asked}: {_why(error)}; {advice}") from error
    except httpx2.TimeoutException as error:
        raise ConfigError(f"{asked}: {_why(error)}; run it again") from error
    except httpx2.HTTPError as error:
        raise ConfigError(
            f"{asked}: the download broke off ({type(error).__name__}); run it again: files that "
            "are whole are not fetched twice"
        ) from error


def _why(error: Exception) -> str:
    """What became of a request to the hub, without its URL."""
    from huggingface_hub import constants, errors

    if isinstance(error, errors.LocalEntryNotFoundError):
        error = error.__cause__
    if isinstance(error, errors.OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set"
    hub = urlsplit(constants.ENDPOINT)
    where = f"the hub at {hub.hostname}" + (f":{hub.port}" if hub.port else "")
    if isinstance(error, httpx2.TimeoutException):
        return f"{where} did not answer in {_timeout()} s (HF_HUB_DOWNLOAD_TIMEOUT)"
    if isinstance(error, errors.HfHubHTTPError):
        return f"{where} answered with status {error.response.status_code}"
    return f"{where} cannot be reached ({type(error).__name__})"


def _timeout() -> int:
    from huggingface_hub import constants

    return constants.HF_HUB_DOWNLOAD_TIMEOUT  # seconds


def _limited(request: httpx2.Request) -> None:
    """No request waits longer than the time-out that the user can set: not forever, and not 60 s."""
    waits = request.extensions.get("timeout", {})
    limits = {
        key: min(waits.get(key) or _timeout(), _timeout())
        for key in ("connect", "read", "write", "pool")
    }
    request.extensions = {**request.extensions, "timeout": limits}


@once
def _limit_waiting() -> None:
    """huggingface_hub's own client asks for a revision, and for datasets, without any time-out."""
    from huggingface_hub.utils import set_client_factory
    from huggingface_hub.utils._http import default_client_factory

    def client() -> httpx2.Client:
        made = default_client_factory()
        made.event_hooks = {**made.event_hooks, "request": [*made.event_hooks["request"], _limited]}
        return made

    set_client_factory(client)


def _without_query(record: logging.LogRecord) -> bool:
    """Cut the query off every URL in a message: a signed one opens the file to whoever reads it."""
    record.msg, record.args = re.sub(r"(https?://[^\s?]+)\?[^\s:]*", r"\1", record.getMessage()), ()
    return True


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
    loaded = experts.separate(_from_pretrained(checkpoint, model, model.device_map))
    if model.device_map is None:
        loaded.to(device())
    return loaded.to(arithmetic(model, loaded.device)).requires_grad_(False)


def load_for_auto_round(checkpoint: Checkpoint, model: Model) -> torch.nn.Module:
    """The same weights as auto-round wants them: bfloat16, on the CPU. It changes what it is given."""
    return _from_pretrained(checkpoint, model, None)


def release_from_auto_round() -> None:
    """Let go of the model that was last given to auto-round, which keeps it until the next one."""
    from auto_round.context.model import ModelContext

    ModelContext.reset_context()


def _from_pretrained(checkpoint: Checkpoint, model: Model, device_map: str | None):
    from transformers import AutoModelForCausalLM

    loaded, info = AutoModelForCausalLM.from_pretrained(
        checkpoint.folder,
        dtype=torch.bfloat16,
        use_safetensors=True,
        trust_remote_code=model.trust_remote_code,
        device_map=device_map,
        output_loading_info=True,
    )
    if missing := sorted(info["missing_keys"]):  # transformers would go on with random ones
        raise ConfigError(
            f"model.path={model.path}: {len(missing)} weights are missing, such as {missing[0]}"
        )
    _assert_no_hub_kernels()
    return loaded.eval()


def device() -> torch.device:
    """Where a model is that no `device_map` spreads over several."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


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

    All linears but the output head: `lm_head` and the embeddings stay in BF16, as in the report. Of a
    mixture of experts, each expert's own (`experts.separate`) and not the router.
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
