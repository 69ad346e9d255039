"""Files on disk or behind any URL that fsspec knows (s3://, gs://, https://, memory://): find, read, replace and stamp them.

What fails for a moment (timeouts, lost connections, 429, 5xx, SlowDown, truncated reads) is tried again; what cannot work is told at once.
A store's options come from the environment or from fsspec's settings: AWS_ENDPOINT_URL or FSSPEC_S3_ENDPOINT_URL, FSSPEC_S3_ANON=true, ….
"""
from __future__ import annotations

import asyncio
import errno
import hashlib
import io
import json
import os
import random
import shutil
import socket
import ssl
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from glob import glob as glob_local
from pathlib import Path
from typing import IO, Any, TypeVar

from fsspec.core import url_to_fs

from .types import BadInput

T = TypeVar("T")
ATTEMPTS = 5
PAUSE = 0.5
"""Seconds before the second attempt, about; doubled before each further one."""
WAIT = 60.0
"""Seconds without an answer or a byte after which a web server is given up."""
BLOCK = 8 << 20
"""Bytes that are fetched and held at once."""
S3_UPLOAD = {"chunksize": 16 << 20, "max_concurrency": 4}
"""Bytes of a part, and how many are on their way at once. s3fs itself would hold 10 of 50 MiB, twice."""
FULL = frozenset((errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.ENOTDIR, errno.EPERM))
"""What a disk answers that takes no more."""
TRANSIENT_STATUS = frozenset((408, 425, 429, 500, 502, 503, 504))
TRANSIENT_ERRNO = frozenset((errno.EAGAIN, errno.EBUSY, errno.EIO, errno.EPIPE, errno.ETIMEDOUT, errno.ECONNRESET, errno.ECONNREFUSED,
                             errno.ECONNABORTED, errno.ENETUNREACH, errno.EHOSTUNREACH, getattr(errno, "EREMOTEIO", errno.EIO)))
TRANSIENT_CODES = frozenset(("SlowDown", "RequestTimeout", "Throttling", "ThrottlingException", "RequestLimitExceeded"))
TRANSIENT_NAMES = frozenset((
    "ClientConnectionError", "ClientPayloadError", "TransferEncodingError", "ContentLengthError",  # aiohttp
    "HTTPClientError", "ResponseParserError", "ResponseStreamingError",  # botocore
    "ConnectionError", "Timeout", "ChunkedEncodingError", "ProtocolError",  # requests, urllib3
    "IncompleteRead", "IncompleteReadError", "ServiceRequestError", "ServiceResponseError"))  # http.client, asyncio, Azure


# ---- names


def is_remote(url: str) -> bool:
    return "://" in url


def join(folder: str | Path, name: str) -> str:
    folder = str(folder)
    if not is_remote(folder):
        return os.path.join(folder, name)
    return folder + name if folder.endswith("://") else f"{folder.rstrip('/')}/{name}"


def split(url: str) -> tuple[str, str]:
    """Parent and last component. A web address loses its query; in other stores ? is a character of names."""
    if not is_remote(url):
        return os.path.split(url)
    scheme, _, rest = url.partition("://")
    if scheme.endswith(("http", "https")):
        rest = rest.partition("?")[0]
    folder, _, name = rest.rstrip("/").rpartition("/")
    return f"{scheme}://{folder}", name


def folder_of(url: str) -> str:
    return split(url)[0]


def name_of(url: str) -> str:
    return split(url)[1]


# ---- errors


def causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__


def status_of(error: BaseException) -> int | None:
    """The HTTP status that an error carries: each library has a place of its own for it."""
    answer = getattr(error, "response", None)
    if isinstance(answer, dict):  # botocore
        if answer.get("Error", {}).get("Code") in TRANSIENT_CODES:
            return 503
        return answer.get("ResponseMetadata", {}).get("HTTPStatusCode")
    found = (getattr(holder, name, None) for holder in (error, answer) for name in ("status", "status_code", "code"))
    return next((v for v in found if isinstance(v, int)), None)


