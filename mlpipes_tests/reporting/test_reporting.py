import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mlpipes.reporting import figures
from mlpipes.reporting.classification import classification_report, expected_calibration_error, wilson
from mlpipes.reporting.report import Table

PNG = b"\x89PNG"


def test_wilson_agrees_with_the_textbook() -> None:
    # Newcombe 1998, Statistics in Medicine 17:857, table I: 81 of 263.
    found = wilson(81, 263)
    assert (round(found.low, 4), round(found.high, 4)) == (0.2553, 0.3662)
    assert (wilson(10, 10).high, wilson(0, 10).low) == (1.0, 0.0)


def test_calibration_error_by_hand() -> None:
    confidence, correct = np.array([0.95, 0.95, 0.55, 0.55]), np.array([True, True, True, False])
    # Two bins of two: |1.0 - 0.95| and |0.5 - 0.55|, equally weighted.
    assert expected_calibration_error(confidence, correct, bins=10) == pytest.approx(0.05)


def test_a_report_counts_what_is_there() -> None:
    labels = np.array([0, 0, 1, 1, 2, 2])
    logits = np.eye(3)[[0, 1, 1, 1, 2, 2]] * 5.0
    drawn = []
    report = classification_report(
        logits, labels, ["a", "b", "c"], lambda rows, text: (drawn.append((rows, text)), PNG)[1]
    )
    assert report.estimates["accuracy"].value == pytest.approx(5 / 6)
    assert report.estimates["accuracy"].n == 6
    assert report.estimates["macro_f1"].value == pytest.approx((2 / 3 + 4 / 5 + 1) / 3)
    assert report.estimates["macro_f1"].low <= report.estimates["macro_f1"].value <= report.estimates["macro_f1"].high
    assert list(report.tables[0].rows[0][1:]) == [1.0, 0.5, pytest.approx(2 / 3), 2]
    assert drawn[0][0].tolist() == [1]
    assert drawn[0][1][0].startswith("a → b 9")
    assert all(png.startswith(PNG) for png in report.figures.values())
    text = report.markdown("T", {"split": "test", "n": 6})
    assert "Measured on: split test, n 6." in text
    assert "![confusion](confusion.png)" in text


def test_a_perfect_model_has_no_picture_of_mistakes() -> None:
    report = classification_report(
        np.eye(3) * 9, np.arange(3), ["a", "b", "c"], lambda *_: pytest.fail("nothing to draw")
    )
    assert "mistakes" not in report.figures


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.text(max_size=20))
def test_any_text_stays_in_its_cell(text: str) -> None:
    lines = Table("t", ["c"], [[text.replace("\\", "")]]).markdown().split("\n")
    assert len([line for line in lines if line]) >= 3
    assert lines[2].replace("\\|", "").count("|") == 2


@pytest.mark.parametrize("names", [("$5", "$10"), ("$\\x$", "b"), ("$^", "$$"), ("a very long name " * 4, "b")])
def test_names_of_classes_are_never_read_as_formulas(names: tuple[str, str]) -> None:
    images = np.zeros((1, 3, 8, 8), dtype=np.uint8)
    assert figures.gallery(images, [" → ".join(names)], 255, "Most confident mistakes").startswith(PNG)
    assert figures.confusion_matrix(np.eye(2, dtype=np.int64), names).startswith(PNG)


def test_a_gallery_of_nothing_is_a_picture_too() -> None:
    assert figures.gallery(np.zeros((0, 1, 8, 8), dtype=np.uint8), [], 16, "Most confident mistakes").startswith(PNG)
