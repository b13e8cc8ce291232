"""`attnopt onnx`: a model as an ONNX file, or an ONNX file with its attention rewritten.

onnx is imported when the command runs: the other commands need not have it.
"""

from __future__ import annotations

import argparse
from typing import Any

from attnopt.commands import FINE, command, positive
from attnopt.commands.choices import add_choices, choices_of, results_alone
from attnopt.commands.models import add_model, inputs_of, named
from attnopt.errors import OptionError, StrictError


def add(commands: Any) -> None:
    onnx = command(commands, "onnx", _onnx, "write an optimised model as ONNX, checked",
                   "attnopt onnx my.models:swin -o swin.onnx\n"
                   "attnopt onnx my.models:llama --dynamic ids.0=1..8 --dynamic ids.1=16..4096 "
                   "-o llama.onnx\n"
                   "attnopt onnx model.onnx -o faster.onnx\n"
                   "attnopt onnx model.pt2 --opset 20 --lowering tiled -o model.onnx")
    add_model(onnx)
    add_choices(onnx, backend=False)
    onnx.add_argument("-o", "--output", metavar="FILE.onnx", required=True,
                      help="the file; it appears whole or not at all")
    onnx.add_argument("--opset", type=positive, metavar="N",
                      help="version of the standard operators, 18 to 25; default 23; an ONNX file "
                           "keeps its own")
    onnx.add_argument("--lowering", default="auto", metavar="FORM",
                      help="auto, attention, tiled or dense; default: what costs least")
    onnx.add_argument("--no-functions", dest="functions", action="store_false",
                      help="inline the functions of the domain attnopt")
    onnx.add_argument("--format", choices=("text", "json"), default="text",
                      help="of what is printed")


def _onnx(options: argparse.Namespace) -> int:
    from attnopt.onnx import export_onnx, optimize

    common = {"lowering": options.lowering, "keep_functions": options.functions,
              "strict": options.strict, **choices_of(options)}
    with results_alone():
        if options.model.endswith(".onnx"):
            if options.opset or options.dynamic or options.input:
                raise OptionError("an ONNX file has its own opset and sizes: --opset, --dynamic "
                                  "and --input must be left out")
            feed = inputs_of(options.inputs)[1] if options.inputs else None
            return _show(options, optimize(options.model, options.output, inputs=feed, **common))
        given = named(options)
        found = export_onnx(given.model, given.args, options.output, kwargs=given.kwargs,
                            opset=options.opset or 23, dynamic_shapes=given.dynamic_shapes,
                            **common)
    return _show(options, found)


def _show(options: argparse.Namespace, found: Any) -> int:
    print(found.to_json() if options.format == "json" else found)
    if options.strict and not found.forms:
        raise StrictError("the model must have some attention, got none")
    return FINE
