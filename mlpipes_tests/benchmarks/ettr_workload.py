"""The workload of the benchmark `ettr`: paragraphs of which all but few are trained on.

Time that goes into evaluations is not useful in that measure, and nothing that faults have to do with: with a tenth of the
paragraphs held out, it is an eighth of the time between two faults. In a module of its own, as workloads are: workers import
it, and have no use for definitions.
"""

import copy
from dataclasses import replace

from mlpipes.workloads import text_classification

docstrings = copy.copy(text_classification.docstrings)
docstrings.split = replace(docstrings.split, validation_fraction=0.01, test_fraction=0.01)
