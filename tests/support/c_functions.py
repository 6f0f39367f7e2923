"""bitsandbytes' C functions of our CUDA library, the emulated or the real one, on tensors."""

import ctypes as ct

import torch

from qlora_ext.build_info import cuda_library
from qlora_ext.integrations.bitsandbytes_functions import functions

NAMES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}
_GUARD = 8  # elements before and after each result, which no call may touch


class CFunctions:
    def __init__(self, ops, device="cpu"):
        """ops: the emulated machine, or anything with device="cuda"."""
        self.device = device
        self.call = functions(cuda_library() if device == "cuda" else ct.CDLL(str(ops.path)))

    def _result(self, numel, dtype, function, before, after):
        """What function(*before, out, *after, stream) puts into memory for `numel` elements."""
        buffer = torch.full((numel + 2 * _GUARD,), -123.0, dtype=dtype, device=self.device)
        address = buffer.data_ptr() + _GUARD * buffer.element_size()
        cuda = self.device == "cuda"
        stream = torch.cuda.current_stream().cuda_stream if cuda else None
        function(*before, address, *after, stream)
        assert (buffer[:_GUARD] == -123).all() and (buffer[_GUARD + numel :] == -123).all()
        return buffer[_GUARD : _GUARD + numel]

    def dequantize(self, quant_type, dtype, packed, absmax, blocksize, n):
        """[n], dtype."""
        function = self.call[f"cdequantize_blockwise_{NAMES[dtype]}_{quant_type}"]
        before = None, packed.data_ptr(), absmax.data_ptr()
        return self._result(n, dtype, function, before, (blocksize, n))

    def gemm(self, x, packed, absmax, table, m, blocksize):
        """[m], x's dtype; called with the arguments that bitsandbytes' own gemv_4bit gives."""
        function, k = self.call[f"cgemm_4bit_inference_naive_{NAMES[x.dtype]}"], x.numel()
        before = m, 1, k, *(t.data_ptr() for t in (x, packed, absmax, table))
        return self._result(m, x.dtype, function, before, (m, (k + 1) // 2, m, blocksize))
