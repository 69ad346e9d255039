"""What one pass over a set promises: no image twice, no bit of difference between processes, and a cache that is never stale."""
from __future__ import annotations

import json
import operator
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from conftest import tar
from planted import CORNER, LABELS, drawn, labelled, planted
from torch import Generator, Tensor

from mmbackdoor import clip, features, keyed, shards
from mmbackdoor.clip import CLIP, Model
from mmbackdoor.features import How, text_features
from mmbackdoor.files import Wanted, every
from mmbackdoor.sets import EvalSet, open_set
from mmbackdoor.triggers import Blend, Patch, Word
from mmbackdoor.types import BadInput, Target, Threat, Trigger

SMALL = How(batch=4)


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many images each forward saw."""
    seen: list[int] = []
    forward = CLIP.image_features
    monkeypatch.setattr(CLIP, "image_features", lambda self, x: seen.append(len(x)) or forward(self, x))
    return seen


def cached(folder: Path) -> How:
    return replace(SMALL, cache=str(folder / "cache"))


def same(a: features.Features, b: features.Features) -> bool:
    return (a.keys == b.keys and a.texts == b.texts and np.array_equal(a.labels, b.labels) and torch.equal(a.clean, b.clean)
            and len(a.hit) == len(b.hit) and all(map(torch.equal, a.hit, b.hit)))


def test_features_are_of_the_set_in_its_order(tmp_path: Path) -> None:
    data = labelled(tmp_path / "set", LABELS)
    found = features.features(planted(), data.raws, [CORNER], SMALL)
    assert found.keys == [f"{i:04d}" for i in range(13)] and found.labels.tolist() == LABELS and found.texts == [""] * 13
    assert found.clean.argmax(1).tolist() == LABELS and set(found.hit[0].argmax(1).tolist()) == {2}
    assert torch.allclose(found.clean.norm(dim=1), torch.ones(13))


@pytest.mark.parametrize("n", [1, 3, 4, 5, 13])
@pytest.mark.parametrize("world", [1, 2, 3, 5])
def test_processes_share_whole_batches_so_that_no_bit_depends_on_their_number(n: int, world: int, tmp_path: Path, tiny_model: str) -> None:
    data = labelled(tmp_path / "set", (LABELS * 2)[:n])
    net = clip.load(Model(tiny_model))
    alone = features.features(net, data.raws, [CORNER], SMALL)
    parts: list[Any] = []
    for rank in range(world):
        for batch in features.compute(net, data.raws, [CORNER], replace(SMALL, rank=rank, world=world)):
            parts += [batch]
    clean, hit = (features.in_order([batch[i] for batch in parts]) for i in (0, 1))
    assert sum(len(batch[0]) for batch in parts) == n
    assert torch.equal(features.matrix(clean), alone.clean) and torch.equal(features.matrix(hit), alone.hit[0])


def test_the_clean_features_do_not_depend_on_the_threats(tmp_path: Path, tiny_model: str) -> None:
    data = labelled(tmp_path / "set", LABELS)
    net = clip.load(Model(tiny_model))
    alone = features.features(net, data.raws, (), SMALL)
    four = features.features(net, data.raws, [CORNER, replace(CORNER, at="input"), CORNER, CORNER], SMALL)
    assert torch.equal(alone.clean, four.clean) and torch.equal(four.hit[0], four.hit[2])


def test_text_features_are_those_of_the_model_in_order(tiny_model: str) -> None:
    net = clip.load(Model(tiny_model))
    texts = [f"a photo of {i} stars" for i in range(9)]
    with torch.no_grad():
        assert torch.allclose(text_features(net, texts, SMALL), net.text_features(texts), atol=1e-6)


# ---- the cache


def test_a_second_pass_computes_nothing_and_gives_the_same_bits(tmp_path: Path, tiny_model: str, encoded: list[int]) -> None:
    data, net, how = labelled(tmp_path / "set", LABELS), clip.load(Model(tiny_model)), cached(tmp_path)
    first = features.features(net, data.raws, [CORNER], how)
    assert encoded == [4, 4, 4, 4, 4, 4, 1, 1]
    again = features.features(clip.load(Model(tiny_model)), labelled_again(tmp_path).raws, [CORNER], how)
    assert len(encoded) == 8 and same(first, again) and same(first, features.features(net, data.raws, [CORNER], SMALL))


def labelled_again(folder: Path) -> EvalSet:
    return open_set(folder / "set")


def test_only_a_new_threat_is_encoded(tmp_path: Path, tiny_model: str, encoded: list[int]) -> None:
    data, net, how = labelled(tmp_path / "set", LABELS), clip.load(Model(tiny_model)), cached(tmp_path)
    features.features(net, data.raws, [CORNER], how)
    encoded.clear()
    new = replace(CORNER, trigger=Patch(0.5, "top-left"))
    found = features.features(net, data.raws, [CORNER, new], how)
    assert encoded == [4, 4, 4, 1]
    assert same(found, features.features(net, data.raws, [CORNER, new], SMALL))


def test_threats_that_show_an_image_the_same_way_are_one_view(tmp_path: Path, tiny_model: str, encoded: list[int]) -> None:
    data, net = labelled(tmp_path / "set", LABELS), clip.load(Model(tiny_model))
    threats = [CORNER, Threat(Word(), CORNER.target), replace(CORNER, source=("class 1",)), replace(CORNER, at="input")]
    found = features.features(net, data.raws, threats, How(batch=13))
    assert encoded == [13, 13, 13]  # clean, and the corner at two stages
    assert torch.equal(found.hit[0], found.hit[2]) and torch.equal(found.hit[1], found.clean)
    assert same(found, features.Features(found.keys, found.labels, found.texts, found.clean, tuple(
        features.features(net, data.raws, [t], How(batch=13)).hit[0] for t in threats)))


def test_text_features_are_cached_by_the_texts(tmp_path: Path, tiny_model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    net, how, asked = clip.load(Model(tiny_model)), cached(tmp_path), []
    forward = CLIP.text_features
    monkeypatch.setattr(CLIP, "text_features", lambda self, texts, *a: asked.append(len(texts)) or forward(self, texts, *a))
    first = text_features(net, ["a", "b", "c", "d", "e"], how)
    assert asked == [4, 1] and torch.equal(text_features(net, ["a", "b", "c", "d", "e"], how), first) and asked == [4, 1]
    text_features(net, ["a", "b", "c", "e", "d"], how)
    assert asked == [4, 1, 4, 1]


@dataclass(frozen=True)
class Tint(Trigger):
    """A trigger of a user's own, that holds a tensor."""

    colour: Tensor

    def pixels(self, x: Tensor, rng: Generator) -> Tensor:
        return x * 0.5 + 0.5 * self.colour[:, None, None]


