"""optimize() and explain(): the pipeline from a model to an optimised module and its report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from attnopt.errors import OptionError, StrictError
from attnopt.module import OptimizedModule, make_report, shell_of, wrap
from attnopt.passes.options import Options
from attnopt.program import raise_if_kept
from attnopt.report import Report
from attnopt.runtime import Runtime
from attnopt.trials import run_copy


def optimize(
    model: nn.Module | torch.export.ExportedProgram,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any] | None = None,
    *,
    dynamic_shapes: Any = None,
    rules: Sequence[Any] | None = None,
    only: str | None = None,
    approximate: Mapping[str, float] | None = None,
    prefer: str = "speed",
    verify: bool = True,
    backend: str | Sequence[str] = "auto",
    freeze: bool = False,
    strict: bool = False,
    inplace: bool = False,
) -> OptimizedModule:
    """Find the attention in a model, rewrite it, verify the result, and return the module.

    The result has the model's parameters, buffers, hooks, attributes and methods by reference, the
    same state dict, and computes the same numbers. Calls in another mode or with other sizes run
    the model's own forward until their kind has come twice.

    Args:
        model: an nn.Module (a torch.fx.GraphModule is one) or a torch.export.ExportedProgram.
        args: example positional arguments of any shapes and dtypes that the model takes. They are
            read, not run: neither they nor the model nor a random generator is changed.
        kwargs: example keyword arguments.
        dynamic_shapes: which sizes may change, as for torch.export; None for none.
        rules: the rules to use, by name or as objects; None for all that are exact. Approximations
            (`attnopt.approximations`) are used only where one is given here; if nothing else is,
            they go with all exact rules.
        only: a pattern of module paths ("encoder.*") outside which nothing is rewritten.
        approximate: None, or tolerances by name: {"output": 0.1} keeps a site as it was where an
            approximation changes its result by more (root mean square over root mean square).
        prefer: "speed", or "memory": of all ways to compute a site the one that holds least in
            tensors of queries x keys, even where it is slower; the report says what that costs.
        verify: compare each rewrite with the original in float64 on the example arguments.
        backend: "auto", or one or several of "aten", "cpp", "triton".
        freeze: what the model computes from parameters and buffers alone (an interpolated position
            table, the bias that an MLP makes of coordinates) is computed once. A change of one of
            them is noticed, and calls in training mode or that record gradients of parameters use
            no frozen value.
        strict: raise if the model cannot be captured whole or any attention is left as it was.
        inplace: give the model itself the optimised forward, and return it.

    Raises:
        OptionError: an argument is of a wrong type or value.
        StrictError: `strict` was given and something was left as it was.
    """
    options = Options.of({"rules": rules, "only": only, "approximate": approximate,
                          "prefer": prefer, "verify": verify, "backend": backend,
                          "freeze": freeze, "strict": strict})
    if not isinstance(inplace, bool):
        raise OptionError(f"inplace must be True or False, got {inplace!r}")
    module = _module(model)
    given, named = _arguments(args, kwargs)
    if inplace and not isinstance(model, nn.Module):
        raise OptionError(f"model must be a module when inplace=True, got {type(model).__name__}")
    runtime = Runtime(shell_of(module) if inplace else module, options, dynamic_shapes)
    optimized = wrap(module, runtime, inplace=inplace)
    reason = runtime.prepare(given, named)
    if strict:
        _raise_if_kept(optimized, reason)
    return optimized


def explain(
    model: nn.Module | torch.export.ExportedProgram,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any] | None = None,
    *,
    dynamic_shapes: Any = None,
    **options: Any,
) -> Report:
    """The report that `optimize` would give, with nothing rewritten.

    A model that torch.export cannot capture is run once, as a copy, to see what Dynamo finds.

    Args:
        model, args, kwargs, dynamic_shapes: as for `optimize`.
        options: the other options of `optimize`.

    Raises:
        OptionError: an argument is of a wrong type or value.
    """
    chosen = Options.of(options)
    module = _module(model)
    given, named = _arguments(args, kwargs)
    runtime = Runtime(module, chosen, dynamic_shapes)
    runtime.prepare(given, named)
    if runtime.wants_dynamo:
        runtime = run_copy(module, runtime, given, named)
    return make_report(runtime)


def _module(model: Any) -> nn.Module:
    if isinstance(model, torch.export.ExportedProgram):
        return model.module()
    if isinstance(model, OptimizedModule):
        raise OptionError("model must be the user's own module, got one that is optimised already")
    if isinstance(model, torch._dynamo.OptimizedModule):
        raise OptionError("model must be a module before torch.compile, got a compiled one")
    if not isinstance(model, nn.Module):
        raise OptionError("model must be a torch.nn.Module or a torch.export.ExportedProgram, "
                          f"got {type(model).__name__}")
    return model


def _arguments(args: Any, kwargs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if not isinstance(args, tuple):
        raise OptionError(
            f"args must be a tuple of the model's positional arguments, got {type(args).__name__}")
    if kwargs is not None and not isinstance(kwargs, Mapping):
        raise OptionError(f"kwargs must be a mapping, got {type(kwargs).__name__}")
    return tuple(args), dict(kwargs or {})


def _raise_if_kept(optimized: OptimizedModule, reason: str | None) -> None:
    if reason is not None:
        raise StrictError(f"the model must be captured whole, got: {reason}")
    raise_if_kept(optimized.report.sites)
