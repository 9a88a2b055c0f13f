"""Correspondence, discovery, CKA and self-similarity: official scores, and exactness however the work is split."""

import dataclasses
import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from operators.metrics.canvas import Canvas
from operators.metrics.cka import HsicTerms, cka, gram, terms_of_grams
from operators.metrics.correspondence import LIFT, VIT_UP, PairScore, Pck, View, match, score_pair
from operators.metrics.discovery import CorLoc, TokenCut, box_iou, discover
from operators.metrics.matching import best_pixels, pixel_features
from operators.metrics.similarity import centre_cell, self_similarity
from tests.goldens import Allocations
from tests.goldens import evaluation_golden as golden

SIZES = [((5, 7), (13, 18)), ((4, 4), (16, 16)), ((1, 1), (4, 3)), ((3, 1), (9, 2)), ((6, 5), (6, 5)), ((8, 8), (5, 3))]


def enlarged(features_hwC: torch.Tensor, size: tuple[int, int], normalise: str) -> torch.Tensor:
    """The map [H, W, C] that is never made, float64."""
    features = features_hwC.double().permute(2, 0, 1)[None]
    if normalise == "cells":
        features = F.normalize(features, dim=1)
    up = F.interpolate(features, size=size, mode="bilinear", align_corners=False)
    return (F.normalize(up, dim=1) if normalise == "pixels" else up)[0].permute(1, 2, 0)


@pytest.mark.parametrize("normalise", ["cells", "pixels"])
@pytest.mark.parametrize(("grid", "size"), SIZES)
def test_best_pixels_are_those_of_the_enlarged_map(grid, size, normalise):
    torch.manual_seed(0)
    features, queries = torch.randn(*grid, 6), torch.randn(9, 6).double()

    compared = F.normalize(queries, dim=1) if normalise == "pixels" else queries
    similarity = (enlarged(features, size, normalise) @ compared.t()).flatten(0, 1)
    for max_bytes in (1, 3000, 2**26):
        found = best_pixels(queries, features, size, normalise=normalise, max_bytes=max_bytes)
        flat = found.xy_K2[:, 1] * size[1] + found.xy_K2[:, 0]
        torch.testing.assert_close(found.score_K, similarity.amax(dim=0), rtol=0, atol=1e-12)
        torch.testing.assert_close(similarity.gather(0, flat[None])[0], found.score_K, rtol=0, atol=1e-12)


@pytest.mark.parametrize("grid", [(5, 7), (1, 3), (4, 1), (6, 6)])
@pytest.mark.parametrize("factor", [1, 2, 4, 8])
def test_of_tied_pixels_the_first_in_raster_order_is_taken(grid, factor):
    # Cells along the axes, of length 1, and weights of few bits: the sums are exact and full of ties.
    rng = np.random.default_rng(factor)
    signs = torch.from_numpy(rng.choice([-1.0, 1.0], (*grid, 1)))
    features = F.one_hot(torch.from_numpy(rng.integers(0, 3, grid)), 3) * signs
    queries = torch.from_numpy(rng.integers(-2, 3, (40, 3))).double()
    size = (grid[0] * factor, grid[1] * factor)

    first = (enlarged(features, size, "cells") @ queries.t()).flatten(0, 1).argmax(dim=0)
    for max_bytes in (1, 2000, 2**26):
        xy = best_pixels(queries, features, size, normalise="cells", max_bytes=max_bytes).xy_K2
        assert (xy[:, 1] * size[1] + xy[:, 0]).tolist() == first.tolist()


@pytest.mark.parametrize("normalise", ["cells", "pixels"])
def test_the_border_repeats_its_cells_and_its_first_pixel_wins(normalise):
    features = torch.zeros(3, 3, 2)
    features[..., 1] = 1
    features[2, 2] = torch.tensor([3.7, 0.1])

    found = best_pixels(torch.tensor([[1.0, 0.0]]), features, (24, 24), normalise=normalise)

    # The last cell's centre lies between pixels 19 and 20; from there on the map is constant.
    assert found.xy_K2.tolist() == [[20, 20]]


