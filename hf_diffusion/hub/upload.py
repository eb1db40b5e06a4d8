"""A folder to the Hub: one commit, made when everything has arrived."""

from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import HfApi, ModelCard
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HTTPError
from transformers.utils import logging


logger = logging.get_logger(__name__)


def upload(
    folder: Path,
    repo_id: str,
    *,
    private: bool | None = None,
    token: bool | str | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    commit_message: str | None = None,
    commit_description: str | None = None,
    tags: Sequence[str] = (),
) -> str:
    """Upload what is in `folder` to the model repository `repo_id`, which is made if it does not exist.

    A model card that is there already stays as it is, but for `tags`.

    Args:
        private: whether to make it private, if it does not exist; None for what the owner has as the default.
        token: of the Hub; None for the one that `hf auth login` has stored.
        revision: the branch to commit to, made if it does not exist.
        create_pr: open a pull request in place of a commit to the branch.
        tags: added to the card that is there already.

    Returns:
        The address of the commit.

    Raises:
        PermissionError: if the Hub does not let `token` write there.
        ConnectionError: if the upload was interrupted, or refused for another reason. Nothing has been committed then.
    """
    api = HfApi(token=token)
    try:
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if revision is not None and not revision.startswith("refs/pr"):
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        try:
            card = ModelCard.load(api.hf_hub_download(repo_id, "README.md", revision=revision))
        except EntryNotFoundError:
            pass
        else:
            logger.warning(f"The model card of {repo_id} stays as it is. Upload README.md by hand to replace it.")
            card.data.tags = list(dict.fromkeys([*(card.data.tags or []), *tags])) or None
            card.save(folder / "README.md")
        commit = api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            revision=revision,
            create_pr=create_pr,
            commit_message=commit_message or "Upload model",
            commit_description=commit_description,
        )
    except (HTTPError, RuntimeError) as error:  # the latter for what breaks off a large file
        if isinstance(error, HfHubHTTPError) and error.response.status_code in (401, 403):
            raise PermissionError(
                f"`repo_id`={repo_id!r} cannot be written to with this token (status {error.response.status_code}). "
                "Log in with `hf auth login`, or pass a `token` that may write there."
            ) from error
        raise ConnectionError(
            f"The upload to `repo_id`={repo_id!r} did not get through: {error} Nothing has been committed. Try again."
        ) from error
    return str(commit.commit_url)


__all__ = ["upload"]
