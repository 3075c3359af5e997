"""What each op is, as data, and how many operations it does."""

from ckpt_pass.ops.taxonomy import OpClass as OpClass
from ckpt_pass.ops.taxonomy import classify as classify
from ckpt_pass.ops.taxonomy import draws_random as draws_random
from ckpt_pass.ops.taxonomy import functional_twin as functional_twin
from ckpt_pass.ops.taxonomy import never_recompute as never_recompute
