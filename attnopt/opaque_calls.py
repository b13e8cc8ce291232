"""The same graph with attention that has a generated kernel as one operator each.

A compiler that is given the graph would trace `attnopt::attention` down to ATen; see
`attnopt.kernels.opaque`. Attention by ATen stays a composition, for the compiler to fuse.
"""

from __future__ import annotations

import operator

from torch import fx

from attnopt.ir.spec import Schedule, Spec
from attnopt.kernels import opaque, ops, window_maps


def with_opaque_calls(module: fx.GraphModule) -> int:
    """Change the graph in place; the number of calls that were changed."""
    changed = 0
    for node in list(module.graph.nodes):
        if node.kwargs or node.target not in (ops.attention, window_maps.window_attention):
            continue
        spec, schedule, places = (*node.args[4:], "")[:3]
        if not schedule or Schedule.parse(schedule).lowering.startswith("aten") \
                or Spec.parse(spec).lse:
            continue
        with module.graph.inserting_before(node):
            whole = module.graph.call_function(
                opaque.generated, (*node.args[:4], spec, schedule, places))
        if node.target is window_maps.window_attention:
            whole.meta = dict(node.meta)
            node.replace_all_uses_with(whole)
        else:
            outs = [user for user in node.users
                    if user.target is operator.getitem and user.args[1] == 0]
            if len(outs) != len(node.users):
                module.graph.erase_node(whole)
                continue
            for out in outs:
                whole.meta = dict(out.meta)
                out.replace_all_uses_with(whole)
                module.graph.erase_node(out)
        module.graph.erase_node(node)
        changed += 1
    if changed:
        module.recompile()
    return changed