def is_transient(error: BaseException) -> bool:
    """Whether trying again may help. The outermost error that tells decides, but for errno: s3fs gives EIO to all that it does not know."""
    chain = list(causes(error))
    if any(isinstance(e, ssl.SSLCertVerificationError) or (isinstance(e, socket.gaierror) and e.errno != socket.EAI_AGAIN) for e in chain):
        return False
    for e in chain:
        if isinstance(e, (TimeoutError, asyncio.TimeoutError, ConnectionError)) or TRANSIENT_NAMES & {k.__name__ for k in type(e).__mro__}:
            return True
        if status := status_of(e):
            return status in TRANSIENT_STATUS
    return any(getattr(e, "errno", None) in TRANSIENT_ERRNO for e in chain)


def is_missing(error: BaseException) -> bool:
    """Not there, or not shown: a bucket that may not be listed answers 403 for what it lacks. fsspec says the same of a lost web server."""
    lost = is_transient(error) or any(isinstance(e, (socket.gaierror, ssl.SSLError)) for e in causes(error))
    return isinstance(error, (FileNotFoundError, NotADirectoryError, PermissionError)) and not lost


def retried(act: Callable[[], T]) -> T:
    """Raises the store's own error: at once where it will stay, else that of the last of ATTEMPTS."""
    for attempt in range(ATTEMPTS):
        try:
            return act()
        except Exception as error:
            if attempt == ATTEMPTS - 1 or not is_transient(error):
                raise
        time.sleep(PAUSE * 2**attempt * random.uniform(0.5, 1.5))  # jitter: many workers must not come back at once
    raise AssertionError("ATTEMPTS is 0")


@contextmanager
def telling(url: str, done: str) -> Iterator[None]:
    """What a store raises, as BadInput: `url: cannot be <done> (why); mend`."""
    try:
        yield
    except BadInput:
        raise
    except Exception as error:  # each store's library has errors of its own
        cause = error.__cause__ or error
        why = str(error) if not is_remote(url) else f"{type(cause).__name__}: {cause}".removesuffix(": ")
        if getattr(error, "errno", None) == errno.ENOSPC:
            mend = "make room on the disk, or name another with TMPDIR"
        elif is_remote(url) and is_transient(error):
            mend = "check the connection and try again" + ("" if done == "written" else ", or download it")
        else:
            mend = "check the path" if isinstance(error, FileNotFoundError) else "check the path and your rights"
        raise BadInput(f"{url}: cannot be {done} ({' '.join(why.split())[:300]}); {mend}") from error


# ---- find


def store(url: str) -> tuple[Any, str]:
    """The file system of a URL and the path in it. Fetched anew each time: one that was made before a fork must not be used after it."""
    options = {}
    try:
        if url.startswith(("http://", "https://")):
            import aiohttp

            # its own limit of 5 minutes holds for a whole file, and breaks off readers that take their time
            options["timeout"] = aiohttp.ClientTimeout(total=None, sock_connect=WAIT, sock_read=WAIT)
        fs, path = url_to_fs(url, **options)
    except (ImportError, ValueError) as error:
        raise BadInput(f"{url}: {error}; install the fsspec package of this store, or download the files") from error
    fs.invalidate_cache()  # listings that others have changed since
    return fs, path


def about(url: str) -> tuple[Any, str, dict[str, Any]]:
    """The file system, the path and what fsspec's `info` says. Raises the store's errors."""
    fs, path = store(url)
    return fs, path, retried(lambda: fs.info(path))


def exists(url: str) -> bool:
    """Of a file or folder; what may not be read counts as absent."""
    if not is_remote(url):
        return os.path.exists(url)
    with telling(url, "looked up"):
        try:
            about(url)
            return True
        except Exception as error:
            if not is_missing(error):
                raise
            return False


def size(url: str) -> int:
    """Bytes. Reads the file where the server does not say. Raises BadInput if there is no such file."""
    with open_read(url) as file:
        return file.seek(0, os.SEEK_END)


