"""Sites taken whether they pay or not, and computed by ATen so that few kernels are compiled."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from attnopt import kernels
from attnopt.kernels.bind import bind
from attnopt.kernels.cpp.toolchain import toolchain
from attnopt.passes.rules import cost


@pytest.fixture
def by_aten(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Every site that a rule can take is taken; ATen evaluates its Spec unless the test is
    `compiled`."""
    monkeypatch.setattr(cost, "TAKE_ALL", True)
    bind.cache_clear()
    if "compiled" not in request.fixturenames:
        monkeypatch.setattr(kernels, "prepare", lambda *_: None)
        monkeypatch.setattr(kernels.cpp, "spec_reasons", lambda spec: ("by ATen",))
    yield
    bind.cache_clear()


@pytest.fixture
def compiled() -> None:
    """The test runs the generated kernel."""
    if toolchain().why_not():
        pytest.skip(toolchain().why_not())
