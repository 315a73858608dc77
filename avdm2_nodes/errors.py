"""What all errors of the pack have in common."""


class SentenceError(Exception):
    """An error whose message is one sentence for a person.

    ComfyUI's page shows an error's module before it, which of a pack is a long path; of these it shows the pack's name.
    """

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        if not cls.__module__.startswith("avdm2_nodes."):  # as ComfyUI loads the pack; else the name is what pickle finds it by
            cls.__module__ = "AVDM2"
