"""Linear sampling by index: the four texels around a place times their shares, and near misses.

Functions of value, locations and weights as in `sampling_spellings`; a sample of a level is a
function of a map (N, C, h, w) and of x and y (N, Q, P) in texels with a result (N, C, Q, P).
"""

from __future__ import annotations

import torch
from torch.nn import functional as F

from tests.spellings.sampling_spellings import (
    GRIDS,
    Spelling,
    by_head,
    grids,
    maps,
    queries_first,
)


def places(locations):
    """x and y of each level, in texels."""
    for at, (h, w) in zip(grids(locations), GRIDS, strict=True):
        yield ((at[..., 0] + 1) * w - 1) / 2, ((at[..., 1] + 1) * h - 1) / 2


def summed(value, locations, weights, sample):
    parts = [sample(v, x, y) for v, (x, y) in zip(maps(value), places(locations), strict=True)]
    return queries_first((torch.stack(parts, -2).flatten(-2) * by_head(weights)).sum(-1))


def gathered(flat, place):
    """(N, C, S) at (N, Q, P)"""
    at = place.flatten(1).unsqueeze(1).expand(-1, flat.shape[1], -1)
    return torch.gather(flat, 2, at).view(*flat.shape[:2], *place.shape[1:])


def padded(v, x, y, fill=0.0, mode="constant", wide=0, swap=False, loose=0):
    h, w = v.shape[2:]
    flat = (F.pad(v, (1, 1, 1, 1), value=fill) if mode == "constant"
            else F.pad(v, (1, 1, 1, 1), mode=mode)).flatten(2)
    x0, y0 = torch.floor(x), torch.floor(y)
    fx, fy = (y - y0, x - x0) if swap else (x - x0, y - y0)

    def texel(column, row):
        column = (column + 1).clamp(0, w + 1 - loose).long()
        row = (row + 1).clamp(0, h + 1).long()
        return gathered(flat, row * (w + 2 + wide) + column)

    return (texel(x0, y0) * ((1 - fx) * (1 - fy)).unsqueeze(1)
            + texel(x0 + 1, y0) * (fx * (1 - fy)).unsqueeze(1)
            + texel(x0, y0 + 1) * ((1 - fx) * fy).unsqueeze(1)
            + texel(x0 + 1, y0 + 1) * (fx * fy).unsqueeze(1))


def masked(v, x, y, late=0, kept=True, odd="", border=False):
    h, w = v.shape[2:]
    if border:
        x, y = x.clamp(0, w - 1), y.clamp(0, h - 1)
    x0, y0 = x.floor().long(), y.floor().long()
    x1, y1 = x0 + 1, y0 + 1

    def texel(column, row):
        inside = (column >= late) & (column < w) & (row >= 0) & (row <= h - 1)
        found = gathered(v.flatten(2), row.clamp(0, h - 1) * w + column.clamp(0, w - 1))
        return found * inside.unsqueeze(1).to(v.dtype) if kept else found

    left, top = x1.to(x.dtype) - x, y1 - y
    a, b = (top * left)[:, None], (top * (x - x0))[:, None]
    c, d = ((y - y0) * left)[:, None], ((y - y0) * (x - x0))[:, None]
    first = texel(x0, y0)
    v = v.flip(-1) if odd == "map" else v
    return a * first + b * texel(x1, y0) + c * texel(x0, y1) + (
        c if odd == "share" else d) * texel(x1, y1)


def chosen(v, x, y):
    """Indices kept within a padded map by torch.where, as mmcv's form without grid_sample does."""
    n, c, h, w = v.shape
    size, x, y = x.shape[1:], x.flatten(1), y.flatten(1)
    x0, y0 = torch.floor(x).long(), torch.floor(y).long()
    x1, y1 = x0 + 1, y0 + 1
    shares = [((x1 - x) * (y1 - y)).unsqueeze(1), ((x1 - x) * (y - y0)).unsqueeze(1),
              ((x - x0) * (y1 - y)).unsqueeze(1), ((x - x0) * (y - y0)).unsqueeze(1)]
    flat = F.pad(v, [1, 1, 1, 1], mode="constant", value=0).view(n, c, -1)
    x0, x1, y0, y1 = x0 + 1, x1 + 1, y0 + 1, y1 + 1

    def kept(index, most):
        index = torch.where(index < 0, torch.tensor(0), index)
        return torch.where(index > most, torch.tensor(most), index)

    x0, x1, y0, y1 = kept(x0, w + 1), kept(x1, w + 1), kept(y0, h + 1), kept(y1, h + 1)
    texels = [torch.gather(flat, 2, (a + b * (w + 2)).unsqueeze(1).expand(-1, c, -1))
              for a, b in ((x0, y0), (x0, y1), (x1, y0), (x1, y1))]
    total = texels[0] * shares[0] + texels[1] * shares[1]
    return (total + texels[2] * shares[2] + texels[3] * shares[3]).reshape(n, c, *size)