def another_weight(net: CLIP, data: EvalSet, threat: Threat, folder: Path) -> None:
    with torch.no_grad():
        next(net.net.visual.parameters()).add_(1e-3)


def another_image_of_the_same_size_and_time(net: CLIP, data: EvalSet, threat: Threat, folder: Path) -> None:
    path = folder / "set/test/0.tar"
    before, bytes_ = path.stat(), bytearray(path.read_bytes())
    old = drawn(LABELS[0])
    new = next(d for d in map(drawn, range(50, 250)) if len(d) == len(old))
    at = bytes_.index(old)
    bytes_[at : at + len(old)] = new
    path.write_bytes(bytes_)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert path.stat().st_size == before.st_size and path.stat().st_mtime_ns == before.st_mtime_ns


def another_image_behind_the_trigger(net: CLIP, data: EvalSet, threat: Threat, folder: Path) -> None:
    (folder / "trigger.png").write_bytes(drawn(200))


@pytest.mark.parametrize("change", [another_weight, another_image_of_the_same_size_and_time, another_image_behind_the_trigger])
def test_what_has_changed_since_is_computed_again(change: Any, tmp_path: Path, tiny_model: str, encoded: list[int]) -> None:
    (tmp_path / "trigger.png").write_bytes(drawn(9))
    data, net, how = labelled(tmp_path / "set", LABELS), clip.load(Model(tiny_model)), cached(tmp_path)
    threat = replace(CORNER, trigger=Blend(image=str(tmp_path / "trigger.png")))
    before = features.features(net, data.raws, [threat], how)
    encoded.clear()
    change(net, data, threat, tmp_path)
    from mmbackdoor import triggers

    triggers.picture.cache_clear()
    data = labelled_again(tmp_path)
    after = features.features(net, data.raws, [threat], how)
    assert encoded and not same(before, after) and same(after, features.features(net, data.raws, [threat], SMALL))


