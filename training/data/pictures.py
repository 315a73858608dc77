"""Pictures of a style: found with their captions, read as what a viewer shows."""

import warnings
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from training.data import DataError
from training.data.captions import captioned
from training.data.sizes import cover
from training.data.unusable import DAMAGED, ENCODING, MISSING, Unusable, counted, named, require_none, told

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
_ORIENTATION = 0x0112  # EXIF's tag
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM, 5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE, 8: Image.Transpose.ROTATE_90,
}  # fmt: skip


class PictureError(DataError):
    """A picture that cannot be used; the message is one sentence that names it, `kind` what it is counted under."""

    def __init__(self, message: str, kind: str = DAMAGED):
        super().__init__(message)
        self.kind = kind


def read_pictures(folder: Path, height: int, width: int, strict: bool = False) -> tuple[Tensor, list[str]]:
    """The pictures of a folder, (N, height, width, 3) uint8, and their captions; those that cannot be used are named and left out.

    DataError as `find_images`, where none can be used, and with `strict` where one cannot.
    """
    images, left_out = find_images(folder)
    pixels, captions = [], []
    for path, caption in images:
        try:
            pixels.append(read_image(path, height, width))
            captions.append(caption)
        except PictureError as error:
            left_out.append(Unusable(path.relative_to(folder).as_posix(), str(error), error.kind))
    named(left_out)
    require_none(left_out, folder, strict)
    if not pixels:
        raise DataError(
            f"Expected pictures that can be used in {folder}, found {counted(left_out)}; first: {left_out[0].reason}"
        )
    told(folder, len(pixels), "pictures", left_out)
    return torch.stack(pixels), captions


def find_images(folder: Path) -> tuple[list[tuple[Path, str]], list[Unusable]]:
    """The images of a folder and its subfolders, sorted by name, with their captions; and those whose caption cannot be read.

    A caption stands in `captions.csv` or `captions.jsonl` (`file`, `caption`), else in a text file beside the image; one without is
    trained on the empty prompt. DataError for a folder that is missing or has no images, or a table that cannot be used.
    """
    if not folder.is_dir():
        raise DataError(f"Expected a folder of images at {folder}, found {'a file' if folder.exists() else 'nothing'}.")
    # What a table says of other files that are there is not about pictures.
    found = [
        one for one in captioned(folder, IMAGE_SUFFIXES) if one.path.suffix.lower() in IMAGE_SUFFIXES or not one.path.exists()
    ]
    if not found:
        raise DataError(f"Expected images ({', '.join(IMAGE_SUFFIXES)}) in {folder}, found none; put some there.")
    images = sorted((one.path, one.caption) for one in found if not one.problem)
    return images, [Unusable(one.name, one.problem, ENCODING) for one in found if one.problem]


def read_image(path: Path, height: int, width: int) -> Tensor:
    """(height, width, 3) uint8: turned as its EXIF says, on white where it is transparent, resized to cover, the centre cut out.

    EXIF that cannot be read is passed over. PictureError where it is no image, or its values are of no known range.
    """
    if not path.is_file():  # a pipe would wait for ever
        found = "a folder" if path.is_dir() else "neither a file nor a folder" if path.exists() else "nothing"
        raise PictureError(f"Expected an image at {path}, found {found}.", MISSING)
    try:
        with Image.open(path) as image:
            image.load()
            picture = _rgb(_turned(image))
    except Exception as error:  # of a damaged file: OSError, ValueError, SyntaxError, struct.error, ..., as its format has it
        cause = " ".join(str(error).split()) or type(error).__name__
        raise PictureError(f"Expected an image at {path}, found: {cause}; mend it or take it out of the folder.") from error
    return cover(torch.from_numpy(np.array(picture))[None], height, width)[0]


def _turned(image: Image.Image) -> Image.Image:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            turn = _TURNS.get(image.getexif().get(_ORIENTATION))
    except Exception:  # damaged EXIF: the picture is used as it is stored
        turn = None
    return image if turn is None else image.transpose(turn)


def _rgb(image: Image.Image) -> Image.Image:
    """As 8-bit RGB, by value; what shines through is white."""
    if image.mode == "F":
        raise ValueError("fractions (32 bits a channel), whose range it does not say")
    if image.mode == "I" or image.mode.startswith("I;16"):
        values = np.array(image).astype(np.int64)
        if values.min() < 0 or values.max() > 65535 or (image.mode == "I" and image.format not in (None, "PNG", "PPM")):
            raise ValueError("whole numbers of 32 bits, whose range it does not say")
        if isinstance(clear := image.info.get("transparency"), int):
            values[values == clear] = 65535
        return Image.fromarray(((values + 128) // 257).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")
