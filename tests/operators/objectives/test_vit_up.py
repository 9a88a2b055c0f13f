"""ViT-Up's supervision, losses and learning rate against values of its official code."""

import json

import pytest
import torch

from operators.objectives.schedule import learning_rate
from operators.objectives.vit_up import LossWeights, Supervision, cosine, objective, relational_kl, standardised_l2, to_blocks
from tests.goldens import GOLDEN, tensor_golden

LOSSES = {"l2": standardised_l2, "cos": cosine, "kl": relational_kl}
RTOL = {"l2": 1e-5, "cos": 1e-5, "kl": 1e-4}


def composite(tensors: dict[str, torch.Tensor], side: str) -> list[list[torch.Tensor]]:
    return [[tensors[f"comp/in/{side}_scale{scale}_layer{layer}"] for scale in range(3)] for layer in range(2)]


# --- losses -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", LOSSES)
def test_values_and_gradients_are_those_of_the_official_losses(kind):
    tensors = tensor_golden("vitup_losses")[0]
    predicted = tensors["in/pred"].requires_grad_()

    value = LOSSES[kind](predicted, tensors["in/gt"])
    value.backward()

    torch.testing.assert_close(value, tensors[f"out/{kind}"], rtol=RTOL[kind], atol=0)
    torch.testing.assert_close(predicted.grad, tensors[f"out/{kind}_grad_pred"], rtol=2e-4, atol=2e-7)


@pytest.mark.parametrize("kind", LOSSES)
def test_norms_have_the_official_floor(kind):
    tensors = tensor_golden("vitup_losses")[0]

    value = LOSSES[kind](tensors["tiny/in/pred"], tensors["in/gt"])

    torch.testing.assert_close(value, tensors[f"tiny/out/{kind}"], rtol=RTOL[kind], atol=0)


def test_losses_of_equal_tokens_are_zero_and_half_precision_is_computed_in_float32():
    tokens = torch.randn(2, 6, 16, generator=torch.Generator().manual_seed(0)).half()

    values = torch.stack([loss(tokens, tokens) for loss in LOSSES.values()])

    assert values.dtype == torch.float32
    torch.testing.assert_close(values, torch.zeros(3), rtol=0, atol=1e-6)


def test_relations_are_computed_in_float32_under_autocast():
    tensors = tensor_golden("vitup_losses")[0]

    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = relational_kl(tensors["in/pred"], tensors["in/gt"])

    torch.testing.assert_close(value, tensors["out/kl"], rtol=1e-4, atol=0)


def test_a_single_token_has_no_relations():
    predicted = torch.ones(2, 1, 4, requires_grad=True)

    value = relational_kl(predicted, torch.randn(2, 1, 4))
    value.backward()

    assert value.item() == 0
    assert predicted.grad.abs().max() == 0


def test_relations_depend_on_the_temperature():
    tensors = tensor_golden("vitup_losses")[0]

    values = [relational_kl(tensors["in/pred"], tensors["in/gt"], tau).item() for tau in (0.25, 0.5, 1.0)]

    assert values[0] > values[1] > values[2] > 0


@pytest.mark.parametrize("loss", LOSSES.values())
def test_tokens_of_different_shapes_are_refused(loss):
    with pytest.raises(ValueError, match=r"predicted \(1, 3, 4\) and teacher \(1, 2, 4\) must both be"):
        loss(torch.zeros(1, 3, 4), torch.zeros(1, 2, 4))


# --- their sum --------------------------------------------------------------------------------------------------------

UNEQUAL = LossWeights(cosine=0.5, relational=2.0, layers=(1.0, 3.0), scales=(1.0, 2.0, 0.5), relational_layers="last")


@pytest.mark.parametrize(("out", "weights"), [("out", UNEQUAL), ("out_uniform", LossWeights())])
def test_the_sum_is_that_of_the_official_module(out, weights):
    tensors = tensor_golden("vitup_losses")[0]

    value = objective(composite(tensors, "pred"), composite(tensors, "gt"), weights)

    torch.testing.assert_close(value.total, tensors[f"comp/{out}/loss"], rtol=1e-5, atol=0)
    for name, official in (("l2", "l2"), ("cosine", "cos"), ("relational", "kl")):
        torch.testing.assert_close(value.parts[name], tensors[f"comp/{out}/{official}_loss"], rtol=1e-4, atol=0)
        torch.testing.assert_close(value.last[name], tensors[f"comp/{out}/{official}_loss_last"], rtol=1e-4, atol=0)


