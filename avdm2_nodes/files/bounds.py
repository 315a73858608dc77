"""One bound on the settings of networks: none that a file asks for takes minutes or more memory than the file's own weights."""

from collections.abc import Mapping

_LONGEST_LIST = 16  # blocks of a network; published UNets have four
_MOST_LAYERS = 64  # of a block or a text encoder; SDXL's largest block has ten, its text encoder 32
_LONGEST_SEQUENCE = 1024  # position encodings of motion modules; published ones have 32 or 64
_LARGEST = 2**20  # any other number: widths, a vocabulary
_LAYERS_IN_ALL = 512  # of all blocks of a UNet; SD1.5's video UNet has about 40

_COUNTS = ("layers", "num_encoder_blocks", "num_decoder_blocks")


def immodest(config: Mapping) -> str | None:
    """What of a network's settings is beyond every network that was published, in words; None where nothing is."""
    for key, value in config.items():
        if str(key).startswith("_"):
            continue
        most = _LARGEST
        if any(part in str(key) for part in _COUNTS):
            most = _MOST_LAYERS
        elif "seq_length" in str(key):
            most = _LONGEST_SEQUENCE
        if found := _beyond(value, most):
            return f"{str(key)[:80]} {found}"
    layers = _layers(config)
    return f"{layers} layers in all" if layers > _LAYERS_IN_ALL else None


def _beyond(value: object, most: int, depth: int = 0) -> str | None:
    if isinstance(value, (int, float)) and not -most <= value <= most:  # NaN too
        return "with a number that is too large" if isinstance(value, int) else str(value)
    if isinstance(value, (list, tuple)):
        if len(value) > _LONGEST_LIST or depth > 2:
            return f"with a list of {len(value)} entries"
        return next((found for one in value if (found := _beyond(one, most, depth + 1))), None)
    return None


def _layers(config: Mapping) -> int:
    """Resnets, motion modules and the transformer layers in them on a UNet's way down and in its middle."""
    blocks = config.get("down_block_types") or config.get("block_out_channels")
    if not isinstance(blocks, (list, tuple)) or not blocks:
        return 0

    def most(*keys: str) -> list[int]:
        return [max(numbers) for numbers in zip(*(_each(config.get(key), len(blocks)) for key in keys), strict=True)]

    layers = most("layers_per_block", "motion_layers_per_block")
    within = most("transformer_layers_per_block", "reverse_transformer_layers_per_block", "motion_transformer_layers_per_block")
    middle = max(most("motion_mid_block_layers_per_block")) * max(most("motion_transformer_layers_per_mid_block"))
    return middle + sum(a * (1 + b) for a, b in zip(layers, within, strict=True))


def _each(value: object, blocks: int) -> list[int]:
    """A setting as one number for each block: said once for all, once a block, or once for each of a block's layers."""
    values = list(value[:blocks]) if isinstance(value, (list, tuple)) else [value] * blocks
    numbers = [max((n for n in one if type(n) is int), default=1) if isinstance(one, (list, tuple)) else one for one in values]
    numbers = [n if type(n) is int else 1 for n in numbers]
    return numbers + [1] * (blocks - len(numbers))
