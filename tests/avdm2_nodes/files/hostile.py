"""Files that were damaged or made to harm, each fixed by a seed: what the readers' fuzz test reads."""

import io
import json
import os
import pickle
import random
import shutil
import struct
import zipfile
from dataclasses import replace
from pathlib import Path

import torch
from diffusers import AutoencoderTiny, MotionAdapter
from safetensors.torch import load_file, save_file

from avdm2_nodes.files.architecture import unet_config
from avdm2_nodes.files.hashes import weights_hash
from avdm2_nodes.files.motion import to_original_keys
from avdm2_nodes.files.stack import load_stack
from avdm2_nodes.files.student import Student, write_student
from avdm2_nodes.files.student_info import ANY_BASE, StudentInfo
from avdm2_nodes.files.style import StyleInfo, student_hash, write_style
from tests.avdm2_nodes.files.original_layouts import TINY, original_checkpoint, original_motion, values
from tests.avdm2_nodes.files.sparse_networks import new_network

MANY_DIGITS = "9" * 5000
NASTY = [
    0, -1, 1, 3, 33, 10**6, 10**9, 2**40, 2**63, -(2**63), 10**400, 0.5, float("nan"), float("inf"), 1e308, True, None, "", "x", "é\ud800",
    [], {}, [0], [1] * 2000, [[1] * 50] * 50, {"a": {"b": 1}}, "9" * 400,
]  # fmt: skip
NAMES = [
    "",
    "a\nb",
    "x" * 5_000,
    "x" * 5_000_000,
    "é\x00",
    "module.",
    "..",
    "attn2" * 1000,
    "9" * 5000,
    "down_blocks.0",
    "v_pred",
    "ztsnr",
]
TEXTS = [
    "",
    "x",
    "0",
    "-1",
    MANY_DIGITS,
    "[" * 100_000,
    "{",
    "[]",
    "null",
    "NaN",
    "\x00",
    "é\n" * 3,
    '{"a": ' * 5_000,
    "x" * 10**6,
    "1e400",
]
PREFIXES = ["module.", "_orig_mod.", "unet.", "model.", "motion_module.", "state_dict.", "x.", "module.module.unet."]
DTYPES = [
    torch.int8, torch.int64, torch.bool, torch.float64, torch.complex64, torch.float8_e4m3fn, torch.float16, torch.bfloat16, torch.uint8,
]  # fmt: skip
SHAPES = [[5 * 10**8, 0], [0], [10**12, 0], [0, 33], [], [33], [1], [1, 1, 1, 1, 1], [2**31, 0, 2]]


