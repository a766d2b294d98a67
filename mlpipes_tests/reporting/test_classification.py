"""The report of a classifier: against scikit-learn, and with very many classes."""

import numpy as np
import pytest

from mlpipes.reporting.classification import _bootstrapped, classification_report
from mlpipes.reporting.report import Table


def test_matthews_and_macro_f1_agree_with_scikit_learn() -> None:
    from sklearn import metrics

    generator = np.random.default_rng(0)
    labels = generator.integers(0, 4, 500)
    predicted = np.where(generator.random(500) < 0.6, labels, generator.integers(0, 4, 500))
    found = _bootstrapped(labels, predicted, 4)
    assert found["macro_f1"].value == pytest.approx(metrics.f1_score(labels, predicted, average="macro"))
    assert found["matthews_correlation"].value == pytest.approx(metrics.matthews_corrcoef(labels, predicted))
    assert found["matthews_correlation"].low < found["matthews_correlation"].value < found["matthews_correlation"].high


def test_a_thousand_classes_are_reported() -> None:
    labels = np.arange(600)
    logits = np.eye(1000)[labels]
    logits[::3] = np.roll(logits[::3], 1, axis=1)
    names = [f"c{number}" for number in range(1000)]
    report = classification_report(logits, labels, names, lambda rows, _: Table("x", ["a"], [[row] for row in rows]))
    assert report.estimates["accuracy"].value == pytest.approx(2 / 3)
    assert 0.6 < report.estimates["matthews_correlation"].value < 0.7
    assert len(report.tables[0].rows) == 50
