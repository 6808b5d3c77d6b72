"""DC-AE in bounded memory: the image of the plain network, computed strip by strip without seams.

A feature map passes through the convolutions as horizontal strips. Each convolution keeps the last
rows of its input in a line buffer and continues from them with the next strip, so nothing is
computed twice, nothing is blended, and zero padding occurs only at the true borders. Attention
needs sums over the whole map. They are additive: one sweep accumulates them and the next applies
them, overwriting the map it reads. The memory held at once is one map at the resolution of the
attention stages, a few strips, and the uint8 image.

Strips are (1, C, rows, W), channels-last, top to bottom. A strip op (`StripOp`) maps a strip to
the output rows that it completes, or to None, and keeps what it still needs of earlier strips.
"""

STRIP_BYTES = 16 << 20  # of the widest tensor in a strip
