"""The published weights that can be converted: one record each, with the origin of its facts."""

from dataclasses import dataclass

from ich_keras.errors import UsageError
from ich_keras.models.presets import LICENCES

# torchvision/models/resnet.py and torchvision/models/video/resnet.py: the weight enumerations.
# The eight hexadecimal digits in a file name are the first of its SHA-256.
_PYTORCH = "https://download.pytorch.org/models/"
# The organisation TencentMedicalNet on Hugging Face; MedicalNet's README offers the files on Google
# Drive (https://github.com/Tencent/MedicalNet).
_MEDICALNET = "https://huggingface.co/TencentMedicalNet/MedicalNet-Resnet{depth}/resolve/main/"

# timm/models/resnet.py: the default of seresnext50_32x4d ("racm_in1k"; timm 1.0.31).
_TIMM = "https://github.com/rwightman/pytorch-image-models/releases/download/v0.1-weights/"

_IMAGENET = "Russakovsky et al., ImageNet Large Scale Visual Recognition Challenge, IJCV 2015"
_IMAGENET_TERMS = "ImageNet: non-commercial research and education"
_IMAGENET_INPUT = "RGB 224x224, mean (0.485, 0.456, 0.406), std (0.229, 0.224, 0.225)"
_IMAGENET_CITATION = (
    f"He et al., Deep Residual Learning for Image Recognition, CVPR 2016; {_IMAGENET}"
)
_DENSENET_CITATION = (
    f"Huang et al., Densely Connected Convolutional Networks, CVPR 2017; {_IMAGENET}"
)
_SERESNEXT_CITATION = (
    "Hu et al., Squeeze-and-Excitation Networks, CVPR 2018; Xie et al., Aggregated Residual"
    " Transformations for Deep Neural Networks, CVPR 2017; Wightman, PyTorch Image Models,"
    f" doi 10.5281/zenodo.4414861, 2019; {_IMAGENET}"
)
_KINETICS_CITATION = (
    "Tran et al., A Closer Look at Spatiotemporal Convolutions for Action Recognition, CVPR 2018;"
    " Kay et al., The Kinetics Human Action Video Dataset, 2017"
)
_MEDICALNET_CITATION = (
    "Chen et al., Med3D: Transfer Learning for 3D Medical Image Analysis, arXiv:1904.00625, 2019"
)
# Architecture -> how the names of heads begin: for segmentation (MedicalNet's), last for classes.
HEADS = {"resnet": ("conv_seg.", "fc."), "seresnext": ("fc.",), "densenet": ("classifier.",)}


@dataclass(frozen=True)
class Source:
    """One published checkpoint.

    Args:
        name: its name here.
        preset: the network it belongs to, a key of `ich_keras.models.presets.PRESETS`.
        channels: input channels of the checkpoint.
        file_name: the published file name.
        url: the address of the file.
        published_sha256: the first digits of the file's SHA-256 as its publisher states them; ""
            if none are published.
        licence: of the weights.
        data_terms: terms of use of the training data.
        citation: publications to cite.
        intensity: the network's input here, a key of `ich_keras.data.intensity.INTENSITIES`.
        original_input: the network's input during its pretraining.
        dropped: prefixes of tensors that are not part of the backbone.
    """

    name: str
    preset: str
    channels: int
    file_name: str
    url: str
    published_sha256: str
    licence: str
    data_terms: str
    citation: str
    intensity: str
    original_input: str
    dropped: tuple[str, ...]


def _torchvision(name: str, preset: str, digits: str) -> Source:
    is_densenet = "densenet" in name
    is_video = "resnet" not in name and not is_densenet
    file_name = f"{name}-{digits}.pth"
    return Source(
        name=f"torchvision_{name}",
        preset=preset,
        channels=3,
        file_name=file_name,
        url=_PYTORCH + file_name,
        published_sha256=digits,
        licence=f"{LICENCES['torchvision_']} (torchvision)",
        data_terms="Kinetics-400: CC BY 4.0 annotations, videos under YouTube's terms"
        if is_video
        else _IMAGENET_TERMS,
        citation=_KINETICS_CITATION
        if is_video
        else _DENSENET_CITATION
        if is_densenet
        else _IMAGENET_CITATION,
        intensity="windows",
        original_input="RGB 112x112, mean (0.43216, 0.394666, 0.37645),"
        " std (0.22803, 0.22145, 0.216989)"
        if is_video
        else _IMAGENET_INPUT,
        dropped=HEADS["densenet"] if is_densenet else ("fc.",),
    )


def _timm(name: str, preset: str, file_name: str, digits: str, citation: str) -> Source:
    return Source(
        name=f"timm_{name}",
        preset=preset,
        channels=3,
        file_name=file_name,
        url=_TIMM + file_name,
        published_sha256=digits,
        licence=f"{LICENCES['timm_']} (timm)",
        data_terms=_IMAGENET_TERMS,
        citation=citation,
        intensity="windows",
        original_input=_IMAGENET_INPUT,
        dropped=HEADS["seresnext"],
    )


def _medicalnet(depth: int, is_23: bool) -> Source:
    file_name = f"resnet_{depth}{'_23dataset' if is_23 else ''}.pth"
    return Source(
        name=f"medicalnet_resnet{depth}{'_23datasets' if is_23 else ''}",
        preset=f"resnet{depth}_3d_medicalnet",
        channels=1,
        file_name=file_name,
        url=_MEDICALNET.format(depth=depth) + file_name,
        published_sha256="",
        licence=f"{LICENCES['medicalnet_']} (MedicalNet)",
        data_terms="23 data sets, not listed by MedicalNet" if is_23 else "3DSeg-8, see the paper",
        citation=_MEDICALNET_CITATION,
        intensity="head-z-score",
        original_input="volumes, z-score over the voxels above 0, background noise N(0, 1)",
        # A training checkpoint of MedicalNet holds its segmentation head; a fine-tuned one an fc.
        dropped=HEADS["resnet"],
    )


_ALL = (
    _torchvision("resnet18", "resnet18_2d", "f37072fd"),
    _torchvision("resnet34", "resnet34_2d", "b627a593"),
    _torchvision("resnet50", "resnet50_2d", "0676ba61"),
    _torchvision("densenet121", "densenet121_2d", "a639ec97"),
    _timm(
        "seresnext50_32x4d",
        "seresnext50_2d",
        "seresnext50_32x4d_racm-a304a460.pth",
        "a304a460",
        _SERESNEXT_CITATION,
    ),
    _torchvision("r3d_18", "r3d_18", "b3b3357e"),
    _torchvision("mc3_18", "mc3_18", "a90a0ba3"),
    _torchvision("r2plus1d_18", "r2plus1d_18", "91a641e6"),
    *(_medicalnet(depth, is_23) for depth in (10, 18, 34, 50) for is_23 in (False, True)),
)
SOURCES: dict[str, Source] = {source.name: source for source in _ALL}


def source_named(name: str) -> Source:
    """Look up a source by name.

    Raises:
        UsageError: unknown name.

    >>> source = source_named("torchvision_resnet18")
    >>> source.preset, source.channels, source.published_sha256
    ('resnet18_2d', 3, 'f37072fd')
    >>> source_named("medicalnet_resnet10").licence
    'MIT (MedicalNet)'
    """
    if name not in SOURCES:
        raise UsageError(f"no source is called {name!r}; known: {', '.join(SOURCES)}.")
    return SOURCES[name]
