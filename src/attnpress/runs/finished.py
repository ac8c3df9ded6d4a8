"""The finished model of a run folder, or of a folder written by `save_pretrained`."""

from __future__ import annotations

from pathlib import Path

from transformers import AutoConfig, PreTrainedModel, PreTrainedTokenizerBase

from attnpress.config import ConfigError, RunConfig
from attnpress.models.loading import class_names, load_compressed, load_tokenizer
from attnpress.tasks import TaskData, load_task


def finished_model(run_folder: Path, config: RunConfig) -> tuple[PreTrainedModel, TaskData]:
    """The compressed model of a finished run, or of a folder written by `save_pretrained`, and the data of `config`.

    Raises:
        ConfigError: the run has no compressed model yet, or one with other classes.
    """
    folder = finished_folder(run_folder)
    data, names = load_task(config.data, load_tokenizer(str(folder)), config.seed), class_names(str(folder))
    saved = AutoConfig.from_pretrained(folder)
    answers_questions = any("QuestionAnswering" in name for name in saved.architectures or ())
    classes = max(1, len(data.label_names))
    if answers_questions != (data.task.kind == "qa") or (not answers_questions and len(names) != classes):
        raise ConfigError(
            f"--task {data.task.name}: a task of kind {data.task.kind!r} with {classes} outputs, but the model of "
            f"{run_folder} was trained for another; choose a task that its head fits"
        )
    numbered = data.numbered_as(names) if data.task.kind == "classification" else data
    if numbered is None:
        raise ConfigError(
            f"--task {data.task.name}: its labels are {', '.join(data.label_names)}, those of the model of "
            f"{run_folder} are {', '.join(names)}; choose a task with the labels that it was trained for"
        )
    return load_compressed(folder, data.task.kind, numbered.label_names), numbered


def finished_classifier(folder: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The compressed model of a finished run and its tokenizer, without its training data.

    Args:
        folder: of the run, or written by `save_pretrained`.

    Raises:
        ConfigError: there is no finished model, or it is a question-answering model.
        ModelError: the model or its tokenizer cannot be loaded, or its classes are not numbered from 0.
    """
    place = finished_folder(folder)
    saved = AutoConfig.from_pretrained(place)
    if any("QuestionAnswering" in name for name in saved.architectures or ()):
        raise ConfigError(f"{folder}: a question-answering model; only models that classify or score texts can be run")
    names = class_names(str(place))
    regression = saved.problem_type == "regression" or (saved.problem_type is None and len(names) == 1)
    kind = "regression" if regression else "classification"
    return load_compressed(place, kind, names), load_tokenizer(str(place))


def is_saved_model(folder: Path) -> bool:
    """True if a folder was written by `save_pretrained` and is not a run folder."""
    return (folder / "config.json").is_file() and not (folder / "recipe.yaml").is_file()


def finished_folder(run_folder: Path) -> Path:
    """Folder of a finished run's compressed model; the folder itself if `save_pretrained` wrote it.

    Raises:
        ConfigError: the run has no compressed model yet.
    """
    folder = run_folder if is_saved_model(run_folder) else run_folder / "progressive"
    if not folder.is_dir():
        raise ConfigError(
            f"{run_folder}: holds no finished compressed model; run `attnpress compress` to its end first"
        )
    return folder
