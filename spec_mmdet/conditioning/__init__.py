"""Spectral conditioning: fixed corrections that make attention's Jacobian well conditioned.

The method of Saratchandran & Lucey, "Spectral Conditioning of Attention" (arXiv 2603.07162). Attention is given a
fixed correction C on each of its projections,

    SpecA(X) = softmax(X (W_Q + C_Q) (W_K + C_K)^T X^T) X (W_V + C_V),

because the condition number of its Jacobian is bounded by those of the projections, kappa(W) = sigma_max / sigma_min.
C is set once, gets no gradient and no weight decay; W goes on training. This package needs torch alone,
and scipy for :mod:`.jacobian`.

:func:`condition` puts the method on attention that exists already: W + C becomes the weight, and
:meth:`Corrections.keep_fixed` keeps C out of the optimiser's sight. SpecXCiT's attention holds W and a
:class:`Correction` apart, under the names that XCiT's checkpoints have, which :func:`fold` ends for inference.
:func:`measure` shows what it does.
"""

from .correction import (
    Correction,
    compute_sigma_max,
    condition_number,
    describe_conditioning,
    identity_correction,
    require_same_conditioning,
    svd_correction,
)
from .finding.projections import Projection, find_projections
from .fixed import Corrections
from .initialisation import conditioned_initialisation
from .spectra import Report, Spectrum, measure
from .surgery import condition, fold

__all__ = [
    'Correction',
    'Corrections',
    'Projection',
    'Report',
    'Spectrum',
    'compute_sigma_max',
    'condition',
    'condition_number',
    'conditioned_initialisation',
    'describe_conditioning',
    'find_projections',
    'fold',
    'identity_correction',
    'measure',
    'require_same_conditioning',
    'svd_correction',
]
