"""What drawing yields as it goes, here or on a server. Nothing here imports torch."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from sana_cli.errors import SanaError

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor


@dataclass(frozen=True)
class Progress:
    """`done` of `total` units of a stage took `seconds`."""

    stage: str  # "load", "encode", "image", "denoise" or "decode"
    done: int
    total: int
    seconds: float
    peak_bytes: int = 0  # when the stage's last unit is done: the most memory held so far
    network: str = ""  # what was loaded; of "encode", what ran, "" for a text that was in the cache


@dataclass(frozen=True)
class Preview:
    """The estimate of the finished image after `step` of `steps` steps of the recipe at `index`.

    uint8 RGB (height, width, 3), as the image will be.
    """

    index: int
    step: int
    steps: int
    pixels: "np.ndarray"


@dataclass(frozen=True)
class Latents:
    """The latents of the recipe at `index` after a step, float32 (1, 32, h, w).

    `step` counts the steps that are run from 0; `timestep` is that of the step, in [0, 1000]. The
    tensor is the sampler's own and must not be changed.
    """

    index: int
    step: int
    timestep: float
    tensor: "Tensor"


@dataclass(frozen=True)
class ImageDone:
    """uint8 RGB (height, width, 3) of the recipe at `index`."""

    index: int
    pixels: "np.ndarray"


@dataclass(frozen=True)
class Failure:
    """Why there is no image of the recipe at `index`. The others are drawn all the same."""

    index: int
    error: SanaError


@dataclass(frozen=True)
class Notice:
    """Something worth telling that happened while drawing."""

    text: str
    warning: bool = False


Event = Progress | Preview | Latents | ImageDone | Failure | Notice
