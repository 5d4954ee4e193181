"""Verdict on a case: right, refused, wrong, error or changed."""

import random
import re
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from curvlab.errors import CurvlabError
from curvlab.likelihoods import get_likelihood
from curvlab.matrices import Composite, CurvatureMatrix

from . import factors, oracle
from .cases import MOST_PARAMETERS, Case
from .source import source

FAILURES = ("wrong", "error", "changed")
#: Relative to the largest output: the smallest change by other samples of the batch that is not rounding.
_MIXED = {"float64": 1e-6, "float32": 1e-2, "bfloat16": 0.25, "float16": 0.05}
_TOLERANCE = {"float64": 1e-9, "float32": 2e-3, "bfloat16": 0.2, "float16": 0.1}


@dataclass(frozen=True)
class Verdict:
    """Outcome of a case, with the reason in one line and a traceback, if any."""

    outcome: str
    reason: str = ""
    details: str = ""

    @property
    def failed(self) -> bool:
        return self.outcome in FAILURES

    @property
    def signature(self) -> tuple[str, str]:
        """Key that is the same for failures of the same kind."""
        error = self.outcome == "error"
        return self.outcome, re.sub(r"\d+", "#", self.reason) if error else self.reason.partition(":")[0]


class UnfitCaseError(Exception):
    """The case is not valid: torch itself cannot build or run it, or it is too large."""


class WrongNumberError(Exception):
    """A number is wrong."""


def judge(case: Case) -> Verdict:
    """Run a case and return its verdict; ``not run`` if torch itself cannot run it."""
    try:
        with _restore_torch():
            return _judge(case)
    except UnfitCaseError as error:
        return Verdict("not run", str(error))


@contextmanager
def _restore_torch() -> Iterator[None]:
    always = torch.is_warn_always_enabled()
    torch.set_warn_always(True)
    try:
        with warnings.catch_warnings(record=True):
            yield
    finally:
        torch.set_warn_always(always)
        torch.set_default_dtype(torch.float32)


def _judge(case: Case) -> Verdict:
    code: dict[str, Any] = {"__name__": "case"}
    exec(compile(source(case), f"<case {case.seed}>", "exec"), code)
    with warnings.catch_warnings(record=True) as torch_warnings:
        warnings.simplefilter("always")
        try:
            model, own = code["make"](), code["make"]()
            size = sum(p.numel() for p in own.parameters() if p.requires_grad)
            if not 0 < size <= MOST_PARAMETERS / (4 if case.quantity == "hessian" else 1):
                raise UnfitCaseError(f"{size} parameters")
            right = None
            if not case.refusal:
                right = Truth(case, code, own)
            else:
                _check_refusal(case, own, code["samples"]()[0])
        except UnfitCaseError:
            raise
        except Exception as error:
            raise UnfitCaseError(_line(error)) from error
    data = code["data"]()
    before = _state(model)
    with warnings.catch_warnings(record=True) as leaked_warnings:
        warnings.simplefilter("always")
        filters = list(warnings.filters)
        answer = error = None
        try:
            answer = code["ask"](model, data)
            if case.refusal and isinstance(answer, CurvatureMatrix):
                answer.to_dense()  # an implicit matrix computes nothing before its first product
        except CurvlabError as refused:
            error = refused
        except Exception as unexpected:
            return Verdict("error", _line(unexpected), traceback.format_exc())
        if right is not None and answer is not None:
            try:
                right.check(answer)
            except UnfitCaseError:
                raise
            except WrongNumberError as wrong:
                return Verdict("wrong", str(wrong))
            except Exception as unexpected:
                return Verdict("error", f"a method of the matrix: {_line(unexpected)}", traceback.format_exc())
        if warnings.filters != filters:
            return Verdict("changed", "warnings.filters")
    if case.refusal and error is None:
        return Verdict("wrong", f"a number although {case.refusal}")
    if changed := _difference(before, _state(model)):
        return Verdict("changed", changed)
    if not _copies(model) and _copies(code["make"]()):
        return Verdict("changed", "deep copies fail")
    expected = {str(w.message) for w in torch_warnings}
    if more := [w for w in leaked_warnings if str(w.message) not in expected and not _is_from_curvlab(w)]:
        return Verdict("error", f"a warning of torch or a library: {_first_line(str(more[0].message))}")
    if error is not None:
        if "\n" in str(error):
            return Verdict("error", f"a refusal of several lines: {_first_line(str(error))}")
        return Verdict("refused" if right is not None else "right", str(error))
    if case.damping and isinstance(answer, CurvatureMatrix) and case.dtype == "float64":
        return _solve(case, answer)
    return Verdict("right")


