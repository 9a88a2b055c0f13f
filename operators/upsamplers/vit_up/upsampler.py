"""ViT-Up as an `Upsampler`: any grid from one backbone pass of its own, within a declared memory."""

import copy
from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor, nn

from operators.backbone import PatchFeatures, autocast, cast_matmul_weights
from operators.upsamplers.protocol import WORKING_BYTES, Upsampler, UpsamplerError, require_fitting
from operators.upsamplers.vit_up.geometry import ENCODING, grid_coordinates
from operators.upsamplers.vit_up.head import TokenCache, ViTUpConfig, ViTUpHead
from operators.upsamplers.vit_up.hidden import AdaptedBackbone
from operators.upsamplers.vit_up.lora import Lora


class ViTUp(Upsampler):
    """A trained head and its adapted backbone, merged and ready to run.

    The low-resolution maps it is given serve to check that they are of the same model; features come from the images. Those
    of the images seen last are kept, so that several grids share one backbone pass and one query grid: `forget` frees them.

    As published, an image of any aspect is squashed to a square for the hidden states and the query grid, while grids and
    coordinates lie over the image as given. Layers before the last are ViT-Up's (through the next block's norm).
    """

    def __init__(
        self,
        config: ViTUpConfig,
        model: nn.Module,
        head_state: Mapping[str, Tensor],
        lora_state: Mapping[str, Tensor],
        *,
        precision: Literal["fp32", "bf16", "fp16"] = "fp32",
        working_bytes: int = WORKING_BYTES,
    ):
        """`model`: the timm ViT with its frozen weights, which is copied. `working_bytes`: what a chunk of queries may take.

        Raises `UpsamplerError` where weights, settings and model don't go together.
        """
        self.config, self.precision, self.working_bytes = config, precision, working_bytes
        self._backbone = _merged_backbone(config, model, lora_state)
        self._head = ViTUpHead(config)
        require_fitting(self._head.state_dict(), head_state, "ViT-Up's settings")
        self._head.load_state_dict(head_state)
        self._head.eval().requires_grad_(False)
        for module in (self._backbone, self._head):
            cast_matmul_weights(module, precision)
        self._cells: int | None = None
        self._seen: tuple[Tensor, int] | None = None
        self._caches: list[TokenCache] = []

    @torch.no_grad()
    def __call__(self, images_BCHW: Tensor, features: PatchFeatures, layers: tuple[int, ...], grid: tuple[int, int]) -> Tensor:
        """Float32 [B, C, *grid]; several layers are stacked along the channels.

        Raises `UpsamplerError` for layers it has no decoder for, and for maps of other channels.
        """
        outputs = self._outputs(features, layers)
        caches = self._prepared(images_BCHW)
        coords = grid_coordinates(grid, self._tiled_box(images_BCHW, features), images_BCHW.device)[None]
        out = coords.new_empty((len(caches), coords.shape[1], len(outputs) * self.config.channels))
        step = self.query_chunk(len(outputs))
        for image, cache in enumerate(caches):
            for start in range(0, coords.shape[1], step):
                part = slice(start, start + step)
                with autocast(coords.device, self.precision):
                    found = self._head.query(cache, coords[:, part], outputs)
                out[image, part] = torch.cat(found, dim=-1)[0] if len(found) > 1 else found[0][0]
        return out.unflatten(1, tuple(grid)).permute(0, 3, 1, 2)

    def forget(self) -> None:
        self._seen, self._caches = None, []

    def allow(self, working_bytes: int) -> None:
        self.working_bytes = working_bytes

    def take_at_once(self, cells: int) -> None:
        self._cells = cells

    def query_chunk(self, outputs: int = 1) -> int:
        """How many queries are at work at once."""
        return self._cells or max(1, self.working_bytes // self._bytes_per_query(outputs))

    def peak_bytes(self, batch: int, channels: int, grid: tuple[int, int]) -> int:
        """Upper bound on the device memory that one call takes beyond its arguments, and keeps until `forget`.

        Weights, what is kept of each image, and the larger of: preparing one image; the result and a chunk of queries.
        """
        result = 4 * batch * channels * grid[0] * grid[1]
        queries = min(grid[0] * grid[1], self.query_chunk(channels // self.config.channels))
        # Coordinates as they are made, and those of a chunk counted with its queries.
        coordinates = 4 * 8 * grid[0] * grid[1]
        querying = result + coordinates + queries * self._bytes_per_query(channels // self.config.channels)
        return self.kept_bytes(batch) + max(self._preparing_bytes(), querying)

    def parts(
        self, batch: int, channels: int, base: tuple[int, int], image: tuple[int, int], grid: tuple[int, int]
    ) -> tuple[int, int]:
        return 1, -(-grid[0] * grid[1] // self.query_chunk(channels // self.config.channels))

    def kept_bytes(self, batch: int) -> int:
        weights = sum(p.nbytes for module in (self._backbone, self._head) for p in module.parameters())
        return weights + batch * self._cache_bytes()

    def _prepared(self, images: Tensor) -> list[TokenCache]:
        """One cache for each image. Those of the same tensor, unchanged since, are used again."""
        version = 0 if images.is_inference() else images._version
        if self._seen is None or self._seen[0] is not images or self._seen[1] != version:
            self.forget()
            self._backbone.to(images.device)
            self._head.to(images.device)
            self._caches = [self._prepare(images[i : i + 1]) for i in range(len(images))]
            self._seen = (images, version)
        return self._caches

    def _prepare(self, image: Tensor) -> TokenCache:
        """One image at a time: enlarged, it takes more memory than a batch does."""
        config = self.config
        with autocast(image.device, self.precision):
            query_grid = self._backbone.query_grid(image, (config.query_size,) * 2, self._stripe_bytes())
            hidden = self._backbone.hidden(image, config.layers, (config.hidden_size,) * 2)
            return self._head.prepare(query_grid, hidden)

    def _outputs(self, features: PatchFeatures, layers: tuple[int, ...]) -> list[int]:
        """Positions in the settings' layers of block numbers counted from 0."""
        found = features.stacked(layers).shape[1]
        if found != len(layers) * self.config.channels:
            raise UpsamplerError(
                f"this ViT-Up was made for maps of {self.config.channels} channels; layers {tuple(layers)} have {found}"
            )
        if missing := [layer for layer in layers if layer + 1 not in self.config.layers]:
            there = [layer - 1 for layer in self.config.layers if layer]
            raise UpsamplerError(f"this ViT-Up gives the layers {there} (blocks counted from 0), not {missing}")
        return [self.config.layers.index(layer + 1) for layer in layers]

    def _tiled_box(self, images: Tensor, features: PatchFeatures) -> tuple[float, float, float, float]:
        """What of the image the maps' cells tile: overlapping patches begin (patch - stride) / 2 pixels further in."""
        start = (self._backbone.patch - features.stride) / 2
        height, width = images.shape[-2:]
        rows, columns = (cells * features.stride for cells in features.grid)
        return start / width, start / height, (start + columns) / width, (start + rows) / height

    def _stripe_bytes(self) -> int:
        # A stripe exists up to four times: its two source rows, enlarged along one axis and along both, or as patches.
        return min(self.working_bytes // 4, 4 * 3 * self.config.query_size**2)

    def _tokens(self) -> int:
        return (self.config.hidden_size // self._backbone.patch) ** 2

    def _cache_bytes(self) -> int:
        """Of one image: its query grid, and keys, values and normalised tokens of each block."""
        query_cells = (self.config.query_size // self._backbone.patch) ** 2
        parts = 2 * self.config.cross_attention + self.config.featx
        return 4 * self.config.channels * (query_cells + parts * self.config.blocks * self._tokens())

    def _preparing_bytes(self) -> int:
        hidden = self._backbone.peak_bytes((self.config.hidden_size,) * 2, len(self.config.layers))
        # Before keys are turned, in two copies.
        tokens = 4 * 6 * self.config.channels * self._tokens()
        return max(hidden + tokens, 4 * self._stripe_bytes())

    def _bytes_per_query(self, outputs: int) -> int:
        """Most is at work in an MLP: the query, its norms and FeatX's token, and two hidden layers."""
        config = self.config
        wide = config.mlp_channels or 4 * config.channels
        values = 7 * config.channels + 2 * wide + 2 * ENCODING + outputs * config.channels
        masked = 0 if config.window is None else 6 * self._tokens()
        return 4 * (values + config.channels // config.heads) + masked


def _merged_backbone(config: ViTUpConfig, model: nn.Module, lora_state: Mapping[str, Tensor]) -> AdaptedBackbone:
    model = copy.deepcopy(model)
    lora = None
    if config.lora:
        lora = Lora(model, rank=config.rank, alpha=config.alpha, dropout=config.dropout)
        lora.load_peft_state(lora_state)
        lora.merge()
    elif lora_state:
        raise UpsamplerError(f"{len(lora_state)} tensors of LoRA, but lora is false in the settings")
    # Merged, the adapter isn't needed any more.
    backbone = AdaptedBackbone(model)
    if backbone.channels != config.channels or backbone.depth < config.layers[-1]:
        raise UpsamplerError(
            f"ViT-Up of {config.channels} channels and layers {config.layers} doesn't fit a backbone of "
            f"{backbone.channels} channels and {backbone.depth} blocks"
        )
    return backbone.eval()
