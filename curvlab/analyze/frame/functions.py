"""Networks and data from functions of the user, named ``module:function`` in the options ``model`` and ``data``."""

import hashlib
import inspect
import random
import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from curvlab.batches import tensors_of
from curvlab.checks import describe_value
from curvlab.commandline.options import NO_DATA
from curvlab.data import Dataset
from curvlab.data.arrays import KEYS, from_arrays
from curvlab.errors import CurvlabError
from curvlab.grid.code import fingerprints
from curvlab.grid.functions import find_file, find_function, find_place, names_function, to_sentence
from curvlab.interface import describe
from curvlab.problem import Problem
from curvlab.randomness import preserve_random_state

SPLIT = f"a dict with {', '.join(KEYS[:-1])} and {KEYS[-1]}"


@dataclass(frozen=True, eq=False)
class OwnProblem:
    """Data of a function of the user, in any form that ``Problem`` takes, without a split into training and test.

    Attributes:
        name: Name of the function that returns the data.
        template: A problem on the data. It has the network of the first seed, with its initial weights.
    """

    name: str
    template: Problem

    @property
    def sample_shape(self) -> tuple[int, ...]:
        """Shape of one input; empty if it is not one tensor."""
        inputs, _ = self.template.probe()[0]
        return tuple(inputs.shape[1:]) if isinstance(inputs, Tensor) else ()

    @property
    def num_outputs(self) -> int:
        """Number of outputs of the network per sample."""
        with torch.no_grad():
            return self.template.forward({}, self.template.probe()[0][0][:1]).shape[1]

    def fingerprint(self) -> str:
        """Return the SHA-256 (hex) of all samples."""
        digest = hashlib.sha256()
        for inputs, targets in self.template.batches():
            _add(digest, [*tensors_of(inputs), targets])
        return digest.hexdigest()

    def first_fingerprint(self) -> str:
        """Return the SHA-256 (hex) of the first batch."""
        digest = hashlib.sha256()
        for inputs, targets in self.template.batches():
            _add(digest, [*tensors_of(inputs), targets])
            break
        return digest.hexdigest()

    def check_targets(self) -> None:
        """Check that the first targets fit the loss, which for data of a function is cross-entropy.

        Raises:
            CurvlabError: They do not.
        """
        inputs, targets = self.template.probe()[0]
        try:
            with torch.no_grad():
                outputs = self.template.forward({}, inputs[:1])
        except Exception:  # the check of the problem reports it better
            return
        try:
            self.template.loss.check(outputs, targets)
        except CurvlabError as error:
            raise CurvlabError(
                f"{self.name}: {error} (for a loss other than cross_entropy, return a curvlab.Problem with this loss "
                "from the function of --model, and leave out --data)"
            ) from error

    def make_problem(self, model: nn.Module, samples: int | None) -> Problem:
        """Return the problem of a network on the first ``samples`` samples, or on all of them.

        Raises:
            CurvlabError: There are fewer samples.
        """
        problem = self.template.with_model(model)
        if samples is None:
            return problem
        pairs, left = [], samples
        for inputs, targets in problem.batches():
            pairs.append((inputs[:left], targets[:left]))
            left -= len(pairs[-1][0])
            if not left:
                return problem.with_data(pairs)
        raise CurvlabError(
            f"samples is {samples:,}, but the data of {self.name} have only {samples - left:,}; choose fewer, or none "
            "for all"
        )


def _add(digest: Any, tensors: Iterable[Tensor]) -> None:
    for tensor in tensors:
        plain = tensor.detach().cpu().contiguous()
        digest.update(f"{plain.dtype} {tuple(plain.shape)}".encode())
        digest.update(plain.reshape(-1).view(torch.uint8).numpy().data)


