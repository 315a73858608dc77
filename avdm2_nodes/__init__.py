"""The node pack: importable without ComfyUI, and cheap to import with it."""


async def comfy_entrypoint():
    """ComfyUI's door: the extension with our nodes. What they need is imported here, at start-up, and by each when it runs."""
    from comfy_api.latest import ComfyExtension

    from .nodes import NODES

    class AVDM2Extension(ComfyExtension):
        async def get_node_list(self):
            return NODES

    return AVDM2Extension()
