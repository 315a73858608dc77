"""SDM in a run (AVDM2, arXiv 2412.05899): single frames of the student's clips, judged by a real and a fake 2D score."""

import torch
from torch import Tensor

from avdm2_nodes.diffusion.samplers import draw_noise
from avdm2_nodes.diffusion.schedules import IMAGE
from avdm2_nodes.diffusion.sdm import score_pair, sdm_gradient
from training.method.losses import denoising_loss, sdm_loss
from training.method.made import Made
from training.method.roles import Roles
from training.run.config import DistillConfig
from training.run.randomness import draw_frames, draw_timesteps, sample_generators


class Sdm:
    """The student's loss, and that of the fake score that it needs; `empty_text` (1, L, D) is what the real score's guidance takes."""

    def __init__(self, config: DistillConfig, roles: Roles, empty_text: Tensor):
        self.config, self.seed, self.roles, self.empty_text = config.sdm, config.run.seed, roles, empty_text

    def student_loss(self, made: Made, clips: Tensor) -> Tensor:
        """On clips (B, C, F, h, w), one that is not judged counting as 0."""
        judged = made.judged(IMAGE, self.config.t_max)
        if not judged:
            return 0 * clips.sum()
        share, made, clips = len(judged) / len(clips), made[judged], clips[judged]
        frames, noise, t, text = self.draw_frames(made, clips, sample_generators(made.samples, self.seed, "sdm"))
        fake_x0, real_x0 = score_pair(
            frames.detach(), noise, t, text, self.empty_text, self.roles.real_score, self.roles.fake_score, self.config.guidance
        )
        return share * sdm_loss(frames, sdm_gradient(frames.detach(), fake_x0, real_x0))

    def fake_loss(self, made: Made, turn: int) -> Tensor:
        """The fake score's denoising loss on frames of the student's clips, at the noise that SDM asks it about."""
        judged = made.judged(IMAGE, self.config.t_max)
        if not judged:
            return torch.zeros((), device=made.fake.device)
        share, made = len(judged) / len(made.t), made[judged]
        generators = sample_generators(made.samples, self.seed, "fake", turn)
        frames, noise, t, text = self.draw_frames(made, made.fake, generators)
        return share * denoising_loss(self.roles.fake_score(IMAGE.diffuse(frames, noise, t), t, text), noise)

    def draw_frames(self, made: Made, clips: Tensor, generators) -> tuple[Tensor, ...]:
        """K random frames of each clip (B * K, C, h, w), and noise, timesteps (B * K,) and text (B * K, L, D) for them."""
        config, count, device = self.config, self.config.frames, clips.device
        draws = 1 if config.shared_noise else count
        chosen = draw_frames(generators, clips.shape[2], count).to(device)
        frames = clips.transpose(1, 2)[torch.arange(len(clips), device=device)[:, None], chosen]
        low = made.judged_from(IMAGE).clamp(min=config.t_min)
        t = torch.stack([draw_timesteps(generators, low, config.t_max) for _ in range(draws)], 1).to(device)
        noise = draw_noise((len(clips), draws, *frames.shape[2:]), generators, device)
        t, noise = t.expand(-1, count), noise.expand(-1, count, -1, -1, -1)
        return frames.flatten(0, 1), noise.flatten(0, 1), t.flatten(), made.text.repeat_interleave(count, 0)