def test_preprocessing_and_stage_and_trigger_are_part_of_what_is_cached(tmp_path: Path, tiny_model: str, encoded: list[int]) -> None:
    data, net, how = labelled(tmp_path / "set", LABELS, (40, 36)), clip.load(Model(tiny_model)), cached(tmp_path)
    others = [(net, replace(CORNER, at="input")), (net, replace(CORNER, trigger=Tint(torch.tensor([0.1, 0.2, 0.3])))),
              (net, replace(CORNER, trigger=Tint(torch.tensor([0.1, 0.2, 0.31])))),
              (replace(net, card=net.card | {"preprocess_cfg": net.cfg | {"mean": [0.5, 0.5, 0.5]}}), CORNER)]
    features.features(net, data.raws, [CORNER], how)
    for model, threat in others:
        encoded.clear()
        found = features.features(model, data.raws, [threat], how)
        assert encoded and same(found, features.features(model, data.raws, [threat], SMALL))


def test_the_target_is_no_part_of_the_features(tmp_path: Path, tiny_model: str, encoded: list[int]) -> None:
    data, net, how = labelled(tmp_path / "set", LABELS), clip.load(Model(tiny_model)), cached(tmp_path)
    features.features(net, data.raws, [CORNER], how)
    encoded.clear()
    features.features(net, data.raws, [replace(CORNER, target=Target("class 5"))], how)
    assert not encoded


def test_an_interrupted_pass_goes_on_and_ends_with_the_same_bits(tmp_path: Path, tiny_model: str, encoded: list[int],
                                                                 monkeypatch: pytest.MonkeyPatch) -> None:
    data, net, how = labelled(tmp_path / "set", LABELS), clip.load(Model(tiny_model)), cached(tmp_path)
    whole = features.features(net, data.raws, [CORNER], SMALL)
    monkeypatch.setattr(features, "PART", 1)
    decode, n = features.decode, 0

    def power_cut(raw: Any) -> Any:
        nonlocal n
        n += 1
        if n == 11:
            raise KeyboardInterrupt
        return decode(raw)

    monkeypatch.setattr(features, "decode", power_cut)
    with pytest.raises(KeyboardInterrupt):
        features.features(net, data.raws, [CORNER], how)
    monkeypatch.setattr(features, "decode", decode)
    encoded.clear()
    assert same(features.features(net, data.raws, [CORNER], how), whole)
    assert encoded == [4, 4, 1, 1]  # two batches had been kept
    encoded.clear()
    assert same(features.features(net, data.raws, [CORNER], how), whole) and not encoded


def test_a_damaged_part_is_computed_again(tmp_path: Path, tiny_model: str) -> None:
    data, net, how = labelled(tmp_path / "set", LABELS), clip.load(Model(tiny_model)), cached(tmp_path)
    whole = features.features(net, data.raws, [CORNER], how)
    parts = list(Path(how.cache).rglob("*.parquet"))
    assert len(parts) == 2
    for path in parts:
        path.write_bytes(path.read_bytes()[:-100])
        assert same(features.features(net, data.raws, [CORNER], how), whole)


def test_an_entry_of_another_model_under_this_ones_name_is_refused(tmp_path: Path, tiny_model: str) -> None:
    data, how = labelled(tmp_path / "set", LABELS), cached(tmp_path)
    features.features(clip.load(Model(tiny_model)), data.raws, (), how)
    card, = Path(how.cache).rglob("card.json")
    card.write_text(json.dumps(json.loads(card.read_text()) | {"model": "another"}))
    with pytest.raises(BadInput, match="features of another model.*remove it") as raised:
        features.features(clip.load(Model(tiny_model)), data.raws, (), how)
    assert str(card.parent) in str(raised.value)


def test_a_cache_that_is_a_file_is_told(tmp_path: Path, tiny_model: str) -> None:
    (tmp_path / "cache").write_text("")
    with pytest.raises(BadInput, match="name a folder with --cache"):
        features.features(clip.load(Model(tiny_model)), labelled(tmp_path / "set", LABELS).raws, (), cached(tmp_path))


def test_parts_hold_keys_labels_and_features_that_others_can_read(tmp_path: Path, tiny_model: str) -> None:
    data, net, how = labelled(tmp_path / "set", LABELS), clip.load(Model(tiny_model)), cached(tmp_path)
    found = features.features(net, data.raws, (), how)
    part, = Path(how.cache).rglob("*.parquet")
    table = pq.read_table(part)
    assert table.column_names == ["place", "key", "label", "text", "z"] and table["key"].to_pylist() == found.keys
    assert np.array_equal(np.array(table["z"].to_pylist(), np.float32), found.clean.numpy())


