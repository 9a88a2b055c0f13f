"""Neighbourhood attention, against NATTEN's golden files, NATTEN itself where it is installed, and its definition."""

import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from operators.upsamplers import UpsamplerError
from operators.upsamplers.neighbourhood import (
    Neighbourhoods,
    enlargement,
    nearest_exact,
    neighbourhood_attention,
    neighbours,
    query_values,
)
from tests.goldens import tensor_golden, under

SIZES = [
    # map, grid, kernel: whole ratios, others, one for each axis; as many cells as the kernel has; hardly or much enlarged
    ((6, 8), (24, 16), (5, 5)),
    ((9, 10), (23, 31), (9, 9)),
    ((5, 7), (18, 23), (3, 5)),
    ((14, 12), (28, 25), (3, 7)),
    ((13, 14), (13, 14), (5, 13)),
    ((9, 9), (100, 99), (9, 3)),
    ((10, 10), (19, 11), (7, 9)),
    ((1, 3), (7, 9), (1, 3)),
]


def plain(
    queries: Tensor, keys: Tensor, values: Tensor, kernel: tuple[int, int], dilation: tuple[int, int] | None = None
) -> Tensor:
    """As it is published: the map is enlarged, and each query gathers its neighbours."""
    grid = queries.shape[2:4]
    steps = dilation or enlargement(keys.shape[2:4], grid)
    near = [torch.from_numpy(neighbours(*each)) for each in zip(grid, kernel, steps, strict=True)]

    def gathered(maps: Tensor) -> Tensor:
        fine = F.interpolate(maps.flatten(0, 1).permute(0, 3, 1, 2), grid, mode="nearest-exact").unflatten(0, maps.shape[:2])
        return fine[:, :, :, near[0][:, None, :, None], near[1][None, :, None, :]].flatten(-2)

    logits = torch.einsum("bnijd,bndijs->bnijs", queries, gathered(keys)) * keys.shape[-1] ** -0.5
    weights = logits.softmax(-1)
    if values.shape[1] == 1:
        weights = weights.mean(1, keepdim=True)
    return torch.einsum("bnijs,bneijs->bijne", weights, gathered(values)).flatten(3)


def made(cells, grid, groups=2, width=3, heads=2, depth=4, sharp=1.0):
    draw = torch.Generator().manual_seed(sum(grid))
    shapes = (2, heads, *grid, depth), (2, heads, *cells, depth), (2, groups, *cells, width)
    queries, keys, values = (torch.randn(shape, generator=draw) for shape in shapes)
    return sharp * queries, keys, values


def whole(size: int) -> slice:
    return slice(0, size)


@pytest.mark.parametrize("case", range(3))
def test_equals_natten(case):
    tensors, _ = tensor_golden("naf_natten_semantics")
    golden = under(tensors, f"{case}.")
    kernel, dilation = (tuple(golden[name].tolist()) for name in ("kernel", "dilation"))

    out = neighbourhood_attention(golden["q"], golden["k"], golden["v"], kernel, dilation)

    torch.testing.assert_close(out, golden["out"], rtol=0, atol=2e-6)


@pytest.mark.parametrize("case", range(3))
def test_its_neighbours_are_natten_s(case):
    tensors, _ = tensor_golden("naf_natten_semantics")
    golden = under(tensors, f"{case}.")
    sizes = zip(golden["q"].shape[2:4], golden["kernel"].tolist(), golden["dilation"].tolist(), strict=True)
    rows, columns = (torch.from_numpy(neighbours(*each)) for each in sizes)

    keys = golden["k"][:, :, rows[:, None, :, None], columns[None, :, None, :]].flatten(4, 5)
    logits = torch.einsum("bnijd,bnijsd->bnijs", golden["q"], keys) * golden["q"].shape[-1] ** -0.5

    torch.testing.assert_close(logits, golden["logits"], rtol=0, atol=2e-6)


@pytest.mark.parametrize(("size", "kernel", "dilation"), [((19, 23), 5, (3, 4)), ((12, 14), 3, (1, 2)), ((18, 20), 9, (2, 2))])
def test_equals_natten_where_it_is_installed(size, kernel, dilation):
    natten = pytest.importorskip("natten", reason="natten isn't installed: the golden files alone are compared with")
    given = torch.randn(3, 1, 2, *size, 8, generator=torch.Generator().manual_seed(0))

    out = neighbourhood_attention(*given, (kernel, kernel), dilation)

    theirs = natten.na2d(*given.permute(0, 1, 3, 4, 2, 5).contiguous(), kernel_size=(kernel, kernel), dilation=dilation)
    torch.testing.assert_close(out, theirs.permute(0, 3, 1, 2, 4), rtol=0, atol=1e-5)