@pytest.mark.parametrize("normalise", ["cells", "pixels"])
@pytest.mark.parametrize("size", [(40, 36), (8, 9)])
def test_neighbours_that_are_alike_are_told_apart_in_float64(size, normalise):
    """Most pixels are passed over by a bound or by float32, which can't tell such cells from each other."""
    torch.manual_seed(2)
    features = F.normalize(torch.randn(5), dim=0) + 1e-9 * torch.randn(8, 9, 5).double()
    features[3, 4] *= 1e-25  # whose length float32 can't hold
    queries = torch.cat([features[3, 4][None] * 1e25, features[[0, 7, 5], [8, 0, 5]], torch.randn(5, 5).double()])

    compared = F.normalize(queries, dim=1) if normalise == "pixels" else queries
    similarity = (enlarged(features, size, normalise) @ compared.t()).flatten(0, 1)
    found = best_pixels(queries, features, size, normalise=normalise)

    torch.testing.assert_close(found.score_K, similarity.amax(dim=0), rtol=0, atol=1e-15)
    chosen = similarity.gather(0, (found.xy_K2[:, 1] * size[1] + found.xy_K2[:, 0])[None])[0]
    torch.testing.assert_close(chosen, found.score_K, rtol=0, atol=1e-15)


@pytest.mark.parametrize("normalise", ["cells", "pixels"])
@pytest.mark.parametrize(("grid", "size"), SIZES)
def test_features_of_single_pixels_are_those_of_the_enlarged_map(grid, size, normalise):
    torch.manual_seed(1)
    features = torch.randn(*grid, 4)
    xy = torch.cartesian_prod(torch.arange(size[1]), torch.arange(size[0]))

    found = pixel_features(features, size, xy, normalise=normalise)

    torch.testing.assert_close(found, enlarged(features, size, normalise)[xy[:, 1], xy[:, 0]], rtol=0, atol=1e-12)


def test_matching_makes_nothing_larger_than_its_budget():
    features, queries = torch.randn(16, 16, 64), torch.randn(8, 64)

    for normalise in ("cells", "pixels"):
        with Allocations() as made:
            best_pixels(queries, features, (256, 256), normalise=normalise, max_bytes=300_000)
        # The enlarged map has 16.8 MB, and the similarities 4.2 MB.
        assert made.largest < 300_000


def test_cells_that_cancel_out_are_like_nothing():
    features = torch.tensor([[[1e3, 2e3], [-1e3, -2e3]]])
    queries = torch.tensor([[-2.0, 1.0], [1.0, 2.0]])

    found = best_pixels(queries, features, (1, 9), normalise="pixels")

    # Orthogonal to both cells, and to their middle, which is 0 but for rounding.
    assert abs(found.score_K[0].item()) < 1e-9
    # The left half points to (1, 2) whatever its length, the right half away from it.
    assert found.score_K[1].item() == pytest.approx(1, abs=1e-12)
    assert found.xy_K2[1, 0] < 4
    zeros = best_pixels(queries, torch.zeros(2, 2, 2), (4, 4), normalise="pixels")
    assert (zeros.xy_K2.tolist(), zeros.score_K.tolist()) == ([[0, 0]] * 2, [0.0] * 2)


def test_matching_refuses_what_it_cannot_match():
    features, queries = torch.randn(3, 3, 4), torch.randn(2, 4)
    nan = features.clone()
    nan[1, 1, 1] = torch.nan

    with pytest.raises(ValueError, match="NaN"):
        best_pixels(queries, nan, (6, 6), normalise="cells")
    with pytest.raises(ValueError, match="NaN"):
        best_pixels(queries / 0, features, (6, 6), normalise="cells")
    with pytest.raises(ValueError, match=r"\(2, 3\) and \(3, 3, 4\)"):
        best_pixels(queries[:, :3], features, (6, 6), normalise="cells")
    with pytest.raises(ValueError, match="can't be enlarged"):
        best_pixels(queries, features[:0], (6, 6), normalise="cells")
    with pytest.raises(ValueError, match="outside of 6 x 5"):
        pixel_features(features, (5, 6), torch.tensor([[0, 5]]), normalise="cells")


