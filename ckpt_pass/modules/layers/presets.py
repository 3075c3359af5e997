"""What is known of the classes of other libraries, as data, where the module tree alone misleads.

The finder (``find.py``) works from the tree: modules with an index for a name, siblings of their
own class. These rows say what it cannot see.
"""

from __future__ import annotations

import fnmatch
from dataclasses import dataclass

from torch import nn


@dataclass(frozen=True)
class Preset:
    """One row.

    Attributes:
        pattern: of class names, with shell wildcards.
        role: ``layer`` (a layer even where it has no sibling), ``stage`` (only holds layers: they
            are looked for inside), or ``inner`` (repeated, but a part of a layer).
        of: where the class is from.
    """

    pattern: str
    role: str
    of: str


#: Read from the top; the first pattern that fits counts.
PRESETS: tuple[Preset, ...] = (
    Preset("TransformerEncoderLayer", "layer", "torch.nn"),
    Preset("TransformerDecoderLayer", "layer", "torch.nn"),
    Preset("*DecoderLayer", "layer", "transformers: Llama, Mistral, Mixtral, Qwen, OPT, BART, ..."),
    Preset("*EncoderLayer", "layer", "transformers: BART, Whisper, CLIP, wav2vec 2.0, ..."),
    Preset("GPT*Block", "layer", "transformers: GPT-2, GPT-Neo, GPT-J, GPT-BigCode"),
    Preset("T5Block", "layer", "transformers: T5 (its sublayers are repeated as well)"),
    Preset("MT5Block", "layer", "transformers: mT5"),
    Preset("BertLayer", "layer", "transformers"),
    Preset("RobertaLayer", "layer", "transformers"),
    Preset("ElectraLayer", "layer", "transformers"),
    Preset("ViTLayer", "layer", "transformers"),
    Preset("TransformerBlock", "layer", "torchtitan, transformers: DistilBERT"),
    Preset("TransformerLayer", "layer", "Megatron-LM"),
    Preset("ParallelTransformerLayer", "layer", "Megatron-LM, GPT-NeoX"),
    Preset("*Expert", "inner", "experts of a mixture: their layer is the region"),
    Preset("*ExpertMLP", "inner", "experts of a mixture"),
    Preset("*SparseTop2MLP", "inner", "transformers: experts of Mixtral before 5.0"),
    Preset("ResNetStage", "stage", "transformers"),
    Preset("RegNetStage", "stage", "transformers"),
    Preset("ConvNext*Stage", "stage", "transformers: downsampling and then layers"),
    Preset("Swin*Stage", "stage", "transformers: layers and then downsampling"),
    Preset("BasicBlock", "layer", "torchvision: ResNet-18, -34"),
    Preset("Bottleneck", "layer", "torchvision: ResNet-50 and up"),
    Preset("*DownBlock2D", "stage", "diffusers: resnets and attentions"),
    Preset("*UpBlock2D", "stage", "diffusers: resnets and attentions"),
)


def role_of(module: nn.Module) -> str | None:
    """The role that the first fitting row gives to a module's class; ``None`` without a row."""
    kind = type(module).__name__
    for preset in PRESETS:
        if fnmatch.fnmatchcase(kind, preset.pattern):
            return preset.role
    return None
