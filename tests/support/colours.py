"""Contrast as the Web Content Accessibility Guidelines 2 define it, of colours as CSS or as hexadecimal digits."""

from __future__ import annotations

import re


def channels(colour: str) -> list[float]:
    """Red, green and blue, each from 0 to 1, of "#0072B2" or "rgb(0, 114, 178)"."""
    if colour.startswith("#"):
        return [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
    return [int(part) / 255 for part in re.findall(r"\d+", colour)[:3]]


def linear_light(channel: float) -> float:
    return channel / 12.92 if channel <= 0.04045 else ((channel + 0.055) / 1.055) ** 2.4


def contrast(one: str, other: str) -> float:
    def luminance(colour: str) -> float:
        red, green, blue = map(linear_light, channels(colour))
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue

    high, low = sorted((luminance(one), luminance(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)
