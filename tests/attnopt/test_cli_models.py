"""Commands that take a model: how it is named, what is written, and every kind of bad input."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
import zipfile
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
import torch

import attnopt
from attnopt import cli
from attnopt.commands import choices, models
from attnopt.errors import AttnOptError, OptionError, VerificationError
from attnopt.report import Report
from tests.attnopt.small_models import same

ROOT = Path(__file__).parent.parent.parent
SOURCE = '''
"""Models for the command line."""
import torch
from torch import nn
from attnopt.approximations import SinkWindow

class Toy(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv, self.drop = nn.Linear(8, 24), nn.Dropout(0.5)
    def forward(self, x, keep=None):
        q, k, v = self.qkv(x).chunk(3, -1)
        scores = q @ k.transpose(-1, -2) * 8 ** -0.5
        if keep is not None:
            scores = scores.masked_fill(~keep, float("-inf"))
        return {"out": self.drop(scores.softmax(-1) @ v)}

class Plain(nn.Linear):
    """No attention at all."""

class Home:
    @staticmethod
    def make(): return Toy()

ready = Toy()
window = SinkWindow(window=4)
number = 3
def toy():
    print("a factory that talks")
    torch.manual_seed(0)
    return Toy(), (torch.randn(2, 32, 8),)
def bare(): return Toy()
def named(): return Toy(), (torch.randn(2, 6, 8),), {"keep": torch.ones(6, 6).bool()}
def plain(): return Plain(8, 8), (torch.randn(2, 8),)
def inputs(): return torch.randn(1, 5, 8),
def named_inputs(): return {"x": torch.randn(1, 5, 8)}
def both_inputs(): return (torch.randn(1, 5, 8),), {"keep": None}
def wrong_inputs(): return torch.randn(1, 5, 8)
def wrong(): return Toy(), torch.randn(2, 6, 8)
def raises(): raise ValueError("no weights\\nsecond line")
def leaves(): raise SystemExit(0)
def needs(size): return Toy()
'''


@pytest.fixture(autouse=True)
def _folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr("attnopt.passes.rules.cost.TAKE_ALL", True)
    (tmp_path / "named_models.py").write_text(SOURCE)
    (tmp_path / "bad.onnx").write_bytes(b"no graph")
    (tmp_path / "broken_models.py").write_text("import no_such_package\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield
    for name in ("named_models", "broken_models"):
        sys.modules.pop(name, None)


def options(*argv: str):
    return cli.parser().parse_args(["inspect", *argv])


@pytest.mark.parametrize(("argv", "shape", "names"), [
    (["named_models:toy"], (2, 32, 8), set()),
    (["named_models:named"], (2, 6, 8), {"keep"}),
    (["named_models:bare", "--inputs", "named_models:inputs"], (1, 5, 8), set()),
    (["named_models:Toy", "--inputs", "named_models:both_inputs"], (1, 5, 8), {"keep"}),
    (["named_models:ready", "--input", "3x4x8:bfloat16"], (3, 4, 8), set()),
    (["named_models:Home.make", "--input", "3x4x8"], (3, 4, 8), set())])
def test_names(argv, shape, names) -> None:
    found = models.named(options(*argv))
    assert found.args[0].shape == shape and set(found.kwargs) == names
    assert not found.model.training and found.dynamic_shapes is None


def test_inputs_by_name_and_training_mode() -> None:
    found = models.named(options("named_models:bare", "--inputs", "named_models:named_inputs",
                                 "--train"))
    assert found.args == () and found.kwargs["x"].shape == (1, 5, 8)
    assert found.model.training
    drawn = models.named(options("named_models:bare", "--input", "64:int64")).args[0]
    assert drawn.dtype == torch.int64 and set(drawn.tolist()) == {0, 1}
    with pytest.raises(OptionError, match="by --inputs or by --input, got both"):
        models.named(options("named_models:bare", "--input", "1x2x8", "--inputs", "a:b"))


def test_dynamic_sizes() -> None:
    found = models.named(options("named_models:named", "--dynamic", "x.1,keep.0,keep.1=2..64",
                                 "--dynamic", "x.0")).dynamic_shapes
    size = found["x"][1]
    assert found["keep"] == {0: size, 1: size} and (size.min, size.max) == (2, 64)
    assert found["x"][0] is not size
    for text, words in (("x", "a dynamic size must be like"), ("y.0", "one of x, keep, got 'y'"),
                        ("x.3", "x must have a dimension 3"), ("x.1=9..2", "a range must be")):
        with pytest.raises(OptionError, match=words):
            models.named(options("named_models:named", "--dynamic", text))


@pytest.mark.parametrize(("name", "words"), [
    ("named_models:nothing", "named_models:nothing does not exist: named_models has no nothing"),
    ("named_models:raises", "named_models:raises() raised ValueError: no weights"),
    ("named_models:leaves", "raised SystemExit: 0"),
    ("named_models:needs", "raised TypeError"),
    ("named_models:number", "must be a function without arguments, got int"),
    ("named_models:wrong", "with args a tuple, got (Toy, Tensor)"),
    ("named_models:inputs", "must give a module"),
    ("named_models:bare", "inputs must be given for named_models:bare"),
    ("no_such_models:toy", "no_such_models cannot be imported: ModuleNotFoundError"),
    ("broken_models:toy", "broken_models cannot be imported: ModuleNotFoundError"),
    ("toy", "a name must be package.module:attribute or a .pt2 file, got 'toy'"),
    ("a b:c", "a name must be"),
    ("none.pt2", "none.pt2 does not exist")])
@pytest.mark.parametrize("command", ["inspect", "optimize", "export", "onnx"])
def test_bad_names(command, name, words, capsys, tmp_path) -> None:
    before = sorted(tmp_path.iterdir())
    more = {"inspect": ["--html", "made.html"], "onnx": ["-o", "made.onnx"]}
    status = cli.main([command, name, *more.get(command, ["-o", "made.pt2"])])
    said = capsys.readouterr()
    assert status == 1 and said.out == ""
    line, = said.err.strip().splitlines()
    assert line.startswith("attnopt: ") and words in line
    assert [p for p in sorted(tmp_path.iterdir()) if p.name != "__pycache__"] == before


@pytest.mark.parametrize("argv", [
    ["onnx", "named_models:toy", "-o", "a.onnx", "--opset", "new"],
    ["onnx", "named_models:toy"], ["export", "named_models:toy"], ["inspect"],
    ["optimize", "named_models:toy", "--backend", "none"],
    ["inspect", "named_models:toy", "--format", "yaml"]])
def test_wrong_usage(argv, capsys, tmp_path) -> None:
    before = sorted(tmp_path.iterdir())
    with pytest.raises(SystemExit) as exit_:
        cli.main(argv)
    assert exit_.value.code == 2 and "usage: attnopt" in capsys.readouterr().err
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("argv", [
    ["optimize", "named_models:toy", "-o", "no/a.pt2"],
    ["optimize", "named_models:toy", "-o", "."],
    ["optimize", "named_models:toy", "-o", "a.txt"],
    ["optimize", "named_models:toy", "--html", "no/a.html"],
    ["optimize", "named_models:toy", "--rule", "no-such-rule"],
    ["inspect", "named_models:toy", "--rule", "named_models:number"],
    ["inspect", "named_models:bare", "--inputs", "named_models:wrong_inputs"],
    ["inspect", "named_models:bare", "--input", "4xa"],
    ["inspect", "named_models:bare", "--input", "4x4:float99"],
    ["inspect", "named_models:toy", "--json", "no/a.json"],
    ["inspect", "named_models:toy", "--approximate", "-1"],
    ["export", "named_models:toy", "-o", "no/a.pt2"],
    ["export", "named_models:toy", "-o", "no/a.pt2", "--aoti"],
    ["onnx", "named_models:toy", "-o", "no/a.onnx"],
    ["onnx", "named_models:toy", "-o", "a.onnx", "--opset", "99"],
    ["onnx", "named_models:toy", "-o", "a.onnx", "--lowering", "fast"],
    ["onnx", "none.onnx", "-o", "a.onnx"], ["onnx", "bad.onnx", "-o", "a.onnx"],
    ["onnx", "bad.onnx", "-o", "a.onnx", "--opset", "20"],
    ["rules", "--explain", "no-such-rule"]])
def test_bad_values(argv, capsys, tmp_path) -> None:
    before = sorted(tmp_path.iterdir())
    assert cli.main(argv) == 1
    said = capsys.readouterr()
    lines = said.err.replace("a factory that talks\n", "").strip().splitlines()
    assert said.out == "" and len(lines) == 1, lines
    assert lines[0].startswith(("attnopt: OptionError: ", "attnopt: AttnOptError: ")), lines
    assert [p for p in sorted(tmp_path.iterdir()) if p.name != "__pycache__"] == before


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_cannot_be_written(capsys, tmp_path) -> None:
    (tmp_path / "closed").mkdir(mode=0o500)
    assert cli.main(["optimize", "named_models:toy", "-o", "closed/a.pt2"]) == 1
    assert "path must be writable" in capsys.readouterr().err


class _Runs:
    def __reduce__(self):
        return os.mkdir, ("pickled_code_ran",)


@pytest.mark.parametrize("content", [b"", b"no archive", b"PK\x03\x04 cut off"])
def test_malformed_program(content, capsys, tmp_path) -> None:
    Path("m.pt2").write_bytes(content)
    assert cli.main(["inspect", "m.pt2"]) == 1
    line, = capsys.readouterr().err.strip().splitlines()
    assert "m.pt2 is no saved program" in line


def test_a_program_runs_no_pickle(tmp_path) -> None:
    model, args = models.call("named_models:toy")
    torch.export.save(torch.export.export(model.eval(), args), "good.pt2")
    same(models.load_program(Path("good.pt2")).module()(*args), model(*args))
    with zipfile.ZipFile("good.pt2") as good:
        content = {name: good.read(name) for name in good.namelist()}
    inputs = next(n for n in content if "sample_inputs" in n)
    for name, change in (("inputs.pt2", {inputs: pickle.dumps(_Runs())}),
                         ("object.pt2", {"good/data/constants/opaque_obj_0": b""}),
                         ("half.pt2", {n: b"{" for n in content if n.endswith(".json")}),
                         ("aoti.pt2", {"good/data/aotinductor/model/a.so": b""})):
        with zipfile.ZipFile(name, "w", zipfile.ZIP_STORED) as archive:
            for file, data in {**content, **change}.items():
                archive.writestr(file, data)
        with pytest.raises(AttnOptError, match=name):
            models.load_program(Path(name))
    assert not (tmp_path / "pickled_code_ran").exists()
    assert models._FORCED not in os.environ


def test_inspect(capsys, tmp_path) -> None:
    assert cli.main(["inspect", "named_models:toy", "--html", "a.html", "--json", "a.json"]) == 0
    said = capsys.readouterr()
    assert said.out.startswith("attnopt report: Toy")
    assert said.err == "a factory that talks\nwritten: a.html\nwritten: a.json\n"
    assert len(Report.from_json(Path("a.json").read_text()).sites) == 1
    assert cli.main(["inspect", "named_models:toy", "--format", "json", "--no-verify"]) == 0
    assert json.loads(capsys.readouterr().out)["sites"][0]["status"] == "rewritten"
    assert cli.main(["inspect", "named_models:toy", "--format", "html", "--no-verify"]) == 0
    assert "<html" in capsys.readouterr().out


def test_optimize_and_export(capsys) -> None:
    assert cli.main(["optimize", "named_models:toy", "-o", "a.pt2", "--format", "json"]) == 0
    said = capsys.readouterr()
    assert json.loads(said.out)["sites"] and said.err.endswith("written: a.pt2\n")
    assert cli.main(["export", "named_models:toy", "-o", "b.pt2", "--dynamic", "x.0=1..9"]) == 0
    assert "b.pt2: " in capsys.readouterr().out
    model, (x,) = models.call("named_models:toy")
    for name, size, own in (("a.pt2", 2, True), ("b.pt2", 5, False)):
        program = models.load_program(Path(name))
        assert any("attnopt" in str(n.target) for n in program.graph.nodes) == own
        y = x[:1].repeat(size, 1, 1)
        with torch.no_grad():
            same(program.module()(y), model.eval()(y))
    assert cli.main(["inspect", "b.pt2", "--no-verify"]) == 0
    assert not [p for p in Path().iterdir() if p.name.startswith(".")]


@pytest.mark.slow
def test_onnx_and_measure(capsys) -> None:
    pytest.importorskip("onnxruntime")
    assert cli.main(["onnx", "named_models:toy", "-o", "a.onnx", "--format", "json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["error"] <= found["bound"] and Path("a.onnx").stat().st_size == found["size"]
    assert cli.main(["onnx", "a.onnx", "-o", "b.onnx"]) == 0 and Path("b.onnx").is_file()
    capsys.readouterr()
    assert cli.main(["optimize", "named_models:toy", "--measure", "-o", "a.pt2"]) == 0
    assert "interleaved pairs" in " ".join(capsys.readouterr().out.split())


def test_strict(capsys, tmp_path) -> None:
    assert cli.main(["inspect", "named_models:toy", "--strict", "--no-verify"]) == 0
    before = sorted(tmp_path.iterdir())
    for argv in (["inspect", "named_models:plain"], ["optimize", "named_models:plain"],
                 ["export", "named_models:plain", "-o", "a.pt2"]):
        capsys.readouterr()
        assert cli.main([*argv, "--strict"]) == 3
        assert "must have some attention, got none" in capsys.readouterr().err
        assert cli.main(argv[:2]) == 0 if len(argv) == 2 else True
    assert sorted(tmp_path.iterdir()) == before


def test_a_program_that_differs_is_not_written(capsys, monkeypatch, tmp_path) -> None:
    monkeypatch.setattr("attnopt.agreement.distance", lambda found, expected: 1.0)
    before = {p.name for p in tmp_path.iterdir()}
    assert cli.main(["export", "named_models:toy", "-o", "a.pt2"]) == 4
    assert "VerificationError: the program must compute" in capsys.readouterr().err
    assert {p.name for p in tmp_path.iterdir()} - {"__pycache__"} == before
    assert issubclass(VerificationError, attnopt.AttnOptError)


def test_choices() -> None:
    given = options("m:f", "--rule", "row-blocks", "--rule", "named_models:window",
                    "--backend", "aten", "--backend", "cpp", "--approximate", "0.5", "--freeze",
                    "--no-verify", "--only", "encoder.*", "--prefer", "memory")
    found = choices.choices_of(given)
    rules = found.pop("rules")
    assert rules[0] == "row-blocks" and rules[1].name == "sink-window"
    assert found == {"only": "encoder.*", "approximate": {"output": 0.5}, "prefer": "memory",
                     "freeze": True, "verify": False, "backend": ("aten", "cpp")}


def test_rules(capsys) -> None:
    assert cli.main(["rules"]) == 0
    said = capsys.readouterr().out
    for name in ("generated", "fused-softmax", "row-blocks", "deformable", "sink-window"):
        assert name in said
    assert cli.main(["rules", "--json"]) == 0
    found = {rule["name"]: rule for rule in json.loads(capsys.readouterr().out)}
    assert found["deformable"]["kind"] == "sampling" and not found["radial"]["exact"]
    assert cli.main(["rules", "--explain", "moba"]) == 0
    assert "arXiv 2502.13189" in capsys.readouterr().out


def test_rules_of_other_packages_are_named_and_not_loaded(capsys, monkeypatch) -> None:
    entry = EntryPoint("theirs", "no_such_package.rules:Theirs", "attnopt.rules")
    monkeypatch.setattr("attnopt.commands.rules.entry_points", lambda group: [entry])
    assert cli.main(["rules"]) == 0
    line = capsys.readouterr().out.strip().splitlines()[-1]
    assert line.split() == ["theirs", "by", "name", "offered", "by", entry.value]


@pytest.mark.parametrize("command", ["inspect", "optimize", "export", "onnx", "bench", "calibrate",
                                     "rules", "cache", "env"])
def test_every_command_has_help_with_examples(command, capsys) -> None:
    with pytest.raises(SystemExit) as exit_:
        cli.main([command, "--help"])
    said = capsys.readouterr().out
    assert exit_.value.code == 0
    for line in said.partition("examples:\n")[2].strip().splitlines():
        argv = line.split("#")[0].split(">")[0].split()
        assert argv[:2] == ["attnopt", command]
        cli.parser().parse_args([word.strip("'") for word in argv[1:]])


@pytest.mark.slow
def test_twin_from_another_folder(tmp_path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "attnopt", "inspect", "named_models:toy", "--no-verify"],
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
        check=True)
    assert done.stdout.startswith("attnopt report: Toy")
    assert "a factory that talks" in done.stderr
