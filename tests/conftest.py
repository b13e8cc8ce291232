"""What every test has: one thread, a fixed seed, `--shard`, and GPU tests skipped without a GPU."""

import pytest
import torch


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--shard", metavar="I/N", help="run only every N-th test, beginning with I")


def pytest_configure(config: pytest.Config) -> None:
    torch.set_num_threads(1)


def _parse_shard(text: str) -> tuple[int, int]:
    index, _, count = text.partition("/")
    if not (index.isdecimal() and count.isdecimal() and 1 <= int(index) <= int(count)):
        raise pytest.UsageError(f"--shard must be I/N with 1 <= I <= N, got {text!r}")
    return int(index), int(count)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--shard"):
        index, count = _parse_shard(config.getoption("--shard"))
        others = [item for place, item in enumerate(items) if place % count != index - 1]
        config.hook.pytest_deselected(items=others)
        items[:] = items[index - 1 :: count]
    if not torch.cuda.is_available():
        skip = pytest.mark.skip(reason="needs a CUDA device")
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(skip)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
