"""Where a checkpoint stands: a local folder, or a Hub id downloaded or found in the cache."""

import os
from pathlib import Path

from m3kernels.models.ministral3._files import CheckpointError

# Mistral's own consolidated.safetensors holds the same weights again, under other names
DOWNLOADED = ("model*.safetensors", "*.json", "*.txt", "*.model", "*.jinja", "*.md")


def is_path_like(model: str) -> bool:
    """Whether ``model`` cannot be a Hub id of the form owner/name."""
    owner, slash, name = model.partition("/")
    return not slash or not name or "/" in name or "\\" in model or owner in ("", ".", "..", "~")


def locate(model: str | Path, revision: str | None = None) -> Path:
    """The folder of ``model``. Raises CheckpointError saying what is missing: the folder, the network, or the access."""
    path = Path(model).expanduser()
    if path.is_dir():
        if revision is not None:
            raise CheckpointError(
                f"{path} is a local folder, and a revision ({revision}) chooses among a Hub id's: drop it"
            )
        return path
    if path.is_file():
        raise CheckpointError(f"{path} is a file: give the folder that holds it and its config.json")
    if isinstance(model, Path) or is_path_like(model):
        raise CheckpointError(f"{path} does not exist: give a checkpoint's folder, or a Hub id of the form owner/name")
    return _download(model, revision)


def _download(model: str, revision: str | None) -> Path:
    import huggingface_hub
    from huggingface_hub import constants, errors

    token = "HF_TOKEN is set" if os.environ.get("HF_TOKEN") else "HF_TOKEN is not set"
    no_folder = f"(there is no local folder {model!r} either)"
    try:
        return Path(huggingface_hub.snapshot_download(model, revision=revision, allow_patterns=list(DOWNLOADED)))
    except errors.GatedRepoError as error:
        raise CheckpointError(
            f"no access to {model} on the Hub ({token}): accept its terms on its page and set HF_TOKEN"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise CheckpointError(f"{model} has no revision {revision!r} on the Hub: look it up on its page") from error
    except errors.RepositoryNotFoundError as error:
        raise CheckpointError(
            f"the Hub shows no {model} ({token}) {no_folder}: check the name, or set HF_TOKEN if it is private"
        ) from error
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled) as error:
        why = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else "the Hub cannot be reached"
        raise CheckpointError(
            f"{why}, and {model} is not in the cache {constants.HF_HUB_CACHE} {no_folder}: go online, set HF_HOME to a "
            f"cache that has it, or run 'hf download {model} --local-dir DIR' elsewhere and give DIR"
        ) from error
    except errors.HFValidationError as error:
        raise CheckpointError(f"{model!r} is neither a folder here nor a Hub id of the form owner/name") from error
    except (errors.HfHubHTTPError, OSError) as error:
        raise CheckpointError(f"{model} could not be downloaded ({token}) {no_folder}: {error}") from error
