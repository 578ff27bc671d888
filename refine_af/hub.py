"""A finished data set to the Hugging Face hub."""

from collections.abc import Sequence
from pathlib import Path

import huggingface_hub
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from refine_af import dataset
from refine_af.models.one_line import one_line


def check(repo_id: str, arms: Sequence[str]) -> None:
    """See that there is one data set to push, and a name to push it to.

    Raises:
        ValueError: there are several, or the name is none of the hub's.
    """
    fault = "" if repo_id.count("/") == 1 else "no owner"
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        fault = str(error)
    if fault:
        raise ValueError(f"--push_to_hub={repo_id}: expected OWNER/NAME ({fault})")
    if len(arms) > 1:
        raise ValueError(
            f"--push_to_hub={repo_id}: takes the data set of one arm; give --arms={arms[0]}, and "
            "for the others the same command with another name"
        )


def push(target: Path, repo_id: str) -> str:
    """Put all files of an arm's data set into a repository, which is made private when missing.

    Returns:
        Where it is.

    Raises:
        ValueError: the hub did not take it.
    """
    api = huggingface_hub.HfApi()
    try:
        url = api.create_repo(repo_id, repo_type="dataset", private=True, exist_ok=True)
        api.upload_folder(
            repo_id=repo_id,
            repo_type="dataset",
            folder_path=target / dataset.FOLDER,
            commit_message="Data set of a run of refine-af",
            ignore_patterns=["*.partial"],
        )
    except Exception as error:  # of whichever HTTP library the hub's client has
        reason = one_line(error) or type(error).__name__
        raise ValueError(
            f"--push_to_hub={repo_id}: the hub did not take {target / dataset.FOLDER}: {reason}; "
            "the data set is finished, and the same command tries again"
        ) from error
    return str(url)
