"""DC-AE in bounded memory: the picture of the plain network, strip after strip, without seams.

A map goes through the convolutions as horizontal strips. Each convolution keeps the last rows it
was given (a line buffer), so the next strip goes on where the last one ended: nothing is computed
twice, nothing is blended, and zeros stand beyond the true borders only. Attention needs sums over
the whole map; they are additive, so one sweep gathers them and the next applies them, writing over
the map it reads. Held at once are one map at the resolution of the attention stages, a few strips,
and the uint8 picture.

Strips are (1, C, rows, W), channels-last, top to bottom. A *part* is a function from a strip to
the rows that can be finished with it, or None; it keeps what it needs of earlier strips.
"""