class Payload:
    """Runs a command where a pickle is let."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch '{self.marker}'",)


def make_seeds(folder: Path, stack_folder: Path) -> dict[str, Path]:
    """A whole file, or folder, of every kind that there is a reader for, by its reader's kind."""
    stack, seeds = load_stack(stack_folder), {"stack": stack_folder}
    unet = stack.teacher
    info = StudentInfo(
        holds="all", timesteps=(999, 499), frames=8, height=64, width=64, unet_config=unet_config(unet), base_name="tiny",
        base_hash=weights_hash(stack.image_unet), updates=1, training_config="seed: 1", title="t", date="2026-01-31", license="Apache-2.0",
    )  # fmt: skip
    whole = {name: p.half() for name, p in unet.named_parameters()}
    motion = {name: p for name, p in whole.items() if "motion_modules" in name}
    motion |= {name: b.half() for name, b in unet.named_buffers()}
    lora, kohya = {}, {}
    for name, p in stack.image_unet.named_parameters():
        if "attn2.to_" in name and p.ndim == 2:
            module = name.removesuffix(".weight")
            down, up = torch.ones(2, p.shape[1]), torch.ones(p.shape[0], 2)
            lora |= {f"{module}.lora_A.weight": down, f"{module}.lora_B.weight": up}
            key = "lora_unet_" + module.replace(".", "_")
            kohya |= {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up, f"{key}.alpha": torch.tensor(2.0)}
    seeds["student"], seeds["student-motion"], seeds["student-lora"] = (folder / f"student{i}.safetensors" for i in range(3))
    write_student(seeds["student"], whole, info)
    write_student(seeds["student-motion"], motion, replace(info, holds="motion", base_hash=ANY_BASE))
    with_lora = replace(info, holds="motion+lora", lora_rank=2, lora_alpha=2.0, base_hash=ANY_BASE)
    write_student(seeds["student-lora"], motion | lora, with_lora)
    style = StyleInfo(
        name="s", hash="0" * 64, student_name="t", student_hash=student_hash(Student(info, whole)), lora_rank=2, lora_alpha=1.0,
        updates=1, training_config="", title="s", date="2026-01-31", license="Apache-2.0",
    )  # fmt: skip
    seeds["style"] = folder / "style.safetensors"
    write_style(seeds["style"], lora, style)

    def saved(kind: str, name: str, tensors: dict, **metadata) -> None:
        seeds[kind] = folder / name
        save_file({key: tensor.contiguous().clone() for key, tensor in tensors.items()}, seeds[kind], metadata)

    modules = to_original_keys(
        MotionAdapter(
            block_out_channels=unet.config.block_out_channels, motion_layers_per_block=1, motion_num_attention_heads=8,
            motion_norm_num_groups=8,
        ).state_dict()
    )  # fmt: skip
    saved("motion", "mm_v2.safetensors", values(original_motion((32, 32, 64), 24)))
    saved("peer", "lightning_4step.safetensors", modules)
    saved("animatelcm", "lcm.safetensors", {name: tensor for name, tensor in modules.items() if not name.endswith(".pe")})
    saved("twin", "mm_diffusers.safetensors", stack.motion.state_dict(), **{"avdm2.motion_heads": "2"})
    saved("video-unet", "train.safetensors", stack.image_unet.state_dict() | to_original_keys(stack.motion.state_dict()))
    saved("lora", "lcm_lora.safetensors", kohya)
    saved("sd15", "sd15.safetensors", values(original_checkpoint(**TINY), dtype=torch.float16))
    saved("sparse", "sparse.safetensors", to_original_keys(new_network(True).state_dict()))
    saved("taesd", "taesd.safetensors", AutoencoderTiny().state_dict())
    return seeds


# ---- one case ----


def make_case(seed: int, number: int, seeds: dict[str, Path], folder: Path, marker: Path) -> tuple[str, str, object]:
    """(kind of seed, what was done, path) of a case; it writes into `folder`."""
    rng = random.Random(f"{seed} {number}")
    kind = rng.choice([*seeds, "stack", "stack"])
    if kind == "stack":
        return (kind, *_damaged_stack(rng, seeds[kind], folder, marker))
    source = seeds[kind]
    how = rng.choices([_place, _bytes, _header, _tensors, _pickle, _raw_pickle, _foreign], [1, 3, 5, 5, 3, 1, 1])[0]
    return (kind, *how(rng, source, folder, marker))


def _place(rng, source: Path, folder: Path, marker: Path) -> tuple[str, object]:
    """Something at the path that is no file, or a path that no file can have."""
    path, what = folder / source.name, rng.randrange(11)
    if what == 0:
        os.mkfifo(path)
    elif what == 1:
        path.symlink_to(folder / "nowhere")
    elif what == 2:
        path.symlink_to(path)
    elif what == 3:
        path.mkdir()
    elif what == 4:
        path.symlink_to("/dev/zero")
    elif what == 5:
        path = folder / f"{'n' * rng.choice([251, 300, 5000])}.safetensors"
    elif what == 6:
        path = Path(f"{folder}/a\0b.safetensors")
    elif what == 7:
        path = Path(f"{folder}/a\ud800.safetensors")
    elif what == 8:
        path = folder / rng.choice(["a.gguf", "a.ckpt", "a.SFT", "a", ".safetensors"])
        path.write_bytes(source.read_bytes())
    elif what == 9:
        path = Path("n/" * 3000 + "a.safetensors")
    else:
        path.write_bytes(rng.choice([b"", b"<html>", b"version https://git-lfs", b"\0" * 4096, b"PK\x03\x04", b"\x80\x02"]))
    return f"place {what}", path


