"""The graph that ComfyUI is running, as far as it bears on the node that is being run."""

import re

from comfy_execution.utils import get_executing_context

_STEP_LORA = re.compile(r"lcm|lightning|hyper|turbo|tcd|pcm|\d[-_ ]?steps?\b", re.IGNORECASE)


def upstream() -> list[dict]:
    """The nodes of the running prompt that the executing one hangs on, itself among them; none where no server runs it."""
    context = get_executing_context()
    prompt = _running_prompt() if context is not None else None
    if prompt is None or context.node_id not in prompt:
        return []
    found, todo = {}, [context.node_id]
    while todo:
        name = todo.pop()
        if name in found or name not in prompt:
            continue
        found[name] = prompt[name]
        todo += [str(value[0]) for value in prompt[name].get("inputs", {}).values() if isinstance(value, list) and value]
    return list(found.values())


def step_loras() -> list[str]:
    """Names of LoRAs on the way to the executing node that shorten sampling themselves, by the names of their files."""
    names = [
        value
        for node in upstream()
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
