"""Builds the miniature from nothing: clips, autoencoder, image models in two styles, motion modules and the feature net.

A stage is trained in rounds, cosine annealing with warm restarts (SGDR, arXiv 1608.03983): each round but the first begins with
the weights that the one before left in the stack. A round is deterministic from the seed and those weights, goes on where it stopped,
and is passed over when it is done. Work in progress (clips, checkpoints, logs) lies in `runs/build-miniature`; results go to the
stack's folder in the diffusers layout.
"""

import argparse
import json
import logging
import shutil
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderTiny
from einops import rearrange
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from avdm2_nodes.diffusion.schedules import VIDEO
from avdm2_nodes.diffusion.unets import image_predictor, video_predictor, video_unet
from avdm2_nodes.files.stack import decode_clips, encode_clips, load_image_unet, load_motion, load_stack, load_vae
from training.data.clips import ClipFolder, needs_clips, write_clips
from training.evaluation import feature_net
from training.method.image_style import dropped, image_losses
from training.method.stage import KernelMuon, adamw, run_stage
from training.miniature.models import new_image_unet, new_motion_adapter, new_text_encoder, write_tokenizer
from training.miniature.vae import crop_where_colourful, new_vae, preview_colours, vae_losses
from training.run.checkpoint import write_atomically
from training.run.precision import autocast
from training.world import scenes

logger = logging.getLogger(__name__)

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")
CLIPS = {"plain": 4096, "neon": 3072}
FEATURE_CLIPS = {False: 1741, True: 307}  # of each style, for the feature net: seen and held-out combinations


@dataclass(frozen=True)
class Round:
    """One round of a stage: how long it trains, and the folders it works in and leaves its weights in."""

    stage: str
    number: int  # from 0
    steps: int
    lr: float
    seed: int
    work: Path
    stack: Path

    @property
    def name(self) -> str:
        return f"{self.stage}-{self.number + 1}"

    @property
    def again(self) -> bool:
        """True where the stack holds the weights of a round before."""
        return self.number > 0

    def train(self, module: nn.Module, losses, optimisers: list[torch.optim.Optimizer], ema_decay: float) -> dict:
        """Trains what of `module` requires a gradient and leaves the averaged weights in it; the run's figures."""
        module.train()
        options = {"steps": self.steps, "seed": self.seed, "ema_decay": ema_decay}
        return run_stage(self.name, self.work, module, losses, optimisers=optimisers, **options)


def save_half(module: nn.Module, folder: Path) -> None:
    """Writes a part of the stack as float16, without the path that it was loaded from and what its class would not take again."""
    module.half().save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    config.pop("_name_or_path", None)
    if isinstance(module, AutoencoderTiny):
        config.pop("block_out_channels", None)  # derived; diffusers warns of it at each load
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def render_clips(folder: Path, style: str, count: int, seed: int) -> None:
    """Renders `count` training clips of a style into a folder of videos with captions, unless they stand there."""
    if needs_clips(folder):
        clips = scenes.render_split(count, style=style, held_out=False, seed=seed)
        write_clips(folder, ((clip.frames, clip.content.caption) for clip in clips), scenes.FPS)


def read_all(turn: Round, style: str) -> tuple[Tensor, list[str]]:
    """All training clips of a style (N, F, H, W, 3) uint8, rendered when they are first asked for, and their captions."""
    folder = turn.work / "clips" / style
    render_clips(folder, style, CLIPS[style], turn.seed)
    clips = ClipFolder(folder, scenes.FRAMES, scenes.SIDE, scenes.SIDE)
    return torch.stack([clips.read(i) for i in range(len(clips))]), clips.captions


def to_images(frames: Tensor) -> Tensor:
    """(N, H, W, 3) uint8 -> (N, 3, H, W) float in -1..1."""
    return (rearrange(frames, "n h w c -> n c h w").float() / 127.5 - 1).contiguous(memory_format=torch.channels_last)


