"""Read the keys, captions and places of all pairs of a shard set once, check them, and keep them beside the shards.

    python data_tools/index.py SHARDS [--incomplete skip] [--out INDEX] [--processes 8]
    python data_tools/index.py 's3://bucket/cc12m/{0000..2175}.tar' --dask-scheduler tcp://HOST:8786
    python data_tools/index.py SHARDS --rename OUT

Writes SHARDS/index/00000.parquet …, one a shard (key, text, and the offset and size of each member), and index.json last;
training and poisoning use them instead of scanning again, as long as the shards have not changed. A rerun does what is
missing. Where img2dataset left its Parquet files their keys and captions are taken, unless --scan. Repeated keys are
refused: `--rename OUT` writes the shards with new ones.
"""
from collections.abc import Iterator

import tyro
from tqdm import tqdm

from mmbackdoor import index, shards, stores
from mmbackdoor.recipe import command
from mmbackdoor.spread import Spread
from mmbackdoor.types import BadInput

SPREAD = Spread()


def renamed(url: str, number: int) -> Iterator[shards.Raw]:
    """The samples of a shard under keys SSSSSIIII, as img2dataset numbers them."""
    for i, raw in enumerate(shards.read_raw(url)):
        yield raw | {"__key__": f"{number:05d}{i:04d}"}


def renumber(paths: list[str], out: str, incomplete: shards.Incomplete) -> list[str]:
    """Writes the shards to a new folder under new keys."""
    with shards.new_folder(out) as folder:
        names = {f"{i:05d}.tar": url for i, url in enumerate(paths)}
        sizes = {name: shards.write_shard(folder / name, renamed(url, i))
                 for i, (name, url) in enumerate(tqdm(names.items(), desc="rename", unit="shard", disable=None))}
        stores.write_json(folder / "sizes.json", sizes)
        index.find(str(folder), incomplete)  # before it takes its name
    return shards.expand(out)


def main(urls: tyro.conf.Positional[str], incomplete: shards.Incomplete = "refuse", out: str = "", scan: bool = False, rename: str = "",
         spread: tyro.conf.OmitArgPrefixes[Spread] = SPREAD) -> None:
    """Indexes shards.

    Args:
        urls: Shards: a folder, a path, a pattern such as 'data/{00000..00331}.tar', or URLs of a store.
        incomplete: What to do with samples that lack an image or a caption.
        out: Folder for the index, where the shards' own cannot be written to; then pass it to training as --data.index.
        scan: Read the tars even where img2dataset's Parquet files have the keys and captions.
        rename: Folder to write the shards to under new, unique keys.
        spread: Where the work is done.
    """
    paths = shards.expand(urls)
    if stores.is_remote(rename):
        raise BadInput(f"--rename {rename}: shards are renamed into a local folder; name one, and copy it to the store")
    if rename:
        paths = renumber(paths, rename, incomplete)
    with spread.executor() as executor:
        found = index.write(paths, executor, incomplete, out, scan, spread)
    if found is None:
        print(f"{len(spread.share(paths))} of {len(paths)} shards are this task's and done; the task that ends last closes the index")
        return
    left = f", {found.incomplete} samples lack a half and are left out" if found.incomplete else ""
    print(f"{len(found)} pairs in {len(paths)} shards{left}; fingerprint {found.fingerprint}, index in {index.folder_for(paths[0], out)}")


if __name__ == "__main__":
    command(main)
