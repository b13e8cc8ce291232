"""Sink and window: a row keeps the first few keys and the nearest ones before it.

    keep(q, k) = k <= q and (q - k < window or k < sink)

As a mask on the model's own positions (StreamingLLM, arXiv 2309.17453, keeps such keys in its
cache, and there numbers them anew, which no mask can say). Not exact: for a causal model that was
trained with all keys, or in the manner of SinkLoRA (arXiv 2406.05678).
"""

from __future__ import annotations

from attnopt.errors import OptionError
from attnopt.ir import expr as E
from attnopt.ir.mask import Band, Mask, Prefix
from attnopt.passes.rules.reductions import causal, whole
from attnopt.rules import Approximation, BlockTable, Region


class SinkWindow(Approximation):
    """Causal attention to `sink` first keys and a window of `window` keys, the row's own included.

    path: pattern of the module paths that it is for.
    """

    name = "sink-window"
    recognizes = "causal self-attention, by request: the first keys and a window"

    def __init__(self, window: int, sink: int = 4, path: str = "*") -> None:
        self.window, self.sink, self.path = whole("window", window), sink, path
        if isinstance(sink, bool) or not isinstance(sink, int) or sink < 0:
            raise OptionError(f"sink must be a number of 0 or more, got {sink!r}")

    def reduce(self, region: Region) -> tuple[Mask, dict[str, BlockTable]]:
        causal(region)
        near: Mask = Band(E.const(1 - self.window), E.const(0))
        return (near | Prefix(E.const(self.sink)) if self.sink else near), {}
