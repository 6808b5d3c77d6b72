"""What drawing yields as it goes, here or on a server. Nothing here imports torch."""

from dataclasses import dataclass

import numpy as np

from sana_cli.errors import SanaError


@dataclass(frozen=True)
class Progress:
    """`done` of `total` units of a stage took `seconds`."""

    stage: str  # "load", "encode", "image", "denoise" or "decode"
    done: int
    total: int
    seconds: float
    peak_bytes: int = 0  # when the stage's last unit is done: the most memory held so far
    network: str = ""  # of "load": what was loaded


@dataclass(frozen=True)
class Preview:
    """The estimate of the finished image after `step` of `steps` steps of the recipe at `index`.

    uint8 RGB (height, width, 3), as the image will be.
    """

    index: int
    step: int
    steps: int
    pixels: np.ndarray


@dataclass(frozen=True)
class ImageDone:
    """uint8 RGB (height, width, 3) of the recipe at `index`."""

    index: int
    pixels: np.ndarray


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


Event = Progress | Preview | ImageDone | Failure | Notice
