"""Spectral conditioning: fixed corrections that make attention's Jacobian well conditioned.

The method of Saratchandran & Lucey, "Spectral Conditioning of Attention" (arXiv 2603.07162). Attention is given a
fixed correction C on each of its projections,

    SpecA(X) = softmax(X (W_Q + C_Q) (W_K + C_K)^T X^T) X (W_V + C_V),

because the condition number of its Jacobian is bounded by those of the projections, kappa(W) = sigma_max / sigma_min.
C is set once, gets no gradient and no weight decay; W goes on training. This package needs torch alone,
and scipy for :mod:`.jacobian`.

:func:`condition` puts the method on attention that exists already, :func:`fold` takes it off again for inference, and
:func:`measure` shows what it does. SpecXCiT's attention holds the same :class:`Correction` itself, under the name
``correction``, so that its weights keep the names that XCiT's checkpoints have.
"""

from .correction import (
    Correction,
    condition_number,
    describe_conditioning,
    identity_correction,
    require_same_conditioning,
    svd_correction,
)
from .projections import Projection, projections
from .spectra import Report, Spectrum, measure
from .surgery import condition, fold

__all__ = [
    'Correction',
    'Projection',
    'Report',
    'Spectrum',
    'condition',
    'condition_number',
    'describe_conditioning',
    'fold',
    'identity_correction',
    'measure',
    'projections',
    'require_same_conditioning',
    'svd_correction',
]
