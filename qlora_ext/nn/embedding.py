"""Embedding4bit: an embedding table packed in 4 bits."""

from __future__ import annotations

import torch
from torch import nn
from torch.compiler import is_compiling

from .. import ops
from ..checks import check_input
from ..tensor.config import FLOAT_DTYPES
from .packed import _Packed4bit


class Embedding4bit(_Packed4bit, nn.Embedding):
    """nn.Embedding with the table packed in 4 bits and frozen. int64 indices [...] -> [..., dim].

    The output has `dtype`, which .to(dtype) changes. padding_idx is kept, though a frozen table has
    no gradient for it to stop. The constructor packs N(0, 1) rows; on the meta device it allocates
    nothing and waits for a state dict.

    Args:
        num_embeddings, embedding_dim, padding_idx: as for nn.Embedding.
        config, device, dtype: as for Linear4bit.

    Raises:
        TypeError: as for Linear4bit.
        RuntimeError: an index is out of range, on the CPU. On a GPU the kernel traps, as
            nn.Embedding's does.
    """

    def __init__(
        self,
        num_embeddings,
        embedding_dim,
        padding_idx=None,
        *,
        config=None,
        device=None,
        dtype=None,
    ):
        nn.Module.__init__(self)
        dtype = torch.get_default_dtype() if dtype is None else dtype
        self._init_embedding(num_embeddings, embedding_dim, padding_idx, config, dtype)
        draft = torch.zeros(num_embeddings, embedding_dim, device=device, dtype=dtype)
        if draft.is_meta:
            self._set_empty("meta")
            return
        nn.init.normal_(draft)
        if self.padding_idx is not None:
            draft[self.padding_idx] = 0
        self._quantize(draft)

    def _init_embedding(self, num_embeddings, embedding_dim, padding_idx, config, dtype) -> None:
        if padding_idx is not None:
            if not -num_embeddings <= padding_idx < num_embeddings:
                raise ValueError(
                    f"Embedding4bit: padding_idx is {padding_idx}, want within "
                    f"num_embeddings = {num_embeddings}"
                )
            padding_idx %= num_embeddings
        self.num_embeddings = num_embeddings
        self.embedding_dim = embedding_dim
        self.padding_idx = padding_idx
        self.max_norm, self.norm_type = None, 2.0
        self.scale_grad_by_freq = self.sparse = False
        self._init_packed((num_embeddings, embedding_dim), config, dtype)

    @classmethod
    def from_embedding(cls, embedding: nn.Embedding, config=None):
        """Packs an nn.Embedding's table. A table on the meta device gives a module on meta.

        Raises:
            TypeError: embedding is not an nn.Embedding, has max_norm or is quantized already, or
                its table is not float32, float16 or bfloat16.
            RuntimeError: the table has a NaN or Inf; the error names its index.
        """
        name = cls.__name__
        if isinstance(embedding, _Packed4bit) or not isinstance(embedding, nn.Embedding):
            raise TypeError(
                f"{name}: embedding is a {type(embedding).__name__}, want an nn.Embedding with a "
                "dense table"
            )
        if embedding.max_norm is not None:
            raise TypeError(
                f"{name}: embedding.max_norm is {embedding.max_norm}, want None: it rewrites rows "
                "as they are read, and packed rows are frozen"
            )
        if embedding.weight.dtype not in FLOAT_DTYPES:
            raise TypeError(
                f"{name}: embedding.weight has dtype {embedding.weight.dtype}, want float32, "
                "float16 or bfloat16"
            )
        self = cls.__new__(cls)
        nn.Module.__init__(self)
        weight = embedding.weight.detach()
        N, K = weight.shape
        self._init_embedding(N, K, embedding.padding_idx, config, weight.dtype)
        if weight.is_meta:
            self._set_empty("meta")
        else:
            self._quantize(weight)
        return self.train(embedding.training)

    def forward(self, indices: torch.Tensor) -> torch.Tensor:
        """indices: int64 or int32 [...], in [0, num_embeddings) -> dtype [..., embedding_dim]."""
        if is_compiling():
            return ops.embedding_4bit(indices, self._w4(True), self.dtype)
        try:
            return ops.embedding_4bit(indices, self._w4(False), self.dtype)
        except Exception:
            check_input(type(self).__name__, indices=indices)
            raise

    def extra_repr(self) -> str:
        text = f"{self.num_embeddings}, {self.embedding_dim}"
        if self.padding_idx is not None:
            text += f", padding_idx={self.padding_idx}"
        return f"{text}, {self._describe()}"
