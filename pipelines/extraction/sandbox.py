"""Decoding in a process of its own, which may crash, run out of memory or never end, and costs its image alone.

For images among which one is suspected: of a task whose worker died or hung. The process is given bytes and gives back pixels
and words; nothing that it says is executed or unpickled here.
"""

import contextlib
import json
import os
import resource
import signal
import subprocess
import sys
import threading
from dataclasses import asdict
from typing import BinaryIO

import numpy as np
import psutil

from operators.codecs.memory import DecodeMemory
from operators.codecs.refusal import GpuDecoderFailed, ImageDamaged, ImageRefused
from operators.image import DecodedImage, Geometry, GpuDecoder, Placement, decode, limit_pillow
from storage.errors import RayliftError

DECODE_SECONDS = 120.0
"""No image takes so long (44 megapixels of noise as JPEG 2000: a minute); what is above the limits is refused by its header."""

_PROGRAM = f"from {__name__} import serve; serve()"

_SPARE_BYTES = 2**30
"""Address space of the process beyond what decoding may take."""

_REFUSALS = {kind.__name__: kind for kind in (ImageRefused, ImageDamaged)}


class DecoderDied(RayliftError):
    """Decoding an image ended its process, or didn't end."""

    exit_code = 1


class Sandbox(contextlib.AbstractContextManager["Sandbox"]):
    """A process that decodes images as `decode` does; closed by `with`. One thread at a time."""

    def __init__(self, geometry: Geometry, *, max_pixels: int, draft: bool, gpu: str = ""):
        """`gpu`: the device that decodes JPEGs, where one does."""
        settings = {"geometry": asdict(geometry), "max_pixels": max_pixels, "draft": draft, "gpu": gpu}
        self._settings = json.dumps(settings)
        self._shape = (geometry.height, geometry.width, 3)
        self._process: subprocess.Popen[bytes] | None = None

    def __exit__(self, *_: object) -> None:
        self._end()

    def decode(self, data: bytes) -> DecodedImage:
        """Raises `ImageRefused`, `MemoryError`, and `DecoderDied` where two processes ended over it, or one took too long."""
        ends = []
        for _ in range(2):  # the first may have been ended from outside
            process = self._running()
            late = threading.Event()
            timer = threading.Timer(DECODE_SECONDS, lambda process=process, late=late: (late.set(), process.kill()))
            timer.start()
            try:
                return self._ask(process, data)
            except (BrokenPipeError, EOFError):
                code = self._end()
                ends.append(signal.Signals(-code).name if code < 0 else f"exit code {code}")
            finally:
                timer.cancel()
            if late.is_set():
                raise DecoderDied(f"decoding it took more than {DECODE_SECONDS:g} s")
        raise DecoderDied(f"decoding it ended its process twice ({', '.join(ends)}): a crash in native code, or out of memory")

    def _running(self) -> "subprocess.Popen[bytes]":
        if self._process is None:
            path = os.pathsep.join(entry for entry in sys.path if entry)
            environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
            self._process = subprocess.Popen(
                [sys.executable, "-c", _PROGRAM, self._settings], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment
            )
            if self._process.stdout.read(1) != b"\n":  # type: ignore[union-attr]
                self._end()
                raise RuntimeError("no process for decoding could be started")
        return self._process

    def _ask(self, process: "subprocess.Popen[bytes]", data: bytes) -> DecodedImage:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(len(data).to_bytes(8, "big"))
        process.stdin.write(data)
        process.stdin.flush()
        answer = json.loads(_exactly(process.stdout, int.from_bytes(_exactly(process.stdout, 4), "big")))
        if "refused" in answer:
            refusal = _REFUSALS[answer["type"]](str(answer["refused"]))
            refusal.kind = str(answer["kind"])
            raise refusal
        if "memory" in answer:
            raise MemoryError(str(answer["memory"]))
        pixels = np.frombuffer(_exactly(process.stdout, int(np.prod(self._shape))), np.uint8).reshape(self._shape)
        place = {**answer["placement"], **{name: tuple(answer["placement"][name]) for name in ("resized", "corner")}}
        return DecodedImage(
            pixels=pixels,
            width=int(answer["width"]),
            height=int(answer["height"]),
            placement=Placement(**place),
            conversion=str(answer["conversion"]),
        )

    def _end(self) -> int:
        process, self._process = self._process, None
        if process is None:
            return 0
        for pipe in (process.stdin, process.stdout):
            with contextlib.suppress(BrokenPipeError):
                pipe.close()  # type: ignore[union-attr]
        try:
            return process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            process.kill()
            return process.wait()


def _exactly(pipe: BinaryIO, count: int) -> bytes:
    data = pipe.read(count)
    if len(data) < count:
        raise EOFError
    return data


def serve() -> None:
    """The process's part: lengths and bytes of images from standard input, answers to standard output."""
    settings = json.loads(sys.argv[1])
    geometry = Geometry(**{**settings["geometry"], "mean": tuple(settings["geometry"]["mean"])})
    limit_pillow(settings["max_pixels"])
    memory = DecodeMemory(settings["max_pixels"])
    gpu: GpuDecoder | None = None
    if settings["gpu"]:
        from operators.nvjpeg import Nvjpeg

        gpu = Nvjpeg(settings["gpu"])
    most = psutil.Process().memory_info().vms + memory.capacity + _SPARE_BYTES
    if gpu is None:  # CUDA takes addresses for all memory that there is
        resource.setrlimit(resource.RLIMIT_AS, (most, most))
    sink = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints is no answer
    sink.write(b"\n")
    sink.flush()
    while length := sys.stdin.buffer.read(8):
        data = sys.stdin.buffer.read(int.from_bytes(length, "big"))
        # Who would end it may have died: the system does then, whatever native code is at.
        signal.alarm(int(2 * DECODE_SECONDS))
        try:
            limit, draft = settings["max_pixels"], settings["draft"]
            image = decode(data, geometry, max_pixels=limit, draft=draft, gpu=gpu, memory=memory)
        except GpuDecoderFailed:
            raise  # this process may not be able to use its GPU any more
        except ImageRefused as error:
            answer, pixels = {"refused": str(error), "type": type(error).__name__, "kind": error.kind}, b""
        except MemoryError as error:
            answer, pixels = {"memory": str(error)}, b""
        else:
            answer = {name: value for name, value in asdict(image).items() if name != "pixels"}
            pixels = image.pixels.tobytes()
        signal.alarm(0)
        text = json.dumps(answer).encode()
        sink.write(len(text).to_bytes(4, "big") + text + pixels)
        sink.flush()