@pytest.mark.parametrize("name", ["l2", "cosine", "relational"])
def test_a_loss_of_weight_zero_is_left_out(name):
    tensors = tensor_golden("vitup_losses")[0]
    pairs = composite(tensors, "pred"), composite(tensors, "gt")
    whole = objective(*pairs, LossWeights())

    without = objective(*pairs, LossWeights(**{name: 0.0}))

    assert set(without.parts) == set(without.last) == {"l2", "cosine", "relational"} - {name}
    torch.testing.assert_close(without.total, whole.total - whole.parts[name], rtol=1e-5, atol=0)


def test_only_the_total_is_differentiated():
    tensors = tensor_golden("vitup_losses")[0]
    predictions = [[tokens.requires_grad_() for tokens in layer] for layer in composite(tensors, "pred")]

    value = objective(predictions, composite(tensors, "gt"), LossWeights())
    value.total.backward()

    assert all(tokens.grad.abs().max() > 0 for layer in predictions for tokens in layer)
    assert not any(part.requires_grad for part in (*value.parts.values(), *value.last.values()))


def test_predictions_of_too_few_layers_are_refused():
    tensors = tensor_golden("vitup_losses")[0]

    with pytest.raises(ValueError, match=r"predictions of 1 layers x \[3\] scales don't match targets of 2 layers x 3"):
        objective(composite(tensors, "pred")[:1], composite(tensors, "gt"), LossWeights())
    with pytest.raises(ValueError, match="3 weights of layers for 2 layers"):
        objective(composite(tensors, "pred"), composite(tensors, "gt"), LossWeights(layers=(1, 1, 1)))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"l2": 0, "cosine": 0, "relational": 0}, r"weights of losses must be at least 0.*got \(0, 0, 0\)"),
        ({"cosine": -1.0}, "weights of losses"),
        ({"layers": (0.0, 0.0)}, "weights of layers"),
        ({"scales": ()}, "weights of scales"),
        ({"layers": (1.0, 0.0), "relational_layers": "last"}, "needs a last layer that counts"),
        ({"relational_layers": "first"}, "'all' or 'last', got 'first'"),
        ({"tau": 0.0}, "tau must be above 0"),
    ],
)
def test_weights_without_a_meaning_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        LossWeights(**settings)


# --- supervision ------------------------------------------------------------------------------------------------------

SMALL = Supervision(grids=(3, 6, 12), chunk_blocks=4)
ALL_BLOCKS = slice(0, 9)


def test_queries_are_those_of_the_official_blocks():
    tensors = tensor_golden("vitup_supervision_blocks")[0]
    corners = tensors["in/bbox_x1y1x2y2"]
    boxes = torch.cat([corners[:, :2], corners[:, 2:] - corners[:, :2]], dim=1)
    unit = torch.tensor([[0.0, 0.0, 1.0, 1.0]])

    torch.testing.assert_close(SMALL.queries(boxes, ALL_BLOCKS), tensors["out/q_xy_blocks"].flatten(1, 3), rtol=0, atol=1e-6)
    torch.testing.assert_close(
        SMALL.queries(unit, ALL_BLOCKS)[0], tensors["out/q_xy_blocks_unit"].flatten(0, 2), rtol=0, atol=1e-7
    )


def test_predictions_are_pooled_as_officially():
    tensors = tensor_golden("vitup_supervision_blocks")[0]

    pooled = SMALL.predictions(tensors["in/q_feats"].flatten(1, 3))

    for scale, tokens in enumerate(pooled):
        torch.testing.assert_close(tokens, tensors[f"out/pooled_scale{scale}"].flatten(1, 3), rtol=0, atol=1e-6)


def test_targets_are_the_teachers_tokens_of_the_official_blocks():
    tensors = tensor_golden("vitup_supervision_blocks")[0]
    row_and_column = [torch.stack(torch.meshgrid(*[torch.arange(n)] * 2, indexing="ij"), dim=-1) for n in SMALL.grids]

    targets = SMALL.targets([indices[None] for indices in row_and_column], ALL_BLOCKS)

    for scale, tokens in enumerate(targets):
        assert torch.equal(tokens[0], tensors[f"out/hidden_ij_scale{scale}"].flatten(0, 2))


