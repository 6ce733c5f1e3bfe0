"""Checkpoints on the hub: their small files through its cache, and of their weights the headers alone."""

from collections.abc import Callable
from pathlib import Path

from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, RepositoryNotFoundError

from ..headers import FileHeader, TensorHeader, read_header


def fetch_headers(name: str) -> tuple[set[str], Path, Callable[[str], FileHeader]]:
    """
    Prepares to read a repository's headers. Weights that are in the cache already are read there; of others only the
    first bytes are asked for.

    Returns:
        `tuple`: the names of its files; the folder that its small files lie in; and what reads a file's header.

    Raises:
        ValueError: if there is no such repository, or it can neither be reached nor is in the cache.
    """
    api = HfApi()
    try:
        folder = Path(snapshot_download(name, allow_patterns=["*.json"]))
        files = set(api.list_repo_files(name, revision=folder.name))
    except HFValidationError as error:
        raise ValueError(f"There is no directory {name}, and the hub has no such names ({error}).") from error
    except RepositoryNotFoundError as error:
        raise ValueError(
            f"There is no directory {name} and no such repository on the hub that you may see."
        ) from error
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        folder, files = _cached(name, error)

    def read(file: str) -> FileHeader:
        if (folder / file).is_file():
            return read_header(folder / file)
        found = api.parse_safetensors_file_metadata(name, file, revision=folder.name)
        tensors = {
            key: TensorHeader(tensor.dtype, tuple(tensor.shape), *tensor.data_offsets)
            for key, tensor in found.tensors.items()
        }
        return FileHeader(Path(name) / file, found.metadata or {}, tensors)

    return files, folder, read


def _cached(name: str, error: Exception) -> tuple[Path, set[str]]:
    """The folder and the files of a repository that cannot be reached, from the cache."""
    try:
        folder = Path(snapshot_download(name, local_files_only=True))
    except LocalEntryNotFoundError:
        raise ValueError(
            f"There is no directory {name}, the cache of the hub does not hold it, and the hub cannot be reached. "
            "Connect, without HF_HUB_OFFLINE, or give a directory."
        ) from error
    return folder, {path.name for path in folder.iterdir()}
