"""What stores promise: one interface to disk, S3, web and memory; what passes is tried again, what stays is told in one line."""
from __future__ import annotations

import errno
import io
import itertools
import multiprocessing
import random
import re
import socket
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
from conftest import picture, tar
from stores import http_server, s3_bucket

from mmbackdoor import stores
from mmbackdoor.types import BadInput

BODY = random.Random(0).randbytes(10_007)


@pytest.fixture(autouse=True)
def in_haste(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stores, "PAUSE", 0)
    monkeypatch.setattr(stores, "BLOCK", 1000)


@pytest.fixture(scope="module")
def bucket() -> Iterator[str]:
    with s3_bucket() as url:
        yield url


@pytest.fixture
def memory() -> Iterator[str]:
    yield "memory://store"
    fsspec.filesystem("memory").store.clear()


@pytest.fixture(params=["local", "s3", "memory"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty folder of each kind."""
    if request.param == "local":
        return str(tmp_path / "folder")
    where = request.getfixturevalue("bucket" if request.param == "s3" else "memory")
    return f"{where}/{tmp_path.name}"


def put(url: str, body: bytes = BODY) -> str:
    with stores.replacing(url) as temporary:
        temporary.write_bytes(body)
    return url


def told(act: Any, *args: Any) -> str:
    with pytest.raises(BadInput) as raised:
        act(*args)
    assert "\n" not in str(raised.value)
    return str(raised.value)


def failing(monkeypatch: pytest.MonkeyPatch, name: str, *errors: Exception | bytes) -> list[int]:
    """Makes the memory store's method fail so, one time each, then work. Counts the calls."""
    kind, calls, left = type(fsspec.filesystem("memory")), [0], iter(errors)
    works = getattr(kind, name)

    def method(self: Any, *args: Any, **options: Any) -> Any:
        calls[0] += 1
        fault = next(left, None)
        if isinstance(fault, Exception):
            raise fault
        return works(self, *args, **options) if fault is None else fault

    monkeypatch.setattr(kind, name, method)
    return calls


# ---- names


@pytest.mark.parametrize(("url", "folder", "name"), [
    ("s3://b/x/a.tar", "s3://b/x", "a.tar"), ("s3://b/a?.tar", "s3://b", "a?.tar"), ("s3://b/x/", "s3://b", "x"), ("s3://b", "s3://", "b"),
    ("https://h/x/a.tar?sig=a/b&c=d", "https://h/x", "a.tar"), ("/d/a.tar", "/d", "a.tar"), ("a.tar", "", "a.tar")])
def test_names_are_taken_apart_and_joined(url: str, folder: str, name: str) -> None:
    assert (stores.folder_of(url), stores.name_of(url)) == (folder, name)
    assert stores.join(folder, name) == url.partition("?sig")[0].rstrip("/")


# ---- every kind of store


def test_what_is_written_is_found_and_read_back(folder: str) -> None:
    url = put(stores.join(folder, "a b.tar"))
    assert stores.exists(url) and stores.exists(folder) and stores.size(url) == len(BODY) and stores.read_bytes(url) == BODY
    with stores.local(url) as path:
        assert path.name == "a b.tar" and path.read_bytes() == BODY
    assert path.exists() == (not stores.is_remote(url))
    put(url, b"new")
    assert stores.read_bytes(url) == b"new" and stores.size(url) == 3
    stores.remove(url)
    stores.remove(url)
    assert not stores.exists(url)
    assert re.search("a b.tar: cannot be opened .*check the path", told(stores.size, url))
    assert "a b.tar: cannot be opened" in told(stores.read_bytes, url)


def test_an_empty_file_is_empty(folder: str) -> None:
    url = put(stores.join(folder, "empty"), b"")
    assert stores.size(url) == 0 and stores.read_bytes(url) == b""


def test_files_are_listed_and_globbed_as_they_are_now(folder: str) -> None:
    assert stores.listing(folder) == [] == stores.glob(stores.join(folder, "*.tar"))
    names = ["b.tar", "a.tar", "c.json", "._a.tar", "sub/d.tar"]
    urls = {name: put(stores.join(folder, name), b"x") for name in names}
    assert stores.listing(folder) == stores.listing(folder + "/") == [urls["a.tar"], urls["b.tar"]]
    assert stores.listing(folder, ".json") == [urls["c.json"]] and stores.listing(urls["a.tar"]) == []
    assert stores.glob(stores.join(folder, "[ab].*")) == [urls["a.tar"], urls["b.tar"]]
    assert stores.glob(stores.join(folder, "*/*.tar")) == [urls["sub/d.tar"]]
    stores.remove(urls["a.tar"])
    assert stores.listing(folder) == [urls["b.tar"]] == stores.glob(stores.join(folder, "b*r"))


def test_a_folder_is_no_file(folder: str) -> None:
    put(stores.join(folder, "sub/a"), b"x")
    assert "sub: cannot be opened" in told(stores.read_bytes, stores.join(folder, "sub"))


def test_json_is_written_and_read_back(folder: str) -> None:
    url = stores.join(folder, "x.json")
    stores.write_json(url, {"größe": [1]})
    assert stores.read_json(url) == {"größe": [1]}
    for body in (b"{", b"[1]", b"\xff"):
        put(url, body)
        assert "x.json: cannot be read as JSON" in told(stores.read_json, url)


def test_a_block_that_fails_leaves_the_old_and_no_trace(folder: str) -> None:
    for name, before in (("old", b"old"), ("new", None)):
        url = stores.join(folder, name)
        if before:
            put(url, before)
        with pytest.raises(RuntimeError), stores.replacing(url) as temporary:
            temporary.write_bytes(b"half")
            raise RuntimeError
        assert not temporary.exists() and stores.exists(url) == bool(before)
    assert stores.listing(folder, "") == [stores.join(folder, "old")] and stores.read_bytes(stores.join(folder, "old")) == b"old"


def test_a_stamp_follows_the_file(folder: str) -> None:
    if folder.startswith("memory"):
        pytest.skip("tells no version")
    url = put(stores.join(folder, "a"), b"one")
    before = stores.stamp([("a", url)])
    assert before and before == stores.stamp([("a", url)]) != stores.stamp([("b", url)])
    put(url, b"two")
    assert stores.stamp([("a", url)]) not in ("", before)


def test_a_store_that_tells_no_version_has_no_stamp(memory: str) -> None:
    assert stores.stamp([("a", put(f"{memory}/a"))]) == "" == stores.stamp([("b", f"{memory}/b")])


# ---- the reader


@pytest.fixture(params=["s3", "memory", "ranges", "no ranges", "no sizes", "neither"])
def remote(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """A URL of BODY, from stores of every kind."""
    if request.param in ("s3", "memory"):
        yield put(request.getfixturevalue("bucket" if request.param == "s3" else "memory") + "/read")
        return
    (tmp_path / "read").write_bytes(BODY)
    with http_server(tmp_path, ranges=request.param in ("ranges", "no sizes"), sizes="ranges" in request.param) as url:
        yield f"{url}/read"


@pytest.mark.parametrize("block", [1000, 10_007, 1 << 20])
def test_reads_and_seeks_are_those_of_a_local_file(remote: str, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stores, "BLOCK", block)
    rng, here = random.Random(block), io.BytesIO(BODY)
    with stores.Remote.__new__(stores.Remote) as raw, stores.open_read(remote) as there:
        raw.__init__(remote)  # type: ignore[misc]  # without a buffer too
        for file in (there, raw):
            here.seek(0)
            for _ in range(25):
                to = rng.choice([(rng.randrange(len(BODY) + 50), 0), (rng.randrange(50), 1), (-rng.randrange(len(BODY)), 2)])
                assert file.seek(*to) == here.seek(*to) == file.tell()
                n = rng.choice([0, 1, 512, 3000])
                got = file.read(n)
                assert (got == here.read(n)) if file is there else here.read(n).startswith(got)
                here.seek(file.tell())
            file.seek(0)
            assert file.read() == BODY
    assert stores.size(remote) == len(BODY)


def test_a_tar_is_read_as_a_stream_and_by_seeking(remote: str, tmp_path: Path) -> None:
    for mode in ("r|*", "r:*"):
        with stores.open_read(remote) as file, pytest.raises(tarfile.ReadError), \
                tarfile.open(fileobj=file, mode=mode):  # type: ignore[call-overload]
            pass
    if remote.startswith("http"):
        tar(tmp_path / "read", {"a.jpg": picture(), "a.txt": b"a" * 5000, "b.jpg": picture()})
        for mode in ("r|*", "r:*"):
            with stores.open_read(remote) as file, tarfile.open(fileobj=file, mode=mode) as found:  # type: ignore[call-overload]
                assert [m.name for m in found] == ["a.jpg", "a.txt", "b.jpg"]


def test_only_the_blocks_that_are_read_are_fetched(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(BODY)
    asked: list[str] = []
    with http_server(tmp_path, asked=asked) as url, stores.open_read(f"{url}/a") as file:
        file.seek(5500)
        assert file.read(100) == BODY[5500:5600]
    assert set(asked) <= {f"bytes={n}-{min(n + 999, len(BODY) - 1)}" for n in range(5000, 11000, 1000)}
    assert asked[0] == "bytes=5000-5999"


def test_a_server_without_ranges_sends_the_file_once(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(BODY)
    asked: list[str] = []
    with http_server(tmp_path, ranges=False, asked=asked) as url:
        assert stores.read_bytes(f"{url}/a") == BODY and len(asked) == 1


def test_a_presigned_address_is_read(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(BODY)
    with http_server(tmp_path) as url, stores.local(f"{url}/a.tar?sig=x/y") as path:
        assert path.name == "a.tar" and path.read_bytes() == BODY


def test_files_behind_http_are_listed(tmp_path: Path) -> None:
    for name in ("b.tar", "a.tar", "x.json", "sub/c.tar"):
        tar(tmp_path / "set" / name, {})
    with http_server(tmp_path) as url:
        assert stores.listing(f"{url}/set") == [f"{url}/set/a.tar", f"{url}/set/b.tar"] == stores.glob(f"{url}/set/*.tar")
        assert stores.listing(f"{url}/none") == [] and stores.exists(f"{url}/set/a.tar") and not stores.exists(f"{url}/set/z.tar")


# ---- what passes and what stays


class HTTPClientError(Exception):
    """As botocore's, whose own class is not imported."""


def with_(error: Exception, **attributes: Any) -> Exception:
    for name, value in attributes.items():
        setattr(error, name, value)
    return error


def because(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error


def of_s3(code: str, status: int) -> Exception:
    return with_(Exception(code), response={"Error": {"Code": code}, "ResponseMetadata": {"HTTPStatusCode": status}})


@pytest.mark.parametrize("fault", [
    TimeoutError(), ConnectionResetError("reset"), OSError(errno.ETIMEDOUT, "slow"), HTTPClientError("lost"), b"", BODY[:999],
    *(with_(Exception("web"), status=status) for status in (429, 500, 502, 503, 504)), of_s3("SlowDown", 503), of_s3("RequestTimeout", 400),
    of_s3("InternalError", 500), because(FileNotFoundError("not asked"), TimeoutError())], ids=repr)
def test_a_truncated_read_or_a_passing_fault_is_tried_again(fault: Any, memory: str, monkeypatch: pytest.MonkeyPatch) -> None:
    url = put(f"{memory}/a")
    calls = failing(monkeypatch, "cat_file", fault, fault, fault, fault)
    assert stores.read_bytes(url) == BODY and calls[0] == 11 + 4


def test_a_fault_that_does_not_pass_is_told_after_the_last_attempt(memory: str, monkeypatch: pytest.MonkeyPatch) -> None:
    url = put(f"{memory}/a")
    calls = failing(monkeypatch, "cat_file", *[b"short"] * stores.ATTEMPTS)
    assert told(stores.read_bytes, url) == (f"{url}: cannot be read to its end (ConnectionError: 5 bytes came of 1000); check the "
                                            "connection and try again, or download it")
    assert calls[0] == stores.ATTEMPTS


@pytest.mark.parametrize("fault", [FileNotFoundError("gone"), PermissionError("no"), with_(Exception("web"), status=403),
                                   of_s3("NoSuchBucket", 404), because(OSError(errno.EIO, "x"), of_s3("AccessDenied", 403)),
                                   because(HTTPClientError("x"), socket.gaierror(socket.EAI_NONAME, "no host")),
                                   OSError(errno.ENOSPC, "full"), KeyError("a\nbug")], ids=repr)
def test_a_fault_that_stays_is_told_at_once(fault: Exception, memory: str, monkeypatch: pytest.MonkeyPatch) -> None:
    url = put(f"{memory}/a")
    calls = failing(monkeypatch, "cat_file", fault)
    assert told(stores.read_bytes, url).startswith(f"{url}: cannot be read to its end (") and calls[0] == 1


def test_pauses_grow_and_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    pauses: list[float] = []
    monkeypatch.setattr(stores, "PAUSE", 0.5)
    monkeypatch.setattr(stores.time, "sleep", pauses.append)

    def fail() -> None:
        raise TimeoutError

    for _ in range(3):
        with pytest.raises(TimeoutError):
            stores.retried(fail)
    assert len(pauses) == len(set(pauses)) == 12
    assert all(0.25 * 2**i <= p <= 0.75 * 2**i for i, p in zip([0, 1, 2, 3] * 3, pauses, strict=True))


def test_what_a_store_could_not_say_is_not_taken_for_absent(tmp_path: Path, memory: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a").write_bytes(BODY)
    with http_server(tmp_path, faults=["503"] * 2, heads=["503"] * 2) as url:
        assert stores.exists(f"{url}/a")
    with http_server(tmp_path, faults=itertools.repeat("503"), heads=itertools.repeat("503")) as url:
        for act in (stores.exists, stores.size, stores.listing):
            assert "503" in told(act, f"{url}/a")
        assert stores.stamp([("a", f"{url}/a")]) == ""
    nowhere = because(FileNotFoundError("a"), socket.gaierror(socket.EAI_NONAME, "no such host"))
    failing(monkeypatch, "info", PermissionError("hidden"), nowhere)
    assert not stores.exists(f"{memory}/a") and "no such host" in told(stores.exists, f"{memory}/a")


@pytest.mark.parametrize("ranges", [True, False])
@pytest.mark.parametrize("fault", ["503", "429", "cut", "hang"])
def test_a_web_server_that_falters_is_asked_again(fault: str, ranges: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stores, "WAIT", 0.2)
    (tmp_path / "a").write_bytes(BODY)
    with http_server(tmp_path, ranges, faults=["", fault, fault] if ranges else [fault, fault]) as url:
        assert stores.read_bytes(f"{url}/a") == BODY
    monkeypatch.setattr(stores, "ATTEMPTS", 2)
    with http_server(tmp_path, ranges, faults=itertools.repeat(fault)) as url:
        assert re.search(r"/a: cannot be read to its end \(.+\); check the connection", told(stores.read_bytes, f"{url}/a"))


def test_a_missing_or_forbidden_page_is_asked_for_once(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(BODY)
    asked: list[str] = []
    with http_server(tmp_path, heads=["", "403"], faults=["404", "403"], asked=asked) as url:
        assert re.search("/a: cannot be read to its end .*; check the path$", told(stores.read_bytes, f"{url}/a"))
        assert re.search("/a: cannot be opened .*403", told(stores.read_bytes, f"{url}/a"))
    assert len(asked) == 2


def test_no_server_and_no_such_protocol_are_told() -> None:
    assert re.search(r"^http://127\.0\.0\.1:9/a: cannot be opened .*check the connection", told(stores.read_bytes, "http://127.0.0.1:9/a"))
    assert "nosuch://h/a: Protocol not known: nosuch; install" in told(stores.read_bytes, "nosuch://h/a")
    for act in (stores.exists, stores.listing, stores.glob, stores.remove, stores.size):
        assert "nosuch://h/a" in told(act, "nosuch://h/a")
    with pytest.raises(BadInput, match="nosuch"), stores.replacing("nosuch://h/a"):
        raise AssertionError("begun all the same")


def test_a_missing_local_file_is_told(tmp_path: Path) -> None:
    for act in (stores.read_bytes, stores.read_json, stores.size):
        assert re.fullmatch(rf"{tmp_path}/x: cannot be opened \(.*No such file.*\); check the path", told(act, str(tmp_path / "x")))


# ---- S3


def test_a_bucket_that_does_not_exist_is_told(bucket: str) -> None:
    assert "s3://nowhere/a: cannot be opened" in told(stores.read_bytes, "s3://nowhere/a")
    assert "s3://nowhere/a: cannot be written" in told(put, "s3://nowhere/a")
    assert stores.listing("s3://nowhere") == [] and not stores.exists("s3://nowhere/a")


def uploads(url: str) -> list[Any]:
    """Multipart uploads of a bucket that were begun and not ended."""
    return fsspec.filesystem("s3").call_s3("list_multipart_uploads", Bucket=url.removeprefix("s3://")).get("Uploads", [])


def test_a_large_file_goes_up_in_parts_which_are_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(stores.S3_UPLOAD, "chunksize", 5 << 20)
    body, asked, failures = BODY * 1100, [], [2]  # 11 MB: three parts of at least S3's smallest

    def fault(request: dict[str, Any]) -> bool:
        asked.append(query := request["QUERY_STRING"])
        failures[0] -= "partNumber=2" in query
        return "partNumber=2" in query and failures[0] >= 0

    with s3_bucket("parts", fault) as url:
        put(f"{url}/large", body)
        assert {f"partNumber={n}" for n in (1, 2, 3)} <= {part for query in asked for part in query.split("&")}
        monkeypatch.setattr(stores, "BLOCK", 8 << 20)
        assert stores.read_bytes(f"{url}/large") == body and uploads(url) == []


def test_an_upload_that_fails_leaves_the_old_object_and_no_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    import s3fs

    monkeypatch.setitem(stores.S3_UPLOAD, "chunksize", 5 << 20)
    monkeypatch.setattr(stores, "ATTEMPTS", 2)
    monkeypatch.setattr(s3fs.S3FileSystem, "retries", 1)
    refuse = [False]

    def fault(request: dict[str, Any]) -> bool:
        small = request["PATH_INFO"].endswith("small") and request["REQUEST_METHOD"] == "PUT"
        return refuse[0] and (small or "partNumber=2" in request["QUERY_STRING"])

    with s3_bucket("failing", fault) as url:
        put(f"{url}/large", b"old")
        refuse[0] = True
        assert re.search(f"^{url}/large: cannot be written .*check the connection and try again$", told(put, f"{url}/large", BODY * 1100))
        assert "cannot be written" in told(put, f"{url}/small", b"x")
        refuse[0] = False
        assert stores.read_bytes(f"{url}/large") == b"old" and stores.listing(url, "") == [f"{url}/large"] and uploads(url) == []


def test_an_s3_that_asks_to_slow_down_is_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    import s3fs

    monkeypatch.setattr(s3fs.S3FileSystem, "retries", 1)
    failures = [0]

    def fault(request: dict[str, Any]) -> bool:
        failures[0] -= 1
        return failures[0] >= 0

    with s3_bucket("slow", fault) as url:
        put(f"{url}/a")
        for act in (stores.read_bytes, stores.size, stores.exists, stores.remove):
            failures[0] = 3
            act(f"{url}/a")
        failures[0] = 3
        assert stores.listing(url, "") == []


def test_a_store_is_used_on_after_a_fork(bucket: str) -> None:
    url = put(f"{bucket}/forked")
    with multiprocessing.get_context("fork").Pool(1) as pool:
        assert pool.apply_async(stores.size, (url,)).get(30) == len(BODY) == stores.size(url)
