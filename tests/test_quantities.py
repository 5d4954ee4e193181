"""The quantities and their string forms."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from curvlab.errors import CurvlabError
from curvlab.quantities import GGN, EmpiricalFisher, Fisher, Hessian, MaSQ, Quantity, parse_quantity

QUANTITY = st.one_of(
    st.sampled_from([EmpiricalFisher(), GGN(), Hessian()]),
    st.builds(Fisher, samples=st.none() | st.integers(1, 99), seed=st.integers(0, 99)),
    st.builds(MaSQ, batch_size=st.integers(1, 2000), norm=st.sampled_from(["sumsq", "mean", "scaled"])),
)


@settings(max_examples=50, deadline=None)
@given(QUANTITY)
def test_string_form_round_trip(quantity: Quantity) -> None:
    assert parse_quantity(str(quantity)) == quantity
    assert parse_quantity(quantity) is quantity


@pytest.mark.parametrize(
    ("text", "quantity"),
    [
        ("fisher", Fisher()),
        ("fisher:samples=4,seed=2", Fisher(samples=4, seed=2)),
        ("masq", MaSQ(1000, "sumsq")),
        ("masq:batch_size=10,norm=mean", MaSQ(10, "mean")),
    ],
)
def test_string_forms(text: str, quantity: Quantity) -> None:
    assert parse_quantity(text) == quantity


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("fischer", "no quantity 'fischer'.*did you mean 'fisher'"),
        ("", "no quantity ''.*fisher, empirical_fisher, masq, ggn, hessian"),
        ("fisher:sample=4", "fisher does not take 'sample=4'.*samples, seed"),
        ("fisher:samples", "fisher does not take 'samples'.*key=value"),
        ("ggn:samples=4", "ggn does not take 'samples=4'.*none"),
        ("fisher:samples=many", "fisher:samples takes a whole number, not 'many'"),
        ("fisher:samples=0", "samples >= 1.*not 0"),
        ("masq:batch_size=0", "batch_size >= 1, not 0"),
        ("masq:norm=max", "sumsq, mean or scaled, not 'max'"),
    ],
)
def test_bad_forms_are_refused(text: str, told: str) -> None:
    with pytest.raises(CurvlabError, match=told):
        parse_quantity(text)
