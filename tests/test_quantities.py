"""The quantities and their string forms."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from curvlab.errors import CurvlabError
from curvlab.quantities import GGN, EmpiricalFisher, Fisher, Hessian, MaSQ, Quantity, parse_quantity
from curvlab.structures import KFACStructure, TKFACStructure, parse_structure

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
        ("fisher:sample=4", "fisher has no option 'sample=4'.*samples, seed"),
        ("fisher:samples", "fisher has no option 'samples'.*key=value"),
        ("ggn:samples=4", "ggn has no option 'samples=4'.*none"),
        ("fisher:samples=many", "option samples of fisher must be a whole number, not 'many'"),
        ("fisher:samples=0", "samples of fisher must be a whole number from 1, not 0"),
        ("masq:batch_size=0", "batch_size of masq must be a whole number from 1, not 0"),
        ("fisher:seed=-1", "seed of fisher must be a whole number from 0, not -1"),
        ("fisher:samples=4,samples=5", "the option samples twice"),
        (None, "a name, such as 'fisher', not None"),
        (4, "a name, such as 'fisher', not 4"),
        ("masq:norm=max", "sumsq, mean or scaled, not 'max'"),
    ],
)
def test_bad_forms_are_refused(text: str, told: str) -> None:
    with pytest.raises(CurvlabError, match=told):
        parse_quantity(text)


@pytest.mark.parametrize("number", [1.5, True, "4", float("nan"), 0, [4]])
def test_numbers_that_are_not_whole_are_refused(number: object) -> None:
    for make in (lambda: Fisher(samples=number), lambda: MaSQ(batch_size=number)):
        with pytest.raises(CurvlabError, match="must be a whole number from 1"):
            make()


def test_numpy_numbers_are_whole_numbers() -> None:
    quantity = Fisher(samples=np.int64(4), seed=np.uint8(2))
    assert (type(quantity.samples), type(quantity.seed), str(quantity)) == (int, int, "fisher:samples=4,seed=2")


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (None, "a structure is a name, such as 'dense', not None"),
        (3, "a structure is a name"),
        (Fisher(), "a structure is a name"),
        ("kfac:sharing=both", "sharing of kfac must be expand or reduce, not 'both'"),
        ("kfac:rest=diag,rest=block_diag", "the option rest twice"),
        ("tkfac:variant=", "variant of tkfac must be gao or rescaled, not ''"),
        ("kfac:rest=None", "rest of kfac must be diag, block_diag or none, not 'None'"),
        ("kfac:sharing=none", "sharing of kfac must be expand or reduce, not 'none'"),
        ("diag:rest=diag", "diag has no option 'rest=diag'"),
    ],
)
def test_bad_structures_are_refused(text: object, told: str) -> None:
    with pytest.raises(CurvlabError, match=told):
        parse_structure(text)


def test_none_is_the_string_form_of_a_missing_option() -> None:
    for structure in (KFACStructure(rest=None), TKFACStructure("reduce", rest=None), KFACStructure(rest="block_diag")):
        assert parse_structure(str(structure)) == structure
    assert str(KFACStructure(rest=None)) == "kfac:rest=none"
    assert parse_structure("kfac:rest=diag") == parse_structure("kfac") == KFACStructure()
    assert str(parse_structure("ekfac:rest=diag")) == "ekfac"
    assert parse_quantity("fisher:samples=none") == Fisher()
