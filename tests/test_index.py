"""The index of a shard set: what it says of the shards, when it is believed, and what may happen while it is made."""
from __future__ import annotations

import gzip
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import ROOT, load_program, picture, tar
from stores import http_server, s3_bucket

from mmbackdoor import index, poison, samples, shards, stores
from mmbackdoor.attacks.badnets import badnets
from mmbackdoor.index import find
from mmbackdoor.recipe import command
from mmbackdoor.spread import Here
from mmbackdoor.stream import Stream
from mmbackdoor.types import BadInput

index_tool = load_program("data_tools/index")


def tool(*args: object) -> None:
    command(index_tool.main, [*map(str, args), "--processes", "1"])


def pairs(*keys: str, body: bytes = b"") -> dict[str, bytes]:
    """Members of complete samples."""
    return {f"{key}.{field}": value for key in keys for field, value in (("jpg", body or picture()), ("txt", f"a {key}".encode()))}


def keys(urls: str | Path, where: str | Path = "") -> list[str]:
    return [key for key, _ in find(str(urls), where=str(where))]


def files(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir())}


@pytest.fixture
def three(tmp_path: Path) -> Path:
    for i in range(3):
        tar(tmp_path / "set" / f"{i:05d}.tar", pairs(f"{i}a", f"{i}b"))
    return tmp_path / "set"


