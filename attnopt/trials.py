"""Captures beside those of an optimised module: what Dynamo would find, and times of sites."""

from __future__ import annotations

import copy
import dataclasses
import weakref
from typing import Any

import torch
from torch import nn

from attnopt import logs
from attnopt.errors import AttnOptError
from attnopt.ir.site import SiteRecord
from attnopt.passes.site_times import Timer, timing
from attnopt.runtime import Runtime


def run_copy(module: nn.Module, whole: Runtime, args: tuple[Any, ...],
             kwargs: dict[str, Any]) -> Runtime:
    """Run copies of the model and its arguments through Dynamo."""
    try:
        copied, (args, kwargs) = copy.deepcopy((module, (args, kwargs)))
        runtime = Runtime(copied, whole.options)
        runtime.notes = whole.notes
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            runtime.run_graphs(args, kwargs)
        return runtime
    except Exception as error:  # the model's own, or one of copying: it is no error to explain
        logs.get("capture").info("explain could not run the model", exc_info=True)
        whole.note(f"not run through Dynamo: {type(error).__name__}")
        return whole


def site_times(owner: weakref.ref[Runtime], args: tuple[Any, ...], kwargs: dict[str, Any],
               repeats: int, threads: int) -> list[SiteRecord]:
    """The sites of the model that `owner` has optimised, captured anew for these arguments in the
    module's present mode, with their times (`attnopt.passes.site_times`)."""
    runtime = owner()
    if runtime is None:
        raise AttnOptError("sites must be measured while their module is alive")
    options = dataclasses.replace(runtime.options, verify=False, strict=False)
    fresh = Runtime(runtime.model, options, runtime.dynamic_shapes, runtime.dynamic_structure)
    with timing(Timer(repeats, threads)):
        fresh.prepare(args, kwargs)
        if fresh.wants_dynamo:
            fresh = run_copy(runtime.model, fresh, args, kwargs)
    return [site for _, rewritten in fresh.reported for site in rewritten.sites]
