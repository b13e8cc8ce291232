"""Every model of the zoo: all its attention accounted for, its outputs as exact as they were."""

from __future__ import annotations

import pytest

pytest.importorskip("transformers")

from tests.models import sweep, zoo  # noqa: E402  (after the skip)

#: the architectures on which a peer's rewriter was measured
PEERS = (
    "bert", "bert_mask", "gpt2", "llama", "gemma2", "gpt_oss", "t5_encoder", "swin", "swinv2",
    "vit", "beit", "clip_text", "bart", "deberta_v2", "bloom", "mpt", "whisper_encoder",
)
#: what else a quick run should touch: detection, protein, audio, sampling, a failing export
QUICK = (*PEERS, "esm", "detr", "deformable_detr", "wavlm", "sam_vision", "longformer")

ENTRIES = zoo.registry()


def _check(row: sweep.Row) -> None:
    assert row.share <= 1.0, f"error {row.error:.3g} is {row.share:.3g} of its bound"
    assert not row.missing, f"nodes that the report does not mention: {row.missing}"
    assert row.found == row.rewritten + row.canonical + row.kept
    assert all(reason.partition("] ")[2] for reason in row.reasons), row.reasons
    if row.exported:
        assert row.found >= row.nodes
        if row.rewritten:
            assert row.hits == sweep.DRAWS, f"own forward: {row.misses} {row.notes}"


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow)
             for name in ENTRIES]
)
def test_model(name: str) -> None:
    _check(sweep.examine(ENTRIES[name]))


@pytest.mark.parametrize(
    "name", [name if name in QUICK[::4] else pytest.param(name, marks=pytest.mark.slow)
             for name in QUICK]
)
def test_verified_model(name: str) -> None:
    _check(sweep.examine(ENTRIES[name], verify=True))


def test_the_zoo_is_wide() -> None:
    assert len(ENTRIES) >= 80
    assert set(QUICK) <= set(ENTRIES)
    assert {entry.family for entry in ENTRIES.values()} == {
        "text", "vision", "audio", "multimodal"}