def _bytes(rng, source: Path, folder: Path, marker: Path) -> tuple[str, Path]:
    data, path = bytearray(source.read_bytes()), folder / source.name
    return _mangled(rng, data, path)


def _mangled(rng, data: bytearray, path: Path) -> tuple[str, Path]:
    (length,) = struct.unpack("<Q", data[:8])
    header = min(len(data), 8 + length) if path.suffix == ".safetensors" else len(data)
    what = rng.randrange(7)
    if what == 0:
        del data[rng.choice([rng.randrange(len(data)), rng.randrange(header), len(data) - 1]) :]
    elif what == 1:
        for _ in range(rng.choice([1, 3, 20])):
            data[rng.randrange(header)] ^= 1 << rng.randrange(8)
    elif what == 2:
        for _ in range(rng.choice([1, 100])):
            data[rng.randrange(len(data))] = rng.randrange(256)
    elif what == 3:
        start = rng.randrange(len(data))
        data[start : start + 32768] = bytes(len(data[start : start + 32768]))
    elif what == 4:
        at = rng.randrange(len(data))
        data[at:at] = bytes(rng.randrange(256) for _ in range(rng.choice([1, 8, 100])))
    elif what == 5:
        data += bytes(rng.choice([1, 8, 4096]))
    else:
        data[:8] = struct.pack("<Q", rng.choice([0, 1, 2**31, 2**63, 2**64 - 1, length - 1, length + 1, len(data)]))
    path.write_bytes(data)
    return f"bytes {what}", path


def _header(rng, source: Path, folder: Path, marker: Path) -> tuple[str, Path]:
    """Another header over the same data: shapes, types, places, names and metadata as no writer writes them."""
    data, path = source.read_bytes(), folder / source.name
    (length,) = struct.unpack("<Q", data[:8])
    header, body = json.loads(data[8 : 8 + length]), data[8 + length :]
    metadata = header.pop("__metadata__", {})
    done = []
    for _ in range(rng.choice([1, 1, 1, 3])):
        name, what = rng.choice([*header]), rng.choice([*range(8), *[8] * 6, *[9] * 4, 10])
        entry = header[name]
        if what == 0:
            entry["shape"] = rng.choice([*SHAPES, *NASTY])
        elif what == 1:
            entry["shape"] = entry["shape"][::-1] + rng.choice([[], [1], [0], [2**40], ["2"]])
        elif what == 2:
            entry["dtype"] = rng.choice(["I32", "F8_E4M3", "BOOL", "F64", "C64", "U16", "F4", "", 3, "F" + MANY_DIGITS, "BF16"])
        elif what == 3:
            entry["data_offsets"] = rng.choice([[0, 0], [0, len(body)], [8, 4], [-8, 0], [0, 2**63], [0], [0.5, 8], "x", NASTY])
        elif what == 4:
            header[rng.choice(NAMES)] = header.pop(name)
        elif what == 5:
            del header[name]
        elif what == 6:
            header[rng.choice(NAMES)] = {"dtype": "F32", "shape": rng.choice(SHAPES), "data_offsets": [len(body), len(body)]}
        elif what == 7:
            entry |= {"shape": rng.choice(SHAPES), "data_offsets": [0, 0]}
        elif what == 10:
            empty = {"dtype": "F32", "shape": [0], "data_offsets": [len(body), len(body)]}
            header |= {name.replace(".0.", f".{i + 3}.", 1) + f".{i}": empty for i in range(rng.choice([1000, 60_000]))}
        elif what == 8 and any(key.startswith("avdm2.") for key in metadata):
            _nasty_metadata(rng, metadata)
        else:
            metadata[
                rng.choice(["modelspec.prediction_type", "ss_v_parameterization", "avdm2.motion_heads", "x", "format"])
            ] = rng.choice([*TEXTS, "v", "v_prediction", "epsilon", "2", 3, None, ["x"]])
        done.append(what)
        if not header:
            break
    if metadata or rng.random() < 0.5:
        header["__metadata__"] = metadata
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + body)
    return f"header {done}", path


