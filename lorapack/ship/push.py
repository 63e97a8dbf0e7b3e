"""Push a compressed adapter: one commit that is there whole or not at all, compared before it is called done."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_token
from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError
from huggingface_hub.hf_api import RepoFile

from lorapack import __version__
from lorapack.errors import InputError, OutputError
from lorapack.hub import is_hub_id
from lorapack.read.files import BIN, CARD, CONFIG, REPORT, SAFETENSORS, read_text
from lorapack.ship.cards import Prose, merged, parts
from lorapack.ship.leaks import refuse_leak, refuse_leaks
from lorapack.ship.parcel import Format, Item, Parcel, item, packed
from lorapack.ship.retry import persist

OWN = (CONFIG, SAFETENSORS, BIN, REPORT)  # an old one of these would go with other bytes than the new ones
MESSAGE = "Push with lorapack"


@dataclass(frozen=True)
class Target:
    """Where to, and how.

    Attributes:
        repo: ``owner/name``.
        form: as it is, or expanded to plain PEFT LoRA.
        base: the Hub id of the base model, instead of what the adapter says.
        private: make it private, where it is made.
        revision: a branch, made where it is not there; None for the default one.
        create_pr: as a pull request to the default branch.
        message: of the commit.
        licence: for the card, the Hub's name of it.
        prose: whose text stays in the card, where both the directory and the Hub have some.
    """

    repo: str
    form: Format = "compact"
    base: str | None = None
    private: bool = False
    revision: str | None = None
    create_pr: bool = False
    message: str = MESSAGE
    licence: str | None = None
    prose: Prose | None = None

    def __post_init__(self) -> None:
        if "/" not in self.repo or not is_hub_id(self.repo):
            raise InputError(f"{self.repo!r} is no Hub id; write owner/name")
        if self.create_pr and self.revision is not None:
            raise InputError("--create-pr proposes to the default branch; leave --revision out")
        if not self.message.strip():
            raise InputError("--message is empty")
        refuse_leak(self.message.encode(), "--message")


@dataclass(frozen=True)
class Remote:
    """What the Hub has.

    Attributes:
        head: the commit, None where there is no repository.
        branch: whether the branch asked for is there.
        private: None where there is no repository.
        files: size and digest by path; the digest is SHA-256 in the large file storage, else Git's SHA-1.
        card: the text of its card.
    """

    head: str | None
    branch: bool
    private: bool | None
    files: Mapping[str, tuple[int, str]]
    card: str


@dataclass(frozen=True)
class Shipment:
    """Exactly what one commit sends.

    Attributes:
        files: by path in the repository.
        card: the text of README.md.
        deleted: lorapack's own files of before that would be stale.
        unchanged: files that the Hub has already.
        left: files of the directory that are not sent.
        makes: what has to be made first, ``repository``, ``branch`` or nothing.
    """

    files: Mapping[str, Item]
    card: str
    deleted: tuple[str, ...]
    unchanged: tuple[str, ...]
    left: tuple[str, ...]
    makes: str | None


@dataclass(frozen=True)
class Pushed:
    """A commit that was compared.

    Attributes:
        repo, commit: where it is.
        url: of the pull request, or of the commit.
        changed: False where the Hub had all of it before.
    """

    repo: str
    commit: str
    url: str
    changed: bool


def push_adapter(
    directory: str | Path,
    target: Target,
    *,
    api: HfApi | None = None,
    wait: float = 1.0,
) -> Pushed:
    """Send a compressed adapter to the Hub as one commit, and compare what the Hub then has.

    A push that was broken off can be run again: what was uploaded is not sent twice, and a commit that
    arrived although its answer did not is found.

    Args:
        directory: what `lorapack compress` or `lorapack recover` wrote.
        target: where to, and how.
        api: the Hub's client, by default `client`.
        wait: seconds before the second try, see `lorapack.ship.retry.persist`.

    Raises:
        InputError: the directory is not fit to be pushed, or the Hub does not take it.
    """
    api = api or client()
    with packed(directory, target.repo, target.form, target.base) as parcel:
        refuse_leaks(parcel.directory, get_token())
        return persist(lambda: _attempt(api, target, parcel), target.repo, wait)


def plan_push(directory: str | Path, target: Target) -> Shipment:
    """What `push_adapter` would send; only requests that read are sent.

    See `push_adapter` for the arguments and what it raises.
    """
    with packed(directory, target.repo, target.form, target.base) as parcel:
        refuse_leaks(parcel.directory, get_token())
        return load(parcel, target, persist(lambda: look(client(), target), target.repo))


def client() -> HfApi:
    """The Hub's own, as its environment variables say (HF_ENDPOINT, HF_TOKEN, HF_HUB_OFFLINE)."""
    return HfApi(library_name="lorapack", library_version=__version__)


