"""The only rooms that know ComfyUI: its folders, memory, text encoders, latents, progress and previews."""
