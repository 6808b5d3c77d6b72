"""Weights from the hub into its cache: exactly the files that are needed, resumed and verified.

The hub's own client lists repositories, carries tokens and mirrors, and links finished files into
its cache. The bytes are streamed here, because that client starts a file again after a kill: ours
grow in `blobs/HASH.incomplete`, are hashed when complete, and only then take their name.
"""

import os
import queue
import re
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from sana_cli.errors import BrokenModel, DiskFull, MissingModel
from sana_cli.reporter import TransferReporter
from sana_cli.system.disk import Lock
from sana_cli.units import gigabytes
from sana_cli.weights.catalogue import Source
from sana_cli.weights.hub_cache import Digest, pinned_commit, record, repo_folder
from sana_cli.weights.layout import INDEX

Result = TypeVar("Result")

AT_ONCE = 4  # files in flight
ATTEMPTS = 5  # in a row without a new byte, before giving up
LONGEST_WAIT = 30.0  # seconds between two attempts, whatever the server asks for
SPARE = 64 << 20  # bytes left free on the volume: configs, the lock, the file system's own
TRANSIENT = (408, 429, 500, 502, 503, 504)


@dataclass(frozen=True)
class RemoteFile:
    """A file of a repository at a commit."""

    repo: str
    commit: str
    name: str
    digest: Digest

    @property
    def id(self) -> str:
        return f"{self.repo}/{self.name}"

    @property
    def blob(self) -> Path:
        return repo_folder(self.repo) / "blobs" / self.digest.value

    @property
    def partial(self) -> Path:
        return self.blob.with_name(f"{self.blob.name}.incomplete")

    @property
    def pointer(self) -> Path:
        return repo_folder(self.repo) / "snapshots" / self.commit / self.name

    @property
    def missing_bytes(self) -> int:
        """Bytes that are still to be fetched."""
        if self.pointer.is_file() or self.blob.is_file():
            return 0
        done = self.partial.stat().st_size if self.partial.is_file() else 0
        return max(self.digest.size - done, 0)


@dataclass(frozen=True)
class Listing:
    """The files that a source needs from the hub, at a commit."""

    source: Source
    commit: str
    files: list[RemoteFile]


def list_source(source: Source, note: Callable[[str], None], newest: bool = False) -> Listing:
    """List the files of a source on the hub, at its pinned commit or, for `newest`, its revision.

    MissingModel if the hub does not give them, and at once if it cannot be reached: nothing is
    under way yet that waiting would save.
    """
    revision = source.revision if newest else pinned_commit(source) or source.revision
    with _explained(source.repo):
        commit, present = _present(source.repo, revision, note)
        names = source.needs(present)
    return Listing(
        source, commit, [RemoteFile(source.repo, commit, name, present[name]) for name in names]
    )


def holds_lora(repo: str, note: Callable[[str], None]) -> bool:
    """Return whether a repository on the hub holds a LoRA and no model."""
    with _explained(repo):
        _, present = _present(repo, "main", note)
    folders = {name.partition("/")[0] for name in present}
    return not folders & {INDEX, "transformer"} and any(n.endswith(".safetensors") for n in present)


def _present(
    repo: str, revision: str, note: Callable[[str], None]
) -> tuple[str, dict[str, Digest]]:
    """Resolve a revision: its commit now, and the size and hash of every file."""
    from huggingface_hub import HfApi

    info = _again(
        lambda: HfApi().model_info(
            repo, revision=revision, files_metadata=True, timeout=_timeout()
        ),
        note,
        unless_unreachable=True,
    )
    present = {}
    for sibling in info.siblings or []:
        if sibling.lfs is not None:
            present[sibling.rfilename] = Digest(sibling.lfs.size, "sha256", sibling.lfs.sha256)
        elif sibling.size is not None and sibling.blob_id:
            present[sibling.rfilename] = Digest(sibling.size, "git", sibling.blob_id)
    return info.sha or revision, present


def fetch(listings: list[Listing], report: TransferReporter) -> None:
    """Download every file of the listings into the cache and pin the sources to their commits.

    DiskFull before the first byte if they do not fit; MissingModel if the hub fails or sends
    something else than it promised. What was fetched is kept for the next attempt.
    """
    files = list({file.pointer: file for listing in listings for file in listing.files}.values())
    missing = [file for file in files if not file.pointer.is_file()]
    _check_disk(sum(file.missing_bytes for file in missing))
    sizes = {file.id: file.digest.size for file in missing}
    report.begin(sizes, {file.id: file.digest.size - file.missing_bytes for file in missing})
    _fetch_at_once(missing, report)
    for listing in listings:
        record(listing.source, listing.commit, {f.name: f.digest for f in listing.files})


