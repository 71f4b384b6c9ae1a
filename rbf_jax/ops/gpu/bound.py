"""Numbers of the fixed reference that bfloat16 forward kernels measure logits from (forward.py).

A tile whose row sums come out too small, or whose bound is too large, is computed again with online
softmax.
"""

# Logits are measured from the bound R less this many bits, so that weights go up to 2^60: the rows
# whose nearest key is up to 83 nats below the bound are within float32's range, and so are sums of
# 2^22 weights times values of up to 2^45.
HEADROOM = 60.0
# exp2 gives 0 below 2^-126. Where a row's sum is above this, what 2^22 keys may lose to that is far
# less than float32's rounding, and the sums of values as small as 2^-58 keep bfloat16's precision.
SMALLEST_SUM = 2.0**-60
# Subtracting the bound R in float32 costs up to R·2^-24.
LARGEST_REFERENCE = 2.0**13