def lift_pairs() -> tuple[list[np.ndarray], list[PairScore]]:
    data = golden("pck_lift")
    features, side = torch.from_numpy(data["features"]).permute(0, 2, 3, 1), int(data["imsize"])
    predictions, scores = [], []
    for i, pair in enumerate(json.loads(str(data["raw_json"]))):
        source, target = (
            View(features=features[2 * i + k], canvas=LIFT.place(*pair[f"{name}_imsize"][:2], side))
            for k, name in enumerate(("src", "trg"))
        )
        predictions.append(match(source, target, np.array(pair["src_kps"]), LIFT))
        scores.append(
            score_pair(
                predictions[-1],
                np.array(pair["trg_kps"]),
                target.canvas,
                pair["trg_bndbox"],
                LIFT,
                category=pair["category"],
                alphas=data["alphas"],
            )
        )
    return predictions, scores


def test_lifts_predictions_and_pck():
    data = golden("pck_lift")

    predictions, scores = lift_pairs()

    np.testing.assert_array_equal(np.concatenate(predictions), data["pred_xy"])
    assert [score.points for score in scores] == data["pairs_kp_count"].tolist()
    np.testing.assert_allclose(Pck.of(scores).mean(), data["pck"], atol=1e-6)
    np.testing.assert_allclose(Pck.of(scores).per_pair(), data["pck_if_per_pair_mean"], atol=1e-6)


def test_lifts_canvas_key_points_and_thresholds():
    data = golden("pck_lift")

    for i, pair in enumerate(json.loads(str(data["raw_json"]))):
        ids = [int(key) for key in pair["kps_ids"]]
        for k, name in enumerate(("src", "trg")):
            canvas = LIFT.place(*pair[f"{name}_imsize"][:2], int(data["imsize"]))
            x1, y1, x2, y2 = pair[f"{name}_bndbox"]
            points = canvas.compared(np.array(pair[f"{name}_kps"]))
            np.testing.assert_array_equal(points, data["kps_canvas"][2 * i + k, ids, :2])
            assert canvas.length(max(x2 - x1, y2 - y1)) == pytest.approx(data["thresholds"][2 * i + k], abs=1e-12)
    for i in range(3):
        image = data[f"letterbox_in{i}"]
        canvas = LIFT.place(image.shape[1], image.shape[0], 48)
        np.testing.assert_allclose(canvas.draw(image).astype(int), data[f"letterbox_out{i}"], atol=1)


