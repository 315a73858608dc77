"""Long clips: core's context windows over the frames, with hints and patches that follow the window."""

import copy
import inspect

import comfy.context_windows as core
import comfy.controlnet
import torch
from comfy.patcher_extension import WrappersMP

from ..diffusion.windows import overlap_of, window_starts, window_weights
from .motion import KEY


class ClipWindows(core.IndexListContextHandler):
    """Core's handler with the windows and weights of `diffusion.windows`; a person's own Context Windows node takes its place."""

    def __init__(self, length: int):
        options = {
            "context_schedule": core.ContextSchedule("avdm2", _windows),
            "fuse_method": core.ContextFuseMethod("avdm2", _weights),
            "context_length": length,
            "context_overlap": overlap_of(length),
            "dim": 0,
            "causal_window_fix": False,  # of models with causal attention over time, which motion modules have not
        }
        known = inspect.signature(core.IndexListContextHandler.__init__).parameters
        super().__init__(**{name: value for name, value in options.items() if name in known})

    def should_use_context(self, model, conds, x_in, timestep, model_options) -> bool:
        return x_in.shape[self.dim] > self.context_length  # core's own also logs a line at every evaluation


def _windows(frames: int, handler: ClipWindows, model_options: dict) -> list[list[int]]:
    length = handler.context_length
    return [list(range(start, start + length)) for start in window_starts(frames, length, handler.context_overlap)]


def _weights(length: int, handler: ClipWindows, **_) -> list[float]:
    return window_weights(length, handler.context_overlap).tolist()


def with_windows(model, length: int):
    """A clone of a MODEL that makes longer clips than its motion modules know in overlapping windows of `length` frames."""
    model = model.clone()
    handler = model.model_options.get("context_handler")
    if handler is None or isinstance(handler, ClipWindows):
        model.model_options["context_handler"] = ClipWindows(length)
        core.create_prepare_sampling_wrapper(model)
    model.remove_wrappers_with_key(WrappersMP.CALC_COND_BATCH, KEY)
    model.add_wrapper_with_key(WrappersMP.CALC_COND_BATCH, KEY, follow_window)
    return model


def follow_window(executor, model, conds, x_in, timestep, model_options):
    """Core's wrapper around the evaluations of one window: ControlNets get the hints of its frames, and other packs are told of it.

    `ad_params` is what IPAdapter_plus and Advanced-ControlNet read, as AnimateDiff-Evolved writes it.
    """
    options = model_options.get("transformer_options", {})
    window = options.get("context_window")
    if window is None:
        return executor(model, conds, x_in, timestep, model_options)
    frames, total = window_frames(window), _total(window, options)
    told = {"sub_idxs": frames, "full_length": total, "context_length": len(frames)}
    model_options = model_options | {"transformer_options": options | {"ad_params": told}}
    conds = [cond and [_of_window(one, frames) for one in cond] for cond in conds]
    return executor(model, conds, x_in, timestep, model_options)


def window_frames(window) -> list[int]:
    """The frames that a window evaluates, the one in front of it among them that core may add."""
    anchor = getattr(window, "causal_anchor_index", None)
    return [*([anchor] if anchor is not None and anchor >= 0 else []), *window.index_list]


def _total(window, options) -> int:
    known = getattr(window, "total_frames", 0)
    return known or 1 + max(window.index_list)


def _of_window(cond: dict, frames: list[int]) -> dict:
    control = cond.get("control")
    return cond if control is None else cond | {"control": _hints_of(control, frames)}


def _hints_of(control, frames: list[int]):
    """A ControlNet of core's, and those before it, with the hints of these frames; one with a single hint, or of other packs, as it is."""
    before = control.previous_controlnet
    hint = control.cond_hint_original
    ours = type(control).__module__ == comfy.controlnet.__name__ and isinstance(hint, torch.Tensor) and len(hint) > 1
    if not ours and before is None:
        return control
    made = copy.copy(control)
    if before is not None:
        made.previous_controlnet = _hints_of(before, frames)
    if ours:
        made.cond_hint = None  # what it had made ready was for other frames
        made.cond_hint_original = hint[[frame % len(hint) for frame in frames]]
    return made
