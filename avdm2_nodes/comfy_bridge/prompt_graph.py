"""The graph that ComfyUI is running, as far as it bears on the node that is being run."""

import re

from comfy_execution.utils import get_executing_context

STACK = "AVDM2StackLoader"
_LOADERS = {"CheckpointLoaderSimple": "ckpt_name", STACK: "stack"}  # by the input that says what they load
_STEP_LORA = re.compile(r"lcm|lightning|hyper|turbo|tcd|pcm|\d[-_ ]?steps?\b", re.IGNORECASE)


def upstream() -> dict[str, dict]:
    """The nodes of the running prompt that the executing one hangs on, by id, itself among them; none where no server runs it."""
    context = get_executing_context()
    prompt = _running_prompt() if context is not None else None
    if prompt is None or context.node_id not in prompt:
        return {}
    found, todo = {}, [context.node_id]
    while todo:
        name = todo.pop()
        if name in found or name not in prompt:
            continue
        found[name] = prompt[name]
        todo += [source for source, _ in _links(prompt[name])]
    return found


def model_loaders() -> set[tuple[str, str]]:
    """(kind of node, file or stack picked) of the loaders whose MODEL is on the way to the executing node."""
    nodes = upstream()
    models = {source for node in nodes.values() for source, output in _links(node) if output == 0}
    found = [(nodes[name].get("class_type"), nodes[name].get("inputs", {})) for name in models if name in nodes]
    return {(kind, str(inputs.get(_LOADERS[kind]))) for kind, inputs in found if kind in _LOADERS}


def _links(node: dict) -> list[tuple[str, int]]:
    """(node, its output) of each wire into a node."""
    values = node.get("inputs", {}).values()
    return [(str(value[0]), value[1]) for value in values if isinstance(value, list) and len(value) == 2]


def step_loras() -> list[str]:
    """Names of LoRAs on the way to the executing node that shorten sampling themselves, by the names of their files."""
    names = [
        value
        for node in upstream().values()
        for key, value in node.get("inputs", {}).items()
        if "lora" in key and isinstance(value, str)
    ]
    return sorted({name for name in names if _STEP_LORA.search(name)})


def _running_prompt() -> dict | None:
    try:
        from server import PromptServer

        running, _ = PromptServer.instance.prompt_queue.get_current_queue_volatile()
    except (ImportError, AttributeError):
        return None
    return running[0][2] if running else None