def listing(folder: str, end: str = ".tar") -> list[str]:
    """Full names of the files directly in a folder whose names end so, sorted; none of a folder that does not exist."""
    with telling(folder, "listed"):
        try:
            if is_remote(folder):
                fs, path = store(folder.rstrip("/") + "/")
                entries = [e["name"].rpartition("/") for e in retried(lambda: fs.ls(path, detail=True)) if e["type"] == "file"]
                names = [name for parent, _, name in entries if parent == path.rstrip("/")]
            else:
                with os.scandir(folder or ".") as files:
                    names = [f.name for f in files if f.is_file()]
        except (FileNotFoundError, NotADirectoryError) as error:
            if not is_missing(error):
                raise
            return []
    return sorted(join(folder, name) for name in names if name.endswith(end) and not name.startswith("."))


def glob(pattern: str) -> list[str]:
    """Full names of what matches, `*` for any part of a name, sorted."""
    if not is_remote(pattern):
        return sorted(glob_local(pattern))
    fs, path = store(pattern)
    before = pattern.removesuffix(path)  # what fsspec takes off and leaves out of its answers
    with telling(pattern, "listed"):
        found = retried(lambda: fs.glob(path))
    return sorted(before + name if before != pattern else fs.unstrip_protocol(name) for name in found)


# ---- read


class Remote(io.RawIOBase):
    """A file behind a URL, seekable, of which one block is held at a time. Ranges are fetched; where there are none to be had, or the
    size is not known, the file is streamed, and streamed again to go back. Its constructor raises the store's errors, reading BadInput."""

    stream: Any = None

    def __init__(self, url: str, at_once: int = 0):
        self.url, self.at_once = url, at_once or BLOCK
        self.fs, self.path, info = about(url)
        if info.get("type") == "directory":
            raise IsADirectoryError(errno.EISDIR, "it is a folder")
        self.size: int | None = info.get("size")
        self.web = "https" in self.fs.protocol
        self.at = self.begin = self.streamed = 0
        self.block = memoryview(b"")

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.at

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        while whence == os.SEEK_END and self.size is None:
            self.load(self.begin + len(self.block))
        self.at = max(0, offset + (0, self.at, self.size or 0)[whence])
        return self.at

    def readinto(self, buffer: Any) -> int:
        if self.size is not None and self.at >= self.size:
            return 0
        if not self.begin <= self.at < self.begin + len(self.block):
            self.load(self.at - self.at % self.at_once)
        part = self.block[self.at - self.begin:][:len(buffer)]
        buffer[:len(part)] = part
        self.at += len(part)
        return len(part)

    def close(self) -> None:
        self.drop()
        super().close()

    def load(self, begin: int) -> None:
        self.block = memoryview(b"")  # before the next one comes, not after
        with telling(self.url, "read to its end"):
            self.begin, self.block = begin, memoryview(retried(lambda: self.fetch(begin)))

    def fetch(self, begin: int) -> bytes | bytearray:
        """The block that begins there: whole, unless the file ends in it."""
        n, known = (self.at_once, False) if self.size is None else (min(self.at_once, self.size - begin), True)
        try:
            body = self.fetch_streamed(begin, n) if self.web or not known else self.fs.cat_file(self.path, start=begin, end=begin + n)
            if known and len(body) != n:
                raise ConnectionError(f"{len(body)} bytes came of {n}")
        except Exception:
            self.drop()
            raise
        return body

    def fetch_streamed(self, begin: int, n: int) -> bytearray:
        partial = False
        if self.stream is None or self.streamed > begin:
            self.drop()
            partial = self.open_stream(begin, n)
        while self.streamed < begin and self.take(min(1 << 20, begin - self.streamed)):
            pass
        body = bytearray()
        while len(body) < n and (part := self.take(n - len(body))):
            body += part
        if partial:
            self.drop()  # it held this range alone
        return body

    def open_stream(self, begin: int, n: int) -> bool:
        """Whether it is of just the range: a web server may answer with all of the file instead, which is then read on and on."""
        options: dict[str, Any] = {}
        if self.web:
            headers = self.fs.kwargs.get("headers", {}) | {"Accept-Encoding": "identity"}
            if self.size is not None:
                headers["Range"] = f"bytes={begin}-{begin + n - 1}"
            options = {"block_size": 0, "headers": headers, "size": self.size or 1}  # with a size, it does not ask for one again
        self.stream = self.fs.open(self.path, "rb", **options)
        partial = self.web and self.stream.r.status == 206
        self.streamed = begin if partial else 0
        return partial

    def take(self, n: int) -> bytes:
        part = self.stream.read(n)
        self.streamed += len(part)
        if not part and self.size is None:
            self.size = self.streamed
        return part

    def drop(self) -> None:
        if self.stream is not None:
            self.stream.close()
        self.stream = None