def free_disk() -> tuple[Path, int]:
    """Return the folder that the cache is in, or will be made in, and its free bytes."""
    from huggingface_hub.constants import HF_HUB_CACHE

    place = Path(HF_HUB_CACHE)
    while not place.exists():
        place = place.parent
    return place, shutil.disk_usage(place).free


def _check_disk(needed: int) -> None:
    place, free = free_disk()
    if needed and needed + SPARE > free:
        raise DiskFull(
            f"the download needs {gigabytes(needed)}, and {place} has {gigabytes(free)} free",
            "free some, or set HF_HOME to a larger disk",
        )


class _Stopped(Exception):
    """Raised when another file has failed or the user has interrupted."""


def _fetch_at_once(files: list[RemoteFile], report: TransferReporter) -> None:
    stop = threading.Event()
    # The largest first, so that the last to end is a small one.
    waiting = sorted(files, key=lambda file: file.digest.size)
    results: queue.SimpleQueue[Exception | None] = queue.SimpleQueue()

    def work() -> None:
        while not stop.is_set():
            try:
                file = waiting.pop()
            except IndexError:
                return
            try:
                _fetch_file(file, report, stop)
                results.put(None)
            except Exception as error:  # raised again where it can be reported
                results.put(error)

    # Daemons: a user who leaves does not wait for a connection that has stalled.
    for _ in files[:AT_ONCE]:
        threading.Thread(target=work, daemon=True).start()
    try:
        for _ in files:
            error = results.get()
            if error is not None:
                raise error
    finally:
        stop.set()


def _fetch_file(file: RemoteFile, report: TransferReporter, stop: threading.Event) -> None:
    from huggingface_hub import constants, hf_hub_download

    file.blob.parent.mkdir(parents=True, exist_ok=True)
    locks = repo_folder(file.repo).parent / ".locks" / repo_folder(file.repo).name
    locks.mkdir(parents=True, exist_ok=True)
    with _explained(file.repo):
        # The lock that the hub's client takes: another process fetching this file is waited for.
        with Lock(locks / f"{file.digest.value}.lock", wait=True) as lock:
            if not file.blob.is_file():
                _complete(file, report, stop)
        try:
            pointer = Path(
                _again(
                    lambda: hf_hub_download(file.repo, file.name, revision=file.commit),
                    report.note,
                    stop=stop,
                )
            )
        except OSError as error:
            if lock.missing is None or error.strerror != lock.missing:
                raise
            raise MissingModel(  # ours is only for others' sake, the client insists on its own
                f"{constants.HF_HUB_CACHE} cannot be locked, as the hub's client needs:"
                f" {lock.missing}",
                "set HF_HOME to a folder on a disk of this machine",
            ) from None
        if not pointer.is_symlink() and not file.blob.samefile(pointer):
            file.blob.unlink()  # where links are not possible the client has made a copy
    report.advance(file.id, file.digest.size)


def _complete(file: RemoteFile, report: TransferReporter, stop: threading.Event) -> None:
    """Fetch the rest of a file, check it, and give it its name."""
    for last in (False, True):
        _grow(file, report, stop)
        if file.digest.fits(file.partial):
            os.replace(file.partial, file.blob)
            return
        file.partial.unlink()
        if not last:
            report.note(f"{file.name} arrived damaged; fetching it again")
    raise BrokenModel(f"{file.name} arrived damaged twice: its hash is not the hub's", "try later")


def _grow(file: RemoteFile, report: TransferReporter, stop: threading.Event) -> None:
    """Append to the partial file until it has its size."""
    from huggingface_hub import hf_hub_url
    from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

    url = hf_hub_url(file.repo, file.name, revision=file.commit)

    def attempt() -> None:
        with open(file.partial, "ab", buffering=0) as out:
            done = out.tell()
            if done > file.digest.size:
                out.truncate(done := 0)
            # Not compressed: a range of a compressed body would be a range of something else.
            headers = build_hf_headers() | {"Accept-Encoding": "identity"}
            if done == file.digest.size:
                return
            if done:
                headers["Range"] = f"bytes={done}-"
            with get_session().stream("GET", url, headers=headers, timeout=_timeout()) as response:
                hf_raise_for_status(response)
                if done and response.status_code != 206:  # the server sends the whole again
                    out.truncate(done := 0)
                for chunk in response.iter_bytes():
                    if stop.is_set():
                        raise _Stopped
                    out.write(chunk)
                    done += len(chunk)
                    report.advance(file.id, done)
            if done < file.digest.size:
                raise ConnectionError(f"the connection ended after {done} bytes")

    _again(attempt, report.note, lambda: _size(file.partial), stop=stop)


