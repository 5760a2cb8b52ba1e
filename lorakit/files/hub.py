"""Files of models and adapters: in a directory, in a .gguf file, or on the Hub, and the way there.

The files of a Hub id are taken from the Hub's cache on this machine, or downloaded into it. This is
the only module that opens a connection, and it asks only for the id that the user gave. Callers
name the files that they want: safetensors, JSON, templates and vocabularies, never pickled weights
or code. An id may end in the type or the name of one GGUF file, as llama.cpp and Ollama write it:

    organization/name            the model or the adapter of the repository
    organization/name:Q4_K_M     its file ...-Q4_K_M.gguf

`upload` writes one commit. Files on this disk are only read for it, so a failure costs nothing but
the time.
"""

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from lorakit.config.errors import LorakitError
from lorakit.files.local import as_path, read_text

if TYPE_CHECKING:
    from huggingface_hub import HfApi

# ModelOpt tells what it quantized in a file of its own; newer versions in config.json too.
MODELOPT = "hf_quant_config.json"
# The files of a model and of its tokenizer, as patterns. "*.safetensors" would be too wide: some
# repositories keep the same weights a second time under another name.
MODEL_FILES = [
    "config.json",
    "generation_config.json",
    "model*.safetensors",
    "model*.index.json",
    MODELOPT,
]
# What transformers reads to make pixels and samples into the input of a multimodal model:
# preprocessor_config.json, processor_config.json, video_preprocessor_config.json.
PROCESSOR_FILES = ["*processor_config.json"]
# The vocabulary in the forms that others read. lorakit only hands these files on, but for
# tekken.json, which it reads where there is no tokenizer.json. The names are those of transformers'
# tokenizer classes (VOCAB_FILES_NAMES) and of Mistral's repositories (tokenizer.model.v3).
VOCABULARY_FILES = ["tokenizer.model", "tokenizer.model.v*", "spiece.model", "added_tokens.json"]
VOCABULARY_FILES += ["vocab.json", "merges.txt", "tekken.json"]
TOKENIZER_FILES = ["tokenizer*.json", "special_tokens_map.json", "*.jinja", "chat_template.json"]
TOKENIZER_FILES += VOCABULARY_FILES
# An adapter as PEFT and as mlx_lm write it.
ADAPTER_WEIGHTS = ["adapter_model.safetensors", "adapters.safetensors"]
ADAPTER_FILES = ["adapter_config.json", *ADAPTER_WEIGHTS]
# What lorakit writes beside an adapter that tells classes.
LABELS = "labels.json"
CARD = "README.md"

_ID = re.compile(r"([A-Za-z0-9][\w.-]*/[\w.-]+)(?::([\w.-]+))?")


def hub_id(text: str | Path) -> str | None:
    """Return the repository that a text names, or None if it is a path that exists or no id."""
    found = _ID.fullmatch(str(text))
    if found is None or as_path(text).exists():
        return None
    repo, tag = found.groups()
    return None if tag is None and repo.endswith(".gguf") else repo


def resolve(path_or_hub_id: str | Path, patterns: list[str]) -> Path:
    """Return the local directory or .gguf file that holds the files.

    A path that exists is returned as it is. Only a string of the form "organization/name" or
    "organization/name:Q4_K_M" that is no path here is taken for a Hub id.

    Args:
        path_or_hub_id: A directory, a .gguf file or a Hub id.
        patterns: The files to fetch of a Hub id: names in which * stands for any text.

    Raises:
        LorakitError: If the path is neither a directory nor a .gguf file, or the Hub does not give
            the files.
    """
    path = as_path(path_or_hub_id)
    if path.is_dir() or (path.is_file() and path.suffix == ".gguf"):
        return path
    if path.exists():
        raise LorakitError(f"{path} is neither a model directory nor a .gguf file")
    text = str(path_or_hub_id)
    repo = hub_id(text)
    if repo is None:
        raise LorakitError(f"{path} does not exist")

    if re.match(r"meta-llama/(meta-)?llama-?3\.3-(1|3|8)b", text, re.IGNORECASE):
        raise LorakitError(
            f"{text!r} does not exist: Llama 3.3 was published with 70B parameters only; 8B is "
            "Llama 3.1, 1B and 3B are Llama 3.2"
        )

    from huggingface_hub import hf_hub_download, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    tag = text.partition(":")[2]
    try:
        if tag:
            return Path(hf_hub_download(repo, _gguf_file(repo, tag)))
        return Path(snapshot_download(repo, allow_patterns=patterns))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise LorakitError(
            f"{text!r} is no directory here, and the Hub did not give it: {_reason(error)}"
        ) from error


def fetch_adapter(path_or_hub_id: str | Path) -> Path:
    """Return the local directory or .gguf file of an adapter.

    Args:
        path_or_hub_id: A directory or a .gguf file, which is returned as it is, or a Hub id, whose
            adapter is downloaded, with the tokenizer and the chat template beside it.

    Returns:
        The path. Nothing in it has been read.

    Raises:
        LorakitError: The Hub does not give the files.
    """
    if hub_id(path_or_hub_id) is None:
        return as_path(path_or_hub_id)
    return resolve(path_or_hub_id, [*ADAPTER_FILES, LABELS, *TOKENIZER_FILES])


def name_of(path_or_hub_id: str | Path) -> str:
    """Return what a model or an adapter is called: as its directory, its file or its repository."""
    repo = hub_id(path_or_hub_id)
    if repo is not None:
        return repo.partition("/")[2]
    return as_path(path_or_hub_id).absolute().name.removesuffix(".gguf")


