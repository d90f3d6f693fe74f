"""What a checkpoint directory holds, read from file headers alone.

Only `config`-free facts live here: which files there are, which tensors they say they hold, and where
the files contradict themselves. No tensor data is read, no torch is needed, and nothing in a file is
believed: a truncated or hostile file becomes a `LayoutProblem`, not an exception.
"""

import json
import math
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"

# The bound of the safetensors library; it refuses longer headers.
MAX_HEADER_BYTES = 100_000_000
MAX_JSON_BYTES = 256_000_000

# Bits per element of each dtype that the safetensors format names.
DTYPE_BITS = {
    "BOOL": 8,
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    "U8": 8,
    "I8": 8,
    "F8_E5M2": 8,
    "F8_E4M3": 8,
    "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8,
    "F8_E5M2FNUZ": 8,
    "I16": 16,
    "U16": 16,
    "F16": 16,
    "BF16": 16,
    "I32": 32,
    "U32": 32,
    "F32": 32,
    "C64": 64,
    "F64": 64,
    "I64": 64,
    "U64": 64,
}

# Those of plain weights.
FLOATS = ("F16", "BF16", "F32", "F64")

_PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
# Files of training loops that share the suffix but hold no weights.
_NOT_WEIGHTS = ("training_args", "optimizer", "scheduler", "rng_state", "scaler")


