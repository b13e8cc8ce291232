"""Density and picture of a site's mask for the report, at the lengths of the example inputs.

The tiles are those of the chosen schedule, or small ones. What an input of the user may hide is not
known and counts as kept; tables of the model's own buffers are looked up.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor

from attnopt import kernels
from attnopt.ir.density import counting_boxes, known_part
from attnopt.ir.mask import ALL
from attnopt.ir.mask_picture import Picture, picture
from attnopt.ir.site import SiteRecord
from attnopt.ir.spec import Schedule, Spec
from attnopt.ir.tiling import GridTile, Tiling
from attnopt.passes.analyze.by_value import Values
from attnopt.passes.canonical import Canonical, Recipe
from attnopt.passes.canonical import Tensor as Operand
from attnopt.passes.lengths import example_shapes
from attnopt.passes.recognize.axes import resolve, settle
from attnopt.rules import Match

log = logging.getLogger("attnopt.passes")
#: scores that may be asked one by one for one site
MOST = 1 << 24


def depict(record: SiteRecord, canonical: Canonical, match: Match, values: Values) -> None:
    """Fill in what the report says of the mask of a site that is computed by `match`."""
    spec = match.spec
    if spec.mask == ALL:
        record.density = None if record.mask else 1.0
        return
    try:
        drawing = _draw(canonical, spec, match.schedule, values)
    except (LookupError, RuntimeError, ValueError):  # a picture is no reason to fail
        log.info("no picture of %s", spec.mask, exc_info=True)
        return
    if drawing is not None:
        record.density, record.tile_density = drawing.density, drawing.tile_density
        record.picture = drawing.compact()


def _draw(canonical: Canonical, spec: Spec, schedule: Schedule, values: Values) -> Picture | None:
    query, key, value = example_shapes(canonical)
    leading = torch.broadcast_shapes(query[:-2], key[:-2], value[:-2])
    tables = mask_tables(canonical, spec, query[-2], key[-2], values)
    if known_part(spec.mask, set(tables)) == ALL:
        return None  # all of it is known at run time alone
    return picture(spec.mask, query[-2], key[-2], tile=_tiles(spec, schedule, query[-2], key[-2]),
                   leading=tuple(leading), operands=tables, most=MOST)


def _tiles(spec: Spec, schedule: Schedule, queries: int, keys: int,
           ) -> tuple[Tiling, Tiling] | None:
    """Rows and keys of a generated kernel's tile, or its box of a grid; None for any."""
    if schedule.lowering not in ("cpp", "triton") or len(schedule.tile) < 2:
        return None
    box = schedule.tile[4:] if schedule.lowering == "cpp" else ()
    if not box:
        return schedule.tile[0], schedule.tile[1]
    grid = counting_boxes(spec.mask, queries, keys)
    if grid is None or len(grid.length) != len(box):
        return None
    tile = GridTile(grid.length, tuple(box))
    return tile, tile


def mask_tables(canonical: Canonical, spec: Spec, queries: int, keys: int, values: Values,
                ) -> dict[str, Tensor]:
    """Operands of the mask that depend on no input, by slot."""
    tables: dict[str, Tensor] = {}
    for slot in spec.mask.slots & canonical.operands.keys():
        made = canonical.operands[slot].recipe
        try:
            table = static(made, queries, keys) if made is not None else _table(
                canonical.operands[slot], spec.operand(slot).axes, values)
        except (LookupError, RuntimeError, ValueError):  # nobody depends on it
            log.info("no value of %s of %s", slot, spec.mask, exc_info=True)
            continue
        if table is not None:
            tables[slot] = table
    return tables


def static(recipe: Recipe, queries: int, keys: int) -> Tensor | None:
    """A table of blocks that depends on positions alone."""
    if recipe.op is not torch.ops.attnopt.block_map.default:
        return None
    try:
        return kernels.block_maps.block_map([], [queries, keys], recipe.text)
    except (KeyError, TypeError, ValueError):
        return None  # chosen at run time, or made by another recipe


def _table(operand: Operand, axes: Any, values: Values) -> Tensor | None:
    """The value of an operand that depends on no input, as the mask loads it."""
    try:
        found = values.evaluate(operand.node)
    except (LookupError, RuntimeError):
        return None
    return brought(found, operand, axes)


def brought(found: Tensor, operand: Operand, axes: Any) -> Tensor | None:
    """The value of an operand's node as the Spec loads it; `axes` is None for a table."""
    if axes is None:
        return found
    target, layout = [resolve(dim) for dim in operand.target], settle(operand.layout)
    order = [next((i for i, own in enumerate(layout) if own and own == dim), None)
             for dim in target]
    used = [i for i in order if i is not None]
    if len(used) != sum(1 for own in layout if own):
        return None
    rest = [i for i in range(len(layout)) if i not in used]
    shape = [1 if i is None else found.shape[i] for i in order]
    return found.permute(*used, *rest).reshape(shape)
