"""Uploading an exported model to the Hugging Face hub, and only on request."""

from pathlib import Path

from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import HTTPError
from huggingface_hub.utils import HFValidationError, validate_repo_id

from orchestrator.errors import RequestError, WorkError


def check_upload(repo: str) -> None:
    """Check that an upload to `repo` can be tried at all.

    Raises:
        RequestError: no name of a repository, or no token in the environment or the hub's login.
    """
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise RequestError(f"--push-to-hub {repo!r} is no repository of the hub: {error}") from error
    if "/" not in repo:
        raise RequestError(f"--push-to-hub {repo!r}: say whose it is, as USER/{repo}")
    if get_token() is None:
        raise RequestError("--push-to-hub needs a token: set HF_TOKEN, or log in once with `hf auth login`")


def upload(directory: Path, repo: str, *, public: bool = False) -> str:
    """Upload `directory` as the model `repo`, which is made if it is not there, and return its address.

    Raises:
        RequestError: `repo` is there and public, and `public` was not requested.
        WorkError: the hub cannot be reached, or refuses.
    """
    hub = HfApi()
    try:
        address = hub.create_repo(repo, private=not public, exist_ok=True)
        if not public and not hub.model_info(repo).private:
            raise RequestError(
                f"--push-to-hub {repo!r} is there already and public; add --public, or name another"
            )
        hub.upload_folder(folder_path=directory, repo_id=repo, commit_message="Upload pruned model")
    except (HTTPError, OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise WorkError(
            f"the hub did not take {repo!r}: {reason}. The model is in {str(directory)!r}; "
            f"try again with `hf upload {repo} {directory}`"
        ) from error
    return str(address)
