"""Backbone files as their authors release them: which family a file is of, what of it is the backbone, and what timm's model of
that name has to be told so that it computes what the authors' code does.

A strict load alone isn't enough: MoCo v3's ViT-S has the shapes of one with half as many heads, a DINOv3 without biases takes a
file that has them, and a training checkpoint holds several encoders. So the family is told from the names of the tensors, and
what would load but compute something else is refused.

No files are read here. What names tell is read from the released code of each family.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from operators.lean_timm import timm
from operators.timm_models import BackboneError, Undrawn
from operators.vitdet import named as vitdet

State = Mapping[str, Tensor]


_PLAIN = {
    (384, 16): "vit_small_patch16_224.dino",
    (384, 8): "vit_small_patch8_224.dino",
    (768, 16): "vit_base_patch16_224.dino",
    (768, 8): "vit_base_patch8_224.dino",
    (1024, 16): "vit_large_patch16_224.mae",
    (1280, 14): "vit_huge_patch14_224.mae",
}
"""Plain ViTs whose statistics are ImageNet's."""


@dataclass(frozen=True, kw_only=True)
class Family:
    """Backbones that were trained and released alike. All of them take images normalised by ImageNet's statistics."""

    name: str
    holds: str
    "what of its files is taken, in words"
    found: Callable[[State], bool]
    "whether a file's tensors are of it"
    prefix: str = ""
    "of the backbone's names"
    training: str = r"(?!)"
    "a regular expression of the names that belong to training alone, without `prefix`"
    models: Mapping[tuple[int, int], str] = field(default_factory=_PLAIN.copy)
    "timm's model of a width and a patch size in pixels"
    model_args: Mapping[str, Any] = field(default_factory=dict)
    "timm's, without which it would be another network"
    told: Callable[[State, str], Mapping[str, Any]] = lambda *_: {}
    "timm's arguments that the tensors tell, for its model of a name"
    pos_embed: Literal["timm", "dino"] = "timm"
    "how its authors bring position embeddings to other sizes"


@dataclass(frozen=True, kw_only=True)
class OfficialWeights:
    """A released file, brought to what timm loads."""

    family: Family
    state: dict[str, Tensor]

    @property
    def width(self) -> int:
        return int(self.state["patch_embed.proj.weight"].shape[0])

    @property
    def patch(self) -> int:
        return int(self.state["patch_embed.proj.weight"].shape[-1])

    @property
    def depth(self) -> int:
        """Number of blocks."""
        return 1 + max(int(found[1]) for name in self.state if (found := re.match(r"blocks\.(\d+)\.", name)))

    def fitting(self, name: str, given: Mapping[str, Any], *, told: bool = True) -> tuple[dict[str, Any], State]:
        """timm's arguments for its model `name`, those that the weights need unless they are `given`; and the state for it.

        `told`: where the family's tensors tell arguments, these are taken, too; else what is given is all.
        Raises `BackboneError` where the model isn't one that these weights are for, with the one to use.
        """
        self._require_family(name)
        arguments = {**self.family.model_args, **(self.family.told(self.state, name) if told else {}), **given}
        with torch.device("meta"), Undrawn():
            model = timm.create_model(name.partition(".")[0], **{**arguments, "num_classes": 0})
        parameters = {key: tuple(value.shape) for key, value in model.named_parameters()}
        self._require_shape(name, parameters)
        return arguments, _with_biases_of(name, parameters, self.state) if self.family is DINOV3 else self.state

    def _require_family(self, name: str) -> None:
        """Raises `BackboneError` where a ViTDet's weights are for a model of another kind, or of another published size."""
        family, known = self.family, self.family.models.get((self.width, self.patch))
        if family in (VITDET, VITDET_BACKBONE) and (name not in family.models.values() or known not in (None, name)):
            raise BackboneError(f"these are weights of {family.name}, width {self.width}. Use --model {known or 'vitdet_base'}")

    def _require_shape(self, name: str, parameters: Mapping[str, tuple[int, ...]]) -> None:
        here = self.width, self.patch, self.depth
        projection = parameters.get("patch_embed.proj.weight", (0, 0, 0, 0))
        depth = len({key.split(".")[1] for key in parameters if key.startswith("blocks.")})
        there = projection[0], projection[-1], depth
        wants_registers = self.family in (DINOV2_REGISTERS, DINOV3)
        if here == there and wants_registers == ("reg_token" in parameters):
            return
        known = self.family.models.get((self.width, self.patch))
        raise BackboneError(
            f"these are weights of {self.family.name}: width {here[0]}, patch {here[1]}, {here[2]} blocks, "
            f"{'with' if wants_registers else 'without'} register tokens; {name} has width {there[0]}, patch {there[1]}, "
            f"{there[2]} blocks, {'with' if 'reg_token' in parameters else 'without'} register tokens. "
            + (f"Use --model {known}" if known else "Name timm's model of that size")
        )


