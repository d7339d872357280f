"""How a command ends where memory or the disk fails, and whose folder it refuses."""

import errno
import json
import signal
import warnings
from pathlib import Path

import pytest
import torch

from mimkernels.commands.analyze.config import AnalyzeConfig
from mimkernels.commands.dense.config import DenseConfig
from mimkernels.commands.finetune.config import FinetuneConfig
from mimkernels.commands.pretrain.config import PretrainConfig
from mimkernels.commands.probe.config import ProbeConfig
from mimkernels.engine import files
from mimkernels.engine.command import TrainingError, guarded, told_failures
from mimkernels.engine.files import check_own_folder

CONFIGS = {
    "pretrain": PretrainConfig(), "finetune": FinetuneConfig(), "probe": ProbeConfig(), "dense": DenseConfig(),
    "analyze": AnalyzeConfig(),
}  # fmt: skip


@pytest.mark.parametrize(
    "error",
    [torch.OutOfMemoryError("CUDA out of memory\nmore"), MemoryError(),
     RuntimeError("[enforce fail at alloc_cpu.cpp:118] DefaultCPUAllocator: can't allocate memory")],
    ids=lambda error: type(error).__name__,
)  # fmt: skip
def test_a_want_of_memory_is_one_line_with_a_remedy(tmp_path, error):
    with pytest.raises(TrainingError, match=r"^out of memory on .*: lower it \(.+\)$") as caught:
        with told_failures(tmp_path, torch.device("cpu"), "lower it"):
            raise error
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("error", "told"),
    [(RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. "), "a data-loading process ended"),
     (RuntimeError("DataLoader worker (pid(s) 7, 8) exited unexpectedly"), "a data-loading process ended"),
     (torch.distributed.DistBackendError("NCCL error\nmore"), "another process of the run ended"),
     (RuntimeError("[/gloo/transport/tcp/pair.cc:545] Read error: reset by peer"), "another process of the run ended")],
    ids=["worker", "workers", "nccl", "gloo"],
)  # fmt: skip
def test_a_process_that_is_lost_is_one_line_that_says_how_to_go_on(tmp_path, error, told):
    with pytest.raises(TrainingError, match=rf"^{told}.* \(.+\S\); again$") as caught:
        with told_failures(tmp_path, torch.device("cpu"), "x", lambda: "again"):
            raise error
    assert "\n" not in str(caught.value)


def test_other_errors_stay_what_they_are(tmp_path):
    with pytest.raises(RuntimeError, match="^a bug$") as caught, told_failures(tmp_path, torch.device("cpu"), "x"):
        raise RuntimeError("a bug")
    assert not isinstance(caught.value, TrainingError)


def test_a_full_disk_says_how_to_go_on(tmp_path):
    full = OSError(errno.ENOSPC, "No space left on device", "file")
    with pytest.raises(TrainingError, match="^No space left on device: 'file'; again$"):
        with told_failures(tmp_path, torch.device("cpu"), "x", lambda: "again"):
            raise full


def interrupted(number, going_on):
    with told_failures(Path("output"), torch.device("cpu"), "x", going_on):
        signal.raise_signal(number)


@pytest.mark.parametrize(
    ("going_on", "shown"), [(None, "interrupted\n"), (lambda: "it goes on", "interrupted; it goes on\n")]
)
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interruption_says_how_to_go_on(capsys, number, going_on, shown):
    before = signal.getsignal(signal.SIGTERM)
    assert guarded(lambda: lambda: interrupted(number, going_on), debug=False) == 128 + number
    assert capsys.readouterr().err == f"mimkernels: error: {shown}"
    assert guarded(lambda: interrupted(number, going_on), debug=False) == 128 + number  # while all is checked
    assert capsys.readouterr().err == f"mimkernels: error: {shown}"
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_termination_that_somebody_handles_stays_theirs():
    seen = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: seen.append(number))
    try:
        assert guarded(lambda: lambda: interrupted(signal.SIGTERM, None) or 0, debug=False) == 0
    finally:
        signal.signal(signal.SIGTERM, before)
    assert seen == [signal.SIGTERM]


def test_warnings_are_one_line_without_the_place_in_the_code(capsys):
    def told():
        for text, place in (("a file is broken", files.__file__), ("of another package", __file__)):
            print(warnings.formatwarning(UserWarning(text), UserWarning, place, 3), end="")
        return 0

    before = warnings.formatwarning
    assert guarded(lambda: told, debug=False) == 0 and warnings.formatwarning is before
    first, *others = capsys.readouterr().out.splitlines()
    assert first == "mimkernels: warning: a file is broken" and others[0].endswith("of another package")


@pytest.mark.parametrize("writer", CONFIGS)
def test_a_folder_of_another_command_is_refused(tmp_path, writer):
    (tmp_path / "config.json").write_text(CONFIGS[writer].to_json())
    for name, config in CONFIGS.items():
        if name == writer:
            check_own_folder(tmp_path, type(config))
            continue
        with pytest.raises(ValueError, match=f"output '{tmp_path}' holds what another command, .* its config.json has"):
            check_own_folder(tmp_path, type(config))


@pytest.mark.parametrize("content", ["{", "", "\xff"])
def test_a_damaged_config_is_nobodys(tmp_path, content):
    (tmp_path / "config.json").write_bytes(content.encode("latin-1"))
    check_own_folder(tmp_path, ProbeConfig)
    check_own_folder(tmp_path / "nowhere", ProbeConfig)


def test_somebody_elses_config_is_not_replaced(tmp_path):
    (tmp_path / "config.json").write_text('{"architectures": ["ViT"]}')
    with pytest.raises(ValueError, match="its config.json has architectures, which are no settings of this command"):
        check_own_folder(tmp_path, ProbeConfig)


def test_a_folder_of_another_version_is_not_called_one_of_another_command(tmp_path):
    saved = {**DenseConfig().to_dict(), "reader": "linear"}
    (tmp_path / "config.json").write_text(json.dumps(saved))
    with pytest.raises(ValueError, match=r"or another version of this one, wrote: its config\.json has reader, which"):
        check_own_folder(tmp_path, DenseConfig)
