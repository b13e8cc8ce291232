"""ONNX: export of optimised models, and the same recognition on ONNX files.

    attnopt.export_onnx(model, args, "model.onnx")      # opset 23: Attention, or tiles, or gathers
    attnopt.onnx.optimize("model.onnx", "faster.onnx")  # a file that another exporter wrote
"""

from attnopt.onnx.needed import WRITING, require

require(*WRITING)

from attnopt.onnx.export import LOWERINGS, OPSETS, export_onnx  # noqa: E402
from attnopt.onnx.optimize import optimize  # noqa: E402
from attnopt.onnx.report import OnnxReport  # noqa: E402

__all__ = ["LOWERINGS", "OPSETS", "OnnxReport", "export_onnx", "optimize"]
