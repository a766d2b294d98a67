"""The project's definitions for the benchmark `ettr`: of the paragraphs, all but few are trained on.

Time that goes into evaluations is not useful in that measure, and nothing that faults have to do with: with a tenth of the
paragraphs held out, it is an eighth of the time between two faults.
"""

import copy
from dataclasses import replace

from mlpipes.definitions import build_defs
from mlpipes.workloads import text_classification
from mlpipes.workloads.catalog import configured

docstrings = copy.copy(text_classification.docstrings)
docstrings.split = replace(docstrings.split, validation_fraction=0.01, test_fraction=0.01)
_OURS = {"docstrings": f"{__name__}:docstrings"}
defs = build_defs(catalog=[replace(e, implementation=_OURS.get(e.name, e.implementation)) for e in configured()])
"""The workload `docstrings` with short evaluations; all others as they are."""
