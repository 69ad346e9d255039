"""Files of evaluation sets: texts, images, class folders; what they hold, and whether they changed."""
from __future__ import annotations

import io
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import fsspec
from open_clip import IMAGENET_CLASSNAMES, OPENAI_IMAGENET_TEMPLATES
from PIL import Image

from .shards import Raw
from .stores import stamp
from .types import BadInput

FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF", "JPEG2000")
"""What PIL may open. Not all that it can: it gives PostScript, for one, to another program to run."""
UNTOUCHED = {"jpg": rb"\xff\xd8\xff", "png": rb"\x89PNG\r\n\x1a\n", "webp": rb"RIFF....WEBP"}
"""How the files begin that stay as they are."""
WNID = re.compile(r"n\d{8}")
IMAGENET = (1000, "n01440764", "n15075141")
"""Number, first and last of the class folders of ImageNet's validation set."""
PLAIN = ("a photo of a {c}.",)
QUERY = {key: f"?{key}={value}" for key, value in (("split", "SPLIT"), ("config", "NAME"), ("image", "COLUMN"), ("label", "COLUMN"),
                                                   ("caption", "COLUMN"), ("classnames", "FILE"), ("templates", "FILE"))}


Wanted = Callable[[int], bool]


def every(place: int) -> bool:
    return True


class Source(Protocol):
    """A stream of raw samples that can be begun again, in loader workers too: of those in the places that are wanted, from 0 on."""

    def __call__(self, wanted: Wanted = every) -> Iterator[Raw]: ...

    def fingerprint(self) -> str:
        """A hash that changes whenever the data do; "" where that cannot be known."""
        ...


@dataclass(frozen=True)
class Said:
    """What a user says about a set beside its place, and in `option` how the messages call each of these."""

    split: str | None = None
    config: str | None = None
    image: str | None = None
    label: str | None = None
    caption: str | None = None
    classnames: str | None = None
    templates: str | None = None
    option: Mapping[str, str] = field(default_factory=lambda: QUERY)


