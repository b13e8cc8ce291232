"""attnopt.package: a compiled file that runs without attnopt, at sizes of its range."""

from __future__ import annotations

import copy
import subprocess
import sys

import pytest
import torch
from torch import nn

import attnopt
from attnopt import agreement, packaging
from attnopt.errors import AttnOptError, OptionError, StrictError, VerificationError

DIM = torch.export.Dim
LOAD = """
import sys, torch
model = torch._inductor.aoti_load_package(sys.argv[1])
cases = torch.load(sys.argv[2])
for given, expected in cases:
    found = model(given)["out"]
    assert found.shape == expected.shape
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
assert not any(name.partition(".")[0] == "attnopt" for name in sys.modules)
print(len(cases), "equal")
"""


class Windowed(nn.Module):
    """A sliding window and a full attention with a bias by distance."""

    def __init__(self, width: int = 16, heads: int = 2) -> None:
        super().__init__()
        self.heads, self.slope = heads, nn.Parameter(torch.rand(heads))
        self.one, self.two = nn.Linear(width, 3 * width), nn.Linear(width, 3 * width)

    def attend(self, project, x, windowed):
        q, k, v = project(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
        place = torch.arange(x.shape[1])
        apart = place[:, None] - place[None]
        if windowed:
            scores = scores.masked_fill((apart < 0) | (apart > 8), float("-inf"))
        else:
            scores = scores - self.slope[:, None, None] * apart.abs()
        return (scores.softmax(-1) @ v).transpose(1, 2).flatten(-2)

    def forward(self, x):
        x = x + self.attend(self.one, x, True)
        return {"out": x + self.attend(self.two, x, False)}


class Kept(nn.Module):
    """Scores that are added up along the keys."""

    def forward(self, x):
        return (x @ x.transpose(-1, -2)).cumsum(-1).softmax(-1) @ x


@pytest.fixture(autouse=True)
def _take_all(monkeypatch):
    monkeypatch.setattr("attnopt.passes.rules.cost.TAKE_ALL", True)
    torch.manual_seed(0)


@pytest.mark.slow
def test_runs_without_attnopt_at_other_sizes(tmp_path) -> None:
    model, x = Windowed().eval(), torch.randn(2, 150, 16)
    shapes = {"x": {0: DIM("b", min=1, max=8), 1: DIM("n", min=4, max=512)}}
    found = attnopt.package(model, (x,), tmp_path / "m.pt2", dynamic_shapes=shapes)
    assert [p.name for p in tmp_path.iterdir()] == ["m.pt2"]
    assert found.size == (tmp_path / "m.pt2").stat().st_size
    assert found.error is not None and found.error < 1e-5
    assert [s.status for s in found.report.sites] == ["rewritten", "rewritten"]
    assert str(found).startswith(str(tmp_path / "m.pt2"))
    cases = []
    for b, n in ((2, 150), (1, 5), (3, 97), (8, 512)):
        y = torch.randn(b, n, 16)
        with torch.no_grad():
            cases.append((y, model(y)["out"]))
    torch.save(cases, tmp_path / "cases.pt")
    done = subprocess.run([sys.executable, "-c", LOAD, tmp_path / "m.pt2", tmp_path / "cases.pt"],
                          cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "4 equal\n"


@pytest.mark.slow
def test_half_precision_is_as_accurate_as_the_model(tmp_path) -> None:
    model, x = Windowed().eval().bfloat16(), torch.randn(2, 150, 16).bfloat16()
    shapes = {"x": {0: DIM("b", min=1, max=8), 1: DIM("n", min=4, max=512)}}
    found = attnopt.package(model, (x,), tmp_path / "m.pt2", dynamic_shapes=shapes)
    assert [s.status for s in found.report.sites] == ["rewritten", "rewritten"]
    run = torch._inductor.aoti_load_package(str(tmp_path / "m.pt2"))
    exact = copy.deepcopy(model).double()
    for b, n in ((2, 150), (1, 5), (8, 301)):
        x = torch.randn(b, n, 16).bfloat16()
        with torch.no_grad():
            made, own, wanted = (f(y)["out"] for f, y in (
                (run, x), (model, x), (exact, x.double())))
        assert made.dtype == torch.bfloat16
        off, allowed = ((y.double() - wanted).abs().max() for y in (made, own))
        assert off <= 2 * allowed


def test_arguments(tmp_path) -> None:
    model, x = Windowed().eval(), torch.randn(1, 8, 16)
    for given, words in ((dict(path=tmp_path / "m.so"), "path must end in .pt2"),
                         (dict(path=tmp_path / "no" / "m.pt2"), "a folder that exists"),
                         (dict(args=x), "args must be a tuple"),
                         (dict(model=torch.sin), "model must be"),
                         (dict(inductor_configs=3), "inductor_configs must be a mapping"),
                         (dict(speed=1), "an option must be one of"),
                         (dict(verify=1), "verify must be True or False")):
        arguments = {"model": model, "args": (x,), "path": tmp_path / "m.pt2", **given}
        with pytest.raises(OptionError, match=words):
            attnopt.package(**arguments)
    assert not list(tmp_path.iterdir())


def test_nothing_is_written_where_something_fails(tmp_path, monkeypatch) -> None:
    model, x = Windowed().eval(), torch.randn(1, 8, 16)
    path = tmp_path / "m.pt2"
    path.write_text("before")

    def fail(program, *, package_path, **others):
        with open(package_path, "w") as file:
            file.write("half")
        raise RuntimeError("no compiler\nand more")

    monkeypatch.setattr(torch._inductor, "aoti_compile_and_package", fail)
    with pytest.raises(AttnOptError, match="AOTInductor cannot compile the program: no compiler$"):
        attnopt.package(model, (x,), path)
    with pytest.raises(StrictError, match="every site must be rewritten, got 1 kept"):
        attnopt.package(Kept(), (x,), path, strict=True)
    monkeypatch.setattr(packaging, "_compile", lambda program, part, configs: (
        part.write_text("whole"), lambda x: {"out": x + 1})[1])
    with pytest.raises(VerificationError, match="allowed are"):
        attnopt.package(model, (x,), path)
    assert path.read_text() == "before" and len(list(tmp_path.iterdir())) == 1
    assert attnopt.package(model, (x,), path, verify=False).error is None
    assert path.read_text() == "whole"


def test_agreement() -> None:
    nan, one = torch.tensor([float("nan"), 1.0]), torch.tensor([1.0, 1.0])
    assert agreement.distance([nan], [nan.clone()]) == 0
    assert agreement.distance([one], [nan]) == agreement.distance([nan], [one]) == float("inf")
    inf = torch.tensor([float("inf"), 2.0])
    assert agreement.distance([inf], [inf.clone()]) == 0
    assert agreement.distance([torch.empty(0, 3)], [torch.empty(0, 3)]) == 0
    assert agreement.allowed([one * 50]) == pytest.approx(50 * agreement.BOUND)
    assert agreement.allowed([one.half()]) == agreement.BOUND_HALF
    with pytest.raises(VerificationError, match="must give 1 tensors, got 2"):
        agreement.distance([one, one], [one])
    with pytest.raises(VerificationError, match="must be of shape"):
        agreement.distance([one[:1]], [one])
    assert agreement.compare(torch.exp, torch.exp, (one,), {}) == 0
