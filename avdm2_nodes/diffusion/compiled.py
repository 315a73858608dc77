"""Evaluations that start later and run faster: layers compiled, each kind once, and on a GPU an evaluation as one CUDA graph."""

from collections.abc import Callable
from functools import partial

import torch
from diffusers import UNetMotionModel
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from torch import Tensor, nn

from .layers import MotionLayer, Residual
from .unets import Predictor, video_predictor

_COMPILED = {Residual: "forward", Transformer2DModel: "forward", MotionLayer: "over_time"}
_VARIES = {2: 0, 3: 1, 4: 0, 5: 1}  # by a tensor's dimensions the one of frames, or of a text's tokens
_VERSIONS = 64  # of a layer's kind: widths and sizes; of SD1.5's residual layers there are 14
_SHAPES = 4  # that are recorded; each holds an evaluation's memory
_WARM_UPS = 3  # before a recording: kernels are compiled and chosen, workspaces allocated


def compiled_predictor(unet: UNetMotionModel, backend: str | Callable = "inductor") -> Predictor:
    """`video_predictor` of a UNet whose layers are compiled in place; on a GPU its evaluations are recorded as well."""
    predict = video_predictor(compile_layers(unet, backend))
    return recorded(predict) if next(unet.parameters()).is_cuda else predict


def compile_layers(unet: UNetMotionModel, backend: str | Callable = "inductor") -> UNetMotionModel:
    """Compiles, in place, the residual, attention and motion layers of a UNet `without_waste` at their first evaluation.

    Layers of a kind and a size share what was made of the first of them: seconds where the whole network takes minutes. It serves all
    prompts, seeds and numbers of frames from two; another batch or size is compiled anew.
    """
    torch._dynamo.config.recompile_limit = max(_VERSIONS, torch._dynamo.config.recompile_limit)
    made = {kind: torch.compile(getattr(kind, name), backend=backend, dynamic=False) for kind, name in _COMPILED.items()}
    for layer in unet.modules():
        kind = type(layer)
        if kind in made:
            setattr(layer, _COMPILED[kind], partial(_of_any_length, made[kind], layer))
    return unet


def _of_any_length(run: Callable, layer: nn.Module, *args, **kwargs):
    for tensor in (*args, *kwargs.values()):
        if isinstance(tensor, Tensor):
            torch._dynamo.maybe_mark_dynamic(tensor, _VARIES[tensor.ndim])  # all else is fixed, for the better kernels
    return run(layer, *args, **kwargs)


def recorded(predict: Predictor, record: Callable | None = None) -> Predictor:
    """`predict`, recorded at the first evaluation of a shape and replayed at every other, so that a CPU launches one thing for it all.

    What is recorded reads buffers of its own, into which each evaluation's inputs are copied; its result is copied out. The network's
    weights may change, but must stay where they are. `record` makes of a function one that runs it again, by default `cuda_graph`.
    """
    made: dict[tuple, tuple[list[Tensor], Callable[[], Tensor]]] = {}

    def eps(x_t: Tensor, t: Tensor, text: Tensor) -> Tensor:
        given = x_t, t, text
        shapes = tuple((tensor.shape, tensor.dtype) for tensor in given)
        if shapes not in made:
            if len(made) == _SHAPES:
                return predict(*given)
            buffers = [tensor.to(x_t.device, copy=True) for tensor in given]
            made[shapes] = buffers, (record or cuda_graph)(lambda: predict(*buffers))
        buffers, again = made[shapes]
        for buffer, tensor in zip(buffers, given, strict=True):
            buffer.copy_(tensor)
        return again().clone()

    return eps


def cuda_graph(run: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """`run` as a CUDA graph: a function that does the same work on the same memory again, and gives the same tensor each time."""
    here, beside = torch.cuda.current_stream(), torch.cuda.Stream()
    beside.wait_stream(here)
    with torch.cuda.stream(beside):
        for _ in range(_WARM_UPS):
            run()
    here.wait_stream(beside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        made = run()

    def again() -> Tensor:
        graph.replay()
        return made

    return again
