"""Pieces of kernels around matrix products that several ops share."""

from m3kernels.ops._triton import tl, triton


@triton.jit
def add_product(b_sum, b_left, b_right, PRECISION: tl.constexpr):
    """``b_sum + b_left b_right``; in fp32 a tile's product is summed by itself, since one chain over all of it rounds worse."""
    if PRECISION == "ieee":
        # an addition would be folded into the product's own chain
        b_sum = tl.fma(tl.dot(b_left, b_right, input_precision=PRECISION), 1.0, b_sum)
    else:
        b_sum += tl.dot(b_left, b_right, input_precision=PRECISION)
    return b_sum