def _check_refusal(case: Case, model: nn.Module, x: Tensor) -> None:
    """Run the model; raise ``UnfitCaseError`` if it mixes samples, but the outputs do not show it."""
    together = model(x.clone())
    if "mixes" in str(case.refusal) and len(together) == len(x):
        alone = torch.cat([model(x[n : n + 1].clone()) for n in range(len(x))])
        if float((together - alone).detach().abs().max()) <= _MIXED[case.dtype] * float(together.detach().abs().max()):
            raise UnfitCaseError("the outputs do not show that samples mix")


def _is_from_curvlab(warning: warnings.WarningMessage) -> bool:
    return "curvlab" in str(warning.category.__module__)


def _line(error: BaseException) -> str:
    return f"{type(error).__name__}: {_first_line(str(error))}"


def _first_line(text: str) -> str:
    return text.strip().partition("\n")[0][:160]


# Expected results ----------------------------------------------------------------------------------------------------


class Truth:
    """Expected result of a case.

    Args:
        case: The case.
        code: Namespace of the case's code.
        model: A model that is used only here.
    """

    def __init__(self, case: Case, code: Mapping[str, Any], model: nn.Module) -> None:
        self.case, self.model = case, model
        self.tolerance = _TOLERANCE["bfloat16" if "autocast" in case.around else case.dtype]
        batches = code["data"]()
        if isinstance(batches, tuple):
            x, y = batches
        else:
            batches = list(batches)
            x, y = (torch.cat([batch[i] for batch in batches]) for i in (0, 1))
        self.x, self.y = x[: len(x) // case.repeats], y[: len(y) // case.repeats]
        self.names = {name: p.numel() for name, p in model.named_parameters() if p.requires_grad}
        self.slices, start = {}, 0
        for name, size in self.names.items():
            self.slices[name] = slice(start, start + size)
            start += size
        self.drawn = None
        if case.quantity.startswith("fisher:"):
            options = dict(option.split("=") for option in case.quantity.partition(":")[2].split(","))
            outputs = torch.cat([model(x[n : n + 1].clone()) for n in range(len(x))]).detach()
            stream = np.random.default_rng(int(options["seed"]))
            self.drawn = get_likelihood(case.loss).sample(outputs, int(options["samples"]), stream)
        self.matrix = oracle.curvature(model, case.quantity, case.loss, self.x, self.y, self.drawn)
        if self.matrix is None or not bool(self.matrix.isfinite().all()):
            raise UnfitCaseError("no second derivative")
        self._check_batches()
        self.scale = float(self.matrix.abs().max())

    def _check_batches(self) -> None:
        """Check that torch gives the same gradients for a batch as for its samples.

        Raises:
            UnfitCaseError: The gradients differ, although the outputs are the same.
        """
        if self.case.dtype != "float64" or "autocast" in self.case.around:
            return
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        together = self.model(self.x.clone())
        alone = [self.model(self.x[n : n + 1].clone()) for n in range(len(self.x))]
        if not torch.allclose(together, torch.cat(alone), rtol=1e-9, atol=1e-12):
            return
        along = torch.randn(together.shape, generator=torch.Generator().manual_seed(0)).double()
        batch = oracle.gradient((together * along).sum(), parameters)
        single = sum(oracle.gradient((f * v).sum(), parameters) for f, v in zip(alone, along, strict=True))
        if not torch.allclose(batch, single, rtol=1e-6, atol=1e-6 * float(single.abs().max())):
            raise UnfitCaseError("torch's gradients of a batch are not those of its samples")

    def check(self, answer: Any) -> None:
        """Compare an answer with the expected result.

        Raises:
            WrongNumberError: They differ.
        """
        if self.case.structure == "diagonality":
            self._check_table(answer)
            return
        pattern = self.case.params or "*"
        names = [name for name in self.names if fnmatchcase(name, pattern)]
        if list(answer.space.names) != names:
            raise WrongNumberError(f"parameters: {answer.space.names} for {names}")
        for part in answer.parts if isinstance(answer, Composite) else [answer]:
            kind = type(part).kind
            {
                "dense": self._check_dense,
                "diagonal": self._check_diagonal,
                "diag": self._check_diagonal,
                "block_diag": self._check_blocks,
                "implicit": self._check_products,
            }.get(kind, self._check_factors)(part)

    def _index(self, names: Any) -> Tensor:
        return torch.cat([torch.arange(self.slices[n].start, self.slices[n].stop) for n in names])

    @cached_property
    def _rounded(self) -> Tensor:
        """The matrix at weights with added rounding errors, whose effect no computation can avoid."""
        generator = torch.Generator().manual_seed(0)
        kept = [p.detach().clone() for p in self.model.parameters()]
        with torch.no_grad():
            for p in self.model.parameters():
                noise = torch.randn(p.shape, dtype=torch.float64, generator=generator)
                p += (torch.finfo(p.dtype).eps * p.double() * noise).to(p.dtype)
        try:
            found = oracle.curvature(self.model, self.case.quantity, self.case.loss, self.x, self.y, self.drawn)
        finally:
            with torch.no_grad():
                for p, before in zip(self.model.parameters(), kept, strict=True):
                    p.copy_(before)
        return self.matrix if found is None else found

    def _compare_part(self, what: str, actual: Tensor, part: Callable[[Tensor], Tensor]) -> None:
        """Compare with a part of the matrix; the effect of rounding errors of the weights is allowed."""
        expected = part(self.matrix)
        try:
            self._compare(what, actual, expected)
        except WrongNumberError:
            noise = float((part(self._rounded) - expected).abs().max())
            if actual.shape != expected.shape or not float((actual.double() - expected).abs().max()) <= 100 * noise:
                raise

    def _compare(self, what: str, actual: Tensor, expected: Tensor) -> None:
        if actual.shape != expected.shape:
            raise WrongNumberError(f"{what}: the shape is {tuple(actual.shape)} for {tuple(expected.shape)}")
        # If gradients cancel, their rounding errors remain: in half precision some thousandths of the largest
        # curvature; in float32 some millionths, or more after a normalisation. For second derivatives they are larger,
        # for example for x / |x| of a single number, whose second derivative is 0 in exact arithmetic.
        if self.tolerance >= 0.01:
            least = 2e-3
        elif self.case.quantity == "hessian":
            least = 1e-2
        else:
            least = 1e-6 if self.case.dtype == "float64" else 1e-3
        scale = max(float(expected.abs().max()), least * self.scale, 1e-30)
        error = float((actual.double() - expected).abs().max()) / scale
        if not error <= self.tolerance:
            raise WrongNumberError(f"{what}: off by {error:.2g} of the largest entry")

    def _check_dense(self, part: CurvatureMatrix) -> None:
        index = self._index(part.space.names)
        self._compare_part("dense", part.to_dense(), lambda m: m[index][:, index])
        self._check_blocks(part)

    def _check_blocks(self, part: CurvatureMatrix) -> None:
        matrix = part.to_dense()
        for name, where in part.space.slices.items():
            mine = self.slices[name]
            what = f"{part.kind} of {self._kind(name)}"
            self._compare_part(what, matrix[where, where], lambda m, mine=mine: m[mine, mine])

    def _check_diagonal(self, part: CurvatureMatrix) -> None:
        diagonal = part.diagonal()
        for name, where in part.space.slices.items():
            mine = self.slices[name]
            self._compare_part(f"diag of {self._kind(name)}", diagonal[where], lambda m, mine=mine: m.diagonal()[mine])

    def _check_products(self, part: CurvatureMatrix) -> None:
        index = self._index(part.space.names)
        vectors = torch.randn(len(index), 3, generator=torch.Generator().manual_seed(0)).double()
        products = part @ vectors.to(part.dtype)
        for name, where in part.space.slices.items():
            what = f"products, of {self._kind(name)}"
            self._compare_part(what, products[where], lambda m, where=where: (m[index][:, index] @ vectors)[where])

    def _check_table(self, table: Any) -> None:
        for row in table.to_dict("records"):
            part = self.slices[row["parameter"]]
            block = self.matrix[part, part]
            diagonal = block.diagonal()
            for column, right in (
                ("diag_sum", diagonal.sum()),
                ("offdiag_abs_sum", block.abs().sum() - diagonal.abs().sum()),
                ("offdiag_signed_sum", block.sum() - diagonal.sum()),
                ("frobenius", block.norm()),
            ):
                gap = abs(row[column] - float(right))
                if not gap <= 10 * self.tolerance * max(float(block.abs().sum()), 1e-6 * self.scale, 1e-30):
                    raise WrongNumberError(
                        f"diagonality, {column} of {self._kind(row['parameter'])}: {row[column]} for {right}"
                    )

    def _check_factors(self, part: CurvatureMatrix) -> None:
        kind, _, options = self.case.structure.partition(":")
        chosen = dict(option.split("=") for option in options.split(",") if option)
        sharing, variant = chosen.get("sharing", "expand"), chosen.get("variant", "gao")
        asked = self.model, part.space.names, self.case.quantity, self.case.loss, self.x, self.y, self.drawn
        try:
            with warnings.catch_warnings(record=True):  # not from curvlab
                samples_by_layer = factors.samples(*asked)
        except Exception as error:  # from torch, because zeros are added to outputs
            raise UnfitCaseError(_line(error)) from error
        tensors = part.tensors()
        modules = dict(self.model.named_modules())
        for layer in dict.fromkeys(name.rpartition("|")[0] for name in tensors):
            if type(modules.get(layer)) not in factors.OPERATIONS:
                continue  # embeddings, groups, transposed convolutions, attention: the oracle has no factors of them
            owner = self._kind(f"{layer}.weight")
            if layer not in samples_by_layer:
                raise WrongNumberError(f"factors of {owner}, which has none")
            if kind == "ekfac":
                a, s = factors.factors(samples_by_layer[layer], "kfac", sharing)
                basis_a, basis_s = tensors[f"{layer}|U_A"], tensors[f"{layer}|U_S"]
                for factor, basis in ((a, basis_a), (s, basis_s)):
                    if factor.abs().max() > 1e-12 * self.scale:
                        rotated = basis.mT @ factor @ basis
                        self._compare(
                            f"basis of {owner}", rotated / factor.norm(), rotated.diagonal().diag() / factor.norm()
                        )
                values = factors.moments(samples_by_layer[layer], basis_a, basis_s)
                self._compare(f"ekfac of {owner}", tensors[f"{layer}|values"], values)
            else:
                a, s = factors.factors(samples_by_layer[layer], kind, sharing, variant)
                theirs = torch.kron(tensors[f"{layer}|S"][0].contiguous(), tensors[f"{layer}|A"][0].contiguous())
                self._compare(f"{kind} of {owner}", theirs, torch.kron(s.contiguous(), a.contiguous()))

    def _kind(self, name: str) -> str:
        """Return the class of the module that has a parameter, and the parameter's name in the module."""
        owner, _, key = name.rpartition(".")
        try:
            return f"{type(self.model.get_submodule(owner)).__name__} {key}"
        except AttributeError:
            return name


def _solve(case: Case, matrix: CurvatureMatrix) -> Verdict:
    size = matrix.space.total
    damping = eval(case.damping, {"torch": torch, "size": size})
    b = torch.randn(size, generator=torch.Generator().manual_seed(0)).double()
    try:
        answer = matrix.solve(b, damping=damping)
    except CurvlabError as error:
        return Verdict("right", str(error)) if "\n" not in str(error) else Verdict("error", "solve: several lines")
    except Exception as unexpected:
        return Verdict("error", f"solve({case.damping}): {_line(unexpected)}", traceback.format_exc())
    damping = torch.as_tensor(damping, dtype=torch.float64).expand(size)
    if bool(damping.isnan().any()):
        return Verdict("wrong", f"solve({case.damping}) of {matrix.kind}: a number")
    damped = matrix.to_dense() + damping.diag()
    right = torch.linalg.solve(damped, b)
    error = float((answer - right).abs().max() / right.abs().max())
    # The remaining residual of the iteration, 2e-12, is amplified at most by the condition number.
    if not error <= max(1e-9, 1e-11 * float(torch.linalg.cond(damped))):
        return Verdict("wrong", f"solve({case.damping}) of {matrix.kind}: off by {error:.2g}")
    return Verdict("right")


# State that must not change ------------------------------------------------------------------------------------------


def _state(model: nn.Module) -> dict[str, Any]:
    """Return the state that no call may change, in a form that can be compared."""
    state: dict[str, Any] = {
        "torch's random state": torch.get_rng_state().numpy().tobytes(),
        "NumPy's random state": _numpy_state(),
        "Python's random state": random.getstate(),
        "the default dtype": torch.get_default_dtype(),
        "torch's settings": (torch.is_grad_enabled(), torch.backends.mkldnn.enabled, torch.is_inference_mode_enabled()),
    }
    for name, module in model.named_modules():
        state[f"the modules: {name}"] = (id(module), type(module), module.training)
        hooks = [v for k, v in vars(module).items() if "hooks" in k and isinstance(v, Mapping)]
        state["the hooks of " + name] = [[(k, id(h)) for k, h in held.items()] for held in hooks]
        state[f"the attributes of {name}"] = sorted(vars(module))
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        state[f"values: {name}"] = _bytes(tensor)
        state[f"the tensor itself, {name}"] = (id(tensor), tensor.requires_grad, tensor.dtype, tensor.stride())
        state[f"the gradient of {name}"] = None if tensor.grad is None else (id(tensor.grad), _bytes(tensor.grad))
    return state


def _copies(model: nn.Module) -> bool:
    try:
        deepcopy(model)
    except Exception:
        return False
    return True


def _numpy_state() -> tuple[Any, ...]:
    name, numbers, *rest = np.random.get_state()  # noqa: NPY002 - a user's code may use it
    return name, numbers.tobytes(), *rest


def _bytes(tensor: Tensor) -> tuple[Any, ...]:
    if isinstance(tensor, nn.parameter.UninitializedParameter):
        return ("uninitialised",)
    return (tuple(tensor.shape), tensor.detach().to_dense().contiguous().view(-1).view(torch.uint8).numpy().tobytes())


def _difference(before: dict[str, Any], after: dict[str, Any]) -> str | None:
    for key, value in before.items():
        if key not in after or after[key] != value:
            return key
    return next((key for key in after if key not in before), None)
