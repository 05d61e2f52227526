"""Models that are named as on the Hugging Face Hub: downloaded once, into the Hub's own cache, and found there from then on.

``org/name``, ``org/name@revision``, and for repositories of GGUF files ``org/name:Q4_K_M``. The Hub's own variables hold: HF_HOME,
HF_ENDPOINT, HF_TOKEN, HF_HUB_OFFLINE.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Final, NoReturn

from quire.errors import ModelLoadError
from quire.gguf import PART
from quire.models.weights.messages import SHOWN

_NAME: Final = re.compile(
    r"(?:(?:https://)?(?:huggingface\.co|hf\.co)/)?(?P<repo>[\w-][\w.-]*/[\w.-]+)(?:@(?P<revision>[\w./-]+))?(?::(?P<kind>[\w.-]+))?"
)
_SMALL: Final = (
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja",
    "adapter_config.json", "quantize_config.json",
)  # fmt: skip
"""What is read of a repository, besides additional chat templates and weights: others hold the same weights again in other formats."""
_SINGLE: Final = "model.safetensors"
_INDEX: Final = "model.safetensors.index.json"
_PREFERRED: Final = ("Q4_K_M", "Q4_K_S", "Q4_0", "Q5_K_M", "Q6_K", "Q8_0")
_NO_MODEL: Final = ("mmproj", "imatrix")
"""Parts of the names of GGUF files that go with a model."""
_PATIENCE_S: Final = 10.0

log = logging.getLogger("quire.hub")


def is_name(text: str) -> bool:
    """Whether it can be a model of the Hub. A file's name is none."""
    return _NAME.fullmatch(text) is not None and not text.lower().endswith((".gguf", ".safetensors"))


def fetch(name: str, check: Callable[[Path], Any], weights: bool = True) -> Path:
    """The folder or GGUF file of a model of the Hub, downloaded where it is not there yet: what is there is not compared with the Hub's,
    so a server starts with the same model again (``hf download`` brings a newer one).

    check: raises ModelLoadError for a folder whose model can't be served, before its weights are downloaded. weights: False leaves those of
    a folder out (a GGUF file has everything in one). Raises ModelLoadError.
    """
    match = _NAME.fullmatch(name)
    assert match is not None
    repo, revision, kind = match["repo"], match["revision"], match["kind"]
    import huggingface_hub  # where it is used: it takes a third of a second
    from huggingface_hub import constants, errors

    cached = _snapshot(repo, revision)
    if cached is not None and (found := _in_cache(repo, cached, kind, weights)) is not None:
        return found
    if constants.HF_HUB_OFFLINE:
        return _alone(name, cached, kind, "it was not downloaded before, and HF_HUB_OFFLINE is set")
    log.warning("%s is not there yet: asking the Hugging Face Hub", name)

    def download(files: Iterable[str]) -> Path:
        patterns = [re.sub(r"([*?\[])", r"[\1]", file) for file in files]
        return Path(huggingface_hub.snapshot_download(repo, revision=revision, allow_patterns=patterns))

    try:
        try:
            huggingface_hub.get_session().head(constants.ENDPOINT, timeout=_PATIENCE_S)  # once: the library tries for half a minute
        except Exception as e:  # whatever the library's way to the network raises
            return _alone(name, cached, kind, f"it was not downloaded before, and the Hub can't be reached ({_line(e)})")
        names = huggingface_hub.HfApi().list_repo_files(repo, revision=revision)
        if kind is not None or not {_SINGLE, _INDEX} & set(names):
            parts = choose(repo, names, kind)
            return download(parts) / parts[0]
        _check_files(name, names)
        folder = download(file for file in names if file in _SMALL or file.startswith("additional_chat_templates/") or file == _INDEX)
        check(folder)
        return download([_SINGLE] if _SINGLE in names else _listed(folder)) if weights else folder
    except ModelLoadError:
        raise
    except errors.GatedRepoError:
        _refuse(name, "its authors ask who wants it: accept their terms on its page, and set HF_TOKEN to a token of your account")
    except errors.RepositoryNotFoundError:
        _refuse(name, "there is none, or it is shown to others only (HF_TOKEN is the token that the Hub is asked with)")
    except errors.RevisionNotFoundError:
        _refuse(name, f"it has no revision {revision!r}")
    except Exception as e:
        _refuse(name, f"it can't be downloaded ({_line(e)})")


