"""JPEGs decoded and resized on a GPU: by nvJPEG, as torchcodec calls it, and torch's antialiased interpolation.

Which files come here is said by `operators.codecs.jpeg.is_for_gpu`. Images are decoded one by one, in as many threads as decode
on the CPU, so that neither an image's pixels nor its failure depend on others.
"""

import importlib
import re
import threading
from contextlib import AbstractContextManager, nullcontext

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate

from operators.codecs.jpeg import MAX_GPU_PIXELS
from operators.codecs.memory import DecodeMemory
from operators.codecs.refusal import GpuDecoderFailed
from operators.image import MAX_RESIZED_PIXELS, Geometry, Placement, resample
from storage.errors import RayliftError
from storage.orientation import Turn

MEMORY_BYTES = DecodeMemory(2 * MAX_GPU_PIXELS).capacity
"""Of a GPU, that all images take which a process decodes at a time, beside nvJPEG's own buffers (30 MB a thread)."""

_FILTERS = ("bilinear", "bicubic")
"""What torch's interpolation has of Pillow's."""

_MAX_SHRINK = 16
"""Above this a side, torch's kernels may lack shared memory for the pixels that one is made of."""

_OF_THE_FILE = re.compile(r"(?:[Ff]ailed[\w ]*|info|batch): (?:3|4|10)\b|Unknown chroma subsampling")
"""How torchcodec says nvJPEG's BAD_JPEG, JPEG_NOT_SUPPORTED and INCOMPLETE_BITSTREAM."""


class NoNvjpeg(RayliftError):
    """What decodes JPEGs on GPUs isn't here."""


def require_nvjpeg() -> None:
    """Raises `NoNvjpeg` where torchcodec isn't installed, can't be loaded beside this torch, or was built without nvJPEG."""
    try:
        decoders = importlib.import_module("torchcodec.decoders")
    except ModuleNotFoundError:
        raise NoNvjpeg(
            "--jpeg-decoder nvjpeg needs torchcodec, which isn't installed here: pip install 'raylift[nvjpeg]'"
        ) from None
    except (ImportError, OSError, RuntimeError) as error:
        said = str(error).strip().partition("\n")[0]
        raise NoNvjpeg(
            f"--jpeg-decoder nvjpeg needs torchcodec, which can't be loaded beside torch {torch.__version__}: {said}"
        ) from None
    if not hasattr(decoders, "decode_jpeg"):
        raise NoNvjpeg("--jpeg-decoder nvjpeg needs torchcodec 0.16 or later; the one that is installed decodes no images")
    try:
        decoders.decode_jpeg([], device="cuda")  # which says first whether there is nvJPEG, and then that there is no image
    except RuntimeError as error:
        if "not compiled with nvJPEG" in str(error):
            raise NoNvjpeg(
                "--jpeg-decoder nvjpeg: the torchcodec that is installed was built without nvJPEG; install its build for CUDA"
            ) from None


class Nvjpeg:
    """Decodes JPEGs on `device`. Several threads may; on a CPU, to try it, they are decoded by torchcodec's libjpeg."""

    def __init__(self, device: str):
        self.device = torch.device(device)
        self._memory = DecodeMemory(2 * MAX_GPU_PIXELS)
        self._threads = threading.local()
        self._decode_jpeg = importlib.import_module("torchcodec.decoders").decode_jpeg

    def __call__(
        self, opened: Image.Image, data: bytes, turn: Turn | None, placement: Placement, geometry: Geometry
    ) -> np.ndarray | None:
        """`data`, which Pillow opened, turned and placed, as uint8 [H, W, 3]; None where nvJPEG doesn't take it.

        Raises `GpuDecoderFailed`.
        """
        try:
            with self._memory.hold(opened), self._stream(), torch.inference_mode():
                # Grey files by their one channel: that nvJPEG makes colours of them isn't said.
                rgb = self._decode_jpeg(data, mode="UNCHANGED", device=self.device).expand(3, -1, -1)
                if turn:
                    rgb = (rgb.transpose(1, 2) if turn.exchanges else rgb).flip(turn.mirrored_axes(1))
                return _placed(rgb, placement, geometry)
        except RuntimeError as error:
            if _OF_THE_FILE.search(str(error)):
                return None
            raise GpuDecoderFailed(f"a JPEG couldn't be decoded on {self.device}: {error}") from error

    def _stream(self) -> AbstractContextManager[object]:
        """This thread's own, on which it waits for nothing that the model computes."""
        if self.device.type != "cuda":
            return nullcontext()
        if not hasattr(self._threads, "stream"):
            self._threads.stream = torch.cuda.Stream(self.device)
        return torch.cuda.stream(self._threads.stream)


def _placed(rgb: Tensor, placement: Placement, geometry: Geometry) -> np.ndarray:
    """An upright image, uint8 [3, h, w], as `operators.image.resample` gives it, but for rounding and clipping between its two
    passes."""
    (w, h), (x, y) = placement.resized, placement.corner
    shrink = max(rgb.shape[1] / h, rgb.shape[2] / w)
    if geometry.interpolation not in _FILTERS or shrink > _MAX_SHRINK or w * h > MAX_RESIZED_PIXELS:
        return resample(Image.fromarray(rgb.permute(1, 2, 0).contiguous().cpu().numpy()), placement, geometry)
    made = interpolate(rgb[None].float(), (h, w), mode=geometry.interpolation, align_corners=False, antialias=True)[0]
    part = made.round_().clamp_(0, 255).to(torch.uint8)[:, max(0, -y) :, max(0, -x) :][:, : geometry.height, : geometry.width]
    x, y = max(0, x), max(0, y)
    if part.shape[1:] != (geometry.height, geometry.width):
        canvas = torch.tensor([round(255 * value) for value in geometry.mean], dtype=torch.uint8, device=rgb.device)
        canvas = canvas.view(3, 1, 1).repeat(1, geometry.height, geometry.width)
        canvas[:, y : y + part.shape[1], x : x + part.shape[2]] = part
        part = canvas
    return part.permute(1, 2, 0).contiguous().cpu().numpy()
