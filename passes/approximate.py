"""Approximations that the user asked for: fewer keys in a site's mask, and how that is verified.

The first approximation among the user's rules whose `path` fits and that does not decline adds its
mask to the one that the site has, never anything else. Tables that the mask looks up are made in
the rewritten graph (`attnopt.kernels.block_maps`).

Verification cannot ask for the model's own numbers. It demands instead that

    the site's exact Spec, on the same tensors, gives what the model gives: it was understood
    the rewritten site gives what the new Spec means, in float64: it is computed right

each by the bound of `attnopt.passes.acceptance`, and measures what the approximation changes: the
root mean square of the difference over that of the exact result. With a tolerance it must stay
below.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from attnopt import kernels
from attnopt.ir import expr as E
from attnopt.ir.captured import Captured
from attnopt.ir.mask import ALL, BlockMap, Mask
from attnopt.ir.site import SiteRecord
from attnopt.ir.spec import Operand, Schedule, Spec, leading_axes
from attnopt.passes import acceptance, cut_bias, oracle
from attnopt.passes.analyze.structure import words
from attnopt.passes.canonical import Canonical, Recipe, Tensor
from attnopt.passes.normalize import View
from attnopt.passes.recognize.axes import axes_of, resolve
from attnopt.rules import Approximation, BlockTable, Decline, Factors, Region

if TYPE_CHECKING:
    from attnopt.passes.analyze.inline_bias import Inlined
    from attnopt.passes.analyze.provenance import Analysis
    from attnopt.passes.analyze.structure import Facts
    from attnopt.passes.verify import Candidate

_ATTENTION = torch.ops.attnopt.attention.default
_BLOCK_MAP = torch.ops.attnopt.block_map.default
_DENSE = str(Schedule("aten:dense"))
Reduction = tuple[Approximation, Mask, Mapping[str, BlockTable | Factors]]


# -- planning -------------------------------------------------------------------------------------
def choose(rules: Sequence[Approximation], region: Region, record: SiteRecord,
           analysis: Analysis, canonical: Canonical) -> Reduction | None:
    """The first rule that takes the site; why others do not is in the record."""
    declined = []
    if rules:
        region = replace(region, biases=cut_bias.biases(analysis, canonical))
    for rule in rules:
        if not fnmatch.fnmatch(record.path, rule.path):
            record.tried.append(f"{rule.name}: outside path={rule.path!r}")
            continue
        try:
            return (rule, *rule.reduce(region))
        except Decline as no:
            declined.append(f"{rule.name}: {no.reason}")
    record.tried += declined
    if declined:
        record.approximation = f"not used, {'; '.join(declined)}"
    return None


def reduce_forms(reduction: Reduction, canonical: Canonical, inlined: Inlined | None,
                 region: Region) -> tuple[Canonical, Inlined | None, Region]:
    """Both forms of a site after an approximation, and the region of them."""
    canonical = reduced(canonical, reduction)
    if inlined is not None:
        form = reduced(inlined.canonical, reduction)
        inlined = replace(inlined, canonical=form, rank=inlined.rank + cut_bias.rank(form))
    rank = cut_bias.rank(canonical) if inlined is None else inlined.rank
    return canonical, inlined, replace(
        region, spec=canonical.spec, approximate=True, rank=rank,
        inlined=inlined.canonical.spec if inlined is not None else None)


def note(reduction: Reduction, record: SiteRecord, facts: Facts, analysis: Analysis,
         canonical: Canonical) -> None:
    """Say in the record of a site what was done, and guard the values that it depends on."""
    rule, mask, tables = reduction
    record.approximation = rule.describe()
    record.rule = f"{rule.name}, {record.rule}"
    if mask is not ALL:
        record.mask = " & ".join(filter(None, (record.mask, mask.describe())))
    for slot, table in tables.items():
        if isinstance(table, Factors) and slot in canonical.cut:
            rank = table.query.shape[-1]
            record.approximation += (f": {slot} of rank {rank}, logits off by at most "
                                     f"{table.error:.2g}")
            facts.words[slot] = f"{facts.words.get(slot) or 'constant'}, cut to rank {rank}"
            record.bias = words(facts, canonical.spec, {
                s: o.role for s, o in canonical.site.operands.items()})[1]
            facts.guards |= analysis.values.sources(canonical.operands[
                canonical.cut[slot]].node) or frozenset()


def reduced(canonical: Canonical, reduction: Reduction) -> Canonical:
    """A site with the mask of an approximation added to its own."""
    _, mask, tables = reduction
    spec, operands = canonical.spec, dict(canonical.operands)
    if any(isinstance(t, Factors) for t in tables.values()):
        return cut_bias.reduced(canonical, tables)
    more = []
    for slot, table in tables.items():
        assert isinstance(table, BlockTable)
        node = next(m for m in mask.walk() if isinstance(m, BlockMap) and m.slot == slot)
        more.append(Operand(slot, None, E.BOOL, "mask"))
        operands[slot] = _table(canonical, table, node)
    changed = spec.with_(more, mask=spec.mask & mask)
    return replace(canonical, spec=changed, operands=operands, exact=spec)


def _table(canonical: Canonical, table: BlockTable, node: BlockMap) -> Tensor:
    query, key = canonical.query, canonical.key
    lead, rows = [resolve(dim) for dim in query.target[:-2]], resolve(query.target[-2])
    keys = resolve(key.target[-2])
    target: tuple[Any, ...] = (rows, keys)
    blocks: tuple[int, ...] = (node.block_q, node.block_k)
    if table.reads:
        have = axes_of(query.layout) | axes_of(key.layout)
        if not axes_of(tuple(lead)) <= have or node.leading != leading_axes(len(lead)):
            raise Decline("query and key must vary along all leading axes for a choice of keys")
        target, blocks = (*lead, rows, keys), (*[1] * len(lead), *blocks)
    inputs = (query, key) if table.reads else (query,)
    recipe = Recipe(_BLOCK_MAP, inputs, (rows, keys), table.text, torch.bool, blocks)
    return Tensor(query.node, target, target, recipe)


# -- verification ---------------------------------------------------------------------------------
def judge(captured: Captured, view: View, c: Candidate, known: Mapping[fx.Node, Any],
          env: Mapping[fx.Node, Any], original: torch.Tensor, new: torch.Tensor,
          tolerance: float | None) -> None:
    """Set the verdict on a candidate with an approximation."""
    from attnopt.passes import verify

    if not all(_changes_little(p) for p in c.parts):
        c.reason = "an approximation must change nothing but the mask, or a bias"
        return
    exact = {n: oracle.double(v) for n, v in known.items()}
    truth = oracle.run(c.parts[0].site.end, exact, precise=True)
    own = _run(c, view, known, env, precise=False, exact=True)
    ok, err, err_original, bound = acceptance.judge(own, original, truth)
    if not ok:
        c.reason = (f"without the approximation the result is off by {err} from float64, the "
                    f"original by {err_original:.3g}, allowed are {bound:.3g}")
        return
    lost = new.isnan() & ~original.isnan()
    if lost.any():
        c.reason = "the approximation leaves rows without a key"
        return

    plain = known

    def wanted(values: Mapping[fx.Node, Any], others: Mapping[fx.Node, Any],
               precise: bool) -> torch.Tensor:
        nonlocal plain
        plain = plain if precise else values  # keys are chosen on the numbers as they are
        return _run(c, view, values, others, precise=precise, tables=plain)

    composed, reference = wanted(known, env, False), wanted(exact, env, True)
    ok, c.error, c.error_original, c.bound = acceptance.judge(new, composed, reference)
    if not ok:
        c.reason = (f"the result is off by {c.error} from the approximation in float64, allowed "
                    f"are {c.bound:.3g}")
        return
    c.deviation = _root_mean_square(reference - truth) / max(_root_mean_square(truth), 1e-300)
    if tolerance is not None and c.deviation > tolerance:
        c.reason = (f"the approximation changes the result by {c.deviation:.3g}, allowed are "
                    f"{tolerance:.3g}")
        return
    verify.compare_gradients(captured, c, view, known, env, wanted)
    if c.accepted:
        verify.draw(captured, view, c, known, wanted)


def _changes_little(part: Canonical) -> bool:
    """Is the mask all that an approximation changes, or the logits where it cuts a bias?"""
    may = {"operands", "logits" if part.cut else "mask"}
    return part.exact is None or all(
        getattr(part.spec, f.name) == getattr(part.exact, f.name)
        for f in fields(Spec) if f.name not in may)


def _root_mean_square(x: torch.Tensor) -> float:
    x = x[x.isfinite()].double()
    return float(x.square().mean().sqrt()) if x.numel() else 0.0


def _run(c: Candidate, view: View, known: Mapping[fx.Node, Any], env: Mapping[fx.Node, Any], *,
         precise: bool, exact: bool = False, tables: Mapping[fx.Node, Any] | None = None,
         ) -> torch.Tensor:
    """The emitted nodes with every attention computed as its Spec is defined.

    precise: by the reference, in the dtype of `known` with casts left out; else one composition
    exact:   the Spec without the approximation
    tables:  values from which keys are chosen when precise: a choice is not arithmetic
    """
    own = {str(p.spec): p.exact or p.spec for p in c.parts}
    cuts = {str(p.spec): p.cut for p in c.parts}
    values = {view.author[n]: v for n, v in known.items()}
    chosen = _chosen(c, view, tables, env) if precise and tables is not None else {}
    for node in c.done.emitted:
        args, kwargs = fx.node.map_arg(
            (node.args, node.kwargs), lambda n: values[n] if n in values else env[n])
        if node in chosen:
            values[node] = chosen[node]
        elif node.target is torch.ops.aten.to.dtype and precise and args[0].is_floating_point():
            values[node] = args[0]
        elif node.target is _ATTENTION:
            query, key, value, operands, text = args[:5]
            spec = Spec.parse(text)
            named = dict(zip((o.slot for o in spec.operands), operands, strict=True))
            if exact:
                made = dict(zip(named, node.args[3], strict=True))  # type: ignore[call-overload]
                dense = {s: made[f].args[0][0] for s, f in cuts.get(text, {}).items()}
                named |= {s: values[n] if n in values else env[n] for s, n in dense.items()}
                spec = own[text]
            given = [named[o.slot] for o in spec.operands]
            values[node] = (kernels.reference(spec)(query, key, value, given),) if precise else (
                _ATTENTION(query, key, value, given, str(spec), _DENSE))
        else:
            values[node] = node.target(*args, **kwargs)  # type: ignore[operator]
    found: torch.Tensor = values[c.done.result]
    return found


def _chosen(c: Candidate, view: View, known: Mapping[fx.Node, Any], env: Mapping[fx.Node, Any],
            ) -> dict[fx.Node, Any]:
    """The tables of blocks that the emitted nodes choose on the example's own values."""
    values = {view.author[n]: v for n, v in known.items()}
    found = {}
    for node in c.done.emitted:
        if node.target is _ATTENTION:
            break
        args, kwargs = fx.node.map_arg(
            (node.args, node.kwargs), lambda n: values[n] if n in values else env[n])
        values[node] = node.target(*args, **kwargs)  # type: ignore[operator]
        if node.target is _BLOCK_MAP:
            found[node] = values[node]
    return found