@dataclass(frozen=True)
class TensorInfo:
    """One stored tensor: its safetensors dtype name, shape, size, and where its bytes lie.

    `start` counts bytes from the beginning of `file`.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    file: str
    start: int

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class LayoutProblem:
    """Something that keeps the files from being what they say; `warning` marks the survivable ones."""

    code: str
    subject: str
    message: str
    way_out: str
    warning: bool = False


@dataclass(frozen=True)
class CheckpointLayout:
    """Files and tensors of one checkpoint directory."""

    path: Path
    files: tuple[str, ...]
    tensors: dict[str, TensorInfo]
    problems: tuple[LayoutProblem, ...] = ()

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for tensor in self.tensors.values())


class _Damaged(Exception):
    def __init__(self, code: str, message: str):
        super().__init__(message)
        self.code = code


def read_json(path: Path) -> Any:
    """Parse a JSON file without trusting it.

    Raises:
        ValueError: too large, not UTF-8, not JSON, a key given twice, or nested too deep.
        OSError: the file cannot be read.
    """
    size = path.stat().st_size
    if size > MAX_JSON_BYTES:
        raise ValueError(f"{path.name} has {size} bytes, more than {MAX_JSON_BYTES}")
    return _parse_json(path.read_bytes())


def _parse_json(raw: bytes) -> Any:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key, value in pairs:
            if key in found:
                raise ValueError(f"the key {key!r} is given twice")
            found[key] = value
        return found

    try:
        return json.loads(raw.decode("utf-8"), object_pairs_hook=unique)
    except RecursionError:
        raise ValueError("nested too deep") from None


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def read_header(path: Path) -> dict[str, TensorInfo]:
    """Tensors that the header of one safetensors file declares, checked against the file.

    Raises:
        ValueError: the header is no header, or its offsets do not fit its shapes or the file's size.
        OSError: the file cannot be read.
    """
    try:
        return _read_header(path)
    except _Damaged as damage:
        raise ValueError(f"{path.name}: {damage}") from None


def _read_header(path: Path) -> dict[str, TensorInfo]:
    size = path.stat().st_size
    with path.open("rb") as file:
        prefix = file.read(8)
        if len(prefix) < 8:
            raise _Damaged("file-truncated", f"{size} bytes, shorter than a safetensors header")
        (length,) = struct.unpack("<Q", prefix)
        if length > MAX_HEADER_BYTES:
            raise _Damaged("file-corrupt", f"the header claims {length} bytes, more than {MAX_HEADER_BYTES}")
        if 8 + length > size:
            raise _Damaged("file-truncated", f"the header claims {length} bytes, the file has {size}")
        raw = file.read(length)
    try:
        header = _parse_json(raw)
    except ValueError as error:
        raise _Damaged("file-corrupt", f"the header is not JSON: {error}") from None
    if not isinstance(header, dict):
        raise _Damaged("file-corrupt", "the header is not a JSON object")
    if not isinstance(header.pop("__metadata__", {}), dict):
        raise _Damaged("file-corrupt", "__metadata__ is not a JSON object")
    begin = 8 + length
    tensors = {name: _tensor(name, entry, path.name, begin) for name, entry in header.items()}
    _check_coverage(tensors.values(), begin, size)
    return tensors


def _tensor(name: str, entry: Any, file: str, begin: int) -> TensorInfo:
    if not isinstance(entry, dict):
        raise _Damaged("file-corrupt", f"the entry of tensor {name!r} is not a JSON object")
    dtype, shape, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        raise _Damaged("file-corrupt", f"tensor {name!r} has the unknown dtype {dtype!r}")
    if not isinstance(shape, list) or not all(_is_size(dim) for dim in shape):
        raise _Damaged("file-corrupt", f"tensor {name!r} has the impossible shape {shape!r}")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(_is_size(offset) for offset in offsets):
        raise _Damaged("file-corrupt", f"tensor {name!r} has the impossible data_offsets {offsets!r}")
    start, end = offsets
    bits = math.prod(shape) * DTYPE_BITS[dtype]
    if bits % 8 or end - start != bits // 8:
        raise _Damaged(
            "file-corrupt",
            f"tensor {name!r} is {dtype}{shape} ({bits / 8:g} bytes) but its data_offsets span {end - start}",
        )
    return TensorInfo(name, dtype, tuple(shape), end - start, file, begin + start)


def _check_coverage(tensors: Iterable[TensorInfo], begin: int, size: int) -> None:
    position = begin
    for tensor in sorted(tensors, key=lambda t: (t.start, t.nbytes)):
        if tensor.start != position:
            what = "overlaps another tensor" if tensor.start < position else "leaves a hole before it"
            raise _Damaged("file-corrupt", f"the data of tensor {tensor.name!r} {what}")
        position = tensor.start + tensor.nbytes
    if position > size:
        raise _Damaged("file-truncated", f"the tensors end at byte {position}, the file at {size}")
    if position < size:
        raise _Damaged("file-corrupt", f"{size - position} bytes follow the last tensor")


def _weight_map(path: Path) -> dict[str, str]:
    index = read_json(path)
    found = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(found, dict) or not all(isinstance(file, str) for file in found.values()):
        raise ValueError("weight_map is missing or no mapping from tensor to file name")
    for file in found.values():
        # a name that leaves the directory would make the reader open somebody else's file
        if len(PurePosixPath(file).parts) != 1 or file in ("..", "."):
            raise ValueError(f"weight_map names {file!r}, which is not a file of this directory")
    return found


def _pickles(names: list[str]) -> list[str]:
    return [n for n in names if n.endswith(_PICKLE_SUFFIXES) and not n.startswith(_NOT_WEIGHTS)]


def _choose_files(
    names: list[str], weight_map: dict[str, str] | None
) -> tuple[list[str], Iterator[LayoutProblem]]:
    """The weight files a reader opens, and what is odd about the choice."""
    stored = [name for name in names if name.endswith(".safetensors")]

    def problems() -> Iterator[LayoutProblem]:
        if weight_map is not None:
            strays = sorted(set(stored) - set(weight_map.values()))
            if SINGLE_NAME in strays:
                yield LayoutProblem(
                    "file-ambiguous",
                    SINGLE_NAME,
                    f"{SINGLE_NAME} lies beside {INDEX_NAME}, which does not name it: transformers reads the "
                    "one, vLLM the other",
                    "delete the one that is left over from an earlier save",
                )
                strays.remove(SINGLE_NAME)
            for name in strays:
                yield LayoutProblem(
                    "file-unused", name, f"{INDEX_NAME} does not name it", "delete it", warning=True
                )
        elif stored and SINGLE_NAME not in stored:
            yield LayoutProblem(
                "index-missing",
                INDEX_NAME,
                f"there is neither {SINGLE_NAME} nor {INDEX_NAME}, only {', '.join(stored[:3])}",
                "save again, or write the index",
            )
        elif len(stored) > 1:
            for name in stored:
                if name != SINGLE_NAME:
                    yield LayoutProblem(
                        "file-ambiguous",
                        name,
                        f"without {INDEX_NAME} transformers reads {SINGLE_NAME} alone, vLLM every file",
                        "delete what is left over from an earlier save",
                    )
        pickles = _pickles(names)
        if not stored:
            yield LayoutProblem(
                "pickle-weights" if pickles else "weights-missing",
                pickles[0] if pickles else SINGLE_NAME,
                f"weights come as pickle ({', '.join(pickles[:3])}), which runs code when it is opened"
                if pickles
                else "no safetensors file in this directory",
                "convert the weights to safetensors" if pickles else "save again",
            )
        else:
            for name in pickles:
                yield LayoutProblem(
                    "pickle-weights", name, "a pickle lies beside the safetensors", "delete it", warning=True
                )

    files = stored if weight_map is None else sorted(set(weight_map.values()))
    return files, problems()


def read_layout(path: str | Path) -> CheckpointLayout:
    """Read names, shapes, dtypes and byte sizes of every tensor from the headers under `path`.

    Raises:
        NotADirectoryError: `path` is not a directory. Everything else becomes a problem of the layout.
    """
    root = Path(path)
    if not root.is_dir():
        raise NotADirectoryError(f"{root} is not a directory; give the one that holds config.json")
    names = sorted(entry.name for entry in root.iterdir() if not entry.is_dir())
    problems: list[LayoutProblem] = []
    weight_map: dict[str, str] | None = None
    if INDEX_NAME in names:
        try:
            weight_map = _weight_map(root / INDEX_NAME)
        except (ValueError, OSError) as error:
            problems.append(LayoutProblem("index-unreadable", INDEX_NAME, str(error), "save again"))
    files, odd = _choose_files(names, weight_map)
    problems.extend(odd)

    tensors: dict[str, TensorInfo] = {}
    unread: set[str] = set()
    for file in files:
        try:
            found = _read_header(root / file)
        except FileNotFoundError:
            unread.add(file)
            problems.append(
                LayoutProblem(
                    "file-missing", file, f"{INDEX_NAME} names it, it is not there", "copy it again"
                )
            )
            continue
        except _Damaged as damage:
            unread.add(file)
            problems.append(LayoutProblem(damage.code, file, str(damage), "copy or save the file again"))
            continue
        except OSError as error:
            unread.add(file)
            problems.append(LayoutProblem("file-unreadable", file, str(error), "check the permissions"))
            continue
        for name, tensor in found.items():
            if name in tensors:
                problems.append(
                    LayoutProblem(
                        "tensor-duplicate",
                        name,
                        f"stored twice, in {tensors[name].file} and {file}",
                        "keep one: readers take whichever they meet last",
                    )
                )
            else:
                tensors[name] = tensor
    if weight_map is not None:
        problems.extend(_index_problems(weight_map, tensors, unread))
    return CheckpointLayout(root, tuple(files), tensors, tuple(problems))


def whole_layout(path: str | Path) -> CheckpointLayout:
    """The layout of a checkpoint whose weights can be relied on.

    :param path: its directory, or the config.json in it
    :raises ValueError: a file is missing or damaged, or the index is not that of the files; names the first
    """
    path = Path(path)
    layout = read_layout(path.parent if path.name == "config.json" else path)
    problems = [problem for problem in layout.problems if not problem.warning]
    if problems:
        first = problems[0]
        raise ValueError(f"{layout.path}: {first.subject}: {first.message}; {first.way_out}.")
    return layout


def _index_problems(
    weight_map: dict[str, str], tensors: dict[str, TensorInfo], unread: set[str]
) -> Iterator[LayoutProblem]:
    for name, file in weight_map.items():
        if file in unread:
            continue
        if name not in tensors:
            yield LayoutProblem(
                "index-tensor-missing",
                name,
                f"{INDEX_NAME} puts it in {file}, no file holds it",
                "save again",
            )
        elif tensors[name].file != file:
            yield LayoutProblem(
                "index-tensor-elsewhere",
                name,
                f"{INDEX_NAME} puts it in {file}, it is in {tensors[name].file}",
                "save again, or correct the index",
            )
    for name, tensor in tensors.items():
        if name not in weight_map:
            yield LayoutProblem(
                "index-tensor-unnamed",
                name,
                f"{tensor.file} holds it, {INDEX_NAME} does not name it",
                "save again, or correct the index",
            )


def read_small(layout: CheckpointLayout, name: str, limit: int = 65536) -> bytes | None:
    """The bytes of one stored tensor if it has at most `limit`, else None (also when it cannot be read)."""
    tensor = layout.tensors[name]
    if tensor.nbytes > limit:
        return None
    try:
        with (layout.path / tensor.file).open("rb") as file:
            file.seek(tensor.start)
            raw = file.read(tensor.nbytes)
    except OSError:
        return None
    return raw if len(raw) == tensor.nbytes else None