def _gguf_file(repo: str, tag: str) -> str:
    """Return the name of the file of a repository that a type or a name stands for.

    Raises LorakitError unless it is one file. Without a connection the files that were downloaded
    before are looked at.
    """
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    try:
        names = HfApi().list_repo_files(repo)
    except HfHubHTTPError:
        raise
    except Exception:  # no connection: an error of requests or of httpx, as the version has it
        cached = Path(snapshot_download(repo, allow_patterns=["*.gguf"], local_files_only=True))
        names = [file.relative_to(cached).as_posix() for file in cached.rglob("*.gguf")]
    files = {name: Path(name).stem for name in names if name.endswith(".gguf")}
    files = {name: stem for name, stem in files.items() if not stem.startswith("mmproj")}
    wanted = tag.casefold().removesuffix(".gguf")
    ends = re.compile(rf"(.*[-._])?{re.escape(wanted)}(-\d+-of-\d+)?")
    found = [name for name, stem in files.items() if ends.fullmatch(stem.casefold())]
    found = [name for name in found if files[name].casefold() == wanted] or found
    if any(re.search(r"-\d+-of-\d+$", files[name]) for name in found):
        raise LorakitError(
            f"{repo}: {found[0]} is one part of several: join them with llama-gguf-split --merge"
        )
    if len(found) != 1:
        some = ", ".join(sorted(found or files)) or "no .gguf file at all"
        what = f"several files of {tag}" if found else f"no file of {tag}"
        raise LorakitError(f"{repo} holds {what}: give the name of one after the colon, of {some}")
    return found[0]


def card_of(model: str | Path, *, download: bool = False) -> str | None:
    """Return the text of the card of a model, or None if it has none here.

    Args:
        model: A directory or a Hub id.
        download: Whether the Hub may be asked; otherwise only what lies on this disk is read.
    """
    repo = hub_id(model)
    path: Path | str = as_path(model) / CARD
    if repo is not None:
        from huggingface_hub import hf_hub_download

        try:
            path = hf_hub_download(repo, CARD, local_files_only=not download)
        except Exception:  # whatever keeps it away, it is only a card
            return None
    try:
        return read_text(Path(path))
    except (LorakitError, OSError):
        return None


def is_on_hub(model: str | Path) -> bool:
    """Return whether a text is the id of a model that the Hub has, and shows to this user.

    Without a connection an id is believed.
    """
    from huggingface_hub import HfApi

    repo = hub_id(model)
    try:
        return repo is not None and HfApi().repo_exists(repo)
    except Exception:  # no connection: an error of requests or of httpx, as the version has it
        return True


def upload(
    source: Path,
    repo_id: str,
    files: Mapping[str, Path],
    card: Callable[[str | None], str],
    *,
    private: bool | None = None,
    revision: str | None = None,
    message: str,
) -> str:
    """Write files into a repository of the Hub, as one commit, and return its address.

    Args:
        source: Where the files come from, for messages.
        repo_id: The repository, "organization/name". It is made if it is missing.
        files: The name in the repository -> the file.
        card: Called with the README.md that is there, None if there is none; returns the one to
            write.
        private: Whether the repository is private; None takes the organization's default.
        revision: The branch, which is made if it is missing; None takes the main one.
        message: The commit's message.

    Raises:
        LorakitError: The Hub cannot be reached or refuses, or the repository is public and
            `private` asks for another. The files are as they were.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    api = HfApi()
    try:
        address = str(api.create_repo(repo_id, private=private, exist_ok=True))
        if private and not api.repo_info(repo_id).private:
            raise LorakitError(
                f"{repo_id} is there already, and public: nothing was uploaded; make it private on "
                "the Hub, or choose another name"
            )
        if revision is not None:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        text = card(_card_there(api, repo_id, revision))
        added = [CommitOperationAdd(name, file) for name, file in files.items()]
        added.append(CommitOperationAdd(CARD, text.encode()))
        api.create_commit(repo_id, added, commit_message=message, revision=revision)
    except LorakitError:
        raise
    except Exception as error:  # of the client, of requests or of httpx, as the version has it
        raise LorakitError(
            f"{source} was not uploaded to {repo_id}, and is whole on this disk: "
            f"{_reason(error)}; try again with `lorakit push {source} {repo_id}`"
        ) from error
    return address if revision is None else f"{address}/tree/{revision}"


def _card_there(api: "HfApi", repo_id: str, revision: str | None) -> str | None:
    """Return the README.md of a repository, or None if it has none."""
    if not api.file_exists(repo_id, CARD, revision=revision):
        return None
    path = Path(api.hf_hub_download(repo_id, CARD, revision=revision))
    return path.read_bytes().decode("utf-8", errors="replace")


def _reason(error: BaseException) -> str:
    """Return why the Hub's client failed, in one line, with what to do about a missing login."""
    from huggingface_hub.errors import HfHubHTTPError

    while isinstance(error, RuntimeError) and error.__cause__ is not None:  # of one of its threads
        error = error.__cause__
    first, *lines = str(error).strip().splitlines() or [type(error).__name__]
    listed = [line.removeprefix("- ") for line in lines if line.startswith("- ")]
    reason = "; ".join([first.rstrip(".:"), *listed])
    response = error.response if isinstance(error, HfHubHTTPError) else None
    if response is not None and response.status_code in (401, 403):
        reason += " (log in with `hf auth login`, as somebody who may write there)"
    return reason
