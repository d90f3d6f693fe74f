"""The steps in which transformers loads a compressed-tensors checkpoint."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

from compressed_tensors.compressors import ModelCompressor
from torch import nn
from transformers import PreTrainedModel
from transformers.core_model_loading import WeightTransform
from transformers.quantizers.quantizer_compressed_tensors import CompressedTensorsHfQuantizer

__all__ = ["needs_no_initialization", "prepared_before_weights"]

Prepare = Callable[[PreTrainedModel, ModelCompressor, list[str]], list[WeightTransform] | None]


@contextlib.contextmanager
def prepared_before_weights(
    prepare: Prepare,
    is_obsolete: Callable[[WeightTransform], bool],
    narrowed: Callable[[WeightTransform], WeightTransform],
) -> Iterator[None]:
    """Context in which a model is changed before its compressed weights are read.

    transformers decompresses the experts of a checkpoint while it stacks them, and knows one scheme for all
    of them. It has no hook before its quantizer lays out the modules that receive the tensors.

    :param prepare: from the model (on the meta device), what decompresses it (its quantization config may be
        changed) and the checkpoint's files to the conversions that are needed now, or None if the model stays as
        it is
    :param is_obsolete: whether a conversion of the family no longer applies to a changed model
    :param narrowed: what one that does apply is there
    """
    before = CompressedTensorsHfQuantizer._process_model_before_weight_loading
    convert = CompressedTensorsHfQuantizer.update_weight_conversions

    @functools.wraps(before)
    def process(self: CompressedTensorsHfQuantizer, model: PreTrainedModel, **kwargs: Any) -> None:
        files = kwargs.get("checkpoint_files") or []
        self._needed_conversions = prepare(model, self.compressor, files)
        before(self, model, **kwargs)

    @functools.wraps(convert)
    def update(
        self: CompressedTensorsHfQuantizer, conversions: list[WeightTransform]
    ) -> list[WeightTransform]:
        if self._needed_conversions is None:
            return convert(self, conversions)
        kept = [conversion for conversion in conversions if not is_obsolete(conversion)]
        # The quantizer takes every conversion that speaks of experts for one that stacks them.
        converted = [
            narrowed(conversion) if any(conversion is own for own in kept) else conversion
            for conversion in convert(self, kept)
        ]
        return converted + self._needed_conversions

    CompressedTensorsHfQuantizer._process_model_before_weight_loading = process
    CompressedTensorsHfQuantizer.update_weight_conversions = update
    # Inherited; it splits Llama 4's experts by the config's one count for all layers.
    CompressedTensorsHfQuantizer._convert_model_for_quantization = lambda self, model: None
    try:
        yield
    finally:
        del CompressedTensorsHfQuantizer._convert_model_for_quantization
        CompressedTensorsHfQuantizer._process_model_before_weight_loading = before
        CompressedTensorsHfQuantizer.update_weight_conversions = convert


def needs_no_initialization(module: nn.Module) -> None:
    """Keep transformers from initializing a module, but not its children.

    Some families initialize fused experts from the module around them, which fails where they are gone.
    """
    module._is_hf_initialized = True