@contextmanager
def open_read(url: str | Path, at_once: int = 0) -> Iterator[IO[bytes]]:
    """A seekable binary file. Of one in a store `at_once` bytes are fetched at a time, or BLOCK."""
    url = str(url)
    with telling(url, "opened"):
        file: IO[bytes] = io.BufferedReader(Remote(url, at_once), 1 << 13) if is_remote(url) else open(url, "rb")  # noqa: SIM115
    with file:
        yield file


def read_bytes(url: str | Path) -> bytes:
    with open_read(url) as file:
        return file.read()


def read_json(path: str | Path) -> dict[str, Any]:
    body = read_bytes(path)
    try:
        value = json.loads(body)
        if not isinstance(value, dict):
            raise ValueError("not an object")
        return value
    except ValueError as error:
        raise BadInput(f"{path}: cannot be read as JSON ({error}); check the path and the file") from error


@contextmanager
def local(url: str | Path) -> Iterator[Path]:
    """The file itself, or a temporary copy of one behind a URL, under the same name."""
    url = str(url)
    with open_read(url) as file:
        if not is_remote(url):
            yield Path(url)
            return
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, name_of(url))
            with telling(url, "copied"), open(path, "wb") as out:
                shutil.copyfileobj(file, out, 1 << 20)
            yield path


# ---- write


@contextmanager
def replacing(url: str | Path) -> Iterator[Path]:
    """A temporary path that takes the place of `url` when the block ends well, and vanishes when it does not.

    An object in a store appears when all of it has come. A process that is killed may leave parts in S3, which nobody sees and a rule of
    the bucket (AbortIncompleteMultipartUpload) clears away.
    """
    if is_remote(str(url)):
        url = str(url)
        fs, inner = store(url)
        options = S3_UPLOAD if "s3" in fs.protocol else {}
        with tempfile.TemporaryDirectory() as folder:
            temporary = Path(folder, name_of(url))
            yield temporary
            with telling(url, "written"):
                retried(lambda: fs.put_file(str(temporary), inner, **options))
        return
    path = Path(url)
    temporary = path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        os.replace(temporary, path)
    except OSError as error:
        if error.errno in FULL:
            raise BadInput(f"{path}: cannot be written ({error.strerror}); make room, or name another place, and run again") from error
        raise
    finally:
        with suppress(OSError):
            temporary.unlink()


def write_json(path: str | Path, value: Any) -> None:
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def remove(url: str | Path) -> None:
    """Missing is fine."""
    url = str(url)
    with telling(url, "removed"), suppress(FileNotFoundError):
        if is_remote(url):
            fs, path = store(url)
            retried(lambda: fs.rm_file(path))
        else:
            os.unlink(url)


# ---- whether they changed


def stamp(files: Iterable[tuple[str, str]], *more: str) -> str:
    """A hash of (name, path or URL) of files, which changes when one is changed or replaced; "" where a store does not tell."""
    digest = hashlib.blake2b("\n".join(more).encode(), digest_size=16)
    for name, path in files:
        version = remote_version(path) if is_remote(path) else local_version(path)
        if not version:
            return ""
        digest.update(f"\n{name}\0{version}".encode(errors="surrogateescape"))
    return digest.hexdigest()


def local_version(path: str) -> str:
    """Restoring size and time of a file that was replaced leaves its inode and the time of the change."""
    s = os.stat(path)
    return f"{s.st_size} {s.st_mtime_ns} {s.st_ctime_ns} {s.st_ino}"


def remote_version(url: str) -> str:
    try:
        info = about(url)[2]
    except Exception:  # each store has its own errors; who reads the file will tell
        return ""
    tag, size = next((str(info[k]) for k in ("ETag", "etag") if info.get(k)), ""), info.get("size")
    when = next((str(info[k]) for k in ("Last-Modified", "LastModified", "last_modified", "mtime", "updated") if info.get(k)), "")
    return tag or (f"{when} {size}" if when and size is not None else "")
