"""Says which folder becomes which package; everything else is in pyproject.toml.

passes/ and kernels/ lie at the top of the repository but install inside attnopt: a top-level
package called `kernels` would shadow the one on PyPI that transformers looks for. A new sub-package
needs an __init__.py and nothing here.
"""

from setuptools import find_packages, setup

INSIDE = ["passes", "kernels"]

inside = find_packages(include=[pattern for name in INSIDE for pattern in (name, f"{name}.*")])

setup(
    packages=find_packages(include=["attnopt", "attnopt.*"]) + [f"attnopt.{p}" for p in inside],
    package_dir={f"attnopt.{name}": name for name in INSIDE},
)