# --- the families -----------------------------------------------------------------------------------------------------


def _any(*beginnings: str) -> Callable[[State], bool]:
    return lambda state: any(name.startswith(beginnings) for name in state)


def _all(*names: str) -> Callable[[State], bool]:
    return lambda state: all(name in state for name in names)


def _of_dinov2(suffix: str) -> dict[tuple[int, int], str]:
    sizes = {384: "small", 768: "base", 1024: "large", 1536: "giant"}
    return {(width, 14): f"vit_{size}_patch14_{suffix}.lvd142m" for width, size in sizes.items()}


VITDET = Family(
    name="ViTDet",
    holds="the backbone alone",
    found=_any("backbone.net."),
    prefix="backbone.net.",
    training=r"(backbone\.simfp_\d|proposal_generator|roi_heads|lift)\.|pixel_(mean|std)$",
    models=vitdet.NAMES,
    told=vitdet.told,
)
VITDET_BACKBONE = Family(
    name="ViTDet",
    holds="the backbone",
    # SAM's, which timm has, too, has a table of positions by rows and columns.
    found=lambda state: "blocks.0.attn.rel_pos_h" in state and "pos_embed" in state and state["pos_embed"].ndim == 3,
    models=vitdet.NAMES,
    told=vitdet.told,
)
DINOV3 = Family(
    name="DINOv3",
    holds="the backbone",
    found=_all("storage_tokens"),
    training=r"(dino_head|ibot_head|local_cls_norm)\.",
    models={
        (384, 16): "vit_small_patch16_dinov3.lvd1689m",
        (768, 16): "vit_base_patch16_dinov3.lvd1689m",
        (1024, 16): "vit_large_patch16_dinov3.lvd1689m",
        (1280, 16): "vit_huge_plus_patch16_dinov3.lvd1689m",
        (4096, 16): "vit_7b_patch16_dinov3.lvd1689m",
    },
)
DINOV2_REGISTERS = Family(
    name="DINOv2 with registers",
    holds="the backbone",
    found=_all("register_tokens"),
    training=r"(dino_head|ibot_head)\.",
    models=_of_dinov2("reg4_dinov2"),
)
DINOV2 = Family(
    name="DINOv2",
    holds="the backbone",
    found=lambda state: "mask_token" in state and any(name.endswith("ls1.gamma") for name in state),
    training=r"(dino_head|ibot_head)\.",
    models=_of_dinov2("dinov2"),
    pos_embed="dino",
)
MOCO_V3 = Family(
    name="MoCo v3",
    holds="the base encoder, not the momentum encoder",
    found=_any("base_encoder."),
    prefix="base_encoder.",
    training=r"(momentum_encoder|predictor|base_encoder\.head)\.",
    model_args={"num_heads": 12},
)
SELF_PATCH = Family(
    name="SelfPatch",
    holds="the backbone, which has neither a CLS token nor a final norm",
    found=lambda state: _any("ca_head.")(state) or _is_bare(state),
    training=r"(ca_head|c_head|p_head)\.",
    model_args={"class_token": False, "global_pool": "", "final_norm": False},
    pos_embed="dino",
)
MAE = Family(
    name="MAE",
    holds="the encoder",
    found=lambda state: "decoder_embed.weight" in state or _has_fixed_table(state, _mae_table),
    training=r"(mask_token$|decoder)",
)
LEOPART = Family(
    name="Leopart",
    holds="the student's backbone",
    found=_all("model.cls_token", "model.patch_embed.proj.weight"),
    prefix="model.",
    training=r"(teacher|model\.projection_head|model\.prototypes)\.",
    pos_embed="dino",
)
IBOT = Family(
    name="iBOT",
    holds="the teacher's backbone",
    found=lambda state: "backbone.cls_token" in state and any("last_layer2" in name for name in state),
    prefix="backbone.",
    training=r"(head\.|backbone\.masked_embed$)",
    pos_embed="dino",
)
DINO = Family(
    name="DINO",
    holds="the teacher's backbone",
    found=_all("backbone.cls_token"),
    prefix="backbone.",
    training=r"(head\.|backbone\.masked_embed$)",
    pos_embed="dino",
)
MOCO_V3_CONVERTED = Family(
    name="MoCo v3", holds="the encoder", found=lambda state: _has_fixed_table(state, _moco_table), model_args=MOCO_V3.model_args
)

