"""Runs a few ops of the package that a wheel installed in FOLDER, which must be on PYTHONPATH:
try_wheel.py FOLDER [CUDA]. With CUDA (12.8, say) torch pretends to be a build for that version: the
CUDA library must then stay off, with a warning that says why, and the CPU backend must work."""

import sys
import warnings
from pathlib import Path

import torch

folder, other_cuda = Path(sys.argv[1]).resolve(), (sys.argv[2:] or [None])[0]
if other_cuda:
    torch.version.cuda = other_cuda
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import qlora_ext
    from qlora_ext import _C

for module in (qlora_ext, _C):
    assert folder in Path(module.__file__).resolve().parents, f"{module} is not in {folder}"
info = qlora_ext.build_info()
said = [str(w.message) for w in caught if str(w.message).startswith("qlora_ext")]
if other_cuda:
    want = f"was built for CUDA {_C.cuda_version}, want CUDA {other_cuda}"
    assert info["cuda_built"] and not info["cuda_live"] and want in info["cuda_why_not"], info
    assert len(said) == 1 and want in said[0], said
    print(said[0])
else:
    assert info["cuda_live"] == (info["cuda_built"] and torch.version.cuda is not None), info
    assert not said, said
    print(*(f"{key}: {value}" for key, value in info.items()), sep="\n")

torch.manual_seed(0)
q = qlora_ext.quantize_4bit(torch.randn(64, 128))
W = qlora_ext.dequantize_4bit(q)
x = torch.randn(3, 128, requires_grad=True)
y = qlora_ext.linear_4bit(x, q)
y.sum().backward()
A, B = torch.randn(4, 128), torch.randn(64, 4)
for got, expected in (
    (y, x @ W.T),
    (x.grad, W.sum(0).expand(3, -1)),
    (qlora_ext.lora_linear_4bit(x, q, A, B, 0.5), x @ (W + 0.5 * B @ A).T),
):
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)
print(f"a few ops under torch {torch.__version__}, CUDA {torch.version.cuda}: right")
