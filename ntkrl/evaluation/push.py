"""Upload of an exported directory to the Hugging Face Hub, only where a command asks for it.

The token is that of the hub's login (`hf auth login`, or HF_TOKEN). `huggingface_hub` sends all
requests; its errors, and those of the libraries below it, become sentences here.
"""

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from huggingface_hub import HfApi

EXPLAIN = {
    401: "the Hub does not accept the token; log in again with `hf auth login`, or set HF_TOKEN",
    403: "the token may not write there; use one with write access to {organization}",
    404: "the Hub does not know {organization}, or the token may not see it",
    429: "the Hub limits the rate of requests; wait some minutes",
}
"""Reasons by status of an answer."""


def check_push(name: str) -> None:
    """Check the name of a repository, and that there is a login, without a request.

    Args:
      name: ORG/NAME.

    Raises:
      ValueError: not such a name, or no token.
    """
    import huggingface_hub  # slow to import
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    problem = "" if name.count("/") == 1 else "it needs one slash"
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        problem = problem or str(error).rstrip(".")
    if problem:
        raise ValueError(
            f"--push={name} is not the name of a repository ({problem}); expected ORG/NAME, such "
            "as my-name/my-model: letters, digits, '-', '_' and '.'."
        )
    if huggingface_hub.get_token() is None:
        raise ValueError(
            f"--push={name} needs a login at the Hugging Face Hub; run `hf auth login`, or set "
            "HF_TOKEN to a token with write access."
        )


def push(directory: Path, name: str, public: bool = False) -> str:
    """Upload an exported directory as a model repository, which is created if needed.

    Args:
      directory: written by `export`.
      name: ORG/NAME; see `check_push`.
      public: create it for everybody to read; else private, and a public one is refused.

    Returns:
      Address of the repository and its visibility, in words.

    Raises:
      ValueError: the repository is public, or the Hub cannot be reached or refuses the upload.
    """
    import huggingface_hub

    api = huggingface_hub.HfApi(library_name="ntkrl")
    try:
        visible = _is_public(api, name)
        allowed = public or not visible
        if visible is None:
            api.create_repo(name, private=not public, exist_ok=True)
            visible = public
        if allowed:
            api.upload_folder(
                repo_id=name,
                folder_path=directory,
                commit_message="Upload a model trained with ntkrl",
                ignore_patterns=[".*"],  # the record of the export is not part of the model
            )
    except Exception as error:  # of several libraries
        raise ValueError(
            f"the upload to {name} failed: {_reason(error, name)}. {directory} is complete; the "
            "same command tries again."
        ) from error
    if not allowed:
        raise ValueError(
            f"{name} exists and is public; add --public to upload to it, or name another."
        )
    return f"{api.endpoint}/{name} ({'public' if visible else 'private'})"


def _is_public(api: "HfApi", name: str) -> bool | None:
    """Return whether a repository is public, None where there is none."""
    from huggingface_hub.errors import RepositoryNotFoundError

    try:
        return not api.repo_info(name).private
    except RepositoryNotFoundError:
        return None


def _reason(error: Exception, name: str) -> str:
    """Return the cause of a failed request in words."""
    from huggingface_hub import constants
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    if isinstance(error, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set; unset it"
    if isinstance(error, HfHubHTTPError):
        status = error.response.status_code
        if status in EXPLAIN:
            return EXPLAIN[status].format(organization=name.split("/")[0])
        answer = error.server_message or " ".join(str(error).split())
        return f"the Hub answered {status} ({answer.rstrip('.')})"
    cause = error.__cause__ if isinstance(error, RuntimeError) and error.__cause__ else error
    words = " ".join(str(cause).split()) or type(cause).__name__
    return f"{constants.ENDPOINT} cannot be reached ({words.rstrip('.')})"
