"""The fit on recorded measurements: tiles chosen for shapes that it has not seen."""

import csv
import dataclasses
from collections import defaultdict
from pathlib import Path

import pytest

from attnopt.cost import cpu
from attnopt.cost.devices import Cpu, find_cpu, find_gpu
from attnopt.cost.fit import Row, calibrated, fit
from attnopt.cost.fit_gpu import Measured, fit_kernel
from attnopt.cost.fit_gpu import calibrated as calibrated_gpu
from attnopt.cost.gpu import Kernel, seconds
from attnopt.cost.tiles import count_tiles
from attnopt.cost.work import Work, work_of
from attnopt.ir import expr as E
from attnopt.ir.mask import Band, Causal
from attnopt.ir.spec import Spec

DATA = Path(__file__).parent / "data" / "cpu_cascade_lake.csv"
SPECS = {"dense": Spec(), "causal": Spec(mask=Causal()), "band": Spec(mask=Band(-127, 0)),
         "softcap": Spec(logits=E.call("tanh", E.score * 0.02) * 50.0)}
DEFAULT = find_cpu("Some CPU", "avx512")
Shape = tuple[str, int, int, int]
Tile = tuple[int, ...]


def measured() -> dict[Shape, dict[Tile, Row]]:
    found: dict[Shape, dict[Tile, Row]] = defaultdict(dict)
    with open(DATA, encoding="utf-8", newline="") as file:
        for row in list(csv.reader(line for line in file if line[0] != "#"))[1:]:
            heads, length, head_dim, *tile = map(int, row[1:8])
            spec, shape = SPECS[row[0]], (1, heads, length, head_dim)
            counts = count_tiles(spec.mask, length, length, tile[0], tile[1], tail=True)
            features = cpu.features(DEFAULT, work_of(spec, shape, shape, shape), counts, tile)
            found[(row[0], heads, length, head_dim)][tuple(tile)] = Row(
                features, float(row[8]) * 1e-3)
    return found


@pytest.fixture(scope="module")
def rows() -> dict[Shape, dict[Tile, Row]]:
    found = measured()
    assert len(found) == 32 and sum(map(len, found.values())) > 600
    return found


def regrets(device: Cpu, shapes: dict[Shape, dict[Tile, Row]]) -> list[float]:
    """For each shape, by how much the tile chosen is slower than the best one that was measured."""
    found = []
    for tiles in shapes.values():
        chosen = min(tiles, key=lambda tile: cpu.weigh(device, tiles[tile].features))
        found.append(tiles[chosen].seconds / min(r.seconds for r in tiles.values()) - 1)
    return sorted(found)


@pytest.mark.parametrize("fold", range(2))
def test_tiles_for_unseen_shapes(rows: dict[Shape, dict[Tile, Row]], fold: int) -> None:
    unseen = {shape: tiles for i, (shape, tiles) in enumerate(rows.items()) if i % 2 == fold}
    seen = [r for shape, tiles in rows.items() if shape not in unseen for r in tiles.values()]
    made = fit(seen, cpu.COEFFICIENTS)
    device = dataclasses.replace(DEFAULT, coefficients=made.coefficients)
    found = regrets(device, unseen)
    assert len(found) == len(rows) // 2
    assert sum(r <= 0.10 for r in found) >= 0.9 * len(found) and found[len(found) // 2] < 0.03
    errors = [abs(cpu.weigh(device, r.features) * 1e-9 / r.seconds - 1)
              for tiles in unseen.values() for r in tiles.values()]
    assert sum(errors) / len(errors) < 0.12


def test_defaults_are_not_far_off(rows: dict[Shape, dict[Tile, Row]]) -> None:
    found = regrets(DEFAULT, rows)
    assert sum(r <= 0.10 for r in found) >= 0.9 * len(found)


def test_a_calibrated_cpu(rows: dict[Shape, dict[Tile, Row]]) -> None:
    some = [r for tiles in rows.values() for r in tiles.values()]
    made = calibrated(DEFAULT, "My CPU", some)
    assert made.calibrated and not made.hint and made.name == "My CPU" and "624" in made.source
    assert "thread" not in made.coefficients and made.coefficients["fma"] > 0


# -- GPU kernels ----------------------------------------------------------------------------------
def launches() -> list[Measured]:
    """The published sweep of cuDNN, without the longest launches."""
    found = []
    aligned = Causal(E.size("k") - E.size("q"))
    with open(DATA.with_name("cudnn_h200_prefill.csv"), encoding="utf-8", newline="") as file:
        for row in list(csv.reader(line for line in file if line[0] != "#"))[1:]:
            q, k, h = map(int, row[:3])
            if q < 16384:
                counts = count_tiles(aligned, q, k, 128, 128)
                found.append(Measured(Work(h, 8, q, k, 128, 128, "bfloat16"), counts, (128, 128),
                                      float(row[3]) * 1e-3))
    return found


def test_a_gpu_kernel_is_fitted() -> None:
    """From the numbers of another kernel to 4 % of the published times."""
    h200 = find_gpu("NVIDIA H200")
    found = fit_kernel(h200, launches())
    assert found.mean <= 0.04 and found.worst <= 0.1
    assert 3 <= found.kernel.launch <= 8
    made = calibrated_gpu(h200, "NVIDIA H200", "own", launches()[:6])
    assert made.calibrated and set(made.coefficients) == {*h200.coefficients, "own"}
    with pytest.raises(ValueError, match="positive times"):
        fit_kernel(h200, [])


def test_what_a_fit_made_is_found_again() -> None:
    h200 = find_gpu("NVIDIA H200")
    true = Kernel(launch=9.0, efficiency=0.8, masked=0.8, epilogue=1.0)
    source = dataclasses.replace(h200, coefficients={"own": dataclasses.asdict(true)})
    rows = []
    for n, h in ((256, 1), (1024, 4), (2048, 16), (4096, 32)):
        for spec in (Spec(), SPECS["causal"], SPECS["band"]):
            counts = count_tiles(spec.mask, n, n, 128, 64)
            work = Work(h, h, n, n, 64, 64, "bfloat16")
            rows.append(Measured(work, counts, (128, 64), seconds(
                source, "own", work, counts, (128, 64))))
    found = fit_kernel(h200, rows)
    assert found.mean < 0.03 and found.kernel.masked == pytest.approx(0.8, abs=0.25)