def indexed(v, x, y, cut=False):
    """Row by row, of v[batch, :, y, x]."""
    h, w = v.shape[2:]
    batch = torch.arange(v.shape[0], device=v.device)[:, None, None]
    x0, y0 = (x.long().float(), y.floor()) if cut else (x.floor(), y.floor())

    def texel(column, row):
        inside = ((column >= 0) & (column <= w - 1)
                  & torch.logical_and(row > -1, row < h)).unsqueeze(-1)
        column, row = column.clamp(0, w - 1).long(), row.clamp(0, h - 1).long()
        return v[batch, :, row, column] * inside

    fx, fy = (x - x0).unsqueeze(-1), (y - y0).unsqueeze(-1)
    upper = texel(x0, y0) * (1 - fx) + texel(x0 + 1, y0) * fx
    lower = texel(x0, y0 + 1) * (1 - fx) + texel(x0 + 1, y0 + 1) * fx
    return (upper * (1 - fy) + lower * fy).permute(0, 3, 1, 2)


def hidden(v, x, y, of="product", rest=0.0, contrary=False):
    """Corners outside of the map are chosen away: their products with shares, or their texels."""
    h, w = v.shape[2:]
    x0, y0 = x.floor(), y.floor()
    fx, fy = x - x0, y - y0

    def corner(i, j):
        column, row = x0 + i, y0 + j
        mask = (column < 0) | (column >= w) | (row < 0) | (row >= h) if contrary \
            else (column >= 0) & (column < w) & (row >= 0) & (row < h)
        mask = mask[:, None]
        place = (row.clamp(0, h - 1) * w + column.clamp(0, w - 1)).long()
        share = ((fx if i else 1 - fx) * (fy if j else 1 - fy))[:, None]
        found = gathered(v.flatten(2), place)
        if of == "product":
            found = found * share
            return found.masked_fill(mask, 0.0) if contrary else torch.where(mask, found, rest)
        found = torch.where(mask, rest, found) if contrary else found.masked_fill(~mask, rest)
        return found * share

    return corner(0, 0) + corner(0, 1) + corner(1, 0) + corner(1, 1)


def half_hidden(v, x, y, by="row"):
    """Rows outside of the map are hidden with their shares along x, or behind one of two shares."""
    h, w = v.shape[2:]
    x0, y0 = x.floor().long(), y.floor().long()
    fx, fy = (x - x0)[:, None], (y - y0)[:, None]

    def row(j):
        y1, found = y0 + j, 0
        for i, share in ((0, 1 - fx), (1, fx)):
            x1 = x0 + i
            there = ((x1 >= 0) & (x1 < w) & (y1 >= 0) & (y1 < h))[:, None]
            texel = gathered(v.flatten(2), y1.clamp(0, h - 1) * w + x1.clamp(0, w - 1))
            kept = ((x1 >= 0) & (x1 < w))[:, None]
            if by == "mix":
                both = share * (fy if j else 1 - fy)
                seen = ((y1 >= 0) & (y1 < h))[:, None]
                found = found + torch.where(seen, texel * both, 0.0) * kept
                continue
            found = found + (torch.where(there, texel * share, 0.0) if by == "share"
                             else texel * share * kept)
        if by == "mix":
            return found
        if by == "share":
            return found
        return torch.where(((y1 >= 0) & (y1 < h))[:, None], found, 0.0)

    return row(0) + row(1) if by == "mix" else row(0) * (1 - fy) + row(1) * fy


def mixed(v, x, y, by="lerp", bad=False):
    """Mixed along x, then along y."""
    h, w = v.shape[2:]
    flat = F.pad(v, (1, 1, 1, 1)).flatten(2)
    x0, y0 = x.floor(), y.floor()
    fx, fy = (x - x0)[:, None], (y - y0)[:, None]

    def texel(i, j):
        column, row = (x0 + i + 1).clamp(0, w + 1), (y0 + j + 1).clamp(0, h + 1)
        return gathered(flat, (row * (w + 2) + column).long())

    def mix(a, b, share):
        return torch.lerp(a, b, share.expand_as(a)) if by == "lerp" else a + (b - a) * share

    upper = mix(texel(0, 0), texel(1, 0), fx)
    lower = mix(texel(0, 1), texel(1, 1), fx)
    return mix(upper, lower, fx if bad else fy)


