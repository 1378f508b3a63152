"""Diagnostics that explain the accuracies of merged models; docs/diagnostics.md has formulas and document format."""

from clmerge.evaluation.diagnostics.behaviour import Observer, barrier, disagreement, representation_bias
from clmerge.evaluation.diagnostics.diagnose import diagnose
from clmerge.evaluation.diagnostics.document import SCHEMA, document
from clmerge.evaluation.diagnostics.layers import diagnose_layers
from clmerge.evaluation.diagnostics.models import diagnose_models
from clmerge.evaluation.diagnostics.pairs import PairSums, pair_sums
from clmerge.evaluation.diagnostics.sharpness import average_sharpness
from clmerge.evaluation.diagnostics.spectra import effective_rank, spectrum, subspace_overlap
from clmerge.evaluation.diagnostics.tangent import tangent_localisation
from clmerge.evaluation.diagnostics.vectors import diagnose_vectors

__all__ = [
    "SCHEMA",
    "Observer",
    "PairSums",
    "average_sharpness",
    "barrier",
    "diagnose",
    "diagnose_layers",
    "diagnose_models",
    "diagnose_vectors",
    "disagreement",
    "document",
    "effective_rank",
    "pair_sums",
    "representation_bias",
    "spectrum",
    "subspace_overlap",
    "tangent_localisation",
]
