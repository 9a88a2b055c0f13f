"""How curves are drawn, wherever they are."""

import io
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def styled(*, parse_math: bool = True) -> AbstractContextManager[None]:
    """Within it, matplotlib draws as our curves are; `parse_math`: whether text between dollar signs is a formula."""
    import matplotlib

    return matplotlib.rc_context(
        {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "text.parse_math": parse_math}
    )


def png_of(figure: "Figure") -> bytes:
    """A figure as a PNG."""
    data = io.BytesIO()
    figure.savefig(data, format="png", dpi=130)
    return data.getvalue()
