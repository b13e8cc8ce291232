"""How low the bias of a key may be before its weight is zero beside the best key of its row.

    key_floor([bias (*L, 1, K)], lengths, text) = max_k bias - margin        (*L, 1, 1)

A padding mask that adds -inf or a very low number to its keys hides them: with b the largest bias
of a row, weight_k <= exp(s_k - s_b - (b - bias_k)), which underflows to zero for any scores whose
differences stay below the margin. `bias >= floor` is then a mask that leaves out nothing but zeros.
A row whose keys are all that low keeps all of them, since its largest bias is as low, and NaN hides
every key, so that the row becomes NaN as it does for the author.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

#: differences of scores that leave a weight of zero; half precision has no lower numbers
MARGIN, HALF_MARGIN = 1e8, 32752.0


def margin(dtype: torch.dtype) -> float:
    """The margin for a bias of this dtype."""
    return HALF_MARGIN if dtype == torch.float16 else MARGIN


def key_floor(tensors: Sequence[Tensor], lengths: Sequence[int], text: str) -> Tensor:
    """The floor; see above. text: the margin; lengths have no use."""
    bias = tensors[0].detach()
    if not bias.shape[-1]:
        return bias.new_zeros((*bias.shape[:-1], 1))
    return bias.amax(-1, keepdim=True) - float(text)


_library = torch.library.Library("attnopt", "FRAGMENT")
_library.define("key_floor(Tensor[] tensors, SymInt[] lengths, str text) -> Tensor",
                tags=(torch.Tag.pt2_compliant_tag,))


def _fake(tensors: Sequence[Tensor], lengths: Sequence[int], text: str) -> Tensor:
    return tensors[0].new_empty((*tensors[0].shape[:-1], 1))


_library.impl("key_floor", key_floor, "CompositeExplicitAutograd")
torch.library.register_fake("attnopt::key_floor", _fake, lib=_library)
