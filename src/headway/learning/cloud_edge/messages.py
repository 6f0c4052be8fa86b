"""What edge and cloud say to each other: tensors in safetensors, with a few words of JSON in its metadata. Nothing is unpickled.

Samples travel in a codec: "fp32", "fp16", "uint8" (256 steps between the smallest and the largest value of each sample) or "jpeg"
(images of 1 or 3 channels with values from 0 to 1; needs Pillow). Tensors of integers, token ids say, travel as they are.
"""

from __future__ import annotations

import io
import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from headway.learning.cloud_edge.affine import Samples, count

Codec = Literal["fp32", "fp16", "uint8", "jpeg"]
CODECS: tuple[Codec, ...] = get_args(Codec)
JPEG_QUALITY = 90
_ONLY = "x"  # the name on the wire of a tensor without one


class BadMessage(ValueError):
    """The bytes are no message of this protocol, or one that was damaged on its way."""


@dataclass(frozen=True)
class Request:
    """One call of the protocol, whatever carries it. Names of headers are in lower case."""

    method: str
    path: str
    body: bytes = b""
    headers: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Response:
    """The answer to a :class:`Request`. Names of headers are in lower case."""

    status: int
    body: bytes = b""
    headers: Mapping[str, str] = field(default_factory=dict)

    def json(self) -> dict[str, Any]:
        """The body as an object.

        Raises:
            BadMessage: it is none.
        """
        return parse_json(self.body)


def parse_json(body: bytes) -> dict[str, Any]:
    """An object of JSON; BadMessage for anything else."""
    try:
        value = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise BadMessage(f"the body is no JSON: {error}") from None
    if not isinstance(value, dict):
        raise BadMessage(f"the body must be a JSON object; it is {type(value).__name__}")
    return value


def pack(tensors: Mapping[str, Tensor], words: Mapping[str, Any]) -> bytes:
    """Tensors and plain data as one safetensors file."""
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    return save(plain, {"headway": json.dumps(words)})


def unpack(data: bytes) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The inverse of :func:`pack`.

    Raises:
        BadMessage: the bytes are cut, damaged or something else.
    """
    try:
        tensors = load(data)
        (length,) = struct.unpack("<Q", data[:8])
        words = json.loads(json.loads(data[8 : 8 + length])["__metadata__"]["headway"])
    except (SafetensorError, ValueError, KeyError, TypeError, struct.error, RuntimeError) as error:
        raise BadMessage(f"the body is no safetensors file of this protocol ({error})") from None
    if not isinstance(words, dict):
        raise BadMessage("the words of the message are no JSON object")
    return tensors, words


def check_codec(codec: str) -> Codec:
    """The codec itself.

    Raises:
        ValueError: there is no such codec.
        ImportError: it is "jpeg" and Pillow is not there.
    """
    for known in CODECS:
        if codec == known:
            if codec == "jpeg":
                _pillow()
            return known
    raise ValueError(f"codec must be one of {', '.join(CODECS)}; it is {codec!r}")


def encode(samples: Samples, codec: Codec) -> dict[str, Tensor]:
    """Samples as they travel.

    Raises:
        ValueError: "jpeg" with something that is no image.
    """
    found: dict[str, Tensor] = {}
    for key, tensor in samples.items():
        name, tensor = key or _ONLY, tensor.detach().cpu()
        if not tensor.is_floating_point():
            found[name] = tensor
        elif codec == "jpeg" and tensor.dim() == 4:
            found |= _to_jpeg(name, tensor)
        elif codec == "uint8":
            rows = tensor.float()[:, None].flatten(1)
            low, high = rows.amin(1), rows.amax(1)
            scale = ((high - low) / 255).clamp(min=torch.finfo(torch.float32).tiny)
            levels = ((rows - low[:, None]) / scale[:, None]).round().clamp(0, 255).to(torch.uint8)
            found |= {name: levels.reshape(tensor.shape), f"{name}:low": low, f"{name}:scale": scale}
        else:
            if codec == "jpeg":
                raise ValueError(f"jpeg takes images (n, 1 or 3, height, width); {name} has {tensor.dim()} axes")
            found[name] = tensor.to(torch.float16 if codec == "fp16" else torch.float32)
    return found


def decode(tensors: Mapping[str, Tensor]) -> Samples:
    """The inverse of :func:`encode`; floats come back as float32.

    Raises:
        BadMessage: tensors that belong together do not fit.
    """
    found: Samples = {}
    for name, tensor in tensors.items():
        if ":" in name:
            continue
        low, scale, sizes = (tensors.get(f"{name}:{part}") for part in ("low", "scale", "sizes"))
        key = "" if name == _ONLY else name
        if sizes is not None:
            found[key] = _from_jpeg(tensor, sizes)
        elif low is not None and scale is not None:
            if not tensor.dim() or low.shape != (len(tensor),) or scale.shape != low.shape:
                raise BadMessage(f"{name} has the shape {tuple(tensor.shape)} and {low.numel()} scales")
            spread = (-1, *[1] * (tensor.dim() - 1))
            found[key] = tensor.float() * scale.view(spread) + low.view(spread)
        else:
            found[key] = tensor.float() if tensor.is_floating_point() else tensor
    if not found or any(not tensor.dim() for tensor in found.values()):
        raise BadMessage("the message holds no samples")
    if any(len(tensor) != count(found) for tensor in found.values()):
        raise BadMessage("the tensors of the message hold different numbers of samples")
    return found


def _pillow() -> Any:
    try:
        from PIL import Image  # type: ignore[import-not-found]
    except ImportError:
        raise ImportError("the codec jpeg needs Pillow: pip install pillow, or choose fp32, fp16 or uint8") from None
    return Image


def _to_jpeg(name: str, images: Tensor) -> dict[str, Tensor]:
    if images.shape[1] not in (1, 3) or (images.numel() and not 0 <= images.amin() <= images.amax() <= 1):
        raise ValueError(
            f"jpeg takes images (n, 1 or 3, height, width) with values from 0 to 1; {name} has the shape {tuple(images.shape)} "
            f"and values from {float(images.amin()):.3g} to {float(images.amax()):.3g}"
        )
    Image, files = _pillow(), []
    for pixels in (images * 255).round().to(torch.uint8).movedim(1, -1):
        buffer = io.BytesIO()
        Image.fromarray(pixels.squeeze(-1).numpy()).save(buffer, "JPEG", quality=JPEG_QUALITY)
        files.append(buffer.getvalue())
    joined = torch.frombuffer(bytearray(b"".join(files) or b"\0"), dtype=torch.uint8)
    return {name: joined, f"{name}:sizes": torch.tensor([len(file) for file in files], dtype=torch.int64)}


def _from_jpeg(joined: Tensor, sizes: Tensor) -> Tensor:
    import numpy as np

    Image, images = _pillow(), []
    if joined.dtype != torch.uint8 or sizes.dim() != 1 or (sizes < 1).any() or int(sizes.sum()) > joined.numel():
        raise BadMessage("the sizes of the images do not fit their bytes")
    for file in joined[: int(sizes.sum())].split(sizes.tolist()):
        try:
            with Image.open(io.BytesIO(file.numpy().tobytes()), formats=["JPEG"]) as image:
                pixels = torch.from_numpy(np.array(image))
        except Exception as error:  # whatever a damaged picture makes of the decoder
            raise BadMessage(f"an image cannot be read ({error})") from None
        images.append((pixels[None] if pixels.dim() == 2 else pixels.movedim(-1, 0)).float() / 255)
    if len({image.shape for image in images}) != 1:
        raise BadMessage("the images differ in size, or there are none")
    return torch.stack(images)
