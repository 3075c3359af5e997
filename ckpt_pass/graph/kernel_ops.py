"""Which kernels are run to be measured, and which of them apart from this process.

Every kernel that computes something is run, unless it provably allocates its outputs alone, as its
fake tensors say. What was seen besides outputs (CPU, torch 2.13; in outputs, where not in bytes):
convolutions 3.3, and 8 in the backward; bf16 products up to 7; means in bf16 34 (the input cast);
embeddings 4 in the backward; ``im2col`` and ``roll`` and ``repeat`` up to 2; dropout 1; sorts 0.5.
And outputs themselves are larger than they look: ``mse_loss`` returns a scalar in a storage of the
size of its input, an LSTM a tensor of bytes that fake tensors know nothing of.
"""

from __future__ import annotations

import torch
from torch import fx

from ckpt_pass._torch import functorch
from ckpt_pass._torch.operators import OpOverload
from ckpt_pass.graph.kernel_call import Call
from ckpt_pass.graph.reinplace import is_elementwise
from ckpt_pass.ops.tables import BUILTIN_NAMESPACES
from ckpt_pass.ops.taxonomy import OpClass, classify

#: Classes that compute nothing, or exchange what they are given with other processes.
COMPUTES_NOTHING = frozenset(
    {
        OpClass.VIEW,
        OpClass.METADATA,
        OpClass.MULTI_OUTPUT_ACCESS,
        OpClass.COLLECTIVE,
    }
)

#: Classes whose ops are not run, and why; those of them that are torch's own and have an effect
#: (``copy_``, assertions) allocate nothing.
NOT_RUN = {
    OpClass.EFFECTFUL: "it has an effect, which must happen once",
    OpClass.CONTROL: "it runs graphs of its own",
}

#: They ask for one answer, and make tensors of all values on the way.
_COMPARES: frozenset[object] = frozenset((torch.ops.aten.allclose.default,))

#: Classes of torch's own kernels that may read what they are given as more than numbers.
_TRUSTING = frozenset({OpClass.RECURRENT, OpClass.QUANTISED, OpClass.UNCLASSIFIED})


def may_have_workspace(node: fx.Node) -> bool:
    """Whether an op's kernel may allocate more than its fake outputs say.

    An elementwise kernel does not, where all tensors, the output too, have one dtype and no number
    is given: on the CPU others are cast first, and of a Python number a kernel makes a tensor of 8
    bytes and then one of the values' dtype. Nor where all lie in memory alike: of an expanded
    gradient (that of a sum) ``gelu_backward`` makes a copy that is contiguous; a view that is to be
    read as conjugate or negative is copied as well.
    """
    if not is_runnable(node):
        return False
    assert callable(node.target)
    if not is_elementwise(node.target) or _casts_on_cpu(node) or _lies_otherwise(node):
        return True
    if node.target is torch.ops.aten.copy.default:  # of a view it copies all of its base's memory
        return True
    values = (given.meta.get("val") for given in node.all_input_nodes)
    tensors = (value for value in values if isinstance(value, torch.Tensor))
    return any(tensor.is_conj() or tensor.is_neg() for tensor in tensors)


def _lies_otherwise(node: fx.Node) -> bool:
    """Whether a tensor of the output's shape has other strides than the output."""
    output = node.meta.get("val")
    if not isinstance(output, torch.Tensor) or output.layout is not torch.strided:
        return False
    given = (one.meta.get("val") for one in node.all_input_nodes)
    alike = [
        tensor
        for tensor in given
        if isinstance(tensor, torch.Tensor)
        and tensor.layout is torch.strided
        and str(tensor.shape) == str(output.shape)
    ]
    # As texts: to compare symbolic strides would put guards on them.
    return any(str(tensor.stride()) != str(output.stride()) for tensor in alike)


def _casts_on_cpu(node: fx.Node) -> bool:
    values = [given.meta.get("val") for given in (node, *node.all_input_nodes)]
    tensors = [value for value in values if isinstance(value, torch.Tensor)]
    if any(tensor.device.type != "cpu" for tensor in tensors):
        return False
    numbers = any(isinstance(one, (int, float)) for one in (*node.args, *node.kwargs.values()))
    sizes = any(functorch.is_sym_node(given) for given in node.all_input_nodes)
    return numbers or sizes or len({tensor.dtype for tensor in tensors}) > 1


def is_runnable(node: fx.Node) -> bool:
    """Whether an op computes something, and may be run alone without doing anything else."""
    return node.op == "call_function" and is_computing(node.target)


def is_computing(target: object) -> bool:
    """The same of what is called."""
    if not callable(target):
        return False
    op_class = classify(target)
    if target in _COMPARES:
        return True
    return op_class not in COMPUTES_NOTHING and op_class not in NOT_RUN


def why_not_run(node: fx.Node) -> str:
    """Why an op whose kernel may allocate anything is not run; empty for all others."""
    if node.op != "call_function" or not callable(node.target):
        return ""
    reason = NOT_RUN.get(classify(node.target), "")
    return "" if _is_builtin(node.target) else reason


def _is_builtin(target: object) -> bool:
    return not isinstance(target, OpOverload) or target.namespace in BUILTIN_NAMESPACES


def is_trusted(call: Call) -> bool:
    """Whether a kernel at worst raises, whatever it finds in tensors of the right look.

    Not so kernels of other libraries, and those that are given bytes which they believe.
    """
    if not isinstance(call.target, OpOverload) or not _is_builtin(call.target):
        return False
    op_class = classify(call.target)
    if op_class is OpClass.BACKWARD and call.has_opaque_arguments:
        return False
    return op_class not in _TRUSTING
