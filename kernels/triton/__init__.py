"""Spec -> Triton source: readable files in the user's cache, launched with the tile of a Schedule.

    reasons(spec, ...)       why generated Triton does not compute a Spec; empty where it does
    bind(spec, schedule)     the function of their text forms, which hands on to ATen what it must
    Attention(spec, tile)    the kernels alone: None where a call is not for them
    tiles, resources         legal tiles of a device, and what a compiled kernel takes of it

One template (`template.py`, `backward.py`) serves every NVIDIA GPU from sm_80 on and AMD's CDNA:
pointers there, tensor descriptors from sm_90 on. Masks without an interval rule have lists of tiles
(`lists.py`), masks on a grid tiles that are boxes of it (`boxes.py`). Triton itself is imported at
the first launch.
"""

from __future__ import annotations

from attnopt.kernels.triton import resources, tiles
from attnopt.kernels.triton.attention import LOWERING, Attention, bind
from attnopt.kernels.triton.declines import available, reasons
from attnopt.kernels.triton.tiles import Tile

__all__ = ["LOWERING", "Attention", "Tile", "available", "bind", "reasons", "resources", "tiles"]
