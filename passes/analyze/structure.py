"""Analysis: what is known of each mask and bias of a site, and the Spec with that knowledge in it.

Each operand that is added to the logits or that selects them is classed by provenance and lifted
(`attnopt.passes.analyze.provenance`). What is proven to be structure, at no cost at run time,
moves from the logits into `Spec.mask`: masks that keep everything vanish, causal masks become
`Causal`. Everything else is carried as the author has it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from attnopt.ir import expr as E
from attnopt.ir.expr import Expr
from attnopt.ir.mask import ALL, Mask, Where
from attnopt.ir.spec import Spec
from attnopt.passes.analyze.naming import named_layout
from attnopt.passes.analyze.provenance import Analysis, Finding
from attnopt.passes.analyze.windows import read_moves
from attnopt.passes.canonical import Canonical
from attnopt.passes.recognize.axes import product, resolve, same_length
from attnopt.rules import Decline

#: A finite fill this low underflows to a weight of zero beside any kept key.
LOW = -1e8
#: factor of logits under which a low fill is still low
_SMALLEST = 1e-3


@dataclass
class Facts:
    """What analysis adds to a site: guards on values that were read, and words for the report."""

    guards: set[str] = field(default_factory=set)
    words: dict[str, str] = field(default_factory=dict)
    gained: list[str] = field(default_factory=list)
    taken: set[str] = field(default_factory=set)
    #: operands that are carried and only hide keys, by role or because that was proven
    hiding: set[str] = field(default_factory=set)
    mask: Mask = ALL
    #: the part of the mask that was proven, without selections by an operand, and words for it
    proven: Mask = ALL
    phrases: list[str] = field(default_factory=list)


def analyze(analysis: Analysis, canonical: Canonical) -> tuple[Canonical, Facts]:
    """Move what is proven from the logits into the mask."""
    given = canonical.spec.mask
    facts = Facts(mask=given, proven=given, phrases=[] if given is ALL else [given.describe()])
    moved = read_moves(analysis, canonical)
    if moved is not None:
        facts.phrases.insert(0, moved.text)
    if canonical.spec.normalizer != "softmax":
        for slot in canonical.operands:
            _describe(analysis, canonical, slot, facts)
        return canonical, facts
    logits = _peel(analysis, canonical, canonical.spec.logits, facts)
    logits, empty_row = _selections(analysis, canonical, logits, facts)
    if not canonical.site.normalizer.robust:
        _demand_keys(analysis, canonical, logits, empty_row)
    for slot in sorted(set(canonical.operands) - set(facts.words)):
        _describe(analysis, canonical, slot, facts)
    if logits is canonical.spec.logits and facts.mask is canonical.spec.mask:
        return canonical, facts
    spec = canonical.spec.with_(logits=logits, mask=facts.mask, empty_row=empty_row)
    operands = {o.slot: canonical.operands[o.slot] for o in spec.operands
                if o.slot in canonical.operands}
    return replace(canonical, spec=spec, operands=operands), facts


def _peel(analysis: Analysis, canonical: Canonical, e: Expr, facts: Facts, scale: float = 1.0
          ) -> Expr:
    """`e` without the outer terms and selections that turn out to be structure; the logits are
    `scale` times `e`, and a fill must be low in them."""
    if e.op == "add":
        a, b = e.args
        for term, rest in ((b, a), (a, b)):
            if _is_operand(term) and not _is_operand(rest):
                found = _find(analysis, canonical, term.value, "additive", facts)
                rest = _peel(analysis, canonical, rest, facts, scale)
                if found is not None and _usable(analysis, canonical, facts, found, term.value,
                                                 found.fill, selections=0):
                    _take(found, term.value, facts)
                    return rest
                return E.call("add", rest, term)
        return E.call("add", *(
            x if _is_operand(x) else _peel(analysis, canonical, x, facts, scale) for x in (a, b)))
    if e.op == "where":
        condition, yes, no = e.args
        keeps = no.op == "const" and no.value <= LOW
        drops = yes.op == "const" and yes.value <= LOW
        if keeps or drops:
            kept, fill = (yes, no.value) if keeps else (no, yes.value)
            inner = _peel(analysis, canonical, kept, facts, scale)
            if _is_operand(condition) or (condition.op == "not" and _is_operand(
                    condition.args[0])):
                slot = (condition if _is_operand(condition) else condition.args[0]).value
                role = "keep" if keeps == _is_operand(condition) else "drop"
                found = _find(analysis, canonical, slot, role, facts)
                if found is not None and _usable(analysis, canonical, facts, found, slot, fill,
                                                 selections=1):
                    _take(found, slot, facts)
                    return inner
            return E.where(condition, inner, no) if keeps else E.where(condition, yes, inner)
    if e.op in ("mul", "div") and e.args[1].op == "const" and e.args[1].value > 0:
        scale = scale * e.args[1].value if e.op == "mul" else scale / e.args[1].value
        if scale >= _SMALLEST:
            return E.call(e.op, _peel(analysis, canonical, e.args[0], facts, scale), e.args[1])
    return e


def _selections(analysis: Analysis, canonical: Canonical, e: Expr,
                facts: Facts) -> tuple[Expr, str]:
    """Move selections with a fill of -inf, or so low that it underflows, into the mask.

    A row without a key is then NaN, or uniform where the fill is finite: all its logits are equal.
    Both at once have no such rule; the finite one then stays in the logits.
    """
    empty = canonical.spec.empty_row
    found = _selection(e)
    if found is not None and -math.inf < found[1] and facts.mask.row_always_kept() \
            and empty == "nan" and _finite(analysis, canonical, found[2]):
        keep, _, e = found
        facts.mask = facts.mask & Where(keep)
        return e, "uniform"
    return _infinite(e, facts), empty


def _demand_keys(analysis: Analysis, canonical: Canonical, logits: Expr, empty_row: str) -> None:
    """Decline where a finite fill may leave a row without a key: see Normalizer.robust."""
    low = any((found := _selection(n)) is not None and found[1] > -math.inf for n in logits.walk())
    if low or empty_row == "uniform" or not _finite(analysis, canonical, logits):
        raise Decline("a softmax that is written out may differ in rows whose keys are all filled "
                      "with a low number", canonical.site.anchor)


def _selection(e: Expr) -> tuple[Expr, float, Expr] | None:
    """(keep, fill, logits) of a selection with a low fill."""
    if e.op != "where":
        return None
    condition, yes, no = e.args
    if any(leaf.op == "score" for leaf in condition.leaves):
        return None  # a choice by the scores themselves
    if no.op == "const" and no.value <= LOW:
        return condition, no.value, yes
    if yes.op == "const" and yes.value <= LOW:
        return ~condition, yes.value, no
    return None


def _infinite(e: Expr, facts: Facts) -> Expr:
    """`e` without selections that fill with -inf; finite terms added later do not change one."""
    found = _selection(e)
    if found is not None and found[1] == -math.inf:
        facts.mask = facts.mask & Where(found[0])
        return _infinite(found[2], facts)
    if e.op == "add":
        return E.call("add", *(a if _is_operand(a) else _infinite(a, facts) for a in e.args))
    if e.op in ("mul", "div") and e.args[1].op == "const" and e.args[1].value > 0:
        return E.call(e.op, _infinite(e.args[0], facts), e.args[1])
    return e


def _finite(analysis: Analysis, canonical: Canonical, e: Expr) -> bool:
    """Do the operands of `e` hold no mask of their own, as far as the graph tells?"""
    return not any(analysis.hides(canonical.operands[s].node) for s in e.slots) and not any(
        leaf.op == "const" and leaf.value == -math.inf for leaf in e.leaves)


def _is_operand(e: Expr) -> bool:
    return e.op == "load" and not e.args


def _usable(analysis: Analysis, canonical: Canonical, facts: Facts, found: Finding, slot: str,
            fill: float | None, selections: int) -> bool:
    """May the mask replace the operand without changing a number?

    A finite fill may only if no row can lose all its keys, to this mask and to whatever else the
    logits hold together: such a row would not be empty for the author. `selections` is how many
    selections with a low fill the operand itself accounts for.
    """
    if not found.structural or not found.exact or found.mask is None:
        return False
    if found.mask is ALL:
        return True
    if fill == -math.inf:
        return found.rows_kept or canonical.spec.empty_row == "nan"
    alone = not any(analysis.hides(t.node) for s, t in canonical.operands.items() if s != slot)
    low = sum(_selection(n) is not None for n in canonical.spec.logits.walk())
    return (found.rows_kept and (fill is None or fill <= LOW) and alone and low <= selections
            and (facts.mask is ALL or (facts.mask & found.mask).row_always_kept(
                _rows_within_keys(canonical))))


def _rows_within_keys(canonical: Canonical) -> bool:
    """Are there never more rows than keys?"""
    rows, keys = (product(resolve(axes)) for axes in (canonical.site.rows, canonical.site.keys))
    both_known = isinstance(rows, int) and isinstance(keys, int)
    return bool(rows <= keys) if both_known else same_length(rows, keys)


def _take(found: Finding, slot: str, facts: Facts) -> None:
    assert found.mask is not None
    facts.mask, facts.proven = facts.mask & found.mask, facts.proven & found.mask
    facts.guards.update(found.guards)
    text = found.text or found.mask.describe()
    facts.gained.append("a mask that keeps everything" if found.mask is ALL else f"a {text} mask")
    if found.mask is not ALL:
        facts.phrases.append(text)
    facts.taken.add(slot)


def _describe(analysis: Analysis, canonical: Canonical, slot: str, facts: Facts) -> None:
    facts.words[slot] = analysis.provenance(canonical.operands[slot].node).text


def _find(analysis: Analysis, canonical: Canonical, slot: str, role: str,
          facts: Facts) -> Finding | None:
    """The finding for an operand, None where its layout has no name for the lift."""
    _describe(analysis, canonical, slot, facts)
    tensor = canonical.operands[slot]
    named = named_layout(canonical, tensor)
    if named is None:
        return None
    finding = analysis.operand(tensor.node, named[0], role, named[1])
    if finding.mask is not None and facts.words[slot]:
        if not finding.rest:
            facts.hiding.add(slot)
        facts.words[slot] += f": {finding.text or finding.mask.describe()}"
    return finding


def words(facts: Facts, spec: Spec, roles: Mapping[str, str]) -> tuple[str, str]:
    """(mask, bias) as short texts for the report."""
    carried = {s: w for s, w in facts.words.items() if w and s not in facts.taken}
    masks = list(facts.phrases)
    hiding = facts.hiding | {s for s in carried if roles.get(s) == "mask"}
    masks += [w for s, w in carried.items() if s in hiding]
    forms = {o.slot: _form(o.axes) for o in spec.operands if o.role == "bias"}
    biases = [w + forms.get(s, "") for s, w in carried.items()
              if s not in hiding and roles.get(s) not in (None, "gate")]
    return " & ".join(dict.fromkeys(masks)), " + ".join(dict.fromkeys(biases))


def _form(axes: tuple[str, ...] | None) -> str:
    """What the axes say of a bias that is an operand."""
    if axes is None or not {"q", "k"} & set(axes):
        return ""
    if "k" not in axes:
        return ", row constant"
    return ", dense" if "q" in axes else ", key vector"
