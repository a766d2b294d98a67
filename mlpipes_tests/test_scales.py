from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mlpipes.errors import ScaleError
from mlpipes.scales import RayScaleConfig, load_scale_file, scales_of
from mlpipes.settings import shown

shares = st.integers(1, 9999).map(lambda n: n / 10_000)


@st.composite
def scales(draw: st.DrawFn) -> RayScaleConfig:
    workers = draw(st.integers(1, 64))
    return RayScaleConfig(
        workers=workers,
        batch_size=workers * draw(st.integers(1, 512)),
        epochs=draw(st.integers(1, 1000)),
        gpus_per_worker=draw(st.one_of(st.just(0.0), shares, st.integers(1, 8).map(float))),
        cpus_per_worker=draw(st.one_of(shares, st.integers(1, 64).map(float))),
    )


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(scales())
def test_key_round_trips(scale: RayScaleConfig) -> None:
    assert RayScaleConfig.from_key(scale.key) == scale
    assert not set(scale.key) & set("|/,. \n") - {"."}
    assert "..." not in scale.key


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(scales(), scales())
def test_different_scales_have_different_keys(a: RayScaleConfig, b: RayScaleConfig) -> None:
    assert (a == b) == (a.key == b.key)


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.text(max_size=30))
def test_any_text_is_a_canonical_key_or_a_clear_error(text: str) -> None:
    try:
        assert RayScaleConfig.from_key(text).key == text
    except ScaleError as error:
        assert shown(text) in str(error)


@pytest.mark.parametrize(
    ("entry", "rule"),
    [
        ({"workers": 0, "batch_size": 4, "epochs": 1}, "workers: Input should be greater than or equal to 1"),
        ({"workers": 3, "batch_size": 64, "epochs": 1}, "batch_size 64 is not divisible by workers 3"),
        ({"workers": 1, "batch_size": 4, "epochs": 1, "gpu": 1}, "gpu: Extra inputs are not permitted"),
        ({"workers": 1, "batch_size": 4, "epochs": 1, "gpus_per_worker": 1.5}, "must be a whole number"),
        ({"workers": 1, "batch_size": 4, "epochs": 1, "cpus_per_worker": 0.33333}, "0.0001"),
        ({"workers": True, "batch_size": 4, "epochs": 1}, "workers"),
        ({"workers": 1, "epochs": 1}, "batch_size: Field required"),
        ("w2-b256-e3", "is not a scale key"),
        ("w2-b256-e3-g0.0", "is not canonical; write 'w2-b256-e3-g0'"),
        ("w2-b256-e3-g0-c1", "is not canonical"),
        ("w2-b255-e3-g0", "not divisible"),
        (["w2"], "expected a key"),
    ],
)
def test_a_bad_entry_is_named_with_its_rule(entry: object, rule: str) -> None:
    with pytest.raises(ScaleError, match="somewhere, entry 2") as caught:
        scales_of(["w1-b8-e1-g0", entry], "somewhere")  # type: ignore[list-item]
    assert rule in str(caught.value)


def test_duplicates_and_empty_lists_are_errors() -> None:
    with pytest.raises(ScaleError, match="entry 2: w1-b8-e1-g0 is declared twice"):
        scales_of(["w1-b8-e1-g0", {"workers": 1, "batch_size": 8, "epochs": 1}], "catalog")
    with pytest.raises(ScaleError, match="no scale is declared"):
        scales_of([], "catalog")


def test_a_scale_file_replaces_what_it_names(tmp_path: Path) -> None:
    path = tmp_path / "scales.yaml"
    path.write_text("digits:\n  - w2-b256-e3-g0\n  - {workers: 4, batch_size: 256, epochs: 3, cpus_per_worker: 0.5}\n")
    assert [s.key for s in load_scale_file(path, ["digits", "other"])["digits"]] == [
        "w2-b256-e3-g0",
        "w4-b256-e3-g0-c0.5",
    ]


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("digits: [w1-b8-e1-g0]\nnope: [w1-b8-e1-g0]", "unknown workload 'nope'; known are digits"),
        ("digits: w1-b8-e1-g0", "expected a list"),
        ("- digits", "expected a mapping"),
        ("digits: [w1-b8-e1-g0", "not valid YAML"),
        ("digits: [w1-b8-e1-g0]\ndigits: [w1-b8-e2-g0]", "'digits' occurs twice"),
        ("digits: [{workers: 1, workers: 2, batch_size: 2, epochs: 1}]", "'workers' occurs twice"),
        ("digits: [w0-b8-e1-g0]", "workload digits, entry 1"),
    ],
)
def test_a_bad_scale_file_is_named(tmp_path: Path, text: str, problem: str) -> None:
    path = tmp_path / "scales.yaml"
    path.write_text(text)
    with pytest.raises(ScaleError) as caught:
        load_scale_file(path, ["digits"])
    assert problem in str(caught.value)
    assert str(path) in str(caught.value)


def test_a_missing_scale_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ScaleError, match=r"nowhere\.yaml .*cannot be read"):
        load_scale_file(tmp_path / "nowhere.yaml", ["digits"])
