"""What the values of label PNGs mean: the classes of each data set, and COCO-Stuff's 27 coarse groups."""

from collections.abc import Mapping, Sequence

import numpy as np

VOID = 255
"""Label of pixels that are neither trained on nor scored."""

# --- COCO-Stuff's groups ----------------------------------------------------------------------------------------------

_THINGS = ((0, 9), (8, 11), (14, 8), (24, 7), (32, 6), (42, 10), (50, 5), (60, 2), (70, 3), (76, 0), (82, 1), (90, 4))
"""(last fine label, group): each range begins where the one before ends. Groups are 12 of things, then 15 of stuff."""

_STUFF = """
17 17 22 20 20 22 15 25 16 13 12 12 17 17 23 15 15 17 15 21 15 25 13 13 13 13 13 22 26 14 14 15 22 21 21 24 20 22 15 17 16 15
22 24 21 17 25 16 21 17 22 16 21 21 25 21 26 21 24 20 17 14 21 26 15 23 20 21 24 15 24 22 25 15 20 17 17 22 14 18 18 18 18 18
18 18 26 26 19 19 24
"""
"""Groups of the fine labels 91 to 181."""


def _coarse_table() -> np.ndarray:
    last, groups = np.array(_THINGS).T
    fine = [*np.repeat(groups, np.diff(last, prepend=-1)), *map(int, _STUFF.split())]
    table = np.full(256, VOID, np.uint8)
    table[: len(fine)] = fine
    table.setflags(write=False)
    return table


COARSE_OF_FINE = _coarse_table()
"""uint8 [256]: the coarse group of each label of COCO-Stuff's PNGs (category id - 1). 255 stays void, and 182 to 254, which no
file should have, are void here: `TABLES` has -1 for them."""


# --- the values of each data set's PNGs -------------------------------------------------------------------------------


CITYSCAPES_IDS = (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)
"""The labelIds that are trained and scored, in the order of their train ids 0..18; the others of 0..33 are void."""


def _table(values: Sequence[int], void: Sequence[int] = ()) -> np.ndarray:
    """A table in which `values` are the classes from 0 on, and the others of `void` are void."""
    table = np.full(256, -1, np.int16)
    table[list(void)] = VOID
    table[list(values)] = np.arange(len(values))
    return table


_STUFF_TABLE = _table(range(182), [VOID])
TABLES: Mapping[str, np.ndarray] = {
    "voc": _table(range(21), [VOID]),
    "coco_stuff": _STUFF_TABLE,
    "coco_stuff27": np.where(_STUFF_TABLE < 0, -1, COARSE_OF_FINE.astype(np.int16)),
    # 0, "other", is a class like any other in ViT-Up's protocol; there is no void.
    "ade20k": _table(range(151)),
    "cityscapes": _table(CITYSCAPES_IDS, range(34)),
    "photos_open": _table(range(18)),
}
"""What a PNG's values are: int16 [256] of class, 255 = void, or -1 where the data set has no such value."""

_NOT_IN_COCO = (11, 25, 28, 29, 44, 65, 67, 68, 70, 82, 90)
NEVER: Mapping[str, tuple[int, ...]] = {"coco_stuff": _NOT_IN_COCO, "coco_stuff27": _NOT_IN_COCO}
"""Values that have a class, and that no label file has (COCO numbers a street sign, a hat, a shoe, ... and annotates none):
masks with one of them are of other ids, COCO-Stuff's 171 without gaps or its ids from 1 on."""

# --- names of classes -------------------------------------------------------------------------------------------------

VOC_NAMES = """background aeroplane bicycle bird boat bottle bus car cat chair cow diningtable dog horse motorbike person
pottedplant sheep sofa train tvmonitor"""
COARSE_NAMES = """electronic appliance food furniture indoor kitchen accessory animal outdoor person sports vehicle
ceiling floor food-stuff furniture-stuff raw-material textile wall window building ground plant sky solid structural water"""
CITYSCAPES_NAMES = """road sidewalk building wall fence pole traffic-light traffic-sign vegetation terrain sky person rider
car truck bus train motorcycle bicycle"""
PHOTOS_NAMES = """background Apple Bag Banana Bicycle Bottle Car Cat Clock Cow Dog Handbag Horse Kite Laptop Motorcycle
Pizza Tie"""

_COCO_NAMES = """
person bicycle car motorcycle airplane bus train truck boat traffic-light fire-hydrant - stop-sign parking-meter bench bird
cat dog horse sheep cow elephant bear zebra giraffe - backpack umbrella - - handbag tie suitcase frisbee skis snowboard
sports-ball kite baseball-bat baseball-glove skateboard surfboard tennis-racket bottle - wine-glass cup fork knife spoon bowl
banana apple sandwich orange broccoli carrot hot-dog pizza donut cake chair couch potted-plant bed - dining-table - - toilet
- tv laptop mouse remote keyboard cell-phone microwave oven toaster sink refrigerator - book clock vase scissors teddy-bear
hair-drier toothbrush
"""
COCO_CATEGORIES: Mapping[int, str] = {
    number: name.replace("-", " ") for number, name in enumerate(_COCO_NAMES.split(), 1) if name != "-"
}
"""COCO's 80 categories of objects by id, in the order of the classes of detectors that were trained on them."""