FAMILIES = (
    VITDET,
    VITDET_BACKBONE,
    MOCO_V3,
    DINOV3,
    DINOV2_REGISTERS,
    DINOV2,
    SELF_PATCH,
    LEOPART,
    IBOT,
    DINO,
    MOCO_V3_CONVERTED,
    MAE,
)
"""In the order in which they are told: the first whose `found` says yes."""


def recognise(state: State) -> OfficialWeights | None:
    """The backbone of a released file's tensors, nested dicts taken apart and `module.` cut from their names.

    None where they tell no family: DINO's and iBOT's files of the bare backbone are those of any plain ViT, and load as such.

    Raises `BackboneError` for what can't be read as any timm model, and for tensors that belong to nothing known.
    """
    _require_readable(state)
    # Training checkpoints of DINOv2, DINOv3 and SelfPatch hold the backbone as DINO's do, beside heads.
    inner = {name.removeprefix("backbone."): value for name, value in state.items()}
    for family in FAMILIES:
        if family.found(inner if family.prefix == "" else state):
            found = _backbone(family, state)
            _require_whole(family, found)
            return OfficialWeights(family=family, state=_of_timm(family, found))
    return None


def _require_readable(state: State) -> None:
    if any(name.endswith("patch_embed.proj.0.weight") for name in state):
        raise BackboneError(
            "this is a ViT whose patches are embedded by a stack of convolutions (MoCo v3's vit_conv_small or vit_conv_base), "
            "which timm has no model for; use vit_small or vit_base of the same authors"
        )
    if "fc_norm.weight" in state and "norm.weight" not in state and _has_fixed_table(state, _mae_table):
        raise BackboneError(
            "this is MAE fine-tuned as a classifier, whose patch tokens have no final norm; use the pretrained file "
            "(mae_pretrain_vit_*.pth)"
        )


def _backbone(family: Family, state: State) -> dict[str, Tensor]:
    """The backbone's tensors by their own names. Raises `BackboneError` for others that don't belong to training."""
    prefix = family.prefix or ("backbone." if any(name.startswith("backbone.") for name in state) else "")
    taken: dict[str, Tensor] = {}
    left: list[str] = []
    for name, value in state.items():
        if re.match(family.training, name) or re.match(family.training, name.removeprefix(prefix)):
            continue
        if name.startswith(prefix):
            taken[name.removeprefix(prefix)] = value
        else:
            left.append(name)
    if left:
        raise BackboneError(
            f"these look like weights of {family.name}, but {len(left)} tensors of them belong neither to its backbone nor to "
            f"its training: {', '.join(left[:5])}"
        )
    return taken


