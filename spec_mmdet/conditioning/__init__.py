"""Spectral conditioning: fixed corrections that make attention's Jacobian well conditioned.

The method of Saratchandran & Lucey, "Spectral Conditioning of Attention" (arXiv 2603.07162) adds a fixed correction C
to each projection of attention,

    SpecA(X) = softmax(X (W_Q + C_Q) (W_K + C_K)^T X^T) X (W_V + C_V),

because the condition number of its Jacobian is bounded by those of the projections, kappa(W) = sigma_max / sigma_min.
C is set once and gets no gradient and no weight decay; W is trained. This package needs only torch, and scipy for
:mod:`.jacobian`.

:func:`condition` applies the method to existing models: their weights become W + C, and :meth:`Corrections.keep_fixed`
protects C from the optimiser. SpecXCiT's attention stores W and a :class:`Correction` separately, under the names of
XCiT's checkpoints; :func:`fold` merges them for inference. :func:`measure` measures condition numbers.
"""

from .correction import (
    Correction,
    compute_condition_number,
    compute_identity_correction,
    compute_sigma_max,
    compute_svd_correction,
    describe_conditioning,
    require_same_conditioning,
)
from .finding.projections import Projection, find_projections
from .fixed import Corrections
from .initialisation import initialise_conditioned
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
    'compute_condition_number',
    'initialise_conditioned',
    'describe_conditioning',
    'find_projections',
    'fold',
    'compute_identity_correction',
    'measure',
    'require_same_conditioning',
    'compute_svd_correction',
]
