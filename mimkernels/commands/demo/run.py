"""The demo: ``pretrain``, then ``probe``, with settings for handwritten digits on two CPU cores."""

from pathlib import Path

from mimkernels.commands.pretrain.config import PretrainConfig
from mimkernels.commands.pretrain.run import Run
from mimkernels.commands.probe.config import ProbeConfig
from mimkernels.commands.probe.run import ProbeRun
from mimkernels.engine.page import write_page
from mimkernels.engine.training.run import RunResult

_TITLE = "A masked autoencoder learns handwritten digits"


def demo_config(output: str = "runs/demo", epochs: int | None = None) -> PretrainConfig:
    """Small enough for two minutes on two cores, large enough that the reconstructions can be recognised."""
    epochs = 40 if epochs is None else epochs
    return PretrainConfig(
        title=_TITLE,
        data="digits",
        img_size=32,
        in_chans=1,
        patch_size=4,
        model_kwargs={"embed_dim": 96, "depth": 4, "num_heads": 3},
        decoder_dim=64,
        decoder_depth=2,
        decoder_heads=4,
        mask_ratio=0.75,
        crop_scale=1.0,  # the masks alone vary the images enough, and nothing is resized twice
        norm_pix_loss=False,
        batch_size=50,
        epochs=epochs,
        warmup_epochs=epochs / 20,
        lr=3e-3,
        head_stats="entropy,distance,prefix_mass",
        head_stats_every=200,
        val_every=max(1, epochs // 4),
        save_every=max(1, epochs // 3),
        output=output,
    )


def demo_probe_config(output: str = "runs/demo") -> ProbeConfig:
    """What the demo's encoder has learned, read from its tokens in four ways."""
    return ProbeConfig(
        model=output,
        data="digits",
        pooling="cls,mean,abmilp,ep",
        batch_size=100,
        epochs=30,
        output=str(Path(output) / "probe"),
        title="What the demo's frozen features know",
    )


class DemoRun(Run):
    """Pre-training, then the probe of what came of it, while the folder is held for both.

    Attributes:
        closing_words: what to say at the end; empty where a signal ended it early.
    """

    closing_words = ""

    def _execute(self) -> RunResult:
        result = super()._execute()
        if not result.stopped_by:
            result.stopped_by, self.closing_words = _probe_and_close(result)
        return result

    def _going_on(self) -> str:
        return "the same command begins anew"

    def _to_continue(self) -> str:
        return f"the same command begins anew, `mimkernels pretrain --output {self.output} --resume` continues"


def prepare_demo(output: str, epochs: int | None) -> DemoRun:
    """The checked run. A demo replaces an earlier demo, and nothing else."""
    config = demo_config(output, epochs)
    saved = Path(output) / "config.json"
    earlier = saved.is_file() and PretrainConfig.load(saved).title == _TITLE
    return DemoRun(config, overwrite=earlier)


def _probe_and_close(result: RunResult) -> tuple[int, str]:
    """Probe the trained encoder; the signal that ended it early, or 0, and the closing words."""
    print("\nThe encoder is trained and frozen. How well do linear layers read digits from its tokens?")
    run = ProbeRun(demo_probe_config(str(result.output)), overwrite=True)
    probed = run.execute()
    if probed.stopped_by:
        return probed.stopped_by, ""
    assert result.report is not None and result.content is not None
    write_page(
        result.report,
        "commands/demo/templates/report.html",
        title=result.content.title,
        training=result.content,
        probing=probed.content,
    )
    return 0, _closing_words(result)


def _closing_words(result: RunResult) -> str:
    return f"""
The report is {result.report} (open it in a browser).

Next, on images of your own (a folder, with or without class folders):
  mimkernels pretrain --data DIR --model vit_small_patch16_224 --output runs/mine
What its features know (class folders):
  mimkernels probe --model runs/mine --data DIR --output runs/mine-probe
The training curves:
  tensorboard --logdir {result.output}
The encoder, in the format of the published MAE checkpoints:
  {result.output / "mae_checkpoint.pth"}"""
