"""Spec and Schedule: text, equality, operands, errors."""

import copy
import json
import math
import pickle

import pytest

from attnopt.ir import expr as E
from attnopt.ir.mask import ALL, Causal, KeyKeep, Select
from attnopt.ir.spec import Operand, Schedule, Spec, leading_axes

q, k = E.index("q"), E.index("k")
SPECS = [
    Spec(),
    Spec(logits=E.score * 0.125 + E.load("bias"), mask=Causal() & KeyKeep("pad"),
         empty_row="uniform", dropout=0.1, compute="float32",
         operands=(Operand("bias", ("h", "q", "k"), role="bias"),
                   Operand("pad", ("b", "k"), E.BOOL, "mask"))),
    Spec(score="key", logits=E.load("table", E.index("h"), q - k), normalizer="sigmoid", l1=True,
         operands=(Operand("table", None, role="table"),)),
    Spec(score="additive", operands=(Operand("score_weight", ("h",), role="score"),)),
    Spec(mask=Select("h", (Causal(), ALL)), groups=k // 4, sinks=E.load("sink"),
         weights=E.weight * E.where(E.stat("mass:1") > 0.5, 0.5, 1.0), renormalize=True,
         output=E.out + E.value * math.nan, mix_logits="before", mix_weights="after",
         operands=(Operand("sink", ("h",), role="sink"), Operand("before", ("h",), role="mix"),
                   Operand("after", ("h",), role="mix"))),
]


@pytest.mark.parametrize("made", SPECS, ids=range(len(SPECS)))
def test_text_is_canonical(made: Spec) -> None:
    text = str(made)
    assert Spec.parse(text) == made and str(Spec.parse(text)) == text
    assert Spec.parse(text) is Spec.parse(text)  # parsed once
    assert hash(Spec.parse(text)) == hash(made)
    assert pickle.loads(pickle.dumps(made)) == made and copy.deepcopy(made) == made
    assert json.loads(text)["attention"] == 1


def test_the_default_has_a_short_text() -> None:
    assert str(Spec()) == '{"attention":1}'


@pytest.mark.parametrize(("fields", "message"), [
    ({"score": "cosine"}, "score must be one of dot, distance"),
    ({"normalizer": "tanh"}, "normalizer must be one of softmax"),
    ({"empty_row": "one"}, "empty_row must be one of nan, zero, uniform, got 'one'"),
    ({"dropout": 1.5}, "dropout must be in .0, 1., got 1.5"),
    ({"logits": E.load("bias")}, "declare every slot, got no .'bias'."),
    ({"mask": KeyKeep("pad")}, "got no .'pad'."), ({"mix_weights": "m"}, "got no .'m'."),
    ({"score": "additive"}, "got no .'score_weight'."),
    ({"operands": (Operand("a", None), Operand("a", None))}, "distinct slots"),
])
def test_what_cannot_be_said_is_refused(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Spec(**fields)  # type: ignore[arg-type]


@pytest.mark.parametrize("text", ["", "dot", "[]", "{}", '{"attention":99}', '{"attention":1,"l1"'])
def test_text_that_is_no_spec_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="spec must be"):
        Spec.parse(text)


def test_operands() -> None:
    with pytest.raises(ValueError, match="role must be one of bias"):
        Operand("bias", None, role="pretty")
    made = SPECS[1]
    assert made.operand("pad").dtype == E.BOOL and made.slots == {"bias", "pad"}
    assert made.with_(mask=ALL).operands == made.operands[:1]
    more = made.with_(mask=ALL, logits=E.load("new"), more=(Operand("new", ("k",)),))
    assert [o.slot for o in more.operands] == ["new"]


def test_leading_axes_count_from_the_right() -> None:
    assert [leading_axes(n) for n in range(5)] == [
        (), ("h",), ("b", "h"), ("b1", "b", "h"), ("b2", "b1", "b", "h")]


def test_schedule_text() -> None:
    made = Schedule("aten:blocks", (64, 128))
    assert Schedule.parse(str(made)) == made and str(made) == '["aten:blocks",64,128]'
    assert Schedule.parse(str(Schedule())) == Schedule()
