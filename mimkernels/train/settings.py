"""The settings of a run that is to be continued."""

from typing import Any

from mimkernels.train.checkpoint import find


def settings_to_continue(resume: str, output: str) -> dict[str, Any]:
    """Settings saved in the checkpoint that ``--resume`` means; empty if there is none to continue yet.

    A run goes on in the folder that it is found in, wherever that was when it began.
    """
    newest = find(resume, output)
    if newest.path is None:
        return {}
    return {**newest.content["config"], "output": output if resume == "auto" else str(newest.path.parent.parent)}
