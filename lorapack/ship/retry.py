"""Work with the Hub that is tried again where that may help, and told in one line where it cannot."""

import json
import time
from collections.abc import Callable
from typing import TypeVar

from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from lorapack.errors import InputError

Result = TypeVar("Result")
HTTP_ERROR = HfHubHTTPError.__mro__[1]  # the common parent of httpx's errors, whichever httpx the client uses
PASSING = {408, 409, 412, 425, 429, 500, 502, 503, 504}  # 409, 412: somebody else committed meanwhile
TRIES = 6


def persist(work: Callable[[], Result], repo: str, wait: float = 1.0, tries: int = TRIES) -> Result:
    """Call `work` until it succeeds, waiting longer each time.

    Args:
        work: can be called again after it failed anywhere.
        repo: the repository, for messages.
        wait: seconds before the second try; twice as long before each further one, and never less than
            the Hub's ``Retry-After`` says.
        tries: at most so many.

    Raises:
        InputError: it cannot succeed (offline, no or a wrong token, no permission, bad metadata), or did not.
    """
    for number in range(1, tries + 1):
        try:
            return work()
        except Exception as error:
            cause = _cause(error)
            if (refused := _refusal(cause, repo)) is not None:
                raise InputError(refused) from None
            if not _passing(cause):
                raise
            if number == tries:
                raise InputError(
                    f"{repo}: gave up after {tries} tries ({_first_line(cause)}); run it again, "
                    "what was transferred is not transferred twice"
                ) from None
            time.sleep(max(wait * 2 ** (number - 1), _asked_for(cause)))
    raise AssertionError("no try was left")


def _cause(error: Exception) -> Exception:
    """What went wrong underneath, where the client wraps it."""
    while isinstance(error, RuntimeError | LocalEntryNotFoundError) and isinstance(error.__cause__, Exception):
        error = error.__cause__
    return error


def _refusal(error: Exception, repo: str) -> str | None:
    """Why it is of no use to try again, or None."""
    if isinstance(error, OfflineModeIsEnabled):
        return f"{repo} cannot be reached: offline mode is on (HF_HUB_OFFLINE)"
    if isinstance(error, LocalTokenNotFoundError):
        return "there is no token: set HF_TOKEN or log in with `hf auth login`"
    if isinstance(error, GatedRepoError):
        return f"{repo} is gated: ask for access on its page"
    if isinstance(error, RevisionNotFoundError):
        return f"{repo} has no such revision"
    status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
    if status == 401 and not isinstance(error, RepositoryNotFoundError):
        return f"{repo}: the Hub does not accept the token: it is missing, wrong or expired (HF_TOKEN, `hf auth login`)"
    if status == 403:
        return f"{repo}: the token does not allow this ({_first_line(error)})"
    if isinstance(error, RepositoryNotFoundError):
        return f"{repo} is not on the Hub, or the token does not allow to see it"
    if status is not None and 400 <= status < 500 and status not in PASSING:
        return f"{repo}: the Hub refuses this: {_first_line(error)}"
    if isinstance(error, ValueError) and str(error).startswith("Invalid metadata"):  # of validate-yaml
        return f"{repo}: the Hub refuses the card: {' '.join(str(error).splitlines()[1:])}"
    return None


def _passing(error: Exception) -> bool:
    """A connection that broke, a Hub that is busy, or an answer that was cut off."""
    return isinstance(
        error,
        HTTP_ERROR
        | ConnectionError
        | json.JSONDecodeError
        | LocalEntryNotFoundError
        | RuntimeError,  # of hf_xet, the storage's own client
    ) or (isinstance(error, OSError) and str(error).startswith("Consistency check failed"))  # a download cut short


def _asked_for(error: Exception) -> float:
    """Seconds of ``Retry-After``."""
    if not isinstance(error, HfHubHTTPError):
        return 0.0
    value = error.response.headers.get("Retry-After", "")
    return float(value) if value.isdigit() else 0.0


def _first_line(error: Exception) -> str:
    said = getattr(error, "server_message", None) or str(error)
    return next((line for line in said.splitlines() if line.strip()), type(error).__name__)[:200]
