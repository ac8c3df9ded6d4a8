"""Example inputs with which `bind` finds the modules that call the AttentionInterface, and their shapes."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

TOKENS, TARGETS = 5, 3
"""Tokens of an example, and of its target in an encoder-decoder. They differ, so that cross-attention is recognized."""

SIDE, FRAMES, SAMPLES, STEPS = 64, 2, 4000, 64
"""Defaults where a configuration has none: pixels of an image, frames of a video, samples and steps of audio."""


def example_inputs(model: PreTrainedModel) -> Iterator[dict[str, Tensor]]:
    """Small inputs that the model may accept, the likeliest first. Batches of one need no padding token."""
    names, config, main = set(inspect.signature(model.forward).parameters), model.config, model.main_input_name
    tokens = {"input_ids": _tokens(config, TOKENS)} if "input_ids" in names else {}
    if type(model).__name__.endswith("MultipleChoice"):
        tokens = {"input_ids": tokens["input_ids"].expand(1, 2, -1)}
    found = [{name: value} for name, value in _signals(config) if name in names or name == main]
    both = [tokens | signal for signal in found] if tokens else []
    forms = [tokens, *both, *found] if main == "input_ids" else [*both, *found, tokens]
    # Heads that derive the target from their input accept none. Different lengths come first, since they show more.
    for target in [_target(config, names), {}]:
        for inputs in forms:
            if inputs:
                yield {name: _placed(value, model) for name, value in (inputs | target).items()}


def _target(config: Any, names: set[str]) -> dict[str, Tensor]:
    """The input of a decoder in an encoder-decoder, or the extra sequence that a lone decoder cross-attends to."""
    if getattr(config, "is_encoder_decoder", False) and "decoder_input_ids" in names:
        return {"decoder_input_ids": _tokens(config, TARGETS)}
    if getattr(config, "add_cross_attention", False) and "encoder_hidden_states" in names:
        return {"encoder_hidden_states": torch.zeros(1, TARGETS, config.hidden_size)}
    return {}


def _placed(value: Tensor, model: PreTrainedModel) -> Tensor:
    return value.to(model.device, model.dtype if value.is_floating_point() else None)


def _tokens(config: Any, count: int) -> Tensor:
    """Ordinary tokens followed by an end-of-text token, which some heads look for; int64 [1, count]."""
    text = config.get_text_config()
    size = getattr(text, "vocab_size", None) or 2
    end = _token(getattr(text, "eos_token_id", None), size)
    special = {end, _token(getattr(text, "pad_token_id", None), size)}
    ordinary = [number for number in range(min(size, count + len(special))) if number not in special] or [0]
    numbers = [ordinary[place % len(ordinary)] for place in range(count)]
    return torch.tensor([numbers if end is None else [*numbers[:-1], end]])


def _token(number: Any, size: int) -> int | None:
    number = number[0] if isinstance(number, list) and number else number
    return number if isinstance(number, int) and 0 <= number < size else None


def _signals(config: Any) -> Iterator[tuple[str, Tensor]]:
    """Images, videos and audio in the shapes that the configuration, or that of a tower, requires."""
    vision, audio = _tower(config, "vision_config"), _tower(config, "audio_config")
    image = (_first(vision, "num_channels", "in_channels", "in_chans", default=3), *_image_size(vision))
    frames = _first(vision, "num_frames", "frames_per_clip", default=None)
    if frames is not None:
        yield "pixel_values", torch.zeros(1, frames, *image)
        yield "pixel_values_videos", torch.zeros(1, frames, *image)
    yield "pixel_values", torch.zeros(1, *image)
    yield "pixel_values", torch.zeros(1, FRAMES, *image)
    bins = _first(audio, "num_mel_bins", "input_feat_per_channel", "feature_projection_input_dim", default=None)
    if bins is not None:
        whole = 2 * _first(audio, "max_source_positions", default=STEPS // 2)
        yield "input_values", torch.zeros(1, _first(audio, "max_length", default=STEPS), bins)
        yield "input_features", torch.zeros(1, bins, whole)
        yield "input_features", torch.zeros(1, STEPS, bins)
    yield "input_values", torch.zeros(1, SAMPLES)


def _tower(config: Any, name: str) -> Any:
    return getattr(config, name, None) or config


def _first(config: Any, *names: str, default: Any) -> Any:
    values: Iterator[Any] = (getattr(config, name, None) for name in names)
    return next((value for value in values if isinstance(value, int)), default)


def _image_size(config: Any) -> tuple[int, int]:
    size = getattr(config, "image_size", None) or getattr(config, "input_size", None) or SIDE
    if isinstance(size, Mapping):
        size = (size["height"], size["width"])
    height, width = (size, size) if isinstance(size, int) else tuple(size)[-2:]
    return int(height), int(width)
