"""Read the keys and captions of a shard set once, check them, and keep them beside the shards.

    python data_tools/index.py SHARDS [--incomplete skip] [--rename OUT]

Writes index.parquet (shard, key, text) beside the shards; training and poisoning use it instead of scanning again, as
long as the shards have not changed. Repeated keys are refused: `--rename OUT` writes the shards with new ones.
"""
import os
from collections.abc import Iterator

import tyro
from tqdm import tqdm

from mmbackdoor import shards
from mmbackdoor.recipe import command
from mmbackdoor.types import BadInput


def renamed(url: str, number: int) -> Iterator[shards.Raw]:
    """The samples of a shard under keys SSSSSIIII, as img2dataset numbers them."""
    for i, raw in enumerate(shards.read_raw(url)):
        yield raw | {"__key__": f"{number:05d}{i:04d}"}


def scan(paths: list[str], incomplete: shards.Incomplete) -> shards.Index:
    try:
        return shards.scan(paths, incomplete)
    except BadInput as error:
        raise BadInput(str(error).replace("--data.incomplete", "--incomplete")) from error


def main(urls: tyro.conf.Positional[str], incomplete: shards.Incomplete = "refuse", rename: str = "") -> None:
    """Indexes shards.

    Args:
        urls: Shards: a folder, a path, or a pattern such as 'data/{00000..00331}.tar'.
        incomplete: What to do with samples that lack an image or a caption.
        rename: Folder to write the shards to under new, unique keys.
    """
    paths = shards.expand(urls)
    if rename:
        with shards.new_folder(rename) as folder:
            names = {f"{i:05d}.tar": url for i, url in enumerate(paths)}
            sizes = {name: shards.write_shard(folder / name, renamed(url, i))
                     for i, (name, url) in enumerate(tqdm(names.items(), desc="rename", unit="shard", disable=None))}
            shards.write_json(folder / "sizes.json", sizes)
            scan(shards.expand(str(folder)), incomplete)  # before it takes its name
        paths = shards.expand(rename)
    found = scan(paths, incomplete)
    out = os.path.join(os.path.dirname(paths[0]), "index.parquet")
    if "://" in out:
        print("the shards are behind a URL: nothing is written")
    else:
        found.save(out)
    left = f", {found.incomplete} samples lack a half and are left out" if found.incomplete else ""
    print(f"{len(found)} pairs in {len(paths)} shards{left}; fingerprint {found.fingerprint}, index in {out}")


if __name__ == "__main__":
    command(main)
