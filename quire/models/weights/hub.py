"""Models that are named as on the Hugging Face Hub: downloaded once, into the Hub's own cache, and found there from then on.

``org/name``, ``org/name@revision``, and for repositories of GGUF files ``org/name:Q4_K_M``. The Hub's own variables hold: HF_HOME,
HF_ENDPOINT, HF_TOKEN, HF_HUB_OFFLINE.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Final, NoReturn

from quire.errors import ModelLoadError
from quire.models.weights.messages import SHOWN

NAME: Final = re.compile(r"([\w-][\w.-]*/[\w.-]+)(?:@([\w./-]+))?(?::(\w+))?")
_FILES: Final = (
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja",
    "additional_chat_templates/*.jinja",
)  # fmt: skip
_WEIGHTS: Final = ("model.safetensors", "model.safetensors.index.json", "model-*.safetensors")
"""What is read of a repository: others hold the same weights again in other formats."""
_PATIENCE_S: Final = 10.0
_PREFERRED: Final = ("Q4_K_M", "Q4_0", "Q8_0")
_PART: Final = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf")

log = logging.getLogger("quire.hub")


def fetch(name: str, weights: bool = True) -> Path:
    """The folder or GGUF file of a model of the Hub, downloaded where it is not there yet: what is there is not compared with the Hub's,
    so a server starts with the same model again (``hf download`` brings a newer one). weights: False leaves those of a folder out.

    Raises ModelLoadError.
    """
    match = NAME.fullmatch(name)
    assert match is not None
    repo, revision, quantization = match.groups()
    import huggingface_hub  # where it is used: it takes a third of a second
    from huggingface_hub import constants, errors

    patterns = [*_FILES, *(_WEIGHTS if weights else ())]
    try:
        if (found := _cached(repo, revision, quantization, patterns)) is not None:
            return found
        log.warning("%s is not there yet: asking the Hugging Face Hub", name)
        huggingface_hub.get_session().head(constants.ENDPOINT, timeout=_PATIENCE_S)  # once: the library tries for half a minute
        names = huggingface_hub.HfApi().list_repo_files(repo, revision=revision)
        if quantization is None and "config.json" in names:
            return Path(huggingface_hub.snapshot_download(repo, revision=revision, allow_patterns=patterns))
        parts = choose(repo, names, quantization)
        first, *_ = [Path(huggingface_hub.hf_hub_download(repo, part, revision=revision)) for part in parts]
        return first
    except ModelLoadError:
        raise
    except errors.GatedRepoError:
        _refuse(name, "its authors ask who wants it: accept their terms on its page, and set HF_TOKEN to a token of your account")
    except errors.RepositoryNotFoundError:
        _refuse(name, "there is none, or it is shown to others only (HF_TOKEN is the token that the Hub is asked with)")
    except errors.RevisionNotFoundError:
        _refuse(name, f"it has no revision {revision!r}")
    except Exception as e:  # whatever the library's way to the network raises
        _refuse(name, f"it can't be downloaded ({str(e).strip().splitlines()[0] if str(e).strip() else type(e).__name__})")


def _cached(repo: str, revision: str | None, quantization: str | None, patterns: list[str]) -> Path | None:
    """What was downloaded before, where all of it was."""
    import huggingface_hub
    from huggingface_hub import constants, errors
    from huggingface_hub.file_download import repo_folder_name

    cache = Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=repo, repo_type="model")
    try:
        commit = (cache / "refs" / (revision or "main")).read_text(encoding="utf-8").strip()
    except OSError:
        commit = revision or ""
    folder = cache / "snapshots" / commit
    if not commit or not folder.is_dir():
        return None
    if quantization is None and (folder / "config.json").exists():
        try:
            return Path(huggingface_hub.snapshot_download(repo, revision=revision, allow_patterns=patterns, local_files_only=True))
        except errors.LocalEntryNotFoundError:
            return None
    names = [path.relative_to(folder).as_posix() for path in folder.rglob("*.gguf")]
    try:
        parts = choose(repo, names, quantization)
    except ModelLoadError:
        return None
    count = _PART.fullmatch(parts[0])
    return folder / parts[0] if count is None or len(parts) == int(count[3]) else None


def _refuse(name: str, problem: str) -> NoReturn:
    raise ModelLoadError(f"{name} is not a folder or file here, and as a model of the Hugging Face Hub: {problem}")


def choose(repo: str, names: Sequence[str], quantization: str | None) -> list[str]:
    """Of a repository's files the one to take, or all of its parts, the first first. Raises ModelLoadError."""
    models = sorted(name for name in names if name.endswith(".gguf") and "mmproj" not in name.lower())
    first = [name for name in models if (match := _PART.fullmatch(name)) is None or int(match[2]) == 1]
    if not first:
        _refuse(repo, "it has neither config.json and safetensors nor GGUF files")

    def with_(kind: str) -> list[str]:
        return [name for name in first if re.search(rf"(?<![A-Za-z0-9]){re.escape(kind)}(?![A-Za-z0-9_])", name, re.IGNORECASE)]

    if quantization is not None:
        found = with_(quantization)
        if not found:
            shown = ", ".join(Path(name).name for name in first[:SHOWN])
            _refuse(f"{repo}:{quantization}", f"it has no such file (but {shown}{', ...' if len(first) > SHOWN else ''})")
    else:
        found = next((found for kind in _PREFERRED if (found := with_(kind))), first)
    chosen = found[0]
    if (match := _PART.fullmatch(chosen)) is None:
        return [chosen]
    return [name for name in models if name.startswith(f"{match[1]}-") and name.endswith(f"-of-{match[3]}.gguf")]
