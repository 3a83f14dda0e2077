"""Files of Hugging Face's hub: from its cache first, and without a long wait where there is no network."""

from __future__ import annotations

from importlib.util import find_spec

from seedvc_train.features.weights import EncoderError, require

__all__ = ["cached", "fetch"]

_PATIENCE = 10.0  # seconds for the first answer; the library itself would try again for minutes


def cached(repo: str, *names: str, revision: str | None = None) -> str | None:
    """The path of the first of these files that the hub's cache on this machine has; no request is made."""
    if find_spec("huggingface_hub") is None:
        return None
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = [try_to_load_from_cache(repo, name, revision=revision) for name in names]
    except HFValidationError:
        return None  # a path, not the name of a repository
    return next((path for path in found if isinstance(path, str)), None)


def fetch(repo: str, *names: str, revision: str | None = None, ask: bool = True) -> str:
    """The path of the first of these files: in the cache, or else, if ``ask``, on the hub, whence it is downloaded.

    ``HF_HUB_OFFLINE``, ``HF_HOME`` and ``HF_ENDPOINT`` mean what they always mean.

    Raises:
        EncoderError: the hub can't be reached or wasn't to be, or has no such repository or file.
    """
    if path := cached(repo, *names, revision=revision):
        return path
    if not ask:
        raise EncoderError(f"the hub's cache has no {' or '.join(names)} of {repo}")
    require("huggingface_hub", "huggingface_hub")
    from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url
    from huggingface_hub.errors import EntryNotFoundError

    for name in names:
        try:
            get_hf_file_metadata(hf_hub_url(repo, name, revision=revision), timeout=_PATIENCE)
            return hf_hub_download(repo, name, revision=revision)
        except EntryNotFoundError:
            continue
        except Exception as error:  # which errors there are depends on the HTTP client of the version
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise EncoderError(f"{name} of {repo} can't be had from the hub: {reason}") from error
    raise EncoderError(f"{repo} on the hub has no {' or '.join(names)}")