def _nasty_metadata(rng, metadata: dict) -> None:
    key = rng.choice(
        [key for key in metadata if key.startswith("avdm2.")] + ["avdm2.unet_config"] * 4 * ("avdm2.unet_config" in metadata)
    )
    if key == "avdm2.unet_config":
        config = json.loads(metadata[key])
        for _ in range(rng.choice([1, 1, 3])):
            config[rng.choice([*config, "x"])] = rng.choice(NASTY)
        metadata[key] = json.dumps(config)
    elif rng.random() < 0.7:
        metadata[key] = rng.choice([*TEXTS, str(rng.choice(NASTY)), json.dumps(rng.choice(NASTY))])
    else:
        metadata.pop(key)


def _tensors(rng, source: Path, folder: Path, marker: Path) -> tuple[str, Path]:
    """Whole files of tensors as they should not be."""
    tensors, done = _wrong_tensors(rng, load_file(source))
    path = folder / source.name
    save_file({name: tensor.contiguous().clone() for name, tensor in tensors.items()}, path, _metadata(source))
    return f"tensors {done}", path


def _metadata(path: Path) -> dict:
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + length]).get("__metadata__", {})


def _wrong_tensors(rng, tensors: dict) -> tuple[dict, list[int]]:
    tensors, done = dict(tensors), []
    for _ in range(rng.choice([1, 1, 2])):
        name, what = rng.choice([*tensors]), rng.randrange(11)
        some = [*tensors] if rng.random() < 0.3 else [name]
        if what == 0:
            dtype = rng.choice(DTYPES)
            tensors |= {key: tensors[key].to(dtype) for key in some}
        elif what == 1 and tensors[name].is_floating_point():
            broken = tensors[name].float().clone()
            broken.view(-1)[: 1 + broken.numel() // 2] = rng.choice([float("nan"), float("inf"), 1e38])
            tensors[name] = broken
        elif what == 2:
            tensors[name] = torch.zeros(rng.choice(SHAPES))
        elif what == 3:
            tensors[name] = tensors[name].flatten() if rng.random() < 0.5 else tensors[name][None]
        elif what == 4:
            tensors[name] = torch.zeros([n + rng.choice([-1, 1, 7]) for n in tensors[name].shape])
        elif what == 5:
            prefix = rng.choice(PREFIXES)
            tensors = {prefix + key: tensor for key, tensor in tensors.items()}
        elif what == 6:
            word = rng.choice(["norm", "pe", "to_q", "alpha", "down", "up", "0", "attn"])
            tensors = {key: tensor for key, tensor in tensors.items() if word not in key} or tensors
        elif what == 7:
            other = rng.choice([*tensors])
            tensors[name], tensors[other] = tensors[other], tensors[name]
        elif what == 8:
            digits = rng.choice(["7", "5000", MANY_DIGITS[:200], "٣"])
            tensors = {key.replace(".0.", f".{digits}.", rng.choice([1, 9])): tensor for key, tensor in tensors.items()}
        elif what == 9:
            key = rng.choice(
                [
                    name,
                    "cond_stage_model.transformer.text_model.encoder.layers.0.x",
                    "down_blocks.0.motion_modules.0.norm.weight",
                ]
            )
            copies = rng.choice([10, 3000])
            tensors |= {key.replace(".0.", f".{i + 3}.", 1): torch.zeros(1) for i in range(copies)}
        else:
            tensors[rng.choice([n for n in NAMES if len(n) < 10_000])] = torch.zeros(rng.choice([[], [0], [3]]))
        done.append(what)
    return tensors, done


def _pickle(rng, source: Path, folder: Path, marker: Path) -> tuple[str, Path]:
    """Pickles of PyTorch with what is in the wild, and in no weights, among the weights."""
    tensors, done = load_file(source), []
    if rng.random() < 0.5:
        tensors, done = _wrong_tensors(rng, tensors)
    saved, what = dict(tensors), rng.randrange(12)
    name = rng.choice([*saved])
    if what == 0:
        saved[rng.choice(["x", name])] = Payload(marker)
    elif what == 1:
        saved[name] = torch.eye(4).to_sparse()
    elif what == 2:
        saved[name] = saved[name].to("meta")
    elif what == 3:
        saved = {key: torch.zeros(()).expand(tensor.shape) for key, tensor in saved.items()}
    elif what == 4:
        saved[name] = torch.zeros(1).expand(rng.choice([[10**8, 128], [32768, 32768], [2**40]]))
    elif what == 5:
        saved[name] = rng.choice(
            [torch.nn.Parameter(torch.ones(2)), torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])]
        )
    elif what == 6:
        saved |= {3: torch.ones(2), (1, 2): torch.ones(1), 10**5000: torch.ones(1), None: 2, "x": NASTY[:5]}
    elif what == 7:
        for wrapper in rng.choices(["state_dict", "model", "motion_module", "module", "x"], k=rng.choice([1, 2, 6])):
            saved = {wrapper: saved, "epoch": 1}
    elif what == 8:
        saved = {f"k{i}": saved for i in range(rng.choice([3, 20_000]))}
    elif what == 9:
        saved[name] = torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8)
    elif what == 10:
        saved = rng.choice([[*saved.values()], saved[name], {"state_dict": Payload(marker)}, {}, None, "x", {"state_dict": []}])
    path = folder / source.with_suffix(rng.choice([".ckpt", ".pt", ".pth", ".bin"])).name
    file = io.BytesIO()
    try:
        torch.save(saved, file, _use_new_zipfile_serialization=rng.random() < 0.7)
    except (NotImplementedError, RuntimeError):  # some kinds have no place in the legacy format
        file = io.BytesIO(pickle.dumps({"a": Payload(marker)}))
    data = bytearray(file.getvalue())
    if rng.random() < 0.3:
        done.append(_mangled(rng, data, path)[0])
    else:
        path.write_bytes(data)
    return f"pickle {what} {done}", path