def _require_whole(family: Family, state: State) -> None:
    """Raises `BackboneError` where tensors lack that tell what is built."""
    lacking = [name for name in ("patch_embed.proj.weight",) if name not in state]
    if not any(re.match(r"blocks\.\d+\.", name) for name in state):
        lacking.append("blocks.*")
    if family in (DINOV2, DINOV2_REGISTERS) and "cls_token" not in state:
        lacking.append("cls_token")
    masked = (name.removesuffix("_mask") for name in state if family is DINOV3 and name.endswith("attn.qkv.bias_mask"))
    lacking += [name for name in masked if name not in state]
    if lacking:
        raise BackboneError(f"these look like weights of {family.name}, but tensors lack: {', '.join(lacking[:5])}")


def _of_timm(family: Family, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """By names that timm's own conversion of the family understands."""
    if family in (DINOV2, DINOV2_REGISTERS):
        # Training keeps blocks in chunks; the second number counts through all of them.
        state = {re.sub(r"^blocks\.\d+\.(\d+)\.", r"blocks.\1.", name): value for name, value in state.items()}
        # timm tells the family by it.
        state.setdefault("mask_token", torch.zeros(1, state["cls_token"].shape[-1]))
    if family is DINOV3:
        for name in [name for name in state if name.endswith("attn.qkv.bias_mask")]:
            bias, mask = name.removesuffix("_mask"), state[name]
            if mask.isnan().any():
                raise BackboneError(f"{name} is NaN: these are weights of a DINOv3 that was never initialised")
            state[bias] = state[bias] * mask
    return state


def _with_biases_of(name: str, parameters: Mapping[str, object], state: State) -> State:
    """The state of a DINOv3 for timm's model with or without biases of q and v: without, timm would drop those that there are.

    Raises `BackboneError` where they aren't zero."""
    if any(key.endswith("attn.q_bias") for key in parameters):
        return state
    biased = [key for key, bias in state.items() if key.endswith("attn.qkv.bias") and bias.any()]
    if biased:
        architecture, dot, tag = name.partition(".")
        raise BackboneError(
            f"these weights of DINOv3 have biases of q and v ({len(biased)} blocks), which {name} would drop; use --model "
            f"{architecture}_qkvb{dot}{tag}"
        )
    return {key: value for key, value in state.items() if not key.endswith("attn.qkv.bias")}


# --- what tells a file ------------------------------------------------------------------------------------------------


def _is_bare(state: State) -> bool:
    """A plain ViT without CLS token and final norm: a position for each patch of a square, and nothing beside the blocks."""
    if "pos_embed" not in state or "blocks.0.attn.qkv.weight" not in state or state["pos_embed"].ndim != 3:
        return False
    cells = state["pos_embed"].shape[1]
    return round(cells**0.5) ** 2 == cells and all(
        name == "pos_embed" or re.match(r"patch_embed\.proj\.|blocks\.\d+\.(norm[12]|attn\.(qkv|proj)|mlp\.fc[12])\.", name)
        for name in state
    )


def _has_fixed_table(state: State, table: Callable[[int, int], Tensor]) -> bool:
    """Whether the position embeddings are sines and cosines that were never trained."""
    found = state.get("pos_embed")
    if found is None or "cls_token" not in state or found.ndim != 3 or found.shape[-1] % 4 or not found.is_floating_point():
        return False
    side = round((found.shape[1] - 1) ** 0.5)
    if side < 2 or side**2 != found.shape[1] - 1:
        return False
    # Files that were rounded to 16 bits are the same family's.
    return torch.allclose(found[0, 1:].double(), table(side, found.shape[-1]), atol=max(1e-5, torch.finfo(found.dtype).eps))


def _sines(side: int, width: int) -> tuple[Tensor, Tensor]:
    """[sin, cos] of the row's number and of the column's, of each cell in raster order, float64 [cells, width / 2]."""
    rates = 10000 ** -(torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    angles = torch.arange(side, dtype=torch.float64)[:, None] * rates
    table = torch.cat([angles.sin(), angles.cos()], dim=1)
    return table.repeat_interleave(side, dim=0), table.repeat(side, 1)


def _moco_table(side: int, width: int) -> Tensor:
    return torch.cat(_sines(side, width), dim=1)


def _mae_table(side: int, width: int) -> Tensor:
    rows, columns = _sines(side, width)
    return torch.cat([columns, rows], dim=1)
