"""ImageNet-1k accuracies that others publish of DeAP's backbones, each set by one protocol: what its scores are correlated with.

Which scores of others its paper takes isn't in our notes; these are ours to choose. In percent, by DeAP's names of backbones.
"""

from collections.abc import Mapping

IMAGENET_LINEAR: Mapping[str, float] = {
    "moco-v3": 76.7, "dino": 80.1, "dinov2-b": 84.6, "dinov2-l": 86.7, "mae": 67.8
}  # fmt: skip
"""Linear probes of self-supervised backbones, from their authors' repositories: facebookresearch/moco-v3 (CONFIG.md, ViT-Base),
dino (README.md, ViT-B/8), dinov2 (README.md, with registers), mae (FINETUNE.md, "this repo")."""

IMAGENET_ZERO_SHOT: Mapping[str, float] = {
    "clip-b": 68.34, "clip-l": 76.56, "metaclip": 72.12, "siglip-224": 76.04, "siglip-384": 78.49, "siglip-512": 79.14,
    "siglip-so": 83.08,
}  # fmt: skip
"""Zero-shot classification with a text encoder: mlfoundations/open_clip (docs/openclip_results.csv at commit f862f86, column
"ImageNet 1k"; MetaCLIP is `metaclip_fullcc`, SigLIP SO the file for 384 px)."""