@pytest.mark.parametrize("groups", [2, 1], ids=["values of each head", "values of all"])
@pytest.mark.parametrize(("cells", "grid", "kernel"), SIZES)
def test_enlarges_nothing_and_equals_what_does(cells, grid, kernel, groups):
    queries, keys, values = made(cells, grid, groups)

    out = Neighbourhoods.of(cells, grid, kernel, queries.device).attend(queries, keys, values, *map(whole, grid))

    torch.testing.assert_close(out, plain(queries, keys, values, kernel), rtol=0, atol=5e-6)


@pytest.mark.parametrize("dilation", [(1, 1), (2, 5), (4, 3), (6, 1)])
def test_dilations_other_than_the_enlargement_are_taken_as_well(dilation):
    queries, keys, values = made((6, 8), (25, 20))

    near = Neighbourhoods.of((6, 8), (25, 20), (3, 3), queries.device, dilation)

    out = near.attend(queries, keys, values, whole(25), whole(20))
    torch.testing.assert_close(out, plain(queries, keys, values, (3, 3), dilation), rtol=0, atol=5e-6)


@pytest.mark.parametrize(("cells", "grid", "kernel"), SIZES)
def test_any_tile_has_the_cells_of_the_whole(cells, grid, kernel):
    queries, keys, values = made(cells, grid)
    near = Neighbourhoods.of(cells, grid, kernel, queries.device)
    together = near.attend(queries, keys, values, *map(whole, grid))

    out = torch.full_like(together, torch.nan)
    for rows, columns in itertools.product(*([slice(0, 1), slice(1, n // 2), slice(n // 2, n)] for n in grid)):
        out[:, rows, columns] = near.attend(queries[:, :, rows, columns], keys, values, rows, columns)

    torch.testing.assert_close(out, together, rtol=0, atol=1e-5)


def test_cells_that_do_not_count_do_not_matter_however_large_their_logits_are():
    """Else the weights of those that do would vanish beside them."""
    queries, keys, values = made((5, 7), (18, 23), sharp=2000.0)

    out = Neighbourhoods.of((5, 7), (18, 23), (3, 3), queries.device).attend(queries, keys, values, whole(18), whole(23))

    torch.testing.assert_close(out, plain(queries, keys, values, (3, 3)), rtol=0, atol=1e-3)


def test_gradients_are_those_of_the_plain_formulation():
    given = [each.requires_grad_() for each in made((5, 7), (18, 23))]
    near = Neighbourhoods.of((5, 7), (18, 23), (3, 5), given[0].device)
    weight = torch.randn(2, 18, 23, 6, generator=torch.Generator().manual_seed(1))

    ours = torch.autograd.grad((weight * near.attend(*given, whole(18), whole(23))).sum(), given)

    theirs = torch.autograd.grad((weight * plain(*given, (3, 5))).sum(), given)
    for each, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(each, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("groups", [4, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("cells", "grid", "kernel"), [((9, 9), (18, 18), (9, 9)), ((9, 10), (43, 51), (9, 7)), SIZES[0]])
def test_memory_stays_within_its_bound(cells, grid, kernel, groups, dtype):
    given = [each.to(dtype) for each in made(cells, grid, groups, width=24, heads=4, depth=16)]
    near = Neighbourhoods.of(cells, grid, kernel, given[0].device)

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        near.attend(*given, *map(whole, grid))

    changes = [event.nbytes() for event in record.profiler.kineto_results.events() if event.name() == "[memory]"]
    bound = 2 * 4 * grid[0] * grid[1] * query_values(cells, grid, kernel, 4, 16, 24, shared=groups == 1)
    assert bound / 8 < max(itertools.accumulate(changes)) <= bound


@pytest.mark.parametrize("cells", range(1, 30))
def test_cells_of_an_enlarged_map_are_those_that_torch_takes(cells):
    """On a border between cells torch takes either, which depends on the shape of what is enlarged beside."""
    numbers = torch.arange(cells, dtype=torch.float32)
    for positions in range(cells, 120):
        ours = nearest_exact(cells, positions)
        theirs = F.interpolate(numbers[None, None, :, None], (positions, 1), mode="nearest-exact").flatten().numpy()
        on_border = (2 * np.arange(positions) + 1) * cells % (2 * positions) == 0
        assert np.array_equal(ours[~on_border], theirs[~on_border]), positions
        assert (abs(ours - theirs) <= on_border).all(), positions


@pytest.mark.parametrize(
    ("positions", "kernel", "dilation", "message"),
    [
        (17, 9, 2, "a neighbourhood of 9 with dilation 2 takes 18 positions a side, not 17"),
        (20, 4, 2, "need an odd kernel and a dilation of at least 1, not 4 with dilation 2"),
        (20, -1, 2, "need an odd kernel"),
        (20, 3, 0, "need an odd kernel and a dilation of at least 1, not 3 with dilation 0"),
    ],
)
def test_neighbourhoods_that_there_are_not_are_refused(positions, kernel, dilation, message):
    with pytest.raises(UpsamplerError, match=message):
        neighbours(positions, kernel, dilation)
