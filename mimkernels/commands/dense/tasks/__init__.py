"""What is read from feature maps: a module per kind of task, each task one object."""

from typing import Any

from mimkernels.commands.dense.tasks.base import Task
from mimkernels.commands.dense.tasks.correspondence import Correspondence
from mimkernels.commands.dense.tasks.depth import Depth
from mimkernels.commands.dense.tasks.keypoints import Keypoints
from mimkernels.commands.dense.tasks.segmentation import NearestSegmentation, Segmentation

# In the order of columns and pictures. The first that was read decides which readout is called the best.
TASKS: dict[str, Task[Any]] = {
    task.name: task for task in (Segmentation(), NearestSegmentation(), Depth(), Keypoints(), Correspondence())
}
