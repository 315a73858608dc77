"""ComfyUI's own names of SD1.5's layers, where the environment says that there is a checkout to compare with."""

import ast
import importlib.util
import os
from pathlib import Path

import pytest

COMFYUI = os.environ.get("COMFYUI_DIR")
needs_comfyui = pytest.mark.skipif(not COMFYUI, reason="COMFYUI_DIR names no checkout of ComfyUI to compare with")


def comfyui_names(folder):
    """diffusers' names -> original, by ComfyUI's own function, which alone is imported, from a file in `folder`."""
    tree = ast.parse((Path(COMFYUI) / "comfy" / "utils.py").read_text(encoding="utf-8"))
    wanted = {"UNET_MAP_ATTENTIONS", "TRANSFORMER_BLOCKS", "UNET_MAP_RESNET", "UNET_MAP_BASIC", "unet_to_diffusers"}
    body = [n for n in tree.body if getattr(n, "name", getattr(getattr(n, "targets", [None])[0], "id", None)) in wanted]
    file = folder / "comfyui_names.py"
    file.write_text(ast.unparse(ast.Module(body, [])), encoding="utf-8")
    spec = importlib.util.spec_from_file_location(file.stem, file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    layers = {"num_res_blocks": [2] * 4, "channel_mult": [1, 2, 4, 4], "transformer_depth_middle": 1}
    depths = {"transformer_depth": [1] * 6 + [0] * 2, "transformer_depth_output": [1] * 9 + [0] * 3}
    return module.unet_to_diffusers(layers | depths)
