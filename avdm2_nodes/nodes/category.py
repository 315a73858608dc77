"""What our nodes have in common."""

from comfy_api.latest import io

from ..comfy_bridge import folders

CATEGORY = "AVDM2"


def clips_input():
    return io.Int.Input(
        "clips",
        default=1,
        min=1,
        max=64,
        optional=True,
        extra_dict={"advanced": True},
        tooltip="How many clips the latent's batch holds, one after the other: a batch of 32 with 2 clips is 2 of 16 frames.",
    )


def seed_input():
    return io.Int.Input(
        "seed",
        default=0,
        min=0,
        max=0xFFFFFFFFFFFFFFFF,
        control_after_generate=True,
        tooltip="The same seed gives the same clip, whatever the device.",
    )


def denoise_input(tooltip: str):
    return io.Float.Input("denoise", default=1.0, min=0.0, max=1.0, step=0.01, tooltip=tooltip)


def latent_input():
    return io.Latent.Input(
        "latent",
        tooltip="Empty Latent Image with batch_size as the number of frames; or frames from VAE Encode, for video to video with denoise "
        "below 1.",
    )


def motion_module_input():
    return io.Combo.Input(
        "motion_module",
        options=folders.training_modules(),
        default=folders.AS_WIRED,
        optional=True,
        tooltip="The teacher's motion module, where the model that is wired does not bring it: a student straight on Load Checkpoint, or "
        "a model without motion.",
    )
