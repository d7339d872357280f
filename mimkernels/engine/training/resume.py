"""Where a run begins: at its first step, or at a checkpoint that fits its settings and its data."""

from pathlib import Path
from typing import Any

from mimkernels.data.batches import BatchPlan
from mimkernels.data.sources import Source
from mimkernels.engine import checkpoint
from mimkernels.engine.checkpoint import CheckpointFolder, Newest
from mimkernels.engine.settings import changes
from mimkernels.engine.training.config import TrainingConfig


def saved_config(content: dict[str, Any], path: Path, kind: type[TrainingConfig]) -> TrainingConfig:
    """The settings that a checkpoint was trained with; ValueError names the file and what is wrong with them.

    Args:
        kind: the settings of the command that is to continue it.
    """
    method = content["config"].get("method")
    if "method" in content["config"] and method not in kind.methods:
        raise ValueError(
            f"checkpoint {str(path)!r} is of method {method!r}, which this command does not continue: only "
            f"{', '.join(kind.methods)}"
        )
    try:
        return kind.from_dict(content["config"])
    except ValueError as e:
        raise ValueError(f"checkpoint {str(path)!r} is malformed: config: {e}") from e


def settings_to_continue(resume: str, output: str, kind: type[TrainingConfig]) -> dict[str, Any]:
    """Settings saved in the checkpoint that ``--resume`` means; empty if there is none to continue yet.

    A run goes on in the folder that it is found in, wherever that was when it began; from a file outside of a run's
    folder it goes on in `output`.
    """
    newest = checkpoint.find(resume, output)
    if newest.path is None:
        return {}
    saved = saved_config(newest.content, newest.path, kind).to_dict()
    path = newest.path if newest.path.parent.name else newest.path.absolute()
    of_run = path.parent.name == "checkpoints"
    return {**saved, "output": str(path.parent.parent) if resume != "auto" and of_run else output}


def find_start(config: TrainingConfig, checkpoints: CheckpointFolder, resume: str | None, overwrite: bool) -> Newest:
    """The checkpoint to continue from, checked against the settings; its path is None to start anew.

    Raises:
        ValueError: the output holds a run that would be overwritten, there is no checkpoint at `resume`, or it is of
            another architecture; or a run is both to be continued and to be replaced.
    """
    output = Path(config.output)
    if resume is not None and overwrite:
        raise ValueError(
            f"--resume {resume} continues a run and --overwrite replaces the one in {str(output)!r}: give one of them"
        )
    if resume is None:
        newest = checkpoints.latest()
        if newest is not None and not overwrite:
            raise ValueError(
                f"{str(output)!r} already holds a run ({newest.name}): continue it with --resume, "
                "replace it with --overwrite, or choose another --output"
            )
        return Newest(None, {}, {})
    start = checkpoint.find(resume, config.output)
    if start.path is None:
        if resume != "auto":
            raise ValueError(f"{resume!r} holds no checkpoint to resume from")
        return start
    damaged = {path: reason for path, reason in start.damaged.items() if path.parent == checkpoints.folder}
    for other in checkpoints.newest_first():
        if other.resolve() == start.path.resolve():
            break
        reason = damaged.get(other) or checkpoint.damage_of(other)
        if reason is not None:
            damaged[other] = reason
            continue
        raise ValueError(
            f"{str(output)!r} already holds {other.name}, resuming from {str(start.path)!r} would overwrite what came "
            "after it: choose another --output"
        )
    _check_same_architecture(saved_config(start.content, start.path, type(config)), config, str(start.path))
    return start._replace(damaged=damaged)


def _check_same_architecture(saved: TrainingConfig, now: TrainingConfig, path: str) -> None:
    """Refuse a checkpoint of another architecture or method, showing both sides."""
    different = changes(saved, now, now.architecture)
    if different:
        raise ValueError(
            f"checkpoint {path!r} is of another architecture or method (checkpoint -> asked for): "
            f"{'; '.join(different)}"
        )


def check_same_teachers(start: dict[str, Any], now: dict[str, str]) -> None:
    """Refuse to continue with another teacher than that of the checkpoint, which would give another run."""
    saved = start.get("teachers")  # what the checkpoints of before have not
    for name, identity in now.items():
        if isinstance(saved, dict) and name in saved and saved[name] != identity:
            raise ValueError(
                f"the {name}'s teacher is not that of the checkpoint: {str(saved[name])[:32]} in the checkpoint, "
                f"{identity} now (digests of the weights); restore its file or start a new run"
            )


def check_same_stream(start: dict[str, Any], source: Source, plan: BatchPlan) -> None:
    """Refuse to continue on other images, or with another effective batch; both would give another run."""
    if start["data"] != source.fingerprint():
        raise ValueError(
            f"the data are not those of the checkpoint: {start['data']} in the checkpoint, {source.fingerprint()} now; "
            "restore them or start a new run"
        )
    if start["effective_batch"] != plan.effective_batch:
        raise ValueError(
            f"the effective batch (batch_size x accum_steps x processes) is {start['effective_batch']} in the "
            f"checkpoint and {plan.effective_batch} now; adjust --batch-size or --accum-steps"
        )


def check_what_is_left(start: dict[str, Any], config: TrainingConfig, plan: BatchPlan) -> None:
    """Refuse settings by which no step would be trained: the run would be recorded as one that they gave."""
    step, total = start["step"], config.epochs * plan.steps_per_epoch
    if step < total:
        return
    names = [name for name in config.results if name != "epochs" or step > total]
    different = changes(type(config).from_dict(start["config"]), config, names)
    if different:
        raise ValueError(
            f"the checkpoint is at step {step:,} (epoch {start['epoch']:.1f}) and epochs {config.epochs} end at step "
            f"{total:,}: nothing is left to train with what was changed (checkpoint -> asked for: "
            f"{'; '.join(different)}); give more --epochs, or leave that out"
        )