def _raw_pickle(rng, source: Path, folder: Path, marker: Path) -> tuple[str, Path]:
    """Pickles written by hand: small, and asking for much."""
    zeros = b"\0" * 2**20
    programs = [
        b"\x80\x02cbuiltins\nbytearray\n\x8a\x05\x00\x28\x6b\xee\x00\x85R.",
        b"\x80\x02c__builtin__\nbytearray\n\x8a\x05\x00\x28\x6b\xee\x00\x85R.",
        b"\x80\x02ctorch\nFloatTensor\n\x8a\x05\x00\x28\x6b\xee\x00\x85R.",
        b"\x80\x02cos\nsystem\nX" + struct.pack("<I", len(f"touch {marker}")) + f"touch {marker}".encode() + b"\x85R.",
        b"\x80\x02}" + b"(" * 100_000 + b".",
        b"\x80\x02" + b"]" * 100_000 + b"a" * 99_999 + b".",
        b"\x80\x02X\xff\xff\xff\x7f",
        b"\x80\x02}X\x01\x00\x00\x00a" + b"\x8a\xff" + b"\xff" * 255 + b"s.",
        b"\x80\x04\x95\xff\xff\xff\xff\xff\xff\xff\x7f}.",
        pickle.dumps({"a": Payload(marker)}, protocol=rng.choice([0, 1, 2, 4])),
        pickle.dumps({"state_dict": {"a": Payload(marker)}}, protocol=2),
        zeros,
    ]
    what = rng.randrange(len(programs))
    program, path = programs[what], folder / f"{source.stem}.ckpt"
    wrapped = rng.randrange(3)
    if wrapped == 0:
        path.write_bytes(program)
    else:
        compression = rng.choice([zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
        with zipfile.ZipFile(path, "w", compression) as archive:
            with archive.open("archive/data.pkl", "w", force_zip64=True) as entry:
                entry.write(program)
                for _ in range(300 if what == len(programs) - 1 and compression == zipfile.ZIP_DEFLATED else 0):
                    entry.write(zeros)
            archive.writestr("archive/version", "3\n")
            archive.writestr("archive/byteorder", "little")
            archive.writestr("archive/data/0", zeros[:64])
    return f"raw pickle {what} {wrapped}", path


def _foreign(rng, source: Path, folder: Path, marker: Path) -> tuple[str, Path]:
    """A whole file of another kind under this one's name."""
    other = rng.choice(sorted(source.parent.glob("*.safetensors")))
    path = folder / source.name
    path.write_bytes(other.read_bytes())
    return f"foreign {other.stem}", path


# ---- folders ----


def _damaged_stack(rng, source: Path, folder: Path, marker: Path) -> tuple[str, Path]:
    """A folder in the diffusers layout of which one part is damaged."""
    stack = shutil.copytree(source, folder / "stack")
    texts = [*stack.rglob("*.json")]
    weights = [path for path in stack.rglob("*.safetensors") if path.stem != "feature_net"]
    what = rng.choice([0, 0, 0, 0, 1, 2, 3, 4, 5, 6, 7, 8])
    path = rng.choice(weights if what in (1, 5, 8) else texts)
    done = path.relative_to(stack)
    if what == 0:
        said = json.loads(path.read_text())
        for _ in range(rng.choice([1, 1, 3])):
            if isinstance(said, dict) and said:
                said[rng.choice([*said])] = rng.choice(NASTY)
        path.write_text(json.dumps(said))
    elif what == 1:
        inner = folder / "inner"
        inner.mkdir()
        how, made = rng.choice([_bytes, _header, _tensors])(rng, path, inner, marker)
        shutil.copy(made, path)
        done = f"{done} {how}"
    elif what == 2:
        path.write_bytes(rng.choice([b"", b"\xff\xfe", b"[" * 100_000, b"[]", b"3", b'{"a":', b"null", b'"x"', b"\0" * 99]))
    elif what == 3:
        (stack / "stack.json").write_text(
            rng.choice(
                [
                    *TEXTS,
                    json.dumps({rng.choice(["frames", "latent_rgb_factors", "latent_rgb_factors_bias"]): rng.choice(NASTY)}),
                ]
            ),
            errors="surrogatepass",
        )
    elif what == 4:
        path.unlink()
        rng.choice([os.mkfifo, os.mkdir, lambda p: os.symlink(p, p)])(path)
    elif what == 5:
        path.rename(path.with_name(path.stem + rng.choice([".fp16.safetensors", ".bin", ".non_ema.safetensors"])))
    elif what == 6:
        parts = [part for part in stack.iterdir() if part.is_dir()]
        one, other = rng.sample(parts, 2)
        shutil.rmtree(one)
        shutil.copytree(other, one)
        done = f"{other.name} as {one.name}"
    elif what == 7:
        (stack / "scheduler").mkdir()
        text = json.dumps({rng.choice(["prediction_type", "rescale_betas_zero_snr"]): rng.choice([*NASTY, "v_prediction"])})
        (stack / "scheduler" / "scheduler_config.json").write_text(rng.choice([*TEXTS, text, text]), errors="surrogatepass")
    else:
        path.unlink()
        rng.choice([os.mkfifo, os.mkdir, lambda p: os.symlink(p, p)])(path)
    return f"stack {what} {done}", stack