def stacked(v, x, y, of="products", lost=False):
    """Texels and shares of the corners are stacked, or their flat numbers are and read at once."""
    h, w = v.shape[2:]
    flat = v.flatten(2)
    x0, y0 = x // 1, y - y % 1 if of == "numbers" else torch.div(y, 1, rounding_mode="floor")
    fx, fy = x % 1, y - y0
    numbers, shares = [], []
    for i, j in ((0, 0), (1, 0), (0, 1), (0, 1) if lost else (1, 1)):
        column, row = (x0 + i).long(), (y0 + j).long()
        inside = (column >= 0) & (column < w) & (row >= 0) & (row < h)
        numbers.append(row.clamp(0, h - 1) * w + column.clamp(0, w - 1))
        shares.append((fx if i else 1 - fx) * (fy if j else 1 - fy) * inside)
    if of == "numbers":
        every = gathered(flat, torch.stack(numbers, -1))
        return (every * torch.stack(shares, -1)[:, None]).sum(-1)
    texels = [gathered(flat, n) for n in numbers]
    if of == "products":
        return torch.stack([t * s[:, None] for t, s in zip(texels, shares, strict=True)], 1).sum(1)
    return (torch.stack(texels) * torch.stack(shares)[:, :, None]).sum(0)


def flat_rows(v, x, y, by="index", far=0):
    """Rows of all maps, numbered through: (b * h + y) * w + x, or with the map the fastest."""
    n, c, h, w = v.shape
    x0, y0 = x.floor(), y.floor()
    number = torch.arange(n)[:, None, None]

    def corner(i, j):
        column, row = (x0 + i).long(), (y0 + j).long()
        inside = (column >= 0) & (column < w) & (row >= 0) & (row < h)
        place = row.clamp(0, h - 1) * w + column.clamp(0, w - 1)
        if by == "fastest":
            found = v.permute(2, 3, 0, 1).reshape(-1, c)[place * n + number]
        elif by == "along":
            index = place.flatten(1)[..., None]
            found = torch.take_along_dim(v.flatten(2).transpose(1, 2), index, 1)
            found = found.unflatten(1, place.shape[1:])
        else:
            place, rows = place + number * (h * w + far), v.permute(0, 2, 3, 1).reshape(-1, c)
            if far:
                place = place.clamp(max=n * h * w - 1)
            found = rows[place] if by == "index" else F.embedding(place, rows)
        share = (x - x0 if i else 1 - (x - x0)) * (y - y0 if j else 1 - (y - y0)) * inside
        return found * share[..., None]

    out = corner(0, 0) + corner(0, 1) + corner(1, 0) + corner(1, 1)
    return out.permute(0, 3, 1, 2)


def near_map(v, x, y, end=0, only=False):
    """As CUDA kernels: nothing where a place is not near the map, then corner by corner."""
    h, w = v.shape[2:]
    there = (x > -1) & (x < w - end) & (y > -1) & (y < h)
    found = masked(v, x, y, kept=not only)
    return torch.where(there[:, None], found, 0.0)


def hidden_products(value, locations, weights):
    return summed(value, locations, weights, hidden)


def hidden_texels(value, locations, weights):
    return summed(value, locations, weights, lambda v, x, y: hidden(v, x, y, "texel"))


def texels_hidden_outside(value, locations, weights):
    return summed(value, locations, weights,
                  lambda v, x, y: hidden(v, x, y, "texel", contrary=True))


def mixed_by_lerp(value, locations, weights):
    return summed(value, locations, weights, mixed)


def mixed_by_slopes(value, locations, weights):
    return summed(value, locations, weights, lambda v, x, y: mixed(v, x, y, "slope"))


def half_padded(v, x, y):
    """Zeros at the far ends of the map, a mask at the near ones."""
    h, w = v.shape[2:]
    flat = F.pad(v, (0, 1, 0, 1)).flatten(2)
    x0, y0 = x.floor().long(), y.floor().long()
    fx, fy = x - x0, y - y0

    def texel(column, row, share):
        place = row.clamp(0, h) * (w + 1) + column.clamp(0, w)
        return gathered(flat, place) * (share * (column >= 0) * (row > -1)).unsqueeze(1)

    return (texel(x0 + 1, y0 + 1, fx * fy) + texel(x0, y0, (1 - fx) * (1 - fy))
            + texel(x0 + 1, y0, fx * (1 - fy)) + texel(x0, y0 + 1, (1 - fx) * fy))


def padded_gathers(value, locations, weights):
    """Pad, Gather, Mul and Add, as exports without GridSample have it."""
    return summed(value, locations, weights, padded)


def masked_gathers(value, locations, weights):
    return summed(value, locations, weights, masked)


def chosen_corners(value, locations, weights):
    return summed(value, locations, weights, chosen)


def indexed_corners(value, locations, weights):
    return summed(value, locations, weights, indexed)