# Calls ----------------------------------------------------------------------------------------------------------------


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Start the global random states from a seed and restore them on exit; what is printed goes to standard error."""
    with preserve_random_state(), redirect_stdout(sys.stderr):
        random.seed(seed)
        np.random.seed(seed % 2**32)  # noqa: NPY002
        torch.manual_seed(seed)
        yield


def _call(name: str, what: str, seed: int) -> Any:
    """Return what a function without arguments returns.

    Args:
        name: ``module:function``.
        what: What it should return, for error messages.
        seed: Seed of the global random states during the call.

    Raises:
        CurvlabError: There is no such function, it needs arguments, or it raises an error.
    """
    with seeded(0):  # importing runs the module, which may draw random numbers
        function = find_function(name)
    module, _, attribute = name.partition(":")
    if isinstance(function, nn.Module) or not callable(function):
        raise CurvlabError(
            f"{name} is {_describe(function)}, not a function: write one in {module} that returns {what}, such as "
            f"def make(): return {attribute}"
        )
    try:
        needed = [
            one.name
            for one in inspect.signature(function).parameters.values()
            if one.default is one.empty and one.kind not in (one.VAR_POSITIONAL, one.VAR_KEYWORD)
        ]
    except (TypeError, ValueError):  # of a function in C
        needed = []
    if needed:
        raise CurvlabError(
            f"{name} needs the arguments {', '.join(needed)}, but is called without arguments: give them default "
            "values, or write another function that calls it with these values"
        )
    try:
        with seeded(seed):
            return function()
    except (Exception, SystemExit) as error:  # it is the user's code, which may raise anything
        raise CurvlabError(f"{name} raises {to_sentence(error)}{find_place(error)}") from error


def make_network(name: str, seed: int) -> tuple[nn.Module, Problem | None]:
    """Return the network of a function of the user, and the problem if the function returns one.

    Args:
        name: ``module:function``; it is called without arguments and returns a module or a ``Problem``.
        seed: Seed of the global random states during the call.

    Raises:
        CurvlabError: There is no such function, it fails, or it returns something else.
    """
    made = _call(name, "the network", seed)
    if isinstance(made, Problem):
        return made.model, made
    if isinstance(made, nn.Module):
        return made, None
    if made is None:
        hint = "None: it must end with return and the network"
    elif isinstance(made, type):
        hint = f"the class {made.__name__}, not a network: return {made.__name__}()"
    elif isinstance(made, Mapping) and made and all(isinstance(value, Tensor) for value in made.values()):
        hint = "a state dict: build the network, call its load_state_dict, and return the network"
    elif isinstance(made, (tuple, list)) and any(isinstance(one, nn.Module) for one in made):
        hint = f"{_describe(made)}: return the network alone, and the data from another function, for --data"
    else:
        hint = f"{_describe(made)}, not a torch.nn.Module or a curvlab.Problem: return the network"
    raise CurvlabError(f"{name} returns {hint}")


def make_data(name: str) -> Any:
    """Return the data of a function of the user: a ``Dataset`` if they have a split, otherwise as they are.

    Raises:
        CurvlabError: There is no such function, it fails, or it returns what cannot be data.
    """
    made = _call(name, "the data", 0)
    if isinstance(made, Dataset):
        return replace(made, name=name)
    if isinstance(made, Mapping) and "x_train" in made:
        arrays = _take_split(name, made)
        try:
            return from_arrays(name, arrays)
        except CurvlabError as error:
            raise CurvlabError(f"{name}: {error}") from error
    forms = f"a pair of tensors, a DataLoader, a data set, a list of batches, or {SPLIT}"
    if made is None:
        hint = f"None: return {forms}"
    elif isinstance(made, Problem):
        hint = "a curvlab.Problem, which contains a network: name this function in --model, and leave out --data"
    elif isinstance(made, (type, nn.Module, int, float, str)):
        hint = f"{_describe(made)}: return {forms}"
    elif isinstance(made, Iterator):
        hint = f"a {type(made).__name__}, which can be read only once: return a list of its batches, or a DataLoader"
    elif isinstance(made, Mapping) and {"train", "test"} & made.keys():
        hint = f"{_describe(made)}: name the parts of a split {', '.join(KEYS)}"
    else:
        return made
    raise CurvlabError(f"{name} returns {hint}")


def _take_split(name: str, made: Mapping[str, Any]) -> dict[str, np.ndarray]:
    keys = (*KEYS, "classes")
    if missing := [key for key in KEYS if key not in made]:
        raise CurvlabError(f"{name} returns a dict without {missing[0]}: it needs {', '.join(KEYS)}")
    if unknown := [key for key in made if key not in keys]:
        raise CurvlabError(f"{name} returns a dict with {unknown[0]!r}: its keys may be {', '.join(keys)}")
    values = {key: value.detach().cpu() if isinstance(value, Tensor) else value for key, value in made.items()}
    try:
        return {key: np.asarray(value) for key, value in values.items()}
    except (TypeError, ValueError, RuntimeError) as error:
        raise CurvlabError(f"{name} returns values that are not tensors or arrays: {to_sentence(error)}") from error


def _describe(value: object) -> str:
    if isinstance(value, type):
        return f"the class {value.__name__}"
    return describe_value(value) if isinstance(value, (int, float, str, Tensor)) else describe(value)


def load_own(model: str, data: str, place: Callable[[nn.Module], nn.Module]) -> Dataset | OwnProblem:
    """Return the data of a function of the user.

    Args:
        model: Name of the network, or ``module:function``.
        data: ``module:function``, or ``none`` if the function of the network returns a ``Problem``.
        place: Function that moves a network to its device and dtype.

    Raises:
        CurvlabError: A function fails, or the network and the data do not fit together.
    """
    made = None if data == NO_DATA else make_data(data)
    if isinstance(made, Dataset):
        return made
    if data == NO_DATA and not names_function(model):
        raise CurvlabError(
            f"data is {NO_DATA}, which is for a function of your own in --model that returns a curvlab.Problem, not "
            f"for {model}: give data"
        )
    if not names_function(model):
        raise CurvlabError(
            f"{data} returns data without a split, and {model} is built for the samples and classes of a data set: "
            f"return {SPLIT}, or name a function of your own in --model"
        )
    network, problem = make_network(model, 0)
    if problem is not None:
        _check_no_data(model, data)
        moved = problem.with_model(place(network))
        parameter = dict(network.named_parameters())[moved.space.names[0]]
        moved.dtype, moved.device = parameter.dtype, parameter.device
        return OwnProblem(model, moved)
    if made is None:
        raise CurvlabError(
            f"{model} returns a {type(network).__name__}, and there are no data: add --data with a function of your "
            "own, the name of a data set or a file, or return a curvlab.Problem, which contains the data"
        )
    try:
        with seeded(0):  # a loader that shuffles starts from the same state in every process
            return OwnProblem(data, Problem(place(network), "cross_entropy", made))
    except CurvlabError as error:
        raise CurvlabError(f"{model} and {data}: {error}") from error


def _check_no_data(model: str, data: str) -> None:
    if data != NO_DATA:
        raise CurvlabError(f"{model} returns a curvlab.Problem, which contains the data: leave out --data")


# Configurations -------------------------------------------------------------------------------------------------------


def fill_defaults(kind: Any, values: Mapping[str, Any], given: Collection[str]) -> dict[str, Any]:
    """Return the values of a configuration with other defaults for the functions that it names.

    Args:
        kind: Class of the configuration; its ``with_function`` has the defaults.
        values: All values.
        given: Names of the values that the user has given; they do not change.
    """
    found = {}
    if "data" in values and names_function(str(values.get("model", ""))):
        found["data"] = NO_DATA
    for name, defaults in getattr(kind, "with_function", {}).items():
        if names_function(str(values[name])) or {**values, **found}[name] == NO_DATA:
            found |= defaults
    return {**values, **{name: value for name, value in found.items() if name not in given}}


def list_functions(config: Any) -> dict[str, str]:
    """Return the functions of the user in a configuration: name of the option -> ``module:function``."""
    named = {option: str(getattr(config, option, "")) for option in ("model", "data")}
    return {option: name for option, name in named.items() if names_function(name)}


def describe_functions(
    config: Any, data: Dataset | OwnProblem, again: Dataset | OwnProblem, data_hash: str
) -> dict[str, dict[str, str | None]]:
    """Return the provenance of the functions of the user in a configuration, by option.

    Args:
        config: The configuration.
        data: The data of the configuration.
        again: The same data, loaded a second time.
        data_hash: Hash of the data.

    Returns:
        For ``model`` and ``data``, as far as they name a function: ``function``, ``file``, ``source`` (a hash of the
        file and of the user's own modules that it imports) and ``returned`` (hashes of the weights and the samples).

    Raises:
        CurvlabError: A function returns something else at its second call.
    """
    functions, returned = list_functions(config), {}
    if "model" in functions:
        weights = [_hash_weights(make_network(functions["model"], 0)[0]) for _ in range(2)]
        _require_equal(functions["model"], "weights", weights)
        returned["model"] = weights[0]
    if "data" in functions:
        _require_equal(functions["data"], "samples", list(map(_hash_start, (data, again))))
        returned["data"] = data_hash
    elif config.data == NO_DATA:
        _require_equal(functions["model"], "samples", list(map(_hash_start, (data, again))))
        returned["model"] += f" {data_hash}"
    return {
        option: {
            "function": name,
            "file": find_file(name),
            "source": fingerprints([name]).get(name.partition(":")[0]),
            "returned": returned[option],
        }
        for option, name in functions.items()
    }


def _require_equal(name: str, what: str, hashes: Sequence[str]) -> None:
    if hashes[0] != hashes[1]:
        raise CurvlabError(
            f"{name} returns other {what} at its second call, although the random numbers of Python, NumPy and torch "
            "start from the same seed: seed every other generator that it uses, since every run calls it again"
        )


def _hash_weights(model: nn.Module) -> str:
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(name.encode())
        if isinstance(tensor, Tensor) and not nn.parameter.is_lazy(tensor):
            _add(digest, [tensor])
    return digest.hexdigest()


def _hash_start(data: Dataset | OwnProblem) -> str:
    return data.first_fingerprint() if isinstance(data, OwnProblem) else data.fingerprint()