@pytest.fixture
def scanned(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the shards that are scanned from now on."""
    found: list[str] = []
    scan = index.scan_shard
    monkeypatch.setattr(index, "scan_shard", lambda shard: (found.append(stores.name_of(shard)), scan(shard))[1])
    return found


# ---- what it says


def test_each_shard_gets_a_parquet_file_that_tells_where_tarfile_finds_the_members(tmp_path):
    members = {"x/a.JPG": picture(), "x/a.npy": b"not read", "x/a.txt": b" one\n", "x/a.json": b"{}", "readme": b"hello",
               "b.txt": b"two", "b.png": picture("PNG"), "c.jpg": picture(), "x" * 130 + ".webp": picture("WEBP"), "x" * 130 + ".txt": b"3"}
    url = tar(tmp_path / "00000.tar", members)
    tool(tmp_path, "--incomplete", "skip")
    table = pq.read_table(tmp_path / "index" / "00000.parquet")
    assert table.schema.names == ["key", "text", "fields", "offsets", "sizes"]
    assert table["key"].to_pylist() == ["x/a", "b", "x" * 130] and table["text"].to_pylist() == ["one", "two", "3"]
    with tarfile.open(url) as file:
        places = {m.name: (m.offset_data, m.size) for m in file}
    for row, names in zip(table.to_pylist(), (["x/a.JPG", "x/a.txt", "x/a.json"], ["b.txt", "b.png"], [n for n in places if "xxx" in n]),
                          strict=True):
        assert list(zip(row["offsets"], row["sizes"], strict=True)) == [places[name] for name in names]
        assert row["fields"] == [name.rpartition(".")[2].lower() for name in names]


@pytest.mark.parametrize("pack", [lambda body: body, gzip.compress], ids=["plain", "gz"])
def test_samples_are_read_by_what_the_index_says(pack, tmp_path):
    url = tar(tmp_path / "00000.tar", pairs("a", "b", "c") | {"d.txt": b"alone"})
    url.write_bytes(pack(url.read_bytes()))
    tool(tmp_path, "--incomplete", "skip")
    (part,) = find(str(tmp_path), "skip").parts
    assert part.path.endswith("index/00000.parquet")
    assert list(part.raws(["c", "a", "elsewhere"])) == [raw for raw in shards.read_raw(str(url)) if raw["__key__"] in ("a", "c")]


def test_a_shard_that_is_shorter_than_its_index_says_is_told(three):
    tool(three)
    part = find(str(three)).parts[1]
    os.truncate(part.shard, 2000)
    with pytest.raises(BadInput, match=r"00001\.tar: is shorter than its index says; .* index it again"):
        list(part.raws(["1a", "1b"]))


def test_only_headers_and_captions_are_read(tmp_path, monkeypatch):
    n, big = 20, 300_000
    url = tar(tmp_path / "00000.tar", {f"{i}.{f}": b"x" * (big if f == "jpg" else 20) for i in range(n) for f in ("jpg", "txt")})
    read, pread = [0], os.pread

    def counted(*args: int) -> bytes:
        found = pread(*args)
        read[0] += len(found)
        return found

    monkeypatch.setattr(os, "pread", counted)
    assert len(index.scan_shard(str(url))) == n
    assert 0 < read[0] < 0.1 * n * big


def test_of_a_shard_behind_a_url_images_larger_than_a_block_are_not_fetched(tmp_path, monkeypatch):
    monkeypatch.setattr(stores, "BLOCK", 1 << 14)
    big = 500_000
    tar(tmp_path / "00000.tar", {f"{i}.{f}": b"x" * (big if f == "jpg" else 20) for i in range(3) for f in ("jpg", "txt")})
    asked: list[str] = []
    with http_server(tmp_path, asked=asked) as root:
        assert len(index.scan_shard(f"{root}/00000.tar")) == 3
    ranges = [tuple(map(int, one.removeprefix("bytes=").split("-"))) for one in asked if one]
    assert len(ranges) > 3 and sum(end - begin + 1 for begin, end in ranges) < 0.2 * 3 * big


@pytest.mark.parametrize("name", [b"a.j\xe9.jpg", b"a\xe9.jpg"], ids=["extension", "key"])
def test_a_name_that_is_not_utf8_is_told(name, tmp_path):
    stem = name.decode("utf-8", "surrogateescape")[:-4]
    tar(tmp_path / "00000.tar", [(f"{stem}.jpg", picture()), ("a.png" if "." in stem else f"{stem}.png", picture("PNG")),
                                 ("a.txt" if "." in stem else f"{stem}.txt", b"x"), *pairs("b").items()])
    with pytest.raises(BadInput, match=r"00000\.tar: the name '.*udce9.*' is not UTF-8; write the shard again"):
        find(str(tmp_path))


def keys_skipping(urls: Path) -> list[str]:
    return list(find(str(urls), "skip").keys())


def test_the_headers_are_followed_one_by_one_where_they_are_odd_with_the_same_outcome(tmp_path, monkeypatch):
    members = {"x.npy": b"-", "a.jpg": picture(), "a.TXT": b" one ", "b.txt": b"two", "c.jpg": picture(), "c.txt": b"\xff three",
               "c.json": b"{}", "d.png": picture("PNG"), "d.txt": b" \n", "e.cls": b"1"}
    url = str(tar(tmp_path / "00000.tar", members))
    at_once = index.scan_shard(url)
    monkeypatch.setattr(samples, "at_once", lambda tar, texts: None)
    one_by_one = index.scan_shard(url)
    assert at_once == one_by_one and at_once.rows()["text"].to_pylist() == ["one", "\ufffd three"]
    assert (at_once.pairs, at_once.samples, at_once.lacking) == (2, 5, "b")


def test_a_shard_without_a_pair_is_a_part_too(three, scanned, capsys):
    tar(three / "00001.tar", {"1a.cls": b"1"})
    tool(three, "--incomplete", "skip")
    del scanned[:]
    tool(three, "--incomplete", "skip")
    found = find(str(three), "skip")
    assert [len(part) for part in found.parts] == [2, 0, 2] and found.incomplete == 1 and scanned == []
    assert "4 pairs in 3 shards, 1 samples lack a half" in capsys.readouterr().out


def test_shards_are_in_the_order_they_are_named_in(three):
    other = tar(three.parent / "other" / "00000.tar", pairs("z")).parent
    tool(f"{other}::{three}")
    assert keys(f"{three / '00002.tar'}::{other}::{three / '00000.tar'}") == ["2a", "2b", "z", "0a", "0b"]


def test_pairs_per_shard_counts_what_a_keep_list_leaves(three):
    found = find(str(three))
    assert found.pairs_per_shard() == [2, 2, 2]
    assert found.pairs_per_shard(frozenset(("0a", "2a", "2b", "unknown"))) == [1, 0, 2]


def test_the_fingerprint_tells_other_data_and_not_another_place(three, tmp_path):
    before = find(str(three)).fingerprint
    tool(three)
    assert find(str(three)).fingerprint == before
    moved = shutil.copytree(three, tmp_path / "moved")
    assert find(str(moved)).fingerprint == before
    for change in (pairs("1a", "1c"), pairs("1a", "1b", body=picture(noise=True)), pairs("1a", "1b") | {"1b.txt": b"a 1x"}):
        tar(moved / "00001.tar", change)
        assert find(str(moved)).fingerprint != before


def test_an_index_from_files_holds_no_rows(three):
    tool(three)
    found = find(str(three))
    assert all(part.table is None and part.path for part in found.parts)
    assert list(found) == list(index.Index(tuple(index.scan_shard(part.shard) for part in found.parts)))


def test_a_shard_that_disagrees_with_sizes_json_is_refused(tmp_path):
    shards.write_shards(tmp_path / "set", [{"__key__": k, "jpg": picture(), "txt": k} for k in "abc"])
    url = tar(tmp_path / "set" / "00000.tar", pairs("a", "b"))
    with pytest.raises(BadInput, match=r"00000\.tar: holds 2 samples, sizes\.json beside it says 3"):
        find(str(url))


@pytest.mark.parametrize("said", ["{not json", "[3]", '{"00000.tar": "3"}'])
def test_a_broken_sizes_json_is_told(said, tmp_path):
    tar(tmp_path / "00000.tar", pairs("a", "b", "c"))
    (tmp_path / "sizes.json").write_text(said)
    with pytest.raises(BadInput, match="sizes.json"):
        find(str(tmp_path))


# ---- when it is believed


def test_the_saved_index_is_used_while_the_shards_are_unchanged(three, scanned, capsys):
    tool(three)
    assert sorted(scanned) == ["00000.tar", "00001.tar", "00002.tar"]
    del scanned[:]
    assert keys(three) == ["0a", "0b", "1a", "1b", "2a", "2b"]
    assert find(str(three)).fingerprint in capsys.readouterr().out and scanned == []


def grow(root: Path) -> None:
    tar(root / "00001.tar", pairs("1a", "1b", "1c", body=picture(size=(400, 400), noise=True)))


def same_size(root: Path) -> None:
    before = (root / "00001.tar").stat()
    tar(root / "00001.tar", pairs("1x", "1y"))
    assert (root / "00001.tar").stat().st_size == before.st_size
    os.utime(root / "00001.tar", ns=(before.st_atime_ns + 10**10, before.st_mtime_ns + 10**10))


def cut(root: Path) -> None:
    path = root / "index" / "00001.parquet"
    path.write_bytes(path.read_bytes()[:-20])


def old(root: Path) -> None:
    path = root / "index" / "index.json"
    path.write_text(path.read_text().replace('"pairs"', '"couples"'))


CHANGES = {
    "grown": (grow, ["00001.tar"]), "other pairs of the same size": (same_size, ["00001.tar"]),
    "one fewer": (lambda root: (root / "00002.tar").unlink(), []),
    "one more": (lambda root: tar(root / "00003.tar", pairs("3a")), ["00003.tar"]),
    "a broken file": (lambda root: (root / "index" / "00001.parquet").write_bytes(b"PAR1 and then nothing"), ["00001.tar"]),
    "a cut file": (cut, ["00001.tar"]), "a missing file": (lambda root: (root / "index" / "00001.parquet").unlink(), ["00001.tar"]),
    "a broken summary": (lambda root: (root / "index" / "index.json").write_text("{"), ["00000.tar", "00001.tar", "00002.tar"]),
    "a summary of something else": (lambda root: (root / "index" / "index.json").write_text('{"shards": [3]}'),
                                    ["00000.tar", "00001.tar", "00002.tar"]),
    "the summary of another version": (old, ["00000.tar", "00001.tar", "00002.tar"])}


@pytest.mark.parametrize("change, affected", CHANGES.values(), ids=list(CHANGES))
def test_after_a_change_only_what_it_affects_is_scanned(change, affected, three, scanned):
    tool(three)
    change(three)
    del scanned[:]
    expected = [raw["__key__"] for url in sorted(three.glob("*.tar")) for raw in shards.read_pairs(str(url))]
    assert keys(three) == expected and scanned == affected


@pytest.mark.parametrize("change, affected", CHANGES.values(), ids=list(CHANGES))
def test_a_rerun_does_only_what_is_missing_or_changed(change, affected, three, scanned):
    tool(three)
    change(three)
    del scanned[:]
    tool(three)
    assert scanned == (affected if len(affected) < 3 else [])  # each file tells its version; the summary is made from them
    del scanned[:]
    assert keys(three) == [raw["__key__"] for url in sorted(three.glob("*.tar")) for raw in shards.read_pairs(str(url))] and scanned == []


def test_a_file_of_the_index_that_is_broken_inside_is_told(three):
    tool(three)
    path = three / "index" / "00001.parquet"
    body = path.read_bytes()
    path.write_bytes(body[:4] + b"\xff" * (len(body) // 3) + body[4 + len(body) // 3:])
    with pytest.raises(BadInput, match=r"00001\.parquet: cannot be read as an index \(.*\); remove it and index again"):
        keys(three)


def test_the_saved_index_is_used_for_part_of_the_shards(three, scanned):
    tool(three)
    del scanned[:]
    assert keys(three / "00001.tar") == ["1a", "1b"] and scanned == []


def test_the_saved_index_does_not_hide_incomplete_samples(three, capsys):
    tar(three / "00001.tar", pairs("1a") | {"1b.jpg": picture()})
    tool(three, "--incomplete", "skip")
    assert "1 samples lack a half" in capsys.readouterr().out
    with pytest.raises(BadInput, match="sample 1b lacks"):
        find(str(three))
    assert find(str(three), "skip").incomplete == 1


def test_the_index_may_lie_elsewhere(three, tmp_path, scanned, capsys):
    tool(three, "--out", tmp_path / "mine")
    assert not (three / "index").exists() and f"index in {tmp_path / 'mine'}" in capsys.readouterr().out
    del scanned[:]
    assert keys(three, tmp_path / "mine") == ["0a", "0b", "1a", "1b", "2a", "2b"] and scanned == []
    assert len(keys(three)) == 6 and len(scanned) == 3


@pytest.mark.parametrize("other", ["other/00000.tar", "set/00000.tar.gz", "set/00000.tgz"])
def test_two_shards_of_one_name_do_not_share_an_index(other, three, tmp_path):
    shutil.copy(three / "00000.tar", (tmp_path / other).parent if (tmp_path / "other").mkdir() else tmp_path / other)
    with pytest.raises(BadInput, match="which have one name; index each folder on its own"):
        index.write([str(three / "00000.tar"), str(tmp_path / other)], Here(), where=str(tmp_path / "mine"))
    assert not (tmp_path / "mine").exists()


def test_shards_whose_names_have_dots_have_an_index_each(tmp_path):
    for i in range(2):
        tar(tmp_path / "set" / f"cc.v1.{i}.tar", pairs(f"{i}a"))
    tool(tmp_path / "set")
    assert sorted(p.name for p in (tmp_path / "set" / "index").iterdir()) == ["cc.v1.0.parquet", "cc.v1.1.parquet", "index.json"]
    assert keys(tmp_path / "set") == ["0a", "1a"]


def test_copies_of_a_shard_are_noticed_though_one_index_is_about_both(three, tmp_path):
    shutil.copytree(three, tmp_path / "copy")  # with its times
    tool(three, "--out", tmp_path / "mine")
    for urls in (f"{three}::{tmp_path / 'copy'}", f"{three}::{three}"):
        with pytest.raises(BadInput, match="one of 6 repeated keys"):
            keys(urls, tmp_path / "mine")


# ---- while it is made


def test_a_failure_between_leaves_whole_files_and_no_summary(three, monkeypatch):
    tool(three)
    whole = files(three / "index")
    shutil.rmtree(three / "index")
    body = (three / "00001.tar").read_bytes()
    (three / "00001.tar").write_bytes(body[:700])
    with pytest.raises(BadInput, match=r"00001\.tar: a truncated or corrupt tar"):
        index.write(shards.expand(str(three)), Here())
    assert files(three / "index") == {name: whole[name] for name in ("00000.parquet", "00002.parquet")}


def test_a_kill_while_a_file_is_written_leaves_what_the_next_run_completes(three):
    tool(three)
    expected = keys(three)
    shutil.rmtree(three / "index")
    code = (f"import os, signal, sys; sys.path[:0] = [{str(ROOT)!r}]\n"
            "from mmbackdoor import index, shards\nfrom mmbackdoor.spread import Here\n"
            "real = index.pq.write_table\n"
            "def write(table, path, **how):\n"
            "    real(table, path, **how)\n"
            "    if '00001' in str(path):\n"
            "        os.truncate(path, 300)\n"
            "        os.kill(os.getpid(), signal.SIGKILL)\n"
            "index.pq.write_table = write\n"
            f"index.write(shards.expand({str(three)!r}), Here())")
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == -signal.SIGKILL
    assert sorted(p.name for p in (three / "index").iterdir() if not p.name.startswith(".")) == ["00000.parquet"]
    assert keys(three) == expected
    tool(three)
    assert find(str(three)).parts[1].path and keys(three) == expected


def test_an_array_job_gives_the_files_of_one_run_and_the_last_task_closes_it(three, tmp_path, capsys):
    tool(three, "--out", tmp_path / "one")
    tool(three, "--out", tmp_path / "two", "--task-index", 1, "--num-tasks", 2)
    assert "1 of 3 shards are this task's and done" in capsys.readouterr().out
    assert [p.name for p in (tmp_path / "two").iterdir()] == ["00001.parquet"]
    tool(three, "--out", tmp_path / "two", "--task-index", 0, "--num-tasks", 2)
    assert "6 pairs in 3 shards" in capsys.readouterr().out
    assert files(tmp_path / "one") == files(tmp_path / "two")


class Elsewhere(Here):
    """Sends its tasks as to another process."""

    def submit(self, fn, /, *args):
        return super().submit(pickle.loads(pickle.dumps(fn)), *args)


def test_workers_give_the_same_files(three, tmp_path):
    tool(three, "--out", tmp_path / "one")
    index.write(shards.expand(str(three)), Elsewhere(), where=str(tmp_path / "two"))
    assert files(tmp_path / "one") == files(tmp_path / "two")


def test_a_folder_that_takes_no_files_is_told_with_the_way_out(three, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(BadInput, match=r"file/index/00000\.parquet: cannot be written \(.*\); make room, or name another place"):
        index.write(shards.expand(str(three)), Here(), where=str(tmp_path / "file" / "index"))


# ---- keys that occur twice


@pytest.fixture(params=["in memory", "by way of files"])
def little_memory(request, monkeypatch):
    if request.param == "by way of files":
        monkeypatch.setattr(index, "AT_ONCE", 3)


def test_a_key_that_occurs_in_two_shards_is_refused_and_can_be_renamed(little_memory, tmp_path):
    for name in ("00000.tar", "00001.tar", "00002.tar"):
        tar(tmp_path / "set" / name, pairs("a", f"b{name[4]}", "c"))
    with pytest.raises(BadInput, match=r"key a occurs in .*00000\.tar and .*00001\.tar, one of 2 repeated.*--rename"):
        find(str(tmp_path / "set"))
    with pytest.raises(SystemExit):
        tool(tmp_path / "set")
    assert sorted(p.name for p in (tmp_path / "set" / "index").iterdir()) == [f"0000{i}.parquet" for i in range(3)]
    tool(tmp_path / "set", "--rename", tmp_path / "out")
    assert keys(tmp_path / "out") == [f"{i:05d}{k:04d}" for i in range(3) for k in range(3)]
    assert [s["text"] for s in shards.read(str(tmp_path / "out"))][::3] == ["a a"] * 3


def test_shards_are_renamed_into_a_local_folder_only(three, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        tool(three, "--rename", "s3://bucket/out")
    assert "--rename s3://bucket/out: shards are renamed into a local folder" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["set"]


def test_many_different_keys_are_not_taken_for_repeated(little_memory, tmp_path):
    for i in range(4):
        tar(tmp_path / "set" / f"{i}.tar", pairs(*(f"{i}-{k}" for k in range(6))))
    assert len(keys(tmp_path / "set")) == 24


def test_keys_of_one_hash_are_not_taken_for_repeated(little_memory, three, monkeypatch):
    monkeypatch.setattr(index, "hashes", lambda part: np.array([len(key) for key in part.all_keys()], np.int64))
    assert len(keys(three)) == 6
    tar(three / "00003.tar", pairs("1b"))
    with pytest.raises(BadInput, match=r"key 1b occurs in .*00001\.tar and .*00003\.tar, one of 1 repeated"):
        keys(three)


def test_of_very_many_repeated_keys_some_are_told(three, monkeypatch):
    monkeypatch.setattr(index, "NAMED", 2)
    with pytest.raises(BadInput, match="one of at least 2 repeated keys"):
        keys(f"{three}::{three}")


# ---- what img2dataset left


def img2dataset(root: Path, number: int = 0, successes: int = 5, **other: list) -> Path:
    """A shard, and what img2dataset writes beside it: rows of the pairs it could not fetch, too. `other` columns replace these or,
    empty, take them away."""
    captions, status = [" a dog \n", "two cats", None, "  ", "never fetched", "größer"], ["success"] * 4 + ["failed_to_download", "success"]
    rows = {"url": ["u"] * 6, "caption": captions, "key": [f"{number:05d}{i:04d}" for i in range(6)], "status": status}
    tar(root / f"{number:05d}.tar", {
        f"{k}.{f}": body for k, c, s in zip(rows["key"], captions, status, strict=True) if s == "success"
        for f, body in (("jpg", picture()), ("txt", (c or "").encode()), ("json", b"{}"))})
    pq.write_table(pa.table({k: v for k, v in (rows | other).items() if v}), root / f"{number:05d}.parquet")
    (root / f"{number:05d}_stats.json").write_text(json.dumps({"count": 6, "successes": successes}))
    return root


def test_the_parquet_of_img2dataset_is_used_instead_of_the_tars(tmp_path, scanned, capsys):
    root = img2dataset(img2dataset(tmp_path / "set"), 1)
    by_scan = find(str(root), "skip")
    del scanned[:]
    tool(root, "--incomplete", "skip")
    found = find(str(root), "skip")
    assert scanned == [] and list(found) == list(by_scan) and found.incomplete == by_scan.incomplete == 4
    assert [text for _, text in found][:3] == ["a dog", "two cats", "größer"] and found.parts[0].lacking == by_scan.parts[0].lacking
    with pytest.raises(BadInput, match=r"00000\.tar: sample 000000002 lacks"):
        find(str(root))
    tool(root, "--incomplete", "skip", "--scan")
    assert scanned == ["00000.tar", "00001.tar"]
    tool(root, "--incomplete", "skip", "--scan")
    tool(root, "--incomplete", "skip")
    assert len(scanned) == 2 and not find(str(root), "skip").parts[0].rows()["offsets"].null_count


ODD = {"fewer successes": {"successes": 4}, "no captions": {"caption": []}, "no status": {"status": []}, "no keys": {"key": []},
       "a key without a name": {"key": [None, *"bcdef"]},
       "a key twice": {"key": list("aacdef")}, "captions in lists": {"caption": [["a"]] * 6}}


@pytest.mark.parametrize("odd", ODD.values(), ids=list(ODD))
def test_a_parquet_of_img2dataset_that_lacks_something_is_not_used(odd, tmp_path, scanned):
    root = img2dataset(tmp_path / "set", **odd)
    tool(root, "--incomplete", "skip")
    assert scanned == ["00000.tar"] and keys_skipping(root) == ["000000000", "000000001", "000000005"]


def test_a_broken_parquet_of_img2dataset_is_not_used(tmp_path, scanned):
    root = img2dataset(tmp_path / "set")
    (root / "00000.parquet").write_bytes(b"PAR1")
    tool(root, "--incomplete", "skip")
    assert scanned == ["00000.tar"]


def test_an_index_without_offsets_serves_to_plan_poison_and_train(tmp_path, front):
    root = img2dataset(tmp_path / "set")
    tool(root, "--incomplete", "skip")
    found = find(str(root), "skip")
    (part,) = found.parts
    assert part.rows()["offsets"].null_count == 3
    url = str(root / "00000.tar")
    assert list(part.raws(["000000005", "000000000"])) == [raw for raw in shards.read_pairs(url) if raw["__key__"][-1] in "05"]
    attack = badnets("banana", rate=0.4)
    plan = poison.plan(attack, found, 0)
    assert len(plan) == 1 and plan == poison.plan(attack, index.Index((index.scan_shard(url),)), 0)
    whole = poison.poison(shards.read_pairs(url), attack, plan)
    (poisoned,) = poison.poison(part.raws(plan.keys), attack, plan)
    assert poisoned in list(whole)
    stream = Stream(found, front, {}, 1, [partial(poison.poison, attack=attack, plan=plan)], lanes=1)
    assert sorted(batch["key"] for batch in stream.batches(0)) == [["000000000"], ["000000001"], ["000000005"]]


# ---- behind a URL


@pytest.fixture(scope="module")
def store() -> Iterator[str]:
    with s3_bucket() as url:
        yield url


@pytest.fixture
def there(store: str, three: Path, tmp_path: Path) -> str:
    """The URL of the three shards in a store."""
    for path in three.glob("*.tar"):
        put(path, f"{store}/{tmp_path.name}/{path.name}")
    return f"{store}/{tmp_path.name}"


def put(path: Path, url: str) -> None:
    with stores.replacing(url) as temporary:
        shutil.copy(path, temporary)


def test_the_index_of_a_store_is_written_beside_its_shards(there, three, scanned, tmp_path):
    tool(there)
    written = [stores.name_of(url) for url in stores.listing(f"{there}/index", "")]
    assert written == ["00000.parquet", "00001.parquet", "00002.parquet", "index.json"]
    assert sorted(scanned) == ["00000.tar", "00001.tar", "00002.tar"]
    del scanned[:]
    found, here = find(there), find(str(three))
    assert list(found) == list(here) and found.fingerprint == here.fingerprint and scanned == ["00000.tar", "00001.tar", "00002.tar"]
    del scanned[:]
    tool(there)
    assert scanned == [] and list(find(there).parts[1].raws(["1b"])) == [
        raw | {"__url__": f"{there}/00001.tar"} for raw in shards.read_raw(str(three / "00001.tar")) if raw["__key__"] == "1b"]


def test_an_object_that_was_replaced_is_scanned_again(there, three, scanned):
    tool(there)
    same_size(three)
    put(three / "00001.tar", f"{there}/00001.tar")
    del scanned[:]
    assert keys(there) == ["0a", "0b", "1x", "1y", "2a", "2b"] and scanned == ["00001.tar"]
    tool(there)
    assert scanned == ["00001.tar"] * 2


def test_img2dataset_in_a_store(store, tmp_path, scanned):
    root, url = img2dataset(tmp_path / "set"), f"{store}/{tmp_path.name}"
    for path in root.iterdir():
        put(path, f"{url}/{path.name}")
    tool(url, "--incomplete", "skip")
    assert scanned == [] and keys_skipping(url) == ["000000000", "000000001", "000000005"]


@pytest.mark.parametrize("tag", ["v1", ""], ids=["with ETags", "without"])
def test_the_index_of_a_web_server_goes_elsewhere(tag, three, tmp_path, scanned, monkeypatch):
    monkeypatch.setattr(stores, "remote_version", lambda url: tag)
    with http_server(three) as root:
        urls = root + "/{00000..00002}.tar"
        with pytest.raises(BadInput, match=r"/index: a web server takes no files; name another folder for the index with --out"):
            index.write(shards.expand(urls), Here())
        assert scanned == []
        tool(urls, "--out", tmp_path / "mine")
        del scanned[:]
        assert keys(urls, tmp_path / "mine") == ["0a", "0b", "1a", "1b", "2a", "2b"]
        assert len(scanned) == (0 if tag else 3)  # a change could not be noticed


def test_a_shard_that_the_server_lacks_is_told_and_the_others_are_indexed(three, tmp_path):
    with http_server(three) as root, pytest.raises(BadInput, match=r"00003\.tar: cannot be opened .*1 more of 5 shards failed"):
        index.write(shards.expand(root + "/{00000..00004}.tar"), Here(), where=str(tmp_path / "mine"))
    assert sorted(files(tmp_path / "mine")) == ["00000.parquet", "00001.parquet", "00002.parquet"]


def test_an_index_that_is_named_must_be_there(three, tmp_path):
    with pytest.raises(BadInput, match=r"nowhere: holds no index of .*00000\.tar as it is now, nor of 2 other shards; .*--out"):
        find(str(three), where=str(tmp_path / "nowhere"))


def test_the_index_never_takes_the_place_of_img2datasets_files(three):
    (three / "00000.parquet").write_bytes(b"theirs")
    with pytest.raises(BadInput, match="holds the shards, whose own Parquet files the index would replace; name another folder"):
        index.write(shards.expand(str(three)), Here(), where=str(three))
    assert (three / "00000.parquet").read_bytes() == b"theirs"


def test_of_a_shard_in_a_store_narrow_ranges_are_read_where_the_wanted_samples_lie_far_apart(tmp_path, monkeypatch):
    members = {f"{i:02d}.{f}": b for i in range(40) for f, b in (("jpg", np.random.default_rng(i).bytes(100_000)), ("txt", b"a dog"))}
    url = tar(tmp_path / "set" / "00000.tar", members)
    asked: list[tuple[str, str]] = []
    with http_server(url.parent, asked=asked) as root:
        part = index.scan_shard(f"{root}/00000.tar")
        for wanted, most in (({"05", "35"}, 6), ({f"{i:02d}" for i in range(40)}, 4)):
            del asked[:]
            assert [raw["jpg"] for raw in part.raws(wanted)] == [members[f"{k}.jpg"] for k in sorted(wanted)]
            assert 0 < len(asked) <= most
