"""Embedded colour profiles: an image's colours as sRGB, in which the models see and draw."""

import io

import numpy as np
from PIL import Image, ImageChops, ImageCms

NO_DIFFERENCE = 2  # of 255: the roundings of a profile that is sRGB by another name


def to_srgb(image: Image.Image, plain: Image.Image, name: str, notes: list[str]) -> Image.Image:
    """Convert `plain`, which is `image` as L, RGB or RGBA, from the profile in `image` to sRGB.

    It is returned as it is if there is no profile, or one of sRGB. A note tells of a conversion,
    and of a profile that cannot be used.
    """
    profile = image.info.get("icc_profile")
    if not profile or not isinstance(profile, bytes):  # a PNG's text may have that name
        return plain
    seen = plain.convert("RGB")
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if image.mode == "CMYK":
            colors = image
        elif source.profile.xcolor_space == "GRAY" and Image.getmodebase(image.mode) == "L":
            colors = plain.convert("L")
        else:
            colors = seen
        converted = ImageCms.buildTransform(
            source,
            ImageCms.createProfile("sRGB"),
            colors.mode,
            "RGB",
            ImageCms.Intent.RELATIVE_COLORIMETRIC,
            ImageCms.Flags.BLACKPOINTCOMPENSATION,
        ).apply(colors)
    except Exception as error:  # a damaged one can raise anything, Pillow without LittleCMS too
        notes.append(f"{name} has a colour profile that cannot be used ({error}); sRGB is assumed")
        return plain
    if np.asarray(ImageChops.difference(converted, seen)).max() <= NO_DIFFERENCE:
        return plain
    if plain.mode == "RGBA":
        converted.putalpha(plain.getchannel("A"))
    notes.append(f"{name} was converted from its colour profile to sRGB")
    return converted