@contextmanager
def _explained(repo: str) -> Iterator[None]:
    """Turn what the hub's client raises into errors with a hint."""
    import httpx2
    from huggingface_hub import constants, errors

    kept = "run the same again: what has arrived is kept"
    try:
        yield
    except BrokenModel as error:
        raise MissingModel(f"{repo}: {error.message}", error.hint) from None
    except errors.GatedRepoError:
        raise MissingModel(
            f"{repo} is given out only after its licence is accepted",
            "accept it on the repository's page, then `hf auth login` or set HF_TOKEN",
        ) from None
    except errors.RevisionNotFoundError:
        raise MissingModel(
            f"{repo} has not, or no longer, the commit that is asked for",
            "if an earlier download chose it, `sana models pull --update NAME` takes the newest",
        ) from None
    except errors.RepositoryNotFoundError:
        raise MissingModel(
            f"the hub has no repository {repo}, or does not show it to you",
            "check the name; for a private one `hf auth login` or set HF_TOKEN",
        ) from None
    except errors.HfHubHTTPError as error:
        raise MissingModel(f"{repo}: {_reason(error)}", kept) from None
    except (httpx2.TransportError, ConnectionError, errors.LocalEntryNotFoundError) as error:
        if _is_unreachable(error):
            raise MissingModel(
                f"cannot reach the hub at {constants.ENDPOINT}: {_reason(error)}",
                "check the network; HF_ENDPOINT sets a mirror, --model FOLDER takes weights from a"
                " disk, and --model demo needs neither",
            ) from None
        raise MissingModel(
            f"{repo} cannot be fetched from {constants.ENDPOINT}: {_reason(error)}",
            f"{kept}; HF_ENDPOINT sets a mirror, --model FOLDER takes weights from a disk",
        ) from None


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _timeout() -> float:
    """Seconds without a byte after which a connection is given up."""
    from huggingface_hub import constants

    return float(constants.HF_HUB_DOWNLOAD_TIMEOUT)


def _again(
    operation: Callable[[], Result],
    note: Callable[[str], None],
    progress: Callable[[], int] = lambda: 0,
    unless_unreachable: bool = False,
    stop: threading.Event | None = None,
) -> Result:
    """Repeat what fails for a transient reason, waiting longer after each attempt in vain.

    `unless_unreachable` gives up at once where no connection can be made, `stop` once it is set: a
    process that ends closes the connections of its threads, which is no reason to try again.
    """
    stop = stop or threading.Event()
    failures, had = 0, progress()
    while True:
        try:
            return operation()
        except Exception as error:
            wait = _wait_after(error, failures)
            if progress() > had:
                failures, had = 0, progress()
            failures += 1
            if wait is None or failures >= ATTEMPTS or stop.is_set():
                raise
            if unless_unreachable and _is_unreachable(error):
                raise
            note(f"{_reason(error)}; trying again in {wait:.0f} s")
            if stop.wait(wait):
                raise


def _wait_after(error: Exception, failures: int) -> float | None:
    """Seconds to wait, None if trying again is of no use."""
    import httpx2
    from huggingface_hub.errors import HfHubHTTPError

    wait = min(2.0**failures, LONGEST_WAIT)
    if isinstance(error, HfHubHTTPError):
        if error.response.status_code not in TRANSIENT:
            return None
        asked = error.response.headers.get("Retry-After", "")
        return min(float(asked), LONGEST_WAIT) if asked.isdigit() else wait
    return wait if isinstance(error, httpx2.TransportError | ConnectionError) else None


def _is_unreachable(error: Exception) -> bool:
    """Return whether no connection was made: no network, host, listener or proxy."""
    import httpx2

    return isinstance(error, httpx2.ConnectError | httpx2.ConnectTimeout | httpx2.ProxyError)


def _reason(error: Exception) -> str:
    import httpx2
    from huggingface_hub.errors import HfHubHTTPError

    if isinstance(error, HfHubHTTPError):
        return f"the hub answered {error.response.status_code}"
    if isinstance(error, httpx2.TimeoutException):
        return f"nothing came for {_timeout():.0f} s"
    text = re.sub(r"^\[Errno -?\d+\] ", "", " ".join(str(error).split()))
    return text or type(error).__name__
