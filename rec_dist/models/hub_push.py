"""Sends an exported folder to the Hugging Face Hub. HF_ENDPOINT, HF_TOKEN and HF_HOME work as everywhere else."""

import shlex
from pathlib import Path

from rec_dist.errors import UserError, one_line
from rec_dist.models.hub import HUB_ID
from rec_dist.storage.disk import as_disk_error


def check_push(repository: str) -> None:
    """Raises UserError for a name that is no org/name, if there is no token, or if HF_HUB_OFFLINE is set. Asks the Hub nothing."""
    from huggingface_hub import constants, get_token
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    try:
        validate_repo_id(repository)
        is_id = HUB_ID.fullmatch(repository) is not None
    except HFValidationError:
        is_id = False
    if not is_id:
        raise UserError(
            f"--push ({repository}) is no id of the Hub; write it as org/name, with at most 96 letters, digits, - _ and ., without -- "
            "or .., and without - . or .git at the end"
        )
    if constants.HF_HUB_OFFLINE:
        raise UserError(f"--push ({repository}) needs the Hub and HF_HUB_OFFLINE is set; unset it, or leave --push out")
    if get_token() is None:
        raise UserError(f"--push ({repository}) needs a token that may write; run `hf auth login`, or set HF_TOKEN")


def push(folder: Path, repository: str, *, private: bool) -> str:
    """Makes the repository if there is none, uploads all files of the folder in one commit, and returns the commit's address.

    private: of a repository that this call makes. Raises UserError with the Hub's reason; the folder stays as it is.
    """
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import HfHubHTTPError

    api = HfApi()
    try:
        api.create_repo(repository, private=private, exist_ok=True)
        commit = api.upload_folder(repo_id=repository, folder_path=folder, commit_message="Upload by rec-dist export")
    except Exception as fault:  # huggingface_hub's kinds of error, httpx's and OSError
        if as_disk_error(fault) is not None:
            raise
        status = f", HTTP {fault.response.status_code}" if isinstance(fault, HfHubHTTPError) else ""
        raise UserError(
            f"--push ({repository}) failed at {constants.ENDPOINT} ({type(fault).__name__}{status}: {one_line(fault)}); {folder} is "
            f"whole: check HF_TOKEN and the name, then `{shlex.join(['hf', 'upload', repository, str(folder)])}`"
        ) from fault
    return str(commit.commit_url)