def masked_rows(value, locations, weights):
    """Of rows (B, S, C) with the places cut from one tensor, one level and head at a time."""
    out, first = [], 0
    for head in range(value.shape[2]):
        total, first = 0, 0
        for level, (h, w) in enumerate(GRIDS):
            v = value[:, first:first + h * w, head]
            at = locations[:, :, head].unflatten(2, (len(GRIDS), -1))[:, :, level]
            at = at * torch.tensor([w, h], dtype=at.dtype) - 0.5
            low = at.floor()
            part = at - low
            sample = 0
            for i in (0, 1):
                for j in (0, 1):
                    x, y = low[..., 0] + i, low[..., 1] + j
                    share = (part[..., 0] if i else 1 - part[..., 0]) * (
                        part[..., 1] if j else 1 - part[..., 1])
                    inside = (x >= 0) & (x < w) & (y >= 0) & (y < h)
                    place = (y.clamp(0, h - 1) * w + x.clamp(0, w - 1)).long()
                    found = v.gather(1, place.flatten(1)[..., None].expand(-1, -1, v.shape[-1]))
                    found = found.unflatten(1, tuple(place.shape[1:]))
                    sample = sample + found * (share * inside)[..., None]
            own = weights[:, :, head].unflatten(2, (len(GRIDS), -1))[:, :, level]
            total = total + (sample * own[..., None]).sum(2)
            first += h * w
        out.append(total)
    return torch.cat(out, -1)


def half_padded_corners(value, locations, weights):
    return summed(value, locations, weights, half_padded)


def stacked_products(value, locations, weights):
    return summed(value, locations, weights, stacked)


def stacked_texels(value, locations, weights):
    return summed(value, locations, weights, lambda v, x, y: stacked(v, x, y, "texels"))


def stacked_numbers(value, locations, weights):
    return summed(value, locations, weights, lambda v, x, y: stacked(v, x, y, "numbers"))


def rows_of_all_maps(value, locations, weights):
    return summed(value, locations, weights, flat_rows)


def embedded_rows(value, locations, weights):
    return summed(value, locations, weights, lambda v, x, y: flat_rows(v, x, y, "embedding"))


def rows_map_fastest(value, locations, weights):
    return summed(value, locations, weights, lambda v, x, y: flat_rows(v, x, y, "fastest"))


def taken_along(value, locations, weights):
    return summed(value, locations, weights, lambda v, x, y: flat_rows(v, x, y, "along"))


def places_near_the_map(value, locations, weights):
    return summed(value, locations, weights, near_map)


ROWS = Spelling(masked_rows, parts=True)
CORNERS = [Spelling(padded_gathers, parts=True), Spelling(masked_gathers, parts=True),
           Spelling(chosen_corners, parts=True), Spelling(indexed_corners, parts=True),
           Spelling(half_padded_corners, parts=True),
           Spelling(hidden_products, parts=True), Spelling(hidden_texels, parts=True),
           Spelling(texels_hidden_outside, parts=True), Spelling(mixed_by_lerp, parts=True),
           Spelling(mixed_by_slopes, parts=True),
           *(Spelling(form, parts=True) for form in (
               stacked_products, stacked_texels, stacked_numbers, rows_of_all_maps, embedded_rows,
               rows_map_fastest, taken_along, places_near_the_map))]


# -- near misses -----------------------------------------------------------------------------------
def _near(name, sample, **how):
    def form(value, locations, weights):
        return summed(value, locations, weights, lambda v, x, y: sample(v, x, y, **how))
    form.__name__ = name
    return form


NEAR_CORNERS = [
    _near("padded_by_ones", padded, fill=1.0), _near("padded_otherwise", padded, mode="replicate"),
    _near("rows_too_wide", padded, wide=-1), _near("shares_of_the_other_axis", padded, swap=True),
    _near("clamped_too_early", padded, loose=1), _near("masked_too_much", masked, late=1),
    _near("not_masked", masked, kept=False), _near("cut_not_rounded_down", indexed, cut=True),
    _near("hidden_by_ones", hidden, rest=1.0), _near("texels_of_ones", hidden, of="t", rest=1.0),
    _near("shares_hidden_outside", hidden, contrary=True), _near("mixed_twice", mixed, bad=True),
    _near("rows_hidden", half_hidden), _near("shares_half_hidden", half_hidden, by="share"),
    _near("corners_of_two_maps", masked, odd="map"),
    _near("a_share_of_another_corner", masked, odd="share"),
    _near("border", masked, kept=False, border=True),
    _near("one_corner_twice", stacked, lost=True),
    _near("one_number_twice", stacked, of="numbers", lost=True),
    _near("rows_of_other_maps", flat_rows, far=-1), _near("near_a_smaller_map", near_map, end=1),
    _near("near_the_map_alone", near_map, only=True),
    _near("columns_hidden", half_hidden, by="mix"),
]
