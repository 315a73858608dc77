"""The method itself, in torch and diffusers: schedules, UNets, samplers, student files, the SDM gradient."""
