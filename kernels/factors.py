"""Factors of a bias whose rank is known: what the rewritten graph makes in place of reading it.

    factor(Tensor[] tensors, SymInt[] lengths, str text) -> Tensor       (*L, Q, R) or (*L, K, R)

of the dense bias (*L, Q, K). An exact factorisation is a cross approximation: with R pivot rows I
and columns J found by complete pivoting,

    B = B[:, J] B[I, J]^-1 B[I, :]

holds for a matrix of rank R (Goreinov, Tyrtyshnikov & Zamarashkin 1997), and costs R rows and
columns of the bias a call instead of all of it. The text names the pivots, so that nothing but the
model's own tensor holds values. A row of the scores may be shifted, softmax does not see it: with
a shift, the bias is B - B[:, k0], whose rank is lower by one where all rows have a term of their
own. An approximate one has its numbers in the text. Arithmetic is float64, factors are float32.
"""

from __future__ import annotations

import base64
import functools
import json
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_library = torch.library.Library("attnopt", "FRAGMENT")
_library.define("factor(Tensor[] tensors, SymInt[] lengths, str text) -> Tensor",
                tags=(torch.Tag.pt2_compliant_tag,))

Pivots = tuple[tuple[int, ...], tuple[int, ...]]


@dataclass(frozen=True)
class Cross:
    """Pivot rows and columns for each leading entry; the column that is subtracted first, or None.
    """

    pivots: tuple[Pivots, ...]
    shift: int | None = None

    @property
    def rank(self) -> int:
        return max((len(rows) for rows, _ in self.pivots), default=0)

    def text(self, side: str) -> str:
        return json.dumps({"side": side, "pivots": self.pivots, "shift": self.shift},
                          separators=(",", ":"))


def numbers_text(factor: Tensor) -> str:
    """The text of a factor (*L, tokens, R) that is given by its numbers."""
    flat = factor.to("cpu", torch.float32).contiguous()
    packed = zlib.compress(flat.numpy().astype("<f4").tobytes(), 6)
    return json.dumps({"shape": list(flat.shape), "numbers": base64.b64encode(packed).decode()})


@functools.lru_cache(maxsize=64)
def _numbers(text: str) -> Tensor:
    body = json.loads(text)
    raw = bytearray(zlib.decompress(base64.b64decode(body["numbers"])))
    with torch.inference_mode(False):
        flat = torch.frombuffer(raw, dtype=torch.uint8).view(torch.float32) if raw else (
            torch.empty(0))
        return flat.reshape(body["shape"]).clone()


def cross(matrix: Tensor, most: int, tolerance: float) -> Pivots | None:
    """Pivots of a matrix (Q, K) in float64 whose rank is at most `most`; None where more is left
    than `tolerance` at any element."""
    rest = matrix.clone()
    rows: list[int] = []
    columns: list[int] = []
    while True:
        at = int(rest.abs().argmax()) if rest.numel() else 0
        i, j = divmod(at, max(rest.shape[1], 1))
        if not rest.numel() or float(rest[i, j].abs()) <= tolerance:
            return tuple(rows), tuple(columns)
        if len(rows) == most:
            return None
        rows.append(i)
        columns.append(j)
        rest.addr_(rest[:, j].clone(), rest[i] / rest[i, j], alpha=-1.0)


def shifted(bias: Tensor, shift: int | None) -> Tensor:
    """The bias in float64, rows shifted by their element in a column."""
    bias = bias.double()
    return bias if shift is None else bias - bias[..., shift : shift + 1]


def factors(bias: Tensor, found: Cross) -> tuple[Tensor, Tensor]:
    """Both factors (*L, Q, R), (*L, K, R) of a bias (*L, Q, K)."""
    return tuple(factor([bias], [], found.text(side)) for side in "qk")  # type: ignore[return-value]


def factor(tensors: Sequence[Tensor], lengths: Sequence[int], text: str) -> Tensor:
    """One factor of the bias that is the only tensor."""
    body = json.loads(text)
    bias = tensors[0]
    if "numbers" in body:
        return _numbers(text).to(bias.device, copy=True)
    flat = bias.reshape(-1, *bias.shape[-2:])
    pivots, shift = body["pivots"], body["shift"]
    tokens = bias.shape[-2 if body["side"] == "q" else -1]
    rank = max((len(rows) for rows, _ in pivots), default=0)
    out = bias.new_zeros((len(pivots), tokens, rank), dtype=torch.float32)
    for entry, (rows, columns) in enumerate(pivots):
        one = flat[entry]
        if not rows:
            continue
        own = one[rows].double()
        if shift is not None:
            own = own - own[:, shift : shift + 1]
        if body["side"] == "k":
            out[entry, :, : len(rows)] = own.mT
            continue
        across = one[:, columns].double()
        if shift is not None:
            across = across - one[:, shift : shift + 1].double()
        square = own[:, columns]
        out[entry, :, : len(rows)] = torch.linalg.solve(square, across, left=False)
    return out.view(*bias.shape[:-2], tokens, rank)


def _fake(tensors: Sequence[Tensor], lengths: Sequence[int], text: str) -> Tensor:
    body = json.loads(text)
    bias = tensors[0]
    if "numbers" in body:
        return bias.new_empty(body["shape"], dtype=torch.float32)
    rank = max((len(rows) for rows, _ in body["pivots"]), default=0)
    tokens = bias.shape[-2 if body["side"] == "q" else -1]
    return bias.new_empty((*bias.shape[:-2], tokens, rank), dtype=torch.float32)


_library.impl("factor", factor, "CompositeExplicitAutograd")
torch.library.register_fake("attnopt::factor", _fake, lib=_library)
