"""Tasks: what a model learns, from which data, and how it is evaluated."""

from attnpress.tasks.check import check_data
from attnpress.tasks.load import TaskData, load_task, text_columns
from attnpress.tasks.metrics import DivergedPredictionsError
from attnpress.tasks.sources import TaskError
from attnpress.tasks.table import CUSTOM, TASKS, Layout, Task, list_tasks

__all__ = [
    "CUSTOM",
    "TASKS",
    "DivergedPredictionsError",
    "Layout",
    "Task",
    "TaskData",
    "TaskError",
    "check_data",
    "list_tasks",
    "load_task",
    "text_columns",
]
