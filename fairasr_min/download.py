"""Models from the network: downloaded once, into a cache, whole or not at all.

The standard library's urllib, https only (http for this machine itself, which tests use).
"""

import hashlib
import http.client
import os
import re
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit

from tqdm import tqdm

TIMEOUT = 60  # seconds without a byte
PIECE = 2**20  # bytes
HERE = {"localhost", "127.0.0.1", "::1"}
FILES = {".nemo", ".pt", ".ckpt"}  # endings that no model's name on Hugging Face has


class DownloadError(ValueError):
    """A model that cannot be had; the message says from where, why, and what to do."""


def cache() -> Path:
    """$FAIRASR_CACHE, else fairasr_min in the user's cache folder."""
    if chosen := os.environ.get("FAIRASR_CACHE"):
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fairasr_min"


def local_file(source: str | Path, check: Callable[[Path, str], None]) -> Path:
    """The file of a path, a URL, or a name on Hugging Face (nvidia/stt_en_conformer_ctc_small: its
    NAME.nemo, from $HF_ENDPOINT if that is set). Raises DownloadError.

    check(path, suffix) raises ValueError if a download is not whole; then it is not kept.
    """
    if Path(source).is_dir():
        raise DownloadError(f"{source}: a folder; name the model file in it")
    if Path(source).exists():
        return Path(source)
    source = str(source)
    if "://" in source:
        return fetch(source, check)
    if re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", source) and Path(source).suffix not in FILES:
        endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")
        url = f"{endpoint}/{source}/resolve/main/{source.split('/')[1]}.nemo"
        try:
            return fetch(url, check)
        except DownloadError as error:
            raise DownloadError(
                f"{source}: no such file; as a Hugging Face name: {error}"
            ) from None
    raise DownloadError(f"{source}: no such file")


def fetch(url: str, check: Callable[[Path, str], None]) -> Path:
    """The cached copy of a URL, downloaded if there is none. Raises DownloadError.

    A download that breaks off begins anew next time: nothing of it stays.
    """
    require_safe(url)
    name = re.sub(r"[^\w.-]", "_", PurePosixPath(urlsplit(url).path).name)[-100:]
    place = cache() / f"{hashlib.sha256(url.encode()).hexdigest()[:12]}-{name}"
    if place.exists():
        return place
    unfinished = None
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        for old in place.parent.glob(f".{place.name}.*"):  # of a process that was killed
            if time.time() - old.stat().st_mtime > 10 * TIMEOUT:
                old.unlink(missing_ok=True)
        opener = urllib.request.build_opener(SafeRedirects)
        request = urllib.request.Request(url, headers={"User-Agent": "fairasr_min"})
        with opener.open(request, timeout=TIMEOUT) as reply:
            print(f"downloading {url} to {place}", file=sys.stderr)
            handle, unfinished = tempfile.mkstemp(dir=place.parent, prefix=f".{place.name}.")
            with open(handle, "wb") as file:
                receive(reply, file, name, url)
        check(Path(unfinished), place.suffix)
        os.replace(unfinished, place)
    except HTTPError as error:
        raise DownloadError(f"{url}: the server answers {error.code} ({error.reason})") from None
    except URLError as error:
        raise DownloadError(f"{url}: not reachable ({error.reason})") from None
    except (OSError, http.client.HTTPException) as error:
        reason = str(error) or type(error).__name__
        raise DownloadError(f"{url}: broken off ({reason}); nothing was kept, try again") from None
    except DownloadError:
        raise
    except ValueError as error:
        reason = str(error).removeprefix(f"{unfinished}: ")
        raise DownloadError(f"{url}: what came is no whole model file ({reason})") from None
    finally:
        if unfinished:
            Path(unfinished).unlink(missing_ok=True)
    return place


def receive(reply, file, name: str, url: str) -> None:
    """Write what the server sends. Raises DownloadError if it is not as much as was announced."""
    size, quiet = reply.length, not sys.stderr.isatty()
    with tqdm(desc=name, total=size, unit="B", unit_scale=True, disable=quiet) as bar:
        while piece := reply.read(PIECE):
            file.write(piece)
            bar.update(len(piece))
    if size is not None and file.tell() != size:
        raise DownloadError(
            f"{url}: broken off after {file.tell():,} of {size:,} bytes; nothing was kept, "
            "try again"
        )
    file.flush()
    os.fsync(file.fileno())


class SafeRedirects(urllib.request.HTTPRedirectHandler):
    """Follows redirections, but only to what require_safe() lets pass."""

    def redirect_request(self, request, file, code, message, headers, url):
        require_safe(url)
        return super().redirect_request(request, file, code, message, headers, url)


def require_safe(url: str) -> None:
    """Raises DownloadError unless it is https, or http on this machine."""
    try:
        parts = urlsplit(url)
        safe = parts.scheme == "https" or parts.scheme == "http" and parts.hostname in HERE
    except ValueError:
        safe = False
    if not safe:
        raise DownloadError(f"{url}: only https addresses are fetched")