def choose(repo: str, names: Sequence[str], kind: str | None) -> list[str]:
    """Of a repository's GGUF files the one to take, or all of its parts, the first first. Raises ModelLoadError."""
    models = [name for name in names if name.lower().endswith(".gguf") and not any(part in name.lower() for part in _NO_MODEL)]
    models.sort(key=lambda name: (name.count("/"), len(name), name))
    first = [name for name in models if (match := PART.fullmatch(name)) is None or int(match[2]) == 1]
    if not first:
        _refuse_without_gguf(repo, names, kind)

    def of(kind: str) -> list[str]:
        return [name for name in first if re.search(rf"(?<![A-Za-z0-9]){re.escape(kind)}(?![A-Za-z0-9_])", name, re.IGNORECASE)]

    shown = ", ".join(Path(name).name for name in first[:SHOWN]) + (", ..." if len(first) > SHOWN else "")
    if kind is not None:
        found = of(kind)
        if not found:
            _refuse(f"{repo}:{kind}", f"it has no such file (but {shown})")
    else:
        found = next((found for each in _PREFERRED if (found := of(each))), first if len(first) == 1 else [])
        if not found:
            _refuse(repo, f"it has several files ({shown}): name one by what is in its name, as {repo}:{_PREFERRED[0]} would")
    chosen = found[0]
    if (match := PART.fullmatch(chosen)) is None:
        return [chosen]
    return sorted(name for name in models if (part := PART.fullmatch(name)) is not None and (part[1], part[3]) == (match[1], match[3]))


def _snapshot(repo: str, revision: str | None) -> Path | None:
    """The folder in the Hub's cache with what was downloaded of a revision."""
    from huggingface_hub import constants

    cache = Path(constants.HF_HUB_CACHE) / ("models--" + repo.replace("/", "--"))
    try:
        commit = (cache / "refs" / (revision or "main")).read_text(encoding="utf-8").strip()
    except OSError:
        commit = revision or ""
    folder = cache / "snapshots" / commit
    return folder if commit and folder.is_dir() else None


def _in_cache(repo: str, folder: Path, kind: str | None, weights: bool) -> Path | None:
    """What was downloaded before, where all of it was. A bare name stands for safetensors, or for the GGUF file that would be taken
    whatever others there are."""
    if kind is None and (folder / "config.json").exists() and (folder / "tokenizer.json").exists():
        try:
            wanted = [_SINGLE] if not (folder / _INDEX).exists() else _listed(folder)
        except ModelLoadError:
            return None
        if all((folder / file).exists() for file in wanted) or (not weights and not _ggufs(folder)):
            return folder
    try:
        parts = choose(repo, _ggufs(folder), kind or _PREFERRED[0])
    except ModelLoadError:
        return None
    count = PART.fullmatch(parts[0])
    return folder / parts[0] if count is None or len(parts) == int(count[3]) else None


def _alone(name: str, folder: Path | None, kind: str | None, problem: str) -> Path:
    """Without the Hub a bare name stands for the one GGUF file that is there."""
    found = _ggufs(folder) if folder is not None and kind is None else []
    if folder is None or len(found) != 1:
        _refuse(name, problem)
    return folder / found[0]


def _ggufs(folder: Path) -> list[str]:
    """Those that are there: a link whose file was deleted is not."""
    return [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.suffix.lower() == ".gguf" and path.exists()]


def _listed(folder: Path) -> list[str]:
    """The files that an index of weights names. Raises ModelLoadError."""
    try:
        table = json.loads((folder / _INDEX).read_text(encoding="utf-8"))["weight_map"]
        return sorted({str(file) for file in table.values()})
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise ModelLoadError(f"{folder / _INDEX} has no 'weight_map' from tensor names to files") from None


def _check_files(name: str, names: Sequence[str]) -> None:
    if "config.json" not in names:
        merge = ": it holds an adapter, which has to be merged into its base model" if "adapter_config.json" in names else ""
        _refuse(name, f"it has no config.json{merge}")
    if "tokenizer.json" not in names:
        _refuse(
            name,
            "it has no tokenizer.json, the tokenizer in the format of the tokenizers library: convert its tokenizer with transformers "
            f"(AutoTokenizer.from_pretrained({name!r}).save_pretrained(folder)), and serve a folder that has all",
        )


def _refuse_without_gguf(repo: str, names: Sequence[str], kind: str | None) -> NoReturn:
    if kind is not None:
        _refuse(f"{repo}:{kind}", f"it has no GGUF files: leave :{kind} out")
    if "adapter_config.json" in names:
        _refuse(repo, "it holds an adapter, which has to be merged into its base model")
    if pickled := [name for name in names if name.endswith((".bin", ".pt", ".pth", ".ckpt"))]:
        _refuse(
            repo,
            f"it has {pickled[0]} but no safetensors: pickled weights can run code and are never loaded. Convert them, for example with "
            f"transformers: AutoModelForCausalLM.from_pretrained({repo!r}).save_pretrained(folder)",
        )
    _refuse(repo, "it has neither safetensors nor GGUF files")


def _line(error: Exception) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__


def _refuse(name: str, problem: str) -> NoReturn:
    raise ModelLoadError(f"{name} is not a folder or file here, and as a model of the Hugging Face Hub: {problem}")
