"""Sampling: what deformable attention computes, as a frozen value with a text form.

    out[b,q,h,:] = sum over points t of  weight[b,q,h,t] * sample(value of level l(t), location t)

(Deformable DETR, Zhu et al., ICLR 2021.) The value of a level is a grid of 1, 2 or 3 axes; a sample
is linear between its 2, 4 or 8 nearest texels, or the nearest one, as F.grid_sample has it. With a
depth distribution the texels have one more axis that is never built (DFA3D, Li et al., ICCV 2023):

    sample = sum over corners of  w_corner * s_corner * value[corner],
    s_corner = (1 - fz) * depth[corner, z0] + fz * depth[corner, z0 + 1]

which is the sample of the outer product of value and depth, exactly. What lies outside of the grid
or of the depths is 0, the border's or reflected.

Tensors, in the dtypes that they have:

    value      (B, S, H, C)       the texels of all levels one after another, rows first
    locations  (B, Q, H, T, R)    along R = axes of the grid, the fastest first: (x, y, z); with
                                  depth one more, the last
    weights    (B, Q, H, T)       the points of all levels one after another
    depth      (B, S, H or 1, D)  or None
    result     (B, Q, H, C)       in the dtype that value and weights promote to
    shapes     (L * axes)         sizes of the grids, slowest axis first
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

MODES = ("linear", "nearest")
PADDINGS = ("zeros", "border", "reflection")
#: of locations: 0 to 1, -1 to 1 (F.grid_sample's), or texels from the centre of the first
RANGES = ("unit", "signed", "texels")
NOT_FINITE = ("zero", "nan")


@dataclass(frozen=True)
class Sampling:
    """How to sample.

    points:        number of points of each level
    axes:          of a level's grid: 1, 2 or 3
    mode:          "linear" or "nearest" (a tie goes to the even texel)
    padding:       "zeros", "border" or "reflection" (about the centres of the outermost texels with
                   align_corners, else about their edges)
    align_corners: the ends of the range are the centres of the outermost texels, not their edges
    range:         of the locations: "unit", "signed" or "texels"
    not_finite:    a location that is NaN or infinite, with padding zeros and mode linear, gives
                   "zero" (as CUDA kernels do) or "nan" (as F.grid_sample does for two axes on a
                   CPU). With border, NaN is the first texel, an infinite one the border's; with
                   reflection both are the first texel.
    """

    points: tuple[int, ...]
    axes: int = 2
    mode: str = "linear"
    padding: str = "zeros"
    align_corners: bool = False
    range: str = "unit"
    not_finite: str = "zero"

    def __post_init__(self) -> None:
        object.__setattr__(self, "points", tuple(self.points))
        if not self.points or not all(isinstance(p, int) and p >= 0 for p in self.points):
            raise ValueError(f"points must be a number for each level, got {self.points}")
        if self.axes not in (1, 2, 3):
            raise ValueError(f"axes must be 1, 2 or 3, got {self.axes}")
        if not isinstance(self.align_corners, bool):
            raise ValueError(f"align_corners must be True or False, got {self.align_corners!r}")
        for name, known in (("mode", MODES), ("padding", PADDINGS), ("range", RANGES),
                            ("not_finite", NOT_FINITE)):
            if getattr(self, name) not in known:
                raise ValueError(
                    f"{name} must be one of {', '.join(known)}, got {getattr(self, name)!r}")

    def __str__(self) -> str:
        return json.dumps(asdict(self), separators=(",", ":"))

    @staticmethod
    @functools.lru_cache(maxsize=1024)
    def parse(text: str) -> Sampling:
        """The Sampling of a text; ValueError for one that is none."""
        try:
            body = json.loads(text)
            return Sampling(**{**body, "points": tuple(body["points"])})
        except (TypeError, KeyError, json.JSONDecodeError) as error:
            raise ValueError(f"sampling must be the text of a Sampling, got {text!r}") from error

    @property
    def levels(self) -> int:
        return len(self.points)

    def grids(self, shapes: Sequence[int]) -> list[tuple[int, ...]]:
        """The sizes of each level's grid."""
        if len(shapes) != self.levels * self.axes:
            raise ValueError(f"shapes must be {self.axes} sizes for each of {self.levels} levels, "
                             f"got {len(shapes)}")
        return [tuple(shapes[i * self.axes:(i + 1) * self.axes]) for i in range(self.levels)]

    def check(self, value: Any, locations: Any, weights: Any, depth: Any, shapes: Sequence[int]
              ) -> None:
        """Raise ValueError where shapes and dtypes do not go together."""
        grids = self.grids(shapes)
        _is("value", value, 4, "(B, S, H, C)")
        _is("locations", locations, 5, "(B, Q, H, T, R)")
        b, s, h, _ = value.shape
        texels = sum(math.prod(grid) for grid in grids)
        if s != texels:
            raise ValueError(f"value must have {texels} texels, the levels' together, got {s}")
        rank, q = self.axes + (depth is not None), locations.shape[1]
        want = (b, q, h, sum(self.points), rank)
        if tuple(locations.shape) != want:
            raise ValueError(f"locations must be of shape {want}, got {tuple(locations.shape)}")
        if tuple(weights.shape) != want[:-1]:
            raise ValueError(f"weights must be of shape {want[:-1]}, got {tuple(weights.shape)}")
        if depth is not None:
            _is("depth", depth, 4, "(B, S, H or 1, D)")
            if tuple(depth.shape[:2]) != (b, s) or depth.shape[2] not in (1, h):
                raise ValueError(f"depth must be of shape ({b}, {s}, {h} or 1, D), got "
                                 f"{tuple(depth.shape)}")
        for name, tensor in (("value", value), ("locations", locations), ("weights", weights),
                             ("depth", depth)):
            if tensor is not None and not tensor.dtype.is_floating_point:
                raise ValueError(f"{name} must be floating, got {tensor.dtype}")
            if tensor is not None and tensor.device != value.device:
                raise ValueError(
                    f"{name} must be on {value.device}, where value is, got {tensor.device}")


def _is(name: str, tensor: Any, dims: int, form: str) -> None:
    if tensor.dim() != dims:
        raise ValueError(f"{name} must be {form}, got {tuple(tensor.shape)}")