def look(api: HfApi, target: Target) -> Remote:
    """The state of the repository on the Hub; requests only read."""
    branch = True
    try:
        info = api.repo_info(target.repo, revision=target.revision)
    except RevisionNotFoundError:
        branch, info = False, api.repo_info(target.repo)
    except RepositoryNotFoundError:
        return Remote(None, target.revision is None, None, {}, "")
    assert info.sha is not None
    files = _tree(api, target.repo, info.sha)
    card = ""
    if CARD in files:
        card = read_text(Path(api.hf_hub_download(target.repo, CARD, revision=info.sha)))
    return Remote(info.sha, branch, info.private, files, card)


def load(parcel: Parcel, target: Target, remote: Remote) -> Shipment:
    """Put the parcel and the card together.

    Raises:
        InputError: the cards contradict each other, the card holds a secret or a path, or the repository is
            public and was to be private.
    """
    if target.private and remote.private is False:
        raise InputError(f"{target.repo} exists and is public; --private is for a repository that is made")
    card = merged(
        parcel.metadata,
        parcel.part,
        parts(parcel.card, CARD),
        parts(remote.card, f"the card of {target.repo}"),
        target.prose,
        target.licence,
    )
    refuse_leak(card.encode(), CARD, token=get_token())
    files = {**parcel.items, CARD: item(card.encode())}
    return Shipment(
        files,
        card,
        deleted=tuple(name for name in OWN if name in remote.files and name not in files),
        unchanged=tuple(name for name in files if files[name].is_at(remote.files.get(name))),
        left=parcel.left,
        makes="repository" if remote.head is None else None if remote.branch else "branch",
    )


def _attempt(api: HfApi, target: Target, parcel: Parcel) -> Pushed:
    """One try from the start; it goes on from whatever an earlier one has reached."""
    remote = look(api, target)
    shipment = load(parcel, target, remote)
    if shipment.makes == "repository":
        api.create_repo(target.repo, private=target.private or None, exist_ok=True)
    if shipment.makes and target.revision is not None:
        api.create_branch(target.repo, branch=target.revision, exist_ok=True)
    if shipment.makes:
        remote = look(api, target)
        shipment = load(parcel, target, remote)
    assert remote.head is not None
    if _arrived(shipment, remote.files):
        return Pushed(target.repo, remote.head, f"{api.endpoint}/{target.repo}/commit/{remote.head}", False)
    if target.create_pr and (proposed := _proposed(api, target, shipment)):
        return proposed
    done = api.create_commit(
        target.repo,
        [
            *(CommitOperationAdd(name, sent.source) for name, sent in shipment.files.items()),
            *(CommitOperationDelete(name, is_folder=False) for name in shipment.deleted),
        ],
        commit_message=target.message,
        revision=target.revision,
        create_pr=target.create_pr,
        parent_commit=remote.head,
    )
    if not _arrived(shipment, _tree(api, target.repo, done.oid)):
        raise OutputError(f"{target.repo}: what the Hub has at {done.oid} is not what was sent; look at it there")
    return Pushed(target.repo, done.oid, done.pr_url or done.commit_url, True)


def _proposed(api: HfApi, target: Target, shipment: Shipment) -> Pushed | None:
    """An open pull request with just this, of a try whose answer was lost."""
    for found in api.get_repo_discussions(target.repo, discussion_type="pull_request", discussion_status="open"):
        if found.git_reference is None:
            continue
        head = api.repo_info(target.repo, revision=found.git_reference).sha
        if head is not None and _arrived(shipment, _tree(api, target.repo, head)):
            return Pushed(target.repo, head, found.url, True)
    return None


def _tree(api: HfApi, repo: str, revision: str) -> dict[str, tuple[int, str]]:
    found = api.list_repo_tree(repo, recursive=True, revision=revision)
    return {f.path: (f.size, f.lfs.sha256 if f.lfs else f.blob_id) for f in found if isinstance(f, RepoFile)}


def _arrived(shipment: Shipment, files: Mapping[str, tuple[int, str]]) -> bool:
    """Whether these files are the whole shipment, and no old file of ours is beside them."""
    stale = [name for name in OWN if name in files and name not in shipment.files]
    return not stale and all(sent.is_at(files.get(name)) for name, sent in shipment.files.items())
