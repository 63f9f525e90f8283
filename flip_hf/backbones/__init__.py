"""ID-based models, one file each. To add one, write its file and add a line to `BACKBONES`."""

import inspect
from collections.abc import Collection
from typing import Any

from flip_hf.backbones.afm import AFM
from flip_hf.backbones.afn import AFN
from flip_hf.backbones.autoint import AutoInt
from flip_hf.backbones.base import Backbone, BackboneOutput
from flip_hf.backbones.dcn import DCN
from flip_hf.backbones.dcnv2 import DCNv2
from flip_hf.backbones.deepfm import DeepFM
from flip_hf.backbones.fibinet import FiBiNET
from flip_hf.backbones.finalmlp import FinalMLP
from flip_hf.backbones.fm import FM
from flip_hf.backbones.fnn import FNN
from flip_hf.backbones.gdcn import GDCN
from flip_hf.backbones.lr import LR
from flip_hf.backbones.masknet import MaskNet
from flip_hf.backbones.pnn import PNN
from flip_hf.backbones.wide_deep import WideDeep
from flip_hf.backbones.xdeepfm import XDeepFM
from flip_hf.fields import with_nearest

BACKBONES: dict[str, type[Backbone]] = {
    "lr": LR,
    "fm": FM,
    "fnn": FNN,
    "wide_deep": WideDeep,
    "deepfm": DeepFM,
    "pnn": PNN,
    "dcn": DCN,
    "dcnv2": DCNv2,
    "xdeepfm": XDeepFM,
    "afm": AFM,
    "afn": AFN,
    "autoint": AutoInt,
    "fibinet": FiBiNET,
    "finalmlp": FinalMLP,
    "masknet": MaskNet,
    "gdcn": GDCN,
}


def backbone_class(name: str) -> type[Backbone]:
    """Returns the ID-based model of that name; an unknown name is a ValueError that lists the known ones."""
    if name not in BACKBONES:
        raise ValueError(f"backbone={name!r} is not one of {', '.join(BACKBONES)}")
    return BACKBONES[name]


def check_backbone_options(name: str, options: Collection[str]) -> None:
    """Raises ValueError for an unknown ID-based model, or for an option that it does not have."""
    known = [p for p in inspect.signature(backbone_class(name)).parameters if p not in ("num_fields", "embedding_dim")]
    if unknown := sorted(set(options) - set(known)):
        raise ValueError(f"backbone {name!r} has no option {with_nearest(unknown, known)}")


def build_backbone(name: str, num_fields: int, embedding_dim: int, options: dict[str, Any]) -> Backbone:
    """Builds an ID-based model with its own options; an unknown option is a ValueError."""
    check_backbone_options(name, options)
    return backbone_class(name)(num_fields, embedding_dim, **options)


__all__ = [
    "BACKBONES",
    "Backbone",
    "BackboneOutput",
    "backbone_class",
    "build_backbone",
    "check_backbone_options",
]
