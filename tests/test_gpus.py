"""Which GPUs the kernels run on, said of GPUs that are not here."""

from dataclasses import replace

import pytest
import torch

from mimkernels import info
from mimkernels.ops import _gpus, _native, _registry
from mimkernels.ops._registry import Impl, OpSpec

SPEC = OpSpec("all_rows", {}, {}, (Impl("triton"), Impl("cuda"), Impl("reference")))
RELEASE = {"nvcc": "13.0.88", "cuda_architectures": "80 90a-real 100"}


@pytest.fixture
def gpus(monkeypatch):
    """Called with capabilities by index, the build of the CUDA library and the driver's CUDA: these are here."""

    def place(*capabilities, build=RELEASE, driver=(13, 0)):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: len(capabilities))
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index=None: capabilities[index or 0])
        library = replace(_native.library("cuda"), loaded=True, reason=None, build=build)
        monkeypatch.setitem(_native._LIBRARIES, "cuda", library)
        monkeypatch.setattr(_registry, "_UNAVAILABLE", {})
        monkeypatch.setattr(_gpus, "driver_version", lambda: driver)

    return place


def resolved(backend, index):
    return SPEC.resolve(backend, torch.device("cuda", index), torch.float32)


def test_an_old_gpu_gets_plain_pytorch_and_its_neighbour_the_kernels(gpus):
    gpus((9, 0), (7, 5))
    assert [resolved("auto", index) for index in (0, 1)] == ["triton", "reference"]
    assert SPEC.resolve("auto", "cuda", torch.float32) == "triton", "a type is the current device"
    assert resolved("triton", 1) == "triton", "by name"
    with pytest.raises(NotImplementedError, match="cuda: needs compute capability 8.0 or later, this device has 7.5"):
        resolved("cuda", 1)


def test_a_driver_older_than_the_toolkit_is_named_before_a_launch_fails(gpus):
    gpus((8, 0), driver=(12, 8))
    assert resolved("auto", 0) == "triton"
    wanted = "built by nvcc 13.0, which needs a driver for CUDA 13 or later; this driver is for CUDA 12.8 .* nvcc 12.x"
    with pytest.raises(NotImplementedError, match=wanted):
        resolved("cuda", 0)
    gpus((8, 0), build={**RELEASE, "nvcc": "12.8.93"}, driver=(12, 4))
    assert resolved("cuda", 0) == "cuda", "drivers serve every toolkit of their major version"


@pytest.mark.parametrize("build", [{}, {"nvcc": ""}, {"nvcc": "13.0", "cuda_architectures": "native"}])
def test_what_is_not_known_of_the_build_refuses_nothing(gpus, build):
    gpus((8, 9), build=build, driver=None)
    assert resolved("cuda", 0) == "cuda"


def test_a_library_of_other_architectures_is_refused(gpus):
    gpus((9, 0), build={**RELEASE, "cuda_architectures": "86-real"})
    with pytest.raises(NotImplementedError, match="built for 86-real alone, this device has compute capability 9.0"):
        resolved("cuda", 0)


@pytest.mark.parametrize(
    ("architectures", "capability", "code"),
    [
        *(("80 90a-real 100", capability, "machine code") for capability in ((8, 0), (8, 6), (8, 9), (9, 0), (10, 3))),
        *(("80 90a-real 100", capability, "PTX") for capability in ((11, 0), (12, 0), (12, 1))),
        ("80 90a-real 100", (7, 5), None),
        ("80-virtual", (8, 0), "PTX"),
        ("80-virtual", (9, 0), "PTX"),
        ("86-real", (8, 0), None),
        ("90a-real", (9, 0), "machine code"),
        ("100a", (10, 3), None),
        ("100f", (10, 3), "machine code"),
        ("100f", (12, 0), None),
        ("120-real", (12, 1), "machine code"),
        ("native", (9, 0), "machine code"),
        ("", (9, 0), "machine code"),
    ],
)
def test_what_a_library_has_for_a_device(architectures, capability, code):
    assert _gpus.code_for(architectures, capability) == code


def test_info_says_why_no_device_runs_a_backend(gpus, monkeypatch):
    gpus((7, 5), (7, 0))
    backends = {backend.name: info._backend(backend) for backend in _registry.BACKENDS.values()}
    for name in ("triton", "cuda"):
        assert not backends[name]["available"] and backends[name]["remedy"]
        assert backends[name]["reason"].endswith("this device has 7.5")
    gpus((7, 5), (8, 6))
    assert info._backend(_registry.BACKENDS["cuda"])["available"]


def test_without_a_device_nothing_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert _gpus.refusal("cuda", 0, named=False) is None


def test_the_driver_is_asked_without_torch(monkeypatch):
    class Driver:
        @staticmethod
        def cuDriverGetVersion(version):
            version._obj.value = 12080
            return 0

    monkeypatch.setattr(_gpus.ctypes, "CDLL", lambda name: Driver)
    assert _gpus.driver_version() == (12, 8)

    def missing(name):
        raise OSError(name)

    monkeypatch.setattr(_gpus.ctypes, "CDLL", missing)
    assert _gpus.driver_version() is None


def test_a_traced_call_asks_of_its_device():
    calls = []

    def ask(x):
        calls.append(1)
        return x + (1 if _gpus.refusal("cuda", None, False) is None else 2)

    assert torch.compile(ask, backend="eager", fullgraph=True)(torch.zeros(())).item() == 1
