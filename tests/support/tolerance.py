"""How close a result has to be: every element, against float64.

|y - y64| <= (n + 2) * u_acc * S + u_mid * S_mid + u_out * |y64| + tiny, with S the reference on absolute values and n the terms
summed; and the largest error is at most twice that of torch's own convolution at the same dtype, plus one output ulp.
"""

from __future__ import annotations

import torch
from torch import Tensor

UNIT = {torch.float64: 2.0**-53, torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
# Below the smallest normal number the spacing is constant; float16's matters.
TINY = {torch.float64: 2.0**-1022, torch.float32: 2.0**-126, torch.float16: 2.0**-24, torch.bfloat16: 2.0**-126}


def accumulation_unit(dtype: torch.dtype) -> float:
    return UNIT[torch.float64 if dtype == torch.float64 else torch.float32]


def assert_close(
    actual: Tensor,
    reference: Tensor,
    absolute: Tensor,
    terms: int,
    *,
    name: str = "output",
    peer: Tensor | None = None,
    middle: Tensor | None = None,
) -> None:
    """`actual` against the float64 `reference`; `absolute` is S, `middle` u_mid * S_mid where a stored intermediate is narrow.

    `peer`: torch's own result at the same dtype. Where the peer is itself outside the limit, it is no measure and ignored.
    """
    dtype = actual.dtype
    assert actual.shape == reference.shape, f"{name}: shape {tuple(actual.shape)}, wanted {tuple(reference.shape)}"
    if actual.numel() == 0:
        return
    limit = (terms + 2) * accumulation_unit(dtype) * absolute + UNIT[dtype] * reference.abs() + 2 * TINY[dtype]
    if middle is not None:
        limit = limit + middle
    finite = reference.isfinite() & (reference.abs() <= torch.finfo(dtype).max)
    wide = actual.double()
    assert torch.equal(wide.isnan(), reference.isnan()), f"{name}: NaN in other places than the reference"
    error = torch.where(finite, (wide - reference).abs(), 0)
    excess = error - limit
    worst = int(excess.argmax())
    where = tuple(int(i) for i in torch.unravel_index(torch.tensor(worst), actual.shape))
    assert excess.flatten()[worst] <= 0, (
        f"{name}{list(where)}: {wide.flatten()[worst]} but float64 says {reference.flatten()[worst]}; "
        f"error {error.flatten()[worst]:.3g}, limit {limit.flatten()[worst]:.3g} ({dtype}, {terms} terms)"
    )
    # At float64 the peer is the reference; and the largest of a few errors is luck, no measure of either side.
    if peer is None or dtype == torch.float64 or actual.numel() < 32:
        return
    peer_error = torch.where(finite, (peer.double() - reference).abs(), 0)
    if not peer_error.isfinite().all() or (peer_error > limit).any():
        return
    ulp = 2 * UNIT[dtype] * reference[finite].abs().max() if finite.any() else 0
    assert error.max() <= 2 * peer_error.max() + ulp, (
        f"{name}: largest error {error.max():.3g}, torch's own {peer_error.max():.3g}"
    )
