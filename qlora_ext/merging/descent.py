"""Finds packed weights whose layer outputs are nearest to those of a target weight.

With H = X^T X / n over a layer's inputs X [n, K], replacing W by a packed weight Wq [N, K] changes
the layer's output by tr((Wq - W) H (Wq - W)^T) per input. Rounding each weight by itself ignores H.
`fit_4bit` lowers this sum by coordinate descent over the stored values: the 16 levels of each
weight's code, and the scale of each block, which double quantization restricts to 256 values.

The descent starts at weights without the adapter's change, and stops when no single step of a code
or scale helps. By then a quarter of the change is still missing. Pushes correct that: they move the
target further in the change's direction, by the part that is missing, like the multiplier of a
constraint.

Source: the objective is GPTQ's (arXiv 2210.17323), the coordinate descent CDQuant's
(arXiv 2406.17542).
All tensors are kept transposed, [K, N]. A step changes one input column of all rows, and transposed
that column is one contiguous vector.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from ..ops import _C
from ..tensor.quantized import QuantizedTensor, view_matrix

_COLUMNS = 64  # columns between two updates of the whole gradient
_PUSH = 2.0  # times the missing part, because about half of a push arrives


def hessian_error(weight: Tensor, target: Tensor, hessian: Tensor) -> float:
    """tr((weight - target) H (weight - target)^T), with products in fp32 and their sum in fp64.

    weight, target [N, K] of any float dtype; hessian [K, K] fp32.
    """
    E = weight.float() - target.float()
    return ((E @ hessian) * E).sum(dtype=torch.float64).item()


def damped(hessian: Tensor, damping: float) -> Tensor:
    """H + damping * mean(diag H) * I in fp32; the identity if H is zero (no input was seen)."""
    H = hessian.to(torch.float32, copy=True)
    mean = H.diagonal().mean()
    if not mean > 0:
        return torch.eye(len(H), device=H.device)
    H.diagonal().add_(damping * mean)
    return H


class _Scales:
    """The block scales of one packed [N, K] weight: their values, and the values they may take."""

    def __init__(self, q: QuantizedTensor):
        self.q = q
        K = q.shape[1]
        self.blocksize = q.blocksize or max(q.numel(), 1)
        self.regular = K % self.blocksize == 0  # every block is within one row
        if q.nested is None:
            self.codes = None
            self.values = q.absmax.clone().view(torch.float32)
            return
        self.map = torch.tensor(_C.dynamic_map(), device=q.device)
        self.cuts = (self.map[1:] + self.map[:-1]) / 2
        self.codes = q.absmax.reshape(-1).long()
        nested = q.nested.clone().view(torch.float32)
        self.offset, self.absmax2 = nested[0], nested[1:]
        self.values = self.decode(self.codes, torch.arange(len(self.codes), device=q.device))

    def decode(self, codes: Tensor, blocks: Tensor) -> Tensor:
        return self.map[codes] * self.absmax2[blocks >> 8] + self.offset

    def move(self, blocks: Tensor, wanted: Tensor) -> None:
        """values[blocks] = wanted, or the nearest values that double quantization can store."""
        if self.codes is None:
            self.values[blocks] = wanted
            return
        z = (wanted - self.offset) / self.absmax2[blocks >> 8]
        # If absmax2 is zero, every code means the offset.
        self.codes[blocks] = torch.bucketize(z.nan_to_num(0.0), self.cuts)
        self.values[blocks] = self.decode(self.codes[blocks], blocks)

    def stored(self, packed: Tensor) -> QuantizedTensor:
        """The weight with these scales and the given codes."""
        if self.codes is None:
            absmax = self.values.view(torch.uint8)
        else:
            absmax = self.codes.to(torch.uint8)
        return dataclasses.replace(self.q, packed=packed, absmax=absmax)

    def phases(self) -> list[tuple[Tensor, slice]]:
        """Sets of blocks without two in the same row, and the columns that they cover."""
        K = self.q.shape[1]
        blocks = torch.arange(len(self.values), device=self.q.device)
        if self.regular:
            m, width = K // self.blocksize, self.blocksize
            return [(blocks[t::m], slice(t * width, (t + 1) * width)) for t in range(m)]
        # Blocks m apart start at least K + blocksize weights apart, so they share no row.
        m = min(-(-K // self.blocksize) + 1, len(blocks))
        return [(blocks[t::m], slice(0, K)) for t in range(m)]

    def block_of(self, columns: slice) -> Tensor:
        """The block of every weight in these columns, [columns, N]."""
        N, K = self.q.shape
        device = self.q.device
        k = torch.arange(K, device=device)[columns, None]
        return (torch.arange(N, device=device) * K + k) // self.blocksize

    def rows(self, columns: slice) -> Tensor:
        """The scale of every weight in these columns, [columns, N]."""
        N, K = self.q.shape
        if self.regular:
            m, bs = K // self.blocksize, self.blocksize
            k = torch.arange(K, device=self.q.device)[columns]
            return self.values.view(N, m).T.index_select(0, k // bs)
        return self.values[self.block_of(columns)]


class _Part:
    """One packed weight of a fit: its rows among the rows of all weights, and its scales."""

    def __init__(self, q: QuantizedTensor, start: int):
        self.q = q
        self.pushed = 0.0  # how far the target was moved, in multiples of the change
        self.rows = slice(start, start + q.shape[0])
        self.scales = _Scales(q)
        self.mean = None if q.mean is None else q.mean.clone().view(torch.float32)

    def means(self, columns: slice) -> Tensor | None:
        """The mean of every weight in these columns, [columns, rows]."""
        return None if self.mean is None else self.mean[self.scales.block_of(columns)]


class _Fit:
    """The state of a descent: packed weights that share a layer input, side by side.

    W: the decoded weights, fp32 [K, N]; G: the gradient H (W - target)^T, fp32 [K, N]; rank: the
    place of each weight's level among the sorted levels, uint8 [K, N]. N counts the rows of all
    weights. changes: for `push`, the parts [N_i, K] of the targets that must arrive in full.
    """

    def __init__(
        self,
        weights: Sequence[QuantizedTensor],
        targets: Sequence[Tensor],
        H: Tensor,
        changes: Sequence[Tensor] | None = None,
    ):
        self.H = H
        self.changes = [change.float().T for change in changes or ()]
        self.parts = []
        for q in weights:
            self.parts.append(_Part(q, self.parts[-1].rows.stop if self.parts else 0))
        device = H.device
        levels = torch.tensor(weights[0].values, device=device)
        self.levels, self.code_of_rank = levels.sort(stable=True)
        self.cuts = (self.levels[1:] + self.levels[:-1]) / 2
        rank_of_code = torch.empty_like(self.code_of_rank)
        rank_of_code[self.code_of_rank] = torch.arange(16, device=device)
        ranks = [rank_of_code[_unpack(q)].view(*q.shape).T for q in weights]
        self.rank = torch.cat([rank.to(torch.uint8) for rank in ranks], 1)
        K = len(H)
        self.W = torch.cat([self.decode(part, slice(0, K)) for part in self.parts], 1)
        self.G = H @ (self.W - torch.cat([target.float().T for target in targets], 1))

    def decode(self, part: _Part, columns: slice) -> Tensor:
        """The values of these columns of a weight, computed as in dequantize_4bit."""
        values = self.levels[self.rank[columns, part.rows].long()] * part.scales.rows(columns)
        means = part.means(columns)
        return values if means is None else values + means

    def sweep_codes(self) -> None:
        """Gives each weight the best level while all others stay, column after column."""
        K = len(self.H)
        step = 1 / self.H.diagonal()
        for k0 in range(0, K, _COLUMNS):
            columns = slice(k0, min(k0 + _COLUMNS, K))
            S = torch.cat([part.scales.rows(columns) for part in self.parts], 1)
            inverse = 1 / S
            means = [part.means(columns) for part in self.parts]
            mean = None if means[0] is None else torch.cat(means, 1)
            G, W, H = self.G[columns], self.W[columns], self.H[columns, columns]
            change = torch.empty_like(W)
            for j in range(len(W)):
                best = torch.addcmul(W[j], G[j], step[k0 + j], value=-1)
                if mean is not None:
                    best -= mean[j]
                # A scale of zero makes this NaN or infinite; then any level is as good.
                rank = torch.bucketize(best.mul_(inverse[j]), self.cuts)
                new = self.levels.index_select(0, rank).mul_(S[j])
                if mean is not None:
                    new += mean[j]
                torch.sub(new, W[j], out=change[j])
                W[j] = new
                self.rank[k0 + j] = rank
                G.addr_(H[:, j], change[j])
            for rest in (slice(0, columns.start), slice(columns.stop, K)):
                if rest.start < rest.stop:
                    self.G[rest].addmm_(self.H[rest, columns], change)

    def sweep_scales(self) -> None:
        """Moves each block's scale to its best value while all else stays. With D the block's
        levels, it moves by -<D, G> / <D, H D>."""
        for part in self.parts:
            for blocks, columns in part.scales.phases():
                self._move_scales(part, blocks, columns)

    def _move_scales(self, part: _Part, blocks: Tensor, columns: slice) -> None:
        scales = part.scales
        D = self.levels[self.rank[columns, part.rows].long()]
        G = self.G[columns, part.rows]
        if scales.regular:
            slope = (D * G).sum(0)
            bend = (D * (self.H[columns, columns] @ D)).sum(0)
        else:
            owner = scales.block_of(columns)
            mine = torch.zeros(len(scales.values), dtype=torch.bool, device=D.device)
            mine[blocks] = True
            D = D * mine[owner]
            sums = D.new_zeros(2, len(scales.values))
            sums[0].index_add_(0, owner.reshape(-1), (D * G).reshape(-1))
            sums[1].index_add_(0, owner.reshape(-1), (D * (self.H @ D)).reshape(-1))
            slope, bend = sums[:, blocks]
        now = scales.values[blocks]
        # A block whose levels are all zero has no best scale, so it keeps its own.
        scales.move(blocks, torch.where(bend > 0, now - slope / bend, now))
        new = self.decode(part, columns)
        self.G[:, part.rows].addmm_(self.H[:, columns], new - self.W[columns, part.rows])
        self.W[columns, part.rows] = new

    def push(self) -> None:
        """Moves each target further along its change by _PUSH times the missing share, which is
        -<change, H (W - target)> / <change, H change> for the original target."""
        for part, change in zip(self.parts, self.changes, strict=False):  # changes may be empty
            G = self.G[:, part.rows]
            whole = (change * (self.H @ change)).sum().item()
            if whole > 0:
                missing = -(change * G).sum().item() / whole - part.pushed
                G.addmm_(self.H, change, alpha=-_PUSH * missing)
                part.pushed += _PUSH * missing

    def packed(self) -> list[QuantizedTensor]:
        """The weights as they are now."""
        return [part.scales.stored(self._pack(part)) for part in self.parts]

    def _pack(self, part: _Part) -> Tensor:
        codes = self.code_of_rank[self.rank[:, part.rows].T.reshape(-1).long()].to(torch.uint8)
        if codes.numel() % 2:
            codes = torch.cat([codes, codes.new_zeros(1)])  # fills the last byte
        return view_matrix((codes[0::2] << 4) | codes[1::2], part.q.shape)


def _unpack(q: QuantizedTensor) -> Tensor:
    """The code of every weight, int64 [numel]."""
    packed = q.packed.reshape(-1)
    return torch.stack([packed >> 4, packed & 15], 1).reshape(-1)[: q.numel()].long()


def fit_4bit(
    weights: Sequence[QuantizedTensor],
    targets: Sequence[Tensor],
    hessian: Tensor,
    *,
    changes: Sequence[Tensor] | None = None,
    damping: float = 0.01,
    sweeps: str = "sccpscpscps",
    fit_scales: bool = True,
) -> list[QuantizedTensor]:
    """Moves codes and scales of packed weights so that the layers' outputs come nearest to those of
    the targets W. No sweep raises tr((Wq - W) H (Wq - W)^T), up to rounding of fp32 sums.

    Args:
        weights: matrices [N_i, K] with one codebook, where the descent starts. Layers that share an
            input share H; fitting them together is faster.
        targets: dense [N_i, K], any float dtype.
        hessian: X^T X / n, [K, K], symmetric, of the inputs X [n, K]; zeros count as the identity.
        changes: dense [N_i, K], the part of each target that an adapter adds. It must arrive in
            full, so a push adds to the target what is still missing. Without changes, pushes do
            nothing.
        damping: the diagonal of H is raised by this times its mean. It keeps weights near their
            target if the calibration text did not vary their inputs.
        sweeps: the order of work: "c" sweeps over the codes, "s" over the scales, and "p" pushes
            the changes.
        fit_scales: whether scales may move; False leaves out "s".

    Returns:
        New QuantizedTensors of the same format. Offset and absmax2 of double-quantized scales stay.
        Each sweep takes O(N K^2) work. Memory: three fp32 copies of the weights (four with
        changes) and two of H.

    Raises:
        ValueError: weights is empty, shapes do not fit each other, or codebooks differ.
    """
    K = hessian.shape[-1]
    for name, dense in (("targets", targets), ("changes", changes)):
        if dense is None:
            continue
        if not weights or len(weights) != len(dense):
            raise ValueError(
                f"fit_4bit: weights has {len(weights)} entries and {name} has {len(dense)}, want "
                "the same number in both, at least one"
            )
        for q, matrix in zip(weights, dense, strict=True):
            if tuple(q.shape) != tuple(matrix.shape) or q.shape[-1] != K or len(q.shape) != 2:
                raise ValueError(
                    f"fit_4bit: weights has shape {list(q.shape)} and {name} "
                    f"{list(matrix.shape)}, want [N, {K}] for both (hessian is "
                    f"{list(hessian.shape)})"
                )
    for q in weights:
        if q.values != weights[0].values or (q.mean is None) != (weights[0].mean is None):
            raise ValueError(
                "fit_4bit: weights differ in codebook or normalization, want the same for all"
            )
    with torch.no_grad():
        fit = _Fit(weights, targets, damped(hessian, damping), changes)
        steps = {"c": fit.sweep_codes, "s": fit.sweep_scales, "p": fit.push}
        for step in sweeps:
            if step != "s" or fit_scales:
                steps[step]()
        return fit.packed()
