"""The teacher's highest logits on disk, so that the teacher runs once and need not be in memory afterwards."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers import PreTrainedModel

from llmcompressor_moe.checkpoint.atomic import atomic_directory
from llmcompressor_moe.checkpoint.fingerprint import fingerprint
from llmcompressor_moe.profile.computing import stored_dtype
from llmcompressor_moe.profile.forward import run_batches
from llmcompressor_moe.recovery.data import rows_digest
from llmcompressor_moe.recovery.losses import TopLogits

__all__ = ["LogitCache", "check_cache_target", "has_cache", "open_cache", "write_cache"]

_INDEX = "cache.json"
# A shard is held in memory until it is written.
_SHARD_BYTES = 256 << 20
# An index and a logit.
_ENTRY_BYTES = 8


class _Index(BaseModel):
    model_config = ConfigDict(extra="forbid")

    format: Literal[1] = 1
    teacher: str
    rows_digest: str
    rows: int = Field(ge=1)
    length: int = Field(ge=1)
    k: int = Field(ge=1)
    temperature: float = Field(gt=0)
    rows_per_shard: int = Field(ge=1)

    @property
    def shards(self) -> list[str]:
        """File names, in the order of their rows."""
        return [f"logits-{start:08d}.safetensors" for start in range(0, self.rows, self.rows_per_shard)]


class LogitCache:
    """A cache that was opened; nothing of it is kept in memory.

    :param directory: where it is
    :param index: what it says of itself
    """

    def __init__(self, directory: Path, index: _Index) -> None:
        self._directory = directory
        self._index = index

    @property
    def k(self) -> int:
        """Logits per position."""
        return self._index.k

    @property
    def temperature(self) -> float:
        """The one that the logits serve."""
        return self._index.temperature

    def top(self, rows: torch.Tensor) -> TopLogits:
        """What the teacher said of some rows.

        :param rows: [batch] indices among the rows that the cache was written for
        :return: of [batch, length] positions, on the CPU
        :raises ValueError: there is no such row, or a file of the cache is damaged
        """
        wanted = rows.tolist()
        if any(not 0 <= row < self._index.rows for row in wanted):
            raise ValueError(f"row {wanted}: the cache {str(self._directory)!r} has {self._index.rows} rows.")
        read = [self._row(row) for row in wanted]
        values, indices, normalizers = (torch.stack(parts) for parts in zip(*read, strict=True))
        return TopLogits(values, indices.long(), normalizers, self._index.temperature)

    def _row(self, row: int) -> tuple[torch.Tensor, ...]:
        shard, place = divmod(row, self._index.rows_per_shard)
        path = self._directory / self._index.shards[shard]
        try:
            with safe_open(path, framework="pt") as file:
                return tuple(file.get_slice(name)[place] for name in ("values", "indices", "log_normalizer"))
        except (OSError, SafetensorError) as error:
            raise ValueError(
                f"cache: {str(path)!r} cannot be read ({error}); {_rewrite(self._directory)}"
            ) from error


def has_cache(directory: str | Path) -> bool:
    """Whether a cache was written there."""
    return (Path(directory) / _INDEX).is_file()


def check_cache_target(directory: str | Path) -> None:
    """Make sure that a cache may be written to a directory: it is new, empty or a cache.

    :raises ValueError: it holds something else
    """
    directory = Path(directory)
    if directory.exists() and not directory.is_dir():
        raise ValueError(f"cache {str(directory)!r} is a file; name a directory.")
    if directory.exists() and not has_cache(directory) and any(directory.iterdir()):
        raise ValueError(
            f"cache {str(directory)!r} holds files and is not a cache; name a new or empty directory."
        )


def write_cache(
    teacher_model: PreTrainedModel,
    rows: torch.Tensor,
    directory: str | Path,
    k: int,
    batch_size: int,
    *,
    temperature: float = 1.0,
    teacher: str | Path | None = None,
) -> LogitCache:
    """Run the teacher once over all rows and keep its highest logits; written as a whole or not at all.

    The teacher runs block by block, all rows together, so that one that was opened need not fit in memory. What
    passes from block to block waits in memory or in files, see `RunOptions`. Logits are kept in the dtype that the
    teacher is stored in, whatever it is computed in: a position takes 4 bytes and 8 per logit, 6 in 16 bit.

    :param rows: [rows, length] token ids
    :param k: logits per position; all of the vocabulary makes the loss of the cache that of the teacher itself
    :param batch_size: rows per forward
    :param temperature: that of the loss that the cache is for
    :param teacher: the directory that the teacher was loaded from; None: what the model says itself
    :raises ValueError: ``k`` is not in 1 to the size of the vocabulary, there are no rows, or the directory holds
        something else, or the teacher comes from none
    :raises OutputDirectoryError: the directory cannot be written
    """
    vocabulary = teacher_model.config.get_text_config().vocab_size
    if not 1 <= k <= vocabulary:
        raise ValueError(f"cache: k is {k}; give 1 to {vocabulary}, the teacher's vocabulary.")
    if rows.ndim != 2 or not rows.numel():
        raise ValueError(
            f"cache: rows has shape {tuple(rows.shape)}; give [rows, length] with at least one token."
        )
    source = teacher or teacher_model.name_or_path
    if not source:
        raise ValueError(
            "cache: the teacher was not loaded from a directory; give the one its weights are in."
        )
    check_cache_target(directory)
    count, length = rows.shape
    index = _Index(
        teacher=fingerprint(source),
        rows_digest=rows_digest(rows),
        rows=count,
        length=length,
        k=k,
        temperature=temperature,
        rows_per_shard=max(1, _SHARD_BYTES // (length * k * _ENTRY_BYTES)),
    )
    batches = [
        (shard, part)
        for shard, of_shard in enumerate(rows.split(index.rows_per_shard))
        for part in of_shard.split(batch_size)
    ]
    with atomic_directory(directory, "write the cache again") as written:
        parts: list[dict[str, torch.Tensor]] = []
        dtype = stored_dtype(teacher_model)

        def keep(batch: int, logits: torch.Tensor) -> None:
            shard, _ = batches[batch]
            parts.append(_top(logits.to(dtype), k, temperature))
            if batch + 1 == len(batches) or batches[batch + 1][0] != shard:
                tensors = {key: torch.cat([part[key] for part in parts]) for key in parts[0]}
                save_file(tensors, written / index.shards[shard])
                parts.clear()

        run_batches(
            teacher_model,
            [{"input_ids": part} for _, part in batches],
            None,
            "Keeping the teacher's logits",
            quantized=True,
            on_logits=keep,
        )
        # Last, so that a directory with it is complete.
        (written / _INDEX).write_text(index.model_dump_json(indent=2) + "\n", encoding="utf-8")
    return LogitCache(Path(directory), index)


def open_cache(
    directory: str | Path, rows: torch.Tensor, teacher: str | Path, temperature: float | None = None
) -> LogitCache:
    """A cache that was written before.

    :param rows: the rows it must be of
    :param teacher: directory of the model it must be of
    :param temperature: of the loss that it is for; None: any
    :raises ValueError: it is not a cache or not complete, of other rows, another teacher or another temperature
    """
    directory = Path(directory)
    index = _read_index(directory)
    place = f"cache {str(directory)!r}"
    if index.rows_digest != rows_digest(rows):
        raise ValueError(
            f"{place} was written for other text: {index.rows} rows of {index.length} tokens; here are "
            f"{tuple(rows.shape)}. {_rewrite(directory)}"
        )
    if index.teacher != fingerprint(teacher):
        raise ValueError(
            f"{place} was written by another teacher than {str(teacher)!r}. {_rewrite(directory)}"
        )
    if temperature is not None and index.temperature != temperature:
        raise ValueError(
            f"{place} was written for temperature {index.temperature}, not {temperature}. {_rewrite(directory)}"
        )
    missing = [name for name in index.shards if not (directory / name).is_file()]
    if missing:
        raise ValueError(
            f"{place} lacks {len(missing)} of its {len(index.shards)} files, {missing[0]} for one. "
            f"{_rewrite(directory)}"
        )
    return LogitCache(directory, index)


def _read_index(directory: Path) -> _Index:
    path = directory / _INDEX
    try:
        return _Index.model_validate_json(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ValueError(f"cache {str(directory)!r} has no {_INDEX}: no cache was written there.") from error
    except (OSError, UnicodeDecodeError, ValidationError) as error:
        raise ValueError(
            f"cache: {str(path)!r} cannot be read ({' '.join(str(error).split())}); {_rewrite(directory)}"
        ) from error


def _rewrite(directory: Path) -> str:
    return f"Remove {str(directory)!r} to have it written again, or name another directory."


def _top(logits: torch.Tensor, k: int, temperature: float) -> dict[str, torch.Tensor]:
    highest = logits.topk(k, dim=-1)
    normalizer = torch.stack([(row.float() / temperature).logsumexp(dim=-1) for row in logits])
    return {
        "values": highest.values.cpu(),
        "indices": highest.indices.int().cpu(),
        "log_normalizer": normalizer.cpu(),
    }