def test_vit_ups_predictions_and_pck():
    data = golden("pck_vitup")
    images, alphas = json.loads(str(data["annotations_json"])), data["alphas"]
    features, common = torch.from_numpy(data["features"]).permute(0, 2, 3, 1), json.loads(str(data["common_kp_ids"]))
    protocol, predictions, scores = dataclasses.replace(VIT_UP, candidates="cells"), [], []
    for i in range(len(images) // 2):
        views = [
            View(features=features[k], canvas=VIT_UP.place(images[k]["image_width"], images[k]["image_height"], 448))
            for k in (2 * i, 2 * i + 1)
        ]
        source, target = ({key: xy for key, xy in images[k]["kps"].items() if xy} for k in (2 * i, 2 * i + 1))
        predictions.append(match(*views, np.array(list(source.values())), protocol))
        kept = [str(key) for key in common[i]]
        scores.append(
            score_pair(
                predictions[-1][[list(source).index(key) for key in kept]],
                np.array([target[key] for key in kept]),
                views[1].canvas,
                images[2 * i + 1]["bndbox"],
                protocol,
                category="cat",
                alphas=alphas,
            )
        )

    pck = Pck.of(scores)

    np.testing.assert_array_equal(np.concatenate(predictions), data["pred_all_src_kps"])
    np.testing.assert_allclose(pck.mean(), data["pck"], atol=1e-9)
    np.testing.assert_allclose(np.array(pck.per_pair()) * 100, data["pck_per_pair_mean_percent"], atol=1e-9)
    np.testing.assert_allclose(pck.plus(), data["pck_plus"], atol=1e-9)


def test_a_map_of_one_cell_per_pixel_is_matched_the_same_under_either_choice_of_candidates():
    features = torch.randn(2, 20, 20, 5, generator=torch.Generator().manual_seed(0))
    views = [View(features=each, canvas=VIT_UP.place(31, 44, 20)) for each in features]
    points = np.array([[0, 0], [30.9, 43.9], [31, 44], [12.5, 7]])

    cells = match(*views, points, dataclasses.replace(VIT_UP, candidates="cells"))

    np.testing.assert_array_equal(match(*views, points, VIT_UP), cells)
    with pytest.raises(ValueError, match="square"):
        match(views[0], View(features=features[1, :10], canvas=views[1].canvas), points, VIT_UP)


def test_thresholds_at_equality_and_by_the_image():
    canvas = VIT_UP.place(100, 200, 448)
    args = (np.array([[13.0, 14.0]]), np.array([[10.0, 10.0]]), canvas, [0, 0, 50, 20])

    def correct(protocol):
        return score_pair(*args, protocol, category="cat", alphas=(0.1, 0.025)).correct

    assert correct(VIT_UP) == (1, 0)
    assert correct(dataclasses.replace(VIT_UP, strict=True)) == (0, 0)
    assert correct(dataclasses.replace(VIT_UP, threshold="image")) == (1, 1)


def test_key_points_on_the_far_border_fall_into_the_last_cell():
    # LiFT's image has 33.6 -> 34 rows below 11 black ones: its middle lies at 27.8.
    for protocol, middle in ((LIFT, 27), (VIT_UP, 28)):
        assert protocol.place(500, 300, 56).pixels(np.array([[500, 150]]), 56).tolist() == [[55, middle]]
        assert protocol.place(300, 500, 56).pixels(np.array([[150, 500]]), 56).tolist() == [[middle, 55]]
    assert VIT_UP.place(1, 1, 8).pixels(np.array([[0, 0]]), 8).tolist() == [[0, 0]]


def test_an_odd_difference_of_sides_leaves_vit_ups_padding_a_pixel_short():
    image = np.full((4, 9, 3), 255, np.uint8)

    drawn = VIT_UP.place(9, 4, 36).draw(image)

    # 2 + 4 + 2 rows over 36 pixels: the image takes the middle half.
    assert drawn.shape == (36, 36, 3)
    assert (drawn[:7, :, 0] == 0).all()
    assert (drawn[11:25, :, 0] == 255).all()
    assert LIFT.place(400, 1, 56).draw(np.zeros((1, 400, 3), np.uint8)).shape == (56, 56, 3)
    with pytest.raises(ValueError, match=r"\[4, 9, 3\]"):
        VIT_UP.place(9, 4, 36).draw(image[:3])
    with pytest.raises(ValueError, match="0 x 5"):
        Canvas(mode="fit_then_pad", width=0, height=5, side=8)


def random_scores(count: int = 40) -> list[PairScore]:
    rng = np.random.default_rng(0)
    scores = []
    for _ in range(count):
        points = int(rng.integers(0, 31))
        correct = tuple(sorted((int(v) for v in rng.integers(0, points + 1, 3)), reverse=True))
        scores.append(PairScore(category=str(rng.choice(["cat", "dog", "tv"])), points=points, correct=correct, nearest=correct))
    return scores


def test_merged_counts_are_those_of_the_whole_to_the_last_digit():
    scores = random_scores()
    whole = Pck.of(scores)

    for split in (1, 7, 39):
        merged = Pck.of(scores[split:][::-1]) + Pck() + Pck.of(scores[:split])
        assert merged == whole
        assert (merged.mean(), merged.per_pair(), merged.per_point()) == (whole.mean(), whole.per_pair(), whole.per_point())


def test_categories_weigh_the_same_and_pairs_without_points_nothing():
    def score(category, points, hits):
        return PairScore(category=category, points=points, correct=(hits,), nearest=(0,))

    pck = Pck.of([score("cat", 30, 30), score("cat", 10, 0), score("dog", 2, 1), score("tv", 0, 0)])

    assert pck.by_category() == {"cat": (0.75,), "dog": (0.5,)}
    assert pck.mean() == (0.625,)
    assert pck.per_point() == (31 / 42,)
    assert pck.per_pair() == (0.5,)
    assert pck.plus() == (0.0,)


def test_pairs_without_points_and_points_without_sense():
    view = View(features=torch.randn(2, 2, 3), canvas=LIFT.place(10, 10, 8))
    none = np.zeros((0, 2))

    assert match(view, view, none, LIFT).shape == (0, 2)
    empty = score_pair(none, none, view.canvas, [0, 0, 5, 5], LIFT, category="cat")
    assert (empty.points, empty.correct) == (0, (0, 0, 0))
    for average in (Pck.of([empty]).per_point, Pck.of([empty]).mean):
        with pytest.raises(ValueError, match="nothing to average"):
            average()
    with pytest.raises(ValueError, match="key points hold NaN"):
        match(view, view, np.array([[1, np.nan]]), LIFT)
    with pytest.raises(ValueError, match="no extent"):
        score_pair(none, none, view.canvas, [5, 5, 5, 5], LIFT, category="cat")
    with pytest.raises(ValueError, match="1 predictions for 0"):
        score_pair(np.zeros((1, 2)), none, view.canvas, [0, 0, 5, 5], LIFT, category="cat")
    with pytest.raises(ValueError, match="alphas"):
        Pck.of(random_scores()) + Pck.of([PairScore(category="cat", points=1, correct=(1,), nearest=(1,))])


CUTS = golden("tokencut")


@pytest.mark.parametrize("solver", ["official", "fast"])
@pytest.mark.parametrize("case", [str(name) for name in CUTS["case_names"]])
def test_tokencut_is_that_of_lifts_copy(case, solver):
    data = {key.removeprefix(f"{case}_"): value for key, value in CUTS.items() if key.startswith(f"{case}_")}
    h, w = (int(side) for side in data["grid_hw"])
    settings = TokenCut(tau=float(data["tau"]), weighted=bool(data["weighted_graph"]), solver=solver)

    found = discover(data["feats"].reshape(h, w, -1), tuple(int(side) for side in data["image_hw"]), settings)

    assert found.found
    assert list(found.box) == data["pred_xyxy"].tolist()
    np.testing.assert_array_equal(found.mask_hw, data["component_mask"])
    np.testing.assert_array_equal(found.bipartition_hw, data["bipartition"])
    expected = data["eigvec_seed_positive"]
    np.testing.assert_allclose(found.eigenvector_hw, expected, rtol=0, atol=1e-4 * np.abs(expected).max())
    # Tokens with the same edges share the largest entry: any of them is the seed.
    assert expected[found.seed] == pytest.approx(expected.ravel()[data["seed_index"]], rel=1e-6)
    np.testing.assert_allclose(box_iou(found.box, data["gt_boxes"]), data["iou"], atol=1e-9)
    assert CorLoc.of(found.box, data["gt_boxes"]) == CorLoc(hits=int(data["hit"]), images=1)


@pytest.mark.parametrize("solver", ["official", "fast"])
@pytest.mark.parametrize("grid", [(12, 12), (1, 40), (9, 5)])
def test_an_object_unlike_its_surroundings_is_boxed(grid, solver):
    rows, columns = slice(0, min(4, grid[0])), slice(1, 4)
    features = np.zeros((*grid, 2), np.float32)
    features[..., 0] = 1
    features[rows, columns] = [0, 1]

    found = discover(features, (grid[0] * 16, grid[1] * 16), TokenCut(solver=solver))

    assert found.box == (16, 0, 64, 16 * min(4, grid[0]))
    assert found.mask_hw.sum() == 3 * min(4, grid[0])


@pytest.mark.parametrize("solver", ["official", "fast"])
def test_tokens_that_are_all_alike_make_a_box_of_the_whole_image(solver):
    for features in (np.ones((8, 8, 3)), np.zeros((8, 8, 3)), np.ones((1, 1, 3)), np.eye(9).reshape(3, 3, 9)):
        for weighted in (False, True):
            found = discover(features, (50, 40), TokenCut(solver=solver, weighted=weighted))
            assert (found.found, found.box) == (False, (0, 0, 40, 50))


def test_two_tokens_are_cut_apart():
    found = discover(np.array([[[1.0, 0], [0, 1.0]]]), (16, 32))

    assert not found.found  # one edge: nothing tells which side is the object
    with pytest.raises(ValueError, match="NaN"):
        discover(np.full((2, 2, 2), np.nan), (32, 32))
    with pytest.raises(ValueError, match=r"\(0, 2, 2\)"):
        discover(np.zeros((0, 2, 2)), (32, 32))


def test_corloc_counts_half_an_overlap_and_no_image_without_objects():
    box = (0, 0, 10, 10)
    # The official 1e-7 in the denominator makes an exact half a miss.
    assert CorLoc.of(box, [(0, 0, 10, 5.01)]) == CorLoc(hits=1, images=1)
    assert CorLoc.of(box, [(0, 0, 10, 4.99), (20, 20, 30, 30)]) == CorLoc(hits=0, images=1)
    assert CorLoc.of(box, []) == CorLoc()
    assert sum([CorLoc(hits=1, images=2), CorLoc(hits=3, images=3)], CorLoc()).share == 0.8
    with pytest.raises(ValueError, match="no image"):
        _ = CorLoc().share


def hsic_terms(batch: int, features: list[torch.Tensor], **options: object) -> HsicTerms:
    return terms_of_grams(batch, [gram(each) for each in features], **options)


def cka_features() -> list[torch.Tensor]:
    data = golden("linear_cka")
    return [torch.from_numpy(data[f"feat_{grid}"]) for grid in data["grids"]]


@pytest.mark.parametrize(
    ("name", "batches", "options"),
    [
        ("unbiased_one_batch", 1, {}),
        ("unbiased_minibatch", 3, {}),
        ("unbiased_minibatch_minmax_scaled", 3, {"rescale": True}),
        ("biased_centred", 1, {"estimator": "biased"}),
    ],
)
def test_cka_is_torch_ckas(name, batches, options):
    features, data = cka_features(), golden("linear_cka")
    assert batches in (1, data["n_batches"])
    parts = list(zip(*(each.chunk(batches) for each in features), strict=True))

    terms = [hsic_terms(b, part, **options) for b, part in enumerate(parts)]

    np.testing.assert_allclose(cka(terms), data[f"cka_{name}"], rtol=0, atol=1e-12)
    assert torch.equal(cka(terms[::-1]), cka(terms))


def test_gram_matrices_are_the_same_in_any_blocks():
    features = cka_features()[1]

    for max_bytes in (1, 5000):
        torch.testing.assert_close(gram(features, max_bytes), gram(features), rtol=1e-13, atol=0)


def test_biased_cka_is_that_of_covariances():
    x, y = (torch.randn(20, c, dtype=torch.float64, generator=torch.Generator().manual_seed(c)) for c in (3, 5))
    a, b = x - x.mean(dim=0), y - y.mean(dim=0)
    expected = (a.t() @ b).square().sum() / ((a.t() @ a).norm() * (b.t() @ b).norm())

    assert cka([hsic_terms(0, [x, y], estimator="biased")])[0, 1].item() == pytest.approx(expected.item(), rel=1e-12)


def test_cka_refuses_batches_it_cannot_compare():
    features = cka_features()
    terms = hsic_terms(0, features)

    with pytest.raises(ValueError, match="at least 4"):
        hsic_terms(0, [each[:3] for each in features])
    with pytest.raises(ValueError, match=r"\[23, 24\]"):
        hsic_terms(0, [features[0], features[1][:23]])
    with pytest.raises(ValueError, match="NaN"):
        hsic_terms(0, [features[0] * torch.nan])
    with pytest.raises(ValueError, match="no batch"):
        cka([])
    with pytest.raises(ValueError, match="once"):
        cka([terms, terms])
    constant = cka([hsic_terms(0, [features[0], torch.ones(24, 4)])])
    assert constant.isnan().tolist() == [[False, True], [True, True]]


def test_self_similarity_is_lifts():
    data = golden("selfsim")
    features = torch.from_numpy(data["feat"])
    doubled = F.interpolate(features[None], scale_factor=2, mode="bilinear")[0]

    for given, name in ((features, "map"), (doubled, "map_bilinear_x2")):
        found = self_similarity(given.permute(1, 2, 0).numpy())
        np.testing.assert_allclose(found, data[name], rtol=0, atol=1e-5)
    assert [centre_cell((n, n))[0] for n in (14, 28)] == data["centre_index"].tolist()


def test_self_similarity_of_constant_tiny_and_broken_maps():
    assert self_similarity(np.ones((3, 5, 2))).tolist() == np.zeros((3, 5)).tolist()
    assert self_similarity(np.ones((1, 1, 2))).tolist() == [[0.0]]
    assert self_similarity(np.array([[[1.0, 0], [0, 1]]]), (0, 0)).tolist() == [[1.0, 0.0]]
    with pytest.raises(ValueError, match="NaN"):
        self_similarity(np.full((2, 2, 2), np.nan))
    with pytest.raises(IndexError, match="2 x 2"):
        self_similarity(np.ones((2, 2, 2)), (2, 0))