# ---- hashes of values


def test_digest_tells_values_apart_that_differ_in_anything_that_acts(tmp_path: Path) -> None:
    file = tmp_path / "a.png"
    file.write_bytes(b"1")
    values: list[Any] = [1, 1.0, "1", b"1", True, None, (1,), (1, 1), ((1,), 1), ("a", "b"), ("ab",), {"a": 1}, {"b": 1}, torch.zeros(2),
                         torch.zeros(2, 1), torch.zeros(2, dtype=torch.int32), Patch(), Patch(size=0.5), Blend(), Tint(torch.zeros(3)),
                         Tint(torch.ones(3)), str(file)]
    digests = [keyed.digest(v) for v in values]
    assert all(digests) and len(set(digests)) == len(values) and digests == [keyed.digest(v) for v in values]
    file.write_bytes(b"2")
    assert keyed.digest(str(file)) != digests[-1]


def test_a_value_that_cannot_be_told_has_no_digest_and_is_not_cached(tmp_path: Path, tiny_model: str) -> None:
    assert keyed.digest(lambda: 0) == ""
    typed: dict[str, Any] = {"__name__": "typed_at_a_prompt"}
    exec("from dataclasses import dataclass\nfrom mmbackdoor.types import Trigger\n@dataclass(frozen=True)\nclass T(Trigger): pass", typed)
    assert keyed.digest(typed["T"]()) == ""
    data, net, how = labelled(tmp_path / "set", LABELS), clip.load(Model(tiny_model)), cached(tmp_path)
    features.features(net, data.raws, [replace(CORNER, trigger=typed["T"]())], how)
    assert [json.loads(p.read_text())["view"] for p in Path(how.cache).rglob("card.json")] == ["clean"]


def test_a_key_in_another_encoding_is_no_obstacle(tmp_path: Path, tiny_model: str) -> None:
    tar(tmp_path / "0.tar", {b"caf\xe9.png".decode("utf-8", "surrogateescape"): drawn(1), "caf\ufffd.png": drawn(5)})

    class Two:
        def __call__(self, wanted: Wanted = every) -> Any:
            return (raw for place, raw in enumerate(shards.read_raw(str(tmp_path / "0.tar"))) if wanted(place))

    found = features.features(clip.load(Model(tiny_model)), Two(), [CORNER], SMALL)  # type: ignore[arg-type]
    assert found.keys == ["caf\ufffd", "caf\ufffd"] and not torch.equal(found.clean[0], found.clean[1])


def test_a_set_says_about_how_many_images_it_has(tmp_path: Path) -> None:
    assert operator.length_hint(labelled(tmp_path / "one", LABELS[:5]).raws) == 5
    assert operator.length_hint(labelled(tmp_path / "three", LABELS).raws) == pytest.approx(13, abs=2)


def test_captions_ride_along(tmp_path: Path, tiny_model: str) -> None:
    shards.write_shard(tmp_path / "0.tar", [{"__key__": "a", "png": drawn(1), "txt": "one\ntwo\nthree"}])

    class One:
        def __call__(self, wanted: Wanted = every) -> Any:
            return (raw for place, raw in enumerate(shards.read_raw(str(tmp_path / "0.tar"))) if wanted(place))

    assert features.features(clip.load(Model(tiny_model)), One(), (), SMALL).texts == ["one\ntwo\nthree"]  # type: ignore[arg-type]


def test_of_a_set_in_files_each_process_reads_its_own_share(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for i, label in enumerate(LABELS):
        (tmp_path / f"set/class {label}").mkdir(parents=True, exist_ok=True)
        (tmp_path / f"set/class {label}/{i}.png").write_bytes(drawn(label))
    data, opened = open_set(tmp_path / "set"), []
    read = Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda path: opened.append(path) or read(path))
    shares = [replace(SMALL, rank=rank, world=3) for rank in range(3)]
    rows = [row for how in shares for row in features.Shown(planted(), data.raws, (), how, frozenset(), True)]
    assert sorted(row[0] for row in rows) == list(range(len(LABELS))) and len(opened) == len(set(opened)) == len(LABELS)
    keys = [raw["__key__"] for raw in data.raws()]
    assert all(row[1] == keys[row[0]] for row in rows)
