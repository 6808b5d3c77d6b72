"""The colours of the illustrated scenes: of objects, lands and skies, and the effect of light."""

from dataclasses import dataclass
from functools import cache

import numpy as np

RGB = tuple[int, int, int]

COLOURS: dict[str, RGB] = {  # that captions can name
    "red": (214, 52, 48),
    "orange": (242, 134, 30),
    "yellow": (252, 208, 48),
    "green": (44, 138, 80),
    "blue": (44, 96, 204),
    "purple": (126, 68, 178),
    "pink": (242, 118, 172),
    "white": (252, 252, 250),
}
DETAILS: dict[str, RGB] = {  # other parts of objects
    "wood": (112, 76, 54),
    "rust": (132, 62, 64),
    "cream": (250, 232, 190),
    "ink": (32, 32, 44),
}
SHADE = 0.87  # factor of a colour on the side away from the light


@dataclass(frozen=True)
class Light:
    """A time of day: the sky from top to horizon, and the tint of everything else."""

    sky: tuple[RGB, RGB, RGB]
    land: tuple[RGB, float]
    things: tuple[RGB, float]
    cloud: RGB
    disc: RGB
    window: RGB


LIGHTS: dict[str, Light] = {
    "dawn": Light(
        sky=((122, 156, 206), (230, 190, 204), (255, 226, 196)),
        land=((206, 150, 172), 0.28),
        things=((255, 190, 176), 0.08),
        cloud=(255, 240, 238),
        disc=(255, 246, 214),
        window=(176, 202, 222),
    ),
    "noon": Light(
        sky=((84, 166, 230), (140, 202, 242), (186, 224, 244)),
        land=((255, 255, 255), 0.0),
        things=((255, 255, 255), 0.0),
        cloud=(252, 252, 250),
        disc=(255, 243, 176),
        window=(186, 216, 232),
    ),
    "sunset": Light(
        sky=((88, 62, 128), (222, 112, 104), (255, 192, 116)),
        land=((128, 52, 92), 0.42),
        things=((255, 140, 90), 0.1),
        cloud=(252, 214, 200),
        disc=(255, 236, 170),
        window=(255, 214, 122),
    ),
    "night": Light(
        sky=((12, 18, 50), (24, 36, 82), (44, 56, 106)),
        land=((26, 38, 96), 0.66),
        things=((44, 56, 130), 0.16),
        cloud=(150, 160, 190),
        disc=(250, 246, 222),
        window=(255, 214, 110),
    ),
}
LANDS: dict[str, dict[str, RGB]] = {  # at noon
    "mountains": {"body": (104, 120, 150), "ground": (164, 190, 118)},
    "snowy mountains": {"body": (120, 142, 176), "ground": (186, 206, 214)},
    "hills": {"body": (126, 178, 104), "ground": (168, 200, 112)},
    "dunes": {"body": (226, 180, 118), "ground": (238, 204, 148)},
    "sea": {"body": (62, 160, 182), "ground": (240, 216, 164)},
    "city": {"body": (98, 114, 148), "ground": (148, 172, 150)},
}
SNOW: RGB = (216, 229, 243)


def mix(colour: np.ndarray | RGB, other: np.ndarray | RGB, amount: float) -> np.ndarray:
    return np.asarray(colour, np.float32) * (1 - amount) + np.asarray(other, np.float32) * amount


@cache
def thing_colour(light: str, name: str) -> np.ndarray:
    """Return the colour of an object or of a detail in this light."""
    return mix({**COLOURS, **DETAILS}[name], *LIGHTS[light].things)


@cache
def land_colour(light: str, land: str, part: str, far: float = 0.0) -> np.ndarray:
    """Return the colour of a land's "body" or "ground"; `far` from 0 to 1 fades it into haze."""
    near = mix(LANDS[land][part], *LIGHTS[light].land)
    return mix(near, LIGHTS[light].sky[2], 0.62 * far)


@cache
def snow_colour(light: str) -> np.ndarray:
    tint, amount = LIGHTS[light].land
    return mix(SNOW, tint, 0.62 * amount)


@cache
def sky_colours(light: str, count: int) -> np.ndarray:
    """Return colours (count, 3) from the top to the horizon; the middle one is at 0.55."""
    way = np.linspace(0, 1, count)
    stops = np.array(LIGHTS[light].sky, np.float32)
    return np.stack([np.interp(way, (0, 0.55, 1), stops[:, c]) for c in range(3)], -1)


def sky_at(light: str, way: np.ndarray) -> np.ndarray:
    """Return colours (n, 3) at positions (n,) from 0 at the top to 1 at the horizon."""
    stops = sky_colours(light, 64)
    return np.stack([np.interp(way, np.linspace(0, 1, 64), stops[:, c]) for c in range(3)], -1)
