"""Device facts: what is shipped, look-up by name, calibration files."""

import dataclasses
import stat
from pathlib import Path

import pytest

from attnopt import environment
from attnopt.cost.devices import (
    Cpu,
    Gpu,
    calibration_path,
    find_cpu,
    find_gpu,
    from_json,
    load,
    save,
    shipped,
    to_json,
)


def test_shipped_devices_are_complete() -> None:
    gpus = {d.name: d for d in shipped() if isinstance(d, Gpu)}
    assert len(gpus) == 8
    for device in shipped():
        assert from_json(to_json(device)) == device
        assert device.source and not device.calibrated and not device.hint
        assert bool(device.match) != device.name.startswith("default")
    for gpu in gpus.values():
        assert gpu.arch or gpu.name.startswith("default")
        assert gpu.smem_block + gpu.smem_reserved <= gpu.smem
        assert {"bfloat16", "float16", "tfloat32"} <= set(gpu.matrix) and "triton" in (
            gpu.coefficients)
    cpus = [d for d in shipped() if isinstance(d, Cpu)]
    assert {d.isa for d in cpus} >= {"avx512", "avx2", "neon", "generic"}


@pytest.mark.parametrize(("name", "peak"), [
    ("NVIDIA H200", 989), ("NVIDIA H100 80GB HBM3", 989), ("NVIDIA A100-SXM4-80GB", 312),
    ("NVIDIA L4", 121), ("NVIDIA GeForce RTX 4090", 165), ("NVIDIA B200", 2250),
    ("AMD Instinct MI300X", 1307)])
def test_rates_are_those_of_the_datasheet(name: str, peak: float) -> None:
    gpu = find_gpu(name)
    assert not gpu.hint and gpu.name != "default GPU"
    # Hopper's clock is the one under load; its datasheet counts 1.83 GHz.
    clock = 1.83 if gpu.arch == "sm_90" else gpu.clock
    assert gpu.sms * clock * gpu.matrix["bfloat16"] * 1e-3 == pytest.approx(peak, rel=0.01)


def test_unknown_devices_get_a_default_and_a_hint() -> None:
    gpu = find_gpu("Some Card 9000")
    assert gpu.sms == 108 and gpu.name == "Some Card 9000" and "attnopt calibrate" in gpu.hint
    assert find_gpu("Some Hopper", arch="sm_90").sms == 132
    assert find_gpu("NVIDIA H100 PCIe").hint  # another card than the one that is known
    for isa, width in (("avx512", 16), ("avx2", 8), ("neon", 4), ("generic", 4), ("strange", 4)):
        cpu = find_cpu("Some CPU", isa, cores=6)
        assert (cpu.width, cpu.cores) == (width, 6) and "attnopt calibrate" in cpu.hint
        assert cpu.name == "Some CPU" and not cpu.match
    assert find_cpu("").name.startswith("default")


def test_a_known_cpu_is_known_for_its_instructions() -> None:
    assert find_cpu("AMD EPYC 9B14", "avx512").gemm["float32"] == 97
    # With half of its vector registers it is not what was measured.
    assert find_cpu("AMD EPYC 9B14", "avx2").width == 8


def test_a_cpu_whose_product_is_hidden_is_known_by_its_model() -> None:
    assert find_cpu("AMD EPYC, family 25, model 17", "avx512").name == "AMD EPYC (Zen 4)"
    assert find_cpu("AMD EPYC, family 25, model 1", "avx2").hint  # Zen 3


@pytest.mark.parametrize(("text", "name"), [
    ("model name\t: Xeon @ 2.50GHz\ncpu family\t: 6\nmodel\t: 85\n", "Xeon @ 2.50GHz"),
    ("cpu family\t: 25\nmodel\t: 17\nmodel name\t: AMD EPYC\n", "AMD EPYC, family 25, model 17"),
    ("model name\t: Neoverse\n", "Neoverse")])
def test_the_name_of_a_cpu(monkeypatch: pytest.MonkeyPatch, text: str, name: str) -> None:
    monkeypatch.setattr(Path, "read_text", lambda *_: text)
    assert environment.processor()["model"] == name


def test_calibrations_come_first(tmp_path: Path) -> None:
    own = dataclasses.replace(find_gpu("NVIDIA L4"), name="NVIDIA L4", clock=1.2, calibrated=True)
    path = calibration_path(tmp_path / "devices", "gpu", "NVIDIA L4")
    assert path.name == "gpu-nvidia-l4.json"
    save(own, path)
    assert load(path) == own and stat.S_IMODE(path.stat().st_mode) == 0o600
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    assert find_gpu("NVIDIA L4", folder=path.parent) == own
    assert find_gpu("NVIDIA L4").clock != 1.2
    cpu = dataclasses.replace(find_cpu("My CPU", "avx2"), calibrated=True, hint="",
                              coefficients={"fma": 0.4})
    save(cpu, calibration_path(tmp_path, "cpu", "My CPU"))
    assert find_cpu("My CPU", "avx2", cores=3, folder=tmp_path) == dataclasses.replace(cpu, cores=3)
    assert find_cpu("My CPU", "avx512", folder=tmp_path).hint  # of other instructions


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"version": 0, "kind": "gpu", "name": "x"}',
                                  '{"version": 1, "kind": "tpu", "name": "x"}',
                                  '{"version": 1, "kind": "gpu"}',
                                  '{"version": 1, "kind": "gpu", "name": "x", "sm": 3}'])
def test_files_that_are_no_device(text: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="must"):
        from_json(text)
    calibration_path(tmp_path, "gpu", "x").write_text(text)
    assert find_gpu("x", folder=tmp_path).hint  # such a file is passed over
