"""The order of a linear's outputs: as a checkpoint has them, and as the kernels rotate them."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from quire.models.families import Source


def in_halves(rows: npt.NDArray[Any], source: Source) -> npt.NDArray[Any]:
    """Rows [heads * head size, ...] as RopeSpec wants them, with what is turned together half of what is turned apart.

    A permutation of queries and keys alike changes no product of the two. rows: as ``source.rows`` has chosen them; they are copied where
    the checkpoint has another order (``source.interleaved``).
    """
    if source.interleaved is None:
        return rows
    heads, turned = source.interleaved
    each = rows.reshape(heads, -1, *rows.shape[1:])
    order = np.arange(each.shape[1])
    order[:turned] = order[:turned].reshape(-1, 2).T.ravel()
    return each.take(order, axis=1).reshape(rows.shape)
