"""Radial Attention (arXiv 2506.19852): tokens of a video see less of frames that are further away.

With d the distance of two frames of t tokens and P2(x) the largest power of two up to x,

    "released"  in blocks: the places within max(decay P2(t) / P2(d), block) of each other, for
                every distance where that reaches 128 and for every (128 P2(d) / P2(t))-th beyond;
                a block is kept if it is dense enough (`attnopt.kernels.block_maps`). This is what
                the published times are of. With `sink` the first frame is seen by all (its Wan
                models; the HunyuanVideo models have none)
    "paper"     Eq. 4, token by token: P2(d) <= t and |k - l| + 1 <= t / P2(d), or k = l where d is
                a multiple of ceil(P2(d) / t), and the first frame for all

Tokens after the video, such as a text, see everything and are seen by all. Not exact: the authors
keep the first layer and the first steps of a diffusion dense; here `path` says which sites it is
for.
"""

from __future__ import annotations

import json
from typing import Literal

from attnopt.errors import OptionError
from attnopt.ir import expr as E
from attnopt.ir.expr import Expr
from attnopt.ir.mask import BlockMap, Mask, Where
from attnopt.passes.rules.reductions import square, whole
from attnopt.rules import Approximation, BlockTable, Decline, Region

_SLOT = "radial_blocks"


class Radial(Approximation):
    """Radial attention for `frames` frames of `tokens` tokens each; see the module for the rest."""

    name = "radial"
    recognizes = "self-attention over frames of a video, by request"

    def __init__(self, frames: int, tokens: int, *, decay: float = 1.0, sink: bool = False,
                 block: int = 128, definition: Literal["released", "paper"] = "released",
                 path: str = "*") -> None:
        self.frames, self.tokens = whole("frames", frames), whole("tokens", tokens)
        self.decay, self.sink, self.block = float(decay), bool(sink), whole("block", block)
        self.definition, self.path = definition, path
        if definition not in ("released", "paper"):
            raise OptionError(f"definition must be 'released' or 'paper', got {definition!r}")
        if not 0 < self.decay < float("inf"):
            raise OptionError(f"decay must be a positive number, got {decay!r}")

    def reduce(self, region: Region) -> tuple[Mask, dict[str, BlockTable]]:
        length = square(region)
        video = self.frames * self.tokens
        if not isinstance(length, int) or length < video:
            raise Decline(f"radial: there must be at least {self.frames} x {self.tokens} tokens, "
                          f"got {length}")
        if self.definition == "paper":
            return Where(self._paper(length)), {}
        text = json.dumps({"pattern": "radial", "frames": self.frames, "tokens": self.tokens,
                           "decay": self.decay, "sink": self.sink, "block": self.block})
        return BlockMap(_SLOT, self.block, self.block), {_SLOT: BlockTable(text)}

    def _paper(self, length: int) -> Expr:
        """Eq. 4 as index arithmetic, octave by octave of the distance of frames."""
        q, k, t = E.index("q"), E.index("k"), self.tokens
        frame_q, frame_k = q // t, k // t
        distance = E.call("abs", frame_q - frame_k)
        apart = E.call("abs", q % t - k % t)
        kept = frame_k.eq(0) | distance.eq(0)
        octave = 1
        while octave < self.frames:
            inside = (distance >= octave) & (distance < 2 * octave)
            if octave <= t:
                near = apart <= t // octave - 1
            else:
                near = apart.eq(0) & (distance % -(-octave // t)).eq(0)
            kept = kept | inside & near
            octave *= 2
        video = self.frames * t
        if length > video:
            kept = kept | (q >= video) | (k >= video)
        return kept