def build_vae(turn: Round) -> dict:
    """The autoencoder, on frames of both styles: crops first, which are the cheaper teacher, then whole frames."""
    stack, steps = turn.stack, turn.steps
    frames = all_frames(turn)
    torch.manual_seed(turn.seed)
    vae = load_vae(stack / "vae").requires_grad_(True) if turn.again else new_vae()
    crops_until = int(steps * 0.85)

    def losses(step: int, generator: torch.Generator) -> dict[str, Tensor]:
        whole = step >= crops_until
        chosen = torch.randint(len(frames), (4 if whole else 16,), generator=generator)
        images = to_images(frames[chosen])
        if not whole:
            images = crop_where_colourful(images, generator).contiguous(memory_format=torch.channels_last)
        with autocast(CPU):
            return vae_losses(vae, images, generator)

    kernels, biases = [p for p in vae.parameters() if p.ndim > 1], [p for p in vae.parameters() if p.ndim == 1]
    optimisers = [KernelMuon(kernels, lr=turn.lr), adamw(biases, lr=turn.lr / 2, weight_decay=0.0)]
    figures = turn.train(vae, losses, optimisers, ema_decay=0.995)
    images = to_images(probe_of(frames))
    with torch.no_grad(), autocast(CPU):
        latents = torch.cat([vae.encode(part).latents for part in images.split(64)]).float()
    scale = round(1 / latents.std().item(), 4)
    vae.register_to_config(scaling_factor=scale)
    save_half(vae, stack / "vae")
    factors, bias = preview_colours(latents * scale, images)
    write_facts(stack / "stack.json", factors, bias)
    return figures | {"scaling_factor": vae.config.scaling_factor, "psnr_db": psnr(stack, frames)}


def write_facts(path: Path, factors: Tensor, bias: Tensor) -> None:
    """What diffusers' own files have no place for: the frames of the clips trained on, and the colours of previews."""
    colours = {
        "latent_rgb_factors": [[round(x, 4) for x in row] for row in factors.tolist()],
        "latent_rgb_factors_bias": [round(x, 4) for x in bias.tolist()],
    }
    path.write_text(json.dumps({"frames": scenes.FRAMES, **colours}, indent=1) + "\n")


def build_decoder(turn: Round) -> dict:
    """The decoder alone, longer: the latents stay what they are, so that the models trained on them stay right."""
    stack, frames = turn.stack, all_frames(turn)
    vae = load_vae(stack / "vae")
    vae.decoder.requires_grad_(True)

    def losses(step: int, generator: torch.Generator) -> dict[str, Tensor]:
        images = to_images(frames[torch.randint(len(frames), (4,), generator=generator)])
        with autocast(CPU):
            return vae_losses(vae, images, generator)

    figures = turn.train(vae, losses, muon_and_adamw(vae.decoder, lr=turn.lr), ema_decay=0.995)
    save_half(vae, stack / "vae")
    return figures | {"psnr_db": psnr(stack, frames)}


def all_frames(turn: Round) -> Tensor:
    """(N, H, W, 3) uint8, of both styles."""
    return torch.cat([rearrange(read_all(turn, style)[0], "n f h w c -> (n f) h w c") for style in scenes.STYLES])


