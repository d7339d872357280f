"""The demo: pre-training, a probe, and one report of both."""

import signal

import pytest

from mimkernels.cli import main
from mimkernels.commands.demo.run import demo_config, demo_probe_config, prepare_demo
from mimkernels.commands.pretrain.run import pretrain
from mimkernels.commands.probe.run import ProbeRun
from tests.engine.test_lock import in_use


@pytest.fixture(autouse=True)
def short_demo(monkeypatch):
    def small(output, epochs):
        config = demo_config(output, epochs)
        config.batch_size, config.pictures, config.img_size = 500, 2, 16
        return config

    def short(output):
        config = demo_probe_config(output)
        config.epochs = 1
        return config

    monkeypatch.setattr("mimkernels.commands.demo.run.demo_config", small)
    monkeypatch.setattr("mimkernels.commands.demo.run.demo_probe_config", short)


def test_the_demo_trains_probes_reports_and_may_be_repeated(tiny, tmp_path, capsys):
    output = tmp_path / "demo"
    for _ in range(2):
        assert main(["demo", "--output", str(output), "--epochs", "1"]) == 0
        told = capsys.readouterr().out
        assert str(output / "report.html") in told and "mimkernels pretrain --data DIR" in told
        assert "abmilp" in told and "297 test images" in told
        page = (output / "report.html").read_text()
        assert page.count("Reconstructions</h2>") == page.count("What frozen features know</h2>") == 1
        assert page.rstrip().endswith("</html>") and "Where poolings look" in page
        assert page.count("What was run</h2>") == 1 and page.index("Where poolings look") < page.index("What was run")
    pretrain(tiny(output=str(tmp_path / "mine")))
    assert main(["demo", "--output", str(tmp_path / "mine"), "--epochs", "1"]) == 2  # not a demo: never replaced


def test_a_second_demo_is_refused_while_the_first_probes(tmp_path, capsys, monkeypatch):
    output = str(tmp_path / "demo")

    def meanwhile(self):
        with pytest.raises(ValueError, match=in_use()):
            prepare_demo(output, 1)
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(ProbeRun, "_execute", meanwhile)
    assert main(["demo", "--output", output, "--epochs", "1"]) == 130
    assert capsys.readouterr().err.endswith("interrupted; the same command begins anew\n")
