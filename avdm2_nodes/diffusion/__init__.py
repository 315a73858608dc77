"""The mathematics, in torch and diffusers: schedules, UNets, samplers, windows, guidance, the SDM gradient, styles."""