def probe_of(frames: Tensor) -> Tensor:
    return frames[:: max(1, len(frames) // 512)]


def psnr(stack: Path, frames: Tensor) -> float:
    """Mean PSNR in dB of some frames' way through the autoencoder as it was written."""
    vae, probe = load_vae(stack / "vae"), probe_of(frames)
    with autocast(CPU):
        back = decode_clips(vae, encode_clips(vae, probe[:, None]))[:, 0]
    error = ((back.float() - probe.float()) / 255).square().mean((1, 2, 3))
    return round(-10 * torch.log10(error).mean().item(), 2)


def muon_and_adamw(unet: nn.Module, *others: nn.Module, lr: float) -> list[torch.optim.Optimizer]:
    """Muon for a UNet's kernels and matrices, AdamW for all else that is trained."""
    muon = [p for p in unet.parameters() if p.requires_grad and p.ndim > 1]
    rest = [p for module in (unet, *others) for p in module.parameters() if p.requires_grad]
    return [KernelMuon(muon, lr=lr), adamw([p for p in rest if all(p is not m for m in muon)], lr=lr)]


def encoded_clips(turn: Round, style: str) -> tuple[Tensor, list[str]]:
    """All clips of a style in model space (N, C, F, h, w), encoded once and kept in the work folder, and their captions."""
    cache = turn.work / "latents" / f"{style}.safetensors"
    if not cache.exists():
        frames, captions = read_all(turn, style)
        vae = load_vae(turn.stack / "vae")
        with autocast(CPU):
            latents = torch.cat([encode_clips(vae, part) for part in frames.split(64)])
        cache.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(
            cache, lambda path: save_file({"latents": latents.contiguous()}, path, {"captions": json.dumps(captions)})
        )
    with safe_open(cache, "pt") as file:
        return file.get_tensor("latents"), json.loads(file.metadata()["captions"])


def build_image(turn: Round) -> dict:
    """Text encoder and image UNet, trained together on plain frames."""
    stack = turn.stack
    latents, captions = encoded_clips(turn, "plain")
    if turn.again:
        parts = load_stack(stack, with_motion=False)
        tokenizer, text_encoder, unet = parts.tokenizer, parts.text_encoder, parts.image_unet
    else:
        tokenizer = write_tokenizer(stack / "tokenizer", [content.caption for content in scenes.all_contents()])
        torch.manual_seed(turn.seed)
        text_encoder, unet = new_text_encoder(tokenizer), new_image_unet()
    both = nn.ModuleDict({"text": text_encoder, "unet": unet}).requires_grad_(True)

    def encode_text(texts: list[str]) -> Tensor:
        tokens = tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt")
        return both["text"](tokens.input_ids).last_hidden_state

    losses = image_losses(latents, captions, encode_text, image_predictor(unet))
    figures = turn.train(both, losses, muon_and_adamw(unet, text_encoder, lr=turn.lr), ema_decay=0.998)
    save_half(text_encoder, stack / "text_encoder")
    save_half(unet, stack / "unet")
    return figures


def build_style(turn: Round) -> dict:
    """A second image UNet, fine-tuned from the plain one to the neon style; it reads the same text encoder."""
    latents, captions = encoded_clips(turn, "neon")
    parts, folder = load_stack(turn.stack, with_motion=False), turn.stack / "styles" / "neon"
    unet = (load_image_unet(folder) if turn.again else parts.image_unet).requires_grad_(True)
    losses = image_losses(latents, captions, parts.encode_text, image_predictor(unet))
    figures = turn.train(unet, losses, muon_and_adamw(unet, lr=turn.lr), ema_decay=0.998)
    save_half(unet, folder)
    return figures


def build_motion(turn: Round, folder: str = "motion_adapter", batch: int = 16) -> dict:
    """Motion modules in the frozen image UNet, on the video schedule, as AnimateDiff (arXiv 2307.04725) is trained.

    They are written into `folder` of the stack.
    """
    latents, captions = encoded_clips(turn, "plain")
    parts, folder = load_stack(turn.stack, with_motion=False), turn.stack / folder
    torch.manual_seed(turn.seed)
    motion = load_motion(folder) if turn.again else new_motion_adapter()
    unet = video_unet(parts.image_unet, motion).requires_grad_(False)
    for name, parameter in unet.named_parameters():
        parameter.requires_grad_("motion_modules" in name)
    predict = video_predictor(unet)

    def losses(step: int, generator: torch.Generator) -> dict[str, Tensor]:
        clips = torch.randint(len(latents), (batch,), generator=generator)
        x0 = latents[clips]
        noise = torch.randn(x0.shape, generator=generator)
        # Motion is decided at high noise: 60% of the timesteps are drawn there, and weigh more.
        high = torch.rand(batch, generator=generator) < 0.6
        t = torch.where(
            high,
            torch.randint(450, 1000, (batch,), generator=generator),
            torch.randint(0, 450, (batch,), generator=generator),
        )
        with autocast(CPU):
            text = parts.encode_text(dropped([captions[i] for i in clips.tolist()], generator))
            eps = predict(VIDEO.diffuse(x0, noise, t), t, text)
        alpha, sigma = VIDEO.alpha_sigma(t, x0)
        error = (eps - noise).square()
        return {"loss": (error * (sigma / alpha).clamp(0.5, 6)).mean(), "mse": error.mean()}

    figures = turn.train(unet, losses, muon_and_adamw(unet, lr=turn.lr), ema_decay=0.995)
    unet.save_motion_modules(folder)
    save_half(load_motion(folder), folder)  # save_motion_modules itself writes float32
    return figures


def build_features(turn: Round, batch: int = 16) -> dict:
    """The feature net of the evaluation, on rendered clips of both styles and of all combinations; it never sees the VAE."""
    clips, styles = [], []
    for style in scenes.STYLES:
        for held_out, count in FEATURE_CLIPS.items():
            clips += scenes.render_split(count, style=style, held_out=held_out, seed=turn.seed + 1)
            styles += [style] * count
    frames = torch.from_numpy(np.stack([clip.frames for clip in clips]))
    targets = feature_net.targets_of(
        [clip.content for clip in clips],
        styles,
        np.stack([clip.velocity for clip in clips]),
        np.stack([clip.centres for clip in clips]),
    )
    torch.manual_seed(turn.seed)
    path = turn.stack / "feature_net.safetensors"
    net = feature_net.load_features(path).requires_grad_(True) if turn.again else feature_net.VideoFeatures()
    net.train()

    def losses(step: int, generator: torch.Generator) -> dict[str, Tensor]:
        chosen = torch.randint(len(frames), (batch,), generator=generator)
        with autocast(CPU):
            terms = feature_net.training_step(
                net, frames[chosen], {name: target[chosen] for name, target in targets.items()}, generator
            )
        return {"total": terms.pop("total"), **terms}

    figures = turn.train(net, losses, [adamw(net.parameters(), lr=turn.lr)], ema_decay=0.99)
    net.eval()
    feature_net.save_features(net, path)
    probe = [
        scenes.render(c, "plain", np.random.default_rng([turn.seed, 9, i]))
        for i, c in enumerate(scenes.draw_contents(256, held_out=True, seed=9))
    ]
    truth = feature_net.targets_of(
        [c.content for c in probe],
        ["plain"] * len(probe),
        np.stack([c.velocity for c in probe]),
        np.stack([c.centres for c in probe]),
    )
    scores = feature_net.score(net, torch.from_numpy(np.stack([c.frames for c in probe])), truth)
    return figures | {name: round(value, 4) for name, value in scores.items()}


# Stage -> (its function, training steps and learning rate of each round). In this order: each needs the results of those before it.
STAGES = {
    "vae": (build_vae, [(4500, 2e-3)]),
    "image": (build_image, [(3600, 1.5e-3), (2000, 1.5e-3)]),
    "motion": (build_motion, [(1000, 1e-3), (2500, 4e-3), (800, 2.5e-3)]),
    "style": (build_style, [(1000, 7e-4)]),
    "decoder": (build_decoder, [(2000, 1e-3)]),
    "features": (build_features, [(3000, 2e-3)]),
    # Teachers that were trained for about a tenth and a third of the steps of the miniature's own: video models that have not learnt
    # all that the data know.
    "teacher-tenth": (partial(build_motion, folder="teachers/tenth"), [(430, 4e-3)]),
    "teacher-third": (partial(build_motion, folder="teachers/third"), [(1430, 4e-3)]),
}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Builds the miniature stack; rounds that are done are passed over.")
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES), help="only these")
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "build-miniature", help="clips, checkpoints and logs")
    parser.add_argument("--stack", type=Path, default=ROOT / "miniature", help="where the stack is written")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, help="CPU threads")
    args = parser.parse_args(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    for stage in args.stages:
        build, rounds = STAGES[stage]
        for number, (steps, lr) in enumerate(rounds):
            turn = Round(stage, number, steps, lr, args.seed, args.work, args.stack)
            log = args.stack / "build.json"
            if turn.name in recorded(log):
                logger.info("%s is done, as %s says.", turn.name, log)
                continue
            figures = build(turn)
            logger.info("%s: %s", turn.name, figures)
            (args.stack / "logs").mkdir(exist_ok=True)
            shutil.copy(args.work / turn.name / "log.jsonl", args.stack / "logs" / f"{turn.name}.jsonl")
            record(log, turn.name, figures | {"seed": args.seed, "threads": torch.get_num_threads()})


def recorded(path: Path) -> dict:
    """The figures of the rounds that are done."""
    return json.loads(path.read_text()) if path.exists() else {}


def record(path: Path, name: str, figures: dict) -> None:
    """Adds a round's figures to the stack's record of its own making."""
    log = recorded(path) | {name: figures | {"torch": torch.__version__}}
    write_atomically(path, lambda temporary: temporary.write_text(json.dumps(log, indent=1) + "\n"))
