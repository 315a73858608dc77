"""AVDM2 for ComfyUI: this is the door that ComfyUI opens; nothing heavy is imported here."""

from .avdm2_nodes import comfy_entrypoint

WEB_DIRECTORY = "./web"

__all__ = ["WEB_DIRECTORY", "comfy_entrypoint"]
