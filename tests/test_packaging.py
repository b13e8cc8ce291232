"""The wheel: what is in it, under which names, and that it works away from and inside a checkout.

It is built from a copy of the sources, so that the checkout stays clean and a build folder left
there cannot put old files into the wheel.
"""

import json
import os
import shutil
import subprocess
import sys
import zipfile
from email.message import Message
from email.parser import Parser
from pathlib import Path

import pytest

pytest.importorskip("setuptools", minversion="77")

ROOT = Path(__file__).resolve().parent.parent
# Top-level folder of the repository -> where it lies in the wheel.
INSTALLED = {"attnopt": "attnopt", "passes": "attnopt/passes", "kernels": "attnopt/kernels"}
DATA = {".json", ".html", ".css", ".js", ".cpp", ".h", ".typed"}

# Imports the modules named as arguments and prints from which files they came.
IMPORT = """
import importlib, importlib.util, json, sys
files = {name: importlib.import_module(name).__file__ for name in sys.argv[1:]}
print(json.dumps(files))
"""


def _sources(suffixes: set[str]) -> dict[str, Path]:
    """Every source file with such a suffix, by its name inside the wheel."""
    return {
        f"{inside}/{path.relative_to(ROOT / folder).as_posix()}": path
        for folder, inside in INSTALLED.items()
        for path in (ROOT / folder).rglob("*")
        if path.suffix in suffixes and "__pycache__" not in path.parts
    }


def _module(name: str) -> str:
    return name.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def _run(*args: str, cwd: Path, path: Path | None = None) -> str:
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    if path is not None:
        env["PYTHONPATH"] = str(path)
    done = subprocess.run(
        [sys.executable, *args], cwd=cwd, env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def _import(names: list[str], cwd: Path, path: Path | None = None) -> dict[str, Path]:
    files = json.loads(_run("-c", IMPORT, *names, cwd=cwd, path=path))
    return {name: Path(file) for name, file in files.items()}


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    copy = tmp_path_factory.mktemp("checkout")
    for folder in INSTALLED:
        ignore = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / folder, copy / folder, ignore=ignore)
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    return copy


@pytest.fixture(scope="module")
def wheel(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    build = "import sys; from setuptools.build_meta import build_wheel; build_wheel(sys.argv[1])"
    _run("-c", build, str(out), cwd=checkout)
    return next(out.glob("attnopt-*.whl"))


@pytest.fixture(scope="module")
def site(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder into which the wheel was installed, without its dependencies."""
    target = tmp_path_factory.mktemp("site")
    options = ["--quiet", "--no-deps", "--no-index", "--target", str(target)]
    _run("-m", "pip", "install", *options, str(wheel), cwd=target)
    return target


@pytest.fixture(scope="module")
def metadata(wheel: Path) -> Message:
    with zipfile.ZipFile(wheel) as archive:
        name = next(n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
        return Parser().parsestr(archive.read(name).decode())


def test_every_folder_with_code_is_a_package() -> None:
    folders = {path.parent for path in _sources({".py"}).values()}
    assert not [folder for folder in folders if not (folder / "__init__.py").is_file()]


def test_the_wheel_holds_every_source_and_data_file(wheel: Path) -> None:
    expected = set(_sources({".py"} | DATA))
    with zipfile.ZipFile(wheel) as archive:
        found = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert found == expected
    assert "attnopt/py.typed" in found


def test_nothing_else_is_installed_at_top_level(site: Path) -> None:
    names = {entry.name for entry in site.iterdir()} - {"bin", "__pycache__"}
    assert {name for name in names if not name.endswith(".dist-info")} == {"attnopt"}


def test_dependencies_name_no_versions(metadata: Message) -> None:
    needed = [str(line) for line in metadata.get_all("Requires-Dist", [])]
    base = [line.split(";")[0].strip() for line in needed if "extra ==" not in line]
    assert sorted(base) == ["networkx", "sympy", "torch", "triton"]
    triton = next(line for line in needed if line.startswith("triton"))
    assert "linux" in triton
    assert {"onnx", "models", "report"} <= set(metadata.get_all("Provides-Extra", []))


def test_every_constraint_that_is_a_dependency_stays_out_of_the_wheel(metadata: Message) -> None:
    needed = [str(line).split(";")[0] for line in metadata.get_all("Requires-Dist", [])]
    assert not [line for line in needed if "==" in line or "<" in line]


def test_every_module_imports_from_the_wheel_elsewhere(site: Path, tmp_path: Path) -> None:
    names = [_module(name) for name in _sources({".py"}) if not name.endswith("__main__.py")]
    files = _import(names, cwd=tmp_path, path=site)
    assert not [name for name, file in files.items() if site not in file.parents]


@pytest.mark.parametrize("installed", [True, False])
def test_a_checkout_finds_its_own_passes_and_kernels(
    installed: bool, checkout: Path, site: Path
) -> None:
    names = ["attnopt", "attnopt.passes", "attnopt.kernels"]
    files = _import(names, cwd=checkout, path=site if installed else None)
    assert files == {
        "attnopt": checkout / "attnopt/__init__.py",
        "attnopt.passes": checkout / "passes/__init__.py",
        "attnopt.kernels": checkout / "kernels/__init__.py",
    }


def test_the_command_and_the_public_names_exist(site: Path, tmp_path: Path) -> None:
    check = (
        "import attnopt; from importlib.metadata import distribution\n"
        "entry = distribution('attnopt').entry_points.select(name='attnopt')\n"
        "assert callable([e for e in entry if e.group == 'console_scripts'][0].load())\n"
        "assert all(getattr(attnopt, name) is not None for name in attnopt.__all__)\n"
        "assert set(attnopt.__all__) <= set(dir(attnopt))\n"
        "assert distribution('attnopt').version == attnopt.__version__\n"
    )
    _run("-c", check, cwd=tmp_path, path=site)


def test_an_unknown_name_is_an_attribute_error() -> None:
    import attnopt

    with pytest.raises(AttributeError, match="has no attribute 'optimise'"):
        _ = attnopt.optimise  # type: ignore[attr-defined]
