"""The architectures of the networks: how many blocks each stage has at each depth."""

from collections.abc import Mapping
from dataclasses import dataclass

# Blocks per stage (He et al., Deep Residual Learning, 2016, table 1; 10 as in MedicalNet).
STAGE_BLOCKS = {
    10: (1, 1, 1, 1),
    18: (2, 2, 2, 2),
    34: (3, 4, 6, 3),
    50: (3, 4, 6, 3),
    101: (3, 4, 23, 3),
    152: (3, 8, 36, 3),
}


@dataclass(frozen=True)
class Architecture:
    """A kind of network.

    Args:
        title: its name as people write it.
        blocks: depth -> blocks of each stage; of a DenseNet its dense layers.
        is_fixed: whether it is 2D and has one topology.
    """

    title: str
    blocks: Mapping[int, tuple[int, ...]]
    is_fixed: bool = True


# The least depth of SE-ResNeXt and DenseNet is nobody's network, but quick to test.
ARCHITECTURES = {
    "resnet": Architecture("ResNet", STAGE_BLOCKS, is_fixed=False),
    # Hu et al., Squeeze-and-Excitation Networks (2018), on Xie et al., Aggregated Residual
    # Transformations for Deep Neural Networks (2017).
    "seresnext": Architecture(
        "SE-ResNeXt",
        {
            14: (1, 1, 1, 1),
            50: (3, 4, 6, 3),
            101: (3, 4, 23, 3),
            152: (3, 8, 36, 3),
        },
    ),
    # Huang et al., Densely Connected Convolutional Networks (2017), table 1.
    "densenet": Architecture(
        "DenseNet",
        {
            21: (2, 2, 2, 2),
            121: (6, 12, 24, 16),
            169: (6, 12, 32, 32),
            201: (6, 12, 48, 32),
        },
    ),
}

# The fields of a specification that only a ResNet may choose.
TOPOLOGY = (
    "shortcut",
    "detach_shortcut",
    "stem_kernel",
    "stem_stride",
    "pool_kernel",
    "pool_stride",
    "kernels",
    "strides",
    "dilations",
    "factorised",
    "naming",
)