def test_chunks_of_the_published_run_are_four_of_49_blocks():
    supervision = Supervision()
    boxes = torch.tensor([[0.25, 0.5, 0.5, 0.25]])

    tokens = [
        [t.shape[1] for t in supervision.targets([torch.zeros(1, g, g, 2) for g in supervision.grids], c)]
        for c in supervision.chunks
    ]

    assert tokens == [[49, 196, 784]] * 4
    assert supervision.queries(boxes, supervision.chunks[0]).shape == (1, 784, 2)
    assert supervision.chunks == (slice(0, 49), slice(49, 98), slice(98, 147), slice(147, 196))


def test_the_last_chunk_is_what_is_left():
    assert SMALL.chunks == (slice(0, 4), slice(4, 8), slice(8, 9))


@pytest.mark.parametrize("grids", [(14, 28, 56), (7, 14, 28), (4, 16), (5,), (1, 2, 4, 8)])
def test_a_student_that_knows_the_finest_map_answers_every_grid_with_its_means(grids):
    supervision = Supervision(grids=grids, chunk_blocks=3)
    finest = torch.randn(2, 4, grids[-1], grids[-1], generator=torch.Generator().manual_seed(0))
    maps = [torch.nn.functional.avg_pool2d(finest, grids[-1] // grid).permute(0, 2, 3, 1) for grid in grids]
    blocks = to_blocks(finest.permute(0, 2, 3, 1), supervision.block)

    for chunk in supervision.chunks:
        predictions = supervision.predictions(blocks[:, chunk].flatten(1, 3))
        for predicted, target in zip(predictions, supervision.targets(maps, chunk), strict=True):
            torch.testing.assert_close(predicted, target, rtol=0, atol=1e-6)


def test_queries_read_the_cells_that_their_targets_come_from():
    supervision = Supervision(grids=(2, 4), chunk_blocks=3)
    n = 4
    where = (torch.arange(n) + 0.5) / n
    map_of_xy = torch.stack([where.expand(n, n), where[:, None].expand(n, n)], dim=-1)[None]
    coarse = to_blocks(map_of_xy, 2).mean(dim=(2, 3)).unflatten(1, (2, 2))
    whole_canvas = torch.tensor([[0.0, 0.0, 1.0, 1.0]])

    for chunk in supervision.chunks:
        targets = supervision.targets([coarse, map_of_xy], chunk)
        torch.testing.assert_close(supervision.queries(whole_canvas, chunk), targets[1])


@pytest.mark.parametrize("grids", [(), (0, 2), (28, 14), (14, 14), (14, 42), (14, 21)])
def test_grids_that_do_not_nest_are_refused(grids):
    with pytest.raises(ValueError, match=r"grids must be|each of the grids must be"):
        Supervision(grids=grids)


def test_other_maps_than_those_of_the_grids_are_refused():
    with pytest.raises(ValueError, match=r"grids \(\(3, 3\), \(6, 7\)\), but supervision is set up for \(3, 6, 12\)"):
        SMALL.targets([torch.zeros(1, 3, 3, 2), torch.zeros(1, 6, 7, 2)], ALL_BLOCKS)
    with pytest.raises(ValueError, match="chunk_blocks must be at least 1, got 0"):
        Supervision(chunk_blocks=0)


# --- learning rate ----------------------------------------------------------------------------------------------------


def test_learning_rates_are_those_of_the_official_schedule():
    expected = json.loads((GOLDEN / "vitup_lr_schedule.json").read_text())["lr"]

    rates = {step: learning_rate(int(step)) for step in expected}

    assert rates == pytest.approx(expected, rel=1e-9, abs=0)


def test_without_a_warm_up_the_first_step_has_the_peak_and_after_the_last_comes_the_floor():
    settings = {"steps": 10, "warmup": 0, "peak": 3.0, "floor": 1.0}

    assert [learning_rate(step, **settings) for step in (0, 5, 10, 11)] == [3.0, 2.0, 1.0, 1.0]
    assert learning_rate(4, steps=4, warmup=4, floor=0.5) == 0.5
