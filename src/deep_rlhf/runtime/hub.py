"""Uploads to the Hugging Face Hub; a failed upload never stops a run."""

import logging
from pathlib import Path
from typing import Any

import huggingface_hub
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

from deep_rlhf.errors import ConfigError

logger = logging.getLogger(__name__)

OPTIONS = ("repo_id", "private", "token", "revision", "commit_message", "commit_description", "create_pr")
STALLED = 60.0  # seconds without a byte before the upload is given up; huggingface_hub has no limit of its own


def check_push_options(options: dict[str, Any]) -> None:
    """Raises ConfigError for options that `push_folder` does not take, so that a run fails at its start."""
    unknown = sorted(options.keys() - set(OPTIONS))
    if unknown:
        raise ConfigError(
            f"A push to the Hub takes no {' and no '.join(unknown)}: leave it out, or give {', '.join(OPTIONS)}."
        )
    try:
        validate_repo_id(options.get("repo_id") or "")
    except HFValidationError as error:
        raise ConfigError(f"A push to the Hub needs a repo_id like 'name/model': {_one_line(error)}") from None
    if options.get("create_pr") and options.get("revision"):
        raise ConfigError("A push to the Hub with create_pr opens a branch of its own: leave revision out.")


def push_folder(folder: str | Path, **options: Any) -> None:
    """Commits the files of `folder` to a model repository on the Hub, which is created if necessary.

    options: those of transformers' `push_to_hub` that concern the repository, `OPTIONS`; only `repo_id` is required.
    Call it on one process. A Hub that refuses or does not answer causes a warning, never an exception. Raises
    ConfigError as `check_push_options` does.
    """
    check_push_options(options)
    token, revision = options.get("token"), options.get("revision")
    session = huggingface_hub.get_session()
    timeout, session.timeout = session.timeout, STALLED
    try:
        made = huggingface_hub.create_repo(
            options["repo_id"], private=options.get("private"), token=token, exist_ok=True
        )
        if revision is not None and not revision.startswith("refs/pr"):
            huggingface_hub.create_branch(made.repo_id, branch=revision, token=token, exist_ok=True)
        commit = {name: value for name, value in options.items() if name not in ("repo_id", "private")}
        huggingface_hub.upload_folder(repo_id=made.repo_id, folder_path=folder, **commit)
    except Exception as error:  # no network, no permission, a full quota, …
        reason = f"{type(error).__name__}: {_one_line(error)}"
        logger.warning("%s was not pushed to '%s' (%s): training continues.", folder, options["repo_id"], reason)
    finally:
        session.timeout = timeout


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