def one_line(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


def one_a_line(captions: Iterable[str | None]) -> str:
    """Captions as lines of a text, whatever breaks they have within; blank ones are left out."""
    return "\n".join(filter(None, (" ".join((c or "").split()) for c in captions)))


def begin(source: Source, where: str, members: str) -> None:
    """A set that is empty, or wrong from its first sample on, is told before anything is computed."""
    if next(iter(source()), None) is None:
        raise BadInput(f"{where}: is empty; a sample is {members}")


# ---- text files of a set


def read_text(path: str) -> str | None:
    """A text file, local or behind a URL; None where there is none."""
    try:
        if "://" not in path:
            return Path(path).read_text(encoding="utf-8-sig")
        fs, inner = fsspec.core.url_to_fs(path)
        return fs.cat_file(inner).decode("utf-8-sig")
    except (FileNotFoundError, NotADirectoryError):
        return None
    except Exception as e:  # each store has its own
        if "://" in path and (isinstance(e, PermissionError) or getattr(e, "status", 0) == 403):  # how some say that there is none
            return None
        raise BadInput(f"{path}: cannot be read as UTF-8 text ({one_line(e)}); check the path") from e


def lines(path: str, what: str = "one name or template a line") -> tuple[str, ...]:
    text = read_text(path)
    if not text or not text.strip():
        raise BadInput(f"{path}: missing or empty; write {what}")
    found = tuple(line.strip() for line in text.rstrip().splitlines())
    if "" in found:
        raise BadInput(f"{path}: line {found.index('') + 1} is empty; write {what}")
    return found


def class_names(own: Sequence[str], given: str | None, where: str) -> tuple[str, ...]:
    """The names in the file `given`, else those that the data have, with spaces for underscores."""
    if given is None:
        return tuple(" ".join(name.replace("_", " ").split()) for name in own)
    names = lines(given)
    if own and len(names) != len(own):
        raise BadInput(f"{given}: has {len(names)} names for the {len(own)} classes of {where}; write one a line, in "
                       "the order of the labels or of the sorted class folders")
    return names


def templates(given: str | None, usual: Sequence[str] = PLAIN) -> tuple[str, ...]:
    """Templates with {c} for the class."""
    found = tuple(usual) if given is None else lines(given, "one template a line, such as: a photo of a {c}.")
    if bad := [n for n, line in enumerate(found, 1) if "{c}" not in line]:
        raise BadInput(f"{given}: line {bad[0]}: {found[bad[0] - 1]!r} has no {{c}}; write it where the class name goes")
    return found


# ---- images


def standard(body: bytes) -> tuple[str, bytes]:
    """The field and the bytes of an image in a shard: JPEG, PNG and WebP as they are, other formats as PNG, told by their content.

    Raises PIL's errors where there is no image of a known format.
    """
    found = next((name for name, begins in UNTOUCHED.items() if re.match(begins, body, re.DOTALL)), None)
    return (found, body) if found else ("png", as_png(open_image(body)))


def open_image(body: bytes) -> Image.Image:
    """A loaded image of one of FORMATS, in the file's own mode."""
    Image.init()
    image = Image.open(io.BytesIO(body), formats=[f for f in FORMATS if f in Image.OPEN])
    image.load()
    return image


def as_png(image: Image.Image) -> bytes:
    out = io.BytesIO()
    if image.mode not in ("L", "LA", "RGB", "RGBA"):
        image = image.convert("RGBA" if image.has_transparency_data else "RGB")
    image.save(out, "PNG")
    return out.getvalue()


def is_image_name(name: str) -> bool:
    """Whether a file's name ends as those of FORMATS do."""
    return Image.registered_extensions().get(os.path.splitext(name)[1].lower()) in FORMATS


# ---- one folder a class


def class_folders(root: str | Path) -> list[str]:
    return sorted(e.name for e in os.scandir(root) if e.is_dir() and not e.name.startswith("."))


def image_files(folder: str | Path) -> list[str]:
    """The images under a folder, sorted; links are followed, hidden files are not seen."""
    found = []
    for top, folders, names in os.walk(folder, followlinks=True):
        folders[:] = [f for f in folders if not f.startswith(".")]
        found += [os.path.join(top, name) for name in names if not name.startswith(".") and is_image_name(name)]
    return sorted(found, key=lambda path: path.split(os.sep))


def files_in_classes(root: str | Path) -> list[tuple[str, int]]:
    """(image, number of its class folder)."""
    return [(path, label) for label, name in enumerate(class_folders(root)) for path in image_files(os.path.join(root, name))]


def folder_names(root: str, said: Said) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Class names and templates of class folders."""
    folders = class_folders(root)
    if (len(folders), folders[0], folders[-1]) == IMAGENET:
        prompts = [template("{c}") for template in OPENAI_IMAGENET_TEMPLATES]
        return class_names(IMAGENET_CLASSNAMES, said.classnames, root), templates(said.templates, prompts)
    if said.classnames is None and all(map(WNID.fullmatch, folders)):
        raise BadInput(f"{root}: its {len(folders)} classes are named by WordNet numbers such as {folders[0]}, which say nothing to a "
                       f"model, and they are not ImageNet's 1000; give their names with {said.option['classnames']}, one a line")
    return class_names(folders, said.classnames, root), templates(said.templates)


@dataclass(frozen=True)
class FolderSource:
    """Raw samples of a folder of class folders."""

    root: str
    files: tuple[tuple[str, int], ...]

    def __call__(self, wanted: Wanted = every) -> Iterator[Raw]:
        for path, label in (file for place, file in enumerate(self.files) if wanted(place)):
            try:
                member, body = standard(Path(path).read_bytes())
            except Exception as e:  # damaged files fail inside PIL with errors of every kind
                raise BadInput(f"{path}: the image cannot be read ({one_line(e)}); mend or remove it") from e
            yield {"__key__": os.path.relpath(path, self.root), "__url__": self.root, member: body, "cls": str(label).encode()}

    def __length_hint__(self) -> int:
        return len(self.files)

    def fingerprint(self) -> str:
        return stamp((f"{path.removeprefix(self.root)} {label}", path) for path, label in self.files)
