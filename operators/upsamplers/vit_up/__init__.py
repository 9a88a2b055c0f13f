"""ViT-Up (arXiv 2606.14024): features at any coordinates of an image, from a ViT's own hidden states."""
