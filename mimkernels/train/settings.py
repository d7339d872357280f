"""The settings of a run that is to be continued."""

from pathlib import Path
from typing import Any

from mimkernels.train.checkpoint import CheckpointFolder, load


def settings_to_continue(resume: str, output: str) -> dict[str, Any]:
    """Settings saved in the checkpoint that ``--resume`` means; empty if there is none to continue yet.

    A run goes on in the folder that it is found in, wherever that was when it began.
    """
    folder = Path(output if resume == "auto" else resume)
    path = CheckpointFolder(folder / "checkpoints", 1).latest() if resume == "auto" or folder.is_dir() else folder
    if path is None:
        return {}
    return {**load(path)["config"], "output": output if resume == "auto" else str(path.parent.parent)}
