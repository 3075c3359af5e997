"""What one layer of a chain costs: measured by ``profile_layers``, or given by hand."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class LayerProfile:
    """One layer of a chain, in bytes and seconds.

    Attributes:
        name: the FQN of the layer.
        activation_bytes: what autograd saves inside the layer and the layer made itself: distinct
            storages, without its arguments, its output, parameters and buffers.
        output_bytes: the boundary value: the tensors that the layer returns.
        forward_s: its forward.
        backward_s: its backward, without any recomputation.
        parameters: how many numbers its parameters hold.
        input_bytes: its tensor arguments that change from layer to layer; read for the first layer
            of a chain only, the others take their predecessor's output.
        gradient_bytes: the gradients of its parameters, which stay until the step ends.
        working_bytes: the most that its backward allocates besides saved values and gradients of
            parameters.
    """

    name: str
    activation_bytes: int
    output_bytes: int
    forward_s: float = 0.0
    backward_s: float = 0.0
    parameters: int = 0
    input_bytes: int = 0
    gradient_bytes: int = 0
    working_bytes: int = 0
