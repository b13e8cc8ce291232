"""Which tests of the lowerings are slow: those that compile a kernel for each of their cases."""

import pytest

#: tests that run every lowering; with schedule "cpp" each case of them is another kernel
COMPILING = {"test_lengths", "test_leading_axes", "test_a_bias_of_another_dtype"}
COMPILING_FOR_HALF = {"test_every_case"}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        call = getattr(item, "callspec", None)
        if call is None or call.params.get("schedule") != "cpp":
            continue
        name = getattr(item, "originalname", "")
        half = "float32" not in str(call.params.get("dtype", "float32"))
        if name in COMPILING or name in COMPILING_FOR_HALF and half:
            item.add_marker(pytest.mark.slow)
