"""Recognition: every contraction of normalised scores with values becomes an `Attention` site.

The anchor is the second contraction, weights with values. Its weight operand is read backwards to
the normaliser (a softmax, or one written by hand), and from there to the raw scores. What the
contractions say about axes decides who is query, key, batch and head; names and orders of
dimensions never do. Every softmax that no site takes is recorded with the reason.
"""

from __future__ import annotations

from torch import fx

from attnopt.ir import expr as E
from attnopt.passes.normalize import op_name
from attnopt.passes.recognize.attention import Attention, Miss
from attnopt.passes.recognize.by_hand import read_by_hand
from attnopt.passes.recognize.contraction import Contraction, contraction
from attnopt.passes.recognize.gates import take_gates
from attnopt.passes.recognize.heads import head_mix
from attnopt.passes.recognize.program import SDPA, SOFTMAX, UNMOVED, Program
from attnopt.passes.recognize.scores import raw_score
from attnopt.passes.recognize.sdpa import read_sdpa
from attnopt.passes.recognize.softmaxes import read_softmaxes
from attnopt.rules import Decline


def recognize(program: Program) -> tuple[list[Attention], list[Miss]]:
    """All sites of the program in topological order, and what was left."""
    found: list[Attention] = []
    reasons: dict[fx.Node, Miss] = {}
    written: dict[fx.Node, Miss] = {}
    reassociable: list[Miss] = []
    for node in program.nodes:
        if node not in program.live or node.op != "call_function":
            continue
        if op_name(node) in SDPA:
            try:
                found.append(read_sdpa(program, node))
            except Decline as no:
                reasons[node] = Miss(node, no.reason, no.node)
            continue
        mix = head_mix(node)
        second = contraction(node)
        if second is not None and (mix is None or program.on_input(mix.matrix)):
            if any(program.users(n) != [node] for n in second.inner):
                continue  # the product is read as well: no contraction
            _try_contraction(program, second, found, reasons, written, reassociable)
    taken = {a.anchor for a in found}
    take_gates(program, found)
    for site in found:
        site.escapes = _escapes(program, site, _scoring(program, found, site))
    for node in program.nodes:
        if op_name(node) in SOFTMAX and node in program.live and node.op == "call_function" \
                and node not in taken and node not in reasons and "log" not in op_name(node):
            why = node.meta.get(UNMOVED)
            reasons[node] = Miss(node, "no contraction over the softmax axis follows" + (
                f", and what is moved is not put back: {why}" if why else ""), node)
    misses = [m for n, m in reasons.items() if n not in taken]
    covered = {n for a in found for n in a.interior}
    misses += [m for m in (*written.values(), *reassociable)
               if m.anchor not in covered and m.anchor not in taken]
    return found, sorted(misses, key=lambda m: program.order[m.anchor])


def _try_contraction(program: Program, second: Contraction, found: list[Attention],
                     reasons: dict[fx.Node, Miss], written: dict[fx.Node, Miss],
                     reassociable: list[Miss]) -> None:
    """Read either operand of `second` as attention weights."""
    for side in (0, 1):
        weights, values = second.sides()[side], second.sides()[1 - side]
        sources = program.sources[weights[0]]
        norms = [s for s in sources if op_name(s) in SOFTMAX]
        scores = [s for s in sources if raw_score(s) is not None]
        if not norms and not scores:
            continue
        try:
            if second.addend is not None or second.alpha != 1:
                raise Decline("the contraction with the values adds to or scales its result",
                              second.node)
            sites = (read_softmaxes(program, second, weights, values, norms) if norms
                     else [read_by_hand(program, second, weights, values)])
        except Decline as no:
            for norm in norms:
                reasons.setdefault(norm, Miss(norm, no.reason, no.node))
            if not norms and _normalized(program, weights[0]):
                written.setdefault(second.node, Miss(second.node, no.reason, no.node))
            continue
        plain = [s for s in sites if s.normalizer.name == "identity"
                 and s.normalizer.weights is E.weight]
        if plain:
            reassociable.extend(
                Miss(second.node, "linear attention: no normaliser between two contractions, "
                     "kept until a rule re-associates it", second.node, "reassociable")
                for s in plain if _is_linear(s))
            continue
        found.extend(sites)
        return


def _normalized(program: Program, weights: fx.Node) -> bool:
    """Are these exponentials of scores over a sum of theirs, or beside their log-sum-exp?"""
    stack, seen, found = [weights], {weights}, set[str]()
    while stack:
        node = stack.pop()
        name = op_name(node) if node.op == "call_function" else ""
        if name == "exp" and any(map(program.on_input, program.sources[node])):
            found.add(name)
        elif name in ("div", "true_divide", "logsumexp"):
            found.add("div")
        if raw_score(node) is None:
            more = [n for n in node.all_input_nodes if n not in seen and program.sources.get(n)]
            seen.update(more)
            stack += more
    return found == {"exp", "div"}


def _is_linear(site: Attention) -> bool:
    """(QK)V with activations on all three places and a key axis longer than head_dim may be."""
    return site.logits.op in ("score", "mul", "div") and bool(site.keys) and bool(site.rows)


def _scoring(program: Program, found: list[Attention], site: Attention) -> set[fx.Node]:
    """Nodes that make the scores of the other attentions, up to their softmax."""
    return {node for other in found if other is not site and op_name(other.anchor) in SOFTMAX
            for node in other.interior if program.order[node] <= program.order[other.anchor]}


def _escapes(program: Program, site: Attention, scoring: set[fx.Node]) -> list[fx.Node]:
    """Live users of the site's inside that are not part of it, nor read by it alone.

    Scores, not weights, may also be those of another attention (`scoring`): each computes its own.
    """
    inside = {*site.interior, site.end}
    loaded = {o.node for o in site.operands.values()}
    first: set[fx.Node] = set()
    found: list[fx.Node] = []
    for node in site.interior:
        if node is not site.end:
            first.update(u for u in program.users(node) if u not in inside)
    softmax = program.order[site.anchor] if op_name(site.anchor) in SOFTMAX else -1
    for user in sorted(first, key=program.order.__getitem__):
        early = all(program.order[n] < softmax for n in user.all_input_nodes if n in inside)
        own = inside | (scoring - loaded) if early else inside
        if not _only_feeds(program, user, own, loaded):
            found.append(user)
    return found


def _only_feeds(program: Program, node: fx.Node, inside: set[fx.Node], loaded: set[fx.Node],
                depth: int = 6) -> bool:
    """Does `node` end in the site, and not as an operand that it would still have to be for?"""
    if node in inside:
        return True
    users = program.users(node)
    return depth > 0 and bool(users) and node.op == "call_function" and node not in loaded \
        and all(_only_feeds(program, u, inside, loaded, depth - 1) for u in users)
